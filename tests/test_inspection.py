"""What is measured inside a net, held against NumPy; and that looking leaves no trace."""

import keras
import numpy as np
import pytest

from keras_norm import models
from keras_norm._gradients import float64_promotion
from keras_norm._layerwise_program import intercepted
from keras_norm.inspection import (
    LEVELS,
    Distribution,
    InsideMonitor,
    along_gradient,
    covariate_shift,
    distributions,
)
from keras_norm.layers import Dropout

pytestmark = pytest.mark.core

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)), RNG.normal(size=(12, 2))


def linear(*widths):
    """A net of dense layers without biases, with the mean squared error, in float64."""
    keras.utils.set_random_seed(0)
    options = {"use_bias": False, "dtype": "float64"}
    layers = [keras.layers.Dense(n, name=f"d{n}", **options) for n in widths]
    model = keras.Sequential([keras.Input((3,), dtype="float64"), *layers])
    model.compile("sgd", keras.losses.MeanSquaredError(dtype="float64"))
    return model


@pytest.fixture
def float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    with float64_promotion():
        yield
    keras.config.set_floatx(before)


def classifier(normalization="batch"):
    keras.utils.set_random_seed(0)
    model = models.MLP((6, 5), normalization, input_shape=(3,), classes=3, dropout=0.2)
    model.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def state(model):
    return [np.array(v.numpy()) for v in model.variables]


INPUTS = X.astype("float32"), np.arange(12) % 3


def test_a_quadratic_loss_along_its_gradient(float64):
    model = linear(2)
    w = np.array(model.get_weights()[0])
    hessian = X.T @ X / 12  # of the mean over 12 examples and 2 outputs: 2 / 24 X^T X

    def loss(w):
        return np.mean((X @ w - Y) ** 2)

    g = X.T @ (X @ w - Y) / 12
    lengths = [0.1, 0.5]
    found = along_gradient(model, X, Y, lengths)
    assert found.loss == pytest.approx(loss(w), rel=1e-12)
    assert found.gradient_norm == pytest.approx(np.linalg.norm(g), rel=1e-12)
    np.testing.assert_allclose(found.losses, [loss(w - t * g) for t in lengths], rtol=1e-12)
    change = np.linalg.norm(hessian @ g)
    np.testing.assert_allclose(found.changes, [t * change for t in lengths], rtol=1e-9)
    assert found.smoothness == pytest.approx(change / np.linalg.norm(g), rel=1e-9)


def test_covariate_shift_of_two_layers(float64):
    model = linear(4, 2)
    a, b = (np.array(w) for w in model.get_weights())

    def gradient_of_b(a):
        return (X @ a).T @ (X @ a @ b - Y) / 12

    g = X.T @ (X @ a @ b - Y) @ b.T / 12
    before, after = gradient_of_b(a), gradient_of_b(a - 0.3 * g)
    found = covariate_shift(model, X, Y, 0.3)
    assert (found["d4"].shift, found["d4"].cosine) == (0.0, 1.0)
    shift = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert found["d2"].shift == pytest.approx(shift, rel=1e-10)
    cosine = np.sum(after * before) / np.linalg.norm(after) / np.linalg.norm(before)
    assert found["d2"].cosine == pytest.approx(cosine, rel=1e-10)


def test_distributions_of_a_linear_net(float64):
    model = linear(4, 2)
    a, b = (np.array(w) for w in model.get_weights())
    found = distributions(model, X, Y)
    outputs, gradient = X @ a, (X @ a @ b - Y) @ b.T  # of an example: 2 / 2 outputs
    first = found["d4"]
    np.testing.assert_allclose(first.mean, outputs.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(first.std, outputs.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(first.quantiles, np.quantile(outputs, LEVELS), rtol=1e-12)
    assert first.gradient_rms == pytest.approx(np.sqrt(np.mean(gradient**2)), rel=1e-12)
    np.testing.assert_allclose(
        first.gradient_quantiles, np.quantile(gradient, LEVELS), rtol=1e-10, atol=1e-15
    )
    assert list(found) == ["d4", "d2"]


def test_drift_and_scale_are_those_of_shifted_and_stretched_channels():
    a = np.random.default_rng(1).normal(3, 2, (1000, 2))
    a = (a - a.mean(axis=0)) / a.std(axis=0)
    b = np.concatenate([a, np.zeros((1000, 1))], axis=1)  # a dead channel, left out
    before, after = (Distribution.of(v, v) for v in (b, b * [2, 8, 0] + [3, 4, 1]))
    drift, scale = after.since(before)
    assert drift == pytest.approx(np.sqrt((9 + 16) / 2))
    assert scale == pytest.approx(4)
    dead = Distribution.of(b[:, 2:], b[:, 2:])
    assert np.isnan(dead.since(dead)).all()
    assert dead.zeros == 1


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("normalization", ["batch", None])
def test_looking_leaves_no_trace(normalization):
    model = classifier(normalization)
    before = state(model)
    along_gradient(model, *INPUTS, [0.1, 1.0])
    covariate_shift(model, *INPUTS, 0.1)
    distributions(model, *INPUTS)
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow_on_jax
def test_the_monitor_sees_training_and_does_not_disturb_it():
    x = np.random.default_rng(2).normal(size=(40, 3)).astype("float32")
    y = np.arange(40) % 3
    weights, losses = [], []
    monitor = InsideMonitor(*INPUTS, every=3, layers=["dense2_norm"], shifts=["dense2"])
    for callbacks in ([], [monitor]):
        model = classifier()
        losses += model.fit(x, y, batch_size=10, verbose=0, callbacks=callbacks).history["loss"]
        weights.append(model.get_weights())
    for alone, watched in zip(*weights, strict=True):
        np.testing.assert_array_equal(alone, watched)
    assert losses[0] == losses[1]
    assert [record["step"] for record in monitor.records] == [0, 3, 4]
    end = along_gradient(model, *INPUTS, [0.05, 0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(monitor.records[-1]["losses"], end.losses, rtol=1e-6)
    last = {r["layer"]: r for r in monitor.layer_records if r["step"] == 4}
    now = distributions(model, *INPUTS, ["dense2_norm"])["dense2_norm"]
    np.testing.assert_allclose(last["dense2_norm"]["quantiles"], now.quantiles, rtol=1e-6)
    assert last["dense2_norm"]["drift"] > 0
    shift = covariate_shift(model, *INPUTS, 0.1, ["dense2"])["dense2"].shift
    # In lengths of the gradient: what float32 rounds of it does not shrink with the shift.
    assert last["dense2"]["shift"] == pytest.approx(shift, rel=0, abs=1e-6)


@pytest.mark.slow_on_jax
def test_the_monitor_counts_steps_of_which_several_are_taken_at_once():
    x, y = np.random.default_rng(2).normal(size=(60, 3)).astype("float32"), np.arange(60) % 3
    model = classifier()
    several = keras.backend.backend() != "torch"  # where Keras takes each step on its own
    model.steps_per_execution = 4 if several else 1
    monitor = InsideMonitor(*INPUTS, every=5, layers=(), shifts=())
    model.fit(x, y, batch_size=5, epochs=2, verbose=0, callbacks=[monitor])
    expected = [0, 8, 12, 16, 20, 24] if several else [0, 5, 10, 15, 20, 24]
    assert [record["step"] for record in monitor.records] == expected


@pytest.mark.slow_on_jax
def test_the_monitor_looks_where_the_rate_is_0():
    x, y = np.random.default_rng(2).normal(size=(20, 3)).astype("float32"), np.arange(20) % 3
    model = classifier()
    rate = keras.optimizers.schedules.PolynomialDecay(0.0, 4, 0.1)
    model.compile(keras.optimizers.SGD(rate), model.loss)
    monitor = InsideMonitor(*INPUTS, layers=(), shifts=["dense2"])
    model.fit(x, y, batch_size=10, verbose=0, callbacks=[monitor])
    first, last = monitor.records
    assert (first["losses"] == first["loss"]).all()
    assert not first["changes"].any()
    assert last["changes"].all()
    assert monitor.layer_records[0]["shift"] == 0 < monitor.layer_records[1]["shift"]


def test_gradients_of_folded_time_are_those_of_an_example(float64):
    model = linear(2)
    inputs = keras.Input((5, 3), dtype="float64")
    steps = keras.ops.reshape(inputs, (-1, 3))
    folded = keras.Model(inputs, keras.ops.reshape(model.layers[0](steps), (-1, 5, 2)))
    folded.compile("sgd", keras.losses.MeanSquaredError(dtype="float64"))
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5, 2))
    kernel = model.layers[0].get_weights()[0]
    gradient = 2 * (x @ kernel - y) / (5 * 2)  # of the loss of one example
    found = distributions(folded, x, y, ["d2"])["d2"]
    assert found.gradient_rms == pytest.approx(np.sqrt(np.mean(gradient**2)), rel=1e-12)


def test_dropout_is_the_same_at_both_ends_of_a_step():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((200,)), Dropout(0.5), keras.layers.Dense(1, use_bias=False)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    x, y = np.ones((1, 200), "float32"), np.zeros((1, 1), "float32")
    found = along_gradient(model, x, y, [1e-3])
    kept = found.smoothness / 8  # loss (2 sum of kept w)^2: curvature 2 * 2^2 * number of kept
    assert 60 < kept < 140
    assert kept == pytest.approx(round(kept), abs=0.02)
    along_the_line = (1 - 1e-3 * found.smoothness) ** 2
    assert found.losses[0] == pytest.approx(found.loss * along_the_line, rel=1e-3)


def test_inputs_by_name():
    inputs = {"a": keras.Input((3,), name="a")}
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs["a"]))
    model.compile("sgd", "mse")
    found = along_gradient(model, {"a": X.astype("float32")}, Y.astype("float32"), [1e-3])
    assert found.losses[0] < found.loss


class Squares(keras.layers.Layer):
    """Adds the mean square of its inputs to the loss."""

    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


def test_a_loss_without_targets(float64):
    inputs = keras.Input((3,), dtype="float64")
    model = keras.Sequential([inputs, *linear(2).layers, Squares(name="squares", dtype="float64")])
    model.compile("sgd")
    w = np.array(model.get_weights()[0])
    found = along_gradient(model, X, None, [0.1])
    assert found.loss == pytest.approx(np.mean((X @ w) ** 2), rel=1e-12)
    g = X.T @ X @ w / 12
    assert found.losses[0] == pytest.approx(np.mean((X @ (w - 0.1 * g)) ** 2), rel=1e-12)
    inside = distributions(model, X, None)
    assert inside["d2"].gradient_rms == pytest.approx(np.sqrt(np.mean((X @ w) ** 2)), rel=1e-12)
    assert inside["squares"].gradient_rms == 0  # the loss is taken of its inputs
    assert covariate_shift(model, X, None, 0.1)["d2"].shift == 0


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized_layers(mode):
    """Keras calls these by another method."""
    keras.utils.set_random_seed(0)
    model = models.MLP((6,), None, input_shape=(3,), classes=3)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = INPUTS
    layer = model.get_layer("logits")
    layer.quantize(mode)
    # On TensorFlow, Keras leads no gradient through a float8 layer that is not compiled.
    found = distributions(model, x, y, ["logits"] if mode == "float8" else None)
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(found["logits"].mean, outputs.mean(axis=0), rtol=1e-4, atol=1e-6)
    p = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    gradient = p - np.eye(3)[y]  # of the loss of an example
    assert found["logits"].gradient_rms == pytest.approx(np.sqrt(np.mean(gradient**2)), rel=1e-4)
    assert {"call", "quantized_call", "rematerialized_call"}.isdisjoint(vars(layer))


def test_a_layer_that_is_named_twice():
    """It was patched twice and restored first to last: the first patch stayed for good."""
    model, (x, y) = classifier(), INPUTS
    assert list(distributions(model, x, y, ["dense1", "dense1"])) == ["dense1"]
    layer = model.get_layer("dense1")
    with intercepted([layer, layer], lambda layer, call, *args: call(*args)):
        assert "call" in vars(layer)
    assert not {"call", "rematerialized_call"} & set(vars(layer))


@pytest.mark.slow_on_jax
def test_layers_without_one_floating_output_are_left_out():
    """The states of a recurrent layer, and whole numbers, have no distribution of their own."""
    inputs = keras.Input((4,))
    whole = keras.layers.Discretization(bin_boundaries=[0.0, 1.0], name="whole")(inputs)
    embedded = keras.layers.Embedding(3, 2, name="embedded")(whole)
    sequence, state, _ = keras.layers.LSTM(3, return_state=True, name="states")(embedded)
    model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(sequence + state))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = RNG.normal(size=(6, 4)).astype("float32"), np.arange(6) % 3
    found = distributions(model, x, y)
    assert {"embedded", "logits"} <= set(found)
    assert {"whole", "states"}.isdisjoint(found)
    assert found["embedded"].gradient_rms > 0
    for name in ("whole", "states"):
        with pytest.raises(ValueError, match=rf"one array of a floating.*Received: \['{name}'\]"):
            distributions(model, x, y, [name, "logits"])


def test_errors():
    model, (x, y) = classifier(), INPUTS
    for lengths in ([], [0.0], [np.inf]):
        with pytest.raises(ValueError, match=r"`lengths` must be .* Received: lengths=\["):
            along_gradient(model, x, y, lengths)
    for length in (-1, np.inf, "0.1", None):
        with pytest.raises(ValueError, match=rf"step length > 0.* Received: length={length!r}"):
            covariate_shift(model, x, y, length)
    with pytest.raises(ValueError, match=r"with trainable weights.*Received: \['flatten'\]"):
        covariate_shift(model, x, y, 1.0, ["flatten"])
    with pytest.raises(ValueError, match=r"Received: \['nothing'\]"):
        distributions(model, x, y, ["nothing"])
    with pytest.raises(ValueError, match=r"must be compiled.*Received: model='mlp'"):
        along_gradient(models.MLP(input_shape=(3,)), x, y, [1.0])
    for name in ("layers", "shifts"):  # it was read letter by letter
        with pytest.raises(ValueError, match=rf"list of names.*{name}='dense1'.*\['dense1'\]"):
            InsideMonitor(x, y, **{name: "dense1"})
    for look in (distributions, lambda *given: covariate_shift(*given[:3], 0.1, given[3])):
        with pytest.raises(ValueError, match=r"list of names.*layers='dense1'"):
            look(model, x, y, "dense1")
    with pytest.raises(ValueError, match="every=0"):
        InsideMonitor(x, y, every=0)
    assert InsideMonitor(x, y, every=np.int64(2)).every == 2
    with pytest.raises(ValueError, match=r"lengths=\(-1,\)"):
        InsideMonitor(x, y, lengths=(-1,))
    shared = keras.layers.Dense(3, name="shared")
    inputs = keras.Input((3,))
    twice = keras.Model(inputs, shared(shared(inputs)))
    twice.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="'shared', called more than once"):
        distributions(twice, x, y)
    silent = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    silent.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"gradient of norm 0\.0"):
        along_gradient(silent, np.zeros((2, 3)), np.zeros((2, 1)), [1.0])

"""The doctor of the gap between training and inference: each disease is made, and named first."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_norm.layers
from keras_norm._diagnosis import Diagnosis, _fits
from keras_norm.statistics import diagnose, reestimate

pytestmark = pytest.mark.core

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def examples(n=192, seed=0, shift=20.0, scale=5.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 4)) + 1.5 * (2 * y[:, None] - 1)
    return (scale * x + shift).astype("float32"), y


MADE = {}


def network(dropout=0.0):
    """Two normalizations, one of ours and one of Keras; weights that separate the classes.

    Made once, and then put back: what is compiled for its statistics stays compiled.
    """
    if dropout not in MADE:
        keras.utils.set_random_seed(3)
        inputs = keras.Input((4,))
        x = keras_norm.layers.BatchNormalization(name="a")(inputs)
        x = layers.BatchNormalization(name="b")(layers.Dense(6, activation="relu")(x))
        x = layers.Dropout(dropout, name="drop", seed=1)(x)
        model = keras.Model(inputs, layers.Dense(2)(x))
        model.compile(keras.optimizers.SGD(0.1), LOSS)
        fit_last(model)
        reestimate(model, examples()[0])
        MADE[dropout] = model, [(v, np.array(v.numpy())) for v in model.variables]
    model, values = MADE[dropout]
    for variable, value in values:
        variable.assign(value)
    for layer in model.layers:
        layer.trainable = True
    return model


def fit_last(model):
    """A last kernel by least squares, on exact statistics: no training step is compiled."""
    x, y = examples()
    reestimate(model, x)
    features = keras.Model(model.input, model.layers[-1].input)
    z = np.asarray(ops.convert_to_numpy(features(ops.convert_to_tensor(x), training=False)))
    w = np.linalg.solve(z.T @ z + 10 * np.eye(6), z.T @ (4.0 * (2 * y - 1)))
    model.layers[-1].kernel.assign(np.stack([-w / 2, w / 2], axis=1))


def bits(model):
    return [np.array(v.numpy()).tobytes() for v in model.variables]


@pytest.mark.slow_on_jax
def test_nothing_is_wrong():
    model = network()
    before = bits(model)
    found = diagnose(model, examples(), batch_size=96)
    assert bits(model) == before
    assert found.samples == 192
    assert abs(found.gap) < 0.01
    assert sum(abs(c.change) for c in found.causes) < 0.05
    assert {"cold statistics", "frozen layers", "masks"}.isdisjoint(c.name for c in found.causes)


@pytest.mark.slow_on_jax
def test_losses_are_those_of_keras():
    model = network(dropout=0.8)
    x, y = examples(96)
    found = diagnose(model, (x, y), batch_size=32)
    assert found.inference_loss == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-4)
    assert sum(c.change for c in found.causes) == pytest.approx(found.gap, abs=1e-5)
    assert [name for name, _ in found["small batches"].layers] == ["a", "b"]


@pytest.mark.slow_on_jax
def test_cold_statistics():
    model = network()
    for name in ("a", "b"):
        layer = model.get_layer(name)
        for variable, initial in ((layer.moving_mean, 0.0), (layer.moving_variance, 1.0)):
            value = np.array(variable.numpy())
            variable.assign(0.4 * value + 0.6 * initial)
    found = diagnose(model, examples())
    assert found.first == "cold statistics", str(found)
    assert (
        "60% of its statistics are still the initial 0 and 1" in found["cold statistics"].evidence
    )
    assert "reestimate" in found.causes[0].remedy
    reestimate(model, examples()[0])
    assert diagnose(model, examples()).first != "cold statistics"


def test_untouched_statistics():
    model = network()
    for layer in (model.get_layer("a"), model.get_layer("b")):
        layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
        layer.moving_variance.assign(np.ones(layer.moving_mean.shape))
    found = diagnose(model, examples())
    assert found.first == "cold statistics", str(found)
    assert "a: 100% of" in found.causes[0].evidence


@pytest.mark.slow_on_jax
def test_domain_shift():
    found = diagnose(network(), examples(shift=60.0, scale=12.0))
    assert found.first == "domain shift", str(found)
    assert found["domain shift"].layers[0][0] == "a"
    assert found.gap > 0.1
    assert "adapt" in found.causes[0].remedy


@pytest.mark.slow_on_jax
def test_small_batches():
    found = diagnose(network(), examples(64), batch_size=2)
    assert found.first == "small batches", str(found)
    assert found["small batches"].change < 0  # training is the worse


@pytest.mark.slow_on_jax
def test_dropout():
    found = diagnose(network(dropout=0.8), examples(), batch_size=96)
    assert found.first == "dropout", str(found)
    assert found["dropout"].layers[0][0] == "drop"
    assert found["dropout"].change == pytest.approx(found.gap, abs=0.05)


@pytest.mark.slow_on_jax
def test_frozen_layers():
    """Its inputs, a twentieth of what they were, leave the network its biases."""
    model = network()
    layer = model.get_layer("a")
    layer.moving_variance.assign(np.array(layer.moving_variance.numpy()) * 400)
    layer.trainable = False
    reestimate(model, examples()[0], layers=["b"])  # as training would
    found = diagnose(model, examples(), batch_size=96)
    assert found.first == "frozen layers", str(found)
    assert [name for name, _ in found["frozen layers"].layers] == ["a"]
    assert abs(found["frozen layers"].change) > 0.01
    assert "a" not in dict(found["small batches"].layers)


def padded(n, length, rng, y=None):
    y = rng.integers(0, 2, n) if y is None else y
    tokens = np.where(y[:, None] == 1, rng.integers(5, 10, (n, 12)), rng.integers(1, 6, (n, 12)))
    return np.where(np.arange(12) < length, tokens, 0), y


@pytest.mark.slow_on_jax
def test_masks():
    """A function drops the mask: padding, of which there is more than in training, counts."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12,), dtype="int32")
    embedding = layers.Embedding(10, 3, mask_zero=True)
    x = keras_norm.layers.BatchNormalization(name="norm")(ops.tanh(embedding(inputs)))
    x = ops.sum(x * ops.expand_dims(ops.cast(inputs > 0, "float32"), -1), axis=1)
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile("sgd", LOSS)
    rng = np.random.default_rng(0)
    table = 0.2 * rng.normal(size=(10, 3))
    table[0] = 4.0
    table[5:] += 0.6
    embedding.embeddings.assign(table)
    model.layers[-1].kernel.assign([[-1.0, 1.0]] * 3)
    reestimate(model, padded(512, 11, rng)[0])
    found = diagnose(model, padded(512, 5, rng))
    assert found.first == "masks", str(found)
    assert "norm: gets no mask" in found["masks"].evidence


@pytest.mark.slow_on_jax
def test_masks_that_arrive_are_no_cause():
    inputs = keras.Input((12,), dtype="int32")
    x = layers.Embedding(10, 3, mask_zero=True)(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    model.compile("sgd", LOSS)
    found = diagnose(model, padded(64, 5, np.random.default_rng(0)))
    assert "masks" not in [c.name for c in found.causes]


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("units", [6, 7])
def test_a_mask_of_as_many_steps_as_there_are_channels(units):
    """After the pooling there are no steps left, whatever the number of units."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(10, 3, mask_zero=True)(inputs))
    x = layers.BatchNormalization(name="norm")(layers.Dense(units)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile("sgd", LOSS)
    rng = np.random.default_rng(0)
    x, y = padded(64, rng.integers(1, 7, (64, 1)), rng)
    found = diagnose(model, (x[:, :6], y))
    assert "cold statistics" in [c.name for c in found.causes]
    assert "masks" not in [c.name for c in found.causes]


def test_which_masks_fit():
    for shape, axis, expected in (
        ((4, 5, 6), -1, True),
        ((4, 5, 6), (1, 2), False),
        ((4, 6, 5), -1, False),
        ((4, 5), -1, False),
        ((4, 5), 1, False),
    ):
        assert _fits(np.ones((4, 5), bool), shape, axis) == expected
    assert _fits(np.ones((4, 1), bool), (4, 1), -1)


@pytest.mark.slow_on_jax
def test_a_kernel_that_is_assigned_in_training(monkeypatch):
    """Spectral normalization divides it, which the normalization after it undoes."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    spectral = layers.SpectralNormalization(layers.Dense(6))
    x = layers.Dense(2)(layers.BatchNormalization()(spectral(inputs)))
    model = keras.Model(inputs, x)
    model.compile("sgd", LOSS)
    x, y = examples(96)
    spectral.layer.kernel.assign(ops.convert_to_numpy(spectral.layer.kernel) * 3)
    reestimate(model, x)
    before, loss = bits(model), model.evaluate(x, y, verbose=0)
    found = diagnose(model, (x, y), batch_size=96)
    assert bits(model) == before
    assert found.inference_loss == pytest.approx(loss, rel=1e-4)
    assert found.first is None, str(found)
    kernel = np.array(spectral.layer.kernel.numpy())

    def fail_in_training(**_):
        if not np.array_equal(spectral.layer.kernel.numpy(), kernel):
            raise RuntimeError("in training")
        return ops.zeros(())

    monkeypatch.setattr(model, "compute_loss", fail_in_training)
    with pytest.raises(RuntimeError, match="in training"):
        diagnose(model, (x, y), batch_size=96)
    assert bits(model) == before


def test_a_normalization_that_is_called_twice():
    inputs = keras.Input((4,))
    norm = layers.BatchNormalization(name="shared")
    x = layers.Dense(2)(norm(layers.Dense(4, bias_initializer="ones")(norm(inputs))))
    model = keras.Model(inputs, x)
    model.compile("sgd", LOSS)
    x, y = examples(96)
    reestimate(model, x)
    found = diagnose(model, (x, y), batch_size=96)
    assert found.first == "shared layers", str(found)
    assert found["shared layers"].evidence == "shared: is called 2 times"
    assert "One normalization for each call" in found.causes[0].remedy
    assert "small batches" not in [c.name for c in found.causes]


def test_rounding_is_no_cause():
    """Of a large loss it is large, and of one batch there is no standard error to hide it."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)])
    model.compile("sgd", "mse")
    x, _ = examples(96)
    reestimate(model, x)
    mean = model.layers[0].moving_mean
    mean.assign(mean + 5e-5)  # 1e-5 sigma
    found = diagnose(model, (x, np.full((96, 1), 35.0)), batch_size=96)
    assert found.inference_loss > 1000
    assert found.first is None, str(found)
    one = found.causes[0]
    assert one.tolerance == pytest.approx(1e-5 * found.inference_loss, rel=1e-4)
    assert found.to_dict()["causes"][0]["tolerance"] == one.tolerance
    assert dataclasses.replace(one, change=2 * one.tolerance).significant
    assert not dataclasses.replace(one, change=0.9 * one.tolerance).significant


def test_what_has_no_effect_is_no_cause():
    """A dropout of rate 0, frozen statistics that are exact, and nothing else depends on the mode.

    These were listed with +0 ± 0.
    """
    keras.utils.set_random_seed(0)
    norm = layers.BatchNormalization(epsilon=1e-3)
    model = keras.Sequential([keras.Input((4,)), norm, layers.Dropout(0.0), layers.Dense(2)])
    model.compile("sgd", LOSS)
    norm.trainable = False
    found = diagnose(model, examples(64), batch_size=32)
    assert [c.name for c in found.causes] == ["frozen layers"]
    norm.gamma.assign(np.zeros(4))  # whatever the statistics are, it does not matter
    found = diagnose(model, examples(64), batch_size=32)
    assert found.causes == ()
    assert len(str(found).splitlines()) == 1


@pytest.mark.parametrize("evaluated", [False, True])
def test_metrics_of_several_outputs_stay(evaluated):
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(inputs)
    model = keras.Model(inputs, {"p": layers.Dense(2)(x), "q": layers.Dense(2)(x)})
    model.compile("sgd", {"p": LOSS, "q": LOSS}, metrics={"p": ["accuracy"], "q": []})
    x, y = examples(64)
    data = x, {"p": y, "q": y}
    if evaluated:
        model.evaluate(*data, verbose=0)
    before = {v.path: np.array(v.numpy()) for v in model.metrics_variables}
    diagnose(model, data, batch_size=32)
    for variable in model.metrics_variables:
        np.testing.assert_array_equal(variable.numpy(), before.get(variable.path, 0.0))


def test_values_that_are_not_finite():
    x, y = examples(64)
    model = network()
    before = bits(model)
    x[40, 1] = np.nan
    found = diagnose(model, (x, y))
    assert (found.first, found.causes[0].layers[0][0]) == ("non-finite values", "data")
    assert "batch" in found.causes[0].evidence
    assert bits(model) == before
    model.get_layer("b").moving_variance.assign(np.full(6, np.inf))
    before = bits(model)
    found = diagnose(model, examples(64))
    assert (found.first, found.causes[0].layers[0][0]) == ("non-finite values", "b")
    assert "moving_variance of layer 'b'" in found.causes[0].evidence
    assert bits(model) == before
    with pytest.raises(ValueError, match="non-finite values"):
        found.plot()


class Compiling(layers.Layer):
    """Has compiled what it does by the time that it is looked at, a function for each mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = layers.BatchNormalization(), layers.Dropout(0.9, seed=0)
        self.functions = {}

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, training=False):
        import tensorflow as tf

        def both(x):
            return self.drop(self.norm(x, training=training), training=training)

        return self.functions.setdefault(training, tf.function(both))(x)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of tf.function")
def test_code_that_compiles_itself():
    x, y = examples(96)
    model = keras.Sequential([keras.Input((4,)), Compiling(), layers.Dense(2)])
    model.layers[0].functions.clear()  # of the input that Keras built it with
    model.compile("sgd", LOSS)
    for training in (False, True):
        model(x[:32], training=training)
    model.layers[0].norm.set_weights([np.ones(4), np.zeros(4), np.zeros(4), np.ones(4)])
    found = diagnose(model, (x, y), batch_size=32)
    assert found.first == "cold statistics"
    assert abs(found["dropout"].change) > 0.05
    assert all(abs(c.change) < 1e-3 for c in found.causes if c.name == "other layers")


class Untold(keras.Model):
    """A model that `fit` has no way to tell that it trains."""

    def __init__(self):
        super().__init__()
        self.norm, self.dense = layers.BatchNormalization(), layers.Dense(2)

    def call(self, x):
        return self.dense(self.norm(x))


class Told(Untold):
    def call(self, x, training=None):
        return self.dense(self.norm(x, training=training))


class NotHandedOn(Untold):
    def call(self, x, training=None):
        return self.dense(self.norm(x))


class Frozen(Untold):
    def call(self, x, training=None):
        return self.dense(self.norm(x, training=False))


class OwnStep(Untold):
    def train_step(self, *args):
        return super().train_step(*args)


def test_a_model_that_fit_cannot_train():
    data = examples(64)
    for kind in (Untold, Told):
        model = kind()
        model.compile("sgd", LOSS)
        model.fit(*data, verbose=0)
        moved = bool(np.any(ops.convert_to_numpy(model.norm.moving_mean)))
        assert moved == (kind is Told)  # what Keras does
        found = diagnose(model, data)
        assert (found.first == "no training mode") == (kind is Untold)
    assert "no training mode" not in [c.name for c in found.causes]
    model = Untold()
    model.compile("sgd", LOSS)
    model(data[0])
    found = diagnose(model, data)
    assert "Untold.call has no argument `training`" in str(found)
    assert "Remedy: Give the model's `call` an argument" in str(found)
    assert {c.name for c in found.causes} > {"no training mode", "cold statistics"}
    model = OwnStep()
    model.compile("sgd", LOSS)
    model(data[0])
    assert "no training mode" not in [c.name for c in diagnose(model, data).causes]


def test_a_mode_that_is_not_handed_on():
    data = examples(64)
    for kind in (NotHandedOn, Frozen):
        model = kind()
        model.compile("sgd", LOSS)
        model.fit(*data, verbose=0)
        moved = bool(np.any(ops.convert_to_numpy(model.norm.moving_mean)))
        lost = kind is NotHandedOn and keras.backend.backend() == "jax"
        assert moved == (kind is NotHandedOn and not lost)  # what Keras does
        found = diagnose(model, data)
        assert ("no training mode" in [c.name for c in found.causes]) == lost
    if keras.backend.backend() == "jax":
        model = NotHandedOn()
        model.compile("sgd", LOSS)
        model(data[0])
        before = model.get_weights()
        found = diagnose(model, data)
        assert found.first == "no training mode"
        text = "NotHandedOn.call does not hand `training` on to batch_normalization"
        assert text in str(found)
        assert "hand it on to the layers" in str(found)
        for was, now in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(was, now)


def test_a_layer_that_makes_them():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(inputs)
    x = layers.Activation(lambda v: 1.0 / (v - v), name="division")(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile("sgd", LOSS)
    found = diagnose(model, examples(64))
    assert found.causes[0].layers[0][0] == "division"
    assert "finite inputs, in inference mode" in found.causes[0].evidence


@pytest.mark.slow_on_jax
def test_batches_and_report(tmp_path):
    model = network(dropout=0.8)
    x, y = examples(100)
    arrays = diagnose(model, (x, y), batch_size=100, name="all")
    stream = diagnose(model, ((x[i : i + 50], y[i : i + 50]) for i in (0, 50)))
    assert (stream.samples, stream.batch_size) == (100, 50)
    assert stream.inference_loss == pytest.approx(arrays.inference_loss, rel=1e-5)
    text = str(arrays).splitlines()
    assert text[0].startswith("100 examples of all in batches of 100: loss ")
    assert any(line.startswith("dropout") for line in text)
    json.dumps(arrays.to_dict(), allow_nan=False)
    pytest.importorskip("matplotlib")
    figure = arrays.plot(tmp_path / "gap.png")
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels.count("a") == 2
    assert labels.count("drop") == 1
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg.*gap\.jpg"):
        arrays.plot(tmp_path / "gap.jpg")


@pytest.mark.slow_on_jax
def test_at_most_so_many_examples():
    model = network()
    x, y = examples(200)
    assert diagnose(model, [(x, y)], samples=60).samples == 60
    assert (
        diagnose(model, ((x[i : i + 50], y[i : i + 50]) for i in (0, 50)), samples=70).samples == 70
    )


def test_what_cannot_be_diagnosed():
    model = network()
    x, y = examples(32)
    for data, message in (
        (x, "needs labels.*ndarray"),
        ([(x,)], "batch without y"),
        ((x[:0], y[:0]), "at least one example"),
        ((x, y[:5]), r"shapes \[\(32, 4\), \(5,\)\]"),
        ((x, y, y[:5]), "same number of examples"),
        (iter([(x[0, 0], y[0])]), "must be batched"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnose(model, data)
    for name, value in (("batch_size", 0), ("samples", 1.5), ("seed", "a"), ("seed", -1)):
        with pytest.raises(ValueError, match=f"`{name}`.*{name}={value!r}"):
            diagnose(model, (x, y), **{name: value})
    with pytest.raises(ValueError, match="not compiled"):
        diagnose(keras.Sequential([keras.Input((4,)), layers.BatchNormalization()]), (x, y))
    assert Diagnosis("d", 1, 1, 0.0, 0.0).first is None

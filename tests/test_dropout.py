"""Dropout: the mask, its scaling and gradient, seeds, and the layer around them."""

import keras
import numpy as np
import pytest
from arrays import array, dtype_of, numpy_dtype, tensor, wide
from differentiation import (
    BACKEND,
    compiled,
    measured_gradient,
    penalty_and_gradient,
    value_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from reference import relative_error

from keras_norm import functional
from keras_norm._gradients import gradients
from keras_norm.gradient_check import check
from keras_norm.layers import Dropout

pytestmark = pytest.mark.core

DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture
def rng():
    return np.random.RandomState(231)


# Published check vectors ------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.7])
def test_published_values(rng, keep):
    """The mean stays near 10, and a fraction of about 1 - keep is zero; inference changes nothing.

    Of 250,000 elements the mean has a standard deviation of sqrt((101 / keep - 100) / 250000),
    the fraction one of sqrt(keep (1 - keep) / 250000); five of them are allowed.
    """
    x = rng.randn(500, 500) + 10
    layer = Dropout(1 - keep, seed=231, dtype="float64")
    y = array(layer(x, training=True))
    assert abs(y.mean() - x.mean()) < 5 * np.sqrt((101 / keep - 100) / x.size)
    assert abs(y.mean() - 10) < 0.2
    zeros = (y == 0).mean()
    assert abs(zeros - (1 - keep)) < 5 * np.sqrt(keep * (1 - keep) / x.size)
    np.testing.assert_array_equal(array(layer(x, training=False)), x)
    np.testing.assert_array_equal(array(layer(x)), x)


def test_published_gradient(rng):
    """Published: 5.4e-11, with a fixed mask and differences of order 2."""
    x, dy = rng.randn(10, 10) + 10, rng.randn(10, 10)
    keep = 0.2
    mask = array(functional.dropout_mask((10, 10), 1 - keep, seed=123))
    report = check(lambda x: functional.dropout(x, mask, 1 - keep), x, upstream=dy)
    assert report.entries[0].max_relative < 5.4e-11
    assert 0 < mask.sum() < 100

    _, (dx,) = gradients(lambda x: ops.sum(functional.dropout(x, mask, 1 - keep) * tensor(dy)), [x])
    np.testing.assert_allclose(array(dx), np.where(mask, dy / keep, 0), rtol=1e-15)


def test_gradient_check_of_the_layer():
    """The mask that the gradient sees is that of the output."""
    x = np.random.default_rng(1).normal(size=(4, 5))
    check(Dropout(0.4, seed=3, dtype="float64"), x).require(1e-9)
    check(Dropout(0.4, noise_shape=(None, 1), dtype="float64"), x).require(1e-9)


# The mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
def test_probability_and_independence(rate):
    """Within five standard deviations: the fraction, and the correlation of neighbours."""
    mask = array(functional.dropout_mask((1000, 1000), rate, seed=0))
    assert mask.dtype == bool
    deviation = np.sqrt(rate * (1 - rate) / mask.size)
    assert abs(mask.mean() - (1 - rate)) <= 5 * deviation
    for axis in (0, 1):
        rates = 1 - mask.mean(axis)
        assert np.abs(rates - rate).max() <= 6 * np.sqrt(rate * (1 - rate) / 1000)
        both = (mask & np.roll(mask, 1, axis)).mean()
        # A product of two has a larger spread than one, by less than a factor of 2.
        assert abs(both - (1 - rate) ** 2) <= 10 * deviation


def test_expectation_and_variance():
    """E y = x and Var y = x^2 rate / keep, over many masks."""
    x, rate, n = np.array([1.0, -3.0, 0.5]), 0.4, 200_000
    mask = functional.dropout_mask((n, 3), rate, seed=1)
    y = array(functional.dropout(np.tile(x, (n, 1)), mask, rate))
    np.testing.assert_allclose(y.mean(0), x, atol=5 * 3 * np.sqrt(rate / (1 - rate) / n))
    np.testing.assert_allclose(y.var(0), x**2 * rate / (1 - rate), rtol=0.02)


def test_seeds():
    x = np.ones((50, 20), "float32")

    def two_calls(seed):
        layer = Dropout(0.5, seed=seed)
        return [array(layer(x, training=True)) for _ in range(2)]

    first, second = two_calls(7)
    assert (first != second).any()  # the generator moves on
    for a, b in zip(two_calls(7), (first, second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (two_calls(8)[0] != first).any()

    without = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        without.append(two_calls(None)[0])
    np.testing.assert_array_equal(*without)
    assert (two_calls(None)[0] != without[0]).any()


def test_two_layers_differ():
    x = np.ones((20, 20), "float32")
    a, b = (array(Dropout(0.5)(x, training=True)) for _ in range(2))
    assert (a != b).any()


@pytest.mark.parametrize(
    ("noise_shape", "same"), [((20, 1, 10), 1), ((None, 1, None), 1), ((1, None, None), 0)]
)
def test_noise_shape(noise_shape, same):
    x = np.random.default_rng(0).uniform(1, 2, (20, 5, 10)).astype("float32")
    y = array(Dropout(0.5, noise_shape, seed=1)(x, training=True))
    kept = y != 0
    assert (kept == np.take(kept, [0], same)).all()
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(y[kept], 2 * x[kept])


def test_noise_shape_of_fewer_dimensions():
    y = array(Dropout(0.5, (10,), seed=1)(np.ones((20, 5, 10), "float32"), training=True))
    assert (y == y[0, 0]).all()
    assert set(np.unique(y)) == {0.0, 2.0}


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_rounded_once(dtype, rate):
    """x / keep and dy / keep within half a unit in the last place: 1 / keep itself is not rounded.

    (And a millionth of it, for numbers between two of the dtype are rounded to float32 before.)
    """
    generator = np.random.default_rng(0)
    x, mix = generator.normal(size=(64, 8)), generator.normal(size=(64, 8))
    x, mix = (v.astype(numpy_dtype(dtype)) for v in (x, mix))
    mask = generator.random((64, 8)) > rate
    y, (dx,) = value_and_gradients(
        lambda x: functional.dropout(x, mask, rate), [ops.cast(x, dtype)], mix.astype("float64")
    )
    assert dtype_of(y) == dtype_of(dx) == dtype
    for given_, v in ((y, x), (dx, mix)):
        exact = np.where(mask, v.astype("float64") / (1 - rate), 0)
        unit = np.abs(np.spacing(exact.astype(v.dtype)).astype("float64"))
        units = 0.5 + 1e-6 if dtype in ("float16", "bfloat16") else 2
        assert (np.abs(wide(given_) - exact) <= units * unit).all()


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch scales in float32 as well")
def test_bfloat16_breaks_the_built_in_layer():
    """Of 1 / .9, or of .9, bfloat16 keeps 8 bits: the mean of the built-in layer is biased."""
    x = ops.cast(np.linspace(1, 2, 2**18), "bfloat16")
    kept = {}
    for name, cls in (("keras", keras.layers.Dropout), ("ours", Dropout)):
        y = wide(cls(0.1, seed=0, dtype="bfloat16")(x, training=True))
        kept[name] = (y[y != 0] * 0.9 / wide(x)[y != 0]).mean()
    assert abs(kept["ours"] - 1) < 1e-4
    assert abs(kept["keras"] - 1) > 1e-3


def test_what_is_dropped_may_be_infinite():
    x = np.array([np.inf, np.nan, -np.inf, 1.0])
    mask = np.array([False, False, True, True])
    y, (dx,) = value_and_gradients(lambda x: functional.dropout(x, mask, 0.5), [x], np.ones(4))
    np.testing.assert_array_equal(array(y), [0, 0, -np.inf, 2])
    np.testing.assert_array_equal(array(dx), [0, 0, 2, 2])


@pytest.mark.parametrize("training", [True, False])
def test_rates_0_and_1(training):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    np.testing.assert_array_equal(array(Dropout(0)(x, training=training)), x)
    y = array(Dropout(1.0)(x, training=training))
    np.testing.assert_array_equal(y, np.zeros_like(x) if training else x)
    mask = np.zeros((3, 4), bool)
    _, (dx,) = value_and_gradients(lambda x: functional.dropout(x, mask, 1.0), [x], np.ones((3, 4)))
    np.testing.assert_array_equal(array(dx), 0)


@pytest.mark.parametrize("mask_shape", [(3, 4), (1, 4), (3, 1), (4,), ()])
def test_masks_that_broadcast(mask_shape):
    generator = np.random.default_rng(0)
    x, mix = generator.normal(size=(3, 4)), generator.normal(size=(3, 4))
    mask = generator.random(mask_shape) > 0.4
    y, (dx,) = value_and_gradients(lambda x: functional.dropout(x, mask, 0.4), [x], mix)
    np.testing.assert_allclose(array(y), np.where(mask, x / 0.6, 0), rtol=1e-15)
    np.testing.assert_allclose(array(dx), np.where(mask, mix / 0.6, 0), rtol=1e-15)


def test_halves():
    generator = np.random.default_rng(0)
    x, mask = tensor(generator.normal(size=(3, 4))), tensor(generator.random((3, 4)) > 0.4)
    (y,), residuals = functional.dropout_forward(x, mask, rate=0.4)
    assert residuals[0] is mask
    np.testing.assert_array_equal(array(y), array(functional.dropout(x, mask, 0.4)))
    dx = functional.dropout_backward(x, *residuals, rate=0.4)
    np.testing.assert_array_equal(array(dx), array(y))  # linear: the same on dy as on x


def test_second_derivatives():
    generator = np.random.default_rng(0)
    x, mask = generator.normal(size=(2, 4)), generator.random((2, 4)) > 0.4
    both = penalty_and_gradient(lambda x: ops.sum(functional.dropout(x, mask, 0.4) ** 3))
    second, measured = both(x)[1], measured_gradient(lambda x: both(x)[0], x)
    np.testing.assert_allclose(second, np.where(mask, 36 * x**3 / 0.6**6, 0), rtol=1e-12)
    assert relative_error(second, measured) < 1e-9

    linear = penalty_and_gradient(lambda x: ops.sum(functional.dropout(x, mask, 0.4)))
    np.testing.assert_array_equal(linear(x)[1], 0)


def test_compiled_as_eager():
    generator = np.random.default_rng(0)
    x, mix = generator.normal(size=(3, 4, 5)), generator.normal(size=(3, 4, 5))
    mask = generator.random((3, 4, 5)) > 0.4

    def values(x, mix, mask):
        value, grads = gradients(lambda x: ops.sum(functional.dropout(x, mask, 0.4) * mix), [x])
        return [value, *grads]

    eager = values(tensor(x), tensor(mix), tensor(mask))
    for run in compiled(values, unknown=(0, 1, 2)):
        for a, b in zip(run(x, mix, mask), eager, strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=1e-12)


# The layer ----------------------------------------------------------------------------------------


def test_in_a_model_of_unknown_sizes():
    """Dropped in `fit`, and only there; a new mask in every step."""

    class Recorder(keras.layers.Layer):
        def build(self, input_shape):
            self.sums = self.add_weight(shape=(), initializer="zeros", trainable=False)
            self.squares = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x, training=False):
            if training:
                self.sums.assign(self.sums + ops.mean(x))
                self.squares.assign(self.squares + ops.mean(x) ** 2)
            return x

    inputs = keras.Input((None, 3))
    recorder = Recorder()
    outputs = recorder(Dropout(0.5, noise_shape=(None, 1, None))(inputs))
    # Something has to be trained: the identity, which a learning rate of 0 leaves as it is.
    outputs = keras.layers.Dense(3, use_bias=False, kernel_initializer="identity")(outputs)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.ones((32, 5, 3), "float32")
    losses = model.fit(x, x, batch_size=8, epochs=4, verbose=0).history["loss"]
    assert all(0.3 < loss < 2 for loss in losses)  # E (y - 1)^2 = rate / keep = 1
    mean = float(recorder.sums) / 16
    assert abs(mean - 1) < 0.3
    assert float(recorder.squares) / 16 - mean**2 > 1e-3  # the masks are not the same
    np.testing.assert_array_equal(model.predict(x, verbose=0), x)
    assert model.evaluate(x, x, verbose=0) == 0


def test_regularizes():
    """With dropout a net fits its few training examples less closely."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 10)).astype("float32")
    y = generator.integers(0, 2, 64)
    losses = []
    for rate in (0.0, 0.75):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((10,)),
                keras.layers.Dense(64, "relu"),
                Dropout(rate),
                keras.layers.Dense(2),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss)
        model.fit(x, y, batch_size=32, epochs=20, verbose=0)
        losses.append(model.evaluate(x, y, verbose=0))
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(policy):
    layer = Dropout(0.5, seed=0, dtype=policy)
    x = np.ones((4, 8), "float32")
    for training in (True, False):
        assert dtype_of(layer(x, training=training)) == policy.removeprefix("mixed_")


def test_mask_passes_through():
    x = np.array([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [2.0, 2.0]]], "float32")
    y = Dropout(0.5)(keras.layers.Masking()(x), training=True)
    np.testing.assert_array_equal(
        array(keras.src.backend.get_keras_mask(y)), [[True, False], [True, True]]
    )


@pytest.mark.parametrize(
    "arguments",
    [{"rate": 0.3}, {"rate": 0}, {"rate": 0.5, "noise_shape": [None, 1], "seed": 4}],
)
def test_config_round_trip(arguments):
    layer = Dropout(**arguments, name="drop", dtype="float64")
    config = layer.get_config()
    assert Dropout.from_config(config).get_config() == config
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == "keras_norm>Dropout"
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config
    theirs = keras.layers.Dropout.from_config(config)
    assert set(theirs.get_config()) == set(config)
    assert Dropout.from_config(theirs.get_config()).get_config() == config


@pytest.mark.parametrize("seed", [1, None])
def test_saved_with_its_state(tmp_path, seed):
    """A loaded model goes on with the masks that the saved one draws next; Keras's begins anew."""
    x = np.ones((4, 20), "float32")
    same = {}
    for cls in (Dropout, keras.layers.Dropout):
        model = keras.Sequential([keras.Input((20,)), cls(0.5, seed=seed), cls(0.1)])
        model(x, training=True)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert [type(layer) for layer in loaded.layers] == [cls, cls]
        y = [[array(m(x, training=True)) for _ in range(3)] for m in (model, loaded)]
        same[cls] = np.array_equal(*y)
    assert same == {Dropout: True, keras.layers.Dropout: False}


def test_weights_and_files_without_state(tmp_path):
    """Weights files are those of Keras's layer; a rate of 0 has no state to save."""
    model = keras.Sequential([keras.Input((20,)), Dropout(0.5), keras.layers.Dense(2)])
    theirs = keras.Sequential(
        [keras.Input((20,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    )
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    model.load_weights(tmp_path / "theirs.weights.h5")
    model.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    for a, b in zip(model.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)

    before = array(model.layers[0].seed_generator.state)
    model.layers[0].load_assets(None)
    model.layers[0].load_assets(str(tmp_path))
    np.testing.assert_array_equal(array(model.layers[0].seed_generator.state), before)
    Dropout(0).save_assets(str(tmp_path / "nowhere"))
    Dropout(0).load_assets(str(tmp_path))


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_rate(rate):
    for call in (
        lambda: Dropout(rate),
        lambda: functional.dropout_mask((2,), rate),
        lambda: functional.dropout(np.ones(2), np.ones(2, bool), rate),
    ):
        with pytest.raises(ValueError, match=r"`rate`.* Received: rate=.* rate=1-p"):
            call()


@pytest.mark.parametrize("noise_shape", ["Invalid", 3, (2, 1.5), (2, -1), (2, 0)])
def test_invalid_noise_shape(noise_shape):
    with pytest.raises(ValueError, match=r"`noise_shape`.* Received: noise_shape="):
        Dropout(0.5, noise_shape)


@pytest.mark.parametrize("noise_shape", [(2, 4), (3, 4, 1), (1, 1, 1), (5,)])
def test_noise_shape_that_does_not_broadcast(noise_shape):
    layer = Dropout(0.5, noise_shape)
    with pytest.raises(ValueError, match=r"must broadcast to the input.*input of shape \(3, 4\)"):
        layer(np.ones((3, 4), "float32"), training=True)


def test_integers():
    with pytest.raises(ValueError, match=r"floating dtype. Received: x.dtype=.*int32"):
        functional.dropout(np.ones(3, "int32"), np.ones(3, bool), 0.5)


# Any setting ------------------------------------------------------------------------------------


@settings(max_examples=10 if BACKEND == "jax" else 50, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    shared=st.lists(st.booleans(), min_size=5, max_size=5),
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_setting(shape, shared, rate, dtype, seed):
    """Each element is 0 or x / keep; the mask is constant where it is shared; dx has the mask."""
    x = np.random.default_rng(seed).uniform(1, 2, shape).astype(numpy_dtype(dtype))
    noise_shape = [1 if s else None for s, _ in zip(shared, shape, strict=False)]
    layer = Dropout(rate, noise_shape, seed=seed, dtype=dtype)
    y = wide(layer(ops.cast(x, dtype), training=True))
    kept = y != 0
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-15}[dtype]
    np.testing.assert_allclose(
        y, np.where(kept, x.astype("float64") / (1 - rate), 0), rtol=tolerance
    )
    for axis, n in enumerate(noise_shape):
        if n == 1:
            assert (kept == np.take(kept, [0], axis)).all()
    if rate == 0:
        assert kept.all()

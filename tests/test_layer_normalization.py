"""Layer and RMS normalization: values, gradients, hard numbers, and the layers around them."""

import contextlib

import keras
import numpy as np
import pytest
import reference_layer as reference
from arrays import array, check_parameters, data, dtype_of, rounded, tensor, wide
from differentiation import (
    BACKEND,
    compiled,
    measured_gradient,
    penalty_and_gradient,
    step_in_training,
    value_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from reference import channel_axes, complex_step, relative_error

from keras_norm import functional, layers
from keras_norm._gradients import gradients
from keras_norm.gradient_check import check
from keras_norm.layers import LayerNormalization, RMSNormalization

pytestmark = pytest.mark.core


LAYOUTS = [
    ((5,), 0),
    ((4, 5), -1),
    ((4, 5), 0),
    ((4, 5), (0, 1)),
    ((3, 4, 5), -1),
    ((3, 4, 5), 1),
    ((3, 4, 5), (-1, 1)),
    ((3, 2, 4, 3), (1, 2, 3)),
    ((3, 2, 4, 3), [3, 1]),
    ((2, 2, 3, 2, 3), (-4, -1)),
]

# The function, its reference, and which parameters it takes of (gamma, beta).
KINDS = {
    "layer": (functional.layer_normalization, reference.layer_norm, 2, {}),
    "layer, rms_scaling": (
        functional.layer_normalization,
        reference.layer_norm,
        1,
        {"rms_scaling": True},
    ),
    "rms": (functional.rms_normalization, reference.rms_norm, 1, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_values_and_gradients(kind, shape, axis):
    function, expected, parameters, options = KINDS[kind]
    options = {**options, "axis": axis, "epsilon": 1e-2}
    x, gamma, beta, mix = data(shape, axis)
    arrays = [x, gamma, beta][: 1 + parameters]
    y, analytic = value_and_gradients(lambda *a: function(*a, **options), arrays, mix)
    np.testing.assert_allclose(array(y), expected(*arrays, **options), rtol=1e-12, atol=1e-13)
    exact = complex_step(lambda *a: (expected(*a, **options) * mix).sum(), arrays)
    for a, b in zip(analytic, exact, strict=True):
        assert relative_error(array(a), b) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_without_parameters(kind):
    function, expected, _, options = KINDS[kind]
    x, _, _, mix = data((3, 2, 4), (1, 2))
    options = {**options, "axis": (1, 2)}
    y, (dx,) = value_and_gradients(lambda x: function(x, **options), [x], mix)
    np.testing.assert_allclose(array(y), expected(x, **options), rtol=1e-12)
    (exact,) = complex_step(lambda x: (expected(x, **options) * mix).sum(), [x])
    assert relative_error(array(dx), exact) < 1e-9


def test_with_beta_alone():
    x, _, beta, mix = data((4, 5), -1)
    _, (dx, dbeta) = value_and_gradients(
        lambda x, beta: functional.layer_normalization(x, None, beta), [x, beta], mix
    )
    (exact,) = complex_step(lambda x: (reference.layer_norm(x) * mix).sum(), [x])
    assert relative_error(array(dx), exact) < 1e-9
    np.testing.assert_allclose(array(dbeta), mix.sum(0), rtol=1e-12)


def test_halves():
    """The public halves give the numbers of the function that they make up."""
    x, gamma, beta, dy = data((4, 5), -1)
    arguments = tensor(x), tensor(gamma), tensor(beta)
    (y,), residuals = functional.layer_normalization_forward(*arguments, epsilon=1e-5)
    expected = functional.layer_normalization(x, gamma, beta, epsilon=1e-5)
    np.testing.assert_allclose(array(y), array(expected), rtol=1e-14, atol=1e-15)
    x_, mean, rest, inv_std, _ = residuals
    assert x_ is arguments[0]
    np.testing.assert_allclose(array(mean + rest), x.mean(1, keepdims=True), rtol=1e-15)
    np.testing.assert_allclose(array(inv_std), (x.var(1, keepdims=True) + 1e-5) ** -0.5, rtol=1e-12)

    halves = functional.layer_normalization_backward(tensor(dy), *residuals)
    _, joint = value_and_gradients(
        lambda *a: functional.layer_normalization(*a, epsilon=1e-5), [x, gamma, beta], dy
    )
    for a, b in zip(halves, joint, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-12, atol=1e-14)


def test_gradient_of_the_input_is_orthogonal():
    """Moving x along 1, or along x - mean, does not move y when epsilon is 0: (L9)."""
    x, gamma, beta, mix = data((6, 8), -1)
    _, (dx, *_) = value_and_gradients(
        lambda *a: functional.layer_normalization(*a, epsilon=0.0), [x, gamma, beta], mix
    )
    dx = array(dx)
    assert np.abs(dx).max() > 0.1
    np.testing.assert_allclose(dx.sum(1), 0, atol=1e-13)
    np.testing.assert_allclose((dx * x).sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    function, _, parameters, options = KINDS[kind]
    x, gamma, beta, mix = data((2, 4), -1)
    x = x / 4  # flatter functions have smaller derivatives

    def loss(x):
        y = function(x, *[tensor(gamma), tensor(beta)][:parameters], **options)
        return ops.sum(y * y * y * tensor(mix))

    both = penalty_and_gradient(loss)
    second, measured = both(x)[1], measured_gradient(lambda x: both(x)[0], x)
    assert np.linalg.norm(measured) > 0.1
    assert relative_error(second, measured) < 1e-9


# Against others -------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, (1, 2), (1, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_as_keras(axis, dtype):
    x, gamma, beta, _ = data((3, 4, 5, 6), axis)
    ours = LayerNormalization(axis, dtype=dtype)
    theirs = keras.layers.LayerNormalization(axis, dtype=dtype)
    x = x.astype(dtype)
    for layer in (ours, theirs):
        layer.build(x.shape)
    assert [w.path.split("/")[-1] for w in ours.weights] == ["gamma", "beta"]
    assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]
    ours.set_weights([gamma, beta])
    theirs.set_weights(ours.get_weights())
    expected = reference.layer_norm(x.astype("float64"), gamma, beta, axis=axis)
    # Keras computes a float64 layer in float32, on JAX and PyTorch.
    tolerance = 1e-12 if dtype == "float64" and BACKEND == "tensorflow" else 3e-6
    if axis != (1, 2) or BACKEND != "torch":  # Keras raises a RuntimeError there
        np.testing.assert_allclose(array(theirs(x)), array(ours(x)), atol=tolerance)
    tolerance = 1e-12 if dtype == "float64" else 3e-6
    np.testing.assert_allclose(array(ours(x)), expected, atol=tolerance)


@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_rms_as_keras(axis):
    x, scale, _, _ = data((3, 4, 5), axis)
    ours, theirs = RMSNormalization(axis), keras.layers.RMSNormalization(axis)
    x = x.astype("float32")
    for layer in (ours, theirs):
        layer.build(x.shape)
    ours.set_weights([scale])
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), atol=2e-6)


@pytest.mark.parametrize("axis", [1, (1, 2)])
@pytest.mark.parametrize("name", ["LayerNormalization", "RMSNormalization"])
def test_axes_that_are_not_the_last(name, axis):
    """Keras's layers are silently wrong where the sizes allow it, and raise elsewhere.

    Its RMS normalization lays `scale` along the last axes, whatever `axis` is; and on PyTorch both
    normalize those.
    """
    x, gamma, beta, _ = data((3, 4, 4, 4), axis)
    parameters = [gamma, beta] if name == "LayerNormalization" else [gamma]
    definition = reference.layer_norm if name == "LayerNormalization" else reference.rms_norm

    def check(module, parameters):
        layer = getattr(module, name)(axis)
        layer.build(x.shape)
        layer.set_weights(parameters)
        y = array(layer(x.astype("float32")))
        np.testing.assert_allclose(y, definition(x, *parameters, axis=axis), atol=3e-6)

    as_built = [np.ones_like(gamma), np.zeros_like(beta)][: len(parameters)]
    check(layers, parameters)
    if name == "RMSNormalization":
        with pytest.raises(AssertionError):
            check(keras.layers, parameters)
    with pytest.raises(AssertionError) if BACKEND == "torch" else contextlib.nullcontext():
        check(keras.layers, as_built)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch is installed with its backend alone")
def test_as_pytorch():
    import torch

    x, gamma, beta, _ = data((3, 4, 5), -1)
    x, gamma, beta = map(torch.tensor, (x, gamma, beta))
    for ours, theirs in (
        (
            functional.layer_normalization(x, gamma, beta, epsilon=1e-5),
            torch.nn.functional.layer_norm(x, [5], gamma, beta, 1e-5),
        ),
        (
            functional.rms_normalization(x, gamma, epsilon=1e-5),
            torch.nn.functional.rms_norm(x, [5], gamma, 1e-5),
        ),
    ):
        np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-12)


# Published check vectors ------------------------------------------------------------------------


@pytest.fixture
def rng():
    return np.random.RandomState(231)


@pytest.mark.parametrize("training", [True, False])
def test_published_values(rng, training):
    """Four examples of a two-layer net, each normalized by itself, in training as in inference."""
    X, W1, W2 = rng.randn(4, 50), rng.randn(50, 60), rng.randn(60, 3)
    a = np.maximum(0, X @ W1) @ W2
    published = [-59.06673243, -47.60782686, -43.31137368, -26.40991744]
    np.testing.assert_allclose(a.mean(1), published, atol=6e-9)

    layer = LayerNormalization(epsilon=1e-5, dtype="float64")
    y = array(layer(a, training=training))
    assert np.abs(y.mean(1)).max() < 1e-15
    np.testing.assert_allclose(y.std(1), 1, rtol=1e-5)

    layer.set_weights([np.full(3, 3.0), np.full(3, 5.0)])
    y = array(layer(a, training=training))
    np.testing.assert_allclose(y.mean(1), 5, rtol=1e-15)
    np.testing.assert_allclose(y.std(1), 3, rtol=1e-5)


def test_published_gradients(rng):
    """Published: 1.4e-9 for x, 4.5e-12 for gamma, 2.3e-12 for beta, with differences of order 2."""
    x = 5 * rng.randn(4, 5) + 12
    gamma, beta, dy = rng.randn(5), rng.randn(5), rng.randn(4, 5)

    def normalized(x, gamma, beta):
        return functional.layer_normalization(x, gamma, beta, epsilon=1e-5)

    report = check(normalized, x, gamma, beta, upstream=dy)
    assert report["x"].max_relative < 1.4e-9
    assert report["gamma"].max_relative < 4.5e-12
    assert report["beta"].max_relative < 2.3e-12


# Numbers that break others ------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
def test_large_mean_in_float32(mean):
    """Neither y nor a gradient loses a digit, although x itself has few after the point."""
    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(8, 512))).astype("float32")
    mix, gamma = rng.normal(size=x.shape), rng.normal(1, 0.5, 512)

    def function(x, gamma):
        return functional.layer_normalization(x, gamma, epsilon=0.0)

    y, ours = value_and_gradients(function, [x, gamma.astype("float32")], mix)
    expected, exact = value_and_gradients(function, [x.astype("float64"), gamma], mix)
    np.testing.assert_allclose(array(y), array(expected), atol=2e-6)
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(array(a), array(b)) < 1e-6


@pytest.mark.skipif(BACKEND == "torch", reason="Keras uses PyTorch's own kernel there")
def test_large_mean_breaks_the_built_in_layer():
    """x inv_std - mean inv_std is a difference of numbers near 1e5: two digits are left."""
    x = (1e5 + np.random.default_rng(0).normal(size=(8, 512))).astype("float32")
    expected = reference.layer_norm(x.astype("float64"))
    error = {
        name: np.abs(array(layer(x)) - expected).max()
        for name, layer in (("keras", keras.layers.LayerNormalization()), ("ours", layer_of()))
    }
    assert error["keras"] > 1e-3
    assert error["ours"] < 2e-6


def layer_of(**arguments):
    return LayerNormalization(**arguments)


@pytest.mark.parametrize("axes", [(1, 2), (1, 2, 3)])
def test_many_elements_in_float32(axes):
    """A sum in one go is off by 1.5e-4 for the variance of so many."""
    x = (1 + np.random.default_rng(0).normal(size=(1, 256, 256, 4))).astype("float32")
    y = functional.layer_normalization(x, axis=axes)
    expected = reference.layer_norm(x.astype("float64"), axis=axes)
    np.testing.assert_allclose(array(y), expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 1e-4, 3.0, 1000.1, 60000.0])
def test_constant_examples(dtype, value):
    """Constant examples have variance 0: y is beta to the last bit, and the gradient is finite."""
    x, beta = ops.cast(np.full((3, 7), value), dtype), np.linspace(-1, 1, 7).astype("float32")
    mix = np.random.default_rng(0).normal(size=(3, 7))
    y, (dx,) = value_and_gradients(
        lambda x: functional.layer_normalization(x, None, beta), [x], mix
    )
    np.testing.assert_allclose(wide(y), np.tile(wide(ops.cast(beta, dtype)), (3, 1)), atol=1e-6)
    expected = (mix - mix.mean(1, keepdims=True)) / np.sqrt(1e-3)
    digits = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-5)
    np.testing.assert_allclose(wide(dx), expected, rtol=digits, atol=digits)


def test_one_element_and_none():
    assert array(functional.layer_normalization(np.array([[3.0]])))[0, 0] == 0
    np.testing.assert_allclose(array(functional.rms_normalization(np.array([[-3.0]]))), -1, 1e-6)
    for shape in ((0, 4), (2, 0, 4), (2, 4, 0)):
        x, beta = np.zeros(shape), np.ones(shape[-1:])
        _, (dx, dbeta) = value_and_gradients(
            lambda x, beta: functional.layer_normalization(x, beta=beta), [x, beta], x
        )
        assert dx.shape == x.shape
        np.testing.assert_array_equal(array(dbeta), 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_example_leaves_the_others(bad):
    x, gamma, beta, _ = data((4, 5), -1)
    clean = array(functional.layer_normalization(x, gamma, beta))
    x[2, 3] = bad
    y = array(functional.layer_normalization(x, gamma, beta))
    np.testing.assert_array_equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert not np.isfinite(y[2]).any()


def test_float16_near_its_largest_number():
    rng = np.random.default_rng(0)
    x = (6e4 + 2e3 * rng.standard_normal((4, 64))).clip(None, 65504).astype("float16")
    for function, expected in (
        (functional.layer_normalization, reference.layer_norm),
        (functional.rms_normalization, reference.rms_norm),
    ):
        y = function(x)
        assert dtype_of(y) == "float16"
        np.testing.assert_allclose(array(y), expected(x.astype("float64")), rtol=6e-4, atol=2e-5)


TOLERANCE = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-6, "float64": 1e-13}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(kind, dtype):
    """Values and gradients are those of float64, rounded once at the end."""
    function, expected, _, options = KINDS[kind]
    x, gamma, _, mix = data((4, 6, 5), -1)
    x = rounded(x, dtype)
    arrays = [ops.cast(x, dtype), gamma]
    y, given = value_and_gradients(lambda *a: function(*a, **options), arrays, mix)
    exact = expected(x, gamma, **options)
    assert dtype_of(y) == dtype
    np.testing.assert_allclose(wide(y), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    theirs = complex_step(lambda x, g: (expected(x, g, **options) * mix).sum(), [x, gamma])
    assert dtype_of(given[0]) == dtype
    for a, b in zip(given, theirs, strict=True):
        assert relative_error(wide(a), b) < TOLERANCE[dtype]


# Compiled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_eager(kind):
    """In a graph the number of examples and positions is unknown."""
    function, _, parameters, options = KINDS[kind]
    x, gamma, beta, mix = data((3, 4, 5), -1)

    def values(x, mix, *parameters):
        def loss(x, *parameters):
            return ops.sum(function(x, *parameters, **options) * mix)

        value, grads = gradients(loss, [x, *parameters])
        return [value, *grads]

    arrays = x, mix, *[gamma, beta][:parameters]
    eager = values(*map(tensor, arrays))
    for run in compiled(values, unknown=(0,) if parameters == 0 else ()):
        for a, b in zip(run(*arrays), eager, strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has graphs of unknown sizes")
@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_unknown_sizes(axis):
    """Without parameters even the normalized axes may be of unknown size."""
    import tensorflow as tf

    x, _, _, mix = data((3, 4, 5), axis)

    @tf.function(input_signature=[tf.TensorSpec([None] * 3, "float64")] * 2)
    def dx(x, mix):
        def loss(x):
            return ops.sum(functional.layer_normalization(x, axis=axis) * mix)

        return gradients(loss, [x])[1][0]

    (exact,) = complex_step(lambda x: (reference.layer_norm(x, axis=axis) * mix).sum(), [x])
    assert relative_error(array(dx(x, mix)), exact) < 1e-9


# The layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
def test_layer_in_a_model_of_unknown_sizes(cls):
    inputs = keras.Input((None, 6))
    layer = cls()
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, 6)
    for shape in ((2, 3, 6), (5, 4, 6)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        np.testing.assert_allclose(model.predict(x, verbose=0), array(layer(x)), atol=1e-6)


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
def test_layer_trains(cls):
    """`fit` moves the parameters along the gradient of the layer, and finds gamma and beta."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype("float32")
    target = cls()
    target.build((None, 4))
    target.set_weights([np.arange(n.shape[0]) + 0.5 for n in target.get_weights()])
    model = keras.Sequential([keras.Input((4,)), cls()])
    model.compile(keras.optimizers.SGD(0.2), "mse")
    history = model.fit(x, array(target(x)), batch_size=32, epochs=12, verbose=0)
    assert history.history["loss"][-1] < 1e-3 < history.history["loss"][0]
    for a, b in zip(model.layers[-1].get_weights(), target.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)


def test_gradient_check_of_the_layers():
    x = 5 * np.random.default_rng(1).normal(size=(3, 2, 4)) + 12
    check(LayerNormalization(axis=(1, 2), dtype="float64"), x).require(1e-9)
    check(RMSNormalization(dtype="float64"), x).require(1e-9)


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(cls, policy):
    """float32 inputs too large for float16 are normalized as they are; the weights are float32."""
    layer = cls(dtype=policy)
    x = (np.random.default_rng(0).normal(size=(4, 8)) * 2e5).astype("float32")
    y = layer(x)
    assert dtype_of(y) == policy.removeprefix("mixed_")
    assert {dtype_of(w) for w in layer.weights} == {"float32"}
    expected = {LayerNormalization: reference.layer_norm, RMSNormalization: reference.rms_norm}
    np.testing.assert_allclose(wide(y), expected[cls](x.astype("float64")), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["LayerNormalization", "RMSNormalization", "GroupNormalization"])
def test_integers_are_normalized(name):
    """Keras's layers truncate the result to integers."""
    x = np.array([[1, 3, 2, 9], [10, 50, 30, 20]])
    options = {"groups": 1} if name == "GroupNormalization" else {}

    def check(cls):
        layer = cls(epsilon=1e-12, **options)
        y = layer(x)
        assert dtype_of(y) == "float32"
        np.testing.assert_allclose(array(y), array(layer(x.astype("float32"))), atol=1e-6)

    check(getattr(layers, name))
    with pytest.raises(AssertionError):
        check(getattr(keras.layers, name))


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
def test_masks_pass_through(cls):
    x = np.array([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [2.0, 2.0]]], "float32")
    masked = keras.layers.Masking()(x)
    y = cls()(masked)
    np.testing.assert_array_equal(
        array(keras.src.backend.get_keras_mask(y)), [[True, False], [True, True]]
    )


CONFIGURATIONS = [
    {},
    {"axis": (1, 2), "epsilon": 1e-5},
    {"axis": [2, 1], "center": False},
    {"scale": False, "beta_initializer": "ones", "beta_constraint": "non_neg"},
    {"gamma_regularizer": keras.regularizers.L2(0.1), "gamma_initializer": "he_normal"},
]


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_config_round_trip(arguments):
    layer = LayerNormalization(**arguments, name="norm", dtype="float64")
    config = layer.get_config()
    again = LayerNormalization.from_config(config)
    assert again.get_config() == config
    layer.build((2, 3, 3))
    assert layer.get_config() == config  # build changes nothing
    assert layer.axis == arguments.get("axis", -1)
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == "keras_norm>LayerNormalization"
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config
    # Keras's layer reads it as well, and ours the one of Keras.
    theirs = keras.layers.LayerNormalization.from_config(config)
    assert LayerNormalization.from_config(theirs.get_config()).epsilon == layer.epsilon


def test_parameters_are_made_as_they_were_asked_for():
    check_parameters(LayerNormalization, (2, 4))


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
def test_saved_model(cls, tmp_path):
    model = keras.Sequential([keras.Input((3, 4)), cls(axis=(1, 2)), keras.layers.Dense(2)])
    model.layers[0].set_weights([np.random.normal(size=(3, 4)) for _ in model.layers[0].weights])
    x = np.random.normal(size=(5, 3, 4)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is cls
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))

    built_in = keras.Sequential(
        [keras.Input((3, 4)), getattr(keras.layers, cls.__name__)(axis=(1, 2))]
    )
    built_in.save_weights(tmp_path / "their.weights.h5")
    ours = keras.Sequential([keras.Input((3, 4)), cls(axis=(1, 2))])
    ours.layers[0].set_weights([2 * w for w in ours.get_weights()])
    ours.load_weights(tmp_path / "their.weights.h5")
    for a, b in zip(ours.get_weights(), built_in.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rms_scaling_warns():
    with pytest.warns(UserWarning, match="Use RMSNormalization"):
        layer = LayerNormalization(rms_scaling=True)
    layer.build((2, 3))
    assert layer.beta is None
    assert layer.get_config()["rms_scaling"] is True
    x = np.array([[1.0, 2.0, 6.0]], "float32")
    expected = reference.layer_norm(x.astype("float64"), rms_scaling=True)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-6)


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
class TestErrors:
    @pytest.mark.parametrize("axis", [{"axis": -1}, "channels", 1.0, [1, 0.5], None])
    def test_type_of_axis(self, cls, axis):
        with pytest.raises(TypeError, match=r"Expected an int .*Received: axis="):
            cls(axis=axis)

    @pytest.mark.parametrize("axis", [2, -3, (0, 2), (1, 1), (1, -1), ()])
    def test_axis(self, cls, axis):
        with pytest.raises(ValueError, match=r"`axis` must be .*Received: axis="):
            cls(axis=axis).build((2, 3))
        with pytest.raises(ValueError, match=r"`axis` must be .*Received: axis="):
            cls(axis=axis).compute_output_shape((2, 3))

    @pytest.mark.parametrize("epsilon", [-1e-3, float("nan"), "1e-3", None])
    def test_epsilon(self, cls, epsilon):
        with pytest.raises(ValueError, match=r"`epsilon` .*Received: epsilon="):
            cls(epsilon=epsilon)

    @pytest.mark.parametrize("dtype", ["int32", "bool"])
    def test_dtype(self, cls, dtype):
        with pytest.raises(ValueError, match=f"Received: dtype='{dtype}'"):
            cls(dtype=dtype)

    def test_unknown_size(self, cls):
        with pytest.raises(ValueError, match=r"should have a defined dimension.*\(None, None\)"):
            cls().build((None, None))

    def test_another_size_than_built_for(self, cls):
        layer = cls()
        layer.build((None, 3))
        with pytest.raises(ValueError, match="incompatible with the layer"):
            layer(np.ones((2, 4), "float32"))

    def test_integers(self, cls):
        name = {LayerNormalization: "layer_normalization", RMSNormalization: "rms_normalization"}
        with pytest.raises(ValueError, match="floating dtype"):
            getattr(functional, name[cls])(np.ones((2, 3), "int32"))


# Any layout ---------------------------------------------------------------------------------------


PROPERTY_TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-10}
# JAX compiles anew for every shape.
EXAMPLES = {"tensorflow": 25, "jax": 4, "torch": 40}[BACKEND]


@st.composite
def settings_of_a_layer(draw):
    rank = draw(st.integers(1, 5))
    shape = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    axis = [a - rank if draw(st.booleans()) else a for a in axes]
    return {
        "shape": shape,
        "axis": axis[0] if len(axis) == 1 and draw(st.booleans()) else axis,
        "epsilon": draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        "dtype": draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
        "loc": draw(st.sampled_from([0.0, 1.0, 100.0])),
        "scale": draw(st.sampled_from([0.01, 1.0, 100.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("cls", [LayerNormalization, RMSNormalization])
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(case=settings_of_a_layer(), center=st.booleans(), scaled=st.booleans())
def test_any_layout(cls, case, center, scaled):
    """Values and gradients of the layer for any rank, axes, dtype and size of numbers.

    Tolerances, relative to the largest terms that are added or subtracted: `PROPERTY_TOLERANCE`.
    """
    rng = np.random.default_rng(case["seed"])
    dtype, axis, epsilon = case["dtype"], case["axis"], case["epsilon"]
    x = rounded(case["loc"] + case["scale"] * rng.normal(size=case["shape"]), dtype)
    mix = rounded(rng.normal(size=x.shape), dtype)
    if cls is RMSNormalization:
        layer, function = cls(axis, epsilon, dtype=dtype), reference.rms_norm
    else:
        layer, function = cls(axis, epsilon, center, scaled, dtype=dtype), reference.layer_norm
    layer.build(x.shape)
    # The parameters are kept in the dtype of the layer: numbers that every dtype can hold.
    values = [np.round(8 * rng.normal(size=w.shape)) / 8 for w in layer.weights]
    layer.set_weights(values)
    names = ["gamma" if w.name == "scale" else w.name for w in layer.weights]

    def expected(x, *values):
        return function(x, **dict(zip(names, values, strict=True)), axis=axis, epsilon=epsilon)

    y, slopes = step_in_training(layer, ops.cast(x, dtype), mix)
    tolerance = PROPERTY_TOLERANCE[dtype]
    assert dtype_of(y) == dtype_of(slopes[0]) == dtype
    np.testing.assert_allclose(wide(y), expected(x, *values), rtol=tolerance, atol=tolerance)
    exact = complex_step(lambda *a: (expected(*a) * mix).sum(), [x, *values])
    # Of examples with one or two elements the terms of (L9), or of (R8), cancel.
    axes = channel_axes(axis, x.ndim)
    size = (x**2 if cls is RMSNormalization else (x - x.mean(axes, keepdims=True)) ** 2).mean(
        axes, keepdims=True
    )
    gamma = reference.along(values[0], x, axes) if "gamma" in names else 1
    terms = [np.linalg.norm(mix * gamma / np.sqrt(size + epsilon))]
    terms += [np.linalg.norm(mix) * np.sqrt(x.size)] * len(values)
    for ours, theirs, largest in zip(slopes, exact, terms, strict=True):
        assert np.linalg.norm(wide(ours) - theirs) <= tolerance * largest + 1e-30


def test_sizes_that_were_unknown_when_it_was_built_may_be_any():
    layer = LayerNormalization(center=False, scale=False)
    layer.build((None, None))
    assert [tuple(layer(np.ones((2, n), "float32")).shape) for n in (3, 5)] == [(2, 3), (2, 5)]

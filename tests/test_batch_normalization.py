"""The BatchNormalization layer: against Keras and NumPy, its state, switches, masks and saving."""

import collections
import functools
import json
import math
import warnings

import forked
import keras
import numpy as np
import pytest
import reference
from arrays import array, tensor
from keras import ops
from reference import complex_step, relative_error

from keras_norm._gradients import float64_promotion, gradients
from keras_norm.layers import (
    BatchNormalization,
    DecorrelatedBatchNormalization,
    Dropout,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    QuantileNormalization,
    RMSNormalization,
    SpatialBatchNormalization,
)

pytestmark = pytest.mark.core

Pair = collections.namedtuple("Pair", "first second")
BACKEND = keras.backend.backend()
STATISTICS = "moving_mean", "moving_variance"


def normal(*shape, seed=0, dtype="float64"):
    return (np.random.default_rng(seed).normal(size=shape) * 2 + 3).astype(dtype)


def built(shape, dtype="float64", **arguments):
    """A layer with gamma and beta that differ from one channel to the next."""
    layer = BatchNormalization(dtype=dtype, **arguments)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(5)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(1, 0.5, variable.shape))
    return layer


def statistics(layer, names=STATISTICS):
    return [array(getattr(layer, name)) for name in names]


def compiled_call(layer, jit=False, **arguments):
    """x -> layer(x, **arguments), compiled; what it assigns is assigned. PyTorch stays eager."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x: layer(x, **arguments), jit_compile=jit)
    if BACKEND == "jax":
        import jax

        step = jax.jit(lambda *state_and_x: layer.stateless_call(*state_and_x, **arguments))

        def call(x):
            trained, state = layer.trainable_variables, layer.non_trainable_variables
            y, values = step([v.value for v in trained], [v.value for v in state], x)
            for variable, value in zip(state, values, strict=True):
                variable.assign(value)
            return y

        return call
    return lambda x: layer(tensor(x), **arguments)


# As Keras -------------------------------------------------------------------------------------


def trained(cls, dtype, x, target, **arguments):
    layer = cls(dtype=dtype, **arguments)
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=dtype), layer])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(x, target, batch_size=len(x) // 100, epochs=1, shuffle=False, verbose=0)
    return layer


CLIPPED = {"rmax": 1.5, "rmin": 0.75, "dmax": 0.5}
AS_KERAS = {
    "plain": {"axis": 1, "momentum": 0.9},
    "renorm": {"renorm": True, "renorm_clipping": CLIPPED, "renorm_momentum": 0.8},
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-9), pytest.param("float32", 1e-4, marks=pytest.mark.slow_on_jax)],
)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(a, id=name, marks=pytest.mark.slow_on_jax if name == "renorm" else ())
        for name, a in AS_KERAS.items()
    ],
)
def test_as_keras_after_100_training_steps(dtype, tolerance, arguments):
    x = normal(400, 3, 5, dtype=dtype) * np.linspace(1, 2, 400)[:, None, None].astype(dtype)
    target = normal(400, 3, 5, seed=1, dtype=dtype)
    batch, mix = x[-8:], target[-8:]
    results = []
    with float64_promotion():  # else Keras's own layer rounds to float32, but for TensorFlow
        for cls in (BatchNormalization, keras.layers.BatchNormalization):
            layer = trained(cls, dtype, x, target, **arguments)
            assert [w.name for w in layer.weights][2:4] == list(STATISTICS)
            arrays = list(layer.weights)
            for training in (True, False):
                value, slopes = gradients(
                    lambda x, layer=layer, training=training: ops.sum(
                        layer(x, training=training) * tensor(mix)
                    ),
                    [batch],
                    variables=layer.trainable_variables,
                )
                arrays += [value, *slopes, layer(batch, training=training)]
            results.append([array(a) for a in arrays])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert relative_error(ours, theirs) < tolerance


def test_100_steps_as_the_definition():
    """float64 on every backend, to 1e-9: moving statistics after 100 steps, and then inference."""
    layer, x = built((4, 3, 2), momentum=0.9), normal(100, 4, 3, 2)
    mean, variance = np.zeros(2), np.ones(2)
    for batch in x:
        layer(batch, training=True)
        batch_mean, batch_variance, _ = reference.batch_moments(batch)
        mean = 0.9 * mean + 0.1 * batch_mean
        variance = 0.9 * variance + 0.1 * batch_variance
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-9)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-9)
    gamma, beta = array(layer.gamma), array(layer.beta)
    expected = reference.normalize(x[0], mean, variance, gamma, beta)
    np.testing.assert_allclose(array(layer(x[0])), expected, rtol=1e-9)


def test_arguments_stand_where_those_of_keras_stand():
    import inspect

    ours = inspect.signature(BatchNormalization.__init__).parameters
    theirs = inspect.signature(keras.layers.BatchNormalization.__init__).parameters
    shared = [p for p in theirs.values() if p.kind is not p.VAR_KEYWORD]
    for a, b in zip(list(ours.values())[: len(shared)], shared, strict=True):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    rest = list(ours.values())[len(shared) :]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in rest)


@pytest.mark.parametrize("renorm", [False, True])
def test_weights_go_from_keras_and_back(renorm, tmp_path):
    def model(cls):
        return keras.Sequential([keras.Input((4, 3)), cls(renorm=renorm, name="norm")])

    ours, theirs = model(BatchNormalization), model(keras.layers.BatchNormalization)
    values = [np.random.default_rng(i).random(w.shape) for i, w in enumerate(theirs.weights)]
    theirs.set_weights(values)
    ours.set_weights(theirs.get_weights())
    x = normal(2, 4, 3, dtype="float32")
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), rtol=1e-6)
    for source, goal in ((theirs, ours), (ours, theirs)):
        goal.set_weights([0 * v for v in values])
        source.set_weights(values)
        source.save_weights(tmp_path / "a.weights.h5")
        goal.load_weights(tmp_path / "a.weights.h5")
        for a, b in zip(goal.get_weights(), values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# Gradients ------------------------------------------------------------------------------------

SAMPLE_WEIGHT = np.array([0.5, 2.0, 0.0, 1.0, 1.5])
MASK = np.array([1, 1, 1, 0, 1], bool)


@pytest.mark.parametrize(
    "make",
    [
        BatchNormalization,
        functools.partial(BatchNormalization, virtual_batch_size=4),
        functools.partial(BatchNormalization, axis=(1, 2)),
        functools.partial(BatchNormalization, dtype="mixed_bfloat16"),
        DecorrelatedBatchNormalization,
        QuantileNormalization,
    ],
)
def test_fit_by_moving_statistics(make):
    """They move after they have normalized, and before the backward pass: PyTorch's in place."""
    x = normal(16, 3, 2).astype("float32")
    layer = make(use_batch_statistics=False)
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.Dense(2), layer])
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.fit(x, x, verbose=0)
    moved = [np.abs(a - b).max() > 0 for a, b in zip(before, model.get_weights(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("kind", [BatchNormalization, DecorrelatedBatchNormalization])
def test_inference_and_training_in_one_loss(kind):
    """As of a teacher: what inference was computed with moves before the backward pass."""
    inputs = keras.Input((2,))
    hidden, layer = keras.layers.Dense(2)(inputs), kind()
    outputs = ops.square(layer(hidden, training=False)) + ops.square(layer(hidden, training=True))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = normal(8, 2).astype("float32")
    assert np.isfinite(model.train_on_batch(x, x))


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ({}, {"training": True}),
        ({}, {"training": False}),
        ({"axis": 1}, {"training": True, "mask": MASK, "sample_weight": SAMPLE_WEIGHT}),
        pytest.param(
            {"virtual_batch_size": 2},
            {"training": True, "sample_weight": SAMPLE_WEIGHT},
            marks=pytest.mark.slow_on_jax,
        ),
        ({"renorm": True}, {"training": True, "mask": MASK}),
        ({"use_batch_statistics": False}, {"training": True}),
        ({"use_batch_statistics": True}, {"training": False}),
    ],
)
def test_gradients(arguments, call):
    """float64, of every variable and the input, against complex steps of the definition."""
    shape = (5, 3, 2)
    layer, x, mix = built(shape, **arguments), normal(*shape), normal(*shape, seed=2)
    layer.moving_mean.assign(layer.moving_mean + 0.5)
    layer.moving_variance.assign(layer.moving_variance * 2)
    axis = layer.axis
    weights = np.ones(5)
    weights = weights * call["mask"] if "mask" in call else weights
    weights = weights * call["sample_weight"] if "sample_weight" in call else weights
    weights = weights[:, None, None]
    of_batch = arguments.get("use_batch_statistics", call["training"])

    def definition(x, gamma, beta):
        if not of_batch:
            y = reference.normalize(x, *statistics(layer), gamma, beta, axis=axis)
        elif "virtual_batch_size" in arguments:  # 3 ghost batches, of 2, 2 and 1
            parts = [
                reference.batch_norm(x[i : i + 2], gamma, beta, weights=weights[i : i + 2])[0]
                for i in (0, 2, 4)
            ]
            y = np.concatenate(parts)
        else:
            y, mean, variance = reference.batch_norm(x, axis=axis, weights=weights)
            if "renorm" in arguments:  # the correction is a constant: the real part alone
                r, d = np.sqrt(np.real(variance) + 1e-3), np.real(mean)  # of 1 and 0
                y = y * r + d
            y = y * reference.along(gamma, x, axis) + reference.along(beta, x, axis)
        return (y * mix).sum()

    value, analytic = gradients(
        lambda x: ops.sum(layer(x, **call) * tensor(mix)), [x], variables=layer.trainable_variables
    )
    point = [x, array(layer.gamma), array(layer.beta)]
    np.testing.assert_allclose(array(value), definition(*point), rtol=1e-10)
    for a, b in zip(analytic, complex_step(definition, point), strict=True):
        assert relative_error(array(a), b) < 1e-9


def test_weights_of_samples_have_no_gradient():
    layer, x = built((5, 3, 2)), normal(5, 3, 2)
    _, (dw,) = gradients(
        lambda w: ops.sum(layer(x, training=True, sample_weight=w) ** 2), [SAMPLE_WEIGHT]
    )
    np.testing.assert_array_equal(array(dw), 0)


# Compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"virtual_batch_size": 4, "debiased": True}, {"renorm": True, "unbiased": True}],
)
def test_compiled_as_eager(arguments):
    x, rest = normal(9, 3, 2), normal(5, 3, 2, seed=3)
    eager = built(x.shape, **arguments)
    expected = [array(eager(v, training=True)) for v in (x, x, rest)]
    for jit in {False, BACKEND == "tensorflow"}:
        layer = built(x.shape, **arguments)
        call = compiled_call(layer, jit=jit, training=True)
        for v, y in zip((x, x, rest), expected, strict=True):
            np.testing.assert_allclose(array(call(v)), y, rtol=1e-11, atol=1e-12)
        for a, b in zip(layer.get_weights(), eager.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.slow_on_jax
def test_batches_of_a_size_that_is_not_known():
    """fit with a ragged last batch, ghost batches and a mask, compiled once on TensorFlow."""
    inputs, mask = keras.Input((4, 3)), keras.Input((4,), dtype="bool")
    layer = BatchNormalization(momentum=0.0, virtual_batch_size=3)
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    model.compile("sgd", "mse", jit_compile=False)
    x, given = normal(11, 4, 3, dtype="float32"), np.random.default_rng(0).random((11, 4)) < 0.7
    model.fit([x, given], x, batch_size=6, shuffle=False, verbose=0)
    mean, variance, _ = reference.batch_moments(x[6:].astype(float), weights=given[6:, :, None])
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-5)


# The moving statistics ------------------------------------------------------------------------


def batches():
    return [normal(n, 4, 3, seed=n) * n for n in (3, 5, 2)]


def moments_of(batches, unbiased=False):
    means, variances = [], []
    for x in batches:
        mean, variance, n = reference.batch_moments(x)
        means.append(mean)
        variances.append(variance * n / (n - 1) if unbiased else variance)
    return np.array(means), np.array(variances)


def test_momentum_none_is_the_average_of_all_batches():
    layer = built((None, 4, 3), momentum=None)
    for x in batches():
        layer(x, training=True)
    for ours, theirs in zip(statistics(layer), moments_of(batches()), strict=True):
        np.testing.assert_allclose(ours, theirs.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(array(layer.moving_count), 3)


def test_debiased_has_no_cold_start():
    layer = built((None, 4, 3), momentum=0.9, debiased=True)
    weights = np.array([0.81, 0.9, 1.0])
    for i, x in enumerate(batches()):
        layer(x, training=True)
        for ours, theirs in zip(statistics(layer), moments_of(batches()[: i + 1]), strict=True):
            w = weights[2 - i :]
            np.testing.assert_allclose(ours, w @ theirs / w.sum(), rtol=1e-12)


def test_unbiased():
    layer = built((None, 4, 3), momentum=0.0, unbiased=True)
    for x in batches():
        layer(x, training=True)
        _, (variance,) = moments_of([x], unbiased=True)
        np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-12)
    mask = np.array([True, False, True])
    x = batches()[0]
    layer(x, training=True, mask=mask)
    _, (variance,) = moments_of([x[mask]], unbiased=True)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-12)
    layer(x, training=True, sample_weight=np.array([0.25, 0.5, 1.0]))
    _, biased, total = reference.batch_moments(x, weights=np.array([0.25, 0.5, 1.0])[:, None, None])
    n = total**2 / (4 * (0.25**2 + 0.5**2 + 1))
    np.testing.assert_allclose(array(layer.moving_variance), biased * n / (n - 1), rtol=1e-12)


def test_momentum_zero_keeps_the_last_batch_exactly():
    layer = built((None, 4, 3), momentum=0)
    for x in batches():
        fresh = built((None, 4, 3), momentum=0)
        for each in (layer, fresh):
            each(x, training=True)
        for a, b in zip(statistics(layer), statistics(fresh), strict=True):
            np.testing.assert_array_equal(a, b)  # nothing is left of the batches before


@pytest.mark.parametrize("arguments", [{}, {"unbiased": True}, {"momentum": None}])
def test_one_element_per_channel(arguments):
    x = normal(1, 3)
    layer = built(x.shape, **arguments)
    y = layer(x, training=True)
    np.testing.assert_allclose(array(y)[0], array(layer.beta), rtol=1e-13)
    keep = 0.99 if "momentum" not in arguments else 0.0
    np.testing.assert_allclose(array(layer.moving_mean), (1 - keep) * x[0], rtol=1e-12)
    np.testing.assert_allclose(array(layer.moving_variance), keep, rtol=1e-12)
    assert layer.skipped_batches == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_half_precision(dtype):
    """Statistics in float32, outputs in half; float16 values near its largest number."""
    if "bfloat16" in dtype:
        x, tolerance = normal(64, 4, 3), 4e-2
    else:
        x = 6e4 + 1e3 * np.random.default_rng(0).standard_normal((64, 4, 3)).clip(-3, 3)
        tolerance = 4e-3
    layer = BatchNormalization(dtype=dtype, momentum=0.0)
    half = "bfloat16" if "bfloat16" in dtype else "float16"
    y = layer(ops.cast(x, half), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == half
    assert {keras.backend.standardize_dtype(getattr(layer, n).dtype) for n in STATISTICS} == {
        "float32"
    }
    exact = array(ops.cast(ops.cast(x, half), "float64"))
    expected, mean, variance = reference.batch_norm(exact)
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-5)
    for training in (True, False):
        y = layer(ops.cast(x, half), training=training)
        np.testing.assert_allclose(array(ops.cast(y, "float64")), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16"])
def test_renormalization_in_half_precision(dtype):
    x = normal(64, 3).astype("float32")
    same = [BatchNormalization(renorm=True, dtype=dtype, **o) for o in ({}, {"scale": False})]
    whole = BatchNormalization(renorm=True)(x, training=True)
    for layer in same:
        y = ops.cast(layer(x, training=True), "float32")
        np.testing.assert_allclose(array(y), array(whole), atol=4e-2)


@pytest.mark.parametrize("kind", [BatchNormalization, DecorrelatedBatchNormalization])
def test_weights_are_not_rounded_to_half_precision(kind):
    """In float16 1e5 is infinite, and 1e-8 zero."""
    x = 3 + 2 * normal(32, 4).astype("float32")
    expected = kind(momentum=0.0)
    expected(x, training=True)
    for weight in (1e5, 1e-8):
        layer = kind(momentum=0.0, dtype="mixed_float16")
        layer(x, training=True, sample_weight=np.full(32, weight, "float32"))
        np.testing.assert_allclose(array(layer.moving_mean), array(expected.moving_mean), rtol=1e-3)
        assert layer.skipped_batches == 0
        layer(x, training=True, sample_weight=np.array([np.inf] + [1.0] * 31, "float32"))
        np.testing.assert_allclose(array(layer.moving_mean), array(expected.moving_mean), rtol=1e-3)
        assert layer.skipped_batches == 1


# Masks and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 4), (6, 5, 4, 3), (1, 5, 1), (6, 1, 1, 3)])
@pytest.mark.parametrize("kind", ["mask", "sample_weight"])
def test_masks_and_weights_of_any_shape(shape, kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5, 4, 3))
    given = rng.random(shape) < 0.6 if kind == "mask" else rng.random(shape)
    layer = built(x.shape, momentum=0.0)
    y = layer(x, training=True, **{kind: given})
    weights = given.reshape(shape + (1,) * (4 - len(shape)))
    expected, *moments = reference.batch_norm(
        x, array(layer.gamma), array(layer.beta), weights=weights
    )
    np.testing.assert_allclose(array(y), expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(statistics(layer), moments, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_mask_is_a_subset():
    x, mask = normal(20, 3), np.arange(20) % 3 > 0
    masked, subset = built(x.shape), built(x.shape)
    y = masked(x, training=True, mask=mask)
    np.testing.assert_allclose(array(y)[mask], array(subset(x[mask], training=True)), rtol=1e-12)
    for a, b in zip(statistics(masked), statistics(subset), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_masks_come_from_masking():
    inputs = keras.Input((None, 2))
    layer = BatchNormalization(momentum=0.0)
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    model(np.array([[[1.0, 5.0], [3.0, 5.0], [0.0, 0.0]]], "float32"), training=True)
    np.testing.assert_allclose(array(layer.moving_mean), [2, 5])
    np.testing.assert_allclose(array(layer.moving_variance), [1, 0])


@pytest.mark.parametrize("shape", [(5,), (6, 4), (6, 5, 4), (6, 5, 3, 1), (2, 1, 1)])
def test_masks_that_do_not_broadcast(shape):
    layer = BatchNormalization()
    with pytest.raises(ValueError, match=r"`mask` must broadcast.*Received: mask.shape=.*"):
        layer(normal(6, 5, 3), training=True, mask=np.ones(shape, bool))
    with pytest.raises(ValueError, match=r"`sample_weight` must broadcast"):
        layer(normal(6, 5, 3), training=True, sample_weight=np.ones(shape))


BAD = {
    "inf": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.inf, x),
    "nan": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x),
    "overflow": lambda x: np.where(x > 3, 1e200, x),
    "empty": lambda x: x[:0],
    "masked": lambda x: x,
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"renorm": True}])
def test_what_is_left_out_of_the_moving_statistics(bad, arguments):
    x = normal(4, 5, 3)
    layer = built(x.shape, **arguments)
    layer(x, training=True)
    before = layer.get_weights()
    assert layer.skipped_batches == 0
    mask = np.zeros(4, bool) if bad == "masked" else None
    for count in (1, 2):
        layer(BAD[bad](x), training=True, mask=mask)
        assert layer.skipped_batches == count
    for a, b in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    layer(x, training=True)
    assert layer.skipped_batches == 2
    assert all(np.isfinite(w).all() for w in layer.get_weights())


def test_the_count_of_skipped_batches_is_state_but_no_weight():
    """On every backend: it goes back with a model's state, and comes out of a stateless call."""
    layer, bad = built((4, 3)), np.full((4, 3), np.nan)
    assert len(layer.weights) == 4
    assert BACKEND != "torch" or len(layer.torch_params) == 4
    before = [np.array(array(v)) for v in layer.variables]
    layer(bad, training=True)
    assert layer.skipped_batches == 1
    for variable, value in zip(layer.variables, before, strict=True):
        variable.assign(value)
    assert layer.skipped_batches == 0
    moving = layer.non_trainable_variables
    state = [[v.value for v in some] for some in (layer.trainable_variables, moving)]
    _, after = layer.stateless_call(*state, bad, training=True)
    counts = [array(a) for v, a in zip(moving, after, strict=True) if v.name == "skipped_batches"]
    assert counts == [1]
    assert layer.skipped_batches == 0


def test_a_channel_without_weight_keeps_its_statistics():
    x = normal(4, 3)
    layer = built(x.shape, momentum=None)
    mask = np.array([[True, False, True]])
    layer(x, training=True, mask=mask)
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0) * mask[0], rtol=1e-12)
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(array(layer.moving_count), [2, 1, 2])
    assert layer.skipped_batches == 0


# Ghost batches --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size", "sizes"), [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (4, 9, [4])])
@pytest.mark.parametrize("masked", [False, True])
def test_ghost_batches(n, size, sizes, masked):
    x = normal(n, 4, 3)
    mask = np.random.default_rng(0).random((n, 4)) < 0.7 if masked else None
    layer = built(x.shape, axis=-1, momentum=0.0, virtual_batch_size=size)
    y = array(layer(x, training=True, mask=mask))
    start = 0
    for length in sizes:
        part = slice(start, start + length)
        weights = None if mask is None else mask[part, :, None]
        expected, *_ = reference.batch_norm(
            x[part], array(layer.gamma), array(layer.beta), weights=weights
        )
        np.testing.assert_allclose(y[part], expected, rtol=1e-10, atol=1e-12)
        start += length
    weights = None if mask is None else mask[..., None]
    mean, variance, _ = reference.batch_moments(x, weights=weights)
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-12)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-12)
    ordinary = built(x.shape)
    ordinary.set_weights(layer.get_weights())
    np.testing.assert_allclose(array(layer(x)), array(ordinary(x)), rtol=1e-12)


# Axes, spatial --------------------------------------------------------------------------------


def test_several_axes():
    x = normal(6, 4, 5, 3)
    layer = built(x.shape, axis=(1, -1), momentum=0.0)
    assert layer.gamma.shape == (4, 3)
    y = layer(x, training=True)
    expected, *moments = reference.batch_norm(x, array(layer.gamma), array(layer.beta), axis=(1, 3))
    np.testing.assert_allclose(array(y), expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(statistics(layer), moments, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    copy = BatchNormalization.from_config(json.loads(json.dumps(layer.get_config())))
    copy.build(x.shape)
    assert copy.gamma.shape == (4, 3)


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 2, 5, 3), (4, 2, 2, 5, 3)])
def test_spatial(shape):
    x = normal(*shape)
    last = SpatialBatchNormalization("channels_last")
    first = SpatialBatchNormalization("channels_first")
    plain = BatchNormalization()
    y = array(plain(x, training=True))
    np.testing.assert_array_equal(array(last(x, training=True)), y)
    swapped = array(first(np.moveaxis(x, -1, 1), training=True))
    np.testing.assert_allclose(np.moveaxis(swapped, 1, -1), y, rtol=1e-5, atol=1e-5)
    assert last.gamma.shape == first.gamma.shape == (3,)
    copy = SpatialBatchNormalization.from_config(first.get_config())
    assert copy.get_config() == first.get_config()
    assert copy.axis == 1


def test_spatial_refuses():
    with pytest.raises(ValueError, match=r"3, 4 or 5 dimensions. Received: input_shape=\(2, 3\)"):
        SpatialBatchNormalization()(np.ones((2, 3)))
    with pytest.raises(ValueError, match="Received: axis=1"):
        SpatialBatchNormalization(axis=1)
    with pytest.raises(ValueError, match="Received: data_format='NCHW'"):
        SpatialBatchNormalization("NCHW")


# Switches -------------------------------------------------------------------------------------


def test_momentum_changes_after_compilation():
    x = normal(5, 3)
    layer = built(x.shape, momentum=0.99)
    call = compiled_call(layer, training=True)
    call(x)
    layer.momentum = 0.0
    call(x)
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-12)
    assert layer.get_config()["momentum"] == 0.0


def test_update_statistics_changes_after_compilation():
    x = normal(5, 3)
    layer = built(x.shape)
    call = compiled_call(layer, training=True)
    y = array(call(x))
    before = statistics(layer)
    layer.update_statistics = False
    np.testing.assert_array_equal(array(call(x)), y)  # still by the batch
    call(np.full_like(x, np.nan))
    for a, b in zip(statistics(layer), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert layer.skipped_batches == 0
    layer.update_statistics = True
    call(x)
    assert (statistics(layer)[0] != before[0]).all()


@pytest.mark.parametrize("training", [True, False])
def test_use_batch_statistics_changes_after_compilation(training):
    x = normal(5, 3)
    layer = built(x.shape, use_batch_statistics=not training)
    layer.use_batch_statistics = None
    layer.update_statistics = False
    call = compiled_call(layer, training=training)
    gamma, beta = array(layer.gamma), array(layer.beta)
    by_batch, *_ = reference.batch_norm(x, gamma, beta)
    by_moving = reference.normalize(x, np.zeros(3), np.ones(3), gamma, beta)
    for value, expected in (
        (None, by_batch if training else by_moving),
        (True, by_batch),
        (False, by_moving),
        (None, by_batch if training else by_moving),
    ):
        layer.use_batch_statistics = value
        np.testing.assert_allclose(array(call(x)), expected, rtol=1e-10, atol=1e-12)


def test_use_batch_statistics_too_late():
    layer = built((5, 3))
    compiled_call(layer, training=False)(normal(5, 3))
    if BACKEND == "torch":  # nothing was compiled
        layer.use_batch_statistics = True
        return
    with pytest.raises(ValueError, match=r"Received: use_batch_statistics=True\. Pass it to the"):
        layer.use_batch_statistics = True
    assert layer.use_batch_statistics is None


def test_a_model_that_was_only_built_is_not_compiled():
    inner = BatchNormalization()

    @keras.saving.register_keras_serializable("tests")
    class Model(keras.Model):
        def call(self, x):
            return inner(x)

    model = Model()
    model.inner = inner
    model(keras.Input((3,)))  # Keras infers shapes by running `call` on placeholders
    inner.use_batch_statistics = True
    x = normal(5, 3, dtype="float32")
    np.testing.assert_allclose(array(model(x)).mean(0), 0, atol=1e-6)


def test_train_parameters():
    layer = built((5, 3))
    assert [v.name for v in layer.trainable_variables] == ["gamma", "beta"]
    layer.train_parameters = False
    assert layer.trainable_variables == []
    assert len(layer.weights) == len(layer.non_trainable_weights) == 4
    layer.trainable = False
    layer.trainable = True
    assert layer.trainable_variables == []
    layer.train_parameters = True
    assert len(layer.trainable_variables) == 2
    frozen = built((5, 3), train_parameters=False)
    assert frozen.trainable_variables == []
    x, before = normal(5, 3), frozen.get_weights()
    layers = [keras.layers.Dense(3, dtype="float64"), frozen]
    model = keras.Sequential([keras.Input((3,), dtype="float64"), *layers])
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.1), "mse")
    model.fit(x, x * 2, verbose=0)
    np.testing.assert_array_equal(frozen.get_weights()[0], before[0])
    assert (frozen.get_weights()[2] != before[2]).all()  # the statistics move all the same


def test_train_parameters_after_compilation():
    """In a function compiled before, the gradient of gamma and beta is zero from then on."""
    layer, x = built((5, 3)), normal(5, 3)
    gamma, beta = layer.gamma, layer.beta

    def slopes():
        _, grads = gradients(
            lambda: ops.sum(layer(x, training=True) ** 2), [], variables=[gamma, beta]
        )
        return [ops.max(ops.abs(g)) for g in grads]

    if BACKEND == "tensorflow":
        import tensorflow as tf

        slopes = tf.function(slopes)
    elif BACKEND == "jax":
        import jax

        rest = layer.non_trainable_variables  # the switches among them

        def loss(parameters, values):
            y, _ = layer.stateless_call(parameters, values, x, training=True)
            return ops.sum(y**2)

        compiled = jax.jit(jax.grad(loss))

        def slopes():
            grads = compiled([gamma.value, beta.value], [v.value for v in rest])
            return [ops.max(ops.abs(g)) for g in grads]

    assert all(array(s) > 0.1 for s in slopes())
    layer.train_parameters = False
    assert all(array(s) == 0 for s in slopes())
    layer.train_parameters = True
    assert all(array(s) > 0.1 for s in slopes())


@pytest.mark.parametrize("dtype", ["float32"])
def test_switches_in_fit(dtype):
    """Between epochs, by a callback, in the training function that fit compiled once."""
    x = normal(32, 3, dtype=dtype)
    layer = BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mse")
    seen = []

    class Switch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(array(layer.moving_mean))
            layer.momentum = [0.99, 0.0, 0.0][epoch]
            layer.update_statistics = epoch < 2

    model.fit(x, x * 1e3, batch_size=32, epochs=3, verbose=0, callbacks=[Switch()])
    seen.append(array(layer.moving_mean))
    np.testing.assert_allclose(seen[1], 0.01 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen[2], x.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(seen[3], seen[2])


def test_momentum_one_and_axes_of_numpy():
    """As Keras: statistics that never move; axes from arrays."""
    layer, x = built((5, 3, 4), momentum=1.0, axis=np.int64(1)), normal(5, 3, 4)
    layer(x, training=True)
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(3))


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch keeps no variable of the switches")
def test_switches_of_a_restored_state():
    """Compiled functions follow the variable: so do the attributes."""

    def made(**arguments):
        norm = BatchNormalization(name="bn", **arguments)
        model = keras.Sequential([keras.Input((3,)), norm], name="same")
        model.compile("sgd", "mse")
        return model, model.get_layer("bn")

    source, _ = made(momentum=0.9, use_batch_statistics=False)
    target, layer = made(momentum=0.5)
    target.set_state_tree(source.get_state_tree())
    assert (layer.momentum, layer.train_parameters) == (0.9, True)
    assert layer.use_batch_statistics is False
    assert layer.update_statistics is True
    assert layer.get_config()["momentum"] == 0.9
    layer.update_statistics = False
    still, _ = made(momentum=0.9)
    target.set_state_tree(still.get_state_tree())
    assert (layer.update_statistics, layer.use_batch_statistics) == (True, None)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's checkpoints")
def test_checkpoints_hold_no_switches(tmp_path):
    import tensorflow as tf

    def made(**arguments):
        return keras.Sequential([keras.Input((3,)), BatchNormalization(**arguments)])

    source, target = made(momentum=0.9, update_statistics=False), made(momentum=0.5)
    source.layers[0].moving_mean.assign(np.arange(3.0))
    path = tf.train.Checkpoint(model=source).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=target).restore(path).assert_consumed()
    layer = target.layers[0]
    np.testing.assert_array_equal(array(layer.moving_mean), np.arange(3.0))
    assert layer.momentum == 0.5
    layer(np.ones((2, 3), "float32"), training=True)
    np.testing.assert_allclose(array(layer.moving_mean), [0.5, 1.0, 1.5])


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's tracers")
def test_a_derivative_without_jit_compiles_nothing():
    import jax

    layer, x = built((5, 3)), normal(5, 3, dtype="float32")
    state = (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )
    jax.grad(lambda z: ops.sum(layer.stateless_call(*state, z, training=True)[0] ** 3))(x)
    layer.use_batch_statistics = True


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's tracers")
@pytest.mark.parametrize(
    "layer",
    [
        BatchNormalization(),
        BatchNormalization(virtual_batch_size=2),
        LayerNormalization(),
        GroupNormalization(groups=1),
        Dropout(0.5),
    ],
)
def test_no_tracer_outlives_its_trace(layer):
    """What `jax.checking_leaks` complains of: all that a function holds is kept with its trace."""
    import jax

    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    layer.build(x.shape)
    variables = layer.trainable_variables, layer.non_trainable_variables
    state = [[v.value for v in some] for some in variables]

    def loss(x):
        return ops.sum(layer.stateless_call(*state, x, training=True)[0] ** 3)

    with jax.checking_leaks():
        for function in (loss, jax.grad(loss)):
            jax.jit(function)(x)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere the variables stay with the layer")
def test_switches_in_the_middle_of_an_epoch():
    x = normal(64, 3, dtype="float32")
    layer = BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mse")
    errors = []

    class Switch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                try:
                    layer.momentum = 0.0
                except ValueError as error:
                    errors.append(str(error))
                with pytest.raises(ValueError, match="jax_state_sync"):
                    _ = layer.skipped_batches
                assert layer.momentum == 0.99
                self.model.jax_state_sync()
                layer.momentum = 0.0

    model.fit(x, x, batch_size=32, shuffle=False, verbose=0, callbacks=[Switch()])
    assert "jax_state_sync" in errors[0]
    np.testing.assert_allclose(array(layer.moving_mean), x[32:].mean(0), rtol=1e-5)


def test_frozen():
    x = normal(5, 3)
    layer = built(x.shape)
    layer.trainable = False
    before = layer.get_weights()
    np.testing.assert_allclose(
        array(layer(x, training=True)),
        reference.normalize(x, before[2], before[3], before[0], before[1]),
        rtol=1e-12,
    )
    for a, b in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert layer.trainable_variables == []


def test_average_of_all_and_back():
    x = normal(5, 3)
    layer = built(x.shape)
    with pytest.raises(ValueError, match="Received: momentum=None"):
        layer.momentum = None
    layer = built(x.shape, momentum=None)
    layer(x, training=True)
    layer.momentum = 0.5
    layer(2 * x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), (0.5 + 2) / 1.5 * x.mean(0), rtol=1e-12)
    copy = BatchNormalization.from_config(layer.get_config())
    copy.build(x.shape)
    copy.set_weights(layer.get_weights())


# Untouched statistics ---------------------------------------------------------------------------


def test_warning_of_untouched_statistics():
    x = normal(5, 3, dtype="float32")
    layer = BatchNormalization(warn_untouched=True, name="norm")
    with pytest.warns(UserWarning, match="'norm' normalizes by moving statistics that no batch"):
        layer(x)
    layer(x)  # once
    trained_before = BatchNormalization(warn_untouched=True)
    trained_before(x, training=True)
    trained_before(x)
    loaded = BatchNormalization(warn_untouched=True)
    loaded.build(x.shape)
    loaded.set_weights(trained_before.get_weights())
    loaded(x)
    BatchNormalization()(x)  # not asked for


@pytest.mark.skipif(BACKEND == "jax", reason="a traced value cannot be looked at")
def test_warning_of_untouched_statistics_in_predict():
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(warn_untouched=True)])
    with pytest.warns(UserWarning, match="no batch has touched"):
        model.predict(normal(5, 3, dtype="float32"), verbose=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.predict(normal(5, 3, dtype="float32"), verbose=0)
    assert not [w for w in caught if "touched" in str(w.message)]


# Saving -----------------------------------------------------------------------------------------

CONTINUE = """
import json, sys
import keras, numpy as np
import keras_norm.layers
model = keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
model.fit(data["x"], data["y"], batch_size=16, epochs=2, shuffle=False, verbose=0)
arrays = [*model.get_weights(), model.predict(data["x"], verbose=0)]
print(json.dumps([a.tolist() for a in arrays]))
"""


@pytest.mark.slow_on_jax
def test_saved_model_goes_on_training_in_a_fresh_process(tmp_path):
    x = normal(64, 6, dtype="float32")
    y = np.sin(x[:, :2])
    layers = [
        keras.layers.Dense(5),
        BatchNormalization(momentum=0.9, debiased=True, virtual_batch_size=8, unbiased=True),
        keras.layers.Dense(5, activation="relu"),
        BatchNormalization(renorm=True, renorm_clipping={"rmax": 2.0}, gamma_regularizer="l2"),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=1, **options)
    layers[1].momentum = 0.8
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "script.py").write_text(CONTINUE)
    files = [tmp_path / name for name in ("script.py", "model.keras", "data.npz")]
    done = forked.run(*files)
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout.splitlines()[-1])
    model.fit(x, y, epochs=2, **options)
    here = [*model.get_weights(), model.predict(x, verbose=0)]
    for a, b in zip(resumed, here, strict=True):
        np.testing.assert_allclose(np.array(a), b, rtol=1e-6, atol=1e-7)


def test_config():
    arguments = {
        "axis": 1,
        "momentum": None,
        "epsilon": 1e-5,
        "center": False,
        "scale": True,
        "gamma_initializer": keras.initializers.Constant(2.0),
        "gamma_regularizer": keras.regularizers.L2(1e-3),
        "gamma_constraint": keras.constraints.NonNeg(),
        "moving_mean_initializer": "ones",
        "renorm_momentum": 0.5,
        "synchronized": True,
        "debiased": True,
        "unbiased": True,
        "train_parameters": False,
        "update_statistics": False,
        "use_batch_statistics": True,
        "warn_untouched": True,
        "name": "norm",
        "dtype": "mixed_bfloat16",
        "trainable": False,
    }
    layer = BatchNormalization(**arguments)
    config = layer.get_config()
    for name, value in arguments.items():
        if isinstance(value, bool | int | float | None) or name == "name":
            assert config[name] == value
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is BatchNormalization
    assert copy.get_config() == config


def test_initializers_regularizers_and_constraints_act():
    layer = BatchNormalization(
        beta_initializer="ones",
        gamma_initializer=keras.initializers.Constant(3.0),
        moving_mean_initializer="ones",
        moving_variance_initializer=keras.initializers.Constant(4.0),
        gamma_regularizer=keras.regularizers.L2(0.5),
        beta_constraint=keras.constraints.MaxNorm(0.1),
        renorm=True,
    )
    layer.build((None, 2))
    expected = {"gamma": 3, "beta": 1, "moving_mean": 1, "moving_variance": 4}
    expected |= {"moving_stddev": 2, "renorm_mean": 1, "renorm_stddev": 2}
    assert [w.name for w in layer.weights] == list(expected)
    for weight, value in zip(layer.weights, expected.values(), strict=True):
        np.testing.assert_array_equal(array(weight), value)
    np.testing.assert_allclose([array(loss) for loss in layer.losses], [0.5 * 2 * 9])
    assert layer.beta.constraint is not None


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.5}, r"\[0, 1\]. Received: momentum=1.5"),
        ({"momentum": -0.1}, "Received: momentum=-0.1"),
        ({"momentum": float("nan")}, "Received: momentum=nan"),
        ({"epsilon": -1e-3}, "Received: epsilon=-0.001"),
        ({"epsilon": "1e-3"}, "a number >= 0. Received: epsilon='1e-3'"),
        ({"epsilon": None}, "Received: epsilon=None"),
        ({"momentum": "0.9"}, r"a number in \[0, 1\]. Received: momentum='0.9'"),
        ({"momentum": True}, "Received: momentum=True"),
        ({"renorm_momentum": None}, "Received: renorm_momentum=None"),
        ({"dtype": "int32"}, "floating.*Received: dtype='int32'"),
        ({"dtype": "complex64"}, "floating.*Received: dtype='complex64'"),
        ({"renorm_momentum": 2.0}, "Received: renorm_momentum=2.0"),
        ({"renorm": True, "renorm_clipping": {"max": 1}}, "Received invalid keys.*'max'"),
        ({"renorm": True, "renorm_clipping": {"rmax": 0.0, "rmin": 1.0}}, "rmax should be greater"),
        ({"renorm": True, "renorm_clipping": {"dmax": -1.0}}, "dmax should be non-negative"),
        ({"renorm": True, "renorm_clipping": {"rmax": -1.0}}, "rmax should be positive"),
        ({"renorm": True, "renorm_clipping": {"rmax": math.nan}}, "must be numbers.*rmax=nan"),
        ({"renorm": True, "renorm_clipping": {"rmax": "3"}}, "must be numbers.*rmax='3'"),
        ({"renorm": True, "renorm_clipping": "rmax"}, "must be a dict"),
        ({"virtual_batch_size": 0}, "Received: virtual_batch_size=0"),
        ({"virtual_batch_size": 2.5}, "Received: virtual_batch_size=2.5"),
        ({"virtual_batch_size": 2, "renorm": True}, "Choose one"),
        ({"virtual_batch_size": 2, "synchronized": True}, "Choose one"),
        ({"update_statistics": None}, "Received: update_statistics=None"),
        ({"train_parameters": 1}, "Received: train_parameters=1"),
        ({"use_batch_statistics": "yes"}, "Received: use_batch_statistics='yes'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchNormalization(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        BatchNormalization,
        LayerNormalization,
        RMSNormalization,
        GroupNormalization,
        InstanceNormalization,
        functools.partial(DecorrelatedBatchNormalization, group_size=2),
        functools.partial(QuantileNormalization, quantiles=2),
    ],
)
def test_an_axis_of_numpy_is_kept_as_json_has_it(make):
    assert json.loads(json.dumps(make(axis=np.int64(2)).get_config()))["axis"] == 2


def test_axes_of_numpy_are_kept_as_json_has_them():
    for cls in (BatchNormalization, LayerNormalization, RMSNormalization):
        layer = cls(axis=Pair(np.int64(1), 2))
        assert json.loads(json.dumps(layer.get_config()))["axis"] == [1, 2]
        assert layer(tensor(normal(2, 3, 4))).shape == (2, 3, 4)


def test_a_size_of_numpy_is_kept_as_json_has_it():
    size = BatchNormalization(virtual_batch_size=np.int64(2)).get_config()["virtual_batch_size"]
    assert (size, type(size)) == (2, int)


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({"axis": 3}, (2, 4, 3), "Received: axis=3"),
        ({"axis": -4}, (2, 4, 3), "Received: axis=-4"),
        ({"axis": (1, 1)}, (2, 4, 3), r"Received: axis=\(1, 1\)"),
        ({}, (), "Received: axis=-1"),
        ({}, (None, None), "must be known.*Received: input_shape=.*Input with the number"),
        ({"axis": 0, "virtual_batch_size": 2}, (4, 3), "consecutive examples"),
    ],
)
def test_wrong_shapes(arguments, shape, message):
    with pytest.raises(ValueError, match=message):
        BatchNormalization(**arguments).build(shape)


def test_wrong_inputs_for_what_was_built():
    layer = built((5, 4, 3))
    with pytest.raises(ValueError, match="ndim"):
        layer(normal(5, 3))
    with pytest.raises(ValueError, match="axis"):
        layer(normal(5, 4, 2))
    with pytest.raises(ValueError, match="Received: momentum=2"):
        layer.momentum = 2
    assert layer.momentum == 0.99

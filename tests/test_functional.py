"""The mathematics of batch normalization: values, gradients, hard numbers, compilation."""

import functools

import keras
import numpy as np
import pytest
import reference
from arrays import array, numpy_dtype, tensor
from differentiation import compiled, fast, measured_gradient, penalty_and_gradient
from differentiation import fast_gradients as gradients
from keras import ops
from reference import complex_step, relative_error

from keras_norm import functional

pytestmark = pytest.mark.core


def data(shape, axis, seed=0):
    """x with a mean and a spread of its own per channel, gamma, beta, and mixing weights."""
    rng = np.random.default_rng(seed)
    channels = [shape[a] for a in reference.channel_axes(axis, len(shape))]
    x = rng.normal(size=shape) * 2 + 3
    gamma, beta = rng.normal(1, 0.5, channels), rng.normal(size=channels)
    mix = rng.normal(size=shape), rng.normal(size=channels), rng.normal(size=channels)
    return x, gamma, beta, mix


def weights_for(kind, shape, seed=1):
    rng = np.random.default_rng(seed)
    if kind is None:
        return None
    if kind == "mask":
        weights = rng.random(shape) < 0.6
        weights[tuple(0 for _ in shape)] = True
        return weights
    if kind == "samples":
        return rng.random((shape[0],) + (1,) * (len(shape) - 1)) + 0.1
    return rng.random(shape)


LAYOUTS = [((6, 3), -1), ((5,), 0), ((3, 3, 2, 4), 1), ((4, 3, 2, 2), (1, 3))]
CASES = [
    ((6, 3), -1, None),
    ((6, 3), 0, "mask"),
    ((5,), 0, "samples"),
    ((4, 5, 3), 1, "weights"),
    ((3, 2, 4, 3), -1, "mask"),
    ((3, 3, 2, 4), 1, None),
    ((3, 2, 2, 2, 3), -1, "samples"),
    ((4, 3, 2, 2), (1, 3), None),
    ((4, 3, 2, 2), (-1, -3), "weights"),
]


@pytest.mark.parametrize(("shape", "axis", "kind"), CASES)
class TestAgainstReference:
    def test_values(self, shape, axis, kind):
        x, gamma, beta, _ = data(shape, axis)
        weights = weights_for(kind, shape)
        ours = fast(lambda *a: functional.batch_normalization(*a, axis=axis, weights=weights))(
            x, gamma, beta
        )
        expected = reference.batch_norm(x, gamma, beta, axis=axis, weights=weights)
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(array(a), b, rtol=1e-12, atol=1e-13)

    def test_gradients(self, shape, axis, kind):
        """The loss uses all three outputs: y, and the mean and variance of the batch."""
        x, gamma, beta, mix = data(shape, axis)
        weights = weights_for(kind, shape)

        def ours(x, gamma, beta):
            outputs = functional.batch_normalization(x, gamma, beta, axis=axis, weights=weights)
            return sum(ops.sum(o * tensor(m)) for o, m in zip(outputs, mix, strict=True))

        def expected(x, gamma, beta):
            outputs = reference.batch_norm(x, gamma, beta, axis=axis, weights=weights)
            return sum((o * m).sum() for o, m in zip(outputs, mix, strict=True))

        _, analytic = gradients(ours, [x, gamma, beta])
        for a, b in zip(analytic, complex_step(expected, [x, gamma, beta]), strict=True):
            assert relative_error(array(a), b) < 1e-9

    def test_moments(self, shape, axis, kind):
        x, _, _, mix = data(shape, axis)
        weights = weights_for(kind, shape)

        def ours(x):
            outputs = functional.moments(x, axis=axis, weights=weights)
            return sum(ops.sum(o * tensor(m)) for o, m in zip(outputs, mix[1:], strict=True))

        def expected(x):
            outputs = reference.batch_moments(x, axis=axis, weights=weights)[:2]
            return sum((o * m).sum() for o, m in zip(outputs, mix[1:], strict=True))

        value, (analytic,) = gradients(ours, [x])
        np.testing.assert_allclose(array(value), expected(x), rtol=1e-12)
        assert relative_error(array(analytic), complex_step(expected, [x])[0]) < 1e-9


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_normalize(shape, axis):
    x, gamma, beta, mix = data(shape, axis)
    arrays = [x, mix[1], np.abs(mix[2]), gamma, beta]
    y = fast(lambda *a: functional.normalize(*a, axis=axis, epsilon=1e-2))(*arrays)
    expected = reference.normalize(*arrays, axis=axis, epsilon=1e-2)
    np.testing.assert_allclose(array(y), expected, rtol=1e-12)
    _, analytic = gradients(
        lambda *a: ops.sum(functional.normalize(*a, axis=axis, epsilon=1e-2) * tensor(mix[0])),
        arrays,
    )
    numerical = complex_step(
        lambda *a: (reference.normalize(*a, axis=axis, epsilon=1e-2) * mix[0]).sum(), arrays
    )
    for a, b in zip(analytic, numerical, strict=True):
        assert relative_error(array(a), b) < 1e-9


@pytest.mark.parametrize("given", ["gamma", "beta", "neither"])
def test_without_gamma_or_beta(given):
    x, gamma, beta, mix = data((4, 5, 3), -1)
    parameters = {"gamma": {"gamma": gamma}, "beta": {"beta": beta}, "neither": {}}[given]
    y, *_ = functional.batch_normalization(x, **parameters)
    np.testing.assert_allclose(array(y), reference.batch_norm(x, **parameters)[0], rtol=1e-12)

    def ours(x, *values):
        y, *_ = functional.batch_normalization(x, **dict(zip(parameters, values, strict=True)))
        return ops.sum(y * tensor(mix[0]))

    def expected(x, *values):
        y, *_ = reference.batch_norm(x, **dict(zip(parameters, values, strict=True)))
        return (y * mix[0]).sum()

    arrays = [x, *parameters.values()]
    for a, b in zip(gradients(ours, arrays)[1], complex_step(expected, arrays), strict=True):
        assert relative_error(array(a), b) < 1e-9


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_two_ways_to_the_gradient(shape, axis):
    """The simplified backward pass gives what the walk through the graph gives."""
    x, gamma, _, (dy, *_) = data(shape, axis)
    x, gamma, dy = tensor(x), tensor(gamma), tensor(dy)
    zeros = ops.zeros_like(gamma)
    _, (x_, mean, inv_std, gamma_, *rest) = functional.batch_normalization_forward(
        x, gamma, axis=axis
    )
    simplified = functional.batch_normalization_backward(
        dy, zeros, zeros, x_, mean, inv_std, gamma_, *rest, axis=axis
    )
    by_graph = functional.batch_normalization_backward_by_graph(dy, x, gamma, axis=axis)
    for a, b in zip(simplified, by_graph, strict=True):
        assert relative_error(array(a), array(b)) < 1e-13


# Second derivatives --------------------------------------------------------------------------


def bend(y):
    """A curved function of y. (On JAX, keras.ops.tanh computes float64 in float32.)"""
    return y / (1 + y * y)


@pytest.mark.parametrize("kind", [None, "weights"])
def test_second_derivatives(kind):
    x, gamma, beta, mix = data((3, 2), -1)
    weights = weights_for(kind, x.shape)

    def loss(x):
        y, mean, variance = functional.batch_normalization(
            x, tensor(gamma), tensor(beta), weights=weights
        )
        return (
            ops.sum(bend(y) * tensor(mix[0]))
            + ops.sum(mean * mean * tensor(mix[1]))
            + ops.sum(ops.sqrt(variance) * tensor(mix[2]))
        )

    both = penalty_and_gradient(loss)
    second, numerical = both(x)[1], measured_gradient(lambda x: both(x)[0], x)
    assert relative_error(second, numerical) < 1e-9


def test_second_derivatives_of_normalize_and_moments():
    x, gamma, _, mix = data((5, 2, 3), -1)

    def separate(x):
        mean, variance = functional.moments(x)
        y = functional.normalize(x, mean, variance, tensor(gamma))
        return ops.sum(bend(y) * tensor(mix[0]))

    def joint(x):
        y, *_ = functional.batch_normalization(x, tensor(gamma))
        return ops.sum(bend(y) * tensor(mix[0]))

    for a, b in zip(*(penalty_and_gradient(f)(x) for f in (separate, joint)), strict=True):
        assert relative_error(a, b) < 1e-12


# Numbers that break others --------------------------------------------------------------------


def test_mean_1000_variance_1_in_float32():
    """E[x^2] - E[x]^2 gives .5 to 2.06 here; a sum without a second look .85 to .99."""
    x = (1000 + np.random.default_rng(0).normal(size=(64, 64, 64, 3))).astype("float32")
    y, mean, variance = functional.batch_normalization(x, epsilon=0.0)
    wide = x.astype("float64")
    np.testing.assert_allclose(array(mean), wide.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(array(variance), wide.var((0, 1, 2)), rtol=1e-5)
    expected = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2))
    np.testing.assert_allclose(array(y), expected, atol=1e-4)  # 6e-5 is the last digit of 1000
    assert abs(array(y).astype("float64").mean()) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 1000.1, 60000.0])
def test_constant_channels(dtype, value):
    """A constant has variance 0, up to the last digit of the constant; y is beta."""
    x = ops.cast(np.full((7, 9, 3), value), dtype)
    beta = np.array([1.0, -2.0, 0.5], "float32")
    y, mean, variance = functional.batch_normalization(x, beta=beta)
    constant = float(array(ops.cast(x, "float64"))[0, 0, 0])
    digit = 2e-16 if dtype == "float64" else 1e-7
    np.testing.assert_allclose(array(mean), constant, rtol=2 * digit)
    assert np.all(array(variance) <= (digit * constant) ** 2)
    np.testing.assert_allclose(
        array(ops.cast(y, "float32")), np.broadcast_to(beta, y.shape), atol=1e-6 + constant * 4e-6
    )


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
def test_one_element(shape):
    x, gamma, beta, mix = data(shape, -1)
    y, mean, variance = functional.batch_normalization(x, gamma, beta)
    np.testing.assert_array_equal(array(mean), x.reshape(3))
    np.testing.assert_array_equal(array(variance), 0)
    np.testing.assert_array_equal(array(y).reshape(3), beta)
    _, (dx,) = gradients(
        lambda x: ops.sum(functional.batch_normalization(x, gamma, beta)[0] * tensor(mix[0])), [x]
    )
    np.testing.assert_allclose(array(dx), 0, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_empty_batch(weighted):
    x, beta = np.zeros((0, 4, 3), "float32"), np.ones(3, "float32")
    weights = np.ones((0, 4, 1), bool) if weighted else None
    y, mean, variance = functional.batch_normalization(x, beta=beta, weights=weights)
    assert y.shape == (0, 4, 3)
    np.testing.assert_array_equal(array(mean), 0)
    np.testing.assert_array_equal(array(variance), 0)
    _, (dx, dbeta) = gradients(
        lambda x, beta: ops.sum(functional.batch_normalization(x, beta=beta)[0]), [x, beta]
    )
    assert dx.shape == x.shape
    np.testing.assert_array_equal(array(dbeta), 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_has_no_weight_may_be_infinite(bad):
    x, gamma, beta, _ = data((6, 4, 3), -1)
    mask = np.ones((6, 4, 1), bool)
    mask[2, 1] = mask[5, 3] = False
    x[~mask[..., 0]] = bad
    y, mean, variance = functional.batch_normalization(x, gamma, beta, weights=mask)
    clean = x[mask[..., 0]]
    np.testing.assert_allclose(array(mean), clean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(array(variance), clean.var(0), rtol=1e-12)
    assert np.isfinite(array(y)[mask[..., 0]]).all()

    def loss(x, gamma, beta):  # of what counts alone, as a masked loss is
        y, *_ = functional.batch_normalization(x, gamma, beta, weights=mask)
        return ops.sum(bend(ops.where(mask, y, 0)))

    _, (dx, dgamma, dbeta) = gradients(loss, [x, gamma, beta])
    _, expected = gradients(
        lambda x, gamma, beta: ops.sum(bend(functional.batch_normalization(x, gamma, beta)[0])),
        [clean, gamma, beta],
    )
    np.testing.assert_allclose(array(dx)[mask[..., 0]], array(expected[0]), atol=1e-12)
    np.testing.assert_array_equal(array(dx)[~mask[..., 0]], 0)
    np.testing.assert_allclose(array(dgamma), array(expected[1]), atol=1e-12)
    np.testing.assert_allclose(array(dbeta), array(expected[2]), atol=1e-12)


@pytest.mark.parametrize("weights", [np.zeros((4, 1), bool), np.zeros((4, 3))])
def test_no_weight_at_all(weights):
    x, gamma, beta, _ = data((4, 3), -1)
    y, mean, variance = functional.batch_normalization(x, gamma, beta, weights=weights)
    np.testing.assert_array_equal(array(mean), 0)
    np.testing.assert_array_equal(array(variance), 0)
    np.testing.assert_allclose(array(y), gamma * x / np.sqrt(1e-3) + beta, rtol=1e-12)


def test_float16_near_its_largest_number():
    """Sums and squares of numbers near 6e4 overflow float16; the statistics are in float32."""
    rng = np.random.default_rng(0)
    x = (6e4 + 2e3 * rng.standard_normal((256, 3))).clip(None, 65504).astype("float16")
    y, mean, variance = functional.batch_normalization(x)
    wide = x.astype("float64")
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert keras.backend.standardize_dtype(mean.dtype) == "float32"
    np.testing.assert_allclose(array(mean), wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(array(variance), wide.var(0), rtol=1e-5)
    np.testing.assert_allclose(array(y), (wide - wide.mean(0)) / wide.std(0), atol=2e-3)


TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    x, gamma, beta, mix = data((8, 5, 3), -1)
    x = x.astype(numpy_dtype(dtype)).astype("float64")  # what the dtype can hold
    x_ = ops.cast(x, dtype)
    y, mean, variance = functional.batch_normalization(x_, gamma, beta)
    expected, *statistics = reference.batch_norm(x, gamma, beta)
    wide = "float64" if dtype == "float64" else "float32"
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    for ours, theirs in zip((mean, variance), statistics, strict=True):
        assert keras.backend.standardize_dtype(ours.dtype) == wide
        np.testing.assert_allclose(array(ours), theirs, rtol=1e-5)
    np.testing.assert_allclose(array(ops.cast(y, "float64")), expected, atol=3 * TOLERANCE[dtype])

    def loss(x):
        y, *_ = functional.batch_normalization(x, gamma, beta)
        return ops.sum(ops.cast(y, "float64") * tensor(mix[0]))

    _, (dx,) = gradients(loss, [x_])
    assert keras.backend.standardize_dtype(dx.dtype) == dtype
    (theirs,) = complex_step(
        lambda x: (reference.batch_norm(x, gamma, beta)[0] * mix[0]).sum(), [x]
    )
    assert relative_error(array(ops.cast(dx, "float64")), theirs) < TOLERANCE[dtype]


# Compiled -------------------------------------------------------------------------------------


def test_compiled_as_eager():
    """Graph and XLA on TensorFlow, jit on JAX: the same values and gradients as eager."""
    x, gamma, beta, mix = data((6, 4, 3), -1)
    weights = weights_for("mask", (6, 4, 1))

    def values(x, gamma, beta):
        def loss(x, gamma, beta):
            outputs = functional.batch_normalization(x, gamma, beta, weights=weights)
            return sum(ops.sum(o * tensor(m)) for o, m in zip(outputs, mix, strict=True))

        value, grads = gradients(loss, [x, gamma, beta])
        return [value, *grads]

    eager = values(x, gamma, beta)
    for run in compiled(values, unknown=(0,)):
        for a, b in zip(run(x, gamma, beta), eager, strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=1e-11, atol=1e-12)


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [2, -3, (), (1, -1), 1.0, "channels"])
def test_wrong_axis(axis):
    for function in (functional.batch_normalization, functional.moments):
        with pytest.raises(ValueError, match=r"`axis` must be .*Received: axis="):
            function(np.ones((2, 3)), axis=axis)


@pytest.mark.parametrize("epsilon", [-1e-3, float("nan"), "1e-3", None, True])
def test_wrong_epsilon(epsilon):
    with pytest.raises(ValueError, match=r"`epsilon` .*Received: epsilon="):
        functional.batch_normalization(np.ones((2, 3)), epsilon=epsilon)
    with pytest.raises(ValueError, match=r"`epsilon` .*Received: epsilon="):
        functional.normalize(np.ones((2, 3)), np.ones(3), np.ones(3), epsilon=epsilon)
    with pytest.raises(ValueError, match=r"1e-3, of RMS and filter response normalization 1e-6\."):
        functional.rms_normalization(np.ones((2, 3)), epsilon=epsilon)


def test_a_choice_of_statistics_that_are_not_given():
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"Received: use_given=True, given=None\. Pass given="):
        functional.batch_normalization(x, use_given=True)
    with pytest.raises(ValueError, match=r"Received: use_given=.*, given=None"):
        functional.ghost_batch_normalization(x, virtual_batch_size=2, use_given=np.array(False))


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_wrong_dtype(dtype):
    with pytest.raises(ValueError, match=r"floating dtype. Received: x.dtype="):
        functional.batch_normalization(np.ones((2, 3), dtype))


NORMALIZATIONS = {
    "batch": functional.batch_normalization,
    "ghost": functools.partial(functional.ghost_batch_normalization, virtual_batch_size=2),
    "given": lambda x, *p: functional.normalize(x, np.zeros(6), np.ones(6), *p),
    "moving": lambda x, *p: functional.normalize(x, *p),
    "layer": functional.layer_normalization,
    "rms": lambda x, gamma, _: functional.rms_normalization(x, gamma),
    "group": functools.partial(functional.group_normalization, groups=2),
    "instance": functional.instance_normalization,
}


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 6), (6, 1), (4, 6)])
@pytest.mark.parametrize("which", NORMALIZATIONS)
def test_parameters_of_another_shape(which, shape):
    """Most of them broadcast; their gradients would have the shape (6,)."""
    normalize, x, right = NORMALIZATIONS[which], np.ones((4, 2, 6)), np.ones(6)
    normalize(x, right, right)
    pairs = [(np.ones(shape), right)]
    pairs += [] if which == "rms" else [(right, np.ones(shape))]
    for gamma, beta in pairs:
        with pytest.raises(ValueError, match=r"the shape \(6,\). Received: .* of shape"):
            normalize(x, gamma, beta)


@pytest.mark.parametrize("integer", [int, np.int32, np.int64])
def test_integers_of_numpy(integer):
    """As sizes of a search's space come."""
    x = np.random.default_rng(0).standard_normal((4, 2, 6))
    y = array(functional.group_normalization(x, groups=integer(3)))
    np.testing.assert_array_equal(y, array(functional.group_normalization(x, groups=3)))
    assert type(functional.number_of_groups(integer(3), 6)) is int
    for size in (2, 3):  # the latter does not divide the batch
        y, mean, _ = functional.ghost_batch_normalization(x, virtual_batch_size=integer(size))
        same, _, _ = functional.ghost_batch_normalization(x, virtual_batch_size=size)
        np.testing.assert_array_equal(array(y), array(same))
        assert array(mean).shape == (6,)
    with pytest.raises(ValueError, match="Received: groups=True"):
        functional.group_normalization(x, groups=True)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (3, 1, 1), (1, 4, 2, 6)])
def test_weights_that_do_not_broadcast(shape):
    x, weights = np.ones((4, 2, 6)), np.ones(shape)
    ghost = functools.partial(functional.ghost_batch_normalization, virtual_batch_size=2)
    others = functional.moments, functional.weight_sums
    for function in (functional.batch_normalization, ghost, *others):
        with pytest.raises(ValueError, match="`weights` must broadcast to x"):
            function(x, weights=weights)


def test_bounds_of_renormalization_in_float64():
    """To the last digits: 1.1 and 0.3 are no numbers of float32."""
    mean, variance = np.array([3.0, -3.0, 0.1, 0.0]), np.array([16.0, 1e-4, 1.0, 1.0])
    moving_mean, moving_stddev = np.array([1.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, 0.9, 0.0])
    bounds = {"rmin": 0.7, "rmax": 1.1, "dmax": 0.3}
    r, d = functional.renormalization(
        mean, variance, moving_mean, moving_stddev, epsilon=1e-3, **bounds
    )
    stddev = np.maximum(moving_stddev, np.sqrt(1e-3))
    np.testing.assert_allclose(
        array(r), np.clip(np.sqrt(variance + 1e-3) / stddev, 0.7, 1.1), rtol=1e-12
    )
    np.testing.assert_allclose(
        array(d), np.clip((mean - moving_mean) / stddev, -0.3, 0.3), rtol=1e-12, atol=1e-15
    )

"""Whitening, quantile and filter-response normalization: values, gradients, the layers."""

import json
import threading

import keras
import numpy as np
import pytest
from arrays import array, dtype_of, rounded, tensor, wide
from differentiation import (
    BACKEND,
    compiled,
    fast,
    measured_gradient,
    penalty_and_gradient,
    value_and_gradients,
)
from keras import ops
from reference import complex_step, relative_error
from reference_research import (
    MATRIX,
    affine,
    filter_response,
    ranked,
    straight_lines,
    target_of,
    whitened,
)

from keras_norm import distributed, functional, research
from keras_norm._gradients import gradients
from keras_norm.gradient_check import check
from keras_norm.research import (
    DecorrelatedBatchNormalization,
    FilterResponseNormalization,
    QuantileNormalization,
)

pytestmark = pytest.mark.core

METHODS = ["zca", "cholesky", "newton"]
MAIN = ["zca", "quantile", "filter"]  # one of each kind


def few(cases, on_jax):
    """All cases; on JAX, where each takes a second to compile, those with these numbers."""
    cases = list(cases)
    return [cases[i] for i in on_jax] if BACKEND == "jax" else cases


def data(shape, axis, seed=0, correlated=True):
    """x with correlated channels, gamma, beta, and weights of a loss."""
    rng = np.random.default_rng(seed)
    x = np.moveaxis(rng.normal(size=shape), axis, -1)
    if correlated:
        x = x @ rng.normal(size=(x.shape[-1],) * 2) + 3 * rng.normal(size=x.shape[-1])
    x = np.moveaxis(x, -1, axis)
    return x, rng.normal(1, 0.5, shape[axis]), rng.normal(size=shape[axis]), rng.normal(size=shape)


def compare(function, expected, arrays, mix, first=lambda y: y):
    """Values, and gradients of the first output, of two functions of the same arrays."""
    y, analytic = value_and_gradients(lambda *a: first(function(*a)), arrays, mix)
    np.testing.assert_allclose(array(y), first(expected(*arrays)), rtol=1e-9, atol=1e-10)
    numerical = complex_step(lambda *a: (first(expected(*a)) * mix).sum(), arrays)
    for a, b in zip(analytic, numerical, strict=True):
        assert relative_error(array(a), b) < 1e-9


def assert_second_derivative(loss, *points):
    """The gradient of a gradient penalty, along one direction."""
    both = penalty_and_gradient(loss)
    for x in points:
        direction = np.random.default_rng(5).normal(size=x.shape)

        def along(step, x=x, direction=direction):
            return both(x + step[0] * direction)[0]

        (measured,) = measured_gradient(along, np.zeros(1), step=3e-4)
        second = (both(x)[1] * direction).sum()
        assert abs(measured) > 0.1
        assert relative_error(second, measured) < 1e-8


LAYOUTS = [((10, 4), -1, 2), ((3, 4, 3), -1, 3), ((3, 4, 3), 1, 2), ((2, 2, 4, 2), -2, 4)]


# Whitening ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "axis", "size"), few(LAYOUTS, [2]))
def test_whitening_against_reference(shape, axis, size, method):
    x, gamma, beta, mix = data(shape, axis)
    options = {"axis": axis, "method": method, "shrinkage": 0.1, "epsilon": 1e-2}
    compare(
        lambda *a: research.decorrelated_batch_normalization(*a, group_size=size, **options)[0],
        lambda *a: whitened(*a, size=size, **options)[0],
        [x, gamma, beta],
        mix,
    )


@pytest.mark.parametrize("output", [1, 2])
def test_gradients_of_the_statistics(output):
    x, _, _, _ = data((10, 4), -1)
    options = {"method": "zca"}

    def function(x):
        return research.decorrelated_batch_normalization(x, group_size=2, **options)[output]

    expected = whitened(x, size=2, **options)[output]
    mix = np.random.default_rng(1).normal(size=expected.shape)
    compare(function, lambda x: whitened(x, size=2, **options)[output], [x], mix)


@pytest.mark.parametrize("method", METHODS)
def test_equal_eigenvalues(method):
    """The covariance is a multiple of the identity, to the last bit: where the derivative of
    eigenvectors is infinite, that of the whitening matrix is as good as anywhere."""
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], "float64")
    x = np.concatenate([hadamard, -hadamard])
    *_, mix = data(x.shape, -1)
    _, _, covariance = research.decorrelated_batch_normalization(x, group_size=4)
    np.testing.assert_array_equal(array(covariance)[0], np.eye(4))
    compare(
        lambda x: research.decorrelated_batch_normalization(x, group_size=4, method=method)[0],
        lambda x: whitened(x, size=4, method=method)[0],
        [x],
        mix,
    )


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow_on_jax if m == "newton" else ()) for m in METHODS],
)
def test_second_derivatives_of_whitening(method):
    """In general, and where the eigenvalues are equal."""
    x, gamma, _, mix = data((4, 2), -1)
    equal = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])

    def loss(x):
        y, _, _ = research.decorrelated_batch_normalization(
            x, tensor(gamma), epsilon=0.1, method=method
        )
        return ops.sum(y * y * y * tensor(mix))

    assert_second_derivative(loss, x, equal)


@pytest.mark.parametrize("method", METHODS)
def test_whitening_matrix(method):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 4, 9))
    a = a @ a.transpose(0, 2, 1) / 9
    mix = rng.normal(size=a.shape)

    def expected(a):
        return np.array([MATRIX[method]((v + v.T) / 2 + 1e-3 * np.eye(4)) for v in a])

    compare(lambda a: research.whitening_matrix(a, method=method), expected, [a], mix)
    if method != "newton":
        u = array(research.whitening_matrix(a, method=method, epsilon=1e-12))
        identities = u @ a @ u.transpose(0, 2, 1)
        np.testing.assert_allclose(identities, np.broadcast_to(np.eye(4), a.shape), atol=1e-8)


def test_more_iterations_come_nearer():
    x, *_ = data((50, 4), -1)
    exact = array(research.decorrelated_batch_normalization(x)[0])
    errors = []
    for iterations in (3, 7, 40):
        y, *_ = research.decorrelated_batch_normalization(x, method="newton", iterations=iterations)
        errors.append(np.abs(array(y) - exact).max())
    assert errors[0] > 2 * errors[1] > 1e-3 > errors[2]


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_output_is_white(method):
    x, *_ = data((6, 5, 5, 8), -1)
    y, *_ = research.decorrelated_batch_normalization(x, group_size=4, method=method, epsilon=1e-9)
    y = array(y).reshape(-1, 2, 4)
    for g in range(2):
        np.testing.assert_allclose(np.cov(y[:, g].T, bias=True), np.eye(4), atol=1e-7)


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_groups_of_one_are_batch_normalization(method):
    x, gamma, beta, _ = data((6, 3, 4), -1)
    y, mean, covariance = research.decorrelated_batch_normalization(
        x, gamma, beta, group_size=1, method=method
    )
    theirs = functional.batch_normalization(x, gamma, beta)
    for a, b in zip((y, mean, array(covariance)[:, 0, 0]), theirs, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_whitening_with_weights(method):
    """Weights of 2 are as good as repetition; what has weight 0 may be infinite."""
    x, gamma, beta, mix = data((4, 5, 4), -1)
    weights = np.random.default_rng(0).integers(0, 3, (4, 5, 1)).astype("float64")
    options = {"method": method}
    compare(
        lambda *a: research.decorrelated_batch_normalization(
            *a, group_size=2, weights=weights, **options
        )[0],
        lambda *a: whitened(*a, size=2, weights=weights, **options)[0],
        [x, gamma, beta],
        mix,
    )
    repeated = np.repeat(x.reshape(-1, 4), weights.astype(int).ravel(), axis=0)
    poisoned = np.where(weights > 0, x, np.inf)
    results = [
        research.decorrelated_batch_normalization(v, group_size=2, weights=w, **options)[1:]
        for v, w in ((x, weights), (repeated, None), (poisoned, weights))
    ]
    for statistic in zip(*results, strict=True):
        for other in statistic[1:]:
            np.testing.assert_allclose(array(other), array(statistic[0]), rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_whitening_by_given_statistics(method):
    x, gamma, beta, mix = data((5, 3, 4), -1)
    _, mean, covariance = whitened(x, size=2, method=method)
    x = x + 1

    def expected(x, mean, covariance, gamma, beta):
        y = np.zeros_like(x + mean + covariance[0, 0, 0])
        for g in range(2):
            block = np.s_[..., 2 * g : 2 * g + 2]
            a = (covariance[g] + covariance[g].T) / 2 + 1e-3 * np.eye(2)
            y[block] = (x - mean)[block] @ MATRIX[method](a).T
        return affine(y, gamma, beta, -1)

    compare(
        lambda *a: research.whiten(*a, method=method),
        expected,
        [x, mean, covariance, gamma, beta],
        mix,
    )


@pytest.mark.parametrize("method", METHODS)
def test_large_mean_and_singular_covariance_in_float32(method):
    """A mean of 1000 beside a variance of 1 costs few digits; equal channels and constant ones
    (a covariance of rank 2, and of rank 0) give finite numbers."""
    x, *_ = data((200, 4), -1)
    x = (1000 + x - x.mean(0)).astype("float32")
    y, *_ = research.decorrelated_batch_normalization(x, method=method)
    expected, *_ = whitened(x.astype("float64"), size=4, method=method)
    np.testing.assert_allclose(array(y), expected, atol=2e-3)
    x[:, 2:] = 1e4 * x[:, :2]
    for singular in (x, np.full_like(x, 7.5)):
        _, mean, covariance = research.decorrelated_batch_normalization(singular, method=method)
        assert np.isfinite(array(mean)).all()
        assert np.isfinite(array(covariance)).all()
        y, (dx,) = value_and_gradients(
            lambda x: research.decorrelated_batch_normalization(x, method=method)[0],
            [singular],
            np.ones(x.shape),
        )
        assert np.isfinite(array(y)).all()
        assert np.abs(array(y)).max() < 1e2
        assert np.isfinite(array(dx)).all()


# Quantiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "quantiles"), [("normal", 4), ("uniform", 3)])
@pytest.mark.parametrize(("shape", "axis", "_"), few(LAYOUTS, [2]))
def test_quantiles_against_reference(shape, axis, _, target, quantiles):
    x, gamma, beta, mix = data(shape, axis)
    options = {"axis": axis, "target": target, "quantiles": quantiles, "epsilon": 1e-2}
    for output in (0, 1):
        arrays = [x, gamma, beta][: 3 - 2 * output]
        compare(
            lambda *a, o=output: research.quantile_normalization(*a, **options)[o],
            lambda *a, o=output: ranked(*a, **options)[o],
            arrays,
            mix if output == 0 else np.random.default_rng(1).normal(size=(quantiles, shape[axis])),
        )


def test_quantiles_with_a_mask():
    x, gamma, beta, mix = data((4, 5, 3), -1)
    mask = np.random.default_rng(0).random((4, 5, 1)) < 0.7
    options = {"target": "normal", "quantiles": 4, "mask": mask}
    compare(
        lambda *a: research.quantile_normalization(*a, **options)[0],
        lambda *a: ranked(*a, **options)[0],
        [x, gamma, beta],
        mix,
    )
    _, q = research.quantile_normalization(x, **options)
    subset = x.reshape(-1, 3)[mask.ravel()]
    _, of_subset = research.quantile_normalization(subset, quantiles=4)
    np.testing.assert_allclose(array(q), array(of_subset), rtol=1e-12)
    for value in (0.5, 2):  # what is not 0 counts, as in the layer
        _, of_numbers = research.quantile_normalization(x, **{**options, "mask": value * mask})
        np.testing.assert_array_equal(array(of_numbers), array(q))


@pytest.mark.parametrize("target", ["normal", "uniform"])
def test_quantiles_given(target):
    x, gamma, beta, mix = data((5, 4, 3), -1)
    q = np.sort(np.random.default_rng(1).normal(size=(5, 3)) * 3 + x.mean((0, 1)), axis=0)
    z, end = target_of(target, 5)

    def expected(x, q, gamma, beta):
        y = np.zeros_like(x + q[0])
        for c in range(x.shape[-1]):
            y[..., c] = straight_lines(x[..., c], q[:, c], z, end, 1e-3)
        return affine(y, gamma, beta, -1)

    compare(
        lambda *a: research.quantile_normalize(*a, target=target),
        expected,
        [x, q, gamma, beta],
        mix,
    )


@pytest.mark.parametrize("target", few(["normal", "uniform"], [0]))
def test_distribution_is_the_targets(target):
    """Whatever the distribution before; an outlier of a million moves nothing else."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = np.stack([np.exp(2 * rng.normal(size=4000)), rng.standard_cauchy(4000)], axis=1)
    normalized = fast(lambda x: research.quantile_normalization(x, target=target, quantiles=64)[0])
    y = normalized(x)
    theirs = stats.norm if target == "normal" else stats.uniform(-(3**0.5), 12**0.5)
    for c in range(2):
        assert stats.kstest(array(y)[:, c], theirs.cdf).statistic < 0.02
        assert stats.kstest(x[:, c], theirs.cdf).statistic > 0.1
    x[np.argmax(x[:, 0]), 0] = 1e6
    moved = normalized(x)
    change = np.sort(np.abs(array(moved) - array(y))[:, 0])
    assert change[-1] < 3
    assert change[-2] < 0.05


@pytest.mark.parametrize("dtype", few(["float16", "float32", "float64"], [1]))
def test_ties(dtype):
    """Equal elements share one value, the middle of their ranks; the gradient is bounded."""
    x = np.array([[0.0]] * 6 + [[1.0], [2.0], [3.0], [4.0]]).astype(dtype)
    mix = np.random.default_rng(0).normal(size=x.shape)
    y, (dx,) = value_and_gradients(
        lambda x: research.quantile_normalization(x, target="uniform", quantiles=10)[0], [x], mix
    )
    y = wide(y)[:, 0] / 12**0.5 + 0.5
    np.testing.assert_allclose(y[:6], 0.3, atol=1e-3)
    np.testing.assert_allclose(y[6:], [0.65, 0.75, 0.85, 0.95], atol=1e-3)
    assert np.isfinite(wide(dx)).all()
    _, q = research.quantile_normalization(x, target="uniform", quantiles=10)
    _, (slope,) = value_and_gradients(
        lambda x: research.quantile_normalize(x, q, target="uniform"), [x], np.ones(x.shape)
    )
    assert 100 < wide(slope).max() <= 1001  # 1 / epsilon
    constant = np.full((7, 2), 5.0, dtype)
    for target in ("normal", "uniform"):
        y, _ = research.quantile_normalization(constant, target=target)
        np.testing.assert_allclose(wide(y), 0, atol=1e-6)


def test_second_derivatives_of_quantiles():
    x, gamma, _, mix = data((6, 2), -1)

    def loss(x):
        y, _ = research.quantile_normalization(x, tensor(gamma), quantiles=3, epsilon=0.1)
        return ops.sum(y * y * y * tensor(mix))

    assert_second_derivative(loss, x)


# Filter responses ------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", few([5, 4, 3, 1], [0, 3]))
@pytest.mark.parametrize(("shape", "axis", "_"), few(LAYOUTS[1:], [1]))
def test_filter_response_against_reference(shape, axis, _, parameters):
    x, gamma, beta, mix = data(shape, axis)
    rng = np.random.default_rng(2)
    arrays = [x, gamma, beta, rng.normal(size=gamma.shape) / 2, rng.normal(size=gamma.shape)]
    compare(
        lambda *a: research.filter_response_normalization(*a, axis=axis, epsilon=1e-2),
        lambda *a: filter_response(*a, axis=axis, epsilon=1e-2),
        arrays[:parameters],
        mix,
    )


def test_second_derivatives_of_filter_responses():
    x, gamma, beta, mix = data((2, 3, 2), -1)

    def loss(x):
        y = research.filter_response_normalization(
            x, tensor(gamma), tensor(beta), tensor(beta - 0.1), epsilon=0.1
        )
        return ops.sum(y * y * y * tensor(mix))

    assert_second_derivative(loss, x)


# All of them ------------------------------------------------------------------------------------

FUNCTIONS = {
    "zca": lambda *a: research.decorrelated_batch_normalization(*a, group_size=2)[0],
    "cholesky": lambda *a: research.decorrelated_batch_normalization(
        *a, group_size=2, method="cholesky"
    )[0],
    "newton": lambda *a: research.decorrelated_batch_normalization(
        *a, group_size=2, method="newton"
    )[0],
    "quantile": lambda *a: research.quantile_normalization(*a, quantiles=4)[0],
    "filter": research.filter_response_normalization,
}
REFERENCES = {
    "zca": lambda *a: whitened(*a, size=2, method="zca")[0],
    "cholesky": lambda *a: whitened(*a, size=2, method="cholesky")[0],
    "newton": lambda *a: whitened(*a, size=2, method="newton")[0],
    "quantile": lambda *a: ranked(*a, target="normal", quantiles=4)[0],
    "filter": filter_response,
}
TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 2e-5, "float64": 1e-11}


@pytest.mark.parametrize("dtype", few(TOLERANCE, [0, 2]))
@pytest.mark.parametrize("name", few(FUNCTIONS, [0, 3, 4]))
def test_dtypes(name, dtype):
    """Values are those of float64, rounded once at the end; so are gradients."""
    x, gamma, beta, mix = data((3, 4, 4), -1)
    x = rounded(x, dtype)
    y, (dx, *_) = value_and_gradients(FUNCTIONS[name], [ops.cast(x, dtype), gamma, beta], mix)
    assert dtype_of(y) == dtype_of(dx) == dtype
    exact = REFERENCES[name](x, gamma, beta)
    size = np.abs(exact).max()
    np.testing.assert_allclose(wide(y), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)
    (theirs,) = complex_step(lambda x: (REFERENCES[name](x, gamma, beta) * mix).sum(), [x])
    assert relative_error(wide(dx), theirs) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", few(FUNCTIONS, [4]))
def test_compiled_as_eager(name):
    """In a graph the number of examples and positions is unknown; by XLA it is not."""
    x, gamma, beta, mix = data((3, 5, 4), -1)

    def values(x, mix):
        def loss(x, gamma, beta):
            return ops.sum(FUNCTIONS[name](x, gamma, beta) * mix)

        value, grads = gradients(loss, [x, gamma, beta])
        return [value, *grads]

    eager = values(tensor(x), tensor(mix))
    for run in compiled(values, unknown=(0, 1)):
        for a, b in zip(run(x, mix), eager, strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", few(FUNCTIONS, [0, 3, 4]))
def test_no_examples_and_one(name):
    """Of no examples nothing breaks; one element has variance 0 (but a mean square)."""
    for shape in ((0, 3, 2), (1, 1, 2)):
        x = np.ones(shape)
        y, grads = value_and_gradients(FUNCTIONS[name], [x, np.ones(2), np.ones(2)], x)
        assert tuple(y.shape) == shape
        assert all(np.isfinite(array(v)).all() for v in (y, *grads))
        if shape[0] and name != "filter":
            np.testing.assert_allclose(array(y), 1, atol=1e-9)


# The layers -------------------------------------------------------------------------------------

LAYERS = {
    "zca": lambda **k: DecorrelatedBatchNormalization(group_size=2, **k),
    "cholesky": lambda **k: DecorrelatedBatchNormalization(group_size=2, method="cholesky", **k),
    "newton": lambda **k: DecorrelatedBatchNormalization(group_size=2, method="newton", **k),
    "quantile": lambda **k: QuantileNormalization(quantiles=4, **k),
    "filter": lambda **k: FilterResponseNormalization(learn_epsilon=True, **k),
}
MOVING = ["zca", "quantile"]


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_check_of_the_layers(name):
    x = data((6, 2, 4), -1)[0]
    layer = LAYERS[name](dtype="float64", epsilon=1e-2)
    layer.build(x.shape)
    rng = np.random.default_rng(3)
    layer.set_weights([w + 0.1 * rng.random(w.shape) for w in layer.get_weights()])
    check(layer, x, samples=6).require(1e-9)
    if name in MOVING:
        check(layer, x, samples=4, training=False).require(1e-9)


@pytest.mark.parametrize("name", MOVING)
def test_moving_statistics(name):
    x = data((6, 3, 4), -1)[0].astype("float32")
    layer = LAYERS[name](momentum=0.75)
    layer.build(x.shape)
    before = [w.numpy() if hasattr(w, "numpy") else array(w) for w in layer._moving()]
    y = layer(x, training=True)
    if name == "zca":
        expected, *batch = whitened(x.astype("float64"), size=2, method="zca")
    else:
        expected, *batch = ranked(x.astype("float64"), target="normal", quantiles=4)
    np.testing.assert_allclose(array(y), expected, rtol=1e-3, atol=1e-4)
    for variable, old, new in zip(layer._moving(), before, batch, strict=True):
        np.testing.assert_allclose(array(variable), 0.75 * old + 0.25 * new, rtol=1e-4, atol=1e-5)
    # With the batch's statistics as the moving ones, inference is training.
    for variable, new in zip(layer._moving(), batch, strict=True):
        variable.assign(new)
    np.testing.assert_allclose(array(layer(x)), array(y), atol=1e-4)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("momentum", [0.9, None])
def test_no_cold_start(name, momentum):
    """The debiased average of one batch is that batch; of all, the plain average."""
    first, second = (data((8, 4), -1, seed)[0].astype("float32") for seed in (0, 1))
    layer = LAYERS[name](momentum=momentum, debiased=momentum is not None)
    seen = []
    for x in (first, second):
        layer(x, training=True)
        exact = LAYERS[name](momentum=0.0)
        exact(x, training=True)
        seen.append([array(v) for v in exact._moving()])
        if len(seen) == 1:
            for v, expected in zip(layer._moving(), seen[0], strict=True):
                np.testing.assert_allclose(array(v), expected, rtol=1e-5, atol=1e-6)
    old = 0.5 if momentum is None else 0.9 / 1.9
    for v, a, b in zip(layer._moving(), *seen, strict=True):
        np.testing.assert_allclose(array(v), old * a + (1 - old) * b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MOVING)
def test_switches(name):
    x = data((8, 4), -1)[0].astype("float32")

    def moved(layer, **options):
        layer.build(x.shape)
        before = [array(v).copy() for v in layer._moving()]
        layer(x, **options)
        return any((array(v) != b).any() for v, b in zip(layer._moving(), before, strict=True))

    assert moved(LAYERS[name](), training=True)
    assert not moved(LAYERS[name](), training=False)
    assert not moved(LAYERS[name](trainable=False), training=True)
    assert not moved(LAYERS[name](update_statistics=False), training=True)
    assert moved(LAYERS[name](use_batch_statistics=False), training=True)
    layer = LAYERS[name](use_batch_statistics=False)
    layer.build(x.shape)
    before = array(layer(x))  # by the statistics as they are before the batch moves them
    np.testing.assert_array_equal(array(layer(x, training=True)), before)
    frozen, by_batch = LAYERS[name](trainable=False), LAYERS[name](use_batch_statistics=True)
    np.testing.assert_array_equal(array(frozen(x, training=True)), array(frozen(x)))
    np.testing.assert_allclose(
        array(by_batch(x)), array(LAYERS[name]()(x, training=True)), atol=1e-6
    )
    assert np.abs(array(by_batch(x)) - array(frozen(x))).max() > 0.1


@pytest.mark.skipif(BACKEND == "torch", reason="compiles nothing")
def test_momentum_and_updates_change_after_tracing():
    x = data((8, 4), -1)[0].astype("float32")
    model = keras.Sequential([keras.Input((4,)), LAYERS["zca"](momentum=0.5)])
    layer = model.layers[0]
    model.compile("sgd", "mse")

    def step():
        before = array(layer.moving_mean).copy()
        model.fit(x, x, batch_size=8, verbose=0)
        return np.abs(array(layer.moving_mean) - before).max()

    assert step() > 0.1
    layer.update_statistics = False
    assert step() == 0
    layer.update_statistics = True
    layer.momentum = 0.0
    assert step() > 0.1
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="Received: use_batch_statistics=True"):
        layer.use_batch_statistics = True


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", few([*METHODS, "quantile"], [0, 3]))
def test_bad_batches_are_left_out(name, bad):
    x = data((8, 4), -1)[0].astype("float32")
    layer = LAYERS[name]()
    layer(x, training=True)
    before = [array(v).copy() for v in layer._moving()]
    x[2, 1] = bad
    layer(x, training=True)
    layer(x, training=True, mask=np.zeros(8, bool))
    for v, b in zip(layer._moving(), before, strict=True):
        np.testing.assert_array_equal(array(v), b)
    assert layer.skipped_batches == 2
    layer(x, training=True, mask=np.arange(8) != 2)  # masked, it does no harm
    assert layer.skipped_batches == 2
    assert all(np.isfinite(array(v)).all() for v in layer._moving())


@pytest.mark.parametrize("name", MOVING)
def test_replicas_share_their_statistics(name, monkeypatch):
    """Two replicas in step, with unequal parts of a batch, end with the statistics of both."""
    x = data((12, 4), -1)[0].astype("float32")
    parts, boxes, barrier = (x[:4], x[4:]), {}, threading.Barrier(2, timeout=60)

    def all_sum(v):
        boxes[threading.current_thread().name] = v
        barrier.wait()
        total = boxes["0"] + boxes["1"]
        barrier.wait()
        return total

    replicas = [LAYERS[name](momentum=0.0) for _ in parts]
    for layer in replicas:
        layer.build(x.shape)
    monkeypatch.setattr(distributed, "replicas", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", all_sum)
    threads = [
        threading.Thread(target=layer, args=(part,), kwargs={"training": True}, name=str(i))
        for i, (layer, part) in enumerate(zip(replicas, parts, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if name == "zca":
        expected = whitened(x.astype("float64"), size=2, method="zca")[1:]
    else:  # the mean of the quantile functions, by counts
        q = [ranked(v.astype("float64"), target="normal", quantiles=4)[1] for v in parts]
        expected = [(4 * q[0] + 8 * q[1]) / 12]
    for layer in replicas:
        for v, exact in zip(layer._moving(), expected, strict=True):
            np.testing.assert_allclose(array(v), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MOVING)
def test_keras_masks(name):
    """What `Masking` masks does not count, and the mask goes on."""
    x = data((4, 6, 4), -1)[0].astype("float32")
    x[1, 3:] = 0
    layer, other = LAYERS[name](momentum=0.0), LAYERS[name](momentum=0.0)
    y = layer(keras.layers.Masking()(x), training=True)
    mask = (x != 0).any(-1)
    np.testing.assert_array_equal(array(keras.src.backend.get_keras_mask(y)), mask)
    other(x[mask][None], training=True)
    for a, b in zip(layer._moving(), other._moving(), strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-5)
    if name == "zca":
        weighted = LAYERS[name](momentum=0.0)
        weighted(x, training=True, sample_weight=mask.astype("float32"))
        np.testing.assert_allclose(
            array(weighted.moving_covariance), array(layer.moving_covariance), rtol=1e-5
        )


@pytest.mark.parametrize("name", MAIN)
def test_fit_and_save(name, tmp_path):
    """`fit` lowers the loss; the saved model gives the same numbers, and trains on likewise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5, 4)) @ rng.normal(size=(4, 4))
    y = np.tanh(x).sum((1, 2), keepdims=True)[:, 0]
    x, y = x.astype("float32"), y.astype("float32")
    model = keras.Sequential(
        [keras.Input((None, 4)), LAYERS[name](), keras.layers.GlobalAveragePooling1D()]
        + [keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.05), "mse")
    loss = model.fit(x, y, batch_size=32, epochs=6, verbose=0).history["loss"]
    assert loss[-1] < 0.9 * loss[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is type(model.layers[0])
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for m in (model, loaded):
        m.train_on_batch(x, y)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("policy", few(["mixed_float16", "mixed_bfloat16", "float64"], [0, 2]))
def test_dtype_policies(name, policy):
    x = data((8, 3, 4), -1)[0]
    layer = LAYERS[name](dtype=policy)
    y = layer(x, training=True) if name != "filter" else layer(x)
    compute = policy.removeprefix("mixed_")
    assert dtype_of(y) == compute
    kept = "float64" if policy == "float64" else "float32"
    assert {dtype_of(w) for w in layer.weights} == {kept}
    exact = (
        filter_response(x, tau=np.zeros(4), learned=np.full(4, 1e-4))
        if name == "filter"
        else REFERENCES[name](x)
    )
    tolerance = {"float16": 2e-2, "bfloat16": 0.15, "float64": 1e-9}[compute]
    assert np.abs(wide(y) - exact).max() < tolerance
    assert np.isfinite(wide(layer(x))).all()


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (DecorrelatedBatchNormalization, {}),
        (
            DecorrelatedBatchNormalization,
            {"axis": 1, "group_size": 8, "method": "newton", "iterations": 3, "shrinkage": 0.5},
        ),
        (DecorrelatedBatchNormalization, {"momentum": None, "center": False, "group_size": -1}),
        (QuantileNormalization, {"target": "uniform", "quantiles": 5, "debiased": True}),
        (QuantileNormalization, {"use_batch_statistics": True, "update_statistics": False}),
        (FilterResponseNormalization, {}),
        (
            FilterResponseNormalization,
            {"threshold": False, "learn_epsilon": True, "beta_regularizer": "l2"},
        ),
    ],
)
def test_config_round_trip(cls, arguments):
    layer = cls(**arguments, name="norm", dtype="float64")
    config = layer.get_config()
    assert all(config[k] == v for k, v in arguments.items() if "regularizer" not in k)
    assert cls.from_config(config).get_config() == config
    layer.build((2, 32, 3, 32))
    assert layer.get_config() == config  # build changes nothing
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"keras_norm>{cls.__name__}"
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config


def test_channels_first_in_a_model_of_unknown_sizes():
    for name in MAIN:
        build = LAYERS[name]
        inputs = keras.Input((4, None, None))
        layer = build(axis=1)
        model = keras.Model(inputs, layer(inputs))
        assert model.output_shape == (None, 4, None, None)
        x = data((2, 4, 3, 5), 1)[0].astype("float32")
        last = build()
        last.build((None, None, None, 4))
        last.set_weights(layer.get_weights())
        expected = np.moveaxis(array(last(np.moveaxis(x, 1, -1))), -1, 1)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-4, err_msg=name)


def test_order_of_weights():
    layer = DecorrelatedBatchNormalization(momentum=None)
    layer.build((None, 32))
    names = ["gamma", "beta", "moving_mean", "moving_covariance", "moving_count"]
    assert [w.name for w in layer.weights] == names
    assert [tuple(w.shape) for w in layer.weights][2:] == [(32,), (2, 16, 16), ()]
    layer = QuantileNormalization()
    layer.build((None, 3))
    assert [tuple(w.shape) for w in layer.weights] == [(3,), (3,), (16, 3)]
    assert len(layer.trainable_weights) == 2


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DecorrelatedBatchNormalization, {"group_size": 2, "method": "newton", "iterations": 3}),
        (QuantileNormalization, {"quantiles": 4}),
    ],
)
def test_integers_of_numpy(cls, options):
    """As sizes of a search's space come: the same numbers, in a configuration that JSON holds."""
    sizes = {k: np.int64(v) if isinstance(v, int) else v for k, v in options.items()}
    layer, x = cls(**sizes), np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    assert json.loads(json.dumps(layer.get_config())).items() >= options.items()
    y = layer(x, training=True)
    assert dtype_of(y) == "float32"
    np.testing.assert_array_equal(array(y), array(cls(**options)(x, training=True)))


def test_quantiles_of_numpy_keep_the_dtype():
    x = np.random.default_rng(0).normal(size=(16, 2)).astype("float32")
    y, q = research.quantile_normalization(x, quantiles=np.int64(4))
    same, _ = research.quantile_normalization(x, quantiles=4)
    assert (dtype_of(y), dtype_of(q)) == ("float32", "float32")
    np.testing.assert_array_equal(array(y), array(same))


# Errors ------------------------------------------------------------------------------------------


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "pca"}, "Received: method='pca'"),
            ({"epsilon": 0}, "Received: epsilon=0"),
            ({"epsilon": "1e-3"}, "a number > 0.*Received: epsilon='1e-3'"),
            ({"epsilon": True}, "Received: epsilon=True"),
            ({"shrinkage": 1.5}, "Received: shrinkage=1.5"),
            ({"shrinkage": "0.1"}, "Received: shrinkage='0.1'"),
            ({"shrinkage": False}, "Received: shrinkage=False"),
            ({"iterations": 0}, "Received: iterations=0"),
            ({"iterations": True}, "Received: iterations=True"),
            ({"group_size": 0}, "Received: group_size=0"),
            ({"group_size": 2.0}, "Received: group_size=2.0"),
            ({"momentum": 2}, "Received: momentum=2"),
            ({"update_statistics": None}, "Received: update_statistics=None"),
            ({"use_batch_statistics": 1}, "Received: use_batch_statistics=1"),
            ({"dtype": "int32"}, "Received: dtype='int32'"),
        ],
    )
    def test_decorrelated(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DecorrelatedBatchNormalization(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"target": "cauchy"}, "Received: target='cauchy'"),
            ({"quantiles": 1}, "Received: quantiles=1"),
            ({"quantiles": 4.0}, "Received: quantiles=4.0"),
            ({"epsilon": 0}, "Received: epsilon=0"),
            ({"epsilon": "1e-3"}, "a number > 0. Received: epsilon='1e-3'"),
            ({"epsilon": True}, "Received: epsilon=True"),
            ({"momentum": -0.1}, "Received: momentum=-0.1"),
        ],
    )
    def test_quantile(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            QuantileNormalization(**arguments)

    def test_statistics_of_other_channels(self):
        with pytest.raises(ValueError, match=r"Received: mean\.shape=\(2,\), channels=4"):
            research.whiten(np.ones((3, 4)), np.zeros(2), np.ones((2, 2, 2)))
        with pytest.raises(
            ValueError, match=r"Received: covariance\.shape=\(1, 2, 2\), channels=4"
        ):
            research.whiten(np.ones((3, 4)), np.zeros(4), np.ones((1, 2, 2)))

    def test_groups_that_do_not_divide_the_channels(self):
        with pytest.raises(ValueError, match=r"Received: group_size=4, channels=6.*\[1, 2, 3, 6\]"):
            DecorrelatedBatchNormalization(group_size=4).build((None, 6))

    @pytest.mark.parametrize("name", LAYERS)
    def test_shapes(self, name):
        for axis in (0, 3, -3, 1.0):
            with pytest.raises(ValueError, match=r"`axis` must be .*Received: axis="):
                LAYERS[name](axis=axis).build((2, 5, 4))
        with pytest.raises(ValueError, match=r"should have a defined dimension.*\(2, 5, None\)"):
            LAYERS[name]().build((2, 5, None))
        layer = LAYERS[name]()
        layer.build((None, 5, 4))
        for shape in ((2, 5, 6), (2, 3, 3, 4)):
            with pytest.raises(ValueError, match="incompatible with the layer"):
                layer(np.ones(shape, "float32"))

    def test_no_positions(self):
        with pytest.raises(ValueError, match="an input of 2 dimensions"):
            FilterResponseNormalization().build((None, 4))

    @pytest.mark.parametrize("name", MOVING)
    def test_masks(self, name):
        x = np.ones((4, 5, 4), "float32")
        with pytest.raises(ValueError, match=r"the same for all channels.*\(4, 5, 4\)"):
            LAYERS[name]()(x, training=True, mask=np.ones((4, 5, 4), bool))
        with pytest.raises(ValueError, match=r"`mask` must broadcast.*mask.shape=\(3,\)"):
            LAYERS[name]()(x, training=True, mask=np.ones(3, bool))

    def test_given_statistics(self):
        x = np.ones((3, 4))
        with pytest.raises(ValueError, match=r"covariance.shape=\(1, 3, 3\), channels=4"):
            research.whiten(x, np.ones(4), np.ones((1, 3, 3)))
        with pytest.raises(ValueError, match=r"q.shape=\(5, 3\), channels=4"):
            research.quantile_normalize(x, np.ones((5, 3)))

    def test_integers(self):
        with pytest.raises(ValueError, match=r"Received: x\.dtype=int32"):
            research.decorrelated_batch_normalization(np.ones((3, 4), "int32"))

    def test_momentum_none_too_late(self):
        layer = QuantileNormalization()
        layer.build((None, 3))
        with pytest.raises(ValueError, match="Received: momentum=None"):
            layer.momentum = None


def test_found_among_the_layers():
    from keras_norm import layers

    assert layers.FilterResponseNormalization is FilterResponseNormalization
    assert not hasattr(layers, "whiten")  # a function

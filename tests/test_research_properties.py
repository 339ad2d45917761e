"""The research layers, whatever the rank, axis, dtype, ...: as NumPy in float64.

Tolerances. With e the rounding of the dtype the layer computes in (float32, or float64), d that
of the dtype of its outputs, and k = max |gamma| max(1, |x|) slope, by which both magnify, where
slope is the steepest that the layer can be (1 / sqrt(epsilon), of quantiles 1 / epsilon):

    outputs      64 e k + 2 d (1 + |y|)
    gradients    64 e k^2 ||dy|| + 4 d ||gradient||
    statistics   16 e (1 + max |x|^2)

where e = 1.2e-7 or 2.2e-16, and d = 9.8e-4 (float16), 7.8e-3 (bfloat16), or e.
"""

import keras
import numpy as np
import pytest
from arrays import ROUNDING, dtype_of, rounded, wide
from differentiation import step_in_training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops
from reference import complex_step
from reference_research import filter_response, ranked, whitened

from keras_norm.research import (
    DecorrelatedBatchNormalization,
    FilterResponseNormalization,
    QuantileNormalization,
)

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
# JAX compiles anew for every shape, which takes seconds; test_research.py has fixed ones.
DTYPES = ["float32"] if BACKEND == "jax" else list(ROUNDING)
OPTIONS = {
    "max_examples": {"tensorflow": 3, "jax": 1, "torch": 10}[BACKEND],
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}


@st.composite
def cases(draw, lowest=2):
    """Shape, axis, and the arguments that all of the layers have."""
    rank = draw(st.integers(lowest, 5), label="rank")
    shape = [draw(st.sampled_from([2, 4])), *(draw(st.integers(1, 2)) for _ in range(rank - 1))]
    axis = draw(st.integers(1, rank - 1), label="axis")
    shape[axis] = draw(st.sampled_from([4, 3, 1]), label="channels")
    axis = draw(st.sampled_from([axis, axis - rank]))
    return tuple(shape), axis, {n: draw(st.booleans(), label=n) for n in ("center", "scale")}


@st.composite
def of_batches(draw, weighted):
    """The momentum, and of which rank mask and weights are: 1, that of the inputs, or 0 for none.

    At first those of no mask, no weights.
    """
    momentum = draw(st.sampled_from([0.5, None, 0.0, 0.99]), label="momentum")
    ranks = {n: draw(st.integers(0, 2)) for n in ("mask", "sample_weight")[: 1 + weighted]}
    return momentum, ranks


def given_weights(ranks, shape, axis, rng):
    """The arguments of the call, and the weights they amount to; the first element has some."""
    arguments, weights = {}, None
    for name, rank in ranks.items():
        if rank == 0:
            continue
        sizes = [1 if a == axis % len(shape) else n for a, n in enumerate(shape)]
        value = rng.random(shape[:1] if rank == 1 else sizes)
        value = value < 0.7 if name == "mask" else np.round(value * 8) / 8
        value.flat[0] = True
        arguments[name] = value
        value = value.reshape(value.shape + (1,) * (len(shape) - value.ndim))
        weights = value if weights is None else weights * value
    return arguments, weights


def compare(layer, dtype, x, definition, slope, moving=(), arguments=None):
    """With definition(x, gamma, beta, ...) -> y, or y and the statistics of the batch."""
    arguments, rng = arguments or {}, np.random.default_rng(x.size)
    mix = rounded(rng.normal(size=x.shape), dtype)
    layer.build(x.shape)
    variables = layer.trainable_variables
    values = [rounded(rng.normal(1, 0.5, v.shape), dtype) for v in variables]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    names = "gamma", "beta", "tau", "learned_epsilon"
    places = [next(i for i, n in enumerate(names) if getattr(layer, n, 0) is v) for v in variables]

    def of(x, *values):
        at = dict(zip(places, values, strict=True))
        result = definition(x, *(at.get(i) for i in range(4 if not moving else 2)))
        return result if isinstance(result, tuple) else (result,)

    before = [wide(v) for v in moving()] if moving else []
    y, slopes = step_in_training(layer, ops.cast(x, dtype), mix, **arguments)
    expected, *batch = of(x, *values)
    e, d = ROUNDING["float64" if dtype == "float64" else "float32"], ROUNDING[dtype]
    gamma = np.abs(values[places.index(0)]).max() if 0 in places else 1
    k = max(1, gamma) * max(1, np.abs(x).max()) * slope
    assert dtype_of(y) == dtype_of(slopes[0]) == dtype
    assert (np.abs(wide(y) - expected) <= 64 * e * k + 2 * d * (1 + np.abs(expected))).all()

    exact = complex_step(lambda *point: (of(*point)[0] * mix).sum(), [x, *values])
    for ours, theirs in zip(slopes, exact, strict=True):
        bound = 64 * e * k**2 * np.linalg.norm(mix) + 4 * d * np.linalg.norm(theirs)
        assert np.linalg.norm(wide(ours) - theirs) <= bound

    # The moving statistics, after this batch and after a second one, of twice its size.
    for factor, average in ((1, 0.0), (2, 0.5)) if moving else ():
        if factor == 2:
            step_in_training(layer, ops.cast(2 * x, dtype), mix, **arguments)
            batch = of(2 * x, *values)[1:]
        keep = average if layer.momentum is None else layer.momentum
        before = [keep * old + (1 - keep) * new for old, new in zip(before, batch, strict=True)]
        for variable, exact in zip(moving(), before, strict=True):
            bound = 16 * e * (1 + np.abs(factor * x).max() ** 2)
            assert (np.abs(wide(variable) - exact) <= bound).all()
    assert not moving or layer.skipped_batches == 0


@pytest.mark.parametrize("dtype", DTYPES)
@settings(**OPTIONS)
@given(
    case=cases(),
    batches=of_batches(weighted=True),
    method=st.sampled_from(["zca", "newton", "cholesky"]),
    single=st.booleans(),
    shrinkage=st.sampled_from([0.0, 0.2]),
)
def test_decorrelated(dtype, case, batches, method, single, shrinkage):
    (shape, axis, affine), (momentum, ranks) = case, batches
    rng = np.random.default_rng(sum(shape))
    x = rounded(rng.normal(size=shape) + 1, dtype)
    arguments, weights = given_weights(ranks, shape, axis, rng)
    size = 1 if single else {4: 2, 3: 3, 1: 1}[shape[axis]]
    options = {"axis": axis, "method": method, "epsilon": 0.1, "shrinkage": shrinkage}
    layer = DecorrelatedBatchNormalization(
        **options, **affine, group_size=size, momentum=momentum, dtype=dtype
    )

    def definition(x, gamma, beta):
        return whitened(x, gamma, beta, **options, size=size, weights=weights)

    compare(layer, dtype, x, definition, 0.1**-0.5, layer._moving, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(**OPTIONS)
@given(
    case=cases(),
    batches=of_batches(weighted=False),
    target=st.sampled_from(["normal", "uniform"]),
    quantiles=st.sampled_from([3, 2, 5]),
)
def test_quantile(dtype, case, batches, target, quantiles):
    (shape, axis, affine), (momentum, ranks) = case, batches
    rng = np.random.default_rng(sum(shape))
    # No two elements of a channel are equal, in any dtype: their order is their gradient's.
    n, channels = np.prod(shape) // shape[axis], shape[axis]
    x = np.stack([rng.permutation(np.arange(-127, 128))[:n] / 32 for _ in range(channels)], -1)
    x = np.moveaxis(x.reshape([*np.delete(shape, axis), channels]), -1, axis)
    arguments, mask = given_weights(ranks, shape, axis, rng)
    options = {"axis": axis, "target": target, "quantiles": quantiles, "epsilon": 0.1}
    layer = QuantileNormalization(**options, **affine, momentum=momentum, dtype=dtype)

    def definition(x, gamma, beta):
        return ranked(x, gamma, beta, **options, mask=mask)

    compare(layer, dtype, x, definition, 10, layer._moving, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(**OPTIONS)
@given(case=cases(lowest=3), threshold=st.booleans(), learned=st.booleans())
def test_filter_response(dtype, case, threshold, learned):
    shape, axis, affine = case
    x = rounded(np.random.default_rng(sum(shape)).normal(size=shape) + 1, dtype)
    options = {"axis": axis, "epsilon": 0.01}
    layer = FilterResponseNormalization(
        **options, **affine, threshold=threshold, learn_epsilon=learned, dtype=dtype
    )
    compare(layer, dtype, x, lambda x, *values: filter_response(x, *values, **options), 10)

"""Whatever the rank, axis, dtype, mask, weights, momentum, center and scale: as NumPy in float64.

Batch normalization, and its spatial face, for which ranks 3 to 5 and `data_format` are drawn.

Tolerances. With e the rounding of the dtype the layer computes in (float32, or float64), d that
of the dtype of its outputs, and k = max |gamma| inv_std max(1, |x|), by which both magnify:

    outputs      64 e k + 2 d (1 + |y|)
    gradients    64 e k^2 ||dy|| + 4 d ||gradient||
    statistics   16 e (1 + |statistic|)

where e = 1.2e-7 or 2.2e-16, and d = 9.8e-4 (float16), 7.8e-3 (bfloat16), or e.
"""

import keras
import numpy as np
import pytest
import reference
from arrays import ROUNDING, rounded, wide
from differentiation import step_in_training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops
from reference import complex_step

from keras_norm.layers import BatchNormalization, SpatialBatchNormalization

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
# JAX compiles anew for every shape.
EXAMPLES = {"tensorflow": 20, "jax": 5, "torch": 40}[BACKEND]
SPATIAL_EXAMPLES = {"tensorflow": 2, "jax": 1, "torch": 10}[BACKEND]
EPSILON = 1e-3


@st.composite
def cases(draw, spatial=False):
    rank = draw(st.integers(3 if spatial else 2, 5), label="rank")
    shape = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(rank - 1))
    shape = (draw(st.sampled_from([1, 2, 5])), *shape)
    axes = st.sampled_from([1, -1]) if spatial else st.integers(-rank, rank - 1)
    axis = draw(axes, label="axis")
    weights = {}
    if draw(st.booleans(), label="mask"):
        weights["mask"] = draw(st.sampled_from([1, rank - 1, rank]))
    if draw(st.booleans(), label="sample_weight"):
        weights["sample_weight"] = draw(st.sampled_from([1, rank]))
    momentum = draw(st.sampled_from([None, 0.0, 0.5, 0.99]), label="momentum")
    center, scale = draw(st.booleans(), label="center"), draw(st.booleans(), label="scale")
    return shape, axis, weights, {"momentum": momentum, "center": center, "scale": scale}


def given_weights(ranks, shape, rng):
    """The arguments of the call, and the weights that they amount to, of the rank of x."""
    arguments, weights = {}, np.ones((1,) * len(shape))
    for name, rank in ranks.items():
        value = rng.random(shape[:rank])
        # Of what every dtype holds, or float16 would round the weights on their way in.
        value = value < 0.7 if name == "mask" else np.round(value * 8) / 8
        arguments[name] = value
        weights = weights * value.reshape(value.shape + (1,) * (len(shape) - rank))
    return arguments, (weights if ranks else None)


OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}


@pytest.mark.parametrize("dtype", ROUNDING)
@settings(max_examples=EXAMPLES, **OPTIONS)
@given(case=cases())
def test_as_the_definition(dtype, case):
    _, axis, _, arguments = case
    layer = BatchNormalization(axis=axis, dtype=dtype, epsilon=EPSILON, **arguments)
    compare(layer, dtype, *case, others=True)


@pytest.mark.parametrize("dtype", ["float32"] if BACKEND == "jax" else ROUNDING)
@settings(max_examples=SPATIAL_EXAMPLES, **OPTIONS)
@given(case=cases(spatial=True))
def test_spatial_as_the_definition(dtype, case):
    _, axis, _, arguments = case
    layout = "channels_first" if axis == 1 else "channels_last"
    layer = SpatialBatchNormalization(layout, dtype=dtype, epsilon=EPSILON, **arguments)
    compare(layer, dtype, *case)


def compare(layer, dtype, shape, axis, ranks, arguments, others=False):
    """Outputs, statistics of two batches, gradients of one; and outputs of others' layers."""
    rng = np.random.default_rng(sum(shape) + 10 * len(shape))
    channels = shape[axis]
    x = rounded(rng.normal(size=shape) * 2 + 3, dtype)
    mix = rounded(rng.normal(size=shape), dtype)
    given, weights = given_weights(ranks, shape, rng)
    layer.build(shape)
    parameters = {}
    for name in [v.name for v in layer.trainable_variables]:
        parameters[name] = rounded(rng.normal(1, 0.5, channels), dtype)
        getattr(layer, name).assign(parameters[name])

    def definition(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return reference.batch_norm(x, axis=axis, epsilon=EPSILON, weights=weights, **named)

    expected, mean, variance = definition(x, *parameters.values())
    *_, total = reference.batch_moments(x, axis=axis, weights=weights)
    y, analytic = step_in_training(layer, ops.cast(x, dtype), mix, **given)
    e, d = ROUNDING["float64" if dtype == "float64" else "float32"], ROUNDING[dtype]
    gamma = np.abs(parameters.get("gamma", np.ones(1))).max()
    k = gamma * max(1, np.abs(x).max()) / np.sqrt(variance.min() + EPSILON)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert (np.abs(wide(y) - expected) <= 64 * e * k + 2 * d * (1 + np.abs(expected))).all()

    # Statistics, after this batch and after a second one, of twice its size.
    momentum = arguments["momentum"]
    moved = total > 0
    moving = {"moving_mean": np.zeros(channels), "moving_variance": np.ones(channels)}
    for factor, average in ((1, 0.0), (2, 0.5)):
        if factor == 2:
            step_in_training(layer, ops.cast(x * factor, dtype), mix, **given)
        keep = average if momentum is None else momentum
        for name, of_batch in (("moving_mean", mean), ("moving_variance", variance)):
            size = factor if name == "moving_mean" else factor**2
            value = keep * moving[name] + (1 - keep) * of_batch * size
            moving[name] = np.where(moved, value, moving[name])
            error = np.abs(wide(getattr(layer, name)) - moving[name])
            assert (error <= 16 * e * (1 + np.abs(moving[name]))).all()
    assert layer.skipped_batches == (0 if moved.any() else 2)

    # Gradients.
    point = [x, *parameters.values()]
    numerical = complex_step(lambda *point: (definition(*point)[0] * mix).sum(), point)
    for ours, theirs in zip(analytic, numerical, strict=True):
        bound = 64 * e * k**2 * np.linalg.norm(mix) + 4 * d * np.linalg.norm(theirs)
        assert np.linalg.norm(wide(ours) - theirs) <= bound

    if others and not given and momentum is not None:
        as_others(layer, x, dtype, expected, axis, parameters, 64 * e * k, d)


def as_others(layer, x, dtype, expected, axis, parameters, compute, d):
    """Keras's own layer, and PyTorch's function where it runs, give the same outputs."""
    names = "axis", "momentum", "center", "scale", "epsilon"
    theirs = keras.layers.BatchNormalization(**{n: getattr(layer, n) for n in names}, dtype=dtype)
    theirs.build(x.shape)
    theirs.set_weights(layer.get_weights())
    # On JAX and PyTorch Keras's own layer computes float64 in float32.
    in_float32 = dtype == "float64" and BACKEND != "tensorflow"
    compute = compute * 2.0**29 if in_float32 else compute
    y = wide(step_in_training(theirs, ops.cast(x, dtype), np.zeros(x.shape))[0])
    assert (np.abs(y - expected) <= compute + 2 * d * (1 + np.abs(expected))).all()
    if BACKEND == "torch" and dtype in ("float32", "float64") and x.size > x.shape[axis]:
        import torch

        gamma, beta = (
            None if n not in parameters else torch.tensor(parameters[n]) for n in ("gamma", "beta")
        )
        y = torch.nn.functional.batch_norm(
            torch.tensor(x).movedim(axis, 1), None, None, gamma, beta, True, 0.1, EPSILON
        )
        y = y.movedim(1, axis).numpy()
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)

"""The mathematics of normalization: forward and hand-derived backward passes of arrays.

Everything here is a pure function written with `keras.ops`; the same lines run on
TensorFlow (eagerly, in graphs, under XLA), JAX and PyTorch. Each normalization comes as

* a public function with its hand-derived gradient attached (`batch_normalization`),
* its two halves (`batch_normalization_forward`, `batch_normalization_backward`), and
* where it teaches something, the backward pass once more as a walk through the computation
  graph, node by node (`batch_normalization_backward_by_graph`).

Batch normalization, with channels c on `axis` and the set R of all other positions,
N = |R|, non-negative weights w that default to 1, and W = sum w:

    (B1)  mean     = sum w x / W
    (B2)  variance = sum w (x - mean)^2 / W
    (B3)  inv_std  = 1 / sqrt(variance + epsilon)
    (B4)  x_hat    = (x - mean) inv_std
    (B5)  y        = gamma x_hat + beta

and backward, where dy is the gradient of the loss with respect to y, and dmean, dvariance
those with respect to the first two outputs (zero where the loss does not use them):

    (B6)  dbeta    = sum dy
    (B7)  dgamma   = sum dy x_hat
    (B8)  a        = dmean - gamma inv_std dbeta             (all that reaches the mean)
    (B9)  b        = dvariance - gamma inv_std^2 dgamma / 2  (all that reaches the variance)
    (B10) dx       = gamma inv_std dy + (w / W) (a + 2 b (x - mean))

(B10) is the whole chain rule: the variance does not move with the mean, because
sum w (x - mean) = 0. For w = 1 and a loss of y alone it is the formula of the course,
dx = gamma inv_std / N (N dy - dbeta - x_hat dgamma).

Reference: Ioffe and Szegedy, 2015, Batch Normalization: Accelerating Deep Network Training
by Reducing Internal Covariate Shift, section 3, algorithm 1; the backward pass derived here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_norm.autodiff import custom_vjp

__all__ = [
    "batch_normalization",
    "batch_normalization_backward",
    "batch_normalization_backward_by_graph",
    "batch_normalization_forward",
    "moments",
    "normalize",
]

Array = Any
Axis = int | Sequence[int]


# Shapes and dtypes ---------------------------------------------------------------------------


def canonical_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes as sorted, non-negative, distinct integers.

    Raises:
        ValueError: for an axis outside the array, or given twice, or none at all.

    Example:
        >>> canonical_axes((-1, 1), ndim=4)
        (1, 3)
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    valid = all(isinstance(a, int) and -ndim <= a < ndim for a in axes)
    canonical = tuple(sorted(a % ndim for a in axes)) if valid and axes else ()
    if not canonical or len(set(canonical)) < len(canonical):
        raise ValueError(
            f"`axis` must be one or several different axes of the input, from {-ndim} to "
            f"{ndim - 1} for its {ndim} dimensions. Received: axis={axis!r}. For images with "
            "channels last use axis=-1, with channels first axis=1."
        )
    return canonical


def compute_dtype(x: Array) -> str:
    """The dtype in which statistics are accumulated: that of x, and at least float32."""
    return str(keras.backend.result_type(x.dtype, "float32"))


class _Layout(NamedTuple):
    """Where the channels of x are, and how a vector of channels is laid along them."""

    shape: tuple[Any, ...]
    channels: tuple[int, ...]  # axes that keep their own statistics
    reduced: tuple[int, ...]  # axes over which the statistics are taken

    @classmethod
    def of(cls, x: Array, axis: Axis) -> "_Layout":
        channels = canonical_axes(axis, len(x.shape))
        reduced = tuple(a for a in range(len(x.shape)) if a not in channels)
        return cls(tuple(ops.shape(x)), channels, reduced)

    def expand(self, v: Array) -> Array:
        """A vector (C,) as an array that broadcasts against x: (1, 1, 1, C) for images."""
        shape = [self.shape[a] if a in self.channels else 1 for a in range(len(self.shape))]
        return ops.reshape(v, shape)

    def sum(self, x: Array) -> Array:
        return ops.sum(x, axis=self.reduced)  # (N, H, W, C) -> (C,)

    def share(self, weights: Array | None, dtype: str) -> Array:
        """w / W: the part that each element has in the mean; 0 where nothing has a weight.

        1 / N, a scalar, without weights; else of a shape that broadcasts against x.
        """
        if weights is None:
            n = math.prod(self.shape[a] for a in self.reduced)
            return 1 / max(n, 1) if isinstance(n, int) else 1 / ops.maximum(ops.cast(n, dtype), 1)
        w = ops.cast(weights, dtype)
        total = self.sum(ops.broadcast_to(w, self.shape))
        return w / self.expand(ops.where(total > 0, total, ops.ones_like(total)))


def check_epsilon(epsilon: float) -> None:
    if not epsilon >= 0:
        raise ValueError(
            "`epsilon` is added to the variance under a square root and must be >= 0. "
            f"Received: epsilon={epsilon}. The default is 1e-3."
        )


def _zero_where_not_finite(x: Array) -> Array:
    return ops.where(ops.isfinite(x), x, ops.zeros_like(x))


# The mean and the variance -------------------------------------------------------------------


def _moments(x: Array, layout: _Layout, weights: Array | None) -> tuple[Array, Array]:
    """(B1) and (B2) of x in its compute dtype; see `batch_normalization` for the numerics."""
    share = layout.share(weights, x.dtype)

    def mean_of(v: Array) -> Array:
        # What has no weight must not count even if it is infinite: 0 * inf is NaN.
        return layout.sum(v * share if weights is None else ops.where(share > 0, v * share, 0))

    first = mean_of(x)
    centered = x - layout.expand(first)
    rest = mean_of(centered)  # what rounding left over: of the order of eps * |mean|
    mean = first + rest  # (B1)
    variance = ops.maximum(mean_of(centered * centered) - rest * rest, 0)  # (B2)
    return mean, variance


def moments(x: Array, *, axis: Axis = -1, weights: Array | None = None) -> tuple[Array, Array]:
    """The mean and the biased variance of every channel, equations (B1) and (B2).

    Args:
        x: array of any rank >= 1, of a floating dtype.
        axis: the axis, or axes, that keep their own statistics. Default: the last.
        weights: as in `batch_normalization`.

    Returns:
        (mean, variance), each (C,), in at least float32; both differentiable.

    Raises:
        ValueError: for an axis that x does not have.

    Example:
        >>> mean, variance = moments(np.array([[1.0, 10.0], [3.0, 50.0]], "float32"))
        >>> print(np.asarray(mean).tolist(), np.asarray(variance).tolist())
        [2.0, 30.0] [1.0, 400.0]
    """

    def forward(x: Array, weights: Array | None) -> tuple[Any, Any]:
        layout = _Layout.of(x, axis)
        mean, variance = _moments(ops.cast(x, compute_dtype(x)), layout, weights)
        return (mean, variance), (x, mean, weights)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, None]:
        x, mean, weights = residuals
        layout = _Layout.of(x, axis)
        return _moments_backward(x, mean, weights, layout, *upstream), None

    mean, variance = custom_vjp(forward, backward, x, weights)
    return mean, variance


def _moments_backward(
    x: Array, mean: Array, weights: Array | None, layout: _Layout, a: Array, b: Array
) -> Array:
    """The second half of (B10): (w / W) (a + 2 b (x - mean))."""
    centered = ops.cast(x, mean.dtype) - layout.expand(mean)
    if weights is not None:
        centered = _zero_where_not_finite(centered)
    share = layout.share(weights, mean.dtype)
    if weights is None:  # two small products instead of a sweep over x
        return layout.expand(a * share) + layout.expand(2 * b * share) * centered
    return share * (layout.expand(a) + layout.expand(2 * b) * centered)


# Batch normalization -------------------------------------------------------------------------


def batch_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    weights: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Normalizes x by the mean and variance of the batch itself, equations (B1) to (B10).

    Args:
        x: array of any rank >= 1, of a floating dtype; (N, C) or (N, H, W, C), for example.
        gamma: scale, of the shape of the channels, (C,). Default: none, a factor of 1.
        beta: offset, likewise. Default: none, 0.
        axis: the axis, or axes, that keep their own statistics. Default: the last.
        epsilon: added to the variance, under the square root; >= 0. Default: 1e-3, as in Keras.
        weights: how much every element counts in the mean and the variance: numbers >= 0 or
            booleans, of any shape that broadcasts to that of x. Every element is normalized,
            whatever its weight; what has weight 0 may be infinite or NaN. They are constants:
            no gradient flows into them. Default: all count alike.

    Returns:
        (y, mean, variance): y of the shape and dtype of x; the mean and the biased variance of
        the batch (divided by the sum of weights), each (C,), in at least float32. All three are
        differentiable. Channels without any weight have mean 0 and variance 0, and so have
        those of an empty batch; one element per channel has variance 0, so that y is beta.

    Raises:
        ValueError: for an axis that x does not have, or a negative epsilon.

    Numerics:
        Accumulated in float32, or float64 if x is float64. The mean is taken twice, the second
        time of x - mean, and the variance of x - mean (never as E[x^2] - E[x]^2), so that a mean
        of 1000 beside a variance of 1 costs no digit. Gradients are within 1e-9 of numerical
        ones in float64, as ||a - b|| / (||a|| + ||b||).

    Example:
        >>> x = np.array([[1.0, 10.0], [3.0, 50.0]], "float32")
        >>> y, mean, variance = batch_normalization(x, epsilon=0.0)
        >>> print(np.asarray(y).tolist(), np.asarray(mean).tolist(), np.asarray(variance).tolist())
        [[-1.0, -1.0], [1.0, 1.0]] [2.0, 30.0] [1.0, 400.0]

    Reference:
        Ioffe and Szegedy, 2015, algorithm 1.
    """
    check_epsilon(epsilon)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        return batch_normalization_forward(*arrays, axis=axis, epsilon=epsilon)

    def backward(residuals: Any, upstream: Any) -> tuple[Array | None, ...]:
        return *batch_normalization_backward(*upstream, *residuals, axis=axis), None

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta, weights)
    return y, mean, variance


def batch_normalization_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    weights: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
) -> tuple[tuple[Array, Array, Array], tuple[Array | None, ...]]:
    """The forward half of `batch_normalization`.

    Args: as `batch_normalization`.

    Returns:
        (y, mean, variance) and the residuals (x, mean, inv_std, gamma, weights): of the size of
        x nothing but x itself is kept for the backward pass.
    """
    layout = _Layout.of(x, axis)
    x_ = ops.cast(x, compute_dtype(x))
    mean, variance = _moments(x_, layout, weights)  # (B1) (B2)
    y, inv_std = _normalize(x_, mean, variance, gamma, beta, layout, epsilon)
    return (ops.cast(y, x.dtype), mean, variance), (x, mean, inv_std, gamma, weights)


def _normalize(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    layout: _Layout,
    epsilon: float,
) -> tuple[Array, Array]:
    inv_std = ops.rsqrt(variance + epsilon)  # (B3)
    scale = inv_std if gamma is None else inv_std * ops.cast(gamma, x.dtype)
    y = (x - layout.expand(mean)) * layout.expand(scale)  # (B4) (B5)
    return (y if beta is None else y + layout.expand(ops.cast(beta, x.dtype))), inv_std


def batch_normalization_backward(
    dy: Array,
    dmean: Array,
    dvariance: Array,
    x: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None = None,
    weights: Array | None = None,
    *,
    axis: Axis = -1,
) -> tuple[Array, Array, Array]:
    """The backward half of `batch_normalization`, in its simplified form.

    Args:
        dy: gradient of the loss with respect to y, of its shape.
        dmean, dvariance: gradients with respect to the batch's mean and variance, (C,); 0 where
            the loss uses only y.
        x, mean, inv_std, gamma, weights: the residuals of the forward half.
        axis: as there.

    Returns:
        (dx, dgamma, dbeta): dx of the shape of x, the others (C,), all in the compute dtype.
    """
    layout = _Layout.of(x, axis)
    dx, dgamma, dbeta, scale = _normalize_backward(dy, x, mean, inv_std, gamma, weights, layout)
    a = dmean - scale * dbeta  # (B8)
    b = dvariance - scale * inv_std * dgamma / 2  # (B9)
    return dx + _moments_backward(x, mean, weights, layout, a, b), dgamma, dbeta  # (B10)


def _normalize_backward(
    dy: Array,
    x: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None,
    weights: Array | None,
    layout: _Layout,
) -> tuple[Array, Array, Array, Array]:
    """With the mean and the variance held fixed: dx, dgamma, dbeta, and gamma inv_std."""
    dtype = mean.dtype
    dy = ops.cast(dy, dtype)
    centered = ops.cast(x, dtype) - layout.expand(mean)
    if weights is not None:
        centered = _zero_where_not_finite(centered)
    dbeta = layout.sum(dy)  # (B6)
    dgamma = layout.sum(dy * centered) * inv_std  # (B7)
    scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
    return dy * layout.expand(scale), dgamma, dbeta, scale


def batch_normalization_backward_by_graph(
    dy: Array,
    x: Array,
    gamma: Array,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
) -> tuple[Array, Array, Array]:
    """The same gradient, one node of the computation graph at a time.

    For reading, and for testing `batch_normalization_backward`, which gives the same numbers
    with half of the sweeps over x. Forward, each node uses the one before:

        (G1) mean = sum x / N        (G5) std     = sqrt(variance + epsilon)
        (G2) centered = x - mean     (G6) inv_std = 1 / std
        (G3) squared = centered^2    (G7) x_hat   = centered inv_std
        (G4) variance = sum squared / N        (G8) y = gamma x_hat + beta

    Args:
        dy: gradient of the loss with respect to y, of its shape.
        x: the input of the forward pass.
        gamma: scale, (C,).
        axis, epsilon: as in `batch_normalization`.

    Returns:
        (dx, dgamma, dbeta).
    """
    layout = _Layout.of(x, axis)
    share = layout.share(None, x.dtype)  # 1 / N

    # Forward: (N, ..., C) or (C,) at every node.
    mean = layout.sum(x) * share  # (G1)
    centered = x - layout.expand(mean)  # (G2)
    squared = centered * centered  # (G3)
    variance = layout.sum(squared) * share  # (G4)
    std = ops.sqrt(variance + epsilon)  # (G5)
    inv_std = 1 / std  # (G6)
    x_hat = centered * layout.expand(inv_std)  # (G7)

    # Backward: each line is the local derivative of its node times what arrived from above.
    dbeta = layout.sum(dy)  # (G8)
    dgamma = layout.sum(dy * x_hat)  # (G8)
    dx_hat = dy * layout.expand(gamma)  # (G8)
    dinv_std = layout.sum(dx_hat * centered)  # (G7)
    dcentered = dx_hat * layout.expand(inv_std)  # (G7), the first of two ways to the centred x
    dstd = -dinv_std / (std * std)  # (G6)
    dvariance = dstd / (2 * std)  # (G5)
    dsquared = layout.expand(dvariance * share)  # (G4)
    dcentered = dcentered + 2 * centered * dsquared  # (G3), the second way
    dmean = -layout.sum(dcentered)  # (G2)
    dx = dcentered + layout.expand(dmean * share)  # (G2) and (G1)
    return dx, dgamma, dbeta


# Normalization by given statistics: inference, and whatever is merged across devices -----------


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
) -> Array:
    """Normalizes x by a mean and a variance that are given, equations (B3) to (B5).

    Batch normalization in inference mode is this with the moving statistics.

    Args:
        x: array of any rank >= 1, of a floating dtype.
        mean, variance: (C,).
        gamma, beta, axis, epsilon: as in `batch_normalization`.

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: for an axis that x does not have, or a negative epsilon.

    Example:
        >>> y = normalize(np.array([[5.0]], "float32"), np.array([3.0]), np.array([4.0]), epsilon=0)
        >>> float(y[0, 0])
        1.0
    """
    check_epsilon(epsilon)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        x: Array = arrays[0]
        mean, variance, gamma, beta = arrays[1:]
        layout, dtype = _Layout.of(x, axis), compute_dtype(x)
        mean, variance = ops.cast(mean, dtype), ops.cast(variance, dtype)
        y, inv_std = _normalize(ops.cast(x, dtype), mean, variance, gamma, beta, layout, epsilon)
        return (ops.cast(y, x.dtype),), (x, mean, inv_std, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        x, mean, inv_std, gamma = residuals
        dx, dgamma, dbeta, scale = _normalize_backward(
            upstream[0], x, mean, inv_std, gamma, None, _Layout.of(x, axis)
        )
        dmean = -scale * dbeta
        dvariance = -scale * inv_std * dgamma / 2
        return dx, dmean, dvariance, dgamma, dbeta

    (y,) = custom_vjp(forward, backward, x, mean, variance, gamma, beta)
    return y

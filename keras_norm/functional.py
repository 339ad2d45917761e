"""The mathematics of normalization: forward and hand-derived backward passes on arrays.

Everything here is a pure function written with `keras.ops`; the same code runs on
TensorFlow (eagerly, in graphs, under XLA), JAX and PyTorch. Each normalization comes as

* a public function with its hand-derived gradient attached (`batch_normalization`),
* its two halves (`batch_normalization_forward`, `batch_normalization_backward`), and
* where it is instructive, the backward pass a second time, node by node through the
  computation graph (`batch_normalization_backward_by_graph`).

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

(B10) is the whole chain rule: the variance has no derivative with respect to the mean, because
sum w (x - mean) = 0. For w = 1 and a loss that depends on y alone it is the well-known formula
dx = gamma inv_std / N (N dy - dbeta - x_hat dgamma).

The statistics of the parts g of a batch (ghost batches, replicas), with sums of weights W_g, are
merged into those of the whole (Chan, Golub and LeVeque, 1979) without the mean of squares:

    (B13) W        = sum W_g
    (B14) mean     = sum W_g mean_g / W
    (B15) variance = sum W_g (variance_g + (mean_g - mean)^2) / W

The unbiased variance divides by N - 1 instead of N, where N = W^2 / sum w^2 is the number of
elements that count if the weights are 0 and 1, and less if a few of them carry most of the weight:

    (B16) unbiased = variance N / (N - 1)

Batch renormalization corrects the batch's statistics by its own moving averages of the mean and
of the standard deviation; the correction is constant in the gradient, and clipped on request:

    (B17) r = clip(sqrt(variance + epsilon) / renorm_stddev, rmin, rmax)
    (B18) d = clip((mean - renorm_mean) / renorm_stddev, -dmax, dmax)
    (B19) y = gamma (r x_hat + d) + beta

Reference: Ioffe and Szegedy, 2015, Batch Normalization: Accelerating Deep Network Training
by Reducing Internal Covariate Shift, section 3, algorithm 1; the backward pass derived here.
Ioffe, 2017, Batch Renormalization, algorithm 1. Hoffer, Hubara and Soudry, 2017, Train longer,
generalize better, section 4 (ghost batches).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_norm._arrays import in_dtype, is_integer, is_real
from keras_norm.autodiff import custom_vjp

__all__ = [
    "batch_normalization",
    "batch_normalization_backward",
    "batch_normalization_backward_by_graph",
    "batch_normalization_forward",
    "dropout",
    "dropout_backward",
    "dropout_forward",
    "dropout_mask",
    "ghost_batch_normalization",
    "group_normalization",
    "instance_normalization",
    "layer_normalization",
    "layer_normalization_backward",
    "layer_normalization_forward",
    "merge_moments",
    "moments",
    "normalize",
    "normalize_backward",
    "renormalization",
    "rms_normalization",
    "unbiased_variance",
    "weight_sums",
]

Array = Any
Axis = int | Sequence[int]


# Shapes and dtypes ---------------------------------------------------------------------------


def canonical_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes as sorted, non-negative, distinct integers.

    Raises:
        ValueError: for an axis outside the array, an axis given twice, or no axis at all.

    Example:
        >>> canonical_axes((-1, 1), ndim=4)
        (1, 3)
    """
    axes = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    axes = tuple(int(a) if isinstance(a, np.integer) else a for a in axes)
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
    """The dtype in which statistics are accumulated: that of x, and at least float32.

    Raises:
        ValueError: if x is not of a floating dtype.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            "What is normalized must be of a floating dtype. "
            f"Received: x.dtype={dtype}. Cast it first, for example to float32."
        )
    # Not `keras.backend.result_type`: on JAX and PyTorch it turns float64 into float32.
    return "float64" if dtype == "float64" else "float32"


def at_least_one(n: Any, dtype: str) -> Any:
    """n, a number of elements to divide a sum by; an int of 0 becomes 1.

    Args:
        n: an int; or a tensor or a symbol, if the size is known only when the function runs.
        dtype: of the result in the latter case.

    Returns:
        An int, or a scalar.
    """
    return max(n, 1) if isinstance(n, int) else ops.cast(n, dtype)


class _Layout(NamedTuple):
    """Where the channels of x are, and how a vector with one element per channel fits them."""

    shape: tuple[Any, ...]
    channels: tuple[int, ...]  # axes that keep their own statistics
    reduced: tuple[int, ...]  # axes over which the statistics are taken

    @classmethod
    def of(cls, x: Array, axis: Axis) -> "_Layout":
        channels = canonical_axes(axis, len(x.shape))
        reduced = tuple(a for a in range(len(x.shape)) if a not in channels)
        return cls(tuple(ops.shape(x)), channels, reduced)

    def expand(self, v: Array) -> Array:
        """A vector (C,) as an array that broadcasts against x: (1, C, 1, 1) for axis 1."""
        if self.channels == (len(self.shape) - 1,):
            return v
        shape = [self.shape[a] if a in self.channels else 1 for a in range(len(self.shape))]
        return ops.reshape(v, shape)

    def sum(self, x: Array) -> Array:
        # In two stages, because partial sums round less: in float32, the variance of 262,144
        # elements is off by 1e-6 instead of 7e-5.
        for axes in (self.reduced[1:], self.reduced[:1]):  # (N, H, W, C) -> (N, C) -> (C,)
            x = ops.sum(x, axis=axes) if axes else x
        return x

    def share(self, weights: Array | None, dtype: str) -> Array:
        """w / W: the share of each element in the mean; 0 where nothing has a weight.

        Without weights 1 / N, a scalar; else of a shape that broadcasts against x.
        """
        if weights is None:
            n = math.prod([self.shape[a] for a in self.reduced])
            return 1 / max(n, 1) if isinstance(n, int) else 1 / ops.maximum(ops.cast(n, dtype), 1)
        w = in_dtype(weights, dtype)
        total = self.sum(ops.broadcast_to(w, self.shape))
        return w / self.expand(_one_where_zero(total))


def check_epsilon(epsilon: float) -> None:
    if not (is_real(epsilon) and epsilon >= 0):
        raise ValueError(
            "`epsilon` is added to the variance under a square root and must be a number >= 0. "
            f"Received: epsilon={epsilon!r}. The default is 1e-3, of RMS and filter response "
            "normalization 1e-6."
        )


def _shape(array: Array) -> tuple[int | None, ...]:
    return tuple(array.shape) if hasattr(array, "shape") else np.shape(array)


def check_shapes(x: Array, axes: Sequence[int], **arrays: Array | None) -> None:
    """Refuses arrays that would broadcast along `axes` of x: their gradients would not fit them."""
    sizes = tuple(_shape(x)[a] for a in axes)
    for name, array in arrays.items():
        if array is None:
            continue
        shape = _shape(array)
        pairs = zip(shape, sizes, strict=False)
        if len(shape) != len(sizes) or any(None not in (m, n) and m != n for m, n in pairs):
            raise ValueError(
                f"`{name}` must have one element for every index of the axes {list(axes)} of x, "
                f"the shape {sizes}. Received: {name} of shape {shape}, x of shape {_shape(x)}. "
                "Reshape it, or pass the `axis` that it belongs to."
            )


def _broadcasts(shape: Sequence[int | None], to: Sequence[int | None]) -> bool:
    """Whether an array of this shape broadcasts to the other; None fits everything."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(m in (1, None, n) or n is None for m, n in pairs)


def _check_weights(x: Array, weights: Array | None) -> None:
    shape, of_x = (() if weights is None else _shape(weights)), _shape(x)
    if not _broadcasts(shape, of_x):
        raise ValueError(
            "`weights` must broadcast to x: each of their sizes is 1 or that of x. Received: "
            f"weights of shape {shape}, x of shape {of_x}. One weight for each example of (N, C) "
            "has the shape (N, 1)."
        )


def _one_where_zero(x: Array) -> Array:
    return ops.where(x > 0, x, ops.ones_like(x))


def zero_where_not_finite(x: Array) -> Array:
    """x, with 0 where it is NaN or infinite, as masked elements (of weight 0) may be."""
    return ops.where(ops.isfinite(x), x, ops.zeros_like(x))


# The mean and the variance -------------------------------------------------------------------


class _Moments(NamedTuple):
    """(B1) is near + rest, (B2) is variance, and centered is x - near, without the rest."""

    near: Array
    centered: Array
    rest: Array
    variance: Array

    @classmethod
    def of(cls, x: Array, layout: _Layout, weights: Array | None) -> "_Moments":
        """Of x in its compute dtype; see `batch_normalization` for the numerics."""
        share = layout.share(weights, x.dtype)

        def mean_of(v: Array) -> Array:
            if weights is None:
                return layout.sum(v) * share
            # Elements without weight must not count even if they are infinite: 0 * inf is NaN.
            return layout.sum(ops.where(share > 0, v * share, 0))

        near = mean_of(x)
        centered = x - layout.expand(near)
        rest = mean_of(centered)  # what rounding left out: of the order of eps * |mean|
        # relu: it can round below 0. (On PyTorch, keras.ops.maximum turns float64 into float32.)
        variance = ops.relu(mean_of(centered * centered) - rest * rest)
        return cls(near, centered, rest, variance)

    @property
    def mean(self) -> Array:
        return self.near + self.rest


def moments(x: Array, *, axis: Axis = -1, weights: Array | None = None) -> tuple[Array, Array]:
    """The mean and the biased variance of every channel, equations (B1) and (B2).

    Args:
        x: array of any rank >= 1, of a floating dtype.
        axis: the axis, or axes, that keep their own statistics. Default: the last.
        weights: as in `batch_normalization`.

    Returns:
        (mean, variance), each (C,), in at least float32; both differentiable.

    Raises:
        ValueError: for an axis that x does not have, or weights that do not broadcast to x.

    Example:
        >>> mean, variance = moments(np.array([[1.0, 10.0], [3.0, 50.0]], "float32"))
        >>> print(np.asarray(mean).tolist(), np.asarray(variance).tolist())
        [2.0, 30.0] [1.0, 400.0]
    """
    _check_weights(x, weights)

    def forward(x: Array, weights: Array | None) -> tuple[Any, Any]:
        layout = _Layout.of(x, axis)
        of_x = _Moments.of(in_dtype(x, compute_dtype(x)), layout, weights)
        return (of_x.mean, of_x.variance), (x, of_x.mean, weights)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, None]:
        x, mean, weights = residuals
        layout = _Layout.of(x, axis)
        centered = _centered(x, mean, weights, layout)
        dmean, dvariance = upstream
        return _moments_backward(centered, weights, layout, dmean, 2 * dvariance), None

    mean, variance = custom_vjp(forward, backward, x, weights)
    return mean, variance


def _centered(x: Array, mean: Array, weights: Array | None, layout: _Layout) -> Array:
    """x - mean in the dtype of the mean, for the backward passes."""
    centered = in_dtype(x, mean.dtype) - layout.expand(mean)
    return centered if weights is None else zero_where_not_finite(centered)


def _moments_backward(
    centered: Array, weights: Array | None, layout: _Layout, a: Array, twice_b: Array
) -> Array:
    """The second half of (B10): (w / W) (a + 2 b (x - mean))."""
    share = layout.share(weights, centered.dtype)
    if weights is None:  # two small products instead of another pass over x
        return layout.expand(a * share) + layout.expand(twice_b * share) * centered
    return share * (layout.expand(a) + layout.expand(twice_b) * centered)


def weight_sums(x: Array, *, axis: Axis = -1, weights: Array | None = None) -> tuple[Array, Array]:
    """The sum of the weights of every channel and the sum of their squares.

    Args: as `moments`.

    Returns:
        (W, sum w^2), each (C,), in the dtype of the statistics; both N without weights.

    Example:
        >>> w = np.array([[2.0], [1.0]], "float32")
        >>> total, squares = weight_sums(np.zeros((2, 3), "float32"), weights=w)
        >>> np.asarray(total).tolist(), np.asarray(squares).tolist()
        ([3.0, 3.0, 3.0], [5.0, 5.0, 5.0])
    """
    layout, dtype = _Layout.of(x, axis), compute_dtype(x)
    _check_weights(x, weights)
    if weights is None:
        n = ops.cast(math.prod([layout.shape[a] for a in layout.reduced]), dtype)
        n = ops.broadcast_to(n, [layout.shape[a] for a in layout.channels])
        return n, n
    w = ops.broadcast_to(in_dtype(weights, dtype), layout.shape)
    return layout.sum(w), layout.sum(w * w)


def merge_moments(
    mean: Array, variance: Array, weight: Array, total: Callable[[Array], Array]
) -> tuple[Array, Array, Array]:
    """The statistics of a whole from those of its parts, (B13) to (B15).

    Args:
        mean, variance: of the parts, in any layout.
        weight: the sum of weights of each part, in the same layout.
        total: function that sums over the parts; called with arrays of that layout, or with two
            of them stacked along a new first axis.

    Returns:
        (mean, variance, weight) of the whole, of the shape that `total` returns; 0 where there
        is no weight. Differentiable in the mean and the variance.

    Example:
        >>> parts = np.array([[0.0], [4.0]]), np.array([[1.0], [1.0]]), np.array([[1.0], [3.0]])
        >>> mean, variance, weight = merge_moments(*parts, lambda v: ops.sum(v, axis=-2))
        >>> float(mean[0]), float(variance[0]), float(weight[0])
        (3.0, 4.0, 4.0)
    """
    mean, variance, weight = map(ops.convert_to_tensor, (mean, variance, weight))
    weight_of_all, weighted = ops.unstack(total(ops.stack([weight, weight * mean])), 2)  # (B13)
    safe = _one_where_zero(weight_of_all)
    merged = weighted / safe  # (B14)
    off = mean - merged
    spread = total(ops.expand_dims(weight * (variance + off * off), 0))
    return merged, ops.squeeze(spread, 0) / safe, weight_of_all  # (B15)


def unbiased_variance(variance: Array, weight: Array, squares: Array) -> Array:
    """The variance divided by N - 1 instead of N, equation (B16).

    Args:
        variance: biased variance, (C,).
        weight, squares: sum of the weights and of their squares, (C,); see `weight_sums`.

    Returns:
        (C,); where one element has all the weight, the biased variance, which is 0.

    Example:
        >>> float(unbiased_variance(np.array([2.0]), np.array([3.0]), np.array([3.0]))[0])
        3.0
    """
    variance, weight, squares = map(ops.convert_to_tensor, (variance, weight, squares))
    spare = weight * weight - squares
    several = spare > 1e-6 * squares  # more than rounding can leave for a single element
    return ops.where(several, variance * (weight * weight / ops.where(several, spare, 1)), variance)


# Batch normalization -------------------------------------------------------------------------


def batch_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    weights: Array | None = None,
    given: tuple[Array, Array] | None = None,
    use_given: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Normalizes x by the mean and variance of the batch itself, equations (B1) to (B10).

    Args:
        x: array of any rank >= 1, of a floating dtype; (N, C) or (N, H, W, C), for example.
        gamma: scale, of the shape of the channels, (C,). Default: none, a factor of 1.
        beta: offset, likewise. Default: none, 0.
        axis: the axis, or axes, that keep their own statistics. Default: the last.
        epsilon: added to the variance, under the square root; >= 0. Default: 1e-3, as in Keras.
        weights: how much each element counts in the mean and the variance: numbers >= 0 or
            booleans, of any shape that broadcasts to that of x. Every element is normalized,
            whatever its weight; elements of weight 0 may be infinite or NaN. Weights are
            constants: no gradient flows into them. Default: all count alike.
        given: a mean and a variance, (C,), constants, to normalize by instead of the batch's
            if `use_given` is true. Default: none.
        use_given: scalar boolean, which may be decided when a compiled function runs: both
            cases make the same passes over x. Default: false.

    Returns:
        (y, mean, variance): y of the shape and dtype of x; the mean and the biased variance of
        the batch (divided by the sum of weights), each (C,), in at least float32. All three are
        differentiable. Channels without any weight, and those of an empty batch, have mean 0 and
        variance 0; with one element per channel, the variance is 0 and y is beta.

    Raises:
        ValueError: for an axis that x does not have, a negative epsilon, arrays of other shapes,
            or `use_given` without `given`.

    Numerics:
        Accumulated in float32, or float64 if x is float64. The mean is computed twice, the second
        time from x - mean, and the variance from x - mean (never as E[x^2] - E[x]^2), so that a
        mean of 1000 with a variance of 1 costs no digits. Gradients are within 1e-9 of numerical
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
    if use_given is not None and given is None:
        raise ValueError(
            "`use_given` chooses between the statistics of the batch and those of `given`. "
            f"Received: use_given={use_given!r}, given=None. Pass given=(mean, variance) with it."
        )
    mean, variance = given or (None, None)
    axes = canonical_axes(axis, len(_shape(x)))
    check_shapes(x, axes, gamma=gamma, beta=beta, mean=mean, variance=variance)
    _check_weights(x, weights)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        return batch_normalization_forward(*arrays, axis=axis, epsilon=epsilon)

    def backward(residuals: Any, upstream: Any) -> tuple[Array | None, ...]:
        constants = None, None, None, None
        return *batch_normalization_backward(*upstream, *residuals, axis=axis), *constants

    statistics = (None, None, None) if use_given is None else (*(given or ()), use_given)
    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta, weights, *statistics)
    return y, mean, variance


def batch_normalization_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    weights: Array | None = None,
    given_mean: Array | None = None,
    given_variance: Array | None = None,
    use_given: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
) -> tuple[tuple[Array, Array, Array], tuple[Array | None, ...]]:
    """The forward half of `batch_normalization`.

    Args: as `batch_normalization`.

    Returns:
        (y, mean, variance) and the residuals (x, used_mean, inv_std, gamma, weights, gap,
        use_given): the only array of x's size kept for the backward pass is x itself. The gap is
        the mean that was used minus that of the batch; the last two are None without `given`.
    """
    layout = _Layout.of(x, axis)
    x_ = in_dtype(x, compute_dtype(x))
    of_batch = _Moments.of(x_, layout, weights)  # (B1) (B2)
    mean, variance = of_batch.mean, of_batch.variance
    used_mean, gap = mean, None
    if use_given is None:
        inv_std, scale = _scale(variance, gamma, epsilon)  # (B3)
        shift = of_batch.rest * scale
        shift = -shift if beta is None else in_dtype(beta, x_.dtype) - shift
        # (B4) and (B5): only the small rest is subtracted from centered, so nothing large cancels.
        y = of_batch.centered * layout.expand(scale) + layout.expand(shift)
    else:
        used_mean = ops.where(use_given, in_dtype(given_mean, x_.dtype), mean)
        used_variance = ops.where(use_given, in_dtype(given_variance, x_.dtype), variance)
        gap = zero_where_not_finite(used_mean - mean)
        y, inv_std = _normalize(x_, used_mean, used_variance, gamma, beta, layout, epsilon)
    residuals = x, used_mean, inv_std, gamma, weights, gap, use_given
    return (in_dtype(y, x.dtype), mean, variance), residuals


def _normalize(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    layout: _Layout,
    epsilon: float,
) -> tuple[Array, Array]:
    inv_std, scale = _scale(variance, gamma, epsilon)  # (B3)
    y = (x - layout.expand(mean)) * layout.expand(scale)  # (B4) (B5)
    return (y if beta is None else y + layout.expand(in_dtype(beta, x.dtype))), inv_std


def _scale(variance: Array, gamma: Array | None, epsilon: float) -> tuple[Array, Array]:
    """inv_std, and gamma inv_std."""
    inv_std = ops.rsqrt(variance + epsilon)
    return inv_std, inv_std if gamma is None else inv_std * in_dtype(gamma, variance.dtype)


def batch_normalization_backward(
    dy: Array,
    dmean: Array,
    dvariance: Array,
    x: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None = None,
    weights: Array | None = None,
    gap: Array | None = None,
    use_given: Array | None = None,
    *,
    axis: Axis = -1,
) -> tuple[Array, Array, Array]:
    """The backward half of `batch_normalization`, in its simplified form.

    Args:
        dy: gradient of the loss with respect to y, of its shape.
        dmean, dvariance: gradients with respect to the batch's mean and variance, (C,); 0 where
            the loss uses only y.
        x, mean, inv_std, gamma, weights, gap, use_given: the residuals of the forward half.
        axis: as there.

    Returns:
        (dx, dgamma, dbeta): dx of the shape of x, the others (C,), all in the compute dtype.
    """
    layout = _Layout.of(x, axis)
    centered = _centered(x, mean, weights, layout)
    dx, dgamma, dbeta, scale = _normalize_backward(dy, centered, inv_std, gamma, layout)
    to_mean, to_variance = scale * dbeta, scale * inv_std * dgamma
    if use_given is not None:  # the given mean and variance are constants
        to_mean, to_variance = (
            ops.where(use_given, ops.zeros_like(v), v) for v in (to_mean, to_variance)
        )
    minus_a = to_mean - dmean  # (B8)
    minus_twice_b = to_variance - 2 * dvariance  # (B9)
    if gap is not None:
        minus_a = minus_a + minus_twice_b * gap  # the x - mean of (B10) is that of the batch
    along = _moments_backward(centered, weights, layout, minus_a, minus_twice_b)
    return dx - along, dgamma, dbeta  # (B10)


def _normalize_backward(
    dy: Array, centered: Array, inv_std: Array, gamma: Array | None, layout: _Layout
) -> tuple[Array, Array, Array, Array]:
    """dx, dgamma, dbeta with the mean and the variance held fixed, and gamma inv_std."""
    dtype = inv_std.dtype
    dy = in_dtype(dy, dtype)
    dbeta = layout.sum(dy)  # (B6)
    dgamma = layout.sum(dy * centered) * inv_std  # (B7)
    scale = inv_std if gamma is None else inv_std * in_dtype(gamma, dtype)
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
    with half as many passes over x. Forward, each node uses the one before:

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


def ghost_batch_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    virtual_batch_size: int,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    weights: Array | None = None,
    given: tuple[Array, Array] | None = None,
    use_given: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Normalizes each ghost batch, a run of consecutive examples, by its own statistics.

    The batch of N examples is cut into G = ceil(N / virtual_batch_size) ghost batches of
    ceil(N / G) examples, the last of which may have fewer; all are computed at once.

    Args:
        virtual_batch_size: the largest number of examples in a ghost batch, >= 1.
        x, gamma, beta, axis, epsilon, weights, given, use_given: as in `batch_normalization`;
            the first axis of x counts the examples and is not among `axis`.

    Returns:
        (y, mean, variance): y of the shape and dtype of x; the mean and the biased variance of
        the whole batch, merged from the ghost batches by (B13) to (B15), (C,).

    Raises:
        ValueError: for a virtual batch size below 1, an `axis` that holds the examples, and
            what `batch_normalization` refuses.

    Example:
        >>> x = np.array([[1.0], [3.0], [10.0], [50.0]], "float32")
        >>> y, mean, variance = ghost_batch_normalization(x, virtual_batch_size=2, epsilon=0.0)
        >>> np.asarray(y)[:, 0].tolist(), float(mean[0]), float(variance[0])
        ([-1.0, 1.0, -1.0, 1.0], 16.0, 396.5)

    Reference:
        Hoffer, Hubara and Soudry, 2017, section 4 (who update the moving statistics once for each
        ghost batch; here they are updated by the statistics of the whole batch).
    """
    layout = _Layout.of(x, axis)
    check_virtual_batch_size(virtual_batch_size)
    if 0 in layout.channels:
        raise ValueError(
            "Ghost batches are made of consecutive examples: axis 0 cannot keep statistics of its "
            f"own. Received: axis={axis!r}, virtual_batch_size={virtual_batch_size}."
        )
    mean, variance = given or (None, None)
    check_shapes(x, layout.channels, gamma=gamma, beta=beta, mean=mean, variance=variance)
    _check_weights(x, weights)
    cut, valid = _ghost_batches(layout.shape[0], int(virtual_batch_size))
    if weights is not None:
        weights = in_dtype(weights, compute_dtype(x))
        missing = len(layout.shape) - len(weights.shape)
        weights = ops.reshape(weights, [1] * missing + list(ops.shape(weights)))
        weights = weights[None] if weights.shape[0] == 1 else cut(weights)
    if valid is not None:
        valid = ops.reshape(valid, list(ops.shape(valid)) + [1] * (len(layout.shape) - 1))
        weights = valid if weights is None else weights * in_dtype(valid, weights.dtype)
    parts = cut(x)  # (N, ..., C) -> (G, S, ..., C)
    groups, ghost_axis = ops.shape(parts)[0], (0, *(a + 1 for a in layout.channels))

    def for_each(v: Array | None) -> Array | None:
        if v is None:
            return None
        v = ops.convert_to_tensor(v)
        return ops.broadcast_to(v, [groups, *ops.shape(v)])  # (C,) -> (G, C)

    y, mean, variance = batch_normalization(
        parts,
        for_each(gamma),
        for_each(beta),
        axis=ghost_axis,
        epsilon=epsilon,
        weights=weights,
        given=None if given is None else (for_each(given[0]), for_each(given[1])),
        use_given=use_given,
    )
    weight, _ = weight_sums(parts, axis=ghost_axis, weights=weights)
    mean, variance, _ = merge_moments(mean, variance, weight, lambda v: ops.sum(v, axis=1))
    y = ops.reshape(y, [-1, *layout.shape[1:]])  # (G, S, ..., C) -> (G S, ..., C)
    return y[: layout.shape[0]], mean, variance


def check_virtual_batch_size(size: Any) -> None:
    if not (is_integer(size) and size >= 1):
        raise ValueError(
            "`virtual_batch_size` is a number of examples, an integer >= 1. "
            f"Received: virtual_batch_size={size!r}. Leave it out to normalize the whole batch."
        )


def _ghost_batches(
    n: Any, virtual_batch_size: int
) -> tuple[Callable[[Array], Array], Array | None]:
    """How to cut n examples, (n, ...) -> (G, S, ...), and which of the (G, S) are not padding.

    The latter is None if there is no padding. n is an integer, or a tensor on TensorFlow.
    """
    groups = -(-n // virtual_batch_size)
    groups = max(groups, 1) if isinstance(n, int) else ops.maximum(groups, 1)
    size = -(-n // groups)
    padding = groups * size - n

    def cut(v: Array) -> Array:
        rest = list(ops.shape(v))[1:]
        if not (isinstance(padding, int) and padding == 0):
            v = ops.concatenate([v, ops.zeros([padding, *rest], v.dtype)], axis=0)
        return ops.reshape(v, [groups, size, *rest])

    if isinstance(padding, int) and padding == 0:
        return cut, None
    return cut, cut(ops.ones([n], "float32"))


def renormalization(
    mean: Array,
    variance: Array,
    renorm_mean: Array,
    renorm_stddev: Array,
    *,
    epsilon: float = 1e-3,
    rmin: float | None = None,
    rmax: float | None = None,
    dmax: float | None = None,
) -> tuple[Array, Array]:
    """The correction r and d of batch renormalization, (B17) and (B18).

    Args:
        mean, variance: of the batch, (C,).
        renorm_mean, renorm_stddev: moving averages of the mean and of the standard deviation
            sqrt(variance + epsilon), (C,). A renorm_stddev below sqrt(epsilon) counts as that.
        epsilon: as in `batch_normalization`.
        rmin, rmax, dmax: bounds of r and of |d|. Default: none.

    Returns:
        (r, d), each (C,), constants for the gradient.

    Example:
        >>> statistics = [np.array([v]) for v in (3.0, 16.0, 1.0, 2.0)]
        >>> r, d = renormalization(*statistics, epsilon=0.0, rmax=1.5)
        >>> float(r[0]), float(d[0])
        (1.5, 1.0)

    Reference:
        Ioffe, 2017, Batch Renormalization, algorithm 1.
    """
    mean, variance = ops.convert_to_tensor(mean), ops.convert_to_tensor(variance)
    stddev = _clip(in_dtype(renorm_stddev, mean.dtype), epsilon**0.5, None)
    r = ops.sqrt(variance + epsilon) / stddev  # (B17)
    d = (mean - in_dtype(renorm_mean, mean.dtype)) / stddev  # (B18)
    r = _clip(r, rmin, rmax)
    d = d if dmax is None else _clip(d, -dmax, dmax)
    return ops.stop_gradient(r), ops.stop_gradient(d)


def _clip(x: Array, low: float | None, high: float | None) -> Array:
    # full_like: a Python number in `where` is rounded to float32 on PyTorch.
    x = x if low is None else ops.where(x < low, ops.full_like(x, low), x)
    return x if high is None else ops.where(x > high, ops.full_like(x, high), x)


# Normalization by given statistics: inference, and statistics merged across devices ------------


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
    """Normalizes x by a given mean and variance, equations (B3) to (B5).

    With the moving statistics, this is batch normalization in inference mode.

    Args:
        x: array of any rank >= 1, of a floating dtype.
        mean, variance: (C,).
        gamma, beta, axis, epsilon: as in `batch_normalization`.

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: for an axis that x does not have, a negative epsilon, or arrays of other shapes.

    Example:
        >>> y = normalize(np.array([[5.0]], "float32"), np.array([3.0]), np.array([4.0]), epsilon=0)
        >>> float(y[0, 0])
        1.0
    """
    check_epsilon(epsilon)
    axes = canonical_axes(axis, len(_shape(x)))
    check_shapes(x, axes, mean=mean, variance=variance, gamma=gamma, beta=beta)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        x: Array = arrays[0]
        mean, variance, gamma, beta = arrays[1:]
        layout, dtype = _Layout.of(x, axis), compute_dtype(x)
        mean, variance = in_dtype(mean, dtype), in_dtype(variance, dtype)
        y, inv_std = _normalize(in_dtype(x, dtype), mean, variance, gamma, beta, layout, epsilon)
        return (in_dtype(y, x.dtype),), (x, mean, inv_std, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        return normalize_backward(upstream[0], *residuals, axis=axis)

    (y,) = custom_vjp(forward, backward, x, mean, variance, gamma, beta)
    return y


def normalize_backward(
    dy: Array, x: Array, mean: Array, inv_std: Array, gamma: Array | None, *, axis: Axis = -1
) -> tuple[Array, ...]:
    """The backward half of `normalize`.

    Args:
        dy: gradient of the loss with respect to y, of its shape.
        x, gamma, axis: as there.
        mean, inv_std: (C,), the given mean and 1 / sqrt(variance + epsilon).

    Returns:
        (dx, dmean, dvariance, dgamma, dbeta): dx of the shape of x, the others (C,), all in the
        compute dtype.
    """
    layout = _Layout.of(x, axis)
    centered = _centered(x, mean, None, layout)
    dx, dgamma, dbeta, scale = _normalize_backward(dy, centered, inv_std, gamma, layout)
    dmean = -scale * dbeta
    dvariance = -scale * inv_std * dgamma / 2
    return dx, dmean, dvariance, dgamma, dbeta


# Normalization within each example: layer, RMS, group and instance normalization ---------------


class _Scheme(NamedTuple):
    """What distinguishes these normalizations: the axes they reduce, and what they subtract."""

    reduced: tuple[int, ...]  # axes over which an example's statistics are taken
    parameters: tuple[int, ...]  # axes that gamma and beta lie along
    about_mean: bool = True  # statistics: the mean and the variance about it, or the mean square
    subtracts_mean: bool = True  # numerator: x - mean, or x

    def expand(self, v: Array, x: Array) -> Array:
        """A parameter as an array that broadcasts against x: (1, 1, 1, C) for images."""
        shape, dtype = ops.shape(x), compute_dtype(x)
        sizes = [shape[a] if a in self.parameters else 1 for a in range(len(shape))]
        return ops.reshape(in_dtype(v, dtype), sizes)

    def mean(self, x: Array) -> Array:
        # Not `ops.mean`, which is in float32 on JAX and PyTorch.
        return sum_in_stages(x, self.reduced) / self.elements(x, x.dtype)

    def elements(self, x: Array, dtype: str) -> Any:
        """D, the number of elements that each statistic is computed from."""
        shape = ops.shape(x)
        n = math.prod([shape[a] for a in self.reduced])
        return at_least_one(n, dtype)


def sum_in_stages(x: Array, axes: Sequence[int]) -> Array:
    """The sum, with the reduced axes kept as 1.

    In two stages, because partial sums round less: the variance of 512 x 512 x 2 elements in
    float32 is off by 2e-7, but in one stage on TensorFlow by 1.5e-4.
    """
    for stage in (axes[1:], axes[:1]):  # PyTorch would take an empty tuple to mean all axes
        x = ops.sum(x, axis=tuple(stage), keepdims=True) if stage else x
    return x


def _standardize(
    x: Array, gamma: Array | None, beta: Array | None, scheme: _Scheme, epsilon: float
) -> Array:
    """The forward and the backward half as one differentiable function."""
    check_epsilon(epsilon)
    check_shapes(x, scheme.parameters, gamma=gamma, beta=beta)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        return _standardize_forward(*arrays, scheme=scheme, epsilon=epsilon)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        return _standardize_backward(*upstream, *residuals, scheme=scheme)

    (y,) = custom_vjp(forward, backward, x, gamma, beta)
    return y


def _moments_within(x: Array, scheme: _Scheme) -> tuple[Array | None, Array | None, Array]:
    """An example's mean, in two parts, and its variance; (..., 1) on the reduced axes.

    The second part of the mean is what the first one lost to rounding, so that x - mean - rest
    is as exact as x itself, however large the mean.
    """
    if not scheme.about_mean:
        return None, None, scheme.mean(x * x)  # (R1)
    mean = scheme.mean(x)
    centered = x - mean
    rest = scheme.mean(centered)  # (L1) is mean + rest
    variance = scheme.mean(centered * centered) - rest * rest  # (L2)
    return mean, rest, ops.where(variance < 0, ops.zeros_like(variance), variance)


def _deviation(x: Array, mean: Array | None, rest: Array | None) -> Array:
    return x if mean is None else (x - mean) - rest


def _standardize_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    scheme: _Scheme,
    epsilon: float,
) -> tuple[tuple[Array], tuple[Array | None, ...]]:
    """(L1) to (L5); the only array of x's size kept for the backward pass is x itself."""
    x_ = in_dtype(x, compute_dtype(x))
    mean, rest, variance = _moments_within(x_, scheme)
    inv_std = ops.rsqrt(variance + epsilon)  # (L3) (R2)
    numerator = _deviation(x_, mean, rest) if scheme.subtracts_mean else x_
    scale = inv_std if gamma is None else inv_std * scheme.expand(gamma, x)
    y = numerator * scale  # (L4) (R3)
    y = y if beta is None else y + scheme.expand(beta, x)  # (L5) (R4)
    return (in_dtype(y, x.dtype),), (x, mean, rest, inv_std, gamma)


def _standardize_backward(
    dy: Array,
    x: Array,
    mean: Array | None,
    rest: Array | None,
    inv_std: Array,
    gamma: Array | None,
    *,
    scheme: _Scheme,
) -> tuple[Array, Array, Array]:
    """dx, dgamma, dbeta: (L6) to (L9), (R5) and (R6)."""
    dtype = inv_std.dtype
    x_, dy = in_dtype(x, dtype), in_dtype(dy, dtype)
    deviation = _deviation(x_, mean, rest) * inv_std  # its mean square is 1, except for epsilon
    x_hat = deviation if scheme.subtracts_mean or mean is None else x_ * inv_std

    # Axes that both an example's statistics and the parameters sum over are summed once for both.
    axes = range(len(x.shape))
    shared = [a for a in scheme.reduced if a not in scheme.parameters]
    sum_dy, sum_dy_x_hat = sum_in_stages(dy, shared), sum_in_stages(dy * x_hat, shared)

    shape = [ops.shape(x)[a] for a in scheme.parameters]
    others = [a for a in axes if a not in scheme.parameters and a not in shared]
    dbeta = ops.reshape(sum_in_stages(sum_dy, others), shape)  # (L6)
    dgamma = ops.reshape(sum_in_stages(sum_dy_x_hat, others), shape)  # (L7) (R5)

    g = ops.ones_like(inv_std) if gamma is None else scheme.expand(gamma, x)  # (L8)
    rows = [a for a in scheme.reduced if a not in shared]
    d = scheme.elements(x, dtype)
    mean_of_product = sum_in_stages(g * sum_dy_x_hat, rows) / d
    dx = (g * inv_std) * dy - deviation * (inv_std * mean_of_product)  # (R6)
    if scheme.subtracts_mean:
        dx = dx - inv_std * sum_in_stages(g * sum_dy, rows) / d  # (L9)
    return dx, dgamma, dbeta


def layer_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    rms_scaling: bool = False,
) -> Array:
    """Normalizes every example by its own mean and variance.

    For each example, with the D elements that lie on `axis`:

        (L1) mean     = sum x / D
        (L2) variance = sum (x - mean)^2 / D
        (L3) inv_std  = 1 / sqrt(variance + epsilon)
        (L4) x_hat    = (x - mean) inv_std
        (L5) y        = gamma x_hat + beta

    and backward, where the sums of (L6) and (L7) run over the examples, and the means of (L9)
    over the D elements of each:

        (L6) dbeta    = sum dy
        (L7) dgamma   = sum dy x_hat
        (L8) dx_hat   = gamma dy
        (L9) dx       = inv_std (dx_hat - mean(dx_hat) - x_hat mean(dx_hat x_hat))

    It is batch normalization with the roles of the axes exchanged, except for gamma and beta,
    which stay with the features. (L9) removes from dx_hat its component along 1 and its
    component along x_hat: the two directions in which x can move without changing y.

    Args:
        x: array of any rank >= 1, of a floating dtype; (N, D) or (N, T, D), for example.
        gamma: scale, of the shape of the normalized axes, (D,). Default: none, a factor of 1.
        beta: offset, likewise. Default: none, 0.
        axis: the axis, or axes, over which the statistics are taken, and along which gamma and
            beta lie. Default: the last.
        epsilon: added to the variance, under the square root; >= 0. Default: 1e-3, as in Keras.
        rms_scaling: bool, whether the numerator of (L4) is x instead of x - mean, an old option
            of Keras. It is not RMS normalization, for which see `rms_normalization`. Default:
            False.

    Returns:
        y, of the shape and dtype of x; twice differentiable in x, gamma and beta.

    Raises:
        ValueError: for an axis that x does not have, a negative epsilon, or arrays of other shapes.

    Numerics:
        Accumulated in float32, or float64 if x is float64, in two passes, with the mean kept in
        two parts: a mean of 1000 with a variance of 1 costs no digits. A constant example has
        variance 0, so that y is beta (with epsilon = 0, y is undefined: NaN). Gradients are
        within 1e-9 of numerical ones in float64, as ||a - b|| / (||a|| + ||b||).

    Example:
        >>> y = layer_normalization(np.array([[1.0, 3.0], [10.0, 50.0]], "float32"), epsilon=0.0)
        >>> np.round(np.asarray(y), 5).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Reference:
        Ba, Kiros and Hinton, 2016, Layer Normalization, section 3; the backward pass derived
        here.
    """
    x = ops.convert_to_tensor(x)
    scheme = _layer_scheme(x, axis)._replace(subtracts_mean=not rms_scaling)
    return _standardize(x, gamma, beta, scheme, epsilon)


def _layer_scheme(x: Array, axis: Axis) -> _Scheme:
    axes = canonical_axes(axis, len(x.shape))
    return _Scheme(reduced=axes, parameters=axes)


def layer_normalization_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
) -> tuple[tuple[Array], tuple[Array | None, ...]]:
    """The forward half of `layer_normalization`.

    Args: as `layer_normalization`.

    Returns:
        (y,) and the residuals (x, mean, rest, inv_std, gamma). The mean of an example is
        mean + rest, where rest is what rounding lost; the normalized axes are kept as 1.
    """
    return _standardize_forward(x, gamma, beta, scheme=_layer_scheme(x, axis), epsilon=epsilon)


def layer_normalization_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rest: Array,
    inv_std: Array,
    gamma: Array | None = None,
    *,
    axis: Axis = -1,
) -> tuple[Array, Array, Array]:
    """The backward half of `layer_normalization`.

    Args:
        dy: gradient of the loss with respect to y, of its shape.
        x, mean, rest, inv_std, gamma: the residuals of the forward half.
        axis: as there.

    Returns:
        (dx, dgamma, dbeta): dx of the shape of x, the others (D,), all in the compute dtype.
    """
    scheme = _layer_scheme(x, axis)
    return _standardize_backward(dy, x, mean, rest, inv_std, gamma, scheme=scheme)


def rms_normalization(
    x: Array, gamma: Array | None = None, *, axis: Axis = -1, epsilon: float = 1e-6
) -> Array:
    """Divides every example by its root mean square.

    For each example, with the D elements that lie on `axis`:

        (R1) mean_square = sum x^2 / D
        (R2) inv_rms     = 1 / sqrt(mean_square + epsilon)
        (R3) x_hat       = x inv_rms
        (R4) y           = gamma x_hat

    and backward, with the sum over the examples in (R5), the mean over the D elements in (R6):

        (R5) dgamma      = sum dy x_hat
        (R6) dx          = inv_rms (gamma dy - x_hat mean(gamma dy x_hat))

    Layer normalization without the mean: invariant to the scale of x, but not to a shift.

    Args:
        x: array of any rank >= 1, of a floating dtype; (N, T, D), for example.
        gamma: scale, of the shape of the normalized axes, (D,). Default: none, a factor of 1.
        axis: the axis, or axes, over which the mean square is taken. Default: the last.
        epsilon: added to the mean square, under the square root; >= 0. Default: 1e-6, as in
            Keras.

    Returns:
        y, of the shape and dtype of x; twice differentiable in x and gamma.

    Raises:
        ValueError: for an axis that x does not have, a negative epsilon, or arrays of other shapes.

    Numerics:
        The mean square is accumulated in float32 (for which |x| must stay below 1e19), or
        float64 if x is float64. Gradients as in `layer_normalization`.

    Example:
        >>> y = rms_normalization(np.array([[3.0, -3.0]], "float32"), epsilon=0.0)
        >>> np.round(np.asarray(y), 5).tolist()
        [[1.0, -1.0]]

    Reference:
        Zhang and Sennrich, 2019, Root Mean Square Layer Normalization, section 4; the backward
        pass derived here.
    """
    x = ops.convert_to_tensor(x)
    scheme = _layer_scheme(x, axis)._replace(about_mean=False, subtracts_mean=False)
    return _standardize(x, gamma, None, scheme, epsilon)


def check_groups(groups: int | None) -> None:
    """Refuses what is not a number of groups.

    Raises:
        ValueError: for anything but an integer >= 1, -1 or None.
    """
    if groups is not None and not (is_integer(groups) and (groups >= 1 or groups == -1)):
        raise ValueError(
            "The argument `groups` is a number of groups, an integer >= 1, or -1 for one group "
            f"for each channel. Received: groups={groups!r}. groups=None stands for the greatest "
            "common divisor of 32 and the number of channels."
        )


def number_of_groups(groups: int | None, channels: int) -> int:
    """How many groups `groups` asks for: -1 is one for each channel, None is gcd(32, channels).

    Raises:
        ValueError: for `groups` that is not a number of groups, or does not divide the channels.

    Example:
        >>> number_of_groups(None, 48), number_of_groups(-1, 48), number_of_groups(4, 48)
        (16, 48, 4)
    """
    check_groups(groups)
    if groups is None:
        return math.gcd(32, channels)
    groups = channels if groups == -1 else int(groups)
    if groups > channels:
        raise ValueError(
            "The groups share the channels out, so the number of groups cannot be more than the "
            f"number of channels. Received: groups={groups}, channels={channels}. Use a divisor "
            "of it, or groups=None for the greatest common divisor with 32."
        )
    if channels % groups:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(
            "All groups have the same size, channels // groups, and together they have to hold "
            "every channel: groups * (channels // groups) must be a multiple of the number of "
            f"channels. Received: groups={groups}, channels={channels}. Use one of {divisors}, "
            "or groups=None for the greatest common divisor with 32."
        )
    return groups


def known_sizes(shape: Sequence[int | None], axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of some axes.

    Raises:
        ValueError: if one of them is unknown.

    Example:
        >>> known_sizes((None, 28, 28, 6), (3,))
        (6,)
    """
    sizes = tuple(n for n in (shape[a] for a in axes) if n is not None)
    if len(sizes) < len(axes):
        raise ValueError(
            f"Every axis of {list(axes)} of the input tensor should have a defined dimension but "
            f"the layer received an input with shape {tuple(shape)}. gamma and beta lie along "
            "them: give the model an Input with their sizes."
        )
    return sizes


def channel_axis(axis: int, ndim: int) -> int:
    """The axis of the channels, not negative; it cannot be 0, the axis of the examples."""
    axes = canonical_axes(axis, ndim)
    if len(axes) > 1 or axes[0] == 0:
        raise ValueError(
            "`axis` must be the one axis of the channels, and not axis 0, that of the examples. "
            f"Received: axis={axis!r} for an input of {ndim} dimensions. For images with channels "
            "last use axis=-1, with channels first axis=1."
        )
    return axes[0]


def group_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    groups: int | None = 32,
    axis: int = -1,
    epsilon: float = 1e-3,
) -> Array:
    """Normalizes groups of channels of every example by their own mean and variance.

    The channels of each example are divided, in order, into G groups of C / G:

        (GN1) x: (N, H, W, C) -> (N, H, W, G, C / G)
        (GN2) x_hat = (L1) to (L4) over H, W and C / G, for each example and group
        (GN3) y     = gamma x_hat + beta, one gamma and beta for each channel

    and backward, where the means are over the D = H W C / G elements of a group:

        (GN4) dbeta = sum dy, dgamma = sum dy x_hat, over N, H, W
        (GN5) dx    = inv_std (gamma dy - mean(gamma dy) - x_hat mean(gamma dy x_hat))

    Args:
        x: array of any rank >= 2, of a floating dtype; (N, C), (N, T, C), (N, H, W, C), ...
        gamma, beta: scale and offset of each channel, (C,). Default: none.
        groups: G, an integer >= 1 that divides C; -1 for C groups (instance normalization);
            None for gcd(32, C), which suits any C. Default: 32.
        axis: the axis of the channels, not 0. Default: the last.
        epsilon: added to the variance, under the square root; >= 0. Default: 1e-3, as in Keras.

    Returns:
        y, of the shape and dtype of x; differentiable in x, gamma and beta, and again.

    Raises:
        ValueError: for groups that do not divide the channels, an unknown number of channels, an
            axis that x does not have or that is 0, a negative epsilon, or another shape of gamma
            or beta.

    Numerics:
        As `layer_normalization`.

    Example:
        >>> x = np.array([[1.0, 3.0, 10.0, 50.0]], "float32")
        >>> np.round(np.asarray(group_normalization(x, groups=2, epsilon=0.0)), 5).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference:
        Wu and He, 2018, Group Normalization, section 3; the backward pass derived here.
    """
    x = ops.convert_to_tensor(x)
    channel, shape = channel_axis(axis, len(x.shape)), list(ops.shape(x))
    (channels,) = known_sizes(x.shape, (channel,))
    g = number_of_groups(groups, channels)
    sizes = [g, channels // g]  # (GN1)
    split = [*shape[:channel], *sizes, *shape[channel + 1 :]]
    reduced = tuple(a for a in range(1, len(split)) if a != channel)
    scheme = _Scheme(reduced=reduced, parameters=(channel, channel + 1))
    check_shapes(x, (channel,), gamma=gamma, beta=beta)
    gamma, beta = (None if v is None else ops.reshape(v, sizes) for v in (gamma, beta))
    y = _standardize(ops.reshape(x, split), gamma, beta, scheme, epsilon)  # (GN2) to (GN5)
    return ops.reshape(y, shape)


def instance_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
) -> Array:
    """Normalizes every channel of every example by its own mean and variance.

    For each example n and channel c, over the D = H W positions:

        (I1) mean     = sum x / D;  variance = sum (x - mean)^2 / D
        (I2) y        = gamma_c (x - mean) / sqrt(variance + epsilon) + beta_c

    and backward, with s = sum dy and t = sum dy x_hat over the positions of one (n, c):

        (I3) dbeta_c  = sum s,  dgamma_c = sum t, over the examples
        (I4) dx       = gamma_c inv_std (dy - s / D - x_hat t / D)

    Group normalization with one channel in each group.

    Args:
        x: array of any rank >= 3, of a floating dtype; (N, T, C), (N, H, W, C), ...
        gamma, beta: scale and offset of each channel, (C,). Default: none.
        axis: the axis of the channels, not 0. Default: the last.
        epsilon: added to the variance, under the square root; >= 0. Default: 1e-3.

    Returns:
        y, of the shape and dtype of x; differentiable in x, gamma and beta, and again.

    Raises:
        ValueError: for an x without spatial axes, an axis that x does not have or that is 0, a
            negative epsilon, or another shape of gamma or beta.

    Numerics:
        As `layer_normalization`.

    Example:
        >>> x = np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32")  # (N=1, T=2, C=2)
        >>> np.round(np.asarray(instance_normalization(x, epsilon=0.0)), 5).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference:
        Ulyanov, Vedaldi and Lempitsky, 2016, Instance Normalization: The Missing Ingredient for
        Fast Stylization, section 2; the backward pass derived here.
    """
    x = ops.convert_to_tensor(x)
    ndim = len(x.shape)
    check_spatial(ndim)
    channel = channel_axis(axis, ndim)
    reduced = tuple(a for a in range(1, ndim) if a != channel)
    return _standardize(x, gamma, beta, _Scheme(reduced, (channel,)), epsilon)


def check_spatial(ndim: int) -> None:
    """Refuses inputs without an axis between examples and channels.

    Raises:
        ValueError: for fewer than 3 dimensions.
    """
    if ndim < 3:
        raise ValueError(
            "Instance normalization takes its statistics over the positions of each channel, so "
            f"the input needs one or more axes for them. Received: an input of {ndim} dimensions. "
            "After a dense layer use layer normalization."
        )


# Dropout ---------------------------------------------------------------------------------------


def check_rate(rate: float) -> None:
    """Refuses a rate that is not a fraction.

    Raises:
        ValueError: for a rate outside [0, 1], or one that is not a number.
    """
    if not (is_real(rate) and 0 <= rate <= 1):
        raise ValueError(
            "Invalid value received for argument `rate`. Expected a float value between 0 and 1. "
            f"Received: rate={rate!r}. It is the fraction that is set to zero: for a keep "
            "probability p use rate=1-p."
        )


def dropout_mask(shape: Sequence[Any], rate: float, seed: Any = None) -> Array:
    """Draws which elements to keep, equations (D1) and (D2) of `dropout`.

    Args:
        shape: of the mask.
        rate: probability of False, in [0, 1].
        seed: int, or a `keras.random.SeedGenerator`, which advances with every draw. Default:
            Keras's global generator (see `keras.utils.set_random_seed`).

    Returns:
        Array of booleans. It is drawn in float32, whatever the dtype of the model.

    Raises:
        ValueError: for a rate outside [0, 1].

    Example:
        >>> mask = dropout_mask((1000, 10), rate=0.25, seed=0)
        >>> bool(abs(np.asarray(mask).mean() - 0.75) < 0.02)
        True
    """
    check_rate(rate)
    return keras.random.uniform(shape, dtype="float32", seed=seed) >= rate  # (D2)


def dropout(x: Array, mask: Array, rate: float) -> Array:
    """Sets elements whose mask is False to 0, scales the rest by 1 / (1 - rate): inverted dropout.

        (D1) keep = 1 - rate
        (D2) mask = u >= rate, with u uniform in [0, 1), so that P(mask) = keep
        (D3) y    = x / keep where mask, 0 elsewhere
        (D4) dx   = dy / keep where mask, 0 elsewhere

    For every x the expectation of y is keep (x / keep) = x: because the scaling is done in
    training, inference uses the units as they are, y = x. (Without it, inference would have to
    multiply every output by keep.) The variance of y is x^2 rate / keep. Courses often use the
    keep probability p instead of Keras's rate: p = keep.

    Args:
        x: array of any shape, of a floating dtype.
        mask: booleans of a shape that broadcasts to that of x, see `dropout_mask`. They are
            constants: no gradient flows into them.
        rate: the rate that the mask was drawn with, in [0, 1]. With rate 1, all of y is 0.

    Returns:
        y, of the shape and dtype of x; differentiable in x.

    Raises:
        ValueError: for a rate outside [0, 1], an x of integers, or a mask that does not broadcast
            to x.

    Numerics:
        Scaled in at least float32, then rounded to the dtype of x: in bfloat16, 1 / keep itself
        would be off by up to 0.4 percent. Dropped elements are exactly 0, even where x is infinite.

    Example:
        >>> mask = np.array([True, False, True, False])
        >>> np.asarray(dropout(np.array([1.0, 2.0, 3.0, 4.0], "float32"), mask, 0.5)).tolist()
        [2.0, 0.0, 6.0, 0.0]

    Reference:
        Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, 2014, Dropout, section 10
        for the scaling in training.
    """
    check_rate(rate)
    x, mask = ops.convert_to_tensor(x), ops.convert_to_tensor(mask)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
        raise ValueError(
            "Dropout scales by 1 / (1 - rate), so x must be of a floating dtype. Received: "
            f"x.dtype={x.dtype}. Cast it first, or drop out after the embedding."
        )
    check_mask_shape(tuple(mask.shape), tuple(x.shape))

    def forward(x: Array, mask: Array) -> tuple[Any, Any]:
        return dropout_forward(x, mask, rate=rate)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, None]:
        return dropout_backward(*upstream, *residuals, rate=rate), None

    (y,) = custom_vjp(forward, backward, x, mask)
    return y


def check_mask_shape(mask: Sequence[int | None], shape: Sequence[int | None]) -> None:
    """Refuses the shape of a mask that does not broadcast to `shape`; None fits everything.

    Raises:
        ValueError: for too many dimensions, or a size that is neither 1 nor that of x.

    Example:
        >>> check_mask_shape((None, 1, 10), (32, 5, 10))
    """
    if not _broadcasts(mask, shape):
        raise ValueError(
            "The mask of a dropout (`noise_shape`) must broadcast to the input: each of its sizes "
            f"is 1 or that of the input. Received: shape {tuple(mask)} for an input of shape "
            f"{tuple(shape)}. A 1 shares the mask along an axis; None stands for the input's size."
        )


def dropout_forward(x: Array, mask: Array, *, rate: float) -> tuple[tuple[Array], tuple[Array]]:
    """The forward half of `dropout`: (y,) and the residuals, the mask alone."""
    return (_drop(x, mask, rate),), (mask,)  # (D3)


def dropout_backward(dy: Array, mask: Array, *, rate: float) -> Array:
    """The backward half of `dropout`: dx, of the shape and dtype of dy."""
    return _drop(dy, mask, rate)  # (D4)


def _drop(x: Array, mask: Array, rate: float) -> Array:
    scaled = in_dtype(x, compute_dtype(x)) * (1 / (1 - rate) if rate < 1 else 0.0)
    return in_dtype(ops.where(mask, scaled, ops.zeros_like(scaled)), x.dtype)

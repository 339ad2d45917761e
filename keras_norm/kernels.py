"""Each normalization on the fastest correct implementation for its backend, shape and dtype.

    implementation   what it is
    composed         the function of the same name in `functional`: keras.ops, any backend, shape
                     and dtype; compiled by XLA on JAX
    fused            TensorFlow's FusedBatchNormV3 and its gradient, float32 and half precision;
                     `normalize`: its inference mode, narrow rows laid side by side as below
    folded           TensorFlow: sums as products of matrices with ones; rows of few channels are
                     first laid side by side, (N H W, 6) -> (N H W / 16, 96), to fill a vector
    native           PyTorch's native_batch_norm and its gradient; on request only, for on one
                     thread its float32 sums keep five digits of a mean far from 0
    products         layer and RMS normalization: backward, the sums over an example and over the
                     examples as products of matrices with gamma and with ones; x is kept
    by_channel       group and instance normalization: sums channel by channel, added up within
                     the groups afterwards, so that scale and shift are one number for each
                     example and channel, and touch x in two sweeps

`choose` and `choose_within` say which is taken; what that rests on is measured by
benchmarks/layers.py. All of them give the numbers of `functional` to rounding, in at least float32
(of a mean far from 0 the fused kernel keeps some six digits, the others seven).
The mean and variance that come back are for moving statistics: no gradient flows through them.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_norm import functional
from keras_norm.autodiff import custom_vjp

__all__ = [
    "IMPLEMENTATIONS",
    "batch_normalization",
    "choose",
    "choose_for",
    "choose_within",
    "group_normalization",
    "instance_normalization",
    "layer_normalization",
    "normalize",
    "rms_normalization",
]

Array = Any
Axis = int | Sequence[int]

# Below so many channels TensorFlow's fused kernel on a CPU loses to folding.
FEWEST_CHANNELS_FUSED = 12
# So many columns are enough for a row to fill the vector unit and the matrix kernel.
COLUMNS_FOLDED = 96
# Rows of fewer elements (all together) lose more by the fused kernel's call than they gain by the
# sweeps that it saves.
FEWEST_ELEMENTS_FUSED = 2**18


def choose(
    shape: Sequence[int | None], dtype: str, *, axis: Axis = -1, weighted: bool = False
) -> str:
    """The implementation that `batch_normalization` takes when none is asked for.

    Args:
        shape: of the input; None for what is unknown.
        dtype: of the input, such as "float32".
        axis: as in `functional.batch_normalization`.
        weighted: whether there are weights (a mask).

    Returns:
        A key of `IMPLEMENTATIONS`.

    Example:
        >>> choose((256, 32, 32, 64), "float64", weighted=True)
        'composed'
    """
    axes = functional.canonical_axes(axis, len(shape))
    channels = shape[axes[0]]
    if weighted or len(axes) > 1 or len(shape) < 2 or channels is None:
        return "composed"
    if keras.backend.backend() != "tensorflow" or axes[0] != len(shape) - 1 or _on_gpu():
        return "composed"
    known = math.prod(size or 1 for size in shape)
    large = len(shape) > 2 or known >= FEWEST_ELEMENTS_FUSED
    if large and channels >= FEWEST_CHANNELS_FUSED and dtype == "float32":
        return "fused"
    return "folded" if dtype in ("float32", "float64") else "composed"


def choose_for(x: Array, *, axis: Axis = -1, weights: Array | None = None) -> str:
    """`choose` for an array: the implementation that `batch_normalization` takes for it.

    Args:
        x, axis, weights: as in `batch_normalization`.

    Returns:
        A key of `IMPLEMENTATIONS`.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    return choose(tuple(x.shape), dtype, axis=axis, weighted=weights is not None)


def _on_gpu() -> bool:
    """Measured on CPUs only; on a GPU Keras compiles the composed one with XLA."""
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))


def batch_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    weights: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, Array]:
    """As `functional.batch_normalization`, on the implementation that `choose` names.

    Args:
        x, gamma, beta, axis, epsilon, weights: as there.
        implementation: a key of `IMPLEMENTATIONS`, to force one. Default: what `choose` names.

    Returns:
        (y, mean, variance) as there; no gradient flows through mean and variance.

    Raises:
        ValueError: as there; and for an implementation that does not exist, or that cannot do
            what is asked of it.

    Example:
        >>> x = np.array([[1.0, 10.0], [3.0, 50.0]], "float32")
        >>> y, mean, variance = batch_normalization(x, epsilon=0.0)
        >>> print(np.asarray(mean).tolist(), np.asarray(variance).tolist())
        [2.0, 30.0] [1.0, 400.0]
    """
    functional.check_epsilon(epsilon)
    x = ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    weighted = weights is not None
    if implementation is None:
        implementation = choose_for(x, axis=axis, weights=weights)
    _check(implementation, tuple(x.shape), dtype, axis, weighted)
    if implementation == "composed":
        y, mean, variance = functional.batch_normalization(
            x, gamma, beta, axis=axis, epsilon=epsilon, weights=weights
        )
        return y, ops.stop_gradient(mean), ops.stop_gradient(variance)
    return IMPLEMENTATIONS[implementation](x, gamma, beta, axis, epsilon)


def _check(
    implementation: str, shape: Sequence[int | None], dtype: str, axis: Axis, weighted: bool
) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be one of {sorted(IMPLEMENTATIONS)}, or None for the fastest. "
            f"Received: implementation={implementation!r}."
        )
    if implementation == "composed":
        return
    axes = functional.canonical_axes(axis, len(shape))
    wanted = "torch" if implementation == "native" else "tensorflow"
    last = axes == (len(shape) - 1,)
    possible = (
        not weighted
        and wanted == keras.backend.backend()
        and len(shape) >= 2
        and (last or (implementation == "native" and len(axes) == 1))
        and shape[axes[0]] is not None
        and not (implementation == "fused" and dtype == "float64")
    )
    if not possible:
        raise ValueError(
            f"implementation={implementation!r} needs the backend {wanted}, channels on one axis "
            "of known size"
            + ("" if implementation == "native" else ", the last one")
            + ", and no weights"
            + (", and no float64" if implementation == "fused" else "")
            + f". Received: backend={keras.backend.backend()!r}, shape={tuple(shape)}, "
            f"axis={axis!r}, dtype={dtype!r}, weighted={weighted}. Leave it to None."
        )


# TensorFlow: the fused kernel ------------------------------------------------------------------


def _fused(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    import tensorflow as tf

    channels = x.shape[-1]
    rows = tf.size(x) // channels
    one_image = [1, 1, rows, channels]  # any rank as one image whose pixels are the rows

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        scale = _float32_or(tf.ones, gamma, channels)
        offset = _float32_or(tf.zeros, beta, channels)
        y, mean, variance, saved_mean, saved_variance, saved = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, one_image),
            scale=scale,
            offset=offset,
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            epsilon=epsilon,
            is_training=True,
        )
        n = tf.cast(rows, "float32")
        # The kernel's second output is the unbiased variance; for one row it divides by 1.
        variance = variance * (tf.maximum(n - 1, 0) / tf.maximum(n, 1))
        # An empty batch has no statistics: NaN from the kernel, 0 by our convention.
        mean, variance = (tf.where(rows > 0, v, tf.zeros_like(v)) for v in (mean, variance))
        residuals = (x, scale, saved_mean, saved_variance, saved)
        return (tf.reshape(y, tf.shape(x)), mean, variance), residuals

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, scale, saved_mean, saved_variance, saved = residuals
        dx, dgamma, dbeta, _, _ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=tf.reshape(upstream[0], one_image),
            x=tf.reshape(x, one_image),
            scale=scale,
            reserve_space_1=saved_mean,
            reserve_space_2=saved_variance,
            reserve_space_3=saved,
            epsilon=epsilon,
            is_training=True,
        )
        return tf.reshape(dx, tf.shape(x)), dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _float32_or(default: Any, v: Array | None, channels: int) -> Array:
    return default(channels) if v is None else ops.cast(v, "float32")


# Sums as matrix products -------------------------------------------------------------------------


def _folded(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    # Where arrays are small every operation counts: vectors stay (1, C), and the means are
    # products with one row of 1 / N, so that there is nothing to reshape nor to divide.
    channels = x.shape[-1]
    folds = _folds(x.shape, channels)
    columns = folds * channels
    dtype = functional.compute_dtype(x)

    as_it_is = len(x.shape) == 2 and folds == 1

    def fold(x: Array) -> Array:
        x = ops.cast(x, dtype)
        return x if as_it_is else ops.reshape(x, (-1, columns))  # (N, ..., C) -> (M / f, f C)

    def unfold(z: Array, x: Array) -> Array:
        return z if as_it_is else ops.reshape(z, ops.shape(x))

    def mean_of(z: Array, shares: Array) -> Array:
        means = ops.matmul(shares, z)  # (1, f C)
        if folds == 1:
            return means
        return ops.sum(ops.reshape(means, (folds, channels)), axis=0, keepdims=True)  # (1, C)

    def spread(v: Array) -> Array:
        return ops.tile(v, (1, folds)) if folds > 1 else v  # (1, C) -> (1, f C)

    def elements(rows: Any) -> Array:
        """How many each channel has; 1 for none."""
        if isinstance(rows, int):
            return ops.convert_to_tensor(max(rows * folds, 1), dtype=dtype)
        return ops.maximum(ops.cast(rows * folds, dtype), 1)

    def row(v: Array) -> Array:
        return ops.cast(v, dtype)  # (C,) broadcasts as (1, C)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        z = fold(x)
        rows = ops.shape(z)[0]
        n = elements(rows)
        shares = ops.broadcast_to(1 / n, (1, rows))
        first = mean_of(z, shares)
        centered = z - spread(first)
        rest = mean_of(centered, shares)  # what rounding lost of the mean
        mean = first + rest  # (B1)
        variance = ops.maximum(mean_of(centered * centered, shares) - rest * rest, 0)  # (B2)
        inv_std = ops.rsqrt(variance + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * row(gamma)
        offset = -rest * scale if beta is None else row(beta) - rest * scale
        y = centered * spread(scale) + spread(offset)  # (B4) (B5)
        y = ops.cast(unfold(y, x), x.dtype)
        statistics = (ops.reshape(v, (channels,)) for v in (mean, variance))
        return (y, *statistics), (x, mean, inv_std, scale, n, shares)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, mean, inv_std, scale, n, shares = residuals
        dy, centered = fold(upstream[0]), fold(x) - spread(mean)
        of_dy = mean_of(dy, shares)
        of_dy_x_hat = mean_of(dy * centered, shares) * inv_std
        dbeta = ops.reshape(of_dy * n, (channels,))  # (B6)
        dgamma = ops.reshape(of_dy_x_hat * n, (channels,))  # (B7)
        along = spread(of_dy_x_hat * inv_std)
        dx = (dy - spread(of_dy) - centered * along) * spread(scale)  # (B8) (B9) (B10)
        return unfold(dx, x), dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _folds(shape: Sequence[int | None], channels: int) -> int:
    """How many rows are laid side by side: a power of 2 that divides what is known of them."""
    known = 1
    for size in shape[1:-1]:
        known *= size or 1
    folds = 1
    while folds * channels < COLUMNS_FOLDED and known % (2 * folds) == 0:
        folds *= 2
    return folds


# PyTorch: the native kernel -----------------------------------------------------------------------


def _native(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    import torch

    (channel,) = functional.canonical_axes(axis, x.ndim)
    channels = x.shape[channel]
    dtype = getattr(torch, functional.compute_dtype(x))
    if x.numel() == 0:
        zeros = torch.zeros(channels, dtype=dtype, device=x.device)
        return x.clone(), zeros, zeros.clone()
    # With momentum 1 the "running" statistics are those of the batch, the variance unbiased.
    mean = torch.zeros(channels, dtype=dtype, device=x.device)
    variance = torch.ones(channels, dtype=dtype, device=x.device)
    n = x.numel() // channels
    gamma, beta = (None if v is None else ops.convert_to_tensor(v) for v in (gamma, beta))
    y = torch.native_batch_norm(
        x.movedim(channel, 1),  # a view: (N, H, W, C) -> (N, C, H, W)
        None if gamma is None else gamma.to(dtype),
        None if beta is None else beta.to(dtype),
        mean,
        variance,
        True,
        1.0,
        epsilon,
    )[0].movedim(1, channel)
    # One element: 0, and NaN where it is not finite, as the others.
    variance = 0 * mean if n == 1 else variance * ((n - 1) / n)
    return y, mean, variance


IMPLEMENTATIONS: dict[str, Any] = {
    "composed": functional.batch_normalization,
    "fused": _fused,
    "folded": _folded,
    "native": _native,
}
"""Those of `batch_normalization` by name."""


# By given statistics: batch normalization in inference ------------------------------------------


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    implementation: str | None = None,
) -> Array:
    """As `functional.normalize`, on the implementation that `choose_within` names.

    Args:
        x, mean, variance, gamma, beta, axis, epsilon: as there.
        implementation: "composed" or "fused". Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> y = normalize(np.array([[5.0]], "float32"), np.array([3.0]), np.array([4.0]), epsilon=0)
        >>> float(y[0, 0])
        1.0
    """
    x = ops.convert_to_tensor(x)
    if _chosen("normalize", x, axis, implementation) == "composed":
        return functional.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    functional.check_epsilon(epsilon)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        x: Array = arrays[0]
        mean, variance = map(_float32, arrays[1:3])
        gamma, beta = (None if v is None else _float32(v) for v in arrays[3:])
        y = _fused_inference(x, mean, variance, gamma, beta, epsilon)
        return (y,), (x, mean, ops.rsqrt(variance + epsilon), gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        return functional.normalize_backward(upstream[0], *residuals, axis=axis)

    (y,) = custom_vjp(forward, backward, x, mean, variance, gamma, beta)
    return y


def _float32(v: Array) -> Array:
    return ops.cast(v, "float32")


def _fused_inference(
    x: Array, mean: Array, variance: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> Array:
    import tensorflow as tf

    channels = x.shape[-1]
    folds = _folds(x.shape, channels) if len(x.shape) > 2 else 1
    gamma = tf.ones(channels) if gamma is None else gamma
    beta = tf.zeros(channels) if beta is None else beta
    if folds > 1:
        mean, variance, gamma, beta = (tf.tile(v, [folds]) for v in (mean, variance, gamma, beta))
    y = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, [1, 1, -1, folds * channels]),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )[0]
    return tf.reshape(y, tf.shape(x))


# Within each example ------------------------------------------------------------------------------

_FAST_WITHIN = {
    "normalize": "fused",
    "layer_normalization": "products",
    "rms_normalization": "products",
    "group_normalization": "by_channel",
    "instance_normalization": "by_channel",
}


def choose_within(
    function: str, shape: Sequence[int | None], dtype: str, *, axis: Axis = -1
) -> str:
    """The implementation that a function other than `batch_normalization` takes by itself.

    Args:
        function: "normalize", "layer_normalization", "rms_normalization", "group_normalization"
            or "instance_normalization".
        shape: of the input; None for what is unknown.
        dtype: of the input, such as "float32".
        axis: as the function takes it.

    Returns:
        "composed", or the faster one: "fused", "products" or "by_channel".

    Example:
        >>> choose_within("layer_normalization", (32, 128, 512), "float16")
        'composed'
    """
    fast = _FAST_WITHIN[function]
    if not _possible(fast, shape, dtype, axis) or keras.backend.backend() != "tensorflow":
        return "composed"
    if _on_gpu():
        return "composed"
    if fast == "fused":
        known = math.prod(size or 1 for size in shape)
        if dtype != "float32" or (len(shape) == 2 and known < FEWEST_ELEMENTS_FUSED):
            return "composed"
    return fast


def _possible(fast: str, shape: Sequence[int | None], dtype: str, axis: Axis) -> bool:
    """Whether it can be done at all, on this backend, quickly or not."""
    axes = functional.canonical_axes(axis, len(shape))
    last = axes == (len(shape) - 1,)
    if fast == "fused":
        tensorflow = keras.backend.backend() == "tensorflow"
        half = ("float16", "bfloat16")
        known = last and len(shape) > 1 and shape[-1] is not None
        return known and tensorflow and dtype in ("float32", *half)
    if dtype not in ("float32", "float64"):
        return False
    if fast == "by_channel":
        return last and len(shape) > 2 and shape[-1] is not None
    trailing = axes == tuple(range(len(shape) - len(axes), len(shape)))
    return trailing and len(axes) < len(shape) and all(shape[a] is not None for a in axes)


def _chosen(function: str, x: Array, axis: Axis, implementation: str | None) -> str:
    shape, dtype = tuple(x.shape), keras.backend.standardize_dtype(x.dtype)
    if implementation is None:
        return choose_within(function, shape, dtype, axis=axis)
    fast = _FAST_WITHIN[function]
    if implementation not in ("composed", fast):
        raise ValueError(
            f"`implementation` of {function} must be 'composed' or {fast!r}, or None for the "
            f"faster one. Received: implementation={implementation!r}."
        )
    if implementation == fast and not _possible(fast, shape, dtype, axis):
        raise ValueError(
            f"implementation={fast!r} needs "
            + {
                "fused": "TensorFlow, the channels on the last axis, and float32 or half precision",
                "products": "known sizes on `axis`, the last axes, and float32 or float64",
                "by_channel": "the channels on the last of >= 3 axes, and float32 or float64",
            }[fast]
            + f". Received: shape={shape}, axis={axis!r}, dtype={dtype!r}. Leave it to None."
        )
    return implementation


def layer_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    rms_scaling: bool = False,
    implementation: str | None = None,
) -> Array:
    """As `functional.layer_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, beta, axis, epsilon, rms_scaling: as there. With `rms_scaling` always composed.
        implementation: "composed" or "products". Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> y = layer_normalization(np.array([[1.0, 3.0]], "float32"), epsilon=0.0)
        >>> np.round(np.asarray(y), 5).tolist()
        [[-1.0, 1.0]]
    """
    x = ops.convert_to_tensor(x)
    chosen = _chosen("layer_normalization", x, axis, implementation)
    if chosen == "composed" or rms_scaling:
        return functional.layer_normalization(
            x, gamma, beta, axis=axis, epsilon=epsilon, rms_scaling=rms_scaling
        )
    return _products(x, gamma, beta, len(functional.canonical_axes(axis, x.ndim)), epsilon, True)


def rms_normalization(
    x: Array,
    gamma: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> Array:
    """As `functional.rms_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, axis, epsilon: as there.
        implementation: "composed" or "products". Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> y = rms_normalization(np.array([[3.0, 4.0]], "float32"), epsilon=0.0)
        >>> print(np.round(np.asarray(y), 4))
        [[0.8485 1.1314]]
    """
    x = ops.convert_to_tensor(x)
    if _chosen("rms_normalization", x, axis, implementation) == "composed":
        return functional.rms_normalization(x, gamma, axis=axis, epsilon=epsilon)
    return _products(x, gamma, None, len(functional.canonical_axes(axis, x.ndim)), epsilon, False)


def _products(
    x: Array, gamma: Array | None, beta: Array | None, axes: int, epsilon: float, centers: bool
) -> Array:
    """Layer normalization (RMS without `centers`) over the last `axes` axes, rows by columns."""
    functional.check_epsilon(epsilon)
    d = math.prod(x.shape[-axes:])
    dtype = x.dtype

    as_it_is = axes == 1 and len(x.shape) == 2

    def rows_of(v: Array) -> Array:
        return v if as_it_is else ops.reshape(v, (-1, d))

    def like(x: Array, rows: Array) -> Array:
        return rows if as_it_is else ops.reshape(rows, ops.shape(x))

    def row(v: Array) -> Array:
        return ops.reshape(ops.cast(v, dtype), (1, d))

    def mean(z: Array) -> Array:
        return ops.sum(z, axis=1, keepdims=True) / max(d, 1)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        z, first = rows_of(x), None
        if centers:
            first = mean(z)
            z = z - first
            rest = mean(z)  # what rounding lost of (L1)
            z, first = z - rest, first + rest
        inv_std = ops.rsqrt(mean(z * z) + epsilon)  # (L2) (L3), (R1) (R2)
        y = z * inv_std  # (L4) (R3)
        y = y if gamma is None else y * row(gamma)  # (R4)
        y = y if beta is None else y + row(beta)  # (L5)
        return (like(x, y),), (x, inv_std, gamma, first)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, inv_std, gamma, first = residuals
        dy, z = rows_of(upstream[0]), rows_of(x)
        z = z if first is None else z - first  # x_hat / inv_std
        # `@`, for `ops.matmul` rounds float64 to float32 on PyTorch.
        dy_z = dy * z
        sizes = x.shape[-axes:]
        dbeta = ops.reshape(ops.ones_like(ops.transpose(inv_std)) @ dy, sizes)  # (L6)
        dgamma = ops.reshape(ops.transpose(inv_std) @ dy_z, sizes)  # (L7) (R5)
        g = ops.ones((1, d), dtype=dtype) if gamma is None else row(gamma)
        share = ops.reshape(g / max(d, 1), (d, 1))
        along = inv_std * inv_std * (dy_z @ share)  # mean of g dy x_hat over each example
        dx = (dy if gamma is None else dy * g) - z * along
        if centers:
            dx = dx - dy @ share
        return like(upstream[0], dx * inv_std), dgamma, dbeta  # (L9) (R6)

    (y,) = custom_vjp(forward, backward, x, gamma, beta)
    return y


def group_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    groups: int | None = 32,
    axis: int = -1,
    epsilon: float = 1e-3,
    implementation: str | None = None,
) -> Array:
    """As `functional.group_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, beta, groups, axis, epsilon: as there.
        implementation: "composed" or "by_channel". Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> x = np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32")  # (N=1, T=2, C=2)
        >>> y = group_normalization(x, groups=2, epsilon=0.0, implementation="by_channel")
        >>> np.round(np.asarray(y), 5).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    x = ops.convert_to_tensor(x)
    functional.channel_axis(axis, len(x.shape))
    if _chosen("group_normalization", x, axis, implementation) == "composed":
        return functional.group_normalization(
            x, gamma, beta, groups=groups, axis=axis, epsilon=epsilon
        )
    groups = functional.number_of_groups(groups, x.shape[-1])
    return _by_channel(x, gamma, beta, groups, epsilon)


def instance_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    implementation: str | None = None,
) -> Array:
    """As `functional.instance_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, beta, axis, epsilon: as there.
        implementation: "composed" or "by_channel". Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> x = np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32")  # (N=1, T=2, C=2)
        >>> np.round(np.asarray(instance_normalization(x, epsilon=0.0)), 5).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    x = ops.convert_to_tensor(x)
    functional.check_spatial(len(x.shape))
    functional.channel_axis(axis, len(x.shape))
    if _chosen("instance_normalization", x, axis, implementation) == "composed":
        return functional.instance_normalization(x, gamma, beta, axis=axis, epsilon=epsilon)
    return _by_channel(x, gamma, beta, x.shape[-1], epsilon)


def _by_channel(
    x: Array, gamma: Array | None, beta: Array | None, groups: int, epsilon: float
) -> Array:
    functional.check_epsilon(epsilon)
    dtype, channels = x.dtype, x.shape[-1]
    positions = tuple(range(1, len(x.shape) - 1))
    per_group = channels // groups

    def elements(x: Array) -> Any:
        sizes = ops.shape(x)
        d = math.prod(sizes[a] for a in positions) * per_group
        return max(d, 1) if isinstance(d, int) else ops.cast(d, dtype)

    def mean(sums: Array, d: Any) -> Array:
        """Sums of each channel (N, 1, 1, C) -> the mean over its group, of the same shape."""
        if per_group > 1:
            of_group = ops.sum(ops.reshape(sums, (-1, groups, per_group)), axis=2, keepdims=True)
            spread = of_group * ops.ones((1, 1, per_group), dtype=dtype)
            sums = ops.reshape(spread, (-1, *[1] * len(positions), channels))
        return sums / d

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        d = elements(x)
        first = mean(functional.sum_in_stages(x, positions), d)
        centered = x - first
        rest = mean(functional.sum_in_stages(centered, positions), d)  # what rounding lost
        squares = functional.sum_in_stages(centered * centered, positions)
        variance = mean(squares, d) - rest * rest
        variance = ops.where(variance < 0, ops.zeros_like(variance), variance)
        inv_std = ops.rsqrt(variance + epsilon)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        offset = -rest * scale if beta is None else ops.cast(beta, dtype) - rest * scale
        return (centered * scale + offset,), (x, first, rest, inv_std, gamma)  # (GN2) (GN3)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, first, rest, inv_std, gamma = residuals
        (dy,) = upstream
        centered = x - first
        d = elements(dy)
        s = functional.sum_in_stages(dy, positions)  # of each example and channel, (N, 1, 1, C)
        t = (functional.sum_in_stages(dy * centered, positions) - rest * s) * inv_std
        over = tuple(range(len(dy.shape) - 1))
        dbeta, dgamma = ops.sum(s, axis=over), ops.sum(t, axis=over)  # (GN4)
        if gamma is not None:
            s, t = s * ops.cast(gamma, dtype), t * ops.cast(gamma, dtype)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        a = -inv_std * inv_std * mean(t, d)
        b = -inv_std * mean(s, d) - rest * a
        return dy * scale + (centered * a + b), dgamma, dbeta  # (GN5)

    (y,) = custom_vjp(forward, backward, x, gamma, beta)
    return y

"""Batch normalization on the fastest correct implementation for its backend, shape and dtype.

    implementation   what it is
    composed         `functional.batch_normalization`: keras.ops, any backend, shape and dtype
    fused            TensorFlow's FusedBatchNormV3 and its gradient, float32 and half precision
    folded           TensorFlow: sums as products of matrices with ones; rows of few channels are
                     first laid side by side, (N H W, 6) -> (N H W / 16, 96), to fill a vector
    native           PyTorch's native_batch_norm and its gradient; on request only, for on one
                     thread its float32 sums keep five digits of a mean far from 0

`choose` is the table of which is taken; what it rests on is measured by benchmarks/layers.py.
All of them give the numbers of `functional.batch_normalization` to rounding, in at least float32
(of a mean far from 0 the fused kernel keeps some six digits, composed and folded seven).
The mean and variance that come back are for moving statistics: no gradient flows through them.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_norm import functional
from keras_norm.autodiff import custom_vjp

__all__ = ["IMPLEMENTATIONS", "batch_normalization", "choose", "choose_for"]

Array = Any
Axis = int | Sequence[int]

# Below so many channels TensorFlow's fused kernel on a CPU loses to folding.
FEWEST_CHANNELS_FUSED = 12
# So many columns are enough for a row to fill the vector unit and the matrix kernel.
COLUMNS_FOLDED = 96


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
    if len(shape) > 2 and channels >= FEWEST_CHANNELS_FUSED and dtype == "float32":
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
    channels = x.shape[-1]
    folds = _folds(x.shape, channels)
    columns = folds * channels
    dtype = functional.compute_dtype(x)

    def fold(x: Array) -> Array:
        return ops.reshape(ops.cast(x, dtype), (-1, columns))  # (N, ..., C) -> (M / f, f C)

    def sum_rows(z: Array) -> Array:
        ones = ops.ones((1, ops.shape(z)[0]), dtype=dtype)
        return ops.sum(ops.reshape(ops.matmul(ones, z), (folds, channels)), axis=0)  # -> (C,)

    def spread(v: Array) -> Array:
        return ops.tile(v, (folds,)) if folds > 1 else v  # (C,) -> (f C,)

    def share_of(z: Array) -> Array:
        return 1 / ops.maximum(ops.cast(ops.shape(z)[0] * folds, dtype), 1)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        z = fold(x)
        share = share_of(z)
        first = sum_rows(z) * share
        centered = z - spread(first)
        rest = sum_rows(centered) * share
        mean = first + rest  # (B1)
        squares = sum_rows(centered * centered) * share
        variance = ops.maximum(squares - rest * rest, 0)  # (B2)
        inv_std = ops.rsqrt(variance + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        offset = -rest * scale if beta is None else ops.cast(beta, dtype) - rest * scale
        y = centered * spread(scale) + spread(offset)  # (B4) (B5)
        y = ops.cast(ops.reshape(y, ops.shape(x)), x.dtype)
        return (y, mean, variance), (x, mean, inv_std, scale)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, mean, inv_std, scale = residuals
        dy, centered = fold(upstream[0]), fold(x) - spread(mean)
        share = share_of(dy)
        dbeta = sum_rows(dy)  # (B6)
        dgamma = sum_rows(dy * centered) * inv_std  # (B7)
        a = -scale * dbeta * share  # (B8)
        b = -scale * inv_std * dgamma * share  # (B9), with the 2 of (B10)
        dx = dy * spread(scale) + (centered * spread(b) + spread(a))  # (B10)
        return ops.reshape(dx, ops.shape(x)), dgamma, dbeta

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
    variance = torch.zeros_like(variance) if n == 1 else variance * ((n - 1) / n)
    return y, mean, variance


IMPLEMENTATIONS: dict[str, Any] = {
    "composed": functional.batch_normalization,
    "fused": _fused,
    "folded": _folded,
    "native": _native,
}
"""The implementations by name."""

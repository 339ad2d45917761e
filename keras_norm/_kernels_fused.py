"""TensorFlow's fused kernel of batch normalization, in training and in inference."""

import functools
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_norm import autodiff, functional
from keras_norm._arrays import in_dtype
from keras_norm._kernels_common import FARTHEST_MEAN, folds_of, on_gpu
from keras_norm.autodiff import custom_vjp

Array = Any
Axis = int | Sequence[int]


def batch(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    """(y, mean, variance) of batch normalization, the channels on the last axis."""
    import tensorflow as tf

    channels = x.shape[-1]
    rows = tf.size(x) // channels
    one_image = [1, 1, rows, channels]  # any rank as one image whose pixels are the rows
    normalized = _forward(len(x.shape), epsilon)
    if autodiff.in_graph():
        normalized = _traced_forward(tuple(x.shape), epsilon)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        given = (None if v is None else tf.identity(v) for v in (x, gamma, beta))  # see `compiled`
        y, mean, variance, *saved = normalized(*given)
        return (y, mean, variance), (x, *saved)

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


@functools.lru_cache(maxsize=1024)
def _traced_forward(shape: tuple[int | None, ...], epsilon: float) -> Any:
    """`_forward`, traced once for arrays of one shape and not anew in each layer of a net."""
    import tensorflow as tf

    return tf.function(_forward(len(shape), epsilon), autograph=False)


@functools.lru_cache(maxsize=1024)
def _forward(rank: int, epsilon: float) -> Any:
    """(x, gamma, beta) -> (y, mean, variance, ...): what the gradient needs besides x."""
    import tensorflow as tf

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Array, ...]:
        channels = x.shape[-1]
        rows = tf.size(x) // channels
        scale = _float32_or(tf.ones, gamma, channels)
        offset = _float32_or(tf.zeros, beta, channels)
        y, mean, variance, saved_mean, saved_variance, saved = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, [1, 1, rows, channels]),
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
        y = tf.reshape(y, tf.shape(x))
        if not on_gpu():
            far = tf.reduce_any(mean * mean > FARTHEST_MEAN**2 * (variance + epsilon))
            y, mean, variance = tf.cond(
                far, lambda: exact(x, gamma, beta), lambda: (y, mean, variance)
            )
            saved_mean, saved_variance = mean, variance
        return y, mean, variance, scale, saved_mean, saved_variance, saved

    def exact(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Array, Array, Array]:
        options: dict[str, Any] = {"axis": rank - 1, "epsilon": epsilon}
        return functional.batch_normalization_forward(x, gamma, beta, **options)[0]

    return normalized


def _float32_or(default: Any, v: Array | None, channels: int) -> Array:
    return default(channels) if v is None else in_dtype(v, "float32")


def inference(
    x: Array, mean: Array, variance: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> Array:
    """y by given statistics, the channels on the last axis."""
    import tensorflow as tf

    channels, columns = x.shape[-1], columns_of(x.shape)
    folds = columns // channels
    gamma = tf.ones(channels) if gamma is None else gamma
    beta = tf.zeros(channels) if beta is None else beta
    if folds > 1:
        mean, variance, gamma, beta = (tf.tile(v, [folds]) for v in (mean, variance, gamma, beta))
    y = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, [1, 1, -1, columns]),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )[0]
    return tf.reshape(y, tf.shape(x))


def columns_of(shape: Sequence[Any]) -> int:
    """Of the rows that inference mode gets: channels, side by side where images have few."""
    channels: int = shape[-1]
    return channels * (folds_of(shape, channels) if len(shape) > 2 else 1)

"""TensorFlow's fused kernel of batch normalization, in training and in inference."""

import functools
import math
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
    """(y, mean, variance) of batch normalization, with the channels on the last axis."""
    import tensorflow as tf

    channels = x.shape[-1]
    one_image = [1, 1, -1, channels]  # any rank as one image whose pixels are the rows
    normalized = _traced_forward(epsilon) if autodiff.in_graph() else _forward(epsilon)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        scale = _float32_or(tf.ones, gamma, channels)
        offset = _float32_or(tf.zeros, beta, channels)
        y, mean, variance, *saved = normalized(_as_image(x), scale, offset)
        for v in (mean, variance):
            v.set_shape([channels])
        return (tf.reshape(y, tf.shape(x)), mean, variance), (x, scale, *saved)

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


@functools.lru_cache(maxsize=64)
def _traced_forward(epsilon: float) -> Any:
    """`_forward`, traced once for all sizes instead of once per layer of a net."""
    import tensorflow as tf

    program = tf.function(_forward(epsilon), autograph=False)

    def call(x: Array, scale: Array, offset: Array) -> Any:
        specs = (
            tf.TensorSpec([1, None, None, None], x.dtype),
            *[tf.TensorSpec([None], "float32")] * 2,
        )
        # As operations (x is one): in the gradient of `tf.cond`, a function call cannot use what
        # the branch has computed.
        return program.get_concrete_function(*specs)(x, tf.identity(scale), tf.identity(offset))

    return call


@functools.lru_cache(maxsize=64)
def _forward(epsilon: float) -> Any:
    """(x, scale, offset) -> (y, mean, variance, ...): the rest is for the gradient, with x, scale.

    x: (1, N, P, C), and so is y; scale, offset: (C,).
    """
    import tensorflow as tf

    def normalized(x: Array, scale: Array, offset: Array) -> tuple[Array, ...]:
        rows = tf.size(x) // tf.size(scale)
        y, mean, variance, saved_mean, saved_variance, saved = tf.raw_ops.FusedBatchNormV3(
            x=x,
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
        if not on_gpu():
            far = tf.reduce_any(mean * mean > FARTHEST_MEAN**2 * (variance + epsilon))
            exactly = apart if autodiff.in_graph() else exact
            y, mean, variance = tf.cond(
                far, lambda: exactly(x, scale, offset), lambda: (y, mean, variance)
            )
            saved_mean, saved_variance = mean, variance
        return y, mean, variance, saved_mean, saved_variance, saved

    def exact(x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array]:
        (y, mean, variance), _ = functional.batch_normalization_forward(
            tf.squeeze(x, 0), scale, offset, epsilon=epsilon
        )
        return tf.expand_dims(y, 0), mean, variance

    # Not inlined, so that TensorFlow spends no time on a branch that is rarely taken.
    apart = tf.function(exact, autograph=False, experimental_attributes={"_noinline": True})

    return normalized


def _as_image(x: Array) -> Array:
    """(N, ..., C) -> (1, N, P, C), an image of any rank."""
    import tensorflow as tf

    positions, channels = x.shape[1:-1], x.shape[-1]
    if None not in positions and math.prod(positions) > 0:
        return tf.reshape(x, [1, -1, math.prod(positions), channels])
    sizes = tf.shape(x)
    return tf.reshape(x, [1, sizes[0], tf.reduce_prod(sizes[1:-1]), channels])


def _float32_or(default: Any, v: Array | None, channels: int) -> Array:
    return default(channels) if v is None else in_dtype(v, "float32")


def inference(
    x: Array, mean: Array, variance: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> Array:
    """y by given statistics, with the channels on the last axis."""
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
    """The columns of the rows in inference mode: channels, side by side if images have few."""
    channels: int = shape[-1]
    return channels * (folds_of(shape, channels) if len(shape) > 2 else 1)

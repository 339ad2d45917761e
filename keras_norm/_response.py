"""Filter response normalization: equations (F1) to (F8) of `research`."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import initializers, ops

from keras_norm import functional
from keras_norm.autodiff import custom_vjp
from keras_norm.layers import _ByChannel

__all__ = ["FilterResponseNormalization", "filter_response_normalization"]

Array = Any


def filter_response_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    threshold: Array | None = None,
    learned_epsilon: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
) -> Array:
    """Divides each channel of each example by its root mean square, equations (F1) to (F8).

    Args:
        x: array of any rank >= 3, of a floating dtype; (N, T, C), (N, H, W, C), ...
        gamma, beta: scale and offset of each channel, (C,). Default: none.
        threshold: tau, (C,): the thresholded linear unit y -> max(y, tau). Default: none.
        learned_epsilon: (C,), whose absolute value is added to epsilon. Default: none.
        axis: the axis of the channels, not 0. Default: the last.
        epsilon: >= 0, added to the mean square. Default: 1e-6.

    Returns:
        y, of the shape and dtype of x; twice differentiable in every array that was given.

    Raises:
        ValueError: for an x without positions, and a negative epsilon.

    Numerics:
        Accumulated in at least float32.

    Example:
        >>> x = np.array([[[3.0, 1.0], [-3.0, 1.0]]], "float32")  # (N=1, T=2, C=2)
        >>> ops.convert_to_numpy(filter_response_normalization(x)).round(3).tolist()
        [[[1.0, 1.0], [-1.0, 1.0]]]

    Reference:
        Singh and Krishnan, 2020, sections 3.1 and 3.2.
    """
    functional.check_epsilon(epsilon)
    x = ops.convert_to_tensor(x)
    ndim = len(x.shape)
    functional.check_spatial(ndim)
    channel = functional.channel_axis(axis, ndim)
    positions = tuple(a for a in range(1, ndim) if a != channel)
    layout = [-1 if a == channel else 1 for a in range(ndim)]
    dtype = functional.compute_dtype(x)

    def along(v: Array) -> Array:
        return ops.reshape(ops.cast(v, dtype), layout)  # (C,) -> (1, 1, C)

    def per_channel(v: Array) -> Array:
        v = ops.sum(v, axis=positions, keepdims=True)
        return ops.reshape(ops.sum(v, axis=0), [-1])

    def response(v: Array, inv: Array, gamma: Any, beta: Any) -> Array:
        y = v * (inv if gamma is None else inv * along(gamma))
        return y if beta is None else y + along(beta)

    def forward(x: Array, gamma: Any, beta: Any, tau: Any, learned: Any) -> tuple[Any, Any]:
        v = ops.cast(x, dtype)
        mean_square = ops.sum(v * v, axis=positions, keepdims=True) / _count(x, positions, dtype)
        added = epsilon if learned is None else epsilon + along(ops.abs(learned))
        inv = ops.rsqrt(mean_square + added)  # (F1) (F2)
        y = response(v, inv, gamma, beta)  # (F3)
        y = y if tau is None else ops.where(y > along(tau), y, along(tau))  # (F4)
        return (ops.cast(y, x.dtype),), (x, inv, gamma, beta, tau, learned)

    def backward(residuals: Any, upstream: Any) -> tuple[Array | None, ...]:
        x, inv, gamma, beta, tau, learned = residuals
        v, dy, dtau, dlearned = ops.cast(x, dtype), ops.cast(upstream[0], dtype), None, None
        if tau is not None:
            passed = response(v, inv, gamma, beta) > along(tau)
            zero = ops.zeros_like(dy)
            dtau = per_channel(ops.where(passed, zero, dy))
            dy = ops.where(passed, dy, zero)  # (F5)
        dgamma, dbeta = per_channel(dy * v * inv), per_channel(dy)
        g = dy if gamma is None else dy * along(gamma)
        s = ops.sum(g * v, axis=positions, keepdims=True)  # (F6)
        cube = inv * inv * inv * s
        dx = inv * g - v * (cube / _count(x, positions, dtype))  # (F7)
        if learned is not None:
            dlearned = -ops.sign(ops.cast(learned, dtype)) * per_channel(cube) / 2  # (F8)
        return dx, dgamma, dbeta, dtau, dlearned

    (y,) = custom_vjp(forward, backward, x, gamma, beta, threshold, learned_epsilon)
    return y


def _count(x: Array, axes: Sequence[int], dtype: str) -> Any:
    shape = ops.shape(x)
    return functional.at_least_one(math.prod(shape[a] for a in axes), dtype)


# The layer ---------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_norm")
class FilterResponseNormalization(_ByChannel):
    """Divides each channel of each example by its root mean square; then a learned threshold.

    In training and inference alike, equations (F1) to (F4) of `keras_norm.research`:

        y = gamma x / sqrt(mean of x^2 over the positions + epsilon) + beta
        z = max(y, tau)

    The second line is the thresholded linear unit, the activation that this normalization needs:
    because no mean is subtracted, a ReLU's fixed threshold at 0 may cut off all of a channel, or
    nothing. Use no other activation after the layer. The gradient is the hand-derived one.

    When it helps: in convolutional nets with small batches, down to 1, where batch normalization
    fails; it depends on no other example and has no moving statistics. The published figures need
    a slow warm-up of the learning rate. What it costs: about as much as `InstanceNormalization`;
    the threshold replaces the activation.

    Args:
        axis: int, the axis of the channels, not 0. Default: -1.
        epsilon: float >= 0, added to the mean square. Default: 1e-6.
        threshold: bool, whether there is a tau. Default: True.
        learn_epsilon: bool, whether there is a learned epsilon for each channel, initially 1e-4,
            whose absolute value is added: for feature maps with few positions, above all one.
            Default: False.
        threshold_initializer: Keras initializer of tau. Default: zeros.
        **kwargs: `center`, `scale`, `beta_initializer`, `gamma_initializer`, `beta_regularizer`,
            `gamma_regularizer`, `beta_constraint`, `gamma_constraint` as in
            `InstanceNormalization`; and `name`, `dtype`, `trainable` of every Keras layer.

    Call arguments:
        inputs: array of any rank >= 3; (N, T, C), (N, H, W, C), ... A Keras mask passes through
            unchanged; the positions that it masks count in the mean square.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,), threshold (C,), learned_epsilon (C,), those requested: trained.

    Raises:
        ValueError: for inputs without positions, an axis that the inputs do not have or that is
            0, a negative epsilon, an integer or complex dtype, inputs whose channels are unknown.

    Example:
        >>> layer = FilterResponseNormalization()
        >>> y = layer(np.array([[[3.0, 1.0], [-3.0, 1.0]]], "float32"))  # (N=1, T=2, C=2)
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[[1.0, 1.0], [0.0, 1.0]]]

    Numerics:
        Sums and parameters are at least float32; under a mixed policy, float32 inputs are
        normalized in float32. Gradients within 1e-9 of numerical ones in float64.

    Reference:
        Singh and Krishnan, 2020, Filter Response Normalization Layer: Eliminating Batch
        Dependence in the Training of Deep Neural Networks, section 3.
    """

    def __init__(
        self,
        axis: int = -1,
        epsilon: float = 1e-6,
        threshold: bool = True,
        learn_epsilon: bool = False,
        threshold_initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(axis, epsilon, **kwargs)
        self.threshold = threshold
        self.learn_epsilon = learn_epsilon
        self.threshold_initializer = initializers.get(threshold_initializer)
        self.tau: Any = None
        self.learned_epsilon: Any = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the parameters, one for each channel."""
        super().build(input_shape)
        shape = functional.known_sizes(input_shape, (self.axis,))
        options = {"shape": shape, "autocast": False}
        if self.threshold:
            initializer = self.threshold_initializer
            self.tau = self.add_weight(name="threshold", initializer=initializer, **options)
        if self.learn_epsilon:
            initializer = initializers.Constant(1e-4)
            self.learned_epsilon = self.add_weight(
                name="learned_epsilon", initializer=initializer, **options
            )

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        super()._check_shape(input_shape)
        functional.check_spatial(len(input_shape))

    def call(self, inputs: Array) -> Array:
        """Normalizes; see the class."""
        y = filter_response_normalization(
            self._floating(inputs),
            self.gamma,
            self.beta,
            self.tau,
            self.learned_epsilon,
            axis=self.axis,
            epsilon=self.epsilon,
        )
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {"threshold": self.threshold, "learn_epsilon": self.learn_epsilon}
        config["threshold_initializer"] = initializers.serialize(self.threshold_initializer)
        return {**super().get_config(), **config}

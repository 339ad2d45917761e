"""The Keras layers: variables, moving statistics, masks, dtype policy, config; no mathematics.

Import these in place of `keras.layers`' of the same name:

    from keras_norm.layers import BatchNormalization
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_norm import functional

__all__ = ["BatchNormalization"]

Array = Any


def _check_dtype(layer: keras.layers.Layer) -> None:
    """Normalization divides: the layer must compute in a floating dtype."""
    for what, dtype in (("compute", layer.compute_dtype), ("variable", layer.variable_dtype)):
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(
                f"{type(layer).__name__} divides by a standard deviation, so its {what} dtype "
                f"must be a floating one. Received: dtype={dtype!r}. Use 'float32', 'float64', "
                "'mixed_float16' or 'mixed_bfloat16'."
            )


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"`{name}` is the weight of the old value in a moving average and must lie in "
            f"[0, 1). Received: {name}={value!r}. Keras's default is 0.99; PyTorch's 0.1 is "
            "the weight of the new value, 0.9 here."
        )


@keras.saving.register_keras_serializable(package="keras_norm")
class BatchNormalization(keras.layers.Layer):
    """Normalizes each channel by the mean and variance of the batch, then scales and shifts it.

    In training, equations (B1) to (B5) of `keras_norm.functional`:

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with the mean and the biased variance of the batch, which also move the moving statistics:

        (B11)  moving_mean     <- momentum moving_mean     + (1 - momentum) mean
        (B12)  moving_variance <- momentum moving_variance + (1 - momentum) variance

    In inference the moving statistics take the place of the batch's. The gradient is the
    hand-derived one, (B6) to (B10).

    Args:
        axis: int, the axis of the channels: -1 for channels last, 1 for images with channels
            first. Default: -1.
        momentum: float in [0, 1), weight of the old value in the moving statistics (PyTorch's
            momentum is its complement). Default: 0.99.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True.
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        moving_mean_initializer, moving_variance_initializer: likewise.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 1; (N, C), (N, H, W, C), ...
        training: bool. True normalizes by the batch and updates the moving statistics, unless
            `trainable` is False: a frozen layer is in inference mode, as in Keras.
        mask: bool array of shape `inputs.shape[:-1]`, or any that broadcasts to the inputs:
            what is False does not count in the statistics (it is normalized all the same).

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. moving_mean (C,), moving_variance (C,): updated in every
        call with `training=True` while the layer is trainable. The order of `get_weights()` is
        gamma, beta, moving_mean, moving_variance, as in `keras.layers`.

    Raises:
        ValueError: for a momentum outside [0, 1), a negative epsilon, an axis that the inputs do
            not have, an integer or complex dtype, inputs whose channels are unknown.

    Example:
        >>> layer = BatchNormalization(momentum=0.9, epsilon=1e-5)
        >>> x = np.array([[1.0, 10.0], [3.0, 50.0]], "float32")
        >>> y = layer(x, training=True)
        >>> np.round(np.asarray(y), 3).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> [np.round(v, 3).tolist() for v in layer.get_weights()[2:]]
        [[0.2, 3.0], [1.0, 40.9]]

    Numerics:
        Statistics are accumulated, and variables kept, in at least float32; float16 and
        bfloat16 inputs give outputs of the same dtype. Agrees with `keras.layers` after 100
        training steps to 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Ioffe and Szegedy, 2015, Batch Normalization, algorithms 1 and 2 (the paper's inference
        uses the unbiased variance; Keras and this layer the biased one).
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_dtype(self)
        _check_fraction("momentum", momentum)
        functional.check_epsilon(epsilon)
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.supports_masking = True
        self.gamma = None
        self.beta = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the variables, of the shape of the channels."""
        axes = functional.canonical_axes(self.axis, len(input_shape))
        shape = tuple(input_shape[a] for a in axes)
        if None in shape:
            raise ValueError(
                "The size of the normalized axis must be known when the layer is built. "
                f"Received: input_shape={tuple(input_shape)}, axis={self.axis}. Give the model "
                "an Input with the number of channels."
            )
        if self.scale:
            self.gamma = self._add_channel_weight("gamma", shape, trainable=True)
        if self.center:
            self.beta = self._add_channel_weight("beta", shape, trainable=True)
        self.moving_mean = self._add_channel_weight("moving_mean", shape, trainable=False)
        self.moving_variance = self._add_channel_weight("moving_variance", shape, trainable=False)
        self.input_spec = keras.layers.InputSpec(
            ndim=len(input_shape), axes={a: input_shape[a] for a in axes}
        )

    def _add_channel_weight(self, name: str, shape: tuple[int | None, ...], trainable: bool) -> Any:
        # autocast=False: under a mixed policy the float32 values themselves are used.
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer", None),
            constraint=getattr(self, f"{name}_constraint", None),
            trainable=trainable,
            autocast=False,
        )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        functional.canonical_axes(self.axis, len(input_shape))
        return tuple(input_shape)

    def call(self, inputs: Array, training: bool | None = None, mask: Array | None = None) -> Array:
        """Normalizes; see the class."""
        x = ops.cast(inputs, self.compute_dtype)
        parameters = {"gamma": self.gamma, "beta": self.beta}
        if not (training and self.trainable):
            return functional.normalize(
                x,
                self.moving_mean,
                self.moving_variance,
                **parameters,
                axis=self.axis,
                epsilon=self.epsilon,
            )
        y, mean, variance = functional.batch_normalization(
            x, **parameters, axis=self.axis, epsilon=self.epsilon, weights=_weights_of(mask, x)
        )
        self._move(self.moving_mean, mean)  # (B11)
        self._move(self.moving_variance, variance)  # (B12)
        return y

    def _move(self, variable: Any, value: Array) -> None:
        value = ops.cast(value, variable.dtype)
        variable.assign(variable * self.momentum + value * (1 - self.momentum))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
        }
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            key = f"{name}_initializer"
            config[key] = initializers.serialize(getattr(self, key))
        for name in ("beta", "gamma"):
            regularizer, constraint = f"{name}_regularizer", f"{name}_constraint"
            config[regularizer] = regularizers.serialize(getattr(self, regularizer))
            config[constraint] = constraints.serialize(getattr(self, constraint))
        return {**super().get_config(), **config}


def _weights_of(mask: Array | None, x: Array) -> Array | None:
    """A mask as weights that broadcast against x: Keras's masks lack the last axis."""
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    return ops.expand_dims(mask, -1) if len(mask.shape) == len(x.shape) - 1 else mask

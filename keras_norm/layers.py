"""The Keras layers: variables, moving statistics, masks, dtype policy, config; no mathematics.

Import these in place of `keras.layers`' of the same name:

    from keras_norm.layers import BatchNormalization
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_norm import functional

__all__ = [
    "BatchNormalization",
    "Dropout",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
]

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


# Normalization within each example: no moving statistics, the same in training and inference -----


class _WithinExample(keras.layers.Layer):
    """What layer, RMS, group and instance normalization have in common."""

    def __init__(self, axis: Any, epsilon: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_dtype(self)
        functional.check_epsilon(epsilon)
        self.axis = axis
        self.epsilon = epsilon
        self.supports_masking = True
        # Under a mixed policy inputs in float32 are normalized as they are, and then rounded.
        self.autocast = False

    def _add_parameter(self, name: str, shape: Sequence[int]) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{name}_initializer", "ones"),
            regularizer=getattr(self, f"{name}_regularizer", None),
            constraint=getattr(self, f"{name}_constraint", None),
            autocast=False,
        )

    def _set_input_spec(self, input_shape: Sequence[int | None]) -> None:
        """Later inputs may have more or fewer dimensions, but these sizes on the axes."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        self.input_spec = keras.layers.InputSpec(
            min_ndim=max(a + 1 if a >= 0 else -a for a in axes),
            axes={a: input_shape[a] for a in axes},
        )

    def _floating(self, inputs: Array) -> Array:
        """The inputs in their own dtype; integers in that of the layer."""
        x = ops.convert_to_tensor(inputs)
        is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))
        return x if is_float else ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        functional.canonical_axes(self.axis, len(input_shape))
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "axis": self.axis, "epsilon": self.epsilon}


class _Affine(_WithinExample):
    """One of these with gamma and beta."""

    def __init__(
        self,
        axis: Any = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis, epsilon, **kwargs)
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.gamma = None
        self.beta = None

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {**super().get_config(), "center": self.center, "scale": self.scale}
        for name in ("beta", "gamma"):
            initializer, regularizer = f"{name}_initializer", f"{name}_regularizer"
            constraint = f"{name}_constraint"
            config[initializer] = initializers.serialize(getattr(self, initializer))
            config[regularizer] = regularizers.serialize(getattr(self, regularizer))
            config[constraint] = constraints.serialize(getattr(self, constraint))
        return config


@keras.saving.register_keras_serializable(package="keras_norm")
class LayerNormalization(_Affine):
    """Normalizes each example by its own mean and variance, then scales and shifts it.

    In training and inference alike, equations (L1) to (L5) of
    `keras_norm.functional.layer_normalization`:

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with mean and variance over `axis`, for every index of the other axes. The gradient is the
    hand-derived one, (L6) to (L9). Unlike batch normalization it does not depend on the other
    examples of the batch, so it suits batches of any size, and sequences.

    Args:
        axis: int, or list or tuple of int: the axes over which each example is normalized, and
            along which gamma and beta lie, in ascending order. Default: -1.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True.
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        rms_scaling: bool, y = gamma x / sqrt(variance + epsilon), without beta. Deprecated in
            Keras, and here for its saved models; for RMS normalization use `RMSNormalization`.
            Default: False.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 1; (N, D), (N, T, D), (N, H, W, C), ... A Keras mask passes
            through unchanged; what it masks is normalized like the rest, and counts in the
            statistics only if `axis` names the axis of the mask.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma and beta, of the shape of the normalized axes: trained. `get_weights()` gives them
        in this order, as in `keras.layers`.

    Raises:
        TypeError: for an axis that is no integer, list or tuple, as in Keras.
        ValueError: for a negative epsilon, an axis that the inputs do not have or that is named
            twice, an integer or complex dtype, a normalized axis of unknown size.

    Example:
        >>> layer = LayerNormalization(epsilon=1e-5)
        >>> y = layer(np.array([[1.0, 3.0], [10.0, 50.0]], "float32"))
        >>> np.round(np.asarray(y), 3).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Numerics:
        Statistics are accumulated, and variables kept, in at least float32; float16 and bfloat16
        inputs give outputs of the same dtype. In float32 a mean of 1000 beside a variance of 1
        costs no digit (`keras.layers` forms x inv_std - mean inv_std there, the difference of
        two large numbers).

    Reference:
        Ba, Kiros and Hinton, 2016, Layer Normalization, section 3.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        rms_scaling: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_axis_type(axis)
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer,
            gamma_initializer,
            beta_regularizer,
            gamma_regularizer,
            beta_constraint,
            gamma_constraint,
            **kwargs,
        )
        self.rms_scaling = rms_scaling
        if rms_scaling:
            warnings.warn(
                "LayerNormalization(rms_scaling=True) divides by the standard deviation, not by "
                "the root mean square, and is deprecated. Use RMSNormalization.",
                stacklevel=2,
            )

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates gamma and beta, of the shape of the normalized axes."""
        axes = functional.canonical_axes(self.axis, len(input_shape))
        has_gamma = self.scale or self.rms_scaling
        has_beta = self.center and not self.rms_scaling
        if has_gamma:
            self.gamma = self._add_parameter("gamma", functional.known_sizes(input_shape, axes))
        if has_beta:
            self.beta = self._add_parameter("beta", functional.known_sizes(input_shape, axes))
        self._set_input_spec(input_shape)

    def call(self, inputs: Array) -> Array:
        """Normalizes; see the class."""
        y = functional.layer_normalization(
            self._floating(inputs),
            self.gamma,
            self.beta,
            axis=self.axis,
            epsilon=self.epsilon,
            rms_scaling=self.rms_scaling,
        )
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "rms_scaling": self.rms_scaling}


def _check_axis_type(axis: Any) -> None:
    """Keras raises a TypeError here, and its users may rely on it."""
    axes = axis if isinstance(axis, list | tuple) else [axis]
    if not all(isinstance(a, int) for a in axes):
        raise TypeError(
            "Expected an int or a list/tuple of ints for the argument 'axis', the axes over which "
            f"the statistics are taken. Received: axis={axis!r}. For the last axis use axis=-1."
        )


@keras.saving.register_keras_serializable(package="keras_norm")
class RMSNormalization(_WithinExample):
    """Divides each example by its root mean square, then scales it.

    In training and inference alike, equations (R1) to (R4) of
    `keras_norm.functional.rms_normalization`:

        y = scale x / sqrt(mean(x^2) + epsilon)

    with the mean over `axis`. The gradient is the hand-derived one, (R5) and (R6). It costs less
    than layer normalization, because it has no mean and no beta.

    Args:
        axis: int, or list or tuple of int: the axes over which each example is normalized, and
            along which the scale lies, in ascending order. Default: -1.
        epsilon: float >= 0, added to the mean square. Default: 1e-6.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 1; (N, D), (N, T, D), ... A Keras mask passes through
            unchanged (with `keras.layers`' layer it is lost, with a warning).

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        scale, of the shape of the normalized axes, from 1: trained.

    Raises:
        TypeError: for an axis that is no integer, list or tuple.
        ValueError: for a negative epsilon, an axis that the inputs do not have or that is named
            twice, an integer or complex dtype, a normalized axis of unknown size.

    Example:
        >>> layer = RMSNormalization()
        >>> np.round(np.asarray(layer(np.array([[3.0, -3.0]], "float32"))), 3).tolist()
        [[1.0, -1.0]]

    Numerics:
        The mean square is accumulated, and the scale kept, in at least float32; float16 and
        bfloat16 inputs give outputs of the same dtype.

    Reference:
        Zhang and Sennrich, 2019, Root Mean Square Layer Normalization, section 4.
    """

    def __init__(
        self, axis: int | Sequence[int] = -1, epsilon: float = 1e-6, **kwargs: Any
    ) -> None:
        _check_axis_type(axis)
        super().__init__(axis, epsilon, **kwargs)
        self.scale = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the scale, of the shape of the normalized axes."""
        axes = functional.canonical_axes(self.axis, len(input_shape))
        self.scale = self._add_parameter("scale", functional.known_sizes(input_shape, axes))
        self._set_input_spec(input_shape)

    def call(self, inputs: Array) -> Array:
        """Normalizes; see the class."""
        y = functional.rms_normalization(
            self._floating(inputs), self.scale, axis=self.axis, epsilon=self.epsilon
        )
        return ops.cast(y, self.compute_dtype)


class _ByChannel(_Affine):
    """One of these with one gamma and one beta for each channel."""

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates gamma and beta, one for each channel."""
        self._check_shape(input_shape)
        shape = functional.known_sizes(input_shape, (self.axis,))
        if self.scale:
            self.gamma = self._add_parameter("gamma", shape)
        if self.center:
            self.beta = self._add_parameter("beta", shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={self.axis: shape[0]})

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        functional.channel_axis(self.axis, len(input_shape))


@keras.saving.register_keras_serializable(package="keras_norm")
class GroupNormalization(_ByChannel):
    """Normalizes groups of channels of each example by their own mean and variance.

    In training and inference alike, equations (GN1) to (GN3) of
    `keras_norm.functional.group_normalization`: the channels are shared out in order into
    `groups`, and

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with mean and variance over the positions and channels of each group, and gamma and beta for
    each channel. The gradient is the hand-derived one, (GN4) and (GN5). One group is layer
    normalization over channels and positions, but for its gamma and beta; as many groups as
    channels is instance normalization.

    Args:
        groups: int >= 1 that divides the number of channels; -1 for as many groups as channels;
            or None for the greatest common divisor of 32 and the number of channels, which suits
            every net (not in Keras). Default: 32.
        axis: int, the axis of the channels, not 0: -1 for channels last, 1 for images with
            channels first. Default: -1.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True.
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 2; (N, C), (N, T, C), (N, H, W, C), ... A Keras mask passes
            through unchanged; the positions that it masks count in the statistics.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. `get_weights()` gives them in this order, as in
        `keras.layers`.

    Raises:
        ValueError: for groups that do not divide the channels, an axis that the inputs do not
            have or that is 0, a negative epsilon, an integer or complex dtype, inputs whose
            channels are unknown.

    Example:
        >>> layer = GroupNormalization(groups=2, epsilon=1e-5)
        >>> y = layer(np.array([[1.0, 3.0, 10.0, 50.0]], "float32"))
        >>> np.round(np.asarray(y), 3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Numerics:
        As `LayerNormalization`. `axis` may be any negative or positive number (in `keras.layers`
        -2 and below normalize the wrong axes), and `groups` stays as it was given.

    Reference:
        Wu and He, 2018, Group Normalization, section 3.
    """

    def __init__(
        self,
        groups: int | None = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        functional.check_groups(groups)
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer,
            gamma_initializer,
            beta_regularizer,
            gamma_regularizer,
            beta_constraint,
            gamma_constraint,
            **kwargs,
        )
        self.groups = groups

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        super()._check_shape(input_shape)
        (channels,) = functional.known_sizes(input_shape, (self.axis,))
        functional.number_of_groups(self.groups, channels)

    def call(self, inputs: Array) -> Array:
        """Normalizes; see the class."""
        y = functional.group_normalization(
            self._floating(inputs),
            self.gamma,
            self.beta,
            groups=self.groups,
            axis=self.axis,
            epsilon=self.epsilon,
        )
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "groups": self.groups}


@keras.saving.register_keras_serializable(package="keras_norm")
class InstanceNormalization(_ByChannel):
    """Normalizes each channel of each example by its own mean and variance.

    In training and inference alike, equations (I1) and (I2) of
    `keras_norm.functional.instance_normalization`:

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with mean and variance over the positions, and gamma and beta for each channel. The gradient
    is the hand-derived one, (I3) and (I4). It takes the contrast out of an image, which made it
    the normalization of style transfer. Keras has no layer of this name; it is
    `GroupNormalization(groups=-1)`, but refuses inputs without positions.

    Args:
        axis: int, the axis of the channels, not 0: -1 for channels last, 1 for images with
            channels first. Default: -1.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True. (PyTorch has neither by default.)
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 3; (N, T, C), (N, H, W, C), (N, D, H, W, C), ... A Keras
            mask passes through unchanged; the positions that it masks count in the statistics.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype. With one position for each
        channel the variance is 0, and the output beta.

    State:
        gamma (C,), beta (C,): trained; `get_weights()` gives them in this order.

    Raises:
        ValueError: for inputs without positions, an axis that the inputs do not have or that is
            0, a negative epsilon, an integer or complex dtype, inputs whose channels are unknown.

    Example:
        >>> layer = InstanceNormalization(epsilon=1e-5)
        >>> y = layer(np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32"))  # (N=1, T=2, C=2)
        >>> np.round(np.asarray(y), 3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Numerics:
        As `LayerNormalization`.

    Reference:
        Ulyanov, Vedaldi and Lempitsky, 2016, Instance Normalization: The Missing Ingredient for
        Fast Stylization, section 2.
    """

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        super()._check_shape(input_shape)
        functional.check_spatial(len(input_shape))

    def call(self, inputs: Array) -> Array:
        """Normalizes; see the class."""
        y = functional.instance_normalization(
            self._floating(inputs), self.gamma, self.beta, axis=self.axis, epsilon=self.epsilon
        )
        return ops.cast(y, self.compute_dtype)


# Dropout -----------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_norm")
class Dropout(keras.layers.Layer):
    """Sets a random fraction of its inputs to zero in training, and scales up the rest.

    Equations (D1) to (D3) of `keras_norm.functional.dropout`, inverted dropout:

        y = x / (1 - rate) with probability 1 - rate, else 0

    so that the expectation of y is x, and inference gives back the inputs themselves, to the last
    bit. The gradient is the hand-derived one, (D4): that of the units that stayed, scaled alike.

    Args:
        rate: float in [0, 1], the fraction that is set to zero; with 1 all of it. Courses often
            give the keep probability p instead: rate = 1 - p.
        noise_shape: tuple or list of integers >= 1 or None: the shape of the mask, which is then
            broadcast to the inputs; None stands for their own size on that axis. With
            (None, 1, None), all time steps of (N, T, D) lose the same features. Default: the
            inputs' shape.
        seed: int, for masks that are the same in every run. (They are not always those of
            `keras.layers.Dropout` with the same seed.) Default: from
            `keras.utils.set_random_seed`.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable` (without effect, as in Keras).

    Call arguments:
        inputs: array of any shape, of a floating dtype.
        training: bool. True drops out; False gives back the inputs. Default: False, or what
            `fit`, `evaluate` and `predict` say.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype. A Keras mask passes through.

    State:
        A `keras.random.SeedGenerator` (unless the rate is 0), which moves on with every call in
        training: two calls drop out different units, on every backend, also without a seed.

    Raises:
        ValueError: for a rate outside [0, 1], a noise_shape that holds anything but integers
            >= 1 and None, or that does not broadcast to the inputs, inputs of integers in
            training.

    Example:
        >>> layer = Dropout(rate=0.5, seed=1)
        >>> x = np.ones((2, 1000), "float32")
        >>> y = np.asarray(layer(x, training=True))
        >>> np.unique(y).tolist(), bool(abs(y.mean() - 1) < 0.1)
        ([0.0, 2.0], True)
        >>> bool((np.asarray(layer(x, training=False)) == x).all())
        True

    Numerics:
        The mask is drawn in float32 and the scaling done in at least float32, whatever the dtype
        policy.

    Reference:
        Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, 2014, Dropout: A Simple Way
        to Prevent Neural Networks from Overfitting, section 4; section 10 for the scaling.
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        functional.check_rate(rate)
        self.rate = rate
        self.noise_shape = _checked_noise_shape(noise_shape)
        self.seed = seed
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        self._build_at_init()

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        return tuple(input_shape)

    def call(self, inputs: Array, training: bool = False) -> Array:
        """Drops out; see the class."""
        if not training or self.rate == 0:
            return inputs
        mask = functional.dropout_mask(self._mask_shape(inputs), self.rate, self.seed_generator)
        return functional.dropout(inputs, mask, self.rate)

    def _mask_shape(self, inputs: Array) -> tuple[Any, ...]:
        sizes = ops.shape(inputs)
        if self.noise_shape is None:
            return tuple(sizes)
        functional.check_mask_shape(self.noise_shape, tuple(inputs.shape))
        return tuple(sizes[i] if n is None else n for i, n in enumerate(self.noise_shape))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {"rate": self.rate, "noise_shape": self.noise_shape, "seed": self.seed}
        return {**super().get_config(), **config}


def _checked_noise_shape(noise_shape: Any) -> tuple[int | None, ...] | None:
    if noise_shape is None:
        return None
    expected = None
    if isinstance(noise_shape, str) or not isinstance(noise_shape, Iterable):
        expected = "a tuple or list of integers"
    else:
        noise_shape = tuple(noise_shape)
        given = [n for n in noise_shape if n is not None]
        if not all(isinstance(n, int) for n in given):
            expected = "all elements to be integers or None"
        elif not all(n > 0 for n in given):
            expected = "all dimensions to be positive integers or None"
    if expected is not None:
        raise ValueError(
            f"Invalid value received for argument `noise_shape`. Expected {expected}. "
            f"Received: noise_shape={noise_shape!r}. Use 1 on the axes that share a mask, and "
            "None on the others."
        )
    return tuple(noise_shape)

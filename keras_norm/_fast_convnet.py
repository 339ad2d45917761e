"""A convolutional net that learns in few epochs, and its parts.

See `FastConvNet`. All of it is exported by `keras_norm.models`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm._blocks import (
    Normalization,
    checked_classes,
    checked_input_shape,
    checked_widths,
    logits_dtype,
    made_for_channels_last,
)
from keras_norm._convolution import FastConv2D
from keras_norm.layers import BatchNormalization
from keras_norm.moments import Covariance

__all__ = [
    "FAST_NORMALIZATION",
    "FastConvNet",
    "IdentityConvolution",
    "TestTimeAugmentation",
    "WhiteningConv2D",
    "fit_whitening",
]

Array = Any

FAST_NORMALIZATION = functools.partial(BatchNormalization, momentum=0.6, epsilon=1e-6, scale=False)
"""Batch normalization for short trainings: statistics that follow fast, beta but no gamma."""


def _noise(seed: Any = None) -> keras.initializers.Initializer:
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=seed)


@keras.saving.register_keras_serializable(package="keras_norm")
class IdentityConvolution(keras.initializers.Initializer):  # type: ignore[misc]
    """Kernels that copy their input channels to the first outputs, with noise for the rest.

    The first min(C_in, C_out) filters of an (odd) kernel are the identity: 1 at the centre of
    their own channel, 0 elsewhere. The rest are drawn from the uniform distribution of variance
    1 / (3 fan_in), fan_in = H W C_in.

    Args:
        seed: int, `keras.random.SeedGenerator` or None. Default: None, a new seed for every
            initializer, drawn as Keras draws it.

    Call arguments:
        shape: (H, W, C_in, C_out), H and W odd.

    Returns:
        An array of that shape.

    Raises:
        ValueError: for a shape that does not have four sizes, or an even kernel.

    Example:
        >>> kernel = ops.convert_to_numpy(IdentityConvolution(seed=0)((3, 3, 2, 4)))
        >>> kernel[1, 1, :, :2].tolist(), float(abs(kernel[0, 0, :, :2]).max())
        ([[1.0, 0.0], [0.0, 1.0]], 0.0)
    """

    def __init__(self, seed: Any = None) -> None:
        self.seed = seed
        self._noise = _noise(seed)

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Array:
        """Returns a kernel; see the class."""
        if len(shape) != 4 or shape[0] % 2 == 0 or shape[1] % 2 == 0:
            raise ValueError(
                "An identity kernel is (H, W, C_in, C_out) with H and W odd, so that it has a "
                f"centre. Received: shape={tuple(shape)}. Choose kernel_size=3."
            )
        height, width, c_in, c_out = shape
        same = min(c_in, c_out)
        identity = np.zeros((height, width, c_in, same))
        identity[height // 2, width // 2, range(same), range(same)] = 1
        noise = self._noise(shape, dtype=dtype)
        return ops.concatenate([ops.cast(identity, noise.dtype), noise[..., same:]], axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"seed": self._noise.get_config()["seed"]}


@keras.saving.register_keras_serializable(package="keras_norm")
class WhiteningConv2D(keras.layers.Layer):  # type: ignore[misc]
    """A first convolution that whitens patches of the images; it is measured, not trained.

    Neighbouring pixels and colours are correlated, and gradient descent spends its first epochs
    undoing that. With x a patch of p = kernel_size^2 C numbers, with covariance S = Q L Q^T over
    the images, the filters are the rows of

        (W1)  U = Q^T (S + epsilon I)^(-1/2) = (L + epsilon)^(-1/2) Q^T,   U S U^T ~ I
        (W2)  y = [U x, -U x] + bias

    Both signs are kept because the activation that follows keeps one of them.

    Args:
        kernel_size: int >= 1, sides of the patch in pixels. Default: 2.
        epsilon: number > 0, added to the variances so that noise in directions without variance
            is not amplified; in units of the inputs' variance. Default: 5e-4.
        **kwargs: name, dtype, trainable (of the bias).

    Call arguments:
        inputs: (N, H, W, C), channels last; at least kernel_size x kernel_size.

    Returns:
        (N, H - kernel_size + 1, W - kernel_size + 1, 2 p), in the layer's compute dtype.

    State: kernel (kernel_size, kernel_size, C, p), not trainable, zero until `adapt` has been
        called; bias (2 p,), trainable, zero at first.

    Raises:
        ValueError: for arguments out of their range, and for data too small or not finite.

    Example:
        >>> images = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype("float32")
        >>> layer = WhiteningConv2D()
        >>> layer.adapt(images)
        >>> y = ops.convert_to_numpy(layer(images))
        >>> y.shape, bool(abs(y[..., :12].var((0, 1, 2)) - 1).max() < 0.01)
        ((20, 7, 7, 24), True)

    Numerics: moments and eigenvectors in float64 on the host; the sign of each eigenvector makes
        its largest entry positive: the same data give the same kernel on every backend.

    Reference: Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, after Page, 2019,
        How to Train Your ResNet 8: there from the uncentred second moments.
    """

    def __init__(self, kernel_size: int = 2, epsilon: float = 5e-4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1:
            raise ValueError(
                "`kernel_size` is the side of a patch and must be an int >= 1. "
                f"Received: kernel_size={kernel_size!r}."
            )
        if not epsilon > 0:
            raise ValueError(f"`epsilon` must be > 0. Received: epsilon={epsilon!r}.")
        self.kernel_size = kernel_size
        self.epsilon = epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates kernel and bias."""
        channels, size = input_shape[-1], self.kernel_size
        if len(input_shape) != 4 or channels is None:
            raise ValueError(
                "The inputs must be images (N, H, W, C) with a known number of channels. "
                f"Received: shape {tuple(input_shape)}."
            )
        numbers = size * size * channels
        self.kernel = self.add_weight(
            name="kernel",
            shape=(size, size, channels, numbers),
            initializer="zeros",
            trainable=False,
        )
        self.bias = self.add_weight(name="bias", shape=(2 * numbers,), initializer="zeros")

    def call(self, inputs: Array) -> Array:
        """Returns both signs of the whitened patches; see the class."""
        u = ops.conv(inputs, self.kernel, padding="valid", data_format="channels_last")
        return ops.concatenate([u, -u], axis=-1) + self.bias  # (W2)

    def adapt(self, data: npt.ArrayLike) -> None:
        """Measures the covariance of the patches, and sets the kernel.

        Args:
            data: images (N, H, W, C) as the model gets them; a few thousand are plenty.

        Raises:
            ValueError: for other shapes, or images that are not finite. The kernel is unchanged.
        """
        images = np.asarray(data)
        size = self.kernel_size
        if images.ndim != 4 or len(images) == 0 or min(images.shape[1:3]) < size:
            raise ValueError(
                f"`adapt` needs images (N, H, W, C) of at least {size} x {size} pixels. "
                f"Received: shape {images.shape}."
            )
        moments = Covariance()
        for start in range(0, len(images), 500):
            moments.update(_patches(images[start : start + 500], size))
        covariance = moments.covariance()[0]
        if not np.isfinite(covariance).all():
            raise ValueError(
                "`adapt` needs finite images. Received: images with NaN or infinite pixels."
            )
        if not self.built:
            self.build(images.shape)
        rows = _principal_axes(covariance, self.epsilon)  # (p, p)
        shape = (size, size, images.shape[-1], len(rows))
        self.kernel.assign(np.moveaxis(rows.reshape(shape[3], *shape[:3]), 0, -1))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Returns (N, H - kernel_size + 1, W - kernel_size + 1, 2 p)."""
        count, height, width, channels = input_shape
        size = self.kernel_size
        less = [None if side is None else side - size + 1 for side in (height, width)]
        return (count, *less, 2 * size * size * int(channels or 0))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "epsilon": self.epsilon,
        }


def _patches(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    patches = np.moveaxis(windows, 3, -1)  # (N, H', W', C, s, s) -> (N, H', W', s, s, C)
    return patches.reshape(-1, size * size * images.shape[-1])


def _principal_axes(covariance: npt.NDArray[Any], epsilon: float) -> npt.NDArray[Any]:
    """(W1): the rows of U, in order of falling variance."""
    variances, q = np.linalg.eigh(covariance)
    q = q * np.sign(q[abs(q).argmax(axis=0), range(len(q))])
    rows = q.T / np.sqrt(np.maximum(variances, 0) + epsilon)[:, None]
    return np.asarray(rows[::-1])


def FastConvNet(  # noqa: N802
    widths: Sequence[int] = (64, 256, 256),
    normalization: Normalization = FAST_NORMALIZATION,
    *,
    activation: Any = "gelu",
    whitening: bool = True,
    identity: bool = True,
    logit_scale: float = 1 / 9,
    input_shape: Sequence[int | None] = (32, 32, 3),
    classes: int = 10,
    name: str = "fast_convnet",
) -> keras.Model:
    """A small net that reaches 94% on CIFAR-10 within ten epochs, given enough time.

        whitening conv 2x2 -> activation
        -> three groups of: conv 3x3 -> max pool 2 -> norm -> activation -> conv 3x3 -> norm
           -> activation
        -> maximum over all positions -> dense (classes), without bias -> times logit_scale

    Layers are named "whitening", "conv1a", "conv1a_norm", "conv1b", ..., "logits". Call
    `fit_whitening(model, images)` once before training.

    Args:
        widths: channels of each group, ints >= 1. Default: (64, 256, 256).
        normalization: as in `make_normalization`. Default: `FAST_NORMALIZATION`.
        activation: any Keras activation. Default: "gelu".
        whitening: whether the first convolution is a `WhiteningConv2D`; else it is an ordinary
            one of the same shape, which is trained. Default: True.
        identity: whether convolutions start as `IdentityConvolution`, else as noise of the same
            variance. Default: True.
        logit_scale: number > 0; a small one keeps the first predictions undecided. Default: 1/9.
        input_shape: (H, W, C); H and W may be None, for images of several sizes. Default:
            (32, 32, 3).
        classes: number of outputs. Default: 10.
        name: of the model. Default: "fast_convnet".

    Returns:
        A functional `keras.Model` from (N, H, W, C) to logits (N, classes), channels last.

    Raises:
        ValueError: for images below 9 x 9 (2^groups + 1), and any other argument out of its
            range.

    Example:
        >>> FastConvNet((32, 64, 64)).count_params()
        146920

    Reference: Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. Differs: the
        whitening is centred, and computes one sign only; batch normalization's epsilon is 1e-6.
    """
    classes = checked_classes(classes)
    shape = checked_input_shape(input_shape)
    widths = checked_widths("widths", widths, "the channels of the groups")
    if not widths:
        raise ValueError(f"`widths` must list one group or more. Received: widths={widths!r}.")
    least = 2 ** len(widths) + 1
    if len(shape) != 3 or min(side or least for side in shape[:2]) < least or shape[2] is None:
        raise ValueError(
            f"FastConvNet with {len(widths)} groups needs images (H, W, C) of at least {least} x "
            f"{least}. Received: input_shape={shape}. Resize the images, or take fewer groups."
        )
    if not logit_scale > 0:
        raise ValueError(f"`logit_scale` must be > 0. Received: logit_scale={logit_scale!r}.")
    kernels = IdentityConvolution if identity else _noise
    inputs = keras.Input(shape, name="images")
    first = (
        WhiteningConv2D(name="whitening")
        if whitening
        else keras.layers.Conv2D(
            8 * shape[2], 2, kernel_initializer=_noise(), data_format="channels_last", name="conv0"
        )
    )
    x = keras.layers.Activation(activation, name="whitening_activation")(first(inputs))

    def finish(x: Array, name: str) -> Array:
        norm = made_for_channels_last(normalization, f"{name}_norm")
        x = x if norm is None else norm(x)
        return keras.layers.Activation(activation, name=f"{name}_activation")(x)

    for group, width in enumerate(widths, start=1):
        conv = functools.partial(
            FastConv2D,
            width,
            3,
            padding="same",
            use_bias=False,
            data_format="channels_last",
        )
        x = conv(kernel_initializer=kernels(), name=f"conv{group}a")(x)
        pool = keras.layers.MaxPooling2D(2, data_format="channels_last", name=f"pool{group}")
        x = finish(pool(x), f"conv{group}a")
        x = finish(conv(kernel_initializer=kernels(), name=f"conv{group}b")(x), f"conv{group}b")
    x = keras.layers.GlobalMaxPooling2D(data_format="channels_last", name="maximum")(x)
    dtype = logits_dtype()
    x = keras.layers.Dense(
        classes, use_bias=False, kernel_initializer=_noise(), dtype=dtype, name="logits"
    )(x)
    logits = keras.layers.Rescaling(logit_scale, dtype=dtype, name="scaled_logits")(x)
    return keras.Model(inputs, logits, name=name)


def fit_whitening(model: keras.Model, images: npt.ArrayLike) -> bool:
    """Sets the whitening convolution of a model, if it has one, from images.

    Args:
        model: such as `FastConvNet`, with at most one `WhiteningConv2D`, applied to its inputs.
        images: (N, H, W, C), as the model gets them; the first 5,000 are used.

    Returns:
        Whether there was a layer to measure.

    Raises:
        ValueError: as `WhiteningConv2D.adapt`.
    """
    layers = [layer for layer in model.layers if isinstance(layer, WhiteningConv2D)]
    for layer in layers:
        layer.adapt(np.asarray(images)[:5000])
    return bool(layers)


@keras.saving.register_keras_serializable(package="keras_norm")
class TestTimeAugmentation(keras.Model):  # type: ignore[misc]
    """A classifier that averages a model's logits over several views of each image.

    With f the model, m(x) the mirrored image, and s+(x) and s-(x) the image moved by `shift`
    pixels along a diagonal (edges reflected), in its two directions:

        (T1)  g(x) = (f(x) + f(m(x))) / 2
        (T2)  y    = g(x) / 2 + (g(s+(x)) + g(s-(x))) / 4        with shift > 0, else g(x)

    Args:
        model: `keras.Model` from images (N, H, W, C), channels last, to logits (N, K). It is
            called in inference mode only; its weights are shared.
        shift: int >= 0, pixels. With 0 only (T1), two views; else six views. Default: 1.
        **kwargs: name, dtype.

    Call arguments:
        inputs: (N, H, W, C).

    Returns:
        Logits (N, K). The model is called once, with two or six times N images.

    Raises:
        ValueError: for a shift that is not an int >= 0, or images no larger than the shift.

    Example:
        >>> model = FastConvNet((4, 4, 4))
        >>> views = TestTimeAugmentation(model)
        >>> x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
        >>> bool(abs(views.predict(x, verbose=0) - views.predict(x[:, :, ::-1], verbose=0)).max()
        ...      < 1e-5)
        True

    Reference: the six views of Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU.
    """

    __test__ = False  # not a test, in spite of the name

    def __init__(self, model: keras.Model, shift: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
            raise ValueError(
                f"`shift` is a number of pixels, an int >= 0. Received: shift={shift!r}."
            )
        self.model = model
        self.shift = shift

    def call(self, inputs: Array, training: bool | None = None) -> Array:
        """Returns the mean logits; see the class."""
        moved, weights = [inputs], [1 / 2]
        if self.shift:
            moved, weights = [inputs, *self._ends_of_diagonal(inputs)], [1 / 4, 1 / 8, 1 / 8]
        views = [view for x in moved for view in (x, ops.flip(x, axis=2))]
        logits = self.model(ops.concatenate(views), training=False)  # (V N, K)
        parts = ops.split(logits, len(views))  # V times (N, K)
        mirrored = zip(parts[::2], parts[1::2], weights, strict=True)
        return sum((a + b) * weight for a, b, weight in mirrored)  # (T1), (T2)

    def _ends_of_diagonal(self, x: Array) -> tuple[Array, Array]:
        p = self.shift
        if any(side is not None and side <= p for side in x.shape[1:3]):
            raise ValueError(
                "Images must be larger than `shift`. "
                f"Received: shift={p}, inputs of shape {tuple(x.shape)}."
            )
        padded = ops.pad(x, [[0, 0], [p, p], [p, p], [0, 0]], mode="reflect")
        return padded[:, : -2 * p, : -2 * p], padded[:, 2 * p :, 2 * p :]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, the model with its structure."""
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "shift": self.shift,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Returns a model with the same arguments."""
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects)
        return cls(**{**config, "model": model})

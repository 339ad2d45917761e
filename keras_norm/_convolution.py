"""A convolution with a faster kernel gradient for small images on a CPU.

See `FastConv2D`, which `keras_norm.models` exports.
"""

from typing import Any

import keras
from keras import ops

from keras_norm import kernels
from keras_norm.autodiff import custom_vjp

__all__ = ["FastConv2D"]

Array = Any

# By dtype: (longest side of the images, fewest channels) for which (V1) is faster than
# TensorFlow's own gradient; measured on two cores by benchmarks/convolution.py.
_QUICKER = {"bfloat16": (8, 64), "float32": (5, 128)}


@keras.saving.register_keras_serializable(package="keras_norm")
class FastConv2D(keras.layers.Conv2D):  # type: ignore[misc]
    """`keras.layers.Conv2D`, with a faster kernel gradient for small images on a CPU.

    With x of shape (N, H, W, C) and dy the gradient of the output, the gradient of a tap (i, j) of
    the kernel is one product of matrices,

        (V1)  dkernel[i, j] = sum over n, h, w of x[n, h + i, w + j]^T dy[n, h, w]

    over the positions for which h + i and w + j lie within the image. On 512 images of 3 x 3
    with 384 channels, in bfloat16 on two cores, TensorFlow's own gradient takes 3.2 times as long.

    Args:
        *args, **kwargs: of `keras.layers.Conv2D`, all of them.

    Call arguments:
        inputs: as `keras.layers.Conv2D`'s, (N, H, W, C) for channels last.
        training: whether (V1) may be used. Default: None, Keras's gradient.

    Returns:
        As `keras.layers.Conv2D`, (N, H', W', filters) in the layer's compute dtype.

    State: as `keras.layers.Conv2D`: kernel (*kernel_size, C, filters), bias (filters,).

    Raises:
        ValueError: as `keras.layers.Conv2D`, for arguments out of their range.

    Example:
        >>> layer = FastConv2D(4, 3, padding="same", data_format="channels_last")
        >>> tuple(layer(ops.ones((2, 5, 5, 3)), training=True).shape)
        (2, 5, 5, 4)

    Numerics: (V1) sums in float32 and is rounded once to the compute dtype.

    Differs from Keras: in training on TensorFlow without a GPU, with stride 1, padding "same", an
        odd kernel and channels last, the gradient of the kernel is (V1) for images of up to 8 x 8
        in bfloat16 (from 64 channels) or 5 x 5 in float32 (from 128 channels). Everywhere else,
        and in the forward pass, the layer is Keras's.
    """

    def call(self, inputs: Array, training: bool | None = None) -> Array:
        """Returns the convolution of the inputs; see the class."""
        if training is not True or not self._is_quicker_by_taps(inputs):
            return super().call(inputs)
        (outputs,) = custom_vjp(_forward, _backward, inputs, self.kernel)
        if self.use_bias:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)

    def _is_quicker_by_taps(self, inputs: Array) -> bool:
        if keras.backend.backend() != "tensorflow" or kernels.on_gpu(inputs):
            return False
        plain = self.strides == self.dilation_rate == (1, 1) and self.groups == 1
        odd = all(size % 2 for size in self.kernel_size)
        if not (plain and odd and self.padding == "same" and self.data_format == "channels_last"):
            return False
        *_, height, width, channels = inputs.shape
        longest, fewest = _QUICKER.get(kernels.dtype_name(inputs.dtype), (0, 0))
        if height is None or width is None:
            return False
        return bool(max(height, width) <= longest and min(channels, self.filters) >= fewest)


def _forward(x: Array, kernel: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    y = ops.conv(x, kernel, padding="same", data_format="channels_last")
    return (y,), (x, kernel)


def _backward(residuals: tuple[Array, ...], upstream: tuple[Array, ...]) -> tuple[Array, Array]:
    x, kernel = residuals
    (dy,) = upstream
    mirrored = ops.transpose(ops.flip(kernel, (0, 1)), (0, 1, 3, 2))
    dx = ops.conv(dy, mirrored, padding="same", data_format="channels_last")
    return dx, kernel_gradient(x, dy, tuple(kernel.shape[:2]))


def kernel_gradient(x: Array, dy: Array, size: tuple[int, int]) -> Array:
    """(V1): the gradient with respect to the kernel of a convolution with padding "same".

    Args:
        x: inputs, (N, H, W, C); H and W known.
        dy: gradient of the outputs, (N, H, W, D), in x's dtype.
        size: rows and columns of the kernel, both odd.

    Returns:
        (*size, C, D), in x's dtype.
    """
    _, height, width, channels = x.shape
    filters = dy.shape[-1]
    # Rows first: then some can be left out without a copy. Columns are left out once for all rows.
    x, dy = (ops.transpose(v, (1, 0, 2, 3)) for v in (x, dy))  # (H, N, W, .)
    columns = []
    for j in _offsets(size[1]):
        x_j, dy_j = x[:, :, _inside(j, width)], dy[:, :, _inside(-j, width)]
        rows = [
            ops.matmul(
                ops.transpose(ops.reshape(x_j[_inside(i, height)], (-1, channels))),
                ops.reshape(dy_j[_inside(-i, height)], (-1, filters)),
            )
            for i in _offsets(size[0])
        ]
        columns.append(ops.stack(rows))  # (rows of the kernel, C, D)
    return ops.stack(columns, axis=1)


def _offsets(size: int) -> range:
    return range(-(size // 2), size // 2 + 1)


def _inside(offset: int, length: int) -> slice:
    """The positions p of an image of this length for which p - offset is a position, too."""
    return slice(max(offset, 0), max(length + min(offset, 0), 0))

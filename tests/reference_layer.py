"""Layer, RMS, group and instance normalization in NumPy, float64, written for reading.

Independent of `keras_norm`: definitions only, no gradient formula, loops where the package
reshapes. They take complex numbers, for the derivatives of `reference.complex_step`.
"""

import numpy as np
from reference import channel_axes


def along(v, x, axes):
    """A parameter, reshaped so that it lies along these axes of x."""
    return np.reshape(v, [x.shape[a] if a in axes else 1 for a in range(x.ndim)])


def affine(x_hat, gamma, beta, axes):
    y = x_hat if gamma is None else x_hat * along(gamma, x_hat, axes)
    return y if beta is None else y + along(beta, x_hat, axes)


def standardized(block, epsilon):
    """All elements of a block, by its own mean and variance."""
    centered = block - block.mean()
    return centered / np.sqrt((centered**2).mean() + epsilon)


def layer_norm(x, gamma=None, beta=None, *, axis=-1, epsilon=1e-3, rms_scaling=False):
    axes = channel_axes(axis, x.ndim)
    mean = x.mean(axes, keepdims=True)
    variance = ((x - mean) ** 2).mean(axes, keepdims=True)
    numerator = x if rms_scaling else x - mean
    return affine(numerator / np.sqrt(variance + epsilon), gamma, beta, axes)


def rms_norm(x, gamma=None, *, axis=-1, epsilon=1e-6):
    axes = channel_axes(axis, x.ndim)
    mean_square = (x**2).mean(axes, keepdims=True)
    return affine(x / np.sqrt(mean_square + epsilon), gamma, None, axes)


def group_norm(x, gamma=None, beta=None, *, groups=32, axis=-1, epsilon=1e-3):
    (channel,) = channel_axes(axis, x.ndim)
    last = np.moveaxis(x, channel, -1)
    size = x.shape[channel] // groups
    y = np.zeros_like(last)
    for n in range(len(last)):
        for first in range(0, x.shape[channel], size):
            block = np.s_[n, ..., first : first + size]
            y[block] = standardized(last[block], epsilon)
    return affine(np.moveaxis(y, -1, channel), gamma, beta, (channel,))


def instance_norm(x, gamma=None, beta=None, *, axis=-1, epsilon=1e-3):
    (channel,) = channel_axes(axis, x.ndim)
    y = np.zeros_like(x)
    for n in range(len(x)):
        for c in range(x.shape[channel]):
            block = tuple({0: n, channel: c}.get(a, slice(None)) for a in range(x.ndim))
            y[block] = standardized(x[block], epsilon)
    return affine(y, gamma, beta, (channel,))

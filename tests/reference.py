"""Normalization in NumPy, float64, written for reading: what the tests hold the package against.

Independent of `keras_norm`: definitions only, no gradient formula. Derivatives are taken of
these definitions by `complex_step`, which has no rounding error to speak of.
"""

import numpy as np


def channel_axes(axis, ndim):
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(sorted(a % ndim for a in axes))


def batch_moments(x, *, axis=-1, weights=None):
    """Mean, biased variance and sum of weights of every channel; zeros without any weight."""
    channels = channel_axes(axis, x.ndim)
    reduced = tuple(a for a in range(x.ndim) if a not in channels)
    w = np.broadcast_to(np.float64(1) if weights is None else weights, x.shape).astype("float64")
    total = w.sum(reduced, keepdims=True)
    safe = np.where(total > 0, total, 1)
    counted = np.where(w > 0, x, 0)
    mean = (w * counted).sum(reduced, keepdims=True) / safe
    variance = (w * np.where(w > 0, counted - mean, 0) ** 2).sum(reduced, keepdims=True) / safe
    shape = [x.shape[a] for a in channels]
    return mean.reshape(shape), variance.reshape(shape), total.reshape(shape)


def along(v, x, axis):
    """A vector of channels, reshaped so that it broadcasts against x."""
    channels = channel_axes(axis, x.ndim)
    return np.reshape(v, [x.shape[a] if a in channels else 1 for a in range(x.ndim)])


def normalize(x, mean, variance, gamma=None, beta=None, *, axis=-1, epsilon=1e-3):
    y = (x - along(mean, x, axis)) / np.sqrt(along(variance, x, axis) + epsilon)
    y = y if gamma is None else y * along(gamma, x, axis)
    return y if beta is None else y + along(beta, x, axis)


def batch_norm(x, gamma=None, beta=None, *, axis=-1, epsilon=1e-3, weights=None):
    mean, variance, _ = batch_moments(x, axis=axis, weights=weights)
    y = normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    return y, mean, variance


def complex_step(function, arrays):
    """Gradients of a scalar, real-analytic function of float64 arrays, exact to rounding.

    f(x + ih) = f(x) + ih f'(x) - O(h^2): the imaginary part over h, without any subtraction.
    """
    h = 1e-40
    gradients = []
    for i, array in enumerate(arrays):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            moved = [np.array(a, complex if j == i else float) for j, a in enumerate(arrays)]
            moved[i][index] += 1j * h
            gradient[index] = np.imag(function(*moved)) / h
        gradients.append(gradient)
    return gradients


def relative_error(a, b):
    """||a - b|| / (||a|| + ||b||), for gradients of the order of 1; 0 if both are rounding errors.

    (Some are zero by construction, such as that of the only element of a channel.)
    """
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    size = np.linalg.norm(a) + np.linalg.norm(b)
    return 0.0 if size < 1e-12 else np.linalg.norm(a - b) / size

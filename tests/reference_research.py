"""Whitening, quantile and filter-response normalization in NumPy, float64, written for reading.

Independent of `keras_norm`: definitions only, no gradient formula, with loops. They take complex
numbers, for the derivatives of `reference.complex_step`.
"""

import numpy as np
import reference_layer
from reference import channel_axes
from scipy import stats


def inverse_square_root(a):
    """By Newton's method for both A^(1/2) and A^(-1/2), which is analytic; to convergence."""
    y, z = a, np.eye(len(a)) + 0 * a
    for _ in range(18):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return z


def inverse_of_cholesky(a):
    lower = np.zeros_like(a)
    for i in range(len(a)):
        for j in range(i + 1):
            rest = a[i, j] - sum(lower[i, k] * lower[j, k] for k in range(j))
            lower[i, j] = np.sqrt(rest) if i == j else rest / lower[j, j]
    return np.linalg.inv(lower)


def newton_steps(a, iterations=5):
    p, trace = np.eye(len(a)), np.trace(a)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ (a / trace)
    return p / np.sqrt(trace)


MATRIX = {"zca": inverse_square_root, "cholesky": inverse_of_cholesky, "newton": newton_steps}


def whitened(
    x, gamma=None, beta=None, *, axis=-1, size, method, epsilon=1e-3, shrinkage=0.0, weights=None
):
    last = np.moveaxis(x, axis, -1)
    rows = last.reshape(-1, last.shape[-1])
    w = np.ones(len(rows))
    if weights is not None:
        w = np.moveaxis(np.broadcast_to(weights, x.shape), axis, -1).reshape(rows.shape)[:, 0]
    w = w.astype("float64")
    counted = np.where(w[:, None] > 0, rows, 0)
    mean = w @ counted / w.sum()
    y, covariances = np.zeros_like(rows), []
    for first in range(0, rows.shape[1], size):
        block = slice(first, first + size)
        centered = np.where(w[:, None] > 0, rows - mean, 0)[:, block]
        covariance = (w[:, None] * centered).T @ centered / w.sum()
        a = (1 - shrinkage) * covariance + epsilon * np.eye(size)
        a = a + shrinkage * np.trace(covariance) / size * np.eye(size)
        y[:, block] = (rows - mean)[:, block] @ MATRIX[method](a).T
        covariances.append(covariance)
    y = np.moveaxis(y.reshape(last.shape), -1, axis)
    return affine(y, gamma, beta, axis), mean, np.array(covariances)


def affine(y, gamma, beta, axis):
    return reference_layer.affine(y, gamma, beta, channel_axes(axis, y.ndim))


def target_of(name, quantiles):
    """Quantiles and ends of the target, by numbers of its own."""
    p = (np.arange(quantiles) + 0.5) / quantiles
    if name == "uniform":
        return 2 * np.sqrt(3) * (p - 0.5), np.sqrt(3)
    return stats.norm.ppf(p), 4.0


def ranked(x, gamma=None, beta=None, *, axis=-1, target, quantiles, epsilon=1e-3, mask=None):
    last = np.moveaxis(x, axis, -1)
    rows = last.reshape(-1, last.shape[-1])
    kept = np.ones(len(rows), bool)
    if mask is not None:
        kept = np.moveaxis(np.broadcast_to(mask, x.shape), axis, -1).reshape(rows.shape)[:, 0]
    z, end = target_of(target, quantiles)
    y, q = np.zeros_like(rows), np.zeros((quantiles, rows.shape[1]), rows.dtype)
    for c in range(rows.shape[1]):
        ordered = rows[kept, c][np.argsort(rows[kept, c].real, kind="stable")]
        at = np.clip((np.arange(quantiles) + 0.5) / quantiles * len(ordered) - 0.5, 0, None)
        at = np.minimum(at, len(ordered) - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, len(ordered) - 1)
        q[:, c] = (1 - (at - low)) * ordered[low] + (at - low) * ordered[high]
        y[:, c] = straight_lines(rows[:, c], q[:, c], z, end, epsilon)
    y = np.moveaxis(y.reshape(last.shape), -1, axis)
    return affine(y, gamma, beta, axis), q


def straight_lines(v, q, z, end, epsilon):
    """The sum of ramps between neighbouring quantiles; the outer ones reach the target's ends."""
    y = z[0] + 0 * v
    for k in range(len(z) - 1):
        rise = z[k + 1] - z[k]
        low = (-end - z[0]) / rise if k == 0 else 0
        high = 1 + (end - z[-1]) / rise if k == len(z) - 2 else 1
        t = (v - (q[k] + q[k + 1]) / 2) / (q[k + 1] - q[k] + epsilon * (z[-1] - z[0])) + 0.5
        y = y + rise * np.where(t.real < low, low, np.where(t.real > high, high, t))
    return y


def filter_response(x, gamma=None, beta=None, tau=None, learned=None, *, axis=-1, epsilon=1e-6):
    channel = axis % x.ndim
    y = np.zeros_like(x if learned is None else x + learned[0])
    for n in range(len(x)):
        for c in range(x.shape[channel]):
            block = tuple({0: n, channel: c}.get(a, slice(None)) for a in range(x.ndim))
            added = 0 if learned is None else learned[c] * np.sign(learned[c].real)
            y[block] = x[block] / np.sqrt((x[block] ** 2).mean() + epsilon + added)
    y = affine(y, gamma, beta, axis)
    if tau is None:
        return y
    tau = reference_layer.along(tau, x, (channel,)) + 0 * y
    return np.where(y.real > tau.real, y, tau)

"""Normalizations beyond mean and variance: whitening, quantiles, filter responses.

The same lines run on TensorFlow (eagerly, in graphs, under XLA), JAX and PyTorch. Each
normalization is a pure function with its hand-derived gradient, and a Keras layer around it.

Whitening, or decorrelated batch normalization, treats the S channels of a group g together. With
x a vector of S channels, for each of the positions i with weights w >= 0, W = sum w:

    (W1)  mean       = sum w x / W
    (W2)  covariance = sum w (x - mean)(x - mean)^T / W
    (W3)  A          = (1 - shrinkage) covariance + (shrinkage / S) trace I + epsilon I
    (W4)  U with U A U^T = I:  A^(-1/2) ("zca"),  L^-1 of A = L L^T ("cholesky"),  or, of
          P_0 = I, P_(k+1) = (3 P_k - P_k^3 A / trace A) / 2, the last P / sqrt(trace A) ("newton")
    (W5)  x_hat      = U (x - mean)
    (W6)  y          = gamma x_hat + beta

and backward, with dmean and dcovariance the gradients with respect to the statistics:

    (W7)  dbeta  = sum dy,   K = sum dy (x - mean)^T,   dgamma_s = sum over t of U_st K_st
    (W8)  dU     = diag(gamma) K
    (W9)  dA, "zca":       -U^2 Z U^2, where U Z + Z U = (dU + dU^T) / 2
              "cholesky":  -U^T lower(dU U^T) U, with half of the diagonal
              "newton":    the steps of (W4) backward, the last one first
    (W10) B      = (1 - shrinkage) dA + (shrinkage / S) trace(dA) I + dcovariance
    (W11) a      = dmean - U^T diag(gamma) dbeta
    (W12) dx     = U^T diag(gamma) dy + (w / W) (a + (B + B^T) (x - mean))

In the eigenbasis of A, with eigenvalues l, Z_st is dU_st / (l_s^(-1/2) + l_t^(-1/2)): nothing is
divided by a difference of eigenvalues, so that equal ones need no care. (W12) has the form of
(B10) of `keras_norm.functional`, which it is for S = 1.

Quantile normalization sends each channel through its own distribution function F, and the
inverse G^-1 of that of the target. With K quantiles at the levels p_k = (k + 1/2) / K, r the rank
(from 0) of an element among the N of its channel, and hat(t) = max(0, 1 - |t|):

    (Q1)  q_k    = sum x hat(r - (p_k N - 1/2))         (between the two nearest elements)
    (Q2)  z_k    = G^-1(p_k),   d_k = z_(k+1) - z_k
    (Q3)  h_k    = q_(k+1) - q_k + epsilon (z_(K-1) - z_0)
    (Q4)  t_k    = (x - (q_k + q_(k+1)) / 2) / h_k + 1/2
    (Q5)  x_hat  = z_0 + sum over k of d_k clip(t_k)
    (Q6)  y      = gamma x_hat + beta

The clip is to [0, 1], but for the outermost two, which go on as straight lines to the end of the
target's range. Backward, g_k = gamma dy d_k / h_k where t_k is not clipped, else 0:

    (Q7)  dq_k   gets -sum g_k / 2 + sum g_k (t_k - 1/2),
          dq_(k+1)    -sum g_k / 2 - sum g_k (t_k - 1/2)
    (Q8)  dx     = sum over k of g_k + dq_k hat(r - (p_k N - 1/2))

Filter response normalization, per example and channel, over its P positions:

    (F1)  mean_square = sum x^2 / P
    (F2)  inv         = 1 / sqrt(mean_square + epsilon + |learned_epsilon|)
    (F3)  y           = gamma x inv + beta
    (F4)  z           = max(y, tau)

    (F5)  dy      = dz where y > tau, else 0;   dtau = sum of the other dz
    (F6)  dbeta   = sum dy,   dgamma = sum dy x inv,   s = sum over positions of gamma dy x
    (F7)  dx      = inv gamma dy - x inv^3 s / P
    (F8)  dlearned_epsilon = -sign(learned_epsilon) sum over examples of inv^3 s / 2

Reference: Huang, Yang, Lang and Deng, 2018, Decorrelated Batch Normalization. Huang, Zhou, Zhu,
Liu and Shao, 2019, Iterative Normalization. Ledoit and Wolf, 2004, A well-conditioned estimator
for large-dimensional covariance matrices (shrinkage). Singh and Krishnan, 2020, Filter Response
Normalization Layer. The gradients are derived here.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from keras_norm import autodiff, distributed, functional
from keras_norm._state import LiveNumbers
from keras_norm.autodiff import custom_vjp
from keras_norm.layers import (
    _ByChannel,
    _check_dtype,
    _check_fraction,
    _check_switch,
    _weights_of,
)

__all__ = [
    "DecorrelatedBatchNormalization",
    "FilterResponseNormalization",
    "QuantileNormalization",
    "decorrelated_batch_normalization",
    "filter_response_normalization",
    "quantile_normalization",
    "quantile_normalize",
    "whiten",
    "whitening_matrix",
]

Array = Any

METHODS = ("zca", "cholesky", "newton")
TARGETS = ("normal", "uniform")


# What the functions have in common ---------------------------------------------------------------


class _Rows(NamedTuple):
    """x as a matrix: a row for each position of each example, the channels in columns."""

    shape: tuple[Any, ...]  # of x, with the channels last
    channel: int  # where they are

    @classmethod
    def of(cls, x: Array, axis: int) -> "_Rows":
        channel = functional.channel_axis(axis, len(x.shape))
        functional.known_sizes(tuple(x.shape), (channel,))
        shape = list(ops.shape(x))
        shape.append(shape.pop(channel))
        return cls(tuple(shape), channel)

    def split(self, x: Array, *columns: int) -> Array:
        """(N, ..., C) -> (M, *columns), where the columns multiply to C."""
        return ops.reshape(ops.moveaxis(x, self.channel, -1), [-1, *columns])

    def join(self, rows: Array) -> Array:
        """(M, ...) -> (N, ..., C)."""
        return ops.moveaxis(ops.reshape(rows, self.shape), -1, self.channel)

    def weights(self, weights: Array | None, dtype: str) -> Array | None:
        """(N, ..., 1) or smaller -> (M,)."""
        if weights is None:
            return None
        weights = ops.convert_to_tensor(weights)
        per_position = len(weights.shape) == len(self.shape) and (
            weights.shape[self.channel] == 1 or self.shape[-1] == 1
        )
        if not per_position:
            raise ValueError(
                "The channels are normalized together, or by ranks: a mask or weights must be "
                "the same for all channels of a position, of the rank of x and of size 1 on the "
                f"axis of the channels. Received: shape {tuple(weights.shape)} for channels on "
                f"axis {self.channel} of {len(self.shape)}. Use keepdims, or expand_dims."
            )
        weights = ops.moveaxis(ops.cast(weights, dtype), self.channel, -1)
        return ops.reshape(ops.broadcast_to(weights, [*self.shape[:-1], 1]), [-1])


def _elements(rows: Array, weights: Array | None) -> Array:
    """The number of rows, or the sum of their weights; a scalar."""
    if weights is None:
        return ops.cast(ops.shape(rows)[0], rows.dtype)
    return ops.sum(weights)


def _share(rows: Array, weights: Array | None) -> Array:
    """w / W, (M, 1, 1), or 1 / M, a scalar; 0 where nothing has a weight."""
    if weights is None:
        n = ops.shape(rows)[0]
        return 1 / max(n, 1) if isinstance(n, int) else 1 / ops.cast(ops.maximum(n, 1), rows.dtype)
    total = ops.sum(weights)
    return ops.reshape(weights / ops.where(total > 0, total, ops.ones_like(total)), [-1, 1, 1])


def _finite(x: Array) -> Array:
    return ops.where(ops.isfinite(x), x, ops.zeros_like(x))


def _symmetric(a: Array) -> Array:
    return (a + _transposed(a)) / 2


def _transposed(a: Array) -> Array:
    return ops.swapaxes(a, -1, -2)


def _identity(a: Array) -> Array:
    return ops.eye(a.shape[-1], dtype=a.dtype)


def _trace(a: Array) -> Array:
    """(..., S, S) -> (..., 1, 1)."""
    return ops.sum(a * _identity(a), axis=(-2, -1), keepdims=True)


# Whitening matrices ------------------------------------------------------------------------------


class _Whitening(NamedTuple):
    """How the whitening matrix is made of a covariance: (W3), (W4) and backward."""

    method: str
    epsilon: float
    shrinkage: float
    iterations: int

    @classmethod
    def checked(
        cls, method: str, epsilon: float, shrinkage: float, iterations: int
    ) -> "_Whitening":
        if method not in METHODS:
            raise ValueError(
                f"`method` must be one of {METHODS}. Received: method={method!r}. 'zca' changes "
                "the inputs least; 'newton' consists of matrix products alone."
            )
        if not epsilon > 0:
            raise ValueError(
                "`epsilon` is added to the variances; it must be > 0, because covariance matrices "
                f"are often singular. Received: epsilon={epsilon}. The default is 1e-3."
            )
        if not 0 <= shrinkage <= 1:
            raise ValueError(
                "`shrinkage` is the weight of the mean variance against the covariance, in "
                f"[0, 1]. Received: shrinkage={shrinkage}. 0 is none."
            )
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(
                "`iterations` is a number of steps of method='newton', an integer >= 1. "
                f"Received: iterations={iterations!r}. The default is 5."
            )
        return cls(method, epsilon, shrinkage, iterations)

    def regularized(self, covariance: Array) -> Array:
        """(W3). A matrix that is not finite is replaced by the identity, for the solvers' sake."""
        identity = _identity(covariance)
        finite = ops.all(ops.isfinite(covariance), axis=(-2, -1), keepdims=True)
        covariance = ops.where(finite, _symmetric(covariance), identity)
        spread = self._spread(covariance) * _trace(covariance)
        return (1 - self.shrinkage) * covariance + (spread + self.epsilon) * identity

    def regularized_backward(self, da: Array) -> Array:
        """(W10), but for the dcovariance of the loss."""
        da = _symmetric(da)
        return (1 - self.shrinkage) * da + self._spread(da) * _trace(da) * _identity(da)

    def _spread(self, a: Array) -> float:
        # A few units in the last place of the largest eigenvalue, lest rounding make A indefinite.
        rounding = 8 * float(np.finfo(keras.backend.standardize_dtype(a.dtype)).eps)
        return float(self.shrinkage / a.shape[-1] + rounding)

    def matrix(self, a: Array) -> tuple[Array, ...]:
        """(W4): U, and what else `backward` needs, as constants. Differentiable."""
        if self.method == "zca":
            return _inverse_square_root(a)
        if self.method == "cholesky":
            identities = _identity(a) + ops.zeros_like(a)
            return (ops.solve_triangular(ops.cholesky(a), identities, lower=True),)
        trace = _trace(a)
        return (_newton_schulz(a / trace, self.iterations)[-1][1] * ops.rsqrt(trace),)

    def backward(self, du: Array, a: Array, u: Array, *rest: Array) -> Array:
        """(W9)."""
        if self.method == "zca":
            return _inverse_square_root_backward(du, u, *rest)
        if self.method == "cholesky":
            lower = ops.tril(du @ _transposed(u))
            lower = lower - lower * _identity(a) / 2
            return -_symmetric(_transposed(u) @ lower @ u)
        trace = _trace(a)
        normed = a / trace
        dn = _newton_schulz_backward(du * ops.rsqrt(trace), normed, self.iterations) / trace
        through_trace = ops.sum(dn * normed + du * u / (2 * trace), axis=(-2, -1), keepdims=True)
        return dn - through_trace * _identity(a)


def _inverse_square_root(a: Array, order: int = 2) -> tuple[Array, Array, Array]:
    """U = A^(-1/2), and the eigenvalues and eigenvectors of A, by which alone it is computed.

    The residual U of each order of differentiation is a function with a gradient of its own, so
    that no derivative of eigenvectors, which breaks down at equal eigenvalues, is ever taken.
    """

    def forward(a: Array) -> tuple[Any, Any]:
        if order > 1:
            results = _inverse_square_root(a, order - 1)
        else:
            eigenvalues, q = ops.eigh(a)
            results = _in_basis(q, _diagonal(ops.rsqrt(eigenvalues))), eigenvalues, q
        return results, results

    def backward(residuals: Any, upstream: Any) -> tuple[Array]:
        return (_inverse_square_root_backward(upstream[0], *residuals),)

    u, eigenvalues, q = custom_vjp(forward, backward, a)
    return u, ops.stop_gradient(eigenvalues), ops.stop_gradient(q)


def _inverse_square_root_backward(du: Array, u: Array, eigenvalues: Array, q: Array) -> Array:
    """The derivative of U U = A^-1: dU U + U dU = -U^2 dA U^2, transposed. (W9)"""
    z = _lyapunov(u, _symmetric(du), ops.stop_gradient(eigenvalues), ops.stop_gradient(q))
    square = u @ u
    return -(square @ z @ square)


def _lyapunov(u: Array, g: Array, eigenvalues: Array, q: Array) -> Array:
    """Z with U Z + Z U = G, all symmetric; U = Q diag(eigenvalues^(-1/2)) Q^T."""

    def forward(u: Array, g: Array, eigenvalues: Array, q: Array) -> tuple[Any, Any]:
        s = ops.rsqrt(eigenvalues)
        divisor = ops.expand_dims(s, -1) + ops.expand_dims(s, -2)
        z = _in_basis(q, (_transposed(q) @ g @ q) / divisor)
        return (z,), (u, z, eigenvalues, q)

    def backward(residuals: Any, upstream: Any) -> tuple[Array | None, ...]:
        u, z, eigenvalues, q = residuals
        dg = _lyapunov(u, _symmetric(upstream[0]), eigenvalues, q)
        return -(dg @ z + z @ dg), dg, None, None

    (z,) = custom_vjp(forward, backward, u, g, eigenvalues, q)
    return z


def _in_basis(q: Array, a: Array) -> Array:
    return q @ a @ _transposed(q)


def _diagonal(v: Array) -> Array:
    return ops.expand_dims(v, -1) * ops.eye(v.shape[-1], dtype=v.dtype)


def _newton_schulz(a: Array, iterations: int) -> list[tuple[Array, Array]]:
    """(A P_k, P_k) of (W4) for k from 0 to `iterations`, for an A of trace 1.

    The two are iterated side by side: computed from P_k alone, rounding errors grow without end.
    """
    pairs = [(a, _identity(a) + ops.zeros_like(a))]
    for _ in range(iterations):
        y, p = pairs[-1]
        t = (3 * _identity(a) - p @ y) / 2
        pairs.append((y @ t, t @ p))
    return pairs


def _newton_schulz_backward(dp: Array, a: Array, iterations: int) -> Array:
    """dA from the gradient of the last P."""
    dy = ops.zeros_like(a)
    for y, p in _newton_schulz(a, iterations)[-2::-1]:
        t = (3 * _identity(a) - p @ y) / 2
        dt = (_transposed(y) @ dy + dp @ _transposed(p)) / 2
        dy, dp = (
            dy @ _transposed(t) - _transposed(p) @ dt,
            _transposed(t) @ dp - dt @ _transposed(y),
        )
    return dy


def whitening_matrix(
    covariance: Array,
    *,
    method: str = "zca",
    epsilon: float = 1e-3,
    shrinkage: float = 0.0,
    iterations: int = 5,
) -> Array:
    """The matrix that makes channels of a given covariance uncorrelated, (W3) and (W4).

    Args:
        covariance: (..., S, S), symmetric.
        method, epsilon, shrinkage, iterations: as in `decorrelated_batch_normalization`.

    Returns:
        U, (..., S, S): U covariance U^T is the identity, but for epsilon and shrinkage.
        Differentiable, and again.

    Raises:
        ValueError: as `decorrelated_batch_normalization`.

    Example:
        >>> u = whitening_matrix(np.array([[2.0, 1.0], [1.0, 2.0]]), epsilon=1e-9)
        >>> ops.convert_to_numpy(u).round(4).tolist()
        [[0.7887, -0.2113], [-0.2113, 0.7887]]
    """
    whitening = _Whitening.checked(method, epsilon, shrinkage, iterations)

    def forward(covariance: Array) -> tuple[Any, Any]:
        a = whitening.regularized(covariance)
        u, *rest = whitening.matrix(a)
        return (u,), (a, u, *rest)

    def backward(residuals: Any, upstream: Any) -> tuple[Array]:
        return (whitening.regularized_backward(whitening.backward(upstream[0], *residuals)),)

    (u,) = custom_vjp(forward, backward, covariance)
    return u


# Decorrelated batch normalization ----------------------------------------------------------------


def channels_of_group(group_size: int | None, channels: int) -> int:
    """How many channels are whitened together: None is the largest divisor up to 16, -1 is all.

    Raises:
        ValueError: for a size that does not divide the channels, or is no size.

    Example:
        >>> channels_of_group(None, 120), channels_of_group(-1, 120), channels_of_group(8, 120)
        (15, 120, 8)
    """
    check_group_size(group_size)
    if group_size is None:
        return max(d for d in range(1, 17) if channels % d == 0)
    if group_size == -1:
        return channels
    if channels % group_size:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(
            "All groups of channels have the same size, so `group_size` must divide the number "
            f"of channels. Received: group_size={group_size}, channels={channels}. Use one of "
            f"{divisors}, or None for the largest divisor up to 16."
        )
    return group_size


def check_group_size(size: Any) -> None:
    """Refuses what is no number of channels.

    Raises:
        ValueError: for anything but an integer >= 1, -1 or None.
    """
    valid = isinstance(size, int) and not isinstance(size, bool) and (size >= 1 or size == -1)
    if size is not None and not valid:
        raise ValueError(
            "`group_size` is the number of channels that are whitened together, an integer >= 1, "
            f"or -1 for all of them. Received: group_size={size!r}. Leave it out for the largest "
            "divisor of the number of channels up to 16."
        )


def decorrelated_batch_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    group_size: int | None = None,
    method: str = "zca",
    epsilon: float = 1e-3,
    shrinkage: float = 0.0,
    iterations: int = 5,
    weights: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Whitens groups of channels by their covariance in the batch, equations (W1) to (W12).

    Args:
        x: array of any rank >= 2, of a floating dtype; (N, C) or (N, H, W, C), for example.
        gamma, beta: scale and offset of each channel, (C,). Default: none.
        axis: the axis of the channels, not 0. Default: the last.
        group_size: S, how many neighbouring channels are whitened together; it divides C; -1 for
            all; None for the largest divisor of C up to 16. Default: None.
        method: "zca", "cholesky" or "newton". Default: "zca".
        epsilon: > 0, added to the variances. Default: 1e-3.
        shrinkage: in [0, 1], how far the covariance is moved towards a multiple of the identity
            with the same trace. Default: 0.
        iterations: >= 1, steps of the "newton" method. Default: 5.
        weights: how much every position counts in the statistics: numbers >= 0 or booleans, of
            x's rank, broadcastable to x, with size 1 on the axis of the channels. Constants.
            Default: all alike.

    Returns:
        (y, mean, covariance): y of the shape and dtype of x; mean (C,) and biased covariance
        (C / S, S, S), in at least float32. All differentiable, y also twice.

    Raises:
        ValueError: for an unknown method, a group size that does not divide C, and arguments
            outside of their range.

    Numerics:
        In float32, or float64 if x is; the mean is taken in two steps, the covariance of
        x - mean. To what epsilon says, a few units in the last place of the trace are added, so
        that rounding cannot make the matrix indefinite.

    Example:
        >>> x = np.array([[1.0, 1.0], [-1.0, -1.0], [2.0, -2.0], [-2.0, 2.0]], "float32")
        >>> y, mean, covariance = decorrelated_batch_normalization(x, epsilon=1e-6)
        >>> ops.convert_to_numpy(covariance).tolist()
        [[[2.5, -1.5], [-1.5, 2.5]]]
        >>> (abs(ops.convert_to_numpy(y)).round(3) + 0).tolist()  # uncorrelated, of variance 1
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]

    Reference:
        Huang, Yang, Lang and Deng, 2018, section 3; Huang et al., 2019, section 3.
    """
    whitening = _Whitening.checked(method, epsilon, shrinkage, iterations)
    x = ops.convert_to_tensor(x)
    rows = _Rows.of(x, axis)
    size = channels_of_group(group_size, x.shape[rows.channel])
    weights = rows.weights(weights, functional.compute_dtype(x))

    def forward(x: Array, gamma: Any, beta: Any, weights: Any) -> tuple[Any, Any]:
        groups = _Groups.of(x, axis, size)
        v = groups.split(x)
        mean, covariance = _moments(v, weights)  # (W1) (W2)
        a = whitening.regularized(covariance)  # (W3)
        u, *rest = whitening.matrix(a)  # (W4)
        y = groups.affine(v, mean, u, gamma, beta)  # (W5) (W6)
        outputs = ops.cast(groups.join(y), x.dtype), ops.reshape(mean, [-1]), covariance
        return outputs, (x, gamma, weights, mean, a, u, *rest)

    def backward(residuals: Any, upstream: Any) -> tuple[Array | None, ...]:
        x, gamma, weights, mean, a, u, *rest = residuals
        dy, dmean, dcovariance = upstream
        groups = _Groups.of(x, axis, size)
        v, dy = groups.split(x), groups.split(dy)
        centered = v - mean if weights is None else _finite(v - mean)
        dx, dgamma, dbeta, du, dcenter = groups.affine_backward(dy, centered, u, gamma)
        b = whitening.regularized_backward(whitening.backward(du, a, u, *rest))
        b = b + dcovariance  # (W10)
        dmean = ops.reshape(dmean, [*dcenter.shape]) - dcenter  # (W11)
        spread = ops.einsum("mgt,gst->mgs", centered, b + _transposed(b))
        dx = dx + _share(v, weights) * (dmean + spread)  # (W12)
        return groups.join(dx), dgamma, dbeta, None

    y, mean, covariance = custom_vjp(forward, backward, x, gamma, beta, weights)
    return y, mean, covariance


def whiten(
    x: Array,
    mean: Array,
    covariance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    method: str = "zca",
    epsilon: float = 1e-3,
    shrinkage: float = 0.0,
    iterations: int = 5,
) -> Array:
    """Whitens by a mean and a covariance that are given, equations (W3) to (W6).

    Decorrelated batch normalization in inference is this with the moving statistics.

    Args:
        x, gamma, beta, axis, method, epsilon, shrinkage, iterations: as in
            `decorrelated_batch_normalization`.
        mean: (C,).
        covariance: (C / S, S, S).

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: as `decorrelated_batch_normalization`, and for a covariance of other channels.

    Example:
        >>> y = whiten(np.array([[3.0, 5.0]]), np.ones(2), np.array([[[4.0]], [[16.0]]]))
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[1.0, 1.0]]
    """
    whitening = _Whitening.checked(method, epsilon, shrinkage, iterations)
    x, covariance = ops.convert_to_tensor(x), ops.convert_to_tensor(covariance)
    channels, shape = x.shape[_Rows.of(x, axis).channel], tuple(covariance.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[0] * shape[1] != channels:
        raise ValueError(
            "`covariance` must be of shape (C / S, S, S) for the C channels of x. Received: "
            f"covariance.shape={shape}, channels={channels}. For one group use shape (1, C, C)."
        )
    size = shape[-1]

    def forward(*arrays: Any) -> tuple[Any, Any]:
        x: Array = arrays[0]
        mean, covariance, gamma, beta = arrays[1:]
        groups = _Groups.of(x, axis, size)
        v = groups.split(x)
        mean = ops.reshape(ops.cast(mean, v.dtype), [-1, size])
        a = whitening.regularized(ops.cast(covariance, v.dtype))
        u, *rest = whitening.matrix(a)
        y = groups.affine(v, mean, u, gamma, beta)
        return (ops.cast(groups.join(y), x.dtype),), (x, gamma, mean, a, u, *rest)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        x, gamma, mean, a, u, *rest = residuals
        groups = _Groups.of(x, axis, size)
        centered, dy = groups.split(x) - mean, groups.split(upstream[0])
        dx, dgamma, dbeta, du, dcenter = groups.affine_backward(dy, centered, u, gamma)
        dcovariance = whitening.regularized_backward(whitening.backward(du, a, u, *rest))
        return groups.join(dx), -ops.reshape(dcenter, [-1]), dcovariance, dgamma, dbeta

    (y,) = custom_vjp(forward, backward, x, mean, covariance, gamma, beta)
    return y


class _Groups(NamedTuple):
    """x as vectors of the channels of a group, and what is done to each of them."""

    rows: _Rows
    number: int
    size: int
    dtype: str

    @classmethod
    def of(cls, x: Array, axis: int, size: int) -> "_Groups":
        rows = _Rows.of(x, axis)
        return cls(rows, x.shape[rows.channel] // size, size, functional.compute_dtype(x))

    def split(self, x: Array) -> Array:
        return ops.cast(self.rows.split(x, self.number, self.size), self.dtype)  # -> (M, G, S)

    def join(self, v: Array) -> Array:
        return self.rows.join(v)  # (M, G, S) -> (N, ..., C)

    def channels(self, v: Array | None) -> Array | None:
        """(C,) -> (G, S)."""
        return None if v is None else ops.reshape(ops.cast(v, self.dtype), [self.number, self.size])

    def affine(self, v: Array, mean: Array, u: Array, gamma: Any, beta: Any) -> Array:
        """gamma U (x - mean) + beta, (M, G, S)."""
        y = ops.einsum("gst,mgt->mgs", self._scaled(u, gamma), v - mean)
        return y if beta is None else y + self.channels(beta)

    def affine_backward(
        self, dy: Array, centered: Array, u: Array, gamma: Any
    ) -> tuple[Array, ...]:
        """dx with the statistics held fixed, dgamma, dbeta, dU, U^T diag(gamma) dbeta."""
        dbeta = ops.sum(dy, axis=0)  # (G, S)
        k = ops.einsum("mgs,mgt->gst", dy, centered)
        dgamma = ops.sum(u * k, axis=-1)  # (W7)
        du = self._scaled(k, gamma)  # (W8)
        scaled = self._scaled(u, gamma)
        dx = ops.einsum("gst,mgs->mgt", scaled, dy)
        dcenter = ops.einsum("gst,gs->gt", scaled, dbeta)
        return dx, ops.reshape(dgamma, [-1]), ops.reshape(dbeta, [-1]), du, dcenter

    def _scaled(self, a: Array, gamma: Any) -> Array:
        gamma = self.channels(gamma)
        return a if gamma is None else ops.expand_dims(gamma, -1) * a


def _moments(v: Array, weights: Array | None) -> tuple[Array, Array]:
    """(W1) and (W2): (M, G, S) -> (G, S), (G, S, S)."""
    share = _share(v, weights)

    def counted(x: Array) -> Array:
        # What has no weight must not count even if it is infinite: 0 * inf is NaN.
        return x if weights is None else ops.where(share > 0, x, ops.zeros_like(x))

    first = ops.sum(counted(v) * share, axis=0)
    rest = ops.sum(counted(v - first) * share, axis=0)  # what rounding left over
    centered = counted((v - first) - rest)
    return first + rest, ops.einsum("mgs,mgt->gst", centered * share, centered)


# Quantile normalization --------------------------------------------------------------------------


class _Target(NamedTuple):
    """The distribution that a channel is given: its quantiles, and where it ends."""

    z: tuple[float, ...]  # z_k of (Q2)
    low: float  # of t_0 of (Q4): as far down as the target reaches
    high: float  # of t_(K-2), likewise

    @classmethod
    def checked(cls, target: str, quantiles: int) -> "_Target":
        if target not in TARGETS:
            raise ValueError(
                f"`target` must be one of {TARGETS}. Received: target={target!r}. Both have mean "
                "0 and variance 1."
            )
        if isinstance(quantiles, bool) or not isinstance(quantiles, int) or quantiles < 2:
            raise ValueError(
                "`quantiles` is the number of quantiles of each channel, an integer >= 2. "
                f"Received: quantiles={quantiles!r}. The default is 16."
            )
        p = [(k + 0.5) / quantiles for k in range(quantiles)]
        if target == "uniform":  # on [-sqrt 3, sqrt 3], half a step beyond the outer levels
            return cls(tuple(math.sqrt(12) * (v - 0.5) for v in p), -0.5, 1.5)
        z = tuple(statistics.NormalDist().inv_cdf(v) for v in p)
        beyond = (_TAIL - z[-1]) / (z[-1] - z[-2])
        return cls(z, -beyond, 1 + beyond)

    def ramps(self, q: Array, epsilon: float) -> list["_Ramp"]:
        """The terms of (Q5) for the quantiles q, (K, C)."""
        last = len(self.z) - 2
        q = ops.unstack(q, len(self.z), axis=0)
        return [
            _Ramp(
                (q[k] + q[k + 1]) / 2,
                q[k + 1] - q[k] + epsilon * (self.z[-1] - self.z[0]),  # (Q3)
                self.z[k + 1] - self.z[k],
                self.low if k == 0 else 0.0,
                self.high if k == last else 1.0,
            )
            for k in range(last + 1)
        ]


_TAIL = 4.0  # standard deviations at which the normal target ends


class _Ramp(NamedTuple):
    """One term of (Q5): flat, a straight line across h around the middle, flat."""

    middle: Array  # (C,)
    h: Array  # (C,)
    rise: float  # d_k
    low: float
    high: float

    def t(self, x: Array) -> Array:
        return (x - self.middle) / self.h + 0.5  # (Q4)

    def __call__(self, x: Array) -> Array:
        t = self.t(x)  # where: ops.clip rounds its bounds to float32 on PyTorch
        t = ops.where(t < self.low, ops.full_like(t, self.low), t)
        return self.rise * ops.where(t > self.high, ops.full_like(t, self.high), t)

    def backward(self, dy: Array, x: Array) -> tuple[Array, Array, Array]:
        """g_k of every element, and what its two quantiles get. (Q7)"""
        t = self.t(x)
        inside = ops.logical_and(t > self.low, t < self.high)
        g = ops.where(inside, dy * (self.rise / self.h), ops.zeros_like(dy))
        half = ops.sum(g, axis=0) / 2
        slant = ops.sum(ops.where(inside, g * (t - 0.5), ops.zeros_like(g)), axis=0)
        return g, slant - half, -slant - half


def _by_ramps(x: Array, q: Array, target: _Target, epsilon: float) -> Array:
    x_hat = ops.full_like(x, target.z[0])
    for ramp in target.ramps(q, epsilon):
        x_hat = x_hat + ramp(x)  # (Q5)
    return x_hat


def _by_ramps_backward(
    dx_hat: Array, x: Array, q: Array, target: _Target, epsilon: float
) -> tuple[Array, Array]:
    """dx with the quantiles held fixed, and dq."""
    dx = ops.zeros_like(dx_hat)
    dq = [ops.zeros_like(q[0]) for _ in target.z]
    for k, ramp in enumerate(target.ramps(q, epsilon)):
        g, below, above = ramp.backward(dx_hat, x)
        dx, dq[k], dq[k + 1] = dx + g, dq[k] + below, dq[k + 1] + above
    return dx, ops.stack(dq)


def _positions(n: Array, quantiles: int) -> list[Array]:
    """p_k N - 1/2, where the quantiles stand among the sorted elements; scalars."""
    last = ops.relu(n - 1)
    at = [ops.relu(((k + 0.5) / quantiles) * n - 0.5) for k in range(quantiles)]
    return [ops.where(v > last, last, v) for v in at]


def _order(x: Array, counted: Array | None) -> Array:
    """The elements of each column in ascending order; last those that do not count."""
    x = ops.stop_gradient(x)
    if counted is not None:
        x = ops.where(ops.expand_dims(counted, -1), x, ops.full_like(x, np.inf))
    return ops.argsort(x, axis=0)


def _quantiles(x: Array, order: Array, n: Array, quantiles: int) -> Array:
    """(Q1), (M, C) -> (K, C); 0 where no element counts."""
    size = ops.shape(x)[0]
    if isinstance(size, int) and size == 0:
        return ops.zeros([quantiles, x.shape[1]], x.dtype)
    x = ops.take_along_axis(x, order, axis=0)
    last = ops.cast(ops.relu(n - 1), "int32")
    result = []
    for position in _positions(n, quantiles):
        below = ops.cast(ops.floor(position), "int32")
        above = ops.where(below < last, below + 1, last)
        rest = position - ops.cast(below, x.dtype)
        low, high = ops.take(x, below, axis=0), ops.take(x, above, axis=0)
        result.append(low + rest * (high - low))
    return ops.where(n > 0, ops.stack(result), ops.zeros_like(ops.stack(result)))


def _quantiles_backward(dq: Array, order: Array, n: Array) -> Array:
    """The second half of (Q8), (K, C) -> (M, C)."""
    rank = ops.cast(ops.argsort(order, axis=0), dq.dtype)
    dx = ops.zeros_like(rank)
    for dq_k, position in zip(
        ops.unstack(dq, dq.shape[0], axis=0), _positions(n, dq.shape[0]), strict=True
    ):
        dx = dx + dq_k * ops.relu(1 - ops.abs(rank - position))
    return ops.where(n > 0, dx, ops.zeros_like(dx))


def quantile_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    target: str = "normal",
    quantiles: int = 16,
    epsilon: float = 1e-3,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """Gives every channel the distribution of the target, equations (Q1) to (Q8).

    Args:
        x: array of any rank >= 2, of a floating dtype.
        gamma, beta: scale and offset of each channel, (C,). Default: none.
        axis: the axis of the channels, not 0. Default: the last.
        target: "normal", or "uniform" on [-sqrt 3, sqrt 3]; both of mean 0 and variance 1.
            Default: "normal".
        quantiles: K >= 2, how finely the distribution is followed. Default: 16.
        epsilon: > 0, in the unit of x: the slope dy / dx is at most 1 / epsilon. Elements
            closer to each other than this, equal ones above all, share one value. Default: 1e-3.
        mask: booleans, of x's rank, broadcastable to x, of size 1 on the axis of the channels:
            what is False does not count among the ranks. Default: all count.

    Returns:
        (y, q): y of the shape and dtype of x; q the quantiles of each channel, (K, C), in at
        least float32. Differentiable, also through the quantiles, and y also twice.

    Raises:
        ValueError: for an unknown target, less than 2 quantiles, and an epsilon that is not > 0.

    Numerics:
        In float32, or float64 if x is. Exact at the quantiles but for epsilon, and straight
        between them. The normal target ends at 4 standard deviations: no gradient flows beyond.

    Example:
        >>> x = np.array([[1.0], [10.0], [100.0], [1000.0]], "float32")
        >>> y, q = quantile_normalization(x, target="uniform", quantiles=4)
        >>> ops.convert_to_numpy(q)[:, 0].tolist()
        [1.0, 10.0, 100.0, 1000.0]
        >>> (ops.convert_to_numpy(y)[:, 0] / 3**0.5).round(2).tolist()
        [-0.75, -0.25, 0.25, 0.75]
    """
    to, width = _Target.checked(target, quantiles), _checked_width(epsilon)
    x = ops.convert_to_tensor(x)
    rows = _Rows.of(x, axis)
    dtype = functional.compute_dtype(x)
    weights = rows.weights(mask, dtype)

    def forward(x: Array, gamma: Any, beta: Any, weights: Any) -> tuple[Any, Any]:
        v = _columns(x, axis)
        n = _elements(v, weights)
        order = _order(v, None if weights is None else weights > 0)
        q = _quantiles(v, order, n, quantiles)
        y = _affine(_by_ramps(v, q, to, width), gamma, beta)
        return (_restored(y, x, axis), q), (x, gamma, q, order, n)

    def backward(residuals: Any, upstream: Any) -> tuple[Array | None, ...]:
        x, gamma, q, order, n = residuals
        v, dy = _columns(x, axis), ops.cast(_columns(upstream[0], axis), q.dtype)
        dx, dq, dgamma, dbeta = _affine_ramps_backward(dy, v, q, gamma, to, width)
        dx = dx + _quantiles_backward(dq + upstream[1], order, n)  # (Q8)
        return _restored(dx, x, axis), dgamma, dbeta, None

    y, q = custom_vjp(forward, backward, x, gamma, beta, weights)
    return y, q


def quantile_normalize(
    x: Array,
    q: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    target: str = "normal",
    epsilon: float = 1e-3,
) -> Array:
    """Gives every channel the distribution of the target by given quantiles, (Q2) to (Q6).

    Args:
        x, gamma, beta, axis, target, epsilon: as in `quantile_normalization`.
        q: (K, C), ascending.

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: as `quantile_normalization`, and for quantiles of other channels.

    Example:
        >>> y = quantile_normalize(np.array([[5.0]]), np.array([[4.0], [6.0]]))
        >>> float(y[0, 0])
        0.0
    """
    x, q = ops.convert_to_tensor(x), ops.convert_to_tensor(q)
    channels = x.shape[_Rows.of(x, axis).channel]
    if len(q.shape) != 2 or q.shape[1] != channels:
        raise ValueError(
            "`q` must hold K quantiles of each of the C channels, (K, C). Received: "
            f"q.shape={tuple(q.shape)}, channels={channels}."
        )
    to, width = _Target.checked(target, q.shape[0]), _checked_width(epsilon)

    def forward(x: Array, q: Array, gamma: Any, beta: Any) -> tuple[Any, Any]:
        v = _columns(x, axis)
        q = ops.cast(q, v.dtype)
        y = _affine(_by_ramps(v, q, to, width), gamma, beta)
        return (_restored(y, x, axis),), (x, q, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        x, q, gamma = residuals
        v, dy = _columns(x, axis), ops.cast(_columns(upstream[0], axis), q.dtype)
        dx, dq, dgamma, dbeta = _affine_ramps_backward(dy, v, q, gamma, to, width)
        return _restored(dx, x, axis), dq, dgamma, dbeta

    (y,) = custom_vjp(forward, backward, x, q, gamma, beta)
    return y


def _checked_width(epsilon: float) -> float:
    if not epsilon > 0:
        raise ValueError(
            "`epsilon` bounds the slope where elements are equal, and must be > 0. Received: "
            f"epsilon={epsilon}. The default is 1e-3, in the unit of x."
        )
    return epsilon


def _columns(x: Array, axis: int) -> Array:
    rows = _Rows.of(x, axis)
    return ops.cast(rows.split(x, x.shape[rows.channel]), functional.compute_dtype(x))  # -> (M, C)


def _restored(v: Array, x: Array, axis: int) -> Array:
    return ops.cast(_Rows.of(x, axis).join(v), x.dtype)  # (M, C) -> (N, ..., C)


def _affine(x_hat: Array, gamma: Any, beta: Any) -> Array:
    y = x_hat if gamma is None else x_hat * ops.cast(gamma, x_hat.dtype)
    return y if beta is None else y + ops.cast(beta, x_hat.dtype)  # (Q6)


def _affine_ramps_backward(
    dy: Array, v: Array, q: Array, gamma: Any, target: _Target, epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """dx with the quantiles held fixed, dq, dgamma, dbeta."""
    dgamma = ops.sum(dy * _by_ramps(v, q, target, epsilon), axis=0)
    dx_hat = dy if gamma is None else dy * ops.cast(gamma, dy.dtype)
    dx, dq = _by_ramps_backward(dx_hat, v, q, target, epsilon)
    return dx, dq, dgamma, ops.sum(dy, axis=0)


# Filter response normalization -------------------------------------------------------------------


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
        learned_epsilon: (C,), added to epsilon by its absolute value. Default: none.
        axis: the axis of the channels, not 0. Default: the last.
        epsilon: >= 0, added to the mean square. Default: 1e-6.

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given, and again.

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
    n = math.prod(shape[a] for a in axes)
    return max(n, 1) if isinstance(n, int) else ops.cast(n, dtype)


# The layers --------------------------------------------------------------------------------------


class _MovingStatistics(keras.layers.Layer):
    """What decorrelated batch and quantile normalization have in common: their statistics."""

    def __init__(
        self,
        axis: int,
        momentum: float | None,
        epsilon: float,
        *,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        debiased: bool = False,
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_dtype(self)
        self.axis = axis
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.debiased = debiased
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_count: Any = None
        self._traced = False  # whether a compiled function holds this layer
        self._live = LiveNumbers(momentum=0.0, rest=1.0, update=1.0)
        self.momentum = momentum
        self.update_statistics = update_statistics
        self.use_batch_statistics = use_batch_statistics

    # What may be changed after a function was compiled ----------------------------------------

    @property
    def momentum(self) -> float | None:
        """Weight of the old value in the moving statistics; None for the average of all."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        if value is not None:
            _check_fraction("momentum", value)
        elif self.built and self.moving_count is None:
            raise ValueError(
                "The average over all batches needs their count from the beginning. Received: "
                "momentum=None for a layer that was built without. Pass momentum=None, or "
                "debiased=True, to the constructor."
            )
        number = 1.0 if value is None else float(value)
        self._live.update(momentum=number, rest=1 - number)
        self._momentum = value

    @property
    def update_statistics(self) -> bool:
        """Whether the moving statistics move in training (while the layer is trainable)."""
        return self._update_statistics

    @update_statistics.setter
    def update_statistics(self, value: bool) -> None:
        _check_switch("update_statistics", value, (True, False))
        self._live.update(update=float(value))
        self._update_statistics = value

    @property
    def use_batch_statistics(self) -> bool | None:
        """Whether the batch's statistics normalize; None where `training` decides."""
        return self._use_batch_statistics

    @use_batch_statistics.setter
    def use_batch_statistics(self, value: bool | None) -> None:
        _check_switch("use_batch_statistics", value, (True, False, None))
        if self._traced:
            raise ValueError(
                "A function with this layer was compiled, and its choice of statistics with it. "
                f"Received: use_batch_statistics={value}. Set it before the first compiled call, "
                "or on a copy of the model by keras.models.clone_model."
            )
        self._use_batch_statistics = value

    @property
    def skipped_batches(self) -> int:
        """How many batches left the moving statistics as they were: not finite, or no weight."""
        return self._live.counted

    @property
    def variables(self) -> list[Any]:
        """The weights, and the state that compiled functions read the switches from."""
        return [*super().variables, *self._live.variables]

    # State ------------------------------------------------------------------------------------

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates gamma, beta and the moving statistics."""
        channel = functional.channel_axis(self.axis, len(input_shape))
        (channels,) = functional.known_sizes(input_shape, (channel,))
        self.gamma = self._add_parameter("gamma", channels) if self.scale else None
        self.beta = self._add_parameter("beta", channels) if self.center else None
        self._add_statistics(channels)
        if self.debiased or self.momentum is None:
            self.moving_count = self._add_statistic("moving_count", (), "zeros")
        self._live.build(self._statistics_dtype)
        if hasattr(self, "_track_trackable"):  # a SavedModel holds what is an attribute
            for variable in self._live.variables:
                if variable._value is not None:
                    setattr(self, f"_{variable.name}", variable._value)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={channel: channels})

    @property
    def _statistics_dtype(self) -> str:
        return "float64" if self.variable_dtype == "float64" else "float32"

    def _add_parameter(self, name: str, channels: int) -> Any:
        return self.add_weight(
            name=name,
            shape=(channels,),
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            trainable=True,
            autocast=False,
        )

    def _add_statistic(self, name: str, shape: Sequence[int], initializer: Any) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            dtype=self._statistics_dtype,
            initializer=initializer,
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",  # they are equal: the replicas' are merged
        )

    def _add_statistics(self, channels: int) -> None:
        raise NotImplementedError

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        functional.channel_axis(self.axis, len(input_shape))
        return tuple(input_shape)

    # Forward ----------------------------------------------------------------------------------

    def _normalize(
        self, inputs: Array, training: bool | None, mask: Array | None, sample_weight: Array | None
    ) -> Array:
        x = ops.cast(inputs, self.compute_dtype)
        updates = bool(training and self.trainable)
        if not self._traced and autodiff.is_traced(x):
            self._traced = True
        chosen = self.use_batch_statistics
        by_batch = updates if chosen is None else chosen
        if not (by_batch or updates):
            return self._by_moving(x)
        weights = _weights_of(mask, sample_weight, x)
        y, *batch = self._by_batch(x, weights)
        if updates:
            self._update([ops.stop_gradient(v) for v in batch], self._weight_of_batch(x, weights))
        return y if by_batch else self._by_moving(x)

    def _by_batch(self, x: Array, weights: Array | None) -> tuple[Array, ...]:
        """y, and the statistics of the batch in the order of `_moving`."""
        raise NotImplementedError

    def _by_moving(self, x: Array) -> Array:
        raise NotImplementedError

    def _moving(self) -> list[Any]:
        raise NotImplementedError

    def _merged(self, batch: list[Array], share: Array) -> list[Array]:
        """The statistics of all replicas' batches, of which this one has a share of the weight."""
        return [distributed.all_sum(v * share) for v in batch]

    def _weight_of_batch(self, x: Array, weights: Array | None) -> Array:
        """The number of positions, or the sum of their weights."""
        rows = _Rows.of(x, self.axis)
        if weights is not None:
            return ops.sum(rows.weights(weights, self._statistics_dtype))
        n = math.prod(rows.shape[:-1])
        return ops.cast(n, self._statistics_dtype)

    # The moving statistics --------------------------------------------------------------------

    def _update(self, batch: list[Array], weight: Array) -> None:
        """(B11), unless the switch or the batch says no."""
        now = self._live.read()
        if distributed.replicas() > 1:
            total = distributed.all_sum(weight)
            share = weight / ops.where(total > 0, total, ops.ones_like(total))
            batch, weight = self._merged(batch, share), total
        sound = functools.reduce(
            ops.logical_and, [ops.all(ops.isfinite(v)) for v in batch], weight > 0
        )
        update = now["update"] > 0.5
        moves = ops.logical_and(sound, update)
        self._live.count(ops.logical_xor(moves, update))
        keep, rest = now["momentum"], now["rest"]
        if self.moving_count is not None:
            count = ops.convert_to_tensor(self.moving_count) * keep + 1
            rest = 1 / count
            keep = 1 - rest
            self._assign(self.moving_count, count, moves)
        for variable, value in zip(self._moving(), batch, strict=True):
            old = ops.convert_to_tensor(variable)
            self._assign(variable, old * keep + ops.cast(value, variable.dtype) * rest, moves)

    def _assign(self, variable: Any, value: Array, moves: Any) -> None:
        value = ops.cast(value, variable.dtype)
        variable.assign(ops.where(moves, value, ops.convert_to_tensor(variable)))

    # Configuration ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        names = ["axis", "momentum", "epsilon", "center", "scale"]
        names += ["debiased", "update_statistics", "use_batch_statistics"]
        config = {name: getattr(self, name) for name in names}
        for name in ("beta", "gamma"):
            initializer, regularizer = f"{name}_initializer", f"{name}_regularizer"
            constraint = f"{name}_constraint"
            config[initializer] = initializers.serialize(getattr(self, initializer))
            config[regularizer] = regularizers.serialize(getattr(self, regularizer))
            config[constraint] = constraints.serialize(getattr(self, constraint))
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="keras_norm")
class DecorrelatedBatchNormalization(_MovingStatistics):
    """Batch normalization with the whole covariance: makes channels uncorrelated, of variance 1.

    In training, equations (W1) to (W6) of this module: within each group of channels

        y = gamma U (x - mean) + beta,    U covariance U^T = I

    with the mean and the covariance of the batch, which also move the moving statistics,
    moving <- momentum moving + (1 - momentum) batch's. In inference the moving statistics take
    the place of the batch's. The gradient is the hand-derived one, (W7) to (W12), and stays exact
    where eigenvalues coincide. With one channel to a group it is `BatchNormalization`.

    When it helps: gradient descent is slow along the directions in which the inputs of a layer
    vary together; whitening takes them out, for fewer epochs, most of all in plain nets without
    residual connections, and where the channels are strongly correlated, as the colours of an
    image are. It helps less at the end of training, and batches that are small against the
    group size (below some 10 examples or positions for each channel of a group) make the
    covariance, and the outputs, noisy: use smaller groups, or shrinkage.

    What it costs: 2 M C S multiplications more than batch normalization forward and 3 M C S
    backward, for M positions, C channels and groups of S (a 3x3 convolution of C to C channels
    takes 9 M C^2 forward); and C / S matrices of S x S are decomposed. "zca" takes the longest for
    that on GPUs; "newton" is nothing but matrix products, but leaves directions of small variance
    (below some 1.5^(-2 iterations) of the total, 1 / 58 for 5) with less than variance 1;
    "cholesky" is the cheapest exact one, but its outputs depend on the order of the channels.

    Args:
        axis: int, the axis of the channels, not 0. Default: -1.
        group_size: int, how many neighbouring channels are whitened together; divides their
            number; -1 for all; None for the largest divisor up to 16. Default: None.
        method: "zca" (x_hat as near to the inputs as can be), "cholesky" or "newton".
            Default: "zca".
        momentum: float in [0, 1), weight of the old value in the moving statistics; None for the
            average over all batches so far. Can be changed at any time. Default: 0.99.
        epsilon: float > 0, added to the variances. Default: 1e-3.
        shrinkage: float in [0, 1], how far the covariance is moved towards a multiple of the
            identity, (W3). Default: 0.
        iterations: int >= 1, steps of the method "newton". Default: 5.
        **kwargs: `center`, `scale`, `beta_initializer`, `gamma_initializer`, `beta_regularizer`,
            `gamma_regularizer`, `beta_constraint`, `gamma_constraint`, `debiased`,
            `update_statistics` and `use_batch_statistics` as in `BatchNormalization` (the last
            can only be changed before a function with the layer is compiled); and `name`,
            `dtype`, `trainable` of every Keras layer.

    Call arguments:
        inputs: array of any rank >= 2; (N, C), (N, T, C), (N, H, W, C), ...
        training: bool. True whitens by the batch and updates the moving statistics, unless
            `trainable` is False, as in `BatchNormalization`.
        mask: bool array, what is False does not count in the statistics: of the inputs' first
            axes, as Keras's masks, or of their rank, with size 1 on the axis of the channels.
        sample_weight: numbers >= 0 of such a shape. Default: all alike.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. moving_mean (C,), at first 0, and moving_covariance
        (C / S, S, S), at first the identity: updated in training; with `momentum=None` or
        `debiased` moving_count (). Batches whose statistics are not finite or that have no
        weight leave them as they are, and are counted in `skipped_batches`. Replicas of a
        data-parallel step normalize each by its own batch; the moving statistics are those of all.

    Raises:
        ValueError: for a group size that does not divide the channels, an unknown method, numbers
            out of their range, an axis that the inputs do not have or that is 0, unknown
            channels, an integer dtype, and masks that differ between channels.

    Example:
        >>> layer = DecorrelatedBatchNormalization(epsilon=1e-6)
        >>> x = np.array([[1.0, 1.0], [-1.0, -1.0], [2.0, -2.0], [-2.0, 2.0]], "float32")
        >>> y = ops.convert_to_numpy(layer(x, training=True))
        >>> np.cov(y.T, bias=True).round(3).tolist() == [[1.0, 0.0], [0.0, 1.0]]
        True

    Numerics:
        As `decorrelated_batch_normalization`; statistics in at least float32. Gradients within
        1e-9 of numerical ones in float64, second derivatives too.

    Reference:
        Huang, Yang, Lang and Deng, 2018, Decorrelated Batch Normalization ("zca", groups);
        Huang et al., 2019, Iterative Normalization ("newton"). Those average the matrix U for
        inference; here, as for the variance in batch normalization, the covariance is averaged.
    """

    def __init__(
        self,
        axis: int = -1,
        group_size: int | None = None,
        method: str = "zca",
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        shrinkage: float = 0.0,
        iterations: int = 5,
        **kwargs: Any,
    ) -> None:
        check_group_size(group_size)
        _Whitening.checked(method, epsilon, shrinkage, iterations)
        super().__init__(axis, momentum, epsilon, **kwargs)
        self.group_size = group_size
        self.method = method
        self.shrinkage = shrinkage
        self.iterations = iterations
        self.moving_mean: Any = None
        self.moving_covariance: Any = None

    def _add_statistics(self, channels: int) -> None:
        size = channels_of_group(self.group_size, channels)

        def identities(shape: Any, dtype: Any = None) -> Array:
            return ops.convert_to_tensor(np.tile(np.eye(size), (shape[0], 1, 1)), dtype)

        shape = (channels // size, size, size)
        self.moving_mean = self._add_statistic("moving_mean", (channels,), "zeros")
        self.moving_covariance = self._add_statistic("moving_covariance", shape, identities)

    def call(
        self,
        inputs: Array,
        training: bool | None = None,
        mask: Array | None = None,
        sample_weight: Array | None = None,
    ) -> Array:
        """Normalizes; see the class."""
        return self._normalize(inputs, training, mask, sample_weight)

    def _moving(self) -> list[Any]:
        return [self.moving_mean, self.moving_covariance]

    def _merged(self, batch: list[Array], share: Array) -> list[Array]:
        mean, covariance = batch
        (whole,) = super()._merged([mean], share)
        off = ops.reshape(mean - whole, covariance.shape[:2])
        between = ops.expand_dims(off, -1) * ops.expand_dims(off, -2)
        return [whole, *super()._merged([covariance + between], share)]  # (B14) (B15)

    @property
    def _options(self) -> dict[str, Any]:
        names = ("axis", "method", "epsilon", "shrinkage", "iterations")
        return {name: getattr(self, name) for name in names}

    def _by_batch(self, x: Array, weights: Array | None) -> tuple[Array, ...]:
        return decorrelated_batch_normalization(
            x, self.gamma, self.beta, weights=weights, group_size=self.group_size, **self._options
        )

    def _by_moving(self, x: Array) -> Array:
        return whiten(
            x, self.moving_mean, self.moving_covariance, self.gamma, self.beta, **self._options
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        names = ("group_size", "method", "shrinkage", "iterations")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="keras_norm")
class QuantileNormalization(_MovingStatistics):
    """Gives each channel a normal or uniform distribution, by its own distribution function.

    The probability integral transform: if F is the distribution function of a channel and G that
    of the target, G^-1(F(x)) has the distribution G. In training, equations (Q1) to (Q6) of this
    module, F and G^-1 go through K quantiles of the batch, with straight lines between them:

        y = gamma G^-1(F(x)) + beta

    The batch's quantiles move the moving quantiles, moving <- momentum moving + (1 - momentum)
    batch's, which take their place in inference. The gradient is the hand-derived one, (Q7) and
    (Q8), and flows through the quantiles as well.

    When it helps: where channels have heavy tails, outliers or several modes, that a mean and a
    variance describe badly: an outlier moves a variance without bound, but a rank by one. It
    suits tabular inputs best, on the way into a net. On ordinary activations it gives little over
    batch normalization at a much higher cost; and a monotone transform of each channel can undo
    no correlation. Ranks need batches: some ten elements for each quantile.

    What it costs: sorting each channel, and K sweeps over x forward and 3 K backward, against 3
    and 5 for batch normalization. (XLA makes one sweep of the K.)

    Args:
        axis: int, the axis of the channels, not 0. Default: -1.
        target: "normal", or "uniform" on [-sqrt 3, sqrt 3]; both of mean 0 and variance 1.
            Default: "normal".
        quantiles: int K >= 2, how finely the distribution is followed. Default: 16.
        momentum: float in [0, 1), weight of the old value in the moving quantiles; None for the
            average over all batches so far. Can be changed at any time. Default: 0.99.
        epsilon: float > 0, in the unit of x: the slope is at most 1 / epsilon, and elements
            closer to each other, equal ones above all, share one value. Default: 1e-3.
        **kwargs: as in `DecorrelatedBatchNormalization`.

    Call arguments:
        inputs: array of any rank >= 2; (N, C), (N, T, C), (N, H, W, C), ...
        training: bool. True normalizes by the batch and updates the moving quantiles, unless
            `trainable` is False, as in `BatchNormalization`.
        mask: bool array, what is False does not count among the ranks: of the inputs' first
            axes, as Keras's masks, or of their rank, with size 1 on the axis of the channels.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. moving_quantiles (K, C), at first those of the standard
        normal distribution: updated in training; with `momentum=None` or `debiased` moving_count
        (). The average of quantile functions is that of the distribution half-way in transport
        cost (their Wasserstein barycentre), so that shapes are kept; those of small batches are
        less far out than the population's. Batches with values that are not finite or without any
        weight leave them as they are, and are counted in `skipped_batches`.

    Raises:
        ValueError: for an unknown target, numbers out of their range, an axis that the inputs do
            not have or that is 0, unknown channels, an integer dtype, masks that differ between
            channels, and sample weights: ranks have none.

    Example:
        >>> layer = QuantileNormalization(momentum=0.0, quantiles=32)
        >>> x = np.exp(np.random.default_rng(0).normal(size=(1000, 1))).astype("float32")
        >>> y = ops.convert_to_numpy(layer(x, training=True))
        >>> float(x.max()) > 20, bool(abs(y.mean()) < 0.02 and abs(y.std() - 1) < 0.02)
        (True, True)

    Numerics:
        As `quantile_normalization`; quantiles in at least float32. Gradients within 1e-9 of
        numerical ones in float64.

    Reference:
        Rosenblatt, 1952, Remarks on a multivariate transformation; Bolstad, Irizarry, Astrand and
        Speed, 2003, A comparison of normalization methods for high density oligonucleotide array
        data (quantile normalization). The layer and its gradient are this package's.
    """

    def __init__(
        self,
        axis: int = -1,
        target: str = "normal",
        quantiles: int = 16,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        _Target.checked(target, quantiles)
        _checked_width(epsilon)
        super().__init__(axis, momentum, epsilon, **kwargs)
        self.target = target
        self.quantiles = quantiles
        self.moving_quantiles: Any = None

    def _add_statistics(self, channels: int) -> None:
        z = _Target.checked("normal", self.quantiles).z

        def normal(shape: Any, dtype: Any = None) -> Array:
            return ops.convert_to_tensor(np.tile(np.array(z)[:, None], (1, shape[1])), dtype)

        shape = (self.quantiles, channels)
        self.moving_quantiles = self._add_statistic("moving_quantiles", shape, normal)

    def call(self, inputs: Array, training: bool | None = None, mask: Array | None = None) -> Array:
        """Normalizes; see the class."""
        return self._normalize(inputs, training, mask, None)

    def _moving(self) -> list[Any]:
        return [self.moving_quantiles]

    @property
    def _options(self) -> dict[str, Any]:
        return {"axis": self.axis, "target": self.target, "epsilon": self.epsilon}

    def _by_batch(self, x: Array, weights: Array | None) -> tuple[Array, ...]:
        return quantile_normalization(
            x, self.gamma, self.beta, mask=weights, quantiles=self.quantiles, **self._options
        )

    def _by_moving(self, x: Array) -> Array:
        return quantile_normalize(x, self.moving_quantiles, self.gamma, self.beta, **self._options)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "target": self.target, "quantiles": self.quantiles}


@keras.saving.register_keras_serializable(package="keras_norm")
class FilterResponseNormalization(_ByChannel):
    """Divides each channel of each example by its root mean square; then a learned threshold.

    In training and inference alike, equations (F1) to (F4) of this module:

        y = gamma x / sqrt(mean of x^2 over the positions + epsilon) + beta
        z = max(y, tau)

    The second line is the thresholded linear unit, the activation that the normalization needs:
    without a mean subtracted, a ReLU's fixed threshold at 0 may cut off all of a channel, or
    nothing. Use no other activation after the layer. The gradient is the hand-derived one.

    When it helps: in convolutional nets with small batches, down to 1, where batch normalization
    fails; it depends on no other example and has no moving statistics. The published figures want
    a slow warm-up of the learning rate. What it costs: about as much as `InstanceNormalization`;
    with the threshold it saves the activation.

    Args:
        axis: int, the axis of the channels, not 0. Default: -1.
        epsilon: float >= 0, added to the mean square. Default: 1e-6.
        threshold: bool, whether there is a tau. Default: True.
        learn_epsilon: bool, whether there is a learned epsilon for each channel, added by its
            absolute value, at first 1e-4: for feature maps with few positions, above all one.
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
        gamma (C,), beta (C,), threshold (C,), learned_epsilon (C,), as far as asked for: trained.

    Raises:
        ValueError: for inputs without positions, an axis that the inputs do not have or that is
            0, a negative epsilon, an integer or complex dtype, inputs whose channels are unknown.

    Example:
        >>> layer = FilterResponseNormalization()
        >>> y = layer(np.array([[[3.0, 1.0], [-3.0, 1.0]]], "float32"))  # (N=1, T=2, C=2)
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[[1.0, 1.0], [0.0, 1.0]]]

    Numerics:
        Accumulated, and parameters kept, in at least float32; under a mixed policy float32 inputs
        are normalized as they are. Gradients within 1e-9 of numerical ones in float64.

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

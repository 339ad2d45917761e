"""Whitening, and decorrelated batch normalization: equations (W1) to (W12) of `research`."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_norm import functional
from keras_norm._arrays import is_integer, is_real
from keras_norm._rows import NormalizationByRows, Rows, share_of
from keras_norm._state import as_of_now
from keras_norm.autodiff import custom_vjp

__all__ = [
    "DecorrelatedBatchNormalization",
    "channels_of_group",
    "decorrelated_batch_normalization",
    "whiten",
    "whitening_matrix",
]

Array = Any

METHODS = ("zca", "cholesky", "newton")


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
    """How the whitening matrix is computed from a covariance: (W3), (W4) and backward."""

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
        if not (is_real(epsilon) and epsilon > 0):
            raise ValueError(
                "`epsilon` is added to the variances; it must be a number > 0, because covariance "
                f"matrices are often singular. Received: epsilon={epsilon!r}. The default is 1e-3."
            )
        if not (is_real(shrinkage) and 0 <= shrinkage <= 1):
            raise ValueError(
                "`shrinkage` is the weight of the mean variance against the covariance, a number "
                f"in [0, 1]. Received: shrinkage={shrinkage!r}. 0 is none."
            )
        if not (is_integer(iterations) and iterations >= 1):
            raise ValueError(
                "`iterations` is a number of steps of method='newton', an integer >= 1. "
                f"Received: iterations={iterations!r}. The default is 5."
            )
        return cls(method, epsilon, shrinkage, iterations)

    def regularized(self, covariance: Array) -> Array:
        """(W3). A matrix that is not finite is replaced by the identity, to protect the solvers."""
        identity = _identity(covariance)
        finite = ops.all(ops.isfinite(covariance), axis=(-2, -1), keepdims=True)
        covariance = ops.where(finite, _symmetric(covariance), identity)
        spread = self._spread(covariance) * _trace(covariance)
        return (1 - self.shrinkage) * covariance + (spread + self.epsilon) * identity

    def regularized_backward(self, da: Array) -> Array:
        """(W10), without the dcovariance of the loss."""
        da = _symmetric(da)
        return (1 - self.shrinkage) * da + self._spread(da) * _trace(da) * _identity(da)

    def _spread(self, a: Array) -> float:
        # A few ulps of the largest eigenvalue, so that rounding cannot make A indefinite.
        rounding = 8 * float(np.finfo(keras.backend.standardize_dtype(a.dtype)).eps)
        return float(self.shrinkage / a.shape[-1] + rounding)

    def matrix(self, a: Array) -> tuple[Array, ...]:
        """(W4): U, and the constants that `backward` also needs. Differentiable."""
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
    """U = A^(-1/2), and the eigenvalues and eigenvectors of A, from which it is computed.

    At each order of differentiation the residual U is a function with its own gradient, so that
    eigenvectors, whose derivative breaks down at equal eigenvalues, are never differentiated.
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

    The two are iterated side by side: from P_k alone, rounding errors would grow without bound.
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
        U, (..., S, S): U covariance U^T is the identity, except for epsilon and shrinkage.
        Twice differentiable.

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
        ValueError: for a size that does not divide the channels, or is not a size.

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
    return int(group_size)


def check_group_size(size: Any) -> None:
    """Refuses what is not a number of channels.

    Raises:
        ValueError: for anything but an integer >= 1, -1 or None.
    """
    if size is not None and not (is_integer(size) and (size >= 1 or size == -1)):
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
        weights: how much each position counts in the statistics: numbers >= 0 or booleans, of
            x's rank, broadcastable to x, with size 1 on the axis of the channels. Constants.
            Default: all count alike.

    Returns:
        (y, mean, covariance): y of the shape and dtype of x; mean (C,) and biased covariance
        (C / S, S, S), in at least float32. All differentiable, y also twice.

    Raises:
        ValueError: for an unknown method, a group size that does not divide C, and arguments
            out of their range.

    Numerics:
        In float32, or float64 if x is; the mean is computed in two steps, the covariance from
        x - mean. A few units in the last place of the trace are added to epsilon, so that
        rounding cannot make the matrix indefinite.

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
    rows = Rows.of(x, axis)
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
        centered = v - mean if weights is None else functional.zero_where_not_finite(v - mean)
        dx, dgamma, dbeta, du, dcenter = groups.affine_backward(dy, centered, u, gamma)
        b = whitening.regularized_backward(whitening.backward(du, a, u, *rest))
        b = b + dcovariance  # (W10)
        dmean = ops.reshape(dmean, [*dcenter.shape]) - dcenter  # (W11)
        spread = ops.einsum("mgt,gst->mgs", centered, b + _transposed(b))
        dx = dx + share_of(v, weights) * (dmean + spread)  # (W12)
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
    """Whitens by a given mean and covariance, equations (W3) to (W6).

    With the moving statistics, this is decorrelated batch normalization in inference.

    Args:
        x, gamma, beta, axis, method, epsilon, shrinkage, iterations: as in
            `decorrelated_batch_normalization`.
        mean: (C,).
        covariance: (C / S, S, S).

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: as `decorrelated_batch_normalization`, and for a mean or a covariance of other
            channels.

    Example:
        >>> y = whiten(np.array([[3.0, 5.0]]), np.ones(2), np.array([[[4.0]], [[16.0]]]))
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[1.0, 1.0]]
    """
    whitening = _Whitening.checked(method, epsilon, shrinkage, iterations)
    x, mean, covariance = map(ops.convert_to_tensor, (x, mean, covariance))
    channels, shape = x.shape[Rows.of(x, axis).channel], tuple(covariance.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[0] * shape[1] != channels:
        raise ValueError(
            "`covariance` must be of shape (C / S, S, S) for the C channels of x. Received: "
            f"covariance.shape={shape}, channels={channels}. For one group use shape (1, C, C)."
        )
    if tuple(mean.shape) != (channels,):
        raise ValueError(
            "`mean` must be of shape (C,), one for each of the C channels of x. Received: "
            f"mean.shape={tuple(mean.shape)}, channels={channels}."
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
    """x as vectors of the channels of a group, and the operations on them."""

    rows: Rows
    number: int
    size: int
    dtype: str

    @classmethod
    def of(cls, x: Array, axis: int, size: int) -> "_Groups":
        rows = Rows.of(x, axis)
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
    share = share_of(v, weights)

    def counted(x: Array) -> Array:
        # Elements without weight must not count even if they are infinite: 0 * inf is NaN.
        return x if weights is None else ops.where(share > 0, x, ops.zeros_like(x))

    first = ops.sum(counted(v) * share, axis=0)
    rest = ops.sum(counted(v - first) * share, axis=0)  # what rounding left out
    centered = counted((v - first) - rest)
    return first + rest, ops.einsum("mgs,mgt->gst", centered * share, centered)


# The layer ---------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_norm")
class DecorrelatedBatchNormalization(NormalizationByRows):
    """Batch normalization with the whole covariance: makes channels uncorrelated, of variance 1.

    In training, equations (W1) to (W6) of `keras_norm.research`: within each group of channels

        y = gamma U (x - mean) + beta,    U covariance U^T = I

    with the mean and the covariance of the batch, which also update the moving statistics,
    moving <- momentum moving + (1 - momentum) batch's. In inference the moving statistics take
    the place of the batch's. The gradient is the hand-derived one, (W7) to (W12), and stays exact
    where eigenvalues coincide. With one channel per group it is `BatchNormalization`.

    When it helps: gradient descent is slow along the directions in which the inputs of a layer
    vary together; whitening removes them, which saves epochs, most of all in plain nets without
    residual connections, and where the channels are strongly correlated, like the colours of an
    image. It helps less at the end of training. Batches that are small compared with the group
    size (below some 10 examples or positions for each channel of a group) make the covariance,
    and the outputs, noisy: use smaller groups, or shrinkage.

    What it costs: 2 M C S more multiplications than batch normalization forward, and 3 M C S
    backward, for M positions, C channels and groups of S (a 3x3 convolution of C to C channels
    takes 9 M C^2 forward); and C / S matrices of S x S are decomposed. "zca" takes the longest for
    that on GPUs; "newton" consists of matrix products only, but leaves directions of small variance
    (below some 1.5^(-2 iterations) of the total, 1 / 58 for 5) with a variance below 1;
    "cholesky" is the cheapest exact one, but its outputs depend on the order of the channels.

    Args:
        axis: int, the axis of the channels, not 0. Default: -1.
        group_size: int, how many neighbouring channels are whitened together; divides their
            number; -1 for all; None for the largest divisor up to 16. Default: None.
        method: "zca" (x_hat as close to the inputs as possible), "cholesky" or "newton".
            Default: "zca".
        momentum: float in [0, 1], weight of the old value in the moving statistics; None for the
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
        mask: bool array; positions where it is False do not count in the statistics. Either for
            the inputs' first axes, as Keras's masks, or of their rank, with size 1 on the axis of
            the channels.
        sample_weight: numbers >= 0 of such a shape. Default: all count alike.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. moving_mean (C,), at first 0, and moving_covariance
        (C / S, S, S), at first the identity: updated in training; with `momentum=None` or
        `debiased` moving_count (). Batches whose statistics are not finite or that have no
        weight leave them as they are, and are counted in `skipped_batches`. In a data-parallel
        step each replica normalizes by its own batch; the moving statistics are those of all.

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
        Huang et al., 2019, Iterative Normalization ("newton"). The papers average the matrix U for
        inference; here the covariance is averaged, like the variance in batch normalization.
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
        self.group_size = None if group_size is None else int(group_size)
        self.method = method
        self.shrinkage = shrinkage
        self.iterations = int(iterations)
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
        moving = as_of_now(self.moving_mean), as_of_now(self.moving_covariance)
        return whiten(x, *moving, self.gamma, self.beta, **self._options)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        names = ("group_size", "method", "shrinkage", "iterations")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

"""Quantile normalization: equations (Q1) to (Q8) of `research`."""

import math
import statistics
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_norm import functional
from keras_norm._arrays import is_integer, is_real
from keras_norm._rows import NormalizationByRows, Rows, elements_of
from keras_norm._state import as_of_now
from keras_norm.autodiff import custom_vjp

__all__ = ["QuantileNormalization", "quantile_normalization", "quantile_normalize"]

Array = Any

TARGETS = ("normal", "uniform")


class _Target(NamedTuple):
    """The target distribution of a channel: its quantiles, and where it ends."""

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
        if not (is_integer(quantiles) and quantiles >= 2):
            raise ValueError(
                "`quantiles` is the number of quantiles of each channel, an integer >= 2. "
                f"Received: quantiles={quantiles!r}. The default is 16."
            )
        p = [(k + 0.5) / int(quantiles) for k in range(quantiles)]
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
        """g_k of every element, and the gradients of its two quantiles. (Q7)"""
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
    """p_k N - 1/2, the positions of the quantiles among the sorted elements; scalars."""
    last = ops.relu(n - 1)
    at = [ops.relu(((k + 0.5) / quantiles) * n - 0.5) for k in range(quantiles)]
    return [ops.where(v > last, last, v) for v in at]


def _order(x: Array, counted: Array | None) -> Array:
    """The elements of each column in ascending order, with those that do not count last."""
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
        quantiles: K >= 2, the number of quantiles that describe a distribution. Default: 16.
        epsilon: > 0, in the unit of x: the slope dy / dx is at most 1 / epsilon. Elements closer
            to each other than this, in particular equal ones, share one value. Default: 1e-3.
        mask: booleans, of x's rank, broadcastable to x, of size 1 on the axis of the channels:
            positions where it is False, or 0, have no rank. Default: all count.

    Returns:
        (y, q): y of the shape and dtype of x; q the quantiles of each channel, (K, C), in at
        least float32. Differentiable, also through the quantiles, and y also twice.

    Raises:
        ValueError: for an unknown target, fewer than 2 quantiles, and an epsilon that is not > 0.

    Numerics:
        In float32, or float64 if x is. Exact at the quantiles, except for epsilon, and linear
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
    rows = Rows.of(x, axis)
    dtype = functional.compute_dtype(x)
    counted = None if mask is None else ops.cast(ops.convert_to_tensor(mask), "bool")
    weights = rows.weights(counted, dtype)

    def forward(x: Array, gamma: Any, beta: Any, weights: Any) -> tuple[Any, Any]:
        v = _columns(x, axis)
        n = elements_of(v, weights)
        order = _order(v, None if weights is None else weights > 0)
        q = _quantiles(v, order, n, len(to.z))
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
    """Gives every channel the distribution of the target, by given quantiles, (Q2) to (Q6).

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
    channels = x.shape[Rows.of(x, axis).channel]
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
    if not (is_real(epsilon) and epsilon > 0):
        raise ValueError(
            "`epsilon` bounds the slope where elements are equal, and must be a number > 0. "
            f"Received: epsilon={epsilon!r}. The default is 1e-3, in the unit of x."
        )
    return epsilon


def _columns(x: Array, axis: int) -> Array:
    rows = Rows.of(x, axis)
    return ops.cast(rows.split(x, x.shape[rows.channel]), functional.compute_dtype(x))  # -> (M, C)


def _restored(v: Array, x: Array, axis: int) -> Array:
    return ops.cast(Rows.of(x, axis).join(v), x.dtype)  # (M, C) -> (N, ..., C)


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


# The layer ---------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_norm")
class QuantileNormalization(NormalizationByRows):
    """Maps each channel to a normal or uniform distribution, by its own distribution function.

    The probability integral transform: if F is the distribution function of a channel and G that
    of the target, G^-1(F(x)) has the distribution G. In training, equations (Q1) to (Q6) of
    `keras_norm.research`, F and G^-1 go through K quantiles of the batch, with straight lines
    between them:

        y = gamma G^-1(F(x)) + beta

    The batch's quantiles update the moving quantiles, moving <- momentum moving + (1 - momentum)
    batch's, which take their place in inference. The gradient is the hand-derived one, (Q7) and
    (Q8), and flows through the quantiles as well.

    When it helps: where channels have heavy tails, outliers or several modes, which a mean and a
    variance describe badly: an outlier changes a variance without bound, but a rank by one. It
    suits tabular inputs best, before the first layer of a net. On ordinary activations it gains
    little over batch normalization at a much higher cost; and a monotone transform of each channel
    cannot undo correlation. Ranks need large batches: some ten elements for each quantile.

    What it costs: sorting each channel, and K passes over x forward and 3 K backward, compared
    with 3 and 5 for batch normalization. (XLA merges the K into one.)

    Args:
        axis: int, the axis of the channels, not 0. Default: -1.
        target: "normal", or "uniform" on [-sqrt 3, sqrt 3]; both of mean 0 and variance 1.
            Default: "normal".
        quantiles: int K >= 2, the number of quantiles that describe a distribution. Default: 16.
        momentum: float in [0, 1], weight of the old value in the moving quantiles; None for the
            average over all batches so far. Can be changed at any time. Default: 0.99.
        epsilon: float > 0, in the unit of x: the slope is at most 1 / epsilon, and elements closer
            to each other than epsilon, in particular equal ones, share one value. Default: 1e-3.
        **kwargs: as in `DecorrelatedBatchNormalization`.

    Call arguments:
        inputs: array of any rank >= 2; (N, C), (N, T, C), (N, H, W, C), ...
        training: bool. True normalizes by the batch and updates the moving quantiles, unless
            `trainable` is False, as in `BatchNormalization`.
        mask: bool array; positions where it is False have no rank. Either for the inputs' first
            axes, as Keras's masks, or of their rank, with size 1 on the axis of the channels.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. moving_quantiles (K, C), at first those of the standard
        normal distribution: updated in training; with `momentum=None` or `debiased` moving_count
        (). The average of quantile functions is that of the distribution halfway in transport
        cost (the Wasserstein barycentre), so that shapes are kept; quantiles of small batches are
        less extreme than the population's. In a data-parallel step each replica ranks its own
        batch; the moving quantiles follow the mean of theirs, weighted by counts. Batches with
        values that are not finite or without any weight leave them as they are, and are counted
        in `skipped_batches`.

    Raises:
        ValueError: for an unknown target, numbers out of their range, an axis that the inputs do
            not have or that is 0, unknown channels, an integer dtype, masks that differ between
            channels, and sample weights, which ranks cannot have.

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
        self.quantiles = int(quantiles)
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
        moving = as_of_now(self.moving_quantiles)
        return quantile_normalize(x, moving, self.gamma, self.beta, **self._options)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "target": self.target, "quantiles": self.quantiles}

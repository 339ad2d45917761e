"""TensorFlow on a CPU: forward and backward as programs that XLA compiles."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_norm import autodiff, functional
from keras_norm._kernels_common import SAMPLED, are_finite, folds_of
from keras_norm._kernels_fused import columns_of
from keras_norm._kernels_sums import Rows
from keras_norm.autodiff import custom_vjp

Array = Any
Axis = int | Sequence[int]

# Rows are laid side by side until they have this many columns: XLA adds vectors to vectors.
COLUMNS_COMPILED = 16
# Halves are added to halves up to this many times, while more than `SHORTEST_SUM` are left. (Five
# times, forward and backward of (16, 16, 16, 128) take 3.4 and 3.6 ms; three times, 1.3 and 1.4.)
HALVINGS = 3
SHORTEST_SUM = 8


def _sum_by_halves(v: Array) -> Array:
    """(N, P, C) -> (N, 1, C), P known: adds half the positions to the other half, several times.

    Vector to vector, so that XLA makes it one loop; and partial sums round less.
    """
    for _ in range(HALVINGS):
        size = v.shape[1]
        if size % 2 or size <= SHORTEST_SUM:
            break
        v = v[:, : size // 2] + v[:, size // 2 :]
    return ops.sum(v, axis=1, keepdims=True)


def _for_these(
    halves: Any,
    case: tuple[Any, ...],
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
) -> tuple[Any, Any]:
    """Forward and backward for arrays like these, made (or cached) by `halves`."""
    dtype = functional.compute_dtype(x)
    halves_of_case: tuple[Any, Any] = halves(
        *case, dtype, epsilon, gamma is not None, beta is not None
    )
    return halves_of_case


def batch(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    """(y, mean, variance) of batch normalization, with the channels on the last axis."""
    halves = _for_these(_halves_of_batch, (tuple(x.shape[1:]),), x, gamma, beta, epsilon)
    y, mean, variance = custom_vjp(*halves, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _programs_of_batch(
    sizes: tuple[int, ...], dtype: str, epsilon: float, scales: bool, shifts: bool
) -> tuple[Any, Any]:
    """Forward and backward, for XLA. `sizes` are those of an example."""
    channels, positions = sizes[-1], math.prod(sizes[:-1])
    folds = folds_of((None, *sizes), channels, COLUMNS_COMPILED) if len(sizes) > 1 else 1
    columns = folds * channels

    def fold(v: Array) -> Array:
        """(N, ..., C) -> (N, P / f, f C), rows side by side; (N, C) -> (1, N, C) of a known N."""
        v = ops.cast(v, dtype)
        rows = positions // folds if len(sizes) > 1 or v.shape[0] is None else v.shape[0]
        return ops.reshape(v, (-1, rows, columns)) if rows else v[:, None]

    def like(x: Array, z: Array) -> Array:
        return ops.reshape(ops.cast(z, x.dtype), ops.shape(x))

    def total(z: Array) -> Array:
        """-> (C,)"""
        return ops.sum(ops.reshape(_sum_by_halves(z), (-1, channels)), axis=0)

    def spread(v: Array) -> Array:
        return ops.tile(v, folds) if folds > 1 else v  # (C,) -> (f C,)

    def elements(z: Array) -> Array:
        """The number of elements of each channel; 1 if there are none."""
        examples, rows, _ = ops.shape(z)
        return ops.maximum(ops.cast(examples * rows * folds, dtype), 1)

    def some(z: Array) -> Array:
        """A sixteenth of z; its mean is within four standard deviations of that of all."""
        examples, rows, _ = ops.shape(z)
        if isinstance(rows, int) and rows > 1:
            return z[:, : -(-rows // SAMPLED)]
        return z[: (examples + SAMPLED - 1) // SAMPLED]

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        z = fold(x)
        n, few = elements(z), some(z)
        near = total(few) / elements(few)
        z = z - spread(near)
        rest = total(z) / n
        variance = ops.relu(total(z * z) / n - rest * rest)  # (B2)
        inv_std = ops.rsqrt(variance + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        y = (z - spread(rest)) * spread(scale)  # (B4)
        y = y if beta is None else y + spread(ops.cast(beta, dtype))  # (B5)
        return like(x, y), near + rest, variance, inv_std  # (B1)

    def gradients(
        dy: Array, x: Array, gamma: Array | None, mean: Array, inv_std: Array
    ) -> tuple[Array, Array | None, Array | None]:
        g, z = fold(dy), fold(x) - spread(mean)
        dbeta, dgamma = total(g), total(g * z) * inv_std  # (B6) (B7)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        n = elements(g)
        dx = g - spread(dbeta / n) - z * spread(dgamma * inv_std / n)
        dx = like(dy, dx * spread(scale))  # (B8) (B9) (B10)
        return dx, dgamma if scales else None, dbeta if shifts else None

    return normalized, gradients


@functools.lru_cache(maxsize=1024)
def _halves_of_batch(*case: Any) -> tuple[Any, Any]:
    """Forward and backward for `custom_vjp`, a program each."""
    normalized, gradients = _programs_of_batch(*case)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        y, mean, variance, inv_std = autodiff.compiled(normalized)(x, gamma, beta)
        return (y, mean, variance), (x, gamma, mean, inv_std)

    def backward(residuals: Any, upstream: Any) -> Any:
        return autodiff.compiled(gradients)(upstream[0], *residuals)

    return forward, backward


def training_step(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving: tuple[Array, Array, Array],
    switches: Array,
    *,
    epsilon: float = 1e-3,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """A step of batch normalization with its moving statistics, as two programs in total.

    On small arrays every operation counts, and here the moving statistics and their switches need
    no operations of their own. Only for use where `choose` returns "compiled".

    Args:
        x: (N, ..., C).
        gamma, beta: (C,), or None.
        moving: moving mean and moving variance, (C,), and the number of skipped batches.
        switches: (>= 4,), the weights of old and new in the moving statistics, and whether gamma
            and beta are trained, and whether the statistics move: 1 or 0.
        epsilon: as in `batch_normalization`.

    Returns:
        (y, moving): y, and `moving` after this step, by (B11) and (B12). If the statistics of the
        batch are not finite, or the batch is empty, only the count changes.

    Example:
        >>> x, moving = np.array([[1.0], [3.0]], "float32"), (np.zeros(1), np.ones(1), np.zeros(()))
        >>> switches = np.array([0.75, 0.25, 1.0, 1.0])
        >>> if autodiff.can_compile():
        ...     y, (mean, variance, skipped) = training_step(x, None, None, moving, switches)
        ...     assert float(mean[0]) == 0.5 and float(variance[0]) == 1 and float(skipped) == 0
    """
    halves = _for_these(_halves_with_moving, (tuple(x.shape[1:]),), x, gamma, beta, epsilon)
    y, *moved = custom_vjp(*halves, x, gamma, beta, *moving, switches)
    mean, variance, skipped = (ops.stop_gradient(v) for v in moved)
    return y, (mean, variance, skipped)


@functools.lru_cache(maxsize=1024)
def _halves_with_moving(*case: Any) -> tuple[Any, Any]:
    """As `_halves_of_batch`, with the step of the moving statistics in the first program."""
    normalized, gradients = _programs_of_batch(*case)

    def normalized_and_moved(
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        moving_mean: Array,
        moving_variance: Array,
        skipped: Array,
        switches: Array,
    ) -> tuple[Any, ...]:
        y, mean, variance, inv_std = normalized(x, gamma, beta)
        keep, rest, _, update = ops.unstack(switches[:4])
        moves = ops.logical_and(are_finite(mean, variance), ops.shape(x)[0] > 0)

        def moved(old: Array, value: Array) -> Array:
            return ops.where(moves, old * keep + ops.cast(value, old.dtype) * rest, old)

        skipped = skipped + ops.where(moves, ops.zeros_like(update), update)
        statistics = moved(moving_mean, mean), moved(moving_variance, variance), skipped
        return y, *statistics, mean, inv_std

    def gated(
        dy: Array,
        x: Array,
        gamma: Array | None,
        mean: Array,
        inv_std: Array,
        switches: Array,
    ) -> tuple[Array, Array | None, Array | None]:
        dx, *slopes = gradients(dy, x, gamma, mean, inv_std)
        trained = switches[2] > 0.5
        return dx, *(None if d is None else ops.where(trained, d, 0.0) for d in slopes)

    def forward(x: Array, gamma: Any, beta: Any, *others: Array) -> tuple[Any, Any]:
        program = autodiff.compiled(normalized_and_moved)
        y, *statistics, mean, inv_std = program(x, gamma, beta, *others)
        return (y, *statistics), (x, gamma, mean, inv_std, others[-1])

    def backward(residuals: Any, upstream: Any) -> Any:
        return *autodiff.compiled(gated)(upstream[0], *residuals), *[None] * 4

    return forward, backward


def by_given(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
) -> tuple[Array, Array]:
    """(y, inv_std) by given statistics, with the channels on the last axis."""
    # One function per rank: TensorFlow would trace one that has met two ranks anew for any rank.
    case = len(x.shape), columns_of(x.shape), x.shape[-1], functional.compute_dtype(x), epsilon
    y, inv_std = autodiff.compiled(_program_by_given(*case))(x, mean, variance, gamma, beta)
    return y, inv_std


@functools.lru_cache(maxsize=1024)
def _program_by_given(rank: int, columns: int, channels: int, dtype: str, epsilon: float) -> Any:
    def spread(v: Array) -> Array:
        return ops.tile(v, columns // channels) if columns > channels else v

    def normalized(
        x: Array, mean: Array, variance: Array, gamma: Array | None, beta: Array | None
    ) -> tuple[Array, Array]:
        inv_std = ops.rsqrt(ops.cast(variance, dtype) + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        z = ops.reshape(ops.cast(x, dtype), (-1, columns))  # rows side by side
        y = (z - spread(ops.cast(mean, dtype))) * spread(scale)  # (B4) (B5)
        y = y if beta is None else y + spread(ops.cast(beta, dtype))
        return ops.reshape(ops.cast(y, x.dtype), ops.shape(x)), inv_std

    return normalized


def rows(
    x: Array, gamma: Array | None, beta: Array | None, axes: int, epsilon: float, centers: bool
) -> Array:
    """Layer normalization (RMS without `centers`) over the last `axes` axes."""
    functional.check_epsilon(epsilon)
    case = len(x.shape), tuple(x.shape[len(x.shape) - axes :]), centers
    halves = _for_these(_halves_of_rows, case, x, gamma, beta, epsilon)
    (y,) = custom_vjp(*halves, x, gamma, beta)
    return y


@functools.lru_cache(maxsize=1024)
def _halves_of_rows(
    rank: int,
    sizes: tuple[int, ...],
    centers: bool,
    dtype: str,
    epsilon: float,
    scales: bool,
    shifts: bool,
) -> tuple[Any, Any]:
    """As `_kernels_sums.products`, for XLA: two programs.

    XLA fuses all elementwise operations. The sum over a row is faster as a product, the sum over
    the rows is not: as a product it is slow for rows of 1024 elements.
    """
    rows = Rows(rank, sizes, dtype)

    def over_rows(v: Array, x: Array) -> Array:
        """(N, D) -> (D,): over the positions of each example first, if x has some."""
        known = x.shape[1 : rank - len(sizes)]
        if known and None not in known:
            v = _sum_by_halves(ops.reshape(v, (-1, math.prod(known), rows.d)))
        return ops.reshape(ops.sum(ops.reshape(v, (-1, rows.d)), axis=0), sizes)

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        z, share = rows.of(x), rows.share(None)
        mean: tuple[Array, ...] = ()
        if centers:
            near = ops.mean(rows.near(z), axis=1, keepdims=True) if rows.d else z[:, :1]
            z = z - near
            rest = z @ share
            variance = ops.relu((z * z) @ share - rest * rest)  # (L2)
            z, mean = z - rest, (near, rest)  # (L1)
        else:
            variance = (z * z) @ share  # (R1)
        inv_std = ops.rsqrt(variance + epsilon)
        y = z * inv_std
        y = y if gamma is None else y * rows.parameter(gamma)
        y = y if beta is None else y + rows.parameter(beta)
        return rows.like(x, y), inv_std, *mean

    def gradients(
        dy: Array, x: Array, gamma: Array | None, inv_std: Array, *mean: Array
    ) -> tuple[Array, Array | None, Array | None]:
        share, like = rows.share(gamma), dy
        dy, z = rows.of(dy), rows.of(x)
        for part in mean:  # two parts: their sum would round if large compared with the deviation
            z = z - part
        dy_z = dy * z
        dbeta = over_rows(dy, x) if shifts else None  # (L6)
        dgamma = over_rows(dy_z * inv_std, x) if scales else None  # (L7) (R5)
        dx = dy if gamma is None else dy * rows.parameter(gamma)
        dx = dx - z * (inv_std * inv_std * (dy_z @ share))
        if centers:
            dx = dx - dy @ share
        return rows.like(like, dx * inv_std), dgamma, dbeta  # (L9) (R6)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        y, inv_std, *mean = autodiff.compiled(normalized)(x, gamma, beta)
        return (y,), (x, gamma, inv_std, *mean)

    def backward(residuals: Any, upstream: Any) -> Any:
        return autodiff.compiled(gradients)(upstream[0], *residuals)

    return forward, backward


def by_channel(
    x: Array, gamma: Array | None, beta: Array | None, groups: int, epsilon: float
) -> Array:
    """Group normalization, the channels on the last axis."""
    functional.check_epsilon(epsilon)
    case = tuple(x.shape[1:]), groups
    halves = _for_these(_halves_by_channel, case, x, gamma, beta, epsilon)
    (y,) = custom_vjp(*halves, x, gamma, beta)
    return y


@functools.lru_cache(maxsize=1024)
def _halves_by_channel(
    sizes: tuple[int, ...], groups: int, dtype: str, epsilon: float, scales: bool, shifts: bool
) -> tuple[Any, Any]:
    """As `_kernels_sums.by_channel`, for XLA: two programs. `sizes` are those of an example."""
    channels, positions = sizes[-1], math.prod(sizes[:-1])
    per_group = channels // groups

    def examples(v: Array) -> Array:
        return ops.reshape(ops.cast(v, dtype), (-1, positions, channels))

    def like(x: Array, z: Array) -> Array:
        return ops.reshape(ops.cast(z, x.dtype), ops.shape(x))

    def mean(sums: Array, seen: int) -> Array:
        """Sums of each channel (N, 1, C), over `seen` positions -> the mean over its group."""
        if per_group > 1:
            of_group = ops.sum(ops.reshape(sums, (-1, groups, per_group)), axis=2, keepdims=True)
            sums = ops.reshape(ops.repeat(of_group, per_group, axis=2), (-1, 1, channels))
        return sums / max(seen * per_group, 1)

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        z, few = examples(x), -(-positions // SAMPLED)
        near = mean(_sum_by_halves(z[:, :few]), few)  # within four standard deviations
        z = z - near
        rest = mean(_sum_by_halves(z), positions)
        variance = ops.relu(mean(_sum_by_halves(z * z), positions) - rest * rest)
        inv_std = ops.rsqrt(variance + epsilon)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        y = (z - rest) * scale  # (GN2)
        y = y if beta is None else y + ops.cast(beta, dtype)  # (GN3)
        return like(x, y), near, rest, inv_std

    def gradients(
        dy: Array, x: Array, gamma: Array | None, near: Array, rest: Array, inv_std: Array
    ) -> tuple[Array, Array | None, Array | None]:
        # The mean in two parts, as in `_halves_of_rows`.
        g, z = examples(dy), examples(x) - near - rest
        s, t = _sum_by_halves(g), _sum_by_halves(g * z) * inv_std  # (N, 1, C)
        dbeta = ops.sum(s, axis=(0, 1)) if shifts else None  # (GN4)
        dgamma = ops.sum(t, axis=(0, 1)) if scales else None
        scale = inv_std
        if gamma is not None:
            of_channel = ops.cast(gamma, dtype)
            s, t, scale = s * of_channel, t * of_channel, scale * of_channel
        along = inv_std * inv_std * mean(t, positions)
        dx = g * scale - (z * along + inv_std * mean(s, positions))  # (GN5)
        return like(dy, dx), dgamma, dbeta

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        y, near, rest, inv_std = autodiff.compiled(normalized)(x, gamma, beta)
        return (y,), (x, gamma, near, rest, inv_std)

    def backward(residuals: Any, upstream: Any) -> Any:
        return autodiff.compiled(gradients)(upstream[0], *residuals)

    return forward, backward

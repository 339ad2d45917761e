"""Count, mean and M2 of every channel: updated by batches, merged exactly, with standard errors.

`Moments` is the package's one estimator of statistics. For the elements x of one channel, with
non-negative weights w that default to 1:

    (M1)  count = sum w
    (M2)  mean  = sum w x / count
    (M3)  m2    = sum w (x - mean)^2            variance = m2 / count

The moments of two sets, a and b, merge to those of all their elements (Chan, Golub and LeVeque,
1979):

    (M4)  count = count_a + count_b,   d = mean_b - mean_a
    (M5)  mean  = mean_a + d count_b / count
    (M6)  m2    = m2_a + m2_b + d^2 count_a count_b / count

The pixels of one image are not independent draws, so the standard errors are those of examples,
each of which brings all its elements at once (cluster-robust, by linearization). With, for
example i,

    (M7)  n_i = sum w,   a_i = sum w (x - mean),   b_i = sum w (x - mean)^2

and k examples of non-zero weight,

    (M8)  SE(mean)^2     = k / (k - 1) sum a_i^2 / count^2
    (M9)  SE(variance)^2 = k / (k - 1) sum (b_i - variance n_i)^2 / count^2

With one element per example these are s / sqrt(n) and, up to the factor k / (k - 1),
sqrt((m4 - variance^2) / n), where m4 is the fourth central moment: normality is not assumed.
To compute them, the Gram matrix of v_i = (n_i, a_i, b_i), sum v_i v_i^T, is kept: 3 x 3 for each
channel. A change of the centre to c' = c + d is a linear map of v_i,

    (M10) n' = n,   a' = a - d n,   b' = b - 2 d a + d^2 n

so that Gram matrices around different means can be moved to a common one and added.

`Covariance` also keeps how channels vary together, within groups of them,

    (M11) comoment = sum w (x - mean) (x - mean)^T,    covariance = comoment / count
    (M12) comoment = comoment_a + comoment_b + d d^T count_a count_b / count

and `Quantiles` keeps a sketch of each channel's distribution: all elements up to a capacity, and
beyond it every second element in sorted order, with twice the weight, and so on. Leaving out every
second of an even number of sorted elements of weight w, starting alternately with the first and
the second, moves no rank by more than w for every two times (Manku, Rajagopalan and Lindsay,
1998). For n elements and the capacity k, with levels h = 0, 1, ... below H = ceil(log2(n / k)),

    (M13) compactions_h <= n / (2^h k)
    (M14) rank error    <= sum over h of 2^h (compactions_h + 1) / 2 <= (H / 2 + 1) n / k
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm._arrays import is_integer, python_axis
from keras_norm.functional import canonical_axes, compute_dtype

__all__ = ["Covariance", "Moments", "Quantiles", "example_sums"]

Array = Any
Axis = int | tuple[int, ...]
Floats = npt.NDArray[np.float64]

_SUMS = ("count", "mean", "m2", "examples", "_gram")  # attributes
_BLOCK = 1 << 22  # elements held in float64 at a time


def _host(x: Any) -> npt.NDArray[Any]:
    return x if isinstance(x, np.ndarray) else np.asarray(ops.convert_to_numpy(x))


def _of_rank(weights: npt.NDArray[Any], ndim: int) -> npt.NDArray[Any]:
    """Weights with axes added at the end: those of lower rank belong to the first axes."""
    return weights.reshape(*weights.shape, *[1] * max(ndim - weights.ndim, 0))


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


class Moments:
    """The count, mean and M2 of every channel, (M1) to (M3), in float64 on the host.

    Args:
        axis: the axis, or axes, that keep their own statistics; all others are pooled. The
            examples are on axis 0, unless it is in `axis` itself: then an update is one example.
            Default: -1.

    State (all float64, of the shape of the channels (C,); scalars before the first update):
        count: total weight; the number of elements if all weights are 1.
        mean, m2: (M2), (M3); 0 where the count is 0.
        examples: how many examples had a weight above 0.

    Example:
        >>> x = np.array([[1.0, 10.0], [3.0, 50.0], [5.0, 0.0]])
        >>> whole = Moments().update(x)
        >>> halves = Moments().update(x[:1]) + Moments().update(x[1:])
        >>> print(whole.mean, whole.variance(unbiased=True), halves.mean)
        [ 3. 20.] [  4. 700.] [ 3. 20.]
        >>> np.allclose(whole.standard_error_of_mean(), np.sqrt(np.array([4.0, 700.0]) / 3))
        True

    Numerics:
        Two-pass in each batch, merged by (M4) to (M6): never E[x^2] - E[x]^2. At mean 1000 and
        variance 1 the variance of 10^6 float64 values is exact to 1e-12, and does not depend on
        how they were split into batches, to 1e-12. Halves of the data from two processes merge to
        the moments of all of it to 1e-10.

    Reference:
        Chan, Golub and LeVeque, 1979, Updating formulae and a pairwise algorithm for computing
        sample variances. Standard errors of clusters: Liang and Zeger, 1986, Longitudinal data
        analysis using generalized linear models.
    """

    _format = "keras_norm.moments/1"

    def __init__(self, axis: Axis = -1) -> None:
        self.axis: Axis = python_axis(axis if is_integer(axis) else tuple(axis))  # type: ignore[arg-type]
        self._reset(())

    def _like(self) -> Self:
        """An empty one of the same kind."""
        return type(self)(self.axis)

    def _reset(self, shape: tuple[int, ...]) -> None:
        self.count: Floats = np.zeros(shape)
        self.mean: Floats = np.zeros(shape)
        self.m2: Floats = np.zeros(shape)
        self.examples: Floats = np.zeros(shape)
        self._gram: Floats = np.zeros((3, 3, *shape))

    # What came in ----------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether no element with a weight above 0 has been taken in yet."""
        return not np.any(self.count > 0)

    def update(self, x: Array, *, mask: Array | None = None, weights: Array | None = None) -> Self:
        """Takes in a batch.

        Args:
            x: array of any rank >= 1 and any real dtype; NumPy or a tensor.
            mask: bool, broadcastable to x; a mask of lower rank belongs to the first axes, (N,)
                or (N, H, W), as Keras's masks do. Elements where it is False do not count, and
                may be NaN. Default: all elements count.
            weights: non-negative, of a shape as for `mask`. A weight of 2 counts an element twice.
                Default: 1.

        Returns:
            The object itself.

        Raises:
            ValueError: for shapes that do not fit, negative weights, and values that are not
                finite. Then nothing is taken in.
        """
        x = _host(x)
        channels = canonical_axes(self.axis, x.ndim)
        w = self._weights(x, mask, weights)
        batch = self._like()
        batch._reset(tuple(x.shape[a] for a in channels))
        step = len(x) if 0 in channels else max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
        for start in range(0, len(x), max(1, step)):
            block = slice(start, start + step)
            part = None if w is None else w[block] if len(w) > 1 else w
            with np.errstate(invalid="ignore", over="ignore"):  # `merge` refuses what is not finite
                batch._merge(self._of_block(x[block], part, channels))
        return self.merge(batch)

    def _of_block(
        self, x: npt.NDArray[Any], w: Floats | None, channels: tuple[int, ...]
    ) -> "Moments":
        return _of_block(x, w, channels, self.axis)

    def _with_sums_of(self, moments: "Moments") -> Self:
        """An object of the same kind, empty except for its sums, which are those of another."""
        new = self._like()
        new._reset(moments.count.shape)
        for name in _SUMS:
            setattr(new, name, getattr(moments, name))
        return new

    def _weights(
        self, x: npt.NDArray[Any], mask: Array | None, weights: Array | None
    ) -> Floats | None:
        total: Floats | None = None
        for name, given in (("mask", mask), ("weights", weights)):
            if given is None:
                continue
            w = _of_rank(_host(given), x.ndim).astype(np.float64)
            try:
                fits = np.broadcast_shapes(w.shape, x.shape) == x.shape
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(
                    f"`{name}` must be broadcastable to x; one of lower rank belongs to the first "
                    f"axes. Received: {name} of shape {_host(given).shape} for x of shape "
                    f"{x.shape}."
                )
            if not np.all((w >= 0) & np.isfinite(w)):
                raise ValueError(
                    f"`{name}` must be finite and >= 0. Received: {name} with the smallest value "
                    f"{np.nanmin(w)}. A weight says how often an element counts."
                )
            total = w if total is None else total * w
        return total

    def update_from_sums(self, shift: Array, first: Array, second: Array, count: Array) -> Self:
        """Takes in a batch by the sums of its examples, which `example_sums` computes.

        Args:
            shift: (C,), what was subtracted from the elements.
            first, second: (N, C), for each example sum w (x - shift) and sum w (x - shift)^2.
            count: (N, C), or broadcastable to it: sum w.

        Returns:
            The object itself.

        Raises:
            ValueError: for sums that are not finite. Then nothing is taken in.
        """
        a, b, n = (_host(v).astype(np.float64, copy=False) for v in (first, second, count))
        return self.merge(_of_sums(_host(shift).astype(np.float64), n, a, b, self.axis))

    # Merging ---------------------------------------------------------------------------------

    def merge(self, other: "Moments") -> Self:
        """Takes in everything that another has taken in, (M4) to (M6).

        No example may be split between the two, since for the standard errors each counts as one.

        Returns:
            The object itself.

        Raises:
            ValueError: for another `axis`, other channels, or values that are not finite.
                Then nothing is taken in.
        """
        self._check_kind(other)
        if self.count.shape and other.count.shape and self.count.shape != other.count.shape:
            raise ValueError(
                "Only moments of the same channels can be merged. Received: shapes "
                f"{self.count.shape} and {other.count.shape}."
            )
        if not np.all(np.isfinite(other.m2)):
            bad = int(np.sum(~np.isfinite(other.m2)))
            raise ValueError(
                "Moments are those of finite values. Received: NaN or infinite values in "
                f"{bad} of {other.m2.size} channels. Remove them, or give them a mask."
            )
        if not self.count.shape and other.count.shape:
            self._reset(other.count.shape)
        if other.count.shape or not self.count.shape:
            self._merge(other)
        return self

    def _check_kind(self, other: "Moments") -> None:
        if type(other) is not type(self):
            raise ValueError(
                "Only moments of the same kind can be merged. Received: "
                f"{type(self).__name__} and {type(other).__name__}."
            )
        if other.axis != self.axis:
            raise ValueError(
                "Only moments over the same axis can be merged. Received: "
                f"axis={self.axis} and axis={other.axis}."
            )

    def _merge(self, other: Any) -> None:
        if not np.any(self.count):
            for name in _SUMS:
                setattr(self, name, getattr(other, name).copy())
            return
        count = self.count + other.count  # (M4)
        d = np.where(other.count > 0, other.mean - self.mean, 0.0)
        share = _divide(other.count, count)
        mean = np.where(self.count > 0, self.mean + d * share, other.mean)  # (M5)
        between = np.where(self.count > 0, d * d * self.count * share, 0.0)
        self._gram = _recentred(self._gram, np.where(self.count > 0, mean - self.mean, 0.0)) + (
            _recentred(other._gram, np.where(other.count > 0, mean - other.mean, 0.0))
        )
        self.m2 = self.m2 + other.m2 + between  # (M6)
        self.count, self.mean = count, mean
        self.examples = self.examples + other.examples

    def __add__(self, other: "Moments") -> Self:
        return self.copy().merge(other)

    def scaled(self, factor: float) -> Self:
        """A copy in which every weight so far counts `factor` times, examples included.

        Args:
            factor: > 0; below 1 to forget.

        Raises:
            ValueError: for a factor that is not positive and finite.
        """
        if not 0 < factor < math.inf:
            raise ValueError(
                f"`factor` multiplies weights and must be > 0. Received: factor={factor!r}."
            )
        new = self.copy()
        new.count, new.m2 = self.count * factor, self.m2 * factor
        new.examples, new._gram = self.examples * factor, self._gram * factor**2
        return new

    def copy(self) -> Self:
        """An independent copy."""
        new = self._like()
        new.count, new.mean, new.m2 = self.count.copy(), self.mean.copy(), self.m2.copy()
        new.examples, new._gram = self.examples.copy(), self._gram.copy()
        return new

    # What is asked ---------------------------------------------------------------------------

    def variance(self, *, unbiased: bool = False) -> Floats:
        """The variance of every channel.

        Args:
            unbiased: divide by count - 1 instead of by the count (weights then say how often an
                element counts). Default: False, as in Keras's batch normalization.

        Returns:
            (C,), float64; NaN where there is too little data: no element, or one if unbiased.
        """
        divisor = self.count - (1.0 if unbiased else 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(divisor > 0, self.m2 / divisor, np.nan)

    def standard_error_of_mean(self) -> Floats:
        """The standard error (M8), in the unit of x, (C,) float64.

        Infinite for fewer than two examples.
        """
        return self._standard_error(self._gram[1, 1])

    def standard_error_of_variance(self) -> Floats:
        """The standard error (M9), in the unit of x squared, (C,) float64.

        Infinite for fewer than two examples.
        """
        v = _divide(self.m2, self.count)
        gram = self._gram
        return self._standard_error(gram[2, 2] - 2 * v * gram[0, 2] + v * v * gram[0, 0])

    def _standard_error(self, squares: Floats) -> Floats:
        k = self.examples
        with np.errstate(invalid="ignore", divide="ignore"):
            squared = np.maximum(squares, 0.0) / self.count**2 * (k / (k - 1))
        return np.where(k > 1, np.sqrt(np.where(k > 1, squared, 0.0)), np.inf)

    # Between processes -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers: JSON keeps every bit."""
        return {
            "format": self._format,
            "axis": self.axis if isinstance(self.axis, int) else list(self.axis),
            "count": self.count.tolist(),
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
            "examples": self.examples.tolist(),
            "gram": self._gram.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Rebuilds the object from what `to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        if state.get("format") != cls._format:
            raise ValueError(
                f"{cls.__name__} are read from what {cls.__name__}.to_dict() gave, of the format "
                f"{cls._format!r}. Received: format={state.get('format')!r}."
            )
        axis = state["axis"]
        new = cls._of_options(axis if isinstance(axis, int) else tuple(axis), state)
        for name in ("count", "mean", "m2", "examples"):
            setattr(new, name, np.asarray(state[name], np.float64))
        new._gram = np.asarray(state["gram"], np.float64).reshape(3, 3, *new.count.shape)
        return new

    @classmethod
    def _of_options(cls, axis: Axis, state: Mapping[str, Any]) -> Self:
        """An empty one with the options of what `to_dict` gave."""
        return cls(axis)

    def __repr__(self) -> str:
        if not self.count.shape:
            return f"{type(self).__name__}(axis={self.axis}, empty)"
        return (
            f"{type(self).__name__}(axis={self.axis}, channels={self.count.shape}, "
            f"count={self.count.max(initial=0):g}, examples={self.examples.max(initial=0):g})"
        )


def _recentred(gram: Floats, d: Floats) -> Floats:
    """The Gram matrix of v = (n, a, b) after its centre has moved by d, (M10)."""
    nn, na, nb = gram[0]
    aa, ab, bb = gram[1, 1], gram[1, 2], gram[2, 2]
    d2 = d * d
    na_ = na - d * nn
    nb_ = nb - 2 * d * na + d2 * nn
    aa_ = aa - 2 * d * na + d2 * nn
    ab_ = ab - 2 * d * aa - d * nb + 3 * d2 * na - d * d2 * nn
    bb_ = bb - 4 * d * ab + 4 * d2 * aa + 2 * d2 * nb - 4 * d * d2 * na + d2 * d2 * nn
    return np.array([[nn, na_, nb_], [na_, aa_, ab_], [nb_, ab_, bb_]])


def _of_sums(shift: Floats, n: Floats, a: Floats, b: Floats, axis: Axis) -> Moments:
    """Moments from the sums (N, C) of the examples around a shift near the mean.

    n may be (1, C): the same for all examples.
    """
    new = Moments(axis)
    new._reset(a.shape[1:])
    v, number = (n, a, b), len(a)
    sum_n, sum_a, sum_b = (np.einsum("n...->...", x) for x in v)
    gram = {(i, j): np.einsum("n...,n...->...", v[i], v[j]) for i in (1, 2) for j in range(i, 3)}
    if len(n) == 1:
        gram |= {(0, 0): number * n[0] ** 2, (0, 1): n[0] * sum_a, (0, 2): n[0] * sum_b}
        new.count, new.examples = number * n[0], number * (n[0] > 0).astype(np.float64)
    else:
        gram |= {(0, j): np.einsum("n...,n...->...", n, v[j]) for j in range(3)}
        new.count, new.examples = sum_n, (n > 0).sum(axis=0).astype(np.float64)
    d = _divide(sum_a, new.count)
    new.mean = np.where(new.count > 0, shift + d, 0.0)
    new.m2 = np.maximum(sum_b - d * d * new.count, 0.0)
    whole = np.array([[gram[min(i, j), max(i, j)] for j in range(3)] for i in range(3)])
    new._gram = _recentred(whole, d)
    return new


def _of_block(
    x: npt.NDArray[Any], w: Floats | None, channels: tuple[int, ...], axis: Axis
) -> Moments:
    x = x.astype(np.float64)
    reduced = tuple(i for i in range(x.ndim) if i not in channels)
    if 0 in channels:  # no axis is left for the examples: all of x is one
        x, w = x[None], None if w is None else w[None]
        channels = tuple(c + 1 for c in channels)
        reduced = (0, *(i + 1 for i in reduced))
    positions = tuple(i for i in reduced if i != 0)
    lay = [x.shape[i] if i in channels else 1 for i in range(x.ndim)]
    if w is None:
        n = np.full((len(x), *[x.shape[c] for c in channels]), 1.0)
        n *= math.prod(x.shape[i] for i in positions)
        shift = x.mean(axis=reduced)
        centred = x - shift.reshape(lay)
        a, b = centred.sum(axis=positions), np.square(centred).sum(axis=positions)
    else:
        w = np.broadcast_to(w, x.shape)
        x = np.where(w > 0, x, 0.0)
        n = w.sum(axis=positions)
        shift = _divide((w * x).sum(axis=reduced), w.sum(axis=reduced))
        centred = np.where(w > 0, x - shift.reshape(lay), 0.0)
        a, b = (w * centred).sum(axis=positions), (w * np.square(centred)).sum(axis=positions)
    return _of_sums(shift, n, a, b, axis)


def _rows(
    x: npt.NDArray[Any], w: Floats | None, channel: int
) -> tuple[npt.NDArray[Any], Floats | None]:
    """(N, ..., C) -> (M, C), and the weights (M,), which must be the same for all channels."""
    size = x.shape[channel]
    if w is not None:
        if w.shape[channel] != 1 and size != 1:
            raise ValueError(
                "Covariances and ranks are those of whole positions: a mask or weights must be "
                "the same for all channels, of size 1 on their axis. Received: shape "
                f"{w.shape} for x of shape {x.shape}, channels on axis {channel}."
            )
        shape = [1 if i == channel else n for i, n in enumerate(x.shape)]
        w = np.moveaxis(np.broadcast_to(w, shape), channel, -1).reshape(-1)
    return np.moveaxis(x, channel, -1).reshape(-1, size), w


class Covariance(Moments):
    """`Moments`, and the covariances of the channels within groups of them, (M11) and (M12).

    Args:
        axis: int, the axis of the channels. Default: -1.
        group_size: int S >= 1, number of neighbouring channels that form a group; it must divide
            the number of channels. Default: None, all channels form one group.

    Raises:
        ValueError: for another `group_size`.

    State, besides that of `Moments`:
        comoment: (C / S, S, S), (M11).

    Example:
        >>> x = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
        >>> whole = Covariance().update(x)
        >>> halves = Covariance().update(x[:1]) + Covariance().update(x[1:])
        >>> np.allclose(whole.covariance()[0], np.cov(x.T, bias=True))
        True
        >>> np.allclose(halves.comoment, whole.comoment, rtol=1e-12)
        True

    Numerics:
        As `Moments`: two-pass in float64, merged by (M12); halves of the data merge to the
        covariance of all of it to 1e-10 of the standard deviations, even at mean 1000 with
        variance 1.

    Reference:
        Chan, Golub and LeVeque, 1979; for covariances Pébay, 2008, Formulas for robust, one-pass
        parallel computation of covariances and arbitrary-order statistical moments.
    """

    _format = "keras_norm.moments.covariance/1"

    def __init__(self, axis: int = -1, group_size: int | None = None) -> None:
        if group_size is not None and not (is_integer(group_size) and group_size >= 1):
            raise ValueError(
                "`group_size` is a number of channels: an int >= 1, or None for all of them. "
                f"Received: group_size={group_size!r}."
            )
        self.group_size = None if group_size is None else int(group_size)
        super().__init__(axis)

    def _like(self) -> Self:
        return type(self)(self._channel, self.group_size)

    @property
    def _channel(self) -> int:
        if not isinstance(self.axis, int):
            raise ValueError(f"`axis` must be one integer. Received: axis={self.axis}.")
        return self.axis

    def _reset(self, shape: tuple[int, ...]) -> None:
        super()._reset(shape)
        channels = math.prod(shape) if shape else 0
        size = self.group_size or max(channels, 1)
        if channels % size:
            raise ValueError(
                "All groups of channels have the same size, so `group_size` must divide their "
                f"number. Received: group_size={size}, channels={channels}."
            )
        self.comoment: Floats = np.zeros((channels // size, size, size))

    def _groups(self, v: Floats) -> Floats:
        """(C,) -> (C / S, S)."""
        return v.reshape(self.comoment.shape[:2])

    def _of_block(
        self, x: npt.NDArray[Any], w: Floats | None, channels: tuple[int, ...]
    ) -> "Moments":
        moments = super()._of_block(x, w, channels)
        new = self._with_sums_of(moments)
        rows, w = _rows(x, w, channels[0])
        v = rows.astype(np.float64) - new.mean
        scaled = v
        if w is not None:
            v = np.where(w[:, None] > 0, v, 0.0)
            scaled = w[:, None] * v
        groups = [a.reshape(-1, *new.comoment.shape[:2]).transpose(1, 0, 2) for a in (scaled, v)]
        comoment = groups[0].transpose(0, 2, 1) @ groups[1]  # (G, S, M) (G, M, S) -> (G, S, S)
        new.comoment = (comoment + comoment.transpose(0, 2, 1)) / 2  # (M11)
        return new

    def update_from_sums(self, shift: Array, first: Array, second: Array, count: Array) -> Self:
        """Refused: the sums of single channels hold no covariances.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be had from sums of single channels. Received: sums. "
            "Use `update`."
        )

    def _check_kind(self, other: Moments) -> None:
        super()._check_kind(other)
        size = getattr(other, "group_size", None)
        if size != self.group_size:
            raise ValueError(
                "Only covariances of the same groups can be merged. Received: "
                f"group_size={self.group_size} and group_size={size}."
            )

    def _merge(self, other: Any) -> None:
        if self.count.ndim == 0:  # neither has taken in anything
            return
        both = (self.count > 0) & (other.count > 0)
        d = self._groups(np.where(both, other.mean - self.mean, 0.0))
        share = self._groups(_divide(self.count * other.count, self.count + other.count))
        between = (share * d)[:, :, None] * d[:, None, :]
        self.comoment = self.comoment + other.comoment + between  # (M12)
        super()._merge(other)

    def scaled(self, factor: float) -> Self:
        """A copy in which every weight so far counts `factor` times; see `Moments.scaled`."""
        new = super().scaled(factor)
        new.comoment = self.comoment * factor
        return new

    def copy(self) -> Self:
        """An independent copy."""
        new = super().copy()
        new.comoment = self.comoment.copy()
        return new

    def covariance(self, *, unbiased: bool = False) -> Floats:
        """The covariances within each group of channels.

        Args:
            unbiased: divide by count - 1 instead of by the count. Default: False.

        Returns:
            (C / S, S, S), float64; NaN where there is too little data. Before any data, when the
            number of channels is unknown, a single NaN, ().
        """
        if self.count.ndim == 0:
            return np.full((), np.nan)
        divisor = self._groups(self.count)[:, :, None] - (1.0 if unbiased else 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(divisor > 0, self.comoment / divisor, np.nan)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers: JSON keeps every bit."""
        more = {"group_size": self.group_size, "comoment": self.comoment.tolist()}
        return {**super().to_dict(), **more}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Rebuilds the object from what `to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        new = super().from_dict(state)
        comoment = np.asarray(state["comoment"], np.float64)
        if comoment.size:
            new.comoment = comoment
        return new

    @classmethod
    def _of_options(cls, axis: Axis, state: Mapping[str, Any]) -> Self:
        return cls(axis, state["group_size"])  # type: ignore[arg-type]


class Quantiles(Moments):
    """`Moments`, and a sketch of every channel's distribution for its quantiles, (M13) and (M14).

    Args:
        axis: int, the axis of the channels. Default: -1.
        capacity: int >= 2, even: how many elements of each channel a level holds. Up to this
            number all elements are held, and quantiles are exact. Default: 4096.

    State, besides that of `Moments`:
        rank_error: how far the rank of a quantile may be off, as a fraction of the elements: a
            bound that holds for any data, in any order; 0 while all elements are held. For 10^6
            elements and a capacity of 4096 it is at most (8 / 2 + 1) / 4096 = 0.12%.

    A mask says which positions count; ranks have no other weights.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100_000, 1))
        >>> q = Quantiles(capacity=1024)
        >>> for part in np.split(x, 100):
        ...     _ = q.update(part)
        >>> median = q.quantile(0.5)[0]
        >>> bool(abs(np.mean(x < median) - 0.5) <= q.rank_error + 1e-5), q.rank_error < 5 / 1024
        (True, True)

    Numerics:
        Elements of at most float32 are held in float32, others in float64. The memory is that of
        `capacity` elements per channel and level, and there are log2(n / capacity) levels. Two
        sketches merge to one whose error, counted in elements, is at most the sum of theirs.

    Reference:
        Manku, Rajagopalan and Lindsay, 1998, Approximate medians and other quantiles in one pass
        and with limited memory; Karnin, Lang and Liberty, 2016, Optimal quantile approximation in
        streams (where chance decides which elements are kept; here the choice alternates, so that
        the bound is certain).
    """

    _format = "keras_norm.moments.quantiles/1"

    def __init__(self, axis: int = -1, capacity: int = 4096) -> None:
        if not is_integer(capacity) or capacity < 2 or capacity % 2:
            raise ValueError(
                "`capacity` is a number of elements and must be an even integer >= 2. Received: "
                f"capacity={capacity!r}. The default is 4096."
            )
        self.capacity = int(capacity)
        super().__init__(axis)

    def _like(self) -> Self:
        return type(self)(self.axis, self.capacity)  # type: ignore[arg-type]

    def _reset(self, shape: tuple[int, ...]) -> None:
        super()._reset(shape)
        self._levels: list[npt.NDArray[Any]] = []  # (m, C), each element of weight 2^level
        self._fresh: list[npt.NDArray[Any]] = []  # (m, C), of level 0, not yet joined
        self._waiting: list[bool] = []  # per level: whether the last compaction has no partner
        self._bound = 0.0  # bound of the rank error from pairs of compactions, in elements
        self._scale = 1.0

    def _of_block(
        self, x: npt.NDArray[Any], w: Floats | None, channels: tuple[int, ...]
    ) -> "Moments":
        if w is not None and not np.isin(w, (0.0, 1.0)).all():
            raise ValueError(
                "Ranks have no weights: an element counts or not. Received: weights other than 0 "
                "and 1. Repeat elements that count several times."
            )
        moments = super()._of_block(x, w, channels)
        new = self._with_sums_of(moments)
        rows, w = _rows(x, w, channels[0])
        narrow = x.dtype == np.float32 or x.dtype.itemsize <= 2
        rows = rows.astype(np.float32 if narrow else np.float64)
        new._fresh = [rows if w is None else rows[w > 0]]
        return new

    def update_from_sums(self, shift: Array, first: Array, second: Array, count: Array) -> Self:
        """Refused: sums hold no quantiles.

        Raises:
            ValueError: always.
        """
        raise ValueError("Quantiles cannot be had from sums. Received: sums. Use `update`.")

    # The sketch --------------------------------------------------------------------------------

    def _check_kind(self, other: Moments) -> None:
        super()._check_kind(other)
        theirs = getattr(other, "capacity", None), getattr(other, "_scale", None)
        if theirs != (self.capacity, self._scale):
            raise ValueError(
                "Only quantiles of the same capacity and the same scale of weights can be merged. "
                f"Received: capacity={self.capacity}, scale={self._scale} and "
                f"capacity={theirs[0]}, scale={theirs[1]}."
            )

    def merge(self, other: Moments) -> Self:
        """Takes in everything that another has taken in; see `Moments.merge`."""
        super().merge(other)
        self._compact()
        return self

    def _merge(self, other: Any) -> None:
        super()._merge(other)
        self._fresh += other._fresh
        for h, items in enumerate(other._levels):
            self._at(h)
            self._levels[h] = np.concatenate([self._levels[h], items])
        self._bound += other._rank_bound

    def _at(self, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append(np.zeros((0, *self.count.shape), np.float32))
            self._waiting.append(False)

    def _compact(self) -> None:
        """Halves levels until none has more elements than its capacity."""
        self._at(0)
        fresh, self._fresh = [v for v in self._fresh if len(v)], []
        if sum(map(len, fresh)) + len(self._levels[0]) <= self.capacity:
            self._fresh = fresh  # joined when it is worth it
        else:
            for rows in fresh:
                start = 0
                while start < len(rows):
                    if len(self._levels[0]) >= self.capacity:
                        self._halve(0)
                    part = rows[start : start + self.capacity - len(self._levels[0])]
                    self._levels[0] = np.concatenate([self._levels[0], part])
                    start += len(part)
        level = 0
        while level < len(self._levels):
            while len(self._levels[level]) > self.capacity:
                self._halve(level)
            level += 1

    def _halve(self, level: int) -> None:
        """Moves every second element to the level above, alternately from the first or second."""
        self._at(level + 1)
        items = np.sort(self._levels[level], axis=0)
        even = len(items) - len(items) % 2
        second = self._waiting[level]
        kept = items[int(second) : even : 2]
        if second:
            self._bound += 2.0**level
        self._waiting[level] = not second
        self._levels[level] = items[even:]
        self._levels[level + 1] = np.concatenate([self._levels[level + 1], kept])

    @property
    def _rank_bound(self) -> float:
        return self._bound + sum(2.0**h for h, waits in enumerate(self._waiting) if waits)

    @property
    def _all_levels(self) -> list[npt.NDArray[Any]]:
        """(m, C) for each level, including the elements not yet joined to it."""
        self._at(0)
        return [np.concatenate([self._levels[0], *self._fresh]), *self._levels[1:]]

    @property
    def _held(self) -> tuple[npt.NDArray[Any], Floats]:
        """All elements (m, C), and their weights (m,)."""
        levels = self._all_levels
        weights = [np.full(len(items), 2.0**h) for h, items in enumerate(levels)]
        return np.concatenate(levels), np.concatenate(weights)

    # What is asked -----------------------------------------------------------------------------

    @property
    def rank_error(self) -> float:
        """The bound of the rank error, as a fraction of the elements."""
        total = float(self.count.max(initial=0)) / self._scale
        return self._rank_bound / total if total else 0.0

    def quantile(self, levels: Any) -> Floats:
        """The quantiles of every channel, by linear interpolation between neighbouring elements.

        The element of rank r (from 0) of n is the quantile of level (r + 1/2) / n, as in
        `numpy.quantile(..., method="hazen")` and in quantile normalization.

        Args:
            levels: number or array in [0, 1], of shape S.

        Returns:
            (*S, C), float64; NaN where there is no element. The rank of each is off by at most
            `rank_error`, plus half an element.

        Raises:
            ValueError: for levels outside [0, 1].
        """
        p = np.asarray(levels, np.float64)
        if not np.all((p >= 0) & (p <= 1)):
            raise ValueError(f"`levels` must lie in [0, 1]. Received: levels={levels!r}.")
        items, weights = self._held
        channels = int(np.prod(self.count.shape, dtype=int))
        total = weights.sum()
        if not total:
            return np.full((*p.shape, channels), np.nan)
        at = np.clip(p.ravel() * total - 0.5, 0, total - 1)
        low = np.floor(at)
        order = np.argsort(items, axis=0, kind="stable")
        found = np.empty((p.size, channels))
        for c in range(channels):
            ends = np.cumsum(weights[order[:, c]])  # how many elements are not above each

            def of_rank(r: Floats, c: int = c, ends: Floats = ends) -> Floats:
                place = np.searchsorted(ends, np.minimum(r, total - 1), side="right")
                return items[order[place, c], c].astype(np.float64)

            below = of_rank(low)
            found[:, c] = below + (at - low) * (of_rank(low + 1) - below)
        return found.reshape(*p.shape, channels)

    def scaled(self, factor: float) -> Self:
        """A copy in which every weight so far counts `factor` times; see `Moments.scaled`.

        The quantiles stay. The copy can be merged only with others that are scaled alike.
        """
        new = super().scaled(factor)
        new._scale = self._scale * factor
        return new

    def copy(self) -> Self:
        """An independent copy."""
        new = super().copy()
        new._levels, new._fresh = list(self._levels), list(self._fresh)  # never written into
        new._waiting, new._bound, new._scale = list(self._waiting), self._bound, self._scale
        return new

    # Between processes -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers: JSON keeps every bit."""
        return {
            **super().to_dict(),
            "capacity": self.capacity,
            "levels": [{"dtype": str(v.dtype), "items": v.tolist()} for v in self._all_levels],
            "waiting": list(self._waiting),
            "bound": self._bound,
            "scale": self._scale,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Rebuilds the object from what `to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        new = super().from_dict(state)
        shape = (-1, *new.count.shape)
        new._levels = [np.asarray(v["items"], v["dtype"]).reshape(shape) for v in state["levels"]]
        new._waiting, new._bound = list(state["waiting"]), float(state["bound"])
        new._scale = float(state["scale"])
        return new

    @classmethod
    def _of_options(cls, axis: Axis, state: Mapping[str, Any]) -> Self:
        return cls(axis, state["capacity"])  # type: ignore[arg-type]


# In a graph ------------------------------------------------------------------------------------


def example_sums(
    x: Array, *, axis: Axis = -1, weights: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """The sums of each example that `Moments.update_from_sums` takes, computed on the device.

    Only `keras.ops` are used, so that it can be called inside a compiled function, where the
    float64 of `Moments.update` is too slow or not available.

    Args:
        x: array of any rank >= 1, of a floating dtype, with the examples on axis 0.
        axis: the axis, or axes, that keep their own statistics. Default: -1.
        weights: non-negative, of x's rank and broadcastable to it. Elements of weight 0 may be
            NaN. Default: 1.

    Returns:
        (shift, first, second, count): the mean of the first eighth of the batch (with weights: of
        all of it), (C,); sum w (x - shift) and sum w (x - shift)^2, (N, C); sum w, (N, C), or
        (1, C) without weights. In at least float32. If no axis is left for examples (axis 0 in
        `axis`), N is 1.

    Numerics:
        Only the positions within an example are summed in float32, around a mean that, as that of
        an eighth of the batch, is never farther than sqrt(7) sigma from the batch's own. `Moments`
        sums examples and batches in float64. For 10,000 images of 32 x 32 at mean 1000 and
        variance 1: mean to 1e-7, variance to 1e-6, relative.

    Example:
        >>> x = ops.convert_to_tensor(np.array([[1.0, 10.0], [3.0, 50.0]], "float32"))
        >>> print(Moments().update_from_sums(*example_sums(x)).variance())
        [  1. 400.]
    """
    channels = canonical_axes(axis, len(x.shape))
    x = ops.cast(x, compute_dtype(x))
    if 0 in channels:
        x, channels = ops.expand_dims(x, 0), tuple(c + 1 for c in channels)
        weights = None if weights is None else ops.expand_dims(weights, 0)
    reduced = tuple(i for i in range(len(x.shape)) if i not in channels)
    shape = ops.shape(x)
    lay = [shape[i] if i in channels else 1 for i in range(len(shape))]
    positions = reduced[1:]
    if weights is None:
        some = x[: (shape[0] + 7) // 8]
        shift = ops.stop_gradient(ops.mean(some, axis=reduced))
        number = math.prod(shape[i] for i in positions)  # a number, or a tensor if one is unknown
        count = ops.ones([1, *(shape[c] for c in channels)], x.dtype) * ops.cast(number, x.dtype)
        columns = _columns(shape, channels)
        if columns == 1:
            centred = x - ops.reshape(shift, lay)
            return shift, *(_over(v, positions) for v in (centred, centred * centred)), count
        x = ops.reshape(x, [*shape[:2], columns * shape[-1]])  # (N, P, W, C) -> (N, P, W C)
        centred = x - ops.tile(shift, [columns])
        lines = (ops.sum(v, axis=1) for v in (centred, centred * centred))  # -> (N, W C)
        apart = [shape[0], columns, shape[-1]]
        return shift, *(ops.sum(ops.reshape(v, apart), axis=1) for v in lines), count
    w = ops.broadcast_to(ops.cast(weights, x.dtype), shape)
    x = ops.where(w > 0, x, 0)
    total = ops.sum(w, axis=reduced)
    shift = ops.sum(w * x, axis=reduced) / ops.where(total > 0, total, 1)
    centred = ops.where(w > 0, x - ops.reshape(shift, lay), 0)
    sums = (w * centred, w * centred * centred)
    return shift, *(_over(v, positions) for v in sums), _over(w, positions)


def _columns(shape: Sequence[Any], channels: tuple[int, ...]) -> int:
    """How many positions to put in one row: a few channels alone do not fill a vector."""
    inner, last = shape[2:-1], channels == (len(shape) - 1,)
    return math.prod(inner) if last and all(isinstance(n, int) for n in inner) else 1


def _over(x: Array, positions: tuple[int, ...]) -> Array:
    return ops.sum(x, axis=positions) if positions else x

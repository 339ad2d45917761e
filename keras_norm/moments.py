"""Count, mean and M2 of every channel: updated by batches, merged exactly, with standard errors.

`Moments` is the package's one estimator of statistics. With non-negative weights w that default
to 1, of the elements x of one channel:

    (M1)  count = sum w
    (M2)  mean  = sum w x / count
    (M3)  m2    = sum w (x - mean)^2            variance = m2 / count

Two of them, a and b, become those of all elements of both (Chan, Golub and LeVeque, 1979):

    (M4)  count = count_a + count_b,   d = mean_b - mean_a
    (M5)  mean  = mean_a + d count_b / count
    (M6)  m2    = m2_a + m2_b + d^2 count_a count_b / count

The pixels of one image are no independent draws: the standard errors are those of examples,
each of which brings all its elements at once (cluster-robust, by linearization). With, for
example i,

    (M7)  n_i = sum w,   a_i = sum w (x - mean),   b_i = sum w (x - mean)^2

and k examples of non-zero weight,

    (M8)  SE(mean)^2     = k / (k - 1) sum a_i^2 / count^2
    (M9)  SE(variance)^2 = k / (k - 1) sum (b_i - variance n_i)^2 / count^2

One element per example makes of these s / sqrt(n) and, to the factor k / (k - 1),
sqrt((m4 - variance^2) / n), where m4 is the fourth central moment: normality is not assumed.
What is kept for them is the Gram matrix of v_i = (n_i, a_i, b_i), sum v_i v_i^T, 3 x 3 for each
channel. A new centre c' = c + d is a linear map of v_i,

    (M10) n' = n,   a' = a - d n,   b' = b - 2 d a + d^2 n

so that Gram matrices around different means can be moved to a common one and added.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm.functional import canonical_axes, compute_dtype

__all__ = ["Moments", "example_sums"]

Array = Any
Axis = int | tuple[int, ...]
Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 22  # elements that are held in float64 at a time
_FORMAT = "keras_norm.moments/1"


def _host(x: Any) -> npt.NDArray[Any]:
    return x if isinstance(x, np.ndarray) else np.asarray(ops.convert_to_numpy(x))


def _of_rank(weights: npt.NDArray[Any], ndim: int) -> npt.NDArray[Any]:
    """Weights of lower rank belong to the first axes, as Keras's masks do."""
    return weights.reshape(*weights.shape, *[1] * max(ndim - weights.ndim, 0))


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


class Moments:
    """The count, mean and M2 of every channel, (M1) to (M3), in float64 on the host.

    Args:
        axis: the axis, or axes, that keep their own statistics; all others are pooled. Axis 0
            counts the examples, unless it is itself in `axis`: then an update is one example.
            Default: -1.

    State (all float64, of the shape of the channels (C,); scalars before the first update):
        count: total weight, the number of elements when all weights are 1.
        mean, m2: (M2), (M3); 0 where the count is 0.
        examples: how many examples had a weight.

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
        variance 1 the variance of 10^6 float64 values is exact to 1e-12, and independent of the
        batches they came in to 1e-12. Two processes' halves merge to the moments of all to 1e-10.

    Reference:
        Chan, Golub and LeVeque, 1979, Updating formulae and a pairwise algorithm for computing
        sample variances. Standard errors of clusters: Liang and Zeger, 1986, Longitudinal data
        analysis using generalized linear models.
    """

    def __init__(self, axis: Axis = -1) -> None:
        self.axis = axis if isinstance(axis, int) else tuple(axis)
        self._reset(())

    def _reset(self, shape: tuple[int, ...]) -> None:
        self.count: Floats = np.zeros(shape)
        self.mean: Floats = np.zeros(shape)
        self.m2: Floats = np.zeros(shape)
        self.examples: Floats = np.zeros(shape)
        self._gram: Floats = np.zeros((3, 3, *shape))

    # What came in ----------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether nothing with a weight has come yet."""
        return not np.any(self.count > 0)

    def update(
        self, x: Array, *, mask: Array | None = None, weights: Array | None = None
    ) -> "Moments":
        """Takes in a batch.

        Args:
            x: array of any rank >= 1 and any real dtype; NumPy or a tensor.
            mask: bool, broadcastable to x; one of lower rank belongs to the first axes, (N,) or
                (N, H, W), as Keras's masks do. What is False does not count, and may be NaN.
                Default: all counts.
            weights: non-negative, of such a shape. A weight of 2 counts an element twice.
                Default: 1.

        Returns:
            Itself.

        Raises:
            ValueError: for shapes that do not fit, negative weights, and values that are not
                finite. Nothing is taken in then.
        """
        x = _host(x)
        channels = canonical_axes(self.axis, x.ndim)
        w = self._weights(x, mask, weights)
        batch = Moments(self.axis)
        batch._reset(tuple(x.shape[a] for a in channels))
        step = len(x) if 0 in channels else max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
        for start in range(0, len(x), max(1, step)):
            block = slice(start, start + step)
            part = None if w is None else w[block] if len(w) > 1 else w
            batch._merge(_of_block(x[block], part, channels, self.axis))
        return self.merge(batch)

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

    def update_from_sums(
        self, shift: Array, first: Array, second: Array, count: Array
    ) -> "Moments":
        """Takes in a batch by the sums of its examples, which `example_sums` computes.

        Args:
            shift: (C,), what was subtracted from the elements.
            first, second: (N, C), for each example sum w (x - shift) and sum w (x - shift)^2.
            count: (N, C), or broadcastable to it: sum w.

        Returns:
            Itself.

        Raises:
            ValueError: for sums that are not finite. Nothing is taken in then.
        """
        a = _host(first).astype(np.float64)
        b = _host(second).astype(np.float64)
        n = np.broadcast_to(_host(count).astype(np.float64), a.shape)
        return self.merge(_of_sums(_host(shift).astype(np.float64), n, a, b, self.axis))

    # Merging ---------------------------------------------------------------------------------

    def merge(self, other: "Moments") -> "Moments":
        """Takes in all that another has taken in, (M4) to (M6).

        No example may be divided between the two: each counts as one for the standard errors.

        Returns:
            Itself.

        Raises:
            ValueError: for another `axis`, other channels, or values that are not finite.
                Nothing is taken in then.
        """
        if other.axis != self.axis:
            raise ValueError(
                "Only moments over the same axis can be merged. Received: "
                f"axis={self.axis} and axis={other.axis}."
            )
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

    def _merge(self, other: "Moments") -> None:
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

    def __add__(self, other: "Moments") -> "Moments":
        return self.copy().merge(other)

    def scaled(self, factor: float) -> "Moments":
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

    def copy(self) -> "Moments":
        """An independent copy."""
        new = Moments(self.axis)
        new.count, new.mean, new.m2 = self.count.copy(), self.mean.copy(), self.m2.copy()
        new.examples, new._gram = self.examples.copy(), self._gram.copy()
        return new

    # What is asked ---------------------------------------------------------------------------

    def variance(self, *, unbiased: bool = False) -> Floats:
        """The variance of every channel.

        Args:
            unbiased: divide by count - 1 instead of by the count (weights then say how often an
                element counts). Default: False, as batch normalization in Keras.

        Returns:
            (C,), float64; NaN where there is too little data: none, or one element if unbiased.
        """
        divisor = self.count - (1.0 if unbiased else 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(divisor > 0, self.m2 / divisor, np.nan)

    def standard_error_of_mean(self) -> Floats:
        """(M8), in the unit of x, (C,) float64; infinite for fewer than two examples."""
        return self._standard_error(self._gram[1, 1])

    def standard_error_of_variance(self) -> Floats:
        """(M9), in the unit of x squared, (C,) float64; infinite for fewer than two examples."""
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
            "format": _FORMAT,
            "axis": self.axis if isinstance(self.axis, int) else list(self.axis),
            "count": self.count.tolist(),
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
            "examples": self.examples.tolist(),
            "gram": self._gram.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Moments":
        """What `to_dict` gave.

        Raises:
            ValueError: for anything else.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"Moments are read from what Moments.to_dict() gave, of the format {_FORMAT!r}. "
                f"Received: format={state.get('format')!r}."
            )
        axis = state["axis"]
        new = cls(axis if isinstance(axis, int) else tuple(axis))
        for name in ("count", "mean", "m2", "examples"):
            setattr(new, name, np.asarray(state[name], np.float64))
        new._gram = np.asarray(state["gram"], np.float64).reshape(3, 3, *new.count.shape)
        return new

    def __repr__(self) -> str:
        if not self.count.shape:
            return f"Moments(axis={self.axis}, empty)"
        return (
            f"Moments(axis={self.axis}, channels={self.count.shape}, "
            f"count={self.count.max(initial=0):g}, examples={self.examples.max(initial=0):g})"
        )


def _recentred(gram: Floats, d: Floats) -> Floats:
    """The Gram matrix of v = (n, a, b) around a centre that is d further, (M10)."""
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
    """Moments from the sums (N, C) of the examples around a shift that is near the mean."""
    new = Moments(axis)
    new._reset(a.shape[1:])
    new.count = n.sum(axis=0)
    new.examples = (n > 0).sum(axis=0).astype(np.float64)
    d = _divide(a.sum(axis=0), new.count)
    new.mean = np.where(new.count > 0, shift + d, 0.0)
    new.m2 = np.maximum(b.sum(axis=0) - d * d * new.count, 0.0)
    v = (n, a, b)
    upper = {(i, j): np.einsum("n...,n...->...", v[i], v[j]) for i in range(3) for j in range(i, 3)}
    gram = np.array([[upper[min(i, j), max(i, j)] for j in range(3)] for i in range(3)])
    new._gram = _recentred(gram, d)
    return new


def _of_block(
    x: npt.NDArray[Any], w: Floats | None, channels: tuple[int, ...], axis: Axis
) -> Moments:
    x = x.astype(np.float64)
    reduced = tuple(i for i in range(x.ndim) if i not in channels)
    if 0 in channels:  # no axis counts the examples: all of it is one
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


# In a graph ------------------------------------------------------------------------------------


def example_sums(
    x: Array, *, axis: Axis = -1, weights: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """The sums of each example that `Moments.update_from_sums` takes, computed on the device.

    Everything here is `keras.ops`: it can stand inside a compiled function, where the float64 of
    `Moments.update` is too slow or not to be had.

    Args:
        x: array of any rank >= 1, of a floating dtype, with the examples on axis 0.
        axis: the axis, or axes, that keep their own statistics. Default: -1.
        weights: non-negative, of x's rank and broadcastable to it. What has weight 0 may be NaN.
            Default: 1.

    Returns:
        (shift, first, second, count): the batch's mean, up to rounding, (C,); sum w (x - shift)
        and sum w (x - shift)^2, (N, C); sum w, (N, C), or (1, C) without weights. In at least
        float32. With examples on no axis (axis 0 in `axis`), N is 1.

    Numerics:
        Only the positions within an example are summed in float32, around the batch's own mean;
        examples and batches are summed in float64 by `Moments`. For 10,000 images of 32 x 32 at
        mean 1000 and variance 1: mean to 1e-7, variance to 1e-6, relative.

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
        shift = ops.stop_gradient(ops.mean(x, axis=reduced))
        centred = x - ops.reshape(shift, lay)
        number = math.prod(shape[i] for i in positions)  # a number, or a tensor if one is unknown
        count = ops.ones([1, *(shape[c] for c in channels)], x.dtype) * ops.cast(number, x.dtype)
        return shift, *(_over(v, positions) for v in (centred, centred * centred)), count
    w = ops.broadcast_to(ops.cast(weights, x.dtype), shape)
    x = ops.where(w > 0, x, 0)
    total = ops.sum(w, axis=reduced)
    shift = ops.sum(w * x, axis=reduced) / ops.where(total > 0, total, 1)
    centred = ops.where(w > 0, x - ops.reshape(shift, lay), 0)
    sums = (w * centred, w * centred * centred)
    return shift, *(_over(v, positions) for v in sums), _over(w, positions)


def _over(x: Array, positions: tuple[int, ...]) -> Array:
    return ops.sum(x, axis=positions) if positions else x

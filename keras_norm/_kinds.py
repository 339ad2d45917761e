"""The moving statistics of each kind of normalization layer: how they are measured and assigned.

The values of a layer's statistics are a tuple of float64 arrays: (mean, variance) for batch
normalization, (mean, covariance) for decorrelated batch normalization, (quantiles,) for quantile
normalization. Deviations are in units of sigma, the spread of a layer's inputs, so that the same
threshold suits all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm import functional, kernels
from keras_norm._moving import weights_of
from keras_norm._rows import NormalizationByRows, Rows
from keras_norm.layers import BatchNormalization
from keras_norm.moments import Covariance, Moments, Quantiles, example_sums
from keras_norm.research import DecorrelatedBatchNormalization, QuantileNormalization

__all__ = [
    "MEAN_VARIANCE",
    "Kind",
    "Values",
    "copy_of",
    "has_statistics",
    "kind_by_names",
    "kind_of",
    "weights_in",
]

Array = Any
Layer = Any
Floats = npt.NDArray[np.float64]
Values = tuple[Floats, ...]

_HELD = 1 << 24  # elements on one level of a quantile sketch, all channels together: 64 MiB


def copy_of(variable: Any) -> npt.NDArray[Any]:
    """The value of a variable, on the host."""
    return np.array(ops.convert_to_numpy(variable), copy=True)


class Kind:
    """The statistics of one kind of layer."""

    names: tuple[str, ...]  # names of the variables, in the order of the values

    def current(self, layer: Layer) -> Values:
        """The layer's present statistics."""
        return tuple(copy_of(getattr(layer, name)).astype(np.float64) for name in self.names)

    def assign(self, layer: Layer, values: Values) -> None:
        """Gives the layer new statistics."""
        for name, value in zip(self.names, values, strict=True):
            variable = getattr(layer, name)
            variable.assign(value.reshape(tuple(variable.shape)))

    def of_snapshot(self, statistics: Mapping[str, npt.NDArray[Any]]) -> Values:
        """The values, picked from everything that a snapshot holds of a layer."""
        return tuple(statistics[name].astype(np.float64) for name in self.names)

    def epsilon(self, layer: Layer) -> float:
        """The number that is added to variances."""
        return float(layer.epsilon)

    def empty(self, layer: Layer) -> Moments:
        """An empty object that takes in the inputs of the layer."""
        raise NotImplementedError

    def measured(self, layer: Layer, x: Array, weights: Array | None) -> dict[str, Array]:
        """In a compiled function: what is to be measured of one input of the layer."""
        raise NotImplementedError

    def taken(self, layer: Layer, calls: Sequence[Mapping[str, Any]]) -> Moments | None:
        """On the host: the moments of what was measured in the calls of one pass.

        The arrays have the examples on axis 0. None if some values are not finite.
        """
        raise NotImplementedError

    def by_batch(
        self, layer: Layer, x: Array, weights: Array | None, measured: Any, flag: Array | None
    ) -> Array:
        """In a compiled function: the layer's output by the statistics of the batch.

        If the flag is not set: by the moving statistics.
        """
        raise NotImplementedError

    def of_data(self, moments: Any, like: Values) -> Values:
        """The statistics of what was taken in, shaped as `like`; NaN where there is nothing."""
        raise NotImplementedError

    def population(self, layer: Layer, moments: Any) -> Values:
        """The statistics of the data; a channel without elements keeps its own."""
        current = self.current(layer)
        return current if moments.empty else self.of_data(moments, current)

    def offset(self, values: Values, base: Values, epsilon: float) -> Floats:
        """Differences that are linear in the values, in units of the base's sigma."""
        mean, variance = self.marginals(base)
        other, other_variance = self.marginals(values)
        total = np.maximum(variance + epsilon, 1e-30)
        return np.stack([(other - mean) / np.sqrt(total), (other_variance - variance) / total])

    def marginals(self, values: Values) -> tuple[Floats, Floats]:
        """Mean and variance of each channel, (C,)."""
        raise NotImplementedError

    def deviation(self, values: Values, base: Values, epsilon: float) -> Floats:
        """(D, C), how much the values differ from the base, in sigma; norms are taken over D."""
        raise NotImplementedError

    def initial(self, values: Values) -> Values:
        """The initial statistics of a layer with statistics of these shapes."""
        raise NotImplementedError

    def vector(self, values: Values, unit: Values, epsilon: float) -> Floats:
        """All values as one vector, in units of sigma."""
        raise NotImplementedError

    def of_vector(self, vector: Floats, unit: Values, epsilon: float) -> Values:
        """The values nearest to a vector; the inverse of `vector`."""
        raise NotImplementedError

    def distance(self, values: Values, base: Values, epsilon: float) -> Floats:
        """(C,), the norm of the deviation."""
        return np.sqrt(np.sum(np.square(self.deviation(values, base, epsilon)), axis=0))


def _sigma(variance: Floats, epsilon: float) -> Floats:
    return np.sqrt(np.maximum(variance + epsilon, 1e-30))


class _MeanVariance(Kind):
    """The statistics of batch normalization, ours and that of keras.layers."""

    names = ("moving_mean", "moving_variance")

    def assign(self, layer: Layer, values: Values) -> None:
        super().assign(layer, values)
        if getattr(layer, "moving_stddev", None) is not None:  # Keras's batch renormalization
            layer.moving_stddev.assign(np.sqrt(values[1] + layer.epsilon))

    def empty(self, layer: Layer) -> Moments:
        return Moments(layer.axis if isinstance(layer.axis, int) else tuple(layer.axis))

    def measured(self, layer: Layer, x: Array, weights: Array | None) -> dict[str, Array]:
        if weights is not None:
            weights = ops.cast(weights, functional.compute_dtype(x))
        sums = example_sums(x, axis=layer.axis, weights=weights)
        return dict(zip(("shift", "first", "second", "count"), sums, strict=True))

    def taken(self, layer: Layer, calls: Sequence[Mapping[str, Any]]) -> Moments | None:
        if not all(np.all(np.isfinite(v)) for one in calls for v in one.values()):
            return None
        shift, first, second, count = (calls[0][k] for k in ("shift", "first", "second", "count"))
        for other in calls[1:]:  # an example counts once, however often the layer is called on it
            d = other["shift"] - shift
            first = first + other["first"] + d * other["count"]
            second = second + other["second"] + 2 * d * other["first"] + d * d * other["count"]
            count = count + other["count"]
        return self.empty(layer).update_from_sums(shift, first, second, count)

    def by_batch(
        self, layer: Layer, x: Array, weights: Array | None, measured: Any, flag: Array | None
    ) -> Array:
        count = ops.sum(ops.broadcast_to(measured["count"], ops.shape(measured["first"])), axis=0)
        count = ops.where(count > 0, count, 1)
        d = ops.sum(measured["first"], axis=0) / count
        mean = measured["shift"] + d
        variance = ops.maximum(ops.sum(measured["second"], axis=0) / count - d * d, 0)
        if flag is not None:
            mean = ops.where(flag, mean, ops.cast(layer.moving_mean, mean.dtype))
            variance = ops.where(flag, variance, ops.cast(layer.moving_variance, mean.dtype))
        where = {"axis": layer.axis, "epsilon": layer.epsilon}
        return kernels.normalize(x, mean, variance, layer.gamma, layer.beta, **where)

    def of_data(self, moments: Any, like: Values) -> Values:
        return moments.mean, moments.variance()

    def population(self, layer: Layer, moments: Any) -> Values:
        mean, variance = self.current(layer)
        some = moments.count > 0
        unbiased = bool(getattr(layer, "unbiased", False)) and bool(np.all(moments.count[some] > 1))
        new = moments.variance(unbiased=unbiased)
        return np.where(some, moments.mean, mean), np.where(some, new, variance)

    def marginals(self, values: Values) -> tuple[Floats, Floats]:
        return values[0], values[1]

    def deviation(self, values: Values, base: Values, epsilon: float) -> Floats:
        sigma = _sigma(base[1], epsilon)
        other = np.sqrt(np.maximum(values[1] + epsilon, 0.0))
        return np.stack([(values[0] - base[0]) / sigma, (other - sigma) / sigma])

    def initial(self, values: Values) -> Values:
        return np.zeros_like(values[0]), np.ones_like(values[1])

    def vector(self, values: Values, unit: Values, epsilon: float) -> Floats:
        sigma = np.sqrt(unit[1] + epsilon + 1e-30)
        log_sigma = np.log(values[1] + epsilon + 1e-30) / 2
        return np.concatenate([(values[0] / sigma).ravel(), log_sigma.ravel()])

    def of_vector(self, vector: Floats, unit: Values, epsilon: float) -> Values:
        sigma = np.sqrt(unit[1] + epsilon + 1e-30)
        mean, log_sigma = (v.reshape(sigma.shape) for v in np.split(vector, 2))
        variance = np.maximum(np.exp(2 * log_sigma) - (epsilon + 1e-30), 0)
        return mean * sigma, variance


class _ByRows(Kind):
    """The statistics of layers that take whole positions: the host gets the inputs themselves."""

    def measured(self, layer: Layer, x: Array, weights: Array | None) -> dict[str, Array]:
        rows = Rows.of(x, layer.axis)
        n = ops.shape(x)[0]
        found = {"x": ops.reshape(rows.split(x, rows.shape[-1]), [n, -1, rows.shape[-1]])}
        if weights is not None:
            counted = rows.weights(weights, functional.compute_dtype(x))
            found["w"] = ops.reshape(counted, [n, -1, 1])
        return found

    def taken(self, layer: Layer, calls: Sequence[Mapping[str, Any]]) -> Moments | None:
        # An example counts once, however often the layer is called on it: side by side.
        x = np.concatenate([one["x"] for one in calls], axis=1)
        w = None
        if any("w" in one for one in calls):
            ones = (one.get("w", np.ones((*one["x"].shape[:2], 1))) for one in calls)
            w = np.concatenate(list(ones), axis=1)
        if not np.all(np.isfinite(x) if w is None else np.isfinite(x) | (w == 0)):
            return None
        return self.empty(layer).update(x, weights=w)

    def by_batch(
        self, layer: Layer, x: Array, weights: Array | None, measured: Any, flag: Array | None
    ) -> Array:
        y = layer._by_batch(x, weights)[0]
        return y if flag is None else ops.where(flag, y, layer._by_moving(x))


class _MeanCovariance(_ByRows):
    """The statistics of decorrelated batch normalization."""

    names = ("moving_mean", "moving_covariance")

    def empty(self, layer: Layer) -> Moments:
        return Covariance(group_size=int(layer.moving_covariance.shape[-1]))

    def of_data(self, moments: Any, like: Values) -> Values:
        return moments.mean, moments.covariance()

    def marginals(self, values: Values) -> tuple[Floats, Floats]:
        return values[0], np.diagonal(values[1], axis1=1, axis2=2).reshape(values[0].shape)

    def deviation(self, values: Values, base: Values, epsilon: float) -> Floats:
        """The deviation after whitening by the base: of the mean, and of half the covariance."""
        groups, size = base[1].shape[:2]
        eigenvalues, q = np.linalg.eigh(base[1])
        inverse = 1 / np.sqrt(np.maximum(eigenvalues, 0) + epsilon + 1e-30)
        u = (q * inverse[:, None, :]) @ q.transpose(0, 2, 1)
        d = (u @ (values[0] - base[0]).reshape(groups, size, 1))[:, :, 0]
        e = u @ (values[1] - base[1]) @ u.transpose(0, 2, 1) / 2
        return np.concatenate([d[None], e.transpose(2, 0, 1)]).reshape(1 + size, -1)

    def initial(self, values: Values) -> Values:
        eye = np.eye(values[1].shape[-1])
        return np.zeros_like(values[0]), np.broadcast_to(eye, values[1].shape)

    def offset(self, values: Values, base: Values, epsilon: float) -> Floats:
        return self.vector(values, base, epsilon) - self.vector(base, base, epsilon)

    def _units(self, unit: Values, epsilon: float) -> tuple[Floats, Floats]:
        sigma = _sigma(self.marginals(unit)[1], epsilon)
        by_group = sigma.reshape(unit[1].shape[:2])
        return sigma, by_group[:, :, None] * by_group[:, None, :]

    def vector(self, values: Values, unit: Values, epsilon: float) -> Floats:
        sigma, product = self._units(unit, epsilon)
        return np.concatenate([values[0] / sigma, (values[1] / product).ravel()])

    def of_vector(self, vector: Floats, unit: Values, epsilon: float) -> Values:
        sigma, product = self._units(unit, epsilon)
        mean, rest = np.split(vector, [sigma.size])
        covariance = rest.reshape(product.shape) * product
        eigenvalues, q = np.linalg.eigh((covariance + covariance.transpose(0, 2, 1)) / 2)
        covariance = (q * np.maximum(eigenvalues, 0)[:, None, :]) @ q.transpose(0, 2, 1)
        return mean * sigma, covariance


class _OfQuantiles(_ByRows):
    """The statistics of quantile normalization."""

    names = ("moving_quantiles",)

    def epsilon(self, layer: Layer) -> float:
        return float(layer.epsilon) ** 2  # epsilon is in the unit of x there

    def empty(self, layer: Layer) -> Moments:
        each = _HELD // int(layer.moving_quantiles.shape[1])
        return Quantiles(capacity=int(np.clip(each, 1 << 12, 1 << 20)) // 2 * 2)

    def of_data(self, moments: Any, like: Values) -> Values:
        number = len(like[0])
        return (moments.quantile((np.arange(number) + 0.5) / number),)

    def marginals(self, values: Values) -> tuple[Floats, Floats]:
        return values[0].mean(axis=0), values[0].var(axis=0)

    def deviation(self, values: Values, base: Values, epsilon: float) -> Floats:
        sigma = _sigma(base[0].var(axis=0), epsilon)
        return (values[0] - base[0]) / sigma / np.sqrt(len(base[0]))

    def initial(self, values: Values) -> Values:
        number = len(values[0])
        z = np.array([NormalDist().inv_cdf((k + 0.5) / number) for k in range(number)])
        return (np.broadcast_to(z[:, None], values[0].shape),)

    def offset(self, values: Values, base: Values, epsilon: float) -> Floats:
        return self.vector(values, base, epsilon) - self.vector(base, base, epsilon)

    def vector(self, values: Values, unit: Values, epsilon: float) -> Floats:
        return (values[0] / _sigma(unit[0].var(axis=0), epsilon)).ravel()

    def of_vector(self, vector: Floats, unit: Values, epsilon: float) -> Values:
        sigma = _sigma(unit[0].var(axis=0), epsilon)
        return (np.sort(vector.reshape(unit[0].shape) * sigma, axis=0),)


MEAN_VARIANCE = _MeanVariance()

_KINDS: tuple[tuple[tuple[type, ...], Kind], ...] = (
    ((BatchNormalization, keras.layers.BatchNormalization), MEAN_VARIANCE),
    ((DecorrelatedBatchNormalization,), _MeanCovariance()),
    ((QuantileNormalization,), _OfQuantiles()),
)


def has_statistics(layer: Layer) -> bool:
    """Whether this is a normalization layer with moving statistics, and built.

    Raises:
        ValueError: for a kind of layer that this module does not support.
    """
    for classes, kind in _KINDS:
        if isinstance(layer, classes):
            return getattr(layer, kind.names[0], None) is not None
    if isinstance(layer, NormalizationByRows):
        raise ValueError(
            "The statistics of a normalization layer must be of a known kind. Received: layer "
            f"{layer.name!r} of the class {type(layer).__name__}."
        )
    return False


def kind_of(layer: Layer) -> Kind:
    """The kind of a layer with moving statistics."""
    return next(kind for classes, kind in _KINDS if isinstance(layer, classes))


def kind_by_names(names: Iterable[str]) -> Kind:
    """The kind of layer that has variables of these names."""
    given = set(names)
    return next((kind for _, kind in _KINDS if given.issuperset(kind.names)), _KINDS[0][1])


def weights_in(x: Array, given: Mapping[str, Any]) -> Array | None:
    """Mask and weights of a call, combined, with the rank of x; None if there are none."""
    return weights_of(given.get("mask"), given.get("sample_weight"), x)

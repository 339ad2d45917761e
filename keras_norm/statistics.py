"""Operations on the moving statistics of a whole model after training.

Batch normalization normalizes by the batch in training and by moving statistics in inference.
The moving statistics are a decaying average over batches, whose activations came from weights
that no longer exist. `reestimate` replaces them by the mean and the biased variance of data under
the final weights (precise batch normalization):

    (J1)  mean_l     = sum over the data of the inputs of layer l / count_l
    (J2)  variance_l = sum over the data of (input - mean_l)^2 / count_l

where the inputs of layer l are those that it receives in inference, with the new statistics in
all layers. A layer's inputs depend on the statistics of the layers below, so (J1) and (J2) are
solved from the bottom up: exactly, layer by layer (`method="layerwise"`), or approximately in one
sweep in which every layer normalizes by the batch (`method="one_pass"`).

The same is done for the other layers with moving statistics: the mean and the covariances of
`DecorrelatedBatchNormalization`, and the quantiles of `QuantileNormalization`. What is said below
about batch normalization holds for them too; an operation that has no meaning for a layer is
refused.

Reference: Wu and Johnson, 2021, Rethinking "Batch" in BatchNorm, section 3; Ioffe and Szegedy,
2015, algorithm 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

from keras_norm._arrays import is_integer, is_real
from keras_norm._files import replace_file
from keras_norm._kinds import Values, copy_of, has_statistics, kind_by_names, kind_of
from keras_norm._layerwise import Found, Job, Rule, current_statistics, error_of, rms
from keras_norm._sample import Sample, Store, as_numpy, describe, is_array
from keras_norm._state import synchronized
from keras_norm.moments import Moments, Quantiles

if TYPE_CHECKING:
    from keras_norm._diagnosis import Diagnosis

__all__ = [
    "DomainStatistics",
    "LayerStatistics",
    "Report",
    "RunningAdaptation",
    "Snapshot",
    "adapt",
    "diagnose",
    "diff",
    "reestimate",
    "restore",
    "snapshot",
]

Array = Any
Layer = Any
Floats = npt.NDArray[np.float64]

_GIB = 2**30
_IN_ARCHIVE = "keras_norm.statistics.json"  # name of the report in a .keras file
_DRIFT = 3.0  # the drift above which a stream is not a random sample
_TINY = 0.2  # sigma: the standard error above which a sample is too small


# Layers and transactions ---------------------------------------------------------------------


def _normalizations(model: Any) -> dict[str, Layer]:
    """All built layers with moving statistics, by their paths in the model."""
    synchronized(model)
    layers: dict[str, Layer] = {}
    inside = _inside(model) if isinstance(model, keras.Layer) else ()
    for path, layer in inside:
        if has_statistics(layer):
            name, number = path, 2
            while name in layers:
                name, number = f"{path}#{number}", number + 1
            layers[name] = layer
    if not layers:
        raise ValueError(
            "The model must have built batch normalization layers, of keras_norm.layers or "
            "keras.layers, or others with moving statistics, of keras_norm.research. Received: "
            f"model={getattr(model, 'name', model)!r} without any. Build a subclassed model "
            "first, by calling it on a batch."
        )
    return layers


def _inside(
    layer: Layer, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Layer]]:
    """Each layer in a layer once, in order, with a path that is the same after loading.

    That of `layer.path` may not be.
    """
    seen = set() if seen is None else seen
    seen.add(id(layer))
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        if id(inner) not in seen:
            yield path + inner.name, inner
            yield from _inside(inner, f"{path}{inner.name}/", seen)


def _statistics_of(layer: Layer) -> list[Any]:
    """The weights of a layer that are statistics: all but gamma and beta."""
    return [v for v in layer.weights if v is not layer.gamma and v is not layer.beta]


def _assign_all(values: Iterable[tuple[Any, npt.NDArray[Any]]]) -> None:
    """Assigns all values even if Ctrl-C comes in between, and only then raises it."""
    todo, interrupt = list(values), None
    while todo:
        try:
            todo[-1][0].assign(todo[-1][1])
            todo.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextlib.contextmanager
def _transaction(model: Any, keep: Sequence[Layer]) -> Iterator[None]:
    """Undoes all changes of state on failure; on success, all but the statistics of `keep`.

    State is what an inference pass could change: non-trainable variables and random seeds.
    """
    before = [(v, copy_of(v)) for v in model.non_trainable_variables]
    statistics = {id(v) for layer in keep for v in _statistics_of(layer)}
    known = {id(v) for v, _ in before}
    before += [(v, copy_of(v)) for y in keep for v in _statistics_of(y) if id(v) not in known]
    try:
        yield
    except BaseException:
        _assign_all(before)
        raise
    _assign_all([(v, value) for v, value in before if id(v) not in statistics])


@contextlib.contextmanager
def _traced_as_before(layers: Iterable[Layer]) -> Iterator[None]:
    """Keeps what is compiled inside the block from fixing the layers' `use_batch_statistics`.

    The programs that measure the layers' inputs are compiled again when it has changed.
    """
    before = [(layer, layer._traced) for layer in layers if hasattr(layer, "_traced")]
    try:
        yield
    finally:
        for layer, traced in before:
            layer._traced = traced


@dataclass(frozen=True)
class Snapshot:
    """A copy of the statistics of every layer with moving statistics, taken at one moment.

    Args:
        statistics: layer -> variable -> value.
        epsilons: layer -> epsilon.
    """

    statistics: Mapping[str, Mapping[str, npt.NDArray[Any]]]
    epsilons: Mapping[str, float]

    def moments(self, name: str) -> tuple[Floats, Floats]:
        """The moving mean and variance of a layer's channels, in float64.

        For quantiles: the mean and variance of the distribution that they describe.
        """
        return kind_by_names(self.statistics[name]).marginals(self.values(name))

    def values(self, name: str) -> Values:
        """A layer's statistics in float64: (mean, variance), (mean, covariance) or (quantiles,)."""
        statistics = self.statistics[name]
        return kind_by_names(statistics).of_snapshot(statistics)


def snapshot(model: Any) -> Snapshot:
    """Copies the statistics of every layer of a model that has moving statistics.

    Args:
        model: a built `keras.Model` (or layer) with batch normalization layers of
            `keras_norm.layers` or `keras.layers`, or layers with moving statistics of
            `keras_norm.research`.

    Returns:
        A `Snapshot`, independent of the model.

    Raises:
        ValueError: for a model without built batch normalization layers.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,))
        >>> before = snapshot(model)
        >>> _ = reestimate(model, np.eye(3, dtype="float32"))
        >>> restore(model, before)
        >>> diff(before, model).largest_shift
        0.0
    """
    layers = _normalizations(model)
    return Snapshot(
        {name: {v.name: copy_of(v) for v in _statistics_of(y)} for name, y in layers.items()},
        {name: kind_of(y).epsilon(y) for name, y in layers.items()},
    )


def restore(model: Any, snapshot: Snapshot) -> None:
    """Puts the statistics of a snapshot back, bit for bit: all of them, or none on failure.

    Args:
        model: the model of the snapshot, or one of the same architecture and names.
        snapshot: what `snapshot` returned.

    Raises:
        ValueError: for a snapshot of other layers, variables or shapes. The model is unchanged.
    """
    layers = _normalizations(model)
    values = _matching(layers, snapshot)
    with _transaction(model, list(layers.values())):
        _assign_all(values)


def _matching(
    layers: Mapping[str, Layer], snapshot: Snapshot
) -> list[tuple[Any, npt.NDArray[Any]]]:
    """Each variable of the layers with its value in a snapshot, which must fit."""
    if not isinstance(snapshot, Snapshot):
        raise ValueError(
            "Statistics are put back from a `Snapshot`, as `statistics.snapshot` takes it. "
            f"Received: snapshot of type {type(snapshot).__name__}."
        )
    if set(layers) != set(snapshot.statistics):
        raise ValueError(
            "A snapshot can be restored only to a model with the same batch normalization layers. "
            f"Received: a snapshot of {sorted(snapshot.statistics)} for a model with "
            f"{sorted(layers)}."
        )
    values: list[tuple[Any, npt.NDArray[Any]]] = []
    for name, layer in layers.items():
        given = snapshot.statistics[name]
        variables = {v.name: v for v in _statistics_of(layer)}
        shapes = {key: tuple(v.shape) for key, v in variables.items()}
        if shapes != {key: value.shape for key, value in given.items()}:
            raise ValueError(
                f"A snapshot's statistics must have the shapes of the layer's, {shapes}. "
                f"Received: for {name!r} { ({k: v.shape for k, v in given.items()}) }."
            )
        values += [(v, given[key]) for key, v in variables.items()]
    return values


# The report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's part of a `Report`.

    Args:
        name: path of the layer in its model.
        status: "updated"; or, for a layer that kept its statistics, "did not run" or "not
            selected".
        epsilon: the epsilon of the layer.
        old_mean, old_variance: (C,), the moving statistics before.
        mean, variance: (C,), those after.
        elements: (C,), the number of elements (total weight) in the new statistics.
        examples: the number of examples in them.
        uses: how often the layer is called in one pass.
        standard_error_of_mean, standard_error_of_variance: (C,), of the data's mean and
            variance, from the spread between examples; infinite for one example.
        residual: where the statistics had to be found by iteration, the largest difference, in
            units of sigma, between them and those of the inputs that they produce; else 0.
        leak: for `one_pass`, its error, estimated on the first four batches and two in forty, in
            units of sigma, root mean square over the channels. So few batches give a rough value:
            within a factor of 2 in half of the layers, more often too large than too small, and
            up to ten times in deep layers with batches of 20. Else 0.
        old, new: for layers whose statistics are more than means and variances, all of them, by
            the names of the variables: "moving_mean" (C,) and "moving_covariance" (C / S, S, S),
            or "moving_quantiles" (K, C). The means, variances and standard errors above are then
            those of the channels; for quantiles, those of the distribution that they describe.
        rank_error: for quantiles, by how much their ranks may be off, as a fraction of the
            elements; 0 if they are exact.
        drift: for `layerwise`, how far the mean of the first half of the examples is from that of
            all, root mean square over the channels, in units of what to expect if they came in
            random order, so about 1. Much more means that the examples are sorted, or changed
            along the way; the statistics of all of them are exact all the same.
    """

    name: str
    status: str
    epsilon: float
    old_mean: Floats
    old_variance: Floats
    mean: Floats
    variance: Floats
    elements: Floats
    examples: int = 0
    uses: int = 0
    standard_error_of_mean: Floats = field(default_factory=lambda: np.zeros(0))
    standard_error_of_variance: Floats = field(default_factory=lambda: np.zeros(0))
    residual: float = 0.0
    leak: float = 0.0
    drift: float = 0.0
    old: Mapping[str, Floats] = field(default_factory=dict)
    new: Mapping[str, Floats] = field(default_factory=dict)
    rank_error: float = 0.0

    @property
    def distance(self) -> float:
        """How far all statistics moved, root mean square over the channels, in units of sigma.

        Means and variances count together. Covariances are compared after whitening by the new
        ones, so that a changed correlation counts as well. For quantiles, the root mean square is
        over them too.
        """
        if self.new:
            kind = kind_by_names(self.new)
            return rms(
                kind.distance(tuple(self.old.values()), tuple(self.new.values()), self.epsilon)
            )
        sigma_ratio = 1 / self.scale - 1
        return rms(np.sqrt(self.shift**2 + sigma_ratio**2))

    @property
    def shift(self) -> Floats:
        """(C,), (mean - old_mean) / sigma, where sigma = sqrt(variance + epsilon)."""
        return (self.mean - self.old_mean) / self._sigma

    @property
    def scale(self) -> Floats:
        """(C,), sigma / old sigma."""
        old = np.sqrt(np.maximum(self.old_variance + self.epsilon, 1e-30))
        return self._sigma / old

    @property
    def _sigma(self) -> Floats:
        return np.sqrt(np.maximum(self.variance + self.epsilon, 1e-30))

    @property
    def error(self) -> float:
        """Standard error of the layer's normalized outputs, root mean square, in sigma.

        It is what more data could still improve. To first order, an error of the mean moves an
        output by SE(mean) / sigma, and one of the variance by x_hat SE(variance) / (2 sigma^2).
        """
        if self.status != "updated":
            return 0.0
        errors = self.standard_error_of_mean, self.standard_error_of_variance
        return error_of(self.variance, *errors, self.epsilon)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; numbers that are not finite become None."""
        found: dict[str, Any] = {}
        for key, value in dataclasses.asdict(self).items():
            if key in ("old", "new"):
                value = {
                    name: {"shape": list(v.shape), "values": _finite_or_none(v)}
                    for name, v in value.items()
                }
            if isinstance(value, np.ndarray):
                value = _finite_or_none(value)
            found[key] = value
        return {**found, "shape": list(self.mean.shape)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LayerStatistics:
        """Rebuilds the object from what `to_dict` returned."""
        values = {k: v for k, v in state.items() if k != "shape"}
        for key, value in values.items():
            if key in ("old", "new"):
                values[key] = {
                    name: np.array(v["values"], np.float64).reshape(v["shape"])  # None is NaN
                    for name, v in value.items()
                }
            if isinstance(value, list):
                lost = math.inf if key.startswith("standard_error") else math.nan
                array = np.array([lost if x is None else x for x in value], np.float64)
                values[key] = array.reshape(state["shape"]) if array.size else array
        return cls(**values)


def _finite_or_none(values: npt.NDArray[Any]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values.ravel().tolist()]


def _plain(value: Any) -> Any:
    """A setting as a JSON value; an infinite one as its name."""
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Report:
    """How an operation changed the statistics of a model; prints as a table.

    Args:
        method: "layerwise", "one_pass", "adapt" or "diff".
        data: name of the data.
        samples: the number of examples used, not the number that was asked for.
        batch_size: examples per pass.
        layers: one `LayerStatistics` for each batch normalization layer, in order of their calls.
        settings: the other settings of the operation.
    """

    method: str
    data: str
    samples: int
    batch_size: int
    layers: tuple[LayerStatistics, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerStatistics:
        found = [y for y in self.layers if y.name == name]
        found = found or [y for y in self.layers if y.name.rpartition("/")[2] == name]
        if len(found) > 1:
            names = [y.name for y in found]
            raise KeyError(f"{name!r} is the name of several layers. Use one of {names}.")
        if not found:
            raise KeyError(name)
        return found[0]

    @property
    def updated(self) -> tuple[LayerStatistics, ...]:
        """The layers with new statistics."""
        return tuple(y for y in self.layers if y.status == "updated")

    @property
    def largest_shift(self) -> float:
        """The largest root mean square shift of a layer, in units of sigma.

        For covariances and quantiles, their `distance` takes the place of the shift.
        """
        return max((y.distance if y.new else rms(y.shift) for y in self.updated), default=0.0)

    @property
    def error(self) -> float:
        """The largest standard error of a layer's outputs, in units of sigma."""
        return max((y.error for y in self.updated), default=0.0)

    def __str__(self) -> str:
        head = f"{self.method}: {self.samples} examples of {self.data}"
        columns = ["layer", "channels", "uses", "elements", "shift/σ", "σ/old σ", "error/σ"]
        units = {"leak": "leak/σ", "residual": "residual/σ", "rank_error": "rank error"}
        extra = [k for k in units if any(getattr(y, k) for y in self.layers)]
        rows = [columns + [units[k] for k in extra]]
        for y in self.layers:
            row = [y.name, str(y.mean.size), str(y.uses)]
            if y.status != "updated":
                rows.append([*row, y.status] + [""] * (3 + len(extra)))
                continue
            scale = float(np.exp(np.mean(np.log(y.scale)))) if y.scale.size else 1.0
            moved = y.distance if y.new else rms(y.shift)
            row += [f"{float(np.max(y.elements, initial=0)):.0f}", f"{moved:.3g}"]
            row += [f"{scale:.3f}", f"{y.error:.2g}"]
            rows.append(row + [f"{getattr(y, k):.2g}" for k in extra])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            "format": "keras_norm.statistics.report/1",
            "method": self.method,
            "data": self.data,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "settings": {k: _plain(v) for k, v in self.settings.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Report:
        """Rebuilds the report from what `to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        if state.get("format") != "keras_norm.statistics.report/1":
            raise ValueError(
                "A report is read from what Report.to_dict() gave. Received: "
                f"format={state.get('format')!r}."
            )
        layers = tuple(LayerStatistics.from_dict(y) for y in state["layers"])
        keys = ("method", "data", "samples", "batch_size", "settings")
        return cls(layers=layers, **{key: state[key] for key in keys})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as JSON, whole or not at all, and returns the path.

        Args:
            path: a file to write; or the .keras file of a saved model, to which the report is
                added as one more part. Keras loads the model as before.

        Raises:
            FileNotFoundError: for a .keras file that does not exist: call `model.save` first.
        """
        text = json.dumps(self.to_dict(), allow_nan=False, indent=1)
        if Path(path).suffix == ".keras":
            _add_to_archive(Path(path), text)
        else:
            with replace_file(path) as temporary:
                temporary.write_text(text)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads what `save` wrote.

        Raises:
            KeyError: for a .keras file without a report.
        """
        if Path(path).suffix != ".keras":
            return cls.from_dict(json.loads(Path(path).read_text()))
        with zipfile.ZipFile(path) as archive:
            return cls.from_dict(json.loads(archive.read(_IN_ARCHIVE)))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws how far the statistics of each updated layer moved, and their errors.

        Three panels over the layers: shift / sigma and sigma / old sigma, both as the median over
        the channels with a band for the middle 80%, and the errors in units of sigma.

        Args:
            path: file to write, whole or not at all: .png, .pdf or .svg. Default: none.

        Returns:
            The Matplotlib figure; closed if it was written.

        Raises:
            ValueError: if no layer was updated, or for another kind of file.
        """
        if not self.updated:
            raise ValueError("A plot needs at least one updated layer. Received: a report without.")
        from keras_norm.plotting import finish, style

        with style():
            return finish(_draw(self), path)


def _add_to_archive(path: Path, text: str) -> None:
    """Adds the report to a .keras file, in place of an older one."""
    with (
        zipfile.ZipFile(path) as old,
        replace_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as new,
    ):
        for item in old.infolist():
            if item.filename != _IN_ARCHIVE:
                new.writestr(item, old.read(item))
        new.writestr(_IN_ARCHIVE, text)


def _draw(report: Report) -> Any:
    from matplotlib import pyplot

    layers = report.updated
    at = np.arange(len(layers))
    size = (max(5.0, 0.45 * len(layers) + 2), 7.0)
    figure, panels = pyplot.subplots(3, sharex=True, figsize=size)
    curves = [
        ("mean: shift (σ)", [y.shift.ravel() for y in layers], 0.0),
        ("σ / old σ", [y.scale.ravel() for y in layers], 1.0),
    ]
    for axes, (label, values, neutral) in zip(panels, curves, strict=False):
        low, middle, high = (np.array([np.quantile(v, q) for v in values]) for q in (0.1, 0.5, 0.9))
        axes.errorbar(
            at,
            middle,
            [middle - low, high - middle],
            capsize=3,
            label="median, 10 to 90% of channels",
        )
        axes.axhline(neutral, color="#444444", linestyle="--", marker="", linewidth=1)
        axes.set_ylabel(label)
    panels[1].set_yscale("log")
    panels[0].legend()
    errors = {
        "standard error": [y.error for y in layers],
        "leak of one pass": [y.leak for y in layers],
    }
    for name, numbers in errors.items():
        if any(0 < v < math.inf for v in numbers):
            panels[2].plot(at, [v if 0 < v < math.inf else np.nan for v in numbers], label=name)
    drawn = bool(panels[2].lines)
    panels[2].set(ylabel="error (σ)", yscale="log" if drawn else "linear", xlabel="layer")
    if drawn:
        panels[2].legend()
    panels[2].set_xticks(at, [y.name.rpartition("/")[2] for y in layers], rotation=60, ha="right")
    figure.suptitle(f"{report.method}: {report.samples:,} examples of {report.data}")
    return figure


def diff(a: Any, b: Any) -> Report:
    """The difference between two snapshots or models.

    Args:
        a: the old one, a `Snapshot` or a model.
        b: the new one.

    Returns:
        A `Report` with the old and new statistics of each layer.

    Raises:
        ValueError: if they have different layers.
    """
    old, new = (x if isinstance(x, Snapshot) else snapshot(x) for x in (a, b))
    if list(old.statistics) != list(new.statistics):
        raise ValueError(
            "Only snapshots of the same layers can be compared. Received: "
            f"{list(old.statistics)} and {list(new.statistics)}."
        )
    layers = []
    for name, epsilon in new.epsilons.items():
        (old_mean, old_variance), (mean, variance) = old.moments(name), new.moments(name)
        zeros = np.zeros(mean.shape)
        layers.append(
            LayerStatistics(
                name=name,
                status="updated",
                epsilon=epsilon,
                old_mean=old_mean,
                old_variance=old_variance,
                mean=mean,
                variance=variance,
                elements=zeros,
                standard_error_of_mean=zeros,
                standard_error_of_variance=zeros,
                old=_beyond_variance(old.statistics[name]),
                new=_beyond_variance(new.statistics[name]),
            )
        )
    return Report("diff", "two snapshots", 0, 0, tuple(layers))


def _beyond_variance(statistics: Mapping[str, npt.NDArray[Any]]) -> dict[str, Floats]:
    """The statistics by name, where they are more than a mean and a variance."""
    kind = kind_by_names(statistics)
    if "moving_variance" in kind.names:
        return {}
    return dict(zip(kind.names, kind.of_snapshot(statistics), strict=True))


# Re-estimation -----------------------------------------------------------------------------------


def _population(layer: Layer, moments: Moments) -> Values:
    """(J1) and (J2), or what corresponds to them; a channel without elements keeps its statistics.

    A layer whose moving variance is the unbiased one (over N - 1) gets that.
    """
    return kind_of(layer).population(layer, moments)


Selection = Callable[[Any], bool] | Iterable[Any] | None


def _selected(layers: Mapping[str, Layer], selection: Selection) -> dict[str, Layer]:
    if selection is None:
        return dict(layers)
    if isinstance(selection, keras.layers.Layer):  # which can be called as well
        selection = [selection]
    if callable(selection):
        chosen = {name: y for name, y in layers.items() if selection(y)}
    else:
        wanted = [selection] if isinstance(selection, str) else list(selection)

        def is_meant(w: Any, name: str) -> bool:
            return w is layers[name] or (isinstance(w, str) and w in (name, layers[name].name))

        unknown = [w for w in wanted if not any(is_meant(w, name) for name in layers)]
        if unknown:
            raise ValueError(
                "`layers` must name batch normalization layers of the model, "
                f"{sorted(layers)}. Received: layers with unknown {unknown}."
            )
        chosen = {n: y for n, y in layers.items() if any(is_meant(w, n) for w in wanted)}
    if not chosen:
        raise ValueError(
            f"`layers` must select at least one of {sorted(layers)}. Received: "
            f"layers={selection!r}, which selects none."
        )
    return chosen


def _check_numbers(
    method: str, samples: int | None, batch_size: int, tolerance: float | None, seed: int
) -> None:
    if method not in ("layerwise", "one_pass"):
        raise ValueError(
            f"`method` must be 'layerwise' (exact) or 'one_pass' (fast). Received: {method=}."
        )
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        whole = is_integer(value) and value >= 1  # type: ignore[operator]
        if not whole and not (name == "samples" and value is None):
            raise ValueError(
                f"`{name}` is a number of examples and must be an integer >= 1"
                f"{', or None for all there are' if name == 'samples' else ''}. "
                f"Received: {name}={value!r}."
            )
    if tolerance is not None and not (is_real(tolerance) and tolerance > 0):
        raise ValueError(
            "`tolerance` is a standard error in units of sigma and must be a number > 0, or None. "
            f"Received: tolerance={tolerance!r}. 0.01 is a strict one."
        )
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if not (is_integer(seed) and seed >= 0):
        raise ValueError(f"`seed` must be an integer >= 0. Received: seed={seed!r}.")


def reestimate(
    model: Any,
    data: Any,
    *,
    samples: int | None = 10_000,
    method: str = "layerwise",
    batch_size: int = 256,
    tolerance: float | None = None,
    layers: Selection = None,
    memory: float = 2 * _GIB,
    disk: float = 16 * _GIB,
    folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Replaces the moving statistics of every batch normalization layer by those of data.

    Equations (J1) and (J2) of this module, in inference mode throughout: dropout and augmentation
    layers are off. Only the statistics of the model change, and on any failure (of the data, of
    the disk, Ctrl-C) not even these.

    `method="layerwise"` is exact: the result is the float64 mean and biased variance of the
    inputs that each layer receives, with all layers on their new statistics, whatever the batch
    size and the order of the data. In a functional or Sequential model, nested ones included,
    each operation runs once for each batch: a layer's statistics are complete before its outputs
    are computed, and in between the activations are kept, in memory and then on disk. Those that
    do not fit are computed again from the last that did.

    A layer that is called several times has one set of statistics: those of all its inputs
    pooled, each element counting once. If its calls feed each other, the statistics depend on
    themselves, and are found by iterating until they reproduce themselves to 1e-6 sigma
    (`residual` in the report).

    For a `DecorrelatedBatchNormalization`, the covariances of the data are taken in the same way,
    and are equally exact. For a `QuantileNormalization`, up to 2^24 / C elements of each of its C
    channels (at least 4096, at most 2^20) are held, and up to there the quantiles are exact.
    Beyond, they come from a sketch, whose largest possible rank error the report states
    (`rank_error`, in general below 0.01%); to that degree they depend on batches and order. The
    inputs of both layers are copied to the host to be measured.

    Calls that are code (subclassed models and layers with normalization layers inside) are run
    as a whole: once more for each normalization layer in them, since each pass makes only the
    next one right. The result is exact all the same. If a loop calls a layer (in a cell of
    `keras.layers.RNN`), the inputs of every iteration are pooled. Such code, and what compiles
    itself (`tf.function`, `jax.jit`), runs uncompiled, which takes longer. On TensorFlow and
    PyTorch, Keras calls a cell once more than there are time steps, in training too: the first
    step counts twice.

    `method="one_pass"` lets every layer normalize by the batch, in one sweep, and pools by
    counts. Layers above the first see inputs normalized with the batch's own noise, so that the
    error grows with depth and with smaller batches. The report states it per layer as `leak`,
    estimated on the first four batches and two in forty, which are run a second time.

    Args:
        model: a built `keras.Model`, functional, Sequential or subclassed, with batch
            normalization layers of `keras_norm.layers` or `keras.layers`, or decorrelated batch
            or quantile normalization of `keras_norm.research`.
        data: arrays x or (x, y), a list or dict of them for several inputs; a
            `keras.utils.PyDataset`; a `tf.data.Dataset`, data loader or generator of batches x,
            (x, y) or (x, y, weights). Labels and sample weights are not used.
        samples: the largest number of examples; None for all. If there are more, a random part of
            arrays and PyDatasets is taken, and the first examples of streams. The report states
            how many were used. Default: 10,000.
        method: "layerwise" or "one_pass". Default: "layerwise".
        batch_size: examples per pass; streams are cut into new batches. Default: 256.
        tolerance: stop when no layer's outputs have a standard error (`Report.error`) above this,
            in units of sigma; at the latest after `samples`. Arrays are then taken in random
            order. Default: use all samples.
        layers: which layers: their names or paths, the layers themselves, or a function of a
            layer. The others keep their statistics. Default: all.
        memory: budget for the activations that are kept, in bytes, on the device. Default: 2 GiB.
        disk: budget for those that do not fit into memory, in bytes. Default: 16 GiB.
        folder: where to keep them on disk. Default: the system's folder for temporary files.
        name: name of the data, for the report. Default: a description of the data.
        seed: int >= 0, for the random part. Default: 0.
        progress: whether to show a progress bar (on stderr). Default: False.

    Returns:
        A `Report`: for each layer the old and new statistics, elements, standard errors, shift.

    Raises:
        ValueError: for arguments out of range, data without examples or with shapes other than
            those of the model's inputs, values that are not finite, or a model without built batch
            normalization layers. The model is unchanged.
        OSError: if activations cannot be written to disk. The model is unchanged.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,))
        >>> report = reestimate(model, (np.eye(3, dtype="float32"), np.arange(3)), name="corners")
        >>> report.samples, report.method, [y.name for y in report.layers]
        (3, 'layerwise', ['dense1_norm'])

    Numerics:
        Sums within an example are in float32 (float64 in a float64 model) around the batch's
        mean, all others in float64. The results equal NumPy's float64 moments of the activations
        to 1e-5 sigma.

    Reference:
        Wu and Johnson, 2021, Rethinking "Batch" in BatchNorm, section 3.
    """
    options = _Options(
        samples=samples,
        method=method,
        batch_size=batch_size,
        tolerance=tolerance,
        layers=layers,
        memory=memory,
        disk=disk,
        folder=folder,
        name=name,
        seed=seed,
        progress=progress,
    )
    return _replace_statistics(model, data, options)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments that `reestimate`, `adapt` and `RunningAdaptation` share; see `reestimate`."""

    samples: int | None
    method: str = "layerwise"
    batch_size: int = 256
    tolerance: float | None = None
    layers: Selection = None
    memory: float = 2 * _GIB
    disk: float = 16 * _GIB
    folder: str | os.PathLike[str] | None = None
    name: str | None = None
    seed: int = 0
    progress: bool = False


def _replace_statistics(
    model: Any,
    data: Any,
    options: _Options,
    rule: Rule = _population,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Assigns to the selected layers what the rule makes of the moments of their inputs."""
    o = options
    _check_numbers(o.method, o.samples, o.batch_size, o.tolerance, o.seed)
    everything = _normalizations(model)
    chosen = _selected(everything, o.layers)
    before = snapshot(model)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(o.memory, o.disk, o.folder))
        bar = stack.enter_context(_progress_bar(o.method)) if o.progress else None
        stack.enter_context(_transaction(model, list(chosen.values())))
        stack.enter_context(_traced_as_before(everything.values()))
        held = store if o.method == "layerwise" else None
        shuffled = o.tolerance is not None  # so that an early stop leaves a random part
        sample = Sample(data, o.samples, o.batch_size, o.seed, held, model, shuffled)
        names, layers = list(chosen), list(chosen.values())
        job = Job(model, names, layers, sample, store, rule, o.method, o.tolerance, bar)
        found, came = job.run()
    by_name = {names[i]: f for i, f in found.items()}
    known = {"requested": o.samples, "tolerance": o.tolerance, "seed": o.seed, **(settings or {})}
    parts = _layer_reports(everything, chosen, before, by_name)
    report = Report(method or o.method, o.name or describe(data), came, o.batch_size, parts, known)
    if sample.streams and came == o.samples:
        _warn_of_drift(report)
    return report


def _warn_of_drift(report: Report) -> None:
    worst = max(report.updated, key=lambda y: y.drift, default=None)
    if worst is not None and worst.drift > _DRIFT:
        warnings.warn(
            f"The first {report.samples} examples of the stream are not a random sample: in layer "
            f"{worst.name!r} the mean of their first half is {worst.drift:.1f} times as far off as "
            "it should be. Shuffle the data; if there is more of it, samples=None takes all.",
            stacklevel=4,
        )


def _progress_bar(text: str) -> Any:
    from tqdm import tqdm

    return tqdm(desc=f"{text} statistics", unit=" batches", leave=False)


def _layer_reports(
    everything: Mapping[str, Layer],
    chosen: Mapping[str, Layer],
    before: Snapshot,
    found: Mapping[str, Found],
) -> tuple[LayerStatistics, ...]:
    """Layers in the order in which they were found, then those that kept their statistics."""
    parts = []
    for name in [*found, *(n for n in everything if n not in found)]:
        layer, f = everything[name], found.get(name, Found(None))
        old_mean, old_variance = before.moments(name)
        values = current_statistics(layer)
        mean, variance = kind_of(layer).marginals(values)
        old = _beyond_variance(before.statistics[name])
        part = LayerStatistics(
            name=name,
            status="did not run" if name in chosen else "not selected",
            epsilon=kind_of(layer).epsilon(layer),
            old_mean=old_mean,
            old_variance=old_variance,
            mean=mean,
            variance=variance,
            elements=np.zeros(mean.shape),
            uses=f.calls,
            residual=f.residual,
            leak=f.leak,
            drift=f.drift,
            old=old,
            new=dict(zip(old, values, strict=True)) if old else {},
        )
        if f.moments is not None and not f.moments.empty:
            part = dataclasses.replace(
                part,
                status="updated",
                elements=f.moments.count,
                examples=int(f.moments.examples.max()),
                standard_error_of_mean=f.moments.standard_error_of_mean(),
                standard_error_of_variance=f.moments.standard_error_of_variance(),
                rank_error=f.moments.rank_error if isinstance(f.moments, Quantiles) else 0.0,
            )
        parts.append(part)
    return tuple(parts)


# Adaptation --------------------------------------------------------------------------------------


def _blend(sources: Mapping[int, Values], prior: float) -> Rule:
    """(J3) and (J4), from the statistics of the source, by the id of the layer."""

    def rule(layer: Layer, moments: Moments) -> Values:
        source = sources[id(layer)]
        n = moments.examples
        share = (
            np.ones(n.shape) if prior == 0 else n / (n + prior) if math.isfinite(prior) else 0 * n
        )
        share = np.where(moments.count > 0, share, 0.0)
        if any(v.shape != share.shape for v in source):  # positions count for all channels alike
            share = np.asarray(np.max(share, initial=0.0))
        new = [np.nan_to_num(v) for v in kind_of(layer).population(layer, moments)]
        return tuple(_mean(old, v, share) for old, v in zip(source, new, strict=True))

    return rule


def _mean(old: Floats, new: Floats, share: Floats) -> Floats:
    """The old moved by `share` towards the new; at 0 or 1 just one, even if the other is NaN."""
    with np.errstate(invalid="ignore"):
        blend = old + share * (new - old)
    return np.where(share == 1, new, np.where(share == 0, old, blend))


def _check_prior(prior: float) -> None:
    if not (is_real(prior) and prior >= 0):
        raise ValueError(
            "`prior` is how many pseudo-examples the source is worth, a number >= 0. Received: "
            f"prior={prior!r}. 0 forgets the source; 16 to 256 suit small samples."
        )


def adapt(
    model: Any,
    target: Any,
    *,
    prior: float = 0.0,
    samples: int | None = 10_000,
    method: str = "layerwise",
    batch_size: int = 256,
    tolerance: float | None = None,
    layers: Selection = None,
    memory: float = 2 * _GIB,
    disk: float = 16 * _GIB,
    folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Adapts a model to another domain by its batch normalization statistics (AdaBN).

    Weights, gamma and beta stay; the moving statistics, which are those of the source domain, are
    blended with those of n target examples. No labels are needed. With N = `prior`
    pseudo-examples:

        (J3)  mean     = N / (N + n) mean_source     + n / (N + n) mean_target
        (J4)  variance = N / (N + n) variance_source + n / (N + n) variance_target

    Covariances are blended as variances are, and quantiles one by one, which blends the two
    distributions half-way in transport cost. All are applied layer by layer: a layer's target
    statistics are those of the inputs that it receives from layers already adapted.

    Args:
        model: as in `reestimate`, with the statistics of the source domain.
        target: data of the target domain, as `data` in `reestimate`. If it has labels (x, y), a
            sample with few of the classes gives a warning.
        prior: N, the number of examples that the source statistics are worth, >= 0. 0 replaces
            them (Li et al.); with few target examples and a small shift, use more. Default: 0.
        samples, method, batch_size, tolerance, layers, memory, disk, folder, name, seed, progress:
            as in `reestimate`.

    Returns:
        A `Report`. To go back to the source, `restore` a `snapshot` taken before;
        `DomainStatistics` keeps several domains at hand.

    Warns:
        UserWarning: if the sample is too small (the standard error that it leaves in a layer's
            outputs is above 0.2 sigma), holds few of the classes, or is the sorted beginning of
            a stream.

    Raises:
        ValueError, OSError: as `reestimate`, and for a negative prior. The model is unchanged.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,))
        >>> target = np.random.default_rng(0).normal(5, 1, (100, 3)).astype("float32")
        >>> report = adapt(model, target, prior=300)
        >>> alone = reestimate(model, target)["dense1_norm"]
        >>> np.allclose(report["dense1_norm"].variance, 0.75 * 1 + 0.25 * alone.variance)
        True

    Reference:
        Li, Wang, Shi, Liu and Hou, 2016, Revisiting Batch Normalization for Practical Domain
        Adaptation. Schneider et al., 2020, Improving robustness against common corruptions by
        covariate shift adaptation, section 3 (the prior).
    """
    _check_prior(prior)
    sources = {id(y): current_statistics(y) for y in _normalizations(model).values()}
    options = _Options(
        samples=samples,
        method=method,
        batch_size=batch_size,
        tolerance=tolerance,
        layers=layers,
        memory=memory,
        disk=disk,
        folder=folder,
        name=name,
        seed=seed,
        progress=progress,
    )
    report = _replace_statistics(
        model, target, options, _blend(sources, prior), "adapt", {"prior": prior, "method": method}
    )
    _warn_of_sample(report, prior)
    _warn_of_classes(model, target)
    return report


def _warn_of_sample(report: Report, prior: float) -> None:
    n = report.samples
    error = report.error * (1.0 if prior == 0 else n / (n + prior) if prior < math.inf else 0.0)
    if n and error > _TINY:
        warnings.warn(
            f"{n} target examples are few: they leave a standard error of {error:.2g} sigma in "
            "the outputs of a layer. Take more of them; if the shift is small, giving the source "
            f"more weight helps, too: prior={max(16, 2 * n)}, for example.",
            stacklevel=3,
        )


def _warn_of_classes(model: Any, target: Any) -> None:
    """Warns if there are labels and they hold only a small part of the model's classes."""
    shape = getattr(model, "output_shape", None) if hasattr(model, "outputs") else None
    labelled = isinstance(target, tuple) and len(target) > 1 and is_array(target[1])
    if not labelled or not isinstance(shape, tuple) or len(shape) != 2 or not shape[-1]:
        return
    y, classes = np.asarray(as_numpy(target[1])), int(shape[-1])
    y = np.argmax(y, axis=-1) if y.ndim == 2 and y.shape[1] == classes > 1 else y.reshape(-1)
    if classes < 2 or y.dtype.kind not in "iu" or not len(y):
        return
    share = np.unique(y, return_counts=True)[1] / len(y)
    effective = float(np.exp(-np.sum(share * np.log(share))))
    if effective < min(classes, len(y)) / 2:
        number = f"{effective:.1f}".removesuffix(".0")
        warnings.warn(
            f"The target sample is skewed: by their shares, {number} of the model's {classes} "
            "classes. Its statistics take the missing classes for a shift of the domain. Draw it "
            "from all classes. A `prior` gives the source more weight, which helps only where the "
            "statistics of the source are nearer to the target's than those of the sample.",
            stacklevel=3,
        )


class RunningAdaptation:
    """Adapts a model to a stream, batch after batch, and gradually forgets old batches.

    Every layer's statistics are (J3) and (J4) with the moments of all updates so far, where each
    example's weight is halved for every `half_life` examples of later updates. The source is not
    forgotten unless `prior` is 0: its weight is always that of `prior` examples.

    Args:
        model: as in `reestimate`, with the statistics of the source domain.
        prior: N in (J3), >= 0; 0 forgets the source. Default: 64.
        half_life: number of examples, > 0; infinite to forget nothing. Default: 1024.
        layers: as in `reestimate`. Default: all.

    State:
        weight: how many examples the stream is worth at present.

    As a context manager it puts the source statistics back when the block ends.

    Raises:
        ValueError: for a prior or a half-life out of range; and for a selected
            `QuantileNormalization` with a finite half-life, because a distribution cannot forget
            part of what it was made of. Leave the layer out with `layers`, or forget nothing.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,))
        >>> rng = np.random.default_rng(0)
        >>> with RunningAdaptation(model, prior=10, half_life=100) as stream:
        ...     for shift in (0.0, 1.0, 2.0):
        ...         report = stream.update(rng.normal(shift, 1, (50, 3)).astype("float32"))
        >>> round(stream.weight, 1)
        110.4

    Reference:
        The prior as in Schneider et al., 2020. Exponential forgetting of batch statistics at
        test time: Nado et al., 2020, Evaluating prediction-time batch normalization.
    """

    def __init__(
        self,
        model: Any,
        *,
        prior: float = 64.0,
        half_life: float = 1024.0,
        layers: Selection = None,
    ) -> None:
        _check_prior(prior)
        if not (is_real(half_life) and half_life > 0):
            raise ValueError(
                "`half_life` counts examples and must be a number > 0. Received: "
                f"half_life={half_life!r}. math.inf forgets nothing."
            )
        self.model, self.prior, self.half_life, self.layers = model, prior, half_life, layers
        self._source = snapshot(model)
        self._layers = _normalizations(model)
        if math.isfinite(half_life):
            _require_scalable(_selected(self._layers, layers), half_life)
        self._past: dict[int, Moments] = {}
        self.weight = 0.0

    def update(self, x: Any, *, batch_size: int = 256) -> Report:
        """Takes in the next examples and updates the statistics.

        Args:
            x: as `data` in `reestimate`; all of it is used.
            batch_size: as in `reestimate`. Default: 256.

        Returns:
            The `Report` of this update.

        Raises:
            ValueError: as `reestimate`. The model and this object are then unchanged.
        """
        sources = {id(y): self._source.values(name) for name, y in self._layers.items()}
        blend = _blend(sources, self.prior)
        merged: dict[int, Moments] = {}

        def rule(layer: Layer, moments: Moments) -> Values:
            past = self._past.get(id(layer))
            if past is not None:
                kept = 0.5 ** (float(moments.examples.max(initial=0)) / self.half_life)
                moments = past.scaled(kept) + moments if kept else moments
            merged[id(layer)] = moments
            return blend(layer, moments)

        options = _Options(samples=None, batch_size=batch_size, layers=self.layers)
        settings = {"prior": self.prior, "half_life": self.half_life}
        report = _replace_statistics(self.model, x, options, rule, "running adaptation", settings)
        self._past.update(merged)
        self.weight = self.weight * 0.5 ** (report.samples / self.half_life) + report.samples
        return report

    def reset(self) -> None:
        """Puts the source statistics back and forgets the stream."""
        restore(self.model, self._source)
        self._past, self.weight = {}, 0.0

    def __enter__(self) -> RunningAdaptation:
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.model, self._source)


def _require_scalable(layers: Mapping[str, Layer], half_life: float) -> None:
    ranked = [n for n, y in layers.items() if isinstance(kind_of(y).empty(y), Quantiles)]
    if ranked:
        raise ValueError(
            "The quantiles of a stream cannot forget what is long past: ranks have no weights. "
            f"Received: half_life={half_life!r} for {ranked}. Leave them out by `layers`, or pass "
            "half_life=math.inf."
        )


class DomainStatistics:
    """The statistics of several domains for one model with one set of weights.

    The statistics that the model starts with are those of the domain "source".

    Args:
        model: as in `reestimate`.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,))
        >>> domains = DomainStatistics(model)
        >>> rng = np.random.default_rng(0)
        >>> report = domains.adapt("noise", rng.normal(3, 2, (100, 3)).astype("float32"))
        >>> with domains.domain("noise"):
        ...     noisy = diff(domains["source"], model).largest_shift
        >>> noisy > 0.5, diff(domains["source"], model).largest_shift
        (True, 0.0)
        >>> list(domains)
        ['source', 'noise']
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._domains: dict[str, Snapshot] = {"source": snapshot(model)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def __getitem__(self, name: str) -> Snapshot:
        if name not in self._domains:
            raise ValueError(
                f"A domain's name must be one of {list(self._domains)}. Received: name={name!r}. "
                "Add it by `adapt` or `store` first."
            )
        return self._domains[name]

    def store(self, name: str) -> None:
        """Keeps the model's present statistics as those of a domain."""
        self._domains[name] = snapshot(self.model)

    def adapt(self, name: str, target: Any, **options: Any) -> Report:
        """Adapts from "source" to a domain and keeps its statistics; the model is left unchanged.

        Args:
            name: name of the domain; a domain with that name is replaced.
            target, options: arguments of `keras_norm.statistics.adapt`.

        Returns:
            The `Report` of `adapt`.

        Raises:
            ValueError, OSError: as `adapt`. The model and the domains are unchanged.
        """
        with self.domain("source"):
            report = adapt(self.model, target, **{"name": name, **options})
            self.store(name)
        return report

    @contextlib.contextmanager
    def domain(self, name: str) -> Iterator[Any]:
        """Gives the model a domain's statistics for the length of a `with` block.

        After the block, even after an error, the model has its earlier statistics, bit for bit.

        Args:
            name: name of the domain.

        Returns:
            A context manager that yields the model.

        Raises:
            ValueError: for an unknown name.
        """
        wanted, before = self[name], snapshot(self.model)
        try:
            restore(self.model, wanted)
            yield self.model
        finally:
            restore(self.model, before)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes all domains as one .npz file, whole or not at all, and returns the path."""
        arrays: Any = {
            json.dumps([domain, layer, variable]): value.astype(_plain_dtype(value))
            for domain, found in self._domains.items()
            for layer, variables in found.statistics.items()
            for variable, value in variables.items()
        }
        if Path(path).suffix != ".npz":
            raise ValueError(f"Domains are written to a .npz file. Received: path={str(path)!r}.")
        with replace_file(path) as temporary:
            np.savez(temporary, **arrays)
        return Path(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces all domains by those of a file that `save` wrote.

        Raises:
            ValueError: for a file that `save` did not write, and for the domains of another model.
                The present domains are kept.
        """
        content = io.BytesIO(Path(path).read_bytes())  # NumPy leaves a damaged file open
        wrote = "Saved domains are read from a file that DomainStatistics.save wrote."
        try:
            with np.load(content) as file:
                arrays = dict(file)
        except (EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{wrote} Received: {os.fspath(path)!r} ({type(error).__name__}: {error}). Pass "
                "another file."
            ) from error
        read: dict[str, dict[str, dict[str, npt.NDArray[Any]]]] = {}
        for key, value in arrays.items():
            try:
                domain, layer, variable = json.loads(key)
                read.setdefault(domain, {}).setdefault(layer, {})[variable] = value
            except (TypeError, ValueError):
                raise ValueError(
                    f"{wrote} Received: {os.fspath(path)!r}, with an array {key!r}. Pass another "
                    "file."
                ) from None
        epsilons = self["source"].epsilons
        domains = {name: Snapshot(found, epsilons) for name, found in read.items()}
        if "source" not in domains:
            raise ValueError(
                "Saved domains must include 'source'. Received: a file with "
                f"{sorted(domains)}. It was not written by DomainStatistics.save."
            )
        layers = _normalizations(self.model)
        for found in domains.values():
            _matching(layers, found)
        self._domains = domains


def _plain_dtype(value: npt.NDArray[Any]) -> Any:
    return value.dtype if value.dtype.kind in "biuf" else np.float32


# Diagnosis ---------------------------------------------------------------------------------------


def diagnose(
    model: Any,
    data: Any,
    *,
    samples: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    name: str | None = None,
) -> Diagnosis:
    """Explains why the loss differs between training and inference mode, layer by layer.

    With the same examples, in the same batches, and with the same random seeds, the model is taken
    from inference mode to training mode one layer at a time: first the exact statistics of the
    examples replace the moving ones, then those of the batch do, then dropout and similar layers
    are switched on. What each step takes off the loss is attributed to a cause:

    - no training mode: the `call` of a subclassed model has no argument `training` (or, on JAX,
      does not pass it on), without which `fit` leaves its layers in inference mode;
    - non-finite values: in the data, in a variable, or made by a layer;
    - cold statistics: the moving ones are still a mixture of the initial 0 and 1 and the data's;
    - masks: a layer gets no mask although there was one below it, so that padding counts;
    - domain shift: the moving statistics are of other data, or of weights from long ago;
    - frozen layers: statistics that are off but used in both modes, so that both losses suffer;
    - shared layers: a normalization is called more than once; each call has its own statistics in
      training, but in inference they are pooled;
    - small batches: in training, the statistics of a batch are noisy;
    - dropout: noise layers that are active in training only;
    - other layers: anything else that depends on the mode.

    The model is not changed.

    Args:
        model: as in `reestimate`, compiled with a loss.
        data: (x, y) or (x, y, weights) as arrays, or batches of these: a PyDataset, a
            `tf.data.Dataset`, a generator.
        samples: the largest number of examples: a random part of arrays, the first of streams.
            Default: 1024.
        batch_size: for arrays; take that of training. Streams have their own. Default: 32.
        seed: int >= 0, for the random part. Default: 0.
        name: name of the data, for the table. Default: a description of the data.

    Returns:
        A `Diagnosis`, which prints as a table: `causes` in the order of their importance, each
        with its layers, its change of the loss and standard error, evidence and `remedy`;
        `first`, the name of the most important; `plot()`.

    Raises:
        ValueError: for a model without a loss or without built batch normalization layers, data
            without labels or examples, or numbers out of range. The model is unchanged.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x = np.random.default_rng(0).normal(5, 20, (256, 3)).astype("float32")
        >>> diagnose(model, (x, (x[:, 0] > 5).astype(int))).first
        'cold statistics'

    Numerics:
        The model runs eagerly over the examples, once for each step: 2 + 2 K + J times for K
        normalization and J random layers.
    """
    from keras_norm import _diagnosis

    return _diagnosis.diagnose(model, data, samples, batch_size, seed, name)

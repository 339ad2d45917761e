"""What is done to the moving statistics of a whole model after training.

Batch normalization normalizes by the batch in training and by moving statistics in inference.
Those are a decaying average over batches, of activations of weights that no longer exist.
`reestimate` replaces them by the mean and the biased variance of data under the final weights
(precise batch normalization):

    (S1)  mean_l     = sum over the data of the inputs of layer l / count_l
    (S2)  variance_l = sum over the data of (input - mean_l)^2 / count_l

where the inputs of layer l are those that it receives in inference, with the new statistics in
all layers. A layer's inputs depend on the statistics of the layers below, so that (S1) and (S2)
are solved from below: exactly, layer by layer (`method="layerwise"`), or approximately in one
sweep in which every layer normalizes by the batch (`method="one_pass"`).

Reference: Wu and Johnson, 2021, Rethinking "Batch" in BatchNorm, section 3; Ioffe and Szegedy,
2015, algorithm 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops, tree

from keras_norm import functional
from keras_norm.layers import BatchNormalization
from keras_norm.moments import Moments, example_sums

__all__ = [
    "LayerStatistics",
    "Report",
    "Snapshot",
    "diff",
    "reestimate",
    "restore",
    "snapshot",
]

Array = Any
Layer = Any
Floats = npt.NDArray[np.float64]
Environment = dict[int, tuple[Array, Array | None]]  # value number -> (value, its mask)
Rule = Callable[[Layer, Moments], tuple[Floats, Floats]]
_Statistics = Mapping[int, tuple[Floats, Floats]]

_GIB = 2**30
_FIXED_POINT = 1e-6  # in units of sigma: a few times the rounding of a float32 forward pass
_MAX_ROUNDS = 100
_PILOT = 512  # examples in the first of the samples for a tolerance
_TRIED = 2  # batches on which the error of one pass is measured


# Layers and transactions ---------------------------------------------------------------------


def _normalizations(model: Any) -> dict[str, Layer]:
    """All built batch normalization layers of a model, nested ones too, by a unique name."""
    kinds = (BatchNormalization, keras.layers.BatchNormalization)
    layers: dict[str, Layer] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, kinds) and getattr(layer, "moving_mean", None) is not None:
            name, number = layer.path or layer.name, 2
            while name in layers:
                name, number = f"{layer.path or layer.name}#{number}", number + 1
            layers[name] = layer
    if not layers:
        raise ValueError(
            "The model must have built batch normalization layers, of keras_norm.layers or "
            f"keras.layers. Received: model={getattr(model, 'name', model)!r} without any. Build "
            "a subclassed model first, by calling it on a batch."
        )
    return layers


def _statistics_of(layer: Layer) -> list[Any]:
    """The variables of a layer that are statistics: all but gamma and beta."""
    return [v for v in layer.variables if v is not layer.gamma and v is not layer.beta]


def _copy(variable: Any) -> npt.NDArray[Any]:
    return np.array(ops.convert_to_numpy(variable), copy=True)


def _assign_all(values: Iterable[tuple[Any, npt.NDArray[Any]]]) -> None:
    """Assigns all, to the end, even if a Ctrl-C comes in between; then lets it through."""
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
    """Undoes all changes of state on failure; else all but those to the layers in `keep`.

    State is what an inference pass could change: non-trainable variables, random seeds.
    """
    before = [(v, _copy(v)) for v in model.non_trainable_variables]
    statistics = {id(v) for layer in keep for v in _statistics_of(layer)}
    known = {id(v) for v, _ in before}
    before += [(v, _copy(v)) for y in keep for v in _statistics_of(y) if id(v) not in known]
    try:
        yield
    except BaseException:
        _assign_all(before)
        raise
    _assign_all([(v, value) for v, value in before if id(v) not in statistics])


@dataclass(frozen=True)
class Snapshot:
    """The statistics of every batch normalization layer at one moment.

    Args:
        statistics: layer -> variable -> value.
        epsilons: layer -> epsilon.
    """

    statistics: Mapping[str, Mapping[str, npt.NDArray[Any]]]
    epsilons: Mapping[str, float]

    def moments(self, name: str) -> tuple[Floats, Floats]:
        """The moving mean and variance of a layer, in float64."""
        values = self.statistics[name]
        mean, variance = values["moving_mean"], values["moving_variance"]
        return mean.astype(np.float64), variance.astype(np.float64)


def snapshot(model: Any) -> Snapshot:
    """Copies the statistics of every batch normalization layer of a model.

    Args:
        model: a built `keras.Model` (or layer) with batch normalization layers of
            `keras_norm.layers` or `keras.layers`.

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
        {name: {v.name: _copy(v) for v in _statistics_of(y)} for name, y in layers.items()},
        {name: float(y.epsilon) for name, y in layers.items()},
    )


def restore(model: Any, snapshot: Snapshot) -> None:
    """Puts the statistics of a snapshot back, bit by bit; all, or none on failure.

    Args:
        model: the model of the snapshot, or one of the same architecture and names.
        snapshot: what `snapshot` returned.

    Raises:
        ValueError: for a snapshot of other layers, variables or shapes. The model is as before.
    """
    layers = _normalizations(model)
    values: list[tuple[Any, npt.NDArray[Any]]] = []
    if set(layers) != set(snapshot.statistics):
        raise ValueError(
            "A snapshot can be restored only to a model with the same batch normalization layers. "
            f"Received: a snapshot of {sorted(snapshot.statistics)} for a model with "
            f"{sorted(layers)}."
        )
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
    with _transaction(model, list(layers.values())):
        _assign_all(values)


def _set_statistics(layer: Layer, mean: Floats, variance: Floats) -> None:
    layer.moving_mean.assign(mean.reshape(tuple(layer.moving_mean.shape)))
    layer.moving_variance.assign(variance.reshape(tuple(layer.moving_variance.shape)))
    if getattr(layer, "moving_stddev", None) is not None:  # Keras's batch renormalization
        layer.moving_stddev.assign(np.sqrt(variance + layer.epsilon))


# The report ----------------------------------------------------------------------------------


def _movement(
    mean: Floats, variance: Floats, old_mean: Floats, old_variance: Floats, epsilon: float
) -> Floats:
    """How far outputs move between two sets of statistics, per channel, in units of sigma."""
    sigma = np.sqrt(np.maximum(variance + epsilon, 1e-30))
    old_sigma = np.sqrt(np.maximum(old_variance + epsilon, 0.0))
    return np.sqrt(((mean - old_mean) / sigma) ** 2 + ((sigma - old_sigma) / sigma) ** 2)


def _rms(x: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's part of a `Report`.

    Args:
        name: path of the layer in its model.
        status: "updated"; or "did not run" or "not selected": it kept its statistics.
        epsilon: of the layer.
        old_mean, old_variance: (C,), the moving statistics before.
        mean, variance: (C,), those after.
        elements: (C,), the number of elements (total weight) in the new statistics.
        examples: the number of examples in them.
        uses: how often the layer is called in one pass.
        standard_error_of_mean, standard_error_of_variance: (C,), of the data's mean and
            variance, from the spread between examples; infinite for one example.
        residual: largest difference, in units of sigma, between the statistics and those of the
            inputs that they produce, where they had to be found by iteration; else 0.
        leak: for `one_pass`, the measured error in units of sigma, root mean square over the
            channels; else 0.
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

        What remains to be gained by more data: to first order, an error of the mean moves an
        output by SE(mean) / sigma, one of the variance by x_hat SE(variance) / (2 sigma^2).
        """
        if self.status != "updated":
            return 0.0
        variance = self._sigma**2
        of_mean = self.standard_error_of_mean**2 / variance
        of_variance = (self.standard_error_of_variance / (2 * variance)) ** 2
        return float(np.sqrt(np.mean(of_mean + of_variance * self.variance / variance)))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; infinite standard errors are None."""
        found: dict[str, Any] = {}
        for key, value in dataclasses.asdict(self).items():
            if isinstance(value, np.ndarray):
                value = [x if math.isfinite(x) else None for x in value.ravel().tolist()]
            found[key] = value
        return {**found, "shape": list(self.mean.shape)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LayerStatistics:
        """What `to_dict` gave."""
        values = {k: v for k, v in state.items() if k != "shape"}
        for key, value in values.items():
            if isinstance(value, list):
                array = np.array([math.inf if x is None else x for x in value], np.float64)
                values[key] = array.reshape(state["shape"]) if array.size else array
        return cls(**values)


@dataclass(frozen=True)
class Report:
    """What became of the statistics of a model; prints as a table.

    Args:
        method: "layerwise", "one_pass", "adapt" or "diff".
        data: name of the data.
        samples: the number of examples that came, not the number that was asked for.
        batch_size: examples per pass.
        layers: one `LayerStatistics` for each batch normalization layer, in order of their calls.
        settings: whatever else the operation was told.
    """

    method: str
    data: str
    samples: int
    batch_size: int
    layers: tuple[LayerStatistics, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerStatistics:
        for layer in self.layers:
            if name in (layer.name, layer.name.rpartition("/")[2]):
                return layer
        raise KeyError(name)

    @property
    def updated(self) -> tuple[LayerStatistics, ...]:
        """The layers with new statistics."""
        return tuple(y for y in self.layers if y.status == "updated")

    @property
    def largest_shift(self) -> float:
        """The largest root mean square shift of a layer, in units of sigma."""
        return max((_rms(y.shift) for y in self.updated), default=0.0)

    @property
    def error(self) -> float:
        """The largest standard error of a layer's outputs, in units of sigma."""
        return max((y.error for y in self.updated), default=0.0)

    def __str__(self) -> str:
        head = f"{self.method}: {self.samples} examples of {self.data}"
        columns = ["layer", "channels", "uses", "elements", "shift/σ", "σ/old σ", "error/σ"]
        extra = [k for k in ("leak", "residual") if any(getattr(y, k) for y in self.layers)]
        rows = [columns + [f"{k}/σ" for k in extra]]
        for y in self.layers:
            row = [y.name, str(y.mean.size), str(y.uses)]
            if y.status != "updated":
                rows.append([*row, y.status] + [""] * (3 + len(extra)))
                continue
            scale = float(np.exp(np.mean(np.log(y.scale)))) if y.scale.size else 1.0
            row += [f"{float(np.max(y.elements, initial=0)):.0f}", f"{_rms(y.shift):.3g}"]
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
        """All of it as JSON values."""
        return {
            "format": "keras_norm.statistics.report/1",
            "method": self.method,
            "data": self.data,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "settings": dict(self.settings),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Report:
        """What `to_dict` gave.

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
        """Writes the report as JSON, whole or not at all, and returns the path."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), allow_nan=False, indent=1))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))


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
            )
        )
    return Report("diff", "two snapshots", 0, 0, tuple(layers))


# The sample ----------------------------------------------------------------------------------


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def _numpy(x: Any) -> Any:
    """As a NumPy array; what reads from a file as it is indexed (h5py, memory maps) stays."""
    if isinstance(x, np.ndarray) or not (ops.is_tensor(x) or isinstance(x, (list, tuple))):
        return x if _is_array(x) else np.asarray(x)
    return np.asarray(ops.convert_to_numpy(x)) if ops.is_tensor(x) else np.asarray(x)


def _describe(data: Any) -> str:
    leaves = [x for x in tree.flatten(data) if _is_array(x)] if _is_structure(data) else []
    if leaves:
        return f"array {tuple(leaves[0].shape)}"
    return str(getattr(data, "name", None) or type(data).__name__)


def _is_structure(data: Any) -> bool:
    """Whether these are arrays, or nested lists, tuples and dicts of them: no stream."""
    if isinstance(data, (tuple, list, dict)):
        return all(x is None or _is_array(x) or np.isscalar(x) for x in tree.flatten(data))
    return _is_array(data)


def _batches(data: Any, seed: int) -> Iterator[Any]:
    """The inputs of a stream, batch by batch; labels and sample weights left out."""
    if isinstance(data, keras.utils.PyDataset):
        number = data.num_batches
        order: Iterable[int] = itertools.count()
        if number is not None:  # any batches will do, but not only those of the first class
            order = np.random.default_rng(seed).permutation(int(number)).tolist()
        data = (data[i] for i in order)
    elif not hasattr(data, "__iter__"):
        raise ValueError(
            "`data` must be arrays (x or (x, y)), a keras.utils.PyDataset, a tf.data.Dataset, a "
            f"data loader or a generator of batches. Received: data of type {type(data).__name__}."
        )
    for batch in data:
        yield tree.map_structure(_numpy, keras.utils.unpack_x_y_sample_weight(batch)[0])


class _Sample:
    """The examples that were drawn, in blocks, as often as they are needed."""

    def __init__(
        self, data: Any, samples: int | None, batch_size: int, seed: int, store: _Store | None
    ):
        self.batch_size, self.limit, self._store = batch_size, samples, store
        self._blocks: list[tuple[int, Callable[[], Any]]] = []  # rows, and how to get them
        self.rows = 0
        if _is_structure(data):
            self._stream: Iterator[Any] = iter(())
            self._cut_arrays(data, seed)
        else:
            self._stream = self._cut_stream(_batches(data, seed))

    def _cut_arrays(self, data: Any, seed: int) -> None:
        x = keras.utils.unpack_x_y_sample_weight(data)[0] if isinstance(data, tuple) else data
        x = tree.map_structure(_numpy, x)
        lengths = {len(v) for v in tree.flatten(x)}
        if len(lengths) != 1:
            raise ValueError(
                "All inputs must have the same number of examples. Received: arrays of lengths "
                f"{sorted(lengths)}. Labels go into a tuple, (x, y); a list is several inputs."
            )
        total = lengths.pop()
        rows = total if self.limit is None else min(total, self.limit)
        order = None
        if rows < total:  # a random part: the first rows may all be of one class
            order = np.random.default_rng(seed).permutation(total)[:rows]
        pieces = max(1, math.ceil(rows / self.batch_size))
        size = math.ceil(rows / pieces)
        for start in range(0, rows, max(1, size)):
            stop = min(start + size, rows)
            part: Any = slice(start, stop) if order is None else np.sort(order[start:stop])
            self._blocks.append((stop - start, functools.partial(_rows_of, x, part)))
        self.rows = rows

    def _cut_stream(self, batches: Iterator[Any]) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Blocks of exactly `batch_size` rows, whatever sizes come in; the last may be shorter."""
        waiting: list[Any] = []
        rows = 0
        for batch in batches:
            lengths = {len(v) for v in tree.flatten(batch)}
            if len(lengths) != 1:
                raise ValueError(
                    "All inputs in a batch must have the same number of examples. Received: "
                    f"lengths {sorted(lengths)}. The data set must be batched."
                )
            waiting.append(batch)
            rows += lengths.pop()
            while rows >= self.batch_size:
                whole = tree.map_structure(lambda *v: np.concatenate(v), *waiting)
                yield self._keep(whole, slice(0, self.batch_size))
                rows -= self.batch_size
                waiting = [_rows_of(whole, slice(self.batch_size, None))] if rows else []
        if rows:
            whole = tree.map_structure(lambda *v: np.concatenate(v), *waiting)
            yield self._keep(whole, slice(0, rows))

    def _keep(self, whole: Any, part: slice) -> tuple[int, Callable[[], Any]]:
        block = tree.map_structure(np.ascontiguousarray, _rows_of(whole, part))
        flat = tree.flatten(block)
        if self._store is None:
            return len(flat[0]), lambda: block
        kept = self._store.put({i: (v, None) for i, v in enumerate(flat)})
        if kept is None:
            raise ValueError(
                "The examples of a stream are held while their statistics are taken, and must fit "
                f"into the budget. Received: {self.rows} examples so far, memory="
                f"{self._store.memory}, disk={self._store.disk}. Raise one, or lower `samples`."
            )

        def get() -> Any:
            values = kept.get()
            return tree.pack_sequence_as(block_structure, [values[i][0] for i in values])

        block_structure = tree.map_structure(lambda _: 0, block)
        return len(flat[0]), get

    def take(self, rows: int | None) -> list[_Chunk]:
        """The first `rows` examples, or as many as there are, as chunks of equal size."""
        wanted = math.inf if rows is None else rows
        if self.limit is not None:
            wanted = min(wanted, self.limit)
        while self.rows < wanted and (block := next(self._stream, None)) is not None:
            self._blocks.append(block)
            self.rows += block[0]
        chunks: list[_Chunk] = []
        size = max((n for n, _ in self._blocks), default=0)
        taken = 0
        for n, get in self._blocks:
            if taken >= wanted:
                break
            use = int(min(n, wanted - taken))
            chunks.append(_Chunk(use, size, get))
            taken += use
        if not taken:
            raise _nothing_came()
        return [_Chunk(taken, taken, chunks[0].raw)] if len(chunks) == 1 else chunks

    def once(self) -> Iterator[_Chunk]:
        """All examples as chunks, for one pass: what has been passed is forgotten."""
        left = math.inf if self.limit is None else self.limit
        for n, get in itertools.chain(self._blocks, self._stream):
            use = int(min(n, left))
            if use:
                yield _Chunk(use, use, get)
            left -= use
            if not left:
                break


def _nothing_came() -> ValueError:
    return ValueError(
        "Statistics need at least one example. Received: data without any. (A generator that was "
        "used before is at its end.)"
    )


def _rows_of(x: Any, part: Any) -> Any:
    return tree.map_structure(lambda v: v[part], x)


@dataclass
class _Chunk:
    """Some examples on their way through the model."""

    rows: int  # that count
    size: int  # of the arrays: what is more is filled up with copies
    raw: Callable[[], Any]
    level: int = -1  # stages that `kept` has behind it
    kept: _Kept | None = None

    def inputs(self, pad: bool) -> Any:
        x = _rows_of(self.raw(), slice(0, self.rows))
        if pad and self.rows < self.size:
            more = self.size - self.rows
            x = tree.map_structure(lambda v: np.concatenate([v, np.repeat(v[-1:], more, 0)]), x)
        return x


# Where activations wait ------------------------------------------------------------------------


def _bytes(env: Environment) -> int:
    total = 0
    for x in itertools.chain.from_iterable(env.values()):
        if x is not None:
            dtype = keras.backend.standardize_dtype(x.dtype) if hasattr(x, "dtype") else "float32"
            item = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
            total += math.prod(int(n) for n in x.shape) * item
    return total


@dataclass
class _Kept:
    """One environment in memory or, if it has a path, on disk."""

    store: _Store
    size: int
    env: Environment
    path: Path | None = None
    dtypes: tuple[str, ...] = ()

    def get(self) -> Environment:
        if self.path is None:
            return self.env
        env: Environment = {}
        with self.path.open("rb") as file:
            for (key, (value, mask)), dtype in zip(self.env.items(), self.dtypes, strict=True):
                x = np.load(file)
                x = ops.cast(x, dtype) if dtype == "bfloat16" else x
                env[key] = (x, np.load(file) if mask is not None else None)
                del value
        return env

    def free(self) -> None:
        self.store.give_back(self)


class _Store:
    """Memory, then disk, within their budgets; files go when it is closed."""

    def __init__(self, memory: float, disk: float, folder: str | os.PathLike[str] | None) -> None:
        for name, value in (("memory", memory), ("disk", disk)):
            if not value >= 0:
                raise ValueError(
                    f"`{name}` is a budget in bytes and must be >= 0. Received: {name}={value!r}."
                )
        self.memory, self.disk = memory, disk
        self._folder_in = folder
        self._folder: Path | None = None
        self._used = {"memory": 0, "disk": 0}
        self._number = itertools.count()

    def put(self, env: Environment, old: _Kept | None = None) -> _Kept | None:
        """Keeps an environment in the place of an old one; None if there is no room for it."""
        size = _bytes(env)
        freed = {"memory": 0, "disk": 0}
        if old is not None:
            freed["memory" if old.path is None else "disk"] = old.size
        if self._used["memory"] - freed["memory"] + size <= self.memory:
            kept = _Kept(self, size, env)
            self._used["memory"] += size
        elif self._used["disk"] - freed["disk"] + size <= self.disk:
            kept = self._write(env, size)
            self._used["disk"] += size
        else:
            return None
        if old is not None:
            old.free()
        return kept

    def _write(self, env: Environment, size: int) -> _Kept:
        path = None
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="keras_norm_", dir=self._folder_in))
            path = self._folder / f"{next(self._number)}.npy"
            dtypes = []
            with path.open("wb") as file:
                for value, mask in env.values():
                    dtype = keras.backend.standardize_dtype(value.dtype)
                    dtypes.append(dtype)
                    value = ops.cast(value, "float32") if dtype == "bfloat16" else value
                    np.save(file, np.asarray(ops.convert_to_numpy(value)))
                    if mask is not None:
                        np.save(file, np.asarray(ops.convert_to_numpy(mask)))
        except OSError as error:
            if path is not None:
                path.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"Activations could not be written to {self._folder or self._folder_in!s} "
                f"({error.strerror}). Give another `folder`, more `memory`, or disk=0, which "
                "computes them again instead",
            ) from error
        light: Environment = {k: (0, None if m is None else 0) for k, (_, m) in env.items()}
        return _Kept(self, size, light, path, tuple(dtypes))

    def give_back(self, kept: _Kept) -> None:
        self._used["memory" if kept.path is None else "disk"] -= kept.size
        kept.env = {}
        if kept.path is not None:
            kept.path.unlink(missing_ok=True)

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


# The model as a list of steps --------------------------------------------------------------------


@dataclass(frozen=True)
class _Ref:
    """Stands for value number `number` among the arguments of a step."""

    number: int


@dataclass
class _Step:
    """One call in the model."""

    operation: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    outputs: list[int]
    inside: tuple[int, ...] = ()  # the selected normalization layers that it calls, by number
    direct: bool = False  # it is itself the one normalization layer
    level: int = 0

    @functools.cached_property
    def inputs(self) -> list[int]:
        """The numbers of the values that it is called on."""
        leaves = tree.flatten((self.args, self.kwargs))
        return [leaf.number for leaf in leaves if isinstance(leaf, _Ref)]


def _graph_of(operation: Any) -> Any:
    """The functional graph that a call of this operation runs, or None if it is code."""
    if "call" in vars(operation):
        return None
    if isinstance(operation, keras.Sequential):
        known = type(operation).call is keras.Sequential.call
        graph = getattr(operation, "_functional", None) if known else None
    elif isinstance(operation, keras.Model) and isinstance(operation, keras.Function):
        known = type(operation).call.__module__.startswith("keras.src.models.")
        graph = operation if known else None
    else:
        graph = None
    usable = hasattr(graph, "_nodes_by_depth") and hasattr(graph, "_standardize_inputs")
    return graph if usable else None


class _Builder:
    """Writes a model, with its nested models, as steps in topological order."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self._numbers = numbers  # id of a selected layer -> its number
        self._count = itertools.count()
        self.steps: list[_Step] = []

    def fresh(self) -> int:
        return next(self._count)

    def call(self, operation: Any, args: Any, kwargs: dict[str, Any], number: int) -> list[int]:
        """Adds one call with `number` outputs; returns their value numbers."""
        graph = _graph_of(operation) if len(args) == 1 and not kwargs else None
        if graph is not None:
            return self._inline(graph, args[0])
        inside: tuple[int, ...] = ()
        direct = id(operation) in self._numbers
        if direct:
            inside = (self._numbers[id(operation)],)
        elif isinstance(operation, keras.Layer):
            found = {id(y) for y in operation._flatten_layers(include_self=False)}
            inside = tuple(sorted(self._numbers[i] for i in found if i in self._numbers))
        outputs = [self.fresh() for _ in range(number)]
        self.steps.append(_Step(operation, args, kwargs, outputs, inside, direct))
        return outputs

    def _inline(self, graph: Any, argument: Any) -> list[int]:
        entry = [self.fresh() for _ in graph.inputs]
        self.steps.append(_Step(graph._standardize_inputs, (argument,), {}, entry))
        values = {id(x): number for x, number in zip(graph.inputs, entry, strict=True)}

        def refer(x: Any) -> Any:
            return _Ref(values[id(x)]) if isinstance(x, keras.KerasTensor) else x

        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input or any(id(x) not in values for x in node.input_tensors):
                    continue
                kwargs = {k: tree.map_structure(refer, v) for k, v in node.arguments.kwargs.items()}
                if isinstance(node.operation, keras.Layer):
                    kwargs.pop("training", None)  # False for all, from the outermost call
                args = tree.map_structure(refer, node.arguments.args)
                outputs = self.call(node.operation, args, kwargs, len(node.outputs))
                values.update(zip(map(id, node.outputs), outputs, strict=True))
        return [values[id(x)] for x in graph.outputs]


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass
class _Stage:
    """What can be done once all layers of lower levels have their statistics."""

    level: int
    segment: _Program | None  # computes and probes
    layers: tuple[int, ...]  # whose statistics the segment gives
    keep: frozenset[int]  # values that later stages need
    groups: list[tuple[tuple[int, ...], _Program]]  # layers whose statistics depend on each other


class _Plan:
    """In which order the statistics of the selected layers are found.

    Layer v depends on layer u if u stands above an input of v. Layers that depend on each other
    (a shared layer that feeds itself; all the layers in a call that is code) form a group. Groups
    and single layers are ordered by level: 0 depends on none, k + 1 on level k. A value has the
    level at which all statistics above it are known.
    """

    def __init__(self, model: Any, layers: Sequence[Layer], structure: Any) -> None:
        self.layers = layers
        builder = _Builder({id(layer): i for i, layer in enumerate(layers)})
        leaves = tree.flatten(structure)
        self.raw = [builder.fresh() for _ in leaves]
        packed = tree.pack_sequence_as(structure, [_Ref(number) for number in self.raw])
        builder.call(model, (packed,), {}, 0)
        self.steps = builder.steps
        self._order()
        self._prune()
        top = max((self._level[i] for i in self._reached), default=-1)
        self.stages = [self._stage(level) for level in range(top + 1)]

    @property
    def unreached(self) -> tuple[int, ...]:
        """Layers that no step calls."""
        return tuple(i for i in range(len(self.layers)) if i not in self._reached)

    def _order(self) -> None:
        above: dict[int, int] = {}  # value -> bit mask of the layers above it
        reach = [0] * len(self.layers)
        self._reached: set[int] = set()
        for step in self.steps:
            mask = functools.reduce(lambda m, r: m | above.get(r, 0), step.inputs, 0)
            own = functools.reduce(lambda m, i: m | 1 << i, step.inside, 0)
            for i in step.inside:
                self._reached.add(i)
                reach[i] |= mask if step.direct else mask | own
            above.update(dict.fromkeys(step.outputs, mask | own))
        changed = True
        while changed:
            closed = [functools.reduce(lambda m, u: m | reach[u], _bits(m), m) for m in reach]
            changed, reach = closed != reach, closed
        self._reach = reach
        self._level: dict[int, int] = {}
        for i in sorted(self._reached, key=lambda i: reach[i].bit_count()):
            below = [u for u in _bits(reach[i]) if not reach[u] >> i & 1]
            self._level[i] = 1 + max((self._level[u] for u in below), default=-1)
        self._value_level = dict.fromkeys(self.raw, 0)
        for step in self.steps:
            mask = functools.reduce(lambda m, r: m | above.get(r, 0), step.inputs, 0)
            mask = functools.reduce(lambda m, i: m | 1 << i, step.inside, mask)
            step.level = 1 + max((self._level[u] for u in _bits(mask)), default=-1)
            self._value_level.update(dict.fromkeys(step.outputs, step.level))

    def _above(self, values: Iterable[int], level: int) -> set[int]:
        """Which steps lead to these values from those of up to a level."""
        producer = {v: n for n, step in enumerate(self.steps) for v in step.outputs}
        todo, found = list(values), set()
        while todo:
            value = todo.pop()
            if value in producer and self._value_level[value] > level:
                n = producer[value]
                if n not in found:
                    found.add(n)
                    todo += self.steps[n].inputs
        return found

    def _prune(self) -> None:
        wanted = [v for step in self.steps if step.inside for v in step.inputs]
        self._needed = self._above(wanted, -1)

    def _cyclic(self, i: int) -> bool:
        return bool(self._reach[i] >> i & 1)

    def _stage(self, level: int) -> _Stage:
        run = [n for n in sorted(self._needed) if self.steps[n].level == level]
        at_level = [i for i in sorted(self._reached) if self._level[i] == level]
        single = tuple(i for i in at_level if not self._cyclic(i))
        probe = [n for n, s in enumerate(self.steps) if s.direct and s.inside[0] in single]
        groups = {
            tuple(u for u in at_level if self._reach[i] >> u & 1 and self._reach[u] >> i & 1)
            for i in at_level
            if self._cyclic(i)
        }
        needs_later = {
            v for n in self._needed if self.steps[n].level > level for v in self.steps[n].inputs
        } | {
            v
            for s in self.steps
            for i in s.inside
            if self._level[i] > level or (self._level[i] == level and self._cyclic(i))
            for v in s.inputs
        }
        keep = frozenset(v for v in needs_later if self._value_level[v] <= level)
        made = [v for n in run for v in self.steps[n].outputs if v in keep]
        segment = None
        if run or probe:
            items = [_Item(self.steps[n], n in run, n in probe) for n in sorted({*run, *probe})]
            segment = _Program(items, self.layers, made)
        programs = [(group, self._group(group, level)) for group in sorted(groups)]
        return _Stage(level, segment, single, keep, programs)

    def _group(self, group: tuple[int, ...], level: int) -> _Program:
        probe = {n for n, step in enumerate(self.steps) if set(step.inside) & set(group)}
        run = self._above([v for n in probe for v in self.steps[n].inputs], level)
        items = [_Item(self.steps[n], n in run, n in probe) for n in sorted(run | probe)]
        return _Program(items, self.layers, [])


# Compiled pieces -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    step: _Step
    run: bool  # its outputs are used
    probe: bool  # the inputs of its normalization layers are measured


class _ReadMask(keras.layers.Layer):
    """Gives the mask that Keras has attached to a value to whoever asks."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Array, mask: Array | None = None) -> list[Array]:
        return [] if mask is None else [mask]

    def compute_mask(self, inputs: Array, previous_mask: Array | None) -> None:
        return None


class _AttachMask(keras.layers.Layer):
    """Attaches a mask to a value as Keras does."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: list[Array]) -> Array:
        return inputs[0]

    def compute_mask(self, inputs: list[Array], previous_mask: Any) -> Array:
        return inputs[1]


def _measured(layer: Layer, inputs: Array, mask: Array | None) -> dict[str, Array]:
    """The sums of the examples of one input of a normalization layer."""
    x = ops.cast(inputs, layer.compute_dtype)
    if mask is not None:
        mask = ops.convert_to_tensor(mask)
        rank = len(x.shape)
        mask = ops.expand_dims(mask, -1) if len(mask.shape) == rank - 1 else mask
        mask = ops.reshape(mask, (1,) * (rank - len(mask.shape)) + tuple(ops.shape(mask)))
    sums = example_sums(x, axis=layer.axis, weights=mask)
    return dict(zip(("shift", "first", "second", "count"), sums, strict=True))


@contextlib.contextmanager
def _intercepted(layers: Iterable[Layer], handler: Callable[..., Any]) -> Iterator[None]:
    """Lets `handler(layer, call, inputs, ...)` stand in for the call of each layer."""
    patched = []
    try:
        for layer in layers:
            before = vars(layer).get("call")
            patched.append((layer, before))
            object.__setattr__(layer, "call", functools.partial(handler, layer, layer.call))
        yield
    finally:
        for layer, before in patched:
            if before is not None:
                object.__setattr__(layer, "call", before)
            elif "call" in vars(layer):
                object.__delattr__(layer, "call")


class _Program(keras.Model):
    """Some steps of a model as one compiled function, in inference mode.

    From {"v3": value 3, "m3": its mask, ...} to the values that are asked for, in the same form,
    and for each measured call of a layer "s.(layer).(call).(name)", see `_measured`.
    """

    def __init__(
        self,
        items: Sequence[_Item],
        layers: Sequence[Layer],
        outputs: Sequence[int],
        by_batch: bool = False,
    ) -> None:
        super().__init__(name="statistics", autocast=False)
        self.supports_masking = True  # masks are handed on by hand
        made = {v for item in items if item.run for v in item.step.outputs}
        self.needs = tuple(sorted({v for item in items for v in item.step.inputs} - made))
        self._items = tuple(items)
        self._asked = tuple(outputs)
        self._by_batch = by_batch
        self._measures = {i: layers[i] for item in items for i in item.step.inside if item.probe}
        operations = [item.step.operation for item in items]
        # Tracked by Keras: their variables are this model's, read anew in every run.
        self.parts = list({id(y): y for y in operations if isinstance(y, keras.Layer)}.values())
        self.built = True

    def call(self, inputs: dict[str, Array], training: bool = False) -> dict[str, Array]:
        values: dict[int, Array] = {}
        for number in self.needs:
            value, mask = inputs[f"v{number}"], inputs.get(f"m{number}")
            values[number] = value if mask is None else _AttachMask()([value, mask])
        found: dict[str, Array] = {}
        calls: dict[int, int] = {}

        def fill(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, _Ref) else leaf

        def record(layer: Layer, value: Array, mask: Array | None) -> dict[str, Array]:
            index = next(i for i, y in self._measures.items() if y is layer)
            call = calls[index] = calls.get(index, -1) + 1
            sums = _measured(layer, value, mask)
            found.update({f"s.{index}.{call}.{name}": v for name, v in sums.items()})
            return sums

        def handler(layer: Layer, call: Any, inputs: Array, *args: Any, **kwargs: Any) -> Any:
            sums = record(layer, inputs, kwargs.get("mask"))
            if not self._by_batch:
                return call(inputs, *args, **kwargs)
            return self._normalized_by_batch(layer, inputs, sums, flag)

        flag = inputs.get("by_batch")
        for item in self._items:
            step = item.step
            args = tree.map_structure(fill, step.args)
            kwargs = {k: tree.map_structure(fill, v) for k, v in step.kwargs.items()}
            if step.direct and item.probe:
                value = args[0] if args else kwargs["inputs"]
                mask = kwargs.get("mask")
                record(step.operation, value, _mask_of(value) if mask is None else mask)
            if item.run or (item.probe and not step.direct):
                inside = [y for i, y in self._measures.items() if i in step.inside]
                with _intercepted(inside if item.probe and not step.direct else (), handler):
                    result = step.operation(*args, **kwargs)
                values.update(zip(step.outputs, tree.flatten(result), strict=False))
        for number in self._asked:
            found[f"v{number}"] = values[number]
            mask = _mask_of(values[number])
            if mask is not None:
                found[f"m{number}"] = mask
        return found

    @staticmethod
    def _normalized_by_batch(
        layer: Layer, inputs: Array, sums: dict[str, Array], flag: Array
    ) -> Array:
        """By the batch's own statistics if the flag is set, else by the moving ones."""
        x = ops.cast(inputs, layer.compute_dtype)
        count = sums["count"]
        count = ops.sum(ops.broadcast_to(count, ops.shape(sums["first"])), axis=0)
        count = ops.where(count > 0, count, 1)
        d = ops.sum(sums["first"], axis=0) / count
        variance = ops.maximum(ops.sum(sums["second"], axis=0) / count - d * d, 0)
        mean = ops.where(flag, sums["shift"] + d, ops.cast(layer.moving_mean, d.dtype))
        variance = ops.where(flag, variance, ops.cast(layer.moving_variance, d.dtype))
        parameters = (layer.gamma, layer.beta)
        y = functional.normalize(
            x, mean, variance, *parameters, axis=layer.axis, epsilon=layer.epsilon
        )
        return ops.cast(y, layer.compute_dtype)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Calls the compiled function; the model's variables are read, never written."""
        inputs = {k: ops.convert_to_tensor(v) for k, v in inputs.items()}
        self.make_predict_function()
        if keras.backend.backend() == "jax":
            # The compiled function consumes the buffers that it is given: it gets copies.
            state = tuple(
                [ops.copy(v.value) for v in variables]
                for variables in (self.trainable_variables, self.non_trainable_variables)
            )
            outputs, _ = self.predict_function(state, iter([(inputs,)]))
            return dict(outputs)
        return dict(self.predict_function([(inputs,)]))


def _mask_of(value: Array) -> Array | None:
    found = _ReadMask()(value)
    return found[0] if found else None


# Solving (S1) and (S2) -------------------------------------------------------------------------


@dataclass
class _Found:
    """What the inputs of one layer were."""

    moments: Moments | None  # None: some were not finite
    calls: int = 0  # in one pass
    residual: float = 0.0
    leak: float = 0.0

    def take_in(self, other: _Found) -> None:
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)
        else:
            self.moments = None
        self.calls = max(self.calls, other.calls)


def _found_in(
    outputs: Mapping[str, Array], chunk: _Chunk, layers: Sequence[Layer]
) -> dict[int, _Found]:
    """The sums that one run of a program gave, as moments, by the number of the layer."""
    keys = sorted({tuple(map(int, key.split(".")[1:3])) for key in outputs if key[:2] == "s."})
    found: dict[int, _Found] = {}
    for i, calls in itertools.groupby(keys, key=lambda key: key[0]):
        axis = layers[i].axis
        moments = Moments(axis if isinstance(axis, int) else tuple(axis))
        sums = [_sums_of(outputs, f"s.{i}.{call}.", chunk) for _, call in calls]
        finite = all(np.all(np.isfinite(v)) for one in sums for v in one)
        if finite:
            shift, first, second, count = sums[0]
            for other in sums[1:]:  # an example is one, however often the layer is called on it
                d = other[0] - shift
                first = first + other[1] + d * other[3]
                second = second + other[2] + 2 * d * other[1] + d * d * other[3]
                count = count + other[3]
            moments.update_from_sums(shift, first, second, count)
        found[i] = _Found(moments if finite else None, len(sums))
    return found


def _sums_of(outputs: Mapping[str, Array], key: str, chunk: _Chunk) -> tuple[Floats, ...]:
    shift, first, second, count = (
        np.asarray(ops.convert_to_numpy(outputs[key + name]), np.float64)
        for name in ("shift", "first", "second", "count")
    )
    rows = len(first)
    return shift, *(_per_example(v, rows, chunk) for v in (first, second, count))


def _per_example(sums: Floats, rows: int, chunk: _Chunk) -> Floats:
    """(R, C) -> (N, C): those rows together that are of one example; without what fills up.

    A model may fold other axes into the first, time steps or windows; R is then a multiple of N.
    """
    sums = np.broadcast_to(sums, (rows, *sums.shape[1:]))
    if rows % chunk.size == 0:
        sums = sums.reshape(chunk.size, rows // chunk.size, *sums.shape[1:]).sum(axis=1)
        return sums[: chunk.rows]
    if chunk.rows != chunk.size:
        raise ValueError(
            "The inputs of a normalization layer must have their examples on axis 0, or batches "
            f"must be equal. Received: {rows} rows for a batch of {chunk.size}, in a sample that "
            "is no multiple of `batch_size`. Choose a `batch_size` that divides it."
        )
    return sums


class _Solver:
    """Finds the statistics of the layers of a plan, stage by stage, and assigns them."""

    def __init__(
        self, plan: _Plan, chunks: Sequence[_Chunk], store: _Store, rule: Rule, names: Sequence[str]
    ) -> None:
        self._plan, self._chunks, self._store = plan, chunks, store
        self._rule, self._names = rule, names
        self.found: dict[int, _Found] = {}

    def solve(self, tick: Callable[[], None]) -> dict[int, _Found]:
        """All stages; `tick` is called after each chunk of each pass."""
        try:
            for stage in self._plan.stages:
                found = self._pass(stage, tick)
                for i in stage.layers:
                    if i in found:
                        self._set(i, found[i])
                for group, program in stage.groups:
                    self._fixed_point(group, program, stage.level, tick)
        finally:
            for chunk in self._chunks:
                if chunk.kept is not None:
                    chunk.kept.free()
                chunk.kept, chunk.level = None, -1
        return self.found

    def _pass(self, stage: _Stage, tick: Callable[[], None]) -> dict[int, _Found]:
        total: dict[int, _Found] = {}
        for chunk in self._chunks:
            env, outputs = self._advance(stage, self._environment(chunk, stage.level - 1))
            _add(total, _found_in(outputs, chunk, self._plan.layers))
            kept = None if stage.segment is None else self._store.put(env, chunk.kept)
            if kept is not None:
                chunk.kept, chunk.level = kept, stage.level
            tick()
        return total

    def _environment(self, chunk: _Chunk, level: int) -> Environment:
        """The values after a stage: kept, or computed again from the last that was kept."""
        if chunk.kept is not None:
            env = chunk.kept.get()
        else:
            leaves = tree.flatten(chunk.inputs(pad=True))
            env = {n: (x, None) for n, x in zip(self._plan.raw, leaves, strict=True)}
        for stage in self._plan.stages[chunk.level + 1 : level + 1]:
            env, _ = self._advance(stage, env)
        return env

    @staticmethod
    def _advance(stage: _Stage, env: Environment) -> tuple[Environment, dict[str, Array]]:
        outputs = {} if stage.segment is None else stage.segment.run(_feed(env, stage.segment))
        kept = {
            v: env[v] if v in env else (outputs[f"v{v}"], outputs.get(f"m{v}")) for v in stage.keep
        }
        return kept, outputs

    def _set(self, i: int, found: _Found) -> None:
        self.found[i] = found
        _set(self._layer(i), found, self._rule, self._names[i])

    def _fixed_point(
        self, group: tuple[int, ...], program: _Program, level: int, tick: Callable[[], None]
    ) -> None:
        """Layers that depend on each other: statistics that reproduce themselves.

        Round k makes the first k calls of a pass right: a group in which each layer is called
        once is exact after as many rounds as it has calls. A layer that is called several times
        has one set of statistics, those of all its inputs pooled; if these depend on it, they
        are the solution of a fixed-point equation, found by iteration with Anderson's
        acceleration.
        """
        states: list[Floats] = []
        steps: list[Floats] = []
        units: dict[int, Floats] = {}
        for round_ in itertools.count(1):
            found = self._round(program, level, tick)
            targets = self._targets(found)
            for i, (_, variance) in targets.items():
                units.setdefault(i, np.sqrt(variance + self._layer(i).epsilon + 1e-30))
            moved = self._moved(targets)
            calls = sum(f.calls for f in found.values())
            shared = any(f.calls > 1 for f in found.values())
            last = round_ >= calls + _MAX_ROUNDS
            if moved <= _FIXED_POINT or last or (round_ >= calls and not shared):
                break
            now = self._state({i: _current(self._layer(i)) for i in targets}, units)
            new = self._state(targets, units)
            states, steps = [*states[-5:], now], [*steps[-5:], new - now]
            if round_ > calls and len({len(s) for s in states}) == 1:
                new = _anderson(states, steps)
            self._assign(targets, new, units)
        for i, f in found.items():
            f.residual = moved if shared else 0.0
            self._set(i, f)
        if last and moved > 10 * _FIXED_POINT:
            warnings.warn(
                f"The statistics of {[self._names[i] for i in sorted(found)]} depend on each other "
                f"and did not settle in {round_} rounds: they still move by {moved:.2g} sigma.",
                stacklevel=6,
            )

    def _round(self, program: _Program, level: int, tick: Callable[[], None]) -> dict[int, _Found]:
        found: dict[int, _Found] = {}
        for chunk in self._chunks:
            outputs = program.run(_feed(self._environment(chunk, level), program))
            _add(found, _found_in(outputs, chunk, self._plan.layers))
            tick()
        return found

    def _layer(self, i: int) -> Layer:
        return self._plan.layers[i]

    def _targets(self, found: Mapping[int, _Found]) -> _Statistics:
        """What the rule makes of what was found; not (yet) finite values are left out."""
        return {
            i: self._rule(self._layer(i), f.moments)
            for i, f in sorted(found.items())
            if f.moments is not None and not f.moments.empty
        }

    def _moved(self, targets: _Statistics) -> float:
        """The largest difference between these statistics and those of now, in sigma."""
        moves = [
            _movement(*values, *_current(self._layer(i)), self._layer(i).epsilon)
            for i, values in targets.items()
        ]
        return max((float(np.max(m, initial=0)) for m in moves), default=math.inf)

    def _state(self, values: _Statistics, units: Mapping[int, Floats]) -> Floats:
        """Means in fixed units, and log sigma, of all layers as one vector."""
        parts = [np.zeros(0)]
        for i, (mean, variance) in values.items():
            log_sigma = 0.5 * np.log(variance + self._layer(i).epsilon + 1e-30)
            parts += [(mean / units[i]).ravel(), log_sigma.ravel()]
        return np.concatenate(parts)

    def _assign(self, targets: _Statistics, state: Floats, units: Mapping[int, Floats]) -> None:
        """Gives the layers of `targets` the statistics of a state."""
        at = 0
        for i in targets:
            n, shape = units[i].size, units[i].shape
            mean = state[at : at + n].reshape(shape) * units[i]
            log_sigma = state[at + n : at + 2 * n].reshape(shape)
            variance = np.maximum(np.exp(2 * log_sigma) - self._layer(i).epsilon, 0)
            _set_statistics(self._layer(i), mean, variance)
            at += 2 * n


def _add(total: dict[int, _Found], more: Mapping[int, _Found]) -> None:
    for i, found in more.items():
        if i in total:
            total[i].take_in(found)
        else:
            moments = None if found.moments is None else found.moments.copy()
            total[i] = dataclasses.replace(found, moments=moments)


def _set(layer: Layer, found: _Found, rule: Rule, name: str) -> None:
    if found.moments is None:
        raise ValueError(
            "Statistics can be taken of finite values only. Received: NaN or infinite values in "
            f"the inputs of layer {name!r}. Look for them in the data, and in the weights of the "
            "layers below."
        )
    if not found.moments.empty:
        _set_statistics(layer, *rule(layer, found.moments))


def _feed(env: Environment, program: _Program) -> dict[str, Array]:
    feed = {f"v{n}": env[n][0] for n in program.needs}
    return feed | {f"m{n}": env[n][1] for n in program.needs if env[n][1] is not None}


def _current(layer: Layer) -> tuple[Floats, Floats]:
    mean, variance = (_copy(v) for v in (layer.moving_mean, layer.moving_variance))
    return mean.astype(np.float64), variance.astype(np.float64)


def _anderson(states: Sequence[Floats], steps: Sequence[Floats]) -> Floats:
    """The next state of a fixed-point iteration, from those before (Anderson, 1965)."""
    d_steps = np.diff(np.stack(steps), axis=0).T
    d_states = np.diff(np.stack(states), axis=0).T
    weights = np.linalg.lstsq(d_steps, steps[-1], rcond=1e-6)[0]
    limit = np.clip(steps[-1] - (d_states + d_steps) @ weights, -3, 3)
    return states[-1] + limit


class _OnePass:
    """Batch statistics in every layer in one sweep, pooled by counts."""

    def __init__(self, model: Any, layers: Sequence[Layer], structure: Any) -> None:
        numbers = list(range(len(tree.flatten(structure))))
        packed = tree.pack_sequence_as(structure, [_Ref(n) for n in numbers])
        step = _Step(model, (packed,), {}, [], tuple(range(len(layers))))
        self._layers, self._numbers = layers, numbers
        self.program = _Program([_Item(step, False, True)], layers, [], by_batch=True)

    def run(self, chunk: _Chunk, by_batch: bool) -> dict[int, _Found]:
        leaves = tree.flatten(chunk.inputs(pad=False))
        feed = {f"v{n}": x for n, x in zip(self._numbers, leaves, strict=True)}
        outputs = self.program.run({**feed, "by_batch": np.array(by_batch)})
        return _found_in(outputs, dataclasses.replace(chunk, size=chunk.rows), self._layers)


# Re-estimation -----------------------------------------------------------------------------------


def _population(layer: Layer, moments: Moments) -> tuple[Floats, Floats]:
    """(S1) and (S2); a channel without any element keeps its statistics."""
    mean, variance = _current(layer)
    some = moments.count > 0
    return np.where(some, moments.mean, mean), np.where(some, moments.variance(), variance)


Selection = Callable[[Any], bool] | Iterable[Any] | None


def _selected(layers: Mapping[str, Layer], selection: Selection) -> dict[str, Layer]:
    if selection is None:
        return dict(layers)
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
    method: str, samples: int | None, batch_size: int, tolerance: float | None
) -> None:
    if method not in ("layerwise", "one_pass"):
        raise ValueError(
            f"`method` must be 'layerwise' (exact) or 'one_pass' (fast). Received: {method=}."
        )
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not (whole and value >= 1) and not (name == "samples" and value is None):  # type: ignore[operator]
            raise ValueError(
                f"`{name}` is a number of examples and must be an integer >= 1"
                f"{', or None for all there are' if name == 'samples' else ''}. "
                f"Received: {name}={value!r}."
            )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            "`tolerance` is a standard error in units of sigma and must be > 0. "
            f"Received: tolerance={tolerance!r}. 0.01 is a strict one."
        )


def _compiled_like(program: _Program, model: Any) -> _Program:
    """The program runs as `predict` would run the model: compiled, or eagerly if told so."""
    program.run_eagerly = bool(getattr(model, "run_eagerly", False))
    if getattr(model, "compiled", False):
        program.jit_compile = bool(model.jit_compile)
    else:
        program.jit_compile = keras.backend.backend() == "jax"
    return program


@dataclass
class _Job:
    """One run of `reestimate`, or of what is built on it."""

    model: Any
    names: list[str]
    layers: list[Layer]
    sample: _Sample
    store: _Store
    rule: Rule
    method: str
    tolerance: float | None
    bar: Any

    def run(self) -> tuple[dict[int, _Found], int]:
        """What was found for each layer, and the number of examples; assigns it."""
        work = self._layerwise if self.method == "layerwise" else self._one_pass
        return work()

    def _layerwise(self) -> tuple[dict[int, _Found], int]:
        rows = None if self.tolerance is None else _PILOT
        plan = None
        while True:
            chunks = self.sample.take(rows)
            if plan is None:
                structure = tree.map_structure(lambda _: 0, chunks[0].raw())
                plan = _Plan(self.model, self.layers, structure)
                for stage in plan.stages:
                    programs = [p for _, p in stage.groups]
                    for program in programs + ([stage.segment] if stage.segment else []):
                        _compiled_like(program, self.model)
            solver = _Solver(plan, chunks, self.store, self.rule, self.names)
            found = solver.solve(self._tick)
            came = sum(chunk.rows for chunk in chunks)
            if self.tolerance is None or rows is None or came < rows or came == self.sample.limit:
                return found, came
            error = self._error(found)
            if error <= self.tolerance:
                return found, came
            # The error falls with the square root of the number of examples.
            factor = min((error / self.tolerance) ** 2 * 1.1, 64.0)
            rows = max(math.ceil(came * factor), came + 1)

    def _one_pass(self) -> tuple[dict[int, _Found], int]:
        total: dict[int, _Found] = {}
        some: dict[int, _Found] = {}
        tried: list[_Chunk] = []
        sweep, came = None, 0
        for chunk in self.sample.once():
            if sweep is None:
                structure = tree.map_structure(lambda _: 0, chunk.raw())
                sweep = _OnePass(self.model, self.layers, structure)
                _compiled_like(sweep.program, self.model)
            found = sweep.run(chunk, by_batch=True)
            if len(tried) < _TRIED:
                _add(some, found)
                tried.append(chunk)
            _add(total, found)
            came += chunk.rows
            self._tick()
            if self.tolerance is not None and self._error(total) <= self.tolerance:
                break
        if sweep is None:
            raise _nothing_came()
        for i, f in total.items():
            _set(self.layers[i], f, self.rule, self.names[i])
        self._measure_leak(sweep, tried, some, total)
        return total, came

    def _measure_leak(
        self,
        sweep: _OnePass,
        tried: Sequence[_Chunk],
        by_batch: Mapping[int, _Found],
        total: Mapping[int, _Found],
    ) -> None:
        """The same examples once more, all layers by their new statistics: what moves?"""
        exact: dict[int, _Found] = {}
        for chunk in tried:
            _add(exact, sweep.run(chunk, by_batch=False))
        for i, f in exact.items():
            a, b = f.moments, by_batch[i].moments
            if a is not None and b is not None and not a.empty:
                exact_variance, variance = (np.nan_to_num(m.variance()) for m in (a, b))
                moved = _movement(a.mean, exact_variance, b.mean, variance, self.layers[i].epsilon)
                total[i].leak = _rms(moved)

    def _error(self, found: Mapping[int, _Found]) -> float:
        return max((_error(self.layers[i].epsilon, f.moments) for i, f in found.items()), default=0)

    def _tick(self) -> None:
        if self.bar is not None:
            self.bar.update()


def _error(epsilon: float, moments: Moments | None) -> float:
    """See `LayerStatistics.error`."""
    if moments is None or moments.empty:
        return 0.0
    some = moments.count > 0
    variance = np.maximum(moments.variance()[some], 0)
    total = np.maximum(variance + epsilon, 1e-30)
    of_mean = moments.standard_error_of_mean()[some] ** 2 / total
    of_variance = (moments.standard_error_of_variance()[some] / (2 * total)) ** 2
    return float(np.sqrt(np.mean(of_mean + of_variance * variance / total)))


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

    Equations (S1) and (S2) of this module, in inference mode throughout: dropout and augmentation
    layers are off. Nothing of the model but the statistics changes, and on any failure (of the
    data, of the disk, Ctrl-C) not even these.

    `method="layerwise"` is exact: the result is the float64 mean and biased variance of the
    inputs that each layer receives, with all layers on their new statistics, whatever the batch
    size and the order of the data. In a functional or Sequential model, nested ones included,
    each operation runs once for each batch: a layer's statistics are complete before its outputs
    are computed, and activations wait in between, in memory and then on disk. What does not fit
    is computed again from the last that did.

    A layer that is called several times has one set of statistics: those of all its inputs
    pooled, each element counting once. If its calls feed each other, these are defined by
    themselves, and found by iterating until they reproduce themselves to 1e-6 sigma
    (`residual` in the report).

    Calls that are code (subclassed models and layers with normalization layers inside) are run
    as a whole: once more for each normalization layer in them, since a pass makes only the next
    one right. The result is exact all the same.

    `method="one_pass"` lets every layer normalize by the batch, in one sweep, and pools by
    counts. Layers above the first see inputs normalized with the batch's own noise: the error
    grows with depth and with smaller batches. The report states it per layer as `leak`, measured
    on the first batches.

    Args:
        model: a built `keras.Model`, functional, Sequential or subclassed, with batch
            normalization layers of `keras_norm.layers` or `keras.layers`.
        data: arrays x or (x, y), a list or dict of them for several inputs; a
            `keras.utils.PyDataset`; a `tf.data.Dataset`, data loader or generator of batches x,
            (x, y) or (x, y, weights). Labels and sample weights are not used.
        samples: the largest number of examples; None for all. Of arrays and PyDatasets with more,
            a random part is taken, of streams the first. What came is counted. Default: 10,000.
        method: "layerwise" or "one_pass". Default: "layerwise".
        batch_size: examples per pass; batches of streams are cut anew. Default: 256.
        tolerance: stop when no layer's outputs have a standard error (`Report.error`) above this,
            in units of sigma; at the latest with `samples`. Default: use all samples.
        layers: which layers: their names or paths, the layers themselves, or a function of a
            layer. The others keep their statistics. Default: all.
        memory: budget for waiting activations, in bytes, on the device. Default: 2 GiB.
        disk: budget for those that do not fit into memory, in bytes. Default: 16 GiB.
        folder: where on disk. Default: the system's folder for temporary files.
        name: of the data, for the report. Default: what they are.
        seed: of the random part. Default: 0.
        progress: whether to show a progress bar (on stderr). Default: False.

    Returns:
        A `Report`: per layer old and new statistics, elements, standard errors, shift.

    Raises:
        ValueError: for arguments out of range, data without examples, values that are not finite,
            a model without built batch normalization layers. The model is as before.
        OSError: if activations cannot be written to disk. The model is as before.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,))
        >>> report = reestimate(model, (np.eye(3, dtype="float32"), np.arange(3)), name="corners")
        >>> report.samples, report.method, [y.name for y in report.layers]
        (3, 'layerwise', ['dense1_norm'])

    Numerics:
        Sums within an example in float32 (float64 in a float64 model) around the batch's mean,
        all others in float64; equal to NumPy's float64 moments of the activations to 1e-5 sigma.

    Reference:
        Wu and Johnson, 2021, Rethinking "Batch" in BatchNorm, section 3.
    """
    _check_numbers(method, samples, batch_size, tolerance)
    everything = _normalizations(model)
    chosen = _selected(everything, layers)
    before = snapshot(model)
    bar = _progress_bar(f"{method} statistics") if progress else None
    with _Store(memory, disk, folder) as store, _transaction(model, list(chosen.values())):
        held = store if method == "layerwise" else None
        job = _Job(
            model,
            list(chosen),
            list(chosen.values()),
            _Sample(data, samples, batch_size, seed, held),
            store,
            _population,
            method,
            tolerance,
            bar,
        )
        found, came = job.run()
    if bar is not None:
        bar.close()
    by_name = {job.names[i]: f for i, f in found.items()}
    settings = {"requested": samples, "tolerance": tolerance, "seed": seed}
    parts = _layer_reports(everything, chosen, before, by_name)
    return Report(method, name or _describe(data), came, batch_size, parts, settings)


def _progress_bar(text: str) -> Any:
    from tqdm import tqdm

    return tqdm(desc=text, unit=" batches", leave=False)


def _layer_reports(
    everything: Mapping[str, Layer],
    chosen: Mapping[str, Layer],
    before: Snapshot,
    found: Mapping[str, _Found],
) -> tuple[LayerStatistics, ...]:
    """Layers in the order in which they were found, then those that kept their statistics."""
    parts = []
    for name in [*found, *(n for n in everything if n not in found)]:
        layer, f = everything[name], found.get(name, _Found(None))
        old_mean, old_variance = before.moments(name)
        mean, variance = _current(layer)
        part = LayerStatistics(
            name=name,
            status="did not run" if name in chosen else "not selected",
            epsilon=float(layer.epsilon),
            old_mean=old_mean,
            old_variance=old_variance,
            mean=mean,
            variance=variance,
            elements=np.zeros(mean.shape),
            uses=f.calls,
            residual=f.residual,
            leak=f.leak,
        )
        if f.moments is not None and not f.moments.empty:
            part = dataclasses.replace(
                part,
                status="updated",
                elements=f.moments.count,
                examples=int(f.moments.examples.max()),
                standard_error_of_mean=f.moments.standard_error_of_mean(),
                standard_error_of_variance=f.moments.standard_error_of_variance(),
            )
        parts.append(part)
    return tuple(parts)

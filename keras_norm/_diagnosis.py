"""Why a model's loss differs between training and inference mode: `statistics.diagnose`.

Steps lead from the loss in inference mode to that in training mode, on the same examples in the
same batches with the same random seeds:

    0                    everything as in inference
    1, 2, ... K          one normalization layer after another, from the bottom up, gets the exact
                         statistics of the examples
    K + 1, ... 2 K       one after another normalizes by the batch
    2 K + 1, ...         one random layer after another, such as dropout, is switched on
    the last             training mode

Each step has one layer and one reason, and the changes of all steps add up to the whole difference.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops, tree

from keras_norm import statistics
from keras_norm._arrays import is_integer
from keras_norm._kinds import MEAN_VARIANCE, copy_of, kind_by_names
from keras_norm._layerwise import rms
from keras_norm._layerwise_program import (
    functions_by_python,
    intercepted,
    mask_of,
    nothing_compiled,
)
from keras_norm._sample import as_numpy, describe, is_structure, joined, some_of
from keras_norm.moments import Moments

__all__ = ["Cause", "Diagnosis", "diagnose"]

Array = Any
Layer = Any
Floats = npt.NDArray[np.float64]
Batch = tuple[Any, Any, Any]  # x, y, weights

_STALE = 0.05  # sigma: statistics that are nearer to each other count as the same
_COLD = 0.05  # share of the initial values above which statistics are called cold
_MASKS = 0.1  # sigma: change of the statistics by padding above which a lost mask is a cause
_ROUNDING = 1e-5  # of the loss: a hundred times float32's rounding, as that of many layers adds up

_REMEDIES = {
    "no training mode": "Give the model's `call` an argument `training=None`, hand it on to the "
    "layers, and train again.",
    "non-finite values": "Remove them from the data, or restore weights from before they appeared.",
    "cold statistics": "statistics.reestimate(model, training_data), or train longer, or lower "
    "`momentum`.",
    "domain shift": "statistics.adapt(model, target) if the data is of another domain; "
    "statistics.reestimate(model, training_data) if the weights have moved since.",
    "masks": "Let the mask reach the layer: `supports_masking` in the layers below, or pass "
    "mask=... to the call.",
    "frozen layers": "statistics.reestimate(model, data, layers=[...]) for these layers, or "
    "unfreeze them.",
    "shared layers": "One normalization for each call: in training every call has statistics of "
    "its own, in inference they are pooled.",
    "small batches": "Train in larger batches, or with group or layer normalization.",
    "dropout": "None needed if inference is the better; a lower rate if training is much worse.",
    "other layers": "Look for what else depends on `training` in the model's own code.",
}


@dataclass(frozen=True)
class Cause:
    """One reason for the difference between the modes.

    Args:
        name: "no training mode", "non-finite values", "cold statistics", "domain shift", "masks",
            "frozen layers", "shared layers", "small batches", "dropout" or "other layers".
        change: what it adds to the loss of inference compared with that of training; for frozen
            layers, which are the same in both modes, to both. NaN for the first two, which have
            none.
        error: standard error of the change, over the batches.
        layers: (name, its part of the change), in the order of their calls.
        evidence: what was observed.
        tolerance: the change that rounding can explain: 1e-5 of the loss, at least 1e-6.
            Default: 1e-6.
    """

    name: str
    change: float
    error: float
    layers: tuple[tuple[str, float], ...]
    evidence: str = ""
    tolerance: float = 1e-6

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _REMEDIES[self.name]

    @property
    def significant(self) -> bool:
        """Whether the change is larger than twice its standard error and than rounding."""
        return not abs(self.change) <= 2 * self.error + self.tolerance


@dataclass(frozen=True)
class Diagnosis:
    """What `keras_norm.statistics.diagnose` found; prints as a table.

    Args:
        data: name of the data.
        samples: number of examples.
        batch_size: examples per batch.
        inference_loss, training_loss: the losses on the same examples; they may be NaN or infinite.
        causes: first those without a change, then the largest first and the insignificant last.
            Causes that change the loss of no batch are left out.
    """

    data: str
    samples: int
    batch_size: int
    inference_loss: float
    training_loss: float
    causes: tuple[Cause, ...] = field(default_factory=tuple)

    @property
    def gap(self) -> float:
        """The loss of inference minus that of training."""
        return self.inference_loss - self.training_loss

    @property
    def first(self) -> str | None:
        """Name of the most important cause; None if none is significant."""
        return self.causes[0].name if self.causes and self.causes[0].significant else None

    def __getitem__(self, name: str) -> Cause:
        for cause in self.causes:
            if cause.name == name:
                return cause
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [
            f"{self.samples} examples of {self.data} in batches of {self.batch_size}: loss "
            f"{self.inference_loss:.4g} in inference, {self.training_loss:.4g} in training, "
            f"difference {self.gap:+.4g}"
        ]
        width = max((len(n) for c in self.causes for n, _ in c.layers), default=0) + 2
        width = max([width, *(len(c.name) for c in self.causes)])
        for c in self.causes:
            size = "" if math.isnan(c.change) else f"{c.change:+10.4g} ± {c.error:.2g}"
            lines += ["", f"{c.name:<{width}}  {size}".rstrip()]
            lines += [f"  {c.evidence}"] if c.evidence else []
            if len(c.layers) > 1:
                lines += [f"  {name:<{width - 2}}  {part:+10.4g}" for name, part in c.layers]
            if c.significant:
                lines.append(f"  Remedy: {c.remedy}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; numbers that are not finite become None."""

        def plain(x: Any) -> Any:
            return None if isinstance(x, float) and not math.isfinite(x) else x

        found = tree.map_structure(plain, dataclasses.asdict(self))
        return {"format": "keras_norm.statistics.diagnosis/1", **found}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws what each cause, layer by layer, adds to the loss of inference over training's.

        Args:
            path: file to write, whole or not at all: .png, .pdf or .svg. Default: none.

        Returns:
            The Matplotlib figure; closed if it was written.

        Raises:
            ValueError: if no cause has a change to draw; or for another kind of file.
        """
        causes = [c for c in self.causes if math.isfinite(c.change)]
        if not causes:
            raise ValueError(
                "A plot needs a cause with a change of the loss. Received: causes="
                f"{[c.name for c in self.causes]}."
            )
        from keras_norm.plotting import finish, style

        with style():
            return finish(_draw(self, causes), path)


def _draw(diagnosis: Diagnosis, causes: Sequence[Cause]) -> Any:
    from matplotlib import pyplot

    rows = [(cause, *part) for cause in causes for part in cause.layers]
    figure, axes = pyplot.subplots(figsize=(7.0, 1.6 + 0.32 * len(rows)))
    for color, cause in enumerate(causes):
        at = [i for i, row in enumerate(rows) if row[0] is cause]
        label = f"{cause.name}: {cause.change:+.3g} ± {cause.error:.2g}"
        axes.barh(at, [rows[i][2] for i in at], color=f"C{color % 10}", label=label)
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="#444444", linewidth=1, marker="")
    axes.set_xlabel("loss in inference less loss in training")
    axes.legend(title="cause: sum, ± standard error")
    figure.suptitle(
        f"{diagnosis.samples:,} examples of {diagnosis.data}: {diagnosis.inference_loss:.3g} in "
        f"inference, {diagnosis.training_loss:.3g} in training"
    )
    return figure


# Examples ----------------------------------------------------------------------------------------


def _batches_of(data: Any, samples: int, batch_size: int, seed: int) -> list[Batch]:
    """(x, y, weights) in NumPy: a random part of arrays, the first batches of streams."""
    if isinstance(data, tuple) and is_structure(data):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(tree.map_structure(as_numpy, data))
        _require_examples((x, y, weights))
        total = len(tree.flatten(x)[0])
        order = np.random.default_rng(seed).permutation(total)[:samples]
        parts: Iterable[Any] = (
            tree.map_structure(
                lambda v, rows=rows: None if v is None else np.asarray(v[rows]), (x, y, weights)
            )
            for rows in np.split(order, range(batch_size, len(order), batch_size))
        )
    elif hasattr(data, "__iter__") and not hasattr(data, "shape"):
        parts = (keras.utils.unpack_x_y_sample_weight(batch) for batch in data)
    elif isinstance(data, keras.utils.PyDataset):
        number = data.num_batches
        indices = range(number) if number is not None else iter(int, 1)
        parts = (keras.utils.unpack_x_y_sample_weight(data[i]) for i in indices)
    else:
        raise ValueError(
            "A diagnosis needs labels: `data` must be (x, y), (x, y, weights), or batches of "
            f"these. Received: data of type {type(data).__name__}."
        )
    batches: list[Batch] = []
    rows = 0
    for part in parts:
        batch = tree.map_structure(lambda v: None if v is None else as_numpy(v), tuple(part))
        if batch[1] is None:
            raise ValueError(
                "A diagnosis needs labels: `data` must give (x, y) or (x, y, weights). Received: "
                "a batch without y."
            )
        _require_examples(batch)
        if rows + _rows(batch) > samples:
            left = samples - rows
            batch = tree.map_structure(lambda v, n=left: None if v is None else v[:n], batch)
        batches.append(batch)
        rows += _rows(batch)
        if rows >= samples:
            break
    if not rows:
        raise ValueError("A diagnosis needs at least one example. Received: data without any.")
    return batches


def _require_examples(parts: Batch) -> None:
    shapes = [np.shape(v) for v in tree.flatten(parts) if v is not None]
    if () in shapes or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "Inputs, labels and weights must have the same number of examples, along axis 0. "
            f"Received: arrays of shapes {some_of(shapes)}. A data set must be batched."
        )


def _rows(batch: Batch) -> int:
    return len(tree.flatten(batch[0])[0])


# Runs of the model -------------------------------------------------------------------------------


def _has_switch(layer: Layer) -> bool:
    return bool(getattr(layer, "_call_has_training_arg", False))


def _leaf_layers(model: Any) -> list[Layer]:
    """The layers of a model that have no layers inside."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if not list(layer._flatten_layers(include_self=False))
    ]


class _Trials:
    """Losses of the same batches, with chosen layers in training mode and chosen statistics."""

    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self.norms = statistics._normalizations(model)
        known = {id(y) for y in self.norms.values()}
        self.random = {
            path: layer
            for path, layer in statistics._inside(model)
            if hasattr(layer, "seed_generator") and _has_switch(layer) and id(layer) not in known
        }
        # All variables, because SpectralNormalization, for one, assigns its kernel in training.
        variables = {id(v): v for v in (*model.variables, *model.metrics_variables)}
        self._state = [(v, copy_of(v)) for v in variables.values()]
        self.rows = np.array([_rows(batch) for batch in batches], np.float64)

    def losses(self, values: statistics.Snapshot, on: Iterable[str] = ()) -> Floats:
        """(B,), the loss of each batch, with only the layers in `on` in training mode."""
        switched = {**self.norms, **self.random}
        chosen = {id(switched[name]) for name in on}

        def handler(layer: Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **{**kwargs, "training": id(layer) in chosen})

        with intercepted(switched.values(), handler), functions_by_python():
            return self._run(values, training=False)

    def training_losses(self, values: statistics.Snapshot) -> Floats:
        """(B,), the losses of the model in training mode."""
        return self._run(values, training=True)

    def reset(self) -> None:
        """Puts back everything that runs of the model may have changed."""
        statistics._assign_all(self._state)

    def end(self) -> None:
        """Does the same at the end, and resets the metrics that the first loss has created."""
        known = {id(variable) for variable, _ in self._state}
        for metric in self._model.metrics:
            if not all(id(variable) in known for variable in metric.variables):
                metric.reset_state()
        self.reset()

    def _run(self, values: statistics.Snapshot, training: bool) -> Floats:
        found = []
        self.reset()  # the same seeds each time
        for variable, value in statistics._matching(self.norms, values):
            variable.assign(value)
        for x, y, weights in self._batches:
            predicted = self._model(tree.map_structure(ops.convert_to_tensor, x), training=training)
            loss = self._model.compute_loss(
                x=x, y=_tensors(y), y_pred=predicted, sample_weight=_tensors(weights)
            )
            found.append(float(ops.convert_to_numpy(loss)))
        return np.array(found)

    def mean(self, losses: Floats) -> float:
        return float(np.sum(losses * self.rows) / np.sum(self.rows))

    def error(self, differences: Floats) -> float:
        """Standard error of the mean of the differences."""
        if len(differences) < 2:
            return 0.0
        share = self.rows / np.sum(self.rows)
        spread = np.sum(share**2 * (differences - self.mean(differences)) ** 2)
        return float(np.sqrt(spread * len(differences) / (len(differences) - 1)))


def _tensors(values: Any) -> Any:
    return tree.map_structure(lambda v: None if v is None else ops.convert_to_tensor(v), values)


# The training mode of `fit` ----------------------------------------------------------------------


def _no_training_mode(model: Any, trials: _Trials, x: Any) -> Cause | None:
    """The cause, if the training step of Keras cannot put the model's layers in training mode.

    It passes `training` only to a `call` with this argument. On JAX it runs `call` directly, which
    sets no mode for the layers within, so that `call` must pass `training` on.
    """
    if type(model).train_step.__module__.partition(".")[0] != "keras":
        return None
    untold = [str(model.name)]
    if not _has_switch(model):
        fault = "has no argument `training`: fit calls it as inference does"
    elif keras.backend.backend() == "jax" and (untold := _not_handed_on(model, trials, x)):
        fault = (
            f"does not hand `training` on to {', '.join(untold[:3])}"
            f"{', ...' if len(untold) > 3 else ''}: on JAX fit calls them as inference does"
        )
    else:
        return None
    evidence = (
        f"{type(model).__name__}.call {fault}, and no moving statistics move, nor is anything "
        "dropped out."
    )
    return Cause(
        "no training mode", math.nan, 0.0, tuple((name, math.nan) for name in untold), evidence
    )


def _not_handed_on(model: Any, trials: _Trials, x: Any) -> list[str]:
    """Layers that a call of the model puts in training mode but its training step does not."""
    switched = {**trials.norms, **trials.random}
    names = {id(layer): name for name, layer in switched.items()}
    modes: dict[str, list[bool]] = {}

    def handler(layer: Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        modes.setdefault(names[id(layer)], []).append(bool(kwargs.get("training")))
        return call(*args, **kwargs)

    def modes_of(call: Any) -> dict[str, list[bool]]:
        modes.clear()
        with keras.StatelessScope(), intercepted(switched.values(), handler):
            call(tree.map_structure(ops.convert_to_tensor, x), training=True)
        return dict(modes)

    called, trained = modes_of(model), modes_of(model.call)
    return [name for name in called if any(called[name]) and not any(trained.get(name, [True]))]


# Values that are not finite ----------------------------------------------------------------------


def _finite(value: Any) -> bool:
    leaves = [np.asarray(as_numpy(v)) for v in tree.flatten(value) if v is not None]
    return all(bool(np.all(np.isfinite(v))) for v in leaves if v.dtype.kind in "fc")


def _not_finite(model: Any, batches: Sequence[Batch]) -> Cause | None:
    """The cause of non-finite values: the data, a variable, or the first layer that makes them."""

    def cause(name: str, evidence: str) -> Cause:
        return Cause("non-finite values", math.nan, 0.0, ((name, math.nan),), evidence)

    for number, batch in enumerate(batches):
        if not _finite(batch):
            return cause("data", f"NaN or infinite values in batch {number} of the data.")
    for path, layer in [*statistics._inside(model), ("model", model)]:
        for variable in getattr(layer, "_trainable_variables", []) + getattr(
            layer, "_non_trainable_variables", []
        ):
            if not _finite(copy_of(variable)):
                return cause(path, f"NaN or infinite values in {variable.name} of layer {path!r}.")
    for training in (False, True):
        name = _first_not_finite(model, batches, training)
        if name is not None:
            mode = "training" if training else "inference"
            return cause(name, f"Layer {name!r} makes them of finite inputs, in {mode} mode.")
    return None


def _first_not_finite(model: Any, batches: Sequence[Batch], training: bool) -> str | None:
    leaves = _leaf_layers(model)
    ids = {id(y) for y in leaves}
    names = {id(y): path for path, y in statistics._inside(model) if id(y) in ids}
    found: list[str] = []

    def handler(layer: Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        if not found and not _finite(tree.map_structure(_host, y)):
            found.append(names[id(layer)])
        return y

    with intercepted(leaves, handler), nothing_compiled():
        for x, _, _ in batches:
            y = model(tree.map_structure(ops.convert_to_tensor, x), training=training)
            if found:
                return found[0]
            if not _finite(tree.map_structure(_host, y)):
                return str(model.name)
    return None


def _host(value: Any) -> Any:
    if value is None or not ops.is_tensor(value):
        return value
    dtype = keras.backend.standardize_dtype(value.dtype)
    return ops.convert_to_numpy(ops.cast(value, "float32") if dtype == "bfloat16" else value)


# Masks -------------------------------------------------------------------------------------------


def _masks_lost(model: Any, trials: _Trials, batches: Sequence[Batch]) -> dict[str, float]:
    """Normalization layer -> how far padding moves the statistics of its inputs, in sigma.

    Only for layers that get no mask although one that fits was there below them.
    """
    seen: list[npt.NDArray[Any]] = []
    pairs: dict[int, tuple[Moments, Moments]] = {}
    norms = {id(y) for y in trials.norms.values()}

    def handler(layer: Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        mask = next((m for m in map(mask_of, tree.flatten(args)[:1]) if m is not None), None)
        if mask is not None:
            seen.append(np.asarray(_host(mask)))
        elif args and ops.is_tensor(args[0]):
            mask = layer.compute_mask(args[0], None)  # a mask that this layer creates
            seen.extend([] if mask is None else [np.asarray(_host(mask))])
        if id(layer) in norms and kwargs.get("mask") is None:
            x = np.asarray(_host(args[0] if args else kwargs["inputs"]))
            axis = layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
            fitting = [m for m in seen if _fits(m, x.shape, axis) and not np.all(m)]
            if fitting:
                whole, part = pairs.setdefault(id(layer), (Moments(axis), Moments(axis)))
                whole.update(x)
                part.update(x, mask=fitting[-1])
        return call(*args, **kwargs)

    with intercepted(_leaf_layers(model), handler), nothing_compiled():
        for x, _, _ in batches[:8]:
            seen.clear()
            model(tree.map_structure(ops.convert_to_tensor, x), training=False)
    found: dict[str, float] = {}
    for name, layer in trials.norms.items():
        if id(layer) in pairs:
            whole, part = pairs[id(layer)]
            if not part.empty:
                values, base = ((m.mean, m.variance()) for m in (whole, part))
                moved = MEAN_VARIANCE.distance(values, base, layer.epsilon)
                found[name] = rms(np.nan_to_num(moved))
    return found


def _fits(mask: npt.NDArray[Any], shape: tuple[int, ...], axis: int | tuple[int, ...]) -> bool:
    """Whether a mask says which positions of an input count, without distinguishing channels."""
    channels = {a % len(shape) for a in ((axis,) if isinstance(axis, int) else axis)}
    apart = any(a in channels and n > 1 for a, n in enumerate(mask.shape))
    return mask.shape == shape[: mask.ndim] and not apart


# From inference to training ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Stale:
    """Old statistics of a layer compared with exact ones."""

    off: float  # the distance in sigma, root mean square
    share: float  # best-fitting share of the initial 0 and 1; NaN if the data's are 0 and 1 too
    explained: float  # the part of the squared distance that this share explains


def _stale(name: str, old: statistics.Snapshot, new: statistics.Snapshot) -> _Stale:
    """After n updates an average has a share 1 - m^n of the data and m^n of the initial values."""
    kind, epsilon = kind_by_names(new.statistics[name]), new.epsilons[name]
    values, old_values = new.values(name), old.values(name)
    off = kind.offset(old_values, values, epsilon)
    initial = kind.offset(kind.initial(values), values, epsilon)
    if rms(initial) < _STALE or rms(off) == 0:
        return _Stale(rms(off), 0.0 if rms(initial) >= _STALE else math.nan, 0.0)
    share = float(np.sum(off * initial) / np.sum(initial**2))
    explained = 1 - float(np.sum((off - share * initial) ** 2) / np.sum(off**2))
    return _Stale(rms(off), share, explained)


def _cold(stale: Mapping[str, _Stale]) -> list[str]:
    """The layers whose statistics have not yet left the initial values.

    All layers of a model have had about the same number of updates. If only one is near 0 and 1,
    that is by chance, because the data has moved away from them.
    """
    usual = float(np.median([s.share for s in stale.values() if not math.isnan(s.share)] or [0.0]))
    return [
        name
        for name, s in stale.items()
        if s.off >= _STALE and s.explained > 0.8 and _COLD < s.share < min(1.2, 2 * usual)
    ]


def _frozen(layer: Layer) -> bool:
    """Whether the layer normalizes by its moving statistics in training too."""
    return not layer.trainable or getattr(layer, "use_batch_statistics", None) is False


@dataclass
class _Parts:
    """What one cause changes, layer by layer."""

    layers: list[tuple[str, Floats]] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)


def _as_causes(parts: Mapping[str, _Parts], trials: _Trials, loss: float) -> tuple[Cause, ...]:
    causes = []
    tolerance = max(1e-6, _ROUNDING * abs(loss)) if math.isfinite(loss) else 1e-6
    for name, part in parts.items():
        if not any(np.any(d) for _, d in part.layers):
            continue  # no effect, to the last bit
        total = np.sum([d for _, d in part.layers], axis=0)
        layers = tuple((layer, trials.mean(d)) for layer, d in part.layers)
        evidence = "; ".join(part.evidence[:3]) + ("; ..." if len(part.evidence) > 3 else "")
        size = trials.mean(total), trials.error(total)
        causes.append(Cause(name, *size, layers, evidence, tolerance))
    return tuple(sorted(causes, key=lambda c: (not c.significant, -abs(c.change))))


def _exact(model: Any, batches: Sequence[Batch], layers: Sequence[Layer]) -> statistics.Snapshot:
    """The statistics of these batches in these layers; the model is left unchanged."""
    before = statistics.snapshot(model)
    inputs = joined([x for x, _, _ in batches])
    statistics.reestimate(model, inputs, samples=None, layers=layers)
    found = statistics.snapshot(model)
    statistics.restore(model, before)
    return found


def _mixed(
    old: statistics.Snapshot, new: statistics.Snapshot, names: Iterable[str]
) -> statistics.Snapshot:
    replaced = {name: new.statistics[name] for name in names}
    return statistics.Snapshot({**old.statistics, **replaced}, old.epsilons)


def _calls_of(model: Any, trials: _Trials, batch: Batch) -> dict[str, int]:
    """Normalization or random layer, in the order of their first calls -> number of its calls."""
    switched = {**trials.norms, **trials.random}
    names = {id(layer): name for name, layer in switched.items()}
    calls: dict[str, int] = {}

    def handler(layer: Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        calls[names[id(layer)]] = calls.get(names[id(layer)], 0) + 1
        return call(*args, **kwargs)

    with intercepted(switched.values(), handler), functions_by_python():
        model(tree.map_structure(ops.convert_to_tensor, batch[0]), training=False)
    return calls


def _steps(model: Any, trials: _Trials, batches: Sequence[Batch]) -> tuple[float, float, Any]:
    """Inference loss, training loss, and the parts of the difference."""
    parts: dict[str, _Parts] = {}
    order = _calls_of(model, trials, batches[0])
    live = [n for n in order if n in trials.norms and not _frozen(trials.norms[n])]
    frozen = [n for n in order if n in trials.norms and n not in live]
    lost = _masks_lost(model, trials, batches)
    old = statistics.snapshot(model)
    new = _exact(model, batches, [trials.norms[n] for n in live]) if live else old
    first = before = trials.losses(old)
    stale = {name: _stale(name, old, new) for name in live}
    cold = _cold(stale)

    def add(cause: str, name: str, after: Floats, evidence: str = "") -> None:
        nonlocal before
        part = parts.setdefault(cause, _Parts())
        part.layers.append((name, before - after))
        if evidence:
            part.evidence.append(f"{name}: {evidence}")
        before = after

    for k, name in enumerate(live):
        after = trials.losses(_mixed(old, new, live[: k + 1]))
        if lost.get(name, 0.0) > _MASKS:
            add("masks", name, after, f"gets no mask; padding moves it by {lost[name]:.2g} sigma")
        elif name in cold:
            text = f"{100 * stale[name].share:.0f}% of its statistics are still the initial 0 and 1"
            add("cold statistics", name, after, text)
        else:
            add("domain shift", name, after, f"its statistics are {stale[name].off:.2g} sigma off")
    exact = before
    for k, name in enumerate(live):
        after = trials.losses(new, live[: k + 1])
        if order[name] > 1:
            add("shared layers", name, after, f"is called {order[name]} times")
        else:
            add("small batches", name, after)
    random = [n for n in order if n in trials.random]
    for k, name in enumerate(random):
        add("dropout", name, trials.losses(new, [*live, *random[: k + 1]]))
    last = trials.training_losses(old)
    add("other layers", str(model.name), last)
    if frozen:
        now = _exact(model, batches, [trials.norms[n] for n in [*live, *frozen]])
        before = exact
        for k, name in enumerate(frozen):
            off = _stale(name, old, now).off
            done = [n for n in order if n in live or n in frozen[: k + 1]]
            text = f"its statistics, frozen, are {off:.2g} sigma off"
            add("frozen layers", name, trials.losses(_mixed(old, now, done)), text)
    return trials.mean(first), trials.mean(last), parts


def diagnose(
    model: Any, data: Any, samples: int, batch_size: int, seed: int, name: str | None
) -> Diagnosis:
    """See `keras_norm.statistics.diagnose`."""
    for key, value in (("samples", samples), ("batch_size", batch_size)):
        if not (is_integer(value) and value >= 1):
            raise ValueError(
                f"`{key}` is a number of examples and must be an integer >= 1. Received: "
                f"{key}={value!r}."
            )
    statistics._check_seed(seed)
    if not getattr(model, "compiled", False):
        raise ValueError(
            "A diagnosis compares losses: the model must be compiled. Received: model "
            f"{getattr(model, 'name', model)!r}, not compiled. Call model.compile first."
        )
    batches = _batches_of(data, samples, batch_size, seed)
    with statistics._transaction(model, []):
        trials = _Trials(model, batches)
        try:
            cause = _not_finite(model, batches)
            trials.reset()
            if cause is not None:
                now = statistics.snapshot(model)
                inference = trials.mean(trials.losses(now))
                training = trials.mean(trials.training_losses(now))
                causes: tuple[Cause, ...] = (cause,)
            else:
                inference, training, parts = _steps(model, trials, batches)
                causes = _as_causes(parts, trials, max(abs(inference), abs(training)))
        finally:
            trials.end()
    if (untold := _no_training_mode(model, trials, batches[0][0])) is not None:
        causes = (untold, *causes)
    rows, shown = trials.rows, name or describe(data)
    return Diagnosis(shown, int(rows.sum()), int(rows.max()), inference, training, causes)

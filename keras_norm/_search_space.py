"""Hypermodels: functions from KerasTuner's hyperparameters to a model and how it is trained.

A space is a function `space(hp, task) -> Candidate`. It may be called many times, including to find
out which hyperparameters there are, so it should leave building the model to `Candidate.model`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_norm import datasets, layers, models, optimizers
from keras_norm._search_settings import SearchError, Settings, TrialRecord

__all__ = [
    "CROSSENTROPY",
    "Candidate",
    "SmoothedCrossentropy",
    "Task",
    "count_flops",
    "defaults",
    "explore",
    "hyperparameters",
    "images",
    "narrow",
    "pin",
    "space_of",
    "strangers",
    "unchanged",
]

_MOST_CALLS = 2000  # calls of a space after which the search for hidden parts stops
_FEW = 6  # so few values of a whole number are all tried, to see what they reveal
_ROUNDING = 1e-6  # of a step: values closer than this to a grid point are on it


CROSSENTROPY = "crossentropy"  # a metric without penalties and smoothing, for comparisons


@dataclass(frozen=True)
class Task:
    """What a space may use about the task.

    Attributes:
        data: name of the data set, as in `keras_norm.datasets.load`.
        input_shape: (H, W, C) of one image.
        classes: number of classes.
        examples: number of training images.
        epochs: number of epochs that schedules are planned for.
        families: families of nets to choose from.
    """

    data: str
    input_shape: tuple[int, int, int]
    classes: int
    examples: int
    epochs: int
    families: tuple[str, ...] = ("mlp", "cnn")

    def steps(self, batch_size: int) -> int:
        """Training steps in all epochs."""
        return math.ceil(self.examples / batch_size) * self.epochs


@dataclass(frozen=True)
class Candidate:
    """A model to train and how to train it; a space returns this.

    Args:
        model: a function that makes the model: functional or Sequential, with its input shape, and
            compiled, with the metric "accuracy". (Or the model itself: it is then built even when
            only its hyperparameters are needed.) A metric named "crossentropy" is used for the
            objective "val_loss" and the test loss, because the compiled loss includes the trial's
            penalties and label smoothing, and cannot be compared with that of another trial.
        batch_size: images per batch.
        augment: of `Split.batches`. Default: None.
        callbacks: of `fit`, a list or tuple, placed before those of the search. When a trial
            resumes after an interruption, or continues in a later round of Hyperband, their
            `variables`, a list of `keras.Variable` such as the slow weights of
            `callbacks.Lookahead`, are restored, after a call of `build(model)` if there is one.
            All other state of callbacks starts again: the patience of `ReduceLROnPlateau` and
            `EarlyStopping`, the average of `AverageWeights`. Default: none.
        begin: called with (model, training images) before the first epoch. Default: None.
    """

    model: Callable[[], keras.Model] | keras.Model
    batch_size: int
    augment: Any = None
    callbacks: Sequence[keras.callbacks.Callback] = field(default_factory=tuple)
    begin: Callable[[keras.Model, Any], Any] | None = None

    def build(self) -> keras.Model:
        """The model."""
        return self.model if isinstance(self.model, keras.Model) else self.model()


@keras.saving.register_keras_serializable(package="keras_norm")
class SmoothedCrossentropy(keras.losses.Loss):  # type: ignore[misc]
    """Cross entropy of logits and class numbers, with label smoothing.

        loss = -(1 - s) log p[y] - s mean_k log p[k],    p = softmax(logits)

    Args:
        label_smoothing: s in [0, 1). Default: 0.
        name: Default: "smoothed_crossentropy".
        **kwargs: of `keras.losses.Loss`.

    Reference: Szegedy et al., 2016, Rethinking the Inception Architecture, section 7.

    Example:
        >>> loss = SmoothedCrossentropy(0.1)
        >>> round(float(loss([0], [[2.0, 0.0]])), 6)  # 0.95 * 0.126928 + 0.05 * 2.126928
        0.226928
    """

    def __init__(
        self, label_smoothing: float = 0.0, name: str = "smoothed_crossentropy", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                "`label_smoothing` must lie in [0, 1). "
                f"Received: label_smoothing={label_smoothing!r}."
            )
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The loss of each example, (N,)."""
        log_p = ops.log_softmax(y_pred)  # (N, K)
        y = ops.reshape(ops.cast(y_true, "int32"), (-1, 1))  # (N, 1)
        true = ops.squeeze(ops.take_along_axis(log_p, y, axis=-1), -1)  # (N,)
        return -(1 - self.label_smoothing) * true - self.label_smoothing * ops.mean(log_p, -1)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


# The space of this package ------------------------------------------------------------------


def images(hp: Any, task: Task) -> Candidate:
    """Nets for images: family, architecture, normalization, regularization, optimizer, schedule.

    Args:
        hp: `keras_tuner.HyperParameters`.
        task: the task.

    Returns:
        The `Candidate` that the values in `hp` stand for.
    """
    family = hp.Choice("family", list(task.families))
    activation = hp.Choice("activation", ["relu", "gelu", "silu"])
    factory = _normalization(hp)
    placement = hp.Choice("placement", ["before", "after"], parent_name="family",
                          parent_values=["mlp", "cnn"])  # fmt: skip
    dropout = hp.Choice("dropout", [0.0, 0.1, 0.2, 0.3, 0.5], parent_name="family",
                        parent_values=["mlp", "cnn"])  # fmt: skip
    l2 = hp.Float("l2", 1e-7, 1e-3, sampling="log", parent_name="family",
                  parent_values=["mlp", "cnn"])  # fmt: skip
    smoothing = hp.Choice("label_smoothing", [0.0, 0.05, 0.1])
    batch_size = hp.Choice("batch_size", [32, 64, 128, 256])
    common: dict[str, Any] = {"input_shape": task.input_shape, "classes": task.classes}
    if family != "fast":
        common |= {
            "placement": placement,
            "dropout": dropout,
            "kernel_regularizer": keras.regularizers.L2(l2),
        }
    nets = {"mlp": _mlp(hp), "cnn": _cnn(hp, task), "fast": _fast(hp)}
    net = functools.partial(nets[family], normalization=factory, activation=activation, **common)
    optimizer = _optimizer(hp, task.steps(batch_size))

    def compiled() -> keras.Model:
        model = net()
        loss = (
            SmoothedCrossentropy(smoothing)
            if smoothing
            else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        plain = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name=CROSSENTROPY)
        model.compile(optimizer(), loss, metrics=["accuracy", plain])
        return model

    augment = _augmentation(hp, task)
    return Candidate(compiled, batch_size, augment, begin=_begin if family == "fast" else None)


def _begin(model: keras.Model, x: Any) -> None:
    models.fit_whitening(model, x)


def _normalization(hp: Any) -> Any:
    kind = hp.Choice("normalization", ["batch", "ghost", "layer", "group", "rms", "none"])
    momentum = hp.Choice("momentum", [0.8, 0.9, 0.95, 0.99], default=0.9,
                         parent_name="normalization", parent_values=["batch", "ghost"])  # fmt: skip
    ghost = hp.Choice("ghost_size", [8, 16, 32], default=16, parent_name="normalization",
                      parent_values=["ghost"])  # fmt: skip
    if kind == "none":
        return None
    if kind not in ("batch", "ghost"):
        return kind
    return functools.partial(
        layers.BatchNormalization, momentum=momentum, virtual_batch_size=ghost or None
    )


def _mlp(hp: Any) -> Callable[..., keras.Model]:
    here = {"parent_name": "family", "parent_values": ["mlp"]}
    depth = hp.Int("mlp_depth", 1, 4, default=2, **here)
    width = hp.Choice("mlp_width", [64, 128, 256, 512], default=128, **here)
    taper = hp.Choice("mlp_taper", [0.5, 1.0], default=1.0, **here)
    hidden = [max(8, int(width * taper**i)) for i in range(depth)] if depth else []
    return lambda **common: models.MLP(hidden, **common)


def _cnn(hp: Any, task: Task) -> Callable[..., keras.Model]:
    here = {"parent_name": "family", "parent_values": ["cnn"]}
    halvings = max(1, int(math.log2(min(task.input_shape[:2]) // 2)))
    stages = hp.Int("cnn_stages", 1, min(4, halvings), default=min(3, halvings), **here)
    width = hp.Choice("cnn_width", [8, 16, 32, 64], default=16, **here)
    growth = hp.Choice("cnn_growth", [1.0, 1.5, 2.0], default=2.0, **here)
    options = {
        "blocks": hp.Int("cnn_blocks", 1, 2, **here),
        "kernel_size": hp.Choice("cnn_kernel", [3, 5], **here),
        "downsample": hp.Choice("cnn_downsample", ["max_pool", "average_pool", "stride"], **here),
        "residual": hp.Boolean("cnn_residual", **here),
        "head": hp.Choice("cnn_head", ["average", "max", "flatten"], **here),
    }
    widths = [int(width * growth**i) for i in range(stages)] if stages else []
    return lambda **common: models.CNN(widths, **options, **common)


def _fast(hp: Any) -> Callable[..., keras.Model]:
    here = {"parent_name": "family", "parent_values": ["fast"]}
    first = hp.Choice("fast_width", [16, 32, 64], default=32, **here)
    second = hp.Choice("fast_growth", [1, 2, 4], default=2, **here)
    widths = [first, first * second, first * second] if first else []
    return lambda **common: models.FastConvNet(widths, **common)


def _augmentation(hp: Any, task: Task) -> Any:
    """The augmentation of a trial; digits are never flipped."""
    mirrored = task.data in ("cifar10", "fashion_mnist")
    kinds = ["none", "shift", "flip", "flip_shift"] if mirrored else ["none", "shift"]
    kind = hp.Choice("augmentation", kinds)
    if kind == "none":
        return None
    return datasets.FlipAndShift(
        shift=max(1, task.input_shape[0] // 16) if "shift" in kind else 0,
        flip="alternating" if "flip" in kind else "none",
    )


def _optimizer(hp: Any, steps: int) -> Callable[[], keras.optimizers.Optimizer]:
    kind = hp.Choice("optimizer", ["sgd", "rmsprop", "adam", "adamw"], default="adam")
    rates = (  # two names, because KerasTuner loses a value whose name is under two conditions
        hp.Float("sgd_learning_rate", 1e-3, 1.0, sampling="log", default=0.05,
                 parent_name="optimizer", parent_values=["sgd"]),
        hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3,
                 parent_name="optimizer", parent_values=["rmsprop", "adam", "adamw"]),
    )  # fmt: skip
    decay = hp.Float("weight_decay", 1e-4, 1e-1, sampling="log", default=4e-3,
                     parent_name="optimizer", parent_values=["adamw"])  # fmt: skip
    schedule = hp.Choice("schedule", ["constant", "cosine", "one_cycle"], default="cosine")
    peak = next(rate for rate in rates if rate is not None)
    rate: Any = peak
    if schedule == "cosine":
        rate = functools.partial(keras.optimizers.schedules.CosineDecay, peak, steps)
    elif schedule == "one_cycle":
        top = max(1, steps // 4)
        rate = functools.partial(
            optimizers.PiecewiseLinear, [0, top, max(steps, top + 1)], [peak / 5, peak, peak / 50]
        )

    def make() -> keras.optimizers.Optimizer:
        learning_rate = rate() if callable(rate) else rate
        if kind == "sgd":
            return optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)
        if kind == "adamw":
            return optimizers.AdamW(learning_rate, weight_decay=decay)
        return {"rmsprop": optimizers.RMSprop, "adam": optimizers.Adam}[kind](learning_rate)

    return make


def count_flops(model: keras.Model) -> int:
    """Floating-point operations of one forward pass, as `keras_norm.recipes.flops` counts them."""
    from keras_norm.recipes import flops

    return flops(model)


# Spaces by name -----------------------------------------------------------------------------


def space_of(reference: str) -> Callable[[Any, Task], Candidate]:
    """The function named by "images", "module:function" or "file.py:function"."""
    if reference == "images":
        return images
    place, colon, name = reference.rpartition(":")
    if not colon:
        raise SearchError(
            "space must be 'images', 'module:function' or 'file.py:function'. Received: "
            f"space={reference!r}"
        )
    try:
        module = (
            _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except (Exception, SystemExit) as error:
        raise SearchError(f"space={reference!r} cannot be had: {_reason(place, error)}") from None
    if not hasattr(module, name):
        raise SearchError(
            f"space={reference!r} cannot be had: there is no {name!r} in it. If it has another "
            "name or place now, give that with --space."
        )
    found = getattr(module, name)
    if not _takes_two(found):
        raise SearchError(
            "A space must be a function of (hp, task) that returns a Candidate. Received: "
            f"space={reference!r}, which is {_what(found)}."
        )
    return found


def _takes_two(found: Any) -> bool:
    """Whether it can be called with two arguments, as far as its signature is known."""
    try:
        inspect.signature(found).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # functions written in C may have no signature
        return True
    return True


def _what(found: Any) -> str:
    """How an object is named in a message."""
    if callable(found):
        return f"a function of {inspect.signature(found)}"
    return f"of type {type(found).__name__}"


def _reason(place: str, error: BaseException) -> str:
    """Why a space's file or module cannot be imported, and what to do."""
    if place.endswith(".py"):
        is_gone = not Path(place).is_file()
    else:
        is_gone = isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(
            f"{error.name}."
        )
    if is_gone:
        return f"{error}. If it has moved, name it with --space."
    if isinstance(error, ModuleNotFoundError):
        return f"{error}, which it imports. Install that, or put it beside the file of the space."
    return f"its code raises {type(error).__name__}: {error}. It must be importable."


def _from_file(path: Path) -> Any:
    """The module of a file, which can import its neighbours, as with `python FILE`."""
    name, folder = f"keras_norm_space_{path.stem}", str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module in {str(path)!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def explore(settings: Settings, task: Task) -> dict[str, Any]:
    """All hyperparameters of the space, including those that appear only with some values.

    First as KerasTuner does: the space is called with each condition fulfilled in turn. Then it is
    called with values other than the defaults, to find what is in a loop or behind a Python `if`.

    Returns:
        The config of `keras_tuner.HyperParameters`, without values.

    Raises:
        SearchError: for a number with a step of 0 or below.
    """
    import keras_tuner
    from keras_tuner.engine.base_tuner import BaseTuner

    space = space_of(settings.space)
    objective = keras_tuner.Objective(settings.objective, settings.direction)
    oracle = keras_tuner.oracles.RandomSearchOracle(objective, max_trials=1, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        BaseTuner(oracle, lambda hp: space(hp, task), directory=folder)
    found = dict(oracle.get_space().get_config(), values={})
    whole = _with_hidden(functools.partial(_called, space, task), found)
    _check_steps(settings, whole)
    return whole


def _check_steps(settings: Settings, space: Mapping[str, Any]) -> None:
    """Refuses a step of 0 or below: KerasTuner divides by the step of a number."""
    for entry in space["space"]:
        step = entry["config"].get("step")
        if step is not None and step <= 0:
            raise SearchError(
                f"The step of a number must be above 0: give another, or leave it out. Received: "
                f"step={step} of {entry['config']['name']!r} in the space {settings.space!r}."
            )


def _called(space: Callable[[Any, Task], Any], task: Task, hp: Any) -> None:
    """Calls a space; if values do not fit together, that is a failed trial, not a failed search."""
    with contextlib.suppress(Exception):
        space(hp, task)


def _with_hidden(call: Callable[[Any], None], space: dict[str, Any]) -> dict[str, Any]:
    """The space with what appears when a number, choice or switch is not at its default.

    They are changed one at a time, from the defaults and from the last values of each with which
    something appeared, so that nested loops are explored to their end.
    """
    starts: dict[str, dict[str, Any]] = {"": {}}
    seen: set[str] = set()
    while True:
        attempts = [
            (name, {**start, **_conditions(space, entry), name: value})
            for start in starts.values()
            for entry in space["space"]
            for name, value in _to_try(entry)
        ]
        attempts = [(n, v) for n, v in attempts if str(sorted(v.items())) not in seen]
        if not attempts or len(seen) > _MOST_CALLS:
            return space
        for name, values in attempts:
            seen.add(str(sorted(values.items())))
            hp = hyperparameters(space, values)
            for own in hp.space:  # (KerasTuner would draw these values)
                if hp.is_active(own):
                    hp.values.setdefault(own.name, own.default)
            call(hp)
            if len(hp.space) > len(space["space"]):
                space, starts[name] = dict(hp.get_config(), values={}), values


def _to_try(entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values on which a program may branch; for many numbers, the first and the last."""
    config, kind = entry["config"], entry["class_name"]
    values: Sequence[Any] = []
    if kind == "Boolean":
        values = [False, True]
    elif kind == "Choice":
        values = config["values"]
    elif kind == "Int":
        low, high = config["min_value"], config["max_value"]
        step = config["step"] if config["sampling"] == "linear" else high - low
        values = range(low, high + 1, step or 1)
    if kind == "Int" and len(values) > _FEW:
        values = [values[0], values[-1]]
    return [(config["name"], value) for value in values]


def _conditions(space: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Values with which the hyperparameter exists."""
    found: dict[str, Any] = {}
    for condition in (c["config"] for c in entry["config"]["conditions"]):
        parent = next(e for e in space["space"] if e["config"]["name"] == condition["name"])
        found |= {**_conditions(space, parent), condition["name"]: condition["values"][0]}
    return found


def strangers(hp: Any, space: Mapping[str, Any]) -> list[str]:
    """Hyperparameters that a call with `hp` has asked for, and that the space does not have."""
    known = {e["config"]["name"] for e in space["space"]}
    asked = [h.name for h in hp.space if hp.is_active(h)]
    return [name for name in dict.fromkeys(asked) if name not in known]


def hyperparameters(space: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """`keras_tuner.HyperParameters` of a space. (KerasTuner changes the config that it reads.)"""
    import keras_tuner

    config = copy.deepcopy({"space": space["space"], "values": dict(values)})
    return keras_tuner.HyperParameters.from_config(config)


def defaults(space: Mapping[str, Any]) -> dict[str, Any]:
    """The default of each hyperparameter that exists when all are at their defaults."""
    hp = hyperparameters({"space": []}, {})
    for entry in hyperparameters(space, {}).space:
        hp.merge([entry])
        if hp.is_active(entry):
            hp.values.setdefault(entry.name, entry.default)
    return dict(hp.values)


# Narrower spaces ----------------------------------------------------------------------------


def pin(space: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The space with some hyperparameters at one value.

    Raises:
        SearchError: for a name or a value that the space does not have.
    """
    entries = list(space["space"])
    for name, value in fixed.items():
        own = [e for e in entries if e["config"]["name"] == name]
        if not own:
            names = sorted({e["config"]["name"] for e in entries})
            raise SearchError(f"The space has no {name!r} to fix. It has: {', '.join(names)}.")
        allowed = [_coerced(e, value) for e in own]
        if all(a is None for a in allowed):
            raise SearchError(f"{name} cannot be {value!r}: it is {_range(own)}.")
        entries = [
            _constant(e, _coerced(e, value)) if e in own and _coerced(e, value) is not None else e
            for e in entries
        ]
    return _possible(entries)


def _coerced(entry: Mapping[str, Any], value: Any) -> Any:
    """The value in the hyperparameter's type, or None if it cannot have that value."""
    config, kind = entry["config"], entry["class_name"]
    try:
        if kind in ("Choice", "Fixed"):
            values = config["values"] if kind == "Choice" else [config["value"]]
            return next((v for v in values if v == value or str(v) == str(value)), None)
        if kind == "Boolean":
            return {"true": True, "false": False}.get(str(value).lower())
        if kind == "Int" and float(value) != int(float(value)):
            return None
        number: float = int(float(value)) if kind == "Int" else float(value)
    except (TypeError, ValueError, OverflowError):  # the last for an infinite whole number
        return None
    is_inside = config["min_value"] <= number <= config["max_value"]
    return number if is_inside and _is_on_grid(config, number) else None


def _is_on_grid(config: Mapping[str, Any], value: float) -> bool:
    """Whether a value in the range is on the grid of its step."""
    low, high, step = config["min_value"], config["max_value"], config["step"]
    if not step:
        return True
    if config["sampling"] == "linear":
        place = (value - low) / step
    else:
        ratio = value / low if config["sampling"] == "log" else (high - value + low) / low
        place = math.log(ratio) / math.log(step)
    return abs(place - round(place)) < _ROUNDING


def _range(entries: Sequence[Mapping[str, Any]]) -> str:
    def one(entry: Mapping[str, Any]) -> str:
        config = entry["config"]
        if entry["class_name"] == "Choice":
            return "one of " + ", ".join(map(str, config["values"]))
        if entry["class_name"] == "Fixed":
            return str(config["value"])
        if entry["class_name"] == "Boolean":
            return "true or false"
        kind = "a whole number " if entry["class_name"] == "Int" else ""
        told = f"{kind}between {config['min_value']:g} and {config['max_value']:g}"
        step, of_what = config["step"], "steps" if config["sampling"] == "linear" else "factors"
        is_plain = not step or (kind and of_what == "steps" and step == 1)
        return told if is_plain else f"{told}, in {of_what} of {step:g}"

    return ", or ".join(dict.fromkeys(map(one, entries)))


def _constant(entry: Mapping[str, Any], value: Any) -> dict[str, Any]:
    config = entry["config"]
    kept = {"name": config["name"], "conditions": config["conditions"]}
    return {"class_name": "Fixed", "config": {**kept, "value": value}}


def narrow(space: Mapping[str, Any], best: Sequence[TrialRecord]) -> dict[str, Any]:
    """The space around the best trials of an earlier search.

    A choice keeps the values that the trials have (ordered ones also those between). A range goes
    from the smallest to the largest value that they have, and a tenth of the whole range beyond, on
    its logarithmic scale if it has one; whole numbers and steps keep the values inside. A
    hyperparameter that none of the trials used stays as it is.
    """
    entries = []
    for entry in space["space"]:
        parents = [c["config"] for c in entry["config"]["conditions"]]
        own = [
            r.values[entry["config"]["name"]]
            for r in best
            if entry["config"]["name"] in r.values
            and all(r.values.get(p["name"]) in p["values"] for p in parents)
        ]
        entries.append(_narrowed(entry, own) if own else entry)
    return _possible(entries)


def unchanged(space: Mapping[str, Any], best: Sequence[TrialRecord], earlier: str) -> str:
    """Explains why narrowing a space around these trials leaves it as it is."""
    names = {e["config"]["name"] for e in space["space"]}
    if not any(names & set(r.values) for r in best):
        own = sorted({n for r in best for n in r.hyperparameters})
        return (
            f"refine={earlier!r} has no hyperparameter in common with this space: it has "
            f"{', '.join(own)}; the space has {', '.join(sorted(names))}."
        )
    return (
        f"refine={earlier!r} narrows nothing: its best {len(best)} lie all over the space. Take "
        "fewer of them by refine_top, or leave refine out."
    )


def _narrowed(entry: Mapping[str, Any], own: Sequence[Any]) -> Mapping[str, Any]:
    config, kind = dict(entry["config"]), entry["class_name"]
    if kind == "Boolean":
        return _constant(entry, own[0]) if len(set(own)) == 1 else entry
    if kind == "Choice":
        values = config["values"]
        places = sorted(values.index(v) for v in own if v in values)
        if places:
            inside = range(places[0], places[-1] + 1) if config["ordered"] else sorted(set(places))
            config["values"] = [values[i] for i in inside]
    elif kind in ("Int", "Float") and (config["sampling"] in ("linear", "log")):
        config |= _narrowed_range(config, own, whole=kind == "Int")
    if "values" in config and config.get("default") not in config["values"]:
        config["default"] = config["values"][0]
    return {**entry, "config": config}


def _narrowed_range(config: Mapping[str, Any], own: Sequence[Any], whole: bool) -> dict[str, Any]:
    there = math.log if config["sampling"] == "log" else float
    back = math.exp if config["sampling"] == "log" else float
    low, high, default = config["min_value"], config["max_value"], config["default"]
    margin = (there(high) - there(low)) / 10
    inside = [min(max(v, low), high) for v in own]  # the earlier range may have been wider
    first, last = min(inside), max(inside)
    least, most = back(there(first) - margin), back(there(last) + margin)
    least, most = max(low, min(least, first)), min(high, max(most, last))
    if config["step"]:
        least, most = _on_grid(config, (least, first, last, most))
    elif whole:
        least = min(math.ceil(least), math.floor(first))
        most = max(math.floor(most), math.ceil(last))
    least, most = (int(least), int(most)) if whole else (least, most)
    is_inside = default is not None and least <= default <= most
    return {"min_value": least, "max_value": most, "default": default if is_inside else least}


def _on_grid(config: Mapping[str, Any], values: Sequence[float]) -> tuple[float, float]:
    """Ends of a narrower range with a step, which is a factor if the sampling is logarithmic.

    Args:
        config: of the whole range; its points from the minimum on are the grid.
        values: the earliest and the latest place for the range to begin, and the earliest and the
            latest place for it to end.
    """
    low, high, step = config["min_value"], config["max_value"], config["step"]
    is_log = config["sampling"] == "log"

    def place(value: float) -> float:
        return math.log(value / low) / math.log(step) if is_log else (value - low) / step

    least, first, last, most = map(place, values)
    # The last point, from 0, as KerasTuner counts: of [0, 0.5] by 0.1 it is 0.4.
    end = math.floor(place(high) + _ROUNDING) if is_log else int((high - low) // step)
    begin = min(end, math.ceil(least - _ROUNDING), math.floor(first + _ROUNDING))
    end = min(end, max(math.floor(most + _ROUNDING), math.ceil(last - _ROUNDING)))
    if is_log:
        return low * step**begin, low * step**end
    least, most = low + begin * step, low + end * step
    while (most - least) // step < end - begin:  # KerasTuner would leave the last point out
        most = math.nextafter(most, math.inf)
    return least, most


def _can_be(entry: Mapping[str, Any], value: Any) -> bool:
    config, kind = entry["config"], entry["class_name"]
    if kind in ("Int", "Float"):
        return bool(config["min_value"] <= value <= config["max_value"])
    return value in {"Choice": config.get("values"), "Fixed": [config.get("value")]}.get(
        kind, [True, False]
    )


def _possible(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The space without the hyperparameters whose conditions no value fulfils any more."""
    kept: list[Mapping[str, Any]] = []
    left: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        config = entry["config"]
        conditions = [c["config"] for c in config["conditions"]]
        if all(
            any(_can_be(e, v) for e in left.get(c["name"], []) for v in c["values"])
            for c in conditions
        ):
            kept.append(entry)
            left.setdefault(config["name"], []).append(entry)
    return {"space": kept, "values": {}}

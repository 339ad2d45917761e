"""One trial: a model is built, trained and judged in a process of its own.

After each epoch the whole state (model, optimizer, callbacks' variables and history) is written to
one file. So a trial that was killed resumes from there, and ends with the same numbers to the last
bit: the seed comes from the search and the trial's number, and the order of the images from seed
and epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np

from keras_norm import datasets, models, statistics
from keras_norm._arrays import is_integer
from keras_norm._files import clear_remains, no_room, replace_file
from keras_norm._kinds import has_statistics
from keras_norm._search_process import Channel, can_fork, introduce
from keras_norm._search_settings import (
    SearchError,
    Settings,
    refined_from,
)
from keras_norm._search_space import (
    CROSSENTROPY,
    Candidate,
    SmoothedCrossentropy,
    Task,
    count_flops,
    defaults,
    explore,
    hyperparameters,
    narrow,
    pin,
    space_of,
    strangers,
    unchanged,
)
from keras_norm.callbacks import ReestimateStatistics
from keras_norm.recipes import storable

__all__ = [
    "EVALUATION_BATCH",
    "brief",
    "check_names",
    "comparable_loss",
    "count_flops",
    "describe_space",
    "has_moving_statistics",
    "load",
    "load_state",
    "make_candidate",
    "measure",
    "preload",
    "reestimated",
    "run",
    "save_state",
    "scalars",
    "trial_seed",
]

EVALUATION_BATCH = 500
_REESTIMATED_FROM = 10_000  # images

# Lines in messages of Keras and TensorFlow that come before the one that says what is wrong.
_SAYS_NOTHING = re.compile(
    r"Exception encountered when calling .*|Graph execution error:|<stack traces unavailable>"
    r"|Detected at node .*:|File \".*|Could not automatically infer .* Error encountered:|"
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class TrialError(Exception):
    """The trial failed, for the reason given."""


class StateError(Exception):
    """The state of the trial cannot be written, which is not the trial's fault."""


# Data and model -----------------------------------------------------------------------------


def load(settings: Settings, *, all_images: bool = False) -> datasets.Data:
    """The data of a search; with `all_images`, the validation images are trained on too."""
    return _load(*_key(settings, all_images))


def _key(settings: Settings, all_images: bool) -> tuple[Any, ...]:
    held_out = 0 if all_images else settings.validation
    return settings.data, settings.subset, held_out, settings.data_dir


def _load(*key: Any) -> datasets.Data:
    name, subset, validation, data_dir = key
    if key not in _LOADED:
        parts = None if subset is None else {"train": subset}
        _LOADED[key] = datasets.load(
            name, validation=validation, subset=parts, stratify=True, data_dir=data_dir
        )
    return _LOADED[key]


_LOADED: dict[tuple[Any, ...], datasets.Data] = {}


def preload(spec: dict[str, Any]) -> None:
    """In a nursery: loads the data and the space for all its children.

    Reading the data may start threads, so a child does it and writes them to a file, which the
    nursery maps into its memory. The file has no name, so a killed process leaves nothing behind.
    """
    settings, all_images = Settings.of(spec["settings"]), spec.get("all_images", False)
    space_of(settings.space)
    if not can_fork():
        return
    make = functools.partial(load, settings, all_images=all_images)
    with tempfile.TemporaryFile(dir=spec["folder"]) as arrays:
        data = _made_elsewhere(make, arrays, spec["folder"])
    _LOADED.clear()
    _LOADED[_key(settings, all_images)] = data


def _made_elsewhere(make: Callable[[], Any], arrays: IO[bytes], folder: str) -> Any:
    """What a child makes; its arrays are in a file that is mapped read-only."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        introduce("kn-data")
        _leave(make, arrays, writing, folder)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not told:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        raise SearchError(f"The process that read the data has died {how}.")
    content, places = pickle.loads(told)
    if places is None:
        raise SearchError(content)
    size = arrays.seek(0, os.SEEK_END)
    view = memoryview(mmap.mmap(arrays.fileno(), size, access=mmap.ACCESS_READ) if size else b"")
    return pickle.loads(content, buffers=[view[start:end] for start, end in places])


def _leave(make: Callable[[], Any], arrays: IO[bytes], writing: int, folder: str) -> None:
    """Writes the arrays of what is made to a file and the rest to a pipe; never returns.

    The rest is (pickle, where the arrays begin and end), or (what went wrong, None).
    """
    told: tuple[Any, Any]
    try:
        try:
            buffers: list[pickle.PickleBuffer] = []
            content = pickle.dumps(make(), protocol=5, buffer_callback=buffers.append)
            try:
                told = content, [_appended(buffer.raw(), arrays) for buffer in buffers]
                arrays.flush()
            except OSError as error:
                told = f"The data cannot be kept in {folder!r}: {error.strerror}.", None
        except Exception as error:
            told = brief(error), None
            print_traceback()
        with open(writing, "wb") as pipe:
            pickle.dump(told, pipe)
    finally:
        os._exit(0)


def _appended(raw: memoryview, file: IO[bytes]) -> tuple[int, int]:
    """Appends an array to a file; returns where it begins, a multiple of 64 bytes, and ends."""
    start = -(-file.tell() // 64) * 64
    file.seek(start)
    file.write(raw)
    return start, start + len(raw)


def task_of(settings: Settings, data: datasets.Data) -> Task:
    """What the space may use: the `Task`."""
    return Task(
        data=data.name,
        input_shape=data.input_shape,
        classes=data.classes,
        examples=len(data.train),
        epochs=settings.epochs,
        families=settings.families,
    )


def describe_space(channel: Channel, spec: dict[str, Any]) -> None:
    """A process that sends the search's space for the task, narrowed and with fixed values."""

    settings = Settings.of(spec["settings"])
    try:
        whole = explore(settings, task_of(settings, load(settings)))
        space: Mapping[str, Any] = whole
        if settings.refine is not None and not spec["resume"]:
            space = narrow(whole, refined_from(settings))
            if space == narrow(whole, []):
                raise SearchError(unchanged(whole, refined_from(settings), settings.refine))
        space = pin(space, settings.fixed)
        require_candidate(settings, space, load(settings))
        channel.send({"space": space, "whole": whole})
    except Exception as error:
        print_traceback()
        channel.send({"error": brief(error)})


def make_candidate(
    settings: Settings, space: Mapping[str, Any], values: Mapping[str, Any], data: datasets.Data
) -> Candidate:
    """The `Candidate` that the hyperparameters stand for.

    Raises:
        SearchError: if the function asks for one that the search does not have; it would be at its
            default in every trial, and in no table.
    """
    hp = hyperparameters(space, values)
    candidate = space_of(settings.space)(hp, task_of(settings, data))
    unknown = strangers(hp, space)
    if unknown and settings.scoring == "last":  # an older search continues as it did
        raise SearchError(
            f"The space asks for {unknown[0]!r}, which the search does not know: it appears with "
            "these values, and did not where each was changed alone. Ask for it always, also "
            "where it is not used, and begin anew."
        )
    return candidate


def check_names(settings: Settings, names: list[str], data: datasets.Data) -> None:
    """Checks that the function has the hyperparameters of the search.

    Raises:
        SearchError: if not.
    """
    space = explore(settings, task_of(settings, data))["space"]
    if differ := sorted(set(names) ^ {e["config"]["name"] for e in space}):
        raise SearchError(
            f"{settings.space!r} is not the space of the search: {differ[0]!r} is in one of them "
            "alone. Name the file or module as it was then with --space."
        )


def require_candidate(settings: Settings, space: Mapping[str, Any], data: datasets.Data) -> None:
    """Refuses a space if the trial with all defaults shows that no trial could succeed."""
    if settings.space == "images":
        return
    where = f"the space {settings.space!r}, with the default of each hyperparameter"
    candidate = make_candidate(settings, space, defaults(space), data)
    if not isinstance(candidate, Candidate):
        raise SearchError(
            "A space must return a keras_norm.tuning.Candidate, such as Candidate(model, "
            f"batch_size=64). Received: {type(candidate).__name__} from {where}."
        )
    size = candidate.batch_size
    if not (is_integer(size) and size >= 1):
        raise SearchError(
            f"batch_size must be a whole number, at least 1. Received: {size!r} from {where}."
        )
    try:
        data.train.batches(size, augment=candidate.augment)
    except ValueError as error:
        raise SearchError(f"{error} from {where}.") from None
    if not (candidate.begin is None or callable(candidate.begin)):
        raise SearchError(
            "begin must be a function of (model, training images), or None. Received: "
            f"{candidate.begin!r} from {where}."
        )
    callbacks = candidate.callbacks
    if not isinstance(callbacks, list | tuple) or not all(
        isinstance(callback, keras.callbacks.Callback) for callback in callbacks
    ):
        raise SearchError(
            "callbacks must be a list or tuple of keras.callbacks.Callback. Received: "
            f"{_types(callbacks)} from {where}."
        )
    try:
        model = candidate.build()
    except Exception as error:
        print_traceback()
        raise SearchError(f"No model can be built from {where}: {brief(error)}.") from None
    rule = (
        "The model of a Candidate must be functional or Sequential with its input shape, and "
        f"compiled with a loss and metrics=['accuracy']. Received from {where}: "
    )
    if not isinstance(model, keras.Model):
        raise SearchError(f"{rule}{type(model).__name__}.")
    if not model.compiled:
        raise SearchError(f"{rule}a model that is not compiled.")
    if not model.built:
        raise SearchError(f"{rule}{type(model).__name__} that is not built.")
    try:
        count_flops(model)
        model.run_eagerly = True  # tracing it would take longer than the answer
        told = scalars(model.test_on_batch(data.train.x[:2], data.train.y[:2], return_dict=True))
    except Exception as error:
        print_traceback()
        misfit = _input_misfit(model, data.input_shape) or brief(error)
        raise SearchError(f"{rule}{type(model).__name__}, {misfit}.") from None
    if "accuracy" not in told:
        raise SearchError(f"{rule}a model that reports {', '.join(told)}.")
    if (outputs := _outputs(model)) is not None and outputs < data.classes:
        raise SearchError(
            f"The model of a Candidate must have an output for each of the {data.classes} classes, "
            f"such as Dense(task.classes). Received from {where}: {type(model).__name__} with "
            f"{outputs} outputs."
        )


def _input_misfit(model: keras.Model, expected: tuple[int, ...]) -> str | None:
    """What is wrong with the input of a model that does not take the images; None if it does."""
    shape = getattr(model, "input_shape", None)  # a list or dict, if there are several
    own = shape[1:] if isinstance(shape, tuple) else ()
    if len(own) != len(expected) or all(
        size in (None, there) for size, there in zip(own, expected, strict=True)
    ):
        return None
    return f"whose input has the shape {own} and not task.input_shape, {expected}"


def _outputs(model: keras.Model) -> int | None:
    """Number of a model's outputs if each must stand for a class; None if that is not known.

    It is known for one output with a loss of Keras or this package that takes all class numbers.
    """
    loss, shape = model.loss, getattr(model, "output_shape", None)
    kinds = keras.losses.SparseCategoricalCrossentropy, SmoothedCrossentropy
    takes_all = loss == "sparse_categorical_crossentropy" or (
        isinstance(loss, kinds) and getattr(loss, "ignore_class", None) is None
    )
    return shape[1] if takes_all and isinstance(shape, tuple) and len(shape) == 2 else None


def _types(callbacks: Any) -> str:
    """The type as text; for a list or tuple, the types of its members."""
    if not isinstance(callbacks, list | tuple):
        return type(callbacks).__name__
    return f"[{', '.join(type(callback).__name__ for callback in callbacks)}]"


def measure(channel: Channel, spec: dict[str, Any]) -> None:
    """A process that builds a proposal's model, and says whether the budget allows it."""
    settings = Settings.of(spec["settings"])
    model = make_candidate(settings, spec["space"], spec["values"], load(settings)).build()
    channel.send({"refused": over_budget(settings, model.count_params(), count_flops(model))})


def over_budget(settings: Settings, parameters: int, flops: float) -> str | None:
    """Why a model of that size is over the budget, or None."""
    if settings.max_parameters is not None and parameters > settings.max_parameters:
        return f"{parameters:,} parameters, more than {settings.max_parameters:,}"
    if settings.max_flops is not None and flops > settings.max_flops:
        return f"{flops:,.0f} operations per image, more than {settings.max_flops:,.0f}"
    return None


def trial_seed(settings: Settings, number: int) -> int:
    """The seed of a trial, from the seed of the search and the number of the trial."""
    return int(np.random.SeedSequence([settings.seed, 2, number]).generate_state(1)[0] >> 1)


# State on disk ------------------------------------------------------------------------------


def origin_of(identity: str, values: Mapping[str, Any], seed: int) -> str:
    """Digest of a checkpoint's search, hyperparameters, seed; Hyperband's later trials share it."""
    own = {k: v for k, v in values.items() if not k.startswith("tuner/")}
    text = json.dumps([identity, own, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_state(
    path: Path,
    model: keras.Model,
    history: list[dict[str, float]],
    origin: str = "",
    callbacks: Sequence[Any] = (),
) -> None:
    """Saves model, optimizer, seed generators, callbacks and history in one file, whole or not.

    Of callbacks, the `variables` are saved, if they have any.
    """
    named = {f"v{i}": v for i, v in enumerate(_variables(model))}
    for k, callback in enumerate(callbacks):
        named |= {f"c{k}_{i}": v for i, v in enumerate(_variables_of(callback))}
    arrays = {name: storable(v) for name, v in named.items()}
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, history=np.array(json.dumps(history)), origin=np.array(origin), **arrays)


def load_state(
    path: Path, model: keras.Model, callbacks: Sequence[Any] = ()
) -> list[dict[str, float]]:
    """Restores a newly built model and callbacks to the state that `save_state` saved.

    Older files hold nothing of callbacks, which then start again.
    """
    with np.load(path) as file:
        for i, variable in enumerate(_variables(model)):
            variable.assign(file[f"v{i}"])
        for k, callback in enumerate(callbacks):
            if f"c{k}_0" not in file:
                continue
            if hasattr(callback, "build"):  # makes the variables that `fit` would make
                callback.build(model)
            for i, variable in enumerate(_variables_of(callback)):
                variable.assign(file[f"c{k}_{i}"])
        return list(json.loads(str(file["history"])))


def is_from(path: Path, origin: str, is_new: bool) -> bool:
    """Whether a checkpoint exists and has that origin; older searches wrote no origin."""
    if not path.exists():
        return False
    with np.load(path) as file:
        return str(file["origin"]) == origin if "origin" in file else not is_new


def _variables(model: keras.Model) -> list[Any]:
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    own = [v for layer in model.layers for v in layer.variables]
    return [*own, *model.optimizer.variables]


def _variables_of(callback: Any) -> list[keras.Variable]:
    """The `variables` of a callback; none if a user's callback has something else of that name."""
    own = getattr(callback, "variables", None)
    return [v for v in own if isinstance(v, keras.Variable)] if isinstance(own, list) else []


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process, such as one being killed, works on this trial."""
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def has_moving_statistics(model: keras.Model) -> bool:
    """Whether the model has statistics to re-estimate."""
    return any(has_statistics(layer) for layer in model.layers)


def reestimated(model: keras.Model, data: datasets.Data) -> None:
    """Gives the model re-estimated statistics for good."""
    statistics.reestimate(model, data.train.x, samples=_REESTIMATED_FROM)


# Training -----------------------------------------------------------------------------------


class Reporter(keras.callbacks.Callback):  # type: ignore[misc]
    """After each epoch: measures, writes the state, reports, and stops if it is told to."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial
        self.marks: list[float] = []  # start of this process's first epoch, and end of each step
        self.started = 0.0
        self.trained = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.started, self.trained = time.monotonic(), 0.0
        self.is_first = not self.marks
        if self.is_first:
            self.marks = [self.started]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.is_first:
            self.marks.append(time.monotonic())

    def on_test_begin(self, logs: Any = None) -> None:
        self.trained = time.monotonic() - self.started

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        trained = self.trained or time.monotonic() - self.started
        compiling = first_excess(self.marks) if self.is_first else 0.0
        self.trial.epoch_ended(epoch + 1, dict(logs or {}), trained, compiling)
        if self.trial.stopped:
            self.model.stop_training = True


def first_excess(marks: list[float]) -> float:
    """Seconds of the first step beyond those of the others, in which it was compiled.

    Args:
        marks: when the first step began, and when each ended. Fewer than three say nothing.
    """
    steps = np.diff(marks)
    return float(max(0.0, steps[0] - np.median(steps[1:]))) if len(steps) > 2 else 0.0


class Trial:
    """One trial, from its candidate to its last report."""

    def __init__(self, channel: Channel, spec: dict[str, Any]) -> None:
        self.channel = channel
        self.settings = Settings.of(spec["settings"])
        self.space, self.values = spec["space"], spec["values"]
        self.folder, self.number = Path(spec["folder"]), int(spec["number"])
        self.root = int(spec["root"])  # the trial of Hyperband that this one continues
        self.identity = spec["identity"]
        self.origin = origin_of(self.identity, self.values, trial_seed(self.settings, self.root))
        self.ancestor = spec["ancestor"]  # its folder
        self.history: list[dict[str, float]] = []
        self.log: Any = None  # for TensorBoard, from this process's first epoch on
        self.stopped = False

    def train(self) -> None:
        settings = self.settings
        seed = trial_seed(settings, self.root)
        keras.utils.set_random_seed(seed)
        data = load(settings)
        self.candidate = make_candidate(settings, self.space, self.values, data)
        self.model = self.candidate.build()
        self.flops = count_flops(self.model)
        self.classes = data.classes
        epochs = int(self.values.get("tuner/epochs", settings.epochs))
        self._restore(data)
        for metrics in self.history:  # what the chief may not have heard of
            self._report(metrics)
        done = len(self.history)
        if done >= epochs or self.stopped:
            return
        batches = data.train.batches(
            self.candidate.batch_size, seed=seed, augment=self.candidate.augment
        )
        batches.epoch = done
        held_out = data.validation
        if held_out is None:
            raise TrialError("there are no validation images")
        models.make_variables(self.model, data.train.x, data.train.y)
        self.model.fit(
            batches,
            initial_epoch=done,
            epochs=epochs,
            validation_data=(held_out.x, held_out.y),
            validation_batch_size=EVALUATION_BATCH,
            callbacks=self._callbacks(data),
            shuffle=False,
            verbose=0,
        )

    def _restore(self, data: datasets.Data) -> None:
        own = self.folder / "checkpoint.npz"
        clear_remains(own)
        ancestors = Path(self.ancestor, "checkpoint.npz") if self.ancestor else None
        present = [p for p in (own, ancestors) if p is not None]
        is_new = bool(self.identity)
        source = next((p for p in present if is_from(p, self.origin, is_new)), None)
        if source is not None:
            self.history = load_state(source, self.model, self.candidate.callbacks)
        elif self.candidate.begin is not None:
            self.candidate.begin(self.model, data.train.x)

    def _callbacks(self, data: datasets.Data) -> list[keras.callbacks.Callback]:
        callbacks = [*self.candidate.callbacks, keras.callbacks.TerminateOnNaN()]
        re_estimated = self.settings.objective == "val_accuracy_reestimated"
        if re_estimated and has_moving_statistics(self.model):
            callbacks.append(
                ReestimateStatistics(data.train.x, keep=False, samples=_REESTIMATED_FROM)
            )
        return [*callbacks, Reporter(self)]

    def epoch_ended(
        self, epoch: int, logs: dict[str, float], seconds: float, compiling: float = 0.0
    ) -> None:
        metrics = scalars(logs)
        counted = ["loss", "val_loss", "val_accuracy"]
        if self.settings.scoring == "last":
            counted.append(f"val_{CROSSENTROPY}")
        for name in counted:  # the oracle could not compare other values
            if not math.isfinite(metrics.get(name, 0.0)):
                raise TrialError(f"diverged: {name} is {metrics[name]} in epoch {epoch}")
        missing = {"val_accuracy", "val_loss"} - set(metrics)
        if missing:
            raise TrialError(f"the model reports no {missing.pop()}: compile it with 'accuracy'")
        if self.settings.scoring == "best":  # an earlier search counted it in
            compiling = 0.0
        before = self.history[-1] if self.history else {}
        if self.settings.scoring == "last":
            metrics["val_loss"] = comparable_loss(metrics, "val_")
        metrics |= {
            "epoch": epoch,
            "seconds": before.get("seconds", 0.0) + seconds - compiling,
            "compilation": before.get("compilation", 0.0) + compiling,
            "parameters": self.model.count_params(),
            "flops": self.flops,
        }
        above_chance = max(0.0, metrics["val_accuracy"] - 1 / self.classes)
        metrics["accuracy_per_second"] = above_chance / metrics["seconds"]
        if self.settings.objective == "val_accuracy_reestimated":
            metrics["val_accuracy_reestimated"] = metrics["val_accuracy"]
        self.history.append(metrics)
        try:
            save_state(
                self.folder / "checkpoint.npz",
                self.model,
                self.history,
                self.origin,
                self.candidate.callbacks,
            )
        except OSError as error:
            raise StateError(error.strerror or str(error)) from error
        if self.settings.tensorboard:
            self._log()
        self._report(metrics)

    def _log(self) -> None:
        """Logs the last epoch; the first time, also the earlier epochs of other processes."""
        from keras_norm._search_tensorboard import Log

        if self.log is None:
            self.log = Log(self.folder.parent / "tensorboard", self.number, self.values)
            self.log.write(self.history[:-1])
        self.log.write(self.history[-1:])

    def _report(self, metrics: dict[str, float]) -> None:
        answer = self.channel.ask({"report": metrics})
        self.stopped = self.stopped or not answer["go"]


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are one number each."""
    return {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}


def comparable_loss(metrics: Mapping[str, float], prefix: str = "") -> float:
    """The plain cross entropy if the model reports it; else the loss as it was compiled."""
    return float(metrics.get(f"{prefix}{CROSSENTROPY}", metrics[f"{prefix}loss"]))


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """The process of a trial.

    Sends {"report": metrics} after each epoch, including those of an earlier attempt, and waits for
    {"go": whether to go on}; last {"done": true}, {"failed": reason}, or {"stopped": reason} if the
    trial cannot go on through no fault of its own.
    """
    folder = Path(spec["folder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            Trial(channel, spec).train()
            channel.send({"done": True})
    except TrialError as error:
        channel.send({"failed": str(error)})
    except (MemoryError, Exception) as error:
        print_traceback()
        if full := no_room(error):
            error = StateError(full)
        if isinstance(error, StateError):
            channel.send({"stopped": f"{error}: {str(folder)!r}"})
        else:
            channel.send({"failed": brief(error)})


def print_traceback() -> None:
    """Prints the traceback to the log, if there is room for it."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def brief(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError":
        return f"out of memory: {_first_line(error) or type(error).__name__}"
    if isinstance(error, datasets.DataUnavailableError) or type(error).__name__ == "SearchError":
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """The first line of an error that says what is wrong."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).strip().splitlines()]
    telling = (line for line in lines if not _SAYS_NOTHING.fullmatch(line))
    return next(telling, lines[0] if lines else "")[:300]

"""The settings of a search, its folder, and what can be read from that folder.

Nothing here needs Keras: a wrong command line, or a report, does not cost an import of TensorFlow.

    search.json             settings, space, its code's digest, versions, and a number of its own
    oracle.json             KerasTuner's oracle
    trial_07/trial.json     KerasTuner's trial: values, metrics of each epoch, status, reason
    trial_07/checkpoint.npz while running: model, optimizer, callbacks and history after an epoch
    trial_07/log.txt        what the trial printed
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from keras_norm._files import clear_remains, replace_file
from keras_norm._machine import describe_machine

__all__ = [
    "BEAT",
    "OBJECTIVES",
    "PACKAGES",
    "SearchError",
    "Settings",
    "TrialRecord",
    "absolute_space",
    "at_least",
    "check_address",
    "checkpoints_done_with",
    "clear",
    "clear_checkpoints",
    "code_of",
    "environment",
    "is_moved",
    "is_number",
    "locked",
    "new_identity",
    "plain",
    "prepare",
    "ranked",
    "read_search",
    "read_trials",
    "record_of",
    "refined_from",
    "remove_checkpoint",
    "require",
    "warn_of_code",
    "with_absolute_paths",
    "write_search",
]

DATA = ("cifar10", "digits", "fashion_mnist", "mnist")
FAMILIES = ("mlp", "cnn", "fast")
TUNERS = ("random", "bayesian", "hyperband")
OBJECTIVES = {
    "val_accuracy": "max",
    "val_accuracy_reestimated": "max",
    "val_loss": "min",
    "accuracy_per_second": "max",
}
"""Objective -> direction."""

BEAT = 2.0  # seconds between a worker's signs of life

PACKAGES = ("keras_tuner", "tensorboard")  # needed by every process of a search

# What may differ when a search is resumed: settings that change no existing trial.
CHANGEABLE = {"trials", "trial_timeout", "trial_memory", "data_dir", "tensorboard"}


class SearchError(ValueError):
    """An error that the user can correct: a wrong option, a folder, an address. One line."""


@dataclass(frozen=True)
class Settings:
    """All that decides what the trials of a search are; see `keras_norm.tuning.search`."""

    data: str = "cifar10"
    subset: int | None = None
    validation: float = 0.1
    space: str = "images"
    families: tuple[str, ...] = ("mlp", "cnn")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    refine: str | None = None
    refine_top: int = 5
    tuner: str = "random"
    objective: str = "val_accuracy"
    trials: int = 20
    epochs: int = 10
    factor: int = 3
    prune: bool = False
    prune_after: int = 1
    prune_least: int = 5
    seed: int = 0
    max_parameters: int | None = None
    max_flops: float | None = None
    trial_timeout: float | None = None
    trial_memory: float | None = None
    data_dir: str | None = None
    tensorboard: bool = False
    scoring: str = "last"
    # Not an option: "best" is for searches that were begun before there was any other value. They
    # score by the best epoch, take val_loss as compiled, and count seconds with compilation.

    def __post_init__(self) -> None:
        _one_of("data", self.data, DATA)
        _one_of("tuner", self.tuner, TUNERS)
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("scoring", self.scoring, ("last", "best"))
        if not isinstance(self.families, tuple | list) or not self.families:
            raise SearchError(
                f"families must be a list of at least one of {', '.join(FAMILIES)}. Received: "
                f"{self.families!r}"
            )
        for family in self.families:
            _one_of("families", family, FAMILIES)
        if "fast" in self.families and self.data == "digits":
            raise SearchError("The family 'fast' needs images larger than those of digits.")
        for name in ("trials", "epochs", "prune_after", "prune_least", "refine_top"):
            at_least(name, getattr(self, name), 1)
        at_least("factor", self.factor, 2)
        at_least("seed", self.seed, 0)
        for name in ("subset", "max_parameters", "max_flops", "trial_timeout", "trial_memory"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise SearchError(f"{name} must be a number above 0. Received: {name}={value!r}")
        if self.subset is not None:
            at_least("subset", self.subset, 1)
        for name in ("prune", "tensorboard"):
            if not isinstance(value := getattr(self, name), bool):
                raise SearchError(f"{name} must be True or False. Received: {name}={value!r}")
        if not isinstance(self.space, str):
            raise SearchError(
                "space must be a name, for the processes of a search import it: 'images', "
                f"'module:function' or 'file.py:function'. Received: space={self.space!r}"
            )
        if not isinstance(self.fixed, Mapping):
            raise SearchError(
                f"fixed must be a mapping, hyperparameter -> value. Received: fixed={self.fixed!r}"
            )
        for name, value in self.fixed.items():
            if not isinstance(value, str | int | float | None):
                raise SearchError(
                    "fixed must have values that are numbers, texts, True or False. Received: "
                    f"{name}={value!r}"
                )
        for name in ("refine", "data_dir"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike | None):
                raise SearchError(f"{name} must be a folder. Received: {name}={value!r}")
        if not (is_number(self.validation) and 0 < self.validation < 1):
            raise SearchError(
                "validation is the fraction of the training images that is held out, between 0 "
                f"and 1. Received: validation={self.validation!r}"
            )
        if self.prune and self.tuner == "hyperband":
            raise SearchError(
                "Hyperband stops trials by a rule of its own: leave out prune. Received: "
                "prune=True with tuner='hyperband'"
            )
        if self.trial_memory is not None and sys.platform != "linux":
            raise SearchError("trial_memory needs Linux, whose /proc says what a process uses.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Settings from a mapping, such as the one in search.json; unknown names are an error.

        NumPy scalars, which JSON does not accept, become Python numbers.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(options) - names)
        if unknown:
            raise SearchError(
                f"A search has no option {unknown[0]!r}. It has: {', '.join(sorted(names))}."
            )
        given = {name: plain(value) for name, value in options.items()}
        if isinstance(given.get("fixed"), Mapping):
            given["fixed"] = {name: plain(value) for name, value in given["fixed"].items()}
        if isinstance(given.get("families"), list):
            given["families"] = tuple(given["families"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**dataclasses.asdict(self), "families": list(self.families)}

    @property
    def direction(self) -> str:
        """The direction of the objective, "max" or "min"."""
        return OBJECTIVES[self.objective]

    @property
    def planned(self) -> int:
        """Number of trials; for Hyperband the number in one full iteration."""
        return self.trials if self.tuner != "hyperband" else hyperband(self.epochs, self.factor)


def hyperband(epochs: int, factor: int) -> int:
    """Number of trials in one iteration of Hyperband, as KerasTuner's oracle makes them."""
    brackets, left = 0, float(epochs)
    while left >= 1:
        brackets, left = brackets + 1, left / factor
    last = math.ceil(1 + math.log(epochs, factor))
    return sum(
        math.ceil(last / (bracket + 1) * factor ** (bracket - r))
        for bracket in range(brackets)
        for r in range(bracket + 1)
    )


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise SearchError(f"{name} must be one of {', '.join(allowed)}. Received: {value!r}")


def plain(value: Any) -> Any:
    """The Python number for a NumPy scalar; anything else as it is."""
    is_scalar = hasattr(value, "item") and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SearchError(
            f"{name} must be a whole number, at least {least}. Received: {name}={value!r}"
        )


def require(who: str, *modules: str) -> None:
    """Raises an error at once if packages are missing.

    Args:
        who: what needs them, as the beginning of a sentence.
        modules: names of the modules; with "-" for "_" they are those of the packages.
    """
    missing = [m.replace("_", "-") for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise SearchError(
            f"{who} needs {' and '.join(missing)}, not installed here: pip install "
            f"{' '.join(missing)}"
        )


def check_address(text: str) -> tuple[str, int]:
    """HOST and PORT of "HOST:PORT"; port 0 means any free port."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise SearchError(f"An address is HOST:PORT, such as 192.0.2.7:8100. Received: {text!r}")
    return host.strip("[]"), int(port)


# The folder ---------------------------------------------------------------------------------


def prepare(out: Path, options: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Settings:
    """Returns the settings to run with, and makes sure that the folder holds nothing else.

    With `resume`, options that are not given come from the folder; those given must agree with it.
    """
    if resume and overwrite:
        raise SearchError("resume and overwrite exclude each other.")
    exists = (out / "search.json").exists()
    if resume and not exists:
        raise SearchError(f"There is no search to resume in {str(out)!r}.")
    if not exists:
        if out.is_dir() and not all(map(_is_left_over, out.iterdir())):
            raise SearchError(
                f"{str(out)!r} holds other files and no search: choose a new or an empty folder."
            )
        return _begun(options)
    if overwrite:
        return _begun(options)
    if not resume:
        raise SearchError(
            f"{str(out)!r} holds a search already: pass --resume to go on with it, --overwrite to "
            "begin anew, or choose another folder."
        )
    return _resumed(out, options)


def _is_left_over(path: Path) -> bool:
    """Whether this may be left over from a search that was killed before it began."""
    return path.name in (".lock", "processes.txt") or path.match(".search.*.json")


def _begun(options: Mapping[str, Any]) -> Settings:
    settings = with_absolute_paths(Settings.of(options))
    _check_trials(settings, options)
    _check_effects(settings, options)
    if settings.refine is not None:
        refined_from(settings)
    return settings


def _check_trials(settings: Settings, options: Mapping[str, Any]) -> None:
    if settings.tuner == "hyperband" and "trials" in options:
        raise SearchError(
            "The number of Hyperband's trials follows from epochs and factor, here "
            f"{settings.planned}: leave out trials. Received: trials={settings.trials}"
        )


def _check_effects(settings: Settings, options: Mapping[str, Any]) -> None:
    """Refuses options that would have no effect, because the user expects one."""
    needs = {
        "prune_after": (settings.prune, "prune"),
        "prune_least": (settings.prune, "prune"),
        "factor": (settings.tuner == "hyperband", "the tuner hyperband"),
        "refine_top": (settings.refine is not None, "refine"),
    }
    for name, (is_there, needed) in needs.items():
        if name in options and not is_there:
            raise SearchError(
                f"{name} has no effect without {needed}: add that, or leave out {name}. Received: "
                f"{name}={getattr(settings, name)}"
            )
    if settings.prune and settings.prune_after >= settings.epochs:
        raise SearchError(
            "A trial is pruned before its last epoch or not at all: prune_after must be below "
            f"epochs, or leave out prune. Received: prune_after={settings.prune_after} with "
            f"epochs={settings.epochs}"
        )


def refined_from(settings: Settings) -> list[TrialRecord]:
    """The best trials of the search that `refine` names."""
    earlier = Path(str(settings.refine))
    direction = Settings.of(read_search(earlier)["settings"]).direction
    best = ranked(read_trials(earlier), direction)[: settings.refine_top]
    if not best:
        raise SearchError(f"refine={settings.refine!r} holds no finished trial.")
    return best


def _resumed(out: Path, options: Mapping[str, Any]) -> Settings:
    saved = Settings.of(read_search(out)["settings"])
    merged = with_absolute_paths(Settings.of({**saved.to_dict(), **options}))
    for name in saved.to_dict():
        old, new = getattr(saved, name), getattr(merged, name)
        moved = name == "space" and is_moved(old, new)  # whether it is the same is checked later
        if old != new and name not in CHANGEABLE and not moved:
            raise SearchError(
                f"A search cannot be resumed with another {name}: it began with {old!r}, and now "
                f"received {new!r}. Leave it out, or begin anew with --overwrite or another folder."
            )
    _check_trials(merged, options)
    return merged


def is_moved(old: str, new: str) -> bool:
    """Whether both name a function of the same name in a file or module of the user."""
    functions = [space.rpartition(":")[1:] for space in (old, new)]
    return functions[0] == functions[1] and functions[0][0] == ":"


def code_of(space: str) -> str:
    """Digest of the file of the user's own space, without its comments and layout.

    Nothing is imported. "" for the space of this package, and for a file that cannot be read.
    """
    place = space.rpartition(":")[0]
    inside = place.replace(".", "/")
    files = (
        [Path(place)]
        if place.endswith(".py")
        else [
            Path(root, f"{inside}{ending}")
            for root in ("", *sys.path)
            for ending in (".py", "/__init__.py")
        ]
    )
    file = next((f for f in files if place and f.is_file()), None)
    try:
        tree = ast.parse(file.read_bytes()) if file else None
    except (OSError, SyntaxError, ValueError):
        tree = None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16] if tree else ""


def warn_of_code(space: str, code: str, consequence: str) -> bool:
    """Warns on the error stream if the space's code has changed; returns whether it has."""
    now = code_of(space)
    if not (code and now) or now == code:
        return False
    print(
        f"Warning: the code of {space!r} is not that of the search: {consequence}.", file=sys.stderr
    )
    return True


def with_absolute_paths(settings: Settings) -> Settings:
    """Settings with absolute paths, as texts: valid in every process, and if resumed elsewhere."""
    changes: dict[str, Any] = {}
    for name in ("data_dir", "refine"):
        if (path := getattr(settings, name)) is not None:
            changes[name] = str(Path(path).expanduser().absolute())
    changes["space"] = absolute_space(settings.space)
    return dataclasses.replace(settings, **changes)


def absolute_space(space: str) -> str:
    """The reference of the same space; if it is in a file, with the absolute path."""
    file, colon, function = space.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).expanduser().absolute()}:{function}"
    return space


def clear(out: Path) -> None:
    """Removes what a search has made, and nothing else.

    The folders of its trials, "report", "retrained" and "tensorboard" are removed whole, with
    whatever has been put into them.
    """
    made = ["oracle.json", "report", "retrained", "tensorboard", "tested.json"]
    trials = [p for p in out.iterdir() if re.fullmatch(r"trial_\d+", p.name) and p.is_dir()]
    # search.json last: without it, the rest would be taken for somebody's files.
    for path in [*map(out.joinpath, made), *trials, out / "search.json"]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the folder for one search; the system drops the lock when the process dies."""
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 -- held while it runs
    except OSError as error:
        raise SearchError(f"Cannot write to {str(out)!r}: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, out / ".lock"):  # its holder has since removed the folder
                raise BlockingIOError
        except BlockingIOError:
            raise SearchError(f"Another search is running in {str(out)!r}.") from None
        yield


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at that path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def new_identity() -> str:
    """An identity that distinguishes a search from all others, in search.json and checkpoints."""
    return secrets.token_hex(6)


def write_search(
    out: Path,
    settings: Settings,
    space: Mapping[str, Any],
    whole: Mapping[str, Any],
    identity: str = "",
    code: str = "",
) -> None:
    """Writes search.json, with the space that is searched and the whole one that it is part of."""
    content = {
        "identity": identity,
        "code": code,
        "settings": settings.to_dict(),
        "space": space,
        "whole_space": whole,
        "machine": describe_machine(),
    }
    with replace_file(out / "search.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_search(out: Path) -> dict[str, Any]:
    """What `write_search` wrote; for an earlier search, completed by the rules of its time.

    The identity of a search that was made without one is "".
    """
    path = out / "search.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SearchError(f"There is no search in {str(out)!r}.") from None
    except (OSError, ValueError) as error:
        raise SearchError(f"{str(path)!r} cannot be read: {error}.") from None
    parts = [content.get(n) for n in ("settings", "space")] if isinstance(content, dict) else [0]
    if not all(isinstance(part, dict) for part in parts):
        raise SearchError(
            f"{str(path)!r} is of no search: it must have settings and a space. Choose another "
            "folder."
        )
    content["settings"] = {"scoring": "best", **content["settings"]}
    return {"identity": "", "code": "", **content}


# Trials -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a search, as stored in its folder.

    Attributes:
        number: from 0, in the order in which the trials were made.
        status: "completed", "pruned", "failed" or "running".
        reason: why it failed or was pruned, or "".
        score: value of the objective after the last epoch; None if it failed or is running. (For
            the best epoch in searches that were begun before this was the rule.)
        values: hyperparameter -> value, including what the tuner adds ("tuner/epochs").
        history: metric -> epoch -> value. Epochs count from 1.
    """

    number: int
    status: str
    reason: str
    score: float | None
    values: dict[str, Any]
    history: dict[str, dict[int, float]]

    @property
    def epochs(self) -> int:
        """Number of finished epochs."""
        return max((e for steps in self.history.values() for e in steps), default=0)

    def last(self, metric: str) -> float | None:
        """The metric's value after the last epoch."""
        steps = self.history.get(metric)
        return steps[max(steps)] if steps else None

    def best(self, metric: str, direction: str = "max") -> float | None:
        """The metric's best value."""
        values = list(self.history.get(metric, {}).values())
        return (max if direction == "max" else min)(values) if values else None

    def reached(self, metric: str, settings: Settings) -> float | None:
        """The value that the trial is scored by: of its last epoch, or its best in old searches."""
        if settings.scoring == "last":
            return self.last(metric)
        return self.best(metric, OBJECTIVES.get(metric, "max"))

    def best_epoch(self, settings: Settings) -> int | None:
        """The epoch with the best value of the objective."""
        steps = self.history.get(settings.objective, {})
        best = max if settings.direction == "max" else min
        return best(steps, key=lambda epoch: steps[epoch]) if steps else None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The values without those that the tuner adds."""
        return {k: v for k, v in self.values.items() if not k.startswith("tuner/")}


def read_trials(out: Path) -> list[TrialRecord]:
    """The trials of a search, in order."""
    records = []
    for path in out.glob("trial_*/trial.json"):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            records.append(record_of(state))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SearchError(
                f"{str(path)!r} cannot be read: {type(error).__name__}: {error}."
            ) from None
    return sorted(records, key=lambda r: r.number)


def record_of(state: Mapping[str, Any]) -> TrialRecord:
    """The record of a trial from KerasTuner's `Trial.get_state()`."""
    message = state["message"] or ""
    status = {"COMPLETED": "completed", "FAILED": "failed"}.get(state["status"], "running")
    if status == "completed" and message:
        status = "pruned"
    history = {
        metric: {int(o["step"]): sum(o["value"]) / len(o["value"]) for o in entry["observations"]}
        for metric, entry in state["metrics"]["metrics"].items()
    }
    return TrialRecord(
        number=int(state["trial_id"]),
        status=status,
        reason=message,
        score=state["score"] if status in ("completed", "pruned") else None,
        values=dict(state["hyperparameters"]["values"]),
        history=history,
    )


def checkpoints_done_with(trial_id: str, values: Mapping[str, Any]) -> list[str]:
    """The trials whose checkpoints are no longer needed once this one has ended.

    Another trial may continue a trial of Hyperband in the next round of its bracket.
    """
    needless = [values["tuner/trial_id"]] if "tuner/trial_id" in values else []
    if values.get("tuner/round", 0) == values.get("tuner/bracket", 0):
        needless.append(trial_id)
    return needless


def remove_checkpoint(trial: Path) -> None:
    """Removes the checkpoint of a trial that has ended, and what a killed process left of one."""
    (trial / "checkpoint.npz").unlink(missing_ok=True)
    clear_remains(trial / "checkpoint.npz")


def clear_checkpoints(out: Path, settings: Settings, *, is_over: bool) -> None:
    """Removes unneeded checkpoints once all trials have ended and no other will be made.

    That is so when all planned trials exist, or when the oracle has no more (`is_over`). Killed
    workers may have left some, and Hyperband leaves those of trials that were not continued.
    """
    records = read_trials(out)
    is_over = is_over or len(records) >= settings.planned
    if is_over and all(r.status != "running" for r in records):
        for trial in out.glob("trial_*"):
            remove_checkpoint(trial)


def ranked(records: list[TrialRecord], direction: str) -> list[TrialRecord]:
    """The trials that have a score, the best first; among equals the one made first."""
    sign = -1 if direction == "max" else 1
    scored = [r for r in records if r.score is not None]
    return sorted(scored, key=lambda r: (sign * float(r.score or 0), r.number))


def environment() -> dict[str, str]:
    """Environment variables for the processes of a search: few messages, reproducible results."""
    return {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        "TF_DETERMINISTIC_OPS": os.environ.get("TF_DETERMINISTIC_OPS", "1"),
        "KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "OPENBLAS_NUM_THREADS": "1",  # its threads would exist before the first fork
    }

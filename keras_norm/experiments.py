"""Experiments: settings × seeds, run once, kept for good, and turned into tables and tests.

`run` trains every setting with every seed, saves each run the moment it ends, and goes on where
it stopped. `Results` reads what was saved, selects, tabulates and compares it.

The files. `results.json` is the whole record, strict JSON, one line per run::

    {"schema": "keras_norm.results", "schema_version": 1, "title": "…",
     "environments": [{"versions": {…}, "hardware": {…}, "summary": "…"}],
     "runs": [{"name": …, "seed": …, "status": …, "seconds": …, "settings": {…}, "context": {…},
               "backend": …, "epochs": […], "history": {metric: […]}, "final": {metric: …},
               "extra": {…}, "error": …, "started": …, "finished": …, "code": …,
               "environment": index}],
     "superseded": [… runs whose name now stands for other settings …]}

JSON knows neither NaN nor infinity: in `history`, `final` and `extra` they are the strings
"NaN", "Infinity" and "-Infinity", and come back as numbers; null is a metric that was not measured
in that epoch.

`results.csv` holds the current runs as one tidy table, enough to redraw every plot. A run has one
row per epoch (`row` = "epoch") and one last row (`row` = "final", no epoch) with its final metrics.
Columns: name, seed, status, backend, seconds, row, epoch, then `settings.*` and `context.*`
(nested keys joined by dots), then `metrics.*`. An empty cell is a key or metric that is not there;
"nan", "inf" and "-inf" are numbers; a text that would read as another type is quoted as in JSON.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import dataclasses
import datetime
import gc
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import random
import secrets
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "Comparison",
    "ModelPool",
    "Progress",
    "Results",
    "Run",
    "Table",
    "TutorialArguments",
    "classification_metrics",
    "describe_machine",
    "holm",
    "replace_file",
    "run",
    "train_on_arrays",
    "tutorial_arguments",
]

_SCHEMA, _VERSION = "keras_norm.results", 1
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FIXED_COLUMNS = ("name", "seed", "status", "backend", "seconds", "row", "epoch")

T = TypeVar("T")
TrainFunction = Callable[[dict[str, Any], int, "Progress"], Mapping[str, Any]]
# name -> metric -> figure, (figure, source), or a list of these
Published = Mapping[str, Mapping[str, Any]]


# ---------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training run: what was asked for, and what came out.

    Args:
        name: Name of the setting, as it appears in tables and legends.
        settings: Everything that was passed to the training function; JSON values only.
        seed: Seed of the run.
        status: "finished"; "diverged" when a loss ended as NaN or infinite; "failed" when the
            training function raised.
        epochs: Epoch numbers of the values in `history`, increasing; default 1, 2, ….
        history: Metric -> one value per epoch; None where it was not measured.
        final: Metric -> value at the end of the run.
        seconds: Wall time of the training function.
        context: What all runs of a study share, such as the data and its size.
        backend: Keras backend of the run.
        extra: Whatever else the training function returned.
        error: Type and message of the exception of a failed run.
        started: UTC time, ISO 8601.
        finished: UTC time, ISO 8601.
        environment: Versions and hardware, as from `describe_machine`.
        code: Digest of the training function's syntax tree; "" where there is no source.

    Example:
        >>> from keras_norm.experiments import Run
        >>> one = Run("plain", {"learning_rate": 0.1}, seed=0, history={"loss": [2.0, 1.0]})
        >>> one.epochs, one.value("loss")
        ((1, 2), 1.0)
    """

    name: str
    settings: Mapping[str, Any]
    seed: int
    status: str = "finished"
    epochs: tuple[float, ...] = ()
    history: Mapping[str, list[float | None]] = field(default_factory=dict)
    final: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    context: Mapping[str, Any] = field(default_factory=dict)
    backend: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    started: str = ""
    finished: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    def __post_init__(self) -> None:
        length = max((len(values) for values in self.history.values()), default=0)
        if not self.epochs:
            object.__setattr__(self, "epochs", tuple(range(1, length + 1)))
        object.__setattr__(self, "epochs", tuple(self.epochs))
        for metric, values in self.history.items():
            if len(values) != len(self.epochs):
                raise ValueError(
                    "Every metric of a history needs one value per epoch (None where it was not "
                    f"measured). Received: {metric}={len(values)} values for {len(self.epochs)} "
                    f"epochs in run {self.name!r}, seed {self.seed}."
                )

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, those of the history first."""
        return list(dict.fromkeys([*self.history, *self.final]))

    def value(self, metric: str) -> float:
        """The final value of `metric`; one without a final value: its last in the history."""
        if metric in self.final:
            return float(self.final[metric])
        measured = [v for v in self.history.get(metric, ()) if v is not None]
        return float(measured[-1]) if measured else math.nan

    def setting(self, key: str) -> Any:
        """The setting `key` ("optimizer.learning_rate" reaches into nested ones), or None."""
        found: Any = self.settings
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return None
            found = found[part]
        return found


def _group(entry: Run) -> str:
    """What has to agree for two runs to be runs of the same thing."""
    return _canonical([entry.settings, entry.context, entry.backend])


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=True, ensure_ascii=False)


def _plain(value: Any, where: str) -> Any:
    """`value` in the types of JSON; arrays become lists, tensors and NumPy scalars numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # without lone surrogates
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(v, f"{where}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where) for v in value]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return _plain(value.tolist(), where)
    if getattr(value, "dtype", None) is not None and hasattr(value, "shape"):
        import keras

        with contextlib.suppress(TypeError, ValueError):  # tensors; bfloat16, unknown to NumPy
            if keras.backend.standardize_dtype(value.dtype) == "bfloat16":
                value = keras.ops.cast(value, "float32")
            return _plain(keras.ops.convert_to_numpy(value).tolist(), where)
    raise ValueError(
        f"{where} must consist of JSON values: None, numbers, texts, lists, dicts with texts as "
        f"keys, arrays. Received: {value!r} of type {type(value).__name__}."
    )


def _plain_settings(value: Any, where: str) -> Any:
    """As `_plain`, and fit for a column of the csv and for being compared."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(
                    f"A key of {where} must be a non-empty text without '.'. Received: {key!r}"
                )
        return {key: _plain_settings(v, f"{where}.{key}") for key, v in value.items()}
    plain = _plain(value, where)
    try:
        json.dumps(plain, allow_nan=False)
    except ValueError:
        raise ValueError(
            f"{where} must be finite. Received: {value!r}. Use None or a text instead."
        ) from None
    return plain


def _number(value: Any, where: str) -> float:
    number = _plain(value, where)
    if isinstance(number, (bool, int, float)):
        return number + 0  # True -> 1
    raise ValueError(f"{where} must be one number. Received: {value!r}. Return others as extra.")


def _history(history: Any) -> tuple[tuple[float, ...], dict[str, list[float | None]]]:
    """Epochs and metrics of a history as a training function returned it."""
    if not isinstance(history, Mapping):
        raise ValueError(
            "'history' must be a dict of metric -> list of values, as `fit(…).history` is. "
            f"Received: {type(history).__name__}"
        )
    columns = {
        metric: [None if v is None else _number(v, f"history[{metric!r}]") for v in values]
        for metric, values in history.items()
    }
    epochs = tuple(v for v in columns.pop("epoch", []) if v is not None)
    return epochs, {m: v for m, v in columns.items() if any(x is not None for x in v)}


def _diverged(history: Mapping[str, list[float | None]], final: Mapping[str, float]) -> bool:
    """True if the last value of any loss is NaN or infinite."""
    measured = {m: [x for x in v if x is not None] for m, v in history.items()}
    last = {m: v[-1] for m, v in measured.items() if v} | dict(final)
    return any("loss" in m and not math.isfinite(v) for m, v in last.items())


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all.

    Yields a temporary path in the same folder; what is written there takes the place of `path`
    when the block ends well. When it raises, `path` is as it was and nothing else stays behind.

    Args:
        path: The file to write; its folder is made if it is missing.

    Returns:
        A context manager that gives the temporary `Path`.

    Example:
        >>> import pathlib, tempfile
        >>> from keras_norm.experiments import replace_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.txt")
        ...     with replace_file(path) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     path.read_text()
        'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops by itself when the process dies."""
    path = folder / ".results.lock"
    file = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 -- held while the lock is
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise RuntimeError(
                "Only one process at a time may run experiments into a folder. Received: "
                f"out={str(path.parent)!r}, in use by process {holder}. Wait for it, or give "
                "another folder and merge the results."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
                return file
        file.close()  # the last holder took the file away in between


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _strict(value: Any) -> Any:
    """NaN and infinities as texts, everywhere in `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, Infinity, -Infinity
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def _loose(value: Any) -> Any:
    """The reverse of `_strict`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _loose(v) for k, v in value.items()}
    return [_loose(v) for v in value] if isinstance(value, list) else value


def _to_json(title: str, runs: Sequence[Run], superseded: Sequence[Run]) -> str:
    environments: list[Mapping[str, Any]] = []

    def line(entry: Run) -> str:
        if entry.environment not in environments:
            environments.append(entry.environment)
        fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        for key in ("seconds", "epochs", "history", "final", "extra"):
            fields[key] = _strict(fields[key])
        fields["environment"] = environments.index(entry.environment)
        return json.dumps(fields, allow_nan=False, ensure_ascii=False)

    lists = {k: [line(r) for r in v] for k, v in (("runs", runs), ("superseded", superseded))}
    head = {"schema": _SCHEMA, "schema_version": _VERSION, "title": title}
    parts = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in head.items()]
    lists = {"environments": [json.dumps(e, ensure_ascii=False) for e in environments], **lists}
    for key, lines in lists.items():
        parts.append(f'"{key}": [' + "".join(f"\n  {x}," for x in lines).rstrip(",") + "\n ]")
    return "{" + ",\n ".join(parts) + "\n}\n"


def _from_json(text: str) -> tuple[str, list[Run], list[Run]]:
    data = json.loads(text)
    if data["schema"] != _SCHEMA or data["schema_version"] != _VERSION:
        raise ValueError(
            f"The file must follow schema {_SCHEMA!r}, version {_VERSION}. Received: "
            f"{data['schema']!r}, version {data['schema_version']!r}. Read it with the version "
            "of keras_norm that wrote it."
        )

    def entry(fields: dict[str, Any]) -> Run:
        for key in ("seconds", "epochs", "history", "final", "extra"):
            fields[key] = _loose(fields[key])
        environment = data["environments"][fields.pop("environment")]
        return Run(**fields, environment=environment)

    runs, superseded = ([entry(r) for r in data[key]] for key in ("runs", "superseded"))
    return data["title"], runs, superseded


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested settings as cells: {"settings.optimizer.name": "sgd"}."""
    if isinstance(value, Mapping) and (value or prefix in ("settings", "context")):
        cells = [_flat(f"{prefix}.{k}", v) for k, v in value.items()]
        return {key: cell for part in cells for key, cell in part.items()}
    return {prefix: _cell(value)}


def _cell(value: Any) -> str:
    """A cell that `_uncell` reads back as the same value of the same type."""
    plain = isinstance(value, str) and not {"\r", "\n"} & set(value) and _uncell(value) == value
    return value if plain and value else json.dumps(value, ensure_ascii=False)


def _uncell(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _to_number(cell: str) -> float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def _rows(entry: Run) -> Iterator[dict[str, str]]:
    """The rows of one run: its epochs, then its final values."""
    fixed = {
        "name": entry.name,
        "seed": str(entry.seed),
        "status": entry.status,
        "backend": entry.backend,
        "seconds": repr(float(entry.seconds)),
        **_flat("settings", entry.settings),
        **_flat("context", entry.context),
    }
    for i, epoch in enumerate(entry.epochs):
        values = {f"metrics.{m}": v[i] for m, v in entry.history.items()}
        cells = {k: repr(v) for k, v in values.items() if v is not None}
        yield fixed | {"row": "epoch", "epoch": repr(epoch)} | cells
    final = {f"metrics.{m}": repr(v) for m, v in entry.final.items()}
    yield fixed | {"row": "final", "epoch": ""} | final


def _write_csv(path: Path, runs: Iterable[Run]) -> None:
    rows = [row for entry in runs for row in _rows(entry)]
    kinds = ("settings.", "context.", "metrics.")
    found = dict.fromkeys(key for row in rows for key in row)
    columns = [*_FIXED_COLUMNS, *(k for kind in kinds for k in found if k.startswith(kind))]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _nested(row: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """The reverse of `_flat`."""
    values: dict[str, Any] = {}
    for column, cell in row.items():
        if column.startswith(prefix) and cell != "":
            *parents, key = column.removeprefix(prefix).split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = _uncell(cell)
    return values


def _from_csv(path: Path) -> list[Run]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if missing := set(_FIXED_COLUMNS) - set(reader.fieldnames or ()):
            raise KeyError(f"columns {sorted(missing)} are missing")
        groups: dict[tuple[str, int], list[dict[str, str]]] = {}
        for row in reader:
            groups.setdefault((row["name"], int(row["seed"])), []).append(row)
    return [_from_rows(rows) for rows in groups.values()]


def _from_rows(rows: list[dict[str, str]]) -> Run:
    *by_epoch, last = rows
    if last["row"] != "final" or any(row["row"] != "epoch" for row in by_epoch):
        raise ValueError(f"run {last['name']!r}, seed {last['seed']} is incomplete")
    metrics = [key for key in last if key.startswith("metrics.")]
    history = {
        key.removeprefix("metrics."): [_to_number(r[key]) if r[key] else None for r in by_epoch]
        for key in metrics
        if any(row[key] for row in by_epoch)
    }
    return Run(
        name=last["name"],
        settings=_nested(last, "settings."),
        seed=int(last["seed"]),
        status=last["status"],
        epochs=tuple(_to_number(row["epoch"]) for row in by_epoch),
        history=history,
        final={k.removeprefix("metrics."): _to_number(last[k]) for k in metrics if last[k]},
        seconds=float(last["seconds"]),
        context=_nested(last, "context."),
        backend=last["backend"],
    )


# ---------------------------------------------------------------------------- results


class Results:
    """Runs of a study: saved, selected, tabulated, compared.

    A name stands for one setting: two runs of the same name differ in their seed alone.

    Args:
        runs: The runs; default none.
        title: Title of the study; default none.
        superseded: Runs whose name now stands for other settings. They are kept in
            `results.json`, reused when their settings are asked for again, and appear nowhere else.

    State:
        runs, superseded: Tuples of `Run`. title: Text.

    Raises:
        ValueError: Two runs have the same name and seed, or the same name and other settings,
            context or backend.

    Example:
        >>> from keras_norm.experiments import Results, Run
        >>> runs = [Run("batch", {"norm": "batch"}, s, final={"accuracy": 0.8 + s / 100})
        ...         for s in range(3)]
        >>> runs += [Run("plain", {"norm": None}, s, final={"accuracy": 0.7 + s / 50})
        ...          for s in range(3)]
        >>> results = Results(runs)
        >>> print(results.table("accuracy", published={"plain": {"accuracy": (0.71, "a report")}}))
        setting  accuracy         published  n
        -------  ---------------  ---------  -
        batch    0.8100 ± 0.0100  –          3
        plain    0.7200 ± 0.0200  0.71       3
        Mean ± standard deviation over n seeds.
        Published accuracy of 'plain': 0.71, a report.
        >>> results.values("batch", "accuracy")
        array([0.8 , 0.81, 0.82])
        >>> results.select(settings={"norm": None}).names
        ['plain']
    """

    def __init__(
        self, runs: Iterable[Run] = (), *, title: str = "", superseded: Iterable[Run] = ()
    ) -> None:
        self.runs = tuple(runs)
        self.title = title
        self.superseded = tuple(superseded)
        groups: dict[str, str] = {}
        seen: set[tuple[str, int]] = set()
        for entry in self.runs:
            if groups.setdefault(entry.name, _group(entry)) != _group(entry):
                raise ValueError(
                    "A name must stand for one setting, context and backend. Received: "
                    f"different ones under name={entry.name!r}. Rename one with `rename`."
                )
            if (entry.name, entry.seed) in seen:
                raise ValueError(
                    "A setting has one run per seed. Received: two different runs of "
                    f"name={entry.name!r}, seed={entry.seed}. Rename one with `rename`."
                )
            seen.add((entry.name, entry.seed))

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __repr__(self) -> str:
        return f"<Results {self.title!r}: {len(self.names)} settings, {len(self)} runs>"

    @property
    def names(self) -> list[str]:
        """Names of the settings, in the order of their first run."""
        return list(dict.fromkeys(entry.name for entry in self.runs))

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of all runs."""
        return list(dict.fromkeys(metric for entry in self.runs for metric in entry.metrics))

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read saved results.

        Args:
            path: A folder (its results.json, or else its results.csv), or one of the files. The
                csv holds all that tables, tests and plots need, but no versions or extras.

        Returns:
            The `Results`.

        Raises:
            ValueError: There is no such file, or it is not one that `save` wrote.
        """
        path = Path(path)
        if path.is_dir():
            path = path / ("results.json" if (path / "results.json").exists() else "results.csv")
        if not path.is_file():
            raise ValueError(
                "Results are read from results.json, results.csv or the folder that holds them. "
                f"Received: path={str(path)!r}, which is not there. Run the experiment first."
            )
        try:
            if path.suffix == ".csv":
                return cls(_from_csv(path))
            title, runs, superseded = _from_json(path.read_text(encoding="utf-8"))
            return cls(runs, title=title, superseded=superseded)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, csv.Error) as error:
            raise ValueError(
                f"The file must be one that keras_norm saved, whole and unchanged. Received: "
                f"path={str(path)!r} ({type(error).__name__}: {error}). It was left as it is; "
                "move it away to start anew."
            ) from error

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write results.json and results.csv, each whole or not at all.

        Args:
            out: Folder; made if it is missing.
            overwrite: Whether results that are already there may be replaced; default False.

        Returns:
            The path of results.json.

        Raises:
            ValueError: There are results in `out` and `overwrite` is False.
        """
        path = Path(out) / "results.json"
        if path.exists() and not overwrite:
            raise ValueError(
                "Saving must not destroy other results. Received: "
                f"out={str(out)!r}, which holds some. Choose another folder or overwrite=True."
            )
        with replace_file(path) as temporary:
            temporary.write_text(_to_json(self.title, self.runs, self.superseded), "utf-8")
        with replace_file(path.with_suffix(".csv")) as temporary:
            _write_csv(temporary, self.runs)
        return path

    # ------------------------------------------------------------------ parts and unions

    def select(
        self,
        names: str | Iterable[str] | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        seeds: Iterable[int] | None = None,
        status: str | Iterable[str] | None = None,
    ) -> Results:
        """The runs that fulfil every given condition.

        Args:
            names: Names of settings, which also give the order; default all.
            settings: Key -> value, or a set, list or tuple of allowed values; keys of nested
                settings are joined by dots.
            seeds: Allowed seeds.
            status: "finished", "diverged", "failed", or several of them.

        Returns:
            New `Results`, possibly without runs.

        Raises:
            ValueError: A name is not there.
        """
        wanted = [names] if isinstance(names, str) else self.names if names is None else list(names)
        for name in wanted:
            self._check_name(name)
        allowed_seeds = None if seeds is None else set(seeds)
        allowed_status = {status} if isinstance(status, str) else status and set(status)

        def fits(entry: Run) -> bool:
            return (
                (allowed_seeds is None or entry.seed in allowed_seeds)
                and (allowed_status is None or entry.status in allowed_status)
                and all(_matches(entry.setting(k), v) for k, v in (settings or {}).items())
            )

        runs = [r for name in wanted for r in self.runs if r.name == name and fits(r)]
        return Results(runs, title=self.title)

    def merge(self, *others: Results) -> Results:
        """These runs and those of `others`, for example of other seeds or other machines.

        Args:
            *others: Other `Results`. A run that is in several of them is taken once.

        Returns:
            New `Results` with this one's title.

        Raises:
            ValueError: A name stands for different settings, or one seed has different runs.
        """
        runs: dict[str, Run] = {}
        for entry in [r for results in (self, *others) for r in results.runs]:
            fields = dataclasses.asdict(entry)
            runs.setdefault(_canonical(fields), entry)
        return Results(runs.values(), title=self.title)

    def rename(self, names: Mapping[str, str]) -> Results:
        """The same runs under other names of settings: old name -> new name."""
        for name in names:
            self._check_name(name)
        runs = [dataclasses.replace(r, name=names.get(r.name, r.name)) for r in self.runs]
        return Results(runs, title=self.title)

    # ------------------------------------------------------------------ numbers

    def seeds(self, name: str) -> list[int]:
        """Sorted seeds of the runs of `name` that did not fail."""
        return [entry.seed for entry in self._of(name)]

    def values(self, name: str, metric: str) -> npt.NDArray[np.float64]:
        """One value per seed, in the order of `seeds(name)`.

        Args:
            name: Name of a setting.
            metric: A final metric; or one of the history, of which the last value counts.

        Returns:
            float64 array (n,), with NaN where a run ended in NaN or lacks the metric. Failed runs
            are left out, diverged ones are not.

        Raises:
            ValueError: The name, or the metric in all its runs, is not there.
        """
        runs = self._of(name)
        if not any(metric in entry.metrics for entry in runs):
            raise ValueError(
                f"The metric must be one of {self.metrics}. "
                f"Received: metric={metric!r} for name={name!r}."
            )
        return np.array([entry.value(metric) for entry in runs], dtype=np.float64)

    def curves(
        self, name: str, metric: str
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The history of a metric.

        Args:
            name: Name of a setting.
            metric: A metric of the history.

        Returns:
            Epochs (E,), all that occur in any run, and values (n, E) in the order of `seeds(name)`;
            NaN where a run has no value.
        """
        runs = self._of(name)
        epochs = sorted({e for entry in runs for e in entry.epochs if metric in entry.history})
        column = {epoch: i for i, epoch in enumerate(epochs)}
        values = np.full((len(runs), len(epochs)), np.nan)
        for row, entry in zip(values, runs, strict=True):
            for epoch, value in zip(entry.epochs, entry.history.get(metric, ()), strict=False):
                row[column[epoch]] = math.nan if value is None else value
        return np.array(epochs, dtype=np.float64), values

    def table(
        self,
        metrics: str | Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        *,
        settings: Sequence[str] = (),
        published: Published | None = None,
        digits: int | Mapping[str, int] = 4,
    ) -> Table:
        """Mean ± standard deviation (n − 1 in the denominator) of metrics, a line per setting.

        Args:
            metrics: Metrics to show; default all final ones. "seconds" is the wall time of a run.
            names: Settings to show, in this order; default all.
            settings: Keys of settings to show as columns of their own.
            published: Figures of others, name -> metric -> figure or (figure, source), or a list
                of these. They stand beside ours; a name without runs gets a line of its own.
            digits: Decimal places, for all metrics or per metric; default 4 (seconds: 1).

        Returns:
            A `Table`: print it, or take its `markdown`. Failed runs do not count in n; diverged
            ones do, and are counted in a column when there are any.

        Raises:
            ValueError: A metric or a name is not there.
        """
        finals = dict.fromkeys(m for entry in self.runs for m in entry.final)
        shown = [metrics] if isinstance(metrics, str) else list(metrics or finals)
        figures = [f for f in _published(published) if f.metric in shown]
        places = {m: digits if isinstance(digits, int) else digits.get(m, 4) for m in shown}
        if isinstance(digits, int):
            places |= {"seconds": 1} if "seconds" in shown else {}
        rows = [self._row(name, shown, settings) for name in (names or self.names)]
        known = {row["name"] for row in rows}
        others = dict.fromkeys(f.name for f in figures if f.name not in self.names)
        rows += [{"name": name, "n": 0} for name in others if name not in known]
        return _format_table(rows, shown, settings, figures, places)

    def compare(self, a: str, b: str, metric: str, paired: bool = True) -> Comparison:
        """Test whether setting `a` differs from setting `b` in a metric.

        Args:
            a: Name of a setting.
            b: Name of another.
            metric: Metric, as in `values`.
            paired: Default True: differences per seed, over the seeds that both have: paired
                t-test, Wilcoxon's signed-rank test, Cohen's d_z (mean / standard deviation of the
                differences). False: independent samples: Welch's t-test, the Mann–Whitney test,
                Cohen's d (difference / pooled standard deviation).

        Returns:
            A `Comparison`; its text is a sentence to print.

        Raises:
            ValueError: Fewer than two values (pairs), or a value is NaN or infinite.

        Numerics: float64. When all differences are equal (to 1e-12 of the values) there is no
        spread to test against: p is 0, or 1 if they are all 0.
        """
        seeds_a, seeds_b = self.seeds(a), self.seeds(b)
        values_a, values_b = self.values(a, metric), self.values(b, metric)
        if paired:
            common = sorted(set(seeds_a) & set(seeds_b))
            values_a = values_a[[seeds_a.index(s) for s in common]]
            values_b = values_b[[seeds_b.index(s) for s in common]]
        smallest = min(len(values_a), len(values_b))
        if smallest < 2:
            raise ValueError(
                f"A test needs at least two {'seeds that both have' if paired else 'runs each'}. "
                f"Received: a={a!r} with seeds {seeds_a}, b={b!r} with seeds {seeds_b}. "
                "Run more seeds."
            )
        if not np.isfinite([*values_a, *values_b]).all():
            raise ValueError(
                f"A test needs finite values. Received: {metric} {a}={values_a.tolist()}, "
                f"{b}={values_b.tolist()}. Leave diverged runs out by select(status='finished'), "
                "and say so."
            )
        test = _paired_test if paired else _independent_test
        return Comparison(a, b, metric, paired, **test(values_a, values_b))

    def compare_pairs(
        self, pairs: Mapping[str, tuple[str, str]], metric: str
    ) -> dict[str, Comparison]:
        """Paired tests of several differences, with p-values adjusted for their number by `holm`.

        Args:
            pairs: Name of a difference -> the settings (a, b), of which it is a − b. Pairs that
                share fewer than two seeds, or of which a setting has no runs, are left out.
            metric: Metric, as in `values`.

        Returns:
            Name of the difference -> its `Comparison`, with `p_adjusted`.

        Raises:
            ValueError: As `compare`, for values that are NaN or infinite.
        """
        there = {
            name: (a, b)
            for name, (a, b) in pairs.items()
            if {a, b} <= set(self.names) and len(set(self.seeds(a)) & set(self.seeds(b))) > 1
        }
        tests = {name: self.compare(a, b, metric) for name, (a, b) in there.items()}
        adjusted = holm([test.p for test in tests.values()])
        return {
            name: dataclasses.replace(test, p_adjusted=p)
            for (name, test), p in zip(tests.items(), adjusted, strict=True)
        }

    def best(self, metric: str, by: str) -> dict[str, str]:
        """The name of the best setting in each group, such as each rule's best learning rate.

        Args:
            metric: Metric, as in `values`, of which more is better. The mean over seeds counts; a
                setting with a run that diverged or ended in NaN is no candidate.
            by: Key of the setting that makes the groups.

        Returns:
            Text of the group -> name; groups without a candidate are left out. Of equal means the
            first counts.

        Raises:
            ValueError: The metric is not there.
        """
        found: dict[str, tuple[float, str]] = {}
        for name in self.names:
            runs = [entry for entry in self.runs if entry.name == name]
            if any(entry.status == "diverged" for entry in runs):
                continue
            mean = float(self.values(name, metric).mean())
            group = _text(runs[0].setting(by))
            if math.isfinite(mean) and mean > found.get(group, (-math.inf, ""))[0]:
                found[group] = (mean, name)
        return {group: name for group, (_, name) in found.items()}

    # ------------------------------------------------------------------ private

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"The name must be one of {self.names}. Received: name={name!r}")

    def _of(self, name: str) -> list[Run]:
        self._check_name(name)
        runs = [entry for entry in self.runs if entry.name == name and entry.status != "failed"]
        return sorted(runs, key=lambda entry: entry.seed)

    def _row(self, name: str, metrics: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
        """One line of a table as numbers."""
        self._check_name(name)
        runs = [entry for entry in self.runs if entry.name == name]
        kept = self._of(name)
        row: dict[str, Any] = {"name": name, "n": len(kept)}
        row |= {key: runs[0].setting(key) for key in settings}
        for metric in metrics:
            if metric not in (*self.metrics, "seconds"):
                self.values(name, metric)  # raises
            values = [
                r.seconds if metric == "seconds" else r.value(metric)
                for r in kept
                if metric == "seconds" or metric in r.metrics
            ]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                row[metric] = (float(np.mean(values)), spread, len(values))
        for status in ("diverged", "failed"):
            row[status] = sum(entry.status == status for entry in runs)
        return row


def _matches(value: Any, wanted: Any) -> bool:
    """True if a setting has the wanted value, or one of several wanted ones."""
    if isinstance(wanted, (set, frozenset, list, tuple)) and value not in [wanted, list(wanted)]:
        return any(_matches(value, one) for one in wanted)
    same_kind = isinstance(value, bool) == isinstance(wanted, bool)
    return bool(value == (list(wanted) if isinstance(wanted, tuple) else wanted) and same_kind)


# ---------------------------------------------------------------------------- tables and tests


@dataclass(frozen=True)
class _Figure:
    """One published figure."""

    name: str
    metric: str
    value: float
    source: str = ""


def _published(published: Published | None) -> list[_Figure]:
    """The figures of a mapping name -> metric -> value | (value, source) | list of these."""
    figures = []
    for name, metrics in (published or {}).items():
        if not isinstance(metrics, Mapping):
            raise ValueError(
                "'published' must map name -> metric -> figure or (figure, source). "
                f"Received: {name!r}: {metrics!r}"
            )
        for metric, entries in metrics.items():
            for entry in entries if isinstance(entries, list) else [entries]:
                value, source = entry if isinstance(entry, tuple) else (entry, "")
                number = _number(value, f"published[{name!r}][{metric!r}]")
                figures.append(_Figure(name, metric, number, str(source)))
    return figures


@dataclass(frozen=True)
class Table:
    """A table of results: print it, or take its `markdown`.

    Args:
        header: Column titles.
        rows: Cells as texts, one tuple per line.
        notes: Sentences that belong under the table; default none.
        records: The same lines as numbers: name, n, metric -> (mean, standard deviation, number
            of values), counts of diverged and failed runs.

    Example:
        >>> from keras_norm.experiments import Table
        >>> print(Table(("setting", "n"), (("batch", "5"),)).markdown)
        | setting | n |
        | --- | --- |
        | batch | 5 |
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.header, tuple("-" * width for width in widths), *self.rows]
        aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*aligned, *self.notes])

    @property
    def markdown(self) -> str:
        """The table in Markdown, its notes below it."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        texts = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines]
        return "\n".join([*(f"| {text} |" for text in texts), *(f"\n{n}" for n in self.notes)])

    def _repr_markdown_(self) -> str:
        return self.markdown


def _format_table(
    rows: list[dict[str, Any]],
    metrics: Sequence[str],
    settings: Sequence[str],
    figures: list[_Figure],
    places: Mapping[str, int],
) -> Table:
    """Numbers to texts; a column only where it has something to say."""
    columns: dict[str, list[str]] = {"setting": [row["name"] for row in rows]}
    columns |= {key: [_text(row.get(key, "–")) for row in rows] for key in settings}
    for metric in metrics:
        columns[metric] = [_mean_and_spread(row, metric, places[metric]) for row in rows]
        of_metric = [f for f in figures if f.metric == metric]
        if of_metric:
            title = "published" if len(metrics) == 1 else f"published {metric}"
            columns[title] = [_figures_of(row["name"], of_metric) for row in rows]
    for key in ("n", "diverged", "failed"):
        if key == "n" or any(row.get(key) for row in rows):
            columns[key] = [str(row.get(key, 0)) for row in rows]
    notes = ["Mean ± standard deviation over n seeds."]
    notes += ["Diverged runs count in n and in the mean."] * ("diverged" in columns)
    notes += [
        f"Published {f.metric} of {f.name!r}: {f.value:g}, {f.source}." for f in figures if f.source
    ]
    return Table(
        tuple(columns), tuple(zip(*columns.values(), strict=True)), tuple(notes), tuple(rows)
    )


def _mean_and_spread(row: Mapping[str, Any], metric: str, places: int) -> str:
    if metric not in row:
        return "–"
    mean, spread, count = row[metric]
    text = f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if count > 1 else "")
    return text if count == row["n"] else f"{text} (n = {count})"


def _figures_of(name: str, figures: list[_Figure]) -> str:
    return ", ".join(f"{f.value:g}" for f in figures if f.name == name) or "–"


def _text(value: Any) -> str:
    """A setting as it reads in a table or a legend."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Comparison:
    """The test of a difference between two settings, a − b.

    Args:
        a: Name of the first setting.
        b: Name of the second.
        metric: The metric compared.
        paired: Whether the differences were taken per seed.
        n: Number of pairs, or of values of the smaller sample.
        difference: Mean of a − mean of b.
        low: Lower end of the 95% confidence interval of the difference.
        high: Its upper end.
        p: Two-sided p of the t-test (paired, or Welch's).
        p_rank: Two-sided p of Wilcoxon's signed-rank test, or of Mann and Whitney's.
        effect_size: Cohen's d_z of paired, Cohen's d of independent samples.
        p_adjusted: p adjusted for the number of tests (`Results.compare_pairs`), or None.
    """

    a: str
    b: str
    metric: str
    paired: bool
    n: int
    difference: float
    low: float
    high: float
    p: float
    p_rank: float
    effect_size: float
    p_adjusted: float | None = None

    def in_points(self) -> str:
        """The difference of two fractions in percentage points, as it reads in a sentence.

        Example:
            >>> from keras_norm.experiments import Comparison
            >>> Comparison("a", "b", "accuracy", True, 5, 0.012, 0.004, 0.02, 0.01, 0.06, 1.9, 0.03
            ...     ).in_points()
            '+1.2 points (95 % +0.4 to +2.0; p by Holm 0.03)'
        """
        p = f"p = {self.p:.2g}" if self.p_adjusted is None else f"p by Holm {self.p_adjusted:.2g}"
        return (
            f"{100 * self.difference:+.1f} points (95 % {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}; {p})"
        )

    def __str__(self) -> str:
        t_test, rank_test, size = (
            ("paired t-test", "Wilcoxon", "d_z")
            if self.paired
            else ("Welch's t-test", "Mann–Whitney", "d")
        )
        verdict = "is" if self.p < 0.05 else "is not"
        floor = 2.0 ** (1 - self.n)
        note = f", at best {floor:.2g} with {self.n} pairs" if self.paired and floor > 0.05 else ""
        return (
            f"{self.metric} of {self.a!r} minus {self.b!r}: {self.difference:+.4f} "
            f"(95% confidence interval {self.low:+.4f} to {self.high:+.4f}; "
            f"{t_test} p = {self.p:.2g}, {rank_test} p = {self.p_rank:.2g}{note}; "
            f"Cohen's {size} = {self.effect_size:.2f}; n = {self.n}{' pairs' * self.paired}): "
            f"the difference {verdict} significant at the 5% level."
        )


Floats = npt.NDArray[np.float64]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, by Holm's method.

    Of twenty true null hypotheses one is expected to fall at the 5% level. Whoever claims
    all differences whose adjusted p is at most 0.05 makes any false claim in at most 5% of studies,
    whatever the tests have to do with each other.

    With the p-values in increasing order p_1 <= ... <= p_m:

        adjusted p_k = max over j <= k of min(1, (m - j + 1) p_j)

    Args:
        p_values: Each in [0, 1].

    Returns:
        The adjusted ones, in the order of `p_values`.

    Raises:
        ValueError: A value outside of [0, 1], or NaN.

    Example:
        >>> from keras_norm.experiments import holm
        >>> holm([0.03, 0.01, 0.5])
        [0.06, 0.03, 0.5]

    Reference: Holm, 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    p = [float(value) for value in p_values]
    if not all(0 <= value <= 1 for value in p):
        raise ValueError(f"p-values lie in [0, 1]. Received: p_values={p}.")
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def _paired_test(a: Floats, b: Floats) -> dict[str, Any]:
    from scipy import stats

    differences = a - b
    n, mean = len(differences), float(differences.mean())
    spread = _rounded(differences.std(ddof=1), a, b)
    ranks = differences[np.abs(differences) > _rounding(a, b)]
    return {
        "n": n,
        "effect_size": _ratio(mean, spread),
        "p_rank": float(stats.wilcoxon(ranks).pvalue) if len(ranks) else 1.0,
        **_t_test(mean, spread / math.sqrt(n), n - 1),
    }


def _independent_test(a: Floats, b: Floats) -> dict[str, Any]:
    from scipy import stats

    mean = float(a.mean() - b.mean())
    variances = [_rounded(x.std(ddof=1), a, b) ** 2 for x in (a, b)]
    errors = [v / len(x) for v, x in zip(variances, (a, b), strict=True)]  # of the means, squared
    weights = sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b), strict=True))
    degrees = sum(errors) ** 2 / weights if weights else len(a) + len(b) - 2.0
    pooled = sum(v * (len(x) - 1) for v, x in zip(variances, (a, b), strict=True))
    return {
        "n": min(len(a), len(b)),
        "effect_size": _ratio(mean, math.sqrt(pooled / (len(a) + len(b) - 2))),
        "p_rank": float(stats.mannwhitneyu(a, b).pvalue),
        **_t_test(mean, math.sqrt(sum(errors)), degrees),
    }


def _t_test(mean: float, standard_error: float, degrees: float) -> dict[str, float]:
    """Difference, its 95% confidence interval and two-sided p."""
    from scipy import stats

    margin = float(stats.t.ppf(0.975, degrees)) * standard_error
    p = 2 * float(stats.t.sf(abs(_ratio(mean, standard_error)), degrees))
    return {"difference": mean, "low": mean - margin, "high": mean + margin, "p": p}


def _rounding(a: Floats, b: Floats) -> float:
    return 1e-12 * float(np.abs([*a, *b]).max())


def _rounded(spread: float, a: Floats, b: Floats) -> float:
    """A spread that is rounding error alone counts as 0."""
    return float(spread) if spread > _rounding(a, b) else 0.0


def _ratio(mean: float, spread: float) -> float:
    if spread:
        return mean / spread
    return math.copysign(math.inf, mean) if mean else 0.0


# ---------------------------------------------------------------------------- running


@dataclass(frozen=True)
class _Task:
    """One run to be done."""

    name: str
    settings: dict[str, Any]
    seed: int
    context: dict[str, Any]
    backend: str

    @property
    def group(self) -> str:
        return _canonical([self.settings, self.context, self.backend])


class Progress:
    """What a training function gets to show where it is; made by `run`.

    Pass `progress.callback()` to `fit`, or call `progress.epoch(…)` in a training loop of your own.
    The metrics reported are also kept: a training function that returns no "history" gets them as
    the history of its run.

    State:
        name, seed: Of this run.
        history: Metric -> values reported so far, as in `Run.history`.

    Example:
        >>> from keras_norm.experiments import Progress
        >>> progress = Progress("plain", seed=0)
        >>> progress.epoch(1, epochs=2, loss=0.7)
        >>> progress.epoch(2, epochs=2, loss=0.4, val_accuracy=0.9)
        >>> progress.history
        {'loss': [0.7, 0.4], 'val_accuracy': [None, 0.9]}
    """

    def __init__(self, name: str, seed: int, reporter: _Reporter | None = None) -> None:
        self.name = name
        self.seed = seed
        self.history: dict[str, list[float | None]] = {}
        self._epochs = 0
        self._reporter = reporter

    def epoch(self, epoch: int, epochs: int | None = None, **metrics: float) -> None:
        """Report the end of an epoch.

        Args:
            epoch: Number of the epoch, from 1; shown, not stored.
            epochs: How many there will be; default the setting "epochs", if there is one.
            **metrics: Name -> value at this epoch.
        """
        self._epochs += 1
        for name in metrics:
            self.history.setdefault(name, [None] * (self._epochs - 1))
        for name, values in self.history.items():
            value = metrics.get(name)
            values.append(None if value is None else float(value))
        if self._reporter:
            self._reporter.advance(epoch, epochs, metrics)

    def part(self, epoch: float, epochs: int | None = None) -> None:
        """Report a place within an epoch: 2.5 is the middle of the third."""
        if self._reporter:
            self._reporter.advance(epoch, epochs, None)

    def callback(self) -> Any:
        """A Keras callback that reports each epoch of `fit` and stores the numbers in its logs."""
        import keras

        progress = self

        class _ReportProgress(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                self.epoch = epoch

            def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
                if steps := self.params.get("steps"):
                    progress.part(self.epoch + batch / steps, self.params["epochs"])

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                numbers = {k: v for k, v in (logs or {}).items() if np.ndim(v) == 0}
                progress.epoch(epoch + 1, self.params["epochs"], **numbers)

        return _ReportProgress()


class _Reporter:
    """A progress bar over all runs on a terminal or in a notebook, a line per run elsewhere."""

    def __init__(self, tasks: Sequence[_Task], missing: Sequence[_Task], out: Path, show: bool):
        epochs = [_epochs(task) for task in tasks]
        counted = all(epochs)
        self._weights = {
            id(task): e if counted else 1.0 for task, e in zip(tasks, epochs, strict=True)
        }
        self._total, self._number = len(tasks), len(tasks) - len(missing)
        self._show, self._bar = show, None
        if self._number:
            self.write(f"{self._number} of {self._total} runs are in {out} already")
        if show and missing and (sys.stderr.isatty() or _in_notebook()):
            self._bar = self._make_bar(missing)

    def _make_bar(self, missing: Sequence[_Task]) -> Any:
        from tqdm import tqdm

        total = sum(self._weights.values())
        return tqdm(
            total=total,
            initial=total - sum(self._weights[id(task)] for task in missing),
            bar_format="{percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}  {desc}",
            ncols=_width(),
            nrows=10,  # tqdm hides a bar where the terminal says that it has no rows
            smoothing=0,  # runs differ: the mean speed foretells the end better than the last one
            leave=False,
            file=sys.stderr,
        )

    def start(self, task: _Task) -> None:
        self._number += 1
        self._task, self._done = task, 0.0
        self._label = f"run {self._number} of {self._total}: {task.name}, seed {task.seed}"
        self._describe(self._label)

    def advance(
        self, epoch: float, epochs: float | None, metrics: Mapping[str, Any] | None
    ) -> None:
        if self._bar is None:
            return
        epochs = epochs or _epochs(self._task)
        if epochs:
            self._move_to(min(epoch / epochs, 1.0))
        if metrics is not None:
            of = f" of {epochs:g}" if epochs else ""
            self._describe(f"{self._label}, epoch {epoch:g}{of}  {_listed(metrics)}")

    def finish(self, entry: Run) -> None:
        last = {metric: entry.value(metric) for metric in entry.final or entry.metrics}
        outcome = {"failed": entry.error, "diverged": f"diverged  {_listed(last)}"}
        text = outcome.get(entry.status, _listed(last))
        self.write(f"{self._label}  {text}  ({entry.seconds:.1f} s)")
        self._move_to(1.0)

    def write(self, text: str) -> None:
        if self._show and self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._show:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.ncols = _width()
            self._bar.set_description_str(text)

    def _move_to(self, fraction: float) -> None:
        if self._bar is not None and fraction > self._done:
            step = (fraction - self._done) * self._weights[id(self._task)]
            self._bar.update(min(step, self._bar.total - self._bar.n))  # rounding: tqdm warns
            self._done = fraction


def _epochs(task: _Task) -> float:
    """The setting "epochs", or 0 if there is none."""
    epochs = task.settings.get("epochs")
    return float(epochs) if isinstance(epochs, (int, float)) and epochs > 0 else 0.0


def _width() -> int:
    """Columns of the terminal that stderr is, 80 if it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return shutil.get_terminal_size().columns


def _listed(metrics: Mapping[str, float]) -> str:
    """At most four metrics, for a line on a terminal."""
    return "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:4])


class _Store:
    """The results in a folder: which runs are there, which are missing, saved after each one."""

    def __init__(self, folder: Path, tasks: Sequence[_Task], resume: bool, title: str | None):
        self._folder = folder
        old = self._load()
        self._title = old.title if title is None else title
        groups = {task.name: task.group for task in tasks}
        asked = {(task.name, task.group, task.seed) for task in tasks}
        self._runs: list[Run] = []
        self._superseded: list[Run] = []
        for entry in (*old.runs, *old.superseded):
            group = _group(entry)
            if (entry.name, group, entry.seed) in asked and not (
                resume and entry.status != "failed"
            ):
                continue
            current = group == groups[entry.name] if entry.name in groups else entry in old.runs
            (self._runs if current else self._superseded).append(entry)
        there = {(entry.name, entry.seed) for entry in self._runs}
        self.tasks = tasks
        self.missing = [task for task in tasks if (task.name, task.seed) not in there]
        before, after = ({id(entry) for entry in runs} for runs in (old.runs, self._runs))
        self._changed = before != after or old.title != self._title

    def _load(self) -> Results:
        path = self._folder / "results.json"
        if path.exists():
            return Results.load(path)
        if path.with_suffix(".csv").exists():
            raise ValueError(
                "A results.csv without its results.json would be overwritten. Received: "
                f"out={str(self._folder)!r}. Move the file away or choose another folder."
            )
        return Results()

    def warn_about_changes(self, code: str, function: str) -> None:
        """Resumed runs count as good, but not silently when something else has changed."""
        asked = {(task.name, task.seed) for task in self.tasks}
        kept = [entry for entry in self._runs if (entry.name, entry.seed) in asked]
        reasons = {
            f"by other code of {function!r}" for r in kept if code and r.code not in ("", code)
        }
        now = _versions()
        for entry in kept:
            then = entry.environment.get("versions", {})
            changed = {k for k in then.keys() & now.keys() if then[k] != now[k]}
            reasons |= {f"with {k} {then[k]} (now {now[k]})" for k in changed}
        if reasons:
            warnings.warn(
                f"Runs in {self._folder} were made {', '.join(sorted(reasons))}. They are kept and "
                "used; resume=False (--fresh) makes them anew.",
                stacklevel=3,
            )

    def add(self, entry: Run) -> None:
        self._runs.append(entry)
        self.save()

    def save(self) -> None:
        order = {name: i for i, name in enumerate(dict.fromkeys(t.name for t in self.tasks))}
        runs = sorted(self._runs, key=lambda r: (order.get(r.name, len(order)), r.seed))
        results = Results(runs, title=self._title, superseded=self._superseded)
        try:
            results.save(self._folder, overwrite=True)
        except KeyboardInterrupt:  # came between two files: finish, then stop
            results.save(self._folder, overwrite=True)
            raise
        self._changed = False

    def finish(self) -> Results:
        if self._changed:
            self.save()
        asked = {(task.name, task.seed): i for i, task in enumerate(self.tasks)}
        names = list(dict.fromkeys(task.name for task in self.tasks))
        runs = [entry for entry in self._runs if (entry.name, entry.seed) in asked]
        runs.sort(key=lambda entry: (names.index(entry.name), entry.seed))
        return Results(runs, title=self._title)


def run(
    function: TrainFunction,
    settings: Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int],
    *,
    out: str | os.PathLike[str],
    resume: bool = True,
    title: str | None = None,
    context: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_error: str = "raise",
) -> Results:
    """Train every setting with every seed, saving each run the moment it ends.

    Runs go seed by seed through all settings, so that an early stop leaves a balanced study.
    Before each run the seeds of Python, NumPy and (if it is loaded) Keras are set to the run's.

    Args:
        function: `function(settings, seed, progress)` trains once and returns a dict with
            "history" (metric -> value per epoch, as `fit(…).history`; an entry "epoch" gives the
            epoch numbers; default: what was reported to `progress`), "final" (metric -> number),
            optionally "diverged" (bool), and anything else that is JSON-able, kept as extra.
            It gets a copy of the settings, the seed, and a `Progress`.
        settings: Name -> settings of JSON values. Keys must not contain dots. If all have a number
            under "epochs", the time left is reckoned in epochs.
        seeds: Different integers in [0, 2**32).
        out: Folder for results.json and results.csv, made if it is missing. Several studies may
            share one, as long as their names differ.
        resume: Whether runs that are already in `out`, with the same name, settings, seed, context
            and backend, are taken from there; default True. False makes the asked ones anew.
        title: Title of the study, stored in results.json; default none, or the stored one.
        context: JSON values that all runs share and that results depend on, such as the name of
            the data and its size; stored with each run.
        progress: Whether to show progress on stderr: a bar on a terminal and in a notebook,
            elsewhere a line per finished run; default True.
        on_error: "raise" (default): an exception of `function` goes on to the caller, after every
            finished run was saved. "record": the run is stored as failed, the next one begins, and
            resuming tries it again.

    Returns:
        The `Results` of the settings and seeds asked for. A run whose loss ended as NaN or
        infinite is not an error: its status is "diverged".

    Raises:
        ValueError: An argument breaks its rule; `function` returns something unfit; `out` holds a
            results.json that cannot be read (it is left untouched).
        RuntimeError: Another process is running experiments into `out`.

    State:
        Runs of the same name with other settings, context or backend move to "superseded" in
        results.json: they are never mixed with the new ones, and are used again when their
        settings are asked for again. Ctrl-C, an exception or a killed process loses at most the run
        it interrupts. A warning says when resumed runs were made by other code of `function` or
        with other versions of the libraries.

    Example:
        >>> import tempfile
        >>> from keras_norm import experiments
        >>> def train(settings, seed, progress):
        ...     loss = 1.0 + 0.1 * seed
        ...     for epoch in range(settings["epochs"]):
        ...         loss *= settings["factor"]
        ...         progress.epoch(epoch + 1, loss=loss)
        ...     return {"final": {"test_loss": loss}}
        >>> settings = {"slow": {"factor": 0.9, "epochs": 3}, "fast": {"factor": 0.5, "epochs": 3}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = experiments.run(train, settings, range(3), out=folder, progress=False)
        ...     again = experiments.Results.load(folder)
        >>> print(again.table("test_loss", digits=3))
        setting  test_loss      n
        -------  -------------  -
        slow     0.802 ± 0.073  3
        fast     0.137 ± 0.012  3
        Mean ± standard deviation over n seeds.
    """
    if on_error not in ("raise", "record"):
        raise ValueError(f"on_error must be 'raise' or 'record'. Received: on_error={on_error!r}")
    tasks = _plan(settings, seeds, context)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder. Received: out={str(out)!r}, which is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        store = _Store(folder, tasks, resume, title)
        code = _digest(function)
        store.warn_about_changes(code, getattr(function, "__name__", "function"))
        environment: dict[str, Any] = {}
        with contextlib.closing(_Reporter(tasks, store.missing, folder, progress)) as reporter:
            for task in store.missing:
                reporter.start(task)
                entry = _execute(function, task, reporter, on_error, folder)
                environment = environment or describe_machine()  # not before the backend is in use
                store.add(dataclasses.replace(entry, code=code, environment=environment))
                reporter.finish(entry)
        return store.finish()


def _plan(
    settings: Mapping[str, Mapping[str, Any]], seeds: Iterable[int], context: Any
) -> list[_Task]:
    """All runs that were asked for, checked before the first one starts."""
    seeds = list(seeds)
    valid = all(isinstance(s, (int, np.integer)) and 0 <= s < 2**32 for s in seeds)
    if not seeds or not valid or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds must be different integers in [0, 2**32), at least one. Received: seeds={seeds}"
        )
    if not settings:
        raise ValueError("settings must name at least one setting. Received: settings={}")
    for name, values in settings.items():
        named = isinstance(name, str) and bool(name.strip()) and name.isprintable()
        if not named or not isinstance(values, Mapping):
            raise ValueError(
                "settings must map printable, non-empty names to dicts of settings. "
                f"Received: {name!r}: {values!r}"
            )
    plain = {n: _plain_settings(v, f"settings[{n!r}]") for n, v in settings.items()}
    context = _plain_settings(context or {}, "context")
    backend = _backend()
    return [_Task(n, plain[n], int(s), context, backend) for s in seeds for n in plain]


def _execute(
    function: TrainFunction, task: _Task, reporter: _Reporter, on_error: str, folder: Path
) -> Run:
    """One run, from its seeds to its record."""
    _set_seeds(task.seed)
    progress = Progress(task.name, task.seed, reporter)
    started, clock = _now(), time.perf_counter()
    fields: dict[str, Any]
    try:
        returned = function(deepcopy(task.settings), task.seed, progress)
        seconds = time.perf_counter() - clock
        fields = _outcome(returned, progress)
    except BaseException as error:
        seconds = time.perf_counter() - clock
        if on_error == "raise" or not isinstance(error, Exception):
            error.add_note(
                f"This happened in setting {task.name!r}, seed {task.seed}. All runs finished "
                f"before are saved in {folder}; the same call goes on from there."
            )
            raise
        reporter.write("".join(traceback.format_exception(error)).rstrip())
        fields = {"status": "failed", "error": _plain(f"{type(error).__name__}: {error}", "error")}
    if seconds > 1:
        gc.collect()  # models are full of reference cycles
    return Run(
        name=task.name,
        settings=task.settings,
        seed=task.seed,
        seconds=seconds,
        context=task.context,
        backend=task.backend,
        started=started,
        finished=_now(),
        **fields,
    )


def _outcome(returned: Any, progress: Progress) -> dict[str, Any]:
    """What a training function returned, as fields of `Run`."""
    if not isinstance(returned, Mapping):
        raise ValueError(
            "The training function must return a dict with 'history', 'final' or both. "
            f"Received: {type(returned).__name__}"
        )
    extra = dict(returned)
    epochs, history = _history(extra.pop("history", None) or progress.history)
    final = {m: _number(v, f"final[{m!r}]") for m, v in (extra.pop("final", None) or {}).items()}
    diverged = bool(extra.pop("diverged", False)) or _diverged(history, final)
    return {
        "status": "diverged" if diverged else "finished",
        "epochs": epochs,
        "history": history,
        "final": final,
        "extra": _plain(extra, "The result"),
    }


def _set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- the generator that training code may be using
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(seed)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _digest(function: TrainFunction) -> str:
    """Digest of the function's syntax tree: comments and layout do not count."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------- short runs


def classification_metrics(logits: npt.ArrayLike, y: npt.ArrayLike) -> dict[str, float]:
    """Loss, accuracy and confidence of a classifier's logits.

    With z the logits of an example, p = softmax(z) and y its class:

        loss = mean of -log p_y    accuracy = share of argmax p = y    confidence = mean of max p

    A classifier is calibrated, on the whole, where confidence and accuracy are equal.

    Args:
        logits: (N, K), N >= 1. With logits that are not finite, the loss is NaN or infinite.
        y: (N,), class numbers in [0, K).

    Returns:
        Dict with "loss", "accuracy" and "confidence".

    Raises:
        ValueError: The shapes do not fit, or a class number lies outside of [0, K).

    Example:
        >>> from keras_norm.experiments import classification_metrics
        >>> metrics = classification_metrics([[0.0, 0.0], [0.0, 50.0]], [0, 1])
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'loss': 0.347, 'accuracy': 1.0, 'confidence': 0.75}

    Numerics: float64, with the largest logit of each example taken out, so that nothing overflows.
        Of equal logits the first counts as the answer.
    """
    z, classes = np.asarray(logits, dtype=np.float64), np.asarray(y)
    if z.ndim != 2 or len(z) == 0 or classes.shape != z.shape[:1]:
        raise ValueError(
            "logits must be (N, K) and y (N,), with N >= 1. "
            f"Received: logits of shape {z.shape}, y of shape {classes.shape}."
        )
    if not ((classes >= 0) & (classes < z.shape[1])).all():
        raise ValueError(
            f"y must hold class numbers in [0, {z.shape[1]}). "
            f"Received: y from {classes.min()} to {classes.max()}."
        )
    with np.errstate(invalid="ignore"):
        z = z - z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))  # (N, K)
    return {
        "loss": float(-log_p[np.arange(len(z)), classes].mean()),
        "accuracy": float((z.argmax(axis=1) == classes).mean()),
        "confidence": float(np.exp(log_p.max(axis=1)).mean()),
    }


def train_on_arrays(
    model: Any,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    evaluate: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None,
    every: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Train a compiled classifier on arrays, and judge it in inference mode after an epoch.

    For studies of many short runs. `fit` reports a training accuracy that is the mean over an epoch
    in which the weights moved and dropout was on; here, as in most published tables, it is that
    of the net at the end of the epoch, in inference mode. (And an epoch of a few steps costs the
    time of its steps: `fit` adds about a tenth of a second for each.)

    Args:
        model: Compiled `keras.Model` that gives logits (N, K).
        x: Inputs (N, ...).
        y: Class numbers (N,).
        epochs: Number of epochs, at least 1.
        batch_size: Examples per step, at least 1; the last step of an epoch takes what is left.
        seed: Of the order of the examples, a new one each epoch; default 0.
        evaluate: Name -> (inputs, class numbers) to judge the model by; default none.
        every: How many epochs lie between two evaluations; the last epoch always has one.
            Default 1.
        progress: The `Progress` of a run, to show and keep the history; default none.

    Returns:
        History: "epoch", "loss" (the mean over the examples since the last evaluation, in training
        mode and with the weights of their step) and, for each name in `evaluate`, "{name}_loss"
        and "{name}_accuracy"; one value per evaluation.

    Raises:
        ValueError: The model is not compiled, or a number is below 1.

    Example:
        >>> import keras, numpy as np
        >>> from keras_norm.experiments import train_on_arrays
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile(keras.optimizers.Adam(0.1), loss)
        >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
        >>> y = (x[:, 0] > 0).astype("int32")
        >>> history = train_on_arrays(
        ...     model, x, y, epochs=20, batch_size=16, evaluate={"train": (x, y)}, every=10
        ... )
        >>> history["epoch"], history["train_accuracy"][-1] > 0.9
        ([10.0, 20.0], True)

    State: a `model.stop_training` has no effect; callbacks are for `fit`.
    """
    numbers = {"epochs": epochs, "batch_size": batch_size, "every": every}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1. Received: {name}={number}")
    if not getattr(model, "compiled", False):
        raise ValueError(
            "The model must be compiled: its loss and optimizer train it. "
            f"Received: {getattr(model, 'name', model)!r}. Call model.compile(optimizer, loss)."
        )
    if not model.optimizer.built:
        from keras_norm import models

        models.make_variables(model, x, y)
    rng = np.random.default_rng(seed)
    history: dict[str, list[float]] = {}
    losses: list[float] = []  # of each example in its step
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            at = order[start : start + batch_size]
            step = model.train_on_batch(x[at], y[at], return_dict=True)
            losses += [float(step["loss"])] * len(at)
        if epoch % every == 0 or epoch == epochs:
            values = {"loss": float(np.mean(losses))}
            for name, (inputs, classes) in (evaluate or {}).items():
                metrics = classification_metrics(_logits(model, inputs), classes)
                values |= {f"{name}_{key}": metrics[key] for key in ("loss", "accuracy")}
            losses = []
            for key, value in {"epoch": float(epoch), **values}.items():
                history.setdefault(key, []).append(value)
            if progress is not None:
                progress.epoch(epoch, epochs, **values)
    return history


def _logits(model: Any, x: npt.NDArray[Any], batch_size: int = 2000) -> Floats:
    """What the model gives in inference mode, without compiling it for that."""
    import keras

    parts = [
        keras.ops.convert_to_numpy(model(x[start : start + batch_size], training=False))
        for start in range(0, len(x), batch_size)
    ]
    return np.concatenate(parts).astype(np.float64)


class ModelPool:
    """Compiled models for studies of many short runs: made once per setting, fresh in every run.

    The first step of a compiled model takes a second, in which its computation is traced; with
    nets that are trained in as little, that is half of a study. The pool keeps the model of each
    setting, and brings it into the state that a new one of this seed would have: weights, seed
    generators, and an optimizer that has not seen a gradient.

    Args:
        make: `make(settings, seed)` gives a built, compiled `keras.Model`, whose structure depends
            on the settings alone. It is called for every run.

    Call arguments:
        settings: Settings of the run, JSON values.
        seed: Seed of the run.

    Returns:
        A model that gives the numbers of `make(settings, seed)`. The next call with these settings
        changes it: what is to outlast the run must be copied.

    Raises:
        ValueError: Two models of the same settings differ in their weights' shapes.

    Example:
        >>> import keras
        >>> from keras_norm.experiments import ModelPool
        >>> def make(settings, seed):
        ...     kernel = keras.initializers.GlorotUniform(seed=seed)
        ...     layers = [keras.Input((3,)), keras.layers.Dense(2, kernel_initializer=kernel)]
        ...     model = keras.Sequential(layers)
        ...     model.compile("adam", "mse")
        ...     return model
        >>> pool = ModelPool(make)
        >>> first, again = pool({}, 0), pool({}, 1)
        >>> again is first, bool((again.get_weights()[0] == make({}, 1).get_weights()[0]).all())
        (True, True)
    """

    def __init__(self, make: Callable[[dict[str, Any], int], Any]) -> None:
        self._make = make
        self._models: dict[str, tuple[Any, list[Any]]] = {}

    def __call__(self, settings: dict[str, Any], seed: int) -> Any:
        """The model of these settings, in the state that it starts from with this seed."""
        new = self._make(settings, seed)
        key = _canonical(_plain_settings(settings, "settings"))
        if key not in self._models:
            new.optimizer.build(new.trainable_variables)
            state = [np.array(v.numpy()) for v in new.optimizer.variables]
            self._models[key] = new, state
            return new
        model, state = self._models[key]
        model.set_weights(new.get_weights())
        for old, fresh in zip(_other_states(model), _other_states(new), strict=True):
            old.assign(fresh)
        for variable, value in zip(model.optimizer.variables, state, strict=True):
            variable.assign(value)
        return model


def _other_states(model: Any) -> list[Any]:
    """What a model's layers keep beside their weights, such as the states of seed generators."""
    known = {id(v) for v in (*model.weights, *model.metrics_variables)}
    return [v for v in model.variables if id(v) not in known]


# ---------------------------------------------------------------------------- machine


def describe_machine() -> dict[str, Any]:
    """Versions and hardware that a result depends on; no host name, user or path.

    Returns:
        Dict with "versions" (python, keras, backend packages, numpy, scipy, keras_norm),
        "hardware" (platform, cpu, cores this process may use, memory in GiB, gpus, and device: the
        one that Keras computes on, if Keras is loaded), and "summary", one line to print.

    Example:
        >>> from keras_norm.experiments import describe_machine
        >>> sorted(describe_machine())
        ['hardware', 'summary', 'versions']
    """
    versions, hardware = _versions(), _hardware()
    parts = [hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]]
    software = [f"{k} {v}" for k, v in versions.items() if k in ("keras", _backend(), "python")]
    return {
        "versions": versions,
        "hardware": hardware,
        "summary": f"{', '.join(parts)}; {', '.join(software)}",
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("keras", "tensorflow", "jax", "torch", "numpy", "scipy", "keras_norm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_gib": _memory(),
        "gpus": _gpu_names(),
    }
    if "keras" in sys.modules:
        place = str(sys.modules["keras"].ops.zeros(()).device)
        hardware["device"] = place.rpartition("device:")[2]
    return hardware


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max": no quota
    return cores


def _memory() -> float | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _gpu_names() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _backend() -> str:
    """The backend that Keras has, or would take when it is imported."""
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    if backend := os.environ.get("KERAS_BACKEND"):
        return backend
    folder = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((folder / "keras.json").read_text())["backend"])
    return "tensorflow"


# ---------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class TutorialArguments:
    """What a tutorial was asked to do; made by `tutorial_arguments`.

    Args:
        mode: "fast", "default" or "full".
        out: Folder for results, made already.
        seeds: Number of seeds that was asked for, or None.
        data_dir: Folder of the data sets, or None.
        resume: False if runs that are there already are to be made anew.

    Example:
        >>> from keras_norm.experiments import TutorialArguments
        >>> from pathlib import Path
        >>> arguments = TutorialArguments("fast", Path("results"))
        >>> arguments.choose(fast=2, default=5, full=10)
        2
        >>> arguments.seed_range(fast=2, default=5, full=10)
        range(0, 2)
    """

    mode: str
    out: Path
    seeds: int | None = None
    data_dir: str | None = None
    resume: bool = True

    def choose(self, *, fast: T, default: T, full: T) -> T:
        """The value for this mode."""
        return {"fast": fast, "default": default, "full": full}[self.mode]

    def seed_range(self, *, fast: int, default: int, full: int) -> range:
        """Seeds 0 … n − 1, n from `--seeds` or else from the mode."""
        return range(self.seeds or self.choose(fast=fast, default=default, full=full))

    def finish(
        self, answers: Sequence[str], *data: Any, seeds: str, instead_of: str, **measured: Any
    ) -> None:
        """The end of a tutorial: prints the answers, saves them, and says what was written.

        Args:
            answers: To the exercises, in their order.
            *data: `datasets.Data` that the tutorial ran on; their sources are printed.
            seeds: How many there were, such as "5, 2 in the exercises".
            instead_of: Data for which the embedded digits may have had to stand in.
            **measured: What else is saved beside the answers, as JSON values.

        The file `answers.json` in `out` is replaced whole or not at all.

        Raises:
            TypeError: For values that JSON does not know; the file is as it was.
        """
        print("\n\n".join(answers))
        with replace_file(self.out / "answers.json") as path:
            path.write_text(json.dumps({"answers": list(answers), **measured}, indent=1))
        print()
        for found in data:
            print(f"{found.title}: {found.source}")
        print(f"Seeds: {seeds}. Written to {self.out}:")
        for path in sorted(self.out.glob("*.*")):
            print(f"  {path}")
        if any(found.fallback for found in data):
            print(f"Figures of the embedded digits, NOT of {instead_of}: see the box above.")


def tutorial_arguments(
    description: str, argv: Sequence[str] | None = None, *, name: str | None = None
) -> TutorialArguments:
    """The flags that all tutorials share: --fast, --full, --seeds, --data-dir, --out, --fresh.

    Args:
        description: What the tutorial does, for `--help`.
        argv: Flags; default those of the command line. In a notebook, whose kernel has a command
            line of its own, the default is what the environment variable KERAS_NORM_FLAGS holds.
        name: Name of the folder under results/ when there is no `--out`; default the script's.

    Returns:
        `TutorialArguments`; the folder `out` exists and can be written to.

    Raises:
        SystemExit: Status 2 and one line that says why, after an unknown flag, an abbreviated one,
            --fast with --full, less than one seed, or a folder that cannot be written. Status 0
            after --help.

    Example:
        >>> import tempfile
        >>> from keras_norm.experiments import tutorial_arguments
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = tutorial_arguments("Example.", ["--fast", "--seeds=3", "--out", folder])
        >>> arguments.mode, arguments.seeds, arguments.resume
        ('fast', 3, True)
    """
    script = Path(sys.argv[0])
    if argv is None:
        in_kernel = _in_notebook() and "kernel" in script.name
        argv = shlex.split(os.environ.get("KERAS_NORM_FLAGS", "")) if in_kernel else sys.argv[1:]
    default_out = Path("results") / (name or script.stem or "tutorial")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_const", const="fast", dest="mode", help="small sizes")
    size.add_argument("--full", action="store_const", const="full", dest="mode", help="full sizes")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds, at least 1")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data sets")
    parser.add_argument(
        "--out",
        type=Path,
        default=default_out,
        metavar="DIR",
        help="folder for results and plots (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh",
        "--no-resume",
        action="store_true",
        help="make all runs anew, also those that are in the folder already",
    )
    flags = parser.parse_args(argv)
    data_dir = None if flags.data_dir is None else Path(flags.data_dir).expanduser()
    if data_dir is not None and not data_dir.is_dir():
        parser.error(f"argument --data-dir: must be a folder that exists; got {flags.data_dir!r}")
    _check_writable(flags.out, parser)
    return TutorialArguments(
        mode=flags.mode or "default",
        out=flags.out,
        seeds=flags.seeds,
        data_dir=None if data_dir is None else str(data_dir),
        resume=not flags.fresh,
    )


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return number


def _check_writable(folder: Path, parser: argparse.ArgumentParser) -> None:
    try:
        with replace_file(folder / ".writable") as probe:
            probe.touch()
        (folder / ".writable").unlink()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(folder)!r}: {error.strerror}")


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None

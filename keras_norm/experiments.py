"""Experiments: settings × seeds, run once, kept for good, and turned into tables and tests.

`run` trains every setting with every seed, saves each run the moment it ends, and resumes where it
stopped. `Results` reads, selects, tabulates and compares what was saved.

The files: `results.json` is the whole record, strict JSON, one line per run::

    {"schema": "keras_norm.results", "schema_version": 1, "title": "…",
     "environments": [{"versions": {…}, "hardware": {…}, "summary": "…"}],
     "runs": [{"name": …, "seed": …, "status": …, "seconds": …, "settings": {…}, "context": {…},
               "backend": …, "epochs": […], "history": {metric: […]}, "final": {metric: …},
               "extra": {…}, "error": …, "started": …, "finished": …, "code": …,
               "environment": index}],
     "superseded": [… runs whose name now stands for other settings …]}

JSON has neither NaN nor infinity: in `history`, `final` and `extra` they are the strings "NaN",
"Infinity" and "-Infinity", which are read back as numbers; null is a metric that was not measured
in that epoch.

`results.csv` holds the current runs as one tidy table, enough to redraw every plot. A run has one
row per epoch (`row` = "epoch") and one last row (`row` = "final", no epoch) with its final metrics.
Columns: name, seed, status, backend, seconds, row, epoch, then `settings.*` and `context.*`
(nested keys joined by dots), then `metrics.*`. An empty cell is a missing key or metric; "nan",
"inf" and "-inf" are numbers; a text that would read as another type is quoted as in JSON.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import datetime
import gc
import hashlib
import inspect
import os
import random
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_norm import _machine
from keras_norm._experiment_comparison import Comparison, holm
from keras_norm._experiment_results import Results, Table
from keras_norm._experiment_run import (
    Run,
    canonical,
    group_of,
    has_diverged,
    read_final,
    read_history,
    to_csv,
    to_plain,
    to_plain_settings,
)
from keras_norm._experiment_short import ModelPool, classification_metrics, train_on_arrays
from keras_norm._files import locked, replace_file
from keras_norm._machine import describe_machine
from keras_norm._tutorial_arguments import TutorialArguments, tutorial_arguments

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

TrainFunction = Callable[[dict[str, Any], int, "Progress"], Mapping[str, Any]]


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
        return canonical([self.settings, self.context, self.backend])


class Progress:
    """Reports how far a training function has got; made by `run`, which passes it in.

    Pass `progress.callback()` to `fit`, or call `progress.epoch(…)` in a training loop of your own.
    The reported metrics are also kept: if a training function returns no "history", they become the
    history of its run.

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

    def epoch(self, epoch: int, epochs: int | None = None, **metrics: float | None) -> None:
        """Report the end of an epoch.

        Args:
            epoch: Number of the epoch, from 1; shown, not stored.
            epochs: How many there will be; default the setting "epochs", if there is one.
            **metrics: Name -> value at this epoch; None if it was not measured.
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
        """A Keras callback that reports each epoch of `fit` and keeps the numbers in its logs."""
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
        if show and missing and (sys.stderr.isatty() or _machine.in_notebook()):
            self._bar = self._make_bar(missing)

    def _make_bar(self, missing: Sequence[_Task]) -> Any:
        from tqdm import tqdm

        total = sum(self._weights.values())
        return tqdm(
            total=total,
            initial=total - sum(self._weights[id(task)] for task in missing),
            bar_format="{percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}  {desc}",
            ncols=_machine.terminal_width(),
            nrows=10,  # tqdm hides a bar if the terminal reports no rows
            smoothing=0,  # runs differ: the mean speed predicts the end better than the last one
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
            self._bar.ncols = _machine.terminal_width()
            self._bar.set_description_str(text)

    def _move_to(self, fraction: float) -> None:
        if self._bar is not None and fraction > self._done:
            step = (fraction - self._done) * self._weights[id(self._task)]
            self._bar.update(min(step, self._bar.total - self._bar.n))  # tqdm warns of rounding
            self._done = fraction


def _epochs(task: _Task) -> float:
    """The setting "epochs", or 0 if there is none."""
    epochs = task.settings.get("epochs")
    return float(epochs) if isinstance(epochs, (int, float)) and epochs > 0 else 0.0


def _listed(metrics: Mapping[str, float | None]) -> str:
    """Up to four metrics as text for one line."""
    measured = [(k, v) for k, v in metrics.items() if v is not None]
    return "  ".join(f"{k} {v:.4g}" for k, v in measured[:4])


class _Store:
    """The results in a folder: knows which runs are missing, and saves after each run."""

    def __init__(self, folder: Path, tasks: Sequence[_Task], resume: bool, title: str | None):
        self._folder = folder
        old = self._load()
        self._title = old.title if title is None else title
        groups = {task.name: task.group for task in tasks}
        self._runs: list[Run] = []
        self._superseded: list[Run] = []
        there: set[tuple[str, int]] = set()
        for entry in (*old.runs, *old.superseded):
            group = group_of(entry)
            current = group == groups[entry.name] if entry.name in groups else entry in old.runs
            (self._runs if current else self._superseded).append(entry)
            if current and resume and entry.status != "failed":
                there.add((entry.name, entry.seed))  # others stay until the new run is saved
        self.tasks = tasks
        self._there = there
        self.missing = [task for task in tasks if (task.name, task.seed) not in there]
        before, after = ({id(entry) for entry in runs} for runs in (old.runs, self._runs))
        self._changed = before != after or old.title != self._title or not self._csv_is_whole(old)

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

    def _csv_is_whole(self, old: Results) -> bool:
        """Whether the csv is current: a kill between the two files leaves that of the last save."""
        if not old.runs:
            return True
        path = self._folder / "results.csv"
        return path.exists() and path.read_bytes() == to_csv(old.runs).encode("utf-8")

    def warn_about_changes(self, code: str, function: str) -> None:
        """Warns if the code or the versions of resumed runs differ; the runs are used anyway."""
        asked = {(task.name, task.seed) for task in self.tasks}
        kept = [r for r in self._runs if (r.name, r.seed) in asked & self._there]
        reasons = {
            f"by other code of {function!r}" for r in kept if code and r.code not in ("", code)
        }
        now = _machine.installed_versions()
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
        others = [r for r in self._runs if (r.name, r.seed) != (entry.name, entry.seed)]
        self._runs = [*others, entry]
        self.save()

    def save(self) -> None:
        order = {name: i for i, name in enumerate(dict.fromkeys(t.name for t in self.tasks))}
        runs = sorted(self._runs, key=lambda r: (order.get(r.name, len(order)), r.seed))
        results = Results(runs, title=self._title, superseded=self._superseded)
        try:
            results.save(self._folder, overwrite=True)
        except KeyboardInterrupt:  # if it came between two files: finish, then stop
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
            optionally "diverged" (bool), and any other JSON values, which are kept as extra. It is
            an error to return neither "history" nor "final" and to report nothing.
            The function gets a copy of the settings, the seed, and a `Progress`.
        settings: Name -> settings of JSON values. Keys must not contain dots. If all have a number
            under "epochs", the remaining time is estimated in epochs.
        seeds: Different integers in [0, 2**32).
        out: Folder for results.json and results.csv, made if it is missing. Several studies may
            share one, as long as their names differ.
        resume: Whether runs that are already in `out`, with the same name, settings, seed, context
            and backend, are taken from there; default True. False does the requested runs again.
        title: Title of the study, stored in results.json; default none, or the stored one.
        context: JSON values that all runs share and that results depend on, such as the name of
            the data and its size; stored with each run.
        progress: Whether to show progress on stderr: a bar on a terminal and in a notebook,
            elsewhere a line per finished run; default True.
        on_error: "raise" (default): an exception of `function` reaches the caller; every finished
            run has then been saved. "record": the run is stored as failed, the next one begins,
            and resuming tries it again.

    Returns:
        The `Results` of the requested settings and seeds. A run whose loss ended as NaN or
        infinite is not an error: its status is "diverged".

    Raises:
        ValueError: An argument breaks its rule; `function` returns something invalid; `out` holds a
            results.json that cannot be read (it is left untouched).
        RuntimeError: Another process is running experiments into `out`.

    State:
        Runs of the same name with other settings, context or backend move to "superseded" in
        results.json: they are never mixed with the new ones, and are used again when their
        settings are requested again. Ctrl-C, an exception or a killed process loses at most the run
        it interrupts. A warning says if resumed runs were made by other code of `function` or
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
    if not callable(function):
        raise ValueError(
            "function must be callable, as function(settings, seed, progress). "
            f"Received: function={function!r}"
        )
    tasks = _plan(settings, seeds, context)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder. Received: out={str(out)!r}, which is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
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
    """All requested runs, checked before the first one starts."""
    if not isinstance(settings, Mapping):
        raise ValueError(
            "settings must be a dict of name -> settings. "
            f"Received: settings={settings!r}. Give each a name to be found by."
        )
    if not isinstance(seeds, Iterable):
        raise ValueError(
            f"seeds must be a list of integers. Received: seeds={seeds!r}. For five of them, pass "
            "range(5)."
        )
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
    plain = {n: to_plain_settings(v, f"settings[{n!r}]") for n, v in settings.items()}
    context = to_plain_settings(context or {}, "context")
    backend = _machine.keras_backend()
    return [_Task(n, plain[n], int(s), context, backend) for s in seeds for n in plain]


def _execute(
    function: TrainFunction, task: _Task, reporter: _Reporter, on_error: str, folder: Path
) -> Run:
    """Does one run, from setting the seeds to its record."""
    _set_seeds(task.seed)
    progress = Progress(task.name, task.seed, reporter)
    started, clock = _now(), time.perf_counter()

    def entry(**fields: Any) -> Run:
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

    try:
        returned = function(deepcopy(task.settings), task.seed, progress)
        seconds = time.perf_counter() - clock
        result = entry(**_outcome(returned, progress))
    except BaseException as error:
        seconds = time.perf_counter() - clock
        if on_error == "raise" or not isinstance(error, Exception):
            error.add_note(
                f"This happened in setting {task.name!r}, seed {task.seed}. All runs finished "
                f"before are saved in {folder}; the same call goes on from there."
            )
            raise
        reporter.write("".join(traceback.format_exception(error)).rstrip())
        text = to_plain(f"{type(error).__name__}: {error}", "error")
        result = entry(status="failed", error=text)
    if seconds > 1:
        gc.collect()  # models are full of reference cycles
    return result


def _outcome(returned: Any, progress: Progress) -> dict[str, Any]:
    """What a training function returned, as fields of `Run`."""
    if not isinstance(returned, Mapping):
        raise ValueError(
            "The training function must return a dict with 'history', 'final' or both. "
            f"Received: {type(returned).__name__}"
        )
    if not (progress.history or {"history", "final"} & returned.keys()):
        raise ValueError(
            "The training function must return its metrics under 'history' or 'final', or report "
            f"them to `progress`; other keys are kept as extra. Received: {list(returned)}. Return "
            '{"final": {metric: number}}.'
        )
    extra = dict(returned)
    epochs, history = read_history(extra.pop("history", None) or progress.history)
    final = read_final(extra.pop("final", None) or {})
    diverged = bool(extra.pop("diverged", False)) or has_diverged(history, final)
    return {
        "status": "diverged" if diverged else "finished",
        "epochs": epochs,
        "history": history,
        "final": final,
        "extra": to_plain(extra, "The result"),
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

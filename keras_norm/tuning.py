"""Searches for hyperparameters that survive what happens over a night.

KerasTuner is the engine: its hyperparameters, its oracles (random, Bayesian, Hyperband), its
trials, and its chief and workers over gRPC. Around it stand

    hypermodels     nets for images with every normalization of this package, within a budget
    the runner      each trial in a process of its own; what is killed goes on where it was
    the end         a report with plots, and the best nets trained again and tested once

The command is `keras-norm tune`; here is the same for Python:

    from keras_norm.tuning import search

    found = search("results/search", data="cifar10", trials=40, epochs=8, workers=2)
    found.best(3)

Importing this module imports neither Keras nor KerasTuner, and starts nothing.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_norm._search_run import run_search
from keras_norm._search_settings import (
    OBJECTIVES,
    SearchError,
    Settings,
    TrialRecord,
    at_least,
    ranked,
    read_search,
    read_trials,
)

if TYPE_CHECKING:
    from keras_norm._search_space import Candidate, SmoothedCrossentropy, Task, images

__all__ = [
    "OBJECTIVES",
    "Candidate",
    "Search",
    "SearchError",
    "Settings",
    "SmoothedCrossentropy",
    "Task",
    "TrialRecord",
    "images",
    "load",
    "report",
    "retrain",
    "search",
]

_OF_SPACES = ("Candidate", "SmoothedCrossentropy", "Task", "images")


if not TYPE_CHECKING:  # to a type checker a function of this name would make every name right

    def __getattr__(name: str) -> Any:
        """What needs Keras is imported when it is asked for."""
        if name in _OF_SPACES:
            return getattr(importlib.import_module("keras_norm._search_space"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Search:
    """A search that has been made, as it lies in its folder; from `search` or `load`.

    Attributes:
        out: its folder.
        settings: `Settings`.
        trials: list of `TrialRecord`, in the order in which they were made.
    """

    out: Path
    settings: Settings
    trials: list[TrialRecord]

    def best(self, count: int = 1) -> list[TrialRecord]:
        """The best trials by the objective, the best first.

        Args:
            count: int >= 1, how many. Default: 1.

        Returns:
            List of `TrialRecord`, shorter where fewer have finished.

        Raises:
            SearchError: for another `count`.
        """
        at_least("count", count, 1)
        return ranked(self.trials, self.settings.direction)[:count]

    def pareto(self) -> list[TrialRecord]:
        """The trials that no other beats in accuracy, seconds and parameters at once.

        Returns:
            List of `TrialRecord`: for each of them, every other trial has a lower validation
            accuracy, or took more seconds, or has more parameters, or equals it in all three.
            The most accurate first. Pruned trials, whose seconds are those of a part, are left
            out.
        """
        return pareto([t for t in self.trials if t.status == "completed"], self.settings)


def pareto(trials: list[TrialRecord], settings: Settings) -> list[TrialRecord]:
    """See `Search.pareto`."""

    def costs(trial: TrialRecord) -> tuple[float, float, float]:
        accuracy = trial.reached("val_accuracy", settings) or 0.0
        return -accuracy, trial.last("seconds") or 0.0, trial.last("parameters") or 0.0

    def beaten(own: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return other != own and all(b <= a for a, b in zip(own, other, strict=True))

    points = [costs(t) for t in trials]
    front = [
        t for t, p in zip(trials, points, strict=True) if not any(beaten(p, q) for q in points)
    ]
    return sorted(front, key=costs)


def load(out: str | os.PathLike[str]) -> Search:
    """Reads a search from its folder, also one that is running.

    Args:
        out: the folder.

    Returns:
        `Search`.

    Raises:
        SearchError: if there is none, or its files cannot be read.
    """
    folder = Path(out).expanduser()
    settings = Settings.of(read_search(folder)["settings"])
    return Search(folder, settings, read_trials(folder))


def search(
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    threads: int | None = None,
    chief: str | None = None,
    join: str | None = None,
    time_limit: float | None = None,
    worker_timeout: float = 60.0,
    progress: bool = True,
    **options: Any,
) -> Search:
    """Searches for the hyperparameters of a net for images.

    Each trial runs in a process of its own. One that raises, diverges, dies, or goes beyond
    `trial_timeout` or `trial_memory` is a failed trial, with its reason and its log.txt; the search
    goes on. Without `trial_timeout`, one that hangs is waited for. Workers and a chief that are
    killed are started again; a search that was stopped goes on with `resume`, running trials from
    their last finished epoch.

    Args:
        out: folder of the search, new or empty.
        resume: go on with the search in `out`. Options that are not given are those it had;
            `space` may be given if the file or module has moved. A warning says if its code has
            changed.
        overwrite: throw the search in `out` away, with the folders of its trials and all that is in
            "report", "retrained" and "tensorboard", and begin anew. Other files stay.
        workers: int >= 1, trials at a time. Each has a GPU, where there are GPUs. Default: 1.
        threads: int >= 1, cores that each worker may use; all that a worker starts stays on them.
            Default: an equal share of this machine's cores, for one worker all; where there are
            GPUs, any.
        chief: "HOST:PORT" to listen on for workers of other machines (`workers` may be 0 then).
            Default: a free port of this machine, for this machine alone.
        join: "HOST:PORT" of a chief whose trials to run; `out` then holds logs and checkpoints, in
            a folder of its own for each search.
        time_limit: minutes after which no new trial begins. Default: none.
        worker_timeout: seconds >= 10 of silence after which the trial of a worker is given to
            another. Default: 60.
        progress: whether to print a table with a progress bar. Default: True.
        **options: what decides on the trials:

            data: "cifar10", "fashion_mnist", "mnist" or "digits". Default: "cifar10".
            data_dir: folder of the data sets, as in `keras_norm.datasets.load`.
            subset: number of images to train on, drawn by class; the same ones for every seed of
                a search. Default: all.
            validation: fraction of all training images that is held out first. Default: 0.1.
            space: "images", or a function of one's own, "file.py:function" or
                "module:function", from (`keras_tuner.HyperParameters`, `Task`) to `Candidate`.
                A file may import what lies beside it: its folder goes in front of `sys.path`.
            families: of "images": some of "mlp", "cnn", "fast". Default: ("mlp", "cnn").
            fixed: hyperparameter -> value, not to be searched.
            refine, refine_top: folder of an earlier search; the space is narrowed around its best
                `refine_top` trials (default 5).
            tuner: "random", "bayesian" or "hyperband". Default: "random".
            objective: "val_accuracy"; "val_accuracy_reestimated", with the statistics of batch
                normalization re-estimated before each validation; "val_loss", the plain cross
                entropy, without penalties and label smoothing; or
                "accuracy_per_second", validation accuracy above chance per second of
                training, without the compilation of the first step.
                A trial counts by its last epoch, to which `retrain` trains too.
            trials: number of trials (default 20); that of Hyperband follows from its epochs.
            epochs: per trial (default 10), `factor` of Hyperband (default 3).
            prune: stop a trial whose best value so far is below the median of the others' at the
                same epoch: from epoch `prune_after` (default 1) on, and once `prune_least`
                (default 5) others have got there; never after its last epoch. Default: False.
            seed: int >= 0. Default: 0.
            max_parameters, max_flops: budget; proposals beyond it do not become trials.
            trial_timeout: seconds for one trial. trial_memory: GiB resident (Linux). With `resume`,
                None takes them off.
            tensorboard: write logs for TensorBoard and its HParams plugin into out/tensorboard;
                that of a trial that goes on is written anew, with its earlier epochs.

    Returns:
        `Search`.

    Raises:
        SearchError: a `ValueError`; for options out of their range or without effect, such as
            `prune_after` without `prune`, packages that are missing, a folder that holds something
            else or cannot be written, a space whose defaults make no trial, an address that is in
            use or does not answer, data that cannot be had; with `resume`, for another space, seed,
            or other setting that would mix two searches. Then nothing has been changed. Also where
            a disk is full: the search stops, and `resume` goes on.
        KeyboardInterrupt: after all processes have ended; `resume` goes on.

    Numerics: with one worker, equal settings and `threads` give equal trials to the last bit on one
        machine, interrupted or not (but not where seconds decide: "accuracy_per_second"; and of the
        callbacks of a space of one's own only the `variables` are kept: see `Candidate`).
        With several, that holds for random search without pruning; a Bayesian search, Hyperband
        and pruning look at whatever has ended by then.

    Security: the protocol between chief and workers has neither passwords nor encryption. It stays
        on this machine unless `chief` says otherwise.
    """
    folder = Path(out).expanduser()
    run_search(
        folder,
        options,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        threads=threads,
        chief=chief,
        join=join,
        time_limit=time_limit,
        worker_timeout=worker_timeout,
        progress=progress,
    )
    if join is not None:
        return Search(folder, Settings.of({}), [])
    return load(folder)


def report(
    search: str | os.PathLike[str] | Search, out: str | os.PathLike[str] | None = None
) -> Path:
    """Writes a page about a search: index.html, its plots, and trials.csv.

    The plots: learning curves of the best, the best so far over training time, accuracy against
    seconds and parameters, learning rate against accuracy by normalization, parallel coordinates,
    and (from 12 trials on) the importance of each hyperparameter.

    Args:
        search: a `Search`, or its folder; it may be running.
        out: folder to write to. Default: "report" in that of the search.

    Returns:
        The path of index.html.

    Raises:
        SearchError: if there is no search, or no trial of it has a score, or `out` cannot be
            written, or matplotlib is missing.
    """
    from keras_norm._search_report import write_report

    found = search if isinstance(search, Search) else load(search)
    try:
        folder = found.out / "report" if out is None else Path(out).expanduser()
        return write_report(found, folder)
    except OSError as error:
        raise SearchError(f"The report cannot be written: {error}.") from None


def retrain(
    search: str | os.PathLike[str] | Search,
    *,
    top: int = 1,
    seeds: int = 1,
    epochs: int | None = None,
    subset: int | None = None,
    space: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Trains the best of a search again, on training and validation images, and tests them once.

    Each training runs in a process of its own. When it is interrupted, the same call goes on from
    the last finished epoch.

    Args:
        search: a `Search`, or its folder.
        top: int >= 1, how many trials. Default: 1.
        seeds: int >= 1, trainings of each, with seeds of their own. More of them may be added
            later, to the same choice; what has been trained is kept. Default: 1.
        epochs: of each. Default: those of the search.
        subset: number of images to train on. Default: all, also where the search had a subset.
        space: where the function of a space of one's own is now, if its file or module has moved.
            Default: where it was. If its code has changed, a warning says so.
        out: folder to write to, new, empty, or of an earlier call. Default: "retrained" in that of
            the search.
        overwrite: do it again, although the test set has been used. What is there is replaced
            when all of the new is done, not before.
        progress: whether to show a bar. Default: True.

    Returns:
        The path of model_card.md; beside it are model_card.json and model.keras, the net of the
        best trial and the first seed, and in folders those of the others.

    Raises:
        SearchError: for options out of their range; if there is no trial with a score; if `out`
            holds a search, or something else; if the test set has been used for this search already
            and another choice (also one for another `out`, also by a call that was interrupted); if
            the data, the space or packages are not there; if a training fails, or finds a disk
            full, where the same call goes on; if `space` is another function, or has other
            hyperparameters.
    """
    from keras_norm._search_retrain import write_retrained

    found = search if isinstance(search, Search) else load(search)
    return write_retrained(
        found,
        found.out / "retrained" if out is None else Path(out).expanduser(),
        top=top,
        seeds=seeds,
        epochs=epochs,
        subset=subset,
        space=space,
        overwrite=overwrite,
        progress=progress,
    )

"""Searches for hyperparameters that survive crashes and interruptions.

KerasTuner is the engine: its hyperparameters, its oracles (random, Bayesian, Hyperband), its
trials, and its chief and workers over gRPC. This package adds

    hypermodels     nets for images with every normalization of this package, within a budget
    the runner      each trial in a process of its own; killed trials resume where they were
    the end         a report with plots, and the best nets trained again and tested once

The command is `keras-norm tune`; the same from Python:

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


if not TYPE_CHECKING:  # with this function a type checker would accept every name

    def __getattr__(name: str) -> Any:
        """Imports names that need Keras when they are first used."""
        if name in _OF_SPACES:
            return getattr(importlib.import_module("keras_norm._search_space"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Search:
    """A search as it is stored in its folder; returned by `search` and `load`.

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
            List of `TrialRecord`, shorter if fewer have finished.

        Raises:
            SearchError: for another `count`.
        """
        at_least("count", count, 1)
        return ranked(self.trials, self.settings.direction)[:count]

    def pareto(self) -> list[TrialRecord]:
        """The trials that no other beats in accuracy, seconds and parameters at once.

        Returns:
            List of `TrialRecord`, the most accurate first: for each of them, every other trial has
            a lower validation accuracy, or took more seconds, or has more parameters, or equals
            it in all three. Pruned trials, whose seconds are incomplete, are left out.
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
    """Reads a search from its folder, even while it is running.

    Args:
        out: the folder.

    Returns:
        `Search`.

    Raises:
        SearchError: if the folder holds no search, or its files cannot be read.
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

    Each trial runs in a process of its own. One that raises, diverges, dies, or exceeds
    `trial_timeout` or `trial_memory` is a failed trial, with its reason and its log.txt; the search
    continues. Without `trial_timeout`, the search waits for a trial that hangs. Workers and a chief
    that are killed are started again; `resume` continues a search that was stopped, with running
    trials from their last finished epoch.

    Args:
        out: folder of the search, new or empty.
        resume: continue the search in `out`. Options that are not given keep their values;
            `space` may be given if the file or module has moved. A warning says if its code has
            changed.
        overwrite: delete the search in `out`, with the folders of its trials and everything in
            "report", "retrained" and "tensorboard", and start again. Other files stay.
        workers: int >= 1, trials at a time. Each gets a GPU, if there are any. Default: 1.
        threads: int >= 1, cores that each worker may use, with all processes that it starts.
            Default: an equal share of this machine's cores, so all for one worker; if there are
            GPUs, any cores.
        chief: "HOST:PORT" to listen on for workers of other machines (`workers` may then be 0).
            Default: a free port of this machine, for this machine alone.
        join: "HOST:PORT" of the chief whose trials are to be run; `out` then holds logs and
            checkpoints, in a separate folder for each search.
        time_limit: minutes after which no new trial starts. Default: none.
        worker_timeout: seconds >= 10 of silence after which a worker's trial is given to another.
            Default: 60.
        progress: whether to print a table with a progress bar. Default: True.
        **options: what defines the trials:

            data: "cifar10", "fashion_mnist", "mnist" or "digits". Default: "cifar10".
            data_dir: folder of the data sets, as in `keras_norm.datasets.load`.
            subset: number of images to train on, drawn by class; the same ones for every seed of
                a search. Default: all.
            validation: fraction of all training images, held out first. Default: 0.1.
            space: "images", or a function of your own, "file.py:function" or
                "module:function", from (`keras_tuner.HyperParameters`, `Task`) to `Candidate`.
                A file may import its neighbours: its folder is put in front of `sys.path`.
            families: for "images": some of "mlp", "cnn", "fast". Default: ("mlp", "cnn").
            fixed: hyperparameter -> value, for those not to be searched.
            refine, refine_top: folder of an earlier search; the space is narrowed around its best
                `refine_top` trials (default 5).
            tuner: "random", "bayesian" or "hyperband". Default: "random".
            objective: "val_accuracy"; "val_accuracy_reestimated", with the statistics of batch
                normalization re-estimated before each validation; "val_loss", the plain cross
                entropy, without penalties and label smoothing; or
                "accuracy_per_second", validation accuracy above chance per second of
                training, without the compilation of the first step.
                A trial is scored by its last epoch, which `retrain` trains to as well.
            trials: number of trials (default 20); for Hyperband it follows from the epochs.
            epochs: per trial (default 10). `factor`: of Hyperband (default 3).
            prune: stop a trial whose best value so far is worse than the median of the others' at
                the same epoch: from epoch `prune_after` (default 1) on, and once `prune_least`
                (default 5) others have got there; never after its last epoch. Default: False.
            seed: int >= 0. Default: 0.
            max_parameters, max_flops: budget; proposals beyond it do not become trials.
            trial_timeout: seconds for one trial. trial_memory: GiB resident (Linux). With `resume`,
                None removes the limit.
            tensorboard: write logs for TensorBoard and its HParams plugin into out/tensorboard;
                the log of a resumed trial is written again, with its earlier epochs.

    Returns:
        `Search`.

    Raises:
        SearchError: a `ValueError`; for options out of their range or without effect, such as
            `prune_after` without `prune`, missing packages, a folder that holds something else or
            cannot be written, a space whose defaults make no trial, an address that is in use or
            does not answer, data that cannot be loaded; with `resume`, for another space, seed, or
            other setting that would mix two searches. In these cases nothing has been changed.
            Also if a disk is full: then the search stops, and `resume` continues it.
        KeyboardInterrupt: after all processes have ended; `resume` continues the search.

    Numerics: with one worker, equal settings and `threads` give equal trials to the last bit on one
        machine, interrupted or not (except where seconds decide, as in "accuracy_per_second"; and
        of the callbacks of your own space only the `variables` are kept: see `Candidate`).
        With several workers, that holds for random search without pruning; a Bayesian search,
        Hyperband and pruning depend on which trials have ended by then.

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

    The plots: learning curves of the best trials, the best value so far over training time,
    accuracy against seconds and parameters, accuracy against learning rate by normalization,
    parallel coordinates, and (from 12 trials on) the importance of each hyperparameter.

    Args:
        search: a `Search`, or its folder; it may be running.
        out: folder to write to. Default: "report" in the folder of the search.

    Returns:
        The path of index.html.

    Raises:
        SearchError: if there is no search, none of its trials has a score, `out` cannot be
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
    """Trains the best nets of a search again, with the validation images, and tests them once.

    Each training runs in a process of its own. After an interruption, the same call continues from
    the last finished epoch.

    Args:
        search: a `Search`, or its folder.
        top: int >= 1, how many trials. Default: 1.
        seeds: int >= 1, trainings of each trial, each with its own seed. More seeds may be added
            later for the same choice; finished trainings are kept. Default: 1.
        epochs: of each training. Default: those of the search.
        subset: number of images to train on. Default: all, even if the search had a subset.
        space: where the function of your own space is now, if its file or module has moved.
            Default: where it was. If its code has changed, a warning says so.
        out: folder to write to: new, empty, or of an earlier call. Default: "retrained" in the
            folder of the search.
        overwrite: do it again, although the test set has been used. The old results are replaced
            only when all new ones are done.
        progress: whether to show a progress bar. Default: True.

    Returns:
        The path of model_card.md; beside it are model_card.json, model.keras (the net of the best
        trial and the first seed), and folders with the other nets.

    Raises:
        SearchError: for options out of their range; if there is no trial with a score; if `out`
            holds a search, or something else; if the test set has already been used for this search
            and another choice (even for another `out`, or by a call that was interrupted); if the
            data, the space or packages are missing; if a training fails or finds a disk full, after
            which the same call continues; if `space` is another function, or has other
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

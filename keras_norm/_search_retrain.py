"""After a search: its best trials trained again on all training images, and tested once.

retrained/plan.json                 what is to be trained
retrained/trial_07/seed_0/          model.keras, result.json; while it trains, checkpoint.npz
retrained/model.keras               that of the best trial (by validation) and the first seed
retrained/model_card.md, .json      what it is, what it was trained on, how good it is
retrained/next/                     the same, for trainings that replace it when they are done

In the folder of the search, tested.json says for which choice the test set has been used, and where
the results are. It is written before the first net is tested.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_norm._files import clear_remains, no_room, replace_file
from keras_norm._machine import describe_machine
from keras_norm._search_process import Channel, Nursery
from keras_norm._search_run import describe
from keras_norm._search_settings import (
    PACKAGES,
    SearchError,
    Settings,
    TrialRecord,
    absolute_space,
    at_least,
    environment,
    is_moved,
    locked,
    read_search,
    require,
    warn_of_code,
)

if TYPE_CHECKING:
    from keras_norm.tuning import Search

__all__ = ["run", "write_retrained"]


def write_retrained(
    search: Search,
    out: Path,
    *,
    top: int,
    seeds: int,
    epochs: int | None,
    subset: int | None,
    space: str | None,
    overwrite: bool,
    progress: bool,
) -> Path:
    """See `keras_norm.tuning.retrain`."""
    epochs = search.settings.epochs if epochs is None else epochs
    for name, value in (("top", top), ("seeds", seeds), ("epochs", epochs)):
        at_least(name, value, 1)
    chosen = search.best(top)
    if not chosen:
        raise SearchError(f"No trial in {str(search.out)!r} has a score.")
    settings = dataclasses.replace(search.settings, epochs=epochs, subset=subset, fixed={})
    _check_out(out)
    plan = {
        "trials": [t.number for t in chosen],
        "seeds": seeds,
        "epochs": settings.epochs,
        "subset": subset,
    }
    saved = read_search(search.out)
    settings, names = _space_of(settings, space, saved)
    whole = {**plan, "of": _origin(search, chosen)}
    count = len(chosen) * seeds
    require("To train the best again", *PACKAGES)
    with locked(out):
        folder = _folder(search, out, whole, overwrite)
        with _Runs(out, folder, settings, saved["space"], names, count, progress) as runs:
            runs.prepare(chosen, seeds)  # from here on the data and the space are known to exist
            _begin(search, out, folder, whole)
            runs.testing = lambda: _note(search, out, whole, tested=True)
            results = [[runs.result(trial, seed) for seed in range(seeds)] for trial in chosen]
        _finish(search, folder, plan, chosen, results)
        if folder != out:
            _replace(out, folder)
        return out / "model_card.md"


def _space_of(
    settings: Settings, space: str | None, saved: Mapping[str, Any]
) -> tuple[Settings, list[str] | None]:
    """Settings with the present place of the space, and names to check if it may be another one."""
    moved = settings.space if space is None else absolute_space(space)
    if moved != settings.space and not is_moved(settings.space, moved):
        raise SearchError(
            f"The search was made with space={settings.space!r}: name the file or module where "
            f"that function is now. Received: space={space!r}"
        )
    changed = warn_of_code(moved, saved["code"], "what is trained may not be what was found")
    names = None
    if changed or moved != settings.space:
        names = [e["config"]["name"] for e in saved["whole_space"]["space"]]
    return dataclasses.replace(settings, space=moved), names


def _origin(search: Search, chosen: list[TrialRecord]) -> dict[str, Any]:
    """What the trainings depend on, besides the numbers of the trials."""
    names = ("data", "space", "objective", "seed", "families")
    settings = search.settings.to_dict()
    own = {name: settings[name] for name in names}
    return dict(json.loads(json.dumps({**own, "values": [t.values for t in chosen]})))


def _check_out(out: Path) -> None:
    """Refuses a folder that holds something else, because its files would be replaced."""
    if (out / "search.json").exists():
        raise SearchError(
            f"out must be a folder of its own, and {str(out)!r} holds a search: leave it out, or "
            "choose a new or an empty folder."
        )
    if (out / "plan.json").exists() or not out.is_dir():
        return
    if others := sorted(p.name for p in out.iterdir() if not _is_left_over(p)):
        raise SearchError(
            f"{str(out)!r} holds other files and no training of the best, such as {others[0]!r}: "
            "choose a new or an empty folder."
        )


def _is_left_over(path: Path) -> bool:
    """Whether this may be left over from a training that was killed before it began."""
    return path.name in (".lock", "processes.txt") or path.match(".plan.*.json")


def _folder(search: Search, out: Path, plan: dict[str, Any], overwrite: bool) -> Path:
    """Where to train: next to the results to be replaced, if there are any."""
    earlier = _read(out / "plan.json")
    if overwrite:
        return out if earlier is None else out / "next"
    noted = _read(search.out / "tested.json") or {}
    place = search.out / noted.get("out", out.absolute())
    if earlier is not None and not place.exists():  # it was noted before the search was moved
        place = out
    if noted.get("tested") and not _adds_seeds(noted["plan"], plan):
        raise SearchError(_used(place))
    if (out / "model_card.json").exists() and not _adds_seeds(earlier, plan):
        raise SearchError(_used(out))
    if earlier is not None and not _adds_seeds(earlier, plan):
        raise SearchError(
            f"{str(out)!r} holds an unfinished training of another choice: repeat that with the "
            "same options, or pass --overwrite."
        )
    return out


def _used(out: Path) -> str:
    card = out / "model_card.md"
    seen = f"by what is unfinished in {str(out)!r}"
    if card.exists():
        seen = f"see {str(card)!r}"
    elif not (out / "plan.json").exists():
        seen = f"by what was in {str(out)!r}, which is gone"
    return (
        f"The test set has been used for this search: {seen}. To choose again by what it said "
        "would make its answer worthless; --overwrite does it. The same choice may go on, and "
        "more seeds of it may be added."
    )


def _adds_seeds(earlier: dict[str, Any] | None, plan: dict[str, Any]) -> bool:
    """Whether the choice is the same, with at least as many seeds."""
    if earlier is None:
        return False
    return {**earlier, "seeds": 0} == {**plan, "seeds": 0} and plan["seeds"] >= earlier["seeds"]


def _begin(search: Search, out: Path, folder: Path, plan: dict[str, Any]) -> None:
    earlier = _read(folder / "plan.json")
    if folder != out and not _adds_seeds(earlier, plan):
        shutil.rmtree(folder, ignore_errors=True)  # left by an attempt with another plan
    noted = _read(search.out / "tested.json") or {}
    if noted.get("tested"):  # written again too, so that nothing is trained that cannot be noted
        _write_note(search, noted)
    else:
        _note(search, out, plan, tested=False)
    _write_json(folder / "plan.json", plan)


def _note(search: Search, out: Path, plan: dict[str, Any], *, tested: bool) -> None:
    """Notes in the folder of the search for which choice the test set has been used, and where.

    A place inside that folder is noted relative to it, because the search may be moved.
    """
    place, own = out.resolve(), search.out.resolve()
    where = place.relative_to(own) if place.is_relative_to(own) else place
    _write_note(search, {"tested": tested, "plan": plan, "out": str(where)})


def _write_note(search: Search, note: dict[str, Any]) -> None:
    try:
        _write_json(search.out / "tested.json", note)
    except OSError as error:
        raise SearchError(
            f"The use of the test set cannot be noted in {str(search.out)!r}: {error.strerror}."
        ) from None


def _replace(out: Path, folder: Path) -> None:
    """Replaces the old results by the new ones; the card, which says that they are there, last.

    The plan comes first: it names the trials whose folders are ours.
    """
    for number in (_read(out / "plan.json") or {}).get("trials", []):
        shutil.rmtree(out / f"trial_{number}", ignore_errors=True)
    order = {"plan.json": 0, "model_card.json": 2}
    for path in sorted(folder.iterdir(), key=lambda p: order.get(p.name, 1)):
        path.replace(out / path.name)
    folder.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise SearchError(f"{str(path)!r} cannot be read: {error}.") from None


class _Runs:
    """Runs the trainings one after another, each in a process of its own."""

    def __init__(
        self,
        out: Path,
        folder: Path,
        settings: Settings,
        space: Any,
        names: list[str] | None,
        count: int,
        progress: bool,
    ) -> None:
        from tqdm import tqdm

        self.out, self.folder, self.settings = out.absolute(), folder.absolute(), settings
        self.space, self.names = space, names
        total = count * settings.epochs
        self.bar = tqdm(total=total, unit="epoch", disable=None if progress else True)
        self.done = 0
        self.nursery: Nursery | None = None
        self.testing: Callable[[], None] = lambda: None  # called before a net is tested

    def __enter__(self) -> _Runs:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.nursery is not None:
            self.nursery.close()

    def prepare(self, chosen: list[TrialRecord], seeds: int) -> None:
        """Loads the data and the space if there is something to train."""
        if not all(self._result(t, s).exists() for t in chosen for s in range(seeds)):
            self._nursery()

    def _result(self, trial: TrialRecord, seed: int) -> Path:
        return self.folder / f"trial_{trial.number}" / f"seed_{seed}" / "result.json"

    def result(self, trial: TrialRecord, seed: int) -> dict[str, Any]:
        """The result of one training; trains if that has not been done."""
        path = self._result(trial, seed)
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.bar.set_postfix_str(f"#{trial.number}, seed {seed}")
        if path.exists():
            self.testing()
        else:
            spec = {
                "settings": self.settings.to_dict(),
                "space": self.space,
                "names": self.names,
                "values": trial.values,
                "number": trial.number,
                "seed": seed,
                "folder": str(folder),
            }
            self._train(spec, folder)
        self.done += 1
        self._show(0)
        return dict(_read(path) or {})

    def _show(self, epoch: int) -> None:
        """Shows how many epochs are done, including those of the current training."""
        self.bar.n = self.settings.epochs * self.done + epoch
        self.bar.refresh()

    def _train(self, spec: dict[str, Any], folder: Path) -> None:
        child = self._nursery().start(
            f"kn-retrain-{spec['number']}",
            "keras_norm._search_retrain:run",
            spec,
            folder / "log.txt",
        )
        message: dict[str, Any] | None = None
        with contextlib.suppress(EOFError):
            while (message := child.channel.receive()) is not None and "failed" not in message:
                if "testing" in message:
                    self.testing()
                    child.channel.send({"go": True})
                else:
                    self._show(message["epoch"])
        code = child.wait()
        if not (folder / "result.json").exists():
            reason = (message or {}).get("failed", f"the process ended with status {code}")
            raise SearchError(f"Trial {spec['number']} with seed {spec['seed']}: {reason}.")

    def _nursery(self) -> Nursery:
        if self.nursery is None:
            self.nursery = Nursery.new(environment(), self.out / "processes.txt")
            settings, folder = self.settings.to_dict(), str(self.out)
            spec = {"settings": settings, "folder": folder, "all_images": True}
            error = self.nursery.preload("keras_norm._search_trial:preload", spec)
            if error:
                raise SearchError(" ".join(error.split()))
        return self.nursery


# In the processes ---------------------------------------------------------------------------


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """The process of one training.

    Sends {"epoch": n} after each epoch, and {"testing": true} before the test, when it waits for an
    answer; last {"failed": reason}.
    """
    from keras_norm._search_trial import brief, print_traceback

    folder = Path(spec["folder"])
    try:
        for name in ("checkpoint.npz", "model.keras", "result.json"):
            clear_remains(folder / name)
        result = _trained(channel, spec)
        _write_json(folder / "result.json", result)
        (folder / "checkpoint.npz").unlink(missing_ok=True)
    except Exception as error:
        print_traceback()
        reason = brief(error)
        if full := no_room(error):
            reason = (
                f"it cannot be kept, and goes on later: {full}: {str(folder)!r}. Make room: the "
                "same command goes on from the last epoch"
            )
        channel.send({"failed": reason})


def _trained(channel: Channel, spec: dict[str, Any]) -> dict[str, Any]:
    """Trains, tests and saves one net; resumes where an earlier attempt was stopped."""
    import keras

    from keras_norm import _search_trial as trial
    from keras_norm import models

    settings, folder = Settings.of(spec["settings"]), Path(spec["folder"])
    seed = trial.trial_seed(settings, 10_000 * (spec["seed"] + 1) + spec["number"])
    keras.utils.set_random_seed(seed)
    data = trial.load(settings, all_images=True)
    if spec["names"] is not None:
        trial.check_names(settings, spec["names"], data)
    candidate = trial.make_candidate(settings, spec["space"], spec["values"], data)
    model = candidate.build()
    history: list[dict[str, float]] = []
    if (folder / "checkpoint.npz").exists():
        history = trial.load_state(folder / "checkpoint.npz", model, candidate.callbacks)
    elif candidate.begin is not None:
        candidate.begin(model, data.train.x)

    def epoch_ended(epoch: int, logs: Any) -> None:
        history.append(trial.scalars(logs))
        if not math.isfinite(history[-1]["loss"]):
            raise ValueError(f"diverged: the loss is {history[-1]['loss']} in epoch {epoch + 1}")
        own = candidate.callbacks
        trial.save_state(folder / "checkpoint.npz", model, history, callbacks=own)
        channel.send({"epoch": epoch + 1})

    keeper = keras.callbacks.LambdaCallback(on_epoch_end=epoch_ended)
    batches = data.train.batches(candidate.batch_size, seed=seed, augment=candidate.augment)
    batches.epoch = len(history)
    if len(history) < settings.epochs:
        models.make_variables(model, data.train.x, data.train.y)
        model.fit(
            batches,
            initial_epoch=len(history),
            epochs=settings.epochs,
            callbacks=[*candidate.callbacks, keras.callbacks.TerminateOnNaN(), keeper],
            shuffle=False,
            verbose=0,
        )
    return _tested(channel, settings, spec, model, data, history)


def _tested(
    channel: Channel,
    settings: Settings,
    spec: Mapping[str, Any],
    model: Any,
    data: Any,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    from keras_norm import _search_trial as trial

    if settings.objective == "val_accuracy_reestimated" and trial.has_moving_statistics(model):
        trial.reestimated(model, data)
    with replace_file(Path(spec["folder"]) / "model.keras") as temporary:
        model.save(temporary)
    channel.ask({"testing": True})
    test = model.evaluate(
        data.test.x, data.test.y, batch_size=trial.EVALUATION_BATCH, return_dict=True, verbose=0
    )
    test = trial.scalars(test)
    return {
        "seed": spec["seed"],
        "test_accuracy": test["accuracy"],
        "test_loss": trial.comparable_loss(test),
        "history": history,
        "parameters": model.count_params(),
        "flops": trial.count_flops(model),
        "data": {
            "title": data.title,
            "source": data.source,
            "train": len(data.train),
            "test": len(data.test),
            "class_names": list(data.class_names),
            "mean": data.mean.ravel().tolist(),
            "std": data.std.ravel().tolist(),
            "input_shape": list(data.input_shape),
        },
    }


# The card -----------------------------------------------------------------------------------


def _finish(
    search: Search,
    out: Path,
    plan: dict[str, Any],
    chosen: list[TrialRecord],
    results: list[list[dict[str, Any]]],
) -> None:
    """Writes the results, and last the card, which says that the test set has been used."""
    first = out / f"trial_{chosen[0].number}" / "seed_0" / "model.keras"
    clear_remains(out / "model.keras")
    with replace_file(out / "model.keras") as temporary:
        shutil.copyfile(first, temporary)
    best = results[0]
    card = {
        "data": best[0]["data"],
        "hyperparameters": chosen[0].hyperparameters,
        "parameters": best[0]["parameters"],
        "flops_forward": best[0]["flops"],
        "training": plan,
        "search": search.settings.to_dict(),
        "search_trials": len(search.trials),
        "results": [
            {
                "trial": trial.number,
                "search_score": trial.score,
                "search_epochs": trial.epochs,
                "search_best_epoch": trial.best_epoch(search.settings),
                "hyperparameters": trial.hyperparameters,
                "test_accuracy": [r["test_accuracy"] for r in runs],
                "test_loss": [r["test_loss"] for r in runs],
            }
            for trial, runs in zip(chosen, results, strict=True)
        ],
        "machine": describe_machine(),
    }
    path = out / "model_card.md"
    with replace_file(path) as temporary:
        temporary.write_text(_markdown(card), encoding="utf-8")
    _write_json(out / "model_card.json", card)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _markdown(card: dict[str, Any]) -> str:
    data, training, settings = card["data"], card["training"], card["search"]
    height, width, channels = data["input_shape"]
    white = 16 if settings["data"] == "digits" else 255  # as scikit-learn stores the digits
    tested = card["results"][0]["test_accuracy"]
    count = len(tested)
    spread = f" (mean ± standard deviation over {count} seeds)" if count > 1 else ""
    own = f" The model file is that of seed 0, with {tested[0]:.4f}." if count > 1 else ""
    rows = [
        f"| #{r['trial']} | {r['search_score']:.4f} | {r['search_epochs']} | "
        f"{r['search_best_epoch']} | {_spread(r['test_accuracy'])} | "
        f"{describe(r['hyperparameters'])} |"
        for r in card["results"]
    ]
    header = ["trial", f"{settings['objective']} in the search", "epochs there", "best epoch"]
    header += ["test accuracy", "hyperparameters"]
    values = [f"| {n} | {v} |" for n, v in card["hyperparameters"].items()]
    return f"""# Model card

A net that tells the {len(data["class_names"])} classes of {data["title"]} apart:
test accuracy **{_spread(tested)}**{spread}, n = {data["test"]:,} test images.{own}

## Use

```python
import keras
from keras_norm import models  # makes the layers known that the file names

model = keras.models.load_model("model.keras", compile=False)
mean, std = {_numbers(data["mean"])}, {_numbers(data["std"])}
# pixels: (N, {height}, {width}, {channels}), from 0 to {white}
logits = model.predict((pixels / {white} - mean) / std)
```

Classes, in the order of the logits: {", ".join(data["class_names"])}.

## Model

{card["parameters"]:,} parameters; {_count(card["flops_forward"])} operations for one
image (convolutions and dense layers).

| hyperparameter | value |
|---|---|
{chr(10).join(values)}

## Training

{data["train"]:,} images of {data["title"]} (training and validation images together),
{training["epochs"]} epochs. Source of the data: {data["source"]}

## Results

Chosen by {settings["objective"]} among {card["search_trials"]} trials ({settings["tuner"]} search,
seed {settings["seed"]}); trained again as above, and tested once.

| {" | ".join(header)} |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The score of the search is that of the {settings["scoring"]} epoch. It is the best of many on the
same validation images, and so too high by chance; the test accuracy is not, for the first row. To
choose another row because of its test accuracy would make it so.

## Limits

Trained and tested on images of one source; nothing is known of its answers to others.

Machine: {card["machine"]["summary"]}.
"""


def _count(number: float) -> str:
    """A number as text: in millions if it is at least one million."""
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,.0f}"


def _numbers(values: list[float]) -> str:
    told = ", ".join(f"{v:.7g}" for v in values)
    return told if len(values) == 1 else f"[{told}]"


def _write_json(path: Path, value: Any) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")

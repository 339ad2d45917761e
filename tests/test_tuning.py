"""Searches end to end, on the embedded digits: kills, failures, resuming, what comes after.

The processes of a search are real ones, and so is `kill -9`. Searches are made once and shared,
and so is the import of TensorFlow; only the chief of the undisturbed search is started as users do.
"""

import csv
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import keras
import pytest
from searches import Imported

from keras_norm import datasets, tuning
from keras_norm._search_process import Nursery
from keras_norm.tuning import SearchError

pytestmark = [
    pytest.mark.slow,  # all of them: tests between them would have the shared search made again
    pytest.mark.xdist_group("tuning"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
]

# Each epoch that begins is a line in a file, named after the trial by its learning rate.
SPACE = """
import errno
import os
import time

import keras
from keras import layers

from keras_norm import _search_trial
from keras_norm.tuning import Candidate


class Note(keras.callbacks.Callback):
    def __init__(self, text):
        super().__init__()
        self.text = text

    def on_epoch_begin(self, epoch, logs=None):
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{self.text} {epoch + 1}\\n")
        time.sleep(float(os.environ.get("PAUSE", "0")))


def net(rate, units, task, **options):
    def make():
        inputs = keras.Input(task.input_shape)
        x = layers.Dense(units, activation="relu")(layers.Flatten()(inputs))
        outputs = layers.Dense(task.classes)(layers.Dropout(0.1)(x))
        model = keras.Model(inputs, outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        sgd = keras.optimizers.SGD(rate, momentum=0.9)
        model.compile(sgd, loss, metrics=["accuracy"], run_eagerly=True)
        return model

    return Candidate(make, batch_size=100, **options)


def quick(hp, task):
    rate = hp.Float("learning_rate", 1e-2, 1.0, sampling="log")
    units = hp.Choice("units", [4, 8, 16])
    return net(rate, units, task, callbacks=[Note(f"{rate:.12g}")])


def wider(hp, task):
    hp.Boolean("another")
    return quick(hp, task)


class Misbehave(keras.callbacks.Callback):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_epoch_begin(self, epoch, logs=None):
        if epoch != 1:
            return
        if self.how == "raise":
            raise RuntimeError("no good\\nsecond line")
        if self.how == "nan":
            self.model.layers[2].kernel.assign(self.model.layers[2].kernel * float("nan"))
        if self.how == "hang":
            time.sleep(600)
        if self.how == "exit":
            os._exit(7)
        if self.how == "memory":
            hoard = [b"x" * (1 << 26) for _ in range(24)]
            time.sleep(600)


def no_room(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


class Full(Note):
    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch)
        if epoch == 1 and os.environ["ROOM"] == "False":
            _search_trial.save_state = no_room


def full(hp, task):
    return net(0.1, 8, task, callbacks=[Full("full")])


def misbehaving(hp, task):
    how = hp.Choice("how", ["fine", "raise", "nan", "hang", "exit", "memory"])
    return net(0.1, 8, task, callbacks=[Misbehave(how)])
"""
TRIALS, EPOCHS = 8, 3
OPTIONS = {"data": "digits", "subset": 300, "epochs": EPOCHS, "trials": TRIALS, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")
    (folder / "space.py").write_text(SPACE)
    return folder


@pytest.fixture(autouse=True)
def notes(folder, monkeypatch):
    """What the processes of a search inherit."""
    monkeypatch.setenv("NOTES", str(folder / "notes.txt"))
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "1")
    (folder / "notes.txt").write_text("")
    return folder / "notes.txt"


@pytest.fixture(scope="module")
def imported(folder):
    """Where the processes come from."""
    process = Imported(folder)
    yield process
    process.close()


@pytest.fixture
def shared(imported, monkeypatch):
    """A search in this process takes its nursery from there."""
    monkeypatch.setattr(Nursery, "new", imported.new_nursery)


@pytest.fixture(scope="module")
def undisturbed(folder, imported):
    """A search of eight trials, by a chief here and one worker that joined it from elsewhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    space = f"{folder / 'space.py'}:quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTES", str(folder / "undisturbed.txt"))
        patch.setenv("TF_NUM_INTRAOP_THREADS", "1")
        patch.setenv("TF_NUM_INTEROP_THREADS", "1")
        arguments = tune(
            folder / "undisturbed", 0, "--chief", address, "--tensorboard", space=space
        )
        command = [sys.executable, "-m", "keras_norm", *map(str, arguments)]
        chief = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for(lambda: answers(address))
        join = ["tune", "--join", address, "--space", space, "--out", folder / "elsewhere"]
        worker = imported.start(*join)
        said = chief.communicate(timeout=400)[0]
        assert chief.returncode == 0, said
        assert f"Others may join: keras-norm tune --join {address}" in said
        assert worker.wait(60) == 0
    return tuning.load(folder / "undisturbed")


def answers(address):
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def table(search):
    """All but times."""
    return [
        (
            t.number,
            t.status,
            t.score,
            t.values,
            {m: t.history[m] for m in ("loss", "val_loss", "accuracy", "val_accuracy")},
        )
        for t in search.trials
    ]


def processes(root):
    """Name -> process id, of a process and all that it has brought forth."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        pid, rest = int(stat.parent.name), text.rpartition(")")
        names[pid] = rest[0].partition("(")[2]
        parents[pid] = int(rest[2].split()[1])
    found = {root}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return {names[pid]: pid for pid in found if pid in names}


def finished(out):
    return {t.number for t in tuning.load(out).trials if t.status == "completed"}


def wait_for(condition, seconds=400):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.05)


def tune(out, workers, *flags, space=None):
    """Arguments; without a space, to go on."""
    options = {"resume": None} if space is None else {**OPTIONS, "space": space}
    parts = [("--" + name, value) for name, value in options.items()]
    given = [part for pair in parts for part in pair if part is not None]
    return ["tune", "--out", out, "--workers", workers, *flags, *given]


def test_killed_worker_chief_and_search(folder, imported, undisturbed, notes, monkeypatch):
    """Equal to the undisturbed search, apart from times; no epoch but the running one is lost."""
    monkeypatch.setenv("PAUSE", "0.3")
    out = folder / "killed"
    search = imported.start(*tune(out, 2, space=f"{folder / 'space.py'}:quick"))
    kills = 0
    try:
        wait_for(lambda: (out / "search.json").exists() and len(finished(out)) >= 2)
        for name, enough in (("kn-worker-0", 3), ("kn-chief", 4)):
            before = finished(out)
            os.kill(processes(search.pid)[name], signal.SIGKILL)
            kills += 1
            died = f"{name.removeprefix('kn-')} has died (killed by SIGKILL): restarted"
            wait_for(lambda died=died: died in search.said())  # it may die with the next one done
            wait_for(lambda enough=enough: len(finished(out)) >= enough)
            assert before <= finished(out)
        before = finished(out)
        assert len(before) < TRIALS
        own = processes(search.pid)
        cores = [os.sched_getaffinity(own[f"kn-worker-{k}"]) for k in range(2)]
    finally:
        search.kill()
    if len(os.sched_getaffinity(0)) > 1:
        assert not cores[0] & cores[1]
    kills += 2  # two workers had a trial each
    assert search.wait(30) == -signal.SIGKILL
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in own.values()), 10)

    monkeypatch.setenv("PAUSE", "1")  # so that trials are left when the signal comes
    search = imported.start(*tune(out, 2))
    wait_for(lambda: len(finished(out)) > len(before))
    os.kill(search.pid, signal.SIGINT)
    kills += 2
    assert search.wait(30) == 130, search.said()
    assert "trials are done already" in search.said()
    assert f"keras-norm tune --out {out} --resume" in search.said()
    assert before < finished(out) < set(range(TRIALS))

    monkeypatch.setenv("PAUSE", "0")
    search = imported.start(*tune(out, 2))
    assert search.wait() == 0, search.said()
    assert table(tuning.load(out)) == table(undisturbed)
    assert len(list(out.glob("trial_*"))) == TRIALS
    assert not list(out.glob("trial_*/checkpoint.npz"))  # nobody needs them any more
    times = Counter(notes.read_text().splitlines())
    assert len(times) == TRIALS * EPOCHS
    repeated = sum(n - 1 for n in times.values())
    assert repeated <= kills + 1  # the chief's death stops no trial; + 1: killed between two
    assert max(times.values()) <= 4  # a slow epoch may meet the worker's, search's, user's signal


def test_what_fails_is_recorded_and_the_search_goes_on(folder, shared):
    search = tuning.search(
        folder / "failing",
        data="digits",
        subset=200,
        space=f"{folder / 'space.py'}:misbehaving",
        trials=6,
        epochs=2,
        trial_timeout=20,
        trial_memory=1.5,
        seed=1,
        workers=2,
        progress=False,
    )
    ends = {t.values["how"]: (t.status, t.reason) for t in search.trials}
    assert len(ends) == 6
    assert ends["fine"] == ("completed", "")
    assert ends["raise"] == ("failed", "RuntimeError: no good")
    assert ends["nan"][0] == "failed"
    assert ends["nan"][1].startswith("diverged: loss is nan")
    assert ends["hang"] == ("failed", "timeout: not done after 20 s")
    assert ends["exit"] == ("failed", "the process ended with status 7: see log.txt")
    assert ends["memory"][0] == "failed"
    assert "GiB resident, more than 1.5 GiB" in ends["memory"][1]
    log = next(t.number for t in search.trials if t.values["how"] == "raise")
    assert "second line" in (folder / f"failing/trial_{log}/log.txt").read_text()
    assert [t.score is None for t in search.trials].count(True) == 5


def test_a_full_disk_is_no_fault_of_a_trial(folder, imported, notes):
    """The trial has not failed, and goes on when there is room."""
    settings = {
        "data": "digits",
        "subset": 200,
        "epochs": 2,
        "space": f"{folder / 'space.py'}:full",
    }
    spec = {"settings": settings, "space": {"space": []}, "values": {}, "number": 0, "root": 0}
    spec |= {"folder": str(folder / "full/trial_0"), "ancestor": None, "identity": "one"}

    def said(room):
        request = {"spec": spec, "environment": dict(os.environ, NOTES=str(notes), ROOM=str(room))}
        log = folder / "full.txt"
        child = imported.nursery.start("kn-trial-0", "searches:trial", request, log)
        messages = []
        while not messages or "report" in messages[-1]:
            messages.append(child.channel.receive(60))
            if "report" in messages[-1]:
                child.channel.send({"go": True})
        child.wait()
        return messages

    first, last = said(room=False)
    assert first["report"]["epoch"] == 1
    assert last == {"stopped": f"No space left on device: {spec['folder']!r}"}
    again, second, last = said(room=True)
    assert again == first
    assert second["report"]["epoch"] == 2
    assert last == {"done": True}
    assert notes.read_text().splitlines() == ["full 1", "full 2", "full 2"]


def test_data_that_are_read_leave_nothing_behind(imported, tmp_path):
    """They lie in a file without a name; what goes wrong with them has its reason."""
    log = imported.folder / "data.txt"
    child = imported.nursery.start("kn-data", "searches:keep_data", {"folder": str(tmp_path)}, log)
    kept, wrong, full = (child.channel.receive(60) for _ in range(3))
    assert child.wait() == 0
    assert kept == {"files": [], "arrays": [[0, 1, 2, 3, 4], [0, 0, 0], False]}
    assert wrong["bad"] == "ValueError: no such data"
    assert wrong["killed"] == "The process that read the data has died by SIGKILL."
    kept_where = f"The data cannot be kept in {str(tmp_path)!r}"
    assert full["full"] == f"{kept_where}: No space left on device."


def test_benchmark_sees_all_processes_that_last(imported, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    benchmark = importlib.import_module("search")

    def started(out, options, workers, trials):
        options = [*options.split(), "--workers", workers, "--trials", trials]
        return imported.start("tune", "--quiet", "--out", out, *options)

    monkeypatch.setattr(benchmark, "started", started)
    rows = benchmark.memory(trials=3, period=0.1)
    assert rows[-1]["trials"] >= 2
    names = list(rows[-1])[2:-1]
    assert names == ["search", "nursery", "chief", "worker-0", "nursery of worker-0"]
    for row in rows:
        assert min(row[name] for name in names) > 10
        assert row["all"] == pytest.approx(sum(row[name] for name in names), abs=0.05)


def test_resume_overwrite_or_error(folder, undisturbed):
    out = folder / "undisturbed"
    before = table(tuning.load(out))
    with pytest.raises(SearchError, match="holds a search already: pass --resume"):
        tuning.search(out, **OPTIONS)
    with pytest.raises(SearchError, match="another seed: it began with 5, and now received 6"):
        tuning.search(out, resume=True, seed=6)
    with pytest.raises(SearchError, match="another space"):
        tuning.search(out, resume=True, space=f"{folder / 'space.py'}:wider")
    assert table(tuning.load(out)) == before


def test_another_space_under_the_same_name(folder, undisturbed, shared):
    """What counts is what the function declares."""
    copied = folder / "changed"
    shutil.copytree(folder / "undisturbed", copied)
    space = folder / "changing.py"
    space.write_text(SPACE.replace("def wider", "def unused").replace("[4, 8, 16]", "[4, 8]"))
    content = json.loads((copied / "search.json").read_text())
    content["settings"]["space"] = f"{space}:quick"
    (copied / "search.json").write_text(json.dumps(content))
    with pytest.raises(SearchError, match="with another space: the hyperparameters of"):
        tuning.search(copied, resume=True, progress=False)
    assert table(tuning.load(copied)) == table(undisturbed)


def test_space_that_has_moved_and_changed(folder, undisturbed, shared, capsys):
    copied, moved = folder / "moved", folder / "moved.py"
    shutil.copytree(folder / "undisturbed", copied)
    moved.write_text(SPACE + "\n# the same\n")
    tuning.search(copied, resume=True, space=f"{moved}:quick", progress=False)
    assert "Warning" not in capsys.readouterr().err
    assert tuning.load(copied).settings.space == f"{moved}:quick"
    assert table(tuning.load(copied)) == table(undisturbed)
    moved.write_text(SPACE.replace("Dropout(0.1)", "Dropout(0.2)"))
    tuning.search(copied, resume=True, progress=False)
    said = capsys.readouterr().err
    assert f"Warning: the code of '{moved}:quick' is not that of the search" in said
    moved.unlink()
    with pytest.raises(SearchError, match=r"If it has moved, name it with --space\."):
        tuning.search(copied, resume=True, progress=False)


def test_best_and_pareto(undisturbed):
    scores = [t.score for t in undisturbed.trials]
    assert undisturbed.best()[0].score == max(scores)
    assert [t.score for t in undisturbed.best(3)] == sorted(scores, reverse=True)[:3]
    front = undisturbed.pareto()
    assert undisturbed.best()[0] in front
    for trial in undisturbed.trials:
        own = trial.last("val_accuracy"), trial.last("seconds"), trial.last("parameters")
        beaten = any(
            f.last("val_accuracy") >= own[0]
            and f.last("seconds") <= own[1]
            and f.last("parameters") <= own[2]
            for f in front
            if f != trial
        )
        assert beaten != (trial in front)


def test_report(undisturbed, tmp_path):
    page = tuning.report(undisturbed, tmp_path / "report")
    text = page.read_text()
    for name in ("curves", "progress", "pareto", "rates", "parallel"):
        picture = (tmp_path / f"report/{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
        assert f'src="{name}.png"' in text
    assert "importance.png" not in text  # of eight trials there is none to state
    assert f"<b>{undisturbed.best()[0].score:.4f}</b>" in text
    with open(tmp_path / "report/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["trial"]) for r in rows] == list(range(TRIALS))
    for row, trial in zip(rows, undisturbed.trials, strict=True):
        assert float(row["val_accuracy"]) == pytest.approx(trial.last("val_accuracy"))
        assert float(row["score"]) == pytest.approx(trial.last("val_accuracy"))
        curve = trial.history["val_accuracy"]
        assert int(row["best_epoch"]) == max(curve, key=curve.get)
        assert float(row["learning_rate"]) == trial.values["learning_rate"]
    with pytest.raises(SearchError, match="There is no search"):
        tuning.report(tmp_path)


def test_tensorboard_has_metrics_and_hyperparameters(folder, undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    identity = json.loads((folder / "undisturbed/search.json").read_text())["identity"]
    (own,) = (folder / "elsewhere").glob("search_*")  # of this search alone
    assert own.name == f"search_{identity}"
    for trial in undisturbed.trials[:2]:
        events = EventAccumulator(str(own / f"tensorboard/trial_{trial.number:04d}"))
        events.Reload()
        logged = events.Scalars("val_accuracy")
        assert [e.step for e in logged] == list(range(1, EPOCHS + 1))
        assert {e.step: e.value for e in logged} == pytest.approx(trial.history["val_accuracy"])
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert b"learning_rate" in content


def test_retrain_tests_once_and_can_be_loaded(folder, undisturbed, shared, tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    out = tmp_path / "retrained"
    moved = folder / "elsewhere.py"
    moved.write_text(SPACE)
    with pytest.raises(SearchError, match="where that function is now"):
        tuning.retrain(undisturbed, space=f"{moved}:wider", out=out, progress=False)
    space = f"{moved}:quick"
    card = tuning.retrain(undisturbed, seeds=2, epochs=4, space=space, out=out, progress=False)
    content = json.loads((out / "model_card.json").read_text())
    accuracies = content["results"][0]["test_accuracy"]
    assert len(set(accuracies)) == 2
    assert content["training"] == {
        "trials": [undisturbed.best()[0].number],
        "seeds": 2,
        "epochs": 4,
        "subset": None,
    }
    model = keras.models.load_model(out / "model.keras")
    data = datasets.load("digits")  # nothing is held out
    assert content["data"]["train"] == len(data.train) == 1437
    found = model.evaluate(data.test.x, data.test.y, batch_size=500, return_dict=True, verbose=0)
    assert found["accuracy"] == pytest.approx(accuracies[0])
    assert min(accuracies) > 0.25
    text, best = card.read_text(), undisturbed.best()[0]
    assert f"{sum(accuracies) / 2:.4f} ±" in text
    told = f"| {best.score:.4f} | {EPOCHS} | {best.best_epoch(undisturbed.settings)} |"
    assert f"| #{best.number} {told}" in text
    assert "that of the last epoch" in text
    monkeypatch.chdir(out)
    names = {"pixels": load_digits().images[..., None]}  # training and test images
    exec(text.split("```python\n")[1].split("```")[0], names)
    right = (names["logits"].argmax(axis=1) == load_digits().target).sum()
    on_train = model.evaluate(data.train.x, data.train.y, return_dict=True, verbose=0)
    assert right == pytest.approx(1437 * on_train["accuracy"] + 360 * found["accuracy"], abs=2)
    with pytest.raises(SearchError, match="The test set has been used"):
        tuning.retrain(undisturbed, out=out)
    with pytest.raises(SearchError, match="The test set has been used"):
        tuning.retrain(undisturbed, out=tmp_path / "elsewhere", top=2)
    tuning.retrain(undisturbed, seeds=3, epochs=4, out=out, progress=False)
    more = json.loads((out / "model_card.json").read_text())
    assert more["results"][0]["test_accuracy"][:2] == accuracies
    assert more["training"]["seeds"] == len(more["results"][0]["test_accuracy"]) == 3

    before = {
        p: p.read_bytes() for p in out.rglob("*") if p.name != "processes.txt" and p.is_file()
    }
    with pytest.raises(SearchError, match="100000"):
        tuning.retrain(undisturbed, subset=100_000, out=out, overwrite=True, progress=False)
    assert {p: p.read_bytes() for p in before} == before
    tuning.retrain(undisturbed, epochs=1, out=out, overwrite=True, progress=False)
    assert json.loads((out / "model_card.json").read_text())["training"]["epochs"] == 1
    assert len(list(out.rglob("model.keras"))) == 2
    assert not (out / "next").exists()

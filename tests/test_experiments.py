"""Experiments: what is run, kept, resumed, tabulated and tested; the flags of the tutorials."""

import csv
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import special, stats

import keras_norm
from keras_norm import _machine, experiments
from keras_norm.experiments import (
    Results,
    Run,
    TutorialArguments,
    holm,
    replace_file,
    run,
    tutorial_arguments,
)
from keras_norm.layers import BatchNormalization, Dropout

pytestmark = [
    pytest.mark.core,
    # Tensors of PyTorch, and bfloat16 ones of TensorFlow, do not know NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SETTINGS = {
    "slow": {"factor": 0.9, "epochs": 3},
    "fast": {"factor": 0.5, "epochs": 3, "optimizer": {"name": "sgd", "nesterov": False}},
}


@pytest.fixture(autouse=True)
def fixed_seeds():
    """In place of the common fixture, which clears Keras's session: most tests have no model."""
    np.random.seed(0)


def train(settings, seed, progress):
    """A loss that falls by a factor per epoch, from a start that the seed decides."""
    loss = 1.0 + 0.1 * seed
    losses = [loss * settings["factor"] ** (epoch + 1) for epoch in range(settings["epochs"])]
    for epoch, value in enumerate(losses):
        progress.epoch(epoch + 1, loss=value)
    return {"history": {"loss": losses}, "final": {"test_loss": losses[-1]}}


class Counting:
    """A training function that remembers which runs it was asked for."""

    def __init__(self, function=train):
        self.function, self.calls = function, []

    def __call__(self, settings, seed, progress):
        self.calls.append((progress.name, seed))
        return self.function(settings, seed, progress)


def quiet(function, settings, seeds, **options):
    return run(function, settings, seeds, progress=False, **options)


def strict_json(path):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def made(name="a", values=(0.5, 0.6, 0.7), metric="accuracy", **fields):
    """Runs of one setting with the given final values, seeds 0, 1, …."""
    return [Run(name, {"name": name}, s, final={metric: v}, **fields) for s, v in enumerate(values)]


# ------------------------------------------------------------------ what a run leaves behind


def test_runs_every_setting_with_every_seed_seed_by_seed(tmp_path):
    function = Counting()
    results = quiet(function, SETTINGS, [0, 1, 2], out=tmp_path)
    assert function.calls == [(name, seed) for seed in range(3) for name in SETTINGS]
    assert results.names == ["slow", "fast"]
    assert [r.seed for r in results] == [0, 1, 2, 0, 1, 2]
    expected = (1 + 0.1 * np.arange(3)) * 0.5**3
    np.testing.assert_allclose(results.values("fast", "test_loss"), expected, rtol=1e-15)
    epochs, curves = results.curves("slow", "loss")
    np.testing.assert_array_equal(epochs, [1, 2, 3])
    np.testing.assert_allclose(
        curves, np.outer(1 + 0.1 * np.arange(3), 0.9 ** np.arange(1, 4)), rtol=1e-15
    )


def test_results_json_holds_the_whole_record(tmp_path):
    context = {"data": "digits", "train": 1437}
    quiet(train, SETTINGS, range(2), out=tmp_path, title="Factors", context=context)
    data = strict_json(tmp_path / "results.json")
    assert (data["schema"], data["schema_version"], data["title"]) == (
        "keras_norm.results",
        1,
        "Factors",
    )
    assert len(data["runs"]) == 4
    first = data["runs"][0]
    assert first["settings"] == SETTINGS["slow"]
    assert first["context"] == context
    assert first["backend"] == keras.backend.backend()
    assert first["status"] == "finished"
    assert first["seconds"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["started"])
    assert first["started"] <= first["finished"]
    versions = data["environments"][first["environment"]]["versions"]
    assert versions["keras"] == keras.__version__
    assert versions["numpy"] == np.__version__
    assert versions["python"] == platform.python_version()
    assert keras.backend.backend() in versions
    assert len(data["environments"]) == 1


def test_no_host_name_no_path_in_the_record(tmp_path):
    quiet(train, SETTINGS, [0], out=tmp_path)
    for file in ("results.json", "results.csv"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert platform.node() not in text
        assert str(tmp_path) not in text
        assert os.path.expanduser("~") not in text


def test_csv_is_tidy(tmp_path):
    quiet(train, SETTINGS, range(2), out=tmp_path, context={"data": "digits"})
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (3 + 1)
    assert list(rows[0]) == [
        *("name", "seed", "status", "backend", "seconds", "row", "epoch"),
        *("settings.factor", "settings.epochs", "settings.optimizer.name"),
        *("settings.optimizer.nesterov", "context.data", "metrics.loss", "metrics.test_loss"),
    ]
    epochs = [row for row in rows if row["name"] == "fast" and row["seed"] == "1"]
    assert [row["epoch"] for row in epochs] == ["1", "2", "3", ""]
    assert [row["row"] for row in epochs] == ["epoch"] * 3 + ["final"]
    assert float(epochs[1]["metrics.loss"]) == 1.1 * 0.5**2
    assert epochs[1]["metrics.test_loss"] == ""
    assert float(epochs[3]["metrics.test_loss"]) == 1.1 * 0.5**3
    assert {row["settings.optimizer.nesterov"] for row in rows} == {"", "false"}


def test_csv_says_the_same_as_json(tmp_path):
    def odd(settings, seed, progress):
        return {
            "history": {"epoch": [0.5, 1], "loss": [math.nan, 1.0], "accuracy": [None, -math.inf]},
            "final": {"test_loss": math.inf, "parameters": 44426},
            "predictions": {"conv.1": [1, math.nan, "three"]},
        }

    awkward = {"text": 'a, "b"\nc', "number as text": "0.1", "null": None, "list": [1, [2]]}
    awkward |= {"empty": "", "dict": {}, "deep": {"er": {"flag": True}}}
    quiet(odd, {"a/b, c": awkward}, [7], out=tmp_path, context={"spaced": " x ", "nan": "nan"})
    by_json = Results.load(tmp_path).runs[0]
    by_csv = Results.load(tmp_path / "results.csv").runs[0]
    assert by_json.extra == {
        "predictions": {"conv.1": [1, pytest.approx(math.nan, nan_ok=True), "three"]}
    }
    gone = {"extra": {}, "started": "", "finished": "", "code": "", "environment": {}}
    assert repr(by_csv) == repr(replace(by_json, **gone))  # repr: NaN equals NaN
    assert by_csv.settings == awkward
    assert by_csv.epochs == (0.5, 1)
    assert by_csv.history["accuracy"] == [None, -math.inf]
    assert by_csv.final == {"test_loss": math.inf, "parameters": 44426}
    assert isinstance(by_csv.final["parameters"], int)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis_settings(max_examples=25, deadline=None)
@example(settings={}, values=[-0.0])
@given(
    settings=st.dictionaries(st.text("abc 0", min_size=1), plain_values, max_size=4),
    values=st.lists(st.floats(allow_nan=True, width=64) | st.none(), max_size=4),
)
def test_any_run_survives_both_files(tmp_path_factory, settings, values):
    """Types, NaN, infinities, quotes and line ends come back as they were."""
    folder = tmp_path_factory.mktemp("files")
    history = {"loss": values} if any(v is not None for v in values) else {}
    final = {"accuracy": values[0]} if values and values[0] is not None else {}
    Results([Run("a", settings, 3, history=history, final=final)]).save(folder)
    strict_json(folder / "results.json")
    for file in ("results.json", "results.csv"):
        loaded = Results.load(folder / file).runs[0]
        assert json.dumps(loaded.settings, sort_keys=True) == json.dumps(settings, sort_keys=True)
        assert repr((loaded.history, loaded.final)) == repr((history, final))


def test_non_finite_numbers_are_texts_in_json(tmp_path):
    Results([Run("a", {}, 0, history={"loss": [math.nan, math.inf, -math.inf, None]})]).save(
        tmp_path
    )
    stored = strict_json(tmp_path / "results.json")["runs"][0]["history"]["loss"]
    assert stored == ["NaN", "Infinity", "-Infinity", None]


def test_numpy_and_tensors_become_numbers(tmp_path):
    def function(settings, seed, progress):
        return {
            "history": {"loss": np.array([1.5, 0.5], np.float32)},
            "final": {"a": np.float32(0.25), "b": np.int64(3), "c": True},
            "tensor": keras.ops.convert_to_tensor([1.0, 2.0]),
            "half": keras.ops.cast(keras.ops.convert_to_tensor(0.5), "bfloat16"),
        }

    quiet(
        function,
        {"one": {"rate": np.float64(0.1), "size": np.int32(3)}},
        [np.int64(1)],
        out=tmp_path,
    )
    loaded = Results.load(tmp_path).runs[0]
    assert loaded.settings == {"rate": 0.1, "size": 3}
    assert loaded.history == {"loss": [1.5, 0.5]}
    assert loaded.final == {"a": 0.25, "b": 3, "c": 1}
    assert loaded.extra == {"tensor": [1.0, 2.0], "half": 0.5}


@pytest.mark.parametrize(
    ("returned", "status"),
    [
        ({"history": {"loss": [1.0, math.nan]}}, "diverged"),
        ({"history": {"loss": [math.nan, 1.0]}}, "finished"),
        ({"history": {"loss": [1.0, None]}}, "finished"),
        ({"final": {"test_loss": math.inf}}, "diverged"),
        ({"final": {"accuracy": math.nan}}, "finished"),
        ({"final": {"accuracy": 0.1}, "diverged": True}, "diverged"),
    ],
)
def test_divergence_is_recorded_not_raised(tmp_path, returned, status):
    results = quiet(lambda settings, seed, progress: returned, {"a": {}}, [0], out=tmp_path)
    assert results.runs[0].status == status
    assert Results.load(tmp_path / "results.csv").runs[0].status == status


def test_settings_cannot_be_changed_by_the_function_and_seeds_are_set(tmp_path):
    def function(settings, seed, progress):
        settings["list"].append(4)
        draws = (np.random.rand(), float(keras.ops.convert_to_numpy(keras.random.uniform(()))))
        return {"final": {"numpy": draws[0], "keras": draws[1]}}

    settings = {"a": {"list": [1]}, "b": {"list": [1]}}
    results = quiet(function, settings, [3, 4], out=tmp_path)
    assert settings["a"] == {"list": [1]} == results.runs[0].settings
    for metric in ("numpy", "keras"):
        a, b = results.values("a", metric), results.values("b", metric)
        np.testing.assert_array_equal(a, b)
        assert a[0] != a[1]
    assert results.values("a", "numpy")[0] == np.random.RandomState(3).rand()


# ------------------------------------------------------------------ resuming


def test_resume_repeats_nothing(tmp_path):
    first = quiet(train, SETTINGS, range(2), out=tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    function = Counting()
    again = quiet(function, SETTINGS, range(2), out=tmp_path)
    assert function.calls == []
    assert repr(again.runs) == repr(first.runs)
    assert (tmp_path / "results.json").read_bytes() == before


def test_more_seeds_and_settings_run_only_what_is_new(tmp_path):
    quiet(train, SETTINGS, [0], out=tmp_path)
    function = Counting()
    more = SETTINGS | {"new": {"factor": 0.1, "epochs": 1}}
    quiet(function, more, [0, 1], out=tmp_path)
    assert function.calls == [("new", 0), ("slow", 1), ("fast", 1), ("new", 1)]
    fewer = quiet(function, {"slow": SETTINGS["slow"]}, [1], out=tmp_path)
    assert [(r.name, r.seed) for r in fewer] == [("slow", 1)]
    assert len(Results.load(tmp_path)) == 6


@pytest.mark.parametrize("changed", ["settings", "type", "context", "backend"])
def test_changed_settings_never_mix_and_old_runs_are_kept(tmp_path, monkeypatch, changed):
    settings, context = {"a": {"factor": 0.5, "epochs": 2}}, {"data": "digits"}
    quiet(train, settings, [0, 1], out=tmp_path, context=context)
    other, other_context = settings, context
    if changed == "settings":
        other = {"a": {"factor": 0.6, "epochs": 2}}
    elif changed == "type":
        other = {"a": {"factor": 0.5, "epochs": 2, "bias": True}}
        quiet(train, {"a": other["a"] | {"bias": 1}}, [0], out=tmp_path, context=context)
    elif changed == "context":
        other_context = {"data": "mnist"}
    else:
        monkeypatch.setattr(_machine, "keras_backend", lambda: "another")
    function = Counting()
    quiet(function, other, [0], out=tmp_path, context=other_context)
    assert function.calls == [("a", 0)]  # seed 1 of the old setting is no run of the new one
    assert len(Results.load(tmp_path)) == 1
    monkeypatch.undo()
    back = quiet(function, settings, [0, 1], out=tmp_path, context=context)
    assert len(function.calls) == 1  # both old runs were still there
    assert back.seeds("a") == [0, 1]
    assert len(Results.load(tmp_path)) == 2


def test_going_back_to_old_settings_brings_them_back_into_both_files(tmp_path):
    first, second = ({"a": {"factor": factor, "epochs": 2}} for factor in (0.5, 0.25))
    function = Counting()
    for settings in (first, second, first, second, first):
        quiet(function, settings, [0], out=tmp_path)
        for file in ("results.json", "results.csv"):
            assert [r.settings for r in Results.load(tmp_path / file)] == [settings["a"]]
    assert len(function.calls) == 2


def test_fresh_makes_the_asked_runs_anew_and_leaves_others(tmp_path):
    quiet(train, SETTINGS, [0, 1], out=tmp_path)

    def better(settings, seed, progress):
        return {"final": {"test_loss": 0.0}}

    results = quiet(better, {"slow": SETTINGS["slow"]}, [0], out=tmp_path, resume=False)
    assert results.values("slow", "test_loss").tolist() == [0.0]
    loaded = Results.load(tmp_path)
    assert len(loaded) == 4
    assert loaded.values("slow", "test_loss")[0] == 0.0
    assert loaded.values("slow", "test_loss")[1] > 0.5


def test_fresh_that_ends_before_its_first_run_loses_nothing(tmp_path):
    quiet(train, SETTINGS, [0], out=tmp_path)
    before = (tmp_path / "results.json").read_bytes()

    def stop(settings, seed, progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(stop, SETTINGS, [0], out=tmp_path, resume=False)
    assert (tmp_path / "results.json").read_bytes() == before


def test_fresh_that_is_interrupted_keeps_what_it_has_not_made_anew(tmp_path):
    quiet(train, SETTINGS, range(3), out=tmp_path)
    old = Results.load(tmp_path).values("slow", "test_loss")
    count = []

    def stop_in_the_third(settings, seed, progress):
        count.append(seed)
        if len(count) == 3:
            raise KeyboardInterrupt
        return {"final": {"test_loss": 0.0}}

    with pytest.raises(KeyboardInterrupt):
        quiet(stop_in_the_third, SETTINGS, range(3), out=tmp_path, resume=False)
    loaded = Results.load(tmp_path)
    assert len(loaded) == 6
    np.testing.assert_array_equal(loaded.values("slow", "test_loss"), [0.0, *old[1:]])


@pytest.mark.parametrize("damage", [lambda csv: csv.unlink(), lambda csv: csv.write_bytes(b"name")])
def test_a_csv_that_was_not_written_to_its_end_is_written_again(tmp_path, damage):
    quiet(train, SETTINGS, [0], out=tmp_path)
    whole = (tmp_path / "results.csv").read_bytes()
    damage(tmp_path / "results.csv")
    quiet(train, SETTINGS, [0], out=tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == whole


def test_two_studies_share_a_folder(tmp_path):
    quiet(train, {"slow": SETTINGS["slow"]}, [0], out=tmp_path, context={"part": 1})
    quiet(train, {"fast": SETTINGS["fast"]}, [0], out=tmp_path, context={"part": 2})
    assert {r.name: r.context["part"] for r in Results.load(tmp_path)} == {"slow": 1, "fast": 2}


def test_resuming_after_a_change_of_code_warns(tmp_path):
    quiet(train, SETTINGS, [0], out=tmp_path)

    def other(settings, seed, progress):
        return {"final": {"test_loss": 1.0}}

    with pytest.warns(UserWarning, match="by other code of 'other'.*--fresh"):
        quiet(other, SETTINGS, [0], out=tmp_path)


def test_resuming_with_other_versions_warns(tmp_path, monkeypatch):
    quiet(train, SETTINGS, [0], out=tmp_path)
    now = _machine.installed_versions()
    monkeypatch.setattr(_machine, "installed_versions", lambda: now | {"keras": "99.0"})
    message = rf"with keras {re.escape(keras.__version__)} \(now 99.0\)"
    with pytest.warns(UserWarning, match=message):
        quiet(train, SETTINGS, [0], out=tmp_path)


# ------------------------------------------------------------------ interruptions


def stopping(error, after):
    """A training function that raises `error` in its run number `after`."""
    calls = []

    def function(settings, seed, progress):
        calls.append(1)
        if len(calls) == after:
            raise error
        return train(settings, seed, progress)

    return function


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("all gone"), SystemExit(3)])
def test_an_interruption_keeps_every_finished_run(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        quiet(stopping(error, after=3), SETTINGS, range(2), out=tmp_path)
    assert "setting 'slow', seed 1" in caught.value.__notes__[0]
    assert len(strict_json(tmp_path / "results.json")["runs"]) == 2
    assert len(Results.load(tmp_path / "results.csv")) == 2
    assert sorted(os.listdir(tmp_path)) == ["results.csv", "results.json"]  # no lock, no leftovers
    function = Counting()
    quiet(function, SETTINGS, range(2), out=tmp_path)
    assert function.calls == [("slow", 1), ("fast", 1)]


def test_a_failed_run_can_be_recorded_and_is_tried_again(tmp_path, capsys):
    options = {"out": tmp_path, "on_error": "record"}
    failing = stopping(OSError("no image"), after=2)
    results = run(failing, SETTINGS, range(2), **options)
    assert [r.status for r in results] == ["finished", "finished", "failed", "finished"]
    failed = results.runs[2]
    assert (failed.name, failed.seed, failed.error) == ("fast", 0, "OSError: no image")
    assert "Traceback" in capsys.readouterr().err
    assert results.seeds("fast") == [1]
    assert results.table("test_loss").records[1]["failed"] == 1
    assert Results.load(tmp_path / "results.csv").runs[2].status == "failed"
    function = Counting(failing)
    results = quiet(function, SETTINGS, range(2), **options)
    assert function.calls == [("fast", 0)]
    assert {r.status for r in results} == {"finished"}


def test_an_unfit_history_is_a_failure_of_its_run(tmp_path):
    def ragged(settings, seed, progress):
        return {"history": {"loss": [1.0, 2.0], "accuracy": [1.0] * (2 - seed)}}

    results = quiet(ragged, {"a": {}}, range(2), out=tmp_path, on_error="record")
    assert [r.status for r in results] == ["finished", "failed"]
    assert "accuracy=1 values for 2" in results.runs[1].error


def test_a_setting_whose_runs_all_failed():
    lost = [Run("lost", {"name": "lost"}, s, "failed", error="OSError: no image") for s in (0, 1)]
    results = Results([*made("a"), *lost])
    assert results.values("lost", "accuracy").shape == (0,)
    assert results.best("accuracy", by="name") == {"a": "a"}
    with pytest.raises(ValueError, match="at least two"):
        results.compare("a", "lost", "accuracy")


def test_numpy_numbers_become_numbers(tmp_path):
    run = Run("a", {}, 0, history={"loss": np.float32([0.5])}, final={"accuracy": np.float64(0.5)})
    Results([run]).save(tmp_path)
    for file in ("results.json", "results.csv"):
        loaded = Results.load(tmp_path / file).runs[0]
        assert (loaded.history, loaded.final) == ({"loss": [0.5]}, {"accuracy": 0.5})


def test_ctrl_c_while_saving_leaves_both_files_whole(tmp_path, monkeypatch):
    replace_really, calls = os.replace, []

    def interrupted(source, target):
        replace_really(source, target)
        calls.append(target)
        if len(calls) == 3:  # second run: json is in place, csv is not
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(train, SETTINGS, [0], out=tmp_path)
    assert len(Results.load(tmp_path / "results.json")) == 2
    assert len(Results.load(tmp_path / "results.csv")) == 2


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    quiet(train, SETTINGS, [0], out=tmp_path)
    before = (tmp_path / "results.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        quiet(train, SETTINGS, [1], out=tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["results.csv", "results.json"]


SCRIPT = textwrap.dedent("""
    import os, signal, sys, time
    from keras_norm.experiments import run

    def train(settings, seed, progress):
        if seed == 2 and sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "wait":
            print("waiting", flush=True)
            time.sleep(60)
        return {"history": {"loss": [1.0, 0.5]}, "final": {"accuracy": 0.1 * seed}}

    results = run(train, {"a": {"epochs": 2}}, range(4), out=sys.argv[1])
    print(len(results))
""")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return [sys.executable, str(path), str(tmp_path / "out")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_keeps_every_finished_run(tmp_path, script):
    killed = subprocess.run([*script, "die"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(strict_json(tmp_path / "out" / "results.json")["runs"]) == 2
    assert len(Results.load(tmp_path / "out" / "results.csv")) == 2
    assert (tmp_path / "out" / ".results.lock").exists()  # stale, and no hindrance
    again = subprocess.run([*script, "live"], capture_output=True, text=True, check=True)
    assert again.stdout == "4\n"
    lines = again.stderr.splitlines()
    assert lines[0] == f"2 of 4 runs are in {tmp_path / 'out'} already"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "run 3 of 4: a, seed 2",
        "run 4 of 4: a, seed 3",
    ]
    assert sorted(os.listdir(tmp_path / "out")) == ["results.csv", "results.json"]


def test_one_process_at_a_time(tmp_path, script):
    holder = subprocess.Popen([*script, "wait"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "waiting\n"
        with pytest.raises(RuntimeError, match=f"in use by process {holder.pid}"):
            quiet(train, SETTINGS, [0], out=tmp_path / "out")
    finally:
        holder.kill()
        holder.communicate()
    assert len(quiet(train, SETTINGS, [0], out=tmp_path / "out")) == 2


def test_a_run_within_a_run_needs_another_folder(tmp_path):
    def nested(settings, seed, progress):
        return quiet(train, SETTINGS, [0], out=tmp_path)

    with pytest.raises(RuntimeError, match="Only one process"):
        quiet(nested, {"a": {}}, [0], out=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "schema", "no runs", "csv"])
def test_a_damaged_file_is_an_error_and_left_alone(tmp_path, damage):
    quiet(train, SETTINGS, [0], out=tmp_path)
    path = tmp_path / ("results.csv" if damage == "csv" else "results.json")
    text = path.read_text(encoding="utf-8")
    changes = {
        "cut": text[: len(text) // 2],
        "schema": text.replace('"schema_version": 1', '"schema_version": 2'),
        "no runs": '{"schema": "keras_norm.results", "schema_version": 1}',
        "csv": text.replace("settings.factor", "settings.factor", 1).replace("epoch", "step", 1),
    }
    path.write_text(changes[damage], encoding="utf-8")
    with pytest.raises(ValueError, match=r"whole and unchanged. Received: path=.*left as it is"):
        Results.load(path)
    if damage != "csv":
        for resume in (True, False):
            with pytest.raises(ValueError, match="whole and unchanged"):
                quiet(train, SETTINGS, [0], out=tmp_path, resume=resume)
    assert path.read_text(encoding="utf-8") == changes[damage]


def test_a_csv_of_unknown_origin_is_not_overwritten(tmp_path):
    (tmp_path / "results.csv").write_text("mine\n")
    with pytest.raises(ValueError, match=r"would be overwritten.*Received: out="):
        quiet(train, SETTINGS, [0], out=tmp_path)
    assert (tmp_path / "results.csv").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, r"seeds must be different integers.*Received: seeds=\[\]"),
        ({"seeds": [1, 1]}, r"Received: seeds=\[1, 1\]"),
        ({"seeds": [-1]}, r"Received: seeds=\[-1\]"),
        ({"seeds": ["1"]}, r"Received: seeds=\['1'\]"),
        ({"seeds": 3}, r"list of integers. Received: seeds=3"),
        ({"settings": [{"a": 1}]}, r"dict of name -> settings. Received: settings=\[\{'a': 1\}\]"),
        ({"settings": {}}, r"Received: settings=\{\}"),
        ({"settings": {"": {}}}, r"non-empty names.*Received: ''"),
        ({"settings": {"a\n": {}}}, r"printable.*Received: 'a\\n'"),
        ({"settings": {"a": 3}}, r"Received: 'a': 3"),
        ({"settings": {"a": {"b.c": 3}}}, r"without '\.'\. Received: 'b\.c'"),
        ({"settings": {"a": {"b": math.nan}}}, r"settings\['a'\]\.b must be finite. Received: nan"),
        ({"settings": {"a": {"b": object}}}, r"JSON values.*Received: <class 'object'>"),
        ({"context": {"b": {1: 2}}}, r"Received: 1"),
        ({"on_error": "ignore"}, "Received: on_error='ignore'"),
    ],
)
def test_wrong_arguments(tmp_path, change, message):
    arguments = {"settings": SETTINGS, "seeds": [0], "out": tmp_path / "out"} | change
    function = Counting()
    with pytest.raises(ValueError, match=message):
        run(function, **arguments)
    assert not function.calls
    with pytest.raises(ValueError, match="Received: function='train'"):
        run("train", SETTINGS, [0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return a dict.*Received: NoneType"),
        ({"acc": 1.0}, r"under 'history' or 'final'.*Received: \['acc'\]"),
        ({"history": [1.0]}, "metric -> list of values.*Received: list"),
        ({"history": {"loss": [1.0, 2.0], "accuracy": [1.0]}}, "Received: accuracy=1 values for 2"),
        ({"history": {"loss": 3.0}}, r"history\['loss'\] must be a list.*Received: 3.0"),
        ({"history": {1: [3.0]}}, r"need names, non-empty texts. Received: \[1\]"),
        ({"final": [1.0]}, "'final' must be a dict.*Received: list"),
        ({"final": {1: 3.0}}, r"metrics of 'final' need names.*Received: \[1\]"),
        ({"final": {"loss": "low"}}, r"final\['loss'\] must be one number. Received: 'low'"),
        ({"final": {"loss": [1.0]}}, r"must be one number. Received: \[1.0\]"),
        ({"final": {}, "model": object()}, "The result.model must consist of JSON values"),
    ],
)
def test_unfit_returned_values(tmp_path, returned, message):
    with pytest.raises(ValueError, match=message):
        quiet(lambda settings, seed, progress: returned, {"a": {}}, [0], out=tmp_path)


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out must be a folder. Received: out="):
        quiet(train, SETTINGS, [0], out=tmp_path / "file")


def test_replace_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "a.txt"

    def write(text, error=None):
        with replace_file(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
            if error:
                raise error

    write("old")
    for error in (RuntimeError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write("half", error)
        assert path.read_text() == "old"
    write("new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


# ------------------------------------------------------------------ progress


def test_a_line_per_run_where_there_is_no_terminal(tmp_path, capsys):
    run(train, SETTINGS, [0], out=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert re.fullmatch(r"run 1 of 2: slow, seed 0  test_loss 0\.729  \(\d+\.\d s\)", first)
    assert second.startswith("run 2 of 2: fast, seed 0  test_loss 0.125  (")
    run(lambda *_: {"final": {"loss": math.nan}}, {"nan": {}}, [0], out=tmp_path)
    assert "run 1 of 1: nan, seed 0  diverged  loss nan  (" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    monkeypatch.setenv("COLUMNS", "200")
    quiet(train, {"slow": SETTINGS["slow"]}, [0], out=tmp_path)
    run(train, SETTINGS, [0, 1], out=tmp_path)
    shown = sys.stderr.getvalue()
    assert "1 of 4 runs are in" in shown
    assert "run 3 of 4: slow, seed 1, epoch 3 of 3  loss 0.8019" in shown
    assert " 25%|" in shown
    assert " 33%|" in shown  # one of nine epochs to go
    assert "run 4 of 4: fast, seed 1  test_loss 0.1375  (" in shown


def test_bar_weighs_runs_by_their_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    settings = {"long": {"factor": 0.5, "epochs": 9}, "short": {"factor": 0.5, "epochs": 1}}
    run(train, settings, [0], out=tmp_path)
    assert " 90%|" in sys.stderr.getvalue()


def test_reported_metrics_are_the_history_unless_one_is_returned(tmp_path):
    def function(settings, seed, progress):
        for epoch in range(4):
            later = {"val_loss": 0.5} if epoch % 2 else {}
            progress.epoch(epoch + 1, loss=1.0 / (epoch + 1), **later)
        return {"history": {"other": [1.0]}} if settings["own"] else {}

    results = quiet(function, {"own": {"own": True}, "kept": {"own": False}}, [0], out=tmp_path)
    assert results.runs[0].history == {"other": [1.0]}
    assert results.runs[1].history == {
        "loss": [1.0, 1 / 2, 1 / 3, 1 / 4],
        "val_loss": [None, 0.5, None, 0.5],
    }


def keras_run(settings, seed, progress):
    """A real, tiny `fit`; interrupted in its second epoch where the settings say so."""
    x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    callbacks = [progress.callback()]
    if seed == settings.get("interrupt"):

        class Interrupt(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    raise KeyboardInterrupt

        callbacks.append(Interrupt())
    epochs = settings["epochs"]
    fitted = model.fit(
        x, 2 * x, validation_data=(x, 2 * x), validation_freq=2, epochs=epochs, batch_size=8,
        verbose=0, callbacks=callbacks,
    )  # fmt: skip
    final = {"loss": model.evaluate(x, 2 * x, verbose=0)}
    return {"final": final, "fitted": fitted.history}


def test_keras_fit_reports_what_its_history_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    run(keras_run, {"net": {"epochs": 4}}, [0], out=tmp_path)
    entry = Results.load(tmp_path).runs[0]
    assert entry.history["loss"] == entry.extra["fitted"]["loss"]
    assert entry.history["val_loss"][1::2] == entry.extra["fitted"]["val_loss"]
    assert entry.history["val_loss"][::2] == [None, None]
    assert 0 < entry.final["loss"] < entry.history["loss"][0]
    assert "epoch 4 of 4  loss" in sys.stderr.getvalue()


def test_keras_fit_reports_its_steps_within_an_epoch(tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(
        experiments.Progress, "part", lambda self, epoch, epochs: parts.append((epoch, epochs))
    )
    quiet(keras_run, {"net": {"epochs": 2}}, [0], out=tmp_path)
    assert parts == [(step / 4, 2) for step in range(2 * 4)]


def test_keras_runs_repeat_bit_by_bit(tmp_path):
    losses = [
        quiet(keras_run, {"net": {"epochs": 2}}, [5], out=tmp_path / out).values("net", "loss")[0]
        for out in ("a", "b")
    ]
    assert losses[0] == losses[1]


def test_ctrl_c_in_keras_fit_keeps_the_finished_runs(tmp_path):
    settings = {"net": {"epochs": 2, "interrupt": 1}}
    with pytest.raises(KeyboardInterrupt):
        quiet(keras_run, settings, [0, 1], out=tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded.seeds("net") == [0]
    assert len(loaded.runs[0].history["loss"]) == 2


# ------------------------------------------------------------------ Results


def test_a_name_stands_for_one_setting():
    with pytest.raises(ValueError, match=r"one setting, context and backend. Received: .*name='a'"):
        Results([Run("a", {"x": 1}, 0), Run("a", {"x": 2}, 1)])
    with pytest.raises(ValueError, match=r"one run per seed. Received: .*name='a', seed=0"):
        Results([Run("a", {}, 0, final={"m": 1}), Run("a", {}, 0, final={"m": 2})])


def test_merge_takes_a_run_once_and_refuses_contradictions():
    a, b = Results(made("a", (0.1, math.nan))), Results(made("b"))
    merged = a.merge(b, Results(made("a", (0.1, math.nan))))
    assert [(r.name, r.seed) for r in merged] == [(r.name, r.seed) for r in [*a, *b]]
    with pytest.raises(ValueError, match="one run per seed"):
        a.merge(Results(made("a", (0.2, math.nan))))
    renamed = Results(made("a", (0.2,))).rename({"a": "a, again"})
    assert a.merge(renamed).names == ["a", "a, again"]


def test_select():
    runs = [
        Run(f"{n} {lr}", {"norm": n, "net": {"lr": lr}, "widths": [8, 16]}, seed,
            status="diverged" if lr == 1.0 and seed == 1 else "finished")
        for n in ("batch", None) for lr in (0.1, 1.0) for seed in range(2)
    ]  # fmt: skip
    results = Results(runs, title="t")
    assert results.select("batch 0.1").names == ["batch 0.1"]
    assert results.select(["None 1.0", "batch 0.1"]).names == ["None 1.0", "batch 0.1"]
    assert results.select(settings={"norm": None, "net.lr": 0.1}).names == ["None 0.1"]
    assert results.select(settings={"net.lr": [1, 2]}).names == ["batch 1.0", "None 1.0"]
    assert len(results.select(settings={"widths": [8, 16]})) == 8
    assert len(results.select(settings={"norm": True})) == 0
    assert [r.seed for r in results.select("batch 1.0", status="finished")] == [0]
    assert len(results.select(status=("diverged", "failed"))) == 2
    assert {r.seed for r in results.select(seeds=[1])} == {1}
    with pytest.raises(ValueError, match=r"must be one of \['batch 0.1'.*Received: name='typo'"):
        results.select(["typo"])


def test_save_does_not_destroy(tmp_path):
    Results(made("a")).save(tmp_path)
    with pytest.raises(ValueError, match=r"must not destroy other results. Received: out="):
        Results(made("b")).save(tmp_path)
    assert Results.load(tmp_path).names == ["a"]
    path = Results(made("b")).save(tmp_path, overwrite=True)
    assert path == tmp_path / "results.json"
    assert Results.load(tmp_path).names == ["b"]


def test_load_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"Received: path=.*not there. Run the experiment first"):
        Results.load(tmp_path)


def test_values_and_curves():
    runs = [
        Run("a", {}, 1, history={"loss": [3.0, 2.0, 1.0], "val": [None, 5.0, None]}),
        Run("a", {}, 0, history={"loss": [4.0, 3.0]}, final={"loss": 9.0}),
        Run("a", {}, 2, status="failed"),
    ]
    results = Results(runs)
    assert results.seeds("a") == [0, 1]
    assert results.values("a", "loss").tolist() == [9.0, 1.0]  # final before history
    np.testing.assert_array_equal(results.values("a", "val"), [math.nan, 5.0])
    epochs, values = results.curves("a", "loss")
    np.testing.assert_array_equal(epochs, [1, 2, 3])
    np.testing.assert_array_equal(values, [[4, 3, math.nan], [3, 2, 1]])
    with pytest.raises(ValueError, match=r"one of \['loss', 'val'\]. Received: metric='accuracy'"):
        results.values("a", "accuracy")


# ------------------------------------------------------------------ tables


def table_results():
    runs = made("batch", (0.81, 0.82, 0.86)) + made("plain | none", (0.7,))
    runs += made("wild", (0.1, math.nan), status="diverged")
    runs.append(Run("wild", {"name": "wild"}, 2, status="failed"))
    return Results(runs)


PUBLISHED = {
    "batch": {"accuracy": [(0.878, "a reader"), 0.887]},
    "built in": {"accuracy": (0.761, "the book")},
}


def test_table_as_text():
    assert str(table_results().table("accuracy", published=PUBLISHED, digits=3)) == textwrap.dedent(
        """\
        setting       accuracy       published     n  diverged  failed
        ------------  -------------  ------------  -  --------  ------
        batch         0.830 ± 0.026  0.878, 0.887  3  0         0
        plain | none  0.700          –             1  0         0
        wild          nan ± nan      –             2  2         1
        built in      –              0.761         0  0         0
        Mean ± standard deviation over n seeds.
        Diverged runs count in n and in the mean.
        Published accuracy of 'batch': 0.878, a reader.
        Published accuracy of 'built in': 0.761, the book."""
    )


def test_table_as_markdown():
    table = table_results().table("accuracy", ["plain | none"], settings=["name", "other"])
    assert table.markdown.splitlines() == [
        "| setting | name | other | accuracy | n |",
        "| --- | --- | --- | --- | --- |",
        r"| plain \| none | plain \| none | none | 0.7000 | 1 |",
        "",
        "Mean ± standard deviation over n seeds.",
    ]


def test_table_numbers_are_sample_statistics():
    record = table_results().table().records[0]
    mean, spread, count = record["accuracy"]
    assert mean == pytest.approx((0.81 + 0.82 + 0.86) / 3, rel=1e-15)
    assert spread == pytest.approx(math.sqrt(((0.02) ** 2 + 0.01**2 + 0.03**2) / 2), rel=1e-12)
    assert count == record["n"] == 3


def test_table_of_several_metrics_and_seconds():
    runs = [
        Run("a", {}, s, final={"train": 0.5, "test": 0.25} | ({"rare": 1.0} if s else {}),
            seconds=10.0 + s)
        for s in range(3)
    ]  # fmt: skip
    published = {"a": {"test": 0.3}}
    table = Results(runs).table(["train", "test", "rare", "seconds"], published=published)
    assert table.header == (
        "setting", "train", "test", "published test", "rare", "seconds", "n",
    )  # fmt: skip
    assert table.rows[0][4:6] == ("1.0000 ± 0.0000 (n = 2)", "11.0 ± 1.0")
    assert Results(runs).table(["test"], digits={"test": 1}).rows[0][1] == "0.2 ± 0.0"
    assert Results(runs).table(["seconds"], digits={"test": 1}).rows[0][1] == "11.0 ± 1.0"


def test_table_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="Received: metric='acuracy'"):
        table_results().table("acuracy")
    with pytest.raises(ValueError, match="Received: name='typo'"):
        table_results().table("accuracy", ["typo"])
    with pytest.raises(ValueError, match=r"name -> metric -> figure.*Received: 'batch': 0.8"):
        table_results().table("accuracy", published={"batch": 0.8})


# ------------------------------------------------------------------ tests of differences


@pytest.fixture
def two(request):
    rng = np.random.default_rng(1)
    seeds = 0.02 * rng.standard_normal(12)
    a = 0.85 + seeds + 0.01 * rng.standard_normal(12)
    b = 0.84 + seeds + 0.01 * rng.standard_normal(12)
    return Results(made("a", a.tolist()) + made("b", b.tolist())), a, b


def test_paired_comparison_is_scipys(two):
    results, a, b = two
    got = results.compare("a", "b", "accuracy")
    t_test = stats.ttest_rel(a, b)
    interval = t_test.confidence_interval(0.95)
    assert got.difference == pytest.approx(np.mean(a - b), rel=1e-12)
    assert got.p == pytest.approx(t_test.pvalue, rel=1e-9)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert got.p_rank == pytest.approx(stats.wilcoxon(a, b).pvalue, rel=1e-12)
    assert got.effect_size == pytest.approx(np.mean(a - b) / np.std(a - b, ddof=1), rel=1e-12)
    assert got.n == 12
    reverse = results.compare("b", "a", "accuracy")
    assert (reverse.difference, reverse.low) == pytest.approx((-got.difference, -got.high))


def test_pairs_are_adjusted_for_their_number(two):
    results, a, b = two
    results = Results([*results, *made("c", (0.5, 0.7)), *made("d", (0.5,))])
    pairs = {"a minus b": ("a", "b"), "c minus a": ("c", "a"), "d minus a": ("d", "a")}
    tests = results.compare_pairs(pairs | {"no runs": ("a", "e")}, "accuracy")
    assert list(tests) == ["a minus b", "c minus a"]
    alone = [results.compare(*pairs[name], "accuracy") for name in tests]
    assert [test.p_adjusted for test in tests.values()] == holm([test.p for test in alone])
    first, difference = tests["a minus b"], 100 * np.mean(a - b)
    assert first.in_points().startswith(f"{difference:+.1f} points (95 % ")
    assert first.in_points().endswith(f"p by Holm {first.p_adjusted:.2g})")
    assert alone[0].in_points().endswith(f"; p = {alone[0].p:.2g})")
    assert Results([]).compare_pairs(pairs, "accuracy") == {}


def test_independent_comparison_is_scipys(two):
    results, a, b = two
    results = Results([r for r in results if r.name == "a" or r.seed < 7])
    b = b[:7]
    got = results.compare("a", "b", "accuracy", paired=False)
    welch = stats.ttest_ind(a, b, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert got.p == pytest.approx(welch.pvalue, rel=1e-9)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert got.p_rank == pytest.approx(stats.mannwhitneyu(a, b).pvalue, rel=1e-12)
    pooled = math.sqrt((11 * np.var(a, ddof=1) + 6 * np.var(b, ddof=1)) / 17)
    assert got.effect_size == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-12)
    assert got.n == 7


def test_pairs_are_matched_by_seed():
    a = [Run("a", {}, s, final={"m": v}) for s, v in ((4, 1.0), (1, 2.0), (2, 3.0), (9, 50.0))]
    b = [
        Run("b", {"b": 1}, s, final={"m": v}) for s, v in ((1, 1.5), (4, 0.0), (2, 2.0), (7, -50.0))
    ]
    got = Results(a + b).compare("a", "b", "m")
    assert got.n == 3
    assert got.difference == pytest.approx((0.5 + 1.0 + 1.0) / 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_of_ranks_are_not_broken_by_rounding(dtype):
    """Accuracies are multiples of 1 / N, and what Keras measured is in float32."""
    counts = np.array([7003, 7004, 7005, 7005, 7001]), np.array([7003, 7002, 7003, 7003, 7003])
    a, b = ((c / 10_000).astype(dtype).astype(float).tolist() for c in counts)
    results = Results(made("a", a) + made("b", b))
    assert results.compare("a", "b", "accuracy").p_rank == stats.wilcoxon([2, 2, 2, -2]).pvalue
    independent = results.compare("a", "b", "accuracy", paired=False)
    assert independent.p_rank == stats.mannwhitneyu(*counts).pvalue


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1e-17])
def test_equal_values_do_not_differ(paired, shift):
    values = np.array([0.003, 0.005, 0.009]) if paired else np.full(3, 0.003)
    results = Results(made("a", (values + shift).tolist()) + made("b", values.tolist()))
    got = results.compare("a", "b", "accuracy", paired)
    assert (got.difference, got.low, got.high, got.effect_size) == (0, 0, 0, 0)
    assert got.p == got.p_rank == 1
    assert not got.untested


@pytest.mark.parametrize("shift", [0.004, -0.004])
@pytest.mark.parametrize("paired", [True, False])
def test_seeds_that_all_differ_alike_are_not_tested(paired, shift):
    """Their t was infinite and their p 0: a certainty, from two seeds and accuracies of k / N."""
    values = np.array([0.5, 0.6]) if paired else np.full(2, 0.5)
    results = Results(made("a", (values + shift).tolist()) + made("b", values.tolist()))
    got = results.compare("a", "b", "accuracy", paired)
    assert got.difference == pytest.approx(shift)
    assert np.isnan([got.low, got.high, got.p, got.effect_size]).all()
    assert 0.05 < got.p_rank <= 1  # ranks need no spread; two pairs decide nothing
    why = "not tested: all seeds differ alike" if paired else "not tested: no seed differs"
    assert got.untested == why
    assert got.in_points() == f"{100 * shift:+.1f} points ({why})"
    assert str(got).endswith(f"by a t-test {why}.")
    assert "significant" not in str(got)
    assert "nan" not in str(got)


def test_what_is_not_tested_counts_in_the_number_of_tests():
    runs = made("a", (0.5, 0.6)) + made("b", (0.45, 0.52)) + made("c", (0.504, 0.604))
    tests = Results(runs).compare_pairs({n: (n, "a") for n in "bc"}, "accuracy")
    assert tests["b"].p_adjusted == 2 * tests["b"].p
    assert math.isnan(tests["c"].p_adjusted)
    assert tests["c"].in_points() == "+0.4 points (not tested: all seeds differ alike)"


def test_comparison_refuses_too_few_or_lost_values():
    results = Results(made("a", (0.5,)) + made("b", (0.4,)))
    with pytest.raises(
        ValueError, match=r"at least two seeds that both have. Received: a='a' with"
    ):
        results.compare("a", "b", "accuracy")
    with pytest.raises(ValueError, match="at least two runs each"):
        results.compare("a", "b", "accuracy", paired=False)
    results = Results(made("a", (0.5, math.nan)) + made("b", (0.4, 0.4)))
    with pytest.raises(ValueError, match=r"finite values. Received: .*nan.*status='finished'"):
        results.compare("a", "b", "accuracy")


def test_comparison_as_a_sentence(two):
    sentence = str(two[0].compare("a", "b", "accuracy"))
    assert re.fullmatch(
        r"accuracy of 'a' minus 'b': \+0\.0\d{3} \(95% confidence interval \S+ to \S+; paired "
        r"t-test p = \S+, Wilcoxon p = \S+; Cohen's d_z = \S+; n = 12 pairs\): the difference is "
        r"(not )?significant at the 5% level\.",
        sentence,
    )
    few = str(two[0].select(seeds=range(4)).compare("a", "b", "accuracy"))
    assert "at best 0.12 with 4 pairs" in few


# ------------------------------------------------------------------ short runs


def test_classification_metrics_are_those_of_scipy_and_keras():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(0, 5, (40, 7)), rng.integers(0, 7, 40)
    metrics = experiments.classification_metrics(logits, y)
    p = special.softmax(logits, axis=1)
    assert metrics["confidence"] == pytest.approx(p.max(axis=1).mean(), rel=1e-12)
    assert metrics["loss"] == pytest.approx(-np.log(p[np.arange(40), y]).mean(), rel=1e-12)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert metrics["loss"] == pytest.approx(float(loss(y, logits.astype("float32"))), rel=1e-5)
    assert metrics["accuracy"] == (logits.argmax(axis=1) == y).mean()


def test_classification_metrics_of_extreme_logits():
    metrics = experiments.classification_metrics([[1e300, -1e300], [0.0, 0.0]], [0, 0])
    assert metrics == {"loss": pytest.approx(np.log(2) / 2), "accuracy": 1.0, "confidence": 0.75}
    assert math.isnan(experiments.classification_metrics([[math.nan, 0.0]], [0])["loss"])


@pytest.mark.parametrize(
    ("logits", "y", "received"),
    [
        ([0.0, 1.0], [0, 1], r"logits of shape \(2,\)"),
        ([[0.0, 1.0]], [0, 1], r"y of shape \(2,\)"),
        (np.empty((0, 3)), [], r"logits of shape \(0, 3\)"),
        ([[0.0, 1.0]], [2], "y from 2 to 2"),
        ([[0.0, 1.0]], [-1], "y from -1 to -1"),
        ([[0.0, 1.0]], [1.0], "y of type float64"),
    ],
)
def test_classification_metrics_refuse_what_does_not_fit(logits, y, received):
    with pytest.raises(ValueError, match=received):
        experiments.classification_metrics(logits, y)


def small_net(settings, seed):
    """Weights by the seed; with everything that has a state: dropout, batch norm, Adam."""
    net = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(6, kernel_initializer=keras.initializers.HeNormal(seed=seed)),
            BatchNormalization(),
            Dropout(settings["rate"], seed=seed),
            keras.layers.Dense(2, kernel_initializer=keras.initializers.HeNormal(seed=seed + 1)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(0.05), loss, jit_compile=False)
    return net


def examples(n=48):
    x = np.random.default_rng(3).normal(size=(n, 3)).astype("float32")
    return x, (x[:, 0] > x[:, 1]).astype("int32")


@pytest.mark.slow_on_jax
def test_training_on_arrays_learns_and_keeps_its_history():
    (x, y), progress = examples(), experiments.Progress("a", 0)
    net = small_net({"rate": 0.2}, 0)
    history = experiments.train_on_arrays(
        net,
        x,
        y,
        epochs=5,
        batch_size=20,  # 48 = 20 + 20 + 8
        evaluate={"train": (x, y), "val": (x[:7], y[:7])},
        every=2,
        progress=progress,
    )
    assert history["epoch"] == [2, 4, 5]
    assert set(history) == {"epoch", "loss"} | {
        f"{part}_{name}" for part in ("train", "val") for name in ("loss", "accuracy")
    }
    assert int(net.optimizer.iterations) == 5 * 3
    assert history["train_accuracy"][-1] > 0.85
    assert history["loss"][-1] < history["loss"][0]
    logits = keras.ops.convert_to_numpy(net(x, training=False))  # inference mode, last weights
    judged = experiments.classification_metrics(logits, y)
    assert history["train_loss"][-1] == pytest.approx(judged["loss"], rel=1e-6)
    assert progress.history["val_accuracy"] == history["val_accuracy"]


def test_each_epoch_shows_every_example_once_in_an_order_of_its_own():
    class Recorder:
        compiled = True

        optimizer = types.SimpleNamespace(built=True)

        def __init__(self):
            self.seen = []

        def train_on_batch(self, x, y, return_dict):
            assert (x[:, 0] == y).all()
            self.seen += y.tolist()
            return {"loss": float(y.mean())}

    def order(seed):
        recorder, y = Recorder(), np.arange(10)
        history = experiments.train_on_arrays(
            recorder, y[:, None], y, epochs=2, batch_size=4, seed=seed
        )
        assert history == {"epoch": [1, 2], "loss": [4.5, 4.5]}  # a mean over examples, not steps
        return recorder.seen[:10], recorder.seen[10:]

    first, second = order(0)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert (first, second) == order(0) != order(1)


@pytest.mark.parametrize("count", [0, 1.5, 2.0, "1", True])
@pytest.mark.parametrize("name", ["epochs", "batch_size", "every"])
def test_training_on_arrays_refuses_what_is_no_count(name, count):
    counts = {"epochs": 1, "batch_size": 1, "every": 1} | {name: count}
    with pytest.raises(ValueError, match=f"an integer of at least 1. Received: {name}={count!r}"):
        experiments.train_on_arrays(None, *examples(), **counts)


def test_training_on_arrays_refuses_a_model_that_is_not_compiled():
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="raw")
    with pytest.raises(ValueError, match="Received: 'raw'"):
        experiments.train_on_arrays(net, *examples(), epochs=1, batch_size=8)


def test_training_on_arrays_refuses_labels_of_another_number():
    x, y = examples()
    for labels in (y[:5], y[:0]):
        with pytest.raises(ValueError, match="one class number for each of x"):
            experiments.train_on_arrays(
                small_net({"rate": 0.5}, 0),
                x[: len(labels) and 9],
                labels,
                epochs=1,
                batch_size=8,
            )


def test_a_pool_refuses_a_model_that_is_not_compiled():
    pool = experiments.ModelPool(lambda settings, seed: keras.Sequential([keras.Input((3,))]))
    with pytest.raises(ValueError, match="must give a compiled model"):
        pool({}, 0)


@pytest.mark.slow_on_jax
def test_a_pooled_model_trains_as_a_new_one():
    """Weights, moving statistics, dropout masks and moments of Adam start anew with each seed."""
    x, y = examples()

    def trained(net, seed):
        keras.utils.set_random_seed(seed)
        experiments.train_on_arrays(net, x, y, epochs=2, batch_size=16, seed=seed)
        return net.get_weights()

    pool = experiments.ModelPool(small_net)
    used = pool({"rate": 0.5}, 0)
    trained(used, 0)
    again = pool({"rate": 0.5}, 7)
    assert again is used
    assert int(again.optimizer.iterations) == 0
    expected = trained(small_net({"rate": 0.5}, 7), 7)
    for mine, new in zip(trained(again, 7), expected, strict=True):
        np.testing.assert_allclose(mine, new, rtol=1e-5, atol=1e-6)
    assert pool({"rate": 0.1}, 7) is not used


def test_a_pool_refuses_a_structure_that_depends_on_the_seed():
    def make(settings, seed):
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2 + seed)])
        net.compile("sgd", "mse")
        return net

    pool = experiments.ModelPool(make)
    pool({}, 0)
    with pytest.raises(ValueError, match="shape"):
        pool({}, 1)


# ------------------------------------------------------------------ machine and flags


def test_describe_machine():
    machine = experiments.describe_machine()
    assert machine["versions"]["keras_norm"] == keras_norm.__version__
    hardware = machine["hardware"]
    assert hardware["cores"] >= 1
    assert hardware["device"].upper().startswith(("CPU", "TFRT_CPU", "CUDA", "GPU", "MPS"))
    assert f"{hardware['cores']} cores" in machine["summary"]
    assert f"keras {keras.__version__}" in machine["summary"]
    text = json.dumps(machine, allow_nan=False)
    assert platform.node() not in text
    assert str(Path.cwd()) not in text


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("script", "names"), [("echo 'NVIDIA H200'; echo 'NVIDIA L4'", 2), ("exit 9", 0)]
)
def test_gpus_are_named_if_the_driver_answers(tmp_path, monkeypatch, script, names):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine = experiments.describe_machine()
    assert machine["hardware"]["gpus"] == ["NVIDIA H200", "NVIDIA L4"][:names]
    assert ("cores, NVIDIA H200, NVIDIA L4;" in machine["summary"]) == bool(names)


def test_backend_is_known_without_importing_keras(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    code = "from keras_norm import _machine; print(_machine.keras_backend())"
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    for extra, expected in (
        ({"KERAS_HOME": str(tmp_path)}, "torch"),
        ({"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "jax"}, "jax"),
        ({"KERAS_HOME": str(tmp_path / "none")}, "tensorflow"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | extra, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected


def test_import_is_light():
    heavy = ("keras", "tensorflow", "jax", "torch", "scipy", "matplotlib", "tqdm", "IPython")
    code = f"import sys, keras_norm.experiments; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def flags(*argv, tmp_path):
    return tutorial_arguments("A tutorial.", [*argv, "--out", str(tmp_path / "out")])


def test_flags(tmp_path):
    default = flags(tmp_path=tmp_path)
    assert (default.mode, default.seeds, default.data_dir, default.resume) == (
        "default",
        None,
        None,
        True,
    )
    assert default.out == tmp_path / "out"
    assert os.listdir(default.out) == []
    given_all = flags(
        "--full", "--seeds", "3", "--fresh", "--data-dir", str(tmp_path), tmp_path=tmp_path
    )
    assert (given_all.mode, given_all.seeds, given_all.resume) == ("full", 3, False)
    assert given_all.data_dir == str(tmp_path)
    assert given_all.choose(fast=1, default=2, full=3) == 3
    assert given_all.seed_range(fast=1, default=5, full=10) == range(3)
    fast = flags("--fast", tmp_path=tmp_path)
    assert fast.seed_range(fast=1, default=5, full=10) == range(1)
    assert flags("--no-resume", tmp_path=tmp_path).resume is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fsat"], "unrecognized arguments: --fsat"),
        (["--fas"], "unrecognized arguments: --fas"),
        (["extra"], "unrecognized arguments: extra"),
        (["--fast", "--full"], "not allowed with argument"),
        (["--seeds", "0"], "argument --seeds: must be a whole number, at least 1; got '0'"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--seeds", "two"], "got 'two'"),
        (["--data-dir", "/nowhere/at/all"], "--data-dir: must be a folder, or an .npz file, that"),
        (["--data-dir", "/nowhere/cifar10.npz"], "exists; got '/nowhere/cifar10.npz'"),
        (["--data-dir", __file__], "exists; got"),
    ],
)
def test_wrong_flags(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        flags(*argv, tmp_path=tmp_path)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_data_may_be_one_packed_file(tmp_path):
    packed = tmp_path / "cifar10.npz"
    packed.touch()
    assert flags("--data-dir", str(packed), tmp_path=tmp_path).data_dir == str(packed)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"'default' or 'full'\. Received: mode='slow'"):
        TutorialArguments("slow", Path("results"))


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit) as caught:
        flags(tmp_path=tmp_path)
    assert caught.value.code == 2
    assert "argument --out: cannot write to" in capsys.readouterr().err


def test_default_folder_is_named_after_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/01_batchnorm.py", "--fast"])
    arguments = tutorial_arguments("A tutorial.")
    assert (arguments.mode, arguments.out) == ("fast", Path("results/01_batchnorm"))
    assert tutorial_arguments("A tutorial.", name="mine").out == Path("results/mine")


def test_in_a_notebook_the_kernels_flags_are_not_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel-1.json"])
    arguments = tutorial_arguments("A tutorial.", name="01_batchnorm")
    assert (arguments.mode, arguments.out) == ("default", Path("results/01_batchnorm"))
    monkeypatch.setenv("KERAS_NORM_FLAGS", "--fast --seeds 2")
    arguments = tutorial_arguments("A tutorial.", name="01_batchnorm")
    assert (arguments.mode, arguments.seeds) == ("fast", 2)
    monkeypatch.setattr(sys, "argv", ["tutorial.py", "--full"])  # %run tutorial.py --full
    assert tutorial_arguments("A tutorial.").mode == "full"
    shell.kernel = None  # a terminal IPython
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel-1.json"])
    with pytest.raises(SystemExit):
        tutorial_arguments("A tutorial.")


def test_the_end_of_a_tutorial(tmp_path, capsys):
    arguments = flags(tmp_path=tmp_path)
    real = types.SimpleNamespace(title="Photographs", source="a folder", fallback=False)
    digits = types.SimpleNamespace(title="Digits", source="embedded", fallback=True)
    arguments.finish(["1. One.", "2. Two."], real, seeds="5", instead_of="X", slope=[1.5])
    shown = capsys.readouterr().out
    assert "1. One.\n\n2. Two." in shown
    assert "Photographs: a folder" in shown
    assert "Seeds: 5." in shown
    assert "answers.json" in shown
    assert "NOT" not in shown
    saved = json.loads((arguments.out / "answers.json").read_text())
    assert saved == {"answers": ["1. One.", "2. Two."], "slope": [1.5]}
    arguments.finish(["3."], real, digits, seeds="1 seed", instead_of="Photographs")
    assert "embedded digits, NOT of Photographs" in capsys.readouterr().out
    with pytest.raises(TypeError):
        arguments.finish(["4."], real, seeds="1 seed", instead_of="X", broken=object())
    assert json.loads((arguments.out / "answers.json").read_text()) == {"answers": ["3."]}


def test_the_end_of_a_tutorial_names_what_it_has_written(tmp_path, capsys):
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    for name in ("notes.txt", "again.png"):
        (out / name).write_text("before")
    arguments = flags(tmp_path=tmp_path)
    with replace_file(out / "again.png") as path:
        path.write_text("anew")
    (out / "weights").mkdir()
    (out / ".hidden").touch()
    data = types.SimpleNamespace(title="Photographs", source="a folder", fallback=False)
    arguments.finish(["1. One."], data, seeds="1", instead_of="X")
    _, _, listed = capsys.readouterr().out.partition(f"Written to {out}:\n")
    assert listed.split() == [str(out / name) for name in ("again.png", "answers.json", "weights")]


# The best of each group, and many tests


def test_best_setting_of_each_group_never_one_that_diverged():
    rows = [
        ("sgd .1", "sgd", "finished", (0.5, 0.7)),
        ("sgd 1", "sgd", "finished", (0.6, 0.7)),
        ("sgd 10", "sgd", "diverged", (0.9, 0.9)),
        ("adam .1", "adam", "finished", (0.2, math.nan)),
        ("adam 1", "adam", "finished", (0.1, 0.3)),
        ("lost", "lost", "diverged", (0.9, 0.9)),
    ]
    results = Results(
        Run(name, {"rule": rule, "name": name}, seed, status, final={"accuracy": value})
        for name, rule, status, values in rows
        for seed, value in enumerate(values)
    )
    assert results.best("accuracy", by="rule") == {"sgd": "sgd 1", "adam": "adam 1"}
    with pytest.raises(ValueError, match="metric='loss'"):
        results.best("loss", by="rule")


def test_holm_is_the_closed_test_of_bonferroni():
    """A hypothesis is rejected if Bonferroni rejects every intersection that it is part of."""
    p = [0.012, 0.3, 0.011, 0.04, 0.011]
    sets = [[i for i in range(5) if mask >> i & 1] for mask in range(1, 32)]
    expected = [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(5)
    ]
    np.testing.assert_allclose(experiments.holm(p), expected, rtol=1e-12)
    assert experiments.holm([]) == []
    with pytest.raises(ValueError, match=r"1\.5"):
        experiments.holm([0.1, 1.5])
    with_gap = experiments.holm([*p, math.nan])
    np.testing.assert_allclose(with_gap, [*experiments.holm([*p, 1.0])[:5], math.nan])

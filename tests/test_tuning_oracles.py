"""The parts of a search, without its processes: oracles, spaces, settings, what comes after."""

import contextlib
import io
import itertools
import json
import math
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_norm import (
    _search_retrain,
    _search_run,
    _search_trial,
    _search_worker,
    datasets,
    tuning,
)
from keras_norm import _search_space as spaces
from keras_norm._search_bayesian import Cube
from keras_norm._search_chief import _Attendance, make_oracle
from keras_norm._search_report import _GREY, _curves, _spread_ticks, importance, own_seconds
from keras_norm._search_settings import (
    checkpoints_done_with,
    clear,
    clear_checkpoints,
    code_of,
    hyperband,
    locked,
    prepare,
    read_search,
    record_of,
    warn_of_code,
    write_search,
)
from keras_norm._search_trial import (
    Trial,
    TrialError,
    comparable_loss,
    first_excess,
    load_state,
    save_state,
)
from keras_norm._search_worker import Chief
from keras_norm.plotting import style
from keras_norm.tuning import SearchError, Settings, Task, TrialRecord

keras_tuner = pytest.importorskip("keras_tuner", reason="not in the environments of the core tests")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:keras_tuner")


def line(*entries):
    """A space of KerasTuner, as its config."""
    hp = keras_tuner.HyperParameters()
    for name, low, high in entries or [("x", 0.0, 1.0)]:
        hp.Float(name, low, high)
    return dict(hp.get_config(), values={})


def oracle_in(folder, space=None, admit=None, **options):
    settings = Settings(**{"data": "digits", "trials": 10, "epochs": 4, **options})
    oracle = make_oracle(settings, space or line())
    oracle.start(settings, folder, admit)
    if (folder / "oracle.json").exists():
        oracle.reload()
    return oracle


def score(oracle, trial, curve, worker="w"):
    """Reports until the end, or until told to stop; returns the number of epochs."""
    for epoch, value in enumerate(curve, start=1):
        answer = oracle.update_trial(trial.trial_id, {"val_accuracy": value}, step=epoch)
        if answer.status == "STOPPED":
            break
    oracle.finish(worker, trial.trial_id, "COMPLETED", "")
    return epoch


def values_of(trial):
    return trial.hyperparameters.values


def run(oracle, function, count, worker="w"):
    """Lets the oracle propose, and answers by a function of the values."""
    found = []
    for _ in range(count):
        trial = oracle.create_trial(worker)
        if trial.status == "STOPPED":
            break
        found.append(values_of(trial))
        score(oracle, trial, [function(values_of(trial))], worker)
    return found


def peak(values):
    return 1 - sum((v - 0.3) ** 2 for v in values.values())


@pytest.mark.parametrize("tuner", ["random", "bayesian"])
def test_seeds_repeat_a_search_and_a_crash_does_not_change_it(tmp_path, tuner):
    def go(name, seed):
        (tmp_path / name).mkdir()
        return run(oracle_in(tmp_path / name, tuner=tuner, seed=seed, trials=7), peak, 7)

    whole = go("whole", 0)
    assert len(whole) == 7
    assert go("other", 1) != whole
    (tmp_path / "parts").mkdir()
    parts = []
    for count in (2, 3, 2):  # a new oracle each time, from the files
        parts += run(oracle_in(tmp_path / "parts", tuner=tuner, seed=0, trials=7), peak, count)
    assert parts == whole


def test_bayesian_search_comes_closer_than_its_random_beginning(tmp_path):
    space = line(("x", 0.0, 1.0), ("y", 0.0, 1.0))
    found = run(oracle_in(tmp_path, space, tuner="bayesian", trials=20), peak, 20)
    distance = [math.dist((v["x"], v["y"]), (0.3, 0.3)) for v in found]
    assert len(found) == 20
    assert np.median(distance[-6:]) < 0.15 < np.median(distance[:6])


def test_crash_between_the_two_files(tmp_path):
    """A trial is written before the oracle: each half may be missing."""
    oracle = oracle_in(tmp_path)
    first = oracle.create_trial("a")
    before = (tmp_path / "oracle.json").read_text()
    second = oracle.create_trial("b")
    (tmp_path / "oracle.json").write_text(before)  # the second was not noted
    oracle = oracle_in(tmp_path)
    assert list(oracle.trials) == [first.trial_id]
    again = oracle.create_trial("b")
    assert again.trial_id == second.trial_id
    assert values_of(again) == values_of(second)

    before = (tmp_path / "oracle.json").read_text()
    score(oracle, first, [0.5], "a")
    (tmp_path / "oracle.json").write_text(before)  # the end of the first was not noted
    oracle = oracle_in(tmp_path)
    assert oracle.end_order == [first.trial_id]
    assert oracle.trials[first.trial_id].score == 0.5
    assert oracle.create_trial("b").trial_id == second.trial_id  # its own goes on
    assert oracle.create_trial("a").trial_id not in (first.trial_id, second.trial_id)


def test_what_is_told_twice_counts_once(tmp_path):
    oracle = oracle_in(tmp_path)
    trial = oracle.create_trial("a")
    assert oracle.create_trial("a").trial_id == trial.trial_id
    for value in (0.25, 0.75):  # the second is of an epoch that is known
        oracle.update_trial(trial.trial_id, {"val_accuracy": value}, step=1)
    oracle.finish("b", trial.trial_id, "FAILED", "not mine")
    assert oracle.trials[trial.trial_id].status == "RUNNING"
    oracle.finish("a", trial.trial_id, "COMPLETED", "")
    oracle.finish("a", trial.trial_id, "FAILED", "too late")
    record = record_of(oracle.trials[trial.trial_id].get_state())
    assert (record.status, record.score, record.history["val_accuracy"]) == (
        "completed",
        0.25,
        {1: 0.25},
    )
    assert oracle.end_order == [trial.trial_id]


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
@pytest.mark.parametrize("tuner", ["random", "bayesian", "hyperband"])
def test_trial_counts_by_its_last_epoch(tmp_path, objective, tuner):
    """To which it is trained again; the best epoch is known beside it."""
    sign = {"val_accuracy": 1, "val_loss": -1}[objective]
    for scoring, expected in (("last", 0.4), ("best", 0.8)):
        (tmp_path / scoring).mkdir()
        options = {"objective": objective, "scoring": scoring, "tuner": tuner}
        oracle = oracle_in(tmp_path / scoring, **options)
        trial = oracle.create_trial("w")
        for epoch, value in enumerate([0.2, 0.8, 0.4], start=1):
            metrics = {"val_accuracy": value, objective: sign * value}
            oracle.update_trial(trial.trial_id, metrics, step=epoch)
        oracle.finish("w", trial.trial_id, "COMPLETED", "")
        record = record_of(oracle.trials[trial.trial_id].get_state())
        assert record.score == record.reached(objective, oracle.settings) == sign * expected
        assert record.reached("val_accuracy", oracle.settings) >= expected
        assert record.best_epoch(oracle.settings) == 2


def test_seconds_are_without_compilation_and_counted_once(trial):
    assert first_excess([0.0, 5.0, 6.0, 8.0, 9.0]) == 4.0  # the others take 1, 2 and 1
    assert first_excess([0.0, 1.0, 2.0, 4.0]) == first_excess([0.0, 5.0, 6.0]) == 0.0
    logs = {"loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5}
    for scoring, seconds in (("last", [2.0, 5.0]), ("best", [6.0, 9.0])):
        found = trial(settings={"scoring": scoring})
        found.epoch_ended(1, logs, 6.0, 4.0)
        found.epoch_ended(2, logs, 3.0)
        assert [m["seconds"] for m in found.history] == seconds
        assert found.history[1]["accuracy_per_second"] == pytest.approx(0.4 / seconds[1])
        assert found.history[1]["compilation"] == (4.0 if scoring == "last" else 0.0)


def test_reporter_leaves_out_the_first_step_of_its_process(monkeypatch):
    """One is compiled in each process, so also when a trial goes on."""
    now, told = [0.0], []
    monkeypatch.setattr(_search_trial.time, "monotonic", lambda: now[0])

    class Told:
        stopped = False

        def epoch_ended(self, *args):
            told.append((args[0], *args[2:]))

    reporter = _search_trial.Reporter(Told())
    for epoch in (3, 4):
        reporter.on_epoch_begin(epoch)
        for batch, seconds in enumerate([10.0, 1.0, 1.0, 1.0]):
            now[0] += seconds
            reporter.on_train_batch_end(batch)
        reporter.on_test_begin()
        now[0] += 100.0
        reporter.on_epoch_end(epoch)
    assert told == [(4, 13.0, 9.0), (5, 13.0, 0.0)]


def test_time_of_hyperband_is_counted_once():
    def record(number, seconds, **values):
        history = {"seconds": dict(enumerate(seconds, start=1))}
        values = {f"tuner/{name}": value for name, value in values.items()}
        return TrialRecord(number, "completed", "", 0.5, values, history)

    onward = {"trial_id": "0000", "initial_epoch": 2}
    trials = [
        record(0, [1.0, 2.0], epochs=2),
        record(1, [1.0, 2.0, 4.0], epochs=3, **onward),
        record(2, [3.0, 5.0, 9.0], epochs=3, **onward),  # it had to begin anew
        record(3, []),
    ]
    assert own_seconds(trials) == {0: 2.0, 1: 2.0, 2: 9.0, 3: 0.0}


@pytest.mark.parametrize("direction", ["max", "min"])
def test_median_rule(tmp_path, direction):
    objective = {"max": "val_accuracy", "min": "val_loss"}[direction]
    sign = {"max": 1, "min": -1}[direction]
    options = {"prune": True, "prune_after": 2, "prune_least": 3, "objective": objective}

    def train(oracle, levels):
        trial = oracle.create_trial("w")
        for epoch, level in enumerate(levels, start=1):
            metrics = {objective: sign * level, "val_accuracy": level}
            answer = oracle.update_trial(trial.trial_id, metrics, step=epoch)
            if answer.status == "STOPPED":
                break
        return trial, epoch

    oracle = oracle_in(tmp_path, **options)
    for level in (0.1, 0.5, 0.7):
        trial, epochs = train(oracle, [level] * 4)
        assert epochs == 4  # there are too few to compare with
        oracle.finish("w", trial.trial_id, "COMPLETED", "")
    trial, epochs = train(oracle, [0.6, 0.4, 0.4, 0.4])
    assert epochs == 4  # its best so far is above the median, .5
    oracle.finish("w", trial.trial_id, "COMPLETED", "")
    trial, epochs = train(oracle, [0.3, 0.3, 0.9, 0.9])
    assert epochs == 2  # .3 after epoch 2, the median is (.4 + .5) / 2
    again = oracle_in(tmp_path, **options)  # the decision outlives the chief
    answer = again.update_trial(trial.trial_id, {objective: sign * 0.3}, step=2)
    assert answer.status == "STOPPED"
    again.finish("w", trial.trial_id, "COMPLETED", "")
    record = record_of(again.trials[trial.trial_id].get_state())
    assert record.status == "pruned"
    assert record.score == sign * 0.3  # of the last epoch, here of both
    assert record.reason == "pruned after epoch 2: below the median of the others"
    assert record.score == sign * 0.3


def test_proposals_are_other_trials(explored, tmp_path):
    """None repeats an earlier one but for a little of a number."""
    space = explored["cifar10"]
    oracle = oracle_in(tmp_path, space, data="cifar10", tuner="bayesian", trials=40)

    def score(values):
        return 0.5 + 0.1 * (values["family"] == "cnn") - 0.1 * values.get("dropout", 0)

    found = run(oracle, score, 16)
    cube = Cube(spaces.hyperparameters(space, {}).space)
    points = cube.points(found)
    for n in range(10, 16):
        assert not cube.alike(points[n : n + 1], points[:n])
        assert cube.values(points[n]) == pytest.approx(found[n])
        assert np.allclose(cube.snapped(points[n : n + 1]), points[n])
    assert cube.alike(points[3:4] + 1e-3 * ~cube.is_choice, points[3:4])
    kinds = {v["family"] for v in found[10:]}
    assert "cnn" in kinds


def test_distance_of_kinds_and_of_what_is_not_there(explored):
    cube = Cube(spaces.hyperparameters(explored["cifar10"], {}).space)
    names = [hp.name for hp in cube.axes]
    base = sample(explored["cifar10"], 0).values

    def features(**changes):
        return cube.features(cube.snapped(cube.points([{**base, **changes}])))[0]

    for other in ("relu", "gelu", "silu"):
        apart = np.linalg.norm(features(activation=other) - features())
        assert apart == pytest.approx(0 if other == base["activation"] else 1)
    family = {"family": "mlp", "mlp_depth": 2}
    assert np.allclose(features(**family, cnn_blocks=1), features(**family, cnn_blocks=2))
    centre = cube.points([base])
    near = cube.snapped(cube.around(centre, 200, np.random.default_rng(0)))
    moved = np.abs(near - centre) > 1e-9
    own = [name in base for name in names]
    assert 1 < moved[:, own].sum(axis=1).mean() < 3


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_pruned_trials_are_not_compared_by_what_they_had_reached(tmp_path, objective):
    sign = {"val_accuracy": 1, "val_loss": -1}[objective]
    oracle = oracle_in(tmp_path, tuner="bayesian", objective=objective, prune=True, prune_least=3)
    curves = [(0.2, 0.3, 0.6), (0.3, 0.5, 0.5), (0.2, 0.4, 0.3), (0.1,)]
    for curve in curves:
        trial = oracle.create_trial("w")
        for epoch, value in enumerate(curve, start=1):
            metrics = {"val_accuracy": value, objective: sign * value}
            oracle.update_trial(trial.trial_id, metrics, step=epoch)
        oracle.finish("w", trial.trial_id, "COMPLETED", "")
    trials = list(oracle.trials.values())
    assert [bool(t.message) for t in trials] == [False, False, False, True]
    found = sign * oracle._prospects(trials)
    assert found == pytest.approx([0.6, 0.5, 0.3, 0.1 + 0.2])  # gains .4, .2 and .1


def test_budget_refuses_before_there_is_a_trial(tmp_path):
    def admit(values):
        return "too large" if values["x"] > 0.5 else None

    for tuner in ("random", "bayesian"):
        (tmp_path / tuner).mkdir()
        oracle = oracle_in(tmp_path / tuner, admit=admit, tuner=tuner)
        found = run(oracle, lambda v: v["x"], 11)
        assert len(found) == 10  # as many as without a budget
        assert max(v["x"] for v in found) <= 0.5
        assert oracle.refused
    (tmp_path / "none").mkdir()
    oracle = oracle_in(tmp_path / "none", admit=lambda values: "too large")
    assert oracle.create_trial("w").status == "STOPPED"
    assert oracle.exhausted == "the budget refused 200 proposals in a row"


def test_a_space_that_is_used_up_is_told(tmp_path):
    hp = keras_tuner.HyperParameters()
    hp.Choice("x", [0.0, 1.0])
    oracle = oracle_in(tmp_path, dict(hp.get_config(), values={}), trials=3)
    assert len(run(oracle, peak, 3)) == 2
    assert oracle.exhausted.startswith("what is proposed has all been tried")


def test_bayesian_search_learns_the_budget(tmp_path):
    """The best lies beyond it: to ask there again and again would make the search a random one."""

    def admit(values):
        return "too large" if values["x"] > 0.4 else None

    space = line(("x", 0.0, 1.0), ("y", 0.0, 1.0))
    oracle = oracle_in(tmp_path, space, admit=admit, tuner="bayesian", trials=18)
    run(oracle, lambda v: 1 - (v["x"] - 0.9) ** 2 - (v["y"] - 0.3) ** 2, 12)
    refused = len(oracle.refused)
    again = oracle_in(tmp_path, space, admit=admit, tuner="bayesian", trials=18)
    assert again.refused == oracle.refused
    last = run(again, lambda v: 1 - (v["x"] - 0.9) ** 2 - (v["y"] - 0.3) ** 2, 6)
    assert len(again.refused) - refused <= 6  # without: ten for each
    assert np.median([v["x"] for v in last]) > 0.3


def test_bayesian_search_learns_what_fails(tmp_path):
    """The best lies where trials begin to diverge: a third of all, and all that promise most."""
    space = line(("x", 0.0, 1.0), ("y", 0.0, 1.0))
    oracle = oracle_in(tmp_path, space, tuner="bayesian", trials=24)
    found = []
    for _ in range(24):
        trial = oracle.create_trial("w")
        values = values_of(trial)
        found.append(values["x"])
        if values["x"] > 0.7:
            oracle.finish("w", trial.trial_id, "FAILED", "diverged")
        else:
            score(oracle, trial, [values["x"] - 0.1 * values["y"]])
    assert sum(x > 0.7 for x in found[12:]) <= 5  # without: all twelve
    assert max(x for x in found if x <= 0.7) > 0.67


def test_bayesian_search_is_guided_where_most_trials_fail(tmp_path):
    """Trials that fail count among the random ones at the beginning: else nearly all would be."""
    space = line(("x", 0.0, 1.0), ("y", 0.0, 1.0))
    oracle = oracle_in(tmp_path, space, tuner="bayesian", trials=14, seed=1)
    ends, guided, promising = [], [], oracle._promising
    oracle._promising = lambda *args: guided.append(len(ends)) or promising(*args)
    for _ in range(10):
        trial = oracle.create_trial("w")
        values = values_of(trial)
        ends.append(values["x"] < 0.25)
        if ends[-1]:
            score(oracle, trial, [values["x"] - values["y"]])
        else:
            oracle.finish("w", trial.trial_id, "FAILED", "no luck")
    assert guided == [6, 7, 8, 9]
    assert sum(ends[:6]) == 3  # the least to go by; until six have completed, it would take 14
    assert sum(ends[6:]) >= 2


def test_bayesian_search_needs_some_scores(tmp_path):
    oracle = oracle_in(tmp_path, tuner="bayesian", trials=20)
    guided, promising = [], oracle._promising
    oracle._promising = lambda *args: guided.append(len(oracle.trials)) or promising(*args)
    for number in range(10):
        trial = oracle.create_trial("w")
        if number in (2, 6, 8):
            score(oracle, trial, [0.5])
        else:
            oracle.finish("w", trial.trial_id, "FAILED", "no luck")
    assert guided == [9]


@pytest.mark.parametrize(("epochs", "factor"), [(4, 2), (9, 3), (10, 3)])
def test_hyperband_goes_on_from_the_best(tmp_path, epochs, factor):
    oracle = oracle_in(tmp_path, tuner="hyperband", epochs=epochs, factor=factor)
    trials, kept = {}, set()  # checkpoints
    while (trial := oracle.create_trial("w")).status != "STOPPED":
        values = values_of(trial)
        assert values.get("tuner/trial_id") in {None, *kept}
        kept = (kept | {trial.trial_id}) - set(checkpoints_done_with(trial.trial_id, values))
        trials[trial.trial_id] = values
        for epoch in range(1, values["tuner/epochs"] + 1):
            oracle.update_trial(trial.trial_id, {"val_accuracy": peak({"x": values["x"]})}, epoch)
        oracle.finish("w", trial.trial_id, "COMPLETED", "")
    assert len(trials) == hyperband(epochs, factor)
    assert all("tuner/trial_id" in v or v["tuner/round"] == 0 for v in trials.values())
    final = [n for n, v in trials.items() if v["tuner/round"] == v["tuner/bracket"]]
    assert final
    assert not kept & set(final)
    promoted = [v for v in trials.values() if "tuner/trial_id" in v]
    assert promoted
    for values in promoted:
        before = trials[values["tuner/trial_id"]]
        assert before["x"] == values["x"]
        assert before["tuner/epochs"] == values["tuner/initial_epoch"] < values["tuner/epochs"]


def halved(oracle, fails, workers=1):
    """Hyperband's trials, number -> values; each takes as long as the epochs that it trains.

    Whatever a trial goes on from must have its checkpoint.
    """
    trials, kept, now = {}, set(), 0
    ends = {}  # worker -> when, and number of its trial
    while True:
        for worker in sorted({f"w{k}" for k in range(workers)} - set(ends)):
            trial = oracle.create_trial(worker)
            if trial.status == "RUNNING":
                values = trials[trial.trial_id] = values_of(trial)
                assert values.get("tuner/trial_id") in {None, *kept}
                epochs = values["tuner/epochs"] - values["tuner/initial_epoch"]
                ends[worker] = now + epochs + 0.001 * len(trials), trial.trial_id
                kept.add(trial.trial_id)
        if not ends:
            return trials
        worker = min(ends, key=ends.get)
        now, number = ends.pop(worker)
        values = trials[number]
        if fails(int(number), values):
            oracle.finish(worker, number, "FAILED", "no luck")
        else:
            for epoch in range(1, values["tuner/epochs"] + 1):
                oracle.update_trial(number, {"val_accuracy": peak({"x": values["x"]})}, epoch)
            oracle.finish(worker, number, "COMPLETED", "")
        kept -= set(checkpoints_done_with(number, values))


def sizes(trials):
    """(bracket, round) -> number of trials."""
    return Counter((v["tuner/bracket"], v["tuner/round"]) for v in trials.values())


WHOLE = {(2, 0): 9, (2, 1): 3, (2, 2): 1, (1, 0): 5, (1, 1): 2, (0, 0): 3}  # nine epochs by three


def test_hyperband_goes_on_where_trials_fail(tmp_path):
    """KerasTuner's lets none go on from a round of nine of which three have failed."""
    oracle = oracle_in(tmp_path, tuner="hyperband", epochs=9)
    trials = halved(oracle, lambda number, values: number in (1, 4, 7))
    assert sizes(trials) == WHOLE
    assert oracle.exhausted == ""
    first = [n for n, v in trials.items() if (v["tuner/bracket"], v["tuner/round"]) == (2, 0)]
    lasting = [n for n in first if int(n) not in (1, 4, 7)]
    best = sorted(lasting, key=lambda n: -peak({"x": trials[n]["x"]}))[:3]
    onward = [v for v in trials.values() if (v["tuner/bracket"], v["tuner/round"]) == (2, 1)]
    assert {v["tuner/trial_id"] for v in onward} == set(best)


def test_hyperband_says_where_too_few_are_left(tmp_path):
    def fails(number, values):
        return (values["tuner/bracket"], values["tuner/round"]) == (2, 0) and number != 5

    oracle = oracle_in(tmp_path, tuner="hyperband", epochs=9)
    assert sizes(halved(oracle, fails)) == {**WHOLE, (2, 1): 1}
    assert oracle.exhausted == "in some rounds more have failed than were to be left behind"


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("values", "expected"), [(2, (1, 1)), (6, (2, 1)), (11, (3, 1))])
def test_hyperband_halves_what_a_small_space_has(tmp_path, workers, values, expected):
    """KerasTuner's ends with all of them at the shortest training."""
    hp = keras_tuner.HyperParameters()
    hp.Choice("x", [k / values for k in range(values)])
    space = dict(hp.get_config(), values={})
    oracle = oracle_in(tmp_path, space, tuner="hyperband", epochs=9)
    trials = halved(oracle, lambda number, values: False, workers)
    assert oracle.exhausted.startswith("what is proposed has all been tried")
    found = sizes(trials)
    new = sum(n for (_, round_), n in found.items() if round_ == 0)
    assert new in (values, values - 1)  # found by chance
    assert (found[2, 1], found[2, 2]) == expected
    best = max(trials.values(), key=lambda v: peak({"x": v["x"]}))
    last = [v for v in trials.values() if (v["tuner/bracket"], v["tuner/round"]) == (2, 2)]
    if values < 9:
        assert [v["x"] for v in last] == [best["x"]]
    else:
        assert found[1, 1] == 1  # of two


@pytest.mark.parametrize("workers", [2, 4])
def test_hyperband_of_several_workers_knows_the_brackets(tmp_path, workers):
    """A trial goes on while a later bracket has begun; its checkpoint is still there."""
    oracle = oracle_in(tmp_path, tuner="hyperband", epochs=9)
    trials = halved(oracle, lambda number, values: False, workers)
    assert sizes(trials) == WHOLE
    for values in trials.values():
        if "tuner/trial_id" in values:
            before = trials[values["tuner/trial_id"]]
            assert before["tuner/bracket"] == values["tuner/bracket"]


def test_checkpoints_are_cleared_when_no_trial_will_be_made(tmp_path):
    oracle = oracle_in(tmp_path, trials=9)
    run(oracle, peak, 2)
    checkpoint = tmp_path / "trial_0" / "checkpoint.npz"
    checkpoint.touch()
    remains = left_over(tmp_path / "trial_1/checkpoint.npz")
    clear_checkpoints(tmp_path, oracle.settings, is_over=False)  # the time was up
    assert checkpoint.exists()
    assert remains.exists()
    running = oracle.create_trial("w")
    clear_checkpoints(tmp_path, oracle.settings, is_over=True)
    assert checkpoint.exists()
    score(oracle, running, [0.5])
    clear_checkpoints(tmp_path, oracle.settings, is_over=True)  # fewer than were planned
    assert not checkpoint.exists()
    assert not remains.exists()


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "shares"),
    [
        ([0, 1], 1, None, [[0, 1]]),
        ([0, 1], 1, 1, [[0]]),
        ([2, 5], 2, None, [[2], [5]]),
        ([0, 1], 3, None, [[0], [1], [0]]),
        ([0, 1, 2, 3, 4], 2, None, [[0, 1], [2, 3]]),
        ([0, 1, 2], 2, 2, [[0, 1], [2, 0]]),
    ],
)
def test_workers_share_the_cores(monkeypatch, cores, workers, threads, shares):
    monkeypatch.setattr(_search_run, "_cores", lambda: cores)
    assert [_search_run.share(k, workers, threads) for k in range(workers)] == shares


def test_failures_in_a_row_do_not_end_the_search(tmp_path):
    oracle = oracle_in(tmp_path)
    for _ in range(10):
        trial = oracle.create_trial("w")
        oracle.finish("w", trial.trial_id, "FAILED", "no luck")
    states = [t.status for t in oracle.trials.values()]
    assert states == ["FAILED"] * 10
    assert oracle.create_trial("w").status == "STOPPED"


def test_nobody_goes_home_while_a_trial_may_need_them(tmp_path):
    oracle = oracle_in(tmp_path, trials=2)
    one, other = oracle.create_trial("a"), oracle.create_trial("b")
    score(oracle, other, [0.5], "b")
    assert oracle.create_trial("b").status == "IDLE"
    oracle.release("a")  # it went silent
    taken = oracle.create_trial("b")
    assert (taken.trial_id, taken.status) == (one.trial_id, "RUNNING")
    oracle.finish("a", one.trial_id, "FAILED", "late")
    score(oracle, taken, [0.5], "b")
    assert oracle.create_trial("b").status == "STOPPED"


def test_attendance():
    there = _Attendance(patience=1.0)  # five ticks
    there.seen("a")
    there.seen("b")
    assert not there.over()
    for _ in range(4):
        assert there.tick() == []
        there.seen("b")
    assert there.tick() == []
    assert there.tick() == ["a"]
    there.dismissed.add("b")
    assert there.over()


def test_chief_that_nobody_joins_ends_when_the_time_is_up():
    alone = _Attendance(patience=1.0, alone=True)
    assert not alone.over()
    assert alone.over(closing=True)
    alone.seen("a")
    assert not alone.over(closing=True)  # it has a trial, or is told that there is none
    assert not _Attendance(patience=1.0).over(closing=True)  # its workers are still to come


@pytest.fixture
def trial(tmp_path):
    """A trial that has finished one epoch; called with what differs, another one there."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    def made(**changes):
        values = changes.pop("values", {"x": 0.5})
        spec = {
            "settings": Settings(data="digits", **changes.pop("settings", {})).to_dict(),
            "space": line(),
            "values": values,
            "folder": str(tmp_path / "trial_0"),
            "number": "0",
            "root": "0",
            "ancestor": None,
            "identity": "one",
        }
        found = Trial(None, {**spec, **changes})
        found.model, found.candidate = model, tuning.Candidate(model, 1)
        found.flops, found.classes, found._report = 1, 10, lambda metrics: None
        return found

    history = [{"epoch": 1, "val_accuracy": 0.5}]
    first = made()
    save_state(first.folder / "checkpoint.npz", model, history, first.origin)
    return made


def test_trial_goes_on_only_from_a_checkpoint_of_its_own(trial, tmp_path):
    def epochs(**changes):
        found = trial(**changes)
        found._restore(None)
        return len(found.history)

    assert epochs() == 1
    assert epochs(identity="another") == epochs(identity="") == 0
    assert epochs(values={"x": 0.25}) == epochs(settings={"seed": 1}) == epochs(root="3") == 0
    promoted = {"x": 0.5, "tuner/epochs": 4, "tuner/trial_id": "0"}
    onward = {"folder": str(tmp_path / "trial_7"), "number": "7", "values": promoted}
    assert epochs(**onward) == 0
    assert epochs(**onward, ancestor=str(tmp_path / "trial_0")) == 1
    assert epochs(**onward, ancestor=str(tmp_path / "trial_0"), identity="another") == 0


def left_over(path):
    """What `replace_file` leaves in a process that is killed, and two files that are others'."""
    for name in ("0123abcd", "other", "0123abcd.mine"):
        path.with_name(f".{path.stem}.{name}{path.suffix}").touch()
    return path.with_name(f".{path.stem}.0123abcd{path.suffix}")


def test_what_a_killed_trial_was_writing_goes_again(trial, tmp_path):
    remains = left_over(tmp_path / "trial_0/checkpoint.npz")
    for _ in range(2):
        trial()._restore(None)
        assert not remains.exists()
        assert len(list(tmp_path.glob("trial_0/.checkpoint.*"))) == 2
    left_over(tmp_path / "trial_0/checkpoint.npz")
    spec = {"settings": {"data": "digits"}, "folder": str(tmp_path), "space": line()}
    ended = Endless()  # by its limits, while it was writing
    _search_worker.Attempt(ended, None, {**spec, "identity": "one"}, ended).clear()
    assert not remains.exists()
    assert not (tmp_path / "trial_0/checkpoint.npz").exists()


def test_old_checkpoint_is_for_an_old_search(trial, tmp_path):
    path = tmp_path / "trial_0/checkpoint.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if name != "origin"}
    np.savez(path, **arrays)
    for identity, epochs in (("", 1), ("one", 0)):
        found = trial(identity=identity)
        found._restore(None)
        assert len(found.history) == epochs


def test_state_of_bfloat16_comes_back(tmp_path):
    """NumPy's files do not know that dtype, and read it as raw bytes."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))

    def made():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
        return model

    def state(model):
        variables = [*model.layers[-1].variables, *model.optimizer.variables]
        return [keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in variables]

    class Slow(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.variables = [keras.Variable(np.zeros(2), dtype="bfloat16")]

    model, slow, other, another = made(), Slow(), made(), Slow()
    model.train_on_batch(x, y)
    slow.variables[0].assign([0.5, -3.0])
    save_state(tmp_path / "checkpoint.npz", model, [{"loss": 1.0}], callbacks=[slow])
    assert load_state(tmp_path / "checkpoint.npz", other, [another]) == [{"loss": 1.0}]
    for own, found in zip(state(model), state(other), strict=True):
        np.testing.assert_array_equal(own, found)
    assert other.layers[-1].kernel.dtype == "bfloat16"
    again = keras.ops.convert_to_numpy(keras.ops.cast(another.variables[0], "float32"))
    assert again.tolist() == [0.5, -3.0]


def test_log_for_tensorboard_holds_each_epoch_once_and_in_order(trial, tmp_path):
    """TensorBoard draws lines in the order in which it reads, by the names of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = {"loss": 1.0, "val_loss": 1.0}

    def train(epochs, **changes):
        found = trial(settings={"tensorboard": True}, **changes)
        found._restore(None)
        for epoch in epochs:
            found.epoch_ended(epoch, logs | {"val_accuracy": epoch / 16}, 1.0)

    def logged(name):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert (b"tuner/epochs" in content) == (name == "trial_0007")
        return [(e.step, e.value) for e in events.Scalars("val_accuracy")]

    expected = [(1, 0.5), *((epoch, epoch / 16) for epoch in range(2, 15))]
    train(range(2, 13))  # from the checkpoint of one epoch
    assert logged("trial_0000") == expected[:12]
    (tmp_path / "trial_0/checkpoint.npz").rename(tmp_path / "kept.npz")
    train([1])  # begun anew
    assert logged("trial_0000") == [(1, 1 / 16)]
    (tmp_path / "kept.npz").rename(tmp_path / "trial_0/checkpoint.npz")
    train([13])  # after an interruption
    assert logged("trial_0000") == expected[:13]
    promoted = {"x": 0.5, "tuner/epochs": 14, "tuner/trial_id": "0"}
    onward = {"folder": str(tmp_path / "trial_7"), "number": "7", "values": promoted}
    train([14], **onward, ancestor=str(tmp_path / "trial_0"))
    assert logged("trial_0007") == expected


@pytest.mark.parametrize("name", ["loss", "val_loss", "val_accuracy", "val_crossentropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trial_whose_score_is_not_finite_has_failed(trial, name, value):
    """The oracle would fit infinity, and has no word for NaN."""
    logs = {"loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5, "val_crossentropy": 1.0}
    found = trial(settings={"objective": "val_loss"})
    with pytest.raises(TrialError, match=f"diverged: {name} is {value} in epoch 2"):
        found.epoch_ended(2, logs | {name: value}, 1.0)
    assert not found.history
    found.epoch_ended(2, logs | {"val_other": value}, 1.0)
    assert found.history[-1]["val_loss"] == 1.0


class Shares(keras.metrics.Metric):
    """A metric of a space of one's own: of each class, the share of the predictions."""

    def __init__(self):
        super().__init__(name="crossentropy")  # a name that means a number elsewhere
        self.counts = self.add_weight(shape=(10,), initializer="zeros", name="counts")

    def update_state(self, y_true, y_pred, sample_weight=None):
        classes = keras.ops.one_hot(keras.ops.argmax(y_pred, -1), 10)
        self.counts.assign_add(keras.ops.sum(classes, 0))

    def result(self):
        return self.counts / keras.ops.sum(self.counts)


def test_metrics_that_are_no_numbers_are_left_out(trial, tmp_path, monkeypatch):
    """By the search and by the training of its best alike."""

    def space(hp, task):
        model = keras.Sequential(
            [keras.Input(task.input_shape), keras.layers.Flatten(), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, metrics=["accuracy", Shares()], run_eagerly=True)
        return tuning.Candidate(model, batch_size=50)

    class Channel:
        def ask(self, message):
            return {"go": True}

        def send(self, message):
            pass

    monkeypatch.setattr(_search_trial, "space_of", lambda reference: space)
    settings = Settings(data="digits", subset=100, epochs=1, space="own.py:space")
    data = datasets.load("digits", validation=0.1)
    _search_trial.require_candidate(settings, {"space": []}, data)
    spec = {"settings": settings.to_dict(), "space": {"space": []}, "values": {}, "number": 0}
    spec |= {"names": None, "seed": 0, "folder": str(tmp_path / "training")}
    (tmp_path / "training").mkdir()
    result = _search_retrain._trained(Channel(), spec)
    assert set(result["history"][0]) == {"accuracy", "loss"}
    assert result["test_loss"] > 0
    found, values = trial(), np.full(10, 0.1)
    logs = {"loss": 1.0, "val_loss": 1.4, "val_accuracy": 0.5, "val_crossentropy": values}
    found.epoch_ended(1, logs, 1.0)
    assert found.history[0]["val_loss"] == 1.4
    assert "val_crossentropy" not in found.history[0]


LOOKAHEAD = """
import keras

from keras_norm.callbacks import Lookahead
from keras_norm.tuning import Candidate


def space(hp, task):
    def model():
        net = keras.Sequential(
            [keras.Input(task.input_shape), keras.layers.Flatten(), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        net.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"], run_eagerly=True)
        return net

    hp.Choice("x", [0.5])
    slow = Lookahead(2 * task.epochs, steps=3, decay=0.9, power=0)  # due in the second epoch
    return Candidate(model, batch_size=50, callbacks=[keras.callbacks.Callback(), slow])
"""


@pytest.mark.parametrize("process", ["trial", "training"])
def test_callbacks_go_on_from_their_variables(tmp_path, monkeypatch, process):
    """Slow weights that began anew, from the fast ones, would end in another net."""
    (tmp_path / "slow.py").write_text(LOOKAHEAD)
    monkeypatch.delitem(sys.modules, "keras_norm_space_slow", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = Settings(data="digits", subset=100, epochs=2, space=f"{tmp_path / 'slow.py'}:space")
    entries = {"space": spaces.explore(settings, TASKS["digits"])["space"]}
    spec = {"settings": settings.to_dict(), "space": entries, "values": {"x": 0.5}, "number": 0}
    spec |= {"names": None, "seed": 0, "root": 0, "ancestor": None, "identity": "one"}

    class Channel:
        def __init__(self, enough):
            self.enough, self.losses = enough, []

        def ask(self, message):
            if "report" in message:
                self.losses.append(message["report"]["loss"])
                self.send(message["report"])
            return {"go": True}

        def send(self, message):
            if message["epoch"] == self.enough:
                raise KeyboardInterrupt

    def losses(name, enough=math.inf):
        folder, channel = tmp_path / name, Channel(enough)
        folder.mkdir(exist_ok=True)
        if process == "training":
            own = {**spec, "folder": str(folder)}
            return [h["loss"] for h in _search_retrain._trained(channel, own)["history"]]
        Trial(channel, {**spec, "folder": str(folder)}).train()
        return channel.losses

    whole = losses("whole")
    with pytest.raises(KeyboardInterrupt):
        losses("interrupted", enough=1)
    with np.load(tmp_path / "interrupted/checkpoint.npz") as file:
        arrays = {name: file[name] for name in file}
    (tmp_path / "once").mkdir()  # where the file is as it was once written
    once = {name: value for name, value in arrays.items() if not name.startswith("c")}
    assert set(arrays) - set(once) == {"c1_0", "c1_1"}
    np.savez(tmp_path / "once/checkpoint.npz", **once)
    assert losses("interrupted") == whole
    begun_anew = losses("once")
    assert begun_anew[0] == whole[0]
    assert begun_anew[1] != whole[1]


def test_losses_of_trials_can_be_compared(trial, explored, tmp_path):
    """Neither smoothing nor penalties, which differ from trial to trial, are in the score."""
    logs = {"loss": 1.0, "val_loss": 1.4, "val_accuracy": 0.5}
    for own, scoring, expected in (
        ({"val_crossentropy": 0.7}, "last", 0.7),
        ({}, "last", 1.4),  # a space of one's own that has no such metric
        ({"val_crossentropy": 0.7}, "best", 1.4),  # a search that began before
    ):
        found = trial(settings={"scoring": scoring})
        found.epoch_ended(1, logs | own, 1.0)
        assert found.history[-1]["val_loss"] == expected

    hp = sample(explored["digits"], 0)
    hp.values |= {"label_smoothing": 0.1, "l2": 1e-3}
    model = spaces.images(hp, TASKS["digits"]).build()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 20)
    measured = model.evaluate(x, y, return_dict=True, verbose=0)
    logits = keras.ops.convert_to_numpy(model(x, training=False)).astype("float64")
    plain = (np.log(np.exp(logits).sum(1)) - logits[np.arange(20), y]).mean()
    assert comparable_loss(measured) == pytest.approx(plain, rel=1e-5)
    assert abs(measured["loss"] - plain) > 0.01


def test_old_search_is_read_with_what_it_went_by(tmp_path):
    write_search(tmp_path, Settings(data="digits"), line(), line(), "one")
    assert Settings.of(read_search(tmp_path)["settings"]).scoring == "last"
    content = json.loads((tmp_path / "search.json").read_text())
    del content["identity"], content["settings"]["scoring"]
    (tmp_path / "search.json").write_text(json.dumps(content))
    assert read_search(tmp_path)["identity"] == ""
    resumed = prepare(tmp_path, {"trials": 30}, resume=True, overwrite=False)
    assert (resumed.scoring, resumed.trials) == ("best", 30)
    assert prepare(tmp_path, {}, resume=False, overwrite=True).scoring == "last"


def test_code_of_a_space(tmp_path, monkeypatch, capsys):
    file = tmp_path / "own_space.py"
    file.write_text("def space(hp, task):\n    return 1\n")
    code = code_of(f"{file}:space")
    assert len(code) == 16
    monkeypatch.syspath_prepend(tmp_path)
    assert code_of("own_space:space") == code
    file.write_text("# the same\ndef space(hp, task): return 1\n")
    assert code_of(f"{file}:space") == code
    assert not warn_of_code(f"{file}:space", code, "")
    file.write_text("def space(hp, task):\n    return 2\n")
    assert warn_of_code(f"{file}:space", code, "do something")
    assert "is not that of the search: do something." in capsys.readouterr().err
    assert not warn_of_code(f"{file}:space", "", "an earlier search noted none")
    assert code_of("images") == code_of("no.such.module:space") == code_of("no.py:space") == ""


def test_space_of_another_place_is_compared(monkeypatch):
    monkeypatch.setattr(spaces, "space_of", lambda reference: looped)
    settings, data = Settings(data="digits"), datasets.load("digits", validation=100)
    names = [e["config"]["name"] for e in spaces.explore(settings, TASKS["digits"])["space"]]
    _search_trial.check_names(settings, names, data)
    for others, name in (([*names, "width"], "width"), (names[1:], "layers")):
        with pytest.raises(SearchError, match=f"not the space of the search: '{name}' is in one"):
            _search_trial.check_names(settings, others, data)


def test_old_search_goes_on_with_what_it_saw(explored):
    whole = explored["digits"]
    part = {"space": whole["space"][:-1]}
    assert _search_run._difference(part, whole, is_new=False) == ""
    assert _search_run._difference(part, whole, is_new=True) == "augmentation"
    assert _search_run._difference(whole, part, is_new=False) == "augmentation"


def test_worker_does_not_work_for_the_chief_of_another_search(monkeypatch):
    """The first was stopped, and the next began at the same address, while the worker waited."""
    grpc = pytest.importorskip("grpc")

    class Away(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.UNAVAILABLE

    calls = []

    def call():
        calls.append(1)
        if len(calls) < 2:
            raise Away
        return "answered"

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    chief = object.__new__(Chief)
    chief.patience, chief.identity = 5, "one"
    chief._ask_once = lambda method, message: {"identity": "one"}
    assert chief._until_there(call) == "answered"
    calls.clear()
    chief._ask_once = lambda method, message: {"identity": "another"}
    with pytest.raises(ConnectionError, match="another search is there now"):
        chief._until_there(call)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("code", "details", "told"),
    [
        ("UNAVAILABLE", "no connection", "the chief does not answer: no connection"),
        ("UNKNOWN", "Exception calling application: 'x'", "the chief failed: 'x'"),
        (
            "UNKNOWN",
            "Exception calling application: [Errno 28] No space left on device",
            r"the chief failed: \[Errno 28\] No space left on device. Make room on its disk: the "
            "search goes on with --resume.",
        ),
    ],
)
def test_a_chief_that_fails_is_not_one_that_is_away(monkeypatch, code, details, told):
    grpc = pytest.importorskip("grpc")

    class Told(grpc.RpcError):
        def code(self):
            return grpc.StatusCode[code]

        def details(self):
            return details

    def call():
        raise Told

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    chief = object.__new__(Chief)
    chief.patience, chief.identity = 2, None
    with pytest.raises(ConnectionError, match=f"^{told}$"):
        chief._until_there(call)


class Endless:
    """A trial whose epochs take no time: process, its channel and the chief, in one."""

    def __init__(self):
        self.pid, self.channel, self.trial_id = 0, self, "0"
        self.hyperparameters, self.values, self.killed = self, {}, False
        self.seconds, self.beats = 0.0, []

    def receive(self, timeout):
        assert self.seconds < 60, "nobody looks after the trial"
        self.seconds += 0.1
        return {"report": {"val_accuracy": 0.5, "epoch": round(10 * self.seconds)}}

    def send(self, message):
        assert message == {"go": True}

    def report(self, trial_id, metrics, epoch):
        return True

    def owns(self, trial_id):
        self.beats.append(self.seconds)
        return len(self.beats) < 3

    def watched(self, monkeypatch, **options):
        monkeypatch.setattr(_search_worker.time, "monotonic", lambda: self.seconds)
        settings = Settings(data="digits", **options).to_dict()
        spec = {"settings": settings, "folder": "x", "space": line(), "identity": "one"}
        attempt = _search_worker.Attempt(self, None, spec, self)
        attempt._watch(self)
        return attempt.end


def test_a_trial_that_is_never_silent_is_looked_after(monkeypatch):
    """Its limits hold, and its worker gives signs of life."""
    trial = Endless()
    assert trial.watched(monkeypatch, trial_timeout=3)[1] == "timeout: not done after 3 s"
    assert trial.seconds == pytest.approx(3, abs=0.15)
    trial = Endless()
    assert trial.watched(monkeypatch)[1] == "given to another worker"
    assert np.diff([0, *trial.beats]) == pytest.approx(2, abs=0.15)
    monkeypatch.setattr(_search_worker, "_gibibytes", lambda pid: 2.5)
    assert "2.50 GiB resident" in Endless().watched(monkeypatch, trial_memory=2)[1]


class Unwritable(Endless):
    """A trial whose state cannot be written."""

    def receive(self, timeout):
        return {"stopped": "No space left on device"}

    def start(self, *arguments):
        return self

    def kill(self):
        self.killed = True

    def wait(self):
        return -9


def test_a_trial_that_cannot_be_kept_stops_its_worker(tmp_path):
    trial = Unwritable()
    spec = {"settings": {"data": "digits"}, "folder": str(tmp_path), "space": line()}
    spec["identity"] = "one"
    with pytest.raises(OSError, match="trial 0 cannot be kept, and goes on later: No space left"):
        _search_worker.Attempt(trial, trial, spec, trial).run()
    assert trial.killed


# Spaces -------------------------------------------------------------------------------------

TASKS = {
    "digits": Task("digits", (8, 8, 1), 10, 1000, 2),
    "cifar10": Task("cifar10", (32, 32, 3), 10, 1000, 2, ("mlp", "cnn", "fast")),
}


@pytest.fixture(scope="module")
def explored():
    return {
        name: spaces.explore(Settings(data=name, families=task.families), task)
        for name, task in TASKS.items()
    }


def named(space, name):
    return [e for e in space["space"] if e["config"]["name"] == name]


def sample(space, seed):
    hp = spaces.hyperparameters({"space": []}, {})
    for offset, entry in enumerate(spaces.hyperparameters(space, {}).space):
        hp.merge([entry])
        if hp.is_active(entry):
            hp.values[entry.name] = entry.random_sample(100 * seed + offset)
    return hp


@pytest.mark.parametrize("name", TASKS)
def test_space_of_images_builds(explored, name):
    """Whatever it proposes is a net of the task, compiled, with what was proposed."""
    seen = set()
    for seed in range(8):
        hp = sample(explored[name], seed)
        candidate = spaces.images(hp, TASKS[name])
        model = candidate.build()
        assert model.input_shape == (None, *TASKS[name].input_shape)
        assert model.output_shape == (None, 10)
        assert candidate.batch_size == hp.values["batch_size"]
        rule = {"sgd": "SGD", "rmsprop": "RMSprop", "adam": "Adam", "adamw": "AdamW"}
        assert type(model.optimizer).__name__ == rule[hp.values["optimizer"]]
        norms = [y for y in model.layers if y.name.endswith("_norm")]
        assert bool(norms) == (hp.values["normalization"] != "none")
        if hp.values["normalization"] == "ghost":
            assert norms[0].virtual_batch_size == hp.values["ghost_size"]
            assert norms[0].momentum == hp.values["momentum"]
        seen.add(hp.values["family"])
    assert len(seen) > 1


def test_space_of_the_documentation_builds(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "searches.md").read_text("utf-8")
    path = tmp_path / "my_space.py"
    path.write_text(text.partition("```python\n")[2].partition("```")[0])
    settings = Settings(data="digits", space=f"{path}:space")
    space = spaces.explore(settings, TASKS["digits"])
    names = [e["config"]["name"] for e in space["space"]]
    assert names == ["width", "momentum", "learning_rate", "batch_size"]
    model = spaces.space_of(settings.space)(sample(space, 0), TASKS["digits"]).build()
    assert model.output_shape == (None, 10)


def looped(hp, task):
    layers = hp.Int("layers", 1, 4)
    for i in range(layers):
        hp.Choice(f"units_{i}", [8, 16])
    if layers > 2:
        for j in range(hp.Int("heads", 1, 2)):
            for i in range(layers):
                hp.Boolean(f"skip_{j}_{i}")
    if hp.Choice("kind", ["plain", "deep"]) == "deep":
        depth = hp.Int("depth", 1, 100, parent_name="kind", parent_values=["deep"])
        if depth == 100:
            hp.Float("rate", 0.1, 1.0, parent_name="kind", parent_values=["deep"])
        if depth == 50:
            hp.Boolean("never")
        if depth == 100 and layers == 4:
            raise ValueError("too deep")
    return tuning.Candidate(lambda: None, 1)


def test_hyperparameters_in_loops_are_found(monkeypatch):
    monkeypatch.setattr(spaces, "space_of", lambda reference: looped)
    monkeypatch.setattr(_search_trial, "space_of", lambda reference: looped)
    settings = Settings(data="digits")
    space = spaces.explore(settings, TASKS["digits"])
    names = [e["config"]["name"] for e in space["space"]]
    expected = ["layers", "heads", "kind", "depth", "rate", *(f"units_{i}" for i in range(4))]
    expected += [f"skip_{j}_{i}" for j in range(2) for i in range(4)]
    assert sorted(names) == sorted(expected)
    rate = named(space, "rate")[0]["config"]["conditions"][0]["config"]
    assert (rate["name"], rate["values"]) == ("kind", ["deep"])

    def called(**changes):
        data = datasets.load("digits", validation=100)
        values = {**sample(space, 0).values, **changes}
        return _search_trial.make_candidate(settings, space, values, data)

    assert called(kind="deep", depth=100, layers=3).batch_size == 1
    with pytest.raises(SearchError, match="asks for 'never', which the search does not know"):
        called(kind="deep", depth=50, layers=1)


@pytest.mark.parametrize(
    ("kind", "arguments", "step"),
    [("Int", (8, 16), 0), ("Int", (8, 16), -2), ("Float", (0.0, 1.0), 0.0)],
)
def test_a_step_that_goes_nowhere_is_refused(monkeypatch, kind, arguments, step):
    def space(hp, task):
        getattr(hp, kind)("width", *arguments, step=step)

    monkeypatch.setattr(spaces, "space_of", lambda reference: space)
    with pytest.raises(SearchError, match=f"must be above 0.* Received: step={step} of 'width'"):
        spaces.explore(Settings(data="digits"), TASKS["digits"])


def test_space_of_images_is_what_it_was(explored):
    """All of it is declared at once, so a search that was made before can be resumed."""
    for name, task in TASKS.items():
        hp = spaces.hyperparameters({"space": []}, {})
        spaces.images(hp, task)
        assert hp.get_config()["space"] == explored[name]["space"]


UNFIT = """
import keras

from keras_norm._search_space import SmoothedCrossentropy
from keras_norm.tuning import Candidate


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(10)

    def call(self, x):
        return self.dense(keras.ops.reshape(x, (-1, 64)))


def made(model, metrics=(), build=True):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=list(metrics))
    return model


def sequential(units=10, size=8, last=()):
    layers = [keras.Input((size, size, 1)), keras.layers.Flatten(), keras.layers.Dense(units)]
    return keras.Sequential([*layers, *last])


class Broken(keras.layers.Layer):
    def call(self, x):
        if x.shape[0] == 2:  # not while its shape is found out
            raise RuntimeError("no good")
        return x


def smoothed(units):
    model = made(sequential(units), ["accuracy"])
    model.compile("sgd", SmoothedCrossentropy(0.1), metrics=["accuracy"])
    return model


def binary():
    model = sequential(1)
    model.compile("sgd", "mse", metrics=["accuracy"])
    return model


def pooled():
    inputs = keras.Input((28, 28, 1))
    layers = [inputs, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(12)]
    return keras.Sequential(layers)


def fine(hp, task):
    deep = hp.Boolean("deep")
    size = hp.Choice("size", [50, 60], parent_name="deep", parent_values=[False])
    assert hp.Int("more", 1, 3, parent_name="deep", parent_values=[True]) is None or deep
    return Candidate(lambda: made(sequential(), ["accuracy"]), size or 70)


plain = lambda hp, task: made(sequential(), ["accuracy"])
subclassed = lambda hp, task: Candidate(lambda: made(Subclassed(), ["accuracy"]), 50)
silent = lambda hp, task: Candidate(lambda: made(sequential()), 50)
uncompiled = lambda hp, task: Candidate(sequential, 50)
broken = lambda hp, task: Candidate(lambda: sequential("ten"), 50)
boundless = lambda hp, task: Candidate(sequential, 0)
called_back = lambda hp, task, callbacks: Candidate(sequential, 50, callbacks=callbacks)
without = lambda hp, task: called_back(hp, task, None)
single = lambda hp, task: called_back(hp, task, keras.callbacks.TerminateOnNaN())
mixed = lambda hp, task: called_back(hp, task, [keras.callbacks.TerminateOnNaN(), print])
large = lambda hp, task: Candidate(lambda: made(sequential(size=28), ["accuracy"]), 50)
few = lambda hp, task: Candidate(lambda: made(sequential(5), ["accuracy"]), 50)
few_smoothed = lambda hp, task: Candidate(lambda: smoothed(5), 50)
other_loss = lambda hp, task: Candidate(binary, 50)
any_size = lambda hp, task: Candidate(lambda: made(pooled(), ["accuracy"]), 50)
raising = lambda hp, task: Candidate(lambda: made(sequential(last=[Broken()]), ["accuracy"]), 50)
augmented = lambda hp, task: Candidate(sequential, 50, augment="flip")
begun = lambda hp, task: Candidate(sequential, 50, begin="x")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fine", None),
        (
            "plain",
            "must return a keras_norm.tuning.Candidate.* Received: Sequential from the space",
        ),
        ("subclassed", "must be functional or Sequential .*: Subclassed that is not built"),
        ("silent", r"metrics=\['accuracy'\].*: a model that reports loss"),
        ("uncompiled", "a model that is not compiled"),
        ("broken", "No model can be built from the space .*: ValueError"),
        ("boundless", "batch_size must be a whole number, at least 1. Received: 0"),
        ("without", "callbacks must be a list or tuple of .*Callback. Received: NoneType from"),
        ("single", "callbacks must be a list or tuple of .*Callback. Received: TerminateOnNaN "),
        ("mixed", r"callbacks must .*: \[TerminateOnNaN, builtin_function_or_method\] from"),
        (
            "large",
            r"Sequential, whose input has the shape \(28, 28, 1\) and not task.input_shape, "
            r"\(8, 8, 1\)\.",
        ),
        ("few", r"an output for each of the 10 classes, .*: Sequential with 5 outputs\."),
        ("few_smoothed", r"an output for each of the 10 classes, .*: Sequential with 5 outputs\."),
        ("other_loss", None),
        ("any_size", None),
        ("raising", r"Sequential, RuntimeError: no good\."),
        ("augmented", "augment must be a function .* Received: augment='flip' from the space"),
        ("begun", r"begin must be a function of \(model, .* Received: 'x' from the space"),
    ],
)
def test_a_space_that_cannot_be_trained_is_refused_at_once(tmp_path, monkeypatch, name, message):
    (tmp_path / "unfit.py").write_text(UNFIT)
    data = datasets.load("digits", validation=0.1)
    settings = Settings(data="digits", space=f"{tmp_path / 'unfit.py'}:{name}")
    monkeypatch.delitem(sys.modules, "keras_norm_space_unfit", raising=False)
    space = spaces.explore(settings, TASKS["digits"])

    def check():
        _search_trial.require_candidate(settings, space, data)

    if message is None:
        check()
        return
    with pytest.raises(SearchError, match=message):
        check()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no good\nsecond line", "no good"),
        (
            "Exception encountered when calling L.call().\n\n\x1b[1mno good\x1b[0m\n\nArguments:",
            "no good",
        ),
        (
            "Graph execution error:\n\nDetected at node a/b defined at (most recent call last):\n"
            '  File "x.py", line 1, in <module>\n\n  File "y.py", line 2, in f\n\n'
            "no good\n\t [[{{node a/b}}]]",
            "no good",
        ),
        (
            "Graph execution error:\n\nDetected at node a defined at (most recent call last):\n"
            "<stack traces unavailable>\nno good",
            "no good",
        ),
        (
            "Could not automatically infer the output shape. Error encountered:\n\nno good",
            "no good",
        ),
        ("Graph execution error:\n", "Graph execution error:"),
        ("", ""),
    ],
)
def test_errors_are_told_by_the_line_that_says_what_is_wrong(message, told):
    assert _search_trial.brief(ValueError(message)) == f"ValueError: {told}"


def test_space_has_no_mirrored_digits(explored):
    assert named(explored["digits"], "augmentation")[0]["config"]["values"] == ["none", "shift"]
    assert "flip" in named(explored["cifar10"], "augmentation")[0]["config"]["values"]


def test_pin(explored):
    space = spaces.pin(
        explored["cifar10"], {"family": "cnn", "learning_rate": "0.002", "optimizer": "adam"}
    )
    for seed in range(5):
        values = sample(space, seed).values
        assert (values["family"], values["learning_rate"]) == ("cnn", 0.002)
        assert not {"mlp_depth", "sgd_learning_rate", "fast_width"} & set(values)
    with pytest.raises(SearchError, match=r"no 'famly' to fix\. It has: activation, "):
        spaces.pin(explored["cifar10"], {"famly": "cnn"})
    with pytest.raises(SearchError, match="family cannot be 'rnn': it is one of mlp, cnn, fast"):
        spaces.pin(explored["cifar10"], {"family": "rnn"})
    with pytest.raises(SearchError, match=r"it is between 0\.0001 and 0\.03"):
        spaces.pin(explored["cifar10"], {"learning_rate": "3"})


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "good", "bad", "told"),
    [
        ("Int", (16, 64), {"step": 16}, {"16": 16, 48.0: 48}, ["20", 80, "16.5", "inf", "nan"],
         "a whole number between 16 and 64, in steps of 16"),
        ("Int", (1, 4), {}, {"3": 3}, ["inf", "-inf", "2.5"], "a whole number between 1 and 4"),
        ("Int", (1, 1000), {"step": 10, "sampling": "log"}, {"100": 100}, [200],
         "a whole number between 1 and 1000, in factors of 10"),
        ("Float", (0.0, 1.0), {"step": 0.25}, {"0.75": 0.75, 0: 0.0}, [0.3, "inf", "nan"],
         "between 0 and 1, in steps of 0.25"),
        ("Float", (0.0, 0.7), {"step": 0.1}, {"0.3": 0.3, 0.7: 0.7}, [0.35], "in steps of 0.1"),
        ("Float", (1e-4, 0.1), {"step": 10, "sampling": "log"}, {"1e-3": 1e-3}, [2e-3],
         "between 0.0001 and 0.1, in factors of 10"),
        ("Float", (1.0, 100.0), {"step": 10, "sampling": "reverse_log"}, {91: 91.0, 1: 1.0}, [10],
         "in factors of 10"),
        ("Fixed", (3,), {}, {"3": 3}, [4], "3"),
    ],
)  # fmt: skip
def test_pin_takes_only_what_the_space_has(kind, arguments, options, good, bad, told):
    hp = keras_tuner.HyperParameters()
    getattr(hp, kind)("n", *arguments, **options)
    space = dict(hp.get_config(), values={})
    for value, expected in good.items():
        (entry,) = spaces.pin(space, {"n": value})["space"]
        assert (entry["class_name"], entry["config"]["value"]) == ("Fixed", expected)
        assert type(entry["config"]["value"]) is type(expected)
    for value in bad:
        with pytest.raises(SearchError, match=f"n cannot be {value!r}: it is .*{told}\\."):
            spaces.pin(space, {"n": value})


def test_conditions_on_whole_numbers_stay():
    hp = keras_tuner.HyperParameters()
    hp.Int("layers", 1, 4)
    for i in range(1, 4):
        with hp.conditional_scope("layers", list(range(i + 1, 5))):
            hp.Choice(f"units_{i}", [8, 16])
    space = dict(hp.get_config(), values={})
    assert spaces.pin(space, {}) == space
    names = [e["config"]["name"] for e in spaces.pin(space, {"layers": 2})["space"]]
    assert names == ["layers", "units_1"]


def test_narrow(explored):
    def record(**values):
        return TrialRecord(0, "completed", "", 0.5, values, {})

    best = [
        record(family="cnn", optimizer="adam", learning_rate=1e-3, cnn_width=16, dropout=0.1),
        record(family="cnn", optimizer="adamw", learning_rate=4e-3, cnn_width=64, dropout=0.1),
    ]
    space = spaces.narrow(explored["cifar10"], best)
    assert named(space, "family")[0]["config"]["values"] == ["cnn"]
    assert not named(space, "mlp_depth")
    assert not named(space, "sgd_learning_rate")
    assert named(space, "cnn_width")[0]["config"]["values"] == [16, 32, 64]  # ordered: between
    assert named(space, "optimizer")[0]["config"]["values"] == ["adam", "adamw"]
    assert named(space, "dropout")[0]["config"]["values"] == [0.1]
    rate = named(space, "learning_rate")[0]["config"]
    tenth = 300**0.1  # of the whole range, on its logarithmic scale
    assert rate["min_value"] == pytest.approx(1e-3 / tenth)
    assert rate["max_value"] == pytest.approx(4e-3 * tenth)
    for seed in range(5):
        assert 1e-3 / tenth <= sample(space, seed).values["learning_rate"] <= 4e-3 * tenth


@pytest.mark.parametrize(
    ("kind", "low", "high", "options", "best", "expected"),
    [
        ("Float", 1e-4, 0.1, {"step": 10, "sampling": "log"}, [1e-3, 1e-2], [1e-3, 1e-2]),
        ("Int", 1, 1000, {"step": 10, "sampling": "log"}, [10, 1000], [10, 1000]),
        ("Int", 1, 1000, {"sampling": "log"}, [40, 50], [21, 99]),  # 1000^.1 is 1.995
        ("Int", 1000, 100_000, {}, [20_000, 80_000], [10_100, 89_900]),
        ("Int", 1000, 100_000, {}, [5000, 80_000], [1000, 89_900]),
        ("Int", 1, 100, {}, [40, 50], [31, 59]),  # a tenth is 9.9
        ("Int", 0, 100, {"step": 7}, [35, 42], [28, 49]),
        ("Float", 0.0, 0.5, {"step": 0.1}, [0.1, 0.3], [0.1, 0.3]),
        ("Int", 1, 10, {}, [45, 50], [10, 10]),  # the earlier range was wider
    ],
)
def test_narrow_range_holds_the_best_and_keeps_the_grid(kind, low, high, options, best, expected):
    hp = keras_tuner.HyperParameters()
    getattr(hp, kind)("n", low, high, **options)
    space = dict(hp.get_config(), values={})
    records = [TrialRecord(i, "completed", "", 0.5, {"n": n}, {}) for i, n in enumerate(best)]
    (narrowed,) = spaces.hyperparameters(spaces.narrow(space, records), {}).space
    assert [narrowed.min_value, narrowed.max_value] == pytest.approx(expected)
    if narrowed.step is not None:
        whole, grid = (np.array(list(one.values)) for one in (hp.space[0], narrowed))
        assert grid[[0, -1]] == pytest.approx(expected)
        first = np.abs(whole - grid[0]).argmin()
        assert np.allclose(grid, whole[first : first + len(grid)], rtol=1e-12, atol=0)


def test_what_cannot_narrow_says_so(explored):
    best = [TrialRecord(0, "completed", "", 0.5, {"x": 0.1}, {})]
    space = explored["digits"]
    assert spaces.narrow(space, best) == spaces.narrow(space, [])
    told = spaces.unchanged(space, best, "first")
    assert told.startswith("refine='first' has no hyperparameter in common with this space: it has")
    whole = [TrialRecord(i, "completed", "", 0.5, {"x": float(i)}, {}) for i in range(2)]
    assert spaces.narrow(line(), whole) == spaces.narrow(line(), [])
    assert "narrows nothing: its best 2" in spaces.unchanged(line(), whole, "first")


def test_smoothed_crossentropy():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(6, 4)).astype("float32"), np.array([0, 1, 2, 3, 0, 1])
    log_p = logits - np.log(np.exp(logits.astype("float64")).sum(1, keepdims=True))
    target = 0.9 * np.eye(4)[y] + 0.1 / 4
    expected = -(target * log_p).sum(1).mean()
    assert float(tuning.SmoothedCrossentropy(0.1)(y, logits)) == pytest.approx(expected, rel=1e-6)
    again = keras.losses.deserialize(keras.losses.serialize(tuning.SmoothedCrossentropy(0.1)))
    assert again.label_smoothing == 0.1
    with pytest.raises(ValueError, match="label_smoothing=1"):
        tuning.SmoothedCrossentropy(1)


def test_importance_finds_what_matters_and_says_when_nothing_does():
    rng = np.random.default_rng(0)
    trials, noise = [], []
    for number in range(60):
        values = {"rate": 10 ** rng.uniform(-4, 0), "kind": str(rng.choice(["a", "b", "c"]))}
        values |= {"idle": int(rng.integers(1, 9)), "constant": 3}
        score = -((math.log10(values["rate"]) + 2) ** 2) + (values["kind"] == "b")
        trials.append(TrialRecord(number, "completed", "", score, values, {}))
        noise.append(TrialRecord(number, "completed", "", rng.normal(), values, {}))
    found = importance(trials)
    assert list(found) == ["", "rate", "kind", "idle"]
    assert found[""][0] > 0.6
    assert found["rate"][0] > 3 * found["kind"][0] > 3 * abs(found["idle"][0])
    assert importance(noise)[""][0] < 0.1
    assert importance(trials[:11]) == {}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (4e-3, 6e-2, ["0.005", "0.01", "0.02", "0.05"]),
        (2e-3, 8e-3, ["0.002", "0.005"]),
        (2.2e-3, 2.6e-3, None),
        (1.1e-4, 0.9, None),
    ],
)
def test_labels_of_rates_lie_apart(low, high, expected):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(4.6, 4.4))
    axes.plot([low, high], [0, 1])
    axes.set_xscale("log")
    _spread_ticks(axes)
    figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
    low, high = axes.get_xlim()
    labels = [label for label in labels if low <= label.get_position()[0] <= high]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    pyplot.close(figure)
    assert len(boxes) >= 2
    assert all(a.x1 + 3 < b.x0 for a, b in itertools.pairwise(boxes))
    assert expected is None or [label.get_text() for label in labels] == expected


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves_of_all_trials_are_seen_and_those_of_the_best_told_apart(tmp_path, epochs):
    """A line through one point is none; the fourth colour of the cycle is another grey."""
    matplotlib = pytest.importorskip("matplotlib")
    trials = []
    for n in range(8):
        count = 1 if n % 2 else epochs
        history = {"val_accuracy": {e: 0.1 * n + 0.01 * e for e in range(1, count + 1)}}
        trials.append(TrialRecord(n, "completed", "", 0.1 * n, {"x": 0.1 * n}, history))
    with style():
        figure = _curves(tuning.Search(tmp_path, Settings(data="digits"), trials))
        figure.canvas.draw()
        (axes,) = figure.axes
        ticks = axes.get_xticks()
        colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    matplotlib.pyplot.close(figure)
    assert len(axes.lines) == 8
    for line in axes.lines:
        assert len(line.get_xdata()) > 1 or line.get_marker() not in ("", "None")
    drawn = [line.get_color() for line in axes.lines if line.get_color() != _GREY]
    assert len(set(drawn)) == 5
    assert all(np.ptp(matplotlib.colors.to_rgb(color)) > 0.1 for color in drawn)
    assert np.ptp(matplotlib.colors.to_rgb(colors[3])) < 0.1
    low, high = axes.get_xlim()
    assert [t for t in ticks if low <= t <= high] == list(range(1, epochs + 1))


def test_report_without_matplotlib_leaves_nothing(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SearchError, match=r"A report needs matplotlib, .*: pip install"):
        tuning.report(made)
    assert not (made.out / "report").exists()


def test_report_of_pruned_trials_alone(tmp_path):
    write_search(tmp_path, Settings(data="digits", prune=True), line(), line())
    history = {"val_accuracy": {1: 0.5}, "seconds": {1: 2.0}, "parameters": {1: 10.0}}
    pruned = [
        TrialRecord(n, "pruned", "pruned after epoch 1", 0.5 + n, {"x": 0.1 * n}, history)
        for n in range(2)
    ]
    found = tuning.Search(tmp_path, Settings(data="digits", prune=True), pruned)
    text = tuning.report(found, tmp_path / "report").read_text()
    assert "pareto.png" not in text
    assert "Not beaten" not in text
    assert 'src="curves.png"' in text


# Trained again ------------------------------------------------------------------------------


class Trainings:
    """Where the processes of trainings come from: each is this, and ends at once."""

    def __init__(self, found, enough=math.inf):
        self.found, self.enough, self.begun, self.noted = found, enough, 0, []

    def start(self, name, target, spec, log):
        if self.begun == self.enough:
            raise KeyboardInterrupt
        self.begun, self.folder, self.seed = self.begun + 1, Path(spec["folder"]), spec["seed"]
        self.messages = [{"epoch": 1}, {"epoch": 2}, {"testing": True}]
        self.channel = self
        return self

    def receive(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, message):
        """It may test."""
        assert message == {"go": True}
        self.noted.append(json.loads((self.found.out / "tested.json").read_text())["tested"])
        names = {"title": "Digits", "source": "", "class_names": [], "mean": [0.0], "std": [1.0]}
        data = {**names, "input_shape": [8, 8, 1], "train": 10, "test": 10}
        numbers = {"seed": self.seed, "test_accuracy": 0.5, "test_loss": 1.0}
        result = {**numbers, "parameters": 1, "flops": 1, "data": data}
        (self.folder / "result.json").write_text(json.dumps(result))
        (self.folder / "model.keras").write_text(f"net {self.seed}")

    def wait(self):
        return 0


@pytest.fixture
def made(tmp_path):
    """A search of three trials."""
    settings = Settings(data="digits", epochs=2)
    write_search(tmp_path / "search", settings, line(), line(), "one")
    history = {"val_accuracy": {1: 0.5, 2: 0.5}}
    trials = [
        TrialRecord(n, "completed", "", 0.5 + 0.1 * n, {"x": 0.1 * n}, history) for n in range(3)
    ]
    return tuning.Search(tmp_path / "search", settings, trials)


@pytest.fixture
def trainings(made, monkeypatch):
    def of(enough=math.inf):
        found = Trainings(made, enough)
        monkeypatch.setattr(_search_retrain._Runs, "_nursery", lambda self: found)
        return found

    return of


def test_use_of_the_test_set_is_noted_before_the_first_net_is_tested(made, trainings, tmp_path):
    """Also by a call that is interrupted; that one goes on, and another choice is refused."""
    first = trainings(enough=2)
    with pytest.raises(KeyboardInterrupt):
        tuning.retrain(made, seeds=4, progress=False)
    assert first.noted == [True, True]
    unfinished = f"by what is unfinished in '{made.out / 'retrained'}'"
    for options in ({"out": tmp_path / "other", "top": 3}, {"top": 3}, {"seeds": 1}):
        with pytest.raises(SearchError, match=f"The test set has been used .*: {unfinished}"):
            tuning.retrain(made, **options, progress=False)
    second = trainings()
    card = tuning.retrain(made, seeds=4, progress=False)
    assert second.begun == 2
    assert json.loads(card.with_suffix(".json").read_text())["training"]["seeds"] == 4


def test_a_search_that_was_moved_knows_its_trainings(made, trainings, tmp_path):
    """Also one whose note names the place as it was then."""
    trainings()
    tuning.retrain(made, progress=False)
    noted = made.out / "tested.json"
    note = json.loads(noted.read_text())
    assert note["out"] == "retrained"
    moved = tuning.Search(tmp_path / "moved", made.settings, made.trials)
    for out in ("retrained", str(made.out / "retrained")):
        noted.write_text(json.dumps({**note, "out": out}))
        made.out.rename(moved.out)
        seen = f"see '{moved.out / 'retrained/model_card.md'}'"
        with pytest.raises(SearchError, match=f"The test set has been used .*: {seen}"):
            tuning.retrain(moved, top=2, progress=False)
        moved.out.rename(made.out)
    shutil.rmtree(made.out / "retrained")
    gone = f"by what was in '{made.out / 'retrained'}', which is gone"
    with pytest.raises(SearchError, match=gone):
        tuning.retrain(made, top=2, progress=False)
    trainings()
    tuning.retrain(made, out=tmp_path / "other", overwrite=True, progress=False)
    assert json.loads(noted.read_text())["out"] == str(tmp_path / "other")


def test_what_cannot_be_noted_is_not_trained(made, trainings, monkeypatch):
    """Also where the test set has been used already."""
    trainings()
    tuning.retrain(made, progress=False)
    write = _search_retrain._write_json

    def refused(path, value):
        if path.name == "tested.json":
            raise OSError(30, "Read-only file system")
        write(path, value)

    monkeypatch.setattr(_search_retrain, "_write_json", refused)
    more = trainings()
    for options in ({"seeds": 2}, {"overwrite": True}):
        with pytest.raises(SearchError, match=r"cannot be noted in .*: Read-only file system"):
            tuning.retrain(made, progress=False, **options)
    assert more.begun == 0


def test_a_training_on_a_full_disk_says_so(tmp_path, monkeypatch):
    """The log lies on the same disk, and cannot be written either."""
    sent = []
    remains = [left_over(tmp_path / name) for name in ("checkpoint.npz", "model.keras")]

    class Told:
        send = sent.append

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_search_retrain, "_trained", full)
    monkeypatch.setattr("traceback.print_exc", full)
    _search_retrain.run(Told, {"folder": str(tmp_path)})
    told = f"it cannot be kept, and goes on later: No space left on device: '{tmp_path}'. Make room"
    assert [m["failed"].partition(":")[0] for m in sent] == [told.partition(":")[0]]
    assert sent[0]["failed"].startswith(told)
    assert not any(path.exists() for path in remains)


def test_trainings_before_the_test_leave_the_choice_open(made, trainings, tmp_path):
    trainings(enough=0)
    with pytest.raises(KeyboardInterrupt):
        tuning.retrain(made, progress=False)
    assert not json.loads((made.out / "tested.json").read_text())["tested"]
    trainings()
    tuning.retrain(made, out=tmp_path / "other", top=2, progress=False)


def test_card_of_a_small_net_counts_its_operations(made, trainings):
    trainings()
    card = tuning.retrain(made, progress=False)
    assert "\n1 parameters; 1 operations for one\n" in card.read_text()
    told = [_search_retrain._count(number) for number in (18_944, 999_999, 1e6, 2.345e9)]
    assert told == ["18,944", "999,999", "1.0 million", "2,345.0 million"]


def test_bar_of_trainings_counts_each_epoch_once(made, trainings, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total, **options):
            shown.append(total)

        def refresh(self):
            shown.append(self.n)

        def set_postfix_str(self, text):
            pass

        def close(self):
            pass

    monkeypatch.setattr("tqdm.tqdm", Bar)
    trainings()
    tuning.retrain(made, seeds=2)
    assert shown == [4, 1, 2, 2, 3, 4, 4]
    shown.clear()
    tuning.retrain(made, seeds=3)  # two are there
    assert shown == [6, 2, 4, 5, 6, 6]


def test_trainings_do_not_write_over_what_is_not_theirs(made, trainings, tmp_path):
    trainings()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.keras").write_text("mine")
    (made.out / "trial_0").mkdir()
    (made.out / "trial_0" / "trial.json").touch()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(SearchError, match=r"a folder of its own, and .* holds a search"):
            tuning.retrain(made, out=made.out, progress=False, **options)
        for out, name in ((mine, "model.keras"), (made.out / "trial_0", "trial.json")):
            with pytest.raises(SearchError, match=f"holds other files .*, such as '{name}'"):
                tuning.retrain(made, out=out, progress=False, **options)
    assert [p.name for p in mine.iterdir()] == ["model.keras"]
    assert (mine / "model.keras").read_text() == "mine"
    assert (made.out / "trial_0" / "trial.json").exists()
    assert not (made.out / "tested.json").exists()


def test_what_is_trained_anew_replaces_the_trials_of_the_old_plan(made, trainings, tmp_path):
    trainings()
    out = tmp_path / "out"
    tuning.retrain(made, top=2, out=out, progress=False)
    (out / "trial_7").mkdir()
    trainings(enough=0)
    with pytest.raises(KeyboardInterrupt):
        tuning.retrain(made, top=1, out=out, overwrite=True, progress=False)
    assert {p.name for p in out.glob("trial_*")} == {"trial_1", "trial_2", "trial_7"}
    trainings()
    tuning.retrain(made, top=1, out=out, overwrite=True, progress=False)
    assert {p.name for p in out.glob("trial_*")} == {"trial_2", "trial_7"}
    assert not (out / "next").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be a whole number, at least 1. Received: seeds=0"),
        ({"seeds": "2"}, "seeds must be a whole number, at least 1. Received: seeds='2'"),
        ({"top": 0}, "top must be a whole number, at least 1. Received: top=0"),
        ({"top": -1}, "top must be a whole number, at least 1. Received: top=-1"),
        ({"top": "2"}, "top must be a whole number, at least 1. Received: top='2'"),
        ({"epochs": 0}, "epochs must be a whole number, at least 1. Received: epochs=0"),
        ({"epochs": 2.0}, "epochs must be a whole number, at least 1. Received: epochs=2.0"),
        ({"subset": 0}, "subset must be a number above 0. Received: subset=0"),
    ],
)
def test_options_of_trainings_are_checked(made, options, message):
    before = sorted(made.out.rglob("*"))
    with pytest.raises(SearchError, match=message):
        tuning.retrain(made, **options)
    assert sorted(made.out.rglob("*")) == before


# Settings and folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "imagenet"}, "data must be one of cifar10"),
        ({"trials": 0}, "trials must be a whole number, at least 1. Received: trials=0"),
        ({"validation": 1.0}, "between 0 and 1. Received: validation=1.0"),
        ({"tuner": "hyperband", "prune": True}, "leave out prune"),
        ({"trial_timeout": -1}, "trial_timeout must be a number above 0"),
        ({"trails": 3}, "no option 'trails'"),
        ({"families": []}, "families must be a list of at least one"),
        ({"families": "cnn"}, "families must be a list .* Received: 'cnn'"),
        ({"space": print}, "space must be a name, .* Received: space=<built-in"),
        ({"subset": "x"}, "subset must be a number above 0. Received: subset='x'"),
        ({"subset": 10.5}, "subset must be a whole number"),
        ({"validation": "0.1"}, "between 0 and 1. Received: validation='0.1'"),
        ({"objective": ["val_loss"]}, r"objective must be one of .* Received: \['val_loss'\]"),
        ({"fixed": ["family=cnn"]}, "fixed must be a mapping"),
        ({"prune": "yes"}, "prune must be True or False. Received: prune='yes'"),
        ({"data_dir": 3}, "data_dir must be a folder. Received: data_dir=3"),
        ({"families": ["fast"], "data": "digits"}, "'fast' needs images larger"),
        ({"fixed": {"x": [1]}}, r"values that are numbers, .* Received: x=\[1\]"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(SearchError, match=message):
        Settings.of(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_after": 3}, "prune_after has no effect without prune: .* prune_after=3"),
        ({"prune_least": 2}, "prune_least has no effect without prune: .* prune_least=2"),
        ({"factor": 4}, "factor has no effect without the tuner hyperband: .* factor=4"),
        ({"refine_top": 2}, "refine_top has no effect without refine: .* refine_top=2"),
        ({"prune": True, "prune_after": 20, "epochs": 5}, "prune_after=20 with epochs=5"),
        ({"prune": True, "epochs": 1}, "prune_after must be below epochs, or leave out prune"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, message):
    """Of a search that begins; one that was begun with them goes on."""
    with pytest.raises(SearchError, match=message):
        prepare(tmp_path / "new", options, resume=False, overwrite=False)
    write_search(tmp_path, Settings.of(options), line(), line())
    with pytest.raises(SearchError, match=message):
        prepare(tmp_path, options, resume=False, overwrite=True)
    assert prepare(tmp_path, {"trials": 30}, resume=True, overwrite=False).trials == 30


@pytest.mark.parametrize(
    "options",
    [
        {"prune": True, "prune_after": 1, "prune_least": 2, "epochs": 2},
        {"tuner": "hyperband", "factor": 4},
        {"prune": False, "epochs": 1},
    ],
)
def test_options_with_effect_are_not_refused(tmp_path, options):
    prepare(tmp_path / "new", options, resume=False, overwrite=False)


def test_packages_that_are_missing_are_told_at_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr(_search_run, "_Owner", None)  # nothing is started
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    with pytest.raises(SearchError, match=r"A search needs keras-tuner, .*: pip install"):
        tuning.search(tmp_path / "new", data="digits")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    needed = "keras-tuner and tensorboard, not installed here: pip install keras-tuner tensorboard"
    with pytest.raises(SearchError, match=f"A search needs {needed}"):
        tuning.search(tmp_path / "new", data="digits")
    with pytest.raises(SearchError, match=f"To train the best again needs {needed}"):
        tuning.retrain(made)
    assert not (tmp_path / "new").exists()
    assert not (made.out / "retrained").exists()


def test_overwriting_leaves_what_is_not_of_the_search(tmp_path):
    write_search(tmp_path, Settings(data="digits"), line(), line())
    for name in ("trial_07", "report", "retrained", "tensorboard", "trial_mine", "trial_1_kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    for name in ("trial_notes.md", "trial_8", "oracle.json", "tested.json"):
        (tmp_path / name).touch()
    clear(tmp_path)
    left = {"trial_mine", "trial_1_kept", "trial_notes.md", "trial_8"}
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_number_of_the_best_is_checked(made, count):
    with pytest.raises(SearchError, match=f"count must be .* Received: count={count!r}"):
        made.best(count)


def test_scalars_of_numpy_are_numbers():
    fixed = {"rate": np.float32(0.5), "width": np.int64(128), "deep": np.bool_(True)}
    settings = Settings.of({"fixed": fixed, "epochs": np.int64(3)})
    found = json.loads(json.dumps(settings.to_dict()))
    assert (found["fixed"], found["epochs"]) == ({"rate": 0.5, "width": 128, "deep": True}, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit": "5"}, "time_limit must be minutes above 0. Received: '5'"),
        ({"worker_timeout": "60"}, "worker_timeout must be seconds, .* Received: '60'"),
        ({"chief": 8100}, "An address is HOST:PORT, .* Received: 8100"),
        ({"join": 8100}, "An address is HOST:PORT, .* Received: 8100"),
    ],
)
def test_options_of_running_are_checked(tmp_path, options, message):
    with pytest.raises(SearchError, match=message):
        tuning.search(tmp_path / "search", **options)
    assert not (tmp_path / "search").exists()


def test_home_is_found_everywhere(made, trainings, monkeypatch):
    monkeypatch.setenv("HOME", str(made.out.parent))
    assert tuning.load("~/search").out == made.out
    trainings()
    card = tuning.retrain(made, out="~/trained", progress=False)
    assert card == made.out.parent / "trained" / "model_card.md"
    asked = []
    write = "keras_norm._search_report.write_report"
    monkeypatch.setattr(write, lambda found, out: asked.append((found.out, out)))
    tuning.report("~/search", "~/page")
    assert asked == [(made.out, made.out.parent / "page")]


def test_files_that_are_not_those_of_a_search(tmp_path):
    (tmp_path / "search.json").write_text("[]")
    with pytest.raises(SearchError, match=r"search\.json' is of no search: it must have"):
        tuning.load(tmp_path)
    write_search(tmp_path, Settings(data="digits"), line(), line())
    (tmp_path / "trial_0").mkdir()
    for text, message in (("", "JSONDecodeError: Expecting value"), ("{}", "KeyError: 'message'")):
        (tmp_path / "trial_0" / "trial.json").write_text(text)
        with pytest.raises(SearchError, match=f"trial.json' cannot be read: {message}"):
            tuning.report(tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("rates = {}['momentum']", "its code raises KeyError: 'momentum'"),
        ("int('x')", "its code raises ValueError: invalid literal"),
        ("raise SystemExit(0)", "its code raises SystemExit: 0"),
        ("import no_such_module", r"No module named 'no_such_module', which it imports\. Install"),
        ("open('no_such_file')", "its code raises FileNotFoundError: "),
        ("def space(hp task): pass", "its code raises SyntaxError: "),
        ("def other(hp, task): pass", "there is no 'space' in it"),
    ],
)
def test_code_of_a_space_that_raises(tmp_path, monkeypatch, code, message):
    monkeypatch.delitem(sys.modules, "keras_norm_space_raising", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "raising.py"
    path.write_text(code)
    with pytest.raises(SearchError, match=f"space='{path}:space' cannot be had: {message}"):
        spaces.space_of(f"{path}:space")


@pytest.mark.parametrize(
    ("code", "received"),
    [
        ("space = [8, 16]", "of type list"),
        ("def space(hp): pass", r"a function of \(hp\)"),
        ("def space(hp, task, width): pass", r"a function of \(hp, task, width\)"),
        ("def space(hp, *, task): pass", r"a function of \(hp, \*, task\)"),
        ("def space(hp, task, width=8): pass", None),
        ("def space(*arguments): pass", None),
        ("space = slice", None),
    ],
)
def test_a_space_takes_hyperparameters_and_task(tmp_path, monkeypatch, code, received):
    monkeypatch.delitem(sys.modules, "keras_norm_space_taking", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "taking.py"
    path.write_text(code)
    if received is None:
        assert callable(spaces.space_of(f"{path}:space"))
        return
    rule = r"a function of \(hp, task\) that returns a Candidate"
    with pytest.raises(SearchError, match=f"{rule}.*space='{path}:space', which is {received}"):
        spaces.space_of(f"{path}:space")


def test_a_space_that_is_not_there_may_have_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for place in (tmp_path / "gone.py", "gone_module", "keras_norm.gone_module"):
        with pytest.raises(SearchError, match=r"cannot be had: .*If it has moved, name it"):
            spaces.space_of(f"{place}:space")


def test_a_space_imports_its_neighbours(tmp_path, monkeypatch):
    """As `python FILE` would, wherever the search was started; also where it is called."""
    for name in ("keras_norm_space_neighbourly", "first_neighbour", "other_neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "first_neighbour.py").write_text("SIZE = 8")
    (tmp_path / "other_neighbour.py").write_text("SIZE = 9")
    (tmp_path / "neighbourly.py").write_text(
        "from first_neighbour import SIZE\n"
        "def space(hp, task):\n"
        "    import other_neighbour\n"
        "    return SIZE, other_neighbour.SIZE\n"
    )
    assert spaces.space_of(f"{tmp_path / 'neighbourly.py'}:space")(None, None) == (8, 9)


def test_logs_of_a_worker_that_is_stopped_stay(tmp_path):
    """They lie in a folder of the search that it joined, and nowhere else."""

    def stopped(folder):
        with _search_run._folder(tmp_path / folder.partition("/")[0]):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            raise SystemExit(143)

    for folder in ("begun/search_one/trial_0", "not_begun"):
        with pytest.raises(SystemExit):
            stopped(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["begun"]


def test_who_comes_second_leaves_the_folder_to_the_first(tmp_path, monkeypatch):
    out = tmp_path / "new"
    with contextlib.ExitStack() as first:

        def late(folder):
            first.enter_context(locked(folder))  # after the second has seen that it is new
            return locked(folder)

        monkeypatch.setattr(_search_run, "locked", late)
        running = f"Another search is running in '{out}'"
        with pytest.raises(SearchError, match=running), _search_run._folder(out):
            pass
        assert [p.name for p in out.iterdir()] == [".lock"]


def test_the_lock_of_a_folder_that_was_removed_is_none(tmp_path, monkeypatch):
    out = tmp_path / "new"
    monkeypatch.setattr("fcntl.flock", lambda file, how: shutil.rmtree(out))
    with pytest.raises(SearchError, match="Another search is running"), locked(out):
        pass


def test_rows_are_printed_in_any_encoding(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", newline="")
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setenv("COLUMNS", "60")
    display = _search_run._Display(Settings(data="digits"), show=True)
    event = {"number": 0, "status": "failed", "score": None, "epoch": 0, "best_epoch": None}
    event |= {"seconds": None, "parameters": None, "values": {}}
    display._row({**event, "reason": "ValueError: a rate \u2265 1"})
    monkeypatch.setenv("COLUMNS", "120")
    display._row({**event, "reason": "ValueError: a rate \u2265 1"})
    written.flush()
    _, short, whole = written.buffer.getvalue().decode("latin-1").splitlines()
    assert short.endswith("...")
    assert len(short) < 60
    assert whole.endswith("a rate ? 1")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "I/O error")])
@pytest.mark.parametrize("bar", [False, True])
def test_a_search_that_nobody_reads_goes_on(monkeypatch, error, bar):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    class Bar:
        disable = False

        def write(self, text):
            raise error

        set_postfix_str = close = lambda *arguments: Gone().write("")

    display = _search_run._Display(Settings(data="digits"), show=True)
    display.bar = Bar() if bar else None
    monkeypatch.setattr(sys, "stdout", Gone())
    event = {"number": 0, "status": "failed", "reason": "", "score": None, "values": {}}
    event |= {"epoch": 0, "best_epoch": None, "seconds": None, "parameters": None}
    for _ in range(2):
        display.trial(event)
    assert not display.show
    display.end({"exhausted": "all tried"})
    assert display.bar is None


def test_number_of_trials_of_hyperband_follows(tmp_path):
    write_search(tmp_path, Settings(data="digits", tuner="hyperband"), line(), line())
    with pytest.raises(SearchError, match=r"30: leave out trials\. Received: trials=60"):
        prepare(tmp_path, {"trials": 60}, resume=True, overwrite=False)
    assert prepare(tmp_path, {}, resume=True, overwrite=False).planned == 30


def test_what_may_change_when_a_search_is_resumed(tmp_path):
    write_search(tmp_path, Settings(data="digits", trials=5), line(), line())
    limited = Settings(data="digits", trials=5, trial_timeout=3)
    write_search(tmp_path, limited, line(), line())
    freed = prepare(tmp_path, {"trial_timeout": None}, resume=True, overwrite=False)
    assert freed.trial_timeout is None
    settings = prepare(tmp_path, {"trials": 9}, resume=True, overwrite=False)
    assert (settings.data, settings.trials) == ("digits", 9)
    with pytest.raises(SearchError, match="another epochs: it began with 10, and now received 3"):
        prepare(tmp_path, {"epochs": 3}, resume=True, overwrite=False)
    assert prepare(tmp_path, {"epochs": 3}, resume=False, overwrite=True).epochs == 3
    assert json.loads((tmp_path / "search.json").read_text())["settings"]["epochs"] == 10
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").touch()
    with pytest.raises(SearchError, match="holds other files and no search"):
        prepare(tmp_path / "other", {}, resume=False, overwrite=True)
    (tmp_path / "killed").mkdir()
    for name in (".lock", "processes.txt", ".search.12ab34cd.json"):  # before it had begun
        (tmp_path / "killed" / name).touch()
    assert prepare(tmp_path / "killed", {}, resume=False, overwrite=False) == Settings()

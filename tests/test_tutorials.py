"""The tutorials as their readers run them: as scripts, with `--fast`; the first in a new Python."""

import json
import math
import os
import pathlib
import subprocess
import sys

import forked
import pytest

from keras_norm.experiments import Results

jupytext = pytest.importorskip("jupytext", reason="a development tool, not in the core's group")

ROOT = pathlib.Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]*_*.py"))

ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1"}  # another test runs beside it


def run(name, out, *flags, **environment):
    script = ROOT / "tutorials" / name
    return forked.run(script, "--out", out, *flags, cwd=out, **ONE_THREAD, **environment)


def run_as_its_readers_do(name, out, *flags, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "tutorials" / name, "--out", out, *flags],
        env={**os.environ, **ONE_THREAD, **environment},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def no_data(tmp_path):
    """An environment in which neither a data folder nor a network is there."""
    nowhere = "http://127.0.0.1:9"
    return {
        "TFDS_DATA_DIR": "",
        "HOME": str(tmp_path),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
    }


def on_digits(name, out, environment, *flags, stands_for, plots, answers):
    """A fast run where there is no data: it must end well, and say loudly what it ran on."""
    process = run(name, out, "--fast", *flags, **environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "warning" not in process.stderr.lower()
    assert f"NOT of {stands_for}" in process.stdout
    return read(out, plots, answers)


def read(out, plots, answers):
    """What a tutorial saved: its answers (so many), and its runs; the plots must be there."""
    for plot in plots:
        assert (out / f"{plot}.png").stat().st_size > 10_000
    saved = json.loads((out / "answers.json").read_text())
    assert len(saved["answers"]) == answers
    return saved, Results.load(out)


def has(name):
    folder = os.environ.get("TFDS_DATA_DIR")
    return bool(folder) and (pathlib.Path(folder) / name).is_dir()


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_opens_as_a_notebook(path):
    notebook = jupytext.read(path)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= 5
    assert kinds.count("code") >= 5
    assert notebook.cells[0].source.lstrip().startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, str(path), "exec")


def check_tutorial_1(process, out):
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Warning" not in process.stderr
    assert (out / "results.csv").exists()
    exercises = ("bias", "learning_rates", "subsets", "dropout", "gamma_beta", "transforms")
    answers, results = read(out, ["learning_curves", *exercises, "statistics"], answers=7)
    beyond = answers["beyond"]  # of 1, 3 and 100
    assert beyond["mask: the first two alone"] == [2, 1]
    assert beyond["a batch with an infinity: left out"] == [
        pytest.approx(34.667),
        pytest.approx(2134.889),
    ]
    return results


@pytest.mark.slow
def test_tutorial_1(tmp_path, no_data):
    """On Fashion-MNIST where TFDS_DATA_DIR holds it; elsewhere loudly on the digits."""
    real = has("fashion_mnist")
    environment = {} if real else no_data
    process = run_as_its_readers_do("01_batchnorm.py", tmp_path, "--fast", **environment)
    results = check_tutorial_1(process, tmp_path)
    assert ("digits" in process.stderr) == (not real)
    assert ("NOT of Fashion-MNIST" in process.stdout) == (not real)
    with_norm = results.values("batch norm, rate 1", "reestimated_accuracy")
    assert len(with_norm) == 1
    assert with_norm.mean() > (FLOOR_FASHION_MNIST if real else FLOOR_DIGITS)
    assert results.values("norm alone", "val_accuracy").mean() > FLOOR_EXERCISES
    assert 0.4 < results.values("norm alone", "zeros_conv1").mean() < 0.6
    if real:
        assert results.values("none, rate 1", "test_accuracy").mean() < with_norm.mean()


@pytest.mark.slow
def test_tutorial_1b_without_data_or_network_runs_loudly_on_digits(tmp_path, no_data):
    plots = ["mnist", "batch_sizes", "rates", "deep", "inside", "activations", "gradients"]
    _, results = on_digits(
        "01b_batchnorm_why.py",
        tmp_path,
        no_data,
        *("--seeds", "1"),  # of the two that it takes; 3 and 5 are run with theirs
        stands_for="MNIST or CIFAR-10",
        plots=[*plots, *(f"scales_{m}" for m in ("best_val", "best_train", "final_loss"))],
        answers=6,
    )
    assert results.values("batch norm, batch 64", "test_accuracy").mean() > FLOOR_DIGITS
    with_norm, without = (
        results.values(f"{n}, 64 images a batch, rate 0.3", "val_accuracy").mean()
        for n in ("batch", "none")
    )
    assert with_norm > without + 0.3
    with_norm, without = (
        results.values(f"scale 0.0006952, {n}", "best_train").mean() for n in ("batch", "none")
    )
    assert with_norm > without + 0.05
    drift, jumps = (
        results.values(f"inside, {n}", "mean_drift").mean()
        for n in ("batch norm", "batch norm, jittered")
    )
    assert drift < 0.1 < jumps  # of the activations: beta alone, against random shifts


@pytest.mark.slow
def test_tutorial_3_without_data_or_network_runs_loudly_on_digits(tmp_path, no_data):
    answers, results = on_digits(
        "03_dropout.py",
        tmp_path,
        no_data,
        stands_for="CIFAR-10",
        plots=("learning_curves", "keep", "widths", "sizes", "orders", "variance"),
        answers=4,
    )
    assert answers["largest_difference_from_the_layer"] < 1e-13
    assert answers["gradient_error_of_dropout"] < 5.4e-11
    for keep in ("keep 1", "keep 0.25"):
        assert results.values(keep, "val_accuracy").mean() > FLOOR_DIGITS
    assert results.values("keep 1", "train_accuracy").mean() > FLOOR_DIGITS
    assert results.values("batch norm", "ratio_1").mean() > 0.8
    shifted = results.values("dropout, norm", "ratio_1")  # keep 0.5: half the variance, by (V1)
    assert abs(shifted - results.values("dropout, norm", "predicted_1")).max() < 0.05
    # Of widths 20 and 200, keep 1 and .25: 50 / 200 = .25, and from 100 on 1 is nearer.
    assert answers["slopes_of_the_rule"] == [[50, 100, pytest.approx(math.log(0.25, 10))]]
    assert "with c from 50 to 100 units" in answers["answers"][2]
    assert "slope -1" not in answers["answers"][2]  # which no keeps of this grid can have
    answers, _ = on_digits(
        "03_dropout.py",
        tmp_path,
        no_data,
        *("--seeds", "1"),  # that of the runs just made
        stands_for="CIFAR-10",
        plots=("sizes",),
        answers=4,
    )
    first, _, third, _ = answers["answers"]  # one seed: nothing is tested
    assert "over the number of images: not tested in this mode" in first
    assert "of one seed, not tested in this mode" in third
    assert third.count("no worse at the 5% level: not tested in this mode") == 2
    assert "bootstrap" not in third


@pytest.mark.slow
def test_tutorial_2_on_the_data_that_is_there(tmp_path, no_data):
    real = has("cifar10")
    process = run("02_optimizers.py", tmp_path, "--fast", **({} if real else no_data))
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Warning" not in process.stderr
    assert ("NOT of CIFAR-10" in process.stdout) != real
    plots = ("trajectories", "published_rates", "rates_none", "rates_batch", "step_sizes")
    answers, results = read(tmp_path, plots, answers=5)
    assert (tmp_path / "trajectories.gif").stat().st_size > 10_000
    floor, cycles_floor = FLOORS_TUTORIAL_2["CIFAR-10" if real else "digits"]
    for rule in ("momentum, rate 0.005", "Adam, rate 0.001"):
        assert results.values(rule, "test_accuracy").mean() > floor
    (cycles,) = (n for n in results.names if n.startswith("cycles, Adam") and "4 epochs" in n)
    assert results.values(cycles, "test_accuracy").mean() > cycles_floor
    without, with_norm = answers["largest_stable_rate"]["momentum"]
    assert without < with_norm
    assert "(of momentum and Adam) it is" in answers["answers"][0]  # of those that are swept
    assert "grids differ" not in answers["answers"][4]
    for rule in ("SGD", "momentum", "Nesterov"):  # turned with the ravine, to rounding
        before, after = answers["ravine"][rule]
        assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_tutorial_4_without_data_or_network_runs_loudly_on_digits(tmp_path, no_data):
    plots = ["curves_5", "curves_50", "batch_sizes", "by_width", "by_depth", "by_penalty"]
    answers, results = on_digits(
        "04_layer_and_spatial_norm.py",
        tmp_path,
        no_data,
        stands_for="CIFAR-10",
        plots=[*plots, "preprocessing", "images", "best"],
        answers=5,
    )
    check = answers["check"]
    assert max(check["layer_norm_before"], check["spatial_before"]) < 6e-9  # the digits printed
    assert max(v for name, v in check.items() if "mean" in name) < 1e-14
    assert max(v for name, v in check.items() if "std" in name) < 1e-4  # epsilon
    assert max(answers["differences_from_numpy"].values()) < 1e-12
    assert answers["gradient_error"] < 1e-9
    first, second, _, fourth, _ = answers["answers"]  # one seed: nothing is tested
    assert all("ot tested in this mode" in text for text in (first, second, fourth))
    assert "significant" not in second
    change = answers["change_by_preprocessing"]
    assert change["mean image subtracted"]["batch norm, each pixel"] < 1e-6
    assert change["each image scaled to sum 1"]["layer norm"] < 1e-6
    assert change["each image scaled to sum 1"]["batch norm, each pixel"] > 0.1
    for name in ("layer norm, batch 5", "batch norm, batch 50", "best perceptron"):
        assert results.values(name, "val_accuracy").mean() > FLOOR_DIGITS
    blind, sees = (
        results.values(f"{name} norm, batch 1", "val_accuracy").mean()
        for name in ("batch", "layer")
    )
    assert blind < 0.3
    assert sees > blind + 0.2


@pytest.mark.slow
def test_tutorial_6_without_data_or_network_runs_loudly_on_digits(tmp_path, no_data):
    answers, results = on_digits(
        "06_three_ways.py",
        tmp_path,
        no_data,
        stands_for="CIFAR-10",
        plots=("accuracy", "seconds", "failures"),
        answers=4,
    )
    assert len(answers["same_weights"]) == 6
    assert max(max(values) for values in answers["same_weights"].values()) < 1e-5
    assert len(answers["after_steps"]) == 12
    assert max(answers["after_steps"].values()) < 1e-3
    flag = answers["flag"]
    assert flag["no flag"] == 0 < flag["training=True"]
    assert flag["fit"] == 0 < flag["fit, flag named"]  # by the model's own `call`
    assert flag["fit, flag not named by a layer"] == flag["fit, flag named"]
    lines = answers["lines"]["ConvNet, tensors"], answers["lines"]["ConvNet, Sequential"]
    assert lines[0]["training"] > lines[1]["training"] > 0
    for net in ("two layers", "ConvNet"):
        for way in ("tensors", "subclassed", "Sequential"):
            assert results.values(f"{net}, {way}", "test_all_accuracy").mean() > FLOOR_ONE_EPOCH
        right, forgotten = (
            results.values(f"{net} with batch norm", metric).mean()
            for metric in ("right", "update_forgotten")
        )
        assert right > FLOOR_ONE_EPOCH
        assert forgotten < right


@pytest.mark.slow
def test_tutorial_5_without_data_or_network_runs_loudly_on_digits(tmp_path, no_data):
    plots = ["nets", "corrupted", "samples"]
    answers, results = on_digits(
        "05_statistics.py",
        tmp_path,
        no_data,
        stands_for="CIFAR-10",
        plots=[*plots, *(f"corruptions_{part}" for part in ("source", "adapted", "gain"))],
        answers=4,
    )
    assert answers["largest_difference_from_numpy"] < 1e-5
    assert answers["mean_of_batch_variances"]["sorted"] < 0.5
    assert answers["mean_of_batch_variances"]["shuffled"] == pytest.approx(0.9, abs=0.02)
    assert "skewed" in answers["warning"]
    assert " of 2 gain and " in answers["answers"][2]  # of two corruptions; clean images are none
    for metric in ("test_accuracy", "reestimated_accuracy", "adapted_accuracy"):
        assert results.values("3 layers, batch norm", metric).mean() > FLOOR_DIGITS
    assert min(answers["clean"]) > FLOOR_DIGITS
    source, adapted = (
        results.values("contrast", f"{which}_accuracy").mean() for which in ("source", "adapted")
    )
    assert adapted > source + 0.1


@pytest.mark.slow
def test_tutorial_7_without_data_or_network_runs_loudly_on_digits(tmp_path, no_data):
    plots = ["ladder", "normalizations", "afterwards", "confusion", "mistakes"]
    answers, results = on_digits(
        "07_cifar10_challenge.py",
        tmp_path,
        no_data,
        stands_for="CIFAR-10",
        plots=[*plots, "filters_whitening", "filters_course"],
        answers=6,
    )
    assert max(answers["differences_from_numpy"].values()) < 1e-4
    assert answers["correlation"]["whitened"] < 1e-6 < 0.5 < answers["correlation"]["patches"]
    both_ways = answers["seen_both_ways"]
    assert both_ways["none"] == 0
    assert both_ways["random"] == pytest.approx(0.5, abs=0.03)
    assert both_ways["alternating"] == 1
    assert answers["losses_apart"] < 1e-6  # the momentum takes no part in training
    assert results.values("base", "val_accuracy").mean() > FLOOR_DIGITS
    assert results.values("the best net", "six_views").mean() > FLOOR_DIGITS
    lagging, mended = (
        results.values("momentum 0.999", metric).mean()
        for metric in ("val_accuracy", "reestimated")
    )
    assert mended > lagging + 0.2


def test_a_typo_in_the_flags_is_an_error(tmp_path):
    process = run("01_batchnorm.py", tmp_path, "--fats")
    assert process.returncode == 2
    assert "--fats" in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [path.name for path in TUTORIALS])
def test_matplotlib_is_missed_before_anything_is_trained(tmp_path, name):
    """An environment without TensorFlow may lack it."""
    (tmp_path / "without").mkdir()
    absent = "raise ModuleNotFoundError(\"No module named 'matplotlib'\")"
    (tmp_path / "without" / "matplotlib.py").write_text(absent)
    (tmp_path / "out").mkdir()
    process = run_as_its_readers_do(
        name, tmp_path / "out", "--fast", PYTHONPATH=str(tmp_path / "without")
    )
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith("No module named 'matplotlib'")
    assert not process.stdout
    assert not list((tmp_path / "out").iterdir())


# Well below what the fast runs reach (see the header of the tutorial), far above chance.
FLOOR_FASHION_MNIST = 0.6
FLOOR_DIGITS = 0.8
FLOOR_ONE_EPOCH = 0.5
FLOOR_EXERCISES = 0.6
# Of the net of five times 100, and of the three layers with cycles.
FLOORS_TUTORIAL_2 = {"CIFAR-10": (0.25, 0.3), "digits": (0.85, 0.8)}

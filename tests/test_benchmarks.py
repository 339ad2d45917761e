"""The benchmarks run, and save what they say; nothing is asserted about speed."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from keras_norm import _kernels_choice, recipes
from keras_norm._machine import freed_memory
from keras_norm.experiments import Results, classification_metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as the command line does, in this process; returns what it prints."""

    def run_script(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.mark.parametrize(
    ("compiled", "dtype"), [("graph", "float32"), ("eager", "float32"), ("graph", "bfloat16")]
)
def test_layers(run, tmp_path, compiled, dtype):
    options = ["--repeats", "3", "--shapes", "8,4,4,16", "--compiled", compiled, "--dtype", dtype]
    printed = run("layers.py", "--layers", "batch", "group", *options, "--out", tmp_path)
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["layer"], r["mode"]) for r in rows] == [
        (layer, mode) for layer in ("batch", "group") for mode in ("training", "inference")
    ]
    for row in rows:
        assert float(row["speedup over keras"]) > 0
        assert float(row["keras over itself"]) > 0
        assert int(row["keras_norm pages"] or 0) < 1000
        assert (row["repeats"], row["dtype"], row["memory"]) == ("3", dtype, freed_memory())
    assert (tmp_path / "layers.png").stat().st_size > 1000
    assert "group, inference: Keras/ours, geometric mean" in printed


def test_training(run, tmp_path, monkeypatch):
    options = ["--nets", "mlp 5x100", "--turns", "3", "--batch-size", "50"]
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # too late for this process
    printed = run("training.py", *options, "--out", tmp_path)
    with (tmp_path / "training.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["net"], row["batch size"], row["memory"]) == ("mlp 5x100", "50", "kept")
    assert float(row["pipeline /s"]) > 0
    assert float(row["keras first step s"]) > 50 / float(row["keras /s"])
    assert "ours/Keras" in printed


@pytest.mark.parametrize(
    ("kernels", "told", "becomes"),
    [("Eigen", "", "returned"), ("Eigen", "0", "kept"), ("oneDNN without AVX-512", "", "kept")],
)
def test_what_becomes_of_freed_memory(kernels, told, becomes, monkeypatch):
    monkeypatch.setattr(_kernels_choice, "fused_by", lambda: kernels)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", told)
    assert freed_memory() == becomes


@pytest.mark.parametrize("mflop", [58, 78])
def test_a_net_costs_what_its_name_says(mflop):
    build, *_ = runpy.run_path(str(BENCHMARKS / "training.py"))["NETS"][f"cifar convnet {mflop}"]
    assert recipes.flops(build(None)) / 1e6 == pytest.approx(mflop, abs=0.5)


def test_reestimation(run, tmp_path):
    options = ["--nets", "lenet", "--images", "20", "--turns", "3", "--out", tmp_path]
    printed = run("reestimation.py", *options)
    with (tmp_path / "reestimation.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["images"] == "20"
    for method in ("layerwise", "one_pass"):
        assert float(row[f"{method} over predict"]) > 0
        assert float(row[f"{method} first s"]) > float(row[f"{method} s"])
    assert "layerwise/predict" in printed


def test_backward(run, tmp_path):
    printed = run("backward.py", "--shape", "8,5", "--turns", "3", "--out", tmp_path)
    with (tmp_path / "backward.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["largest difference of dx"]) < 1e-14
    assert float(row["step by step over simplified"]) > 0
    assert "median of 3 turns" in printed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory(run):
    printed = run("memory.py", "--shape", "64,32,32,16", "--repeats", "1")
    assert "ours / Keras's" in printed


def test_imports(tmp_path, monkeypatch, capsys):
    """Without the processes, which take seconds each."""
    main = runpy.run_path(str(BENCHMARKS / "imports.py"))["main"]
    taken = iter([9.0, 0.3, 0.1, 0.2])  # the first is not counted
    modules = main.__globals__["MODULES"]

    def measured():
        return dict.fromkeys(modules, (next(taken), 1.0))

    monkeypatch.setitem(main.__globals__, "seconds", measured)
    monkeypatch.setattr(sys, "argv", ["imports.py", "--processes", "3", "--out", str(tmp_path)])
    main()
    with (tmp_path / "imports.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["module"] for row in rows] == ["keras", "keras_norm", "keras_norm.layers"]
    assert [float(row["s"]) for row in rows] == [0.2] * 3
    assert "keras_norm.layers: 0.2000 s" in capsys.readouterr().out


def test_activation(run, tmp_path):
    printed = run("activation.py", "--turns", "3", "--out", tmp_path)
    with (tmp_path / "activation.csv").open() as file:
        rows = list(csv.DictReader(file))
    shapes = ["128x32x32x32", "128x16x16x64", "128x8x8x128"]
    assert [(r["kernel"], r["shape"]) for r in rows] == [
        (kernel, shape) for kernel in ("fused", "compiled") for shape in shapes
    ]
    assert all(float(row["then ReLU over as one"]) > 0 for row in rows)
    assert "medians of 3 turns" in printed


@pytest.mark.parametrize("kernel", ["fused", "compiled"])
def test_what_has_relu_built_in_is_batch_normalization_and_relu(kernel):
    """Outputs and gradients of what the benchmark times."""
    module = runpy.run_path(str(BENCHMARKS / "activation.py"))
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(s).astype("float32") for s in ((6, 4, 4, 16), 16, 16)]
    dz = rng.standard_normal(given[0].shape).astype("float32")
    _, followed, as_one = (
        module["step_of"](function)(*map(ops.convert_to_tensor, (*given, dz)))
        for function in module["contestants"](kernel).values()
    )
    for a, b in zip([as_one[0], *as_one[1]], [followed[0], *followed[1]], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_convolution(run, tmp_path):
    printed = run(
        "convolution.py",
        "--turns",
        "3",
        "--images",
        "8",
        "--only",
        "1",
        "--dtypes",
        "bfloat16",
        "--out",
        tmp_path,
    )
    with (tmp_path / "convolution.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = [(row["what"], row["dtype"]) for row in rows]
    assert cases == [("gradient 15-64-128", "bfloat16"), ("net 48-96-192", "bfloat16")]
    assert all(float(row["tensorflow over taps"]) > 0 for row in rows)
    assert "medians of 3 turns" in printed


def test_gpu_is_refused_without_one():
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "no GPU is in sight" in result.stderr or "is installed" in result.stderr


def test_time_to_accuracy(run, tmp_path):
    options = ["--recipes", "smoke", "--data", "digits", "--validation", "300", "--seeds", "1"]
    printed = run("time_to_accuracy.py", *options, "--images", "900", "--out", tmp_path)
    (entry,) = Results.load(tmp_path).runs
    assert entry.context["images"] == 900
    assert entry.value("validation_accuracy") > 0.3
    assert entry.value("matmul_gflops") > 0
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.npz"))
    assert "validation_accuracy_views" in printed


def test_an_ensemble_is_judged_by_its_mean_logits(run, tmp_path, monkeypatch):
    train, nets = recipes.train, {}

    def kept(*arguments, seed, **options):
        nets[seed] = train(*arguments, seed=seed, **options)
        return nets[seed]

    monkeypatch.setattr(recipes, "train", kept)
    options = ["--recipes", "smoke", "--data", "digits", "--validation", "300", "--seeds", "1"]
    run("time_to_accuracy.py", *options, "--images", "900", "--members", "2", "--out", tmp_path)
    (entry,) = Results.load(tmp_path).runs
    assert entry.name == "smoke, 2 nets"
    data = recipes.load("digits", validation=300, subset={"train": 900})
    assert sorted(nets) == [0, 1]
    logits = [net.model.predict(data.validation.x, verbose=0) for net in nets.values()]
    expected = classification_metrics(np.mean(logits, axis=0), data.validation.y)
    assert entry.value("validation_loss") == pytest.approx(expected["loss"], rel=1e-2)
    assert entry.value("tflop") == pytest.approx(
        sum(net.costs["flops_training"] for net in nets.values()) / 1e12
    )

"""The benchmarks run, and save what they say; nothing is asserted about speed."""

import csv
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from keras_norm import _kernels_choice, recipes
from keras_norm._machine import freed_memory, pages_taken
from keras_norm.experiments import Results, classification_metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    """Scripts import what lies beside them."""
    monkeypatch.syspath_prepend(BENCHMARKS)


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
    assert freed_memory("numpy") == ("kept" if told else "returned")


def test_pages_taken_are_counted():
    before = pages_taken()
    if before is None:
        pytest.skip("Windows")
    np.ones(2**23)  # of 64 MiB: no allocator keeps so much
    assert pages_taken() > before


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("activation.py", "--turns 2", "--turns: must be a whole number, at least 3; got '2'"),
        ("backward.py", "--turns 0", "--turns: must be a whole number, at least 3; got '0'"),
        ("backward.py", "--turns ten", "--turns: must be a whole number, at least 3; got 'ten'"),
        ("backward.py", "--shape 100x500", "--shape: must be N,C, whole numbers joined by commas"),
        ("backward.py", "--shape 100", "each at least 1; got '100'"),
        ("backward.py", "--shape 8,5,5", "each at least 1; got '8,5,5'"),
        ("convolution.py", "--only 0", "--only: must be a whole number, at least 1; got '0'"),
        ("gpu.py", "--repeats 2", "--repeats: must be a whole number, at least 3; got '2'"),
        ("imports.py", "--processes 2", "--processes: must be a whole number, at least 3; got"),
        ("layers.py", "--repeats 2", "--repeats: must be a whole number, at least 3; got '2'"),
        ("layers.py", "--shapes 0,3", "--shapes: must be N,…,C, whole numbers joined by commas"),
        ("layers.py", "--shapes 8,16 8", "each at least 1; got '8'"),
        (
            "layers.py",
            "--layers group --shapes 8,4,4,12",
            "--layers group takes shapes whose last axis is a multiple of 8; got 8,4,4,12",
        ),
        ("memory.py", "--shape 8x4", "--shape: must be N,…,C, whole numbers joined by commas"),
        ("memory.py", "--repeats 0", "--repeats: must be a whole number, at least 1; got '0'"),
        ("memory.py", "--layers group --shape 8,4", "is a multiple of 8; got 8,4"),
        ("reestimation.py", "--images 0", "--images: must be a whole number, at least 1; got '0'"),
        ("search.py", "--trials 5", "--trials: must be a whole number, at least 6; got '5'"),
        ("time_to_accuracy.py", "--members 0", "--members: must be a whole number, at least 1"),
        ("training.py", "--batch-size 0", "--batch-size: must be a whole number, at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(run, capsys, script, options, said):
    with pytest.raises(SystemExit, match="2"):
        run(script, *options.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "compiled"), [("torch", "xla"), ("jax", "eager")])
def test_ways_to_compile_are_tensorflows_alone(backend, compiled, monkeypatch, capsys):
    read = runpy.run_path(str(BENCHMARKS / "layers.py"))["arguments_of_command_line"]
    monkeypatch.setitem(read.__globals__, "BACKEND", backend)
    monkeypatch.setattr(sys, "argv", ["layers.py", "--compiled", compiled])
    with pytest.raises(SystemExit, match="2"):
        read()
    said = f"--compiled {compiled} is for TensorFlow alone; the backend is {backend}"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["layers.py"])
    assert read().compiled == "graph"


@pytest.mark.core
@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_layers_of_pytorch_take_channels_last(kind, rank):
    torch = pytest.importorskip("torch")
    native = runpy.run_path(str(BENCHMARKS / "layers.py"))["native_torch"]
    shape = (6, 2, 3, 4)[: rank - 1] + (16,)
    x, dy = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    y, gradients = native(kind, shape, training=True)(x, dy)
    assert gradients[0].shape == y.shape == x.movedim(-1, 1).shape
    axes = [a for a in range(rank) if a != (1 if kind == "batch" else 0)]
    np.testing.assert_allclose(y.detach().numpy().mean(tuple(axes)), 0, atol=1e-6)


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
    assert (row["shape"], row["memory"]) == ("8,5", freed_memory("numpy"))
    for way in ("step by step", "simplified"):
        assert 0 <= int(row[f"{way} pages"] or 0) < 100
        assert f"pages: {row[f'{way} pages']}" in printed
    assert "median of 3 turns" in printed
    assert f"freed memory is {row['memory']}" in printed


def test_the_first_turns_of_backward_are_not_counted(monkeypatch):
    measure = runpy.run_path(str(BENCHMARKS / "backward.py"))["measure"]
    calls, ways = {}, measure.__globals__["WAYS"]

    def counted(way, function):
        def call(*arguments):
            calls[way] = calls.get(way, 0) + 1
            return function(*arguments)

        return call

    for way, function in list(ways.items()):
        monkeypatch.setitem(ways, way, counted(way, function))
    times, pages, _ = measure((8, 5), 3, calls=2)
    before = measure.__globals__["TURNS_BEFORE"]
    assert before >= 2
    for way in ways:
        assert calls[way] == 1 + 2 * (before + 3)
        assert len(times[way]) == 3
        assert len(pages[way]) in (0, 3)  # 0: Windows


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory(run):
    printed = run("memory.py", "--shape", "16,32,32,16", "--repeats", "1")
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


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_in_a_folder_whose_name_has_a_space(tmp_path):
    environment = tmp_path.resolve() / "a b" / ".venv-jax"
    environment.mkdir(parents=True)
    shutil.copy(BENCHMARKS.parent / "Makefile", environment.parent)
    (environment.parent / "pyproject.toml").touch()
    (environment / "installed").touch()
    command = ["make", "--dry-run", "test-jax"]
    done = subprocess.run(
        command, cwd=environment.parent, capture_output=True, text=True, check=True
    )
    assert f"JAX_COMPILATION_CACHE_DIR={environment}/compiled" in shlex.split(done.stdout)


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


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch, capsys):
    draw = runpy.run_path(str(BENCHMARKS / "time_to_accuracy.py"))["draw"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw(Results([]), "test", tmp_path / "time_to_accuracy.png")
    assert capsys.readouterr().out == "no plot: matplotlib is not installed\n"
    assert not list(tmp_path.iterdir())


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

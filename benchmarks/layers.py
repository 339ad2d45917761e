"""How long a step of normalization takes: ours, Keras's, PyTorch's, and the least possible.

    python benchmarks/layers.py                            # batch normalization, the whole grid
    python benchmarks/layers.py --shapes 256,32,32,64      # one shape
    python benchmarks/layers.py --layers layer rms group   # others, on their natural shapes
    python benchmarks/layers.py --compiled eager           # or xla; TensorFlow only
    python benchmarks/layers.py --dtype bfloat16           # inputs; weights and statistics float32
    python benchmarks/layers.py --mean 10                  # of x, in standard deviations; else 0
    KERAS_BACKEND=torch python benchmarks/layers.py --out results/bench_torch

One process, nothing else running. The contestants take turns, shape by shape, so that what else
the machine does hits all alike; the figures are medians of many turns, with the quartiles beside
them, and the ratios are medians of the ratios within a turn. Keras's layer also runs against a
second one like it: how far that ratio is from 1 is what the others may be off.

The floor is the time to read a tensor of the input's size and write another, by a thread for each
core where it is not small, counted as two sweeps, times the sweeps that the work needs at least:
8 in training (forward 2 reads, 1 write; backward 4 reads, 1 write), 2 in inference.

The C library returns arrays of 32 MiB and more to the operating system as soon as they are freed,
and handing out the next one page by page takes longer than the layers do ("pages" in the table
that is saved: so many for each step). To see the layers alone, let it (glibc) keep what was freed:

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_ARENA_MAX=1

TensorFlow with oneDNN (by itself with AVX-512) keeps it in any case.
"""

import argparse
import concurrent.futures
import csv
import inspect
import os
import pathlib
import time

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops
from options import GROUPS, at_least, check_groups, shape_of
from tqdm import tqdm

from keras_norm import experiments, kernels, layers
from keras_norm._machine import freed_memory, pages_taken

IMAGES = [
    (128, 32, 32, 32),
    (32, 32, 32, 64),
    (128, 16, 16, 64),
    (128, 16, 16, 128),
    (128, 8, 8, 256),
]
ROWS = [(256, 120), (128, 500), (1024, 1024), (32, 128, 512), (64, 256, 256)]
BATCH = [
    (256, 84),
    (256, 120),
    (128, 500),
    (1024, 1024),
    (256, 24, 24, 6),
    (256, 8, 8, 16),
    (128, 32, 32, 3),
    (128, 32, 32, 16),
    (128, 32, 32, 32),
    (256, 32, 32, 64),
    (128, 16, 16, 64),
    (128, 16, 16, 128),
    (128, 8, 8, 256),
    (128, 4, 4, 512),
]
# The layer's name at Keras, its function in kernels.py, its arguments, its natural shapes.
LAYERS = {
    "batch": ("BatchNormalization", "batch_normalization", {}, BATCH),
    "layer": ("LayerNormalization", "layer_normalization", {}, ROWS),
    "rms": ("RMSNormalization", "rms_normalization", {}, ROWS),
    "group": ("GroupNormalization", "group_normalization", {"groups": GROUPS}, IMAGES),
}
SWEEPS = {"training": 8, "inference": 2}
AGAIN = "keras again"
CALLS_BEFORE = 12  # what is compiled when it comes often has been compiled by then
FEWEST_BYTES_SHARED_OUT = 2**20  # of less, a copy takes about as long as to wake a thread
BACKEND = keras.backend.backend()


def step_of(layer, training, compiled="graph"):
    """A function (x, dy) -> what a step computes; compiled where the backend compiles.

    In training that is y, too, which the next layer reads: a compiled step that returned only
    gradients would leave it out where it can.
    """
    if BACKEND == "tensorflow":
        return _tensorflow(layer, training, compiled)
    return {"jax": _jax, "torch": _torch}[BACKEND](layer, training)


def _tensorflow(layer, training, compiled):
    import tensorflow as tf

    def step(x, dy):
        if not training:
            return layer(x, training=False)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        with tf.control_dependencies([y]):
            dy = tf.identity(dy)  # as in a net, whose gradient comes after the output
        return y, tape.gradient(y, [x, *(v.value for v in layer.trainable_variables)], dy)

    if compiled == "eager":
        return step
    return tf.function(step, autograph=False, jit_compile=compiled == "xla")


def _jax(layer, training):
    import jax

    mode = {"training": training} if "training" in inspect.signature(layer.call).parameters else {}

    def forward(trainable, state, x):
        return layer.stateless_call(trainable, state, x, **mode)

    @jax.jit
    def step(trainable, state, x, dy):
        if not training:
            return forward(trainable, state, x)[0]
        y, gradient, state = jax.vjp(lambda t, x: forward(t, state, x), trainable, x, has_aux=True)
        return y, gradient(dy), state

    # Read once, as in `fit`, which hands the state from step to step.
    trainable = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]

    def run(x, dy):
        return jax.block_until_ready(step(trainable, state, x, dy))

    return run


def _torch(layer, training):
    import torch

    parameters = layer.parameters() if isinstance(layer, torch.nn.Module) else []
    parameters = [p for p in parameters if p.requires_grad]
    keras_layer = isinstance(layer, keras.layers.Layer)

    def step(x, dy):
        x = x.detach().requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = layer(x, training=training) if keras_layer else layer(x)
        return (y, torch.autograd.grad(y, [x, *parameters], dy)) if training else y

    return step


def native_torch(kind, shape, training):
    """PyTorch's own layer on the same memory: channels last, seen as channels first."""
    from torch import nn

    channels, rank = shape[-1], len(shape)
    if kind in ("layer", "rms"):
        layer = nn.LayerNorm(channels, 1e-3) if kind == "layer" else nn.RMSNorm(channels, 1e-6)
        return _torch(layer.train(training), training)
    if kind == "batch":
        layer = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)(channels)
    else:
        layer = nn.GroupNorm(GROUPS, channels)
    step = _torch(layer.train(training), training)
    return lambda x, dy: step(*((x.movedim(-1, 1), dy.movedim(-1, 1)) if rank > 2 else (x, dy)))


def contestants(kind, shape, training, compiled, dtype):
    name, _, arguments, _ = LAYERS[kind]
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    result = {}
    for who, module in (("keras_norm", layers), ("keras", keras.layers), (AGAIN, keras.layers)):
        layer = getattr(module, name)(**arguments, dtype=policy)
        layer.build(shape)
        result[who] = step_of(layer, training, compiled)
    if BACKEND == "torch" and dtype == "float32":
        result["torch.nn"] = native_torch(kind, shape, training)
    return result


def finish():
    """Waits for what was only queued: PyTorch's kernels on a GPU."""
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def seconds(function):
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def copying(x, tensor):
    """A function that reads an array of x's size and writes another, where the layers run."""
    if BACKEND == "torch" and tensor.is_cuda:
        target = tensor.clone()
        return lambda: target.copy_(tensor)
    if BACKEND == "jax":
        import jax

        if jax.default_backend() != "cpu":
            step = jax.jit(lambda a: a + 1)
            return lambda: jax.block_until_ready(step(tensor))
    target = np.empty_like(x)
    if x.nbytes < FEWEST_BYTES_SHARED_OUT:
        return lambda: np.copyto(target, x)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(cores)
    parts = [np.array_split(a.reshape(-1), cores) for a in (target, x)]  # views
    return lambda: list(pool.map(np.copyto, *parts))


def measure(kind, shape, mode, compiled, dtype, mean, repeats, minimum):
    """{contestant: seconds of every turn}, the turns alternating, and {contestant: pages taken}."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape).astype("float32") for _ in range(2))
    x += np.float32(mean)
    tensors = ops.convert_to_tensor(x, dtype=dtype), ops.convert_to_tensor(dy, dtype=dtype)
    x = x.astype("float32" if dtype == "float32" else "float16")  # of as many bytes, for the copy
    turns = {
        name: lambda step=step: step(*tensors)
        for name, step in contestants(kind, shape, mode == "training", compiled, dtype).items()
    }
    turns["floor"] = copying(x, tensors[0])  # two sweeps: one read, one write
    once = {}
    for name, turn in turns.items():
        for _ in range(CALLS_BEFORE):
            turn()
        once[name] = min(seconds(turn) for _ in range(3))
    # Short steps are repeated within a turn, so that the clock's resolution does not matter.
    inner = {name: max(1, int(minimum / t)) for name, t in once.items()}
    times, pages = ({name: [] for name in turns} for _ in range(2))
    for _ in range(repeats):
        for name in rng.permutation(list(turns)):  # nobody always runs after the same neighbour
            turn, n = turns[name], inner[name]
            turn()
            before = pages_taken()
            times[name].append(seconds(lambda: [turn() for _ in range(n)]) / n)  # noqa: B023
            if before is not None:
                pages[name].append((pages_taken() - before) / n)
    times["floor"] = [t * SWEEPS[mode] / 2 for t in times["floor"]]
    return {name: np.array(t) for name, t in times.items()}, pages


def taken(kind, shape, mode, compiled, dtype):
    """The implementation that ours chose."""
    function, training = LAYERS[kind][1], mode == "training"
    if function == "batch_normalization" and not training:
        function = "normalize"
    names = []

    def choose():
        names.append(kernels.choose(function, shape, dtype, training=training))

    if BACKEND == "tensorflow" and compiled != "eager":
        import tensorflow as tf

        tf.function(choose, jit_compile=compiled == "xla").get_concrete_function()
    else:
        choose()
    return names[0]


def row_of(kind, shape, mode, compiled, dtype, mean, times, pages):
    row = {
        "layer": kind,
        "backend": BACKEND,
        "compiled": compiled if BACKEND == "tensorflow" else "",
        "shape": "x".join(map(str, shape)),
        "mode": mode,
        "dtype": dtype,
        **({"mean": mean} if mean else {}),
        "implementation": taken(kind, shape, mode, compiled, dtype),
        "memory": freed_memory(),
        "repeats": len(times["keras"]),
    }
    for name, t in times.items():
        if name == AGAIN:
            row["keras over itself"] = float(np.median(times["keras"] / t))
            continue
        low, median, high = (float(1e3 * v) for v in np.quantile(t, [0.25, 0.5, 0.75]))
        row |= {f"{name} ms": median, f"{name} ms 25%": low, f"{name} ms 75%": high}
        if name != "floor":
            row[f"{name} pages"] = round(np.median(pages[name])) if pages[name] else ""
        if name not in ("keras_norm", "floor"):
            row[f"speedup over {name}"] = float(np.median(t / times["keras_norm"]))
    return row


def save(rows, out):
    with (
        experiments.replace_file(out / "layers.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows, out):
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    from keras_norm import plotting

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    names = [key[:-3] for key in rows[0] if key.endswith(" ms")]
    with plotting.style():
        figure, panels = pyplot.subplots(
            1, len(modes), figsize=(6.5 * len(modes), 1.5 + 0.3 * len(rows) / len(modes))
        )
        for axes, mode in zip(np.atleast_1d(panels), modes, strict=True):
            of_mode = [row for row in rows if row["mode"] == mode]
            y = np.arange(len(of_mode))[::-1]
            for marker, name in zip("os^D", names, strict=False):
                axes.plot([r[f"{name} ms"] for r in of_mode], y, marker, label=name)
            axes.set(xscale="log", xlabel="milliseconds per step", title=mode)
            text = [f"{r['layer']} {r['shape']} ({r['implementation']})" for r in of_mode]
            axes.set_yticks(y, text)
        panels_legend = np.atleast_1d(panels)[0]
        panels_legend.legend(title="median of alternating turns")
        figure.suptitle(f"Normalization, {BACKEND}, {experiments.describe_machine()['summary']}")
        with experiments.replace_file(out / "layers.png") as path:
            figure.savefig(path, dpi=150, format="png")
        pyplot.close(figure)


def summary(rows):
    """Geometric means of Keras/ours for each layer, mode and rank."""
    lines = []
    for kind, mode in dict.fromkeys((r["layer"], r["mode"]) for r in rows):
        of = [r for r in rows if (r["layer"], r["mode"]) == (kind, mode)]
        ratios = {r["shape"]: r["speedup over keras"] for r in of}
        text = f"{kind}, {mode}: Keras/ours, geometric mean {geometric(ratios.values()):.2f}"
        images = [v for shape, v in ratios.items() if shape.count("x") == 3]
        if 0 < len(images) < len(ratios):
            text += f", over the shapes of rank 4 {geometric(images):.2f}"
        lines.append(f"{text}, least {min(ratios.values()):.2f} ({min(ratios, key=ratios.get)})")
    noise = [r["keras over itself"] for r in rows]
    lines.append(f"Keras's layer / another like it: {min(noise):.2f} to {max(noise):.2f}")
    return lines


def geometric(values):
    return float(np.exp(np.mean(np.log(list(values)))))


def show(rows):
    others = [k[len("speedup over ") :] for k in rows[0] if k.startswith("speedup over ")]
    print(
        f"{'layer':>6} {'shape':>15} {'mode':>9} {'ours':>8} "
        + "".join(f"{name:>9}" for name in others)
        + f" {'floor':>8} "
        + "".join(f"{name + '/ours':>14}" for name in others)
        + f"{'keras/keras':>14}"
        + "  taken"
    )
    for r in rows:
        print(
            f"{r['layer']:>6} {r['shape']:>15} {r['mode']:>9} {r['keras_norm ms']:8.3f} "
            + "".join(f"{r[f'{name} ms']:9.3f}" for name in others)
            + f" {r['floor ms']:8.3f} "
            + "".join(f"{r[f'speedup over {name}']:14.2f}" for name in others)
            + f"{r['keras over itself']:14.2f}"
            + f"  {r['implementation']}"
        )


def arguments_of_command_line():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--repeats", type=at_least(3), default=30, help="turns (default: %(default)s)"
    )
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["batch"])
    parser.add_argument(
        "--shapes", nargs="+", type=shape_of(), metavar="N,…,C", help="default: the layer's own"
    )
    parser.add_argument("--compiled", choices=["graph", "eager", "xla"], default="graph")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--mean",
        type=float,
        default=0.0,
        help="of the inputs, in standard deviations; where it is far from 0, sums round, and some "
        "implementations take longer (default: %(default)s)",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench"))
    arguments = parser.parse_args()
    if not np.isfinite(arguments.mean):
        parser.error(f"--mean must be a finite number; received: {arguments.mean}")
    check_groups(parser, arguments.layers, arguments.shapes or [])
    if BACKEND != "tensorflow" and arguments.compiled != "graph":
        parser.error(
            f"--compiled {arguments.compiled} is for TensorFlow alone; the backend is {BACKEND}: "
            "leave it out"
        )
    return arguments


def main():
    arguments = arguments_of_command_line()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    cases = [
        (kind, shape, mode, arguments.compiled, arguments.dtype, arguments.mean)
        for kind in arguments.layers
        for shape in arguments.shapes or LAYERS[kind][3]
        for mode in SWEEPS
    ]
    for case in tqdm(cases, desc="shapes", unit="case"):
        rows.append(row_of(*case, *measure(*case, arguments.repeats, 0.002)))
        save(rows, arguments.out)
    plot(rows, arguments.out)
    show(rows)
    print("\n".join(summary(rows)))
    print(f"milliseconds; medians of {arguments.repeats} turns; written to {arguments.out}")


if __name__ == "__main__":
    main()

"""What re-estimated statistics cost: `statistics.reestimate` against one `predict`.

    python benchmarks/reestimation.py                 # LeNet and a CIFAR-10 net, 10,000 images
    python benchmarks/reestimation.py --nets lenet --turns 20
    KERAS_BACKEND=jax python benchmarks/reestimation.py --out results/bench_reestimation_jax

One process, nothing else running. `predict` over the images and both methods of re-estimation over
the same images, in batches of the same size, take turns; the figures are medians of many turns,
with the quartiles beside them, and the ratios are medians of the ratios within a turn. The first
call of each, which compiles, is a figure of its own. The images are random numbers: speed does not
depend on them.
"""

import argparse
import csv
import logging
import pathlib
import time

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from options import at_least
from tqdm import tqdm

from keras_norm import experiments, models, statistics

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

NETS = {  # name: (builder, input shape)
    "lenet": (models.LeNet, (28, 28, 1)),
    "cifar net": (models.CNN, (32, 32, 3)),
}
METHODS = ("layerwise", "one_pass")
BATCH_SIZE = 256


def contestants(model, x):
    """{name: a function that goes over all images once}."""

    def reestimate(method):
        return lambda: statistics.reestimate(
            model, x, samples=None, method=method, batch_size=BATCH_SIZE
        )

    turns = {method: reestimate(method) for method in METHODS}
    return {"predict": lambda: model.predict(x, batch_size=BATCH_SIZE, verbose=0), **turns}


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(net, images, turns, bar):
    """{contestant: seconds of its first call}, {contestant: seconds of every turn}."""
    build, shape = NETS[net]
    keras.utils.set_random_seed(0)
    model = build(normalization="batch", input_shape=shape)
    rng = np.random.default_rng(0)
    functions = contestants(model, rng.standard_normal((images, *shape)).astype("float32"))
    first = {name: seconds(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name in rng.permutation(list(functions)):  # nobody always runs after the same neighbour
            times[name].append(seconds(functions[name]))
        bar.update()
    return first, {name: np.array(t) for name, t in times.items()}


def row_of(net, images, first, times):
    row = {
        "net": net,
        "backend": keras.backend.backend(),
        "images": images,
        "batch size": BATCH_SIZE,
        "turns": len(times["predict"]),
    }
    for name, t in times.items():
        low, median, high = (float(v) for v in np.quantile(t, [0.25, 0.5, 0.75]))
        row |= {f"{name} s": median, f"{name} s 25%": low, f"{name} s 75%": high}
        row |= {f"{name} first s": first[name]}
    for method in METHODS:
        row[f"{method} over predict"] = float(np.median(times[method] / times["predict"]))
    return row


def save(rows, out):
    with (
        experiments.replace_file(out / "reestimation.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows):
    names = ("predict", *METHODS)
    header = [*(f"{n} s" for n in names), *(f"{m}/predict" for m in METHODS)]
    header += [f"first {n} s" for n in names]
    widths = [len(title) for title in header]
    print("  ".join([f"{'net':<10}", *header]))
    for row in rows:
        numbers = [row[f"{n} s"] for n in names] + [row[f"{m} over predict"] for m in METHODS]
        numbers += [row[f"{n} first s"] for n in names]
        cells = [f"{v:{w}.2f}" for v, w in zip(numbers, widths, strict=True)]
        print("  ".join([f"{row['net']:<10}", *cells]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--images", type=at_least(1), default=10_000, help="default: %(default)s")
    parser.add_argument("--turns", type=at_least(3), default=15, help="default: %(default)s")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/bench_reestimation")
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tqdm(total=len(arguments.nets) * arguments.turns, unit="turn") as bar:
        for net in arguments.nets:
            bar.set_description(net)
            times = measure(net, arguments.images, arguments.turns, bar)
            rows.append(row_of(net, arguments.images, *times))
            save(rows, arguments.out)
    print_table(rows)
    print(f"Seconds over {arguments.images:,} images, medians of {arguments.turns} turns.")
    print(f"{experiments.describe_machine()['summary']}; {arguments.out}/reestimation.csv")


if __name__ == "__main__":
    main()

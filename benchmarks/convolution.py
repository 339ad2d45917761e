"""Where is the kernel gradient of `models.FastConv2D` quicker than TensorFlow's? TensorFlow only.

    python benchmarks/convolution.py

On 512 images of each size, in turns of random order: TensorFlow's gradient of a 3x3 kernel, and the
one by taps. Then a training step of the nets of the recipes, with `keras.layers.Conv2D` and with
`FastConv2D`. The table in keras_norm/_convolution.py, which chooses between the two, is from here.
"""

import argparse
import csv
import dataclasses
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from options import at_least
from tqdm import tqdm

from keras_norm import experiments, models, recipes
from keras_norm._convolution import FastConv2D, kernel_gradient

# Side of the images, channels, filters.
LAYERS = [
    (15, 64, 128),
    (15, 256, 256),
    (10, 128, 128),
    (8, 32, 64),
    (8, 128, 128),
    (8, 256, 256),
    (7, 16, 32),
    (7, 64, 64),
    (7, 128, 128),
    (7, 128, 256),
    (7, 256, 384),
    (5, 64, 64),
    (5, 128, 128),
    (5, 256, 256),
    (3, 16, 16),
    (3, 64, 64),
    (3, 128, 128),
    (3, 256, 256),
    (3, 384, 384),
]
NETS = [(48, 96, 192), (64, 128, 256), (64, 256, 384)]


def in_turns(functions, turns, seed=0):
    """{name: seconds of every turn}; each function returns something that can be waited for."""
    rng = np.random.default_rng(seed)
    times = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name in rng.permutation(list(functions)):
            start = time.perf_counter()
            functions[name]()
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: np.array(t) for name, t in times.items()}


def gradients_of(sizes, images, dtype):
    """{name: function without arguments} of both gradients of one kernel."""
    side, channels, filters = sizes
    rng = np.random.default_rng(0)
    x = tf.cast(rng.standard_normal((images, side, side, channels), "float32"), dtype)
    dy = tf.cast(rng.standard_normal((images, side, side, filters), "float32"), dtype)

    @tf.function
    def theirs():
        return tf.raw_ops.Conv2DBackpropFilter(
            input=x,
            filter_sizes=(3, 3, channels, filters),
            out_backprop=dy,
            strides=(1, 1, 1, 1),
            padding="SAME",
        )

    @tf.function
    def taps():
        return kernel_gradient(x, dy, (3, 3))

    return {"tensorflow": lambda: theirs().numpy(), "taps": lambda: taps().numpy()}


def as_keras(layer):
    """Keras's own convolution for ours, and a new layer of the same class for every other."""
    kind = keras.layers.Conv2D if type(layer) is FastConv2D else type(layer)
    return kind.from_config(layer.get_config())


def steps_of(widths, images, dtype):
    """{name: function without arguments} of a training step with either convolution."""
    recipe = dataclasses.replace(recipes.RECIPES["cpu-25min"], widths=widths)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype if dtype == "float32" else f"mixed_{dtype}")
    ours = recipe.model()
    theirs = keras.models.clone_model(ours, clone_function=as_keras)
    keras.config.set_dtype_policy(policy)
    x = np.random.default_rng(0).standard_normal((images, 32, 32, 3), "float32")
    y = np.eye(10, dtype="float32")[np.arange(images) % 10]

    def step(net):
        models.fit_whitening(net, x)
        net.compile(
            recipe.optimizer(net, 1000), keras.losses.CategoricalCrossentropy(from_logits=True)
        )
        batch = tf.constant(x), tf.constant(y)
        return lambda: net.train_on_batch(*batch)

    return {"tensorflow": step(theirs), "taps": step(ours)}


def row_of(what, dtype, images, times):
    medians = {f"{name} ms": 1e3 * float(np.median(t)) for name, t in times.items()}
    ratio = float(np.median(times["tensorflow"] / times["taps"]))
    turns = len(times["taps"])
    first = {"what": what, "dtype": dtype, "images": images, "turns": turns}
    return first | medians | {"tensorflow over taps": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--turns", type=at_least(3), default=9, help="default: %(default)s")
    parser.add_argument("--images", type=at_least(1), default=512, help="default: %(default)s")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--only",
        type=at_least(1),
        help="the first so many layers and nets; default: all of them",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_conv"))
    arguments = parser.parse_args()
    images, turns = arguments.images, arguments.turns
    kinds = {"gradient": (LAYERS, gradients_of), "net": (NETS, steps_of)}
    cases = [
        (kind, sizes, dtype)
        for dtype in arguments.dtypes
        for kind, (all_sizes, _) in kinds.items()
        for sizes in all_sizes[: arguments.only]
    ]
    rows = []
    for kind, sizes, dtype in tqdm(cases, desc="cases", unit="case"):
        times = in_turns(kinds[kind][1](sizes, images, dtype), turns)
        rows.append(row_of(f"{kind} {'-'.join(map(str, sizes))}", dtype, images, times))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        experiments.replace_file(arguments.out / "convolution.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    print(f"medians of {turns} turns; {arguments.out}/convolution.csv")


if __name__ == "__main__":
    main()

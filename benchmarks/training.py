"""Examples per second of `model.fit`: with our normalization, with Keras's, and without any.

    python benchmarks/training.py                     # six nets, on TensorFlow
    python benchmarks/training.py --nets lenet --turns 20
    python benchmarks/training.py --dtype-policy mixed_bfloat16 --out results/bench_training_half
    python benchmarks/training.py --batch-size 512
    KERAS_BACKEND=jax python benchmarks/training.py --out results/bench_training_jax

One process, nothing else running. The three models of a net train in turns of some steps each, in
random order; ratios are medians of the ratios within a turn. The images are random numbers in
memory: speed does not depend on them. "pipeline" is the rate of the batches alone, with no model
behind them: far above the rest, it cannot be what limits them. Freed memory is returned or kept
as layers.py says.
"""

import argparse
import csv
import pathlib
import time

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import layers as keras_layers
from options import at_least
from tqdm import tqdm

from keras_norm import experiments, layers, models
from keras_norm._machine import freed_memory

NORMALIZATIONS = {
    "keras_norm": layers.BatchNormalization,
    "keras": keras_layers.BatchNormalization,
    "none": None,
}


def three_layer_convnet(normalization):
    """Convolution 32 of 7 x 7, pooling, dense 100, dense 10; normalized before each ReLU."""
    return sequence((32, 32, 3), [("conv", 32, 7), ("pool",), ("dense", 100)], normalization)


CIFAR_BLOCKS = [("conv", 32, 3), ("conv", 32, 3), ("pool",)]
CIFAR_BLOCKS += [("conv", 64, 3), ("conv", 64, 3), ("pool",), ("conv", 128, 3)]


def cifar_convnet(normalization):
    """Five convolutions of 3 x 3; 58 MFLOP forward for an image, as `recipes.flops` counts."""
    return sequence((32, 32, 3), [*CIFAR_BLOCKS, ("pool",)], normalization)


def cifar_convnet_78(normalization):
    """Six convolutions of 3 x 3 and a hidden layer; 78 MFLOP forward for an image."""
    blocks = [*CIFAR_BLOCKS, ("conv", 128, 3), ("pool",), ("dense", 128)]
    return sequence((32, 32, 3), blocks, normalization)


def mobilenet(normalization):
    """MobileNetV2 of 96 x 96 pixels, 52 normalizations of 19 shapes."""
    model = keras.applications.MobileNetV2(
        input_shape=(96, 96, 3), weights=None, classes=10, classifier_activation=None
    )
    if normalization is keras_layers.BatchNormalization:
        return model
    return models.swap_normalization(model, normalization)


def sequence(shape, blocks, normalization):
    """Convolution or dense layer, normalization, ReLU; maximum pooling; ten classes."""
    model = keras.Sequential([keras.Input(shape)])
    for kind, *sizes in blocks:
        if kind == "pool":
            model.add(keras_layers.MaxPooling2D())
            continue
        if kind == "conv":
            width, kernel = sizes
            model.add(keras_layers.Conv2D(width, kernel, padding="same"))
        else:
            model.add(keras_layers.Flatten())
            model.add(keras_layers.Dense(*sizes))
        if normalization is not None:
            model.add(normalization())
        model.add(keras_layers.ReLU())
    if not any(isinstance(layer, keras_layers.Flatten) for layer in model.layers):
        model.add(keras_layers.Flatten())
    model.add(keras_layers.Dense(10))
    return model


NETS = {  # name: (builder, input shape, batch size, steps in a turn)
    "lenet": (models.LeNet, (28, 28, 1), 256, 40),
    "mlp 5x100": (
        lambda n: models.MLP((100,) * 5, n, input_shape=(32, 32, 3)),
        (32, 32, 3),
        100,
        100,
    ),
    "three-layer convnet": (three_layer_convnet, (32, 32, 3), 100, 10),
    "cifar convnet 58": (cifar_convnet, (32, 32, 3), 128, 10),
    "cifar convnet 78": (cifar_convnet_78, (32, 32, 3), 128, 8),
    "mobilenetv2": (mobilenet, (96, 96, 3), 32, 6),
}


class Times(keras.callbacks.Callback):
    """The moments at which steps end."""

    def on_train_begin(self, logs=None):
        self.begin, self.ends = time.perf_counter(), []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


class Contestant:
    """A compiled model with its data."""

    first = None  # seconds until the end of the first step of all

    def __init__(self, build, normalization, shape, batch_size, steps):
        keras.utils.set_random_seed(0)
        self.model = build(normalization)
        self.model.compile(
            keras.optimizers.SGD(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.batch_size = batch_size
        rng = np.random.default_rng(0)
        self.x = rng.random((batch_size * steps, *shape)).astype("float32")
        self.y = rng.integers(0, 10, batch_size * steps)

    def rate(self):
        """Examples per second of one `fit`, from its first step's end to its last one's."""
        times = Times()
        self.model.fit(
            self.x, self.y, batch_size=self.batch_size, verbose=0, shuffle=False, callbacks=[times]
        )
        if self.first is None:
            self.first = times.ends[0] - times.begin
        return (len(times.ends) - 1) * self.batch_size / (times.ends[-1] - times.ends[0])


def pipeline_rate(contestant):
    """Examples per second of the batches that `fit` draws, without training on them."""
    keras.utils.set_random_seed(0)
    shape = contestant.x.shape[1:]
    idle = keras.Sequential(
        [keras.Input(shape), keras_layers.GlobalAveragePooling2D(), keras_layers.Dense(10)]
    )
    idle.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    probe = object.__new__(Contestant)
    probe.model, probe.batch_size = idle, contestant.batch_size
    probe.x, probe.y = contestant.x, contestant.y
    probe.rate()
    return max(probe.rate() for _ in range(3))


def measure(net, batch_size, turns, bar):
    build, shape, _, steps = NETS[net]
    contestants = {
        name: Contestant(build, normalization, shape, batch_size, steps)
        for name, normalization in NORMALIZATIONS.items()
    }
    for contestant in contestants.values():
        contestant.rate()  # compiles
    rates = {name: [] for name in contestants}
    rng = np.random.default_rng(0)
    for _ in range(turns):
        for name in rng.permutation(list(contestants)):
            rates[name].append(contestants[name].rate())
        bar.update()
    first = {name: contestant.first for name, contestant in contestants.items()}
    pipeline = pipeline_rate(contestants["keras"])
    return {name: np.array(r) for name, r in rates.items()}, first, pipeline


def row_of(net, batch_size, rates, first, pipeline):
    row = {
        "net": net,
        "batch size": batch_size,
        "memory": freed_memory(),
        "backend": keras.backend.backend(),
        "policy": keras.config.dtype_policy().name,
        "turns": len(rates["keras"]),
    }
    for name, r in rates.items():
        low, median, high = (float(v) for v in np.quantile(r, [0.25, 0.5, 0.75]))
        row |= {f"{name} /s": median, f"{name} /s 25%": low, f"{name} /s 75%": high}
    row["ours over keras"] = float(np.median(rates["keras_norm"] / rates["keras"]))
    row["ours over none"] = float(np.median(rates["keras_norm"] / rates["none"]))
    row |= {f"{name} first step s": seconds for name, seconds in first.items()}
    row["pipeline /s"] = pipeline
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--turns", type=at_least(3), default=15, help="default: %(default)s")
    parser.add_argument("--dtype-policy", default="float32", help="such as mixed_bfloat16")
    parser.add_argument("--batch-size", type=at_least(1), help="default: the net's own")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_training"))
    arguments = parser.parse_args()
    keras.config.set_dtype_policy(arguments.dtype_policy)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tqdm(total=len(arguments.nets) * arguments.turns, unit="turn") as bar:
        for net in arguments.nets:
            bar.set_description(net)
            batch_size = arguments.batch_size or NETS[net][2]
            measured = measure(net, batch_size, arguments.turns, bar)
            rows.append(row_of(net, batch_size, *measured))
            with (
                experiments.replace_file(arguments.out / "training.csv") as path,
                path.open("w", newline="") as file,
            ):
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    header = ("net", "ours /s", "Keras /s", "none /s", "ours/Keras", "ours/none", "pipeline /s")
    print("{:>20} {:>9} {:>9} {:>9} {:>11} {:>10} {:>12}".format(*header))
    for r in rows:
        print(
            f"{r['net']:>20} {r['keras_norm /s']:9.0f} {r['keras /s']:9.0f} {r['none /s']:9.0f} "
            f"{r['ours over keras']:11.2f} {r['ours over none']:10.2f} {r['pipeline /s']:12.0f}"
        )
    print(f"Examples per second, medians of {arguments.turns} alternating turns of `fit`.")
    print(f"{experiments.describe_machine()['summary']}; {arguments.out}/training.csv")


if __name__ == "__main__":
    main()

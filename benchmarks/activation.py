"""Would batch normalization be faster with the ReLU behind it built in? TensorFlow only.

    python benchmarks/activation.py

A training step, at the shapes of the CIFAR-10 ConvNet in training.py, of three things that take
turns, all on TensorFlow's fused kernel: batch normalization alone; followed by ReLU, as in every
net here, so that the output of ReLU is kept for the gradient; and both as one function that keeps
only x and computes the sign of ReLU's input anew on its way back. The difference of the second and
the first is what the best fused kernel could save.
"""

import argparse
import csv
import pathlib
import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from keras_norm import experiments

SHAPES = [(128, 32, 32, 32), (128, 16, 16, 64), (128, 8, 8, 128)]
EPSILON = 1e-3


def alone(x, gamma, beta):
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON, is_training=True
    )[0]


def followed(x, gamma, beta):
    return tf.nn.relu(alone(x, gamma, beta))


@tf.custom_gradient
def recomputed(x, gamma, beta):
    """ReLU of batch normalization."""
    kernel = {"scale": gamma, "epsilon": EPSILON}
    y, _, _, mean, variance, saved = tf.raw_ops.FusedBatchNormV3(
        x=x, offset=beta, mean=[], variance=[], is_training=True, **kernel
    )

    def gradient(dz):
        again = tf.raw_ops.FusedBatchNormV3(
            x=x, offset=beta, mean=mean, variance=variance, is_training=False, **kernel
        )[0]
        return tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=tf.raw_ops.ReluGrad(gradients=dz, features=again),
            x=x,
            reserve_space_1=mean,
            reserve_space_2=variance,
            reserve_space_3=saved,
            is_training=True,
            **kernel,
        )[:3]

    return tf.nn.relu(y), gradient


CONTESTANTS = {"batch norm": alone, "then ReLU": followed, "recomputed": recomputed}


def step_of(function):
    """A compiled (x, gamma, beta, dz) -> the output and all gradients."""

    def step(*given):
        *inputs, dz = given
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            z = function(*inputs)
        return z, tape.gradient(z, inputs, dz)

    return tf.function(step, autograph=False)


def measure(shape, turns):
    """{contestant: seconds of every turn}, in turns of random order."""
    rng = np.random.default_rng(0)
    x, dz = (tf.constant(rng.standard_normal(shape, "float32")) for _ in range(2))
    given = x, tf.ones(shape[-1]), tf.zeros(shape[-1]), dz
    steps = {name: step_of(function) for name, function in CONTESTANTS.items()}
    for step in steps.values():
        step(*given)
    times = {name: [] for name in steps}
    for _ in range(turns):
        for name in rng.permutation(list(steps)):
            steps[name](*given)
            start = time.perf_counter()
            steps[name](*given)
            times[name].append(time.perf_counter() - start)
    return {name: np.array(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_relu"))
    arguments = parser.parse_args()
    if arguments.turns < 3:
        parser.error("--turns must be at least 3, for a median")
    rows = []
    for shape in tqdm(SHAPES, desc="shapes", unit="shape"):
        times = measure(shape, arguments.turns)
        row = {"shape": "x".join(map(str, shape)), "turns": arguments.turns}
        row |= {f"{name} ms": 1e3 * float(np.median(t)) for name, t in times.items()}
        ratios = times["then ReLU"] / times["recomputed"]
        rows.append(row | {"then ReLU over recomputed": float(np.median(ratios))})
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        experiments.replace_file(arguments.out / "activation.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    print(f"medians of {arguments.turns} turns; {arguments.out}/activation.csv")


if __name__ == "__main__":
    main()

"""Would batch normalization be faster with the ReLU behind it built in? TensorFlow only.

    python benchmarks/activation.py

A training step, at the shapes of the CIFAR-10 ConvNets in training.py, of three things that take
turns: batch normalization alone; followed by ReLU, as in every net here, so that the output of ReLU
is kept for the gradient; and both as one function that keeps only x and computes the sign of ReLU's
input anew on its way back. Once on TensorFlow's fused kernel, once as programs compiled by XLA. The
difference of the second and the first is what the best kernel could save.
"""

import argparse
import csv
import pathlib
import time

import numpy as np
import tensorflow as tf
from options import at_least
from tqdm import tqdm

from keras_norm import _kernels_xla, autodiff, experiments

SHAPES = [(128, 32, 32, 32), (128, 16, 16, 64), (128, 8, 8, 128)]
EPSILON = 1e-3


def fused(x, gamma, beta):
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON, is_training=True
    )[0]


@tf.custom_gradient
def fused_with_relu(x, gamma, beta):
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


def compiled(x, gamma, beta):
    return _kernels_xla.batch(x, gamma, beta, -1, EPSILON)[0]


def compiled_with_relu(x, gamma, beta):
    return autodiff.custom_vjp(*_halves_with_relu(x.shape[1:]), x, gamma, beta)[0]


def _halves_with_relu(sizes):
    normalized, gradients = _kernels_xla._programs_of_batch(sizes, "float32", EPSILON, True, True)

    def program(x, gamma, beta):
        y, *statistics = normalized(x, gamma, beta)
        return tf.nn.relu(y), *statistics

    def slopes(dz, x, gamma, beta, mean, inv_std):
        again = (x - mean) * (inv_std * gamma) + beta
        return gradients(tf.where(again > 0, dz, 0.0), x, gamma, mean, inv_std)

    def forward(x, gamma, beta):
        z, mean, _, inv_std = autodiff.compiled(program)(x, gamma, beta)
        return (z,), (x, gamma, beta, mean, inv_std)

    def backward(residuals, upstream):
        return autodiff.compiled(slopes)(upstream[0], *residuals)

    return forward, backward


KERNELS = {"fused": (fused, fused_with_relu), "compiled": (compiled, compiled_with_relu)}


def contestants(kernel):
    alone, as_one = KERNELS[kernel]
    return {
        "batch norm": alone,
        "then ReLU": lambda *given: tf.nn.relu(alone(*given)),
        "as one": as_one,
    }


def step_of(function):
    """A compiled (x, gamma, beta, dz) -> the output and all gradients."""

    def step(*given):
        *inputs, dz = given
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            z = function(*inputs)
        return z, tape.gradient(z, inputs, dz)

    return tf.function(step, autograph=False)


def measure(kernel, shape, turns):
    """{contestant: seconds of every turn}, in turns of random order."""
    rng = np.random.default_rng(0)
    x, dz = (tf.constant(rng.standard_normal(shape, "float32")) for _ in range(2))
    given = x, tf.ones(shape[-1]), tf.zeros(shape[-1]), dz
    steps = {name: step_of(function) for name, function in contestants(kernel).items()}
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
    parser.add_argument("--turns", type=at_least(3), default=60, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_relu"))
    arguments = parser.parse_args()
    rows = []
    cases = [(kernel, shape) for kernel in KERNELS for shape in SHAPES]
    for kernel, shape in tqdm(cases, desc="shapes", unit="shape"):
        times = measure(kernel, shape, arguments.turns)
        row = {"kernel": kernel, "shape": "x".join(map(str, shape)), "turns": arguments.turns}
        row |= {f"{name} ms": 1e3 * float(np.median(t)) for name, t in times.items()}
        ratios = times["then ReLU"] / times["as one"]
        rows.append(row | {"then ReLU over as one": float(np.median(ratios))})
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

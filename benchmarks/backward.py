"""Two ways to the gradient of batch normalization: step by step, and by the simplified formula.

    python benchmarks/backward.py                 # (100, 500), float64, as in the course
    python benchmarks/backward.py --shape 1024,256 --turns 300

Both begin with what the forward pass has left, and give dx, dgamma and dbeta. Step by step: one
node of the computation graph after the other, (G8) to (G1) of
`functional.batch_normalization_backward_by_graph`. Simplified: (B6), (B7) and (B10). In NumPy, in
turns of random order, after some that are not counted; the figures are medians of many turns, with
the quartiles beside them, and the ratio is the median of the ratios within a turn.

Fresh memory may take longer than the formulas do: arrays that are freed can go back to the
operating system, which hands out the next ones page by page ("pages": so many for each pass). To
see the formulas alone, let the C library (glibc) keep what was freed, as in layers.py:

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647
"""

import argparse
import csv
import pathlib
import time

import numpy as np
from options import at_least, shape_of

from keras_norm import experiments
from keras_norm._machine import freed_memory, pages_taken

EPSILON = 1e-5
TURNS_BEFORE = 3  # of each way, not counted


def forward(x):
    """What both ways need of the forward pass."""
    centered = x - x.mean(axis=0)  # (N, C)
    std = np.sqrt((centered**2).mean(axis=0) + EPSILON)  # (N, C) -> (C,)
    return centered, std, 1 / std, centered / std


def step_by_step(dy, gamma, saved):
    centered, std, inv_std, x_hat = saved
    n = len(dy)
    dbeta = dy.sum(axis=0)  # (G8), (N, C) -> (C,)
    dgamma = (dy * x_hat).sum(axis=0)  # (G8)
    dx_hat = dy * gamma  # (G8)
    dinv_std = (dx_hat * centered).sum(axis=0)  # (G7)
    dcentered = dx_hat * inv_std  # (G7)
    dstd = -dinv_std / std**2  # (G6)
    dvariance = dstd / (2 * std)  # (G5)
    dsquared = dvariance / n  # (G4), the same for all N
    dcentered = dcentered + 2 * centered * dsquared  # (G3)
    dmean = -dcentered.sum(axis=0)  # (G2)
    return dcentered + dmean / n, dgamma, dbeta  # (G2) and (G1)


def simplified(dy, gamma, saved):
    _, _, inv_std, x_hat = saved
    n = len(dy)
    dbeta = dy.sum(axis=0)  # (B6), (N, C) -> (C,)
    dgamma = (dy * x_hat).sum(axis=0)  # (B7)
    return gamma * inv_std / n * (n * dy - dbeta - x_hat * dgamma), dgamma, dbeta  # (B10)


WAYS = {"step by step": step_by_step, "simplified": simplified}


def measure(shape, turns, calls=20):
    """{way: milliseconds of a pass in every turn}, {way: pages}, largest difference of dx."""
    rng = np.random.RandomState(231)
    x = 5 * rng.randn(*shape) + 12
    gamma, dy = rng.randn(shape[-1]), rng.randn(*shape)
    saved = forward(x)
    dx = {way: function(dy, gamma, saved)[0] for way, function in WAYS.items()}
    times, pages = ({way: [] for way in WAYS} for _ in range(2))
    for turn in range(-TURNS_BEFORE, turns):
        for way in rng.permutation(list(WAYS)):
            before, start = pages_taken(), time.perf_counter()
            for _ in range(calls):
                WAYS[way](dy, gamma, saved)
            taken = time.perf_counter() - start
            if turn < 0:
                continue
            times[way].append(1000 * taken / calls)
            if before is not None:
                pages[way].append((pages_taken() - before) / calls)
    difference = float(np.abs(dx["step by step"] - dx["simplified"]).max())
    return {way: np.array(t) for way, t in times.items()}, pages, difference


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--shape", type=shape_of("N,C"), default="100,500", help="N,C; default: %(default)s"
    )
    parser.add_argument("--turns", type=at_least(3), default=200, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_backward"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    times, pages, difference = measure(arguments.shape, arguments.turns)
    memory = freed_memory("numpy")
    row = {"shape": ",".join(map(str, arguments.shape)), "dtype": "float64", "memory": memory}
    row["turns"] = arguments.turns
    for way, t in times.items():
        low, median, high = (float(v) for v in np.quantile(t, [0.25, 0.5, 0.75]))
        row |= {f"{way} ms": median, f"{way} ms 25%": low, f"{way} ms 75%": high}
        row[f"{way} pages"] = round(np.median(pages[way])) if pages[way] else ""
        quartiles = f"quartiles {low:.4f} and {high:.4f}"
        print(f"{way:<13} {median:.4f} ms ({quartiles}), pages: {row[f'{way} pages']}")
    ratio = float(np.median(times["step by step"] / times["simplified"]))
    row |= {"step by step over simplified": ratio, "largest difference of dx": difference}
    with (
        experiments.replace_file(arguments.out / "backward.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    print(f"step by step over simplified: {ratio:.2f}, median of {arguments.turns} turns")
    print(f"freed memory is {memory}; pages taken by one pass, medians")
    print(f"{experiments.describe_machine()['summary']}; {arguments.out}/backward.csv")


if __name__ == "__main__":
    main()

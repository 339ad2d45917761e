"""How long `import keras_norm` takes beyond `import keras`.

    python benchmarks/imports.py
    KERAS_BACKEND=torch python benchmarks/imports.py --out results/bench_imports_torch

Fresh processes import Keras, then keras_norm, then its layers, and time each step; the figures are
medians over the processes. Processor time is that of all threads, which other work on the machine
lengthens less.
"""

import argparse
import csv
import pathlib
import statistics
import subprocess
import sys

from options import at_least

from keras_norm import experiments

PROGRAM = """
import time
for module in {!r}:
    wall, processor = time.perf_counter(), time.process_time()
    __import__(module)
    print(module, time.perf_counter() - wall, time.process_time() - processor)
"""
MODULES = ("keras", "keras_norm", "keras_norm.layers")


def seconds():
    """{module: (wall, processor)} of one fresh process."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(MODULES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()[-len(MODULES) :]]
    return {module: (float(wall), float(processor)) for module, wall, processor in lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=at_least(3), default=9, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_imports"))
    arguments = parser.parse_args()
    seconds()  # compiles the modules, and brings the files into memory
    times = [seconds() for _ in range(arguments.processes)]
    rows = []
    for module in MODULES:
        wall, processor = (statistics.median(t[module][i] for t in times) for i in range(2))
        row = {"module": module, "processes": arguments.processes}
        rows.append(row | {"s": wall, "processor s": processor})
        print(f"{module:>18}: {wall:.4f} s, of a processor {processor:.4f} s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        experiments.replace_file(arguments.out / "imports.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"after one another; medians of {arguments.processes}; {arguments.out}/imports.csv")


if __name__ == "__main__":
    main()

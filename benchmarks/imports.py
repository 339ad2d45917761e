"""How long `import keras_norm` takes beyond `import keras`.

    python benchmarks/imports.py
    KERAS_BACKEND=torch python benchmarks/imports.py --out results/bench_imports_torch

Every figure comes from a fresh process, and the three imports take turns. Each process prints the
time from its start of the import to the end, and the processor time of it, which other work on the
machine lengthens less.
"""

import argparse
import csv
import pathlib
import statistics
import subprocess
import sys

from keras_norm import experiments

IMPORTS = {
    "keras": "import keras",
    "keras_norm": "import keras, keras_norm",
    "keras_norm.layers": "import keras, keras_norm.layers",
}
PROGRAM = """
import time
wall, processor = time.perf_counter(), time.process_time()
{}
print(time.perf_counter() - wall, time.process_time() - processor)
"""


def seconds(statement):
    """(wall, processor) of one import in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(statement)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall, processor = map(float, done.stdout.split()[-2:])
    return wall, processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_imports"))
    arguments = parser.parse_args()
    if arguments.turns < 3:
        parser.error("--turns must be at least 3, for a median")
    for statement in IMPORTS.values():
        seconds(statement)  # compiles the modules, and brings the files into memory
    times = {name: [] for name in IMPORTS}
    for _ in range(arguments.turns):
        for name, statement in IMPORTS.items():
            times[name].append(seconds(statement))
    rows = []
    for name, measured in times.items():
        wall, processor = (statistics.median(kind) for kind in zip(*measured, strict=True))
        beyond = [
            statistics.median(a[i] - b[i] for a, b in zip(measured, times["keras"], strict=True))
            for i in range(2)
        ]
        rows.append(
            {
                "import": name,
                "turns": arguments.turns,
                "s": wall,
                "processor s": processor,
                "s beyond keras": beyond[0],
                "processor s beyond keras": beyond[1],
            }
        )
        print(f"{name:>18}: {wall:.3f} s, beyond keras {beyond[0]:+.4f} s", end="")
        print(f"; of a processor {processor:.3f} s, beyond keras {beyond[1]:+.4f} s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        experiments.replace_file(arguments.out / "imports.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"Medians of {arguments.turns} alternating turns; {arguments.out}/imports.csv")


if __name__ == "__main__":
    main()

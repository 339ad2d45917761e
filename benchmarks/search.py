"""Searches: memory of the processes that last, and what a second worker brings.

    python benchmarks/search.py                     # both, on digits
    python benchmarks/search.py --only memory --trials 100
    python benchmarks/search.py --only workers --turns 3

Memory: a search of many short trials. After each it writes down the resident memory of every
process that lives as long as the search: the one that was started, the chief, the worker, and the
two nurseries that fork. Growth is the median of the last ten trials less that of the ten from the
fifth on. Linux only: it reads /proc.

Workers: the same search, of nets of one size, by one worker on one core, by two on a core each, and
by one on all cores. The times are those of the whole command, from its start to its end; from the
first trial's start to the end; and of training alone, summed over the trials. Nothing else should
be running.
"""

import argparse
import csv
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from options import at_least
from tqdm import tqdm

from keras_norm import experiments, tuning

MEBIBYTE = 2**20
EARLY = 5  # trials, after which everything has been imported and run once
SHORT = "--threads 1 --data digits --subset 300 --epochs 1 --fix family=mlp"
SHARES = {  # name -> workers, cores of each
    "two workers, one core each": (2, 1),
    "one worker, one core": (1, 1),
    "one worker, all cores": (1, None),
}
ONE_SIZE = (
    "--data digits --fix family=cnn normalization=batch activation=relu augmentation=none "
    "batch_size=64 optimizer=adam cnn_stages=2 cnn_width=32 cnn_growth=1.5 cnn_blocks=2 "
    "cnn_kernel=3 cnn_downsample=max_pool cnn_residual=true cnn_head=average"
)


def started(out, options, workers, trials):
    """The command `keras-norm tune`, running."""
    command = [sys.executable, "-m", "keras_norm", "tune", "--quiet", "--out", out]
    command += [*shlex.split(options), "--workers", str(workers), "--trials", str(trials)]
    return subprocess.Popen(command)


def ended(search):
    if search.wait():
        raise SystemExit(f"The search ended with status {search.returncode}.")


# Memory -------------------------------------------------------------------------------------


def lasting(root):
    """Name -> MiB resident, of a search's processes that live as long as it does."""
    found = {"search": resident(root)}
    for nursery in children(root):
        found["nursery"] = resident(nursery)
        for pid in children(nursery):
            name = read(f"/proc/{pid}/comm").strip().removeprefix("kn-")
            if name == "chief" or name.startswith("worker"):
                found[name] = resident(pid)
                for own in children(pid):
                    found[f"nursery of {name}"] = resident(own)
    return found


def read(path):
    try:
        return pathlib.Path(path).read_text()
    except OSError:  # it has just ended
        return ""


def children(pid):
    return [
        int(child)
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")
        for child in read(path).split()
    ]


def resident(pid):
    fields = read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE if fields else 0.0


def trials_done(out):
    text = read(out / "oracle.json")
    return len(json.loads(text)["end_order"]) if text else 0


def memory(trials, period):
    """A row for each number of trials that are done, all with the same names."""
    rows = []
    bar = tqdm(total=trials, unit="trial", disable=None)
    with tempfile.TemporaryDirectory() as folder, bar:
        out = pathlib.Path(folder) / "search"
        begun, search = time.monotonic(), started(out, SHORT, 1, trials)
        while search.poll() is None:
            sizes = lasting(search.pid)
            bar.n = trials_done(out)
            there = "nursery of worker-0" in sizes and "chief" in sizes
            is_new = not rows or bar.n > rows[-1]["trials"]
            if there and is_new and min(sizes.values()) > 0:
                row = {"seconds": round(time.monotonic() - begun, 1), "trials": bar.n}
                sizes = {name: round(size, 2) for name, size in sizes.items()}
                rows.append({**row, **sizes, "all": round(sum(sizes.values()), 2)})
            bar.refresh()
            time.sleep(period)
        ended(search)
    return rows


def growth(rows, name):
    """MiB, from soon after the first trials to the last."""
    early = [r[name] for r in rows if r["trials"] >= EARLY][:10]
    late = [r[name] for r in rows][-10:]
    return statistics.median(late) - statistics.median(early)


def measure_memory(trials, period, out):
    rows = memory(trials, period)
    write(out / "search_memory.csv", rows)
    print(f"Resident memory over a search of {trials} trials, MiB:")
    for name in list(rows[-1])[2:]:
        early = next(r[name] for r in rows if r["trials"] >= EARLY)
        print(f"{name:>20} {early:8.1f} after trial {EARLY}; growth {growth(rows, name):+6.1f}")


# Workers ------------------------------------------------------------------------------------


def timed(workers, threads, trials, epochs):
    """Seconds, under their names in the table; and the table of the trials without times."""
    options = f"{ONE_SIZE} --epochs {epochs}" + (f" --threads {threads}" if threads else "")
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "search"
        begun = time.monotonic()
        search = started(out, options, workers, trials)
        while search.poll() is None and not any(out.glob("trial_*")):
            time.sleep(0.05)
        first = time.monotonic()
        ended(search)
        end = time.monotonic()
        found = tuning.load(out).trials
    if {t.status for t in found} != {"completed"}:
        raise SystemExit("A trial failed: the times say nothing.")
    table = [(t.values, t.history["val_accuracy"], t.history["val_loss"]) for t in found]
    training = sum(t.last("seconds") for t in found)
    times = {"seconds": end - begun, "trials s": end - first, "training s": training}
    return {name: round(time, 2) for name, time in times.items()}, table


def measure_workers(turns, trials, epochs, out):
    rows, tables = [], []
    with tqdm(total=len(SHARES) * turns, unit="search", disable=None) as bar:
        for turn in range(turns):
            for name in list(SHARES)[:: (-1) ** turn]:
                workers, threads = SHARES[name]
                times, table = timed(workers, threads, trials, epochs)
                if threads:  # with another number of threads, sums may be rounded otherwise
                    tables.append(table)
                rows.append({"turn": turn, "search": name, "trials": trials, "epochs": epochs})
                rows[-1] |= times
                write(out / "search_workers.csv", rows)
                bar.update()
    print(f"{trials} trials of {epochs} epochs, medians over {turns} turns, seconds:")
    for name in SHARES:
        whole, of_trials = (statistics.median(of(rows, name, t)) for t in ("seconds", "trials s"))
        print(f"{name:>26}: whole command {whole:6.1f}, its trials {of_trials:6.1f}")
    two, one, _ = SHARES
    for time_of, told in (("seconds", "whole command"), ("trials s", "its trials")):
        pairs = zip(of(rows, one, time_of), of(rows, two, time_of), strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{told:>14}: two workers {ratio:.2f} times as fast as one, one core each")
    same = all(table == tables[0] for table in tables)
    print(f"The searches on one core found {'the same' if same else 'DIFFERENT'} trials.")


def of(rows, name, column):
    return [row[column] for row in rows if row["search"] == name]


def write(path, rows):
    with experiments.replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=("memory", "workers"), help="default: both")
    parser.add_argument(
        "--trials", type=at_least(EARLY + 1), default=100, help="of memory, default: %(default)s"
    )
    parser.add_argument("--period", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--turns", type=at_least(1), default=1, help="of workers, default: %(default)s"
    )
    parser.add_argument(
        "--workers-trials", type=at_least(1), default=12, help="default: %(default)s"
    )
    parser.add_argument(
        "--workers-epochs", type=at_least(1), default=30, help="default: %(default)s"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_search"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "workers":
        measure_memory(arguments.trials, arguments.period, arguments.out)
    if arguments.only != "memory":
        measure_workers(
            arguments.turns, arguments.workers_trials, arguments.workers_epochs, arguments.out
        )
    print(f"{experiments.describe_machine()['summary']}; {arguments.out}")


if __name__ == "__main__":
    main()

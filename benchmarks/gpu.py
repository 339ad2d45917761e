"""The benchmarks of layers and of training on one GPU, under JAX and PyTorch, without TensorFlow.

    python benchmarks/gpu.py                       # each backend that is installed
    python benchmarks/gpu.py --backends torch --repeats 10 --out results/bench_gpu

Each backend runs in a process of its own. Everything that they print is kept in a log beside their
tables; a summary of the machine is in machine.json. Without a GPU it refuses, unless --any-device.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from options import at_least

HERE = pathlib.Path(__file__).parent
GPU_NAME = {
    "jax": "import jax; d = jax.devices()[0]; print(d.device_kind if d.platform == 'gpu' else '')",
    "torch": "import torch.cuda as c; print(c.get_device_name(0) if c.is_available() else '')",
}


def gpu_of(backend):
    """The name of the GPU that the backend sees, or an empty text."""
    command = [sys.executable, "-c", GPU_NAME[backend]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def run(backend, script, arguments, out):
    """Runs one benchmark under one backend; its exit status."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE / script, *arguments, "--out", out]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    with (out / f"{pathlib.Path(script).stem}.log").open("w") as log:
        result = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    print(f"\n{backend}, {script}: exit status {result.returncode}")
    lines = pathlib.Path(log.name).read_text().splitlines()
    print("\n".join(line for line in lines if "\r" not in line and "%|" not in line))
    return result.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--backends", nargs="+", choices=GPU_NAME, default=list(GPU_NAME))
    parser.add_argument(
        "--repeats", type=at_least(3), default=30, help="turns (default: %(default)s)"
    )
    parser.add_argument("--any-device", action="store_true", help="also without a GPU")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench_gpu"))
    arguments = parser.parse_args()
    backends = [b for b in arguments.backends if importlib.util.find_spec(b)]
    if not backends:
        parser.error(f"none of {arguments.backends} is installed")
    gpus = {b: gpu_of(b) for b in backends}
    if not (any(gpus.values()) or arguments.any_device):
        parser.error("no GPU is in sight of " + ", ".join(backends) + "; --any-device runs anyway")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "machine.json").write_text(json.dumps({"gpu": gpus}, indent=1))
    failed = 0
    for backend in backends:
        out, repeats = arguments.out / backend, ["--repeats", str(arguments.repeats)]
        layers = ["--layers", "batch", "layer", "rms", "group"]
        failed += run(backend, "layers.py", [*layers, *repeats], out) != 0
        turns = ["--turns", str(max(3, arguments.repeats // 2))]
        failed += run(backend, "training.py", turns, out) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()

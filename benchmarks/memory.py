"""Peak memory of one training step of a normalization layer, beyond its input and gradient.

The step returns its output and all gradients, which stand in memory at its end.

    python benchmarks/memory.py                       # batch normalization at 256,32,32,64
    python benchmarks/memory.py --layers batch layer group --shape 128,32,32,32

Each figure comes from a process of its own: the highest resident memory of the second step less
that before it, in units of the input's size. (The first compiles, which takes some 20 MiB for a
while.) TensorFlow with oneDNN keeps what was freed, and a second step finds it there: then it is
the first step's. Linux only: it resets the peak that the kernel keeps.
"""

import argparse
import contextlib
import ctypes
import gc
import pathlib
import subprocess
import sys

from options import at_least, check_groups, shape_of

MEBIBYTE = 2**20
LAYERS = ["batch", "layer", "rms", "group"]


def resident(field):
    """A field of this process's status, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def give_back():
    """What was freed, to the operating system: else the step could take it up unseen."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def one(kind, who, shape):
    """Measures in this process, and prints bytes, and whether freed memory was returned."""
    import layers as benchmark
    import numpy as np
    from keras import layers as keras_layers
    from keras import ops

    from keras_norm import layers

    name, _, arguments, _ = benchmark.LAYERS[kind]
    layer = getattr({"keras_norm": layers, "keras": keras_layers}[who], name)(**arguments)
    layer.build(shape)
    step = benchmark.step_of(layer, training=True)
    small = [ops.ones((2, *shape[1:])) for _ in range(2)]
    step(*small)  # what the libraries allocate once
    rng = np.random.default_rng(0)
    x, dy = (ops.convert_to_tensor(rng.standard_normal(shape, "float32")) for _ in range(2))
    if hasattr(step, "get_concrete_function"):
        step.get_concrete_function(x, dy)

    def peak():
        gc.collect()
        give_back()
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        results = step(x, dy)  # the output first; all kept
        ops.convert_to_numpy(ops.sum(results[0]))  # waits for it
        return resident("VmHWM") - before

    first, second = peak(), peak()
    returned = second > first / 2
    print(second if returned else first, int(returned))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["batch"])
    parser.add_argument("--shape", type=shape_of(), default="256,32,32,64", metavar="N,…,C")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = arguments.shape
    check_groups(parser, arguments.layers, [shape])
    if arguments.one:
        one(*arguments.one.split(":"), shape)
        return
    size = 4
    for n in shape:
        size *= n
    print(f"input of {shape}: {size / MEBIBYTE:.0f} MiB; peak of a step beyond x and dy:")
    kept = False
    for kind in arguments.layers:
        peaks = {}
        for who in ("keras_norm", "keras"):
            command = [sys.executable, __file__, "--one", f"{kind}:{who}"]
            command += ["--shape", ",".join(map(str, shape))]
            said = [
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                for _ in range(arguments.repeats)
            ]
            peaks[who] = sorted(int(peak) for peak, _ in said)[arguments.repeats // 2]
            kept |= any(returned == "0" for _, returned in said)
        text = ", ".join(
            f"{w} {p / MEBIBYTE:.0f} MiB ({p / size:.1f} inputs)" for w, p in peaks.items()
        )
        print(f"{kind:>6}: {text}; ours / Keras's {peaks['keras_norm'] / peaks['keras']:.2f}")
    if kept:
        print("freed memory is kept here: peaks of the first step, which compiles as well")


if __name__ == "__main__":
    main()

"""The table of implementations, and how one is chosen from it.

`TABLE` lists the implementations of each function, the fastest first. An entry states its needs,
without which it cannot be used, and where it pays, as measured by benchmarks/layers.py. The first
entry that pays, and whose needs are met, is used; if there is none, the composed function is, which
needs nothing.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_norm import autodiff, functional
from keras_norm._kernels_common import FEWEST_CHANNELS_FUSED, on_gpu
from keras_norm._kernels_fused import columns_of

Shape = tuple[int | None, ...]
Axis = int | Sequence[int]

# TensorFlow's fused kernel for bfloat16 on a CPU takes ten times as long if the number of channels
# is not a multiple of this (AVX-512's vectors of float32): 23.4 ms for 24 channels, 2.2 ms for 32.
CHANNELS_OF_BFLOAT16 = 16
# Rows with fewer elements in total lose more by the fused kernel's call than they gain by the
# passes that it saves.
FEWEST_ELEMENTS_FUSED = 2**18
# So do images with no more than this in inference, if there are so many channels that spreading
# them costs nothing. Keras / fused and / composed: .94 and 1.01 at (16, 2, 2, 768), .87 and .99 at
# (1, 7, 7, 512); but .98 and .93 at (64, 8, 8, 16), 1.11 and .83 at (12, 8, 8, 256)
# (layers_tensorflow_small_inference_avx512.csv). At (16, 4, 4, 512) it is 1.04 and .95 with oneDNN
# and AVX-512, .80 with Eigen's kernel (layers_tensorflow_small_batches.csv).
MOST_ELEMENTS_COMPOSED = 2**17
MOST_ELEMENTS_COMPOSED_WITH_AVX512 = 3 * 2**15
MANY_CHANNELS = 128
# With fewer elements, a step gains too little to wait for the compiler. A batch of unknown size
# counts as Keras's default batch size.
FEWEST_ELEMENTS_COMPILED = 2**14
UNKNOWN_SIZE = 32
# With fewer elements, the time of a step in a graph is that of its calls. For batch normalization
# the composed implementation is fastest then, for layer and RMS normalization `x_hat`. Keras's
# batch normalization / composed and / compiled: 1.5 and 1.2 at (128, 700), 1.1 and 1.3 at (384,
# 256) (layers_tensorflow_small_rows.csv). Its layer normalization / x_hat and / compiled: 1.15 and
# 1.07 at (256, 256), 1.41 and 1.34 at (768, 100), 1.38 and 1.45 at (128, 700); its RMS
# normalization: .99 and .90, .99 and .96, .94 and 1.01, and 1.08 and 1.33 at (384, 256)
# (layers_tensorflow_small_rows_avx512.csv).
FEWEST_ELEMENTS_OF_BATCH = 3 * 2**15
FEWEST_ELEMENTS_OF_ROWS = {"layer_normalization": 9 * 2**13, "rms_normalization": 3 * 2**15}
# If channels are so few that a vector of the processor holds several rows, rows are slow one by
# one: where `compiled` lays them side by side, it is faster on fewer elements, too.
FEW_CHANNELS = 16
# Outside of graphs a function is compiled for this many shapes of each number of channels; in
# inference only after this many calls, because compiling takes as long as many calls, and a model
# may be called only once.
SHAPES_COMPILED = 6
CALLS_BEFORE_COMPILED = 10

HALVES = ("float16", "bfloat16")


class Here(NamedTuple):
    """What a choice depends on besides the case: see `here`."""

    backend: str
    accelerated: bool
    distributed: bool
    compiles: bool
    in_graph: bool
    inside_xla: bool
    fused_by: str


class Case(NamedTuple):
    """What is asked. Unknown sizes are None in `shape`; `axes` are >= 0 and ascending."""

    function: str
    shape: Shape
    dtype: str
    axes: tuple[int, ...]
    weighted: bool
    training: bool
    here: Here

    @property
    def channels(self) -> int | None:
        return self.shape[self.axes[0]]

    @property
    def known_elements(self) -> int:
        """The number of elements if every unknown size is 1."""
        return math.prod(size or 1 for size in self.shape)

    @property
    def likely_elements(self) -> int:
        """The number of elements if every unknown size is `UNKNOWN_SIZE`."""
        return math.prod(UNKNOWN_SIZE if size is None else size for size in self.shape)

    @property
    def rows(self) -> bool:
        """Whether there are only examples and channels."""
        return len(self.shape) == 2


class Need(NamedTuple):
    """A rule, in the words of an error, and whether a case satisfies it."""

    rule: str
    holds: Callable[[Case], bool]


def _on(*backends: str) -> Need:
    return Need(f"the backend {' or '.join(backends)}", lambda case: case.here.backend in backends)


TENSORFLOW, TORCH, JAX = _on("tensorflow"), _on("torch"), _on("jax")
SUMS = _on("tensorflow", "jax")
CHANNELS = Need(
    "channels of known size on one of two axes or more",
    lambda case: len(case.axes) == 1 and len(case.shape) > 1 and case.channels is not None,
)
CHANNELS_LAST = Need(
    "channels of known size on the last of two axes or more",
    lambda case: CHANNELS.holds(case) and case.axes == (len(case.shape) - 1,),
)
POSITIONS = Need("three axes or more", lambda case: len(case.shape) > 2)
LAST_AXES = Need(
    "known sizes on `axis`, the last axes",
    lambda case: (
        case.axes == tuple(range(len(case.shape) - len(case.axes), len(case.shape)))
        and len(case.axes) < len(case.shape)
        and None not in (case.shape[a] for a in case.axes)
    ),
)
KNOWN_EXAMPLE = Need("known sizes of an example", lambda case: None not in case.shape[1:])
ALL_KNOWN = Need("known sizes", lambda case: None not in case.shape)
NO_WEIGHTS = Need("no weights", lambda case: not case.weighted)
NO_HALF = Need("float32 or float64", lambda case: case.dtype in ("float32", "float64"))
NO_HALF_ON_JAX = Need(
    "float32 or float64 on JAX", lambda case: case.here.backend != "jax" or NO_HALF.holds(case)
)
NO_DOUBLE = Need("float32 or half precision", lambda case: case.dtype in ("float32", *HALVES))


class Entry(NamedTuple):
    """An implementation by name, what it needs, and whether it is then the fastest one left."""

    name: str
    needs: tuple[Need, ...]
    pays: Callable[[Case], bool]

    def is_possible(self, case: Case) -> bool:
        return all(need.holds(case) for need in self.needs)


def _always(case: Case) -> bool:
    return True


def _of_a_dtype_with_kernels(case: Case) -> bool:
    """On CPUs TensorFlow has kernels for bfloat16; no backend has them for float16."""
    return NO_HALF.holds(case) or (case.dtype == "bfloat16" and case.here.backend == "tensorflow")


def _suits_the_fused_kernel(case: Case) -> bool:
    channels = case.channels or 0
    large = not case.rows or case.known_elements >= FEWEST_ELEMENTS_FUSED
    return large and channels >= FEWEST_CHANNELS_FUSED and _is_quick_fused(channels, case.dtype)


def _suits_the_kernel_of_onednn(case: Case) -> bool:
    return _suits_the_fused_kernel(case) and case.here.fused_by == "oneDNN"


def _suits_inference_by_the_fused_kernel(case: Case) -> bool:
    if case.rows:
        small = case.known_elements < FEWEST_ELEMENTS_FUSED
    else:
        all_known, many_channels = None not in case.shape, (case.channels or 0) >= MANY_CHANNELS
        with_avx512 = case.here.fused_by == "oneDNN"
        most = MOST_ELEMENTS_COMPOSED_WITH_AVX512 if with_avx512 else MOST_ELEMENTS_COMPOSED
        small = all_known and many_channels and case.known_elements <= most
        small = small and case.here.in_graph and case.dtype == "float32"  # eager calls cost time
    return not small and _is_quick_fused(columns_of(case.shape), case.dtype)


def _is_quick_fused(columns: int, dtype: str) -> bool:
    return dtype == "float32" or (dtype == "bfloat16" and columns % CHANNELS_OF_BFLOAT16 == 0)


def _pays_to_compile(case: Case) -> bool:
    """In training; and in inference outside of graphs, or inside code that is compiled anyway.

    A graph may be exported to a place without XLA. With sequences of many lengths, each length
    would be compiled separately.
    """
    in_plain_graph = case.here.in_graph and not case.here.inside_xla
    if (in_plain_graph and not case.training) or None in case.shape[1:]:
        return False
    return case.likely_elements >= FEWEST_ELEMENTS_COMPILED and case.here.compiles


def _is_small_step(case: Case, fewest: int) -> bool:
    """In a TensorFlow graph that is not compiled as a whole; `fewest` for known sizes."""
    if not (case.training and case.here.in_graph) or case.here.inside_xla:
        return False
    return case.likely_elements < (FEWEST_ELEMENTS_COMPILED if None in case.shape else fewest)


def _is_small_step_of_rows(case: Case) -> bool:
    return _is_small_step(case, FEWEST_ELEMENTS_OF_ROWS[case.function])


def _of_batch(name: str, *needs: Need, pays: Callable[[Case], bool] = _always) -> Entry:
    def pays_for_its_calls(case: Case) -> bool:
        if not _of_a_dtype_with_kernels(case) or not pays(case):
            return False
        narrow = (case.channels or 0) < FEW_CHANNELS
        return narrow or not _is_small_step(case, FEWEST_ELEMENTS_OF_BATCH)

    return Entry(name, (*needs, NO_WEIGHTS), pays_for_its_calls)


_BATCH = (
    _of_batch("native", TORCH, CHANNELS, NO_HALF),
    _of_batch(
        "staged",
        JAX,
        CHANNELS_LAST,
        NO_HALF,
        ALL_KNOWN,
        pays=lambda case: not case.rows and not case.here.distributed,
    ),
    _of_batch("fused", TENSORFLOW, CHANNELS_LAST, NO_DOUBLE, pays=_suits_the_kernel_of_onednn),
    _of_batch("compiled", TENSORFLOW, CHANNELS_LAST, KNOWN_EXAMPLE, pays=_pays_to_compile),
    _of_batch("fused", TENSORFLOW, CHANNELS_LAST, NO_DOUBLE, pays=_suits_the_fused_kernel),
    _of_batch(
        "folded",
        SUMS,
        CHANNELS_LAST,
        NO_HALF_ON_JAX,
        pays=lambda case: (
            case.here.backend == "tensorflow"
            or (ALL_KNOWN.holds(case) and not case.here.distributed)
        ),
    ),
)
_NORMALIZE = (
    Entry("native", (TORCH, CHANNELS, NO_HALF), _always),
    Entry(
        "compiled",
        (TENSORFLOW, CHANNELS_LAST),
        lambda case: (
            not case.here.in_graph
            and case.known_elements >= FEWEST_ELEMENTS_OF_BATCH
            and _pays_to_compile(case)
        ),
    ),
    Entry("fused", (TENSORFLOW, CHANNELS_LAST, NO_DOUBLE), _suits_inference_by_the_fused_kernel),
)
_LAYER = (
    Entry("native", (TORCH, LAST_AXES, NO_HALF), _always),
    Entry("x_hat", (TENSORFLOW, LAST_AXES), _is_small_step_of_rows),
    Entry("compiled", (TENSORFLOW, LAST_AXES), _pays_to_compile),
    Entry("products", (SUMS, LAST_AXES), _always),
)
_GROUP = (
    Entry("native", (TORCH, CHANNELS_LAST, POSITIONS, NO_HALF), _always),
    Entry("compiled", (TENSORFLOW, CHANNELS_LAST, POSITIONS, KNOWN_EXAMPLE), _pays_to_compile),
    Entry("by_channel", (SUMS, CHANNELS_LAST, POSITIONS), _always),
)

TABLE: dict[str, tuple[Entry, ...]] = {
    "batch_normalization": _BATCH,
    "normalize": _NORMALIZE,
    "layer_normalization": _LAYER,
    "rms_normalization": _LAYER,
    "group_normalization": _GROUP,
    "instance_normalization": _GROUP,
}


def implementation_for(
    function: str,
    shape: Sequence[int | None],
    dtype: str,
    axis: Axis,
    *,
    weighted: bool = False,
    training: bool = False,
    x: Any = None,
) -> str:
    """The name of the implementation that is used when none is asked for."""
    # An axis that is not an int is checked here: to the cache, 1 and 1.0 are the same.
    axes: Any = axis if type(axis) is int else functional.canonical_axes(axis, len(shape))
    forced, shape = forced_implementation(), tuple(shape)
    # `torch.compile` warns about functions with a cache, and its sizes cannot be looked up.
    choose = _choose if _is_recorded() else _chosen
    asked, now = (function, shape, dtype, axes, weighted, bool(training)), here(x, training)
    name = choose(*asked, now, forced)
    if name == "compiled" and name != forced and not _comes_again(function, shape, bool(training)):
        return choose(*asked, now._replace(compiles=False), forced)
    return name


def _choose(
    function: str,
    shape: Shape,
    dtype: str,
    axis: int | tuple[int, ...],
    weighted: bool,
    training: bool,
    here: Here,
    forced: str | None,
) -> str:
    axes = functional.canonical_axes(axis, len(shape))
    case = Case(function, shape, dtype, axes, weighted, training, here)
    able = [entry for entry in TABLE[function] if entry.is_possible(case)]
    if forced and (forced == "composed" or forced in [entry.name for entry in able]):
        return forced
    if here.accelerated:
        return "composed"
    return next((entry.name for entry in able if entry.pays(case)), "composed")


_chosen = functools.lru_cache(maxsize=1024)(_choose)


def here(x: Any = None, training: bool = False) -> Here:
    """What this process runs on, as far as the choice depends on it; `x` as in `on_gpu`."""
    backend = autodiff.checked_backend()
    tensorflow, inside_xla = backend == "tensorflow", autodiff.inside_xla()
    in_graph = tensorflow and autodiff.in_graph()
    may_compile = tensorflow and (training or inside_xla or not in_graph)
    return Here(
        backend,
        on_gpu(x),
        backend == "jax" and keras.distribution.distribution() is not None,
        may_compile and autodiff.can_compile(),
        in_graph,
        inside_xla,
        fused_by() if tensorflow else "",
    )


def check_possible(
    name: str, function: str, shape: Sequence[int | None], dtype: str, axis: Axis, weighted: bool
) -> None:
    """Refuses an implementation that was asked for and cannot be used."""
    if name == "composed":
        return
    axes = functional.canonical_axes(axis, len(shape))
    case = Case(function, tuple(shape), dtype, axes, weighted, False, here())
    entries = {entry.name: entry for entry in TABLE[function]}
    if name not in entries:
        raise ValueError(
            f"`implementation` of {function} must be one of {['composed', *entries]}, or None for "
            f"the fastest. Received: implementation={name!r}."
        )
    if broken := [need.rule for need in entries[name].needs if not need.holds(case)]:
        raise ValueError(
            f"implementation={name!r} of {function} needs {', '.join(broken)}. Received: "
            f"backend={case.here.backend!r}, shape={case.shape}, axis={axis!r}, dtype={dtype!r}, "
            f"weighted={weighted}. Leave it to None."
        )


_VARIABLE = "KERAS_NORM_IMPLEMENTATION"


def is_forced() -> bool:
    """Whether KERAS_NORM_IMPLEMENTATION names an implementation."""
    return bool(os.environ.get(_VARIABLE))


def forced_implementation() -> str | None:
    """The implementation that KERAS_NORM_IMPLEMENTATION names, or None."""
    name = os.environ.get(_VARIABLE)
    if not name:
        return None
    known = {"composed", *(entry.name for entries in TABLE.values() for entry in entries)}
    if name not in known:
        raise ValueError(
            "The environment variable KERAS_NORM_IMPLEMENTATION must name an implementation, one "
            f"of {sorted(known)}, or be empty. Received: KERAS_NORM_IMPLEMENTATION={name!r}."
        )
    return name


def _comes_again(function: str, shape: Shape, training: bool) -> bool:
    """Whether a shape is likely to recur: outside of graphs, a known size may never come again."""
    if autodiff.in_graph():
        return True
    met = _MET.setdefault((function, training, len(shape), shape[-1]), collections.Counter())
    if shape in met or len(met) < SHAPES_COMPILED:
        met[shape] += 1
    return met[shape] >= (1 if training else CALLS_BEFORE_COMPILED)


_MET: dict[tuple[Any, ...], collections.Counter[Shape]] = {}


def _is_recorded() -> bool:
    if keras.backend.backend() != "torch":
        return False
    import torch

    return bool(torch.compiler.is_compiling())


@functools.lru_cache(maxsize=1)
def fused_by() -> str:
    """Whose kernel TensorFlow's fused one is on this CPU.

    TensorFlow uses oneDNN's by default on CPUs with AVX-512's later instructions, for which it was
    written, and elsewhere if TF_ENABLE_ONEDNN_OPTS=1 is set.
    """
    try:
        from tensorflow.python.util import _pywrap_util_port

        if not _pywrap_util_port.IsMklEnabled():
            return "Eigen"
    except (ImportError, AttributeError):
        return "Eigen"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "oneDNN"
    return "oneDNN" if "avx512" in flags else "oneDNN without AVX-512"

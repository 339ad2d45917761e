"""Each normalization on the fastest correct implementation for its backend, shape and dtype.

    implementation   what it is
    composed         the function of the same name in `functional`: keras.ops, any backend, shape
                     and dtype; compiled by XLA on JAX
    fused            TensorFlow's FusedBatchNormV3 and its gradient, float32 and half precision, for
                     means that are not far from 0 (see FARTHEST_MEAN); oneDNN's is the quickest,
                     Eigen's loses to `compiled`;
                     `normalize`: its inference mode, narrow rows laid side by side as below
    folded           TensorFlow, JAX: sums as products of matrices with ones; rows of few channels
                     are first laid side by side, (N H W, 6) -> (N H W / 16, 96), to fill a vector
    native           PyTorch: native_batch_norm and its gradient, for means that are not far from 0,
                     of many rows with statistics merged from parts; else, and for rows of few
                     channels, laid side by side as above, in pieces that stay in the cache;
                     layer, RMS, group and instance normalization: the function of torch.nn
    staged           JAX on a CPU: sums, over short runs of rows, then over the runs, of x less the
                     mean of every sixteenth row
    products         layer and RMS normalization: forward, sums of x less the mean of an example's
                     first sixteenth; backward, the sums over an example and over the examples as
                     products of matrices with gamma and with ones; x is kept
    compiled         TensorFlow without a GPU, in training: forward and backward as one program
                     each, which XLA compiles when it first meets arrays of these shapes; by
                     `training_step` with the step of batch normalization's moving statistics
    by_channel       group and instance normalization: sums channel by channel, added up within
                     the groups afterwards, so that scale and shift are one number for each
                     example and channel, and touch x in two sweeps

Here is the choice; "fused" is in `_kernels_fused`, "native" in `_kernels_torch`, "compiled" in
`_kernels_xla`, the rest in `_kernels_sums`.

`choose` and `choose_within` say which is taken; what that rests on is measured by
benchmarks/layers.py. The environment variable KERAS_NORM_IMPLEMENTATION, read whenever a function
is traced, names one to take wherever it can do what is asked (`make test-implementations`).

All of them give the numbers of `functional` to rounding, in at least float32; where a sum would
round more, the work is done anew by the composed one (`FARTHEST_MEAN`).
The mean and variance that come back are for moving statistics: no gradient flows through them.
"""

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_norm import (
    _kernels_fused,
    _kernels_sums,
    _kernels_torch,
    _kernels_xla,
    autodiff,
    functional,
)
from keras_norm._kernels_common import FEWEST_CHANNELS_FUSED, are_finite, dtype_name, on_gpu, tensor
from keras_norm._kernels_xla import training_step
from keras_norm.autodiff import custom_vjp

__all__ = [
    "IMPLEMENTATIONS",
    "are_finite",
    "batch_normalization",
    "choose",
    "choose_for",
    "choose_within",
    "dtype_name",
    "group_normalization",
    "instance_normalization",
    "layer_normalization",
    "normalize",
    "on_gpu",
    "rms_normalization",
    "tensor",
    "training_step",
]

Array = Any
Axis = int | Sequence[int]

# TensorFlow's fused kernel for bfloat16 on a CPU takes ten times as long where the channels are not
# a multiple of this (AVX-512's vectors of float32): 23.4 ms for 24 of them, 2.2 ms for 32.
CHANNELS_OF_BFLOAT16 = 16
# Rows of fewer elements (all together) lose more by the fused kernel's call than they gain by the
# sweeps that it saves.
FEWEST_ELEMENTS_FUSED = 2**18


def choose(
    shape: Sequence[int | None],
    dtype: str,
    *,
    axis: Axis = -1,
    weighted: bool = False,
    training: bool = False,
) -> str:
    """The implementation that `batch_normalization` takes when none is asked for.

    Args:
        shape: of the input; None for what is unknown.
        dtype: of the input, such as "float32".
        axis: as in `functional.batch_normalization`.
        weighted: whether there are weights (a mask).
        training: as in `batch_normalization`.

    Returns:
        A key of `IMPLEMENTATIONS`.

    Example:
        >>> choose((256, 32, 32, 64), "float64", weighted=True)
        'composed'
    """
    return _choose(shape, dtype, axis, weighted, training, on_gpu())


def _choose(
    shape: Sequence[int | None],
    dtype: str,
    axis: Axis,
    weighted: bool,
    training: bool,
    accelerated: bool,
) -> str:
    forced = _forced()
    if forced in IMPLEMENTATIONS and _can(forced, shape, dtype, axis, weighted):
        return forced
    axes = functional.canonical_axes(axis, len(shape))
    channels = shape[axes[0]]
    if weighted or len(axes) > 1 or len(shape) < 2 or channels is None:
        return "composed"
    last, backend = axes[0] == len(shape) - 1, keras.backend.backend()
    if accelerated or not (dtype in ("float32", "float64") or _is_half_here(dtype)):
        return "composed"
    if backend == "torch":
        return "native"
    if not last:
        return "composed"
    if backend == "jax":
        if keras.distribution.distribution() is not None or None in shape:
            return "composed"
        return "folded" if len(shape) == 2 else "staged"
    known = math.prod(size or 1 for size in shape)
    large = len(shape) > 2 or known >= FEWEST_ELEMENTS_FUSED
    suits = large and channels >= FEWEST_CHANNELS_FUSED and _is_quick_fused(channels, dtype)
    if suits and _fused_by() == "oneDNN":
        return "fused"
    if training and _pays_to_compile(shape) and autodiff.can_compile():
        return "compiled"
    return "fused" if suits else "folded"


@functools.lru_cache(maxsize=1)
def _fused_by() -> str:
    """Whose kernel TensorFlow's fused one is on this CPU.

    TensorFlow takes oneDNN's by itself where there are AVX-512's later instructions, for which it
    was written, and elsewhere when TF_ENABLE_ONEDNN_OPTS=1 tells it to.
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


def _is_half_here(dtype: str) -> bool:
    """Whether CPUs have kernels for it: bfloat16 on TensorFlow, float16 nowhere."""
    return dtype == "bfloat16" and keras.backend.backend() == "tensorflow"


def _is_quick_fused(columns: int, dtype: str) -> bool:
    if _is_half_here(dtype):
        return columns % CHANNELS_OF_BFLOAT16 == 0
    return dtype == "float32"


def _forced() -> str | None:
    name = os.environ.get("KERAS_NORM_IMPLEMENTATION")
    if not name:
        return None
    known = {*IMPLEMENTATIONS, *_FAST_WITHIN.values(), "compiled"}
    if name not in known:
        raise ValueError(
            "The environment variable KERAS_NORM_IMPLEMENTATION must name an implementation, one "
            f"of {sorted(known)}, or be empty. Received: KERAS_NORM_IMPLEMENTATION={name!r}."
        )
    return name


def choose_for(
    x: Array, *, axis: Axis = -1, weights: Array | None = None, training: bool = False
) -> str:
    """`choose` for an array: the implementation that `batch_normalization` takes for it.

    Args:
        x, axis, weights, training: as in `batch_normalization`.

    Returns:
        A key of `IMPLEMENTATIONS`.
    """
    dtype = dtype_name(x.dtype)
    return _choose(tuple(x.shape), dtype, axis, weights is not None, training, on_gpu(x))


def batch_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    weights: Array | None = None,
    training: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array, Array]:
    """As `functional.batch_normalization`, on the implementation that `choose` names.

    Args:
        x, gamma, beta, axis, epsilon, weights: as there.
        training: bool, whether this is a step of training, of which many will follow, so that it
            pays to compile it (TensorFlow). The numbers are the same to rounding.
        implementation: a key of `IMPLEMENTATIONS`, to force one. Default: what `choose` names.

    Returns:
        (y, mean, variance) as there; no gradient flows through mean and variance.

    Raises:
        ValueError: as there; and for an implementation that does not exist, or that cannot do
            what is asked of it.

    Example:
        >>> x = np.array([[1.0, 10.0], [3.0, 50.0]], "float32")
        >>> y, mean, variance = batch_normalization(x, epsilon=0.0)
        >>> print(np.asarray(mean).tolist(), np.asarray(variance).tolist())
        [2.0, 30.0] [1.0, 400.0]
    """
    functional.check_epsilon(epsilon)
    x = tensor(x)
    if implementation is None:
        implementation = choose_for(x, axis=axis, weights=weights, training=training)
    else:
        dtype = dtype_name(x.dtype)
        _check(implementation, tuple(x.shape), dtype, axis, weights is not None)
    if implementation == "composed":
        y, mean, variance = functional.batch_normalization(
            x, gamma, beta, axis=axis, epsilon=epsilon, weights=weights
        )
        return y, ops.stop_gradient(mean), ops.stop_gradient(variance)
    return IMPLEMENTATIONS[implementation](x, gamma, beta, axis, epsilon)


def _is_traced() -> bool:
    """Whether PyTorch records a graph; `torch.compile` warns of functions with a cache."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    return bool(torch.compiler.is_compiling())


def _check(
    implementation: str, shape: Sequence[int | None], dtype: str, axis: Axis, weighted: bool
) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be one of {sorted(IMPLEMENTATIONS)}, or None for the fastest. "
            f"Received: implementation={implementation!r}."
        )
    if not _can(implementation, shape, dtype, axis, weighted):
        wanted = _BACKENDS[implementation]
        raise ValueError(
            f"implementation={implementation!r} needs the backend {' or '.join(wanted)}, channels "
            "on one axis of known size"
            + ("" if implementation == "native" else ", the last one")
            + (", known sizes of an example" if implementation == "compiled" else "")
            + ", and no weights"
            + (", and no float64" if implementation == "fused" else "")
            + ("" if keras.backend.backend() == "tensorflow" else ", and float32 or float64")
            + f". Received: backend={keras.backend.backend()!r}, shape={tuple(shape)}, "
            f"axis={axis!r}, dtype={dtype!r}, weighted={weighted}. Leave it to None."
        )


_BACKENDS = {
    "compiled": ("tensorflow",),
    "fused": ("tensorflow",),
    "folded": ("tensorflow", "jax"),
    "native": ("torch",),
    "staged": ("jax",),
}


def _can(
    implementation: str, shape: Sequence[int | None], dtype: str, axis: Axis, weighted: bool
) -> bool:
    """Whether it can be done at all, quickly or not."""
    if implementation == "composed":
        return True
    axes = functional.canonical_axes(axis, len(shape))
    last = axes == (len(shape) - 1,)
    backend = keras.backend.backend()
    return (
        not weighted
        and backend in _BACKENDS[implementation]
        and len(shape) >= 2
        and (last or (implementation == "native" and len(axes) == 1))
        and shape[axes[0]] is not None
        and not (implementation == "fused" and dtype == "float64")
        and (backend == "tensorflow" or dtype in ("float32", "float64"))
        and not (implementation == "staged" and None in shape)
        and not (implementation == "compiled" and None in shape[1:])
    )


IMPLEMENTATIONS: dict[str, Any] = {
    "compiled": _kernels_xla.batch,
    "composed": functional.batch_normalization,
    "fused": _kernels_fused.batch,
    "folded": _kernels_sums.folded,
    "native": _kernels_torch.batch,
    "staged": _kernels_sums.staged,
}
"""Those of `batch_normalization` by name."""


# By given statistics: batch normalization in inference ------------------------------------------


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    implementation: str | None = None,
) -> Array:
    """As `functional.normalize`, on the implementation that `choose_within` names.

    Args:
        x, mean, variance, gamma, beta, axis, epsilon: as there.
        implementation: "composed", or "fused" ("native" on PyTorch). Default: what
            `choose_within` names.

    Returns:
        y, of the shape and dtype of x; differentiable in every array that was given.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> y = normalize(np.array([[5.0]], "float32"), np.array([3.0]), np.array([4.0]), epsilon=0)
        >>> float(y[0, 0])
        1.0
    """
    x = tensor(x)
    chosen = _chosen("normalize", x, axis, implementation)
    if chosen == "composed":
        return functional.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    functional.check_epsilon(epsilon)
    if chosen == "native" and not _kernels_torch.records():
        mean, variance = tensor(mean, x.dtype), tensor(variance, x.dtype)
        gamma, beta = (None if v is None else tensor(v, x.dtype) for v in (gamma, beta))
        return _kernels_torch.inference(x, mean, variance, gamma, beta, axis, epsilon)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        x: Array = arrays[0]
        dtype = functional.compute_dtype(x)
        mean, variance = (ops.cast(v, dtype) for v in arrays[1:3])
        gamma, beta = (None if v is None else ops.cast(v, dtype) for v in arrays[3:])
        if chosen == "native":
            y = _kernels_torch.inference(x, mean, variance, gamma, beta, axis, epsilon)
        else:
            y = _kernels_fused.inference(x, mean, variance, gamma, beta, epsilon)
        return (y,), (x, mean, ops.rsqrt(variance + epsilon), gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        return functional.normalize_backward(upstream[0], *residuals, axis=axis)

    (y,) = custom_vjp(forward, backward, x, mean, variance, gamma, beta)
    return y


# Within each example ------------------------------------------------------------------------------

# Of fewer elements a step has too little to gain to wait for the compiler. A batch of unknown size
# counts as Keras's default for it.
FEWEST_ELEMENTS_COMPILED = 2**14
UNKNOWN_SIZE = 32
# Outside of graphs, so many shapes are compiled for each number of channels.
SHAPES_COMPILED = 6

_FAST_WITHIN = {
    "normalize": "fused",
    "layer_normalization": "products",
    "rms_normalization": "products",
    "group_normalization": "by_channel",
    "instance_normalization": "by_channel",
}


_NEEDS = {
    "fused": "TensorFlow, the channels on the last axis, and float32 or half precision",
    "normalize": "channels on one axis of known size",
    "layer_normalization": "known sizes on `axis`, the last axes",
    "rms_normalization": "known sizes on `axis`, the last axes",
    "group_normalization": "the channels on the last of >= 3 axes",
    "instance_normalization": "the channels on the last of >= 3 axes",
}


def _fast_within(function: str) -> str:
    fast = _FAST_WITHIN[function]
    return "native" if keras.backend.backend() == "torch" else fast


def choose_within(
    function: str,
    shape: Sequence[int | None],
    dtype: str,
    *,
    axis: Axis = -1,
    training: bool = False,
) -> str:
    """The implementation that a function other than `batch_normalization` takes by itself.

    Args:
        function: "normalize", "layer_normalization", "rms_normalization", "group_normalization"
            or "instance_normalization".
        shape: of the input; None for what is unknown.
        dtype: of the input, such as "float32".
        axis: as the function takes it.
        training: as the function takes it.

    Returns:
        "composed", or a faster one: "fused", "native", "products", "compiled" or "by_channel".

    Example:
        >>> choose_within("layer_normalization", (32, 128, None), "float32")
        'composed'
    """
    return _choose_within(function, shape, dtype, axis, training, None)


def _choose_within(
    function: str,
    shape: Sequence[int | None],
    dtype: str,
    axis: Axis,
    training: bool,
    x: Array | None,
) -> str:
    axes: Any = tuple(axis) if isinstance(axis, list | tuple) else axis
    asked = (function, tuple(shape), dtype, axes, bool(training), _forced(), on_gpu(x))
    if _is_traced():  # symbolic sizes cannot be looked up
        return _decide_within(*asked)
    return _decided_within(*asked)


def _decide_within(
    function: str,
    shape: tuple[int | None, ...],
    dtype: str,
    axis: int | tuple[int, ...],
    training: bool,
    forced: str | None,
    accelerated: bool,
) -> str:
    fast = _fast_within(function)
    able = [i for i in ("compiled", fast) if _possible(function, i, shape, dtype, axis)]
    if forced == "composed" or forced in able:
        return forced
    if not able or accelerated:
        return "composed"
    if fast == "fused":
        known = math.prod(size or 1 for size in shape)
        small = len(shape) == 2 and known < FEWEST_ELEMENTS_FUSED
        if small or not _is_quick_fused(_kernels_fused.columns_of(shape), dtype):
            return "composed"
    if training and "compiled" in able and _pays_to_compile(shape) and autodiff.can_compile():
        return "compiled"
    return fast


def _pays_to_compile(shape: Sequence[int | None]) -> bool:
    """Where sequences are of many lengths, each would be compiled for itself."""
    if None in shape[1:]:
        return False
    sizes = (UNKNOWN_SIZE if size is None else size for size in shape)
    return math.prod(sizes) >= FEWEST_ELEMENTS_COMPILED and _comes_again(tuple(shape))


def _comes_again(shape: tuple[int | None, ...]) -> bool:
    """Whether to believe that: without a graph, every size is known, and may never be met again."""
    import tensorflow as tf

    if not tf.executing_eagerly():
        return True
    met = _MET.setdefault((len(shape), shape[-1]), set())
    if len(met) < SHAPES_COMPILED:
        met.add(shape)
    return shape in met


_MET: dict[tuple[int, int | None], set[tuple[int | None, ...]]] = {}


_decided_within = functools.lru_cache(maxsize=1024)(_decide_within)


def _possible(
    function: str, fast: str, shape: Sequence[int | None], dtype: str, axis: Axis
) -> bool:
    """Whether it can be done at all, on this backend, quickly or not."""
    axes = functional.canonical_axes(axis, len(shape))
    last = axes == (len(shape) - 1,)
    if fast == "compiled" and (function == "normalize" or keras.backend.backend() != "tensorflow"):
        return False
    if fast == "fused":
        tensorflow = keras.backend.backend() == "tensorflow"
        half = ("float16", "bfloat16")
        known = last and len(shape) > 1 and shape[-1] is not None
        return known and tensorflow and dtype in ("float32", *half)
    if fast == "native" and dtype not in ("float32", "float64"):
        return False
    if function == "normalize":
        return len(axes) == 1 and len(shape) > 1 and shape[axes[0]] is not None
    if function in ("group_normalization", "instance_normalization"):
        known = None not in (shape[1:] if fast == "compiled" else shape[-1:])
        return last and len(shape) > 2 and known
    trailing = axes == tuple(range(len(shape) - len(axes), len(shape)))
    return trailing and len(axes) < len(shape) and all(shape[a] is not None for a in axes)


def _chosen(
    function: str, x: Array, axis: Axis, implementation: str | None, training: bool = False
) -> str:
    shape, dtype = tuple(x.shape), dtype_name(x.dtype)
    if implementation is None:
        return _choose_within(function, shape, dtype, axis, training, x)
    fast = _fast_within(function)
    known = ["composed", fast]
    if function != "normalize" and keras.backend.backend() == "tensorflow":
        known.append("compiled")
    if implementation not in known:
        raise ValueError(
            f"`implementation` of {function} must be one of {known}, or None for the "
            f"fastest. Received: implementation={implementation!r}."
        )
    if implementation != "composed" and not _possible(function, implementation, shape, dtype, axis):
        raise ValueError(
            f"implementation={implementation!r} needs "
            + _NEEDS["fused" if fast == "fused" else function]
            + (", and float32 or float64" if fast == "native" else "")
            + (", known sizes of an example" if implementation == "compiled" else "")
            + f". Received: shape={shape}, axis={axis!r}, dtype={dtype!r}. Leave it to None."
        )
    return implementation


_ROWS: dict[str, Any] = {"products": _kernels_sums.products, "compiled": _kernels_xla.rows}

_GROUPED: dict[str, Any] = {
    "native": _kernels_torch.group,
    "by_channel": _kernels_sums.by_channel,
    "compiled": _kernels_xla.by_channel,
}


def layer_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    rms_scaling: bool = False,
    training: bool = False,
    implementation: str | None = None,
) -> Array:
    """As `functional.layer_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, beta, axis, epsilon, rms_scaling: as there. With `rms_scaling` always composed.
        training: as in `batch_normalization`.
        implementation: "composed", "products" or, on TensorFlow, "compiled" ("composed" or
            "native" on PyTorch). Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> y = layer_normalization(np.array([[1.0, 3.0]], "float32"), epsilon=0.0)
        >>> np.round(np.asarray(y), 5).tolist()
        [[-1.0, 1.0]]
    """
    x = tensor(x)
    chosen = _chosen("layer_normalization", x, axis, implementation, training)
    if chosen != "composed" and not rms_scaling:
        axes = len(axis) if isinstance(axis, list | tuple) else 1
        if chosen != "native":
            return _ROWS[chosen](x, gamma, beta, axes, epsilon, True)
        y = _kernels_torch.layer(x, gamma, beta, axes, epsilon, True)
        if y is not None:
            return y
    return functional.layer_normalization(
        x, gamma, beta, axis=axis, epsilon=epsilon, rms_scaling=rms_scaling
    )


def rms_normalization(
    x: Array,
    gamma: Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-6,
    training: bool = False,
    implementation: str | None = None,
) -> Array:
    """As `functional.rms_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, axis, epsilon: as there.
        training: as in `batch_normalization`.
        implementation: "composed", "products" or, on TensorFlow, "compiled" ("composed" or
            "native" on PyTorch). Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> y = rms_normalization(np.array([[3.0, 4.0]], "float32"), epsilon=0.0)
        >>> print(np.round(np.asarray(y), 4))
        [[0.8485 1.1314]]
    """
    x = tensor(x)
    chosen = _chosen("rms_normalization", x, axis, implementation, training)
    if chosen == "composed":
        return functional.rms_normalization(x, gamma, axis=axis, epsilon=epsilon)
    axes = len(axis) if isinstance(axis, list | tuple) else 1
    if chosen == "native":
        return _kernels_torch.layer(x, gamma, None, axes, epsilon, False)
    return _ROWS[chosen](x, gamma, None, axes, epsilon, False)


def group_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    groups: int | None = 32,
    axis: int = -1,
    epsilon: float = 1e-3,
    training: bool = False,
    implementation: str | None = None,
) -> Array:
    """As `functional.group_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, beta, groups, axis, epsilon: as there.
        training: as in `batch_normalization`.
        implementation: "composed", "by_channel" or, on TensorFlow, "compiled" ("composed" or
            "native" on PyTorch). Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> x = np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32")  # (N=1, T=2, C=2)
        >>> y = group_normalization(x, groups=2, epsilon=0.0, implementation="composed")
        >>> np.round(np.asarray(y), 5).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    x = tensor(x)
    functional.channel_axis(axis, len(x.shape))
    chosen = _chosen("group_normalization", x, axis, implementation, training)
    if chosen != "composed":
        count = functional.number_of_groups(groups, x.shape[-1])
        y = _GROUPED[chosen](x, gamma, beta, count, epsilon)
        if y is not None:
            return y
    return functional.group_normalization(x, gamma, beta, groups=groups, axis=axis, epsilon=epsilon)


def instance_normalization(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    training: bool = False,
    implementation: str | None = None,
) -> Array:
    """As `functional.instance_normalization`, on the implementation that `choose_within` names.

    Args:
        x, gamma, beta, axis, epsilon: as there.
        training: as in `batch_normalization`.
        implementation: "composed", "by_channel" or, on TensorFlow, "compiled" ("composed" or
            "native" on PyTorch). Default: what `choose_within` names.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError: as there, and for an implementation that cannot do what is asked of it.

    Example:
        >>> x = np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32")  # (N=1, T=2, C=2)
        >>> np.round(np.asarray(instance_normalization(x, epsilon=0.0)), 5).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    x = tensor(x)
    functional.check_spatial(len(x.shape))
    functional.channel_axis(axis, len(x.shape))
    chosen = _chosen("instance_normalization", x, axis, implementation, training)
    if chosen != "composed":
        y = _GROUPED[chosen](x, gamma, beta, x.shape[-1], epsilon)
        if y is not None:
            return y
    return functional.instance_normalization(x, gamma, beta, axis=axis, epsilon=epsilon)

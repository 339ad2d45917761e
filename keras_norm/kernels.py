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

`choose` and `choose_within` say which is taken; what that rests on is measured by
benchmarks/layers.py. The environment variable KERAS_NORM_IMPLEMENTATION, read whenever a function
is traced, names one to take wherever it can do what is asked (`make test-implementations`).

All of them give the numbers of `functional` to rounding, in at least float32; where a sum would
round more, the work is done anew by the composed one (`FARTHEST_MEAN`).
The mean and variance that come back are for moving statistics: no gradient flows through them.
"""

import functools
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_norm import autodiff, functional
from keras_norm.autodiff import custom_vjp

__all__ = [
    "IMPLEMENTATIONS",
    "are_finite",
    "batch_normalization",
    "choose",
    "choose_for",
    "choose_within",
    "group_normalization",
    "instance_normalization",
    "layer_normalization",
    "normalize",
    "on_gpu",
    "rms_normalization",
    "training_step",
]

Array = Any
Axis = int | Sequence[int]

# Below so many channels TensorFlow's fused kernel on a CPU, and PyTorch's, lose to folding.
FEWEST_CHANNELS_FUSED = 12
# TensorFlow's fused kernel for bfloat16 on a CPU takes ten times as long where the channels are not
# a multiple of this (AVX-512's vectors of float32): 23.4 ms for 24 of them, 2.2 ms for 32.
CHANNELS_OF_BFLOAT16 = 16
# The fused kernels add up a channel one element after the other and lose a mean that is far from 0
# (see tests/test_kernels.py). A batch whose mean is farther from 0 than this, in standard
# deviations, is computed anew by the composed one, or in pieces.
FARTHEST_MEAN = 30.0
# So many columns are enough for a row to fill the vector unit and the matrix kernel.
COLUMNS_FOLDED = 96
# And so many for XLA, which adds vectors to vectors.
COLUMNS_COMPILED = 16
# Rows of fewer elements (all together) lose more by the fused kernel's call than they gain by the
# sweeps that it saves.
FEWEST_ELEMENTS_FUSED = 2**18

# Elements of a piece that PyTorch sums in two passes: 4 MB in float32. Less costs more calls.
ELEMENTS_OF_PIECE = 2**20
# PyTorch's kernel, too, adds up one after the other: of more rows than this, the statistics of
# parts are merged. (Of 262,144 rows at once, the variance is off by 7e-5; of 16,384 by 4e-6, and a
# mean that is 25 standard deviations from 0 by 1e-4 of them.)
ROWS_AT_ONCE = 2**14
# One row (of an example, one element) of so many is looked at for a number that is not far from
# the mean.
SAMPLED = 16
# Halves are added to halves until so many are left.
SHORTEST_SUM = 8
# So many numbers are added up one after the other before their sum is added to other sums.
LONGEST_RUN = 64


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


def on_gpu(x: Array | None = None) -> bool:
    """Whether an array lies on an accelerator, where the composed implementation is taken.

    (The others were measured on CPUs only.)

    Args:
        x: an array. Default: one that would be made now.

    Returns:
        True or False.

    Example:
        >>> on_gpu(np.zeros(3)) == on_gpu()
        True
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_logical_devices("GPU"))
    if backend == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import torch

    if isinstance(x, torch.Tensor):
        return x.device.type != "cpu"
    return torch.cuda.is_available() or torch.get_default_device().type != "cpu"


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


def tensor(x: Any, dtype: Any = None) -> Array:
    """As `ops.convert_to_tensor`, and quicker on PyTorch, where x stays on its device.

    Args:
        x: array, tensor or variable.
        dtype: of the result, as the backend names it (`x.dtype` of a tensor); None for x's own.

    Returns:
        A tensor, x itself where it is one of that dtype.

    Example:
        >>> half = tensor(np.ones(3, "float16"))
        >>> np.asarray(tensor([1.0, 2.0], half.dtype))
        array([1., 2.], dtype=float16)
    """
    if keras.backend.backend() != "torch":
        return ops.convert_to_tensor(x, dtype)
    import torch

    x = x.value if isinstance(x, keras.Variable) else x
    if not isinstance(x, torch.Tensor):  # `ops.convert_to_tensor` takes long to see one
        x = ops.convert_to_tensor(x)
    return x if dtype in (None, x.dtype) else x.to(dtype)


def dtype_name(dtype: Any) -> str:
    """As `keras.backend.standardize_dtype`, which takes longer on PyTorch.

    Args:
        dtype: of a tensor.

    Returns:
        Keras's name of it.

    Example:
        >>> dtype_name(tensor(np.ones(3, "float16")).dtype)
        'float16'
    """
    if dtype not in _DTYPE_NAMES:
        _DTYPE_NAMES[dtype] = str(keras.backend.standardize_dtype(dtype))
    return _DTYPE_NAMES[dtype]


_DTYPE_NAMES: dict[Any, str] = {}


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


# TensorFlow: the fused kernel ------------------------------------------------------------------


def _fused(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    import tensorflow as tf

    channels = x.shape[-1]
    rows = tf.size(x) // channels
    one_image = [1, 1, rows, channels]  # any rank as one image whose pixels are the rows

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        scale = _float32_or(tf.ones, gamma, channels)
        offset = _float32_or(tf.zeros, beta, channels)
        y, mean, variance, saved_mean, saved_variance, saved = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, one_image),
            scale=scale,
            offset=offset,
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            epsilon=epsilon,
            is_training=True,
        )
        n = tf.cast(rows, "float32")
        # The kernel's second output is the unbiased variance; for one row it divides by 1.
        variance = variance * (tf.maximum(n - 1, 0) / tf.maximum(n, 1))
        # An empty batch has no statistics: NaN from the kernel, 0 by our convention.
        mean, variance = (tf.where(rows > 0, v, tf.zeros_like(v)) for v in (mean, variance))
        y = tf.reshape(y, tf.shape(x))
        if not on_gpu():
            far = tf.reduce_any(mean * mean > FARTHEST_MEAN**2 * (variance + epsilon))
            y, mean, variance = tf.cond(
                far, lambda: exact(x, gamma, beta), lambda: (y, mean, variance)
            )
            saved_mean, saved_variance = mean, variance
        return (y, mean, variance), (x, scale, saved_mean, saved_variance, saved)

    def exact(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Array, Array, Array]:
        options: dict[str, Any] = {"axis": axis, "epsilon": epsilon}
        return functional.batch_normalization_forward(x, gamma, beta, **options)[0]

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, scale, saved_mean, saved_variance, saved = residuals
        dx, dgamma, dbeta, _, _ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=tf.reshape(upstream[0], one_image),
            x=tf.reshape(x, one_image),
            scale=scale,
            reserve_space_1=saved_mean,
            reserve_space_2=saved_variance,
            reserve_space_3=saved,
            epsilon=epsilon,
            is_training=True,
        )
        return tf.reshape(dx, tf.shape(x)), dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _float32_or(default: Any, v: Array | None, channels: int) -> Array:
    return default(channels) if v is None else ops.cast(v, "float32")


# Sums as matrix products -------------------------------------------------------------------------


def _folded(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    # Where arrays are small every operation counts: vectors stay (1, C), and the means are
    # products with one row of 1 / N, so that there is nothing to reshape nor to divide.
    channels = x.shape[-1]
    folds = _folds(x.shape, channels)
    columns = folds * channels
    dtype = functional.compute_dtype(x)

    as_it_is = len(x.shape) == 2 and folds == 1

    def fold(x: Array) -> Array:
        x = ops.cast(x, dtype)
        return x if as_it_is else ops.reshape(x, (-1, columns))  # (N, ..., C) -> (M / f, f C)

    def unfold(z: Array, x: Array) -> Array:
        return z if as_it_is else ops.reshape(z, ops.shape(x))

    def mean_of(z: Array, shares: Array) -> Array:
        means = ops.matmul(shares, z)  # (1, f C)
        if folds == 1:
            return means
        return ops.sum(ops.reshape(means, (folds, channels)), axis=0, keepdims=True)  # (1, C)

    def spread(v: Array) -> Array:
        return ops.tile(v, (1, folds)) if folds > 1 else v  # (1, C) -> (1, f C)

    def elements(rows: Any) -> Array:
        """How many each channel has; 1 for none."""
        if isinstance(rows, int):
            return ops.convert_to_tensor(max(rows * folds, 1), dtype=dtype)
        return ops.maximum(ops.cast(rows * folds, dtype), 1)

    def row(v: Array) -> Array:
        return ops.cast(v, dtype)  # (C,) broadcasts as (1, C)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        z = fold(x)
        rows = ops.shape(z)[0]
        n = elements(rows)
        shares = ops.broadcast_to(1 / n, (1, rows))
        first = mean_of(z, shares)
        centered = z - spread(first)
        rest = mean_of(centered, shares)  # what rounding lost of the mean
        mean = first + rest  # (B1)
        variance = ops.maximum(mean_of(centered * centered, shares) - rest * rest, 0)  # (B2)
        inv_std = ops.rsqrt(variance + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * row(gamma)
        offset = -rest * scale if beta is None else row(beta) - rest * scale
        y = centered * spread(scale) + spread(offset)  # (B4) (B5)
        y = ops.cast(unfold(y, x), x.dtype)
        statistics = (ops.reshape(v, (channels,)) for v in (mean, variance))
        return (y, *statistics), (x, mean, inv_std, scale, n, shares)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, mean, inv_std, scale, n, shares = residuals
        dy, centered = fold(upstream[0]), fold(x) - spread(mean)
        of_dy = mean_of(dy, shares)
        of_dy_x_hat = mean_of(dy * centered, shares) * inv_std
        dbeta = ops.reshape(of_dy * n, (channels,))  # (B6)
        dgamma = ops.reshape(of_dy_x_hat * n, (channels,))  # (B7)
        along = spread(of_dy_x_hat * inv_std)
        dx = (dy - spread(of_dy) - centered * along) * spread(scale)  # (B8) (B9) (B10)
        return unfold(dx, x), dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _folds(shape: Sequence[int | None], channels: int, wanted: int = COLUMNS_FOLDED) -> int:
    """How many rows are laid side by side: a power of 2 that divides what is known of them."""
    known = 1
    for size in shape[1:-1]:
        known *= size or 1
    folds = 1
    while folds * channels < wanted and known % (2 * folds) == 0:
        folds *= 2
    return folds


# PyTorch: the native kernel -----------------------------------------------------------------------


class _Pieces:
    """x as rows with the channels on axis 1, and cut along the rows into pieces.

    Channels on the last axis: (N, ..., C) -> (M / f, f C), f rows side by side where there are
    few channels; else the channels are moved to axis 1.
    """

    def __init__(self, x: Array, channel: int) -> None:
        self.channels = x.shape[channel]
        self.last = channel == x.ndim - 1
        few = self.last and x.ndim > 2 and self.channels < FEWEST_CHANNELS_FUSED
        self.folds = _folds(x.shape, self.channels) if few else 1
        self.channel = channel
        self.trailing = x.ndim - 2
        self.as_it_is = channel == 1
        self.elements = x.numel() // self.channels

    def rows(self, x: Array) -> Array:
        if self.as_it_is:
            return x
        if self.last:
            return x.reshape(-1, self.folds * self.channels)
        return x.movedim(self.channel, 1)

    def undo(self, z: Array, x: Array) -> Array:
        if self.as_it_is:
            return z
        return z.reshape(x.shape) if self.last else z.movedim(1, self.channel)

    def cut(self, *arrays: Array) -> Any:
        if arrays[0].numel() <= ELEMENTS_OF_PIECE:
            return [arrays]
        size = max(1, arrays[0][:1].numel())
        return zip(*(z.split(max(1, ELEMENTS_OF_PIECE // size)) for z in arrays), strict=True)

    def row(self, v: Array) -> Array:
        """(C,) -> what broadcasts against the rows."""
        v = v.repeat(self.folds) if self.folds > 1 else v
        return v if self.last else v.reshape(-1, *[1] * self.trailing)

    def sum(self, z: Array) -> Array:
        """Of one piece, (C,)."""
        sums = z.sum(dim=(0, *range(2, z.ndim)))
        return sums if self.folds == 1 else sums.view(self.folds, self.channels).sum(0)


def _native(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    (channel,) = functional.canonical_axes(axis, x.ndim)
    gamma, beta = (None if v is None else tensor(v, x.dtype) for v in (gamma, beta))
    if x.numel() == 0 or not _can_be_looked_at(x):
        y, *statistics = functional.batch_normalization(x, gamma, beta, axis=axis, epsilon=epsilon)
        mean, variance = (v.detach() for v in statistics)
        return y, mean, variance
    pieces = _Pieces(x, channel)
    if pieces.folds == 1 and 1 < pieces.elements <= ROWS_AT_ONCE:
        y, mean, variance, inv_std = _native_at_once(pieces.rows(x), gamma, beta, epsilon)
        if _is_near(mean, inv_std):
            return pieces.undo(y, x), mean, variance * (1 - 1 / pieces.elements)
    return _native_in_pieces(x, gamma, beta, axis, epsilon, pieces)


def _native_at_once(
    z: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """(y, mean, unbiased variance, inv_std); channels on axis 1. The gradient is the kernel's."""
    import torch

    mean, variance = z.new_zeros((2, z.shape[1])).unbind()
    momentum = 1.0  # PyTorch's, of the new value: the moving statistics become those of the batch
    y, _, inv_std = torch.native_batch_norm(z, gamma, beta, mean, variance, True, momentum, epsilon)
    return y, mean, variance, inv_std


def _can_be_looked_at(x: Array) -> bool:
    """Whether x has values now, and what they decide is not recorded for other values to come."""
    import torch

    return not (x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing())


def _is_near(mean: Array, inv_std: Array) -> bool:
    import torch

    if not mean.numel():
        return True
    farthest = torch.linalg.vector_norm(mean * inv_std, math.inf)
    return farthest.item() <= FARTHEST_MEAN  # no for NaN


def _native_in_pieces(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: Axis,
    epsilon: float,
    pieces: _Pieces,
) -> tuple[Array, Array, Array]:
    import torch

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        if torch.is_grad_enabled():  # for a second derivative
            outputs, residuals = functional.batch_normalization_forward(
                x, gamma, beta, axis=axis, epsilon=epsilon
            )
            return outputs, residuals[:4]
        z = pieces.rows(x)
        y, mean, variance, inv_std = _forward_in_pieces(z, gamma, beta, epsilon, pieces)
        return (pieces.undo(y, x), mean, variance), (x, mean, inv_std, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, mean, inv_std, gamma = residuals
        dy = upstream[0]
        if torch.is_grad_enabled():
            zeros = torch.zeros_like(mean)
            return functional.batch_normalization_backward(
                dy, zeros, zeros, x, mean, inv_std, gamma, axis=axis
            )
        z, dz = pieces.rows(x), pieces.rows(dy)
        if pieces.folds > 1:
            dx, dgamma, dbeta = _backward_in_pieces(z, dz, mean, inv_std, gamma, pieces)
        else:
            dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                dz, z, gamma, None, None, mean, inv_std, True, epsilon, [True, True, True]
            )
        return pieces.undo(dx, x), dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, mean.detach(), variance.detach()


def _forward_in_pieces(
    z: Array, gamma: Array | None, beta: Array | None, epsilon: float, pieces: _Pieces
) -> tuple[Array, Array, Array, Array]:
    """(y, mean, variance, inv_std)."""
    import torch

    if pieces.folds == 1:
        mean, variance = _moments_by_kernel(z, pieces)
        inv_std = torch.rsqrt(variance + epsilon)  # (B3)
        if _is_near(mean, inv_std):
            y, *_ = torch.native_batch_norm(z, gamma, beta, mean, variance, False, 0.0, epsilon)
            return y, mean, variance, inv_std
    mean, variance = _moments_in_pieces(z, pieces)
    inv_std = torch.rsqrt(variance + epsilon)
    return _normalize_in_pieces(z, mean, inv_std, gamma, beta, pieces), mean, variance, inv_std


def _moments_by_kernel(z: Array, pieces: _Pieces) -> tuple[Array, Array]:
    """(B1) and (B2), (C,), of means that are not far from 0: those of parts, merged."""
    import torch

    rows = pieces.elements // len(z)  # of an entry of z: the positions of one image, or 1
    parts = z.split(max(1, min(ROWS_AT_ONCE, ELEMENTS_OF_PIECE // pieces.channels) // rows))
    moments = [torch.stack(torch.batch_norm_update_stats(p, None, None, 0.0)) for p in parts]
    means, variances = torch.stack(moments, dim=1)  # (parts, C)
    share = z.new_tensor([len(p) / len(z) for p in parts])
    mean = share @ means  # (B14)
    return mean, share @ (variances + (means - mean) ** 2)  # (B15)


def _moments_in_pieces(z: Array, pieces: _Pieces) -> tuple[Array, Array]:
    """(B1) and (B2), (C,); the second pass over a piece finds it in the cache."""
    n = pieces.elements
    first = pieces.sum(z) / n
    row = pieces.row(first)
    rest = squares = 0
    for (piece,) in pieces.cut(z):
        centered = piece - row
        rest = rest + pieces.sum(centered)  # what rounding lost of the mean
        squares = squares + pieces.sum(centered.square_())
    rest = rest / n
    return first + rest, (squares / n - rest * rest).relu()


def _normalize_in_pieces(
    z: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None,
    beta: Array | None,
    pieces: _Pieces,
) -> Array:
    """(B4) and (B5); x - mean first: x scale - mean scale would lose what is far from 0."""
    import torch

    mean, scale = pieces.row(mean), pieces.row(inv_std if gamma is None else inv_std * gamma)
    offset = None if beta is None else pieces.row(beta)
    if z.numel() <= ELEMENTS_OF_PIECE:
        y = z - mean
        return y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)
    y = torch.empty_like(z)
    for piece, target in pieces.cut(z, y):
        torch.sub(piece, mean, out=target)
        if offset is None:
            target.mul_(scale)
        else:
            torch.addcmul(offset, target, scale, out=target)
    return y


def _backward_in_pieces(
    z: Array, dz: Array, mean: Array, inv_std: Array, gamma: Array | None, pieces: _Pieces
) -> tuple[Array, Array, Array]:
    """(B6) to (B10) for folded rows."""
    import torch

    row, n = pieces.row(mean), pieces.elements
    dbeta = dgamma = 0
    for piece, dpiece in pieces.cut(z, dz):
        dbeta = dbeta + pieces.sum(dpiece)  # (B6)
        dgamma = dgamma + pieces.sum((piece - row).mul_(dpiece))
    dgamma = dgamma * inv_std  # (B7)
    scale = inv_std if gamma is None else inv_std * gamma
    a, b = pieces.row(-scale * dbeta / n), pieces.row(-scale * inv_std * dgamma / n)  # (B8) (B9)
    scale = pieces.row(scale)
    dx = torch.empty_like(z)
    for piece, dpiece, target in pieces.cut(z, dz, dx):
        torch.sub(piece, row, out=target)
        torch.addcmul(a, target, b, out=target).addcmul_(dpiece, scale)  # (B10)
    return dx, dgamma, dbeta


# JAX: sums in stages ------------------------------------------------------------------------------


def _staged(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    channels = x.shape[-1]
    n = max(math.prod(x.shape[:-1]), 1)
    dtype = functional.compute_dtype(x)

    def total(v: Array) -> Array:
        v = ops.reshape(v, (-1, channels))
        while (run := _run(v.shape[0])) > 1:
            v = ops.sum(ops.reshape(v, (-1, run, channels)), axis=1)
        return ops.sum(v, axis=0)  # -> (C,)

    def near(x: Array) -> Array:
        """The mean of every sixteenth row: within four standard deviations of the mean of all."""
        sample = ops.reshape(x, (-1, channels))[:: SAMPLED if n >= SAMPLED else 1]
        return ops.sum(sample, axis=0) / max(sample.shape[0], 1)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        first = near(x)
        centered = x - first
        rest = total(centered) / n
        mean = first + rest  # (B1)
        # rest is at most four standard deviations, so the difference loses one digit at most.
        variance = ops.maximum(total(centered * centered) / n - rest * rest, 0)  # (B2)
        inv_std = ops.rsqrt(variance + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        y = (centered - rest) * scale  # (B4)
        y = y if beta is None else y + ops.cast(beta, dtype)  # (B5)
        return (y, mean, variance), (x, first, rest, inv_std, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, first, rest, inv_std, gamma = residuals
        dy, centered = upstream[0], x - first  # as forward, so that XLA does not do it again
        dbeta = total(dy)  # (B6)
        dgamma = (total(dy * centered) - rest * dbeta) * inv_std  # (B7)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        along = inv_std * dgamma / n
        dx = (dy - dbeta / n - (centered - rest) * along) * scale  # (B8) (B9) (B10)
        return dx, dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _run(rows: int) -> int:
    """How many rows are added up in one stage: the largest of these that divides them."""
    return next((run for run in range(LONGEST_RUN, 7, -1) if rows % run == 0 and run < rows), 1)


# TensorFlow: compiled by XLA ----------------------------------------------------------------------


def _sum_by_halves(v: Array) -> Array:
    """(N, P, C) -> (N, 1, C), P known: half the positions added to the other half, and so on.

    Vector to vector, so that XLA makes one loop of it; and partial sums round less.
    """
    while (size := v.shape[1]) % 2 == 0 and size > SHORTEST_SUM:
        v = v[:, : size // 2] + v[:, size // 2 :]
    return ops.sum(v, axis=1, keepdims=True)


def _compiled_batch(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    forward, backward = _halves_of_batch(
        tuple(x.shape[1:]),
        functional.compute_dtype(x),
        epsilon,
        gamma is not None,
        beta is not None,
    )
    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _programs_of_batch(
    sizes: tuple[int, ...], dtype: str, epsilon: float, scales: bool, shifts: bool
) -> tuple[Any, Any]:
    """Forward and backward, for XLA. `sizes` are those of an example."""
    channels, positions = sizes[-1], math.prod(sizes[:-1])
    folds = _folds((None, *sizes), channels, COLUMNS_COMPILED) if len(sizes) > 1 else 1
    columns = folds * channels

    def fold(v: Array) -> Array:
        """(N, ..., C) -> (N, P / f, f C), rows side by side; (N, C) -> (1, N, C) of a known N."""
        v = ops.cast(v, dtype)
        rows = positions // folds if len(sizes) > 1 or v.shape[0] is None else v.shape[0]
        return ops.reshape(v, (-1, rows, columns)) if rows else v[:, None]

    def like(x: Array, z: Array) -> Array:
        return ops.reshape(ops.cast(z, x.dtype), ops.shape(x))

    def total(z: Array) -> Array:
        """-> (C,)"""
        return ops.sum(ops.reshape(_sum_by_halves(z), (-1, channels)), axis=0)

    def spread(v: Array) -> Array:
        return ops.tile(v, folds) if folds > 1 else v  # (C,) -> (f C,)

    def elements(z: Array) -> Array:
        """How many each channel has; 1 for none."""
        examples, rows, _ = ops.shape(z)
        return ops.maximum(ops.cast(examples * rows * folds, dtype), 1)

    def some(z: Array) -> Array:
        """A sixteenth, whose mean is within four standard deviations of that of all."""
        examples, rows, _ = ops.shape(z)
        if isinstance(rows, int) and rows > 1:
            return z[:, : -(-rows // SAMPLED)]
        return z[: (examples + SAMPLED - 1) // SAMPLED]

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        z = fold(x)
        n, few = elements(z), some(z)
        near = total(few) / elements(few)
        z = z - spread(near)
        rest = total(z) / n
        variance = ops.relu(total(z * z) / n - rest * rest)  # (B2)
        inv_std = ops.rsqrt(variance + epsilon)  # (B3)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        y = (z - spread(rest)) * spread(scale)  # (B4)
        y = y if beta is None else y + spread(ops.cast(beta, dtype))  # (B5)
        return like(x, y), near + rest, variance, inv_std  # (B1)

    def gradients(
        dy: Array, x: Array, gamma: Array | None, mean: Array, inv_std: Array
    ) -> tuple[Array, Array | None, Array | None]:
        g, z = fold(dy), fold(x) - spread(mean)
        dbeta, dgamma = total(g), total(g * z) * inv_std  # (B6) (B7)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        n = elements(g)
        dx = g - spread(dbeta / n) - z * spread(dgamma * inv_std / n)
        dx = like(dy, dx * spread(scale))  # (B8) (B9) (B10)
        return dx, dgamma if scales else None, dbeta if shifts else None

    return normalized, gradients


@functools.lru_cache(maxsize=1024)
def _halves_of_batch(*case: Any) -> tuple[Any, Any]:
    """Forward and backward for `custom_vjp`, a program each."""
    normalized, gradients = _programs_of_batch(*case)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        y, mean, variance, inv_std = autodiff.compiled(normalized)(x, gamma, beta)
        return (y, mean, variance), (x, gamma, mean, inv_std)

    def backward(residuals: Any, upstream: Any) -> Any:
        return autodiff.compiled(gradients)(upstream[0], *residuals)

    return forward, backward


def training_step(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving: tuple[Array, Array, Array],
    switches: Array,
    *,
    epsilon: float = 1e-3,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """A step of batch normalization with its moving statistics, as two programs in all.

    Where arrays are small every operation counts, and here the moving statistics and their
    switches are none of their own. Only where `choose` says "compiled".

    Args:
        x: (N, ..., C).
        gamma, beta: (C,), or None.
        moving: moving mean and moving variance, (C,), and the number of batches that were skipped.
        switches: (>= 4,), the weights of old and new in the moving statistics, and whether gamma
            and beta are trained, and the statistics move: 1 or 0.
        epsilon: as in `batch_normalization`.

    Returns:
        (y, moving): y, and `moving` after this step, by (B11) and (B12). As it was, but for the
        count, where the statistics of the batch are not finite or the batch is empty.

    Example:
        >>> x, moving = np.array([[1.0], [3.0]], "float32"), (np.zeros(1), np.ones(1), np.zeros(()))
        >>> switches = np.array([0.75, 0.25, 1.0, 1.0])
        >>> if autodiff.can_compile():
        ...     y, (mean, variance, skipped) = training_step(x, None, None, moving, switches)
        ...     assert float(mean[0]) == 0.5 and float(variance[0]) == 1 and float(skipped) == 0
    """
    halves = _halves_with_moving(
        tuple(x.shape[1:]),
        functional.compute_dtype(x),
        epsilon,
        gamma is not None,
        beta is not None,
    )
    y, *moved = custom_vjp(*halves, x, gamma, beta, *moving, switches)
    mean, variance, skipped = (ops.stop_gradient(v) for v in moved)
    return y, (mean, variance, skipped)


@functools.lru_cache(maxsize=1024)
def _halves_with_moving(*case: Any) -> tuple[Any, Any]:
    """As `_halves_of_batch`, with the step of the moving statistics in the first program."""
    normalized, gradients = _programs_of_batch(*case)

    def normalized_and_moved(
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        moving_mean: Array,
        moving_variance: Array,
        skipped: Array,
        switches: Array,
    ) -> tuple[Any, ...]:
        y, mean, variance, inv_std = normalized(x, gamma, beta)
        keep, rest, _, update = ops.unstack(switches[:4])
        moves = ops.logical_and(are_finite(mean, variance), ops.shape(x)[0] > 0)

        def moved(old: Array, value: Array) -> Array:
            return ops.where(moves, old * keep + ops.cast(value, old.dtype) * rest, old)

        skipped = skipped + ops.where(moves, ops.zeros_like(update), update)
        statistics = moved(moving_mean, mean), moved(moving_variance, variance), skipped
        return y, *statistics, mean, inv_std

    def gated(
        dy: Array,
        x: Array,
        gamma: Array | None,
        mean: Array,
        inv_std: Array,
        switches: Array,
    ) -> tuple[Array, Array | None, Array | None]:
        dx, *slopes = gradients(dy, x, gamma, mean, inv_std)
        trained = switches[2] > 0.5
        return dx, *(None if d is None else ops.where(trained, d, 0.0) for d in slopes)

    def forward(x: Array, gamma: Any, beta: Any, *others: Array) -> tuple[Any, Any]:
        program = autodiff.compiled(normalized_and_moved)
        y, *statistics, mean, inv_std = program(x, gamma, beta, *others)
        return (y, *statistics), (x, gamma, mean, inv_std, others[-1])

    def backward(residuals: Any, upstream: Any) -> Any:
        return *autodiff.compiled(gated)(upstream[0], *residuals), *[None] * 4

    return forward, backward


IMPLEMENTATIONS: dict[str, Any] = {
    "compiled": _compiled_batch,
    "composed": functional.batch_normalization,
    "fused": _fused,
    "folded": _folded,
    "native": _native,
    "staged": _staged,
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
    if chosen == "native" and not _torch_records():
        mean, variance = tensor(mean, x.dtype), tensor(variance, x.dtype)
        gamma, beta = (None if v is None else tensor(v, x.dtype) for v in (gamma, beta))
        return _native_inference(x, mean, variance, gamma, beta, axis, epsilon)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        x: Array = arrays[0]
        dtype = functional.compute_dtype(x)
        mean, variance = (ops.cast(v, dtype) for v in arrays[1:3])
        gamma, beta = (None if v is None else ops.cast(v, dtype) for v in arrays[3:])
        if chosen == "native":
            y = _native_inference(x, mean, variance, gamma, beta, axis, epsilon)
        else:
            y = _fused_inference(x, mean, variance, gamma, beta, epsilon)
        return (y,), (x, mean, ops.rsqrt(variance + epsilon), gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, ...]:
        return functional.normalize_backward(upstream[0], *residuals, axis=axis)

    (y,) = custom_vjp(forward, backward, x, mean, variance, gamma, beta)
    return y


def _torch_records() -> bool:
    """Whether PyTorch keeps what gradients will need."""
    import torch

    return torch.is_grad_enabled()


def _native_inference(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: Axis,
    epsilon: float,
) -> Array:
    import torch

    if torch.is_grad_enabled():  # for a second derivative
        return functional.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    (channel,) = functional.canonical_axes(axis, x.ndim)
    if x.numel() == 0:
        return x.clone()
    pieces = _Pieces(x, channel)
    inv_std, z = torch.rsqrt(variance + epsilon), pieces.rows(x)
    large = pieces.folds == 1 and x.numel() > ELEMENTS_OF_PIECE
    if large and _can_be_looked_at(x) and _is_near(mean, inv_std):
        # One sweep, x scale + (beta - mean scale).
        y, *_ = torch.native_batch_norm(z, gamma, beta, mean, variance, False, 0.0, epsilon)
    else:
        y = _normalize_in_pieces(z, mean, inv_std, gamma, beta, pieces)
    return pieces.undo(y, x)


def _fused_inference(
    x: Array, mean: Array, variance: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> Array:
    import tensorflow as tf

    channels, columns = x.shape[-1], _columns(x.shape)
    folds = columns // channels
    gamma = tf.ones(channels) if gamma is None else gamma
    beta = tf.zeros(channels) if beta is None else beta
    if folds > 1:
        mean, variance, gamma, beta = (tf.tile(v, [folds]) for v in (mean, variance, gamma, beta))
    y = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, [1, 1, -1, columns]),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )[0]
    return tf.reshape(y, tf.shape(x))


def _columns(shape: Sequence[Any]) -> int:
    """Of the rows that inference mode gets: channels, side by side where images have few."""
    channels: int = shape[-1]
    return channels * (_folds(shape, channels) if len(shape) > 2 else 1)


# Guards -------------------------------------------------------------------------------------------


def are_finite(*arrays: Array) -> Any:
    """Whether all numbers are finite: True where that is known at once, else a boolean tensor.

    On PyTorch the arrays are there while Python runs. On a CPU looking at them costs less than the
    operations that a choice between two tensors takes; elsewhere it would wait for the device.

    Args:
        *arrays: of one shape.

    Example:
        >>> bool(are_finite(ops.ones(3), ops.zeros(3)))
        True
    """
    total = functools.reduce(operator.add, arrays)
    on_cpu = keras.backend.backend() == "torch" and total.device.type == "cpu"
    if on_cpu and _can_be_looked_at(total) and math.isfinite(float(total.sum())):
        return True  # a sum that is not finite may have overflowed: then each is looked at
    return ops.all(ops.isfinite(total))


# Within each example ------------------------------------------------------------------------------

# Of fewer elements a step has too little to gain to wait for the compiler. A batch of unknown size
# counts as Keras's default for it.
FEWEST_ELEMENTS_COMPILED = 2**14
UNKNOWN_SIZE = 32

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
        if small or not _is_quick_fused(_columns(shape), dtype):
            return "composed"
    if training and "compiled" in able and _pays_to_compile(shape) and autodiff.can_compile():
        return "compiled"
    return fast


def _pays_to_compile(shape: Sequence[int | None]) -> bool:
    """Where sequences are of many lengths, each would be compiled for itself."""
    if None in shape[1:]:
        return False
    sizes = (UNKNOWN_SIZE if size is None else size for size in shape)
    return math.prod(sizes) >= FEWEST_ELEMENTS_COMPILED


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
            return _products(x, gamma, beta, axes, epsilon, True, chosen == "compiled")
        y = _native_layer(x, gamma, beta, axes, epsilon, True)
        if y is not None:
            return y
    return functional.layer_normalization(
        x, gamma, beta, axis=axis, epsilon=epsilon, rms_scaling=rms_scaling
    )


def _native_layer(
    x: Array, gamma: Array | None, beta: Array | None, axes: int, epsilon: float, centers: bool
) -> Array | None:
    """`_products` by PyTorch; None where it would round."""
    import torch

    functional.check_epsilon(epsilon)
    sizes = x.shape[-axes:]
    gamma, beta = (_native_parameter(v, x, sizes) for v in (gamma, beta))
    if not centers:
        return torch.nn.functional.rms_norm(x, sizes, gamma, epsilon)
    if not _can_be_looked_at(x):
        return None
    y, mean, inv_std = torch.native_layer_norm(x, sizes, gamma, beta, epsilon)
    return y if _is_near(mean, inv_std) else None


def _native_parameter(v: Array | None, x: Array, sizes: Sequence[int]) -> Array | None:
    if v is None:
        return None
    v = tensor(v, x.dtype)
    return v if v.shape == sizes else v.expand(sizes)


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
        return _native_layer(x, gamma, None, axes, epsilon, False)
    return _products(x, gamma, None, axes, epsilon, False, chosen == "compiled")


def _products(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axes: int,
    epsilon: float,
    centers: bool,
    compiled: bool = False,
) -> Array:
    """Layer normalization (RMS without `centers`) over the last `axes` axes, rows by columns."""
    functional.check_epsilon(epsilon)
    sizes = tuple(x.shape[len(x.shape) - axes :])
    dtype = functional.compute_dtype(x)
    case = len(x.shape), sizes, dtype, epsilon, centers
    if compiled:
        halves = _halves_of_rows(*case, gamma is not None, beta is not None)
    else:
        halves = _halves_of_products(*case)
    forward, backward = halves
    (y,) = custom_vjp(forward, backward, x, gamma, beta)
    return y


class _Rows:
    """Arrays (..., D) or (..., H, W, C) as rows (N, D) of the dtype to compute in, and back."""

    def __init__(self, rank: int, sizes: tuple[int, ...], dtype: str) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.d = math.prod(sizes)
        self.as_it_is = len(sizes) == 1 and rank == 2

    def of(self, v: Array) -> Array:
        v = ops.cast(v, self.dtype)
        return v if self.as_it_is else ops.reshape(v, (-1, self.d))

    def like(self, x: Array, rows: Array) -> Array:
        rows = ops.cast(rows, x.dtype)
        return rows if self.as_it_is else ops.reshape(rows, ops.shape(x))

    def parameter(self, v: Array) -> Array:
        v = ops.cast(v, self.dtype)
        return v if len(self.sizes) == 1 else ops.reshape(v, (self.d,))  # broadcasts as (1, D)

    def share(self, gamma: Array | None) -> Array:
        """gamma / D, or 1 / D, as a column (D, 1)."""
        g = ops.ones((1, self.d), dtype=self.dtype) if gamma is None else self.parameter(gamma)
        return ops.reshape(g / max(self.d, 1), (self.d, 1))

    def near(self, z: Array) -> Array:
        """The elements whose mean is within four standard deviations of that of all."""
        return z[:, : -(-self.d // SAMPLED)]


@functools.lru_cache(maxsize=1024)
def _halves_of_products(
    rank: int, sizes: tuple[int, ...], dtype: str, epsilon: float, centers: bool
) -> tuple[Any, Any]:
    """Forward and backward, for `custom_vjp`."""
    rows = _Rows(rank, sizes, dtype)

    def mean(z: Array) -> Array:
        # Where arrays are small every operation counts. (Keras's mean of float64 is of float32 on
        # JAX and PyTorch.)
        if rows.d > 0 and dtype == "float32":
            return ops.mean(z, axis=1, keepdims=True)
        return ops.sum(z, axis=1, keepdims=True) / max(rows.d, 1)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        z, first = rows.of(x), None
        if centers:
            near = mean(rows.near(z))
            z = z - near
            rest = mean(z)
            # As rest is no larger, the difference loses one digit at most.
            variance = ops.relu(mean(z * z) - rest * rest)  # (L2)
            z, first = z - rest, near + rest  # (L1)
        else:
            variance = mean(z * z)  # (R1)
        inv_std = ops.rsqrt(variance + epsilon)  # (L3) (R2)
        y = z * inv_std  # (L4) (R3)
        y = y if gamma is None else y * rows.parameter(gamma)  # (R4)
        y = y if beta is None else y + rows.parameter(beta)  # (L5)
        return (rows.like(x, y),), (x, inv_std, gamma, first)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, inv_std, gamma, first = residuals
        dy, z = rows.of(upstream[0]), rows.of(x)
        z = z if first is None else z - first  # x_hat / inv_std
        # `@`, for `ops.matmul` rounds float64 to float32 on PyTorch.
        dy_z = dy * z
        dbeta = ops.reshape(ops.ones_like(ops.transpose(inv_std)) @ dy, sizes)  # (L6)
        dgamma = ops.reshape(ops.transpose(inv_std) @ dy_z, sizes)  # (L7) (R5)
        share = rows.share(gamma)
        along = inv_std * inv_std * (dy_z @ share)  # mean of g dy x_hat over each example
        dx = (dy if gamma is None else dy * rows.parameter(gamma)) - z * along
        if centers:
            dx = dx - dy @ share
        return rows.like(upstream[0], dx * inv_std), dgamma, dbeta  # (L9) (R6)

    return forward, backward


@functools.lru_cache(maxsize=1024)
def _halves_of_rows(
    rank: int,
    sizes: tuple[int, ...],
    dtype: str,
    epsilon: float,
    centers: bool,
    scales: bool,
    shifts: bool,
) -> tuple[Any, Any]:
    """As `_halves_of_products`, for XLA: two programs.

    XLA fuses all that is done to single elements. The sum over a row is quicker as a product, that
    over the rows as a sum: as a product it is slow for rows of 1024 elements.
    """
    rows = _Rows(rank, sizes, dtype)

    def over_rows(v: Array, x: Array) -> Array:
        """(N, D) -> (D,): over the positions of each example first, if x has some."""
        known = x.shape[1 : rank - len(sizes)]
        if known and None not in known:
            v = _sum_by_halves(ops.reshape(v, (-1, math.prod(known), rows.d)))
        return ops.reshape(ops.sum(ops.reshape(v, (-1, rows.d)), axis=0), sizes)

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        z, share = rows.of(x), rows.share(None)
        first = None
        if centers:
            near = ops.mean(rows.near(z), axis=1, keepdims=True) if rows.d else 0.0
            z = z - near
            rest = z @ share
            variance = ops.relu((z * z) @ share - rest * rest)  # (L2)
            z, first = z - rest, near + rest  # (L1)
        else:
            variance = (z * z) @ share  # (R1)
        inv_std = ops.rsqrt(variance + epsilon)
        y = z * inv_std
        y = y if gamma is None else y * rows.parameter(gamma)
        y = y if beta is None else y + rows.parameter(beta)
        return (rows.like(x, y), inv_std) if first is None else (rows.like(x, y), inv_std, first)

    def gradients(
        dy: Array, x: Array, gamma: Array | None, inv_std: Array, first: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        share, like = rows.share(gamma), dy
        dy, z = rows.of(dy), rows.of(x)
        z = z if first is None else z - first
        dy_z = dy * z
        dbeta = over_rows(dy, x) if shifts else None  # (L6)
        dgamma = over_rows(dy_z * inv_std, x) if scales else None  # (L7) (R5)
        dx = dy if gamma is None else dy * rows.parameter(gamma)
        dx = dx - z * (inv_std * inv_std * (dy_z @ share))
        if centers:
            dx = dx - dy @ share
        return rows.like(like, dx * inv_std), dgamma, dbeta  # (L9) (R6)

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        y, inv_std, *first = autodiff.compiled(normalized)(x, gamma, beta)
        return (y,), (x, gamma, inv_std, *first)

    def backward(residuals: Any, upstream: Any) -> Any:
        x, gamma, inv_std, *first = residuals
        about = first[0] if first else None
        return autodiff.compiled(gradients)(upstream[0], x, gamma, inv_std, about)

    return forward, backward


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


def _native_group(
    x: Array, gamma: Array | None, beta: Array | None, groups: int, epsilon: float
) -> Array | None:
    """Group normalization of the last axis' channels by PyTorch; None where it would round."""
    import torch

    functional.check_epsilon(epsilon)
    if not _can_be_looked_at(x) or not x.numel():
        return None
    z = x.movedim(-1, 1)  # (N, C, ...); of images it is the layout "channels last", no copy
    count, channels = z.shape[:2]
    gamma, beta = (_native_parameter(v, x, (channels,)) for v in (gamma, beta))
    if gamma is None:
        gamma = z.new_ones(channels)  # with beta alone, derivatives fail in PyTorch 2.13
    z = z.contiguous(memory_format=_layout(z))
    y, mean, inv_std = torch.native_group_norm(
        z, gamma, beta, count, channels, z[0, 0].numel(), groups, epsilon
    )
    return y.movedim(1, -1) if _is_near(mean, inv_std) else None


def _layout(z: Array) -> Any:
    """The memory format in which PyTorch's kernels take (N, C, ...) with the channels last."""
    import torch

    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(z.ndim, torch.contiguous_format)


def _by_channel(
    x: Array, gamma: Array | None, beta: Array | None, groups: int, epsilon: float
) -> Array:
    functional.check_epsilon(epsilon)
    dtype, channels = functional.compute_dtype(x), x.shape[-1]
    positions = tuple(range(1, len(x.shape) - 1))
    per_group = channels // groups

    def elements(x: Array) -> Any:
        sizes = ops.shape(x)
        d = math.prod(sizes[a] for a in positions) * per_group
        return max(d, 1) if isinstance(d, int) else ops.cast(d, dtype)

    def mean(sums: Array, d: Any) -> Array:
        """Sums of each channel (N, 1, 1, C) -> the mean over its group, of the same shape."""
        if per_group > 1:
            of_group = ops.sum(ops.reshape(sums, (-1, groups, per_group)), axis=2, keepdims=True)
            spread = of_group * ops.ones((1, 1, per_group), dtype=dtype)
            sums = ops.reshape(spread, (-1, *[1] * len(positions), channels))
        return sums / d

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        d, z = elements(x), ops.cast(x, dtype)
        first = mean(functional.sum_in_stages(z, positions), d)
        centered = z - first
        rest = mean(functional.sum_in_stages(centered, positions), d)  # what rounding lost
        squares = functional.sum_in_stages(centered * centered, positions)
        variance = mean(squares, d) - rest * rest
        variance = ops.where(variance < 0, ops.zeros_like(variance), variance)
        inv_std = ops.rsqrt(variance + epsilon)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        offset = -rest * scale if beta is None else ops.cast(beta, dtype) - rest * scale
        y = centered * scale + offset  # (GN2) (GN3)
        return (ops.cast(y, x.dtype),), (x, first, rest, inv_std, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, first, rest, inv_std, gamma = residuals
        dy, centered = ops.cast(upstream[0], dtype), ops.cast(x, dtype) - first
        d = elements(dy)
        s = functional.sum_in_stages(dy, positions)  # of each example and channel, (N, 1, 1, C)
        t = (functional.sum_in_stages(dy * centered, positions) - rest * s) * inv_std
        over = tuple(range(len(dy.shape) - 1))
        dbeta, dgamma = ops.sum(s, axis=over), ops.sum(t, axis=over)  # (GN4)
        if gamma is not None:
            s, t = s * ops.cast(gamma, dtype), t * ops.cast(gamma, dtype)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        a = -inv_std * inv_std * mean(t, d)
        b = -inv_std * mean(s, d) - rest * a
        return dy * scale + (centered * a + b), dgamma, dbeta  # (GN5)

    (y,) = custom_vjp(forward, backward, x, gamma, beta)
    return y


def _compiled_by_channel(
    x: Array, gamma: Array | None, beta: Array | None, groups: int, epsilon: float
) -> Array:
    functional.check_epsilon(epsilon)
    forward, backward = _halves_by_channel(
        tuple(x.shape[1:]),
        groups,
        functional.compute_dtype(x),
        epsilon,
        gamma is not None,
        beta is not None,
    )
    (y,) = custom_vjp(forward, backward, x, gamma, beta)
    return y


@functools.lru_cache(maxsize=1024)
def _halves_by_channel(
    sizes: tuple[int, ...], groups: int, dtype: str, epsilon: float, scales: bool, shifts: bool
) -> tuple[Any, Any]:
    """As `_by_channel`, for XLA: two programs. `sizes` are those of an example."""
    channels, positions = sizes[-1], math.prod(sizes[:-1])
    per_group = channels // groups

    def examples(v: Array) -> Array:
        return ops.reshape(ops.cast(v, dtype), (-1, positions, channels))

    def like(x: Array, z: Array) -> Array:
        return ops.reshape(ops.cast(z, x.dtype), ops.shape(x))

    def mean(sums: Array, seen: int) -> Array:
        """Sums of each channel (N, 1, C), over `seen` positions -> the mean over its group."""
        if per_group > 1:
            of_group = ops.sum(ops.reshape(sums, (-1, groups, per_group)), axis=2, keepdims=True)
            sums = ops.reshape(ops.repeat(of_group, per_group, axis=2), (-1, 1, channels))
        return sums / max(seen * per_group, 1)

    def normalized(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        z, few = examples(x), -(-positions // SAMPLED)
        near = mean(_sum_by_halves(z[:, :few]), few)  # within four standard deviations
        z = z - near
        rest = mean(_sum_by_halves(z), positions)
        variance = ops.relu(mean(_sum_by_halves(z * z), positions) - rest * rest)
        inv_std = ops.rsqrt(variance + epsilon)
        scale = inv_std if gamma is None else inv_std * ops.cast(gamma, dtype)
        y = (z - rest) * scale  # (GN2)
        y = y if beta is None else y + ops.cast(beta, dtype)  # (GN3)
        return like(x, y), near + rest, inv_std

    def gradients(
        dy: Array, x: Array, gamma: Array | None, first: Array, inv_std: Array
    ) -> tuple[Array, Array | None, Array | None]:
        g, z = examples(dy), examples(x) - first
        s, t = _sum_by_halves(g), _sum_by_halves(g * z) * inv_std  # (N, 1, C)
        dbeta = ops.sum(s, axis=(0, 1)) if shifts else None  # (GN4)
        dgamma = ops.sum(t, axis=(0, 1)) if scales else None
        scale = inv_std
        if gamma is not None:
            of_channel = ops.cast(gamma, dtype)
            s, t, scale = s * of_channel, t * of_channel, scale * of_channel
        along = inv_std * inv_std * mean(t, positions)
        dx = g * scale - (z * along + inv_std * mean(s, positions))  # (GN5)
        return like(dy, dx), dgamma, dbeta

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        y, first, inv_std = autodiff.compiled(normalized)(x, gamma, beta)
        return (y,), (x, gamma, first, inv_std)

    def backward(residuals: Any, upstream: Any) -> Any:
        return autodiff.compiled(gradients)(upstream[0], *residuals)

    return forward, backward


_GROUPED: dict[str, Any] = {
    "native": _native_group,
    "by_channel": _by_channel,
    "compiled": _compiled_by_channel,
}

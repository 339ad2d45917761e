"""What the implementations of `kernels` share."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_norm.autodiff import in_transform

Array = Any

# With fewer channels, TensorFlow's fused kernel on a CPU, and PyTorch's, are slower than folding.
FEWEST_CHANNELS_FUSED = 12
# The fused kernels add up a channel one element after the other, which is inexact if the mean is
# far from 0 (see tests/test_kernels.py). A batch whose mean is farther from 0 than this, in
# standard deviations, is computed again by the composed one, or in pieces.
FARTHEST_MEAN = 30.0
# This many columns are enough for a row to fill the vector unit and the matrix kernel.
COLUMNS_FOLDED = 96
# One row in this many (within an example, one element) is used to get a number that is not far
# from the mean.
SAMPLED = 16


def on_gpu(x: Array | None = None) -> bool:
    """Whether an array is on an accelerator, where the composed implementation is used.

    (The others were measured on CPUs only.)

    Args:
        x: an array. Default: a new one, made now.

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


def are_finite(*arrays: Array) -> Any:
    """Whether all numbers are finite: True if that is known at once, else a boolean tensor.

    On PyTorch the values exist while Python runs. On a CPU, inspecting them costs less than the
    operations for a choice between two tensors; elsewhere it would wait for the device.

    Args:
        *arrays: of one shape.

    Example:
        >>> bool(are_finite(ops.ones(3), ops.zeros(3)))
        True
    """
    total = functools.reduce(operator.add, arrays)
    on_cpu = keras.backend.backend() == "torch" and total.device.type == "cpu"
    if on_cpu and can_be_looked_at(total) and math.isfinite(float(total.sum())):
        return True  # a sum that is not finite may have overflowed: then each number is checked
    return ops.all(ops.isfinite(total))


def can_be_looked_at(x: Array) -> bool:
    """Whether x has values now, on which Python may branch without a trace recording the branch."""
    import torch

    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform()
    return not (x.is_meta or recorded)


def folds_of(shape: Sequence[int | None], channels: int, wanted: int = COLUMNS_FOLDED) -> int:
    """How many rows are laid side by side: a power of 2 that divides their known number."""
    known = 1
    for size in shape[1:-1]:
        known *= size or 1
    folds = 1
    while folds * channels < wanted and known % (2 * folds) == 0:
        folds *= 2
    return folds

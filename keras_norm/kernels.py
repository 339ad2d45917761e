"""Each normalization on the fastest correct implementation for its backend, shape and dtype.

    implementation   what it is
    composed         the function of the same name in `functional`: keras.ops, any backend, shape
                     and dtype; compiled by XLA on JAX
    fused            TensorFlow's FusedBatchNormV3 and its gradient, float32 and half precision, for
                     means that are not far from 0 (see FARTHEST_MEAN); fastest with oneDNN, but
                     slower than `compiled` with Eigen;
                     `normalize`: its inference mode, narrow rows laid side by side as below
    folded           TensorFlow, JAX: sums as products of matrices with ones; rows of few channels
                     are first laid side by side, (N H W, 6) -> (N H W / 16, 96), to fill a vector
    native           PyTorch: native_batch_norm and its gradient, for means that are not far from 0,
                     with statistics merged from parts if there are many rows; else, and for rows
                     of few channels, laid side by side as above, in pieces that stay in the cache;
                     layer, group and instance normalization: the kernel of torch.nn's; RMS
                     normalization: a norm, and backward the kernel of layer normalization
    staged           JAX on a CPU: sums over short runs of rows, then over the runs; of x if all
                     means turn out to be near 0, else of x minus the mean of every sixteenth row
    products         layer and RMS normalization: forward, sums of x minus the mean of an example's
                     first sixteenth (on JAX of x itself, as above); backward, the sums over an
                     example and over the examples as products of matrices with gamma and with
                     ones; x is kept
    x_hat            TensorFlow: as `products`, but x_hat is kept; for small steps in a graph, whose
                     time is that of their operations
    compiled         TensorFlow without a GPU, in training, and outside of graphs: forward and
                     backward as one program each, which XLA compiles when it first meets arrays of
                     these shapes (in inference, at the tenth time); in `training_step`, the update
                     of batch normalization's moving statistics is part of the program
    by_channel       group and instance normalization: sums for each channel, then added up within
                     the groups, so that scale and shift are one number for each example and
                     channel, and two passes over x suffice

"fused" is in `_kernels_fused`, "native" in `_kernels_torch`, "compiled" in `_kernels_xla`, the rest
in `_kernels_sums`. A table in `_kernels_choice` decides which is used where; `choose` returns its
name. The environment variable KERAS_NORM_IMPLEMENTATION, read whenever a function is traced, names
one to use wherever it can do what is asked (`make test-implementations`).

All of them give the numbers of `functional` to rounding, in at least float32; where a sum would
round more, the composed one repeats the work (`FARTHEST_MEAN`). The exception: PyTorch's own
gradients of gamma and beta in layer normalization add up the rows one by one; for 262,144 rows they
are off by 1e-5.
The returned mean and variance are for moving statistics: no gradient flows through them.
"""

import functools
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_norm import _kernels_fused, _kernels_sums, _kernels_torch, _kernels_xla, functional
from keras_norm._arrays import dtype_name, in_dtype, tensor
from keras_norm._kernels_choice import TABLE, check_possible, implementation_for
from keras_norm._kernels_common import are_finite, on_gpu
from keras_norm._kernels_xla import training_step
from keras_norm._shortcuts import BatchShortcut, RowsShortcut
from keras_norm.autodiff import custom_vjp

__all__ = [
    "BatchShortcut",
    "RowsShortcut",
    "are_finite",
    "batch_normalization",
    "choose",
    "choose_for",
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


def choose(
    function: str,
    shape: Sequence[int | None],
    dtype: str,
    *,
    axis: Axis = -1,
    weighted: bool = False,
    training: bool = False,
) -> str:
    """The name of the implementation that a function uses unless told otherwise.

    Args:
        function: "batch_normalization", "normalize", "layer_normalization", "rms_normalization",
            "group_normalization" or "instance_normalization".
        shape: of the input; None for an unknown size.
        dtype: of the input, such as "float32".
        axis: as the function takes it.
        weighted: whether there are weights (a mask).
        training: as the function takes it.

    Returns:
        The name of an implementation; "composed" where no other is possible, or faster. Outside
        of a graph on TensorFlow, asking counts as a call with this shape.

    Raises:
        ValueError: for a function that is not one of these, axes that the shape does not have,
            and an unknown name in KERAS_NORM_IMPLEMENTATION.

    Example:
        >>> choose("batch_normalization", (256, 32, 32, 64), "float64", weighted=True)
        'composed'
        >>> choose("layer_normalization", (32, 128, None), "float32")
        'composed'
    """
    if function not in TABLE:
        raise ValueError(
            f"`function` must be one of {sorted(TABLE)}. Received: function={function!r}."
        )
    return implementation_for(function, shape, dtype, axis, weighted=weighted, training=training)


def choose_for(
    function: str,
    x: Array,
    *,
    axis: Axis = -1,
    weights: Array | None = None,
    training: bool = False,
    implementation: str | None = None,
) -> str:
    """`choose` for an array: the name of the implementation that a function uses for it.

    Args:
        function: as in `choose`.
        x: an array.
        axis, weights, training: as the function takes them.
        implementation: the argument of that name of the function, or None.

    Returns:
        As `choose`; `implementation`, if it is given.

    Raises:
        ValueError: as `choose`, and for an implementation that cannot do what is asked of it.
    """
    shape, dtype, weighted = tuple(x.shape), dtype_name(x.dtype), weights is not None
    if implementation is not None:
        check_possible(implementation, function, shape, dtype, axis, weighted)
        return implementation
    return implementation_for(
        function, shape, dtype, axis, weighted=weighted, training=training, x=x
    )


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
    """As `functional.batch_normalization`, by the implementation that `choose` names.

    Args:
        x, gamma, beta, axis, epsilon, weights: as there.
        training: bool, whether this is a training step, one of many, so that compiling it pays
            off (TensorFlow). The numbers are the same to rounding.
        implementation: the name of the one to use. Default: what `choose` names.

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
    name = choose_for(
        "batch_normalization",
        x,
        axis=axis,
        weights=weights,
        training=training,
        implementation=implementation,
    )
    if name == "composed":
        y, mean, variance = functional.batch_normalization(
            x, gamma, beta, axis=axis, epsilon=epsilon, weights=weights
        )
        return y, ops.stop_gradient(mean), ops.stop_gradient(variance)
    _check_shapes(x, axis, gamma=gamma, beta=beta)
    return _BATCH[name](x, gamma, beta, axis, epsilon)


def _check_shapes(x: Array, axis: Axis, **arrays: Array | None) -> None:
    """Refuses what `functional` refuses: the kernels would broadcast it, or accept it silently."""
    if type(axis) is int:  # quickly, for the arrays of a small layer
        right = (x.shape[axis],)
        if all(v is None or getattr(v, "shape", None) == right for v in arrays.values()):
            return
    functional.check_shapes(x, functional.canonical_axes(axis, len(x.shape)), **arrays)


_BATCH: dict[str, Any] = {
    "compiled": _kernels_xla.batch,
    "fused": _kernels_fused.batch,
    "folded": _kernels_sums.folded,
    "native": _kernels_torch.batch,
    "staged": _kernels_sums.staged,
}


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
    """As `functional.normalize`, by the implementation that `choose` names.

    Args:
        x, mean, variance, gamma, beta, axis, epsilon: as there.
        implementation: "composed", or "compiled" or "fused" on TensorFlow, "native" on PyTorch.
            Default: what `choose` names.

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
    chosen = choose_for("normalize", x, axis=axis, implementation=implementation)
    if chosen == "composed":
        return functional.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    functional.check_epsilon(epsilon)
    _check_shapes(x, axis, mean=mean, variance=variance, gamma=gamma, beta=beta)
    if chosen == "native" and not _kernels_torch.records():
        mean, variance = tensor(mean, x.dtype), tensor(variance, x.dtype)
        gamma, beta = (None if v is None else tensor(v, x.dtype) for v in (gamma, beta))
        return _kernels_torch.inference(x, mean, variance, gamma, beta, axis, epsilon)

    def forward(*arrays: Array | None) -> tuple[Any, Any]:
        x: Array = arrays[0]
        dtype = functional.compute_dtype(x)
        mean, variance = (in_dtype(v, dtype) for v in arrays[1:3])
        gamma, beta = (None if v is None else in_dtype(v, dtype) for v in arrays[3:])
        if chosen == "compiled":
            y, inv_std = _kernels_xla.by_given(x, mean, variance, gamma, beta, epsilon)
            return (y,), (x, mean, inv_std, gamma)
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

_ROWS: dict[str, Any] = {
    "products": _kernels_sums.products,
    "x_hat": functools.partial(_kernels_sums.products, keeps_x_hat=True),
    "compiled": _kernels_xla.rows,
}

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
    """As `functional.layer_normalization`, by the implementation that `choose` names.

    Args:
        x, gamma, beta, axis, epsilon, rms_scaling: as there. `rms_scaling` is always "composed".
        training: as in `batch_normalization`.
        implementation: "composed", "products" or, on TensorFlow, "compiled" or "x_hat" ("composed"
            or "native" on PyTorch). Default: what `choose` names.

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
    options: dict[str, Any] = {"training": training, "implementation": implementation}
    chosen = choose_for("layer_normalization", x, axis=axis, **options)
    if chosen != "composed" and not rms_scaling:
        _check_shapes(x, axis, gamma=gamma, beta=beta)
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
    """As `functional.rms_normalization`, by the implementation that `choose` names.

    Args:
        x, gamma, axis, epsilon: as there.
        training: as in `batch_normalization`.
        implementation: "composed", "products" or, on TensorFlow, "compiled" or "x_hat" ("composed"
            or "native" on PyTorch). Default: what `choose` names.

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
    options: dict[str, Any] = {"training": training, "implementation": implementation}
    chosen = choose_for("rms_normalization", x, axis=axis, **options)
    if chosen == "composed":
        return functional.rms_normalization(x, gamma, axis=axis, epsilon=epsilon)
    _check_shapes(x, axis, gamma=gamma)
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
    """As `functional.group_normalization`, by the implementation that `choose` names.

    Args:
        x, gamma, beta, groups, axis, epsilon: as there.
        training: as in `batch_normalization`.
        implementation: "composed", "by_channel" or, on TensorFlow, "compiled" ("composed" or
            "native" on PyTorch). Default: what `choose` names.

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
    options: dict[str, Any] = {"training": training, "implementation": implementation}
    chosen = choose_for("group_normalization", x, axis=axis, **options)
    if chosen != "composed":
        _check_shapes(x, axis, gamma=gamma, beta=beta)
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
    """As `functional.instance_normalization`, by the implementation that `choose` names.

    Args:
        x, gamma, beta, axis, epsilon: as there.
        training: as in `batch_normalization`.
        implementation: "composed", "by_channel" or, on TensorFlow, "compiled" ("composed" or
            "native" on PyTorch). Default: what `choose` names.

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
    options: dict[str, Any] = {"training": training, "implementation": implementation}
    chosen = choose_for("instance_normalization", x, axis=axis, **options)
    if chosen != "composed":
        _check_shapes(x, axis, gamma=gamma, beta=beta)
        y = _GROUPED[chosen](x, gamma, beta, x.shape[-1], epsilon)
        if y is not None:
            return y
    return functional.instance_normalization(x, gamma, beta, axis=axis, epsilon=epsilon)

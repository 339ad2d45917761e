"""Checks of numbers and arrays, and conversions to tensors and dtypes faster than Keras's."""

import numbers
from typing import Any

import keras
from keras import ops

Array = Any


def is_real(x: Any) -> bool:
    """Whether x is a real number of Python or NumPy, not a bool or a string such as YAML's 1e-3.

    Args:
        x: anything.

    Returns:
        bool. Infinity and NaN are numbers.

    Example:
        >>> [is_real(x) for x in (1, 0.5, np.float32(1), "1e-3", None, True)]
        [True, True, True, False, False, False]
    """
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_integer(x: Any) -> bool:
    """Whether x has an integer type of Python or NumPy, other than bool.

    Args:
        x: anything.

    Returns:
        bool.

    Example:
        >>> [is_integer(x) for x in (1, np.int64(1), 1.0, "1", None, True)]
        [True, True, False, False, False, False]
    """
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def python_axis(axis: Any) -> Any:
    """An axis, or several, with Python's integers in place of NumPy's, which JSON cannot hold.

    Args:
        axis: anything.

    Returns:
        A list for a list, a tuple for a tuple, an int for an integer; anything else as it is.

    Example:
        >>> python_axis(np.int64(1)), python_axis((np.int64(1), 2)), python_axis(1.0)
        (1, (1, 2), 1.0)
    """
    if isinstance(axis, list | tuple):
        axes = [python_axis(a) for a in axis]
        return axes if isinstance(axis, list) else tuple(axes)
    return int(axis) if is_integer(axis) else axis


def check_dense(x: Any) -> None:
    """Refuses TensorFlow's ragged and sparse tensors, which only some operations accept.

    Args:
        x: of any type.

    Raises:
        ValueError: for a ragged or sparse tensor.
    """
    kind = type(x).__name__
    if kind not in ("RaggedTensor", "SparseTensor"):
        return
    remedy = (
        "Pass x.to_tensor(), where a mask says what is padding; or normalize x.flat_values, and "
        "put it back by x.with_flat_values(y)."
        if kind == "RaggedTensor"
        else "Pass tf.sparse.to_dense(x)."
    )
    raise ValueError(f"Inputs must be dense. Received: a {kind} of shape {x.shape}. {remedy}")


def tensor(x: Any, dtype: Any = None) -> Array:
    """As `ops.convert_to_tensor`, but faster on PyTorch, where x stays on its device.

    Args:
        x: array, tensor or variable.
        dtype: of the result, as the backend names it (`x.dtype` of a tensor); None for x's own.

    Returns:
        A tensor; x itself if it already is one, of that dtype.

    Example:
        >>> half = tensor(np.ones(3, "float16"))
        >>> np.asarray(tensor([1.0, 2.0], half.dtype))
        array([1., 2.], dtype=float16)
    """
    if keras.backend.backend() != "torch":
        return ops.convert_to_tensor(x, dtype)
    import torch

    x = x.value if isinstance(x, keras.Variable) else x
    if not isinstance(x, torch.Tensor):  # `ops.convert_to_tensor` is slow to recognize one
        x = ops.convert_to_tensor(x)
    return x if dtype in (None, x.dtype) else x.to(dtype)


def dtype_name(dtype: Any) -> str:
    """As `keras.backend.standardize_dtype`, which takes longer on PyTorch.

    Args:
        dtype: of a tensor.

    Returns:
        Keras's name for it.

    Example:
        >>> dtype_name(tensor(np.ones(3, "float16")).dtype)
        'float16'
    """
    if dtype not in _DTYPE_NAMES:
        _DTYPE_NAMES[dtype] = str(keras.backend.standardize_dtype(dtype))
    return _DTYPE_NAMES[dtype]


_DTYPE_NAMES: dict[Any, str] = {}


def in_dtype(x: Any, dtype: Any) -> Array:
    """As `ops.cast`, but faster where there is nothing to do.

    Args:
        x: array, tensor or variable.
        dtype: of the result, Keras's name or the backend's.

    Returns:
        A tensor; x itself if it already is one, of that dtype.

    Example:
        >>> half = tensor(np.ones(3, "float16"))
        >>> in_dtype(half, "float16") is half
        True
    """
    if ops.is_tensor(x) and dtype_name(x.dtype) == dtype_name(dtype):
        return x
    return ops.cast(x, dtype)

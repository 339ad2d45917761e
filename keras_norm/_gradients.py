"""Gradients of a scalar function, the same call on TensorFlow, JAX and PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

__all__ = ["float64_promotion", "gradients", "restored_randomness", "traced"]

Tensor = Any
Function = Callable[..., Tensor]


def gradients(
    function: Function, arrays: Sequence[Any], *, variables: Sequence[Any] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Evaluate a scalar function together with its gradient.

    The gradient comes from the backend's own reverse mode: `tf.GradientTape`, `jax.grad` or
    `torch.autograd`. Nothing is compiled, and nothing is left behind: what the function assigns
    to Keras variables (moving statistics, the state of a seed generator, metrics) is discarded.

    Args:
        function: called as `function(*arrays)`; returns a scalar. It may read `variables`, and
            `layer.losses` of the layers that it calls.
        arrays: floating-point arrays or tensors, each differentiated.
        variables: Keras variables (`keras.Variable`) to differentiate as well, at their present
            values, trainable or not. Default: none.

    Returns:
        `(value, grads)`: the scalar, shape `()`, and a flat list of tensors, one per array and
        then one per variable, each of the shape and dtype of what it belongs to. Where the value
        does not depend on an array or variable its gradient is zero, never `None`.

    Raises:
        ValueError: the value is not a scalar, an array or variable is not floating-point, or the
            backend has no automatic differentiation.

    Example:
        One step of gradient descent on the line w·x through (1, 2) and (2, 4), with tensors
        alone, and with a variable.

        >>> import keras
        >>> x, y = keras.ops.array([1.0, 2.0]), keras.ops.array([2.0, 4.0])
        >>> squared_error = lambda w: keras.ops.sum((w * x - y) ** 2) / 2
        >>> w = keras.ops.array(1.0)
        >>> value, (dw,) = gradients(squared_error, [w])
        >>> float(value), float(dw), float(w - 0.2 * dw)
        (2.5, -5.0, 2.0)
        >>> slope = keras.Variable(1.0)
        >>> value, (dslope,) = gradients(lambda: squared_error(slope), [], variables=[slope])
        >>> _ = slope.assign(slope - 0.2 * dslope)
        >>> float(slope.numpy())
        2.0

    Numerics: arrays and variables keep their dtype; the backend's own arithmetic.
    """
    backend = keras.backend.backend()
    if backend not in _BACKENDS:
        raise ValueError(
            f"Gradients need a backend with automatic differentiation, one of {sorted(_BACKENDS)}."
            f" Received: backend={backend!r}. Set the environment variable KERAS_BACKEND."
        )
    tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
    for kind, items in (("arrays", tensors), ("variables", variables)):
        for index, item in enumerate(items):
            _require_float(f"{kind}[{index}]", item)
    return _BACKENDS[backend](function, tensors, list(variables))


def _require_float(name: str, item: Any) -> None:
    dtype = keras.backend.standardize_dtype(item.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            f"Only floating-point values have a gradient. Received: {name} of dtype={dtype}. "
            "Let the function close over what is not differentiated."
        )


def _scalar(value: Any) -> Tensor:
    value = keras.ops.convert_to_tensor(value)
    if tuple(value.shape) != ():
        raise ValueError(
            "The function must return a scalar, shape (). Received: a value of "
            f"shape={tuple(value.shape)}. Reduce it, for example with keras.ops.sum."
        )
    return value


def _tensorflow(
    function: Function, arrays: list[Tensor], variables: list[Any]
) -> tuple[Tensor, list[Tensor]]:
    import tensorflow as tf

    # The variables themselves are watched, not copies of their values: functions with a custom
    # gradient tell the two apart, and `fit` uses the variables.
    sources = [tf.identity(array) for array in arrays] + [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        with keras.StatelessScope(collect_losses=True) as scope:
            for variable in variables:
                scope.add_update((variable, variable.value))
            value = _scalar(function(*sources[: len(arrays)]))
    zero = tf.UnconnectedGradients.ZERO
    grads = tape.gradient(value, sources, unconnected_gradients=zero)
    return value, [tf.convert_to_tensor(grad) for grad in grads]  # sparse ones made dense


def _jax(
    function: Function, arrays: list[Tensor], variables: list[Any]
) -> tuple[Tensor, list[Tensor]]:
    import jax

    def pure(arrays: list[Tensor], values: list[Tensor]) -> Tensor:
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(mapping, collect_losses=True):
            return _scalar(function(*arrays))

    values = [variable.value for variable in variables]
    value, grads = jax.value_and_grad(pure, argnums=(0, 1))(arrays, values)
    return value, [*grads[0], *grads[1]]


def _torch(
    function: Function, arrays: list[Tensor], variables: list[Any]
) -> tuple[Tensor, list[Tensor]]:
    import torch

    given = arrays + [variable.value for variable in variables]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    mapping = list(zip(variables, leaves[len(arrays) :], strict=True))
    with torch.enable_grad(), keras.StatelessScope(mapping, collect_losses=True):
        value = _scalar(function(*leaves[: len(arrays)]))
    if not (leaves and value.requires_grad):
        return value, [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    return value.detach(), [
        zero if grad is None else grad for zero, grad in zip(zeros, grads, strict=True)
    ]


_BACKENDS: dict[str, Callable[..., tuple[Tensor, list[Tensor]]]] = {
    "tensorflow": _tensorflow,
    "jax": _jax,
    "torch": _torch,
}


def traced(function: Function) -> Function:
    """The same function of tensors as a `tf.function` or `jax.jit`; on PyTorch, as it is."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    if backend == "jax":
        import jax

        return jax.jit(function)
    return function


@contextlib.contextmanager
def float64_promotion() -> Iterator[None]:
    """Let Keras compute with float64 what is given as float64, on every backend.

    On JAX and PyTorch, Keras 3 promotes float64 with float64 to float32: on PyTorch
    `keras.ops.matmul`, and so `keras.layers.Dense`, computes float64 operands in float32, and
    gradients of such a layer cannot be compared to more than about four digits. Inside this
    context the promotion ends in float64, as it does on TensorFlow. On TensorFlow, and with
    releases of Keras that have no such rule, the context changes nothing.

    Example:
        >>> import keras
        >>> with float64_promotion():
        ...     keras.backend.result_type("float64", "float64")
        'float64'
    """
    try:
        from keras.src.backend.common import dtypes
    except ImportError:
        dtypes = None
    table = getattr(dtypes, "BIT64_TO_BIT32_DTYPE", {})
    before = dict(table)
    table.update({"float64": "float64"} if table else {})
    try:
        yield
    finally:
        table.update(before)


@contextlib.contextmanager
def restored_randomness() -> Iterator[None]:
    """Put the backend's own random state back at the end.

    On PyTorch, `keras.layers.Dropout` without a seed draws from the generator of PyTorch instead
    of the layer's seed generator. Elsewhere Keras keeps random state in variables, and the
    context changes nothing.
    """
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.random.fork_rng():
        yield

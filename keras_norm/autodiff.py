"""Attach a hand-derived backward pass to a function, on TensorFlow, JAX and PyTorch.

The mathematics of this package is written as pairs of pure functions: a forward pass that
returns its outputs and what the backward pass needs from it (the residuals), and a backward
pass that turns the gradients of the outputs into the gradients of the inputs. `custom_vjp`
joins such a pair into one differentiable function on Keras's backend.

`keras.ops.custom_gradient` is not used: on PyTorch it takes only one output and hides every
error of the forward pass, and its gradient cannot be differentiated again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_norm._arrays import tensor

__all__ = ["can_compile", "compiled", "custom_vjp", "is_traced", "peek"]

Array = Any
Forward = Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]
Backward = Callable[[tuple[Array, ...], tuple[Array, ...]], Sequence[Array | None]]


def custom_vjp(forward: Forward, backward: Backward, *inputs: Array | None) -> tuple[Array, ...]:
    """Calls `forward` on the inputs, with `backward` as its gradient.

    Second derivatives work: the backward pass is differentiated like any other code, with
    the residuals as functions of the inputs. (On PyTorch the residuals are computed a second
    time for this, and only for this.) Forward-mode differentiation is not defined; JAX refuses
    it with a `TypeError`.

    Args:
        forward: `forward(*inputs) -> (outputs, residuals)`, two tuples of arrays. It must get
            every array that it uses through its inputs, none through a closure.
        backward: `backward(residuals, upstream) -> gradients`; `upstream` has one array for
            every output (zeros for an output that was not used); `gradients` has one entry for
            every input, `None` if the input is a constant, and is cast to the dtypes of the
            inputs.
        *inputs: arrays, or `None` for an omitted input; both functions see it as `None`.

    Returns:
        The outputs of `forward`, a tuple of arrays.

    Raises:
        ValueError: if Keras runs on a backend other than the three.

    Example:
        >>> import numpy as np
        >>> from keras import ops
        >>> def forward(x):
        ...     return (x * x,), (x,)
        >>> def backward(residuals, upstream):
        ...     return (2 * residuals[0] * upstream[0],)
        >>> (y,) = custom_vjp(forward, backward, ops.convert_to_tensor([3.0]))
        >>> float(y[0])
        9.0
    """
    # All that the functions below need from the inputs: no JAX tracer may outlive its trace.
    present = [x is not None for x in inputs]
    arrays = [tensor(x) for x in inputs if x is not None]
    dtypes = [x.dtype for x in arrays]

    def forward_of_given(*given: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        remaining = iter(given)
        # A list: `torch.compile` does not pass on the items of a generator.
        return forward(*[next(remaining) if is_present else None for is_present in present])

    def backward_of_given(residuals: Any, upstream: Any) -> list[Array | None]:
        gradients = backward(residuals, upstream)
        given = [g for g, is_present in zip(gradients, present, strict=True) if is_present]
        return [
            g if g is None or g.dtype == dtype else ops.cast(g, dtype)
            for g, dtype in zip(given, dtypes, strict=True)
        ]

    return _implementation()(forward_of_given, backward_of_given, *arrays)


@functools.lru_cache(maxsize=1024)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays as one program that XLA compiles; on TensorFlow only.

    It is compiled when it first runs with arguments of these shapes, even inside another compiled
    function, and is differentiable like any other. Callers that pass the same function share the
    compiled program: pass a function that is kept, not one that is made anew for each call.

    Compiling takes much longer than running. If the first size of the first array is unknown
    while the surrounding function is traced, every batch may have another size (such as the nodes
    of a graph, or the objects a detector found): only sizes that `is_usual` accepts are compiled,
    and the others run as TensorFlow runs any function.

    Args:
        function: of arrays or None, returning a nest of them; Keras's operations, no variables.

    Returns:
        The compiled function; on other backends the function itself.

    Example:
        >>> double = compiled(lambda x: 2 * x)
        >>> float(double(ops.convert_to_tensor(3.0)))
        6.0
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    program, uncompiled = (
        tf.function(function, jit_compile=compiles, autograph=False, reduce_retracing=True)
        for compiles in (True, None)
    )
    # Many shapes mean many programs here, on purpose: TensorFlow need not warn about them.
    program._omit_frequent_tracing_warning = uncompiled._omit_frequent_tracing_warning = True

    @functools.wraps(function)
    def call(*arrays: Array | None) -> Any:
        # In the gradient of `tf.cond`, an operation can use what the branch has computed, but a
        # function call cannot.
        given = [None if x is None else tf.identity(x) for x in arrays]
        first: Any = given[0]
        if first.shape[:1] != [None]:
            return program(*given)
        usual = is_usual(tf.shape(first)[0])
        return tf.cond(usual, lambda: program(*given), lambda: uncompiled(*given))

    return call


# The batch sizes that people choose: few in each octave, whatever the other sizes are.
_USUAL = sorted(
    {k * 2**j for k in range(1, 8) for j in range(22)}
    | {k * 10**j for k in (*range(1, 10), 15, 25) for j in range(7)}
)


def is_usual(size: Any) -> Any:
    """Whether a batch size is likely to recur: k 2^j with k < 8, or one such as 90 or 250.

    Args:
        size: an integer, or a tensor of TensorFlow.

    Example:
        >>> is_usual(96), is_usual(250), is_usual(997)
        (True, True, False)
    """
    if isinstance(size, int):
        return size in _USUAL
    import tensorflow as tf

    return tf.reduce_any(tf.equal(size, tf.constant(_USUAL, size.dtype)))


@functools.lru_cache(maxsize=1)
def can_compile() -> bool:
    """Whether `compiled` returns compiled functions: not on a TensorFlow without XLA.

    Example:
        >>> can_compile() in (True, False)
        True
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    try:
        with tf.init_scope():
            tf.function(lambda x: x + 1, jit_compile=True, autograph=False)(tf.zeros(1))
    except (tf.errors.OpError, ValueError):
        return False
    return True


def in_graph() -> bool:
    """Whether TensorFlow is tracing a function instead of computing at once.

    Example:
        >>> in_graph()
        False
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def inside_xla() -> bool:
    """Whether TensorFlow is tracing a function to be compiled by XLA whole (`jit_compile=True`).

    Example:
        >>> inside_xla()
        False
    """
    if not in_graph():
        return False
    try:
        from tensorflow.python.framework.ops import get_default_graph
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:
        return False
    return bool(GraphOrParentsInXlaContext(get_default_graph()))


def is_traced(x: Array) -> bool:
    """Whether x stands for an array in a function that is being compiled, to run later.

    False where Keras only infers shapes, and on PyTorch.

    Example:
        >>> is_traced(ops.ones(3))
        False
    """
    backend = keras.backend.backend()
    if backend == "torch" or _infers_shapes():
        return False
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    if backend == "jax":
        import jax

        while isinstance(x, jax.core.Tracer):
            if not hasattr(x, "primal"):
                return True
            x = x.primal  # in a derivative, which may be taken without `jit`
        return False
    return False


def _infers_shapes() -> bool:
    try:
        from keras.src.backend.common.symbolic_scope import in_symbolic_scope
    except ImportError:
        return False
    return bool(in_symbolic_scope())


def peek(variable: Any) -> Any:
    """The present value of a Keras variable as a NumPy array, even while a function is traced.

    Returns:
        The value, or `None` where it is not known yet: inside JAX's `jit`.

    Example:
        >>> peek(keras.Variable([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    backend = keras.backend.backend()
    if _infers_shapes() or variable._value is None:
        return None
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.init_scope():
            return ops.convert_to_numpy(variable._value)
    value = variable.value
    if backend == "jax":
        import jax

        if isinstance(value, jax.core.Tracer):
            return None
    return ops.convert_to_numpy(value)


def eagerly(function: Callable[[], Any]) -> Any:
    """Calls a function without tensors outside of any graph that is being traced."""
    if keras.backend.backend() != "tensorflow":
        return function()
    import tensorflow as tf

    with tf.init_scope():
        return function()


def checked_backend() -> str:
    """The name of Keras's backend.

    Raises:
        ValueError: for a backend that trains nothing.
    """
    backend: str = keras.backend.backend()
    if backend not in _IMPLEMENTATIONS:
        raise ValueError(
            "A hand-derived gradient needs one of the backends "
            f"{', '.join(sorted(_IMPLEMENTATIONS))}. Received: KERAS_BACKEND={backend!r}. "
            "Set the environment variable KERAS_BACKEND before Keras is imported."
        )
    return backend


def _implementation() -> Callable[..., tuple[Array, ...]]:
    return _IMPLEMENTATIONS[checked_backend()]


def _tensorflow(forward: Forward, backward: Backward, *inputs: Array) -> tuple[Array, ...]:
    import tensorflow as tf

    # Read the variables out here: `tf.custom_gradient` would want gradients for those it sees.
    inputs = tuple(tf.convert_to_tensor(x) for x in inputs)
    if tf.executing_eagerly() and not _is_recorded():
        return tuple(forward(*inputs)[0])  # the rest would take longer than a small layer
    if type(tf.compat.v1.get_default_graph()).__name__ == "CondBranchFuncGraph":
        # In a branch of `tf.cond`, only what the branch has computed can be differentiated twice.
        inputs = tuple(tf.identity(x) for x in inputs)

    @tf.custom_gradient
    def function(*arrays: Array) -> tuple[Any, Any]:
        outputs, residuals = forward(*arrays)

        def gradient(*upstream: Array) -> Sequence[Array | None]:
            return backward(residuals, upstream)

        return outputs, gradient

    return tuple(function(*inputs))


def _is_recorded() -> bool:
    """Whether a `tf.GradientTape` or a forward accumulator is recording."""
    try:
        from tensorflow.python.eager.record import could_possibly_record
    except ImportError:
        return True
    return bool(could_possibly_record())


def _jax(forward: Forward, backward: Backward, *inputs: Array) -> tuple[Array, ...]:
    import jax

    kinds = [(x.shape, x.dtype) for x in inputs]

    @jax.custom_vjp
    def function(*arrays: Array) -> tuple[Array, ...]:
        return forward(*arrays)[0]

    def function_forward(*arrays: Array) -> tuple[Any, Any]:
        return forward(*arrays)

    def function_backward(residuals: Any, upstream: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(
            _jax_zero(*kind) if gradient is None else gradient
            for gradient, kind in zip(backward(residuals, upstream), kinds, strict=True)
        )

    function.defvjp(function_forward, function_backward)
    return function(*inputs)


def _jax_zero(shape: tuple[int, ...], dtype: Any) -> Array:
    """The zero gradient of a constant: JAX wants one of a special dtype for integers."""
    import jax
    import numpy as np

    if jax.numpy.issubdtype(dtype, jax.numpy.inexact):
        return jax.numpy.zeros(shape, dtype)
    return np.zeros(shape, jax.dtypes.float0)


def _torch(forward: Forward, backward: Backward, *inputs: Array) -> tuple[Array, ...]:
    import torch

    if in_transform():  # a function like this one would need its own rules for `vmap` and `grad`
        return tuple(forward(*inputs)[0])
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        with torch.no_grad():
            return tuple(forward(*inputs)[0])
    return tuple(_TORCH_FUNCTION.apply(forward, backward, *inputs))


def in_transform() -> bool:
    """Whether this runs inside one of PyTorch's function transforms, such as `torch.func.vmap`.

    There arrays have no values to inspect, and the backward pass is PyTorch's own.
    """
    if keras.backend.backend() != "torch":
        return False
    import torch

    peek_at_stack = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return peek_at_stack is not None and peek_at_stack() is not None


def _make_torch_function() -> Any:
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, forward: Forward, backward: Backward, *arrays: Array
        ) -> tuple[Array, ...]:
            outputs, residuals = forward(*arrays)
            ctx.halves, ctx.inputs = (forward, backward), len(arrays)
            ctx.save_for_backward(*arrays, *residuals)
            return tuple(outputs)

        @staticmethod
        def backward(ctx: Any, *upstream: Array) -> tuple[Array | None, ...]:
            forward, backward = ctx.halves
            saved = ctx.saved_tensors  # once: a checkpoint gives out its tensors only once
            arrays, residuals = saved[: ctx.inputs], saved[ctx.inputs :]
            if torch.is_grad_enabled():
                # The gradient will itself be differentiated: saved residuals are constants
                # for autograd, recomputed ones are functions of the inputs.
                residuals = forward(*arrays)[1]
            return None, None, *backward(residuals, upstream)

    return Function


# One class for all calls, made here: making it takes longer than a small layer, and
# `torch.compile` cannot make it.
_TORCH_FUNCTION: Any = _make_torch_function() if keras.backend.backend() == "torch" else None

_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "tensorflow": _tensorflow,
    "jax": _jax,
    "torch": _torch,
}

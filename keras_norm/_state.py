"""Numbers of a layer that may change after a function was traced, and still take effect.

A Python number that a compiled function reads is baked into it. The numbers here are kept twice:
as Python numbers, for ordinary code, and in a variable, which compiled functions read when they
run. The variable is state but not a weight, like that of a seed generator: it is in
`layer.variables` (JAX passes it through its training step), but not in `layer.weights`, and is not
saved; the numbers are in the layer's configuration. PyTorch runs eagerly, and `torch.compile`
watches Python numbers by itself, so they have no variable there. The counter is such a variable on
every backend.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_norm import autodiff

__all__ = ["LiveNumbers", "as_of_now", "synchronized"]

Array = Any


def as_of_now(variable: Any) -> Array:
    """The variable's present value.

    On PyTorch, a copy if gradients are recorded, because an assignment would change the tensor that
    the backward pass reads later.
    """
    value = variable.value
    if keras.backend.backend() == "torch":
        import torch

        return value.clone() if torch.is_grad_enabled() else value
    return value


def synchronized(model: Any) -> None:
    """Updates the variables' values: in the middle of `fit` on JAX only the step holds them."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


class LiveNumbers:
    """Named numbers, read by compiled functions at the time they run; and a counter.

    Args:
        **values: the names and their first values, floats or booleans.
    """

    def __init__(self, **values: float) -> None:
        self._values = dict(values)
        self._vector: Any = None
        self._count: Any = None

    def build(self, dtype: str) -> None:
        """Creates the counter, and the variable of the numbers where the backend needs it."""
        traced = keras.backend.backend() != "torch"
        options = {"dtype": dtype, "trainable": False, "autocast": False}
        options["aggregation"] = "only_first_replica"  # all replicas hold the same
        self._count = keras.Variable("zeros", shape=(), name="skipped_batches", **options)
        if traced:
            # A callable, because a scope may initialize the variables it creates later.
            self._vector = keras.Variable(
                lambda shape, dtype: ops.convert_to_tensor(self._as_array(), dtype),
                shape=(len(self._values),),
                name="switches",
                **options,
            )

    @property
    def variables(self) -> list[Any]:
        """The variables that a stateless step must pass through: on PyTorch only the counter."""
        return [v for v in (self._vector, self._count) if v is not None]

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def refresh(self) -> bool:
        """Reads what others have assigned to the variable, and returns whether they had.

        Restoring the state of a model also restores this variable. Compiled functions follow it,
        and so must the Python numbers.
        """
        found = None if self._vector is None else autodiff.peek(self._vector)
        if found is None or len(found) < len(self._values):  # created while a function is traced
            return False
        if np.array_equal(found, self._as_array().astype(found.dtype)):
            return False
        # The shortest text for a float32 number: .99, not .9900000095.
        self._values = {name: float(str(v)) for name, v in zip(self._values, found, strict=True)}
        return True

    def update(self, **values: float) -> None:
        """Changes some of the numbers, for all functions, traced or not.

        Raises:
            ValueError: in the middle of an epoch of `fit` on JAX, whose step holds the state.
        """
        if self._vector is not None and _detached(self._vector):
            raise ValueError(
                "During an epoch of `fit` on JAX the layer's state is inside the training step, "
                f"and a change would be lost. Received: {values}. Call model.jax_state_sync() "
                "first, or make the change between epochs, in `on_epoch_begin`."
            )
        self._values.update(values)
        if self._vector is not None and self._vector._initializer is None:
            self._vector.assign(self._as_array())

    def read(self) -> dict[str, Array]:
        """The numbers in the form that functions must use: scalar tensors; floats on PyTorch."""
        if self._vector is None:
            return dict(self._values)
        return dict(zip(self._values, ops.unstack(self._vector.value), strict=True))

    @property
    def vector(self) -> Array:
        """The tensor that `read` splits, in the order of the names; not on PyTorch."""
        return self._vector.value

    @property
    def counter(self) -> Any:
        """The variable that `count` adds to."""
        return self._count

    def count(self, increment: Array) -> None:
        self._count.assign(self._count.value + ops.cast(increment, self._count.dtype))

    @property
    def counted(self) -> int:
        if self._count is None:
            return 0
        if _detached(self._count):
            raise ValueError(
                "During an epoch of `fit` on JAX the layer's state is inside the training step. "
                "Received: a request for the number of skipped batches. Call "
                "model.jax_state_sync() first, or ask between epochs."
            )
        return int(ops.convert_to_numpy(self._count.value))

    def _as_array(self) -> Any:
        return np.array(list(self._values.values()), "float64")


def _detached(variable: Any) -> bool:
    """Whether Keras's JAX trainer has taken the value away for the length of an epoch."""
    return variable._value is None and variable._initializer is None

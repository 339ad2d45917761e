"""What a layer with a state must know of rematerialization, alias activation checkpointing.

Inside `keras.RematScope` or `torch.utils.checkpoint` the backward pass calls a layer once more,
for the activations that were not kept. On PyTorch such a call sees the state that the forward
pass has left: moving statistics would take in their batch twice, and dropout would draw another
mask than the one that the outputs were made with. (TensorFlow's `recompute_grad` gives no sign
that it repeats a call; in JAX a state is handed in and out, and a repeated call has the old one.)
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_norm import autodiff

_DRAWS_KEPT = 1024


def is_repeated() -> bool:
    """Whether a backward pass of PyTorch calls this again, for what its forward pass has done."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    if torch.compiler.is_compiling():
        return False
    # Names the backward pass that this thread runs; -1 outside of any.
    of_backward = getattr(torch._C, "_current_graph_task_id", None)
    return of_backward is not None and of_backward() != -1


def _may_be_repeated() -> bool:
    """Whether a rematerialized function may be around this call in a forward pass of PyTorch.

    Such a function runs without gradients, or under hooks that take what would be kept.
    """
    import torch

    if not torch.is_grad_enabled():
        return True
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


def known(training: Any) -> bool:
    """`training` where it is but a hint: False for a traced one (see `decided`)."""
    return isinstance(training, bool | int | np.bool_) and bool(training)


def decided(training: Any) -> bool:
    """`training` where numbers hang on it.

    Raises:
        ValueError: for a tensor whose value is not known while a function is traced.
    """
    try:
        return bool(training)
    except TypeError as error:  # JAX's and TensorFlow's errors are ones
        raise ValueError(
            "The layer must know whether it trains when it is traced. Received: "
            f"training={training}. Pass True or False; on JAX, keras.RematScope makes a tracer "
            "of it: leave the layer, and models that hold it, out of the scope."
        ) from error


class Draws:
    """States that a seed generator had before its draws: a repeated call draws the same again.

    A call is known again by a random number: a rematerialized function finds PyTorch's own
    generator as its first run did (unless it is told `preserve_rng_state=False`).
    """

    def __init__(self) -> None:
        self._states: OrderedDict[int, Any] = OrderedDict()

    @contextlib.contextmanager
    def of(self, generator: Any) -> Iterator[None]:
        """Draw from the generator within: in a repeated call it has its state of the first."""
        if keras.backend.backend() != "torch" or autodiff.in_transform():
            yield
            return
        import torch

        if torch.compiler.is_compiling() or not (is_repeated() or _may_be_repeated()):
            yield
            return
        call = int(torch.randint(2**62, (), device="cpu"))
        state = generator.state
        now = state.value.clone()
        before = self._states.get(call) if is_repeated() else None
        if before is None:
            self._states[call] = now
            if len(self._states) > _DRAWS_KEPT:
                self._states.popitem(last=False)
            yield
            return
        state.assign(before)
        try:
            yield
        finally:
            state.assign(now)

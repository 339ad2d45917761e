"""Shortcuts to PyTorch's kernels, for inputs like those for which they were chosen before.

For a layer whose axis stays what it was, and inputs in memory, only their shape and dtype decide
which implementation is used and whether it can be. Asking is much Python code, little of which
stays in the processor's caches from one layer to the next: on small arrays it takes longer than the
kernel. So a layer that has come to a kernel by the full path remembers the shape and the dtype.
"""

from collections.abc import Sequence
from typing import Any

import keras

from keras_norm import _kernels_torch, functional
from keras_norm._arrays import dtype_name
from keras_norm._kernels_choice import implementation_for, is_forced
from keras_norm._kernels_common import can_be_looked_at

try:
    from keras.src.backend.common.stateless_scope import in_stateless_scope
except ImportError:  # then batch normalization has no shortcut: whose value is a variable's?
    in_stateless_scope = None

Array = Any
Axis = int | Sequence[int]

# A layer that has met more shapes than this forgets them all, and begins again.
MOST_SHAPES = 64


class _Shortcut:
    """What is remembered of inputs, and whether it can be used now."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._is_closed = keras.backend.backend() != "torch"

    def is_open_to(self, x: Any) -> bool:
        """Whether x, of any type, is an array in memory that may be looked at."""
        if self._is_closed:
            return False
        import torch

        is_plain = type(x) is torch.Tensor and x.is_cpu and can_be_looked_at(x)
        return is_plain and not is_forced()

    def _remember(self, key: Any, what: Any) -> None:
        if len(self._known) >= MOST_SHAPES:
            self._known.clear()
        self._known[key] = what


class RowsShortcut(_Shortcut):
    """The shortcut of layer and RMS normalization.

    Args:
        function: "layer_normalization" or "rms_normalization".
        axis: of the layer.

    Example:
        >>> from keras_norm.kernels import tensor
        >>> shortcut = RowsShortcut("rms_normalization", -1)
        >>> shortcut.take(tensor(np.ones((2, 3), "float32")), None, None, 1e-6) is None
        True
    """

    def __init__(self, function: str, axis: Axis) -> None:
        super().__init__()
        self._function, self._axis = function, axis
        self._axes = len(axis) if isinstance(axis, list | tuple) else 1
        self._centers = function == "layer_normalization"

    def take(self, x: Any, gamma: Any, beta: Any, epsilon: float) -> Array | None:
        """y by the kernel; None where the full path, with its choice and checks, is needed.

        After a mean that was far from 0, or not finite, it always is: others will be, too.

        Args:
            x: the layer's inputs.
            gamma, beta: variables of the layer, or None.
            epsilon: of the layer.
        """
        if not self.is_open_to(x) or not self._known.get(self._key(x)):
            return None
        gamma = None if gamma is None else gamma.value
        beta = None if beta is None else beta.value
        if any(v is not None and v.dtype is not x.dtype for v in (gamma, beta)):
            return None  # they had the dtype of x before
        functional.check_epsilon(epsilon)
        sizes = x.shape[-self._axes :]
        y = _kernels_torch.rows(x, gamma, beta, sizes, epsilon, self._centers)
        self._is_closed = y is None
        return y

    def learn(self, x: Any, gamma: Any, beta: Any) -> None:
        """Allows the shortcut, where possible, for inputs like x, which took the full path.

        Args:
            x, gamma, beta: as in `take`. The full path casts parameters to the dtype of x.
        """
        if not self.is_open_to(x) or self._key(x) in self._known:
            return
        alike = x.dtype, x.shape[-self._axes :]
        given = [v.value for v in (gamma, beta) if v is not None]
        possible = all((v.dtype, v.shape) == alike for v in given)
        possible = possible and _chooses_native(self._function, x, self._axis)
        self._remember(self._key(x), possible)

    def _key(self, x: Any) -> Any:
        return x.ndim, x.shape[-self._axes :], x.dtype


class BatchShortcut(_Shortcut):
    """The shortcut of batch normalization.

    The layer's variables are read, and moved in place, without Keras's accessors, each of which
    asks on what device and in what scope it is: so not in a `keras.StatelessScope`.

    Example:
        >>> from keras_norm.kernels import tensor
        >>> shortcut, x = BatchShortcut(), tensor(np.ones((2, 3), "float32"))
        >>> mean, variance = (keras.Variable(np.zeros(3, "float32")) for _ in range(2))
        >>> shortcut.step(x, mean, variance, None, None, 1e-3) is None
        True
        >>> shortcut.learn(x, -1)
        >>> known = shortcut.step(x, mean, variance, None, None, 1e-3) is not None
        >>> known == (keras.backend.backend() == "torch")
        True
    """

    def step(
        self, x: Any, mean: Any, variance: Any, gamma: Any, beta: Any, epsilon: float
    ) -> tuple[Array, Array, Array] | None:
        """(y, mean, variance) by the statistics of x; None where the full path is needed.

        Args:
            x: the layer's inputs, of which `is_open_to` is true.
            mean, variance: the moving statistics, variables of the layer; they do not move.
            gamma, beta: variables of the layer, or None.
            epsilon: of the layer.
        """
        found = self._find(x, mean, variance, gamma, beta)
        if found is None:
            return None
        functional.check_epsilon(epsilon)
        pieces, _, _, gamma, beta = found
        return _kernels_torch.batch_of(pieces, x, gamma, beta, epsilon)

    def infer(
        self, x: Any, mean: Any, variance: Any, gamma: Any, beta: Any, epsilon: float
    ) -> Array | None:
        """y by the moving statistics; None where the full path is needed.

        Args: as in `step`.
        """
        found = None if _kernels_torch.records() else self._find(x, mean, variance, gamma, beta)
        if found is None:
            return None
        functional.check_epsilon(epsilon)
        pieces, mean, variance, gamma, beta = found
        return _kernels_torch.inference_of(pieces, x, mean, variance, gamma, beta, epsilon)

    def move(self, variable: Any, value: Array, keep: float, rest: float) -> None:
        """Makes a moving statistic keep * itself + rest * a value of `step`, in one write.

        Two writes would be seen by another thread, or left by an interruption, half done. The
        numbers are those of the full path to the last bit (`torch.lerp` rounds differently): a
        training does not depend on which path its steps take.
        """
        import torch

        moving = variable._value
        with torch.no_grad():
            moving.copy_(moving * keep + value * rest)

    def learn(self, x: Any, axis: Axis, *variables: Any) -> None:
        """Allows the shortcut, where possible, for inputs like x, which took the full path.

        Where it is not possible, None is remembered, which `_find` takes like an unknown shape.

        Args:
            x: the layer's inputs, of any type.
            axis: of the layer.
            *variables: gamma and beta of the layer, or None.
        """
        if not self.is_open_to(x) or (x.shape, x.dtype) in self._known or not x.numel():
            return
        pieces = None
        native = all(_chooses_native(f, x, axis) for f in ("batch_normalization", "normalize"))
        if native and in_stateless_scope is not None:
            (channel,) = functional.canonical_axes(axis, x.ndim)
            if all(v is None or v.shape == (x.shape[channel],) for v in variables):
                pieces = _kernels_torch.Pieces(x.shape, channel)
        self._remember((x.shape, x.dtype), pieces)

    def _find(self, x: Any, *variables: Any) -> Any:
        """What is known of x, and the variables' values; or None."""
        pieces = self._known.get((x.shape, x.dtype))
        if pieces is None or in_stateless_scope():
            return None
        values = [None if v is None else v._value for v in variables]
        if any(v is not None and v.dtype is not x.dtype for v in values):
            return None
        return pieces, *values


def _chooses_native(function: str, x: Array, axis: Axis) -> bool:
    return implementation_for(function, x.shape, dtype_name(x.dtype), axis, x=x) == "native"

"""Steps of a model as one compiled function that measures the inputs of normalization layers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops, tree

from keras_norm._kinds import kind_of, weights_in

Array = Any
Layer = Any


@dataclass(frozen=True)
class Ref:
    """Stands for value number `number` among the arguments of a step."""

    number: int


@dataclass
class Step:
    """One call in the model."""

    operation: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    outputs: list[int]
    inside: tuple[int, ...] = ()  # the selected normalization layers that it calls, by number
    direct: bool = False  # it is itself the one normalization layer
    level: int = 0

    @functools.cached_property
    def inputs(self) -> list[int]:
        """The numbers of the values that it is called on."""
        leaves = tree.flatten((self.args, self.kwargs))
        return [leaf.number for leaf in leaves if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Item:
    step: Step
    run: bool  # its outputs are used
    probe: bool  # the inputs of its normalization layers are measured


class _ReadMask(keras.layers.Layer):
    """Returns the mask that Keras has attached to a value."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Array, mask: Array | None = None) -> list[Array]:
        return [] if mask is None else [mask]

    def compute_mask(self, inputs: Array, previous_mask: Array | None) -> None:
        return None


class _AttachMask(keras.layers.Layer):
    """Attaches a mask to a value as Keras does."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: list[Array]) -> Array:
        return inputs[0]

    def compute_mask(self, inputs: list[Array], previous_mask: Any) -> Array:
        return inputs[1]


class _Inference(keras.layers.Layer):
    """Calls a function; every layer in it runs in inference mode unless its call says otherwise.

    Keras passes the mode to layers that are called within a layer, but on JAX `predict` bypasses
    the model's own `__call__`, so that layers whose default is training, such as augmentation,
    would train.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True
        self._function = function
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self._function(inputs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None


def _measured(layer: Layer, inputs: Array, given: Mapping[str, Any]) -> dict[str, Array]:
    """What is to be measured of one input of a normalization layer, with its mask and weights."""
    x = ops.cast(inputs, layer.compute_dtype)
    return kind_of(layer).measured(layer, x, weights_in(x, given))


@contextlib.contextmanager
def intercepted(layers: Iterable[Layer], handler: Callable[..., Any]) -> Iterator[None]:
    """Replaces the call of each layer by `handler(layer, call, inputs, ...)`.

    The call of a quantized layer is its `quantized_call`. Meanwhile none of the layers is
    rematerialized, because on JAX what the handler keeps would not be a value then.
    """
    patched: list[tuple[Layer, str, Any]] = []
    try:
        for layer in layers:
            called = "call" if layer.quantization_mode is None else "quantized_call"
            call = functools.partial(handler, layer, getattr(layer, called))
            for name, value in ((called, call), ("rematerialized_call", _as_it_is)):
                patched.append((layer, name, vars(layer).get(name)))
                object.__setattr__(layer, name, value)
        yield
    finally:
        for layer, name, before in reversed(patched):  # a layer may be given twice
            if before is not None:
                object.__setattr__(layer, name, before)
            elif name in vars(layer):
                object.__delattr__(layer, name)


def _as_it_is(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Takes the place of a layer's `rematerialized_call`, which returns a function to call."""
    return call


class Program(keras.Model):
    """Some steps of a model as one compiled function, in inference mode.

    From {"v3": value 3, "m3": its mask, ...} to the requested values, in the same form, and for
    each measured call of a layer "s.(layer).(call).(name)", see `_measured`.
    """

    predict_function: Any

    def __init__(
        self,
        items: Sequence[Item],
        layers: Sequence[Layer],
        outputs: Sequence[int],
        sweep: bool = False,
    ) -> None:
        super().__init__(name="statistics", autocast=False)
        self.run_eagerly: bool = False
        # Whether all is measured that can be; on PyTorch nothing is compiled.
        self._complete = keras.backend.backend() == "torch"
        self.supports_masking = True
        made = {v for item in items if item.run for v in item.step.outputs}
        self.needs = tuple(sorted({v for item in items for v in item.step.inputs} - made))
        self._items = tuple(items)
        self._asked = tuple(outputs)
        self._sweep = sweep  # `one_pass`: normalized once, by the batch or by moving statistics
        self._measures = {i: layers[i] for item in items for i in item.step.inside if item.probe}
        operations = [item.step.operation for item in items]
        # Tracked by Keras, so their variables are this model's and are read again in every run.
        self.parts = list({id(y): y for y in operations if isinstance(y, keras.Layer)}.values())
        self._inference = _Inference(self._steps)
        self.built = True

    def call(self, inputs: dict[str, Array]) -> dict[str, Array]:
        found: dict[str, Array] = self._inference(inputs, training=False)
        return found

    def _steps(self, inputs: dict[str, Array]) -> dict[str, Array]:
        values: dict[int, Array] = {}
        for number in self.needs:
            value, mask = inputs[f"v{number}"], inputs.get(f"m{number}")
            values[number] = value if mask is None else _AttachMask()([value, mask])
        found: dict[str, Array] = {}
        calls: dict[int, int] = {}

        def fill(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, Ref) else leaf

        def record(layer: Layer, value: Array, weights: dict[str, Any]) -> dict[str, Array]:
            index = next(i for i, y in self._measures.items() if y is layer)
            call = calls[index] = calls.get(index, -1) + 1
            sums = _measured(layer, value, weights)
            found.update({f"s.{index}.{call}.{name}": v for name, v in sums.items()})
            return sums

        def handler(layer: Layer, call: Any, inputs: Array, *args: Any, **kwargs: Any) -> Any:
            sums = record(layer, inputs, kwargs)
            if flag is None:
                return call(inputs, *args, **kwargs)
            if self._sweep:
                return _normalized_by_batch(layer, inputs, sums, kwargs, flag)
            y = call(inputs, *args, **kwargs)
            return ops.where(flag, _normalized_by_batch(layer, inputs, sums, kwargs), y)

        flag = inputs.get("by_batch")
        for item in self._items:
            step = item.step
            args = tree.map_structure(fill, step.args)
            kwargs = {k: tree.map_structure(fill, v) for k, v in step.kwargs.items()}
            if step.direct and not item.run:
                value = args[0] if args else kwargs["inputs"]
                mask = kwargs.get("mask")
                mask = mask_of(value) if mask is None else mask
                record(step.operation, value, {**kwargs, "mask": mask})
                continue
            inside = [y for i, y in self._measures.items() if i in step.inside]
            with intercepted(inside if item.probe else (), handler):
                result = step.operation(*args, **kwargs)
            values.update(zip(step.outputs, tree.flatten(result), strict=False))
        for number in self._asked:
            found[f"v{number}"] = values[number]
            mask = mask_of(values[number])
            if mask is not None:
                found[f"m{number}"] = mask
        return found

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: masks are values of their own here."""
        return None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Calls the compiled function; the model's variables are read, never written.

        A layer that is called by a loop, such as one in a cell of `keras.layers.RNN`, or by a
        function that is itself compiled, is measured inside it. Since what is measured cannot
        leave compiled code, such a model runs eagerly.

        Raises:
            ValueError: if what was measured is not available even then.
        """
        inputs = {k: ops.convert_to_tensor(v) for k, v in inputs.items()}
        if self.run_eagerly:
            return self._run_by_python(inputs)
        try:
            outputs = self._run(inputs)
        except Exception as error:
            if not _is_leak(error):
                raise
            self._complete = True
            return self._run_by_python(inputs)
        if not self._complete:
            self._complete = True
            outputs = self._with_what_was_compiled_before(inputs, outputs)
        return outputs

    def _with_what_was_compiled_before(
        self, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> dict[str, Array]:
        """The outputs, computed by Python if that reaches more layers.

        A function that the model's code has compiled before does not call its layers again.
        """
        missing = self._missing(outputs)
        if not missing:
            return outputs
        compiled, found = self.predict_function, outputs
        try:
            found = self._run_by_python(inputs)
        finally:
            if self._missing(found) == missing:
                self.run_eagerly, self.predict_function = False, compiled
        return outputs if self._missing(found) == missing else found

    def _missing(self, outputs: Mapping[str, Array]) -> set[int]:
        """The numbers of the layers of which nothing was measured."""
        return set(self._measures) - {int(key.split(".")[1]) for key in outputs if key[:2] == "s."}

    def _run_by_python(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if not self.run_eagerly:
            self.run_eagerly = True
            self.make_predict_function(force=True)
        try:
            with nothing_compiled():
                return self._run(inputs)
        except Exception as error:
            if not _is_leak(error):
                raise
            raise ValueError(
                "The inputs of a normalization layer must be within reach to be measured. "
                f"Received: a layer whose inputs do not come out of what calls it ({error})."
            ) from error

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        self.make_predict_function()
        if keras.backend.backend() != "jax":
            return dict(self.predict_function([(inputs,)]))
        # The compiled function consumes the buffers that it is given: it gets copies.
        state = tuple(
            [ops.copy(v.value) for v in variables]
            for variables in (self.trainable_variables, self.non_trainable_variables)
        )
        outputs, _ = self.predict_function(state, iter([(inputs,)]))
        # Uncompiled, as with layers that Keras does not compile, JAX itself complains of nothing.
        import jax

        for value in outputs.values():
            if isinstance(value, jax.core.Tracer):
                raise jax.errors.UnexpectedTracerError(f"Out of a loop came {value}.")
        return dict(outputs)


def _is_leak(error: Exception) -> bool:
    """Whether the error says that a value of a loop or a traced function was used outside it."""
    if keras.backend.backend() == "tensorflow":  # of several types, one of them not public
        return isinstance(error, TypeError | ValueError) and "out of scope" in str(error)
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(error, jax.errors.UnexpectedTracerError)
    return False


@contextlib.contextmanager
def functions_by_python() -> Iterator[None]:
    """Makes TensorFlow run each `tf.function` in the model's code as Python."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Makes loops and functions within run as plain Python; on PyTorch they do anyway."""
    if keras.backend.backend() != "jax":
        with functions_by_python():
            yield
        return
    import jax

    with jax.disable_jit():
        yield


def _normalized_by_batch(
    layer: Layer,
    inputs: Array,
    sums: dict[str, Array],
    given: Mapping[str, Any],
    flag: Array | None = None,
) -> Array:
    """The output by the batch's own statistics, or, if the flag is not set, by the moving ones."""
    x = ops.cast(inputs, layer.compute_dtype)
    y = kind_of(layer).by_batch(layer, x, weights_in(x, given), sums, flag)
    return ops.cast(y, layer.compute_dtype)


def mask_of(value: Array) -> Array | None:
    found = _ReadMask()(value)
    return found[0] if found else None

"""How the inputs of all normalization layers of a model are measured, layer by layer.

A model is written as a list of steps (`Plan`), with nested models written out. The steps between
two normalization layers are compiled as one function (`Program`), which computes what later steps
need and measures the inputs of the layers whose turn it is. `Solver` runs them in order, gives each
layer its statistics as soon as they are known, and iterates where layers depend on each other.
`OnePass` measures all layers at once, each normalizing by the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import keras
import numpy as np
import numpy.typing as npt
from keras import ops, tree

from keras_norm._kinds import Values, copy_of, kind_of, weights_in
from keras_norm._sample import Chunk, Environment, Sample, Store, nothing_came
from keras_norm.moments import Moments

__all__ = ["Found", "Job", "Rule", "copy_of", "current_statistics", "error_of", "movement", "rms"]

Array = Any
Layer = Any
Floats = npt.NDArray[np.float64]
Rule = Callable[[Layer, Moments], Values]
Statistics = Mapping[int, Values]  # by the number of the layer

_FIXED_POINT = 1e-6  # in units of sigma: a few times the rounding of a float32 forward pass
_MAX_ROUNDS = 100
_PILOT = 512  # examples in the first of the samples for a tolerance
_KEPT = "_keras_norm_statistics"  # attribute of a model
_TRIED_FIRST, _TRIED = 4, 40  # one pass is tried on the first four batches, and 2 in 40


# Statistics of one layer -----------------------------------------------------------------------


def set_statistics(layer: Layer, values: Values) -> None:
    kind_of(layer).assign(layer, values)


def movement(
    mean: Floats, variance: Floats, old_mean: Floats, old_variance: Floats, epsilon: float
) -> Floats:
    """How far outputs move between two sets of statistics, per channel, in units of sigma."""
    sigma = np.sqrt(np.maximum(variance + epsilon, 1e-30))
    old_sigma = np.sqrt(np.maximum(old_variance + epsilon, 0.0))
    return np.sqrt(((mean - old_mean) / sigma) ** 2 + ((sigma - old_sigma) / sigma) ** 2)


def rms(x: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def error_of(
    variance: Floats, error_of_mean: Floats, error_of_variance: Floats, epsilon: float
) -> float:
    """The standard error of normalized outputs, root mean square over the channels, in sigma."""
    if not np.all(np.isfinite(error_of_mean) & np.isfinite(error_of_variance)):
        return math.inf
    total = np.maximum(variance + epsilon, 1e-30)
    of_variance = (error_of_variance / (2 * total)) ** 2
    return rms(np.sqrt(error_of_mean**2 / total + of_variance * variance / total))


# The model as a list of steps --------------------------------------------------------------------


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


def _graph_of(operation: Any) -> Any:
    """The functional graph that a call of this operation runs, or None if it is code."""
    if "call" in vars(operation):
        return None
    if isinstance(operation, keras.Sequential):
        known = type(operation).call is keras.Sequential.call
        graph = getattr(operation, "_functional", None) if known else None
    elif isinstance(operation, keras.Model) and isinstance(operation, keras.Function):
        known = type(operation).call.__module__.startswith("keras.src.models.")
        graph = operation if known else None
    else:
        graph = None
    usable = hasattr(graph, "_nodes_by_depth") and hasattr(graph, "_standardize_inputs")
    return graph if usable else None


class _Builder:
    """Writes a model, with its nested models, as steps in topological order."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self._numbers = numbers  # id of a selected layer -> its number
        self._count = itertools.count()
        self.steps: list[Step] = []

    def fresh(self) -> int:
        return next(self._count)

    def call(self, operation: Any, args: Any, kwargs: dict[str, Any], number: int) -> list[int]:
        """Adds one call with `number` outputs; returns their value numbers."""
        graph = _graph_of(operation) if len(args) == 1 and not kwargs else None
        if graph is not None:
            return self._inline(graph, args[0])
        inside: tuple[int, ...] = ()
        direct = id(operation) in self._numbers
        if direct:
            inside = (self._numbers[id(operation)],)
        elif isinstance(operation, keras.Layer):
            found = {id(y) for y in operation._flatten_layers(include_self=False)}
            inside = tuple(sorted(self._numbers[i] for i in found if i in self._numbers))
        outputs = [self.fresh() for _ in range(number)]
        self.steps.append(Step(operation, args, kwargs, outputs, inside, direct))
        return outputs

    def _inline(self, graph: Any, argument: Any) -> list[int]:
        entry = [self.fresh() for _ in graph.inputs]
        self.steps.append(Step(graph._standardize_inputs, (argument,), {}, entry))
        values = {id(x): number for x, number in zip(graph.inputs, entry, strict=True)}

        def refer(x: Any) -> Any:
            return Ref(values[id(x)]) if isinstance(x, keras.KerasTensor) else x

        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input or any(id(x) not in values for x in node.input_tensors):
                    continue
                kwargs = {k: tree.map_structure(refer, v) for k, v in node.arguments.kwargs.items()}
                if isinstance(node.operation, keras.Layer):
                    kwargs.pop("training", None)  # False for all, from the outermost call
                args = tree.map_structure(refer, node.arguments.args)
                outputs = self.call(node.operation, args, kwargs, len(node.outputs))
                values.update(zip(map(id, node.outputs), outputs, strict=True))
        return [values[id(x)] for x in graph.outputs]


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass
class Stage:
    """What can be done once all layers of lower levels have their statistics."""

    level: int
    segment: Program | None  # computes and probes
    layers: tuple[int, ...]  # whose statistics the segment gives
    keep: frozenset[int]  # values that later stages need
    groups: list[tuple[tuple[int, ...], Program]]  # layers whose statistics depend on each other


class Plan:
    """In which order the statistics of the selected layers are found.

    Layer v depends on layer u if u stands above an input of v. Layers that depend on each other
    (a shared layer that feeds itself; all the layers in a call that is code) form a group. Groups
    and single layers are ordered by level: 0 depends on none, k + 1 on level k. A value has the
    level at which all statistics above it are known.
    """

    def __init__(self, model: Any, layers: Sequence[Layer], structure: Any) -> None:
        self.layers = layers
        builder = _Builder({id(layer): i for i, layer in enumerate(layers)})
        leaves = tree.flatten(structure)
        self.raw = [builder.fresh() for _ in leaves]
        packed = tree.pack_sequence_as(structure, [Ref(number) for number in self.raw])
        builder.call(model, (packed,), {}, 0)
        self.steps = builder.steps
        self._order()
        self._prune()
        top = max((self._level[i] for i in self._reached), default=-1)
        self.stages = [self._stage(level) for level in range(top + 1)]

    @property
    def programs(self) -> list[Program]:
        """All that is compiled."""
        found = [program for stage in self.stages for _, program in stage.groups]
        return found + [stage.segment for stage in self.stages if stage.segment is not None]

    def _order(self) -> None:
        above: dict[int, int] = {}  # value -> bit mask of the layers above it
        reach = [0] * len(self.layers)
        self._reached: set[int] = set()
        for step in self.steps:
            mask = functools.reduce(lambda m, r: m | above.get(r, 0), step.inputs, 0)
            own = functools.reduce(lambda m, i: m | 1 << i, step.inside, 0)
            for i in step.inside:
                self._reached.add(i)
                reach[i] |= mask if step.direct else mask | own
            above.update(dict.fromkeys(step.outputs, mask | own))
        changed = True
        while changed:
            closed = [functools.reduce(lambda m, u: m | reach[u], _bits(m), m) for m in reach]
            changed, reach = closed != reach, closed
        self._reach = reach
        self._level: dict[int, int] = {}
        for i in sorted(self._reached, key=lambda i: reach[i].bit_count()):
            below = [u for u in _bits(reach[i]) if not reach[u] >> i & 1]
            self._level[i] = 1 + max((self._level[u] for u in below), default=-1)
        self._value_level = dict.fromkeys(self.raw, 0)
        for step in self.steps:
            mask = functools.reduce(lambda m, r: m | above.get(r, 0), step.inputs, 0)
            mask = functools.reduce(lambda m, i: m | 1 << i, step.inside, mask)
            step.level = 1 + max((self._level[u] for u in _bits(mask)), default=-1)
            self._value_level.update(dict.fromkeys(step.outputs, step.level))

    def _above(self, values: Iterable[int], level: int) -> set[int]:
        """Which steps lead to these values from those of up to a level."""
        producer = {v: n for n, step in enumerate(self.steps) for v in step.outputs}
        todo, found = list(values), set()
        while todo:
            value = todo.pop()
            if value in producer and self._value_level[value] > level:
                n = producer[value]
                if n not in found:
                    found.add(n)
                    todo += self.steps[n].inputs
        return found

    def _prune(self) -> None:
        wanted = [v for step in self.steps if step.inside for v in step.inputs]
        self._needed = self._above(wanted, -1)

    def _cyclic(self, i: int) -> bool:
        return bool(self._reach[i] >> i & 1)

    def _stage(self, level: int) -> Stage:
        run = [n for n in sorted(self._needed) if self.steps[n].level == level]
        at_level = [i for i in sorted(self._reached) if self._level[i] == level]
        single = tuple(i for i in at_level if not self._cyclic(i))
        probe = [n for n, s in enumerate(self.steps) if s.direct and s.inside[0] in single]
        groups = {
            tuple(u for u in at_level if self._reach[i] >> u & 1 and self._reach[u] >> i & 1)
            for i in at_level
            if self._cyclic(i)
        }
        needs_later = {
            v for n in self._needed if self.steps[n].level > level for v in self.steps[n].inputs
        } | {
            v
            for s in self.steps
            for i in s.inside
            if self._level[i] > level or (self._level[i] == level and self._cyclic(i))
            for v in s.inputs
        }
        keep = frozenset(v for v in needs_later if self._value_level[v] <= level)
        made = [v for n in run for v in self.steps[n].outputs if v in keep]
        segment = None
        if run or probe:
            items = [Item(self.steps[n], n in run, n in probe) for n in sorted({*run, *probe})]
            segment = Program(items, self.layers, made)
        programs = [(group, self._group(group, level)) for group in sorted(groups)]
        return Stage(level, segment, single, keep, programs)

    def _group(self, group: tuple[int, ...], level: int) -> Program:
        probe = {n for n, step in enumerate(self.steps) if set(step.inside) & set(group)}
        run = self._above([v for n in probe for v in self.steps[n].inputs], level)
        items = [Item(self.steps[n], n in run, n in probe) for n in sorted(run | probe)]
        return Program(items, self.layers, [])


# Compiled pieces -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    step: Step
    run: bool  # its outputs are used
    probe: bool  # the inputs of its normalization layers are measured


class _ReadMask(keras.layers.Layer):
    """Gives the mask that Keras has attached to a value to whoever asks."""

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


def _measured(layer: Layer, inputs: Array, given: Mapping[str, Any]) -> dict[str, Array]:
    """What is needed of one input of a normalization layer, and of its mask and weights."""
    x = ops.cast(inputs, layer.compute_dtype)
    return kind_of(layer).measured(layer, x, weights_in(layer, x, given))


@contextlib.contextmanager
def _intercepted(layers: Iterable[Layer], handler: Callable[..., Any]) -> Iterator[None]:
    """Lets `handler(layer, call, inputs, ...)` stand in for the call of each layer."""
    patched = []
    try:
        for layer in layers:
            before = vars(layer).get("call")
            patched.append((layer, before))
            object.__setattr__(layer, "call", functools.partial(handler, layer, layer.call))
        yield
    finally:
        for layer, before in patched:
            if before is not None:
                object.__setattr__(layer, "call", before)
            elif "call" in vars(layer):
                object.__delattr__(layer, "call")


class Program(keras.Model):
    """Some steps of a model as one compiled function, in inference mode.

    From {"v3": value 3, "m3": its mask, ...} to the values that are asked for, in the same form,
    and for each measured call of a layer "s.(layer).(call).(name)", see `_measured`.
    """

    def __init__(
        self,
        items: Sequence[Item],
        layers: Sequence[Layer],
        outputs: Sequence[int],
        sweep: bool = False,
    ) -> None:
        super().__init__(name="statistics", autocast=False)
        self.supports_masking = True
        made = {v for item in items if item.run for v in item.step.outputs}
        self.needs = tuple(sorted({v for item in items for v in item.step.inputs} - made))
        self._items = tuple(items)
        self._asked = tuple(outputs)
        self._sweep = sweep  # one pass: normalized once, by the one or the other
        self._measures = {i: layers[i] for item in items for i in item.step.inside if item.probe}
        operations = [item.step.operation for item in items]
        # Tracked by Keras: their variables are this model's, read anew in every run.
        self.parts = list({id(y): y for y in operations if isinstance(y, keras.Layer)}.values())
        self.built = True

    def call(self, inputs: dict[str, Array], training: bool = False) -> dict[str, Array]:
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
                mask = _mask_of(value) if mask is None else mask
                record(step.operation, value, {**kwargs, "mask": mask})
                continue
            inside = [y for i, y in self._measures.items() if i in step.inside]
            with _intercepted(inside if item.probe else (), handler):
                result = step.operation(*args, **kwargs)
            values.update(zip(step.outputs, tree.flatten(result), strict=False))
        for number in self._asked:
            found[f"v{number}"] = values[number]
            mask = _mask_of(values[number])
            if mask is not None:
                found[f"m{number}"] = mask
        return found

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: masks are values of their own here."""
        return None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Calls the compiled function; the model's variables are read, never written."""
        inputs = {k: ops.convert_to_tensor(v) for k, v in inputs.items()}
        self.make_predict_function()
        if keras.backend.backend() == "jax":
            # The compiled function consumes the buffers that it is given: it gets copies.
            state = tuple(
                [ops.copy(v.value) for v in variables]
                for variables in (self.trainable_variables, self.non_trainable_variables)
            )
            outputs, _ = self.predict_function(state, iter([(inputs,)]))
            return dict(outputs)
        return dict(self.predict_function([(inputs,)]))


def _normalized_by_batch(
    layer: Layer,
    inputs: Array,
    sums: dict[str, Array],
    given: Mapping[str, Any],
    flag: Array | None = None,
) -> Array:
    """By the batch's own statistics; with a flag that is not set, by the moving ones."""
    x = ops.cast(inputs, layer.compute_dtype)
    y = kind_of(layer).by_batch(layer, x, weights_in(layer, x, given), sums, flag)
    return ops.cast(y, layer.compute_dtype)


def _mask_of(value: Array) -> Array | None:
    found = _ReadMask()(value)
    return found[0] if found else None


# Solving (J1) and (J2) -------------------------------------------------------------------------


@dataclass
class Found:
    """What the inputs of one layer were."""

    moments: Moments | None  # None: some were not finite
    calls: int = 0  # in one pass
    residual: float = 0.0
    leak: float = 0.0
    early: Moments | None = None  # those of the first half

    @property
    def drift(self) -> float:
        """How far the first half is from all, in what is to be expected of a random half."""
        if self.moments is None or self.early is None or self.early.empty:
            return 0.0
        some = (self.early.count > 0) & (self.moments.standard_error_of_mean() > 0)
        part = self.early.examples[some] / self.moments.examples[some]
        with np.errstate(divide="ignore"):
            expected = self.moments.standard_error_of_mean()[some] * np.sqrt(1 / part - 1)
        moved = (self.early.mean - self.moments.mean)[some]
        known = np.isfinite(expected) & (expected > 0)
        return rms(moved[known] / expected[known])

    def take_in(self, other: Found) -> None:
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)
        else:
            self.moments = None
        self.calls = max(self.calls, other.calls)


def _found_in(
    outputs: Mapping[str, Array], chunk: Chunk, layers: Sequence[Layer]
) -> dict[int, Found]:
    """The sums that one run of a program gave, as moments, by the number of the layer."""
    keys = sorted({tuple(map(int, key.split(".")[1:3])) for key in outputs if key[:2] == "s."})
    found: dict[int, Found] = {}
    for i, calls in itertools.groupby(keys, key=lambda key: key[0]):
        names = list(calls)
        measured = [_of_call(outputs, f"s.{i}.{call}.", chunk) for _, call in names]
        found[i] = Found(kind_of(layers[i]).taken(layers[i], measured), len(names))
    return found


def _of_call(outputs: Mapping[str, Array], key: str, chunk: Chunk) -> dict[str, Any]:
    """What was measured in one call, by examples."""
    arrays = {
        name.removeprefix(key): np.asarray(ops.convert_to_numpy(value))
        for name, value in outputs.items()
        if name.startswith(key)
    }
    if "x" in arrays:  # the inputs themselves, and the weights of positions
        return {name: _positions_of_examples(v, chunk) for name, v in arrays.items()}
    rows = len(arrays["first"])
    return {
        name: v.astype(np.float64) if name == "shift" else _per_example(v, rows, chunk)
        for name, v in arrays.items()
    }


def _per_example(sums: Floats, rows: int, chunk: Chunk) -> Floats:
    """(R, C) -> (N, C): those rows together that are of one example; without what fills up.

    A model may fold other axes into the first, time steps or windows; R is then a multiple of N.
    """
    sums = sums.astype(np.float64)
    if rows == chunk.size:
        return sums if len(sums) == 1 else sums[: chunk.rows]
    sums = np.broadcast_to(sums, (rows, *sums.shape[1:]))
    if rows % chunk.size == 0:
        sums = sums.reshape(chunk.size, rows // chunk.size, *sums.shape[1:]).sum(axis=1)
        return sums[: chunk.rows]
    _require_no_filling(rows, chunk)
    return sums


def _positions_of_examples(x: npt.NDArray[Any], chunk: Chunk) -> npt.NDArray[Any]:
    """(R, P, C) -> (N, R / N P, C), likewise."""
    rows = len(x)
    if rows % chunk.size == 0:
        return x.reshape(chunk.size, -1, x.shape[-1])[: chunk.rows]
    _require_no_filling(rows, chunk)
    return x


def _require_no_filling(rows: int, chunk: Chunk) -> None:
    if chunk.rows != chunk.size:
        raise ValueError(
            "The inputs of a normalization layer must have their examples on axis 0, or batches "
            f"must be equal. Received: {rows} rows for a batch of {chunk.size}, in a sample that "
            "is no multiple of `batch_size`. Choose a `batch_size` that divides it."
        )


class Solver:
    """Finds the statistics of the layers of a plan, stage by stage, and assigns them."""

    def __init__(
        self, plan: Plan, chunks: Sequence[Chunk], store: Store, rule: Rule, names: Sequence[str]
    ) -> None:
        self._plan, self._chunks, self._store = plan, chunks, store
        self._rule, self._names = rule, names
        self.found: dict[int, Found] = {}

    def solve(self, tick: Callable[[], None]) -> dict[int, Found]:
        """All stages; `tick` is called after each chunk of each pass."""
        try:
            for stage in self._plan.stages:
                found = self._pass(stage, tick)
                for i in stage.layers:
                    if i in found:
                        self._set(i, found[i])
                for group, program in stage.groups:
                    self._fixed_point(group, program, stage.level, tick)
        finally:
            for chunk in self._chunks:
                if chunk.kept is not None:
                    chunk.kept.free()
                chunk.kept, chunk.level = None, -1
        return self.found

    def _pass(self, stage: Stage, tick: Callable[[], None]) -> dict[int, Found]:
        total: dict[int, Found] = {}
        for number, chunk in enumerate(self._chunks):
            env, outputs = self._advance(stage, self._environment(chunk, stage.level - 1))
            _add(total, _found_in(outputs, chunk, self._plan.layers))
            if number + 1 == len(self._chunks) // 2:
                _mark_early(total)
            kept = None if stage.segment is None else self._store.put(env, chunk.kept)
            if kept is not None:
                chunk.kept, chunk.level = kept, stage.level
            tick()
        return total

    def _environment(self, chunk: Chunk, level: int) -> Environment:
        """The values after a stage: kept, or computed again from the last that was kept."""
        if chunk.kept is not None:
            env = chunk.kept.get()
        else:
            leaves = tree.flatten(chunk.inputs(pad=True))
            env = {n: (x, None) for n, x in zip(self._plan.raw, leaves, strict=True)}
        for stage in self._plan.stages[chunk.level + 1 : level + 1]:
            env, _ = self._advance(stage, env)
        return env

    @staticmethod
    def _advance(stage: Stage, env: Environment) -> tuple[Environment, dict[str, Array]]:
        outputs = {} if stage.segment is None else stage.segment.run(_feed(env, stage.segment))
        kept = {
            v: env[v] if v in env else (outputs[f"v{v}"], outputs.get(f"m{v}")) for v in stage.keep
        }
        return kept, outputs

    def _set(self, i: int, found: Found) -> None:
        self.found[i] = found
        _set(self._layer(i), found, self._rule, self._names[i])

    def _fixed_point(
        self, group: tuple[int, ...], program: Program, level: int, tick: Callable[[], None]
    ) -> None:
        """Layers that depend on each other: statistics that reproduce themselves.

        Round k makes the first k calls of a pass right: a group in which each layer is called
        once is exact after as many rounds as it has calls. A layer that is called several times
        has one set of statistics, those of all its inputs pooled; if these depend on it, they
        are the solution of a fixed-point equation, found by iteration with Anderson's
        acceleration.
        """
        history: list[tuple[Statistics, Statistics]] = []  # what was assigned, what came of it
        best = math.inf
        for round_ in itertools.count(1):
            found = self._round(program, level, round_ == 1, tick)
            targets = self._targets(found)
            moved = self._moved(targets)
            calls = sum(f.calls for f in found.values())
            shared = any(f.calls > 1 for f in found.values())
            settled = moved <= _FIXED_POINT and round_ > 1
            last = round_ >= calls + _MAX_ROUNDS
            if settled or last or (round_ >= calls and not shared):
                break
            if shared and round_ > 1:
                history = history[-10:] if moved < 4 * best else []  # else it leads astray
                history = [h for h in history if h[0].keys() == targets.keys()]
                best = min(best, moved)
                history.append(({i: current_statistics(self._layer(i)) for i in targets}, targets))
                targets = self._accelerated(history)
            for i, values in targets.items():
                set_statistics(self._layer(i), values)
        for i, f in found.items():
            f.residual = moved if shared else 0.0
            self._set(i, f)
        if last and moved > 10 * _FIXED_POINT:
            warnings.warn(
                f"The statistics of {[self._names[i] for i in sorted(found)]} depend on each other "
                f"and did not settle in {round_} rounds: they still move by {moved:.2g} sigma.",
                stacklevel=6,
            )

    def _round(
        self, program: Program, level: int, by_batch: bool, tick: Callable[[], None]
    ) -> dict[int, Found]:
        """One pass; the first by the statistics of batches, of at least 64 examples."""
        found: dict[int, Found] = {}
        several = math.ceil(64 / self._chunks[0].size) if by_batch else 1
        for start in range(0, len(self._chunks), several):
            chunks = self._chunks[start : start + several]
            feeds = [_feed(self._environment(chunk, level), program) for chunk in chunks]
            feed = feeds[0]
            if len(feeds) > 1:
                feed = {k: ops.concatenate([f[k] for f in feeds]) for k in feed}
            outputs = program.run({**feed, "by_batch": np.array(by_batch)})
            rows, size = (sum(v) for v in zip(*((c.rows, c.size) for c in chunks), strict=True))
            merged = dataclasses.replace(chunks[0], rows=rows, size=size)
            _add(found, _found_in(outputs, merged, self._plan.layers))
            if start + 1 == len(self._chunks) // 2:
                _mark_early(found)
            tick()
        return found

    def _layer(self, i: int) -> Layer:
        return self._plan.layers[i]

    def _targets(self, found: Mapping[int, Found]) -> Statistics:
        """What the rule makes of what was found; not (yet) finite values are left out."""
        return {
            i: self._rule(self._layer(i), f.moments)
            for i, f in sorted(found.items())
            if f.moments is not None and not f.moments.empty
        }

    def _moved(self, targets: Statistics) -> float:
        """The largest difference between these statistics and those of now, in sigma."""
        moves = []
        for i, values in targets.items():
            layer, kind = self._layer(i), kind_of(self._layer(i))
            moves.append(kind.distance(kind.current(layer), values, kind.epsilon(layer)))
        return max((float(np.max(m, initial=0)) for m in moves), default=math.inf)

    def _accelerated(self, history: Sequence[tuple[Statistics, Statistics]]) -> Statistics:
        """The next statistics of the fixed-point iteration, by Anderson's acceleration.

        In units of the present sigmas (of batch normalization, in means and log sigmas); at most
        3 at once.
        """
        now, units = history[-1]
        kinds = {i: kind_of(self._layer(i)) for i in now}
        epsilons = {i: kinds[i].epsilon(self._layer(i)) for i in now}

        def parts(values: Statistics) -> list[Floats]:
            return [kinds[i].vector(v, units[i], epsilons[i]) for i, v in values.items()]

        states = [np.concatenate(parts(before)) for before, _ in history]
        steps = [
            np.concatenate(parts(after)) - x for (_, after), x in zip(history, states, strict=True)
        ]
        state = states[-1] + np.clip(_anderson(states, steps), -3, 3)
        ends = np.cumsum([part.size for part in parts(units)])
        return {
            i: kinds[i].of_vector(part, units[i], epsilons[i])
            for i, part in zip(units, np.split(state, ends[:-1]), strict=True)
        }


def _as_many(part: Found, whole: Found) -> Found:
    """A part with the weight of the whole: a rule may go by the number of examples."""
    if part.moments is None or part.moments.empty or whole.moments is None:
        return part
    factor = whole.moments.examples.max() / part.moments.examples.max()
    return dataclasses.replace(part, moments=part.moments.scaled(float(factor)))


def _leak(pairs: Sequence[Floats], batches: int) -> float:
    """The error of one pass over all batches from those of pairs, root mean square, in sigma.

    A batch deviates from its pair half as much, in variance, as from all of many. The error has a
    systematic part and a random one, of which many batches leave less than a pair.
    """
    if not pairs:
        return 0.0
    if batches == 1:
        return rms(np.sqrt(np.sum(np.square(pairs[0]), axis=0)))
    errors = 2 * (1 - 1 / batches) * np.stack(pairs)  # (pairs, D, C)
    number = len(pairs)
    spread = float(np.mean(errors.var(axis=0, ddof=1))) if number > 1 else 0.0
    systematic = float(np.mean(errors.mean(axis=0) ** 2)) - spread / number
    left = max(systematic, 0.0) + spread / max(batches, 2 * number)
    return math.sqrt(errors.shape[1] * left)


def _add(total: dict[int, Found], more: Mapping[int, Found]) -> None:
    for i, found in more.items():
        if i in total:
            total[i].take_in(found)
        else:
            moments = None if found.moments is None else found.moments.copy()
            total[i] = dataclasses.replace(found, moments=moments)


def _mark_early(total: Mapping[int, Found]) -> None:
    for found in total.values():
        found.early = None if found.moments is None else found.moments.copy()


def _set(layer: Layer, found: Found, rule: Rule, name: str) -> None:
    if found.moments is None:
        raise ValueError(
            "Statistics can be taken of finite values only. Received: NaN or infinite values in "
            f"the inputs of layer {name!r}. Look for them in the data, and in the weights of the "
            "layers below."
        )
    if not found.moments.empty:
        set_statistics(layer, rule(layer, found.moments))


def _feed(env: Environment, program: Program) -> dict[str, Array]:
    feed = {f"v{n}": env[n][0] for n in program.needs}
    return feed | {f"m{n}": env[n][1] for n in program.needs if env[n][1] is not None}


def current_statistics(layer: Layer) -> Values:
    return kind_of(layer).current(layer)


def _anderson(states: Sequence[Floats], steps: Sequence[Floats]) -> Floats:
    """The step from the last state of a fixed-point iteration (Anderson, 1965)."""
    if len(states) == 1:
        return 0.5 * steps[-1]  # a plain step may go to and fro
    d_steps = np.diff(np.stack(steps), axis=0).T
    d_states = np.diff(np.stack(states), axis=0).T
    weights = np.linalg.lstsq(d_steps, steps[-1], rcond=1e-6)[0]
    return steps[-1] - (d_states + d_steps) @ weights


class OnePass:
    """Batch statistics in every layer in one sweep, pooled by counts."""

    def __init__(self, model: Any, layers: Sequence[Layer], structure: Any) -> None:
        numbers = list(range(len(tree.flatten(structure))))
        packed = tree.pack_sequence_as(structure, [Ref(n) for n in numbers])
        step = Step(model, (packed,), {}, [], tuple(range(len(layers))))
        self._layers, self._numbers = layers, numbers
        self.program = Program([Item(step, False, True)], layers, [], sweep=True)
        self.programs = [self.program]

    def run(self, chunk: Chunk, by_batch: bool) -> dict[int, Found]:
        leaves = tree.flatten(chunk.inputs(pad=False))
        feed = {f"v{n}": x for n, x in zip(self._numbers, leaves, strict=True)}
        outputs = self.program.run({**feed, "by_batch": np.array(by_batch)})
        return _found_in(outputs, dataclasses.replace(chunk, size=chunk.rows), self._layers)


# One job -----------------------------------------------------------------------------------------


def _compiled_like(program: Program, model: Any) -> None:
    """The program runs as `predict` would run the model: compiled, or eagerly if told so."""
    program.run_eagerly = bool(getattr(model, "run_eagerly", False))
    if getattr(model, "compiled", False):
        program.jit_compile = bool(model.jit_compile)
    else:
        program.jit_compile = keras.backend.backend() == "jax"


_Planned = TypeVar("_Planned", "Plan", "OnePass")


@dataclass(frozen=True)
class _Kept:
    """Plans, in what Keras does not look into when it saves and loads: they hold the model."""

    plans: dict[Any, Any]


def _remembered(
    kind: type[_Planned], model: Any, layers: Sequence[Layer], example: Any
) -> _Planned:
    """A plan with its compiled programs; that of the last time if the model is still the same.

    It is kept beside the model, under a name that Keras does not see, and goes with it.
    """
    structure = tree.map_structure(lambda _: 0, example)
    parts = [model, *model._flatten_layers(include_self=False)]
    marks = [_mark(part) for part in parts]
    key = (str(structure), [id(y) for y in layers], [id(part) for part in parts], marks)
    kept = vars(model).get(_KEPT) or _Kept({})
    if kind in kept.plans and kept.plans[kind][0] == key:
        return kept.plans[kind][1]  # type: ignore[no-any-return]
    plan = kind(model, layers, structure)
    for program in plan.programs:
        _compiled_like(program, model)
    object.__setattr__(model, _KEPT, _Kept({**kept.plans, kind: (key, plan, parts)}))
    return plan


_OF_THE_TRAINER = frozenset(  # what `fit` and its like note down; no function of ours reads it
    ["train_function", "test_function", "predict_function"]
    + ["optimizer", "loss", "loss_weights", "history"]
    + ["steps_per_execution", "unrolled_steps_per_execution"]
    + ["training"]  # of PyTorch's modules
)


def _mark(layer: Any) -> tuple[Any, ...]:
    """What a compiled function may have taken from a layer: dtypes, and attributes."""
    public = {
        k: _mark_of(v)
        for k, v in vars(layer).items()
        if not k.startswith(("_", "stop_")) and k not in _OF_THE_TRAINER
    }
    graph = _graph_of(layer) if isinstance(layer, keras.Model) else None
    compiled = bool(getattr(layer, "compiled", False))
    jit_compile = compiled and bool(getattr(layer, "jit_compile", False))
    model = (id(graph), getattr(layer, "run_eagerly", None), compiled, jit_compile)
    switch = getattr(layer, "use_batch_statistics", None)
    return layer.compute_dtype, layer.variable_dtype, switch, model, tuple(public.items())


class _Same:
    """Equal to itself alone; unlike an `id`, no other object's as long as this is kept."""

    def __init__(self, it: Any) -> None:
        self._it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._it is other._it

    __hash__ = None  # type: ignore[assignment]


def _mark_of(value: Any) -> Any:
    """Plain values as they are, containers by what they hold, functions and arrays by identity."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_mark_of(v) for v in value]
    if isinstance(value, dict):
        return {k: _mark_of(v) for k, v in value.items()}
    return _Same(value)


@dataclass
class Job:
    """One run of `reestimate`, or of what is built on it."""

    model: Any
    names: list[str]
    layers: list[Layer]
    sample: Sample
    store: Store
    rule: Rule
    method: str
    tolerance: float | None
    bar: Any

    def run(self) -> tuple[dict[int, Found], int]:
        """What was found for each layer, and the number of examples; assigns it."""
        work = self._layerwise if self.method == "layerwise" else self._one_pass
        return work()

    def _layerwise(self) -> tuple[dict[int, Found], int]:
        rows = None if self.tolerance is None else _PILOT
        plan = None
        while True:
            chunks = self.sample.take(rows)
            if plan is None:
                plan = _remembered(Plan, self.model, self.layers, chunks[0].raw())
            solver = Solver(plan, chunks, self.store, self.rule, self.names)
            found = solver.solve(self._tick)
            came = sum(chunk.rows for chunk in chunks)
            if self.tolerance is None or rows is None or came < rows or came == self.sample.limit:
                return found, came
            error = self._worst_error(found)
            if error <= self.tolerance:
                return found, came
            # The error falls with the square root of the number of examples.
            factor = min((error / self.tolerance) ** 2 * 1.1, 64.0)
            rows = max(math.ceil(came * factor), came + 1)

    def _one_pass(self) -> tuple[dict[int, Found], int]:
        total: dict[int, Found] = {}
        tried: list[tuple[Chunk, dict[int, Found]]] = []
        sweep, came, batches = None, 0, 0
        for chunk in self.sample.once():
            if sweep is None:
                sweep = _remembered(OnePass, self.model, self.layers, chunk.raw())
            found = sweep.run(chunk, by_batch=True)
            if batches < _TRIED_FIRST or batches % _TRIED < 2:
                tried.append((chunk, found))
            _add(total, found)
            came, batches = came + chunk.rows, batches + 1
            self._tick()
            if self.tolerance is not None and self._worst_error(total) <= self.tolerance:
                break
        if sweep is None:
            raise nothing_came()
        self._assign(total)  # may refuse; once more below
        pairs = [tried[i : i + 2] for i in range(0, len(tried), 2)]
        leaks = [
            self._leaks_of(sweep, total, pair)
            for pair in pairs
            if len(pair) == 2 or len(pairs) == 1
        ]
        for i in total:
            total[i].leak = _leak([found[i] for found in leaks if i in found], batches)
        self._assign(total)
        return total, came

    def _assign(self, found: Mapping[int, Found]) -> None:
        for i, f in found.items():
            _set(self.layers[i], f, self.rule, self.names[i])

    def _leaks_of(
        self,
        sweep: OnePass,
        total: Mapping[int, Found],
        part: Sequence[tuple[Chunk, Mapping[int, Found]]],
    ) -> dict[int, Floats]:
        """How much one pass over one or two batches is wrong: (D, C) in sigma, for each layer.

        They are pooled, and run once more with the statistics that came of it. What is first
        order in their deviations from each other cancels, as it does between all batches.
        """
        pooled: dict[int, Found] = {}
        for _, found in part:
            _add(pooled, found)
        pooled = {i: _as_many(f, total[i]) for i, f in pooled.items()}
        self._assign(pooled)
        again: dict[int, Found] = {}
        for chunk, _ in part:
            _add(again, sweep.run(chunk, by_batch=False))
        leaks: dict[int, Floats] = {}
        for i, f in pooled.items():
            other = _as_many(again[i], total[i]) if i in again else Found(None)
            if f.moments is None or other.moments is None or f.moments.empty:
                continue
            layer = self.layers[i]
            values, new = self.rule(layer, f.moments), self.rule(layer, other.moments)
            kind = kind_of(layer)
            leaks[i] = kind.deviation(new, values, kind.epsilon(layer))
        return leaks

    def _worst_error(self, found: Mapping[int, Found]) -> float:
        errors = [0.0]
        for i, f in found.items():
            if f.moments is not None and not f.moments.empty:
                some, m = f.moments.count > 0, f.moments
                of_mean, of_variance = m.standard_error_of_mean(), m.standard_error_of_variance()
                epsilon = kind_of(self.layers[i]).epsilon(self.layers[i])
                error = error_of(m.variance()[some], of_mean[some], of_variance[some], epsilon)
                errors.append(error)
        return max(errors)

    def _tick(self) -> None:
        if self.bar is not None:
            self.bar.update()

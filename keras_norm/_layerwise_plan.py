"""A model as a list of steps, and the order in which to find the statistics of its layers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

from keras_norm._layerwise_program import Item, Program, Ref, Step

Layer = Any


def graph_of(operation: Any) -> Any:
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
    """Writes a model, including nested models, as steps in topological order."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self._numbers = numbers  # id of a selected layer -> its number
        self._count = itertools.count()
        self.steps: list[Step] = []

    def fresh(self) -> int:
        return next(self._count)

    def call(self, operation: Any, args: Any, kwargs: dict[str, Any], number: int) -> list[int]:
        """Adds one call with `number` outputs; returns their value numbers."""
        graph = graph_of(operation) if len(args) == 1 and not kwargs else None
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
    """The numbers of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _closed(reach: list[int]) -> list[int]:
    """The sets with what is reached through others included."""
    while True:
        closed = [functools.reduce(lambda m, u: m | reach[u], _bits(m), m) for m in reach]
        if closed == reach:
            return reach
        reach = closed


@dataclass
class Stage:
    """What can be done once all layers of lower levels have their statistics."""

    level: int
    segment: Program | None  # computes and probes
    layers: tuple[int, ...]  # whose statistics the segment gives
    keep: frozenset[int]  # values that later stages need
    groups: list[Program]  # one for each group of layers whose statistics depend on each other


class Plan:
    """The order in which the statistics of the selected layers are found.

    Layer v depends on layer u if u is upstream of an input of v. Layers that depend on each other
    (a shared layer that feeds itself; all the layers in a call that is code) form a group. Groups
    and single layers are ordered by level: level 0 depends on none, level k + 1 on level k. A value
    has the level at which all statistics upstream of it are known.
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
        """All compiled programs of the plan."""
        found = [program for stage in self.stages for program in stage.groups]
        return found + [stage.segment for stage in self.stages if stage.segment is not None]

    def _order(self) -> None:
        """Finds the levels of layers, steps and values. In a set of layers, bit u is layer u."""
        above_steps, reach = self._dependencies()
        self._reach = _closed(reach)
        self._level: dict[int, int] = {}
        for i in sorted(self._reached, key=lambda i: self._reach[i].bit_count()):
            # Not those of its own group, which reach it as it reaches them.
            below = [u for u in _bits(self._reach[i]) if not self._reach[u] >> i & 1]
            self._level[i] = 1 + max((self._level[u] for u in below), default=-1)
        self._value_level = dict.fromkeys(self.raw, 0)
        for step, above in zip(self.steps, above_steps, strict=True):
            step.level = 1 + max((self._level[u] for u in _bits(above)), default=-1)
            self._value_level.update(dict.fromkeys(step.outputs, step.level))

    def _dependencies(self) -> tuple[list[int], list[int]]:
        """The layers upstream of each step's outputs, and those upstream of each layer's inputs."""
        above: dict[int, int] = {}  # of values
        of_steps, of_layers = [], [0] * len(self.layers)
        self._reached: set[int] = set()
        for step in self.steps:
            inputs = functools.reduce(lambda m, value: m | above.get(value, 0), step.inputs, 0)
            outputs = functools.reduce(lambda m, i: m | 1 << i, step.inside, inputs)
            for i in step.inside:
                self._reached.add(i)
                of_layers[i] |= inputs if step.direct else outputs
            above.update(dict.fromkeys(step.outputs, outputs))
            of_steps.append(outputs)
        return of_steps, of_layers

    def _above(self, values: Iterable[int], level: int) -> set[int]:
        """The steps that lead to these values from values of up to a level."""
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
        programs = [self._group(group, level) for group in sorted(groups)]
        return Stage(level, segment, single, keep, programs)

    def _group(self, group: tuple[int, ...], level: int) -> Program:
        probe = {n for n, step in enumerate(self.steps) if set(step.inside) & set(group)}
        run = self._above([v for n in probe for v in self.steps[n].inputs], level)
        items = [Item(self.steps[n], n in run, n in probe) for n in sorted(run | probe)]
        return Program(items, self.layers, [])

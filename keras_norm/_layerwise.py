"""Measures the inputs of all normalization layers of a model, layer by layer.

A model is written as a list of steps (`Plan`, in `_layerwise_plan`), with nested models expanded.
The steps between two normalization layers are compiled as one function (`Program`, in
`_layerwise_program`), which computes what later steps need and measures the inputs of the layers
whose turn it is. `Solver` runs these functions in order, gives each layer its statistics as soon
as they are known, and iterates where layers depend on each other. `OnePass` measures all layers at
once, while each normalizes by the batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import keras
import numpy as np
import numpy.typing as npt
from keras import ops, tree

from keras_norm._kinds import Values, kind_of
from keras_norm._layerwise_plan import Plan, Stage, graph_of
from keras_norm._layerwise_program import Item, Program, Ref, Step
from keras_norm._sample import (
    Chunk,
    Environment,
    Sample,
    Store,
    nothing_came,
    with_declared_shapes,
)
from keras_norm.moments import Moments

__all__ = ["Found", "Job", "Rule", "current_statistics", "error_of", "rms"]

Array = Any
Layer = Any
Floats = npt.NDArray[np.float64]
Rule = Callable[[Layer, Moments], Values]
Statistics = Mapping[int, Values]  # by the number of the layer

_FIXED_POINT = 1e-6  # in units of sigma: a few times the rounding of a float32 forward pass
_MAX_ROUNDS = 100
_PILOT = 512  # examples in the first sample when there is a tolerance
_KEPT = "_keras_norm_statistics"  # attribute of a model
_TRIED_FIRST, _TRIED = 4, 40  # `one_pass` is checked on the first four batches, and 2 in 40


# Statistics of one layer -----------------------------------------------------------------------


def set_statistics(layer: Layer, values: Values) -> None:
    kind_of(layer).assign(layer, values)


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


# Solving (J1) and (J2) -------------------------------------------------------------------------


@dataclass
class Found:
    """What was measured of the inputs of one layer."""

    moments: Moments | None  # None: some were not finite
    calls: int = 0  # in one pass
    residual: float = 0.0
    leak: float = 0.0
    early: Moments | None = None  # those of the first half of the examples

    @property
    def drift(self) -> float:
        """How far the first half is from all, in units of what to expect of a random half."""
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
    """The sums that one run of a program returned, as moments, by the number of the layer."""
    keys = sorted({tuple(map(int, key.split(".")[1:3])) for key in outputs if key[:2] == "s."})
    found: dict[int, Found] = {}
    for i, calls in itertools.groupby(keys, key=lambda key: key[0]):
        names = list(calls)
        measured = [_of_call(outputs, f"s.{i}.{call}.", chunk) for _, call in names]
        found[i] = Found(kind_of(layers[i]).taken(layers[i], measured), len(names))
    return found


def _of_call(outputs: Mapping[str, Array], key: str, chunk: Chunk) -> dict[str, Any]:
    """What was measured in one call, per example."""
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
    """(R, C) -> (N, C): adds up the rows of each example; without the examples that fill a chunk.

    A model may fold other axes, such as time steps or windows, into the first; R is then a multiple
    of N.
    """
    sums = sums.astype(np.float64)
    if rows == chunk.size:
        return sums if len(sums) == 1 else sums[: chunk.rows]
    sums = np.broadcast_to(sums, (rows, *sums.shape[1:]))
    if rows % chunk.size == 0:
        return sums.reshape(chunk.size, rows // chunk.size, *sums.shape[1:]).sum(axis=1)
    return sums


def _positions_of_examples(x: npt.NDArray[Any], chunk: Chunk) -> npt.NDArray[Any]:
    """(R, P, C) -> (N, R / N P, C), in the same way."""
    if len(x) % chunk.size == 0:
        return x.reshape(chunk.size, -1, x.shape[-1])[: chunk.rows]
    return x


def _hides_copies(outputs: Mapping[str, Array], chunk: Chunk) -> bool:
    """Whether copies that fill a chunk cannot be told from its examples: rows are not examples."""
    if chunk.rows == chunk.size:
        return False
    rows = {len(v) for k, v in outputs.items() if k[:2] == "s." and k.endswith((".first", ".x"))}
    return bool(rows - {chunk.size})


class Solver:
    """Finds the statistics of the layers of a plan, stage by stage, and assigns them."""

    def __init__(
        self, plan: Plan, chunks: Sequence[Chunk], store: Store, rule: Rule, names: Sequence[str]
    ) -> None:
        self._plan, self._chunks, self._store = plan, chunks, store
        self._rule, self._names = rule, names
        self.found: dict[int, Found] = {}

    def solve(self, tick: Callable[[], None]) -> dict[int, Found]:
        """Runs all stages; `tick` is called after each chunk of each pass."""
        try:
            for stage in self._plan.stages:
                found = self._pass(stage, tick)
                for i in stage.layers:
                    if i in found:
                        self._set(i, found[i])
                for program in stage.groups:
                    self._fixed_point(program, stage.level, tick)
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
            if _hides_copies(outputs, chunk):
                self._take_filling_out()
                env, outputs = self._advance(stage, self._environment(chunk, stage.level - 1))
            _add(total, _found_in(outputs, chunk, self._plan.layers))
            if number + 1 == len(self._chunks) // 2:
                _mark_early(total)
            kept = None if stage.segment is None else self._store.put(env, chunk.kept)
            if kept is not None:
                chunk.kept, chunk.level = kept, stage.level
            tick()
        return total

    def _take_filling_out(self) -> None:
        """Takes the last chunk as it is, for all stages: it needs programs of its own shape."""
        for chunk in self._chunks:
            if chunk.rows < chunk.size:
                if chunk.kept is not None:
                    chunk.kept.free()
                chunk.kept, chunk.level, chunk.size = None, -1, chunk.rows

    def _environment(self, chunk: Chunk, level: int) -> Environment:
        """The values after a stage: kept ones, or computed again from the last that were kept."""
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

    def _fixed_point(self, program: Program, level: int, tick: Callable[[], None]) -> None:
        """Finds statistics that reproduce themselves, for layers that depend on each other.

        Round k makes the first k calls of a pass right, so a group in which each layer is called
        once is exact after as many rounds as it has calls. A layer that is called several times
        has one set of statistics, those of all its inputs pooled; if its inputs depend on them,
        they are the solution of a fixed-point equation, found by iteration with Anderson's
        acceleration.
        """
        history: list[tuple[Statistics, Statistics]] = []  # what was assigned, what resulted
        best = math.inf
        for round_ in itertools.count(1):
            found = self._round(program, level, round_ == 1, tick)
            targets = self._targets(found)
            moved = self._moved(targets)
            calls = sum(f.calls for f in found.values())
            shared = any(f.calls > 1 for f in found.values())
            settled = not targets or (moved <= _FIXED_POINT and round_ > 1)
            last = round_ >= calls + _MAX_ROUNDS
            if settled or last or (round_ >= calls and not shared):
                break
            if shared and round_ > 1:
                # After a jump, earlier states only mislead the extrapolation: start again.
                history = history[-10:] if moved < 4 * best else []
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
        """Runs one pass; the first with the statistics of batches, of at least 64 examples."""
        found: dict[int, Found] = {}
        several = math.ceil(64 / self._chunks[0].size) if by_batch else 1
        for start in range(0, len(self._chunks), several):
            chunks = self._chunks[start : start + several]
            outputs, merged = self._run_together(chunks, program, level, by_batch)
            if _hides_copies(outputs, merged):
                self._take_filling_out()
                outputs, merged = self._run_together(chunks, program, level, by_batch)
            _add(found, _found_in(outputs, merged, self._plan.layers))
            if start + 1 == len(self._chunks) // 2:
                _mark_early(found)
            tick()
        return found

    def _run_together(
        self, chunks: Sequence[Chunk], program: Program, level: int, by_batch: bool
    ) -> tuple[dict[str, Array], Chunk]:
        feeds = [_feed(self._environment(chunk, level), program) for chunk in chunks]
        feed = feeds[0]
        if len(feeds) > 1:
            feed = {k: ops.concatenate([f[k] for f in feeds]) for k in feed}
        outputs = program.run({**feed, "by_batch": np.array(by_batch)})
        rows, size = (sum(v) for v in zip(*((c.rows, c.size) for c in chunks), strict=True))
        return outputs, dataclasses.replace(chunks[0], rows=rows, size=size)

    def _layer(self, i: int) -> Layer:
        return self._plan.layers[i]

    def _targets(self, found: Mapping[int, Found]) -> Statistics:
        """The statistics that the rule makes of what was found, without those not (yet) finite."""
        return {
            i: self._rule(self._layer(i), f.moments)
            for i, f in sorted(found.items())
            if f.moments is not None and not f.moments.empty
        }

    def _moved(self, targets: Statistics) -> float:
        """The largest difference between these statistics and the present ones, in sigma."""
        moves = []
        for i, values in targets.items():
            layer, kind = self._layer(i), kind_of(self._layer(i))
            moves.append(kind.distance(kind.current(layer), values, kind.epsilon(layer)))
        return max((float(np.max(m, initial=0)) for m in moves), default=0.0)

    def _accelerated(self, history: Sequence[tuple[Statistics, Statistics]]) -> Statistics:
        """The next statistics of the fixed-point iteration, by Anderson's acceleration.

        It works in units of the present sigmas (for batch normalization, on means and log sigmas),
        and moves each number by at most 3.
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
    """A part with the weight of the whole, because a rule may use the number of examples."""
    if part.moments is None or part.moments.empty or whole.moments is None:
        return part
    factor = whole.moments.examples.max() / part.moments.examples.max()
    return dataclasses.replace(part, moments=part.moments.scaled(float(factor)))


def _leak(pairs: Sequence[Floats], batches: int) -> float:
    """The error of `one_pass` over all batches from that of pairs, root mean square, in sigma.

    The deviation of a batch from the mean of two has half the variance of its deviation from the
    mean of many: hence the factor 2 (1 - 1 / batches). The error has a systematic part and a random
    part, and the random part is smaller over many batches than over a pair.
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
        return 0.5 * steps[-1]  # a whole step may oscillate
    d_steps = np.diff(np.stack(steps), axis=0).T
    d_states = np.diff(np.stack(states), axis=0).T
    weights = np.linalg.lstsq(d_steps, steps[-1], rcond=1e-6)[0]
    return steps[-1] - (d_states + d_steps) @ weights


class OnePass:
    """Measures batch statistics in every layer in one sweep, pooled by counts."""

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
    """Compiles the program to run as `predict` would run the model: compiled or eagerly."""
    program.run_eagerly = bool(getattr(model, "run_eagerly", False))
    if getattr(model, "compiled", False):
        program.jit_compile = bool(model.jit_compile)
    else:
        compiles = all(y.supports_jit for y in program._flatten_layers())
        program.jit_compile = compiles and keras.backend.backend() == "jax"


_Planned = TypeVar("_Planned", "Plan", "OnePass")


@dataclass(frozen=True)
class _Kept:
    """Hides plans from Keras when it saves and loads the model, because they hold the model."""

    plans: dict[Any, Any]


def _remembered(
    kind: type[_Planned], model: Any, layers: Sequence[Layer], example: Any
) -> _Planned:
    """A plan with its compiled programs; the previous one if the model has not changed.

    It is kept in an attribute of the model that Keras does not track, and dies with the model.
    """
    structure = tree.map_structure(lambda _: 0, example)
    shapes = [_mark_of_shape(np.shape(v), to) for v, to in with_declared_shapes(model, example)]
    parts = [model, *model._flatten_layers(include_self=False)]
    marks = [_mark(part) for part in parts]
    key = (str(structure), shapes, [id(y) for y in layers], [id(part) for part in parts], marks)
    kept = vars(model).get(_KEPT) or _Kept({})
    if kind in kept.plans and kept.plans[kind][0] == key:
        return kept.plans[kind][1]  # type: ignore[no-any-return]
    plan = kind(model, layers, structure)
    for program in plan.programs:
        _compiled_like(program, model)
    object.__setattr__(model, _KEPT, _Kept({**kept.plans, kind: (key, plan, parts)}))
    return plan


def _mark_of_shape(shape: Sequence[int], declared: Sequence[int | None] | None) -> list[int]:
    """The rank, and the sizes that the model has declared.

    A TensorFlow function that has seen two sizes of an axis treats the axis as unknown afterwards.
    """
    pairs = zip(shape[1:], (declared or ())[1:], strict=False)
    return [len(shape), *(size for size, known in pairs if known is not None)]


_OF_THE_TRAINER = frozenset(  # attributes that `fit` and its like set; our functions read none
    ["train_function", "test_function", "predict_function"]
    + ["optimizer", "loss", "loss_weights", "history"]
    + ["steps_per_execution", "unrolled_steps_per_execution"]
    + ["training"]  # of PyTorch's modules
)


def _mark(layer: Any) -> tuple[Any, ...]:
    """What a compiled function may have read from a layer: dtypes and attributes."""
    public = {
        k: _mark_of(v)
        for k, v in vars(layer).items()
        if not k.startswith(("_", "stop_")) and k not in _OF_THE_TRAINER
    }
    graph = graph_of(layer) if isinstance(layer, keras.Model) else None
    compiled = bool(getattr(layer, "compiled", False))
    jit_compile = compiled and bool(getattr(layer, "jit_compile", False))
    model = (id(graph), getattr(layer, "run_eagerly", None), compiled, jit_compile)
    switch = getattr(layer, "use_batch_statistics", None)
    return layer.compute_dtype, layer.variable_dtype, switch, model, tuple(public.items())


class _Same:
    """Equal only for the same object; unlike an `id`, it cannot be reused while this is kept."""

    def __init__(self, it: Any) -> None:
        self._it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._it is other._it

    __hash__ = None  # type: ignore[assignment]


def _mark_of(value: Any) -> Any:
    """Plain values as they are, containers by their contents, functions and arrays by identity."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_mark_of(v) for v in value]
    if isinstance(value, dict):
        return {k: _mark_of(v) for k, v in value.items()}
    return _Same(value)


@dataclass
class Job:
    """One run of `reestimate`, or of a function built on it."""

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
        """Assigns what was found; returns it for each layer, and the number of examples."""
        work = self._layerwise if self.method == "layerwise" else self._one_pass
        try:
            return work()
        except Exception:  # TensorFlow's functions would remember the shapes that failed
            vars(self.model).pop(_KEPT, None)
            raise

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
        self._assign(total)  # may raise an error; done again below
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
        """The error of one pass over one or two batches: (D, C) in sigma, for each layer.

        The batches are pooled, and run once more with the statistics that result. What is first
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

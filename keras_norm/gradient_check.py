"""Numerical against analytic gradients of a function, a layer or a whole model, on any backend.

Notation, for a scalar L and one element x of an array or variable, with step h:

    (G1)  slope(h) = (L(x + h) - L(x - h)) / 2h             = L' + h² L'''/6 + O(h⁴)
    (G2)  order 2:   b = slope(h)                           error h² |L'''| / 6
    (G3)  order 4:   b = (4 slope(h) - slope(2h)) / 3       error h⁴ |L⁽⁵⁾| / 30
    (G4)  bend(h) = (L(x + h) - 2 L(x) + L(x - h)) / h      = h L'' + O(h³)
    (G5)  relative norm of a, b: ‖a - b‖ / (‖a‖ + ‖b‖)
    (G6)  elementwise: max |a - b| / max(1e-8, |a| + |b|)

Every slope also has a rounding error of about ε |L| / h, where ε = 2.2e-16: too small a step is
as bad as too large a one.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from numpy.typing import NDArray

from keras_norm._arrays import is_integer, is_real
from keras_norm._gradients import float64_promotion, gradients, restored_randomness
from keras_norm._gradients import traced as trace

__all__ = ["GradientEntry", "GradientError", "GradientReport", "check", "gradients"]

Array = NDArray[np.float64]
Tensor = Any

EPSILON = float(np.finfo(np.float64).eps)
UPSTREAM = 2**31  # names the stream of random numbers of `upstream`
DEFAULT_STEP = {2: 1e-5, 4: 1e-4}
ELEMENTWISE_FLOOR = 1e-8  # below it, (G6) is an absolute error
SHRINK = (1.0, 0.1, 0.01, 0.001)  # steps tried in turn, as factors of the first
# Bounds on |slope(h) - slope(2h)|, relative to the gradients of the variable: beyond the first, a
# smaller step is tried; beyond the second, at the best of the steps, the derivative counts as not
# existing. The second number of each is the allowance for rounding, in units of ε |L| / h.
RETRY = (1e-6, 10.0)
KINK = (1e-3, 100.0)
CLEAR = 1000.0  # a derivative of this many such units is more than rounding of a zero


class GradientError(ArithmeticError):
    """Analytic and numerical gradients disagree; the message holds the table of the report."""


@dataclasses.dataclass(frozen=True)
class GradientEntry:
    """The comparison for one input or variable.

    Attributes:
        name: name of the input, or path of the variable.
        shape: its shape.
        checked: number of elements that were compared.
        kinks: how many of them have no measurable derivative (see `check`); these are left out
            of the figures below.
        analytic_norm: Euclidean norm of the analytic gradient over the elements compared.
        numerical_norm: Euclidean norm of the numerical one.
        relative_norm: ‖a - b‖ / (‖a‖ + ‖b‖) (G5); 0 if both are 0, infinite if a gradient is not
            finite or nothing could be measured.
        max_relative: max |a - b| / max(1e-8, |a| + |b|) (G6).
        max_absolute: max |a - b|.
        worst_index: index of the element where |a - b| is largest; empty for a scalar.
        analytic: analytic derivative at that element.
        numerical: numerical derivative at that element.
        resolution: the smallest difference quotient that can be told from zero here.
        zero: whether both gradients lie below `resolution` everywhere: they are zero by
            construction, like that of a bias before batch normalization. They are compared with 0,
            absolutely; `relative_norm` then compares rounding errors and means nothing.
        no_effect: whether the value stayed the same to the last bit under every change, and the
            analytic gradient is exactly 0: the value does not depend on this variable.
    """

    name: str
    shape: tuple[int, ...]
    checked: int
    kinks: int
    analytic_norm: float
    numerical_norm: float
    relative_norm: float
    max_relative: float
    max_absolute: float
    worst_index: tuple[int, ...]
    analytic: float
    numerical: float
    resolution: float
    zero: bool
    no_effect: bool

    @property
    def note(self) -> str:
        """What is special about this entry, in words; empty if nothing is."""
        notes = []
        if self.no_effect:
            notes.append("zero: no effect on the value")
        elif self.zero:
            notes.append(f"zero within {self.resolution:.0e}")
        if self.kinks:
            notes.append(f"{self.kinks} kinks")
        return ", ".join(notes)


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """Comparison of analytic and numerical gradients; `print` shows it as a table.

    Attributes:
        target: name of what was checked.
        backend: Keras backend that computed it.
        scalar: what was differentiated, in words.
        value: the value of that scalar.
        order: order of the difference quotient, 2 or 4.
        step: first step h, before scaling with max(1, |x|).
        entries: one `GradientEntry` per floating-point input, then per variable.
    """

    target: str
    backend: str
    scalar: str
    value: float
    order: int
    step: float
    entries: tuple[GradientEntry, ...]

    def __getitem__(self, name: str) -> GradientEntry:
        """The entry of that name, or the only one whose name ends with `/name`."""
        exact = [entry for entry in self.entries if entry.name == name]
        found = exact or [entry for entry in self.entries if entry.name.endswith(f"/{name}")]
        if len(found) != 1:
            names = [entry.name for entry in self.entries]
            raise KeyError(f"{len(found)} entries are named {name!r}; the names are {names}")
        return found[0]

    @property
    def max_relative_norm(self) -> float:
        """Largest relative norm (G5) of the gradients that are not zero by construction."""
        return max((e.relative_norm for e in self.entries if not e.zero), default=0.0)

    @property
    def worst(self) -> GradientEntry:
        """The entry with the largest relative norm; those that are zero come last."""
        return max(self.entries, key=lambda e: (not e.zero, e.relative_norm, e.max_absolute))

    @property
    def zero(self) -> tuple[GradientEntry, ...]:
        """The entries whose gradient is zero by construction."""
        return tuple(entry for entry in self.entries if entry.zero)

    def require(
        self, tolerance: float, elementwise: float | None = None, *, kinks: float = 0.0
    ) -> Self:
        """Return the report if the gradients agree, and raise `GradientError` otherwise.

        Args:
            tolerance: largest relative norm (G5) allowed for any variable, > 0. Gradients that are
                zero by construction are exempt: they are already below their resolution.
            elementwise: largest `max_relative` (G6) allowed, > 0. Default: no bound.
            kinks: largest fraction of the elements of a variable that may have no measurable
                derivative, 0 to 1.

        Raises:
            GradientError: a bound is exceeded; the message names the variables and holds the table.
            ValueError: a bound is not positive, or `kinks` lies outside [0, 1].
        """
        for name, bound in (("tolerance", tolerance), ("elementwise", elementwise)):
            if bound is not None and not (is_real(bound) and 0 < bound < math.inf):
                raise ValueError(f"{name} must be a positive number. Received: {name}={bound!r}")
        if not (is_real(kinks) and 0 <= kinks <= 1):
            raise ValueError(f"kinks must be a fraction, 0 to 1. Received: kinks={kinks!r}")
        limit = math.inf if elementwise is None else elementwise
        failures = [text for e in self.entries for text in _failures(e, tolerance, limit, kinks)]
        if failures:
            raise GradientError("\n".join([*failures, str(self)]))
        return self

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, strings and numbers, ready for JSON."""
        result = dataclasses.asdict(self)
        entries = [{**e, "shape": list(e["shape"])} for e in result["entries"]]
        result["entries"] = [{**e, "worst_index": list(e["worst_index"])} for e in entries]
        return result

    def __str__(self) -> str:
        header = ("variable", "shape", "checked", "relative norm", "max relative", "max absolute")
        rows: list[tuple[str, ...]] = [(*header, "worst index", "analytic", "numerical", "")]
        rows += [_row(entry) for entry in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        title = (
            f"Gradients of {self.target} on {self.backend}: {self.scalar} = {self.value:.6g}, "
            f"central differences of order {self.order}, step {self.step:.0e}"
        )
        return "\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _failures(
    entry: GradientEntry, tolerance: float, elementwise: float, kinks: float
) -> Iterator[str]:
    if entry.kinks > kinks * entry.checked:
        yield (
            f"{entry.name}: {entry.kinks} of {entry.checked} elements have no measurable "
            f"derivative, more than the fraction kinks={kinks:g}."
        )
    if entry.zero:
        return
    if not entry.relative_norm <= tolerance:
        yield (
            f"{entry.name}: analytic and numerical gradients differ by {entry.relative_norm:.2e} "
            f"in norm, more than tolerance={tolerance:g}."
        )
    if not entry.max_relative <= elementwise:
        yield (
            f"{entry.name}: an element differs by {entry.max_relative:.2e}, "
            f"more than elementwise={elementwise:g}."
        )


def _row(entry: GradientEntry) -> tuple[str, ...]:
    total = math.prod(entry.shape)
    return (
        entry.name,
        "×".join(map(str, entry.shape)) or "scalar",
        str(total) if entry.checked == total else f"{entry.checked}/{total}",
        "-" if entry.zero else f"{entry.relative_norm:.1e}",
        "-" if entry.zero else f"{entry.max_relative:.1e}",
        f"{entry.max_absolute:.1e}",
        ",".join(map(str, entry.worst_index)) or "-",
        f"{entry.analytic:.6g}",
        f"{entry.numerical:.6g}",
        entry.note,
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)


def check(
    target: Callable[..., Any],
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    upstream: Any = None,
    variables: Sequence[Any] | None = None,
    order: int = 4,
    step: float | None = None,
    scale_step: bool = True,
    samples: int | None = None,
    seed: int = 0,
    training: bool = True,
    traced: bool = True,
    names: Sequence[str] | None = None,
    **call_arguments: Any,
) -> GradientReport:
    """Compare the analytic gradient of a function, layer or model with its numerical one.

    The scalar that is differentiated is Σ output · upstream with a fixed random `upstream`, from
    which no error in a single element can hide, or `loss(output)`. Its derivative with respect to
    every element of every floating-point input and variable is measured by central differences in
    float64, (G2) or (G3), and compared with the gradient that the backend computes.

    Args:
        target: a `keras.layers.Layer` or `keras.Model`, built here if it is not built yet, or a
            function of arrays written with `keras.ops`. It may return a nested structure; outputs
            that are not floating-point are ignored.
        *inputs: the arguments of `target`: float64 arrays or tensors, or nested lists, tuples
            and dictionaries of them. Leaves of other types, such as integers, booleans and
            `None`, are passed on and not differentiated.
        loss: function of the output that returns a float64 scalar. For a layer or model,
            `target.losses` (regularizers, `add_loss`) are added to it. For a Keras loss, made with
            `dtype="float64"`, pass a function with its targets: `lambda y: loss(targets, y)`.
            Default: none, Σ output · upstream, without `target.losses`.
        upstream: array of the shape of the output, instead of the random one (for a nested
            structure: a list with one array per floating-point output).
        variables: `keras.Variable`s to differentiate. Default: `target.trainable_variables`;
            none for a function.
        order: 4 for five points and error h⁴, or 2 for the classical three points and error h².
        step: first step h > 0. Default: 1e-4 for order 4, 1e-5 for order 2, near the best
            balance of truncation and rounding for values of order 1.
        scale_step: whether the step of an element x is h · max(1, |x|) rather than h.
        samples: number of elements per variable that are compared, chosen at random without
            replacement. Default: all; each costs four evaluations (order 2: two).
        seed: seed of `upstream` and `samples`.
        training: passed to `target` if it is a layer or model.
        traced: whether both gradients come from a traced function (`tf.function`, `jax.jit`), as
            in `fit`; many times faster. If False, the target is run as it is, operation by
            operation. On PyTorch, both are the same.
        names: names of the floating-point inputs. Default: the names of the arguments.
        **call_arguments: further arguments of `target`, not differentiated (`mask`, ...).

    Returns:
        A `GradientReport`, one entry per floating-point input and variable.

    Raises:
        ValueError: something is not float64 or not finite, nothing is differentiable, `loss`,
            `variables`, `step`, `order`, `samples`, `names` or `upstream` is invalid, or two
            evaluations at the same point differ (random operations without a seed).

    State: the target is unchanged to the last bit, even if an exception is raised. Moving
    statistics, seed generators, the global seed generator of Keras and metrics start every
    evaluation from the same values, and their updates are discarded; so a dropout mask is the same
    in every evaluation. (The only lasting change is that an unbuilt target is built.)

    Kinks: where ReLU, |x| or a maximum has a kink near x, a difference quotient across it is
    wrong. With order 4, two tests detect that without the analytic gradient: slope(h) and
    slope(2h) disagree (G1), or bend(2h) is not twice bend(h) (G4), the sign of a kink exactly at
    x. The step is then divided by 10, up to three times. Elements where even that does not help
    have no measurable derivative; they are left out of the errors and counted as `kinks`, and
    `GradientReport.require` refuses them unless its `kinks` allows them. Order 2 has no such test.

    Example:
        >>> import keras, numpy as np
        >>> x = 5 * np.random.default_rng(0).standard_normal((4, 5)) + 12
        >>> layer = keras.layers.BatchNormalization(dtype="float64")
        >>> report = check(layer, x).require(1e-9)
        >>> [entry.name.split("/")[-1] for entry in report.entries]
        ['inputs', 'gamma', 'beta']
        >>> report["inputs"].worst_index in np.ndindex(4, 5)
        True
        >>> def cube(x):
        ...     return x**3
        >>> check(cube, np.array([2.0]), upstream=[1.0])["x"].analytic
        12.0

    Numerics: outputs are subtracted before they are weighted and summed, so that outputs that do
    not depend on the changed element cancel exactly and do not count in the resolution. Keras's
    conversion of float64 to float32 on JAX and PyTorch is off during the check. Measured for batch
    normalization of the example: below 1e-11 in norm with order 4, below 1e-9 with order 2.

    Reference: Press et al., Numerical Recipes, 3rd ed. (2007), section 5.7, for the balance of
    truncation and rounding and the extrapolation (G3).
    """
    if order not in DEFAULT_STEP:
        raise ValueError(f"order must be 2 or 4. Received: order={order}")
    step = DEFAULT_STEP[order] if step is None else step
    if not (is_real(step) and 0 < step < math.inf):
        raise ValueError(f"step must be a positive number. Received: step={step!r}")
    if samples is not None and not (is_integer(samples) and samples >= 1):
        raise ValueError(
            f"samples must be an integer of at least 1, or None. Received: samples={samples!r}"
        )
    if not (is_integer(seed) and seed >= 0):
        raise ValueError(f"seed must be an integer of at least 0. Received: seed={seed!r}")
    if loss is not None and upstream is not None:
        raise ValueError(
            "Either loss or upstream defines the scalar, not both. "
            f"Received: loss={loss}, upstream of shape={np.shape(upstream)}."
        )
    if loss is not None and not _takes_one(loss):
        raise ValueError(
            "loss must be a function of the output alone. Received: "
            f"loss={loss!r}. Of a loss of Keras pass lambda y: loss(targets, y)."
        )
    if isinstance(target, keras.layers.Layer):
        call_arguments = {"training": training, **call_arguments}
    with float64_promotion():
        scalar = _Scalar(target, inputs, call_arguments, loss, variables, names, traced)
        scalar.fix_upstream(upstream, seed)
        value, analytic = scalar.gradients()
        stencil = _Stencil(scalar, order, step, scale_step)
        entries = []
        for index, name in enumerate(scalar.names):
            chosen = _chosen_elements(scalar.values[index].size, samples, [seed, index])
            with np.errstate(invalid="ignore", over="ignore"):  # at the edge of a domain
                measured = stencil.measure(index, chosen)
            entries.append(_entry(name, scalar.values[index].shape, analytic[index], measured))
    return GradientReport(
        target=str(getattr(target, "name", None) or getattr(target, "__name__", target)),
        backend=keras.backend.backend(),
        scalar="Σ output·upstream" if loss is None else "loss",
        value=value,
        order=order,
        step=step,
        entries=tuple(entries),
    )


def _chosen_elements(size: int, samples: int | None, seed: list[int]) -> NDArray[np.intp]:
    if samples is None or samples >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).choice(size, samples, replace=False))


class _Scalar:
    """The target as a scalar function of a flat list of float64 arrays, called its values.

    The values are the floating-point leaves of the inputs, then those of the variables. The
    scalar is Σ_k Σ outputs[k] · upstream[k]; with a loss there is one output, the loss.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        inputs: tuple[Any, ...],
        call_arguments: dict[str, Any],
        loss: Callable[[Any], Tensor] | None,
        variables: Sequence[Any] | None,
        names: Sequence[str] | None,
        traced: bool,
    ) -> None:
        self._target, self._loss, self._call_arguments = target, loss, call_arguments
        self._layer = target if isinstance(target, keras.layers.Layer) else None
        self._structure = inputs
        self._leaves = keras.tree.flatten(inputs)
        self._places = [i for i, leaf in enumerate(self._leaves) if _is_float(leaf)]
        arrays = [_to_numpy(self._leaves[place]) for place in self._places]
        found = _input_names(target, inputs)
        self.names = _replace_names([found[place] for place in self._places], names)
        for name, array in zip(self.names, arrays, strict=True):
            _require_float64(f"input {name}", array.dtype)
        _require_backend_float64()
        self._build(arrays)
        self.variables = self._find_variables(variables)
        self.names += [variable.path for variable in self.variables]
        copies = [keras.ops.copy(variable.value) for variable in self.variables]
        self.values: list[Array] = arrays + [_to_numpy(copy) for copy in copies]
        self._tensors = [_to_tensor(value) for value in self.values]
        self._trace = trace if traced else lambda function: function
        self._evaluate = self._trace(self._pure)
        self._require_usable_values()

    def _build(self, arrays: list[Array]) -> None:
        """Create the variables of an unbuilt layer; updates of the call are discarded."""
        if self._layer is not None and not self._layer.built:
            with keras.StatelessScope(collect_losses=True):
                self._run([_to_tensor(array) for array in arrays])

    def _find_variables(self, variables: Sequence[Any] | None) -> list[Any]:
        if self._layer is not None:
            for layer in self._layer._flatten_layers():
                _require_float64_layer(layer)
        if variables is None:
            variables = [] if self._layer is None else self._layer.trainable_variables
        if isinstance(variables, keras.Variable) or not all(
            isinstance(variable, keras.Variable) for variable in variables
        ):
            raise ValueError(
                "variables must be a list of `keras.Variable`s. Received: variables="
                f"{variables!r}. Pass one as [variable], and arrays as inputs."
            )
        for variable in variables:
            _require_float64(f"variable {variable.path}", variable.dtype)
        return list(variables)

    def _require_usable_values(self) -> None:
        if not sum(value.size for value in self.values):
            raise ValueError(
                "There is nothing to differentiate: no floating-point input and no trainable "
                f"variable with an element. Received: target={self._target}, "
                f"{len(self._leaves)} inputs. Pass float64 arrays, or variables=[...]."
            )
        for name, value in zip(self.names, self.values, strict=True):
            _require_finite(name, value)

    def _run(self, tensors: Sequence[Tensor]) -> Any:
        """The target's result for these inputs; every run draws the same random numbers."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        arguments = keras.tree.pack_sequence_as(self._structure, leaves)
        with restored_randomness():
            return self._target(*arguments, **self._call_arguments)

    def _call(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The floating-point outputs, or the loss, at these inputs."""
        output = self._run(tensors)
        if self._loss is None:
            return [leaf for leaf in keras.tree.flatten(output) if _is_float(leaf)]
        value = self._loss(output)
        if not hasattr(value, "dtype"):
            raise ValueError(f"loss must return a float64 scalar. Received: {value!r}")
        _require_float64("the loss", value.dtype)
        return [sum(self._layer.losses, value) if self._layer is not None else value]

    def outputs(self, changes: dict[int, Array]) -> list[Array]:
        """The outputs with some of the values replaced; no state is kept."""
        tensors = list(self._tensors)
        for index, array in changes.items():
            tensors[index] = _to_tensor(array)
        return [_to_numpy(output) for output in self._evaluate(tensors)]

    def _pure(self, tensors: list[Tensor]) -> list[Tensor]:
        count = len(self._places)
        mapping = list(zip(self.variables, tensors[count:], strict=True))
        with keras.StatelessScope(mapping, collect_losses=True):
            return self._call(tensors[:count])

    def fix_upstream(self, upstream: Any, seed: int) -> None:
        """Evaluate once at the unchanged point, and fix the weights of the outputs."""
        self.base = self.outputs({})
        if not self.base:
            raise ValueError(
                f"The target returned no floating-point output. Received: target={self._target}"
            )
        for number, output in enumerate(self.base):
            _require_float64(f"output {number}", output.dtype)
            _require_finite(f"output {number}", output)
        shapes = [output.shape for output in self.base]
        if self._loss is not None:
            given = [np.ones(())]
            if shapes != [()]:
                raise ValueError(f"loss must return a scalar. Received: shape={shapes[0]}")
        elif upstream is None:
            # Its own stream: inputs drawn from default_rng(seed) must not be repeated, since along
            # its own input the gradient of a normalization vanishes.
            generator = np.random.default_rng([seed, UPSTREAM])
            given = [generator.standard_normal(shape) for shape in shapes]
        else:
            parts = [upstream] if len(shapes) == 1 else upstream
            given = [np.asarray(_to_numpy(part)) for part in parts]
        if [part.shape for part in given] != shapes:
            raise ValueError(
                "upstream must have the shape of the output (a list of one array per output when "
                f"there are several). Received: shapes={[part.shape for part in given]}, "
                f"outputs of shapes={shapes}."
            )
        self.upstream = [np.asarray(part, np.float64) for part in given]
        for number, part in enumerate(self.upstream):
            _require_finite(f"upstream {number}", part)
        products = [(u * o).ravel() for u, o in zip(self.upstream, self.base, strict=True)]
        self.size = float(np.linalg.norm(np.concatenate(products)))  # the scale of |L|

    def gradients(self) -> tuple[float, list[Array]]:
        """The scalar and its analytic gradient with respect to every value."""
        weights = [_to_tensor(part) for part in self.upstream]

        def scalar(*arrays: Tensor) -> Tensor:
            outputs = self._call(arrays)
            parts = [keras.ops.sum(o * w) for o, w in zip(outputs, weights, strict=True)]
            return sum(parts[1:], parts[0])

        count = len(self._places)
        differentiate = self._trace(lambda x: gradients(scalar, x, variables=self.variables))
        value, grads = differentiate(self._tensors[:count])
        result = float(_to_numpy(value))
        expected = _weighted_sum(self.base, [np.zeros(())] * len(self.base), self.upstream)
        if not abs(result - expected) <= 1e-9 * max(self.size, abs(expected)):
            raise ValueError(
                "Two evaluations at the same point must agree. Received: the values "
                f"{expected!r} and {result!r}. Give random operations a seed generator of Keras."
            )
        return result, [_to_numpy(grad) for grad in grads]


def _weighted_sum(high: list[Array], low: list[Array], upstream: list[Array]) -> float:
    """Σ (high - low) · upstream: equal outputs cancel before anything is rounded."""
    triples = zip(high, low, upstream, strict=True)
    return float(sum(np.sum((h - lo) * u) for h, lo, u in triples))


class _Estimate(NamedTuple):
    """A derivative, how far two step sizes disagree about it, and its rounding error."""

    derivative: float
    disagreement: float
    rounding: float

    def agrees(self, scale: float, bounds: tuple[float, float]) -> bool:
        """Whether the disagreement lies within the bounds; False if it is not a number."""
        relative, units = bounds
        allowed = relative * max(abs(self.derivative), scale) + units * self.rounding
        return self.disagreement <= allowed < math.inf


class _Measured(NamedTuple):
    """Numerical derivatives of some elements of one value."""

    elements: NDArray[np.intp]  # flat indices, (n,)
    derivative: Array  # (n,)
    resolution: Array  # the smallest that can be told from zero, (n,)
    kink: NDArray[np.bool_]  # (n,)


class _Stencil:
    """Central differences of a `_Scalar`, elementwise; detects kinks and avoids them."""

    def __init__(self, scalar: _Scalar, order: int, step: float, scale_step: bool) -> None:
        self._scalar, self._order = scalar, order
        self._step, self._scale_step = step, scale_step

    def measure(self, index: int, elements: NDArray[np.intp]) -> _Measured:
        """The derivatives with respect to these elements of value number `index`."""
        estimates = [self._estimate(index, element, 1.0) for element in elements]
        derivatives = np.array([estimate.derivative for estimate in estimates])
        finite = derivatives[np.isfinite(derivatives)]
        scale = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
        for place, element in enumerate(elements):
            estimates[place] = self._refine(index, element, estimates[place], scale)
        return _Measured(
            elements,
            np.array([estimate.derivative for estimate in estimates]),
            np.array([KINK[1] * estimate.rounding for estimate in estimates]),
            np.array([not estimate.agrees(scale, KINK) for estimate in estimates], bool),
        )

    def _refine(self, index: int, element: int, first: _Estimate, scale: float) -> _Estimate:
        """Shrink the step until two step sizes agree; else return the closest estimate."""
        best = first
        for factor in SHRINK[1:]:
            if best.agrees(scale, RETRY):
                break
            estimate = self._estimate(index, element, factor)
            best = estimate if not best.disagreement <= estimate.disagreement else best
        return best

    def _estimate(self, index: int, element: int, factor: float) -> _Estimate:
        value, base = self._scalar.values[index], self._scalar.base
        x = float(value.flat[element])
        h = factor * self._step * (max(1.0, abs(x)) if self._scale_step else 1.0)
        points = [x + h, x - h] if self._order == 2 else [x + h, x - h, x + 2 * h, x - 2 * h]
        outputs = [self._outputs(index, element, point) for point in points]

        def slope(high: int, low: int) -> float:  # divided by the step as rounded
            change = _weighted_sum(outputs[high], outputs[low], self._scalar.upstream)
            return change / (points[high] - points[low])

        def bend(high: int, low: int) -> float:
            up = _weighted_sum(outputs[high], base, self._scalar.upstream) / (points[high] - x)
            down = _weighted_sum(base, outputs[low], self._scalar.upstream) / (x - points[low])
            return up - down

        near = slope(0, 1)  # (G1)
        if self._order == 2:
            derivative, disagreement = near, 0.0 if math.isfinite(near) else math.inf  # (G2)
        else:
            far = slope(2, 3)
            derivative = (4 * near - far) / 3  # (G3)
            disagreement = max(abs(near - far), abs(bend(2, 3) - 2 * bend(0, 1)))  # (G4)
        rounding = EPSILON * self._scalar.size / h
        if abs(derivative) < CLEAR * rounding:
            own = EPSILON * self._size_reached(index, element, outputs) / h
            rounding = own if abs(derivative) > CLEAR * own else rounding
        return _Estimate(derivative, disagreement, rounding)

    def _size_reached(self, index: int, element: int, outputs: Sequence[list[Array]]) -> float:
        """The scale of those terms of L that the element reaches; the others cancel exactly.

        A change may be lost to rounding in a large output. Such an output counts, unless it also
        stays the same after a change too large to be lost.
        """
        base, upstream = self._scalar.base, self._scalar.upstream
        largest = max(float(np.abs(o).max(initial=0.0)) for o in base)
        x = float(self._scalar.values[index].flat[element])
        change = max(0.7310585 * max(1.0, abs(x)), 1e-9 * largest)
        changed = [
            *outputs,
            *(self._outputs(index, element, at) for at in (x + change, x - change)),
        ]
        terms = [
            (u * o)[np.any([other[k] != o for other in changed], axis=0)]
            for k, (u, o) in enumerate(zip(upstream, base, strict=True))
        ]
        return float(np.linalg.norm(np.concatenate(terms)))

    def _outputs(self, index: int, element: int, point: float) -> list[Array]:
        changed = self._scalar.values[index].copy()
        changed.flat[element] = point
        return self._scalar.outputs({index: changed})


def _entry(
    name: str, shape: tuple[int, ...], gradient: Array, measured: _Measured
) -> GradientEntry:
    """Compare the analytic gradient with the measured one, leaving out the kinks."""
    smooth = ~measured.kink
    elements, b = measured.elements[smooth], measured.derivative[smooth]
    a = gradient.ravel()[elements]
    resolution = measured.resolution[smooth]
    with np.errstate(invalid="ignore", over="ignore"):
        absolute = np.where(np.isfinite(a), np.abs(a - b), np.inf)
        total = np.abs(a) + np.abs(b)
        relative = absolute / np.maximum(ELEMENTWISE_FLOOR, np.where(np.isfinite(a), total, 1.0))
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    worst = int(np.argmax(absolute)) if a.size else None
    return GradientEntry(
        name=name,
        shape=shape,
        checked=measured.elements.size,
        kinks=int(measured.kink.sum()),
        analytic_norm=norms[0],
        numerical_norm=norms[1],
        relative_norm=_relative_norm(absolute, norms) if elements.size or len(smooth) else 0.0,
        max_relative=float(relative.max(initial=0.0)),
        max_absolute=float(absolute.max(initial=0.0)),
        worst_index=() if worst is None else _unravel(int(elements[worst]), shape),
        analytic=math.nan if worst is None else float(a[worst]),
        numerical=math.nan if worst is None else float(b[worst]),
        resolution=float(resolution.max(initial=0.0)),
        zero=bool(a.size and np.all(np.maximum(np.abs(a), np.abs(b)) <= resolution)),
        no_effect=bool(a.size and not np.any(a) and not np.any(b)),
    )


def _relative_norm(absolute: Array, norms: tuple[float, float]) -> float:
    difference = float(np.linalg.norm(absolute))
    if not absolute.size or not math.isfinite(difference):
        return math.inf
    return difference / sum(norms) if difference else 0.0  # (G5)


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()


def _input_names(target: Callable[..., Any], inputs: tuple[Any, ...]) -> list[str]:
    """A name for every leaf of the inputs: the argument's, followed by the path into it."""
    names = [f"input {number}" for number in range(len(inputs))]
    function = target.call if isinstance(target, keras.layers.Layer) else target
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # no signature, like some built-in functions
        parameters = []
    for number, parameter in enumerate(parameters[: len(inputs)]):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            for position in range(number, len(inputs)):
                names[position] = f"{parameter.name}[{position - number}]"
            break
        names[number] = parameter.name
    paths = [path for path, _ in keras.tree.flatten_with_path(inputs)]
    return [names[path[0]] + "".join(f"[{key!r}]" for key in path[1:]) for path in paths]


def _replace_names(found: list[str], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return found
    if len(names) != len(found):
        raise ValueError(
            f"names must hold one name per floating-point input, {len(found)} here. "
            f"Received: names={list(names)}"
        )
    return list(names)


def _takes_one(function: Any) -> bool:
    """Whether a function can be called with a single argument."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # no signature, like some built-in functions
        pass
    return True


def _is_float(leaf: Any) -> bool:
    if isinstance(leaf, float):
        return True
    try:
        return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(leaf.dtype)))
    except (AttributeError, TypeError, ValueError):  # None, bool, int, str
        return False


def _to_numpy(value: Any) -> NDArray[Any]:
    is_tensor = keras.ops.is_tensor(value)
    return np.asarray(keras.ops.convert_to_numpy(value) if is_tensor else value)


def _to_tensor(array: Array) -> Tensor:
    return keras.ops.convert_to_tensor(array, dtype="float64")


def _require_finite(name: str, array: Array) -> None:
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"All values must be finite. Received: {name}{list(index)}={array[index]}, "
            f"{len(wrong)} of {array.size} elements not finite."
        )


def _require_float64(name: str, dtype: Any) -> None:
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype != "float64":
        raise ValueError(
            "A numerical gradient needs float64 throughout: rounding to fewer digits is larger "
            f"than the change that is measured. Received: {name} of dtype={dtype}. Convert arrays "
            'with array.astype("float64"), and give layers, keras.Input and losses '
            'dtype="float64", or call keras.config.set_dtype_policy("float64") and '
            'keras.config.set_floatx("float64") before they are made.'
        )


def _require_float64_layer(layer: Any) -> None:
    """Refuse a layer that would round its floating-point inputs to a lower precision."""
    if isinstance(layer, keras.layers.InputLayer):
        dtype = layer.dtype
    elif layer._convert_input_args and layer.autocast:  # a functional model casts nothing itself
        dtype = layer.input_dtype
    else:
        return
    if keras.backend.is_float_dtype(dtype):
        _require_float64(f"layer {layer.name}", dtype)


def _require_backend_float64() -> None:
    """Refuse a backend that turns float64 into float32: JAX, unless it is told not to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = keras.backend.standardize_dtype(_to_tensor(np.zeros(())).dtype)
    if dtype != "float64":
        raise ValueError(
            f"A numerical gradient needs float64. Received: a backend that makes {dtype} of it. On "
            "JAX, set the environment variable JAX_ENABLE_X64=1, or call "
            'jax.config.update("jax_enable_x64", True) before any array is made.'
        )

"""What goes on inside a net while it trains: distributions, their shift, and the loss around it.

Let L(w) be the loss of the weights w on some examples, in training mode, g its gradient, and
t > 0 a step length. Along the step of gradient descent:

    (X1)  loss                 L(w - t g)
    (X2)  change               || grad L(w - t g) - g ||
    (X3)  smoothness(t)        || grad L(w - t g) - g || / (t ||g||)

The largest (X3) over t bounds the Lipschitz constant of the gradient from below: the smaller it is,
the further the gradient can be trusted, and the larger the steps may be.

The internal covariate shift of a layer, how much the step of the layers below it changes what it
should learn, in terms of its gradient g_i:

    (X4)  g_i'        = gradient for layer i at (w_1 - t g_1, ..., w_(i-1) - t g_(i-1), w_i, ...)
    (X5)  shift       = ||g_i' - g_i|| / ||g_i||,   cosine = g_i . g_i' / (||g_i|| ||g_i'||)

For the outputs a of a layer, with the channels c last, the distribution itself, and how far it has
moved since an earlier look at the same examples:

    (X6)  drift       = root mean square over c of (mean_c - earlier mean_c) / earlier std_c
    (X7)  scale       = geometric mean over c of std_c / earlier std_c

Measuring does not change the model: weights, moving statistics and the states of seed generators
are put back, bit for bit.

Reference: Ioffe and Szegedy, 2015, Batch Normalization, section 2 (the hypothesis). Santurkar,
Tsipras, Ilyas and Madry, 2018, How Does Batch Normalization Help Optimization?, section 2.2 and
definition 2.1 (internal covariate shift, unscaled), section 3.1 (the loss along the gradient).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops, tree

from keras_norm._arrays import is_integer, is_real
from keras_norm._gradients import gradients, restored_randomness
from keras_norm._layerwise import rms
from keras_norm._layerwise_program import intercepted
from keras_norm._state import synchronized

__all__ = [
    "LEVELS",
    "AlongGradient",
    "CovariateShift",
    "Distribution",
    "InsideMonitor",
    "along_gradient",
    "covariate_shift",
    "distributions",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Tensor = Any

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the quantiles in a `Distribution`."""


# The loss along the gradient ----------------------------------------------------------------------


@dataclass(frozen=True)
class AlongGradient:
    """The loss and its gradient along one step of gradient descent; see `along_gradient`.

    Args:
        loss: L(w).
        gradient_norm: ||g||.
        lengths: (T,), the step lengths t.
        losses: (T,), (X1).
        changes: (T,), (X2).
    """

    loss: float
    gradient_norm: float
    lengths: Floats
    losses: Floats
    changes: Floats

    @property
    def smoothness(self) -> float:
        """The largest (X3), in 1 / (unit of t)."""
        return float(np.max(self.changes / self.lengths) / self.gradient_norm)


def along_gradient(model: Any, x: Any, y: Any, lengths: Sequence[float]) -> AlongGradient:
    """Loss and change of the gradient at several distances along a step of gradient descent.

    Args:
        model: a built, compiled `keras.Model`; the loss is its own, with penalties.
        x: inputs of some examples, in one batch.
        y: their targets; None if the loss takes none, as with `add_loss` alone.
        lengths: step lengths t > 0, such as multiples of the learning rate.

    Returns:
        An `AlongGradient`.

    Raises:
        ValueError: for a model that is not compiled, no lengths or lengths that are not > 0, and a
            gradient that is zero or not finite.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        >>> model.compile("sgd", "mse")
        >>> model.set_weights([np.array([[3.0]])])
        >>> found = along_gradient(model, np.array([[2.0]]), np.array([[0.0]]), [0.05, 0.1])
        >>> found.loss, found.gradient_norm  # (2 w)^2 and 8 w
        (36.0, 24.0)
        >>> found.losses.round(3).tolist(), round(found.smoothness, 3)
        ([12.96, 1.44], 8.0)
    """
    t = np.asarray(lengths, np.float64)
    if t.ndim != 1 or not len(t) or not (np.isfinite(t) & (t > 0)).all():
        raise ValueError(
            f"`lengths` must be step lengths > 0, at least one. Received: lengths={lengths!r}."
        )
    surface = _Surface(model, x, y)
    loss, start = surface.evaluate(surface.variables)
    norm = _norm(start)
    if not (np.isfinite(norm) and norm > 0):
        raise ValueError(
            "There is no direction to go in: the gradient must be finite and not 0. Received: "
            f"a gradient of norm {norm} at a loss of {loss}."
        )
    losses, changes = [], []
    for length in t:
        with surface.moved(start, length, surface.variables):
            there, gradient = surface.evaluate(surface.variables)
        losses.append(there)  # (X1)
        changes.append(_norm([a - b for a, b in zip(gradient, start, strict=True)]))  # (X2)
    return AlongGradient(loss, norm, t, np.array(losses), np.array(changes))


def _norm(arrays: Sequence[Array]) -> float:
    return float(np.sqrt(sum(np.sum(a**2) for a in arrays)))


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else ops.convert_to_tensor(value)


def _refuse_string(argument: str, names: Sequence[str] | None) -> None:
    """Refuses a string in place of several names: it would be read letter by letter."""
    if isinstance(names, str):
        raise ValueError(
            f"`{argument}` must be a list of names. Received: {argument}={names!r}. Pass "
            f"[{names!r}]."
        )


class _Surface:
    """The loss of a model on given examples as a function of its weights."""

    def __init__(self, model: Any, x: Any, y: Any) -> None:
        if not getattr(model, "compiled", False):
            raise ValueError(
                "The model must be compiled: it is its loss that is looked at. Received: "
                f"model={getattr(model, 'name', model)!r}. Call model.compile(optimizer, loss)."
            )
        self._model = model
        self._x, self._y = (tree.map_structure(_tensor, v) for v in (x, y))
        self.variables = list(model.trainable_variables)

    def loss(self) -> Tensor:
        predicted = self._model(self._x, training=True)
        return self._model.compute_loss(x=self._x, y=self._y, y_pred=predicted)

    def evaluate(self, variables: Sequence[Any]) -> tuple[float, list[Floats]]:
        """The loss, and its gradient with respect to some of the weights, in float64."""
        with restored_randomness():  # the same dropout masks each time
            value, grads = gradients(self.loss, [], variables=variables)
        arrays = [np.array(ops.convert_to_numpy(g), np.float64) for g in grads]
        return float(ops.convert_to_numpy(value)), arrays

    @contextlib.contextmanager
    def moved(
        self, gradient: Sequence[Floats], length: float, variables: Sequence[Any]
    ) -> Iterator[None]:
        """Sets the weights to w - t g for the length of the block."""
        own = [np.array(ops.convert_to_numpy(v.value)) for v in variables]
        try:
            for variable, w, g in zip(variables, own, gradient, strict=True):
                variable.assign((w - length * g).astype(w.dtype))
            yield
        finally:
            for variable, w in zip(variables, own, strict=True):
                variable.assign(w)


# Internal covariate shift -------------------------------------------------------------------------


@dataclass(frozen=True)
class CovariateShift:
    """How the step of the layers below changes the gradient of a layer, (X5).

    Args:
        shift: norm of the change divided by that of the gradient; 0 for the lowest layer.
        cosine: cosine of the angle between the gradient before and after; 1 for the lowest layer.
    """

    shift: float
    cosine: float


def covariate_shift(
    model: Any, x: Any, y: Any, length: float, layers: Sequence[str] | None = None
) -> dict[str, CovariateShift]:
    """The internal covariate shift of the layers of a model under a step of gradient descent.

    Args:
        model: a built, compiled `keras.Model` with its layers in the order of their calls, such as
            a chain.
        x: inputs of some examples, in one batch.
        y: their targets; None if the loss takes none, as with `add_loss` alone.
        length: step length t > 0.
        layers: names of the layers to look at, all with trainable weights. Each costs one
            gradient of the loss. Default: all that have trainable weights.

    Returns:
        Name -> `CovariateShift`, in the order of the model.

    Raises:
        ValueError: for a model that is not compiled, a length that is not > 0, a string in place
            of the names, names of layers that do not exist or have no trainable weights.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4, 4), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> found = covariate_shift(model, x, y, 0.1, ["dense1", "dense2"])
        >>> found["dense1"].shift, found["dense2"].shift > 0
        (0.0, True)
    """
    if not (is_real(length) and 0 < length < math.inf):
        raise ValueError(f"`length` must be a step length > 0. Received: length={length!r}.")
    _refuse_string("layers", layers)
    surface = _Surface(model, x, y)
    with_weights = {y.name: y for y in model.layers if y.trainable_variables}
    chosen = list(with_weights) if layers is None else list(layers)
    if unknown := [name for name in chosen if name not in with_weights]:
        raise ValueError(
            f"`layers` must name layers with trainable weights, of {list(with_weights)}. "
            f"Received: {unknown}."
        )
    _, all_gradients = surface.evaluate(surface.variables)
    by_variable = {id(v): g for v, g in zip(surface.variables, all_gradients, strict=True)}
    found: dict[str, CovariateShift] = {}
    below: list[Any] = []
    for name, layer in with_weights.items():
        own = list(layer.trainable_variables)
        if name in chosen:
            before = [by_variable[id(v)] for v in own]
            with surface.moved([by_variable[id(v)] for v in below], length, below):
                _, after = surface.evaluate(own)  # (X4)
            found[name] = _shift_of(before, after)
        below += own
    return found


def _shift_of(before: Sequence[Floats], after: Sequence[Floats]) -> CovariateShift:
    """(X5)"""
    norms = _norm(before), _norm(after)
    change = _norm([a - b for a, b in zip(after, before, strict=True)])
    product = sum(float(np.sum(a * b)) for a, b in zip(after, before, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.float64(change) / norms[0] if change else 0.0
        cosine = np.float64(product) / (norms[0] * norms[1]) if change else 1.0
    return CovariateShift(float(shift), float(cosine))


# Distributions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """The outputs of a layer, and the gradient of the loss with respect to them.

    The gradient is that of each example's own loss: N times that of the mean over N examples.

    Args:
        mean: (C,), mean of each channel, over examples and positions.
        std: (C,), standard deviation of each channel.
        quantiles: (5,), of all outputs, at `LEVELS`.
        zeros: share of the outputs that are exactly 0.
        gradient_rms: root mean square of the gradient.
        gradient_quantiles: (5,), of the gradient, at `LEVELS`.
    """

    mean: Floats
    std: Floats
    quantiles: Floats
    zeros: float
    gradient_rms: float
    gradient_quantiles: Floats

    @classmethod
    def of(cls, outputs: Array, gradient: Array) -> Distribution:
        """Computes it from outputs (N, ..., C) and their gradient (N, ..., C)."""
        a, g = outputs.astype(np.float64), gradient.astype(np.float64)
        channels = tuple(range(a.ndim - 1))
        return cls(
            mean=a.mean(axis=channels),
            std=a.std(axis=channels),
            quantiles=np.quantile(a, LEVELS),
            zeros=float(np.mean(a == 0)),
            gradient_rms=rms(g),
            gradient_quantiles=np.quantile(g, LEVELS),
        )

    def since(self, earlier: Distribution) -> tuple[float, float]:
        """Drift (X6) and scale (X7) since an earlier look, over the channels that varied in both.

        NaN if there are no such channels.
        """
        varied = (self.std > 0) & (earlier.std > 0)
        if not varied.any():
            return float("nan"), float("nan")
        drift = (self.mean - earlier.mean)[varied] / earlier.std[varied]
        return rms(drift), float(np.exp(np.mean(np.log(self.std[varied] / earlier.std[varied]))))


def distributions(
    model: Any, x: Any, y: Any, layers: Sequence[str] | None = None
) -> dict[str, Distribution]:
    """The outputs of some layers in training mode, and the gradients that reach them.

    Args:
        model: a built, compiled `keras.Model`.
        x: inputs of some examples, in one batch.
        y: their targets; None if the loss takes none, as with `add_loss` alone.
        layers: names of layers, each called once, whose output is one array of a floating dtype.
            Default: all such layers except the inputs.

    Returns:
        Name -> `Distribution`.

    Raises:
        ValueError: for a model that is not compiled, a string in place of the names, and named
            layers that do not exist, are called more than once or not at all, or have other
            outputs.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> found = distributions(model, x, y, ["dense1_norm"])
        >>> bool(abs(found["dense1_norm"].mean).max() < 1e-6)
        True
    """
    _refuse_string("layers", layers)
    surface = _Surface(model, x, y)
    known = {y.name: y for y in model.layers if not isinstance(y, keras.layers.InputLayer)}
    names = list(known) if layers is None else list(dict.fromkeys(layers))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`layers` must be of {list(known)}. Received: {unknown}.")
    chosen = [known[name] for name in names]
    outputs: dict[int, Tensor] = {}

    def note(layer: Any, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        _once(layer, outputs)
        outputs[id(layer)] = call(*args, **kwargs)
        return outputs[id(layer)]

    scope = keras.StatelessScope(collect_losses=True)  # assignments inside it are discarded
    with intercepted(chosen, note), restored_randomness(), scope:
        surface.loss()
    if missing := [y.name for y in chosen if id(y) not in outputs]:
        raise ValueError(f"`layers` must be called by the model. Received: {missing}.")
    others = [name for name in names if not _one_floating(outputs[id(known[name])])]
    if others and layers is not None:
        raise ValueError(
            "`layers` must be those whose output is one array of a floating dtype. Received: "
            f"{others}. Leave them out of `layers`."
        )
    names = [name for name in names if name not in others]
    chosen = [known[name] for name in names]

    def shifted(*offsets: Tensor) -> Tensor:
        by_layer = {id(y): offset for y, offset in zip(chosen, offsets, strict=True)}

        def add(layer: Any, call: Any, *args: Any, **kwargs: Any) -> Tensor:
            return call(*args, **kwargs) + by_layer[id(layer)]

        with intercepted(chosen, add):
            return surface.loss()

    number = len(keras.tree.flatten(x)[0])  # of examples
    values = [outputs[id(y)] for y in chosen]
    with restored_randomness():
        _, grads = gradients(shifted, [ops.zeros_like(value) for value in values])
    return {
        name: Distribution.of(ops.convert_to_numpy(value), number * ops.convert_to_numpy(gradient))
        for name, value, gradient in zip(names, values, grads, strict=True)
    }


def _one_floating(output: Any) -> bool:
    dtype = keras.backend.standardize_dtype
    return ops.is_tensor(output) and keras.backend.is_float_dtype(dtype(output.dtype))


def _once(layer: Any, outputs: dict[int, Tensor]) -> None:
    if id(layer) in outputs:
        raise ValueError(
            "A layer that is looked at must be called once. Received: "
            f"{layer.name!r}, called more than once. Leave it out of `layers`."
        )


# During fit ---------------------------------------------------------------------------------------


class InsideMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Looks into a net every few steps of `fit`, always with the same examples.

    Before step 0, `every`, 2 `every`, ... and after the last, it records the loss along the
    gradient, the internal covariate shift, and the distributions of outputs and gradients, with
    their drift since the last look. Training is not affected. With `steps_per_execution`, it looks
    before the first execution that begins at such a step or later.

    Args:
        x: inputs of some examples, in one batch: as many as in a training step, in order to see
            what batch normalization makes of a batch.
        y: their targets; None if the loss takes none, as with `add_loss` alone.
        every: int >= 1, steps between two looks. Default: 50.
        lengths: step lengths, in units of the learning rate at the time. Default: from half of it
            to four times.
        layers: names of layers for the distributions; () for none. Default: as in
            `distributions`.
        shifts: names of layers for the covariate shift under a step of the learning rate, see
            `covariate_shift`; () for none. Default: all with weights.

    Attributes:
        records: a dict for each look: "step", "loss", "gradient_norm", "smoothness", and the arrays
            "losses" and "changes", as in `AlongGradient`.
        layer_records: a dict for each look and layer: "step", "layer", and, if asked for,
            "mean_rms", "std" (root mean squares over the channels), "zeros", "quantiles",
            "gradient_rms", "gradient_quantiles", "drift", "scale" (NaN at the first look), "shift",
            "cosine".

    Raises:
        ValueError: for `every` or `lengths` out of their range, a string in place of names; from
            `fit`, for the same reasons as the functions.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> monitor = InsideMonitor(x, y, every=2, layers=["dense1_norm"], shifts=["logits"])
        >>> _ = model.fit(x, y, batch_size=1, epochs=1, verbose=0, callbacks=[monitor])
        >>> [record["step"] for record in monitor.records]
        [0, 2, 3]
        >>> sorted({record["layer"] for record in monitor.layer_records})
        ['dense1_norm', 'logits']
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        every: int = 50,
        lengths: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 4.0),
        layers: Sequence[str] | None = None,
        shifts: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not (is_integer(every) and every >= 1):
            raise ValueError(f"`every` must be an int >= 1, steps. Received: every={every!r}.")
        if not len(lengths) or min(lengths) <= 0:
            raise ValueError(
                "`lengths` must be multiples of the learning rate > 0, at least one. Received: "
                f"lengths={lengths!r}."
            )
        _refuse_string("layers", layers)
        _refuse_string("shifts", shifts)
        self.x, self.y, self.every, self.lengths = x, y, every, tuple(lengths)
        self.layers, self.shifts = layers, shifts
        self.records: list[dict[str, Any]] = []
        self.layer_records: list[dict[str, Any]] = []
        self._step = self._earlier = self._next = 0
        self._before: dict[str, Distribution] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets what was recorded before."""
        self.records, self.layer_records, self._before = [], [], {}
        self._step = self._earlier = self._next = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the steps of earlier epochs."""
        self._earlier = self._step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Looks into the net if it is time."""
        self._step = self._earlier + batch
        if self._step >= self._next:  # several steps may be taken at once
            self._look()
            self._next = (self._step // self.every + 1) * self.every

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the steps."""
        self._step = self._earlier + batch + 1

    def on_train_end(self, logs: Any = None) -> None:
        """Looks into the net for the last time."""
        self._look()

    def _look(self) -> None:
        synchronized(self.model)
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        given = self.model, self.x, self.y
        along = along_gradient(*given, [(rate or 1.0) * length for length in self.lengths])
        record = {
            "step": self._step,
            "loss": along.loss,
            "gradient_norm": along.gradient_norm,
            "smoothness": along.smoothness,
            "losses": along.losses,
            "changes": along.changes,
        }
        if not rate:  # as at the start of a warm-up: a step of length 0
            still = np.zeros(len(self.lengths))
            record |= {"smoothness": math.nan, "losses": along.loss + still, "changes": still}
        self.records.append(record)
        by_layer: dict[str, dict[str, Any]] = {}
        if self.layers is None or len(self.layers):
            now = distributions(*given, self.layers)
            for name, distribution in now.items():
                by_layer[name] = _described(distribution, self._before.get(name))
            self._before = now
        if self.shifts is None or len(self.shifts):
            for name, found in covariate_shift(*given, rate or 1.0, self.shifts).items():
                moved = (found.shift, found.cosine) if rate else (0.0, math.nan)
                by_layer.setdefault(name, {}).update(shift=moved[0], cosine=moved[1])
        self.layer_records += [
            {"step": self._step, "layer": name, **found} for name, found in by_layer.items()
        ]


def _described(now: Distribution, before: Distribution | None) -> dict[str, Any]:
    drift, scale = (float("nan"), float("nan")) if before is None else now.since(before)
    return {
        "mean_rms": rms(now.mean),
        "std": rms(now.std),
        "zeros": now.zeros,
        "quantiles": now.quantiles,
        "gradient_rms": now.gradient_rms,
        "gradient_quantiles": now.gradient_quantiles,
        "drift": drift,
        "scale": scale,
    }

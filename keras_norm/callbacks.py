"""Keras callbacks: learning-rate range test, statistics and averaged weights during `fit`."""

import csv
import importlib
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm import statistics
from keras_norm._arrays import is_integer, is_real
from keras_norm._kinds import has_statistics
from keras_norm._layerwise import rms
from keras_norm._state import synchronized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AdaptStatistics",
    "AverageWeights",
    "LearningRateRangeTest",
    "LearningRateSuggestion",
    "Lookahead",
    "ReestimateStatistics",
    "StatisticsMonitor",
    "in_order",
]

Floats = npt.NDArray[np.float64]


# Learning-rate range test -----------------------------------------------------------------------


class LearningRateSuggestion(NamedTuple):
    """Two learning rates read off a range test.

    `steepest`: the rate at which the loss fell fastest per factor (or per unit, on a linear scale)
    of the rate; a good constant rate. `lowest`: the rate at which the smoothed loss was lowest,
    the edge of divergence; a tenth of it is a good constant rate too. The maximum of a cyclical
    schedule lies between `steepest` and `lowest`.
    """

    steepest: float
    lowest: float


class LearningRateRangeTest(keras.callbacks.Callback):
    """Trains with a rising learning rate, records the loss, and puts everything back.

    Batch k = 0, 1, ..., steps - 1 of one `fit` is trained at the rate

        minimum (maximum / minimum)^(k / (steps - 1))            exponential
        minimum + (maximum - minimum) k / (steps - 1)            linear

    and its loss is recorded. The test stops early when the loss is not finite, or when its mean
    over the last `window` batches, m, has risen well above the lowest such mean, m_low: when
    m > m_low + (divergence - 1) |m_low|. Then `fit` ends. However it ends, the model gets back the
    weights, the state of the optimizer, the random seeds and the learning rate that it had before:

    - after an exception or Ctrl-C in a training step, as soon as that is raised;
    - after one elsewhere (in the data, in another callback), when the `with` block of this
      callback ends or `restore()` is called, because Keras does not tell callbacks about it.

    Args:
        minimum: number > 0, the first learning rate. Default: 1e-6.
        maximum: number > minimum, the last learning rate. Default: 10.
        steps: int >= 2, batches to train on, in one epoch or several: give `fit` enough epochs.
            Default: 100.
        scale: "exponential" or "linear". Default: "exponential".
        window: odd int from 1 to `steps`, batches in a moving mean and in a fit of the slope.
            Default: None, a tenth of `steps`, but at least 5 (if there are that many), made odd.
        divergence: number > 1, see above. Default: 4.

    Attributes:
        status: "not started", "running", "finished" (reached the maximum), "diverged", "data
            ended" (fit had fewer batches than `steps`) or "interrupted".

    Raises:
        ValueError: for a number out of its range; from `fit`, if the model is not built, its logs
            have no loss, or its optimizer is not used in its first batch.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(512, 8)).astype("float32")
        >>> y = x @ np.arange(8.0).reshape(8, 1)
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(0.01), "mse")
        >>> test = LearningRateRangeTest(1e-4, 10, steps=60)
        >>> _ = model.fit(x, y, batch_size=32, epochs=4, verbose=0, callbacks=[test])
        >>> test.status
        'diverged'
        >>> 1e-3 < test.suggestion().steepest < test.suggestion().lowest < 1
        True
        >>> round(float(model.optimizer.learning_rate.numpy()), 6), int(model.optimizer.iterations)
        (0.01, 0)

    Numerics: the loss of a batch is that batch's alone. To this end the model's metrics are reset
    before each batch (so the progress bar shows single batches). With `steps_per_execution` > 1
    one execution counts as a batch. The moving means are centred: they do not lag behind.

    Reference: Smith, 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3.
    """

    def __init__(
        self,
        minimum: float = 1e-6,
        maximum: float = 10.0,
        steps: int = 100,
        *,
        scale: str = "exponential",
        window: int | None = None,
        divergence: float = 4.0,
    ) -> None:
        super().__init__()
        _check_range(minimum, maximum)
        _check_window(steps, window)
        if scale not in ("exponential", "linear"):
            raise ValueError(
                f"`scale` must be 'exponential' or 'linear'. Received: scale={scale!r}."
            )
        if not (is_real(divergence) and 1 < divergence < math.inf):
            raise ValueError(
                "`divergence` is how many times its lowest value the loss may reach, a number "
                f"> 1. Received: divergence={divergence!r}."
            )
        self.minimum = minimum
        self.maximum = maximum
        self.steps = steps
        self.scale = scale
        self.window = window
        self.divergence = divergence
        self.status = "not started"
        self._rates: list[float] = []
        self._losses: list[float] = []
        self._lowest = math.inf
        self._snapshot: _Snapshot | None = None

    def learning_rate(self, step: int) -> float:
        """The learning rate of a batch.

        Args:
            step: int from 0 to steps - 1.

        Returns:
            The rate, a float.

        Example:
            >>> round(LearningRateRangeTest(1e-4, 1, steps=5).learning_rate(3), 6)
            0.1
        """
        u = step / (self.steps - 1)
        if self.scale == "linear":
            return float(self.minimum * (1 - u) + self.maximum * u)
        return float(self.minimum ** (1 - u) * self.maximum**u)

    # What `fit` calls

    def on_train_begin(self, logs: Any = None) -> None:
        """Saves the state of the model and starts at the minimum rate."""
        self.restore()
        self._rates, self._losses, self._lowest = [], [], math.inf
        self._snapshot = _Snapshot(self.model, self._sweep, self.restore)
        self.status = "running"

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the learning rate of the batch."""
        if self._snapshot is None or self.status != "running":
            return
        self.model.reset_metrics()
        self._snapshot.set_learning_rate(self.learning_rate(len(self._losses)))
        self._rates.append(self._snapshot.get_learning_rate())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Records the loss of the batch, and ends the test if it is time."""
        if self.status != "running":
            return
        if "loss" not in (logs or {}):
            self.restore()
            raise ValueError(
                "A learning-rate range test needs the loss of each batch. Received: logs of "
                f"{sorted(logs or {})}. Let `train_step` return 'loss'."
            )
        if not self._losses:
            self._check_optimizer()
        self._losses.append(float(logs["loss"]))
        if self._diverged():
            self._end("diverged")
        elif len(self._losses) == self.steps:
            self._end("finished")

    def on_train_end(self, logs: Any = None) -> None:
        """Puts the model back again, because `fit` itself may change the weights at its end."""
        ended = self.status == "running"
        if ended:
            self.status = "data ended"
        self.restore()
        if ended:
            warnings.warn(
                f"The learning-rate range test saw {len(self._losses)} of {self.steps} batches, "
                f"rates up to {max(self._rates, default=math.nan):.3g} of {self.maximum:.3g}. Give "
                "`fit` more epochs, or the test fewer steps.",
                stacklevel=2,
            )

    def _end(self, status: str) -> None:
        self.status = status
        if self._snapshot is not None:
            # Already here, so that nothing before on_train_end sees (or saves) these weights.
            self._snapshot.put_back()
        self.model.stop_training = True

    def _check_optimizer(self) -> None:
        """After the first batch: the model's optimizer must have made the step, at our rate."""
        synchronized(self.model)
        if self._snapshot is None or self._snapshot.has_stepped():
            return
        self.restore()
        raise ValueError(
            "A learning-rate range test sweeps the rate of the model's `optimizer`, which has to "
            f"get the gradients of each batch. Received: optimizer={self.model.optimizer!r}, which "
            "got none in the first batch. Give the optimizer that trains to `compile`, and let "
            "`train_step` apply it."
        )

    def _sweep(self, step: Any) -> Any:
        """The learning rate as a schedule, for an optimizer that has a schedule."""
        u = keras.ops.cast(step, keras.config.floatx()) / (self.steps - 1)
        if self.scale == "linear":
            return self.minimum * (1 - u) + self.maximum * u
        return self.minimum * keras.ops.exp(u * math.log(self.maximum / self.minimum))

    def _diverged(self) -> bool:
        if not math.isfinite(self._losses[-1]):
            return True
        size = _window(self.steps, self.window)
        if len(self._losses) < size:
            return False
        mean = float(np.mean(self._losses[-size:]))
        self._lowest = min(self._lowest, mean)
        return mean > self._lowest + (self.divergence - 1) * abs(self._lowest)

    # Putting things back

    def restore(self) -> None:
        """Puts weights, optimizer, seeds and learning rate back, unless that has been done.

        Example:
            >>> LearningRateRangeTest().restore()
        """
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None:
            return
        if self.status == "running":
            self.status = "interrupted"
        snapshot.put_back()
        snapshot.release()

    def __enter__(self) -> "LearningRateRangeTest":
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    # What came out

    def results(self) -> dict[str, npt.NDArray[Any]]:
        """The record of the last test.

        Returns:
            Arrays of one length, that of the batches trained: "step" (int64), "learning_rate",
            "loss" and "smoothed_loss" (float64). The last is the centred moving mean over `window`
            batches, and over fewer at the ends.

        Example:
            >>> sorted(LearningRateRangeTest().results())
            ['learning_rate', 'loss', 'smoothed_loss', 'step']
        """
        count = len(self._losses)
        losses = np.array(self._losses, "float64")
        return {
            "step": np.arange(count),
            "learning_rate": np.array(self._rates[:count], "float64"),
            "loss": losses,
            "smoothed_loss": _moving_mean(losses, _window(self.steps, self.window)),
        }

    def suggestion(self) -> LearningRateSuggestion:
        """Reads learning rates off the curve.

        `lowest` is the rate at the lowest smoothed loss. `steepest` is the rate, up to that one,
        at which the line fitted to the losses of `window` batches (over log rate, or over the rate
        on a linear scale) falls most steeply.

        Returns:
            `LearningRateSuggestion(steepest, lowest)`, floats.

        Raises:
            ValueError: if fewer than two windows of batches have been trained, or the loss has
                not fallen.
        """
        size = _window(self.steps, self.window)
        record = self.results()
        rates, smoothed = record["learning_rate"], record["smoothed_loss"]
        finite = np.isfinite(record["loss"])
        if np.sum(finite) < 2 * size:
            raise ValueError(
                f"A suggestion needs the losses of at least two windows, {2 * size} batches. "
                f"Received: {int(np.sum(finite))} finite losses, status={self.status!r}. Test "
                "with more steps, from a smaller minimum."
            )
        x = np.log(rates) if self.scale == "exponential" else rates
        half = size // 2
        centres = np.arange(half, len(rates) - half)
        centres = centres[np.isfinite(smoothed[centres])]
        lowest = int(centres[np.argmin(smoothed[centres])])
        slopes = [
            _slope(x[k - half : k + half + 1], record["loss"][k - half : k + half + 1])
            for k in centres[centres <= lowest]
        ]
        if min(slopes) >= 0:
            raise ValueError(
                "A suggestion needs a loss that falls somewhere. Received: losses that rise from "
                f"the beginning, at the rate {rates[0]:.3g}. Test from a smaller minimum."
            )
        steepest = int(centres[int(np.argmin(slopes))])
        return LearningRateSuggestion(float(rates[steepest]), float(rates[lowest]))

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, title: str | None = None
    ) -> "Figure":
        """Draws loss against learning rate, with the suggestion if there is one.

        Args:
            path: .png, .pdf or .svg file to write, whole or not at all. Default: None, only
                return the figure.
            title: text above the plot, such as the net and its data. Default: None.

        Returns:
            The Matplotlib figure.

        Raises:
            ValueError: if no batch has been trained, or for another kind of file.
        """
        from keras_norm.plotting import finish, style

        if not self._losses:
            raise ValueError(
                "A plot needs the losses of a range test. Received: "
                f"status={self.status!r}. Pass the callback to `fit` first."
            )
        with style():
            figure = self._draw()
            if title is not None:
                figure.suptitle(title)
            return finish(figure, path)

    def _draw(self) -> "Figure":
        from matplotlib.figure import Figure

        record = self.results()
        rates, smoothed = record["learning_rate"], record["smoothed_loss"]
        figure = Figure(figsize=(6.4, 4.0))
        axes = figure.add_subplot()
        axes.plot(rates, record["loss"], "o", color="C0", alpha=0.3, label="loss of a batch")
        size = _window(self.steps, self.window)
        axes.plot(rates, smoothed, "-", color="C0", label=f"mean over {size} batches")
        try:
            marks = self.suggestion()._asdict()
        except ValueError:
            marks = {}
        for (name, rate), look in zip(marks.items(), ("--", ":"), strict=False):
            axes.axvline(rate, linestyle=look, marker="", color="C1", label=f"{name}: {rate:.2g}")
        if self.scale == "exponential":
            axes.set_xscale("log")
        low, high = _view(record["loss"], smoothed)
        axes.set_ylim(low, high)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        note = f"range test over {len(rates)} batches, {self.status}"
        figure.legend(title=note, ncols=2, loc="outside lower center")  # clear of the lines
        return figure


class _Snapshot:
    """State of a model before a range test, and access to its learning rate.

    If the optimizer's rate is a variable, it is set by assignment. A schedule cannot be assigned
    to, and is traced into the training step, so it is replaced by the sweep and the step is traced
    again. The step is wrapped to notice what interrupts it.
    """

    def __init__(
        self,
        model: Any,
        sweep: Callable[[Any], Any],
        restore: Callable[[], None],
    ) -> None:
        optimizer = model.optimizer
        if optimizer is None or hasattr(optimizer, "optimizers"):
            raise ValueError(
                "A learning-rate range test needs an optimizer with one learning rate. "
                f"Received: optimizer={optimizer!r}."
            )
        if not model.built or not model.trainable_variables:
            raise ValueError(
                "A learning-rate range test puts the weights back, so they must exist before "
                f"`fit`. Received: model {model.name!r}, not built. Give it a `keras.Input`, or "
                "call it on a batch first."
            )
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._model = model
        self._rule = _rule(optimizer)
        self._steps = [self._rule._iterations]
        if hasattr(optimizer, "dynamic_scale"):
            self._steps.append(optimizer.dynamic_scale)  # halved when a step is skipped
        self._before = [float(v.numpy()) for v in self._steps]
        self._variables = [*model.variables, *optimizer.variables]
        self._values = [np.array(variable.numpy()) for variable in self._variables]
        if keras.backend.backend() == "jax":
            # An average that Keras has put into the weights is one buffer in two variables, which
            # a step on JAX cannot take: each gets its own.
            for variable, value in zip(self._variables, self._values, strict=True):
                variable.assign(value)
        # Keras has a public way to the value of the rate, but none to the schedule itself.
        self._schedule = self._rule._learning_rate
        if isinstance(self._schedule, keras.Variable):
            self._schedule = None
        else:
            self._rule.learning_rate = _Sweep(sweep, int(self._rule._iterations.numpy()))
            model.make_train_function(force=True)
        self._train_function = model.train_function
        self._wrapper = _watched(self._train_function, restore)
        model.train_function = self._wrapper

    def set_learning_rate(self, rate: float) -> None:
        if self._schedule is None:
            self._rule.learning_rate = rate

    def get_learning_rate(self) -> float:
        rate = self._rule.learning_rate
        return float(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(rate)))

    def has_stepped(self) -> bool:
        """Whether the optimizer has been given gradients since the snapshot."""
        return self._before != [float(v.numpy()) for v in self._steps]

    def put_back(self) -> None:
        """Assigns the values of the snapshot, even in the middle of an epoch."""
        if getattr(self._model, "_jax_state", None):
            # On JAX the training step holds the state, or lost it when it failed; from now on the
            # state is that of the variables again.
            self._model._jax_state_synced = True
            self._model.reset_metrics()
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)

    def release(self) -> None:
        """Gives back the optimizer's schedule and the model's training step."""
        if self._model.train_function is self._wrapper:
            self._model.train_function = self._train_function
        if self._schedule is not None:
            self._rule.learning_rate = self._schedule
            self._model.train_function = None  # traced with the sweep: `fit` makes a new one


class _Sweep(keras.optimizers.schedules.LearningRateSchedule):
    """A sweep that begins at the step that the optimizer has reached."""

    def __init__(self, sweep: Callable[[Any], Any], start: int) -> None:
        self._rate = sweep
        self._start = start

    def __call__(self, step: Any) -> Any:
        return self._rate(keras.ops.convert_to_tensor(step) - self._start)


def _watched(function: Callable[..., Any], restore: Callable[[], None]) -> Callable[..., Any]:
    """A training step that puts the model back when it is interrupted."""

    def train_function(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:
            # The end of the data is an exception too: Python's, or TensorFlow's.
            if not isinstance(error, StopIteration) and type(error).__name__ != "OutOfRangeError":
                restore()
            raise

    return train_function


def _rule(optimizer: Any) -> Any:
    """The optimizer that makes the steps: the inner one of a LossScaleOptimizer."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _check_range(minimum: Any, maximum: Any) -> None:
    if not (is_real(minimum) and is_real(maximum) and 0 < minimum < maximum < math.inf):
        raise ValueError(
            "A range test goes from a `minimum` > 0 up to a larger `maximum`. "
            f"Received: minimum={minimum!r}, maximum={maximum!r}."
        )


def _check_window(steps: Any, window: Any) -> None:
    if not (is_integer(steps) and steps >= 2):
        raise ValueError(f"`steps` must be an int >= 2. Received: steps={steps!r}.")
    if window is None:
        return
    if not (is_integer(window) and 1 <= window <= steps and window % 2 == 1):
        raise ValueError(
            "`window` must be an odd int from 1 to `steps`. "
            f"Received: window={window!r}, steps={steps!r}."
        )


def _window(steps: int, window: int | None) -> int:
    """The number of batches in a moving mean: odd, so that it has a middle."""
    if window is not None:
        return window
    return min(max(5, steps // 10) | 1, (steps - 1) | 1)


def _moving_mean(values: Floats, size: int) -> Floats:
    """The centred moving mean; at the ends, over as many values as there are."""
    half = size // 2
    means = [values[max(0, k - half) : k + half + 1].mean() for k in range(len(values))]
    return np.array(means, "float64")


def _slope(x: Floats, y: Floats) -> float:
    """Slope of the least-squares line; if it is not finite, it counts as rising."""
    x = x - x.mean()
    slope = float(x @ (y - y.mean()) / (x @ x))
    return slope if math.isfinite(slope) else math.inf


def _view(loss: Floats, smoothed: Floats) -> tuple[float, float]:
    """Limits of the y axis that show the descent, however high the loss rose afterwards."""
    finite = loss[np.isfinite(loss)]
    if not len(finite):
        return 0.0, 1.0
    low, start = float(finite.min()), float(smoothed[np.isfinite(smoothed)][:1].sum())
    high = min(float(finite.max()), max(start, low) + (max(start, low) - low))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


# Statistics and averages during `fit` -------------------------------------------------------------


class _Exchange(keras.callbacks.Callback):
    """Gives the model other values for validation, and its own values back for training.

    In an epoch of `fit` with validation data:

        on_test_begin       the other values come in: validation sees them,
        on_epoch_end        and so do the callbacks that are listed before this one;
                            then the model's own values are put back, for the callbacks listed
                            after it and for the next epoch.

    Without validation data, the callbacks before this one see the other values if `in_order` made
    the list: it puts a callback in front that brings them in when an epoch ends. If several
    callbacks exchange values, the last one in is put back first.

    After an exception in a validation step the model's own values are put back at once; after one
    elsewhere, when the `with` block of the callback ends, at the next `fit`, or by `restore()`.
    """

    def __init__(self, every: int, keep: bool) -> None:
        super().__init__()
        if not (is_integer(every) and every >= 1):
            raise ValueError(f"`every` must be an int >= 1, epochs. Received: every={every!r}.")
        self.every = every
        self.keep = keep
        self._own: list[tuple[Any, npt.NDArray[Any]]] | None = None
        self._fitting = False
        self._epoch = 0
        self._watch: tuple[Any, Any] | None = None
        self._exchanged_model: Any = None  # `model` is another in the next `fit`

    def _variables(self) -> list[Any]:
        """The variables whose values are exchanged."""
        raise NotImplementedError

    def _come_in(self) -> None:
        """Assigns the other values."""
        raise NotImplementedError

    def _due(self, epoch: int) -> bool:
        return (epoch + 1) % self.every == 0

    @property
    def exchanged(self) -> bool:
        """Whether the model has the other values now."""
        return self._own is not None

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts the model's own values back if an interrupted `fit` has not."""
        self.restore()
        self._fitting = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_test_begin(self, logs: Any = None) -> None:
        """Brings the other values in, before validation."""
        if not (self._fitting and self._due(self._epoch)) or self.exchanged:
            return
        self._bring_in()
        if any(other._watch is not None for other in _EXCHANGED[self._exchanged_model]):
            return  # the first of them also puts back those that came in after it
        function = self.model.test_function
        wrapper = _watched(function, self.restore)
        self._watch = function, wrapper
        self.model.test_function = wrapper

    def on_test_end(self, logs: Any = None) -> None:
        """Gives the model its own validation step back."""
        self._unwatch()

    def before_epoch_end(self, epoch: int) -> None:
        """Brings the other values in if validation has not, before any `on_epoch_end`."""
        if self._fitting and self._due(epoch) and not self.exchanged:
            self._bring_in()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the model's own values back."""
        self._put_back()

    def on_train_end(self, logs: Any = None) -> None:
        """Ends the exchange; with `keep`, the model gets the other values for good."""
        self._put_back()
        self._fitting = False
        if self.keep:
            self._bring_in_for_good()

    def restore(self) -> None:
        """Puts the model's own values back, unless it has them already.

        Example:
            >>> AverageWeights().restore()
        """
        self._fitting = False
        self._put_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def _bring_in(self) -> None:
        synchronized(self.model)
        self._own = [(v, np.array(v.numpy())) for v in self._variables()]
        self._exchanged_model = self.model
        _EXCHANGED.setdefault(self._exchanged_model, []).append(self)
        try:
            self._come_in()
        except BaseException:
            self._put_back()
            raise

    def _bring_in_for_good(self) -> None:
        self._bring_in()
        _EXCHANGED[self._exchanged_model].remove(self)
        self._own = None

    def _put_back(self) -> None:
        self._unwatch()
        if self._own is None:
            return
        exchanges = _EXCHANGED[self._exchanged_model]
        while exchanges[-1] is not self:  # those that came in after this one
            exchanges[-1]._put_back()
        exchanges.pop()
        own, self._own = self._own, None
        model = self._exchanged_model
        if getattr(model, "_jax_state", None):
            model._jax_state_synced = True  # the state is that of the variables from now on
        statistics._assign_all(own)

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        synchronized(self._exchanged_model)  # an interrupted step may still hold the values
        if self._exchanged_model.test_function is watch[1]:
            self._exchanged_model.test_function = watch[0]


# model -> the callbacks whose values it has, in the order in which they came in
_EXCHANGED: weakref.WeakKeyDictionary[Any, list[_Exchange]] = weakref.WeakKeyDictionary()


class _BeforeEpochEnd(keras.callbacks.Callback):
    """Listed first, it brings another callback's values in before all other `on_epoch_end`."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._exchange.before_epoch_end(epoch)


def _made(data: Any) -> Any:
    """The data, or what it returns if it is a function without arguments."""
    return data() if callable(data) else data


def _statistics_in(model: Any) -> list[Any]:
    """All variables that hold statistics."""
    layers = statistics._normalizations(model).values()
    return [v for layer in layers for v in statistics._statistics_of(layer)]


class ReestimateStatistics(_Exchange):
    """Validates with re-estimated batch normalization statistics.

    Before validation in every n-th epoch, `keras_norm.statistics.reestimate` replaces the moving
    statistics; afterwards, training continues with its own. List the callbacks that should see the
    re-estimated ones (`ModelCheckpoint`, `EarlyStopping`) before this one, and `BackupAndRestore`
    after it; `in_order` does so.

    Args:
        data: as in `reestimate`, usually the training data; in place of a generator, which can be
            used only once, a function without arguments that makes one.
        every: int >= 1, n, in epochs. Default: 1.
        keep: whether the model ends `fit` with re-estimated statistics. Default: True.
        options: of `reestimate`.

    Attributes:
        reports: epoch -> `keras_norm.statistics.Report`; "end" for the one at the end of `fit`.

    Raises:
        ValueError: for `every` out of range; from `fit`, as `reestimate`. The model then has its
            own statistics.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> callback = ReestimateStatistics(x)
        >>> _ = model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[callback])
        >>> list(callback.reports)
        [0, 'end']
    """

    def __init__(self, data: Any, *, every: int = 1, keep: bool = True, **options: Any) -> None:
        super().__init__(every, keep)
        self.data = data
        self.options = options
        self.reports: dict[int | str, statistics.Report] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets the reports of an earlier `fit`."""
        super().on_train_begin(logs)
        self.reports = {}

    def _variables(self) -> list[Any]:
        return _statistics_in(self.model)

    def _come_in(self) -> None:
        report = self._operate(_made(self.data))
        self.reports[self._epoch if self._fitting else "end"] = report

    def _operate(self, data: Any) -> statistics.Report:
        return statistics.reestimate(self.model, data, **self.options)


class AdaptStatistics(ReestimateStatistics):
    """Validates with statistics that are adapted to another domain.

    Works as `ReestimateStatistics`, but with `keras_norm.statistics.adapt`: validation data of
    that domain then show what the model would achieve after adaptation.

    Args:
        target: as in `adapt`, or a function without arguments that makes it.
        prior: N of `adapt`, number of pseudo-examples. Default: 0.
        every: int >= 1, epochs between two adaptations. Default: 1.
        keep: whether the model ends `fit` with adapted statistics. Default: False.
        options: of `adapt`.

    Example:
        >>> AdaptStatistics(np.zeros((9, 3)), prior=16).keep
        False
    """

    def __init__(
        self,
        target: Any,
        *,
        prior: float = 0.0,
        every: int = 1,
        keep: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(target, every=every, keep=keep, **options)
        self.prior = prior

    def _operate(self, data: Any) -> statistics.Report:
        return statistics.adapt(self.model, data, prior=self.prior, **self.options)


class AverageWeights(_Exchange):
    """Validates with an average of the weights, and with statistics that belong to it.

    The average a of the trainable weights w is an exponential moving average, or the plain mean
    (stochastic weight averaging). Its updates k = 1, 2, ... are:

        "ema":  a <- d a + (1 - d) w,   d = min(decay, k / (k + 9))
        "swa":  a <- a + (w - a) / k

    Before validation the model gets the average and, if there is `data`, batch normalization
    statistics re-estimated for it, because those of the training weights belong to other
    activations. List the callbacks that should see the average (`ModelCheckpoint`,
    `EarlyStopping`) before this one, and `BackupAndRestore` after it; `in_order` does so.

    Args:
        kind: "ema" or "swa". Default: "ema".
        decay: number in (0, 1), for "ema". Default: 0.999.
        start: int >= 0, first epoch whose weights are averaged. Default: 0.
        steps: int >= 1, batches between two updates of the average, or None: one update at the end
            of each epoch. Default: None for "swa", 1 for "ema" (given as "auto"). If `fit` takes
            several batches at once (`steps_per_execution`), the weights after them count for each
            update that was due.
        data: for the statistics, as in `ReestimateStatistics`; None to average the moving
            statistics like weights. Default: None.
        every: int >= 1, epochs. Default: 1.
        keep: whether the model ends `fit` with the average. If another callback has changed the
            weights at the end of training (`EarlyStopping` restores its best), those stay.
            Default: True.
        backup: .npz file for the average, written at the end of each epoch, read when `fit` is
            resumed by `BackupAndRestore`, and removed when `fit` ends. Default: None.
        options: of `keras_norm.statistics.reestimate`.

    Raises:
        ValueError: for arguments out of range; from `fit`, if a backup is of another model, or
            with `keep` if the optimizer has `use_ema=True`.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> average = AverageWeights("swa", data=x)
        >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[average])
        >>> average.updates
        2

    Reference: Izmailov et al., 2018, Averaging Weights Leads to Wider Optima and Better
    Generalization. The warm-up of the decay is that of Polyak averages in common use.
    """

    def __init__(
        self,
        kind: str = "ema",
        *,
        decay: float = 0.999,
        start: int = 0,
        steps: int | str | None = "auto",
        data: Any = None,
        every: int = 1,
        keep: bool = True,
        backup: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(every, keep)
        if kind not in ("ema", "swa"):
            raise ValueError(f"`kind` must be 'ema' or 'swa'. Received: kind={kind!r}.")
        if not (is_real(decay) and 0 < decay < 1):
            raise ValueError(f"`decay` must be in (0, 1). Received: decay={decay!r}.")
        if not (is_integer(start) and start >= 0):
            raise ValueError(f"`start` must be an int >= 0, an epoch. Received: start={start!r}.")
        if not (steps is None or steps == "auto" or (is_integer(steps) and int(steps) >= 1)):
            raise ValueError(
                "`steps` must be an int >= 1, batches, None for once in an epoch, or 'auto'. "
                f"Received: steps={steps!r}."
            )
        self.kind, self.decay, self.start, self.steps = kind, decay, start, steps
        self.data, self.backup, self.options = data, backup, options
        self.updates = 0
        self._averages: list[Any] = []  # one for each variable that is averaged
        self._averaged: list[Any] = []
        self._batches = self._earlier = 0  # since `start`; those of them in earlier epochs
        self._left: list[npt.NDArray[Any]] | None = None  # weights when the last epoch ended
        self._updated = -1  # the last epoch that had its one update

    def _variables(self) -> list[Any]:
        if self._averaged:  # whatever is trained now
            return self._averaged
        model = self.model
        moving = model.non_trainable_variables if self.data is None else _statistics_in(model)
        inside = [layer for _, layer in statistics._inside(model)]
        switches = {id(v) for y in inside if hasattr(y, "_live") for v in y._live.variables}
        floats = [v for v in moving if keras.backend.is_float_dtype(v.dtype)]
        floats = [v for v in floats if id(v) not in switches]
        return [*model.trainable_variables, *floats]

    def _due(self, epoch: int) -> bool:
        return super()._due(epoch) and self.updates > 0

    def _come_in(self) -> None:
        for variable, average in zip(self._averaged, self._averages, strict=True):
            # A copy: a step of JAX gives its own arrays away.
            variable.assign(ops.cast(ops.copy(average.value), variable.dtype))
        if self.data is not None:
            statistics.reestimate(self.model, _made(self.data), **self.options)

    def _update(self, times: int = 1) -> None:
        """Updates the average with the present weights, `times` times."""
        synchronized(self.model)
        kept = 1.0
        for _ in range(times):
            self.updates += 1
            k = self.updates
            kept *= 1 - 1 / k if self.kind == "swa" else min(self.decay, k / (k + 9))
        if not self._averages:
            self._averaged = self._variables()
            self._averages = [_average(ops.copy(v.value), v) for v in self._averaged]
            return
        for average, variable in zip(self._averages, self._averaged, strict=True):
            distance = ops.cast(variable.value, average.dtype) - average.value
            average.assign(average.value + (1 - kept) * distance)

    def _every_batches(self) -> int | None:
        if self.steps == "auto":
            return 1 if self.kind == "ema" else None
        return None if self.steps is None else int(self.steps)

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins a new average."""
        if self.keep and _use_ema(self.model.optimizer):
            raise ValueError(
                "Only one average can be left in the model when `fit` ends, and an optimizer with "
                "`use_ema=True` leaves its own. Received: keep=True, optimizer="
                f"{self.model.optimizer!r}. Pass keep=False, or leave `use_ema` out."
            )
        super().on_train_begin(logs)
        self.updates, self._averages, self._averaged, self._left = 0, [], [], None
        self._updated, self._batches = -1, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Reads the average from the backup if `fit` is resumed in this epoch."""
        super().on_epoch_begin(epoch, logs)
        if self.backup is not None and epoch > 0 and not self._averages:
            self._load(epoch)
        self._earlier = self._batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Updates the average after every `steps` batches."""
        number = self._every_batches()
        if number is None or self._epoch < self.start:
            return
        last, self._batches = self._batches, self._earlier + batch + 1
        if times := self._batches // number - last // number:
            self._update(times)

    def on_test_begin(self, logs: Any = None) -> None:
        """Updates the average, if it is due once per epoch, and brings it in."""
        if self._fitting and not self.exchanged:
            self._update_in_epoch()
        super().on_test_begin(logs)

    def before_epoch_end(self, epoch: int) -> None:
        """Updates the average, if it is due once per epoch, and brings it in, if not yet done."""
        if self._fitting and not self.exchanged:
            self._update_in_epoch()
        super().before_epoch_end(epoch)

    def _update_in_epoch(self) -> None:
        due = self._every_batches() is None and self._epoch >= self.start
        if due and self._updated != self._epoch:
            self._updated = self._epoch
            self._update()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the training weights back and writes the backup."""
        super().on_epoch_end(epoch, logs)
        self._update_in_epoch()
        self._left = [np.array(v.numpy()) for v in self.model.trainable_variables]
        if self.backup is not None and (self._averages or self._batches):
            self._save(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        """Gives the model the average if it is to keep it."""
        self._put_back()
        now = [np.array(v.numpy()) for v in self.model.trainable_variables]
        changed = self._left is not None and not all(map(np.array_equal, now, self._left))
        keep = self.keep and self.updates > 0 and not changed
        if self.backup is not None:
            Path(self.backup).unlink(missing_ok=True)
        self._fitting = False
        if keep:
            self._bring_in_for_good()

    def _save(self, epoch: int) -> None:
        from keras_norm._files import replace_file

        arrays: Any = {f"a{i}": v.numpy() for i, v in enumerate(self._averages)}
        counts: Any = {"epoch": epoch, "updates": self.updates, "batches": self._batches}
        with replace_file(Path(self.backup or "")) as temporary, temporary.open("wb") as file:
            np.savez(file, **counts, **arrays)

    def _load(self, epoch: int) -> None:
        path = Path(self.backup or "")
        if not path.exists():
            return
        with np.load(path) as arrays:
            counts = {k: int(arrays[k]) for k in ("epoch", "updates", "batches") if k in arrays}
            averages = [arrays[f"a{i}"] for i in range(len(arrays.files) - len(counts))]
        shapes = [tuple(v.shape) for v in self._variables()]
        if averages and [v.shape for v in averages] != shapes:
            raise ValueError(
                "A backup of an average must be of the same model. Received: "
                f"backup={str(path)!r}, of other shapes. Remove it to begin anew."
            )
        if counts["epoch"] != epoch - 1:
            warnings.warn(
                f"The average in {path} was written after epoch {counts['epoch']}, but training "
                f"goes on with epoch {epoch}: a new average begins.",
                stacklevel=2,
            )
            return
        self.updates, self._batches = counts["updates"], counts.get("batches", 0)
        self._averaged = self._variables() if averages else []
        pairs = zip(averages, self._averaged, strict=True)
        self._averages = [_average(value, variable) for value, variable in pairs]


def _average(value: Any, variable: Any) -> Any:
    """A variable for the average of another; in float32 if the other has lower precision."""
    dtype = "float64" if variable.dtype == "float64" else "float32"
    return keras.Variable(ops.cast(value, dtype), dtype=dtype, trainable=False, name="average")


def _use_ema(optimizer: Any) -> bool:
    """Whether the optimizer, or one of several, keeps its own average of the weights."""
    rule = _rule(optimizer)
    return any(getattr(one, "use_ema", False) for one in getattr(rule, "optimizers", [rule]))


class Lookahead(keras.callbacks.Callback):
    """Keeps slow weights that follow the fast ones, and resets the fast ones to them.

    Let w be the weights after every `steps` batches, s the slow weights, and t of T steps done:

        (K1)  d = decay^steps (t / T)^power
        (K2)  s <- d s + (1 - d) w,    w <- s

    so that averaging sets in towards the end of training. Moving statistics are averaged too, so
    that they match the model's weights. The last update leaves the model with the slow weights.

    Args:
        total_steps: int >= 1, T, number of steps of the whole training.
        steps: int >= 1, batches between two updates. Default: 5.
        decay: number in (0, 1), per step, at the end of training. Default: 0.95.
        power: number >= 0; 0 averages from the beginning. Default: 3.

    State: `variables`, the slow weights, one `keras.Variable` for each trainable weight and each
        moving statistic, from the first step on; a `fit` that trains other weights, of the same
        model or another, starts with new ones. The optimizer counts t, in batches, including
        those whose gradients it only accumulates. Save and restore both with the model to resume
        a training exactly.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> lookahead = Lookahead(total_steps=6, steps=1)
        >>> _ = model.fit(x, y, epochs=2, batch_size=1, verbose=0, callbacks=[lookahead])
        >>> bool((lookahead.variables[0].numpy() == model.trainable_variables[0].numpy()).all())
        True

    Reference: Zhang, Lucas, Hinton and Ba, 2019, Lookahead Optimizer: k steps forward, 1 step
    back; the growing decay is that of Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds.
    """

    def __init__(
        self, total_steps: int, *, steps: int = 5, decay: float = 0.95, power: float = 3.0
    ) -> None:
        super().__init__()
        for name, value in (("total_steps", total_steps), ("steps", steps)):
            if not (is_integer(value) and value >= 1):
                raise ValueError(f"`{name}` must be an int >= 1. Received: {name}={value!r}.")
        if not (is_real(decay) and 0 < decay < 1):
            raise ValueError(f"`decay` must be in (0, 1). Received: decay={decay!r}.")
        if not (is_real(power) and power >= 0):
            raise ValueError(f"`power` must be >= 0. Received: power={power!r}.")
        self.total_steps, self.steps = total_steps, steps
        self.decay, self.power = decay, power
        self.variables: list[Any] = []

    def build(self, model: Any) -> None:
        """Creates the slow weights, equal to the model's; otherwise `fit` does so.

        Args:
            model: a built `keras.Model`.
        """
        synchronized(model)
        self._fast = _averaged_in(model)
        self.variables = [
            keras.Variable(ops.copy(v), dtype=v.dtype, trainable=False, name="slow")
            for v in self._fast
        ]

    def on_train_begin(self, logs: Any = None) -> None:
        """Creates the slow weights, unless there are some for the same weights."""
        averaged = [id(v) for v in _averaged_in(self.model)]
        if not self.variables or averaged != [id(v) for v in self._fast]:
            self.build(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes how many batches the optimizer has had."""
        synchronized(self.model)
        # `iterations` counts whole accumulations only; one may continue into this epoch.
        self._before = self._step = int(_rule(self.model.optimizer)._iterations.numpy())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Updates slow and fast weights after every `steps` batches."""
        last, self._step = self._step, self._before + batch + 1
        if last // self.steps == self._step // self.steps:
            return
        synchronized(self.model)
        t = min(1.0, self._step / self.total_steps)
        d = self.decay**self.steps * t**self.power  # (K1)
        for slow, fast in zip(self.variables, self._fast, strict=True):
            # Values: beside a variable, PyTorch's backend rounds a number to float32.
            slow.assign(d * slow.value + (1 - d) * fast.value)  # (K2)
            fast.assign(ops.copy(slow))  # a copy, because a step on JAX donates its arrays


def _averaged_in(model: Any) -> list[Any]:
    """A model's trainable variables and the moving statistics of its layers."""
    moving = [
        variable
        for _, layer in statistics._inside(model)
        if has_statistics(layer)
        for variable in statistics._statistics_of(layer)
        if keras.backend.is_float_dtype(variable.dtype)
    ]
    return [*model.trainable_variables, *moving]


def in_order(callbacks: Sequence[Any]) -> list[Any]:
    """Callbacks in the order that those which exchange weights or statistics need.

    First `keras.callbacks.SwapEMAWeights`, because statistics should be those of the weights that
    it brings in; with swap_on_epoch=True these stay until the next epoch begins, for the whole
    list. Next, for each callback that exchanges values, one that brings them in if there is no
    validation to do so. Then the callbacks that look at the model at the end of an epoch
    (checkpoints, early stopping, and all others), then `AverageWeights`, `ReestimateStatistics`
    and `AdaptStatistics`, whose statistics are then those of averaged weights. After these the
    model has its own values back, for `StatisticsMonitor` and last
    `keras.callbacks.BackupAndRestore`, which must find the training weights.

    Args:
        callbacks: Keras callbacks.

    Returns:
        A new list; callbacks of one kind keep their order.

    Raises:
        ValueError: if `SwapEMAWeights` is used with `AverageWeights`; or, with
            swap_on_epoch=False, with one of the others that exchange statistics.

    Example:
        >>> order = in_order([keras.callbacks.BackupAndRestore("/tmp/b"), AverageWeights()])
        >>> [type(callback).__name__ for callback in order]
        ['_BeforeEpochEnd', 'AverageWeights', 'BackupAndRestore']
    """
    _check_swaps(callbacks)

    def rank(callback: Any) -> int:
        if isinstance(callback, keras.callbacks.SwapEMAWeights):
            return 0
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            return 5
        if isinstance(callback, _Exchange):
            return 2 if isinstance(callback, AverageWeights) else 3
        return 4 if isinstance(callback, StatisticsMonitor) else 1

    ordered = sorted((c for c in callbacks if not isinstance(c, _BeforeEpochEnd)), key=rank)
    swaps = sum(rank(c) == 0 for c in ordered)
    before = [_BeforeEpochEnd(c) for c in ordered if isinstance(c, _Exchange)]
    return [*ordered[:swaps], *before, *ordered[swaps:]]


def _check_swaps(callbacks: Sequence[Any]) -> None:
    swaps = [c for c in callbacks if isinstance(c, keras.callbacks.SwapEMAWeights)]
    exchanges = [c for c in callbacks if isinstance(c, _Exchange)]
    if not (swaps and exchanges):
        return
    if any(isinstance(c, AverageWeights) for c in exchanges):
        raise ValueError(
            "Only one callback may exchange the weights, for two would take each other's for those "
            "of training. Received: AverageWeights and SwapEMAWeights. Leave one of them out."
        )
    if not all(c.swap_on_epoch for c in swaps):
        raise ValueError(
            "Statistics that are exchanged belong to weights that stay until the epoch ends. "
            "Received: SwapEMAWeights(swap_on_epoch=False) beside "
            f"{type(exchanges[0]).__name__}. Pass swap_on_epoch=True."
        )


class StatisticsMonitor(keras.callbacks.Callback):
    """Records, per layer and epoch, how the moving statistics compare with those of data.

    For each batch normalization layer, root mean squares over its channels, in units of sigma:

        shift   moving mean against the exact mean of the data (`statistics.reestimate`)
        scale   geometric mean of sigma of the data / moving sigma
        drift   moving mean against that of the last record, or of the start
        gamma_min, gamma_max, beta_rms    the parameters; 1 and 0 for a layer without them

    Training is not affected: the statistics are put back, bit for bit.

    Args:
        data: data to take the statistics of, as in `reestimate`; a few hundred examples are
            enough. None to record only what needs no data. Default: None.
        every: int >= 1, epochs between two records. Default: 1.
        csv: file for the record, written again as a whole after each epoch. Default: None.
        tensorboard: folder for TensorBoard events, one scalar "layer/quantity" each; needs the
            package tensorboard. Default: None.

    Attributes:
        records: list of dicts, one for each layer and epoch, with "epoch", "layer" and the above.

    Raises:
        ValueError: for `every` out of range; from `fit`, as `reestimate`.

    Example:
        >>> from keras_norm.models import MLP
        >>> model = MLP((4,), input_shape=(3,), classes=2)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> monitor = StatisticsMonitor(x)
        >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
        >>> [(r["epoch"], r["layer"]) for r in monitor.records]
        [(0, 'dense1_norm'), (1, 'dense1_norm')]
    """

    def __init__(
        self,
        data: Any = None,
        *,
        every: int = 1,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not (is_integer(every) and every >= 1):
            raise ValueError(f"`every` must be an int >= 1, epochs. Received: every={every!r}.")
        self.data, self.every, self.csv, self.tensorboard = data, every, csv, tensorboard
        self.records: list[dict[str, Any]] = []
        self._before: statistics.Snapshot | None = None
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Notes the statistics at the start of training."""
        self.records = []
        self._before = statistics.snapshot(self.model)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Records the statistics and writes the files."""
        if (epoch + 1) % self.every:
            return
        now = statistics.snapshot(self.model)
        exact = self._exact(now)
        drift = statistics.diff(self._before or now, now)
        layers = statistics._normalizations(self.model)
        new = []
        for name, layer in layers.items():
            record: dict[str, Any] = {"epoch": epoch, "layer": name}
            if exact is not None:
                part = exact[name]
                record["shift"] = rms(part.shift)
                record["scale"] = float(np.exp(np.mean(np.log(part.scale))))
            record["drift"] = rms(drift[name].shift)
            gamma, beta = (
                np.array([default]) if v is None else np.array(v.numpy(), np.float64)
                for v, default in ((layer.gamma, 1.0), (layer.beta, 0.0))
            )
            record["gamma_min"], record["gamma_max"] = float(gamma.min()), float(gamma.max())
            record["beta_rms"] = rms(beta)
            new.append(record)
        self._before = now
        self.records += new
        self._write(new, epoch)

    def on_train_end(self, logs: Any = None) -> None:
        """Closes the file of TensorBoard events."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _exact(self, now: statistics.Snapshot) -> statistics.Report | None:
        if self.data is None:
            return None
        data = _made(self.data)
        try:
            return statistics.reestimate(self.model, data)
        finally:
            statistics.restore(self.model, now)

    def _write(self, new: Sequence[Mapping[str, Any]], epoch: int) -> None:
        if self.csv is not None:
            from keras_norm._files import replace_file

            with replace_file(self.csv) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self.records[0]))
                writer.writeheader()
                writer.writerows(self.records)
        if self.tensorboard is not None:
            self._write_events(new, epoch)

    def _write_events(self, new: Sequence[Mapping[str, Any]], epoch: int) -> None:
        protos = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        files = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        if self._writer is None:
            self._writer = files.EventFileWriter(os.fspath(self.tensorboard or ""))
        values = [
            summaries.Summary.Value(tag=f"{record['layer']}/{key}", simple_value=value)
            for record in new
            for key, value in record.items()
            if key not in ("epoch", "layer")
        ]
        summary = summaries.Summary(value=values)
        self._writer.add_event(protos.Event(wall_time=time.time(), step=epoch, summary=summary))
        self._writer.flush()

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draws shift (with data), drift, and the range of gamma over the epochs.

        Args:
            path: .png, .pdf or .svg file to write, whole or not at all. Default: None, only
                return the figure.

        Returns:
            The Matplotlib figure.

        Raises:
            ValueError: if nothing has been recorded, or for another kind of file.
        """
        from keras_norm.plotting import finish, style

        if not self.records:
            raise ValueError(
                "A plot needs records. Received: records=[]. Pass the callback to `fit` first."
            )
        with style():
            return finish(self._draw(), path)

    def _draw(self) -> "Figure":
        from matplotlib.figure import Figure

        labels = {
            "shift": "moving mean against the data's (σ)",
            "drift": "moving mean, change since the last record (σ)",
            "gamma_max": "largest gamma",
        }
        panels = [key for key in labels if key in self.records[0]]
        figure = Figure(figsize=(6.4, 1.0 + 2.2 * len(panels)))
        for number, key in enumerate(panels, start=1):
            axes = figure.add_subplot(len(panels), 1, number)
            for name in dict.fromkeys(r["layer"] for r in self.records):
                rows = [r for r in self.records if r["layer"] == name]
                axes.plot([r["epoch"] for r in rows], [r[key] for r in rows], label=name)
            axes.set_ylabel(labels[key])
            axes.set_xlabel("epoch")
            if number == 1:
                axes.legend()
        return figure

"""What happens during `fit`: Keras callbacks."""

import math
import numbers
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LearningRateRangeTest", "LearningRateSuggestion"]

Floats = npt.NDArray[np.float64]


# Learning-rate range test -----------------------------------------------------------------------


class LearningRateSuggestion(NamedTuple):
    """Two learning rates read off a range test.

    `steepest`: where the loss fell fastest per factor (or per unit, on a linear scale) of the
    rate; a good constant rate. `lowest`: where the smoothed loss was lowest, the edge of
    divergence; a tenth of it is a good constant rate too, and the maximum of a cyclical schedule
    lies between the two.
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
    m > m_low + (divergence - 1) |m_low|. Then `fit` ends, and the model has the weights, the
    state of the optimizer, the random seeds and the learning rate that it had before, whatever
    the way it ends:

    - after an exception or Ctrl-C in a training step, as soon as that passes through;
    - after one elsewhere (in the data, in another callback), when the `with` block of this
      callback ends, or `restore()` is called: Keras does not tell callbacks about it.

    Args:
        minimum: number > 0, the first learning rate. Default: 1e-6.
        maximum: number > minimum, the last learning rate. Default: 10.
        steps: int >= 2, batches to train, within an epoch or over several: give `fit` enough
            epochs. Default: 100.
        scale: "exponential" or "linear". Default: "exponential".
        window: odd int from 1 to `steps`, batches in a moving mean and in a fit of the slope.
            Default: None, a tenth of `steps`, but at least 5 (if there are so many), made odd.
        divergence: number > 1, see above. Default: 4.

    Attributes:
        status: "not started", "running", "finished" (reached the maximum), "diverged", "data
            ended" (fit had fewer batches than `steps`) or "interrupted".

    Raises:
        ValueError: for a number out of its range; from `fit`, if the model is not built or its
            logs have no loss.

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

    Numerics: the loss of a batch is that batch's alone, for which the model's metrics are reset
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
        if not (_is_real(divergence) and 1 < divergence < math.inf):
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
        """Keeps the state of the model, and begins at the minimum."""
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
        """Records the loss of the batch, and ends the test where it has to end."""
        if self.status != "running":
            return
        if "loss" not in (logs or {}):
            self.restore()
            raise ValueError(
                "A learning-rate range test needs the loss of each batch. Received: logs of "
                f"{sorted(logs or {})}. Let `train_step` return 'loss'."
            )
        self._losses.append(float(logs["loss"]))
        if self._diverged():
            self._end("diverged")
        elif len(self._losses) == self.steps:
            self._end("finished")

    def on_train_end(self, logs: Any = None) -> None:
        """Puts the model back, once more after what `fit` itself did to the weights at the end."""
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
            # Already here: what comes before on_train_end must not see (or save) these weights.
            self._snapshot.put_back()
        self.model.stop_training = True

    def _sweep(self, step: Any) -> Any:
        """The learning rate as a schedule, for an optimizer that has one of its own."""
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
        """Puts weights, optimizer, seeds and learning rate back; does nothing if they are.

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
            "loss" and "smoothed_loss" (float64), the centred moving mean over `window` batches,
            over fewer at the ends.

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

        `lowest` is the rate at the lowest smoothed loss. `steepest` is the rate up to there at
        which the line fitted to the losses of `window` batches (over log rate, or over the rate
        on a linear scale) falls most.

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

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draws loss against learning rate, with the suggestion where there is one.

        Args:
            path: .png, .pdf or .svg file to write, whole or not at all. Default: None, the
                figure is returned only.

        Returns:
            The Matplotlib figure.

        Raises:
            ValueError: if no batch has been trained.
        """
        from keras_norm.experiments import replace_file
        from keras_norm.plotting import style

        if not self._losses:
            raise ValueError(
                "A plot needs the losses of a range test. Received: "
                f"status={self.status!r}. Pass the callback to `fit` first."
            )
        with style():
            figure = self._draw()
            if path is not None:
                with replace_file(path) as temporary:
                    figure.savefig(temporary)
        return figure

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
        axes.legend(title=f"range test over {len(rates)} batches, {self.status}")
        return figure


class _Snapshot:
    """State of a model before a range test, and the handle on its learning rate.

    The optimizer's rate is set by assignment where it is a variable. A schedule cannot be
    assigned to, and is traced into the training step: it is exchanged for the sweep, and the
    step traced anew. The step is wrapped to notice what interrupts it.
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
        self._rule = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
        self._variables = [*model.variables, *optimizer.variables]
        self._values = [np.array(variable.numpy()) for variable in self._variables]
        if keras.backend.backend() == "jax":
            # An average that Keras has put into the weights is one buffer in two variables, and
            # a step on JAX cannot be given that: each gets its own.
            for variable, value in zip(self._variables, self._values, strict=True):
                variable.assign(value)
        # Keras gives the rate's value to everyone, but the schedule itself to nobody.
        self._schedule = self._rule._learning_rate
        if isinstance(self._schedule, keras.Variable):
            self._schedule = None
        else:
            self._rule.learning_rate = _Sweep(sweep, int(self._rule.variables[0].numpy()))
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

    def put_back(self) -> None:
        """Assigns the values, in the middle of an epoch too."""
        if getattr(self._model, "_jax_state", None):
            # On JAX the state is in the step's hands, or lost with a step that failed; from now
            # on it is that of the variables again.
            self._model._jax_state_synced = True
            self._model.reset_metrics()
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)

    def release(self) -> None:
        """Gives the optimizer its schedule and the model its training step back."""
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
            # The end of the data comes as an exception too: Python's, or TensorFlow's.
            if not isinstance(error, StopIteration) and type(error).__name__ != "OutOfRangeError":
                restore()
            raise

    return train_function


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_range(minimum: Any, maximum: Any) -> None:
    if not (_is_real(minimum) and _is_real(maximum) and 0 < minimum < maximum < math.inf):
        raise ValueError(
            "A range test goes from a `minimum` > 0 up to a larger `maximum`. "
            f"Received: minimum={minimum!r}, maximum={maximum!r}."
        )


def _check_window(steps: Any, window: Any) -> None:
    if not (_is_int(steps) and steps >= 2):
        raise ValueError(f"`steps` must be an int >= 2. Received: steps={steps!r}.")
    if window is None:
        return
    if not (_is_int(window) and 1 <= window <= steps and window % 2 == 1):
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
    """Centred; over as many values as there are at the ends."""
    half = size // 2
    means = [values[max(0, k - half) : k + half + 1].mean() for k in range(len(values))]
    return np.array(means, "float64")


def _slope(x: Floats, y: Floats) -> float:
    """Of the least-squares line; not finite counts as rising."""
    x = x - x.mean()
    slope = float(x @ (y - y.mean()) / (x @ x))
    return slope if math.isfinite(slope) else math.inf


def _view(loss: Floats, smoothed: Floats) -> tuple[float, float]:
    """Limits that show the descent, however high the divergence went."""
    finite = loss[np.isfinite(loss)]
    if not len(finite):
        return 0.0, 1.0
    low, start = float(finite.min()), float(smoothed[np.isfinite(smoothed)][:1].sum())
    high = min(float(finite.max()), max(start, low) + (max(start, low) - low))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin

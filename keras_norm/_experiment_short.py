"""What studies of many short runs need: training on arrays, and models that are made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from keras_norm._experiment_comparison import Floats
from keras_norm._experiment_run import canonical, to_plain_settings

if TYPE_CHECKING:
    from keras_norm.experiments import Progress


def classification_metrics(logits: npt.ArrayLike, y: npt.ArrayLike) -> dict[str, float]:
    """Loss, accuracy and confidence of a classifier's logits.

    With z the logits of an example, p = softmax(z) and y its class:

        loss = mean of -log p_y    accuracy = share of argmax p = y    confidence = mean of max p

    A classifier is calibrated, on the whole, where confidence and accuracy are equal.

    Args:
        logits: (N, K), N >= 1. With logits that are not finite, the loss is NaN or infinite.
        y: (N,), class numbers in [0, K).

    Returns:
        Dict with "loss", "accuracy" and "confidence".

    Raises:
        ValueError: The shapes do not fit, or y is not of integers in [0, K).

    Example:
        >>> from keras_norm.experiments import classification_metrics
        >>> metrics = classification_metrics([[0.0, 0.0], [0.0, 50.0]], [0, 1])
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'loss': 0.347, 'accuracy': 1.0, 'confidence': 0.75}

    Numerics: float64, with the largest logit of each example taken out, so that nothing overflows.
        Of equal logits the first counts as the answer.
    """
    z, classes = np.asarray(logits, dtype=np.float64), np.asarray(y)
    if z.ndim != 2 or len(z) == 0 or classes.shape != z.shape[:1]:
        raise ValueError(
            "logits must be (N, K) and y (N,), with N >= 1. "
            f"Received: logits of shape {z.shape}, y of shape {classes.shape}."
        )
    if classes.dtype.kind not in "iub":
        raise ValueError(
            f"y must hold class numbers, integers. Received: y of type {classes.dtype}. Cast them."
        )
    if not ((classes >= 0) & (classes < z.shape[1])).all():
        raise ValueError(
            f"y must hold class numbers in [0, {z.shape[1]}). "
            f"Received: y from {classes.min()} to {classes.max()}."
        )
    with np.errstate(invalid="ignore"):
        z = z - z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))  # (N, K)
    return {
        "loss": float(-log_p[np.arange(len(z)), classes].mean()),
        "accuracy": float((z.argmax(axis=1) == classes).mean()),
        "confidence": float(np.exp(log_p.max(axis=1)).mean()),
    }


def train_on_arrays(
    model: Any,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    evaluate: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None,
    every: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Train a compiled classifier on arrays, and judge it in inference mode after an epoch.

    For studies of many short runs. `fit` reports a training accuracy that is the mean over an epoch
    in which the weights moved and dropout was on; here, as in most published tables, it is that
    of the net at the end of the epoch, in inference mode. (And an epoch of a few steps costs the
    time of its steps: `fit` adds about a tenth of a second for each.)

    Args:
        model: Compiled `keras.Model` that gives logits (N, K).
        x: Inputs (N, ...).
        y: Class numbers (N,).
        epochs: Number of epochs, at least 1.
        batch_size: Examples per step, at least 1; the last step of an epoch takes what is left.
        seed: Of the order of the examples, a new one each epoch; default 0.
        evaluate: Name -> (inputs, class numbers) to judge the model by; default none.
        every: How many epochs lie between two evaluations; the last epoch always has one.
            Default 1.
        progress: The `Progress` of a run, to show and keep the history; default none.

    Returns:
        History: "epoch", "loss" (the mean over the examples since the last evaluation, in training
        mode and with the weights of their step) and, for each name in `evaluate`, "{name}_loss"
        and "{name}_accuracy"; one value per evaluation.

    Raises:
        ValueError: The model is not compiled, a number is no integer of at least 1, or x and y do
            not fit.

    Example:
        >>> import keras, numpy as np
        >>> from keras_norm.experiments import train_on_arrays
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile(keras.optimizers.Adam(0.1), loss)
        >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
        >>> y = (x[:, 0] > 0).astype("int32")
        >>> history = train_on_arrays(
        ...     model, x, y, epochs=20, batch_size=16, evaluate={"train": (x, y)}, every=10
        ... )
        >>> history["epoch"], history["train_accuracy"][-1] > 0.9
        ([10.0, 20.0], True)

    State: a `model.stop_training` has no effect; callbacks are for `fit`.
    """
    from keras_norm._arrays import is_integer  # with it Keras is imported

    numbers = {"epochs": epochs, "batch_size": batch_size, "every": every}
    for name, number in numbers.items():
        if not (is_integer(number) and number >= 1):
            raise ValueError(
                f"{name} must be an integer of at least 1. Received: {name}={number!r}."
            )
    if not getattr(model, "compiled", False):
        raise ValueError(
            "The model must be compiled: its loss and optimizer train it. "
            f"Received: {getattr(model, 'name', model)!r}. Call model.compile(optimizer, loss)."
        )
    if len(x) != len(y) or not len(x):
        raise ValueError(
            "There must be one class number for each of x, at least one. Received: x of shape "
            f"{np.shape(x)}, y of shape {np.shape(y)}."
        )
    if not model.optimizer.built:
        from keras_norm import models

        models.make_variables(model, x, y)
    rng = np.random.default_rng(seed)
    history: dict[str, list[float]] = {}
    losses: list[float] = []  # of each example in its step
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            at = order[start : start + batch_size]
            step = model.train_on_batch(x[at], y[at], return_dict=True)
            losses += [float(step["loss"])] * len(at)
        if epoch % every == 0 or epoch == epochs:
            values = {"loss": float(np.mean(losses))}
            for name, (inputs, classes) in (evaluate or {}).items():
                metrics = classification_metrics(_logits(model, inputs), classes)
                values |= {f"{name}_{key}": metrics[key] for key in ("loss", "accuracy")}
            losses = []
            for key, value in {"epoch": float(epoch), **values}.items():
                history.setdefault(key, []).append(value)
            if progress is not None:
                progress.epoch(epoch, epochs, **values)
    return history


_AT_ONCE = 2000  # examples that are judged in one call


def _logits(model: Any, x: npt.NDArray[Any]) -> Floats:
    """What the model gives in inference mode, without compiling it for that."""
    import keras

    parts = [
        keras.ops.convert_to_numpy(model(x[start : start + _AT_ONCE], training=False))
        for start in range(0, len(x), _AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.float64)


class ModelPool:
    """Compiled models for studies of many short runs: made once per setting, fresh in every run.

    The first step of a compiled model takes a second, in which its computation is traced; with
    nets that are trained in as little, that is half of a study. The pool keeps the model of each
    setting, and brings it into the state that a new one of this seed would have: weights, seed
    generators, and an optimizer that has not seen a gradient.

    Args:
        make: `make(settings, seed)` gives a built, compiled `keras.Model`, whose structure depends
            on the settings alone. It is called for every run.

    Call arguments:
        settings: Settings of the run, JSON values.
        seed: Seed of the run.

    Returns:
        A model that gives the numbers of `make(settings, seed)`. The next call with these settings
        changes it: what is to outlast the run must be copied.

    Raises:
        ValueError: A model is not compiled; two models of the same settings differ in their
            weights' shapes.

    Example:
        >>> import keras
        >>> from keras_norm.experiments import ModelPool
        >>> def make(settings, seed):
        ...     kernel = keras.initializers.GlorotUniform(seed=seed)
        ...     layers = [keras.Input((3,)), keras.layers.Dense(2, kernel_initializer=kernel)]
        ...     model = keras.Sequential(layers)
        ...     model.compile("adam", "mse")
        ...     return model
        >>> pool = ModelPool(make)
        >>> first, again = pool({}, 0), pool({}, 1)
        >>> again is first, bool((again.get_weights()[0] == make({}, 1).get_weights()[0]).all())
        (True, True)
    """

    def __init__(self, make: Callable[[dict[str, Any], int], Any]) -> None:
        self._make = make
        self._models: dict[str, tuple[Any, list[Any]]] = {}

    def __call__(self, settings: dict[str, Any], seed: int) -> Any:
        """The model of these settings, in the state that it starts from with this seed."""
        new = self._make(settings, seed)
        key = canonical(to_plain_settings(settings, "settings"))
        from keras_norm.models import build_optimizer

        if not getattr(new, "compiled", False):
            raise ValueError(
                "`make` must give a compiled model, for its optimizer is kept with it. Received: "
                f"{getattr(new, 'name', new)!r}. Call model.compile(optimizer, loss) there."
            )
        if key not in self._models:
            build_optimizer(new)
            state = [np.array(v.numpy()) for v in new.optimizer.variables]
            self._models[key] = new, state
            return new
        model, state = self._models[key]
        model.set_weights(new.get_weights())
        for old, fresh in zip(_other_states(model), _other_states(new), strict=True):
            old.assign(fresh)
        for variable, value in zip(model.optimizer.variables, state, strict=True):
            variable.assign(value)
        return model


def _other_states(model: Any) -> list[Any]:
    """What a model's layers keep beside their weights, such as the states of seed generators."""
    known = {id(v) for v in (*model.weights, *model.metrics_variables)}
    return [v for v in model.variables if id(v) not in known]

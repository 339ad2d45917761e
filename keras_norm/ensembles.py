"""Many small nets trained at once.

A study of a small net over ten seeds spends most of its time between the steps: what the framework
does around a step can cost more than the step. Here all the nets of a study are trained as one:
S nets of the same structure, each with its own weights, examples and order of the examples. Their
layers are stacked along a new first axis,

    (E1)  Y_s = X_s W_s + b_s,                      X (S, N, D), W (S, D, U), Y (S, N, U)
    (E2)  loss = sum over s of (mean over n of cross-entropy_sn + penalties of the weights of net s)

so that the gradient with respect to the weights of a net is that of its own loss alone. An update
rule that treats each weight separately then moves every net as it would if trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm import optimizers
from keras_norm._arrays import is_integer
from keras_norm._experiment_short import classification_metrics
from keras_norm.layers import BatchNormalization, LayerNormalization
from keras_norm.models import build_optimizer

__all__ = ["EvaluateTogether", "train_together"]

Array = npt.NDArray[Any]
Tensor = Any

_NOT_CARRIED = ("_constraint", "_quantizer", "lora_rank", "virtual_batch_size")
_SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)  # over all weights

_PLAIN = (keras.layers.Activation, keras.layers.ReLU)  # the same for all nets, and without weights


_OF_WHOLE_KERNELS = (
    keras.optimizers.Adafactor,
    keras.optimizers.Lamb,
    keras.optimizers.Muon,
    optimizers.Muon,
)


def train_together(
    models: Sequence[Any],
    x: Array,
    y: Array,
    *,
    rows: Sequence[Array],
    seeds: Sequence[int],
    optimizer: Any,
    epochs: int,
    batch_size: int,
    callbacks: Sequence[Any] = (),
) -> list[float]:
    """Trains S nets of the same structure in one `fit`, each as it would be trained alone.

    Net s sees the examples `rows[s]` of the common arrays in the order that
    `datasets.Batches(x[rows[s]], y[rows[s]], batch_size, seed=seeds[s], drop_remainder=True)`
    would give it. Its loss is the cross-entropy of its logits plus the penalties of its kernels.

    Args:
        models: S >= 1 built functional or Sequential models, each a chain of `Flatten`, `Dense`,
            `Activation`, `ReLU` and `keras_norm.layers.BatchNormalization` and
            `LayerNormalization` with axis -1 that ends in logits, such as `models.MLP` without
            dropout. They share no weights, have no constraints, activity regularizers, virtual
            batches or frozen layers, and no penalties except L1 and L2. Training starts from
            their weights; at its end they hold the trained ones.
        x: (M, ...), the inputs of all examples.
        y: (M,), their classes, integers from 0 to the number of logits minus 1.
        rows: for each model an array of distinct row numbers of x and y, integers from 0, equally
            many for every model; for a mask, use `np.flatnonzero(mask)`.
        seeds: for each model the seed of its order.
        optimizer: a Keras optimizer, not used before, whose rule treats each weight separately.
            Lamb, Adafactor, Muon, and any with `clipnorm` or `global_clipnorm` do not, and are
            refused; `clipvalue` is allowed.
        epochs: int >= 1.
        batch_size: int >= 1, examples of each net in a step. Examples left over at the end of an
            epoch are dropped.
        callbacks: Keras callbacks for the common `fit`, such as `EvaluateTogether`. Default: none.

    Returns:
        For each epoch the loss (E2) divided by S: the mean over its steps and over the nets.

    Raises:
        ValueError: for an optimizer that is excluded above or was used before, models without
            weights, with shared weights or of different structures, other layers than these, layers
            with what is excluded above, a model that is not a chain, inputs of another shape than
            the models', classes beyond the logits, numbers out of their range, numbers of rows and
            seeds that do not fit. In that case nothing has changed.

    Example:
        >>> from keras_norm import datasets, models, optimizers
        >>> data = datasets.load("digits")
        >>> nets = [models.MLP((16,), input_shape=(8, 8, 1)) for _ in range(3)]
        >>> losses = train_together(
        ...     nets, data.train.x, data.train.y, rows=[range(1000)] * 3, seeds=range(3),
        ...     optimizer=optimizers.SGD(0.1), epochs=3, batch_size=100,
        ... )
        >>> len(losses), losses[-1] < losses[0]
        (3, True)

    Numerics: a net's weights are those of separate training up to float32 rounding, which training
        amplifies from step to step as it does any other difference.
    """
    optimizer = keras.optimizers.get(optimizer)
    _check_optimizer(optimizer)
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if not (is_integer(number) and number >= 1):
            raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={number!r}.")
    x, y, rows = np.asarray(x), np.asarray(y), [np.asarray(r) for r in rows]
    _check(models, x, y, rows, seeds)
    stacked = _Stacked(models, x)
    order = _Orders(y, rows, seeds, batch_size)
    stacked.require_same(models, order[0][0])
    _check_classes(y, rows, stacked.net.output_shape[-1])
    losses = _LossOfEach(len(models))
    stacked.net.compile(optimizer, _SumOfMeans(), metrics=[losses], jit_compile="auto")
    build_optimizer(stacked.net)  # see `models.make_variables`
    history = stacked.net.fit(
        order, epochs=epochs, callbacks=list(callbacks), shuffle=False, verbose=0
    ).history
    stacked.give_back(models)
    return [loss / len(models) for loss in history["loss"]]


class EvaluateTogether(keras.callbacks.Callback):  # type: ignore[misc]
    """Evaluates every net of a `train_together` in inference mode, at the end of each epoch.

    Args:
        y: (M,), the classes of all examples, as given to `train_together`.
        evaluate: dict of a name to one array of row numbers for each net, equally many, such as
            `{"val": [rows of net 1, rows of net 2]}`; integers from 0.

    State:
        history: "{name}_loss" and "{name}_accuracy" -> a list of (S,) arrays, one for each epoch;
            and "loss", the mean cross-entropy of each net over the steps of the epoch.

    Raises:
        ValueError: for other rows; when training begins, for another number of nets.

    Example:
        >>> from keras_norm import datasets, models, optimizers
        >>> data = datasets.load("digits")
        >>> nets = [models.MLP((16,), input_shape=(8, 8, 1)) for _ in range(3)]
        >>> judge = EvaluateTogether(data.train.y, {"val": [range(1000, 1400)] * 3})
        >>> losses = train_together(
        ...     nets, data.train.x, data.train.y, rows=[range(1000)] * 3, seeds=range(3),
        ...     optimizer=optimizers.SGD(0.1), epochs=2, batch_size=100, callbacks=[judge],
        ... )
        >>> [accuracy.shape for accuracy in judge.history["val_accuracy"]]
        [(3,), (3,)]
    """

    def __init__(self, y: Array, evaluate: Mapping[str, Sequence[Array]]) -> None:
        super().__init__()
        self._y = np.asarray(y)
        given = {name: np.asarray(rows) for name, rows in evaluate.items()}
        for name, rows in given.items():
            _check_rows(rows, len(self._y), name)
        self._rows = {name: rows.astype("int32") for name, rows in given.items()}
        self.history: dict[str, list[Array]] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks that there are rows for each net; forgets the history of another `fit`."""
        self.history = {}
        nets = self.model.inputs[0].shape[0]
        for name, rows in self._rows.items():
            if rows.ndim != 2 or len(rows) != nets:
                raise ValueError(
                    "`evaluate` must have an array of rows for each net, all of one length. "
                    f"Received: {name}={rows.shape} for {nets} nets."
                )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Appends to the history."""
        losses = np.reshape(ops.convert_to_numpy(logs["loss_of_each"]), -1)  # a number for one net
        self.history.setdefault("loss", []).append(losses)
        for name, rows in self._rows.items():
            parts = [  # (S, at most 2000, classes) each
                ops.convert_to_numpy(self.model(rows[:, start : start + 2000], training=False))
                for start in range(0, rows.shape[1], 2000)
            ]
            found = [
                classification_metrics(logits, self._y[at])
                for logits, at in zip(np.concatenate(parts, axis=1), rows, strict=True)
            ]
            for key in ("loss", "accuracy"):
                values = np.array([metrics[key] for metrics in found])  # (S,)
                self.history.setdefault(f"{name}_{key}", []).append(values)


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, _OF_WHOLE_KERNELS):
        raise ValueError(
            "The nets share an optimizer, so its rule must treat each weight on its own. Received: "
            f"{type(optimizer).__name__}, whose steps depend on whole kernels. Take Adam or SGD, "
            "or train the nets one by one."
        )
    for clip in ("clipnorm", "global_clipnorm"):
        if getattr(optimizer, clip, None) is not None:
            raise ValueError(
                "The nets share an optimizer, so its rule must treat each weight on its own, and "
                f"clipping by norm does not. Received: {type(optimizer).__name__} with "
                f"{clip}={getattr(optimizer, clip)}. Take `clipvalue`, or train the nets one by "
                "one."
            )
    if optimizer.built:
        raise ValueError(
            "`optimizer` must be new: what one has kept from use belongs to other weights. "
            f"Received: {type(optimizer).__name__}, used before. Make another."
        )


def _check(
    models: Sequence[Any], x: Array, y: Array, rows: Sequence[Array], seeds: Sequence[int]
) -> None:
    if not models or not len(models) == len(rows) == len(seeds):
        raise ValueError(
            "There must be at least one model, and an array of rows and a seed for each. Received: "
            f"{len(models)} models, {len(rows)} arrays of rows, {len(seeds)} seeds."
        )
    if wrong := [s for s in seeds if not is_integer(s) or s < 0]:
        raise ValueError(f"Seeds must be integers >= 0. Received: seeds with {wrong[0]!r}.")
    if wrong := [s for s, some in enumerate(rows) if some.ndim != 1]:
        raise ValueError(
            "The rows of a model must be an array of one axis. Received: "
            f"rows[{wrong[0]}] of shape {rows[wrong[0]].shape}."
        )
    if len(x) != len(y) or len({len(r) for r in rows}) != 1:
        raise ValueError(
            "There must be as many classes as inputs, and as many rows for one model as for "
            f"another. Received: {len(x)} inputs, {len(y)} classes, "
            f"{sorted({len(r) for r in rows})} rows."
        )
    for s, some in enumerate(rows):
        _check_rows(some, len(x), f"rows[{s}]")
    structures = {str([(type(w).__name__, _config(w)) for w in m.layers]) for m in models}
    if len(structures) != 1 or not models[0].weights:
        raise ValueError(
            "Models that are trained together must be built and of the same structure. Received: "
            f"{len(structures)} different structures among {len(models)} models. Make them by one "
            "function, with seeds as the only difference."
        )
    _check_own_weights(models)
    shape = getattr(models[0], "input_shape", None)
    if isinstance(shape, tuple) and None not in shape[1:] and not _fits(x.shape[1:], shape[1:]):
        raise ValueError(
            "`x` must hold inputs of the shape that the models take. Received: x of shape "
            f"{x.shape} for inputs of shape {shape}."
        )


def _check_own_weights(models: Sequence[Any]) -> None:
    owner: dict[int, int] = {}
    for s, model in enumerate(models):
        for weight in [w for layer in model.layers for w in layer.weights]:
            if id(weight) in owner:
                raise ValueError(
                    "Models that are trained together must have weights of their own, each of one "
                    f"layer. Received: {weight.path!r} in models[{owner[id(weight)]}] and again in "
                    f"models[{s}]. Call the function that makes a model once for each."
                )
            owner[id(weight)] = s


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether Keras accepts one shape for the other: a last axis of length 1 may be missing."""
    return shape == wanted or (*shape, 1) == wanted or shape == (*wanted, 1)


def _check_classes(y: Array, rows: Sequence[Array], classes: int) -> None:
    if y.ndim > 1 and y.shape[1:] != (1,):
        raise ValueError(
            "`y` must hold a class for each example, an integer. Received: y of shape "
            f"{y.shape}. Of one-hot rows take np.argmax(y, axis=1)."
        )
    found = set(np.unique(y[np.concatenate(rows)]).tolist())
    if unknown := sorted(found - set(range(classes))):
        raise ValueError(
            "`y` must hold classes from 0 to the number of logits less 1. Received: y with "
            f"{unknown[:5]} for {classes} logits."
        )


def _check_rows(rows: Array, examples: int, name: str) -> None:
    if rows.dtype.kind not in "iu":
        raise ValueError(
            f"Rows are given by their numbers, integers. Received: {name} of dtype {rows.dtype}. "
            "Of a boolean mask take np.flatnonzero(mask)."
        )
    if rows.size and not 0 <= rows.min() <= rows.max() < examples:
        raise ValueError(
            f"Rows are numbered from 0 to the number of examples less 1. Received: {name} from "
            f"{rows.min()} to {rows.max()} for {examples} examples."
        )


def _config(layer: Any) -> dict[str, Any]:
    """What two layers must have in common: all but their names and initializers."""
    config = layer.get_config()
    return {k: v for k, v in config.items() if k != "name" and not k.endswith("_initializer")}


# The nets as one -----------------------------------------------------------------------------


class _Look(keras.layers.Layer):  # type: ignore[misc]
    """Row numbers (S, N) -> inputs (S, N, D), from a table kept on the device."""

    def __init__(self, x: Array) -> None:
        super().__init__()
        self.table = ops.convert_to_tensor(x.reshape(len(x), -1))

    def call(self, rows: Tensor) -> Tensor:
        return ops.cast(ops.take(self.table, rows, axis=0), self.compute_dtype)


class _StackedDense(keras.layers.Layer):  # type: ignore[misc]
    """(E1), with the activation of the layer that it replaces."""

    def __init__(self, like: Any) -> None:
        super().__init__(name=like.name, dtype=like.dtype_policy)
        self.like = _config(like)

    def build(self, input_shape: Sequence[int]) -> None:
        nets, _, width = input_shape
        like, penalty = self.like, keras.regularizers.get
        self.kernel = self.add_weight(
            name="kernel",
            shape=(nets, width, like["units"]),
            regularizer=penalty(like["kernel_regularizer"]),
        )
        if like["use_bias"]:
            self.bias = self.add_weight(
                name="bias",
                shape=(nets, like["units"]),
                regularizer=penalty(like["bias_regularizer"]),
            )

    def call(self, x: Tensor) -> Tensor:
        y = ops.matmul(x, self.kernel)  # (S, N, D) @ (S, D, U) -> (S, N, U)
        if self.like["use_bias"]:
            y = y + self.bias[:, None]
        return keras.activations.get(self.like["activation"])(y)


class _StackedLayerNormalization(keras.layers.Layer):  # type: ignore[misc]
    """Layer normalization of rows (S, N, U), with a gamma and a beta for each net."""

    def __init__(self, like: LayerNormalization) -> None:
        super().__init__(name=like.name, dtype=like.dtype_policy)
        self.like = like.get_config()
        self.norm = LayerNormalization.from_config({**self.like, "center": False, "scale": False})

    def build(self, input_shape: Sequence[int]) -> None:
        nets, _, width = input_shape
        for name, present in (("gamma", "scale"), ("beta", "center")):
            if self.like[present]:
                regularizer = keras.regularizers.get(self.like[f"{name}_regularizer"])
                weight = self.add_weight(name=name, shape=(nets, width), regularizer=regularizer)
                setattr(self, name, weight)

    def call(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.like["scale"]:
            y = y * self.gamma[:, None]  # (S, N, U) * (S, 1, U)
        return y + self.beta[:, None] if self.like["center"] else y


def _check_plain(layer: Any) -> None:
    """Refuses a layer that would not act on all nets as it does on one."""
    config = layer.get_config()
    used = [n for n, v in config.items() if v is not None and n.endswith(_NOT_CARRIED)]
    if not all(sub.trainable for sub in layer._flatten_layers()):
        used.append("trainable=False")
    if layer.activity_regularizer is not None:
        used.append("activity_regularizer")
    regularizers = [v for n, v in config.items() if n.endswith("_regularizer") and v is not None]
    if any(type(keras.regularizers.get(r)) not in _SUMS for r in regularizers):
        used.append("a regularizer other than L1, L2 and L1L2")
    if used:
        raise ValueError(
            "Models that are trained together may have no constraints, no activity regularizers, "
            "no virtual batches, no frozen layers, and no penalties but L1 and L2. Received: layer "
            f"{layer.name!r} with {used[0]}. Train such models one by one."
        )


def _stacked(layer: Any) -> Any:
    """The layer that does for all nets what this one does for a single net."""
    _check_plain(layer)
    if type(layer) is keras.layers.Dense:
        return _StackedDense(layer)
    if type(layer) is BatchNormalization and layer.axis == -1:
        return type(layer).from_config({**layer.get_config(), "axis": (0, 2)})
    if type(layer) is LayerNormalization and layer.axis in (-1, [-1]) and not layer.rms_scaling:
        return _StackedLayerNormalization(layer)
    if type(layer) in _PLAIN:
        return type(layer).from_config(layer.get_config())
    raise ValueError(
        "Models that are trained together may consist of Flatten, Dense, Activation, ReLU, and "
        "keras_norm.layers.BatchNormalization and LayerNormalization with axis -1. Received: layer "
        f"{layer.name!r} of type {type(layer).__name__}. Train such models one by one."
    )


class _Stacked:
    """All the nets as one: `net` maps row numbers (S, N) to logits (S, N, classes)."""

    def __init__(self, models: Sequence[Any], x: Array) -> None:
        self._x = x
        skipped = (keras.layers.InputLayer, keras.layers.Flatten)
        self._places = [i for i, y in enumerate(models[0].layers) if not isinstance(y, skipped)]
        rows = keras.Input((None,), batch_size=len(models), dtype="int32")
        values, self._layers = _Look(x)(rows), []
        for i in self._places:
            layer = _stacked(models[0].layers[i])
            self._layers.append(layer)
            values = layer(values)
        self.net = keras.Model(rows, values)
        for variable, sources in self._pairs(models):
            value = np.stack([ops.convert_to_numpy(source) for source in sources])
            variable.assign(value if value.shape == tuple(variable.shape) else value[0])

    def _pairs(self, models: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
        """Each variable of the common net with those that it replaces."""
        pairs = []
        for i, layer in zip(self._places, self._layers, strict=True):
            weights = [model.layers[i].weights for model in models]
            pairs += list(zip(layer.weights, map(list, zip(*weights, strict=True)), strict=True))
        return pairs

    def require_same(self, models: Sequence[Any], rows: Array) -> None:
        """Refuses models that are not a chain, by comparing outputs."""
        together = ops.convert_to_numpy(self.net(rows, training=False))
        for model, own_rows, logits in zip(models, rows, together, strict=True):
            alone = ops.convert_to_numpy(model(self._x[own_rows], training=False))
            size = max(1.0, np.abs(alone).max())  # the scale of rounding errors
            if alone.shape != logits.shape or not np.allclose(alone, logits, 1e-3, 1e-4 * size):
                raise ValueError(
                    "Models that are trained together must be a chain of layers, one after the "
                    f"other in their order. Received: model {model.name!r}, whose outputs differ "
                    "from those of its layers as a chain. Train such models one by one."
                )

    def give_back(self, models: Sequence[Any]) -> None:
        """Writes the trained weights back into the models."""
        for variable, targets in self._pairs(models):
            values = ops.convert_to_numpy(variable)
            per_net = values.shape != tuple(targets[0].shape)
            for s, target in enumerate(targets):
                target.assign(values[s] if per_net else values)


# Their data, loss and metric -----------------------------------------------------------------


class _Orders(keras.utils.PyDataset):  # type: ignore[misc]
    """Row numbers (S, N) and classes (S, N), batch by batch, in a new order each epoch."""

    def __init__(
        self, y: Array, rows: Sequence[Array], seeds: Sequence[int], batch_size: int
    ) -> None:
        super().__init__()
        self._y, self._rows, self._seeds, self._size = y, rows, seeds, batch_size
        if not 1 <= batch_size <= len(rows[0]):
            raise ValueError(
                "`batch_size` must be an integer from 1 to the number of rows. Received: "
                f"batch_size={batch_size!r} for {len(rows[0])} rows."
            )
        self._epoch = 0
        self._shuffle()

    def __len__(self) -> int:
        return len(self._rows[0]) // self._size

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        at = self._order[:, index * self._size : (index + 1) * self._size]  # (S, N)
        return at, self._y[at]

    def on_epoch_end(self) -> None:
        self._epoch += 1
        self._shuffle()

    def _shuffle(self) -> None:
        orders = [
            rows[np.random.default_rng([seed, 0, self._epoch]).permutation(len(rows))]
            for rows, seed in zip(self._rows, self._seeds, strict=True)
        ]
        self._order = np.stack(orders).astype("int32")


class _LossOfEach(keras.metrics.Metric):  # type: ignore[misc]
    """(S,), the cross-entropy of each net: the mean over the steps so far, in training mode."""

    def __init__(self, nets: int) -> None:
        super().__init__(name="loss_of_each")
        self.total = self.add_weight(name="total", shape=(nets,), initializer="zeros")
        self.steps = self.add_weight(name="steps", shape=(), initializer="zeros")

    def update_state(self, y: Tensor, logits: Tensor, sample_weight: None = None) -> None:
        self.total.assign(self.total + _cross_entropies(y, logits))
        self.steps.assign(self.steps + 1)

    def result(self) -> Tensor:
        return self.total / ops.maximum(self.steps, 1)


def _cross_entropies(y: Tensor, logits: Tensor) -> Tensor:
    """(S, N) and (S, N, classes) -> (S,), the means over the examples of a net."""
    return ops.mean(ops.sparse_categorical_crossentropy(y, logits, from_logits=True), axis=1)


class _SumOfMeans(keras.losses.Loss):  # type: ignore[misc]
    """(E2) without the penalties: the mean over the examples of a net, summed over the nets."""

    def __init__(self) -> None:
        super().__init__(reduction="sum")

    def call(self, y: Tensor, logits: Tensor) -> Tensor:
        return _cross_entropies(y, logits)

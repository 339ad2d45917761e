"""What all layers with moving statistics have in common: switches, variables, configuration."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_norm._arrays import in_dtype, is_real
from keras_norm._state import LiveNumbers

__all__ = [
    "MovingStatistics",
    "check_dtype",
    "check_fraction",
    "check_switch",
    "parameter_config",
    "set_parameter_options",
    "weights_of",
]

Array = Any


def check_dtype(layer: keras.layers.Layer) -> None:
    """Refuses a dtype that is not floating: normalization divides."""
    for what, dtype in (("compute", layer.compute_dtype), ("variable", layer.variable_dtype)):
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(
                f"{type(layer).__name__} divides by a standard deviation, so its {what} dtype "
                f"must be a floating one. Received: dtype={dtype!r}. Use 'float32', 'float64', "
                "'mixed_float16' or 'mixed_bfloat16'."
            )


def check_fraction(name: str, value: float) -> None:
    """Refuses a number that cannot be a momentum."""
    if not (is_real(value) and 0 <= value <= 1):
        raise ValueError(
            f"`{name}` is the weight of the old value in a moving average and must be a number in "
            f"[0, 1]. Received: {name}={value!r}. Keras's default is 0.99; PyTorch's 0.1 is "
            "the weight of the new value, 0.9 here."
        )


def check_switch(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a value that is not one of those allowed for a switch."""
    if not any(value is a for a in allowed):
        raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}.")


def weights_of(mask: Array | None, sample_weight: Array | None, x: Array) -> Array | None:
    """Mask and weights as one array of the rank of x that broadcasts against it."""
    if mask is not None:
        mask = ops.cast(_aligned("mask", mask, x), "bool")
    if sample_weight is None:
        return mask
    weights = _aligned("sample_weight", sample_weight, x)
    return weights if mask is None else ops.where(mask, weights, ops.zeros_like(weights))


def _aligned(name: str, weights: Array, x: Array) -> Array:
    """Weights with the rank of x, by axes of size 1 appended at the end."""
    weights = ops.convert_to_tensor(weights)
    shape = [*ops.shape(weights), *[1] * (len(x.shape) - len(weights.shape))]
    fits = len(shape) == len(x.shape) and all(
        not isinstance(n, int) or n == 1 or size is None or n == size
        for n, size in zip(shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must broadcast to the inputs, with axes of size 1 or of theirs; if it has "
            f"fewer axes, they are the first of the inputs'. Received: {name}.shape="
            f"{tuple(weights.shape)}, inputs.shape={tuple(x.shape)}. Add axes of size 1."
        )
    return ops.reshape(weights, shape)


def set_parameter_options(
    layer: keras.layers.Layer,
    *,
    beta_initializer: Any,
    gamma_initializer: Any,
    beta_regularizer: Any,
    gamma_regularizer: Any,
    beta_constraint: Any,
    gamma_constraint: Any,
) -> None:
    """Initializers, regularizers and constraints of gamma and beta as attributes of the layer."""
    layer.beta_initializer = initializers.get(beta_initializer)
    layer.gamma_initializer = initializers.get(gamma_initializer)
    layer.beta_regularizer = regularizers.get(beta_regularizer)
    layer.gamma_regularizer = regularizers.get(gamma_regularizer)
    layer.beta_constraint = constraints.get(beta_constraint)
    layer.gamma_constraint = constraints.get(gamma_constraint)


def parameter_config(layer: keras.layers.Layer) -> dict[str, Any]:
    """The options of `set_parameter_options`, serialized."""
    config: dict[str, Any] = {}
    for name in ("beta", "gamma"):
        for kind, library in (
            ("initializer", initializers),
            ("regularizer", regularizers),
            ("constraint", constraints),
        ):
            config[f"{name}_{kind}"] = library.serialize(getattr(layer, f"{name}_{kind}"))
    return config


class MovingStatistics(keras.layers.Layer):
    """A layer with moving statistics, whose momentum and updates may be changed at any time.

    A subclass sets `moving_count` to None and `_live` to `LiveNumbers` with at least momentum,
    rest and update before it assigns `momentum`, then `update_statistics`; in `build` it creates
    the variables, and calls `_build_switches`. (The two have no value before they are assigned:
    under TensorFlow, assigning what a property already returns never reaches its setter.)
    """

    moving_count: Any
    debiased: bool
    _live: LiveNumbers
    _momentum: float | None
    _update_statistics: bool

    @property
    def momentum(self) -> float | None:
        """Weight of the old value in the moving statistics; None for the average of all."""
        self._refresh()
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        if value is not None:
            check_fraction("momentum", value)
        elif self.built and self.moving_count is None:
            raise ValueError(
                "The average over all batches needs their count from the beginning. Received: "
                "momentum=None for a layer that was built without. Pass momentum=None, or "
                "debiased=True, to the constructor."
            )
        self._refresh()
        self._set_averages(value, getattr(self, "_update_statistics", True))
        self._momentum = value
        if self.moving_count is not None and value is not None:
            self.debiased = True  # it continues from its present average

    def _set_averages(self, momentum: float | None, updates: bool) -> None:
        """Without updates, the weight of the old value is 1 and of the new one 0."""
        number = float(momentum) if updates and momentum is not None else 1.0
        self._live.update(momentum=number, rest=1 - number, update=float(updates))

    @property
    def update_statistics(self) -> bool:
        """Whether the moving statistics move in training (while the layer is trainable)."""
        self._refresh()
        return self._update_statistics

    @update_statistics.setter
    def update_statistics(self, value: bool) -> None:
        check_switch("update_statistics", value, (True, False))
        self._refresh()
        self._set_averages(self._momentum, value)
        self._update_statistics = value

    def _refresh(self) -> None:
        """Takes over the switches from a restored state."""
        if self._live.refresh():
            self._take_over()

    def _take_over(self) -> None:
        self._update_statistics = self._live["update"] > 0.5
        if self._update_statistics and self._momentum is not None:
            self._momentum = self._live["momentum"]

    @property
    def skipped_batches(self) -> int:
        """Number of batches that left the moving statistics unchanged: not finite, or no weight."""
        return self._live.counted

    @property
    def variables(self) -> list[Any]:
        """The weights, and the state from which compiled functions read the switches."""
        return [*super().variables, *self._live.variables]

    def _track_variables(self) -> None:
        """For PyTorch: a layer's parameters are its weights, which the live numbers are not."""
        super()._track_variables()
        for variable in self._live.variables:
            self._torch_params.pop(variable.path)

    def _build_switches(self) -> None:
        self._live.build(self._statistics_dtype)
        self._let_tensorflow_save(self._live.variables)

    def _let_tensorflow_save(self, variables: Iterable[Any]) -> None:
        """Makes them attributes, for SavedModels; as Keras variables they would be weights."""
        if hasattr(self, "_track_trackable"):
            for variable in variables:
                if variable._value is not None:
                    setattr(self, f"_{variable.name}", variable._value)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        """For TensorFlow: a SavedModel contains the switches, a checkpoint does not."""
        children = super()._trackable_children(save_type, **kwargs)
        if save_type != "checkpoint":
            return children
        live = {f"_{variable.name}" for variable in self._live.variables}
        return {name: child for name, child in children.items() if name not in live}

    @property
    def _statistics_dtype(self) -> str:
        return "float64" if self.variable_dtype == "float64" else "float32"

    def _add_parameter(self, name: str, shape: Sequence[int | None]) -> Any:
        # autocast=False: under a mixed policy the float32 values themselves are used.
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            trainable=True,
            autocast=False,
        )

    def _add_statistic(self, name: str, shape: Sequence[int | None], initializer: Any) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            dtype=self._statistics_dtype,
            initializer=initializer,
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",  # equal on all replicas, after merging
        )

    def _assign(self, variable: Any, value: Array, moves: Any) -> None:
        """Assigns the value where `moves` is true."""
        value = in_dtype(value, variable.dtype)
        variable.assign(ops.where(moves, value, ops.convert_to_tensor(variable)))

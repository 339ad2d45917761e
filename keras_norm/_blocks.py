"""The block of which every model in `keras_norm.models` is a stack, and its normalization.

    linear -> normalization -> activation -> dropout     (placement="before", the default)
    linear -> activation -> normalization -> dropout     (placement="after")

where linear is a convolution or a dense layer.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras

from keras_norm._arrays import is_integer, is_real
from keras_norm.layers import (
    BatchNormalization,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    RMSNormalization,
    SpatialBatchNormalization,
)
from keras_norm.research import (
    DecorrelatedBatchNormalization,
    FilterResponseNormalization,
    QuantileNormalization,
)

__all__ = [
    "NORMALIZATIONS",
    "Blocks",
    "Normalization",
    "Normalizations",
    "checked_classes",
    "checked_input_shape",
    "checked_widths",
    "factory_of",
    "logits_dtype",
    "made",
    "made_for_channels_last",
    "make_normalization",
    "takes",
]

Normalization = str | None | Callable[..., keras.layers.Layer]
Normalizations = Normalization | Sequence[Normalization] | Mapping[str, Normalization]

NORMALIZATIONS: dict[str, Callable[..., keras.layers.Layer]] = {
    "batch": BatchNormalization,
    "decorrelated": DecorrelatedBatchNormalization,
    "filter_response": FilterResponseNormalization,  # after convolutions only, with its threshold
    "group": functools.partial(GroupNormalization, groups=None),  # gcd(32, channels) groups
    "instance": InstanceNormalization,  # after convolutions only
    "layer": LayerNormalization,
    "quantile": QuantileNormalization,
    "rms": RMSNormalization,
    "spatial": SpatialBatchNormalization,  # after convolutions only
}
"""The names that `normalization=` understands, beside classes and factories."""


def logits_dtype() -> str | None:
    """The dtype of a model's last layer: float32 if the policy computes in half precision.

    The loss takes differences of logits, of which bfloat16 would keep only two digits.
    """
    half = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    return "float32" if half else None


def make_normalization(normalization: Normalization, name: str) -> keras.layers.Layer | None:
    """One fresh normalization layer.

    Args:
        normalization: a name of `NORMALIZATIONS`; a layer class; a factory, such as
            `functools.partial(BatchNormalization, momentum=0.9)`, called with `name=name` if it
            accepts that, else without arguments; or None for no layer.
        name: the layer's name.

    Returns:
        A new `keras.layers.Layer`, or None.

    Raises:
        ValueError: for an unknown name, or a factory that does not return a layer. A layer
            instance is refused too: its weights would be shared between positions.

    Example:
        >>> make_normalization("batch", name="norm").name
        'norm'
    """
    factory = factory_of(normalization)
    return None if factory is None else made(factory, name, {})


def factory_of(normalization: Normalization) -> Callable[..., keras.layers.Layer] | None:
    if normalization is None:
        return None
    if isinstance(normalization, str):
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"A normalization's name must be one of {sorted(NORMALIZATIONS)}. Received: "
                f"normalization={normalization!r}. A layer class, a factory or None will do too."
            )
        normalization = NORMALIZATIONS[normalization]
    if isinstance(normalization, keras.layers.Layer) or not callable(normalization):
        raise ValueError(
            "`normalization` must be a name, a layer class, a factory or None: every position "
            f"gets a layer of its own. Received: normalization={normalization!r}. Pass the "
            "class, or functools.partial(class, ...) with its arguments."
        )
    return normalization


def made(
    factory: Callable[..., keras.layers.Layer], name: str, options: Mapping[str, Any]
) -> keras.layers.Layer:
    named = {"name": name} if takes("name", factory, or_any=True) else {}
    layer = factory(**named, **options)
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            "A normalization factory must return a Keras layer. Received: "
            f"{factory!r} returned {layer!r}."
        )
    return layer


def made_for_channels_last(normalization: Normalization, name: str) -> keras.layers.Layer | None:
    """As `make_normalization`, for a model with channels last, whatever Keras's default is."""
    factory = factory_of(normalization)
    options = {"data_format": "channels_last"} if factory is SpatialBatchNormalization else {}
    return None if factory is None else made(factory, name, options)


def takes(argument: str, factory: Callable[..., Any], *, or_any: bool) -> bool:
    """Whether the factory has a keyword argument of this name, or (`or_any`) accepts any."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == argument or (or_any and p.kind is p.VAR_KEYWORD) for p in parameters)


def _per_position(
    normalization: Normalizations, positions: Sequence[str]
) -> dict[str, Normalization]:
    """The normalization of every position, from any of the forms it can be given in."""
    if isinstance(normalization, Mapping):
        unknown = sorted(set(normalization) - set(positions))
        if unknown:
            raise ValueError(
                f"`normalization` as a mapping may name the positions {list(positions)}. "
                f"Received: unknown positions {unknown}. What is not named gets none."
            )
        return {p: normalization.get(p) for p in positions}
    if isinstance(normalization, Sequence) and not isinstance(normalization, str):
        if len(normalization) != len(positions):
            raise ValueError(
                f"`normalization` as a list must have one entry for each of {list(positions)}. "
                f"Received: {len(normalization)} entries, {normalization!r}. Use None for a "
                "position without normalization."
            )
        return dict(zip(positions, normalization, strict=True))
    return dict.fromkeys(positions, normalization)


class Blocks(NamedTuple):
    """What the blocks of one model have in common."""

    normalization: dict[str, Normalization]
    activation: Any
    placement: str
    dropout: float
    options: dict[str, Any]  # of every linear layer: bias, initializer, regularizer

    @classmethod
    def of(
        cls,
        normalization: Normalizations,
        positions: Sequence[str],
        *,
        activation: Any,
        placement: str,
        dropout: float = 0.0,
        **options: Any,
    ) -> "Blocks":
        if placement not in ("before", "after"):
            raise ValueError(
                "`placement` says where the normalization stands, 'before' or 'after' the "
                f"activation. Received: placement={placement!r}."
            )
        if not (is_real(dropout) and 0 <= dropout < 1):
            raise ValueError(
                "`dropout` is the fraction of activations set to zero and must lie in [0, 1). "
                f"Received: dropout={dropout!r}. (A keep probability p is dropout=1-p.)"
            )
        return cls(_per_position(normalization, positions), activation, placement, dropout, options)

    def dense(self, x: Any, name: str, units: int) -> Any:
        return self._finish(keras.layers.Dense(units, name=name, **self.options)(x), name)

    def conv(self, x: Any, name: str, filters: int, size: int, **options: Any) -> Any:
        options |= {"name": name, "data_format": "channels_last"}  # whatever Keras's default is
        layer = keras.layers.Conv2D(filters, size, **self.options, **options)
        return self._finish(layer(x), name)

    def _finish(self, x: Any, name: str) -> Any:
        norm = made_for_channels_last(self.normalization[name], f"{name}_norm")
        activation = keras.layers.Activation(self.activation, name=f"{name}_activation")
        steps = [norm, activation] if self.placement == "before" else [activation, norm]
        if self.dropout:
            steps.append(keras.layers.Dropout(self.dropout, name=f"{name}_dropout"))
        for step in steps:
            x = x if step is None else step(x)
        return x


def checked_widths(argument: str, widths: Any, what: str) -> tuple[int, ...]:
    listed = isinstance(widths, Sequence) and not isinstance(widths, str)
    if not listed or not all(is_integer(n) and n >= 1 for n in widths):
        raise ValueError(
            f"`{argument}` must list {what}, ints >= 1. Received: {argument}={widths!r}."
        )
    return tuple(int(n) for n in widths)  # Keras's layers refuse NumPy's integers


def checked_classes(classes: Any) -> int:
    if not (is_integer(classes) and classes >= 1):
        raise ValueError(
            "`classes` is the number of outputs and must be an integer >= 1. "
            f"Received: classes={classes!r}."
        )
    return int(classes)


def checked_input_shape(input_shape: Any) -> tuple[int, ...]:
    if not isinstance(input_shape, Iterable) or isinstance(input_shape, str):
        raise ValueError(
            "`input_shape` must be the shape of one example, such as (28, 28, 1) or (20,). "
            f"Received: input_shape={input_shape!r}."
        )
    return tuple(input_shape)

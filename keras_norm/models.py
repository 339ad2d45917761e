"""Models with one `normalization=` argument everywhere.

Every net is a stack of the same block,

    linear -> normalization -> activation -> dropout     (placement="before", the default)
    linear -> activation -> normalization -> dropout     (placement="after")

where linear is a convolution or a dense layer. Models are functional Keras models with named
layers ("conv1", "conv1_norm", "conv1_activation", ...) that end in logits.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_norm._surgery import FoldReport, fold_batch_normalization, inner_layers, rebuild
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
    "MLP",
    "NORMALIZATIONS",
    "FoldReport",
    "LeNet",
    "fold_batch_normalization",
    "make_normalization",
    "restart",
    "swap_normalization",
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


def make_normalization(normalization: Normalization, name: str) -> keras.layers.Layer | None:
    """One fresh normalization layer.

    Args:
        normalization: a name of `NORMALIZATIONS`; a layer class; a factory, called with
            `name=name` if it takes that and with nothing otherwise
            (`functools.partial(BatchNormalization, momentum=0.9)`); or None for no layer.
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
    factory = _factory(normalization)
    return None if factory is None else _made(factory, name, {})


def _factory(normalization: Normalization) -> Callable[..., keras.layers.Layer] | None:
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


def _made(
    factory: Callable[..., keras.layers.Layer], name: str, options: Mapping[str, Any]
) -> keras.layers.Layer:
    named = {"name": name} if _takes("name", factory, or_any=True) else {}
    layer = factory(**named, **options)
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            "A normalization factory must return a Keras layer. Received: "
            f"{factory!r} returned {layer!r}."
        )
    return layer


def _takes(argument: str, factory: Callable[..., Any], *, or_any: bool) -> bool:
    """Whether the factory has a keyword argument of this name, or takes any keyword at all."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == argument or (or_any and p.kind is p.VAR_KEYWORD) for p in parameters)


def _per_position(
    normalization: Normalizations, positions: Sequence[str]
) -> dict[str, Normalization]:
    """The normalization of every position, whichever way it was given."""
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


class _Blocks(NamedTuple):
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
    ) -> "_Blocks":
        if placement not in ("before", "after"):
            raise ValueError(
                "`placement` says where the normalization stands, 'before' or 'after' the "
                f"activation. Received: placement={placement!r}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(
                "`dropout` is the fraction of activations set to zero and must lie in [0, 1). "
                f"Received: dropout={dropout!r}. (A keep probability p is dropout=1-p.)"
            )
        return cls(_per_position(normalization, positions), activation, placement, dropout, options)

    def dense(self, x: Any, name: str, units: int) -> Any:
        return self._finish(keras.layers.Dense(units, name=name, **self.options)(x), name)

    def conv(self, x: Any, name: str, filters: int, size: int, **options: Any) -> Any:
        layer = keras.layers.Conv2D(filters, size, name=name, **self.options, **options)
        return self._finish(layer(x), name)

    def _finish(self, x: Any, name: str) -> Any:
        norm = make_normalization(self.normalization[name], f"{name}_norm")
        activation = keras.layers.Activation(self.activation, name=f"{name}_activation")
        steps = [norm, activation] if self.placement == "before" else [activation, norm]
        if self.dropout:
            steps.append(keras.layers.Dropout(self.dropout, name=f"{name}_dropout"))
        for step in steps:
            x = x if step is None else step(x)
        return x


def _check_classes(classes: int) -> None:
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(
            "`classes` is the number of outputs and must be an integer >= 1. "
            f"Received: classes={classes!r}."
        )


def LeNet(  # noqa: N802
    normalization: Normalizations = "batch",
    *,
    activation: Any = "sigmoid",
    placement: str = "before",
    padding: str = "valid",
    dropout: float = 0.0,
    use_bias: bool = True,
    kernel_initializer: Any = "glorot_uniform",
    input_shape: Sequence[int] = (28, 28, 1),
    classes: int = 10,
    name: str = "lenet",
) -> keras.Model:
    """LeNet-5 as it is taught today: two convolutions, three dense layers.

        conv 5x5x6 -> average pool 2 -> conv 5x5x16 -> average pool 2 -> dense 120 -> dense 84
        -> dense (classes)

    Normalization and activation follow each of the first four, "conv1", "conv2", "dense1" and
    "dense2". The first has padding 2 in the classic net (`padding="same"`), and none in the
    variant with batch normalization of the book (the default).

    Args:
        normalization: "batch", None, a layer class or a factory, for all positions; or a list of
            four, or a mapping such as `{"conv1": "batch"}`. Default: "batch".
        activation: any Keras activation. Default: "sigmoid".
        placement: "before" or "after" the activation. Default: "before".
        padding: of the first convolution, "valid" or "same". Default: "valid".
        dropout: fraction of activations set to zero after each block, in [0, 1). Default: 0.
        use_bias: whether the four layers before a normalization have a bias (the last layer
            always has one). Default: True.
        kernel_initializer: Keras initializer. Default: "glorot_uniform".
        input_shape: (H, W, C), without the batch; at least 16 x 16 with valid padding. Default:
            (28, 28, 1).
        classes: number of outputs. Default: 10.
        name: of the model. Default: "lenet".

    Returns:
        A functional `keras.Model` from (N, H, W, C) to logits (N, classes).

    Raises:
        ValueError: for an unknown normalization or placement, images that are too small, and
            every other argument out of its range.

    Example:
        >>> model = LeNet("batch", activation="relu")
        >>> model.count_params(), model.output_shape
        (45330, (None, 10))

    Reference:
        LeCun, Bottou, Bengio and Haffner, 1998, Gradient-based learning applied to document
        recognition; in this form Zhang, Lipton, Li and Smola, Dive into Deep Learning, chapters
        on LeNet and batch normalization.
    """
    _check_classes(classes)
    shape = tuple(input_shape)
    least = {"valid": 16, "same": 12}.get(padding)
    if least is None:
        raise ValueError(f"`padding` must be 'valid' or 'same'. Received: padding={padding!r}.")
    if len(shape) != 3 or min(shape[:2]) < least:
        raise ValueError(
            f"LeNet with padding={padding!r} needs images (H, W, C) of at least {least} x {least}. "
            f"Received: input_shape={shape}. Resize the images first."
        )
    blocks = _Blocks.of(
        normalization,
        ("conv1", "conv2", "dense1", "dense2"),
        activation=activation,
        placement=placement,
        dropout=dropout,
        use_bias=use_bias,
        kernel_initializer=kernel_initializer,
    )
    inputs = keras.Input(shape, name="images")
    x = blocks.conv(inputs, "conv1", 6, 5, padding=padding)  # -> (N, 24, 24, 6)
    x = keras.layers.AveragePooling2D(2, name="pool1")(x)  # -> (N, 12, 12, 6)
    x = blocks.conv(x, "conv2", 16, 5)  # -> (N, 8, 8, 16)
    x = keras.layers.AveragePooling2D(2, name="pool2")(x)  # -> (N, 4, 4, 16)
    x = keras.layers.Flatten(name="flatten")(x)  # -> (N, 256)
    x = blocks.dense(x, "dense1", 120)
    x = blocks.dense(x, "dense2", 84)
    logits = keras.layers.Dense(classes, kernel_initializer=kernel_initializer, name="logits")(x)
    return keras.Model(inputs, logits, name=name)


def MLP(  # noqa: N802
    hidden: Sequence[int] = (50, 50),
    normalization: Normalizations = "batch",
    *,
    activation: Any = "relu",
    placement: str = "before",
    dropout: float = 0.0,
    use_bias: bool = True,
    kernel_initializer: Any = "he_normal",
    kernel_regularizer: Any = None,
    input_shape: Sequence[int] = (32, 32, 3),
    classes: int = 10,
    name: str = "mlp",
) -> keras.Model:
    """A multilayer perceptron: dense blocks "dense1", "dense2", ..., then logits.

    Args:
        hidden: widths of the hidden layers, each >= 1. Default: (50, 50).
        normalization: as in `LeNet`, one position for each hidden layer. Default: "batch".
        activation: any Keras activation. Default: "relu".
        placement: "before" or "after" the activation. Default: "before".
        dropout: fraction of activations set to zero after each block, in [0, 1). Default: 0.
        use_bias: whether the hidden layers have a bias. Default: True.
        kernel_initializer: Keras initializer of every kernel; for a given standard deviation
            `keras.initializers.RandomNormal(stddev=...)`. Default: "he_normal".
        kernel_regularizer: Keras regularizer of every kernel. (Keras's L2(l) adds l sum w^2 to
            the loss.) Default: none.
        input_shape: shape of one example; flattened. Default: (32, 32, 3).
        classes: number of outputs. Default: 10.
        name: of the model. Default: "mlp".

    Returns:
        A functional `keras.Model` from (N, *input_shape) to logits (N, classes).

    Raises:
        ValueError: for widths below 1 and every other argument out of its range.

    Example:
        >>> MLP((50, 30), normalization=None, input_shape=(20,)).count_params()
        2890
    """
    _check_classes(classes)
    if any(not isinstance(units, int) or units < 1 for units in hidden):
        raise ValueError(
            f"`hidden` must list the widths of the hidden layers, integers >= 1. Received: "
            f"hidden={hidden!r}."
        )
    kernel = {
        "kernel_initializer": kernel_initializer,
        "kernel_regularizer": kernel_regularizer,
    }
    blocks = _Blocks.of(
        normalization,
        [f"dense{i}" for i in range(1, len(hidden) + 1)],
        activation=activation,
        placement=placement,
        dropout=dropout,
        use_bias=use_bias,
        **kernel,
    )
    inputs = keras.Input(tuple(input_shape), name="inputs")
    x = keras.layers.Flatten(name="flatten")(inputs)  # (N, H, W, C) -> (N, H W C)
    for i, units in enumerate(hidden, start=1):
        x = blocks.dense(x, f"dense{i}", units)
    logits = keras.layers.Dense(classes, name="logits", **kernel)(x)
    return keras.Model(inputs, logits, name=name)


# Another normalization in a model that exists -------------------------------------------------

_SWAPPED = (
    BatchNormalization,
    DecorrelatedBatchNormalization,
    FilterResponseNormalization,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    QuantileNormalization,
    RMSNormalization,
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)
_OF_SEVERAL_AXES = (
    BatchNormalization,
    LayerNormalization,
    RMSNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


def swap_normalization(model: keras.Model, to: Normalization) -> keras.Model:
    """A copy of a model with another normalization in every place where it has one.

    Every batch, layer, RMS, group, instance, decorrelated, quantile and filter-response
    normalization, of this package or of `keras.layers`, gives way to a new layer of the same
    name, axis, dtype policy and `trainable`. All other layers keep their weights; the new layers
    take over what fits by name and shape: gamma (called scale in RMS normalization), beta, and
    between batch normalizations the moving statistics.

    Args:
        model: functional or Sequential, built, such as the models of this module; models within
            it are rebuilt likewise.
        to: as `normalization` in `make_normalization`: a name of `NORMALIZATIONS`, a layer
            class, a factory, or None to leave the normalization out.

    Returns:
        A new model of the same class and name; compiled like the original, with a fresh
        optimizer, if that was compiled. The original is left as it is, to the last bit.

    Raises:
        ValueError: for a subclassed or unbuilt model, one without normalization, a normalization
            that is inside of another layer, an axis that the new kind cannot have, and what
            `make_normalization` refuses.

    Example:
        >>> model = LeNet("batch", activation="relu")
        >>> swapped = swap_normalization(model, "group")
        >>> swapped.get_layer("conv1_norm").__class__.__name__, len(swapped.layers)
        ('GroupNormalization', 17)
        >>> len(swap_normalization(model, None).layers)
        13

    Numerics:
        A channel axis is carried over: after `BatchNormalization(axis=1)` comes
        `GroupNormalization(axis=1)`, or `LayerNormalization(axis=1)`, which normalizes over the
        channels of each position alone. A factory that sets its own axis or dtype keeps them.
    """
    factory = _factory(to)
    found = [(y, parent) for y, parent in inner_layers(model) if isinstance(y, _SWAPPED)]
    if not found:
        raise ValueError(
            "The model must have normalization layers. Received: "
            f"model={getattr(model, 'name', model)!r} without any. Build it with a "
            "`normalization=` argument first."
        )
    for layer, parent in found:
        if not isinstance(parent, keras.Model):
            raise ValueError(
                "Only what is a layer of a functional or Sequential model can be swapped. "
                f"Received: {layer.name!r} inside of {type(parent).__name__} {parent.name!r}. "
                "Construct that layer with another normalization."
            )
    replacements = {id(y): functools.partial(_instead_of, y, factory) for y, _ in found}
    new, pairs = rebuild(model, replacements)
    for old, made in pairs:
        _carry_over(old, made)
    return new


def _instead_of(
    old: keras.layers.Layer, factory: Callable[..., keras.layers.Layer] | None
) -> keras.layers.Layer | None:
    if factory is None:
        return None
    new = _made(factory, old.name, _options_like(old, factory))
    new.trainable = old.trainable
    return new


def _options_like(old: keras.layers.Layer, factory: Callable[..., Any]) -> dict[str, Any]:
    """The arguments by which a layer of this kind normalizes along the axis of the old one."""
    kind, given = factory, {}
    if isinstance(factory, functools.partial):
        kind, given = factory.func, factory.keywords
    if not inspect.isclass(kind):
        return {}
    options: dict[str, Any] = {}
    if _takes("dtype", kind, or_any=True):
        options["dtype"] = old.dtype_policy
    several = isinstance(old.axis, tuple | list) and len(old.axis) != 1
    if several and not issubclass(kind, _OF_SEVERAL_AXES):
        raise ValueError(
            "A normalization over several axes does not say which of them are channels. "
            f"Received: axis={old.axis} of {old.name!r}, to become {kind.__name__}. Pass "
            f"functools.partial({kind.__name__}, axis=...)."
        )
    axis = old.axis if several or isinstance(old.axis, int) else old.axis[0]
    if issubclass(kind, SpatialBatchNormalization):
        options["data_format"] = "channels_first" if axis == 1 else "channels_last"
    elif _takes("axis", kind, or_any=False):
        options["axis"] = axis
    return {name: value for name, value in options.items() if name not in given}


_SAME = {"gamma": "scale", "scale": "gamma"}


def _carry_over(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    values = {v.name: v for v in old.weights}
    for variable in new.weights:
        source = values.get(variable.name, values.get(_SAME.get(variable.name, "")))
        if source is not None and tuple(source.shape) == tuple(variable.shape):
            variable.assign(ops.convert_to_numpy(source))


# A model that exists, from the beginning again -------------------------------------------------


def restart(model: keras.Model, seed: int, learning_rate: float | None = None) -> None:
    """Puts a compiled model back to where training begins, without compiling it again.

    A search trains the same net many times, and compiling can take longer than training. This
    draws new weights by the initializers of the layers, and sets moving statistics, seed
    generators and the state of the optimizer to what they are in a new model. The functions that
    `fit` has compiled stay.

    Args:
        model: functional or Sequential, compiled; changed in place.
        seed: given to `keras.utils.set_random_seed` before the weights are drawn.
        learning_rate: number >= 0, the new rate. Default: None, the rate that the optimizer has.

    Returns:
        None.

    Raises:
        ValueError: for a model without an optimizer, or a subclassed one.
        TypeError: from Keras, for a new rate where a schedule sets the rate. Nothing has changed
            then.

    Example:
        >>> import numpy as np
        >>> model = MLP([4], None, input_shape=(3,), classes=2)
        >>> model.compile("adam", "mse")
        >>> restart(model, seed=0, learning_rate=0.5)
        >>> x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
        >>> first = model.fit(x, y, verbose=0).history["loss"]
        >>> restart(model, seed=0)
        >>> first == model.fit(x, y, verbose=0).history["loss"]
        True
        >>> int(model.optimizer.iterations), float(model.optimizer.learning_rate)
        (1, 0.5)

    Numerics: equal seeds give equal weights to the last bit. An initializer with a seed of its
    own draws the same weights each time.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            "`restart` is for compiled models. Received: "
            f"model={getattr(model, 'name', model)!r} without an optimizer. Call `compile` first."
        )
    if learning_rate is not None:
        optimizer.learning_rate = learning_rate
    keras.utils.set_random_seed(seed)
    twin = keras.models.clone_model(model)
    optimizer.build(model.trainable_variables)
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(model.trainable_variables)
    pairs = [
        *zip(_layer_variables(model), _layer_variables(twin), strict=True),
        *zip(optimizer.variables, fresh.variables, strict=True),
    ]
    for variable, initial in pairs:
        variable.assign(initial)


def _layer_variables(model: keras.Model) -> list[Any]:
    """All variables of the layers, also those of seed generators; none of metrics."""
    return [variable for layer in model.layers for variable in layer.variables]

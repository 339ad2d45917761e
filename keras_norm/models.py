"""Models with one `normalization=` argument everywhere.

Every net is a stack of the same block,

    linear -> normalization -> activation -> dropout     (placement="before", the default)
    linear -> activation -> normalization -> dropout     (placement="after")

where linear is a convolution or a dense layer. Models are functional Keras models with named
layers ("conv1", "conv1_norm", "conv1_activation", ...) that end in logits.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_norm import functional
from keras_norm._arrays import is_integer, is_real
from keras_norm._blocks import (
    NORMALIZATIONS,
    Blocks,
    Normalization,
    Normalizations,
    checked_classes,
    checked_input_shape,
    checked_widths,
    factory_of,
    logits_dtype,
    made,
    make_normalization,
    takes,
)
from keras_norm._convolution import FastConv2D
from keras_norm._fast_convnet import (
    FAST_NORMALIZATION,
    FastConvNet,
    IdentityConvolution,
    TestTimeAugmentation,
    WhiteningConv2D,
    fit_whitening,
)
from keras_norm._surgery import (
    FoldReport,
    clone,
    copied_whole,
    fold_batch_normalization,
    fresh,
    inner_layers,
    paired_variables,
    rebuild,
    same,
)
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
    "CNN",
    "FAST_NORMALIZATION",
    "MLP",
    "NORMALIZATIONS",
    "ConvNet",
    "FastConv2D",
    "FastConvNet",
    "FoldReport",
    "IdentityConvolution",
    "LeNet",
    "TestTimeAugmentation",
    "TwoLayerNet",
    "WhiteningConv2D",
    "WideMLP",
    "fit_whitening",
    "fold_batch_normalization",
    "make_normalization",
    "make_variables",
    "restart",
    "swap_normalization",
]

# Images of this module's models are (N, H, W, C), whatever `keras.config.image_data_format()` says.
_LAST = {"data_format": "channels_last"}


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
    "dense2". "conv1" has padding 2 in the classic net (`padding="same"`), and none in the book's
    variant with batch normalization (the default).

    Args:
        normalization: "batch", None, a layer class or a factory, for all positions; or a list of
            four of these, or a mapping such as `{"conv1": "batch"}`. Default: "batch".
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
        ValueError: for an unknown normalization or placement, images that are too small, and any
            other argument out of its range.

    Example:
        >>> model = LeNet("batch", activation="relu")
        >>> model.count_params(), model.output_shape
        (45330, (None, 10))

    Reference:
        LeCun, Bottou, Bengio and Haffner, 1998, Gradient-based learning applied to document
        recognition; in this form in Zhang, Lipton, Li and Smola, Dive into Deep Learning,
        chapters on LeNet and batch normalization.
    """
    classes = checked_classes(classes)
    shape = checked_input_shape(input_shape)
    least = {"valid": 16, "same": 12}.get(padding)
    if least is None:
        raise ValueError(f"`padding` must be 'valid' or 'same'. Received: padding={padding!r}.")
    if len(shape) != 3 or None in shape or min(shape[:2]) < least:
        raise ValueError(
            f"LeNet with padding={padding!r} needs images (H, W, C) of at least {least} x {least}. "
            f"Received: input_shape={shape}. Resize the images first."
        )
    blocks = Blocks.of(
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
    x = keras.layers.AveragePooling2D(2, name="pool1", **_LAST)(x)  # -> (N, 12, 12, 6)
    x = blocks.conv(x, "conv2", 16, 5)  # -> (N, 8, 8, 16)
    x = keras.layers.AveragePooling2D(2, name="pool2", **_LAST)(x)  # -> (N, 4, 4, 16)
    x = keras.layers.Flatten(name="flatten", **_LAST)(x)  # -> (N, 256)
    x = blocks.dense(x, "dense1", 120)
    x = blocks.dense(x, "dense2", 84)
    logits = keras.layers.Dense(
        classes, kernel_initializer=kernel_initializer, dtype=logits_dtype(), name="logits"
    )(x)
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
        kernel_initializer: Keras initializer of every kernel; for a given standard deviation, use
            `keras.initializers.RandomNormal(stddev=...)`. Default: "he_normal".
        kernel_regularizer: Keras regularizer of every kernel. (Keras's L2(l) adds l sum w^2 to
            the loss.) Default: none.
        input_shape: shape of one example; flattened. Default: (32, 32, 3).
        classes: number of outputs. Default: 10.
        name: of the model. Default: "mlp".

    Returns:
        A functional `keras.Model` from (N, *input_shape) to logits (N, classes).

    Raises:
        ValueError: for widths below 1 and any other argument out of its range.

    Example:
        >>> MLP((50, 30), normalization=None, input_shape=(20,)).count_params()
        2890
    """
    classes = checked_classes(classes)
    hidden = checked_widths("hidden", hidden, "the widths of the hidden layers")
    kernel = {
        "kernel_initializer": kernel_initializer,
        "kernel_regularizer": kernel_regularizer,
    }
    blocks = Blocks.of(
        normalization,
        [f"dense{i}" for i in range(1, len(hidden) + 1)],
        activation=activation,
        placement=placement,
        dropout=dropout,
        use_bias=use_bias,
        **kernel,
    )
    inputs = keras.Input(checked_input_shape(input_shape), name="inputs")
    x = keras.layers.Flatten(name="flatten", **_LAST)(inputs)  # (N, H, W, C) -> (N, H W C)
    for i, units in enumerate(hidden, start=1):
        x = blocks.dense(x, f"dense{i}", units)
    logits = keras.layers.Dense(classes, dtype=logits_dtype(), name="logits", **kernel)(x)
    return keras.Model(inputs, logits, name=name)


_POOLING = {
    "average_pool": keras.layers.AveragePooling2D,
    "max_pool": keras.layers.MaxPooling2D,
}


def CNN(  # noqa: N802
    widths: Sequence[int] = (32, 64, 128),
    normalization: Normalizations = "batch",
    *,
    blocks: int = 1,
    kernel_size: int | Sequence[int] = 3,
    downsample: str = "max_pool",
    residual: bool = False,
    head: str = "average",
    dense: Sequence[int] = (),
    activation: Any = "relu",
    placement: str = "before",
    dropout: float = 0.0,
    use_bias: bool = True,
    kernel_initializer: Any = "he_normal",
    kernel_regularizer: Any = None,
    input_shape: Sequence[int | None] = (32, 32, 3),
    classes: int = 10,
    name: str = "cnn",
) -> keras.Model:
    """A convolutional net in stages, each with half the resolution of the one before.

        stage 1 ... S:  `blocks` convolutions (same padding), the resolution halved at the end
        head            -> dense blocks -> logits

    Convolutions are named "conv1_1" (stage, block), dense blocks "dense1"; each of them is
    followed by normalization and activation.

    Args:
        widths: channels of each stage, ints >= 1. Default: (32, 64, 128).
        normalization: as in `LeNet`, for all positions, a list in their order, or a mapping.
            Default: "batch".
        blocks: convolutions in a stage, int >= 1. Default: 1.
        kernel_size: side of the kernels, int >= 1, or one for each stage. Default: 3.
        downsample: how a stage halves its resolution: "max_pool", "average_pool", "stride" (of
            its last convolution), or "none" (not at all). Default: "max_pool".
        residual: whether the input of a stage is added to its output before pooling (through a
            1x1 convolution "skip1", ... if the numbers of channels differ; with "stride" it
            halves the resolution, too). Default: False.
        head: "average" or "max" over all positions, or "flatten". Default: "average".
        dense: widths of hidden dense layers after the head. Default: none.
        activation, placement, use_bias, kernel_initializer: as in `LeNet`. Defaults: "relu",
            "before", True, "he_normal".
        dropout: after each block, as in `LeNet`. Default: 0.
        kernel_regularizer: Keras regularizer of every kernel. Default: none.
        input_shape: (H, W, C); H and W may be None, for images of several sizes, unless the head
            is "flatten". Default: (32, 32, 3).
        classes: number of outputs. Default: 10.
        name: of the model. Default: "cnn".

    Returns:
        A functional `keras.Model` from (N, H, W, C) to logits (N, classes).

    Raises:
        ValueError: for images too small to be halved in every stage, and any other argument out
            of its range.

    Example:
        >>> CNN((8, 16), residual=True, input_shape=(8, 8, 1)).count_params()
        1674
    """
    classes = checked_classes(classes)
    shape = checked_input_shape(input_shape)
    widths = checked_widths("widths", widths, "the channels of each stage")
    dense = checked_widths("dense", dense, "the widths of hidden layers")
    if not (is_integer(kernel_size) or isinstance(kernel_size, Sequence)):
        raise ValueError(
            "`kernel_size` must be an int, or one for each stage. "
            f"Received: kernel_size={kernel_size!r}."
        )
    of_stages = kernel_size if isinstance(kernel_size, Sequence) else [kernel_size] * len(widths)
    _check_stages(widths, of_stages, blocks, downsample, head, shape)
    sizes = [int(size) for size in of_stages]
    kernel = {
        "kernel_initializer": kernel_initializer,
        "kernel_regularizer": kernel_regularizer,
    }
    convolutions = [f"conv{s}_{b}" for s in range(1, len(widths) + 1) for b in range(1, blocks + 1)]
    stack = Blocks.of(
        normalization,
        [*convolutions, *(f"dense{i}" for i in range(1, len(dense) + 1))],
        activation=activation,
        placement=placement,
        dropout=dropout,
        use_bias=use_bias,
        **kernel,
    )
    x = inputs = keras.Input(shape, name="images")
    for stage, (width, size) in enumerate(zip(widths, sizes, strict=True), start=1):
        before, stride = x, 2 if downsample == "stride" else 1
        for block in range(1, blocks + 1):
            strides = stride if block == blocks else 1
            x = stack.conv(x, f"conv{stage}_{block}", width, size, padding="same", strides=strides)
        if residual:
            if stride > 1 or before.shape[-1] != width:
                skip = keras.layers.Conv2D(
                    width, 1, strides=stride, name=f"skip{stage}", **_LAST, **kernel
                )
                before = skip(before)
            x = keras.layers.Add(name=f"add{stage}")([before, x])
        if downsample in _POOLING:
            x = _POOLING[downsample](2, name=f"pool{stage}", **_LAST)(x)
    x = _HEADS[head](name="head", **_LAST)(x)
    for i, units in enumerate(dense, start=1):
        x = stack.dense(x, f"dense{i}", units)
    logits = keras.layers.Dense(classes, dtype=logits_dtype(), name="logits", **kernel)(x)
    return keras.Model(inputs, logits, name=name)


_HEADS = {
    "average": keras.layers.GlobalAveragePooling2D,
    "flatten": keras.layers.Flatten,
    "max": keras.layers.GlobalMaxPooling2D,
}


def _check_stages(
    widths: Sequence[int],
    sizes: Sequence[int],
    blocks: int,
    downsample: str,
    head: str,
    shape: tuple[int | None, ...],
) -> None:
    counts = {"widths": widths, "kernel_size": sizes, "blocks": [blocks]}
    for name, values in counts.items():
        if not values or any(not is_integer(v) or v < 1 for v in values):
            raise ValueError(f"`{name}` must be made of ints >= 1. Received: {name}={values!r}.")
    if len(sizes) != len(widths):
        raise ValueError(
            "`kernel_size` must be one int, or one for each stage. "
            f"Received: kernel_size={sizes!r} for widths={widths!r}."
        )
    for name, value, known in (
        ("downsample", downsample, [*_POOLING, "stride", "none"]),
        ("head", head, list(_HEADS)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}.")
    least = 1 if downsample == "none" else 2 ** len(widths)
    if len(shape) == 3 and (shape[2] is None or (head == "flatten" and None in shape)):
        raise ValueError(
            "The number of channels must be known, and for head='flatten' all sizes. Received: "
            f"input_shape={shape}, head={head!r}. Take head='average' for images of several sizes."
        )
    if len(shape) != 3 or min(side or least for side in shape[:2]) < least:
        raise ValueError(
            f"{len(widths)} stages with downsample={downsample!r} need images (H, W, C) of at "
            f"least {least} x {least}. Received: input_shape={shape}. Take fewer stages, or larger "
            "images."
        )


def ConvNet(  # noqa: N802
    normalization: Normalizations = None,
    *,
    name: str = "convnet",
    **options: Any,
) -> keras.Model:
    """The three-layer net of a course: conv 5x5x32 -> conv 3x3x16 -> dense, without pooling.

    Args:
        normalization: as in `LeNet`, after both convolutions. Default: None, as published.
        name: of the model. Default: "convnet".
        options: passed on to `CNN`, which makes the net: activation, dropout, input_shape, ...

    Returns:
        A functional `keras.Model` from (N, H, W, C) to logits (N, classes).

    Raises:
        ValueError: as `CNN`.

    Example:
        >>> ConvNet().count_params()
        170906

    Reference: CV7062610, assignment 3, three ways to write a model.
    """
    net: dict[str, Any] = {"kernel_size": (5, 3), "downsample": "none", "head": "flatten"}
    return CNN((32, 16), normalization, name=name, **{**net, **options})


def TwoLayerNet(  # noqa: N802
    normalization: Normalizations = None,
    *,
    hidden: int = 4000,
    name: str = "two_layer_net",
    **options: Any,
) -> keras.Model:
    """The two-layer net of a course: dense 4000 -> ReLU -> dense.

    Args:
        normalization: as in `LeNet`, of the hidden layer. Default: None, as published.
        hidden: width of the hidden layer, int >= 1. Default: 4000.
        name: of the model. Default: "two_layer_net".
        options: passed on to `MLP`, which makes the net: activation, dropout, input_shape, ...

    Returns:
        A functional `keras.Model` from (N, H, W, C) to logits (N, classes).

    Raises:
        ValueError: as `MLP`.

    Example:
        >>> TwoLayerNet().count_params()
        12332010

    Reference: CV7062610, assignment 3, three ways to write a model.
    """
    return MLP((hidden,), normalization, name=name, **options)


def WideMLP(  # noqa: N802
    normalization: Normalizations = "layer",
    *,
    dropout: float = 0.5,
    name: str = "wide_mlp",
    **options: Any,
) -> keras.Model:
    """The best multilayer perceptron of a course: 1024-512-256, layer normalization, dropout.

    Args:
        normalization: as in `LeNet`, of the three hidden layers. Default: "layer", as published.
        dropout: after each block, in [0, 1). Default: .5, as published.
        name: of the model. Default: "wide_mlp".
        options: passed on to `MLP`, which makes the net: activation, input_shape, ...

    Returns:
        A functional `keras.Model` from (N, H, W, C) to logits (N, classes).

    Raises:
        ValueError: as `MLP`.

    Example:
        >>> WideMLP().count_params()
        3809034

    Reference: CV7062610, assignment 3, best MLP.
    """
    return MLP((1024, 512, 256), normalization, dropout=dropout, name=name, **options)


# Another normalization in an existing model ---------------------------------------------------

_FAMILIES: tuple[tuple[Any, ...], ...] = (
    (BatchNormalization, keras.layers.BatchNormalization),
    (GroupNormalization, InstanceNormalization, keras.layers.GroupNormalization),
    (LayerNormalization, keras.layers.LayerNormalization),
    (RMSNormalization, keras.layers.RMSNormalization),
    (DecorrelatedBatchNormalization,),
    (FilterResponseNormalization,),
    (QuantileNormalization,),
)
_SWAPPED = tuple(kind for family in _FAMILIES for kind in family)
_OF_SEVERAL_AXES = (
    BatchNormalization,
    LayerNormalization,
    RMSNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


def swap_normalization(model: keras.Model, to: Normalization) -> keras.Model:
    """A copy of a model in which another normalization replaces each of its own.

    Every batch, layer, RMS, group, instance, decorrelated, quantile and filter-response
    normalization, of this package or of `keras.layers`, is replaced by a new layer with the same
    name, axis, dtype policy and `trainable`. All other layers keep their weights; the new layers
    take over the weights that match by name and shape: gamma (called scale in RMS normalization),
    beta, and, between batch normalizations, the moving statistics.

    Between two layers of one family (batch and spatial; group and instance; layer; RMS; each of
    the others; ours or Keras's), the new layer also gets those arguments of the old one that it
    accepts, such as epsilon, momentum, center, scale, regularizers and groups, and gives the
    same numbers in inference. Between families, it has its own defaults.

    Args:
        model: functional or Sequential, built, such as the models of this module; models nested
            in it are rebuilt likewise.
        to: as `normalization` in `make_normalization`: a name of `NORMALIZATIONS`, a layer
            class, a factory, or None to leave the normalization out. Arguments of a
            functools.partial override those of the old layer; a function gets none of these.

    Returns:
        A new model of the same class and name; compiled like the original, with a fresh
        optimizer, if that was compiled (for a class with its own `compile`, only if it has
        `get_compile_config` and `compile_from_config`). The original is unchanged, to the last
        bit.

    Raises:
        ValueError: for a subclassed or unbuilt model, one without normalization, a normalization
            inside another layer, an axis that the new kind cannot have, a model class whose
            get_config() lacks arguments of its constructor, a `Lambda` in a layer that cannot be
            recreated, an optimizer or metric that cannot be, and what `make_normalization`
            refuses.

    Example:
        >>> model = LeNet("batch", activation="relu")
        >>> swapped = swap_normalization(model, "group")
        >>> swapped.get_layer("conv1_norm").__class__.__name__, len(swapped.layers)
        ('GroupNormalization', 17)
        >>> len(swap_normalization(model, None).layers)
        13

    Numerics:
        The channel axis is kept: `BatchNormalization(axis=1)` becomes
        `GroupNormalization(axis=1)`, or `LayerNormalization(axis=1)`, which normalizes over the
        channels of each position alone. A factory that sets its own axis or dtype keeps them.
    """
    factory = factory_of(to)
    found = [y for y, _ in inner_layers(model) if isinstance(y, _SWAPPED)]
    if not found:
        raise ValueError(
            "The model must have normalization layers. Received: "
            f"model={getattr(model, 'name', model)!r} without any. Build it with a "
            "`normalization=` argument first."
        )
    outer = copied_whole(model)
    for layer in found:
        if parent := outer.get(id(layer)):
            raise ValueError(
                "Only what is a layer of a functional or Sequential model can be swapped. "
                f"Received: {layer.name!r} inside of {type(parent).__name__} {parent.name!r}. "
                "Construct that layer with another normalization."
            )
    replacements = {id(y): functools.partial(_instead_of, y, factory) for y in found}
    new, pairs = rebuild(model, replacements)
    for old, new_layer in pairs:
        _carry_over(old, new_layer)
    return new


def _instead_of(
    old: keras.layers.Layer, factory: Callable[..., keras.layers.Layer] | None
) -> keras.layers.Layer | None:
    if factory is None:
        return None
    new = made(factory, old.name, _options_like(old, factory))
    new.trainable = old.trainable
    return new


def _options_like(old: keras.layers.Layer, factory: Callable[..., Any]) -> dict[str, Any]:
    """The arguments with which a layer of this kind normalizes like the old one, on its axis."""
    kind = factory.func if isinstance(factory, functools.partial) else factory
    if not inspect.isclass(kind):
        return {}
    options = _of_the_family(old, kind)
    if takes("dtype", kind, or_any=True):
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
        options["data_format"] = _data_format(old, axis)
    elif takes("axis", kind, or_any=False):
        options["axis"] = axis
    given = _given(factory)
    return {name: value for name, value in options.items() if name not in given}


def _given(factory: Callable[..., Any]) -> set[str]:
    """The arguments that are set in a functools.partial of the user."""
    if not isinstance(factory, functools.partial) or factory in NORMALIZATIONS.values():
        return set()
    by_position = list(inspect.signature(factory.func).parameters)[: len(factory.args)]
    return {*by_position, *factory.keywords}


def _of_the_family(old: keras.layers.Layer, kind: type) -> dict[str, Any]:
    """The arguments of the old layer that a layer of its family accepts."""
    family = next(family for family in _FAMILIES if isinstance(old, family))
    if not issubclass(kind, family):
        return {}
    config, names = old.get_config(), _arguments(kind)
    if config.get("rms_scaling") and takes("rms_scaling", kind, or_any=True):
        names.add("rms_scaling")  # Keras's layer does not name it
    # The attributes, because a config may not restore the user's own objects.
    options = {name: getattr(old, name, config[name]) for name in names & config.keys()}
    if issubclass(kind, keras.layers.BatchNormalization):
        if options.get("momentum", 0) is None:
            del options["momentum"]  # the average of all batches, which Keras does not have
        if keras.backend.backend() != "tensorflow":
            options.pop("synchronized", None)  # Keras refuses it
    if issubclass(kind, keras.layers.GroupNormalization) and options.get("groups", 1) is None:
        ((_, channels),) = old.input_spec.axes.items()
        options["groups"] = functional.number_of_groups(None, channels)
    return options


def _arguments(kind: type) -> set[str]:
    """The arguments of its constructor, including those that ours pass on, and of any layer."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            names |= inspect.signature(base.__init__).parameters.keys()  # type: ignore[misc]
            if not base.__module__.startswith("keras_norm."):
                break
    of_any_layer = inspect.signature(keras.layers.Layer.__init__).parameters.keys()
    return names - of_any_layer - {"axis", "data_format"}


def _data_format(old: keras.layers.Layer, axis: int) -> str:
    rank = len(old.get_build_config()["input_shape"])
    if axis % rank not in (1, rank - 1):
        raise ValueError(
            "Spatial normalization is for channels on axis 1 or the last. Received: "
            f"axis={axis} of {old.name!r}, for inputs of {rank} dimensions. Pass 'batch' instead."
        )
    return "channels_last" if axis % rank == rank - 1 else "channels_first"


_SAME = {"gamma": "scale", "scale": "gamma"}


def _carry_over(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    values = {v.name: v for v in old.weights}
    for variable in new.weights:
        source = values.get(variable.name, values.get(_SAME.get(variable.name, "")))
        if source is not None and tuple(source.shape) == tuple(variable.shape):
            variable.assign(ops.convert_to_numpy(source))


# An existing model, back at the start ----------------------------------------------------------


def restart(model: keras.Model, seed: int, learning_rate: float | None = None) -> None:
    """Resets a compiled model to the start of training, without compiling it again.

    A search trains the same net many times, and compiling can take longer than training. This
    draws new weights by the initializers of the layers, and resets moving statistics, seed
    generators and the state of the optimizer to those of a new model. What a layer has measured
    by its method `adapt` belongs to the data and is kept; so are the functions that `fit` has
    compiled.

    Args:
        model: functional or Sequential, compiled; changed in place.
        seed: given to `keras.utils.set_random_seed` before the weights are drawn.
        learning_rate: number >= 0, the new rate. Default: None, the optimizer's present rate.

    Returns:
        None.

    Raises:
        ValueError: for a model without an optimizer, a subclassed model, a rate that is not a
            number >= 0, and layers or an optimizer that cannot be recreated from their
            configuration.
        TypeError: for a new rate if a schedule or a function sets the rate.
        In either case, the model is unchanged.

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

    Numerics: equal seeds give equal weights to the last bit. An initializer with its own seed
    draws the same weights each time.
    """
    optimizer = _optimizer_of(model, "restart")
    if not isinstance(model, keras.Sequential) and not hasattr(model, "_nodes_by_depth"):
        raise ValueError(
            "`restart` is for functional and Sequential models, whose layers can be made again "
            f"from their configuration. Received: {type(model).__name__} {model.name!r}. Make a "
            "new model instead."
        )
    if learning_rate is not None:
        if not (is_real(learning_rate) and learning_rate >= 0):
            raise ValueError(
                "`learning_rate` must be a number >= 0, or None for the rate that the optimizer "
                f"has. Received: learning_rate={learning_rate!r}."
            )
        rate = getattr(optimizer, "inner_optimizer", optimizer)._learning_rate
        if callable(rate):
            raise TypeError(
                "A new rate is for optimizers that have a number, not a LearningRateSchedule or "
                f"a function. Received: learning_rate={learning_rate!r}, where {rate!r} sets it. "
                "Compile with a number, or pass None."
            )
    keras.utils.set_random_seed(seed)
    twin, new = clone(model, clone_function=same), fresh(optimizer)
    pairs = list(_paired_layers(model, twin))
    build_optimizer(model)
    new.build(model.trainable_variables)
    pairs += zip(optimizer.variables, new.variables, strict=True)
    measured = _measured(model)
    for variable, initial in pairs:
        if id(variable) not in measured:
            variable.assign(initial)
    if learning_rate is not None:
        optimizer.learning_rate = learning_rate


def make_variables(model: keras.Model, x: Any, y: Any) -> None:
    """Makes the variables of the optimizer and metrics now, not while `fit` traces (TensorFlow).

    TensorFlow traces a training step a second time if the first trace has made variables. Called
    after `compile`, this saves the second trace; on other backends it does nothing. Nothing else
    changes, in particular no random state: the training gives the same numbers.

    Args:
        model: functional or Sequential, compiled.
        x: inputs of at least one example, (N, ...), as `fit` will get them.
        y: their targets, (N, ...).

    Returns:
        None.

    Raises:
        ValueError: for a model without an optimizer.

    Example:
        >>> import numpy as np
        >>> model = MLP([4], None, input_shape=(3,), classes=2)
        >>> model.compile("adam", "mse", metrics=["mae"])
        >>> x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
        >>> make_variables(model, x, y)
        >>> sorted(model.fit(x, y, verbose=0).history)
        ['loss', 'mae']
    """
    _optimizer_of(model, "make_variables")
    if keras.backend.backend() != "tensorflow":
        return
    build_optimizer(model)
    outputs = model.compute_output_spec(keras.KerasTensor((None, *x.shape[1:])))
    zeros = keras.tree.map_structure(lambda o: np.zeros((1, *o.shape[1:]), o.dtype), outputs)
    model.compute_metrics(x[:1], y[:1], zeros)
    model.reset_metrics()


def build_optimizer(model: keras.Model) -> None:
    """Makes the optimizer's variables, once: Keras's LossScaleOptimizer would add more each time.

    Args:
        model: compiled.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _optimizer_of(model: keras.Model, function: str) -> Any:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"`{function}` is for compiled models. Received: "
            f"model={getattr(model, 'name', model)!r} without an optimizer. Call `compile` first."
        )
    return optimizer


def _paired_layers(model: Any, twin: Any) -> Iterator[tuple[Any, Any]]:
    """The variables of all layers, including those of seed generators; none of metrics."""
    for old, new in zip(model.layers, twin.layers, strict=True):
        inside = {id(v) for y in getattr(old, "layers", []) for v in y.variables}
        if isinstance(old, keras.Model) and inside == {id(v) for v in old.variables}:
            yield from _paired_layers(old, new)
        else:
            yield from paired_variables(old, new)


def _measured(model: keras.Model) -> set[int]:
    """The ids of variables that are set by `adapt`, not by training."""
    adapted = [layer for layer, _ in inner_layers(model) if hasattr(layer, "adapt")]
    return {id(v) for layer in adapted for v in layer._non_trainable_variables}

"""Models rebuilt with some layers replaced by others; the original is not changed.

This is the engine of `keras_norm.models.swap_normalization`, and `fold_batch_normalization`. In
inference, batch normalization is one factor and one offset for each channel c,

    (S1)  s_c = gamma_c / sqrt(moving_variance_c + epsilon)
    (S2)  t_c = beta_c - moving_mean_c s_c

and a dense layer or convolution z = W x + b before it absorbs them:

    (S3)  s (W x + b) + t = W' x + b'  with  W'_c = s_c W_c,  b'_c = s_c b_c + t_c

where W_c is the part of the kernel that makes channel c.
"""

import functools
import inspect
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_norm import layers as ours
from keras_norm._convolution import FastConv2D

__all__ = [
    "FoldReport",
    "clone",
    "copied_whole",
    "fold_batch_normalization",
    "fresh",
    "inner_layers",
    "paired_variables",
    "rebuild",
    "same",
]

Layer = Any
Floats = npt.NDArray[np.float64]


# Rebuilding ------------------------------------------------------------------------------------


def rebuild(
    model: keras.Model, replacements: Mapping[int, Callable[[], Layer | None]]
) -> tuple[keras.Model, list[tuple[Layer, Layer]]]:
    """A model of new layers, with the same weights except in the replaced ones.

    It is compiled if the model was, and so are models within it; a class with its own `compile`
    is compiled only if it has `compile_from_config`.

    Args:
        model: functional or Sequential, built; models within it are rebuilt in the same way.
        replacements: id of a layer -> function that makes the layer in its place, or returns None
            to leave the layer out.

    Returns:
        (new model, pairs): each pair is a replaced layer and the one in its place, built.

    Raises:
        ValueError: for a model that cannot be rebuilt layer by layer, a layer to replace that is
            not in its graph, and an optimizer or metric without a configuration to make it from.
    """
    builder = _Builder(replacements)
    new = builder.model(model)
    _require_all_replaced(model, replacements, builder)
    pairs = []
    for old, made in builder.made:
        if id(old) in replacements:
            pairs.append((old, made))
            if not old.trainable:
                made.trainable = False  # including what it made in `build`
        else:
            _copy_variables(old, made)
            _copy_adapted(old, made)
            _copy_trainable(old, made)
    for old, made in builder.models:
        if old.compiled:
            _compile_like(old, made)
    return new, pairs


class _Builder:
    def __init__(self, replacements: Mapping[int, Callable[[], Layer | None]]) -> None:
        self.replacements = replacements
        self.made: list[tuple[Layer, Layer]] = []
        self.models: list[tuple[Any, Any]] = []
        self.left_out: set[int] = set()
        self.in_place: set[int] = set()
        self._by_id: dict[int, Layer] = {}

    def model(self, model: Any) -> Any:
        _require_rebuildable(model)
        if isinstance(model, keras.Sequential):
            new = [self.layer(y) for y in model.layers]
            kept = [y for y in new if id(y) not in self.left_out]
            inputs = _like_input(model.inputs[0])
            rebuilt: Any = keras.Sequential([inputs, *kept], name=model.name)
        else:
            inputs = keras.tree.map_structure(_like_input, model.input)
            options = _own_options(model)
            if options:
                outputs = model._run_through_graph(inputs, self.layer, self._call)
                rebuilt = type(model)(inputs=inputs, outputs=outputs, name=model.name, **options)
            else:
                calls = {"clone_function": self.layer, "call_function": self._call}
                rebuilt = clone(model, inputs, **calls)
        if type(rebuilt) is not type(model):
            raise ValueError(
                "A model class that makes its layers by itself cannot be rebuilt from them. "
                f"Received: model={model.name!r} of the class {type(model).__name__}. Construct "
                "it anew with another normalization, or pass keras.Model(inputs, outputs)."
            )
        rebuilt._trainable = model.trainable  # `trainable` would set all inner layers too
        self.models.append((model, rebuilt))
        return rebuilt

    def has_met(self, layer: Layer) -> bool:
        return id(layer) in self._by_id

    def layer(self, layer: Layer) -> Layer:
        if id(layer) not in self._by_id:
            self._by_id[id(layer)] = self._new(layer)
        return self._by_id[id(layer)]

    def _new(self, layer: Layer) -> Layer:
        if isinstance(layer, keras.Model) and id(layer) not in self.replacements:
            return self.model(layer)
        make = self.replacements.get(id(layer))
        new = same(layer) if make is None else make()
        if new is None:
            new = keras.layers.Identity(name=layer.name)  # never called
            self.left_out.add(id(new))
        elif isinstance(layer, keras.layers.Layer):
            self.made.append((layer, new))
            if make is not None:
                self.in_place.add(id(new))
        return new

    def _call(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if id(layer) in self.left_out:
            return args[0] if args else kwargs["inputs"]
        if id(layer) in self.in_place:  # it may not take the `mask` that the old layer took
            known = inspect.signature(layer.call).parameters
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return layer(*args, **kwargs)


def clone(model: Any, *args: Any, **options: Any) -> Any:
    """As `keras.models.clone_model`, but not compiled.

    Keras compiles from a configuration, which loses a loss that is the user's own function.
    """
    compiled, model.compiled = model.compiled, False
    try:
        return keras.models.clone_model(model, *args, **options)
    finally:
        model.compiled = compiled


def same(layer: Layer) -> Layer:
    """A new layer, or operation, with the same configuration.

    The user's own functions are passed on as they are: a configuration would not restore them.
    """
    if type(layer) is keras.layers.Lambda:
        options = keras.layers.Layer.get_config(layer)  # name, trainable, dtype
        shape, mask = layer._output_shape, layer.mask
        return keras.layers.Lambda(layer.function, shape, mask, dict(layer.arguments), **options)
    if isinstance(layer, keras.layers.Layer) and _holds_a_lambda(layer):
        if type(layer) is keras.layers.TimeDistributed:
            options = keras.layers.Layer.get_config(layer)
            return keras.layers.TimeDistributed(same(layer.layer), **options)
        if isinstance(layer, keras.Model) and _shows_its_steps(layer):
            return clone(layer, clone_function=same)
        raise ValueError(
            "A layer with a `Lambda` in it cannot be rebuilt from its configuration, which would "
            f"not bring back the function. Received: {_named(layer)}. Put the function in a layer "
            "class with a `call`, or take the `Lambda` out of that layer."
        )
    if isinstance(layer, keras.layers.Layer):
        return type(layer).from_config(layer.get_config())
    return _same_operation(layer)


def _holds_a_lambda(layer: Layer) -> bool:
    return any(type(y) is keras.layers.Lambda for y in layer._flatten_layers(include_self=False))


def _same_operation(operation: Any) -> Any:
    """A new operation with the same attributes and functions, without variables and not called."""
    new = object.__new__(type(operation))
    vars(new).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return new


def _like_input(tensor: Any) -> Any:
    source = tensor._keras_history.operation
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        name=source.name,
        sparse=tensor.sparse,
        ragged=tensor.ragged,
        optional=getattr(source, "optional", False),
    )


def _own_options(model: Any) -> dict[str, Any]:
    """The arguments that the constructor of its class takes besides a graph, if it takes one."""
    names = _own_arguments(type(model))
    if not names:
        return {}
    try:
        config = model.get_config()
    except NotImplementedError:
        config = {}
    missing = [name for name in names if name not in config]
    if missing:
        raise ValueError(
            "A model class whose constructor has arguments of its own must give them in its "
            f"get_config(). Received: {_named(model)}, whose get_config() lacks {missing}. Return "
            "{**super().get_config(), ...} with them, or pass keras.Model(inputs, outputs)."
        )
    return {name: config[name] for name in names}


def _own_arguments(kind: type) -> list[str]:
    any_position, any_name = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    kinds = {p.kind for p in parameters.values()}
    by_name = {"inputs", "outputs"} <= parameters.keys() and (
        "name" in parameters or any_name in kinds
    )
    if not (by_name or {any_position, any_name} <= kinds):
        return []  # it makes its layers by itself
    names: list[str] = []
    for base in kind.__mro__:
        if base.__module__.startswith("keras."):
            break
        if "__init__" in vars(base):
            _, *taken = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            names += [p.name for p in taken if p.kind not in (any_position, any_name)]
    known = {"inputs", "outputs", "name", "trainable"}
    return [name for name in dict.fromkeys(names) if name not in known]


def _require_rebuildable(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Only a keras.Model can be rebuilt. Received: model={model!r}. Put the layers in a "
            "keras.Sequential with an Input."
        )
    if isinstance(model, keras.Sequential):
        if not (model.built and model.inputs):
            raise ValueError(
                "The model must be built, for otherwise it has no weights to carry over. "
                f"Received: model={model.name!r}, a Sequential without input shape. Give it a "
                "keras.Input, or call it on a batch."
            )
    elif not hasattr(model, "_nodes_by_depth"):
        raise ValueError(
            "Only functional and Sequential models show how their layers are connected. "
            f"Received: model={model.name!r} of the class {type(model).__name__}, a subclassed "
            "model. Construct it anew with another normalization, or write it as "
            "keras.Model(inputs, outputs)."
        )


def _require_all_replaced(
    model: Any, replacements: Mapping[int, Callable[[], Layer | None]], builder: _Builder
) -> None:
    for layer, _ in inner_layers(model):
        if id(layer) in replacements and not builder.has_met(layer):
            raise ValueError(
                "Only what is called in the graph of a functional or Sequential model can be "
                f"replaced. Received: {_named(layer)}, which is an attribute of a layer or model "
                f"of {model.name!r}. Construct that anew with another normalization."
            )


def paired_variables(old: Layer, new: Layer) -> list[tuple[Any, Any]]:
    """Each variable with that of the rebuilt layer; states of seed generators included."""
    sources, targets = list(old.variables), list(new.variables)
    shapes = [tuple(v.shape) for v in sources]
    named, named_new = ({v.name: v for v in variables} for variables in (sources, targets))
    if len(named) == len(sources) and set(named) == set(named_new):
        targets = [named_new[v.name] for v in sources]  # in a quantized layer the order differs
    if shapes != [tuple(v.shape) for v in targets]:
        raise ValueError(
            "A layer must be rebuilt from its configuration with the same variables. Received: "
            f"layer {old.name!r} of the class {type(old).__name__} with variables of shapes "
            f"{shapes}, and of {[tuple(v.shape) for v in targets]} when rebuilt. Its get_config() "
            "must give all that build() depends on."
        )
    return list(zip(sources, targets, strict=True))


def _copy_variables(old: Layer, new: Layer) -> None:
    for source, target in paired_variables(old, new):
        target.assign(ops.convert_to_numpy(source))
        if target.trainable != source.trainable:
            target.trainable = source.trainable


def _copy_adapted(old: Layer, new: Layer) -> None:
    """Copies what `adapt` measured and a layer keeps besides its variables, as Keras saves it."""
    sources, targets = (
        [y for y in layer._flatten_layers() if hasattr(y, "adapt") or hasattr(y, "load_assets")]
        for layer in (old, new)
    )
    if [type(y) for y in sources] != [type(y) for y in targets]:
        raise ValueError(
            "A layer must be rebuilt from its configuration with the same layers in it that are "
            f"adapted. Received: {_named(old)} with {[y.name for y in sources]}, and with "
            f"{[y.name for y in targets]} when rebuilt. Its constructor must make all of them."
        )
    for source, target in zip(sources, targets, strict=True):
        words = getattr(source, "get_vocabulary", None)
        if words is not None and not words(include_special_tokens=False):
            continue  # it is yet to be adapted
        values: dict[str, Any] = {}
        source.save_own_variables(values)
        values = {name: np.array(ops.convert_to_numpy(v)) for name, v in values.items()}
        target.load_own_variables(values)  # makes constants of them
        if hasattr(source, "save_assets"):  # a vocabulary
            with tempfile.TemporaryDirectory() as folder:
                source.save_assets(folder)
                target.load_assets(folder)


def _copy_trainable(old: Layer, new: Layer) -> None:
    """Copies `trainable` layer by layer, because assigning it sets all inner layers alike."""
    for source, target in zip(old._flatten_layers(), new._flatten_layers(), strict=False):
        if type(source) is type(target):
            target._trainable = source.trainable


def _compile_like(old: Any, new: Any) -> None:
    """Compiles with the same losses, and an optimizer and metrics of the same configuration."""
    kind = type(old)
    if kind.compile is keras.Model.compile:
        new.compile(**keras.tree.map_structure(fresh, old._compile_config.config))
    elif kind.compile_from_config is not keras.Model.compile_from_config:
        new.compile_from_config(old.get_compile_config())


def fresh(x: Any) -> Any:
    """A new optimizer or metric with the same configuration; anything else as it is."""
    if not isinstance(x, keras.optimizers.Optimizer | keras.metrics.Metric):
        return x
    try:
        if isinstance(x, keras.optimizers.Optimizer):
            return _fresh_optimizer(x)
        if type(x) is keras.metrics.MeanMetricWrapper:  # its function is passed on too
            options = keras.metrics.Metric.get_config(x)  # name, dtype
            return keras.metrics.MeanMetricWrapper(x._fn, **options, **x._fn_kwargs)
        return type(x).from_config(x.get_config())
    except Exception as error:
        raise ValueError(
            "The optimizer and the metrics of a compiled model are made anew from their "
            f"configurations. Received: {_named(x)}, with which that failed: {error}. Give what "
            "belongs to it a get_config() and register it by "
            "keras.saving.register_keras_serializable, or rebuild the model before `compile`."
        ) from error


def _fresh_optimizer(x: Any) -> Any:
    """A new optimizer with the same schedule, which has no state and need not be registered."""
    if type(x) is keras.optimizers.LossScaleOptimizer:
        options = {"initial_scale": x.initial_scale, "name": x.name}
        options["dynamic_growth_steps"] = x.dynamic_growth_steps
        return type(x)(_fresh_optimizer(x.inner_optimizer), **options)
    rate = x._learning_rate
    if not callable(rate):
        return type(x).from_config(x.get_config())
    vars(x)["_learning_rate"] = 0.0  # during get_config, which would serialize the schedule
    try:
        config = x.get_config()
    finally:
        vars(x)["_learning_rate"] = rate
    if "learning_rate" in config:
        config = {**config, "learning_rate": rate}
    return type(x).from_config(config)


def inner_layers(model: Any) -> Iterator[tuple[Layer, Layer]]:
    """(layer, the model or layer it is in): each layer once, including those of inner models."""
    yield from _inner(model, set())


def _inner(parent: Any, seen: set[int]) -> Iterator[tuple[Layer, Layer]]:
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer, parent
            yield from _inner(layer, seen)


def copied_whole(model: Any) -> dict[int, Layer]:
    """Id of each layer that is inside a layer (not a model) -> that outer layer.

    `rebuild` makes the outer layer from its configuration, and replaces nothing in it.
    """
    outer: dict[int, Layer] = {}
    for layer in getattr(model, "layers", []):
        if isinstance(layer, keras.Model):
            inside = copied_whole(layer)
        else:
            inside = {id(y): layer for y in layer._flatten_layers(include_self=False)}
        outer = {**inside, **outer}
    return outer


# Folding -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldReport:
    """What `fold_batch_normalization` did, and how far the outputs moved.

    Attributes:
        folded: pairs of names: a batch normalization, and the layer that absorbed it. If a name
            occurs more than once, the names of the models that a layer is in are put in front:
            "block1/norm".
        skipped: pairs of the name of a batch normalization that stayed, and the reason.
        largest_difference: the largest absolute difference between outputs of the two models.
        largest_output: the largest absolute output of the original, for comparison.
        examples: the number of examples on which the models were compared.
    """

    folded: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    largest_difference: float
    largest_output: float
    examples: int

    def __str__(self) -> str:
        lines = [f"{a} -> {b}" for a, b in self.folded]
        lines += [f"{name} stays: {reason}" for name, reason in self.skipped]
        lines.append(
            f"largest difference {self.largest_difference:.2g} of outputs up to "
            f"{self.largest_output:.2g}, {self.examples} examples"
        )
        return "\n".join(lines)


class _Linear(NamedTuple):
    """Where a layer keeps the kernel and bias that make its output channels."""

    kernel: str
    channels: tuple[int, ...]  # axes of the kernel, slowest first, that make up the channels

    def along(self, v: Floats, kernel: Floats) -> Floats:
        """A vector of output channels as an array that broadcasts against the kernel."""
        axes = [a % kernel.ndim for a in self.channels]
        return v.reshape([n if a in axes else 1 for a, n in enumerate(kernel.shape)])


_KERNEL = _Linear("kernel", (-1,))
_LINEAR: dict[type, _Linear] = {
    keras.layers.Dense: _KERNEL,
    keras.layers.Conv1D: _KERNEL,
    keras.layers.Conv2D: _KERNEL,
    FastConv2D: _KERNEL,
    keras.layers.Conv3D: _KERNEL,
    keras.layers.Conv1DTranspose: _Linear("kernel", (-2,)),
    keras.layers.Conv2DTranspose: _Linear("kernel", (-2,)),
    keras.layers.Conv3DTranspose: _Linear("kernel", (-2,)),
    keras.layers.DepthwiseConv1D: _Linear("kernel", (-2, -1)),
    keras.layers.DepthwiseConv2D: _Linear("kernel", (-2, -1)),
    keras.layers.SeparableConv1D: _Linear("pointwise_kernel", (-1,)),
    keras.layers.SeparableConv2D: _Linear("pointwise_kernel", (-1,)),
}
_OWN = (ours.BatchNormalization, ours.SpatialBatchNormalization)
_KINDS = (keras.layers.BatchNormalization, *_OWN)


class _Step(NamedTuple):
    """One call of a layer in a model."""

    layer: Layer
    before: Layer | None  # whose output it takes; None for an input of the model
    alone: bool  # whether nothing else takes that output
    training: bool | None  # the argument of the call itself, whatever the mode of the model


def fold_batch_normalization(
    model: keras.Model, inputs: Any = None
) -> tuple[keras.Model, FoldReport]:
    """A copy of a model for inference, in which batch normalization costs nothing.

    Each batch normalization (ours or `keras.layers`') that directly follows a `Dense`, `Conv1D`,
    `Conv2D`, `Conv3D`, `DepthwiseConv1D`, `DepthwiseConv2D`, `SeparableConv1D`,
    `SeparableConv2D` or one of the transposed convolutions is merged into its kernel and bias,
    equations (S1) to (S3). The layer gets a bias if it had none. Train the original, not the copy.

    Args:
        model: functional or Sequential, built; models within it are folded in the same way.
        inputs: an array, or the list or dict of arrays that the model takes, on which to compare
            the outputs. Default: 8 random examples; sizes that the model leaves open are 32,
            strings are empty.

    Returns:
        (new model, `FoldReport`). The model is compiled like the original, with a fresh optimizer,
        if that was compiled (a class with its own `compile` only if it has `get_compile_config`
        and `compile_from_config`). What cannot be folded stays as it is, and the report says why:
        something is in between, such as an activation; the output before the normalization is
        used elsewhere; one of the two layers is used in several places; the normalization's axis
        is not that of the channels; it normalizes by the batch in inference; it computes in
        another dtype than the layer before it; it is inside another layer. The original is not
        changed, to the last bit.

    Raises:
        ValueError: for a subclassed or unbuilt model, a model class whose get_config() lacks
            arguments of its constructor, a `Lambda` in a layer that cannot be made again, an
            optimizer or metric that cannot be, and inputs that the model does not take.

    Example:
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.Dense(3, use_bias=False, name="dense"),
        ...      ours.BatchNormalization(name="norm"), keras.layers.ReLU()]
        ... )
        >>> folded, report = fold_batch_normalization(model)
        >>> report.folded, report.skipped, bool(report.largest_difference < 1e-6)
        ((('norm', 'dense'),), (), True)
        >>> [layer.name for layer in folded.layers][:1], folded.count_params(), len(folded.layers)
        (['dense'], 15, 2)

    Numerics:
        The factors are computed in float64 and the kernel and bias rounded once, to their dtype:
        outputs change by a few units in the last place, more under a mixed policy. Channels with a
        tiny moving variance have large factors and may change more: hence the report.

    Reference:
        Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, section 3.2.
    """
    _require_rebuildable(model)
    chosen, skipped = _choose(model)
    replacements: dict[int, Callable[[], Layer | None]] = {}
    for norm, linear in chosen:
        replacements[id(norm)] = _nothing
        replacements[id(linear)] = functools.partial(_with_bias, linear)
    new, pairs = rebuild(model, replacements)
    norms = {id(linear): norm for norm, linear in chosen}
    for old, made in pairs:
        _fold(norms[id(old)], old, made)
    difference, largest, examples = _compare(model, new, inputs)
    names = _names(model)
    folded = tuple((names[id(norm)], names[id(linear)]) for norm, linear in chosen)
    stay = tuple((names[id(norm)], reason) for norm, reason in skipped)
    return new, FoldReport(folded, stay, difference, largest, examples)


def _names(model: Any) -> dict[int, str]:
    """The name of every layer by id; if several share a name, with those of what they are in."""
    layers = list(inner_layers(model))
    count = Counter(layer.name for layer, _ in layers)
    paths = {id(model): ""}
    for layer, parent in layers:
        paths[id(layer)] = f"{paths[id(parent)]}{layer.name}/"
    return {id(y): y.name if count[y.name] == 1 else paths[id(y)][:-1] for y, _ in layers}


def _choose(model: Any) -> tuple[list[tuple[Layer, Layer]], list[tuple[Layer, str]]]:
    """The pairs of layers that can be folded, and the layers that cannot, with the reason."""
    outer = copied_whole(model)
    inner = [y for y, _ in inner_layers(model) if id(y) not in outer]
    graphs = [model, *(y for y in inner if isinstance(y, keras.Model))]
    steps = [s for g in graphs if _shows_its_steps(g) for s in _steps(g)]
    uses = Counter(id(s.layer) for s in steps)
    by_batch = set(_in_training(model))
    chosen, skipped, seen = [], [], set()
    for step in steps:
        key = id(step.layer)
        if isinstance(step.layer, _KINDS) and key not in seen and key not in outer:
            seen.add(key)
            reason = _reason_against(step, uses, by_batch)
            if reason is None:
                chosen.append((step.layer, step.before))
            else:
                skipped.append((step.layer, reason))
    for layer, parent in inner_layers(model):
        if isinstance(layer, _KINDS) and id(layer) not in seen:
            holder = outer.get(id(layer), parent)
            skipped.append((layer, f"it is inside of {_named(holder)}"))
    return chosen, skipped


def _shows_its_steps(model: Any) -> bool:
    return isinstance(model, keras.Sequential) or hasattr(model, "_nodes_by_depth")


def _steps(model: Any) -> Iterator[_Step]:
    if isinstance(model, keras.Sequential):
        before: Layer | None = None
        for layer in model.layers:
            yield _Step(layer, before, True, None)
            before = layer
        return
    nodes = [n for some in model._nodes_by_depth.values() for n in some if not n.is_input]
    makers = {id(t): n.operation for n in nodes for t in n.outputs}
    takers = Counter(id(t) for n in nodes for t in n.input_tensors)
    takers.update(id(t) for t in model.outputs)
    for node in nodes:
        tensors = node.input_tensors
        first = tensors[0] if tensors else None
        before = makers.get(id(first))
        yield _Step(node.operation, before, takers[id(first)] == 1, _training_of(node))


def _training_of(node: Any) -> bool | None:
    """The argument `training` of a call, of a normalization or a model."""
    if not isinstance(node.operation, (*_KINDS, keras.Model)):
        return None
    call, given = inspect.signature(node.operation.call), node.arguments
    value = call.bind(*given.args, **given.kwargs).arguments.get("training")
    return None if value is None else bool(value)


def _in_training(model: Any, told: bool | None = None) -> Iterator[int]:
    """Ids of layers that a call puts in training mode; a call of a model overrules those in it."""
    for step in _steps(model):
        training = step.training if told is None else told
        if isinstance(step.layer, keras.Model) and _shows_its_steps(step.layer):
            yield from _in_training(step.layer, training)
        elif training:
            yield id(step.layer)


def _reason_against(step: _Step, uses: Mapping[int, int], by_batch: set[int]) -> str | None:
    norm, linear = step.layer, step.before
    if type(norm) not in _KINDS:
        return f"{type(norm).__name__} is a class of its own, which may do something else"
    if getattr(norm, "use_batch_statistics", None):
        return "use_batch_statistics=True: it normalizes by the batch in inference, too"
    if id(norm) in by_batch:
        call = "its call" if step.training else "a call of its model"
        return f"{call} has training=True: it normalizes by the batch unless told otherwise"
    if linear is None:
        return "it is the first layer of its model"
    if type(linear) not in _LINEAR:
        return f"it follows {_named(linear)}, neither a dense layer nor a convolution"
    if uses[id(norm)] > 1:
        return "it is used in several places"
    if uses[id(linear)] > 1:
        return f"{_named(linear)} is used in several places"
    if not step.alone:
        return f"the output of {_named(linear)} is used elsewhere, too"
    if linear.activation not in (None, keras.activations.linear):
        return f"the activation of {_named(linear)} stands between"
    if getattr(linear, "quantization_mode", None) or getattr(linear, "lora_enabled", False):
        return f"{_named(linear)} is quantized, or has a low-rank addition"
    if linear.compute_dtype != norm.compute_dtype:
        return f"{_named(linear)} gives {linear.compute_dtype}, and it {norm.compute_dtype}"
    if not _is_channel_axis(norm, linear):
        return f"its axis {norm.axis} is not that of the channels of {_named(linear)}"
    return None


def _is_channel_axis(norm: Layer, linear: Layer) -> bool:
    axes = norm.axis if isinstance(norm.axis, tuple | list) else (norm.axis,)
    ndim = norm.input_spec.ndim
    first = getattr(linear, "data_format", None) == "channels_first"
    return [a % ndim for a in axes] == [1 if first else ndim - 1]


def _named(layer: Layer) -> str:
    return f"{type(layer).__name__} {layer.name!r}"


def _nothing() -> None:
    return None


def _with_bias(linear: Layer) -> Layer:
    return type(linear).from_config({**linear.get_config(), "use_bias": True})


def _host(x: Any) -> Floats:
    if keras.backend.backend() == "jax":  # has no float64, and warns
        return np.asarray(ops.convert_to_numpy(x)).astype(np.float64)
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float64")), np.float64)


def _fold(norm: Layer, old: Layer, new: Layer) -> None:
    """Folds one normalization into the new layer, (S1) to (S3)."""
    mean, variance = _host(norm.moving_mean), _host(norm.moving_variance)
    scale = 1 / np.sqrt(variance + norm.epsilon)
    scale = scale if norm.gamma is None else scale * _host(norm.gamma)  # (S1)
    offset = -mean * scale
    offset = offset if norm.beta is None else offset + _host(norm.beta)  # (S2)
    where = _LINEAR[type(old)]
    for variable in old.weights:
        if variable is not old.bias:
            value = _host(variable)
            if variable is getattr(old, where.kernel):
                value = value * where.along(scale, value)
            _by_name(new, variable.name).assign(value)
    new.bias.assign(offset if old.bias is None else _host(old.bias) * scale + offset)  # (S3)


def _by_name(layer: Layer, name: str) -> Any:
    return next(v for v in layer.weights if v.name == name)


def _compare(model: Any, new: Any, inputs: Any) -> tuple[float, float, int]:
    """The largest difference of outputs, the largest output, and the number of examples."""
    given = inputs is not None
    try:
        inputs = inputs if given else _random_inputs(model)
        pairs = [keras.tree.flatten(m(inputs, training=False)) for m in (model, new)]
    except Exception as error:
        shapes = [tuple(t.shape) for t in model.inputs]
        received = "inputs of its own" if given else "inputs=None, for which random ones were made"
        raise ValueError(
            "The two models are compared on inputs, which must be such that the model takes "
            f"them. Received: {received}, for a model of input shapes {shapes}. Pass a small "
            "batch of real examples as `inputs`."
        ) from error
    difference = largest = 0.0
    for a, b in zip(*([_host(v) for v in some] for some in pairs), strict=True):
        difference = float(np.maximum(difference, np.abs(a - b).max(initial=0)))  # NaN stays
        largest = float(np.maximum(largest, np.abs(a).max(initial=0)))
    return difference, largest, int(np.shape(keras.tree.flatten(inputs)[0])[0])


def _random_inputs(model: Any) -> Any:
    rng = np.random.default_rng(0)

    def random(spec: Any) -> Any:
        shape: Sequence[int] = [n or (32 if i else 8) for i, n in enumerate(spec.shape)]
        dtype = keras.backend.standardize_dtype(spec.dtype)
        if dtype == "string":
            return ops.convert_to_tensor(np.full(shape, ""), dtype)
        if keras.backend.is_float_dtype(dtype):
            return ops.cast(rng.standard_normal(shape), dtype)
        return ops.cast(rng.integers(0, 2, shape), dtype)

    if isinstance(model, keras.Sequential):
        return random(model.inputs[0])
    return keras.tree.map_structure(random, model.input)

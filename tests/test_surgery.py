"""Folding of batch normalization, and rebuilding of models: same numbers, original untouched."""

import functools

import keras
import numpy as np
import pytest
from arrays import array
from differentiation import BACKEND

from keras_norm import layers as ours
from keras_norm._gradients import float64_promotion
from keras_norm.models import (
    MLP,
    FastConv2D,
    FoldReport,
    LeNet,
    fold_batch_normalization,
    swap_normalization,
)

pytestmark = pytest.mark.core

KINDS = {"ours": ours.BatchNormalization, "keras": keras.layers.BatchNormalization}


def randomized(model, seed=0):
    """The model with random weights, moving statistics among them, all far from their initial."""
    rng = np.random.default_rng(seed)
    for v in model.weights:
        value = rng.normal(size=v.shape)
        v.assign(0.2 + np.abs(value) if "variance" in v.path or "gamma" in v.path else value)
    return model


def state(model):
    """Everything that could change: configuration, variables, graph."""
    config = model.get_config() if not isinstance(model, keras.Sequential) else None
    variables = [np.array(array(v)) for v in model.variables]
    return config, [y.name for y in model.layers], variables


def assert_same_state(a, b):
    assert a[:2] == b[:2]
    for x, y in zip(a[2], b[2], strict=True):
        np.testing.assert_array_equal(x, y)


def fold(model, inputs=None):
    """Folds, and holds the outcome against everything that is promised of it."""
    before = state(model)
    folded, report = fold_batch_normalization(model, inputs)
    assert_same_state(state(model), before)
    assert type(folded) is type(model)
    assert folded.name == model.name
    assert isinstance(report, FoldReport)
    assert not {id(v) for v in folded.variables} & {id(v) for v in model.variables}
    names = {y.name for y in every_layer(folded)}
    assert not names & {norm for norm, _ in report.folded}
    assert names >= {name for name, _ in report.skipped}
    return folded, report


def every_layer(model):
    return model._flatten_layers(include_self=False)


def outputs(model, x):
    return [array(y) for y in keras.tree.flatten(model(x, training=False))]


def assert_same_outputs(model, folded, x, report=None, rtol=1e-4):
    pairs = list(zip(outputs(model, x), outputs(folded, x), strict=True))
    for a, b in pairs:
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(b, a, atol=rtol * np.abs(a).max())
    if report is not None:
        difference = max(np.abs(a - b).max() for a, b in pairs)
        assert report.largest_difference == pytest.approx(difference, rel=1e-3, abs=1e-12)
        assert report.largest_output == pytest.approx(max(np.abs(a).max() for a, _ in pairs))


LINEAR = {
    "dense": ((7,), lambda **k: keras.layers.Dense(5, **k)),
    "dense of sequences": ((6, 7), lambda **k: keras.layers.Dense(5, **k)),
    "conv1": ((8, 3), lambda **k: keras.layers.Conv1D(4, 3, **k)),
    "conv2": ((8, 8, 3), lambda **k: keras.layers.Conv2D(4, 3, strides=2, padding="same", **k)),
    "conv2 groups": ((6, 6, 4), lambda **k: keras.layers.Conv2D(6, 3, groups=2, **k)),
    "conv2 fast": ((6, 6, 3), lambda **k: FastConv2D(4, 3, padding="same", **k)),
    "conv3": ((4, 4, 4, 2), lambda **k: keras.layers.Conv3D(3, 2, **k)),
    "transposed1": ((5, 3), lambda **k: keras.layers.Conv1DTranspose(4, 3, strides=2, **k)),
    "transposed2": ((5, 5, 3), lambda **k: keras.layers.Conv2DTranspose(4, 3, strides=2, **k)),
    "transposed3": ((3, 3, 3, 2), lambda **k: keras.layers.Conv3DTranspose(3, 2, **k)),
    "depthwise1": ((8, 3), lambda **k: keras.layers.DepthwiseConv1D(3, depth_multiplier=2, **k)),
    "depthwise2": (
        (6, 6, 3),
        lambda **k: keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", **k),
    ),
    "separable1": ((8, 3), lambda **k: keras.layers.SeparableConv1D(4, 3, **k)),
    "separable2": ((6, 6, 3), lambda **k: keras.layers.SeparableConv2D(4, 3, **k)),
}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_fold_into(name, use_bias):
    shape, build = LINEAR[name]
    kind = KINDS["ours" if use_bias else "keras"]
    model = keras.Sequential(
        [keras.Input(shape), build(use_bias=use_bias, name="linear"), kind(name="norm")]
        + [keras.layers.ReLU()]
    )
    randomized(model)
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")
    folded, report = fold(model, x)
    assert report.folded == (("norm", "linear"),)
    assert report.skipped == ()
    assert report.examples == 3
    assert_same_outputs(model, folded, x, report, rtol=1e-5)
    assert folded.layers[0].use_bias
    assert model.layers[0].use_bias == use_bias


@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}, {"epsilon": 0.5}])
def test_fold_without_gamma_or_beta(options):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), ours.BatchNormalization(**options)]
    )
    folded, report = fold(randomized(model))
    assert len(report.folded) == 1
    x = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
    assert_same_outputs(model, folded, x)


def test_fold_in_float64():
    """To rounding: what is computed is computed in float64."""
    options = {"dtype": "float64"}
    model = keras.Sequential(
        [keras.Input((4,), dtype="float64"), keras.layers.Dense(3, **options)]
        + [ours.BatchNormalization(**options)]
    )
    with float64_promotion():  # Keras multiplies in float32 on JAX and PyTorch
        _, report = fold(randomized(model))
    assert report.largest_difference < 1e-13 * report.largest_output
    assert report.examples == 8


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow convolves channels last on a CPU")
@pytest.mark.parametrize("kind", [ours.BatchNormalization, ours.SpatialBatchNormalization])
def test_fold_channels_first(kind):
    first = {"data_format": "channels_first"}
    norm = kind(**(first if kind is ours.SpatialBatchNormalization else {"axis": 1}))
    model = keras.Sequential(
        [keras.Input((3, 6, 6)), keras.layers.Conv2D(4, 3, **first), norm]
        + [keras.layers.Conv2D(4, 3, **first), keras.layers.BatchNormalization(name="wrong")]
    )
    folded, report = fold(randomized(model))
    assert len(report.folded) == 1
    assert report.skipped[0][0] == "wrong"
    assert "its axis -1 is not that of the channels" in report.skipped[0][1]
    assert_same_outputs(model, folded, np.ones((2, 3, 6, 6), "float32"))


def test_fold_lenet():
    model = randomized(LeNet("batch", activation="relu"))
    model.compile("sgd", "mse")
    folded, report = fold(model)
    assert len(report.folded) == 4
    assert report.skipped == ()
    assert folded.count_params() == LeNet(None).count_params()
    assert report.largest_difference < 1e-5 * report.largest_output
    assert "conv1_norm -> conv1" in str(report)
    x = np.random.default_rng(1).normal(size=(4, 28, 28, 1)).astype("float32")
    np.testing.assert_allclose(
        folded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-3, atol=1e-2
    )


def branching():
    """A functional model with one case of everything that cannot be folded."""
    inputs = keras.Input((6,), name="x")
    first = ours.BatchNormalization(name="first")(inputs)
    a = keras.layers.Dense(6, name="a")(first)
    folds = ours.BatchNormalization(name="folds")(a)
    b = keras.layers.Dense(6, name="b", activation="tanh")(folds)
    activated = ours.BatchNormalization(name="activated")(b)
    c = keras.layers.Dense(6, name="c")(activated)
    shared_output = ours.BatchNormalization(name="shared_output")(c)
    d = keras.layers.Dense(6, name="d")
    twice = d(shared_output), d(c)
    of_shared = ours.BatchNormalization(name="of_shared")(twice[0])
    e = keras.layers.Dense(6, name="e")(of_shared)
    dropped = keras.layers.Dropout(0.5, name="dropout")(e)
    after_dropout = ours.BatchNormalization(name="after_dropout")(dropped)
    norm = ours.BatchNormalization(name="norm_twice")
    both = [norm(keras.layers.Dense(6, name=n)(after_dropout)) for n in ("f", "g")]
    h = keras.layers.Dense(6, name="h")(both[0] + both[1])
    by_batch = ours.BatchNormalization(name="by_batch", use_batch_statistics=True)(h)
    i = keras.layers.Dense(6, name="i")(by_batch + twice[1])
    also_output = ours.BatchNormalization(name="also_output")(i)
    return keras.Model(inputs, {"y": also_output, "raw": i}, name="branching")


def test_what_cannot_be_folded():
    model = randomized(branching())
    x = np.random.default_rng(1).normal(size=(5, 6)).astype("float32")
    folded, report = fold(model, x)
    assert report.folded == (("folds", "a"),)
    reasons = {
        "first": "the first layer",
        "activated": "the activation of Dense 'b'",
        "shared_output": "the output of Dense 'c' is used elsewhere",
        "of_shared": "Dense 'd' is used in several places",
        "after_dropout": "it follows Dropout 'dropout'",
        "norm_twice": "it is used in several places",
        "by_batch": "use_batch_statistics=True",
        "also_output": "the output of Dense 'i' is used elsewhere",
    }
    assert {name for name, _ in report.skipped} == set(reasons)
    for name, reason in report.skipped:
        assert reasons[name] in reason
    assert_same_outputs(model, folded, x, report)
    assert set(folded(x)) == {"y", "raw"}


def test_layers_of_two_dtypes_stay_apart():
    """Merged, the outputs would be of the other dtype."""
    for first, second in (("mixed_float16", "float32"), ("float32", "mixed_float16")):
        norm = ours.BatchNormalization(name="norm", dtype=second)
        dense = keras.layers.Dense(5, name="dense", dtype=first)
        model = randomized(keras.Sequential([keras.Input((4,)), dense, norm]))
        folded, report = fold(model)
        assert report.folded == ()
        assert f"Dense 'dense' gives {dense.compute_dtype}, and it {norm.compute_dtype}" in str(
            report
        )
        assert folded.outputs[0].dtype == model.outputs[0].dtype == norm.compute_dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_that_the_call_fixes(kind):
    inputs = keras.Input((4,))
    x = KINDS[kind](name="by_batch")(keras.layers.Dense(5)(inputs), training=True)
    y = KINDS[kind](name="by_keyword")(inputs=keras.layers.Dense(5)(x), training=False)
    model = randomized(keras.Model(inputs, y))
    for layer in model.layers[2:5:2]:
        layer.momentum = 1.0  # the moving statistics stay
    x = np.random.default_rng(1).normal(3, 1, (6, 4)).astype("float32")
    folded, report = fold(model, x)
    assert [a for a, _ in report.folded] == ["by_keyword"]
    assert report.skipped[0][0] == "by_batch"
    assert "its call has training=True" in report.skipped[0][1]
    np.testing.assert_allclose(array(folded(x)), array(model(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("outer", "inner", "folds"),
    [(True, None, False), (None, True, False), (True, False, False), (False, True, True)],
)
def test_a_mode_that_the_call_of_a_model_fixes(outer, inner, folds):
    """It overrules those of the calls within, at every depth."""
    z = keras.Input((8,))
    norm = ours.BatchNormalization(name="norm", momentum=1.0)
    base = keras.Model(z, norm(keras.layers.Dense(5)(z), training=inner))
    inputs = keras.Input((8,))
    deep = keras.Model(inputs, keras.Sequential([inputs, base])(inputs))
    model = randomized(keras.Model(inputs, keras.layers.Dense(2)(deep(inputs, training=outer))))
    x = np.random.default_rng(1).normal(3, 2, (6, 8)).astype("float32")
    folded, report = fold(model, x)
    assert [a for a, _ in report.folded] == ["norm"] * folds
    np.testing.assert_allclose(array(folded(x)), array(model(x)), rtol=1e-3, atol=1e-4)
    if not folds:
        assert "has training=True: it normalizes by the batch unless told" in report.skipped[0][1]


def test_a_model_that_one_of_its_calls_trains():
    base = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4), ours.BatchNormalization(name="norm")]
    )
    inputs = keras.Input((4,))
    model = randomized(keras.Model(inputs, base(base(inputs), training=True)))
    _, report = fold(model)
    assert report.folded == ()
    assert "a call of its model has training=True" in report.skipped[0][1]


def test_sparse_inputs_stay_sparse():
    if BACKEND == "torch":
        pytest.skip("Keras has no sparse tensors on PyTorch")
    inputs = keras.Input((4,), sparse=True, name="x")
    outputs = ours.BatchNormalization()(keras.layers.Dense(3)(inputs))
    functional = keras.Model(inputs, outputs)
    sequential = keras.Sequential(
        [keras.Input((4,), sparse=True), keras.layers.Dense(3), ours.BatchNormalization()]
    )
    for model in (functional, sequential):
        new, report = fold_batch_normalization(model)
        assert len(report.folded) == 1
        assert new.inputs[0].sparse
        assert swap_normalization(model, "layer").inputs[0].sparse


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has ragged tensors on TensorFlow alone")
def test_ragged_inputs_stay_ragged():
    inputs = keras.Input((None,), ragged=True, dtype="int32")
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(5, 4)(inputs))
    model = keras.Model(inputs, ours.BatchNormalization()(keras.layers.Dense(3)(x)))
    assert swap_normalization(model, "layer").inputs[0].ragged


def test_lambdas_keep_their_functions():
    """Rebuilt from the configuration they would be code from outside, which Keras refuses."""
    factor = 3.0
    inputs = keras.Input((4,))
    x = ours.BatchNormalization(name="norm")(keras.layers.Dense(5)(inputs))
    options = {"arguments": {"power": 2}, "name": "scaled", "output_shape": (5,)}
    scaled = keras.layers.Lambda(lambda v, power: factor * keras.ops.power(v, power), **options)
    model = randomized(keras.Model(inputs, scaled(x)))
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    folded, report = fold(model, x)
    assert len(report.folded) == 1
    assert_same_outputs(model, folded, x, report)
    assert folded.get_layer("scaled").get_config() == scaled.get_config()
    assert swap_normalization(model, "layer").get_layer("scaled").function is scaled.function


def test_functions_within_a_wrapper_and_of_an_operation():
    factor = 3.0
    inputs = keras.Input((6, 4))
    x = ours.BatchNormalization(name="norm")(keras.layers.Dense(5)(inputs))
    scaled, again = (keras.layers.Lambda(lambda v: factor * v, output_shape=(5,)) for _ in range(2))
    block = keras.Sequential([keras.Input((5,)), again, keras.layers.Dense(5)])
    x = keras.layers.TimeDistributed(scaled, name="a")(x)
    x = keras.layers.TimeDistributed(block, name="b", trainable=False)(x)
    model = keras.Model(inputs, keras.ops.vectorized_map(lambda v: factor * v, x))
    randomized(model)
    x = np.random.default_rng(1).normal(size=(5, 6, 4)).astype("float32")
    calls = [len(y._inbound_nodes) for y in model.operations]
    folded, report = fold_batch_normalization(model, x)
    assert len(report.folded) == 1
    assert_same_outputs(model, folded, x, report)
    assert folded.get_layer("a").layer.function is scaled.function
    assert every_flag(swap_normalization(model, ours.BatchNormalization)) == every_flag(model)
    assert [len(y._inbound_nodes) for y in model.operations] == calls


class Around(keras.layers.Wrapper):
    def call(self, x):
        return self.layer(x)


def test_a_lambda_in_another_wrapper_is_refused():
    around = Around(keras.layers.Lambda(lambda v: 2 * v, output_shape=(4,)), name="around")
    model = keras.Sequential(
        [keras.Input((4,)), around, keras.layers.Dense(3), ours.BatchNormalization()]
    )
    with pytest.raises(ValueError, match=r"Received: Around 'around'\. Put the function in a"):
        fold_batch_normalization(model)


def nested(shared):
    block = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="inner"), ours.BatchNormalization(name="in")]
        + [keras.layers.Dropout(0.5)],
        name="block",
    )
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="outer")(inputs)
    x = ours.BatchNormalization(name="out")(block(x))
    x = block(x) if shared else x
    z = keras.Input((4,))
    deep = keras.Model(z, keras.layers.BatchNormalization(name="deep")(keras.layers.Dense(3)(z)))
    return keras.Model(inputs, deep(x))


@pytest.mark.parametrize("shared", [False, True])
def test_fold_in_nested_models(shared):
    """Also in a model that is used twice, whose weights stay shared."""
    model = randomized(nested(shared))
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    folded, report = fold(model, x)
    assert [a for a, _ in report.folded] == ["in", "deep"] or [a for a, _ in report.folded] == [
        "deep",
        "in",
    ]
    assert [(a, "follows Sequential 'block'" in why) for a, why in report.skipped] == [
        ("out", True)
    ]
    assert_same_outputs(model, folded, x, report)
    assert len(folded.weights) == len(model.weights) - 8


def test_layers_of_one_name_are_told_apart():
    def block(name):
        norms = [ours.BatchNormalization(name="n"), ours.BatchNormalization(name="again")]
        return keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(4, name="d"), *norms], name=name
        )

    whole = keras.Sequential([keras.Input((4,)), block("one"), block("two")])
    _, report = fold_batch_normalization(randomized(whole))
    assert report.folded == (("one/n", "one/d"), ("two/n", "two/d"))
    assert [name for name, _ in report.skipped] == ["one/again", "two/again"]


def test_inside_of_another_layer():
    model = keras.Sequential(
        [keras.Input((5, 4)), keras.layers.TimeDistributed(ours.BatchNormalization(name="norm"))]
    )
    folded, report = fold(randomized(model))
    assert report.folded == ()
    assert "inside of TimeDistributed" in report.skipped[0][1]
    assert_same_outputs(model, folded, np.ones((2, 5, 4), "float32"))
    with pytest.raises(ValueError, match="Received: 'norm' inside of TimeDistributed"):
        swap_normalization(model, "layer")


def in_a_layer(shared):
    """A model with a normalization, in a layer that is no model; `shared` also in the graph."""
    dense, norm = keras.layers.Dense(4, name="dense"), ours.BatchNormalization(name="norm")
    inner = keras.Sequential([keras.Input((5,)), dense, norm])
    inputs, other = keras.Input((6, 5)), keras.Input((5,))
    outputs = [keras.layers.TimeDistributed(inner, name="steps")(inputs)]
    if shared:
        return keras.Model([inputs, other], [*outputs, inner(other)])
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_inside_of_another_layer(shared):
    """That layer is rebuilt from its configuration, with the model in it as it was."""
    model = randomized(in_a_layer(shared))
    folded, report = fold(model)
    assert report.folded == ()
    assert report.skipped == (("norm", "it is inside of TimeDistributed 'steps'"),)
    assert len(folded.weights) >= len(model.weights)
    for to in ("group", None):
        with pytest.raises(ValueError, match="Received: 'norm' inside of TimeDistributed 'steps'"):
            swap_normalization(model, to)


def test_what_is_not_in_the_graph_is_refused():
    inputs = keras.Input((4,))
    model = OwnStep(inputs, ours.BatchNormalization()(keras.layers.Dense(3)(inputs)))
    model.other = ours.BatchNormalization(name="other")
    with pytest.raises(ValueError, match="Received: BatchNormalization 'other', which is an attr"):
        swap_normalization(model, "layer")


def test_random_inputs_of_every_kind():
    """Integers, several inputs, and sizes that are left open."""
    tokens, extra = keras.Input((None,), dtype="int32", name="tokens"), keras.Input((3,), name="e")
    x = keras.layers.Embedding(5, 4)(tokens)
    x = ours.BatchNormalization(name="norm")(keras.layers.Conv1D(3, 3)(x))
    y = keras.layers.GlobalAveragePooling1D()(x) + extra
    model = keras.Model({"tokens": tokens, "e": extra}, y)
    _, report = fold(randomized(model))
    assert report.folded[0][0] == "norm"
    assert 0 < report.largest_output < np.inf
    with pytest.raises(ValueError, match="inputs of its own, for a model of input shapes"):
        fold_batch_normalization(model, np.ones((2, 2)))


def test_wrong_weights_would_be_seen():
    """The report measures: a model that was folded wrongly has a large difference."""
    model = randomized(MLP((5,), "batch", input_shape=(4,)))
    folded, _ = fold_batch_normalization(model)
    dense = folded.get_layer("dense1")
    dense.kernel.assign(array(dense.kernel) * 1.01)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    difference = np.abs(outputs(model, x)[0] - outputs(folded, x)[0]).max()
    assert difference > 1e-3


def test_values_that_are_not_finite_are_not_reported_as_no_difference():
    model = randomized(MLP((5,), "batch", input_shape=(4,)))
    kernel = np.array(array(model.get_layer("dense1").kernel))
    kernel[0, 0] = np.nan
    model.get_layer("dense1").kernel.assign(kernel)
    _, report = fold_batch_normalization(model)
    assert np.isnan(report.largest_difference)


def test_frozen_layers_and_dropout_stay():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="a", trainable=False)]
        + [ours.BatchNormalization(), keras.layers.Dropout(0.3, seed=1), keras.layers.Dense(2)]
    )
    folded, _ = fold(model)
    assert not folded.get_layer("a").trainable
    assert folded.layers[1].rate == 0.3
    again, report = fold(folded)
    assert report.folded == report.skipped == ()
    assert len(again.layers) == 3


def every_flag(model):
    layers = [y for y in every_layer(model) if not isinstance(y, keras.layers.InputLayer)]
    variables = [v.trainable for y in layers for v in y.weights]
    return [(type(y), y.trainable) for y in (model, *layers)], variables


@pytest.mark.parametrize("frozen", ["layers", "model", "model but for a layer", "inside", "all"])
def test_what_is_frozen_stays_so(frozen):
    """Also in models and layers within the model: to set `trainable` of one reaches all in it."""
    inner = keras.Input((6, 5))
    steps = keras.layers.TimeDistributed(keras.layers.Dense(5))
    x = keras.layers.Dense(5, name="dense")(steps(inner))
    x = ours.BatchNormalization(name="norm")(keras.layers.MultiHeadAttention(1, 3, name="a")(x, x))
    base = keras.Model(inner, x)
    inputs = keras.Input((6, 5))
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(base(inputs)))
    if frozen == "layers":
        base.get_layer("dense").trainable = base.get_layer("norm").trainable = False
    elif frozen == "inside":
        steps.layer.trainable = base.get_layer("a").trainable = False
    else:
        (model if frozen == "all" else base).trainable = False
        base.get_layer("dense").trainable = frozen == "model but for a layer"
    for new in (swap_normalization(model, ours.BatchNormalization), fold(model)[0]):
        assert every_flag(new) == every_flag(model)
        assert len(new.trainable_variables) == len(model.trainable_variables)


def test_variables_of_one_name_keep_their_values():
    """The parts of attention name theirs alike: "kernel" and "bias"."""
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="a")(inputs, inputs)
    model = keras.Model(inputs, ours.BatchNormalization()(x))
    variables = model.get_layer("a").variables
    assert len({v.name for v in variables}) < len(variables)
    rng = np.random.default_rng(0)
    for variable in variables:
        if variable.trainable:
            variable.assign(rng.standard_normal(variable.shape))
    new = swap_normalization(model, ours.BatchNormalization).get_layer("a")
    for old, made in zip(variables, new.variables, strict=True):
        np.testing.assert_array_equal(array(made), array(old))


def test_compiled_like_the_original():
    """A loss that is a function of the user's, too, of which Keras could make no configuration."""

    def loss(y, z):
        return keras.ops.mean((y - z) ** 2, axis=-1)

    layers = [keras.Input((4,)), keras.layers.Dense(3), ours.BatchNormalization()]
    sequential = keras.Sequential([*layers, keras.layers.Dense(2)])
    inputs = keras.Input((4,))
    x, y = np.ones((5, 4), "float32"), np.ones((5, 2), "float32")
    for model in (sequential, keras.Model(inputs, sequential(inputs))):
        metric = keras.metrics.MeanAbsoluteError(name="error")
        model.compile(keras.optimizers.SGD(0.125), loss, metrics=[metric], jit_compile=False)
        model.optimizer.iterations.assign(3)
        new = swap_normalization(model, "layer")
        assert set(new.fit(x, y, verbose=0).history) == {"loss", "error"}
        for each in (new, fold_batch_normalization(model)[0]):
            assert each.compiled
            assert each.loss is loss
            assert each.optimizer is not model.optimizer
            assert float(each.optimizer.learning_rate) == 0.125
            assert int(each.optimizer.iterations) == int(each is new)
        assert model.compiled
        assert int(model.optimizer.iterations) == 3


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """Not registered, and without a configuration."""

    def __call__(self, step):
        return 0.5 ** keras.ops.cast(step, "float32")


class Doubling(Halving):
    def get_config(self):
        return {}


def small():
    layers = [keras.Input((4,)), keras.layers.Dense(3), ours.BatchNormalization()]
    return keras.Sequential([*layers, keras.layers.Dense(2)])


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("schedule", [Halving(), Doubling()])
@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_with_a_schedule_that_is_not_registered(schedule, scaled):
    model = small()
    optimizer = keras.optimizers.Adam(schedule, beta_1=0.5)
    whole = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    model.compile(whole, "mse", run_eagerly=True)
    for new in (swap_normalization(model, "layer"), fold_batch_normalization(model)[0]):
        made = new.optimizer.inner_optimizer if scaled else new.optimizer
        assert made is not optimizer
        assert made._learning_rate is optimizer._learning_rate is schedule
        assert made.beta_1 == 0.5
        new.fit(np.ones((5, 4)), np.ones((5, 2)), verbose=0)
    assert int(model.optimizer.iterations) == 0


def named_error(y, z):
    return keras.ops.mean(keras.ops.abs(y - z), axis=-1)


def test_compiled_with_metrics_of_a_function():
    functions = {"named": named_error, "lambda": lambda y, z: named_error(y, z)}
    metrics = [keras.metrics.MeanMetricWrapper(f, name) for name, f in functions.items()]
    model = small()
    model.compile("sgd", "mse", metrics=[*metrics, "mae"], run_eagerly=True)
    new = swap_normalization(model, ours.BatchNormalization)
    x, y = np.ones((5, 4), "float32"), np.ones((5, 2), "float32")
    scores = new.evaluate(x, y, verbose=0, return_dict=True)
    assert scores["named"] == scores["lambda"] == pytest.approx(scores["mae"])
    assert all(float(m.count) == 0 for m in metrics)


class OwnMetric(keras.metrics.MeanMetricWrapper):
    def __init__(self):
        super().__init__(named_error, "own")


def test_a_metric_that_cannot_be_made_anew_is_refused():
    model = small()
    model.compile("sgd", "mse", metrics=[OwnMetric()])
    with pytest.raises(ValueError, match="Received: OwnMetric 'own', with which that failed"):
        swap_normalization(model, "layer")


# Layers that measure their data ----------------------------------------------------------------


def eager(model, x):
    return outputs(model, x)[0]


def predict(model, x):
    return model.predict(x, verbose=0)


def assert_same_when_rebuilt(model, x, run, inputs=None):
    expected = run(model, x)
    assert np.abs(expected).max() > 1e-3
    swapped = swap_normalization(model, ours.BatchNormalization)
    np.testing.assert_array_equal(run(swapped, x), expected)
    folded, report = fold_batch_normalization(model, inputs)
    assert len(report.folded) == 1
    np.testing.assert_allclose(run(folded, x), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(run(model, x), expected)


@pytest.mark.parametrize(("place", "run"), [("first", predict), ("model", eager), ("layer", eager)])
def test_adapted_normalization(place, run):
    """Keras computes with constants that it makes of the variables; on JAX `predict` moves them."""
    x = np.random.default_rng(0).normal(50, 20, (8, 6, 5)).astype("float32")
    norm = keras.layers.Normalization()
    norm.adapt(x[0])
    first = {
        "first": norm,
        "model": keras.Sequential([keras.Input((6, 5)), norm]),
        "layer": keras.layers.TimeDistributed(norm),
    }[place]
    layers = [first, keras.layers.Dense(3), ours.BatchNormalization(), keras.layers.Dense(2)]
    assert_same_when_rebuilt(keras.Sequential([keras.Input((6, 5)), *layers]), x, run)


def of_words(lookup, dtype="string"):
    inputs = keras.Input((1,), dtype=dtype)
    x = lookup(inputs)
    if x.shape[-1] == 1:  # numbers of words
        x = keras.layers.Flatten()(keras.layers.Embedding(9, 4)(x))
    x = ours.BatchNormalization()(keras.layers.Dense(3)(x))
    return keras.Model(inputs, keras.layers.Dense(2)(x))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras looks up words by TensorFlow")
@pytest.mark.parametrize("kind", ["words", "weighted", "integers", "texts"])
def test_vocabularies(kind):
    import tensorflow as tf

    lookup, words = {
        "words": (keras.layers.StringLookup(), ["a", "b", "a", "c"]),
        "weighted": (keras.layers.StringLookup(output_mode="tf_idf"), ["a", "b", "a", "c"]),
        "integers": (keras.layers.IntegerLookup(), [12, 11, 12, 17]),
        "texts": (keras.layers.TextVectorization(output_sequence_length=1), ["a", "b", "a", "c"]),
    }[kind]
    x = tf.constant(words)[:, None]
    if kind != "weighted":  # without words it has no width
        new = swap_normalization(of_words(lookup, x.dtype.name), "batch")
        assert len(new.layers[1].get_vocabulary(include_special_tokens=False)) == 0
    lookup.adapt(x)
    for inputs in (None, x):
        assert_same_when_rebuilt(of_words(lookup, x.dtype.name), x, eager, inputs)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras looks up words by TensorFlow")
def test_words_of_which_none_may_be_random():
    model = of_words(keras.layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=0))
    with pytest.raises(ValueError, match="Received: inputs=None, for which random ones were made"):
        fold_batch_normalization(model)
    _, report = fold_batch_normalization(model, np.array([["a"], ["b"]]))
    assert report.examples == 2


def test_saved_and_compiled(tmp_path):
    model = randomized(MLP((5,), "batch", input_shape=(4,)))
    folded, _ = fold(model)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), folded.predict(x, verbose=0))
    swapped = swap_normalization(model, "layer")
    swapped.compile("adam", "mse")
    swapped.fit(x, np.ones((5, 10)), verbose=0)


@pytest.mark.parametrize("mode", ["int8", "float8", "lora"])
def test_quantized_and_low_rank_layers_stay(mode):
    """With their variables, which Keras makes in another order than a layer that begins so."""
    model = randomized(MLP((5,), "batch", input_shape=(4,)))
    for dense in (y for y in model.layers if isinstance(y, keras.layers.Dense)):
        if mode == "lora":
            dense.enable_lora(2)
            dense.lora_kernel_b.assign(np.random.default_rng(2).normal(size=(2, dense.units)))
        else:
            dense.quantize(mode)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    folded, report = fold(model, x)
    assert report.folded == ()
    assert "is quantized, or has a low-rank" in report.skipped[0][1]
    assert_same_outputs(model, folded, x, report)
    assert every_flag(swap_normalization(model, ours.BatchNormalization)) == every_flag(model)
    first = swap_normalization(model, "layer").get_layer("dense1")
    np.testing.assert_array_equal(array(first(x)), array(model.get_layer("dense1")(x)))


# Models that cannot be rebuilt -----------------------------------------------------------------


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = ours.BatchNormalization()

    def call(self, x):
        return self.norm(x)


class OwnConstructor(keras.Model):
    def __init__(self, units):
        inputs = keras.Input((4,))
        x = ours.BatchNormalization()(keras.layers.Dense(units)(inputs))
        super().__init__(inputs, x)


class OwnStep(keras.Model):
    """Only what it does in training is its own: it can be rebuilt."""

    def answer(self):
        return 42


class Scaled(keras.Model):
    def __init__(self, *args, alpha=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = alpha


class Known(Scaled):
    """It says what it was made with, and is made by the names of its graph."""

    def __init__(self, inputs, outputs, *args, beta, **kwargs):
        super().__init__(inputs, outputs, *args, **kwargs)
        self.beta = beta

    def get_config(self):
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta}


class OwnCompile(keras.Model):
    def compile(self, factor, **kwargs):
        super().compile(**kwargs)
        self.factor = factor


class KnownCompile(OwnCompile):
    def get_compile_config(self):
        return {"factor": self.factor}

    def compile_from_config(self, config):
        self.compile(optimizer="sgd", loss="mse", **config)


def dense_and_norm(kind, **options):
    inputs = keras.Input((4,))
    return kind(inputs, ours.BatchNormalization()(keras.layers.Dense(3)(inputs)), **options)


def test_arguments_of_a_model_class_are_kept():
    model = dense_and_norm(Known, alpha=7, beta=8)
    for new in (fold(model)[0], swap_normalization(model, "layer")):
        assert (new.alpha, new.beta) == (7, 8)


def test_a_compile_of_its_own():
    """Called if the class says how; else the copy is not compiled."""
    for kind in (OwnCompile, KnownCompile):
        model = dense_and_norm(kind)
        model.compile(factor=3, optimizer="sgd", loss="mse")
        new = swap_normalization(model, "layer")
        assert new.compiled == (kind is KnownCompile)
        if new.compiled:
            assert new.factor == 3


@pytest.mark.parametrize(
    "operation",
    [fold_batch_normalization, functools.partial(swap_normalization, to="layer")],
)
class TestRefused:
    def test_subclassed(self, operation):
        model = Subclassed()
        model(np.ones((2, 3), "float32"))
        with pytest.raises(ValueError, match=r"Received: model=.subclassed.*a subclassed model"):
            operation(model)

    def test_own_constructor(self, operation):
        with pytest.raises(ValueError, match="of the class OwnConstructor"):
            operation(OwnConstructor(3))

    def test_arguments_that_would_be_lost(self, operation):
        with pytest.raises(ValueError, match=r"Received: Scaled '.*lacks \['alpha'\]"):
            operation(dense_and_norm(Scaled, alpha=7))

    def test_unbuilt(self, operation):
        model = keras.Sequential([keras.layers.Dense(3), ours.BatchNormalization()], name="m")
        with pytest.raises(ValueError, match="Received: model='m', a Sequential without input"):
            operation(model)

    def test_no_model(self, operation):
        with pytest.raises(ValueError, match=r"Only a keras.Model can be rebuilt|must have norm"):
            operation(keras.layers.Dense(3))

    def test_own_step_is_kept(self, operation):
        inputs = keras.Input((4,))
        norm = ours.BatchNormalization()
        model = OwnStep(inputs, norm(keras.layers.Dense(3)(inputs)))
        result = operation(model)
        result = result[0] if isinstance(result, tuple) else result
        assert result.answer() == 42

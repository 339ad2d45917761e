"""The nets, `make_normalization`, and another normalization in a model that exists."""

import functools
import json
import re

import keras
import numpy as np
import pytest
from arrays import array
from keras import ops

from keras_norm import datasets, optimizers, research
from keras_norm import layers as ours
from keras_norm.models import (
    CNN,
    MLP,
    NORMALIZATIONS,
    FastConvNet,
    LeNet,
    TwoLayerNet,
    WhiteningConv2D,
    WideMLP,
    make_normalization,
    make_variables,
    restart,
    swap_normalization,
)

pytestmark = pytest.mark.core

OF_POSITIONS = {"filter_response", "instance", "spatial"}  # that need images


def convolutional(normalization, name="net"):
    """A small net that every normalization fits into."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = make_normalization(normalization, "norm")(x)
    x = keras.layers.Dropout(0.5)(keras.layers.ReLU()(x))
    y = keras.layers.Dense(2, name="dense")(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, y, name=name)


def images(n=4):
    return np.random.default_rng(0).normal(size=(n, 8, 8, 3)).astype("float32")


# make_normalization -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_name_makes_a_layer_that_trains(name):
    model = convolutional(name)
    layer = model.get_layer("norm")
    assert type(layer).__name__.lower().startswith(name.replace("_", ""))
    model.compile("sgd", "mse")
    before = [array(v).copy() for v in layer.trainable_weights]
    model.fit(images(), np.ones((4, 2)), verbose=0)
    after = layer.trainable_weights
    assert any((array(a) != b).any() for a, b in zip(after, before, strict=True))
    assert np.isfinite(model.predict(images(), verbose=0)).all()


@pytest.mark.parametrize("name", sorted(set(NORMALIZATIONS) - OF_POSITIONS))
def test_every_other_name_fits_after_dense_layers(name):
    model = LeNet(name)
    assert model.predict(np.zeros((1, 28, 28, 1), "float32"), verbose=0).shape == (1, 10)


@pytest.mark.parametrize("name", sorted(OF_POSITIONS))
def test_a_mapping_places_those_that_need_images(name):
    model = LeNet({"conv1": name, "conv2": name})
    assert model.get_layer("conv2_norm").name == "conv2_norm"
    with pytest.raises(ValueError, match="imensions"):
        LeNet(name)


def test_make_normalization():
    assert make_normalization(None, "n") is None
    layer = make_normalization(functools.partial(ours.BatchNormalization, momentum=0.5), "n")
    assert (layer.name, layer.momentum) == ("n", 0.5)
    assert isinstance(make_normalization(keras.layers.UnitNormalization, "n"), keras.layers.Layer)
    assert make_normalization(lambda: ours.RMSNormalization(name="own"), "n").name == "own"
    for wrong in ("batchnorm", 3, ours.BatchNormalization(), int):
        with pytest.raises(ValueError, match="Received: "):
            make_normalization(wrong, "n")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"normalization": {"conv9": "batch"}}, r"unknown positions \['conv9'\]"),
            ({"normalization": ["batch"]}, "Received: 1 entries"),
            ({"placement": "around"}, "Received: placement='around'"),
            ({"dropout": 1.0}, "Received: dropout=1.0"),
            ({"classes": 0}, "Received: classes=0"),
            ({"padding": "full"}, "Received: padding='full'"),
            ({"dropout": None}, "Received: dropout=None"),
            ({"input_shape": (8, 8, 1)}, r"Received: input_shape=\(8, 8, 1\)"),
            ({"input_shape": (None, None, 1)}, r"Received: input_shape=\(None, None, 1\)"),
        ],
    )
    def test_lenet(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LeNet(**arguments)

    def test_mlp(self):
        with pytest.raises(ValueError, match=r"Received: hidden=\(5, 0\)"):
            MLP((5, 0))
        with pytest.raises(ValueError, match="Received: input_shape=4"):
            MLP((5,), input_shape=4)
        with pytest.raises(ValueError, match="Received: hidden=64"):
            MLP(64)

    def test_cnn(self):
        with pytest.raises(ValueError, match="Received: widths=3"):
            CNN(3)
        with pytest.raises(ValueError, match="Received: dense=64"):
            CNN((8,), dense=64)
        with pytest.raises(ValueError, match=r"Received: kernel_size=3\.0"):
            CNN((8,), kernel_size=3.0)
        with pytest.raises(ValueError, match=r"Received: blocks=\[True\]"):
            CNN((8,), blocks=True)
        with pytest.raises(ValueError, match=r"Received: input_shape=\(None, None, 3\), head="):
            CNN((8,), head="flatten", input_shape=(None, None, 3))
        model = CNN((4, 4), None, input_shape=(None, None, 3))
        assert [model(np.ones((1, n, n, 3))).shape for n in (4, 9)] == [(1, 10)] * 2


@pytest.mark.parametrize("size", [np.int64(3), [np.int64(3)]])
def test_sizes_of_numpy_are_kept_as_json_has_them(size):
    convolution = CNN((4,), None, kernel_size=size, blocks=np.int64(1)).get_layer("conv1_1")
    assert json.dumps(convolution.get_config()["kernel_size"]) == "[3, 3]"
    three = {"classes": np.int64(3), "input_shape": (16, 16, 1)}
    for model in (MLP([np.int64(5)], **three), LeNet(**three), FastConvNet([np.int64(4)], **three)):
        assert model.output_shape == (None, 3)
        assert json.dumps(model.layers[-1].get_config())


@pytest.mark.slow_on_jax
def test_published_perceptrons():
    """What is given reaches the `MLP` beneath; without it they are the published nets."""
    small = {"input_shape": (2, 2, 1), "classes": 3}
    two = [type(layer).__name__ for layer in TwoLayerNet(**small).layers]
    assert two == ["InputLayer", "Flatten", "Dense", "Activation", "Dense"]
    assert TwoLayerNet("batch", hidden=5, **small).count_params() == 5 * 5 + 4 * 5 + 6 * 3
    wide = WideMLP(**small)
    units = [layer.units for layer in wide.layers if isinstance(layer, keras.layers.Dense)]
    assert units == [1024, 512, 256, 3]
    kinds = [type(layer).__name__ for layer in wide.layers]
    assert kinds[2:6] == ["Dense", "LayerNormalization", "Activation", "Dropout"]
    assert wide.get_layer("dense1_dropout").rate == 0.5
    assert not any("dropout" in y.name for y in WideMLP("batch", dropout=0.0, **small).layers)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_logits_are_not_rounded_to_half_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        nets = [LeNet(), MLP((4,)), CNN((4,)), FastConvNet((4, 4))]
    finally:
        keras.config.set_dtype_policy(before)
    wanted = "float64" if policy == "float64" else "float32"
    assert [net.output.dtype for net in nets] == [wanted] * 4


@pytest.mark.parametrize(
    "build",
    [
        lambda: LeNet(["spatial", "spatial", "batch", "batch"]),
        lambda: MLP((4,), input_shape=(8, 8, 3)),
        lambda: CNN((4, 8), "spatial", residual=True),
        lambda: CNN((4, 8), head="flatten", downsample="max_pool"),
        lambda: CNN((4, 8), head="max", downsample="stride"),
        lambda: FastConvNet((4, 8, 8), "spatial", input_shape=(32, 32, 3)),
    ],
)
def test_channels_are_last_whatever_keras_assumes(build):
    before = keras.config.image_data_format()
    expected = build().to_json()
    keras.config.set_image_data_format("channels_first")
    try:
        assert build().to_json() == expected
    finally:
        keras.config.set_image_data_format(before)


def test_placement_and_dropout():
    model = LeNet(placement="after", dropout=0.2, activation="relu")
    names = [y.name for y in model.layers]
    start = names.index("conv1")
    expected = ["conv1", "conv1_activation", "conv1_norm", "conv1_dropout", "pool1"]
    assert names[start : start + 5] == expected
    model = MLP((4,), ["layer"], input_shape=(2, 3), classes=3, use_bias=False)
    assert [y.name for y in model.layers][2:4] == ["dense1", "dense1_norm"]
    assert model.count_params() == 6 * 4 + 8 + 4 * 3 + 3


# swap_normalization -----------------------------------------------------------------------------


def snapshot(model):
    return model.get_config(), [np.array(array(v)) for v in model.variables]


def swap(model, to):
    """Swaps, and holds the outcome against everything that is promised of it."""
    before = snapshot(model)
    new = swap_normalization(model, to)
    assert model.get_config() == before[0]
    for a, b in zip(snapshot(model)[1], before[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(new) is type(model)
    assert new.name == model.name
    assert not {id(v) for v in new.variables} & {id(v) for v in model.variables}
    by_name = {y.name: y for y in model.layers}
    for layer in new.layers:
        old = by_name[layer.name]
        if type(layer) is type(old):
            for a, b in zip(layer.weights, old.weights, strict=True):
                np.testing.assert_array_equal(array(a), array(b))
    return new


def randomized(model):
    rng = np.random.default_rng(3)
    for v in model.weights:
        v.assign(rng.random(v.shape) + 0.5)
    return model


@pytest.mark.parametrize("name", [*NORMALIZATIONS, None])
def test_swap_is_as_if_made_so(name):
    """The same outputs as the model made with that normalization, with the same weights."""
    model = randomized(convolutional("batch"))
    new = swap(model, name)
    made = convolutional(name if name is not None else lambda: keras.layers.Identity(name="norm"))
    assert len(made.weights) == len(new.weights)
    made.set_weights(new.get_weights())
    np.testing.assert_array_equal(array(new(images())), array(made(images())))
    if name is not None:
        old, layer = model.get_layer("norm"), new.get_layer("norm")
        scale = layer.scale if name == "rms" else layer.gamma
        np.testing.assert_array_equal(array(scale), array(old.gamma))
        if name in ("batch", "spatial"):
            np.testing.assert_array_equal(array(layer.moving_mean), array(old.moving_mean))
            np.testing.assert_array_equal(array(new(images())), array(model(images())))


@pytest.mark.parametrize("builtin", ["BatchNormalization", "LayerNormalization"])
def test_swap_of_keras_layers(builtin):
    """From the built-in layer to ours and back: same weights, same numbers."""
    kind = getattr(keras.layers, builtin)
    model = randomized(convolutional(kind))
    new = swap(model, getattr(ours, builtin))
    np.testing.assert_allclose(array(new(images())), array(model(images())), rtol=1e-4)
    back = swap(new, kind)
    np.testing.assert_array_equal(array(back(images())), array(model(images())))


FAMILIES = {
    "batch": (
        [ours.BatchNormalization, keras.layers.BatchNormalization, "batch", "spatial"],
        {
            "momentum": 0.9,
            "moving_variance_initializer": keras.initializers.Constant(2.0),
            "renorm": True,
            "renorm_clipping": {"rmax": 3.0},
        },
    ),
    "group": (
        [ours.GroupNormalization, keras.layers.GroupNormalization, "group"],
        {"groups": 2},
    ),
    "instance": ([ours.InstanceNormalization, "instance"], {}),
    "layer": ([ours.LayerNormalization, keras.layers.LayerNormalization, "layer"], {}),
    "rms": ([ours.RMSNormalization, keras.layers.RMSNormalization, "rms"], None),
    "decorrelated": ([research.DecorrelatedBatchNormalization, "decorrelated"], {"group_size": 2}),
    "quantile": ([research.QuantileNormalization, "quantile"], {"quantiles": 8}),
    "filter_response": ([research.FilterResponseNormalization, "filter_response"], None),
}


def squared(w):
    """A regularizer that Keras could not make from a configuration."""
    return ops.sum(w**2)


@pytest.mark.parametrize("family", FAMILIES)
def test_swap_within_a_family_keeps_the_arguments(family):
    """Without its epsilon a layer would not give the numbers that its statistics are for."""
    kinds, options = FAMILIES[family]
    if options is not None:
        options = {"beta_constraint": "non_neg", "gamma_regularizer": squared, **options}
    for kind in (k for k in kinds if not isinstance(k, str)):
        model = randomized(convolutional(functools.partial(kind, epsilon=0.01, **options or {})))
        old = model.get_layer("norm")
        for to in kinds:
            new = swap(model, to).get_layer("norm")
            assert new.epsilon == 0.01
            for name in options or {}:
                assert getattr(new, name) == getattr(old, name)
            y = array(swap(model, to)(images()))
            np.testing.assert_allclose(y, array(model(images())), rtol=1e-4, atol=1e-5)


def test_swap_between_families_does_not():
    model = convolutional(functools.partial(ours.BatchNormalization, epsilon=0.01, center=False))
    new = swap(model, "layer").get_layer("norm")
    assert (new.epsilon, new.center) == (1e-3, True)


@pytest.mark.parametrize("kind", [ours.BatchNormalization, keras.layers.BatchNormalization])
def test_swap_without_gamma_and_beta(kind):
    model = randomized(convolutional(functools.partial(kind, scale=False, center=False)))
    new = swap(model, "batch")
    assert len(new.weights) == len(model.weights)
    np.testing.assert_allclose(array(new(images())), array(model(images())), rtol=1e-4)


def test_swap_keeps_what_ours_alone_know():
    options = {"unbiased": True, "virtual_batch_size": 2, "use_batch_statistics": True}
    model = convolutional(functools.partial(ours.BatchNormalization, **options))
    new = swap(model, "spatial").get_layer("norm")
    assert {name: getattr(new, name) for name in options} == options
    model = convolutional(functools.partial(ours.BatchNormalization, momentum=None))
    assert swap(model, keras.layers.BatchNormalization).get_layer("norm").momentum == 0.99
    model = convolutional(functools.partial(ours.GroupNormalization, groups=None))
    new = swap(model, keras.layers.GroupNormalization).get_layer("norm")
    assert new.groups == model.get_layer("norm").gamma.shape[0]


def test_swap_keeps_what_a_factory_gives():
    class Own(ours.BatchNormalization):
        def __init__(self, **options):
            super().__init__(epsilon=0.5, **options)

    model = convolutional(functools.partial(ours.BatchNormalization, epsilon=0.01, momentum=0.9))
    for to, expected in (
        (functools.partial(ours.BatchNormalization, epsilon=0.1), (0.1, 0.9)),
        (functools.partial(ours.BatchNormalization, -1, 0.8), (0.01, 0.8)),
        (lambda name: ours.BatchNormalization(name=name), (1e-3, 0.99)),
        (Own, (0.5, 0.99)),
    ):
        new = swap(model, to).get_layer("norm")
        assert (new.epsilon, new.momentum) == expected


def test_swap_lenet_and_mlp():
    model = randomized(LeNet("batch"))
    new = swap(model, functools.partial(ours.GroupNormalization, groups=2))
    assert [y.groups for y in new.layers if "norm" in y.name] == [2, 2, 2, 2]
    model = randomized(MLP((4, 3), "layer", input_shape=(5,)))
    new = swap(model, "batch")
    assert isinstance(new.get_layer("dense2_norm"), ours.BatchNormalization)
    assert len(swap(model, None).layers) == len(model.layers) - 2


def test_swap_in_sequential_and_nested_models():
    block = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4), ours.BatchNormalization(name="norm")],
        name="block",
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, block(block(inputs)), name="twice")
    for to, kind in (("layer", ours.LayerNormalization), (None, keras.layers.Dense)):
        new = swap_normalization(model, to)
        inner = new.get_layer("block")
        assert type(inner.layers[-1]) is kind
        x = np.ones((2, 4), "float32")
        np.testing.assert_allclose(array(new(x)), array(inner(inner(x))), rtol=1e-6)
    assert type(swap_normalization(block, "rms")) is keras.Sequential


def test_swap_keeps_shared_layers_shared():
    norm = ours.BatchNormalization(name="norm")
    inputs = [keras.Input((3,)), keras.Input((3,))]
    model = keras.Model(inputs, [norm(x) for x in inputs])
    new = swap(model, "layer")
    assert len([y for y in new.layers if y.name == "norm"]) == 1
    assert len(new.weights) == 2


def test_swap_keeps_axis_dtype_and_trainable():
    inputs = keras.Input((4, 6, 6), dtype="float64")
    norm = ours.BatchNormalization(axis=1, dtype="float64", trainable=False, name="norm")
    model = keras.Model(inputs, norm(inputs))
    for to in ("group", "instance", "batch", "decorrelated", "quantile", "filter_response"):
        new = swap(model, to).get_layer("norm")
        assert (new.axis, new.compute_dtype, new.trainable) == (1, "float64", False)
        assert tuple(new.gamma.shape) == (4,)
    assert swap(model, "spatial").get_layer("norm").data_format == "channels_first"
    own = functools.partial(ours.GroupNormalization, groups=2, axis=-1, dtype="float32")
    new = swap(model, own).get_layer("norm")
    assert (new.axis, new.compute_dtype) == (-1, "float32")


def test_swap_keeps_masks_of_training():
    """Dropout has its seed state, and the new layer takes part in training."""
    model = convolutional("batch")
    model.compile("sgd", "mse")
    new = swap(model, "decorrelated")
    assert new.compiled
    before = array(new.get_layer("norm").moving_covariance).copy()
    new.fit(images(), np.ones((4, 2)), verbose=0)
    assert np.abs(array(new.get_layer("norm").moving_covariance) - before).max() > 1e-4
    assert isinstance(new.get_layer("norm"), research.DecorrelatedBatchNormalization)


def test_swap_errors():
    model = convolutional("batch")
    with pytest.raises(ValueError, match="Received: normalization='nothing'"):
        swap_normalization(model, "nothing")
    with pytest.raises(ValueError, match="Received: model='mlp' without any"):
        swap_normalization(MLP((3,), None, input_shape=(4,)), "batch")
    with pytest.raises(ValueError, match="an input of 2 dimensions"):
        swap_normalization(MLP((3,), "batch", input_shape=(4,)), "instance")
    inputs = keras.Input((4, 4, 2))
    several = keras.Model(inputs, ours.LayerNormalization(axis=(1, 2, 3), name="n")(inputs))
    with pytest.raises(ValueError, match=r"axis=\(1, 2, 3\) of 'n', to become GroupNormalization"):
        swap_normalization(several, "group")
    assert swap_normalization(several, "rms").get_layer("n").axis == (1, 2, 3)


@pytest.mark.parametrize(("axis", "data_format"), [(-3, "channels_first"), (3, "channels_last")])
def test_swap_for_a_spatial_one_keeps_the_axis(axis, data_format):
    inputs = keras.Input((3, 8, 5))
    norm = keras.layers.BatchNormalization(axis=axis, name="n")
    new = swap(keras.Model(inputs, norm(inputs)), "spatial").get_layer("n")
    assert (new.data_format, new.gamma.shape) == (data_format, norm.gamma.shape)
    other = keras.Model(inputs, keras.layers.BatchNormalization(axis=2, name="n")(inputs))
    with pytest.raises(ValueError, match="Received: axis=2 of 'n'"):
        swap_normalization(other, "spatial")


# From the beginning again


def net_to_restart(learning_rate=0.05):
    net = MLP([6, 5], "batch", dropout=0.25, input_shape=(4,), classes=3)
    net.compile(
        optimizers.Adagrad(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return net


def fitted(net):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.integers(0, 3, 40)
    losses = net.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0).history["loss"]
    return losses, [ops.convert_to_numpy(w) for w in net.weights]


def test_restarted_model_trains_like_a_new_one():
    net = net_to_restart()
    fitted(net)  # on PyTorch, Keras lets the first `fit` of a model run its dropout once more
    restart(net, seed=3)
    first_losses, first = fitted(net)
    restart(net, seed=4, learning_rate=0.5)
    other_losses, _ = fitted(net)
    assert other_losses[-1] != first_losses[-1]
    new = net_to_restart(0.01)
    fitted(new)
    for each in (net, new):
        restart(each, seed=3, learning_rate=0.05)
        losses, weights = fitted(each)
        assert losses == first_losses
        for a, b in zip(weights, first, strict=True):
            np.testing.assert_array_equal(a, b)
    assert int(net.optimizer.iterations) == 8


def test_restart_where_losses_are_scaled():
    """Keras's LossScaleOptimizer would make its variables once more."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        net = MLP([4], "batch", input_shape=(4,), classes=3)
    finally:
        keras.config.set_dtype_policy(before)
    net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert type(net.optimizer).__name__ == "LossScaleOptimizer"
    x, y = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.arange(8) % 3
    net.fit(x, y, verbose=0)
    count = len(net.optimizer.variables)
    restart(net, seed=0)
    assert len(net.optimizer.variables) == count
    assert int(net.optimizer.iterations) == 0


@pytest.mark.parametrize("nested", [False, True])
def test_restart_keeps_what_was_measured(nested, tmp_path):
    """What `adapt` has measured is of the data; all else is as in a new model."""
    x = np.random.default_rng(0).normal(50, 20, (8, 6, 6, 2)).astype("float32")
    norm, white = keras.layers.Normalization(), WhiteningConv2D()
    norm.adapt(x)
    measures = [norm, white]
    if nested:
        measures = [keras.Sequential([keras.Input(x.shape[1:]), *measures])]
    layers = [*measures, keras.layers.Flatten(), keras.layers.Dense(2)]
    net = keras.Sequential([keras.Input(x.shape[1:]), *layers])
    white.adapt(array(norm(x)))
    net.compile("sgd", "mse", jit_compile=False)
    restart(net, seed=0)
    measured = [array(v).copy() for v in (*norm.variables, white.kernel)]
    first = net.predict(x, verbose=0)
    net.fit(x, np.ones((8, 2)), verbose=0)
    assert np.abs(array(white.bias)).max() > 0
    restart(net, seed=0)
    assert np.abs(array(white.bias)).max() == 0
    np.testing.assert_array_equal(net.predict(x, verbose=0), first)
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), first)
    for a, b in zip((*norm.variables, white.kernel), measured, strict=True):
        np.testing.assert_array_equal(array(a), b)
    np.testing.assert_allclose(measured[0], x.mean((0, 1, 2)), rtol=1e-5)


def test_restart_of_a_net_with_a_loss_of_its_own():
    """Of a function Keras could make no configuration, to compile a copy by."""

    def loss(y, z):
        return ops.mean((y - z) ** 2, axis=-1)

    net = MLP([4], None, input_shape=(4,))
    net.compile("sgd", loss)
    restart(net, seed=0)
    assert net.compiled
    net.fit(np.ones((2, 4)), np.ones((2, 10)), verbose=0)


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """Not registered, and without a configuration."""

    def __call__(self, step):
        return 0.5 ** ops.cast(step, "float32")


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("nested", [False, True])
def test_restart_where_functions_are_the_users(nested):
    inputs = keras.Input((4,))
    twice = keras.layers.Lambda(lambda t: 2 * t, output_shape=(5,))
    net = keras.Model(inputs, twice(ours.BatchNormalization()(keras.layers.Dense(5)(inputs))))
    if nested:
        net = keras.Sequential([inputs, keras.layers.Dropout(0.5), net])
    net.compile(optimizers.SGD(Halving()), "mse", run_eagerly=True)
    x, y = np.random.default_rng(0).normal(size=(8, 4)), np.ones((8, 5))
    losses = []
    for _ in range(3):
        restart(net, seed=0)
        losses.append(net.fit(x, y, batch_size=4, verbose=0).history["loss"])
    assert losses[1] == losses[2]


def test_restart_of_a_quantized_net():
    """Its layers have their variables in another order than layers that begin so."""
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(2)])
    net.layers[0].quantize("float8")
    whole = keras.Sequential([keras.Input((4,)), net])
    for each in (net, whole):
        each.compile(optimizers.SGD(0.1), "mse")
        before = [tuple(v.shape) for v in each.weights]
        for v in each.trainable_variables:
            v.assign(ops.ones(v.shape))
        restart(each, seed=0, learning_rate=0.5)
        assert [tuple(v.shape) for v in each.weights] == before
        assert np.abs(array(net.layers[0].kernel) - 1).min() > 0
        np.testing.assert_array_equal(array(net.layers[0].bias), 0)
        assert float(each.optimizer.learning_rate) == 0.5


def test_a_restart_that_fails_changes_nothing():
    class Once(keras.layers.Dense):
        def get_config(self):
            return {**super().get_config(), "units": 7}

    net = keras.Sequential([keras.Input((4,)), Once(3, name="once")])
    net.compile(optimizers.SGD(0.1), "mse")
    before = [array(v).copy() for v in net.variables]
    with pytest.raises(ValueError, match=r"Received: layer 'once'.*\(4, 3\).*\(4, 7\)"):
        restart(net, seed=0, learning_rate=0.5)
    for v, value in zip(net.variables, before, strict=True):
        np.testing.assert_array_equal(array(v), value)
    assert float(net.optimizer.learning_rate) == pytest.approx(0.1)


def test_restart_refuses():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    own = Own()
    own.compile("sgd", "mse")
    own(np.ones((1, 4)))
    with pytest.raises(ValueError, match="Received: Own"):
        restart(own, seed=0)
    net = net_to_restart()
    before = [array(w) for w in net.weights]
    for rate in (-1.0, float("nan"), True, "0.1", np.float32(-1)):
        with pytest.raises(ValueError, match=re.escape(f"Received: learning_rate={rate!r}")):
            restart(net, seed=0, learning_rate=rate)
    for a, b in zip(net.weights, before, strict=True):
        np.testing.assert_array_equal(array(a), b)


def test_an_optimizer_is_needed():
    net = MLP([4], None, input_shape=(4,))
    with pytest.raises(ValueError, match=r"`restart`.*without an optimizer"):
        restart(net, seed=0)
    with pytest.raises(ValueError, match=r"`make_variables`.*without an optimizer"):
        make_variables(net, np.ones((1, 4)), np.ones(1))


def test_restart_refuses_a_new_rate_where_a_schedule_sets_it():
    net = MLP([4], None, input_shape=(4,))
    net.compile(optimizers.SGD(optimizers.CyclicalLearningRate(0.1, 0.2, 3)), "mse")
    before = [array(w) for w in net.weights]
    with pytest.raises(TypeError, match="LearningRateSchedule"):
        restart(net, seed=0, learning_rate=0.1)
    for a, b in zip(net.weights, before, strict=True):
        np.testing.assert_array_equal(array(a), b)
    net.compile(optimizers.SGD(lambda: 0.25), "mse")
    with pytest.raises(TypeError, match=r"Received: learning_rate=0\.1, where <function"):
        restart(net, seed=0, learning_rate=0.1)
    for a, b in zip(net.weights, before, strict=True):
        np.testing.assert_array_equal(array(a), b)
    restart(net, seed=123)
    assert any((array(a) != b).any() for a, b in zip(net.weights, before, strict=True))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="makes them itself")
def test_a_training_step_is_traced_once():
    """Keras would make the variables of optimizer and metrics in a first trace of two."""
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    data = datasets.load("digits", subset={"train": 64}, validation=0.1)
    model = keras.Sequential(
        [
            keras.Input(data.input_shape),
            Traced(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(data.classes),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"], jit_compile=False)
    before = [np.array(v) for layer in model.layers for v in layer.variables]
    make_variables(model, data.train.x, data.train.y)
    after = [np.array(v) for layer in model.layers for v in layer.variables]
    for old, new in zip(before, after, strict=True):  # weights, and the state of the dropout
        np.testing.assert_array_equal(old, new)
    assert all(float(value) == 0 for value in model.get_metrics_result().values())
    traces.clear()
    model.fit(data.train.batches(32), epochs=2, shuffle=False, verbose=0)
    assert len(traces) == 1

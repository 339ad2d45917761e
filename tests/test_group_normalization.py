"""Group and instance normalization: values, gradients, hard numbers, and the layers around them."""

from functools import partial

import keras
import numpy as np
import pytest
import reference_layer as reference
from arrays import array, check_parameters, data, dtype_of, rounded, tensor, wide
from differentiation import (
    BACKEND,
    compiled,
    measured_gradient,
    penalty_and_gradient,
    step_in_training,
    value_and_gradients,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import ops
from reference import channel_axes, complex_step, relative_error

from keras_norm import functional
from keras_norm._gradients import gradients
from keras_norm.gradient_check import check
from keras_norm.layers import GroupNormalization, InstanceNormalization, LayerNormalization
from keras_norm.models import LeNet

pytestmark = pytest.mark.core

LAYERS = [GroupNormalization, InstanceNormalization]


LAYOUTS = [
    ((4, 6), -1, 2),
    ((3, 4, 6), -1, 3),
    ((3, 6, 4), 1, 2),
    ((2, 3, 2, 4), -1, 4),
    ((2, 4, 3, 2), 1, 2),
    ((2, 3, 4, 2), 2, 1),
    ((2, 3, 4, 2), -2, 2),
    ((2, 4, 3, 2), -3, 2),
    ((2, 2, 3, 2, 4), -1, 2),
    ((2, 4, 2, 2, 3), 1, 4),
]


@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 3, 6), (2, 3, 2, 6)])
@pytest.mark.parametrize("scale", [True, False])
def test_as_the_first_layer(shape, scale):
    """Of gamma and beta alone is there a gradient: PyTorch's kernel breaks down on some layouts."""
    trained = []
    for cls in (GroupNormalization, keras.layers.GroupNormalization):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input(shape), cls(2, scale=scale), keras.layers.Flatten(), keras.layers.Dense(2)]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.train_on_batch(data((4, *shape), -1)[0].astype("float32"), np.ones((4, 2), "float32"))
        trained.append(model.get_weights())
    for ours, builtin in zip(*trained, strict=True):
        np.testing.assert_allclose(ours, builtin, rtol=1e-4, atol=1e-5)


def test_gradient_of_gamma_alone():
    """The inputs have a gradient, and nobody asks for it."""
    x, _, _, mix = data((2, 3, 4, 6), -1)
    layer = GroupNormalization(2)
    layer.build(x.shape)

    def loss(x):
        return ops.sum(layer(x) * ops.convert_to_tensor(mix.astype("float32")))

    x = ops.convert_to_tensor(x.astype("float32"))
    _, expected = gradients(loss, [x], variables=layer.trainable_variables)
    if BACKEND == "torch":
        import torch

        x.requires_grad_()
        found = torch.autograd.grad(loss(x), [layer.gamma.value])
    else:
        _, found = gradients(lambda: loss(x), [], variables=[layer.gamma])
    np.testing.assert_allclose(array(found[0]), array(expected[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis", "groups"), LAYOUTS)
class TestAgainstReference:
    def test_group(self, shape, axis, groups):
        self.run(functional.group_normalization, reference.group_norm, shape, axis, groups=groups)

    def test_instance(self, shape, axis, groups):
        if len(shape) < 3:
            pytest.skip("an instance has no positions")
        self.run(functional.instance_normalization, reference.instance_norm, shape, axis)

    @staticmethod
    def run(function, expected, shape, axis, **options):
        options |= {"axis": axis, "epsilon": 1e-2}
        x, gamma, beta, mix = data(shape, axis)
        y, analytic = value_and_gradients(lambda *a: function(*a, **options), [x, gamma, beta], mix)
        exact = expected(x, gamma, beta, **options)
        np.testing.assert_allclose(array(y), exact, rtol=1e-12, atol=1e-13)
        numerical = complex_step(lambda *a: (expected(*a, **options) * mix).sum(), [x, gamma, beta])
        for a, b in zip(analytic, numerical, strict=True):
            assert relative_error(array(a), b) < 1e-9


@pytest.mark.parametrize("given_", ["gamma", "beta", "neither"])
def test_without_gamma_or_beta(given_):
    x, gamma, beta, mix = data((2, 3, 4), -1)
    chosen = {"gamma": {"gamma": gamma}, "beta": {"beta": beta}, "neither": {}}[given_]

    def function(x, *values):
        parameters = dict(zip(chosen, values, strict=True))
        return functional.group_normalization(x, **parameters, groups=2)

    def expected(x, *values):
        return reference.group_norm(x, **dict(zip(chosen, values, strict=True)), groups=2)

    arrays = [x, *chosen.values()]
    y, analytic = value_and_gradients(function, arrays, mix)
    np.testing.assert_allclose(array(y), expected(*arrays), rtol=1e-12, atol=1e-13)
    exact = complex_step(lambda *a: (expected(*a) * mix).sum(), arrays)
    for a, b in zip(analytic, exact, strict=True):
        assert relative_error(array(a), b) < 1e-9


@pytest.mark.slow_on_jax
def test_relations():
    """Groups of one channel are instances; one group is an example, but for gamma and beta."""
    x, gamma, beta, _ = data((2, 3, 5, 6), -1)

    def group(**options):
        return array(functional.group_normalization(x, gamma, beta, **options))

    instance = array(functional.instance_normalization(x, gamma, beta))
    np.testing.assert_allclose(group(groups=6), instance, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(group(groups=-1), group(groups=6))
    layer = array(functional.layer_normalization(x, axis=(1, 2, 3))) * gamma + beta
    np.testing.assert_allclose(group(groups=1), layer, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(group(groups=None), group(groups=2))  # gcd(32, 6)


def test_channels_first_is_channels_last():
    x, gamma, beta, _ = data((2, 3, 5, 6), -1)
    last = array(functional.group_normalization(x, gamma, beta, groups=3))
    for axis in (1, 2, -2, -3):
        moved = np.moveaxis(x, -1, axis)
        y = array(functional.group_normalization(moved, gamma, beta, groups=3, axis=axis))
        np.testing.assert_allclose(np.moveaxis(y, axis, -1), last, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["group", "instance"])
def test_second_derivatives(name):
    x, gamma, beta, mix = data((1, 2, 4), -1)

    def loss(x):
        if name == "group":
            y = functional.group_normalization(x / 4, tensor(gamma), tensor(beta), groups=2)
        else:
            y = functional.instance_normalization(x, tensor(gamma), tensor(beta), epsilon=0.5)
        return ops.sum(y * y * y * tensor(mix))

    both = penalty_and_gradient(loss)
    second, measured = both(x)[1], measured_gradient(lambda x: both(x)[0], x)
    assert np.linalg.norm(measured) > 0.1
    assert relative_error(second, measured) < 1e-9


# Against others -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4, 5, 6), -1), ((3, 6, 5), 1), ((3, 4, 6, 5), -2), ((3, 6), -1)]
)
@pytest.mark.parametrize("groups", [1, 2, -1])
def test_as_keras(shape, axis, groups):
    x, gamma, beta, _ = data(shape, axis)
    ours = GroupNormalization(groups, axis)
    theirs = keras.layers.GroupNormalization(groups, axis)
    for layer in (ours, theirs):
        layer.build(shape)
    assert [w.path.split("/")[-1] for w in ours.weights] == ["gamma", "beta"]
    ours.set_weights([gamma, beta])
    theirs.set_weights(ours.get_weights())
    x = x.astype("float32")
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), atol=5e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch is installed with its backend alone")
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 6, 4, 3), (2, 6, 2, 3, 2)])
def test_as_pytorch(shape):
    import torch

    x, gamma, beta, _ = map(torch.tensor, data(shape, 1))
    group = functional.group_normalization(x, gamma, beta, groups=3, axis=1, epsilon=1e-5)
    theirs = torch.nn.functional.group_norm(x, 3, gamma, beta, 1e-5)
    np.testing.assert_allclose(array(group), array(theirs), rtol=1e-11, atol=1e-12)
    instance = functional.instance_normalization(x, gamma, beta, axis=1, epsilon=1e-5)
    theirs = torch.nn.functional.instance_norm(x, weight=gamma, bias=beta, eps=1e-5)
    np.testing.assert_allclose(array(instance), array(theirs), rtol=1e-11, atol=1e-12)


# Numbers that break others ------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e3, 1e5])
@pytest.mark.parametrize("cls", LAYERS)
def test_large_mean_in_float32(cls, mean):
    """No digit is lost, where Keras's layer, x inv_std - mean inv_std, loses two or four.

    (On PyTorch, with E[x^2] - E[x]^2 for the variance, it has none, or NaN.)
    """
    x = (mean + np.random.default_rng(0).normal(size=(2, 16, 16, 4))).astype("float32")
    layer, groups = (cls(2), 2) if cls is GroupNormalization else (cls(), 4)
    expected = reference.group_norm(x.astype("float64"), groups=groups)
    np.testing.assert_allclose(array(layer(x)), expected, atol=3e-6)
    theirs = array(keras.layers.GroupNormalization(groups)(x))
    assert not np.abs(theirs - expected).max() < 2e-8 * mean  # NaN is not


def test_large_images_in_float32():
    """A sum in one go is off by 1.5e-4 for the variance of so many."""
    x = (1 + np.random.default_rng(0).normal(size=(1, 256, 256, 4))).astype("float32")
    y = functional.group_normalization(x, groups=2)
    expected = reference.group_norm(x.astype("float64"), groups=2)
    np.testing.assert_allclose(array(y), expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 1000.1, 60000.0])
def test_constant_channels(dtype, value):
    x, beta = ops.cast(np.full((2, 5, 4), value), dtype), np.array([-1, 0, 0.5, 2], "float32")
    for y in (
        functional.group_normalization(x, beta=beta, groups=4),
        functional.instance_normalization(x, beta=beta),
    ):
        np.testing.assert_allclose(wide(y), np.broadcast_to(beta, y.shape), atol=1e-6)


def test_one_element_and_none():
    """One position has variance 0 and gradient 0; of no examples nothing breaks."""
    x, gamma, beta, mix = data((2, 1, 3), -1)
    y, (dx, dgamma, _) = value_and_gradients(
        functional.instance_normalization, [x, gamma, beta], mix
    )
    np.testing.assert_array_equal(array(y), np.broadcast_to(beta, (2, 1, 3)))
    np.testing.assert_allclose(array(dx), 0, atol=1e-12)
    np.testing.assert_array_equal(array(dgamma), 0)
    for shape in ((0, 4, 2), (3, 0, 2)):
        x, beta = np.zeros(shape), np.ones(2)
        for function in (functional.instance_normalization, functional.group_normalization):
            options = {} if function is functional.instance_normalization else {"groups": 2}
            _, (dx, dbeta) = value_and_gradients(
                lambda x, b, f=function, o=options: f(x, beta=b, **o), [x, beta], x
            )
            assert dx.shape == shape
            np.testing.assert_array_equal(array(dbeta), 0)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_one_bad_group_leaves_the_others(bad):
    x, gamma, beta, _ = data((2, 3, 4), -1)
    clean = array(functional.group_normalization(x, gamma, beta, groups=2))
    x[1, 2, 0] = bad
    y = array(functional.group_normalization(x, gamma, beta, groups=2))
    np.testing.assert_array_equal(y[0], clean[0])
    np.testing.assert_array_equal(y[1, :, 2:], clean[1, :, 2:])
    assert not np.isfinite(y[1, :, :2]).any()


TOLERANCE = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-6, "float64": 1e-13}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    """Values and gradients are those of float64, rounded once at the end."""
    x, gamma, beta, mix = data((2, 3, 3, 4), -1)
    x = rounded(x, dtype)
    y, given_ = value_and_gradients(
        lambda *a: functional.group_normalization(*a, groups=2),
        [ops.cast(x, dtype), gamma, beta],
        mix,
    )
    exact = reference.group_norm(x, gamma, beta, groups=2)
    assert dtype_of(y) == dtype_of(given_[0]) == dtype
    np.testing.assert_allclose(wide(y), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    theirs = complex_step(
        lambda *a: (reference.group_norm(*a, groups=2) * mix).sum(), [x, gamma, beta]
    )
    for a, b in zip(given_, theirs, strict=True):
        assert relative_error(wide(a), b) < TOLERANCE[dtype]


def test_float16_near_its_largest_number():
    rng = np.random.default_rng(0)
    x = (6e4 + 2e3 * rng.standard_normal((2, 64, 4))).clip(None, 65504).astype("float16")
    y = functional.group_normalization(x, groups=2)
    expected = reference.group_norm(x.astype("float64"), groups=2)
    np.testing.assert_allclose(array(y), expected, rtol=6e-4, atol=2e-5)


# Compiled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["group", "instance"])
def test_compiled_as_eager(name):
    """In a graph the number of examples and the sizes of the images are unknown."""
    x, gamma, beta, mix = data((2, 3, 5, 4), -1)

    def values(x, mix):
        def loss(x, gamma, beta):
            if name == "group":
                y = functional.group_normalization(x, gamma, beta, groups=2)
            else:
                y = functional.instance_normalization(x, gamma, beta)
            return ops.sum(y * mix)

        value, grads = gradients(loss, [x, gamma, beta])
        return [value, *grads]

    eager = values(tensor(x), tensor(mix))
    for run in compiled(values, unknown=(0, 1, 2)):
        for a, b in zip(run(x, mix), eager, strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=1e-11, atol=1e-12)


# The layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_in_a_model_of_unknown_sizes(cls, axis):
    shape = (None, None, 6) if axis == -1 else (6, None, None)
    inputs = keras.Input(shape)
    layer = cls(2, axis) if cls is GroupNormalization else cls(axis)
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, *shape)
    x = np.random.default_rng(0).normal(size=[2, *(n or 5 for n in shape)]).astype("float32")
    np.testing.assert_allclose(model.predict(x, verbose=0), array(layer(x)), atol=1e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_layer_trains(cls):
    """`fit` finds the gamma and beta that made the targets."""
    x = np.random.default_rng(0).normal(size=(128, 6, 2)).astype("float32")
    arguments = {"groups": 1} if cls is GroupNormalization else {}
    target = cls(**arguments)
    target.build((None, 6, 2))
    target.set_weights([np.array([0.5, 2.0]), np.array([-1.0, 1.0])])
    model = keras.Sequential([keras.Input((6, 2)), cls(**arguments)])
    model.compile(keras.optimizers.SGD(0.2), "mse")
    history = model.fit(x, array(target(x)), batch_size=16, epochs=6, verbose=0)
    assert history.history["loss"][-1] < 1e-3 < history.history["loss"][0]
    for a, b in zip(model.layers[-1].get_weights(), target.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)


def test_gradient_check_of_the_layers():
    x = 5 * np.random.default_rng(1).normal(size=(2, 2, 2, 4)) + 12
    check(GroupNormalization(2, dtype="float64"), x).require(1e-9)
    check(InstanceNormalization(dtype="float64"), x).require(1e-9)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    """float32 inputs too large for float16 are normalized as they are; the weights are float32."""
    x = (np.random.default_rng(0).normal(size=(2, 8, 4)) * 2e5).astype("float32")
    for layer, groups in (
        (GroupNormalization(2, dtype=policy), 2),
        (InstanceNormalization(dtype=policy), 4),
    ):
        y = layer(x)
        assert dtype_of(y) == policy.removeprefix("mixed_")
        assert {dtype_of(w) for w in layer.weights} == {"float32"}
        expected = reference.group_norm(x.astype("float64"), groups=groups)
        np.testing.assert_allclose(wide(y), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("layer", [GroupNormalization(1), InstanceNormalization()])
def test_masks_pass_through(layer):
    x = np.array([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [2.0, 2.0]]], "float32")
    y = layer(keras.layers.Masking()(x))
    np.testing.assert_array_equal(
        array(keras.src.backend.get_keras_mask(y)), [[True, False], [True, True]]
    )


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (GroupNormalization, {}),
        (GroupNormalization, {"groups": -1, "axis": 1, "epsilon": 1e-5}),
        (GroupNormalization, {"groups": None, "scale": False, "beta_constraint": "non_neg"}),
        (InstanceNormalization, {"axis": 1, "center": False}),
        (InstanceNormalization, {"gamma_regularizer": "l2", "beta_initializer": "ones"}),
    ],
)
def test_config_round_trip(cls, arguments):
    layer = cls(**arguments, name="norm", dtype="float64")
    config = layer.get_config()
    assert cls.from_config(config).get_config() == config
    layer.build((2, 32, 3, 32))
    assert layer.get_config() == config  # build changes nothing
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"keras_norm>{cls.__name__}"
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config
    if cls is GroupNormalization:
        theirs = keras.layers.GroupNormalization().get_config()
        assert set(theirs) == set(config)
        assert cls.from_config(theirs).groups == 32


@pytest.mark.parametrize("cls", LAYERS)
def test_parameters_are_made_as_they_were_asked_for(cls):
    assert cls(axis=[-1]).axis == -1
    check_parameters(cls, (2, 3, 32), axis=[-1])


def test_saved_model(tmp_path):
    model = keras.Sequential(
        [keras.Input((4, 4, 6)), GroupNormalization(3), InstanceNormalization()]
    )
    for layer in model.layers:
        layer.set_weights([np.random.normal(size=6) for _ in layer.weights])
    x = np.random.normal(size=(3, 4, 4, 6)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == LAYERS
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_by_name_in_a_model():
    model = LeNet("group")
    assert model.get_layer("conv1_norm").groups is None
    assert model.predict(np.zeros((1, 28, 28, 1), "float32"), verbose=0).shape == (1, 10)
    model = LeNet({"conv1": "instance", "conv2": "instance", "dense1": "layer", "dense2": "rms"})
    assert isinstance(model.get_layer("conv1_norm"), InstanceNormalization)
    assert isinstance(model.get_layer("dense1_norm"), LayerNormalization)
    with pytest.raises(ValueError, match="After a dense layer use layer normalization"):
        LeNet("instance")


# Errors ------------------------------------------------------------------------------------------


class TestErrors:
    @pytest.mark.parametrize("groups", [0, -2, 1.5, "32"])
    def test_groups(self, groups):
        with pytest.raises(ValueError, match=r"`groups` is a number .*Received: groups="):
            GroupNormalization(groups)
        with pytest.raises(ValueError, match=r"`groups` is a number .*Received: groups="):
            functional.group_normalization(np.ones((2, 4)), groups=groups)

    def test_groups_of_numpy_are_kept_as_json_has_them(self):
        assert type(GroupNormalization(np.int64(2)).get_config()["groups"]) is int

    @pytest.mark.parametrize("groups", [3, 4, 12])
    def test_groups_that_do_not_divide_the_channels(self, groups):
        with pytest.raises(ValueError, match=f"Received: groups={groups}, channels=10"):
            GroupNormalization(groups).build((None, 5, 10))
        with pytest.raises(ValueError, match=f"Received: groups={groups}, channels=10"):
            functional.group_normalization(np.ones((2, 10)), groups=groups)

    @pytest.mark.parametrize("cls", LAYERS)
    @pytest.mark.parametrize("axis", [0, -3, 3, (1, 2), 1.0])
    def test_axis(self, cls, axis):
        with pytest.raises(ValueError, match=r"`axis` must be .*Received: axis="):
            cls(axis=axis).build((2, 32, 32))

    @pytest.mark.parametrize("cls", LAYERS)
    def test_unknown_channels(self, cls):
        with pytest.raises(ValueError, match=r"should have a defined dimension.*\(2, 3, None\)"):
            cls().build((2, 3, None))

    @pytest.mark.parametrize("cls", LAYERS)
    def test_epsilon_and_dtype(self, cls):
        with pytest.raises(ValueError, match=r"`epsilon` .*Received: epsilon=-1"):
            cls(epsilon=-1)
        with pytest.raises(ValueError, match="Received: dtype='int32'"):
            cls(dtype="int32")

    def test_instances_without_positions(self):
        with pytest.raises(ValueError, match="an input of 2 dimensions"):
            InstanceNormalization().build((None, 4))
        with pytest.raises(ValueError, match="an input of 2 dimensions"):
            functional.instance_normalization(np.ones((2, 4)))

    @pytest.mark.parametrize("cls", LAYERS)
    def test_another_input_than_built_for(self, cls):
        layer = cls()
        layer.build((None, 3, 32))
        for shape in ((2, 3, 64), (2, 3, 3, 32)):
            with pytest.raises(ValueError, match="incompatible with the layer"):
                layer(np.ones(shape, "float32"))


# Any layout ---------------------------------------------------------------------------------------


PROPERTY_TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-10}
# JAX compiles anew for every shape.
EXAMPLES = {"tensorflow": 25, "jax": 4, "torch": 40}[BACKEND]


@st.composite
def settings_of_a_layer(draw):
    rank = draw(st.integers(2, 5))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channel = draw(st.integers(1, rank - 1))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[channel] = groups * size
    return {
        "shape": tuple(shape),
        "axis": channel - rank if draw(st.booleans()) else channel,
        "groups": groups,
        "epsilon": draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        "dtype": draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
        "loc": draw(st.sampled_from([0.0, 1.0, 100.0])),
        "scale": draw(st.sampled_from([0.01, 1.0, 100.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("cls", LAYERS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(case=settings_of_a_layer(), center=st.booleans(), scaled=st.booleans())
def test_any_layout(cls, case, center, scaled):
    """Values and gradients of the layer for any rank, axis, groups, dtype and size of numbers.

    Tolerances, relative to the largest terms that are added or subtracted: `PROPERTY_TOLERANCE`.
    """
    rng = np.random.default_rng(case["seed"])
    dtype, axis, groups = case["dtype"], case["axis"], case["groups"]
    x = rounded(case["loc"] + case["scale"] * rng.normal(size=case["shape"]), dtype)
    mix = rounded(rng.normal(size=x.shape), dtype)
    options = {"axis": axis, "epsilon": case["epsilon"]}
    if cls is InstanceNormalization:
        assume(x.ndim > 2)
        function, groups = reference.instance_norm, x.shape[axis]
        layer = cls(**options, center=center, scale=scaled, dtype=dtype)
    else:
        function = partial(reference.group_norm, groups=groups)
        layer = cls(groups, **options, center=center, scale=scaled, dtype=dtype)
    layer.build(x.shape)
    # The parameters are kept in the dtype of the layer: numbers that every dtype can hold.
    values = [np.round(8 * rng.normal(size=w.shape)) / 8 for w in layer.weights]
    layer.set_weights(values)
    names = [w.name for w in layer.weights]
    assert names == [n for n, used in (("gamma", scaled), ("beta", center)) if used]

    def expected(x, *values):
        return function(x, **dict(zip(names, values, strict=True)), **options)

    y, slopes = step_in_training(layer, ops.cast(x, dtype), mix)
    tolerance = PROPERTY_TOLERANCE[dtype]
    assert dtype_of(y) == dtype_of(slopes[0]) == dtype
    np.testing.assert_allclose(wide(y), expected(x, *values), rtol=tolerance, atol=tolerance)
    exact = complex_step(lambda *a: (expected(*a) * mix).sum(), [x, *values])
    # Of groups of one or two elements the terms of (GN5) cancel.
    inv_std = 1 / np.sqrt(case["epsilon"] + spread(x, axis, groups))
    gamma = reference.along(values[0], x, channel_axes(axis, x.ndim)) if scaled else 1
    terms = [np.linalg.norm(mix * gamma * inv_std)]
    terms += [np.linalg.norm(mix) * np.sqrt(x.size)] * len(values)
    for ours, theirs, largest in zip(slopes, exact, terms, strict=True):
        assert np.linalg.norm(wide(ours) - theirs) <= tolerance * largest


def spread(x, axis, groups):
    """The variance of the group that each element belongs to."""
    last = np.moveaxis(x, axis, -1)
    parts = np.split(last, groups, -1)
    axes = tuple(range(1, x.ndim))
    variances = [np.broadcast_to(p.var(axes, keepdims=True), p.shape) for p in parts]
    return np.moveaxis(np.concatenate(variances, -1), -1, axis)

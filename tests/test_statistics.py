"""Statistics: exact against float64 NumPy, independent of batches, undone on every failure."""

import hashlib

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_norm.layers
from keras_norm import statistics
from keras_norm.models import MLP, LeNet
from keras_norm.statistics import diff, reestimate, restore, snapshot

pytestmark = pytest.mark.core

# Layers that write down their inputs when the model is called eagerly: what the statistics are
# checked against, by way of nothing but the model itself.
RECORD = None


def recording(base):
    class Recording(base):
        def call(self, inputs, training=None, mask=None):
            if RECORD is not None:
                value = np.asarray(ops.convert_to_numpy(inputs), np.float64)
                seen = None if mask is None else np.asarray(ops.convert_to_numpy(mask))
                RECORD.append((self, value, seen))
            return super().call(inputs, training=training, mask=mask)

    Recording.__name__ = f"Recording{base.__module__.split('.')[0]}"
    return Recording


KINDS = {
    "ours": recording(keras_norm.layers.BatchNormalization),
    "keras": recording(layers.BatchNormalization),
}


def inputs_of_layers(model, x):
    """Layer -> all its inputs as rows of channels, from one eager call in inference mode."""
    global RECORD
    RECORD = []
    try:
        model(x, training=False)
        rows = {}
        for layer, value, mask in RECORD:
            value = np.moveaxis(value, layer.axis, -1)
            value = value[mask] if mask is not None else value.reshape(-1, value.shape[-1])
            rows.setdefault(layer, []).append(value)
    finally:
        RECORD = None
    return {layer: np.concatenate(values) for layer, values in rows.items()}


def statistics_of(layer):
    return [np.asarray(ops.convert_to_numpy(v)) for v in (layer.moving_mean, layer.moving_variance)]


def assert_exact(model, x, expected_layers, tolerance=1e-5):
    """Every layer's statistics are the float64 moments of its inputs, to 1e-5 sigma."""
    found = inputs_of_layers(model, x)
    assert len(found) == expected_layers
    for layer, rows in found.items():
        mean, variance = statistics_of(layer)
        sigma = np.sqrt(rows.var(axis=0) + layer.epsilon)
        assert np.max(np.abs(mean - rows.mean(axis=0)) / sigma) < tolerance
        assert np.max(np.abs(variance - rows.var(axis=0)) / sigma**2) < tolerance


def digest(model):
    """Of all weights but the statistics, in order."""
    found = {
        id(v)
        for y in statistics._normalizations(model).values()
        for v in statistics._statistics_of(y)
    }
    all_bytes = b"".join(
        ops.convert_to_numpy(v).tobytes() for v in model.variables if id(v) not in found
    )
    return hashlib.sha256(all_bytes).hexdigest()


def all_bits(model):
    return [ops.convert_to_numpy(v).tobytes() for v in model.variables]


# Models ----------------------------------------------------------------------------------------


def mlp9(norm):
    return MLP((40, 30, 20, 20, 10, 10, 10, 10, 10)[:8], norm, input_shape=(20,))


def convnet(norm):
    return LeNet(norm, activation="relu", input_shape=(20, 20, 2), dropout=0.3)


def channels_first(norm):
    def factory(name):
        return norm(axis=1, name=name)

    inputs = keras.Input((3, 12))
    x = factory("a")(inputs)
    x = layers.Permute((2, 1))(layers.Dense(8, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(2)(factory("b")(x)))


def residual(norm):
    """Residual blocks, a nested model, and a layer shared by two branches."""
    inputs = keras.Input((8, 8, 3))
    inner_in = keras.Input((8, 8, 6))
    y = layers.Conv2D(6, 3, padding="same")(norm(name="inner_a")(inner_in))
    y = norm(name="inner_b")(layers.ReLU()(y))
    block = keras.Model(inner_in, layers.Add()([inner_in, y]), name="block")
    shared = norm(name="shared")
    x = layers.Conv2D(6, 3, padding="same")(inputs)
    left, right = shared(x), shared(layers.Conv2D(6, 1)(x) * 3.0 + 1.0)
    x = block(layers.ReLU()(left + right))
    y = layers.ReLU()(norm(name="outer")(layers.Conv2D(6, 3, padding="same")(x)))
    x = layers.Concatenate()([x, layers.GaussianNoise(1.0)(y)])
    x = layers.GlobalAveragePooling2D()(norm(name="last")(x))
    return keras.Model(inputs, {"a": layers.Dense(2)(x), "b": ops.mean(x, axis=-1)})


def feeding_itself(norm):
    """A nested block of two normalizations that is called three times in a row."""
    block = keras.Sequential(
        [layers.Dense(6), norm(name="one"), layers.ReLU(), layers.Dense(6), norm(name="two")]
    )
    block.build((None, 6))
    inputs = keras.Input((6,))
    x = layers.Dense(6)(inputs)
    for _ in range(3):
        x = x + block(x)
    return keras.Model(inputs, norm(name="after")(x))


class Block(layers.Layer):
    """Two normalizations in a layer that is code."""

    def __init__(self, norm, units):
        super().__init__()
        self.first, self.second = norm(), norm()
        self.dense, self.drop = layers.Dense(units), layers.Dropout(0.5)
        self.unused = norm()

    def build(self, shape):
        self.first.build(shape)
        self.dense.build(shape)
        self.second.build((*shape[:-1], self.dense.units))
        self.unused.build(shape)

    def call(self, x, training=False):
        y = self.drop(ops.relu(self.first(x)))
        return self.second(self.dense(y))


def with_code_inside(norm):
    inputs = keras.Input((5,))
    x = norm()(layers.Dense(7)(inputs))
    x = ops.relu(Block(norm, 6)(x))
    return keras.Model(inputs, norm()(layers.Dense(3)(x)))


class Subclassed(keras.Model):
    def __init__(self, norm):
        super().__init__()
        self.norms = [norm() for _ in range(3)]
        self.shared = norm()
        self.dense = [layers.Dense(6) for _ in range(4)]

    def call(self, x, training=None):
        for dense, one in zip(self.dense, self.norms, strict=False):
            x = ops.relu(one(dense(x), training=training))
        return self.shared(x + self.dense[3](self.shared(x)))


def subclassed(norm):
    model = Subclassed(norm)
    model(np.zeros((1, 5), "float32"))
    return model


def sequential_of_models(norm):
    first = keras.Sequential([layers.Dense(6), norm(), layers.ReLU()])
    second = keras.Sequential([layers.Dense(4), norm()])
    return keras.Sequential([keras.Input((5,)), first, layers.Rescaling(2.0), second])


MODELS = {
    mlp9: ((20,), 8),
    convnet: ((20, 20, 2), 4),
    channels_first: ((3, 12), 2),
    residual: ((8, 8, 3), 5),
    feeding_itself: ((6,), 3),
    with_code_inside: ((5,), 4),
    subclassed: ((5,), 4),
    sequential_of_models: ((5,), 2),
}


def example_data(shape, n=70, seed=0):
    """Of large mean and unequal spread, so that old statistics are far off."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, *shape)) * rng.uniform(0.5, 3, shape) + 2).astype("float32")


def randomized(model, seed=0):
    """Statistics, gammas and betas that are not those of a fresh model."""
    rng = np.random.default_rng(seed)
    for layer in statistics._normalizations(model).values():
        n = layer.gamma.shape
        values = [rng.uniform(0.5, 2, n), rng.normal(size=n)]
        values += [rng.normal(size=n), rng.uniform(0.1, 4, n)]
        layer.set_weights([v.astype("float32") for v in values])
    return model


# Exactness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_layerwise_is_exact(build, kind):
    shape, number = MODELS[build]
    model = randomized(build(KINDS[kind]))
    x = example_data(shape)
    before = digest(model)
    report = reestimate(model, x, batch_size=32)
    assert digest(model) == before
    assert_exact(model, x, number)
    assert len(report.updated) == number
    assert report.samples == 70
    assert all(y.examples == 70 for y in report.updated)
    again = reestimate(model, x, batch_size=70)
    assert again.largest_shift < 1e-5  # the statistics reproduce themselves


def test_layerwise_against_numpy_alone():
    """A float64 forward pass that knows nothing of Keras."""
    model = randomized(MLP((30, 20, 20, 10, 10, 10, 10, 10), input_shape=(12,)))
    x = example_data((12,), 300)
    reestimate(model, x)
    a = x.astype(np.float64)
    for i in range(1, 9):
        kernel, bias = (w.astype(np.float64) for w in model.get_layer(f"dense{i}").get_weights())
        a = a @ kernel + bias
        norm = model.get_layer(f"dense{i}_norm")
        gamma, beta, mean, variance = norm.get_weights()
        sigma = np.sqrt(a.var(axis=0) + norm.epsilon)
        assert np.max(np.abs(mean - a.mean(axis=0)) / sigma) < 1e-5
        assert np.max(np.abs(variance - a.var(axis=0)) / sigma**2) < 1e-5
        a = np.maximum((a - a.mean(axis=0)) / sigma * gamma + beta, 0)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="compares with PyTorch")
def test_layerwise_against_pytorch():
    """The same weights in torch.nn, its statistics from one batch with momentum 1."""
    import torch

    model = randomized(convnet(KINDS["ours"]))
    x = example_data((20, 20, 2), 64)
    reestimate(model, x, batch_size=16)
    a = torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
    for name, pool in (("conv1", True), ("conv2", True), ("dense1", False), ("dense2", False)):
        kernel, bias = (torch.tensor(w).double() for w in model.get_layer(name).get_weights())
        if kernel.ndim == 4:
            a = torch.nn.functional.conv2d(a, kernel.permute(3, 2, 0, 1), bias)
        else:
            a = a.permute(0, 2, 3, 1).reshape(64, -1) if a.ndim == 4 else a
            a = a @ kernel + bias
        gamma, beta, mean, variance = model.get_layer(f"{name}_norm").get_weights()
        norm = torch.nn.BatchNorm1d(len(gamma), eps=1e-3, momentum=1.0, dtype=torch.float64)
        norm.weight.data, norm.bias.data = torch.tensor(gamma).double(), torch.tensor(beta).double()
        rows = a.movedim(1, -1).reshape(-1, len(gamma))
        y = norm(rows).detach()
        n = len(rows)
        sigma = np.sqrt(norm.running_var.numpy())
        assert np.max(np.abs(mean - norm.running_mean.numpy()) / sigma) < 1e-5
        biased = norm.running_var.numpy() * (n - 1) / n
        assert np.max(np.abs(variance - biased) / sigma**2) < 1e-5
        y = y.reshape(*a.movedim(1, -1).shape).movedim(-1, 1)
        a = torch.relu(y)
        a = torch.nn.functional.avg_pool2d(a, 2) if pool else a


@pytest.mark.parametrize("build", [mlp9, residual, subclassed], ids=lambda f: f.__name__)
def test_batch_size_and_order_do_not_matter(build):
    shape, _ = MODELS[build]
    model = randomized(build(KINDS["ours"]))
    x = example_data(shape, 65)
    old = snapshot(model)
    reestimate(model, x, batch_size=65)
    expected = snapshot(model)
    order = np.random.default_rng(1).permutation(65)
    by_class = np.argsort(x.reshape(65, -1)[:, 0])
    for rows, size in ((order, 7), (by_class, 7), (slice(None), 64), (by_class[::-1], 1)):
        restore(model, old)
        reestimate(model, x[rows], batch_size=size)
        change = diff(expected, model)
        worst = max(np.max(np.abs(y.shift)) + np.max(np.abs(y.scale - 1)) for y in change.layers)
        assert worst < 1e-5


def test_float64_and_large_means():
    norm = KINDS["ours"]
    inputs = keras.Input((4,), dtype="float64")
    x = norm(dtype="float64", epsilon=1e-12)(inputs)
    x = norm(dtype="float64", name="top")(layers.Dense(3, dtype="float64")(x))
    model = keras.Model(inputs, x)
    data = np.random.default_rng(0).normal(1000, [1, 2, 0.01, 3], (100, 4))
    reestimate(model, data, batch_size=9)
    assert_exact(model, data, 2, tolerance=1e-9)


def test_masks_count():
    """Padded steps take no part, and all rows of a masked batch are as good as none."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(20, 4, mask_zero=True)(inputs)
    x = KINDS["ours"](name="a")(x)
    x = layers.Dense(5, activation="relu")(x)
    x = KINDS["keras"](name="b")(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(x))
    tokens = np.random.default_rng(0).integers(1, 20, (30, 9))
    tokens[np.arange(9) >= np.random.default_rng(1).integers(1, 10, (30, 1))] = 0
    tokens[3] = 0
    report = reestimate(model, tokens, batch_size=8)
    assert_exact(model, tokens, 2)
    assert report["a"].elements[0] == np.count_nonzero(tokens)
    assert report["a"].examples == 29


def test_several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    x = layers.Concatenate()([KINDS["ours"]()(a), layers.Dense(3)(b)])
    model = keras.Model({"a": a, "b": b}, [KINDS["keras"]()(x), layers.Dense(2)(x)])
    data = {"a": example_data((3,), 20), "b": example_data((4,), 20, seed=1)}
    reestimate(model, data, batch_size=8)
    assert_exact(model, data, 2)


def test_time_folded_into_the_batch():
    inputs = keras.Input((6, 4))
    x = ops.reshape(inputs, (-1, 4))
    x = KINDS["ours"]()(layers.Dense(3)(x))
    model = keras.Model(inputs, ops.reshape(x, (-1, 6, 3)))
    data = example_data((6, 4), 10)
    report = reestimate(model, data, batch_size=4)
    assert_exact(model, data, 1)
    assert report.layers[0].examples == 10


def test_half_precision():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = MLP((8, 6), KINDS["ours"], input_shape=(5,))
    finally:
        keras.config.set_dtype_policy(previous)
    x = example_data((5,), 40)
    reestimate(model, x, batch_size=16, memory=0)
    assert_exact(model, x, 2, tolerance=1e-2)  # eager and compiled bfloat16 round differently


def test_keras_renorm():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(renorm=True)])
    x = example_data((4,), 50)
    reestimate(model, x)
    layer = model.layers[0]
    np.testing.assert_allclose(ops.convert_to_numpy(layer.moving_mean), x.mean(axis=0), rtol=1e-5)
    stddev = np.sqrt(x.var(axis=0) + layer.epsilon)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.moving_stddev), stddev, rtol=1e-5)

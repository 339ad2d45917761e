"""Statistics: exact against float64 NumPy, independent of batches, undone on every failure."""

import errno
import hashlib
import itertools
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_norm.layers
from keras_norm import _layerwise, _sample, statistics
from keras_norm._layerwise_program import nothing_compiled
from keras_norm.models import MLP, LeNet
from keras_norm.statistics import (
    DomainStatistics,
    Report,
    RunningAdaptation,
    adapt,
    diff,
    reestimate,
    restore,
    snapshot,
)

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


def mixed(first):
    """Makes layers of the two kinds in turn."""
    kinds = itertools.cycle([KINDS[first], *(k for name, k in KINDS.items() if name != first)])
    return lambda **kwargs: next(kinds)(**kwargs)


def inputs_of_layers(model, x):
    """Layer -> all its inputs as rows of channels, from one eager call in inference mode."""
    global RECORD
    RECORD = []
    try:
        with nothing_compiled():
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


# Models ------------------------------------------------------------------------------------------


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
        self.unused = norm(trainable=False)

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


def augmenting(norm):
    """Layers that work unless they are told not to train."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.RandomBrightness(0.5, value_range=(-9, 9)),
            norm(),
            layers.RandomRotation(0.5),
            layers.Conv2D(4, 3),
            norm(),
        ]
    )


class Cell(layers.Layer):
    """Recurrent batch normalization: a loop calls the layers, once for every time step."""

    def __init__(self, norm, units):
        super().__init__()
        self.state_size = units
        self.of_inputs, self.of_state = layers.Dense(units), layers.Dense(units, use_bias=False)
        self.norms = [norm(), norm()]

    def build(self, shape):
        self.of_inputs.build(shape)
        for layer in (self.of_state, *self.norms):
            layer.build((shape[0], self.state_size))

    def call(self, x, states, training=False):
        one, two = self.norms
        y = one(self.of_inputs(x), training=training)
        y = ops.tanh(y + two(self.of_state(states[0]), training=training))
        return y, [y]


def recurrent(norm):
    return keras.Sequential([keras.Input((3, 5)), norm(), layers.RNN(Cell(norm, 4)), norm()])


MODELS = {
    mlp9: ((20,), 8),
    convnet: ((20, 20, 2), 4),
    channels_first: ((3, 12), 2),
    residual: ((8, 8, 3), 5),
    feeding_itself: ((6,), 3),
    with_code_inside: ((5,), 4),
    subclassed: ((5,), 4),
    sequential_of_models: ((5,), 2),
    augmenting: ((6, 6, 3), 2),
    recurrent: ((3, 5), 4),
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


MADE = {}


def model_of(build, *args):
    """A model by its builder, made once and then put back: what is compiled stays compiled."""
    if (build, *args) not in MADE:
        keras.utils.set_random_seed(0)
        model = randomized(build(*args))
        MADE[(build, *args)] = model, [(v, np.array(v.numpy())) for v in variables_of(model)]
    model, values = MADE[(build, *args)]
    for variable, value in values:
        variable.assign(value)
    return model


def variables_of(model):
    return [*model.variables, *getattr(getattr(model, "optimizer", None), "variables", [])]


def mixed_model(build, first="ours"):
    return model_of(build_mixed, build, first)


def build_mixed(build, first):
    return build(mixed(first))


# Exactness ---------------------------------------------------------------------------------------


LONG_ON_JAX = dict.fromkeys([mlp9, residual], pytest.mark.slow_on_jax)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(f, marks=LONG_ON_JAX[mlp9] if f in (mlp9, recurrent) else (), id=f.__name__)
        for f in MODELS
    ],
)
def test_layerwise_is_exact(build):
    shape, number = MODELS[build]
    model = mixed_model(build)
    x = example_data(shape)
    before = digest(model)
    report = reestimate(model, x, batch_size=32)
    assert digest(model) == before
    assert_exact(model, x, number)
    assert len(report.updated) == number
    assert report.samples == 70
    assert all(y.examples == 70 for y in report.updated)
    again = reestimate(model, x, batch_size=32)
    assert again.largest_shift < 1e-5  # the statistics reproduce themselves


class Compiling(layers.Layer):
    """Compiles what it does by itself, as if by a decorator."""

    def __init__(self, norm):
        super().__init__()
        self.norms = [norm(), norm()]
        self.function = None

    def build(self, shape):
        for layer in self.norms:
            layer.build(shape)

    def _both(self, x):
        return self.norms[1](ops.tanh(self.norms[0](x, training=False)), training=False)

    def call(self, x):
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self.function = self.function or tf.function(self._both)
        elif keras.backend.backend() == "jax":
            import jax

            self.function = self.function or jax.jit(self._both)
        return (self.function or self._both)(x)


@pytest.mark.parametrize("method", ["layerwise", "one_pass"])
@pytest.mark.parametrize("called_before", [False, True])
def test_code_that_compiles_itself(called_before, method):
    model = randomized(keras.Sequential([keras.Input((5,)), Compiling(mixed("ours"))]))
    model.layers[0].function = None  # of the input that Keras built it with
    x = example_data((5,), 64)
    if called_before:
        model(x)
    report = reestimate(model, x, batch_size=64, method=method)
    assert len(report.updated) == 2
    again = reestimate(model, x, batch_size=64, method=method)
    assert again.largest_shift < 1e-5
    model.layers[0].function = model.layers[0]._both
    assert_exact(model, x, 2)


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

    model = mixed_model(convnet)
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


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        # Of 65 examples, 32 a batch leave one for the last.
        pytest.param(f, (1, 7, 64) if f is convnet else (32,), marks=marks, id=f.__name__)
        for f, marks in {**LONG_ON_JAX, convnet: (), subclassed: ()}.items()
    ],
)
def test_batch_size_and_order_do_not_matter(build, sizes):
    shape, _ = MODELS[build]
    model = mixed_model(build)
    x = example_data(shape, 65)
    old = snapshot(model)
    reestimate(model, x, batch_size=65)
    expected = snapshot(model)
    order = np.random.default_rng(1).permutation(65)
    by_class = np.argsort(x.reshape(65, -1)[:, 0])
    for rows, size in itertools.product((by_class, order), (*sizes, 65)):
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


@pytest.mark.parametrize("folded", ["inputs", "time"])
def test_rows_that_are_no_examples(folded):
    """What fills up the last batch must not count, wherever the model has put it."""
    if folded == "inputs":
        inputs = [keras.Input((3,)), keras.Input((3,))]
        x = ops.concatenate(inputs, axis=0)
    else:
        inputs = keras.Input((2, 3))
        x = ops.reshape(ops.transpose(inputs, (1, 0, 2)), (-1, 3))
    x = layers.Dense(3)(KINDS["keras"]()(KINDS["ours"](name="first")(x)))
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(0)
    data = [rng.normal(m, 1, (10, 3)).astype("float32") for m in (0, 5)]
    data = data if folded == "inputs" else np.stack(data, axis=1)
    report = reestimate(model, data, batch_size=4)
    assert report["first"].elements[0] == 20
    assert_exact(model, data, 2)


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


# One pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [convnet, subclassed], ids=lambda f: f.__name__)
def test_one_pass_of_a_single_batch_is_exact(build):
    """Then the statistics of the batch are those of all; a layer called twice has its own pool."""
    shape, number = MODELS[build]
    model = mixed_model(build)
    x = example_data(shape, 64)
    report = reestimate(model, x, method="one_pass", batch_size=64)
    if build is convnet:
        assert_exact(model, x, number)
    else:
        assert max(y.leak for y in report.layers if y.uses == 1) < 1e-5
        assert max(y.leak for y in report.layers if y.uses == 2) > 0.01


@pytest.mark.slow_on_jax
def test_one_pass_states_its_error():
    """From four batches of 16, so that it is an estimate; too small it must not be."""
    ratios = []
    for seed in range(2):
        model = randomized(model_of(mlp9, KINDS["ours"]), seed)
        x = example_data((20,), 1024, seed)
        report = reestimate(model, x, method="one_pass", batch_size=64)
        approximate = snapshot(model)
        reestimate(model, x, batch_size=64)
        exact = diff(approximate, model)
        true = {y.name: np.hypot(*wrong_by(y)) for y in exact.layers}
        assert true.pop("dense1_norm") < 1e-5  # nothing below it
        assert report["dense1_norm"].leak < 1e-5
        ratios += [report[name].leak / value for name, value in true.items()]
    assert min(ratios) > 1 / 3
    assert np.median(ratios) < 3
    assert max(ratios) < 8


def wrong_by(layer):
    """The old statistics against the new, root mean square over the channels, in sigma."""
    return [np.sqrt(np.mean(v**2)) for v in (layer.shift, 1 - 1 / layer.scale)]


def test_one_pass_pools_by_counts():
    """Class-sorted batches have little variance each; between them it is large."""
    model = keras.Sequential([keras.Input((2,)), KINDS["keras"](), layers.Dense(1)])
    x = example_data((2,), 130)
    x = x[np.argsort(x[:, 0])]
    reestimate(model, x, method="one_pass", batch_size=32)
    assert_exact(model, x, 1)


# The cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [residual, feeding_itself], ids=lambda f: f.__name__)
def test_memory_disk_and_recomputation_agree(build, tmp_path):
    shape, _ = MODELS[build]
    model = mixed_model(build)
    x = example_data(shape, 50)
    old = snapshot(model)
    reestimate(model, x, batch_size=32)
    expected = snapshot(model)
    for memory, disk in ((0, 1e9), (0, 0), (30_000, 0), (30_000, 20_000)):
        restore(model, old)
        reestimate(model, x, batch_size=32, memory=memory, disk=disk, folder=tmp_path)
        assert diff(expected, model).largest_shift < 1e-6
        assert not list(tmp_path.iterdir())


def test_the_budget_is_kept(tmp_path, monkeypatch):
    """Activations of 20 x 20 x 6 floats for 64 examples are 614 kB; the input is not copied."""
    held, most = [0], [0]
    put, give_back = _sample.Store.put, _sample.Store.give_back

    def watched(self, env, old=None):
        kept = put(self, env, old)
        if kept is not None and kept.path is None:
            held[0] += kept.size
            most[0] = max(most[0], held[0] - (old.size if old and old.path is None else 0) * 0)
        return kept

    def released(self, kept):
        held[0] -= kept.size if kept.path is None else 0
        give_back(self, kept)

    monkeypatch.setattr(_sample.Store, "put", watched)
    monkeypatch.setattr(_sample.Store, "give_back", released)
    model = mixed_model(convnet)
    x = example_data((20, 20, 2), 64)
    reestimate(model, x, batch_size=8, memory=300_000, folder=tmp_path)
    assert 200_000 < most[0] <= 300_000
    assert held[0] == 0


# Data --------------------------------------------------------------------------------------------


def build_small(norm):
    return MLP((6, 5), norm, input_shape=(4,))


def small_model():
    return model_of(build_small, KINDS["ours"])


def ragged_batches(x, sizes=(3, 1, 20, 7, 0, 100)):
    start = 0
    for size in sizes:
        yield x[start : start + size], np.zeros(len(x[start : start + size]))
        start += size


class Sequence(keras.utils.PyDataset):
    def __init__(self, x, size):
        super().__init__()
        self.x, self.size = x, size

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, i):
        part = self.x[i * self.size : (i + 1) * self.size]
        return part, np.zeros(len(part)), np.ones(len(part))


def test_every_kind_of_data_gives_the_same():
    model = small_model()
    x = example_data((4,), 53)
    reestimate(model, x, samples=None)
    expected = snapshot(model)
    y = np.arange(53)
    kinds = {
        "tuple": (x, y),
        "tensor": ops.convert_to_tensor(x),
        "list": [x],
        "generator": ragged_batches(x),
        "of inputs alone": (x[i : i + 10] for i in range(0, 53, 10)),
        "of tensors": (ops.convert_to_tensor(x[i : i + 10]) for i in range(0, 53, 10)),
        "PyDataset": Sequence(x, 9),
    }
    for name, data in kinds.items():
        for method in ("layerwise", "one_pass"):
            if name in ("generator", "of inputs alone", "of tensors"):
                if method == "one_pass":
                    continue
            elif method == "one_pass":
                report = reestimate(model, data, samples=None, method=method, batch_size=64)
                assert report.samples == 53
                assert diff(expected, model).largest_shift < 1e-5, name
                continue
            report = reestimate(model, data, samples=None, batch_size=16)
            assert report.samples == 53
            assert diff(expected, model).largest_shift < 1e-5, name


def test_tensorflow_data():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("needs TensorFlow")
    import tensorflow as tf

    model = small_model()
    x = example_data((4,), 53)
    data = tf.data.Dataset.from_tensor_slices((x, np.arange(53))).batch(10)
    for method in ("layerwise", "one_pass"):
        report = reestimate(model, data, batch_size=64, method=method)
        assert report.samples == 53
        assert_exact(model, x, 2)


def test_strings_from_a_stream():
    """Keras has no dtype for them in NumPy; held in memory and on disk they stay the same."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras looks up words by TensorFlow")
    import tensorflow as tf

    words = np.random.default_rng(0).choice(["ant", "bee", "cat"], 53)[:, None]
    inputs = keras.Input((1,), dtype="string")
    numbers = layers.StringLookup(vocabulary=["ant", "bee"])(inputs)
    x = KINDS["ours"](name="norm")(layers.Flatten()(layers.Embedding(3, 4)(numbers)))
    model = keras.Model(inputs, layers.Dense(1)(x))
    reestimate(model, words)
    expected = statistics_of(model.get_layer("norm"))
    assert (expected[1] > 0).all()
    data = tf.data.Dataset.from_tensor_slices((words, np.arange(53))).batch(10)
    streams = {
        "one pass": lambda: (data, {"method": "one_pass"}),
        "memory": lambda: (data, {"batch_size": 16}),
        "disk": lambda: (data, {"batch_size": 16, "memory": 0}),
        "texts": lambda: (iter([words[:20], words[20:]]), {"memory": 0}),
    }
    for name, stream in streams.items():
        source, options = stream()
        assert reestimate(model, source, **options).samples == 53
        for a, b in zip(statistics_of(model.get_layer("norm")), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


def test_what_came_counts():
    model = small_model()
    x = example_data((4,), 53)
    assert reestimate(model, x, samples=1000).samples == 53
    assert reestimate(model, ragged_batches(x), samples=1000).samples == 53
    report = reestimate(model, ragged_batches(x), samples=20, batch_size=16)
    assert (report.samples, report.settings["requested"]) == (20, 20)
    assert_exact(model, x[:20], 2)
    report = reestimate(model, ragged_batches(x), samples=20, batch_size=6, method="one_pass")
    assert report.samples == 20
    endless = (x[:10] for _ in iter(int, 1))
    assert reestimate(model, endless, samples=45, batch_size=20).samples == 45


def test_a_random_part_of_arrays():
    """Sorted rows: the first would be no sample. The same seed gives the same part."""
    model = keras.Sequential([keras.Input((1,)), KINDS["ours"](), layers.Dense(1)])
    x = np.arange(1000, dtype="float32")[:, None]
    report = reestimate(model, x, samples=100, batch_size=30)
    layer = report.layers[0]
    assert report.samples == 100
    assert abs(layer.mean[0] - 499.5) < 4 * layer.standard_error_of_mean[0]
    again = reestimate(model, x, samples=100)
    assert abs(again.layers[0].shift[0]) < 1e-6
    other = reestimate(model, x, samples=100, seed=1)
    assert abs(other.layers[0].shift[0]) > 1e-3


def test_a_sorted_stream_is_warned_of():
    model = keras.Sequential([keras.Input((1,)), KINDS["ours"](), layers.Dense(1)])
    x = np.arange(1000, dtype="float32")[:, None]
    with pytest.warns(UserWarning, match="first 400 examples of the stream are not a random"):
        report = reestimate(model, iter(np.split(x, 10)), samples=400, batch_size=50)
    assert report.layers[0].drift > 3
    np.random.default_rng(0).shuffle(x)
    assert reestimate(model, iter(np.split(x, 10)), samples=400).layers[0].drift < 3


def test_tolerance_takes_what_it_needs():
    model = small_model()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 4)).astype("float32")
    for data in (x, (x[i : i + 100] for i in range(0, 20_000, 100))):
        report = reestimate(model, data, samples=None, tolerance=0.03)
        assert 0.8 * 0.03 < report.error <= 0.03
        assert 512 < report.samples < 3000
    assert reestimate(model, x, samples=600, tolerance=0.001).samples == 600
    assert reestimate(model, x, tolerance=1.0).samples == 512
    report = reestimate(model, x, samples=None, tolerance=0.03, method="one_pass", batch_size=100)
    assert report.error <= 0.03
    assert 512 < report.samples < 3000


@pytest.mark.parametrize("method", ["layerwise", "one_pass"])
def test_tolerance_takes_a_random_part_of_sorted_arrays(method):
    model = keras.Sequential([keras.Input((1,)), KINDS["ours"](), layers.Dense(1)])
    x = np.arange(5000, dtype="float32")[:, None]
    report = reestimate(model, x, tolerance=0.1, method=method)
    assert report.samples < 1000
    layer = report.layers[0]
    assert abs(layer.mean[0] - 2499.5) < 4 * layer.standard_error_of_mean[0]


def test_the_stated_error_is_the_spread_of_estimates():
    model, name = small_model(), "dense1_norm"
    parts = np.random.default_rng(0).normal(size=(60, 100, 4)).astype("float32")
    found = [reestimate(model, part, layers=[name])[name] for part in parts]
    means, variances = np.stack([y.mean for y in found]), np.stack([y.variance for y in found])
    sigma2 = variances.mean(axis=0) + found[0].epsilon
    moved = means.var(axis=0, ddof=1) / sigma2
    moved += variances.var(axis=0, ddof=1) / (4 * sigma2**2)  # for outputs of unit variance
    assert np.sqrt(np.mean(moved)) == pytest.approx(np.mean([y.error for y in found]), rel=0.15)


# Selection, report -------------------------------------------------------------------------------


def test_selected_layers_only():
    model = randomized(MLP((6, 5, 4), KINDS["ours"], input_shape=(4,)))
    x = example_data((4,), 40)
    old = snapshot(model)
    report = reestimate(model, x, layers=["dense2_norm"])
    assert [y.name for y in report.updated] == ["dense2_norm"]
    assert report["dense1_norm"].status == "not selected"
    change = diff(old, model)
    assert np.all(change["dense1_norm"].shift == 0)
    assert np.all(change["dense3_norm"].shift == 0)
    rows = inputs_of_layers(model, x)[model.get_layer("dense2_norm")]
    np.testing.assert_allclose(report["dense2_norm"].mean, rows.mean(axis=0), rtol=1e-5, atol=1e-5)
    for selection in (lambda y: y.name == "dense2_norm", [model.get_layer("dense2_norm")]):
        assert [y.name for y in reestimate(model, x, layers=selection).updated] == ["dense2_norm"]
    with pytest.raises(ValueError, match="unknown \\['dense9'\\]"):
        reestimate(model, x, layers=["dense9"])
    with pytest.raises(ValueError, match="selects none"):
        reestimate(model, x, layers=lambda y: False)


def test_layers_that_do_not_run_keep_theirs():
    model = with_code_inside(KINDS["ours"])
    old = snapshot(model)
    report = reestimate(model, example_data((5,), 30))
    kept = [y for y in report.layers if y.status == "did not run"]
    assert len(kept) == 1
    assert np.all(diff(old, model)[kept[0].name].shift == 0)
    assert "did not run" in str(report)


def test_a_shared_layer_that_gets_nothing_but_padding():
    inputs, norm = keras.Input((4, 3)), KINDS["ours"](name="norm")
    x = norm(layers.Dense(3)(norm(layers.Masking()(inputs))))
    model = keras.Model(inputs, x)
    before = all_bits(model)
    report = reestimate(model, np.zeros((10, 4, 3), "float32"), batch_size=4)
    assert report["norm"].status == "did not run"
    assert all_bits(model) == before


def test_a_report(tmp_path):
    model = mixed_model(convnet)
    old = snapshot(model)
    x = example_data((20, 20, 2), 40)
    report = reestimate(model, x, batch_size=16, name="forty images")
    assert [y.name for y in report.layers] == [
        "conv1_norm", "conv2_norm", "dense1_norm", "dense2_norm"
    ]  # fmt: skip
    first = report["conv1_norm"]
    assert first.elements[0] == 40 * 16 * 16
    assert (first.examples, first.uses) == (40, 1)
    mean, _ = old.moments("conv1_norm")
    np.testing.assert_array_equal(first.old_mean, mean)
    expected = (first.mean - mean) / np.sqrt(first.variance + first.epsilon)
    np.testing.assert_allclose(first.shift, expected)
    text = str(report).splitlines()
    assert text[0] == "layerwise: 40 examples of forty images"
    assert " ".join(text[1].split()) == "layer channels uses elements shift/σ σ/old σ error/σ"
    assert text[2].split()[:4] == ["conv1_norm", "6", "1", "10240"]
    back = Report.load(report.save(tmp_path / "report.json"))
    assert str(back) == str(report)
    for a, b in zip(back.layers, report.layers, strict=True):
        np.testing.assert_array_equal(a.standard_error_of_variance, b.standard_error_of_variance)
        np.testing.assert_array_equal(a.mean, b.mean)
    json.loads((tmp_path / "report.json").read_text())
    with pytest.raises(ValueError, match="format=None"):
        Report.from_dict({})


def test_a_name_of_several_layers():
    inner = [
        keras.Sequential([keras.Input((4,)), KINDS["ours"](name="bn")], name=name) for name in "ab"
    ]
    report = reestimate(keras.Sequential([keras.Input((4,)), *inner]), example_data((4,), 20))
    assert report["a/bn"] is report.layers[0]
    with pytest.raises(KeyError, match=r"several layers\. Use one of .*'b/bn'"):
        report["bn"]
    with pytest.raises(KeyError, match="other"):
        report["other"]


def test_a_report_is_saved_with_the_model(tmp_path):
    model, path = MLP((3,), input_shape=(4,), classes=2), tmp_path / "model.keras"
    x = example_data((4,), 40)
    report = reestimate(model, x, name="forty rows")
    with pytest.raises(FileNotFoundError):
        report.save(path)
    model.save(path)
    reestimate(model, x[:30]).save(path)
    report.save(path)  # in the place of the other
    back = Report.load(path)
    assert (back.data, back.samples, back.method) == ("forty rows", 40, "layerwise")
    np.testing.assert_array_equal(
        keras.saving.load_model(path).get_weights()[4], back["dense1_norm"].mean.astype("float32")
    )
    model.save(path)
    with pytest.raises(KeyError, match="statistics"):
        Report.load(path)


def test_one_example_has_no_standard_error(tmp_path):
    model = small_model()
    report = reestimate(model, example_data((4,), 1))
    assert np.isinf(report.error)
    assert np.isinf(Report.load(report.save(tmp_path / "a.json")).error)


def test_a_plot(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    model = mixed_model(convnet)
    x = example_data((20, 20, 2), 40)
    report = reestimate(model, x, method="one_pass", batch_size=20)
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert [p.get_ylabel() for p in figure.axes] == ["mean: shift (σ)", "σ / old σ", "error (σ)"]
    assert figure.axes[2].get_xticklabels()[0].get_text() == "conv1_norm"
    assert not pyplot.get_fignums()
    for name in ("report.jpg", "report"):
        with pytest.raises(ValueError, match=rf"\.png, \.pdf or \.svg.*/{name}'"):
            report.plot(tmp_path / name)
    assert not pyplot.get_fignums()
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    with pytest.raises(ValueError, match="without"):
        Report("diff", "", 0, 0, ()).plot()


# Transactions ------------------------------------------------------------------------------------


def build_trained():
    """Compiled and trained, with dropout, a frozen layer, an optimizer with state."""
    inputs = keras.Input((4,))
    x = layers.Dense(6)(inputs)
    x = layers.Dropout(0.5)(KINDS["ours"](name="a")(x))
    x = Block(KINDS["keras"], 5)(x)
    x = layers.Dense(5, name="frozen", trainable=False)(x)
    model = keras.Model(inputs, layers.Dense(2)(KINDS["keras"](name="b")(x)))
    model.compile("adam", "mse", jit_compile=keras.backend.backend() == "jax")
    model.fit(example_data((4,), 32), np.zeros((32, 2)), epochs=1, verbose=0)
    return model


def trained_model():
    return model_of(build_trained)


def everything(model):
    return [np.array(v.numpy()).tobytes() for v in variables_of(model)]


@pytest.mark.slow_on_jax
def test_nothing_else_changes():
    model = trained_model()
    found = [
        v for y in statistics._normalizations(model).values() for v in statistics._statistics_of(y)
    ]
    places = {i for i, v in enumerate(model.variables) if any(v is w for w in found)}
    flags = [y.trainable for y in model._flatten_layers()]
    x = example_data((4,), 50)
    for method in ("layerwise", "one_pass"):
        before = everything(model)
        reestimate(model, x, method=method, batch_size=16)
        after = everything(model)
        changed = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
        assert changed
        assert changed <= places
        assert flags == [y.trainable for y in model._flatten_layers()]
        assert not any("call" in vars(y) for y in model._flatten_layers())
    model.fit(x[:32], np.zeros((32, 2)), epochs=1, verbose=0)  # and training goes on


def test_dropout_is_off_and_a_frozen_model_will_do():
    model = trained_model()
    x = example_data((4,), 50)
    reestimate(model, x)
    first = snapshot(model)
    flags = [(y, y.trainable) for y in model._flatten_layers()]
    model.trainable = False
    reestimate(model, x)
    for layer, flag in flags:
        layer.trainable = flag
    assert diff(first, model).largest_shift < 1e-6


FAILURES = {
    "interrupt": KeyboardInterrupt("Ctrl-C"),
    "error": RuntimeError("the device fell off"),
}


@pytest.mark.parametrize("method", ["layerwise", "one_pass"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_at_any_step_changes_nothing(failure, method, monkeypatch):
    model = trained_model()
    x = example_data((4,), 50)
    old = snapshot(model)
    run, calls = _layerwise.Program.run, [0]

    def counted(self, inputs, fail_at):
        calls[0] += 1
        result = run(self, inputs)
        if calls[0] == fail_at:
            raise FAILURES[failure]
        return result

    monkeypatch.setattr(_layerwise.Program, "run", lambda self, x: counted(self, x, None))
    reestimate(model, x, method=method, batch_size=25)
    steps = calls[0]
    assert steps >= 4
    restore(model, old)
    before = everything(model)
    for fail_at in range(1, steps + 1):
        calls[0] = 0
        monkeypatch.setattr(_layerwise.Program, "run", lambda s, x, n=fail_at: counted(s, x, n))
        with pytest.raises(type(FAILURES[failure])):
            reestimate(model, x, method=method, batch_size=25)
        assert everything(model) == before, fail_at


def test_an_interrupt_while_statistics_are_assigned(monkeypatch):
    model = trained_model()
    x = example_data((4,), 50)
    before = everything(model)
    for fail_at in range(1, 5):
        calls, assign = [0], _layerwise.set_statistics

        def interrupted(layer, values, fail_at=fail_at, calls=calls, assign=assign):
            calls[0] += 1
            layer.moving_mean.assign(values[0])
            if calls[0] == fail_at:
                raise KeyboardInterrupt
            assign(layer, values)

        with monkeypatch.context() as patch:
            patch.setattr(_layerwise, "set_statistics", interrupted)
            with pytest.raises(KeyboardInterrupt):
                reestimate(model, x)
        assert everything(model) == before


def test_bad_data_changes_nothing(tmp_path, monkeypatch):
    model = trained_model()
    x = example_data((4,), 50)
    before = everything(model)

    def broken():
        yield x[:20]
        yield x[20:30]
        raise OSError("the share went away")

    nan = x.copy()
    nan[41, 2] = np.nan
    for method in ("layerwise", "one_pass"):
        with pytest.raises(OSError, match="share went away"):
            reestimate(model, broken(), method=method, batch_size=16)
        with pytest.raises(ValueError, match="NaN or infinite values in the inputs of layer 'a'"):
            reestimate(model, nan, method=method, batch_size=16)
        with pytest.raises(ValueError, match="at least one example"):
            reestimate(model, iter(()), method=method)
        with pytest.raises(ValueError, match="at least one example"):
            reestimate(model, x[:0], method=method)
    with pytest.raises(ValueError, match=r"lengths \[49, 50\]"):
        reestimate(model, [x, x[1:]])
    for batch in (np.float32(3), {"a": x, "b": x[1:]}):
        with pytest.raises(ValueError, match=r"shapes \[.*\]. The data set must be batched"):
            reestimate(model, iter([batch]))
    with pytest.raises(ValueError, match="type int"):
        reestimate(model, 3)
    with pytest.raises(ValueError, match="memory=0"):
        reestimate(model, iter([x]), memory=0, disk=0)
    assert everything(model) == before


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    model = trained_model()
    x = example_data((4,), 50)
    before = everything(model)
    save = np.save
    for fail_at in (1, 2, 5):
        calls = [0]

        def full(file, value, calls=calls, fail_at=fail_at):
            calls[0] += 1
            save(file, value)
            if calls[0] == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(np, "save", full)
            with pytest.raises(OSError, match="No space left") as error:
                reestimate(model, x, batch_size=16, memory=0, folder=tmp_path)
        assert error.value.errno == errno.ENOSPC
        assert everything(model) == before
        assert not list(tmp_path.iterdir())


def test_wrong_arguments():
    model = small_model()
    x = example_data((4,), 10)
    for name, value in (
        ("samples", 0), ("samples", 1.5), ("batch_size", 0), ("batch_size", True), ("memory", -1),
        ("disk", -1), ("tolerance", 0), ("method", "fast"), ("memory", None), ("disk", "1e9"),
        ("tolerance", "1e-2"), ("tolerance", True), ("seed", "a"), ("seed", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}="):
            reestimate(model, x, **{name: value})
    with pytest.raises(ValueError, match="without any"):
        reestimate(MLP((3,), None, input_shape=(4,)), x)
    with pytest.raises(ValueError, match="calling it on a batch"):
        reestimate(Subclassed(KINDS["ours"]), x)


def test_inputs_that_do_not_fit():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    model = keras.Model(inputs, KINDS["ours"]()(ops.add(*inputs)))
    x = np.ones((8, 3), "float32")
    before = all_bits(model)
    with pytest.raises(ValueError, match="several inputs are a list"):
        reestimate(model, (x, x))
    sequence = keras.Sequential([keras.Input((None, 3)), KINDS["ours"]()])
    batches = [np.ones((4, length, 3), "float32") for length in (5, 7)]
    with pytest.raises(ValueError, match=r"one shape.*\(5, 3\).*\(7, 3\)"):
        reestimate(sequence, iter(batches))
    assert all_bits(model) == before
    norm = model.layers[-1]
    assert [y.status for y in reestimate(model, [x, x], layers=norm).layers] == ["updated"]


@pytest.mark.parametrize("method", ["layerwise", "one_pass"])
def test_a_data_set_without_batches(method):
    """Keras would take an image (28, 28, 1) for 28 examples of one column."""
    inputs = keras.Input((None, None, 1))
    model = keras.Model(inputs, KINDS["ours"]()(inputs))
    x = example_data((28, 28, 1), 20)
    before = all_bits(model)
    with pytest.raises(ValueError, match=r"\(28, 28, 1\) for \(None, None, None, 1\).*be batched"):
        reestimate(model, iter(x), method=method)
    with pytest.raises(ValueError, match=r"\(28, 28, 1\).*x\[None\] is one example"):
        reestimate(model, x[0], method=method)
    assert all_bits(model) == before
    assert reestimate(model, x, method=method).samples == 20
    for small in (
        MLP((3,), KINDS["ours"], input_shape=(4,)),
        keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(2, 3), KINDS["ours"]()]),
    ):
        shape = small.inputs[0].shape[1:]
        for elements in (example_data(shape, 8), example_data((5, *shape[1:]), 8)):
            with pytest.raises(ValueError, match="The data set must be batched"):
                reestimate(small, iter(elements), method=method)
        with pytest.raises(ValueError, match="The data set must be batched"):
            reestimate(small, ((x, 0) for x in example_data(shape, 8)), method=method)


def test_inputs_of_other_sizes():
    model = MLP((3, 5), KINDS["ours"], input_shape=(8,))
    x = example_data((8,), 40)
    reestimate(model, x)
    before = all_bits(model)
    with pytest.raises(ValueError, match=r"\(40, 5\) for \(None, 8\)"):
        reestimate(model, x[:, :5])
    sequential = keras.Sequential([keras.Input((8,)), layers.Dense(2), KINDS["ours"]()])
    reestimate(sequential, x)
    with pytest.raises(ValueError, match=r"value 8.*\(40, 5\)"):
        reestimate(sequential, x[:, :5])
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    several = keras.Model([b, a], KINDS["ours"]()(layers.Concatenate()([a, b])))
    with pytest.raises(ValueError, match=r"\(40, 3\) for \(None, 4\)"):
        reestimate(several, [x[:, :3], x[:, :4]])
    with pytest.raises(ValueError, match=r"\(40, 4\) for \(None, 3\)"):
        reestimate(several, iter([{"a": x[:, :4], "b": x[:, :4]}]))
    for data in ([x[:, :4], x[:, :3]], {"a": x[:, :3], "b": x[:, :4]}):
        assert reestimate(several, data).samples == 40
    assert all_bits(model) == before


def test_inputs_that_keras_reshapes():
    """A last axis of size 1 more or less; and a Sequential model asks for none of its sizes."""
    x = example_data((8,), 20)
    one, row = keras.Input((1,)), keras.Input((8, 1))
    model = keras.Model(one, KINDS["ours"]()(one))
    for data in (x[:, :1], x[:, 0], iter(x[:, :1]), iter([x[:, 0]]), x[:, :1].astype("float64")):
        assert reestimate(model, data).samples == 20
        assert_exact(model, x[:, :1], 1)
    model = keras.Model(row, KINDS["ours"]()(row))
    for data in (x, x[..., None], x[..., None, None]):
        assert reestimate(model, data).samples == 20
        assert_exact(model, x, 1)
    convolution = layers.Conv1D(2, 3)
    model = keras.Sequential([keras.Input((8, 1)), convolution, KINDS["ours"]()])
    for data in (x, x[:, :6], x[:, :6, None]):
        assert reestimate(model, data).samples == 20
        assert_exact(model, data, 1)


@pytest.mark.parametrize("method", ["layerwise", "one_pass"])
def test_other_shapes_leave_nothing_behind(method):
    """A function of TensorFlow that meets several takes for unknown what differs in them."""
    seen = []

    class Code(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = layers.Dense(2), KINDS["ours"]()

        def call(self, inputs):
            seen.append(tuple(inputs.shape))
            return self.norm(ops.reshape(self.dense(inputs), (-1, 2)))

    x = example_data((8, 3), 20)
    model = Code()
    model(x)
    for data in (x, x[:, 0], x[:13]):
        assert reestimate(model, data, method=method).samples == len(data)
        assert len(seen[-1]) == data.ndim
    with pytest.raises(Exception, match=r"\b2[)\]]"):  # each backend has a type of its own
        reestimate(model, x[..., :2], method=method)
    assert reestimate(model, x[:7], method=method).samples == 7
    assert seen[-1][1:] == (8, 3)


def test_snapshots():
    model = trained_model()
    first = snapshot(model)
    before = everything(model)
    reestimate(model, example_data((4,), 50))
    second = snapshot(model)
    change = diff(first, second)
    assert change.largest_shift > 0.1
    for layer in change.layers:
        old_mean, old_variance = first.moments(layer.name)
        mean, variance = second.moments(layer.name)
        np.testing.assert_allclose(
            layer.shift, (mean - old_mean) / np.sqrt(variance + layer.epsilon)
        )
        scale = np.sqrt((variance + layer.epsilon) / (old_variance + layer.epsilon))
        np.testing.assert_allclose(layer.scale, scale)
    restore(model, first)
    assert everything(model) == before
    with pytest.raises(ValueError, match="same batch normalization layers"):
        restore(small_model(), first)
    with pytest.raises(ValueError, match="Received: snapshot of type list"):
        restore(model, model.get_weights())
    with pytest.raises(ValueError, match="model=None without any"):
        snapshot(None)
    with pytest.raises(ValueError, match="same layers"):
        diff(first, small_model())
    narrow = MLP((3, 5), KINDS["ours"], input_shape=(4,))
    wide = small_model()
    before = all_bits(wide)
    with pytest.raises(ValueError, match="shapes of the layer's"):
        restore(wide, snapshot(narrow))
    assert all_bits(wide) == before


def test_the_model_can_be_changed_saved_and_estimated_again(tmp_path):
    """What is remembered between two calls must not outlive a change of the model."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), KINDS["ours"](), layers.Dense(2)])
    x = example_data((4,), 30)
    reestimate(model, x)
    model.pop()
    model.add(layers.Dense(3))
    model.add(KINDS["keras"](epsilon=0.1))
    randomized(model)
    reestimate(model, x)
    assert_exact(model, x, 2)
    model.layers[1].epsilon = 2.0
    reestimate(model, x)
    assert_exact(model, x, 2)
    custom = {k.__name__: k for k in KINDS.values()}
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects=custom)
    assert diff(model, loaded).largest_shift == 0
    model.save_weights(tmp_path / "m.weights.h5")
    reestimate(model, x + 1)
    model.load_weights(tmp_path / "m.weights.h5")
    assert diff(model, loaded).largest_shift == 0
    copied = keras.models.clone_model(model)
    reestimate(copied, x)
    assert len(statistics._normalizations(copied)) == 2


@pytest.mark.parametrize(
    "method", ["layerwise", pytest.param("one_pass", marks=pytest.mark.slow_on_jax)]
)
def test_what_was_compiled_is_kept_as_long_as_the_model_is_the_same(method):
    model = MLP((3, 5), KINDS["ours"], input_shape=(4,), classes=2)
    x, y = example_data((4,), 400), np.zeros((400, 2), "float32")
    kind = {"layerwise": _layerwise.Plan, "one_pass": _layerwise.OnePass}[method]

    def kept():
        reestimate(model, x, method=method)
        return vars(model)[_layerwise._KEPT].plans[kind][1]

    model.compile("sgd", "mse")
    first = kept()
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    adapt(model, x + 1, method=method)
    assert kept() is first
    if method == "layerwise":
        assert_exact(model, x, 2)
    model.compile("sgd", "mse", run_eagerly=True)
    second = kept()
    assert second is not first
    assert all(program.run_eagerly for program in second.programs)


def test_what_was_compiled_is_not_kept_when_a_function_or_an_array_has_changed():
    x = example_data((4,), 64)
    first, dense = layers.Normalization(), layers.Dense(3, activation="relu")
    first.adapt(x)
    norms = [KINDS["ours"](name=name) for name in "ab"]
    model = keras.Sequential([keras.Input((4,)), first, norms[0], dense, norms[1]])
    reestimate(model, x)
    first.adapt(x + 100)
    reestimate(model, x)
    assert_exact(model, x, 2)
    dense.activation = keras.activations.sigmoid
    reestimate(model, x)
    assert_exact(model, x, 2)


@pytest.mark.slow_on_jax
def test_what_is_compiled_to_measure_binds_no_switch():
    """`use_batch_statistics` waits for a function of the model's own, also after a failure."""
    x, norms = example_data((4,), 64), [KINDS["ours"](name=name) for name in "abc"]
    steps = [norms[0], layers.Dense(3), norms[1], layers.Dense(3), norms[2]]
    model = keras.Sequential([keras.Input((4,)), *steps])
    with pytest.raises(ValueError, match="finite values only"):
        reestimate(model, x * np.nan, batch_size=64, layers="c")
    norms[0].use_batch_statistics = True
    reestimate(model, x, batch_size=64, layers="c")
    norms[1].use_batch_statistics = True
    reestimate(model, x, batch_size=64, layers="c")  # by a function with both choices
    rows = inputs_of_layers(model, x)[norms[2]]
    expected = rows.mean(0), rows.var(0)
    np.testing.assert_allclose(statistics_of(norms[2]), expected, rtol=1e-4, atol=1e-6)


def test_lists():
    """Of batches (x, y) a stream; of arrays several inputs, which a model may not have."""
    model, x = small_model(), example_data((4,), 64)
    batches = [(x[i : i + 16], np.zeros(16)) for i in range(0, 64, 16)]
    assert reestimate(model, batches).samples == 64
    assert_exact(model, x, 2)
    with pytest.raises(ValueError, match="Received: 4 of shapes"):
        reestimate(model, [batch for batch, _ in batches])
    with pytest.raises(ValueError, match="along axis 0"):
        reestimate(model, x.tolist())


# Adaptation --------------------------------------------------------------------------------------


def test_adapt_without_prior_is_unbiased_where_the_layer_is():
    layer = keras_norm.layers.BatchNormalization(unbiased=True)
    model, x = keras.Sequential([keras.Input((4,)), layer]), example_data((4,), 1000)
    adapt(model, x)
    np.testing.assert_allclose(statistics_of(layer)[1], x.var(axis=0, ddof=1), rtol=1e-5)


def shifted(shape, n, seed, shift=3.0, scale=2.0):
    return example_data(shape, n, seed) * np.float32(scale) + np.float32(shift)


def test_adapt_without_prior_is_reestimation():
    model = mixed_model(convnet)
    target = shifted((20, 20, 2), 60, 1)
    source = snapshot(model)
    reestimate(model, target)
    expected = snapshot(model)
    restore(model, source)
    report = adapt(model, target, name="target")
    assert diff(expected, model).largest_shift < 1e-6
    assert (report.method, report.data, report.settings["prior"]) == ("adapt", "target", 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_adapt_without_prior_forgets_any_source(value):
    model, target = small_model(), shifted((4,), 60, 1)
    reestimate(model, target)
    expected = statistics_of(model.get_layer("dense1_norm"))
    for variable in statistics._statistics_of(model.get_layer("dense1_norm")):
        variable.assign(np.full(variable.shape, value))
    adapt(model, target)
    for a, b in zip(statistics_of(model.get_layer("dense1_norm")), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "build",
    [pytest.param(mlp9, marks=pytest.mark.slow_on_jax), with_code_inside],
    ids=lambda f: f.__name__,
)
def test_adapt_blends_by_pseudo_counts(build):
    """Every layer: N / (N + n) of the source, n / (N + n) of the inputs that it now receives."""
    shape, number = MODELS[build]
    model = mixed_model(build)
    source, target = snapshot(model), shifted(shape, 60, 1)
    report = adapt(model, target, prior=20, batch_size=32)
    seen = inputs_of_layers(model, target)
    names = {id(y): name for name, y in statistics._normalizations(model).items()}
    assert len(seen) == number
    for layer, rows in seen.items():
        mean, variance = source.moments(names[id(layer)])
        sigma = np.sqrt(rows.var(axis=0) + layer.epsilon)
        found_mean, found_variance = statistics_of(layer)
        expected = 0.25 * mean + 0.75 * rows.mean(axis=0)
        assert np.max(np.abs(found_mean - expected) / sigma) < 1e-5
        expected = 0.25 * variance + 0.75 * rows.var(axis=0)
        assert np.max(np.abs(found_variance - expected) / sigma**2) < 1e-5
    assert report.settings["prior"] == 20
    restore(model, source)
    adapt(model, target, prior=np.inf)
    assert diff(source, model).largest_shift == 0
    for prior in (-1, None, "16"):
        with pytest.raises(ValueError, match=f"prior={prior!r}"):
            adapt(model, target, prior=prior)


def test_adapt_warns_of_small_and_skewed_samples():
    model = small_model()
    target = shifted((4,), 200, 1)
    with pytest.warns(UserWarning, match="5 target examples are few"):
        adapt(model, target[:5])
    adapt(model, target[:5], prior=1000)  # no warning
    labels = np.zeros(200, int)
    classes = MLP((6,), KINDS["ours"], input_shape=(4,), classes=10)
    with pytest.warns(UserWarning, match="shares, 1 of the model's 10 classes"):
        adapt(classes, (target, labels))
    with pytest.warns(UserWarning, match="shares, 2 of the model's 10 classes"):
        adapt(classes, (target, np.eye(10)[np.arange(200) % 2]))
    adapt(classes, (target, np.arange(200) % 10))
    adapt(classes, target)


def test_running_adaptation_follows_a_stream():
    """The first layer's statistics by the formula; all of them back at the end."""
    model = small_model()
    source = snapshot(model)
    layer = model.get_layer("dense1_norm")
    batches = [shifted((4,), 40, seed, shift=seed) for seed in range(5)]
    kernel, bias = (w.astype(np.float64) for w in model.get_layer("dense1").get_weights())
    with RunningAdaptation(model, prior=32, half_life=80) as stream:
        for i, batch in enumerate(batches, start=1):
            report = stream.update(batch, batch_size=16)
            z = np.concatenate([b @ kernel + bias for b in batches[:i]])
            w = np.repeat(0.5 ** (np.arange(i)[::-1] * 40 / 80), 40)
            assert stream.weight == pytest.approx(w.sum())
            mean = np.average(z, axis=0, weights=w)
            variance = np.average((z - mean) ** 2, axis=0, weights=w)
            share = w.sum() / (w.sum() + 32)
            old_mean, old_variance = source.moments("dense1_norm")
            found = statistics_of(layer)
            np.testing.assert_allclose(
                found[0], (1 - share) * old_mean + share * mean, rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                found[1], (1 - share) * old_variance + share * variance, rtol=1e-4
            )
            assert report.samples == 40
        before = snapshot(model)
        with pytest.raises(ValueError, match="NaN"):
            stream.update(np.full((4, 4), np.nan, "float32"))
        assert diff(before, model).largest_shift == 0
        assert stream.weight == pytest.approx(w.sum())
        stream.reset()
        assert stream.weight == 0
        assert diff(source, model).largest_shift == 0
        stream.update(batches[0])
    assert diff(source, model).largest_shift == 0
    for half_life in (0, None, "1e3"):
        with pytest.raises(ValueError, match=f"half_life={half_life!r}"):
            RunningAdaptation(model, half_life=half_life)


def test_running_adaptation_forgets_all_in_a_long_update(tmp_path):
    model, alone = small_model(), small_model()
    with RunningAdaptation(model, prior=0, half_life=8) as stream:
        stream.update(shifted((4,), 100, 0, shift=9))
        last = shifted((4,), 9000, 1)
        stream.update(last)
        reestimate(alone, last, samples=None)
        assert diff(snapshot(alone), model).largest_shift < 1e-4
    with RunningAdaptation(model, half_life=np.inf) as stream:
        report = stream.update(last[:50])
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").settings["half_life"] == "inf"


def test_domains(tmp_path):
    model = small_model()
    x = example_data((4,), 100)
    reestimate(model, x)
    source = snapshot(model)
    domains = DomainStatistics(model)
    report = domains.adapt("bright", shifted((4,), 100, 1, shift=9))
    domains.adapt("dark", shifted((4,), 100, 2, shift=-9), prior=10)
    assert report.data == "bright"
    assert list(domains) == ["source", "bright", "dark"]
    assert diff(source, model).largest_shift == 0
    with domains.domain("bright") as adapted:
        assert adapted is model
        bright = snapshot(model)
        assert diff(source, model).largest_shift > 0.5
        with domains.domain("dark"):
            assert diff(bright, model).largest_shift > 0.5
        assert diff(bright, model).largest_shift == 0
    bits = all_bits(model)
    with pytest.raises(RuntimeError, match="inside"), domains.domain("bright"):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="name='fog'"), domains.domain("fog"):
        pass
    with pytest.raises(ValueError, match="NaN"):
        domains.adapt("fog", np.full((9, 4), np.nan, "float32"))
    assert all_bits(model) == bits
    assert "fog" not in list(domains)
    path = domains.save(tmp_path / "domains.npz")
    others = DomainStatistics(model)
    others.load(path)
    assert list(others) == list(domains)
    assert diff(others["dark"], domains["dark"]).largest_shift == 0
    stranger = DomainStatistics(MLP((3,), KINDS["ours"], input_shape=(4,)))
    with pytest.raises(ValueError, match="same batch normalization layers"):
        stranger.load(path)
    assert list(stranger) == ["source"]
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    np.savez(tmp_path / "number.npz", **{"5": np.ones(3)})
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-40])
    for name, message in (
        ("other.npz", "with an array 'weights'"),
        ("number.npz", "with an array '5'"),
        ("array.npy", "TypeError"),
        ("text.txt", "ValueError"),
        ("cut.npz", "BadZipFile"),
    ):
        with pytest.raises(ValueError, match=f"save wrote.*{name}.*{message}.*Pass another file"):
            domains.load(tmp_path / name)
    assert list(others) == list(domains)


@pytest.mark.slow_on_jax
def test_adaptation_recovers_what_a_shift_costs():
    """Two classes; the target is scaled and shifted. Weights as trained, no target labels."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 2000)
    x = (rng.normal(size=(2000, 6)) + 1.5 * (2 * y[:, None] - 1)).astype("float32")
    target = 4 * x + np.float32(20)
    model = MLP((16, 16), KINDS["ours"], input_shape=(6,), classes=2)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(True))
    model.fit(x[:1000], y[:1000], epochs=3, verbose=0)

    def accuracy(x):
        return np.mean(np.argmax(model.predict(x[1000:], verbose=0), axis=1) == y[1000:])

    reestimate(model, x[:1000])
    assert accuracy(x) > 0.97
    assert accuracy(target) < 0.7
    adapt(model, target[:1000])
    assert accuracy(target) > 0.97

"""The shortcuts of layers on PyTorch: what they take, and the same numbers as the full path."""

import keras
import numpy as np
import pytest
from arrays import array, tensor
from keras import ops

from keras_norm import _kernels_torch
from keras_norm.kernels import BatchShortcut
from keras_norm.layers import BatchNormalization, SpatialBatchNormalization

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="a shortcut past PyTorch's slow Python")


class Counting(BatchNormalization):
    """Counts the calls that took the full path."""

    full = 0

    def _in_full(self, *arguments):
        self.full += 1
        return super()._in_full(*arguments)


def layer_for(shape, **arguments):
    layer = Counting(**{"momentum": 0.9, **arguments})
    layer.build(shape)
    rng = np.random.default_rng(5)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(1, 0.5, variable.shape))
    return layer


def normal(*shape, seed=0, dtype="float32"):
    return (np.random.default_rng(seed).normal(size=shape) * 2 + 3).astype(dtype)


def step(layer, x, **arguments):
    """y, the gradients of x, gamma and beta, and the state after a step."""
    import torch

    x = torch.tensor(x, requires_grad=True)
    y = layer(x, training=True, **arguments)
    parameters = [v.value for v in (layer.gamma, layer.beta) if v is not None]
    weights = torch.tensor(np.random.default_rng(1).normal(size=y.shape), dtype=y.dtype)
    wanted = [v for v in (x, *parameters) if v.requires_grad]
    gradients = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    state = [*map(array, layer.weights), layer.skipped_batches]
    return [array(y), *(None if g is None else array(g) for g in gradients), *state]


def same(found, expected, close):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:  # a sum of many numbers is as exact as the largest of its like
            np.testing.assert_allclose(a, b, rtol=close, atol=close * max(1, np.abs(b).max()))


def test_on_pytorch_alone():
    layer, x = layer_for((4, 3)), normal(4, 3)
    for calls in (1, 2, 3):
        layer(tensor(x), training=True)
        assert layer.full == (1 if BACKEND == "torch" else calls)
    assert BatchShortcut().is_open_to(tensor(x)) == (BACKEND == "torch")


SHAPES = [
    ((6, 3), -1),
    ((1, 3), -1),
    ((2, 4, 4, 3), -1),  # few channels: laid side by side
    ((2, 3, 3, 16), -1),
    ((2, 5, 4, 4), 1),
    ((2, 5, 1, 4), 1),
    ((3, 140, 140, 13), -1),  # more rows than the kernel adds up at once, in equal parts
    ((1, 16411, 12), -1),  # a prime number: in unequal ones
    ((2, 12, 100, 100), 1),
]


@on_torch
@pytest.mark.parametrize("far", [0.0, 1e3])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"center": False, "scale": False}], ids=str)
def test_the_numbers_of_the_full_path_in_float64(shape, axis, options, far):
    """Two steps and inference against a layer of float64, which has the shortcut as well."""
    import torch

    ours = layer_for(shape, axis=axis, **options)
    exact = BatchNormalization(axis, 0.9, dtype="float64", **options)
    exact.build(shape)
    exact.set_weights(ours.get_weights())
    for seed in (0, 1):
        x = normal(*shape, seed=seed) + np.float32(far)
        same(step(ours, x), step(exact, x.astype("float64")), 1e-3 if far else 1e-4)
    assert ours.full == 1
    with torch.no_grad():
        for _ in range(2):
            y, expected = ours(tensor(x)), exact(tensor(x.astype("float64")))
            np.testing.assert_allclose(array(y), array(expected), rtol=1e-3, atol=1e-3)
    assert ours.full == 1


@on_torch
def test_shapes_are_learned_and_forgotten(monkeypatch):
    import torch

    monkeypatch.setattr("keras_norm._shortcuts.MOST_SHAPES", 2)
    layer = layer_for((None, 3))
    for n, full in ((4, 1), (5, 2), (4, 2), (5, 2), (6, 3), (4, 4), (6, 4)):
        step(layer, normal(n, 3))
        assert layer.full == full, n
    double = torch.float64
    layer(torch.zeros(4, 3, dtype=double), training=True)  # not the dtype in which it computes
    assert layer(torch.zeros(4, 3, dtype=double), training=True).dtype == torch.float32
    assert layer.full == 6
    layer = layer_for((None, 3), dtype="mixed_bfloat16")
    for full in (1, 2):
        assert layer(torch.ones(4, 3), training=True).dtype == torch.bfloat16
        assert layer.full == full
    for full in (3, 4):  # an empty batch
        assert layer(torch.ones(0, 3), training=True).shape == (0, 3)
        assert layer.full == full
    assert layer.skipped_batches == 2


@on_torch
@pytest.mark.parametrize("shape", [(6, 16), (2, 4, 4, 3), (3, 80, 80, 16)], ids=str)
def test_the_full_path_to_the_last_bit(shape):
    """So that a training is the same whichever path its steps take."""
    layer, other = layer_for(shape), layer_for(shape)
    for seed in range(4):
        x = normal(*shape, seed=seed)
        other._shortcut._known.clear()
        for found, expected in zip(step(layer, x), step(other, x), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert (layer.full, other.full) == (1, 4)


@on_torch
def test_each_statistic_is_written_once_and_only_if_it_moves():
    """In parts, a thread beside would read, or an interruption leave, what is neither."""
    x = tensor(normal(6, 16))
    layer = layer_for(x.shape)
    moving = layer.moving_mean.value, layer.moving_variance.value
    layer(x, training=True)
    before = [v._version for v in moving]
    layer(x, training=True)
    assert [v._version for v in moving] == [n + 1 for n in before]
    layer.update_statistics = False
    layer(x, training=True)
    assert [v._version for v in moving] == [n + 1 for n in before]
    assert layer.full == 1


@on_torch
def test_statistics_that_pytorch_would_train_move_all_the_same():
    """`requires_grad_` means all parameters of a module, which the statistics are for PyTorch."""
    x = normal(6, 16)
    layer, other = layer_for(x.shape), layer_for(x.shape)
    step(layer, x)
    layer.requires_grad_(True)
    step(other, x)
    same(step(layer, x), step(other, x), 1e-6)
    assert layer.full == 1


def frozen(layer):
    layer.trainable = False


CHANGES = {
    "nothing": (lambda layer: None, True),
    "momentum": (lambda layer: setattr(layer, "momentum", 0.25), True),
    "no updates": (lambda layer: setattr(layer, "update_statistics", False), True),
    "frozen, with gradients": (frozen, False),
    "parameters not trained": (lambda layer: setattr(layer, "train_parameters", False), False),
    "moving statistics": (lambda layer: setattr(layer, "use_batch_statistics", False), False),
    "unbiased": (lambda layer: setattr(layer, "unbiased", True), False),
    "ghost batches": (lambda layer: setattr(layer, "virtual_batch_size", 2), False),
    "parameters of another dtype": (lambda layer: layer.double(), False),
}


@on_torch
@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since(name):
    """The second layer meets the shape for the first time after the change."""
    change, short = CHANGES[name]
    layer, other = (layer_for((None, 2, 2, 16)) for _ in range(2))
    x = normal(6, 2, 2, 16)
    step(layer, x)
    step(other, normal(5, 2, 2, 16))
    other.set_weights(layer.get_weights())
    change(layer)
    change(other)
    full = layer.full
    x = normal(6, 2, 2, 16, seed=1)
    same(step(layer, x), step(other, x), 1e-6)
    assert (layer.full == full) == short


@on_torch
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("shape", [(6, 16), (2, 100, 100, 16)], ids=str)
def test_a_batch_that_is_not_finite_is_counted(shape, value):
    layer, x = layer_for(shape), normal(*shape)
    step(layer, x)
    before = layer.get_weights()
    wrong = x.copy()
    wrong.flat[0] = value
    for count in (1, 2):
        layer(tensor(wrong), training=True)
        np.testing.assert_array_equal(layer.get_weights()[2:], before[2:])
        assert layer.skipped_batches == count
    layer.update_statistics = False
    layer(tensor(wrong), training=True)
    assert layer.skipped_batches == 2
    assert layer.full == 1


@on_torch
def test_masks_weights_scopes_and_a_forced_implementation(monkeypatch):
    x = normal(6, 3, 16)
    layer, other = layer_for(x.shape), layer_for(x.shape)
    step(layer, x)
    other.set_weights(layer.get_weights())
    mask = tensor(np.array([[True, True, False]] * 6))
    same(step(layer, x, mask=mask), step(other, x, mask=mask), 1e-6)
    assert layer.full == 2
    step(layer, x, sample_weight=tensor(np.ones((6, 3), "float32")))
    assert layer.full == 3
    before = layer.get_weights()
    trained = [v.value for v in layer.trainable_variables]
    state = [ops.zeros_like(v.value) for v in layer.non_trainable_variables]
    _, (mean, variance, *_) = layer.stateless_call(trained, state, tensor(x), training=True)
    assert layer.full == 4
    np.testing.assert_array_equal(layer.get_weights(), before)
    np.testing.assert_allclose(array(mean), 0.1 * x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(array(variance), 0.1 * x.var((0, 1)), rtol=1e-4)
    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "composed")
    step(layer, x)
    assert layer.full == 5


@on_torch
def test_inference_that_records_gradients_keeps_its_statistics():
    """A training step between the call and its backward pass must not change the gradient."""
    import torch

    x = normal(6, 16)
    layer = layer_for(x.shape)
    step(layer, x)
    z = torch.tensor(x, requires_grad=True)
    y = layer(z)
    scale = layer.gamma.value.detach() / torch.sqrt(layer.moving_variance.value + layer.epsilon)
    scale = scale.clone()
    step(layer, 10 * x)
    (dx,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(dx, scale.expand(6, 16))


@on_torch
def test_a_wrong_epsilon_is_refused_as_in_the_full_path():
    layer, x = layer_for((6, 3)), tensor(normal(6, 3))
    layer(x, training=True)
    layer.epsilon = -1.0
    with pytest.raises(ValueError, match="epsilon"):
        layer(x, training=True)


@on_torch
def test_warnings_about_untouched_statistics_come_after_the_shortcut_was_learned():
    import torch

    layer = SpatialBatchNormalization("channels_last", warn_untouched=True)
    layer.update_statistics = False
    x = tensor(normal(2, 3, 3, 4))
    layer(x, training=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="no batch has touched"):
        layer(x)


@on_torch
@pytest.mark.parametrize(
    ("rows", "parts"), [(2**14, 1), (2**14 + 2, 2), (3 * 2**14, 3), (10 * 7001, 5), (32771, 0)]
)
def test_the_number_of_parts(rows, parts):
    pieces = _kernels_torch.Pieces((rows, 2), 1)
    assert pieces.parts == parts
    assert parts == 0 or (rows % parts == 0 and rows / parts <= _kernels_torch.ROWS_AT_ONCE)
    assert pieces.elements == rows


@on_torch
@pytest.mark.parametrize("rows", [3 * 2**14, 32771])
def test_parts_that_differ_are_merged(rows):
    """Every third row is far from the others, and the first of the rows far from the last."""
    x = normal(rows, 2, dtype="float64") + 10 * (np.arange(rows) % 3)[:, None]
    x += 10 * (np.arange(rows) > rows // 2)[:, None]
    pieces = _kernels_torch.Pieces(x.shape, 1)
    mean, variance = _kernels_torch._moments_by_kernel(tensor(x.astype("float32")), pieces)
    np.testing.assert_allclose(array(mean), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(array(variance), x.var(0), rtol=1e-5)

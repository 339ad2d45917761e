"""Layers in `keras.RematScope` and `torch.utils.checkpoint`: backward passes call them once more.

A repeated call has to compute what the first one did, and must not change the state again.
"""

import contextlib

import keras
import numpy as np
import pytest
from arrays import array

from keras_norm import inspection, layers, research

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch tells of a repeated call")


def x_of(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def trained_for_two_steps(layer, mode=None):
    """A model with a layer like that, with or without rematerialization."""
    keras.utils.set_random_seed(0)
    before, after = keras.layers.Dense(4), keras.layers.Dense(1)
    names = [layer.name]
    with contextlib.nullcontext() if mode is None else keras.RematScope(mode, layer_names=names):
        layer = type(layer).from_config(layer.get_config())
        model = keras.Sequential([keras.Input((6, 3)), before, layer, after])
    # Keras's own scope cannot be traced by TensorFlow where there are keyword arguments.
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=BACKEND == "tensorflow")
    x = x_of(8, 6, 3)
    for _ in range(2):
        model.train_on_batch(x, x[..., :1])
    return model


def assert_same(found, expected):
    for a, b in zip(found.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "list_of_layers"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LayerNormalization", {}),
        ("RMSNormalization", {}),
        ("GroupNormalization", {"groups": 2}),
        ("InstanceNormalization", {}),
    ],
)
def test_layers_without_state(name, options, mode):
    layer = getattr(layers, name)(**options)
    assert_same(trained_for_two_steps(layer, mode), trained_for_two_steps(layer))


def test_looked_at_from_outside():
    """What is noted of a rematerialized layer are values, on JAX too."""

    def distribution(**scope):
        keras.utils.set_random_seed(0)
        with keras.RematScope(**scope):
            model = keras.Sequential(
                [keras.Input((3,)), keras.layers.Dense(4, name="dense"), keras.layers.Dense(2)]
            )
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return inspection.distributions(model, x_of(8, 3), np.arange(8) % 2, ["dense"])["dense"]

    found = distribution(mode="list_of_layers", layer_names=["dense"])
    expected = distribution(mode="list_of_layers", layer_names=[])
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-7)


# Moving statistics --------------------------------------------------------------------------------


@on_torch
@pytest.mark.parametrize("mode", ["full", "list_of_layers"])
def test_moving_statistics_move_once_in_a_step(mode):
    def check(cls):
        layer = cls(momentum=0.5)
        assert_same(trained_for_two_steps(layer, mode), trained_for_two_steps(layer))

    check(layers.BatchNormalization)
    with pytest.raises(AssertionError):
        check(keras.layers.BatchNormalization)


@on_torch
@pytest.mark.parametrize(
    "layer",
    [
        layers.BatchNormalization(momentum=None),
        layers.BatchNormalization(virtual_batch_size=4, unbiased=True),
        research.DecorrelatedBatchNormalization(),
    ],
)
def test_other_moving_statistics(layer):
    assert_same(trained_for_two_steps(layer, "full"), trained_for_two_steps(layer))


@pytest.mark.skipif(BACKEND != "jax", reason="JAX traces the arguments of what it repeats")
@pytest.mark.parametrize("layer", [layers.BatchNormalization(), layers.Dropout(0.5)])
def test_whether_it_trains_must_be_known(layer):
    with pytest.raises(ValueError, match=r"whether it trains.*Received: .*leave the layer"):
        trained_for_two_steps(layer, "full")


# Dropout ------------------------------------------------------------------------------------------


def masks_of_a_step(cls, reentrant):
    """Elements that stayed, by the outputs and by the gradient, of two calls of one layer."""
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = cls(0.5, seed=1)  # Keras's fails with one only
    x = [torch.tensor(x_of(20, 30) + 9, requires_grad=True) for _ in range(2)]
    y = [checkpoint(lambda v: layer(v, training=True), v, use_reentrant=reentrant) for v in x]
    sum(v.sum() for v in y).backward()
    return [array(v) != 0 for v in y], [array(v.grad) != 0 for v in x], layer


@on_torch
@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_repeats_its_mask(reentrant):
    def check(cls):
        stayed, by_gradient, _ = masks_of_a_step(cls, reentrant)
        np.testing.assert_array_equal(by_gradient, stayed)
        assert (stayed[0] != stayed[1]).any()

    check(layers.Dropout)
    with pytest.raises(AssertionError):
        check(keras.layers.Dropout)


@on_torch
def test_dropout_goes_on_as_without():
    _, _, repeated = masks_of_a_step(layers.Dropout, reentrant=False)
    plain = layers.Dropout(0.5, seed=1)
    x = x_of(20, 30)
    for _ in range(2):
        plain(x, training=True)
    np.testing.assert_array_equal(array(repeated(x, training=True)), array(plain(x, training=True)))


@on_torch
def test_dropout_in_a_scope_within_a_scope():
    layer = layers.Dropout(0.5, seed=1)
    assert_same(trained_for_two_steps(layer, "full"), trained_for_two_steps(layer))


@on_torch
def test_dropout_keeps_the_last_states_only(monkeypatch):
    import torch

    from keras_norm import _rematerialization

    monkeypatch.setattr(_rematerialization, "_DRAWS_KEPT", 5)
    layer, x = layers.Dropout(0.5), x_of(2, 3)
    with torch.no_grad():  # as a rematerialized function runs first
        for _ in range(9):
            layer(x, training=True)
    assert len(layer._draws._states) == 5


@on_torch
def test_dropout_outside_of_any_scope_leaves_pytorchs_generator_alone():
    import torch

    layer = layers.Dropout(0.5)
    before = torch.get_rng_state()
    layer(x_of(2, 3), training=True)
    assert (torch.get_rng_state() == before).all()
    assert not layer._draws._states

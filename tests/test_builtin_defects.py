"""What is measurably wrong with `keras.layers.BatchNormalization`, and right here.

All of it, and what is wrong with other built-in layers, is listed in docs/defects.md.

Every test runs the same check on both layers and wants it to fail for the built-in one: should
Keras mend a defect, the test says so. (Those of several replicas are in test_distributed.py.)
"""

import itertools
import re
import warnings

import keras
import numpy as np
import pytest
from arrays import array

from keras_norm import _kernels_choice, statistics
from keras_norm.layers import BatchNormalization, GroupNormalization

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()


def ours_alone(check):
    check(BatchNormalization)
    with pytest.raises((AssertionError, ValueError)):
        check(keras.layers.BatchNormalization)


def x_of(*shape):
    return (np.random.default_rng(0).normal(size=shape) + 3).astype("float32")


def test_a_fully_masked_batch_moves_nothing():
    def check(cls):
        layer, x = cls(momentum=0.5), x_of(4, 5, 3)
        layer(x, training=True)
        before = array(layer.moving_mean)
        layer(x, training=True, mask=np.zeros((4, 5), bool))
        np.testing.assert_allclose(array(layer.moving_mean), before, rtol=1e-6)

    ours_alone(check)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_one_number_that_is_not_finite_does_not_poison(bad):
    def check(cls):
        layer, x = cls(momentum=0.5), x_of(4, 5, 3)
        poisoned = x.copy()
        poisoned[1, 2, 0] = bad
        layer(poisoned, training=True)
        for _ in range(20):
            layer(x, training=True)
        assert np.isfinite(array(layer(x))).all()

    ours_alone(check)


@pytest.mark.parametrize("shape", [(4,), (4, 5, 3), (1, 5, 1)])
def test_masks_of_any_rank(shape):
    def check(cls):
        layer, x = cls(), x_of(4, 5, 3)
        layer(x, training=True, mask=np.ones(shape, bool))

    ours_alone(check)


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled")
def test_momentum_changes_after_compilation():
    def check(cls):
        x = x_of(8, 3)
        layer = cls(momentum=0.99)
        model = keras.Sequential([keras.Input((3,)), layer])
        model.compile("sgd", "mse")
        model.fit(x, x, batch_size=8, verbose=0)
        layer.momentum = 0.0
        model.fit(x, x, batch_size=8, verbose=0)
        np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-5)

    ours_alone(check)


def test_no_cold_start():
    """After 50 steps at momentum .99 the average is still 60% of what it began with."""

    def check(cls):
        debiased = {"debiased": True} if cls is BatchNormalization else {}
        layer, x = cls(momentum=0.99, **debiased), x_of(64, 3)
        for _ in range(50):
            layer(x, training=True)
        np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-4)
        np.testing.assert_allclose(array(layer.moving_variance), x.var(0), rtol=1e-4)

    ours_alone(check)


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean_in_float32(mean):
    """The built-in layer's variance is off: on PyTorch, by E[x^2] - E[x]^2, even negative."""
    x = (mean + np.random.default_rng(0).normal(size=(64, 64, 64, 3))).astype("float32")
    wide = x.astype("float64")
    axes = (0, 1, 2)

    def check(cls):
        layer = cls(momentum=0.0)
        y = array(layer(x, training=True))
        np.testing.assert_allclose(array(layer.moving_variance), wide.var(axes), rtol=1e-5)
        expected = (wide - wide.mean(axes)) / np.sqrt(wide.var(axes) + 1e-3)
        np.testing.assert_allclose(y, expected, atol=1e-7 * mean)

    if BACKEND == "jax":  # how far off the built-in layer is depends on how XLA adds up
        check(BatchNormalization)
    else:
        ours_alone(check)


def test_constant_channels():
    """y is beta and the variance 0, where the built-in layer finds a variance, or NaN."""

    def check(cls):
        layer = cls(momentum=0.0)
        y = layer(np.full((8, 5, 3), 1000.1, "float32"), training=True)
        np.testing.assert_allclose(array(y), 0, atol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance), 0, atol=1e-9)

    ours_alone(check)


def test_frozen_parameters_are_no_inference():
    """`trainable = False` also stops the statistics and normalizes by them; here each is apart."""

    def check(cls):
        layer, x = cls(momentum=0.0), x_of(8, 3)
        layer.build(x.shape)
        if cls is BatchNormalization:
            layer.train_parameters = False
        else:
            layer.trainable = False
        assert not layer.trainable_variables
        y = array(layer(x, training=True))
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-5)

    ours_alone(check)


def test_mean_of_many_float16_numbers():
    """Statistics stay in float32 under a pure float16 policy; 6e4 squared does not fit float16."""

    def check(cls):
        x = (6e4 + 1e3 * np.random.default_rng(0).standard_normal((512, 3))).astype("float16")
        layer = cls(momentum=0.0, dtype="float16")
        layer(x, training=True)
        expected = x.astype("float64").var(0)
        np.testing.assert_allclose(array(layer.moving_variance), expected, rtol=1e-3)

    ours_alone(check)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there it exists")
def test_synchronized_on_every_backend():
    def check(cls):
        cls(synchronized=True)(x_of(8, 3), training=True)

    ours_alone(check)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there it is kept")
def test_float64_is_kept():
    """On JAX and PyTorch the built-in layer computes the statistics of float64 in float32."""

    def check(cls):
        layer = cls(momentum=0.0, dtype="float64")
        x = np.random.default_rng(0).normal(size=(64, 3)) + 3
        layer(x, training=True)
        np.testing.assert_allclose(array(layer.moving_variance), x.var(0), rtol=1e-12)

    ours_alone(check)


def test_variance_of_small_batches():
    """Over all batches of two, the built-in layer finds half of the variance of N - 1.

    Ours, of N - 1 by choice, finds all of it; re-estimation, which pools by counts, is exact even
    where the examples are sorted, and there is next to none within a batch.
    """
    x = x_of(6, 3)

    def check(cls):
        layer = cls(momentum=0.0, **({"unbiased": True} if cls is BatchNormalization else {}))
        found = []
        for pair in itertools.combinations(x, 2):
            layer(np.stack(pair), training=True)
            found.append(array(layer.moving_variance))
        np.testing.assert_allclose(np.mean(found, 0), x.var(0, ddof=1), rtol=1e-5)

    ours_alone(check)
    model = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    statistics.reestimate(model, np.sort(x, axis=0), batch_size=2, progress=False)
    np.testing.assert_allclose(array(model.layers[0].moving_variance), x.var(0), rtol=1e-5)


def test_untouched_statistics_are_warned_of():
    def check(cls):
        ours = {"warn_untouched": True} if cls is BatchNormalization else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cls(**ours)(x_of(8, 3), training=False)
        assert any("no batch has touched" in str(w.message) for w in caught)

    ours_alone(check)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a kernel of TensorFlow")
def test_fused_kernel_in_the_graph(monkeypatch):
    """The built-in layer is made of single operations, forward and backward."""
    import tensorflow as tf

    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(_kernels_choice, "fused_by", lambda: "oneDNN")  # what it is taken for

    def check(cls):
        layer = cls()
        layer.build((None, 8, 8, 64))

        @tf.function
        def dx(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return tape.gradient(y, x, output_gradients=x)

        graph = dx.get_concrete_function(tf.TensorSpec((256, 32, 32, 64))).graph.as_graph_def()
        kinds = re.findall(r'op: "(\w+)"', str(graph))  # with those of its functions
        assert {"FusedBatchNormV3", "FusedBatchNormGradV3"} <= {*kinds}

    ours_alone(check)


def test_build_changes_no_argument():
    """`groups=-1` stays -1: the built-in layer writes the number of channels over it."""
    groups = {}
    for cls in (GroupNormalization, keras.layers.GroupNormalization):
        layer = cls(groups=-1)
        layer.build((None, 5, 6))
        groups[cls] = layer.get_config()["groups"]
    assert list(groups.values()) == [-1, 6]

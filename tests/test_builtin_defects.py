"""What is measurably wrong with `keras.layers.BatchNormalization`, and right here.

Every test runs the same check on both layers and wants it to fail for the built-in one: should
Keras mend a defect, the test says so. (Those of several replicas are in test_distributed.py.)
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_norm.layers import BatchNormalization

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()


def array(x):
    return ops.convert_to_numpy(x)


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


def test_mean_of_many_float16_numbers():
    """Statistics stay in float32 under a pure float16 policy; 6e4 squared does not fit float16."""

    def check(cls):
        x = (6e4 + 1e3 * np.random.default_rng(0).standard_normal((512, 3))).astype("float16")
        layer = cls(momentum=0.0, dtype="float16")
        layer(x, training=True)
        expected = x.astype("float64").var(0)
        np.testing.assert_allclose(array(layer.moving_variance), expected, rtol=1e-3)

    ours_alone(check)

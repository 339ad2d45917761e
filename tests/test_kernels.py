"""Every implementation gives the numbers of `functional.batch_normalization`, gradients too."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_norm import functional, kernels
from keras_norm._gradients import gradients

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
POSSIBLE = {
    "tensorflow": ["composed", "fused", "folded"],
    "jax": ["composed"],
    "torch": ["composed", "native"],
}[BACKEND]
SHAPES = [(6, 5), (1, 3), (4, 8, 6), (3, 4, 6, 6), (2, 5, 3, 16), (2, 2, 3, 2, 7)]


def array(x):
    return ops.convert_to_numpy(x)


def compare(a, b, tolerance, what):
    a, b = array(a).astype("float64"), array(b).astype("float64")
    assert a.shape == b.shape, what
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=what)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", POSSIBLE)
def test_same_numbers_and_gradients(implementation, shape, affine):
    rng = np.random.default_rng(1)
    x = (3 * rng.standard_normal(shape) + 2).astype("float32")
    dy = ops.convert_to_tensor(rng.standard_normal(shape).astype("float32"))
    parameters = [rng.standard_normal(shape[-1]).astype("float32") for _ in range(2 * affine)]

    def loss(normalization):
        return lambda x, *p: ops.sum(normalization(x, *p, epsilon=1e-3)[0] * dy)

    def forced(*arrays, **options):
        return kernels.batch_normalization(*arrays, implementation=implementation, **options)

    tensors = [ops.convert_to_tensor(v) for v in (x, *parameters)]
    for ours, expected, what in zip(
        forced(*tensors),
        functional.batch_normalization(*tensors),
        ("y", "mean", "variance"),
        strict=True,
    ):
        compare(ours, expected, 2e-5, what)
    _, ours = gradients(loss(forced), [x, *parameters])
    _, expected = gradients(loss(functional.batch_normalization), [x, *parameters])
    for a, b, what in zip(ours, expected, ("dx", "dgamma", "dbeta"), strict=False):
        compare(a, b, 5e-5, what)


@pytest.mark.parametrize("implementation", POSSIBLE)
def test_large_mean_loses_nothing(implementation):
    """A mean of 1000 beside a variance of 1, 65,536 values: E[x²] − E[x]² is off by up to 1."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((64, 32, 32, 16))).astype("float32")
    y, mean, variance = kernels.batch_normalization(x, implementation=implementation, epsilon=0.0)
    exact = x.astype("float64")
    over = (0, 1, 2)
    digits = {"composed": 2e-7, "folded": 2e-7, "fused": 5e-6, "native": 1e-4}
    np.testing.assert_allclose(array(mean), exact.mean(over), rtol=digits[implementation])
    np.testing.assert_allclose(array(variance), exact.var(over), rtol=2e-3)
    np.testing.assert_allclose(array(y).std(over), 1, rtol=2e-3)


@pytest.mark.parametrize("implementation", POSSIBLE)
@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 1, 16)], ids=str)
def test_one_element_per_channel(implementation, shape):
    x = np.full(shape, 7, "float32")
    beta = np.arange(shape[-1], dtype="float32")
    y, mean, variance = kernels.batch_normalization(x, None, beta, implementation=implementation)
    # PyTorch computes x a + (beta - mean a): rounding of 7 / sqrt(epsilon).
    np.testing.assert_allclose(array(y).ravel(), beta, atol=1e-5)
    np.testing.assert_array_equal(array(mean), 7)
    np.testing.assert_array_equal(array(variance), 0)


@pytest.mark.parametrize("implementation", POSSIBLE)
def test_empty_batch(implementation):
    y, mean, variance = kernels.batch_normalization(
        np.zeros((0, 2, 2, 16), "float32"), implementation=implementation
    )
    assert tuple(y.shape) == (0, 2, 2, 16)
    np.testing.assert_array_equal(array(mean), 0)
    np.testing.assert_array_equal(array(variance), 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("implementation", POSSIBLE)
def test_other_dtypes(implementation, dtype):
    if implementation == "fused" and dtype == "float64":
        pytest.skip("the fused kernel knows no float64")
    rng = np.random.default_rng(2)
    x = ops.cast(rng.standard_normal((4, 5, 5, 16)), dtype)
    y, mean, variance = kernels.batch_normalization(x, implementation=implementation)
    expected = functional.batch_normalization(x)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert keras.backend.standardize_dtype(mean.dtype) == (
        "float64" if dtype == "float64" else "float32"
    )
    coarse = {"float16": 2e-3, "bfloat16": 2e-2, "float64": 1e-12}[dtype]
    compare(ops.cast(y, "float64"), ops.cast(expected[0], "float64"), coarse, "y")
    compare(mean, expected[1], 1e-5 if dtype != "float64" else 1e-12, "mean")
    compare(variance, expected[2], 1e-5 if dtype != "float64" else 1e-12, "variance")


def test_the_table():
    shape, rows = (256, 32, 32, 64), (256, 84)
    few = (256, 24, 24, 6)
    expected = {
        "tensorflow": ["fused", "folded", "folded", "folded", "composed"],
        "jax": ["composed"] * 5,
        "torch": ["composed"] * 5,
    }[BACKEND]
    asked = [
        kernels.choose(shape, "float32"),
        kernels.choose(shape, "float64"),
        kernels.choose(rows, "float32"),
        kernels.choose(few, "float32"),
        kernels.choose(shape, "float32", axis=1),
    ]
    assert asked == expected
    assert kernels.choose(shape, "float32", weighted=True) == "composed"
    assert kernels.choose(shape, "float32", axis=(1, 3)) == "composed"


def test_what_cannot_be_done_is_said():
    x = np.zeros((2, 3), "float32")
    with pytest.raises(ValueError, match="implementation='fastest'"):
        kernels.batch_normalization(x, implementation="fastest")
    kernel = "native" if BACKEND == "torch" else "fused"
    with pytest.raises(ValueError, match="weighted=True"):
        kernels.batch_normalization(x, weights=np.ones((2, 1)), implementation=kernel)
    with pytest.raises(ValueError, match=r"axis=\(0, 1\)"):
        kernels.batch_normalization(x, axis=(0, 1), implementation=kernel)

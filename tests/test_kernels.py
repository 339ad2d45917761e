"""Every implementation gives the numbers of `functional`, gradients too."""

import copy
import functools

import keras
import numpy as np
import pytest
from arrays import ROUNDING
from differentiation import fast, fast_gradients, value_and_gradients
from keras import ops

from keras_norm import (
    _kernels_choice,
    _kernels_common,
    _kernels_fused,
    _kernels_sums,
    _kernels_torch,
    autodiff,
    functional,
    kernels,
    layers,
)
from keras_norm._gradients import gradients  # on JAX only inside of `fast`: see there

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
POSSIBLE = {
    "tensorflow": ["composed", "compiled", "fused", "folded"],
    "jax": ["composed", "folded", "staged"],
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

    for ours, expected, what in zip(
        fast(forced)(x, *parameters),
        fast(functional.batch_normalization)(x, *parameters),
        ("y", "mean", "variance"),
        strict=True,
    ):
        compare(ours, expected, 2e-5, what)
    _, ours = fast_gradients(loss(forced), [x, *parameters])
    _, expected = fast_gradients(loss(functional.batch_normalization), [x, *parameters])
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
    np.testing.assert_allclose(array(mean), exact.mean(over), rtol=2e-7)
    np.testing.assert_allclose(array(variance), exact.var(over), rtol=2e-5)
    np.testing.assert_allclose(array(y).std(over), 1, rtol=2e-5)
    expected = (exact - exact.mean(over)) / exact.std(over)
    off = 5e-5 if implementation == "native" else 3e-6  # where the mean is subtracted at once
    np.testing.assert_allclose(array(y), expected, atol=off)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("implementation", POSSIBLE)
def test_many_rows(implementation, axis):
    """More than PyTorch's kernel gets at once, and no multiple of that."""
    if axis == 1 and implementation not in ("composed", "native"):
        pytest.skip("channels on the last axis only")
    x = (2 + np.random.default_rng(0).standard_normal((90, 32, 32, 16))).astype("float32")
    exact = x.astype("float64")
    mean, variance = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    y = (exact - mean) / np.sqrt(variance)
    options = {"implementation": implementation, "axis": axis, "epsilon": 0.0}
    moved = np.moveaxis(x, -1, axis)
    ours = kernels.batch_normalization(moved, **options)
    np.testing.assert_allclose(np.moveaxis(array(ours[0]), axis, -1), y, atol=1e-4)
    statistics = (ops.convert_to_tensor(v.astype("float32")) for v in (mean, variance))
    inferred = kernels.normalize(moved, *statistics, axis=axis, epsilon=0.0)
    np.testing.assert_allclose(np.moveaxis(array(inferred), axis, -1), y, atol=1e-5)
    np.testing.assert_allclose(array(ours[1]), mean, atol=5e-5)
    np.testing.assert_allclose(array(ours[2]), variance, rtol=5e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a kernel of TensorFlow")
def test_the_fused_kernel_alone_loses_a_large_mean():
    import tensorflow as tf

    x = 10_000 + np.random.default_rng(0).standard_normal((1, 512, 512, 16)).astype("float32")
    exact = x.mean((0, 1, 2), dtype="float64")
    kernel = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=np.ones(16, "float32"), offset=np.zeros(16, "float32"), mean=[], variance=[]
    )
    assert np.abs(array(kernel.batch_mean) - exact).max() > 1
    _, mean, _ = kernels.batch_normalization(x, implementation="fused")
    np.testing.assert_allclose(array(mean), exact, rtol=2e-7)


@pytest.mark.skipif(BACKEND != "torch", reason="a kernel of PyTorch")
def test_pytorchs_kernel_alone_loses_a_large_mean():
    """Of layer normalization: more than a float32 of x less its mean would lose."""
    import torch

    x = (1000 + np.random.default_rng(0).standard_normal((64, 500))).astype("float32")
    exact = x.astype("float64")
    exact = (exact - exact.mean(1, keepdims=True)) / exact.std(1, keepdims=True)
    alone, *_ = torch.native_layer_norm(torch.from_numpy(x), (500,), None, None, 0.0)
    assert np.abs(array(alone) - exact).max() > 3e-5
    ours = kernels.layer_normalization(x, epsilon=0.0)
    np.testing.assert_allclose(array(ours), exact, atol=3e-6)


@pytest.mark.parametrize("implementation", POSSIBLE)
@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 1, 16)], ids=str)
def test_one_element_per_channel(implementation, shape):
    x = np.full(shape, 7, "float32")
    beta = np.arange(shape[-1], dtype="float32")
    y, mean, variance = kernels.batch_normalization(x, None, beta, implementation=implementation)
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
    if BACKEND != "tensorflow" and implementation != "composed" and dtype != "float64":
        pytest.skip("half precision is composed there")
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
    dy = ops.cast(rng.standard_normal(x.shape), dtype)
    (ours,), (exact,) = (
        fast_gradients(lambda x, f=f, o=o: ops.sum(f(x, **o)[0] * dy), [x])[1]
        for f, o in (
            (kernels.batch_normalization, {"implementation": implementation}),
            (functional.batch_normalization, {}),
        )
    )
    assert keras.backend.standardize_dtype(ours.dtype) == dtype
    compare(ops.cast(ours, "float64"), ops.cast(exact, "float64"), 2 * coarse, "dx")


def test_whether_all_are_finite():
    """Also where they add up to more than float32 holds."""
    large = ops.convert_to_tensor(np.full(8, 2e38, "float32"))
    assert bool(kernels.are_finite(large, 0 * large))
    for bad in (np.inf, -np.inf, np.nan):
        other = ops.convert_to_tensor(np.array([0.0] * 7 + [bad], "float32"))
        assert not bool(kernels.are_finite(large, other))


def test_backends_that_train_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ValueError, match=r"one of the backends jax, .*Received: .*'numpy'"):
        layers.LayerNormalization()(np.ones((2, 3), "float32"))


def test_the_table(monkeypatch):
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    shape, rows = (256, 32, 32, 64), (256, 84)
    few = (256, 24, 24, 6)
    expected = {
        "tensorflow": ["fused", "folded", "folded", "folded", "composed"],
        "jax": ["staged", "staged", "folded", "staged", "composed"],
        "torch": ["native"] * 5,
    }[BACKEND]
    asked = [
        kernels.choose("batch_normalization", shape, "float32"),
        kernels.choose("batch_normalization", shape, "float64"),
        kernels.choose("batch_normalization", rows, "float32"),
        kernels.choose("batch_normalization", few, "float32"),
        kernels.choose("batch_normalization", shape, "float32", axis=1),
    ]
    assert asked == expected
    large = {"tensorflow": "fused", "jax": "folded", "torch": "native"}[BACKEND]
    assert kernels.choose("batch_normalization", (1024, 1024), "float32") == large
    assert kernels.choose("batch_normalization", shape, "float32", weighted=True) == "composed"
    assert kernels.choose("batch_normalization", shape, "float32", axis=(1, 3)) == "composed"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("library", ["oneDNN", "oneDNN without AVX-512", "Eigen"])
def test_the_table_in_training(library, monkeypatch):
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(_kernels_choice, "fused_by", lambda: library)

    def taken(*shape, dtype="float32"):
        return kernels.choose("batch_normalization", shape, dtype, training=True)

    fused = "fused" if library == "oneDNN" else "compiled"
    assert taken(256, 32, 32, 64) == taken(None, 8, 8, 256) == taken(1024, 1024) == fused
    assert taken(256, 24, 24, 6) == taken(None, 24, 24, 6) == taken(256, 84) == "compiled"
    assert taken(256, 32, 32, 64, dtype="bfloat16") == fused
    assert taken(256, 32, 32, 64, dtype="float64") == "compiled"
    assert taken(None, None, None, 64) == "fused"
    assert taken(None, None, None, 6) == taken(None, 100) == "folded"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a kernel of TensorFlow")
@pytest.mark.parametrize(
    ("enabled", "flags", "library"),
    [
        (True, "avx2 avx512f avx512_bf16", "oneDNN"),
        (True, "avx2 fma", "oneDNN without AVX-512"),
        (False, "avx2 avx512f", "Eigen"),
    ],
)
def test_whose_the_fused_kernel_is(enabled, flags, library, monkeypatch, tmp_path):
    from tensorflow.python.util import _pywrap_util_port

    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(_pywrap_util_port, "IsMklEnabled", lambda: enabled)
    monkeypatch.setattr(_kernels_choice, "Path", lambda path: tmp_path / "cpuinfo")
    assert _kernels_choice.fused_by.__wrapped__() == library


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a kernel of TensorFlow")
def test_the_fused_kernel_is_traced_once_for_all_shapes(monkeypatch):
    """In a graph; outside of one it is not traced at all."""
    import tensorflow as tf

    calls = []
    kernel = tf.raw_ops.FusedBatchNormV3

    def counted(**arguments):
        calls.append(arguments["x"])
        return kernel(**arguments)

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", counted)
    _kernels_fused._traced_forward.cache_clear()
    _kernels_fused._forward.cache_clear()
    x = np.random.default_rng(0).standard_normal((3, 5, 5, 16)).astype("float32")

    @tf.function
    def thrice(x):
        for shape in ((3, 5, 5, 16), (15, 10, 8), (10, 120)):
            x = tf.reshape(x, shape)
            x, mean, variance = kernels.batch_normalization(x, implementation="fused")
            assert tuple(x.shape) == shape
            assert mean.shape == variance.shape == shape[-1:]
        return x

    thrice(x)
    assert len(calls) == 1
    for _ in range(2):
        kernels.batch_normalization(x[:2], implementation="fused")
    assert len(calls) == 3


@pytest.mark.skipif(BACKEND != "tensorflow", reason="bfloat16 is composed there")
def test_the_table_for_bfloat16(monkeypatch):
    """The fused kernel takes multiples of 16 channels quickly, and no others."""
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    images = {c: (128, 16, 16, c) for c in (6, 16, 24, 40, 64)}
    trained = {
        c: kernels.choose("batch_normalization", shape, "bfloat16") for c, shape in images.items()
    }
    assert trained == {6: "folded", 16: "fused", 24: "folded", 40: "folded", 64: "fused"}
    inferred = {
        c: kernels.choose("normalize", (None, None, None, c), "bfloat16") for c in (64, 100)
    }
    assert inferred == {64: "fused", 100: "composed"}
    assert kernels.choose("normalize", images[6], "bfloat16") == "fused"  # 16 rows, 96
    assert kernels.choose("batch_normalization", images[64], "float16") == "composed"


def test_the_environment_names_an_implementation(monkeypatch):
    for name in POSSIBLE:
        monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", name)
        assert kernels.choose("batch_normalization", (256, 32, 32, 64), "float32") == name
        assert (
            kernels.choose("batch_normalization", (256, 32, 32, 64), "float32", weighted=True)
            == "composed"
        )
    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "composed")
    assert kernels.choose("normalize", (256, 32, 32, 64), "float32") == "composed"
    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "products")
    products = "native" if BACKEND == "torch" else "products"  # which cannot be taken there
    assert kernels.choose("layer_normalization", (8, 4), "float32") == products
    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "quick")
    with pytest.raises(ValueError, match="KERAS_NORM_IMPLEMENTATION='quick'"):
        kernels.choose("batch_normalization", (8, 4), "float32")


def test_what_cannot_be_done_is_said():
    x = np.zeros((2, 3), "float32")
    with pytest.raises(ValueError, match="implementation='fastest'"):
        kernels.batch_normalization(x, implementation="fastest")
    kernel = "native" if BACKEND == "torch" else "fused"
    with pytest.raises(ValueError, match="weighted=True"):
        kernels.batch_normalization(x, weights=np.ones((2, 1)), implementation=kernel)
    with pytest.raises(ValueError, match=r"axis=\(0, 1\)"):
        kernels.batch_normalization(x, axis=(0, 1), implementation=kernel)
    kernels.choose("batch_normalization", (4, 6), "float32", axis=1)
    with pytest.raises(ValueError, match=r"axis=1\.0"):  # of which a cache makes the same key
        kernels.choose("batch_normalization", (4, 6), "float32", axis=1.0)


@pytest.mark.parametrize("size", [1, 3])
def test_parameters_of_another_size_are_refused(size):
    """Whatever takes the call: a kernel would broadcast them, or take them without a word."""
    x, wrong = np.ones((4, 5, 5, 6), "float32"), np.ones(size, "float32")
    right = np.ones(6, "float32")
    for implementation in POSSIBLE:
        for given in ({"gamma": wrong}, {"beta": wrong}):
            with pytest.raises(ValueError, match=rf"{next(iter(given))}. must have .*\({size},\)"):
                kernels.batch_normalization(x, **given, implementation=implementation)
    for name, options, faster in CASES:
        if np.ndim(options.get("axis", -1)):
            continue
        given = {"mean": right, "variance": wrong} if name == "normalize" else {"gamma": wrong}
        with pytest.raises(ValueError, match=rf"must have .*\({size},\)"):
            getattr(kernels, name)(x, **given, **options, implementation=faster)


@pytest.mark.skipif(BACKEND != "torch", reason="layouts in memory")
@pytest.mark.parametrize("far", [0.0, 1e3])
def test_layouts_of_sizes_of_1(far):
    """For some of them `torch.nn.BatchNorm2d` of PyTorch 2.13 gives wrong gradients."""
    import itertools

    rng = np.random.default_rng(0)
    for shape in [(4, 3, 5, 1), (4, 3, 1, 5), (1, 3, 5, 4), (3, 1, 6, 2)]:
        dy = ops.convert_to_tensor(rng.standard_normal(shape).astype("float32"))
        for order in itertools.permutations(range(len(shape))):
            stored = rng.standard_normal([shape[a] for a in order]).astype("float32") + far
            x = ops.convert_to_tensor(stored).permute(*np.argsort(order).tolist())
            assert tuple(x.shape) == shape
            for axis in (0, 1, 2):
                found = []
                for implementation in ("native", "composed"):
                    z = x.detach().requires_grad_()
                    options = {"axis": axis, "implementation": implementation}
                    y, _, _ = kernels.batch_normalization(z, **options)
                    y.backward(dy)
                    found.append(z.grad)
                np.testing.assert_allclose(*map(array, found), atol=1e-2 if far else 1e-4)


# Inference, and normalization within each example ---------------------------------------------


def given_statistics(rng, channels, dtype):
    return [rng.standard_normal(channels).astype(dtype), rng.random(channels).astype(dtype) + 0.5]


WITHIN = {
    "layer_normalization": [{}, {"axis": (-2, -1)}],
    "rms_normalization": [{}, {"axis": (-1, -2)}],
    "group_normalization": [{"groups": 1}, {"groups": 3}, {"groups": -1}],
    "instance_normalization": [{}],
    "normalize": [{}],
}
FASTER = {
    "layer_normalization": "products",
    "rms_normalization": "products",
    "group_normalization": "by_channel",
    "instance_normalization": "by_channel",
    "normalize": "fused",
}
OF_ROWS = "layer_normalization", "rms_normalization"
if BACKEND == "torch":
    FASTER = dict.fromkeys(FASTER, "native")
CASES = [(name, options, FASTER[name]) for name in WITHIN for options in WITHIN[name]]
if BACKEND == "jax":
    CASES = [case for case in CASES if case[0] != "normalize"]
if BACKEND == "tensorflow":
    CASES += [(name, o, "compiled") for name in WITHIN for o in WITHIN[name]]
    CASES += [(name, o, "x_hat") for name in OF_ROWS for o in WITHIN[name]]


def arrays_for(name, options, shape, dtype, affine):
    rng = np.random.default_rng(3)
    x = (3 * rng.standard_normal(shape) + 2).astype(dtype)
    lengths = shape[-1] if np.ndim(options.get("axis", -1)) == 0 else shape[-2:]
    count = affine * (1 if name == "rms_normalization" else 2)
    parameters = [rng.standard_normal(lengths).astype(dtype) for _ in range(count)]
    given = given_statistics(rng, shape[-1], dtype) if name == "normalize" else []
    return [x, *given, *parameters]


SHAPES_WITHIN = [(2, 3, 4, 6), (3, 5, 6), (2, 3, 2, 2, 9), (0, 2, 2, 6)]


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        *((shape, True) for shape in SHAPES_WITHIN),
        pytest.param(SHAPES_WITHIN[0], False, marks=pytest.mark.slow_on_jax),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "options", "faster"), CASES, ids=str)
def test_faster_within_an_example(name, options, faster, shape, affine):
    dtype, close = ("float32", 1e-5) if name == "normalize" else ("float64", 1e-11)
    arrays = arrays_for(name, options, shape, dtype, affine)
    dy = np.random.default_rng(4).standard_normal(shape)

    def results(module, **more):
        function = functools.partial(getattr(module, name), epsilon=1e-3, **options, **more)
        return value_and_gradients(function, arrays, dy)

    y, ours = results(kernels, implementation=faster)
    expected_y, expected = results(functional)
    compare(y, expected_y, close, "y")
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        compare(a, b, close, f"gradient {i}")


@pytest.mark.parametrize(("name", "options", "faster"), CASES, ids=str)
def test_faster_with_a_large_mean(name, options, faster):
    """A mean of 1000 beside a variance of 1 in float32."""
    rng = np.random.default_rng(5)
    x = (1000 + rng.standard_normal((2, 96, 96, 6))).astype("float32")
    given = []
    if name == "normalize":
        given = [x.mean((0, 1, 2), dtype="float64").astype("float32"), np.ones(6, "float32")]
    y = getattr(kernels, name)(x, *given, **options, implementation=faster, epsilon=1e-6)
    arrays = [ops.convert_to_tensor(a.astype("float64")) for a in (x, *given)]
    expected = getattr(functional, name)(*arrays, **options, epsilon=1e-6)
    compare(y, expected, 2e-5, "y")


@pytest.mark.parametrize(
    ("name", "options", "faster"),
    [case for case in CASES if case[0] in ("layer_normalization", "group_normalization")],
    ids=str,
)
def test_a_large_mean_in_float64(name, options, faster):
    x = 1e7 + np.random.default_rng(5).standard_normal((2, 4, 8, 48))
    y = getattr(kernels, name)(x, **options, implementation=faster, epsilon=0.0)
    expected = getattr(functional, name)(x.astype("float64") - 1e7, **options, epsilon=0.0)
    compare(y, expected, 1e-6, "y")


@pytest.mark.parametrize(
    "faster", sorted({f for name, _, f in CASES if name == "layer_normalization"})
)
@pytest.mark.parametrize("features", [1, 3, 17, 512])
def test_layer_normalization_whose_first_elements_are_far_away(features, faster):
    """Four standard deviations from the mean, the farthest that the mean of a sixteenth can be."""
    x = np.random.default_rng(5).standard_normal((64, features)).astype("float32")
    x[:, : -(-features // _kernels_common.SAMPLED)] += 1e4
    y = kernels.layer_normalization(x, epsilon=1e-6, implementation=faster)
    expected = functional.layer_normalization(x.astype("float64"), epsilon=1e-6)
    compare(y, expected, 2e-5, "y")


@pytest.mark.skipif(BACKEND == "torch", reason="half precision is composed there")
@pytest.mark.parametrize(
    ("name", "options", "faster", "dtype"),
    [
        pytest.param(*case, dtype, marks=pytest.mark.slow_on_jax if dtype == "bfloat16" else ())
        for case in CASES
        for dtype in ("float16", "bfloat16")
        if case[0] != "normalize" and (dtype == "float16" or case[1] is WITHIN[case[0]][0])
    ],
    ids=str,
)
def test_half_precision_within_an_example(name, options, faster, dtype):
    """Computed in float32, rounded once: as the composed one, to the last digit of an input."""
    shape = (3, 5, 4, 6)
    x, *parameters = arrays_for(name, options, shape, "float32", True)
    arrays = [ops.cast(x, dtype), *(ops.convert_to_tensor(p) for p in parameters)]
    dy = ops.cast(np.random.default_rng(4).standard_normal(shape), dtype)

    def results(implementation):
        function = getattr(kernels, name)
        function = functools.partial(function, implementation=implementation, **options)

        def both(*arrays):
            total = lambda *p: ops.sum(function(*p) * dy)  # noqa: E731
            return [function(*arrays), *gradients(total, arrays)[1]]

        return fast(both)(*arrays)

    ours, expected = (results(i) for i in (faster, "composed"))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = (array(ops.cast(v, "float32")) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=2 * ROUNDING[dtype] * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("name", "options", "faster"),
    [  # on JAX the first of two functions, for every other takes as long to compile
        pytest.param(
            *case,
            marks=()
            if case[0] in ("layer_normalization", "instance_normalization")
            and case[1] is WITHIN[case[0]][0]
            else pytest.mark.slow_on_jax,
        )
        for case in CASES
    ],
    ids=str,
)
def test_second_derivatives_of_the_faster(name, options, faster):
    dtype, close = ("float32", 1e-4) if name == "normalize" else ("float64", 1e-10)
    arrays = arrays_for(name, options, (2, 3, 2, 6), dtype, True)
    dy = np.random.default_rng(4).standard_normal((2, 3, 2, 6)).astype(dtype)

    def penalty(function, **more):
        def of(*arrays):
            def inner(*p):
                y = function(*p, epsilon=1e-2, **options, **more)
                return ops.sum(y * y * ops.convert_to_tensor(dy))

            _, (dx, *_) = gradients(inner, arrays)
            return ops.sum(dx * dx)

        return of

    _, ours = fast_gradients(penalty(getattr(kernels, name), implementation=faster), arrays)
    _, expected = fast_gradients(penalty(getattr(functional, name)), arrays)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        scale = max(1.0, float(np.abs(array(b)).max()))
        compare(array(a) / scale, array(b) / scale, close, f"gradient {i}")


def test_the_table_within_an_example(monkeypatch):
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    shape = (32, 32, 32, 64)
    for name, faster in FASTER.items():
        fast = (BACKEND, name) != ("jax", "normalize")
        assert kernels.choose(name, shape, "float32") == (faster if fast else "composed")
        half = fast and faster in ("products", "by_channel")
        assert kernels.choose(name, shape, "float16") == (faster if half else "composed")
        of_other_axis = kernels.choose(name, shape, "float32", axis=1)
        assert of_other_axis == (
            "native" if (BACKEND, name) == ("torch", "normalize") else "composed"
        )
        training = kernels.choose(name, shape, "float32", training=True)
        compiled = BACKEND == "tensorflow"
        assert training == ("compiled" if compiled else faster if fast else "composed")
    if BACKEND != "torch":
        assert kernels.choose("normalize", (256, 84), "float32") == "composed"
    assert kernels.choose("group_normalization", (256, 84), "float32") == "composed"


def test_what_cannot_be_done_within_an_example_is_said():
    x = np.zeros((2, 3, 4), "float32")
    layer, instance = (FASTER[f"{name}_normalization"] for name in ("layer", "instance"))
    with pytest.raises(ValueError, match="implementation='fused'"):
        kernels.group_normalization(x, groups=2, implementation="fused")
    with pytest.raises(ValueError, match="axis=1"):
        kernels.layer_normalization(x, axis=1, implementation=layer)
    if BACKEND == "torch":
        with pytest.raises(ValueError, match="dtype='float16'"):
            kernels.instance_normalization(x.astype("float16"), implementation=instance)


TRAINED = {
    "batch": lambda: layers.BatchNormalization(momentum=0.9),
    "batch, switched": lambda: layers.BatchNormalization(use_batch_statistics=True),
    "layer": layers.LayerNormalization,
    "rms": layers.RMSNormalization,
    "group": lambda: layers.GroupNormalization(groups=4),
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_compiled(name, monkeypatch):
    """`fit`, whose batch size is not known when it is traced; the last batch is smaller."""
    rng = np.random.default_rng(7)
    x, labels = rng.standard_normal((40, 8, 8, 8)).astype("float32"), rng.integers(0, 3, 40)
    weights, taken = [], []

    def recorded(function):
        def record(*arguments, **options):
            taken.append(function(*arguments, **options))
            return taken[-1]

        return record

    choice = recorded(kernels.implementation_for)
    monkeypatch.setattr(kernels, "implementation_for", choice)
    for implementation in ("", "composed"):
        monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", implementation)
        keras.utils.set_random_seed(0)
        body = [TRAINED[name](), keras.layers.ReLU(), TRAINED[name]()]
        head = [keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((8, 8, 8)), *body, *head])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        model.fit(x, labels, batch_size=16, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
        if not implementation:
            taken.append(None)
            model.predict(x, verbose=0)
    fitting = taken[: taken.index(None)]
    assert "compiled" in fitting
    assert "compiled" not in taken[taken.index(None) :]  # predicting, or told otherwise
    for ours, expected in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
def test_a_step_in_two_programs_does_what_the_layer_does(dtype, monkeypatch):
    """The moving statistics, their switches and guards, all changed after it was traced."""
    import tensorflow as tf

    half = dtype.startswith("mixed")
    rng = np.random.default_rng(9)
    batches = [(3 * rng.standard_normal((n, 4, 6)) + 1).astype("float32") for n in (5, 2, 5, 1, 4)]
    batches[1][0, 0, 2] = np.nan
    batches.append(batches[0][:0])
    steps, training_step = [], kernels.training_step
    monkeypatch.setattr(
        kernels, "training_step", lambda *a, **k: (steps.append(a), training_step(*a, **k))[1]
    )

    def trained(implementation):
        monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", implementation)
        layer = layers.BatchNormalization(momentum=0.5, dtype=dtype)
        layer.build((None, 4, 6))
        kind = tf.TensorSpec((None, 4, 6), layer.compute_dtype)

        @tf.function(input_signature=[kind])
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                total = tf.reduce_sum(tf.cast(y, "float64") ** 3)
            return y, *tape.gradient(total, [x, layer.gamma.value, layer.beta.value])

        found = []

        def run(x):
            found.extend(array(v) for v in step(tf.cast(x, layer.compute_dtype)))
            found.extend(array(v).copy() for v in layer.weights)
            found.append(layer.skipped_batches)

        for x in batches:
            run(x)
        layer.momentum = 0.9
        run(batches[0])
        layer.update_statistics = False
        layer.train_parameters = False
        run(batches[2])
        run(batches[1])  # is not counted: nothing would have moved
        return found

    expected = trained("composed")
    assert not steps
    found = trained("compiled")
    assert len(steps) == 1  # traced once
    for ours, composed in zip(found, expected, strict=True):
        of_step, of_layer = (np.asarray(v, "float64") for v in (ours, composed))
        tolerance = 5e-2 if half else 1e-4
        np.testing.assert_allclose(of_step, of_layer, rtol=tolerance, atol=tolerance)
    assert found[-1] == 2  # the batch with NaN and the empty one


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("within", ["condition", "loop", "map"])
@pytest.mark.parametrize("name", ["batch", "layer"])
def test_compiled_within_control_flow(name, within, monkeypatch):
    import tensorflow as tf

    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(_kernels_choice, "fused_by", lambda: "Eigen")
    assert (
        kernels.choose("batch_normalization", (16, 8, 8, 16), "float32", training=True)
        == "compiled"
    )
    layer_of = "layer_normalization", (16, 8, 8, 16), "float32"
    assert kernels.choose(*layer_of, training=True) == "compiled"
    layer = TRAINED[name]()
    x = tf.constant(np.random.default_rng(8).standard_normal((2, 16, 8, 8, 16)), "float32")
    layer.build(x.shape[1:])

    def call(z, training):
        return (
            layer(z, training=training)
            if name != "batch"
            else kernels.batch_normalization(z, layer.gamma, layer.beta, training=training)[0]
        )

    def gradient(training):
        @tf.function
        def of(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                if within == "condition":
                    y = tf.cond(tf.size(x) > 0, lambda: call(x[0], training), lambda: x[0])
                elif within == "loop":
                    y = x[0]
                    for _ in tf.range(2):
                        y = call(2 * y, training)
                else:
                    y = tf.vectorized_map(lambda z: call(z, training), x)
                total = tf.reduce_sum(y**3)
            return tape.gradient(total, x)

        return array(of(x))

    np.testing.assert_allclose(gradient(True), gradient(False), atol=1e-3)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.cond is TensorFlow's")
@pytest.mark.parametrize("name", ["batch", "group"])
def test_two_gradients_through_a_condition(name):
    import tensorflow as tf

    layer, x = TRAINED[name](), tf.random.stateless_normal((4, 5, 5, 8), (3, 1))
    layer.build(x.shape)

    def gradients(branch):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = branch()
            first, second = tf.reduce_sum(y * y * x), tf.reduce_sum(y**3)
        return tape.gradient(first, x), tape.gradient(second, x)

    @tf.function
    def by_condition(yes):
        return gradients(lambda: tf.cond(yes, once, lambda: 2 * once()))

    def once():
        return layer(x, training=True)

    for found, expected in zip(by_condition(tf.constant(True)), gradients(once), strict=True):
        np.testing.assert_allclose(array(found), array(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
def test_layers_share_what_is_compiled(monkeypatch):
    import tensorflow as tf

    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    programs = []
    for _ in range(2):
        layer = layers.LayerNormalization()
        layer.build((None, 64, 512))
        graph = tf.function(lambda x, f=layer: f(x, training=True)).get_concrete_function(
            tf.TensorSpec([32, 64, 512])
        )
        calls = [op for op in graph.graph.get_operations() if "PartitionedCall" in op.type]
        programs.append([op.get_attr("f").name for op in calls])
    assert len(programs[0]) == 1
    assert programs[0] == programs[1]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("within", ["", "condition"])
@pytest.mark.parametrize("name", ["batch", "layer", "group"])
def test_batches_of_many_sizes_are_not_all_compiled(name, within, monkeypatch):
    """Compiling takes a second: of unknown sizes, those that are chosen in training alone do."""
    import tensorflow as tf

    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "compiled")
    called = []
    usual = autodiff.is_usual
    monkeypatch.setattr(autodiff, "is_usual", lambda n: called.append(n) or usual(n))
    layer = COMPILED[name]()
    layer.build((None, 3, 4))

    def of(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if within == "condition":
                y = tf.cond(tf.size(x) >= 0, lambda: layer(x, training=True), lambda: x)
            else:
                y = layer(x, training=True)
            total = tf.reduce_sum(y**3)
        return y, *tape.gradient(total, [x, layer.gamma.value, layer.beta.value])

    compiled = tf.function(of, input_signature=[tf.TensorSpec((None, 3, 4))])
    for n in (8, 11, 0):
        x = tf.constant(np.random.default_rng(n).standard_normal((n, 3, 4)), "float32")
        found = compiled(x)
        monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "composed")
        for ours, composed in zip(found, of(x), strict=True):
            np.testing.assert_allclose(ours, composed, rtol=1e-4, atol=1e-4)
    assert len(called) == 2  # in one trace, once for each half


def test_few_sizes_are_usual():
    assert all(map(autodiff.is_usual, (1, 8, 32, 50, 64, 96, 100, 128, 200, 250, 500, 512, 1024)))
    assert sum(map(autodiff.is_usual, range(900, 1100))) == 3  # 900, 1000, 1024
    assert sum(map(autodiff.is_usual, range(10_000, 100_000))) < 30


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
def test_outside_of_graphs_few_shapes_are_compiled(monkeypatch):
    import tensorflow as tf

    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(_kernels_choice, "fused_by", lambda: "Eigen")
    monkeypatch.setattr(_kernels_choice, "_MET", {})

    def taken(length):
        x = tf.zeros((20, length, 77))
        return kernels.choose_for("batch_normalization", x, training=True)

    assert [taken(length) for length in range(64, 72)] == ["compiled"] * 6 + ["fused"] * 2
    assert taken(64) == "compiled"
    with tf.Graph().as_default():
        assert taken(99) == "compiled"


@pytest.mark.skipif(BACKEND == "torch", reason="its kernel leaves such means to the composed one")
@pytest.mark.parametrize(
    ("name", "options", "faster"),
    [case for case in CASES if case[0] in ("layer_normalization", "group_normalization")],
    ids=str,
)
def test_gradient_within_an_example_far_from_0(name, options, faster):
    """A mean of 1000 beside a deviation of .05: one float32 holds it to 6e-4 of the deviation."""
    rng = np.random.default_rng(0)
    x = (1000 + 0.05 * rng.standard_normal((4, 6, 12))).astype("float32")
    dy = rng.standard_normal(x.shape)

    def slope(dtype, implementation):
        mix = ops.convert_to_tensor(dy.astype(dtype))
        more = {**options, "epsilon": 1e-5, "implementation": implementation}
        _, (dx,) = fast_gradients(
            lambda x: ops.sum(getattr(kernels, name)(x, **more) * mix), [x.astype(dtype)]
        )
        return array(dx)

    exact = slope("float64", "composed")
    for implementation in ("composed", faster):
        off, largest = np.abs(slope("float32", implementation) - exact).max(), np.abs(exact).max()
        assert off < 2e-5 * largest, implementation


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
def test_compiled_for_arrays_of_any_rank():
    """As many channels, on two axes to five, one after the other."""
    rng = np.random.default_rng(0)
    vectors = [rng.random(128).astype("float32") + 0.5 for _ in range(4)]
    for shape in [(6, 128), (2, 3, 128), (2, 3, 4, 128), (2, 2, 2, 2, 128), (5, 128), (3, 5, 128)]:
        x = rng.standard_normal(shape).astype("float32")
        ours, expected = (
            kernels.normalize(x, *vectors, implementation=i) for i in ("compiled", "composed")
        )
        compare(ours, expected, 1e-5, str(shape))
        ours, expected = (
            kernels.batch_normalization(x, *vectors[:2], implementation=i)[0]
            for i in ("compiled", "composed")
        )
        compare(ours, expected, 1e-4, str(shape))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
def test_outside_of_graphs_inference_is_compiled_when_it_comes_often(monkeypatch):
    import tensorflow as tf

    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(_kernels_choice, "_MET", {})
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal((96, 8, 8, 32)), "float32")
    few = _kernels_choice.CALLS_BEFORE_COMPILED - 1
    for name in ("normalize", "layer_normalization", "group_normalization"):
        before = FASTER[name]
        assert [kernels.choose_for(name, x) for _ in range(few)] == [before] * few
        assert kernels.choose_for(name, x) == "compiled"
        with tf.Graph().as_default():
            assert kernels.choose_for(name, x) == before  # it may be exported
    assert {kernels.choose_for("normalize", x[:, 0, 0]) for _ in range(20)} == {"composed"}

    layer = layers.BatchNormalization()
    layer(x, training=True)
    outputs = [layer(x, training=False) for _ in range(few + 2)]
    np.testing.assert_allclose(outputs[0], outputs[-1], atol=1e-5)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, training=False) ** 2)
    dgamma = tape.gradient(loss, layer.gamma.value)
    x_hat = (array(outputs[0]) - array(layer.beta)) / array(layer.gamma)
    np.testing.assert_allclose(dgamma, (2 * array(outputs[0]) * x_hat).sum((0, 1, 2)), rtol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("library", ["oneDNN", "oneDNN without AVX-512", "Eigen"])
def test_a_small_step_in_a_graph_is_not_compiled(library, monkeypatch):
    """There the calls take longer than the sweeps; outside of a graph a compiled step is one."""
    import tensorflow as tf

    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(_kernels_choice, "fused_by", lambda: library)
    images = "fused" if library == "oneDNN" else "compiled"

    def taken(*shape, function="rms_normalization", whole=None):
        names = []

        def choose():
            for training in (True, False):
                names.append(kernels.choose(function, shape, "float32", training=training))

        choice = choose if whole is None else tf.function(choose, jit_compile=whole)
        choice()
        return names

    assert taken(256, 256, whole=False) == ["x_hat", "products"]
    assert taken(None, 128, whole=False) == ["x_hat", "products"]
    assert taken(None, 512, whole=False) == ["compiled", "products"]
    assert taken(768, 100, whole=False) == ["x_hat", "products"]
    assert taken(384, 256, whole=False) == ["compiled", "products"]
    assert taken(768, 100, whole=False, function="layer_normalization")[0] == "compiled"
    assert taken(256, 256, whole=False, function="layer_normalization")[0] == "x_hat"
    assert taken(256, 256, whole=True) == ["compiled", "compiled"]
    assert taken(256, 256) == ["compiled", "products"]

    batch = {"function": "batch_normalization"}
    assert taken(256, 84, whole=False, **batch) == ["composed", "folded"]
    assert taken(768, 100, whole=False, **batch)[0] == "composed"
    assert taken(32, 4, 4, 64, whole=False, **batch)[0] == "composed"
    assert taken(64, 8, 8, 6, whole=False, **batch)[0] == "compiled"  # few channels
    assert taken(384, 256, whole=False, **batch)[0] == "compiled"
    assert taken(None, 120, whole=False, **batch)[0] == "composed"
    assert taken(None, 8, 8, 16, whole=False, **batch)[0] == images
    assert taken(256, 84, **batch)[0] == taken(256, 84, whole=True, **batch)[0] == "compiled"

    given = {"function": "normalize"}
    assert taken(16, 2, 2, 768, whole=False, **given)[1] == "composed"
    assert taken(16, 2, 2, 768, **given)[1] == "fused"  # two calls instead of seven
    assert taken(None, 2, 2, 768, whole=False, **given)[1] == "fused"
    assert taken(64, 8, 8, 16, whole=False, **given)[1] == "fused"
    assert taken(32, 4, 4, 512, whole=False, **given)[1] == "fused"
    on_the_edge = "fused" if library == "oneDNN" else "composed"
    assert taken(16, 4, 4, 512, whole=False, **given)[1] == on_the_edge


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
@pytest.mark.parametrize("name", ["layer", "group"])
def test_in_a_model_that_xla_compiles_inference_is_compiled_too(name, monkeypatch):
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    chosen, choose = [], kernels.implementation_for
    monkeypatch.setattr(
        kernels, "implementation_for", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1]
    )
    layer = {"layer": layers.LayerNormalization, "group": layers.GroupNormalization}[name]()
    model = keras.Sequential([keras.Input((8, 8, 32)), layer])
    x = np.random.default_rng(0).standard_normal((40, 8, 8, 32)).astype("float32")
    outputs = []
    for whole in (False, True):
        model.compile(jit_compile=whole)
        del chosen[:]
        outputs.append(model.predict(x, verbose=0))  # the last batch has 8 images
        assert {*chosen} == {"compiled" if whole else FASTER[f"{name}_normalization"]}
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere nothing is compiled by us")
def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)
    monkeypatch.setattr("keras_norm.autodiff.can_compile", lambda: False)
    taken = kernels.choose("layer_normalization", (64, 999), "float32", training=True)
    assert taken == "products"


def test_small_arrays_and_unknown_sizes_are_not_compiled(monkeypatch):
    monkeypatch.delenv("KERAS_NORM_IMPLEMENTATION", raising=False)

    def taken(*shape, function="layer_normalization"):
        return kernels.choose(function, shape, "float32", training=True)

    assert "compiled" not in (taken(64, 64), taken(None, 128), taken(None, None, 512))
    assert taken(None, None, None, 64, function="group_normalization") != "compiled"
    if BACKEND == "tensorflow":
        assert taken(None, 512) == taken(256, 120) == taken(None, 128, 256) == "compiled"


COMPILED = {
    "batch": layers.BatchNormalization,
    "layer": layers.LayerNormalization,
    "rms": layers.RMSNormalization,
    "group": lambda: layers.GroupNormalization(groups=2),
    "instance": layers.InstanceNormalization,
}


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # its own
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_by_pytorch_in_one_graph(name):
    import torch

    eager, compiled = COMPILED[name](), COMPILED[name]()
    x = np.random.default_rng(6).standard_normal((4, 3, 3, 8)).astype("float32")
    arguments = {"training": True} if name == "batch" else {}
    results = []
    for layer in (eager, compiled):
        layer.build(x.shape)
        torch._dynamo.reset()
        call = layer
        if layer is compiled:
            call = torch.compile(layer, backend="aot_eager", fullgraph=True)
        z = torch.tensor(x, requires_grad=True)
        y = call(z, **arguments)
        (y**3).sum().backward()
        variables = [v.value.detach() for v in layer.non_trainable_variables]
        gradients_ = [v.value.grad for v in layer.trainable_variables]
        results.append([y.detach(), z.grad, *gradients_, *variables])
    for ours, expected in zip(*results, strict=True):
        compare(expected, ours, 1e-5, name)


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's activation checkpoints and transforms")
@pytest.mark.parametrize("implementation", ["", "composed"])
@pytest.mark.parametrize("name", COMPILED)
def test_checkpoints_and_transforms_of_pytorch(name, implementation, monkeypatch):
    import torch
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", implementation)
    layer = COMPILED[name]()
    x = torch.tensor(np.random.default_rng(9).standard_normal((4, 3, 3, 8)), dtype=torch.float32)
    layer.build(x.shape)

    def slopes(function, **arguments):
        z = x.clone().requires_grad_()
        function(lambda z: layer(z, **arguments), z).pow(3).sum().backward()
        return z.grad

    for training in (False, True) if name == "batch" else (False,):
        arguments = {"training": training} if name == "batch" else {}
        expected = slopes(lambda f, z: f(z), **arguments)
        again = slopes(lambda f, z: checkpoint(f, z, use_reentrant=False), **arguments)
        torch.testing.assert_close(again, expected)
    z = x.clone().requires_grad_()
    layer(z).pow(3).sum().backward()

    def of_one(z):
        return layer(z[None])[0]

    torch.testing.assert_close(ops.vectorized_map(of_one, x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(ops.vectorized_map(of_one, x), layer(x))
    of_each = torch.func.vmap(torch.func.grad(lambda z: of_one(z).pow(3).sum()))(x)
    torch.testing.assert_close(of_each, z.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="such tensors are TensorFlow's")
@pytest.mark.parametrize(
    "make",
    [
        layers.BatchNormalization,
        layers.DecorrelatedBatchNormalization,
        layers.LayerNormalization,
        lambda: layers.GroupNormalization(groups=2),
        lambda: layers.Dropout(0.5),
    ],
)
def test_ragged_and_sparse_inputs_are_refused(make):
    import tensorflow as tf

    ragged = tf.RaggedTensor.from_row_splits(tf.ones((7, 4)), [0, 3, 7])
    with pytest.raises(ValueError, match=r"must be dense.*RaggedTensor of shape .*to_tensor\(\)"):
        make()(ragged, training=True)
    with pytest.raises(ValueError, match=r"must be dense.*SparseTensor of .*tf.sparse.to_dense"):
        make()(tf.sparse.from_dense(tf.ones((3, 4))), training=True)


def of_means(means, shape, axes):
    """float32 whose means over the axes are, turn by turn, these; of deviation 1."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal(shape)
    x = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
    kept = [1 if a in axes else n for a, n in enumerate(shape)]
    return (x + np.resize(means, kept)).astype("float32")


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere there is one way to sum")
@pytest.mark.parametrize("means", [[0.0, 0.9, -0.9], [0.0, 1.1], [0.0, 1e4, -3.0]], ids=str)
@pytest.mark.parametrize(
    ("name", "implementation", "options", "axes"),
    [
        ("batch_normalization", "staged", {}, (0, 1, 2)),
        ("layer_normalization", "products", {"axis": (-2, -1)}, (2, 3)),
        ("group_normalization", "by_channel", {"groups": -1}, (1, 2)),
    ],
)
def test_sums_of_near_and_of_far_means(name, implementation, options, axes, means, monkeypatch):
    import jax

    monkeypatch.setattr(_kernels_sums, "FEWEST_ELEMENTS_LOOKED_AT", 1)
    x = of_means(means, (4, 8, 8, 6), axes)
    dy = np.random.default_rng(12).standard_normal(x.shape)

    def slopes(dtype, **more):
        def y_of(x):
            y = getattr(kernels, name)(x, **options, **more, epsilon=1e-5)
            return y[0] if isinstance(y, tuple) else y

        def slope(x):
            return jax.grad(lambda x: ops.sum(y_of(x) ** 2 * dy.astype(dtype)))(x)

        return jax.jit(lambda x: (y_of(x), slope(x), jax.grad(lambda x: ops.sum(slope(x) ** 2))(x)))

    ours = slopes("float32", implementation=implementation)
    assert "cond[" in str(jax.make_jaxpr(ours)(x))
    expected = slopes("float64", implementation="composed")(x.astype("float64"))
    for a, b, off, what in zip(
        ours(x), expected, (3e-6, 5e-6, 3e-5), ("y", "dx", "of a slope"), strict=True
    ):
        compare(a, b, off * max(1, np.abs(b).max()), what)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere there is one way to sum")
def test_which_way_sums_are_taken():
    import jax

    def mean(z):
        return ops.mean(z, axis=1, keepdims=True)

    way = jax.jit(lambda z: _kernels_sums._moments(z, mean, lambda z: mean(z[:, :8])))
    near = of_means([0.9, -0.9], (256, 128), (1,))
    assert not np.any(way(near)[1])
    assert np.all(way(near + np.float32(3))[1])
    near[7] = np.nan  # in one row alone: the others as ever
    y = jax.jit(kernels.layer_normalization)(near)
    compare(
        np.delete(y, 7, 0), functional.layer_normalization(np.delete(near, 7, 0)), 3e-6, "the rest"
    )
    pair = np.stack([np.delete(near, 7, 0)[:255], of_means([5.0], (255, 128), (1,))])
    compare(
        jax.jit(jax.vmap(kernels.layer_normalization))(pair),
        functional.layer_normalization(pair),
        3e-6,
        "vmap",
    )


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere there is one way to sum")
def test_squares_that_overflow_where_deviations_do_not():
    import jax

    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 256)).astype("float32")
    x[5] = 1e18 * (1 + 1e-3 * rng.standard_normal(256))
    y = jax.jit(kernels.layer_normalization)(x)
    compare(y, functional.layer_normalization(x.astype("float64")), 3e-5, "y")


@pytest.mark.skipif(BACKEND != "jax", reason="an export of JAX")
def test_exported_with_a_batch_of_any_size():
    import jax

    function = jax.jit(kernels.layer_normalization)
    sizes = jax.export.symbolic_shape("n, 64")
    exported = jax.export.export(function)(jax.ShapeDtypeStruct(sizes, "float32"))
    x = np.random.default_rng(0).standard_normal((1024, 64)).astype("float32")
    for n in (3, 1024):
        compare(exported.call(x[:n]), function(x[:n]), 1e-6, f"of {n}")


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere there is one way to sum")
def test_where_means_are_looked_at(monkeypatch):
    import jax

    def looks(*shape, within=jax.jit):
        function = functools.partial(kernels.layer_normalization, implementation="products")
        return "cond[" in str(jax.make_jaxpr(within(function))(np.zeros(shape, "float32")))

    assert [looks(64, 512), looks(63, 512)] == [True, False]
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "some")  # a sum over devices
    assert not looks(64, 512)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's kernel, told that means are 0")
@pytest.mark.parametrize("longest", [1, 2**14], ids=["mean of squares", "norm"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("axes", [1, 2])
def test_rms_normalization_by_the_kernel_of_layer_normalization(axes, affine, longest, monkeypatch):
    import torch

    monkeypatch.setattr(_kernels_torch, "FEWEST_ELEMENTS_OF_RMS", 0)
    monkeypatch.setattr(_kernels_torch, "LONGEST_NORM", longest)
    axis = -1 if axes == 1 else (-2, -1)
    arrays = arrays_for("rms_normalization", {"axis": axis}, (4, 3, 5, 6), "float64", affine)
    tensors = [torch.tensor(v) for v in arrays]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    tensors = [v.requires_grad_() for v in tensors]
    options = {"axis": axis, "epsilon": 1e-3}
    ours = functools.partial(kernels.rms_normalization, **options, implementation="native")
    expected = functional.rms_normalization(*tensors, **options)
    dy = torch.tensor(np.random.default_rng(4).standard_normal((4, 3, 5, 6)))
    for upstream in (dy, dy[:1].expand_as(dy), dy.transpose(0, 1).contiguous().transpose(0, 1)):
        grads = torch.autograd.grad(ours(*tensors), tensors, upstream)
        of_composed = torch.autograd.grad(expected, tensors, upstream, retain_graph=True)
        torch.testing.assert_close(grads, of_composed, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(ours(*tensors), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(ours, tensors)
    (of_one,) = torch.autograd.grad(ours(*tensors), tensors[-1:], dy)  # x or gamma alone
    torch.testing.assert_close(of_one, torch.autograd.grad(expected, tensors[-1:], dy)[0])


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's kernel adds up rows one by one")
def test_the_gradient_of_scales_of_many_rows():
    import torch

    rng = np.random.default_rng(0)
    x, dy = (torch.tensor(rng.standard_normal((2**16 + 5, 8)) + 3) for _ in range(2))
    gamma = torch.ones(8, requires_grad=True)
    y = kernels.rms_normalization(x.float(), gamma)
    (dgamma,) = torch.autograd.grad(y, [gamma], dy.float())
    exact = (dy * x / x.square().mean(1, keepdim=True).sqrt()).sum(0)
    torch.testing.assert_close(dgamma.double(), exact, rtol=1.5e-6, atol=0)


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's automatic precision")
@pytest.mark.parametrize("rows", [2**9, 2**15])
@pytest.mark.parametrize("name", ["batch", "layer", "rms"])
def test_autocast_rounds_nothing(name, rows):
    import torch

    layer = COMPILED[name]()
    x = torch.tensor(np.random.default_rng(0).standard_normal((rows, 8)) + 3, dtype=torch.float32)

    def step():
        z = x.clone().requires_grad_()
        y = layer(z, training=True) if name == "batch" else layer(z)
        (y**3).sum().backward()
        return y.detach(), z.grad

    expected = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = step()
    torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's forward mode")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # its own
@pytest.mark.parametrize("rows", [16, 2**14])
def test_rms_normalization_in_forward_mode(rows):
    import torch
    from torch.autograd import forward_ad

    x, tangent = torch.randn(2, rows, 8).unbind()
    with forward_ad.dual_level():
        y = layers.RMSNormalization()(forward_ad.make_dual(x, tangent))
        slope = forward_ad.unpack_dual(y).tangent
    inv_rms = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
    along = (x * tangent).mean(1, keepdim=True) * inv_rms**2
    torch.testing.assert_close(slope, (tangent - x * along) * inv_rms)


# The short way of a layer to PyTorch's kernel -----------------------------------------------------

SHORT = {"layer": layers.LayerNormalization, "rms": layers.RMSNormalization}


@pytest.fixture
def long_ways(monkeypatch):
    """How often a layer has gone the long way."""
    ways = []
    for name in ("layer_normalization", "rms_normalization"):
        function = getattr(kernels, name)

        def counted(*arguments, function=function, **options):
            ways.append(function)
            return function(*arguments, **options)

        monkeypatch.setattr(kernels, name, counted)
    return ways


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's kernel")
@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_is_taken_for_inputs_like_one_before(name, long_ways):
    import torch

    layer = SHORT[name]()
    rng = np.random.default_rng(0)

    def ways_for(x):
        """Whether the first, and the second, call with x went the long way."""
        expected, ways = type(layer).from_config(layer.get_config())(x), []
        for _ in range(2):
            before = len(long_ways)
            torch.testing.assert_close(layer(x), expected)
            ways.append(len(long_ways) - before)
        return ways

    x = torch.tensor(rng.standard_normal((4, 8)), dtype=torch.float32)
    assert ways_for(x) == [1, 0]
    assert ways_for(x[:3]) == [0, 0]  # of fewer examples
    assert ways_for(x[None]) == [1, 0]
    assert ways_for(x.double()) == [1, 1]  # for which parameters are cast
    assert ways_for(x.bfloat16()) == [1, 1]  # composed
    assert ways_for(x.long()) == [1, 1]
    with pytest.raises(ValueError, match="incompatible with the layer"):
        layer(x[:, :7])
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    layer.trainable_variables[0].assign(np.arange(8.0))
    torch.testing.assert_close(layer(x)[:, 0], torch.zeros(4))
    layer.epsilon = -1.0
    with pytest.raises(ValueError, match="epsilon"):
        layer(x)
    layer.epsilon = 1e-3
    layer.double()  # of torch.nn.Module: the parameters
    assert layer(x).dtype == torch.float32


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's kernel")
def test_the_short_way_ends_where_means_are_far(long_ways):
    import torch

    layer, x = layers.LayerNormalization(), torch.randn(4, 8)
    layer(x), layer(x)
    assert len(long_ways) == 1
    far = x + 1e4
    compare(layer(far), functional.layer_normalization(far.double()), 1e-6, "y")
    assert len(long_ways) == 2
    layer(x), layer(x)
    assert len(long_ways) == 4  # so as not to do everything twice for each that is far


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's kernel")
@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_is_not_taken_where_another_is_asked_for(name, long_ways, monkeypatch):
    import torch

    layer, x = SHORT[name](), torch.randn(4, 8)
    layer(x), layer(x)
    assert len(long_ways) == 1
    monkeypatch.setenv("KERAS_NORM_IMPLEMENTATION", "composed")
    layer(x)
    assert len(long_ways) == 2

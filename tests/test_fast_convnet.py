"""The fast net and its parts: whitening, identity kernels, views; and the nets in stages."""

import keras
import numpy as np
import pytest
from arrays import array
from differentiation import BACKEND, fast
from keras import ops

from keras_norm import _convolution
from keras_norm._gradients import gradients
from keras_norm.models import (
    CNN,
    ConvNet,
    FastConv2D,
    FastConvNet,
    IdentityConvolution,
    TestTimeAugmentation,
    WhiteningConv2D,
    fit_whitening,
)

pytestmark = pytest.mark.core


def correlated(n=60, size=9):
    """Images whose neighbouring pixels and colours go together, away from zero."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(n, size + 1, size + 1, 3))
    smooth = noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1]
    return (smooth @ [[1.0, 0.7, 0.1], [0, 1, 0.5], [0, 0, 0.4]] + 0.3).astype("float32")


def patches(images, size=2):
    """(M, p) in float64, one by one."""
    height, width = images.shape[1:3]
    return np.array(
        [
            image[i : i + size, j : j + size].ravel()
            for image in images.astype("float64")
            for i in range(height - size + 1)
            for j in range(width - size + 1)
        ]
    )


# The convolution for small images -----------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3), (7, 9)])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (7, 2)])
def test_the_kernel_gradient_by_taps(size, kernel):
    rng = np.random.default_rng(0)
    x, mix = (rng.normal(size=(4, *size, c)).astype("float32") for c in (2, 3))
    slopes = fast(lambda x, dy: _convolution.kernel_gradient(x, dy, kernel))(x, mix)
    expected = np.zeros((*kernel, 2, 3))
    padding = [(k // 2, k // 2) for k in kernel]
    wide = np.pad(x, [(0, 0), *padding, (0, 0)])
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            seen = wide[:, i : i + size[0], j : j + size[1]]
            expected[i, j] = np.einsum("nhwc,nhwd->cd", seen, mix)
    np.testing.assert_allclose(array(slopes), expected, atol=1e-5)


def both_convolutions(channels, filters, dtype="float32", **options):
    """Keras's layer and ours, of the same weights."""
    options = {"kernel_size": 3, "padding": "same", "data_format": "channels_last", **options}
    layers = [kind(filters, dtype=dtype, **options) for kind in (keras.layers.Conv2D, FastConv2D)]
    for layer in layers:
        layer.build((None, 6, 6, channels))
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=w.shape) for w in layers[0].get_weights()]
    for layer in layers:
        layer.set_weights(weights)
    return layers


@pytest.fixture
def taps(monkeypatch):
    """How often a gradient was taken by taps; small layers are wide enough for it."""
    monkeypatch.setattr(_convolution, "_QUICKER", {"float32": (6, 2), "bfloat16": (6, 2)})
    taken, kernel_gradient = [], _convolution.kernel_gradient

    def counted(*arguments):
        taken.append(1)
        return kernel_gradient(*arguments)

    monkeypatch.setattr(_convolution, "kernel_gradient", counted)
    return taken


@pytest.mark.parametrize("options", [{}, {"activation": "tanh", "kernel_size": (3, 5)}])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_fast_convolution_is_keras_own_with_the_same_gradients(options, dtype, taps):
    theirs, ours = both_convolutions(2, 4, dtype, **options)
    exact, _ = both_convolutions(2, 4, "float32", **options)
    rng = np.random.default_rng(2)
    x, mix = rng.normal(size=(5, 6, 4, 2)), rng.normal(size=(5, 6, 4, 4))
    x, mix = x.astype("float32"), ops.convert_to_tensor(mix.astype("float32"))

    def product(layer, **how):
        return lambda x: ops.sum(ops.cast(layer(x, **how), "float32") * mix)

    # In float32: the gradient of Keras's layer in bfloat16 is off by 3% on a CPU without AVX-512.
    expected = gradients(product(exact), [x], variables=exact.trainable_variables)
    assert not taps
    found = gradients(product(ours, training=True), [x], variables=ours.trainable_variables)
    assert len(taps) == (BACKEND == "tensorflow")
    np.testing.assert_array_equal(array(ours(x, training=True)), array(theirs(x)))
    for g, e in zip(found[1], expected[1], strict=True):
        bound = (2e-2 if dtype == "mixed_bfloat16" else 1e-5) * abs(array(e)).max()
        np.testing.assert_allclose(array(g), array(e), atol=bound)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (7, {}),
        (6, {"filters": 1}),
        (6, {"strides": 2}),
        (6, {"dilation_rate": 2}),
        (6, {"padding": "valid"}),
        (6, {"kernel_size": 2}),
        (6, {"groups": 2}),
        (6, {"dtype": "float64"}),
        (6, {"training": False}),
    ],
)
def test_where_taps_are_not_quicker_the_convolution_is_keras_own(size, options, taps):
    options = {"filters": 4, "training": True, **options}
    training = options.pop("training")
    theirs, ours = both_convolutions(2, **options)
    x = np.random.default_rng(3).normal(size=(3, size, size, 2)).astype("float32")
    variables = ours.trainable_variables
    _, found = gradients(lambda: ops.sum(ours(x, training=training) ** 2), [], variables=variables)
    variables = theirs.trainable_variables
    _, expected = gradients(lambda: ops.sum(theirs(x) ** 2), [], variables=variables)
    assert not taps
    for g, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array(g), array(e))


def test_the_fast_net_trains_by_taps(taps):
    model = FastConvNet((4, 4, 4), input_shape=(26, 26, 3))  # 25 -> 12 -> 6 -> 3
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(4).normal(size=(8, 26, 26, 3)).astype("float32")
    model.fit(x, np.arange(8), batch_size=8, epochs=2, verbose=0)
    traced = 3  # conv2b, conv3a, conv3b; compiled once
    assert len(taps) == (traced if BACKEND == "tensorflow" else 0)
    before = [array(v) for v in model.trainable_variables]
    assert all(np.isfinite(v).all() for v in before)
    model.predict(x, verbose=0)
    assert len(taps) == (traced if BACKEND == "tensorflow" else 0)


# Whitening ----------------------------------------------------------------------------------------


def test_whitened_patches_are_uncorrelated_and_come_with_both_signs():
    x = correlated()
    layer = WhiteningConv2D(epsilon=1e-6)
    layer.adapt(x)
    y = array(layer(x))
    assert y.shape == (60, 8, 8, 24)
    assert tuple(layer.compute_output_shape((60, 9, 9, 3))) == y.shape
    np.testing.assert_array_equal(y[..., 12:], -y[..., :12])
    covariance = np.cov(y[..., :12].reshape(-1, 12).astype("float64").T, bias=True)
    np.testing.assert_allclose(covariance, np.eye(12), atol=1e-3)


def test_the_filters_are_the_scaled_eigenvectors_of_the_patches():
    x, epsilon = correlated(), 0.01
    layer = WhiteningConv2D(epsilon=epsilon)
    layer.adapt(x)
    values, vectors = np.linalg.eigh(np.cov(patches(x).T, bias=True))
    expected = (vectors / np.sqrt(values + epsilon))[:, ::-1]  # (p, p), largest variance first
    kernel = array(layer.kernel).reshape(12, 12).astype("float64")
    signs = np.sign((kernel * expected).sum(axis=0))
    np.testing.assert_allclose(kernel, expected * signs, rtol=1e-4, atol=1e-4)
    assert (kernel[abs(kernel).argmax(axis=0), range(12)] > 0).all()


def test_only_the_bias_of_the_whitening_is_trained():
    layer = WhiteningConv2D()
    layer.build((None, 9, 9, 3))
    assert [v.name for v in layer.trainable_variables] == ["bias"]
    assert not array(layer.kernel).any()


def test_the_kernel_is_that_of_float64_on_every_backend():
    """Of patches that are nearly the same everywhere, where float32 loses the small variances."""
    rng = np.random.default_rng(0)
    x = (100 + 50 * rng.normal(size=(40, 1, 1, 1)) + rng.normal(size=(40, 6, 6, 3))).astype(
        "float32"
    )
    layer = WhiteningConv2D(epsilon=1e-3)
    layer.adapt(x)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (2, 2), axis=(1, 2))
    patches = np.moveaxis(windows, 3, -1).reshape(-1, 12)
    covariance = np.cov(patches.T, bias=True)
    u = np.moveaxis(array(layer.kernel).astype(np.float64), -1, 0).reshape(12, 12)
    expected = np.linalg.inv(covariance + 1e-3 * np.eye(12))  # U^T U
    np.testing.assert_allclose(u.T @ u, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((3, 9, 9), "float32"), r"shape \(3, 9, 9\)"),
        (np.zeros((0, 9, 9, 3), "float32"), r"shape \(0, 9, 9, 3\)"),
        (np.zeros((3, 1, 9, 3), "float32"), "at least 2 x 2"),
        (np.full((3, 9, 9, 3), np.nan, "float32"), "finite"),
    ],
)
def test_what_cannot_be_whitened_leaves_the_kernel(data, message):
    layer = WhiteningConv2D()
    layer.adapt(correlated())
    before = array(layer.kernel).copy()
    with pytest.raises(ValueError, match=message):
        layer.adapt(data)
    np.testing.assert_array_equal(array(layer.kernel), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kernel_size": 0}, "kernel_size=0"), ({"epsilon": 0.0}, "epsilon=0.0")],
)
def test_whitening_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        WhiteningConv2D(**arguments)


# Identity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 5), (4, 4), (5, 2)])
def test_identity_kernels_hand_channels_on(c_in, c_out):
    layer = keras.layers.Conv2D(
        c_out, 3, padding="same", use_bias=False, kernel_initializer=IdentityConvolution(seed=1)
    )
    x = np.random.default_rng(0).normal(size=(2, 6, 5, c_in)).astype("float32")
    y = array(layer(x))
    same = min(c_in, c_out)
    np.testing.assert_allclose(y[..., :same], x[..., :same], atol=1e-6)
    rest = array(layer.kernel)[..., same:]
    if rest.size:
        bound = 1 / np.sqrt(9 * c_in)  # of a uniform distribution of variance 1 / (3 fan_in)
        assert 0.9 * bound < abs(rest).max() <= bound


def test_identity_kernels_have_a_centre():
    with pytest.raises(ValueError, match=r"shape=\(2, 2, 3, 3\)"):
        IdentityConvolution()((2, 2, 3, 3))


def test_layers_of_one_net_start_differently():
    model = FastConvNet((4, 4), input_shape=(9, 9, 1))
    kernels = [array(model.get_layer(f"conv{g}a").kernel) for g in (1, 2)]
    assert kernels[0].shape == (3, 3, 8, 4)
    twins = FastConvNet((8, 16, 16), identity=False, input_shape=(16, 16, 3))
    first, second = (array(twins.get_layer(f"conv{g}b").kernel) for g in (2, 3))
    assert not np.allclose(first, second)


# The net ------------------------------------------------------------------------------------------


def test_the_fast_net_survives_saving(tmp_path):
    model = FastConvNet((4, 6), input_shape=(None, None, 3), classes=3)
    assert fit_whitening(model, correlated())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for size in (9, 12):
        x = correlated(4, size)
        np.testing.assert_array_equal(
            again.predict(x, verbose=0), model.predict(x, verbose=0), strict=True
        )
    assert again.get_layer("conv1a_norm").momentum == 0.6


@pytest.mark.parametrize("normalization", [None, "group", keras.layers.BatchNormalization])
def test_the_fast_net_takes_any_normalization(normalization):
    model = FastConvNet((4, 4), normalization, whitening=False, input_shape=(9, 9, 3))
    norms = [layer for layer in model.layers if layer.name.endswith("_norm")]
    assert len(norms) == (0 if normalization is None else 4)
    assert not fit_whitening(model, correlated())
    assert model.predict(correlated(2), verbose=0).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (8, 32, 3)}, r"\(8, 32, 3\)"),
        ({"input_shape": (32, 32)}, r"\(32, 32\)"),
        ({"input_shape": 32}, "input_shape=32"),
        ({"widths": ()}, r"Received: widths=\(\)"),
        ({"widths": 8}, "Received: widths=8"),
        ({"widths": (8, 0)}, r"\(8, 0\)"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_the_fast_net_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        FastConvNet(**arguments)


# Views --------------------------------------------------------------------------------------------


def moved(x, down, right):
    """Moved by pixels, the edges reflected, by indices."""

    def at(size, by):
        places = abs(np.arange(size) - by)
        return np.where(places < size, places, 2 * (size - 1) - places)

    return x[:, at(x.shape[1], down)][:, :, at(x.shape[2], right)]


@pytest.mark.parametrize("shift", [0, pytest.param(2, marks=pytest.mark.slow_on_jax)])
def test_views_are_averaged(shift, tmp_path):
    model = FastConvNet((4, 4), input_shape=(9, 9, 3))
    fit_whitening(model, correlated())
    x = correlated(5)
    views = TestTimeAugmentation(model, shift)

    def both(x):
        f = model.predict
        return (f(x, verbose=0) + f(np.ascontiguousarray(x[:, :, ::-1]), verbose=0)) / 2

    expected = both(x)
    if shift:
        diagonal = both(moved(x, shift, shift)) + both(moved(x, -shift, -shift))
        expected = expected / 2 + diagonal / 4
    np.testing.assert_allclose(views.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    views.save(tmp_path / "views.keras")
    again = keras.models.load_model(tmp_path / "views.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow_on_jax
def test_views_of_images_of_several_sizes():
    model = FastConvNet((4,), input_shape=(None, None, 3))
    views = TestTimeAugmentation(model, 1)
    for size in (12, 9, 15):
        x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
        expected = TestTimeAugmentation(model, 1)(x)
        np.testing.assert_allclose(views.predict(x, verbose=0), array(expected), atol=1e-5)


def test_views_refuse():
    model = FastConvNet((4,), input_shape=(9, 9, 3))
    with pytest.raises(ValueError, match="shift=-1"):
        TestTimeAugmentation(model, -1)
    with pytest.raises(ValueError, match="shift=9"):
        TestTimeAugmentation(model, 9)(correlated(2))


# Nets in stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample", ["max_pool", "average_pool", "stride", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_stages_halve_the_resolution(downsample, residual):
    model = CNN(
        (4, 4, 6), blocks=2, downsample=downsample, residual=residual, input_shape=(8, 8, 3)
    )
    before = model.get_layer("head").input.shape
    assert before == ((None, 8, 8, 6) if downsample == "none" else (None, 1, 1, 6))
    assert model.predict(np.ones((2, 8, 8, 3), "float32"), verbose=0).shape == (2, 10)
    skips = [layer.name for layer in model.layers if layer.name.startswith("skip")]
    changes = ["skip1", "skip2", "skip3"] if downsample == "stride" else ["skip1", "skip3"]
    assert skips == (changes if residual else [])


def test_a_residual_stage_without_weights_is_the_identity():
    model = CNN((3,), None, residual=True, downsample="none", head="flatten", input_shape=(4, 4, 3))
    convolution = model.get_layer("conv1_1")
    convolution.set_weights([np.zeros_like(w) for w in convolution.get_weights()])
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype("float32")
    inside = keras.Model(model.input, model.get_layer("head").output)
    np.testing.assert_array_equal(inside.predict(x, verbose=0), x.reshape(2, -1))


def test_positions_of_the_stages():
    model = CNN((4, 4), {"conv2_1": "batch", "dense1": "layer"}, dense=(5,), head="max")
    norms = [layer.name for layer in model.layers if layer.name.endswith("_norm")]
    assert norms == ["conv2_1_norm", "dense1_norm"]


def test_the_three_layer_net():
    model = ConvNet("batch", input_shape=(8, 8, 3))
    kernels = [tuple(model.get_layer(n).kernel.shape) for n in ("conv1_1", "conv2_1", "logits")]
    assert kernels == [(5, 5, 3, 32), (3, 3, 32, 16), (8 * 8 * 16, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (8, -1)}, r"widths=\(8, -1\)"),
        ({"blocks": 0}, r"blocks=\[0\]"),
        ({"kernel_size": (3, 3)}, r"kernel_size=\(3, 3\)"),
        ({"downsample": "pool"}, "downsample='pool'"),
        ({"head": "mean"}, "head='mean'"),
        ({"input_shape": (4, 32, 3)}, "at least 8 x 8"),
    ],
)
def test_stages_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        CNN(**arguments)

"""The fast net and its parts: whitening, identity kernels, views; and the nets in stages."""

import keras
import numpy as np
import pytest
from arrays import array

from keras_norm.models import (
    CNN,
    ConvNet,
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
        ({"widths": ()}, r"Received: \(\)"),
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


@pytest.mark.parametrize("shift", [0, 2])
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
        ({"kernel_size": (3, 3)}, r"kernel_size=\[3, 3\]"),
        ({"downsample": "pool"}, "downsample='pool'"),
        ({"head": "mean"}, "head='mean'"),
        ({"input_shape": (4, 32, 3)}, "at least 8 x 8"),
    ],
)
def test_stages_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        CNN(**arguments)

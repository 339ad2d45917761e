"""Corruptions against their equations, computed in another way."""

import numpy as np
import pytest
from scipy import fft, signal

from keras_norm import corruptions
from keras_norm.corruptions import KINDS, STRENGTHS, corrupt

PARAMETERS = {kind: parameters for kind, (_, parameters) in corruptions._KINDS.items()}
DRAWN = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur"} | {
    "glass_blur", "fog", "snow", "elastic", "shift",
}  # fmt: skip


def photographs(number=6, channels=3, size=(32, 32)):
    """Smooth shapes with edges, in every image others."""
    rng = np.random.default_rng(0)
    i, j = np.meshgrid(*(np.linspace(0, 1, n) for n in size), indexing="ij")
    waves = rng.uniform(2, 9, (number, 1, 1, channels, 2))
    x = np.sin(waves[..., 0] * i[..., None]) * np.cos(waves[..., 1] * j[..., None])
    x = x + (np.hypot(i - 0.5, j - 0.4) < 0.3)[..., None] * rng.uniform(-1, 1, (number, 1, 1, 1))
    return ((x - x.min()) / (x.max() - x.min())).astype("float32")


def grey(value, number=40):
    return np.full((number, 32, 32, 3), value, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    x = photographs()
    before = x.copy()
    changes = []
    for strength in STRENGTHS:
        y = corrupt(x, kind, strength, seed=3)
        assert y.dtype == np.float32
        assert y.shape == x.shape
        assert y.min() >= 0
        assert y.max() <= 1
        changes.append(float(np.sqrt(np.mean((y - x) ** 2))))
    assert changes == sorted(changes), "stronger is further away"
    assert 0.005 < changes[0] < changes[-1]
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(y, corrupt(x, kind, 5, seed=3))
    assert np.array_equal(y, corrupt(x, kind, 5, seed=4)) == (kind not in DRAWN)
    # Of the same images among others, to rounding: vectors may begin elsewhere.
    np.testing.assert_allclose(y[:4], corrupt(x[:4], kind, 5, seed=3), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (13, 30))])
def test_other_images(kind, channels, size):
    x = photographs(2, channels, size)
    y = corrupt(x, kind, 4)
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    assert corrupt(x[:0], kind, 4).shape == (0, *x.shape[1:])


def test_more_images_than_are_worked_on_at_once(monkeypatch):
    x = photographs(5)
    monkeypatch.setattr(corruptions, "_AT_ONCE", 2)
    y = corrupt(x, "gaussian_noise", 2)
    noise = (y - x)[:, 8:24, 8:24]
    assert abs(np.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.2  # not the same again


def test_noise_has_the_variance_that_its_equation_says():
    for strength in (1, 3):
        y = corrupt(grey(0.5), "gaussian_noise", strength)
        assert y.std() == pytest.approx(PARAMETERS["gaussian_noise"][strength - 1], rel=0.01)
        y = corrupt(grey(0.3), "shot_noise", strength)
        photons = PARAMETERS["shot_noise"][strength - 1]
        assert y.var() == pytest.approx(0.3 / photons, rel=0.02)
        np.testing.assert_allclose(y * photons, np.round(y * photons), atol=1e-4)
        y = corrupt(grey(0.4), "speckle_noise", strength)
        assert y.std() == pytest.approx(0.4 * PARAMETERS["speckle_noise"][strength - 1], rel=0.01)
        y = corrupt(grey(0.4), "impulse_noise", strength)
        probability = PARAMETERS["impulse_noise"][strength - 1]
        for extreme in (0, 1):
            assert (y == extreme).mean() == pytest.approx(probability / 2, rel=0.05)
        assert ((y == 0) | (y == 1) | (y == np.float32(0.4))).all()


def test_kinds_and_strengths_draw_different_numbers():
    x = grey(0.5, 8)
    fields = np.stack(
        [
            corrupt(x, kind, strength, seed=2).ravel() - 0.5
            for kind, strength in (
                ("gaussian_noise", 1),
                ("gaussian_noise", 2),
                ("speckle_noise", 1),
            )
        ]
    )
    assert np.abs(np.corrcoef(fields) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("kind", [k for k in KINDS if "blur" in k] + ["elastic", "shift"])
def test_a_plain_grey_stays_what_it_is(kind):
    np.testing.assert_allclose(corrupt(grey(0.6, 3), kind, 4), 0.6, rtol=1e-5)


def test_gaussian_blur_is_a_convolution():
    x = photographs(1)
    sigma = PARAMETERS["gaussian_blur"][2]
    at = np.arange(-4, 5)
    line = np.exp(-(at**2) / (2 * sigma**2))
    kernel = np.outer(line, line) / line.sum() ** 2
    expected = signal.convolve2d(x[0, ..., 1], kernel, "same")
    y = corrupt(x, "gaussian_blur", 3)[0, ..., 1]
    np.testing.assert_allclose(y[6:-6, 6:-6], expected[6:-6, 6:-6], atol=1e-5)


def spread_of_a_point(kind, strength, seed=0):
    """What becomes of one bright pixel: its mass, and standard deviations along two axes."""
    x = np.zeros((1, 33, 33, 1), "float32")
    x[0, 16, 16] = 1
    y = corrupt(x, kind, strength, seed)[0, ..., 0].astype(np.float64)
    i, j = np.meshgrid(np.arange(33) - 16, np.arange(33) - 16, indexing="ij")
    spread = np.array([[(y * a * b).sum() / y.sum() for a in (i, j)] for b in (i, j)])
    return y.sum(), np.sqrt(np.clip(np.linalg.eigvalsh(spread), 0, None))


def test_defocus_spreads_a_point_over_a_disk():
    radius = PARAMETERS["defocus_blur"][4]
    mass, deviations = spread_of_a_point("defocus_blur", 5)
    assert mass == pytest.approx(1, abs=1e-5)
    # Of a disk: radius / 2; of a pixel: its own 1 / 12 beside it.
    np.testing.assert_allclose(deviations, np.sqrt(radius**2 / 4 + 1 / 12), rtol=0.05)


def test_motion_spreads_a_point_along_a_line_in_a_direction_that_is_drawn():
    length = PARAMETERS["motion_blur"][4]
    mass, (across, along) = spread_of_a_point("motion_blur", 5)
    assert mass == pytest.approx(1, abs=1e-5)
    assert across < 0.6
    assert along == pytest.approx(length / np.sqrt(12), rel=0.1)
    x = np.zeros((30, 33, 33, 1), "float32")
    x[:, 16, 16] = 1
    heights = corrupt(x, "motion_blur", 5)[..., 0].sum(axis=2) > 1e-3
    assert len(set(heights.sum(axis=1))) >= 5
    i = np.arange(33) - 16.0
    slants = np.einsum("nij,i,j->n", corrupt(x, "motion_blur", 5)[..., 0], i, i)
    assert slants.min() < -3  # half a circle: along both diagonals
    assert slants.max() > 3


def test_zoom_blur_leaves_the_middle_and_averages_enlarged_images():
    i = (np.arange(33) - 16) / 40
    x = np.broadcast_to(0.5 + i[:, None, None], (1, 33, 33, 1)).astype("float32")
    y = corrupt(x, "zoom_blur", 2)
    zoom = PARAMETERS["zoom_blur"][1]
    slope = np.mean(1 / np.linspace(1, zoom, 8))  # a ramp enlarged is a flatter ramp
    np.testing.assert_allclose(y, 0.5 + slope * (x - 0.5), atol=1e-5)


def test_light_and_colour():
    x = photographs().astype(np.float64)
    for strength in (1, 4):
        p = {kind: PARAMETERS[kind][strength - 1] for kind in KINDS}
        mean = x.mean(axis=(1, 2, 3), keepdims=True)
        luma = (0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2])[..., None]
        expected = {
            "brightness": x + p["brightness"],
            "darkness": x ** (1 + p["darkness"]),
            "contrast": mean + p["contrast"] * (x - mean),
            "saturation": luma + p["saturation"] * (x - luma),
        }
        for kind, y in expected.items():
            np.testing.assert_allclose(
                corrupt(x, kind, strength), np.clip(y, 0, 1), atol=1e-5, err_msg=kind
            )


def test_fog_lies_between_the_image_and_a_bright_veil():
    amount = PARAMETERS["fog"][3]
    for value in (0.0, 1.0):
        y = corrupt(grey(value), "fog", 4)
        low, high = value * (1 - amount) + amount * np.array([0.75, 1.0])
        np.testing.assert_allclose([y.min(), y.max()], [low, high], atol=1e-5)
        assert np.abs(np.diff(y, axis=1)).max() < 0.1  # smooth


def test_snow_only_lightens():
    x = photographs()
    assert (corrupt(x, "snow", 3) >= x).all()
    flakes = corrupt(grey(0.0), "snow", 3) == np.float32(0.9)
    apart = (1 - PARAMETERS["snow"][2] / 4) ** 3  # a pixel with none on it, nor on two before it
    assert flakes.mean() == pytest.approx(1 - apart, rel=0.05)


def test_pixels_are_the_means_of_blocks():
    assert PARAMETERS["pixelate"][2] == 0.5
    x = photographs()
    means = x.reshape(6, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    expected = means.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(corrupt(x, "pixelate", 3), expected, atol=1e-6)


def test_jpeg_rounds_the_cosine_transform_of_blocks():
    x = 0.25 + photographs(2, 1) / 2
    step = PARAMETERS["jpeg"][1]
    y = corrupt(x, "jpeg", 2)
    u = np.arange(8)
    for i, j in ((0, 0), (8, 16), (24, 24)):
        before, after = (
            fft.dct(fft.dct(v[1, i : i + 8, j : j + 8, 0], axis=0, norm="ortho"), norm="ortho")
            for v in (x, y)
        )
        steps = step * (1 + (u[:, None] + u) / 2)
        np.testing.assert_allclose(after, np.round(before / steps) * steps, atol=1e-4)
    rgb = 0.3 + np.random.default_rng(1).uniform(0, 0.4, (1, 8, 8, 3))
    luma = rgb @ [0.299, 0.587, 0.114]
    ycc = np.stack([luma, (rgb[..., 2] - luma) / 1.772, (rgb[..., 0] - luma) / 1.402], axis=-1)
    steps = step * (1 + (u[:, None, None] + u[:, None]) * [0.5, 1, 1])  # colour with twice as much
    kept = np.round(fft.dctn(ycc, axes=(1, 2), norm="ortho") / steps) * steps
    luma, blue, red = np.moveaxis(fft.idctn(kept, axes=(1, 2), norm="ortho"), -1, 0)
    rgb_ = np.stack([luma + 1.402 * red, luma, luma + 1.772 * blue], axis=-1)
    rgb_[..., 1] -= (0.299 * 1.402 * red + 0.114 * 1.772 * blue) / 0.587
    np.testing.assert_allclose(corrupt(rgb, "jpeg", 2), rgb_, atol=1e-3)
    plain = np.array([0.2, 0.5, 0.7], "float32")  # a colour alone: three constants, rounded
    y = corrupt(np.broadcast_to(plain, (1, 16, 16, 3)), "jpeg", 1)
    np.testing.assert_allclose(y, np.broadcast_to(y[0, 0, 0], y.shape), atol=1e-6)
    np.testing.assert_allclose(y[0, 0, 0], plain, atol=0.02)


def test_shift_moves_by_its_pixels():
    x = photographs(4)
    y = corrupt(x, "shift", 2)
    i = j = np.arange(32, dtype=np.float64)
    pixels, moved = PARAMETERS["shift"][1], []
    for n in range(4):
        angles = np.linspace(0, 2 * np.pi, 1441)
        errors = []
        for angle in angles:
            rows, columns = (
                np.clip(at + pixels * f(angle), 0, 31) for at, f in ((i, np.sin), (j, np.cos))
            )
            lines = np.stack([np.interp(rows, i, x[n, :, c, 0]) for c in range(32)], axis=1)
            both = np.stack([np.interp(columns, j, line) for line in lines])
            errors.append(np.abs(both - y[n, ..., 0]).max())
        assert min(errors) < 5e-3
        moved.append(angles[np.argmin(errors)])
    assert np.ptp(moved) > 0.2


def test_elastic_takes_each_pixel_from_nearby():
    ramp = np.arange(32, dtype="float32") / 62
    x = np.broadcast_to(0.25 + ramp[None, :, None, None], (5, 32, 32, 1))
    y = corrupt(x, "elastic", 5)
    moved = np.abs(y - x) * 62
    assert moved.max() <= PARAMETERS["elastic"][4] + 1e-3
    assert moved.max() > 0.7 * PARAMETERS["elastic"][4]


def displacements(kind, strength):
    """How far each pixel comes from, in rows and in columns: of ramps along both."""
    at = np.arange(32) / 62
    x = np.zeros((20, 32, 32, 3))
    x[..., 0], x[..., 1] = 0.25 + at[:, None], 0.25 + at
    moved = 62 * (corrupt(x, kind, strength) - x)
    return moved[:, 6:-6, 6:-6, 0], moved[:, 6:-6, 6:-6, 1]


def test_rows_and_columns_are_displaced_apart():
    for kind in ("elastic", "glass_blur"):
        rows, columns = displacements(kind, 4)
        assert abs(np.corrcoef(rows.ravel(), columns.ravel())[0, 1]) < 0.3, kind
    # Of the glass: evenly up to its reach, and then blurred, line by line and column by column.
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.4**2))
    blurred = (kernel**2).sum() / kernel.sum() ** 2
    deviation = PARAMETERS["glass_blur"][3] / np.sqrt(3) * blurred
    np.testing.assert_allclose([rows.std(), columns.std()], deviation, rtol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rain"}, "kind='rain'"),
        ({"strength": 0}, "strength=0"),
        ({"strength": True}, "strength=True"),
        ({"strength": 2.0}, r"strength=2\.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"images": np.zeros((32, 32, 3))}, r"\(32, 32, 3\)"),
        ({"images": np.zeros((1, 32, 7, 3))}, r"\(1, 32, 7, 3\)"),
        ({"images": np.zeros((1, 32, 32, 2))}, r"\(1, 32, 32, 2\)"),
        ({"images": np.full((1, 8, 8, 3), 255)}, "from 255 to 255"),
        ({"images": np.full((1, 8, 8, 3), -0.5)}, r"from -0\.5 to"),
        ({"images": np.full((1, 8, 8, 3), np.nan)}, "nan"),
    ],
)
def test_what_is_refused(change, message):
    given = {"images": np.zeros((1, 8, 8, 3)), "kind": "fog", "strength": 1, "seed": 0}
    with pytest.raises(ValueError, match=message):
        corrupt(**{**given, **change})

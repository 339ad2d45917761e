"""Corrupted images, to test a network on a domain that it was not trained on.

Nineteen kinds in five strengths, as functions of NumPy arrays: noise, blur, weather, digital and
geometric changes, modelled on the common corruptions of Hendrycks and Dietterich, but written
anew, seeded, and for images of any size from 8 x 8. With x an image of pixels in [0, 1],
everything is clipped to [0, 1] at the end:

    gaussian_noise    (C1)   x + s n,                 n standard normal
    shot_noise        (C2)   Poisson(s x) / s         what a sensor counts of s photons
    impulse_noise     (C3)   0 or 1, evenly, with probability s; else x
    speckle_noise     (C4)   x + x s n
    gaussian_blur     (C5)   x * normal density of s pixels
    defocus_blur      (C6)   x * disk of radius s
    motion_blur       (C7)   x * line of s pixels at an angle drawn for each image
    zoom_blur         (C8)   mean of x enlarged by 1 ... s
    glass_blur        (C9)   pixels displaced by up to s, then blurred
    fog               (C10)  x (1 - a) + a (.75 + .25 f), f a smooth field, a = s
    snow              (C11)  x lightened by flakes that fall at an angle
    brightness        (C12)  x + s                    on all channels
    darkness          (C13)  x^g                      g = 1 + s
    contrast          (C14)  m + s (x - m),           m the mean of the image
    saturation        (C15)  g + s (x - g),           g the grey of the pixel
    pixelate          (C16)  x averaged to s of its sides, and back
    jpeg              (C17)  8 x 8 cosine transform, rounded to quantization steps, and back
    elastic           (C18)  x displaced by a smooth random field of s pixels
    shift             (C19)  x moved by s pixels in a direction drawn for each image

Reference: Hendrycks and Dietterich, 2019, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations (their kinds and the idea of five strengths; not their code, images or
parameters, so that accuracies here and there cannot be compared).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KINDS", "STRENGTHS", "corrupt"]

Images = npt.NDArray[np.float32]
Rng = np.random.Generator

STRENGTHS = (1, 2, 3, 4, 5)
"""From weak to strong."""

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green, blue
_DIRECTIONS = 12  # of motion, in half a circle
_AT_ONCE = 1000  # images processed at a time, to bound the memory


def corrupt(images: npt.ArrayLike, kind: str, strength: int, seed: int = 0) -> Images:
    """Images with one kind of corruption, reproducible by a seed.

    Args:
        images: (N, H, W, C), pixels in [0, 1], H and W >= 8; C = 3, or 1 for grey images.
        kind: one of `KINDS`.
        strength: 1 (weak) to 5 (strong).
        seed: integer >= 0, of the random numbers. Different kinds or strengths draw different ones.
            Default: 0.

    Returns:
        A new array (N, H, W, C) of float32 in [0, 1].

    Raises:
        ValueError: for another kind or strength, other shapes, pixels outside [0, 1] or not finite.

    Example:
        >>> images = np.full((2, 32, 32, 3), 0.5)
        >>> noisy = corrupt(images, "gaussian_noise", strength=3, seed=1)
        >>> noisy.shape, bool(abs(noisy.std() - 0.12) < 0.01)
        ((2, 32, 32, 3), True)
        >>> bool((corrupt(images, "contrast", strength=5) == images).all())
        True

    Numerics: float32. A corrupted image depends on its position in the array as well as on the
        seed, but not on how many images follow it.
    """
    images = np.asarray(images)
    _check(images, kind, strength)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be an integer >= 0. Received: seed={seed!r}.")
    function, parameters = _KINDS[kind]
    parameter = parameters[strength - 1]
    result = np.empty(images.shape, np.float32)
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        rng = np.random.default_rng([seed, list(_KINDS).index(kind), strength, start])
        x = images[part].astype(np.float32)
        result[part] = np.clip(function(x, parameter, rng), 0, 1)
    return result


def _check(images: npt.NDArray[Any], kind: str, strength: int) -> None:
    if kind not in _KINDS:
        raise ValueError(f"`kind` must be one of {list(_KINDS)}. Received: kind={kind!r}.")
    if isinstance(strength, bool | float) or strength not in STRENGTHS:
        raise ValueError(
            "`strength` must be an integer from 1 (weak) to 5 (strong). Received: "
            f"strength={strength!r}."
        )
    shape = images.shape
    if len(shape) != 4 or min(shape[1:3]) < 8 or shape[3] not in (1, 3):
        raise ValueError(
            "`images` must be (N, H, W, C) with H, W >= 8 and C 1 or 3. Received: an array of "
            f"shape {shape}."
        )
    low, high = (float(f(images)) for f in (np.min, np.max)) if images.size else (0.0, 1.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            "Pixels must lie in [0, 1]. Received: images from "
            f"{low:g} to {high:g}. Divide whole numbers by 255; undo a standardization with "
            "`Data.unstandardize`, and clip its rounding errors."
        )


# Noise ---------------------------------------------------------------------------------------


def _normal(x: Images, rng: Rng) -> Images:
    return rng.standard_normal(x.shape, dtype=np.float32)


def _gaussian_noise(x: Images, deviation: float, rng: Rng) -> Images:
    return x + np.float32(deviation) * _normal(x, rng)  # (C1)


def _shot_noise(x: Images, photons: float, rng: Rng) -> Images:
    return (rng.poisson(x * photons) / photons).astype(np.float32)  # (C2)


def _impulse_noise(x: Images, probability: float, rng: Rng) -> Images:
    u = rng.random(x.shape, dtype=np.float32)
    return np.where(u < probability, u < probability / 2, x)  # (C3)


def _speckle_noise(x: Images, deviation: float, rng: Rng) -> Images:
    return x + x * np.float32(deviation) * _normal(x, rng)  # (C4)


# Blur ----------------------------------------------------------------------------------------


def _gaussian_blur(x: Images, sigma: float, rng: Rng) -> Images:
    from scipy import ndimage

    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="reflect")  # (C5)


def _filtered(x: Images, kernel: npt.NDArray[Any]) -> Images:
    """Each image convolved with a kernel (h, w), its edges reflected."""
    from scipy import ndimage

    kernel = (kernel / kernel.sum()).astype(np.float32)
    return ndimage.convolve(x, kernel[None, :, :, None], mode="reflect")  # type: ignore[no-any-return]


def _defocus_blur(x: Images, radius: float, rng: Rng) -> Images:
    reach = int(np.ceil(radius))
    fine = (np.arange((2 * reach + 1) * 8) + 0.5) / 8 - reach - 0.5  # eight points to a pixel
    inside = (fine[:, None] ** 2 + fine**2 <= radius**2).astype(np.float64)
    sides = 2 * reach + 1
    return _filtered(x, inside.reshape(sides, 8, sides, 8).sum(axis=(1, 3)))  # (C6)


def _motion_blur(x: Images, length: float, rng: Rng) -> Images:
    direction = rng.integers(0, _DIRECTIONS, len(x))
    result = np.empty_like(x)
    for number in np.unique(direction):
        chosen = direction == number
        result[chosen] = _filtered(x[chosen], _line(length, np.pi * number / _DIRECTIONS))  # (C7)
    return result


def _line(length: float, angle: float) -> npt.NDArray[np.float64]:
    """The kernel of a line through the centre: points, each spread over four pixels."""
    reach = int(np.ceil(length / 2))
    kernel = np.zeros((2 * reach + 2, 2 * reach + 2))
    for step in np.linspace(-length / 2, length / 2, 8 * reach + 1):
        i, j = reach + step * np.sin(angle), reach + step * np.cos(angle)
        top, left = int(i), int(j)
        across, down = np.array([1 - j % 1, j % 1]), np.array([1 - i % 1, i % 1])
        kernel[top : top + 2, left : left + 2] += np.outer(down, across)
    return kernel[:-1, :-1]


def _zoom_blur(x: Images, zoom: float, rng: Rng) -> Images:
    total = np.zeros_like(x)
    factors = np.linspace(1, zoom, 8)
    for factor in factors:
        rows, columns = (_enlarging(n, factor) for n in x.shape[1:3])
        total += np.einsum("ah,nhwc,bw->nabc", rows, x, columns, optimize=True)
    return total / np.float32(len(factors))  # (C8)


def _enlarging(size: int, factor: float) -> Images:
    """The matrix (size, size) that enlarges around the centre, linear between pixels."""
    middle = (size - 1) / 2
    distance = np.abs((np.arange(size) - middle)[:, None] / factor + middle - np.arange(size))
    return np.clip(1 - distance, 0, None).astype(np.float32)


def _glass_blur(x: Images, reach: float, rng: Rng) -> Images:
    by = rng.uniform(-reach, reach, (*x.shape[:3], 2)).astype(np.float32)
    return _gaussian_blur(_displaced(x, by[..., 0], by[..., 1]), 0.4, rng)  # (C9)


# Weather -------------------------------------------------------------------------------------


def _smooth_fields(x: Images, number: int, sigma: float, rng: Rng) -> Images:
    """`number` smooth random fields for each image, values from 0 to 1, (number, N, H, W)."""
    from scipy import ndimage

    n, height, width, _ = x.shape
    noise = rng.standard_normal((n, number, height, width), dtype=np.float32)
    fields = ndimage.gaussian_filter(noise, (0, 0, sigma, sigma), mode="wrap")
    low, high = (f(fields, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    return np.swapaxes((fields - low) / (high - low), 0, 1)


def _fog(x: Images, amount: float, rng: Rng) -> Images:
    veil = 0.75 + 0.25 * _smooth_fields(x, 1, x.shape[1] / 8, rng)[0, ..., None]
    density = np.float32(amount)
    return x * (1 - density) + density * veil  # (C10)


def _snow(x: Images, amount: float, rng: Rng) -> Images:
    flakes = (rng.random(x.shape[:3], dtype=np.float32) < amount / 4).astype(np.float32)[..., None]
    streaks = np.zeros_like(flakes)
    for step in range(3):  # each flake leaves a trace of three pixels, at 45 degrees
        streaks = np.maximum(streaks, np.roll(flakes, (step, step), axis=(1, 2)))
    lighter = x + np.float32(amount) * (1 - x) * 0.5
    return np.maximum(lighter, streaks * np.float32(0.9))  # (C11)


# Light and colour ----------------------------------------------------------------------------


def _brightness(x: Images, amount: float, rng: Rng) -> Images:
    return x + np.float32(amount)  # (C12)


def _darkness(x: Images, amount: float, rng: Rng) -> Images:
    return x ** np.float32(1 + amount)  # (C13)


def _contrast(x: Images, factor: float, rng: Rng) -> Images:
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean + np.float32(factor) * (x - mean)  # (C14)


def _saturation(x: Images, factor: float, rng: Rng) -> Images:
    grey = x if x.shape[-1] == 1 else (x @ _GREY)[..., None]
    return grey + np.float32(factor) * (x - grey)  # (C15)


# Digital -------------------------------------------------------------------------------------


def _pixelate(x: Images, share: float, rng: Rng) -> Images:
    rows, columns = (_there_and_back(n, max(1, round(share * n))) for n in x.shape[1:3])
    return np.einsum("ah,nhwc,bw->nabc", rows, x, columns, optimize=True)  # (C16)


def _there_and_back(size: int, small: int) -> Images:
    """The matrix (size, size) that reduces to `small` pixels and enlarges again."""
    return _area_weights(small, size) @ _area_weights(size, small)


def _area_weights(old: int, new: int) -> Images:
    """The matrix (new, old) that averages over the area of each new pixel."""
    edges = np.arange(new + 1) * old / new
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(old)
    overlap = np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, None)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _jpeg(x: Images, step: float, rng: Rng) -> Images:
    """Colours as luminance and chrominance, as in JPEG; chrominance with twice the steps."""
    from scipy import fft

    to_ycc = np.array([_GREY, [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], np.float32)
    ycc = x if x.shape[-1] == 1 else x @ to_ycc.T
    height, width = x.shape[1:3]
    padded = np.pad(ycc, ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    n, h, w, c = padded.shape
    blocks = padded.reshape(n, h // 8, 8, w // 8, 8, c)
    frequency = np.arange(8)[:, None] + np.arange(8)
    steps = np.float32(step) * (1 + frequency[:, None, :, None] * np.array([0.5, 1, 1][:c]))
    coefficients = fft.dctn(blocks, axes=(2, 4), norm="ortho")
    kept = np.round(coefficients / steps) * steps
    ycc = fft.idctn(kept.astype(np.float32), axes=(2, 4), norm="ortho").reshape(n, h, w, c)
    ycc = ycc[:, :height, :width]
    return ycc if c == 1 else ycc @ np.linalg.inv(to_ycc).T.astype(np.float32)  # (C17)


# Geometry ------------------------------------------------------------------------------------


def _displaced(x: Images, rows: npt.ArrayLike, columns: npt.ArrayLike) -> Images:
    """Each pixel taken from a place (rows, columns) away, interpolated linearly.

    The displacements broadcast to (N, H, W); beyond the edge, the pixels of the edge repeat.
    """
    n, height, width, _ = x.shape
    i = np.clip(np.arange(height)[:, None] + np.asarray(rows), 0, height - 1)
    j = np.clip(np.arange(width) + np.asarray(columns), 0, width - 1)
    i, j = np.broadcast_arrays(i, j, np.empty((n, height, width)))[:2]
    top, left = np.floor(i).astype(np.intp), np.floor(j).astype(np.intp)
    down, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    a, b = ((v - w)[..., None].astype(np.float32) for v, w in ((i, top), (j, left)))
    at = np.arange(n)[:, None, None]
    upper = x[at, top, left] * (1 - b) + x[at, top, right] * b
    lower = x[at, down, left] * (1 - b) + x[at, down, right] * b
    return upper * (1 - a) + lower * a  # type: ignore[no-any-return]


def _elastic(x: Images, pixels: float, rng: Rng) -> Images:
    rows, columns = 2 * _smooth_fields(x, 2, x.shape[1] / 10, rng) - 1
    return _displaced(x, pixels * rows, pixels * columns)  # (C18)


def _shift(x: Images, pixels: float, rng: Rng) -> Images:
    angles = rng.uniform(0, 2 * np.pi, (len(x), 1, 1))
    return _displaced(x, pixels * np.sin(angles), pixels * np.cos(angles))  # (C19)


# The kinds -----------------------------------------------------------------------------------

_KINDS: dict[str, tuple[Callable[[Images, float, Rng], Images], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.16, 0.22)),
    "shot_noise": (_shot_noise, (200, 80, 40, 22, 12)),
    "impulse_noise": (_impulse_noise, (0.02, 0.05, 0.09, 0.14, 0.22)),
    "speckle_noise": (_speckle_noise, (0.1, 0.18, 0.27, 0.37, 0.5)),
    "gaussian_blur": (_gaussian_blur, (0.5, 0.8, 1.1, 1.5, 2.0)),
    "defocus_blur": (_defocus_blur, (0.9, 1.3, 1.7, 2.2, 2.8)),
    "motion_blur": (_motion_blur, (2.5, 4.0, 5.5, 7.5, 10.0)),
    "zoom_blur": (_zoom_blur, (1.15, 1.25, 1.35, 1.45, 1.6)),
    "glass_blur": (_glass_blur, (0.5, 0.8, 1.1, 1.5, 2.0)),
    "fog": (_fog, (0.25, 0.4, 0.55, 0.68, 0.8)),
    "snow": (_snow, (0.1, 0.2, 0.32, 0.45, 0.6)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "darkness": (_darkness, (0.5, 1.0, 1.7, 2.5, 3.5)),
    "contrast": (_contrast, (0.6, 0.42, 0.3, 0.2, 0.12)),
    "saturation": (_saturation, (1.6, 2.2, 3.0, 4.0, 6.0)),
    "pixelate": (_pixelate, (0.75, 0.6, 0.5, 0.38, 0.28)),
    "jpeg": (_jpeg, (0.06, 0.1, 0.16, 0.24, 0.36)),
    "elastic": (_elastic, (1.0, 1.6, 2.3, 3.1, 4.0)),
    "shift": (_shift, (2, 4, 6, 8, 10)),
}

KINDS = tuple(_KINDS)
"""The names of all kinds."""

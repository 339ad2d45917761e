"""Data sets by name: training, validation and test images as arrays, standardized and batched.

    data = load("fashion_mnist", validation=5000)
    model.fit(data.train.batches(256, seed=1), validation_data=data.validation.batches(1000))

Every image passes through the same four steps, in this order:

    stored pixels 0 … 255  →  validation split and subsets  →  resizing  →  standardization

    x = (pixel / 255 − mean) / std                                                        (D1)

with `mean` and `std` from the training images alone (without the validation images and everything
outside the subset), so that no information from the validation or test images leaks into them.

The images come from tensorflow-datasets, from one `.npz` file (for machines with Keras on JAX or
PyTorch and no TensorFlow), or from scikit-learn's embedded digits, which need no network, data
folder or TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import io
import logging
import math
import os
import re
import sys
import tempfile
import textwrap
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_norm._arrays import is_integer, is_real
from keras_norm._files import replace_file, require_writable

__all__ = [
    "Batches",
    "Data",
    "DataUnavailableError",
    "FlipAndShift",
    "Split",
    "load",
    "load_or_digits",
    "pack",
]

Array: TypeAlias = NDArray[Any]
Augment: TypeAlias = Callable[[Array, Array, np.random.Generator], tuple[Array, Array]]
PathLike: TypeAlias = str | os.PathLike[str]
Standardize: TypeAlias = str | tuple[ArrayLike, ArrayLike] | None

_CHUNK = 1024  # images converted to float64 at a time, to bound the memory of the copies
_SMALLEST_STD = 1e-6  # of the range 1; one pixel off by 1/255 in 10⁷ images still lies above it
_PROBE_SECONDS = 5.0  # per address of the server, before a download begins
_VARIANTS = {b"\xff\xd8\xff": "JPEG copy", b"\x89PNG\r\n\x1a\n": "original"}
_PARTS = ("train", "validation", "test")
_STREAMS = {"split": 0, "train": 1, "validation": 2, "test": 3}  # one random stream per purpose


class DataUnavailableError(ValueError):
    """The data set exists, but is not available here: not prepared, no network, library missing.

    A `ValueError`, so that one `except` catches both; its own class distinguishes an absent data
    set from a wrong argument or a damaged file, which are errors in `load_or_digits` too.
    """


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What is known about a data set before it is read."""

    name: str
    title: str
    shape: tuple[int, int, int]  # (H, W, C)
    train: int
    test: int
    class_names: tuple[str, ...]


_NUMERALS = tuple("0123456789")
_TOPS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
_CLOTHES = (*_TOPS, "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SPECS = {
    "fashion_mnist": _Spec("fashion_mnist", "Fashion-MNIST", (28, 28, 1), 60_000, 10_000, _CLOTHES),
    "mnist": _Spec("mnist", "MNIST", (28, 28, 1), 60_000, 10_000, _NUMERALS),
    "cifar10": _Spec("cifar10", "CIFAR-10", (32, 32, 3), 50_000, 10_000, _THINGS),
    "digits": _Spec("digits", "digits", (8, 8, 1), 1437, 360, _NUMERALS),
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Raw:
    """Images as stored, pixels 0 … 255, and where they come from."""

    x_train: Array  # (N, H, W, C), uint8, or float32 for the digits
    y_train: Array  # (N,)
    x_test: Array
    y_test: Array
    source: str
    variant: str


@dataclasses.dataclass(frozen=True)
class _Options:
    """The checked arguments of `load` that determine how the images are processed."""

    validation: int | float
    subset: Mapping[str, int]
    stratify: bool
    standardize: Standardize
    image_size: tuple[int, int] | None
    resize: str
    seed: int
    dtype: np.dtype[Any]


# ---------------------------------------------------------------------------------------------
# What `load` returns


@dataclasses.dataclass(frozen=True)
class FlipAndShift:
    """Mirrors and shifts images: an `augment` for `Split.batches`, for photographs of objects.

    An image's pixel (i, j) comes from (r(i + a), r(j + b)), with a and b drawn anew for each image
    and epoch from -shift ... shift, and r the reflection at the edges (0 1 2 | 1 0); columns are
    counted from the other side if the image is mirrored.

    Args:
        shift: pixels, int >= 0; default 2.
        flip: "alternating" (the default): half of the images, drawn once, are mirrored in even
            epochs and the other half in odd ones, so that two epochs show every image both ways;
            "random": each with probability 1/2; "none".

    Raises:
        ValueError: for other arguments; and from the batches, for images no larger than `shift`.

    Example:
        >>> from keras_norm.datasets import FlipAndShift, load
        >>> batches = load("digits").train.batches(64, augment=FlipAndShift(1, flip="none"))
        >>> x, y = batches[0]
        >>> x.shape
        (64, 8, 8, 1)

    Reference: alternating flips are those of Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds on a
        Single GPU.
    """

    shift: int = 2
    flip: str = "alternating"

    def __post_init__(self) -> None:
        _non_negative("shift", self.shift)
        if self.flip not in ("alternating", "random", "none"):
            raise ValueError(
                f"`flip` must be 'alternating', 'random' or 'none'. Received: flip={self.flip!r}."
            )

    def images(self, x: Array, indices: Array, seed: int, epoch: int, batch: int) -> Array:
        """The images of one batch, as seen in one epoch.

        Args:
            x: all images (N, H, W, C).
            indices: (B,), which of them are in the batch.
            seed, epoch, batch: ints >= 0, which determine the random numbers.

        Returns:
            (B, H, W, C), a new array.
        """
        height, width = x.shape[1:3]
        if self.shift >= min(height, width):
            raise ValueError(
                "`shift` must be smaller than the images. "
                f"Received: shift={self.shift} for images of {height}×{width}."
            )
        rng = np.random.default_rng([seed, 1, epoch, batch])
        shifts = rng.integers(-self.shift, self.shift + 1, (2, len(indices), 1))
        rows = _reflected(np.arange(height) + shifts[0], height)  # (B, H)
        columns = _reflected(np.arange(width) + shifts[1], width)  # (B, W)
        if self.flip != "none":
            flips = self._flips(len(x), indices, seed, epoch, rng)
            columns = np.where(flips[:, None], width - 1 - columns, columns)
        if isinstance(x, np.ndarray) and x.flags.c_contiguous:  # faster, by pixel
            pixels = (indices[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
            return np.take(x.reshape(-1, x.shape[3]), pixels, axis=0)
        return x[indices[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _flips(
        self, count: int, indices: Array, seed: int, epoch: int, rng: np.random.Generator
    ) -> Array:
        if self.flip == "random":
            return rng.random(len(indices)) < 0.5
        first = np.random.default_rng([seed, 2]).random(count) < 0.5  # (N,), in even epochs
        return first[indices] ^ (epoch % 2 == 1)


def _reflected(positions: Array, size: int) -> Array:
    positions = abs(positions)
    return np.where(positions < size, positions, 2 * (size - 1) - positions)


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """The images of one split in batches, in a new order each epoch; made by `Split.batches`.

    For `fit`, `evaluate` and `predict` on every backend, and for plain loops. The order is a
    permutation seeded by (seed, epoch), and the generator passed to `augment` is seeded by
    (seed, epoch, index of the batch): a batch is the same in every run, whatever ran before.

    State:
        epoch: counts the calls of `on_epoch_end`, from 0. `fit` makes one before its first epoch
            and one after each; so after n finished epochs of one `fit`, `batches.epoch = n` in a
            new process, with `fit(initial_epoch=n)`, continues with the order that would have
            followed.

    Differences from Keras: `fit(shuffle=True)`, its default, also visits the batches of any
        PyDataset in an order drawn from Python's `random`. That changes neither which images share
        a batch nor how they are augmented. Pass `shuffle=False` to `fit`, or call
        `keras.utils.set_random_seed` before it, if two runs are to agree to the last bit.
        `workers` and `use_multiprocessing` are refused: with them, Keras 3.15 carries batches
        over from one epoch into the next, so that an epoch holds some images twice and others not
        at all. (On TensorFlow, batches are prepared ahead in a thread anyway.)

    Memory: TensorFlow 2.21 keeps every PyDataset passed to `fit`, with its arrays, until the
        process ends (`tf.data.Dataset.from_generator` registers it with the default graph). To
        train many models on parts of the images, pass `indices` instead of a copy for each.
    """

    def __init__(
        self,
        x: Array,
        y: Array,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        augment: Augment | FlipAndShift | None = None,
        drop_remainder: bool = False,
        indices: Array | None = None,
    ) -> None:
        super().__init__()
        self.x, self.y = x, y
        self._indices = _rows(indices, len(x))
        self.batch_size = _positive("batch_size", batch_size)
        self.shuffle = shuffle
        self.seed = _seed(seed)
        self.augment = augment
        self.drop_remainder = drop_remainder
        if not (augment is None or isinstance(augment, FlipAndShift) or callable(augment)):
            raise ValueError(
                "augment must be a function (x, y, rng) -> (x, y) of one batch, a FlipAndShift, "
                "or None. "
                f"Received: augment={augment!r}"
            )
        if len(self._indices) == 0:
            raise ValueError(
                "Batches need at least one image. Received: indices=[] or a split without images. "
                "Leave `indices` out for all of them."
            )
        if len(self) == 0:
            raise ValueError(
                "With drop_remainder=True, batch_size must not exceed the number of images, or no "
                f"batch is left. Received: batch_size={batch_size} for {len(self._indices)} "
                "images. Choose a smaller batch_size, or drop_remainder=False."
            )
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """Number of finished epochs; it chooses the order of the next one."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = _non_negative("epoch", value)
        if self.shuffle:
            rng = np.random.default_rng([self.seed, 0, self._epoch])
            self._order = rng.permutation(self._indices)  # (M,)

    def __len__(self) -> int:
        whole, rest = divmod(len(self._indices), self.batch_size)
        return whole + (rest > 0 and not self.drop_remainder)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        if not 0 <= index < len(self):
            raise IndexError(f"A batch index lies in [0, {len(self)}). Received: index={index}")
        order = self._order if self.shuffle else self._indices
        where = order[index * self.batch_size : (index + 1) * self.batch_size]  # (B,)
        if isinstance(self.augment, FlipAndShift):
            seeds = (self.seed, self._epoch, index)
            return self.augment.images(self.x, where, *seeds), self.y[where]
        x, y = self.x[where], self.y[where]  # (B, H, W, C), (B,)
        if self.augment is None:
            return x, y
        rng = np.random.default_rng([self.seed, 1, self._epoch, index])
        return _augmented(self.augment, x.copy(), y.copy(), rng)

    def on_epoch_begin(self) -> None:
        """Refuse options that would break the epochs."""
        if self.workers != 1 or self.use_multiprocessing:
            raise ValueError(
                "Batches must be prepared by one worker: with more, Keras mixes the epochs. "
                f"Received: workers={self.workers}, use_multiprocessing={self.use_multiprocessing}."
                " Leave both as they are."
            )

    def on_epoch_end(self) -> None:
        """Draw the order of the next epoch."""
        self.epoch += 1


def _rows(indices: Any, count: int) -> Array:
    """Which images take part: the given indices, or all of `count`."""
    if indices is None:
        return np.arange(count)
    rows = np.asarray(indices)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(
            "`indices` must be a list of integers, the numbers of the images. "
            f"Received: an array of shape {rows.shape} and type {rows.dtype}. Of a mask, pass "
            "numpy.flatnonzero(mask)."
        )
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError(
            f"`indices` must lie in [0, {count}), the numbers of the images. "
            f"Received: from {rows.min()} to {rows.max()}."
        )
    return rows.astype(np.intp)  # an index into the pixels may exceed the range of uint8


def _augmented(
    augment: Augment, x: Array, y: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    result = augment(x, y, rng)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            "augment must return a pair (x, y). "
            f"Received: {type(result).__name__} from augment={augment!r}"
        )
    new_x, new_y = np.asarray(result[0], dtype=x.dtype), np.asarray(result[1])
    if len(new_x) != len(new_y):
        raise ValueError(
            "augment must return as many images as labels. "
            f"Received: x of shape {new_x.shape}, y of shape {new_y.shape}"
        )
    return new_x, new_y


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images and labels of the training, validation or test part.

    Attributes:
        x: standardized images, (N, H, W, C), of the dtype asked for (float32 by default).
        y: class numbers, (N,), int32, in [0, classes).
    """

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return f"Split(x: {self.x.shape} {self.x.dtype}, y: {self.y.shape} {self.y.dtype})"

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        augment: Augment | FlipAndShift | None = None,
        drop_remainder: bool = False,
        indices: Array | None = None,
    ) -> Batches:
        """Batch the images for `fit`, `evaluate`, `predict` or a loop, on every backend.

        Args:
            batch_size: images per batch, at least 1; if larger than the split, one batch of all.
            shuffle: a new order each epoch; default True. Pass False for `predict`, so that the
                predictions come in the order of `y`.
            seed: of the order and of `augment`, an integer from 0; default 0.
            augment: `FlipAndShift`, or a function (x, y, rng) -> (x, y) of one batch and a
                `numpy.random.Generator`, default None. It gets copies and may change them in
                place; the x it returns is cast to the dtype of `x`, and its y may be anything that
                the loss accepts.
            drop_remainder: leave out the last, smaller batch; default False.
            indices: which images take part, as integers (M,), without a copy of them; default all.

        Returns:
            `Batches`, a `keras.utils.PyDataset` of pairs x (B, H, W, C), y (B,).

        Raises:
            ValueError: for batch_size below 1, or larger than the split with drop_remainder=True;
                for a seed that is not an integer from 0; for indices that are not those of images;
                for an `augment` that is not a function or does not return such a pair.

        Example:
            >>> from keras_norm.datasets import load
            >>> def mirror(x, y, rng):
            ...     flip = rng.random(len(x)) < 0.5
            ...     x[flip] = x[flip, :, ::-1]
            ...     return x, y
            >>> batches = load("digits").train.batches(256, seed=1, augment=mirror)
            >>> len(batches), [len(y) for x, y in batches]
            (6, [256, 256, 256, 256, 256, 157])
        """
        return Batches(
            self.x,
            self.y,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            augment=augment,
            drop_remainder=drop_remainder,
            indices=indices,
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A loaded data set.

    Attributes:
        name: the name it is loaded by, such as "mnist".
        train, validation, test: a `Split` each; validation is None if none was asked for.
        class_names: one name per class.
        mean, std: those of (D1), for pixels in [0, 1]; float64, of shape () for one number, (C,)
            per channel, (H, W, C) per pixel.
        source: one sentence that says which data this is and where it was found; names no folder,
            so that it can be published with figures.
        variant: "original" (as published, or stored without loss), "JPEG copy" (images compressed
            with loss before they were stored) or "arrays" (decoded by someone else).
        stands_in_for: the title of the data set that `load_or_digits` could not load, or "".
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    mean: Array
    std: Array
    source: str
    variant: str = "original"
    stands_in_for: str = ""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        _, height, width, channels = self.train.x.shape
        return height, width, channels

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def fallback(self) -> bool:
        """Whether `load_or_digits` had to use the embedded digits instead of the requested data."""
        return bool(self.stands_in_for)

    @property
    def title(self) -> str:
        """The name to print beside figures, such as "MNIST" or "CIFAR-10 (JPEG copy)"."""
        title = _SPECS[self.name].title
        if self.fallback:
            return f"{title} (in place of {self.stands_in_for})"
        return f"{title} (JPEG copy)" if self.variant == "JPEG copy" else title

    def standardize(self, images: ArrayLike) -> Array:
        """Turn images with pixels in [0, 1] into inputs of the model, by (D1).

        Args:
            images: (..., H, W, C), pixels in [0, 1].

        Returns:
            An array of the same shape and of the dtype of `train.x`.
        """
        unit = np.asarray(images, dtype=np.float64)
        return ((unit - self.mean) / self.std).astype(self.train.x.dtype)  # (D1)

    def unstandardize(self, x: ArrayLike) -> Array:
        """Turn inputs of the model back into pixels in [0, 1], to be drawn or corrupted.

        Args:
            x: (..., H, W, C), as in `train.x`.

        Returns:
            A float64 array of the same shape: the stored pixels / 255, to the rounding of x.
        """
        return np.asarray(x, dtype=np.float64) * self.std + self.mean

    def __repr__(self) -> str:
        held_out = 0 if self.validation is None else len(self.validation)
        height, width, channels = self.input_shape
        return (
            f"{self.title}: {len(self.train):,} training, {held_out:,} validation, "
            f"{len(self.test):,} test images of {height}×{width}×{channels}, "
            f"{self.classes} classes\n{self.source}"
        )


# ---------------------------------------------------------------------------------------------
# Loading and packing


def load(
    name: str,
    *,
    data_dir: PathLike | None = None,
    validation: int | float = 0,
    subset: int | Mapping[str, int] | None = None,
    stratify: bool = False,
    standardize: Standardize = "global",
    image_size: int | tuple[int, int] | None = None,
    resize: str = "bilinear",
    seed: int = 0,
    download: bool = True,
    dtype: str = "float32",
) -> Data:
    """Load a data set by name: split, resized and standardized.

    If `data_dir` is given, the data is looked for only there; otherwise in the folder named by the
    environment variable TFDS_DATA_DIR, then in `~/tensorflow_datasets`. Data found in none of them
    is downloaded and prepared by tensorflow-datasets, with its progress bars, in the first of them
    that can be written to. A failed download leaves nothing behind.

    Args:
        name: "fashion_mnist", "mnist", "cifar10" or "digits". The digits are scikit-learn's 1,797
            images of 8×8 pixels: they need no data folder, and ignore `data_dir` and `download`.
            Their test images are the same 360 in every call, equally many of each class.
        data_dir: an existing folder in the layout of tensorflow-datasets
            (`data_dir/mnist/3.0.1/…`), or one `.npz` file: as written by `pack`, or with arrays
            x_train, y_train, x_test, y_test (uint8 images, like the `mnist.npz` of Keras).
        validation: number of images (int), or fraction (float in [0, 1)), taken at random from
            the training images; default 0, none.
        subset: number of training images to keep, drawn at random from those that `validation`
            leaves; or numbers for several parts, {"train": …, "validation": …, "test": …}.
            Default None, all. Without `stratify`, a smaller subset is contained in a larger one
            with the same seed.
        stratify: draw the validation images and subsets from each class in proportion; default
            False.
        standardize: the `mean` and `std` of (D1), from the training images: "global" (one number
            each, the default), "channel", "pixel"; or your own pair (mean, std) for pixels in
            [0, 1], numbers or arrays that broadcast to (H, W, C); "unit" leaves pixels in [0, 1],
            and None in [0, 255].
        image_size: resize the images to (height, width), or an int for a square; default None, no
            resizing.
        resize: "bilinear" (the default; pixel centres at half-integers, without antialiasing:
            meant for enlarging) or "nearest".
        seed: of the validation split and the subsets, an integer from 0; default 0.
        download: whether missing data may be downloaded; default True. If the server cannot be
            reached, the download gives up within seconds.
        dtype: "float16", "float32" (default) or "float64", of the images.

    Returns:
        `Data`, with x (N, H, W, C) of `dtype` and y (N,) int32 in each part. Images keep the order
        in which the data set stores them.

    Raises:
        DataUnavailableError: the data is missing and may not, or cannot, be downloaded; or
            tensorflow-datasets (or Pillow, for a packed `.npz`) is not installed. A `ValueError`.
        ValueError: an unknown name, a `data_dir` that does not exist, any other argument out of
            its range, more images asked for than there are, empty, short or damaged data.

    Example:
        >>> from keras_norm.datasets import load
        >>> data = load("digits", validation=0.1, seed=1)
        >>> data.train
        Split(x: (1293, 8, 8, 1) float32, y: (1293,) int32)
        >>> float(data.train.x.std().round(4)), data.classes
        (1.0, 10)

    Numerics:
        The statistics are accumulated in float64 in two passes over the stored pixels, first the
        mean, then the squared deviations from it. `std` is that of the population (÷N). If it is
        below 1e-6 of the range (a pixel that is the same in every training image), 1 is used
        instead, so that the standardized pixel is 0. (D1) is computed in float64 and rounded once.
        TensorFlow and Pillow decode JPEG with different integer transforms: the same JPEG copy of
        CIFAR-10, read from a data folder and from a packed `.npz`, differs by 1 of 255 levels on
        average and 5 at most (channel means .4868/.4822/.4414 and .4912/.4821/.4465). PNG, in
        which tensorflow-datasets stores all of these, is decoded alike everywhere.
    """
    spec = _spec(name)
    options = _options(
        validation, subset, stratify, standardize, image_size, resize, seed, dtype
    )  # before any reading: a wrong argument costs no time
    return _prepare(spec, _read(spec, data_dir, download), options)


def load_or_digits(name: str, **options: Any) -> Data:
    """Load a data set, or, with a loud message, the embedded digits if it is not available.

    For lessons that must run without network and data folder. The digits take the shape of the
    images they replace: enlarged to their size (or to `image_size`), with the one channel repeated
    if those have three. A `validation` given as a count becomes the same fraction of the digits,
    and subsets larger than the digits become all of them.

    Args:
        name: as in `load`.
        **options: as in `load`.

    Returns:
        `Data`; if the digits had to be used, `fallback` is True, `title` says so, and a boxed
        message with the reason has been printed to standard error.

    Raises:
        ValueError: as in `load`, for wrong arguments and damaged data; only a
            `DataUnavailableError` leads to the digits.

    Example:
        >>> from keras_norm.datasets import load_or_digits
        >>> load_or_digits("digits", image_size=28).input_shape
        (28, 28, 1)
    """
    try:
        return load(name, **options)
    except DataUnavailableError as error:
        reason = str(error)
    spec = _spec(name)
    data = _stand_in(spec, options)
    _announce(spec, data, reason)
    return data


def pack(
    name: str, path: PathLike, *, data_dir: PathLike | None = None, download: bool = True
) -> Path:
    """Write a data set into one `.npz` file that `load` reads without TensorFlow.

    The images are stored as the encoded bytes (PNG or JPEG) of the prepared data, so that the
    file is small: 20 MB for MNIST, 37 MB for Fashion-MNIST. Reading it needs Pillow.

    Args:
        name: "fashion_mnist", "mnist" or "cifar10".
        path: the file to write, ending in .npz; replaced if it exists. Its folder is made if
            missing.
        data_dir: folder in the layout of tensorflow-datasets, as in `load`; default None.
        download: as in `load`.

    Returns:
        The path. Arrays in the file, for each part ("train", "test"): `train_bytes` (uint8, all
        encoded images one after another), `train_ends` (int64, where each one ends),
        `train_labels` (int64).

    Raises:
        DataUnavailableError: as in `load`.
        ValueError: for an unknown name, "digits" (already embedded), or another ending.

    Example:
        `pack("cifar10", "cifar10.npz")` where TensorFlow is installed, then
        `load("cifar10", data_dir="cifar10.npz")` where it is not.
    """
    spec, target = _spec(name), Path(path).expanduser()
    if spec.name == "digits":
        raise ValueError(
            "The digits are embedded in scikit-learn and need no packing. Received: name='digits'. "
            "Call load('digits') anywhere."
        )
    if target.suffix != ".npz":
        raise ValueError(f"path must end in .npz. Received: path={os.fspath(path)!r}")
    require_writable(target.parent)
    folder, _ = _prepared(spec, data_dir, download)
    arrays: dict[str, Any] = {}
    with _reading(spec, folder):
        for part in ("train", "test"):
            records = list(_records(spec, folder, part))
            blobs = [blob for blob, _ in records]
            arrays[f"{part}_bytes"] = np.frombuffer(b"".join(blobs), np.uint8)
            arrays[f"{part}_ends"] = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
            arrays[f"{part}_labels"] = np.array([label for _, label in records], np.int64)
    with replace_file(target) as temporary:
        np.savez(temporary, **arrays)
    return target


# ---------------------------------------------------------------------------------------------
# Arguments


def _spec(name: str) -> _Spec:
    if isinstance(name, str) and name in _SPECS:
        return _SPECS[name]
    wanted = str(name).lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(wanted, _SPECS, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    known = ", ".join(repr(known) for known in _SPECS)
    raise ValueError(f"name must be one of {known}. Received: name={name!r}.{hint}")


def _integer(rule: str, name: str, value: Any, least: int) -> int:
    if not (is_integer(value) and value >= least):
        raise ValueError(f"{name} must be {rule}. Received: {name}={value!r}")
    return int(value)


def _positive(name: str, value: Any) -> int:
    return _integer("an integer of at least 1", name, value, 1)


def _non_negative(name: str, value: Any) -> int:
    return _integer("an integer of at least 0", name, value, 0)


def _seed(value: Any) -> int:
    return _non_negative("seed", value)


def _options(
    validation: Any,
    subset: Any,
    stratify: bool,
    standardize: Any,
    image_size: Any,
    resize: str,
    seed: Any,
    dtype: Any,
) -> _Options:
    if resize not in ("bilinear", "nearest"):
        raise ValueError(f"resize must be 'bilinear' or 'nearest'. Received: resize={resize!r}")
    if str(dtype) not in ("float16", "float32", "float64"):
        raise ValueError(
            f"dtype must be 'float16', 'float32' or 'float64'. Received: dtype={dtype!r}"
        )
    return _Options(
        _validation(validation),
        _subset(subset),
        bool(stratify),
        _standardize(standardize),
        _image_size(image_size),
        resize,
        _seed(seed),
        np.dtype(str(dtype)),
    )


def _validation(value: Any) -> int | float:
    if is_real(value) and not is_integer(value):
        if 0 <= value < 1:
            return float(value)
        raise ValueError(
            "validation as a fraction of the training images must lie in [0, 1). "
            f"Received: validation={value!r}. Pass an int for a number of images."
        )
    rule = "a number of images (an integer of at least 0) or a fraction (a float in [0, 1))"
    return _integer(rule, "validation", value, 0)


def _subset(value: Any) -> Mapping[str, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {"train": _positive("subset", value)}
    for part in value:
        if part not in _PARTS:
            raise ValueError(
                "subset as a mapping may name the parts 'train', 'validation' and 'test'. "
                f"Received: subset={dict(value)!r}"
            )
    return {part: _positive(f"subset[{part!r}]", count) for part, count in value.items()}


def _standardize(value: Any) -> Standardize:
    if value is None or (
        isinstance(value, str) and value in ("global", "channel", "pixel", "unit")
    ):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        with contextlib.suppress(TypeError, ValueError):  # not numbers
            mean, std = (np.asarray(part, dtype=np.float64) for part in value)
            if np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all():
                return mean, std
        raise ValueError(
            "standardize as a pair (mean, std) must hold finite numbers, with std above 0. "
            f"Received: standardize={value!r}. Use 1 as the std of a pixel that never changes."
        )
    raise ValueError(
        "standardize must be 'global', 'channel', 'pixel', 'unit', None, or a pair (mean, std) for "
        f"pixels of [0, 1]. Received: standardize={value!r}"
    )


def _image_size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                "image_size must be one integer or a pair (height, width). "
                f"Received: image_size={value!r}"
            )
        return _positive("image_size[0]", value[0]), _positive("image_size[1]", value[1])
    side = _positive("image_size", value)
    return side, side


# ---------------------------------------------------------------------------------------------
# From stored pixels to Data


def _prepare(spec: _Spec, raw: _Raw, options: _Options) -> Data:
    _check_raw(spec, raw)
    train, validation = _hold_out(raw.y_train, options)
    chosen = {
        "train": (raw.x_train, raw.y_train, train),
        "validation": (raw.x_train, raw.y_train, validation),
        "test": (raw.x_test, raw.y_test, np.arange(len(raw.y_test))),
    }
    for part in options.subset:
        x, y, indices = chosen[part]
        chosen[part] = x, y, _keep(part, y, indices, options)
    images = {
        part: _resized(x[indices], options.image_size, options.resize)
        for part, (x, _, indices) in chosen.items()
    }
    mean, std = _statistics(options.standardize, images["train"])
    splits = {
        part: Split(
            _standardized(images.pop(part), mean, std, options.dtype), y[indices].astype(np.int32)
        )
        for part, (_, y, indices) in chosen.items()
    }
    return Data(
        name=spec.name,
        train=splits["train"],
        validation=splits["validation"] if len(validation) else None,
        test=splits["test"],
        class_names=spec.class_names,
        mean=mean,
        std=std,
        source=raw.source,
        variant=raw.variant,
    )


def _check_raw(spec: _Spec, raw: _Raw) -> None:
    for part, x, y in (("training", raw.x_train, raw.y_train), ("test", raw.x_test, raw.y_test)):
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(
                f"{spec.title} must hold at least one {part} image, and a label for each. "
                f"Received: {len(x)} images, {len(y)} labels. Prepare or pack the data again."
            )
        _check_shape(spec, x.shape[1:])
        if y.min() < 0 or y.max() >= len(spec.class_names):
            raise ValueError(
                f"Labels of {spec.title} lie in [0, {len(spec.class_names)}). Received: {part} "
                f"labels from {y.min()} to {y.max()}. Does it hold another data set?"
            )


def _check_shape(spec: _Spec, shape: tuple[int, ...]) -> None:
    if tuple(shape) != spec.shape:
        raise ValueError(
            f"Images of {spec.title} must have the shape {spec.shape}. Received: {tuple(shape)}. "
            "Does the file or folder hold another data set?"
        )


def _hold_out(y: Array, options: _Options) -> tuple[Array, Array]:
    """Indices of the training and of the validation images, each in the stored order."""
    everything = np.arange(len(y))
    wanted = options.validation
    count = round(wanted * len(y)) if isinstance(wanted, float) else wanted
    if count == 0 and wanted == 0:
        return everything, everything[:0]
    if not 0 < count < len(y):
        raise ValueError(
            "validation must take at least one training image and leave at least one. "
            f"Received: validation={wanted!r} of {len(y)} training images."
        )
    chosen = _choose(y, count, _stream(options, "split"), options.stratify)
    return np.setdiff1d(everything, chosen, assume_unique=True), chosen


def _keep(part: str, y: Array, indices: Array, options: _Options) -> Array:
    count = options.subset[part]
    if count > len(indices):
        rest = ""
        if part == "train" and options.validation:
            rest = f" after validation={options.validation!r}"
        hint = " Set validation= as well." if part == "validation" and len(indices) == 0 else ""
        raise ValueError(
            f"subset must not ask for more {part} images than there are. Received: {count} of "
            f"{len(indices)}{rest}.{hint}"
        )
    return indices[_choose(y[indices], count, _stream(options, part), options.stratify)]


def _stream(options: _Options, purpose: str) -> np.random.Generator:
    return np.random.default_rng([options.seed, _STREAMS[purpose]])


def _choose(y: Array, count: int, rng: np.random.Generator, stratify: bool) -> Array:
    """Sorted positions of `count` labels drawn without replacement, by class if stratified."""
    if not stratify:
        return np.sort(rng.permutation(len(y))[:count])
    classes, sizes = np.unique(y, return_counts=True)
    shares = count * sizes / len(y)
    takes = np.floor(shares).astype(int)
    largest_remainders = np.argsort(takes - shares, kind="stable")[: count - takes.sum()]
    takes[largest_remainders] += 1
    drawn = [
        rng.permutation(np.flatnonzero(y == label))[:take]
        for label, take in zip(classes, takes, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _chunks(images: Array) -> Iterator[slice]:
    for start in range(0, len(images), _CHUNK):
        yield slice(start, start + _CHUNK)


def _resized(images: Array, size: tuple[int, int] | None, how: str) -> Array:
    if size is None or size == images.shape[1:3] or len(images) == 0:
        return images
    if how == "nearest":
        rows, columns = (
            np.floor((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(size, images.shape[1:3], strict=True)
        )
        return images[:, rows[:, None], columns]  # (N, H, W, C) -> (N, H', W', C)
    rows, columns = (
        _bilinear_weights(old, new) for old, new in zip(images.shape[1:3], size, strict=True)
    )
    result = np.empty((len(images), *size, images.shape[3]), np.float32)
    for chunk in _chunks(images):
        result[chunk] = np.einsum("ah,nhwc,bw->nabc", rows, images[chunk], columns, optimize=True)
    return result


def _bilinear_weights(old: int, new: int) -> Array:
    """The (new, old) matrix of linear interpolation between pixel centres, constant at the edge."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, old - 1)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), below), 1 - (position - below))
    np.add.at(weights, (np.arange(new), above), position - below)
    return weights


def _statistics(how: Standardize, images: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of (D1), for pixels in [0, 1], in float64."""
    if how is None:
        return np.zeros(()), np.full((), 1 / 255)
    if how == "unit":
        return np.zeros(()), np.ones(())
    if isinstance(how, tuple):
        mean, std = (np.asarray(part, dtype=np.float64) for part in how)
        return _broadcastable(mean, images), _broadcastable(std, images)
    axes = {"global": (0, 1, 2, 3), "channel": (0, 1, 2), "pixel": (0,)}[how]
    count = math.prod(images.shape[axis] for axis in axes)
    mean = np.zeros(())
    for chunk in _chunks(images):
        mean = mean + np.sum(images[chunk], axis=axes, dtype=np.float64)
    mean = mean / count
    m2 = np.zeros(())
    for chunk in _chunks(images):
        m2 = m2 + np.sum((images[chunk] - mean) ** 2, axis=axes)
    std = np.sqrt(m2 / count) / 255
    return mean / 255, np.where(std < _SMALLEST_STD, 1.0, std)


def _broadcastable(value: Array, images: Array) -> Array:
    shape = images.shape[1:]
    with contextlib.suppress(ValueError):
        if np.broadcast_shapes(value.shape, shape) == shape:
            return value
    raise ValueError(
        "standardize as a pair (mean, std) must hold numbers or arrays that broadcast to "
        f"(H, W, C) = {shape}. Received: an array of shape {value.shape}"
    )


def _standardized(images: Array, mean: Array, std: Array, dtype: np.dtype[Any]) -> Array:
    result = np.empty(images.shape, dtype)
    for chunk in _chunks(images):
        result[chunk] = (images[chunk] - 255 * mean) / (255 * std)  # (D1)
    return result


# ---------------------------------------------------------------------------------------------
# Where the stored pixels come from


def _read(spec: _Spec, data_dir: PathLike | None, download: bool) -> _Raw:
    if spec.name == "digits":
        return _read_digits()
    if data_dir is not None and Path(data_dir).suffix == ".npz":
        return _read_npz(spec, Path(data_dir).expanduser())
    folder, origin = _prepared(spec, data_dir, download)
    return _read_prepared(spec, folder, origin)


def _read_digits() -> _Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images[..., None] * (255 / 16)).astype(np.float32)  # 17 grey levels, exact
    y = np.asarray(digits.target)
    test = _choose(y, _SPECS["digits"].test, np.random.default_rng(0), stratify=True)
    train = np.setdiff1d(np.arange(len(y)), test)
    source = (
        "The handwritten digits embedded in scikit-learn (1,797 images of 8×8 pixels, "
        "a fixed stratified fifth of them for testing)."
    )
    return _Raw(x[train], y[train], x[test], y[test], source, "original")


def _source(spec: _Spec, variant: str, origin: str, train: int, test: int) -> str:
    what = {"original": "", "JPEG copy": " as a JPEG copy (pixels slightly off)"}.get(
        variant, " as decoded arrays"
    )
    size = f"{train:,} training and {test:,} test images"
    if (train, test) != (spec.train, spec.test):
        size += f" of the published {spec.train:,} and {spec.test:,}"
    return f"{spec.title}{what}, {size}, from {origin}."


# ------------------------------------------------------------------ a folder of tensorflow-datasets


def _roots(data_dir: PathLike | None) -> list[tuple[Path, str]]:
    """The folders to look in, each with its name in messages."""
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        if not os.path.isdir(root):
            raise ValueError(
                "data_dir must be an existing folder, or a file ending in .npz. "
                f"Received: data_dir={os.fspath(data_dir)!r}. Correct it, or create the folder to "
                "have data downloaded into it."
            )
        return [(root, "the folder given as data_dir")]
    roots = [(Path("~/tensorflow_datasets").expanduser(), "the default of tensorflow-datasets")]
    if named := os.environ.get("TFDS_DATA_DIR"):
        roots.insert(0, (Path(named).expanduser(), "the folder named by TFDS_DATA_DIR"))
    return roots


def _prepared(spec: _Spec, data_dir: PathLike | None, download: bool) -> tuple[Path, str]:
    """The folder of the prepared data and a phrase for its location; downloads missing data."""
    roots = _roots(data_dir)
    for root, origin in roots:
        if folder := _newest_version(root / spec.name):
            return folder, origin
    if not download:
        raise _unavailable(spec, "is not prepared here, and download=False", "", roots)
    for root, origin in roots:
        if _writable(root):
            return _download(spec, root, roots), origin
    raise _unavailable(spec, "is not prepared here, and no folder here can be written", "", roots)


def _unavailable(
    spec: _Spec, what: str, detail: str, roots: list[tuple[Path, str]]
) -> DataUnavailableError:
    looked = ", ".join(
        f"{root / spec.name} ({origin}{'' if os.path.isdir(root) else ', which does not exist'})"
        for root, origin in roots
    )
    return DataUnavailableError(
        f"{spec.title} {what}. Received: name={spec.name!r}{detail}; looked in {looked}. Allow "
        "download=True where there is a network; or set data_dir or TFDS_DATA_DIR to a folder that "
        f"holds '{spec.name}/<version>/dataset_info.json'; or call load('digits'), which needs "
        "neither network nor folder."
    )


def _newest_version(folder: Path) -> Path | None:
    """The prepared version with the highest number; tensorflow-datasets writes its info last."""
    try:
        versions = [
            path
            for path in folder.iterdir()
            if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
        ]
    except OSError:
        return None
    return max(versions, key=lambda path: [*map(int, path.name.split("."))], default=None)


def _writable(root: Path) -> bool:
    # os.path: Path.exists raises if a folder may not be entered.
    existing = next(path for path in (root, *root.absolute().parents) if os.path.exists(path))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _import_tfds(spec: _Spec) -> Any:
    try:
        if importlib.util.find_spec("tensorflow") is None:
            raise ImportError("No module named 'tensorflow'")
        import tensorflow_datasets
    except ImportError as error:
        raise _libraries_missing(spec, error) from error
    return tensorflow_datasets


def _libraries_missing(spec: _Spec, error: ImportError) -> DataUnavailableError:
    return DataUnavailableError(
        f"Reading or downloading {spec.title} needs tensorflow-datasets and TensorFlow (whatever "
        f"backend Keras runs on). Received: {error}. Run `pip install tensorflow "
        "tensorflow-datasets importlib_resources`; or where they are installed, call "
        f"keras_norm.datasets.pack({spec.name!r}, '{spec.name}.npz'), and pass that file as "
        "data_dir here; or call load('digits'), which needs neither."
    )


def _download(spec: _Spec, root: Path, roots: list[tuple[Path, str]]) -> Path:
    """Let tensorflow-datasets prepare the data under `root`; on failure leave `root` as it was."""
    tfds = _import_tfds(spec)
    made = [path for path in (root, *root.absolute().parents) if not os.path.exists(path)]
    cause: Exception | None = None
    failure = ", nothing prepared by tensorflow-datasets"
    try:
        _probe(tfds.builder_cls(spec.name).url_infos or ())
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download_", dir=root) as scratch:
            tfds.builder(spec.name, data_dir=root).download_and_prepare(
                download_dir=scratch,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except Exception as error:
        summary = (str(error).strip().splitlines() or [""])[0]
        failure, cause = f", {type(error).__name__}: {summary}", error
    finally:
        for empty in [root / spec.name, *made]:
            with contextlib.suppress(OSError):  # missing, or it holds the prepared data
                empty.rmdir()
    if folder := _newest_version(root / spec.name):  # also when another process was faster
        return folder
    raise _unavailable(spec, "could not be downloaded", failure, roots) from cause


def _probe(urls: Iterable[str]) -> None:
    """Check that each server answers, whatever the answer.

    Without a network, the download itself would retry for minutes before failing.
    """
    opener = urllib.request.build_opener()  # reads the proxies from the current environment
    servers = {urllib.parse.urlsplit(url).netloc: url for url in urls}
    for url in servers.values():
        request = urllib.request.Request(url, method="HEAD")
        try:
            with opener.open(request, timeout=_PROBE_SECONDS):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            if error.code >= 500:
                raise


@contextlib.contextmanager
def _reading(spec: _Spec, path: Path) -> Iterator[None]:
    """Turn exceptions inside a reader into an error that names the file and the remedy."""
    try:
        with _without_deprecation_notes():
            yield
    except (DataUnavailableError, MemoryError):
        raise
    except ImportError as error:
        raise _libraries_missing(spec, error) from error
    except Exception as error:
        raise ValueError(
            f"The stored data of {spec.title} could not be read: it is damaged, short, or in "
            f"another layout. Received: {path}: {type(error).__name__}: {error}. Delete it and "
            "have it downloaded or packed again."
        ) from error


@contextlib.contextmanager
def _without_deprecation_notes() -> Iterator[None]:
    """tensorflow-datasets 4.9.10 warns of its own use of its own deprecated attributes."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_prepared(spec: _Spec, folder: Path, origin: str) -> _Raw:
    with _reading(spec, folder):
        variant = _variant(_first_image(spec, folder))
        x_train, y_train = _decode(spec, folder, "train")
        x_test, y_test = _decode(spec, folder, "test")
    source = _source(spec, variant, origin, len(y_train), len(y_test))
    return _Raw(x_train, y_train, x_test, y_test, source, variant)


def _decode(spec: _Spec, folder: Path, part: str) -> tuple[Array, Array]:
    """All images (N, H, W, C) uint8 and labels (N,) of one part, decoded in parallel."""
    tfds = _import_tfds(spec)
    builder = tfds.builder_from_directory(folder)
    count = builder.info.splits[part].num_examples
    x = np.empty((count, *spec.shape), np.uint8)
    y = np.empty(count, np.int64)
    done = 0
    batches = builder.as_dataset(
        split=part,
        batch_size=_CHUNK,
        shuffle_files=False,
        decoders=tfds.decode.PartialDecoding({"image": True, "label": True}),
        read_config=tfds.ReadConfig(try_autocache=False),  # read once: a cache would be a copy
    )
    for batch in tfds.as_numpy(batches):
        _check_shape(spec, batch["image"].shape[1:])
        end = done + len(batch["label"])
        x[done:end], y[done:end] = batch["image"], batch["label"]
        done = end
    if done != count:
        raise ValueError(f"{part} holds {done} of the {count} images its info promises")
    return x, y


def _records(spec: _Spec, folder: Path, part: str, first: int = -1) -> Iterator[tuple[bytes, int]]:
    """Encoded image and label of the first records, or of all, in the stored order."""
    tfds = _import_tfds(spec)
    records = tfds.builder_from_directory(folder).as_dataset(
        split=part,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),
    )
    for record in tfds.as_numpy(records.take(first)):
        yield record["image"], int(record["label"])


def _first_image(spec: _Spec, folder: Path) -> bytes:
    for encoded, _ in _records(spec, folder, "train", first=1):
        return encoded
    raise ValueError("it holds no training images")


def _variant(encoded: bytes) -> str:
    """The variant of the data set, from the first bytes of an encoded image."""
    for magic, variant in _VARIANTS.items():
        if encoded.startswith(magic):
            return variant
    raise ValueError(f"images must be PNG or JPEG, not bytes that begin with {encoded[:8]!r}")


# --------------------------------------------------------------------------------- one .npz file


def _read_npz(spec: _Spec, path: Path) -> _Raw:
    if not path.is_file():
        raise ValueError(
            f"data_dir must be an existing folder or .npz file. Received: data_dir={str(path)!r}. "
            "Correct it, or write the file with keras_norm.datasets.pack."
        )
    with _reading(spec, path), path.open("rb") as file, np.load(file) as arrays:
        if "train_bytes" in arrays:
            variant = _variant(arrays["train_bytes"][:16].tobytes())
            x_train, y_train = _unpacked(spec, arrays, "train")
            x_test, y_test = _unpacked(spec, arrays, "test")
        elif "x_train" in arrays:
            variant = "arrays"
            x_train, y_train = _as_images(arrays, "train")
            x_test, y_test = _as_images(arrays, "test")
        else:
            raise ValueError(
                f"it holds {sorted(arrays)}, neither train_bytes … nor x_train, y_train, x_test, "
                "y_test"
            )
    source = _source(spec, variant, "the .npz file given as data_dir", len(y_train), len(y_test))
    return _Raw(x_train, y_train, x_test, y_test, source, variant)


def _unpacked(spec: _Spec, arrays: Mapping[str, Array], part: str) -> tuple[Array, Array]:
    image = _import_pillow(spec)
    data, ends = arrays[f"{part}_bytes"].tobytes(), arrays[f"{part}_ends"]
    labels = arrays[f"{part}_labels"]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"{part}_labels must be integers of shape (N,), not {labels.dtype} {labels.shape}"
        )
    if len(ends) != len(labels) or (len(ends) and ends[-1] != len(data)):
        raise ValueError(
            f"{part} has {len(labels)} labels for {len(ends)} images, and {len(data)} bytes"
        )
    x = np.empty((len(ends), *spec.shape), np.uint8)
    starts = np.concatenate([[0], ends[:-1]])
    for i, (start, end) in enumerate(zip(starts, ends, strict=False)):
        pixels = np.asarray(image.open(io.BytesIO(data[start:end])))
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels  # (H, W) -> (H, W, 1)
        _check_shape(spec, pixels.shape)
        x[i] = pixels
    return x, labels


def _import_pillow(spec: _Spec) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataUnavailableError(
            f"Reading the packed images of {spec.title} needs Pillow. Received: {error}. Run "
            "`pip install pillow`, pass an .npz file of decoded arrays (x_train, y_train, x_test, "
            "y_test), or call load('digits')."
        ) from error
    return Image


def _as_images(arrays: Mapping[str, Array], part: str) -> tuple[Array, Array]:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.dtype.kind not in "iu":
        raise ValueError(
            f"x_{part} must be uint8 of shape (N, H, W) or (N, H, W, C), and y_{part} integers, "
            f"not {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    return x[..., None] if x.ndim == 3 else x, y.reshape(-1)


# ---------------------------------------------------------------------------------------------
# The digits in place of another data set


def _stand_in(spec: _Spec, given: Mapping[str, Any]) -> Data:
    """The digits in the shape of `spec`, with counts adapted to 1,797 images."""
    parameters = inspect.signature(load).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    wanted = {**defaults, "image_size": spec.shape[:2]}
    wanted |= {key: value for key, value in given.items() if value is not None}
    wanted["standardize"] = given.get("standardize", defaults["standardize"])  # None has a meaning
    for where in ("data_dir", "download"):
        del wanted[where]
    options = _options(**wanted)
    raw, channels = _read_digits(), spec.shape[2]
    if isinstance(options.validation, int) and options.validation > 0:
        share = options.validation / spec.train * len(raw.y_train)
        options = dataclasses.replace(options, validation=max(1, round(share)))
    train, held_out = _hold_out(raw.y_train, options)
    available = {"train": len(train), "validation": len(held_out), "test": len(raw.y_test)}
    subset = {part: min(count, available[part] or count) for part, count in options.subset.items()}
    raw = dataclasses.replace(
        raw,
        x_train=raw.x_train.repeat(channels, axis=3),  # (N, 8, 8, 1) -> (N, 8, 8, C)
        x_test=raw.x_test.repeat(channels, axis=3),
    )
    digits = dataclasses.replace(_SPECS["digits"], shape=(*raw.x_train.shape[1:3], channels))
    data = _prepare(digits, raw, dataclasses.replace(options, subset=subset))
    return dataclasses.replace(data, stands_in_for=spec.title)


def _announce(spec: _Spec, data: Data, reason: str) -> None:
    height, width, _ = data.input_shape
    held_out = 0 if data.validation is None else len(data.validation)
    lines = [
        f"{spec.title.upper()} IS NOT AVAILABLE: RUNNING ON THE EMBEDDED DIGITS INSTEAD.",
        f"They are {len(data.train):,} training, {held_out:,} validation and {len(data.test):,} "
        f"test images of 8x8 pixels, enlarged to {height}x{width}. No figure below is one of "
        f"{spec.title}.",
        f"Why: {reason}",
    ]
    bar = "=" * 96
    body = [f"| {part}" for line in lines for part in textwrap.wrap(line, 94)]
    print("\n".join(["", bar, *body, bar, ""]), file=sys.stderr, flush=True)

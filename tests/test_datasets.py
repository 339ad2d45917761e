"""Data sets: splits, standardization, batches, every place the data may come from, every error.

The core tests run on the embedded digits and on small files of decoded arrays, without TensorFlow
or a network. The others read data that tensorflow-datasets prepared: made up here, or real.
"""

import ast
import contextlib
import http.server
import io
import json
import os
import sys
import threading
import types
import urllib.error
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_norm import datasets
from keras_norm.datasets import DataUnavailableError, load, load_or_digits

core = pytest.mark.core
REAL = os.environ.get("TFDS_DATA_DIR", "")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path_factory):
    """No data folder, home folder or proxy of this machine reaches a test by accident."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", refuse)


def sklearn_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def write_arrays(path, train=50, test=20, shape=(28, 28), **changes):
    """A small file of decoded arrays in the layout of Keras's mnist.npz."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % 10,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % 10,
    }
    arrays |= changes
    np.savez(path, **arrays)
    return arrays


# ------------------------------------------------------------------------------------ the digits


@core
def test_digits_are_scikit_learns():
    data = load("digits", standardize=None)
    images, target = sklearn_digits()
    assert data.input_shape == (8, 8, 1)
    assert (len(data.train), len(data.test), data.validation) == (1437, 360, None)
    assert data.train.x.dtype == np.float32
    assert data.train.y.dtype == np.int32
    expected = (images[..., None] * (255 / 16)).astype(np.float32)
    assert as_rows(data.train, data.test) == as_rows(datasets.Split(expected, np.int32(target)))


@core
def test_digits_test_part_is_stratified_and_the_same_for_every_seed():
    first, second = load("digits", seed=0), load("digits", seed=7, validation=100)
    np.testing.assert_array_equal(first.test.y, second.test.y)
    shares = np.bincount(first.test.y) / np.bincount(np.concatenate([first.train.y, first.test.y]))
    np.testing.assert_allclose(shares, 360 / 1797, atol=1 / 170)


@core
def test_digits_need_neither_tensorflow_nor_network(monkeypatch, no_network):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    data = load("digits", data_dir="/nowhere", download=False)
    assert "scikit-learn" in data.source
    assert (data.title, data.variant, data.fallback) == ("digits", "original", False)
    assert data.class_names == tuple("0123456789")
    assert data.classes == 10


@core
def test_repr_states_sizes_and_source():
    text = repr(load("digits", validation=37))
    assert "1,400 training, 37 validation, 360 test images of 8×8×1, 10 classes" in text
    assert "scikit-learn" in text


@core
def test_import_brings_nothing_beyond_keras_and_numpy():
    statements = ast.parse(Path(datasets.__file__).read_text()).body
    roots = {statement.module for statement in statements if isinstance(statement, ast.ImportFrom)}
    for statement in statements:
        if isinstance(statement, ast.Import):
            roots |= {alias.name for alias in statement.names}
    roots -= {"keras_norm._arrays", "keras_norm._files"}  # which import no more than these
    assert {root.split(".")[0] for root in roots} - sys.stdlib_module_names == {"keras", "numpy"}


# ------------------------------------------------------------------------- validation and subsets


def as_rows(*splits):
    return sorted(
        x.tobytes() + y.tobytes() for split in splits for x, y in zip(split.x, split.y, strict=True)
    )


@core
@pytest.mark.parametrize(("validation", "count"), [(100, 100), (0.1, 144), (np.int64(5), 5)])
@pytest.mark.parametrize("stratify", [False, True])
def test_validation_comes_out_of_the_training_part(validation, count, stratify):
    whole = load("digits", standardize=None)
    data = load("digits", validation=validation, stratify=stratify, standardize=None)
    assert len(data.validation) == count
    assert len(data.train) == 1437 - count
    assert as_rows(data.train, data.validation) == as_rows(whole.train)
    assert as_rows(data.test) == as_rows(whole.test)


@core
def test_zero_validation_is_none():
    assert load("digits", validation=0).validation is None
    assert load("digits", validation=0.0).validation is None


@core
def test_splits_repeat_with_the_seed_and_change_with_it():
    options = {"validation": 100, "subset": 200, "standardize": None}
    first, again = load("digits", seed=3, **options), load("digits", seed=3, **options)
    other = load("digits", seed=4, **options)
    for part in ("train", "validation"):
        np.testing.assert_array_equal(getattr(first, part).x, getattr(again, part).x)
        assert as_rows(getattr(first, part)) != as_rows(getattr(other, part))


@core
def test_validation_does_not_depend_on_the_subset_and_subsets_are_nested():
    small = load("digits", validation=100, subset=50, standardize=None)
    large = load("digits", validation=100, subset={"train": 500, "test": 30}, standardize=None)
    assert as_rows(small.validation) == as_rows(large.validation)
    assert set(as_rows(small.train)) < set(as_rows(large.train))
    assert not set(as_rows(large.train)) & set(as_rows(large.validation))
    assert [len(part) for part in (small.train, large.train, large.test)] == [50, 500, 30]


@core
def test_subset_of_every_part():
    data = load("digits", validation=200, subset={"train": 40, "validation": 30, "test": 20})
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 30, 20]


@core
def test_stratified_parts_have_the_classes_in_proportion():
    whole = np.bincount(load("digits").train.y)
    data = load("digits", validation=300, subset=200, stratify=True)
    left = whole - np.bincount(data.validation.y)
    assert np.abs(np.bincount(data.validation.y) - 300 * whole / 1437).max() < 1
    assert np.abs(np.bincount(data.train.y) - 200 * left / 1137).max() < 1


@core
def test_parts_keep_the_stored_order():
    whole = load("digits", standardize=None)
    part = load("digits", subset=300, standardize=None)
    rows = [x.tobytes() for x in whole.train.x]
    places = [rows.index(x.tobytes()) for x in part.train.x]
    assert places == sorted(places)


# --------------------------------------------------------------------------------- standardization


AXES = {"global": None, "channel": (0, 1, 2), "pixel": 0}


@core
@pytest.mark.parametrize("how", AXES)
def test_statistics_are_those_of_the_training_images_alone(how, tmp_path):
    path = tmp_path / "cifar10.npz"
    arrays = write_arrays(path, train=1400, shape=(32, 32, 3))
    # 1,100 training images are more than one chunk.
    raw = load("cifar10", data_dir=path, validation=100, subset=1100, standardize=None)
    data = load("cifar10", data_dir=path, validation=100, subset=1100, standardize=how)
    train = raw.train.x.astype(np.float64) / 255
    mean, std = train.mean(axis=AXES[how]), train.std(axis=AXES[how])
    np.testing.assert_allclose(data.mean, mean, rtol=1e-11)
    np.testing.assert_allclose(data.std, std, rtol=1e-11)
    assert data.mean.shape == data.std.shape == mean.shape
    test = arrays["x_test"] / 255
    np.testing.assert_allclose(data.test.x, (test - mean) / std, rtol=1e-6, atol=1e-6)
    held_out = (raw.validation.x.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(data.validation.x, held_out, rtol=1e-6, atol=1e-6)


@core
@pytest.mark.parametrize("how", AXES)
def test_constant_pixels_become_zero(how, tmp_path):
    x = np.full((40, 28, 28), 77, np.uint8)
    x_test = x[:20].copy()
    x_test[0, 0, 0] = 78
    write_arrays(tmp_path / "m.npz", train=40, x_train=x, x_test=x_test)
    data = load("mnist", data_dir=tmp_path / "m.npz", standardize=how)
    assert not data.train.x.any()
    assert (data.std == 1).all()
    assert data.test.x[0, 0, 0, 0] == np.float32(1 / 255)
    enlarged = load("mnist", data_dir=tmp_path / "m.npz", standardize=how, image_size=31)
    np.testing.assert_allclose(enlarged.train.x, 0, atol=1e-6)  # rounding is no variance


@core
def test_a_single_deviating_pixel_is_variance(tmp_path):
    x = np.full((2000, 28, 28), 200, np.uint8)
    x[7, 3, 4] = 201
    write_arrays(tmp_path / "m.npz", train=2000, x_train=x)
    data = load("mnist", data_dir=tmp_path / "m.npz", standardize="pixel")
    share = 1 / 2000
    assert data.std[3, 4, 0] == pytest.approx(np.sqrt(share * (1 - share)) / 255, rel=1e-10)
    one_pixel = share / 784
    data = load("mnist", data_dir=tmp_path / "m.npz", standardize="global")
    assert data.std == pytest.approx(np.sqrt(one_pixel * (1 - one_pixel)) / 255, rel=1e-10)


@core
def test_unit_none_and_own_values(tmp_path):
    arrays = write_arrays(tmp_path / "m.npz")
    pixels = arrays["x_train"][..., None]
    options = {"data_dir": tmp_path / "m.npz"}
    raw = load("mnist", standardize=None, **options)
    np.testing.assert_array_equal(raw.train.x, pixels)
    unit = load("mnist", standardize="unit", **options)
    np.testing.assert_array_equal(unit.train.x, (pixels / 255).astype(np.float32))
    own = load("mnist", standardize=(0.5, 0.5), **options)
    np.testing.assert_allclose(own.train.x, 2 * (pixels / 255) - 1, atol=1e-7)
    assert (float(own.mean), float(own.std)) == (0.5, 0.5)
    of_shape = load("mnist", standardize=(np.zeros((28, 28, 1)), [2.0]), **options)
    np.testing.assert_allclose(of_shape.train.x, pixels / 510, atol=1e-7)


@core
@pytest.mark.parametrize("how", ["global", "channel", "pixel", "unit", None, (0.1, 0.3)])
def test_standardize_and_unstandardize_are_inverse(how):
    data = load("digits", standardize=how)
    unit = load("digits", standardize="unit", dtype="float64").test.x
    np.testing.assert_allclose(data.unstandardize(data.test.x), unit, atol=1e-6)
    np.testing.assert_allclose(data.standardize(unit), data.test.x, rtol=1e-6, atol=1e-6)
    assert data.standardize(unit).dtype == np.float32


@core
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype(dtype):
    data = load("digits", dtype=dtype, validation=10)
    exact = load("digits", dtype="float64", validation=10)
    assert data.train.x.dtype == data.validation.x.dtype == data.test.x.dtype == dtype
    np.testing.assert_allclose(data.test.x, exact.test.x, rtol=np.finfo(dtype).eps)


# ---------------------------------------------------------------------------------------- resizing


@core
def test_nearest_repeats_pixels():
    small = load("digits", standardize=None)
    large = load("digits", standardize=None, image_size=16, resize="nearest")
    np.testing.assert_array_equal(large.test.x, small.test.x.repeat(2, axis=1).repeat(2, axis=2))
    odd = load("digits", standardize=None, image_size=(12, 8), resize="nearest").test.x
    rows = [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]  # floor((i + ½)·8/12)
    np.testing.assert_array_equal(odd, small.test.x[:, rows])


@core
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras reads a PyTorch tensor
@pytest.mark.parametrize("size", [(28, 28), (11, 30), (8, 16), (5, 5)])
def test_bilinear_is_that_of_keras(size):
    small = load("digits", standardize=None).test.x
    data = load("digits", standardize=None, image_size=size)
    expected = keras.ops.image.resize(small, size, interpolation="bilinear", antialias=False)
    np.testing.assert_allclose(
        data.test.x, keras.ops.convert_to_numpy(expected), rtol=1e-5, atol=1e-3
    )
    assert data.input_shape == (*size, 1)


@core
def test_statistics_are_those_of_the_resized_images():
    data = load("digits", image_size=28, standardize="pixel")
    raw = load("digits", image_size=28, standardize=None, dtype="float64").train.x / 255
    np.testing.assert_allclose(data.mean, raw.mean(axis=0), rtol=1e-10, atol=1e-15)
    changing = raw.std(axis=0) > 1e-6
    np.testing.assert_allclose(data.std[changing], raw.std(axis=0)[changing], rtol=1e-10)
    np.testing.assert_allclose(data.train.x.std(axis=0)[changing], 1, rtol=1e-4)


# ----------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def digits():
    return load("digits", validation=100)


def labelled(count):
    """Images that carry their own number, to see where each one goes."""
    numbers = np.arange(count)
    return datasets.Split(numbers.astype(np.float32).reshape(-1, 1, 1, 1), numbers.astype(np.int32))


def numbers_of(batches):
    return [y.tolist() for _, y in batches]


@core
def test_each_epoch_is_another_permutation_of_everything():
    batches = labelled(103).batches(10, seed=5)
    assert len(batches) == batches.num_batches == 11
    epochs = []
    for _ in range(3):
        assert [len(y) for _, y in batches] == [10] * 10 + [3]
        assert all((x[:, 0, 0, 0] == y).all() for x, y in batches)
        epochs.append(np.concatenate(numbers_of(batches)).tolist())
        batches.on_epoch_end()
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert tuple(range(103)) not in {tuple(epoch) for epoch in epochs}


@core
def test_order_depends_on_seed_and_epoch_alone():
    first, again, other = (labelled(50).batches(8, seed=seed) for seed in (1, 1, 2))
    start = numbers_of(first)
    assert start == numbers_of(again) != numbers_of(other)
    np.random.seed(99)
    first.on_epoch_end()
    again.epoch = 1
    assert numbers_of(first) == numbers_of(again) != start
    first.epoch = 0
    assert numbers_of(first) == start


@core
def test_unshuffled_batches_keep_the_order():
    batches = labelled(10).batches(4, shuffle=False)
    assert numbers_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    batches.on_epoch_end()
    assert numbers_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@core
def test_drop_remainder_and_large_batches():
    assert [len(y) for _, y in labelled(10).batches(4, drop_remainder=True)] == [4, 4]
    assert [len(y) for _, y in labelled(8).batches(4, drop_remainder=True)] == [4, 4]
    assert [len(y) for _, y in labelled(10).batches(99)] == [10]
    with pytest.raises(ValueError, match="batch_size=11 for 10 images"):
        labelled(10).batches(11, drop_remainder=True)


@core
def test_batches_of_some_images_are_those_of_a_copy_of_them():
    data = load("digits")
    rows = np.random.default_rng(0).permutation(len(data.train))[:100]
    copy = datasets.Split(data.train.x[rows], data.train.y[rows])
    for shuffle in (True, False):
        options = {
            "shuffle": shuffle,
            "seed": 3,
            "augment": lambda x, y, rng: (x + rng.random(), y),
        }
        ours = data.train.batches(32, indices=rows, **options)
        theirs = copy.batches(32, **options)
        assert len(ours) == len(theirs) == 4
        for _ in range(2):
            for (x, y), (x_copy, y_copy) in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(x, x_copy)
                np.testing.assert_array_equal(y, y_copy)
            ours.on_epoch_end()
            theirs.on_epoch_end()
    x, y = data.train.batches(32, indices=rows, augment=datasets.FlipAndShift(1))[3]
    assert (len(x), len(y)) == (4, 4)
    for wrong, message in (
        ([0, len(data.train)], "from 0 to 1437"),
        ([-1], r"\[0, 1437\)"),
        ([True, False], "flatnonzero"),
        ([[1]], r"shape \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            data.train.batches(32, indices=wrong)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint64"])
def test_indices_of_any_integer_type_give_the_same_images(dtype):
    data = load("digits")
    wanted = np.arange(150, 250)
    batches = [
        data.train.batches(100, shuffle=False, indices=indices, augment=datasets.FlipAndShift(1))
        for indices in (wanted, wanted.astype(dtype))
    ]
    np.testing.assert_array_equal(batches[0][0][0], batches[1][0][0])
    with pytest.raises(ValueError, match="at least one image"):
        data.train.batches(100, indices=np.arange(0))


def test_wrong_batch_arguments():
    wrong = [
        ({"batch_size": 0}, "at least 1.*batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": 4, "seed": -1}, "seed=-1"),
        ({"batch_size": 4, "seed": None}, "seed=None"),
        ({"batch_size": 4, "augment": "flip"}, "augment='flip'"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            labelled(10).batches(**arguments)


@core
def test_batch_index_and_epoch_out_of_range():
    batches = labelled(10).batches(4)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"\[0, 3\).*index={index}"):
            batches[index]
    with pytest.raises(ValueError, match="epoch=-1"):
        batches.epoch = -1


def reflected_crop(image, down, right, flip):
    """By padding, as the text books have it; the function under test computes indices."""
    height, width = image.shape[:2]
    p = 3
    padded = np.pad(image, ((p, p), (p, p), (0, 0)), mode="reflect")
    crop = padded[p + down : p + down + height, p + right : p + right + width]
    return crop[:, ::-1] if flip else crop


def photographs(n=40):
    rng = np.random.default_rng(0)
    y = np.arange(n, dtype=np.int32)
    return datasets.Split(rng.normal(size=(n, 5, 6, 3)).astype("float32"), y)


def placed(split, batches):
    """(down, right, mirrored) of each image of an epoch, by its number; found by trial."""
    places = {}
    options = [(d, r, f) for d in range(-2, 3) for r in range(-2, 3) for f in (False, True)]
    for x, y in batches:
        for image, number in zip(x, y, strict=True):
            fits = [o for o in options if (reflected_crop(split.x[number], *o) == image).all()]
            assert len(fits) == 1
            places[int(number)] = fits[0]
    return places


@core
def test_alternating_flips_show_both_sides_in_two_epochs():
    split = photographs()
    batches = split.batches(16, augment=datasets.FlipAndShift(2))
    epochs = []
    for _ in range(3):
        epochs.append(placed(split, batches))
        batches.on_epoch_end()
    flips = [{n: f for n, (_, _, f) in places.items()} for places in epochs]
    assert len(flips[0]) == 40
    assert flips[0] == flips[2] == {n: not f for n, f in flips[1].items()}
    assert 8 < sum(flips[0].values()) < 32
    shifts = {places[n][:2] for places in epochs for n in places}
    assert len(shifts) > 20  # of 25
    assert [p[:2] for p in epochs[0].values()] != [p[:2] for p in epochs[2].values()]


@core
def test_flips_and_shifts_repeat_with_seed_and_epoch_alone():
    split = photographs()
    augment = datasets.FlipAndShift(1, flip="random")
    first, again = (split.batches(16, seed=4, augment=augment) for _ in "12")
    _ = [again[i] for i in (2, 0)]
    np.testing.assert_array_equal(first[1][0], again[1][0])
    first.epoch = again.epoch = 7
    np.testing.assert_array_equal(first[2][0], again[2][0])
    flips = [f for _, _, f in placed(split, first).values()]
    assert 8 < sum(flips) < 32


@core
def test_without_flips_and_shifts_images_stay():
    split = photographs()
    x, y = split.batches(40, shuffle=False, augment=datasets.FlipAndShift(0, flip="none"))[0]
    np.testing.assert_array_equal(x, split.x)
    np.testing.assert_array_equal(y, split.y)
    x[:] = 0
    assert split.x.any()


@core
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shift": -1}, "shift=-1"), ({"shift": 1.5}, "shift=1.5"), ({"flip": "both"}, "flip='both'")],
)
def test_flips_and_shifts_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.FlipAndShift(**arguments)
    with pytest.raises(ValueError, match="shift=5 for images of 5×6"):
        photographs().batches(4, augment=datasets.FlipAndShift(5))[0]


@core
def test_augment_repeats_with_the_seed_and_leaves_the_data_alone():
    def jitter(x, y, rng):
        x += rng.normal(size=x.shape)
        y += 1
        return x.astype(np.float64), y

    split = labelled(30)
    kept = split.x.copy(), split.y.copy()
    for shuffle in (True, False):
        first, again = (split.batches(8, seed=3, shuffle=shuffle, augment=jitter) for _ in "12")
        backwards = [again[i] for i in reversed(range(len(again)))][::-1]
        for (x, y), (x2, y2) in zip(first, backwards, strict=True):
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, x2)
            np.testing.assert_array_equal(y, y2)
            assert 0.1 < np.std(x[:, 0, 0, 0] - (y - 1)) < 3
        noise = [x[:, 0, 0, 0] - (y - 1) for x, y in first]
        first.on_epoch_end()
        later = [x[:, 0, 0, 0] - (y - 1) for x, y in first]
        assert not np.allclose(noise[0], noise[1], atol=1e-3)
        assert not np.allclose(noise[0], later[0], atol=1e-3)
    np.testing.assert_array_equal(split.x, kept[0])
    np.testing.assert_array_equal(split.y, kept[1])


@core
@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x, y, rng: x, "pair.*Received: ndarray"),
        (lambda x, y, rng: (x[:2], y), r"as many images as labels.*\(2, 1, 1, 1\).*\(4,\)"),
    ],
)
def test_augment_must_return_images_with_their_labels(augment, message):
    with pytest.raises(ValueError, match=message):
        labelled(10).batches(4, augment=augment)[0]


def small_model():
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


@core
@pytest.mark.slow_on_jax
def test_fit_learns_the_digits_and_repeats_itself(digits):
    histories = []
    for noise in (1, 2):
        model = small_model()
        np.random.seed(noise)
        batches = digits.train.batches(64, seed=1)
        held_out = digits.validation.batches(64, shuffle=False)
        history = model.fit(batches, epochs=2, validation_data=held_out, shuffle=False, verbose=0)
        assert batches.epoch == 3
        histories.append(history.history)
    assert histories[0]["loss"] == histories[1]["loss"]
    assert histories[0]["val_accuracy"][-1] > 0.8
    x, y = digits.test.x, digits.test.y
    by_batches = model.evaluate(digits.test.batches(64), verbose=0)
    np.testing.assert_allclose(by_batches, model.evaluate(x, y, verbose=0), rtol=1e-5)
    in_order = model.predict(digits.test.batches(64, shuffle=False), verbose=0)
    np.testing.assert_allclose(in_order, model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


@pytest.fixture
def seen_by_fit():
    """`seen_by_fit(batches, epochs, ...)` trains, and returns the numbers of each batch."""

    def fit(batches, epochs, **options):
        seen = []

        def note(x, y, rng):
            seen.append((batches.epoch, y.tolist()))
            return x, y

        batches.augment = note
        model = keras.Sequential([keras.Input((1, 1, 1)), keras.layers.Flatten()])
        model.add(keras.layers.Dense(1))
        model.compile("sgd", "mse")
        model.fit(batches, epochs=epochs, shuffle=False, verbose=0, **options)
        trained = sorted({epoch for epoch, _ in seen})[1:]  # before: a look at the shapes
        return {
            epoch: [y for e, y in seen if e == epoch][: len(batches)]
            for epoch in trained
            if epoch < batches.epoch  # TensorFlow reads ahead
        }

    return fit


@core
def test_fit_sees_every_image_once_per_epoch_in_a_new_order(seen_by_fit):
    seen = seen_by_fit(labelled(40).batches(16, seed=2), 3)
    assert list(seen) == [1, 2, 3]
    for epoch, numbers in seen.items():
        expected = labelled(40).batches(16, seed=2)
        expected.epoch = epoch
        assert numbers == numbers_of(expected)
        assert sorted(np.concatenate(numbers)) == list(range(40))


@core
def test_training_goes_on_in_the_order_that_would_have_followed(seen_by_fit):
    whole = seen_by_fit(labelled(40).batches(16, seed=2), 4)
    rest = labelled(40).batches(16, seed=2)
    rest.epoch = 2
    assert seen_by_fit(rest, 4, initial_epoch=2) == {epoch: whole[epoch] for epoch in (3, 4)}


@core
def test_workers_are_refused(digits):
    for attribute, value in (("workers", 3), ("use_multiprocessing", True)):
        batches = digits.train.batches(100)
        setattr(batches, attribute, value)
        with pytest.raises(ValueError, match=f"{attribute}={value}"):
            batches.on_epoch_begin()


# --------------------------------------------------------------------------------- wrong arguments


@core
def test_unknown_name():
    wrong = [
        ("fashionmnist", "name='fashionmnist'.*Did you mean 'fashion_mnist'"),
        ("Fashion-MNIST", "Did you mean 'fashion_mnist'"),
        ("CIFAR-10", "Did you mean 'cifar10'"),
        ("digit", "Did you mean 'digits'"),
        ("imagenet_resized", "one of 'fashion_mnist', 'mnist', 'cifar10', 'digits'"),
        (None, "name=None"),
    ]
    for name, message in wrong:
        for function in (load, load_or_digits):
            with pytest.raises(ValueError, match=message) as caught:
                function(name)
            assert not isinstance(caught.value, DataUnavailableError)


WRONG = [
    ({"validation": 1437}, "leave at least one.*validation=1437 of 1437"),
    ({"validation": -1}, "validation=-1"),
    ({"validation": 1.0}, r"\[0, 1\).*validation=1.0"),
    ({"validation": -0.1}, "validation=-0.1"),
    ({"validation": float("nan")}, "validation=nan"),
    ({"validation": 1e-9}, "validation=1e-09 of 1437"),
    ({"validation": True}, "validation=True"),
    ({"validation": "10%"}, "validation='10%'"),
    ({"subset": 0}, "subset=0"),
    ({"subset": 1438}, "1438 of 1437"),
    ({"subset": 1400, "validation": 100}, "1400 of 1337 after validation=100"),
    ({"subset": 0.5}, "subset=0.5"),
    ({"subset": {"test": 361}}, "361 of 360"),
    ({"subset": {"validation": 5}}, "5 of 0.*Set validation="),
    ({"subset": {"Train": 5}}, "'train', 'validation' and 'test'.*'Train': 5"),
    ({"subset": {"train": -5}}, r"subset\['train'\]=-5"),
    ({"standardize": "z-score"}, "standardize='z-score'"),
    ({"standardize": (0.5, 0)}, r"standardize=\(0.5, 0\)"),
    ({"standardize": (float("nan"), 1)}, "nan"),
    ({"standardize": ("a", "b")}, "'a', 'b'"),
    ({"standardize": (0.5,)}, r"\(0.5,\)"),
    ({"standardize": ([0.5] * 3, 1.0)}, r"\(8, 8, 1\).*shape \(3,\)"),
    ({"image_size": 0}, "image_size=0"),
    ({"image_size": (28, 28, 1)}, r"image_size=\(28, 28, 1\)"),
    ({"image_size": (28, 2.5)}, r"image_size\[1\]=2.5"),
    ({"resize": "cubic"}, "resize='cubic'"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 1.5}, "seed=1.5"),
    ({"dtype": "uint8"}, "dtype='uint8'"),
    ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
]


@core
def test_wrong_arguments():
    for arguments, message in WRONG:
        with pytest.raises(ValueError, match=message):
            load("digits", **arguments)


@core
def test_wrong_arguments_are_seen_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(datasets, "_read", lambda *a: pytest.fail("read"))
    for arguments in ({"seed": -1}, {"subset": 0}, {"standardize": "z"}):
        for function in (load, load_or_digits):
            with pytest.raises(ValueError, match="Received"):
                function("mnist", **arguments)


# ---------------------------------------------------------------------------------- files of arrays


@core
def test_arrays_without_tensorflow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    arrays = write_arrays(tmp_path / "mnist.npz")
    data = load("mnist", data_dir=tmp_path / "mnist.npz", standardize=None)
    np.testing.assert_array_equal(data.test.x[..., 0], arrays["x_test"])
    np.testing.assert_array_equal(data.test.y, arrays["y_test"])
    assert data.variant == "arrays"
    assert "50 training and 20 test images of the published 60,000 and 10,000" in data.source
    assert str(tmp_path) not in data.source
    colour = write_arrays(tmp_path / "c.npz", shape=(32, 32, 3), y_train=np.zeros((50, 1), int))
    data = load("cifar10", data_dir=str(tmp_path / "c.npz"), standardize=None)
    np.testing.assert_array_equal(data.train.x, colour["x_train"])
    assert data.train.y.shape == (50,)
    assert data.class_names[3] == "cat"


@core
def test_unfit_arrays(tmp_path):
    unfit = [
        ({"x_train": np.zeros((0, 28, 28), np.uint8), "y_train": np.zeros(0, int)}, "0 images"),
        ({"y_test": np.zeros(19, int)}, "20 images, 19 labels"),
        ({"x_train": np.zeros((50, 32, 32, 3), np.uint8)}, r"\(28, 28, 1\).*\(32, 32, 3\)"),
        ({"y_train": np.full(50, 10)}, r"\[0, 10\).*labels from 10 to 10"),
        ({"y_test": np.full(20, -1)}, "labels from -1 to -1"),
        ({"x_test": np.zeros((20, 28, 28))}, r"uint8.*float64"),
        ({"x_test": np.zeros((20, 784), np.uint8)}, r"\(20, 784\)"),
        ({"y_train": np.zeros(50)}, "y_train integers"),
    ]
    for changes, message in unfit:
        write_arrays(tmp_path / "mnist.npz", **changes)
        for function in (load, load_or_digits):  # damaged data is no absent data
            with pytest.raises(ValueError, match=message) as caught:
                function("mnist", data_dir=tmp_path / "mnist.npz")
            assert not isinstance(caught.value, DataUnavailableError)


@core
def test_unreadable_files(tmp_path):
    path = tmp_path / "mnist.npz"
    with pytest.raises(ValueError, match=r"existing folder or .npz file.*mnist\.npz.*pack"):
        load("mnist", data_dir=path)
    write_arrays(path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"damaged, short.*mnist\.npz.*again"):
        load("mnist", data_dir=path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"\['images'\].*train_bytes"):
        load("mnist", data_dir=path)
    np.savez(path, x_train=np.zeros((5, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="y_train"):
        load("mnist", data_dir=path)


PNG = np.frombuffer(b"\x89PNG\r\n\x1a\n" + bytes(30), np.uint8)


def write_packed(path, **changes):
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_bytes"] = PNG
        arrays[f"{part}_ends"] = np.array([len(PNG)])
        arrays[f"{part}_labels"] = np.array([3])
    np.savez(path, **(arrays | changes))


@core
def test_packed_images_need_pillow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    write_packed(tmp_path / "mnist.npz")
    with pytest.raises(DataUnavailableError, match=r"needs Pillow.*pip install pillow"):
        load("mnist", data_dir=tmp_path / "mnist.npz")


@core
def test_packed_images_of_another_kind(tmp_path):
    write_packed(tmp_path / "mnist.npz", train_bytes=np.frombuffer(b"GIF89a........", np.uint8))
    with pytest.raises(ValueError, match=r"PNG or JPEG.*GIF89a"):
        load("mnist", data_dir=tmp_path / "mnist.npz")


def test_damaged_packed_images(tmp_path):
    pytest.importorskip("PIL")
    path = tmp_path / "mnist.npz"
    write_packed(path)
    with pytest.raises(ValueError, match=r"could not be read.*mnist\.npz"):
        load("mnist", data_dir=path)
    write_packed(path, train_labels=np.array([3, 4]))
    with pytest.raises(ValueError, match="2 labels for 1 images"):
        load("mnist", data_dir=path)
    write_packed(path, train_ends=np.array([10]))
    with pytest.raises(ValueError, match="1 labels for 1 images, and 38 bytes"):
        load("mnist", data_dir=path)


@pytest.mark.parametrize(
    ("labels", "received"),
    [
        (np.array(["3"]), r"<U1 \(1,\)"),
        (np.array([3.5]), r"float64 \(1,\)"),
        (np.array([np.nan]), r"float64 \(1,\)"),
        (np.array([True]), r"bool \(1,\)"),
        (np.eye(10, dtype=int)[:1], r"int64 \(1, 10\)"),
        (np.array([[3]]), r"int64 \(1, 1\)"),
        (np.array(3), r"int64 \(\)"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_packed_labels_that_are_no_class_numbers(tmp_path, part, labels, received):
    """NumPy would cut fractions off, and take rows of numbers as they are."""
    image = pytest.importorskip("PIL.Image")
    png = io.BytesIO()
    image.new("L", (28, 28)).save(png, "PNG")
    bytes_of = {f"{p}_bytes": np.frombuffer(png.getvalue(), np.uint8) for p in ("train", "test")}
    ends = {f"{p}_ends": np.array([len(png.getvalue())]) for p in ("train", "test")}
    path = tmp_path / "mnist.npz"
    write_packed(path, **bytes_of, **ends)
    assert load("mnist", data_dir=path).test.y.tolist() == [3]
    write_packed(path, **bytes_of, **ends, **{f"{part}_labels": labels})
    with pytest.raises(ValueError, match=f"{part}_labels must be integers.*not {received}"):
        load("mnist", data_dir=path)


# ---------------------------------------------------------------------------- where data is sought


def pretend_prepared(root, name="mnist", version="3.0.1", info=True):
    folder = root / name / version
    folder.mkdir(parents=True)
    if info:
        (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """`chosen(...)` loads, and returns the folder that would have been read, and its phrase."""

    def load_and_tell(**options):
        found = []

        def read(spec, folder, origin):
            found.append((folder, origin))
            arrays = write_arrays(tmp_path / "found.npz")
            images = {key: arrays[key][..., None] for key in ("x_train", "x_test")}
            labels = {key: arrays[key] for key in ("y_train", "y_test")}
            return datasets._Raw(**images, **labels, source=origin, variant="original")

        monkeypatch.setattr(datasets, "_read_prepared", read)
        load("mnist", download=False, **options)
        return found[0]

    return load_and_tell


@core
def test_order_of_the_search(chosen, monkeypatch, tmp_path):
    default = pretend_prepared(Path("~/tensorflow_datasets").expanduser())
    assert chosen() == (default, "the default of tensorflow-datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    assert chosen()[0] == default
    by_variable = pretend_prepared(tmp_path / "env")
    assert chosen() == (by_variable, "the folder named by TFDS_DATA_DIR")
    given = pretend_prepared(tmp_path / "given")
    assert chosen(data_dir=tmp_path / "given") == (given, "the folder given as data_dir")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataUnavailableError, match=str(tmp_path / "empty" / "mnist")) as caught:
        chosen(data_dir=tmp_path / "empty")
    assert str(tmp_path / "env") not in str(caught.value)  # a given folder is the only one


@core
def test_newest_complete_version(chosen, tmp_path):
    for version in ("3.0.2", "3.0.10", "1.99.0"):
        pretend_prepared(tmp_path, version=version)
    pretend_prepared(tmp_path, version="4.0.0", info=False)  # interrupted
    pretend_prepared(tmp_path, version="incomplete.X1_5.0.0")
    assert chosen(data_dir=tmp_path)[0].name == "3.0.10"


@core
def test_no_download_lists_the_folders_and_makes_none(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    with pytest.raises(DataUnavailableError) as caught:
        load("cifar10", download=False)
    message = str(caught.value)
    assert (
        f"{tmp_path / 'env' / 'cifar10'} (the folder named by TFDS_DATA_DIR, which does" in message
    )
    assert str(Path("~/tensorflow_datasets/cifar10").expanduser()) in message
    for remedy in ("download=True", "data_dir or TFDS_DATA_DIR", "load('digits')"):
        assert remedy in message
    assert not (tmp_path / "env").exists()
    assert not Path("~/tensorflow_datasets").expanduser().exists()


@core
def test_missing_data_dir_is_a_wrong_argument(tmp_path):
    for function in (load, load_or_digits):
        with pytest.raises(ValueError, match=r"existing folder.*data_dir='.*typo'") as caught:
            function("mnist", data_dir=tmp_path / "typo")
        assert not isinstance(caught.value, DataUnavailableError)
    assert not (tmp_path / "typo").exists()


@core
def test_without_tensorflow_the_error_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    pretend_prepared(tmp_path)
    with pytest.raises(DataUnavailableError) as caught:
        load("mnist", data_dir=tmp_path)
    message = str(caught.value)
    for words in ("needs tensorflow-datasets", "pip install", "pack(", "load('digits')"):
        assert words in message


@core
def test_a_folder_that_may_not_be_entered_is_passed_over(monkeypatch, capsys):
    """Path.exists and Path.is_dir raise there."""

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("TFDS_DATA_DIR", "/forbidden/data")
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    for name in ("exists", "is_dir"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(DataUnavailableError, match="/forbidden/data/mnist"):
        load("mnist")
    assert load_or_digits("mnist").fallback


@core
def test_no_writable_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    with pytest.raises(DataUnavailableError, match=f"no folder here can be written.*{tmp_path}"):
        load("mnist", data_dir=tmp_path)


# ---------------------------------------------------------------------------------------- download


class FakeTfds(types.SimpleNamespace):
    """Stands in for tensorflow-datasets: `prepare(root, scratch)` is its download_and_prepare."""

    def __init__(self, prepare, urls=()):
        builder = types.SimpleNamespace
        super().__init__(
            builder_cls=lambda name: builder(url_infos=dict.fromkeys(urls)),
            builder=lambda name, data_dir: builder(
                download_and_prepare=lambda download_dir, download_config: prepare(
                    Path(data_dir), Path(download_dir)
                )
            ),
            download=builder(DownloadConfig=lambda **options: options),
        )


@pytest.fixture
def fake_tfds(monkeypatch):
    def install(prepare, urls=()):
        fake = FakeTfds(prepare, urls)
        monkeypatch.setattr(datasets, "_import_tfds", lambda spec: fake)

    return install


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@core
def test_download_prepares_where_it_is_sought_first(fake_tfds, monkeypatch, tmp_path):
    def prepare(root, scratch):
        (scratch / "archive.gz").write_text("…")
        pretend_prepared(root)

    fake_tfds(prepare)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    spec = datasets._SPECS["mnist"]
    folder, origin = datasets._prepared(spec, None, download=True)
    assert folder == tmp_path / "env/mnist/3.0.1"
    assert origin == "the folder named by TFDS_DATA_DIR"
    assert tree(tmp_path) == [
        "env",
        "env/mnist",
        "env/mnist/3.0.1",
        "env/mnist/3.0.1/dataset_info.json",
    ]
    fake_tfds(lambda root, scratch: pytest.fail("downloaded twice"))
    assert datasets._prepared(spec, None, download=True)[0] == folder


@core
@pytest.mark.parametrize("error", [OSError("No space left on device\nat all"), KeyboardInterrupt()])
def test_failed_download_leaves_everything_as_it_was(error, fake_tfds, monkeypatch, tmp_path):
    def prepare(root, scratch):
        (scratch / "mnist.gz.tmp").write_text("half")
        (root / "mnist").mkdir()
        raise error

    fake_tfds(prepare)
    (tmp_path / "given").mkdir()
    (tmp_path / "given/other").write_text("stays")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "one/below/the/other"))
    for options in ({}, {"data_dir": tmp_path / "given"}):
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                load("mnist", **options)
        else:
            with pytest.raises(
                DataUnavailableError, match=r"could not be downloaded.*No space left"
            ):
                load("mnist", **options)
    assert tree(tmp_path) == ["given", "given/other"]


@core
def test_download_that_another_process_finished_first(fake_tfds, tmp_path):
    def prepare(root, scratch):
        pretend_prepared(root)
        raise OSError("Directory not empty")

    fake_tfds(prepare)
    folder, _ = datasets._prepared(datasets._SPECS["mnist"], tmp_path, download=True)
    assert folder == tmp_path / "mnist/3.0.1"


@core
def test_download_that_prepares_nothing(fake_tfds, tmp_path):
    fake_tfds(lambda root, scratch: None)
    with pytest.raises(DataUnavailableError, match="nothing prepared"):
        load("mnist", data_dir=tmp_path)


@core
def test_without_network_no_download_is_begun(fake_tfds, no_network, tmp_path):
    fake_tfds(lambda *a: pytest.fail("begun"), urls=["https://example.invalid/mnist.gz"])
    with pytest.raises(DataUnavailableError) as caught:
        load("mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert "Name or service not known" in message
    assert str(tmp_path / "mnist") in message
    assert "load('digits')" in message
    assert tree(tmp_path) == []


@contextlib.contextmanager
def server(handle):
    """A local web server; `handle(method, path)` returns status and body of each answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            status, body = handle(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = answer  # noqa: N815

        def log_message(self, *args):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}"
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


@core
@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (503, False)])
def test_probe_asks_each_server_once(status, reachable):
    asked = []

    def handle(method, path):
        asked.append((method, path))
        return status, b""

    with server(handle) as address:
        urls = [f"{address}/images.gz", f"{address}/labels.gz"]
        if reachable:
            datasets._probe(urls)
        else:
            with pytest.raises(OSError, match="503"):
                datasets._probe(urls)
    assert asked == [("HEAD", "/labels.gz")]


@core
def test_probe_of_a_closed_port():
    with server(lambda method, path: (200, b"")) as address:
        pass
    with pytest.raises(OSError, match="refused"):
        datasets._probe([f"{address}/images.gz"])


# ---------------------------------------------------------------------------------- digits instead


@core
def test_digits_stand_in_loudly(capsys, tmp_path):
    data = load_or_digits("fashion_mnist", data_dir=tmp_path, download=False, validation=6000)
    message = capsys.readouterr().err
    assert "FASHION-MNIST IS NOT AVAILABLE: RUNNING ON THE EMBEDDED DIGITS INSTEAD" in message
    assert str(tmp_path) in message.replace("\n| ", "")
    assert "1,293 training, 144 validation and 360 test images" in message
    assert all(len(line) <= 96 for line in message.splitlines())
    assert data.fallback
    assert data.stands_in_for == "Fashion-MNIST"
    assert data.title == "digits (in place of Fashion-MNIST)"
    assert data.name == "digits"
    assert data.class_names == tuple("0123456789")
    assert data.input_shape == (28, 28, 1)
    same = load("digits", validation=144, image_size=28)
    np.testing.assert_array_equal(data.train.x, same.train.x)
    np.testing.assert_array_equal(data.validation.y, same.validation.y)


@core
def test_stand_in_takes_the_shape_and_the_options(capsys, tmp_path):
    options = {"data_dir": tmp_path, "download": False, "standardize": "channel", "seed": 3}
    data = load_or_digits("cifar10", subset={"train": 4000, "test": 100}, **options)
    assert data.input_shape == (32, 32, 3)
    assert (len(data.train), len(data.test)) == (1437, 100)
    assert data.mean.shape == (3,)
    np.testing.assert_array_equal(data.train.x[..., 0], data.train.x[..., 2])
    same = load("digits", image_size=32, standardize="channel", seed=3, subset={"test": 100})
    np.testing.assert_array_equal(data.test.x[..., :1], same.test.x)
    small = load_or_digits("cifar10", image_size=(16, 8), validation=1, **options)
    assert small.input_shape == (16, 8, 3)
    assert len(small.validation) == 1
    raw = load_or_digits("mnist", **(options | {"standardize": None}))
    assert raw.train.x.max() == 255


@core
def test_stand_in_refuses_what_the_data_set_would_refuse(capsys, tmp_path):
    options = {"data_dir": tmp_path, "download": False}
    with pytest.raises(ValueError, match="leave at least one"):
        load_or_digits("mnist", validation=60_000, **options)
    with pytest.raises(ValueError, match="Set validation="):
        load_or_digits("mnist", subset={"validation": 10}, **options)
    with pytest.raises(TypeError, match="subsets"):
        load_or_digits("mnist", subsets=10, **options)
    assert capsys.readouterr().err == ""


@core
def test_no_stand_in_when_the_data_is_there(capsys, tmp_path):
    write_arrays(tmp_path / "mnist.npz")
    data = load_or_digits("mnist", data_dir=tmp_path / "mnist.npz")
    assert (data.name, data.fallback) == ("mnist", False)
    assert load_or_digits("digits").fallback is False
    assert capsys.readouterr().err == ""


# ----------------------------------------------------- prepared data, read by tensorflow-datasets


def write_prepared(root, name, shape, train=23, test=9, encoding="png", promise=None):
    """A data set as tensorflow-datasets lays it out; returns its images and labels."""
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("tensorflow_datasets")
    folder = root / name / "3.0.1"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    encode = {"png": tf.io.encode_png, "jpeg": tf.io.encode_jpeg}[encoding]
    arrays, splits = {}, []
    for part, count in (("train", train), ("test", test)):
        x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        y = rng.integers(0, 10, count)
        path = folder / f"{name}-{part}.tfrecord-00000-of-00001"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for image, label in zip(x, y, strict=True):
                blob = tf.train.BytesList(value=[encode(image).numpy()])
                number = tf.train.Int64List(value=[label])
                features = {
                    "image": tf.train.Feature(bytes_list=blob),
                    "label": tf.train.Feature(int64_list=number),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        promised = [str(promise or count)] if count else []
        splits.append(
            {
                "name": part,
                "filepathTemplate": template,
                "numBytes": str(path.stat().st_size),
                "shardLengths": promised,
            }
        )
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    core_features = "tensorflow_datasets.core.features"
    image = {
        "pythonClassName": f"{core_features}.image_feature.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": [str(n) for n in shape]}},
    }
    label = {
        "pythonClassName": f"{core_features}.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "10"},
    }
    features = {
        "pythonClassName": f"{core_features}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }
    info = {"name": name, "version": "3.0.1", "fileFormat": "tfrecord", "splits": splits}
    info["moduleName"] = f"tensorflow_datasets.image_classification.{name}"
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return arrays


def test_prepared_data_is_read_exactly(tmp_path):
    arrays = write_prepared(tmp_path, "mnist", (28, 28, 1), train=2500)  # several chunks
    data = load("mnist", data_dir=tmp_path, standardize=None, download=False)
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(data, part).x, arrays[f"x_{part}"])
        np.testing.assert_array_equal(getattr(data, part).y, arrays[f"y_{part}"])
    assert (data.variant, data.title) == ("original", "MNIST")
    assert "2,500 training" in data.source
    assert "the folder given as data_dir" in data.source


def test_jpeg_copy_is_named(monkeypatch, tmp_path):
    arrays = write_prepared(tmp_path, "cifar10", (32, 32, 3), encoding="jpeg")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data = load("cifar10", standardize=None)
    assert (data.variant, data.title) == ("JPEG copy", "CIFAR-10 (JPEG copy)")
    assert "as a JPEG copy" in data.source
    assert "TFDS_DATA_DIR" in data.source
    difference = np.abs(data.train.x - arrays["x_train"])
    assert 0 < difference.mean() < 60  # noise compresses badly, but it is the same noise
    write_prepared(tmp_path / "png", "cifar10", (32, 32, 3))
    assert load("cifar10", data_dir=tmp_path / "png").variant == "original"


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_packing_keeps_every_image(encoding, tmp_path):
    pytest.importorskip("PIL")
    write_prepared(tmp_path, "cifar10", (32, 32, 3), encoding=encoding)
    path = datasets.pack("cifar10", tmp_path / "cifar10.npz", data_dir=tmp_path)
    packed = load("cifar10", data_dir=path, standardize=None)
    direct = load("cifar10", data_dir=tmp_path, standardize=None)
    assert packed.variant == direct.variant
    tolerance = {"png": 0, "jpeg": 30}[encoding]  # two JPEG decoders, on noise
    for part in ("train", "test"):
        one, other = getattr(packed, part), getattr(direct, part)
        np.testing.assert_allclose(one.x, other.x, atol=tolerance)
        np.testing.assert_array_equal(one.y, other.y)
    assert tree(tmp_path / "cifar10") == tree(tmp_path / "cifar10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10", "cifar10.npz"]
    with pytest.raises(ValueError, match=r"must have the shape \(28, 28, 1\).*\(32, 32, 3\)"):
        load("mnist", data_dir=path)


def test_packing_into_a_folder_that_is_not_there(tmp_path):
    write_prepared(tmp_path / "data", "mnist", (28, 28, 1))
    path = tmp_path / "new" / "packed.npz"
    assert datasets.pack("mnist", path, data_dir=tmp_path / "data") == path
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(OSError, match=r"packed\.npz"):
        datasets.pack("mnist", path / "packed.npz", data_dir=tmp_path / "data")


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_packing_that_fails_keeps_the_old_file(monkeypatch, tmp_path):
    write_prepared(tmp_path, "mnist", (28, 28, 1))
    path = tmp_path / "mnist.npz"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        datasets.pack("mnist", path, data_dir=tmp_path)
    assert path.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mnist", "mnist.npz"]


@core
def test_wrong_packing(tmp_path):
    with pytest.raises(ValueError, match="need no packing"):
        datasets.pack("digits", tmp_path / "digits.npz")
    with pytest.raises(ValueError, match=r"end in .npz.*mnist\.zip"):
        datasets.pack("mnist", tmp_path / "mnist.zip")
    with pytest.raises(DataUnavailableError, match="not prepared here"):
        datasets.pack("mnist", tmp_path / "mnist.npz", data_dir=tmp_path, download=False)
    assert tree(tmp_path) == []


def test_damaged_prepared_data(tmp_path):
    write_prepared(tmp_path, "mnist", (28, 28, 1))
    path = tmp_path / "mnist/3.0.1/mnist-test.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"damaged, short.*mnist/3\.0\.1.*DataLoss.*again"):
        load("mnist", data_dir=tmp_path)
    path.unlink()
    for function in (load, load_or_digits):
        with pytest.raises(ValueError, match=r"damaged, short.*mnist/3\.0\.1") as caught:
            function("mnist", data_dir=tmp_path)
        assert not isinstance(caught.value, DataUnavailableError)


def test_short_and_empty_prepared_data(tmp_path):
    write_prepared(tmp_path / "short", "mnist", (28, 28, 1), promise=24)
    with pytest.raises(ValueError, match=r"could not be read.*24"):
        load("mnist", data_dir=tmp_path / "short")
    write_prepared(tmp_path / "empty", "mnist", (28, 28, 1), train=0)
    with pytest.raises(ValueError, match=r"could not be read.*empty/mnist/3\.0\.1"):
        load("mnist", data_dir=tmp_path / "empty")
    write_prepared(tmp_path / "other", "mnist", (32, 32, 3))
    with pytest.raises(ValueError, match=r"must have the shape \(28, 28, 1\).*\(32, 32, 3\)"):
        load("mnist", data_dir=tmp_path / "other")


def test_damaged_download_leaves_nothing_behind(monkeypatch, tmp_path):
    """A real download, through a proxy that answers every address with the wrong bytes."""
    pytest.importorskip("tensorflow_datasets")
    asked = []

    def handle(method, path):
        asked.append((method, path))
        return 200, b"not the archive"

    with server(handle) as address:
        monkeypatch.setenv("http_proxy", address)
        with pytest.raises(DataUnavailableError, match="Fashion-MNIST could not be downloaded"):
            load("fashion_mnist", data_dir=tmp_path)
    assert asked[0][0] == "HEAD"
    assert any(method == "GET" and path.endswith("-ubyte.gz") for method, path in asked)
    assert tree(tmp_path) == []


# ---------------------------------------------------------------------------------- the real data


@pytest.fixture(scope="module")
def real():
    loaded = {}

    def load_real(name):
        pytest.importorskip("tensorflow_datasets")
        if not REAL or datasets._newest_version(Path(REAL) / name) is None:
            pytest.skip(f"TFDS_DATA_DIR names no folder that holds {name}")
        if name not in loaded:
            loaded.clear()
            loaded[name] = load(name, data_dir=REAL, standardize="channel", download=False)
        return loaded[name]

    return load_real


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("mnist", [0.1307], [0.3081]),
        ("fashion_mnist", [0.2860], [0.3530]),
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_data(name, mean, std, real):
    data = real(name)
    if data.variant == "JPEG copy":
        mean, std = [0.4868, 0.4822, 0.4414], [0.2451, 0.2425, 0.2605]
    np.testing.assert_allclose(data.mean, mean, atol=5.1e-5)
    np.testing.assert_allclose(data.std, std, atol=5.1e-5)
    count = 50_000 if name == "cifar10" else 60_000
    assert (len(data.train), len(data.test)) == (count, 10_000)
    assert "of the published" not in data.source
    per_class = np.bincount(data.train.y), np.bincount(data.test.y)
    if name == "mnist":
        assert per_class[0].tolist()[:2] == [5923, 6742]
        assert per_class[1].tolist()[:2] == [980, 1135]
    else:
        assert set(per_class[0]) == {count // 10}
        assert set(per_class[1]) == {1000}
    np.testing.assert_allclose(data.train.x.mean(axis=(0, 1, 2), dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(data.train.x.std(axis=(0, 1, 2), dtype=np.float64), 1, atol=1e-6)

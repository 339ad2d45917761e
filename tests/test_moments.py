"""Moments: against NumPy in float64, exact merging, standard errors against their own spread."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_norm.moments import Moments, example_sums

pytestmark = pytest.mark.core


def assert_same(a, b, rtol=1e-10):
    """All that two Moments hold, relative to the size of each quantity."""
    for name in ("count", "mean", "m2", "examples"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, err_msg=name)
    for name in ("standard_error_of_mean", "standard_error_of_variance"):
        np.testing.assert_allclose(getattr(a, name)(), getattr(b, name)(), rtol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((50, 4), -1),
        ((50, 4), 1),
        ((20, 3, 5), 1),
        ((9, 4, 5, 3), -1),
        ((9, 3, 4, 5), 1),
        ((9, 4, 5, 3), (1, 3)),
        ((9, 4, 2, 3, 2), 2),
        ((7, 4), (0, 1)),
        ((6,), -1),
    ],
)
def test_numpys_moments(shape, axis):
    x = np.random.default_rng(1).normal(3, 2, shape)
    m = Moments(axis).update(x)
    channels = (axis,) if isinstance(axis, int) else axis
    reduced = tuple(i for i in range(len(shape)) if i not in [c % len(shape) for c in channels])
    np.testing.assert_allclose(m.mean, x.mean(axis=reduced), rtol=1e-12)
    np.testing.assert_allclose(m.variance(), x.var(axis=reduced), rtol=1e-12, atol=1e-25)
    n = np.prod([shape[i] for i in reduced], dtype=int)
    np.testing.assert_array_equal(m.count, np.full(m.mean.shape, n))
    if n > 1:
        unbiased = m.variance(unbiased=True)
        np.testing.assert_allclose(unbiased, x.var(axis=reduced, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64, 999])
def test_batches_do_not_matter(size):
    x = np.random.default_rng(2).normal([1000.0, -5.0, 0.0], [1.0, 3.0, 0.01], (999, 4, 3))
    whole, parts = Moments().update(x), Moments()
    for i in range(0, len(x), size):
        parts.update(x[i : i + size])
    assert_same(parts, whole)
    np.testing.assert_allclose(whole.variance(), x.var(axis=(0, 1)), rtol=1e-12)


def test_mean_1000_and_variance_1():
    x = np.random.default_rng(3).normal(1000, 1, 1_000_000)[:, None]
    m = Moments()
    for part in np.split(x, 1000):
        m.update(part)
    assert abs(m.variance()[0] / x.var() - 1) < 1e-12
    m32 = Moments().update(x.astype("float32"))
    assert abs(m32.variance()[0] / x.astype("float32").astype("float64").var() - 1) < 1e-12


def test_blocks_of_a_large_batch(monkeypatch):
    x = np.random.default_rng(4).normal(size=(100, 5, 3))
    w = np.random.default_rng(5).uniform(size=(100, 5, 1))
    whole = Moments().update(x, weights=w)
    monkeypatch.setattr("keras_norm.moments._BLOCK", 64)
    assert_same(Moments().update(x, weights=w), whole)


@pytest.mark.parametrize("form", ["keras", "full", "example"])
def test_a_mask_is_a_subset(form):
    rng = np.random.default_rng(6)
    x = rng.normal(5, 2, (30, 6, 3))
    keep = rng.uniform(size=(30, 6)) < 0.5
    if form == "example":
        keep[:] = keep[:, :1]
    x[~keep] = np.nan  # what does not count may be anything
    mask = {"keras": keep, "full": keep[..., None] & np.ones(3, bool), "example": keep[:, 0]}[form]
    m = Moments().update(x, mask=mask)
    np.testing.assert_allclose(m.mean, x[keep].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(m.variance(), x[keep].var(axis=0), rtol=1e-12)
    assert m.examples[0] == keep.any(axis=1).sum()


def test_weights_are_repetitions():
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(40, 2)), rng.integers(0, 4, 40)
    weighted, repeated = Moments().update(x, weights=w), Moments().update(np.repeat(x, w, axis=0))
    for name in ("count", "mean", "m2"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-12)
    np.testing.assert_allclose(
        weighted.variance(unbiased=True), repeated.variance(unbiased=True), rtol=1e-12
    )
    both = Moments().update(x, weights=w, mask=np.arange(40) < 20)
    assert_same(both, Moments().update(x[:20], weights=w[:20]))


def test_a_mask_of_a_single_channel():
    x = np.arange(12.0).reshape(4, 3)
    mask = np.ones((4, 3), bool)
    mask[:, 1] = False
    m = Moments().update(x, mask=mask)
    np.testing.assert_array_equal(m.count, [4, 0, 4])
    assert np.isnan(m.variance()[1])
    m.update(x)
    np.testing.assert_allclose(m.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(m.variance(), x.var(axis=0), rtol=1e-12)


def test_merging():
    x = np.random.default_rng(8).normal(100, 1, (90, 3))
    a, b, c = (Moments().update(part) for part in np.split(x, [10, 40]))
    before = a.copy()
    assert_same((a + b) + c, Moments().update(x))
    assert_same(a + (b + c), Moments().update(x))
    assert_same(c + a + b, Moments().update(x))
    assert_same(a, before, rtol=0)  # + makes a new one
    assert_same(Moments() + a, a)
    assert_same(a + Moments(), a)
    assert Moments().empty
    assert not a.empty


def test_two_processes_make_one(tmp_path):
    program = (
        "import json, sys, numpy as np\n"
        "from keras_norm.moments import Moments\n"
        "m = Moments()\n"
        "for x in np.array_split(np.load(sys.argv[1])[1::2], 7): m.update(x)\n"
        "print(json.dumps(m.to_dict()))\n"
    )
    x = np.random.default_rng(9).normal(1000, 1, (201, 3, 4))
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", program, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    other = Moments.from_dict(json.loads(done.stdout))
    assert_same(Moments().update(x[::2]) + other, Moments().update(x), rtol=1e-10)


def test_dict_keeps_every_bit():
    m = Moments((1, 2)).update(np.random.default_rng(10).normal(size=(9, 4, 3)))
    back = Moments.from_dict(json.loads(json.dumps(m.to_dict())))
    assert back.axis == m.axis
    assert_same(back, m, rtol=0)
    np.testing.assert_array_equal(back._gram, m._gram)
    with pytest.raises(ValueError, match="format='other'"):
        Moments.from_dict({**m.to_dict(), "format": "other"})


def test_standard_errors_of_single_elements():
    x = np.random.default_rng(11).exponential(size=(5000, 1)) + 1000
    m = Moments().update(x)
    np.testing.assert_allclose(m.standard_error_of_mean(), x.std(ddof=1) / np.sqrt(len(x)))
    fourth = np.mean((x - x.mean()) ** 4)
    expected = np.sqrt((fourth - x.var() ** 2) / (len(x) - 1))
    np.testing.assert_allclose(m.standard_error_of_variance(), expected, rtol=1e-9)
    normal = x.var() * np.sqrt(2 / len(x))
    assert m.standard_error_of_variance()[0] > 1.7 * normal  # heavy tails: sqrt(8 / 2) in the limit


def test_standard_errors_are_the_spread_of_the_estimates():
    """Images whose pixels go together, of unequal sizes: the spread over 400 repetitions."""
    rng = np.random.default_rng(12)
    means, variances, errors = [], [], []
    for _ in range(400):
        x = rng.normal(size=(200, 1, 1)) + 0.5 * rng.normal(size=(200, 16, 1))
        mask = np.arange(16) < rng.integers(1, 17, (200, 1))
        m = Moments().update(x, mask=mask)
        means.append(m.mean[0])
        variances.append(m.variance()[0])
        errors.append((m.standard_error_of_mean()[0], m.standard_error_of_variance()[0]))
    error_of_mean, error_of_variance = np.mean(errors, axis=0)
    assert error_of_mean == pytest.approx(np.std(means), rel=0.1)
    assert error_of_variance == pytest.approx(np.std(variances), rel=0.1)
    naive = np.sqrt(np.mean(variances) / (200 * 8.5))
    assert error_of_mean > 2 * naive


def test_one_example_says_nothing_of_the_spread():
    m = Moments().update(np.ones((1, 5, 2)))
    assert np.isinf(m.standard_error_of_mean()).all()
    assert np.isinf(m.standard_error_of_variance()).all()


def test_what_is_refused_changes_nothing():
    m = Moments().update(np.arange(6.0).reshape(3, 2))
    before = m.to_dict()
    bad = np.array([[1.0, np.nan], [2.0, 3.0]])
    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 2 channels"):
        m.update(bad)
    with pytest.raises(ValueError, match="smallest value -1"):
        m.update(np.ones((2, 2)), weights=[1, -1])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        m.update(np.ones((2, 2)), weights=np.ones(3))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        m.update(np.ones((2, 3)))
    with pytest.raises(ValueError, match="axis=-1 and axis=1"):
        m.merge(Moments(1))
    with pytest.raises(ValueError, match="axis=3"):
        Moments(3).update(np.ones((2, 3)))
    assert m.to_dict() == before


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 3), -1), ((8, 5, 4, 3), -1), ((8, 3, 4), 1), ((8, 3, 4), (1, 2)), ((4, 2), (0, 1))],
)
def test_example_sums_are_an_update(shape, axis, weighted):
    rng = np.random.default_rng(13)
    x = rng.normal(7, 2, shape)
    w = rng.integers(0, 3, (shape[0], *[1] * (len(shape) - 1))) if weighted else None
    sums = example_sums(ops.convert_to_tensor(x, "float64"), axis=axis, weights=w)
    m = Moments(axis).update_from_sums(*sums)
    assert_same(m, Moments(axis).update(x, weights=w))


def test_example_sums_in_float32():
    x = np.random.default_rng(14).normal(1000, 1, (500, 16, 16, 3)).astype("float32")
    m = Moments()
    for part in np.split(x, 10):
        m.update_from_sums(*example_sums(ops.convert_to_tensor(part)))
    exact = x.astype("float64")
    np.testing.assert_allclose(m.mean, exact.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(m.variance(), exact.var(axis=(0, 1, 2)), rtol=1e-6)


def test_example_sums_of_half_precision_and_infinite_values_without_weight():
    x = np.full((4, 100, 2), 300.0)
    x[:, ::2] += 1
    m = Moments().update_from_sums(*example_sums(ops.cast(x, "float16")))
    np.testing.assert_allclose(m.variance(), [0.25, 0.25], rtol=1e-6)
    x[0] = np.inf
    w = np.array([0.0, 1, 1, 1]).reshape(4, 1, 1)
    m = Moments().update_from_sums(*example_sums(ops.cast(x, "float32"), weights=w))
    np.testing.assert_allclose(m.variance(), [0.25, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(m.examples, [3, 3])


def test_tensors_are_taken():
    x = np.random.default_rng(15).normal(size=(6, 2)).astype("float32")
    assert_same(Moments().update(keras.ops.convert_to_tensor(x)), Moments().update(x))
    assert repr(Moments().update(x)) == "Moments(axis=-1, channels=(2,), count=6, examples=6)"

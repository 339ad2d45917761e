"""Moments: against NumPy in float64, exact merging, standard errors against their own spread."""

import json

import forked
import keras
import numpy as np
import pytest
from keras import ops

from keras_norm.moments import Covariance, Moments, Quantiles, example_sums

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
    (tmp_path / "script.py").write_text(program)
    done = forked.run(tmp_path / "script.py", tmp_path / "x.npy")
    assert done.returncode == 0, done.stderr
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


def test_factors_that_scale_nothing():
    m = Moments().update(np.ones((2, 3)))
    for factor in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"must be > 0. Received: factor={factor}"):
            m.scaled(factor)


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


def test_example_sums_beside_an_outlier():
    """The shift is the mean of an eighth, and so within sqrt(7) sigma of the batch's."""
    x = np.random.default_rng(17).normal(size=(80, 4, 2)).astype("float32")
    x[0] += 1e4
    shift = ops.convert_to_numpy(example_sums(ops.convert_to_tensor(x))[0])
    distance = np.abs(shift - x.mean(axis=(0, 1)))
    assert (distance < np.sqrt(7) * x.std(axis=(0, 1))).all()


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


# Covariances --------------------------------------------------------------------------------------


def correlated(n, channels, seed=0, mean=1000.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, channels)) @ rng.normal(size=(channels, channels)) + mean


def numpys_covariance(rows, size, **options):
    return np.stack(
        [np.cov(rows[:, i : i + size].T, **options) for i in range(0, rows.shape[1], size)]
    )


@pytest.mark.parametrize(("axis", "size"), [(-1, None), (1, 2), (2, 3)])
def test_covariances_are_numpys(axis, size):
    rows = correlated(60, 6)
    x = np.moveaxis(rows.reshape(5, 4, 3, 6), -1, axis)
    m = Covariance(axis, size).update(x[:2]).update(x[2:])
    expected = numpys_covariance(rows, size or 6, bias=True)
    np.testing.assert_allclose(m.covariance(), expected, rtol=1e-10, atol=1e-10)
    unbiased = numpys_covariance(rows, size or 6)
    np.testing.assert_allclose(m.covariance(unbiased=True), unbiased, rtol=1e-10, atol=1e-10)
    assert_same(Moments(axis).update(x), m)
    diagonal = np.diagonal(m.covariance(), axis1=1, axis2=2).ravel()
    np.testing.assert_allclose(diagonal, m.variance(), rtol=1e-12)


def test_covariances_with_weights():
    rng = np.random.default_rng(1)
    x, w = correlated(40, 4), rng.integers(0, 3, 40)
    m = Covariance(group_size=2).update(np.where(w[:, None] > 0, x, np.nan), weights=w)
    expected = numpys_covariance(x, 2, fweights=w, bias=True)
    np.testing.assert_allclose(m.covariance(), expected, rtol=1e-10)
    half = m.scaled(0.5)
    np.testing.assert_allclose(half.covariance(), expected, rtol=1e-10)
    np.testing.assert_allclose(half.count, w.sum() / 2)
    both = Covariance(group_size=2).update(x[:10], mask=w[:10] > 0, weights=w[:10])
    both.update(x[10:], weights=w[10:])
    np.testing.assert_allclose(both.covariance(), expected, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_covariances_of_any_batches_in_any_order(size):
    x = correlated(150, 4)
    whole = Covariance().update(x)
    parts = Covariance()
    order = np.argsort(x[:, 0])
    for i in range(0, len(x), size):
        parts.update(x[order[i : i + size]])
    np.testing.assert_allclose(parts.comoment, whole.comoment, rtol=1e-10, atol=1e-8)


def test_two_halves_make_one_covariance():
    """By way of JSON, as from another process: 1e-10, and empty ones change nothing."""
    x = correlated(201, 5)
    whole = Covariance().update(x)
    other = json.loads(json.dumps(Covariance().update(x[1::2]).to_dict()))
    halves = Covariance().update(x[::2]) + Covariance.from_dict(other)
    np.testing.assert_allclose(halves.covariance(), whole.covariance(), rtol=1e-10, atol=1e-10)
    assert_same(halves, whole)
    empty = Covariance.from_dict(Covariance().to_dict())
    for sum_ in (empty + whole, whole + empty):
        np.testing.assert_array_equal(sum_.comoment, whole.comoment)
    assert Covariance().empty


def test_no_covariances_of_no_data():
    for empty in (Covariance(), Covariance(group_size=2), Covariance().merge(Covariance())):
        for unbiased in (False, True):
            assert empty.covariance(unbiased=unbiased).shape == ()
            assert np.isnan(empty.covariance(unbiased=unbiased))
    one = Covariance().update(np.ones((1, 3)))
    assert np.isnan(one.covariance(unbiased=True)).all()
    assert Covariance.from_dict(Covariance(group_size=np.int64(2)).to_dict()).group_size == 2


def test_an_axis_of_numpy_is_kept_as_json_has_it():
    for axis, kept in ((np.int64(1), 1), ((np.int64(0), 1), [0, 1]), (np.arange(2), [0, 1])):
        assert json.loads(json.dumps(Moments(axis).to_dict()))["axis"] == kept


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_sizes_of_groups_that_are_none(size):
    with pytest.raises(ValueError, match=f"None for all of them. Received: group_size={size!r}"):
        Covariance(group_size=size)


def test_covariances_refuse():
    m = Covariance(group_size=2).update(correlated(9, 4))
    before = m.to_dict()
    with pytest.raises(ValueError, match="group_size=2, channels=5"):
        Covariance(group_size=2).update(correlated(9, 5))
    with pytest.raises(ValueError, match="group_size=2 and group_size=None"):
        m.merge(Covariance().update(correlated(9, 4)))
    with pytest.raises(ValueError, match="Covariance and Moments"):
        m.merge(Moments().update(correlated(9, 4)))
    with pytest.raises(ValueError, match="the same for all channels"):
        m.update(correlated(9, 4), weights=np.ones((9, 4)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        m.update(np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match="Use `update`"):
        m.update_from_sums(0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"Received: format='keras_norm\.moments/1'"):
        Covariance.from_dict(Moments().to_dict())
    assert m.to_dict() == before


# Quantiles ----------------------------------------------------------------------------------------

LEVELS = (np.arange(16) + 0.5) / 16


@pytest.mark.parametrize("axis", [-1, 1])
def test_quantiles_are_exact_up_to_the_capacity(axis):
    rows = np.random.default_rng(0).standard_cauchy((240, 3))
    x = np.moveaxis(rows.reshape(10, 6, 4, 3), -1, axis)
    q = Quantiles(axis, capacity=240).update(x[:3]).update(x[3:])
    expected = np.quantile(rows, LEVELS, axis=0, method="hazen")
    np.testing.assert_allclose(q.quantile(LEVELS), expected, rtol=1e-12)
    np.testing.assert_allclose(q.quantile(0.0), rows.min(axis=0))
    assert q.rank_error == 0
    assert_same(Moments(axis).update(x), q)


def ranks_of(rows, values):
    """How far the ranks of a quantile's value are from its level: 0 if the level is between."""
    errors = []
    for p, v in zip(LEVELS, values, strict=True):
        low, high = (rows < v).mean(axis=0), (rows <= v).mean(axis=0)
        errors.append(np.maximum(np.maximum(low - p, p - high), 0).max())
    return max(errors)


ORDERS = {
    "random": lambda x: x,
    "ascending": np.sort,
    "descending": lambda x: -np.sort(-x),
    "inwards": lambda x: np.sort(x)[np.argsort(np.r_[0 : len(x) : 2, 1 : len(x) : 2])],
    "few values": lambda x: np.round(x),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "capacity"), [(20_000, 64), (9_999, 1_000), (5_003, 2)])
def test_rank_errors_are_within_their_bound(order, n, capacity):
    x = ORDERS[order](np.random.default_rng(1).normal(size=n))
    rows = np.stack([x, -x], axis=1)
    q = Quantiles(capacity=capacity)
    for part in np.array_split(rows, 37):
        q.update(part)
    top = np.ceil(np.log2(n / capacity))
    assert 0 < q.rank_error <= (top / 2 + 1) / capacity
    assert ranks_of(rows, q.quantile(LEVELS)) <= q.rank_error + 0.5 / n
    items, weights = q._held
    assert weights.sum() == n  # nothing is lost
    assert len(items) <= capacity * (top + 1)


def test_merged_quantiles():
    """Parts of a sorted whole, merged pairwise: as JSON, and within the sum of their bounds."""
    x = np.sort(np.random.default_rng(2).exponential(size=(16_000, 2)), axis=0)
    parts = [Quantiles(capacity=256).update(part) for part in np.split(x, 8)]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [a + Quantiles.from_dict(json.loads(json.dumps(b.to_dict()))) for a, b in pairs]
    (q,) = parts
    assert_same(q, Moments().update(x))
    assert q.rank_error < 0.03
    assert ranks_of(x, q.quantile(LEVELS)) <= q.rank_error + 0.5 / len(x)
    half = Quantiles(capacity=16_000).update(x[1::2])
    exact = Quantiles.from_dict(half.to_dict()) + Quantiles(capacity=16_000).update(x[::2])
    np.testing.assert_allclose(
        exact.quantile(LEVELS), np.quantile(x, LEVELS, axis=0, method="hazen"), rtol=1e-10
    )
    copied = q.copy().update(x)
    assert copied.count[0] == 2 * q.count[0]
    assert q._held[1].sum() == 16_000


def test_bounds_of_copies_and_of_what_is_merged():
    """Six elements with a capacity of four: one compaction, whose partner is still to come."""
    x = np.arange(12.0)[:, None]
    a, b = Quantiles(capacity=4).update(x[:6]), Quantiles(capacity=4).update(x[6:])
    assert a.rank_error == b.rank_error == 1 / 6
    assert (a + b).rank_error == 2 / 12  # none of the two has met its partner
    half = a.scaled(0.5)
    assert half.rank_error == half.scaled(0.5).rank_error == 1 / 6
    before = a.to_dict()
    a.copy().update(x)
    assert a.to_dict() == before


def test_quantiles_under_a_mask():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 6, 3))
    keep = rng.uniform(size=(30, 6)) < 0.5
    x[~keep] = np.inf
    q = Quantiles().update(x, mask=keep)
    expected = np.quantile(x[keep], LEVELS, axis=0, method="hazen")
    np.testing.assert_allclose(q.quantile(LEVELS), expected, rtol=1e-12)
    assert np.isnan(Quantiles().update(x, mask=np.zeros(30, bool)).quantile(0.5)).all()


def test_float32_is_held_as_it_is():
    x = np.random.default_rng(4).normal(size=(50, 2)).astype("float32")
    q = Quantiles().update(x).update(ops.cast(x, "bfloat16"))
    assert q._held[0].dtype == np.float32
    assert Quantiles().update(x.astype("float64"))._held[0].dtype == np.float64
    whole = np.array([[2**25 + 1], [2**25 + 3]], "int32")  # float32 holds every fourth there
    np.testing.assert_array_equal(Quantiles().update(whole).quantile([0.0, 1.0]), whole)


def test_a_capacity_of_numpy():
    q = Quantiles(capacity=np.int64(4)).update(np.arange(6.0).reshape(3, 2))
    assert Quantiles.from_dict(json.loads(json.dumps(q.to_dict()))).to_dict() == q.to_dict()


def test_quantiles_refuse():
    q = Quantiles(capacity=4).update(np.arange(6.0).reshape(3, 2))
    before = q.to_dict()
    for capacity in (0, 3, 4.0, True):
        with pytest.raises(ValueError, match="`capacity` is a number of elements"):
            Quantiles(capacity=capacity)
    with pytest.raises(ValueError, match="Ranks have no weights"):
        q.update(np.ones((2, 2)), weights=[1, 2])
    with pytest.raises(ValueError, match=r"capacity=4, scale=1.0 and capacity=8"):
        q.merge(Quantiles(capacity=8).update(np.ones((2, 2))))
    with pytest.raises(ValueError, match=r"scale=1.0 and capacity=4, scale=0.5"):
        q.merge(q.scaled(0.5))
    with pytest.raises(ValueError, match=r"levels=1\.5"):
        q.quantile(1.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        q.update(np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match="Use `update`"):
        q.update_from_sums(0, 0, 0, 0)
    assert q.to_dict() == before
    np.testing.assert_array_equal(q.scaled(0.5).quantile(LEVELS), q.quantile(LEVELS))

"""Statistics of decorrelated batch and quantile normalization: exact, undone, reported."""

import json
import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_norm import _kinds, _layerwise, _layerwise_program, statistics
from keras_norm.layers import BatchNormalization
from keras_norm.research import DecorrelatedBatchNormalization, QuantileNormalization
from keras_norm.statistics import (
    DomainStatistics,
    Report,
    RunningAdaptation,
    adapt,
    diagnose,
    diff,
    reestimate,
    restore,
    snapshot,
)

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
COSTLY_ON_JAX = pytest.mark.skipif(BACKEND == "jax", reason="compiles much; no other code on JAX")
K = 6
LEVELS = (np.arange(K) + 0.5) / K


def host(x):
    return np.array(ops.convert_to_numpy(x), copy=True)


def images():
    """One of each kind in a row, the first in the middle of a nested model; a mask-free path."""
    inputs = keras.Input((4, 4, 3))
    inner = keras.Sequential(
        [
            layers.Conv2D(4, 3, padding="same"),
            DecorrelatedBatchNormalization(group_size=2, name="white"),
            layers.ReLU(),
        ],
        name="inner",
    )
    x = layers.Conv2D(4, 1)(inner(inputs))
    x = layers.ReLU()(QuantileNormalization(quantiles=K, name="ranks")(x))
    x = BatchNormalization(name="plain")(layers.Conv2D(4, 1)(x))
    x = layers.Dropout(0.5)(x)
    x = DecorrelatedBatchNormalization(method="cholesky", name="top")(layers.Conv2D(4, 1)(x))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


MADE = {}


def model_of(build):
    """Made once and put back, so that what is compiled stays compiled."""
    if build not in MADE:
        keras.utils.set_random_seed(0)
        model = build()
        rng = np.random.default_rng(0)
        for layer in statistics._normalizations(model).values():
            layer.gamma.assign(rng.uniform(0.5, 2, layer.gamma.shape))
        MADE[build] = model, [(v, host(v)) for v in model.variables]
    model, values = MADE[build]
    for variable, value in values:
        variable.assign(value)
    return model


def example_data(n, seed=0, shape=(4, 4, 3)):
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(n, *shape)) @ rng.normal(size=(3, 3))
    return (2 * x + 5).astype("float32")


def inputs_of(model, x, names):
    """name -> the inputs of a layer as rows of channels, float64, from plain eager calls."""
    found = {}
    known = {y.name: y for y in statistics._normalizations(model).values()}

    def handler(layer, call, inputs, *args, **kwargs):
        value = host(inputs).astype("float64")
        mask = kwargs.get("mask")
        value = value.reshape(-1, value.shape[-1]) if mask is None else value[host(mask)]
        found.setdefault(layer.name, []).append(value)
        return call(inputs, *args, **kwargs)

    with _layerwise_program.intercepted([known[n] for n in names], handler):
        model(x, training=False)
    return {name: np.concatenate(values) for name, values in found.items()}


def assert_exact(layer, rows, tolerance=1e-5):
    """The layer's statistics are those of NumPy in float64, to 1e-5 sigma."""
    sigma = np.sqrt(rows.var(axis=0) + 1e-3)
    if isinstance(layer, QuantileNormalization):
        expected = np.quantile(rows, LEVELS, axis=0, method="hazen")
        assert np.max(np.abs(host(layer.moving_quantiles) - expected) / sigma) < tolerance
        return
    assert np.max(np.abs(host(layer.moving_mean) - rows.mean(axis=0)) / sigma) < tolerance
    if isinstance(layer, BatchNormalization):
        assert np.max(np.abs(host(layer.moving_variance) / sigma**2 - rows.var(0) / sigma**2)) < (
            tolerance
        )
        return
    size = layer.moving_covariance.shape[-1]
    for g, covariance in enumerate(host(layer.moving_covariance)):
        block = slice(g * size, (g + 1) * size)
        wrong = covariance - np.cov(rows[:, block].T, bias=True)
        assert np.max(np.abs(wrong) / np.outer(sigma[block], sigma[block])) < tolerance


def assert_all_exact(model, x, tolerance=1e-5):
    known = {y.name: y for y in statistics._normalizations(model).values()}
    rows = inputs_of(model, x, known)
    assert set(rows) == set(known)
    for name, layer in known.items():
        assert_exact(layer, rows[name], tolerance)


def bits(model):
    return [host(v).tobytes() for v in model.variables]


# Re-estimation -----------------------------------------------------------------------------------


def test_layerwise_is_exact():
    """In whatever batches and order: padded ones, unequal last ones, sorted, from memory or not."""
    model, x = model_of(images), example_data(70)
    weights = [host(v) for v in model.trainable_variables]
    report = reestimate(model, x, batch_size=32)
    assert_all_exact(model, x)
    assert [y.name for y in report.updated] == ["inner/white", "ranks", "plain", "top"]
    assert all(y.examples == 70 for y in report.updated)
    assert report["ranks"].rank_error == 0
    first = snapshot(model)
    order = np.argsort(x.reshape(70, -1)[:, 0])
    # On JAX batches of another size would all be compiled anew.
    reestimate(model, x[order], batch_size=32 if BACKEND == "jax" else 23, memory=0, disk=0)
    assert diff(first, model).largest_shift < 1e-5
    for v, w in zip(model.trainable_variables, weights, strict=True):
        np.testing.assert_array_equal(host(v), w)


@pytest.mark.slow_on_jax
def test_one_pass():
    """Exact in the first layer, and of one batch in all; else it states its error."""
    model, x = model_of(images), example_data(96)
    if BACKEND != "jax":
        report = reestimate(model, x, method="one_pass", batch_size=96)
        assert_all_exact(model, x, 1e-4)
        assert max(y.leak for y in report.updated) < 1e-3
    report = reestimate(model, x, method="one_pass", batch_size=12)
    rows = inputs_of(model, x, ["white"])
    assert_exact(model.get_layer("inner").get_layer("white"), rows["white"])
    approximate = snapshot(model)
    reestimate(model, x)
    exact = diff(approximate, model)
    for name in ("ranks", "top"):
        assert report[name].leak > 1e-3
        assert 1 / 6 < report[name].leak / exact[name].distance < 6


def masked():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(20, 4, mask_zero=True)(inputs)
    x = DecorrelatedBatchNormalization(group_size=2, name="a")(x)
    x = QuantileNormalization(quantiles=K, name="b")(layers.Dense(3, activation="relu")(x))
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x))


def test_masks_count():
    model = model_of(masked)
    tokens = np.random.default_rng(0).integers(1, 20, (30, 7))
    tokens[np.arange(7) >= np.random.default_rng(1).integers(1, 8, (30, 1))] = 0
    tokens[3] = 0
    report = reestimate(model, tokens, batch_size=8)
    assert_all_exact(model, tokens)
    assert report["a"].elements[0] == np.count_nonzero(tokens)
    assert report["b"].examples == 29


def shared():
    """Layers that feed themselves: their statistics are defined by themselves."""
    white = DecorrelatedBatchNormalization(group_size=3, name="white", epsilon=0.1)
    ranks = QuantileNormalization(quantiles=K, name="ranks", epsilon=0.1)
    dense = layers.Dense(3)
    x = inputs = keras.Input((3,))
    for _ in range(2):
        x = x + ranks(dense(white(x)))
    return keras.Model(inputs, x)


@COSTLY_ON_JAX
def test_shared_layers_reproduce_their_statistics():
    model = model_of(shared)
    x = example_data(60, shape=(3,))
    report = reestimate(model, x, batch_size=32)
    assert all(y.uses == 2 for y in report.updated)
    assert max(y.residual for y in report.updated) < 1e-5
    assert_all_exact(model, x, 1e-4)


def test_more_elements_than_are_held(monkeypatch):
    """Then the ranks are right to the error that the report states."""
    monkeypatch.setattr(_kinds, "_HELD", 0)  # 4096 elements of each channel, the least
    model = keras.Sequential([keras.Input((3,)), QuantileNormalization(quantiles=K, name="ranks")])
    x = np.sort(example_data(20_000, shape=(3,)), axis=0)
    report = reestimate(model, x, samples=None, batch_size=6000)
    part = report["ranks"]
    assert 0 < part.rank_error < 5 / 4096
    assert "rank error" in str(report)
    for c in range(3):
        at = np.searchsorted(x[:, c], host(model.layers[0].moving_quantiles)[:, c]) / len(x)
        assert np.max(np.abs(at - LEVELS)) <= part.rank_error + 1 / len(x)


def test_tolerance_and_selection():
    model, x = model_of(images), example_data(1200)
    before = snapshot(model)
    report = reestimate(model, x, tolerance=0.1, layers=["white", "ranks"], samples=None)
    assert report.error <= 0.1
    assert report.samples < 1200
    assert {y.name: y.status for y in report.layers}["top"] == "not selected"
    moved = {y.name for y in diff(before, model).layers if y.distance > 1e-3}
    assert moved == {"inner/white", "ranks"}


# Undone -------------------------------------------------------------------------------------------


@pytest.mark.slow_on_jax
def test_failures_leave_everything_as_it_was(monkeypatch):
    model, x = model_of(images), example_data(40)
    before = bits(model)
    nan = x.copy()
    nan[33, 0, 0, 0] = np.nan
    for method in ("layerwise", "one_pass"):
        with pytest.raises(ValueError, match="NaN or infinite values in the inputs of layer"):
            reestimate(model, nan, method=method, batch_size=16)
        assert bits(model) == before
    assign, calls = _layerwise.set_statistics, [0]
    for fail_at in range(1, 5):
        calls[0] = 0

        def interrupted(layer, values, fail_at=fail_at):
            calls[0] += 1
            assign(layer, values)
            if calls[0] == fail_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(_layerwise, "set_statistics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reestimate(model, x, batch_size=16)
        assert bits(model) == before


def test_snapshots():
    """Of all statistics, bit by bit; those of other groups are refused."""
    model, x = model_of(images), example_data(40)
    before, first = snapshot(model), bits(model)
    assert set(before.statistics["inner/white"]) == {"moving_mean", "moving_covariance"}
    reestimate(model, x)
    assert bits(model) != first
    restore(model, before)
    assert bits(model) == first
    # A correlation alone is a difference, though means and variances are the same.
    covariance = host(model.get_layer("top").moving_covariance)
    covariance[0, 0, 1] = covariance[0, 1, 0] = 0.5
    model.get_layer("top").moving_covariance.assign(covariance)
    change = diff(before, model)
    # Half of C^-1 - I, for two of four channels: sqrt((1/3)^2 + (2/3)^2) / 2 / sqrt(2).
    assert change["top"].distance == pytest.approx(5**0.5 / 3 / 8**0.5, rel=0.01)
    assert change.largest_shift == change["top"].distance
    assert change["ranks"].distance == 0
    other = keras.Sequential([keras.Input((4,)), DecorrelatedBatchNormalization(name="top")])
    with pytest.raises(ValueError, match="same batch normalization layers"):
        restore(other, before)


def test_report_round_trip(tmp_path):
    model, x = model_of(images), example_data(40)
    old = snapshot(model)
    report = reestimate(model, x, batch_size=16)
    part = report["top"]
    covariance = host(model.get_layer("top").moving_covariance)
    np.testing.assert_allclose(part.new["moving_covariance"], covariance)
    np.testing.assert_array_equal(part.old["moving_mean"], old.statistics["top"]["moving_mean"])
    assert report["ranks"].new["moving_quantiles"].shape == (K, 4)
    np.testing.assert_allclose(
        np.diagonal(part.new["moving_covariance"][0]), part.variance, rtol=1e-6
    )
    loaded = Report.load(report.save(tmp_path / "report.json"))
    assert json.dumps(loaded.to_dict()) == json.dumps(report.to_dict())
    assert loaded["ranks"].distance == pytest.approx(report["ranks"].distance)
    assert not report["plain"].new  # means and variances say it all


# Adaptation ---------------------------------------------------------------------------------------


def one_of_each():
    return keras.Sequential(
        [
            keras.Input((3,)),
            DecorrelatedBatchNormalization(name="white"),
            layers.Dense(4),
            QuantileNormalization(quantiles=K, name="ranks"),
            layers.Dense(2),
        ]
    )


def test_adaptation_blends_covariances_and_quantiles():
    model = model_of(one_of_each)
    source, target = example_data(200, shape=(3,)), 3 * example_data(100, 1, shape=(3,)) - 4
    reestimate(model, source)
    old = snapshot(model)
    assert diff(old, model).largest_shift == 0
    adapt(model, target, prior=300)
    found = snapshot(model)
    wide = target.astype("float64")
    share = 100 / 400
    expected = 0.75 * old.values("white")[1] + share * np.cov(wide.T, bias=True)
    np.testing.assert_allclose(found.values("white")[1][0], expected[0], rtol=1e-4)
    rows = inputs_of(model, target, ["ranks"])["ranks"]
    quantiles = np.quantile(rows, LEVELS, axis=0, method="hazen")
    blended = 0.75 * old.values("ranks")[0] + share * quantiles
    np.testing.assert_allclose(found.values("ranks")[0], blended, rtol=1e-4, atol=1e-4)
    domains = DomainStatistics(model)
    domains.adapt("other", source)
    with domains.domain("other"):
        assert diff(domains["source"], model)["white"].distance > 0.3
    assert diff(found, model).largest_shift == 0


def test_streams():
    """Covariances forget; quantiles cannot, and say so."""
    model = model_of(one_of_each)
    parts = np.split(example_data(120, shape=(3,)), 3)
    with pytest.raises(ValueError, match=r"half_life=1024.0 for \['ranks'\]"):
        RunningAdaptation(model)
    with RunningAdaptation(model, prior=1e-9, half_life=math.inf) as stream:
        for part in parts:
            stream.update(part)
        assert_exact(model.get_layer("white"), np.concatenate(parts).astype("float64"), 1e-4)
    with RunningAdaptation(model, prior=1e-9, half_life=40, layers=["white"]) as stream:
        for part in parts:
            stream.update(part)
        weights = np.repeat(0.5 ** np.arange(2, -1, -1), 40)
        expected = np.cov(np.concatenate(parts).T.astype("float64"), aweights=weights, bias=True)
        found = host(model.get_layer("white").moving_covariance)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


# Diagnosis ----------------------------------------------------------------------------------------


@COSTLY_ON_JAX
def test_diagnosis_finds_cold_and_stale_statistics():
    model = model_of(one_of_each)
    model.compile("sgd", "mse")
    x = example_data(128, shape=(3,))
    y = np.random.default_rng(0).normal(size=(128, 2)).astype("float32")
    before = bits(model)
    found = diagnose(model, (x, y))
    assert found.first == "cold statistics"
    assert {name for name, _ in found["cold statistics"].layers} == {"white", "ranks"}
    assert bits(model) == before
    reestimate(model, x)
    # Another correlation, with the same means and variances: nothing but the covariance tells.
    covariance = host(model.get_layer("white").moving_covariance)
    covariance[0] *= np.where(np.eye(3) > 0, 1, -0.9)
    model.get_layer("white").moving_covariance.assign(covariance)
    found = diagnose(model, (x, y))
    assert "white" in [name for name, _ in found["domain shift"].layers]
    assert found["domain shift"].evidence.startswith("white: its statistics are")

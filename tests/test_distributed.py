"""Two replicas with a part of the batch each against one device with the whole batch."""

from pathlib import Path

import forked
import keras
import numpy as np
import pytest
from keras import ops
from reference import relative_error
from replicas import CASES, RESEARCH, data, layer_for, mean_100, state

from keras_norm import distributed
from keras_norm._gradients import gradients

# One group: the results, which take half a minute, are computed in one process only.
pytestmark = [pytest.mark.core, pytest.mark.slow, pytest.mark.xdist_group("replicas")]

BACKEND = keras.backend.backend()
TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="a strategy of TensorFlow")
# On JAX the function sees the whole batch: always synchronized, in equal parts.
SYNCHRONIZED = [name for name in CASES if "unsynchronized" not in name]
MOVING = "moving_mean", "moving_variance", "skipped"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("replicas") / "results.npz"
    done = forked.run(Path(__file__).with_name("replicas.py"), path, KERAS_BACKEND=BACKEND)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = {}
    for name, value in np.load(path).items():
        case, array = name.split("/")
        cases.setdefault(case, {})[array] = value
    return cases


def on_one_device(dtype, mask, arguments, *cls, part=slice(None)):
    x, mix, given = (None if v is None else v[part] for v in data(dtype, mask))
    layer = layer_for(dtype, arguments, *cls)
    _, slopes = gradients(
        lambda x: ops.sum(layer(x, training=True, mask=given) * ops.convert_to_tensor(mix)),
        [x],
        variables=layer.trainable_variables,
    )
    y = layer(x, training=True, mask=given)
    arrays = dict(zip(("y", "dx", "dgamma", "dbeta"), [y, *slopes], strict=True))
    return {name: ops.convert_to_numpy(v) for name, v in arrays.items()} | state(layer)


@pytest.mark.parametrize("name", SYNCHRONIZED)
def test_as_one_device(results, name):
    dtype, mask, arguments, _ = CASES[name]
    expected = on_one_device(dtype, mask, arguments)
    assert set(expected) == set(results[name])
    for array, value in expected.items():
        error = relative_error(results[name][array], value)
        assert error < {"float64": 1e-9, "float32": 1e-5}[dtype], array


@pytest.mark.parametrize("name", [name for name in CASES if "unsynchronized" in name])
def test_unsynchronized_replicas_pool_their_moving_statistics(results, name):
    dtype, mask, arguments, first = CASES[name]
    whole = on_one_device(dtype, mask, arguments)
    for array in (*MOVING, "moving_count") if "average" in name else MOVING:
        assert relative_error(results[name][array], whole[array]) < 1e-9, array
    if BACKEND == "jax":
        return
    x, _, given = data(dtype, mask)
    for part in (slice(0, first), slice(first, None)):  # each normalizes by its own statistics
        local = layer_for(dtype, arguments)
        y = local(x[part], training=True, mask=None if given is None else given[part])
        assert relative_error(results[name]["y"][part], ops.convert_to_numpy(y)) < 1e-9


@pytest.mark.parametrize("name", RESEARCH)
def test_research_layers(results, name):
    """Replicas whiten, or rank, by their own batches; their moving statistics are those of all.

    Of quantiles that is the mean of theirs, by counts. On JAX all see the whole batch.
    """
    *case, first, cls = RESEARCH[name]
    found, whole = results[name], on_one_device(*case, cls)
    assert set(found) == set(whole)
    if BACKEND == "jax":
        expected = whole
    else:
        both = slice(0, first), slice(first, None)
        parts = [on_one_device(*case, cls, part=part) for part in both]
        expected = {a: np.concatenate([p[a] for p in parts]) for a in ("y", "dx")}
        expected |= {a: parts[0][a] + parts[1][a] for a in ("dgamma", "dbeta")}
        expected |= {a: whole[a] for a in whole if a not in expected}
        if name == "quantile":
            counts = [data(*case[:2])[2][part].sum() for part in both]
            moved = [p["moving_quantiles"] for p in parts]
            expected["moving_quantiles"] = np.average(moved, axis=0, weights=counts)
    for array, value in expected.items():
        assert relative_error(found[array], value) < 1e-9, array


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no distributed fit on PyTorch")
def test_fit(results):
    one, two = results["fit on one"], results["fit on two"]
    assert len(one) == len(two) == 15
    for name, weight in one.items():
        assert relative_error(two[name], weight) < 1e-9, name


def test_one_replica():
    assert distributed.replicas() == 1
    assert float(ops.convert_to_numpy(distributed.all_sum(ops.ones(())))) == 1


# What the built-in layer does -----------------------------------------------------------------


@TENSORFLOW
def test_mean_100_standard_deviation_a_hundredth(results):
    """Keras computes E[x^2] - E[x]^2: of a variance of 1e-4 beside 1e4 float32 leaves nothing."""
    variance = mean_100()[0].astype("float64").var((0, 1))
    expected = np.sqrt(variance / (variance + 1e-3)) * [1.5, 0.5]
    cases = "mean 100", "builtin mean 100"
    y = {name: results[name]["y"].astype("float64").std((0, 1)) for name in cases}
    np.testing.assert_allclose(y["mean 100"], expected, rtol=1e-3)
    assert (np.abs(y["builtin mean 100"] / expected - 1) > 0.04).all()


@TENSORFLOW
def test_builtin_ignores_synchronized_with_a_mask(results):
    whole = on_one_device("float64", "some", {"synchronized": True})
    assert relative_error(results["masked float64"]["y"], whole["y"]) < 1e-9
    assert relative_error(results["builtin masked"]["y"], whole["y"]) > 0.01


@TENSORFLOW
def test_builtin_keeps_the_moving_statistics_of_the_first_replica(results):
    x, *_ = data("float64", None)
    moved = results["builtin unsynchronized"]["moving_mean"]
    np.testing.assert_allclose(moved, 0.1 * x[:4].mean((0, 1)), rtol=1e-9)

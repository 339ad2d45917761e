"""What every test and doctest needs, on every backend."""

import gc
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")  # the gradient checks are in float64
os.environ.setdefault("MPLBACKEND", "agg")
if os.environ.get("KERAS_BACKEND") == "jax":  # most of the time goes into compiling small things
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
import pytest

# Modules whose doctests need more than the core's dependencies.
NOT_CORE = {"plotting", "tuning", "cli"}
# Examples that train nets take JAX long to compile: the other two run them.
SLOW_ON_JAX = {
    "InsideMonitor",
    "train_together",
    "TestTimeAugmentation",
    "judge",
    "EvaluateTogether",
    "WideMLP",
    "MLP",
    "QuantileNormalization",
    "diagnose",
    "covariate_shift",
    "distributions",
    "AverageWeights",
    "CNN",
}


def pytest_collection_modifyitems(items):
    """Doctests of the package belong to the core tests, but for those of `NOT_CORE`.

    Slow tests come first: in several processes, none is left alone with one at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        of_package = isinstance(item, pytest.DoctestItem) and item.path.suffix == ".py"
        if of_package and item.path.stem not in NOT_CORE:
            item.add_marker("core")
            if item.name.rpartition(".")[2] in SLOW_ON_JAX:
                item.add_marker("slow_on_jax")


def pytest_collection_finish(session):
    spread = getattr(session.config.option, "loadgroup", False)
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if spread and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist does not keep groups together with this pytest")
    gc.collect()
    gc.freeze()  # what has been imported need not be looked through again


SECONDS_BETWEEN_COLLECTIONS = 20


@pytest.fixture(autouse=True, scope="session")
def collected():
    """When garbage was last collected."""
    return [time.monotonic()]


@pytest.fixture(autouse=True)
def little_garbage(collected):
    """Models are full of reference cycles; with one goes the iterator over its data.

    TensorFlow can wait for an iterator as long as it has lived, up to a minute: its thread may
    miss the call to end. So none grows old.
    """
    yield
    if keras.backend.backend() != "tensorflow":
        return
    if time.monotonic() - collected[0] > SECONDS_BETWEEN_COLLECTIONS:
        gc.collect()
        gc.freeze()  # what is left, caches and modules, mostly stays: not looked through again
        collected[0] = time.monotonic()


@pytest.fixture(autouse=True)
def same_start(doctest_namespace):
    """Each test starts from the same state, in whatever order they run."""
    doctest_namespace["np"] = np
    keras.utils.set_random_seed(0)
    floats, policy = keras.config.floatx(), keras.config.dtype_policy()
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    keras.config.set_floatx(floats)
    keras.config.set_dtype_policy(policy)

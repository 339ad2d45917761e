"""What every test and doctest needs, on every backend."""

import os
import sys

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


def pytest_collection_modifyitems(items):
    """Doctests of the package belong to the core tests, but for those of `NOT_CORE`.

    Slow tests come first: in several processes, none is left alone with one at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        of_package = isinstance(item, pytest.DoctestItem) and item.path.suffix == ".py"
        if of_package and item.path.stem not in NOT_CORE:
            item.add_marker("core")


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

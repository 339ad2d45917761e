"""What every test needs, on every backend: a fixed seed, float64 where JAX must be asked for it."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """Each test starts from the same state, in whatever order they run."""
    keras.utils.set_random_seed(0)
    np.random.seed(0)
    yield
    keras.backend.clear_session()

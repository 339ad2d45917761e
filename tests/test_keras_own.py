"""Keras's own tests of the layers pass with ours in their place (see keras_own_tests.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import keras
import keras_own_tests
import pytest

SCRIPT = Path(keras_own_tests.__file__)


def run(*arguments):
    """The script in a process of its own, in the way that Keras's tests expect: float32."""
    backend = keras.backend.backend()
    if backend == "jax":  # a fork would have its 64 bits
        environment = {**os.environ, "KERAS_BACKEND": backend}
        environment.pop("JAX_ENABLE_X64", None)
        command = [sys.executable, SCRIPT, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    else:
        result = forked.run(SCRIPT, *arguments, KERAS_BACKEND=backend)
    if result.returncode == keras_own_tests.NO_TESTS:
        pytest.skip(result.stdout.strip())
    return result


def passed_and_failed(result, name):
    """The first two numbers of a row of the table."""
    row = re.search(rf"^{name} +(\d+) +(\d+) ", result.stdout, re.MULTILINE)
    assert row, f"{result.stdout}\n{result.stderr}"
    return int(row[1]), int(row[2])


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.slow_on_jax
def test_all_pass():
    result = run()
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    for name, least in (
        ("BatchNormalization", 30),
        ("LayerNormalization", 7),
        ("GroupNormalization", 12),
        ("RMSNormalization", 4),
        ("Dropout", 14),
    ):
        passed, failed = passed_and_failed(result, name)
        assert passed >= least
        assert failed == 0
    assert not keras_own_tests.DESELECTED


def test_another_layer_fails():
    """What is put in the place of the layer is what runs: a wrong layer does not pass."""
    result = run("RMSNormalization", "--replace", "RMSNormalization=keras.layers:UnitNormalization")
    assert result.returncode == keras_own_tests.FAILED, result.stdout
    passed, failed = passed_and_failed(result, "RMSNormalization")
    assert failed > passed


def test_without_test_files(monkeypatch, capsys):
    """A Keras without its tests is reported, and is not taken for a success."""
    monkeypatch.setitem(keras_own_tests.FILES, "Dropout", "keras.src.layers.no_such_test")
    assert keras_own_tests.main(["Dropout"]) == keras_own_tests.NO_TESTS
    assert "installed without its tests of Dropout" in capsys.readouterr().out

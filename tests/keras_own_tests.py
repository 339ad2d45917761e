"""Runs Keras's own tests of its layers with the layers of keras_norm in their place.

    python tests/keras_own_tests.py
    KERAS_BACKEND=jax python tests/keras_own_tests.py Dropout LayerNormalization
    python tests/keras_own_tests.py Dropout --replace Dropout=some.module:Class

The tests are the files that the installed Keras brings along; none of them is part of this
repository. `keras.layers.X` and `keras.src.layers.X` are replaced before a test file is imported;
every file is checked to see the replacement. Prints a table, and what failed above it.

Exit status: 0 when all passed, 1 when something failed, 3 when this Keras has no test files.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras.src.layers
import pytest

FILES = {
    "BatchNormalization": "keras.src.layers.normalization.batch_normalization_test",
    "LayerNormalization": "keras.src.layers.normalization.layer_normalization_test",
    "GroupNormalization": "keras.src.layers.normalization.group_normalization_test",
    "RMSNormalization": "keras.src.layers.normalization.rms_normalization_test",
    "Dropout": "keras.src.layers.regularization.dropout_test",
}
DESELECTED: dict[str, str] = {}
"""Tests that do not apply, and why: {"LayerNormalizationTest::test_x": "reason"}."""

FAILED, NO_TESTS = 1, 3


class Replacement:
    """A pytest plugin: replaces the layers, and counts what became of the tests."""

    def __init__(self, classes):
        self.classes = classes
        self.outcomes = {name: {"passed": 0, "failed": 0, "skipped": 0} for name in classes}
        self.deselected = []

    def pytest_configure(self, config):
        config.addinivalue_line("markers", "requires_trainable_backend: all three are")
        for name, cls in self.classes.items():
            setattr(keras.layers, name, cls)
            setattr(keras.src.layers, name, cls)

    def pytest_collection_modifyitems(self, config, items):
        for item in items:
            name = self._class_of(item)
            if getattr(item.module.layers, name) is not self.classes[name]:
                raise pytest.UsageError(f"{item.module.__name__} does not see our {name}")
        self.deselected = [item for item in items if self._key(item) in DESELECTED]
        items[:] = [item for item in items if item not in self.deselected]
        config.hook.pytest_deselected(items=self.deselected)

    def pytest_runtest_setup(self, item):
        keras.utils.set_random_seed(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[self._class_of(item)][report.outcome] += 1
        return report

    @staticmethod
    def _key(item):
        return item.nodeid.split("::", 1)[1]

    @staticmethod
    def _class_of(item):
        return next(name for name, file in FILES.items() if file == item.module.__name__)


def missing(names):
    """The classes whose test file the installed Keras does not bring along."""
    return [name for name in names if importlib.util.find_spec(FILES[name]) is None]


def run(classes):
    """Runs the test files; returns pytest's exit status and the plugin with its counts."""
    plugin = Replacement(classes)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "pytest.ini")
        settings.write_text("[pytest]\n")
        options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
        files = [FILES[name] for name in classes]
        status = pytest.main([*options, "-c", str(settings), "--pyargs", *files], [plugin])
    return status, plugin


def print_table(plugin):
    columns = ("passed", "failed", "skipped")
    print(f"\nKeras {keras.__version__} on {keras.backend.backend()}, its tests on these classes:")
    print(f"{'':24}{''.join(f'{c:>10}' for c in (*columns, 'deselected'))}  class")
    for name, counts in plugin.outcomes.items():
        left_out = [item for item in plugin.deselected if plugin._class_of(item) == name]
        numbers = [*(counts[c] for c in columns), len(left_out)]
        cls = plugin.classes[name]
        row = "".join(f"{n:>10}" for n in numbers)
        print(f"{name:24}{row}  {cls.__module__}.{cls.__qualname__}")
        for item in left_out:
            print(f"    deselected {plugin._key(item)}: {DESELECTED[plugin._key(item)]}")


def named_class(text):
    name, _, target = text.partition("=")
    module, _, attribute = target.partition(":")
    if name not in FILES or not attribute:
        raise argparse.ArgumentTypeError(f"expected NAME=module:Class, received {text!r}")
    return name, getattr(importlib.import_module(module), attribute)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="class", help=f"of {', '.join(FILES)}")
    parser.add_argument(
        "--replace", type=named_class, action="append", default=[], metavar="NAME=module:Class"
    )
    parsed = parser.parse_args(arguments)
    names = parsed.names or list(FILES)
    if set(names) - set(FILES):
        parser.error(f"unknown classes {sorted(set(names) - set(FILES))}; known: {list(FILES)}")
    if absent := missing(names):
        print(f"Keras {keras.__version__} is installed without its tests of {', '.join(absent)}.")
        return NO_TESTS

    from keras_norm import layers

    ours = {name: getattr(layers, name) for name in names}
    status, plugin = run(ours | dict(parsed.replace))
    print_table(plugin)
    return 0 if status == pytest.ExitCode.OK else FAILED


if __name__ == "__main__":
    sys.exit(main())

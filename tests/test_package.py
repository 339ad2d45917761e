"""What `import keras_norm` gives, and what it does not cost."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import keras_norm
from keras_norm import layers, research

pytestmark = pytest.mark.core


def names_for_type_checkers(module):
    """What a module imports or names where only a type checker looks."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    (block,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imported = {a.name for node in block if isinstance(node, ast.ImportFrom) for a in node.names}
    named = {t.id for node in block if isinstance(node, ast.Assign) for t in node.targets}
    return named or imported


def test_every_public_module_is_an_attribute():
    public = {m.name for m in pkgutil.iter_modules(keras_norm.__path__) if m.name[0] != "_"}
    assert set(keras_norm.__all__) == public - {"cli"}
    assert set(keras_norm.__all__) == names_for_type_checkers(keras_norm)
    assert public - {"cli"} <= set(dir(keras_norm))
    assert keras_norm.layers is layers
    with pytest.raises(AttributeError, match="no attribute 'layer'"):
        keras_norm.layer  # noqa: B018


def test_layers_of_research_are_attributes_of_layers():
    found = {name for name in research.__all__ if isinstance(getattr(research, name), type)}
    assert found == names_for_type_checkers(layers)
    assert found <= set(dir(layers))
    for name in found:
        assert getattr(layers, name) is getattr(research, name)
    with pytest.raises(AttributeError, match="no attribute 'whiten'"):
        layers.whiten  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    script = "import sys, keras_norm; print('keras' in sys.modules, 'numpy' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout.split() == ["False", "False"], process.stderr

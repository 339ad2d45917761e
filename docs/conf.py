"""Sphinx: the pages of keras_norm. `make docs` builds and checks them."""

import inspect
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(Path(__file__).parent))

import docstrings
import pages

from keras_norm import quiet

quiet.start()
logging.getLogger("tensorflow").setLevel(logging.ERROR)

project = "keras_norm"
author = "The keras_norm authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.not_included"]  # a model card lies beside its runs, and in no menu
html_theme = "furo"
html_title = "keras_norm"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_show_sphinx = False
myst_heading_anchors = 3
highlight_language = "text"  # code in Python says so; equations and commands are none

# `name` links where it names something documented, and is code where it does not.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    ("Arguments with the same meaning everywhere", "params_style"),
    ("Returns", "notes_style"),  # its text begins with a tuple and a colon, which is no type
    ("State", "notes_style"),
    ("Numerics", "notes_style"),
    ("Reference", "notes_style"),
]

# No network is needed: of links to other sites a list is written.
linkcheck_ignore = [r"https?://"]


def own_signature(app, what, name, obj, options, signature, annotation):
    """That of `__init__`: Keras's classes have a `__new__(*args, **kwargs)` that hides it."""
    if what != "class" or signature is None or issubclass(obj, tuple):
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain)), None


def is_field(app, what, name, obj, skip, options):
    """Of a named tuple: the class says what its fields are, and its signature their order."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def plain_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text; Napoleon, which comes later, wants reStructuredText."""
    lines[:] = docstrings.to_rst(lines)


def lead_inward(app, name, source):
    """In the repository the pages link to scripts and RESULTS.md, here to their pages."""
    if not name.startswith("_pages/"):
        source[0] = pages.inward(source[0])


def setup(app):
    """Called by Sphinx."""
    pages.write()
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("autodoc-skip-member", is_field)
    app.connect("source-read", lead_inward)

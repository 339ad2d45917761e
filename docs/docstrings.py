"""The package's docstrings, which are plain text, as the reStructuredText that Sphinx reads.

Indented lines after a blank one are equations or tables and keep their lines; `|` and `*` are
characters like others; `Name: text` with hanging lines is a paragraph. Sections such as `Args:`
are left to Napoleon.
"""

from __future__ import annotations

import re

__all__ = ["to_rst"]

_PARAGRAPH_WITH_NAME = re.compile(r"(\s*)([A-Z][A-Za-z ]*): (?=\S)")
_CODE = re.compile(r"(`+[^`]*`+)")


def to_rst(lines: list[str]) -> list[str]:
    """The same docstring, to be read by Napoleon and Sphinx."""
    found: list[str] = []
    rest = list(lines)
    while rest:
        if not rest[0].strip():
            found.append(rest.pop(0))
            continue
        deeper = bool(found) and not found[-1].strip() and _indent(rest[0]) > _last_indent(found)
        if rest[0].lstrip().startswith(">>>"):
            found += _take(rest, lambda line: bool(line.strip()))
        elif deeper and not rest[0].lstrip().startswith("* "):
            found += _literal(_block(rest, _last_indent(found)), found)
        else:
            found += _paragraph(_take(rest, lambda line: bool(line.strip())))
    return found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _last_indent(lines: list[str]) -> int:
    return next((_indent(line) for line in reversed(lines) if line.strip()), 0)


def _take(rest: list[str], wanted) -> list[str]:
    """Takes lines off `rest` while they are wanted."""
    taken = []
    while rest and wanted(rest[0]):
        taken.append(rest.pop(0))
    return taken


def _block(rest: list[str], base: int) -> list[str]:
    """Takes the lines that are indented by more than `base`, with the blank lines among them."""
    block = _take(rest, lambda line: not line.strip() or _indent(line) > base)
    while not block[-1].strip():
        rest.insert(0, block.pop())
    return block


def _literal(block: list[str], before: list[str]) -> list[str]:
    """The block with its lines kept; within a section it belongs to the item before it."""
    if next(line for line in reversed(before) if line.strip()).endswith("::"):
        return block
    place = " " * _indent(block[0]) if _last_indent(before) else ""
    return [f"{place}.. code-block:: text", "", *(f"   {line}" for line in block), ""]


def _paragraph(lines: list[str]) -> list[str]:
    """Text with its special characters escaped outside of code."""
    name = _PARAGRAPH_WITH_NAME.match(lines[0])
    if name and all(_indent(line) >= _indent(lines[0]) for line in lines):
        lines = [name[1] + line.strip() for line in lines]
    parts = _CODE.split("\n".join(lines))
    parts[::2] = [re.sub(r"(?m)(?<!^)([|*])|([|*])(?! )", r"\\\1\2", part) for part in parts[::2]]
    return "".join(parts).split("\n")

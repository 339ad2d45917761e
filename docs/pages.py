"""The pages that are made from other files: tutorials, results, and the API reference.

`conf.py` calls `write` before Sphinx reads its sources. A tutorial's page is its script, with the
plots of its saved run under the code that draws them, and the answers of that run at the end;
nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import jupytext

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = DOCS / "_pages"
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]*_*.py"))
MODULES = sorted(
    path for path in (ROOT / "keras_norm").glob("[a-z]*.py") if "\n__all__ = " in path.read_text()
)

_PLOT = re.compile(r'out / f?"(\w[^"/]*)\.png"')
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


def write() -> None:
    """Write all pages anew; one that is up to date is not touched."""
    texts = {f"{path.stem}.md": tutorial(path) for path in TUTORIALS}
    texts |= {f"api_{path.stem}.md": module(path) for path in MODULES}
    texts["results.md"] = relinked((ROOT / "RESULTS.md").read_text("utf-8"))
    PAGES.mkdir(exist_ok=True)
    for path in PAGES.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        path = PAGES / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def tutorial(path: Path) -> str:
    """A tutorial as Markdown, with the plots and answers that are saved."""
    saved = DOCS / "results" / path.stem
    outputs = saved / "outputs.json"
    printed = json.loads(outputs.read_text("utf-8")) if outputs.exists() else {}
    title, *parts = [cell_text(cell, saved, printed) for cell in jupytext.read(path).cells]
    where = (
        f"*This page is the script `tutorials/{path.name}`, which runs as it is and opens as a "
        f"notebook; plots and answers are those of the runs saved in `docs/results/{path.stem}`.*"
    )
    heading, _, rest = title.partition("\n")
    return "\n\n".join([heading, where, rest.strip(), *parts, *answers(saved)]) + "\n"


def digest(source: str) -> str:
    """Names a cell in outputs.json: what a cell that has been changed had printed is not shown."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def cell_text(cell, saved: Path, printed: dict[str, str]) -> str:
    """A cell of the notebook; after code what it prints, and the plots that it writes."""
    if cell.cell_type == "markdown":
        return cell.source
    output = printed.get(digest(cell.source), "").rstrip()
    plots = [
        f"![{plot.stem.replace('_', ' ')}](../results/{saved.name}/{plot.name})"
        for name in _PLOT.findall(cell.source)
        for plot in sorted(saved.glob(re.sub(r"\{[^}]*\}", "*", name) + ".png"))
    ]
    texts = [f"```python\n{cell.source}\n```"] + [f"```text\n{output}\n```"] * bool(output)
    return "\n\n".join([*texts, *dict.fromkeys(plots)])


def answers(saved: Path) -> list[str]:
    """The answers of the saved run, one paragraph each."""
    path = saved / "answers.json"
    if not path.exists():
        return []
    texts = json.loads(path.read_text("utf-8"))["answers"]
    return ["## What these runs answer", *(text.replace("<", "&lt;") for text in texts)]


def module(path: Path) -> str:
    """The page of a module: everything in its `__all__`."""
    name = f"keras_norm.{path.stem}"
    return f"# `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"


def relinked(text: str) -> str:
    """Links of a page of the repository's root, for a page in `_pages`."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if target.startswith("tutorials/"):
            return f"]({Path(target).stem}.md)"
        return f"](../{target.removeprefix('docs/')})"

    return _LINK.sub(link, text).replace(" ± ", "\u00a0±\u00a0")  # not broken in narrow columns


def inward(text: str) -> str:
    """Links of a page in `docs` to what lies outside of it, led to the pages made from that."""
    text = text.replace("](../RESULTS.md", "](_pages/results.md")
    return re.sub(r"\]\(\.\./tutorials/(\w+)\.py", r"](_pages/\1.md", text)

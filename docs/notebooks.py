"""Runs tutorials as notebooks on their saved runs, and keeps what they print and draw.

    .venv-docs/bin/python docs/notebooks.py 01_batchnorm 03_dropout     # or: make notebooks

Each is executed by a notebook kernel with `--full --out docs/results/NAME`. Runs that are saved
there are not made again, so that this takes a minute or a few; runs that are missing are made,
which may take hours. Plots are redrawn; what each cell prints goes into `outputs.json`, from where
`pages.py` takes it as long as the cell is the same.
"""

from __future__ import annotations

import json
import os
import sys
import time

import jupytext
import nbclient
import pages
from traitlets.config import Config

from keras_norm.experiments import replace_file


def execute(name: str) -> None:
    """Run one tutorial; the first error of a cell ends it."""
    saved = pages.DOCS / "results" / name
    notebook = jupytext.read(pages.ROOT / "tutorials" / f"{name}.py")
    os.environ["KERAS_NORM_FLAGS"] = f"--full --out {saved.relative_to(pages.ROOT)}"
    client = nbclient.NotebookClient(
        notebook,
        timeout=None,
        resources={"metadata": {"path": str(pages.ROOT)}},
        config=Config({"KernelManager": {"transport": "ipc"}}),  # by files, not by open ports
    )
    client.execute()
    printed = {
        pages.digest(cell.source): "".join(
            output.text
            for output in cell.outputs
            if output.output_type == "stream" and output.name == "stdout"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    with replace_file(saved / "outputs.json") as path:
        path.write_text(json.dumps({k: v for k, v in printed.items() if v}, indent=1), "utf-8")


def main() -> None:
    for name in sys.argv[1:] or [path.stem for path in pages.TUTORIALS]:
        start = time.perf_counter()
        execute(name)
        print(f"{name}: executed as a notebook in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""What tutorials share: their flags, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from keras_norm._files import replace_file, require_writable
from keras_norm._machine import in_notebook

T = TypeVar("T")
Stamp = tuple[int, int]


@dataclass(frozen=True)
class TutorialArguments:
    """What a tutorial was asked to do; made by `tutorial_arguments`.

    Args:
        mode: "fast", "default" or "full".
        out: Folder for results, made already.
        seeds: Number of seeds that was asked for, or None.
        data_dir: Folder of the data sets, an .npz file of one, or None.
        resume: False if runs that are there already are to be made anew.

    Raises:
        ValueError: `mode` is another one.

    Example:
        >>> from keras_norm.experiments import TutorialArguments
        >>> from pathlib import Path
        >>> arguments = TutorialArguments("fast", Path("results"))
        >>> arguments.choose(fast=2, default=5, full=10)
        2
        >>> arguments.seed_range(fast=2, default=5, full=10)
        range(0, 2)
    """

    mode: str
    out: Path
    seeds: int | None = None
    data_dir: str | None = None
    resume: bool = True
    _before: dict[str, Stamp] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in ("fast", "default", "full"):
            raise ValueError(
                f"mode must be 'fast', 'default' or 'full'. Received: mode={self.mode!r}"
            )
        self._before.update(_stamps(self.out))

    def choose(self, *, fast: T, default: T, full: T) -> T:
        """The value for this mode."""
        return {"fast": fast, "default": default, "full": full}[self.mode]

    def seed_range(self, *, fast: int, default: int, full: int) -> range:
        """Seeds 0 … n − 1, n from `--seeds` or else from the mode."""
        return range(self.seeds or self.choose(fast=fast, default=default, full=full))

    def finish(
        self, answers: Sequence[str], *data: Any, seeds: str, instead_of: str, **measured: Any
    ) -> None:
        """The end of a tutorial: prints the answers, saves them, and says what was written.

        Args:
            answers: To the exercises, in their order.
            *data: `datasets.Data` that the tutorial ran on; their sources are printed.
            seeds: How many there were, such as "5, 2 in the exercises".
            instead_of: Data for which the embedded digits may have had to stand in.
            **measured: What else is saved beside the answers, as JSON values.

        The file `answers.json` in `out` is replaced whole or not at all. Files and folders in `out`
        count as written that are new, or changed, since these arguments were made.

        Raises:
            TypeError: For values that JSON does not know; the file is as it was.
        """
        print("\n\n".join(answers))
        with replace_file(self.out / "answers.json") as path:
            path.write_text(json.dumps({"answers": list(answers), **measured}, indent=1))
        print()
        for found in data:
            print(f"{found.title}: {found.source}")
        print(f"Seeds: {seeds}. Written to {self.out}:")
        for name, stamp in sorted(_stamps(self.out).items()):
            if stamp != self._before.get(name):
                print(f"  {self.out / name}")
        if any(found.fallback for found in data):
            print(f"Figures of the embedded digits, NOT of {instead_of}: see the box above.")


def tutorial_arguments(
    description: str, argv: Sequence[str] | None = None, *, name: str | None = None
) -> TutorialArguments:
    """The flags that all tutorials share: --fast, --full, --seeds, --data-dir, --out, --fresh.

    Args:
        description: What the tutorial does, for `--help`.
        argv: Flags; default those of the command line. In a notebook, whose kernel has a command
            line of its own, the default is what the environment variable KERAS_NORM_FLAGS holds.
        name: Name of the folder under results/ when there is no `--out`; default the script's.

    Returns:
        `TutorialArguments`; the folder `out` exists and can be written to.

    Raises:
        SystemExit: Status 2 and one line that says why, after an unknown flag, an abbreviated one,
            --fast with --full, less than one seed, data that are not there, or a folder that cannot
            be written. Status 0 after --help.

    Example:
        >>> import tempfile
        >>> from keras_norm.experiments import tutorial_arguments
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = tutorial_arguments("Example.", ["--fast", "--seeds=3", "--out", folder])
        >>> arguments.mode, arguments.seeds, arguments.resume
        ('fast', 3, True)
    """
    script = Path(sys.argv[0])
    if argv is None:
        in_kernel = in_notebook() and "kernel" in script.name
        argv = shlex.split(os.environ.get("KERAS_NORM_FLAGS", "")) if in_kernel else sys.argv[1:]
    default_out = Path("results") / (name or script.stem or "tutorial")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_const", const="fast", dest="mode", help="small sizes")
    size.add_argument("--full", action="store_const", const="full", dest="mode", help="full sizes")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds, at least 1")
    parser.add_argument(
        "--data-dir",
        metavar="PATH",
        help="folder of the data sets, or an .npz file of one (keras_norm.datasets.pack)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=default_out,
        metavar="DIR",
        help="folder for results and plots (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh",
        "--no-resume",
        action="store_true",
        help="make all runs anew, also those that are in the folder already",
    )
    flags = parser.parse_args(argv)
    data_dir = None if flags.data_dir is None else Path(flags.data_dir).expanduser()
    if data_dir is not None and not (data_dir.is_dir() or _is_packed(data_dir)):
        parser.error(
            "argument --data-dir: must be a folder, or an .npz file, that exists; got "
            f"{flags.data_dir!r}"
        )
    _check_writable(flags.out, parser)
    return TutorialArguments(
        mode=flags.mode or "default",
        out=flags.out,
        seeds=flags.seeds,
        data_dir=None if data_dir is None else str(data_dir),
        resume=not flags.fresh,
    )


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return number


def _is_packed(path: Path) -> bool:
    return path.suffix == ".npz" and path.is_file()


def _stamps(folder: Path) -> dict[str, Stamp]:
    """What tells each file and folder in a folder, hidden ones apart, from a later one."""
    if not folder.is_dir():
        return {}
    found = {path.name: path.stat() for path in folder.glob("[!.]*") if path.exists()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def _check_writable(folder: Path, parser: argparse.ArgumentParser) -> None:
    try:
        require_writable(folder)
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(folder)!r}: {error.strerror}")

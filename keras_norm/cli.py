"""The command `keras-norm`: train, tune, report, retrain.

Whatever is wrong with what was asked for is one line on the error stream and exit status 2;
Ctrl-C is 130. Nothing heavy is imported before it is needed, `--help` least of all.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from keras_norm import __version__
from keras_norm._files import no_room

__all__ = ["main"]

_COMMANDS = {
    "train": "train a net by a recipe",
    "tune": "search for hyperparameters",
    "report": "plots, tables and a page of a search",
    "retrain": "retrain the best of a search, and test them once",
}

_EXAMPLES = {
    "tune": """examples:
  keras-norm tune --out first --tuner bayesian --prune --trials 40 --epochs 8 --workers 2
  keras-norm tune --out first --resume --trials 60      continue, for more trials than planned
  keras-norm tune --out second --refine first           narrow the space around its best
  keras-norm tune --out small --families cnn --fix cnn_stages=2 --max-parameters 50_000
""",
    "report": "example:\n  keras-norm report first        then open first/report/index.html\n",
    "retrain": "example:\n  keras-norm retrain first --top 2 --seeds 5\n",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments. Default: those of the process.

    Returns:
        Exit status: 0; 1 for a search none of whose trials has a score; 2 for what the user can put
        right; 130 after Ctrl-C.

    Raises:
        SystemExit: status 2 and one line for wrong arguments; 0 after --help and --version; 143
            when terminated.

    Example:
        >>> main(["report", "no/such/folder"])
        2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(argv)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_of_the_user(error):
            raise
        print(f"keras-norm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_of_the_user(error: Exception) -> bool:
    """Errors of ours that say what to put right."""
    named = type(error).__name__ in ("SearchError", "DataUnavailableError")
    own = isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
    return named or own or bool(no_room(error))


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="keras-norm", description="Normalization for Keras.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in _COMMANDS.items():
        own = commands.add_parser(
            name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".",
            allow_abbrev=False, formatter_class=_Help, epilog=_EXAMPLES.get(name),
        )  # fmt: skip
        if name != "train":
            {"tune": _tune, "report": _report, "retrain": _retrain}[name](own)
        elif argv[:1] == ["train"]:
            from keras_norm import quiet

            quiet.start()
            from keras_norm import recipes

            recipes.configure(own)
            own.set_defaults(run=recipes.command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse puts the whole usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


# tune ---------------------------------------------------------------------------------------


def _tune(parser: argparse.ArgumentParser) -> None:
    from keras_norm._search_settings import DATA, FAMILIES, OBJECTIVES, TUNERS

    parser.set_defaults(run=_run_tune)
    # What is not given is not passed on: a resumed search has its own.
    add = _adder(parser, "the search")
    add("--out", type=Path, metavar="DIR", required=True, help="folder of the search")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the search in --out")
    how.add_argument("--overwrite", action="store_true", help="delete it and begin anew")
    add("--tuner", choices=TUNERS, help="default: random")
    add("--objective", choices=list(OBJECTIVES), help="default: val_accuracy")
    add("--trials", type=_count, metavar="N",
        help="default: 20; for Hyperband --epochs decides")  # fmt: skip
    add("--epochs", type=_count, metavar="N", help="per trial, default: 10")
    add("--factor", type=_count, metavar="N", help="Hyperband's reduction factor, default: 3")
    add("--seed", type=_whole, metavar="N", help="default: 0")
    add("--prune", action="store_true", default=argparse.SUPPRESS,
        help="stop trials below the median of the others at the same epoch")  # fmt: skip
    add("--prune-after", type=_count, metavar="EPOCH",
        help="prune no earlier than this epoch, default: 1")  # fmt: skip
    add("--prune-least", type=_count, metavar="N", help="fewest others to compare with, default: 5")

    add = _adder(parser, "data and space")
    add("--data", choices=DATA, help="default: cifar10")
    add("--data-dir", metavar="DIR", help="folder of the data sets")
    add("--subset", type=_count, metavar="N", help="images to train on, default: all")
    add("--validation", type=float, metavar="F", help="fraction of images held out, default: 0.1")
    add("--families", nargs="+", choices=FAMILIES, help="families of nets, default: mlp cnn")
    add("--space", metavar="FILE.py:FUNCTION", help="your own space")
    add("--fix", nargs="+", type=_pair, action="extend", metavar="NAME=VALUE", dest="fixed",
        help="fix these instead of searching them")  # fmt: skip
    add("--refine", metavar="DIR", help="narrow the space around the best trials of that search")
    add("--refine-top", type=_count, metavar="N", help="number of these trials, default: 5")
    add("--max-parameters", type=_count, metavar="N", help="most parameters of a net")
    add("--max-flops", type=float, metavar="N", help="most operations for one image")

    add = _adder(parser, "running")
    add("--workers", type=_whole, metavar="N", help="trials at the same time, default: 1")
    add("--threads", type=_whole, metavar="N",
        help="cores for each worker, default: an equal share")  # fmt: skip
    add("--chief", metavar="HOST:PORT", help="let workers of other machines join")
    add("--join", metavar="HOST:PORT", help="work for the chief at this address")
    add("--time-limit", type=float, metavar="MINUTES", help="begin no trial after this time")
    add("--trial-timeout", type=_limit, metavar="SECONDS",
        help="fail a trial that takes longer; none: no limit")  # fmt: skip
    add("--trial-memory", type=_limit, metavar="GIB",
        help="fail a trial that takes more memory; none: no limit")  # fmt: skip
    add("--worker-timeout", type=float, metavar="SECONDS",
        help="a worker silent for longer loses its trial; at least 10, default: 60")  # fmt: skip
    add("--tensorboard", action="store_true", default=argparse.SUPPRESS,
        help="write logs for its HParams plugin")  # fmt: skip
    add("--quiet", action="store_false", dest="progress", help="show no table")


def _adder(parser: argparse.ArgumentParser, title: str) -> Any:
    group = parser.add_argument_group(title)

    def add(flag: str, **options: Any) -> None:
        options.setdefault("default", argparse.SUPPRESS)
        group.add_argument(flag, **options)

    return add


def _run_tune(arguments: argparse.Namespace) -> int:
    from keras_norm import tuning

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "out")}
    if "fixed" in options:
        options["fixed"] = _fixed(options["fixed"])
    signal.signal(signal.SIGTERM, _terminated)
    out = str(arguments.out)
    try:
        found = tuning.search(out, **options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {_after_interrupt(options, out)}", file=sys.stderr)
        return 130
    if "join" in options:
        return 0
    if options.get("progress", True):
        try:
            _conclude(found, out)
            sys.stdout.flush()
        except OSError:  # nobody reads it any more: let what is left go nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if found.best():
        return 0
    print("keras-norm: error: No trial has a score: see the reasons above and, for each trial, "
          f"{shlex.quote(out)}/trial_N/log.txt", file=sys.stderr)  # fmt: skip
    return 1


def _fixed(pairs: list[tuple[str, str]]) -> dict[str, str]:
    from keras_norm.tuning import SearchError

    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise SearchError(
                f"--fix takes one value of each name: leave one out. Received: {name}="
                f"{found[name]} and {name}={value}"
            )
        found[name] = value
    return found


def _after_interrupt(options: dict[str, Any], out: str) -> str:
    if "join" in options:
        return "The chief gives the trials that were running here to others."
    if not (Path(out).expanduser() / "search.json").exists():
        return "The search had not begun: the same command begins it."
    return (
        "Finished trials and epochs are kept; go on with:\n"
        f"  keras-norm tune --out {shlex.quote(out)} --resume"
    )


def _terminated(*_: Any) -> NoReturn:
    sys.exit(143)


def _conclude(found: Any, out: str) -> None:
    from keras_norm._search_run import describe, printable

    failed = sum(t.status == "failed" for t in found.trials)
    print(f"\n{len(found.trials)} trials, {failed} of them failed.")
    for trial in found.best(3):
        told = printable(describe(trial.hyperparameters)[:120])
        print(f"  #{trial.number}: {trial.score:.4f}  {told}")
    if not found.best():
        return
    print(f"\nkeras-norm report {shlex.quote(out)}\nkeras-norm retrain {shlex.quote(out)} --top 1")


# report, retrain ----------------------------------------------------------------------------


def _report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_report)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of the search")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: DIR/report")


def _run_report(arguments: argparse.Namespace) -> int:
    from keras_norm import tuning

    print(tuning.report(arguments.dir, arguments.out))
    return 0


def _retrain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_retrain)
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="folder of the search")
    add("--top", type=_count, default=1, metavar="K", help="number of trials, default: 1")
    add("--seeds", type=_count, default=1, metavar="N", help="number for each, default: 1")
    add("--epochs", type=_count, metavar="N", help="default: those of the search")
    add("--subset", type=_count, metavar="N", help="images to train on, default: all")
    add("--space", metavar="FILE.py:FUNCTION", help="where the search's own space is now")
    add("--out", type=Path, metavar="DIR", help="default: DIR/retrained")
    add("--overwrite", action="store_true", help="replace what is there, and test again")


def _run_retrain(arguments: argparse.Namespace) -> int:
    from keras_norm import tuning

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "dir")}
    signal.signal(signal.SIGTERM, _terminated)
    try:
        print(tuning.retrain(arguments.dir, **options))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last epoch.", file=sys.stderr)
        return 130
    except OSError as error:
        if not no_room(error):
            raise
        raise tuning.SearchError(
            f"{error}. Make room: the same command goes on from the last epoch."
        ) from None
    return 0


# Values -------------------------------------------------------------------------------------


def _count(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int = 0) -> int:
    """Also of "1e6"."""
    plain = text.strip().replace("_", "")
    number = float(plain) if re.fullmatch(r"\d+(\.\d*)?[eE]\d{1,2}", plain) else math.nan
    if plain.isdecimal() or number.is_integer():
        found = int(plain if plain.isdecimal() else number)
        if found >= least:
            return found
    raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text!r}")


def _limit(text: str) -> float | None:
    """A number, or "none"."""
    try:
        return None if text.strip().lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or none; got {text!r}") from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE; got {text!r}")
    return name, value

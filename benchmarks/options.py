"""What the benchmarks' options may be: types for argparse, which says why one is refused."""

import argparse

GROUPS = 8  # of group normalization


def at_least(least):
    """Of whole numbers that are not less."""

    def parse(text):
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {least}; got {text!r}"
            )
        return int(text)

    return parse


def shape_of(axes="N,…,C"):
    """Of shapes with as many axes as named, or more where the names hold an ellipsis."""

    def parse(text):
        sizes = [size.strip() for size in text.split(",")]
        fits = len(sizes) >= 2 if "…" in axes else len(sizes) == len(axes.split(","))
        if not fits or not all(size.isdecimal() and int(size) for size in sizes):
            raise argparse.ArgumentTypeError(
                f"must be {axes}, whole numbers joined by commas, each at least 1; got {text!r}"
            )
        return tuple(map(int, sizes))

    return parse


def check_groups(parser, layers, shapes):
    """Refuses shapes whose channels group normalization cannot split into groups of one size."""
    for shape in shapes:
        if "group" in layers and shape[-1] % GROUPS:
            parser.error(
                f"--layers group takes shapes whose last axis is a multiple of {GROUPS}; got "
                + ",".join(map(str, shape))
            )

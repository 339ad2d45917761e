"""RESULTS.md, and tables of other pages: ours beside the published figures, with verdicts.

    .venv/bin/python docs/report.py     # or: make results

What is compared stands in `results/rows.toml`: published figures, claims and exercises, and the
study, setting and metric that hold ours. What we measured is read from `results/*/results.json`
and `answers.json`, and from nowhere else.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from keras_norm.experiments import Comparison, Results, Run, Table, holm, replace_file

ROOT = Path(__file__).resolve().parent.parent
SAVED = Path("docs/results")  # of ROOT
MISSING = "not run yet"
FEWEST = 5  # seeds, below which there is no verdict
WIDE = 0.1  # half of an interval, above which a figure inside of it is not called reproduced
MARKS = ("<!-- {}, written by make results -->", "<!-- end of {} -->")  # around a table of a page
README = "results"  # the name of the table there


# ---------------------------------------------------------------------------- what is saved


@dataclass(frozen=True)
class Measured:
    """One metric of the runs of one setting, a value per seed."""

    runs: tuple[Run, ...]
    values: np.ndarray

    @property
    def seconds(self) -> float:
        return math.fsum(run.seconds for run in self.runs)


class Saved:
    """The studies in a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019 -- lives as long as the report
    def study(self, name: str) -> Results | None:
        path = self.folder / name
        return Results.load(path) if (path / "results.json").exists() else None

    @functools.cache  # noqa: B019
    def answers(self, name: str) -> list[str]:
        path = self.folder / name / "answers.json"
        return json.loads(path.read_text("utf-8"))["answers"] if path.exists() else []

    def measured(self, row: Mapping[str, Any], setting: str, metric: str) -> Measured | None:
        """The values of a row, or None if there are no such runs."""
        study = self.study(row["study"])
        if study is None or setting not in study.names:
            return None
        runs = tuple(study.select(setting, status=("finished", "diverged")))
        if not any(metric in run.metrics for run in runs):
            return None
        values = [value_at(run, metric, row.get("epoch")) for run in runs]
        return Measured(runs, np.array(values))


def value_at(run: Run, metric: str, epoch: float | None) -> float:
    """The value after that epoch; without one, the final value."""
    if epoch is None:
        return run.value(metric)
    value = dict(zip(run.epochs, run.history[metric], strict=True)).get(epoch)
    return math.nan if value is None else value


# ---------------------------------------------------------------------------- verdicts


def half_width(values: np.ndarray) -> float:
    """Of the 95% prediction interval of one more run: t sqrt(1 + 1/n) standard deviations."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * math.sqrt(1 + 1 / n) * values.std(ddof=1))


def judge(values: np.ndarray, published: Sequence[Decimal], better: str = "more") -> str:
    """Whether a published figure, a single run, could be one of ours.

    Args:
        values: Ours, (n,).
        published: The figure, or several of the same thing, of which one is enough.
        better: "more", "less", or "neither".
    """
    if len(values) < FEWEST or not np.isfinite(values).all():
        return f"open: {'a run diverged' if len(values) >= FEWEST else f'n = {len(values)}'}"
    rounding = 0.5 * 10.0 ** max(figure.as_tuple().exponent for figure in published)
    margin = half_width(values) + rounding
    away = [values.mean() - float(figure) for figure in published]
    if min(map(abs, away)) <= margin or min(away) < 0 < max(away):
        low, high = (short(f(values), 3) for f in (np.min, np.max))
        return f"compatible: ours are {low} to {high}" if margin > WIDE else "reproduced"
    ours = "more" if away[0] > 0 else "less"
    if better == "neither":
        return f"not reproduced: ours is {ours}"
    return "surpassed" if ours == better else "not reproduced"


def judge_claim(test: Comparison, p: float, expected: str) -> str:
    """Whether a is "more" or "less" than b, or the "same", as claimed; p is the adjusted one."""
    if test.n < FEWEST:
        return f"open: n = {test.n}"
    if test.untested:
        return f"open: {test.untested}"
    if expected == "same":
        return "reproduced: no difference seen" if p > 0.05 else "not reproduced: they differ"
    if p > 0.05:
        return "not reproduced: not significant"
    as_claimed = (test.difference > 0) == (expected == "more")
    return "reproduced" if as_claimed else "not reproduced: the opposite"


def compare(a: Measured, b: Measured) -> Comparison | None:
    """Paired by seed, over the seeds at which both are finite; None if there are fewer than two."""
    finite = [
        {run.seed: v for run, v in zip(x.runs, x.values, strict=True) if math.isfinite(v)}
        for x in (a, b)
    ]
    common = sorted(finite[0].keys() & finite[1].keys())
    if len(common) < 2:
        return None
    runs = [
        Run(name, {"side": name}, seed, final={"value": values[seed]})
        for name, values in zip("ab", finite, strict=True)
        for seed in common
    ]
    return Results(runs).compare("a", "b", "value")


# ---------------------------------------------------------------------------- texts


def short(value: float | Decimal, digits: int | None = None, sign: bool = False) -> str:
    """.8793 for 0.8793, 3,314 for 3314; with `digits`, rounded."""
    places = "" if digits is None else f".{digits}f"
    value = value if digits is None else round(float(value), digits) + 0.0  # no -.0000
    text = format(value, f"{'+' * sign},{places}")
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("+-")[:2] == "0." else text


def spread(values: np.ndarray, digits: int) -> str:
    deviation = f" ± {short(values.std(ddof=1), digits)}" if len(values) > 1 else ""
    return short(values.mean(), digits) + deviation


def p_value(p: float) -> str:
    return "< .0001" if p < 1e-4 else short(float(f"{p:.2g}"))


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def anchor(study: str) -> str:
    return f"[{label(study)}](#commands)"


def label(study: str) -> str:
    """01 for 01_batchnorm, 01 default for 01_batchnorm_default."""
    return study.partition("_")[0] + " default" * study.endswith("_default")


def emphasized(verdict: str) -> str:
    return f"**{verdict}**" if verdict.startswith(("not reproduced", MISSING)) else verdict


# ---------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Lines:
    """The rows of one kind of a part: table, notes under it, and a verdict for each row."""

    table: Table
    notes: tuple[str, ...]
    verdicts: tuple[str, ...]

    @property
    def markdown(self) -> str:
        return "\n\n".join([self.table.markdown, *self.notes])


def figures(rows: Iterable[Mapping[str, Any]], saved: Saved) -> Lines:
    """One line for each published figure."""
    cells, verdicts, notes = [], [], []
    for row in rows:
        ours = saved.measured(row, row["setting"], row["metric"])
        published = as_list(row.get("published", []))
        verdict, text, n, time = MISSING, "–", "0", "–"
        if ours is not None:
            text, time = spread(ours.values, row.get("digits", 4)), duration(ours.seconds)
            n = str(len(ours.values))
            if row.get("range"):
                text = " – ".join(short(f(ours.values), 4) for f in (np.min, np.max))
            verdict = verdict_of(row, ours.values, published)
        verdicts.append(verdict)
        notes += reasons(row, row["what"], verdict)
        said = " – ".join(map(short, published)) or row.get("said", "–")
        run = f"{anchor(row['study'])}, {time}"
        cells.append((row["what"], row["figure"], said, text, n, emphasized(verdict), run))
    header = ("what", "figure", "published", "ours", "n", "verdict", "command, time")
    return Lines(Table(header, tuple(cells)), tuple(notes), tuple(verdicts))


def verdict_of(row: Mapping[str, Any], values: np.ndarray, published: Sequence[Decimal]) -> str:
    if row.get("not_comparable"):
        return f"not comparable: {row['not_comparable']}"
    if not published:
        return "measured"
    better = row.get("better", "more")
    if row.get("range"):  # both of its ends could be runs of ours, or ours are better
        verdicts = [judge(values, [end], better) for end in published]
        return next(v for v in ("not reproduced", "surpassed", verdicts[0]) if v in verdicts)
    return judge(values, published, better)


def reasons(row: Mapping[str, Any], title: str, verdict: str) -> list[str]:
    """Notes of a row, and why it fails where it does."""
    notes = [f"*{title}*: {row['note']}"] if "note" in row else []
    if verdict.startswith("not reproduced") and "why" in row:
        notes.append(f"*{title}*, not reproduced: {row['why']}")
    return notes


def claims(rows: Iterable[Mapping[str, Any]], saved: Saved) -> Lines:
    """One line for each claimed difference; the p-values are adjusted for all tests of the part."""
    rows = list(rows)
    tests: list[Comparison | None] = []
    for row in rows:
        sides = [saved.measured(row, *row[side]) for side in ("a", "b")]
        tests.append(None if None in sides else compare(*sides))
    adjusted = iter(holm([test.p for test in tests if test is not None]))
    cells, verdicts, notes = [], [], []
    for row, test in zip(rows, tests, strict=True):
        numbers, verdict = ("–", "–", "–", "0"), MISSING
        if test is not None:
            p, digits = next(adjusted), row.get("digits", 4)
            low, high = (short(x, digits, sign=True) for x in (test.low, test.high))
            numbers = (
                f"{short(test.difference, digits, sign=True)} ({low} to {high})",
                p_value(p),
                short(test.effect_size, 1),
                str(test.n),
            )
            verdict = judge_claim(test, p, row["expected"])
            if "not_comparable" in row:
                verdict = f"not comparable: {row['not_comparable']}"
        verdicts.append(verdict)
        notes += reasons(row, row["claim"], verdict)
        said, run = row.get("said", "–"), anchor(row["study"])
        cells.append((row["claim"], said, *numbers, emphasized(verdict), run))
    header = ("claim", "published", "difference (95% interval)", "p", "d_z", "n")
    table = Table((*header, "verdict", "command"), tuple(cells))
    return Lines(table, tuple(notes), tuple(verdicts))


def exercises(rows: Iterable[Mapping[str, Any]], saved: Saved) -> tuple[str, list[str]]:
    """Questions and measured answers, and their verdicts."""
    texts, verdicts = [], []
    for row in rows:
        start = f"{row['answer']}. "
        found = [text for text in saved.answers(row["study"]) if text.startswith(start)]
        answer = found[0].removeprefix(start).replace("<", "&lt;") if found else f"**{MISSING}**"
        verdicts.append("answered" if found else MISSING)
        texts.append(f"**{row['question']}** ({anchor(row['study'])}) {answer}")
    return "\n\n".join(texts), verdicts


def checks(rows: Iterable[Mapping[str, Any]], folder: Path) -> str:
    """What the tests of the check vectors assert."""
    cells = []
    for row in rows:
        asserted = row["asserted"]
        if "ratio" in row:
            asserted = asserted.format(ratio=benchmark_ratio(folder, *row["ratio"]))
        tests = ", ".join(f"`{test}`" for test in row["tests"])
        cells.append((row["check"], row["published"], asserted, tests))
    return Table(("check", "published", "asserted", "in `tests/`"), tuple(cells)).markdown


def benchmark_ratio(folder: Path, name: str, column: str) -> str:
    """A column of the only line of a benchmark's table."""
    path = folder / name
    if not path.exists():
        return MISSING
    with path.open(encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    return short(float(line[column]), 1)


def commands(studies: Mapping[str, Mapping[str, Any]], saved: Saved) -> str:
    cells = []
    for name, study in studies.items():
        results = saved.study(name)
        time, machine = MISSING, "–"
        if results is not None:
            time = f"{duration(math.fsum(r.seconds for r in results))}, {len(results)} runs"
            summaries = dict.fromkeys(r.environment["summary"] for r in results)
            machine = "; ".join([*summaries, study["load"]])
        cells.append((label(name), f"`{study['command']}`", time, machine))
    header = ("", "command", "time of all its runs", "machine")
    return Table(header, tuple(cells)).markdown


# ---------------------------------------------------------------------------- the page

COMMANDS = """\
Where these runs are saved, as in a checkout, a command finds them and makes none. With another
folder as `--out` it makes them all anew."""

HEAD = """# Results: ours beside the published figures

Written by `make results` from the runs saved in `docs/results`; a test holds it to them. The
published figures are single runs of others. Ours are the mean ± standard deviation over n seeds.
Command and time are those of the runs behind a row: the wall times of single runs added up;
[commands](#commands) says on which machine, and what else ran there.

**Figures.** *Reproduced*: the published figure lies in the 95% prediction interval of one more run
of ours (mean ± t √(1 + 1/n) standard deviations, and half a unit of its last digit): it could be a
run of ours. *Compatible*: it lies in the interval, but that reaches more than {wide} to either
side, and says little. *Surpassed*: it lies outside, and ours are better. *Not reproduced*: it lies
outside, and ours are worse. *Not comparable*: ours is another setting, or theirs is not stated;
both figures stand there without a verdict. *Open*: fewer than {fewest} seeds.

**Claims.** Paired t-tests over the seeds that both settings have, p adjusted by Holm's method for
all tests of the part, Cohen's d_z as the size of the effect. *Reproduced*: the difference has the
claimed sign, and p is at most .05. Where no difference is claimed, *reproduced* only says that none
was seen.

A paired t-test asks whether the mean difference of two settings, seed by seed, may be chance.
Holm's method raises the p-values of several tests made together, so that chance alone takes one of
them below .05 in at most 5% of such sets. d_z is the mean difference over the standard deviation of
the differences. A Wilcoxon test, where there is one, uses only signs and ranks of the differences.

*JPEG copy*: CIFAR-10 whose images have been through JPEG compression; pixels are slightly off, and
accuracies a little different from those of the original images. *A reader*: someone who posted
figures of a run in the forum of the book. *Bonus report*: a student's report on the voluntary part
of an assignment."""

CHECKS = """## A. Check vectors

Exact numbers without a data set: arrays drawn from `numpy.random.seed(231)`, and what others
computed from them. Nothing here is a run over seeds, hence no mean and no verdict. Each row is a
test, which fails if the numbers differ by more than is stated."""


def data_of(part: Mapping[str, Any], saved: Saved) -> str:
    """The data that the runs of a part were made on, as the runs say."""
    titles: dict[str, None] = {}
    for row in [*part.get("figures", []), *part.get("claims", [])]:
        setting, metric = row["a"] if "a" in row else (row["setting"], row["metric"])
        ours = saved.measured(row, setting, metric)
        titles |= dict.fromkeys(str(run.context.get("data")) for run in (ours.runs if ours else ()))
    return ", ".join(titles) or MISSING


def tally(verdicts: Iterable[str]) -> str:
    counts = Counter(verdict.partition(":")[0] for verdict in verdicts)
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "–"


def report(rows: Mapping[str, Any], folder: Path) -> str:
    """RESULTS.md.

    Args:
        rows: What `rows.toml` holds.
        folder: The folder of the studies.
    """
    saved = Saved(folder)
    sections, summary = [], []
    for key, part in rows["parts"].items():
        of_figures = figures(part.get("figures", []), saved)
        of_claims = claims(part.get("claims", []), saved)
        answers, answered = exercises(part.get("exercises", []), saved)
        texts = [f"## {key}. {part['title']}", f"{part['setting']} Data: {data_of(part, saved)}."]
        texts += [of_figures.markdown]
        texts += ["### Claimed differences", of_claims.markdown] if of_claims.verdicts else []
        texts += ["### Exercises and questions", answers] if answers else []
        sections.append("\n\n".join(texts))
        summary.append(
            (
                f"{key}. {part['title']}",
                tally(of_figures.verdicts),
                tally(of_claims.verdicts),
                tally(answered),
            )
        )
    overview = Table(("part", "figures", "claims", "exercises"), tuple(summary)).markdown
    texts = [HEAD.format(fewest=FEWEST, wide=short(WIDE)), overview]
    texts += [CHECKS, checks(rows["checks"], folder), *sections]
    texts += ["## Commands", COMMANDS, commands(rows["studies"], saved)]
    return "\n\n".join(texts) + "\n"


def short_report(rows: Mapping[str, Any], folder: Path) -> str:
    """The table of README.md: the figures that have a name there."""
    saved = Saved(folder)
    chosen = [
        {**row, "what": f"{row['readme']}; {data_of({'figures': [row]}, saved)}"}
        for part in rows["parts"].values()
        for row in part["figures"]
        if "readme" in row
    ]
    table = figures(chosen, saved).table
    return Table(table.header[:-1], tuple(cells[:-1] for cells in table.rows)).markdown


def measurements(table: Mapping[str, Any], saved: Saved) -> str:
    """A table of measurements alone: a line for each setting of a study."""
    cells = []
    for row in table["rows"]:
        results = saved.study(row["study"])
        runs = () if results is None else tuple(results.select(row["setting"], status="finished"))
        cells.append(tuple(cell(row, column, runs) for column in table["columns"]))
    return Table(tuple(column["title"] for column in table["columns"]), tuple(cells)).markdown


def cell(row: Mapping[str, Any], column: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """What a column says of the runs of a row: the first of these keys that it has.

    row: a text of the row. setting: one of the runs'. hardware: of the machine. metric: mean ±
    standard deviation, with `digits`; the mean alone where `spread` is false. None: how many.
    """
    if "row" in column:
        return str(row[column["row"]])
    if not runs:
        return MISSING
    for key, values_of in (("setting", of_settings), ("hardware", of_hardware)):
        if key in column:
            return ", ".join(dict.fromkeys(values_of(run, column[key]) for run in runs))
    if "metric" not in column:
        return str(len(runs))
    values = np.array([run.value(column["metric"]) for run in runs])
    if not column.get("spread", True):
        values = values.mean(keepdims=True)
    return spread(values, column.get("digits", 4))


def of_settings(run: Run, key: str) -> str:
    value = run.settings[key]
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def of_hardware(run: Run, key: str) -> str:
    return str(run.environment["hardware"][key])


def with_table(page: str, table: str, name: str = README) -> str:
    """A page with this table between the marks of that name."""
    start, end = (mark.format(name) for mark in MARKS)
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"A page must hold the lines {start!r} and {end!r}, in this order.")
    return f"{before}{start}\n{table}\n{end}{after}"


def pages(rows: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Every page that `make results` writes, by its path from the root, as it is to be."""
    saved = Saved(folder)
    texts = {"RESULTS.md": report(rows, folder)}
    readme = (ROOT / "README.md").read_text("utf-8")
    texts["README.md"] = with_table(readme, short_report(rows, folder))
    for name, table in rows["tables"].items():
        path = table["page"]
        text = texts.get(path) or (ROOT / path).read_text("utf-8")
        texts[path] = with_table(text, measurements(table, saved), name)
    return texts


def load_rows(path: Path = ROOT / SAVED / "rows.toml") -> dict[str, Any]:
    """`rows.toml`, its numbers with the digits that they were published with."""
    with open(path, "rb") as file:
        return tomllib.load(file, parse_float=Decimal)


def main() -> None:
    texts = pages(load_rows(), ROOT / SAVED)
    for name, text in texts.items():
        with replace_file(ROOT / name) as path:
            path.write_text(text, "utf-8")
    print(f"Written: {', '.join(texts)}")


if __name__ == "__main__":
    main()

"""The runs of a study: saved, selected, tabulated, compared."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_norm._experiment_comparison import Comparison, holm, independent_test, paired_test
from keras_norm._experiment_run import (
    Run,
    canonical,
    from_csv,
    from_json,
    group_of,
    to_csv,
    to_json,
    to_number,
)
from keras_norm._files import replace_file

# name -> metric -> figure, (figure, source), or a list of these
Published = Mapping[str, Mapping[str, Any]]

_STATUS = ("finished", "diverged", "failed")


class Results:
    """Runs of a study: saved, selected, tabulated, compared.

    A name stands for one setting: two runs of the same name differ in their seed alone.

    Args:
        runs: The runs; default none.
        title: Title of the study; default none.
        superseded: Runs whose name now stands for other settings. They are kept in
            `results.json`, reused when their settings are asked for again, and appear nowhere else.

    State:
        runs, superseded: Tuples of `Run`. title: Text.

    Raises:
        ValueError: Two runs have the same name and seed, or the same name and other settings,
            context or backend.

    Example:
        >>> from keras_norm.experiments import Results, Run
        >>> runs = [Run("batch", {"norm": "batch"}, s, final={"accuracy": 0.8 + s / 100})
        ...         for s in range(3)]
        >>> runs += [Run("plain", {"norm": None}, s, final={"accuracy": 0.7 + s / 50})
        ...          for s in range(3)]
        >>> results = Results(runs)
        >>> print(results.table("accuracy", published={"plain": {"accuracy": (0.71, "a report")}}))
        setting  accuracy         published  n
        -------  ---------------  ---------  -
        batch    0.8100 ± 0.0100  –          3
        plain    0.7200 ± 0.0200  0.71       3
        Mean ± standard deviation over n seeds.
        Published accuracy of 'plain': 0.71, a report.
        >>> results.values("batch", "accuracy")
        array([0.8 , 0.81, 0.82])
        >>> results.select(settings={"norm": None}).names
        ['plain']
    """

    def __init__(
        self, runs: Iterable[Run] = (), *, title: str = "", superseded: Iterable[Run] = ()
    ) -> None:
        self.runs = tuple(runs)
        self.title = title
        self.superseded = tuple(superseded)
        groups: dict[str, str] = {}
        seen: set[tuple[str, int]] = set()
        for entry in self.runs:
            if groups.setdefault(entry.name, group_of(entry)) != group_of(entry):
                raise ValueError(
                    "A name must stand for one setting, context and backend. Received: "
                    f"different ones under name={entry.name!r}. Rename one with `rename`."
                )
            if (entry.name, entry.seed) in seen:
                raise ValueError(
                    "A setting has one run per seed. Received: two different runs of "
                    f"name={entry.name!r}, seed={entry.seed}. Rename one with `rename`."
                )
            seen.add((entry.name, entry.seed))

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __repr__(self) -> str:
        return f"<Results {self.title!r}: {len(self.names)} settings, {len(self)} runs>"

    @property
    def names(self) -> list[str]:
        """Names of the settings, in the order of their first run."""
        return list(dict.fromkeys(entry.name for entry in self.runs))

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of all runs."""
        return list(dict.fromkeys(metric for entry in self.runs for metric in entry.metrics))

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read saved results.

        Args:
            path: A folder (its results.json, or else its results.csv), or one of the files. The
                csv holds all that tables, tests and plots need, but no versions or extras.

        Returns:
            The `Results`.

        Raises:
            ValueError: There is no such file, or it is not one that `save` wrote.
        """
        path = Path(path)
        if path.is_dir():
            path = path / ("results.json" if (path / "results.json").exists() else "results.csv")
        if not path.is_file():
            raise ValueError(
                "Results are read from results.json, results.csv or the folder that holds them. "
                f"Received: path={str(path)!r}, which is not there. Run the experiment first."
            )
        try:
            if path.suffix == ".csv":
                return cls(from_csv(path))
            title, runs, superseded = from_json(path.read_text(encoding="utf-8"))
            return cls(runs, title=title, superseded=superseded)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, csv.Error) as error:
            raise ValueError(
                f"The file must be one that keras_norm saved, whole and unchanged. Received: "
                f"path={str(path)!r} ({type(error).__name__}: {error}). It was left as it is; "
                "move it away to start anew."
            ) from error

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write results.json and results.csv, each whole or not at all.

        Args:
            out: Folder; made if it is missing.
            overwrite: Whether results that are already there may be replaced; default False.

        Returns:
            The path of results.json.

        Raises:
            ValueError: There are results in `out` and `overwrite` is False.
        """
        path = Path(out) / "results.json"
        if path.exists() and not overwrite:
            raise ValueError(
                "Saving must not destroy other results. Received: "
                f"out={str(out)!r}, which holds some. Choose another folder or overwrite=True."
            )
        with replace_file(path) as temporary:
            temporary.write_text(to_json(self.title, self.runs, self.superseded), "utf-8")
        with replace_file(path.with_suffix(".csv")) as temporary:
            temporary.write_bytes(to_csv(self.runs).encode("utf-8"))
        return path

    # ------------------------------------------------------------------ parts and unions

    def select(
        self,
        names: str | Iterable[str] | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        seeds: Iterable[int] | None = None,
        status: str | Iterable[str] | None = None,
    ) -> Results:
        """The runs that fulfil every given condition.

        Args:
            names: Names of settings, which also give the order; default all.
            settings: Key -> value, or a set, list or tuple of allowed values; keys of nested
                settings are joined by dots.
            seeds: Allowed seeds.
            status: "finished", "diverged", "failed", or several of them.

        Returns:
            New `Results`, possibly without runs.

        Raises:
            ValueError: A name is not there, or there is no such status.
        """
        wanted = [names] if isinstance(names, str) else self.names if names is None else list(names)
        for name in wanted:
            self._check_name(name)
        allowed_seeds = None if seeds is None else set(seeds)
        allowed_status = {status} if isinstance(status, str) else status and set(status)
        if unknown := set(allowed_status or ()) - set(_STATUS):
            raise ValueError(
                f"A status is one of {list(_STATUS)}. Received: status={sorted(unknown)}"
            )

        def fits(entry: Run) -> bool:
            return (
                (allowed_seeds is None or entry.seed in allowed_seeds)
                and (allowed_status is None or entry.status in allowed_status)
                and all(_matches(entry.setting(k), v) for k, v in (settings or {}).items())
            )

        runs = [r for name in wanted for r in self.runs if r.name == name and fits(r)]
        return Results(runs, title=self.title)

    def merge(self, *others: Results) -> Results:
        """These runs and those of `others`, for example of other seeds or other machines.

        Args:
            *others: Other `Results`. A run that is in several of them is taken once.

        Returns:
            New `Results` with this one's title.

        Raises:
            ValueError: A name stands for different settings, or one seed has different runs.
        """
        runs: dict[str, Run] = {}
        for entry in [r for results in (self, *others) for r in results.runs]:
            fields = dataclasses.asdict(entry)
            runs.setdefault(canonical(fields), entry)
        return Results(runs.values(), title=self.title)

    def rename(self, names: Mapping[str, str]) -> Results:
        """The same runs under other names of settings: old name -> new name."""
        for name in names:
            self._check_name(name)
        runs = [dataclasses.replace(r, name=names.get(r.name, r.name)) for r in self.runs]
        return Results(runs, title=self.title)

    # ------------------------------------------------------------------ numbers

    def seeds(self, name: str) -> list[int]:
        """Sorted seeds of the runs of `name` that did not fail."""
        return [entry.seed for entry in self._of(name)]

    def values(self, name: str, metric: str) -> npt.NDArray[np.float64]:
        """One value per seed, in the order of `seeds(name)`.

        Args:
            name: Name of a setting.
            metric: A final metric; or one of the history, of which the last value counts.

        Returns:
            float64 array (n,), with NaN where a run ended in NaN or lacks the metric. Failed runs
            are left out, diverged ones are not; where all failed, n is 0.

        Raises:
            ValueError: The name, or the metric in all its runs, is not there.
        """
        runs = self._of(name)
        if runs and not any(metric in entry.metrics for entry in runs):
            raise ValueError(
                f"The metric must be one of {self.metrics}. "
                f"Received: metric={metric!r} for name={name!r}."
            )
        return np.array([entry.value(metric) for entry in runs], dtype=np.float64)

    def curves(
        self, name: str, metric: str
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The history of a metric.

        Args:
            name: Name of a setting.
            metric: A metric of the history.

        Returns:
            Epochs (E,), all that occur in any run, and values (n, E) in the order of `seeds(name)`;
            NaN where a run has no value.
        """
        runs = self._of(name)
        epochs = sorted({e for entry in runs for e in entry.epochs if metric in entry.history})
        column = {epoch: i for i, epoch in enumerate(epochs)}
        values = np.full((len(runs), len(epochs)), np.nan)
        for row, entry in zip(values, runs, strict=True):
            for epoch, value in zip(entry.epochs, entry.history.get(metric, ()), strict=False):
                row[column[epoch]] = math.nan if value is None else value
        return np.array(epochs, dtype=np.float64), values

    def table(
        self,
        metrics: str | Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        *,
        settings: Sequence[str] = (),
        published: Published | None = None,
        digits: int | Mapping[str, int] = 4,
    ) -> Table:
        """Mean ± standard deviation (n − 1 in the denominator) of metrics, a line per setting.

        Args:
            metrics: Metrics to show; default all final ones. "seconds" is the wall time of a run.
            names: Settings to show, in this order; default all.
            settings: Keys of settings to show as columns of their own.
            published: Figures of others, name -> metric -> figure or (figure, source), or a list
                of these. They stand beside ours; a name without runs gets a line of its own.
            digits: Decimal places, for all metrics (but seconds, which have 1) or per metric;
                default 4.

        Returns:
            A `Table`: print it, or take its `markdown`. Failed runs do not count in n; diverged
            ones do, and are counted in a column when there are any.

        Raises:
            ValueError: A metric or a name is not there.
        """
        finals = dict.fromkeys(m for entry in self.runs for m in entry.final)
        shown = [metrics] if isinstance(metrics, str) else list(metrics or finals)
        figures = [f for f in published_figures(published) if f.metric in shown]
        given: Mapping[str, int] = {} if isinstance(digits, int) else digits
        usual = digits if isinstance(digits, int) else 4
        places = {m: given.get(m, 1 if m == "seconds" else usual) for m in shown}
        rows = [self._row(name, shown, settings) for name in (names or self.names)]
        known = {row["name"] for row in rows}
        others = dict.fromkeys(f.name for f in figures if f.name not in self.names)
        rows += [{"name": name, "n": 0} for name in others if name not in known]
        return _format_table(rows, shown, settings, figures, places)

    def compare(self, a: str, b: str, metric: str, paired: bool = True) -> Comparison:
        """Test whether setting `a` differs from setting `b` in a metric.

        Args:
            a: Name of a setting.
            b: Name of another.
            metric: Metric, as in `values`.
            paired: Default True: differences per seed, over the seeds that both have: paired
                t-test, Wilcoxon's signed-rank test, Cohen's d_z (mean / standard deviation of the
                differences). False: independent samples: Welch's t-test, the Mann–Whitney test,
                Cohen's d (difference / pooled standard deviation).

        Returns:
            A `Comparison`; its text is a sentence to print.

        Raises:
            ValueError: Fewer than two values (pairs), or a value is NaN or infinite.

        Numerics: float64. When all differences are equal (to 1e-12 of the values; unpaired: all
        values of `a`, and all of `b`) there is no spread to test against: p, interval and effect
        size are NaN, and the sentence says so; if they are all 0, p is 1 and the others are 0.
        """
        seeds_a, seeds_b = self.seeds(a), self.seeds(b)
        values_a, values_b = self.values(a, metric), self.values(b, metric)
        if paired:
            common = sorted(set(seeds_a) & set(seeds_b))
            values_a = values_a[[seeds_a.index(s) for s in common]]
            values_b = values_b[[seeds_b.index(s) for s in common]]
        smallest = min(len(values_a), len(values_b))
        if smallest < 2:
            raise ValueError(
                f"A test needs at least two {'seeds that both have' if paired else 'runs each'}. "
                f"Received: a={a!r} with seeds {seeds_a}, b={b!r} with seeds {seeds_b}. "
                "Run more seeds."
            )
        if not np.isfinite([*values_a, *values_b]).all():
            raise ValueError(
                f"A test needs finite values. Received: {metric} {a}={values_a.tolist()}, "
                f"{b}={values_b.tolist()}. Leave diverged runs out by select(status='finished'), "
                "and say so."
            )
        test = paired_test if paired else independent_test
        return Comparison(a, b, metric, paired, **test(values_a, values_b))

    def compare_pairs(
        self, pairs: Mapping[str, tuple[str, str]], metric: str
    ) -> dict[str, Comparison]:
        """Paired tests of several differences, with p-values adjusted for their number by `holm`.

        Args:
            pairs: Name of a difference -> the settings (a, b), of which it is a − b. Pairs that
                share fewer than two seeds, or of which a setting has no runs, are left out.
            metric: Metric, as in `values`.

        Returns:
            Name of the difference -> its `Comparison`, with `p_adjusted`. One without a t-test
            (`Comparison.untested`) counts in their number.

        Raises:
            ValueError: As `compare`, for values that are NaN or infinite.
        """
        there = {
            name: (a, b)
            for name, (a, b) in pairs.items()
            if {a, b} <= set(self.names) and len(set(self.seeds(a)) & set(self.seeds(b))) > 1
        }
        tests = {name: self.compare(a, b, metric) for name, (a, b) in there.items()}
        adjusted = holm([test.p for test in tests.values()])
        return {
            name: dataclasses.replace(test, p_adjusted=p)
            for (name, test), p in zip(tests.items(), adjusted, strict=True)
        }

    def best(self, metric: str, by: str) -> dict[str, str]:
        """The name of the best setting in each group, such as each rule's best learning rate.

        Args:
            metric: Metric, as in `values`, of which more is better. The mean over seeds counts; a
                setting with a run that diverged or ended in NaN, or whose runs all failed, is no
                candidate.
            by: Key of the setting that makes the groups.

        Returns:
            Text of the group -> name; groups without a candidate are left out. Of equal means the
            first counts.

        Raises:
            ValueError: The metric is not there.
        """
        found: dict[str, tuple[float, str]] = {}
        for name in self.names:
            runs = [entry for entry in self.runs if entry.name == name]
            values = self.values(name, metric)
            if not len(values) or any(entry.status == "diverged" for entry in runs):
                continue
            mean = float(values.mean())
            group = setting_text(runs[0].setting(by))
            if math.isfinite(mean) and mean > found.get(group, (-math.inf, ""))[0]:
                found[group] = (mean, name)
        return {group: name for group, (_, name) in found.items()}

    # ------------------------------------------------------------------ private

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"The name must be one of {self.names}. Received: name={name!r}")

    def _of(self, name: str) -> list[Run]:
        self._check_name(name)
        runs = [entry for entry in self.runs if entry.name == name and entry.status != "failed"]
        return sorted(runs, key=lambda entry: entry.seed)

    def _row(self, name: str, metrics: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
        """One line of a table as numbers."""
        self._check_name(name)
        runs = [entry for entry in self.runs if entry.name == name]
        kept = self._of(name)
        row: dict[str, Any] = {"name": name, "n": len(kept)}
        row |= {key: runs[0].setting(key) for key in settings}
        for metric in metrics:
            if metric not in (*self.metrics, "seconds"):
                self.values(name, metric)  # raises
            values = [
                r.seconds if metric == "seconds" else r.value(metric)
                for r in kept
                if metric == "seconds" or metric in r.metrics
            ]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                row[metric] = (float(np.mean(values)), spread, len(values))
        for status in ("diverged", "failed"):
            row[status] = sum(entry.status == status for entry in runs)
        return row


def _matches(value: Any, wanted: Any) -> bool:
    """True if a setting has the wanted value, or one of several wanted ones."""
    if isinstance(wanted, (set, frozenset, list, tuple)) and value not in [wanted, list(wanted)]:
        return any(_matches(value, one) for one in wanted)
    same_kind = isinstance(value, bool) == isinstance(wanted, bool)
    return bool(value == (list(wanted) if isinstance(wanted, tuple) else wanted) and same_kind)


# Tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedFigure:
    """One published figure."""

    name: str
    metric: str
    value: float
    source: str = ""


def published_figures(published: Published | None) -> list[PublishedFigure]:
    """The figures of a mapping name -> metric -> value | (value, source) | list of these."""
    figures = []
    for name, metrics in (published or {}).items():
        if not isinstance(metrics, Mapping):
            raise ValueError(
                "'published' must map name -> metric -> figure or (figure, source). "
                f"Received: {name!r}: {metrics!r}"
            )
        for metric, entries in metrics.items():
            for entry in entries if isinstance(entries, list) else [entries]:
                value, source = entry if isinstance(entry, tuple) else (entry, "")
                number = to_number(value, f"published[{name!r}][{metric!r}]")
                figures.append(PublishedFigure(name, metric, number, str(source)))
    return figures


@dataclass(frozen=True)
class Table:
    """A table of results: print it, or take its `markdown`.

    Args:
        header: Column titles.
        rows: Cells as texts, one tuple per line.
        notes: Sentences that belong under the table; default none.
        records: The same lines as numbers: name, n, metric -> (mean, standard deviation, number
            of values), counts of diverged and failed runs.

    Example:
        >>> from keras_norm.experiments import Table
        >>> print(Table(("setting", "n"), (("batch", "5"),)).markdown)
        | setting | n |
        | --- | --- |
        | batch | 5 |
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.header, tuple("-" * width for width in widths), *self.rows]
        aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*aligned, *self.notes])

    @property
    def markdown(self) -> str:
        """The table in Markdown, its notes below it."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        texts = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines]
        return "\n".join([*(f"| {text} |" for text in texts), *(f"\n{n}" for n in self.notes)])

    def _repr_markdown_(self) -> str:
        return self.markdown


def _format_table(
    rows: list[dict[str, Any]],
    metrics: Sequence[str],
    settings: Sequence[str],
    figures: list[PublishedFigure],
    places: Mapping[str, int],
) -> Table:
    """Numbers to texts; a column only where it has something to say."""
    columns: dict[str, list[str]] = {"setting": [row["name"] for row in rows]}
    columns |= {key: [setting_text(row.get(key, "–")) for row in rows] for key in settings}
    for metric in metrics:
        columns[metric] = [_mean_and_spread(row, metric, places[metric]) for row in rows]
        of_metric = [f for f in figures if f.metric == metric]
        if of_metric:
            title = "published" if len(metrics) == 1 else f"published {metric}"
            columns[title] = [_figures_of(row["name"], of_metric) for row in rows]
    for key in ("n", "diverged", "failed"):
        if key == "n" or any(row.get(key) for row in rows):
            columns[key] = [str(row.get(key, 0)) for row in rows]
    notes = ["Mean ± standard deviation over n seeds."]
    notes += ["Diverged runs count in n and in the mean."] * ("diverged" in columns)
    notes += [
        f"Published {f.metric} of {f.name!r}: {f.value:g}, {f.source}." for f in figures if f.source
    ]
    return Table(
        tuple(columns), tuple(zip(*columns.values(), strict=True)), tuple(notes), tuple(rows)
    )


def _mean_and_spread(row: Mapping[str, Any], metric: str, places: int) -> str:
    if metric not in row:
        return "–"
    mean, spread, count = row[metric]
    text = f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if count > 1 else "")
    return text if count == row["n"] else f"{text} (n = {count})"


def _figures_of(name: str, figures: list[PublishedFigure]) -> str:
    return ", ".join(f"{f.value:g}" for f in figures if f.name == name) or "–"


def setting_text(value: Any) -> str:
    """A setting as it reads in a table or a legend."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Plots in one style, drawn from `Results` or from a saved results.csv alone.

Every function returns the Matplotlib figure. With `path` it is also written, whole or not at all,
at 150 dots per inch, and closed; without it, the figure stays open for
`matplotlib.pyplot.show()`.

All plots have these in common: colours that colour-blind readers can tell apart (petroff10), each
with its own marker; a setting keeps its colour in all plots of a study of up to ten settings;
means are thick, single seeds faint; the legend names the band and the number of seeds; published
figures are dashed, with their source in the legend. Matplotlib is imported when a plot is drawn.

Arguments with the same meaning everywhere:
    source: `Results`, or the path of results.json, results.csv or their folder.
    names: Settings to draw, at least one, in this order; default all.
    published: Published numbers, name -> metric -> figure or (figure, source), or a list of these,
        as in `Results.table`. One with the name of a drawn setting gets that setting's colour.
    labels: Metric, setting name, key or value -> text to show instead. Default: underscores become
        blanks, and accuracies and seconds get their unit.
    title: Title above the plot, in lines that fit its width; default none.
    path: File to write, .png, .pdf or .svg; default none.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from keras_norm._experiment_comparison import Floats, holm
from keras_norm._experiment_results import (
    Published,
    PublishedFigure,
    Results,
    published_figures,
    setting_text,
)
from keras_norm._experiment_run import Run
from keras_norm._files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "bars",
    "heatmap",
    "image_grid",
    "learning_curves",
    "lines",
    "matrix",
    "paired_differences",
    "style",
    "sweep",
    "trajectories",
]

Source = Results | str | os.PathLike[str]
Labels = Mapping[str, str]
PathLike = str | os.PathLike[str] | None

_MARKERS = "os^DvPX*<p"
_DASHES = [(0, (6, 3)), (0, (3, 2)), (0, (8, 2, 2, 2)), (0, (2, 1))]
_BAND = "mean, band: ± 1 standard deviation over n seeds"
_GREY = "#444444"
_NAME_WIDTH = 52  # characters in a line beside an axis
_DPI_MOVING = 72
_FRAMES_PER_SECOND = 12


# ---------------------------------------------------------------------------- house style


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The Matplotlib settings of these plots, for the length of a `with` block.

    Example:
        >>> from matplotlib import pyplot
        >>> from keras_norm.plotting import style
        >>> with style():
        ...     figure, axes = pyplot.subplots()
        >>> figure.get_dpi(), axes.spines["top"].get_visible()
        (100.0, False)
        >>> pyplot.close(figure)
    """
    import matplotlib
    from cycler import cycler

    colors = matplotlib.color_sequences["petroff10"]
    settings = {
        "axes.prop_cycle": cycler(color=colors) + cycler(marker=list(_MARKERS)),
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "figure.titlesize": 12,
        "font.size": 10,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "image.cmap": "cividis",
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.title_fontsize": 8.5,
        "lines.linewidth": 1.7,
        "lines.markersize": 4.5,
        "savefig.dpi": 150,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
    }
    with matplotlib.rc_context(settings):
        yield


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Applies the style; closes figures that an error leaves unfinished."""
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    try:
        with style():
            yield
    except BaseException:
        for number in set(pyplot.get_fignums()) - before:
            pyplot.close(number)
        raise


def finish(figure: Figure, path: PathLike, title: str | None = None) -> Figure:
    """Give the figure its title; with a path, write and close it.

    Raises:
        ValueError: The path is none of the three kinds of file. The figure is then closed too.
    """
    if title:
        _head(figure, title)
    if path is not None:
        from matplotlib import pyplot

        try:
            with replace_file(_checked(path)) as temporary:
                figure.savefig(temporary)
        finally:
            pyplot.close(figure)
    return figure


def _head(figure: Figure, title: str) -> None:
    """The title of a figure, in lines that fit its width."""
    widest = int(11 * figure.get_figwidth())  # characters in the size of the title
    figure.suptitle("\n".join(_wrapped(line, widest) for line in title.split("\n")))


def _checked(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"A plot is a .png, .pdf or .svg file. Received: path={str(path)!r}")
    return Path(path)


def _results(source: Source, names: Iterable[str] | None = None) -> tuple[Results, list[str]]:
    """The results, and the names to draw."""
    results = source if isinstance(source, Results) else Results.load(source)
    if not results.runs:
        raise ValueError("A plot needs at least one run. Received: results without runs.")
    chosen = None if names is None else list(names)
    if chosen == []:
        raise ValueError(
            f"`names` must name at least one setting, of {results.names}. Received: names=[]. "
            "Leave it out to draw all."
        )
    return results, results.select(chosen).names


def _colors(results: Results, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker per name: by its place in the study, as long as there are enough."""
    order = results.names if len(results.names) <= 10 else list(names)
    return {name: _look(order.index(name)) for name in names}


def _make_apart(looks: Mapping[str, dict[str, Any]]) -> None:
    """Make each line and marker smaller than the last, so that lines that coincide are visible."""
    shares = np.linspace(1, 0, len(looks)) if len(looks) > 1 else [0.5]
    for look, share in zip(looks.values(), shares, strict=True):
        look |= {"linewidth": 1.4 + 1.4 * share, "markersize": 4 + 3 * share}


def _look(index: int) -> dict[str, Any]:
    import matplotlib

    colors = matplotlib.color_sequences["petroff10"]
    return {"color": colors[index % 10], "marker": _MARKERS[(index + index // 10) % 10]}


def _label(key: Any, labels: Labels | None) -> str:
    """The text of an axis: a metric or the key of a setting, with its unit."""
    text = _words(key, labels)
    given = isinstance(key, str) and key in (labels or {})
    unit = "fraction" if text.endswith("accuracy") else "s" if text.endswith("seconds") else ""
    return f"{text} ({unit})" if unit and not given else text


def _words(key: Any, labels: Labels | None) -> str:
    """The text to show for a metric, a key or a value of a setting."""
    text = setting_text(key)
    return (labels or {}).get(text, text.replace("_", " "))


def _name(name: str, labels: Labels | None) -> str:
    return (labels or {}).get(name, name)


def _wrapped(text: str, letters: int) -> str:
    """The text, if a line is too long, in lines of at most `letters`, never breaking "n = 5"."""
    if all(len(line) <= letters for line in text.split("\n")):
        return text
    return textwrap.fill(text.replace(" = ", "\xa0=\xa0"), letters).replace("\xa0", " ")


def _legend(
    figure: Figure, handles: Sequence[Any], published: Sequence[Any] = (), note: str = ""
) -> None:
    """Draw a legend below the plots, titled with the band, and one of published figures below it.

    The figure grows by the height of the legends, so that the plots keep theirs.
    """
    blocks = [(list(handles), note), (list(published), "")]
    widest = int(13 * figure.get_figwidth()) - 7  # characters in a row
    for handle in (*handles, *published):
        handle.set_label(_wrapped(handle.get_label(), widest))
    sizes = [_legend_shape(entries, widest + 7) for entries, _ in blocks]
    heights = [
        (0.195 * lines + 0.21 * bool(title) + 0.09) if entries else 0.0  # inches
        for (lines, _), (entries, title) in zip(sizes, blocks, strict=True)
    ]
    height = figure.get_figheight() + sum(heights)
    figure.set_figheight(height)
    bottom = sum(heights) / height
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, bottom, 1, 1 - bottom))
    for (entries, title), (_, columns), own in zip(blocks, sizes, heights, strict=True):
        if entries:
            figure.legend(
                handles=entries,
                title=title or None,
                ncols=columns,
                loc="upper center",
                bbox_to_anchor=(0.5, bottom),
                borderaxespad=0.1,
            )
            bottom -= own / height


def _legend_shape(handles: Sequence[Any], letters: int) -> tuple[int, int]:
    """Lines and columns of a legend in a figure with room for so many characters per line."""
    if not handles:
        return 0, 1
    texts = [handle.get_label().split("\n") for handle in handles]
    longest = max(len(line) for lines in texts for line in lines)
    rows = math.ceil(len(handles) / max(1, min(4, int(letters / (longest + 7)))))
    columns = math.ceil(len(handles) / rows)
    heights = [max(map(len, texts[row::rows])) for row in range(rows)]  # filled column by column
    return sum(heights), columns


def _handle(label: str, **look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def _published_lines(
    panels: Mapping[str, Axes],
    published: Published | None,
    looks: Mapping[str, Mapping[str, Any]],
    labels: Labels | None,
    vertical: bool = False,
) -> list[Any]:
    """Draw a dashed line per published figure in its metric's panel; return the legend entries."""
    figures = [f for f in published_figures(published) if f.metric in panels]
    handles, drawn = [], Counter[str]()
    for figure in figures:
        known = figure.name in looks
        alike = f"{figure.metric} of {figure.name}" if known else "others"  # have the same colour
        color, dashes = looks[figure.name]["color"] if known else _GREY, _DASHES[drawn[alike] % 4]
        drawn[alike] += 1
        look: dict[str, Any] = {"color": color, "linestyle": dashes, "linewidth": 1.1}
        axes = panels[figure.metric]
        (axes.axvline if vertical else axes.axhline)(figure.value, **look, zorder=1.5)
        metric = f", {_words(figure.metric, labels)}" if len(panels) > 1 else ""
        handles.append(_handle(_published_text(figure, metric, labels), **look))
    return handles


def _published_text(figure: PublishedFigure, metric: str, labels: Labels | None) -> str:
    source = f" ({figure.source})" if figure.source else ""
    return f"published: {_name(figure.name, labels)}{metric} {figure.value:g}{source}"


def _mean_and_band(axes: Axes, x: npt.ArrayLike, values: Floats, look: Mapping[str, Any]) -> None:
    """Mean over the first axis of `values` (n, len(x)), and ± 1 standard deviation around it."""
    x = np.asarray(x)
    mean = values.mean(axis=0)
    every = max(1, math.ceil(len(x) / 10))  # about ten markers per line
    axes.plot(x, mean, markevery=every, **look)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(
            x, mean - spread, mean + spread, color=look["color"], alpha=0.18, linewidth=0
        )


def _count(runs: Sequence[Run]) -> str:
    """ "n = 5", or "n = 3, 2 diverged, 1 failed": n counts the runs in mean and band."""
    counts = Counter(run.status for run in runs)
    lost = [f", {counts[s]} {s}" for s in ("diverged", "failed") if counts[s]]
    return f"n = {counts['finished']}" + "".join(lost)


# ---------------------------------------------------------------------------- plots of results


def learning_curves(
    source: Source,
    metrics: str | Sequence[str],
    names: Sequence[str] | None = None,
    *,
    published: Published | None = None,
    labels: Labels | None = None,
    yscale: str = "linear",
    share_y: bool | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """Metrics against the epoch: mean over seeds and a band of ± 1 standard deviation.

    A panel per metric, a line per setting. Diverged runs stay out of mean and band: each is a thin
    line of its own that ends in a cross.

    Args:
        source: Results, or the path of saved ones.
        metrics: Metrics of the history.
        names: Settings to draw; default all.
        published: Published numbers, drawn as dashed lines.
        labels: Texts to show instead of names and metrics.
        yscale: "linear" (default) or "log".
        share_y: Whether the panels share the y axis; default: only if all metrics are accuracies.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure.

    Raises:
        ValueError: No run has the metric in its history; a name does not exist.

    Example:
        >>> from keras_norm import experiments, plotting
        >>> runs = [experiments.Run("plain", {}, seed, history={"loss": [2.0, 1.0 + seed]})
        ...         for seed in range(3)]
        >>> figure = plotting.learning_curves(experiments.Results(runs), "loss")
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('epoch', 'loss')
    """
    metrics = _metrics(metrics)
    results, names = _results(source, names)
    for metric in metrics:
        if not any(metric in run.history for run in results.select(names)):
            raise ValueError(
                "A learning curve needs a metric of the history, one of "
                f"{sorted({m for run in results for m in run.history})}. Received: {metric!r}."
            )
    if share_y is None:
        share_y = all(metric.endswith("accuracy") for metric in metrics)
    with _drawing():
        figure, panels = _panels(metrics, share_y)
        looks = _colors(results, names)
        _make_apart(looks)
        for metric, axes in panels.items():
            for name in names:
                _curves(axes, results, name, metric, looks[name])
            axes.set(xlabel="epoch", yscale=yscale)
            axes.set_ylabel(_label(metric, labels))
            _plain_numbers(axes)
            _ticks_at_epochs(axes, results.select(names), metric)
        of_name = {n: [r for r in results if r.name == n and _measures(r, metrics)] for n in names}
        handles = [
            _handle(f"{_name(n, labels)} ({_count(runs)})", **looks[n])
            for n, runs in of_name.items()
        ]
        finished = [[r for r in runs if r.status == "finished"] for runs in of_name.values()]
        several = [runs for runs in finished if len(runs) > 1]
        banded = any(len(run.epochs) > 1 for runs in several for run in runs)
        note = _BAND if banded else "mean over n seeds" if several else "one seed"
        dashed = _published_lines(panels, published, looks, labels)
        _legend(figure, handles, dashed, note)
        return finish(figure, path, title)


def _metrics(metrics: str | Sequence[str]) -> list[str]:
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    if not metrics:
        raise ValueError("A plot needs at least one metric. Received: metrics=[]")
    return metrics


def _measures(run: Run, metrics: Iterable[str]) -> bool:
    """Whether a run has a curve of one of the metrics; a run that failed early may have none."""
    return run.status == "failed" or any(metric in run.history for metric in metrics)


def _ticks_at_epochs(axes: Axes, results: Results, metric: str) -> None:
    """Put ticks at the points, if these are whole, few and far apart; else at whole numbers."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    measured = {epoch for run in results if metric in run.history for epoch in run.epochs}
    places = sorted(measured)
    few_and_whole = len(places) <= 10 and all(float(epoch).is_integer() for epoch in places)
    apart = all(step >= (places[-1] - places[0]) / 20 for step in np.diff(places))
    axes.xaxis.set_major_locator(
        FixedLocator(places) if few_and_whole and apart else MaxNLocator(integer=True)
    )


def _plain_numbers(axes: Axes) -> None:
    """Make a logarithmic y axis between .001 and 10,000 show 60, not 6×10¹."""
    if axes.get_yscale() != "log":
        return
    from matplotlib.ticker import LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):  # type: ignore[misc]
        def __call__(self, x: float, pos: int | None = None) -> str:
            text = str(super().__call__(x, pos))  # empty if there is no room
            low, high = sorted(axes.get_ylim())
            return f"{x:g}" if text and low >= 1e-3 and high <= 1e4 else text

    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))


def _panels(
    metrics: Sequence[str], share_y: bool, alone: tuple[float, float] = (6.0, 3.5)
) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel per metric; a single panel has the size `alone`, in inches."""
    from matplotlib import pyplot

    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    size = alone if len(metrics) == 1 else (4.0 * columns, 3.3 * rows + 0.2)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, sharey=share_y, squeeze=False)
    for unused in grid.flat[len(metrics) :]:
        unused.remove()
    return figure, dict(zip(metrics, grid.flat, strict=False))


def _curves(axes: Axes, results: Results, name: str, metric: str, look: Mapping[str, Any]) -> None:
    """Draw one setting in one panel."""
    runs = [r for r in results if r.name == name and metric in r.history]
    epochs, values = Results(runs).curves(name, metric) if runs else (np.empty(0), np.empty((0, 0)))
    runs = sorted((r for r in runs if r.status != "failed"), key=lambda r: r.seed)
    good = np.array([run.status == "finished" for run in runs], dtype=bool)
    whole = np.isfinite(values[good]).all(axis=0)  # epochs that all these seeds have
    if good.any() and whole.any():
        _mean_and_band(axes, epochs[whole], values[good][:, whole], look)
    for row in values[~good]:
        finite = np.isfinite(row)
        thin = {"color": look["color"], "linewidth": 0.8, "alpha": 0.7, "zorder": 1.8}
        axes.plot(epochs[finite], row[finite], marker="", **thin)
        axes.plot(epochs[finite][-1:], row[finite][-1:], marker="x", markersize=6, **thin)


def sweep(
    source: Source,
    x: str,
    metrics: str | Sequence[str],
    group: str | None = None,
    *,
    names: Sequence[str] | None = None,
    xscale: str = "log",
    yscale: str = "linear",
    published: Published | None = None,
    labels: Labels | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """Final metrics against a numeric setting: a line and band per group, each seed as a point.

    A panel per metric. Diverged runs stay out of mean and band: they are crosses in a strip at the
    bottom, with their number and the number of all runs at that x.

    Args:
        source: Results, or the path of saved ones.
        x: Key of a setting with numbers, such as "learning_rate".
        metrics: Metric, as in `Results.values`, or several of them.
        group: Key of the setting whose values make separate lines; default None, one line.
        names: Settings to draw; default all.
        xscale: "log" (default) or "linear".
        yscale: "linear" (default) or "log".
        published: Published numbers, drawn as dashed lines; a name that is the text of a group
            gives the line the colour of that group.
        labels: Texts to show instead of keys, values and metrics.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure.

    Raises:
        ValueError: A setting has no number `x`, or none above 0 for a logarithmic axis; two
            settings have the same x and group.

    Example:
        >>> from keras_norm import experiments, plotting
        >>> runs = [experiments.Run(f"rate {rate}", {"rate": rate}, seed, final={"accuracy": 0.8})
        ...         for rate in (0.1, 1.0) for seed in range(2)]
        >>> figure = plotting.sweep(experiments.Results(runs), "rate", "accuracy")
        >>> figure.axes[0].get_xscale()
        'log'
    """
    metrics = _metrics(metrics)
    results, names = _results(source, names)
    chosen = results.select(names)
    points = {metric: _sweep_points(chosen, x, metric, group) for metric in metrics}
    every = [p for groups in points.values() for line in groups.values() for p in line]
    if xscale == "log" and (least := min(p.x for p in every)) <= 0:
        raise ValueError(
            f"A logarithmic axis has places above 0 only. Received: {x}={least:g} in one of the "
            "settings. Pass xscale='linear', or leave that setting out with names=…."
        )
    with _drawing():
        figure, panels = _panels(metrics, False, alone=(6.6, 4.2))
        keys = dict.fromkeys(key for groups in points.values() for key in groups)
        looks = {key: _look(i) for i, key in enumerate(keys)}
        _make_apart(looks)
        for metric, axes in panels.items():
            groups = points[metric]
            for key, line in groups.items():
                _sweep_line(axes, line, looks[key])
            some = any(len(p.values) for line in groups.values() for p in line)
            axes.set(xscale=xscale, yscale=yscale if some else "linear", xlabel=_label(x, labels))
            axes.set_ylabel(_label(metric, labels))
            _plain_numbers(axes)
            if xscale == "log":
                _plain_ticks(axes, sorted({p.x for p in every}))
        handles = [_handle(_words(key, labels), **looks[key]) for key in keys]
        dashed = _published_lines(panels, published, looks, labels)
        for metric, axes in panels.items():
            _diverged_strip(axes, [(line, looks[key]) for key, line in points[metric].items()])
        counts = [len(p.values) for p in every if len(p.values)]
        fewest, most = min(counts, default=0), max(counts, default=0)
        n = f"{most}" if fewest == most else f"{fewest} to {most}"
        several = f"{_BAND.replace('n seeds', f'n = {n} seeds')}; faint points: single seeds"
        _legend(figure, handles, dashed, "one seed" if most == 1 else several)
        return finish(figure, path, title)


@dataclass(frozen=True)
class _Point:
    """One x of a sweep: the values of the runs that did not diverge, and how many did."""

    x: float
    values: Floats
    diverged: int
    total: int

    @property
    def mean(self) -> float:
        return float(self.values.mean()) if len(self.values) else math.nan

    @property
    def spread(self) -> float:
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0


def _sweep_points(
    results: Results, x: str, metric: str, group: str | None
) -> dict[str, list[_Point]]:
    """Group -> points, sorted by x."""
    places: dict[tuple[str, float], str] = {}
    groups: dict[str, list[_Point]] = {}
    for name in results.names:
        runs = [run for run in results if run.name == name]
        value = runs[0].setting(x)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"A sweep needs settings with a number under {x!r}. Received: {value!r} in "
                f"setting {name!r}. Choose the settings with names=…."
            )
        key = metric if group is None else setting_text(runs[0].setting(group))
        if (other := places.setdefault((key, value), name)) != name:
            raise ValueError(
                "A point of a sweep must be one setting. Received: "
                f"{other!r} and {name!r}, both with {x}={value!r} in group {key!r}. "
                "Choose the settings with names=…, or another group."
            )
        values = _finished_values(results, name, metric)
        total = len(results.seeds(name))
        point = _Point(value, values, _diverged(runs, metric), total)
        groups.setdefault(key, []).append(point)
    return {key: sorted(points, key=lambda p: p.x) for key, points in groups.items()}


def _plain_ticks(axes: Axes, places: Sequence[float]) -> None:
    """Put ticks at up to eight places of a logarithmic axis, as plain numbers: 250, not 2×10².

    An axis with more places than that, or with two that nearly coincide, gets powers of ten.
    """
    if len(places) > 8 or places[0] <= 0:
        return
    steps = np.diff(np.log(places))
    if len(steps) and steps.min() < steps.sum() / 12:
        return
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)


def _sweep_line(axes: Axes, points: Sequence[_Point], look: Mapping[str, Any]) -> None:
    x = np.array([point.x for point in points])
    mean = np.array([point.mean for point in points])
    spread = np.array([point.spread for point in points])
    axes.plot(x, mean, **look)
    axes.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.18, linewidth=0)
    for point in points:
        at = np.full(len(point.values), point.x)
        axes.plot(at, point.values, ".", color=look["color"], alpha=0.45, markersize=4, zorder=1.9)


def _diverged_strip(axes: Axes, lines: Sequence[tuple[list[_Point], Mapping[str, Any]]]) -> None:
    """Draw diverged runs as crosses below the data, in a row for each group that has any."""
    from matplotlib.patches import Rectangle

    lost = [([p for p in points if p.diverged], look) for points, look in lines]
    rows = [(points, look) for points, look in lost if points]
    if not rows:
        return
    step = 0.055  # of the height of the axes
    height = step * (len(rows) + 1)
    _make_room_below(axes, height)
    area: dict[str, Any] = {"transform": axes.transAxes, "color": "black", "linewidth": 0}
    axes.add_artist(Rectangle((0, 0), 1, height, alpha=0.05, **area))
    small: dict[str, Any] = {"fontsize": 7.5, "va": "center", "color": _GREY}
    place = axes.get_xaxis_transform()
    axes.text(0.01, height - step / 2, "diverged of all runs", transform=axes.transAxes, **small)
    for i, (points, look) in enumerate(rows):
        y = height - step * (i + 1.4)
        for p in points:
            cross = {"color": look["color"], "markersize": 6, "markeredgewidth": 1.6}
            axes.plot(p.x, y, "x", transform=place, **cross)
            count = f"{p.diverged}/{p.total}"
            right: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
            axes.annotate(count, (p.x, y), xycoords=place, **right, **small)


def _make_room_below(axes: Axes, share: float) -> None:
    """Extend the y axis so that its lowest `share` is free of data and ticks."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    scale = axes.yaxis.get_transform()
    bottom, top = scale.transform(np.array([low, high]))
    bottom = top - (top - bottom) / (1 - share)
    axes.set_ylim(bottom=scale.inverted().transform(np.array([bottom]))[0])
    axes.set_yticks(ticks)


def bars(
    source: Source,
    metric: str,
    names: Sequence[str] | None = None,
    *,
    published: Published | None = None,
    labels: Labels | None = None,
    from_zero: bool | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """A final metric of each setting: mean ± 1 standard deviation, and every seed as a point.

    Args:
        source: Results, or the path of saved ones.
        metric: Metric, as in `Results.values`. Diverged runs are left out and counted.
        names: Settings to draw, from top to bottom; default all.
        published: Published numbers: a dashed mark beside the setting of that name, a dashed line
            through the plot for other names. Several marks from one source share an entry of the
            legend.
        labels: Texts to show instead of names and the metric.
        from_zero: True: bars that start at 0. False: means as dots on an axis that fits the values,
            so that small differences show. Default: bars if the lowest mean is at most 70% of the
            highest, else dots.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure.

    Raises:
        ValueError: A name or the metric does not exist.

    Example:
        >>> from keras_norm import experiments, plotting
        >>> runs = [experiments.Run(name, {"norm": name}, seed, final={"accuracy": 0.8 + seed / 99})
        ...         for name in ("batch", "plain") for seed in range(3)]
        >>> figure = plotting.bars(experiments.Results(runs), "accuracy")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['batch (n = 3)', 'plain (n = 3)']
    """
    results, names = _results(source, names)
    values = {name: _finished_values(results, name, metric) for name in names}
    with _drawing():
        from matplotlib import pyplot

        counts = [_count([run for run in results if run.name == name]) for name in names]
        ticks = [
            _wrapped(f"{_name(n, labels)} ({c})", _NAME_WIDTH)
            for n, c in zip(names, counts, strict=True)
        ]
        height = _row_height(ticks, 0.42) * len(names)
        figure, axes = pyplot.subplots(figsize=(7.0, 0.9 + height))
        looks = _colors(results, names)
        means = [float(v.mean()) for v in values.values() if len(v)]
        if from_zero is None:
            from_zero = bool(means) and 0 <= min(means) <= 0.7 * max(means)
        for y, name in enumerate(names):
            _bar(axes, y, values[name], looks[name], from_zero)
        axes.set_yticks(range(len(names)), ticks)
        axes.set_ylim(len(names) - 0.4, -0.7)
        axes.margins(x=0.1)
        axes.set_xlabel(_label(metric, labels))
        axes.grid(visible=False, axis="y")
        handles = [_handle("single seeds", color=_GREY, marker=".", alpha=0.6, linestyle="")]
        marks = _published_marks(axes, metric, published, names, looks, labels)
        single = max(map(len, values.values()), default=0) == 1
        note = "one seed" if single else "mean ± 1 standard deviation over n seeds"
        _legend(figure, handles, marks, note)
        return finish(figure, path, title)


def _row_height(texts: Sequence[str], usual: float) -> float:
    """Inches for each setting beside an axis, with room for names that take several lines."""
    lines = max((text.count("\n") + 1 for text in texts), default=1)
    return max(usual, 0.17 * lines)


def _finished_values(results: Results, name: str, metric: str) -> Floats:
    """Finite values of the runs of a setting that did not diverge; empty if all did."""
    results.values(name, metric)  # raises if the metric is unknown
    finished = results.select(name, status="finished")
    values = finished.values(name, metric) if finished.runs else np.empty(0)
    return values[np.isfinite(values)]


def _diverged(runs: Sequence[Run], metric: str) -> int:
    """How many runs diverged, or finished with a value that is not a finite number."""
    return sum(
        run.status == "diverged"
        or (
            run.status == "finished"
            and metric in run.metrics
            and not np.isfinite(run.value(metric))
        )
        for run in runs
    )


def _bar(axes: Axes, y: int, values: Floats, look: Mapping[str, Any], from_zero: bool) -> None:
    if not len(values):
        return
    mean = values.mean()
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    color = look["color"]
    if from_zero:
        axes.barh(y, mean, height=0.6, color=color, alpha=0.45)
    else:
        axes.plot(mean, y, marker=look["marker"], color=color, markersize=7)
    axes.errorbar(mean, y, xerr=spread, color=color, capsize=4, linewidth=1.6, marker="")
    offsets = np.linspace(0.12, 0.24, len(values)) if len(values) > 1 else [0.18]
    axes.plot(values, y + np.asarray(offsets), ".", color=_GREY, alpha=0.6, markersize=4)
    _note(axes, _with_spread(mean, spread), mean, y)


def _with_spread(mean: float, spread: float) -> str:
    """The text "mean ± spread", to two digits of the spread."""
    if spread <= 1e-12 * abs(mean):  # rounding
        return f"{mean:.4g}"
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{places}f} ± {spread:.{places}f}"


def _note(axes: Axes, text: str, x: float, y: float) -> None:
    """Write a small text above a point, readable on any background."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    place: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
    axes.annotate(text, (x, y), fontsize=8, color=_GREY, path_effects=halo, **place)


def _published_marks(
    axes: Axes,
    metric: str,
    published: Published | None,
    names: Sequence[str],
    looks: Mapping[str, Mapping[str, Any]],
    labels: Labels | None,
) -> list[Any]:
    """Draw published figures of drawn settings as marks beside them, others as lines."""
    figures = [f for f in published_figures(published) if f.metric == metric]
    handles = []
    beside = [f for f in figures if f.name in names]
    of_source = Counter(figure.source for figure in beside)
    dashed: dict[str, Any] = {"linestyle": _DASHES[1], "linewidth": 1.6}
    for figure in beside:
        y, color = names.index(figure.name), looks[figure.name]["color"]
        # Not above its setting: the mean is written there.
        axes.plot([figure.value] * 2, [y - 0.12, y + 0.34], marker="", color=color, **dashed)
        if of_source[figure.source] == 1:
            text = _published_text(figure, "", labels)
            handles.append(_handle(text, color=color, **dashed))
    for source in (source for source, count in of_source.items() if count > 1):
        text = "published, each beside its setting" + (f" ({source})" if source else "")
        handles.append(_handle(text, color=_GREY, **dashed))
    others = {k: v for k, v in (published or {}).items() if k not in names}
    return handles + _published_lines({metric: axes}, others, looks, labels, vertical=True)


def paired_differences(
    source: Source,
    baseline: str,
    metric: str,
    names: Sequence[str] | None = None,
    *,
    labels: Labels | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """Difference of each setting from a baseline, seed by seed, with its 95% confidence interval.

    Args:
        source: Results, or the path of saved ones.
        baseline: Name of the setting that the others are compared with.
        metric: Metric, as in `Results.values`.
        names: The others, from top to bottom; default all.
        labels: Texts to show instead of names and the metric.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure. The p beside each difference is that of the paired t-test; if there are several
        differences, it is adjusted for their number by Holm's method, and the plot says so. The
        intervals are not adjusted.

    Raises:
        ValueError: As `Results.compare`; and without a setting besides the baseline.

    Example:
        >>> from keras_norm import experiments, plotting
        >>> runs = [experiments.Run(n, {"n": n}, s, final={"accuracy": a + s * s / 99})
        ...         for n, a in (("batch", 0.8), ("plain", 0.7)) for s in range(3)]
        >>> figure = plotting.paired_differences(experiments.Results(runs), "plain", "accuracy")
        >>> figure.axes[0].get_xlabel()
        'difference of accuracy (fraction) from plain'
    """
    results, names = _results(source, names)
    names = [name for name in names if name != baseline]
    if not names:
        raise ValueError(
            "There must be a setting besides `baseline` to compare with it. Received: "
            f"baseline={baseline!r} and no others. Name them in `names`."
        )
    tests = [results.compare(name, baseline, metric) for name in names]
    adjusted = holm([test.p for test in tests])
    p_text = "p by Holm" if len(tests) > 1 else "p ="
    with _drawing():
        from matplotlib import pyplot

        texts = [_wrapped(_name(name, labels), _NAME_WIDTH) for name in names]
        label = f"difference of {_label(metric, labels)} from {_name(baseline, labels)}"
        label = _wrapped(label, 62)
        height = _row_height(texts, 0.38) * len(names) + 0.17 * label.count("\n")
        figure, axes = pyplot.subplots(figsize=(7.6, 0.9 + height))
        looks = _colors(results, names)
        axes.axvline(0, color=_GREY, linewidth=1)
        for y, (name, test, p) in enumerate(zip(names, tests, adjusted, strict=True)):
            color, marker = looks[name]["color"], looks[name]["marker"]
            axes.plot([test.low, test.high], [y, y], color=color, marker="|", markersize=8)
            axes.plot(test.difference, y, color=color, marker=marker, markersize=7)
            singles = _differences(results, name, baseline, metric)
            axes.plot(singles, [y + 0.22] * len(singles), ".", color=_GREY, alpha=0.6, markersize=4)
            tested = test.untested or f"{p_text} {p:.2g}"
            text = f"{test.difference:+.4f}, {tested}, n = {test.n}"
            beside: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
            axes.annotate(text, (1.02, y), fontsize=8, color=_GREY, **beside)
        axes.set_yticks(range(len(names)), texts)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        handle = _handle("single seeds", color=_GREY, marker=".", alpha=0.6, linestyle="")
        note = "mean difference and its 95% confidence interval"
        if len(tests) > 1:
            note += f"; p adjusted for {len(tests)} differences (Holm), intervals not"
        _legend(figure, [handle], note=note)
        return finish(figure, path, title)


def _differences(results: Results, a: str, b: str, metric: str) -> list[float]:
    first, second = (
        dict(zip(results.seeds(n), results.values(n, metric), strict=True)) for n in (a, b)
    )
    return [float(first[seed] - second[seed]) for seed in first.keys() & second.keys()]


def heatmap(
    source: Source,
    x: str,
    y: str,
    metric: str,
    *,
    names: Sequence[str] | None = None,
    labels: Labels | None = None,
    digits: int = 3,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """Mean of a final metric over two settings, such as every subset of normalized layers.

    Args:
        source: Results, or the path of saved ones.
        x: Key of the setting along the columns.
        y: Key of the setting along the rows.
        metric: Metric, as in `Results.values`. Diverged runs are left out and counted.
        names: Settings to draw; default all.
        labels: Texts to show instead of keys, values and the metric.
        digits: Decimal places in the cells; default 3.
        limits: Least and greatest number of the colours, for plots that are to be compared; default
            those of the cells, but at least two standard deviations over seeds apart (their mean
            over the cells), so that chance does not look like a difference.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure. Numbers are in increasing order, other values in the order of the results. A
        cell without runs is empty.

    Raises:
        ValueError: Two settings belong to the same cell.

    Example:
        >>> from keras_norm import experiments, plotting
        >>> runs = [experiments.Run(f"{a}{b}", {"first": a, "last": b}, 0, final={"accuracy": 0.8})
        ...         for a in (False, True) for b in (False, True)]
        >>> figure = plotting.heatmap(experiments.Results(runs), "first", "last", "accuracy")
        >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
        ['false', 'true']
    """
    results, names = _results(source, names)
    cells: dict[tuple[str, str], str] = {}
    values: dict[str, dict[str, Any]] = {x: {}, y: {}}  # key -> text -> value
    for name in names:
        first = next(run for run in results if run.name == name)
        place = tuple(setting_text(first.setting(key)) for key in (x, y))
        for key, text in zip((x, y), place, strict=True):
            values[key][text] = first.setting(key)
        if (other := cells.setdefault((place[0], place[1]), name)) != name:
            raise ValueError(
                "A cell of a heat map must be one setting. Received: "
                f"{other!r} and {name!r}, both with {x}={place[0]}, {y}={place[1]}. "
                "Choose the settings with names=…."
            )
    columns, rows = (_in_order(values[key]) for key in (x, y))
    means, texts, spreads = np.full((len(rows), len(columns)), np.nan), {}, []
    for (column, row), name in cells.items():
        at = rows.index(row), columns.index(column)
        found = _finished_values(results, name, metric)
        runs = [run for run in results if run.name == name]
        if len(found):
            means[at] = found.mean()
        if len(found) > 1:
            spreads.append(found.std(ddof=1))
        texts[at] = _cell_text(found, _diverged(runs, metric), digits)
    return matrix(
        means,
        rows=[_words(row, labels) for row in rows],
        columns=[_words(column, labels) for column in columns],
        xlabel=_label(x, labels),
        ylabel=_label(y, labels),
        value=f"{_label(metric, labels)}, mean over seeds",
        texts=texts,
        limits=limits or _limits(means, spreads),
        title=title,
        path=path,
    )


def _limits(means: Floats, spreads: Sequence[float]) -> tuple[float, float] | None:
    """Wider limits of the colours, if the means span less than two mean spreads over seeds."""
    least = 2 * float(np.mean(spreads)) if spreads else 0.0
    if not spreads or np.nanmax(means) - np.nanmin(means) >= least:
        return None
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    return float(middle - least / 2), float(middle + least / 2)


def _in_order(values: Mapping[str, Any]) -> list[str]:
    numbers = all(isinstance(value, (int, float)) for value in values.values())
    return sorted(values, key=lambda text: values[text]) if numbers else list(values)


def _cell_text(values: Floats, lost: int, digits: int) -> str:
    lines = [f"{values.mean():.{digits}f}"] if len(values) else []
    if len(values) > 1:
        lines.append(f"± {values.std(ddof=1):.{digits}f}")
    return "\n".join([*lines, f"{lost} diverged"] if lost else lines)


# ---------------------------------------------------------------------------- plots of arrays


def matrix(
    values: npt.ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str = "",
    ylabel: str = "",
    value: str = "",
    texts: Mapping[tuple[int, int], str] | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """A matrix of numbers as coloured cells with their text, such as a confusion matrix.

    Args:
        values: Numbers (rows, columns); NaN leaves a cell empty.
        rows: Text of each row; other values, such as numbers, are shown as `str` writes them.
        columns: Text of each column, likewise.
        xlabel: What the columns are, with unit.
        ylabel: What the rows are, with unit.
        value: What the numbers are, with unit.
        texts: (row, column) -> text of a cell; default the number to three significant digits.
        limits: Least and greatest number of the colours; default those of the values.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure.

    Raises:
        ValueError: `values` is not a matrix of that many rows and columns.

    Example:
        >>> from keras_norm.plotting import matrix
        >>> figure = matrix([[9, 1], [2, 8]], rows=["cat", "dog"], columns=["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['9', '1', '2', '8']
    """
    array = np.asarray(values, dtype=np.float64)
    rows, columns = ([str(text) for text in given] for given in (rows, columns))
    if array.shape != (len(rows), len(columns)):
        raise ValueError(
            "values must have a row per text in `rows` and a column per text in `columns`. "
            f"Received: values.shape={array.shape}, {len(rows)} rows, {len(columns)} columns."
        )
    if texts is None:
        texts = {at: f"{number:.3g}" for at, number in np.ndenumerate(array) if number == number}
    with _drawing():
        from matplotlib import pyplot

        cell = 0.85 if any("\n" in text for text in texts.values()) else 0.6
        size = (max(2.6 + cell * len(columns), 4.0), max(1.5 + 0.75 * cell * len(rows), 3.0))
        figure, axes = pyplot.subplots(figsize=size)
        low, high = limits or (None, None)
        image = axes.imshow(array, aspect="auto", vmin=low, vmax=high)
        for (row, column), text in texts.items():
            red, green, blue, _ = image.cmap(image.norm(array[row, column]))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 and np.isfinite(array[row, column])
            color = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=color)
        longest = max(map(len, columns), default=0) * len(columns)
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(columns)), columns, **(turned if longest > 60 else {}))
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes)
        bar.set_label(_wrapped(value, int(11 * size[1]) - 2))  # characters beside it
        return finish(figure, path, title)


def lines(
    x: npt.ArrayLike,
    ys: Mapping[str, npt.ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    reference: Mapping[str, float] | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """A line plot in the style of this module.

    Args:
        x: Numbers (E,).
        ys: Name -> numbers (E,), drawn as a line; or (n, E), one row per seed, drawn as the mean
            over the first axis and a band of ± 1 standard deviation.
        xlabel: What x is, with unit.
        ylabel: What y is, with unit.
        xscale: "linear" (default) or "log".
        yscale: "linear" (default) or "log".
        reference: Text -> height of a dashed line.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure.

    Raises:
        ValueError: A line does not have one number for each x.

    Example:
        >>> from keras_norm.plotting import lines
        >>> figure = lines([1, 2], {"a": [3, 4]}, xlabel="step", ylabel="loss")
        >>> len(figure.axes[0].lines)
        1
    """
    x = np.asarray(x)
    arrays = {name: np.atleast_2d(np.asarray(y, dtype=np.float64)) for name, y in ys.items()}
    for name, array in arrays.items():
        if array.shape[1:] != x.shape:
            raise ValueError(
                "A line needs one number for each x. Received: "
                f"{name!r} of shape {np.shape(ys[name])} for x of shape {x.shape}."
            )
    with _drawing():
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        figure, axes = pyplot.subplots(figsize=(6.6, 4.0))
        handles = []
        for i, (name, array) in enumerate(arrays.items()):
            _mean_and_band(axes, x, array, _look(i))
            n = f" (n = {len(array)})" if np.ndim(ys[name]) == 2 else ""
            handles.append(_handle(f"{name}{n}", **_look(i)))
        for i, (text, height) in enumerate((reference or {}).items()):
            look = {"color": _GREY, "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.1}
            axes.axhline(height, **look)
            handles.append(_handle(text, **look))
        axes.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
        _plain_numbers(axes)
        if xscale == "linear" and np.issubdtype(x.dtype, np.number) and (x == x.round()).all():
            axes.xaxis.set_major_locator(
                MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10])
            )
        banded = any(len(array) > 1 for array in arrays.values())
        seeds = any(np.ndim(y) == 2 for y in ys.values())
        _legend(figure, handles, note=_BAND if banded else "one seed" if seeds else "")
        return finish(figure, path, title)


def trajectories(
    surfaces: Mapping[str, Callable[[Any, Any], Any]],
    paths: Mapping[str, Mapping[str, npt.ArrayLike]],
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    xlabel: str = "first weight",
    ylabel: str = "second weight",
    title: str | None = None,
    path: PathLike = None,
    animation: PathLike = None,
) -> Figure:
    """Paths of optimizers over loss surfaces of two weights, as a picture and as an animation.

    Args:
        surfaces: Text above a panel -> function of two arrays that returns the loss, positive
            except at its minimum; drawn as contours, each twice as high as the one inside it.
        paths: Text above a panel -> name -> points (T, 2), from the start on. A name looks the
            same in all panels; a cross marks the end of its path.
        xlim: Range of the first weight.
        ylim: Range of the second weight. Points outside are not drawn.
        xlabel: What the first weight is.
        ylabel: What the second weight is.
        title: Title; default none.
        path: File to write; default none.
        animation: .gif file to write as well, with a frame per point; default none.

    Returns:
        The figure.

    Raises:
        ValueError: A panel has no paths, points are not (T, 2), a loss is nowhere above 0 or not
            finite, `path` is none of the three kinds of file, or `animation` is not a .gif file.
            Then nothing is written.

    Example:
        >>> from keras_norm.plotting import trajectories
        >>> figure = trajectories(
        ...     {"bowl": lambda x, y: x**2 + y**2},
        ...     {"bowl": {"down": [[1, 1], [0.5, 0.5]]}},
        ...     xlim=(-1.5, 1.5),
        ...     ylim=(-1.5, 1.5),
        ... )
        >>> figure.axes[0].get_title()
        'bowl'
    """
    if animation is not None and Path(animation).suffix.lower() != ".gif":
        raise ValueError(f"An animation is a .gif file. Received: animation={str(animation)!r}")
    if path is not None:
        _checked(path)  # before the animation is written
    points = {panel: _points(panel, paths) for panel in surfaces}
    names = list(dict.fromkeys(name for drawn in points.values() for name in drawn))
    with _drawing():
        from matplotlib import pyplot

        size = (max(4.3 * len(surfaces), 5.0), 4.3)
        figure, grid = pyplot.subplots(1, len(surfaces), figsize=size, squeeze=False)
        drawn = []
        for axes, (panel, surface) in zip(grid.flat, surfaces.items(), strict=True):
            _contours(axes, panel, surface, xlim, ylim)
            for name, at in points[panel].items():
                look = _look(names.index(name))
                (line,) = axes.plot(*at.T, markevery=max(1, len(at) // 8), alpha=0.9, **look)
                end = {"color": look["color"], "markersize": 9, "markeredgewidth": 2.2, "zorder": 3}
                (cross,) = axes.plot(*at[-1:].T, "x", **end)
                drawn.append((line, cross, at))
            axes.set(xlim=xlim, ylim=ylim, xlabel=xlabel, ylabel=ylabel, title=panel)
        _legend(figure, [_handle(name, **_look(i)) for i, name in enumerate(names)])
        if title:
            _head(figure, title)
        if animation is not None:
            _animate(figure, drawn, animation)
        return finish(figure, path)


def _points(panel: str, paths: Mapping[str, Mapping[str, npt.ArrayLike]]) -> dict[str, Floats]:
    """The paths of one panel as arrays (T, 2)."""
    if not paths.get(panel):
        raise ValueError(
            "Each panel needs at least one path. "
            f"Received: panel {panel!r}, paths for {sorted(paths)}."
        )
    arrays = {name: np.asarray(at, dtype=np.float64) for name, at in paths[panel].items()}
    for name, at in arrays.items():
        if at.ndim != 2 or at.shape[1] != 2 or not len(at):
            raise ValueError(
                "A path must be points (T, 2), T >= 1. "
                f"Received: {name!r} of shape {at.shape} in panel {panel!r}."
            )
    return arrays


def _contours(
    axes: Axes, panel: str, surface: Any, xlim: tuple[float, float], ylim: tuple[float, float]
) -> None:
    x, y = np.meshgrid(np.linspace(xlim[0], xlim[1], 201), np.linspace(ylim[0], ylim[1], 201))
    height = np.asarray(surface(x, y), dtype=np.float64)
    if not 0 < height.max() < math.inf:
        raise ValueError(
            "A surface must be finite, and above 0 somewhere in its range: each contour is twice "
            f"as high as the one inside of it. Received: a maximum of {height.max():g} in panel "
            f"{panel!r}. Add a constant to the loss, or pass other limits."
        )
    top = math.ceil(math.log2(height.max()))
    levels = 2.0 ** np.arange(top - 11, top)
    look: dict[str, Any] = {"colors": _GREY, "linewidths": 0.6, "alpha": 0.45}
    axes.contour(x, y, height, levels=levels, **look)


def _animate(figure: Figure, drawn: Sequence[Any], path: str | os.PathLike[str]) -> None:
    """Write the paths as they grow; the lines are whole again afterwards.

    The fixed parts are drawn once, because axes and contours take most of the time of a frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    artists = [artist for line, cross, _ in drawn for artist in (line, cross)]
    kept, dpi = figure.canvas, figure.dpi
    figure.set_dpi(_DPI_MOVING)
    canvas = FigureCanvasAgg(figure)
    for artist in artists:
        artist.set_animated(True)
    canvas.draw()
    background, frames = canvas.copy_from_bbox(figure.bbox), []
    for length in range(1, max(len(at) for _, _, at in drawn) + 1):
        canvas.restore_region(background)
        for line, cross, at in drawn:
            line.set_data(*at[:length].T)
            cross.set_data(*at[:length][-1:].T)
        for artist in artists:
            artist.axes.draw_artist(artist)
        frames.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
    for artist in artists:
        artist.set_animated(False)
    figure.set_canvas(kept)
    figure.set_dpi(dpi)
    timing: dict[str, Any] = {"duration": round(1000 / _FRAMES_PER_SECOND), "loop": 0}
    with replace_file(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], **timing)


def image_grid(
    images: npt.ArrayLike,
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    title: str | None = None,
    path: PathLike = None,
) -> Figure:
    """Images side by side.

    Args:
        images: (N, H, W), (N, H, W, 1) or (N, H, W, 3); integers 0 … 255, or floats 0 … 1. Floats
            outside that range, as in standardized images, are scaled from their common least and
            greatest value to 0 … 1.
        titles: Text above each image; default none.
        columns: Images per row, at least 1; default up to 8.
        title: Title; default none.
        path: File to write; default none.

    Returns:
        The figure.

    Raises:
        ValueError: The shape is another one, there is not one title per image, or `columns` is not
            a whole number of at least 1.

    Example:
        >>> import numpy as np
        >>> from keras_norm.plotting import image_grid
        >>> figure = image_grid(np.zeros((3, 8, 8)), ["a", "b", "c"])
        >>> [axes.get_title() for axes in figure.axes]
        ['a', 'b', 'c']
    """
    array = _pixels(images)
    if titles is not None and len(titles) != len(array):
        raise ValueError(
            f"There must be one title per image. Received: {len(titles)} for {len(array)} images."
        )
    if columns is not None and (not isinstance(columns, numbers.Integral) or columns < 1):
        raise ValueError(
            "`columns` is how many images stand in a row, a whole number of at least 1, or None "
            f"for up to 8. Received: columns={columns!r}"
        )
    columns = min(len(array), columns or 8)
    rows = math.ceil(len(array) / columns)
    with _drawing():
        from matplotlib import pyplot

        size = (max(1.15 * columns, 2.5), (1.15 + (0.22 if titles is not None else 0)) * rows)
        figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        for axes in grid.flat[len(array) :]:
            axes.remove()
        for i, (axes, image) in enumerate(zip(grid.flat, array, strict=False)):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
            if titles is not None:
                axes.set_title(titles[i], fontsize=8)
        return finish(figure, path, title)


def _pixels(images: npt.ArrayLike) -> npt.NDArray[Any]:
    """Images as floats in [0, 1], (N, H, W) or (N, H, W, 3)."""
    array = np.asarray(images)
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]  # (N, H, W, 1) -> (N, H, W)
    if not len(array) or not (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3)):
        raise ValueError(
            "images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3) with N ≥ 1. "
            f"Received: images.shape={np.shape(images)}."
        )
    if array.dtype.kind in "iu":
        return array / 255.0
    array = array.astype(np.float64)
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if low < 0 or high > 1 else array

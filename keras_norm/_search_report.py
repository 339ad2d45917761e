"""The report of a search: a page, plots, and all trials as a table in CSV.

It reads only the folder, so it can be made at any time, even while the search is running.
"""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from keras_norm._files import replace_file
from keras_norm._search_run import describe
from keras_norm._search_settings import (
    SearchError,
    Settings,
    TrialRecord,
    is_number,
    read_search,
    require,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from keras_norm.tuning import Search

__all__ = ["importance", "own_seconds", "write_report"]

_GREY = "#9a9a9a"
_MOST_AXES = 8  # in the parallel coordinates
_MOST_BARS = 15  # in the plot of importance
_LEAST_FOR_IMPORTANCE = 12  # trials
_METRICS = ("val_accuracy", "val_loss", "accuracy", "loss", "seconds", "parameters", "flops")


def write_report(search: Search, out: Path) -> Path:
    """Writes index.html, PNGs and trials.csv into `out`; returns the path of the page."""
    scored = [t for t in search.trials if t.score is not None]
    if not scored:
        raise SearchError(f"No trial in {str(search.out)!r} has finished an epoch with success.")
    require("A report", "matplotlib")
    out.mkdir(parents=True, exist_ok=True)
    write_csv(search, out / "trials.csv")
    weights = importance(scored)
    compiling = " and compilation" if search.settings.scoring == "last" else ""
    figures: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("curves", _CURVES, lambda: _curves(search)),
        ("progress", _PROGRESS.format(compiling), lambda: _progress(search)),
        ("pareto", _PARETO, lambda: _pareto(search)),
        ("rates", _RATES, lambda: _rates(search)),
        ("parallel", _PARALLEL, lambda: _parallel(search, weights)),
        ("importance", _importance_text(weights, len(scored)), lambda: _importance(weights)),
    ]
    drawn = [(name, text) for name, text, draw in figures if _draw(out / f"{name}.png", draw)]
    page = out / "index.html"
    with replace_file(page) as temporary:
        temporary.write_text(_page(search, drawn), encoding="utf-8")
    return page


def write_csv(search: Search, path: Path) -> None:
    """One row for each trial, one column for each hyperparameter and metric."""
    names = list(dict.fromkeys(n for t in search.trials for n in t.values))
    header = ["trial", "status", "score", "epochs", "best_epoch", *_METRICS, *names, "reason"]
    with replace_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(header)
        for t in search.trials:
            metrics = ["" if (v := t.last(m)) is None else f"{v:.7g}" for m in _METRICS]
            score = "" if t.score is None else f"{t.score:.7g}"
            values = [t.values.get(n, "") for n in names]
            epochs = [t.epochs, t.best_epoch(search.settings) or ""]
            writer.writerow([t.number, t.status, score, *epochs, *metrics, *values, t.reason])


def own_seconds(trials: Sequence[TrialRecord]) -> dict[int, float]:
    """Number -> seconds of training that the trial took itself.

    A trial that Hyperband promotes has the epochs of an earlier one in its history; those were
    trained once. (If it could not resume from them, as on another machine, they are its own.)
    """
    numbered = {t.number: t for t in trials}
    found = {}
    for trial in trials:
        seconds = trial.last("seconds") or 0.0
        earlier = numbered.get(int(trial.values.get("tuner/trial_id", -1)))
        if earlier is not None:
            epoch = int(trial.values["tuner/initial_epoch"])
            before, inherited = (t.history.get("seconds", {}).get(epoch) for t in (earlier, trial))
            seconds -= before if before is not None and before == inherited else 0.0
        found[trial.number] = seconds
    return found


# Importance ---------------------------------------------------------------------------------


def importance(trials: Sequence[TrialRecord]) -> dict[str, tuple[float, float]]:
    """How much worse a random forest predicts the score without each hyperparameter.

    For each of five parts of the trials, a forest is fitted to the others; then the values of one
    hyperparameter are shuffled in the part. The importance is the rise of the mean squared error
    of the predictions, in units of the score's variance.

    Args:
        trials: with scores.

    Returns:
        Hyperparameter -> mean and standard deviation over the parts and ten shuffles, the largest
        mean first; under "" the forest's R² on the parts. Empty for less than 12 trials, or if all
        scores are equal.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold

    y = np.array([t.score for t in trials], dtype=float)
    columns = _columns(trials)
    if len(trials) < _LEAST_FOR_IMPORTANCE or np.ptp(y) == 0 or not columns:
        return {}
    x = np.column_stack([c for group in columns.values() for c in group.T])
    places = np.cumsum([0, *(group.shape[1] for group in columns.values())])
    rises: dict[str, list[float]] = {name: [] for name in columns}
    errors, rng = np.empty_like(y), np.random.default_rng(0)
    for rest, part in KFold(5, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(100, min_samples_leaf=2, random_state=0)
        forest.fit(x[rest], y[rest])
        errors[part] = (forest.predict(x[part]) - y[part]) ** 2
        for name, low, high in zip(columns, places[:-1], places[1:], strict=True):
            shuffled = np.tile(x[part], (10, 1, 1))  # (10, n, columns)
            for copy in shuffled:
                copy[:, low:high] = rng.permutation(copy[:, low:high])
            predicted = forest.predict(shuffled.reshape(-1, x.shape[1])).reshape(10, -1)
            worse = ((predicted - y[part]) ** 2).mean(axis=1)
            rises[name] += list((worse - errors[part].mean()) / y.var())
    found = {name: (float(np.mean(r)), float(np.std(r))) for name, r in rises.items()}
    ordered = dict(sorted(found.items(), key=lambda item: -item[1][0]))
    return {"": (1 - float(errors.mean() / y.var()), 0.0), **ordered}


def _columns(trials: Sequence[TrialRecord]) -> dict[str, npt.NDArray[np.float64]]:
    """Hyperparameter -> (N, columns): a number, or one column for each of its values."""
    found = {}
    for name in dict.fromkeys(n for t in trials for n in t.hyperparameters):
        values = [t.values.get(name) for t in trials]
        if len(set(map(str, values))) > 1:
            found[name] = _encoded(values)
    return found


def _encoded(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    numbers = [v for v in values if is_number(v)]
    if numbers and all(v is None or is_number(v) for v in values):
        scale = np.log10 if _is_logarithmic(numbers) else np.asarray
        middle = float(np.median(numbers))
        return np.asarray(scale([middle if v is None else v for v in values]))[:, None]
    kinds = sorted(set(map(str, values)))
    return np.array([[float(str(v) == kind) for kind in kinds] for v in values])


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) >= 16


# Plots --------------------------------------------------------------------------------------


def _draw(path: Path, draw: Callable[[], Figure | None]) -> bool:
    """Writes a plot; returns whether there was something to draw."""
    from keras_norm.plotting import finish, style

    with style():
        figure = draw()
        if figure is None:
            return False
        finish(figure, path)
    return True


def _axes(width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height))
    return figure, axes


def _words(name: str) -> str:
    return name.replace("_", " ")


def _metric(search: Search) -> str:
    """The metric that the plots show: the objective, or accuracy if the objective is a rate."""
    objective = search.settings.objective
    return "val_accuracy" if objective == "accuracy_per_second" else objective


def _label(metric: str) -> str:
    return {"val_loss": "validation loss"}.get(metric, "validation accuracy (fraction)")


_CURVES = (
    "The five best trials, and all others in grey; a cross marks where one was pruned or failed."
)


def _curves(search: Search) -> Figure:
    figure, axes = _axes()
    metric, best = _metric(search), search.best(5)
    for trial in search.trials:
        steps = trial.history.get(metric)
        if not steps:
            continue
        x = sorted(steps)
        y = [steps[e] for e in x]
        if trial in best:
            continue
        marker = "." if len(x) == 1 else ""  # a line through one point is invisible
        axes.plot(x, y, color=_GREY, linewidth=0.8, alpha=0.6, marker=marker, zorder=1)
        if trial.status in ("pruned", "failed"):
            axes.plot(x[-1:], y[-1:], "x", color=_GREY, markersize=5)
    for k, trial in zip((0, 1, 2, 4, 5), best, strict=False):  # C3 is another grey
        steps = trial.history[metric]
        x = sorted(steps)
        label = f"#{trial.number}  {_short(trial)}"
        axes.plot(x, [steps[e] for e in x], color=f"C{k}", label=label, zorder=2)
    axes.set(xlabel="epoch", ylabel=_label(metric))
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    figure.legend(loc="outside lower center", ncols=1)
    figure.set_size_inches(7.2, 5.6)
    return figure


def _short(trial: TrialRecord) -> str:
    """A trial's most important hyperparameters, for a legend."""
    names = ("family", "normalization", "optimizer", "learning_rate", "sgd_learning_rate")
    own = {n: v for n, v in trial.hyperparameters.items() if n in names}
    return describe(own or trial.hyperparameters).replace("learning_rate", "rate")[:70]


_PROGRESS = (
    "Each trial at the training time that had been spent when it ended, the trials in their order, "
    "and the best so far. (Training seconds of all workers together, without validation{}.)"
)


def _progress(search: Search) -> Figure:
    figure, axes = _axes()
    metric, sign = _metric(search), 1 if search.settings.direction == "max" else -1
    seconds = own_seconds(search.trials)
    spent, best, xs, ys = 0.0, -math.inf, [], []
    for trial in search.trials:
        spent += seconds[trial.number]
        value = trial.reached(metric, search.settings)
        if trial.score is None or value is None:
            continue
        marker = "x" if trial.status == "pruned" else "o"
        axes.plot([spent / 60], [value], marker, color=_GREY)
        best = max(best, sign * value)
        xs.append(spent / 60)
        ys.append(sign * best)
    axes.step(xs, ys, where="post", marker="", label="best so far")
    axes.plot([], [], "o", color=_GREY, label="trial")
    axes.plot([], [], "x", color=_GREY, label="pruned trial")
    axes.set(xlabel="training time spent (min)", ylabel=_label(metric))
    axes.legend(loc="best")
    return figure


_PARETO = (
    "Accuracy, seconds and parameters at once: nothing is better than one of the large points in "
    "one of the three without being worse in another."
)


def _pareto(search: Search) -> Figure | None:
    front = search.pareto()
    if not front:  # if all trials are pruned, there is none
        return None
    figure, axes = _axes()
    rest = [t for t in search.trials if t.score is not None and t not in front]

    def points(trials: Sequence[TrialRecord]) -> tuple[list[Any], list[Any], list[Any]]:
        return (
            [t.last("seconds") for t in trials],
            [t.reached("val_accuracy", search.settings) for t in trials],
            [t.last("parameters") for t in trials],
        )

    x, y, _ = points(rest)
    axes.plot(x, y, "o", color=_GREY, label="other trials")
    x, y, sizes = points(front)
    from matplotlib.colors import LogNorm

    low, high = min(sizes), max(sizes)
    norm = LogNorm(low, high if high > low else low * 1.1)
    drawn = axes.scatter(x, y, c=sizes, s=70, norm=norm, edgecolors="black", zorder=3)
    sides = [("left", (6, -9)), ("right", (-6, 4))]  # in turn, so that neighbours do not overlap
    for k, i in enumerate(np.argsort(x)):
        side, offset = sides[k % 2]
        axes.annotate(f"#{front[i].number}", (x[i], y[i]), xytext=offset, ha=side,
                      textcoords="offset points", fontsize=8)  # fmt: skip
    figure.colorbar(drawn, ax=axes, label="parameters")
    axes.set(xlabel="training (s)", ylabel=_label("val_accuracy"), xscale="log")
    _spread_ticks(axes)
    if rest:
        figure.legend(loc="outside upper right")
    return figure


_RATES = "Learning rate against accuracy, by normalization; one panel for each optimizer's range."


def _rates(search: Search) -> Figure | None:
    from matplotlib import pyplot

    metric = _metric(search)
    scored = [t for t in search.trials if t.score is not None]
    rates = [n for n in _columns(scored) if n.endswith("learning_rate")]
    if not rates:
        return None
    kinds = sorted({str(t.values.get("normalization", "")) for t in scored})
    figure, panels = pyplot.subplots(
        1, len(rates), figsize=(4.6 * len(rates) + 1, 4.4), sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], rates, strict=True):
        for k, kind in enumerate(kinds):
            own = [t for t in scored if str(t.values.get("normalization", "")) == kind]
            own = [t for t in own if name in t.values]
            x = [t.values[name] for t in own]
            y = [t.reached(metric, search.settings) for t in own]
            axes.plot(x, y, linestyle="", color=f"C{k}", marker="osD^vPX*<>"[k % 10], label=kind)
        axes.set(xlabel=_words(name), xscale="log")
        _spread_ticks(axes)
    panels[0][0].set_ylabel(_label(metric))
    if kinds != [""]:
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, title="normalization", loc="outside right center")
    return figure


def _spread_ticks(axes: Axes) -> None:
    """Labels a logarithmic axis without overlap: decades, or, if there are not two, also others."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def inside(*digits: int) -> list[float]:
        places = [float(f"{digit}e{power}") for power in powers for digit in digits]
        return [place for place in places if low <= place <= high]

    if len(inside(1)) >= 2:
        return
    places = inside(1, 2, 5)
    if len(places) < 2:
        places = [p for p in MaxNLocator(4).tick_values(low, high) if low <= p <= high]
    axes.set_xticks(places, [f"{place:g}" for place in places])


_PARALLEL = (
    "Each line is a trial, from its hyperparameters (the most important ones, on the left) to its "
    "score; bright lines are the best. A line has a gap where a trial has no such hyperparameter."
)


def _parallel(search: Search, weights: dict[str, tuple[float, float]]) -> Figure | None:
    import matplotlib

    scored = sorted((t for t in search.trials if t.score is not None), key=lambda t: t.score or 0)
    names = [n for n in weights if n] or list(_columns(scored))
    names = names[:_MOST_AXES]
    if not names or len(scored) < 2:
        return None
    figure, axes = _axes(1.2 * len(names) + 2.0, 5.0)
    scales = [_scale([t.values.get(n) for t in scored]) for n in names]
    scales.append(_scale([t.score for t in scored]))
    sign = 1 if search.settings.direction == "max" else -1
    scores = np.array([sign * float(t.score or 0) for t in scored])
    norm = matplotlib.colors.Normalize(np.quantile(scores, 0.1), scores.max())
    for trial, score in sorted(zip(scored, scores, strict=True), key=lambda pair: pair[1]):
        values = [*(trial.values.get(n) for n in names), trial.score]
        heights = [s[0](v) for s, v in zip(scales, values, strict=True)]
        color = matplotlib.colormaps["viridis"](norm(score))
        axes.plot(heights, color=color, linewidth=1.2, marker=".", alpha=0.9)
    for place, (_, ticks) in enumerate(scales):
        axes.axvline(place, color="black", linewidth=0.7, zorder=0)
        behind = {"color": "white", "alpha": 0.65, "pad": 0.6, "linewidth": 0}
        for height, text in ticks:
            axes.text(place + 0.04, height, text, fontsize=9.5, va="center", bbox=behind)
    labels = [*map(_words, names), _words(search.settings.objective)]
    axes.set_xticks(range(len(labels)), labels, rotation=28, ha="right", fontsize=10.5)
    axes.set(xlim=(-0.15, len(names) + 0.6), yticks=[])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    return figure


def _scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """A function from a value to its place between 0 and 1, NaN for none; and the axis marks."""
    present = [v for v in values if v is not None]
    if all(map(is_number, present)) and len(set(present)) > 1:
        scale = math.log if _is_logarithmic(present) else float
        low, high = scale(min(present)), scale(max(present))
        few = sorted(set(present)) if len(set(present)) <= 6 else [min(present), max(present)]

        def height(value: Any) -> float:
            return math.nan if value is None else (scale(value) - low) / (high - low)

        return height, [(height(v), f"{v:.3g}") for v in few]
    kinds = sorted(set(map(str, present)))
    places = {kind: i / max(1, len(kinds) - 1) for i, kind in enumerate(kinds)}
    return lambda v: math.nan if v is None else places[str(v)], [(p, k) for k, p in places.items()]


def _importance_text(weights: dict[str, tuple[float, float]], count: int) -> str:
    if not weights:
        return ""
    r2 = weights[""][0]
    text = (
        "How much a random forest's error in predicting the score rises when the values of one "
        f"hyperparameter are shuffled (five-fold, {count} trials, pruned ones with what they had "
        f"reached; bars: ± 1 standard deviation; at most {_MOST_BARS} are shown). "
        f"The forest's R² on trials that it had not seen is {r2:.2f}"
    )
    return text + (": it predicts nothing, so these bars mean nothing." if r2 <= 0 else ".")


def _importance(weights: dict[str, tuple[float, float]]) -> Figure | None:
    named = dict([(n, w) for n, w in weights.items() if n][:_MOST_BARS])
    if not named:
        return None
    figure, axes = _axes(6.4, 0.3 * len(named) + 1.2)
    names = list(named)[::-1]
    means, spreads = [named[n][0] for n in names], [named[n][1] for n in names]
    axes.barh(range(len(names)), means, xerr=spreads, color="C0", ecolor=_GREY, height=0.65)
    axes.set_yticks(range(len(names)), [_words(n) for n in names])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("rise of the squared error (of the score's variance)")
    return figure


# Page ---------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td { vertical-align: top }
img { max-width: 100% } p.note, figcaption { color: #555; font-size: .85rem }
figure { margin: 1rem 0 }
"""


def _page(search: Search, figures: list[tuple[str, str]]) -> str:
    settings = search.settings
    title = f"Search: {settings.data}, {settings.tuner}"
    pictures = "".join(
        f'<figure><img src="{name}.png" alt="{_escape(text)}"><figcaption>{_escape(text)}'
        "</figcaption></figure>"
        for name, text in figures
    )
    failed = [t for t in search.trials if t.status == "failed"]
    parts = [
        f"<h1>{_escape(title)}</h1>",
        _summary(search),
        "<h2>Best trials</h2>",
        _table(search.best(10), settings),
    ]
    if front := search.pareto():
        parts += ["<h2>Not beaten in accuracy, seconds and parameters at once</h2>"]
        parts.append(_table(front, settings))
    parts += ["<h2>Plots</h2>", pictures]
    if failed:
        rows = [[str(t.number), t.reason, describe(t.hyperparameters)] for t in failed]
        parts += ["<h2>Failed trials</h2>", _rows(["trial", "reason", "hyperparameters"], rows)]
    options = [[k, str(v)] for k, v in settings.to_dict().items() if v not in (None, {}, [])]
    parts += ["<h2>Settings</h2>", _rows(["option", "value"], options)]
    parts.append('<p><a href="trials.csv">All trials as CSV</a></p>')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(search: Search) -> str:
    count = {
        s: sum(t.status == s for t in search.trials)
        for s in ("completed", "pruned", "failed", "running")
    }
    seconds = sum(own_seconds(search.trials).values())
    best = search.best(1)[0]
    told = ", ".join(f"{n} {status}" for status, n in count.items() if n)
    machine = read_search(search.out)["machine"]["summary"]
    warning = (
        "The best score is the best of many on the same validation images, and so too high by "
        "chance: <code>keras-norm retrain</code> tests once."
    )
    return (
        f"<p>{len(search.trials)} trials: {told}; {seconds / 60:.1f} min of training. "
        f"{_escape(_words(search.settings.objective))} of the best, #{best.number}: "
        f"<b>{best.score:.4f}</b>.</p>"
        f'<p class="note">{warning} Machine: {_escape(machine)}.</p>'
    )


def _table(trials: Sequence[TrialRecord], settings: Settings) -> str:
    header = ["trial", "score", "val accuracy", "epochs", "best epoch", "s", "parameters"]
    header.append("hyperparameters")
    rows = [
        [
            f"{t.number}",
            f"{t.score:.4f}",
            f"{t.reached('val_accuracy', settings) or 0:.4f}",
            f"{t.epochs}",
            f"{t.best_epoch(settings) or ''}",
            f"{t.last('seconds') or 0:.1f}",
            f"{t.last('parameters') or 0:,.0f}",
            describe(t.hyperparameters),
        ]
        for t in trials
    ]
    return _rows(header, rows)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def numeric(text: str) -> bool:
        return text.replace(",", "").replace(".", "").replace("-", "").isdecimal()

    def cell(text: str, tag: str = "td", like: str | None = None) -> str:
        kind = ' class="n"' if numeric(text if like is None else like) else ""
        return f"<{tag}{kind}>{_escape(text)}</{tag}>"

    first = rows[0] if rows else header
    head = "".join(cell(h, "th", like) for h, like in zip(header, first, strict=True))
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _escape(text: str) -> str:
    return html.escape(text)

"""Plots: they draw the numbers they are given, from the csv alone, and all can be read."""

# ruff: noqa: E402 -- the other backends' environments hold no Matplotlib

import math
import os
import subprocess
import sys

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.colors import to_hex
from PIL import Image

from keras_norm import plotting
from keras_norm.experiments import Results, Run

EPOCHS = 6


@pytest.fixture(autouse=True)
def fixed_seeds(monkeypatch):
    """No plot may open a window, and none may change Matplotlib's settings."""

    def refuse(*args, **kwargs):
        raise AssertionError("a plot was shown")

    monkeypatch.setattr(pyplot, "show", refuse)
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    pyplot.close("all")


def study(names=("batch", "plain"), seeds=4, diverged=()):
    """Curves that rise, a little different for each seed; some runs diverge half way."""
    rng = np.random.default_rng(3)
    runs = []
    for i, name in enumerate(names):
        for seed in range(seeds):
            accuracy = 0.9 - 0.1 * i - 0.5 ** np.arange(1, EPOCHS + 1) + rng.normal(0, 0.01, EPOCHS)
            loss = 1 - accuracy
            lost = (name, seed) in diverged
            if lost:
                loss[3:], accuracy[3:] = math.nan, 0.1
            history = {"loss": loss.tolist(), "test_accuracy": accuracy.tolist()}
            final = {"test_accuracy": float(accuracy[-1])}
            settings = {"norm": name, "layers": {"first": i % 2, "last": i // 2}}
            status = "diverged" if lost else "finished"
            runs.append(Run(name, settings, seed, status, history=history, final=final))
    return Results(runs, title="Study")


def rates(groups=("batch", None), seeds=3):
    """A sweep: accuracy against the rate; at the largest rate runs without norm diverge."""
    rng = np.random.default_rng(4)
    runs = []
    for group in groups:
        for rate in (0.01, 0.1, 1.0):
            for seed in range(seeds):
                lost = group is None and rate == 1.0 and seed > 0
                value = 0.1 if lost else 0.8 + 0.05 * math.log10(rate) + rng.normal(0, 0.01)
                runs.append(
                    Run(
                        f"{group} {rate}",
                        {"norm": group, "rate": rate},
                        seed,
                        "diverged" if lost else "finished",
                        final={"accuracy": value},
                    )
                )
    return Results(runs)


def content(figure):
    """Everything a figure says: lines, bands, bars, images and texts."""
    figure.canvas.draw()
    said = []
    for axes in figure.axes:
        said += [axes.get_xlim(), axes.get_ylim(), axes.get_xlabel(), axes.get_ylabel()]
        said += [(line.get_xydata().tolist(), line.get_color()) for line in axes.lines]
        said += [path.vertices.tolist() for c in axes.collections for path in c.get_paths()]
        said += [patch.get_path().vertices.tolist() for patch in axes.patches]
        said += [image.get_array().tolist() for image in axes.images]
        said += [text.get_text() for text in axes.texts]
        said += [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    said += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return repr(said)


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


PLOTS = {
    "learning_curves": lambda s: plotting.learning_curves(s, ["loss", "test_accuracy"]),
    "bars": lambda s: plotting.bars(s, "test_accuracy"),
    "paired_differences": lambda s: plotting.paired_differences(s, "plain", "test_accuracy"),
    "heatmap": lambda s: plotting.heatmap(s, "layers.first", "layers.last", "test_accuracy"),
    "sweep": lambda s: plotting.sweep(s, "layers.first", "test_accuracy", "norm", xscale="linear"),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_is_redrawn_from_the_csv_alone(tmp_path, plot):
    results = study(("batch", "plain", "layer"), diverged={("layer", 1), ("layer", 3)})
    results.save(tmp_path)
    first = content(PLOTS[plot](results))
    assert len(first) > 500
    (tmp_path / "results.json").unlink()
    assert content(PLOTS[plot](tmp_path / "results.csv")) == first
    assert content(PLOTS[plot](str(tmp_path))) == first


# ------------------------------------------------------------------ learning curves


def test_learning_curves_draw_mean_and_sample_deviation():
    results = study()
    axes = plotting.learning_curves(results, "test_accuracy").axes[0]
    for i, name in enumerate(results.names):
        values = np.array([r.history["test_accuracy"] for r in results if r.name == name])
        np.testing.assert_array_equal(axes.lines[i].get_xdata(), np.arange(1, EPOCHS + 1))
        np.testing.assert_allclose(axes.lines[i].get_ydata(), values.mean(0), rtol=1e-12)
        band = axes.collections[i].get_paths()[0].vertices
        for epoch in range(EPOCHS):
            heights = band[band[:, 0] == epoch + 1, 1]
            spread = values[:, epoch].std(ddof=1)
            assert heights.max() - heights.min() == pytest.approx(2 * spread, rel=1e-9)


def test_diverged_runs_stay_out_of_the_mean_and_are_drawn():
    results = study(diverged={("plain", 0), ("plain", 2)})
    figure = plotting.learning_curves(results, ["test_accuracy"])
    axes = figure.axes[0]
    assert legend_texts(figure) == ["batch (n = 4)", "plain (n = 2, 2 diverged)"]
    good = [r.history["test_accuracy"] for r in results if r.name == "plain" and r.seed in (1, 3)]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), np.mean(good, axis=0), rtol=1e-12)
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[EPOCHS, 0.1]]] * 2
    loss = plotting.learning_curves(results, ["loss"]).axes[0]
    crosses = [line for line in loss.lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[3]] * 2  # the last finite value


def test_all_diverged_and_single_seed_and_ragged_epochs():
    figure = plotting.learning_curves(study(diverged={("plain", s) for s in range(4)}), "loss")
    assert legend_texts(figure)[1] == "plain (n = 0, 4 diverged)"
    figure = plotting.learning_curves(study(seeds=1), "loss")
    assert figure.axes[0].collections[:] == []  # one run has no band
    assert figure.legends[0].get_title().get_text() == "one seed"
    figure = plotting.sweep(rates(seeds=1), "rate", "accuracy", group="norm")
    assert figure.legends[0].get_title().get_text() == "one seed"
    figure = plotting.bars(study(seeds=1), "test_accuracy")
    assert figure.legends[0].get_title().get_text() == "one seed"
    figure = plotting.lines([1, 2], {"a": [[3, 4]]}, xlabel="", ylabel="")
    assert figure.legends[0].get_title().get_text() == "one seed"
    assert legend_texts(figure) == ["a (n = 1)"]
    runs = [
        Run("a", {}, 0, history={"loss": [3.0, 2.0, 1.0], "val_loss": [None, 1.0, None]}),
        Run("a", {}, 1, history={"loss": [5.0, 4.0], "val_loss": [None, 3.0]}),
    ]
    figure = plotting.learning_curves(Results(runs), ["loss", "val_loss"])
    means = [axes.lines[0].get_xydata().tolist() for axes in figure.axes]
    assert means == [[[1, 4], [2, 3]], [[2, 2]]]  # epochs that all seeds have


@pytest.mark.parametrize(
    ("epochs", "ticks"),
    [
        ((5, 10, 15, 20, 25), [5, 10, 15, 20, 25]),
        (range(1, 11), list(range(1, 11))),
        (range(1, 31), None),
        ((0, 0.5, 1, 1.5), None),
        ((1, 2, 3, 5, 10, 20, 50, 100, 200), None),
    ],
)
def test_ticks_are_where_the_epochs_are_if_those_are_few_and_whole(epochs, ticks):
    history = {"loss": [1.0] * len(epochs)}
    runs = [Run("a", {}, seed, epochs=tuple(epochs), history=history) for seed in (0, 1)]
    axes = plotting.learning_curves(Results(runs), "loss").axes[0]
    assert (axes.get_xticks().tolist() == ticks) == bool(ticks)


@pytest.mark.parametrize(
    ("values", "seen"), [((25.0, 70.0), "60"), ((0.5, 0.9), "0.6"), ((1e-7, 1.0), None)]
)
def test_a_logarithmic_axis_has_plain_numbers_where_they_are_short(values, seen):
    runs = [Run("a", {}, seed, history={"loss": list(values)}) for seed in (0, 1)]
    figure = plotting.learning_curves(Results(runs), "loss", yscale="log")
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    texts = [t.get_text() for t in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))]
    assert any("times" in text or "^" in text for text in texts) == (seen is None)
    assert seen is None or seen in texts


def test_runs_without_the_metric_or_with_one_epoch():
    runs = [Run("a", {}, s, history={"acc": [0.1, 0.2 + s]}) for s in range(2)]
    runs.append(Run("a", {}, 2, history={"loss": [1.0, 2.0]}))
    figure = plotting.learning_curves(Results(runs), "acc")
    assert legend_texts(figure) == ["a (n = 2)"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.1, 0.7])
    once = [Run("a", {}, s, history={"acc": [0.1 + s]}) for s in range(2)]
    figure = plotting.learning_curves(Results(once), "acc")
    assert figure.legends[0].get_title().get_text() == "mean over n seeds"
    for empty in (lambda: plotting.learning_curves(Results(once), []),
                  lambda: plotting.sweep(rates(), "rate", [])):  # fmt: skip
        with pytest.raises(ValueError, match=r"Received: metrics=\[\]"):
            empty()


def test_failed_runs_have_not_diverged():
    def lost(seed, status="failed"):
        return Run("a", {"x": 1.0, "y": 1}, seed, status)

    runs = Results([Run("a", {"x": 1.0, "y": 1}, 0, final={"m": 0.5}), lost(1), lost(2)])
    assert plotting.heatmap(runs, "x", "y", "m").axes[0].texts[0].get_text() == "0.500"
    assert not plotting.sweep(runs, "x", "m").axes[0].texts
    ticks = plotting.bars(runs, "m").axes[0].get_yticklabels()
    assert [t.get_text() for t in ticks] == ["a (n = 1, 2 failed)"]
    without = Results([*runs.runs[:1], lost(1, "finished")])
    assert not plotting.sweep(without, "x", "m").axes[0].texts
    plotting.bars(Results([lost(1), Run("b", {}, 0, final={"m": 0.5})]), "m")


def test_an_error_leaves_no_figure_open():
    from matplotlib import pyplot

    pyplot.close("all")
    with pytest.raises(ValueError, match="yscale"):
        plotting.lines([1, 2], {"a": [3, 4]}, xlabel="", ylabel="", yscale="yscale")
    with pytest.raises(ValueError, match="'published' must map"):
        plotting.bars(study(), "test_accuracy", published={"a": 0.5})
    assert not pyplot.get_fignums()


def test_published_figures_are_dashed_and_named():
    published = {
        "plain": {"test_accuracy": (0.824, "a book")},
        "built in": {"test_accuracy": [(0.761, "a reader"), 0.7], "other": 1.0},
    }
    figure = plotting.learning_curves(study(), "test_accuracy", published=published)
    axes = figure.axes[0]
    dashed = [line for line in axes.lines if line.is_dashed()]
    assert [line.get_ydata()[0] for line in dashed] == [0.824, 0.761, 0.7]
    assert dashed[0].get_color() == axes.lines[1].get_color()  # that of the setting
    assert dashed[1].get_color() == dashed[2].get_color() == plotting._GREY
    assert dashed[1]._dash_pattern != dashed[2]._dash_pattern
    assert legend_texts(figure)[2:] == [
        "published: plain 0.824 (a book)",
        "published: built in 0.761 (a reader)",
        "published: built in 0.7",
    ]


def test_labels_and_units():
    figure = plotting.learning_curves(
        study(),
        ["loss", "test_accuracy"],
        labels={"loss": "cross-entropy (nats)", "plain": "without"},
        title="Curves",
    )
    assert [a.get_ylabel() for a in figure.axes] == [
        "cross-entropy (nats)",
        "test accuracy (fraction)",
    ]
    assert {a.get_xlabel() for a in figure.axes} == {"epoch"}
    assert legend_texts(figure) == ["batch (n = 4)", "without (n = 4)"]
    assert figure.legends[0].get_title().get_text() == (
        "mean, band: ± 1 standard deviation over n seeds"
    )
    assert figure.get_suptitle() == "Curves"


def test_unknown_metric_or_name():
    with pytest.raises(ValueError, match=r"one of \['loss', 'test_accuracy'\]. Received: 'acc'"):
        plotting.learning_curves(study(), "acc")
    with pytest.raises(ValueError, match="Received: name='typo'"):
        plotting.learning_curves(study(), "loss", ["typo"])
    with pytest.raises(ValueError, match="at least one run"):
        plotting.learning_curves(Results(), "loss")
    assert pyplot.get_fignums() == []


# ------------------------------------------------------------------ looks and layout


@pytest.mark.parametrize(
    "plot",
    [
        lambda **names: plotting.learning_curves(study(), "test_accuracy", **names),
        lambda **names: plotting.sweep(rates(), "rate", "accuracy", "norm", **names),
        lambda **names: plotting.bars(study(), "test_accuracy", **names),
        lambda **names: plotting.paired_differences(study(), "plain", "test_accuracy", **names),
        lambda **names: plotting.heatmap(rates(), "rate", "norm", "accuracy", **names),
    ],
)
def test_no_names(plot):
    with pytest.raises(ValueError, match=r"`names` must .*, of \['.*Received: names=\[\]"):
        plot(names=[])


def test_colours_are_petroff10_and_each_has_a_marker():
    names = [f"setting {i}" for i in range(10)]
    lines = plotting.learning_curves(study(names), "loss").axes[0].lines
    colors = [to_hex(line.get_color()) for line in lines]
    assert colors == [to_hex(c) for c in matplotlib.color_sequences["petroff10"]]
    assert len({line.get_marker() for line in lines}) == 10


def test_a_setting_keeps_its_colour():
    results = study(("a", "b", "c"))
    every = plotting.learning_curves(results, "loss").axes[0].lines
    one = plotting.learning_curves(results, "loss", ["c"]).axes[0].lines
    assert one[0].get_color() == every[2].get_color()
    dots = plotting.bars(results, "test_accuracy", ["c", "a"]).axes[0].lines
    assert dots[0].get_color() == every[2].get_color()
    many = study([f"setting {i}" for i in range(20)], seeds=2)
    two = plotting.learning_curves(many, "loss", ["setting 4", "setting 14"]).axes[0].lines
    assert two[0].get_color() != two[1].get_color()


def assert_apart_and_whole(blocks, figure):
    for i, block in enumerate(blocks):
        assert block.x0 >= 0
        assert block.y0 >= 0
        assert block.x1 <= figure.bbox.x1
        assert block.y1 <= figure.bbox.y1
        assert not any(overlaps(block, other) for other in blocks[i + 1 :])


def overlaps(a, b):
    return a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1


@pytest.mark.parametrize("plot", ["learning_curves", "bars", "paired_differences"])
def test_long_names_and_sources_are_wrapped(plot):
    names = [f"{'a setting that somebody has given a very long name, ' * 2}{i}" for i in range(3)]
    source = "a report whose title takes many more words than there is room for in one row, 2026"
    runs = study(names)
    if plot == "paired_differences":
        figure = plotting.paired_differences(runs, names[0], "test_accuracy")
    else:
        draw = plotting.learning_curves if plot == "learning_curves" else plotting.bars
        published = {"theirs": {"test_accuracy": (0.8, source)}}
        figure = draw(runs, "test_accuracy", published=published)
    figure.canvas.draw()
    blocks = [a.get_tightbbox() for a in figure.axes]
    blocks += [legend.get_window_extent() for legend in figure.legends]
    for i, block in enumerate(blocks):
        assert block.x0 >= 0
        assert block.x1 <= figure.bbox.x1
        assert not any(overlaps(block, other) for other in blocks[i + 1 :])
    assert figure.axes[0].get_window_extent().width > 150


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("metrics", [["loss"], ["loss", "test_accuracy"], ["loss"] * 4])
def test_nothing_overlaps_and_nothing_is_cut_off(count, metrics):
    names = [f"setting number {i}" for i in range(count)]
    runs = []
    for run in study(names, seeds=2):
        history = {f"{metric}_{i}": run.history[metric] for i, metric in enumerate(metrics)}
        runs.append(Run(run.name, run.settings, run.seed, history=history))
    source = "a source that takes many words to name"
    published = {n: {"loss_0": (0.3, source)} for n in (names[0], "someone else's net")}
    figure = plotting.learning_curves(
        Results(runs), runs[0].metrics, published=published, title="A title"
    )
    figure.canvas.draw()
    axes = [a.get_tightbbox() for a in figure.axes]
    blocks = [*axes, *(legend.get_window_extent() for legend in figure.legends)]
    blocks.append(figure._suptitle.get_window_extent())
    assert_apart_and_whole(blocks, figure)
    heights = {round(a.get_window_extent().height) for a in figure.axes}
    assert min(heights) > 180  # legends take no room from the plots


def test_files(tmp_path):
    path = tmp_path / "plots" / "curves.png"
    figure = plotting.learning_curves(study(), "loss", path=path)
    assert pyplot.get_fignums() == []
    with Image.open(path) as image:
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert image.size == tuple(int(150 * inches) for inches in figure.get_size_inches())
        assert len(np.unique(np.asarray(image.convert("L")))) > 50  # something is drawn
    plotting.lines([1, 2], {"a": [1, 2]}, xlabel="x", ylabel="y", path=tmp_path / "plots" / "a.svg")
    assert (tmp_path / "plots" / "a.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert sorted(os.listdir(path.parent)) == ["a.svg", "curves.png"]


def test_a_failed_write_leaves_the_old_plot(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_text("old")
    before = pyplot.get_fignums()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        plotting.learning_curves(study(), "loss", path=path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["curves.png"]
    assert pyplot.get_fignums() == before
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg file. Received: path='x.jpg'"):
        plotting.learning_curves(study(), "loss", path="x.jpg")
    assert pyplot.get_fignums() == []
    monkeypatch.undo()
    plotting.learning_curves(study(), "loss", path=tmp_path / "X.PNG")
    assert (tmp_path / "X.PNG").read_bytes()[1:4] == b"PNG"


def test_without_a_path_the_figure_stays_open():
    figure = plotting.learning_curves(study(), "loss")
    assert pyplot.get_fignums() == [figure.number]


def test_import_is_light():
    code = "import sys, keras_norm.plotting; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------ sweep


def test_sweep_draws_means_bands_and_seeds():
    results = rates()
    figure = plotting.sweep(results, "rate", "accuracy", "norm", labels={"none": "no norm"})
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert legend_texts(figure) == ["batch", "no norm"]
    values = [results.values(f"batch {rate}", "accuracy") for rate in (0.01, 0.1, 1.0)]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.mean(values, axis=1), rtol=1e-12)
    points = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
    assert points[:3] == [v.tolist() for v in values]
    band = axes.collections[0].get_paths()[0].vertices
    heights = band[band[:, 0] == 0.1, 1]
    spread = np.std(values[1], ddof=1)
    assert heights.max() - heights.min() == pytest.approx(2 * spread, rel=1e-9)


def test_lines_of_a_sweep_that_coincide_stay_visible():
    axes = plotting.sweep(rates(("a", "b", "c")), "rate", "accuracy", group="norm").axes[0]
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    widths = [line.get_linewidth() for line in lines]
    markers = [line.get_markersize() for line in lines]
    assert len(lines) == 3
    assert widths == sorted(set(widths), reverse=True)
    assert markers == sorted(set(markers), reverse=True)


def test_sweep_has_a_panel_for_each_metric():
    runs = [
        Run(
            r.name, r.settings, r.seed, r.status, final={**r.final, "loss": 1 - r.final["accuracy"]}
        )
        for r in rates()
    ]
    figure = plotting.sweep(Results(runs), "rate", ["loss", "accuracy"], "norm")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy (fraction)"]
    assert legend_texts(figure) == ["batch", "none"]
    (alone,) = plotting.sweep(Results(runs), "rate", "loss", "norm").axes
    for line, same in zip(figure.axes[0].lines, alone.lines, strict=True):
        assert line.get_color() == same.get_color()
        if line.get_marker() != "x":  # those stand in the strip, whose height is of the axes
            np.testing.assert_array_equal(line.get_xydata(), same.get_xydata())


def test_sweep_counts_diverged_runs_below_the_data():
    figure = plotting.sweep(rates(), "rate", "accuracy", "norm")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == ["diverged of all runs", "2/3"]
    cross = next(line for line in axes.lines if line.get_marker() == "x")
    assert cross.get_xdata()[0] == 1.0
    assert cross.get_color() == plotting._look(1)["color"]
    strip = axes.patches[0].get_window_extent()
    y_of_cross = cross.get_transform().transform(cross.get_xydata())[0, 1]
    assert strip.y0 < y_of_cross < strip.y1
    drawn = [line for line in axes.lines if line.get_marker() != "x"]
    lowest = min(axes.transData.transform(line.get_xydata())[:, 1].min() for line in drawn)
    assert lowest > strip.y1
    assert min(axes.get_yticks()) > axes.get_ylim()[0]
    alone = next(line for line in axes.lines if line.get_color() == cross.get_color())
    survivor = rates().values("None 1.0", "accuracy")[0]
    assert alone.get_ydata()[-1] == survivor
    assert "over n = 1 to 3 seeds" in figure.legends[0].get_title().get_text()


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        ((250, 500, 2000), ["250", "500", "2000"]),
        ((0.01, 0.1, 1.0), ["0.01", "0.1", "1"]),
        ((1, 1.1, 1000), None),  # two would be printed on each other
        (range(1, 10), None),
    ],
)
def test_sweep_over_a_few_places_of_a_logarithmic_axis_has_plain_ticks(places, shown):
    runs = [Run(f"{x}", {"x": x}, s, final={"m": float(s)}) for x in places for s in range(2)]
    axes = plotting.sweep(Results(runs), "x", "m").axes[0]
    texts = [tick.get_text() for tick in axes.get_xticklabels() if tick.get_text()]
    assert axes.get_xscale() == "log"
    assert (texts == shown) if shown else any("10" in text for text in texts)
    assert (len(axes.get_xticks(minor=True)) == 0) == bool(shown)


def test_sweep_where_all_diverged_breaks_the_line():
    runs = [
        Run(f"{x}", {"x": x}, s, "diverged" if x == 2 else "finished", final={"m": float(x)})
        for x in (1, 2, 3)
        for s in range(2)
    ]
    figure = plotting.sweep(Results(runs), "x", "m", xscale="linear", yscale="log")
    figure.canvas.draw()
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [1.0, math.nan, 3.0])
    assert figure.axes[0].texts[1].get_text() == "2/2"


def test_sweep_published_figure_has_the_colour_of_its_group():
    published = {"none": {"accuracy": (0.9, "a book")}}
    axes = plotting.sweep(rates(), "rate", "accuracy", "norm", published=published).axes[0]
    dashed = next(line for line in axes.lines if line.is_dashed())
    assert dashed.get_color() == plotting._look(1)["color"]
    assert dashed.get_ydata()[0] == 0.9


def test_sweep_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match=r"'batch 0.01' and 'None 0.01', both with rate=0.01"):
        plotting.sweep(rates(), "rate", "accuracy")
    with pytest.raises(ValueError, match=r"number under 'norm'. Received: 'batch'"):
        plotting.sweep(rates(), "norm", "accuracy")
    decays = [Run(f"{d}", {"decay": d}, 0, final={"m": 0.5}) for d in (0, 1e-3)]
    with pytest.raises(ValueError, match=r"Received: decay=0 .*xscale='linear'"):
        plotting.sweep(Results(decays), "decay", "m")
    plotting.sweep(Results(decays), "decay", "m", xscale="linear")


def test_sweep_where_nothing_is_left_has_no_logarithm():
    lost = [Run(f"{r}", {"rate": r}, 0, "diverged", final={"m": 1.0}) for r in (0.1, 1.0)]
    figure = plotting.sweep(Results(lost), "rate", "m", yscale="log")
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].texts[1:]] == ["1/1", "1/1"]


# ------------------------------------------------------------------ bars, differences, heat maps


def test_bars_show_means_deviations_and_seeds():
    results = study(diverged={("plain", 1)})
    figure = plotting.bars(
        results, "test_accuracy", published={"plain": {"test_accuracy": (0.75, "a book")}}
    )
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["batch (n = 4)", "plain (n = 3, 1 diverged)"]
    for y, (name, seeds) in enumerate({"batch": range(4), "plain": (0, 2, 3)}.items()):
        values = results.select(name, seeds=seeds).values(name, "test_accuracy")
        lines = [line.get_xydata() for line in axes.lines]
        assert [[values.mean(), y]] in [xy.tolist() for xy in lines]
        points = next(xy for xy in lines if len(xy) == len(values) and y < xy[0, 1] < y + 0.3)
        np.testing.assert_array_equal(points[:, 0], values)
        segment = axes.collections[y].get_segments()[0]
        spread = values.std(ddof=1)
        np.testing.assert_allclose(segment[:, 0], [values.mean() - spread, values.mean() + spread])
    dashed = next(line for line in axes.lines if line.is_dashed())
    np.testing.assert_allclose(dashed.get_xydata(), [[0.75, 0.88], [0.75, 1.34]])
    assert legend_texts(figure) == ["single seeds", "published: plain 0.75 (a book)"]


def test_marks_of_one_source_share_an_entry_and_cross_no_number():
    results = study(("a", "b", "c"))
    means = {name: results.values(name, "test_accuracy").mean() for name in results.names}
    published = {
        "a": {"test_accuracy": (means["a"], "a book")},
        "b": {"test_accuracy": (means["b"], "a book")},
        "c": {"test_accuracy": (means["c"], "a report")},
    }
    figure = plotting.bars(results, "test_accuracy", published=published)
    assert legend_texts(figure) == [
        "single seeds",
        f"published: c {means['c']:g} (a report)",
        "published, each beside its setting (a book)",
    ]
    figure.canvas.draw()
    marks = [line.get_window_extent() for line in figure.axes[0].lines if line.is_dashed()]
    assert len(marks) == 3
    for text in figure.axes[0].texts:
        extent = text.get_window_extent()
        assert not any(mark.y0 < extent.y1 and extent.y0 < mark.y1 for mark in marks)


def test_bars_begin_at_zero_only_where_that_shows_something():
    close = plotting.bars(study(), "test_accuracy").axes[0]
    assert close.patches[:] == []
    assert close.get_xlim()[0] > 0.5
    values = (("a", 1.0), ("b", 5.0))
    far = Results([Run(n, {"n": n}, s, final={"m": v + s / 9}) for n, v in values for s in (0, 1)])
    axes = plotting.bars(far, "m").axes[0]
    assert [round(patch.get_width(), 6) for patch in axes.patches] == [1.055556, 5.055556]
    assert axes.get_xlim()[0] == 0
    assert plotting.bars(far, "m", from_zero=False).axes[0].patches[:] == []


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (0.80671, 0.0101, "0.807 ± 0.010"),
        (0.8, 0.00172, "0.8000 ± 0.0017"),
        (812.3, 41.9, "812 ± 42"),
        (0.5, 0.0, "0.5"),
        (0.98, 1.1e-16, "0.98"),
    ],
)
def test_spread_decides_the_digits(mean, spread, text):
    assert plotting._with_spread(mean, spread) == text


def test_paired_differences_show_the_test():
    results = study(("batch", "plain", "layer"))
    axes = plotting.paired_differences(results, "plain", "test_accuracy").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["batch", "layer"]
    for y, name in enumerate(("batch", "layer")):
        test = results.compare(name, "plain", "test_accuracy")
        lines = [line.get_xydata().tolist() for line in axes.lines]
        assert [[test.low, y], [test.high, y]] in lines
        assert [[test.difference, y]] in lines
        singles = results.values(name, "test_accuracy") - results.values("plain", "test_accuracy")
        assert [[x, y + 0.22] for x in singles] in lines
    several = axes.figure.legends[0].get_title().get_text()
    assert "p adjusted for 2 differences (Holm), intervals not" in several


def test_paired_differences_of_the_baseline_alone():
    with pytest.raises(ValueError, match=r"besides `baseline`.*baseline='plain' and no others"):
        plotting.paired_differences(study(), "plain", "test_accuracy", ["plain"])


def test_paired_differences_adjust_p_for_their_number():
    results = study(("batch", "plain", "layer"))
    pairs = {name: (name, "plain") for name in ("batch", "layer")}
    tests = results.compare_pairs(pairs, "test_accuracy")
    assert any(test.p_adjusted > test.p for test in tests.values())
    figure = plotting.paired_differences(results, "plain", "test_accuracy")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [
        f"{test.difference:+.4f}, p by Holm {test.p_adjusted:.2g}, n = 4" for test in tests.values()
    ]
    alone = plotting.paired_differences(results, "plain", "test_accuracy", ["batch"])
    (text,) = (text.get_text() for text in alone.axes[0].texts)
    assert text == f"{tests['batch'].difference:+.4f}, p = {tests['batch'].p:.2g}, n = 4"
    assert "Holm" not in alone.legends[0].get_title().get_text()


def test_texts_beside_paired_differences_are_not_cut_off():
    figure = plotting.paired_differences(study(("batch", "plain", "layer")), "plain", "loss")
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        extent = text.get_window_extent()
        assert figure.axes[0].get_window_extent().x1 < extent.x0
        assert extent.x1 <= figure.bbox.x1


def test_heatmap_puts_every_setting_in_its_cell():
    results = study(("a", "b", "c", "d"), diverged={("c", s) for s in range(4)} | {("d", 0)})
    axes = plotting.heatmap(results, "layers.first", "layers.last", "test_accuracy").axes[0]
    means = axes.images[0].get_array().filled(math.nan)
    expected = {n: results.select(n, status="finished") for n in "abd"}
    expected = {n: r.values(n, "test_accuracy").mean() for n, r in expected.items()}
    np.testing.assert_allclose(means, [[expected["a"], expected["b"]], [math.nan, expected["d"]]])
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[(0, 1)] == "4 diverged"
    assert texts[(1, 1)].splitlines()[0] == f"{expected['d']:.3f}"
    assert texts[(1, 1)].splitlines()[2] == "1 diverged"
    with pytest.raises(ValueError, match=r"must be one setting. Received: 'a' and 'c', both with"):
        plotting.heatmap(results, "layers.first", "layers.first", "test_accuracy")


@pytest.mark.parametrize(("shift", "apart"), [(0.001, 0.02), (0.5, 0.5)])
def test_colours_of_a_heatmap_span_what_seeds_do(shift, apart):
    """Two cells of .17 ± .01, .001 apart, had the darkest and the brightest colour."""
    values = {"a": (0.17, 0.17), "b": (0.17 + shift, 0.17 + shift)}
    noise = 0.01 / np.sqrt(2) * np.array([-1, 1])  # of standard deviation .01
    runs = [
        Run(name, {"x": 1, "y": name}, seed, final={"m": value})
        for name, pair in values.items()
        for seed, value in enumerate(pair + noise)
    ]
    low, high = plotting.heatmap(Results(runs), "x", "y", "m").axes[0].images[0].get_clim()
    assert high - low == pytest.approx(apart)
    assert (low + high) / 2 == pytest.approx(0.17 + shift / 2)


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (2, 2), (1, 4), (9, 9)])
def test_titles_and_labels_of_small_matrices_are_not_cut_off(rows, columns):
    figure = plotting.matrix(
        np.arange(rows * columns).reshape(rows, columns),
        rows=[f"gaussian noise {i}" for i in range(rows)],
        columns=[f"{i}" for i in range(columns)],
        xlabel="strength",
        ylabel="kind",
        value="validation accuracy (fraction), mean over seeds",
        title="Statistics of 500 such images, CIFAR-10 (JPEG copy), n = 2",
    )
    figure.canvas.draw()
    cells, bar = figure.axes
    blocks = [bar.get_tightbbox(), cells.get_tightbbox(), figure._suptitle.get_window_extent()]
    assert_apart_and_whole(blocks, figure)


def test_differences_that_are_not_tested_say_so():
    runs = [
        Run(name, {"name": name}, seed, final={"accuracy": value})
        for name, values in (("a", (0.504, 0.604)), ("b", (0.5, 0.6)))
        for seed, value in enumerate(values)
    ]
    axes = plotting.paired_differences(Results(runs), "b", "accuracy").axes[0]
    (text,) = (text.get_text() for text in axes.texts)
    assert text == "+0.0040, not tested: all seeds differ alike, n = 2"


# ------------------------------------------------------------------ plots of arrays


def test_matrices_with_the_same_limits_have_the_same_colours():
    for values in ([[0.2, 0.5]], [[0.4, 0.6]]):
        figure = plotting.matrix(values, rows=["a"], columns=["b", "c"], limits=(0.1, 0.7))
        assert figure.axes[0].images[0].get_clim() == (0.1, 0.7)
    results = study(("batch", "plain"))
    figure = plotting.heatmap(
        results, "layers.first", "layers.last", "test_accuracy", limits=(0.0, 1.0)
    )
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)


def test_lines_with_and_without_a_band():
    x = np.linspace(0, 1, 5)
    several = np.random.default_rng(0).normal(size=(3, 5))
    figure = plotting.lines(
        x, {"one": 2 * x, "three": several}, xlabel="time (s)", ylabel="y", reference={"limit": 1.5}
    )
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), 2 * x)
    np.testing.assert_allclose(axes.lines[1].get_ydata(), several.mean(0))
    assert len(axes.collections) == 1
    assert axes.lines[2].is_dashed()
    assert legend_texts(figure) == ["one", "three (n = 3)", "limit"]
    with pytest.raises(ValueError, match=r"Received: 'a' of shape \(2,\) for x of shape \(5,\)"):
        plotting.lines(x, {"a": [1, 2]}, xlabel="", ylabel="")


@pytest.mark.parametrize(
    ("x", "whole"), [([1, 2, 3, 4], True), ([1, 1.5, 2], False), ([0, 20, 40], True)]
)
def test_ticks_of_lines_are_whole_where_the_numbers_are(x, whole):
    axes = plotting.lines(x, {"a": x}, xlabel="epoch", ylabel="y").axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert len(ticks) >= 3
    assert all(float(tick).is_integer() for tick in ticks) == whole


def test_matrix_texts_can_be_read_on_their_ground():
    axes = plotting.matrix([[0.0, 1.0], [math.nan, 0.4]], rows=["a", "b"], columns=["c", "d"]).axes[
        0
    ]
    assert [t.get_text() for t in axes.texts] == ["0", "1", "0.4"]
    assert [t.get_color() for t in axes.texts] == ["white", "black", "white"]
    with pytest.raises(ValueError, match=r"values.shape=\(1, 2\), 2 rows, 2 columns"):
        plotting.matrix([[1, 2]], rows=["a", "b"], columns=["c", "d"])


def test_rows_and_columns_of_a_matrix_may_be_numbers():
    axes = plotting.matrix([[1, 2, 3]], rows=[0.5], columns=range(3)).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.5"]


@pytest.mark.parametrize(
    ("images", "shape", "extremes"),
    [
        (np.arange(48, dtype=np.uint8).reshape(3, 4, 4), (4, 4), (0, 47 / 255)),
        (np.linspace(0.2, 0.7, 48).reshape(3, 4, 4, 1), (4, 4), (0.2, 0.7)),
        (np.linspace(-3, 2, 144).reshape(3, 4, 4, 3), (4, 4, 3), (0, 1)),
    ],
)
def test_image_grid(images, shape, extremes):
    figure = plotting.image_grid(images, ["a", "b", "c"], columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
    drawn = np.array([axes.images[0].get_array() for axes in figure.axes])
    assert drawn.shape == (3, *shape)
    assert (drawn.min(), drawn.max()) == pytest.approx(extremes)
    assert figure.axes[0].images[0].get_clim() == (0, 1)  # no image is stretched on its own


def test_image_grid_refuses():
    with pytest.raises(ValueError, match=r"images.shape=\(4, 4\)"):
        plotting.image_grid(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"one title per image. Received: 1 for 2 images"):
        plotting.image_grid(np.zeros((2, 4, 4)), ["a"])
    for columns in (-1, 0, 2.0):
        with pytest.raises(ValueError, match=rf"Received: columns={columns}"):
            plotting.image_grid(np.zeros((2, 4, 4)), columns=columns)


# Trajectories


def bowl(x, y):
    return x**2 + 2 * y**2


def spiral(steps):
    t = np.arange(steps)
    return np.stack([np.cos(t), np.sin(t)], axis=1) * 0.9 ** t[:, None]


def test_trajectories_are_the_given_points_still_and_moving(tmp_path):
    paths = {"a": {"one": spiral(7), "two": spiral(4)}, "b": {"two": -spiral(7)}}
    figure = plotting.trajectories(
        {"a": bowl, "b": bowl},
        paths,
        xlim=(-2, 2),
        ylim=(-1, 1),
        path=tmp_path / "still.png",
        animation=tmp_path / "moving.gif",
    )
    for axes in figure.axes:
        lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
        drawn = paths[axes.get_title()].values()
        for line, points in zip(lines, drawn, strict=True):  # whole again after the animation
            np.testing.assert_array_equal(line.get_xydata(), points)
        assert axes.get_xlim() == (-2, 2)
    second = [axes.lines[-2].get_color() for axes in figure.axes]  # "two" looks the same in both
    assert second[0] == second[1] != figure.axes[0].lines[0].get_color()
    with Image.open(tmp_path / "moving.gif") as moving:
        assert moving.n_frames == 7
    with Image.open(tmp_path / "still.png") as still:
        assert still.size[0] > 1000
    assert {file.name for file in tmp_path.iterdir()} == {"still.png", "moving.gif"}


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ({"other": {"one": spiral(3)}}, {}, "panel 'a', paths for"),
        ({"a": {"one": np.zeros(3)}}, {}, r"'one' of shape \(3,\)"),
        ({"a": {"one": spiral(3)}}, {"animation": "a.mp4"}, "a.mp4"),
    ],
)
def test_trajectories_refuse_what_they_cannot_draw(paths, options, message):
    with pytest.raises(ValueError, match=message):
        plotting.trajectories({"a": bowl}, paths, xlim=(-1, 1), ylim=(-1, 1), **options)


@pytest.mark.parametrize(
    ("surface", "maximum"),
    [(lambda x, y: -(x**2), "0"), (lambda x, y: x - 9, "-8"), (lambda x, y: x / 0, "(inf|nan)")],
)
def test_trajectories_need_a_surface_above_zero(surface, maximum):
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=rf"a maximum of -?{maximum} in panel 'a'"),
    ):
        plotting.trajectories({"a": surface}, {"a": {"one": spiral(3)}}, xlim=(-1, 1), ylim=(-1, 1))
    assert not pyplot.get_fignums()


def test_nothing_is_written_where_one_of_two_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Received: path='.*a\.jpg'"):
        plotting.trajectories(
            {"a": bowl},
            {"a": {"one": spiral(3)}},
            xlim=(-1, 1),
            ylim=(-1, 1),
            path=tmp_path / "a.jpg",
            animation=tmp_path / "a.gif",
        )
    assert not list(tmp_path.iterdir())

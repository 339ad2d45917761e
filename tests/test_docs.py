"""RESULTS.md, the pages made from other files, code and links of everything written."""

import json
import re
import shutil
from decimal import Decimal
from pathlib import Path

import docstrings
import keras
import numpy as np
import pytest
import report
from sklearn.datasets import load_digits

from keras_norm import datasets
from keras_norm.experiments import Results, Run

pages = pytest.importorskip("pages", reason="needs jupytext, which is not in the core's group")

ROOT = Path(__file__).resolve().parent.parent
SAVED = ROOT / report.SAVED
ROWS = report.load_rows()
PAGES = report.pages(ROWS, SAVED)


# ------------------------------------------------------------------ RESULTS.md


@pytest.mark.parametrize("path", PAGES)
def test_a_page_says_what_is_saved(path):
    assert (ROOT / path).read_text("utf-8") == PAGES[path], "run `make results`"


def test_a_table_of_a_page_stands_between_its_marks():
    assert len(report.short_report(ROWS, SAVED).splitlines()) > 5
    for table in ROWS["tables"].values():
        text = report.measurements(table, report.Saved(SAVED))
        assert len(text.splitlines()) == 2 + len(table["rows"])
        assert report.MISSING not in text
    page = "<!-- a, written by make results -->\nold\n<!-- end of a -->"
    assert report.with_table(page, "new", "a") == page.replace("old", "new")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.with_table(page, "new", "b")


def test_the_columns_of_a_table(tmp_path):
    machine = {"hardware": {"cores": 2}, "summary": "a machine", "versions": {}}
    runs = [
        Run("a", {"widths": [1, 2]}, seed, final={"x": seed + 0.25}, environment=machine)
        for seed in (0, 1)
    ]
    Results(runs).save(tmp_path / "study")
    columns = [
        {"title": "what", "row": "title"},
        {"title": "widths", "setting": "widths"},
        {"title": "cores", "hardware": "cores"},
        {"title": "x", "metric": "x", "digits": 1},
        {"title": "mean", "metric": "x", "spread": False},
        {"title": "n"},
    ]
    rows = [{"study": "study", "title": "A", "setting": "a"}]
    rows.append({"study": "other", "title": "B", "setting": "b"})
    text = report.measurements({"columns": columns, "rows": rows}, report.Saved(tmp_path))
    assert text.splitlines()[2] == "| A | 1-2 | 2 | .8 ± .7 | .7500 | 2 |"
    assert text.splitlines()[3] == "| B |" + f" {report.MISSING} |" * 5


def test_a_changed_result_changes_results_md(tmp_path):
    for study in ROWS["studies"]:
        if (SAVED / study).exists():
            shutil.copytree(SAVED / study, tmp_path / study, ignore=shutil.ignore_patterns("*.png"))
    before = report.report(ROWS, tmp_path)
    path = tmp_path / "03_dropout" / "results.json"
    data = json.loads(path.read_text("utf-8"))
    for run in data["runs"]:
        if run["name"] == "keep 1":
            run["final"]["val_accuracy"] = 0.9
    path.write_text(json.dumps(data), "utf-8")
    after = report.report(ROWS, tmp_path)
    changed = {*after.splitlines()} - {*before.splitlines()}
    assert any("| .9000 ± .0000 | 10 | surpassed |" in line for line in changed)
    assert any(line.startswith("| dropout improves the validation") for line in changed)


def test_rows_without_runs_are_shown_as_such(tmp_path):
    text = report.report(ROWS, tmp_path)
    parts = ROWS["parts"].values()
    for kind, title in (("figures", "what"), ("claims", "claim"), ("exercises", "question")):
        for row in (row for part in parts for row in part.get(kind, [])):
            (line, *_) = (x for x in text.splitlines() if row[title] in x)
            assert "**not run yet**" in line
    assert "reproduced |" not in text


def test_every_row_says_what_it_needs():
    assert list(ROWS["parts"]) == ["B", "C", "D", "E"]
    for part in ROWS["parts"].values():
        for row in part["figures"]:
            assert {"what", "figure", "setting", "metric"} <= row.keys()
            assert ("published" in row) != ("said" in row)
        for row in part["claims"]:
            assert {"claim", "a", "b"} <= row.keys()
            assert row["expected"] in ("more", "less", "same")
        for kind in ("figures", "claims", "exercises"):
            assert all(row["study"] in ROWS["studies"] for row in part.get(kind, []))


@pytest.mark.parametrize("row", ROWS["checks"], ids=lambda row: row["check"])
def test_a_check_names_tests_that_are_there(row):
    for test in row["tests"]:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text("utf-8")


def test_a_claim_may_not_be_comparable():
    (row,) = (r for r in ROWS["parts"]["C"]["claims"] if "not_comparable" in r)
    lines = report.claims([row], report.Saved(SAVED))
    assert lines.verdicts == (f"not comparable: {row['not_comparable']}",)


FIVE = np.array([0.51, 0.52, 0.53, 0.54, 0.55])  # half of the interval: 2.776 sqrt(1.2) .0158


@pytest.mark.parametrize(
    ("published", "better", "expected"),
    [
        (["0.53"], "more", "reproduced"),
        (["0.5781"], "more", "reproduced"),
        (["0.4819"], "more", "reproduced"),
        (["0.579"], "more", "not reproduced"),
        (["0.481"], "more", "surpassed"),
        (["0.48"], "more", "reproduced"),  # rounded: it may have been .4849
        (["0.579"], "less", "surpassed"),
        (["0.481"], "less", "not reproduced"),
        (["0.481"], "neither", "not reproduced: ours is more"),
        (["0.579", "0.55"], "more", "reproduced"),
        (["0.40", "0.60"], "more", "reproduced"),  # a range around ours
        (["0.40", "0.41"], "more", "surpassed"),
    ],
)
def test_verdicts_on_figures(published, better, expected):
    assert report.judge(FIVE, [Decimal(x) for x in published], better) == expected


def test_a_wide_interval_reproduces_nothing():
    values = np.array([0.45, 0.47, 0.50, 0.53, 0.55])  # half of the interval: .126
    assert report.judge(values, [Decimal("0.588")]) == "compatible: ours are .450 to .550"
    assert report.judge(values, [Decimal("0.70")]) == "not reproduced"


def test_few_seeds_and_diverged_runs_leave_a_row_open():
    assert report.judge(FIVE[:4], [Decimal("0.9")]) == "open: n = 4"
    assert report.judge(np.array([*FIVE, np.nan]), [Decimal("0.9")]) == "open: a run diverged"


@pytest.mark.parametrize(
    ("shift", "expected", "verdict"),
    [
        (0.1, "more", "reproduced"),
        (-0.1, "more", "not reproduced: the opposite"),
        (-0.1, "less", "reproduced"),
        (0.001, "more", "not reproduced: not significant"),
        (0.001, "same", "reproduced: no difference seen"),
        (0.1, "same", "not reproduced: they differ"),
    ],
)
def test_verdicts_on_claims(shift, expected, verdict):
    noise = np.array([0.004, -0.005, 0.003, -0.004, 0.002])
    runs = [
        Run(name, {"name": name}, seed, final={"x": value})
        for name, values in (("a", FIVE + shift + noise), ("b", FIVE))
        for seed, value in enumerate(values)
    ]
    test = Results(runs).compare("a", "b", "x")
    assert report.judge_claim(test, test.p, expected) == verdict


def test_numbers_are_written_in_the_house_style():
    assert report.short(Decimal("0.590")) == ".590"
    assert report.short(Decimal("3313.6")) == "3,313.6"
    assert report.short(-0.00001, 4, sign=True) == "+.0000"
    assert report.short(-0.0123, 4) == "-.0123"
    assert report.p_value(0.00003) == "< .0001"


# ------------------------------------------------------------------ pages


@pytest.mark.parametrize("path", pages.TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_becomes_a_page_with_its_plots(path):
    text = pages.tutorial(path)
    assert text.startswith("# ")
    shown = {Path(target).name for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    saved = {plot.name for plot in (SAVED / path.stem).glob("*.png")}
    assert shown == saved


@pytest.mark.parametrize("path", pages.TUTORIALS, ids=lambda path: path.stem)
def test_what_is_saved_of_a_tutorial_was_printed_by_its_cells(path):
    printed = json.loads((SAVED / path.stem / "outputs.json").read_text("utf-8"))
    cells = {pages.digest(cell.source) for cell in pages.jupytext.read(path).cells}
    assert len(printed) > 3
    assert set(printed) <= cells, f"run `make notebooks TUTORIALS={path.stem}`"


def test_what_a_cell_printed_is_shown_while_it_is_the_same(tmp_path):
    (cell, changed) = (pages.jupytext.reads(x, "py:percent").cells[0] for x in ("f(1)", "f(2)"))
    printed = {pages.digest(cell.source): "one\n"}
    assert "```text\none\n```" in pages.cell_text(cell, tmp_path, printed)
    assert "one" not in pages.cell_text(changed, tmp_path, printed)


def test_docstrings_become_restructuredtext():
    lines = """One line with |x| and **kwargs and `a * b`.

    (B1)  mean = x
    (B2)  y = |x|

Args:
    x: text
        that goes on * here.

Numerics: float64
    throughout.

    >>> f(*x)
    1""".splitlines()
    assert docstrings.to_rst(lines) == [
        r"One line with \|x\| and \*\*kwargs and `a * b`.",
        "",
        ".. code-block:: text",
        "",
        "       (B1)  mean = x",
        "       (B2)  y = |x|",
        "",
        "",
        "Args:",
        "    x: text",
        r"        that goes on \* here.",
        "",
        "Numerics: float64",
        "throughout.",
        "",
        "    >>> f(*x)",
        "    1",
    ]


# ------------------------------------------------------------------ code


def test_a_retrained_net_is_used_as_the_documentation_says(tmp_path, monkeypatch):
    """Digits from 0 to 16 were divided by 255, and hardly more than one in ten was told right."""
    folder = tmp_path / "results" / "search" / "retrained"
    folder.mkdir(parents=True)
    data = datasets.load("digits")
    x, y = data.train.x.reshape(-1, 64), data.train.y
    means = np.stack([x[y == k].mean(0) for k in range(10)])  # the class is that of the nearest
    inputs = keras.Input(data.input_shape)
    model = keras.Sequential([inputs, keras.layers.Flatten(), keras.layers.Dense(10)])
    model.set_weights([means.T, -np.sum(means**2, axis=1) / 2])
    model.save(folder / "model.keras")
    numbers = {"mean": data.mean.ravel().tolist(), "std": data.std.ravel().tolist()}
    card = {"data": {"class_names": data.class_names, **numbers}}
    (folder / "model_card.json").write_text(json.dumps(card), "utf-8")

    text = (ROOT / "docs" / "searches.md").read_text("utf-8")
    (code,) = re.findall(r"(?ms)^```python\n(import json\n.*?)^```", text)
    images, labels = load_digits(return_X_y=True)
    monkeypatch.chdir(tmp_path)
    for white, factor in ((255, 255 / 16), (16, 1)):
        names = {"pixels": images.reshape(-1, 8, 8, 1) * factor}
        exec(code.replace("white = 255", f"white = {white}"), names)
        right = np.array(names["names"]) == np.array(data.class_names)[labels]
        assert right.mean() > 0.8


# ------------------------------------------------------------------ links

WRITTEN = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(path):
    """Anchors of the headings of a Markdown file."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link

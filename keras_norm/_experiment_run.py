"""One training run, and the two files in which runs are kept (see `experiments` for their form)."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_SCHEMA, _VERSION = "keras_norm.results", 1
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FIXED_COLUMNS = ("name", "seed", "status", "backend", "seconds", "row", "epoch")


@dataclass(frozen=True)
class Run:
    """One training run: what was asked for, and what came out.

    Args:
        name: Name of the setting, as it appears in tables and legends.
        settings: Everything that was passed to the training function; JSON values only.
        seed: Seed of the run.
        status: "finished"; "diverged" when a loss ended as NaN or infinite; "failed" when the
            training function raised.
        epochs: Epoch numbers of the values in `history`, increasing; default 1, 2, ….
        history: Metric -> one value per epoch; None where it was not measured.
        final: Metric -> value at the end of the run.
        seconds: Wall time of the training function.
        context: What all runs of a study share, such as the data and its size.
        backend: Keras backend of the run.
        extra: Whatever else the training function returned.
        error: Type and message of the exception of a failed run.
        started: UTC time, ISO 8601.
        finished: UTC time, ISO 8601.
        environment: Versions and hardware, as from `describe_machine`.
        code: Digest of the training function's syntax tree; "" where there is no source.

    Example:
        >>> from keras_norm.experiments import Run
        >>> one = Run("plain", {"learning_rate": 0.1}, seed=0, history={"loss": [2.0, 1.0]})
        >>> one.epochs, one.value("loss")
        ((1, 2), 1.0)
    """

    name: str
    settings: Mapping[str, Any]
    seed: int
    status: str = "finished"
    epochs: tuple[float, ...] = ()
    history: Mapping[str, list[float | None]] = field(default_factory=dict)
    final: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    context: Mapping[str, Any] = field(default_factory=dict)
    backend: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    started: str = ""
    finished: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    def __post_init__(self) -> None:
        length = max((len(values) for values in self.history.values()), default=0)
        if not self.epochs:
            object.__setattr__(self, "epochs", tuple(range(1, length + 1)))
        object.__setattr__(self, "epochs", tuple(self.epochs))
        history = {m: _numbers(v, f"history[{m!r}]") for m, v in self.history.items()}
        object.__setattr__(self, "history", history)
        final = {m: to_number(v, f"final[{m!r}]") for m, v in self.final.items()}
        object.__setattr__(self, "final", final)
        for metric, values in self.history.items():
            if len(values) != len(self.epochs):
                raise ValueError(
                    "Every metric of a history needs one value per epoch (None where it was not "
                    f"measured). Received: {metric}={len(values)} values for {len(self.epochs)} "
                    f"epochs in run {self.name!r}, seed {self.seed}."
                )

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, those of the history first."""
        return list(dict.fromkeys([*self.history, *self.final]))

    def value(self, metric: str) -> float:
        """The final value of `metric`; one without a final value: its last in the history."""
        if metric in self.final:
            return float(self.final[metric])
        measured = [v for v in self.history.get(metric, ()) if v is not None]
        return float(measured[-1]) if measured else math.nan

    def setting(self, key: str) -> Any:
        """The setting `key` ("optimizer.learning_rate" reaches into nested ones), or None."""
        found: Any = self.settings
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return None
            found = found[part]
        return found


def group_of(entry: Run) -> str:
    """What has to agree for two runs to be runs of the same thing."""
    return canonical([entry.settings, entry.context, entry.backend])


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=True, ensure_ascii=False)


def to_plain(value: Any, where: str) -> Any:
    """`value` in the types of JSON; arrays become lists, tensors and NumPy scalars numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # without lone surrogates
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_plain(v, f"{where}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v, where) for v in value]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return to_plain(value.tolist(), where)
    if getattr(value, "dtype", None) is not None and hasattr(value, "shape"):
        import keras

        with contextlib.suppress(TypeError, ValueError):  # tensors; bfloat16, unknown to NumPy
            if keras.backend.standardize_dtype(value.dtype) == "bfloat16":
                value = keras.ops.cast(value, "float32")
            return to_plain(keras.ops.convert_to_numpy(value).tolist(), where)
    raise ValueError(
        f"{where} must consist of JSON values: None, numbers, texts, lists, dicts with texts as "
        f"keys, arrays. Received: {value!r} of type {type(value).__name__}."
    )


def to_plain_settings(value: Any, where: str) -> Any:
    """As `to_plain`, and fit for a column of the csv and for being compared."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(
                    f"A key of {where} must be a non-empty text without '.'. Received: {key!r}"
                )
        return {key: to_plain_settings(v, f"{where}.{key}") for key, v in value.items()}
    plain = to_plain(value, where)
    try:
        json.dumps(plain, allow_nan=False)
    except ValueError:
        raise ValueError(
            f"{where} must be finite. Received: {value!r}. Use None or a text instead."
        ) from None
    return plain


def to_number(value: Any, where: str) -> float:
    number = to_plain(value, where)
    if isinstance(number, (bool, int, float)):
        return int(number) if isinstance(number, bool) else number
    raise ValueError(f"{where} must be one number. Received: {value!r}. Return others as extra.")


def _numbers(values: Any, where: str) -> list[float | None]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(
            f"{where} must be a list, one value per epoch. Received: {values!r}. A single number "
            "belongs under 'final'."
        )
    return [None if v is None else to_number(v, where) for v in values]


def _check_metrics(values: Mapping[Any, Any], where: str) -> None:
    if any(not isinstance(metric, str) or not metric for metric in values):
        raise ValueError(
            f"The metrics of '{where}' need names, non-empty texts. Received: {list(values)}"
        )


def read_final(final: Any) -> dict[str, float]:
    """The final metrics as a training function returned them."""
    if not isinstance(final, Mapping):
        raise ValueError(
            "'final' must be a dict of metric -> number, as `evaluate(…, return_dict=True)` gives. "
            f"Received: {type(final).__name__}"
        )
    _check_metrics(final, "final")
    return {metric: to_number(v, f"final[{metric!r}]") for metric, v in final.items()}


def read_history(history: Any) -> tuple[tuple[float, ...], dict[str, list[float | None]]]:
    """Epochs and metrics of a history as a training function returned it."""
    if not isinstance(history, Mapping):
        raise ValueError(
            "'history' must be a dict of metric -> list of values, as `fit(…).history` is. "
            f"Received: {type(history).__name__}"
        )
    _check_metrics(history, "history")
    columns = {m: _numbers(values, f"history[{m!r}]") for m, values in history.items()}
    epochs = tuple(v for v in columns.pop("epoch", []) if v is not None)
    return epochs, {m: v for m, v in columns.items() if any(x is not None for x in v)}


def has_diverged(history: Mapping[str, list[float | None]], final: Mapping[str, float]) -> bool:
    """True if the last value of any loss is NaN or infinite."""
    measured = {m: [x for x in v if x is not None] for m, v in history.items()}
    last = {m: v[-1] for m, v in measured.items() if v} | dict(final)
    return any("loss" in m and not math.isfinite(v) for m, v in last.items())


# The files --------------------------------------------------------------------------------------


def _strict(value: Any) -> Any:
    """NaN and infinities as texts, everywhere in `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, Infinity, -Infinity
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def _loose(value: Any) -> Any:
    """The reverse of `_strict`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _loose(v) for k, v in value.items()}
    return [_loose(v) for v in value] if isinstance(value, list) else value


def to_json(title: str, runs: Sequence[Run], superseded: Sequence[Run]) -> str:
    environments: list[Mapping[str, Any]] = []

    def line(entry: Run) -> str:
        if entry.environment not in environments:
            environments.append(entry.environment)
        fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        for key in ("seconds", "epochs", "history", "final", "extra"):
            fields[key] = _strict(fields[key])
        fields["environment"] = environments.index(entry.environment)
        return json.dumps(fields, allow_nan=False, ensure_ascii=False)

    lists = {k: [line(r) for r in v] for k, v in (("runs", runs), ("superseded", superseded))}
    head = {"schema": _SCHEMA, "schema_version": _VERSION, "title": title}
    parts = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in head.items()]
    lists = {"environments": [json.dumps(e, ensure_ascii=False) for e in environments], **lists}
    for key, lines in lists.items():
        parts.append(f'"{key}": [' + "".join(f"\n  {x}," for x in lines).rstrip(",") + "\n ]")
    return "{" + ",\n ".join(parts) + "\n}\n"


def from_json(text: str) -> tuple[str, list[Run], list[Run]]:
    data = json.loads(text)
    if data["schema"] != _SCHEMA or data["schema_version"] != _VERSION:
        raise ValueError(
            f"The file must follow schema {_SCHEMA!r}, version {_VERSION}. Received: "
            f"{data['schema']!r}, version {data['schema_version']!r}. Read it with the version "
            "of keras_norm that wrote it."
        )

    def entry(fields: dict[str, Any]) -> Run:
        for key in ("seconds", "epochs", "history", "final", "extra"):
            fields[key] = _loose(fields[key])
        environment = data["environments"][fields.pop("environment")]
        return Run(**fields, environment=environment)

    runs, superseded = ([entry(r) for r in data[key]] for key in ("runs", "superseded"))
    return data["title"], runs, superseded


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested settings as cells: {"settings.optimizer.name": "sgd"}."""
    if isinstance(value, Mapping) and (value or prefix in ("settings", "context")):
        cells = [_flat(f"{prefix}.{k}", v) for k, v in value.items()]
        return {key: cell for part in cells for key, cell in part.items()}
    return {prefix: _cell(value)}


def _cell(value: Any) -> str:
    """A cell that `_uncell` reads back as the same value of the same type."""
    plain = isinstance(value, str) and not {"\r", "\n"} & set(value) and _uncell(value) == value
    return value if plain and value else json.dumps(value, ensure_ascii=False)


def _uncell(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _number_in(cell: str) -> float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def _rows(entry: Run) -> Iterator[dict[str, str]]:
    """The rows of one run: its epochs, then its final values."""
    fixed = {
        "name": entry.name,
        "seed": str(entry.seed),
        "status": entry.status,
        "backend": entry.backend,
        "seconds": repr(float(entry.seconds)),
        **_flat("settings", entry.settings),
        **_flat("context", entry.context),
    }
    for i, epoch in enumerate(entry.epochs):
        values = {f"metrics.{m}": v[i] for m, v in entry.history.items()}
        cells = {k: repr(v) for k, v in values.items() if v is not None}
        yield fixed | {"row": "epoch", "epoch": repr(epoch)} | cells
    final = {f"metrics.{m}": repr(v) for m, v in entry.final.items()}
    yield fixed | {"row": "final", "epoch": ""} | final


def to_csv(runs: Iterable[Run]) -> str:
    rows = [row for entry in runs for row in _rows(entry)]
    kinds = ("settings.", "context.", "metrics.")
    found = dict.fromkeys(key for row in rows for key in row)
    columns = [*_FIXED_COLUMNS, *(k for kind in kinds for k in found if k.startswith(kind))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _nested(row: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """The reverse of `_flat`."""
    values: dict[str, Any] = {}
    for column, cell in row.items():
        if column.startswith(prefix) and cell != "":
            *parents, key = column.removeprefix(prefix).split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = _uncell(cell)
    return values


def from_csv(path: Path) -> list[Run]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if missing := set(_FIXED_COLUMNS) - set(reader.fieldnames or ()):
            raise KeyError(f"columns {sorted(missing)} are missing")
        groups: dict[tuple[str, int], list[dict[str, str]]] = {}
        for row in reader:
            groups.setdefault((row["name"], int(row["seed"])), []).append(row)
    return [_from_rows(rows) for rows in groups.values()]


def _from_rows(rows: list[dict[str, str]]) -> Run:
    *by_epoch, last = rows
    if last["row"] != "final" or any(row["row"] != "epoch" for row in by_epoch):
        raise ValueError(f"run {last['name']!r}, seed {last['seed']} is incomplete")
    metrics = [key for key in last if key.startswith("metrics.")]
    history = {
        key.removeprefix("metrics."): [_number_in(r[key]) if r[key] else None for r in by_epoch]
        for key in metrics
        if any(row[key] for row in by_epoch)
    }
    return Run(
        name=last["name"],
        settings=_nested(last, "settings."),
        seed=int(last["seed"]),
        status=last["status"],
        epochs=tuple(_number_in(row["epoch"]) for row in by_epoch),
        history=history,
        final={k.removeprefix("metrics."): _number_in(last[k]) for k in metrics if last[k]},
        seconds=float(last["seconds"]),
        context=_nested(last, "context."),
        backend=last["backend"],
    )

"""Metrics and hyperparameters of a trial for TensorBoard and its HParams plugin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write"]


def write(
    folder: Path, number: int, values: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Adds one epoch of one trial; the first time also its hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import api  # type: ignore[import-untyped]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

    own = folder / f"trial_{number:04d}"
    first = not own.exists()
    writer = EventFileWriter(str(own))
    now, epoch = time.time(), int(metrics["epoch"])
    if first:
        summary = api.hparams_pb(dict(values), trial_id=own.name)
        writer.add_event(_event(Event, now, 0, Summary.FromString(summary.SerializeToString())))
    scalars = [Summary.Value(tag=k, simple_value=v) for k, v in metrics.items() if k != "epoch"]
    writer.add_event(_event(Event, now, epoch, Summary(value=scalars)))
    writer.close()


def _event(kind: Any, wall_time: float, step: int, summary: Any) -> Any:
    return kind(wall_time=wall_time, step=step, summary=summary)

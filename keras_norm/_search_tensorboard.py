"""Metrics and hyperparameters of a trial for TensorBoard and its HParams plugin."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Log"]


class Log:
    """The log of one trial: a file that begins with the hyperparameters.

    TensorBoard reads the files of a folder in the order of their names, and draws a line from each
    point to the next. So the log of an earlier process, which may lack its last epoch or have
    epochs that are trained again, is removed: a process that resumes a trial writes its history
    first.

    Args:
        folder: folder of the logs of all trials.
        number: number of the trial.
        values: its hyperparameters.
    """

    def __init__(self, folder: Path, number: int, values: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.plugins.hparams import api  # type: ignore[import-untyped]

        own = folder / f"trial_{number:04d}"
        own.mkdir(parents=True, exist_ok=True)
        for earlier in own.glob("events.out.tfevents.*"):
            earlier.unlink()
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = own / name
        summary = api.hparams_pb(dict(values), trial_id=own.name).SerializeToString()
        self._append({"file_version": "brain.Event:2"})
        self._append({"step": 0, "summary": Summary.FromString(summary)})

    def write(self, history: Sequence[Mapping[str, float]]) -> None:
        """Adds the metrics of epochs."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for metrics in history:
            scalars = {tag: value for tag, value in metrics.items() if tag != "epoch"}
            values = [Summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]
            self._append({"step": int(metrics["epoch"]), "summary": Summary(value=values)})

    def _append(self, event: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with open(self.path, "ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **event).SerializeToString())

"""A worker: asks the chief for trials, runs each in a process of its own, and reports.

Every message of a worker to the chief may be repeated. So when the chief is away, because it was
killed and is being restarted, the worker asks until it answers.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_norm._files import NO_ROOM
from keras_norm._search_chief import COMPLETED, FAILED, IDLE, SERVICE, STOPPED
from keras_norm._search_process import Channel, Child, Nursery
from keras_norm._search_settings import BEAT, Settings, checkpoints_done_with, remove_checkpoint

__all__ = ["about", "run"]

_LOOK = 0.5  # seconds between looks at a trial that says nothing
_RAISED = "Exception calling application: "  # gRPC's text before what a service raised
_AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED")  # gRPC's codes if the chief cannot be reached


class Chief:
    """The chief, as a worker sees it: KerasTuner's client, and our own service."""

    def __init__(
        self, host: str, port: int, worker: str, patience: float, identity: str | None = None
    ) -> None:
        import grpc  # type: ignore[import-untyped]
        from keras_tuner.src.distribute.oracle_client import OracleClient

        os.environ["KERASTUNER_ORACLE_IP"] = host
        os.environ["KERASTUNER_ORACLE_PORT"] = str(port)
        os.environ["KERASTUNER_TUNER_ID"] = worker
        self.worker, self.patience = worker, patience
        self.identity = identity  # of the search, None for any
        self.oracle = OracleClient(None)
        self._channel = grpc.insecure_channel(
            f"{host}:{port}", options=[("grpc.max_reconnect_backoff_ms", 1000)]
        )

    def create_trial(self) -> Any:
        return self._until_there(lambda: self.oracle.create_trial(self.worker))

    def values_of(self, trial_id: str) -> dict[str, Any]:
        trial = self._until_there(lambda: self.oracle.get_trial(trial_id))
        return dict(trial.hyperparameters.values)

    def report(self, trial_id: str, metrics: dict[str, float], epoch: int) -> bool:
        """Reports the metrics of an epoch; returns whether the trial is to go on."""
        answer = self._until_there(lambda: self.oracle.update_trial(trial_id, metrics, step=epoch))
        return bool(answer.status != STOPPED)

    def finish(self, trial_id: str, status: str, message: str) -> bool:
        """Ends a trial; returns False if it was another worker's by now."""
        ask = {"worker": self.worker, "trial": trial_id, "status": status, "message": message}
        return bool(self.ask("Finish", ask)["ended"])

    def owns(self, trial_id: str | None) -> bool:
        """Gives a sign of life; returns whether the trial is still this worker's."""
        return bool(self.ask("Beat", {"worker": self.worker, "trial": trial_id})["yours"])

    def ask(self, method: str, message: dict[str, Any]) -> dict[str, Any]:
        return self._until_there(lambda: self._ask_once(method, message))

    def _ask_once(self, method: str, message: dict[str, Any]) -> dict[str, Any]:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        return dict(json.loads(call(json.dumps(message).encode(), timeout=60)))

    def _check_identity(self) -> None:
        """Checks the search, because after a while the chief of another may answer."""
        theirs = self._ask_once("About", {}).get("identity", "")
        if theirs != self.identity:
            raise ConnectionError("another search is there now: join that one anew")

    def _until_there(self, call: Callable[[], Any]) -> Any:
        """Calls, and while the chief is away calls again until patience runs out."""
        import grpc

        attempts = 0
        while True:
            try:
                if attempts and self.identity is not None:
                    self._check_identity()
                return call()
            except grpc.RpcError as error:
                attempts += 1
                if error.code().name not in _AWAY:
                    raise ConnectionError(_failed(str(error.details()))) from None
                if attempts > self.patience:
                    raise ConnectionError(f"the chief does not answer: {error.details()}") from None
                time.sleep(1)


def _failed(details: str) -> str:
    """The message about a chief that has answered with an error."""
    told = f"the chief failed: {details.removeprefix(_RAISED)}"
    if any(f"[Errno {code}]" in details for code in NO_ROOM):
        return f"{told}. Make room on its disk: the search goes on with --resume."
    return told


def about(channel: Channel, spec: dict[str, Any]) -> None:
    """A process that asks a chief for settings and space, and passes them on."""
    try:
        chief = Chief(spec["host"], spec["port"], "", patience=10)
        channel.send({"about": chief.ask("About", {})})
    except ConnectionError as error:
        channel.send({"error": str(error)})


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """The process of a worker. Sends {"over": true}, or {"error": reason}."""
    _assign(spec.get("cores"), spec.get("gpu"))
    nursery = Nursery.forked(channel)  # before gRPC starts threads
    place = spec["host"], spec["port"]
    chief = Chief(*place, spec["worker"], spec["patience"], spec["identity"])
    try:
        while True:
            trial = chief.create_trial()
            if trial.status == STOPPED:
                break
            if trial.status == IDLE:
                time.sleep(0.3)
                continue
            attempt = Attempt(chief, nursery, spec, trial)
            if chief.finish(trial.trial_id, *attempt.run()):
                attempt.clear()
    except OSError as error:  # the chief is away for too long, or the disk is full
        channel.send({"error": str(error)})
    else:
        channel.send({"over": True})
    finally:
        nursery.close()


def _assign(cores: list[int] | None, gpu: int | None) -> None:
    """Sets the cores and GPU of this worker and all its trials; TensorFlow counts those cores."""
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    elif cores is not None:
        for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(name, str(len(cores)))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


class Attempt:
    """One process of a trial, watched until it ends."""

    def __init__(self, chief: Chief, nursery: Nursery, spec: dict[str, Any], trial: Any) -> None:
        self.chief, self.nursery, self.trial = chief, nursery, trial
        self.settings = Settings.of(spec["settings"])
        self.folder = Path(spec["folder"])
        self.space, self.identity = spec["space"], spec["identity"]
        self.end: tuple[str, str] | None = None

    def run(self) -> tuple[str, str]:
        """Runs the process; returns status and reason."""
        folder = self._folder(self.trial.trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()
        name, target = f"kn-trial-{self.trial.trial_id}", "keras_norm._search_trial:run"
        child = self.nursery.start(name, target, self._spec(), folder / "log.txt")
        try:
            self._watch(child)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the process is gone: its exit status says more
        except OSError:
            child.kill()
            child.wait()
            raise
        if self.end is not None:
            child.kill()
        code = child.wait()
        if self.end is not None:
            return self.end
        return FAILED, _why(code)

    def clear(self) -> None:
        """Removes the states that no trial can continue from, now that this one has ended."""
        for trial_id in checkpoints_done_with(
            self.trial.trial_id, self.trial.hyperparameters.values
        ):
            remove_checkpoint(self._folder(trial_id))

    def _folder(self, trial_id: str) -> Path:
        return self.folder / f"trial_{trial_id}"

    def _spec(self) -> dict[str, Any]:
        values = self.trial.hyperparameters.values
        ancestor = values.get("tuner/trial_id")  # the trial of Hyperband that this one continues
        root, before = self.trial.trial_id, ancestor
        while before is not None:
            root = before
            before = self.chief.values_of(root).get("tuner/trial_id")
        return {
            "settings": self.settings.to_dict(),
            "space": self.space,
            "identity": self.identity,
            "values": values,
            "folder": str(self._folder(self.trial.trial_id)),
            "number": self.trial.trial_id,
            "root": root,
            "ancestor": str(self._folder(ancestor)) if ancestor is not None else None,
        }

    def _watch(self, child: Child) -> None:
        """Watches until the process says how it ended or must be killed; EOFError if it is gone."""
        began, beaten = time.monotonic(), time.monotonic()
        while self.end is None:
            message = child.channel.receive(_LOOK)
            if message is not None:
                self._hear(child, message)
            now = time.monotonic()
            if self.end is None:  # even if the trial never falls silent
                self._check_limits(child, now - began)
            if self.end is None and now - beaten > BEAT:
                beaten = now
                if not self.chief.owns(self.trial.trial_id):
                    self.end = FAILED, "given to another worker"  # nobody will hear it

    def _hear(self, child: Child, message: dict[str, Any]) -> None:
        if "report" in message:
            metrics = dict(message["report"])
            epoch = int(metrics.pop("epoch"))
            child.channel.send({"go": self.chief.report(self.trial.trial_id, metrics, epoch)})
        elif "stopped" in message:
            number = self.trial.trial_id
            raise OSError(f"trial {number} cannot be kept, and goes on later: {message['stopped']}")
        elif "failed" in message:
            self.end = FAILED, str(message["failed"])
        else:
            self.end = COMPLETED, ""

    def _check_limits(self, child: Child, seconds: float) -> None:
        limit = self.settings.trial_timeout
        if limit is not None and seconds > limit:
            self.end = FAILED, f"timeout: not done after {limit:g} s"
        memory = self.settings.trial_memory
        if memory is not None and (used := _gibibytes(child.pid)) > memory:
            self.end = (
                FAILED,
                f"out of memory: {used:.2f} GiB resident, more than {memory:g} GiB",
            )


def _gibibytes(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _why(code: int) -> str:
    """The reason for a process that ended without a message."""
    if code >= 0:
        return f"the process ended with status {code}: see log.txt"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}"

"""The chief of a search: KerasTuner's oracles, made durable, behind KerasTuner's gRPC service.

What this module adds to the oracles:

    files are written whole or not at all, and repaired after a crash between two of them;
    a message that a worker sends twice counts once, so that it may repeat it if the chief was away;
    a trial is scored by its last epoch, not by its best;
    the metrics of each epoch are reported, and the median rule stops hopeless trials;
    a budget refuses proposals before they become trials;
    the trials of workers that fell silent are given to others;
    Hyperband continues when trials fail, and keeps track of the bracket of each promoted trial;
    0 is a valid seed, and a resumed Bayesian search proposes what an undisturbed one would.

Next to KerasTuner's service there is one of ours, `keras_norm.Search`, in JSON. It carries the
reason of a failed trial, for which KerasTuner's messages have no room, signs of life, and the
settings for a worker that joins from another machine.
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from keras_norm._files import clear_remains, replace_file
from keras_norm._search_bayesian import Bayesian, curve
from keras_norm._search_hyperband import Hyperband
from keras_norm._search_process import Channel, Nursery
from keras_norm._search_settings import Settings, record_of

__all__ = ["make_oracle", "run"]

SERVICE = "keras_norm.Search"
RUNNING, IDLE, STOPPED = "RUNNING", "IDLE", "STOPPED"  # KerasTuner's states of a trial
COMPLETED, FAILED = "COMPLETED", "FAILED"
_REFUSALS = 200  # in a row, before the budget is taken to allow nothing
_TICK = 0.2  # seconds
_STARTS = 10  # random trials at most, before the first Bayesian proposal


class _Durable:
    """A mixin in front of one of KerasTuner's oracles; see the module."""

    settings: Settings
    admit: Callable[[dict[str, Any]], str | None]

    def start(self, settings: Settings, folder: Path, admit: Any = None) -> None:
        """Prepares the oracle; to be called once, before anything else."""
        oracle: Any = self
        self.settings = settings
        self.admit = admit or (lambda values: None)
        self.refused: list[dict[str, Any]] = []  # values of proposals
        self.exhausted = ""
        self.closing = False
        self.lock = threading.RLock()
        self.events: deque[dict[str, Any]] = deque()
        oracle.verbose = 0
        oracle._set_project_dir(str(folder.parent), folder.name)

    # Files

    def save(self) -> None:
        oracle: Any = self
        _write(Path(oracle._get_oracle_fname()), oracle.get_state())

    def _save_trial(self, trial: Any) -> None:
        oracle: Any = self
        folder = Path(oracle._get_trial_dir(trial.trial_id))
        _write(folder / "trial.json", trial.get_state())

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "refused": self.refused}  # type: ignore[misc]

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)  # type: ignore[misc]
        self.refused = state["refused"]

    def reload(self) -> None:
        """Loads the state from the folder, at whatever point its last writer died.

        A trial is written before the oracle is. So there may be a trial that the oracle does not
        have: it will propose the same again. And a trial that has ended may still run for it.
        """
        oracle: Any = self
        super().reload()  # type: ignore[misc]
        state = json.loads(Path(oracle._get_oracle_fname()).read_text(encoding="utf-8"))
        known = oracle.start_order
        oracle.trials = {name: oracle.trials[name] for name in known}
        for name in known:
            ended = oracle.trials[name].status in (COMPLETED, FAILED)
            if ended and name not in oracle.end_order:
                oracle.end_order.append(name)
        going = [(w, name) for w, name in state["ongoing_trials"].items()]
        going = [(w, name) for w, name in going if name not in oracle.end_order]
        oracle.ongoing_trials = {w: oracle.trials[name] for w, name in going}
        waiting = [name for name in state["retry_queue"] if name not in oracle.end_order]
        oracle._retry_queue = waiting

    # Proposals

    def _random_values(self) -> dict[str, Any] | None:
        for _ in range(_REFUSALS):
            values: dict[str, Any] | None = super()._random_values()  # type: ignore[misc]
            if values is None:
                self.exhausted = "what is proposed has all been tried, so no values seem to be left"
            if values is None or self.admitted(values):
                return values
        self.exhausted = f"the budget refused {_REFUSALS} proposals in a row"
        return None

    def admitted(self, values: dict[str, Any]) -> bool:
        reason = self.admit(values)
        if reason is not None:
            self.refused.append(values)
            self.events.append({"refused": reason})
        return reason is None

    def create_trial(self, tuner_id: str) -> Any:
        oracle: Any = self
        with self.lock:
            if tuner_id not in oracle.ongoing_trials and self.closing:
                return _no_trial(oracle, STOPPED)
            trial = super().create_trial(tuner_id)  # type: ignore[misc]
            if trial.status == STOPPED and oracle.ongoing_trials:
                return _no_trial(oracle, IDLE)  # one of them may need a new worker
            if trial.status == RUNNING:
                self.tell(trial, worker=tuner_id)
            return trial

    def release(self, tuner_id: str) -> None:
        """Gives the trial of a worker that is gone to the next one that asks."""
        oracle: Any = self
        with self.lock:
            trial = oracle.ongoing_trials.pop(tuner_id, None)
            if trial is not None:
                oracle._retry_queue.append(trial.trial_id)
                self.save()

    def works_on(self, tuner_id: str, trial_id: str) -> bool:
        oracle: Any = self
        trial = oracle.ongoing_trials.get(tuner_id)
        return trial is not None and trial.trial_id == trial_id

    # Results

    def update_trial(self, trial_id: str, metrics: Mapping[str, float], step: int = 0) -> Any:
        """Takes in the metrics of one epoch. If the trial is returned as STOPPED, it must end."""
        oracle: Any = self
        with self.lock:
            trial = oracle.trials[trial_id]
            if step not in curve(trial, oracle.objective.name):
                super().update_trial(trial_id, metrics, step=step)  # type: ignore[misc]
                if not trial.message and self.settings.prune and self.hopeless(trial, step):
                    trial.message = f"pruned after epoch {step}: below the median of the others"
                    self._save_trial(trial)
                self.tell(trial)
            answer = copy.copy(trial)
            if trial.message:
                answer.status = STOPPED
            return answer

    def hopeless(self, trial: Any, step: int) -> bool:
        """The median rule: whether its best so far is worse than the others' median then."""
        oracle: Any = self
        if step < self.settings.prune_after or step >= self.settings.epochs:
            return False
        name, sign = oracle.objective.name, 1 if oracle.objective.direction == "max" else -1
        others = [
            curve(other, name)[step]
            for other in oracle.trials.values()
            if other is not trial and step in curve(other, name)
        ]
        if len(others) < self.settings.prune_least:
            return False
        own = [sign * v for e, v in curve(trial, name).items() if e <= step]
        return max(own) < statistics.median(sign * v for v in others)

    def score_trial(self, trial: Any) -> None:
        """Scores a trial by its last epoch, which `retrain` trains to and where schedules end.

        KerasTuner would take the best one. `best_step` is the best epoch.
        """
        oracle: Any = self
        super().score_trial(trial)  # type: ignore[misc]
        if self.settings.scoring == "last":
            values = curve(trial, oracle.objective.name)
            trial.score = values[max(values)]

    def finish(self, tuner_id: str, trial_id: str, status: str, message: str) -> bool:
        """Ends a trial; returns False if it has already ended or is another worker's now."""
        oracle: Any = self
        with self.lock:
            if trial_id in oracle.end_order or not self.works_on(tuner_id, trial_id):
                return False
            trial = oracle.trials[trial_id]
            if status == COMPLETED and not curve(trial, oracle.objective.name):
                status, message = FAILED, "no epoch was finished"
            reason = message or trial.message
            from keras_tuner.engine.trial import Trial

            oracle.end_trial(Trial(trial.hyperparameters, trial_id, status, reason))
            self.tell(trial)
            return True

    def tell(self, trial: Any, **more: Any) -> None:
        """Adds an event for the display."""
        record = record_of(trial.get_state())
        event = {
            "number": record.number,
            "status": record.status,
            "reason": record.reason,
            "score": record.score,
            "epoch": record.epochs,
            "epochs": record.values.get("tuner/epochs", self.settings.epochs),
            "now": record.reached(self.settings.objective, self.settings),
            "best_epoch": record.best_epoch(self.settings),
            "seconds": record.last("seconds"),
            "parameters": record.last("parameters"),
            "values": record.hyperparameters,
        }
        self.events.append({"trial": {**event, **more}})


def make_oracle(settings: Settings, space: Mapping[str, Any]) -> Any:
    """The oracle of a search, not started yet."""
    import keras_tuner

    from keras_norm._search_space import hyperparameters

    whole = hyperparameters(space, {})
    options: dict[str, Any] = {
        "objective": keras_tuner.Objective(settings.objective, settings.direction),
        "hyperparameters": whole,
        "allow_new_entries": False,
        "seed": int(np.random.SeedSequence([settings.seed, 0]).generate_state(1)[0]),
        "max_consecutive_failed_trials": None,  # failed trials do not end the search
    }
    if settings.tuner == "hyperband":
        kind = keras_tuner.oracles.HyperbandOracle
        options |= {"max_epochs": settings.epochs, "factor": settings.factor}
    else:
        kind = keras_tuner.oracles.RandomSearchOracle
        options |= {"max_trials": settings.trials}
    if settings.tuner == "bayesian":
        kind = keras_tuner.oracles.BayesianOptimizationOracle
        # KerasTuner starts with 3 random trials per hyperparameter: all trials of most searches.
        first = min(3 * len(whole.space), round(0.4 * settings.trials), _STARTS)
        options |= {"num_initial_points": max(3, first)}
    ours = {"bayesian": (Bayesian, _Durable), "hyperband": (Hyperband, _Durable)}
    bases = (*ours.get(settings.tuner, (_Durable,)), kind)
    return type(f"Durable{kind.__name__}", bases, {})(**options)


def _no_trial(oracle: Any, status: str) -> Any:
    from keras_tuner.engine.trial import Trial

    return Trial(oracle.get_space(), trial_id="", status=status)


def _write(path: Path, state: Any) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")


# The service --------------------------------------------------------------------------------


class _Attendance:
    """Keeps track of the workers. It counts ticks: time when the chief was halted does not count.

    If its owner has started no workers for the chief, none need come.
    """

    def __init__(self, patience: float, *, alone: bool = False) -> None:
        self.patience, self.alone = round(patience / _TICK), alone
        self.silent: dict[str, int] = {}
        self.dismissed: set[str] = set()

    def seen(self, worker: str) -> None:
        self.silent[worker] = 0

    def tick(self) -> list[str]:
        """Counts one tick; returns the workers that have just been given up."""
        for worker in self.silent:
            self.silent[worker] += 1
        gone = [w for w, ticks in self.silent.items() if ticks > self.patience]
        for worker in gone:
            del self.silent[worker]
        return gone

    def over(self, *, closing: bool = False) -> bool:
        """Whether there were workers, and all that are left know that there are no more trials.

        With `closing`, when no new trial begins, also if no worker is there or has to come.
        """
        if closing and self.alone and not self.silent:
            return True
        return bool(self.dismissed) and set(self.silent) <= self.dismissed


def _servicer(oracle: Any, attendance: _Attendance) -> Any:
    """KerasTuner's service, extended to note which workers were there and which were sent home."""
    from keras_tuner.engine.trial import TrialStatus
    from keras_tuner.src.distribute.oracle_chief import OracleServicer

    class Servicer(OracleServicer):  # type: ignore[misc]
        def CreateTrial(self, request: Any, context: Any) -> Any:  # noqa: N802
            attendance.seen(request.tuner_id)
            answer = super().CreateTrial(request, context)
            if TrialStatus.from_proto(answer.trial.status) == STOPPED:
                attendance.dismissed.add(request.tuner_id)
            return answer

    return Servicer(oracle)


def _handlers(oracle: Any, attendance: _Attendance, about: dict[str, Any]) -> Any:
    """Our own service: JSON in, JSON out."""

    import grpc  # type: ignore[import-untyped]

    def beat(ask: dict[str, Any]) -> dict[str, Any]:
        attendance.seen(ask["worker"])
        trial = ask.get("trial")
        return {"yours": trial is None or oracle.works_on(ask["worker"], trial)}

    def finish(ask: dict[str, Any]) -> dict[str, Any]:
        attendance.seen(ask["worker"])
        told = ask["worker"], ask["trial"], ask["status"], ask["message"]
        return {"ended": oracle.finish(*told)}

    def handler(function: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        def answer(request: bytes, context: Any) -> bytes:
            return json.dumps(function(json.loads(request))).encode()

        return grpc.unary_unary_rpc_method_handler(answer)

    methods = {"Beat": beat, "Finish": finish, "About": lambda ask: about}
    return grpc.method_handlers_generic_handler(
        SERVICE, {name: handler(function) for name, function in methods.items()}
    )


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """The process of the chief.

    Sends {"listening": port}, then events, and last {"over": ...}; accepts {"close": true}, after
    which no new trial begins.
    """
    import grpc
    from keras_tuner.src import protos

    settings, folder = Settings.of(spec["settings"]), Path(spec["folder"])
    for path in [folder / "oracle.json", *folder.glob("trial_*/trial.json")]:
        clear_remains(path)
    oracle = make_oracle(settings, spec["space"])
    nursery = Nursery.forked(channel) if settings.max_parameters or settings.max_flops else None
    oracle.start(settings, folder, nursery and _budget(nursery, spec))
    if (folder / "oracle.json").exists():
        oracle.reload()
    oracle.closing = spec.get("closed", False)
    for worker in set(oracle.ongoing_trials) & set(spec["absent"]):
        oracle.release(worker)
    attendance = _Attendance(spec["patience"], alone=spec["alone"])
    for worker in oracle.ongoing_trials:
        attendance.seen(worker)
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=1), options=[("grpc.so_reuseport", 0)]
    )
    service = protos.get_service_grpc()
    service.add_OracleServicer_to_server(_servicer(oracle, attendance), server)
    about = {k: spec[k] for k in ("settings", "space", "identity", "code")}
    server.add_generic_rpc_handlers((_handlers(oracle, attendance, about),))
    try:
        port = server.add_insecure_port(f"{spec['host']}:{spec['port']}")
    except RuntimeError:
        port = 0
    if not port:
        channel.send({"error": f"cannot listen on {spec['host']}:{spec['port']}: is it in use?"})
        return
    with contextlib.redirect_stdout(None):  # KerasTuner prints each condition that it sends
        server.start()
        channel.send({"listening": port})
        _attend(channel, oracle, attendance)
        server.stop(1).wait()


def _attend(channel: Channel, oracle: Any, attendance: _Attendance) -> None:
    """Passes events on and watches for missing workers until everything is done."""
    while True:
        message = channel.receive(_TICK)
        if message is not None and message.get("close"):
            oracle.closing = True
        while oracle.events:
            channel.send(oracle.events.popleft())
        if oracle.lock.acquire(blocking=False):  # otherwise no worker could be heard now
            try:
                for worker in attendance.tick():
                    oracle.release(worker)
            finally:
                oracle.lock.release()
        if attendance.over(closing=oracle.closing) and not oracle.ongoing_trials:
            time.sleep(2 * _TICK)  # for the last answer to arrive
            outcome = {"refused": len(oracle.refused), "exhausted": oracle.exhausted}
            channel.send({"over": {**outcome, "closed": oracle.closing}})
            with contextlib.suppress(EOFError):
                channel.receive(10)
            return


def _budget(nursery: Nursery, spec: dict[str, Any]) -> Callable[[dict[str, Any]], str | None]:
    """Measures each proposal in its own process, so that the memory goes back to the system."""

    def admit(values: dict[str, Any]) -> str | None:
        log = Path(spec["folder"]) / "processes.txt"
        request = {"settings": spec["settings"], "space": spec["space"], "values": values}
        child = nursery.start("kn-helper", "keras_norm._search_trial:measure", request, log)
        answer: dict[str, Any] = {}
        with contextlib.suppress(EOFError):
            answer = child.channel.receive() or {}
        child.wait()
        return str(answer["refused"]) if answer.get("refused") else None

    return admit

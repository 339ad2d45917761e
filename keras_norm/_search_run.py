"""The process that the user starts: it owns all others, restarts those that die, shows the table.

It does not import TensorFlow and trains nothing, so it stays small however many trials there are.

    this process
      nursery             has imported everything; forks
        chief             KerasTuner's oracle behind gRPC
        worker-0          asks for trials
          nursery         of this worker
            trial         one after another
        worker-1 ...
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_norm._search_process import Nursery
from keras_norm._search_settings import (
    BEAT,
    PACKAGES,
    SearchError,
    Settings,
    TrialRecord,
    check_address,
    clear,
    clear_checkpoints,
    code_of,
    environment,
    is_number,
    locked,
    new_identity,
    plain,
    prepare,
    read_search,
    read_trials,
    require,
    warn_of_code,
    with_absolute_paths,
    write_search,
)

__all__ = ["describe", "printable", "run_search"]

_PATIENCE = 5 * BEAT  # seconds at least: a busy machine may miss a sign of life or two
_RESTARTS = 5  # of one process, before any trial has ended since
_PREFERRED = ("family", "normalization", "optimizer", "learning_rate", "sgd_learning_rate")


def run_search(
    out: Path,
    options: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    workers: int,
    threads: int | None,
    chief: str | None,
    join: str | None,
    time_limit: float | None,
    worker_timeout: float,
    progress: bool,
) -> None:
    """See `keras_norm.tuning.search`."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < (chief is None):
        raise SearchError(f"workers must be a whole number, at least 1. Received: {workers!r}")
    _check_threads(threads)
    if chief is not None and join is not None:
        raise SearchError("chief and join exclude each other.")
    time_limit, worker_timeout = plain(time_limit), plain(worker_timeout)
    if time_limit is not None and not (is_number(time_limit) and time_limit > 0):
        raise SearchError(f"time_limit must be minutes above 0. Received: {time_limit!r}")
    if not (is_number(worker_timeout) and _PATIENCE <= worker_timeout < math.inf):
        raise SearchError(
            f"worker_timeout must be seconds, at least {_PATIENCE:g}, for workers give a sign of "
            f"life every {BEAT:g}. Received: {worker_timeout!r}"
        )
    if join is not None:
        theirs = {"time_limit": time_limit is not None, "resume": resume, "overwrite": overwrite}
        if foreign := [name for name, given in theirs.items() if given]:
            raise SearchError(f"The chief decides on {foreign[0]}: leave it out when joining.")
        _join(out, options, join, workers, threads, worker_timeout, progress)
        return
    host, port = check_address(chief or "127.0.0.1:0")
    _check_free(host, port)
    if not _is_loopback(host):
        print(
            f"Warning: whoever can reach {host}:{port} can read and steer this search. The "
            "protocol has neither passwords nor encryption: use it in a network that you trust, "
            "or through a tunnel.",
            file=sys.stderr,
        )
    with _folder(out):
        settings = prepare(out, options, resume=resume, overwrite=overwrite)
        require("A search", *PACKAGES)
        with _Owner(out, settings, workers, threads, progress) as owner:
            owner.prepare_space(resume, overwrite)
            owner.start_chief(host, port, worker_timeout, time_limit)
            owner.watch()
        clear_checkpoints(out, settings, is_over=not owner.outcome.get("closed", True))


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Holds the folder; removes it if it was made for a search that did not begin.

    In the folder of a worker that has joined, `search_…` holds trials, whose logs exist only there.
    """
    was_there = out.exists()
    with locked(out):  # only who holds it may remove it: another search may have begun meanwhile
        is_new = not was_there and [p.name for p in out.iterdir()] == [".lock"]
        try:
            yield
        except (SearchError, KeyboardInterrupt, SystemExit):
            begun = [*out.glob("search.json"), *out.glob("trial_*"), *out.glob("search_*")]
            if is_new and not begun:
                shutil.rmtree(out, ignore_errors=True)
            raise


def _join(
    out: Path,
    options: Mapping[str, Any],
    address: str,
    workers: int,
    threads: int | None,
    patience: float,
    progress: bool,
) -> None:
    """Runs workers for a chief elsewhere, which has all settings except those of this machine."""
    here = {"data_dir", "trial_timeout", "trial_memory", "space"}
    if foreign := sorted(set(options) - here):
        raise SearchError(f"The chief decides on {foreign[0]}: leave it out when joining.")
    host, port = check_address(address)
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise SearchError(f"The chief at {address} cannot be reached: {_reason(error)}.") from None
    require("A search", *PACKAGES)
    with _folder(out), _Owner(out, Settings(), workers, threads, progress) as owner:
        owner.join(host, port, patience, options)
        owner.watch()


def _check_threads(threads: int | None) -> None:
    if threads is None:
        return
    there = len(_cores())
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= there:
        raise SearchError(
            f"threads must be a whole number from 1 to {there}, the cores that there are. "
            f"Received: {threads!r}"
        )


def _check_free(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SearchError(f"Cannot listen on {host}:{port}: {_reason(error)}.") from None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _difference(saved: Mapping[str, Any], now: Mapping[str, Any], is_new: bool) -> str:
    """Name of a hyperparameter that differs between two spaces, or "".

    Searches once saw less of a space; such a search continues with what it saw.
    """
    before, after = saved["space"], now["space"]
    gone = [e for e in before if e not in after]
    added = [e for e in after if e not in before] if is_new else []
    return next((str(e["config"]["name"]) for e in [*gone, *added]), "")


class _Process:
    """A process that is restarted when it dies."""

    def __init__(self, name: str, target: str, spec: dict[str, Any], log: Path) -> None:
        self.name, self.target, self.spec, self.log = name, target, spec, log
        self.child: Any = None  # Child, once started
        self.restarts = 0
        self.over = False


class _Owner:
    """Owns the processes of one search; when its `with` block ends, they are gone."""

    def __init__(
        self, out: Path, settings: Settings, workers: int, threads: int | None, progress: bool
    ) -> None:
        self.out, self.settings = out.absolute(), settings
        self.count, self.threads = workers, threads
        self.display = _Display(settings, progress)
        self.chief: _Process | None = None
        self.workers: list[_Process] = []
        self.deadline: float | None = None
        self.outcome: dict[str, Any] = {}

    def __enter__(self) -> _Owner:
        self.nursery = Nursery.new(environment(), self.out / "processes.txt")
        return self

    def __exit__(self, *exception: object) -> None:
        self.nursery.close()
        self.display.close()
        for process in filter(None, [self.chief, *self.workers]):
            if process.child is not None:
                process.child.channel.close()

    # Before the search

    def prepare_space(self, resume: bool, overwrite: bool) -> None:
        """Loads the data, finds the space, and writes search.json; or checks it."""
        spec = {"settings": self.settings.to_dict()}
        self._preload(spec)
        answer = self._answer("keras_norm._search_trial:describe_space", {**spec, "resume": resume})
        self.space, whole = answer["space"], answer["whole"]
        self.identity, self.code = new_identity(), code_of(self.settings.space)
        if resume:
            saved = read_search(self.out)
            if difference := _difference(saved["whole_space"], whole, bool(saved["identity"])):
                raise SearchError(
                    "A search cannot be resumed with another space: the hyperparameters of "
                    f"{self.settings.space!r} are not those it began with, such as {difference!r}. "
                    "Name the space it began with by --space, or begin anew with --overwrite."
                )
            mixed = "trials before and after are of different code; --overwrite begins anew"
            warn_of_code(self.settings.space, saved["code"], mixed)
            self.space, whole = saved["space"], saved["whole_space"]
            self.identity, self.code = saved["identity"], saved["code"] or self.code
        if overwrite:
            clear(self.out)
        write_search(self.out, self.settings, self.space, whole, self.identity, self.code)

    def _preload(self, spec: dict[str, Any]) -> None:
        self.display.note("Importing Keras and reading the data ...")
        request = {**spec, "folder": str(self.out)}
        try:
            error = self.nursery.preload("keras_norm._search_trial:preload", request)
        except (EOFError, OSError):
            raise SearchError(self._last_words("The processes of the search")) from None
        if error:
            raise SearchError(" ".join(error.split()))

    def _answer(self, target: str, spec: dict[str, Any]) -> dict[str, Any]:
        """The answer of a process that is started only for it."""
        child = self.nursery.start("kn-helper", target, spec, self.out / "processes.txt")
        answer: dict[str, Any] | None = None
        with contextlib.suppress(EOFError):
            answer = child.channel.receive()
        child.wait()
        if answer is None:
            raise SearchError(self._last_words(target))
        if "error" in answer:
            raise SearchError(answer["error"])
        return answer

    def _last_words(self, who: str) -> str:
        """The last lines that the processes have printed."""
        lines: list[str] = []
        with contextlib.suppress(OSError):
            log = (self.out / "processes.txt").read_text(encoding="utf-8", errors="replace")
            lines = [line for line in log.splitlines() if line.strip()]
        return f"{who} died: {lines[-1] if lines else 'without a word'}"

    # Starting

    def start_chief(self, host: str, port: int, patience: float, time_limit: float | None) -> None:
        names = [f"worker-{k}" for k in range(self.count)]
        spec = {
            "settings": self.settings.to_dict(),
            "space": self.space,
            "identity": self.identity,
            "code": self.code,
            "folder": str(self.out),
            "host": host,
            "port": port,
            "patience": patience,
            "alone": not names,
            "absent": [w for w in self._interrupted() if w not in names],
        }
        if time_limit is not None:
            self.deadline = time.monotonic() + 60 * time_limit
        self.display.known(read_trials(self.out))
        target = "keras_norm._search_chief:run"
        self.chief = _Process("chief", target, spec, self.out / "processes.txt")
        self._start(self.chief)
        reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self._add_workers(names, reachable, int(spec["port"]), 600, self.out)
        if not self.count or not _is_loopback(host):
            self.display.note(f"Others may join: keras-norm tune --join {host}:{spec['port']}")

    def _interrupted(self) -> list[str]:
        """Local workers whose trials were left unfinished by an earlier run."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.out / "oracle.json").read_text(encoding="utf-8"))
            return [w for w in state["ongoing_trials"] if w.startswith("worker-")]
        return []

    def join(self, host: str, port: int, patience: float, options: Mapping[str, Any]) -> None:
        ask = {"host": host, "port": port}
        about = self._answer("keras_norm._search_worker:about", ask)["about"]
        theirs = Settings.of(about["settings"])
        own_space = options.get("space", "images")
        if theirs.space != "images" and own_space == "images":
            raise SearchError(
                f"The search uses a space of its own, {theirs.space!r}: name the file or module "
                "that holds it here with --space. (A chief cannot make a worker load code.)"
            )
        merged = {**theirs.to_dict(), "data_dir": None, **options, "space": own_space}
        self.settings, self.space = with_absolute_paths(Settings.of(merged)), about["space"]
        self.identity = about.get("identity", "")
        warn_of_code(own_space, about.get("code", ""), "its chief has read another file")
        self._preload({"settings": self.settings.to_dict()})
        me = f"{socket.gethostname()}-{os.getpid()}"
        folder = self.out / f"search_{self.identity}" if self.identity else self.out
        names = [f"{me}-{k}" for k in range(self.count)]
        self._add_workers(names, host, port, patience, folder)

    def _add_workers(
        self, names: list[str], host: str, port: int, patience: float, folder: Path
    ) -> None:
        gpus = _gpus()
        for k, name in enumerate(names):
            spec = {
                "settings": self.settings.to_dict(),
                "space": self.space,
                "identity": self.identity,
                "folder": str(folder),
                "host": host,
                "port": port,
                "patience": patience,
                "worker": name,
                "cores": None if gpus and not self.threads else share(k, len(names), self.threads),
                "gpu": gpus[k % len(gpus)] if gpus else None,
            }
            log = self.out / "processes.txt"
            worker = _Process(name, "keras_norm._search_worker:run", spec, log)
            self.workers.append(worker)
            self._start(worker)

    def _start(self, process: _Process) -> None:
        process.child = self.nursery.start(
            f"kn-{process.name}", process.target, process.spec, process.log
        )
        if process is not self.chief:
            return
        answer: dict[str, Any] | None = None
        with contextlib.suppress(EOFError):
            answer = process.child.channel.receive()
        if answer is None:
            raise SearchError(self._last_words("The chief"))
        if "error" in answer:
            raise SearchError(f"The chief {answer['error']}")
        process.spec["port"] = answer["listening"]
        process.spec["absent"] = []

    # During the search

    def watch(self) -> None:
        """Watches the processes until the chief and all workers are done."""
        while not (self._chief_over() and all(w.over for w in self.workers)):
            if self.chief is not None and not self.chief.over:
                self._hear(self.chief, 0.2)
            else:
                time.sleep(0.2)
            for worker in self.workers:
                self._hear(worker, 0)
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.deadline = None
                self._close()
        self.display.end(self.outcome)

    def _chief_over(self) -> bool:
        return self.chief is None or self.chief.over

    def _close(self) -> None:
        self.display.note("The time is up: no new trial begins.")
        if self.chief is not None:
            with contextlib.suppress(OSError):
                self.chief.child.channel.send({"close": True})
            self.chief.spec["closed"] = True

    def _hear(self, process: _Process, timeout: float) -> None:
        """Takes in all messages that a process has sent by now."""
        if process.over:
            return
        try:
            while (message := process.child.channel.receive(timeout)) is not None:
                timeout = 0
                if self._take_in(process, message):
                    return
        except EOFError:
            self._restart(process)

    def _take_in(self, process: _Process, message: dict[str, Any]) -> bool:
        """Takes in one message; returns whether the process has ended."""
        if "over" in message:
            process.over = True
            if process is self.chief:
                self.outcome = message["over"]
            process.child.wait()
        elif "error" in message:
            raise SearchError(f"{process.name}: {message['error']}")
        elif "trial" in message:
            self.display.trial(message["trial"])
            if message["trial"]["status"] != "running":
                for other in [*self.workers, process]:
                    other.restarts = 0
        elif "refused" in message:
            self.display.refused(message["refused"])
        return process.over

    def _restart(self, process: _Process) -> None:
        code = process.child.wait()
        process.restarts += 1
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        if process.restarts > _RESTARTS:
            raise SearchError(self._last_words(f"{process.name}, again ({how}),"))
        self.display.note(f"{process.name} has died ({how}): restarted.")
        self._start(process)


def share(k: int, workers: int, threads: int | None) -> list[int]:
    """The cores of worker k; if there are too few for all, workers share them."""
    cores = _cores()
    each = threads or max(1, len(cores) // workers)
    return [cores[(k * each + i) % len(cores)] for i in range(each)]


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    from keras_norm._machine import gpu_names

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(n) for n in visible.split(",") if n.strip().isdecimal()]
    return list(range(len(gpu_names())))


# The table ----------------------------------------------------------------------------------


class _Display:
    """Shows a row for each trial that ends, and below them a bar with what is running."""

    def __init__(self, settings: Settings, show: bool) -> None:
        self.settings, self.show = settings, show
        self.running: dict[int, str] = {}
        self.ended: set[int] = set()
        self.best: tuple[float, int] | None = None
        self.refusals = 0
        self.bar: Any = None
        self.headed = False

    def note(self, text: str) -> None:
        if self.show:
            self._write(text)

    def known(self, records: list[TrialRecord]) -> None:
        """Takes in the trials of an earlier run."""
        for record in records:
            if record.status != "running":
                self.ended.add(record.number)
                self._rank({"score": record.score, "number": record.number})
        if self.ended:
            self.note(f"{len(self.ended)} trials are done already.")

    def refused(self, reason: str) -> None:
        self.refusals += 1
        if self.refusals == 1:
            self.note(f"The budget refuses proposals, such as one with {reason}.")

    def trial(self, event: Mapping[str, Any]) -> None:
        number, status = event["number"], event["status"]
        if status == "running":
            now = "" if event["now"] is None else f" {event['now']:.3f}"
            self.running[number] = f"#{number} {event['epoch']}/{event['epochs']}{now}"
        else:
            self.running.pop(number, None)
            self.ended.add(number)
            self._rank(event)
            self._row(event)
        self._refresh()

    def _rank(self, event: Mapping[str, Any]) -> None:
        if event["score"] is None:
            return
        sign = 1 if self.settings.direction == "max" else -1
        if self.best is None or sign * event["score"] > sign * self.best[0]:
            self.best = (event["score"], event["number"])

    def _row(self, event: Mapping[str, Any]) -> None:
        if not self.show:
            return
        if not self.headed:
            self.headed = True
            self._write(_line("trial", "status", "score", "epochs", "best", "s", "weights"))
        numbers = {k: event[k] for k in ("score", "seconds", "parameters")}
        cells = {
            "score": "" if numbers["score"] is None else f"{numbers['score']:.4f}",
            "seconds": "" if numbers["seconds"] is None else f"{numbers['seconds']:.1f}",
            "parameters": "" if numbers["parameters"] is None else f"{numbers['parameters']:,.0f}",
        }
        told = event["reason"] if event["status"] == "failed" else describe(event["values"])
        row = _line(
            event["number"],
            event["status"],
            cells["score"],
            event["epoch"],
            event["best_epoch"] or "",
            cells["seconds"],
            cells["parameters"],
            told,
        )
        width = shutil.get_terminal_size((120, 24)).columns
        self._write(row if len(row) < width else row[: width - 4] + "...")

    def _refresh(self) -> None:
        if not self.show:
            return
        with self._while_read():
            if self.bar is None:
                from tqdm import tqdm

                total = self.settings.planned
                self.bar = tqdm(total=total, unit="trial", disable=None, dynamic_ncols=True)
            self.bar.n = len(self.ended)
            best = "" if self.best is None else f"best {self.best[0]:.4f} (#{self.best[1]}) "
            self.bar.set_postfix_str(best + ", ".join(self.running.values()))

    def _write(self, text: str) -> None:
        text = printable(text)
        with self._while_read():
            if self.bar is not None and not self.bar.disable:
                self.bar.write(text)
            else:
                print(text, flush=True)

    @contextlib.contextmanager
    def _while_read(self) -> Iterator[None]:
        """Lets the search continue when nobody reads any more, as after a terminal was closed."""
        try:
            yield
        except OSError:
            self.show = False

    def end(self, outcome: Mapping[str, Any]) -> None:
        self.close()
        if outcome.get("exhausted"):
            self.note(f"No further trial: {outcome['exhausted']}.")
        if outcome.get("refused"):
            self.note(f"Proposals that the budget refused: {outcome['refused']}.")

    def close(self) -> None:
        if self.bar is not None:
            with self._while_read():
                self.bar.close()
            self.bar = None


def _line(*cells: Any) -> str:
    formats = (">5", "<9", ">12", ">6", ">4", ">7", ">10", "")
    return "  ".join(f"{cell:{f}}" for cell, f in zip(cells, formats, strict=False))


def printable(text: str) -> str:
    """The text, with "?" for what the output's encoding lacks: a reason may contain anything."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def describe(values: Mapping[str, Any]) -> str:
    """Hyperparameters in one line, the most informative first."""
    names = [n for n in _PREFERRED if n in values]
    names += [n for n in values if n not in names]
    shown = {n: f"{v:.3g}" if isinstance(v, float) else str(v) for n, v in values.items()}
    return " ".join(f"{n}={shown[n]}" for n in names)

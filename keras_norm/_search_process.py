"""Processes that need no import: one process imports Keras once, and forks all the others.

A trial of a search runs in a process of its own, so that its memory goes back to the system and
a crash affects no other. A new Python would spend seconds importing TensorFlow; so a *nursery*
imports everything and then does nothing but fork. It computes nothing, so TensorFlow has started
no threads in it, which makes the fork safe. Where a fork is not safe, on systems other than Linux
or when a user's module starts threads at import, each process is a new Python.

Parent and child exchange lines of JSON over a socket. The process that holds the other end of a
nursery's socket owns it: when the owner dies, in whatever way, the nursery kills its children and
ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

__all__ = ["Channel", "Child", "Nursery", "can_fork", "introduce"]

_PRELOAD = (
    "keras_tuner",
    "grpc",
    "keras_norm.callbacks",
    "keras_norm.datasets",
    "keras_norm.models",
    "keras_norm.optimizers",
    "keras_norm._search_chief",
    "keras_norm._search_retrain",
    "keras_norm._search_trial",
    "keras_norm._search_worker",
)
_FRESH = "import sys; from keras_norm import _search_process as p; sys.exit(p.{}(*sys.argv[1:]))"


_PATIENCE = 10.0  # seconds for a nursery to end by itself


class Channel:
    """Messages over a connected socket: dicts, each one line of JSON."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; raises OSError if the other end is gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None after `timeout` seconds; EOFError when the other end is gone."""
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self.socket], [], [], left)[0]:
                return None
            with contextlib.suppress(ConnectionResetError):
                if chunk := self.socket.recv(65536):
                    self._buffer += chunk
                    continue
            raise EOFError
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a message and waits for the answer."""
        self.send(message)
        answer = self.receive()
        return {} if answer is None else answer

    def close(self) -> None:
        self.socket.close()


class Child:
    """A process that a nursery has started; `channel` leads to it."""

    def __init__(self, nursery: Nursery, pid: int, channel: Channel) -> None:
        self.nursery, self.pid, self.channel = nursery, pid, channel

    def kill(self) -> None:
        """Kills the process at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Waits for the end. Returns the exit status, or minus the number of the signal."""
        self.channel.close()
        return int(self.nursery.channel.ask({"wait": self.pid})["status"])


class Nursery:
    """A process that has imported everything and forks others; see the module."""

    def __init__(self, channel: Channel, process: Any) -> None:
        self.channel = channel
        self._process = process
        self._asked = False

    @classmethod
    def new(cls, environment: dict[str, str], log: Path) -> Nursery:
        """A new Python, for a process that may have threads or that has imported nothing."""
        ours, theirs = socket.socketpair()
        with theirs, open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", _FRESH.format("serve"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the owner, who then closes the socket
            )
        return cls(Channel(ours), process)

    @classmethod
    def forked(cls, *to_close: Channel) -> Nursery:
        """A nursery forked from this process, which came from a nursery and has no threads yet."""
        if not can_fork():
            return cls.new(dict(os.environ), Path(os.devnull))
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for channel in to_close:
                channel.close()
            ours.close()
            introduce("kn-nursery")
            _serve(Channel(theirs))
        theirs.close()
        return cls(Channel(ours), pid)

    def start(self, name: str, target: str, spec: dict[str, Any], log: Path) -> Child:
        """Starts a process that runs `target`, "module:function", with (its channel, spec)."""
        self._asked = True
        ours, theirs = socket.socketpair()
        request = {"name": name, "target": target, "spec": spec, "log": str(log)}
        with theirs:
            line = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self.channel.socket, [line], [theirs.fileno()])
            if sent < len(line):
                self.channel.socket.sendall(line[sent:])
        answer = self.channel.receive()
        return Child(self, int((answer or {})["pid"]), Channel(ours))

    def preload(self, target: str, spec: dict[str, Any]) -> str | None:
        """Runs `target` in the nursery itself, to prepare what all children share.

        Returns:
            None, or what went wrong.
        """
        return self.channel.ask({"preload": target, "spec": spec}).get("error")

    def close(self) -> None:
        """Ends the nursery, which kills its children."""
        self.channel.close()
        if isinstance(self._process, int):
            os.waitpid(self._process, 0)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE if self._asked else 0)
        self._process.kill()  # it may still be importing; on Linux its children die with it
        self._process.wait()


def can_fork() -> bool:
    """Whether this process has only one thread: a lock held by another would stay locked."""
    return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


# In the nursery -----------------------------------------------------------------------------


def serve(fd: str) -> None:
    """The main function of a nursery that is a new Python."""
    channel = Channel(socket.socket(fileno=int(fd)))
    for name in _PRELOAD:
        importlib.import_module(name)
    gc.freeze()  # so that the collector does not write to pages that children share
    introduce("kn-nursery")
    _serve(channel)


def _serve(channel: Channel) -> None:
    """Answers requests until the owner is gone; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: set[int] = set()
    received: list[int] = []
    try:
        while True:
            line, received = _request(channel.socket)
            message = json.loads(line)
            if _is_closed(channel.socket):
                raise EOFError
            if "wait" in message:
                status = os.waitstatus_to_exitcode(os.waitpid(message["wait"], 0)[1])
                children.discard(message["wait"])
                channel.send({"status": status})
            elif "preload" in message:
                channel.send(_preloaded(message["preload"], message["spec"]))
            else:
                pid = _begin(channel, message, received[0])
                children.add(pid)
                channel.send({"pid": pid})
    except (EOFError, OSError):
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _is_closed(connected: socket.socket) -> bool:
    """Whether the owner is gone; it may have left a request behind."""
    poll = select.poll()
    poll.register(connected, 0)  # a hangup is always reported
    return bool(poll.poll(0))


def _request(connected: socket.socket) -> tuple[bytes, list[int]]:
    """One request, a line, with the socket that came along. (The owner sends one at a time.)"""
    line, received = b"", []
    while not line.endswith(b"\n"):
        chunk, fds, _, _ = socket.recv_fds(connected, 65536, 1)
        received += fds
        if not chunk:
            raise EOFError
        line += chunk
    return line, received


def _preloaded(target: str, spec: dict[str, Any]) -> dict[str, Any]:
    try:
        _function(target)(spec)
    except Exception as error:
        return {"error": str(error) or type(error).__name__}
    return {}


def _begin(channel: Channel, message: dict[str, Any], fd: int) -> int:
    """Starts one child; returns its process id."""
    if not can_fork():
        request = json.dumps({k: message[k] for k in ("name", "target", "spec", "log")})
        command = [sys.executable, "-c", _FRESH.format("alone"), str(fd), request]
        pid = subprocess.Popen(command, pass_fds=[fd]).pid
        os.close(fd)
        return pid
    pid = os.fork()
    if pid == 0:
        channel.close()
        _run(message, socket.socket(fileno=fd))
    os.close(fd)
    return pid


def alone(fd: str, request: str) -> None:
    """The main function of a child that is a new Python."""
    _run(json.loads(request), socket.socket(fileno=int(fd)))


def _run(message: dict[str, Any], connected: socket.socket) -> None:
    """The life of a child; never returns."""
    status = 1
    try:
        introduce(message["name"])
        log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        _function(message["target"])(Channel(connected), message["spec"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def introduce(name: str) -> None:
    """On Linux: sets a name for `top` and `pgrep`, and lets the kernel end it with its parent."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        libc.prctl(15, name.encode()[:15], 0, 0, 0)  # PR_SET_NAME
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _function(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)

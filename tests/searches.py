"""Searches whose processes come from one that has imported everything already.

A command and its nursery are each a new Python otherwise, and import TensorFlow, which is most of
what a search of tiny trials costs. Here a nursery, made once, forks the commands too, and what
would be a new nursery in them is a fork. Everything else is as it is for a user.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

from keras_norm import _search_process, _search_trial, cli
from keras_norm._search_process import Nursery
from keras_norm._search_settings import SearchError, environment


class Command:
    """`keras-norm …` in a process of its own; what it prints is in `log`."""

    def __init__(self, child, log):
        self.child, self.log, self.pid = child, log, child.pid
        self.returncode = None

    def kill(self):
        self.child.kill()

    def poll(self):
        """None while it, or one of its processes, is there; then as `wait`."""
        return self._ended(0)

    def wait(self, seconds=300):
        """Until it and all its processes are gone. Exit status, or minus the signal's number."""
        assert self._ended(seconds) is not None, f"still there; it has said: {self.said()}"
        return self.returncode

    def _ended(self, seconds):
        if self.returncode is None:
            try:
                self.child.channel.receive(seconds)
            except EOFError:  # the last who held the other end of the channel is gone
                self.returncode = self.child.wait()
        return self.returncode

    def said(self):
        return self.log.read_text()


class Imported:
    """The process that has imported everything; forks commands and nurseries."""

    def __init__(self, folder):
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.folder, self.commands = folder, 0
        self.nursery = Nursery.new({**environment(), "PYTHONPATH": path}, folder / "imported.txt")

    def start(self, *argv):
        """Starts a command with this process's environment as it is now."""
        self.commands += 1
        log = self.folder / f"command_{self.commands}.txt"
        spec = {"argv": list(map(str, argv)), "environment": dict(os.environ)}
        return Command(self.nursery.start("kn-command", "searches:command", spec, log), log)

    def new_nursery(self, environment, log):
        """Stands in for `Nursery.new`."""
        spec = {"environment": environment}
        child = self.nursery.start("kn-nursery", "searches:serve", spec, log)
        return Nursery(child.channel, _Process(child))

    def close(self):
        self.nursery.close()


class _Process:
    """A child as `subprocess` would show it."""

    def __init__(self, child):
        self.child, self.status = child, None

    def wait(self, timeout=None):
        if self.status is None:
            self.status = self.child.wait()
        return self.status

    def kill(self):
        if self.status is None:
            self.child.kill()


def command(channel, spec):
    """The life of a command; never returns."""
    os.environ.clear()
    os.environ.update(spec["environment"])
    _search_process.Nursery.new = staticmethod(_forked)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a nursery ignores it
    try:
        status = cli.main(spec["argv"])
    except SystemExit as error:
        status = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _forked(environment, log):
    os.environ.update(environment)
    return Nursery.forked()


def trial(channel, spec):
    """The process of a trial, without a worker."""
    os.environ.update(spec["environment"])
    _search_trial.run(channel, spec["spec"])


def keep_data(channel, spec):
    """Sends what becomes of several data sets that are read for a folder."""
    folder = spec["folder"]

    def kept(make, file):
        try:
            return _search_trial._made_elsewhere(make, file, folder)
        except SearchError as error:
            return str(error)

    def in_folder():
        return {"files": os.listdir(folder), "x": np.arange(5.0), "y": np.zeros(3, "int8")}

    def bad():
        raise ValueError("no such data")

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    with tempfile.TemporaryFile(dir=folder) as file:
        found = kept(in_folder, file)
        arrays = [found["x"].tolist(), found["y"].tolist(), found["x"].flags.writeable]
        channel.send({"files": found["files"], "arrays": arrays})
        channel.send({"bad": kept(bad, file), "killed": kept(killed, file)})
    with open("/dev/full", "r+b", buffering=0) as full:
        channel.send({"full": kept(in_folder, full)})


def serve(channel, spec):
    """The life of a nursery; never returns."""
    os.environ.clear()
    os.environ.update(spec["environment"])
    _search_process._serve(channel)

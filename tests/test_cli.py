"""The command: what is wrong is one line and status 2; help costs no import of TensorFlow."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keras_norm import __version__, tuning
from keras_norm.cli import main


def refused(capsys, *argv):
    """The one line that the command leaves behind."""
    try:
        status = main(list(map(str, argv)))
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.partition("error: ")[2]


def test_help_is_fast():
    code = (
        "import sys; from keras_norm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'keras', 'tensorflow', 'matplotlib', 'keras_tuner'} "
        "& set(sys.modules)))"
    )
    for argv in (["--help"], ["tune", "--help"], ["report", "--help"], ["retrain", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage: keras-norm" in done.stdout
        assert done.stdout.endswith("[]\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tune"], "the following arguments are required: --out"),
        (["tune", "--out", "x", "--trails", "3"], "unrecognized arguments: --trails 3"),
        (["tune", "--out", "x", "--tria", "3"], "unrecognized arguments: --tria 3"),
        (["tune", "--out", "x", "--trials", "0"], "must be a whole number, at least 1; got '0'"),
        (["tune", "--out", "x", "--max-parameters", "0.5e0"], "at least 1; got '0.5e0'"),
        (["tune", "--out", "x", "--trial-memory", "all"], "must be a number, or none; got 'all'"),
        (["tune", "--out", "x", "--join", "a:1", "--resume"], "The chief decides on resume"),
        (["tune", "--out", "x", "--join", "a:1", "--time-limit", "1"], "decides on time_limit"),
        (["tune", "--out", "x", "--join", "a:1", "--overwrite"], "The chief decides on overwrite"),
        (["tune", "--out", "x", "--fix", "family"], "must be NAME=VALUE; got 'family'"),
        (
            ["tune", "--out", "x", "--fix", "family=mlp", "family=cnn"],
            "--fix takes one value of each name: leave one out. Received: family=mlp and family=cn",
        ),
        (["tune", "--out", "x", "--resume", "--overwrite"], "not allowed with argument"),
        (["tune", "--out", "x", "--validation", "2"], "between 0 and 1. Received: validation=2.0"),
        (["tune", "--out", "x", "--chief", "8100"], "An address is HOST:PORT"),
        (["tune", "--out", "x", "--workers", "0"], "workers must be a whole number, at least 1"),
        (["tune", "--out", "x", "--threads", "0"], "threads must be a whole number from 1 to "),
        (["tune", "--out", "x", "--worker-timeout", "9"], "must be seconds, at least 10, for"),
        (["tune", "--out", "x", "--resume"], "There is no search to resume in 'x'"),
        (["tune", "--out", "x", "--refine", "y"], "There is no search in '"),
        (["tune", "--out", "x", "--tuner", "hyperband", "--trials", "9"], "30: leave out trials"),
        (["report", "x"], "There is no search in 'x'"),
        (["retrain", "x"], "There is no search in 'x'"),
    ],
)
def test_wrong_arguments(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_search_without_a_score_has_failed(capsys, tmp_path, monkeypatch):
    failed = tuning.TrialRecord(0, "failed", "no luck", None, {}, {})
    found = tuning.Search(tmp_path, tuning.Settings(), [failed])
    monkeypatch.setattr(tuning, "search", lambda *arguments, **options: found)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    assert main(["tune", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "1 trials, 1 of them failed" in said.out
    assert "retrain" not in said.out
    assert "No trial has a score" in said.err


def test_numbers_and_limits_that_are_taken_off(tmp_path, monkeypatch):
    given = {}

    def search(out, **options):
        given.update(options)
        raise tuning.SearchError("enough")

    monkeypatch.setattr(tuning, "search", search)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    limits = ["--max-parameters", "1.5e3", "--trials", "1_0", "--trial-timeout", "none"]
    fixed = ["--fix", "a=1", "b=2", "--fix", "c=3"]
    assert main(["tune", "--out", str(tmp_path), *limits, *fixed]) == 2
    found = {name: given[name] for name in ("max_parameters", "trials", "trial_timeout", "fixed")}
    expected = {"max_parameters": 1500, "trials": 10, "trial_timeout": None}
    assert found == {**expected, "fixed": {"a": "1", "b": "2", "c": "3"}}


def test_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    message = refused(capsys, "tune", "--data", "digits", "--out", tmp_path / "file" / "search")
    assert message.startswith("Cannot write to")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_the_end(capsys, monkeypatch, number):
    """Where the best are put together it was a traceback."""

    def full(*arguments, **options):
        raise OSError(number, "No room", "a/model.keras")

    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    for name in ("search", "report", "retrain"):
        monkeypatch.setattr(tuning, name, full)
    said = f"[Errno {number}] No room: 'a/model.keras'"
    assert refused(capsys, "tune", "--out", "a") == said
    assert refused(capsys, "report", "a") == said
    message = refused(capsys, "retrain", "a")
    assert message == f"{said}. Make room: the same command goes on from the last epoch."
    number = errno.EIO  # none that the user can put right
    with pytest.raises(OSError, match="No room"):
        main(["retrain", "a"])


def test_port_in_use_and_chief_that_is_not_there(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        message = refused(capsys, "tune", "--out", tmp_path / "a", "--chief", address)
        assert message == f"Cannot listen on {address}: Address already in use."
    message = refused(capsys, "tune", "--out", tmp_path / "a", "--join", address)
    assert message == f"The chief at {address} cannot be reached: Connection refused."
    message = refused(capsys, "tune", "--out", tmp_path / "a", "--join", address, "--trials", "3")
    assert message == "The chief decides on trials: leave it out when joining."
    assert list(tmp_path.iterdir()) == []


def test_warning_where_others_can_reach_the_chief(capsys, tmp_path):
    wrong = ["--validation", "2"]  # ends it before there is a chief
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)):
        assert main(["tune", "--out", str(tmp_path / "a"), "--chief", f"{host}:0", *wrong]) == 2
        said = capsys.readouterr().err
        assert ("neither passwords nor encryption" in said) == warned


def heeds_interrupts():
    """A shell that starts the tests in the background has them, and theirs, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_interrupt_before_a_search_has_begun_leaves_nothing(tmp_path):
    pytest.importorskip("keras_tuner")
    command = [sys.executable, "-m", "keras_norm", "tune", "--data", "digits", "--out", "a b"]
    search = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=heeds_interrupts,
    )
    try:
        own = Path(f"/proc/{search.pid}/task/{search.pid}/children")
        end = time.monotonic() + 60
        while not own.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        nursery = int(own.read_text().split()[0])
        time.sleep(0.5)
        search.send_signal(signal.SIGINT)
        said = search.communicate(timeout=120)[1]
    finally:
        search.kill()
        search.communicate()
    assert search.returncode == 130
    assert "The search had not begun: the same command begins it." in said
    assert not (tmp_path / "a b").exists()
    assert not os.path.exists(f"/proc/{nursery}")

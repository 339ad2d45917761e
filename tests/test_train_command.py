"""`keras-norm train`: what it prints, saves and refuses."""

import json
import os

import keras
import pytest

from keras_norm import cli, recipes
from keras_norm._files import locked


def test_the_command_trains_and_saves(tmp_path, capsys):
    arguments = ["train", "--recipe", "smoke", "--data", "digits", "--validation", "300"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert f"validation_accuracy          {card['metrics']['validation_accuracy']:.4f}" in printed
    assert "300 validation images" in card["data"]
    assert card["metrics"]["validation_accuracy"] > 0.5
    assert keras.models.load_model(tmp_path / "run" / "model.keras").count_params() > 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["card.json", "model.keras"]
    assert cli.main([*arguments[:-1], "9999", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "9999" in error.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--recipe", "quick"])


def test_a_model_that_cannot_be_saved_costs_no_training(tmp_path, capsys, monkeypatch):
    arguments = ["train", "--recipe", "smoke", "--data", "digits", "--validation", "300"]
    (tmp_path / "file").touch()
    (tmp_path / "run/model.keras").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "_shown", None)  # nobody may get there
        for out, reason in (("file", "File exists"), ("run", "model.keras is a folder there")):
            assert cli.main([*arguments, "--out", str(tmp_path / out)]) == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.endswith(f"--out: cannot write to {str(tmp_path / out)!r}: {reason}")
    (tmp_path / "run/model.keras").rmdir()

    def full(outcome, folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recipes.Outcome, "save", full)
        assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert (tmp_path / "run/backup.npz").exists()


def test_what_is_wrong_is_said_before_the_data_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "load", None)  # nobody may get there
    arguments = ["train", "--recipe", "smoke", "--out", str(tmp_path / "run")]
    for wrong, received in (
        (["--seed", "5000000000"], "seed=5000000000"),
        (["--dtype-policy", "mixed_float61"], "dtype_policy='mixed_float61'"),
    ):
        assert cli.main([*arguments, *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("keras-norm: error: `")
        assert line.endswith(f"Received: {received}.")
    assert not (tmp_path / "run").exists()


def test_one_command_at_a_time(tmp_path, capsys):
    """The second went on from the backup of the first, and removed it."""
    arguments = ["train", "--recipe", "smoke", "--data", "digits", "--out", str(tmp_path)]
    (tmp_path / "backup.npz").touch()
    with locked(tmp_path):
        assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out={str(tmp_path)!r}, in use by process {os.getpid()}" in line
    assert cli.main(arguments) == 2  # the lock is gone, and what is left cannot be read
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("cannot be read. Remove it to begin anew.")
    assert [p.name for p in tmp_path.iterdir()] == ["backup.npz"]


def test_a_backup_that_is_removed_meanwhile(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "_shown", lambda *arguments: Done())
    arguments = ["train", "--recipe", "smoke", "--data", "digits", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "are written" in capsys.readouterr().out


class Done:
    """The outcome of a training that leaves no backup."""

    metrics, seconds, dtype_policy = {}, {"training": 1.0}, "float32"

    def save(self, folder):
        return folder / "model.keras"

"""`keras-norm train`: what it prints, saves and refuses."""

import json

import keras
import pytest

from keras_norm import cli, recipes


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

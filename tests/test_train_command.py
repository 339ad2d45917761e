"""`keras-norm train`: what it prints, saves and refuses."""

import json

import keras
import pytest

from keras_norm import cli


def test_the_command_trains_and_saves(tmp_path, capsys):
    arguments = ["train", "--recipe", "smoke", "--data", "digits", "--validation", "300"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert f"validation_accuracy          {card['metrics']['validation_accuracy']:.4f}" in printed
    assert "300 validation images" in card["data"]
    assert card["metrics"]["validation_accuracy"] > 0.5
    assert keras.models.load_model(tmp_path / "run" / "model.keras").count_params() > 0
    assert cli.main([*arguments[:-1], "9999", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "9999" in error.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--recipe", "quick"])

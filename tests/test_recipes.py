"""Trainings by name: they learn, can be interrupted, and leave a model with its card."""

import dataclasses
import functools
import json

import keras
import numpy as np
import pytest
from arrays import array

from keras_norm import datasets, recipes

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("recipes")]

SMALL = recipes.Recipe(
    name="small", widths=(16, 16), epochs=3, batch_size=32, learning_rate=12.0, flip="none", shift=0
)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", standardize="channel", image_size=9, validation=300)


@pytest.fixture(scope="module")
def outcome(digits):
    return recipes.train(SMALL, digits, seed=1)


def test_a_recipe_learns(outcome):
    assert outcome.metrics["validation_accuracy"] > 0.95
    assert outcome.metrics["validation_accuracy_views"] > 0.8
    assert set(outcome.metrics) == {
        f"validation_{m}{v}" for m in ("accuracy", "loss") for v in ("", "_views")
    }
    accuracy = outcome.history["accuracy"]
    assert len(accuracy) == 3
    assert accuracy[-1] > accuracy[0]


def interrupted(recipe, data, backup, done):
    """Begins a training, and interrupts it in the middle of the epoch after `done`."""

    def interrupt(epochs, metrics):
        if epochs > done + 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipes.train(recipe, data, seed=1, backup=backup, on_epoch=interrupt)


def same_weights(a, b):
    for v, w in zip(a.model.variables, b.model.variables, strict=True):
        np.testing.assert_array_equal(array(v), array(w))


@pytest.mark.slow_on_jax
def test_interrupted_and_resumed_it_ends_with_the_same_weights(digits, outcome, tmp_path):
    backup = tmp_path / "backup.npz"
    interrupted(SMALL, digits, backup, 2)
    seen = []
    again = recipes.train(
        SMALL, digits, seed=1, backup=backup, on_epoch=lambda n, metrics: seen.append(n)
    )
    assert min(seen) > 2
    assert again.history == outcome.history
    same_weights(again, outcome)
    seen.clear()  # nothing is lost while the outcome is not saved; and it is the same of NumPy's
    numpys = dataclasses.replace(SMALL, epochs=np.int64(3), batch_size=np.int64(32))
    again = recipes.train(
        numpys, digits, seed=np.int64(1), backup=backup, on_epoch=lambda n, m: seen.append(n)
    )
    assert not seen
    assert json.loads(json.dumps(again.card()))["recipe"]["epochs"] == 3
    assert (again.history, again.metrics) == (outcome.history, outcome.metrics)
    same_weights(again, outcome)


@pytest.mark.slow_on_jax
def test_resumed_with_muon(digits, tmp_path):
    muon = dataclasses.replace(SMALL, widths=(8,), matrix_rate=0.1, epochs=2)
    straight = recipes.train(muon, digits, seed=1)
    interrupted(muon, digits, tmp_path / "backup.npz", 1)
    again = recipes.train(muon, digits, seed=1, backup=tmp_path / "backup.npz")
    assert again.history == straight.history
    same_weights(again, straight)


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16"])
def test_resumed_in_half_precision(tmp_path, policy):
    few = datasets.load("digits", standardize="channel", image_size=9, subset=128, validation=20)
    short = dataclasses.replace(SMALL, widths=(4, 4), epochs=2, dtype_policy=policy)
    interrupted(short, few, tmp_path / "backup.npz", 1)
    seen = []
    again = recipes.train(
        short, few, seed=1, backup=tmp_path / "backup.npz", on_epoch=lambda n, m: seen.append(n)
    )
    assert min(seen) > 1
    assert len(again.history["loss"]) == 2


def test_a_backup_of_another_training(digits, tmp_path):
    backup = tmp_path / "backup.npz"
    interrupted(SMALL, digits, backup, 1)
    before = backup.read_bytes()
    with pytest.raises(ValueError, match=r"backup=.*another training"):
        recipes.train(SMALL, digits, seed=2, backup=backup)
    with pytest.raises(ValueError, match="another training"):
        recipes.train(dataclasses.replace(SMALL, l2=0.0), digits, seed=1, backup=backup)
    assert backup.read_bytes() == before


def damaged(kind, path):
    """Files in the place of a backup: cut off, overwritten, of something else."""
    if kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "other":
        np.savez(path, a=np.zeros(3))
    elif kind == "truncated":
        np.savez(path, notes=np.array("{}"))
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_bytes({"empty": b"", "noise": bytes(range(7, 250)) * 9}[kind])


@pytest.mark.parametrize("kind", ["empty", "noise", "truncated", "array", "other"])
def test_a_backup_that_cannot_be_read(kind, digits, tmp_path):
    backup = tmp_path / "backup.npz"
    damaged(kind, backup)
    before = backup.read_bytes()
    with pytest.raises(ValueError, match=r"backup=.*cannot be read\. Remove it to begin anew\.$"):
        recipes.train(SMALL, digits, backup=backup)
    assert backup.read_bytes() == before


@pytest.mark.slow_on_jax
def test_the_policy_is_the_faster_one_and_that_of_the_backup(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "fastest_policy", lambda: "mixed_bfloat16")
    recipe = dataclasses.replace(SMALL, widths=(4,), epochs=2, dtype_policy="auto")
    interrupted(recipe, digits, tmp_path / "backup.npz", 1)
    monkeypatch.setattr(recipes, "fastest_policy", lambda: "float32")
    outcome = recipes.train(recipe, digits, seed=1, backup=tmp_path / "backup.npz")
    assert outcome.card()["dtype_policy"] == "mixed_bfloat16"
    assert outcome.model.get_layer("conv1a").compute_dtype == "bfloat16"
    assert outcome.model.output.dtype == "float32"
    short = dataclasses.replace(recipe, widths=(2,), epochs=1, lookahead=False, whitening=False)
    assert recipes.train(short, digits, seed=1).dtype_policy == "float32"


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="its batches come from NumPy")
@pytest.mark.slow_on_jax
def test_batches_cut_out_on_the_device_are_the_same(digits, monkeypatch):
    recipe = dataclasses.replace(SMALL, epochs=1, flip="random", shift=1)
    host = recipes.train(recipe, digits, seed=1)
    monkeypatch.setattr(recipes, "_batches_on_device", lambda: True)
    device = recipes.train(recipe, digits, seed=1)
    for a, b in zip(host.model.variables, device.model.variables, strict=True):
        np.testing.assert_array_equal(array(a), array(b))


def test_model_and_card_are_saved(digits, outcome, tmp_path):
    path = outcome.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["metrics"] == outcome.metrics
    assert card["recipe"]["widths"] == [16, 16]
    assert card["seed"] == 1
    assert "300 validation images" in card["data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "model.keras"]
    model = keras.models.load_model(path)
    x = digits.validation.x[:50]
    np.testing.assert_array_equal(model.predict(x, verbose=0), outcome.model.predict(x, verbose=0))


@pytest.mark.slow_on_jax
def test_settings_reach_the_training(digits):
    recipe = dataclasses.replace(
        SMALL, epochs=1, lookahead=False, whitening=False, normalization=None, reestimate=0
    )
    model = recipes.train(recipe, digits).model
    names = [layer.name for layer in model.layers]
    assert "conv0" in names
    assert not any(name.endswith("_norm") for name in names)
    model = SMALL.model((9, 9, 1))
    optimizer = SMALL.optimizer(model, 100)
    assert float(optimizer.learning_rate) == pytest.approx(0.2 * 12 * 32 / 1024)
    assert optimizer.learning_rate_multipliers == {r"_norm/beta$": 64, "": 1}
    muon = dataclasses.replace(SMALL, matrix_rate=0.2).optimizer(model, 100)
    assert float(muon.learning_rate) == pytest.approx(0.2 * 0.2)
    assert muon.learning_rate_multipliers[""] == pytest.approx(12 * 32 / 1024 / 0.2)


@pytest.mark.slow_on_jax
def test_statistics_are_reestimated_at_the_end(digits, outcome):
    again = recipes.train(dataclasses.replace(SMALL, reestimate=500), digits, seed=1)
    assert again.report is not None
    assert "500 examples" in again.card()["statistics"]
    kernel, same = (o.model.get_layer("conv1a").kernel for o in (again, outcome))
    np.testing.assert_array_equal(array(kernel), array(same))
    means = [o.model.get_layer("conv1a_norm").moving_mean for o in (again, outcome)]
    assert not np.allclose(array(means[0]), array(means[1]), atol=1e-6)


def test_operations_are_counted():
    dense = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    assert recipes.flops(dense) == 2 * (5 * 3 + 3 * 2)
    nested = keras.Sequential([keras.Input((5,)), dense])
    assert recipes.flops(nested) == recipes.flops(dense)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_operations_of_convolutions(data_format):
    shape = (6, 6, 3) if data_format == "channels_last" else (3, 6, 6)
    layers = [keras.layers.Conv2D(8, 3, data_format=data_format),
              keras.layers.Conv2DTranspose(4, 2, 2, data_format=data_format)]  # fmt: skip
    per_position = 3 * 3 * 3 * 8, 2 * 2 * 8 * 4  # of 4 x 4 outputs, and of as many inputs
    inputs = keras.Input(shape)
    try:
        model = keras.Model(inputs, layers[1](layers[0](inputs)))
    except (ValueError, NotImplementedError) as error:  # TensorFlow on a CPU
        pytest.skip(str(error)[:80])
    assert recipes.flops(model) == 2 * 4 * 4 * sum(per_position)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"matrix_rate": 0.0}, r"matrix_rate=0\.0"),
        ({"views": 9}, "views=9"),
    ],
)
def test_settings_out_of_their_range_are_seen_before_the_training(changes, message, digits):
    with pytest.raises(ValueError, match=message):
        recipes.train(dataclasses.replace(SMALL, **changes), digits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": True}, "seed=True"),
        ({"dtype_policy": "mixed_float61"}, "dtype_policy='mixed_float61'"),
        ({"dtype_policy": "int32"}, "dtype_policy='int32'"),
    ],
)
def test_seed_and_policy_are_checked_before_anything_is_read(options, message, monkeypatch):
    monkeypatch.setattr(recipes, "load", None)  # nobody may get there
    with pytest.raises(ValueError, match=message):
        recipes.train(SMALL, **options)


def own_normalization(name=None):
    return keras.layers.BatchNormalization(name=name)


def test_a_function_is_known_by_its_name():
    """And not by its address, which is another one when a training is resumed."""
    for function in (own_normalization, functools.partial(own_normalization)):
        text = recipes.settings(dataclasses.replace(SMALL, normalization=function))["normalization"]
        assert "own_normalization" in text
        assert "0x" not in text


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="recipe='fast'"):
        recipes.train("fast")


@pytest.mark.slow_on_jax
def test_the_net_of_the_course():
    recipe = recipes.RECIPES["course"]
    model = recipe.model()
    kernels = [
        tuple(layer.kernel.shape[:2]) for layer in model.layers if "Conv" in str(type(layer))
    ]
    assert kernels == [(5, 5)] * 4

    def spread(model, name):
        return model.get_layer(name).kernel.numpy().std()

    for name in ("conv2_1", "conv3_1"):
        assert spread(model, name) == pytest.approx(recipe.weight_std, rel=0.05)
    with pytest.raises(ValueError, match="weight_std=0"):
        dataclasses.replace(recipe, weight_std=0).model()
    of_he = dataclasses.replace(recipe, weight_std=None).model()
    assert spread(of_he, "conv2_1") == pytest.approx(np.sqrt(2 / (25 * 32)), rel=0.2)
    assert float(recipe.optimizer(model, 10).learning_rate) == pytest.approx(1e-4)


def test_someone_must_be_judged():
    data = recipes.load("digits", validation=100)
    with pytest.raises(ValueError, match="At least one net"):
        recipes.judge([], data)

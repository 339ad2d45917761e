"""Callbacks: the learning-rate range test."""

import math

import keras
import numpy as np
import pytest

from keras_norm import optimizers
from keras_norm.callbacks import LearningRateRangeTest

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()


def problem(count=192):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(count, 6)).astype("float32")
    return x, (x @ np.arange(6.0).reshape(6, 1) + 1).astype("float32")


def network(optimizer, dropout=None):
    """A small MLP; with dropout (of its own seed) also batch norm: state of every kind."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh")])
    if dropout is not None:
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.Dropout(dropout, seed=3))
    model.add(keras.layers.Dense(1))
    model.compile(optimizer, "mse")
    return model


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(v.numpy()) for v in variables]


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a, b) for a, b in zip(left, right, strict=True)
    )


def fit(model, callbacks, epochs=4, **kwargs):
    x, y = problem()
    settings = {"batch_size": 16, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=callbacks, **{**settings, **kwargs})


class Spy(keras.callbacks.Callback):
    """Records what another callback, after the test in the list, gets to see."""

    def __init__(self):
        super().__init__()
        self.rates, self.at_epoch_end = [], None

    def on_train_batch_begin(self, batch, logs=None):
        rate = keras.ops.convert_to_tensor(self.model.optimizer.learning_rate)
        self.rates.append(float(keras.ops.convert_to_numpy(rate)))

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch_end = state(self.model)


# The sweep


@pytest.mark.parametrize(
    ("scale", "scheduled"), [("exponential", False), ("exponential", True), ("linear", True)]
)
def test_sweeps_and_puts_everything_back(scale, scheduled):
    rate = optimizers.PiecewiseLinear([0, 9], [0.05, 0.01]) if scheduled else 0.01
    model = network(optimizers.SGD(rate, momentum=0.9), dropout=0.2)
    fit(model, None, epochs=1)  # the step is traced, the optimizer has a state
    before, spy = state(model), Spy()
    test = LearningRateRangeTest(1e-4, 1e-2, 20, scale=scale, divergence=1e6)
    fit(model, [test, spy])
    assert test.status == "finished"
    assert same(state(model), before)
    assert same(spy.at_epoch_end, before)
    if scheduled:
        assert model.optimizer._learning_rate is rate
    expected = {"exponential": np.geomspace, "linear": np.linspace}[scale](1e-4, 1e-2, 20)
    record = test.results()
    np.testing.assert_allclose(record["learning_rate"], expected, rtol=1e-5)
    np.testing.assert_allclose(spy.rates, expected, rtol=1e-5)
    assert record["step"].tolist() == list(range(20))
    assert all(len(column) == 20 for column in record.values())
    assert len(np.unique(record["loss"])) == 20


@pytest.mark.slow_on_jax
def test_the_model_trains_as_if_nothing_had_been():
    """Fit, test, fit is fit, fit to the last bit: also the step traced for the test is gone."""
    schedule = optimizers.CyclicalLearningRate(0.001, 0.05, half_cycle=5)
    tested, plain = (network(optimizers.Adam(schedule), dropout=0.3) for _ in range(2))
    for model in (tested, plain):
        fit(model, None, epochs=1)
    fit(tested, [LearningRateRangeTest(1e-3, 1, 15)])
    for model in (tested, plain):
        fit(model, None, epochs=1)
    assert same(state(tested), state(plain))


def test_losses_are_those_of_single_batches():
    """By hand: the same batches at the same rates."""
    test = LearningRateRangeTest(1e-3, 0.1, 20, window=3)
    fit(network(keras.optimizers.SGD(0.5)), [test])
    model, expected = network(keras.optimizers.SGD(0.5)), []
    x, y = problem()
    for step in range(20):
        part = slice(16 * (step % 12), 16 * (step % 12) + 16)
        model.optimizer.learning_rate = test.learning_rate(step)
        model.reset_metrics()
        expected.append(float(model.train_on_batch(x[part], y[part], return_dict=True)["loss"]))
    record = test.results()
    np.testing.assert_allclose(record["loss"], expected, rtol=1e-5)
    smoothed = [np.mean(expected[max(0, k - 1) : k + 2]) for k in range(20)]
    np.testing.assert_allclose(record["smoothed_loss"], smoothed, rtol=1e-5)


def test_stops_on_divergence():
    model = network(keras.optimizers.SGD(0.01))
    test = LearningRateRangeTest(1e-3, 1e4, 40)
    before = [v.numpy().copy() for v in model.variables]
    history = fit(model, [test], epochs=10)
    assert test.status == "diverged"
    record = test.results()
    assert 10 < len(record["loss"]) < 40
    assert same([v.numpy() for v in model.variables], before)
    assert int(model.optimizer.iterations) == 0
    assert len(history.epoch) < 10
    tail = record["loss"][-5:].mean()
    means = [record["loss"][k - 5 : k].mean() for k in range(5, len(record["loss"]))]
    assert tail > 4 * min(means)
    assert all(m <= 4 * min(means[: k + 1]) for k, m in enumerate(means))


def test_stops_on_a_loss_that_is_not_finite():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    test = LearningRateRangeTest(1e3, 1e9, 40, window=39)
    before = state_of_weights(model)
    fit(model, [test])
    assert test.status == "diverged"
    assert not math.isfinite(test.results()["loss"][-1])
    assert np.all(np.isfinite(test.results()["loss"][:-1]))
    assert same(state_of_weights(model), before)
    with pytest.raises(ValueError, match=r"two windows, 78 batches. Received: \d+ finite losses"):
        test.suggestion()


def state_of_weights(model):
    return [np.array(w) for w in model.get_weights()]


def test_data_that_ends_early():
    model = network(keras.optimizers.SGD(0.01))
    before = state_of_weights(model)
    test = LearningRateRangeTest(1e-4, 1e-2, 30)
    with pytest.warns(UserWarning, match="12 of 30 batches"):
        fit(model, [test], epochs=1)
    assert test.status == "data ended"
    assert len(test.results()["loss"]) == 12
    assert same(state_of_weights(model), before)


def test_with_a_moving_average_of_the_weights():
    """Keras puts the average into the weights when `fit` ends, after the test has ended."""
    model = network(optimizers.SGD(0.01, use_ema=True, ema_overwrite_frequency=3))
    fit(model, None, epochs=1)
    before = state(model)
    fit(model, [LearningRateRangeTest(1e-4, 1e-2, 20)])
    assert same(state(model), before)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network(optimizers.SGD(0.25))
        fit(model, None, epochs=1)
        before, spy = state(model), Spy()
        fit(model, [LearningRateRangeTest(1e-4, 1e-2, 20, divergence=1e6), spy])
        assert same(state(model), before)
        np.testing.assert_allclose(spy.rates, np.geomspace(1e-4, 1e-2, 20), rtol=1e-5)
        assert float(model.optimizer.learning_rate.numpy()) == 0.25
    finally:
        keras.config.set_dtype_policy("float32")


# Interruptions


def fail_at(model, count, error):
    """Lets the training step raise when it has been taken so many times."""
    make = model.make_train_function

    def make_train_function(force=False):
        if model.train_function is not None and not force:
            return
        make(force=True)
        step, calls = model.train_function, []

        def train_function(*args):
            result = step(*args)
            calls.append(None)
            if len(calls) == count:
                raise error
            return result

        model.train_function = train_function

    model.train_function = None
    model.make_train_function = make_train_function


@pytest.mark.parametrize(
    ("error", "scheduled"), [(KeyboardInterrupt(), False), (ValueError("unheard of"), True)]
)
def test_interrupted_in_the_training_step(error, scheduled):
    rate = optimizers.PiecewiseLinear([0, 9], [0.05, 0.01]) if scheduled else 0.01
    model = network(optimizers.SGD(rate, momentum=0.9), dropout=0.2)
    fit(model, None, epochs=1)
    make = model.make_train_function
    before, test = state(model), LearningRateRangeTest(1e-4, 1e-2, 20, divergence=1e6)
    fail_at(model, 8, error)
    with pytest.raises(type(error)):
        fit(model, [test])
    assert same(state(model), before)
    assert test.status == "interrupted"
    assert len(test.results()["loss"]) == 7
    if scheduled:
        assert model.optimizer._learning_rate is rate
        assert model.train_function is None  # the next `fit` traces a step with the schedule
    model.make_train_function = make
    fit(model, None, epochs=1)
    assert not same(state(model), before)


class FailingCallback(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 8:
            raise KeyboardInterrupt


def test_interrupted_elsewhere():
    """Keras does not tell callbacks: the `with` block does."""
    model = network(optimizers.SGD(0.01, momentum=0.9))
    fit(model, None, epochs=1)
    before, step = state(model), model.train_function
    test = LearningRateRangeTest(1e-4, 1e-2, 20)
    with pytest.raises(KeyboardInterrupt), test:
        fit(model, [test, FailingCallback()])
    assert test.status == "interrupted"
    assert same(state(model), before)
    assert model.train_function is step
    # And without: at the next `fit`, or by hand, any time later.
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(model, [test, FailingCallback()])
    test.restore()
    assert same(state(model), before)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [test, FailingCallback()])
    assert not same(state(model), before)
    test.restore()
    test.restore()
    assert same(state(model), before)


def test_data_that_fails():
    """An exception of the data: in the step on TensorFlow and JAX, outside of it on PyTorch."""

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            if index == 7:
                raise RuntimeError("disk on fire")
            x, y = problem()
            return x[16 * index : 16 * index + 16], y[16 * index : 16 * index + 16]

    model = network(optimizers.SGD(0.01, momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    before, test = state(model), LearningRateRangeTest(1e-4, 1e-2, 20)
    with pytest.raises(Exception, match="disk on fire"), test:
        model.fit(Data(), epochs=2, shuffle=False, verbose=0, callbacks=[test])
    assert test.status == "interrupted"
    assert same(state(model), before)


# What is read off the curve


def recorded(losses, minimum=1e-4, maximum=1.0, **kwargs):
    """A test that has seen these losses."""
    test = LearningRateRangeTest(minimum, maximum, len(losses), **kwargs)
    test._losses = [float(loss) for loss in losses]
    test._rates = [test.learning_rate(k) for k in range(len(losses))]
    test.status = "finished"
    return test


def curve(rates):
    """Falls most at 1e-2 and is lowest at 1e-1, in log rate; then rises."""
    u = np.log10(rates)
    fall = -np.tanh(2 * (u + 2))
    return 3 + fall + np.where(u > -1, 20 * (u + 1) ** 2, 0)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_suggestion_finds_the_steepest_and_the_lowest_point(noise):
    rates = np.geomspace(1e-4, 1, 201)
    noise = noise * np.random.default_rng(0).normal(size=201)
    steepest, lowest = recorded(curve(rates) + noise).suggestion()
    assert math.log10(steepest) == pytest.approx(-2, abs=0.05 if not noise.any() else 0.15)
    assert math.log10(lowest) == pytest.approx(-1, abs=0.2)


def test_suggestion_survives_a_divergence_at_the_end():
    rates = np.geomspace(1e-4, 1, 201)
    losses = curve(rates)
    losses[170:] = np.geomspace(1e3, 1e30, 31)
    losses[-1] = math.nan
    steepest, lowest = recorded(losses).suggestion()
    assert math.log10(steepest) == pytest.approx(-2, abs=0.05)
    assert math.log10(lowest) == pytest.approx(-1, abs=0.2)


def test_no_suggestion_without_descent():
    with pytest.raises(ValueError, match=r"losses that rise.*rate 0\.0001"):
        recorded(np.linspace(1, 2, 50)).suggestion()
    with pytest.raises(ValueError, match=r"two windows, 10 batches. Received: 0 .*'not started'"):
        LearningRateRangeTest(steps=50).suggestion()


def test_suggested_rate_trains():
    """What it is for: the suggested rate beats one a hundred times smaller, and a too large one."""
    test = LearningRateRangeTest(1e-5, 10, 60)
    fit(network(keras.optimizers.SGD(0.1)), [test], epochs=10)
    steepest, lowest = test.suggestion()
    assert steepest < lowest

    def loss(rate):
        model = network(keras.optimizers.SGD(rate))
        return fit(model, None, epochs=3).history["loss"][-1]

    best = loss(steepest)
    assert best < 0.5 * loss(steepest / 100)
    diverged = loss(30 * lowest)
    assert best < 0.5 * diverged or not math.isfinite(diverged)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rates = np.geomspace(1e-4, 1, 201)
    test = recorded(curve(rates))
    figure = test.plot(tmp_path / "test.png")
    assert [path.name for path in tmp_path.iterdir()] == ["test.png"]
    assert (tmp_path / "test.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "training loss")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[1] == "mean over 21 batches"
    assert texts[2].startswith("steepest: 0.01")
    # A bad path leaves what is there, and nothing else.
    for name in ("test.jpg", "test"):
        with pytest.raises(ValueError, match=rf"\.png, \.pdf or \.svg.*/{name}'"):
            test.plot(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["test.png"]
    losses = curve(rates)
    losses[150:] = math.inf
    low, high = recorded(losses).plot().axes[0].get_ylim()
    assert math.isfinite(low)
    assert high < 20
    with pytest.raises(ValueError, match="status='not started'"):
        LearningRateRangeTest().plot()


# Errors


def test_arguments_out_of_range():
    for arguments, message in [
        ({"minimum": 0.0}, r"minimum=0\.0"),
        ({"minimum": 1.0, "maximum": 1.0}, r"minimum=1\.0, maximum=1\.0"),
        ({"maximum": math.inf}, "maximum=inf"),
        ({"minimum": "1"}, "minimum='1'"),
        ({"steps": 1}, "steps=1"),
        ({"steps": 10.0}, r"steps=10\.0"),
        ({"scale": "log"}, "scale='log'"),
        ({"window": 4}, "window=4"),
        ({"steps": 10, "window": 11}, "window=11, steps=10"),
        ({"divergence": 1.0}, r"divergence=1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LearningRateRangeTest(**arguments)


def test_default_windows():
    for steps, window in [(2, 1), (4, 3), (5, 5), (50, 5), (60, 7), (100, 11), (1000, 101)]:
        losses = np.arange(steps, dtype=float)
        smoothed = recorded(losses).results()["smoothed_loss"]
        assert smoothed[0] == pytest.approx((window // 2) / 2)


def test_models_that_cannot_be_tested():
    model = keras.Sequential([keras.layers.Dense(1)], name="formless")
    model.compile("sgd", "mse")
    if BACKEND == "tensorflow":  # the others build the model before they call callbacks
        with pytest.raises(ValueError, match="'formless', not built"):
            fit(model, [LearningRateRangeTest()])
    test = LearningRateRangeTest()
    test.set_model(network(keras.optimizers.SGD(0.1)))
    test.on_train_begin()
    before = state(test.model)
    test.on_train_batch_begin(0)
    with pytest.raises(ValueError, match=r"logs of \['accuracy'\]"):
        test.on_train_batch_end(0, {"accuracy": 1.0})
    assert same(state(test.model), before)
    test.on_train_begin()
    test.on_train_batch_begin(0)
    with pytest.raises(ValueError, match=r"SGD.*got none in the first batch"):
        test.on_train_batch_end(0, {"loss": 1.0})  # that other optimizers have trained
    assert same(state(test.model), before)
    assert test.status == "interrupted"


def test_a_first_step_that_is_left_out():
    """For gradients that overflow: the optimizer has a part in that batch, too."""
    model = network(keras.optimizers.LossScaleOptimizer(optimizers.SGD(0.01), 2.0**127))
    test, taken = LearningRateRangeTest(1e-4, 1e-2, 5, divergence=1e6), []

    def note(batch, logs):
        if batch == 0:  # later, the state is in the hands of JAX's step
            taken.append(int(model.optimizer.iterations))

    fit(model, [test, keras.callbacks.LambdaCallback(on_train_batch_end=note)], epochs=1)
    assert taken == [0]
    assert test.status == "finished"

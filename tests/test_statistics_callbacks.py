"""Callbacks that exchange statistics and weights in `fit`: what each sees; all comes back."""

import csv

import keras
import numpy as np
import pytest
from keras import layers

from keras_norm import statistics
from keras_norm.callbacks import (
    AdaptStatistics,
    AverageWeights,
    Lookahead,
    ReestimateStatistics,
    StatisticsMonitor,
    in_order,
)
from keras_norm.layers import BatchNormalization

pytestmark = pytest.mark.core

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, (64, 4)).astype("float32")
Y = X[:, :1] * 0.5 + 1.0
MADE = []


def network():
    """Made once, and put back for each test: its training step is compiled once."""
    if not MADE:
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        x = BatchNormalization(name="a")(layers.Dense(5)(inputs))
        x = layers.BatchNormalization(name="b")(layers.Dense(3, activation="tanh")(x))
        model = keras.Model(inputs, layers.Dense(1)(x))
        model.compile(keras.optimizers.SGD(0.05, momentum=0.5), "mse")
        model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        MADE.append((model, [(v, np.array(v.numpy())) for v in variables]))
    model, values = MADE[0]
    model._initial_epoch = None  # BackupAndRestore has left its own there
    for variable, value in values:
        variable.assign(value)
    return model


def network_with_average(scaled=False):
    """Its optimizer keeps an average of the weights."""
    keras.utils.set_random_seed(1)
    parts = [keras.Input((4,)), layers.Dense(5), BatchNormalization(), layers.Dense(1)]
    model = keras.Sequential(parts)
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse")
    return model


def state(model):
    return [np.array(v.numpy()) for v in model.variables]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def fit(model, callbacks, epochs=3, validation=True, **kwargs):
    data = (X[:32], Y[:32]) if validation else None
    settings = {"batch_size": 16, "shuffle": False, "verbose": 0, "epochs": epochs, **kwargs}
    return model.fit(X, Y, validation_data=data, callbacks=callbacks, **settings)


class Spy(keras.callbacks.Callback):
    """The state of the model, as this callback gets to see it."""

    def __init__(self):
        super().__init__()
        self.steps, self.validation, self.epochs = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.steps.append(state(self.model))

    def on_test_begin(self, logs=None):
        self.validation.append(state(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(state(self.model))


def plain(epochs=3):
    model, spy = network(), Spy()
    fit(model, [spy], epochs)
    return spy


def test_reestimation_before_validation_and_back():
    expected = plain()
    model, before, after = network(), Spy(), Spy()
    callback = ReestimateStatistics(X, every=2, batch_size=32)
    history = fit(model, [before, callback, after], epochs=4)
    assert list(callback.reports) == [1, 3, "end"]
    assert same(before.epochs[0], after.epochs[0])
    assert not same(before.epochs[1], after.epochs[1])
    for mine, theirs in zip(before.steps, [*expected.steps], strict=False):
        assert same(mine, theirs)  # training is what it would have been
    assert same(after.epochs[1], after.steps[7])
    # What validation and the callbacks before saw are the statistics of the data, exactly.
    model_at_2 = network()
    for variable, value in zip(model_at_2.variables, before.epochs[1], strict=True):
        variable.assign(value)
    assert statistics.reestimate(model_at_2, X, batch_size=32).largest_shift < 1e-5
    loss = model_at_2.evaluate(X[:32], Y[:32], batch_size=16, verbose=0)
    assert history.history["val_loss"][1] == pytest.approx(loss, rel=1e-5)


def test_at_the_end_it_keeps_or_not():
    expected = plain(1)
    model = network()
    fit(model, [ReestimateStatistics(X, keep=False)], epochs=1)
    assert same(state(model), expected.epochs[-1])
    model = network()
    fit(model, [ReestimateStatistics(lambda: iter([X]), batch_size=64)], 1, validation=False)
    assert statistics.reestimate(model, X).largest_shift < 1e-5


def test_adaptation():
    expected = plain(1)
    model, spy = network(), Spy()
    callback = AdaptStatistics(3 * X + 7, prior=32)
    fit(model, [callback, spy], epochs=1)
    assert same(state(model), expected.epochs[-1])
    assert callback.reports[0].settings["prior"] == 32
    share = 64 / (64 + 32)
    part = callback.reports[0]["a"]
    kernel, bias = expected.epochs[0][:2]
    mean = ((3 * X + 7) @ kernel + bias).mean(axis=0)
    np.testing.assert_allclose(part.mean, part.old_mean + share * (mean - part.old_mean), rtol=1e-4)
    np.testing.assert_allclose(spy.validation[0][4], part.mean, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_average_of_the_weights(kind):
    """By hand, from the weights after each step; statistics of the average itself."""
    model, before, after = network(), Spy(), Spy()
    steps = 2 if kind == "ema" else None
    average = AverageWeights(kind, decay=0.9, steps=steps, data=X, batch_size=64)
    fit(model, [before, average, after])
    trained = [i for i, v in enumerate(model.variables) if v.trainable]
    used = [s for i, s in enumerate(before.steps) if (i + 1) % (steps or 4) == 0]
    expected = [np.array(used[0][i], np.float64) for i in trained]
    for k, weights in enumerate(used[1:], start=2):
        share = 1 / k if kind == "swa" else 1 - min(0.9, k / (k + 9))
        expected = [e + share * (weights[i] - e) for e, i in zip(expected, trained, strict=True)]
    assert average.updates == len(used)
    for i, value in zip(trained, expected, strict=True):
        np.testing.assert_allclose(before.epochs[-1][i], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state(model)[i], value, rtol=1e-5, atol=1e-6)
    assert same(after.epochs[-1], after.steps[-1])  # weights of training
    assert same(before.steps[4], plain(2).steps[4])
    model_after = network()
    for variable, value in zip(model_after.variables, before.epochs[-1], strict=True):
        variable.assign(value)
    assert statistics.reestimate(model_after, X, batch_size=64).largest_shift < 1e-5


def test_an_average_that_begins_later():
    """With the second epoch; and anew in the next `fit`."""
    model, average = network(), AverageWeights("swa", start=1, keep=False)
    spy = Spy()
    fit(model, [spy, average])
    assert average.updates == 2
    for seen, *ended in zip(spy.epochs[-1], spy.steps[7], spy.steps[11], strict=True):
        np.testing.assert_allclose(seen, np.mean(ended, axis=0), rtol=1e-5, atol=1e-6)
    fit(model, [average], epochs=2)
    assert average.updates == 1
    often = AverageWeights("ema", start=1, steps=1)
    fit(model, [often])
    assert often.updates == 8  # of 12 batches


def test_statistics_that_cannot_be_had_leave_the_weights():
    model, spy = network(), Spy()
    with pytest.raises(ValueError, match="finite"):
        fit(model, [spy, AverageWeights("swa", data=X * np.nan)], epochs=1)
    assert same(state(model), spy.steps[-1])


def test_checkpoints_see_the_average(tmp_path):
    model, path = network(), tmp_path / "best.weights.h5"
    average = AverageWeights("swa", data=X, keep=False, batch_size=64)
    saved = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    spy = Spy()
    stop = keras.callbacks.EarlyStopping(patience=9, restore_best_weights=False)
    fit(model, [spy, *in_order([average, saved, stop])])
    raw = state(model)
    assert same(raw, spy.steps[-1])
    model.load_weights(path)
    assert same(state(model), spy.epochs[-1])


def test_early_stopping_has_the_last_word():
    model = network()
    stop = keras.callbacks.EarlyStopping(
        monitor="val_loss", mode="max", patience=1, restore_best_weights=True
    )
    spy = Spy()
    fit(model, [spy, *in_order([AverageWeights("swa"), stop])], epochs=4)
    assert same(state(model), spy.epochs[stop.best_epoch])


def test_order():
    backup = keras.callbacks.BackupAndRestore("/tmp/unused")
    average, monitor = AverageWeights(), StatisticsMonitor()
    checkpoint = keras.callbacks.ModelCheckpoint("x.keras")
    given = [backup, average, monitor, checkpoint]
    first, *others = in_order(given)
    assert others == [checkpoint, average, monitor, backup]
    assert first._exchange is average
    again = in_order(in_order(given))
    assert again[1:] == others


@pytest.mark.parametrize("validation", [False, True])
def test_statistics_of_the_weights_that_keras_swaps_in(validation):
    """`SwapEMAWeights` was listed after what brings statistics in: these were of other weights."""
    model, off = network_with_average(), []
    dense, normalization = model.layers[:2]

    def note(epoch, logs):
        kernel, bias = dense.get_weights()
        mean = (X @ kernel + bias).mean(axis=0)
        off.append(np.abs(mean - normalization.moving_mean.numpy()).max())

    noting = keras.callbacks.LambdaCallback(on_epoch_end=note)
    swap, estimation = keras.callbacks.SwapEMAWeights(True), ReestimateStatistics(X)
    order = in_order([noting, estimation, swap])
    assert (order[0], order[2:]) == (swap, [noting, estimation])
    fit(model, order, 2, validation)
    assert max(off) < 1e-5
    note(2, None)
    assert off[2] < 1e-5


def test_order_of_two_averages():
    swap = keras.callbacks.SwapEMAWeights
    with pytest.raises(ValueError, match="AverageWeights and SwapEMAWeights"):
        in_order([swap(True), AverageWeights(keep=False)])
    with pytest.raises(ValueError, match=r"swap_on_epoch=False.* beside AdaptStatistics"):
        in_order([AdaptStatistics(X), swap()])
    given = [swap(), StatisticsMonitor()]
    assert in_order(given) == given


@pytest.mark.parametrize("scaled", [False, True])
def test_the_average_of_the_optimizer_is_the_last(scaled):
    """It replaced ours when `fit` ended, and the statistics were of neither."""
    average = AverageWeights()
    average.set_model(network_with_average(scaled))
    with pytest.raises(ValueError, match=r"use_ema=True.*keep=True"):
        average.on_train_begin()
    average.keep = False
    average.on_train_begin()


def test_the_monitor_sees_the_statistics_of_training():
    alone, beside = StatisticsMonitor(X), StatisticsMonitor(X)
    fit(network(), [alone], epochs=1)
    fit(network(), in_order([beside, ReestimateStatistics(X)]), epochs=1)
    for one, other in zip(alone.records, beside.records, strict=True):
        assert one["shift"] > 0.01
        assert other["shift"] == pytest.approx(one["shift"], rel=1e-5)


class Thaw(keras.callbacks.Callback):
    """Switches of a layer, thrown while the average is under way."""

    def on_epoch_begin(self, epoch, logs=None):
        layer = self.model.get_layer("a")
        # JAX's training step wants the same trainable variables in every epoch.
        layer.train_parameters = epoch < 1 or keras.backend.backend() == "jax"
        layer.update_statistics, layer.momentum = epoch < 2, 0.5

    def on_epoch_end(self, epoch, logs=None):
        self.model.get_layer("a").momentum = 0.75


@pytest.mark.parametrize("keep", [True, False])
def test_switches_are_not_averaged(keep):
    model, average = network(), AverageWeights("swa", keep=keep)
    layer = model.get_layer("a")
    try:
        fit(model, [Thaw(), *in_order([average])])
        values = layer.train_parameters, layer.update_statistics, layer.momentum
        assert values == (keras.backend.backend() == "jax", False, 0.75)
        assert average.updates == 3
        before = np.array(layer.moving_mean.numpy())
        fit(model, [], epochs=1)
        np.testing.assert_array_equal(layer.moving_mean.numpy(), before)
    finally:
        layer.train_parameters = layer.update_statistics = True
        layer.momentum = 0.99


@pytest.mark.parametrize(("steps", "updates"), [(1, 8), (3, 2), (4, 2), (6, 1)])
def test_several_batches_at_once(steps, updates):
    """What is due within an execution is done after it, by the weights that are there then."""
    model, average = network(), AverageWeights("ema", steps=steps, keep=False)
    average.set_model(model)
    average.on_train_begin()
    for epoch in range(2):
        average.on_epoch_begin(epoch)
        for last in (1, 3):  # two batches each
            model.trainable_variables[0].assign_add(model.trainable_variables[0] * 0 + 1)
            average.on_train_batch_end(last)
    assert average.updates == updates
    first = model.trainable_variables[0].numpy() - 4  # as it was
    expected, k = first * np.nan, 0
    for w in range(1, 5):  # four executions
        due = [b for b in (2 * w - 1, 2 * w) if b % steps == 0]  # counted over the epochs
        for _ in due:
            k += 1
            d = min(0.999, k / (k + 9)) if k > 1 else 0.0
            expected = first + w if k == 1 else d * expected + (1 - d) * (first + w)
    np.testing.assert_allclose(average._averages[0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_without_validation_data(nested):
    """At the end of an epoch all see the other values, and training knows nothing of them."""
    expected = plain()
    model, before, after = network(), Spy(), Spy()
    average = AverageWeights("swa", data=None if nested else X)
    given = [average, before]
    if nested:
        given.insert(0, ReestimateStatistics(X, every=2))
    fit(model, [*in_order(given), after], validation=False)
    for mine, theirs in zip(after.steps, expected.steps, strict=True):
        assert same(mine, theirs)
    trained = [i for i, v in enumerate(model.variables) if v.trainable]
    for epoch, seen in enumerate(before.epochs):
        assert same(after.epochs[epoch], after.steps[4 * epoch + 3])
        for i in trained:
            weights = [after.epochs[e][i] for e in range(epoch + 1)]
            np.testing.assert_allclose(seen[i], np.mean(weights, axis=0), rtol=1e-5, atol=1e-6)
    for variable, value in zip(model.variables, before.epochs[1], strict=True):
        variable.assign(value)
    assert statistics.reestimate(model, X).largest_shift < 1e-5


class Interrupt(keras.callbacks.Callback):
    def __init__(self, at, batch=0):
        super().__init__()
        self.at, self.batch, self.epoch = at, batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.at == "training" and (self.epoch, batch) == (2, self.batch):
            raise KeyboardInterrupt

    def on_test_batch_begin(self, batch, logs=None):
        if self.at == "validation" and self.epoch == 1:
            raise KeyboardInterrupt


def test_interrupted_in_validation():
    expected = plain(2)
    model, callback = network(), AverageWeights("swa", data=X, batch_size=64)
    with pytest.raises(KeyboardInterrupt), callback:
        fit(model, [callback, Interrupt("validation")])
    assert same(state(model), expected.epochs[-1])
    assert not callback.exchanged
    # Data that is bad: the statistics are put back before the error is out.
    model = network()
    with pytest.raises(ValueError, match="NaN"):
        fit(model, [ReestimateStatistics(X * np.nan)], epochs=1)
    assert same(state(model), plain(1).epochs[-1])


@pytest.mark.slow_on_jax
def test_interrupted_and_then_used_on_another_model():
    """It puts back the model whose values it has exchanged, not the one of the next `fit`."""
    other = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)])
    other.compile("sgd", "mse", jit_compile=keras.backend.backend() == "jax")
    models = [network(), other]
    exchanges = [ReestimateStatistics(X, batch_size=64), AverageWeights()]
    own, functions = [], []
    for model, exchange in zip(models, exchanges, strict=True):
        spy = Spy()
        noting = keras.callbacks.LambdaCallback(
            on_test_begin=lambda logs, model=model: functions.append(model.test_function)
        )
        callbacks = [spy, noting, exchange, Interrupt("validation")]
        with pytest.raises(KeyboardInterrupt):
            fit(model, callbacks, epochs=2, initial_epoch=1)
        own.append(spy.steps[-1])
    before = state(other)
    fit(other, exchanges[:1], epochs=1)
    assert same(state(models[0]), own[0])
    assert models[0].test_function is functions[0]
    assert list(exchanges[0].reports) == [0, "end"]
    # The average in the second model is for the other callback to take out.
    assert [exchange.exchanged for exchange in exchanges] == [False, True]
    assert not same(state(other)[:2], before[:2])  # gamma and beta
    exchanges[1].restore()
    assert same(state(other), own[1])


@pytest.mark.parametrize(("options", "updates"), [({"kind": "swa"}, 4), ({"steps": 6}, 2)])
def test_a_fit_that_is_resumed(tmp_path, options, updates):
    """Interrupted in epoch 2 and resumed from the backup: the same as without, average included."""

    def callbacks():
        average = AverageWeights(data=X, backup=tmp_path / "average.npz", batch_size=64, **options)
        return in_order([keras.callbacks.BackupAndRestore(tmp_path / "backup"), average])

    model = network()
    fit(model, callbacks(), epochs=4)
    expected = state(model)
    assert not (tmp_path / "average.npz").exists()
    model, first = network(), callbacks()
    with pytest.raises(KeyboardInterrupt), first[1]:
        fit(model, [*first, Interrupt("training", 1)], epochs=4)
    assert (tmp_path / "average.npz").exists()
    model, second = network(), callbacks()
    fit(model, second, epochs=4)
    assert second[1].updates == updates
    for a, b in zip(state(model), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_monitor(tmp_path):
    expected = plain(2)
    model, spy = network(), Spy()
    monitor = StatisticsMonitor(X, csv=tmp_path / "log.csv")
    fit(model, [monitor, spy], epochs=2)
    assert same(state(model), expected.epochs[-1])
    assert [(r["epoch"], r["layer"]) for r in monitor.records] == [
        (0, "a"), (0, "b"), (1, "a"), (1, "b")
    ]  # fmt: skip
    record = monitor.records[2]
    kernel, bias, gamma, beta, mean, variance = expected.epochs[1][:6]
    z = (X @ kernel + bias).astype(np.float64)
    sigma = np.sqrt(z.var(axis=0) + 1e-3)
    shift = np.sqrt(np.mean(((z.mean(axis=0) - mean) / sigma) ** 2))
    assert record["shift"] == pytest.approx(shift, rel=1e-3)
    scale = np.exp(np.mean(np.log(sigma / np.sqrt(variance + 1e-3))))
    assert record["scale"] == pytest.approx(scale, rel=1e-3)
    drift = (mean - expected.epochs[0][4]) / np.sqrt(variance + 1e-3)
    assert record["drift"] == pytest.approx(np.sqrt(np.mean(drift**2)), rel=1e-3)
    assert record["gamma_max"] == pytest.approx(gamma.max())
    assert record["gamma_min"] == pytest.approx(gamma.min())
    assert gamma.min() < gamma.max()
    assert record["beta_rms"] == pytest.approx(np.sqrt(np.mean(beta**2)))
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["shift"]) for r in rows] == [r["shift"] for r in monitor.records]
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_monitor_of_every_other_epoch():
    monitor = StatisticsMonitor(X, every=2)
    model = network()
    fit(model, [monitor], epochs=4, validation=False)
    assert [r["epoch"] for r in monitor.records if r["layer"] == "a"] == [1, 3]
    fit(model, [monitor], epochs=2, validation=False)  # records are of one `fit`
    assert [r["epoch"] for r in monitor.records if r["layer"] == "a"] == [1]


def test_monitor_of_a_layer_without_parameters():
    inputs = keras.Input(X.shape[1:])
    x = BatchNormalization(center=False, scale=False)(layers.Dense(3)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile("sgd", "mse")
    monitor = StatisticsMonitor(X)
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    (record,) = monitor.records
    assert record["gamma_min"] == record["gamma_max"] == 1
    assert record["beta_rms"] == 0


def test_monitor_plots_and_writes_events(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    monitor = StatisticsMonitor(tensorboard=tmp_path / "events")
    with pytest.raises(ValueError, match=r"records=\[\]"):
        monitor.plot()
    fit(model, [monitor], epochs=2)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [e.step for e in events.Scalars("a/drift")] == [0, 1]
    assert events.Scalars("b/drift")[1].value == pytest.approx(monitor.records[3]["drift"])
    figure = monitor.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 2  # no data, no shift
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg.*plot\.jpg"):
        monitor.plot(tmp_path / "plot.jpg")


def test_arguments_out_of_range():
    for make, message in [
        (lambda: ReestimateStatistics(X, every=0), "every=0"),
        (lambda: StatisticsMonitor(every=1.5), r"every=1\.5"),
        (lambda: AverageWeights("mean"), "kind='mean'"),
        (lambda: AverageWeights(decay=1.0), r"decay=1\.0"),
        (lambda: AverageWeights(start=-1), "start=-1"),
        (lambda: AverageWeights(steps=0), "steps=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


# Lookahead ----------------------------------------------------------------------------------------


def test_lookahead_is_what_its_equations_say():
    w, steps, total, rate = np.array([[1.0], [-2.0]]), 2, 6, 0.1
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.layers[-1].set_weights([w])
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8, 2)).astype("float32")
    y = rng.normal(size=(8, 1)).astype("float32")
    lookahead = Lookahead(total, steps=steps, decay=0.8, power=2)
    model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=[lookahead])
    slow = w
    for t in range(1, total + 3):  # two steps more than were announced
        at = slice((t - 1) % 4 * 2, (t - 1) % 4 * 2 + 2)
        w = w - rate * x[at].T @ (x[at] @ w - y[at])  # the gradient of the mean of two squares
        if t % steps == 0:
            d = 0.8**steps * min(1, t / total) ** 2
            slow = d * slow + (1 - d) * w
            w = slow
    np.testing.assert_allclose(model.layers[-1].get_weights()[0], w, rtol=1e-5)


def test_lookahead_in_float64():
    """Beside a variable, Keras on PyTorch rounds a number to float32: weights moved by 1e-8."""
    inputs = keras.Input((2,), dtype="float64")
    model = keras.Model(inputs, layers.Dense(1, dtype="float64")(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    before = model.get_weights()[0]
    lookahead = Lookahead(4, steps=1, power=0)
    model.fit(X[:4, :2], Y[:4], batch_size=1, verbose=0, callbacks=[lookahead])
    np.testing.assert_allclose(model.get_weights()[0], before, rtol=1e-14)


@pytest.mark.parametrize("accumulated", [None, 2])
def test_lookahead_counts_batches_where_gradients_are_accumulated(accumulated):
    """Also where that goes on into the next epoch, when `iterations` leaves some out."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=accumulated), "mse")
    lookahead = Lookahead(20, steps=5, power=0)
    slow = []

    def note(batch, logs):
        slow.append(np.array(lookahead.variables[0].numpy()))

    noting = keras.callbacks.LambdaCallback(on_train_batch_end=note)
    model.fit(X[:40, :2], Y[:40], batch_size=8, epochs=4, verbose=0, callbacks=[lookahead, noting])
    changed = [i + 1 for i in range(1, 20) if not np.array_equal(slow[i], slow[i - 1])]
    assert changed == [5, 10, 15, 20]
    np.testing.assert_array_equal(slow[-1], model.get_weights()[0])


def test_lookahead_of_a_second_model():
    lookahead = Lookahead(4, steps=1, power=0)
    models = [keras.Sequential([keras.Input((4,)), layers.Dense(1)]) for _ in range(2)]
    for model in models:
        model.compile("sgd", "mse")
    models[0].fit(X, Y, verbose=0, callbacks=[lookahead])
    before = models[0].get_weights()
    models[1].fit(X, Y, verbose=0, callbacks=[lookahead])
    assert same(before, models[0].get_weights())
    assert same([v.numpy() for v in lookahead.variables], models[1].get_weights())


def test_lookahead_where_other_weights_are_trained():
    """A layer that was frozen stays as it is; one that no longer is takes part."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(1)])
    lookahead = Lookahead(11, steps=2, power=0)
    first = model.layers[0]
    for trainable in (True, False, True):
        first.trainable = trainable
        model.compile(keras.optimizers.SGD(1e-3), "mse")
        before = first.get_weights()
        model.fit(X[:11], Y[:11], batch_size=1, verbose=0, callbacks=[lookahead])  # 11: one beyond
        assert same(before, first.get_weights()) == (not trainable)
        assert len(lookahead.variables) == len(model.trainable_variables)


def test_two_exchanges_leave_the_step_of_validation_as_it_was():
    model, functions = network(), []
    averages = [AverageWeights(), AverageWeights("swa")]
    noting = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: functions.append(model.test_function)
    )
    fit(model, [*averages, noting], epochs=3)
    assert all(function is functions[0] for function in functions)
    assert not any(average.exchanged for average in averages)


def test_lookahead_takes_statistics_along():
    model = network()
    lookahead = Lookahead(4, steps=4, power=0)
    before = [np.array(v.numpy()) for v in model.get_layer("a").non_trainable_variables]
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    fast = [np.array(v.numpy()) for v in model.get_layer("a").non_trainable_variables]
    model = network()
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0, callbacks=[lookahead])
    d = 0.95**4
    for b, f, v in zip(before, fast, model.get_layer("a").non_trainable_variables, strict=True):
        np.testing.assert_allclose(v.numpy(), d * b + (1 - d) * f, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 9, "steps": 0}, "steps=0"),
        ({"total_steps": 9, "decay": 1.0}, "decay=1.0"),
        ({"total_steps": 9, "power": -1}, "power=-1"),
    ],
)
def test_lookahead_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(**arguments)

"""Nets that are trained together are what they would be alone."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_norm import datasets, models, optimizers
from keras_norm.ensembles import EvaluateTogether, train_together
from keras_norm.experiments import classification_metrics
from keras_norm.layers import BatchNormalization, LayerNormalization

SEEDS = (3, 4)
BATCH_SIZE, EPOCHS = 20, 2
LAYER = functools.partial(
    LayerNormalization, epsilon=1e-2, gamma_regularizer=keras.regularizers.L2(0.1)
)


def make(seed, normalization="batch", placement="before", hidden=(12, 9)):
    keras.utils.set_random_seed(seed)
    if normalization == "batch":
        normalization = functools.partial(BatchNormalization, momentum=0.9, epsilon=1e-5)
    return models.MLP(
        hidden,
        normalization,
        placement=placement,
        kernel_regularizer=keras.regularizers.L2(0.01),
        input_shape=(4, 2),
        classes=3,
    )


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (150, 4, 2)).astype("float32")
    return x, rng.integers(0, 3, 150)


def rows_of(seed):
    return np.random.default_rng(seed).permutation(150)[:90]


def sgd():
    return optimizers.SGD(optimizers.CyclicalLearningRate(1e-3, 0.1, half_cycle=3), momentum=0.5)


def alone(model, x, y, seed, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    entropy = keras.metrics.SparseCategoricalCrossentropy("entropy", from_logits=True)
    eagerly = keras.backend.backend() == "tensorflow"  # a few steps: quicker than to trace one
    model.compile(optimizer, loss, metrics=[entropy], run_eagerly=eagerly)
    at = rows_of(seed)
    batches = datasets.Batches(x[at], y[at], BATCH_SIZE, seed=seed, drop_remainder=True)
    return model.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0).history


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({}, sgd),
        ({"placement": "after"}, lambda: optimizers.Adam(0.01)),
        ({"normalization": LAYER}, sgd),
    ],
)
def test_each_net_is_what_it_would_be_alone(options, optimizer):
    x, y = problem()
    nets, singles = ([make(seed, **options) for seed in SEEDS] for _ in range(2))
    held_out = [range(seed, 140 + seed) for seed in SEEDS]
    judge = EvaluateTogether(y, {"val": held_out})
    losses = train_together(
        nets,
        x,
        y,
        rows=[rows_of(seed) for seed in SEEDS],
        seeds=SEEDS,
        optimizer=optimizer(),
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        callbacks=[judge],
    )
    expected = [alone(m, x, y, seed, optimizer()) for m, seed in zip(singles, SEEDS, strict=True)]
    assert losses == pytest.approx(np.mean([h["loss"] for h in expected], axis=0), rel=1e-5)
    for net, single, seed in zip(nets, singles, SEEDS, strict=True):
        begin = make(seed, **options)
        for ours, theirs, first in zip(net.weights, single.weights, begin.weights, strict=True):
            ours, theirs, first = map(ops.convert_to_numpy, (ours, theirs, first))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5, err_msg=net.name)
            assert not np.array_equal(ours, first)
    assert {name: len(values) for name, values in judge.history.items()} == {
        "loss": EPOCHS,
        "val_loss": EPOCHS,
        "val_accuracy": EPOCHS,
    }
    without_penalties = np.transpose([h["entropy"] for h in expected])
    np.testing.assert_allclose(judge.history["loss"], without_penalties, rtol=1e-5)
    for i, (net, at) in enumerate(zip(nets, held_out, strict=True)):
        metrics = classification_metrics(ops.convert_to_numpy(net(x[at])), y[at])
        for key in ("loss", "accuracy"):
            assert judge.history[f"val_{key}"][-1][i] == pytest.approx(metrics[key], rel=1e-5)
    different = [ops.convert_to_numpy(net.weights[0]) for net in nets]
    assert np.abs(different[0] - different[1]).max() > 0.01


def dense(frozen=False, **options):
    """One net, with something that training together does not carry over."""
    layer = keras.layers.Dense(6, **options)
    net = keras.Sequential(
        [keras.Input((4, 2)), keras.layers.Flatten(), layer, keras.layers.Dense(3)]
    )
    layer.trainable = not frozen
    return net


def frozen_net():
    net = dense()
    net.trainable = False
    return net


def together(nets, **changes):
    x, y = problem()
    x, y = changes.pop("x", x), changes.pop("y", y)
    rows = [rows_of(seed) for seed in range(len(nets))]
    options = {"rows": rows, "seeds": range(len(nets)), "epochs": 1, "batch_size": BATCH_SIZE}
    options |= {"optimizer": optimizers.SGD(0.1), **changes}
    return train_together(nets, x, y, **options)


@pytest.mark.parametrize(
    "optimizer",
    [optimizers.Muon, keras.optimizers.Adafactor, keras.optimizers.Lamb, keras.optimizers.Muon],
)
def test_rules_of_whole_kernels_are_refused(optimizer):
    with pytest.raises(ValueError, match=f"Received: {optimizer.__name__}, whose steps"):
        together([make(0)], optimizer=optimizer())


def test_a_rule_by_name_is_judged_as_any_other():
    with pytest.raises(ValueError, match="Received: Muon, whose steps"):
        together([make(0)], optimizer="muon")


def test_an_optimizer_that_was_used_is_refused():
    optimizer = optimizers.SGD(0.1)
    optimizer.build([keras.Variable(np.zeros(2))])
    with pytest.raises(ValueError, match=r"must be new.*Received: SGD, used before"):
        together([make(0)], optimizer=optimizer)


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_clipping_by_norm_is_refused(option):
    with pytest.raises(ValueError, match=rf"Received: Adam with {option}=0\.1.*`clipvalue`"):
        together([make(0)], optimizer=optimizers.Adam(0.01, **{option: 0.1}))


@pytest.mark.slow_on_jax
def test_clipping_by_value_is_that_of_each_net():
    x, y = problem()
    nets, singles = ([make(seed) for seed in SEEDS] for _ in range(2))
    rows = [rows_of(seed) for seed in SEEDS]
    options = {"optimizer": optimizers.SGD(0.1, clipvalue=1e-3), "epochs": EPOCHS}
    together(nets, rows=rows, seeds=SEEDS, **options)
    for net, single, seed in zip(nets, singles, SEEDS, strict=True):
        alone(single, x, y, seed, optimizers.SGD(0.1, clipvalue=1e-3))
        for ours, theirs in zip(net.get_weights(), single.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.arange(150) < 90, r"of dtype bool. Of a boolean mask take np\.flatnonzero\(mask\)"),
        (np.arange(90.0), "of dtype float64"),
        (np.arange(-1, 89), "from -1 to 88 for 150 examples"),
        (np.arange(61, 151), "from 61 to 150 for 150 examples"),
    ],
)
def test_rows_are_numbers_of_examples(rows, message):
    with pytest.raises(ValueError, match=r"Received: rows\[1\] " + message):
        together([make(0), make(1)], rows=[np.arange(len(rows)), rows])
    with pytest.raises(ValueError, match="Received: val " + message):
        EvaluateTogether(np.zeros(150), {"val": [rows]})


def virtual():
    return BatchNormalization(virtual_batch_size=5)


@pytest.mark.parametrize(
    ("nets", "changes", "message"),
    [
        (lambda: [], {}, "0 models"),
        (lambda: [make(0)], {"seeds": [1, 2]}, "2 seeds"),
        (lambda: [make(0), make(1)], {"rows": [range(40), range(50)]}, r"\[40, 50\] rows"),
        (lambda: [make(0)], {"seeds": [0.5]}, r"integers >= 0.*with 0\.5"),
        (lambda: [make(0)], {"seeds": [-1]}, "integers >= 0.*with -1"),
        (lambda: [make(0)], {"seeds": [True]}, "integers >= 0.*with True"),
        (lambda: [make(0)], {"rows": [np.zeros((9, 2), int)]}, r"rows\[0\] of shape \(9, 2\)"),
        (lambda: [make(0)], {"batch_size": 91}, "batch_size=91"),
        (lambda: [make(0)], {"batch_size": 2.5}, r"`batch_size` must be.*batch_size=2\.5"),
        (lambda: [make(0)], {"epochs": 0}, "`epochs` must be an integer >= 1.*epochs=0"),
        (lambda: [make(0)], {"epochs": 2.5}, r"`epochs` must be.*epochs=2\.5"),
        (lambda: [make(0)], {"epochs": True}, "`epochs` must be.*epochs=True"),
        (lambda: [make(0)], {"x": np.zeros((150, 5))}, r"x of shape \(150, 5\).*\(None, 4, 2\)"),
        (lambda: [make(0)], {"y": np.eye(3)[problem()[1]]}, r"shape \(150, 3\).*argmax"),
        (lambda: [make(0)], {"y": problem()[1] + 1}, r"y with \[3\] for 3 logits"),
        (lambda: [make(0)], {"y": problem()[1] - 1}, r"y with \[-1\] for 3 logits"),
        (lambda: [make(0), make(1, hidden=(12, 8))], {}, "2 different structures"),
        (lambda: [make(0, normalization="rms")], {}, "type RMSNormalization"),
        (lambda: [dense(frozen=True)], {}, "with trainable=False"),
        (lambda: [frozen_net()], {}, "with trainable=False"),
        (lambda: [dense(kernel_constraint="non_neg")], {}, "with kernel_constraint"),
        (lambda: [dense(activity_regularizer="l2")], {}, "with activity_regularizer"),
        (lambda: [make(0, virtual)], {}, "with virtual_batch_size"),
        (
            lambda: [dense(kernel_regularizer="orthogonal_regularizer")],
            {},
            "with a regularizer other than",
        ),
        (
            lambda: [make(0), make(1)],
            {"callbacks": [EvaluateTogether(np.zeros(150), {"val": [range(9)]})]},
            r"val=\(1, 9\) for 2 nets",
        ),
    ],
)
def test_what_cannot_be_trained_together_is_refused(nets, changes, message):
    with pytest.raises(ValueError, match=message):
        together(nets(), **changes)


def shared():
    """Two nets over one layer."""
    layer = keras.layers.Dense(3)
    return [keras.Sequential([keras.Input((8,)), layer]) for _ in range(2)]


def tied():
    """One net, two of whose layers have one kernel."""
    first, second = keras.layers.Dense(8, use_bias=False), keras.layers.Dense(8, use_bias=False)
    net = keras.Sequential([keras.Input((8,)), first, second])
    second._tracker.unlock()
    del second._trainable_variables[0]
    second._kernel = first._kernel
    return [net]


@pytest.mark.parametrize(
    ("nets", "message"),
    [
        (lambda: [make(0)] * 2, r"models\[0\] and again in models\[1\]"),
        (shared, r"kernel' in models\[0\] and again in models\[1\]"),
        (tied, r"kernel' in models\[0\] and again in models\[0\]"),
    ],
)
def test_nets_that_share_weights_are_refused(nets, message):
    """Each would be trained on its own, and the last that hands back its weights win."""
    with pytest.raises(ValueError, match="weights of their own.*Received: .*" + message):
        together(nets(), x=np.zeros((150, 8), "float32"))


def test_classes_of_other_examples_do_not_matter():
    """Such as -1 for those without one, which no net sees."""
    y = problem()[1]
    rows = np.flatnonzero(y < 2)
    y[y == 2] = -1
    assert len(together([dense()], y=y, rows=[rows])) == 1


def test_a_net_that_is_no_chain_is_refused_and_left_alone():
    inputs = keras.Input((4, 2))
    shared = keras.layers.Dense(8)
    hidden = shared(shared(keras.layers.Flatten()(inputs)))
    net = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    before = net.get_weights()
    with pytest.raises(ValueError, match="chain of layers"):
        together([net])
    for now, then in zip(net.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)

# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
"""
# 1. Batch normalization

**You will learn** what batch normalization computes, forward and backward; how to write it in
twenty lines of NumPy and check that the library's layer gives the same numbers; what it does to
LeNet on Fashion-MNIST; whether a bias before it is of any use; which learning rates it allows;
which layers need it; whether it replaces dropout, and in which order the two should go; what gamma
and beta are for; what else the layer can do; which other transforms could take its place; and why a
net that has learned well can still do badly in the test, and how to cure that. Lesson 1b continues
with small dense nets and the question of why batch normalization works.

**You need** Python with NumPy, the chain rule, and what a convolution and a dense layer are.

**Data**: Fashion-MNIST, 60,000 training and 10,000 test images of 28 x 28 pixels (31 MB), read from
`--data-dir` alone if it is given, else from `TFDS_DATA_DIR`, then from the default folder of
tensorflow-datasets; if missing, downloaded to the first of these that can be written to. With
neither network nor folder: the digits that come with scikit-learn.

**Needs** on two CPU cores: `--fast` 1 minute (3,000 images), the default 4 to 11 minutes (the same
machine on different days), `--full` two and three-quarter hours (five seeds, a finer sweep, each
net also at its best learning rate, every subset of layers, eight other transforms).

**Expect** from LeNet, at learning rate 1.0 after 10 epochs: see the results table of the README,
whose rows `--full` recomputes.
"""

# %%
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import time

import matplotlib  # noqa: F401 -- here, and not after all trainings, it is to be found missing

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops

from keras_norm import datasets, experiments, functional, gradient_check, plotting, statistics
from keras_norm.layers import (
    BatchNormalization,
    Dropout,
    GroupNormalization,
    LayerNormalization,
)
from keras_norm.models import LeNet, make_variables, restart
from keras_norm.research import (
    DecorrelatedBatchNormalization,
    FilterResponseNormalization,
    QuantileNormalization,
)

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

arguments = experiments.tutorial_arguments(
    "Batch normalization, from the equations to LeNet.", name="01_batchnorm"
)
out = arguments.out
print(f"Tutorial 1, mode {arguments.mode}; results go to {out}")

# %% [markdown]
"""
## The equations

For every channel c, with sums over the N values that the channel has in a batch (from all images
and, for a convolution, from all positions):

    (B1)  mean     = sum x / N                     (B4)  x_hat = (x - mean) inv_std
    (B2)  variance = sum (x - mean)^2 / N          (B5)  y     = gamma x_hat + beta
    (B3)  inv_std  = 1 / sqrt(variance + epsilon)

gamma and beta are learned; each is one number per channel. In the backward pass, dy is the gradient
of the loss with respect to y, which arrives from above:

    (B6)  dbeta = sum dy                           (B7)  dgamma = sum dy x_hat

The loss depends on x in three ways: through x itself in (B4), through the mean, and through the
variance. Take the last two first. In y = gamma (x - mean) inv_std + beta, the mean has the factor
-gamma inv_std, and the derivative of inv_std with respect to the variance is -inv_std^3 / 2. With
sum dy (x - mean) = dgamma / inv_std, this gives

    (B8)  dmean     = -gamma inv_std dbeta
    (B9)  dvariance = -gamma inv_std^2 dgamma / 2

(The variance depends on the mean too, but by (B2) that derivative is -2 / N sum (x - mean) = 0.)
Each x changes the mean at the rate 1 / N and the variance at the rate 2 (x - mean) / N, so that

    dx = gamma inv_std dy + dmean / N + 2 dvariance (x - mean) / N

Since x - mean = x_hat / inv_std, the last term is -gamma inv_std dgamma x_hat / N, and the three
terms together are

    (B10) dx    = gamma inv_std / N (N dy - dbeta - x_hat dgamma)

(B10) says what the layer does to learning: it takes out of the gradient whatever would shift the
channel as a whole (dbeta) or scale it (dgamma), and lets only the rest through.

While the net trains, two moving averages follow the mean and variance of the batches. Once training
is over, they are used in place of those, so that a prediction depends on nothing but its own image:

    (B11) moving_mean     <- momentum moving_mean     + (1 - momentum) mean
    (B12) moving_variance <- momentum moving_variance + (1 - momentum) variance

## From scratch
"""

# %%
EPSILON = 1e-5


def forward(x, gamma, beta):
    """x (N, C), gamma and beta (C,) -> y (N, C) and what the backward pass needs."""
    mean = x.mean(axis=0)  # (B1), (N, C) -> (C,)
    variance = ((x - mean) ** 2).mean(axis=0)  # (B2)
    inv_std = 1 / np.sqrt(variance + EPSILON)  # (B3)
    x_hat = (x - mean) * inv_std  # (B4)
    return gamma * x_hat + beta, (x_hat, inv_std, gamma)  # (B5)


def backward(dy, saved):
    """dy (N, C) -> dx (N, C), dgamma (C,), dbeta (C,)."""
    x_hat, inv_std, gamma = saved
    dbeta = dy.sum(axis=0)  # (B6)
    dgamma = (dy * x_hat).sum(axis=0)  # (B7)
    n = len(dy)
    dx = gamma * inv_std / n * (n * dy - dbeta - x_hat * dgamma)  # (B10)
    return dx, dgamma, dbeta


# %% [markdown]
"""
## The library's layer gives the same numbers

A course published what batch normalization makes of 200 random activations, drawn with
`numpy.random.seed(231)`: means 11, 12, 13 and standard deviations 1, 2, 3 for gamma = (1, 2, 3) and
beta = (11, 12, 13). All in float64.
"""

# %%
rng = np.random.RandomState(231)
X, W1, W2 = rng.randn(200, 50), rng.randn(50, 60), rng.randn(60, 3)
activations = np.maximum(0, X @ W1) @ W2
gamma, beta = np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.0, 13.0])

layer = BatchNormalization(epsilon=EPSILON, dtype="float64")
layer.build(activations.shape)
layer.gamma.assign(gamma)
layer.beta.assign(beta)

y, saved = forward(activations, gamma, beta)
y_layer = ops.convert_to_numpy(layer(activations, training=True))


def row(label, *vectors):
    print(f"{label:<28}", *(f"{v: .8f}" for vector in vectors for v in vector))


row("before: mean", activations.mean(axis=0))
row("  published", [-2.3814598, -13.18038246, 1.91780462])
row("before: standard deviation", activations.std(axis=0))
row("  published", [27.18502186, 34.21455511, 37.68611762])
row("after, NumPy: mean", y.mean(axis=0))
row("after, layer: mean", y_layer.mean(axis=0))
row("after, layer: std", y_layer.std(axis=0))
print(f"largest difference between the two: {np.abs(y - y_layer).max():.1e}")

# %% [markdown]
"""
And the gradient? It is computed in four ways: by the formula above in NumPy; by the layer itself,
on whichever backend Keras runs; by the chain rule node by node, from y back to x, without (B10);
and by difference quotients, which know nothing of formulas.
"""

# %%
x, dy = 5 * rng.randn(4, 5) + 12, rng.randn(4, 5)
gamma, beta = rng.randn(5), rng.randn(5)


def normalized(x, gamma, beta):
    return functional.batch_normalization(x, gamma, beta, epsilon=EPSILON)[0]


report = gradient_check.check(
    normalized, x, gamma, beta, upstream=dy, names=["x", "gamma", "beta"]
).require(1e-9)
print(report)

_, saved = forward(x, gamma, beta)
_, library = gradient_check.gradients(
    lambda *arrays: ops.sum(normalized(*arrays) * ops.convert_to_tensor(dy)), [x, gamma, beta]
)
node_by_node = functional.batch_normalization_backward_by_graph(
    *(ops.convert_to_tensor(v) for v in (dy, x, gamma)), epsilon=EPSILON
)
for name, ours, *others in zip(
    ("dx", "dgamma", "dbeta"), backward(dy, saved), library, node_by_node, strict=True
):
    of_layer, of_graph = (np.abs(ours - ops.convert_to_numpy(v)).max() for v in others)
    print(f"{name}: largest difference from the layer {of_layer:.1e}, node by node {of_graph:.1e}")

# %% [markdown]
"""
## LeNet on Fashion-MNIST, with and without

The setting is that of the book Dive into Deep Learning: pixels from 0 to 1, SGD without momentum,
batches of 256, 10 epochs, and a learning rate of 1.0, which is large. Normalization comes between
each of the first four layers and its sigmoid. Nothing else differs between the two nets. The last
96 of the 60,000 shuffled images do not fill a batch and are left out of the epoch, because at this
rate a step on so few images leaves a mark.

The nets are tested after every epoch, to draw the curves; nothing is chosen by the test set.
"""

# %%
BATCH_SIZE = arguments.choose(fast=128, default=256, full=256)
LEARNING_RATE = 1.0
EPOCHS = arguments.choose(fast=4, default=10, full=10)

data = datasets.load_or_digits(
    "fashion_mnist",
    data_dir=arguments.data_dir,
    standardize="unit",
    subset=arguments.choose(fast={"train": 3000, "test": 1000}, default=None, full=None),
)
if data.fallback:  # 1,437 images: smaller batches and more epochs, for as many steps
    BATCH_SIZE, EPOCHS = 32, 2 * EPOCHS
print(data)

norm = functools.partial(BatchNormalization, momentum=0.9, epsilon=EPSILON)
NORMALIZATIONS = {"batch": norm, "none": None}  # the exercises add some


@functools.cache
def compiled(structure):
    """The net of these settings, in JSON: compiled once for all its seeds and learning rates."""
    settings = json.loads(structure)
    normalization = NORMALIZATIONS[settings.pop("normalization")]
    if "positions" in settings:
        normalization = dict.fromkeys(settings.pop("positions"), normalization)
    model = LeNet(normalization, input_shape=data.input_shape, classes=data.classes, **settings)
    model.compile(
        keras.optimizers.SGD(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # XLA compiles for longer than the few steps of --fast take.
        jit_compile=arguments.choose(fast=False, default="auto", full="auto"),
    )
    make_variables(model, data.train.x, data.train.y)  # saves a second trace of the first step
    return model


POSITIONS = ("conv1", "conv2", "dense1", "dense2")
TRAINING = ("learning_rate", "epochs", "images", "batch_size")  # the rest describes the net


def make_model(settings, seed):
    """That net where training begins, with the weights of this seed."""
    structure = {key: value for key, value in settings.items() if key not in TRAINING}
    if structure.get("positions") in ([], list(POSITIONS)):
        del structure["positions"]  # none or all: the net that is compiled already
    model = compiled(json.dumps(structure))
    restart(model, seed, settings["learning_rate"])
    return model


# %% [markdown]
"""
Besides Keras's own logs, two things are measured at the end of every epoch: how many examples per
second the training steps processed, and, for the last section of this tutorial, the test accuracy a
second time, with statistics that are re-estimated from 10,000 training images instead of moving
averages.
"""


# %%
class Stopwatch(keras.callbacks.Callback):
    """Examples per second over the steps of an epoch, without the first, which compiles."""

    def on_epoch_begin(self, epoch, logs=None):
        self.times = []

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())

    def on_epoch_end(self, epoch, logs=None):
        if len(self.times) > 1:
            seconds = self.times[-1] - self.times[0]
            logs["examples_per_second"] = (len(self.times) - 1) * BATCH_SIZE / seconds


class TestReestimated(keras.callbacks.Callback):
    """Test accuracy with re-estimated statistics; the model is left as it was."""

    def on_epoch_end(self, epoch, logs=None):
        before = statistics.snapshot(self.model)
        statistics.reestimate(self.model, data.train.x, samples=10_000, progress=False)
        _, logs["reestimated_accuracy"] = self.model.evaluate(
            data.test.x, data.test.y, batch_size=1000, verbose=0
        )
        statistics.restore(self.model, before)


def train(settings, seed, progress):
    """One run on all training images, tested after every epoch."""
    model = make_model(settings, seed)
    callbacks = [Stopwatch()]
    if settings["normalization"] == "batch":
        callbacks.append(TestReestimated())
    history = model.fit(
        data.train.batches(BATCH_SIZE, seed=seed, drop_remainder=True),
        epochs=settings["epochs"],
        validation_data=(data.test.x, data.test.y),
        validation_batch_size=1000,
        callbacks=[*callbacks, progress.callback()],
        shuffle=False,  # the data set shuffles by itself, from its seed
        verbose=0,
    ).history
    names = {
        "loss": "train_loss",
        "accuracy": "train_accuracy",
        "val_loss": "test_loss",
        "val_accuracy": "test_accuracy",
        "reestimated_accuracy": "reestimated_accuracy",
        "examples_per_second": "examples_per_second",
    }
    history = {names[key]: values for key, values in history.items()}
    final = {key: values[-1] for key, values in history.items()}
    final["examples_per_second"] = float(np.median(history["examples_per_second"]))
    return {"history": history, "final": final, "parameters": model.count_params()}


def setting(normalization, learning_rate=LEARNING_RATE, **others):
    return {
        "normalization": normalization,
        "learning_rate": learning_rate,
        "epochs": EPOCHS,
    } | others


context = {"data": data.title, "images": len(data.train), "batch_size": BATCH_SIZE}
seeds = arguments.seed_range(fast=1, default=2, full=5)
run = functools.partial(
    experiments.run, out=out, resume=arguments.resume, title="Tutorial 1: batch normalization"
)

WITH, WITHOUT = f"batch norm, rate {LEARNING_RATE:g}", f"none, rate {LEARNING_RATE:g}"
results = run(train, {WITH: setting("batch"), WITHOUT: setting("none")}, seeds, context=context)

# %% [markdown]
"""
Figures published by others, each from a single run in the same setting (Dive into Deep Learning,
the chapter on batch normalization, and its forum): a reader's run on a CPU ended at a training
accuracy of .909 and a test accuracy of .878, at 3,314 examples per second; the book's own
TensorFlow run ended at a test accuracy of .887. The reader's figures are drawn as dashed lines,
unless there are fewer images.
"""

# %%
METRICS = ["train_accuracy", "test_accuracy", "reestimated_accuracy", "examples_per_second"]
ALL_IMAGES = len(data.train) == 60_000  # as the figures below
PUBLISHED = (
    {}
    if not ALL_IMAGES
    else {
        WITH: {
            "train_accuracy": (0.909, "reader"),
            "test_accuracy": (0.878, "reader"),
            "examples_per_second": (3313.6, "reader"),
        }
    }
)
LABELS = {
    "train_accuracy": "training accuracy (fraction)",
    "test_accuracy": "test accuracy (fraction)",
    "reestimated_accuracy": "test accuracy, re-estimated statistics (fraction)",
    "val_accuracy": "validation accuracy (fraction)",
    "learning_rate": "learning rate",
}
DIGITS = {"examples_per_second": 0}

print(results.table(METRICS, published=PUBLISHED, digits=DIGITS))
plotting.learning_curves(
    results,
    ["train_accuracy", "test_accuracy"],
    published=PUBLISHED,
    labels=LABELS,
    title=f"LeNet, {data.title}, learning rate {LEARNING_RATE:g}",
    path=out / "learning_curves.png",
)

# %% [markdown]
"""
Two more runs in the book's TensorFlow chapters have a published test accuracy. One is the classic
LeNet without batch normalization, whose first convolution is padded by 2, at a learning rate of .9
(.824). The other is the net above with Keras's built-in layer in its default settings (.761), whose
momentum is .99, where ours is .9. With either layer the test accuracy swings from epoch to epoch,
and the book's last value may have been unlucky. `--full` runs both nets.
"""

# %%
if arguments.mode == "full":
    CLASSIC = "none, classic LeNet, rate 0.9"
    BUILT_IN = f"built-in batch norm, rate {LEARNING_RATE:g}"
    NORMALIZATIONS["built-in"] = keras.layers.BatchNormalization
    others = {
        CLASSIC: setting("none", 0.9, padding="same"),
        BUILT_IN: setting("built-in"),
    }
    of_the_book = run(train, others, seeds, context=context)
    published = {
        CLASSIC: {"test_accuracy": (0.824, "book")},
        BUILT_IN: {"test_accuracy": (0.761, "book")},
    }
    print(of_the_book.table(METRICS[:2], published=published))

# %% [markdown]
"""
## Exercise 1: is the bias before batch normalization redundant?

(B1) and (B4) subtract whatever a bias adds. To check this, give a net large random biases and
compare its outputs, in training mode, with those of the same net without biases; then train with
and without them.
"""

# %%
keras.utils.set_random_seed(0)
with_bias = make_model(setting("batch"), seed=0)
without_bias = make_model(setting("batch", use_bias=False), seed=0)
for layer in without_bias.layers:
    twin = with_bias.get_layer(layer.name)
    weights = twin.get_weights()
    if len(weights) > len(layer.get_weights()):  # kernel and bias against kernel alone
        twin.set_weights([weights[0], np.random.uniform(-3, 3, weights[1].shape)])
        weights = weights[:1]
    layer.set_weights(weights)

images = data.test.x[:500]
outputs = [
    ops.convert_to_numpy(model(images, training=True)) for model in (with_bias, without_bias)
]
BIAS_DIFFERENCE = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max())
REMOVED = with_bias.count_params() - without_bias.count_params()
print(f"Random biases change the outputs by {BIAS_DIFFERENCE:.1e} of the largest output.")
print(f"Without them the net has {without_bias.count_params():,} parameters, {REMOVED} fewer.")

# %% [markdown]
"""
The nets of the exercises are trained on some of the training images and judged on others
(validation); the test images take no part. Moving statistics are first re-estimated, so that the
setting is judged and not the lag of the averages. For nets with ReLU, two shares are also recorded,
layer by layer: of activations that are zero, and of channels that always are.
"""

# %%
PART_EPOCHS = arguments.choose(fast=2, default=5, full=12)
if arguments.mode == "fast":  # of the images that are in memory already
    held_out = len(data.train) // 4
    judged, rest = slice(held_out), slice(held_out, held_out + 1500)
    part = dataclasses.replace(
        data,
        train=datasets.Split(data.train.x[rest], data.train.y[rest]),
        validation=datasets.Split(data.train.x[judged], data.train.y[judged]),
    )
else:
    part = datasets.load_or_digits(
        "fashion_mnist",
        data_dir=arguments.data_dir,
        standardize="unit",
        validation=5000,
        subset={"train": 12_000},
    )
MOVING = {"batch"}  # the normalizations with moving statistics


def logits_of(model, x):
    parts = [model(x[i : i + 1000], training=False) for i in range(0, len(x), 1000)]
    return np.concatenate([ops.convert_to_numpy(part) for part in parts])


def sparsity(model, x):
    """Shares of zeros after each activation, and of channels that are zero for all of x."""
    outputs = [model.get_layer(f"{position}_activation").output for position in POSITIONS]
    found = {}
    for position, a in zip(POSITIONS, keras.Model(model.inputs[0], outputs)(x), strict=True):
        zero = ops.convert_to_numpy(a) == 0  # (N, ..., C)
        found[f"zeros_{position}"] = float(zero.mean())
        found[f"dead_{position}"] = float(zero.all(axis=tuple(range(zero.ndim - 1))).mean())
    return found


def train_on_part(settings, seed, progress):
    """One run on part of the training images, judged on validation images."""
    model = make_model(settings, seed)
    images = settings.get("images", len(part.train))
    training = datasets.Split(part.train.x[:images], part.train.y[:images])
    history = model.fit(
        training.batches(settings.get("batch_size", BATCH_SIZE), seed=seed, drop_remainder=True),
        epochs=settings["epochs"],
        callbacks=[keras.callbacks.TerminateOnNaN(), progress.callback()],
        shuffle=False,
        verbose=0,
    ).history
    if settings["normalization"] in MOVING and np.isfinite(history["loss"][-1]):
        statistics.reestimate(model, training.x, samples=5000, progress=False)
    metrics = experiments.classification_metrics(
        logits_of(model, part.validation.x), part.validation.y
    )
    history = {f"train_{name}": values for name, values in history.items()}
    final = {name: values[-1] for name, values in history.items()}
    final["val_accuracy"] = metrics["accuracy"]
    if settings.get("activation") == "relu":
        final |= sparsity(model, part.validation.x[:1000])
    return {"history": history, "final": final}


part_context = {**context, "images": len(part.train)}
PART_WITH, NO_BIAS = (f"part, {name}, rate {LEARNING_RATE:g}" for name in ("batch", "no bias"))
part_seeds = arguments.seed_range(fast=1, default=1, full=5)
bias_results = run(
    train_on_part,
    {
        PART_WITH: setting("batch", epochs=PART_EPOCHS),
        NO_BIAS: setting("batch", epochs=PART_EPOCHS, use_bias=False),
    },
    part_seeds,
    context=part_context,
)
print(bias_results.table(["train_loss", "train_accuracy", "val_accuracy"]))
plotting.learning_curves(
    bias_results,
    ["train_loss", "train_accuracy"],
    labels={**LABELS, "train_loss": "training loss"},
    title=f"LeNet with batch normalization, with and without biases, {data.title}",
    path=out / "bias.png",
)

# %% [markdown]
"""
## Exercise 2: learning rates

How large may the learning rate be? A rate counts as usable if the net ends at no less than nine
tenths of the best validation accuracy that either net reached at any rate.
"""

# %%
RATES = arguments.choose(
    fast=[0.01, 0.1, 1.0],
    default=[0.1, 1.0, 10.0],
    full=[1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 10.0],
)
rate_seeds = arguments.seed_range(fast=1, default=1, full=2)
sweep = run(
    train_on_part,
    {
        f"part, {normalization}, rate {rate:g}": setting(normalization, rate, epochs=PART_EPOCHS)
        for normalization in ("batch", "none")
        for rate in RATES
    },
    rate_seeds,
    context=part_context,
)
if arguments.mode == "full":  # a rate that a figure is published for, over more seeds
    run(
        train_on_part,
        {"part, none, rate 0.1": setting("none", 0.1, epochs=PART_EPOCHS)},
        part_seeds,
        context=part_context,
    )
plotting.sweep(
    sweep,
    "learning_rate",
    "val_accuracy",
    group="normalization",
    labels={**LABELS, "batch": "batch normalization", "none": "without"},
    title=f"LeNet, {data.title}: {len(part.train):,} images, {PART_EPOCHS} epochs",
    path=out / "learning_rates.png",
)


def accuracy_at(normalization, rate):
    """Mean validation accuracy over seeds; a run that diverged counts as 0."""
    values = sweep.values(f"part, {normalization}, rate {rate:g}", "val_accuracy")
    return float(np.nan_to_num(values).mean())


ACCURACIES = {n: {rate: accuracy_at(n, rate) for rate in RATES} for n in ("batch", "none")}
LEAST = 0.9 * max(max(accuracies.values()) for accuracies in ACCURACIES.values())
BEST = {n: max(accuracies, key=accuracies.get) for n, accuracies in ACCURACIES.items()}
USABLE = {
    n: [r for r, a in accuracies.items() if a >= LEAST] for n, accuracies in ACCURACIES.items()
}


def usable(normalization):
    return ", ".join(f"{rate:g}" for rate in USABLE[normalization]) or "none of those tried"


for normalization, rate in BEST.items():
    accuracy = ACCURACIES[normalization][rate]
    print(
        f"{normalization:>5}: best rate {rate:g} (validation accuracy {accuracy:.3f}); usable: "
        f"{usable(normalization)} (at least {LEAST:.3f})"
    )

# %% [markdown]
"""
With `--full`, each net is now trained at its own best rate on all training images, because it is
not a fair comparison to show a net only at a rate that suits the other.
"""

# %%
best = {
    f"{'batch norm' if normalization == 'batch' else 'none'}, rate {rate:g}": setting(
        normalization, rate
    )
    for normalization, rate in BEST.items()
}
if arguments.mode == "full":
    at_best = run(train, best, seeds, context=context)
    print(at_best.table(METRICS, digits=DIGITS))
    plotting.learning_curves(
        at_best,
        ["train_accuracy", "test_accuracy"],
        labels=LABELS,
        title=f"LeNet, {data.title}, each net at its best learning rate",
        path=out / "learning_curves_best.png",
    )

# %% [markdown]
"""
## Exercise 3: which layers need it?

Each of the four layers can have its normalization or not, which makes sixteen nets. With `--full`,
all of them are trained at a learning rate of 1.0, on 12,000 images, for three epochs, so that the
beginning of learning is compared; the shorter modes train only some of the nets.
"""

# %%
SHORT_EPOCHS = arguments.choose(fast=2, default=3, full=3)


def name_of(positions):
    return f"norm at {', '.join(positions) or 'no layer'}"


SUBSETS = [
    subset for size in range(5) for subset in itertools.combinations(POSITIONS, size)
]  # () ... all four
if arguments.mode != "full":
    SUBSETS = [(), POSITIONS[2:], POSITIONS]
subsets = run(
    train_on_part,
    {
        name_of(subset): setting(
            "batch" if subset else "none", epochs=SHORT_EPOCHS, positions=list(subset)
        )
        for subset in SUBSETS
    },
    part_seeds,
    context=part_context,
)
print(subsets.table(["train_accuracy", "val_accuracy"]))


def cells(metric):
    """Mean of a metric: rows are the convolutions that have a norm, columns the dense layers."""
    means, texts = np.full((4, 4), np.nan), {}
    for row, convolutions in enumerate(PAIRS_OF["conv"]):
        for column, dense in enumerate(PAIRS_OF["dense"]):
            name = name_of(convolutions + dense)
            if name in subsets.names:
                values = subsets.values(name, metric)
                spread = f"\n± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                means[row, column] = values.mean()
                texts[row, column] = f"{values.mean():.3f}{spread}"
    return means, texts


PAIRS_OF = {
    kind: [(), (f"{kind}1",), (f"{kind}2",), (f"{kind}1", f"{kind}2")] for kind in ("conv", "dense")
}
SUBSET_ACCURACIES, texts = cells("val_accuracy")
plotting.matrix(
    SUBSET_ACCURACIES,
    rows=["none", "conv1", "conv2", "both"],
    columns=["none", "dense1", "dense2", "both"],
    ylabel="convolutions with normalization",
    xlabel="dense layers with normalization",
    value="validation accuracy (fraction)",
    texts=texts,
    title=f"LeNet, {data.title}: rate {LEARNING_RATE:g}, {SHORT_EPOCHS} epochs",
    path=out / "subsets.png",
)


def gains(position):
    """Per seed: what a norm here adds to the accuracy, mean over all choices for the others."""
    without = [subset for subset in SUBSETS if position not in subset]
    return np.mean(
        [
            subsets.values(
                name_of(tuple(p for p in POSITIONS if p in (*rest, position))), "val_accuracy"
            )
            - subsets.values(name_of(rest), "val_accuracy")
            for rest in without
        ],
        axis=0,
    )


GAINS = {p: gains(p).tolist() for p in POSITIONS} if len(SUBSETS) == 16 else {}
for position, values in GAINS.items():
    print(f"norm at {position}: {np.mean(values):+.3f} (n = {len(values)})")

# %% [markdown]
"""
## Exercise 4: does it replace dropout, and in which order do they go?

Dropout is meant to prevent overfitting, so take a net that overfits: the same net with ReLU, on
2,000 images, with batches of 50 and a learning rate of .1. Dropout takes out a quarter of the
activations. The order in question is the one within a block, after its convolution or dense layer.
"""

# %%
RATE_OF_DROPOUT = 0.25


def dropout_then_norm(name):
    return keras.Sequential([Dropout(RATE_OF_DROPOUT), norm()], name=name)


NORMALIZATIONS["dropout, batch"] = dropout_then_norm
MOVING.add("dropout, batch")
small = functools.partial(
    setting,
    learning_rate=0.1,
    epochs=arguments.choose(fast=4, default=10, full=10),
    images=min(len(part.train), 2000),
    batch_size=50,
    activation="relu",
)
DROPOUTS = {
    "neither": small("none"),
    "dropout alone": small("none", dropout=RATE_OF_DROPOUT),
    "norm alone": small("batch"),
    "norm, ReLU, dropout": small("batch", dropout=RATE_OF_DROPOUT),
    "ReLU, norm, dropout": small("batch", dropout=RATE_OF_DROPOUT, placement="after"),
    "dropout, norm, ReLU": small("dropout, batch"),
}
if arguments.mode != "full":
    chosen = ["neither", "norm alone", "norm, ReLU, dropout"]
    DROPOUTS = {name: DROPOUTS[name] for name in chosen[: 2 if arguments.mode == "fast" else 3]}
dropouts = run(
    train_on_part,
    DROPOUTS,
    part_seeds,
    context=part_context,
)
print(dropouts.table(["train_accuracy", "val_accuracy"]))
plotting.bars(
    dropouts,
    "val_accuracy",
    labels=LABELS,
    from_zero=False,
    title=f"LeNet with ReLU, {data.title}: {small('none')['images']:,} images",
    path=out / "dropout.png",
)

# %% [markdown]
"""
## Exercise 5: gamma and beta fixed

gamma and beta give back to the net what (B4) has taken from it: the choice of scale and shift. With
`scale=False` gamma stays at 1, and with `center=False` beta stays at 0. (`train_parameters=False`
fixes both at their current values, and can be switched at any time.)
"""

# %%
NORMALIZATIONS |= {
    "gamma fixed": functools.partial(norm, scale=False),
    "beta fixed": functools.partial(norm, center=False),
    "both fixed": functools.partial(norm, center=False, scale=False),
}
FIXED = ("gamma fixed", "beta fixed", "both fixed")
MOVING |= set(FIXED)
ALL = name_of(POSITIONS)
fixed = subsets.select(ALL).merge(
    run(
        train_on_part,
        {
            name: setting(name, epochs=SHORT_EPOCHS)
            for name in (FIXED if arguments.mode == "full" else FIXED[-1:])
        },
        part_seeds,
        context=part_context,
    )
)
fixed = fixed.rename({ALL: "both trained"})
print(fixed.table(["train_accuracy", "val_accuracy"]))
of_fixed = {
    "labels": LABELS,
    "title": f"LeNet, {data.title}: rate {LEARNING_RATE:g}, {SHORT_EPOCHS} epochs",
    "path": out / "gamma_beta.png",
}
if len(part_seeds) > 1:  # the seeds differ more than the nets: only seed by seed can it be seen
    plotting.paired_differences(fixed, "both trained", "val_accuracy", **of_fixed)
else:
    plotting.bars(fixed, "val_accuracy", from_zero=False, **of_fixed)

# %% [markdown]
"""
## Exercise 6: what else the layer can do

First come the arguments that Keras's own layer takes, and those that ours takes in addition; then
what the layer can do is shown on numbers small enough to be checked by hand.
"""

# %%
theirs, ours = (
    list(inspect.signature(kind).parameters)
    for kind in (keras.layers.BatchNormalization, BatchNormalization)
)
print("keras.layers.BatchNormalization:", ", ".join(theirs))
print("ours, in addition:", ", ".join(name for name in ours if name not in theirs))

x = np.array([[1.0], [3.0], [100.0]], "float32")  # the last one does not belong to the others
BEYOND = {}


def moved(layer, *, batches=1, **options):
    """Moving mean and variance after some batches."""
    for _ in range(batches):
        layer(x, training=True, **options)
    return [round(float(v.numpy()[0]), 3) for v in (layer.moving_mean, layer.moving_variance)]


def plain(**options):
    return BatchNormalization(scale=False, center=False, **options)


BEYOND["mean and variance of all three (momentum 0)"] = moved(plain(momentum=0.0))
BEYOND["mask: the first two alone"] = moved(plain(momentum=0.0), mask=np.array([True, True, False]))
BEYOND["sample_weight: the third counts a tenth"] = moved(
    plain(momentum=0.0), sample_weight=np.array([1.0, 1.0, 0.1])
)
BEYOND["unbiased=True: N - 1 in place of N"] = moved(plain(momentum=0.0, unbiased=True))
BEYOND["50 batches, momentum .99: 60% of it is still the start"] = moved(plain(), batches=50)
BEYOND["the same, debiased=True"] = moved(plain(debiased=True), batches=50)
still = plain(momentum=0.0)
still.update_statistics = False  # on: gamma, beta and the batch's statistics; off: the averages
BEYOND["update_statistics=False: they stay as they are"] = moved(still)
pairs = plain(virtual_batch_size=2)
y = ops.convert_to_numpy(pairs(x, training=True)).ravel().round(3).tolist()
BEYOND["virtual_batch_size=2, outputs: a pair, and what is left over"] = y
infinite = plain(momentum=0.0)
moved(infinite)
x[2] = np.inf
BEYOND["a batch with an infinity: left out"] = moved(infinite)
poisoned = keras.layers.BatchNormalization(scale=False, center=False)
BEYOND["the same, Keras's layer"] = moved(poisoned)
for what, values in BEYOND.items():
    print(f"  {what:<62}{values}")

# %% [markdown]
"""
## Exercise 7: other transforms

What could take the place of the mean and variance? The whole covariance, so that channels become
uncorrelated (whitening, with three ways to compute the inverse of its root); the whole distribution
of each channel (quantile normalization, the probability integral transform); nothing but the mean
square of a channel in one image (filter response normalization); the statistics of a single image
(layer and group normalization). All are put where batch normalization was, and trained at its
learning rate; they were not compared at rates of their own. Their cost is measured separately, as
the time of a training step, in turns.
"""

# %%
whitening = functools.partial(DecorrelatedBatchNormalization, momentum=0.9, epsilon=EPSILON)
layer_norm = functools.partial(LayerNormalization, epsilon=EPSILON)
response = functools.partial(FilterResponseNormalization, threshold=False)  # a sigmoid follows
NORMALIZATIONS |= {
    "layer": layer_norm,
    "group": functools.partial(GroupNormalization, groups=2, epsilon=EPSILON),
    "filter response": {  # needs positions: layer normalization after dense layers
        "conv1": response,
        "conv2": response,
        "dense1": layer_norm,
        "dense2": layer_norm,
    },
    "quantile": functools.partial(QuantileNormalization, momentum=0.9),
    "ZCA": functools.partial(whitening, method="zca"),
    "Cholesky": functools.partial(whitening, method="cholesky"),
    "Newton-Schulz": functools.partial(whitening, method="newton"),
}
TRANSFORMS = arguments.choose(
    fast=["layer"],
    default=["layer", "Newton-Schulz"],
    full=["layer", "group", "filter response", "quantile", "ZCA", "Cholesky", "Newton-Schulz"],
)
MOVING |= {"quantile", "ZCA", "Cholesky", "Newton-Schulz"}
transforms = subsets.select([name_of(()), ALL]).merge(
    run(
        train_on_part,
        {name: setting(name, epochs=SHORT_EPOCHS) for name in TRANSFORMS},
        part_seeds,
        context=part_context,
    )
)
transforms = transforms.rename({name_of(()): "none", ALL: "batch"})
print(transforms.table(["train_accuracy", "val_accuracy"]))
plotting.bars(
    transforms,
    "val_accuracy",
    labels=LABELS,
    title=f"LeNet, {data.title}: rate {LEARNING_RATE:g}, {SHORT_EPOCHS} epochs",
    path=out / "transforms.png",
)


def time_steps(settings, seed, progress):
    """Milliseconds of a training step, the median of ten after two to warm up."""
    model = make_model(settings, seed)
    images, classes = part.train.x[:BATCH_SIZE], part.train.y[:BATCH_SIZE]
    times = []
    for _ in range(12):
        start = time.perf_counter()
        model.train_on_batch(images, classes)
        times.append(1000 * (time.perf_counter() - start))
    return {"final": {"milliseconds": float(np.median(times[2:]))}}


speeds = run(
    time_steps,
    {f"step, {name}": setting(name) for name in ("none", "batch", *TRANSFORMS)},
    arguments.seed_range(fast=1, default=3, full=3),
    context=part_context,
)
speeds = speeds.rename({name: name.removeprefix("step, ") for name in speeds.names})
print(speeds.table("milliseconds", digits=1))

# %% [markdown]
"""
And sparsity? A ReLU makes zeros. With batch normalization before it, about half of the values of
every channel lie below zero, as long as beta is near 0. For the nets of exercise 4, the shares of
zeros and of channels that are always zero, after each ReLU, on validation images:
"""

# %%
ZEROS = [f"zeros_{position}" for position in POSITIONS]
DEAD = [f"dead_{position}" for position in POSITIONS]
print(dropouts.table(ZEROS, ["neither", "norm alone"], digits=3))
print(dropouts.table(DEAD, ["neither", "norm alone"], digits=3))

# %% [markdown]
"""
## A failure and its cure: the moving statistics are not those of this net

Look at the test accuracy with batch normalization above. It is below the training accuracy, in some
epochs far below, and it jumps from one epoch to the next. If this were overfitting, the same net,
with the same weights, would be no better when its means and variances are computed anew. But at a
learning rate of 1.0 each step moves the activations of every layer a long way, while (B11) and
(B12) average over the nets of the last steps: no net ever had these statistics.
`statistics.reestimate` computes them for the net as it is, layer by layer, from training images
alone.
"""

# %%
epochs, by_moving = results.curves(WITH, "test_accuracy")
_, by_reestimated = results.curves(WITH, "reestimated_accuracy")
plotting.lines(
    epochs,
    {"moving statistics": by_moving, "re-estimated after each epoch": by_reestimated},
    xlabel="epoch",
    ylabel="test accuracy (fraction)",
    reference={"published: a reader's single run, 0.878": 0.878} if ALL_IMAGES else {},
    title=f"The same weights, two kinds of statistics ({WITH})",
    path=out / "statistics.png",
)
moving, cured = (results.values(WITH, m) for m in ("test_accuracy", "reestimated_accuracy"))
print(
    f"Test accuracy after {EPOCHS} epochs, n = {len(moving)}: with moving statistics "
    f"{moving.mean():.4f}, re-estimated {cured.mean():.4f}; per seed better by "
    + ", ".join(f"{d:+.4f}" for d in cured - moving)
)

# %% [markdown]
"""
## What this does not show

This is one small net, on one data set, with plain SGD. Sigmoids make the net without normalization
hard to train; with ReLU the gap is smaller. The sweep has few epochs, and its best rate need not be
the best for ten. Examples per second are those of this machine, with whatever else ran on it.

## Exercises

1. Is a bias before batch normalization redundant?
2. What is the largest usable learning rate with and without it, and how do the training and the
   test accuracy grow?
3. Which layers need it?
4. Can it replace dropout? In which order should they go?
5. What if gamma and beta are fixed?
6. What else can a library's layer do?
7. Which other transforms could take its place? How sparse do they make a net?

## References

Ioffe and Szegedy, 2015, Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift. Zhang, Lipton, Li and Smola, Dive into Deep Learning, the chapter on batch
normalization (the setting and the exercises). LeCun, Bottou, Bengio and Haffner, 1998,
Gradient-Based Learning Applied to Document Recognition (LeNet). Ba, Kiros and Hinton, 2016, Layer
Normalization. Wu and He, 2018, Group Normalization. Singh and Krishnan, 2020, Filter Response
Normalization Layer. Huang, Yang, Lang and Deng, 2018, Decorrelated Batch Normalization (whitening).

## Next

Lesson 1b, `tutorials/01b_batchnorm_why.py`: small dense nets, when batch normalization helps them
and what it costs; and whether it works by reducing the shift of the activations or by making the
loss smoother.

## How to read the tests below

A paired t-test takes the differences between two settings, seed by seed, and asks whether their
mean may be due to chance; p is how often chance alone would make a difference that large. A
Wilcoxon test asks the same, but looks only at the signs and ranks of the differences. Cohen's d_z
is the mean difference divided by the standard deviation of the differences. When several tests are
made together, one may come out at p < .05 by luck; Holm's method raises their p-values to make up
for that.

## Answers, from the runs above
"""


# %%
def percent(values):
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread} %"


def answer_bias():
    a, b = (bias_results.values(name, "train_accuracy") for name in (PART_WITH, NO_BIAS))
    text = (
        f"1. Redundant. Random biases of up to 3 changed the outputs by {BIAS_DIFFERENCE:.0e} of "
        "the largest one, which is rounding: the mean takes them out again, and beta does their "
        f"work. Trained, the nets reach {percent(a)} with and {percent(b)} without them (training "
        f"accuracy after {PART_EPOCHS} epochs on {len(part.train):,} images, n = {len(a)}), with "
        f"{REMOVED} parameters fewer. "
    )
    if len(a) > 1:
        text += f"{bias_results.compare(NO_BIAS, PART_WITH, 'train_accuracy')} "
    return text + (
        "What would change the answer: normalization after the activation, or a layer without beta."
    )


def answer_rates():
    grows = [
        f"{percent(results.values(name, 'train_accuracy'))} in training and "
        f"{percent(results.values(name, 'test_accuracy'))} in the test"
        for name in (WITH, WITHOUT)
    ]
    first = [
        100 * np.mean([run.history["train_accuracy"][0] for run in results.select(name)])
        for name in (WITH, WITHOUT)
    ]
    return (
        f"2. Usable rates: {usable('batch')} with batch normalization; {usable('none')} without; "
        f"the best of those tried are {BEST['batch']:g} and {BEST['none']:g}, where the nets reach "
        f"{100 * ACCURACIES['batch'][BEST['batch']]:.1f} % and "
        f"{100 * ACCURACIES['none'][BEST['none']]:.1f} % of the validation images after "
        f"{PART_EPOCHS} epochs on {len(part.train):,}. At {LEARNING_RATE:g}, training "
        f"accuracy in the first epoch is {first[0]:.1f} % with and {first[1]:.1f} % without; after "
        f"{EPOCHS} epochs the nets are at {grows[0]} with, {grows[1]} without. The test accuracy "
        "with batch normalization lags and jumps because of its moving statistics; re-estimated "
        f"ones give {percent(cured)}. What would change the answer: another activation (ReLU lets "
        "the plain net learn sooner), a decaying rate (the moving statistics then settle)."
    )


def tested(results, pairs):
    """Differences in validation accuracy: name of a pair -> points, interval, p by Holm."""
    pairs = {
        name: (a, b)
        for name, (a, b) in pairs.items()
        if {a, b} <= set(results.names) and len(results.seeds(a)) > 1
    }
    tests = [results.compare(a, b, "val_accuracy") for a, b in pairs.values()]
    adjusted = experiments.holm([test.p for test in tests])
    return (
        "; ".join(
            f"{name} {100 * test.difference:+.1f} points ({test.untested}, n = {test.n})"
            if test.untested
            else f"{name} {100 * test.difference:+.1f} points (95 % {100 * test.low:+.1f} to "
            f"{100 * test.high:+.1f}, p = {p:.2g}, n = {test.n})"
            for name, test, p in zip(pairs, tests, adjusted, strict=True)
        )
        or "not tested in this mode"
    )


def listed(results, metric="val_accuracy", names=None):
    return ", ".join(f"{n} {percent(results.values(n, metric))}" for n in names or results.names)


def answer_subsets():
    ordered = sorted(subsets.names, key=lambda n: -subsets.values(n, "val_accuracy").mean())
    ends = ordered if len(ordered) < 7 else [*ordered[:4], *ordered[-3:]]
    text = (
        f"3. Validation accuracy at a rate of {LEARNING_RATE:g} after {SHORT_EPOCHS} epochs "
        f"(n = {len(part_seeds)}); the best and the worst: {listed(subsets, names=ends)}. "
    )
    if GAINS:
        effects = ", ".join(
            f"{position} {100 * np.mean(v):+.1f} ± {100 * np.std(v, ddof=1):.1f} points"
            for position, v in GAINS.items()
        )
        fewer = next(n for n in ordered if n != ALL)
        of_fewer = subsets.values(fewer, "train_accuracy")
        text += (
            f"What a norm adds, mean over the eight choices for the other three: {effects}. All "
            f"four, against the best of those with fewer: {tested(subsets, {fewer: (ALL, fewer)})} "
            "(the best of fifteen was picked by what it is held against here). A reader reports a "
            "training accuracy of .946 with fewer layers, without saying which, nor for how long "
            f"they were trained. This one of ours has {percent(of_fewer)}, after {SHORT_EPOCHS} "
            f"epochs on {len(part.train):,} images: another training, and no verdict on theirs. "
        )
    return text + (
        "What would change the answer: a smaller rate, or an activation that does not saturate, "
        "with which the net needs less help."
    )


def answer_dropout():
    usual = "norm, ReLU, dropout"
    differences = tested(
        dropouts,
        {
            "norm alone against dropout alone": ("norm alone", "dropout alone"),
            "both, in the usual order, against norm alone": (usual, "norm alone"),
            "dropout right before the norm, against the usual order": (
                "dropout, norm, ReLU",
                usual,
            ),
            "norm after the ReLU, against the usual order": ("ReLU, norm, dropout", usual),
        },
    )
    return (
        f"4. Validation accuracy with {small('none')['images']:,} images: {listed(dropouts)} "
        f"(training: {listed(dropouts, 'train_accuracy')}). Differences, p adjusted for their "
        f"number: {differences}. Dropout before a norm changes the variance that the norm sees in "
        "training, but not in inference; lesson 3 measures by how much. What would change the "
        "answer: more images, which leave dropout less to do, or rates chosen for each net."
    )


def answer_fixed():
    return (
        f"5. Validation accuracy: {listed(fixed)}. Against both trained, p adjusted for their "
        f"number: {tested(fixed, {name: (name, 'both trained') for name in FIXED})}. With gamma 1 "
        "and beta 0 most inputs of a sigmoid lie between -2 and 2, where it is nearly straight. "
        "What would change the answer: ReLU, for which the scale of a channel is taken up by the "
        "weights of the layer above."
    )


def answer_beyond():
    more = [name for name in ours if name not in theirs and name != "kwargs"]
    return (
        f"6. Keras's layer takes {', '.join(n for n in theirs if n != 'kwargs')}; ours takes "
        f"{', '.join(more)} beside. The numbers above show what each does. What would change the "
        "answer: another release of Keras."
    )


def answer_transforms():
    costs = ", ".join(f"{n} {speeds.values(n, 'milliseconds').mean():.0f}" for n in speeds.names)
    zeros = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{np.mean(dropouts.values(name, z)):.2f} after {p}"
            for p, z in zip(POSITIONS, ZEROS, strict=True)
        )
        for name in ("neither", "norm alone")
    )
    dead = "; ".join(
        f"{name}: {np.mean([dropouts.values(name, d).mean() for d in DEAD]):.3f}"
        for name in ("neither", "norm alone")
    )
    lines = tested(transforms, {name: (name, "batch") for name in TRANSFORMS})
    others = (
        "layer and group normalization, which learn least here,"
        if {"layer", "group"} <= set(TRANSFORMS)
        else "others"
    )
    return (
        f"7. Validation accuracy after {SHORT_EPOCHS} epochs (n = {len(part_seeds)}): "
        f"{listed(transforms)}. Against batch normalization, p adjusted for their number: "
        f"{lines}. All are compared at batch normalization's rate, {LEARNING_RATE:g}, only; "
        f"{others} may do better at another. Milliseconds of a training step (batch of "
        f"{BATCH_SIZE}): {costs}. Share of zeros after ReLU: {zeros}; share of channels that are "
        f"zero for all images, mean over the layers: {dead}. What would change the answer: a rate "
        "chosen for each transform; batches of a few images, where those that normalize each image "
        "alone have the advantage (lesson 4)."
    )


ANSWERS = [
    answer_bias(),
    answer_rates(),
    answer_subsets(),
    answer_dropout(),
    answer_fixed(),
    answer_beyond(),
    answer_transforms(),
]
arguments.finish(
    ANSWERS,
    data,
    seeds=f"{len(seeds)}, {len(rate_seeds)} of the learning rates, {len(part_seeds)} of the other "
    "exercises",
    instead_of="Fashion-MNIST",
    best_rate=BEST,
    usable_rates=USABLE,
    gain_of_a_norm=GAINS,
    beyond=BEYOND,
)

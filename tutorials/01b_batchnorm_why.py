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
# 1b. Batch normalization: when it helps, and why

**You will learn** what batch normalization does to small dense nets: how much faster they learn,
with batches of which size, at which learning rates, at what cost in time and memory, and when it
does not help; how it lets deep nets learn from more initializations; and, from a look inside while
they train, whether it does all that by keeping the distributions of activations in place, as its
inventors thought, or by making the loss smoother.

**You need** lesson 1: the equations, LeNet, and how to read the tests in the answers.

**Data**: MNIST, 60,000 training and 10,000 test images of 28 x 28 pixels, and CIFAR-10, 50,000 and
10,000 of 32 x 32 in colour (12 and 163 MB), read from `--data-dir` alone if it is given, else from
`TFDS_DATA_DIR`, then from the default folder of tensorflow-datasets; if missing, downloaded to the
first of these that can be written to. With neither network nor folder: the digits that come with
scikit-learn.

**Needs** on two CPU cores: `--fast` a minute, the default a few minutes, `--full` about half an
hour (five seeds of everything, ten of the deep nets).

**Expect** from the net 784-128-64-10, with batches of 64: see the results table of the README,
whose rows `--full` recomputes.
"""

# %%
import functools
import itertools
import json
import logging
import time
from typing import Any, NamedTuple

import matplotlib  # noqa: F401 -- here, and not after all trainings, it is to be found missing

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops

from keras_norm import datasets, experiments, models, optimizers, plotting, statistics
from keras_norm.ensembles import EvaluateTogether, train_together
from keras_norm.inspection import LEVELS, InsideMonitor
from keras_norm.layers import BatchNormalization

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

arguments = experiments.tutorial_arguments(
    "Batch normalization: when it helps, and why.", name="01b_batchnorm_why"
)
out = arguments.out
print(f"Tutorial 1b, mode {arguments.mode}; results go to {out}")

# %% [markdown]
"""
## A net on MNIST, with and without

The setting is that of a page of questions and answers: dense layers 784-128-64-10 with ReLU, pixels
p scaled to (p - .5) / .5, gradient descent with learning rate .01 and momentum .9, 5 epochs,
batches of 64 or 32, and batch normalization before each ReLU or nowhere. The published figures are
the mean training losses of the first and the fifth epoch. The published net without normalization
had already been trained for some epochs before, and the one on batches of 32 continues from the
end of the one on batches of 64; here both are repeated after a first phase of five epochs.

Nets this small are trained several at a time, in one stacked net (`ensembles.train_together`),
which gives each the weights that it would have if it were trained alone. A seed fixes the initial
weights and the order of the images.
"""

# %%
norm = functools.partial(BatchNormalization, momentum=0.9, epsilon=1e-5)
mnist = datasets.load_or_digits(
    "mnist",
    data_dir=arguments.data_dir,
    standardize=(0.5, 0.5),
    subset=arguments.choose(fast={"train": 4000, "test": 1000}, default=None, full=None),
)
print(mnist)


class Table(NamedTuple):
    """All images of a data set, and the rows of those to train on, to judge and to test by."""

    x: Any
    y: Any
    training: Any
    validation: Any
    test: Any

    @classmethod
    def of(cls, data, scale=1.0):
        nothing = datasets.Split(data.train.x[:0], data.train.y[:0])
        parts = (data.train, data.validation or nothing, data.test)
        edges = np.cumsum([0, *map(len, parts)])
        rows = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
        x = np.concatenate([part.x for part in parts]) * np.float32(scale)
        return cls(x, np.concatenate([part.y for part in parts]), *rows)


TABLES = {"mnist": Table.of(mnist)}
EPOCHS = arguments.choose(fast=2, default=5, full=5)


def make_net(settings, seed):
    """A net of these settings where training begins."""
    keras.utils.set_random_seed(seed)
    stddev = settings.get("stddev")
    table = TABLES[settings["data"]]
    return models.MLP(
        settings["hidden"],
        norm if settings["normalization"] == "batch" else None,
        kernel_initializer=keras.initializers.RandomNormal(stddev=stddev)
        if stddev
        else "he_normal",
        input_shape=table.x.shape[1:],
        classes=int(table.y.max()) + 1,
    )


def accuracy_of(net, x, y):
    logits = net.predict(x, batch_size=2000, verbose=0)
    return float(np.mean(np.argmax(logits, axis=-1) == y))


def setting(normalization, batch_sizes=(64,), learning_rate=0.01, **others):
    return {
        "data": "mnist",
        "hidden": [128, 64],
        "normalization": normalization,
        "optimizer": "momentum",
        "learning_rate": learning_rate,
        "batch_sizes": list(batch_sizes),  # of one phase of training after the other
        "epochs": EPOCHS,  # of a phase
    } | others


OPTIMIZERS = {
    "momentum": functools.partial(optimizers.SGD, momentum=0.9),
    "Adam": functools.partial(optimizers.Adam, epsilon=1e-8),
}


def rows_of(settings, seed):
    """The rows of a seed: all training images, and test images; or as many as the settings say.

    Those are drawn by the seed, and judged on validation images, or on others of the training set.
    """
    table = TABLES[settings["data"]]
    if "images" not in settings:
        return table.training, {"test": table.test}
    order = np.random.default_rng(seed).permutation(table.training)
    training, others = np.split(order, [settings["images"]])
    if len(table.validation):
        return training, {"val": table.validation, "train": training}
    return training, {"val": others[:5000]}


def fit_together(nets, settings, seeds):
    """Trains nets, each with the images and their order of its seed: metric -> (epochs, nets)."""
    table = TABLES[settings["data"]]
    rows = [rows_of(settings, seed) for seed in seeds]
    history = {}
    for batch_size in settings["batch_sizes"]:
        judge = EvaluateTogether(
            table.y, {part: [judged[part] for _, judged in rows] for part in rows[0][1]}
        )
        train_together(
            nets,
            table.x,
            table.y,
            rows=[training for training, _ in rows],
            seeds=seeds,
            optimizer=OPTIMIZERS[settings["optimizer"]](settings["learning_rate"]),
            epochs=settings["epochs"],
            batch_size=batch_size,
            callbacks=[judge],
        )
        found = {**judge.history, "train_loss": judge.history["loss"]}  # that of the steps
        for metric, values in found.items():
            if metric != "loss":
                history.setdefault(metric, []).extend(values)
    return {metric: np.array(values) for metric, values in history.items()}


@functools.cache
def trained_together(settings, seeds):
    """The nets of all seeds of a setting (JSON), and their history."""
    settings = json.loads(settings)
    nets = [make_net(settings, seed) for seed in seeds]
    return nets, fit_together(nets, settings, seeds)


@functools.cache
def net_like(settings):
    return make_net(json.loads(settings), 0)  # one for all seeds: it keeps what it has compiled


def train(settings, seed, progress):
    """One net of those trained together; with batch norm also under re-estimated statistics."""
    nets, history = trained_together(json.dumps(settings), tuple(seeds_of(settings)))
    at = seeds_of(settings).index(seed)
    history = {metric: values[:, at].tolist() for metric, values in history.items()}
    final = {metric: values[-1] for metric, values in history.items()}
    final["first_loss"] = history["train_loss"][-settings["epochs"]]  # of the last phase
    if "val_accuracy" in history:
        final["best_val_accuracy"] = max(history["val_accuracy"])
    if settings["normalization"] == "batch" and settings["data"] == "mnist":
        structure = ("data", "hidden", "normalization")
        net = net_like(json.dumps({key: settings[key] for key in structure}))
        net.set_weights(nets[at].get_weights())
        table, (training, judged) = TABLES["mnist"], rows_of(settings, seed)
        statistics.reestimate(net, table.x[training[:5000]], progress=False)
        ((part, held_out),) = judged.items()
        final[f"reestimated_{part}_accuracy"] = accuracy_of(
            net, table.x[held_out], table.y[held_out]
        )
    return {"history": history, "final": final}


seeds = arguments.seed_range(fast=2, default=2, full=5)
more_seeds = arguments.seed_range(fast=2, default=5, full=10)  # of what is trained in seconds


def seeds_of(settings):
    return more_seeds if settings["data"] == "cifar10" else seeds


context = {"data": mnist.title, "images": len(mnist.train)}
run = functools.partial(
    experiments.run, out=out, resume=arguments.resume, title="Tutorial 1b: batch norm, and why"
)


def run_together(function, settings, seeds, context):
    """Setting by setting: the nets that were trained together are saved together."""
    studies = [run(function, {name: s}, seeds, context=context) for name, s in settings.items()]
    return experiments.Results().merge(*studies)


MAIN = {
    "none, batch 64": setting("none"),
    "batch norm, batch 64": setting("batch"),
    "none, batch 64, then 64": setting("none", [64, 64]),
    "batch norm, batch 64, then 32": setting("batch", [64, 32]),
}
if arguments.mode != "full":
    MAIN = {name: MAIN[name] for name in ("none, batch 64", "batch norm, batch 64")}
main = run_together(train, MAIN, seeds, context)

# %% [markdown]
"""
As published, the loss of an epoch is the mean over its steps, each in training mode and with the
weights of that step. "First" is the first epoch of the last phase of training.
"""

# %%
PAGE = "questions and answers"
PUBLISHED = {
    name: {"first_loss": (first, PAGE), "train_loss": (last, PAGE)}
    for name, first, last in (
        ("none, batch 64, then 64", 0.0975, 0.0585),
        ("batch norm, batch 64", 0.2445, 0.0456),
        ("batch norm, batch 64, then 32", 0.0896, 0.0394),
    )
    if name in main.names and len(mnist.train) == 60_000  # as published
}
LABELS = {
    "train_loss": "training loss",
    "first_loss": "training loss, first epoch",
    "test_accuracy": "test accuracy (fraction)",
    "val_accuracy": "validation accuracy (fraction)",
    "train_accuracy": "training accuracy (fraction)",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "batch": "batch normalization",
    "none": "without",
}
print(main.table(["first_loss", "train_loss", "test_accuracy"], published=PUBLISHED))
plotting.learning_curves(
    main,
    ["train_loss", "test_accuracy"],
    names=[name for name in main.names if "then" not in name],
    labels=LABELS,
    share_y=False,
    title=f"784-128-64-10, {mnist.title}" if not mnist.fallback else mnist.title,
    path=out / "mnist.png",
)


def percent(values):
    spread = f" ± {100 * values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{spread} %"


def interval(test, p, unit, digits):
    """The 95% confidence interval of a difference and its p, or why there are none."""
    low, high = (f"{unit * end:+.{digits}f}" for end in (test.low, test.high))
    return test.untested or f"95 % {low} to {high}, p = {p:.2g}"


def compared(results, pairs, metric, unit=100, digits=2):
    """Differences of pairs of settings, by default in points, with their tests: name -> text.

    The p-values are adjusted for their number by Holm.
    """
    pairs = {
        name: (a, b)
        for name, (a, b) in pairs.items()
        if {a, b} <= set(results.names) and len(results.seeds(a)) > 1
    }
    tests = [results.compare(a, b, metric) for a, b in pairs.values()]
    adjusted = experiments.holm([test.p for test in tests])
    return {
        name: f"{unit * test.difference:+.{digits}f}{' points' if unit == 100 else ''} "
        f"({interval(test, p, unit, digits)}, n = {test.n})"
        for name, test, p in zip(pairs, tests, adjusted, strict=True)
    }


def difference(results, a, b, metric, unit=100, digits=2):
    """That of one pair."""
    return compared(results, {"": (a, b)}, metric, unit, digits).get("", "not tested in this mode")


# %% [markdown]
"""
## Batch sizes

Here and in the next section, each net sees 6,000 images, drawn by its seed, and is judged on 5,000
others from the training set. The smaller a batch, the noisier its mean and variance: with two
images, normalized values are -1 and 1 whatever the images are (as long as they differ). The moving
averages of such batches are noisy too, so the accuracy is also measured with statistics that are
re-estimated after training.
"""

# %%
IMAGES = min(6000, len(mnist.train) // 2)
SIZES = arguments.choose(fast=[8], default=[2, 8, 32, 128], full=[2, 4, 8, 16, 32, 64, 128, 512])


def swept(normalization, size=64, rate=0.01):
    return f"{normalization}, {size} images a batch, rate {rate:g}", setting(
        normalization, [size], rate, images=IMAGES, batch_size=size
    )


by_size = run_together(
    train, dict(swept(n, size) for size in SIZES for n in ("batch", "none")), seeds, context
)
print(by_size.table(["train_loss", "val_accuracy"]))
lines = experiments.Results(
    [
        *by_size.runs,
        *(
            experiments.Run(
                f"{run.name}, re-estimated",
                {**run.settings, "normalization": "re-estimated"},
                run.seed,
                final={"val_accuracy": run.value("reestimated_val_accuracy")},
            )
            for run in by_size.select(settings={"normalization": "batch"})
        ),
    ]
)
plotting.sweep(
    lines,
    "batch_size",
    "val_accuracy",
    group="normalization",
    labels={**LABELS, "re-estimated": "batch normalization, statistics re-estimated"},
    title=f"{EPOCHS} epochs of {IMAGES:,} images, {mnist.title}",
    path=out / "batch_sizes.png",
)

# %% [markdown]
"""
## Learning rates

Which rates can be used, and is the best with normalization better than the best without? Batches
are of 64 images. A rate counts as usable if it comes within two points of the best validation
accuracy.
"""

# %%
RATES = arguments.choose(
    fast=[0.3], default=[0.01, 0.1, 1.0], full=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
)
by_rate = run_together(
    train, dict(swept(n, rate=rate) for rate in RATES for n in ("batch", "none")), seeds, context
)
plotting.sweep(
    by_rate,
    "learning_rate",
    "val_accuracy",
    group="normalization",
    labels=LABELS,
    title=f"{EPOCHS} epochs of {IMAGES:,} images, batches of 64, {mnist.title}",
    path=out / "rates.png",
)


def val_accuracy(normalization, rate):
    name, _ = swept(normalization, rate=rate)
    return float(np.nan_to_num(by_rate.values(name, "val_accuracy")).mean())


ACCURACIES = {n: {r: val_accuracy(n, r) for r in RATES} for n in ("batch", "none")}
HIGHEST = max(max(of_rate.values()) for of_rate in ACCURACIES.values())
BEST = {n: max(of_rate, key=of_rate.get) for n, of_rate in ACCURACIES.items()}
USABLE = {n: [r for r, a in of.items() if a >= HIGHEST - 0.02] for n, of in ACCURACIES.items()}
for n in BEST:
    rates = ", ".join(f"{r:g}" for r in USABLE[n]) or "none"
    print(f"{n:>5}: best rate {BEST[n]:g} ({100 * ACCURACIES[n][BEST[n]]:.2f} %); usable: {rates}")

# %% [markdown]
"""
One rate for all batch sizes may be too large for small batches, which make many noisy steps. With
`--full`, nets are trained once more in batches of 4, with and without normalization, each at its
own best rate scaled down in proportion to the batch size.
"""

# %%
SMALL = 4
SMALL_RATES = {n: float(f"{BEST[n] * SMALL / 64:.1g}") for n in BEST}
if arguments.mode == "full":
    SMALL_NAMES = {n: swept(n, SMALL, rate)[0] for n, rate in SMALL_RATES.items()}
    at_small = run_together(
        train, dict(swept(n, SMALL, rate) for n, rate in SMALL_RATES.items()), seeds, context
    )
    print(at_small.table(["train_loss", "val_accuracy"]))

# %% [markdown]
"""
## Time and memory

The time is that of an epoch of one net by itself, with and without normalization in turns, after an
epoch that is not counted. The memory is counted at 4 bytes a number: what the net has to keep, the
optimizer's velocities, and what a batch keeps for the backward pass, which is the inputs of a dense
layer, the outputs of a ReLU, and for batch normalization x_hat and one number per channel. (The
peak memory of a step with images is measured by `benchmarks/memory.py`.)
"""


# %%
@functools.cache
def timed(normalization):
    net = make_net(setting(normalization), 0)
    net.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return net


def time_epoch(settings, seed, progress):
    net = timed(settings["normalization"])
    part = datasets.Split(mnist.train.x[:IMAGES], mnist.train.y[:IMAGES])
    batches = part.batches(64, seed=seed, drop_remainder=True)
    if not net.optimizer.iterations.numpy():
        net.fit(batches, verbose=0)  # compiles
    start = time.perf_counter()
    net.fit(batches, verbose=0)
    return {"final": {"seconds_of_an_epoch": time.perf_counter() - start}}


def bytes_of(net, batch_size=64):
    """Weights and statistics, velocities, and what is kept between the passes."""
    weights = sum(int(np.prod(v.shape)) for v in net.weights)
    velocities = sum(int(np.prod(v.shape)) for v in net.trainable_variables)
    kept = 0
    for layer in net.layers:
        width = int(np.prod(layer.output.shape[1:]))
        if isinstance(layer, BatchNormalization):
            kept += batch_size * width + width  # x_hat and 1 / sigma
        elif isinstance(layer, keras.layers.Dense):
            kept += batch_size * int(np.prod(layer.input.shape[1:]))
        elif isinstance(layer, keras.layers.Activation):
            kept += batch_size * width
    return {"weights": 4 * weights, "velocities": 4 * velocities, "kept": 4 * kept}


times = run(
    time_epoch,
    {f"epoch, {n}": {"normalization": n, "images": IMAGES} for n in ("none", "batch")},
    arguments.seed_range(fast=1, default=3, full=7),
    context=context,
)
print(times.table("seconds_of_an_epoch", digits=3))
MEMORY = {n: bytes_of(timed(n)) for n in ("none", "batch")}
for n, parts in MEMORY.items():
    print(f"{n:>5}: " + ", ".join(f"{part} {size / 1024:.1f} KiB" for part, size in parts.items()))

# %% [markdown]
"""
## Deep nets, and how they begin

The setting is that of a course (CV7062610, assignment 3) on CIFAR-10: five hidden layers of 100,
weights drawn with standard deviation .02, 1,000 training images, 10 epochs, batches of 50, Adam
with a rate of .001. Inputs are pixels from 0 to 255 minus the mean image. Every seed draws its own
1,000 out of 10,000 images; 1,000 others are for validation. (Lesson 4 has batches of 5, 10 and 50
with batch and with layer normalization; lesson 5 has nine layers, normalization after the ReLU, and
a start from weights of standard deviation 1e-4.)
"""

# %%
cifar = datasets.load_or_digits(
    "cifar10",
    data_dir=arguments.data_dir,
    standardize="pixel",
    validation=1000 if arguments.mode != "fast" else 300,
    subset=arguments.choose(
        fast={"train": 1000, "test": 100},
        default={"train": 10_000, "test": 1000},
        full={"train": 10_000, "test": 1000},
    ),
)
print(cifar)
TABLES["cifar10"] = Table.of(cifar, 255 * cifar.std)
few = min(1000, len(cifar.train) // 2)
cifar_context = {"data": cifar.title, "images": few}


# Fewer layers in --fast: each takes time to compile.
DEEP, DEEPER = arguments.choose(fast=(3, 4), default=(5, 6), full=(5, 6))
COUNT = {3: "three", 4: "four", 5: "five", 6: "six"}


def deep(normalization, hidden=(100,) * DEEP, stddev=0.02):
    return setting(
        normalization,
        [50],
        0.001,
        data="cifar10",
        hidden=list(hidden),
        optimizer="Adam",
        stddev=stddev,
        images=few,
        epochs=arguments.choose(fast=4, default=10, full=10),
    )


deep_nets = run_together(
    train,
    {"deep, none": deep("none"), "deep, batch norm": deep("batch")},
    more_seeds,
    cifar_context,
)
COURSE = "CV7062610, assignment 3"
DEEP_PUBLISHED = (
    {}
    if cifar.fallback or few < 1000
    else {
        "deep, none": {"train_accuracy": (0.654, COURSE), "val_accuracy": (0.324, COURSE)},
        "deep, batch norm": {"train_accuracy": (0.784, COURSE), "val_accuracy": (0.310, COURSE)},
    }
)
print(deep_nets.table(["train_accuracy", "val_accuracy"], published=DEEP_PUBLISHED))
plotting.learning_curves(
    deep_nets,
    ["train_accuracy", "val_accuracy"],
    published=DEEP_PUBLISHED,
    labels=LABELS,
    share_y=False,
    title=f"{COUNT[DEEP].capitalize()} hidden layers of 100, {few:,} images, {cifar.title}",
    path=out / "deep.png",
)

# %% [markdown]
"""
Now the nets have six hidden layers of 50, and initial weights at each of twenty scales (standard
deviations) from 1e-4 to 1. All scales and seeds of a kind of net are trained in one stacked net.
(`--fast`: two scales, and three and four hidden layers in place of five and six, here and below.)
"""

# %%
SCALES = [float(f"{scale:.4g}") for scale in np.logspace(-4, 0, 20)]
if arguments.mode == "fast":
    SCALES = SCALES[4::10]


@functools.cache
def scales_together(normalization):
    """(scale, seed) -> history, of all scales and seeds."""
    pairs = [(scale, seed) for scale in SCALES for seed in seeds]
    nets = [make_net(deep(normalization, (50,) * DEEPER, scale), seed) for scale, seed in pairs]
    history = fit_together(nets, deep(normalization), [seed for _, seed in pairs])
    return {
        pair: {metric: values[:, i] for metric, values in history.items()}
        for i, pair in enumerate(pairs)
    }


def train_scale(settings, seed, progress):
    history = scales_together(settings["normalization"])[settings["stddev"], seed]
    final = {f"best_{part}": float(history[f"{part}_accuracy"].max()) for part in ("val", "train")}
    return {"final": {**final, "final_loss": float(history["train_loss"][-1])}}


scales = run(
    train_scale,
    {f"scale {s:g}, {n}": deep(n, (50,) * DEEPER, s) for n in ("batch", "none") for s in SCALES},
    seeds,
    context=cifar_context,
)
for metric, label in (
    ("best_val", "best validation accuracy (fraction)"),
    ("best_train", "best training accuracy (fraction)"),
    ("final_loss", "training loss of the last epoch"),
):
    plotting.sweep(
        scales,
        "stddev",
        metric,
        group="normalization",
        yscale="log" if metric == "final_loss" else "linear",
        labels={**LABELS, metric: label, "stddev": "standard deviation of the initial weights"},
        title=f"{COUNT[DEEPER].capitalize()} hidden layers of 50, {few:,} images, {cifar.title}",
        path=out / f"scales_{metric}.png",
    )


def scale_means(normalization, metric="best_val"):
    values = (scales.values(f"scale {s:g}, {normalization}", metric) for s in SCALES)
    return np.array([np.nan_to_num(v).mean() for v in values])


LEARNS = {}  # scales from which a net comes within nine tenths of the best of all
for n in ("batch", "none"):
    good = scale_means(n) >= 0.9 * max(scale_means(m).max() for m in ("batch", "none"))
    LEARNS[n] = [s for s, g in zip(SCALES, good, strict=True) if g]
    print(f"{n:>5}: {len(LEARNS[n])} of {len(SCALES)} scales: {LEARNS[n]}")

# %% [markdown]
"""
With batch normalization the net learns from more scales, but by no means from all: with weights of
1 it learns next to nothing either way (`--full`: a validation accuracy of .153 with batch
normalization, .149 without). Is the scale not divided out? It is, from the output of a layer; but
the length of a step does not grow with it. Adam moves a weight by about the learning rate, .001,
whether the weight is small or large: in 200 steps by .2 or so, which hardly turns a vector of
weights of 1. What counts is the rate relative to the weights. At the small end of the scales,
epsilon, 1e-5, is larger than the variance that it is added to: with weights of 1e-4, that variance
is about 25 times 1e-8 from the second layer on (50 inputs with a mean square of .5). This is
reasoning, not a measurement. Answer 5 of lesson 2 shows the other side: weights that grow, and so
counteract a rate that is too large.

## Looking inside: why does it work?

There are two explanations. The inventors' is that, while a net trains, the distributions of the
inputs of each layer shift because the layers below learn (internal covariate shift); batch
normalization keeps them in place, and a layer no longer has to chase a moving target. Santurkar and
others (2018) say that the shift does not matter; batch normalization makes the loss smoother, so
that a gradient can be trusted for a longer step.

Both can be measured. `inspection.InsideMonitor` looks into a net every few steps, always with the
same 100 training images. Let w be the weights, g the gradient of the loss L, g_i that of layer i,
and t the length of a step. The monitor measures (equations numbered as in `keras_norm.inspection`):

    (X3)  smoothness = largest || grad L(w - t g) - g || / (t ||g||), t = 1/2 to 4 learning rates
    (X5)  shift of layer i = || g_i' - g_i || / ||g_i||, where for g_i' all layers below i, and no
          others, have made their step
    (X6)  drift of a layer's inputs to ReLU since the last look, in standard deviations of a channel

and the range of the loss over those t. The nets have five hidden layers of 100 on standardized
pixels, He's initialization, and plain gradient descent with one rate for all. There are three of
them: without normalization, with it, and with it but deliberately spoiled, as by Santurkar and
others: after each batch normalization every channel is shifted and stretched at random, differently
in each step. The distributions of this net jump all the time. If they had to stay in place, it
would have to learn like the first.
"""


# %%
class Jitter(keras.layers.Layer):
    """In training shifts and stretches every channel at random, anew in each step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator()

    def call(self, inputs, training=False):
        if not training:
            return inputs
        channels = (1, inputs.shape[-1])
        draw = functools.partial(keras.random.uniform, seed=self.generator)
        shift, stretch = draw(channels, -0.5, 0.5), draw(channels, 1.0, 1.25)  # of the step
        shift = shift + draw(ops.shape(inputs), -0.1, 0.1)  # and of each image
        noise = keras.random.normal(ops.shape(inputs), seed=self.generator)
        return inputs * (stretch + 0.1 * noise) + shift


KINDS = {
    "none": None,
    "batch norm": norm,
    "batch norm, jittered": lambda name: keras.Sequential([norm(), Jitter()], name=name),
}
LAYERS = [f"dense{i}" for i in range(1, DEEP + 1)]
INSIDE_IMAGES = len(cifar.train) - len(cifar.train) % 100
LOOK = slice(0, 100)


def make_deep(settings, seed):
    keras.utils.set_random_seed(seed)
    net = models.MLP(
        settings["hidden"],
        KINDS[settings["normalization"]],
        input_shape=cifar.input_shape,
        classes=cifar.classes,
    )
    net.compile(
        keras.optimizers.SGD(settings["learning_rate"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # XLA compiles for longer than the few steps of --fast take.
        jit_compile=arguments.choose(fast=False, default="auto", full="auto"),
    )
    return net


deep_pool = experiments.ModelPool(make_deep)


def mean_of(records, metric, layers):
    return float(np.mean([record[metric] for record in records if record["layer"] in layers]))


def look_inside(settings, seed, progress):
    """One run, with what the monitor saw, and its means over all looks but the first."""
    net = deep_pool(settings, seed)
    watched = [name if settings["normalization"] == "none" else f"{name}_norm" for name in LAYERS]
    monitor = InsideMonitor(
        cifar.train.x[LOOK],
        cifar.train.y[LOOK],
        every=settings["every"],
        layers=watched,
        shifts=LAYERS[1:],
    )
    batches = cifar.train.batches(100, seed=seed, drop_remainder=True)
    losses = net.fit(
        batches,
        epochs=settings["epochs"],
        callbacks=[monitor, progress.callback()],
        shuffle=False,
        verbose=0,
    ).history["loss"]
    history = {"epoch": []}
    for record in monitor.records:
        of_step = [r for r in monitor.layer_records if r["step"] == record["step"]]
        last = next(r for r in of_step if r["layer"] == watched[-1])
        found = {
            "epoch": record["step"] / len(batches),
            "loss": record["loss"],
            "smoothness": record["smoothness"],
            "loss_range": float(np.ptp(record["losses"])),
            "shift": mean_of(of_step, "shift", LAYERS[1:]),
            "cosine": mean_of(of_step, "cosine", LAYERS[1:]),
            "drift": mean_of(of_step, "drift", watched) if record["step"] else None,
            "gradient_first": next(r for r in of_step if r["layer"] == watched[0])["gradient_rms"],
            "gradient_last": last["gradient_rms"],
            **{
                f"quantile_{100 * level:.0f}": float(quantile)
                for level, quantile in zip(LEVELS, last["quantiles"], strict=True)
            },
        }
        for metric, value in found.items():
            history.setdefault(metric, []).append(value)
    final = {
        f"mean_{metric}": float(np.mean(history[metric][1:]))
        for metric in ("smoothness", "loss_range", "shift", "cosine", "drift")
    }
    final |= {
        "train_loss": losses[-1],
        "val_accuracy": accuracy_of(net, cifar.validation.x, cifar.validation.y),
    }
    return {"history": history, "final": final}


inside = run(
    look_inside,
    {
        f"inside, {kind}": {
            "hidden": [100] * DEEP,
            "normalization": kind,
            "learning_rate": 0.03,
            "epochs": arguments.choose(fast=2, default=4, full=5),
            "every": arguments.choose(fast=10, default=50, full=50),
        }
        for kind in KINDS
    },
    arguments.seed_range(fast=1, default=2, full=5),
    context=cifar_context | {"images": INSIDE_IMAGES},
)
inside = inside.rename({name: name.removeprefix("inside, ") for name in inside.names})
INSIDE_LABELS = {
    "smoothness": "change of the gradient / step (X3)",
    "loss_range": "range of the loss along the gradient",
    "shift": "internal covariate shift (X5)",
    "drift": "drift of activations (X6, σ)",
    "mean_smoothness": "smoothness (X3)",
    "mean_loss_range": "range of the loss",
    "mean_shift": "shift (X5)",
    "mean_drift": "drift (X6)",
    "gradient_first": "gradient at the first hidden layer",
    "gradient_last": "gradient at the last hidden layer",
    "quantile_5": "5 % quantile of the last layer",
    "quantile_95": "95 % quantile of the last layer",
    "loss": "loss of the 100 images",
}
print(
    inside.table(
        ["train_loss", "val_accuracy", *(m for m in inside.metrics if m.startswith("mean_"))],
        digits=3,
    )
)
plotting.learning_curves(
    inside,
    ["loss_range", "smoothness", "shift"],
    labels=INSIDE_LABELS,
    yscale="log",
    share_y=False,
    title=f"{COUNT[DEEP].capitalize()} hidden layers of 100, {cifar.title}",
    path=out / "inside.png",
)
plotting.learning_curves(
    inside,
    ["quantile_5", "quantile_95", "drift"],
    labels=INSIDE_LABELS,
    share_y=False,
    title=f"Inputs of the last ReLU, {cifar.title}",
    path=out / "activations.png",
)
plotting.learning_curves(
    inside,
    ["loss", "gradient_first", "gradient_last"],
    labels=INSIDE_LABELS,
    share_y=False,
    yscale="log",
    title=f"Loss, and gradients of the loss with respect to activations, {cifar.title}",
    path=out / "gradients.png",
)

# %% [markdown]
"""
## What this does not show

These are small nets on small data sets. The deep nets see a thousand images, and validation
accuracy is not what they are compared for. In the last section three nets share one rate, which
need not be the best for any of them. The smoothness is that of the loss of a hundred images along
one line, not that of the loss itself. (X3) also depends on the scale of the weights, which batch
normalization takes out of what a layer computes, but not out of its gradient. A JPEG copy of
CIFAR-10, where the title says that it is one, costs accuracy compared with the original images.

At the rate of the last section the net without normalization learns better, so what is measured
there cannot explain why batch normalization helps elsewhere. In the section on batch sizes all nets
have one rate, which is too large for the plain net in small batches; only for batches of 4 were
other rates tried, one for each net.

## Exercises

1. Does the net learn faster with batch normalization, and does it end better?
2. What do small batches do to it? When does it not help?
3. Does it allow larger learning rates?
4. What does it cost, in time and memory?
5. What does it do for deep nets, and for their initialization?
6. Internal covariate shift, or smoothness?

## References

Ioffe and Szegedy, 2015, Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift. Santurkar, Tsipras, Ilyas and Madry, 2018, How Does Batch Normalization
Help Optimization? He, Zhang, Ren and Sun, 2015, Delving Deep into Rectifiers (He's initialization).
Kingma and Ba, 2015, Adam: A Method for Stochastic Optimization.

## Next

Lesson 2, `tutorials/02_optimizers.py`: the update rules, and the largest rate that each tolerates.

## Answers, from the runs above
"""


# %%
def number(results, name, metric, digits=4):
    values = results.values(name, metric)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def beside(name, metric):
    figure = PUBLISHED.get(name, {}).get(metric)
    return f" (published {figure[0]:.4f})" if figure else ""


def answer_speed():
    lines = "; ".join(
        f"{name}: {number(main, name, 'first_loss')}{beside(name, 'first_loss')} to "
        f"{number(main, name, 'train_loss')}{beside(name, 'train_loss')}, test accuracy "
        f"{percent(main.values(name, 'test_accuracy'))}"
        for name in main.names
    )
    a, b = "batch norm, batch 64", "none, batch 64"
    return (
        "1. Mean training loss of the first and the last epoch (of the last phase), n = "
        f"{len(seeds)}: {lines}. With and without, batches of 64: in the first epoch "
        f"{difference(main, a, b, 'first_loss', 1, 4)}, in the last "
        f"{difference(main, a, b, 'train_loss', 1, 4)}, test accuracy "
        f"{difference(main, a, b, 'test_accuracy')}. What would change the answer: the rate, of "
        "which .01 is the published one (answer 3)."
    )


def answer_sizes():
    pairs = {size: (swept("batch", size)[0], swept("none", size)[0]) for size in SIZES}
    tests = compared(by_size, pairs, "val_accuracy")
    lines = "; ".join(
        f"{size}: {percent(by_size.values(with_norm, 'val_accuracy'))} with (re-estimated "
        f"{percent(by_size.values(with_norm, 'reestimated_val_accuracy'))}), "
        f"{percent(by_size.values(without, 'val_accuracy'))} without, difference "
        f"{tests.get(size, 'not tested')}"
        for size, (with_norm, without) in pairs.items()
    )
    return (
        f"2. Validation accuracy after {EPOCHS} epochs of {IMAGES:,} images, by the size of the "
        f"batch: {lines}. In a batch of two an image's normalized value says only whether it was "
        "the larger of the two; and every step moves the averages of inference by a tenth of such "
        f"statistics. When does it not help? {sizes_verdict()} All sizes have the rate .01 and a "
        f"momentum of .9{small_verdict()}. What would change the answer: a smaller rate for the "
        "smaller batches, and a larger one for the larger, which make fewer steps here; "
        "normalization that looks at one image alone (lesson 4)."
    )


def sizes_verdict():
    """At how many sizes batch normalization is ahead, and where to look for the others."""
    ahead = sum(
        by_size.values(swept("batch", size)[0], "val_accuracy").mean()
        > by_size.values(swept("none", size)[0], "val_accuracy").mean()
        for size in SIZES
    )
    at_how_many = (
        f"Of these {len(SIZES)} sizes it is ahead, in the mean, at "
        f"{f'all {ahead}' if ahead == len(SIZES) else ahead or 'none'}."
        if len(SIZES) > 1
        else f"At this size it is {'' if ahead else 'not '}ahead."
    )
    return (
        f"{at_how_many} For the contrary see answer 6, deep nets at a rate of .03, and lesson 4, "
        "batches of one image."
    )


def small_verdict():
    """Small batches at rates of their own."""
    if arguments.mode != "full":
        return ", which may be too large for small batches"
    with_norm, without = (
        f"{percent(at_small.values(SMALL_NAMES[n], 'val_accuracy'))} {text} at {SMALL_RATES[n]:g}"
        for n, text in (("batch", "with"), ("none", "without"))
    )
    test = difference(at_small, SMALL_NAMES["batch"], SMALL_NAMES["none"], "val_accuracy")
    return (
        f". In batches of {SMALL}, each at its best rate in batches of 64 (answer 3) times "
        f"{SMALL} / 64, it is {with_norm} and {without}, difference {test}"
    )


def answer_rates():
    lines = "; ".join(
        f"{LABELS[n]}: usable {', '.join(f'{r:g}' for r in USABLE[n]) or 'none'}, best {BEST[n]:g} "
        f"with {percent(by_rate.values(swept(n, rate=BEST[n])[0], 'val_accuracy'))}"
        for n in ("batch", "none")
    )
    at_best = difference(
        by_rate, *(swept(n, rate=BEST[n])[0] for n in ("batch", "none")), "val_accuracy"
    )
    return (
        f"3. Of the rates {', '.join(f'{r:g}' for r in RATES)}: {lines}. Each at its best, with "
        f"against without: {at_best}. What would change the answer: deeper nets (answer 5), or "
        "sigmoids (lesson 1)."
    )


def answer_cost():
    seconds = {n: times.values(f"epoch, {n}", "seconds_of_an_epoch") for n in ("none", "batch")}
    kib = {n: {part: size / 1024 for part, size in parts.items()} for n, parts in MEMORY.items()}
    medians = {n: float(np.median(values)) for n, values in seconds.items()}
    ratios = seconds["batch"] / seconds["none"]
    ratio = float(np.median(ratios))
    of_several = " (medians)" if len(ratios) > 1 else ""
    spread = (
        f"median of the ratios of {len(ratios)} pairs, from {ratios.min():.2f} to "
        f"{ratios.max():.2f}"
        if len(ratios) > 1
        else "one pair"
    )
    return (
        f"4. An epoch of {IMAGES:,} images takes {medians['none']:.2f} s without and "
        f"{medians['batch']:.2f} s with batch normalization{of_several}; with it {ratio:.2f} times "
        f"as long ({spread}). Weights and statistics take "
        f"{kib['batch']['weights']:.1f} in place of {kib['none']['weights']:.1f} KiB, velocities "
        f"{kib['batch']['velocities']:.1f} in place of {kib['none']['velocities']:.1f}, what a "
        f"batch of 64 keeps for the backward pass {kib['batch']['kept']:.1f} in place of "
        f"{kib['none']['kept']:.1f}. What would change the answer: wide layers, where the matrix "
        "products take all the time; convolutions, whose many positions a normalization has to go "
        "over several times."
    )


def answer_deep():
    lines = "; ".join(
        f"{name}: {percent(deep_nets.values(name, 'train_accuracy'))} in training and "
        f"{percent(deep_nets.values(name, 'val_accuracy'))} in validation"
        + (
            f" (published {100 * figures['train_accuracy'][0]:.1f} and "
            f"{100 * figures['val_accuracy'][0]:.1f} %)"
            if (figures := DEEP_PUBLISHED.get(name))
            else ""
        )
        for name in deep_nets.names
    )
    a, b = "deep, batch norm", "deep, none"
    ranges = "; ".join(
        f"{LABELS[n]} {len(LEARNS[n])} of {len(SCALES)}"
        + (f", from {LEARNS[n][0]:g} to {LEARNS[n][-1]:g}" if LEARNS[n] else "")
        for n in ("batch", "none")
    )
    return (
        f"5. {COUNT[DEEP].capitalize()} layers of 100, {few:,} images (n = {len(more_seeds)}): "
        f"{lines}. Difference {difference(deep_nets, a, b, 'train_accuracy')} in training, "
        f"{difference(deep_nets, a, b, 'val_accuracy')} in validation. "
        f"{COUNT[DEEPER].capitalize()} layers of 50: scales of the initial weights with which the "
        "net comes within nine tenths of the best validation "
        f"accuracy of all: {ranges}. Outputs of a dense layer shrink and grow with its weights; "
        "batch normalization divides that out, up to epsilon. Large weights fail all the same; a "
        "probable reason, not tested: a step of Adam has about the same length whatever their "
        "size, and relative to them it is small. What would change the answer: an initialization "
        "that depends on the width of each layer, such as He's, or rates in proportion to the "
        "weights."
    )


def tests_inside():
    """(kind, metric) -> comparison with the net without normalization, and p by Holm."""
    plain, *others = KINDS
    if len(inside.seeds(plain)) < 2:
        return {}
    metrics = ("mean_smoothness", "mean_loss_range", "mean_shift", "mean_drift", "train_loss")
    tests = {(kind, m): inside.compare(kind, plain, m) for kind in others for m in metrics}
    adjusted = experiments.holm([test.p for test in tests.values()])
    return {key: pair for key, *pair in zip(tests, tests.values(), adjusted, strict=True)}


def answer_why():
    def all_of(metric, digits=2):
        return ", ".join(f"{name} {number(inside, name, metric, digits)}" for name in inside.names)

    tests = tests_inside()
    differences = "; ".join(
        f"{kind}, {INSIDE_LABELS.get(metric, 'training loss')} {test.difference:+.3f} "
        f"({interval(test, p, 1, 3)})"
        for (kind, metric), (test, p) in tests.items()
    )
    return (
        f"6. Means over the looks after the first, of {COUNT[DEEP]} hidden layers "
        f"(n = {len(inside.seeds('none'))}). Smoothness (X3), smaller is smoother: "
        f"{all_of('mean_smoothness')}. Range of the loss along the gradient: "
        f"{all_of('mean_loss_range', 3)}. Internal covariate shift (X5): "
        f"{all_of('mean_shift')}. Drift (X6): {all_of('mean_drift')}. Training loss of the last "
        f"epoch: {all_of('train_loss', 3)}. Against no normalization, p adjusted for their "
        f"number: {differences or 'not tested in this mode'}. {verdict(tests)} What would change "
        "the answer: another rate, deeper nets, images in place of vectors."
    )


def verdict(tests):
    """What the numbers say, by their signs and tests."""
    if not tests:
        return "One seed decides nothing."
    words = {-1: "smaller", 0: "not significantly different", 1: "larger"}

    def sign(kind, metric):
        test, p = tests[kind, metric]
        return int(np.sign(test.difference)) if p < 0.05 else 0

    _, normalized, jittered = KINDS
    spoiled = sign(jittered, "train_loss") < 0 < sign(jittered, "mean_drift")
    no_gain = ""
    if sign(normalized, "train_loss") >= 0:
        no_gain = "So these runs cannot say why it helps, for here it does not. "
        if max(sign(normalized, "mean_shift"), sign(normalized, "mean_smoothness")) < 0:
            no_gain += "A smaller shift and a smaller (X3) are not enough to learn faster. "
    words_of_loss = {-1: "learns better", 0: "learns no better and no worse", 1: "learns worse"}
    return (
        f"With batch normalization the net {words_of_loss[sign(normalized, 'train_loss')]} at this "
        "rate: its training loss is "
        f"{words[sign(normalized, 'train_loss')]}, the internal covariate shift "
        f"{words[sign(normalized, 'mean_shift')]}, (X3) "
        f"{words[sign(normalized, 'mean_smoothness')]}, and the range of the loss along the "
        f"gradient {words[sign(normalized, 'mean_loss_range')]}. The drift of its activations is "
        "near 0 by construction: it is beta alone that moves. "
        + no_gain
        + (
            "With distributions that jump more than those of the net without normalization, the "
            "jittered net still learns faster than that: keeping them in place cannot be the "
            "reason."
            if spoiled
            else "The jittered net, which learns no faster than the one without, does not show "
            "that the distributions are beside the point."
        )
    )


ANSWERS = [
    answer_speed(),
    answer_sizes(),
    answer_rates(),
    answer_cost(),
    answer_deep(),
    answer_why(),
]
arguments.finish(
    ANSWERS,
    mnist,
    cifar,
    seeds=f"{len(seeds)}, {len(more_seeds)} of the deep nets",
    instead_of="MNIST or CIFAR-10",
    best_rate=BEST,
    usable_rates=USABLE,
    memory=MEMORY,
    usable_scales=LEARNS,
)

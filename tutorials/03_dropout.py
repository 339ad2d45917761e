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
# 3. Dropout

**You will learn** what dropout computes, forward and backward, and that the library's layer gives
the same numbers as five lines of NumPy; how much it helps a net that has only 500 images to learn
from, at which keep probability, and whether it still helps with more images; what happens if you
forget to divide by the keep probability; whether narrower layers need a different one; and what
dropout does to the variances that batch normalization relies on, predicted and measured, and
whether that matters.

**You need** lesson 1 for the last part: moving statistics, and how to read the tests.

**Data**: CIFAR-10, 50,000 training and 10,000 test images of 32 x 32 pixels in colour, read from
`--data-dir` alone if it is given, else from `TFDS_DATA_DIR`, then from the default folder of
tensorflow-datasets; if missing, downloaded to the first of these that can be written to (163 MB).
With neither network nor folder: the digits that come with scikit-learn.

**Needs** on two CPU cores: `--fast` less than a minute, the default about five minutes, `--full` an
hour and a quarter alongside other work (ten seeds of the first experiment, five of the others; more
keep probabilities, widths and training-set sizes).

**Expect** from one hidden layer of 500 units on 500 images, after 25 epochs: see the results table
of the README, whose row `--full` recomputes.
"""

# %%
import functools
import itertools
import logging

import matplotlib  # noqa: F401 -- here, and not after all trainings, it is to be found missing

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops

from keras_norm import datasets, experiments, functional, gradient_check, plotting, statistics
from keras_norm.layers import BatchNormalization, Dropout

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

arguments = experiments.tutorial_arguments(
    "Dropout, from the equations to the variance shift.", name="03_dropout"
)
out = arguments.out
print(f"Tutorial 3, mode {arguments.mode}; results go to {out}")

# %% [markdown]
"""
## The equations

In training, every element of x is kept with probability `keep`, independently of the others, and
set to zero otherwise; what is kept is divided by `keep`:

    (D1) rate = 1 - keep                       Keras's argument is the rate
    (D2) mask = u < keep, u uniform in [0, 1)  P(mask) = keep
    (D3) y    = x mask / keep                  mean over masks:     x
                                               variance over masks: x^2 (1 - keep) / keep
    (D4) dx   = dy mask / keep                 the gradient passes where the value has passed

In inference y = x. The division in (D3) makes that right on average: the next layer receives the
mean, over all masks, of what it received in training. Only the mean agrees: the variance differs,
and the section on batch normalization shows what follows from that.

## From scratch
"""


# %%
def forward(x, mask, keep):
    """x (...), mask (...) of booleans -> y (...)."""
    return np.where(mask, x / keep, 0.0)  # (D3)


def backward(dy, mask, keep):
    """dy (...) -> dx (...)."""
    return np.where(mask, dy / keep, 0.0)  # (D4)


# %% [markdown]
"""
A course checks dropout with 250,000 numbers around 10: whatever the keep probability, the mean
stays near 10 in training, and inference changes nothing. (One dropout moves the mean of so many
numbers by about sqrt((101 / keep - 100) / 250,000): .035 for keep .25.)
"""

# %%
rng = np.random.RandomState(231)
x = rng.randn(500, 500) + 10
CHECK = {}
print("keep  mean of x  in training  in inference  fraction zero in training, in inference")
for keep in (0.25, 0.4, 0.7):
    mask = rng.rand(*x.shape) < keep  # (D2)
    y = forward(x, mask, keep)
    layer = Dropout(1 - keep, seed=231, dtype="float64")
    inference = ops.convert_to_numpy(layer(x, training=False))
    CHECK[f"{keep:g}"] = {"training_mean": y.mean(), "fraction_zero": (y == 0).mean()}
    print(
        f"{keep:<4g}  {x.mean():.6f}  {y.mean():11.6f}  {inference.mean():12.6f}  "
        f"{(y == 0).mean():.4f} (expected {1 - keep:.2f}), {(inference == 0).mean():.4f}"
    )

# %% [markdown]
"""
## The library's layer gives the same numbers

The layer draws its own masks. Its output shows which elements it kept; with that mask, NumPy must
give the layer's output and the layer's gradient.
"""

# %%
DIFFERENCES = []
for keep in (0.25, 0.4, 0.7):
    layer = Dropout(1 - keep, seed=231, dtype="float64")
    y = ops.convert_to_numpy(layer(x, training=True))
    mask = y != 0
    dy = rng.randn(*x.shape)

    def upstream_times_output(x, mask=mask, keep=keep, dy=dy):
        return ops.sum(functional.dropout(x, mask, 1 - keep) * ops.convert_to_tensor(dy))

    _, (dx,) = gradient_check.gradients(upstream_times_output, [x])
    difference = np.abs(forward(x, mask, keep) - y).max()
    gradient_difference = np.abs(backward(dy, mask, keep) - ops.convert_to_numpy(dx)).max()
    DIFFERENCES += [difference, gradient_difference]
    print(
        f"keep {keep:<4g}: NumPy against the layer: output {difference:.1e}, "
        f"gradient {gradient_difference:.1e}; kept {mask.mean():.4f}"
    )

# %% [markdown]
"""
The gradient is also checked against difference quotients, which know nothing of (D4): a fixed mask,
100 numbers around 10, keep .2. The relative error published for this check is 5.4e-11.
"""

# %%
x_small, dy_small = rng.randn(10, 10) + 10, rng.randn(10, 10)
mask_small = rng.rand(10, 10) < 0.2


def dropped(x):
    return functional.dropout(x, mask_small, 0.8)


layer_report = gradient_check.check(dropped, x_small, upstream=dy_small).require(1e-9)
print(layer_report)

# %% [markdown]
"""
## Gradient check of a whole net, and why the mask must stand still

The net has two hidden layers (15 - 20 - 30 - 10), with dropout after each, and is in float64. Its
loss is a random function: a difference quotient of two evaluations with different masks measures
the change of masks. So `gradient_check.check` starts each evaluation from the same state of Keras's
random numbers. It refuses a function that draws its masks elsewhere, afresh at every call.
"""

# %%
keras.utils.set_random_seed(231)  # with other weights an example may lose all its units to dropout
inputs, classes = rng.randn(2, 15), np.array([3, 7])
GRADIENT_ERRORS = {}
for keep in (1.0, 0.75, 0.5):
    net = keras.Sequential(
        [
            keras.layers.Dense(20, "relu", dtype="float64"),
            Dropout(1 - keep, seed=123, dtype="float64"),
            keras.layers.Dense(30, "relu", dtype="float64"),
            Dropout(1 - keep, seed=124, dtype="float64"),
            keras.layers.Dense(10, dtype="float64"),
        ]
    )
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    net_report = gradient_check.check(
        net,
        inputs,
        loss=functools.partial(cross_entropy, classes),
        samples=arguments.choose(fast=10, default=None, full=None),  # of each weight matrix
    ).require(1e-7)
    GRADIENT_ERRORS[f"{keep:g}"] = net_report.max_relative_norm
    print(f"keep {keep:<4g}: largest relative error {net_report.max_relative_norm:.1e}")


def with_a_fresh_mask(x):
    return functional.dropout(x, rng.rand(10, 10) < 0.2, 0.8)


try:
    gradient_check.check(with_a_fresh_mask, x_small, traced=False)
    REFUSAL = ""
except ValueError as error:
    REFUSAL = str(error).split(". ")[0]
    print(f"A fresh mask at every call: {REFUSAL}.")


# %% [markdown]
"""
## Dropout as a regularizer

The published setting: one hidden layer of 500 ReLU units, 500 training images, pixels 0 to 255
minus the mean image, weights of standard deviation .01, 25 epochs of Adam at 5e-4 in batches of
100; keep 1 (no dropout) and .25. Accuracies are taken after each epoch in inference mode, on the
training images too, because the training accuracy that `fit` reports is measured with dropout on.

One run of one net on one choice of 500 images says little: the choice of 1,000 validation images
alone gives an accuracy of .3 a standard deviation of .014. So every seed draws its own 1,000
validation and 500 training images, and its own initial weights, order and masks. The two nets of a
seed share all but the masks, so their difference can be tested seed by seed.
"""

# %%
EPOCHS = arguments.choose(fast=10, default=25, full=25)
WIDTH = arguments.choose(fast=200, default=500, full=500)
IMAGES, BATCH_SIZE = 500, 100

data = datasets.load_or_digits(
    "cifar10",
    data_dir=arguments.data_dir,
    standardize=None,
    dtype="float16",  # exact for whole numbers up to 2048, and half the memory
    subset=arguments.choose(fast={"train": 8000, "test": 1000}, default=None, full=None),
)
print(data)
pixels = data.train.x.reshape(len(data.train), -1)  # (N, H, W, C) -> (N, D)
pixel_sum = pixels.sum(axis=0, dtype=np.float64)
VALIDATION = 250 if data.fallback else 1000


def draw(seed, images):
    """Training images, validation images, and the mean image of all but the latter."""
    order = np.random.default_rng(seed).permutation(len(pixels))
    held_out, chosen = order[:VALIDATION], order[VALIDATION : VALIDATION + images]
    total = pixel_sum - pixels[held_out].sum(axis=0, dtype=np.float64)
    mean = (total / (len(pixels) - VALIDATION)).astype("float32")

    def centred(x):
        return x.astype("float32") - mean

    train, validation = ((centred(pixels[i]), data.train.y[i]) for i in (chosen, held_out))
    return train, validation, centred


# %% [markdown]
"""
A net is described by its settings: its widths, and the layers that follow each dense layer, in
order. Initial weights get seeds of their own, so that nets with and without dropout start alike.
"""


# %%
class UnscaledDropout(keras.layers.Layer):
    """Dropout without the division by `keep`; inference multiplies by `factor`, at first 1."""

    def __init__(self, keep, **kwargs):
        super().__init__(**kwargs)
        self.keep = keep
        self.seed_generator = keras.random.SeedGenerator()
        self.factor = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, x, training=False):
        if not training:
            return x * self.factor
        mask = functional.dropout_mask(ops.shape(x), 1 - self.keep, self.seed_generator)
        return ops.where(mask, x, 0.0)


def make_model(settings, seed):
    keep, scale = settings["keep"], settings.get("weight_scale")
    layers = {
        "norm": functools.partial(BatchNormalization, momentum=0.9, epsilon=1e-5),
        "relu": keras.layers.ReLU,
        "dropout": functools.partial(Dropout, 1 - keep),
        "unscaled": functools.partial(UnscaledDropout, keep),
    }

    def dense(units, index):
        own = 1000 * seed + index  # a seed for each layer
        normal = keras.initializers.RandomNormal(stddev=scale, seed=own) if scale else None
        initializer = normal or keras.initializers.HeNormal(seed=own)
        return keras.layers.Dense(units, kernel_initializer=initializer)

    net = keras.Sequential([keras.Input((pixels.shape[1],))])
    if not scale:
        net.add(keras.layers.Rescaling(1 / 64))  # the pixels' standard deviation, roughly
    for index, order in enumerate(settings["order"]):
        net.add(dense(settings["width"], index))
        for name in order.split():
            net.add(layers[name]())
    net.add(dense(data.classes, len(settings["order"])))
    net.compile(
        keras.optimizers.Adam(settings["rate"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return net


pool = experiments.ModelPool(make_model)  # compiles each kind of net once, not per seed


def fresh_model(settings, seed):
    """A net as its settings describe it, whatever it is trained on."""
    kind = ("keep", "width", "order", "weight_scale", "rate")
    return pool({key: settings[key] for key in kind}, seed)


def judged(net, x, y, prefix):
    """Loss, accuracy and confidence in inference mode."""
    logits = ops.convert_to_numpy(net(x, training=False))
    metrics = experiments.classification_metrics(logits, y)
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def train(settings, seed, progress):
    """One run, judged on training and validation images."""
    (x, y), validation, centred = draw(seed, settings["images"])
    net = fresh_model(settings, seed)
    history = experiments.train_on_arrays(
        net,
        x,
        y,
        epochs=settings["epochs"],
        batch_size=BATCH_SIZE,
        seed=seed,
        evaluate={"train": (x, y), "val": validation},
        every=settings["every"],
        progress=progress,
    )
    final = judged(net, x, y, "train") | judged(net, *validation, "val")
    if settings.get("test"):
        final |= judged(net, centred(data.test.x.reshape(len(data.test), -1)), data.test.y, "test")
    unscaled = [layer for layer in net.layers if isinstance(layer, UnscaledDropout)]
    if unscaled:
        for layer in unscaled:
            layer.factor.assign(layer.keep)
        final |= judged(net, *validation, "corrected")
    if settings.get("ratios"):
        final |= variance_ratios(net, x)
        statistics.reestimate(net, x, progress=False)
        final |= judged(net, *validation, "reestimated")
    return {"history": history, "final": final}


def setting(keep, images=IMAGES, width=WIDTH, order=("relu dropout",), **others):
    return {
        "keep": keep,
        "images": images,
        "width": width,
        "order": list(order),
        "weight_scale": 0.01,
        "rate": 5e-4,
        "epochs": EPOCHS,
        "every": EPOCHS,
    } | others


context = {"data": data.title, "validation": VALIDATION, "batch_size": BATCH_SIZE}
seeds = arguments.seed_range(fast=2, default=3, full=10)
fewer_seeds = arguments.seed_range(fast=2, default=3, full=5)  # of all but the first experiment
run = functools.partial(
    experiments.run,
    train,
    out=out,
    resume=arguments.resume,
    title="Tutorial 3: dropout",
    context=context,
)

main = run(
    {f"keep {keep:g}": setting(keep, every=EPOCHS // 5, test=True) for keep in (1, 0.25)},
    seeds,
)

# %% [markdown]
"""
The published accuracies are .990 in training and .298 in validation without dropout, and .894 and
.337 with a keep probability of .25; each is from one run, on one choice of images.
"""

# %%
METRICS = ["train_accuracy", "val_accuracy", "test_accuracy", "val_loss"]
PUBLISHED = (
    {}
    if data.fallback
    else {
        "keep 1": {
            "train_accuracy": (0.990, "a single run"),
            "val_accuracy": (0.298, "a single run"),
        },
        "keep 0.25": {
            "train_accuracy": (0.894, "a single run"),
            "val_accuracy": (0.337, "a single run"),
        },
    }
)
LABELS = {
    "train_accuracy": "training accuracy (fraction)",
    "val_accuracy": "validation accuracy (fraction)",
    "ratio": "variance in inference / moving variance",
    "keep": "keep probability",
    "width": "units in the hidden layer",
    "images": "training images",
}
print(main.table(METRICS, published=PUBLISHED))


def compared(results, a, b, metric="val_accuracy"):
    """The paired test as a sentence; with one seed there is none."""
    if len(seeds) < 2:
        return f"{metric} of {a!r} and {b!r}: one seed, no test."
    return str(results.compare(a, b, metric))


for metric in ("val_accuracy", "test_accuracy"):
    print(compared(main, "keep 0.25", "keep 1", metric))
plotting.learning_curves(
    main,
    ["train_accuracy", "val_accuracy"],
    published=PUBLISHED,
    labels=LABELS,
    share_y=False,
    title=f"One hidden layer of {WIDTH}, {IMAGES} images, {data.title}",
    path=out / "learning_curves.png",
)

# %% [markdown]
"""
## Which keep probability?

The same net is trained at other keep probabilities, and each is compared with no dropout, seed by
seed. With several comparisons, one of them may come out at p < .05 by luck; Holm's correction takes
account of their number.
"""

# %%
KEEPS = arguments.choose(fast=[0.5], default=[0.5, 0.1], full=[0.5, 0.1, 0.05])
by_keep = main.select(seeds=fewer_seeds).merge(
    run({f"keep {keep:g}": setting(keep) for keep in KEEPS}, fewer_seeds)
)
ALL_KEEPS = sorted({1, 0.25, *KEEPS}, reverse=True)
KEEP_NAMES = [f"keep {keep:g}" for keep in ALL_KEEPS]
print(by_keep.table(["train_accuracy", "val_accuracy", "val_confidence"], KEEP_NAMES))
if len(fewer_seeds) > 1:
    tests = [by_keep.compare(name, "keep 1", "val_accuracy") for name in KEEP_NAMES[1:]]
    for test, p in zip(tests, experiments.holm([test.p for test in tests]), strict=True):
        tested = test.untested or f"p by Holm {p:.2g}"
        print(f"{test.a:<9} minus keep 1: {test.difference:+.4f}, {tested}, n = {test.n}")
    plotting.paired_differences(
        by_keep,
        "keep 1",
        "val_accuracy",
        KEEP_NAMES,
        labels=LABELS,
        title=f"{WIDTH} units, {IMAGES} images, {data.title}",
        path=out / "keep.png",
    )
BEST_KEEP = max(ALL_KEEPS, key=lambda k: by_keep.values(f"keep {k:g}", "val_accuracy").mean())

# %% [markdown]
"""
## A failure and its cure: not dividing by keep

Leave the division of (D3) out, and the layer above receives keep times as much in training as it
will in inference. What does that do to accuracy, loss and confidence? Confidence is the mean
probability that the net gives its own answer; a net that is right as often as it claims to be has a
confidence equal to its accuracy. The cure is the division or, as in the paper that introduced
dropout (Srivastava and others, 2014), a multiplication by keep in inference, which is tried here on
the very same weights.

This is done twice: in the net from above, with keep .25, and in a net with three hidden layers of
100 units, with keep .5 (He initialization, pixels divided by 64, rate 2e-3), where the factors of
the layers multiply.

Of the two comparisons, only the first is of the same weights: not divided, with and without the
multiplication. Nets that divide are trained differently. A layer above undivided dropout computes
what one above divided dropout would compute with weights keep times as large. So, in effect, its
weights begin keep times as large, and under Adam, whose steps hardly depend on the size of the
gradient, they also move keep times as far.
"""


# %%
def deep(order, **others):
    """Layers of 100 units, He initialization, pixels divided by 64."""
    return setting(0.5, width=100, order=order, weight_scale=None, rate=2e-3, **others)


undivided = run(
    {
        "not divided, 1 layer": setting(0.25, order=("relu unscaled",)),
        "divided, 3 layers": deep(("relu dropout",) * 3),
        "not divided, 3 layers": deep(("relu unscaled",) * 3),
    },
    fewer_seeds,
)


def relabelled(results, name, prefix, new_name):
    """The runs of `name` under a new name, with their `prefix` metrics as validation metrics."""
    return [
        experiments.Run(
            new_name,
            run.settings,
            run.seed,
            final={
                f"val_{key}": run.final[f"{prefix}_{key}"]
                for key in ("accuracy", "loss", "confidence")
            },
        )
        for run in results.select(name)
    ]


division = experiments.Results(
    [
        *relabelled(by_keep, "keep 0.25", "val", "1 layer, divided"),
        *relabelled(undivided, "not divided, 1 layer", "val", "1 layer, not divided"),
        *relabelled(undivided, "not divided, 1 layer", "corrected", "1 layer, × keep afterwards"),
        *relabelled(undivided, "divided, 3 layers", "val", "3 layers, divided"),
        *relabelled(undivided, "not divided, 3 layers", "val", "3 layers, not divided"),
        *relabelled(undivided, "not divided, 3 layers", "corrected", "3 layers, × keep afterwards"),
    ]
)
print(division.table(["val_accuracy", "val_loss", "val_confidence"]))
for layers in ("1 layer", "3 layers"):
    for metric in ("val_accuracy", "val_loss"):
        print(compared(division, f"{layers}, not divided", f"{layers}, × keep afterwards", metric))

# %% [markdown]
"""
## How should keep change with the width of the layer?

Two answers circulate. One is that keep should not change, because dropping a fraction adapts to the
width by itself. The other is that keep should be in inverse proportion to the width, so that keep
times width, the number of units that remain, stays the same (a rule of thumb from Srivastava and
others). So train nets of several widths, each at several keep probabilities, all else equal, and
fit a straight line to log(best keep) over log(width). By the first answer its slope is 0. By the
second it is not -1 here, because keep is at most 1 and only a few values were tried; it is the
slope of

    (R1) keep = min(1, c / width), rounded to the nearest logarithm of a keep that was tried

which depends on c, the units that remain. The interval of the measured slope comes from a
bootstrap: 2,000 times, seeds are drawn anew with replacement, and the best keeps found again. For
which c does the slope of (R1) lie in that interval?
"""

# %%
WIDTHS = arguments.choose(fast=[20, 200], default=[20, 100, 500], full=[20, 50, 100, 500])
WIDTH_KEEPS = arguments.choose(
    fast=[1, 0.25], default=[1, 0.5, 0.25, 0.1], full=[1, 0.5, 0.25, 0.1, 0.05]
)
narrower = run(
    {
        f"width {width}, keep {keep:g}": setting(keep, width=width)
        for width in WIDTHS
        if width != WIDTH
        for keep in WIDTH_KEEPS
    },
    fewer_seeds,
)
by_width = narrower.merge(by_keep.select([f"keep {keep:g}" for keep in WIDTH_KEEPS]))
plotting.heatmap(
    by_width,
    "keep",
    "width",
    "val_accuracy",
    labels=LABELS,
    title=f"{IMAGES} images, {data.title}, n = {len(fewer_seeds)}",
    path=out / "widths.png",
)


def width_name(width, keep):
    return f"keep {keep:g}" if width == WIDTH else f"width {width}, keep {keep:g}"


def slope_of(best):
    """Of log(best keep) in log(width), rounded so that equal keeps give +0."""
    return round(float(np.polyfit(np.log(WIDTHS), np.log(best), 1)[0]), 9) + 0.0


def rule(c):
    """(R1): a keep for each width."""
    wanted = np.minimum(1, c / np.array(WIDTHS))
    away = np.abs(np.log(wanted)[:, None] - np.log(choices))  # (W, K)
    return choices[away.argmin(axis=1)]  # (W, K) -> (W,)


grid = np.array(
    [
        [by_width.values(width_name(width, keep), "val_accuracy") for keep in WIDTH_KEEPS]
        for width in WIDTHS
    ]
)  # (W, K, n)
choices = np.array(WIDTH_KEEPS, dtype=float)  # (K,), from 1 down
best_by_width = choices[grid.mean(axis=2).argmax(axis=1)]  # (W, K, n) -> (W,)
draws = np.random.default_rng(0).integers(0, len(fewer_seeds), (2000, len(fewer_seeds)))
slopes = [slope_of(choices[grid[:, :, d].mean(axis=2).argmax(axis=1)]) for d in draws]
SLOPE, SLOPE_LOW, SLOPE_HIGH = slope_of(best_by_width), *np.quantile(slopes, [0.025, 0.975])
# Where (R1) turns to another keep: from the least keep at the widest layer, below which none was
# tried, to where it is 1 at every width.
turns = np.outer(WIDTHS, np.sqrt(choices[1:] * choices[:-1])).round(6)  # (W, K - 1)
edges = [choices[-1] * WIDTHS[-1], *np.unique(turns[turns > choices[-1] * WIDTHS[-1]])]
RULE = [(low, high, slope_of(rule((low + high) / 2))) for low, high in itertools.pairwise(edges)]

WIDTH_LINES = []
for width, best in zip(WIDTHS, best_by_width, strict=True):
    rivals = [
        f"{keep:g}"
        for keep in WIDTH_KEEPS
        if keep != best
        and len(fewer_seeds) > 1
        and not by_width.compare(width_name(width, keep), width_name(width, best), "val_accuracy").p
        < 0.05
    ]
    no_worse = ", ".join(rivals) or ("none" if len(fewer_seeds) > 1 else "not tested in this mode")
    mean = by_width.values(width_name(width, best), "val_accuracy").mean()
    WIDTH_LINES.append(
        f"width {width}: best keep {best:g} ({100 * mean:.1f} %, {best * width:g} units kept); "
        f"no worse at the 5% level: {no_worse}"
    )
print("\n".join(WIDTH_LINES))
INTERVAL = (
    f"bootstrap interval {SLOPE_LOW:+.2f} to {SLOPE_HIGH:+.2f} (95 %, n = {len(fewer_seeds)} seeds)"
    if len(fewer_seeds) > 1
    else "of one seed, not tested in this mode"
)
print(f"Slope of log(best keep) in log(width): {SLOPE:+.2f}, {INTERVAL}")
for low, high, slope in RULE:
    print(f"(R1) with c from {low:.0f} to {high:.0f} units: {slope:+.2f}")

# %% [markdown]
"""
## With fewer and more images

Dropout is meant to prevent overfitting, and with more images there is less of it. The number of
epochs stays the same, so that every image is seen equally often.
"""

# %%
SIZES = arguments.choose(fast=[250], default=[250, 1000], full=[250, 1000])
SIZES = [size for size in SIZES if size <= len(pixels) - VALIDATION]
SIZE_KEEPS = (1, 0.5, 0.25)
by_size = by_keep.select([f"keep {keep:g}" for keep in SIZE_KEEPS])
for size in SIZES:
    by_size = by_size.merge(
        run(
            {f"{size} images, keep {keep:g}": setting(keep, size) for keep in SIZE_KEEPS},
            fewer_seeds,
        )
    )
print(by_size.table(["train_accuracy", "val_accuracy"], settings=["images", "keep"]))
SIZE_TESTS = {}
for size in sorted([*SIZES, IMAGES]):
    prefix = "" if size == IMAGES else f"{size} images, "
    if len(by_size.seeds(f"{prefix}keep 1")) > 1:
        SIZE_TESTS[size] = by_size.compare(f"{prefix}keep 0.25", f"{prefix}keep 1", "val_accuracy")
        print(SIZE_TESTS[size])
plotting.sweep(
    by_size,
    "images",
    "val_accuracy",
    group="keep",
    labels={**LABELS, "1": "keep 1 (no dropout)", "0.5": "keep 0.5", "0.25": "keep 0.25"},
    title=f"One hidden layer of {WIDTH}, {EPOCHS} epochs, {data.title}",
    path=out / "sizes.png",
)

# %% [markdown]
"""
## Dropout and batch normalization

The net has two layers of 100 units, keep .5 and rate 2e-3, in six variants: neither; dropout alone;
batch normalization alone; both in the usual order (dense, norm, ReLU, dropout); both with dropout
right before the norm (dense, dropout, norm, ReLU); and both, but with dropout only once, above the
last norm.

In inference, batch normalization uses moving averages of the variances that it saw in training,
with dropout on. But in inference dropout is off, and the variance differs; (D3) says by how much.
Right above a dropout, with m and v the mean and variance of a unit in inference:

    (V1) variance in training = (v + m^2) / keep - m^2

With a dense layer of weights w_i between the dropout of inputs h_i and the norm, each input brings
a variance of h_i^2 (1 - keep) / keep of its own, so that

    (V2) variance in training = v + (1 - keep) / keep * sum over i of w_i^2 E[h_i^2]

The ratio measured below is variance in inference / moving variance, as the geometric mean over the
units of a layer; it is 1 if nothing shifts. It is taken on the training images, so that it shows
the effect of the mode alone, and not of other images. Beside it are the predictions of (V1) and
(V2). They use the inputs in inference in place of those in training, which is exact only where no
dropout lies further below.
"""


# %%
def geometric_mean(x):
    return float(np.exp(np.mean(np.log(x))))


def variance_ratios(net, x):
    """Variance met in inference / moving variance of each norm, measured and by (V1), (V2)."""
    layers, found = net.layers, {}
    norms = [layer for layer in layers if isinstance(layer, BatchNormalization)]
    for number, norm in enumerate(norms, start=1):
        below, two_below = layers[layers.index(norm) - 1], layers[layers.index(norm) - 2]
        probe = keras.Model(net.inputs[0], [norm.input, below.input])
        z, h = map(ops.convert_to_numpy, probe(x, training=False))  # (N, C), (N, D)
        mean, variance = z.mean(axis=0), z.var(axis=0)  # (N, C) -> (C,)
        ratio = variance / ops.convert_to_numpy(norm.moving_variance)
        found[f"ratio_{number}"] = geometric_mean(ratio)
        if isinstance(below, Dropout):
            keep = 1 - below.rate
            in_training = (variance + mean**2) / keep - mean**2  # (V1)
            found[f"predicted_{number}"] = geometric_mean(variance / in_training)
        elif isinstance(two_below, Dropout):
            keep, kernel = 1 - two_below.rate, ops.convert_to_numpy(below.kernel)  # (D, C)
            noise = (1 - keep) / keep * (h**2).mean(axis=0) @ kernel**2  # (D,) @ (D, C) -> (C,)
            found[f"predicted_{number}"] = geometric_mean(variance / (variance + noise))  # (V2)
    return found


# %%
ORDERS = {
    "neither": ("relu", "relu"),
    "dropout": ("relu dropout", "relu dropout"),
    "batch norm": ("norm relu", "norm relu"),
    "norm, dropout": ("norm relu dropout", "norm relu dropout"),
    "dropout, norm": ("dropout norm relu", "dropout norm relu"),
    "dropout at the end": ("norm relu", "norm relu dropout"),
}
orders = run(
    {name: deep(order, ratios="norm" in order[0]) for name, order in ORDERS.items()}, fewer_seeds
)
WITH_NORM = [name for name, order in ORDERS.items() if "norm" in order[0]]
print(orders.table(["train_accuracy", "val_accuracy", "val_loss"]))
RATIOS = ["ratio_1", "predicted_1", "ratio_2", "predicted_2"]
print(orders.table(RATIOS, WITH_NORM, digits=3))
ratios = [
    experiments.Run(
        f"{name}: {which} norm", {"layer": i}, run.seed, final={"ratio": run.final[f"ratio_{i}"]}
    )
    for name in WITH_NORM
    for i, which in ((1, "first"), (2, "second"))
    for run in orders.select(name)
]
plotting.bars(
    experiments.Results(ratios),
    "ratio",
    labels=LABELS,
    title=f"Variance shift, keep 0.5, {data.title}",
    path=out / "variance.png",
)

# %% [markdown]
"""
With dropout only above the last norm, the variances stay where they were. Statistics that are
computed anew after training, with dropout off (`statistics.reestimate`), take the shift away too.
Whether a net answers better with the right variances is another question: variances that are too
large shrink its logits, which makes a net that is too sure of itself less so.
"""

# %%
cured = experiments.Results(
    [
        run
        for name in ORDERS
        for run in [
            *relabelled(orders, name, "val", name),
            *(
                relabelled(orders, name, "reestimated", f"{name}, re-estimated")
                if name in WITH_NORM
                else []
            ),
        ]
    ]
)
print(cured.table(["val_accuracy", "val_loss"]))
for name in WITH_NORM:
    for metric in ("val_accuracy", "val_loss"):
        print(compared(cured, f"{name}, re-estimated", name, metric))
for name in list(ORDERS)[1:]:
    print(compared(cured, name, "neither"))
plotting.bars(
    cured,
    "val_accuracy",
    labels=LABELS,
    from_zero=False,
    title=f"Two hidden layers of 100, {IMAGES} images, {data.title}",
    path=out / "orders.png",
)

# %% [markdown]
"""
## What this does not show

These are small dense nets on a few hundred images of CIFAR-10, and they reach an accuracy of about
.3; what dropout does to large or convolutional nets is another question. The number of epochs is
that of the published run: longer training changes the accuracies, and may favour dropout, which
learns more slowly. A seed stands for images, initial weights, order and masks together. The best
keep is one of a handful that were tried, and all variants of a section share one learning rate,
which need not be the best for each.

## Exercises

1. Does dropout help with 500 images, and with more?
2. What happens if the outputs are not divided by keep?
3. A course asks how keep should change when the layers shrink. What do the nets say?
4. Dropout, batch normalization or both, and in which order?

## References

Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, 2014, Dropout: A Simple Way to Prevent
Neural Networks from Overfitting. Li, Chen, Hu and Yang, 2019, Understanding the Disharmony between
Dropout and Batch Normalization by Variance Shift. Ioffe and Szegedy, 2015, Batch Normalization.
Kingma and Ba, 2015, Adam: A Method for Stochastic Optimization.

## Next

Lesson 4, `tutorials/04_layer_and_spatial_norm.py`: layer, group and instance normalization.

## Answers, from the runs above
"""


# %%
def percent(values):
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread} %"


def number(results, name, metric, digits=2):
    values = results.values(name, metric)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def published():
    """How far the published validation accuracies lie from ours."""
    if data.fallback or len(seeds) < 2:
        return ""
    away = []
    for name in ("keep 1", "keep 0.25"):
        ours = main.values(name, "val_accuracy")
        figure = PUBLISHED[name]["val_accuracy"][0]
        away.append(f"{figure:.3f} lies {(figure - ours.mean()) / ours.std(ddof=1):+.1f}")
    return f"The published {' and '.join(away)} standard deviations of single runs from our means. "


def answer_regularizer():
    train_1, train_4, val_1, val_4, test_1, test_4 = (
        percent(main.values(name, f"{part}_accuracy"))
        for part in ("train", "val", "test")
        for name in ("keep 1", "keep 0.25")
    )
    sizes = "; ".join(
        f"{size:,} images {100 * test.difference:+.1f} points "
        f"({test.untested or f'p = {test.p:.2g}'}, n = {test.n})"
        for size, test in SIZE_TESTS.items()
    )
    return (
        f"1. With {IMAGES} images, keep .25 lowers the training accuracy from {train_1} to "
        f"{train_4}; on validation images the nets reach {val_4} with and {val_1} without it, on "
        f"test images {test_4} and {test_1} (n = {len(seeds)}). "
        f"{compared(main, 'keep 0.25', 'keep 1')} {published()}The best of the keep "
        f"probabilities tried was {BEST_KEEP:g}, with "
        f"{percent(by_keep.values(f'keep {BEST_KEEP:g}', 'val_accuracy'))}. "
        "Validation accuracy of keep .25 minus keep 1 over the number of images: "
        f"{sizes or 'not tested in this mode'}. What would change the answer: more epochs, another "
        "width."
    )


def answer_division():
    def three(layers):
        return ", ".join(
            f"{label} {percent(division.values(name, 'val_accuracy'))}, loss "
            f"{number(division, name, 'val_loss')}, confidence "
            f"{number(division, name, 'val_confidence')}"
            for label, name in (
                ("divided", f"{layers}, divided"),
                ("not divided", f"{layers}, not divided"),
                ("not divided but multiplied by keep in inference", f"{layers}, × keep afterwards"),
            )
        )

    return (
        f"2. Validation images, n = {len(fewer_seeds)}; one hidden layer, keep .25: "
        f"{three('1 layer')}. "
        f"Three hidden layers, keep .5: {three('3 layers')}. Without the division the units "
        "above receive 1 / keep times what they were trained on. With one hidden layer that "
        "stretches the logits, all but their bias, so that the answers hardly change "
        f"({compared(division, '1 layer, not divided', '1 layer, × keep afterwards')}) while the "
        "net claims to be far surer than it is. The divided nets are other trainings, and no test "
        "of the division: with three layers they have learned "
        f"{percent(undivided.values('divided, 3 layers', 'train_accuracy'))} of the training "
        "images, those that do not divide "
        f"{percent(undivided.values('not divided, 3 layers', 'train_accuracy'))}. A probable "
        "reason, not tested: without the division the layers above begin with keep times as much, "
        "and under Adam move keep times as far. What would change the answer: large biases, or "
        "layers above that are not positively homogeneous, such as sigmoids; a normalization "
        "above would take the factor out."
    )


def verdict_on_width():
    """Which of the two answers have their slope in the interval."""
    if len(fewer_seeds) < 2:
        return ""
    held = []  # (least c, largest c), neighbours as one
    for low, high, slope in RULE:
        if SLOPE_LOW <= slope <= SLOPE_HIGH:
            start = held.pop()[0] if held and held[-1][1] == low else low
            held.append((start, high))
    units = " and ".join(f"{low:.0f} to {high:.0f}" for low, high in held)
    change = "rises" if SLOPE_HIGH < 0 else "falls" if SLOPE_LOW > 0 else "does not clearly change"
    return (
        f" Slope 0, no change, {'lies' if SLOPE_LOW <= 0 <= SLOPE_HIGH else 'does not lie'} in it. "
        "Of the slopes of keep = min(1, c / width), rounded to the keeps tried, with c from "
        f"{RULE[0][0]:.0f} to {RULE[-1][1]:.0f} units, "
        f"{f'those for {units} lie' if held else 'none lies'} in it. So with narrower layers the "
        f"best keep {change} here."
    )


def answer_width():
    return (
        f"3. {'; '.join(WIDTH_LINES)}. The slope of log(best keep) in log(width) is {SLOPE:+.2f}, "
        f"{INTERVAL}.{verdict_on_width()} What would change the answer: enough epochs for the "
        "narrow nets with much dropout to learn the training images, or so many images that narrow "
        "nets do not overfit at all."
    )


def answer_orders():
    accuracies = ", ".join(
        f"{name} {percent(orders.values(name, 'val_accuracy'))}" for name in ORDERS
    )
    shifts = "; ".join(
        f"{name}: {number(orders, name, 'ratio_1')} in the first and "
        f"{number(orders, name, 'ratio_2')} in the second layer"
        for name in WITH_NORM
    )
    cures = "; ".join(cure(name) for name in WITH_NORM)
    return (
        f"4. Validation accuracy, {IMAGES} images, n = {len(fewer_seeds)}: {accuracies}. "
        f"Variance in inference over moving variance: {shifts}. (V1) says "
        f"{number(orders, 'dropout, norm', 'predicted_1')} for the first layer of 'dropout, norm', "
        f"(V2) {number(orders, 'norm, dropout', 'predicted_2')} for the second of 'norm, "
        "dropout'. So the usual order has the shift as well, from the second norm on; only "
        "dropout above the last norm is free of it. With statistics re-estimated without "
        f"dropout, which takes the shift away: {cures}. What would change the answer: a keep "
        "nearer to 1 brings the ratios of (V1) and (V2) nearer to 1, and more layers multiply "
        "what is left of the shift."
    )


def cure(name):
    """Accuracy and loss with moving and with re-estimated statistics, and the paired tests."""
    after = f"{name}, re-estimated"
    text = (
        f"{name}: accuracy {percent(cured.values(name, 'val_accuracy'))} before, "
        f"{percent(cured.values(after, 'val_accuracy'))} after; loss "
        f"{number(cured, name, 'val_loss', 3)} before, {number(cured, after, 'val_loss', 3)} after"
    )
    if len(fewer_seeds) < 2:
        return text
    tests = [cured.compare(after, name, metric) for metric in ("val_accuracy", "val_loss")]
    p = [test.untested or f"{test.p:.2g}" for test in tests]
    return f"{text} (p = {p[0]} and {p[1]})"


ANSWERS = [answer_regularizer(), answer_division(), answer_width(), answer_orders()]
arguments.finish(
    ANSWERS,
    data,
    seeds=f"{len(seeds)}, {len(fewer_seeds)} in the later sections",
    instead_of="CIFAR-10",
    check=CHECK,
    largest_difference_from_the_layer=max(DIFFERENCES),
    gradient_error_of_dropout=layer_report.max_relative_norm,
    gradient_errors_of_the_net=GRADIENT_ERRORS,
    best_keep_by_width=dict(zip(map(str, WIDTHS), best_by_width, strict=True)),
    slope=[SLOPE, SLOPE_LOW, SLOPE_HIGH],
    slopes_of_the_rule=RULE,
)

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
# 4. Layer normalization, and normalization of images

**You will learn** what layer normalization computes, forward and backward; that batch, layer, group
and instance normalization are one function over different axes; which of them need large batches,
and how large; whether layer normalization fails with few features, in deep nets and under strong
regularization, as a course asks; which preprocessing of data each of them resembles; and what
accuracy a multilayer perceptron with layer normalization and dropout reaches.

**You need** lesson 1 for the equations of batch normalization, and lesson 3 for dropout, which the
best perceptron uses.

**Data**: CIFAR-10, 50,000 training and 10,000 test images of 32 x 32 pixels in colour (163 MB),
read from `--data-dir` alone if it is given, else from `TFDS_DATA_DIR`, then from the default folder
of tensorflow-datasets; if missing, downloaded to the first of these that can be written to. With
neither network nor folder: the digits that come with scikit-learn.

**Needs** on two CPU cores: `--fast` a minute, the default about five minutes, `--full` about three
quarters of an hour (five seeds of everything, and the best perceptron on all images).

**Expect** what part E of RESULTS.md says of five layers of 100 in batches of 5 to 50, and of the
best perceptron; `--full` recomputes its rows.
"""

# %%
import functools
import json
import logging

import matplotlib  # noqa: F401 -- here, and not after all trainings, it is to be found missing

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops

from keras_norm import (
    datasets,
    experiments,
    functional,
    gradient_check,
    models,
    optimizers,
    plotting,
    statistics,
)
from keras_norm.ensembles import EvaluateTogether, train_together
from keras_norm.layers import (
    BatchNormalization,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    SpatialBatchNormalization,
)

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

arguments = experiments.tutorial_arguments(
    "Layer normalization, and normalization of images.", name="04_layer_and_spatial_norm"
)
out = arguments.out
print(f"Tutorial 4, mode {arguments.mode}; results go to {out}")

# %% [markdown]
"""
## The equations

Batch normalization takes the statistics of a feature over the examples of the batch. Layer
normalization takes the statistics of an example over its features, so that no example depends on
another, and training and inference are the same. For one example with features x_1 ... x_D:

    (L1) mean     = sum x / D
    (L2) variance = sum (x - mean)^2 / D
    (L3) inv_std  = 1 / sqrt(variance + epsilon)
    (L4) x_hat    = (x - mean) inv_std
    (L5) y        = gamma x_hat + beta            gamma and beta belong to the features, (D,)

Backward, the sums of (L6) and (L7) run over the examples, and the means of (L9) over the features
of each example:

    (L6) dbeta    = sum dy
    (L7) dgamma   = sum dy x_hat
    (L8) dx_hat   = gamma dy
    (L9) dx       = inv_std (dx_hat - mean(dx_hat) - x_hat mean(dx_hat x_hat))

With images (N, H, W, C) there are more axes to choose from. All of the following are (L1) to (L5),
with the statistics taken over:

    batch norm      N, H, W           for each channel (spatial batch normalization)
    layer norm      H, W, C           for each image
    instance norm   H, W              for each image and channel
    group norm      H, W, C / G       for each image and each of G groups of channels

Group normalization with one group is layer normalization (except that it has one gamma and one beta
per channel); with as many groups as channels it is instance normalization.

## From scratch

So one function serves for all of them:
"""


# %%
def normalize(x, axes, epsilon=1e-5):
    """x -> x_hat and inv_std, with statistics over these axes."""
    mean = x.mean(axis=axes, keepdims=True)  # (L1)
    variance = ((x - mean) ** 2).mean(axis=axes, keepdims=True)  # (L2)
    inv_std = 1 / np.sqrt(variance + epsilon)  # (L3)
    return (x - mean) * inv_std, inv_std  # (L4)


def layer_norm(x, gamma, beta):
    """x (N, D), gamma and beta (D,) -> y (N, D), and what `layer_norm_backward` needs."""
    x_hat, inv_std = normalize(x, axes=1)
    return gamma * x_hat + beta, (x_hat, inv_std, gamma)  # (L5)


def layer_norm_backward(dy, kept):
    """dy (N, D) -> dx (N, D), dgamma (D,), dbeta (D,)."""
    x_hat, inv_std, gamma = kept
    dbeta = dy.sum(axis=0)  # (L6)
    dgamma = (dy * x_hat).sum(axis=0)  # (L7)
    dx_hat = gamma * dy  # (L8)
    along_1 = dx_hat.mean(axis=1, keepdims=True)  # (N, D) -> (N, 1)
    along_x_hat = (dx_hat * x_hat).mean(axis=1, keepdims=True)  # (N, D) -> (N, 1)
    return inv_std * (dx_hat - along_1 - x_hat * along_x_hat), dgamma, dbeta  # (L9)


def group_norm(x, gamma, beta, groups):
    """x (N, H, W, C), gamma and beta (C,) -> y (N, H, W, C)."""
    n, height, width, channels = x.shape
    parts = x.reshape(n, height, width, groups, channels // groups)
    x_hat, _ = normalize(parts, axes=(1, 2, 4))
    return gamma * x_hat.reshape(x.shape) + beta


# %% [markdown]
"""
Two courses (CS231n, CV7062610) publish their results for numbers from a fixed seed. First, layer
normalization of four examples: afterwards each has mean 0 and standard deviation 1, or mean 5 and
standard deviation 3 with gamma 3 and beta 5.
"""

# %%
rng = np.random.RandomState(231)
X, W1, W2 = rng.randn(4, 50), rng.randn(50, 60), rng.randn(60, 3)
a = np.maximum(X @ W1, 0) @ W2  # (4, 3)
PUBLISHED_MEANS = np.array([-59.06673243, -47.60782686, -43.31137368, -26.40991744])
CHECK = {"layer_norm_before": float(np.abs(a.mean(axis=1) - PUBLISHED_MEANS).max())}
print(f"Means before: {a.mean(axis=1)}, published {PUBLISHED_MEANS}")
for scale, offset in ((1.0, 0.0), (3.0, 5.0)):
    y, _ = layer_norm(a, np.full(3, scale), np.full(3, offset))
    CHECK[f"layer_norm_mean_{offset:g}"] = float(np.abs(y.mean(axis=1) - offset).max())
    CHECK[f"layer_norm_std_{scale:g}"] = float(np.abs(y.std(axis=1) - scale).max())
    print(f"gamma {scale:g}, beta {offset:g}: means {y.mean(axis=1)}, std {y.std(axis=1)}")

# %% [markdown]
"""
Then spatial batch normalization of two images with three channels (channels first, as published).
"""

# %%
rng = np.random.RandomState(231)
x = 4 * rng.randn(2, 3, 4, 5) + 10  # (N, C, H, W)
over = (0, 2, 3)
before = np.array([[9.33463814, 8.90909116, 9.11056338], [3.61447857, 3.19347686, 3.5168142]])
CHECK["spatial_before"] = float(np.abs(np.array([x.mean(over), x.std(over)]) - before).max())
x_hat, _ = normalize(x, axes=over)
y = np.array([3, 4, 5])[:, None, None] * x_hat + np.array([6, 7, 8])[:, None, None]  # (C, 1, 1)
CHECK["spatial_mean"] = float(np.abs(y.mean(over) - [6, 7, 8]).max())
CHECK["spatial_std"] = float(np.abs(y.std(over) - [3, 4, 5]).max())
print(f"Before: mean {x.mean(over)}, std {x.std(over)}")
print(f"gamma (3, 4, 5), beta (6, 7, 8): mean {y.mean(over)}, std {y.std(over)}")

# %% [markdown]
"""
## The library's layers give the same numbers

The forward pass is compared with NumPy, and the backward pass, (L6) to (L9), with the library's
gradients. These in turn are compared with difference quotients, which use neither. For the last
check, with x = 5 randn(4, 5) + 12, the published relative errors are 1.4e-9 (dx), 4.5e-12 (dgamma)
and 2.3e-12 (dbeta).
"""

# %%
images = rng.randn(4, 5, 6, 8) * 3 + 2  # (N, H, W, C)
float64 = {"epsilon": 1e-5, "dtype": "float64"}
one, zero = np.ones(8), np.zeros(8)
LAYERS = {
    "LayerNormalization": (
        LayerNormalization(axis=(1, 2, 3), **float64),
        normalize(images, (1, 2, 3))[0],
    ),
    "SpatialBatchNormalization": (
        SpatialBatchNormalization(**float64),
        normalize(images, (0, 1, 2))[0],
    ),
    "InstanceNormalization": (
        InstanceNormalization(**float64),
        normalize(images, (1, 2))[0],
    ),
    "GroupNormalization, 4 groups": (
        GroupNormalization(groups=4, **float64),
        group_norm(images, one, zero, 4),
    ),
    "GroupNormalization, 1 group": (
        GroupNormalization(groups=1, **float64),
        normalize(images, (1, 2, 3))[0],
    ),
    "GroupNormalization, 8 groups": (
        GroupNormalization(groups=8, **float64),
        normalize(images, (1, 2))[0],
    ),
}
DIFFERENCES = {}
for name, (layer, expected) in LAYERS.items():
    y = ops.convert_to_numpy(layer(images, training=True))
    DIFFERENCES[name] = float(np.abs(y - expected).max())
    print(f"{name:<30} NumPy against the layer: {DIFFERENCES[name]:.1e}")

x, gamma, beta = 5 * rng.randn(4, 5) + 12, rng.randn(5), rng.randn(5)
dy = rng.randn(4, 5)


def layer_normalized(x, gamma, beta):
    return functional.layer_normalization(x, gamma, beta, epsilon=1e-5)


def upstream_times_output(x, gamma, beta):
    return ops.sum(layer_normalized(x, gamma, beta) * ops.convert_to_tensor(dy))


by_hand = layer_norm_backward(dy, layer_norm(x, gamma, beta)[1])
_, by_library = gradient_check.gradients(upstream_times_output, [x, gamma, beta])
for name, ours, theirs in zip(("dx", "dgamma", "dbeta"), by_hand, by_library, strict=True):
    DIFFERENCES[name] = float(np.abs(ours - ops.convert_to_numpy(theirs)).max())
    print(f"{name:<30} NumPy against the library: {DIFFERENCES[name]:.1e}")
gradient_report = gradient_check.check(
    layer_normalized, x, gamma, beta, upstream=dy, names=["x", "gamma", "beta"]
).require(1e-9)
print(gradient_report)

# %% [markdown]
"""
## Batch size

This is the experiment of a course (CV7062610, assignment 3): five hidden layers of 100 units,
batches of 5, 10 and 50, and Adam at a rate of 10^-3.5, with batch normalization, with layer
normalization and with none (which `--fast` leaves out). The rest is as in the course's nets of this
depth: 1,000 training images, 10 epochs, initial weights of standard deviation .02, and pixels from
0 to 255 less the mean image. Smaller batches mean more steps per epoch.

Every seed draws its own 1,000 validation images, 1,000 training images, initial weights and order
of the images. The nets of a seed share them (including the initial weights of the dense layers), so
that differences can be tested seed by seed. All seeds of a net are trained at once, in one stacked
net (`ensembles.train_together`), which gives each the weights that it would have if trained alone.
"""

# %%
data = datasets.load_or_digits(
    "cifar10",
    data_dir=arguments.data_dir,
    standardize="pixel",
    subset=arguments.choose(
        fast={"train": 4000, "test": 1000}, default={"train": 20_000, "test": 10_000}, full=None
    ),
)
print(data)
PIXELS = (255 * data.std).astype("float32")  # standardized -> 0 to 255 less the mean image
VALIDATION = 250 if data.fallback else 1000
seeds = arguments.seed_range(fast=1, default=3, full=5)
context = {"data": data.title, "images": len(data.train), "validation": VALIDATION}
run = functools.partial(
    experiments.run,
    out=out,
    resume=arguments.resume,
    title="Tutorial 4: layer and spatial normalization",
    context=context,
)
NORMS = {
    "none": None,
    "batch norm": functools.partial(BatchNormalization, momentum=0.9, epsilon=1e-5),
    "layer norm": functools.partial(LayerNormalization, epsilon=1e-5),
}


def split(seed, count=None):
    """Row numbers of the training images of a seed, the first `count`, and of its validation."""
    order = np.random.default_rng(seed).permutation(len(data.train))
    training, held_out = order[VALIDATION:], order[:VALIDATION]
    return training[:count], held_out


def make_mlp(settings, seed):
    stddev, penalty = settings["stddev"], settings["penalty"]
    keras.utils.set_random_seed(seed)
    return models.MLP(
        [settings["width"]] * settings["depth"],
        NORMS[settings["normalization"]],
        kernel_initializer=keras.initializers.RandomNormal(0, stddev) if stddev else "he_normal",
        kernel_regularizer=keras.regularizers.L2(penalty) if penalty else None,
        input_shape=data.input_shape,
        classes=data.classes,
    )


@functools.lru_cache(maxsize=1)
def trained_together(settings):
    """{metric: (epochs, seeds)} of the nets of all seeds, after each epoch, in inference mode."""
    settings = json.loads(settings)
    training, held_out = zip(*(split(seed, settings["images"]) for seed in seeds), strict=True)
    used = np.unique(np.concatenate(training + held_out))  # the rows that any seed has
    training, held_out = (
        [np.searchsorted(used, rows) for rows in part] for part in (training, held_out)
    )
    scale = PIXELS if settings["stddev"] else np.float32(1)
    y = data.train.y[used]
    judge = EvaluateTogether(y, {"train": training, "val": held_out})
    train_together(
        [make_mlp(settings, seed) for seed in seeds],
        data.train.x[used] * scale,
        y,
        rows=training,
        seeds=seeds,
        optimizer=optimizers.Adam(settings["rate"]),
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        callbacks=[judge],
    )
    return {metric: np.array(values) for metric, values in judge.history.items()}


def train_mlp(settings, seed, progress):
    """The net of one seed, out of those that are trained together."""
    found = trained_together(json.dumps(settings))
    history = {metric: values[:, seeds.index(seed)].tolist() for metric, values in found.items()}
    return {"history": history, "final": {metric: values[-1] for metric, values in history.items()}}


def run_mlps(settings):
    """Setting by setting, all seeds of each: they are trained in one."""
    results = [run(train_mlp, {name: setting}, seeds) for name, setting in settings.items()]
    return results[0].merge(*results[1:])


def setting(normalization, **others):
    """Five layers of 100 on standardized pixels (two in --fast), unless said otherwise."""
    return {
        "normalization": normalization,
        "width": 100,
        "depth": DEPTH,
        "images": IMAGES,
        "batch_size": 50,
        "rate": 1e-3,
        "stddev": None,  # He's initialization
        "penalty": 0.0,
        "epochs": EPOCHS,
    } | others


DEPTH = arguments.choose(fast=2, default=5, full=5)
EPOCHS = arguments.choose(fast=4, default=10, full=10)
FEW_IMAGES = arguments.choose(fast=300, default=1000, full=1000)
IMAGES = arguments.choose(fast=400, default=2000, full=2000)  # of the next section
BATCH_SIZES = arguments.choose(fast=[5, 50], default=[5, 10, 50], full=[5, 10, 50])
COMPARED = list(NORMS)[arguments.choose(fast=1, default=0, full=0) :]  # in --fast without "none"
by_batch = run_mlps(
    {
        f"{name}, batch {size}": setting(
            name, batch_size=size, rate=10**-3.5, stddev=0.02, images=FEW_IMAGES
        )
        for size in BATCH_SIZES
        for name in COMPARED
    }
)
print(by_batch.table(["train_accuracy", "val_accuracy", "val_loss"]))


def difference(tests, name):
    """A tested difference in points, as it reads in a sentence."""
    return tests[name].in_points() if name in tests else "not tested with one seed"


def print_tests(tests):
    for name in tests:
        print(f"  {name}: {difference(tests, name)}, n = {tests[name].n}")


LABELS = {
    "train_accuracy": "training accuracy (fraction)",
    "val_accuracy": "validation accuracy (fraction)",
    "test_accuracy": "test accuracy (fraction)",
    "batch_size": "images in a batch",
    "width": "units in each hidden layer",
    "depth": "hidden layers",
    "penalty": "factor of the squared weights",
}
for size in (BATCH_SIZES[0], BATCH_SIZES[-1]):
    of_size = {f"{name}, batch {size}": name for name in COMPARED}
    plotting.learning_curves(
        by_batch.select(list(of_size)).rename(of_size),
        ["train_accuracy", "val_accuracy"],
        labels=LABELS,
        share_y=False,
        title=f"{DEPTH} layers of 100, batches of {size}, {data.title}",
        path=out / f"curves_{size}.png",
    )
plotting.sweep(
    by_batch,
    "batch_size",
    ["train_accuracy", "val_accuracy"],
    group="normalization",
    labels=LABELS,
    title=f"{DEPTH} layers of 100, {FEW_IMAGES:,} images, {EPOCHS} epochs, {data.title}",
    path=out / "batch_sizes.png",
)
SMALL, LARGE = BATCH_SIZES[0], BATCH_SIZES[-1]
PAIRS = {
    f"{name}, batch {SMALL} minus {LARGE}": (f"{name}, batch {SMALL}", f"{name}, batch {LARGE}")
    for name in COMPARED
} | {
    f"layer minus batch norm, batch {size}": (
        f"layer norm, batch {size}",
        f"batch norm, batch {size}",
    )
    for size in BATCH_SIZES
}
BATCH_TESTS = {
    metric: by_batch.compare_pairs(PAIRS, metric) for metric in ("train_accuracy", "val_accuracy")
}
for metric, tests in BATCH_TESTS.items():
    print(LABELS[metric])
    print_tests(tests)

# %% [markdown]
"""
## When does layer normalization fail?

A course asks which of three things would make it work badly: very deep nets, features of very small
dimension, or a large penalty on the weights. Each is tried here with everything else equal:
standardized pixels, He's initialization, 2,000 images, and 10 epochs of Adam in batches of 50 at a
rate of 1e-3. The penalty is the sum of all squared weights times a factor.

Of the D dimensions of the features, (L1) to (L4) leave D - 2: the mean is gone, and so is the
length. Of two features, all that remains is which is larger. So the first suspect is the width.
"""


# %%
OTHERS = arguments.choose(
    fast=["none"], default=["none", "batch norm"], full=["none", "batch norm"]
)


def study(key, values, **others):
    """Nets with and without normalization over the values of one setting, and the tests."""
    results = run_mlps(
        {
            f"{key} {value:g}, {name}": setting(name, **{key: value}, **others)
            for value in values
            for name in [*OTHERS, "layer norm"]
        }
    )
    print(results.table(["train_accuracy", "val_accuracy"]))
    plotting.sweep(
        results,
        key,
        "val_accuracy",
        group="normalization",
        labels=LABELS,
        title=f"{IMAGES:,} images, {EPOCHS} epochs, {data.title}",
        path=out / f"by_{key}.png",
    )
    tests = results.compare_pairs(
        {
            f"layer norm minus {other}, {key} {value:g}": (
                f"{key} {value:g}, layer norm",
                f"{key} {value:g}, {other}",
            )
            for value in values
            for other in OTHERS
        },
        "val_accuracy",
    )
    print_tests(tests)
    return results, tests


WIDTHS = arguments.choose(fast=[2], default=[2, 4, 16, 64], full=[2, 4, 16, 64])
by_width, WIDTH_TESTS = study("width", WIDTHS, depth=min(3, DEPTH))

# %%
DEPTHS = arguments.choose(fast=[3], default=[2, 5, 20], full=[2, 5, 20])
by_depth, DEPTH_TESTS = study("depth", DEPTHS)

# %%
PENALTIES = arguments.choose(fast=[0.1], default=[1e-4, 1e-2, 1], full=[1e-4, 1e-2, 1])
by_penalty, PENALTY_TESTS = study("penalty", PENALTIES)

# %% [markdown]
"""
## Which preprocessing does each resemble?

Normalization makes a transformation of its input superfluous if the result is the same with and
without it. To test this, transform 100 images (pixels in [0, 1]), normalize both the original and
the transformed images, and measure how far the results lie apart, as ||after - before|| /
||before||, in float64 and with an epsilon of 1e-15. 0 means that the normalization undoes, or
contains, the transformation.
"""

# %%
unit = np.clip(data.unstandardize(data.train.x[:100]), 0, 1)  # (N, H, W, C)
n, height, width, channels = unit.shape
factor_of_pixel = 1 + np.random.default_rng(1).random((height, width, channels))
factor_of_image = 1 + np.random.default_rng(2).random((n, 1, 1, 1))
factor_of_channel = 1 + np.random.default_rng(3).random((n, 1, 1, channels))
whole, row = (1, 2, 3), (2, 3)


def sum_to_one(x, axes):
    total = x.sum(axis=axes, keepdims=True)
    return x / np.where(total > 0, total, 1)


TRANSFORMED = {
    "mean image subtracted": unit - unit.mean(axis=0),
    "each pixel by its own factor": unit * factor_of_pixel,
    "each image brighter by its own constant": unit + factor_of_image,
    "each image by its own factor": unit * factor_of_image,
    "each image scaled to sum 1": sum_to_one(unit, whole),
    "each image's channels by their own factors": unit * factor_of_channel,
    "each row of each image scaled to sum 1": sum_to_one(unit, row),
    "0 or 1 by a threshold of .5": (unit > 0.5).astype("float64"),
}
AXES = {
    "batch norm, each pixel": (0,),
    "batch norm, each channel": (0, 1, 2),
    "layer norm": whole,
    "instance norm": (1, 2),
}
CHANGE = {
    name: {
        norm: float(np.linalg.norm(after - before) / np.linalg.norm(before))
        for norm, axes in AXES.items()
        for before, after in [[normalize(v, axes, 1e-15)[0] for v in (unit, x)]]
    }
    for name, x in TRANSFORMED.items()
}
changes = np.array([list(change.values()) for change in CHANGE.values()])
plotting.matrix(
    changes,
    rows=list(TRANSFORMED),
    columns=list(AXES),
    value="relative change of the normalized images",
    texts={
        (i, j): "0" if value < 1e-6 else f"{value:.2f}" for (i, j), value in np.ndenumerate(changes)
    },
    title=f"What normalization undoes, {data.title}",
    path=out / "preprocessing.png",
)
for name, change in CHANGE.items():
    print(f"{name:<43}" + ", ".join(f"{norm} {v:.1e}" for norm, v in change.items()))

# %% [markdown]
"""
## Images: batch, group and instance normalization

The net has three convolutions of 16, 32 and 64 filters with stride 2, an average over the
positions, and a dense layer. It is trained on 2,000 images for 3 epochs by Adam, whose rate is
proportional to the square root of the batch size (1e-3 in batches of 32). With images, batch
normalization counts every position as an example: two images have 512 of them in the first layer,
but only 32 in the last (on CIFAR-10), and those of one image are alike.

Batch normalization is judged twice: with its moving averages, and with statistics re-estimated from
the 2,000 images. What small batches cost in training shows in both; the harm they do to the moving
averages shows only in the first.

Instance normalization has a handicap here. It sets the mean of each channel of each image to beta,
and the average over the positions at the end would see nothing else of the last layer, were it not
for the ReLU in between.
"""

# %%
IMAGE_NORMS = {
    "none": None,
    "batch norm": functools.partial(SpatialBatchNormalization, momentum=0.9, epsilon=1e-5),
    "group norm": functools.partial(GroupNormalization, groups=8, epsilon=1e-5),
    "instance norm": functools.partial(InstanceNormalization, epsilon=1e-5),
}


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@experiments.ModelPool
def fresh_cnn(settings, seed):
    keras.utils.set_random_seed(seed)
    net = models.CNN(
        (16, 32, 64),
        IMAGE_NORMS[settings["normalization"]],
        downsample="stride",
        input_shape=data.input_shape,
        classes=data.classes,
    )
    net.compile(optimizers.Adam(settings["rate"]), cross_entropy(), jit_compile=False)
    return net


def train_cnn(settings, seed, progress):
    """One convolutional net; with batch norm, judged under re-estimated statistics as well."""
    training, held_out = split(seed, settings["images"])
    x, y = data.train.x[training], data.train.y[training]
    validation = data.train.x[held_out], data.train.y[held_out]
    net = fresh_cnn(settings, seed)
    history = experiments.train_on_arrays(
        net,
        x,
        y,
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        seed=seed,
        evaluate={"train": (x, y), "val": validation},
        every=settings["epochs"],
        progress=progress,
    )
    final = {metric: values[-1] for metric, values in history.items() if metric != "epoch"}
    if settings["normalization"] == "batch norm":
        statistics.reestimate(net, x, progress=False)
        logits = ops.convert_to_numpy(net(validation[0], training=False))
        metrics = experiments.classification_metrics(logits, validation[1])
        final |= {f"reestimated_{key}": metrics[key] for key in ("loss", "accuracy")}
    return {"history": history, "final": final}


IMAGE_BATCHES = arguments.choose(fast=[2], default=[2, 32], full=[2, 32])
if arguments.mode == "fast":
    IMAGE_NORMS = {name: IMAGE_NORMS[name] for name in ("batch norm", "group norm")}
by_image = run(
    train_cnn,
    {
        f"{name}, batch {size}": {
            "normalization": name,
            "batch_size": size,
            "images": arguments.choose(fast=400, default=2000, full=2000),
            "epochs": arguments.choose(fast=1, default=3, full=3),
            "rate": 1e-3 * (size / 32) ** 0.5,
        }
        for size in IMAGE_BATCHES
        for name in IMAGE_NORMS
    },
    seeds,
)
reestimated = experiments.Results(
    [
        experiments.Run(
            f"batch norm, re-estimated, batch {r.setting('batch_size')}",
            {**r.settings, "normalization": "batch norm, re-estimated"},
            r.seed,
            final={f"val_{key}": r.final[f"reestimated_{key}"] for key in ("loss", "accuracy")},
        )
        for r in by_image
        if r.setting("normalization") == "batch norm"
    ]
)
on_images = by_image.merge(reestimated)
print(on_images.table(["train_accuracy", "val_accuracy", "val_loss"]))
plotting.sweep(
    on_images,
    "batch_size",
    "val_accuracy",
    group="normalization",
    labels=LABELS,
    title=f"Three convolutions, {data.title}",
    path=out / "images.png",
)
SMALL_IMAGES, LARGE_IMAGES = IMAGE_BATCHES[0], IMAGE_BATCHES[-1]
ALL_NORMS = [*IMAGE_NORMS, "batch norm, re-estimated"]
IMAGE_TESTS = on_images.compare_pairs(
    {
        f"{name}, batch {SMALL_IMAGES} minus {LARGE_IMAGES}": (
            f"{name}, batch {SMALL_IMAGES}",
            f"{name}, batch {LARGE_IMAGES}",
        )
        for name in ALL_NORMS
        if SMALL_IMAGES < LARGE_IMAGES
    }
    | {
        f"group minus batch norm, batch {size}": (
            f"group norm, batch {size}",
            f"batch norm, batch {size}",
        )
        for size in IMAGE_BATCHES
    },
    "val_accuracy",
)
print_tests(IMAGE_TESTS)

# %% [markdown]
"""
## The best perceptron

The published net has layers of 1024, 512 and 256 units with layer normalization and dropout .5. One
run of 10 epochs gave validation accuracy .527 and test accuracy .514, with 49,000 training, 1,000
validation and 1,000 test images (here the first of the test set). The update rule, its rate and the
schedule are not published. `--full` chooses them by the validation accuracy of one seed that is not
used below, trained on 20,000 images; the shorter modes take Adam, and `--fast` a quarter of the
units.
"""

# %%
WIDE = arguments.choose(fast=(256, 128, 64), default=(1024, 512, 256), full=(1024, 512, 256))
RULES = {
    "Adam, .001 falling to 0": lambda steps: optimizers.Adam(falling(1e-3, steps)),
    "Nesterov, .1 falling to 0": lambda steps: optimizers.SGD(
        falling(0.1, steps), momentum=0.9, nesterov=True
    ),
}


def falling(rate, steps):
    return keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0)


@functools.cache
def compiled_wide(rule, steps):
    options = {"input_shape": data.input_shape, "classes": data.classes}
    net = models.MLP(WIDE, "layer", dropout=0.5, **options)  # of 1024, 512, 256: `models.WideMLP`
    net.compile(RULES[rule](steps), cross_entropy(), metrics=["accuracy"], jit_compile=False)
    models.make_variables(net, data.train.x, data.train.y)  # saves a second trace of the step
    return net


def train_wide(settings, seed, progress):
    """The published net; judged on validation images, and where it says so on test images."""
    training, held_out = split(seed, settings["images"])
    batches = data.train.batches(
        settings["batch_size"], seed=seed, drop_remainder=True, indices=training
    )
    net = compiled_wide(settings["rule"], settings["epochs"] * len(batches))
    models.restart(net, seed)
    history = net.fit(
        batches,
        epochs=settings["epochs"],
        validation_data=(data.train.x[held_out], data.train.y[held_out]),
        validation_batch_size=1000,
        callbacks=[progress.callback()],
        shuffle=False,
        verbose=0,
    ).history
    final = {f"val_{key}": history[f"val_{key}"][-1] for key in ("loss", "accuracy")}
    if settings["test"]:
        for name, count in (("test", 1000), ("test_all", len(data.test))):
            x, y = data.test.x[:count], data.test.y[:count]
            _, final[f"{name}_accuracy"] = net.evaluate(x, y, batch_size=1000, verbose=0)
    return {"history": history, "final": final}


def wide(rule, images, test=False):
    return {
        "rule": rule,
        "images": images,
        "batch_size": 256 if len(data.train) > 10_000 else 64,
        "epochs": arguments.choose(fast=4, default=4, full=10),
        "test": test,
    }


TUNED = list(RULES) if arguments.mode == "full" else ["Adam, .001 falling to 0"]
FEWER = min(20_000, len(data.train) - VALIDATION)
ALL = min(49_000, len(data.train) - VALIDATION)
if len(TUNED) > 1:
    tuning = run(train_wide, {f"tuning: {rule}": wide(rule, FEWER) for rule in TUNED}, [100])
    print(tuning.table("val_accuracy"))
    BEST_RULE = max(TUNED, key=lambda r: tuning.values(f"tuning: {r}", "val_accuracy")[0])
else:
    (BEST_RULE,) = TUNED
PUBLISHED = (
    {}
    if data.fallback or ALL < 49_000
    else {
        "best perceptron": {
            "val_accuracy": (0.527, "CV7062610"),
            "test_accuracy": (0.514, "CV7062610"),
        }
    }
)
best = run(train_wide, {"best perceptron": wide(BEST_RULE, ALL, test=True)}, seeds)
print(f"Chosen rule: {BEST_RULE}")
print(best.table(["val_accuracy", "test_accuracy", "test_all_accuracy"], published=PUBLISHED))
plotting.learning_curves(
    best,
    ["accuracy", "val_accuracy"],
    published=PUBLISHED,
    labels=LABELS | {"accuracy": "training accuracy, with dropout"},
    title=f"{'-'.join(map(str, WIDE))}, layer norm, dropout, {ALL:,} images, {data.title}",
    path=out / "best.png",
)

# %% [markdown]
"""
## A failure and its cure: one example per batch

The mean of one number is that number, and its variance is 0. After dense layers, batch
normalization with one example per batch gives x_hat = 0 and y = beta, whatever comes in: the net
does not see its input. No error is raised. Then, in inference, the moving variance is nearly 0, and
what never got through in training is divided by the square root of epsilon. The cure is a
normalization that does not look at other examples, or batches of two or more. Accumulating
gradients over several batches is no cure: the statistics are still those of one example.
"""

# %%
alone = run_mlps(
    {
        f"{name}, batch 1": setting(
            name,
            batch_size=1,
            rate=10**-3.5,
            images=arguments.choose(fast=100, default=1000, full=1000),
            epochs=arguments.choose(fast=2, default=3, full=3),
        )
        for name in ("batch norm", "layer norm")
    }
)
print(alone.table(["train_accuracy", "train_loss", "val_accuracy", "val_loss"]))

# %% [markdown]
"""
## What this does not show

The nets are small, the images few, and the learning rate of a net does not depend on its
normalization: with rates of their own, two nets that lie close may change places. What is found
about penalties, widths and depths holds for these nets. Layer normalization was made for sequences
and large models, and there are none here. After convolutions, `axis` decides what layer
normalization is: the default normalizes the channels of each position alone, which was not tried. A
seed changes the images, the initial weights and the order together. Small batches make more steps
in an epoch; over an equal number of steps they would look worse.

## Exercises

1. Which normalization needs large batches, and how large? What happens with one example?
2. A course asks when layer normalization does not work well: in very deep nets, with features of
   very small dimension, or under a strong penalty. What do the nets say?
3. Which of these resembles batch normalization, and which layer normalization: scaling each image
   so that its rows sum to 1; scaling each image so that all of it sums to 1; subtracting the mean
   image; setting all pixels to 0 or 1 by a threshold?
4. On images, does batch normalization suffer in batches of 2 while group normalization does not?
5. What accuracy does the best perceptron reach?

## References

Ba, Kiros and Hinton, 2016, Layer Normalization. Wu and He, 2018, Group Normalization. Ulyanov,
Vedaldi and Lempitsky, 2016, Instance Normalization: The Missing Ingredient for Fast Stylization.
Ioffe and Szegedy, 2015, Batch Normalization. Zhang and Sennrich, 2019, Root Mean Square Layer
Normalization (layer normalization without the mean, `RMSNormalization`). Kingma and Ba, 2015, Adam:
A Method for Stochastic Optimization. Srivastava and others, 2014, Dropout.

## Next

Lesson 5, `tutorials/05_statistics.py`: re-estimated and adapted statistics, and corrupted images.

## Answers, from the runs above
"""


# %%
def percent(results, name, metric="val_accuracy"):
    values = 100 * results.values(name, metric)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} %"


def listed(results, pattern, values, names, metric="val_accuracy"):
    """A metric over the values of a setting, normalization by normalization."""
    return "; ".join(
        f"{name} "
        + ", ".join(
            f"{percent(results, pattern.format(value=value, name=name), metric)} at {value:g}"
            for value in values
        )
        for name in names
    )


def answer_batch_size():
    parts = " ".join(
        f"{LABELS[metric].split(' (')[0].capitalize()} by images in a batch: "
        f"{listed(by_batch, '{name}, batch {value}', BATCH_SIZES, COMPARED, metric)}. "
        f"{all_of(tests)}."
        for metric, tests in BATCH_TESTS.items()
    )
    loss = {
        name: f"{alone.values(f'{name}, batch 1', 'train_loss').mean():.3g}, validation accuracy "
        f"{percent(alone, f'{name}, batch 1')}"
        for name in ("batch norm", "layer norm")
    }
    return (
        f"1. n = {len(seeds)}. {parts} With one example per batch, batch normalization lets "
        f"nothing through: its training loss in inference mode ends at {loss['batch norm']} (layer "
        f"norm: {loss['layer norm']}). What would change the answer: another rate for each batch "
        "size, more epochs, or images, where positions count as examples (question 4)."
    )


def all_of(tests):
    """Tested differences, as they read in a sentence."""
    texts = "; ".join(f"{name}: {difference(tests, name)}" for name in tests)
    return f"Tested: {texts}" if texts else "Not tested in this mode"


def verdict(tests, key, values):
    """By Holm's test: where layer norm is worse than the others, and where better."""
    if all(test.untested for test in tests.values()):
        return "not tested in this mode"
    found = []
    for other in OTHERS:
        names = {value: f"layer norm minus {other}, {key} {value:g}" for value in values}
        significant = [
            (v, tests[n]) for v, n in names.items() if n in tests and tests[n].p_adjusted < 0.05
        ]
        for sign, word in ((-1, "worse"), (1, "better")):
            at = ", ".join(
                f"{v:g} ({100 * test.difference:+.1f} points)"
                for v, test in significant
                if sign * test.difference > 0
            )
            if at:
                found.append(f"{word} than {other} at {at}")
    found = found or ["no significant difference"]
    return f"with layer norm, by Holm's test at the 5% level, {'; '.join(found)}"


COUNT = {2: "two", 3: "three", 5: "five"}


def answer_failures():
    studies = (
        (f"Units in each of {COUNT[min(3, DEPTH)]} layers", "width", by_width, WIDTHS, WIDTH_TESTS),
        ("Hidden layers of 100", "depth", by_depth, DEPTHS, DEPTH_TESTS),
        (f"Penalty, {COUNT[DEPTH]} layers of 100", "penalty", by_penalty, PENALTIES, PENALTY_TESTS),
    )
    names = [*OTHERS, "layer norm"]
    lines = " ".join(
        f"{title}: {listed(results, key + ' {value:g}, {name}', values, names)}; "
        f"{verdict(tests, key, values)}."
        for title, key, results, values, tests in studies
    )
    return (
        f"2. Validation accuracy, n = {len(seeds)}. {lines} What would change the answer: a rate "
        "of its own for each net, skip connections in the deep ones, more images in the narrow "
        "ones."
    )


def undone(norm):
    return ", ".join(f"'{name}'" for name, change in CHANGE.items() if change[norm] < 1e-6)


def answer_preprocessing():
    lines = "; ".join(f"{norm}: {undone(norm) or 'none'}" for norm in AXES)
    rows = CHANGE["each row of each image scaled to sum 1"]
    threshold = CHANGE["0 or 1 by a threshold of .5"]
    return (
        f"3. Undone or contained (change below 1e-6): {lines}. So subtracting the mean image "
        "resembles batch normalization of the pixels, and scaling each image to sum 1 layer "
        "normalization, each without the other half of what these do. Scaling row by row is "
        "neither: the statistics would have to be those of a row (change "
        f"{min(rows.values()):.2f} and more). A threshold is no normalization at all, it throws "
        f"away what lies between (change {min(threshold.values()):.2f} and more). What would "
        "change the answer: a large epsilon, which lets the scale of dark images through."
    )


def answer_images():
    return (
        f"4. Validation accuracy by images in a batch, n = {len(seeds)}: "
        f"{listed(on_images, '{name}, batch {value}', IMAGE_BATCHES, ALL_NORMS)}. "
        f"{all_of(IMAGE_TESTS)}. "
        "What would change the answer: smaller images or more stages, which leave fewer positions "
        "to count; other rates; longer training."
    )


def answer_best():
    name = "best perceptron"
    return (
        f"5. With {BEST_RULE}: validation accuracy {percent(best, name)}, test accuracy "
        f"{percent(best, name, 'test_accuracy')} on the first 1,000 test images and "
        f"{percent(best, name, 'test_all_accuracy')} on all {len(data.test):,} (n = {len(seeds)})"
        + ("; published 52.7 and 51.4 %, one run" if PUBLISHED else "")
        + ". What would change the answer: augmented images, more epochs, or convolutions."
    )


ANSWERS = [
    answer_batch_size(),
    answer_failures(),
    answer_preprocessing(),
    answer_images(),
    answer_best(),
]
arguments.finish(
    ANSWERS,
    data,
    seeds=str(len(seeds)),
    instead_of="CIFAR-10",
    check=CHECK,
    differences_from_numpy=DIFFERENCES,
    gradient_error=gradient_report.max_relative_norm,
    change_by_preprocessing=CHANGE,
    best_rule=BEST_RULE,
    p_by_holm={
        name: None if test.untested else test.p_adjusted
        for tests in (
            BATCH_TESTS["val_accuracy"],
            WIDTH_TESTS,
            DEPTH_TESTS,
            PENALTY_TESTS,
            IMAGE_TESTS,
        )
        for name, test in tests.items()
    },
)

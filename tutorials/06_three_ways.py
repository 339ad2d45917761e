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
# 6. Three ways to write a model

**You will learn** to write the same two networks as functions of tensors with a gradient tape (or
what JAX and PyTorch have in its place), as a subclassed `keras.Model`, and as `keras.Sequential`;
that all three compute the same outputs, gradients and trained weights; what accuracy they reach
after one epoch; what each way costs in lines and in seconds; and what each way must take care of
when batch normalization is added: the training flag and the moving statistics.

**You need** lesson 1, and lesson 2 for Nesterov's momentum.

**Data**: CIFAR-10, 50,000 training and 10,000 test images of 32 x 32 pixels in colour (163 MB),
read from `--data-dir` alone if it is given, else from `TFDS_DATA_DIR`, then from the default folder
of tensorflow-datasets; if missing, downloaded to the first of these that can be written to.
`--data-dir` may also be a packed `.npz` file. With neither network nor folder: the digits that come
with scikit-learn.

**Needs** on two CPU cores: `--fast` less than a minute, the default about five minutes, `--full`
about half an hour (five seeds of each net and way, each trained for one epoch on 49,000 images). It
runs on TensorFlow, JAX and PyTorch (`KERAS_BACKEND`); the figures are TensorFlow's. The plots need
Matplotlib, which an environment without TensorFlow may lack (`pip install matplotlib`).

**Expect** after one epoch the accuracies in part E of RESULTS.md, whose rows `--full` recomputes.
"""

# %%
import ast
import functools
import inspect
import logging
import math
import textwrap
import time

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
    models,
    optimizers,
    plotting,
    statistics,
)
from keras_norm.layers import BatchNormalization

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

arguments = experiments.tutorial_arguments(
    "The same two networks, written in three ways.", name="06_three_ways"
)
out = arguments.out
BACKEND = keras.backend.backend()
print(f"Tutorial 6, mode {arguments.mode}, on {BACKEND}; results go to {out}")

# %% [markdown]
"""
## The two networks

    two layers      x -> flatten -> dense 4000 -> ReLU -> dense 10
    ConvNet         x -> conv 5x5x32, padding 2 -> ReLU -> conv 3x3x16, padding 1 -> ReLU
                      -> flatten -> dense 10

Both are trained for one epoch with cross-entropy, in batches of 64. All weights begin by He's rule,
as normal numbers of variance 2 / fan-in, where fan-in is the number of inputs that a unit adds up.
All biases begin at 0.
"""

# %%
data = datasets.load_or_digits(
    "cifar10",
    data_dir=arguments.data_dir,
    standardize="channel",
    subset=arguments.choose(
        fast={"train": 3000, "test": 1000}, default={"train": 11_000, "test": 10_000}, full=None
    ),
)
print(data)
HIDDEN = arguments.choose(fast=400, default=4000, full=4000)
CHANNELS = (32, 16)
BATCH_SIZE = 64
HEIGHT, WIDTH, COLOURS = data.input_shape
PIXELS, POSITIONS = math.prod(data.input_shape), HEIGHT * WIDTH

# %% [markdown]
"""
## First way: tensors

A net is a function from weights and images to logits, and the weights are a list of arrays that we
draw ourselves. Training needs the gradient of the loss with respect to that list. `keras.ops` has
the array functions for all backends.

`moving` is what a net remembers between steps but does not train. These nets remember nothing: the
list stays empty until batch normalization is added.
"""


# %%
def he_normal(rng, *shape):
    fan_in = math.prod(shape[:-1])
    return rng.normal(0, np.sqrt(2 / fan_in), shape).astype("float32")


def zeros(*shape):
    return np.zeros(shape, "float32")


def two_layer_start(rng):
    W1, W2 = he_normal(rng, PIXELS, HIDDEN), he_normal(rng, HIDDEN, data.classes)
    return [W1, zeros(HIDDEN), W2, zeros(data.classes)]


def two_layer(weights, moving, x, training):
    """x (N, H, W, C) -> logits (N, classes)."""
    W1, b1, W2, b2 = weights
    x = ops.reshape(x, (-1, PIXELS))  # (N, H, W, C) -> (N, D)
    hidden = ops.relu(ops.matmul(x, W1) + b1)  # (N, D) -> (N, HIDDEN)
    return ops.matmul(hidden, W2) + b2, moving


def conv_net_start(rng):
    first, second = CHANNELS
    K1, K2 = he_normal(rng, 5, 5, COLOURS, first), he_normal(rng, 3, 3, first, second)
    W3 = he_normal(rng, POSITIONS * second, data.classes)
    return [K1, zeros(first), K2, zeros(second), W3, zeros(data.classes)]


def conv_net(weights, moving, x, training):
    """x (N, H, W, C) -> logits (N, classes)."""
    K1, b1, K2, b2, W3, b3 = weights
    x = ops.relu(conv(x, K1) + b1)  # (N, H, W, C) -> (N, H, W, 32)
    x = ops.relu(conv(x, K2) + b2)  # -> (N, H, W, 16)
    x = ops.reshape(x, (-1, W3.shape[0]))  # -> (N, H W 16)
    return ops.matmul(x, W3) + b3, moving


def conv(x, kernel):
    return ops.conv(x, kernel, padding="same", data_format="channels_last")


def cross_entropy(logits, y):
    return ops.mean(ops.sparse_categorical_crossentropy(y, logits, from_logits=True))


# %% [markdown]
"""
The backends differ in how they take the gradient, and therefore in the step. Each of the three
sections below has the same three functions; only those of the backend in use are defined.

On **TensorFlow**, a `GradientTape` records what is done with variables, and is then played
backwards. `tf.function` compiles the step. Variables are updated in place.
"""

# %%
if BACKEND == "tensorflow":
    import tensorflow as tf

    def tensors(arrays):
        return [tf.Variable(array) for array in arrays]

    def value_and_gradients(loss, weights):
        """loss(weights) -> (number, new moving); gives that and the gradients."""
        with tf.GradientTape() as tape:
            value, moving = loss(weights)
        return value, moving, tape.gradient(value, weights)

    def make_step(net, weights, moving, rate):
        """A function of one batch that moves the weights down the gradient."""

        @tf.function
        def step(x, y):
            def loss(weights):
                logits, new_moving = net(weights, moving, x, training=True)
                return cross_entropy(logits, y), new_moving

            value, new_moving, gradients = value_and_gradients(loss, weights)
            for w, dw in zip(weights, gradients, strict=True):
                w.assign_sub(rate * dw)
            for old, new in zip(moving, new_moving, strict=True):
                old.assign(new)
            return value

        return step


# %% [markdown]
"""
On **JAX**, `value_and_grad` turns a function into one that gives the gradient as well. Arrays do
not change: a step takes the old ones and returns new ones, which may be written over the old ones
(`donate_argnums`).
"""

# %%
if BACKEND == "jax":
    import jax

    def tensors(arrays):
        return [jax.numpy.array(array) for array in arrays]

    def value_and_gradients(loss, weights):
        """loss(weights) -> (number, new moving); gives that and the gradients."""
        (value, moving), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
        return value, moving, gradients

    def make_step(net, weights, moving, rate):
        """A function of one batch that moves the weights down the gradient."""

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def moved(weights, moving, x, y):
            def loss(weights):
                logits, new_moving = net(weights, moving, x, training=True)
                return cross_entropy(logits, y), new_moving

            value, new_moving, gradients = value_and_gradients(loss, weights)
            new = [w - rate * dw for w, dw in zip(weights, gradients, strict=True)]
            return value, new, new_moving

        def step(x, y):
            value, weights[:], moving[:] = moved(list(weights), list(moving), x, y)
            return value

        return step


# %% [markdown]
"""
On **PyTorch**, tensors that require a gradient remember what was done with them. Nothing is
compiled.
"""

# %%
if BACKEND == "torch":
    import torch

    def tensors(arrays):
        return [torch.tensor(array, requires_grad=True) for array in arrays]

    def value_and_gradients(loss, weights):
        """loss(weights) -> (number, new moving); gives that and the gradients."""
        value, moving = loss(weights)
        return value.detach(), moving, torch.autograd.grad(value, weights)

    def make_step(net, weights, moving, rate):
        """A function of one batch that moves the weights down the gradient."""

        def step(x, y):
            def loss(weights):
                logits, new_moving = net(weights, moving, x, training=True)
                return cross_entropy(logits, y), new_moving

            value, new_moving, gradients = value_and_gradients(loss, weights)
            with torch.no_grad():
                for w, dw in zip(weights, gradients, strict=True):
                    w -= rate * dw
                for old, new in zip(moving, new_moving, strict=True):
                    old.copy_(new)
            return value

        return step


# %% [markdown]
"""
The loop over the batches is again the same for all backends:
"""


# %%
def train_tensors(step, batches):
    """The loss of each step."""
    return [
        float(step(ops.convert_to_tensor(x), ops.convert_to_tensor(y)))  # waits for the step
        for x, y in batches
    ]


# %% [markdown]
"""
## Second way: a subclassed model

The layers make their own weights, and the class says how they follow one another. `call` may hold
any code, and Keras trains the model.
"""

# %%
HE = {"kernel_initializer": "he_normal"}


class TwoLayer(keras.Model):
    def __init__(self):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.hidden = keras.layers.Dense(HIDDEN, "relu", **HE)
        self.logits = keras.layers.Dense(data.classes, **HE)

    def call(self, x):
        return self.logits(self.hidden(self.flatten(x)))


class ConvNet(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv1 = keras.layers.Conv2D(CHANNELS[0], 5, padding="same", activation="relu", **HE)
        self.conv2 = keras.layers.Conv2D(CHANNELS[1], 3, padding="same", activation="relu", **HE)
        self.flatten = keras.layers.Flatten()
        self.logits = keras.layers.Dense(data.classes, **HE)

    def call(self, x):
        return self.logits(self.flatten(self.conv2(self.conv1(x))))


def train_keras(model, optimizer, batches, *callbacks):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    model.fit(batches, callbacks=list(callbacks), shuffle=False, verbose=0)


# %% [markdown]
"""
## Third way: Sequential

Where every layer follows the one before, a list is enough. It is trained by the same `train_keras`.
(The nets of `keras_norm.models` are functional models, lists with names; there,
`models.TwoLayerNet()` and `models.ConvNet()` are the two nets of this lesson.)
"""


# %%
def sequential_two_layer():
    return keras.Sequential(
        [
            keras.Input(data.input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(HIDDEN, "relu", **HE),
            keras.layers.Dense(data.classes, **HE),
        ]
    )


def sequential_conv_net():
    return keras.Sequential(
        [
            keras.Input(data.input_shape),
            keras.layers.Conv2D(CHANNELS[0], 5, padding="same", activation="relu", **HE),
            keras.layers.Conv2D(CHANNELS[1], 3, padding="same", activation="relu", **HE),
            keras.layers.Flatten(),
            keras.layers.Dense(data.classes, **HE),
        ]
    )


# %% [markdown]
"""
## The same outputs, the same loss, the same gradients

All ways start from the same weights. `stateless_call` turns a Keras model into a function of
weights and images, and the first way's `value_and_gradients` gives its gradients.
"""

# %%
NETS = {
    "two layers": (two_layer_start, two_layer, TwoLayer, sequential_two_layer),
    "ConvNet": (conv_net_start, conv_net, ConvNet, sequential_conv_net),
}
WAYS = ("tensors", "subclassed", "Sequential")
BY_NAME = {
    "two layers": functools.partial(models.TwoLayerNet, hidden=HIDDEN),
    "ConvNet": models.ConvNet,
}


def start_of(net, seed):
    start, *_ = NETS[net]
    return start(np.random.default_rng(seed))


def keras_model(net, way, seed):
    """A Keras model that begins with the same weights as the tensors do."""
    _, _, subclass, sequential = NETS[net]
    model = subclass() if way == "subclassed" else sequential()
    model(data.train.x[:1])  # a subclassed model learns its shapes by a first call
    model.set_weights(start_of(net, seed))
    return model


def as_function(model):
    """The model as one of the first way's nets."""

    def net(weights, moving, x, training):
        return model.stateless_call(weights, moving, x)  # logits, moving

    return net


def relative_difference(ours, theirs):
    """The largest of the differences, each relative to the largest element of its array."""
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        for a, b in zip(map(to_numpy, ours), map(to_numpy, theirs), strict=True)
    )


def to_numpy(x):
    return ops.convert_to_numpy(x)


few = ops.convert_to_tensor(data.train.x[:BATCH_SIZE])
few_classes = ops.convert_to_tensor(data.train.y[:BATCH_SIZE])
SAME = {}
for net, (_, forward, *_) in NETS.items():
    functions = {"tensors": forward}
    functions |= {way: as_function(keras_model(net, way, 0)) for way in WAYS[1:]}
    by_name = BY_NAME[net](input_shape=data.input_shape, classes=data.classes)
    functions["keras_norm.models"] = as_function(by_name)
    found = {}
    for way, function in functions.items():
        weights = tensors(start_of(net, 0))

        def loss(weights, function=function):
            logits, moving = function(weights, [], few, training=True)
            return cross_entropy(logits, few_classes), (logits, moving)

        value, (logits, _), gradients = value_and_gradients(loss, weights)
        found[way] = [logits.detach() if BACKEND == "torch" else logits], [value], gradients
    for way in list(functions)[1:]:
        SAME[f"{net}, {way}"] = [
            relative_difference(ours, theirs)
            for ours, theirs in zip(found[way], found["tensors"], strict=True)
        ]
        print(
            f"{net}, {way} against tensors: outputs {SAME[f'{net}, {way}'][0]:.1e}, "
            f"loss {SAME[f'{net}, {way}'][1]:.1e}, gradients {SAME[f'{net}, {way}'][2]:.1e}"
        )

# %% [markdown]
"""
Float32 has seven digits. With the same rule, the same start and the same batches, the trained
weights are then the same, too, up to rounding:
"""


# %%
def batches_of(seed, images, offset=0):
    """Batches in an order of the seed, of images that are not among its validation images."""
    rows = np.random.default_rng(seed).permutation(len(data.train))[VALIDATION + offset :][:images]
    return data.train.batches(BATCH_SIZE, shuffle=False, drop_remainder=True, indices=rows)


def validation_of(seed):
    rows = np.random.default_rng(seed).permutation(len(data.train))[:VALIDATION]
    return data.train.x[rows], data.train.y[rows]


VALIDATION = 250 if data.fallback else 1000
ALL = min(49_000, len(data.train) - VALIDATION)
STEPS = arguments.choose(fast=10, default=20, full=20)


def trained_by(net, way, seed, batches, rate):
    """The weights after plain gradient descent over these batches."""
    if way == "tensors":
        weights = tensors(start_of(net, seed))
        train_tensors(make_step(NETS[net][1], weights, [], rate), batches)
        return [to_numpy(w.detach() if BACKEND == "torch" else w) for w in weights]
    model = keras_model(net, way, seed)
    train_keras(model, optimizers.SGD(rate), batches)
    return model.get_weights()


def distance(ours, theirs):
    """||a - b||, over all arrays."""
    pairs = zip(map(to_numpy, ours), map(to_numpy, theirs), strict=True)
    return math.sqrt(sum(float(np.sum((a - b) ** 2)) for a, b in pairs))


TRAINED = {}
for net in NETS:
    batches = batches_of(0, STEPS * BATCH_SIZE)
    weights = {way: trained_by(net, way, 0, batches, 1e-3) for way in WAYS}
    moved = distance(weights["tensors"], start_of(net, 0))
    for way in WAYS[1:]:
        name = f"{net}, {way}"
        TRAINED[name] = distance(weights[way], weights["tensors"]) / moved
        print(
            f"{name} against tensors, {STEPS} steps: the weights lie {TRAINED[name]:.1e} of the "
            f"way apart that they have moved ({moved:.2g})"
        )

# %% [markdown]
"""
## One epoch

The published accuracies, after one epoch on 49,000 images and from one run each, are .43 (two
layers) and .469 (ConvNet) for tensors, .455 and .456 for subclassed models with plain gradient
descent, and .408 and .588 for Sequential with Nesterov's momentum .9 at a rate of .01. The rule
differs from way to way, the net does not: what differs in these figures is the rule, its rate, and
luck. The same rules are used here: plain gradient descent for the first two ways, Nesterov's
momentum for the third.

The rates of plain gradient descent are not stated. `--full` chooses one for each net, since the way
makes no difference, by the validation accuracy of a seed that is not used below: from .003, .01 and
.03 for the two layers, and from .01 and .03 for the ConvNet. It finds .01 and .03. The other modes
do not choose: they take .03 and .003, and `--full` does not try the latter for the ConvNet. Every
seed draws its own 1,000 validation images and the order of the others (765 batches of 64 with
`--full`).
"""

# %%
RATES = {"two layers": [0.003, 0.01, 0.03], "ConvNet": [0.01, 0.03]}
if arguments.mode != "full":
    RATES = {"two layers": [0.03], "ConvNet": [0.003]}
NESTEROV = {"rule": "Nesterov", "rate": 0.001 if data.fallback else 0.01}  # digits are smooth
seeds = arguments.seed_range(fast=1, default=3, full=5)
context = {"data": data.title, "images": len(data.train), "validation": VALIDATION}
run = functools.partial(
    experiments.run,
    out=out,
    resume=arguments.resume,
    title="Tutorial 6: three ways to write a model",
    context=context,
)


def judged(logits_of, seed):
    """Accuracy on the validation images of the seed, the first 1,000 test images, and all."""

    def right(x, y):
        parts = [to_numpy(logits_of(x[i : i + 500])).argmax(-1) for i in range(0, len(x), 500)]
        return np.concatenate(parts) == y

    test = right(data.test.x, data.test.y)
    return {
        "val_accuracy": right(*validation_of(seed)).mean(),
        "test_accuracy": test[:1000].mean(),
        "test_all_accuracy": test.mean(),
    }


def without_gradients(function):
    """PyTorch would remember what is only to be looked at."""
    return torch.no_grad()(function) if BACKEND == "torch" else function


def train(settings, seed, progress):
    """One epoch of one net, written in one way."""
    net, way, rate = settings["net"], settings["way"], settings["rate"]
    batches = batches_of(seed, settings["images"])
    if way == "tensors":
        weights, forward = tensors(start_of(net, seed)), NETS[net][1]
        losses = train_tensors(make_step(forward, weights, [], rate), batches)
        loss = float(np.mean(losses))

        def logits_of(x):
            return forward(weights, [], ops.convert_to_tensor(x), training=False)[0]

    else:
        momentum = {"momentum": 0.9, "nesterov": True} if settings["rule"] == "Nesterov" else {}
        model = keras_model(net, way, seed)
        train_keras(model, optimizers.SGD(rate, **momentum), batches)
        loss = model.history.history["loss"][-1]

        def logits_of(x):
            return model(x, training=False)

    final = judged(without_gradients(logits_of), seed)
    progress.epoch(1, 1, loss=loss, **final)
    return {"final": {"loss": loss, **final}}


def setting(net, way, rate, rule="gradient descent", images=ALL):
    return {"net": net, "way": way, "rule": rule, "rate": rate, "images": images, "epochs": 1}


BEST = {net: rates[0] for net, rates in RATES.items()}
if max(map(len, RATES.values())) > 1:
    tuning = run(
        train,
        {
            f"tuning: {net}, rate {rate:g}": setting(net, "Sequential", rate)
            for net, rates in RATES.items()
            for rate in rates
        },
        [100],
    )
    print(tuning.table("val_accuracy"))
    BEST = {
        net: max(
            rates, key=lambda r: tuning.values(f"tuning: {net}, rate {r:g}", "val_accuracy")[0]
        )
        for net, rates in RATES.items()
    }
print(f"Rates of gradient descent: {BEST}")
epoch = run(
    train,
    {
        f"{net}, {way}": setting(net, way, BEST[net])
        if way != "Sequential"
        else setting(net, way, **NESTEROV)
        for net in NETS
        for way in WAYS
    },
    seeds,
)
PUBLISHED = (
    {}
    if data.fallback or ALL < 49_000
    else {
        f"{net}, {way}": {"val_accuracy": (figure, "CV7062610")}
        for net, figures in (
            ("two layers", (0.43, 0.455, 0.408)),
            ("ConvNet", (0.469, 0.456, 0.588)),
        )
        for way, figure in zip(WAYS, figures, strict=True)
    }
)
METRICS = ["val_accuracy", "test_accuracy", "test_all_accuracy"]
print(epoch.table(METRICS, settings=["rule", "rate"], published=PUBLISHED))
LABELS = {
    "val_accuracy": "validation accuracy (fraction)",
    "seconds_per_epoch": "seconds per epoch",
    "accuracy": "accuracy in inference (fraction)",
}
plotting.bars(
    epoch,
    "val_accuracy",
    published=PUBLISHED,
    labels=LABELS,
    from_zero=False,
    title=f"After one epoch, {data.title}",
    path=out / "accuracy.png",
)
AWAY = {
    net: float(
        np.abs(
            epoch.values(f"{net}, tensors", "test_all_accuracy")
            - epoch.values(f"{net}, subclassed", "test_all_accuracy")
        ).max()
    )
    for net in NETS
}
print(f"Tensors against subclassed, same rule, largest difference of a seed: {AWAY}")

# %% [markdown]
"""
## What each way costs

First, in lines: those of the functions and classes above, counted in this script, without comments,
docstrings and empty lines. The lines of the net and the lines of its training are counted apart;
the latter (with tensors, the step of the backend in use) serve all nets of the same way.
"""


# %%
def lines_of(*things):
    """Lines of functions and classes, without comments, docstrings and empty lines."""
    total = 0
    for thing in things:
        if inspect.isclass(thing):  # a notebook knows the source of the methods alone
            total += 1 + lines_of(*(m for m in vars(thing).values() if inspect.isfunction(m)))
            continue
        source = textwrap.dedent(inspect.getsource(thing))
        code = [line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]
        functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
        documented = [f.body[0] for f in functions if ast.get_docstring(f)]
        total += len(code) - sum(text.end_lineno - text.lineno + 1 for text in documented)
    return total


OF_NET = {
    "two layers, tensors": [he_normal, zeros, two_layer_start, two_layer],
    "two layers, subclassed": [TwoLayer],
    "two layers, Sequential": [sequential_two_layer],
    "ConvNet, tensors": [he_normal, zeros, conv_net_start, conv_net, conv],
    "ConvNet, subclassed": [ConvNet],
    "ConvNet, Sequential": [sequential_conv_net],
}
OF_TRAINING = {
    "tensors": [cross_entropy, tensors, value_and_gradients, make_step, train_tensors],
    "subclassed": [train_keras],
    "Sequential": [train_keras],
}
LINES = {
    name: {"net": lines_of(*things), "training": lines_of(*OF_TRAINING[name.split(", ")[1]])}
    for name, things in OF_NET.items()
}
for name, lines in LINES.items():
    print(f"{name:<24} {lines['net']:>3} lines for the net, {lines['training']:>3} to train it")

# %% [markdown]
"""
Then, in seconds. All are trained by plain gradient descent, in turns (one way after the other, then
all of them again), for a hundred steps each, scaled to an epoch of 49,000 images. What is compiled
in the first steps is not counted. The figure given is the median of the turns.
"""

# %%
TIMED_STEPS = arguments.choose(fast=10, default=50, full=100)
WARM = 5  # steps before the clock counts


class StepTimes(keras.callbacks.Callback):
    """The clock at the beginning of each step, and at the end of the last."""

    def __init__(self):
        super().__init__()
        self.times = []

    def on_train_batch_begin(self, batch, logs=None):
        self.times.append(time.perf_counter())

    def on_train_end(self, logs=None):
        self.times.append(time.perf_counter())


def watched(batches, times):
    """The batches, with the clock at the moment when each is asked for."""
    for batch in batches:
        times.append(time.perf_counter())
        yield batch
    times.append(time.perf_counter())


def time_steps(settings, seed, progress):
    """Seconds per epoch, from the steps after the first ones."""
    net, way = settings["net"], settings["way"]
    batches = batches_of(seed, settings["steps"] * BATCH_SIZE)
    if way == "tensors":
        times, weights = [], tensors(start_of(net, seed))
        train_tensors(make_step(NETS[net][1], weights, [], 0.01), watched(batches, times))
    else:
        watch = StepTimes()
        train_keras(keras_model(net, way, seed), optimizers.SGD(0.01), batches, watch)
        times = watch.times
    per_step = (times[-1] - times[WARM]) / (len(times) - 1 - WARM)
    return {"final": {"seconds_per_epoch": per_step * (49_000 // BATCH_SIZE)}}


turns = range(arguments.choose(fast=1, default=3, full=5))
timed = run(
    time_steps,
    {
        f"time: {net}, {way}": {"net": net, "way": way, "steps": TIMED_STEPS}
        for net in NETS
        for way in WAYS
    },
    turns,
)
SECONDS = {
    f"{net}, {way}": float(np.median(timed.values(f"time: {net}, {way}", "seconds_per_epoch")))
    for net in NETS
    for way in WAYS
}
MACHINE = timed.runs[0].environment.get("summary", "")
for name, seconds in SECONDS.items():
    print(f"{name:<24} {seconds:6.1f} seconds per epoch, median of {len(turns)} turns")
print(MACHINE)
plotting.bars(
    timed.rename({f"time: {name}": name for name in SECONDS}),
    "seconds_per_epoch",
    labels=LABELS,
    title=f"An epoch of 49,000 images by gradient descent, {BACKEND}",
    path=out / "seconds.png",
)

# %% [markdown]
"""
## Batch normalization, in each way

Now a net has two modes and a memory. In training it normalizes by the batch's statistics, and
updates moving averages of them; in inference it uses the averages. Each way has different things to
take care of:

* **Tensors**: all of it. The flag goes into every function that normalizes; the new averages come
  out, and have to be stored; and no gradient may be taken with respect to them.
* **Subclassed**: the flag. The model's own `call` must name it (`training=None`), and hand it on to
  the layers. Then `fit` sets it to True, and `predict` and `evaluate` set it to False. A layer need
  not name it for the layers that it consists of. In a loop of our own we pass `training=True`.
* **Sequential**: nothing.
"""

# %%
MOMENTUM, EPSILON = 0.9, 1e-3
NORM = {"momentum": MOMENTUM, "epsilon": EPSILON}
NO_BIAS = {**HE, "use_bias": False}  # a constant is subtracted again with the mean


def batch_norm(x, gamma, beta, moving, training):
    """y, and the moving mean and variance as they are after this batch."""
    if not training:
        return functional.normalize(x, *moving, gamma, beta, epsilon=EPSILON), moving
    y, *batch = functional.batch_normalization(x, gamma, beta, epsilon=EPSILON)
    pairs = zip(moving, batch, strict=True)
    return y, [MOMENTUM * old + (1 - MOMENTUM) * ops.stop_gradient(new) for old, new in pairs]


def ones(*shape):
    return np.ones(shape, "float32")


def normalized_two_layer_start(rng):
    W1, _, W2, b2 = two_layer_start(rng)
    return [W1, ones(HIDDEN), zeros(HIDDEN), W2, b2], [zeros(HIDDEN), ones(HIDDEN)]


def normalized_two_layer(weights, moving, x, training):
    W1, gamma, beta, W2, b2 = weights
    x = ops.matmul(ops.reshape(x, (-1, PIXELS)), W1)  # (N, H, W, C) -> (N, HIDDEN)
    x, moving = batch_norm(x, gamma, beta, moving, training)
    return ops.matmul(ops.relu(x), W2) + b2, moving


def normalized_conv_net_start(rng):
    (K1, _, K2, _, *dense), (first, second) = conv_net_start(rng), CHANNELS
    weights = [K1, ones(first), zeros(first), K2, ones(second), zeros(second), *dense]
    return weights, [zeros(first), ones(first), zeros(second), ones(second)]


def normalized_conv_net(weights, moving, x, training):
    K1, gamma1, beta1, K2, gamma2, beta2, W3, b3 = weights
    x, moving1 = batch_norm(conv(x, K1), gamma1, beta1, moving[:2], training)
    x, moving2 = batch_norm(conv(ops.relu(x), K2), gamma2, beta2, moving[2:], training)
    x = ops.reshape(ops.relu(x), (-1, W3.shape[0]))  # (N, H, W, 16) -> (N, H W 16)
    return ops.matmul(x, W3) + b3, [*moving1, *moving2]


class NormalizedTwoLayer(keras.Model):
    def __init__(self):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.hidden = keras.layers.Dense(HIDDEN, **NO_BIAS)
        self.norm = BatchNormalization(**NORM)
        self.logits = keras.layers.Dense(data.classes, **HE)

    def call(self, x, training=None):
        x = self.norm(self.hidden(self.flatten(x)), training=training)
        return self.logits(ops.relu(x))


class NormalizedConvNet(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv1 = keras.layers.Conv2D(CHANNELS[0], 5, padding="same", **NO_BIAS)
        self.norm1 = BatchNormalization(**NORM)
        self.conv2 = keras.layers.Conv2D(CHANNELS[1], 3, padding="same", **NO_BIAS)
        self.norm2 = BatchNormalization(**NORM)
        self.flatten = keras.layers.Flatten()
        self.logits = keras.layers.Dense(data.classes, **HE)

    def call(self, x, training=None):
        x = ops.relu(self.norm1(self.conv1(x), training=training))
        x = ops.relu(self.norm2(self.conv2(x), training=training))
        return self.logits(self.flatten(x))


def normalized_sequential_two_layer():
    return keras.Sequential(
        [
            keras.Input(data.input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(HIDDEN, **NO_BIAS),
            BatchNormalization(**NORM),
            keras.layers.ReLU(),
            keras.layers.Dense(data.classes, **HE),
        ]
    )


def normalized_sequential_conv_net():
    return keras.Sequential(
        [
            keras.Input(data.input_shape),
            keras.layers.Conv2D(CHANNELS[0], 5, padding="same", **NO_BIAS),
            BatchNormalization(**NORM),
            keras.layers.ReLU(),
            keras.layers.Conv2D(CHANNELS[1], 3, padding="same", **NO_BIAS),
            BatchNormalization(**NORM),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(data.classes, **HE),
        ]
    )


NORMALIZED = {
    "two layers": (
        normalized_two_layer_start,
        normalized_two_layer,
        NormalizedTwoLayer,
        normalized_sequential_two_layer,
    ),
    "ConvNet": (
        normalized_conv_net_start,
        normalized_conv_net,
        NormalizedConvNet,
        normalized_sequential_conv_net,
    ),
}

# %% [markdown]
"""
The check once more: after the same steps, the weights are the same, and so are the moving
statistics.
"""


# %%
def normalized_tensors(net, seed, batches, rate):
    """Weights and moving statistics after these batches."""
    weights, moving = NORMALIZED[net][0](np.random.default_rng(seed))
    weights, moving = tensors(weights), not_trained(moving)
    train_tensors(make_step(NORMALIZED[net][1], weights, moving, rate), batches)
    return weights, moving


def not_trained(arrays):
    """Tensors that a step may change, and no gradient is taken of."""
    return [w.detach() if BACKEND == "torch" else w for w in tensors(arrays)]


def normalized_model(net, way, seed):
    start, _, subclass, sequential = NORMALIZED[net]
    model = subclass() if way == "subclassed" else sequential()
    model(data.train.x[:1])
    for variables, values in zip(
        (model.trainable_weights, model.non_trainable_weights),
        start(np.random.default_rng(seed)),
        strict=True,
    ):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    return model


for net in NORMALIZED:
    batches = batches_of(0, STEPS * BATCH_SIZE)
    weights, moving = normalized_tensors(net, 0, batches, 1e-3)
    weights = [w.detach() if BACKEND == "torch" else w for w in weights]
    start, moving_start = NORMALIZED[net][0](np.random.default_rng(0))
    for way in WAYS[1:]:
        model = normalized_model(net, way, 0)
        train_keras(model, optimizers.SGD(1e-3), batches)
        name = f"{net} with batch norm, {way}"
        for part, ours, theirs, before in (
            ("weights", model.trainable_weights, weights, start),
            ("moving statistics", model.non_trainable_weights, moving, moving_start),
        ):
            apart = distance(ours, theirs) / distance(theirs, before)
            TRAINED[f"{name}, {part}"] = apart
            print(f"{name} against tensors, {STEPS} steps: {part} lie {apart:.1e} of the way apart")

# %% [markdown]
"""
## Three failures and their cures

**The update forgotten.** With tensors, a step that leaves out `old.assign(new)` trains as well as
before, because training uses the batch's own statistics. But inference then uses the initial mean 0
and variance 1, which are not those of the units.

**The flag forgotten.** Inference with `training=True` uses the statistics of the images that happen
to be in the same batch. With a thousand of them nobody notices; with few, an answer depends on its
neighbours; and with one, a normalization after a dense layer gives nothing but beta.

**The flag not named.** If the `call` of a subclassed model does not name the flag, `fit` has no way
to set it, and the model is in inference mode all the time.

The first two are tried with the weights of the same training, so that nothing else differs.
"""

# %%
NORMALIZED_IMAGES = min(10_000, ALL)
ALONE = 200  # images that are asked about in batches of one


def train_normalized(settings, seed, progress):
    """The net with batch normalization as tensors; judged in the right way and in wrong ones."""
    net = settings["net"]
    weights, moving = normalized_tensors(
        net, seed, batches_of(seed, settings["images"]), settings["rate"]
    )
    forward = NORMALIZED[net][1]
    untouched = not_trained(NORMALIZED[net][0](np.random.default_rng(seed))[1])
    x, y = data.test.x, data.test.y

    def accuracy(statistics, training, size, images=None):
        images = images or len(x)
        size = min(size, images)
        images -= images % size  # all batches are of this size

        @without_gradients
        def answers(start):
            batch = ops.convert_to_tensor(x[start : start + size])
            logits, _ = forward(weights, statistics, batch, training=training)
            return to_numpy(logits).argmax(-1)

        parts = [answers(start) for start in range(0, images, size)]
        return float(np.mean(np.concatenate(parts) == y[:images]))

    final = {
        "right": accuracy(moving, False, 500),
        "update_forgotten": accuracy(untouched, False, 500),
        "flag_forgotten_500": accuracy(moving, True, 500),
        "flag_forgotten_10": accuracy(moving, True, 10, min(2000, len(x))),
        "flag_forgotten_1": accuracy(moving, True, 1, min(ALONE, len(x))),
    }
    return {"final": final}


normalized = run(
    train_normalized,
    {
        f"{net} with batch norm": {
            "net": net,
            "rate": BEST[net],
            "images": NORMALIZED_IMAGES,
            "momentum": MOMENTUM,
        }
        for net in NORMALIZED
    },
    seeds,
)
SHOWN = {
    "right": "moving statistics",
    "update_forgotten": "update forgotten",
    "flag_forgotten_500": "flag forgotten, 500 together",
    "flag_forgotten_10": "flag forgotten, 10 together",
    "flag_forgotten_1": "flag forgotten, one at a time",
}
failures = experiments.Results(
    [
        experiments.Run(
            f"{r.setting('net')}: {text}",
            {"net": r.setting("net"), "shown": text},
            r.seed,
            final={"accuracy": r.final[metric]},
        )
        for net in NORMALIZED
        for metric, text in SHOWN.items()
        for r in normalized.select(f"{net} with batch norm")
    ]
)
print(failures.table("accuracy"))
FAILURE_TESTS = {
    net: failures.compare(f"{net}: update forgotten", f"{net}: moving statistics", "accuracy")
    for net in NORMALIZED
    if len(seeds) > 1
}
for test in FAILURE_TESTS.values():
    print(test)
plotting.bars(
    failures,
    "accuracy",
    labels=LABELS,
    from_zero=True,
    title=f"Batch normalization, {NORMALIZED_IMAGES:,} images, one epoch, {data.title}",
    path=out / "failures.png",
)

# %% [markdown]
"""
And in Keras? A *layer* need not name the flag: its normalization gets it from the call around it.
The *model's own* `call` must name it, or `fit` runs the model in inference mode: it normalizes by
the initial 0 and 1, which never change, and only `statistics.diagnose` says so. A `call` that names
the flag should also hand it on: TensorFlow and PyTorch do without that, JAX does not. A loop of our
own that calls the model without `training=True` fails in the same way. Each of these is tried on a
batch of ones, on which a training step moves the moving mean by a tenth.
"""


# %%
class WithoutFlag(keras.Model):
    """Does not name the flag."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNormalization(**NORM)

    def call(self, x):
        return self.norm(x)


class WithFlag(WithoutFlag):
    """The cure: names the flag, and hands it on."""

    def call(self, x, training=None):
        return self.norm(x, training=training)


class FlagKept(WithoutFlag):
    """Names the flag, but does not hand it on."""

    def call(self, x, training=None):
        return self.norm(x)


class LayerWithoutFlag(keras.layers.Layer):
    """Does not name the flag either, but is no model."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNormalization(**NORM)

    def call(self, x):
        return self.norm(x)


ONES = np.ones((BATCH_SIZE, *data.input_shape), "float32")


def moved_by_call(model, **flag):
    """How far a call moves the moving mean of a model with one normalization."""
    model(ONES, **flag)
    return float(np.abs(to_numpy(model.non_trainable_weights[0])).max())


def moved_by_fit(model):
    """How far a step of `fit` moves it."""
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(ONES, ONES, batch_size=BATCH_SIZE, verbose=0)
    return float(np.abs(to_numpy(model.non_trainable_weights[0])).max())


forgetful = WithoutFlag()
FLAG = {
    "training=True": moved_by_call(WithoutFlag(), training=True),
    "no flag": moved_by_call(WithoutFlag()),
    "fit": moved_by_fit(forgetful),
    "fit, flag named": moved_by_fit(WithFlag()),
    "fit, flag named, not handed on": moved_by_fit(FlagKept()),
    "fit, flag not named by a layer": moved_by_fit(
        keras.Sequential([keras.Input(data.input_shape), LayerWithoutFlag()])
    ),
}
print(f"A batch of ones moves the moving mean by: {FLAG}")
found = statistics.diagnose(forgetful, (ONES, ONES))
print(f"Diagnosis: {found.first}. {found.causes[0].evidence}")

# %% [markdown]
"""
## What this does not show

The nets are small, and trained for one epoch; after a dozen epochs the rules would come in another
order. The published accuracies are of single runs, and it is not said whether they are on
validation or test images; here both are given. The seconds are those of one machine and of steps
without augmentation; on a GPU the time between the steps counts for more. The plot of seconds shows
means over the turns, the text medians. The saved runs shared the machine with other work. The lines
are those of this script, in which the first way uses the functions of `keras.ops`.

## Exercises

1. Do the three ways give the same net?
2. What accuracy does each way reach after one epoch, and does the way matter?
3. What does each way cost?
4. What must each way take care of when batch normalization is added, and what happens if it does
   not?

## References

He, Zhang, Ren and Sun, 2015, Delving Deep into Rectifiers (He's rule). Ioffe and Szegedy, 2015,
Batch Normalization. Nesterov, 1983, A Method for Solving the Convex Programming Problem with
Convergence Rate O(1/k^2).

## Next

Lesson 7, `tutorials/07_cifar10_challenge.py`: a fast net for CIFAR-10, idea by idea.

## Answers, from the runs above
"""


# %%
def percent(results, name, metric):
    values = 100 * results.values(name, metric)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} %"


def answer_same():
    outputs, losses, gradients = (max(values) for values in zip(*SAME.values(), strict=True))
    return (
        f"1. Yes, up to the rounding of float32: from the same weights, outputs differ by "
        f"{outputs:.1e}, losses by {losses:.1e}, gradients by {gradients:.1e} (relative, the "
        f"largest over both nets and all ways); after {STEPS} steps of the same rule the "
        f"weights lie {max(v for k, v in TRAINED.items() if 'norm' not in k):.1e} of the way "
        "apart that they have moved. After a whole epoch the "
        "test accuracies of a seed, tensors against subclassed, differ by at most "
        f"{' and '.join(f'{100 * away:.2f} points ({net})' for net, away in AWAY.items())}; from "
        "step to step training multiplies what rounding begins. What would change the answer: "
        "another order of the images, or an initialization that each way draws itself."
    )


def answer_accuracy():
    lines = "; ".join(
        f"{name} {percent(epoch, name, 'val_accuracy')} in validation, "
        f"{percent(epoch, name, 'test_accuracy')} on the first 1,000 test images"
        + (
            f" (published {100 * PUBLISHED[name]['val_accuracy'][0]:g})"
            if name in PUBLISHED
            else ""
        )
        for name in epoch.names
    )
    return (
        f"2. n = {len(seeds)}: {lines}. Plain gradient descent at a rate of "
        f"{' and '.join(f'{rate:g} ({net})' for net, rate in BEST.items())}, Nesterov at "
        f"{NESTEROV['rate']:g}. The "
        "way does not matter, as the first answer says: tensors and subclassed follow the same "
        "rule, and Sequential another one. What would change the answer: more epochs, and rates "
        "that fall."
    )


def answer_cost():
    lines = "; ".join(
        f"{name} {LINES[name]['net']} + {LINES[name]['training']} lines, {seconds:.1f} s"
        for name, seconds in SECONDS.items()
    )
    return (
        f"3. Lines of the net + of its training, and seconds per epoch of 49,000 images by plain "
        f"gradient descent (median of {len(turns)} turns; {MACHINE}): {lines}. What would change "
        "the answer: a step that `fit` does not know (then the training of tensors is written "
        "anyway), another backend, smaller nets (in which the time around a step counts)."
    )


def answer_normalization():
    lines = "; ".join(
        f"{text}: "
        + ", ".join(
            f"{percent(failures, f'{net}: {text}', 'accuracy')} ({net})" for net in NORMALIZED
        )
        for text in SHOWN.values()
    )
    return (
        "4. Tensors: the flag, the statistics that come out of a step, and that they are not "
        "trained. Subclassed: the flag. The model's own `call` must name it and hand it on, or "
        f"`fit` runs the model in inference mode (a step moves the moving mean by {FLAG['fit']:g}, "
        f"with the flag named by {FLAG['fit, flag named']:.2g}); a layer in it need not (by "
        f"{FLAG['fit, flag not named by a layer']:.2g}). Where we write the loop ourselves, we say "
        f"it (a call without it moves the moving mean by {FLAG['no flag']:g}, one with it by "
        f"{FLAG['training=True']:.2g}). "
        f"Sequential: nothing. What if not, test accuracy, n = {len(seeds)}: {lines} ({ALONE} "
        "images one at a time, at most 2,000 by ten). What would change the answer: units whose "
        "mean and variance are near 0 and 1 as it is, for which the update is not missed."
    )


ANSWERS = [answer_same(), answer_accuracy(), answer_cost(), answer_normalization()]
arguments.finish(
    ANSWERS,
    data,
    seeds=str(len(seeds)),
    instead_of="CIFAR-10",
    same_weights=SAME,
    after_steps=TRAINED,
    rates=BEST,
    lines=LINES,
    seconds_per_epoch=SECONDS,
    machine=MACHINE,
    flag=FLAG,
)

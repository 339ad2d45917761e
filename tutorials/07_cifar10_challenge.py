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
# 7. The CIFAR-10 challenge

**You will learn** what makes a small convolutional net learn CIFAR-10 in a few epochs, starting
from the net of a course and adding one idea after the other; what each idea is worth, added to a
bare net and left out of the finished one, tested over seeds; which normalization suits the net, and
what momentum, epsilon, gamma and the rate of beta do to it; what can be gained after training, from
statistics and from several views of an image; and what the best net still gets wrong.

**You need** lesson 1, Nesterov's momentum from lesson 2, layer and group normalization from lesson
4, and from lesson 5 how statistics are re-estimated.

**Data**: CIFAR-10, 50,000 training and 10,000 test images of 32 x 32 pixels in colour (163 MB),
read from `--data-dir` alone if it is given, else from `TFDS_DATA_DIR`, then from the default folder
of tensorflow-datasets; if missing, downloaded to the first of these that can be written to.
`--data-dir` may also be a packed `.npz` file. With neither network nor folder: the digits that come
with scikit-learn.

**Needs** on two CPU cores: `--fast` about a minute (images of 16 x 16); the default a quarter of an
hour, estimated from the times of single nets; `--full` three hours beside other work (nearly forty
nets over three seeds, 6,400 images, six epochs; the best of them once more on all images). Half of
the three hours went to 18 of the 120 trainings, which ran beside most of that other work. An
interrupted run can be resumed where it stopped. The lesson runs on TensorFlow, JAX and PyTorch
(`KERAS_BACKEND`). The plots need Matplotlib, which an environment without TensorFlow may lack
(`pip install matplotlib`).

**Expect** no record: these nets are small and see few images for a short time, so that forty of
them are affordable. Two of the ideas, batch normalization and Muon, are worth more than all the
others together, if the net without normalization is given a start that it can learn from. How much
batch normalization is worth depends on the rates given to the net without it. Most of the other
ideas cannot be told from chance. `keras-norm train --recipe cpu-4min` trains a larger net on all
training images.
"""

# %%
import dataclasses
import functools
import itertools
import logging

import matplotlib  # noqa: F401 -- here, and not after all trainings, it is to be found missing

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops
from sklearn.metrics import confusion_matrix

from keras_norm import datasets, experiments, models, plotting, recipes, statistics
from keras_norm.layers import BatchNormalization, GroupNormalization, LayerNormalization

# Each net has functions of its own compiled, on purpose: TensorFlow warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

arguments = experiments.tutorial_arguments("The CIFAR-10 challenge.", name="07_cifar10_challenge")
out = arguments.out
print(f"Tutorial 7, mode {arguments.mode}, on {keras.backend.backend()}; results go to {out}")

# %% [markdown]
"""
## The ideas

Most of them come from Keller Jordan (2024), *94% on CIFAR-10 in 3.29 Seconds on a Single GPU*.

**Whitening.** Neighbouring pixels and colours say nearly the same, and gradient descent spends its
first epochs on undoing that. Here the first convolution undoes it instead: its filters are
measured, not trained. With x a patch of 2 x 2 pixels, and S = Q L Q^T the covariance of such
patches:

    (W1)  U = (L + epsilon)^(-1/2) Q^T        U S U^T ~ I: its filters are uncorrelated
    (W2)  y = [U x, -U x]                     both signs, of which the activation keeps one

**Identity.** Convolutions begin with some filters that pass their input on; the others begin with
noise.

**Normalization.** Batch normalization is used without gamma: the scale of a convolution is
normalized away, and the activation, GELU, needs no scale of its own. Beta learns 64 times as fast
as the kernels. The moving statistics follow with a momentum of .6, so that they belong to the
current weights.

**Alternating flips.** An image is mirrored in every other epoch, not at random. In two epochs the
net sees it both ways, where random flips would show half of the images the same way twice. All
images are also shifted by up to two pixels.

**Label smoothing.** The target gives .8 to the class, and spreads .2 evenly over all classes.

**Muon.** The gradient of a kernel, taken as a matrix, is made orthogonal before the step, so that
all directions move equally far, even those whose gradient is small.

**Lookahead.** Every five steps the weights w return to a slow average s of themselves. At step t of
T its old value has the weight d, which grows towards the end:

    (K1)  d = .95^5 (t / T)^3
    (K2)  s <- d s + (1 - d) w,    w <- s

**Views.** In inference the net looks at the image x, at its mirror image m(x), and at both of these
shifted by a pixel along a diagonal, s+ and s-:

    (T1)  g(x) = (f(x) + f(m(x))) / 2
    (T2)  y    = g(x) / 2 + (g(s+(x)) + g(s-(x))) / 4

## From scratch, and by the library

Each seed trains on images of its own, drawn from the training images. All nets are judged on the
same images, held out for validation. The test images are kept for the last net of this tutorial.
"""

# %%
data = datasets.load_or_digits(
    "cifar10",
    data_dir=arguments.data_dir,
    standardize="channel",
    validation=5000,
    image_size=arguments.choose(fast=16, default=None, full=None),
    subset=arguments.choose(
        fast={"train": 1000, "validation": 500, "test": 500},
        default={"train": 10_000, "test": 10_000},
        full=None,
    ),
)
print(data)


# %%
def whitening_by_hand(images, size=2, epsilon=5e-4):
    """The filters of (W1) as rows, (size size C, size size C), in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    patches = np.moveaxis(windows, 3, -1)  # (N, H', W', C, 2, 2) -> (N, H', W', 2, 2, C)
    x = patches.reshape(-1, size * size * images.shape[-1]).astype("float64")
    covariance = np.cov(x, rowvar=False, bias=True)
    variances, axes = np.linalg.eigh(covariance)
    return (axes / np.sqrt(variances + epsilon)).T, covariance  # (W1)


some = data.train.x[:500]
by_hand, COVARIANCE = whitening_by_hand(some)
layer = models.WhiteningConv2D()
layer.adapt(some)
kernel = ops.convert_to_numpy(layer.kernel)  # (2, 2, C, 4 C)
U = kernel.reshape(-1, kernel.shape[-1]).T
# A filter and its negative do the same, and so do equal variances in any order: U^T U is unique.
inverse = by_hand.T @ by_hand
DIFFERENCE = {"whitening": float(np.abs(U.T @ U - inverse).max() / np.abs(inverse).max())}
sigma, off_diagonal = np.sqrt(np.diag(COVARIANCE)), 1 - np.eye(len(COVARIANCE))
CORRELATED = float(np.abs(COVARIANCE / np.outer(sigma, sigma) * off_diagonal).max())
WHITENED = float(np.abs(by_hand @ COVARIANCE @ by_hand.T * off_diagonal).max())
print(f"Whitening, NumPy against the layer: {DIFFERENCE['whitening']:.1e} of the largest number")
print(f"Largest correlation in a patch: {CORRELATED:.3f}; covariance of two filters {WHITENED:.1e}")


# %%
def six_views_by_hand(model, x):
    """(T1) and (T2), the model being called six times."""
    height, width = x.shape[1:3]
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")

    def g(x):
        return (f(x) + f(x[:, :, ::-1])) / 2  # (T1)

    def f(x):
        return ops.convert_to_numpy(model(np.ascontiguousarray(x), training=False))

    plus, minus = padded[:, 2:, 2:], padded[:, :height, :width]
    return g(x) / 2 + (g(plus) + g(minus)) / 4  # (T2)


keras.utils.set_random_seed(0)
tiny = models.FastConvNet((4, 4), input_shape=data.input_shape, classes=data.classes)
models.fit_whitening(tiny, some)
views = ops.convert_to_numpy(models.TestTimeAugmentation(tiny)(some[:20]))
DIFFERENCE["views"] = float(np.abs(views - six_views_by_hand(tiny, some[:20])).max())
print(f"Six views, six calls against the library: {DIFFERENCE['views']:.1e}")


# %%
def seen_both_ways(flip, images=10_000):
    """Share of images that two epochs show as they are and mirrored."""
    x = np.zeros((images, 1, 2, 1))
    x[:, :, 0] = 1  # left is 1, right is 0
    augment, all_of_them = datasets.FlipAndShift(0, flip), np.arange(images)
    first, second = (augment.images(x, all_of_them, 0, epoch, 0)[:, 0, 0, 0] for epoch in (0, 1))
    return float(np.mean(first != second))


BOTH_WAYS = {flip: seen_both_ways(flip) for flip in ("none", "random", "alternating")}
print(f"Images seen both ways in two epochs: {BOTH_WAYS}")

# %% [markdown]
"""
## The nets

The **base** has all of the ideas: `FastConvNet` in the widths 16, 32 and 32, twelve million
operations per image of CIFAR-10, trained by `recipes.train`. Every other net differs from it in
what its name says, and has been given no rate of its own. The **course's net** has four
convolutions of 5 x 5 and batch normalization, RMSProp at 1e-4 in batches of 64, no augmentation,
and seven times the operations. For nets with another normalization or none, a quarter of the rates
is tried as well, because the rates of the base were chosen with batch normalization.

A bare net with Nesterov's rule becomes the base by one idea after the other, each step keeping the
ideas before it. The weights of all these nets begin small, with a variance of 1 / (3 fan-in), where
fan-in is the number of inputs that a unit adds up. Batch normalization cancels their scale. Without
it, and without the identity, each layer shrinks its inputs, and nothing is left of an image at the
top: the net does not learn at all. That says nothing about normalization. So the bare net is given
He's start, a variance of 2 / fan-in, and two rates; batch normalization is compared with the better
of the two in validation.
"""

# %%
EPOCHS = arguments.choose(fast=4, default=6, full=6)
IMAGES = arguments.choose(fast=600, default=3000, full=6400)
IMAGES = min(IMAGES, len(data.train) * 9 // 10)
seeds = arguments.seed_range(fast=1, default=3, full=3)

BASE = {
    "recipe": "base",
    "epochs": EPOCHS,
    "images": IMAGES,
    "widths": arguments.choose(fast=[16, 32], default=[16, 32, 32], full=[16, 32, 32]),
    "batch_size": arguments.choose(fast=32, default=128, full=128),
    "normalization": "batch",
    "norm_momentum": 0.6,
    "norm_epsilon": 1e-6,
    "gamma": False,
    "bias_rate": 64.0,
    "whitening": True,
    "identity": True,
    "label_smoothing": 0.2,
    "shift": 2,
    "flip": "alternating",
    "lookahead": True,
    "activation": "gelu",
    "rule": "Muon",
    "rates": 1.0,
    "also": [],
}
RULES = {  # the published schedule rises at first; with Muon the rate falls from the first step on
    "Muon": {"matrix_rate": 0.2, "warmup": 0.0, "start": 1.0, "end": 0.0},
    "Nesterov": {"matrix_rate": None, "warmup": 0.23, "start": 0.2, "end": 0.07},
}
FIELDS = {field.name for field in dataclasses.fields(recipes.Recipe)} - {"normalization"}


def normalization_of(settings):
    epsilon, scale = settings["norm_epsilon"], settings["gamma"]
    batch = {"momentum": settings["norm_momentum"], "epsilon": epsilon, "scale": scale}
    return {
        "batch": functools.partial(BatchNormalization, **batch),
        "keras": functools.partial(keras.layers.BatchNormalization, **batch),
        "layer": functools.partial(LayerNormalization, epsilon=epsilon, scale=scale),
        "group": functools.partial(GroupNormalization, groups=4, epsilon=epsilon, scale=scale),
        "image": functools.partial(GroupNormalization, groups=1, epsilon=epsilon, scale=scale),
        "none": None,
    }[settings["normalization"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeStart(recipes.Recipe):
    """All kernels begin with He's variance, 2 / fan-in: made for nets without normalization."""

    def model(self, *args, **kwargs):
        net = super().model(*args, **kwargs)
        for layer in net.layers:
            if hasattr(layer, "kernel"):
                layer.kernel.assign(keras.initializers.HeNormal()(layer.kernel.shape))
        return net


def recipe_of(settings):
    if settings["recipe"] == "course":
        return dataclasses.replace(
            recipes.RECIPES["course"],
            epochs=settings["epochs"],
            flip="none",
            shift=0,
            lookahead=False,
            reestimate=0,
            views=0,
            dtype_policy="float32",
        )
    rule, factor = RULES[settings["rule"]], settings["rates"]
    recipe = (HeStart if settings.get("start_of_kernels") == "He" else recipes.Recipe)(
        name=settings["recipe"],
        normalization=normalization_of(settings),
        views=0,
        **{name: settings[name] for name in FIELDS & settings.keys()},
        **rule,
    )
    return dataclasses.replace(
        recipe,
        learning_rate=factor * recipe.learning_rate,
        matrix_rate=recipe.matrix_rate and factor * recipe.matrix_rate,
    )


# %% [markdown]
"""
The names are on the left; what they change in the base is on the right.
"""

# %%
NORMALIZATIONS = {
    "keras.layers.BatchNormalization": {"normalization": "keras"},
    "layer norm of each position": {"normalization": "layer"},
    "layer norm of each image": {"normalization": "image"},
    "group norm, 4 groups": {"normalization": "group"},
    "no normalization": {"normalization": "none"},
    "batch norm, a quarter of the rates": {"rates": 0.25},
    "layer norm of each position, a quarter of the rates": {
        "normalization": "layer",
        "rates": 0.25,
    },
    "layer norm of each image, a quarter of the rates": {"normalization": "image", "rates": 0.25},
    "group norm, a quarter of the rates": {"normalization": "group", "rates": 0.25},
    "no normalization, a quarter of the rates": {"normalization": "none", "rates": 0.25},
}
IDEAS = {
    "epsilon 1e-3": {"norm_epsilon": 1e-3},
    "epsilon 0.1": {"norm_epsilon": 0.1},
    "gamma trained": {"gamma": True},
    "rate of beta as of the rest": {"bias_rate": 1.0},
    "no whitening": {"whitening": False},
    "no identity": {"identity": False},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "no label smoothing": {"label_smoothing": 0.0},
    "random flips": {"flip": "random"},
    "no flips": {"flip": "none"},
    "no shift": {"shift": 0},
    "no lookahead": {"lookahead": False},
    "Nesterov": {"rule": "Nesterov"},
    "ReLU": {"activation": "relu"},
}
MOMENTA = {f"momentum {value:g}": {"norm_momentum": value} for value in (0.9, 0.99, 0.999)}
BARE = {
    "bias_rate": 1.0,
    "whitening": False,
    "identity": False,
    "label_smoothing": 0.0,
    "shift": 0,
    "flip": "none",
    "lookahead": False,
    "rule": "Nesterov",
}
HE = "bare, He's start"
BARE_NETS = {  # without normalization
    "bare, no normalization": {},
    HE: {"start_of_kernels": "He"},
    "bare, He's start, a quarter of the rates": {"start_of_kernels": "He", "rates": 0.25},
}
STEPS = {
    "+ batch normalization": BARE | {"normalization": "batch"},
    "+ flips and shifts": {"shift": 2, "flip": "alternating"},
    "+ whitening": {"whitening": True},
    "+ identity": {"identity": True},
    "+ fast beta": {"bias_rate": 64.0},
    "+ label smoothing": {"label_smoothing": 0.2},
}  # and then lookahead, which makes "Nesterov" of above, and Muon, which makes the base
LADDER = ["the course's net", *BARE_NETS, *STEPS, "Nesterov", "base"]
LABELS = {
    "bare, no normalization": "bare, the start made for batch norm",
    "Nesterov": "+ lookahead",
    "base": "+ Muon: the base",
    "val_accuracy": "validation accuracy (fraction)",
    "test_accuracy": "test accuracy (fraction)",
}
COURSE = {
    "recipe": "course",
    "epochs": EPOCHS,
    "images": IMAGES,
    "also": ["first kernel", "re-estimated"],
}
NETS = {"the course's net": COURSE, "base": BASE | {"also": ["six views", "re-estimated"]}}
NETS |= {name: BASE | BARE | {"normalization": "none"} | new for name, new in BARE_NETS.items()}
steps = BASE
for name, change in STEPS.items():
    steps = steps | change
    NETS[name] = steps
NETS |= {name: BASE | change for name, change in (NORMALIZATIONS | IDEAS).items()}
NETS["no whitening"] |= {"also": ["first kernel"]}
NETS |= {name: BASE | change | {"also": ["re-estimated"]} for name, change in MOMENTA.items()}
FEWER = {  # of the shorter modes
    "fast": ["the course's net", "base", "layer norm of each position", "momentum 0.999"],
    "default": [
        *LADDER,
        *("keras.layers.BatchNormalization", "layer norm of each position"),
        *("no normalization", "gamma trained", "rate of beta as of the rest"),
        *("no whitening", "no label smoothing", "random flips", "ReLU", "momentum 0.999"),
    ],
}
NETS = {name: NETS[name] for name in FEWER.get(arguments.mode, NETS)}


def logits_at_the_start(name):
    """Standard deviation of the logits of an untrained net, over images and classes."""
    keras.utils.set_random_seed(0)
    net = recipe_of(NETS[name]).model(data.input_shape, data.classes)
    return float(np.std(ops.convert_to_numpy(net(data.train.x[:500], training=True))))


AT_THE_START = {
    name: logits_at_the_start(name)
    for name in ("bare, no normalization", HE, "+ batch normalization")
    if name in NETS
}
for name, spread in AT_THE_START.items():
    print(
        f"{LABELS.get(name, name)}: logits with a standard deviation of {spread:.2g} at the start"
    )


@functools.cache  # TensorFlow keeps what it has trained on: one copy for all nets
def images_of(seed, count):
    """The data with the training images of a seed; judged by the validation images."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data.train))[:count])
    part = datasets.Split(data.train.x[chosen], data.train.y[chosen])
    return dataclasses.replace(data, train=part)


def accuracy(model, split):
    logits = model.predict(split.x, batch_size=1000, verbose=0)
    return experiments.classification_metrics(logits, split.y)["accuracy"]


def show_in(progress, recipe):
    """What `recipes.train` calls as it goes on."""

    def show(epochs, metrics):
        if metrics:
            progress.epoch(int(epochs), recipe.epochs, **metrics)
        else:
            progress.part(epochs, recipe.epochs)

    return show


def first_kernel(model):
    layer = next(layer for layer in model.layers if hasattr(layer, "kernel"))
    return np.round(ops.convert_to_numpy(layer.kernel), 4)


def train_net(settings, seed, progress):
    """One net, judged on the validation images; with what else its settings ask for."""
    recipe, part, also = recipe_of(settings), images_of(seed, settings["images"]), settings["also"]
    outcome = recipes.train(recipe, part, seed=seed, on_epoch=show_in(progress, recipe))
    model, metrics = outcome.model, outcome.metrics
    final = {
        "val_accuracy": metrics["validation_accuracy"],
        "val_loss": metrics["validation_loss"],
        "two_views": metrics["validation_accuracy_views"],
        "mflop": outcome.costs["flops_forward"] / 1e6,
    }
    if "six views" in also:
        final["six_views"] = accuracy(models.TestTimeAugmentation(model), part.validation)
    if "re-estimated" in also:
        statistics.reestimate(model, part.train.x, samples=2000, seed=seed, progress=False)
        final["reestimated"] = accuracy(model, part.validation)
    kernel = {"first_kernel": first_kernel(model)} if "first kernel" in also else {}
    return {"history": outcome.history, "final": final, **kernel}


run = functools.partial(
    experiments.run,
    out=out,
    resume=arguments.resume,
    title="Tutorial 7: the CIFAR-10 challenge",
    context={
        "data": data.title,
        "input_shape": list(data.input_shape),
        "drawn_from": len(data.train),
        "validation": len(data.validation),
    },
)
nets = run(train_net, NETS, seeds)
print(nets.table(["val_accuracy", "two_views", "mflop"], digits={"mflop": 1}))

# %% [markdown]
"""
## One idea after the other

Each step is tested against the one before, seed by seed, and batch normalization against the better
of the bare nets. With few seeds a test sees only large differences: one that it calls not
significant may still be there.
"""


# %%
def finished(names):
    """Those that were run in this mode, and none of whose runs has diverged."""
    diverged = {r.name for r in nets if r.status == "diverged"}
    return [name for name in names if name in nets.names and name not in diverged]


def difference(tests, name):
    """A tested difference in points, as it reads in a sentence."""
    return f"{name}: {tests[name].in_points() if name in tests else 'not tested here'}"


def print_tests(tests):
    for name in tests:
        print(f"  {difference(tests, name)}, n = {tests[name].n}")


def losses(run):
    return run.history["loss"]


climbed = finished(LADDER)
bare = [name for name in climbed if name in BARE_NETS]
BEST_BARE = max(bare, key=lambda name: nets.values(name, "val_accuracy").mean(), default=None)
rungs = [name for name in climbed[1:] if name not in bare or name == BEST_BARE]
LADDER_TESTS = nets.compare_pairs(
    {LABELS.get(b, b): (b, a) for a, b in itertools.pairwise(rungs)}, "val_accuracy"
)
print_tests(LADDER_TESTS)
LEARNED_NOTHING = {  # how far the training loss ever is from that of equal logits
    name: max(abs(loss - np.log(data.classes)) for r in nets.select(name) for loss in losses(r))
    for name in bare
}
SETTING = f"{IMAGES:,} images, {EPOCHS} epochs, {data.title}"
plotting.bars(
    nets,
    "val_accuracy",
    climbed,
    labels=LABELS,
    from_zero=False,
    title=f"One idea after the other\n{SETTING}",
    path=out / "ladder.png",
)

# %% [markdown]
"""
## Leaving an idea out, or doing it differently

Every net is compared with the base: what is each idea worth when all the others are there already?
First the normalizations, at the rates of the base and at a quarter of them.
"""

# %%
NORM_NAMES, IDEA_NAMES = finished(NORMALIZATIONS), finished(IDEAS)
NORM_TESTS = nets.compare_pairs({name: (name, "base") for name in NORM_NAMES}, "val_accuracy")
IDEA_TESTS = nets.compare_pairs({name: (name, "base") for name in IDEA_NAMES}, "val_accuracy")
print_tests(NORM_TESTS)
QUARTER = ", a quarter of the rates"
AT_FULL_RATE = {"batch norm": "base", "group norm": "group norm, 4 groups"}
RATE_TESTS = nets.compare_pairs(
    {
        f"{name.removesuffix(QUARTER)}, a quarter minus all of the rates": (
            name,
            AT_FULL_RATE.get(name.removesuffix(QUARTER), name.removesuffix(QUARTER)),
        )
        for name in NORM_NAMES
        if name.endswith(QUARTER)
    },
    "val_accuracy",
)
print_tests(RATE_TESTS)
BATCH = {"base": "base: batch normalization", "val_accuracy": LABELS["val_accuracy"]}
plotting.bars(
    nets,
    "val_accuracy",
    ["base", *NORM_NAMES],
    labels=BATCH,
    title=f"Normalizations\n{SETTING}",
    path=out / "normalizations.png",
)

# %% [markdown]
"""
Then all the other ideas.
"""

# %%
if not IDEA_NAMES:
    print("None of them is trained in this mode")
elif IDEA_TESTS:
    print_tests(IDEA_TESTS)
    plotting.paired_differences(
        nets,
        "base",
        "val_accuracy",
        IDEA_NAMES,
        labels={"val_accuracy": LABELS["val_accuracy"]},
        title=f"Difference from the base\n{SETTING}",
        path=out / "ideas.png",
    )
else:
    print(f"n = {len(seeds)}: a difference is tested over at least two seeds")

# %% [markdown]
"""
## A failure and its cure: statistics that lag

The momentum of the moving averages takes no part in training, which normalizes by the statistics of
the batch: every momentum gives the same weights. But in inference the averages take the place of
those statistics. With a momentum of .999, after t steps a share of .999^t of the averages is still
the initial 0 and 1: 74% after 300. Such a momentum is made for trainings of many thousand steps,
and these have a few hundred. The cure is a momentum that fits the length of the training, or
statistics re-estimated at its end (here from 2,000 training images), for which the momentum does
not matter.

A common momentum can lag, too. RMSProp moves every weight by about the learning rate in every step,
and in the course's net a unit has up to 3,200 inputs, whose weights all move at once: within the
hundred steps that a momentum of .99 looks back, the activations have changed.

Test-time augmentation comes after training as well: two views (the image as it is, and mirrored),
or six.
"""


# %%
def relabelled(name, metric, new_name):
    """The runs of `name` under a new name, with this metric as their validation accuracy."""
    return [
        experiments.Run(new_name, r.settings, r.seed, final={"val_accuracy": r.value(metric)})
        for r in nets.select(name)
    ]


COURSE_STEPS = recipe_of(COURSE).steps(IMAGES)
STEPS_TAKEN = (
    f"{EPOCHS * (IMAGES // BASE['batch_size'])} steps ({COURSE_STEPS} of the course's net)"
)
MOMENTUM_NAMES = ["base", *finished(MOMENTA)]
STATISTICS_OF = [*MOMENTUM_NAMES, "the course's net"]
AS = {"base": f"momentum {BASE['norm_momentum']:g}"}
LOSS_APART = max(
    abs(a - b)
    for name in MOMENTUM_NAMES
    for r, base in zip(nets.select(name), nets.select("base"), strict=True)
    for a, b in zip(r.history["loss"], base.history["loss"], strict=True)
)
print(f"Training losses of all momenta and epochs differ by {LOSS_APART:.1e} at most")
afterwards = experiments.Results(
    [
        run
        for name in STATISTICS_OF
        for metric, which in (("val_accuracy", "moving"), ("reestimated", "re-estimated"))
        for run in relabelled(name, metric, f"{AS.get(name, name)}, {which}")
    ]
    + relabelled("base", "two_views", "base, two views")
    + relabelled("base", "six_views", "base, six views")
)
print(afterwards.table("val_accuracy"))
ONE_VIEW = f"{AS['base']}, moving"
AFTER_TESTS = afterwards.compare_pairs(
    {
        f"{AS.get(name, name)}, re-estimated": (
            f"{AS.get(name, name)}, re-estimated",
            f"{AS.get(name, name)}, moving",
        )
        for name in STATISTICS_OF
    }
    | {
        "two views": ("base, two views", ONE_VIEW),
        "six views": ("base, six views", ONE_VIEW),
    },
    "val_accuracy",
)
print_tests(AFTER_TESTS)
plotting.bars(
    afterwards,
    "val_accuracy",
    labels=LABELS,
    from_zero=False,
    title=f"After training: statistics and views, {STEPS_TAKEN}\n{SETTING}",
    path=out / "afterwards.png",
)

# %% [markdown]
"""
## The best combination, and the only look at the test images

A change is taken over from the nets above if its net was better than the base in every seed (the
rates stay those of the base). Of several changes to the same thing, the one with the best mean is
taken. All changes that are taken over together make the combination. It is compared with the base
on the validation images, and the better of the two is trained on all training images (except those
of validation) and then judged on the test images. So the test images had no part in the choice; the
validation accuracy of what was chosen is flattered by it.
"""

# %%
CANDIDATES = {n: NETS[n] for n in (*NORM_NAMES, *IDEA_NAMES) if NETS[n]["rates"] == BASE["rates"]}


def changes_of(name):
    return {key: value for key, value in CANDIDATES[name].items() if value != BASE[key]}


def gain(name):
    return nets.values(name, "val_accuracy") - nets.values("base", "val_accuracy")


TAKEN = {}  # what is changed -> the best net that does
for name in sorted((n for n in CANDIDATES if min(gain(n)) > 0), key=lambda n: -gain(n).mean()):
    TAKEN.setdefault(next(key for key in changes_of(name) if key != "also"), name)
COMBINED = BASE | {k: v for name in TAKEN.values() for k, v in changes_of(name).items()}
COMBINED |= {"also": []}
print(f"Taken over: {', '.join(TAKEN.values()) or 'nothing'}")
if len(TAKEN) > 1:
    nets = nets.merge(run(train_net, {"combination": COMBINED}, seeds))
    CANDIDATES["combination"] = COMBINED
    print_tests(nets.compare_pairs({"combination": ("combination", "base")}, "val_accuracy"))
BEST = max(
    ["base", *(["combination"] if len(TAKEN) > 1 else TAKEN.values())],
    key=lambda name: nets.values(name, "val_accuracy").mean(),
)
print(f"The best in validation: {BEST}, {nets.values(BEST, 'val_accuracy').mean():.4f}")


def train_last(settings, seed, progress):
    """The best net, on all training images; accuracy and mistakes on the test images."""
    recipe, part = recipe_of(settings), dataclasses.replace(data, validation=None)
    outcome = recipes.train(recipe, part, seed=seed, on_epoch=show_in(progress, recipe))
    views = models.TestTimeAugmentation(outcome.model)
    logits = views.predict(data.test.x, batch_size=500, verbose=0)
    y, answers = data.test.y, np.argmax(logits, axis=1)
    p = ops.convert_to_numpy(ops.softmax(logits))
    # How much surer of the wrong class than of the right one; 0 where the answer is right.
    mistake = p[np.arange(len(y)), answers] - p[np.arange(len(y)), y]
    worst = np.argsort(-mistake, kind="stable")[:24]
    return {
        "history": outcome.history,
        "final": {
            "test_accuracy": outcome.metrics["test_accuracy"],
            "two_views": outcome.metrics["test_accuracy_views"],
            "six_views": float(np.mean(answers == y)),
        },
        "confusion": confusion_matrix(y, answers, labels=range(data.classes)),
        "worst": worst,
        "answers": answers[worst],
        "p": np.round(p[worst, answers[worst]], 3),
    }


last_settings = {**CANDIDATES.get(BEST, BASE), "images": len(data.train), "also": []}
last_seeds = arguments.seed_range(fast=1, default=3, full=3)
last = run(train_last, {"the best net": last_settings}, last_seeds)
print(last.table())

# %% [markdown]
"""
## What it gets wrong

These are the answers that the best net, over all its seeds, gives to the test images with six
views. A row is what an image is, a column what the net says, in percent of the row.
"""

# %%
CONFUSION = np.sum([r.extra["confusion"] for r in last], axis=0)  # (classes, classes), counts
names = list(data.class_names)
LAST = f"{len(data.train):,} images, {EPOCHS} epochs, {data.title}, n = {len(last)}"
plotting.matrix(
    100 * CONFUSION / CONFUSION.sum(axis=1, keepdims=True),
    rows=names,
    columns=names,
    xlabel="answer of the net",
    ylabel="class of the image",
    value="percent of the images of a class",
    texts={
        at: f"{100 * count / CONFUSION[at[0]].sum():.1f}"
        for at, count in np.ndenumerate(CONFUSION)
        if count
    },
    title=f"The best net on test images\n{LAST}",
    path=out / "confusion.png",
)
WRONG = CONFUSION * (1 - np.eye(len(names), dtype=int))
PAIRED = {
    f"{names[i]} and {names[j]}": float((WRONG[i, j] + WRONG[j, i]) / WRONG.sum())
    for i in range(len(names))
    for j in range(i)
}
MOST_CONFUSED = sorted(PAIRED, key=PAIRED.get, reverse=True)[:4]
RIGHT = dict(zip(names, np.diag(CONFUSION) / CONFUSION.sum(axis=1), strict=True))
for pair in MOST_CONFUSED:
    print(f"{pair}: {100 * PAIRED[pair]:.1f} % of all mistakes")
living = np.isin(names, ["bird", "cat", "deer", "dog", "frog", "horse"])
across = living[:, None] != living
ACROSS = float(WRONG[across].sum() / WRONG.sum())
if living.any():
    print(
        f"{100 * ACROSS:.1f} % of all mistakes take animals for vehicles, or vehicles for animals"
    )

# %% [markdown]
"""
These are the mistakes that one of these nets is surest of: the test images where the probability of
the wrong class exceeds that of the right one by the most. Above each image is its label, and what
the net takes it for. Some are mistakes of the labels: look at each.
"""

# %%
LOOKED_AT = {
    "CIFAR-10 (JPEG copy)": {2059: "frog"}
}  # test images of a wrong label -> what they are
one = last.runs[0]
shown = [
    (index, answer, p)
    for index, answer, p in zip(*(one.extra[k] for k in ("worst", "answers", "p")), strict=True)
    if answer != data.test.y[index]
]
if shown:
    plotting.image_grid(
        np.clip(data.unstandardize(data.test.x[[index for index, *_ in shown]]), 0, 1),
        [f"{names[data.test.y[index]]}\n{names[answer]} {p:.2f}?" for index, answer, p in shown],
        columns=6,
        title=f"The surest mistakes, {data.title}",
        path=out / "mistakes.png",
    )

# %% [markdown]
"""
The first filters follow: those of whitening, measured in a second, in order of variance with the
largest first; those of the same convolution trained from noise ("no whitening"); and those of the
course's net. Grey is a weight of 0. The whitening filters begin with brightness, colour and the
differences of brightness between neighbours, and end with differences of colour that hardly any
image has, which (W1) amplifies most.
"""


# %%
def pictures(kernel):
    """Filters (size, size, C, K) -> images (K, size, size, C), grey where a weight is 0."""
    filters = np.moveaxis(np.asarray(kernel), -1, 0)
    return 0.5 + filters / (2 * np.abs(filters).max(axis=(1, 2, 3), keepdims=True))


whitening = models.WhiteningConv2D()
whitening.adapt(data.train.x[:5000])
plotting.image_grid(
    pictures(ops.convert_to_numpy(whitening.kernel)),
    columns=12,
    title=f"Whitening, {data.title}",
    path=out / "filters_whitening.png",
)
for name, file in (("no whitening", "trained"), ("the course's net", "course")):
    if name in nets.names:
        plotting.image_grid(
            pictures(nets.select(name).runs[0].extra["first_kernel"]),
            columns=12,
            title=f"First filters after training: {name}, {data.title}",
            path=out / f"filters_{file}.png",
        )

# %% [markdown]
"""
## What this does not show

The nets are small, and trained for few epochs on few images, with the rates of the base, or a
quarter of them where that was tried. With time for thirty epochs an idea may be worth more, or
nothing, and a net that lost here may have lacked a rate of its own. Others found the ideas on all
of CIFAR-10, and looked at test images on the way; the base was put together from these ideas before
this tutorial. The ideas were added in one order; another order would give other steps. With three
seeds, an idea worth half a point cannot be told from one worth nothing. A JPEG copy of CIFAR-10,
used where the title says so, costs accuracy compared with the original images: compare only figures
on the same copy.

## Exercises

1. What is each idea worth when it is added on the way to the base, and when it is left out of the
   base? Is it the same?
2. Which normalization suits this net, and can it do without?
3. Which momentum should the moving statistics have?
4. Gamma, beta and epsilon: which of them matter here?
5. What do two and six views add, and what do they cost?
6. What does the best net get wrong, and why?

## References

Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU (whitening, identity, a fast beta,
alternating flips, lookahead with growing decay, six views), after Page, 2019, How to Train Your
ResNet 8. Jordan and others, 2024, Muon: An Optimizer for Hidden Layers in Neural Networks.
Nesterov, 1983, A Method for Solving the Convex Programming Problem with Convergence Rate O(1/k^2).
Zhang, Lucas, Hinton and Ba, 2019, Lookahead Optimizer: k Steps Forward, 1 Step Back. Hendrycks and
Gimpel, 2016, Gaussian Error Linear Units (GELU). Szegedy and others, 2016, Rethinking the Inception
Architecture for Computer Vision, section 7 (label smoothing). Ioffe and Szegedy, 2015, Batch
Normalization. Ba, Kiros and Hinton, 2016, Layer Normalization. Wu and He, 2018, Group
Normalization. Tieleman and Hinton, 2012, Lecture 6.5 of Neural Networks for Machine Learning
(RMSProp, of the course's net).

## Answers, from the runs above
"""


# %%
def percent(values):
    values = 100 * np.asarray(values)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} %"


def val(name):
    return f"{LABELS.get(name, name)} {percent(nets.values(name, 'val_accuracy'))}"


def all_tests(tests):
    return "; ".join(difference(tests, name) for name in tests) or "not tested here"


def about_the_bare_nets():
    dead = "bare, no normalization"
    if dead not in LEARNED_NOTHING:
        return ""
    return (
        f" Weights as small as batch normalization likes them are no start without it: the logits "
        f"of '{LABELS[dead]}' begin with a standard deviation of {AT_THE_START[dead]:.1g} (He's "
        f"start: {AT_THE_START[HE]:.1g}), and its training loss stays within "
        f"{LEARNED_NOTHING[dead]:.1g} of ln {data.classes} in every epoch. It learns nothing, and "
        "is no measure of what normalization is worth; the better of the nets with He's start is: "
        f"'{BEST_BARE}'."
    )


def answer_ideas():
    texts = "; ".join(val(name) for name in climbed)
    return (
        f"1. Validation accuracy, n = {len(seeds)}, {SETTING}: {texts}.{about_the_bare_nets()} "
        f"Each step against the one before: {all_tests(LADDER_TESTS)}. Left out of the base, or "
        f"done otherwise: {all_tests(IDEA_TESTS)}. Where the two disagree, ideas stand in for "
        "each other: what one has mended is no longer there for the next. What would change the "
        "answer: another order of the steps, more epochs, more images, a start and rates of its "
        "own for each net."
    )


def answer_normalizations():
    values = nets.values("base", "val_accuracy")
    return (
        f"2. Batch normalization (the base) {percent(values)}; against it, n = {len(seeds)}: "
        f"{all_tests(NORM_TESTS)}. The rates were chosen with batch normalization; what a quarter "
        f"of them gives to each: {all_tests(RATE_TESTS)}. Keras's layer computes the same "
        "function as ours, and what is between them is rounding, multiplied from step to step. "
        "The others normalize each image by itself: they take away from it what is between images, "
        "and no batch adds noise. What would change the answer: small batches, and rates chosen "
        "among more than two."
    )


def answer_momentum():
    names = [AS.get(name, name) for name in STATISTICS_OF]
    lines = "; ".join(
        f"{name} {percent(afterwards.values(f'{name}, moving', 'val_accuracy'))}, re-estimated "
        f"{percent(afterwards.values(f'{name}, re-estimated', 'val_accuracy'))}"
        for name in names
    )
    tests = {k: v for k, v in AFTER_TESTS.items() if "re-estimated" in k}
    return (
        f"3. After {STEPS_TAKEN}, n = {len(seeds)}: {lines}. Re-estimated against moving: "
        f"{all_tests(tests)}. The training losses of all momenta differ by {LOSS_APART:.1e} at "
        "most: the momentum takes no part in training. What would change the answer: a longer "
        "training, or batches so small that their statistics are too noisy for a short average."
    )


def answer_parameters():
    chosen = ("gamma trained", "rate of beta as of the rest", "epsilon 1e-3", "epsilon 0.1")
    return (
        f"4. Against the base, n = {len(seeds)}: "
        f"{'; '.join(difference(IDEA_TESTS, name) for name in chosen)}. What would change the "
        "answer: an activation that depends on the scale of its input, with no convolution after "
        "it to adjust that scale, a rate that is large enough for beta as it is, or activations "
        "of a variance near epsilon."
    )


def answer_views():
    tests = {k: v for k, v in AFTER_TESTS.items() if "views" in k}
    return (
        f"5. One view {percent(nets.values('base', 'val_accuracy'))}, two "
        f"{percent(nets.values('base', 'two_views'))}, six "
        f"{percent(nets.values('base', 'six_views'))} in validation, n = {len(seeds)}: "
        f"{all_tests(tests)}. Inference takes two and six times the operations; training takes "
        "what it took. What would change the answer: things that are not the same when mirrored, "
        "such as writing, or a net that was trained without flips and shifts."
    )


def wrong_labels():
    seen = LOOKED_AT.get(data.title, {})
    found = [(int(i), names[data.test.y[i]], seen[int(i)]) for i, *_ in shown if int(i) in seen]
    if not found:
        return ""
    texts = ", ".join(
        f"test image {i}, labelled '{label}', is a {truth}" for i, label, truth in found
    )
    return f" Some of the surest mistakes are the labels': {texts}."


def answer_mistakes():
    pairs = ", ".join(f"{pair} ({100 * PAIRED[pair]:.1f} %)" for pair in MOST_CONFUSED)
    hardest, easiest = (f(RIGHT, key=RIGHT.get) for f in (min, max))
    return (
        f"6. The best net in validation ({BEST}; taken over: "
        f"{', '.join(TAKEN.values()) or 'nothing'}), trained on {len(data.train):,} images, has a "
        f"test accuracy of {percent(last.values('the best net', 'test_accuracy'))} with one view, "
        f"{percent(last.values('the best net', 'six_views'))} with six (n = {len(last)}). It "
        f"knows {100 * RIGHT[easiest]:.1f} % of the class '{easiest}' and "
        f"{100 * RIGHT[hardest]:.1f} % of '{hardest}'. Of all its mistakes, the pairs most "
        f"confused, in both directions, make: {pairs}; each of the {len(PAIRED)} pairs would have "
        f"{100 / len(PAIRED):.1f} % if all were alike."
        + (
            f" Animals taken for vehicles, or vehicles for animals, are {100 * ACROSS:.1f} %, and "
            f"would be {100 * across.sum() / (across.size - len(names)):.0f} % if all were alike: "
            "what the net confuses looks alike."
            if living.any()
            else ""
        )
        + wrong_labels()
        + " What would change the answer: a wider net and more epochs, which have room for what "
        "tells two like classes apart."
    )


ANSWERS = [
    answer_ideas(),
    answer_normalizations(),
    answer_momentum(),
    answer_parameters(),
    answer_views(),
    answer_mistakes(),
]
arguments.finish(
    ANSWERS,
    data,
    seeds=str(len(seeds)),
    instead_of="CIFAR-10",
    differences_from_numpy=DIFFERENCE,
    correlation={"patches": CORRELATED, "whitened": WHITENED},
    seen_both_ways=BOTH_WAYS,
    logits_at_the_start=AT_THE_START,
    losses_apart=LOSS_APART,
    taken_over=list(TAKEN.values()),
    best=BEST,
    right=RIGHT,
    across=ACROSS if living.any() else None,
    most_confused={pair: PAIRED[pair] for pair in MOST_CONFUSED},
    p_by_holm={
        name: None if test.untested else test.p_adjusted
        for tests in (LADDER_TESTS, NORM_TESTS, RATE_TESTS, IDEA_TESTS, AFTER_TESTS)
        for name, test in tests.items()
    },
)

"""Trainings on CIFAR-10 by name: settings that belong together, and the code to run them.

    >>> from keras_norm import recipes
    >>> recipes.RECIPES["cpu-4min"].widths
    (48, 96, 192)

`train` runs one through `fit`, resumable after every epoch; `keras-norm train --recipe NAME` does
the same from the command line. For the cpu- recipes, rule, batch size, activation and smoothing
were chosen on validation images, and so were widths and epochs except those of cpu-25min, which
extrapolates from the smaller ones. gpu-94 is a published recipe and has not been run to its end
yet; docs/training.md says what course shares with a published net, and what was chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import keras
import numpy as np
from keras import ops

from keras_norm import callbacks, datasets, kernels, models, optimizers, statistics
from keras_norm._arrays import is_integer
from keras_norm._experiment_short import classification_metrics
from keras_norm._files import (
    FolderInUseError,
    clear_remains,
    locked,
    no_room,
    replace_file,
    require_writable,
)
from keras_norm._machine import describe_machine
from keras_norm._state import synchronized

__all__ = [
    "RECIPES",
    "CourseRecipe",
    "Outcome",
    "Recipe",
    "command",
    "configure",
    "fastest_policy",
    "flops",
    "judge",
    "load",
    "settings",
    "train",
]

_BETA = r"_norm/beta$"
_KERNELS = r"conv.*/kernel$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training of a `FastConvNet`; numbers as in `RECIPES`.

    Attributes:
        name: name of the recipe.
        widths: channels of the net's groups.
        epochs: passes over the training images.
        batch_size: images in a step; a last, smaller batch is left out.
        learning_rate: peak rate for the mean loss of batches of 1,024; for other batch sizes it is
            scaled in proportion.
        momentum: of Nesterov's rule.
        matrix_rate, matrix_momentum: of `optimizers.Muon`, which then trains the kernels of the
            convolutions; None leaves them to Nesterov's rule too.
        l2: decay that passes through the momentum.
        bias_rate: factor on the learning rate of normalization's beta; its decay is divided by it.
        warmup, start, end: `warmup` is the share of the steps in which the rate rises from `start`
            times its peak to the peak; from there it falls in a straight line to `end` times the
            peak.
        label_smoothing: share of the target spread evenly over all classes.
        shift, flip: of `datasets.FlipAndShift`.
        lookahead: whether slow weights are kept (`callbacks.Lookahead`).
        whitening, identity, activation, logit_scale: of `models.FastConvNet`.
        whitening_bias: whether the bias of the whitening convolution is trained; nothing else
            needs the gradient with respect to the first activations.
        normalization: None, or a name or factory as in `models.FastConvNet`; "fast" is
            `models.FAST_NORMALIZATION`.
        reestimate: number of training images from which the statistics are re-estimated at the
            end; 0 keeps the moving ones.
        views: pixels of `models.TestTimeAugmentation`.
        dtype_policy: a policy of Keras, or "auto" for `fastest_policy`.
    """

    name: str
    widths: tuple[int, ...] = (64, 256, 256)
    epochs: int = 10
    batch_size: int = 1024
    learning_rate: float = 1.5
    momentum: float = 0.85
    matrix_rate: float | None = None
    matrix_momentum: float = 0.6
    l2: float = 1.33e-3
    bias_rate: float = 64.0
    warmup: float = 0.23
    start: float = 0.2
    end: float = 0.07
    label_smoothing: float = 0.2
    shift: int = 2
    flip: str = "alternating"
    lookahead: bool = True
    whitening: bool = True
    whitening_bias: bool = False
    identity: bool = True
    activation: str = "gelu"
    logit_scale: float = 1 / 9
    normalization: Any = "fast"
    reestimate: int = 0
    views: int = 1
    dtype_policy: str = "float32"

    def model(self, input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10) -> Any:
        """A new net of this recipe, not compiled."""
        norm = models.FAST_NORMALIZATION if self.normalization == "fast" else self.normalization
        net = models.FastConvNet(
            self.widths,
            norm,
            activation=self.activation,
            whitening=self.whitening,
            identity=self.identity,
            logit_scale=self.logit_scale,
            input_shape=input_shape,
            classes=classes,
        )
        if self.whitening and not self.whitening_bias:
            net.get_layer("whitening").trainable = False
        return net

    def optimizer(self, model: Any, steps: int) -> keras.optimizers.Optimizer:
        """The optimizer for this model and a training of `steps` steps."""
        top = max(1, round(self.warmup * steps))
        peak = self.learning_rate * self.batch_size / 1024
        scale = peak if self.matrix_rate is None else self.matrix_rate
        rate = optimizers.PiecewiseLinear(
            [0, top, max(steps, top + 1)], [self.start * scale, scale, self.end * scale]
        )
        decay: dict[Any, float] = {"": self.l2}
        factors: dict[Any, float] = {"": peak / scale}
        if any(re.search(_BETA, v.path) for v in model.trainable_variables):
            decay = {_BETA: self.l2 / self.bias_rate, **decay}
            factors = {_BETA: self.bias_rate * peak / scale, **factors}
        if self.matrix_rate is None:
            return optimizers.SGD(
                rate, self.momentum, True, l2_decay=decay, learning_rate_multipliers=factors
            )
        return optimizers.Muon(
            rate,
            self.matrix_momentum,
            other_momentum=self.momentum,
            matrices=_KERNELS,
            l2_decay=decay,
            learning_rate_multipliers={_KERNELS: 1.0, **factors},
        )

    def steps(self, images: int) -> int:
        """Number of steps of a training on `images` images."""
        return self.epochs * max(1, images // self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CourseRecipe(Recipe):
    """Four 5x5 convolutions, each with batch normalization and pooled; RMSProp at one rate.

    Of the settings of `Recipe` it uses epochs, batch_size, normalization, label_smoothing, shift,
    flip, lookahead, reestimate, views and dtype_policy; widths are those of the convolutions.

    Attributes:
        weight_std: standard deviation of the weights at the start, above 0; None for He's.
            Normalization removes the scale of the weights, and RMSProp moves each by about the
            rate in a step, so the net learns faster the smaller they are.
    """

    weight_std: float | None = None

    def model(self, input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10) -> Any:
        """A new net, not compiled."""
        norm = "batch" if self.normalization == "fast" else self.normalization
        start: Any = "he_normal"
        if self.weight_std is not None:
            if not self.weight_std > 0:
                raise ValueError(
                    "`weight_std` must be above 0, or None for He's start. "
                    f"Received: weight_std={self.weight_std}."
                )
            start = {"class_name": "RandomNormal", "config": {"stddev": self.weight_std}}
        return models.CNN(
            self.widths,
            norm,
            kernel_size=5,
            kernel_initializer=start,
            input_shape=input_shape,
            classes=classes,
        )

    def optimizer(self, model: Any, steps: int) -> keras.optimizers.Optimizer:
        """The optimizer: RMSProp."""
        return optimizers.RMSprop(self.learning_rate)


# With Muon the rate falls from the first step on, down to zero.
_CPU: Any = {
    "batch_size": 512,
    "activation": "relu",
    "label_smoothing": 0.1,
    "matrix_rate": 0.2,
    "warmup": 0.0,
    "start": 1.0,
    "end": 0.0,
    "dtype_policy": "auto",
}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="cpu-2min", widths=(32, 64, 128), epochs=5, **_CPU),
        Recipe(name="cpu-4min", widths=(48, 96, 192), epochs=6, **_CPU),
        Recipe(name="cpu-10min", widths=(64, 128, 256), epochs=9, **_CPU),
        Recipe(name="cpu-25min", widths=(64, 256, 384), epochs=12, **_CPU),
        Recipe(name="gpu-94", whitening_bias=True, dtype_policy="auto"),
        CourseRecipe(
            name="course",
            widths=(32, 64, 128, 256),
            batch_size=64,
            learning_rate=1e-4,
            weight_std=0.01,
            label_smoothing=0.0,
            flip="random",
            reestimate=10_000,
            dtype_policy="auto",
        ),
        Recipe(name="smoke", widths=(16, 16, 16), epochs=2, batch_size=32, learning_rate=12.0),
    )
}
"""Recipe by name."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a training: the model, its metrics, and what it cost.

    Attributes:
        recipe, seed: what was trained.
        model: the trained `keras.Model`.
        metrics: "validation_accuracy" or "test_accuracy", depending on the part that it was judged
            by, the same with "_views" (test-time augmentation), and losses.
        history: metric -> one value per epoch, of the training steps.
        seconds: "training" (without compilation), "compilation" (the extra time of the first
            step), "statistics" (re-estimation), "evaluation" and "data" (how long steps would wait
            for batches if none were prepared ahead).
        costs: "images_per_second", "flops_forward" per image, "flops_training" in total.
        report: report of the re-estimation, or None.
        data: the data that it was trained on, in a sentence.
        dtype_policy: the policy that it was trained with.
    """

    recipe: Recipe
    seed: int
    model: Any
    metrics: Mapping[str, float]
    history: Mapping[str, list[float]]
    seconds: Mapping[str, float]
    costs: Mapping[str, float]
    report: Any
    data: str
    dtype_policy: str

    def card(self) -> dict[str, Any]:
        """Everything except the weights, as JSON values."""
        return {
            "recipe": settings(self.recipe),
            "seed": self.seed,
            "data": self.data,
            "dtype_policy": self.dtype_policy,
            "metrics": dict(self.metrics),
            "seconds": dict(self.seconds),
            "costs": dict(self.costs),
            "history": dict(self.history),
            "parameters": self.model.count_params(),
            "statistics": None if self.report is None else str(self.report),
            "machine": describe_machine(),
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes model.keras and card.json into a folder, each whole or not at all.

        Args:
            folder: made if it is missing; files of these names are replaced.

        Returns:
            The path of the model.
        """
        folder = Path(folder)
        with replace_file(folder / "model.keras") as temporary:
            self.model.save(temporary)
        with replace_file(folder / "card.json") as temporary:
            temporary.write_text(json.dumps(self.card(), indent=1))
        return folder / "model.keras"


_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def flops(model: Any) -> int:
    """Floating-point operations of convolutions and dense layers in one forward pass.

    A multiplication and an addition count as two. Training takes about three times as many.

    Args:
        model: functional or Sequential, built with known sizes.

    Returns:
        Operations per example.

    Example:
        >>> flops(models.FastConvNet((32, 64, 64))) / 1e6
        33.893408
    """
    total = 0
    for layer in model.layers:
        if hasattr(layer, "layers"):
            total += flops(layer)
        kernel = getattr(layer, "kernel", None)
        if kernel is None:
            continue
        transposed = isinstance(layer, _TRANSPOSED)  # the kernel is applied at every input
        shape = (layer.input if transposed else layer.output).shape[1:]
        first = getattr(layer, "data_format", "channels_last") == "channels_first"
        positions = math.prod(shape[1:] if first else shape[:-1])
        total += 2 * positions * math.prod(kernel.shape)
    return total


def load(name: str = "cifar10", **options: Any) -> datasets.Data:
    """A data set as the recipes need it: standardized by channel, large enough to be halved.

    Args:
        name: name of the data set. Default: "cifar10".
        options: of `datasets.load`: data_dir, validation, ...

    Returns:
        `datasets.Data`; the digits at 16 x 16 pixels.

    Raises:
        ValueError: as `datasets.load`.

    Example:
        >>> load("digits", validation=100).input_shape
        (16, 16, 1)
    """
    size = {"image_size": 16} if name == "digits" else {}
    return datasets.load(name, **{"standardize": "channel", **size, **options})


def train(
    recipe: Recipe | str,
    data: datasets.Data | None = None,
    *,
    seed: int = 0,
    backup: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[float, Mapping[str, float]], None] | None = None,
    dtype_policy: str | None = None,
) -> Outcome:
    """Trains a recipe and judges it once, on validation or test images.

    Args:
        recipe: one of `RECIPES`, or its name.
        data: the net is judged by its validation part, or by its test part if it has no validation
            part. Default: CIFAR-10, all 50,000 images, judged by the test images.
        seed: of initialization, order and augmentation, int from 0 to 2^32 - 1. Default: 0.
        backup: .npz file that is written after every epoch; if it exists, the training resumes
            from it. It stays at the end, because nothing else holds the training until the outcome
            is saved; remove it then. Default: none.
        on_epoch: called with the number of epochs done and the metrics of the last one, also
            within an epoch (then with no metrics); to show progress. Default: none.
        dtype_policy: "float32", "mixed_bfloat16" or another policy of Keras; or "auto" for
            `fastest_policy`. A training resumed from a backup keeps the policy it began with.
            Default: the recipe's.

    Returns:
        An `Outcome`.

    Raises:
        ValueError: for an unknown recipe, settings out of their range, or a backup that is of
            another training or cannot be read.
    """
    recipe = _recipe(recipe)
    _check_seed_and_policy(seed, dtype_policy or recipe.dtype_policy)
    if data is None:
        data = load()
    _check(recipe, data)
    seed = int(seed)  # NumPy's integers are not JSON values
    recipe = dataclasses.replace(
        recipe, epochs=int(recipe.epochs), batch_size=int(recipe.batch_size)
    )
    asked = dtype_policy or recipe.dtype_policy
    saved = _Backup(backup, f"{settings(recipe)} {seed} {asked} {data!r}")
    saved.read()
    saved.policy = saved.policy or (fastest_policy() if asked == "auto" else asked)
    with _policy(saved.policy):
        keras.utils.set_random_seed(seed)
        model = recipe.model(data.input_shape, data.classes)
    models.fit_whitening(model, data.train.x)
    steps = recipe.steps(len(data.train))
    model.compile(
        recipe.optimizer(model, steps),
        keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=recipe.label_smoothing
        ),
        metrics=["accuracy"],
    )
    x, y = data.train.x, np.eye(data.classes, dtype="float32")[data.train.y]
    models.make_variables(model, x, y)
    if _batches_on_device():
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    batches = datasets.Batches(
        x,
        y,
        recipe.batch_size,
        seed=seed,
        augment=datasets.FlipAndShift(recipe.shift, recipe.flip),
        drop_remainder=len(data.train) >= recipe.batch_size,
    )
    clock = _Clock(on_epoch)
    lookahead = callbacks.Lookahead(steps) if recipe.lookahead else None
    batches.epoch = saved.restore(model, lookahead, clock)
    model.fit(
        batches,
        epochs=recipe.epochs,
        initial_epoch=batches.epoch,
        shuffle=False,
        verbose=0,
        callbacks=[c for c in (lookahead, clock, saved) if c is not None],
    )
    return _judge(recipe, seed, model, data, clock, batches, saved.policy)


def judge(nets: Sequence[Any], data: datasets.Data, views: int = 1) -> dict[str, float]:
    """Loss and accuracy of one net, or of several nets whose logits are averaged.

    Args:
        nets: at least one `keras.Model` from images to logits.
        data: the validation part is used, or the test part if there is no validation part.
        views: pixels of the shift of `models.TestTimeAugmentation`, int >= 0. Default: 1.

    Returns:
        "validation_accuracy" and "validation_loss" ("test_accuracy" and "test_loss" if the data
        have no validation part), and the same with "_views", of test-time augmentation.

    Raises:
        ValueError: for no net, and as `models.TestTimeAugmentation`.

    Example:
        >>> data = load("digits", validation=100)
        >>> nets = [models.FastConvNet((4, 4, 4), input_shape=data.input_shape) for _ in range(2)]
        >>> sorted(judge(nets, data))[:2]
        ['validation_accuracy', 'validation_accuracy_views']
    """
    if not nets:
        raise ValueError(f"At least one net must be judged. Received: nets={nets!r}.")
    part, split = _judging(data)
    metrics = {}
    for ending, judges in (
        ("", nets),
        ("_views", [models.TestTimeAugmentation(net, views) for net in nets]),
    ):
        logits = [net.predict(split.x, batch_size=1000, verbose=0) for net in judges]
        found = classification_metrics(np.mean(logits, axis=0), split.y)
        metrics[f"{part}_accuracy{ending}"] = found["accuracy"]
        metrics[f"{part}_loss{ending}"] = found["loss"]
    return metrics


def _judging(data: datasets.Data) -> tuple[str, Any]:
    """The name of the part that nets are judged by, and the part."""
    return ("test", data.test) if data.validation is None else ("validation", data.validation)


@functools.cache
def fastest_policy() -> str:
    """Measures once whether a convolution is clearly faster here in bfloat16 than in float32.

    Processors with AVX-512 BF16 or AMX, and GPUs, multiply bfloat16 faster than float32; others
    have to emulate it. Weights, statistics and sums stay in float32.

    Returns:
        "mixed_bfloat16" if it takes less than .8 of the time, else "float32".

    Example:
        >>> fastest_policy() in ("float32", "mixed_bfloat16")
        True
    """
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(64, 16, 16, 64)), rng.normal(size=(3, 3, 64, 64))
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    arrays = {
        dtype: [ops.convert_to_tensor(v, dtype=dtype) for v in (images, kernel)]
        for dtype in seconds
    }
    for turn in range(8):
        for dtype, (x, k) in arrays.items():
            began = time.perf_counter()
            y = ops.conv(x, k, padding="same", data_format="channels_last")
            ops.convert_to_numpy(ops.cast(y[0, 0, 0, 0], "float32"))
            if turn:  # the first one compiles
                seconds[dtype].append(time.perf_counter() - began)
    float32, bfloat16 = (min(turns) for turns in seconds.values())
    return "mixed_bfloat16" if bfloat16 < 0.8 * float32 else "float32"


def _check(recipe: Recipe, data: datasets.Data) -> None:
    """Refuses what would be noticed only after the training, or as an error from elsewhere."""
    for name in ("epochs", "batch_size"):
        value = getattr(recipe, name)
        if not (is_integer(value) and value >= 1):
            raise ValueError(
                f"`{name}` of a recipe must be an int >= 1. Received: {name}={value!r}."
            )
    if recipe.matrix_rate is not None and not recipe.matrix_rate > 0:
        raise ValueError(
            "`matrix_rate` of a recipe must be > 0, or None to leave the kernels to Nesterov's "
            f"rule. Received: matrix_rate={recipe.matrix_rate!r}."
        )
    least = min(data.input_shape[:2])
    if not 0 <= recipe.views < least:
        raise ValueError(
            "`views` of a recipe are pixels, fewer than the images have. Received: "
            f"views={recipe.views!r} for images of shape {data.input_shape}."
        )


def _check_seed_and_policy(seed: Any, policy: Any) -> None:
    """Refuses a wrong seed or policy before the data are read, which takes time."""
    if not (is_integer(seed) and 0 <= seed < 2**32):
        raise ValueError(f"`seed` must be an int from 0 to {2**32 - 1}. Received: seed={seed!r}.")
    if policy == "auto":
        return
    try:
        known = keras.backend.is_float_dtype(keras.dtype_policies.get(policy).compute_dtype)
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            "`dtype_policy` must be 'auto' or one of Keras's floating policies, such as 'float32' "
            f"or 'mixed_bfloat16'. Received: dtype_policy={policy!r}."
        )


def _recipe(recipe: Recipe | str) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(
            f"A recipe's name must be one of {list(RECIPES)}. Received: recipe={recipe!r}. "
            "Pass a `Recipe` for settings of your own."
        )
    return RECIPES[recipe]


def _batches_on_device() -> bool:
    """Whether batches are cut from images on the GPU, which is faster than on the host."""
    return keras.backend.backend() != "tensorflow" and kernels.on_gpu()


def _callable_text(function: Any) -> str:
    """A text for a function that is the same in other processes: without its address."""
    if isinstance(function, functools.partial):
        given = {f"{i}": v for i, v in enumerate(function.args)} | function.keywords
        return f"partial({_callable_text(function.func)}, {given!r})"
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{function.__module__}.{name}"


def settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON values."""
    values = dataclasses.asdict(recipe)
    if callable(recipe.normalization):
        values["normalization"] = _callable_text(recipe.normalization)
    return values


@contextlib.contextmanager
def _policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _judge(
    recipe: Recipe,
    seed: int,
    model: Any,
    data: datasets.Data,
    clock: _Clock,
    batches: Any,
    policy: str,
) -> Outcome:
    began = time.perf_counter()
    report = None
    if recipe.reestimate:
        report = statistics.reestimate(model, data.train.x, samples=recipe.reestimate, seed=seed)
    measured = time.perf_counter()
    metrics = judge([model], data, recipe.views)
    judged = time.perf_counter()
    _ = batches[0]
    waited = (time.perf_counter() - judged) * recipe.steps(len(data.train))
    part, split = _judging(data)
    training, compilation = clock.training()
    images = recipe.batch_size * recipe.steps(len(data.train))
    forward = flops(model)
    return Outcome(
        recipe=recipe,
        seed=seed,
        model=model,
        metrics=metrics,
        history=clock.history,
        seconds={
            "training": training,
            "compilation": compilation,
            "statistics": measured - began,
            "evaluation": judged - measured,
            "data": waited,
        },
        costs={
            "images_per_second": images / training,
            "flops_forward": forward,
            "flops_training": 3 * forward * images,
        },
        report=report,
        data=f"{data.title}, {len(data.train):,} training images, judged by {len(split):,} {part} "
        f"images",
        dtype_policy=policy,
    )


class _Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Records how long steps take, and their metrics."""

    def __init__(self, on_epoch: Callable[[float, Mapping[str, float]], None] | None) -> None:
        super().__init__()
        self.on_epoch = on_epoch
        self.epochs: list[float] = []  # seconds of each
        self.first = 0.0  # seconds that the first steps took longer than the others
        self.history: dict[str, list[float]] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._marks = epoch, [time.perf_counter()]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._marks.append(time.perf_counter())
        if self.on_epoch is not None:
            self.on_epoch(self._epoch + (batch + 1) / self.params["steps"], {})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        took = np.diff([*self._marks, time.perf_counter()])
        self.epochs.append(float(took.sum()))
        if len(took) > 2 and len(self.epochs) == 1:
            self.first = float(max(0.0, took[0] - np.median(took[1:-1])))
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        if self.on_epoch is not None:
            self.on_epoch(epoch + 1, dict(logs or {}))

    def training(self) -> tuple[float, float]:
        """Seconds of training, and of compilation before it."""
        return sum(self.epochs) - self.first, self.first


class _Backup(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps everything that the next epoch depends on in one file."""

    def __init__(self, path: Any, settings: str) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.saved: dict[str, Any] = {}
        self.policy = ""  # the one that the training began with

    def read(self) -> None:
        """Reads the file, if there is one; refuses the file of another training."""
        if self.path is None or not self.path.exists():
            return
        content = io.BytesIO(self.path.read_bytes())
        try:
            with np.load(content, allow_pickle=False) as saved:
                self.saved = dict(saved)
            notes = json.loads(str(self.saved["notes"]))
            self.policy, digest = notes.get("policy", ""), notes["digest"]
        except (EOFError, LookupError, RuntimeError, TypeError, ValueError, BadZipFile) as error:
            raise ValueError(
                "A backup must be one that `train` has written. Received: "
                f"backup={str(self.path)!r}, which cannot be read. Remove it to begin anew."
            ) from error
        if digest != self.digest:
            raise ValueError(
                "A backup can only be gone on from with the same recipe, seed and data. Received: "
                f"backup={str(self.path)!r}, of another training. Remove it to begin anew."
            )

    def _variables(self) -> list[Any]:
        slow = [] if self.lookahead is None else self.lookahead.variables
        weights = [v for layer in self.model.layers for v in layer.variables]
        return [*weights, *self.model.optimizer.variables, *slow]

    def restore(self, model: Any, lookahead: Any, clock: _Clock) -> int:
        """Restores all of them to their state in the file; returns the epochs done."""
        self.set_model(model)
        self.lookahead, self.clock = lookahead, clock
        if not self.saved:
            return 0
        models.build_optimizer(model)
        if lookahead is not None:
            lookahead.build(model)
        for i, variable in enumerate(self._variables()):
            variable.assign(self.saved[f"v{i}"])
        notes = json.loads(str(self.saved["notes"]))
        clock.history, clock.epochs, clock.first = (
            notes[name] for name in ("history", "epochs", "first")
        )
        return len(clock.epochs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.path is None:
            return
        synchronized(self.model)
        values = {f"v{i}": storable(v) for i, v in enumerate(self._variables())}
        notes = {
            "digest": self.digest,
            "policy": self.policy,
            "history": self.clock.history,
            "epochs": self.clock.epochs,
            "first": self.clock.first,
        }
        with replace_file(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, notes=np.array(json.dumps(notes)), **values)


def storable(variable: Any) -> Any:
    """A variable's value as NumPy's files can hold it: bfloat16 as float32, which is exact."""
    half = keras.backend.standardize_dtype(variable.dtype) == "bfloat16"
    return ops.convert_to_numpy(ops.cast(variable, "float32") if half else variable)


# The command --------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `keras-norm train` to a parser."""
    parser.add_argument(
        "--recipe", choices=list(RECIPES), default="cpu-4min", help="settings, default: cpu-4min"
    )
    parser.add_argument("--data", default="cifar10", help="data set; default: cifar10")
    parser.add_argument("--data-dir", help="folder of tensorflow-datasets, or a packed .npz")
    parser.add_argument(
        "--validation",
        type=int,
        default=0,
        help="hold out so many training images and be judged by them; default: none, the test set",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--dtype-policy",
        help="float32, mixed_bfloat16, ..., or auto: the faster of these two (default: the "
        "recipe's)",
    )
    parser.add_argument(
        "--out",
        default="results/train",
        help="folder of model.keras and card.json, default: results/train",
    )


def command(arguments: argparse.Namespace) -> int:
    """Runs `keras-norm train`.

    Args:
        arguments: from a parser that `configure` has set up.

    Returns:
        Exit status: 0, or 2 after one line about what was wrong with the arguments.
    """
    recipe, out = RECIPES[arguments.recipe], Path(arguments.out)
    backup = out / "backup.npz"
    try:
        _check_seed_and_policy(arguments.seed, arguments.dtype_policy or recipe.dtype_policy)
        data = load(arguments.data, data_dir=arguments.data_dir, validation=arguments.validation)
        _require_writable(out)
        with locked(out):
            print(data)
            clear_remains(backup)
            outcome = _shown(recipe, data, arguments, backup)
            path = outcome.save(out)
            backup.unlink(missing_ok=True)
    except (ValueError, OSError, FolderInUseError) as error:
        reason = str(error)
        if full := no_room(error):
            reason = (
                f"--out: cannot write to {str(out)!r}: {full}. Make room: the same command goes on "
                "after the last finished epoch."
            )
        print(f"keras-norm: error: {' '.join(reason.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on after the last finished epoch.")
        return 130
    for name, value in outcome.metrics.items():
        print(f"{name:28} {value:.4f}")
    print(
        f"{outcome.seconds['training']:.0f} s of training in {outcome.dtype_policy}; "
        f"{path} and card.json are written"
    )
    return 0


def _require_writable(out: Path) -> None:
    """Refuses a folder that cannot be written before the training, whose result would be lost."""
    try:
        require_writable(out)
        for name in ("model.keras", "card.json"):
            if (out / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder there")
    except OSError as error:
        raise ValueError(f"--out: cannot write to {str(out)!r}: {error.strerror}") from None


def _shown(recipe: Recipe, data: datasets.Data, arguments: Any, backup: Path) -> Outcome:
    from tqdm import tqdm

    with tqdm(total=recipe.epochs, bar_format=_BAR) as bar:

        def show(epochs: float, metrics: Mapping[str, float]) -> None:
            bar.n = round(epochs, 2)
            if metrics:
                bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items()})
            bar.refresh()

        return train(
            recipe,
            data,
            seed=arguments.seed,
            backup=backup,
            on_epoch=show,
            dtype_policy=arguments.dtype_policy,
        )


_BAR = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs, {elapsed} < {remaining}{postfix}"

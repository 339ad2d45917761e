"""How long a recipe trains, and how accurate it is then: recipe x normalization x seeds.

    python benchmarks/time_to_accuracy.py --recipes cpu-4min --seeds 3
    python benchmarks/time_to_accuracy.py --normalizations fast keras --validation 5000
    python benchmarks/time_to_accuracy.py --recipes cpu-2min --members 2 --validation 1000
    KERAS_BACKEND=jax python benchmarks/time_to_accuracy.py --images 12000 --dtype-policy float32

Runs on any backend; with `--data-dir cifar10.npz` (keras_norm.datasets.pack) without TensorFlow.
Seconds are those of training, without compilation, and nothing else should be running. So that
they carry over to other machines, the floating-point operations stand beside them, and the rate at
which this machine multiplies matrices of 2048 x 2048 right before each run. Interrupted, it goes
on with the epoch that was not finished (of an ensemble, its first nets are trained anew).
"""

import argparse
import dataclasses
import functools
import logging
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_norm import quiet

quiet.start()

import keras
import numpy as np
from keras import ops
from options import at_least

from keras_norm import experiments, recipes

logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns where many nets are compiled

NORMALIZATIONS = {
    "fast": "fast",
    "keras": functools.partial(
        keras.layers.BatchNormalization, momentum=0.6, epsilon=1e-6, scale=False
    ),
    "none": None,
}
METRICS = (
    "training_seconds",
    "compilation_seconds",
    "data_seconds",
    "images_per_second",
    "tflop",
    "gflops",
    "matmul_gflops",
)


def matmul_rate(size=2048, turns=7):
    """GFLOP/s of a product of square float32 matrices; the median."""
    a = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(size, size)).astype("float32"))
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        ops.convert_to_numpy(ops.matmul(a, a)[:1, :1])
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / np.median(seconds) / 1e9


def measured(settings, seed, progress, *, data, out):
    """One training, or several for an ensemble, as `experiments.run` wants it."""
    recipe = dataclasses.replace(
        recipes.RECIPES[settings["recipe"]],
        normalization=NORMALIZATIONS[settings["normalization"]],
    )
    rate = matmul_rate()
    members = settings.get("members", 1)
    stem = f"{settings['recipe']}-{settings['normalization']}-{members}"
    outcomes = []

    def report(epochs, metrics):
        epochs += len(outcomes) * recipe.epochs
        if metrics:
            progress.epoch(int(epochs), members * recipe.epochs, **metrics)
        else:
            progress.part(epochs, members * recipe.epochs)

    backups = {
        member: out / f"{stem}-{member}.npz"
        for member in range(seed * members, (seed + 1) * members)
    }
    for member, backup in backups.items():
        outcomes.append(
            recipes.train(
                recipe,
                data,
                seed=member,
                backup=backup,
                on_epoch=report,
                dtype_policy=settings["dtype_policy"],
            )
        )
    for backup in backups.values():
        backup.unlink()
    seconds = {
        f"{name}_seconds": sum(outcome.seconds[name] for outcome in outcomes)
        for name in outcomes[0].seconds
    }
    operations = sum(outcome.costs["flops_training"] for outcome in outcomes)
    nets = [outcome.model for outcome in outcomes]
    metrics = outcomes[0].metrics if members == 1 else recipes.judge(nets, data, recipe.views)
    return {
        "history": outcomes[-1].history,
        "final": {
            **metrics,
            **seconds,
            "images_per_second": float(
                np.mean([outcome.costs["images_per_second"] for outcome in outcomes])
            ),
            "tflop": operations / 1e12,
            "gflops": operations / seconds["training_seconds"] / 1e9,
            "matmul_gflops": rate,
        },
    }


def resolved(policy):
    """The policy that "auto" stands for here."""
    return recipes.fastest_policy() if policy == "auto" else policy


def draw(results, part, path):
    """Accuracy against seconds of training, and against operations where they differ: a point for
    each run, a large mark for mean and spread."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    from keras_norm import plotting

    with plotting.style():
        operations = {name: results.values(name, "tflop").mean() for name in results.names}
        ticks = sorted({float(f"{number:.3g}") for number in operations.values()})
        metrics = ["training_seconds", "tflop"][: 2 if len(ticks) > 1 else 1]
        size = (5 * len(metrics), 4.2)
        figure, grid = pyplot.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
        panels = dict(zip(metrics, grid.flat, strict=True))
        for name in sorted(operations, key=operations.get):
            y = results.values(name, f"{part}_accuracy_views")
            spread = y.std(ddof=1) if len(y) > 1 else 0
            for metric, axes in panels.items():
                x = results.values(name, metric)
                line = axes.errorbar(
                    x.mean(),
                    y.mean(),
                    yerr=spread,
                    capsize=4,
                    markersize=7,
                    linestyle="",
                    label=f"{name} (n = {len(y)})",
                )
                axes.plot(x, y, ".", alpha=0.6, color=line[0].get_color())
        panels["training_seconds"].set(
            xlabel="seconds of training, without compilation",
            ylabel=f"{part} accuracy, six views",
        )
        if axes := panels.get("tflop"):
            axes.set(xlabel="10¹² floating-point operations of training", xscale="log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        note = "mean ± standard deviation; points: single runs"
        figure.legend(
            handles, labels, title=note, ncols=min(4, len(labels)), loc="outside lower center"
        )
        figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(figure)


def title(recipe, normalization, members):
    """What a run is called, so that those of several backends can share a folder."""
    backend = keras.backend.backend()
    others = (
        f"{members} nets" if members > 1 else None,
        normalization if normalization != "fast" else None,
        backend if backend != "tensorflow" else None,
    )
    return ", ".join([recipe, *(part for part in others if part is not None)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipes", nargs="+", choices=recipes.RECIPES, default=["cpu-4min"])
    parser.add_argument("--normalizations", nargs="+", choices=NORMALIZATIONS, default=["fast"])
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of them (default: 3)")
    parser.add_argument(
        "--members", type=at_least(1), default=1, help="nets whose logits are averaged (default: 1)"
    )
    parser.add_argument("--first-seed", type=at_least(0), default=0, help="seeds count up from it")
    parser.add_argument(
        "--validation", type=at_least(0), default=0, help="images held out to judge by"
    )
    parser.add_argument("--images", type=at_least(1), help="train on so many images (default: all)")
    parser.add_argument("--data", default="cifar10", help="data set (default: cifar10)")
    parser.add_argument("--data-dir", help="folder of tensorflow-datasets, or a packed .npz")
    parser.add_argument(
        "--dtype-policy", help="float32, mixed_bfloat16, auto, ... (default: the recipes')"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/time_to_accuracy")
    )
    arguments = parser.parse_args(argv)
    images, members = arguments.images, arguments.members
    data = recipes.load(
        arguments.data,
        data_dir=arguments.data_dir,
        validation=arguments.validation,
        subset=None if images is None else {"train": images},
    )
    print(data)
    settings = {
        title(name, norm, members): {
            "recipe": name,
            "normalization": norm,
            "epochs": members * recipes.RECIPES[name].epochs,
            **({"members": members} if members > 1 else {}),
            "dtype_policy": resolved(arguments.dtype_policy or recipes.RECIPES[name].dtype_policy),
            **{f"recipe_{k}": v for k, v in recipes.settings(recipes.RECIPES[name]).items()},
        }
        for name in arguments.recipes
        for norm in arguments.normalizations
    }
    train = functools.partial(measured, data=data, out=arguments.out)
    results = experiments.run(
        train,
        settings,
        range(arguments.first_seed, arguments.first_seed + arguments.seeds),
        out=arguments.out,
        title="Time to accuracy",
        context={"data": data.title, "images": len(data.train)},
    )
    part = "validation" if arguments.validation else "test"
    accuracies = [f"{part}_accuracy", f"{part}_accuracy_views"]
    print(results.table(accuracies, digits=4))
    print(results.table(METRICS, digits=1))
    draw(results, part, arguments.out / "time_to_accuracy.png")
    print(f"Written to {arguments.out}; {experiments.describe_machine()['summary']}")


if __name__ == "__main__":
    main()

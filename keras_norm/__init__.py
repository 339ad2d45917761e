"""Normalization for Keras, rebuilt from its equations: layers, statistics, models and lessons.

    import keras_norm

    keras_norm.layers.BatchNormalization()

A module is imported when it is first asked for: this one imports nothing, Keras least.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "autodiff",
    "callbacks",
    "corruptions",
    "datasets",
    "distributed",
    "ensembles",
    "experiments",
    "functional",
    "gradient_check",
    "inspection",
    "kernels",
    "layers",
    "models",
    "moments",
    "optimizers",
    "plotting",
    "quiet",
    "recipes",
    "research",
    "statistics",
    "tuning",
]

if TYPE_CHECKING:
    from keras_norm import (
        autodiff,
        callbacks,
        corruptions,
        datasets,
        distributed,
        ensembles,
        experiments,
        functional,
        gradient_check,
        inspection,
        kernels,
        layers,
        models,
        moments,
        optimizers,
        plotting,
        quiet,
        recipes,
        research,
        statistics,
        tuning,
    )
else:  # to a type checker a function of this name would make every name right

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Normalization for Keras, rebuilt from its equations: layers, statistics, models and lessons."""

__version__ = "0.1.0"

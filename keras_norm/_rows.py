"""An array as rows of channels, and what layers that normalize such rows have in common.

For decorrelated batch normalization and quantile normalization in `keras_norm.research`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_norm import autodiff, distributed, functional
from keras_norm._arrays import check_dense, python_axis
from keras_norm._moving import (
    MovingStatistics,
    check_dtype,
    check_switch,
    parameter_config,
    set_parameter_options,
    weights_of,
)
from keras_norm._rematerialization import decided, is_repeated
from keras_norm._state import LiveNumbers

__all__ = ["NormalizationByRows", "Rows", "elements_of", "share_of"]

Array = Any


class Rows(NamedTuple):
    """x as a matrix: a row for each position of each example, the channels in columns."""

    shape: tuple[Any, ...]  # of x, with the channels last
    channel: int  # the axis of the channels in x

    @classmethod
    def of(cls, x: Array, axis: int) -> "Rows":
        channel = functional.channel_axis(axis, len(x.shape))
        functional.known_sizes(tuple(x.shape), (channel,))
        shape = list(ops.shape(x))
        shape.append(shape.pop(channel))
        return cls(tuple(shape), channel)

    def split(self, x: Array, *columns: int) -> Array:
        """(N, ..., C) -> (M, *columns), where the columns multiply to C."""
        return ops.reshape(ops.moveaxis(x, self.channel, -1), [-1, *columns])

    def join(self, rows: Array) -> Array:
        """(M, ...) -> (N, ..., C)."""
        return ops.moveaxis(ops.reshape(rows, self.shape), -1, self.channel)

    def weights(self, weights: Array | None, dtype: str) -> Array | None:
        """(N, ..., 1) or smaller -> (M,)."""
        if weights is None:
            return None
        weights = ops.convert_to_tensor(weights)
        per_position = len(weights.shape) == len(self.shape) and (
            weights.shape[self.channel] == 1 or self.shape[-1] == 1
        )
        if not per_position:
            raise ValueError(
                "The channels are normalized together, or by ranks: a mask or weights must be "
                "the same for all channels of a position, of the rank of x and of size 1 on the "
                f"axis of the channels. Received: shape {tuple(weights.shape)} for channels on "
                f"axis {self.channel} of {len(self.shape)}. Use keepdims, or expand_dims."
            )
        weights = ops.moveaxis(ops.cast(weights, dtype), self.channel, -1)
        return ops.reshape(ops.broadcast_to(weights, [*self.shape[:-1], 1]), [-1])


def elements_of(rows: Array, weights: Array | None) -> Array:
    """The number of rows, or the sum of their weights; a scalar."""
    if weights is None:
        return ops.cast(ops.shape(rows)[0], rows.dtype)
    return ops.sum(weights)


def share_of(rows: Array, weights: Array | None) -> Array:
    """w / W, (M, 1, 1), or 1 / M, a scalar; 0 where nothing has a weight."""
    if weights is None:
        n = ops.shape(rows)[0]
        return 1 / max(n, 1) if isinstance(n, int) else 1 / ops.cast(ops.maximum(n, 1), rows.dtype)
    total = ops.sum(weights)
    return ops.reshape(weights / ops.where(total > 0, total, ops.ones_like(total)), [-1, 1, 1])


class NormalizationByRows(MovingStatistics):
    """What decorrelated batch and quantile normalization have in common."""

    def __init__(
        self,
        axis: int,
        momentum: float | None,
        epsilon: float,
        *,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        debiased: bool = False,
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.autocast = False  # `call` casts the inputs; weights in half precision would overflow
        check_dtype(self)
        self.axis = python_axis(axis)
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        set_parameter_options(
            self,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
        )
        self.debiased = debiased
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_count: Any = None
        self._traced = False  # whether a compiled function contains this layer
        self._live = LiveNumbers(momentum=0.0, rest=1.0, update=1.0)
        self.momentum = momentum
        self.update_statistics = update_statistics
        self.use_batch_statistics = use_batch_statistics

    # What may change after a function was compiled --------------------------------------------

    @property
    def use_batch_statistics(self) -> bool | None:
        """Whether to normalize by the batch's statistics; None: `training` decides."""
        return self._use_batch_statistics

    @use_batch_statistics.setter
    def use_batch_statistics(self, value: bool | None) -> None:
        check_switch("use_batch_statistics", value, (True, False, None))
        if self._traced:
            raise ValueError(
                "A function with this layer was compiled, and its choice of statistics with it. "
                f"Received: use_batch_statistics={value}. Set it before the first compiled call, "
                "or on a copy of the model by keras.models.clone_model."
            )
        self._use_batch_statistics = value

    # State ------------------------------------------------------------------------------------

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates gamma, beta and the moving statistics."""
        channel = functional.channel_axis(self.axis, len(input_shape))
        (channels,) = functional.known_sizes(input_shape, (channel,))
        self.gamma = self._add_parameter("gamma", (channels,)) if self.scale else None
        self.beta = self._add_parameter("beta", (channels,)) if self.center else None
        self._add_statistics(channels)
        if self.debiased or self.momentum is None:
            self.moving_count = self._add_statistic("moving_count", (), "zeros")
        self._build_switches()
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={channel: channels})

    def _add_statistics(self, channels: int) -> None:
        raise NotImplementedError

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        functional.channel_axis(self.axis, len(input_shape))
        return tuple(input_shape)

    # Forward ----------------------------------------------------------------------------------

    def _normalize(
        self, inputs: Array, training: bool | None, mask: Array | None, sample_weight: Array | None
    ) -> Array:
        check_dense(inputs)
        x = ops.cast(inputs, self.compute_dtype)
        updates = decided(training) and self.trainable
        if not self._traced and autodiff.is_traced(x):
            self._traced = True
        chosen = self.use_batch_statistics
        by_batch = updates if chosen is None else chosen
        if not (by_batch or updates):
            return self._by_moving(x)
        weights = weights_of(mask, sample_weight, x)
        y, *batch = self._by_batch(x, weights)
        if not by_batch:
            y = self._by_moving(x)  # by the statistics before this batch moves them
        if updates and not is_repeated():
            self._update([ops.stop_gradient(v) for v in batch], self._weight_of_batch(x, weights))
        return y

    def _by_batch(self, x: Array, weights: Array | None) -> tuple[Array, ...]:
        """y, and the statistics of the batch in the order of `_moving`."""
        raise NotImplementedError

    def _by_moving(self, x: Array) -> Array:
        raise NotImplementedError

    def _moving(self) -> list[Any]:
        raise NotImplementedError

    def _merged(self, batch: list[Array], share: Array) -> list[Array]:
        """The statistics of all replicas' batches; `share` is this replica's part of the weight."""
        return [distributed.all_sum(v * share) for v in batch]

    def _weight_of_batch(self, x: Array, weights: Array | None) -> Array:
        """The number of positions, or the sum of their weights."""
        rows = Rows.of(x, self.axis)
        if weights is not None:
            return ops.sum(rows.weights(weights, self._statistics_dtype))
        n = math.prod(rows.shape[:-1])
        return ops.cast(n, self._statistics_dtype)

    # The moving statistics --------------------------------------------------------------------

    def _update(self, batch: list[Array], weight: Array) -> None:
        """(B11), unless the switch or the batch says no."""
        now = self._live.read()
        if distributed.replicas() > 1:
            total = distributed.all_sum(weight)
            share = weight / ops.where(total > 0, total, ops.ones_like(total))
            batch, weight = self._merged(batch, share), total
        sound = functools.reduce(
            ops.logical_and, [ops.all(ops.isfinite(v)) for v in (*batch, weight)], weight > 0
        )
        update = now["update"] > 0.5
        moves = ops.logical_and(sound, update)
        self._live.count(ops.logical_xor(moves, update))
        keep, rest = now["momentum"], now["rest"]
        if self.moving_count is not None:
            count = ops.convert_to_tensor(self.moving_count) * keep + 1
            rest = 1 / count
            keep = 1 - rest
            self._assign(self.moving_count, count, moves)
        for variable, value in zip(self._moving(), batch, strict=True):
            old = ops.convert_to_tensor(variable)
            self._assign(variable, old * keep + ops.cast(value, variable.dtype) * rest, moves)

    # Configuration ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        names = ["axis", "momentum", "epsilon", "center", "scale"]
        names += ["debiased", "update_statistics", "use_batch_statistics"]
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config, **parameter_config(self)}

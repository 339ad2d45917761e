"""The Keras layers: variables, moving statistics, masks, dtype policy, config; no mathematics.

Import these in place of the layers of the same name in `keras.layers`:

    from keras_norm.layers import BatchNormalization

The layers of `keras_norm.research` can be imported from here as well.
"""

import functools
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import initializers, ops

from keras_norm import autodiff, distributed, functional, kernels
from keras_norm._arrays import check_dense, in_dtype, is_real, python_axis
from keras_norm._moving import (
    MovingStatistics,
    check_dtype,
    check_fraction,
    check_switch,
    parameter_config,
    set_parameter_options,
    weights_of,
)
from keras_norm._rematerialization import Draws, decided, is_repeated, known
from keras_norm._state import LiveNumbers, as_of_now

__all__ = [
    "BatchNormalization",
    "Dropout",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SpatialBatchNormalization",
]

Array = Any

_OF_RESEARCH = (
    "DecorrelatedBatchNormalization",
    "FilterResponseNormalization",
    "QuantileNormalization",
)

if TYPE_CHECKING:
    from keras_norm import research

    DecorrelatedBatchNormalization = research.DecorrelatedBatchNormalization
    FilterResponseNormalization = research.FilterResponseNormalization
    QuantileNormalization = research.QuantileNormalization
else:  # a type checker that saw a function of this name would accept every attribute

    def __getattr__(name: str) -> Any:
        if name in _OF_RESEARCH:
            from keras_norm import research  # only on request: it imports this module

            return getattr(research, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_RESEARCH})


@keras.saving.register_keras_serializable(package="keras_norm")
class BatchNormalization(MovingStatistics):
    """Normalizes each channel by the mean and variance of the batch, then scales and shifts it.

    In training, equations (B1) to (B5) of `keras_norm.functional`:

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with the mean and the biased variance of the batch, which also update the moving statistics:

        (B11)  moving_mean     <- momentum moving_mean     + (1 - momentum) mean
        (B12)  moving_variance <- momentum moving_variance + (1 - momentum) variance

    In inference the moving statistics take the place of the batch's. The gradient is the
    hand-derived one, (B6) to (B10). The keyword-only arguments, from `debiased` on, are not in
    `keras.layers.BatchNormalization`; with their defaults the two layers agree.

    Args:
        axis: int, the axis of the channels: -1 for channels last, 1 for images with channels
            first; or a tuple of axes, for one set of statistics per combination of their indices.
            Default: -1.
        momentum: float in [0, 1], weight of the old value in the moving statistics (PyTorch's
            momentum is 1 minus this); None for the equally weighted average over all batches so
            far. Can be changed at any time. Default: 0.99.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True.
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        moving_mean_initializer, moving_variance_initializer: likewise.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        renorm: bool, batch renormalization, (B17) to (B19): in training, too, the layer
            normalizes by moving statistics, with a correction that can be bounded. Default: False.
        renorm_clipping: dict of bounds of that correction, with the keys "rmax", "rmin", "dmax";
            a missing key means no bound. Default: none.
        renorm_momentum: float in [0, 1], momentum of those moving statistics. Default: 0.99.
        synchronized: bool, whether the replicas of a data-parallel step normalize by the
            statistics of the whole batch, merged by counts, (B13) to (B15): under
            `tf.distribute`, and under `torch.distributed`. On JAX with `keras.distribution`
            they always do. Default: False.
        debiased: bool, whether the first batch replaces the initial moving statistics: they are
            averages with the weights of (B11), divided by the sum of the weights. Default: False.
        unbiased: bool, whether the moving variance divides by N - 1, (B16). Default: False.
        virtual_batch_size: int >= 1, the largest number of examples normalized together in
            training (ghost batches; see `functional.ghost_batch_normalization`). The moving
            statistics still follow the whole batch. Default: the whole batch.
        train_parameters: bool, whether gamma and beta are trained. Default: True.
        update_statistics: bool, whether the moving statistics move in training. Default: True.
        use_batch_statistics: True to normalize by the batch in inference, too; False to
            normalize by the moving statistics in training, too; None to follow `training`.
            Default: None.
        warn_untouched: bool, whether to warn, once, when inference uses moving statistics that
            still have their initial values (on JAX outside of compiled functions only, and so
            not in `predict`). Default: False, because there are many good reasons to call a new
            model.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 1; (N, C), (N, H, W, C), ...
        training: bool. True normalizes by the batch and updates the moving statistics, unless
            `trainable` is False: a frozen layer is in inference mode, as in Keras.
        mask: bool array: elements where it is False do not count in the statistics, but are
            normalized like the rest. Any shape that broadcasts to the inputs; a mask of lower
            rank is aligned with their first axes, as Keras's masks are: (N,), (N, H, W).
        sample_weight: array of numbers >= 0, of such a shape: how much each element counts in
            the statistics. Constant for the gradient. Default: all count alike.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. moving_mean (C,), moving_variance (C,): updated in every
        call with `training=True` while the layer is trainable; with `renorm` also moving_stddev,
        renorm_mean and renorm_stddev (C,); with `momentum=None` or `debiased` also moving_count
        (C,), the sum of the weights so far. `get_weights()` gives them in this order, which is
        that of `keras.layers` for those that exist there. For several axes, C stands for the
        sizes of those axes, in their order in the inputs.

    Three switches, `train_parameters`, `update_statistics` and `use_batch_statistics`, are
    attributes beside `trainable` that can be read and set at any time; like `momentum`, they also
    act on functions that are already compiled:

        >>> layer = BatchNormalization(momentum=0.9)
        >>> layer.update_statistics = False
        >>> _ = layer(np.array([[1.0], [3.0]], "float32"), training=True)
        >>> float(layer.moving_mean.numpy()[0])
        0.0

    Without `train_parameters`, gamma and beta are not among `trainable_variables`, and their
    gradient in training is zero. (In a training function that is already compiled, an optimizer
    with momentum or weight decay keeps changing them by those; compile the model again, as for
    `trainable`. On JAX do so before the next `fit`, and never in a callback: Keras's training
    step ends in an error there, and the model's weights are lost.) One change can come too late,
    and then raises: `use_batch_statistics` cannot be set to True or False if it was None until a
    function that contains the layer was compiled, because such a function is compiled without
    the choice. `trainable = False` stops both the training of the parameters and the updates, and
    the layer normalizes by the moving statistics unless `use_batch_statistics` is True.

    A batch whose statistics are not finite, or in which nothing has weight, leaves all moving
    statistics as they are and is counted in `skipped_batches`; a channel without weight keeps
    its own. With one element per channel, the variance is 0: y is beta, no gradient reaches the
    inputs, and the moving variance moves towards 0.

    Rematerialized on PyTorch (`keras.RematScope`, `torch.utils.checkpoint`), a step moves the
    statistics once, though it calls the layer twice. With `renorm`, or with
    `use_batch_statistics=False`, the repeated call uses the moved statistics, and its gradient is
    off by as much. On TensorFlow, `tf.recompute_grad` gives no sign that a call is a repetition:
    there they move twice, as Keras's do.

    Raises:
        ValueError: for a momentum outside [0, 1], a negative epsilon, an axis that the inputs do
            not have, an integer or complex dtype, inputs whose channels are unknown, a mask or
            weights that do not broadcast to the inputs, wrong bounds of renormalization, a
            virtual batch size together with `renorm` or `synchronized`, and a `training` whose
            value is not known while the layer is traced.

    Example:
        >>> layer = BatchNormalization(momentum=0.9, epsilon=1e-5)
        >>> x = np.array([[1.0, 10.0], [3.0, 50.0]], "float32")
        >>> y = layer(x, training=True)
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> [v.astype(float).round(3).tolist() for v in layer.get_weights()[2:]]
        [[0.2, 3.0], [1.0, 40.9]]

    Numerics:
        Statistics are accumulated, and moving statistics kept, in at least float32; float16 and
        bfloat16 inputs give outputs of the same dtype. Agrees with `keras.layers` after 100
        training steps to 1e-9 in float64 and 1e-4 in float32. Even replicas that are not
        synchronized keep moving statistics of the whole batch, merged by counts.

    Reference:
        Ioffe and Szegedy, 2015, Batch Normalization, algorithms 1 and 2 (the paper's inference
        uses the unbiased variance; Keras and this layer by default the biased one). Ioffe, 2017,
        Batch Renormalization. Hoffer, Hubara and Soudry, 2017, section 4.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        debiased: bool = False,
        unbiased: bool = False,
        virtual_batch_size: int | None = None,
        train_parameters: bool = True,
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        warn_untouched: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.autocast = False  # `call` casts the inputs; weights in half precision would overflow
        check_dtype(self)
        functional.check_epsilon(epsilon)
        check_fraction("renorm_momentum", renorm_momentum)
        _check_renorm_clipping(renorm, renorm_clipping)
        _check_virtual_batch_size(virtual_batch_size, renorm, synchronized)
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
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.renorm = renorm
        self.renorm_clipping = renorm_clipping
        self.renorm_momentum = renorm_momentum
        self.synchronized = synchronized
        self.debiased = debiased
        self.unbiased = unbiased
        self.virtual_batch_size = None if virtual_batch_size is None else int(virtual_batch_size)
        self.warn_untouched = warn_untouched
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.moving_count: Any = None
        self._shortcut = kernels.BatchShortcut()
        self._warned = False
        self._traced = False  # whether a compiled function contains this layer
        self._chooses = False  # whether functions look up `use_batch_statistics` when they run
        self._live = LiveNumbers(  # the first four in the order of `kernels.training_step`
            momentum=0.0, rest=1.0, train=1.0, update=1.0, moving_in_training=0.0, moving=1.0
        )
        self.momentum = momentum
        self.train_parameters = train_parameters
        self.update_statistics = update_statistics
        self.use_batch_statistics = use_batch_statistics

    # What may change after a function was compiled --------------------------------------------

    @property
    def train_parameters(self) -> bool:
        """Whether gamma and beta are trained (while the layer is trainable)."""
        self._refresh()
        return self._train_parameters

    @train_parameters.setter
    def train_parameters(self, value: bool) -> None:
        check_switch("train_parameters", value, (True, False))
        self._refresh()
        self._live.update(train=float(value))
        self._train_parameters = value
        self._mark_parameters()

    @property
    def use_batch_statistics(self) -> bool | None:
        """Whether to normalize by the batch's statistics; None: `training` decides."""
        self._refresh()
        return self._use_batch_statistics

    @use_batch_statistics.setter
    def use_batch_statistics(self, value: bool | None) -> None:
        check_switch("use_batch_statistics", value, (True, False, None))
        self._refresh()
        if value is not None and self._traced and not self._chooses:
            raise ValueError(
                "A function with this layer was compiled for use_batch_statistics=None, without a "
                f"choice, and cannot be changed. Received: use_batch_statistics={value}. Pass it "
                "to the constructor, or set it before the first compiled call; from then on it "
                "can be changed at any time. (keras.models.clone_model makes a model whose layers "
                "are not compiled yet.)"
            )
        self._live.update(moving_in_training=float(value is False), moving=float(value is not True))
        self._chooses = self._chooses or value is not None
        self._use_batch_statistics = value

    def _take_over(self) -> None:
        super()._take_over()
        self._train_parameters = self._live["train"] > 0.5
        by_moving = self._live["moving_in_training"] > 0.5
        by_batch = self._live["moving"] < 0.5
        self._use_batch_statistics = True if by_batch else False if by_moving else None
        self._chooses = self._chooses or self._use_batch_statistics is not None
        self._mark_parameters()

    @property
    def trainable(self) -> bool:
        """If False, no parameter or moving statistic changes, and training acts as inference."""
        return bool(super().trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        for parameter in (self.gamma, self.beta):
            if parameter is not None:
                parameter.trainable = self.trainable and self.train_parameters

    # State ------------------------------------------------------------------------------------

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the variables, of the shape of the channels."""
        axes = functional.canonical_axes(self.axis, len(input_shape))
        shape = tuple(input_shape[a] for a in axes)
        if None in shape:
            raise ValueError(
                "The size of the normalized axis must be known when the layer is built. "
                f"Received: input_shape={tuple(input_shape)}, axis={self.axis}. Give the model "
                "an Input with the number of channels."
            )
        if self.virtual_batch_size is not None and 0 in axes:
            raise ValueError(
                "Ghost batches are made of consecutive examples: axis 0 cannot keep statistics "
                f"of its own. Received: axis={self.axis}, "
                f"virtual_batch_size={self.virtual_batch_size}."
            )
        self.gamma = self._add_parameter("gamma", shape) if self.scale else None
        self.beta = self._add_parameter("beta", shape) if self.center else None
        mean, variance = self.moving_mean_initializer, self.moving_variance_initializer

        def stddev(shape: Any, dtype: Any = None) -> Array:
            return ops.sqrt(variance(shape, dtype=dtype))

        self.moving_mean = self._add_statistic("moving_mean", shape, mean)
        self.moving_variance = self._add_statistic("moving_variance", shape, variance)
        if self.renorm:
            self.moving_stddev = self._add_statistic("moving_stddev", shape, stddev)
            self.renorm_mean = self._add_statistic("renorm_mean", shape, mean)
            self.renorm_stddev = self._add_statistic("renorm_stddev", shape, stddev)
        if self.debiased or self.momentum is None:
            self.moving_count = self._add_statistic("moving_count", shape, "zeros")
        self._build_switches()
        self._mark_parameters()
        self.input_spec = keras.layers.InputSpec(
            ndim=len(input_shape), axes={a: input_shape[a] for a in axes}
        )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        functional.canonical_axes(self.axis, len(input_shape))
        return tuple(input_shape)

    # Forward ----------------------------------------------------------------------------------

    def call(
        self,
        inputs: Array,
        training: bool | None = None,
        mask: Array | None = None,
        sample_weight: Array | None = None,
    ) -> Array:
        """Normalizes; see the class."""
        short = mask is None and sample_weight is None and not self._chooses
        y = self._by_shortcut(inputs, training) if short else None
        if y is None:
            y = self._in_full(inputs, training, mask, sample_weight)
            self._shortcut.learn(inputs, self.axis, self.gamma, self.beta)
        return y

    def _by_shortcut(self, inputs: Array, training: Any) -> Array | None:
        """As `_in_full`, for inputs whose choices were made before, on PyTorch; None for others."""
        if not self._shortcut.is_open_to(inputs) or training not in (True, False, None):
            return None
        if kernels.dtype_name(inputs.dtype) != self.compute_dtype:
            return None
        variables = self.moving_mean, self.moving_variance, self.gamma, self.beta
        if not (training and self.trainable):
            if self.warn_untouched and not self._warned:
                return None
            return self._shortcut.infer(inputs, *variables, self.epsilon)
        if self._does_more or not self.train_parameters or distributed.replicas() > 1:
            return None
        step = self._shortcut.step(inputs, *variables, self.epsilon)
        if step is None:
            return None
        y, mean, variance = step
        if is_repeated():
            return y
        if kernels.are_finite(mean, variance) is not True:
            self._update(_Batch(inputs, None, mean, variance), self._live.read())
            return y
        if rest := self._live["rest"]:  # 0 where the switch is off: nothing may be written then
            keep = self._live["momentum"]
            self._shortcut.move(self.moving_mean, mean, keep, rest)  # (B11)
            self._shortcut.move(self.moving_variance, variance, keep, rest)  # (B12)
        return y

    @property
    def _does_more(self) -> bool:
        """Whether a training step is more than (B1) to (B12), by the constructor's arguments."""
        more = self.renorm or self.unbiased or self.moving_count is not None
        return more or self.virtual_batch_size is not None

    def _in_full(
        self, inputs: Array, training: Any, mask: Array | None, sample_weight: Array | None
    ) -> Array:
        check_dense(inputs)
        x = in_dtype(inputs, self.compute_dtype)
        updates = decided(training) and self.trainable
        if not self._traced and autodiff.is_traced(x):
            self._traced = True
        if not (updates or self._chooses):
            return self._infer(x)
        weights = weights_of(mask, sample_weight, x)
        if updates and self._is_plain(x, weights):
            return self._normalize_and_move(x)
        now = self._live.read()
        use_moving: Any = False
        if self._chooses:
            use_moving = _decided(now["moving_in_training" if updates else "moving"])
        gamma, beta = _gated(self.gamma, self.beta, _decided(now["train"]))
        if self.renorm or (self.synchronized and distributed.replicas() > 1):
            y, *statistics = self._normalize_in_steps(x, weights, gamma, beta, use_moving, updates)
        else:
            y, *statistics = self._normalize_at_once(x, weights, gamma, beta, use_moving, updates)
        if updates and not is_repeated():
            self._update(_Batch(x, weights, *statistics), now)
        return y

    def _is_plain(self, x: Array, weights: Any) -> bool:
        """Whether a step is just (B1) to (B12), with a compiled kernel."""
        return (
            not (self._chooses or self._does_more)
            and weights is None
            and kernels.choose_for("batch_normalization", x, axis=self.axis, training=True)
            == "compiled"
            and distributed.replicas() == 1
        )

    def _normalize_and_move(self, x: Array) -> Array:
        """(B1) to (B12) in one kernel; otherwise `_gated`, `_normalize_at_once`, `_update`."""
        state = self.moving_mean, self.moving_variance, self._live.counter
        y, moved = kernels.training_step(
            x,
            self.gamma,
            self.beta,
            tuple(v.value for v in state),
            self._live.vector,
            epsilon=self.epsilon,
        )
        for variable, value in zip(state, moved, strict=True):
            variable.assign(value)
        return y

    def _infer(self, x: Array) -> Array:
        if self.warn_untouched and not self._warned:
            self._warn_if_untouched()
        return kernels.normalize(
            x,
            as_of_now(self.moving_mean),
            as_of_now(self.moving_variance),
            self.gamma,
            self.beta,
            axis=self.axis,
            epsilon=self.epsilon,
        )

    def _normalize_at_once(
        self, x: Array, weights: Any, gamma: Any, beta: Any, use_moving: Any, updates: bool
    ) -> tuple[Array, Array, Array]:
        """(y, mean, variance) in one differentiable function: the ordinary case."""
        options: dict[str, Any] = {"axis": self.axis, "epsilon": self.epsilon, "weights": weights}
        ghost = self.virtual_batch_size is not None and updates
        if not ghost and use_moving is False:
            return kernels.batch_normalization(x, gamma, beta, **options, training=updates)
        if (
            not ghost
            and kernels.choose_for("batch_normalization", x, axis=self.axis, weights=weights)
            != "composed"
        ):
            return self._normalize_by_kernel(x, gamma, beta, use_moving, updates)
        if use_moving is not False:
            options["given"] = as_of_now(self.moving_mean), as_of_now(self.moving_variance)
            options["use_given"] = use_moving
        if not ghost:
            return functional.batch_normalization(x, gamma, beta, **options)
        options["virtual_batch_size"] = self.virtual_batch_size
        return functional.ghost_batch_normalization(x, gamma, beta, **options)

    def _normalize_by_kernel(
        self, x: Array, gamma: Any, beta: Any, use_moving: Any, updates: bool
    ) -> tuple[Array, Array, Array]:
        """As above; a kernel computes its own statistics, so the switch chooses between paths."""
        where: dict[str, Any] = {"axis": self.axis, "epsilon": self.epsilon}

        def by_batch() -> tuple[Array, Array, Array]:
            return kernels.batch_normalization(x, gamma, beta, **where, training=updates)

        def by_moving() -> tuple[Array, Array, Array]:
            moving = as_of_now(self.moving_mean), as_of_now(self.moving_variance)
            y = functional.normalize(x, *moving, gamma, beta, **where)
            mean, variance = functional.moments(x, axis=self.axis)
            return y, ops.stop_gradient(mean), ops.stop_gradient(variance)

        if isinstance(use_moving, bool):
            return by_moving() if use_moving else by_batch()
        return ops.cond(use_moving, by_moving, by_batch)

    def _normalize_in_steps(
        self, x: Array, weights: Any, gamma: Any, beta: Any, use_moving: Any, updates: bool
    ) -> tuple[Array, Array, Array]:
        """(y, mean, variance) where the statistics are merged or corrected on their way to y."""
        mean, variance = functional.moments(x, axis=self.axis, weights=weights)
        if self.synchronized:
            weight, _ = functional.weight_sums(x, axis=self.axis, weights=weights)
            mean, variance, _ = functional.merge_moments(
                mean, variance, weight, distributed.all_sum
            )

        def unless_moving(v: Array, moving: Any) -> Array:
            if use_moving is False:
                return v
            moving = ops.stop_gradient(in_dtype(ops.convert_to_tensor(moving), v.dtype))
            return ops.where(use_moving, moving, v)

        if self.renorm and updates:
            r, d = functional.renormalization(
                mean,
                variance,
                self.renorm_mean,
                self.renorm_stddev,
                epsilon=self.epsilon,
                **(self.renorm_clipping or {}),
            )
            r, d = unless_moving(r, ops.ones_like(r)), unless_moving(d, ops.zeros_like(d))
            # (B19): gamma (r x_hat + d) + beta = (gamma r) x_hat + (gamma d + beta)
            gamma, beta = (None if v is None else in_dtype(v, r.dtype) for v in (gamma, beta))
            beta = (d if gamma is None else gamma * d) + (0 if beta is None else beta)
            gamma = r if gamma is None else gamma * r
        y = functional.normalize(
            x,
            unless_moving(mean, self.moving_mean),
            unless_moving(variance, self.moving_variance),
            gamma,
            beta,
            axis=self.axis,
            epsilon=self.epsilon,
        )
        return y, mean, variance

    # The moving statistics --------------------------------------------------------------------

    def _update(self, batch: "_Batch", now: dict[str, Array]) -> None:
        """(B11) and (B12), unless the switch or the batch says no."""
        update = _decided(now["update"])
        if update is False:
            return
        mean, variance, weight, squares = self._whole_batch(batch)
        moves = kernels.are_finite(mean, variance)
        if weight is not None:
            present = weight > 0  # (C,), or () where it is the same for all channels
            moves = ops.logical_and(moves, ops.any(present) if len(weight.shape) else present)
            if batch.weights is not None:
                moves = ops.logical_and(moves, ops.all(ops.isfinite(weight)))
        if moves is not True:
            self._live.count(ops.where(moves, 0.0, now["update"]))
        if weight is not None and len(weight.shape):
            moves = ops.logical_and(moves, present)
        keep, rest = now["momentum"], now["rest"]  # 1 and 0 where the switch is off
        if update is not True and (self.moving_count is not None or self.renorm):
            moves = ops.logical_and(moves, update)
        if self.moving_count is not None:
            count = ops.convert_to_tensor(self.moving_count) * keep + 1
            rest = 1 / count
            keep = 1 - rest
            self._assign(self.moving_count, count, moves)
        self._move(self.moving_mean, mean, keep, rest, moves)  # (B11)
        of_population = (
            functional.unbiased_variance(variance, weight, squares) if self.unbiased else variance
        )
        if not self.renorm:
            self._move(self.moving_variance, of_population, keep, rest, moves)  # (B12)
            return
        kept, moved = self.renorm_momentum, 1 - self.renorm_momentum
        self._move(self.renorm_mean, mean, kept, moved, moves)
        self._move(self.renorm_stddev, ops.sqrt(variance + self.epsilon), kept, moved, moves)
        stddev = ops.sqrt(of_population + self.epsilon)
        stddev = self._move(self.moving_stddev, stddev, keep, rest, moves)
        self._assign(self.moving_variance, ops.relu(stddev * stddev - self.epsilon), moves)

    def _whole_batch(self, batch: "_Batch") -> tuple[Array, Array, Any, Any]:
        """Statistics of what all replicas saw, and the sums of weights and of their squares.

        The last two are None where every channel surely has elements and the sums are not needed.
        """
        mean, variance = ops.stop_gradient(batch.mean), ops.stop_gradient(batch.variance)
        several = distributed.replicas() > 1
        if not (several or self.unbiased or batch.may_lack_weight(self.axis)):
            return mean, variance, None, None
        if batch.weights is None and not several:
            n = batch.elements(self.axis)  # () for all channels
            return mean, variance, n, n
        weight, squares = functional.weight_sums(batch.x, axis=self.axis, weights=batch.weights)
        if several and not self.synchronized:
            mean, variance, weight = functional.merge_moments(
                mean, variance, weight, distributed.all_sum
            )
            squares = distributed.all_sum(squares)
        elif several:
            weight, squares = distributed.all_sum(weight), distributed.all_sum(squares)
        return mean, variance, weight, squares

    def _move(self, variable: Any, value: Array, keep: Any, rest: Any, moves: Any) -> Array:
        # Multiply the tensor: on PyTorch, keras.Variable * float rounds the float to float32.
        old = ops.stop_gradient(variable.value)  # a tensor, read once
        value = old * keep + in_dtype(value, variable.dtype) * rest
        variable.assign(value if moves is True else ops.where(moves, value, old))
        return value

    def _warn_if_untouched(self) -> None:
        for variable, initializer in (
            (self.moving_mean, self.moving_mean_initializer),
            (self.moving_variance, self.moving_variance_initializer),
        ):
            value = autodiff.peek(variable)
            if value is None:
                return
            initial = autodiff.eagerly(functools.partial(_initial_value, variable, initializer))
            if (value != initial).any():
                self._warned = True  # no need to look again
                return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__} {self.name!r} normalizes by moving statistics that no batch "
            "has touched: they have their initial values. Train the model, load its weights, or "
            "call it with training=True.",
            stacklevel=2,
        )

    # Configuration ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {name: getattr(self, name) for name in _PLAIN_ARGUMENTS}
        for name in ("moving_mean", "moving_variance"):
            key = f"{name}_initializer"
            config[key] = initializers.serialize(getattr(self, key))
        return {**super().get_config(), **config, **parameter_config(self)}


_PLAIN_ARGUMENTS = (
    "axis",
    "momentum",
    "epsilon",
    "center",
    "scale",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
    "synchronized",
    "debiased",
    "unbiased",
    "virtual_batch_size",
    "train_parameters",
    "update_statistics",
    "use_batch_statistics",
    "warn_untouched",
)


class _Batch(NamedTuple):
    """What the moving statistics are updated from."""

    x: Array
    weights: Array | None
    mean: Array
    variance: Array

    def may_lack_weight(self, axis: Any) -> bool:
        """Whether a channel may have no element that counts: all masked, or an empty batch."""
        return self.weights is not None or not all(self._sizes(axis, self.x.shape))

    def elements(self, axis: Any) -> Array:
        """The number of elements of each channel, (), in the dtype of the statistics."""
        # Integers first: every product with a size that is not known yet adds an operation.
        sizes = sorted(self._sizes(axis, ops.shape(self.x)), key=lambda n: not isinstance(n, int))
        n = math.prod(sizes)
        return ops.cast(ops.convert_to_tensor(n), self.mean.dtype)

    def _sizes(self, axis: Any, shape: Sequence[Any]) -> list[Any]:
        channels = functional.canonical_axes(axis, len(shape))
        return [n for a, n in enumerate(shape) if a not in channels]


def _initial_value(variable: Any, initializer: Any) -> Any:
    return ops.convert_to_numpy(initializer(tuple(variable.shape), dtype=variable.dtype))


def _decided(number: Any) -> Any:
    """A switch as a bool where its value is known now, else as a boolean tensor."""
    return bool(number) if isinstance(number, float) else number > 0.5


def _gated(gamma: Any, beta: Any, trained: Any) -> tuple[Array | None, Array | None]:
    """gamma and beta, with a gradient only if they are trained."""
    given = [v for v in (gamma, beta) if v is not None]
    if trained is True or not given:
        return gamma, beta
    gated: Iterable[Array]
    if trained is False:
        gated = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in given]
    else:

        def backward(residuals: Any, upstream: Any) -> list[Array | None]:
            return [*(ops.where(residuals[0], dv, 0.0) for dv in upstream), None]

        gated = autodiff.custom_vjp(lambda *v: (v[:-1], v[-1:]), backward, *given, trained)
    gates = iter(gated)
    return None if gamma is None else next(gates), None if beta is None else next(gates)


def _check_renorm_clipping(renorm: bool, clipping: dict[str, float] | None) -> None:
    names = ("rmax", "rmin", "dmax")
    if clipping is not None and not isinstance(clipping, Mapping):
        raise ValueError(
            f"`renorm_clipping` must be a dict of bounds with keys of {names}. Received: "
            f"renorm_clipping={clipping!r}."
        )
    bounds = dict(clipping or {}) if renorm else {}
    if unknown := sorted(set(bounds) - set(names)):
        raise ValueError(
            f"Received invalid keys for `renorm_clipping`, whose keys are {names}. Received: "
            f"renorm_clipping={clipping} with {unknown}."
        )
    for name, bound in bounds.items():
        if bound is not None and not (is_real(bound) and not math.isnan(bound)):
            raise ValueError(
                "The bounds of `renorm_clipping` must be numbers, or None for no bound. Received: "
                f"{name}={bound!r}."
            )
    rmin, rmax, dmax = bounds.get("rmin"), bounds.get("rmax"), bounds.get("dmax")
    if rmin is not None and rmax is not None and rmax < rmin:
        raise ValueError(
            "rmax should be greater than rmin in `renorm_clipping`: they bound the ratio of "
            f"standard deviations. Received: rmax={rmax}, rmin={rmin}."
        )
    if rmax is not None and rmax <= 0:
        raise ValueError(
            "rmax should be positive in `renorm_clipping`: it bounds the ratio of standard "
            f"deviations, which are. Received: rmax={rmax}."
        )
    if dmax is not None and dmax < 0:
        raise ValueError(
            "dmax should be non-negative in `renorm_clipping`: it bounds the size of a shift. "
            f"Received: dmax={dmax}."
        )


def _check_virtual_batch_size(size: int | None, renorm: bool, synchronized: bool) -> None:
    if size is None:
        return
    functional.check_virtual_batch_size(size)
    if renorm or synchronized:
        raise ValueError(
            "Ghost batches are smaller than the batch on purpose; `synchronized` makes the batch "
            "larger and `renorm` corrects it to the population. Received: "
            f"virtual_batch_size={size}, renorm={renorm}, synchronized={synchronized}. Choose one."
        )


@keras.saving.register_keras_serializable(package="keras_norm")
class SpatialBatchNormalization(BatchNormalization):
    """Batch normalization of images: each channel by its statistics over examples and positions.

    `BatchNormalization` for the data layouts of Keras's convolutions. With x of shape
    (N, H, W, C), and likewise for sequences and volumes, equations (B1) to (B5):

        mean_c = (1 / N H W) sum over n, h, w of x[n, h, w, c]

    so that gamma and beta have C elements, not H W C: a channel is treated alike at every
    position, as in a convolution.

    Args:
        data_format: "channels_last" for (N, ..., C), "channels_first" for (N, C, ...). Default:
            `keras.config.image_data_format()`.
        **kwargs: any argument of `BatchNormalization` except `axis`.

    Call arguments, Returns, State, Numerics: as `BatchNormalization`.

    Raises:
        ValueError: for inputs that do not have 3, 4 or 5 dimensions, an unknown data format, an
            `axis`, and whatever `BatchNormalization` refuses.

    Example:
        >>> layer = SpatialBatchNormalization("channels_first", epsilon=0.0)
        >>> x = np.array([[[1.0, 3.0], [10.0, 50.0]]], "float32")  # (1, C, 2)
        >>> ops.convert_to_numpy(layer(x, training=True)).tolist()
        [[[-1.0, 1.0], [-1.0, 1.0]]]

    Reference:
        Ioffe and Szegedy, 2015, section 3.2.
    """

    def __init__(self, data_format: str | None = None, **kwargs: Any) -> None:
        if "axis" in kwargs:
            raise ValueError(
                "The axis of the channels follows from `data_format`. Received: "
                f"axis={kwargs['axis']!r}. Pass data_format, or use BatchNormalization."
            )
        if data_format not in (None, "channels_last", "channels_first"):
            raise ValueError(
                "`data_format` must be 'channels_last' or 'channels_first'. Received: "
                f"data_format={data_format!r}."
            )
        self_format = data_format or keras.config.image_data_format()
        super().__init__(axis=-1 if self_format == "channels_last" else 1, **kwargs)
        self.data_format = self_format

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the variables, one element for each channel."""
        self._check_rank(input_shape)
        super().build(input_shape)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        self._check_rank(input_shape)
        return super().compute_output_shape(input_shape)

    def _check_rank(self, input_shape: Sequence[int | None]) -> None:
        if not 3 <= len(input_shape) <= 5:
            raise ValueError(
                "Spatial normalization is for sequences, images and volumes with channels, of 3, "
                f"4 or 5 dimensions. Received: input_shape={tuple(input_shape)}. For (N, C) use "
                "BatchNormalization."
            )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = super().get_config()
        del config["axis"]
        return {**config, "data_format": self.data_format}


class _WithinExample(keras.layers.Layer):
    """What layer, RMS, group and instance normalization have in common."""

    def __init__(self, axis: Any, epsilon: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_dtype(self)
        functional.check_epsilon(epsilon)
        self.axis = python_axis(axis)
        self.epsilon = epsilon
        self._sizes: tuple[tuple[int, int], ...] = ()  # of the axes, where they are fixed
        self._shortcut: kernels.RowsShortcut | None = None
        self.supports_masking = True
        # Under a mixed policy, float32 inputs are normalized in float32, and the result rounded.
        self.autocast = False

    def _add_parameter(self, name: str, shape: Sequence[int]) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{name}_initializer", "ones"),
            regularizer=getattr(self, f"{name}_regularizer", None),
            constraint=getattr(self, f"{name}_constraint", None),
            autocast=False,
        )

    def _expect_sizes(self, input_shape: Sequence[int | None]) -> None:
        """Remembers the sizes of the axes: later inputs may differ in rank, not in these."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        sizes = ((a, input_shape[a]) for a in axes)
        self._sizes = tuple((a, n) for a, n in sizes if n is not None)

    def _check_sizes(self, shape: Sequence[int | None]) -> None:
        """What an `InputSpec` checks, but that takes a tenth of a small layer's time on PyTorch."""
        for axis, size in self._sizes:
            if not -len(shape) <= axis < len(shape) or shape[axis] not in (size, None):
                raise ValueError(
                    f"The input is incompatible with the layer {self.name!r}, which was built for "
                    f"the size {size} on axis {axis}. Received: inputs of shape {tuple(shape)}. "
                    "Make another layer for them."
                )

    def _floating(self, inputs: Array) -> Array:
        """The inputs in their own dtype if it is floating, else in that of the layer."""
        check_dense(inputs)
        x = kernels.tensor(inputs)
        if self._sizes:
            self._check_sizes(x.shape)
        is_float = keras.backend.is_float_dtype(kernels.dtype_name(x.dtype))
        return x if is_float else ops.cast(x, self.compute_dtype)

    def _by_shortcut(self, inputs: Array, gamma: Any, beta: Any = None) -> Array | None:
        if self._shortcut is None:
            return None
        return self._shortcut.take(inputs, gamma, beta, self.epsilon)

    def _remember(self, inputs: Array, gamma: Any, beta: Any = None) -> None:
        if self._shortcut is not None:
            self._shortcut.learn(inputs, gamma, beta)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        functional.canonical_axes(self.axis, len(input_shape))
        self._check_sizes(input_shape)
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "axis": self.axis, "epsilon": self.epsilon}


class _Affine(_WithinExample):
    """A normalization within each example, with gamma and beta."""

    def __init__(
        self,
        axis: Any = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis, epsilon, **kwargs)
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
        self.gamma = None
        self.beta = None

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {**super().get_config(), "center": self.center, "scale": self.scale}
        return {**config, **parameter_config(self)}


@keras.saving.register_keras_serializable(package="keras_norm")
class LayerNormalization(_Affine):
    """Normalizes each example by its own mean and variance, then scales and shifts it.

    In training and inference alike, equations (L1) to (L5) of
    `keras_norm.functional.layer_normalization`:

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with mean and variance over `axis`, for every index of the other axes. The gradient is the
    hand-derived one, (L6) to (L9). Unlike batch normalization, it does not depend on the other
    examples of the batch, so it suits batches of any size, and sequences.

    Args:
        axis: int, or list or tuple of int: the axes over which each example is normalized, and
            along which gamma and beta lie, in ascending order. Default: -1.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True.
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        rms_scaling: bool, y = gamma x / sqrt(variance + epsilon), without beta. Deprecated in
            Keras, and kept here for models saved with it; for RMS normalization use
            `RMSNormalization`. Default: False.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 1; (N, D), (N, T, D), (N, H, W, C), ... A Keras mask passes
            through unchanged; masked elements are normalized like the rest, and count in the
            statistics only if `axis` names the axis of the mask.
        training: bool, which does not change the result: on TensorFlow without a GPU, training
            steps are compiled by XLA where arrays are large. Default: set by `fit`.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma and beta, of the shape of the normalized axes: trained. `get_weights()` gives them
        in this order, as in `keras.layers`.

    Raises:
        TypeError: for an axis that is not an integer, list or tuple, as in Keras.
        ValueError: for a negative epsilon, an axis that the inputs do not have or that is named
            twice, an integer or complex dtype, a normalized axis of unknown size.

    Example:
        >>> layer = LayerNormalization(epsilon=1e-5)
        >>> y = layer(np.array([[1.0, 3.0], [10.0, 50.0]], "float32"))
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Numerics:
        Statistics are accumulated in at least float32, variables kept in the policy's variable
        dtype; float16 and bfloat16 inputs give outputs of the same dtype. In float32, a mean of
        1000 with a variance of 1 costs no digits (`keras.layers` computes
        x inv_std - mean inv_std there, the difference of two large numbers).

    Reference:
        Ba, Kiros and Hinton, 2016, Layer Normalization, section 3.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        rms_scaling: bool = False,
        **kwargs: Any,
    ) -> None:
        axis = python_axis(axis)
        _check_axis_type(axis)
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer,
            gamma_initializer,
            beta_regularizer,
            gamma_regularizer,
            beta_constraint,
            gamma_constraint,
            **kwargs,
        )
        self.rms_scaling = rms_scaling
        if not rms_scaling:
            self._shortcut = kernels.RowsShortcut("layer_normalization", axis)
        else:
            warnings.warn(
                "LayerNormalization(rms_scaling=True) divides by the standard deviation, not by "
                "the root mean square, and is deprecated. Use RMSNormalization.",
                stacklevel=2,
            )

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates gamma and beta, of the shape of the normalized axes."""
        axes = functional.canonical_axes(self.axis, len(input_shape))
        has_gamma = self.scale or self.rms_scaling
        has_beta = self.center and not self.rms_scaling
        if has_gamma:
            self.gamma = self._add_parameter("gamma", functional.known_sizes(input_shape, axes))
        if has_beta:
            self.beta = self._add_parameter("beta", functional.known_sizes(input_shape, axes))
        self._expect_sizes(input_shape)

    def call(self, inputs: Array, training: bool | None = None) -> Array:
        """Normalizes; see the class."""
        y = self._by_shortcut(inputs, self.gamma, self.beta)
        if y is None:
            y = kernels.layer_normalization(
                self._floating(inputs),
                self.gamma,
                self.beta,
                axis=self.axis,
                epsilon=self.epsilon,
                rms_scaling=self.rms_scaling,
                training=known(training),
            )
            self._remember(inputs, self.gamma, self.beta)
        return in_dtype(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "rms_scaling": self.rms_scaling}


def _check_axis_type(axis: Any) -> None:
    """Keras raises a TypeError here, and its users may rely on it."""
    axes = axis if isinstance(axis, list | tuple) else [axis]
    if not all(isinstance(a, int) for a in axes):
        raise TypeError(
            "Expected an int or a list/tuple of ints for the argument 'axis', the axes over which "
            f"the statistics are taken. Received: axis={axis!r}. For the last axis use axis=-1."
        )


@keras.saving.register_keras_serializable(package="keras_norm")
class RMSNormalization(_WithinExample):
    """Divides each example by its root mean square, then scales it.

    In training and inference alike, equations (R1) to (R4) of
    `keras_norm.functional.rms_normalization`:

        y = scale x / sqrt(mean(x^2) + epsilon)

    with the mean over `axis`. The gradient is the hand-derived one, (R5) and (R6). The layer costs
    less than layer normalization, because it has no mean and no beta.

    Args:
        axis: int, or list or tuple of int: the axes over which each example is normalized, and
            along which the scale lies, in ascending order. Default: -1.
        epsilon: float >= 0, added to the mean square. Default: 1e-6.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 1; (N, D), (N, T, D), ... A Keras mask passes through
            unchanged (with `keras.layers`' layer it is lost, with a warning).
        training: as in `LayerNormalization`.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        scale, of the shape of the normalized axes: trained, initially 1.

    Raises:
        TypeError: for an axis that is not an integer, list or tuple.
        ValueError: for a negative epsilon, an axis that the inputs do not have or that is named
            twice, an integer or complex dtype, a normalized axis of unknown size.

    Example:
        >>> layer = RMSNormalization()
        >>> ops.convert_to_numpy(layer(np.array([[3.0, -3.0]], "float32"))).round(3).tolist()
        [[1.0, -1.0]]

    Numerics:
        The mean square is accumulated in at least float32, the scale kept in the policy's
        variable dtype; float16 and bfloat16 inputs give outputs of the same dtype.

    Reference:
        Zhang and Sennrich, 2019, Root Mean Square Layer Normalization, section 4.
    """

    def __init__(
        self, axis: int | Sequence[int] = -1, epsilon: float = 1e-6, **kwargs: Any
    ) -> None:
        axis = python_axis(axis)
        _check_axis_type(axis)
        super().__init__(axis, epsilon, **kwargs)
        self.scale = None
        self._shortcut = kernels.RowsShortcut("rms_normalization", axis)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the scale, of the shape of the normalized axes."""
        axes = functional.canonical_axes(self.axis, len(input_shape))
        self.scale = self._add_parameter("scale", functional.known_sizes(input_shape, axes))
        self._expect_sizes(input_shape)

    def call(self, inputs: Array, training: bool | None = None) -> Array:
        """Normalizes; see the class."""
        y = self._by_shortcut(inputs, self.scale)
        if y is None:
            y = kernels.rms_normalization(
                self._floating(inputs),
                self.scale,
                axis=self.axis,
                epsilon=self.epsilon,
                training=known(training),
            )
            self._remember(inputs, self.scale)
        return in_dtype(y, self.compute_dtype)


class _ByChannel(_Affine):
    """A normalization within each example, with a gamma and a beta for each channel."""

    def __init__(self, axis: Any = -1, *args: Any, **kwargs: Any) -> None:
        one = isinstance(axis, list | tuple) and len(axis) == 1  # Keras sometimes stores it so
        super().__init__(axis[0] if one else axis, *args, **kwargs)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates gamma and beta, one for each channel."""
        self._check_shape(input_shape)
        shape = functional.known_sizes(input_shape, (self.axis,))
        if self.scale:
            self.gamma = self._add_parameter("gamma", shape)
        if self.center:
            self.beta = self._add_parameter("beta", shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={self.axis: shape[0]})

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        functional.channel_axis(self.axis, len(input_shape))


@keras.saving.register_keras_serializable(package="keras_norm")
class GroupNormalization(_ByChannel):
    """Normalizes groups of channels of each example by their own mean and variance.

    In training and inference alike, equations (GN1) to (GN3) of
    `keras_norm.functional.group_normalization`: consecutive channels are divided into `groups`,
    and

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with mean and variance over the positions and channels of each group, and gamma and beta for
    each channel. The gradient is the hand-derived one, (GN4) and (GN5). With one group it is layer
    normalization over channels and positions, except for gamma and beta; with as many groups as
    channels it is instance normalization.

    Args:
        groups: int >= 1 that divides the number of channels; -1 for as many groups as channels;
            or None for the greatest common divisor of 32 and the number of channels, which fits
            every network (not in Keras). Default: 32.
        axis: int, the axis of the channels, not 0: -1 for channels last, 1 for images with
            channels first. Default: -1.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True.
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 2; (N, C), (N, T, C), (N, H, W, C), ... A Keras mask passes
            through unchanged; the positions that it masks count in the statistics.
        training: as in `LayerNormalization`.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype.

    State:
        gamma (C,), beta (C,): trained. `get_weights()` gives them in this order, as in
        `keras.layers`.

    Raises:
        ValueError: for groups that do not divide the channels, an axis that the inputs do not
            have or that is 0, a negative epsilon, an integer or complex dtype, inputs whose
            channels are unknown.

    Example:
        >>> layer = GroupNormalization(groups=2, epsilon=1e-5)
        >>> y = layer(np.array([[1.0, 3.0, 10.0, 50.0]], "float32"))
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Numerics:
        As `LayerNormalization`. `groups` stays as it was given (in `keras.layers`, `build`
        replaces -1 by the number of channels).

    Reference:
        Wu and He, 2018, Group Normalization, section 3.
    """

    def __init__(
        self,
        groups: int | None = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        functional.check_groups(groups)
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer,
            gamma_initializer,
            beta_regularizer,
            gamma_regularizer,
            beta_constraint,
            gamma_constraint,
            **kwargs,
        )
        self.groups = None if groups is None else int(groups)

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        super()._check_shape(input_shape)
        (channels,) = functional.known_sizes(input_shape, (self.axis,))
        functional.number_of_groups(self.groups, channels)

    def call(self, inputs: Array, training: bool | None = None) -> Array:
        """Normalizes; see the class."""
        y = kernels.group_normalization(
            self._floating(inputs),
            self.gamma,
            self.beta,
            groups=self.groups,
            axis=self.axis,
            epsilon=self.epsilon,
            training=known(training),
        )
        return in_dtype(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        return {**super().get_config(), "groups": self.groups}


@keras.saving.register_keras_serializable(package="keras_norm")
class InstanceNormalization(_ByChannel):
    """Normalizes each channel of each example by its own mean and variance.

    In training and inference alike, equations (I1) and (I2) of
    `keras_norm.functional.instance_normalization`:

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    with mean and variance over the positions, and gamma and beta for each channel. The gradient
    is the hand-derived one, (I3) and (I4). It removes the contrast of an image, which made it the
    normalization of style transfer. Keras has no layer of this name; it equals
    `GroupNormalization(groups=-1)`, except that it refuses inputs without positions.

    Args:
        axis: int, the axis of the channels, not 0: -1 for channels last, 1 for images with
            channels first. Default: -1.
        epsilon: float >= 0, added to the variance. Default: 1e-3 (PyTorch's is 1e-5).
        center: bool, whether there is a beta. Default: True.
        scale: bool, whether there is a gamma. Default: True. (PyTorch has neither by default.)
        beta_initializer, gamma_initializer: Keras initializers. Default: zeros and ones.
        beta_regularizer, gamma_regularizer: Keras regularizers. Default: none.
        beta_constraint, gamma_constraint: Keras constraints. Default: none.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: array of any rank >= 3; (N, T, C), (N, H, W, C), (N, D, H, W, C), ... A Keras
            mask passes through unchanged; the positions that it masks count in the statistics.
        training: as in `LayerNormalization`.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype. With a single position, the
        variance is 0 and the output is beta.

    State:
        gamma (C,), beta (C,): trained; `get_weights()` gives them in this order.

    Raises:
        ValueError: for inputs without positions, an axis that the inputs do not have or that is
            0, a negative epsilon, an integer or complex dtype, inputs whose channels are unknown.

    Example:
        >>> layer = InstanceNormalization(epsilon=1e-5)
        >>> y = layer(np.array([[[1.0, 10.0], [3.0, 50.0]]], "float32"))  # (N=1, T=2, C=2)
        >>> ops.convert_to_numpy(y).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Numerics:
        As `LayerNormalization`.

    Reference:
        Ulyanov, Vedaldi and Lempitsky, 2016, Instance Normalization: The Missing Ingredient for
        Fast Stylization, section 2.
    """

    def _check_shape(self, input_shape: Sequence[int | None]) -> None:
        super()._check_shape(input_shape)
        functional.check_spatial(len(input_shape))

    def call(self, inputs: Array, training: bool | None = None) -> Array:
        """Normalizes; see the class."""
        y = kernels.instance_normalization(
            self._floating(inputs),
            self.gamma,
            self.beta,
            axis=self.axis,
            epsilon=self.epsilon,
            training=known(training),
        )
        return in_dtype(y, self.compute_dtype)


# Dropout -----------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_norm")
class Dropout(keras.layers.Layer):
    """Sets a random fraction of its inputs to zero in training, and scales up the rest.

    Equations (D1) to (D3) of `keras_norm.functional.dropout`, inverted dropout:

        y = x / (1 - rate) with probability 1 - rate, else 0

    so that the expectation of y is x, and inference returns the inputs unchanged, to the last
    bit. The gradient is the hand-derived one, (D4): that of the units kept, with the same scale.

    Args:
        rate: float in [0, 1], the fraction of the inputs set to zero; with 1, all of them. Courses
            often give the keep probability p instead: rate = 1 - p.
        noise_shape: tuple or list of integers >= 1 or None: the shape of the mask, which is then
            broadcast to the inputs; None stands for their own size on that axis. With
            (None, 1, None), all time steps of (N, T, D) lose the same features. Default: the
            inputs' shape.
        seed: int, for the same masks in every run. (They are not always those of
            `keras.layers.Dropout` with the same seed.) Default: from
            `keras.utils.set_random_seed`.
        **kwargs: of every Keras layer: `name`, `dtype`, `trainable` (without effect, as in Keras).

    Call arguments:
        inputs: array of any shape, of a floating dtype.
        training: bool. True drops out; False returns the inputs. Default: False, or what `fit`,
            `evaluate` and `predict` set.

    Returns:
        Array of the inputs' shape, in the layer's compute dtype. A Keras mask passes through.

    State:
        A `keras.random.SeedGenerator` (unless the rate is 0), which advances with every call in
        training: two calls drop out different units, on every backend, with or without a seed. A
        `.keras` file stores it, so that training resumes with the masks that would have come
        next (with `keras.layers.Dropout` they start over); a weights file, whose layout is that of
        `keras.layers`, does not. Rematerialized on PyTorch, the backward pass repeats the mask of
        the forward pass; to recognize the call, each draws a number from PyTorch's own generator.

    Raises:
        ValueError: for a rate outside [0, 1], a noise_shape that holds anything but integers
            >= 1 and None, or that does not broadcast to the inputs, integer inputs in training,
            and a `training` whose value is not known while the layer is traced.

    Example:
        >>> layer = Dropout(rate=0.5, seed=1)
        >>> x = np.ones((2, 1000), "float32")
        >>> y = np.asarray(layer(x, training=True))
        >>> np.unique(y).tolist(), bool(abs(y.mean() - 1) < 0.1)
        ([0.0, 2.0], True)
        >>> bool((np.asarray(layer(x, training=False)) == x).all())
        True

    Numerics:
        The mask is drawn in float32 and the scaling done in at least float32, whatever the dtype
        policy.

    Reference:
        Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, 2014, Dropout: A Simple Way
        to Prevent Neural Networks from Overfitting, section 4; section 10 for the scaling.
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        functional.check_rate(rate)
        self.rate = rate
        self.noise_shape = _checked_noise_shape(noise_shape)
        self.seed = seed
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)
            self._draws = Draws()
        self.supports_masking = True
        self._build_at_init()

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        return tuple(input_shape)

    def call(self, inputs: Array, training: bool = False) -> Array:
        """Drops out; see the class."""
        check_dense(inputs)
        if not decided(training) or self.rate == 0:
            return inputs
        with self._draws.of(self.seed_generator):
            mask = functional.dropout_mask(self._mask_shape(inputs), self.rate, self.seed_generator)
        return functional.dropout(inputs, mask, self.rate)

    def _mask_shape(self, inputs: Array) -> tuple[Any, ...]:
        sizes = ops.shape(inputs)
        if self.noise_shape is None:
            return tuple(sizes)
        functional.check_mask_shape(self.noise_shape, tuple(inputs.shape))
        return tuple(sizes[i] if n is None else n for i, n in enumerate(self.noise_shape))

    def save_assets(self, dir_path: str) -> None:
        """Writes the state of the seed generator beside the weights of a `.keras` file."""
        if self.rate > 0:
            state = ops.convert_to_numpy(self.seed_generator.state)
            Path(dir_path, _STATE_OF_DROPOUT).write_text(json.dumps(state.tolist()))

    def load_assets(self, dir_path: str | None) -> None:
        """Reads the state of the seed generator; a file without it leaves it unchanged."""
        file = Path(dir_path or "", _STATE_OF_DROPOUT)
        if self.rate > 0 and dir_path and file.exists():
            state = self.seed_generator.state
            state.assign(np.array(json.loads(file.read_text()), state.dtype))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as Keras serializes them."""
        config = {"rate": self.rate, "noise_shape": self.noise_shape, "seed": self.seed}
        return {**super().get_config(), **config}


_STATE_OF_DROPOUT = "seed_generator.json"


def _checked_noise_shape(noise_shape: Any) -> tuple[int | None, ...] | None:
    if noise_shape is None:
        return None
    expected = None
    if isinstance(noise_shape, str) or not isinstance(noise_shape, Iterable):
        expected = "a tuple or list of integers"
    else:
        noise_shape = tuple(noise_shape)
        given = [n for n in noise_shape if n is not None]
        if not all(isinstance(n, int) for n in given):
            expected = "all elements to be integers or None"
        elif not all(n > 0 for n in given):
            expected = "all dimensions to be positive integers or None"
    if expected is not None:
        raise ValueError(
            f"Invalid value received for argument `noise_shape`. Expected {expected}. "
            f"Received: noise_shape={noise_shape!r}. Use 1 on the axes that share a mask, and "
            "None on the others."
        )
    return tuple(noise_shape)


# At the end, as it is built on this module; imported so that models saved with its layers load.
import keras_norm.research  # noqa: E402, F401

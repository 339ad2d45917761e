"""Update rules written out from their equations, and the learning-rate schedules they use.

Each rule comes twice: as a pure function of arrays, `adam_step(w, dw, state, ...) -> (w, state)`,
whose lines are the published equations, and as a `keras.optimizers.Optimizer` that applies the
same function to the variables of a model. With w the weights, dw the gradient of the loss:

    gradient descent   (S1)  g = dw + l2_decay w                   (no decay by default: g = dw)
                       (S2)  w <- w - learning_rate g
    momentum           (M1)  velocity <- momentum velocity - learning_rate g
                       (M2)  w <- w + velocity
    Nesterov           (N1)  velocity <- momentum velocity - learning_rate g
                       (N2)  w <- w + momentum velocity - learning_rate g
    AdaGrad            (G1)  accumulator <- accumulator + dw^2
                       (G2)  w <- w - learning_rate dw / sqrt(accumulator + epsilon)
    RMSProp            (R1)  mean_square <- rho mean_square + (1 - rho) dw^2
                       (R2)  w <- w - learning_rate dw / sqrt(mean_square + epsilon)
    Adam               (A1)  t <- t + 1
                       (A2)  m <- beta_1 m + (1 - beta_1) dw
                       (A3)  v <- beta_2 v + (1 - beta_2) dw^2
                       (A4)  correction = sqrt(1 - beta_2^t) / (1 - beta_1^t)
                       (A5)  w <- w - learning_rate correction m / (sqrt(v) + epsilon)
    AdamW              (D1)  w <- w - learning_rate weight_decay w,   then (A1) to (A5)
    Muon               (U1)  velocity <- momentum velocity + dw
                       (U2)  g = dw + momentum velocity
                       (U3)  w <- w sqrt(columns) / ||w||
                       (U4)  w <- w - learning_rate orthogonal(g)

Where epsilon sits: as in Keras. The published AdaGrad and RMSProp have it outside the root,
sqrt(mean_square) + epsilon; inside, it acts like sqrt(epsilon) where the gradients vanish, so
1e-7 here corresponds to about 3e-4 there. Adam has the form at the end of section 2 of its paper;
the paper's algorithm 1, m_hat / (sqrt(v_hat) + epsilon), is the same with (A5)'s epsilon divided
by sqrt(1 - beta_2^t), a factor of 32 in the first step and of 1 in the end.

Two kinds of decay. `weight_decay` (all rules) is Keras's, decoupled from the gradient: (D1)
comes before the step and never enters the velocity or the moments. `l2_decay` (`SGD`) is coupled,
like PyTorch's `weight_decay`: (S1) adds the gradient of l2_decay / 2 sum(w^2), which passes through
the momentum. Under a constant learning rate a velocity sums about 1 / (1 - momentum) steps, so a
decoupled decay of l2_decay / (1 - momentum) shrinks the weights about as fast.

Where the learning rate sits. Inside the velocity (M1), as in Keras; PyTorch multiplies the
velocity by it when the weights move. Under a constant rate the two take the same steps.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_norm._arrays import is_integer, is_real

__all__ = [
    "SGD",
    "Adagrad",
    "AdagradState",
    "Adam",
    "AdamState",
    "AdamW",
    "CyclicalLearningRate",
    "MomentumState",
    "Muon",
    "PiecewiseLinear",
    "RMSprop",
    "RMSpropState",
    "adagrad_step",
    "adam_step",
    "adamw_step",
    "decay_step",
    "momentum_step",
    "muon_step",
    "nesterov_step",
    "orthogonal",
    "rmsprop_step",
    "sgd_step",
]

# Maxima are taken with `ops.where` here: on PyTorch Keras 3.15's `ops.maximum` turns float64
# into float32.
Array = Any
Pattern = str | Callable[[Any], bool]
Rates = Mapping[Pattern, float]


# The rules as functions of arrays --------------------------------------------------------------


class MomentumState(NamedTuple):
    """The state of momentum: `velocity`, shaped like the weights."""

    velocity: Array


class AdagradState(NamedTuple):
    """The state of AdaGrad: `accumulator`, the sum of all squared gradients."""

    accumulator: Array


class RMSpropState(NamedTuple):
    """The state of RMSProp: `mean_square`; with momentum `velocity`; if centered `mean`."""

    mean_square: Array
    velocity: Array | None = None
    mean: Array | None = None


class AdamState(NamedTuple):
    """The state of Adam: steps `t`, moments `m` and `v`; with AMSGrad the largest v, `v_max`."""

    t: Array
    m: Array
    v: Array
    v_max: Array | None = None


def sgd_step(
    w: Array,
    dw: Array,
    state: None = None,
    *,
    learning_rate: float | Array,
    l2_decay: float = 0.0,
) -> tuple[Array, None]:
    """One step of gradient descent.

        (S1)  g = dw + l2_decay w
        (S2)  w <- w - learning_rate g

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: None; here so that all rules are called alike.
        learning_rate: float or scalar array of w's dtype.
        l2_decay: float >= 0, coupled decay. Default: 0.

    Returns:
        (w, None), `w` with unchanged shape and dtype.

    Example:
        >>> import numpy as np
        >>> w, _ = sgd_step(np.array([1.0, 2.0]), np.array([0.5, -0.5]), learning_rate=0.5)
        >>> [float(value) for value in w]
        [0.75, 2.25]

    Numerics: computed in w's dtype.

    Reference: Robbins and Monro, 1951, A Stochastic Approximation Method.
    """
    w, dw = _tensors(w, dw)
    g = dw + l2_decay * w if l2_decay else dw  # (S1)
    return w - learning_rate * g, None  # (S2)


def momentum_step(
    w: Array,
    dw: Array,
    state: MomentumState | None = None,
    *,
    learning_rate: float | Array,
    momentum: float = 0.9,
    l2_decay: float = 0.0,
) -> tuple[Array, MomentumState]:
    """One step of gradient descent with momentum, Polyak's heavy ball.

        (S1)  g = dw + l2_decay w
        (M1)  velocity <- momentum velocity - learning_rate g
        (M2)  w <- w + velocity

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `MomentumState`, or None before the first step: velocity 0.
        learning_rate: float or scalar array of w's dtype.
        momentum: float in [0, 1], weight of the old velocity. Default: 0.9.
        l2_decay: float >= 0, coupled decay. Default: 0.

    Returns:
        (w, state), arrays with the shape and dtype of `w`.

    Example:
        >>> import numpy as np
        >>> w, state = np.array([1.0]), None
        >>> for _ in range(2):
        ...     w, state = momentum_step(w, np.array([1.0]), state, learning_rate=0.5, momentum=0.5)
        >>> float(w[0]), float(state.velocity[0])
        (-0.25, -0.75)

    Numerics: computed in w's dtype; as Keras's `SGD` to 1e-6 (float32) and 1e-12 (float64)
    after 100 steps.

    Reference: Polyak, 1964, Some Methods of Speeding up the Convergence of Iteration Methods.
    """
    w, dw = _tensors(w, dw)
    (velocity,) = MomentumState(ops.zeros_like(w)) if state is None else _tensors(*state)
    g = dw + l2_decay * w if l2_decay else dw  # (S1)
    velocity = momentum * velocity - learning_rate * g  # (M1)
    return w + velocity, MomentumState(velocity)  # (M2)


def nesterov_step(
    w: Array,
    dw: Array,
    state: MomentumState | None = None,
    *,
    learning_rate: float | Array,
    momentum: float = 0.9,
    l2_decay: float = 0.0,
) -> tuple[Array, MomentumState]:
    """One step of gradient descent with Nesterov's momentum.

        (S1)  g = dw + l2_decay w
        (N1)  velocity <- momentum velocity - learning_rate g
        (N2)  w <- w + momentum velocity - learning_rate g

    Nesterov takes the gradient at the point where the velocity is about to carry the weights.
    Here `w` is that point: the weights of the original plus momentum times the velocity, which
    is what a network holds between its steps.

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `MomentumState`, or None before the first step: velocity 0.
        learning_rate: float or scalar array of w's dtype.
        momentum: float in [0, 1], weight of the old velocity. Default: 0.9.
        l2_decay: float >= 0, coupled decay. Default: 0.

    Returns:
        (w, state), arrays with the shape and dtype of `w`.

    Example:
        >>> import numpy as np
        >>> w, state = np.array([1.0]), None
        >>> for _ in range(2):
        ...     w, state = nesterov_step(w, np.array([1.0]), state, learning_rate=0.5, momentum=0.5)
        >>> float(w[0]), float(state.velocity[0])
        (-0.625, -0.75)

    Numerics: computed in w's dtype; as Keras's `SGD(nesterov=True)` to 1e-6 (float32) and
    1e-12 (float64) after 100 steps.

    Reference: Nesterov, 1983, A Method for Solving the Convex Programming Problem with
    Convergence Rate O(1/k^2); in this form Bengio, Boulanger-Lewandowski and Pascanu, 2013,
    Advances in Optimizing Recurrent Networks, section 3.5.
    """
    w, dw = _tensors(w, dw)
    (velocity,) = MomentumState(ops.zeros_like(w)) if state is None else _tensors(*state)
    g = dw + l2_decay * w if l2_decay else dw  # (S1)
    velocity = momentum * velocity - learning_rate * g  # (N1)
    return w + momentum * velocity - learning_rate * g, MomentumState(velocity)  # (N2)


def orthogonal(g: Array, ns_steps: int = 3) -> Array:
    """Approximates the orthogonal matrix nearest to g: pushes its singular values towards 1.

    With g = U S V^T, the iteration changes S alone and keeps U and V:

        (U5)  x = g / ||g||
        (U6)  x <- 3.4445 x - 4.775 (x x^T) x + 2.0315 (x x^T)^2 x      so often

    Args:
        g: (..., C), taken as a matrix of C columns, with the other axes flattened into rows.
        ns_steps: int >= 1, Newton-Schulz iterations, of (U6). 3 bring singular values of .1 and
            more to between .6 and 1.3; 5 those of .01 and more. Default: 3.

    Returns:
        An array of g's shape and dtype; zero if g is zero.

    Example:
        >>> import numpy as np
        >>> x = ops.convert_to_numpy(orthogonal(np.diag([3.0, 1.0, 2.0]), ns_steps=5))
        >>> bool(abs(np.diag(x) - 1).max() < 0.35), bool(abs(x - np.diag(np.diag(x))).max() < 1e-9)
        (True, True)

    Numerics: the polynomial does not converge to 1: it rises fast and then stays in the band.
    Matrix products are in g's dtype, on the shorter side. A long matrix is multiplied only twice:
    (U6) is followed on the small x x^T, along with the factor by which x is multiplied at the end.
    In float32 that loses 1e-5 of the largest entry in 3 iterations, 5e-4 in 5.

    Reference: Jordan et al., 2024, Muon: an optimizer for hidden layers in neural networks.
    """
    g = ops.convert_to_tensor(g)
    x = ops.reshape(g, (-1, g.shape[-1]))  # (R, C)
    tall = x.shape[0] > x.shape[1]
    x = ops.transpose(x) if tall else x  # (shorter, longer)
    x = x / (ops.sqrt(ops.sum(ops.square(x))) + 1e-7)  # (U5)
    a = ops.matmul(x, ops.transpose(x))
    # Clearly longer than wide: following (U6) on the small x x^T is cheaper.
    if 2 * x.shape[1] > 3 * x.shape[0]:
        factor = None
        for step in range(ns_steps):
            p = 3.4445 * ops.eye(x.shape[0], dtype=x.dtype) + _of_gram(a)
            factor = p if factor is None else ops.matmul(p, factor)
            if step + 1 < ns_steps:
                a = ops.matmul(p, ops.matmul(a, p))  # x x^T of the next x
        x = ops.matmul(factor, x)
    else:
        for step in range(ns_steps):
            a = ops.matmul(x, ops.transpose(x)) if step else a
            x = 3.4445 * x + ops.matmul(_of_gram(a), x)  # (U6)
    return ops.reshape(ops.transpose(x) if tall else x, g.shape)


def _of_gram(a: Array) -> Array:
    """The factor of x in (U6) without its first term, with a = x x^T."""
    return -4.775 * a + 2.0315 * ops.matmul(a, a)


def muon_step(
    w: Array,
    dw: Array,
    state: MomentumState | None = None,
    *,
    learning_rate: float | Array,
    momentum: float = 0.6,
    nesterov: bool = True,
    ns_steps: int = 3,
    normalize: bool = True,
) -> tuple[Array, MomentumState]:
    """One step of Muon: along the gradient with momentum, made orthogonal.

        (U1)  velocity <- momentum velocity + dw
        (U2)  g = dw + momentum velocity          with nesterov, else g = velocity
        (U3)  w <- w sqrt(C) / ||w||              with normalize
        (U4)  w <- w - learning_rate orthogonal(g)

    The matrix moves equally far in all directions, even those in which the gradient is small.

    Args:
        w: weights (..., C), a matrix of C columns, such as a convolution's kernel (H, W, C_in, C).
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `MomentumState`, or None before the first step: velocity 0.
        learning_rate: float or scalar array of w's dtype.
        momentum: float in [0, 1], weight of the old velocity. Default: 0.6.
        nesterov: bool, whether to use Nesterov's momentum. Default: True.
        ns_steps: int >= 1, of `orthogonal`. Default: 3.
        normalize: bool, whether the weights keep the norm of an orthogonal matrix: for layers
            whose scale does not matter, because a normalization follows. Replaces weight decay.
            Default: True.

    Returns:
        (w, state), arrays with the shape and dtype of `w`.

    Example:
        >>> import numpy as np
        >>> w, state = muon_step(np.eye(2), np.zeros((2, 2)), learning_rate=0.1)
        >>> ops.convert_to_numpy(w).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Numerics: computed in w's dtype.

    Reference: Jordan et al., 2024, Muon: an optimizer for hidden layers in neural networks; (U3)
    as in the author's fastest training on CIFAR-10.
    """
    w, dw = _tensors(w, dw)
    (velocity,) = MomentumState(ops.zeros_like(w)) if state is None else _tensors(*state)
    velocity = momentum * velocity + dw  # (U1)
    g = dw + momentum * velocity if nesterov else velocity  # (U2)
    if normalize:
        norm = ops.sqrt(ops.sum(ops.square(w)))
        w = w * (w.shape[-1] ** 0.5 / (norm + 1e-12))  # (U3)
    return w - learning_rate * orthogonal(g, ns_steps), MomentumState(velocity)  # (U4)


def adagrad_step(
    w: Array,
    dw: Array,
    state: AdagradState | None = None,
    *,
    learning_rate: float | Array,
    epsilon: float = 1e-7,
) -> tuple[Array, AdagradState]:
    """One step of AdaGrad.

        (G1)  accumulator <- accumulator + dw^2
        (G2)  w <- w - learning_rate dw / sqrt(accumulator + epsilon)

    The accumulator only grows: after t gradients of similar size, a step is 1 / sqrt(t) of the
    first.

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `AdagradState`, or None before the first step: accumulator 0 (`Adagrad`, like
            Keras, starts at 0.1).
        learning_rate: float or scalar array of w's dtype.
        epsilon: float >= 0, inside the root. Default: 1e-7.

    Returns:
        (w, state), arrays with the shape and dtype of `w`.

    Example:
        >>> import numpy as np
        >>> w, state = adagrad_step(np.array([1.0]), np.array([4.0]), learning_rate=0.5, epsilon=0)
        >>> float(w[0]), float(state.accumulator[0])
        (0.5, 16.0)

    Numerics: computed in w's dtype; as Keras's `Adagrad` to 1e-6 (float32) and 1e-12 (float64)
    after 100 steps. The paper has epsilon (its delta) outside the root.

    Reference: Duchi, Hazan and Singer, 2011, Adaptive Subgradient Methods for Online Learning
    and Stochastic Optimization, figure 1, diagonal form.
    """
    w, dw = _tensors(w, dw)
    (accumulator,) = AdagradState(ops.zeros_like(w)) if state is None else _tensors(*state)
    accumulator = accumulator + ops.square(dw)  # (G1)
    w = w - learning_rate * dw / ops.sqrt(accumulator + epsilon)  # (G2)
    return w, AdagradState(accumulator)


def rmsprop_step(
    w: Array,
    dw: Array,
    state: RMSpropState | None = None,
    *,
    learning_rate: float | Array,
    rho: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-7,
    centered: bool = False,
) -> tuple[Array, RMSpropState]:
    """One step of RMSProp.

        (R1)  mean_square <- rho mean_square + (1 - rho) dw^2
        (R2)  w <- w - learning_rate dw / sqrt(mean_square + epsilon)

    If centered, the variance of the gradient replaces its mean square; with momentum, the steps
    accumulate:

        (R3)  mean <- rho mean + (1 - rho) dw
        (R4)  mean_square in (R2) becomes mean_square - mean^2, at least 0
        (R5)  velocity <- momentum velocity + the step of (R2);  w <- w - velocity

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `RMSpropState`, or None before the first step: all zero.
        learning_rate: float or scalar array of w's dtype.
        rho: float in [0, 1), weight of the old mean square. Default: 0.9.
        momentum: float in [0, 1], weight of the old velocity. Default: 0.
        epsilon: float >= 0, inside the root. Default: 1e-7.
        centered: bool, whether to divide by the standard deviation. Default: False.

    Returns:
        (w, state), arrays with the shape and dtype of `w`; state.velocity is None without
        momentum, state.mean unless centered.

    Example:
        >>> import numpy as np
        >>> w, state = np.array([1.0]), RMSpropState(np.array([4.0]))
        >>> w, state = rmsprop_step(
        ...     w, np.array([4.0]), state, learning_rate=0.5, rho=0.5, epsilon=6
        ... )
        >>> float(w[0]), float(state.mean_square[0])
        (0.5, 10.0)

    Numerics: computed in w's dtype; as Keras's `RMSprop` to 1e-6 (float32) and 1e-12 (float64)
    after 100 steps. Hinton's form has epsilon outside the root.

    Reference: Tieleman and Hinton, 2012, Neural Networks for Machine Learning, lecture 6.5;
    centered: Graves, 2013, Generating Sequences with Recurrent Neural Networks, section 4.2.
    """
    w, dw = _tensors(w, dw)
    zeros = ops.zeros_like(w)
    state = RMSpropState(zeros) if state is None else state
    mean_square, velocity, mean = _tensors(*state)
    mean_square = rho * mean_square + (1 - rho) * ops.square(dw)  # (R1)
    variance = mean_square
    if centered:
        mean = rho * (zeros if mean is None else mean) + (1 - rho) * dw  # (R3)
        variance = ops.relu(mean_square - ops.square(mean))  # (R4)
    step = learning_rate * dw / ops.sqrt(variance + epsilon)  # (R2)
    if momentum:
        velocity = momentum * (zeros if velocity is None else velocity) + step  # (R5)
        return w - velocity, RMSpropState(mean_square, velocity, mean)
    return w - step, RMSpropState(mean_square, velocity, mean)


def adam_step(
    w: Array,
    dw: Array,
    state: AdamState | None = None,
    *,
    learning_rate: float | Array,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
) -> tuple[Array, AdamState]:
    """One step of Adam.

        (A1)  t <- t + 1
        (A2)  m <- beta_1 m + (1 - beta_1) dw
        (A3)  v <- beta_2 v + (1 - beta_2) dw^2
        (A4)  correction = sqrt(1 - beta_2^t) / (1 - beta_1^t)
        (A5)  w <- w - learning_rate correction m / (sqrt(v) + epsilon)

    m and v start at zero, so after t steps their weights add up to only 1 - beta^t; (A4)
    divides both by that. With AMSGrad, (A6) v_max <- max(v_max, v) takes v's place in (A5).

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `AdamState`, where t counts the steps so far, or None before the first step.
        learning_rate: float or scalar array of w's dtype.
        beta_1: float in [0, 1), weight of the old m. Default: 0.9.
        beta_2: float in [0, 1), weight of the old v. Default: 0.999.
        epsilon: float >= 0, epsilon-hat of the paper. Default: 1e-7.
        amsgrad: bool, whether v may only grow. Default: False.

    Returns:
        (w, state), arrays with the shape and dtype of `w`, t a scalar in at least float32;
        state.v_max is None without AMSGrad.

    Example:
        >>> import numpy as np
        >>> w, state = np.zeros(3), None
        >>> for _ in range(5):  # whatever its size, a constant gradient moves w by the rate
        ...     dw = np.array([100.0, -1.0, 0.01])
        ...     w, state = adam_step(w, dw, state, learning_rate=0.5, epsilon=0)
        >>> [round(float(value), 6) for value in w], float(state.t)
        ([-2.5, 2.5, -2.5], 5.0)

    Numerics: computed in w's dtype; 1 - beta^t without cancellation (in float32, 1 - 0.999
    itself is off by 1e-5). As Keras's `Adam` to 1e-6 (float32) and 1e-12 (float64) after 100
    steps.

    Reference: Kingma and Ba, 2015, Adam: A Method for Stochastic Optimization, section 2;
    Reddi, Kale and Kumar, 2018, On the Convergence of Adam and Beyond (AMSGrad).
    """
    w, dw = _tensors(w, dw)
    state = AdamState(0, ops.zeros_like(w), ops.zeros_like(w)) if state is None else state
    m, v, v_max = _tensors(*state[1:])
    t = ops.cast(state.t, _accumulation_dtype(w.dtype)) + 1  # (A1), beyond the 256 of bfloat16
    m = beta_1 * m + (1 - beta_1) * dw  # (A2)
    v = beta_2 * v + (1 - beta_2) * ops.square(dw)  # (A3)
    correction = ops.sqrt(_one_minus_power(beta_2, t)) / _one_minus_power(beta_1, t)  # (A4)
    correction = ops.cast(correction, w.dtype)
    if amsgrad:
        v_max = v if v_max is None else ops.where(v_max > v, v_max, v)  # (A6)
    scale = ops.sqrt(v_max if amsgrad else v) + epsilon
    w = w - learning_rate * correction * m / scale  # (A5)
    return w, AdamState(t, m, v, v_max)


def decay_step(w: Array, *, learning_rate: float | Array, weight_decay: float) -> Array:
    """Decoupled weight decay, which can precede the step of any rule.

        (D1)  w <- w - learning_rate weight_decay w

    Args:
        w: weights, floating array of any shape.
        learning_rate: float or scalar array of w's dtype.
        weight_decay: float >= 0.

    Returns:
        The weights, with unchanged shape and dtype.

    Example:
        >>> import numpy as np
        >>> float(decay_step(np.array([8.0]), learning_rate=0.5, weight_decay=0.25)[0])
        7.0

    Reference: Loshchilov and Hutter, 2019, Decoupled Weight Decay Regularization, section 2; as
    in Keras and PyTorch, the learning rate is a factor (in the paper, only its schedule is).
    """
    (w,) = _tensors(w)
    return w - w * weight_decay * learning_rate  # (D1)


def adamw_step(
    w: Array,
    dw: Array,
    state: AdamState | None = None,
    *,
    learning_rate: float | Array,
    weight_decay: float = 0.004,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
) -> tuple[Array, AdamState]:
    """One step of AdamW: decoupled weight decay, then Adam.

        (D1)  w <- w - learning_rate weight_decay w
        (A1) to (A5) of `adam_step`, with the gradient dw, which does not include the decay

    Args:
        w: weights, floating array of any shape.
        dw: gradient of the loss with respect to `w`, same shape and dtype.
        state: `AdamState`, or None before the first step.
        learning_rate: float or scalar array of w's dtype.
        weight_decay: float >= 0. Default: 0.004.
        beta_1: float in [0, 1), weight of the old m. Default: 0.9.
        beta_2: float in [0, 1), weight of the old v. Default: 0.999.
        epsilon: float >= 0, epsilon-hat of the paper. Default: 1e-7.
        amsgrad: bool, whether v may only grow. Default: False.

    Returns:
        (w, state) as `adam_step`.

    Example:
        >>> import numpy as np
        >>> w, _ = adamw_step(
        ...     np.array([8.0]), np.array([1.0]), learning_rate=0.5, weight_decay=0.25, epsilon=0
        ... )
        >>> round(float(w[0]), 6)
        6.5

    Numerics: as `adam_step`.

    Reference: Loshchilov and Hutter, 2019, Decoupled Weight Decay Regularization, algorithm 2.
    """
    w = decay_step(w, learning_rate=learning_rate, weight_decay=weight_decay)  # (D1)
    return adam_step(
        w,
        dw,
        state,
        learning_rate=learning_rate,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        amsgrad=amsgrad,
    )


def _tensors(*arrays: Array | None) -> tuple[Array, ...]:
    return tuple(None if array is None else ops.convert_to_tensor(array) for array in arrays)


def _one_minus_power(beta: float, t: Array) -> Array:
    """1 - beta^t, without cancellation where beta^t is near 1."""
    return -ops.expm1(t * math.log(beta)) if beta else ops.ones_like(t)


# The rules as Keras optimizers -----------------------------------------------------------------


class _Rule(keras.optimizers.Optimizer):
    """Applies a rule's function to variables: dtypes, slots, decay, rates per variable.

    A subclass names the slots of its state in `_slot_names`, says in `_slot_groups` which of
    them it uses, and takes the step in `_step`.
    """

    _slot_names: tuple[str, ...] = ()  # in the order of the state's fields
    _slot_initializer: Any = "zeros"

    def __init__(
        self,
        learning_rate: Any,
        *,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        if is_real(learning_rate):
            learning_rate = float(learning_rate)  # Keras refuses the int 1
            _check("learning_rate", learning_rate)
        if kwargs.get("weight_decay") is not None:
            _check("weight_decay", kwargs["weight_decay"])
        super().__init__(learning_rate, **kwargs)
        # Pairs, not a dict: TensorFlow would wrap a dict, and refuse functions as keys.
        self._multipliers = _pairs("learning_rate_multipliers", learning_rate_multipliers)
        self._factors: tuple[float, ...] = ()
        self._slots: dict[str, list[Any]] = {}
        self._widen = False

    @property
    def learning_rate_multipliers(self) -> dict[Pattern, float] | None:
        """The factors as they were passed, dict or None."""
        return None if self._multipliers is None else dict(self._multipliers)

    def _slot_groups(self) -> Sequence[Sequence[str]]:
        """The slots in use; for each variable, those of a group are next to each other."""
        return [[name] for name in self._slot_names]

    def _step(self, w: Array, dw: Array, slots: Any, learning_rate: Array, variable: Any) -> Any:
        """Takes the rule's step; returns the weights and the new slots."""
        raise NotImplementedError

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state of the rule, zero at the start.

        Args:
            variables: the trainable variables of the model, in its order.

        Raises:
            ValueError: if a pattern of `learning_rate_multipliers` (or `l2_decay`) applies to no
                variable; nothing has been created in that case.
        """
        if self.built:
            return
        self._factors = _resolve(
            "learning_rate_multipliers", self._multipliers, variables, otherwise=1.0
        )
        super().build(variables)
        slots: dict[str, list[Any]] = {}
        self._widen = True
        for group in self._slot_groups():
            lists = self.add_optimizer_variables(
                variables, list(group), initializer=self._slot_initializer
            )
            slots.update(zip(group, lists, strict=True))
        self._widen = False
        self._slots = slots

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Adds a variable; a rule's own state is float32 if the weights are in half precision.

        A moving average in bfloat16 stops moving as soon as a step changes it by less than
        0.4%. Arguments and result as in `keras.optimizers.Optimizer.add_variable`.
        """
        if self._widen:
            dtype = _accumulation_dtype(dtype)
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def update_step(self, gradient: Array, variable: Any, learning_rate: Array) -> None:
        """Applies one gradient to one variable; called by `apply`.

        Args:
            gradient: array shaped like the variable, dense or sparse.
            variable: a variable that the optimizer was built with.
            learning_rate: scalar, before the variable's factor.
        """
        index = self._get_variable_index(variable)
        dtype = _accumulation_dtype(variable.dtype)
        w = ops.cast(ops.convert_to_tensor(variable), dtype)
        dw = ops.cast(_dense(gradient), dtype)
        learning_rate = ops.cast(learning_rate, dtype)
        if self._factors[index] != 1:
            learning_rate = learning_rate * self._factors[index]
        if self.weight_decay is not None and self._use_weight_decay(variable):
            w = decay_step(w, learning_rate=learning_rate, weight_decay=self.weight_decay)
        used = [
            self._slots[name][index] if name in self._slots else None for name in self._slot_names
        ]
        w, slots = self._step(w, dw, _tensors(*used), learning_rate, variable)
        for slot, value in zip(used, slots, strict=True):
            if slot is not None:
                self.assign(slot, value)
        self.assign(variable, w)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Does nothing: `update_step` applies the decay, at the variable's learning rate."""

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, serializable."""
        return {
            **super().get_config(),
            "learning_rate_multipliers": _serialize(self._multipliers),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Makes an optimizer from the result of its (or its Keras namesake's) `get_config`."""
        config = dict(config)
        for name in ("learning_rate_multipliers", "l2_decay"):
            if isinstance(config.get(name), list):
                config[name] = _deserialize(config[name], custom_objects)
        return super().from_config(config, custom_objects)


def _accumulation_dtype(dtype: Any) -> str:
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _dense(gradient: Array) -> Array:
    """The gradient of an embedding as an array: rows that occur more than once are summed."""
    gradient = ops.convert_to_tensor(gradient, sparse=False)
    return ops.add(gradient, 0.0) if hasattr(gradient, "dense_shape") else gradient


def _check(name: str, value: Any, *, below: float = math.inf) -> None:
    """Refuses a number that is not finite, is negative, or is not below its bound."""
    if not (is_real(value) and 0.0 <= value < below):
        bound = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"`{name}` must be a number, {bound}. Received: {name}={value!r}.")


def _check_momentum(value: Any) -> None:
    if not (is_real(value) and 0 <= value <= 1):
        raise ValueError(
            "`momentum` is the weight of the old velocity, a number in [0, 1]. "
            f"Received: momentum={value!r}. 0.9 is usual; 0 is plain gradient descent."
        )


# Rates per variable


def _pairs(argument: str, rates: Any) -> tuple[tuple[Pattern, float], ...] | None:
    """Checks a mapping of patterns to rates and freezes it."""
    if rates is None:
        return None
    if not isinstance(rates, Mapping):
        raise ValueError(
            f"`{argument}` must map patterns to numbers, such as {{'/beta$': 64.0}}. "
            f"Received: {argument}={rates!r}."
        )
    for pattern, rate in rates.items():
        _check(f"{argument}[{pattern!r}]", rate)
        if not isinstance(pattern, str) and not callable(pattern):
            raise ValueError(
                f"A pattern of `{argument}` is a regular expression for the variable's path, or "
                f"a function of the variable that returns a bool. Received: {pattern!r}."
            )
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"A pattern of `{argument}` is not a regular expression: {error}. "
                    f"Received: {pattern!r}."
                ) from error
    return tuple((pattern, float(rate)) for pattern, rate in rates.items())


def _resolve(
    argument: str,
    pairs: Sequence[tuple[Pattern, float]] | None,
    variables: Sequence[Any],
    otherwise: float,
) -> tuple[float, ...]:
    """The rate of each variable: that of the first pattern that matches it."""
    paths = [getattr(variable, "path", variable.name) for variable in variables]
    rates = [otherwise] * len(paths)
    idle = {index: pattern for index, (pattern, _) in enumerate(pairs or ())}
    for place, (variable, path) in enumerate(zip(variables, paths, strict=True)):
        for index, (pattern, rate) in enumerate(pairs or ()):
            if re.search(pattern, path) if isinstance(pattern, str) else pattern(variable):
                rates[place] = rate
                idle.pop(index, None)
                break
    if idle:
        raise ValueError(
            f"Every pattern of `{argument}` must fit at least one variable that no earlier "
            f"pattern fits. Received: {', '.join(map(repr, idle.values()))}, which decides for "
            f"none of the paths {', '.join(paths)}. Correct or remove it."
        )
    return tuple(rates)


def _serialize(rates: Any) -> Any:
    """Pairs as a list that JSON can hold; a number or None as it is."""
    if not isinstance(rates, tuple):
        return rates
    return [
        [
            pattern if isinstance(pattern, str) else keras.saving.serialize_keras_object(pattern),
            rate,
        ]
        for pattern, rate in rates
    ]


def _deserialize(pairs: Any, custom_objects: Any) -> dict[Pattern, float]:
    return {
        pattern
        if isinstance(pattern, str)
        else keras.saving.deserialize_keras_object(pattern, custom_objects=custom_objects): rate
        for pattern, rate in pairs
    }


@keras.saving.register_keras_serializable(package="keras_norm")
class SGD(_Rule):
    """Gradient descent: plain, with momentum, or with Nesterov's momentum.

    The steps are those of `sgd_step`, `momentum_step` and `nesterov_step`:

        (S1)  g = dw + l2_decay w
        (S2)  w <- w - learning_rate g                              without momentum
        (M1)  velocity <- momentum velocity - learning_rate g       with momentum
        (M2)  w <- w + velocity
        (N2)  w <- w + momentum velocity - learning_rate g          with nesterov, instead of (M2)

    Args:
        learning_rate: float >= 0, a `LearningRateSchedule`, or a function without arguments.
            Default: 0.01.
        momentum: number in [0, 1], weight of the old velocity. Default: 0.
        nesterov: bool, whether to use Nesterov's momentum. Default: False.
        l2_decay: number >= 0, or dict of patterns (as below) to such numbers, 0 where none matches:
            decay that passes through the momentum, like PyTorch's `weight_decay`. It is added
            after clipping, but not to variables excluded by `exclude_from_weight_decay`.
            Default: None, no decay.
        learning_rate_multipliers: dict of patterns to factors >= 0 of the learning rate. A
            pattern is a regular expression searched for in the variable's path, or a function of
            the variable that returns a bool (registered, if the model is to be saved). The first
            match decides; without one, the factor is 1. The factor also scales the effect of
            `weight_decay`, which is proportional to the learning rate. Default: None.
        **kwargs: weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps and name of
            `keras.optimizers.Optimizer`.

    State: with momentum, one velocity per variable (`float32` for variables in half precision).

    Raises:
        ValueError: for a number out of its range; when built, for a pattern that matches nothing.

    Example:
        >>> import numpy as np
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> rule = SGD(0.1, momentum=0.9, nesterov=True, l2_decay={"kernel$": 5e-4},
        ...            learning_rate_multipliers={"head/bias$": 2.0})
        >>> model.compile(rule, "mse")
        >>> history = model.fit(np.ones((8, 4)), np.zeros((8, 2)), verbose=0)
        >>> int(rule.iterations)
        1

    Numerics: as Keras's `SGD` to 1e-6 (float32) and 1e-12 (float64) after 100 steps.

    Reference: see the step functions.

    Differs from Keras: `l2_decay` and `learning_rate_multipliers`; float32 steps and state for
    variables in half precision; a sparse gradient is made dense.
    """

    _slot_names = ("momentum",)

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        l2_decay: float | Rates | None = None,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, learning_rate_multipliers=learning_rate_multipliers, **kwargs
        )
        _check_momentum(momentum)
        self.momentum = momentum
        self.nesterov = nesterov
        self._l2_decay: Any = l2_decay
        if is_real(l2_decay):
            _check("l2_decay", l2_decay)
        else:
            self._l2_decay = _pairs("l2_decay", l2_decay)
        self._l2_rates: tuple[float, ...] = ()

    @property
    def l2_decay(self) -> float | dict[Pattern, float] | None:
        """The coupled decay as it was passed: number, dict or None."""
        return dict(self._l2_decay) if isinstance(self._l2_decay, tuple) else self._l2_decay

    def _slot_groups(self) -> Sequence[Sequence[str]]:
        return [["momentum"]] if self.momentum else []

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the velocities, zero at the start; see the base class."""
        if self.built:
            return
        if isinstance(self._l2_decay, tuple):
            rates = _resolve("l2_decay", self._l2_decay, variables, otherwise=0.0)
        else:
            rates = (self._l2_decay or 0.0,) * len(variables)
        super().build(variables)
        self._l2_rates = rates

    def _step(self, w: Array, dw: Array, slots: Any, learning_rate: Array, variable: Any) -> Any:
        return self._by_momentum(w, dw, slots, learning_rate, variable, self.momentum)

    def _by_momentum(
        self,
        w: Array,
        dw: Array,
        slots: Any,
        learning_rate: Array,
        variable: Any,
        momentum: float,
    ) -> Any:
        """The step with the variable's coupled decay; plain gradient descent without velocities."""
        decays = self._use_weight_decay(variable)
        rates = {
            "learning_rate": learning_rate,
            "l2_decay": self._l2_rates[self._get_variable_index(variable)] if decays else 0.0,
        }
        if not self._slot_groups():
            w, _ = sgd_step(w, dw, **rates)
            return w, slots
        step = nesterov_step if self.nesterov else momentum_step
        return step(w, dw, MomentumState(*slots), momentum=momentum, **rates)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, serializable."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "l2_decay": _serialize(self._l2_decay),
        }


@keras.saving.register_keras_serializable(package="keras_norm")
class Muon(SGD):
    """Muon for the kernels of convolutions, gradient descent with Nesterov's momentum elsewhere.

    The steps are those of `muon_step` for the variables that `matrices` matches, and of
    `nesterov_step`, or with `nesterov=False` of `momentum_step`, for all others.

    Args:
        learning_rate: as in `SGD`; for the matrices, in units of their singular values. Adapt it
            to the other variables by `learning_rate_multipliers`. Default: 0.24.
        momentum: number in [0, 1], of the matrices. Default: 0.6.
        other_momentum: number in [0, 1], of all other variables. Default: 0.85.
        matrices: pattern (as in `SGD`) of the variables that are matrices, of rank 2 or more.
            Default: None, all of rank 3 or more.
        nesterov: bool, whether to use Nesterov's momentum, for the matrices and all others.
            Default: True.
        ns_steps, normalize: of `muon_step`.
        l2_decay: as in `SGD`, for all other variables. Default: None.
        learning_rate_multipliers, **kwargs: as in `SGD`. With `normalize`, a factor of 0 does not
            freeze a matrix, as its norm is still set: leave it out of `matrices`, or do not train
            it.

    State: one velocity per variable (`float32` for variables in half precision).

    Raises:
        ValueError: for a number out of its range; when built, for patterns that match nothing, or
            `matrices` that matches a variable of rank 1 or less.

    Example:
        >>> import numpy as np
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3)])
        >>> model.compile(Muon(0.1, learning_rate_multipliers={"bias$": 0.5}), "mse")
        >>> history = model.fit(np.ones((8, 4, 4, 1)), np.zeros((8, 2, 2, 2)), verbose=0)

    Reference: see `muon_step`.

    Differs from Keras: `keras.optimizers.Muon` leaves the kernels of convolutions to AdamW.
    """

    def __init__(
        self,
        learning_rate: Any = 0.24,
        momentum: float = 0.6,
        *,
        other_momentum: float = 0.85,
        matrices: Pattern | None = None,
        nesterov: bool = True,
        ns_steps: int = 3,
        normalize: bool = True,
        l2_decay: float | Rates | None = None,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            momentum,
            nesterov,
            l2_decay=l2_decay,
            learning_rate_multipliers=learning_rate_multipliers,
            **kwargs,
        )
        _check_momentum(other_momentum)
        if not (is_integer(ns_steps) and ns_steps >= 1):
            raise ValueError(f"`ns_steps` must be an int >= 1. Received: ns_steps={ns_steps!r}.")
        self.other_momentum = other_momentum
        self.matrices = matrices
        self._matrices = _pairs("matrices", None if matrices is None else {matrices: 1.0})
        self.ns_steps = ns_steps
        self.normalize = normalize
        self._is_matrix: tuple[bool, ...] = ()

    def _slot_groups(self) -> Sequence[Sequence[str]]:
        return [["momentum"]]

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the velocities, zero at the start; see the base class."""
        if self.built:
            return
        if self._matrices is None:
            fits = [len(v.shape) > 2 for v in variables]
        else:
            fits = [rate > 0 for rate in _resolve("matrices", self._matrices, variables, 0.0)]
        flat = [v.path for v, fit in zip(variables, fits, strict=True) if fit and len(v.shape) < 2]
        if flat:
            raise ValueError(
                "`matrices` may only fit variables of rank 2 or more. "
                f"Received: matrices={self.matrices!r}, which fits {flat}."
            )
        super().build(variables)
        self._is_matrix = tuple(fits)

    def _step(self, w: Array, dw: Array, slots: Any, learning_rate: Array, variable: Any) -> Any:
        if self._is_matrix[self._get_variable_index(variable)]:
            return muon_step(
                w,
                dw,
                MomentumState(*slots),
                learning_rate=learning_rate,
                momentum=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.ns_steps,
                normalize=self.normalize,
            )
        return self._by_momentum(w, dw, slots, learning_rate, variable, self.other_momentum)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, serializable."""
        matrices = self.matrices
        if callable(matrices):
            matrices = keras.saving.serialize_keras_object(matrices)
        return {
            **super().get_config(),
            "other_momentum": self.other_momentum,
            "matrices": matrices,
            "ns_steps": self.ns_steps,
            "normalize": self.normalize,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Makes an optimizer from the result of `get_config`."""
        if isinstance(config.get("matrices"), dict):
            matrices = keras.saving.deserialize_keras_object(config["matrices"], custom_objects)
            config = {**config, "matrices": matrices}
        return super().from_config(config, custom_objects)


@keras.saving.register_keras_serializable(package="keras_norm")
class Adagrad(_Rule):
    """AdaGrad: each weight's rate falls with the sum of its squared gradients.

    The step is that of `adagrad_step`:

        (G1)  accumulator <- accumulator + dw^2
        (G2)  w <- w - learning_rate dw / sqrt(accumulator + epsilon)

    Args:
        learning_rate: float >= 0, a `LearningRateSchedule`, or a function without arguments.
            Default: 0.001.
        initial_accumulator_value: number >= 0, where the accumulators start. Default: 0.1, as
            in Keras; the paper starts at 0.
        epsilon: number >= 0, inside the root. Default: 1e-7.
        learning_rate_multipliers: dict of patterns to factors, see `SGD`. Default: None.
        **kwargs: of `keras.optimizers.Optimizer`, see `SGD`.

    State: one accumulator per variable.

    Raises:
        ValueError: for a number out of its range; when built, for a pattern that matches nothing.

    Example:
        >>> import keras
        >>> w = keras.Variable([1.0])
        >>> Adagrad(0.5, initial_accumulator_value=0).apply([w * 4], [w])
        >>> round(float(w.numpy()[0]), 6)
        0.5

    Numerics: as Keras's `Adagrad` to 1e-6 (float32) and 1e-12 (float64) after 100 steps.

    Reference: Duchi, Hazan and Singer, 2011, Adaptive Subgradient Methods for Online Learning
    and Stochastic Optimization.

    Differs from Keras: `learning_rate_multipliers`; float32 steps and state for variables in
    half precision; a sparse gradient is made dense.
    """

    _slot_names = ("accumulator",)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        *,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, learning_rate_multipliers=learning_rate_multipliers, **kwargs
        )
        _check("initial_accumulator_value", initial_accumulator_value)
        _check("epsilon", epsilon)
        self.initial_accumulator_value = initial_accumulator_value
        self.epsilon = epsilon

    @property
    def _slot_initializer(self) -> Any:
        return keras.initializers.Constant(self.initial_accumulator_value)

    def _step(self, w: Array, dw: Array, slots: Any, learning_rate: Array, variable: Any) -> Any:
        return adagrad_step(
            w, dw, AdagradState(*slots), learning_rate=learning_rate, epsilon=self.epsilon
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, serializable."""
        return {
            **super().get_config(),
            "initial_accumulator_value": self.initial_accumulator_value,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_norm")
class RMSprop(_Rule):
    """RMSProp: each weight's gradient divided by the root of its recent mean square.

    The step is that of `rmsprop_step`:

        (R1)  mean_square <- rho mean_square + (1 - rho) dw^2
        (R2)  w <- w - learning_rate dw / sqrt(mean_square + epsilon)

    and with `centered` or `momentum` (R3) to (R5).

    Args:
        learning_rate: float >= 0, a `LearningRateSchedule`, or a function without arguments.
            Default: 0.001.
        rho: number in [0, 1), weight of the old mean square. Default: 0.9.
        momentum: number in [0, 1], weight of the old velocity. Default: 0.
        epsilon: number >= 0, inside the root. Default: 1e-7.
        centered: bool, whether to divide by the standard deviation. Default: False.
        learning_rate_multipliers: dict of patterns to factors, see `SGD`. Default: None.
        **kwargs: of `keras.optimizers.Optimizer`, see `SGD`.

    State: per variable the mean square; with momentum the velocity; if centered the mean.

    Raises:
        ValueError: for a number out of its range; when built, for a pattern that matches nothing.

    Example:
        >>> import keras
        >>> w = keras.Variable([1.0])
        >>> RMSprop(0.5, rho=0.75).apply([w * 4], [w])
        >>> round(float(w.numpy()[0]), 6)
        0.0

    Numerics: as Keras's `RMSprop` to 1e-6 (float32) and 1e-12 (float64) after 100 steps.

    Reference: Tieleman and Hinton, 2012, Neural Networks for Machine Learning, lecture 6.5.

    Differs from Keras: `learning_rate_multipliers`; a centered variance is never negative;
    float32 steps and state for variables in half precision; a sparse gradient is made dense.
    """

    _slot_names = ("velocity", "momentum", "average_gradient")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
        *,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, learning_rate_multipliers=learning_rate_multipliers, **kwargs
        )
        _check("rho", rho, below=1)
        _check_momentum(momentum)
        _check("epsilon", epsilon)
        self.rho = rho
        self.momentum = momentum
        self.epsilon = epsilon
        self.centered = centered

    def _slot_groups(self) -> Sequence[Sequence[str]]:
        used = {"velocity": True, "momentum": self.momentum, "average_gradient": self.centered}
        return [[name] for name in self._slot_names if used[name]]

    def _step(self, w: Array, dw: Array, slots: Any, learning_rate: Array, variable: Any) -> Any:
        return rmsprop_step(
            w,
            dw,
            RMSpropState(*slots),
            learning_rate=learning_rate,
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            centered=self.centered,
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, serializable."""
        return {
            **super().get_config(),
            "rho": self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "centered": self.centered,
        }


@keras.saving.register_keras_serializable(package="keras_norm")
class Adam(_Rule):
    """Adam: moving averages of the gradient and of its square, corrected for their start at zero.

    The step is that of `adam_step`:

        (A1)  t <- t + 1
        (A2)  m <- beta_1 m + (1 - beta_1) dw
        (A3)  v <- beta_2 v + (1 - beta_2) dw^2
        (A4)  correction = sqrt(1 - beta_2^t) / (1 - beta_1^t)
        (A5)  w <- w - learning_rate correction m / (sqrt(v) + epsilon)

    Args:
        learning_rate: float >= 0, a `LearningRateSchedule`, or a function without arguments.
            Default: 0.001.
        beta_1: number in [0, 1), weight of the old m. Default: 0.9.
        beta_2: number in [0, 1), weight of the old v. Default: 0.999.
        epsilon: number >= 0, epsilon-hat of the paper. Default: 1e-7.
        amsgrad: bool, whether v may only grow. Default: False.
        learning_rate_multipliers: dict of patterns to factors, see `SGD`. Default: None.
        **kwargs: of `keras.optimizers.Optimizer`, see `SGD`.

    State: m and v per variable, with AMSGrad the largest v; t is `iterations`.

    Raises:
        ValueError: for a number out of its range; when built, for a pattern that matches nothing.

    Example:
        >>> import keras
        >>> w = keras.Variable([1.0, 1.0])
        >>> Adam(0.25).apply([w * [100.0, -1.0]], [w])
        >>> [round(float(value), 4) for value in w.numpy()]
        [0.75, 1.25]

    Numerics: as Keras's `Adam` to 1e-6 (float32) and 1e-12 (float64) after 100 steps; 1 - beta^t
    without cancellation.

    Reference: Kingma and Ba, 2015, Adam: A Method for Stochastic Optimization.

    Differs from Keras: `learning_rate_multipliers`; float32 steps and state for variables in
    half precision (Keras's do not move in bfloat16, where 0.999 rounds to 1); a sparse gradient
    is made dense.
    """

    _slot_names = ("momentum", "velocity", "velocity_hat")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        *,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, learning_rate_multipliers=learning_rate_multipliers, **kwargs
        )
        _check("beta_1", beta_1, below=1)
        _check("beta_2", beta_2, below=1)
        _check("epsilon", epsilon)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.amsgrad = amsgrad

    def _slot_groups(self) -> Sequence[Sequence[str]]:
        return [["momentum", "velocity"], *([["velocity_hat"]] if self.amsgrad else [])]

    def _step(self, w: Array, dw: Array, slots: Any, learning_rate: Array, variable: Any) -> Any:
        w, state = adam_step(
            w,
            dw,
            AdamState(ops.cast(self.iterations, w.dtype), *slots),
            learning_rate=learning_rate,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            amsgrad=self.amsgrad,
        )
        return w, state[1:]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, serializable."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "amsgrad": self.amsgrad,
        }


@keras.saving.register_keras_serializable(package="keras_norm")
class AdamW(Adam):
    """AdamW: Adam with decoupled weight decay.

    The step is that of `adamw_step`:

        (D1)  w <- w - learning_rate weight_decay w
        then (A1) to (A5) of `Adam`

    Args:
        learning_rate: float >= 0, a `LearningRateSchedule`, or a function without arguments.
            Default: 0.001.
        weight_decay: number >= 0. Default: 0.004.
        beta_1: number in [0, 1), weight of the old m. Default: 0.9.
        beta_2: number in [0, 1), weight of the old v. Default: 0.999.
        epsilon: number >= 0, epsilon-hat of the paper. Default: 1e-7.
        amsgrad: bool, whether v may only grow. Default: False.
        learning_rate_multipliers: dict of patterns to factors, see `SGD`. Default: None.
        **kwargs: of `keras.optimizers.Optimizer`, see `SGD`.

    State: as `Adam`.

    Raises:
        ValueError: for a number out of its range, or `weight_decay=None`; when built, for a
            pattern that matches nothing.

    Example:
        >>> import keras
        >>> w = keras.Variable([8.0])
        >>> AdamW(0.5, weight_decay=0.25).apply([w], [w])
        >>> round(float(w.numpy()[0]), 5)
        6.5

    Numerics: as Keras's `AdamW` to 1e-6 (float32) and 1e-12 (float64) after 100 steps.

    Reference: Loshchilov and Hutter, 2019, Decoupled Weight Decay Regularization.

    Differs from Keras: as `Adam`; and `learning_rate_multipliers` also scale the decay.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        *,
        learning_rate_multipliers: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        _check("weight_decay", weight_decay)
        super().__init__(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            amsgrad,
            learning_rate_multipliers=learning_rate_multipliers,
            weight_decay=weight_decay,
            **kwargs,
        )


# Learning-rate schedules -----------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_norm")
class CyclicalLearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A triangular learning rate: up for `half_cycle` steps, down for as many, and again.

    With cycle c = floor(step / (2 half_cycle)) and offset = step - 2 half_cycle c:

        (C1)  peak   = max(minimum, maximum decay^c)
        (C2)  height = 1 - |offset / half_cycle - 1|
        (C3)  rate   = minimum (1 - height) + peak height

    Only the maximum is multiplied by `decay` after each cycle; the minimum stays the same. The
    rate is continuous: every cycle begins and ends at the minimum.

    Args:
        minimum: number >= 0, the rate at the beginning and end of each cycle.
        maximum: number > minimum, the rate in the middle of the first cycle.
        half_cycle: int >= 1, steps from minimum to maximum.
        decay: number in (0, 1], factor of the maximum per cycle. Default: 1.

    Call arguments:
        step: integer scalar or array, the number of steps taken before this one.

    Returns:
        The learning rate, an array of the dtype `keras.config.floatx()` and step's shape.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> schedule = CyclicalLearningRate(0.125, 1.125, half_cycle=4, decay=0.5)
        >>> [float(schedule(step)) for step in (0, 1, 4, 6, 8, 12)]
        [0.125, 0.375, 1.125, 0.625, 0.125, 0.5625]

    Numerics: steps are counted in integers, so the corners stay exact however late they come: the
    minimum, and with `decay=1` the maximum, to the last bit.

    Reference: Smith, 2017, Cyclical Learning Rates for Training Neural Networks, section 3.2
    (there the decaying policy halves the distance from minimum to maximum).
    """

    def __init__(self, minimum: float, maximum: float, half_cycle: int, decay: float = 1.0) -> None:
        _check("minimum", minimum)
        _check("maximum", maximum)
        if not minimum < maximum:
            raise ValueError(
                "`maximum` must be larger than `minimum`. "
                f"Received: minimum={minimum!r}, maximum={maximum!r}."
            )
        if not (is_integer(half_cycle) and half_cycle >= 1):
            raise ValueError(
                "`half_cycle` must be an int >= 1, the number of steps from minimum to maximum. "
                f"Received: half_cycle={half_cycle!r}."
            )
        if not (is_real(decay) and 0 < decay <= 1):
            raise ValueError(
                "`decay` multiplies the maximum after each cycle and must lie in (0, 1]. "
                f"Received: decay={decay!r}. 1 keeps all cycles alike."
            )
        self.minimum = minimum
        self.maximum = maximum
        self.half_cycle = half_cycle
        self.decay = decay

    def __call__(self, step: Any) -> Array:
        """Returns the learning rate of a step; see the class."""
        dtype = keras.config.floatx()
        step = ops.convert_to_tensor(step)
        cycle = step // (2 * self.half_cycle)
        offset = step % (2 * self.half_cycle)
        peak = ops.full(step.shape, self.maximum, dtype=dtype)
        if self.decay != 1:
            peak = peak * ops.exp(ops.cast(cycle, dtype) * math.log(self.decay))
            peak = ops.where(peak > self.minimum, peak, self.minimum)  # (C1)
        distance = ops.cast(ops.absolute(offset - self.half_cycle), dtype)
        height = 1 - distance / self.half_cycle  # (C2)
        return self.minimum * (1 - height) + peak * height  # (C3)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "half_cycle": self.half_cycle,
            "decay": self.decay,
        }


@keras.saving.register_keras_serializable(package="keras_norm")
class PiecewiseLinear(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that runs in straight lines through given points.

    Between points p <= step <= q with the values a and b:

        (P1)  u    = (step - p) / (q - p)
        (P2)  rate = a (1 - u) + b u

    Before the first point the rate is the first value, after the last point the last.

    Args:
        points: sequence of at least two strictly increasing ints >= 0, in steps.
        values: sequence of as many numbers >= 0, the rates at the points.

    Call arguments:
        step: integer scalar or array, the number of steps taken before this one.

    Returns:
        The learning rate, an array of the dtype `keras.config.floatx()` and step's shape.

    Raises:
        ValueError: if there are fewer than two points, or more or fewer values than points, or
            a point or value is out of its range or order.

    Example:
        >>> steps, peak = 1000, 1.5  # up in 23% of the steps, then down
        >>> schedule = PiecewiseLinear(
        ...     [0, round(0.23 * steps), steps], [0.25 * peak, peak, 0.0625 * peak]
        ... )
        >>> [float(schedule(step)) for step in (0, 115, 230, 1000, 2000)]
        [0.375, 0.9375, 1.5, 0.09375, 0.09375]

    Numerics: steps are counted in integers; at the points the values are exact to the last bit.
    """

    def __init__(self, points: Sequence[int], values: Sequence[float]) -> None:
        points, values = list(points), list(values)
        if len(points) < 2 or len(points) != len(values):
            raise ValueError(
                "`points` must hold at least two steps, and `values` one rate for each. "
                f"Received: points={points}, values={values}."
            )
        increasing = all(p < q for p, q in itertools.pairwise(points))
        integral = all(is_integer(p) and p >= 0 for p in points)
        if not (integral and increasing):
            raise ValueError(
                "`points` are steps: ints >= 0, each larger than the one before. "
                f"Received: points={points}. Round fractions of the training first."
            )
        for value in values:
            _check("values", value)
        self.points = points
        self.values = values

    def __call__(self, step: Any) -> Array:
        """Returns the learning rate of a step; see the class."""
        dtype = keras.config.floatx()
        step = ops.convert_to_tensor(step)
        rate = ops.full(step.shape, self.values[0], dtype=dtype)
        corners = list(zip(self.points, self.values, strict=True))
        for (p, a), (q, b) in itertools.pairwise(corners):
            u = ops.cast(ops.clip(step - p, 0, q - p), dtype) / (q - p)  # (P1)
            rate = ops.where(step >= p, a * (1 - u) + b * u, rate)  # (P2)
        return rate

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"points": list(self.points), "values": list(self.values)}

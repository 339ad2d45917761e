"""What the tests of several files need: a derivative of a derivative, and compiled functions."""

import functools
import inspect

import keras
import numpy as np
from keras import ops

from keras_norm._gradients import gradients

BACKEND = keras.backend.backend()


def fast(function):
    """The function, by jit on JAX: there each single operation would be compiled by itself."""
    if BACKEND != "jax":
        return lambda *arrays: function(*map(ops.convert_to_tensor, arrays))
    import jax

    return jax.jit(function)


def fast_gradients(function, arrays):
    """`gradients`, compiled as one on JAX."""
    return fast(lambda *arrays: gradients(function, arrays))(*arrays)


def step_in_training(layer, x, mix, **given):
    """y of a call in training, whose state it leaves in the layer, and the gradients of sum y mix.

    The gradients are those of x and of the trainable variables, in one list. Compiled on JAX.
    """
    if BACKEND != "jax":
        _, grads = gradients(
            lambda x: _sum_of_product(layer, layer(x, training=True, **given), mix),
            [x],
            variables=layer.trainable_variables,
        )
        return layer(x, training=True, **given), grads
    both = layer.trainable_variables, layer.non_trainable_variables
    (dx, slopes), (y, after) = _jax_step(layer)(
        x, *([v.value for v in variables] for variables in both), mix, given
    )
    for variable, value in zip(both[1], after, strict=True):
        variable.assign(value)
    return y, [dx, *slopes]


@functools.lru_cache(maxsize=4)
def _jax_step(layer):
    import jax

    # Unlike `__call__`, `stateless_call` passes it on whether or not the layer knows it.
    training = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}

    def scalar(x, trained, rest, mix, given):
        y, after = layer.stateless_call(trained, rest, x, **training, **given)
        return _sum_of_product(layer, y, mix), (y, after)

    return jax.jit(jax.grad(scalar, (0, 1), has_aux=True))


def _sum_of_product(layer, y, mix):
    wide = "float64" if layer.compute_dtype == "float64" else "float32"
    return ops.sum(ops.cast(y, wide) * ops.cast(mix, wide))


def value_and_gradients(function, arrays, mix):
    """y = function(*arrays), and the gradients of sum y mix with respect to the arrays."""

    def loss(*arrays):
        return ops.sum(ops.cast(function(*arrays), "float64") * ops.convert_to_tensor(mix))

    def both(*arrays):
        return [function(*arrays), *gradients(loss, arrays)[1]]

    y, *grads = fast(both)(*arrays)
    return y, grads


def penalty_and_gradient(function):
    """x -> P(x) = sum |d function / dx|^2, and dP / dx, by the backend's own means."""
    return {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND](function)


def _tensorflow(function):
    import tensorflow as tf

    def both(x):
        x = tf.constant(x)
        with tf.GradientTape() as tape_of_penalty:
            tape_of_penalty.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = function(x)
            penalty = tf.reduce_sum(tf.square(tape.gradient(value, x)))
        zero = tf.UnconnectedGradients.ZERO
        gradient = tape_of_penalty.gradient(penalty, x, unconnected_gradients=zero)
        return penalty.numpy(), gradient.numpy()

    return both


def _jax(function):
    import jax

    both = jax.jit(jax.value_and_grad(lambda x: (jax.grad(function)(x) ** 2).sum()))
    return lambda x: tuple(map(np.asarray, both(jax.numpy.asarray(x))))


def _torch(function):
    import torch

    def both(x):
        x = torch.tensor(x, requires_grad=True)
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        penalty = first.pow(2).sum()
        if not penalty.requires_grad:
            return penalty.numpy(), np.zeros(x.shape)
        (second,) = torch.autograd.grad(penalty, x, allow_unused=True)
        second = torch.zeros_like(x) if second is None else second
        return penalty.detach().numpy(), second.numpy()

    return both


def measured_gradient(scalar, x, step=1e-4):
    """The gradient of scalar(x) by central differences of fourth order."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        for factor, steps in ((8, 1), (-8, -1), (-1, 2), (1, -2)):
            moved = x.copy()
            moved[index] += steps * step
            gradient[index] += factor * scalar(moved) / (12 * step)
    return gradient


def compiled(function, unknown=()):
    """The function of arrays, compiled in each way that the backend has.

    On TensorFlow as a graph in which the sizes of the axes in `unknown` are not known, and by
    XLA; on JAX by jit. (PyTorch stays eager.)
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def graph(*arrays):
            signature = [
                tf.TensorSpec([None if a in unknown else n for a, n in enumerate(x.shape)], x.dtype)
                for x in map(tf.convert_to_tensor, arrays)
            ]
            return tf.function(function, input_signature=signature)(*arrays)

        return [graph, tf.function(function, jit_compile=True)]
    if BACKEND == "jax":
        import jax

        return [jax.jit(function)]
    return [fast(function)]

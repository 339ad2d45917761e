"""Sums over the replicas of a data-parallel step, for statistics of the whole batch.

* TensorFlow, `tf.distribute`: the replicas of one step run the same function, each on its part
  of the batch. `all_sum` adds across the replicas.
* JAX, `keras.distribution`: one function sees the whole batch, sharded; a mean over it is already
  the global one, and there is nothing to add.
* PyTorch, `torch.distributed`: one process for each part; `all_sum` adds across the processes.
"""

from typing import Any

import keras

__all__ = ["all_sum", "replicas"]

Array = Any


def replicas() -> int:
    """The number of replicas that take this step together, each with a part of the batch.

    The number is known when a function is traced, and costs nothing when it runs.

    Returns:
        1 where the caller sees the whole batch.

    Example:
        >>> replicas()
        1
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        return 1 if context is None else int(context.num_replicas_in_sync)
    if backend == "torch":
        import torch.distributed as dist

        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return 1


def all_sum(x: Array) -> Array:
    """The sum over all replicas, which each of them receives.

    Differentiable: the gradient is summed over the replicas too, so that the contribution of one
    replica to the statistics is credited with its effect on the losses of all.

    Args:
        x: a small array, of the same shape on every replica. Every replica must call this.

    Returns:
        An array of the same shape and dtype; x itself where there is one replica.

    Example:
        >>> float(all_sum(keras.ops.convert_to_tensor(2.0)))
        2.0
    """
    if replicas() == 1:
        return x
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, x)
    return _torch_all_sum(x)


def _torch_all_sum(x: Array) -> Array:
    import torch
    import torch.distributed as dist

    class AllSum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Array) -> Array:
            total = x.clone()
            dist.all_reduce(total)
            return total

        @staticmethod
        def backward(ctx: Any, upstream: Array) -> Array:
            return AllSum.apply(upstream)  # so that its gradient is a sum over replicas again

    return AllSum.apply(x)

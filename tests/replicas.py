"""Runs a layer on two replicas, in a process of its own; `test_distributed.py` looks at what came.

    python tests/replicas.py RESULTS.npz

Two logical CPU devices with MirroredStrategy on TensorFlow, two host devices with
keras.distribution on JAX, two processes with torch.distributed on PyTorch. The results are
arrays under the names "case/array".
"""

import os
import sys
import tempfile

# Only in the process of its own: the tests import this module, and their processes' children
# must compute with the same flags as they do.
if __name__ == "__main__" and os.environ.get("KERAS_BACKEND") == "jax":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"
    os.environ["JAX_ENABLE_X64"] = "1"

import keras
import numpy as np
from keras import ops

from keras_norm.layers import (
    BatchNormalization,
    DecorrelatedBatchNormalization,
    QuantileNormalization,
)

CASES = {
    # name: (dtype, mask, layer's arguments, how many examples the first of two replicas gets)
    "float64": ("float64", None, {"synchronized": True}, 4),
    "float32": ("float32", None, {"synchronized": True}, 4),
    "masked float64": ("float64", "some", {"synchronized": True}, 4),
    "masked float32": ("float32", "some", {"synchronized": True}, 4),
    "masked replica": ("float64", "second", {"synchronized": True}, 4),
    "uneven": ("float64", None, {"synchronized": True}, 3),
    "renorm": ("float64", "some", {"synchronized": True, "renorm": True}, 4),
    "all masked": ("float64", "all", {"synchronized": True}, 4),
    "unsynchronized": ("float64", "some", {}, 3),
    "unsynchronized average": ("float64", None, {"momentum": None, "unbiased": True}, 3),
}
RESEARCH = {
    # the same, and the class
    "decorrelated": ("float64", "some", {"group_size": 2}, 3, DecorrelatedBatchNormalization),
    "quantile": ("float64", "some", {"quantiles": 3}, 3, QuantileNormalization),
}
SHAPE = (8, 3, 2)


def data(dtype, mask):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=SHAPE) * np.arange(1, 9)[:, None, None] + 3).astype(dtype)
    mix = rng.normal(size=SHAPE).astype(dtype)
    given = rng.random(SHAPE[:2]) < 0.6
    if mask == "second":
        given[4:] = False
    if mask == "all":
        given[:] = False
    return x, mix, (given if mask else None)


def layer_for(dtype, arguments, cls=BatchNormalization):
    layer = cls(dtype=dtype, momentum=0.9, **arguments) if "momentum" not in arguments else None
    layer = layer or cls(dtype=dtype, **arguments)
    layer.build(SHAPE)
    layer.gamma.assign([1.5, 0.5])
    layer.beta.assign([0.1, -0.2])
    return layer


def state(layer):
    arrays = {w.name: ops.convert_to_numpy(w) for w in layer.weights[2:]}
    if hasattr(layer, "skipped_batches"):
        arrays["skipped"] = np.array(layer.skipped_batches)
    return arrays


# TensorFlow -----------------------------------------------------------------------------------


def tensorflow():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def run(dtype, mask, arguments, first, cls=BatchNormalization, arrays=None):
        x, mix, given = arrays or data(dtype, mask)
        with strategy.scope():
            layer = layer_for(dtype, arguments, cls)
        parts = [slice(0, first), slice(first, None)]

        def part(v):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(v[parts[context.replica_id_in_sync_group]])
            )

        def step(x, mix, mask=None):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
                loss = tf.reduce_sum(y * mix)
            variables = [layer.gamma.value, layer.beta.value]
            return y, *tape.gradient(loss, [x, *variables])

        given_parts = [] if given is None else [part(given)]
        compiled = tf.function(lambda *v: strategy.run(step, v))
        y, dx, dgamma, dbeta = compiled(part(x), part(mix), *given_parts)
        result = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        for name, value in result.items():
            value = [v.numpy() for v in strategy.experimental_local_results(value)]
            result[name] = sum(value) if name[1:] in ("gamma", "beta") else np.concatenate(value)
        return result | state(layer)

    results = {name: run(*case) for name, case in (CASES | RESEARCH).items()}
    results["mean 100"] = run("float32", None, {"synchronized": True}, 4, arrays=mean_100())
    builtin = keras.layers.BatchNormalization
    results["builtin mean 100"] = run(
        "float32", None, {"synchronized": True}, 4, builtin, mean_100()
    )
    results["builtin masked"] = run("float64", "some", {"synchronized": True}, 4, builtin)
    results["builtin unsynchronized"] = run("float64", None, {}, 4, builtin)
    results["fit on two"] = fit(strategy.scope)
    results["fit on one"] = fit(lambda: tf.device("CPU:0"))
    return results


def mean_100():
    rng = np.random.default_rng(0)
    x = (100 + 0.01 * rng.standard_normal((512, 3, 2))).astype("float32")
    return x, np.ones_like(x), None


def fit(scope):
    """Three epochs of a small model, with a mask; the weights."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 4, 3)) + 1, rng.normal(size=(32, 2))
    masked = rng.random((32, 4)) < 0.3
    masked[:, 0] = False
    x[masked] = 0  # what Masking masks
    with scope():
        keras.utils.set_random_seed(0)
        keras.config.set_floatx("float64")
        layers = [
            keras.layers.Masking(),
            BatchNormalization(synchronized=True, momentum=0.5),
            keras.layers.Dense(5, "relu"),
            BatchNormalization(synchronized=True, renorm=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2),
        ]
        model = keras.Sequential([keras.Input((4, 3)), *layers])
        model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    keras.config.set_floatx("float32")
    return {str(i): w for i, w in enumerate(model.get_weights())}


# JAX ------------------------------------------------------------------------------------------


def jax():
    import jax

    def run(dtype, mask, arguments, first, cls=BatchNormalization):
        x, mix, given = data(dtype, mask)
        layer = layer_for(dtype, arguments, cls)

        @jax.jit
        def step(trained, rest, x, mix, mask):
            def loss(trained, x):
                y, after = layer.stateless_call(trained, rest, x, training=True, mask=mask)
                return (y * mix).sum(), (y, after)

            slopes, (y, after) = jax.grad(loss, (0, 1), has_aux=True)(trained, x)
            return y, slopes[1], slopes[0], after

        def part(v):
            return None if v is None else jax.device_put(v, by_example)

        rest = layer.non_trainable_variables
        values = [v.value for v in layer.trainable_variables], [v.value for v in rest]
        x = part(x)
        sizes = {shard.data.shape[0] for shard in x.addressable_shards}
        if sizes != {4}:
            raise RuntimeError(f"The batch is not on two devices: {sizes}")
        y, dx, (dgamma, dbeta), after = step(*values, x, part(mix), part(given))
        for variable, value in zip(rest, after, strict=True):
            variable.assign(value)
        arrays = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        return {name: np.asarray(v) for name, v in arrays.items()} | state(layer)

    results = {"fit on one": fit(lambda: jax.default_device(jax.devices()[0]))}
    distribution = keras.distribution.DataParallel(devices=jax.devices())
    keras.distribution.set_distribution(distribution)
    mesh = distribution.device_mesh.backend_mesh
    by_example = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    results |= {name: run(*case) for name, case in (CASES | RESEARCH).items()}
    results["fit on two"] = fit(distribution.scope)
    return results


# PyTorch --------------------------------------------------------------------------------------


def torch():
    import torch

    with tempfile.TemporaryDirectory() as folder:
        # Nothing has been computed here, so there are no threads that a fork would lack.
        how = "fork" if sys.platform == "linux" else "spawn"
        torch.multiprocessing.start_processes(torch_process, (folder,), nprocs=2, start_method=how)
        parts = [dict(np.load(f"{folder}/{rank}.npz")) for rank in (0, 1)]
    results = {}
    for name in parts[0]:
        case, array = name.split("/")
        values = [part[name] for part in parts]
        if array in ("y", "dx"):
            value = np.concatenate(values)
        elif array in ("dgamma", "dbeta"):
            value = sum(values)
        else:
            np.testing.assert_array_equal(*values)  # both processes hold the same
            value = values[0]
        results.setdefault(case, {})[array] = value
    return results


def torch_process(rank, folder):
    import torch

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    results = {}
    for name, (dtype, mask, arguments, first, *cls) in (CASES | RESEARCH).items():
        part = slice(0, first) if rank == 0 else slice(first, None)
        x, mix, given = (None if v is None else v[part] for v in data(dtype, mask))
        layer = layer_for(dtype, arguments, *cls)
        x = torch.tensor(x, requires_grad=True)
        layer(x)  # inputs that it has met: it takes no shortcut here
        y = layer(x, training=True, mask=given)
        (y * torch.tensor(mix)).sum().backward()
        gradients = {"dx": x.grad, "dgamma": layer.gamma.value.grad, "dbeta": layer.beta.value.grad}
        arrays = {"y": y.detach(), **gradients}
        for array, value in {**{k: v.numpy() for k, v in arrays.items()}, **state(layer)}.items():
            results[f"{name}/{array}"] = value
    np.savez(f"{folder}/{rank}.npz", **results)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    results = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[keras.backend.backend()]()
    flat = {f"{case}/{name}": v for case, arrays in results.items() for name, v in arrays.items()}
    np.savez(sys.argv[1], **flat)

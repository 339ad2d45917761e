"""What the tests of most files need: arrays to and from the backend, and numbers to begin with."""

import keras
import ml_dtypes
import numpy as np
from keras import ops
from reference import channel_axes

# The distance from 1 to the next number.
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def array(x):
    return ops.convert_to_numpy(x)


def tensor(x):
    return ops.convert_to_tensor(x)


def wide(x):
    """In NumPy and float64, whatever it was: NumPy itself knows no bfloat16."""
    return array(ops.cast(x, "float64"))


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


def numpy_dtype(dtype):
    return {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)


def rounded(x, dtype):
    """x in float64, of numbers that the dtype holds."""
    return np.asarray(x).astype(numpy_dtype(dtype)).astype("float64")


def check_parameters(cls, shape, **arguments):
    """That a layer makes gamma and beta by the initializers, regularizers and constraints given."""
    options = {
        "gamma_initializer": keras.initializers.Constant(2.0),
        "beta_initializer": "ones",
        "gamma_regularizer": keras.regularizers.L2(0.5),
        "beta_regularizer": keras.regularizers.L1(0.25),
        "gamma_constraint": keras.constraints.MaxNorm(3.0),
        "beta_constraint": keras.constraints.NonNeg(),
    }
    layer, size = cls(**arguments, **options), shape[-1]
    layer.build(shape)
    np.testing.assert_array_equal(layer.get_weights(), [[2.0] * size, [1.0] * size])
    assert layer.gamma.constraint is options["gamma_constraint"]
    assert layer.beta.constraint is options["beta_constraint"]
    assert [float(array(loss)) for loss in layer.losses] == [2.0 * size, 0.25 * size]


def data(shape, axis, seed=0):
    """x of mean 3 and standard deviation 2, gamma and beta along the axes, weights of a loss."""
    rng = np.random.default_rng(seed)
    features = [shape[a] for a in channel_axes(axis, len(shape))]
    x = rng.normal(size=shape) * 2 + 3
    return x, rng.normal(1, 0.5, features), rng.normal(size=features), rng.normal(size=shape)

"""Files: `.keras` and weights in a fresh process, weights of keras.layers, and exported models."""

import functools
import sys

import forked
import keras
import numpy as np
import pytest
from arrays import array

from keras_norm import layers

BACKEND = keras.backend.backend()
TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="exports through TensorFlow")


def data(n=24, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 4, 4, 6)) * 2 + 3).astype("float32")
    return x, rng.normal(size=(n, 2)).astype("float32")


def network(rate=0.0):
    """One of every layer, with the state that each can have, compiled."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 6)),
            # Of the inputs: further up, the ranks of equal elements would be a matter of rounding.
            layers.DecorrelatedBatchNormalization(momentum=0.9, group_size=2),
            layers.QuantileNormalization(momentum=None, quantiles=3),
            layers.BatchNormalization(momentum=0.9, debiased=True),
            layers.SpatialBatchNormalization(renorm=True, renorm_clipping={"rmax": 2.0}),
            layers.GroupNormalization(3),
            layers.Dropout(rate),
            layers.InstanceNormalization(),
            keras.layers.Flatten(),
            layers.LayerNormalization(),
            keras.layers.Dense(8, "relu"),
            layers.BatchNormalization(momentum=None, unbiased=True, virtual_batch_size=4),
            layers.RMSNormalization(),
            layers.Dropout(rate, noise_shape=(None, 1), seed=3),
            keras.layers.Dense(2),
        ]
    )
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    eagerly = BACKEND == "tensorflow"  # quicker than to trace all that four times
    model.compile(sgd, "mse", run_eagerly=eagerly)
    return model


def trained(model, epochs):
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


def resume(kind, path):
    """What the fresh process does: one more epoch with what it finds in the file."""
    if kind == "keras":
        model = keras.saving.load_model(path)
    else:
        model = network()
        model.optimizer.build(model.trainable_variables)
        model.load_weights(path)
    before = model.predict(data()[0], verbose=0)
    return before, [array(v) for v in (*trained(model, 1).weights, *model.optimizer.variables)]


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.slow_on_jax
def test_training_goes_on_in_a_fresh_process(tmp_path):
    """Outputs, then weights and the optimizer's state after one more epoch, as without the break.

    The `.keras` file keeps the state of the dropout, too; a weights file has none.
    """
    files = {"keras": tmp_path / "model.keras", "weights": tmp_path / "model.weights.h5"}
    models = {"keras": trained(network(0.3), 2), "weights": trained(network(), 2)}
    models["keras"].save(files["keras"])
    models["weights"].save_weights(files["weights"])
    done = forked.run(__file__, tmp_path / "results.npz", *files.values())
    assert done.returncode == 0, done.stderr[-4000:]

    results = np.load(tmp_path / "results.npz")
    for kind, model in models.items():
        before = model.predict(data()[0], verbose=0)
        np.testing.assert_allclose(results[f"{kind}/outputs"], before, atol=1e-6)
        start = model.get_weights()
        trained(model, 1)
        expected = [array(v) for v in (*model.weights, *model.optimizer.variables)]
        assert len([name for name in results if name.startswith(f"{kind}/")]) == 1 + len(expected)
        for i, value in enumerate(expected):
            np.testing.assert_allclose(results[f"{kind}/{i}"], value, rtol=1e-5, atol=1e-6)
        moved = [np.abs(a - b).max() for a, b in zip(start, model.get_weights(), strict=True)]
        assert sorted(moved)[len(moved) // 2] > 1e-3


@pytest.mark.core
def test_weights_file_of_another_configuration(tmp_path):
    """Statistics that the file has not are an error, and nothing is changed."""
    shape = (None, 3)
    plain, counting = layers.BatchNormalization(), layers.BatchNormalization(debiased=True)
    models = [keras.Sequential([keras.Input(shape[1:]), layer]) for layer in (plain, counting)]
    models[0].save_weights(tmp_path / "plain.weights.h5")
    before = counting.get_weights()
    with pytest.raises(ValueError, match="expected 5 variables, but received 4"):
        models[1].load_weights(tmp_path / "plain.weights.h5")
    for a, b in zip(counting.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


# Weights of keras.layers -----------------------------------------------------------------------

IN_KERAS = [
    ("BatchNormalization", {"momentum": 0.7}),
    ("BatchNormalization", {"axis": 1, "scale": False}),
    ("BatchNormalization", {"center": False, "renorm": True}),
    ("LayerNormalization", {"axis": [1, 2]}),
    ("LayerNormalization", {"center": False}),
    ("GroupNormalization", {"groups": 2}),
    ("GroupNormalization", {"groups": -1, "axis": 1, "scale": False}),
    ("RMSNormalization", {"axis": (1, 2)}),
    ("Dropout", {"rate": 0.4}),
]


def sized(name, arguments, library):
    """The layer between two dense ones, with weights and statistics that are not the first."""
    layer = getattr(library, name)(**arguments)
    model = keras.Sequential(
        [keras.Input((4, 6)), keras.layers.Dense(6), layer, keras.layers.Dense(2)]
    )
    return model, layer


@pytest.mark.core
@pytest.mark.parametrize(("name", "arguments"), IN_KERAS)
def test_weights_of_keras_and_back(tmp_path, name, arguments):
    """Files of either load into the other; outputs are the same, also when training goes on."""
    (theirs, their_layer), (ours, our_layer) = (
        sized(name, arguments, library) for library in (keras.layers, layers)
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4, 6)).astype("float32")
    for model in (theirs, ours):
        model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.weights])
    for source, target in ((theirs, ours), (ours, theirs)):
        source.save_weights(tmp_path / "x.weights.h5")
        target.load_weights(tmp_path / "x.weights.h5")
        for a, b in zip(source.get_weights(), target.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(array(theirs(x)), array(ours(x)), rtol=1e-5, atol=1e-5)
        # New numbers for the way back.
        source.set_weights([w * 0.9 for w in source.get_weights()])
        ours.set_weights(source.get_weights())
        theirs.set_weights(source.get_weights())
    assert [w.name for w in our_layer.weights] == [w.name for w in their_layer.weights]
    if name == "BatchNormalization":
        for _ in range(3):
            y = [array(layer(x, training=True)) for layer in (their_layer, our_layer)]
            np.testing.assert_allclose(*y, rtol=1e-4, atol=1e-4)
        for a, b in zip(their_layer.get_weights(), our_layer.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize(("name", "arguments"), IN_KERAS)
def test_configuration_of_keras(name, arguments):
    """`from_config` takes what Keras's layer writes, and knows every argument of it."""
    theirs = getattr(keras.layers, name)(**arguments).get_config()
    ours = getattr(layers, name).from_config(theirs).get_config()
    assert set(theirs) <= set(ours)
    assert {key: ours[key] for key in theirs if key != "dtype"} == {
        key: value for key, value in theirs.items() if key != "dtype"
    }


# Exported ----------------------------------------------------------------------------------------


def images():
    return [
        keras.Input((4, 4, 6)),
        keras.layers.Conv2D(6, 3, padding="same"),
        layers.BatchNormalization(),
        layers.SpatialBatchNormalization(renorm=True),
        layers.GroupNormalization(3),
        layers.InstanceNormalization(),
        layers.LayerNormalization(axis=(1, 2, 3)),
        layers.RMSNormalization(),
        layers.Dropout(0.5),
    ]


def channels_first():
    return [
        keras.Input((6, 4)),
        keras.layers.Dense(4),
        layers.BatchNormalization(axis=1, debiased=True, use_batch_statistics=False),
        layers.SpatialBatchNormalization("channels_first", virtual_batch_size=2),
        layers.GroupNormalization(2, axis=1),
        layers.InstanceNormalization(axis=1, center=False),
        layers.BatchNormalization(axis=(1, 2), momentum=None),
        layers.LayerNormalization(scale=False),
    ]


def research():
    """The decompositions of covariances are operations of the models, on their weights alone."""
    return [
        keras.Input((4, 4, 6)),
        keras.layers.Conv2D(6, 3, padding="same"),
        layers.DecorrelatedBatchNormalization(group_size=3),
        layers.DecorrelatedBatchNormalization(method="cholesky", shrinkage=0.1, momentum=None),
        layers.DecorrelatedBatchNormalization(method="newton", group_size=2, center=False),
        layers.QuantileNormalization(quantiles=5, target="uniform"),
        layers.QuantileNormalization(debiased=True),
        layers.FilterResponseNormalization(learn_epsilon=True),
    ]


def saved_model(model, path, x):
    import tensorflow as tf

    model.export(path, format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(path)
    return [loaded.serve(v).numpy() for v in x]


def onnx(model, path, x):
    pytest.importorskip("tf2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model.export(f"{path}.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(f"{path}.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [session.run(None, {name: v})[0] for v in x]


def litert(model, path, x):
    import tensorflow as tf

    model.export(f"{path}.tflite", format="litert", verbose=False)
    interpreter = tf.lite.Interpreter(f"{path}.tflite")
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    outputs = []
    for v in x:
        interpreter.resize_tensor_input(source["index"], v.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(source["index"], v)
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(target["index"]))
    return outputs


@functools.cache
def trained_stack(stack):
    """Once for all formats."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(stack())
    model.compile("sgd", "mse", run_eagerly=stack is research)  # quicker than to compile all that
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(16, *model.input_shape[1:])) * 2 + 1).astype("float32")
    model.fit(x, x[..., : model.output_shape[-1]], batch_size=8, epochs=2, verbose=0)
    for layer in model.layers:
        added = [rng.uniform(0, 0.3, w.shape) for w in layer.get_weights()]
        if stack is research:  # covariances and quantiles are not any numbers
            added = [a if w.trainable else 0 for a, w in zip(added, layer.weights, strict=True)]
        layer.set_weights([w + a for w, a in zip(layer.get_weights(), added, strict=True)])
    return model, x


@TENSORFLOW
@pytest.mark.slow
@pytest.mark.filterwarnings(  # of what Keras and TensorFlow do inside
    "ignore:In the future `np.object`:FutureWarning",
    "ignore:.*tf.lite.Interpreter is deprecated:UserWarning",
)
@pytest.mark.parametrize("export", [saved_model, onnx, litert])
@pytest.mark.parametrize("stack", [images, channels_first, research])
def test_exported_models_give_the_same_outputs(tmp_path, export, stack):
    """After training, for batches of other sizes than the model saw."""
    model, x = trained_stack(stack)
    batches = x[:5], x[5:6]
    expected = [model.predict(v, verbose=0) for v in batches]
    assert np.std(expected[0]) > 0.1
    for y, z in zip(export(model, str(tmp_path / "model"), batches), expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


@TENSORFLOW
def test_hand_derived_gradients_in_a_saved_model(tmp_path):
    """With `experimental_custom_gradients` a reloaded model is trained by the same gradients."""
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4, 6)), layers.BatchNormalization()])
    model.layers[0].set_weights([np.random.default_rng(0).uniform(0.5, 2, 6) for _ in range(4)])
    x = tf.constant(np.random.default_rng(1).normal(size=(5, 4, 6)), "float32")

    def forward(x):
        return model(x, training=True)

    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None, 4, 6), "float32")]
    archive.add_endpoint("forward", forward, input_signature=signature)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    archive.write_out(tmp_path / "model", options=options, verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    slopes = []
    for function in (forward, loaded.forward):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(function(x) ** 3)
        slopes.append(tape.gradient(loss, x).numpy())
    assert np.abs(slopes[0]).max() > 0.1
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    found = {}
    for kind, file in zip(("keras", "weights"), sys.argv[2:], strict=True):
        outputs, after = resume(kind, file)
        found[f"{kind}/outputs"] = outputs
        found |= {f"{kind}/{i}": value for i, value in enumerate(after)}
    np.savez(sys.argv[1], **found)

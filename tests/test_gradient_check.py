"""The gradient check finds wrong gradients, passes right ones, and leaves its target alone."""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_norm import _gradients
from keras_norm.gradient_check import GradientError, check, gradients

pytestmark = pytest.mark.core

layers = keras.layers


def to_numpy(tensor):
    return np.asarray(ops.convert_to_numpy(ops.copy(tensor)))


def state(target):
    """Every bit of the variables: weights, moving statistics, seed generators."""
    return {variable.path: to_numpy(variable.value).tobytes() for variable in target.variables}


def batch_norm_input():
    return 5 * np.random.randn(4, 5) + 12


def with_gradient(function, gradient):
    """`function` of one tensor, with `gradient(x, dy)` in place of its own."""

    @ops.custom_gradient
    def wrapped(x):
        def grad(*args, upstream=None):
            return gradient(x, args[0] if upstream is None else upstream)

        return function(x), grad

    return lambda x: wrapped(x)


@pytest.fixture
def float64_policy():
    """float64 is what layers, inputs and losses are made of."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_floatx(floatx)


# The figures of the report, against gradients known in closed form


def test_polynomial_has_its_known_derivative():
    x, upstream = np.array([1.0, -2.0, 0.5]), np.array([1.0, 10.0, -1.0])
    entry = check(lambda x: x**3 - 2 * x, x, upstream=upstream).require(1e-11)["x"]
    expected = (3 * x**2 - 2) * upstream
    assert entry.analytic_norm == pytest.approx(np.linalg.norm(expected), rel=1e-15)
    assert entry.numerical_norm == pytest.approx(np.linalg.norm(expected), rel=1e-11)
    assert (entry.shape, entry.checked, entry.kinks, entry.zero) == ((3,), 3, 0, False)


@pytest.mark.parametrize("step", [1e-2, 1e-3])
def test_error_of_order_2_is_a_sixth_of_the_third_derivative_times_step_squared(step):
    entry = check(lambda x: x**3, np.array(7.0), upstream=1.0, order=2, step=step, scale_step=False)
    assert entry["x"].numerical - entry["x"].analytic == pytest.approx(step**2, rel=1e-4)


def test_step_is_scaled_with_the_element():
    scaled = check(lambda x: x**3, np.array([7.0]), upstream=[1.0], order=2, step=1e-3)["x"]
    assert scaled.numerical - scaled.analytic == pytest.approx((7 * 1e-3) ** 2, rel=1e-4)


def test_order_4_is_exact_where_order_2_is_not():
    x = np.linspace(-2, 2, 7)
    errors = [check(ops.sin, x, order=o, step=1e-3).max_relative_norm for o in (2, 4)]
    assert errors[0] > 1e-8
    assert errors[1] < 1e-11


def test_figures_are_those_of_their_definitions():
    x, upstream, wrong = np.array([1.0, 2.0, 4.0]), np.ones(3), np.array([2.0, 4.004, 8.0])
    square = with_gradient(ops.square, lambda x, dy: dy * ops.convert_to_tensor(wrong))
    entry = check(square, x, upstream=upstream)["x"]
    a, b = wrong, 2 * x
    norm = np.linalg.norm
    assert entry.relative_norm == pytest.approx(norm(a - b) / (norm(a) + norm(b)), rel=1e-6)
    assert entry.max_absolute == pytest.approx(0.004, rel=1e-6)
    assert entry.max_relative == pytest.approx(0.004 / 8.004, rel=1e-6)
    assert entry.worst_index == (1,)
    assert (entry.analytic, entry.numerical) == (4.004, pytest.approx(4.0, abs=1e-9))


def test_matrix_product_of_two_inputs():
    a, b = np.random.randn(3, 4), np.random.randn(4, 2)
    upstream = np.random.randn(3, 2)
    report = check(lambda a, b: ops.matmul(a, b), a, b, upstream=upstream).require(1e-11)
    assert [entry.name for entry in report.entries] == ["a", "b"]
    assert report["a"].analytic_norm == pytest.approx(np.linalg.norm(upstream @ b.T), rel=1e-14)
    assert report["b"].analytic_norm == pytest.approx(np.linalg.norm(a.T @ upstream), rel=1e-14)
    assert report.value == pytest.approx(np.sum(a @ b * upstream), rel=1e-13)


def test_softmax_cross_entropy():
    scores, labels = np.random.randn(6, 4), np.array([0, 3, 1, 2, 2, 0])

    def cross_entropy(scores):
        picked = ops.take_along_axis(scores, ops.convert_to_tensor(labels[:, None]), axis=1)
        return ops.mean(ops.logsumexp(scores, axis=1) - picked[:, 0])

    report = check(cross_entropy, scores, upstream=1.0).require(1e-10)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = (p - np.eye(4)[labels]) / 6
    assert report["scores"].analytic_norm == pytest.approx(np.linalg.norm(expected), rel=1e-13)


# Wrong gradients


@pytest.mark.parametrize("index", [(0, 0), (2, 1), (3, 4)])
def test_sign_of_one_element_is_caught(index):
    sign = np.ones((4, 5))
    sign[index] = -1
    x = np.random.uniform(1, 2, (4, 5))
    wrong = with_gradient(ops.square, lambda x, dy: 2 * x * dy * ops.convert_to_tensor(sign))
    report = check(wrong, x)
    assert report["x"].worst_index == index
    assert report["x"].analytic == pytest.approx(-report["x"].numerical, rel=1e-9)
    with pytest.raises(GradientError, match=r"x: analytic and numerical gradients differ") as error:
        report.require(1e-6)
    assert str(report) in str(error.value)
    check(with_gradient(ops.square, lambda x, dy: 2 * x * dy), x).require(1e-10)


def test_error_in_the_tenth_digit_is_caught():
    x = np.random.randn(3, 3)
    wrong = with_gradient(ops.sin, lambda x, dy: dy * ops.cos(x) * (1 + 1e-9))
    check(wrong, x).require(1e-8)
    with pytest.raises(GradientError):
        check(wrong, x).require(1e-10)


def test_dropped_term_is_caught():
    def variance(x):  # its mean taken as a constant, its deviation from x not
        mean = ops.stop_gradient(ops.mean(x, axis=0))
        return ops.mean(ops.square(x - mean), axis=0) + mean

    x = np.random.randn(5, 3)
    with pytest.raises(GradientError, match=r"x: .*in norm"):
        check(variance, x).require(1e-3)


def test_missing_gradient_is_caught_though_the_backend_returns_none():
    report = check(lambda x: ops.stop_gradient(ops.square(x)), np.array([1.0, 2.0]))
    assert not report["x"].zero
    assert report["x"].relative_norm == pytest.approx(1)


def test_gradient_that_is_not_zero_by_construction_is_caught():
    wrong = with_gradient(lambda x: 0 * x, lambda x, dy: 1e-3 * dy)
    report = check(wrong, np.array([1.0, 2.0]))
    assert not report["x"].zero
    with pytest.raises(GradientError):
        report.require(1e-3)


def test_infinite_and_undefined_gradients_are_caught():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    for wrong in (math.nan, math.inf):
        factor = np.array([[1.0, 1.0], [wrong, 1.0]])
        function = with_gradient(ops.sin, lambda x, dy, f=factor: dy * ops.convert_to_tensor(f))
        entry = check(function, x)["x"]
        assert entry.relative_norm == entry.max_absolute == entry.max_relative == math.inf
        assert entry.worst_index == (1, 0)
        with pytest.raises(GradientError):
            check(function, x).require(1.0)


# Layers and models


LAYERS = {
    "dense": (lambda: layers.Dense(3, activation="tanh", dtype="float64"), (4, 5)),
    "conv": (lambda: layers.Conv2D(2, 3, padding="same", dtype="float64"), (2, 4, 4, 2)),
    "layer_norm": (lambda: layers.LayerNormalization(dtype="float64"), (4, 5)),
    "batch_norm": (lambda: layers.BatchNormalization(dtype="float64"), (4, 5)),
    "dropout": (lambda: layers.Dropout(0.5, dtype="float64"), (10, 10)),
    "dropout_seed": (lambda: layers.Dropout(0.5, seed=3, dtype="float64"), (10, 10)),
    "noise": (lambda: layers.GaussianNoise(0.5, dtype="float64"), (4, 5)),
}


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in LAYERS), ("batch_norm", False)]
)
def test_layers_of_keras_agree_to_a_billionth(name, training):
    make, shape = LAYERS[name]
    x, layer = 5 * np.random.randn(*shape) + 12, make()
    report = check(layer, x, training=training).require(1e-9)
    assert len(report.entries) == 1 + len(layer.trainable_variables)
    assert not report.zero
    assert report.backend == keras.backend.backend()


def test_upstream_is_independent_of_an_input_of_the_same_seed():
    x = np.random.default_rng(0).standard_normal((4, 5))
    report = check(layers.BatchNormalization(dtype="float64"), x, seed=0).require(1e-9)
    assert report["inputs"].analytic_norm > 0.1  # along its own input it vanishes


@pytest.mark.slow_on_jax
def test_untraced_target_gives_the_same_gradients():
    layer, x = layers.BatchNormalization(dtype="float64"), batch_norm_input()
    traced, untraced = (check(layer, x, traced=traced).require(1e-9) for traced in (True, False))
    for one, other in zip(traced.entries, untraced.entries, strict=True):
        assert one.analytic_norm == pytest.approx(other.analytic_norm, rel=1e-13)
        assert one.numerical_norm == pytest.approx(other.numerical_norm, rel=1e-9)


def test_batch_norm_at_order_2_agrees_to_a_billionth():
    layer = layers.BatchNormalization(epsilon=1e-5, dtype="float64")
    report = check(layer, batch_norm_input(), order=2).require(1e-9)
    assert report.order == 2
    assert report.step == 1e-5


def test_training_is_passed_on():
    layer, x = layers.BatchNormalization(epsilon=0.0, dtype="float64"), batch_norm_input()
    upstream = np.random.randn(4, 5)
    infer = check(layer, x, upstream=upstream, training=False)
    train = check(layer, x, upstream=upstream, training=True)
    assert infer["inputs"].analytic_norm == pytest.approx(np.linalg.norm(upstream))
    assert train["inputs"].analytic_norm != pytest.approx(infer["inputs"].analytic_norm, rel=0.1)


def test_frozen_layer_has_only_its_input():
    layer = layers.Dense(2, dtype="float64", trainable=False)
    report = check(layer, np.random.randn(3, 4)).require(1e-10)
    assert [entry.name for entry in report.entries] == ["inputs"]


def test_embedding_of_integers_has_only_its_variable():
    layer = layers.Embedding(4, 3, dtype="float64")
    report = check(layer, np.array([[0, 2], [2, 2]])).require(1e-10)
    (entry,) = report.entries
    assert entry.name.endswith("embeddings")
    assert entry.checked == 12
    assert not entry.zero


def test_regularization_is_part_of_a_loss(float64_policy):
    decay = 3.125  # without rounding: Keras keeps it in float32
    layer = layers.Dense(2, use_bias=False, kernel_regularizer=keras.regularizers.L2(decay))
    x = np.random.randn(3, 4)
    report = check(layer, x, loss=ops.sum).require(1e-10)
    kernel = to_numpy(layer.kernel.value)
    expected = x.sum(0)[:, None] + 2 * decay * kernel
    assert report["kernel"].analytic_norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    assert report.value == pytest.approx((x @ kernel).sum() + decay * (kernel**2).sum())


def test_activity_regularization_is_part_of_a_loss(float64_policy):
    layer = layers.Dense(2, use_bias=False, activity_regularizer=keras.regularizers.L2(0.5))
    x = np.random.randn(3, 4)
    report = check(layer, x, loss=lambda y: 0 * ops.sum(y)).require(1e-10)
    expected = 2 * 0.5 / 3 * x.T @ (x @ to_numpy(layer.kernel.value))
    assert report["kernel"].analytic_norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)


def small_network(decay):
    regularizer = keras.regularizers.L2(decay) if decay else None
    blocks = [
        [
            layers.Dense(units, kernel_regularizer=regularizer),
            layers.BatchNormalization(epsilon=1e-5),
            layers.ReLU(),
        ]
        for units in (20, 30)
    ]
    return keras.Sequential([*blocks[0], *blocks[1], layers.Dense(10)])


@pytest.mark.parametrize("decay", [pytest.param(0, marks=pytest.mark.slow_on_jax), 3.125])
def test_whole_network_with_a_bias_before_batch_norm(float64_policy, decay):
    network = small_network(decay)
    x, labels = np.random.randn(4, 15), np.array([3, 1, 0, 7])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = check(network, x, loss=lambda scores: loss(labels, scores), samples=5)
    report.require(1e-7)
    assert len(report.entries) == 11
    biases = [entry.name.split("/")[-2:] for entry in report.zero]
    assert [name for _, name in biases] == ["bias", "bias"]
    assert all(entry.max_absolute < 1e-8 for entry in report.zero)
    assert not report.worst.zero
    assert str(report).count("zero within") == 2


def test_model_with_named_inputs_and_two_outputs(float64_policy):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    joined = layers.Concatenate()([a, b])
    model = keras.Model({"a": a, "b": b}, [layers.Dense(2)(joined), layers.Dense(1)(a)])
    x = {"a": np.random.randn(4, 3), "b": np.random.randn(4, 2)}
    report = check(model, x).require(1e-10)
    assert [entry.name for entry in report.entries[:2]] == ["inputs['a']", "inputs['b']"]
    assert len(report.entries) == 6
    upstream = [np.zeros((4, 2)), np.ones((4, 1))]
    report = check(model, x, upstream=upstream)
    assert report["inputs['b']"].no_effect
    assert not report["inputs['a']"].zero


def test_subclassed_model_and_call_arguments(float64_policy):
    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x, weights, power=1):
            return self.dense(x * weights) ** power

    weights = np.array([[1.0, 0.0, 1.0]])
    report = check(Masked(), np.random.randn(2, 3), weights, power=3).require(1e-9)
    assert [entry.name for entry in report.entries[:2]] == ["x", "weights"]


def test_function_of_given_variables():
    w, unused = (keras.Variable(np.random.randn(3), dtype="float64") for _ in range(2))
    x = np.random.randn(2, 3)
    report = check(lambda x: ops.tanh(x * w), x, variables=[w, unused]).require(1e-9)
    assert [entry.no_effect for entry in report.entries] == [False, False, True]
    assert "no effect" in str(report)


# State


def noisy_network():
    network = keras.Sequential(
        [
            layers.Dense(4, dtype="float64"),
            layers.BatchNormalization(dtype="float64"),
            layers.Dropout(0.5, seed=1, dtype="float64"),
            layers.Dropout(0.5, dtype="float64"),
        ]
    )
    network(ops.convert_to_tensor(np.random.randn(8, 3)), training=True)  # away from 0 and 1
    return network


def test_target_is_left_as_it_was():
    network, x = noisy_network(), np.random.randn(8, 3)
    copies, before = x.copy(), state(network)
    assert sum("moving" in path for path in before) == 2
    report = check(network, x, samples=2).require(1e-8)
    assert state(network) == before
    assert np.array_equal(x, copies)
    again = check(network, x, samples=2)
    assert again.to_dict() == report.to_dict()


@pytest.mark.slow_on_jax
def test_target_is_left_as_it_was_by_an_exception():
    network, x, calls = noisy_network(), np.random.randn(8, 3), []

    def failing(y):
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("the twentieth evaluation fails")
        return ops.sum(y**2)

    before = state(network)
    promoted = keras.backend.result_type("float64", "float64")
    with pytest.raises(RuntimeError, match="twentieth"):
        check(network, x, loss=failing, traced=False)
    assert state(network) == before
    assert keras.backend.result_type("float64", "float64") == promoted
    assert not keras.StatelessScope().state_mapping
    network(ops.convert_to_tensor(x), training=True)
    assert state(network) != before  # the comparison can tell


def test_unbuilt_target_starts_with_untouched_statistics():
    layer = layers.BatchNormalization(dtype="float64")
    check(layer, batch_norm_input())
    assert np.array_equal(to_numpy(layer.moving_mean), np.zeros(5))
    assert np.array_equal(to_numpy(layer.moving_variance), np.ones(5))


def test_random_state_outside_the_target_is_left_as_it_was():
    def draw():
        return to_numpy(layers.Dropout(0.5)(np.ones((4, 4), "float32"), training=True))

    keras.utils.set_random_seed(5)
    expected = draw()
    keras.utils.set_random_seed(5)
    network = layers.Dropout(0.5, seed=1, dtype="float64")
    check(network, np.random.randn(4, 4))
    assert np.array_equal(draw(), expected)


def test_random_function_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="Two evaluations at the same point must agree"):
        check(lambda x: x * ops.convert_to_tensor(np.random.randn(3)), np.ones(3))


# Samples, kinks


def test_samples_are_chosen_by_seed_and_stated():
    x = np.random.randn(6, 5)
    report = check(ops.sin, x, samples=7, seed=1).require(1e-10)
    assert report.entries[0].checked == 7
    assert "7/30" in str(report)
    same = check(ops.sin, x, samples=7, seed=1)
    other = check(ops.sin, x, samples=7, seed=2)
    assert same.to_dict() == report.to_dict()
    assert other.entries[0].numerical_norm != same.entries[0].numerical_norm
    assert check(ops.sin, x, samples=99).entries[0].checked == 30


def test_samples_find_an_error_only_where_they_look():
    sign = np.ones(40)
    sign[17] = -1
    wrong = with_gradient(ops.square, lambda x, dy: 2 * x * dy * ops.convert_to_tensor(sign))
    x = np.random.uniform(1, 2, 40)
    found = [check(wrong, x, samples=10, seed=s).max_relative_norm > 1e-3 for s in range(6)]
    assert 0 < sum(found) < 6


def test_kink_near_an_element_is_stepped_around():
    x = np.array([1.0, 3e-5, -2e-6, -1.0])
    report = check(ops.relu, x, upstream=np.ones(4)).require(1e-9)
    assert report.entries[0].numerical_norm == pytest.approx(math.sqrt(2))
    coarse = check(ops.relu, x, upstream=np.ones(4), order=2, step=1e-4)
    assert coarse.max_relative_norm > 0.1


def test_kink_at_an_element_is_counted_and_refused():
    report = check(ops.relu, np.array([1.0, 0.0, -1.0, 0.0]), upstream=np.ones(4))
    assert report.entries[0].kinks == 2
    assert report.max_relative_norm < 1e-11
    assert "2 kinks" in str(report)
    with pytest.raises(GradientError, match="2 of 4 elements have no measurable derivative"):
        report.require(1e-9)
    assert report.require(1e-9, kinks=0.5) is report


def test_function_without_derivatives_cannot_pass():
    report = check(ops.abs, np.zeros(3))
    assert report.entries[0].kinks == 3
    with pytest.raises(GradientError):
        report.require(1.0, kinks=1.0)


def test_edge_of_the_domain_is_stepped_around():
    check(ops.log, np.array([3e-5, 1e-4, 1.0]), step=1e-4).require(1e-8)
    check(lambda x: 1 / x, np.array([1e-3, 1.0]), step=1e-3).require(1e-8)


def test_float32_inside_the_target_does_not_pass():
    def rounded(x):
        return ops.cast(ops.sin(ops.cast(x, "float32")), "float64")

    with pytest.raises(GradientError):
        check(rounded, np.random.randn(5)).require(1e-6)


# The report


def test_report_reads_as_a_table_and_as_json():
    layer = layers.Dense(2, dtype="float64", name="dense")
    report = check(layer, np.random.randn(3, 4))
    title, header, rule, *rows = str(report).splitlines()
    assert title.startswith(f"Gradients of dense on {keras.backend.backend()}")
    assert header.split()[:3] == ["variable", "shape", "checked"]
    assert set(rule) == {"-"}
    assert [row.split()[1] for row in rows] == ["3×4", "4×2", "2"]
    assert [row.index(" ") for row in rows] == [len(entry.name) for entry in report.entries]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["entries"][1]["shape"] == [4, 2]
    assert data["entries"][1]["worst_index"] == list(report.entries[1].worst_index)


def test_entries_are_found_by_name():
    report = check(layers.Dense(2, dtype="float64"), np.random.randn(3, 4))
    assert report["bias"] is report[report.entries[2].name]
    with pytest.raises(KeyError, match="0 entries are named 'gamma'"):
        report["gamma"]


def test_worst_leaves_out_what_is_zero():
    w = keras.Variable(np.ones(2), dtype="float64")
    report = check(ops.sin, np.ones(2), variables=[w])
    assert report.worst.name != w.path
    assert report.zero == (report.entries[1],)


def test_elementwise_bound():
    scale = np.array([1.0, 1.0 + 1e-4, 1.0, 1.0])
    wrong = with_gradient(lambda x: 3 * x, lambda x, dy: 3 * dy * ops.convert_to_tensor(scale))
    report = check(wrong, np.ones(4), upstream=[1e4, 1.0, 1e4, 1e4])
    report.require(1e-7)
    with pytest.raises(GradientError, match=r"an element differs by 5\.00e-05"):
        report.require(1e-7, elementwise=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0}, "tolerance=0"),
        ({"tolerance": math.nan}, "tolerance=nan"),
        ({"tolerance": "1e-9"}, "a positive number. Received: tolerance='1e-9'"),
        ({"tolerance": True}, "tolerance=True"),
        ({"tolerance": 1e-9, "elementwise": -1.0}, "elementwise=-1.0"),
        ({"tolerance": 1e-9, "kinks": 2}, "kinks=2"),
        ({"tolerance": 1e-9, "kinks": "0"}, "kinks='0'"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(ops.sin, np.ones(2)).require(**arguments)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0.0}, "step=0.0"),
        ({"step": -1e-5}, "step=-1e-05"),
        ({"step": math.nan}, "step=nan"),
        ({"step": "1e-4"}, "a positive number. Received: step='1e-4'"),
        ({"step": True}, "step=True"),
        ({"order": 3}, "order=3"),
        ({"samples": 0}, "samples=0"),
        ({"names": ["a", "b"]}, r"names=\['a', 'b'\]"),
        ({"upstream": np.ones(3)}, r"shapes=.*\(3,\)"),
        ({"upstream": np.ones(2), "loss": ops.sum}, "not both"),
        ({"loss": ops.square}, r"scalar. Received: shape=\(2,\)"),
        ({"loss": "mse"}, r"of the output alone.*loss='mse'.*lambda y: loss\(targets, y\)"),
        ({"loss": keras.losses.MeanSquaredError(dtype="float64")}, "alone.*mean_squared_error"),
        ({"loss": keras.losses.mean_squared_error}, "alone.*mean_squared_error"),
        ({"loss": lambda y: None}, "loss must return a float64 scalar. Received: None"),
        ({"variables": keras.Variable(np.ones(2))}, r"list of `keras\.Variable`s.*\[variable\]"),
        ({"variables": [np.ones(2)]}, r"list of .*Received: variables=\[array.*arrays as inputs"),
        ({"variables": np.ones(2)}, r"list of .*Received: variables=array"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(lambda x: ops.sin(x), np.ones(2), **arguments)


def test_names_replace_those_of_the_arguments():
    report = check(lambda x, y: x * y, np.ones(2), np.ones(2), names=["first", "second"])
    assert [entry.name for entry in report.entries] == ["first", "second"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (ops.sin, np.ones(2, "float32")), "input x of dtype=float32"),
        (lambda: (ops.sin, np.ones(2, "float16")), "input x of dtype=float16"),
        (lambda: (layers.Dense(2), np.ones((2, 3))), "layer dense.* of dtype=float32"),
        (lambda: (layers.ReLU(), np.ones((2, 3))), "layer re_lu.* of dtype=float32"),
        (
            lambda: (
                keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype="float64")]),
                np.ones((2, 3)),
            ),
            "layer sequential.* of dtype=float32",
        ),
        (
            lambda: (
                keras.Sequential(
                    [layers.Dense(2, dtype="float64"), layers.ReLU(), layers.ReLU(dtype="float64")]
                ),
                np.ones((2, 3)),
            ),
            "layer re_lu.* of dtype=float32",
        ),
        (lambda: (lambda x: ops.cast(x, "float32"), np.ones(2)), "output 0 of dtype=float32"),
    ],
)
def test_float32_is_refused_with_the_remedy(make, message):
    target, x = make()
    with pytest.raises(ValueError, match=message) as error:
        check(target, x)
    assert 'dtype="float64"' in str(error.value)


def test_float32_variable_is_refused():
    with pytest.raises(ValueError, match=r"variable .* of dtype=float32"):
        check(ops.sin, np.ones(2), variables=[keras.Variable(np.ones(2, "float32"))])


def test_float32_loss_of_keras_is_refused():
    layer, labels = layers.Dense(2, dtype="float64"), np.array([0, 1, 1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match="the loss of dtype=float32"):
        check(layer, np.random.randn(3, 4), loss=lambda y: loss(labels, y))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_must_be_finite(bad):
    with pytest.raises(ValueError, match=r"input x\[1\]|x\[1\]="):
        check(lambda x: ops.sin(x), np.array([1.0, bad]))
    with pytest.raises(ValueError, match=r"output 0\[0\]="):
        check(lambda x: bad * x, np.array([1.0, 2.0]))


def test_something_must_be_differentiable():
    with pytest.raises(ValueError, match="nothing to differentiate"):
        check(lambda x: ops.cast(x, "float64"), np.array([1, 2]))
    with pytest.raises(ValueError, match="no floating-point output"):
        check(lambda x: ops.cast(x, "int32"), np.array([1.0, 2.0]))


def test_float64_switched_off_is_refused(monkeypatch):
    if keras.backend.backend() != "jax":
        pytest.skip("only JAX can be without float64")
    import jax

    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
            check(ops.sin, np.ones(2))
    finally:
        jax.config.update("jax_enable_x64", True)


# gradients()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("constant", [-1e9, 1e14])
def test_large_constants_beside_a_gradient_hide_nothing(sign, constant):
    """As the -1e9 of a mask: they do not depend on x, and cancel exactly."""
    tanh = with_gradient(ops.tanh, lambda x, dy: sign * (1 - ops.square(ops.tanh(x))) * dy)
    mask = np.tril(np.ones((5, 5), bool))

    def causal(x):
        return ops.where(mask, tanh(x), ops.full_like(x, constant))

    report = check(causal, np.random.default_rng(1).normal(size=(5, 5)))
    assert (report.entries[0].relative_norm < 1e-9) == (sign == 1)
    if sign < 0:
        with pytest.raises(GradientError):
            report.require(1e-3)


def test_wrong_numbers_are_refused():
    x = np.ones(3)
    for options, message in (
        ({"samples": 2.5}, r"samples=2\.5"),
        ({"seed": None}, "seed=None"),
        ({"upstream": np.array([1.0, np.nan, 1.0])}, r"upstream 0\[1\]=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            check(ops.tanh, x, **options)


def test_gradients_of_arrays_and_variables():
    x, y = np.array([1.0, 2.0]), np.array([3.0, -1.0])
    w = keras.Variable(np.array([2.0, 5.0]), dtype="float64")
    frozen = keras.Variable(np.array(4.0), dtype="float64", trainable=False)
    value, grads = gradients(
        lambda x, y: ops.sum(x * x * w) * frozen, [x, y], variables=[w, frozen]
    )
    assert float(value) == 88.0
    expected = [[16.0, 80.0], [0.0, 0.0], [4.0, 16.0], 22.0]
    for grad, reference in zip(grads, expected, strict=True):
        assert np.array_equal(to_numpy(grad), reference)
        assert keras.backend.standardize_dtype(grad.dtype) == "float64"


def test_gradients_of_the_same_array_passed_twice():
    x = ops.convert_to_tensor(np.array(3.0))
    _, (first, second) = gradients(lambda a, b: a * a + 5 * b, [x, x])
    assert (float(first), float(second)) == (6.0, 5.0)


def test_gradients_keep_the_dtype_and_discard_updates():
    counter = keras.Variable(0.0, trainable=False)

    def count(x):
        counter.assign(counter + 1)
        return ops.sum(x) * counter

    value, (grad,) = gradients(count, [np.ones(3, "float32")])
    assert float(value) == 3.0
    assert keras.backend.standardize_dtype(grad.dtype) == "float32"
    assert float(counter.value) == 0.0


def test_gradients_of_a_constant_are_zero():
    w = keras.Variable(np.ones(2), dtype="float64")
    _, grads = gradients(lambda x: ops.ones(()), [np.ones(3)], variables=[w])
    assert [to_numpy(grad).tolist() for grad in grads] == [[0.0] * 3, [0.0] * 2]


def test_gradients_refuse_what_has_none():
    with pytest.raises(ValueError, match=r"arrays\[0\] of dtype=int"):
        gradients(ops.sum, [np.array([1, 2])])
    with pytest.raises(ValueError, match=r"variables\[0\] of dtype=int32"):
        gradients(lambda: 1.0, [], variables=[keras.Variable(1, dtype="int32", trainable=False)])
    with pytest.raises(ValueError, match=r"shape=\(2,\)"):
        gradients(ops.sin, [np.ones(2)])


def test_gradients_refuse_a_backend_without_them(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ValueError, match="backend='numpy'"):
        gradients(ops.sum, [np.ones(2)])


def test_promotion_computes_in_float64_and_is_put_back():
    a, b = np.random.randn(3, 4), np.random.randn(4, 2)
    before = keras.backend.result_type("float64", "float64")
    with _gradients.float64_promotion():
        product = ops.matmul(ops.convert_to_tensor(a), ops.convert_to_tensor(b))
    assert np.abs(to_numpy(product) - a @ b).max() < 1e-14
    assert keras.backend.result_type("float64", "float64") == before

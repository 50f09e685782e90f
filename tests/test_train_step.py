import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import PLAIN_STEP, PUBLISHED, TINY, assert_same_bits, golden, golden_params, leaves
from mixer.models.registry import make_model
from mixer.training import losses, optimizer
from mixer.training.mixup import make_mix
from mixer.training.state import TrainState
from mixer.training.step import TrainStep, normalize


def _schedule(**changes):
    settings = dict(
        **dict(peak_lr=1e-3, total_steps=10, decay="linear", warmup_steps=4),
        **dict(final_multiplier=1e-5, rsqrt_timescale=10_000, cooldown_steps=0),
    )
    return optimizer.make_schedule(**{**settings, **changes})


def test_schedule_matches_the_reference():
    schedule = _schedule(peak_lr=1.0)
    expected = golden("adam_steps")["lr_multiplier"]
    np.testing.assert_allclose([schedule(step) for step in range(10)], expected, atol=1e-7)


def test_losses_match_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)) * 3, rng.dirichlet(np.ones(5), size=4)
    logits, labels = logits.astype(np.float32), labels.astype(np.float32)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        losses.softmax(logits, labels), -(labels * log_softmax).sum(-1), rtol=1e-5
    )
    probs = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(probs) + (1 - labels) * np.log(1 - probs)).sum(-1)
    np.testing.assert_allclose(losses.sigmoid(logits, labels), expected, rtol=1e-5)


def test_training_step_reduces_the_loss_and_reports_metrics():
    model = make_model(num_classes=7, **{**SMALL, **ONE_BLOCK})
    schedule = _schedule(decay="constant", warmup_steps=0, peak_lr=3e-3)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = _params_with_zero_head(1)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (14, 32, 32, 3), np.uint8), "label": np.arange(14) % 7}
    step = jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **PLAIN_STEP))
    initial_metrics = None
    for _ in range(30):
        state, metrics = step(state, batch)
        initial_metrics = initial_metrics or metrics
    assert int(state.step) == 30
    # The head starts at zero, so the first prediction is uniform.
    np.testing.assert_allclose(initial_metrics["loss"], np.log(7), rtol=1e-5)
    assert metrics["loss"] < 0.5 * initial_metrics["loss"]
    assert metrics["accuracy"] > 0.8
    np.testing.assert_allclose(metrics["learning_rate"], 3e-3)
    squares = [np.sum(np.square(leaf)) for leaf in leaves(state.params).values()]
    np.testing.assert_allclose(metrics["param_norm"], np.sqrt(sum(squares)), rtol=1e-6)


@pytest.mark.slow
def test_stochastic_depth_depends_on_step_and_seed():
    model = make_model(num_classes=7, **SMALL)
    schedule = lambda step: jnp.float32(0)  # noqa: E731 (parameters stay: only masks differ)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = _golden_params(2)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    batch = {"image": np.full((4, 32, 32, 3), 200, np.uint8), "label": np.arange(4)}

    updates = {
        seed: jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=seed, **PLAIN_STEP))
        for seed in (0, 1)
    }

    def loss(seed, step):
        return float(updates[seed](state.replace(step=jnp.int32(step)), batch)[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


def test_normalize_maps_to_the_published_range():
    pixels = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(normalize(pixels).ravel(), [-1, 1])


# Two blocks of the golden model; stochastic depth drops the second for half of the images.
SMALL = {**TINY, "num_blocks": 2, "stoch_depth": 0.5}
# One block without stochastic depth, for tests that do not depend on it.
ONE_BLOCK = dict(num_blocks=1, stoch_depth=0.0)
# Without mixup and label smoothing.
PLAIN = dict(mix=PLAIN_STEP["mix"], label_smoothing=0.0)


def _golden_params(num_blocks):
    dropped_blocks = [f"MixerBlock_{i}" for i in range(num_blocks, 3)]
    params = {name: value for name, value in golden_params().items() if name not in dropped_blocks}
    return jax.tree.map(jnp.asarray, params)


def _params_with_zero_head(num_blocks):
    """Returns golden parameters with the head of a new model, which predicts every class alike."""
    params = _golden_params(num_blocks)
    return params | {"head": jax.tree.map(np.zeros_like, golden_params()["head"])}


def _mixing_step(model, tx, schedule, **changes):
    mix = make_mix(alpha=0.5, per_example=False, cutmix_alpha=1.0, cutmix_prob=0.5)
    options = {**PLAIN_STEP, "mix": mix, "label_smoothing": 0.1, **changes}
    return jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **options))


def _run(steps=3, *, optimizer_changes=None, model_changes=None, **changes):
    """Returns the initial state, the state after each update, and the metrics of the last one."""
    model = make_model(num_classes=7, **{**SMALL, **(model_changes or {})})
    schedule = lambda step: jnp.float32(0.05)  # noqa: E731
    options = {**PUBLISHED, "name": "sgd", **(optimizer_changes or {})}
    tx = optimizer.make_optimizer(schedule, **options)
    params = _golden_params(model.num_blocks)
    average = params if changes.get("ema_decay") else None
    states = [TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), np.uint8)
    step = _mixing_step(model, tx, schedule, **changes)
    for _ in range(steps):
        state, metrics = step(states[-1], {"image": images, "label": np.arange(12) % 7})
        states.append(state)
    return states, metrics


@pytest.mark.parametrize("sam_rho", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_gradient_accumulation_matches_the_full_batch(sam_rho):
    """Compares 12 images at once with 3 parts, with mixup, stochastic depth and momentum."""
    states, metrics = _run(sam_rho=sam_rho)
    initial, final = leaves(states[0].params), leaves(states[-1].params)
    assert max(np.abs(final[path] - initial[path]).max() for path in final) > 1e-3
    accumulated_states, accumulated_metrics = _run(sam_rho=sam_rho, accumulate_steps=3)
    for path, value in leaves(accumulated_states[-1]).items():
        np.testing.assert_allclose(value, leaves(states[-1])[path], atol=2e-6, err_msg=path)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(accumulated_metrics[name], metrics[name], rtol=1e-5)


def test_moving_average_follows_the_parameters():
    states, _ = _run(ema_decay=0.9, model_changes=ONE_BLOCK, **PLAIN)
    for previous_state, state in itertools.pairwise(states):
        for path, value in leaves(state.ema_params).items():
            expected = (
                0.9 * leaves(previous_state.ema_params)[path] + 0.1 * leaves(state.params)[path]
            )
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_sam_uses_the_gradient_at_the_ascended_parameters():
    """Compares one update without momentum with two gradients computed in the test."""
    options = dict(optimizer_changes=dict(b1=0.0, weight_decay=0.0, grad_clip_norm=0.0))
    (state_before, state_after), _ = _run(
        1, sam_rho=0.5, model_changes=ONE_BLOCK, **PLAIN, **options
    )
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    model = make_model(num_classes=7, **{**SMALL, **ONE_BLOCK})

    def loss(params):
        logits, _ = model.apply({"params": params}, normalize(images))
        return jnp.mean(losses.softmax(logits, jax.nn.one_hot(np.arange(12) % 7, 7)))

    gradient = jax.jit(jax.grad(loss))
    gradients = gradient(state_before.params)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    ascended_params = jax.tree.map(lambda p, g: p + 0.5 * g / norm, state_before.params, gradients)
    ascended_gradients = gradient(ascended_params)
    expected = leaves(
        jax.tree.map(lambda p, g: p - 0.05 * g, state_before.params, ascended_gradients)
    )
    for path, value in leaves(state_after.params).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6, err_msg=path)
    sgd = leaves(jax.tree.map(lambda p, g: p - 0.05 * g, state_before.params, gradients))
    assert max(np.abs(sgd[path] - expected[path]).max() for path in sgd) > 1e-4


def test_learning_rate_multipliers_scale_and_freeze():
    """Frozen parameters stay, without momentum; the head's bias learns at a tenth of the rate."""
    rules = (("head/bias", 0.1), ("head/.*", 1.0), (".*", 0.0))
    changes = dict(optimizer_changes=dict(lr_multipliers=rules, grad_clip_norm=0.0))
    settings = dict(model_changes=ONE_BLOCK, **PLAIN)
    states, metrics = _run(1, lr_multipliers=rules, **changes, **settings)
    params, params_after = leaves(states[0].params), leaves(states[1].params)
    changed_paths = {path for path in params if (params[path] != params_after[path]).any()}
    assert changed_paths == {"['head']['bias']", "['head']['kernel']"}
    momenta = [leaf.shape for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim]
    assert sorted(momenta) == [(7,), (24, 7)]
    unfrozen_states, unfrozen_metrics = _run(
        1, optimizer_changes=dict(grad_clip_norm=0.0), **settings
    )
    for path, multiplier in (("['head']['bias']", 0.1), ("['head']['kernel']", 1.0)):
        expected = multiplier * (leaves(unfrozen_states[1].params)[path] - params[path])
        np.testing.assert_allclose(params_after[path] - params[path], expected, atol=1e-7)
    assert metrics["grad_norm"] < 0.9 * unfrozen_metrics["grad_norm"]  # excludes frozen parameters


def test_labels_may_be_weighted_lists_or_soft():
    batch = {
        "label": jnp.array([[2, 0, -1], [1, -1, -1], [-1, -1, -1]]),
        "label_weight": jnp.array([[1.0, 0.25, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    expected = [[0.25, 0, 1.0], [0, 0.5, 0], [0, 0, 0]]
    np.testing.assert_allclose(losses.dense_labels(batch, 3), expected)
    np.testing.assert_allclose(losses.dense_labels({"label": jnp.array([2, 0])}, 3).sum(-1), 1)
    soft_labels = jnp.array([[0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(losses.dense_labels({"label": soft_labels}, 3), soft_labels)


def test_label_smoothing_changes_the_loss_not_the_accuracy():
    """An image without labels is not a hit, although smoothing makes its labels nonzero."""
    model = make_model(num_classes=7, **{**TINY, "num_blocks": 1})
    params = _params_with_zero_head(1)
    schedule = lambda step: jnp.float32(0)  # noqa: E731
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    options = {**PLAIN_STEP, "label_smoothing": 0.1}
    step = jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **options))
    batch = {
        "image": np.zeros((2, 32, 32, 3), np.uint8),
        "label": np.array([[-1], [0]]),
        "label_weight": np.array([[0.0], [1.0]], np.float32),
    }
    metrics = step(state, batch)[1]
    np.testing.assert_allclose(metrics["accuracy"], 0.5)  # the first guess of zeros is class 0
    np.testing.assert_allclose(metrics["loss"], np.log(7) * (0.1 + 1.0) / 2, rtol=1e-5)


def test_float_images_are_not_normalized():
    floats = jnp.linspace(-2, 2, 12).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(normalize(floats), floats)


@pytest.mark.slow
def test_non_finite_update_is_skipped_and_counted():
    """The step and the schedule advance; parameters, moments and average stay."""
    model = make_model(num_classes=7, **{**TINY, "num_blocks": 1})
    schedule = _schedule(decay="linear", warmup_steps=0, peak_lr=3e-3)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = _golden_params(1)
    step_zero = jnp.zeros((), jnp.int32)
    state = TrainState(step_zero, params, tx.init(params), params, step_zero)
    options = {**PLAIN_STEP, "ema_decay": 0.5}
    step = jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **options))
    finite_batch = {"image": np.full((4, 32, 32, 3), 0.3, np.float32), "label": np.arange(4)}
    nan_batch = {
        **finite_batch,
        "image": np.where(np.arange(4)[:, None, None, None] == 2, np.nan, finite_batch["image"]),
    }
    state, metrics = step(state, finite_batch)
    assert int(metrics["skipped_steps"]) == 0
    skipped_state, metrics = step(state, nan_batch)
    assert np.isnan(metrics["loss"])
    assert int(metrics["skipped_steps"]) == int(skipped_state.skipped) == 1
    assert int(skipped_state.step) == 2
    assert_same_bits(
        (skipped_state.params, skipped_state.ema_params), (state.params, state.ema_params)
    )
    adam_states = [
        node
        for node in jax.tree.leaves(skipped_state.opt_state, is_leaf=_is_adam)
        if _is_adam(node)
    ]
    assert int(adam_states[0].count) == 1
    # The next update uses the same moments with the learning rate of the next step.
    delta = jax.tree.map(
        jnp.subtract, step(skipped_state, finite_batch)[0].params, skipped_state.params
    )
    expected = jax.tree.map(jnp.subtract, step(state, finite_batch)[0].params, state.params)
    ratio = float(schedule(2) / schedule(1))
    np.testing.assert_allclose(
        delta["head"]["bias"], ratio * expected["head"]["bias"], rtol=1e-4, atol=1e-8
    )
    # A state without a counter applies the update anyway.
    nan_state, metrics = step(state.replace(skipped=None), nan_batch)
    assert "skipped_steps" not in metrics and np.isnan(nan_state.params["head"]["bias"]).any()


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "decay",
    [
        dict(),
        pytest.param(dict(weight_decay=1e-4, weight_decay_form="schedule"), marks=pytest.mark.slow),
    ],
    ids=["lr", "schedule"],
)
def test_three_updates_match_the_reference_chain(decay):
    """Uses the authors' optimizer chain, schedule and loss, with both forms of weight decay."""
    steps = golden("adam_steps")
    model = make_model(num_classes=7, **TINY)
    schedule = _schedule()
    tx = optimizer.make_optimizer(schedule, **{**PUBLISHED, **decay})
    params = jax.tree.map(jnp.asarray, golden_params())
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    update = jax.jit(TrainStep(model, tx, schedule, losses.sigmoid, seed=0, **PLAIN_STEP))
    for i in range(3):
        state, metrics = update(state, {"image": steps["image"][i], "label": steps["labels"][i]})
        np.testing.assert_allclose(metrics["loss"], steps["loss"][i], rtol=1e-6)
        np.testing.assert_allclose(metrics["learning_rate"], 1e-3 * steps["lr_multiplier"][i])
    expected = leaves(golden_params("adam_steps", "final/"))
    for path, value in leaves(state.params).items():
        is_noise = "token_mixing" in path and "Dense_1" in path and "bias" in path
        np.testing.assert_allclose(
            value, expected[path], atol=1e-3 if is_noise else 1e-6, err_msg=path
        )

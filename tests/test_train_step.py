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


def test_schedule_equals_the_reference():
    schedule = _schedule(peak_lr=1.0)
    expected = golden("adam_steps")["lr_multiplier"]
    np.testing.assert_allclose([schedule(step) for step in range(10)], expected, atol=1e-7)


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)) * 3, rng.dirichlet(np.ones(5), size=4)
    logits, labels = logits.astype(np.float32), labels.astype(np.float32)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        losses.softmax(logits, labels), -(labels * log_softmax).sum(-1), rtol=1e-5
    )
    p = 1 / (1 + np.exp(-logits))
    wanted = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(losses.sigmoid(logits, labels), wanted, rtol=1e-5)


def test_step_counts_learns_and_reports():
    model = make_model(num_classes=7, **{**SMALL, **ONE_BLOCK})
    schedule = _schedule(decay="constant", warmup_steps=0, peak_lr=3e-3)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (14, 32, 32, 3), np.uint8), "label": np.arange(14) % 7}
    step = jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **PLAIN_STEP))
    first = None
    for _ in range(30):
        state, metrics = step(state, batch)
        first = first or metrics
    assert int(state.step) == 30
    np.testing.assert_allclose(first["loss"], np.log(7), rtol=1e-5)  # the head starts at zero
    assert metrics["loss"] < 0.5 * first["loss"]
    assert metrics["accuracy"] > 0.8
    np.testing.assert_allclose(metrics["learning_rate"], 3e-3)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-6)


@pytest.mark.slow
def test_masks_change_from_step_to_step_and_with_the_seed():
    model = make_model(num_classes=7, **SMALL)
    schedule = lambda step: jnp.float32(0)  # noqa: E731 (nothing moves: only the masks differ)
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


# Two blocks of the goldens' model, the second of which is dropped from half of the images.
SMALL = {**TINY, "num_blocks": 2, "stoch_depth": 0.5}
# One, without masks: enough for what no mask changes.
ONE_BLOCK = dict(num_blocks=1, stoch_depth=0.0)
# Neither mixing nor smoothing.
PLAIN = dict(mix=PLAIN_STEP["mix"], label_smoothing=0.0)


def _golden_params(num_blocks):
    left_out = [f"MixerBlock_{i}" for i in range(num_blocks, 3)]
    params = {name: value for name, value in golden_params().items() if name not in left_out}
    return jax.tree.map(jnp.asarray, params)


def _mixing_step(model, tx, schedule, **changes):
    mixing = make_mix(alpha=0.5, per_example=False, cutmix_alpha=1.0, cutmix_prob=0.5)
    options = {**PLAIN_STEP, "mix": mixing, "label_smoothing": 0.1, **changes}
    return jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **options))


def _run(steps=3, *, optimizer_changes=None, model_changes=None, **changes):
    """States after each update of a tiny model with stochastic depth, and the last metrics."""
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
def test_accumulation_gives_the_update_of_the_whole_batch(sam_rho):
    """With mixing, masks and momentum: 12 images at once, or in 3 parts."""
    whole, metrics = _run(sam_rho=sam_rho)
    moved = leaves(whole[-1].params)
    assert max(np.abs(moved[k] - leaves(whole[0].params)[k]).max() for k in moved) > 1e-3
    cut, other = _run(sam_rho=sam_rho, accumulate_steps=3)
    for path, value in leaves(cut[-1]).items():
        np.testing.assert_allclose(value, leaves(whole[-1])[path], atol=2e-6, err_msg=path)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(other["accuracy"], metrics["accuracy"], rtol=1e-5)


def test_average_follows_the_parameters():
    states, _ = _run(ema_decay=0.9, model_changes=ONE_BLOCK, **PLAIN)
    for before, after in itertools.pairwise(states):
        for path, value in leaves(after.ema_params).items():
            expected = 0.9 * leaves(before.ema_params)[path] + 0.1 * leaves(after.params)[path]
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_sam_takes_the_gradient_at_the_ascended_parameters():
    """One update without momentum, against the two gradients computed here."""
    options = dict(optimizer_changes=dict(b1=0.0, weight_decay=0.0, grad_clip_norm=0.0))
    (start, end), _ = _run(1, sam_rho=0.5, model_changes=ONE_BLOCK, **PLAIN, **options)
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    model = make_model(num_classes=7, **{**SMALL, **ONE_BLOCK})

    def loss(params):
        logits, _ = model.apply({"params": params}, normalize(images))
        return jnp.mean(losses.softmax(logits, jax.nn.one_hot(np.arange(12) % 7, 7)))

    gradient = jax.jit(jax.grad(loss))
    first = gradient(start.params)
    length = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(first)))
    ascended = jax.tree.map(lambda p, g: p + 0.5 * g / length, start.params, first)
    second = gradient(ascended)
    expected = leaves(jax.tree.map(lambda p, g: p - 0.05 * g, start.params, second))
    for path, value in leaves(end.params).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6, err_msg=path)
    worst = leaves(jax.tree.map(lambda p, g: p - 0.05 * g, start.params, first))
    assert max(np.abs(worst[k] - expected[k]).max() for k in worst) > 1e-4  # it is not plain SGD


def test_frozen_parameters_and_multipliers():
    """All but the head frozen, its bias at a tenth; nothing frozen moves or has a momentum."""
    rules = (("head/bias", 0.1), ("head/.*", 1.0), (".*", 0.0))
    changes = dict(optimizer_changes=dict(lr_multipliers=rules, grad_clip_norm=0.0))
    small = dict(model_changes=ONE_BLOCK, **PLAIN)
    states, metrics = _run(1, lr_multipliers=rules, **changes, **small)
    before, after = leaves(states[0].params), leaves(states[1].params)
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {"['head']['bias']", "['head']['kernel']"}
    momenta = [leaf.shape for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim]
    assert sorted(momenta) == [(7,), (24, 7)]
    free, free_metrics = _run(1, optimizer_changes=dict(grad_clip_norm=0.0), **small)
    for path, share in (("['head']['bias']", 0.1), ("['head']['kernel']", 1.0)):
        wanted = share * (leaves(free[1].params)[path] - before[path])
        np.testing.assert_allclose(after[path] - before[path], wanted, atol=1e-7)
    assert metrics["grad_norm"] < 0.9 * free_metrics["grad_norm"]  # of what moves alone


def test_labels_may_be_several_and_weighted():
    weighted = {
        "label": jnp.array([[2, 0, -1], [1, -1, -1], [-1, -1, -1]]),
        "label_weight": jnp.array([[1.0, 0.25, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    wanted = [[0.25, 0, 1.0], [0, 0.5, 0], [0, 0, 0]]
    np.testing.assert_allclose(losses.dense_labels(weighted, 3), wanted)
    np.testing.assert_allclose(losses.dense_labels({"label": jnp.array([2, 0])}, 3).sum(-1), 1)
    soft = jnp.array([[0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(losses.dense_labels({"label": soft}, 3), soft)


def test_smoothing_is_of_the_loss_and_not_of_the_accuracy():
    """An image without labels is no hit, whatever smoothing makes of its row."""
    model = make_model(num_classes=7, **{**TINY, "num_blocks": 1})
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
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


def test_float_images_go_to_the_model_as_they_are():
    floats = jnp.linspace(-2, 2, 12).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(normalize(floats), floats)


@pytest.mark.slow
def test_update_that_is_not_finite_is_left_out_and_counted():
    """The step and the schedule go on; parameters, moments and average stay."""
    model = make_model(num_classes=7, **{**TINY, "num_blocks": 1})
    schedule = _schedule(decay="linear", warmup_steps=0, peak_lr=3e-3)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = _golden_params(1)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, tx.init(params), params, zero)
    options = {**PLAIN_STEP, "ema_decay": 0.5}
    step = jax.jit(TrainStep(model, tx, schedule, losses.softmax, seed=0, **options))
    good = {"image": np.full((4, 32, 32, 3), 0.3, np.float32), "label": np.arange(4)}
    bad = {**good, "image": np.where(np.arange(4)[:, None, None, None] == 2, np.nan, good["image"])}
    state, metrics = step(state, good)
    assert int(metrics["skipped_steps"]) == 0
    after, metrics = step(state, bad)
    assert np.isnan(metrics["loss"]) and int(metrics["skipped_steps"]) == int(after.skipped) == 1
    assert int(after.step) == 2
    assert_same_bits((after.params, after.ema_params), (state.params, state.ema_params))
    adam = [s for s in jax.tree.leaves(after.opt_state, is_leaf=_is_adam) if _is_adam(s)]
    assert int(adam[0].count) == 1
    # The next update is that of the same moments at the next step's learning rate.
    moved = jax.tree.map(jnp.subtract, step(after, good)[0].params, after.params)
    wanted = jax.tree.map(jnp.subtract, step(state, good)[0].params, state.params)
    ratio = float(schedule(2) / schedule(1))
    np.testing.assert_allclose(
        moved["head"]["bias"], ratio * wanted["head"]["bias"], rtol=1e-4, atol=1e-8
    )
    # A state that counts none takes the update as it is.
    spoilt, metrics = step(state.replace(skipped=None), bad)
    assert "skipped_steps" not in metrics and np.isnan(spoilt.params["head"]["bias"]).any()


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
def test_three_updates_equal_the_reference_chain(decay):
    """The step itself, with the authors' chain, schedule and loss; the decay in both spellings."""
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
        noise = "token_mixing" in path and "Dense_1" in path and "bias" in path
        np.testing.assert_allclose(
            value, expected[path], atol=1e-3 if noise else 1e-6, err_msg=path
        )

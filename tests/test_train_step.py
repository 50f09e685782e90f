import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import TINY, golden, golden_params, leaves
from mixer import losses, optimizer
from mixer.errors import UserError
from mixer.model import make_model
from mixer.train_state import TrainState
from mixer.train_step import make_train_step, normalize

PUBLISHED = dict(name="adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)


def _schedule(**changes):
    settings = dict(
        peak_lr=1e-3, total_steps=10, decay="linear", warmup_steps=4, final_multiplier=1e-5
    )
    return optimizer.make_schedule(**{**settings, **changes})


def test_three_updates_equal_the_reference_chain():
    """The step itself, with the authors' chain, schedule and loss."""
    steps = golden("adam_steps")
    model = make_model(num_classes=7, **TINY)
    schedule = _schedule()
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = jax.tree.map(jnp.asarray, golden_params())
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    update = jax.jit(make_train_step(model, tx, schedule, losses.sigmoid, seed=0))
    for i in range(3):
        state, metrics = update(state, {"image": steps["image"][i], "label": steps["labels"][i]})
        np.testing.assert_allclose(metrics["loss"], steps["loss"][i], rtol=1e-6)
        np.testing.assert_allclose(metrics["learning_rate"], 1e-3 * steps["lr_multiplier"][i])
    wanted = leaves(golden_params("adam_steps", "final/"))
    for path, value in leaves(state.params).items():
        noise = "token_mixing" in path and "Dense_1" in path and "bias" in path
        np.testing.assert_allclose(value, wanted[path], atol=1e-3 if noise else 1e-6, err_msg=path)


def test_schedule_equals_the_reference():
    schedule = _schedule(peak_lr=1.0)
    wanted = golden("adam_steps")["lr_multiplier"]
    np.testing.assert_allclose([schedule(step) for step in range(10)], wanted, atol=1e-7)


def test_cosine_and_constant_decay():
    cosine = _schedule(decay="cosine", warmup_steps=0, final_multiplier=0.1, total_steps=100)
    np.testing.assert_allclose(
        [cosine(step) for step in (0, 50, 100)], [1e-3, 0.55e-3, 1e-4], rtol=1e-5
    )
    constant = _schedule(decay="constant", warmup_steps=2)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 2, 9)], [0, 5e-4, 1e-3, 1e-3])


def test_weight_decay_is_of_kernels_only_and_times_the_learning_rate():
    tx = optimizer.make_optimizer(
        lambda step: jnp.float32(0.01), **{**PUBLISHED, "name": "sgd", "weight_decay": 0.5}
    )
    params = {"Dense_0": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.01 * 0.5 * 3.0)
    np.testing.assert_array_equal(updates["Dense_0"]["bias"], 0)


def test_sgd_has_momentum_and_clipping_can_be_off():
    options = {**PUBLISHED, "name": "sgd", "weight_decay": 0.0, "grad_clip_norm": 0.0}
    tx = optimizer.make_optimizer(lambda step: jnp.float32(1.0), **options)
    params = {"kernel": jnp.zeros(1)}
    opt_state = tx.init(params)
    moved = []
    for _ in range(3):
        updates, opt_state = tx.update({"kernel": jnp.full(1, 10.0)}, opt_state, params)
        moved.append(float(updates["kernel"][0]))
    np.testing.assert_allclose(moved, [-10, -19, -27.1], rtol=1e-6)


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
    model = make_model(num_classes=7, stoch_depth=0.1, **TINY)
    schedule = _schedule(decay="constant", warmup_steps=0, peak_lr=3e-3)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (14, 32, 32, 3), np.uint8), "label": np.arange(14) % 7}
    step = jax.jit(make_train_step(model, tx, schedule, losses.softmax, seed=0))
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


def test_masks_change_from_step_to_step_and_with_the_seed():
    model = make_model(num_classes=7, dropout=0.5, **TINY)
    schedule = lambda step: jnp.float32(0)  # noqa: E731 (nothing moves: only the masks differ)
    tx = optimizer.make_optimizer(schedule, **PUBLISHED)
    params = jax.tree.map(jnp.asarray, golden_params())
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    batch = {"image": np.full((4, 32, 32, 3), 200, np.uint8), "label": np.arange(4)}

    def loss(seed, step):
        update = jax.jit(make_train_step(model, tx, schedule, losses.softmax, seed=seed))
        return float(update(state.replace(step=jnp.int32(step)), batch)[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


def test_normalize_maps_to_the_published_range():
    pixels = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(normalize(pixels).ravel(), [-1, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _schedule(decay="cosin"), "cosine"),
        (lambda: _schedule(warmup_steps=10), "0..9"),
        (lambda: losses.make_loss("sigmod"), "sigmoid"),
        (lambda: optimizer.make_optimizer(None, **{**PUBLISHED, "name": "adam"}), "adamw"),
    ],
)
def test_wrong_settings_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()

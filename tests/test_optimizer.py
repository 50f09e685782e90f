import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import PUBLISHED, golden_params
from mixer.errors import UserError
from mixer.training import losses, optimizer


def _schedule(**changes):
    settings = dict(
        **dict(peak_lr=1e-3, total_steps=10, decay="linear", warmup_steps=4),
        **dict(final_multiplier=1e-5, rsqrt_timescale=10_000, cooldown_steps=0),
    )
    return optimizer.make_schedule(**{**settings, **changes})


def test_cosine_and_constant_schedules():
    cosine = _schedule(decay="cosine", warmup_steps=0, final_multiplier=0.1, total_steps=100)
    np.testing.assert_allclose(
        [cosine(step) for step in (0, 50, 100)], [1e-3, 0.55e-3, 1e-4], rtol=1e-5
    )
    constant = _schedule(decay="constant", warmup_steps=2)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 2, 9)], [0, 5e-4, 1e-3, 1e-3])


def test_weight_decay_applies_to_kernels_times_the_learning_rate():
    tx = optimizer.make_optimizer(
        lambda step: jnp.float32(0.01), **{**PUBLISHED, "name": "sgd", "weight_decay": 0.5}
    )
    params = {"Dense_0": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}
    zero_grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero_grads, tx.init(params), params)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.01 * 0.5 * 3.0)
    np.testing.assert_array_equal(updates["Dense_0"]["bias"], 0)


def test_sgd_has_momentum_and_clipping_can_be_off():
    options = {**PUBLISHED, "name": "sgd", "weight_decay": 0.0, "grad_clip_norm": 0.0}
    tx = optimizer.make_optimizer(lambda step: jnp.float32(1.0), **options)
    params = {"kernel": jnp.zeros(1)}
    opt_state = tx.init(params)
    deltas = []
    for _ in range(3):
        updates, opt_state = tx.update({"kernel": jnp.full(1, 10.0)}, opt_state, params)
        deltas.append(float(updates["kernel"][0]))
    np.testing.assert_allclose(deltas, [-10, -19, -27.1], rtol=1e-6)


def test_rsqrt_schedule_and_cooldown():
    rsqrt = _schedule(decay="rsqrt", warmup_steps=10, total_steps=1000, rsqrt_timescale=100)
    steps = np.array([0, 5, 10, 110, 999])
    steps_after_warmup = np.maximum(steps - 10, 0)
    expected = 1e-3 * np.minimum(1, steps / 10) * np.sqrt(100 / (100 + steps_after_warmup))
    np.testing.assert_allclose([rsqrt(step) for step in steps], expected, rtol=1e-5)
    with_cooldown = _schedule(
        **dict(decay="rsqrt", warmup_steps=10, total_steps=1000, rsqrt_timescale=100),
        cooldown_steps=200,
    )
    for step, share in ((799, 1), (900, 0.5), (999, 1 / 200), (1000, 0)):
        np.testing.assert_allclose(with_cooldown(step), share * rsqrt(step), rtol=1e-4)
    constant = _schedule(decay="constant", warmup_steps=0, cooldown_steps=10)
    np.testing.assert_allclose([constant(0), constant(5), constant(10)], [1e-3, 5e-4, 0])


def _decrease(form, *, name="sgd", gradient=0.0, **changes):
    """Returns how far one update moves a kernel and a bias of 3.0, at lr 0.01 with peak 0.04."""
    options = dict(name=name, b1=0.0, weight_decay=0.5, weight_decay_form=form, peak_lr=0.04)
    tx = optimizer.make_optimizer(
        lambda step: jnp.float32(0.01), **{**PUBLISHED, **options, **changes}
    )
    params = {"kernel": jnp.full((1,), 3.0), "bias": jnp.full(1, 3.0)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    return -float(updates["kernel"][0]), -float(updates["bias"][0])


def test_weight_decay_forms_lr_schedule_and_l2():
    np.testing.assert_allclose(_decrease("lr"), (0.01 * 0.5 * 3, 0), rtol=1e-6)
    np.testing.assert_allclose(_decrease("schedule"), (0.25 * 0.5 * 3, 0), rtol=1e-6)
    np.testing.assert_allclose(_decrease("l2"), (0.01 * 0.5 * 3, 0), rtol=1e-6)
    # Adam normalises "l2" with the gradient, so its first update has size 1; "lr" bypasses Adam.
    np.testing.assert_allclose(_decrease("l2", name="adamw"), (0.01, 0), rtol=1e-4)
    actual = _decrease("lr", name="adamw", gradient=0.1)
    np.testing.assert_allclose(actual, (0.01 + 0.015, 0.01), rtol=1e-4)


def test_l2_weight_decay_matches_pytorch_adam():
    """Compares three updates with PyTorch's formula of Adam(weight_decay=...), in NumPy."""
    options = dict(weight_decay=0.1, weight_decay_form="l2", grad_clip_norm=0.0, b2=0.99)
    tx = optimizer.make_optimizer(lambda step: jnp.float32(0.01), **{**PUBLISHED, **options})
    params = {"kernel": jnp.array([1.0, -2.0])}
    state, w, m, v = tx.init(params), np.array([1.0, -2.0]), 0.0, 0.0
    for t, gradient in enumerate(([0.1, 0.2], [-0.3, 0.1], [0.05, 0.0]), 1):
        updates, state = tx.update({"kernel": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        g = np.array(gradient) + 0.1 * w
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_momentum_dtype_applies_to_the_first_moment_only(name, dtype):
    tx = optimizer.make_optimizer(
        lambda step: 0.1, **{**PUBLISHED, "name": name, "momentum_dtype": dtype}
    )
    state = tx.init({"kernel": jnp.ones((2, 2))})
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)]
    assert dtypes[0] == jnp.dtype(dtype)
    assert all(moment_dtype == jnp.float32 for moment_dtype in dtypes[1:])


def test_first_multiplier_rule_that_matches_the_whole_name_wins():
    params = golden_params()
    rules = ((".*token_mixing/.*", 0.5), ("MixerBlock_0/.*", 0.25), ("stem/kernel", 0.0))
    multipliers = optimizer.multipliers(params, rules)
    assert set(jax.tree.leaves(multipliers["MixerBlock_1"]["token_mixing"])) == {0.5}
    assert set(jax.tree.leaves(multipliers["MixerBlock_0"]["token_mixing"])) == {0.5}
    assert set(jax.tree.leaves(multipliers["MixerBlock_0"]["channel_mixing"])) == {0.25}
    assert multipliers["stem"] == {"kernel": 0.0, "bias": 1.0}
    lines = optimizer.describe_multipliers(params, rules)
    assert lines[0] == f"learning rate x 0 (frozen): {8 * 8 * 3 * 24:,} parameters"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _schedule(decay="cosin"), "cosine"),
        (lambda: _schedule(warmup_steps=10), "warmup_steps=10 .*0 to 9"),
        (lambda: _schedule(cooldown_steps=7), "cooldown_steps=7 .*0 to 6"),
        (lambda: _schedule(decay="rsqrt", rsqrt_timescale=0), "rsqrt_timescale=0"),
        (lambda: losses.make_loss("sigmod"), "sigmoid"),
        (lambda: optimizer.make_optimizer(None, **{**PUBLISHED, "name": "adam"}), "adamw"),
        (
            lambda: optimizer.make_optimizer(None, **{**PUBLISHED, "weight_decay_form": "L2"}),
            "lr, schedule, l2",
        ),
        (
            lambda: optimizer.make_optimizer(None, **{**PUBLISHED, "momentum_dtype": "bf16"}),
            "bfloat16",
        ),
        (lambda: optimizer.multipliers({"a": {"b": 1}}, (("a", 0.0),)), "'a'"),
        (lambda: optimizer.multipliers({"a": 1}, ((".*", 1.0), ("a", 0.0))), "'a'"),
        (lambda: optimizer.multipliers({"a": 1}, (("(", 0.0),)), "regex, multiplier"),
        (lambda: optimizer.multipliers({"a": 1}, ("a",)), "regex, multiplier"),
        (lambda: optimizer.multipliers({"a": 1}, (("a", -1.0),)), "-1.0"),
        (lambda: optimizer.multipliers({"a": 1}, (("a", float("nan")),)), "nan"),
        (lambda: optimizer.multipliers({"a": 1}, ((".*", 0.0),)), "every parameter"),
        (
            lambda: optimizer.make_optimizer(None, **{**PUBLISHED, "b1": 2.0}),
            r"b1=2\.0.*below 1$",
        ),
        (lambda: optimizer.make_optimizer(None, **{**PUBLISHED, "eps": 0.0}), r"eps=0\.0"),
    ],
)
def test_invalid_settings_are_named_in_the_error(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_second_moment_in_bfloat16_follows_float32():
    """Round-to-nearest would freeze the moment, since an update is a thousandth of its value."""
    grads = {"w": jnp.full((4096,), 0.1)}
    results = {}
    for dtype in ("float32", "bfloat16"):
        options = {**PUBLISHED, "grad_clip_norm": 0.0, "variance_dtype": dtype}
        tx = optimizer.make_optimizer(lambda step: 1e-3, **options)
        state = tx.init({"w": jnp.zeros(4096)})
        update = jax.jit(lambda state, tx=tx: tx.update(grads, state, {"w": jnp.zeros(4096)}))
        for _ in range(200):
            updates, state = update(state)
        (moments,) = (node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node))
        assert moments.nu["w"].dtype == dtype
        results[dtype] = np.asarray(moments.nu["w"], np.float64), np.asarray(updates["w"])
    float32_moment, float32_updates = results["float32"]
    bfloat16_moment, bfloat16_updates = results["bfloat16"]
    assert np.mean(bfloat16_moment) == pytest.approx(float32_moment[0], rel=2e-3)  # no bias
    assert 1e-3 < np.std(bfloat16_moment) / float32_moment[0] < 3e-2  # the rounding is random
    np.testing.assert_allclose(bfloat16_updates, float32_updates, rtol=0.05)


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)

"""Learning-rate schedule and the optax chain (REFERENCE: big_vision `mlp_mixer_i1k`)."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixer.errors import UserError, check_choice, check_number
from mixer.parallel import sharding

Schedule = Callable[[jax.Array], jax.Array]

# The decays between 1 at the end of the warm-up and 0 at the last step, by their names.
FALLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}
DECAYS = (*FALLS, "constant", "rsqrt")
WEIGHT_DECAY_FORMS = ("lr", "schedule", "l2")
Rules = Sequence[tuple[str, float]]


def make_schedule(
    *,
    peak_lr: float,
    total_steps: int,
    decay: str,
    warmup_steps: int,
    final_multiplier: float,
    rsqrt_timescale: int,
    cooldown_steps: int,
) -> Schedule:
    """Returns the learning rate of update number `step` (from 0).

    The product of `peak_lr` and of
    - a linear warm-up from 0 to 1 over `warmup_steps`;
    - a decay: linear or cosine, from 1 at the end of the warm-up to `final_multiplier` at
      `total_steps`; constant; or rsqrt, sqrt(timescale / (timescale + step - warmup_steps)) from
      the end of the warm-up on (Zhai et al., 2022, "Scaling vision transformers");
    - a linear cool-down from 1 to 0 over the last `cooldown_steps`.
    Warm-up and decay multiply as in big_vision.

    Raises:
      UserError: an unknown decay, or parts that do not fit the run.
    """
    check_choice("schedule.decay", decay, DECAYS)
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"schedule.warmup_steps={warmup_steps} does not fit total_steps={total_steps}; "
            f"it must be in 0..{total_steps - 1}"
        )
    if not 0 <= cooldown_steps <= total_steps - warmup_steps:
        raise UserError(
            f"schedule.cooldown_steps={cooldown_steps} does not fit total_steps={total_steps} "
            f"after {warmup_steps} steps of warm-up; it must be in 0..{total_steps - warmup_steps}"
        )
    check_number("schedule.rsqrt_timescale", rsqrt_timescale, least=1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        multiplier = jnp.ones_like(progress)
        if decay in FALLS:
            multiplier = final_multiplier + (1 - final_multiplier) * FALLS[decay](progress)
        elif decay == "rsqrt":
            beyond = jnp.maximum(step - warmup_steps, 0.0)
            multiplier = jnp.sqrt(rsqrt_timescale / (rsqrt_timescale + beyond))
        if warmup_steps:
            multiplier *= jnp.minimum(1.0, step / warmup_steps)
        if cooldown_steps:
            multiplier *= jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return peak_lr * multiplier

    return schedule


def kernels(params: Any) -> Any:
    """True for each leaf called "kernel": what weight decay applies to."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def multipliers(params: Any, rules: Rules) -> Any:
    """The learning-rate multiplier of each leaf.

    Args:
      params: parameters, or their shapes.
      rules: (regex, multiplier): the first regex that matches the leaf's whole name, such as
        "MixerBlock_0/token_mixing/Dense_0/kernel", decides; 1 where none does.

    Raises:
      UserError: a rule that is no rule, or that no parameter's name matches.
    """
    compiled = []
    for rule in rules:
        try:
            pattern, multiplier = rule
            compiled.append((re.compile(pattern), float(multiplier)))
        except (TypeError, ValueError, re.error) as error:
            raise UserError(
                f"optimizer.lr_multipliers: {rule!r} is no (regex, multiplier): {error}"
            ) from None
        check_number(f"optimizer.lr_multipliers: multiplier of {pattern!r}", compiled[-1][1])
    matched = set()

    def find(path: Any, _: Any) -> float:
        name = sharding.leaf_name(path)
        for number, (pattern, multiplier) in enumerate(compiled):
            if pattern.fullmatch(name):
                matched.add(number)
                return multiplier
        return 1.0

    found = jax.tree.map_with_path(find, params)
    for number, rule in enumerate(rules):
        if number not in matched:
            names = list(sharding.by_name(params))
            raise UserError(
                f"optimizer.lr_multipliers: {rule[0]!r} decides for no parameter; names are like "
                f"{names[0]}, {names[-1]} and are matched whole, earlier rules first"
            )
    if not any(jax.tree.leaves(found)):
        raise UserError("optimizer.lr_multipliers freezes every parameter")
    return found


def describe_multipliers(params: Any, rules: Rules) -> list[str]:
    """A line for each multiplier other than 1: how many parameters have it."""
    sizes: dict[float, int] = {}
    found = jax.tree.leaves(multipliers(params, rules))
    for leaf, multiplier in zip(jax.tree.leaves(params), found, strict=True):
        sizes[multiplier] = sizes.get(multiplier, 0) + leaf.size
    return [
        f"learning rate x {multiplier:g}{'' if multiplier else ' (frozen)'}: {size:,} parameters"
        for multiplier, size in sorted(sizes.items())
        if multiplier != 1
    ]


def describe_average(ema_decay: float, total_steps: int) -> str | None:
    """A line where the average of the parameters ends with more of the first ones than not."""
    share = ema_decay**total_steps
    if share <= 0.5:
        return None
    return (
        f"optimizer.ema_decay={ema_decay}: at step {total_steps} the average still holds "
        f"{share:.0%} of the initial parameters; a smaller decay holds less"
    )


def _scale_by_adam(
    b1: float, b2: float, eps: float, momentum_dtype: str, variance_dtype: str
) -> optax.GradientTransformation:
    """Adam's direction, its second moment kept in `variance_dtype`.

    With b2 = 0.999 an update moves the second moment by a thousandth and less, where neighbours in
    bfloat16 are 1/128 apart: rounded to the nearest it would stand still. It is rounded up or down
    by chance instead, so that its mean is right; the draw is a function of the update's number.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=momentum_dtype)
    if variance_dtype == "float32":
        return adam

    def narrow(variance: Any, count: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(variance)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
        return jax.tree.unflatten(structure, map(_round_by_chance, keys, leaves))

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(nu=optax.tree.cast(state.nu, variance_dtype))

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        state = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
        updates, state = adam.update(updates, state, params)
        return updates, state._replace(nu=narrow(state.nu, state.count))

    return optax.GradientTransformation(init, update)


def _round_by_chance(key: jax.Array, x: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 around it, the nearer one the more often."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # What is left is representable, so that the cast rounds nothing.
    bits &= jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def make_optimizer(
    schedule: Schedule,
    *,
    name: str,
    peak_lr: float,
    b1: float,
    b2: float,
    eps: float,
    momentum_dtype: str,
    variance_dtype: str,
    weight_decay: float,
    weight_decay_form: str,
    grad_clip_norm: float,
    lr_multipliers: Rules,
) -> optax.GradientTransformation:
    """Builds: clip by global norm, adamw or sgd with momentum, weight decay, learning rate.

    What a kernel loses to weight decay in an update, by `weight_decay_form`:
    - "lr": lr * weight_decay * kernel, lr being the schedule's value (AdamW; torch's AdamW);
    - "schedule": lr / peak_lr * weight_decay * kernel, the authors' code. Its published 1e-4 beside
      a peak of 1e-3 is `weight_decay=0.1` in the form "lr";
    - "l2": weight_decay * kernel is added to the clipped gradient, before momentum and Adam.

    A multiplier scales the whole update of a parameter, decay included. A parameter with
    multiplier 0 never changes and has no optimizer state.

    Raises:
      UserError: an unknown optimizer, form or dtype.
    """
    directions = {
        "adamw": lambda: _scale_by_adam(b1, b2, eps, momentum_dtype, variance_dtype),
        "sgd": lambda: optax.trace(b1, accumulator_dtype=momentum_dtype),
    }
    for key, value, choices in (
        ("name", name, directions),
        ("weight_decay_form", weight_decay_form, WEIGHT_DECAY_FORMS),
        ("momentum_dtype", momentum_dtype, ("float32", "bfloat16")),
        ("variance_dtype", variance_dtype, ("float32", "bfloat16")),
    ):
        check_choice(f"optimizer.{key}", value, choices)
    if name == "sgd" and variance_dtype != "float32":
        raise UserError(f"optimizer.variance_dtype={variance_dtype!r} is for adamw; sgd has none")
    check_number("optimizer.b1", b1, below=1)
    check_number("optimizer.b2", b2, below=1)
    if not 0 < eps < math.inf:
        raise UserError(f"optimizer.eps is {eps}; it must be more than 0")
    if weight_decay_form == "schedule":
        weight_decay = weight_decay / peak_lr if peak_lr else 0.0
    decay = optax.add_decayed_weights(weight_decay, kernels) if weight_decay else optax.identity()
    steps = [directions[name](), decay]
    tx = optax.chain(
        optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity(),
        *(reversed(steps) if weight_decay_form == "l2" else steps),
        optax.scale_by_learning_rate(schedule),
    )
    if not lr_multipliers:
        return tx

    def scale(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(
            lambda update, multiplier: multiplier * update,
            updates,
            multipliers(updates, lr_multipliers),
        )

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda multiplier: "trained" if multiplier else "frozen",
            multipliers(params, lr_multipliers),
        )

    trained = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(trained, optax.stateless(scale))

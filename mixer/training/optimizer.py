"""Learning-rate schedule and optimizer, as in big_vision's config `mlp_mixer_i1k`."""

import math
import operator
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
DECAY_CURVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}
DECAYS = (*DECAY_CURVES, "constant", "rsqrt")
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
    """Returns the function from update number `step` (from 0) to its learning rate.

    The learning rate is the product of `peak_lr` and
    - a linear warm-up from 0 to 1 over `warmup_steps`;
    - a decay: linear or cosine, from 1 at the end of the warm-up to `final_multiplier` at
      `total_steps`; constant; or rsqrt, sqrt(timescale / (timescale + step - warmup_steps)) after
      the warm-up (Zhai et al., 2022, "Scaling vision transformers");
    - a linear cool-down from 1 to 0 over the last `cooldown_steps`.
    Warm-up and decay are multiplied as in big_vision.

    Raises:
      UserError: the decay is unknown, or warm-up and cool-down do not fit the run.
    """
    check_choice("schedule.decay", decay, DECAYS)
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"schedule.warmup_steps={warmup_steps} does not fit total_steps={total_steps}; "
            f"expected 0 to {total_steps - 1}"
        )
    if not 0 <= cooldown_steps <= total_steps - warmup_steps:
        raise UserError(
            f"schedule.cooldown_steps={cooldown_steps} does not fit total_steps={total_steps} "
            f"after {warmup_steps} steps of warm-up; expected 0 to {total_steps - warmup_steps}"
        )
    check_number("schedule.rsqrt_timescale", rsqrt_timescale, minimum=1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        multiplier = jnp.ones_like(progress)
        if decay in DECAY_CURVES:
            multiplier = final_multiplier + (1 - final_multiplier) * DECAY_CURVES[decay](progress)
        elif decay == "rsqrt":
            decay_steps = jnp.maximum(step - warmup_steps, 0.0)
            multiplier = jnp.sqrt(rsqrt_timescale / (rsqrt_timescale + decay_steps))
        if warmup_steps:
            multiplier *= jnp.minimum(1.0, step / warmup_steps)
        if cooldown_steps:
            multiplier *= jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return peak_lr * multiplier

    return schedule


def kernels(params: Any) -> Any:
    """Returns True for each leaf named "kernel"; weight decay applies only to kernels."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def multipliers(params: Any, rules: Rules) -> Any:
    """Returns the learning-rate multiplier of each leaf.

    Args:
      params: parameters, or their shapes.
      rules: pairs (regex, multiplier). The first regex that matches the leaf's full name, such as
        "MixerBlock_0/token_mixing/Dense_0/kernel", gives the multiplier; without a match it is 1.

    Raises:
      UserError: a rule is not a pair (regex, multiplier), or applies to no parameter.
    """
    compiled = []
    for rule in rules:
        try:
            pattern, multiplier = rule
            compiled.append((re.compile(pattern), float(multiplier)))
        except (TypeError, ValueError, re.error) as error:
            raise UserError(
                f"optimizer.lr_multipliers: {rule!r} is not a pair (regex, multiplier): {error}"
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

    tree = jax.tree.map_with_path(find, params)
    for number, rule in enumerate(rules):
        if number not in matched:
            names = list(sharding.by_name(params))
            raise UserError(
                f"optimizer.lr_multipliers: {rule[0]!r} applies to no parameter; expected a regex "
                f"for a full name, such as {names[0]} or {names[-1]}, that no earlier rule matches"
            )
    if not any(jax.tree.leaves(tree)):
        raise UserError(
            "optimizer.lr_multipliers freezes every parameter; expected a multiplier above 0"
        )
    return tree


def describe_multipliers(params: Any, rules: Rules) -> list[str]:
    """Returns a line for each multiplier other than 1, with its number of parameters."""
    sizes: dict[float, int] = {}
    values = jax.tree.leaves(multipliers(params, rules))
    for leaf, multiplier in zip(jax.tree.leaves(params), values, strict=True):
        sizes[multiplier] = sizes.get(multiplier, 0) + leaf.size
    return [
        f"learning rate x {multiplier:g}{'' if multiplier else ' (frozen)'}: {size:,} parameters"
        for multiplier, size in sorted(sizes.items())
        if multiplier != 1
    ]


def describe_average(ema_decay: float, total_steps: int) -> str | None:
    """Returns a warning if the final EMA weights the initial parameters by more than half."""
    share = ema_decay**total_steps
    if share <= 0.5:
        return None
    return (
        f"optimizer.ema_decay={ema_decay}: at step {total_steps} the average still holds "
        f"{share:.0%} of the initial parameters; use a smaller decay to reduce this"
    )


def _scale_by_adam(
    b1: float, b2: float, eps: float, momentum_dtype: str, variance_dtype: str
) -> optax.GradientTransformation:
    """Returns Adam's update direction, with the second moment stored in `variance_dtype`.

    With b2 = 0.999 an update changes the second moment by at most a thousandth, but adjacent
    bfloat16 values differ by 1/128, so rounding to nearest would never change it. Stochastic
    rounding keeps its expected value correct. The random bits depend only on the update's number.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=momentum_dtype)
    if variance_dtype == "float32":
        return adam

    def narrow(variance: Any, count: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(variance)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
        return jax.tree.unflatten(structure, map(_round_stochastically, keys, leaves))

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(nu=optax.tree.cast(state.nu, variance_dtype))

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        state = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
        updates, state = adam.update(updates, state, params)
        return updates, state._replace(nu=narrow(state.nu, state.count))

    return optax.GradientTransformation(init, update)


def _round_stochastically(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 stochastically, with the expected value of the input."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The remaining bits are exact in bfloat16, so the cast does not round.
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
    """Builds the chain: clip by global norm, adamw or momentum sgd, weight decay, learning rate.

    `weight_decay_form` determines what an update subtracts from a kernel as weight decay:
    - "lr": lr * weight_decay * kernel, where lr is the schedule's value (AdamW; torch's AdamW);
    - "schedule": lr / peak_lr * weight_decay * kernel, as in the authors' code. Their 1e-4 with a
      peak of 1e-3 equals `weight_decay=0.1` in the form "lr";
    - "l2": weight_decay * kernel is added to the clipped gradient, before momentum and Adam.

    A multiplier scales the whole update of a parameter, decay included. A parameter with
    multiplier 0 never changes and has no optimizer state.

    Raises:
      UserError: the optimizer, form or dtype is unknown, or a value is out of range.
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
        raise UserError(
            f"optimizer.variance_dtype={variance_dtype!r} is only for adamw; sgd has no variance"
        )
    check_number("optimizer.b1", b1, limit=1)
    check_number("optimizer.b2", b2, limit=1)
    if not 0 < eps < math.inf:
        raise UserError(f"optimizer.eps={eps}; expected a finite number above 0")
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
        return jax.tree.map(operator.mul, multipliers(updates, lr_multipliers), updates)

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda multiplier: "trained" if multiplier else "frozen",
            multipliers(params, lr_multipliers),
        )

    trained = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(trained, optax.stateless(scale))

"""Learning-rate schedule and the optax chain (REFERENCE: big_vision `mlp_mixer_i1k`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixer.errors import UserError, nearest

Schedule = Callable[[jax.Array], jax.Array]

DECAYS = ("linear", "cosine", "constant")


def make_schedule(
    *, peak_lr: float, total_steps: int, decay: str, warmup_steps: int, final_multiplier: float
) -> Schedule:
    """Returns the learning rate of update number `step` (from 0).

    Linear warm-up from 0 over `warmup_steps`, which multiplies a decay from `peak_lr` at the end of
    the warm-up to `final_multiplier * peak_lr` at `total_steps`; big_vision's form.

    Raises:
      UserError: an unknown decay, or a warm-up that does not fit the run.
    """
    if decay not in DECAYS:
        raise UserError(
            f"schedule.decay={decay!r}; one of {', '.join(DECAYS)}.{nearest(decay, DECAYS)}"
        )
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"schedule.warmup_steps={warmup_steps} does not fit total_steps={total_steps}; "
            f"it must be in 0..{total_steps - 1}"
        )

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        if decay == "linear":
            multiplier = final_multiplier + (1 - final_multiplier) * (1 - progress)
        elif decay == "cosine":
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            multiplier = final_multiplier + (1 - final_multiplier) * cosine
        else:
            multiplier = jnp.ones_like(progress)
        if warmup_steps:
            multiplier *= jnp.minimum(1.0, step / warmup_steps)
        return peak_lr * multiplier

    return schedule


def kernels(params: Any) -> Any:
    """True for each leaf called "kernel": what weight decay applies to."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    schedule: Schedule,
    *,
    name: str,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    grad_clip_norm: float,
) -> optax.GradientTransformation:
    """Builds: clip by global norm, adamw or sgd with momentum, weight decay, learning rate.

    The decay added to a kernel's update is `lr * weight_decay * kernel` ("decoupled", and times the
    learning rate, schedule included). The published recipe's 1e-4 beside a learning rate of 1e-3
    is `weight_decay=0.1` here.

    Raises:
      UserError: an unknown optimizer.
    """
    directions = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        "sgd": lambda: optax.trace(b1),
    }
    if name not in directions:
        raise UserError(
            f"optimizer.name={name!r}; one of {', '.join(directions)}.{nearest(name, directions)}"
        )
    return optax.chain(
        optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity(),
        directions[name](),
        optax.add_decayed_weights(weight_decay, kernels) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )

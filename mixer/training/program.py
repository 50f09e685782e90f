"""A run's training program: the update and the abstract state, for one mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mixer import sizes
from mixer.models import layers
from mixer.models.modules import check_image_size
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.training import state
from mixer.training.losses import make_loss
from mixer.training.mixup import make_mix
from mixer.training.optimizer import Schedule, make_optimizer, make_schedule
from mixer.training.state import TrainState
from mixer.training.step import TrainStep, make_train_loop


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """A run's update and its abstract state on a mesh; nothing has been compiled or allocated.

    Attributes:
      step: the update, with its model, optimizer and schedule.
      state: shapes, dtypes and shardings of the state.
      image_size: (H, W) in pixels.
    """

    step: TrainStep
    state: TrainState
    image_size: tuple[int, int]

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.step.model

    @property
    def num_params(self) -> int:
        """Number of the model's parameters."""
        return sharding.num_values(self.state.params)

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """The mesh of the state."""
        return self.state.step.sharding.mesh

    def init_state(self) -> TrainState:
        """Returns the state of step 0, with each leaf created directly in its sharding."""
        step = self.step
        return state.init_state(step.model, step.tx, self.image_size, step.seed, self.state)

    def jit_step(self) -> Any:
        """Returns the jitted update, which donates the state, ready to be lowered."""

        def train_step(state: TrainState, batch: dict[str, jax.Array]) -> Any:
            return self.step(state, batch)

        return self._jit(train_step)

    def jit_loop(self, augment: Callable | None) -> Any:
        """Returns the jitted loop of updates (`step.make_train_loop`), ready to be lowered."""
        return self._jit(make_train_loop(self.step, seed=self.step.seed, augment=augment))

    def _jit(self, update: Callable) -> Any:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(
            sharding.on_mesh(update, self.mesh),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(self.mesh)),
            compiler_options=layers.compiler_options(self.mesh.devices.flat[0].platform),
        )


def make_program(
    config: ConfigDict, mesh: Mesh | AbstractMesh, class_weights: np.ndarray | None = None
) -> TrainProgram:
    """Builds the training program of a resolved config on `mesh`.

    `class_weights` (K,) are the weights of the classes in the loss, which depend on the data if
    class_balance is set; None: all 1.
    """
    model = build_model(config)
    schedule, tx = build_optimizer(config)
    image_size = sizes.pair(config.image_size)
    step = TrainStep(
        model,
        tx,
        schedule,
        make_loss(config.loss, class_weights),
        seed=config.seed,
        mix=make_mix(**config.mixup),
        label_smoothing=config.label_smoothing,
        lr_multipliers=config.optimizer.lr_multipliers,
        sam_rho=config.optimizer.sam_rho,
        ema_decay=config.optimizer.ema_decay,
        accumulate_steps=config.optimizer.accumulate_steps,
    )
    abstract = state.abstract_state(
        model,
        tx,
        image_size,
        mesh,
        ema=bool(config.optimizer.ema_decay),
        skips=config.nan_policy == "skip",
    )
    return TrainProgram(step, abstract, image_size)


def build_model(config: ConfigDict) -> nn.Module:
    """Builds the model of a config whose number of classes is set."""
    model = make_model(**config.model.to_dict())
    check_image_size(sizes.pair(config.image_size), model.patch_size)
    return model


def build_optimizer(config: ConfigDict) -> tuple[Schedule, optax.GradientTransformation]:
    """Builds the schedule and optimizer of a config whose lengths are resolved to steps."""
    keys = ("decay", "warmup_steps", "final_multiplier", "rsqrt_timescale", "cooldown_steps")
    schedule = make_schedule(
        peak_lr=config.optimizer.peak_lr,
        total_steps=config.total_steps,
        **{key: config.schedule[key] for key in keys},
    )
    # The train step applies these options outside the optimizer's chain.
    step_keys = ("sam_rho", "ema_decay", "accumulate_steps")
    chain = {key: value for key, value in config.optimizer.items() if key not in step_keys}
    return schedule, make_optimizer(schedule, **chain)

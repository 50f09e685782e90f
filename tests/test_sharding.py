import jax
import pytest

from helpers import run_python
from mixer import sharding
from mixer.errors import UserError

# In a process of its own: the number of devices is set before JAX starts.
ONE_AGAINST_EIGHT = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from helpers import tiny_config, leaves
from mixer import run, sharding, train_state

config = tiny_config(image_size=8, global_batch_size=16, total_steps=10)
config.schedule.update(decay="constant", warmup_steps=0, cooldown_steps=0)
config.optimizer.name = sys.argv[1]
config.optimizer.peak_lr = 0.1 if sys.argv[1] == "sgd" else 1e-3
config.mixup.alpha = 0.5 if sys.argv[1] == "adamw" else 0.0
mixing, parts = sys.argv[2] == "mixing", (1, 1)
if mixing:
    config.mixup.update(alpha=0.5, per_example=True, cutmix_alpha=1.0, cutmix_prob=0.5)
    config.optimizer.update(sam_rho=0.05, ema_decay=0.5)
    config.label_smoothing = 0.1
    parts = (4, 2)  # the batch in four parts on one device, in two on eight
split = run.open_split(config, "train", None)
config.model.num_classes = len(split.class_names)
model = run.build_model(config)
assert model.dropout and model.stoch_depth
results = []
for devices, accumulate_steps in zip((jax.devices()[:1], jax.devices()), parts):
    config.optimizer.accumulate_steps = accumulate_steps
    schedule, tx = run.build_optimizer(config)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    state = train_state.init_state(model, tx, (8, 8), mesh, seed=0, ema=mixing)
    start = leaves(state.params)
    assert all(len(leaf.sharding.device_set) == len(devices) for leaf in jax.tree.leaves(state))
    step = jax.jit(run.build_train_step(config, model, schedule, tx), donate_argnums=0)
    stream = split.train_batches(start_step=0, seed=0, global_batch_size=16, process_index=0,
        process_count=1)
    losses_seen = []
    for _ in range(5):
        batch = sharding.put_batch(next(stream), mesh)
        assert batch["image"].addressable_shards[0].data.shape[0] == 16 // len(devices)
        state, metrics = step(state, batch)
        losses_seen.append(float(metrics["loss"]))
    results.append((losses_seen, leaves((state.params, state.ema_params))))
(loss_1, params_1), (loss_8, params_8) = results
moved = leaves(state.params)
assert max(np.abs(moved[k] - start[k]).max() for k in start) > 1e-3
print(max(abs(a - b) for a, b in zip(loss_1, loss_8)),
      max(np.abs(params_1[k] - params_8[k]).max() for k in params_1))
"""


@pytest.mark.parametrize(
    ("name", "mixing", "tolerance"),
    [("sgd", "plain", 1e-6), ("adamw", "plain", 1e-4), ("sgd", "mixing", 1e-6)],
)
def test_one_device_and_eight_give_the_same_numbers(name, mixing, tolerance):
    """Stochastic depth and dropout included; without warm-up, so that everything moves.

    "mixing" adds per-example mixup, CutMix, label smoothing, SAM, the average and accumulation.
    """
    flags = "--xla_force_host_platform_device_count=8"
    done = run_python("-c", ONE_AGAINST_EIGHT, name, mixing, XLA_FLAGS=flags)
    loss, params = map(float, done.stdout.split())
    assert loss <= 1e-5 and params <= tolerance


def test_run_on_eight_devices_and_batch_that_does_not_fit(tmp_path):
    code = f"""
import sys
sys.path.insert(0, "tests")
from helpers import tiny_config
from mixer import trainer
from mixer.errors import UserError
trainer.train(tiny_config(total_steps=4), {str(tmp_path / "run")!r})
for values in (dict(global_batch_size=12), dict(eval_batch_size=100), dict(mesh__data=4)):
    try:
        trainer.train(tiny_config(**values), {str(tmp_path / "other")!r})
    except UserError as error:
        print("refused:", error)
"""
    done = run_python("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert "global_batch_size=12: the 8 devices" in refused[0] and "8 or 16" in refused[0]
    assert "eval_batch_size=100" in refused[1] and "96 or 104" in refused[1]
    assert "{'data': 4} does not fit 8 device" in refused[2]
    assert "devices: 8 x" in done.stdout and "test accuracy" in done.stdout


def test_prefetch_keeps_order_passes_faults_on_and_can_be_closed():
    assert list(sharding.prefetch(iter(range(10)), lambda x: x * 2, 3)) == list(range(0, 20, 2))

    def broken():
        yield 1
        raise UserError("the second batch")

    stream = sharding.prefetch(broken(), lambda x: x, 2)
    assert next(stream) == 1
    with pytest.raises(UserError, match="the second batch"):
        next(stream)
    endless = sharding.prefetch(iter(int, 1), lambda x: x, 2)
    next(endless)
    endless.close()


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "x": -1}, {"data": 0}])
def test_mesh_that_does_not_fit_is_refused(axes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(axes)


def test_mesh_takes_all_devices():
    assert sharding.make_mesh({"data": -1}).size == jax.device_count()

import jax
import pytest

from helpers import run_python
from mixer.errors import UserError
from mixer.parallel import sharding

# In a process of its own: the number of devices is set before JAX starts. Each line of its output
# is a mesh: the largest differences of losses and parameters from those of one device.
ON_MESHES = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
from helpers import tiny_config, leaves
from mixer.data.order import Reading
from mixer.runs import config as run
from mixer.runs import data as run_data
from mixer.parallel import sharding
from mixer.training import program

optimizer, mixing, variants = sys.argv[1], sys.argv[2] == "mixing", eval(sys.argv[3])
config = tiny_config(image_size=8, global_batch_size=16, total_steps=10)
config.schedule.update(decay="constant", warmup_steps=0, cooldown_steps=0)
config.optimizer.name = optimizer
config.optimizer.peak_lr = 0.1 if optimizer == "sgd" else 1e-3
if "vit" in sys.argv[4:]:
    config.model.update(name="vit", tokens_mlp_dim=None, channels_mlp_dim=None)
    config.model.update(mlp_dim=24, num_heads=4)
if "groups" in sys.argv[4:]:
    config.model.token_mixing_groups = 4
if mixing:
    config.mixup.update(alpha=0.5, per_example=True, cutmix_alpha=1.0, cutmix_prob=0.5)
    config.optimizer.update(sam_rho=0.05, ema_decay=0.5)
    config.label_smoothing = 0.1
split = run_data.open_split(config, "train", None)
config.model.num_classes = len(split.class_names)
reference = None  # losses and parameters on one device
for axes, changes in [({"data": 1}, {}), *variants]:
    changed_config = config.copy_and_resolve_references()
    changed_config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(axes, jax.devices()[:1] if reference is None else None)
    train_program = program.make_program(changed_config, mesh)
    assert train_program.model.dropout and train_program.model.stoch_depth
    abstract, state = train_program.state, train_program.init_state()
    start = leaves(state.params)
    assert all(len(leaf.sharding.device_set) == mesh.size for leaf in jax.tree.leaves(state))
    step = train_program.jit_step()
    stream = split.train_batches(0, Reading(seed=0, global_batch_size=16))
    losses = []
    for _ in range(5):
        batch = sharding.put_batch(next(stream), mesh)
        shards = batch["image"].addressable_shards
        assert shards[0].data.shape[0] == 16 // sharding.batch_shards(mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (abstract, state))
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *shardings))  # the layout does not change
    end = leaves((state.params, state.ema_params))
    if reference is None:
        assert max(np.abs(end["[0]" + k] - start[k]).max() for k in start) > 1e-3
        reference = losses, end
        continue
    print(max(abs(a - b) for a, b in zip(losses, reference[0])),
        max(np.abs(end[k] - reference[1][k]).max() for k in end), mesh.shape)
"""
MESHES = [
    ({"fsdp": 8}, {}),
    ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
]
LOOPS = [
    ({"data": 8}, {"model.remat": "full", "optimizer.accumulate_steps": 2}),
    ({"data": 2, "tensor": 4}, {"model.scan_blocks": True, "model.remat": "dots"}),
    ({"fsdp": 4, "tensor": 2}, {"model.scan_blocks": True, "optimizer.accumulate_steps": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "mixing", "variants", "tolerance"),
    [
        ("mixer", "sgd", "mixing", MESHES + LOOPS[:2], 1e-6),
        ("mixer", "adamw", "plain", [MESHES[-1], LOOPS[-1]], 1e-4),
        ("vit", "sgd", "mixing", MESHES[1:] + LOOPS[2:], 1e-6),
        ("groups", "sgd", "plain", MESHES[1:], 1e-6),
    ],
    ids=["sgd-mixing", "adamw", "vit", "groups"],
)
def test_every_mesh_gives_the_losses_of_one_device(model, name, mixing, variants, tolerance):
    """Stochastic depth and dropout included; without warm-up, so that everything moves.

    "mixing" adds per-example mixup, CutMix, label smoothing, SAM and the average.
    """
    flags = "--xla_force_host_platform_device_count=8"
    arguments = (name, mixing, repr(variants), model)
    process = run_python("-c", ON_MESHES, *arguments, XLA_FLAGS=flags)
    lines = process.stdout.splitlines()
    assert len(lines) == len(variants)
    for line in lines:
        loss, params = map(float, line.split()[:2])
        assert loss <= 1e-5 and params <= tolerance, line


def test_batch_size_that_does_not_divide_is_refused():
    mesh = jax.sharding.AbstractMesh((4, 2, 1), ("data", "fsdp", "tensor"))
    sharding.check_batch_size("global_batch_size", 16, mesh)
    for key, size, nearest in (
        ("global_batch_size", 12, "8 or 16"),
        ("eval_batch_size", 100, "96 or 104"),
    ):
        with pytest.raises(UserError, match=f"{key}={size}.* 8 devices.*{nearest}"):
            sharding.check_batch_size(key, size, mesh)


@pytest.mark.slow
def test_run_on_eight_devices_and_invalid_meshes(tmp_path):
    code = f"""
import sys
sys.path.insert(0, "tests")
from helpers import tiny_config
from mixer import trainer
from mixer.errors import UserError
trainer.train(tiny_config(total_steps=4, model__num_blocks=1), {str(tmp_path / "run")!r})
for values in (
    dict(mesh__data=4),
    dict(mesh__tensor=8, mesh__data=1, model__tokens_mlp_dim=12),
    dict(mesh__fsdp=4, mesh__data=2, model__hidden_dim=18, model__tokens_mlp_dim=16),
):
    try:
        trainer.train(tiny_config(**values), {str(tmp_path / "other")!r})
    except UserError as error:
        print("refused:", error)
"""
    process = run_python("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    refused = [line for line in process.stdout.splitlines() if line.startswith("refused:")]
    assert "{'data': 4, 'fsdp': 1, 'tensor': 1}" in refused[0] and "8 device" in refused[0]
    assert "tensor = 8 " in refused[1] and "1, 2, 3, 4, 6, 12" in refused[1]
    assert "fsdp = 4 " in refused[2] and " 18" in refused[2] and "channel_mixing" in refused[2]
    assert "devices: 8 x" in process.stdout and "test accuracy" in process.stdout


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"x": 1}])
def test_invalid_mesh_is_refused(axes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(axes)


def test_mesh_takes_all_devices():
    assert sharding.make_mesh({"data": -1}).size == jax.device_count()


@pytest.mark.tpu_backend
def test_only_the_outermost_axis_crosses_slices(tpu):
    """Two slices of 16 chips, four hosts each; what a host has of a batch lies together."""
    code = """
from jax.experimental import topologies
from mixer.parallel import sharding
from mixer.errors import UserError

devices = topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices
for axes in ({"data": -1}, {"data": 2, "fsdp": 16}, {"data": 4, "fsdp": 2, "tensor": 4}):
    mesh = sharding.make_mesh(axes, devices)
    half = mesh.shape["data"] // 2
    slices = [[{d.slice_index for d in row.flat} for row in mesh.devices][i] for i in (0, half)]
    print(slices, sharding.local_shards(mesh, 1))
try:
    sharding.make_mesh({"data": 1, "tensor": 32}, devices)
except UserError as error:
    print(error)
"""
    lines = run_python("-c", code).stdout.splitlines()[-4:]
    assert lines[0] == lines[1] == "[{0}, {1}] (4, 5, 6, 7)"
    assert lines[2] == "[{0}, {1}] (1,)"
    assert "2 slices" in lines[3]

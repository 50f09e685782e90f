"""What XLA compiles for an NVIDIA H200 and a TPU v5e, beside the plain formulation.

Neither is needed: read are the matmuls' epilogues, transposes, memory and traffic, and the TPU
compiler's own estimate of time.
"""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies

from mixer.models import flops, layers
from mixer.models.mlp_mixer import MixerBlock
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.tools.benchmark import plain
from mixer.tools.plan import hlo
from mixer.training import losses, mixup
from mixer.training import state as train_state
from mixer.training.step import TrainStep, make_predict

cuda_backend = pytest.mark.cuda_backend
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin is not installed",
)

SIZE, BATCH, BLOCKS = (224, 224), 64, 2
FIELDS = dict(hidden_dim=768, tokens_mlp_dim=384, channels_mlp_dim=3072, patch_size=16)
FIELDS.update(num_blocks=BLOCKS, num_classes=1000, gelu="tanh", dtype="bfloat16")
# Without a GPU nothing can be tried out.
OPTIONS = {"xla_gpu_autotune_level": 0, **layers.compiler_options("gpu")}


@pytest.fixture(scope="module")
def mesh():
    config = (pathlib.Path(__file__).parent / "h200.textproto").read_text()
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=config, topology="1x1x1"
    )
    return sharding.make_mesh({"data": 1}, topology.devices)


def _compiled(function, *arguments, options=OPTIONS, **how):
    compiled = jax.jit(function, compiler_options=options, **how).lower(*arguments).compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def _programs(mesh, options):
    """(text, bytes of temporaries) of the update, ours and plain."""
    model = make_model(**FIELDS)
    tx = optax.adamw(1e-3)
    ours = TrainStep(
        model,
        tx,
        lambda step: jnp.float32(1e-3),
        losses.make_loss("softmax"),
        seed=0,
        mix=mixup.make_mix(alpha=0.0, per_example=False, cutmix_alpha=0.0, cutmix_prob=0.0),
        label_smoothing=0.0,
        lr_multipliers=(),
        sam_rho=0.0,
        ema_decay=0.0,
        accumulate_steps=1,
    )
    spec = {"image": ((*SIZE, 3), "uint8"), "label": ((), "int32")}
    batch = sharding.abstract_batch(spec, BATCH, mesh)
    state = train_state.abstract_state(model, tx, SIZE, mesh)
    other = plain.make_train_step(plain.Mixer(**FIELDS), tx)
    others = state.params, state.opt_state
    how = dict(donate_argnums=0, options=options)
    ours = sharding.on_mesh(ours, mesh)
    return _compiled(ours, state, batch, **how), _compiled(other, others, batch, **how)


@pytest.fixture(scope="module")
def programs(mesh):
    return _programs(mesh, OPTIONS)


@cuda_backend
@needs_plugin
def test_every_channel_mlp_has_its_gelu_in_the_matmul(programs):
    (ours, _), (other, _) = programs
    assert ours.count('"epilogue":"BIAS_GELU_AUX"') == BLOCKS
    assert not re.search('"epilogue":"[A-Z_]*GELU', other)


@cuda_backend
@needs_plugin
def test_every_token_mlp_has_its_gelu_in_the_matmul(programs):
    """The bias is a row of the product, which is padded anyway."""
    (ours, _), _ = programs
    assert ours.count('"epilogue":"GELU_AUX"') == BLOCKS


@cuda_backend
@needs_plugin
def test_the_residual_is_added_in_place(programs):
    """Nothing later needs it, so that the matmul that adds to it may overwrite it."""
    (ours, _), _ = programs
    added = re.findall(r'custom-call\(.*"beta":1.*"epilogue":"BIAS"', ours)
    assert len(added) == BLOCKS
    assert not re.findall(rf" = bf16\[{BATCH * 196},768\]\S* copy\(", ours)


@cuda_backend
@needs_plugin
def test_no_activations_are_transposed(programs):
    """The plain program does it for each block, there and back, forward and backward."""
    (ours, _), (other, _) = programs
    moved = re.compile(rf"^  %\S*transpose\S* = bf16\[{BATCH},\d+,\d+\]", re.M)
    assert not moved.findall(ours)
    assert len(moved.findall(other)) >= 2 * BLOCKS


@cuda_backend
@needs_plugin
def test_memory_traffic_and_arithmetic(programs):
    (ours, ours_temp), (other, other_temp) = programs
    ours, other = hlo.count(ours), hlo.count(other)
    assert ours_temp < 0.85 * other_temp
    assert ours.bytes < 0.87 * other.bytes
    # XLA pads 196 tokens to 200.
    wanted = BATCH * flops.train_flops(make_model(**FIELDS), SIZE)
    assert wanted <= ours.flops < 1.015 * wanted


@cuda_backend
@needs_plugin
def test_prediction_has_both_epilogues_and_no_transposes(mesh):
    model = make_model(**FIELDS)
    params = train_state.abstract_params(model, SIZE, mesh)
    images = sharding.abstract_batch({"image": ((*SIZE, 3), "uint8")}, BATCH, mesh)["image"]
    text, _ = _compiled(make_predict(model, mesh), params, images)
    assert text.count('"epilogue":"BIAS_GELU"') == BLOCKS
    assert text.count('"epilogue":"GELU"') == BLOCKS
    assert text.count('"epilogue":"BIAS"') >= BLOCKS


@pytest.mark.tpu_backend
def test_a_block_on_a_tpu(tpu):
    """Forward and backward of B/16's, at a batch that does not fit into the chip's own memory."""
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
    mesh = sharding.make_mesh({"data": 1}, devices)
    whole = sharding.replicated(mesh)
    batch = sharding.abstract_batch({"x": ((196, 768), "bfloat16")}, 128, mesh)["x"]

    def counted(block, *masks):
        def gradients(params, x, grad):
            return jax.vjp(lambda *at: block.apply(*at, *masks), params, x)[1](grad)

        x = jnp.zeros((1, 196, 768), jnp.bfloat16)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            jax.eval_shape(lambda: block.init(jax.random.key(0), x, *masks)),
        )
        gradients = sharding.on_mesh(gradients, mesh)
        return hlo.count(_compiled(gradients, params, batch, batch, options=None)[0])

    ours = counted(MixerBlock(384, 3072, "tanh", 0.0, False, jnp.bfloat16), None, None)
    other = counted(plain.MixerBlock(384, 3072, "tanh", jnp.bfloat16))
    assert 0 < ours.cycles < 0.97 * other.cycles
    assert 0 < ours.bytes < 0.96 * other.bytes

"""Programs compiled for an NVIDIA H200 and a TPU v5e, compared with the plain implementation.

No accelerator is needed. The tests inspect the matmul epilogues, transposes, memory and traffic,
and the TPU compiler's estimate of time.
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
# Autotuning needs a GPU, so it is off.
OPTIONS = {"xla_gpu_autotune_level": 0, **layers.compiler_options("gpu")}


@pytest.fixture(scope="module")
def mesh():
    config = (pathlib.Path(__file__).parent / "h200.textproto").read_text()
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=config, topology="1x1x1"
    )
    return sharding.make_mesh({"data": 1}, topology.devices)


def _compile(function, *arguments, options=OPTIONS, **jit_options):
    jitted = jax.jit(function, compiler_options=options, **jit_options)
    compiled = jitted.lower(*arguments).compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def _programs(mesh, options):
    """Returns (text, bytes of temporaries) of one training step of the mixer and of plain Flax."""
    model = make_model(**FIELDS)
    tx = optax.adamw(1e-3)
    step = TrainStep(
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
    plain_step = plain.make_train_step(plain.Mixer(**FIELDS), tx)
    plain_state = state.params, state.opt_state
    jit_options = dict(donate_argnums=0, options=options)
    step = sharding.on_mesh(step, mesh)
    return (
        _compile(step, state, batch, **jit_options),
        _compile(plain_step, plain_state, batch, **jit_options),
    )


@pytest.fixture(scope="module")
def programs(mesh):
    return _programs(mesh, OPTIONS)


@cuda_backend
@needs_plugin
def test_channel_mlp_gelu_is_fused_into_the_matmul(programs):
    (text, _), (plain_text, _) = programs
    assert text.count('"epilogue":"BIAS_GELU_AUX"') == BLOCKS
    assert not re.search('"epilogue":"[A-Z_]*GELU', plain_text)


@cuda_backend
@needs_plugin
def test_token_mlp_gelu_is_fused_into_the_matmul(programs):
    """The product is padded anyway, so the bias uses one of the padding rows."""
    (text, _), _ = programs
    assert text.count('"epilogue":"GELU_AUX"') == BLOCKS


@cuda_backend
@needs_plugin
def test_residual_is_added_in_place(programs):
    """The residual is not needed later, so the matmul that adds to it overwrites it."""
    (text, _), _ = programs
    matmuls = re.findall(r'custom-call\(.*"beta":1.*"epilogue":"BIAS"', text)
    assert len(matmuls) == BLOCKS
    assert not re.findall(rf" = bf16\[{BATCH * 196},768\]\S* copy\(", text)


@cuda_backend
@needs_plugin
def test_activations_are_not_transposed(programs):
    """The plain program transposes around each token MLP, in the forward and backward pass."""
    (text, _), (plain_text, _) = programs
    transpose = re.compile(rf"^  %\S*transpose\S* = bf16\[{BATCH},\d+,\d+\]", re.M)
    assert not transpose.findall(text)
    assert len(transpose.findall(plain_text)) >= 2 * BLOCKS


@cuda_backend
@needs_plugin
def test_step_needs_less_memory_and_traffic_than_plain(programs):
    (text, temp_bytes), (plain_text, plain_temp_bytes) = programs
    counts, plain_counts = hlo.count(text), hlo.count(plain_text)
    assert temp_bytes < 0.85 * plain_temp_bytes
    assert counts.bytes < 0.87 * plain_counts.bytes
    # XLA pads 196 tokens to 200.
    expected = BATCH * flops.train_flops(make_model(**FIELDS), SIZE)
    assert expected <= counts.flops < 1.015 * expected


@cuda_backend
@needs_plugin
def test_prediction_fuses_bias_and_gelu_into_matmuls(mesh):
    model = make_model(**FIELDS)
    params = train_state.abstract_params(model, SIZE, mesh)
    images = sharding.abstract_batch({"image": ((*SIZE, 3), "uint8")}, BATCH, mesh)["image"]
    text, _ = _compile(make_predict(model, mesh), params, images)
    assert text.count('"epilogue":"BIAS_GELU"') == BLOCKS
    assert text.count('"epilogue":"GELU"') == BLOCKS
    assert text.count('"epilogue":"BIAS"') >= BLOCKS


@pytest.mark.tpu_backend
def test_block_is_faster_than_plain_on_a_tpu(tpu):
    """The forward and backward pass of a B/16 block, at a batch that exceeds the on-chip memory."""
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
    mesh = sharding.make_mesh({"data": 1}, devices)
    replicated = sharding.replicated(mesh)
    batch = sharding.abstract_batch({"x": ((196, 768), "bfloat16")}, 128, mesh)["x"]

    def count(block, *masks):
        def gradients(params, x, grad):
            return jax.vjp(lambda *variables: block.apply(*variables, *masks), params, x)[1](grad)

        x = jnp.zeros((1, 196, 768), jnp.bfloat16)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
            jax.eval_shape(lambda: block.init(jax.random.key(0), x, *masks)),
        )
        gradients = sharding.on_mesh(gradients, mesh)
        return hlo.count(_compile(gradients, params, batch, batch, options=None)[0])

    block = MixerBlock(
        tokens_mlp_dim=384,
        token_mixing_groups=1,
        channels_mlp_dim=3072,
        gelu="tanh",
        dropout=0.0,
        drop_path_rescale=False,
        dtype=jnp.bfloat16,
    )
    counts = count(block, None, None)
    plain_counts = count(plain.MixerBlock(384, 3072, "tanh", jnp.bfloat16))
    assert 0 < counts.cycles < 0.97 * plain_counts.cycles
    assert 0 < counts.bytes < 0.96 * plain_counts.bytes

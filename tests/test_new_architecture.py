"""An architecture with other dimensions needs one file and one entry of the registry."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer
from helpers import tiny_config
from mixer import run_files, trainer
from mixer.errors import UserError
from mixer.models import modules, registry
from mixer.runs import config as run
from mixer.tools.inspect import page
from mixer.tools.plan import subject as plan_subject
from mixer.tools.plan import update
from mixer.weights import formats, load, published


class MeanBlock(nn.Module):
    """Adds a dense layer of the mean token, then a dense layer of each token."""

    @nn.compact
    def __call__(self, x, keys, keep_prob):
        mean = jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape)
        x = x + nn.Dense(x.shape[-1], name="across")(mean)
        return x + nn.Dense(x.shape[-1], name="within")(x)


class MeanNet(nn.Module):
    num_classes: int
    patch_size: int
    hidden_dim: int
    num_blocks: int
    num_groups: int
    gelu: str = "tanh"
    stoch_depth: float = 0.0
    stoch_depth_rescale: bool = False
    dropout: float = 0.0
    head_bias_init: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_blocks: bool = False
    in_channels: int = 3

    @nn.compact
    def __call__(self, images, *, train=False, example_index=None):
        dtype = jnp.dtype(self.dtype)
        x = modules.patch_embedding(images, self.patch_size, self.hidden_dim, dtype, name="pixels")
        out = {"stem": x}
        x = x.reshape(x.shape[0], -1, self.hidden_dim)
        masks = dict(key=None, example_index=None)
        x, outputs = modules.apply_blocks(self, MeanBlock, {}, x, name="MeanBlock_{}", **masks)
        out |= {f"block_{i}": output for i, output in enumerate(outputs)}
        out["pre_logits"] = x.reshape(x.shape[0], -1, self.num_groups, x.shape[-1]).mean((1, 2))
        out["logits"] = nn.Dense(self.num_classes, name="head")(out["pre_logits"])
        return out["logits"], out


def layer_flops(model, image_size):
    tokens = math.prod(image_size) // model.patch_size**2
    yield "pixels", 2.0 * 3 * math.prod(image_size) * model.hidden_dim
    for i in range(model.num_blocks):
        for name in ("across", "within"):
            yield f"MeanBlock_{i}/{name}", 2.0 * tokens * model.hidden_dim**2
    yield "head", 2.0 * model.hidden_dim * model.num_classes


def leaf_names(num_blocks):
    blocks = [f"MeanBlock_{i}/{name}" for i in range(num_blocks) for name in ("across", "within")]
    for name in ("pixels", *blocks, "head"):
        yield from (f"{name}/kernel", f"{name}/bias")


def read_dimensions(shapes, source):
    patch_size, _, in_channels, hidden_dim = shapes["pixels/kernel"]
    return {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_dim": hidden_dim,
        "num_blocks": modules.count_blocks(shapes),
        "num_groups": 2,
        "num_tokens": 16,
        "num_classes": shapes["head/kernel"][-1],
    }


ENTRY = registry.Architecture(
    name="mean",
    title="MeanNet",
    module=MeanNet,
    variants={"T/2": dict(patch_size=2, hidden_dim=8, num_blocks=2, num_groups=2)},
    options={},
    block="MeanBlock_{}",
    branches=("across", "within"),
    token_kernel=None,
    grown_dim=None,
    widest_dim="hidden_dim",
    signature=("pixels/bias",),
    placement=((r"MeanBlock_\d+/within/kernel", ("fsdp", "tensor")),),
    cast_leaves="pixels/.*",
    layer_flops=layer_flops,
    hidden_values=lambda model, image_size: 0,
    read_dimensions=read_dimensions,
    layouts=("published",),
    recognise=lambda shapes, source: "published" if "MeanBlock_0/within/bias" in shapes else None,
    leaf_names=leaf_names,
    stored_name=lambda name, layout: name,
    from_layout=lambda name, array, layout, fields: array,
    to_layout=lambda name, array, layout: array,
    timm_arguments=lambda model, image_size: {},
    resize={"interpolate": lambda name, array, *, grid, new_grid: array},
)


@pytest.fixture(scope="module", autouse=True)
def entry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ARCHITECTURES, "mean", ENTRY)
        yield


def mean_config(**values):
    config = tiny_config(model__name="mean", model__variant="T/2", **values)
    config.model.update(tokens_mlp_dim=None, channels_mlp_dim=None, stoch_depth=0.0, dropout=0.0)
    config.model.update(patch_size=None, hidden_dim=None, num_blocks=None)
    config.update(total_steps=2, eval_every_steps=None)
    config.schedule.warmup_steps = 0
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run; tests must not change it."""
    path = tmp_path_factory.mktemp("mean") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixer.runs.curves.draw_curves", lambda *_: None)
        trainer.train(mean_config(), path)
    return path


@pytest.mark.slow
def test_run_is_trained_loaded_and_inspected(workdir, tmp_path):
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "mean"
    model, params = mixer.load(workdir, log=lambda line: None)
    assert isinstance(model, MeanNet) and model.num_groups == 2
    images = np.zeros((2, 8, 8, 3), np.float32)
    logits, _ = jax.eval_shape(model.apply, {"params": params}, images)
    assert logits.shape == (2, 10)
    index = page.write(
        workdirs=[str(workdir)],
        **dict(weights=None, checkpoint_name="last", output=str(tmp_path / "page")),
        **dict(split_name=None, data_dir=None, image_size=None, log=lambda line: None),
    )
    text = index.read_text()
    assert "num_groups=2" in text and "Activations" in text and "Token mixing" not in text
    assert (tmp_path / "page" / "activations.png").exists()


def test_file_is_written_and_read_in_its_layouts(workdir, tmp_path):
    loaded = load.read(workdir, log=lambda line: None)
    arrays = {name: np.asarray(x) for name, x in load.sharding.by_name(loaded.params).items()}
    path = tmp_path / "mean.npz"
    formats.write_file(path, arrays, loaded.card, layout="published")
    card = load.read(path, log=lambda line: None).card
    assert (card.architecture, card.variant, card.image_size) == ("mean", "T/2", (8, 8))
    with pytest.raises(UserError, match=r"'timm'.*published"):
        formats.write_file(tmp_path / "x.safetensors", arrays, loaded.card, layout="timm")
    with pytest.raises(UserError, match=r"resize=grow.*MeanNet.*interpolate"):
        mixer.load(path, image_size=16, resize="grow", log=lambda line: None)
    mixer.load(path, image_size=16, log=lambda line: None)  # the only method
    mean_checkpoint = dataclasses.replace(published.CHECKPOINTS["B/16-i1k"], architecture="mean")
    with pytest.raises(UserError, match=r"B/16.*T/2"):
        mean_checkpoint.num_params  # noqa: B018


def test_initial_weights_are_of_the_configs_architecture(workdir):
    config = mean_config(init_from=str(workdir))
    assert run.find_initial(config).card.architecture == "mean"
    older_config = config.to_dict()
    del older_config["model"]["name"]
    config.model.name = run_files.complete(older_config)["model"]["name"]
    assert config.model.name == "mixer"
    with pytest.raises(UserError, match=r"model\.name=mixer.*model\.name=mean"):
        run.find_initial(config)
    with pytest.raises(UserError, match=r"model\.variant='T/2'"):
        run.check_config(config)


def test_plan_recomputes_all_layers_of_a_block_but_the_last():
    config = mean_config(model__num_classes=10)
    subject = plan_subject.open_subject(config, "gpu:1xH200", utilization=0.5)
    settings = dataclasses.replace(update.own_settings(subject), remat="full")
    full, none = (
        update.estimate_step(subject, dataclasses.replace(settings, remat=remat)).flops
        for remat in ("full", "none")
    )
    assert full - none == (16 * 16) * 2 * (2 * 8**2)  # 16 images of 16 tokens, 2 blocks, one layer

"""Token-mixing groups: one token-mixing MLP for each group of channels (paper, appendix A.1)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from helpers import (
    GOLDENS,
    TINY,
    assert_same_bits,
    final_state,
    golden,
    golden_params,
    run_program,
    tiny_config,
)
from mixer import trainer
from mixer.errors import UserError
from mixer.models import flops, mlp_mixer, placement, registry
from mixer.runs import config as run
from mixer.tools.plan import hlo
from mixer.weights import formats, hub
from mixer.weights import load as loading

PUBLISHED = GOLDENS / "mixer_tiny_official.npz"
# An MLP for each of the 24 channels, and a few groups.
all_and_few = pytest.mark.parametrize("groups", [24, pytest.param(4, marks=pytest.mark.slow)])


def make(groups, **fields):
    return registry.make_model(num_classes=7, token_mixing_groups=groups, **(TINY | fields))


def repeat(params, groups):
    """Returns parameters in which every group has the token-mixing MLPs of `params`."""
    return {
        name: np.repeat(leaf[None], groups, axis=0) if "/token_mixing/" in name else leaf
        for name, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }


def random_params(model, size=(32, 32)):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in registry.param_shapes(model, size).items()
    }


def save(path, model, arrays, size=(32, 32)):
    """Writes arrays as published weights of `model` and reads them again."""
    dimensions = registry.dimensions(model) | {"token_mixing_groups": model.token_mixing_groups}
    card = dataclasses.replace(
        loading.read(PUBLISHED, log=lambda line: None).card,
        variant=None,
        dimensions=dimensions,
        image_size=size,
        preprocess=None,
    )
    formats.write_file(path, arrays, card, layout="published")
    return loading.read(path, log=lambda line: None)


@all_and_few
def test_equal_groups_equal_the_shared_model(groups):
    """Outputs with masks, and gradients, which are summed over the groups."""
    images, fields = golden("outputs")["image"], dict(stoch_depth=0.3, dropout=0.2)

    def outputs_and_gradients(model, params):
        def loss(params):
            tree = {"params": traverse_util.unflatten_dict(params, sep="/")}
            rngs = {"dropout": jax.random.key(1)}
            logits, out = model.apply(tree, images, train=True, rngs=rngs)
            return jnp.sum(logits**2), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return out, grads

    shared = traverse_util.flatten_dict(golden_params(), sep="/")
    expected, expected_grads = outputs_and_gradients(make(1, **fields), shared)
    out, grads = outputs_and_gradients(make(groups, **fields), repeat(golden_params(), groups))
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(out[name], expected[name], atol=1e-6 * scale, err_msg=name)
    for name, grad in expected_grads.items():
        group_grads = np.sum(grads[name], 0) if "/token_mixing/" in name else grads[name]
        scale = np.abs(grad).max()
        np.testing.assert_allclose(group_grads, grad, atol=1e-5 * scale, err_msg=name)


def test_a_group_is_of_consecutive_channels_and_independent():
    images, model = golden("outputs")["image"], make(4, num_blocks=1)
    params = repeat(golden_params(), 4)
    params["MixerBlock_0/channel_mixing/Dense_1/kernel"] *= 0

    @jax.jit
    def apply(params):
        tree = traverse_util.unflatten_dict(params, sep="/")
        return model.apply({"params": tree}, images)[1]["block_0"]

    bias = "MixerBlock_0/token_mixing/Dense_1/bias"
    shifted = params[bias] + np.eye(4)[:, [2]]  # only the third group's
    difference = apply(params | {bias: shifted}) - apply(params)
    expected = np.zeros(24)
    expected[12:18] = 1
    np.testing.assert_allclose(difference, np.broadcast_to(expected, difference.shape), atol=1e-5)


def test_each_group_is_initialised_like_a_shared_mlp():
    model = make(24, tokens_mlp_dim=200)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
    kernels = params["MixerBlock_1"]["token_mixing"]
    assert kernels["Dense_0"]["kernel"].shape == (24, 16, 200)
    assert kernels["Dense_1"]["kernel"].shape == (24, 200, 16)
    assert kernels["Dense_0"]["bias"].shape == (24, 200)
    assert kernels["Dense_1"]["bias"].shape == (24, 16)
    for layer, fan in (("Dense_0", 16), ("Dense_1", 200)):
        deviations = np.std(kernels[layer]["kernel"], axis=(1, 2))
        np.testing.assert_allclose(deviations, fan**-0.5, rtol=0.1)
        assert len(np.unique(deviations)) == 24


@pytest.mark.parametrize("method", ["grow", "interpolate"])
def test_groups_are_resized_like_shared_weights(method):
    sizes = dict(grid=(2, 3), new_grid=(4, 9))
    shapes = {"Dense_0/kernel": (6, 5), "Dense_0/bias": (5,)}
    shapes |= {"Dense_1/kernel": (5, 6), "Dense_1/bias": (6,)}
    for leaf, shape in shapes.items():
        name = f"MixerBlock_0/token_mixing/{leaf}"
        array = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        resize = getattr(mlp_mixer, method)
        expected = np.stack([resize(name, group, **sizes) for group in array])
        np.testing.assert_allclose(resize(name, array, **sizes), expected, rtol=1e-6, err_msg=name)


@all_and_few
def test_flops_do_not_depend_on_groups(groups):
    model, size = make(groups), (32, 32)
    assert flops.train_flops(model, size) == flops.train_flops(make(1), size)
    images = jax.ShapeDtypeStruct((2, *size, 3), np.float32)
    params = traverse_util.unflatten_dict(registry.param_shapes(model, size), sep="/")

    def loss(params, images):
        return model.apply({"params": params}, images)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(params, images).compile().as_text()
    expected = 2 * flops.train_flops(model, size)
    assert hlo.count(program).flops == pytest.approx(expected, rel=0.01)


def test_hidden_units_are_split_over_the_mesh_and_groups_are_not():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = traverse_util.unflatten_dict(registry.param_shapes(make(4), (32, 32)), sep="/")
    shardings = traverse_util.flatten_dict(placement.state_shardings(mesh, shapes), sep="/")
    specs = {
        name.removeprefix("MixerBlock_2/token_mixing/"): tuple(value.spec)
        for name, value in shardings.items()
    }
    assert specs["Dense_0/kernel"] == (None, None, ("tensor", "fsdp"))
    assert specs["Dense_1/kernel"] == (None, ("tensor", "fsdp"), None)
    assert specs["Dense_0/bias"] == (None, "tensor") and specs["Dense_1/bias"] == ()


def test_weights_with_groups_come_back_bit_by_bit_or_are_refused(tmp_path):
    # Axes of size 1 are not mistaken for the leading axes of the legacy layout.
    for model, size in ((make(4), (32, 32)), (make(24, tokens_mlp_dim=1), (8, 8))):
        arrays = random_params(model, size)
        path = tmp_path / f"{model.token_mixing_groups}.npz"
        loaded = save(path, model, arrays, size)
        assert loaded.model == model
        assert_same_bits(traverse_util.flatten_dict(loaded.params, sep="/"), arrays)
        again = loading.read(path, image_size=(64, 64), log=lambda line: None)
        assert again.model.token_mixing_groups == model.token_mixing_groups
    for name, layout in (("old.npz", "legacy"), ("timm.safetensors", "timm")):
        with pytest.raises(UserError, match=rf"{layout}.*token_mixing_groups=24"):
            formats.write_file(tmp_path / name, arrays, loaded.card, layout=layout)
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match=r"timm.*token_mixing_groups=24"):
        hub.write_folder(tmp_path / "hub", arrays, loaded.card, license_name="mit", results={})
    assert not (tmp_path / "hub").exists()


def test_wrong_numbers_of_groups_are_named(tmp_path):
    for groups in (0, -1, 2.0, 5, 48):
        with pytest.raises(UserError, match=rf"model\.token_mixing_groups={groups}"):
            make(groups)
    with pytest.raises(UserError, match=r"model\.token_mixing_groups=2.*vit|field"):
        registry.make_model("B/16", name="vit", num_classes=7, token_mixing_groups=2)
    grouped = tmp_path / "grouped.npz"
    save(grouped, make(4), random_params(make(4)))
    for path, stored, groups in ((PUBLISHED, 1, 4), (grouped, 4, 1), (grouped, 4, 24)):
        config = tiny_config(init_from=str(path), model__token_mixing_groups=groups)
        message = rf"model\.token_mixing_groups={groups}.*model\.token_mixing_groups={stored}"
        with pytest.raises(UserError, match=message):
            run.find_initial(config)
    config = tiny_config(init_from=str(grouped), image_size=32)
    assert run.resolve(config, initial=run.find_initial(config)).model.token_mixing_groups == 4


@pytest.mark.slow
def test_run_with_groups_resumes_is_evaluated_and_inspected(tmp_path):
    settings = dict(
        schedule__decay="constant",  # does not depend on the length
        model__token_mixing_groups=16,
        model__scan_blocks=True,
        model__remat="full",
        model__dtype="bfloat16",
    )
    whole, half = tmp_path / "whole", tmp_path / "half"
    trainer.train(tiny_config(**settings), whole)
    trainer.train(tiny_config(**settings, total_steps=4), half)
    trainer.train(tiny_config(**settings), half, allow_config_change=True)
    assert_same_bits(final_state(half), final_state(whole))
    assert json.loads((whole / "config.json").read_text())["model"]["token_mixing_groups"] == 16
    model, params = loading.load(whole, log=lambda line: None)
    kernel = params["MixerBlock_1"]["token_mixing"]["Dense_0"]["kernel"]
    assert model.token_mixing_groups == 16 and kernel.shape == (16, 16, 8)
    for program in ("evaluate.py", "mixer.tools.inspect"):
        result = run_program(program, f"--workdir={whole}")
        assert result.returncode == 0, result.stderr
    assert "first of 16 groups" in (whole / "inspect" / "index.html").read_text()

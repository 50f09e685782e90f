"""Compares the registry's description of each architecture with the traced network."""

import re

import jax
import numpy as np
import pytest
from flax import traverse_util

import mixer
from helpers import TINY, TINY_VIT
from mixer.errors import UserError
from mixer.models import flops, registry

SIZE = (16, 24)
MODELS = {
    "mixer": mixer.make_model(num_classes=7, **TINY),
    "mixer-untied": mixer.make_model(num_classes=7, token_mixing_groups=24, **TINY),
    "vit": mixer.make_model(name="vit", num_classes=7, **TINY_VIT),
    "vit-gap": mixer.make_model(
        name="vit", num_classes=7, pooling="gap", positions="sincos2d", **TINY_VIT
    ),
    "vit-map": mixer.make_model(
        name="vit", num_classes=7, pooling="map", pre_logits_layer=True, **TINY_VIT
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def trace_params(model):
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), np.float32)
    tree = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return traverse_util.flatten_dict(tree, sep="/")


def test_names_and_shapes_match_the_network(model):
    leaves, architecture = trace_params(model), registry.architecture_of(model)
    shapes = registry.param_shapes(model, SIZE)
    assert shapes == leaves
    names = set(architecture.leaf_names(model.num_blocks))
    assert names == set(leaves) or (names > set(leaves) and architecture.options)
    assert registry.num_params(model, SIZE) == sum(leaf.size for leaf in leaves.values())
    assert {*registry.HEAD, *architecture.signature} <= set(leaves)


def test_dimensions_are_inferred_from_shapes(model):
    architecture = registry.architecture_of(model)
    shapes = {name: leaf.shape for name, leaf in trace_params(model).items()}
    assert architecture.recognise(shapes, "x") == "published"
    dims = architecture.read_dimensions(shapes, "x")
    fixed = getattr(model, "positions", None) == "sincos2d"
    tokens = None if fixed else SIZE[0] * SIZE[1] // model.patch_size**2
    expected = registry.dimensions(model) | {"num_tokens": tokens, "num_classes": 7}
    expected |= {key: getattr(model, key) for key in ("in_channels", *architecture.options)}
    assert architecture.default_options | dims == expected
    assert list(registry.dimensions(model)) == list(architecture.dimensions)


def test_layouts_are_recognised_and_restore_the_arrays(model):
    architecture, rng = registry.architecture_of(model), np.random.default_rng(0)
    leaf_shapes = {name: leaf.shape for name, leaf in trace_params(model).items()}
    heads = {"num_heads": getattr(model, "num_heads", None)}
    layouts = architecture.layouts
    if getattr(model, "token_mixing_groups", 1) > 1:
        layouts = ("published",)
    for layout in layouts:
        stored, leaves = {}, {}
        for name in architecture.leaf_names(model.num_blocks):
            if name in leaf_shapes:
                leaves[name] = rng.normal(size=leaf_shapes[name]).astype(np.float32)
                array = architecture.to_layout(name, leaves[name], layout)
                stored.setdefault(architecture.stored_name(name, layout), []).append(array)
        stored = {name: np.concatenate(a) if len(a) > 1 else a[0] for name, a in stored.items()}
        for name, array in leaves.items():
            restored = stored[architecture.stored_name(name, layout)]
            restored = architecture.from_layout(name, restored, layout, heads)
            np.testing.assert_array_equal(restored, array)
        shapes = {name: array.shape for name, array in stored.items()}
        assert architecture.recognise(shapes, "x") == layout


def test_flops_are_listed_by_layer(model):
    """Each use of a kernel costs two FLOPs per value."""
    leaves = trace_params(model)
    layers = dict(flops.layers(model, SIZE))
    named = {name.rpartition("/")[0] for name in leaves if name not in ("cls", "pos_embedding")}
    assert set(layers) - named <= {name for name in layers if name.endswith("Attention_0")}
    assert named <= set(layers)
    assert layers["head"] == 2 * leaves["head/kernel"].size
    assert flops.forward_flops(model, SIZE) == sum(layers.values())
    first_layer = next(iter(layers.values()))
    assert flops.train_flops(model, SIZE) == 3 * sum(layers.values()) - first_layer


def test_cast_leaves_are_those_a_bfloat16_model_rounds(model):
    """Rounding these leaves to bfloat16 in advance changes no output; rounding the others does."""
    model = model.clone(dtype="bfloat16", num_blocks=1)
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(name.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
        for name, leaf in trace_params(model).items()
    }
    images = rng.normal(size=(2, *SIZE, 3)).astype(np.float32)
    apply = jax.jit(lambda tree: model.apply({"params": tree}, images)[0])

    def outputs(names):
        rounded = {
            name: np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float32) if name in names else x
            for name, x in params.items()
        }
        return np.asarray(apply(traverse_util.unflatten_dict(rounded, sep="/")))

    pattern = registry.architecture_of(model).cast_leaves
    names = {name for name in params if re.fullmatch(pattern, name)}
    np.testing.assert_array_equal(outputs(names), outputs(set()))
    assert np.any(outputs(set(params) - names) != outputs(set()))


def test_make_model_accepts_a_variant_or_dimensions():
    model = mixer.make_model("S/16", num_classes=10, dtype="bfloat16")
    assert (model.num_blocks, model.hidden_dim, model.num_classes) == (8, 512, 10)
    assert registry.find_variant(registry.architecture_of(model), registry.dimensions(model))
    tiny_model = mixer.make_model(num_classes=7, **TINY)
    images = jax.ShapeDtypeStruct((2, *SIZE, 3), np.float32)
    (logits, _), _ = jax.eval_shape(tiny_model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, 7)
    with pytest.raises(UserError, match=r"model\.name='vti'.*mixer"):
        mixer.make_model("S/16", name="vti", num_classes=10)
    assert {"load", "make_model"} <= set(dir(mixer))

"""Compares the registry's description of each architecture with the traced network."""

import re

import jax
import numpy as np
import pytest
from flax import traverse_util

import mixer
from helpers import TINY
from mixer.errors import UserError
from mixer.models import flops, registry
from mixer.weights.formats import ENDINGS

SIZE = (16, 24)
MODELS = {"mixer": mixer.make_model(num_classes=7, **TINY)}


@pytest.fixture(params=registry.ARCHITECTURES)
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
    assert set(architecture.leaf_names(model.num_blocks)) == set(leaves)
    assert registry.num_params(model, SIZE) == sum(leaf.size for leaf in leaves.values())
    assert {*registry.HEAD, *architecture.signature} <= set(leaves)


def test_dimensions_are_inferred_from_shapes(model):
    architecture = registry.architecture_of(model)
    shapes = {name: leaf.shape for name, leaf in trace_params(model).items()}
    assert architecture.recognise(shapes, "x") == "published"
    dims = architecture.read_dimensions(shapes, "x")
    tokens = SIZE[0] * SIZE[1] // model.patch_size**2
    expected = registry.dimensions(model) | {"num_tokens": tokens, "num_classes": 7}
    assert dims == expected and list(registry.dimensions(model)) == list(architecture.dimensions)


def test_layouts_are_recognised_and_restore_the_arrays(model):
    architecture, rng = registry.architecture_of(model), np.random.default_rng(0)
    for layout in ENDINGS:
        stored = {}
        for name, leaf in trace_params(model).items():
            array = rng.normal(size=leaf.shape).astype(np.float32)
            stored_name = architecture.stored_name(name, layout)
            assert stored_name not in stored
            stored[stored_name] = architecture.to_layout(name, array, layout)
            restored = architecture.from_layout(name, stored[stored_name], layout)
            np.testing.assert_array_equal(restored, array)
        shapes = {name: array.shape for name, array in stored.items()}
        assert architecture.recognise(shapes, "x") == layout


def test_flops_are_listed_by_layer(model):
    """Each use of a kernel costs two FLOPs per value."""
    leaves = trace_params(model)
    layers = dict(flops.layers(model, SIZE))
    assert set(layers) == {name.rpartition("/")[0] for name in leaves}
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

"""Multiplications and additions of a Mixer's matmuls, by the closed form."""

import math
from collections.abc import Iterator

from mixer.models.mlp_mixer import MlpMixer


def layers(model: MlpMixer, image_size: tuple[int, int]) -> Iterator[tuple[str, float]]:
    """(name, FLOPs an image takes forward) of each layer with parameters, in their order.

    Multiplications and additions of matmuls: 2 * S * D_in * D_out; norms have none.
    """
    tokens = math.prod(image_size) // model.patch_size**2
    width, across, along = model.hidden_dim, model.tokens_mlp_dim, model.channels_mlp_dim
    yield "stem", 2.0 * tokens * 3 * model.patch_size**2 * width
    for i in range(model.num_blocks):
        for number, (mixing, flops) in enumerate(
            (
                ("token_mixing", 2.0 * width * tokens * across),
                ("channel_mixing", 2.0 * tokens * width * along),
            )
        ):
            yield f"MixerBlock_{i}/LayerNorm_{number}", 0.0
            yield f"MixerBlock_{i}/{mixing}/Dense_0", flops
            yield f"MixerBlock_{i}/{mixing}/Dense_1", flops
    yield "pre_head_layer_norm", 0.0
    yield "head", 2.0 * width * model.num_classes


def forward_flops(model: MlpMixer, image_size: tuple[int, int]) -> float:
    """FLOPs of the matmuls of one image's prediction: 25.2e9 for B/16 at 224 px."""
    return sum(flops for _, flops in layers(model, image_size))


def train_flops(model: MlpMixer, image_size: tuple[int, int]) -> float:
    """FLOPs of the matmuls of one image in an update of all parameters: 75.4e9 for B/16 at 224 px.

    Forward, and as many again for the gradient of each kernel and for that of each layer's input,
    but for the pixels', which nobody needs.
    """
    return 3 * forward_flops(model, image_size) - next(layers(model, image_size))[1]

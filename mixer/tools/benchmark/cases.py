"""The computations that `train` and `infer` measure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mixer.models import registry
from mixer.sizes import Size
from mixer.tools.benchmark import plain

# The reference recipe's model for CIFAR-10: github.com/omihub777/MLP-Mixer-CIFAR,
# configs/cifar10.py.
CIFAR = dict(patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512)
# The models of --models, as fields for `make_model`.
MODELS = {"cifar": CIFAR} | {
    f"{entry.prefix}{variant}": {"name": name, **dimensions}
    for name, entry in registry.ARCHITECTURES.items()
    for variant, dimensions in entry.variants.items()
}


def has_implementation(dimensions: Mapping[str, Any], name: str) -> bool:
    """Returns whether the implementation `name` of --against has a model of `dimensions`."""
    architecture = registry.ARCHITECTURES[dimensions.get("name", "mixer")]
    return architecture.name in plain.MODULES if name == "plain" else bool(architecture.timm_class)


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation that all implementations in a table perform.

    Attributes:
      measurement: "train" (an AdamW update with softmax cross-entropy) or "infer" (from pixels to
        logits).
      model: name of the model.
      dimensions: fields of the model for `make_model`.
      image_size: size in pixels.
      num_classes: number of classes.
      batch_size: images per device; they are on the device as uint8.
      dtype: dtype of the computation, "float32" or "bfloat16"; trained parameters are float32.
      gelu: "tanh" or "erf".
    """

    measurement: str
    model: str
    dimensions: Mapping[str, Any]
    image_size: Size
    num_classes: int
    batch_size: int
    dtype: str
    gelu: str

    def make_model(self) -> nn.Module:
        """Makes this project's model."""
        return registry.make_model(
            **self.dimensions, num_classes=self.num_classes, dtype=self.dtype, gelu=self.gelu
        )

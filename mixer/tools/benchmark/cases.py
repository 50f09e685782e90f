"""The computations that `train` and `infer` measure."""

import dataclasses
from collections.abc import Mapping

from mixer.models.registry import ARCHITECTURES
from mixer.sizes import Size

# The reference recipe's model for CIFAR-10: github.com/omihub777/MLP-Mixer-CIFAR,
# configs/cifar10.py.
CIFAR = dict(patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512)
# The models of --models, as fields for `make_model`. The names of other architectures' models have
# the architecture as a prefix.
MODELS = {"cifar": CIFAR}
for _name, _entry in ARCHITECTURES.items():
    for _variant, _dimensions in _entry.variants.items():
        if _name == "mixer":
            MODELS[_variant] = _dimensions
        else:
            MODELS[f"{_name}-{_variant}"] = {"name": _name, **_dimensions}


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
    dimensions: Mapping[str, int]
    image_size: Size
    num_classes: int
    batch_size: int
    dtype: str
    gelu: str

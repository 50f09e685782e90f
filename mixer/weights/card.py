"""The card of weights: a description of their model and data, saved in a file's JSON sidecar."""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from mixer import files
from mixer.data.imagenet.names import LISTS
from mixer.data.preprocessing.spec import pixel_range
from mixer.errors import UserError, first_line
from mixer.models.modules import GELUS, patch_grid
from mixer.models.registry import ARCHITECTURES, make_model
from mixer.sizes import RGB_CHANNELS
from mixer.weights.arrays import DamagedError, Shapes

FORMAT = "mlp-mixer weights, 1"  # the "format" entry of a JSON sidecar


@dataclasses.dataclass(frozen=True)
class Card:
    """Describes weights; recognised from array shapes, a run's config or a file's JSON sidecar.

    Attributes:
      architecture: key of `mixer.models.registry.ARCHITECTURES`; not saved, because the names of
        the arrays identify it.
      variant: such as "B/16"; None if no variant has these dimensions. A Mixer grown to a larger
        image has a multiple of its variant's tokens_mlp_dim.
      dimensions: dimensions and options of the architecture by the names of the model's fields,
        such as patch_size.
      num_classes: width of the head; 0 if there is no head.
      image_size: (H, W) in pixels.
      gelu: "tanh" or "erf".
      preprocess: evaluation preprocessing, a spec for mixer/data/preprocessing/host.py; None if
        unknown.
      class_names: names in label order, or the name of a list in mixer/data/imagenet/names.py; None
        if unknown.
      source: path or URL that the weights came from.
    """

    architecture: str
    variant: str | None
    dimensions: Mapping[str, Any]
    num_classes: int
    image_size: tuple[int, int]
    gelu: str
    preprocess: str | None
    class_names: str | tuple[str, ...] | None
    source: str

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """Side of a patch in pixels, or its height and width."""
        return self.dimensions["patch_size"]

    @property
    def in_channels(self) -> int:
        """Number of channels of the images."""
        return self.dimensions.get("in_channels", RGB_CHANNELS)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.dimensions["num_blocks"]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along each side of the image, (H/P, W/P)."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def value_range(self) -> tuple[float, float]:
        """The model's input values for the pixel values 0 and 255."""
        return pixel_range(self.preprocess)

    def model(self, **fields: Any) -> nn.Module:
        """Builds the model of these weights; `fields` override fields of the model."""
        defaults = {**self.dimensions, "num_classes": self.num_classes, "gelu": self.gelu}
        fields = defaults | fields
        if fields["num_classes"] == 0:  # `make_model` also serves training, which needs a head
            fields["num_classes"] = 1
            return make_model(name=self.architecture, **fields).clone(num_classes=0)
        return make_model(name=self.architecture, **fields)

    def as_json(self) -> dict[str, Any]:
        """Returns the JSON values of the card, with one key per dimension."""
        values = dataclasses.asdict(self)
        del values["architecture"]
        return {"variant": values.pop("variant"), **values.pop("dimensions"), **values}


def card_path(path: epath.PathLike) -> epath.Path:
    """Returns the path of a weight file's JSON sidecar: the file's name plus ".json"."""
    path = epath.Path(path)
    return path.with_name(path.name + ".json")


def read_card(path: epath.PathLike) -> dict[str, Any] | None:
    """Returns the values of a weight file's JSON sidecar; None if it has none in our format.

    The values are those of `Card.as_json` and a "checksum" of the arrays. All values are checked,
    except the dimensions, which differ between architectures. Older files have no "in_channels";
    their images are RGB.

    Raises:
      UserError: the JSON is damaged, has a later format, or has an invalid value.
    """
    path = card_path(path)
    values = read_json(path)
    version = values.get("format") if isinstance(values, dict) else None
    if not str(version).startswith(FORMAT.rpartition(",")[0]):
        return None
    if version != FORMAT:
        raise UserError(f"{path} has the format {str(version)[:80]!r}; expected {FORMAT!r}")
    saved = [field.name for field in dataclasses.fields(Card)]
    saved = [name for name in saved if name not in ("architecture", "dimensions")]
    if missing := [name for name in (*saved, "checksum") if name not in values]:
        raise DamagedError(path, f"{path} lacks {', '.join(missing)}")
    names, size = values["class_names"], values["image_size"]
    for name, is_valid in (
        ("gelu", values["gelu"] in GELUS),
        ("image_size", _is_size(size)),
        ("class_names", _are_class_names(names, values["num_classes"])),
        ("preprocess", values["preprocess"] is None or _is_preprocessing(values["preprocess"])),
        ("source", isinstance(values["source"], str)),
    ):
        if not is_valid:
            text = str(values[name])[:80]
            raise DamagedError(path, f"{path}: invalid value {name}={text}")
    return {
        "in_channels": RGB_CHANNELS,
        **values,
        "image_size": tuple(size),
        "class_names": tuple(names) if isinstance(names, list) else names,
    }


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and side > 0 for side in size)
    )


def _are_class_names(names: Any, num_classes: Any) -> bool:
    if isinstance(names, list):
        return len(names) == num_classes and all(isinstance(name, str) for name in names)
    return names is None or LISTS.get(str(names)) == num_classes


def _is_preprocessing(preprocess: Any) -> bool:
    try:
        return all(map(math.isfinite, pixel_range(preprocess)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
        return False


def read_json(path: epath.Path) -> Any:
    """Returns the value in a JSON file; None if the file does not exist.

    Raises:
      UserError: the path is not a regular file, or the file cannot be read or is damaged.
    """
    content = files.read_regular(path)
    try:
        return None if content is None else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"{path} is damaged: {first_line(error)}") from None


def checksum(read: Callable[[str], np.ndarray], shapes: Shapes) -> int:
    """Returns a CRC-32 of a few small arrays, to tell apart weights of the same shapes."""
    names = [name for entry in ARCHITECTURES.values() for name in entry.signature]
    data = [read(name).astype("<f4").tobytes() for name in (*names, "head/bias") if name in shapes]
    return zlib.crc32(b"".join(data))

"""The card of weights: what they are, for the JSON beside a file."""

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
from mixer.models.modules import GELUS
from mixer.models.registry import ARCHITECTURES, make_model
from mixer.weights.arrays import DamagedError, Shapes

FORMAT = "mlp-mixer weights, 1"  # what the JSON beside a file says of itself
MAX_JSON_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True)
class Card:
    """What weights are: recognised from their shapes, a run's config, or the JSON beside a file.

    Attributes:
      architecture: key of `mixer.models.registry.ARCHITECTURES`; never saved, as the names of the
        arrays show it.
      variant: such as "B/16"; None: other dimensions. Grown to a larger image, a Mixer has a
        multiple of its variant's tokens_mlp_dim.
      dimensions: by the fields of the model, such as patch_size.
      num_classes: width of the head; 0: they have none.
      image_size: (H, W) in pixels.
      gelu: "tanh" or "erf".
      preprocess: the steps of evaluation, of mixer/data/preprocessing/host.py; None: unknown.
      class_names: in label order, or the name of a list of mixer/data/imagenet/names.py; None:
        unknown.
      source: where the weights come from.
    """

    architecture: str
    variant: str | None
    dimensions: Mapping[str, int]
    num_classes: int
    image_size: tuple[int, int]
    gelu: str
    preprocess: str | None
    class_names: str | tuple[str, ...] | None
    source: str

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.dimensions["patch_size"]

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.dimensions["num_blocks"]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along each side of the image, (H/P, W/P)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def value_range(self) -> tuple[float, float]:
        """What the values 0 and 255 of a pixel become for the model."""
        return pixel_range(self.preprocess)

    def model(self, **fields: Any) -> nn.Module:
        """Builds the model of these weights; `fields` replace its own."""
        own = {**self.dimensions, "num_classes": self.num_classes, "gelu": self.gelu}
        fields = own | fields
        if fields["num_classes"] == 0:  # `make_model` is for training too, which needs a head
            fields["num_classes"] = 1
            return make_model(name=self.architecture, **fields).clone(num_classes=0)
        return make_model(name=self.architecture, **fields)

    def as_json(self) -> dict[str, Any]:
        """Returns the values that are saved; each dimension is a key."""
        values = dataclasses.asdict(self)
        del values["architecture"]
        return {"variant": values.pop("variant"), **values.pop("dimensions"), **values}


def card_path(path: epath.PathLike) -> epath.Path:
    """Returns the path of the JSON beside a file of weights: the file's name and ".json"."""
    path = epath.Path(path)
    return path.with_name(path.name + ".json")


def read_card(path: epath.PathLike) -> dict[str, Any] | None:
    """Returns the values of the JSON beside a file of weights; None where there is none of ours.

    They are those of `Card.as_json`, and a "checksum" of the arrays. Only the dimensions, which
    differ by architecture, are not checked.

    Raises:
      UserError: it is damaged, of a later version, or has a value that no card has.
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
        ("preprocess", values["preprocess"] is None or _are_steps(values["preprocess"])),
        ("source", isinstance(values["source"], str)),
    ):
        if not is_valid:
            text = str(values[name])[:80]
            raise DamagedError(path, f"{path} says {name}={text}, which no card has")
    return values | {
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


def _are_steps(preprocess: Any) -> bool:
    try:
        return all(map(math.isfinite, pixel_range(preprocess)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
        return False


def read_json(path: epath.Path) -> Any:
    """Returns the value in a JSON file, None where there is no such file.

    Raises:
      UserError: it is no regular file, cannot be read, is too large or damaged.
    """
    try:
        if path.exists() and path.stat().length > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        content = files.read_regular(path)
        return None if content is None else json.loads(content)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"{path} is damaged: {first_line(error)}") from None
    except OSError as error:
        raise DamagedError(path, f"{path} is damaged: {error.strerror or error}") from None


def checksum(read: Callable[[str], np.ndarray], shapes: Shapes) -> int:
    """Returns a sum over a few small arrays: other weights of the same shapes have another."""
    names = [name for entry in ARCHITECTURES.values() for name in entry.signature]
    data = [read(name).astype("<f4").tobytes() for name in (*names, "head/bias") if name in shapes]
    return zlib.crc32(b"".join(data))

"""Published weights: their URLs and sizes, and the facts that the name of a source reveals.

`mixer.weights.fetch` downloads them, `mixer.weights.load` reads the arrays.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mixer.data.imagenet.names import LISTS, synsets
from mixer.errors import UserError, check_choice, nearest
from mixer.files import STORES
from mixer.models.registry import make_model, num_params

STORAGE = "https://storage.googleapis.com/"
BUCKET = f"{STORAGE}mixer_models/"
VIT_BUCKET = f"{STORAGE}vit_models/"
IMAGE_SIZE = 224  # of all published weights
# Bytes of names, headers and index in an npz or safetensors file, in addition to the values.
MAX_OVERHEAD = 1_000_000


@dataclasses.dataclass(frozen=True)
class Published:
    """A file that the authors released.

    Attributes:
      url: HTTPS URL of the file.
      architecture: key of `mixer.models.registry.ARCHITECTURES`.
      variant: such as "B/16"; the weights are for 224 x 224 pixels.
      num_classes: width of the head.
      options: options of the architecture that differ from the defaults.
    """

    url: str
    architecture: str
    variant: str
    num_classes: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Number of parameters, including the head."""
        fields = dict(name=self.architecture, num_classes=self.num_classes, **self.options)
        model = make_model(self.variant, **fields)
        return num_params(model, (IMAGE_SIZE, IMAGE_SIZE))


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about weights that the name of the source, or timm's config.json, reveals.

    Attributes:
      class_names: name of a list, or names in label order; None if unknown.
      preprocess: function (H, W) -> evaluation preprocessing of `mixer.data.preprocessing.host`, or
        None if it is unknown or cannot express that image size.
      note: a line for the log, or "".
      image_size: (H, W) in timm's config.json; None if unknown.
      gelu: the form of GELU in timm's config.json, "tanh" or "erf"; None if unknown.
    """

    class_names: str | tuple[str, ...] | None
    preprocess: Callable[[tuple[int, int]], str | None]
    note: str = ""
    image_size: tuple[int, int] | None = None
    gelu: str | None = None


def _released_files(folder: str, variants: str, class_names: str) -> dict[str, Published]:
    """Returns entries such as "B/16-i1k" for the files in one folder of the bucket."""
    label = {"imagenet1k": "i1k", "imagenet21k": "i21k"}.get(folder, folder)
    return {
        f"{variant}-{label}": Published(
            url=f"{BUCKET}{folder}/Mixer-{variant.replace('/', '_')}.npz",
            architecture="mixer",
            variant=variant,
            num_classes=LISTS[class_names],
        )
        for variant in variants.split()
    }


# The bucket's files, as the repositories of vision_transformer and big_vision list them. Weights
# from JFT-300M and for H/14 were never released.
CHECKPOINTS: dict[str, Published] = {
    **_released_files("imagenet1k", "B/16 L/16", "imagenet1k"),
    **_released_files("imagenet21k", "B/16 L/16", "imagenet21k"),
    **_released_files("sam", "B/16 B/32", "imagenet1k"),
    **_released_files("gsam", "S/8 S/16 S/32 B/16 B/32", "imagenet1k"),
    # The ViTs of arXiv 2010.11929. Other files of their bucket have no certain address or layout.
    **{
        f"ViT-{variant}-i21k": Published(
            url=f"{VIT_BUCKET}imagenet21k/ViT-{variant.replace('/', '_')}.npz",
            architecture="vit",
            variant=variant,
            num_classes=LISTS["imagenet21k"],
            options={"pre_logits_layer": True},
        )
        for variant in ("B/16", "B/32", "L/16", "L/32", "H/14")
    },
}
# Published top-1 accuracies on the data sets of mixer/evaluation/suites.py, with their sources.
# "From memory" marks a figure that was not checked against the publication.
_PAPER, _TIMM = "paper, from memory", "timm's results, erf GELU"
_SAM = "Chen et al., 2021, arXiv 2106.01548, from memory"
ACCURACIES: dict[str, dict[str, tuple[float, str]]] = {
    "B/16-i1k": {"imagenet_val": (0.7644, _PAPER), "imagenet_real": (0.8236, _PAPER)},
    "L/16-i1k": {"imagenet_val": (0.7176, _PAPER)},
    "B/16-sam": {"imagenet_val": (0.774, _SAM)},
    "B/32-sam": {"imagenet_val": (0.724, _SAM)},
    # Despite the tag, these are the authors' ImageNet-1k weights (timm pull request 651).
    "mixer_b16_224.goog_in21k_ft_in1k": {
        "imagenet_val": (0.76602, _TIMM),
        "imagenet_real": (0.81976, _TIMM),
        "imagenet_v2": (0.6329, _TIMM),
    },
    "mixer_l16_224.goog_in21k_ft_in1k": {
        "imagenet_val": (0.72054, _TIMM),
        "imagenet_real": (0.77279, _TIMM),
        "imagenet_v2": (0.5666, _TIMM),
    },
    "mixer_b16_224.miil_in21k_ft_in1k": {"imagenet_val": (0.82306, _TIMM)},
}
# big_vision's names for the four files that it supports.
ALIASES = {
    f"{size}-{label}/16": f"{size}/16-{label}" for size in ("B", "L") for label in ("i1k", "i21k")
}
_AUTHORS_FILE = re.compile(r"(?:.*/)?Mixer-[SBL]_(8|16|32)\.npz")
_SHORT_NAME = re.compile(r"(ViT-)?[A-Za-z](-\w+)?/\d+(-\w+)?")


def by_short_name(path: epath.PathLike) -> Published | None:
    """Returns the published checkpoint with a short name such as "B/16-i21k" or "B-i21k/16".

    Returns None if `path` does not look like a short name, or if a file or folder has that name.

    Raises:
      UserError: `path` looks like a short name, but no checkpoint has it.
    """
    name = str(path)
    if not _SHORT_NAME.fullmatch(name) or epath.Path(name).exists():
        return None
    if name not in CHECKPOINTS and name not in ALIASES:
        raise UserError(
            f"{name!r} is not a file, a run or a published checkpoint; expected one of "
            f"{', '.join(CHECKPOINTS)}.{nearest(name, [*CHECKPOINTS, *ALIASES])}"
        )
    return CHECKPOINTS[ALIASES.get(name, name)]


def find(source: epath.PathLike) -> Published | None:
    """Returns the published checkpoint with a short name or https:// or gs:// URL, or None."""
    url = https_url(redact(source))
    for published in CHECKPOINTS.values():
        if published.url == url:
            return published
    return by_short_name(source)


def find_accuracies(
    source: epath.PathLike, *, variant: str | None, num_classes: int
) -> tuple[str, dict[str, tuple[float, str]]] | None:
    """Finds the published accuracies of weights: (name, {data set: (top-1, source)}).

    Args:
      source: the path that the user passed. A copy of an authors' file is identified by its own
        name and the name of its folder, because files in three folders of the bucket have the same
        names. Without such a folder, the file is assumed to be from the folder imagenet1k.
      variant: variant of the weights.
      num_classes: width of their head.

    Returns:
      The name and the accuracies, or None if the weights are not published or have no known
      accuracy.
    """
    text = redact(source)
    published = find(source)
    if published is None:
        names = [name for name in ACCURACIES if name.startswith("mixer_") and name in text]
        old_name = re.search(r"jx_(mixer_[bl]16_224)-", text)
        if old_name and num_classes == 1000:
            names = [f"{old_name[1]}.goog_in21k_ft_in1k"]
        if not names and _AUTHORS_FILE.fullmatch(text):
            folder = text.rpartition("/")[0].rpartition("/")[2]
            label = folder if folder in ("sam", "gsam") else "i1k"
            names = [f"{variant}-{label}"] if num_classes == 1000 else []
    else:
        names = [name for name, entry in CHECKPOINTS.items() if entry == published]
    name = next((name for name in names if name in ACCURACIES), None)
    return (name, ACCURACIES[name]) if name else None


def redact(source: epath.PathLike) -> str:
    """Returns the source without secrets, for messages and saved files.

    The result lacks the query string of an HTTP URL and the user before its host, because both
    can hold secrets.
    """
    match = re.match("([A-Za-z][A-Za-z0-9+.-]*)://", text := str(source))
    if match is None or match[1].lower() in (*STORES, "hf"):
        return text
    host, slash, path = re.split("[?#]", text[match.end() :], maxsplit=1)[0].partition("/")
    text = f"{match[0]}{host.rpartition('@')[2]}{slash}{path}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def https_url(path: str) -> str:
    """Returns the HTTPS URL of a file in an authors' bucket, which needs no credentials."""
    is_authors = path.startswith(("gs://mixer_models/", "gs://vit_models/"))
    return STORAGE + path.removeprefix("gs://") if is_authors else path


def check(published: Published, shapes: Mapping[str, tuple[int, ...]], num_bytes: int) -> None:
    """Checks the size of a file against the checkpoint that was published at its URL.

    Args:
      published: the published checkpoint.
      shapes: shape of each array in the file, by name.
      num_bytes: size of the file.

    Raises:
      UserError: the number of parameters or of bytes differs.
    """
    expected = published.num_params
    saved = sum(math.prod(shape) for shape in shapes.values())
    if saved != expected:
        raise UserError(
            f"{published.url}: the file has {saved:,} parameters; expected {expected:,} "
            f"({published.variant}, {published.num_classes:,} classes)"
        )
    low = 4 * expected
    if not low <= num_bytes <= low + MAX_OVERHEAD:
        raise UserError(
            f"{published.url}: the file has {num_bytes:,} bytes; expected {low:,} to "
            f"{low + MAX_OVERHEAD:,} (4 per parameter)"
        )


# Names of timm's models. The last match in a path is the name of the file or the nearest folder.
_TIMM_MODEL = re.compile(
    r"(?<![a-z])(?:jx_)?(?P<kind>mixer|gmixer|resmlp|gmlp)_(?:big_)?[a-z]*\d+_[a-z0-9_]+(?:\.\w+)?"
)
_OTHER_MODELS = {"gmixer": "GLU-Mixer", "resmlp": "ResMLP", "gmlp": "gMLP"}
# timm's models of a supported architecture whose default is the tanh form of GELU (timm 1.0.31).
_TIMM_TANH = re.compile(
    r"vit_(base_patch32_siglip(_gap)?_256|large_patch16_siglip(_gap)?_512"
    r"|(so400m|giantopt)_patch16_siglip(_gap)?_\d+)\b"
)
_TIMM_GELUS = {"gelu": "erf", "gelu_tanh": "tanh"}  # timm's names of activations
_NOT_21K = (
    "timm's goog_in21k_ft_in1k weights are the authors' ImageNet-1k weights, not fine-tuned "
    "ImageNet-21k weights (timm pull request 651)"
)
_TANH = "the authors trained these weights with the tanh form of GELU, but timm uses the erf form"


def facts(source: epath.PathLike, *, layout: str, num_classes: int) -> Facts:
    """Returns the facts that the name of a source reveals; unknown facts are None.

    Args:
      source: the path that the user passed: a file, a URL, hf://owner/name or a short name.
      layout: "timm", or the layout of an npz file, "published" or "legacy".
      num_classes: width of the head in the file.

    Raises:
      UserError: `source` is timm's name of a model that is not an MLP-Mixer.
    """
    refuse_other_models(source)
    lists = {size: name for name, size in LISTS.items()}
    if layout == "timm":
        origin = _timm_origin(str(source))
        if origin is None or num_classes not in lists:
            return Facts(_class_list(num_classes), _no_preprocessing)
        preprocess = _timm_preprocessing("bicubic", 0.875, (0.5, 0.5))
        if origin == "miil":
            preprocess = _timm_preprocessing("bilinear", 0.875, (0.0, 1.0))
        return Facts(lists[num_classes], preprocess, _timm_note(origin, num_classes))
    published = find(source)
    has_authors_name = _AUTHORS_FILE.fullmatch(redact(source))
    if (published or has_authors_name) and num_classes in (1000, 21843):
        note = "" if published else f"its name suggests the authors' {lists[num_classes]} weights"
        return Facts(lists[num_classes], _authors_preprocessing, note)
    return Facts(_class_list(num_classes), _no_preprocessing)


def timm_facts(fields: Mapping[str, Any], *, source: epath.PathLike, num_classes: int) -> Facts:
    """Returns the facts in timm's config.json (the Hugging Face layout) about its weights.

    Args:
      fields: the JSON object in config.json.
      source: the file or repository, for messages.
      num_classes: width of the head in the weights.

    Raises:
      UserError: the config is invalid, or is of another model.
    """
    inner = fields.get("pretrained_cfg", fields)  # early exports have only one level
    try:
        name = f"{fields.get('architecture', '')}.{inner.get('tag', '')}"
        mean, std = ({float(x) for x in inner[key]} for key in ("mean", "std"))
        crop_pct, interpolation = float(inner["crop_pct"]), inner["interpolation"]
        crop_mode = inner.get("crop_mode", "center")
        arguments = fields.get("model_args", {})
        image_size, activation = _timm_image_size(arguments, inner), arguments.get("act_layer")
        # The bounds are far wider than any of timm's values, and prevent infinite or huge sizes.
        bounded = all(abs(x) <= 1e3 for x in mean) and all(1e-3 <= x <= 1e3 for x in std)
        if not mean or not std or not bounded or not 0.01 <= crop_pct <= 1:
            raise ValueError(f"mean {mean}, std {std}, crop_pct {crop_pct}")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = repr(error)[:200]
        raise UserError(f"config.json of {source} is not a valid timm config: {reason}") from None
    refuse_other_models(name)
    gelu = "tanh" if _TIMM_TANH.match(name) else None
    if activation is not None:
        check_choice(f"config.json of {source}: act_layer", str(activation), _TIMM_GELUS)
        gelu = _TIMM_GELUS[activation]

    class_names = _timm_class_names(fields, inner, num_classes)
    note = _timm_note(_timm_origin(name), num_classes)
    if len(mean) > 1 or len(std) > 1:
        reason = f"a separate mean and std for each channel ({sorted(mean)}, {sorted(std)})"
    elif interpolation not in ("bilinear", "bicubic") or crop_mode not in ("center", "squash"):
        reason = f"{interpolation} interpolation with crop mode {crop_mode}"
    else:
        mean_std = mean.pop(), std.pop()
        preprocess = _timm_preprocessing(interpolation, crop_pct, mean_std, crop_mode)
        return Facts(class_names, preprocess, note, image_size, gelu)
    refused = f"config.json of {source} needs {reason}, which no preprocessing op supports"
    note = "; ".join(filter(None, (note, refused)))
    return Facts(class_names, _no_preprocessing, note, image_size, gelu)


def _timm_image_size(
    arguments: Mapping[str, Any], inner: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Returns (H, W) in timm's config.json; None if it has none.

    Raises:
      TypeError, ValueError: the size is neither a side in pixels nor a pair of sides.
    """
    size = arguments.get("img_size") or (inner.get("input_size") or ())[1:]
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if not all(type(side) is int and 0 < side < 2**31 for side in (height, width)):
        raise ValueError(f"image size {size}")
    return height, width


def refuse_other_models(source: epath.PathLike) -> None:
    """Raises UserError if a path or URL names a model of timm that is not an MLP-Mixer."""
    names = list(_TIMM_MODEL.finditer(str(source)))
    if names and names[-1]["kind"] in _OTHER_MODELS:
        name = names[-1][0].removesuffix(".safetensors").removesuffix(".")
        raise UserError(
            f"{name} is a {_OTHER_MODELS[names[-1]['kind']]}, not an MLP-Mixer; expected a timm "
            "model named mixer_*"
        )


def _timm_origin(source: str) -> str | None:
    """Returns who trained the timm weights with this name: "goog", "miil", or None for others.

    The tags in timm 1.0: goog_in21k, goog_in21k_ft_in1k (B/16, L/16), miil_in21k,
    miil_in21k_ft_in1k (B/16). Before tags the authors' files were jx_mixer_*.
    """
    names = [match[0] for match in _TIMM_MODEL.finditer(source)]
    if not names:
        return None
    # A name that continues after the tag was made by someone else.
    tag = re.search(r"[._](goog|miil)(_in21k(_ft_in1k)?)?$", names[-1].removesuffix(".safetensors"))
    return "goog" if names[-1].startswith("jx_") else tag and tag[1]


def _timm_note(origin: str | None, num_classes: int) -> str:
    if origin != "goog":
        return ""
    return f"{_NOT_21K}; {_TANH}" if num_classes == 1000 else _TANH


def _timm_class_names(
    fields: Mapping[str, Any], inner: Mapping[str, Any], num_classes: int
) -> str | tuple[str, ...] | None:
    """Returns the class names in timm's config.json, or the list that its tag implies."""
    names = fields.get("label_names") or inner.get("label_names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if is_list and len(names) == num_classes:
        lists = [name for name, size in LISTS.items() if size == num_classes]
        return next((name for name in lists if synsets(name) == tuple(names)), tuple(names))
    if num_classes == 1000 and str(inner.get("tag", "")).endswith("in1k"):
        return "imagenet1k"
    return _class_list(num_classes)


def _class_list(num_classes: int) -> str | None:
    """Returns the class list with this many classes; None for 1,000, which several lists have."""
    return {21843: "imagenet21k", 11221: "imagenet21k_miil"}.get(num_classes)


def _no_preprocessing(image_size: tuple[int, int]) -> None:
    return None


def _authors_preprocessing(image_size: tuple[int, int]) -> str | None:
    """Resizes the short side to 8/7 of the image size (area), then crops the centre.

    This is the evaluation preprocessing in big_vision's configs, with its truncation of values.
    """
    height, width = image_size
    if height != width:
        return None
    resize = f"resize_small({height * 8 // 7}, method='area', published=True)"
    return f"decode|{resize}|central_crop({height})"


def _timm_preprocessing(
    interpolation: str,
    crop_pct: float,
    mean_std: tuple[float, float],
    crop_mode: str = "center",
) -> Callable[[tuple[int, int]], str | None]:
    """Returns timm's evaluation preprocessing: resize to size / crop_pct like Pillow, then crop.

    `crop_mode` "center" resizes the short side, and "squash" both sides.
    """
    mean, std = mean_std
    low, high = (int(x) if x == int(x) else x for x in (-mean / std, (1 - mean) / std))
    ending = "" if (low, high) == (-1, 1) else f"|value_range({low}, {high})"

    def preprocess(image_size: tuple[int, int]) -> str | None:
        height, width = image_size
        if crop_mode == "squash" and crop_pct == 1:
            side = height if height == width else image_size
            resize, crop = f"resize({side}", ""
        elif height != width:
            return None
        else:
            resize = "resize_small" if crop_mode == "center" else "resize"
            resize += f"({math.floor(height / crop_pct)}"
            crop = f"|central_crop({height})"
        return (
            f"decode(dct='accurate')|{resize}, method='{interpolation}', antialias=True)"
            f"{crop}{ending}"
        )

    return preprocess

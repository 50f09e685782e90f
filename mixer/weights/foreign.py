"""Weights of other programs in forms that are not read here, and how to convert them.

They are recognised by the names of files and folders; none is opened.
"""

import itertools
import json
import os
import re
import shlex

from etils import epath

ENDINGS = (".npz", ".safetensors")  # of the files that are read
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".th")
_MOST_NAMES = 10_000  # of a folder that are looked at

_BIG_VISION = re.compile(r"checkpoint\.bv(-LAST|-\d+(-tmp)?)?")
_FLAX = re.compile(r"checkpoint_\d+")


def advice(path: epath.PathLike) -> str:
    """Returns a line on another program's weights at `path`, with a conversion; "" if none."""
    path = epath.Path(path)
    if is_pickled(path.name):
        return f"{path} {pickle_advice(path.name)}"
    names = [path.name, *_names_in(path)]
    if any(map(_BIG_VISION.fullmatch, names)) or any(name.startswith("params~") for name in names):
        place = path
        if not _BIG_VISION.fullmatch(path.name) and "checkpoint.bv-LAST" in names:
            place = path / "checkpoint.bv"  # of the newest step
        elif steps := sorted(name for name in names[1:] if _BIG_VISION.fullmatch(name)):
            place = path / steps[-1]
        elif path.name == "checkpoint.bv-LAST":
            place = path.with_name("checkpoint.bv")
        return f"{path} is a checkpoint of big_vision; in its environment " + _command(
            # Its load_params wants a path with a slash.
            f"import numpy, big_vision.utils as u; numpy.savez({_quoted(place.name)}, **dict("
            f"u.tree_flatten_with_names(u.load_params({_quoted(_absolute(place))}))[0]))",
            f"{place.name}.npz",
        )
    if any(map(_FLAX.fullmatch, names)):
        name = max(filter(_FLAX.fullmatch, names), key=lambda name: (len(name), name))
        return f"{path} is a checkpoint of flax, as vision_transformer writes it; " + _command(
            "import flax, numpy; from flax.training.checkpoints import restore_checkpoint; "
            f"numpy.savez({_quoted(name)}, **flax.traverse_util.flatten_dict("
            f'restore_checkpoint({_quoted(_absolute(path))}, None)["0"], sep="/"))',
            f"{name}.npz",
        )
    files = [name for name in names[1:] if name.endswith(ENDINGS)]
    if files:
        return f"no checkpoint in {path}, but files; give the file itself: {path / min(files)}"
    if pickled := [name for name in names[1:] if is_pickled(name)]:
        return f"{path / min(pickled)} {pickle_advice(min(pickled))}"
    return ""


def is_pickled(name: str) -> bool:
    """Whether a file's name is that of a PyTorch file or of another pickled one."""
    return name.lower().endswith(PICKLED)


def pickle_advice(name: str) -> str:
    """Returns the line that says what a pickled file is, and makes a file of its tensors."""
    out = re.sub(f"({'|'.join(map(re.escape, PICKLED))})+$", "", name, flags=re.IGNORECASE)
    # load_state_dict takes the weights out of a training program's checkpoint, an average first.
    # Tensors that share memory cannot be saved as they are.
    return (
        "is a pickled file, which can run code, and is not opened; if its origin is trusted, "
        "with PyTorch and timm "
    ) + _command(
        "import safetensors.torch, timm.models, torch; "
        f"weights = timm.models.load_state_dict({_quoted(name)}); "
        "safetensors.torch.save_file({name: value.clone().contiguous() "
        "for name, value in weights.items() if torch.is_tensor(value)}, "
        f"{_quoted(out + '.safetensors')})",
        f"{out}.safetensors",
    )


def _command(code: str, out: str) -> str:
    return f"`python -c {shlex.quote(code)}` makes {out} of it"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _absolute(path: epath.Path) -> str:
    return str(path) if "://" in str(path) else os.path.abspath(path)


def _names_in(path: epath.Path) -> list[str]:
    if not path.is_dir():
        return []
    return [child.name for child in itertools.islice(path.iterdir(), _MOST_NAMES)]

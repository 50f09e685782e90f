"""Recognises unsupported weight formats of other programs, and explains how to convert them.

Only the names of files and folders are examined; no file is opened.
"""

import itertools
import json
import os
import re
import shlex

from etils import epath

ENDINGS = (".npz", ".safetensors")  # supported formats
INDEX_ENDING = ".safetensors.index.json"  # of the index of a sharded safetensors file
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".th")
_MAX_NAMES = 10_000  # names that are examined in a folder

_BIG_VISION = re.compile(r"checkpoint\.bv(-LAST|-\d+(-tmp)?)?")
_FLAX = re.compile(r"checkpoint_\d+")


def advice(path: epath.PathLike) -> str:
    """Returns a line that names another program's format at `path` and a conversion; else ""."""
    path = epath.Path(path)
    if line := file_advice(path.name):
        return f"{path} {line}"
    names = [path.name, *_names_in(path)]
    if any(map(_BIG_VISION.fullmatch, names)) or any(name.startswith("params~") for name in names):
        place = path
        if not _BIG_VISION.fullmatch(path.name) and "checkpoint.bv-LAST" in names:
            place = path / "checkpoint.bv"  # of the newest step
        elif steps := sorted(name for name in names[1:] if _BIG_VISION.fullmatch(name)):
            place = path / steps[-1]
        elif path.name == "checkpoint.bv-LAST":
            place = path.with_name("checkpoint.bv")
        return f"{path} is a big_vision checkpoint; in big_vision's environment, " + _command(
            # big_vision's load_params needs a path with a slash.
            f"import numpy, big_vision.utils as u; numpy.savez({_quoted(place.name)}, **dict("
            f"u.tree_flatten_with_names(u.load_params({_quoted(_absolute(place))}))[0]))",
            f"{place.name}.npz",
        )
    if any(map(_FLAX.fullmatch, names)):
        name = max(filter(_FLAX.fullmatch, names), key=lambda name: (len(name), name))
        return f"{path} is a Flax checkpoint, as vision_transformer writes it; " + _command(
            "import flax, numpy; from flax.training.checkpoints import restore_checkpoint; "
            f"numpy.savez({_quoted(name)}, **flax.traverse_util.flatten_dict("
            f'restore_checkpoint({_quoted(_absolute(path))}, None)["0"], sep="/"))',
            f"{name}.npz",
        )
    files = [name for name in names[1:] if name.endswith(ENDINGS)]
    if files:
        return f"no checkpoint in {path}; pass a file in it instead: {path / min(files)}"
    for name in sorted(names[1:]):
        if line := file_advice(name):
            return f"{path / name} {line}"
    return ""


def file_advice(name: str) -> str:
    """Returns what a file of another program is, and a conversion; "" if its name is unknown."""
    if is_pickled(name):
        return pickle_advice(name)
    if name.lower().endswith(".msgpack"):
        out = name[: -len(".msgpack")]
        return "is a Flax msgpack file; " + _command(
            "import flax, numpy; from flax.serialization import msgpack_restore; "
            f"numpy.savez({_quoted(out)}, **flax.traverse_util.flatten_dict("
            f'msgpack_restore(open({_quoted(name)}, "rb").read()), sep="/"))',
            f"{out}.npz",
        )
    return ""


def is_pickled(name: str) -> bool:
    """Returns whether a file's name is that of a PyTorch checkpoint or another pickled file."""
    return name.lower().endswith(PICKLED)


def pickle_advice(name: str) -> str:
    """Returns why a pickled file is not opened, and a command that converts it to safetensors."""
    out = re.sub(f"({'|'.join(map(re.escape, PICKLED))})+$", "", name, flags=re.IGNORECASE)
    if out == "pytorch_model":  # as files in a Hub folder are named
        out = "model"
    # timm's load_state_dict extracts the weights from a training checkpoint, and prefers an EMA.
    # Tensors that share memory must be cloned before they can be saved.
    return (
        "is a pickled file, which is not opened because it can run code; if you trust its source, "
        "with PyTorch and timm installed, "
    ) + _command(
        "import safetensors.torch, timm.models, torch; "
        f"weights = timm.models.load_state_dict({_quoted(name)}); "
        "safetensors.torch.save_file({name: value.clone().contiguous() "
        "for name, value in weights.items() if torch.is_tensor(value)}, "
        f"{_quoted(out + '.safetensors')})",
        f"{out}.safetensors",
    )


def _command(code: str, out: str) -> str:
    return f"`python -c {shlex.quote(code)}` converts it to {out}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _absolute(path: epath.Path) -> str:
    return str(path) if "://" in str(path) else os.path.abspath(path)


def _names_in(path: epath.Path) -> list[str]:
    if not path.is_dir():
        return []
    return [child.name for child in itertools.islice(path.iterdir(), _MAX_NAMES)]

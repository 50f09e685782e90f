"""Weights in the published npz layout: arrays by their names, such as "head/kernel"."""

import zipfile
import zlib
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from mixer.errors import UserError


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file by name. Nothing is unpickled.

    Raises:
      UserError: no such file, or none that NumPy can read without unpickling.
    """
    try:
        with (
            epath.Path(path).expanduser().open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, AttributeError) as error:  # text, objects, one bare array
        raise UserError(f"{path} is no npz file of arrays: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is no npz file of arrays: {error}") from None


def fit(arrays: dict[str, np.ndarray], like: Any, source: epath.PathLike) -> Any:
    """Arranges `arrays` as the tree `like` and places them as its leaves are.

    Args:
      arrays: by name.
      like: parameters, or their shapes, dtypes and shardings.
      source: where the arrays are from, for messages.

    Raises:
      UserError: a name is missing or too many, a shape differs, or a value is not finite.
    """
    wanted = traverse_util.flatten_dict(like, sep="/")
    faults = [f"{name}: missing" for name in wanted.keys() - arrays.keys()]
    faults += [f"{name}: not in the model" for name in arrays.keys() - wanted.keys()]
    for name in wanted.keys() & arrays.keys():
        if arrays[name].shape != wanted[name].shape:
            faults.append(f"{name}: in the file {arrays[name].shape}, wanted {wanted[name].shape}")
        elif not np.issubdtype(arrays[name].dtype, np.floating):
            faults.append(f"{name}: its dtype is {arrays[name].dtype}, and no float")
        elif not np.isfinite(arrays[name]).all():
            faults.append(f"{name}: holds NaN or infinity")
    if faults and all("/token_mixing/Dense_" in fault for fault in faults):
        name = "MixerBlock_0/token_mixing/Dense_0/kernel"
        raise UserError(
            f"{source} is for images of {arrays[name].shape[0]} patches, and the model has "
            f"{wanted[name].shape[0]}: image_size has to be that of the weights"
        )
    if faults:
        raise UserError(f"{source} does not fit the model: {'; '.join(sorted(faults))}")
    placed = {
        name: jax.device_put(arrays[name].astype(leaf.dtype), leaf.sharding)
        for name, leaf in wanted.items()
    }
    return traverse_util.unflatten_dict(placed, sep="/")

"""The first weights of a run: another run's, or a file's."""

from typing import Any

import jax
from etils import epath

from mixer import checkpoint, weights


def initial_params(path: epath.PathLike, params: Any, *, head: str) -> tuple[Any, str]:
    """Replaces freshly initialised parameters by saved ones.

    Args:
      path: an npz file of the published layout, a run, or a step of a run; of one that keeps a
        moving average, the average.
      params: the new model's parameters, where they belong on the mesh.
      head: "keep": the saved head has to fit; "reset": the new one stays; "auto": it stays if the
        saved one has another number of classes.

    Returns:
      The parameters, and what was done: "head kept" or "head reset", and whether it is an average.

    Raises:
      UserError: nothing there, or weights that do not fit; every misfit is listed.
    """
    arrays = weights.read_npz(path) if str(path).endswith(".npz") else None
    item = "params"
    if arrays is not None:
        shapes = {name: array.shape for name, array in arrays.items()}
    else:
        step = checkpoint.find_step(path)
        if shapes := checkpoint.saved_params(step, "ema_params"):
            item = "ema_params"
        else:
            shapes = checkpoint.saved_params(step)
    fits = shapes.get("head/kernel") == params["head"]["kernel"].shape
    reset = head == "reset" or (head == "auto" and not fits)
    wanted = {name: value for name, value in params.items() if name != "head" or not reset}
    if arrays is not None:
        if reset:
            arrays = {k: v for k, v in arrays.items() if not k.startswith("head/")}
        found = weights.fit(arrays, wanted, path)
    else:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        without = "head" if reset else ""
        found = checkpoint.restore_params(path, abstract, item=item, without=without)
    how = f"head {'reset' if reset else 'kept'}"
    return {**params, **found}, how + (", moving average" if item == "ema_params" else "")

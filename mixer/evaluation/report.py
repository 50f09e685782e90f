"""Evaluates a run as `evaluate.py` does: a table on the terminal, `results.json` in the run."""

from collections.abc import Sequence

from etils import epath
from rich.console import Console
from rich.table import Table

from mixer import checkpoint, losses, run, sharding
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.train_state import abstract_params
from mixer.train_step import make_predict


def evaluate_run(
    workdir: str,
    *,
    checkpoint_name: str,
    splits: Sequence[str],
    data_dir: str | None = None,
    label_file: str | None = None,
) -> None:
    """Evaluates the weights of a run on `splits` ("train", "val", "test") of its config.

    A run that keeps a moving average of its parameters has a second row for each split, "val_ema".

    Args:
      workdir: the run.
      checkpoint_name: "last", "best" or a step's number.
      splits: those that the config does not name are left out.
      data_dir: where the data is now, None where it was in training.
      label_file: likewise of the file of labels.

    Raises:
      UserError: no such run or checkpoint, or data that is not there or not the run's.
    """
    config, class_names = run.read_run(workdir)
    if data_dir is not None:
        config.dataset.data_dir = data_dir
    if label_file is not None:
        config.dataset.label_file = label_file
    directory = _checkpoint(epath.Path(workdir), checkpoint_name)
    mesh = sharding.make_mesh(config.mesh)
    batch_size = config.eval_batch_size or config.global_batch_size
    sharding.check_batch_size("eval_batch_size", batch_size, mesh)
    opened = {which: run.open_split(config, which, class_names) for which in splits}
    opened = {which: split for which, split in opened.items() if split is not None}
    if not opened:
        raise UserError(f"the config of {workdir} names no split {' or '.join(splits)}")
    model = run.build_model(config)
    abstract = abstract_params(model, (config.image_size, config.image_size), mesh)
    items = {"": "params"}
    if config.optimizer.ema_decay:
        items["_ema"] = "ema_params"
    loss_fn = losses.make_loss(config.loss)
    eval_step = classification.make_eval_step(make_predict(model), loss_fn, model.num_classes)

    table = Table("split", "images", "top-1", "top-5", "loss", title=str(directory))
    for suffix, item in items.items():
        params = checkpoint.restore_params(directory, abstract, item=item)
        for which, split in opened.items():
            result = classification.evaluate(
                eval_step,
                params,
                split,
                global_batch_size=batch_size,
                mesh=mesh,
                prefetch_batches=config.dataset.prefetch_batches,
            )
            name = which + suffix
            path = run.record_result(
                workdir, checkpoint_name, int(directory.name), name, result.summary()
            )
            table.add_row(
                f"{name} ({split.name})",
                f"{result.count:,}",
                f"{result.top1:.2%}",
                f"{result.top5:.2%}",
                f"{result.loss:.4f}",
            )
    console = Console()
    console.print(table)
    console.print(f"written to {path}", highlight=False, soft_wrap=True)


def _checkpoint(workdir: epath.Path, name: str) -> epath.Path:
    if name == "last":
        return checkpoint.find_step(workdir)
    if name == "best":
        return checkpoint.find_step(workdir / "best")
    for directory in (workdir / "checkpoints" / name, workdir / "best" / name):
        if name.isdigit() and directory.is_dir():
            return directory
    raise UserError(f"--checkpoint={name}: {workdir} has no such step; last, best or a number")

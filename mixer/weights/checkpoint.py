"""Writes a run's checkpoints asynchronously, and verifies them when it restores them.

Layout: `RUN/checkpoints/<step>/{state,info}` and `RUN/best/<step>/...`. `state` is the train state;
`info` is a JSON file with its checksums, the library versions and the commit. Damaged checkpoints
are moved to `RUN/damaged/`. All code that reads or writes train states uses this module.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from mixer import files, run_files
from mixer.errors import UserError
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.training.state import TrainState, fingerprint
from mixer.weights import checkpoint_errors, foreign
from mixer.weights.arrays import misfits
from mixer.weights.checkpoint_errors import CheckpointError, DamagedError, check_name
from mixer.weights.versions import versions

TIMES = "_CHECKPOINT_METADATA"  # Orbax's file with the time stamps of a checkpoint
STEP = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint's directory


class Checkpoints:
    """The checkpoints in one directory, by step."""

    def __init__(
        self, directory: epath.PathLike, *, keep_last: int, keep_every_steps: int | None = None
    ):
        check_name(directory, writes=True)
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every_steps))
        self.directory = epath.Path(directory)
        if str(directory).startswith("gs://"):
            try:
                from google.cloud import storage  # noqa: F401 (Orbax uses it to get the bucket's type)
            except ImportError:
                raise UserError(
                    f"{directory}: runs on gs:// need `pip install -e .[gcs]` "
                    "(google-cloud-storage)"
                ) from None
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            # With asynchronous creation, a directory that cannot be created makes threads wait for
            # five minutes, even at exit.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = self._open()
        self._identity = None  # an object store has no directories
        if "://" not in str(self.directory):
            self._identity = files.identity(self.directory)
        versions()  # cached now, because the source files may change during a long run

    def _open(self) -> ocp.CheckpointManager:
        handlers = {
            "state": checkpoint_errors.reporting_handler(),
            "info": ocp.JsonCheckpointHandler(),
        }
        with checkpoint_errors.quiet():
            make = functools.partial(
                ocp.CheckpointManager,
                checkpoint_errors.absolute(self.directory),
                options=self._options,
                item_handlers=handlers,
            )
            try:
                try:
                    return make()
                except checkpoint_errors.DAMAGE_ERRORS:
                    # Orbax raises if its file of time stamps is damaged. Nothing needs that file.
                    for step in saved_steps(self.directory):
                        (self.directory / str(step) / TIMES).unlink(missing_ok=True)
                    return make()
            except OSError as error:
                reason = f"{error.strerror or error}: {error.filename or self.directory}"
                raise CheckpointError(f"{self.directory} cannot be opened: {reason}") from error

    def __enter__(self) -> "Checkpoints":
        self._quiet = checkpoint_errors.quiet()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Waits for pending writes and stops the manager's threads."""
        # If an exception is being raised, it is the one to report. With several processes, do not
        # wait here, because the other processes wait for this one.
        try:
            if kind and jax.process_count() > 1:
                return
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
                self._manager.close()
            if kind:
                checkpoint_errors.join_writers()
        finally:
            self._quiet.__exit__(None, None, None)

    @property
    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, value: dict[str, float] | None = None) -> None:
        """Starts to write `state` under its step; returns once device memory has been copied.

        Args:
          state: train state to save.
          value: the metric that selected this checkpoint, by name; saved in its `info`.

        Raises:
          CheckpointError: the state holds NaN or infinity, or an earlier write has failed.
        """
        step = int(state.step)
        self.check()
        if step in self._manager.all_steps():
            return  # the seed and the step determine the state, so it is already saved
        sums, is_finite = checksums(state)
        if not is_finite:
            raise CheckpointError(
                f"step {step}: parameters or optimizer state hold NaN or infinity; nothing was "
                f"saved. Last good checkpoint: {self.describe_last()}. Try a lower "
                "optimizer.peak_lr or a longer schedule.warmup_steps, or set "
                "optimizer.grad_clip_norm"
            )
        info = {"step": step, "checksums": sums, "versions": versions()}
        if value is not None:
            info["value"] = value
        with self._reporting(step):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
                ),
            )
        if not saved:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} was not written")

    def describe_last(self) -> str:
        """Returns the path of the newest complete checkpoint, or "none"."""
        steps = saved_steps(self.directory)  # after a failed write Orbax omits some steps
        return str(self.directory / str(steps[-1])) if steps else "none"

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of all steps after `step`."""
        for later_step in self.steps:
            if later_step > step:
                self._manager.delete(later_step)

    def check(self) -> None:
        """Raises UserError if a background write failed, or the directory was removed."""
        if self._identity is not None:
            files.check_identity(self.directory, self._identity)
        with self._reporting(None):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until all writes are complete; raises CheckpointError if a write failed."""
        with self._reporting(None):
            self._manager.wait_until_finished()
        self.check()
        if self.steps and not (self.directory / str(self.steps[-1])).exists():
            raise CheckpointError(
                f"{self.directory / str(self.steps[-1])} is gone: it was removed during the run"
            )

    @contextlib.contextmanager
    def _reporting(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, UserError):
                raise
            place = "" if step is None else f" at step {step}"
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory}{place}: "
                f"{checkpoint_errors.root_cause(error)}; last complete checkpoint: "
                f"{self.describe_last()}"
            ) from error

    def restore_latest(
        self, abstract: TrainState, warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest undamaged checkpoint.

        A damaged checkpoint (missing or truncated files, changed bytes) is moved to `RUN/damaged/`
        with a warning, and the previous checkpoint is tried. Other read errors move nothing.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          warn: called with a line for each checkpoint that is moved aside.

        Returns:
          (state, info), or None if there is no checkpoint.

        Raises:
          CheckpointError: an undamaged checkpoint holds other names or shapes, or all checkpoints
            are damaged.
        """
        if not self.steps:
            return None
        for step in reversed(self.steps):
            restored = None
            reason = (
                f"checkpoint {self.directory / str(step)} is damaged, according to another process"
            )
            try:
                restored = self._restore(step, abstract)
            except DamagedError as error:
                reason = str(error)
            # Each process reads its own shards, so all processes have to agree on the step.
            if distributed.agree(restored is not None):
                return restored
            damaged_path = self._move_aside(step)
            warn(f"{reason}; moved to {damaged_path}; trying the previous checkpoint")
        raise CheckpointError(
            f"no checkpoint in {self.directory} could be read; all are now in "
            f"{damaged_path.parent}. The same command starts from step 0; a new run can set "
            "init_from to weights in best/"
        )

    def _move_aside(self, step: int) -> epath.Path:
        """Moves a damaged checkpoint away, so that the run can save that step again."""
        self._manager.close()
        names = (f"{step}-{number}" for number in itertools.count(1))
        damaged_path = next(
            path
            for path in (self.directory.parent / "damaged" / name for name in names)
            if not path.exists()
        )
        distributed.barrier("choice of a directory for a damaged checkpoint")
        if distributed.is_main():
            try:
                damaged_path.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(damaged_path)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} is damaged and cannot be moved to "
                    f"{damaged_path}: {error.strerror or error}"
                ) from None
        distributed.barrier("removal of a damaged checkpoint")
        self._manager = self._open()
        return damaged_path

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        directory = self.directory / str(step)
        with checkpoint_errors.reading(directory):
            saved = saved_leaves(directory)
        # The count of skipped updates starts at zero if the checkpoint has none, and is dropped if
        # the run no longer counts.
        adds_count = abstract.skipped is not None and "skipped" not in saved
        expected = abstract.replace(skipped=None) if adds_count else abstract
        if expected.skipped is None:
            saved.pop("skipped", None)
        check_tree(expected, {name: leaf.shape for name, leaf in saved.items()}, directory)
        # Read the saved dtypes, which the checksums refer to, and convert afterwards.
        saved_state = jax.tree.unflatten(
            jax.tree.structure(expected),
            [
                jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
                for name, leaf in sharding.by_name(expected).items()
            ],
        )
        item = {name: value for name, value in vars(saved_state).items() if value is not None}
        with checkpoint_errors.reading(directory), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                checkpoint_errors.absolute(directory) / "state",
                ocp.args.PyTreeRestore(
                    item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,  # older checkpoints may lack or add empty subtrees
                ),
            )
        state, info = expected.replace(**tree), read_info(directory)
        _verify(state, info, directory)
        if int(state.step) != step:
            raise DamagedError(
                f"checkpoint {directory} is damaged: its state has step {int(state.step)}"
            )
        state = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), state, expected)
        if adds_count:
            state = state.replace(skipped=jnp.zeros_like(state.step))
        return state, info


def checksums(tree: Any) -> tuple[dict[str, list[int]], bool]:
    """Returns the checksum of each leaf by its path, and whether all floats are finite."""
    results = jax.device_get({name: fingerprint(x) for name, x in sharding.by_name(tree).items()})
    sums = {name: sums.tolist() for name, (sums, _) in results.items()}
    return sums, all(finite for _, finite in results.values())


def _verify(tree: Any, info: dict[str, Any], directory: epath.Path, prefix: str = "") -> None:
    sums, _ = checksums(tree)
    wrong_names = [
        name for name, value in sums.items() if info["checksums"].get(prefix + name) != value
    ]
    if wrong_names:
        raise DamagedError(
            f"checkpoint {directory} is damaged: {len(wrong_names)} array(s) do not match their "
            f"checksums; the first is {wrong_names[0]}"
        )


def saved_leaves(directory: epath.Path) -> dict[str, Any]:
    """Returns the shape and dtype of every saved leaf by its path, without reading the values."""
    # The handler, unlike Orbax's checkpointer, keeps the reason why the metadata cannot be read.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        tree = handler.metadata(checkpoint_errors.absolute(directory) / "state").tree
    return sharding.by_name(tree)


def check_tree(expected: Any, saved: dict[str, tuple[int, ...]], source: epath.PathLike) -> None:
    """Raises CheckpointError with a list of every missing, extra and mis-shaped leaf."""
    shapes = {name: tuple(leaf.shape) for name, leaf in sharding.by_name(expected).items()}
    if faults := misfits(saved, shapes):
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(faults)}")


def find_named(workdir: epath.PathLike, name: str) -> epath.Path:
    """Returns the directory of a run's "last" or "best" checkpoint, or of step number `name`.

    Raises:
      UserError: the run has no such checkpoint.
    """
    workdir = epath.Path(workdir)
    if name in ("last", "best"):
        return find_step(workdir / "best" if name == "best" else workdir)
    for directory in (workdir / "checkpoints" / name, workdir / "best" / name):
        if STEP.fullmatch(name) and directory.is_dir():
            return directory
    raise UserError(
        f"--checkpoint={name}: no such checkpoint in {workdir}; expected 'last', 'best' or the "
        "number of a saved step"
    )


def find_step(path: epath.PathLike) -> epath.Path:
    """Returns a checkpoint's directory: `path` itself, or the newest checkpoint of the run `path`.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    path = epath.Path(path).expanduser()
    if (path / "state").is_dir() and not (path / "checkpoints").is_dir():
        return path
    for directory in (path / "checkpoints", path):
        if steps := saved_steps(directory):
            return directory / str(steps[-1])
    raise CheckpointError(
        foreign.advice(path)
        or f"no checkpoint in {path}; expected a run (RUN) or one of its checkpoints "
        "(RUN/checkpoints/STEP, RUN/best/STEP)"
    )


def saved_steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a directory, in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        # In an object store an unfinished checkpoint already has its final name.
        if STEP.fullmatch(path.name) and path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
    )


def last_step(workdir: epath.PathLike) -> int | None:
    """Returns the step of a run's newest checkpoint; None if the run has no checkpoint."""
    return max(saved_steps(epath.Path(workdir) / "checkpoints"), default=None)


def restore_params(
    path: epath.PathLike, abstract_params: Any, *, item: str = "params", skip: str = ""
) -> Any:
    """Restores only the parameters, with the placement of `abstract_params`.

    Args:
      path: a run or a checkpoint, as in `find_step`.
      abstract_params: shapes, dtypes and shardings of the parameters.
      item: "params", or "ema_params" for their moving average.
      skip: a subtree that is not read, such as "head"; `abstract_params` must not contain it.

    Raises:
      CheckpointError: there is no checkpoint, it is of another model, or it is damaged.
    """
    directory = find_step(path)
    saved = saved_params(directory, item)
    if skip:
        saved = {k: v for k, v in saved.items() if not k.startswith(f"{skip}/")}
    check_tree(abstract_params, saved, directory)
    with (
        checkpoint_errors.reading(directory),
        checkpoint_errors.quiet(),
        ocp.PyTreeCheckpointer() as checkpointer,
    ):
        tree = checkpointer.restore(
            checkpoint_errors.absolute(directory) / "state",
            ocp.args.PyTreeRestore(
                {item: abstract_params},
                restore_args={item: ocp.checkpoint_utils.construct_restore_args(abstract_params)},
                partial_restore=True,
            ),
        )
    _verify(tree[item], read_info(directory), directory, f"{item}/")
    return tree[item]


def saved_params(directory: epath.Path, item: str = "params") -> dict[str, tuple[int, ...]]:
    """Returns the shape of every saved parameter by name; raises CheckpointError if damaged."""
    prefix = f"{item}/"
    with checkpoint_errors.reading(directory), checkpoint_errors.quiet():
        saved = saved_leaves(directory)
    return {
        name.removeprefix(prefix): tuple(leaf.shape)
        for name, leaf in saved.items()
        if name.startswith(prefix)
    }


def read_info(directory: epath.Path) -> dict[str, Any]:
    """Returns the `info` JSON of a checkpoint; raises DamagedError if it is damaged."""
    try:
        return run_files.read_info(directory)
    except UserError as error:
        if error.__cause__ is not None and checkpoint_errors.is_machine_error(error.__cause__):
            raise
        raise DamagedError(f"checkpoint {directory} is damaged: {error}") from None

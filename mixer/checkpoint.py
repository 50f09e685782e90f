"""Checkpoints of a run: written asynchronously, verified when read, damaged ones moved aside.

Layout: `RUN/checkpoints/<step>/{state,info}` and `RUN/best/<step>/...`; `state` is the train state,
`info` a JSON with its checksums, the versions of the libraries and the commit. All reading and
writing of train states goes through this module.
"""

import contextlib
import fcntl
import functools
import gc
import importlib.metadata
import itertools
import logging as python_logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mixer import distributed, foreign
from mixer.errors import UserError
from mixer.train_state import TrainState, fingerprint

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


class CheckpointError(UserError):
    """A checkpoint could not be written or used."""


class Checkpoints:
    """The checkpoints in one directory, by step."""

    def __init__(
        self, directory: epath.PathLike, *, keep_last: int, keep_every_steps: int | None = None
    ):
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every_steps))
        self.directory = epath.Path(directory)
        if str(directory).startswith("gs://"):
            try:
                from google.cloud import storage  # noqa: F401 (Orbax asks it for the bucket's kind)
            except ImportError:
                raise UserError(
                    f"{directory}: runs on gs:// need `pip install -e .[gcs]` "
                    "(google-cloud-storage)"
                ) from None
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = self._open()
        versions()  # now: the files may change under a run that lasts

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"state": _telling_handler(), "info": ocp.JsonCheckpointHandler()}
        with _quiet():
            return ocp.CheckpointManager(
                _absolute(self.directory), options=self._options, item_handlers=handlers
            )

    def __enter__(self) -> "Checkpoints":
        self._quiet = _quiet()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Waits for writes and ends the manager's threads."""
        # When an exception is on its way, that one is the reason to be told; and with several
        # processes before anything that waits for the others, who wait for this one.
        try:
            if kind and jax.process_count() > 1:
                return
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
                self._manager.close()
        finally:
            self._quiet.__exit__(None, None, None)

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Starts writing `state` under its step; returns once the device's memory is copied.

        Raises:
          CheckpointError: the state is not finite, or an earlier write has failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return  # the same bits: they are a function of the seed and the step
        self.check()
        sums, finite = checksums(state)
        if not finite:
            raise CheckpointError(
                f"step {step}: parameters or optimizer state hold NaN or infinity; nothing was "
                f"saved. Last good checkpoint: {self.describe_last()}. Try a lower "
                "optimizer.peak_lr, a longer schedule.warmup_steps or optimizer.grad_clip_norm"
            )
        info = {"step": step, "checksums": sums, "versions": versions()}
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
        """Path of the newest whole checkpoint, or "none"."""
        return str(self.directory / str(self.steps[-1])) if self.steps else "none"

    def delete_after(self, step: int) -> None:
        """Deletes checkpoints of steps beyond `step`."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def check(self) -> None:
        """Raises CheckpointError if a write in the background has failed."""
        with self._reporting(None):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns once all writes are whole, or raises CheckpointError."""
        with self._reporting(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _reporting(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, UserError):
                raise
            what = "" if step is None else f" at step {step}"
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory}{what}: {_reason(error)}; "
                f"the last whole one is {self.describe_last()}"
            ) from error

    def restore_latest(
        self, abstract: TrainState, warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole.

        A damaged one (missing or truncated files, changed bytes) is moved to
        `RUN/damaged/`, with a warning, and the one before is tried.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          warn: called with a line for each checkpoint that is moved aside.

        Returns:
          (state, info), or None where there is no checkpoint.

        Raises:
          CheckpointError: a whole checkpoint holds a state of other names or shapes, or all were
            damaged.
        """
        if not self.steps:
            return None
        for step in reversed(self.steps):
            restored, reason = None, "as another process finds"
            try:
                restored = self._restore(step, abstract)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # whatever Orbax makes of the damage
                if _is_of_the_machine(error):
                    raise
                reason = _reason(error)
            # Each process reads its own part of the arrays; all go back, or none.
            if distributed.agree(restored is not None):
                return restored
            aside = self._move_aside(step)
            warn(
                f"checkpoint {self.directory / str(step)} is damaged ({reason}); moved to {aside}, "
                "going back to the one before"
            )
        raise CheckpointError(
            f"none of the checkpoints in {self.directory} can be read; they are in {aside.parent}. "
            "The same command now starts from step 0; weights in best/ can be a new run's init_from"
        )

    def _move_aside(self, step: int) -> epath.Path:
        """Renames a damaged step, so that the run can save that step again."""
        self._manager.close()
        names = (f"{step}-{number}" for number in itertools.count(1))
        aside = next(
            path
            for path in (self.directory.parent / "damaged" / name for name in names)
            if not path.exists()
        )
        distributed.barrier("choice of a directory for a damaged checkpoint")
        if distributed.is_main():
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        distributed.barrier("removal of a damaged checkpoint")
        self._manager = self._open()
        return aside

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        directory = self.directory / str(step)
        saved = saved_leaves(directory)
        # A run that begins to leave updates out counts from here on; one that ends it forgets.
        begins = abstract.skipped is not None and "skipped" not in saved
        wanted = abstract.replace(skipped=None) if begins else abstract
        if wanted.skipped is None:
            saved.pop("skipped", None)
        check_tree(wanted, {name: leaf.shape for name, leaf in saved.items()}, directory)
        # Read as it was saved, which the checksums are of, and turned then.
        as_saved = jax.tree.unflatten(
            jax.tree.structure(wanted),
            [
                jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
                for name, leaf in zip(_paths(wanted), jax.tree.leaves(wanted), strict=True)
            ],
        )
        item = {name: value for name, value in vars(as_saved).items() if value is not None}
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                _absolute(directory) / "state",
                ocp.args.PyTreeRestore(
                    item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,  # of checkpoints with and without the empty parts
                ),
            )
        state, info = wanted.replace(**tree), read_info(directory)
        _verify(state, info)
        if int(state.step) != step:
            raise ValueError(f"its state is of step {int(state.step)}")
        state = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), state, wanted)
        if begins:
            state = state.replace(skipped=jnp.zeros_like(state.step))
        return state, info


def _telling_handler() -> ocp.StandardCheckpointHandler:
    """Writes states; a write that fails in the background on one of several processes ends all.

    In Orbax each would wait for the others to be done, for minutes, and the reason would be lost.
    """
    handler = ocp.StandardCheckpointHandler()
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[_Write]:
        return [_Write(each) for each in await save(*args, **kwargs) or ()]

    handler.async_save = async_save
    return handler


class _Write:
    """One of Orbax's futures, which tells its fault before it raises it."""

    def __init__(self, written: Any):
        self._written = written

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the write."""
        try:
            return self._written.result(timeout)
        except Exception as error:
            fault = f"a checkpoint could not be written: {_reason(error)}"
            distributed.abort(CheckpointError(fault))
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax's threads print about a failure beside the error that they raise.

    One bad file, or a full disk, makes every array under way fail, each with a traceback of its
    own. What the main thread raises leaves this context first, and is shown.
    """
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    level, asyncio_logger = logging.get_verbosity(), python_logging.getLogger("asyncio")
    was_disabled = asyncio_logger.disabled
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
        logging.set_verbosity(logging.FATAL)
        asyncio_logger.disabled = True
        try:
            yield
        finally:
            gc.collect()  # what failed, or was never begun, is told of when it is collected
            asyncio_logger.disabled = was_disabled
            sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
            logging.set_verbosity(level)


def checksums(tree: Any) -> tuple[dict[str, list[int]], bool]:
    """Checksum of each leaf by its path, and whether every float is finite."""
    results = jax.device_get([fingerprint(leaf) for leaf in jax.tree.leaves(tree)])
    sums = [sums.tolist() for sums, _ in results]
    return dict(zip(_paths(tree), sums, strict=True)), all(finite for _, finite in results)


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes no relative paths."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _paths(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _verify(tree: Any, info: dict[str, Any], prefix: str = "") -> None:
    sums, _ = checksums(tree)
    wrong = [path for path, value in sums.items() if info["checksums"].get(prefix + path) != value]
    if wrong:
        raise ValueError(f"{len(wrong)} array(s) differ from their checksums, {wrong[0]} first")


def saved_leaves(directory: epath.Path) -> dict[str, Any]:
    """Shape and dtype of every saved leaf by its path, read without reading the leaves."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(_absolute(directory) / "state").item_metadata
    if metadata is None:
        raise ValueError("its list of arrays cannot be read")
    tree = metadata.tree
    return dict(zip(_paths(tree), jax.tree.leaves(tree), strict=True))


def check_tree(wanted: Any, saved: dict[str, tuple[int, ...]], source: epath.PathLike) -> None:
    """Raises CheckpointError that lists every missing, extra and mis-shaped leaf."""
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in zip(_paths(wanted), jax.tree.leaves(wanted), strict=True)
    }
    faults = [f"{path}: missing" for path in shapes.keys() - saved.keys()]
    faults += [f"{path}: not in the model" for path in saved.keys() - shapes.keys()]
    faults += [
        f"{path}: saved {saved[path]}, wanted {shapes[path]}"
        for path in shapes.keys() & saved.keys()
        if shapes[path] != saved[path]
    ]
    if faults:
        listed = "; ".join(sorted(faults))
        raise CheckpointError(f"{source} does not fit the model: {listed}")


def find_named(workdir: epath.PathLike, name: str) -> epath.Path:
    """Directory of a run's "last" or "best" checkpoint, or of the step whose number is `name`.

    Raises:
      UserError: the run has none such.
    """
    workdir = epath.Path(workdir)
    if name in ("last", "best"):
        return find_step(workdir / "best" if name == "best" else workdir)
    for directory in (workdir / "checkpoints" / name, workdir / "best" / name):
        if name.isdigit() and directory.is_dir():
            return directory
    raise UserError(f"--checkpoint={name}: {workdir} has no such step; last, best or a number")


def find_step(path: epath.PathLike) -> epath.Path:
    """Returns the checkpoint that `path` means: a step's directory, or the newest step of a run.

    Raises:
      CheckpointError: there is none.
    """
    path = epath.Path(path).expanduser()
    if (path / "state").is_dir():
        return path
    for directory in (path / "checkpoints", path):
        if directory.is_dir():
            steps = [
                int(step.name)
                for step in directory.iterdir()
                # In an object store an unfinished step has its name already.
                if step.name.isdigit() and ocp.utils.is_checkpoint_finalized(step)
            ]
            if steps:
                return directory / str(max(steps))
    raise CheckpointError(
        foreign.advice(path)
        or f"no checkpoint in {path}; give a run (RUN), or a step of it (RUN/checkpoints/STEP, "
        "RUN/best/STEP)"
    )


def restore_params(
    path: epath.PathLike, abstract_params: Any, *, item: str = "params", without: str = ""
) -> Any:
    """Restores the parameters alone, placed as `abstract_params` says.

    Args:
      path: what `find_step` takes.
      abstract_params: shapes, dtypes and shardings.
      item: "params", or "ema_params" for their moving average.
      without: a part that is left where it is, such as "head"; `abstract_params` does not have it.

    Raises:
      CheckpointError: no checkpoint there, one of another model, or a damaged one.
    """
    directory = find_step(path)
    saved = saved_params(directory, item)
    if without:
        saved = {k: v for k, v in saved.items() if not k.startswith(f"{without}/")}
    check_tree(abstract_params, saved, directory)
    with _reading(directory), _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(
            _absolute(directory) / "state",
            ocp.args.PyTreeRestore(
                {item: abstract_params},
                restore_args={item: ocp.checkpoint_utils.construct_restore_args(abstract_params)},
                partial_restore=True,
            ),
        )
        _verify(tree[item], read_info(directory), f"{item}/")
    return tree[item]


def saved_params(directory: epath.Path, item: str = "params") -> dict[str, tuple[int, ...]]:
    """Shape of every saved parameter by its name; CheckpointError where it is damaged."""
    prefix = f"{item}/"
    with _reading(directory), _quiet():
        saved = saved_leaves(directory)
    return {
        name.removeprefix(prefix): tuple(leaf.shape)
        for name, leaf in saved.items()
        if name.startswith(prefix)
    }


@contextlib.contextmanager
def _reading(directory: epath.Path) -> Iterator[None]:
    """Whatever Orbax makes of damaged files becomes a CheckpointError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        raise CheckpointError(f"checkpoint {directory} is damaged: {_reason(error)}") from error


def read_info(directory: epath.Path) -> dict[str, Any]:
    """The JSON saved beside the state in a step's directory."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(_absolute(directory) / "info")


def _is_of_the_machine(error: Exception) -> bool:
    """Whether a failed read tells of memory, rights or the network, and not of damaged files."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    codes = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    return any(code in str(error) for code in codes)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line; a long one without its middle."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:120]} ... {text[-170:]}"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of the libraries and of this code, as they were at the first call."""
    found = {"python": sys.version.split()[0], "commit": commit()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str:
    """The commit of this code, "+changes" where the working tree differs, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    if head.returncode or changes.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Holds the run directory for this process; the system lets go of it however the process ends.

    Raises:
      UserError: another process holds it.
    """
    if "://" in str(workdir):  # an object store has no locks
        yield
        return
    descriptor = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(descriptor, 64).decode() or "unknown"
            raise UserError(
                f"{workdir} is in use by another process (pid {owner}); wait for it, or give "
                "another --workdir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)

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
import re
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mixer import files, run_files
from mixer.errors import UserError, printable
from mixer.parallel import backend, sharding, watchdog
from mixer.parallel import processes as distributed
from mixer.training.state import TrainState, fingerprint
from mixer.weights import foreign
from mixer.weights.arrays import misfits

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


TIMES = "_CHECKPOINT_METADATA"  # Orbax's file of a checkpoint's times
STEP = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint's directory


class CheckpointError(UserError):
    """A checkpoint could not be written or used."""


class DamagedError(CheckpointError):
    """What a checkpoint's files hold is not what was saved."""


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
                from google.cloud import storage  # noqa: F401 (Orbax asks it for the bucket's kind)
            except ImportError:
                raise UserError(
                    f"{directory}: runs on gs:// need `pip install -e .[gcs]` "
                    "(google-cloud-storage)"
                ) from None
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            # Otherwise threads wait five minutes, even at exit, for a directory that could not be
            # made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = self._open()
        self._identity = self._identify()
        versions()  # now: the files may change during a long run

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"state": _telling_handler(), "info": ocp.JsonCheckpointHandler()}
        with _quiet():
            make = functools.partial(
                ocp.CheckpointManager,
                _absolute(self.directory),
                options=self._options,
                item_handlers=handlers,
            )
            try:
                try:
                    return make()
                except DAMAGE:
                    # Orbax fails where the file of the times of writing, which nobody needs, is
                    # damaged.
                    for step in saved_steps(self.directory):
                        (self.directory / str(step) / TIMES).unlink(missing_ok=True)
                    return make()
            except OSError as error:
                reason = f"{error.strerror or error}: {error.filename or self.directory}"
                raise CheckpointError(f"{self.directory} cannot be opened: {reason}") from error

    def _identify(self) -> tuple[int, int] | None:
        if "://" in str(self.directory):
            return None  # a store has no directories
        return files.identity(self.directory)

    def __enter__(self) -> "Checkpoints":
        self._quiet = _quiet()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Waits for writes and ends the manager's threads."""
        # An exception in flight is the one to report. With several processes nothing may wait
        # here: the others wait for this process.
        try:
            if kind and jax.process_count() > 1:
                return
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
                self._manager.close()
            if kind:
                _join_writers()
        finally:
            self._quiet.__exit__(None, None, None)

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, value: dict[str, float] | None = None) -> None:
        """Starts writing `state` under its step; returns once the device's memory is copied.

        Args:
          state: what is saved.
          value: the figure for which the checkpoint is kept, by name; saved in its `info`.

        Raises:
          CheckpointError: the state is not finite, or an earlier write has failed.
        """
        step = int(state.step)
        self.check()
        if step in self._manager.all_steps():
            return  # the same bits: they are a function of the seed and the step
        sums, finite = checksums(state)
        if not finite:
            raise CheckpointError(
                f"step {step}: parameters or optimizer state hold NaN or infinity; nothing was "
                f"saved. Last good checkpoint: {self.describe_last()}. Try a lower "
                "optimizer.peak_lr, a longer schedule.warmup_steps or optimizer.grad_clip_norm"
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
        """Path of the newest whole checkpoint, or "none"."""
        steps = saved_steps(self.directory)  # Orbax forgets some when a write has failed
        return str(self.directory / str(steps[-1])) if steps else "none"

    def read_info(self, step: int) -> dict[str, Any]:
        """Returns the JSON beside the state of a step; DamagedError where it is damaged."""
        return read_info(self.directory / str(step))

    def delete_after(self, step: int) -> None:
        """Deletes checkpoints of steps beyond `step`."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def check(self) -> None:
        """Raises CheckpointError if a write in the background has failed, or the place is gone."""
        if self._identity not in (None, now := self._identify()):
            what = "is gone" if now is None else "is another directory than it was"
            raise CheckpointError(
                f"{self.directory} {what}: it was removed or replaced while the run was writing to "
                "it; the run cannot go on there"
            )
        with self._reporting(None):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns once all writes are whole and in their place, or raises CheckpointError."""
        with self._reporting(None):
            self._manager.wait_until_finished()
        self.check()
        if self.steps and not (self.directory / str(self.steps[-1])).exists():
            raise CheckpointError(
                f"{self.directory / str(self.steps[-1])} is gone: it was removed while the run was "
                "under way"
            )

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

        A damaged one (missing or truncated files, changed bytes) is moved to `RUN/damaged/`, with a
        warning, and the one before is tried. Other failures of reading move nothing.

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
            restored = None
            reason = (
                f"checkpoint {self.directory / str(step)} is damaged, according to another process"
            )
            try:
                restored = self._restore(step, abstract)
            except DamagedError as error:
                reason = str(error)
            # Each process reads its own part of the arrays; all go back, or none.
            if distributed.agree(restored is not None):
                return restored
            aside = self._move_aside(step)
            warn(f"{reason}; moved to {aside}, going back to the one before")
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
            try:
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} is damaged and cannot be moved to "
                    f"{aside}: {error.strerror or error}"
                ) from None
        distributed.barrier("removal of a damaged checkpoint")
        self._manager = self._open()
        return aside

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        directory = self.directory / str(step)
        with _reading(directory):
            saved = saved_leaves(directory)
        # A run that starts to skip updates counts from here on; one that stops drops the count.
        begins = abstract.skipped is not None and "skipped" not in saved
        wanted = abstract.replace(skipped=None) if begins else abstract
        if wanted.skipped is None:
            saved.pop("skipped", None)
        check_tree(wanted, {name: leaf.shape for name, leaf in saved.items()}, directory)
        # Read in the saved dtypes, for which the checksums hold, and converted afterwards.
        as_saved = jax.tree.unflatten(
            jax.tree.structure(wanted),
            [
                jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
                for name, leaf in sharding.by_name(wanted).items()
            ],
        )
        item = {name: value for name, value in vars(as_saved).items() if value is not None}
        with _reading(directory), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                _absolute(directory) / "state",
                ocp.args.PyTreeRestore(
                    item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,  # checkpoints with and without the empty parts
                ),
            )
        state, info = wanted.replace(**tree), read_info(directory)
        _verify(state, info, directory)
        if int(state.step) != step:
            raise DamagedError(f"checkpoint {directory} is damaged: its state is of another step")
        state = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), state, wanted)
        if begins:
            state = state.replace(skipped=jnp.zeros_like(state.step))
        return state, info


def _telling_handler() -> ocp.StandardCheckpointHandler:
    """Returns a handler of states; a write that fails in the background ends all processes.

    In Orbax the others would wait for minutes, and the reason would be lost.
    """
    handler = ocp.StandardCheckpointHandler()
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[_Write]:
        return [_Write(future) for future in await save(*args, **kwargs) or ()]

    handler.async_save = async_save
    return handler


class _Write:
    """One of Orbax's futures; it reports an error to all processes before it raises it."""

    def __init__(self, written: Any):
        self._written = written

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the write."""
        try:
            return self._written.result(timeout)
        except Exception as error:
            fault = f"a checkpoint could not be written: {_reason(error)}"
            watchdog.abort(CheckpointError(fault))
            raise


def _join_writers(timeout_secs: float = 20) -> None:
    """Waits for Orbax's threads, which continue after a failed save.

    Otherwise they would write into a directory that is being removed, and report failures of their
    own afterwards.
    """
    deadline = time.monotonic() + timeout_secs
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # its own failure, which is reported already
                thread.join(max(deadline - time.monotonic(), 0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax's threads print about a failure besides raising it.

    One bad file, or a full disk, makes every pending array fail with a traceback of its own. An
    error of the main thread leaves this context first, and is shown.
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
            gc.collect()  # failed tasks, and those never started, report when they are collected
            asyncio_logger.disabled = was_disabled
            sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
            logging.set_verbosity(level)


def checksums(tree: Any) -> tuple[dict[str, list[int]], bool]:
    """Checksum of each leaf by its path, and whether every float is finite."""
    results = jax.device_get({name: fingerprint(x) for name, x in sharding.by_name(tree).items()})
    sums = {name: sums.tolist() for name, (sums, _) in results.items()}
    return sums, all(finite for _, finite in results.values())


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes no relative paths."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def check_name(path: epath.PathLike, *, writes: bool) -> None:
    """Raises UserError for a path at which Orbax and TensorStore read or write other files.

    They give backslashes a meaning of their own, refuse bytes that are not UTF-8, and treat a path
    that they write to as a pattern, in which `run[1]` means another name.
    """
    path = str(_absolute(path))
    shown = printable(path)
    if wrong := re.search(r"[\\\ud800-\udfff]", path):
        what = "a backslash" if wrong[0] == "\\" else "bytes that are no UTF-8"
        raise CheckpointError(
            f"{shown}: checkpoints cannot be in a directory whose name has {what}; rename it"
        )
    if writes and (wrong := re.search(r"[*?\[\x00-\x1f\x7f]", path)):
        raise CheckpointError(
            f"{shown}: checkpoints cannot be written to a directory whose name has "
            f"{printable(wrong[0])!r}; give it another name"
        )


def _verify(tree: Any, info: dict[str, Any], directory: epath.Path, prefix: str = "") -> None:
    sums, _ = checksums(tree)
    wrong = [path for path, value in sums.items() if info["checksums"].get(prefix + path) != value]
    if wrong:
        raise DamagedError(
            f"checkpoint {directory} is damaged: {len(wrong)} array(s) differ from their "
            f"checksums, {wrong[0]} first"
        )


def saved_leaves(directory: epath.Path) -> dict[str, Any]:
    """Shape and dtype of every saved leaf by its path, read without reading the leaves."""
    # Orbax's checkpointer would hide why a list cannot be read.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        tree = handler.metadata(_absolute(directory) / "state").tree
    return sharding.by_name(tree)


def check_tree(wanted: Any, saved: dict[str, tuple[int, ...]], source: epath.PathLike) -> None:
    """Raises CheckpointError that lists every missing, extra and mis-shaped leaf."""
    shapes = {name: tuple(leaf.shape) for name, leaf in sharding.by_name(wanted).items()}
    if faults := misfits(saved, shapes):
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(faults)}")


def find_named(workdir: epath.PathLike, name: str) -> epath.Path:
    """Directory of a run's "last" or "best" checkpoint, or of the step whose number is `name`.

    Raises:
      UserError: the run has none such.
    """
    workdir = epath.Path(workdir)
    if name in ("last", "best"):
        return find_step(workdir / "best" if name == "best" else workdir)
    for directory in (workdir / "checkpoints" / name, workdir / "best" / name):
        if STEP.fullmatch(name) and directory.is_dir():
            return directory
    raise UserError(f"--checkpoint={name}: {workdir} has no such step; last, best or a number")


def find_step(path: epath.PathLike) -> epath.Path:
    """Returns the checkpoint that `path` means: a step's directory, or the newest step of a run.

    Raises:
      CheckpointError: there is none.
    """
    path = epath.Path(path).expanduser()
    if (path / "state").is_dir() and not (path / "checkpoints").is_dir():
        return path
    for directory in (path / "checkpoints", path):
        if steps := saved_steps(directory):
            return directory / str(steps[-1])
    raise CheckpointError(
        foreign.advice(path)
        or f"no checkpoint in {path}; give a run (RUN), or a step of it (RUN/checkpoints/STEP, "
        "RUN/best/STEP)"
    )


def saved_steps(directory: epath.Path) -> list[int]:
    """The steps of the whole checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        # In an object store an unfinished step has its name already.
        if STEP.fullmatch(path.name) and path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
    )


def last_step(workdir: epath.PathLike) -> int | None:
    """The step of a run's newest checkpoint, None where it has none."""
    return max(saved_steps(epath.Path(workdir) / "checkpoints"), default=None)


def restore_params(
    path: epath.PathLike, abstract_params: Any, *, item: str = "params", without: str = ""
) -> Any:
    """Restores the parameters alone, placed as `abstract_params` says.

    Args:
      path: what `find_step` takes.
      abstract_params: shapes, dtypes and shardings.
      item: "params", or "ema_params" for their moving average.
      without: a part that is not read, such as "head"; `abstract_params` lacks it.

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
    _verify(tree[item], read_info(directory), directory, f"{item}/")
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
    """Classifies the failures of all readers.

    Orbax's errors on damaged files become a DamagedError; a fault of the path, the machine or its
    devices becomes a CheckpointError in one line. A fault of the program stays as it is.
    """
    check_name(directory, writes=False)
    backend.start()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        cause = _cause(error)  # Orbax wraps TensorStore's in a plain Exception
        if _is_of_the_machine(cause):
            raise CheckpointError(
                f"checkpoint {directory} could not be read: {_reason(error)}"
            ) from error
        if not isinstance(cause, DAMAGE):
            raise
        raise DamagedError(f"checkpoint {directory} is damaged: {_reason(error)}") from error


def read_info(directory: epath.Path) -> dict[str, Any]:
    """The JSON saved beside the state in a step's directory; DamagedError where it is damaged."""
    try:
        return run_files.read_info(directory)
    except UserError as error:
        if error.__cause__ is not None and _is_of_the_machine(error.__cause__):
            raise
        raise DamagedError(f"checkpoint {directory} is damaged: {error}") from None


# TensorStore's and XLA's words for a lack of memory, files or rights, and for networks.
MACHINE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
OS_ERROR = r"os_error_code='(\d+)'"  # TensorStore's, in its text
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Orbax's errors on files that differ from what it wrote.
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RecursionError)


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether a failed read is due to memory, rights, disks or networks, not to damaged files."""
    if isinstance(error, OSError):
        return not isinstance(error, NOT_THERE)
    text = str(error)
    numbers = map(int, re.findall(OS_ERROR, text))
    return any(code in text for code in MACHINE) or any(
        not isinstance(OSError(number, ""), NOT_THERE) for number in numbers
    )


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line; a long one without its middle."""
    error = _cause(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if number := re.search(OS_ERROR, text):  # the cause comes first: the text may be cut
        text = f"{os.strerror(int(number[1]))}: {text}"
    return text if len(text) < 300 else f"{text[:120]} ... {text[-170:]}"


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python, the libraries and this code at the time of the first call."""
    numbers = {"python": sys.version.split()[0], "commit": commit()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[package] = importlib.metadata.version(package)
    return numbers


def commit() -> str:
    """Returns the commit of this code, "+changes" where the working tree differs, or "unknown"."""
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
    """Locks the run directory for this process; the system releases it however the process ends.

    Raises:
      UserError: another process holds it.
    """
    if "://" in str(workdir):  # an object store has no locks
        yield
        return
    path = workdir / ".lock"
    try:
        # O_NONBLOCK: opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is no regular file; remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            owner = os.read(descriptor, 64).decode(errors="replace") or "unknown"
            raise UserError(
                f"{workdir} is in use by another process (pid {owner}); wait for it, or give "
                "another --workdir"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror}") from None
        yield
    finally:
        os.close(descriptor)

"""Writes a run's checkpoints asynchronously, verifies them on restore and moves damaged ones aside.

Layout: `RUN/checkpoints/<step>/{state,info}` and `RUN/best/<step>/...`. `state` is the train state;
`info` is a JSON file with its checksums, the library versions and the commit. All code that reads
or writes train states uses this module.
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


TIMES = "_CHECKPOINT_METADATA"  # Orbax's file with the time stamps of a checkpoint
STEP = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint's directory


class CheckpointError(UserError):
    """A checkpoint could not be written or restored."""


class DamagedError(CheckpointError):
    """The files of a checkpoint differ from what was saved."""


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
        handlers = {"state": _reporting_handler(), "info": ocp.JsonCheckpointHandler()}
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
                    # Orbax raises if its file of time stamps is damaged. Nothing needs that file.
                    for step in saved_steps(self.directory):
                        (self.directory / str(step) / TIMES).unlink(missing_ok=True)
                    return make()
            except OSError as error:
                reason = f"{error.strerror or error}: {error.filename or self.directory}"
                raise CheckpointError(f"{self.directory} cannot be opened: {reason}") from error

    def __enter__(self) -> "Checkpoints":
        self._quiet = _quiet()
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
                _join_writers()
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
                f"a checkpoint could not be written to {self.directory}{place}: {_reason(error)}; "
                f"last complete checkpoint: {self.describe_last()}"
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
            aside = self._move_aside(step)
            warn(f"{reason}; moved to {aside}; trying the previous checkpoint")
        raise CheckpointError(
            f"no checkpoint in {self.directory} could be read; all are now in {aside.parent}. "
            "The same command starts from step 0; a new run can set init_from to weights in best/"
        )

    def _move_aside(self, step: int) -> epath.Path:
        """Moves a damaged checkpoint away, so that the run can save that step again."""
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
        with _reading(directory), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                _absolute(directory) / "state",
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


def _reporting_handler() -> ocp.StandardCheckpointHandler:
    """Returns a checkpoint handler that ends all processes when a background write fails.

    With Orbax's handler the other processes would wait for minutes, and the reason would be lost.
    """
    handler = ocp.StandardCheckpointHandler()
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[_Write]:
        return [_Write(future) for future in await save(*args, **kwargs) or ()]

    handler.async_save = async_save
    return handler


class _Write:
    """Wraps a future of Orbax; reports an error to all processes before raising it."""

    def __init__(self, future: Any):
        self._future = future

    def result(self, timeout: float | None = None) -> Any:
        """Waits until the write is complete."""
        try:
            return self._future.result(timeout)
        except Exception as error:
            fault = f"a checkpoint could not be written: {_reason(error)}"
            watchdog.abort(CheckpointError(fault))
            raise


def _join_writers(timeout_secs: float = 20) -> None:
    """Waits for Orbax's threads, which keep running after a failed save.

    Without the wait, the threads would write into a directory that is being removed and report
    errors of their own.
    """
    deadline = time.monotonic() + timeout_secs
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # the thread has already reported its error
                thread.join(max(deadline - time.monotonic(), 0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the tracebacks that Orbax's threads print for errors that are raised as well.

    One damaged file or a full disk makes every pending array print its own traceback. An exception
    of the main thread leaves this context before it is printed.
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
            gc.collect()  # failed tasks and unstarted coroutines warn when they are collected
            asyncio_logger.disabled = was_disabled
            sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
            logging.set_verbosity(level)


def checksums(tree: Any) -> tuple[dict[str, list[int]], bool]:
    """Returns the checksum of each leaf by its path, and whether all floats are finite."""
    results = jax.device_get({name: fingerprint(x) for name, x in sharding.by_name(tree).items()})
    sums = {name: sums.tolist() for name, (sums, _) in results.items()}
    return sums, all(finite for _, finite in results.values())


def _absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path, which Orbax requires."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def check_name(path: epath.PathLike, *, writes: bool) -> None:
    """Raises CheckpointError for a path that Orbax and TensorStore would misread.

    Both libraries treat backslashes specially, reject bytes that are not UTF-8, and expand a path
    that they write to as a glob pattern, so that `run[1]` refers to another directory.
    """
    path = str(_absolute(path))
    shown = printable(path)
    if wrong := re.search(r"[\\\ud800-\udfff]", path):
        fault = "a backslash" if wrong[0] == "\\" else "bytes that are not UTF-8"
        raise CheckpointError(
            f"{shown}: checkpoints cannot be in a directory whose name has {fault}; rename it"
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
            f"checkpoint {directory} is damaged: {len(wrong)} array(s) do not match their "
            f"checksums; the first is {wrong[0]}"
        )


def saved_leaves(directory: epath.Path) -> dict[str, Any]:
    """Returns the shape and dtype of every saved leaf by its path, without reading the values."""
    # The handler, unlike Orbax's checkpointer, keeps the reason why the metadata cannot be read.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        tree = handler.metadata(_absolute(directory) / "state").tree
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
    """Returns the shape of every saved parameter by name; raises CheckpointError if damaged."""
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
    """Classifies the errors of everything that reads checkpoints.

    Orbax's errors on damaged files become a DamagedError. Errors caused by the path, the machine or
    its devices become a one-line CheckpointError. A programming error passes through unchanged.
    """
    check_name(directory, writes=False)
    backend.start()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        cause = _cause(error)  # Orbax wraps TensorStore's errors in a plain Exception
        if _is_machine_error(cause):
            raise CheckpointError(
                f"checkpoint {directory} could not be read: {_reason(error)}"
            ) from error
        if not isinstance(cause, DAMAGE):
            raise
        raise DamagedError(f"checkpoint {directory} is damaged: {_reason(error)}") from error


def read_info(directory: epath.Path) -> dict[str, Any]:
    """Returns the `info` JSON of a checkpoint; raises DamagedError if it is damaged."""
    try:
        return run_files.read_info(directory)
    except UserError as error:
        if error.__cause__ is not None and _is_machine_error(error.__cause__):
            raise
        raise DamagedError(f"checkpoint {directory} is damaged: {error}") from None


# Status codes of TensorStore and XLA for problems with memory, files, permissions or networks.
MACHINE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
OS_ERROR = r"os_error_code='(\d+)'"  # in the text of TensorStore's errors
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Exceptions that Orbax raises for files that differ from what it wrote.
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RecursionError)


def _is_machine_error(error: BaseException) -> bool:
    """Returns whether memory, permissions, disks or networks caused a read error, not damage."""
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
    """Returns the innermost cause in one line; the middle of a long text is cut out."""
    error = _cause(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if number := re.search(OS_ERROR, text):  # put it first, as the text may be cut
        text = f"{os.strerror(int(number[1]))}: {text}"
    return text if len(text) < 300 else f"{text[:120]} ... {text[-170:]}"


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python, the libraries and this code, as of the first call."""
    numbers = {"python": sys.version.split()[0], "commit": commit()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[package] = importlib.metadata.version(package)
    return numbers


def commit() -> str:
    """Returns this code's commit, with "+changes" if the working tree is modified, or "unknown"."""
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
    """Locks the run directory for this process; the OS releases the lock when the process ends.

    Raises:
      UserError: another process holds the lock.
    """
    if "://" in str(workdir):  # an object store has no locks
        yield
        return
    path = workdir / ".lock"
    try:
        # O_NONBLOCK, because opening a pipe would otherwise wait for a reader.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is not a regular file; remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            owner = os.read(descriptor, 64).decode(errors="replace") or "unknown"
            raise UserError(
                f"{workdir} is in use by another process (pid {owner}); wait for it, or pass "
                "another --workdir"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror}") from None
        yield
    finally:
        os.close(descriptor)

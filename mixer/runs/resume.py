"""Starts or resumes a run, with the settings that an earlier start of the run has fixed.

A run directory with a checkpoint fixes the config, the data and its order, and the device that
applies the augmentation. `prepare` compares these with the command's settings, in the order of
docs/training.md, restores the state, and raises an error for settings that would change the run.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mixer import memory, run_files, sizes
from mixer.data import resident
from mixer.data.preprocessing.spec import pixel_range
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.runs import config as run_config
from mixer.runs import data as run_data
from mixer.runs.data import Splits
from mixer.runs.directory import OpenRun, say, warn
from mixer.training.program import TrainProgram, make_program
from mixer.training.state import TrainState
from mixer.training.updates import Updates, describe_memory, make_updates
from mixer.weights import load as loading
from mixer.weights.versions import versions


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The saved config and data of a run; both are None if the run has no checkpoint.

    Attributes:
      config: content of config.json.
      data: content of data.json.
    """

    config: dict[str, Any] | None
    data: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Start:
    """The state and the settings with which a run starts or resumes.

    Attributes:
      config: the resolved config, which is saved as config.json.
      program: the update, its model and the shapes of its state.
      state: the restored state, or the state of step 0.
      step: the step of `state`.
      splits: the run's data.
      examples: the training examples to place on the device; a string with the reason why training
        streams them; or None if no update is left.
      num_readers: the number of processes that the data order assumes, as at the run's first start.
      is_extended: whether a finished run gets more steps.
      record: content of data.json.
    """

    config: ConfigDict
    program: TrainProgram
    state: TrainState
    step: int
    splits: Splits
    examples: resident.Examples | str | None
    num_readers: int
    is_extended: bool
    record: dict[str, Any]


def prepare(config: ConfigDict, run: OpenRun, mesh: Mesh, *, allow_config_change: bool) -> Start:
    """Opens the data, restores or initializes the state, and determines how the run continues.

    Args:
      config: the user's config, which must have been checked.
      run: the open run directory.
      mesh: mesh of the devices.
      allow_config_change: whether to resume a run whose saved config or data differ.

    Raises:
      UserError: the config, the data or the directory cannot start or continue the run.
      signals.Stopped: a signal arrived while the data was opened.
    """
    saved_run = read_saved(run, allow_config_change=allow_config_change)
    run_config.check_batch_size(config, mesh)
    eval_batch_size = config.eval_batch_size or config.global_batch_size
    sharding.check_batch_size("eval_batch_size", eval_batch_size, mesh)
    initial = None if saved_run.config else run_config.find_initial(config)
    config = run_config.resolve(config, initial=initial, saved_config=saved_run.config)
    run_config.check_same_everywhere(config.to_dict() | versions(), "settings and versions")

    # Open the data in a thread: importing TensorFlow takes seconds. Meanwhile this thread traces
    # the model, if the config sets the number of classes.
    with ThreadPoolExecutor(1, "data") as thread:
        class_names = tuple(saved_run.data["class_names"]) if saved_run.data else None
        own_config = config.copy_and_resolve_references()
        splits_future = thread.submit(run_data.open_splits, own_config, class_names, saved_run.data)
        class_weights = None
        if run_config.needs_data(config):
            splits = splits_future.result()
            train = splits.train
            config.dataset.update(splits.specs)
            run_config.resolve_data(config, len(train.class_names), train.num_examples)
            class_weights = run_data.class_weights(config, train)
        else:
            run_config.resolve_data(config, None, None)
        program = make_program(config, mesh, class_weights)
        check_room(config, program)
        is_extended = extends(saved_run, config, run.checkpoints.steps)
        if saved_run.config and not allow_config_change:
            check_same_config(run, saved_run.config, config, is_extended=is_extended)

        restored = run.checkpoints.restore_latest(program.state, warn=warn)
        step = int(restored[0].step) if restored else 0
        examples_future = None
        if step < config.total_steps:  # the images are read while the state is initialized
            examples_future = thread.submit(
                read_examples,
                config,
                splits_future.result,
                saved_run.data,
                check=lambda split: check_data(run, saved_run, split, allow_config_change),
                should_stop=lambda: run.signals.received is not None,
            )
        if restored:
            state, info = restored
            warn_of_versions(info["versions"])
        else:
            state = initial_state(
                config, program, initial, splits_future.result().train.class_names
            )
        splits = splits_future.result()
    run.leave_if_asked(say)

    if config.dataset.on_device != "off":
        splits = remember(splits)
    run_data.check_classes(config, splits.train.class_names)
    num_readers = choose_readers(config, saved_run.data, sharding.data_processes(mesh)[1])
    examples = examples_future.result() if examples_future else None
    record = make_record(splits, num_readers, saved_run.data, examples)
    check_data(run, saved_run, splits.train, allow_config_change)
    warn_of_changed_results(saved_run.data, splits)
    if step > config.total_steps:
        raise UserError(
            f"{run.path} has reached step {step}, beyond total_steps={config.total_steps}"
        )
    check_same_data_everywhere(record)
    return Start(config, program, state, step, splits, examples, num_readers, is_extended, record)


def write(start: Start, run: OpenRun) -> None:
    """Saves the config and the record of the data, which resuming the run requires."""
    distributed.barrier("reading of the run")
    run_config.write_json(run.path / "config.json", start.config.to_dict())
    run_config.write_json(run.path / "data.json", start.record)


def compile_updates(start: Start, tell: Callable[[str], None]) -> Updates:
    """Compiles the updates after `start.step`, if the run has any left.

    Args:
      start: the start of the run.
      tell: called with lines on the location of the images, the memory and the compile time.
    """
    if start.examples is None:
        return Updates(None)
    start_secs = time.perf_counter()
    updates, line = make_updates(
        start.config,
        start.examples,
        start.splits.train,
        start.program,
        start_step=start.step,
        num_readers=start.num_readers,
    )
    tell(line)
    memory_line = describe_memory(start.program, updates.compiled)
    tell(f"{memory_line}; compiled in {time.perf_counter() - start_secs:.1f} s")
    return updates


def read_saved(run: OpenRun, *, allow_config_change: bool) -> SavedRun:
    """Returns the config and data that the run must keep; both None without a checkpoint.

    If `allow_config_change` is set, a missing file gives None.

    Raises:
      UserError: a file is damaged, or missing without `allow_config_change`; or the directory holds
        converted weights instead of a run.
    """
    run_files.read_results(run.path, "last")  # reports a damaged file now, not after training
    if not run.checkpoints.steps:
        return SavedRun(None, None)
    config, data = run_config.read_saved(run.path)
    for name, value in (("config.json", config), ("data.json", data)):
        if value is None and not allow_config_change:
            raise UserError(
                f"{run.path / name} is missing, but {run.path} has checkpoints, so the run's "
                "settings are unknown. Restore the file, or pass another --workdir, or "
                "--allow_config_change to continue with the settings of this command"
            )
    return SavedRun(config, data)


def extends(saved_run: SavedRun, config: ConfigDict, saved_steps: list[int]) -> bool:
    """Returns whether `config` gives more steps to a finished run."""
    old = saved_run.config
    return old is not None and config.total_steps > old["total_steps"] in saved_steps


def check_same_config(
    run: OpenRun, saved_config: dict[str, Any], config: ConfigDict, *, is_extended: bool
) -> None:
    """Raises UserError if `config` changes a fixed key; an extended run may change its lengths."""
    if is_extended:
        lengths = {key: config.schedule[key] for key in ("warmup_steps", "cooldown_steps")}
        saved_config = saved_config | {
            "total_steps": config.total_steps,
            "schedule": saved_config["schedule"] | lengths,
        }
    run_config.check_same_config(run.path, saved_config, config)


def check_data(run: OpenRun, saved_run: SavedRun, split: Split, allow_config_change: bool) -> None:
    """Raises UserError if the training data is not the data that the run was started with."""
    if saved_run.data and not allow_config_change:
        run_data.check_same_data(run.path, saved_run.data, split)


def check_room(config: ConfigDict, program: TrainProgram) -> None:
    """Raises NoRoomError if the state, or a batch, does not fit into memory."""
    # Parameters, optimizer state and gradients on this host's devices, without activations.
    num_bytes = sharding.bytes_per_device((program.state, program.state.params))
    num_bytes *= jax.local_device_count()
    subject = f"training {program.num_params:,} parameters for {sizes.text(config.image_size)} px"
    init_size = config.init_image_size
    if init_size is not None and sizes.pair(init_size) != sizes.pair(config.image_size):
        subject += f", from weights for {sizes.text(init_size)} px,"
    memory.check_room(num_bytes, subject)
    for key in ("global_batch_size", "eval_batch_size"):
        memory.check_batch(
            key,
            config[key] or config.global_batch_size,
            image_shape=(*program.image_size, program.model.in_channels),
            num_classes=program.model.num_classes,
            prefetch_batches=config.dataset.prefetch_batches,
        )


def read_examples(
    config: ConfigDict,
    splits: Callable[[], Splits],
    saved_data: Mapping[str, Any] | None,
    *,
    check: Callable[[Split], None],
    should_stop: Callable[[], bool],
) -> resident.Examples | str:
    """Reads the training examples for the device, or returns the reason why training streams them.

    A run that has streamed keeps streaming, because some devices round the same ops differently
    from the host.
    """
    split = splits().train
    check(split)
    has_streamed = saved_data is not None and not saved_data.get("on_device", True)
    if has_streamed and config.dataset.on_device == "auto":
        return "this run was started that way"
    return resident.read(
        split,
        mode=config.dataset.on_device,
        num_drawn=config.total_steps * config.global_batch_size,
        augment_on=config.dataset.augment_on,
        should_stop=should_stop,
    )


def initial_state(
    config: ConfigDict,
    program: TrainProgram,
    initial: loading.StoredWeights | None,
    class_names: tuple[str, ...],
) -> TrainState:
    """Returns the state of step 0: random, or with the weights of `init_from`."""
    state = program.init_state()
    if initial is None:
        return state
    params, summary = loading.initial_params(
        initial,
        state.params,
        image_size=program.image_size,
        class_names=class_names,
        head=config.init_head,
        resize=config.init_resize,
    )
    say(f"first weights: {config.init_from}: {initial.about}; {summary}")
    card = initial.card
    if program.model.gelu != card.gelu:
        warn(f"the weights are for GELU {card.gelu}; model.gelu={program.model.gelu}")
    pixels = pixel_range(config.dataset.train_preprocess)
    if pixels != card.value_range:
        warn(
            f"the weights are for pixels in {list(card.value_range)}, but "
            f"dataset.train_preprocess outputs {list(pixels)}"
        )
    ema_params = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema_params=ema_params)


def remember(splits: Splits) -> Splits:
    """Returns the splits, with small evaluation splits decoded once and kept in memory."""
    val, test = resident.remember(splits.val), resident.remember(splits.test)
    return dataclasses.replace(splits, val=val, test=test)


def choose_readers(
    config: ConfigDict, saved_data: dict[str, Any] | None, num_processes: int
) -> int:
    """Returns the number of processes that the data order assumes.

    The order of data that is read file by file depends on the number of processes that started the
    run.
    """
    num_readers = saved_data.get("num_readers", 1) if saved_data else num_processes
    if config.global_batch_size % num_readers == 0:
        return num_readers
    warn("the batch size has changed: the data order changes, and this epoch may repeat examples")
    return num_processes


def make_record(
    splits: Splits,
    num_readers: int,
    saved_data: Mapping[str, Any] | None,
    examples: resident.Examples | str | None,
) -> dict[str, Any]:
    """Returns the content of data.json; a finished run keeps its entry "on_device"."""
    record = run_data.data_record(splits, num_readers)
    if examples is not None:
        record["on_device"] = not isinstance(examples, str)
    elif saved_data and "on_device" in saved_data:  # the run may be extended later
        record["on_device"] = saved_data["on_device"]
    return record


def warn_of_changed_results(saved_data: Mapping[str, Any] | None, splits: Splits) -> None:
    """Warns if evaluation data differs from the data of the run's results so far."""
    for name, split in (("val", splits.val), ("test", splits.test)):
        saved_split = saved_data and split and saved_data["splits"].get(name)
        if saved_split and (change := run_data.describe_change(saved_split, split)):
            warn(f"dataset.{name}_split differs from the data of this run's results: {change}")


def warn_of_versions(saved_versions: Mapping[str, str]) -> None:
    """Warns if other versions of the code or the libraries wrote the checkpoint."""
    current = versions()
    changes = [
        f"{key} {saved_versions[key]} -> {current.get(key)}"
        for key in saved_versions
        if saved_versions[key] != current.get(key)
    ]
    if changes:
        warn(
            f"the checkpoint was written by other versions ({', '.join(changes)}): the run "
            "continues, but may not be bit-identical"
        )


def check_same_data_everywhere(record: Mapping[str, Any]) -> None:
    """Raises UserError if a process reads other data than process 0."""
    fingerprints = {
        name: {"fingerprint": split["fingerprint"], "sizes": split.get("files", {}).get("sizes")}
        for name, split in record["splits"].items()
    }
    run_config.check_same_everywhere(fingerprints, "data")

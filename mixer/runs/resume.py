"""Where a run starts or continues: everything that an earlier start of the run has determined.

A run directory with a checkpoint binds what continues it: the config, the data and its order, and
the device that applies the augmentation. `prepare` compares, decides and restores, in the order of
docs/training.md, and refuses what would change the run.
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

from mixer import memory, run_files
from mixer.data import resident
from mixer.data.preprocessing.spec import pixel_range
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.runs import config as run_config
from mixer.runs.config import Splits
from mixer.runs.directory import OpenRun, say, warn
from mixer.training.program import TrainProgram, make_program
from mixer.training.state import TrainState
from mixer.training.updates import Updates, describe_memory, make_updates
from mixer.weights import checkpoint
from mixer.weights import load as loading


@dataclasses.dataclass(frozen=True)
class Begun:
    """What an earlier start saved; both None for a new run, or for one that never saved a step.

    Attributes:
      config: of config.json.
      data: of data.json.
    """

    config: dict[str, Any] | None
    data: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts, and how.

    Attributes:
      config: resolved; it is saved as config.json.
      program: the update, its model and the shapes of its state.
      state: restored, or of step 0.
      step: of `state`.
      splits: the run's data.
      examples: the training examples, to be put on the device; a string that says why training
        streams them; or None if no update is left.
      num_readers: how many processes the order of the data assumes: those that began the run.
      is_extended: whether the run had finished and is given more steps.
      record: what data.json holds.
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
    """Opens the data, restores or initializes the state, and decides how the run goes on.

    Args:
      config: as the user gave it, checked.
      run: the open directory.
      mesh: of the devices.
      allow_config_change: whether to continue a run whose saved config or data differ.

    Raises:
      UserError: the config, the data or the directory cannot start or continue the run.
      signals.Stopped: a signal arrived while the data was opened.
    """
    begun = read_begun(run, allow_config_change=allow_config_change)
    run_config.check_batch_size(config, mesh)
    run_config.check_eval_batch_size(config, mesh)
    initial = None if begun.config else run_config.find_initial(config)
    config = run_config.resolve(config, initial=initial, begun=begun.config)
    run_config.check_same_everywhere(
        config.to_dict() | checkpoint.versions(), "settings and versions"
    )

    # A thread opens the data: importing TensorFlow takes seconds, in which the model is traced if
    # the config says how many classes there are.
    with ThreadPoolExecutor(1, "data") as thread:
        class_names = tuple(begun.data["class_names"]) if begun.data else None
        opening = thread.submit(
            run_config.open_splits, config.copy_and_resolve_references(), class_names, begun.data
        )
        if config.model.num_classes is None or run_config.needs_epochs(config):
            train = opening.result().train
            run_config.resolve_data(config, len(train.class_names), train.num_examples)
        else:
            run_config.resolve_data(config, None, None)
        program = make_program(config, mesh)
        check_room(config, program)
        is_extended = extends(begun, config, run.checkpoints.steps)
        if begun.config and not allow_config_change:
            check_same_config(run, begun.config, config, is_extended=is_extended)

        restored = run.checkpoints.restore_latest(program.state, warn=warn)
        step = int(restored[0].step) if restored else 0
        reading = None
        if step < config.total_steps:  # the images are read while the state is initialized
            reading = thread.submit(
                read_examples,
                config,
                opening.result,
                begun.data,
                check=lambda split: check_data(run, begun, split, allow_config_change),
                should_stop=lambda: run.signals.received is not None,
            )
        if restored:
            state, info = restored
            warn_of_versions(info["versions"])
        else:
            state = initial_state(config, program, initial, opening.result().train.class_names)
        splits = opening.result()
    run.leave_if_asked(say)

    if config.dataset.on_device != "off":
        splits = remember(splits)
    run_config.check_classes(config, splits.train.class_names)
    num_readers = choose_readers(config, begun.data, sharding.data_processes(mesh)[1])
    examples = reading.result() if reading else None
    record = make_record(splits, num_readers, begun.data, examples)
    check_data(run, begun, splits.train, allow_config_change)
    warn_of_changed_results(begun.data, splits)
    if step > config.total_steps:
        raise UserError(
            f"{run.path} has reached step {step}, beyond total_steps={config.total_steps}"
        )
    check_same_data_everywhere(record)
    return Start(config, program, state, step, splits, examples, num_readers, is_extended, record)


def write(start: Start, run: OpenRun) -> None:
    """Saves the config and the data's record, from which the run can be continued."""
    distributed.barrier("reading of the run")
    run_config.write_json(run.path / "config.json", start.config.to_dict())
    run_config.write_json(run.path / "data.json", start.record)


def compile_updates(start: Start, tell: Callable[[str], None]) -> Updates:
    """Compiles the updates after `start.step`, if the run has any left.

    Args:
      start: of the run.
      tell: gets lines on where the images are, the memory, and the time of compiling.
    """
    if start.examples is None:
        return Updates(None)
    started = time.perf_counter()
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
    tell(f"{memory_line}; compiled in {time.perf_counter() - started:.1f} s")
    return updates


def read_begun(run: OpenRun, *, allow_config_change: bool) -> Begun:
    """What binds the run: nothing if it never saved a checkpoint."""
    run_files.read_results(run.path, "last")  # added to at the end; damage is reported now
    if not run.checkpoints.steps:
        return Begun(None, None)
    return Begun(*run_config.read_begun(run.path, allow_config_change=allow_config_change))


def extends(begun: Begun, config: ConfigDict, saved_steps: list[int]) -> bool:
    """Whether a finished run is given more steps."""
    old = begun.config
    return old is not None and config.total_steps > old["total_steps"] in saved_steps


def check_same_config(
    run: OpenRun, old: dict[str, Any], config: ConfigDict, *, is_extended: bool
) -> None:
    """Raises UserError if `config` changes what binds the run; an extension changes its length."""
    if is_extended:
        lengths = {key: config.schedule[key] for key in ("warmup_steps", "cooldown_steps")}
        old = old | {
            "total_steps": config.total_steps,
            "schedule": old["schedule"] | lengths,
        }
    run_config.check_same_config(run.path, old, config)


def check_data(run: OpenRun, begun: Begun, split: Split, allow_config_change: bool) -> None:
    """Raises UserError if the training data is not the data that the run was started with."""
    if begun.data and not allow_config_change:
        run_config.check_same_data(run.path, begun.data, split)


def check_room(config: ConfigDict, program: TrainProgram) -> None:
    """Raises NoRoomError if the state, or a batch, does not fit into memory."""
    # Parameters, optimizer state and gradients of this host's devices; activations come on top.
    num_bytes = sharding.bytes_per_device((program.state, program.state.params))
    num_bytes *= jax.local_device_count()
    what = f"training {program.num_params:,} parameters for {config.image_size} px"
    if config.init_image_size not in (None, config.image_size):
        what += f", from weights for {config.init_image_size} px,"
    memory.check_room(num_bytes, what)
    for key in ("global_batch_size", "eval_batch_size"):
        memory.check_batch(
            key,
            config[key] or config.global_batch_size,
            side=config.image_size,
            num_classes=program.model.num_classes,
            prefetch_batches=config.dataset.prefetch_batches,
        )


def read_examples(
    config: ConfigDict,
    splits: Callable[[], Splits],
    begun_data: Mapping[str, Any] | None,
    *,
    check: Callable[[Split], None],
    should_stop: Callable[[], bool],
) -> resident.Examples | str:
    """Reads the training examples for the device, or says why training streams them.

    A run that streamed keeps streaming: host and device run the same ops, but not every device
    rounds like the host.
    """
    split = splits().train
    check(split)
    has_streamed = begun_data is not None and not begun_data.get("on_device", True)
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
    """The state at step 0: random, or with the weights that `init_from` names."""
    state = program.init_state()
    if initial is None:
        return state
    params, how = loading.initial_params(
        initial,
        state.params,
        image_size=program.image_size,
        class_names=class_names,
        head=config.init_head,
        resize=config.init_resize,
    )
    say(f"first weights: {config.init_from}: {initial.about}; {how}")
    card = initial.card
    if program.model.gelu != card.gelu:
        warn(f"those weights are for GELU {card.gelu}; model.gelu={program.model.gelu}")
    pixels = pixel_range(config.dataset.train_preprocess)
    if pixels != card.value_range:
        warn(
            f"those weights are for pixels in {list(card.value_range)}, and "
            f"dataset.train_preprocess gives them in {list(pixels)}"
        )
    ema_params = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema_params=ema_params)


def remember(splits: Splits) -> Splits:
    """The splits, whose evaluation images are decoded once and stay in memory if they are small."""
    val, test = resident.remember(splits.val), resident.remember(splits.test)
    return dataclasses.replace(splits, val=val, test=test)


def choose_readers(
    config: ConfigDict, begun_data: dict[str, Any] | None, num_processes: int
) -> int:
    """How many processes the order of the data assumes.

    The order of a set that is read file by file depends on how many processes began the run.
    """
    num_readers = begun_data.get("num_readers", 1) if begun_data else num_processes
    if config.global_batch_size % num_readers == 0:
        return num_readers
    warn("the batch size has changed: the data order is new, this epoch may repeat examples")
    return num_processes


def make_record(
    splits: Splits,
    num_readers: int,
    begun_data: Mapping[str, Any] | None,
    examples: resident.Examples | str | None,
) -> dict[str, Any]:
    """What data.json holds; a finished run keeps what it says of the device."""
    record = run_config.data_record(splits, num_readers)
    if examples is not None:
        record["on_device"] = not isinstance(examples, str)
    elif begun_data and "on_device" in begun_data:  # the run may be extended later
        record["on_device"] = begun_data["on_device"]
    return record


def warn_of_changed_results(begun_data: Mapping[str, Any] | None, splits: Splits) -> None:
    """Warns if evaluation data differs from the data of the run's results so far."""
    for which, split in (("val", splits.val), ("test", splits.test)):
        old = begun_data and split and begun_data["splits"].get(which)
        if old and (change := run_config.data_change(old, split)):
            warn(f"dataset.{which}_split has other data than this run's results so far: {change}")


def warn_of_versions(saved: Mapping[str, str]) -> None:
    """Warns if other versions wrote the checkpoint."""
    now = checkpoint.versions()
    changed = [
        f"{key} {saved[key]} -> {now.get(key)}" for key in saved if saved[key] != now.get(key)
    ]
    if changed:
        warn(
            f"the checkpoint was written by other versions ({', '.join(changed)}): the run goes "
            "on, but perhaps not bit for bit"
        )


def check_same_data_everywhere(record: Mapping[str, Any]) -> None:
    """Raises UserError if a process reads other data than process 0."""
    fingerprints = {
        which: {"fingerprint": split["fingerprint"], "sizes": split.get("files", {}).get("sizes")}
        for which, split in record["splits"].items()
    }
    run_config.check_same_everywhere(fingerprints, "data")

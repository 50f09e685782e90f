"""Reads, checks, resolves and compares the config of a run.

In a run directory, `config.json` holds the resolved config.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mixer import run_files, sizes
from mixer.data import host_or_device
from mixer.data.preprocessing import permutation
from mixer.data.preprocessing.spec import parse, with_channels
from mixer.errors import UserError, check_choice, check_number
from mixer.models.modules import check_image_size
from mixer.models.registry import ARCHITECTURES, grown_dimensions, make_model
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.runs import data as run_data
from mixer.weights import load as loading
from mixer.weights import published

# Keys that may change when a run is resumed: they affect neither the parameters nor the data order.
FREE_KEYS = (
    "log_every_steps",
    "eval_every_steps",
    "eval_every_epochs",
    "eval_every_examples",
    "eval_batch_size",
    "eval_suite",
    "checkpoint.",
    "tensorboard",
    "max_skipped_steps",
    "profile_steps",
    "stall_secs",
    "compile_cache_dir",
    "mesh.",
    "model.remat",
    "model.scan_blocks",
    "dataset.data_dir",
    "dataset.label_file",  # the fingerprint of the data covers the file's content
    "dataset.prefetch_batches",
    # The order and random keys are the same, and on a CPU the pixels too. Another device may round
    # a few pixels of an affine transform differently (docs/preprocessing.md).
    "dataset.on_device",
    "dataset.augment_on",
)

UNITS = ("steps", "epochs", "examples")
MAX_COUNT = 2**31 - 1  # steps and indices on devices are int32
# Whole numbers of at least 1; the optional ones may be None.
OPTIONAL_COUNTS = ("eval_batch_size", "checkpoint.keep_every_steps")
COUNTS = (
    *("global_batch_size", "log_every_steps", "model.in_channels"),
    *("checkpoint.every_steps", "checkpoint.keep_last"),
    *("dataset.prefetch_batches", "dataset.shuffle_group_size"),
    *("optimizer.accumulate_steps", "schedule.rsqrt_timescale"),
    *OPTIONAL_COUNTS,
)
# Stems of keys that end in one of the units.
LENGTHS = ("total_", "schedule.warmup_", "schedule.cooldown_", "eval_every_")


def check_config(config: ConfigDict) -> None:
    """Raises UserError for invalid values that later checks would report less clearly."""
    values = dict(_flatten(config.to_dict()))
    for key in COUNTS:
        if values[key] is not None or key not in OPTIONAL_COUNTS:
            check_number(key, values[key], minimum=1, limit=MAX_COUNT + 1, integer=True)
    for key in ("image_size", "init_image_size", "model.patch_size"):
        if values[key] is not None or key == "image_size":
            sizes.check_size(key, values[key], limit=MAX_COUNT + 1)
    for name in ("peak_lr", "weight_decay", "grad_clip_norm", "sam_rho"):
        check_number(f"optimizer.{name}", config.optimizer[name])
    check_number("seed", config.seed, limit=1 << 32)  # JAX's keys use 32 bits of the seed
    check_number("label_smoothing", config.label_smoothing, limit=1)
    if not 0 <= config.class_balance <= 1:
        raise UserError(f"class_balance={config.class_balance}; expected a number from 0 to 1")
    check_number("optimizer.ema_decay", config.optimizer.ema_decay, limit=1)
    if config.global_batch_size % config.optimizer.accumulate_steps:
        raise UserError(
            f"optimizer.accumulate_steps={config.optimizer.accumulate_steps} does not divide "
            f"global_batch_size={config.global_batch_size}"
        )
    check_choice("init_head", config.init_head, loading.HEADS)
    check_choice("init_resize", config.init_resize, loading.RESIZES)
    for stem in LENGTHS:
        lengths = get_lengths(config, stem)
        if len(lengths) > 1:
            pairs = " and ".join(f"{key}={value}" for key, value in lengths.items())
            raise UserError(f"{pairs} are set; expected only one of them")
        for key, value in lengths.items():
            may_be_0 = stem.startswith("schedule.")
            if not 0 <= value < math.inf or (value == 0 and not may_be_0):
                raise UserError(
                    f"{key}={value}; expected a number {'of at least' if may_be_0 else 'above'} 0"
                )
    if not get_lengths(config, "total_"):
        raise UserError(
            "the run has no length; expected total_steps, total_epochs or total_examples"
        )
    if config.dataset.permutation:
        check_choice("dataset.permutation", config.dataset.permutation, permutation.KINDS)
    if config.dataset.permutation and config.dataset.name == "synthetic":
        raise UserError(
            f"dataset.permutation={config.dataset.permutation!r} cannot be used with synthetic "
            "data, which is not preprocessed"
        )
    check_choice("dataset.on_device", config.dataset.on_device, host_or_device.ON_DEVICE)
    check_choice("dataset.augment_on", config.dataset.augment_on, host_or_device.AUGMENT_ON)
    check_choice("nan_policy", config.nan_policy, ("stop", "skip"))
    check_number("max_skipped_steps", config.max_skipped_steps)
    check_number("stall_secs", config.stall_secs)
    steps = config.profile_steps
    are_integers = all(isinstance(step, int) for step in steps)
    if steps and not (are_integers and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(f"profile_steps={tuple(steps)}; expected (first, last), such as (100, 104)")
    if not config.dataset.name:
        raise UserError("dataset.name is empty; expected a TFDS name, 'folder' or 'synthetic'")
    check_choice("model.name", config.model.name, ARCHITECTURES)
    fields = ARCHITECTURES[config.model.name].fields
    for key, value in config.model.items():
        if value is not None and key not in ("name", "variant", *fields):
            raise UserError(
                f"model.{key}={value} does not concern model.name={config.model.name}; expected "
                f"None. Its keys are {', '.join(fields)}"
            )
    variant, patch_size = config.model.variant, config.model.patch_size
    if variant is not None:
        variants = ARCHITECTURES[config.model.name].variants
        check_choice("model.variant", variant, variants)
        patch_size = patch_size or variants[variant]["patch_size"]
    if patch_size:
        check_image_size(sizes.pair(config.image_size), patch_size)


def get_lengths(config: ConfigDict, stem: str) -> dict[str, float]:
    """Returns the set keys among `stem` + "steps", "epochs" and "examples", with their values."""
    keys = [f"{stem}{unit}" for unit in UNITS]
    flat = dict(_flatten(config.to_dict()))
    return {key: flat[key] for key in keys if flat[key] is not None}


def needs_epochs(config: ConfigDict) -> bool:
    """Returns whether a length is in epochs; only the data's size converts epochs to steps."""
    return any(key.endswith("epochs") for stem in LENGTHS for key in get_lengths(config, stem))


def needs_data(config: ConfigDict) -> bool:
    """Returns whether the update, or a value of the config, depends on the data."""
    has_auto = any(config.dataset[key] == run_data.AUTO for key in run_data.SPLIT_KEYS)
    is_unknown = config.model.num_classes is None or needs_epochs(config)
    return is_unknown or has_auto or config.class_balance > 0


def resolve_lengths(config: ConfigDict, num_examples: int | None) -> None:
    """Sets every `..._steps` key that the config gives in epochs or examples.

    A length is rounded to the nearest step, but is at least 1. `num_examples` is the size of the
    training split; it may be None if `needs_epochs` is false.
    """
    for stem in LENGTHS:
        steps = None if stem == "eval_every_" else 0
        for key, value in get_lengths(config, stem).items():
            batch_size = 1 if key.endswith("steps") else config.global_batch_size
            examples = value * num_examples if key.endswith("epochs") else value
            if examples > MAX_COUNT * batch_size:
                raise UserError(f"{key}={value}; expected at most {MAX_COUNT} updates")
            steps = max(round(examples / batch_size), 1) if value else 0
        config.update_from_flattened_dict({f"{stem}steps": steps})


def check_batch_size(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the mesh does not divide the batch or a microbatch."""
    size, num_microbatches = config.global_batch_size, config.optimizer.accumulate_steps
    sharding.check_batch_size("global_batch_size", size, mesh)
    if num_microbatches > 1:
        name = "global_batch_size / optimizer.accumulate_steps"
        sharding.check_batch_size(name, size // num_microbatches, mesh)


def find_initial(config: ConfigDict) -> loading.StoredWeights | None:
    """Returns the unread weights that a new run starts from; None if `init_from` is not set.

    Raises:
      UserError: there are no weights, or they are of another architecture, another value of one of
        its options, another number of channels or another image size than the config says.
    """
    if not config.init_from:
        return None
    weights = loading.find(config.init_from, image_size=config.init_image_size, log=print)
    name = weights.card.architecture
    if name != config.model.name:
        raise UserError(
            f"model.name={config.model.name}, but init_from={weights.path} holds weights for "
            f"model.name={name}"
        )
    stored_options = ARCHITECTURES[name].default_options | weights.card.dimensions
    for key in ARCHITECTURES[name].options:
        if config.model[key] not in (None, stored_options[key]):
            raise UserError(
                f"model.{key}={config.model[key]}, but init_from={weights.path} holds weights for "
                f"model.{key}={stored_options[key]}"
            )
    if weights.card.in_channels != config.model.in_channels:
        raise UserError(
            f"model.in_channels={config.model.in_channels}, but init_from={weights.path} holds "
            f"weights for images with model.in_channels={weights.card.in_channels}"
        )
    height, width = weights.card.image_size
    size = config.init_image_size
    if size is not None and sizes.pair(size) != (height, width):
        raise UserError(
            f"init_image_size={size}, but init_from={weights.path} is for images of {height} x "
            f"{width}"
        )
    return weights


def resolve(
    config: ConfigDict,
    *,
    initial: loading.StoredWeights | None,
    saved_config: dict[str, Any] | None = None,
) -> ConfigDict:
    """Returns a copy of `config` in which every value is set that does not depend on the data.

    These are the model fields that the initial weights determine, the channels of the decoded
    images, and the preprocessing op of `dataset.permutation`. A resumed run keeps the splits that
    "auto" has chosen, and its preprocessing (`keep_preprocessing`). `resolve_data` sets the
    remaining values.

    Args:
      config: the config from the command line.
      initial: the run's initial weights (`find_initial`).
      saved_config: saved config of a run that is resumed; its initial weights may no longer exist.
    """
    config = config.copy_and_resolve_references()
    config.init_from = published.redact(config.init_from)  # saved configs must not hold secrets
    with config.ignore_type():  # a size is an int or a tuple
        for key in ("image_size", "init_image_size"):
            config[key] = config[key] and sizes.shorten(config[key])
        patch_size = config.model.patch_size
        config.model.patch_size = patch_size and sizes.shorten(patch_size)
    resolve_model(config, initial, saved_config)
    resolve_channels(config)
    resolve_permutation(config)
    if saved_config:
        for key in run_data.SPLIT_KEYS:
            if config.dataset[key] == run_data.AUTO:
                config.dataset[key] = saved_config["dataset"][key]
        keep_preprocessing(config, saved_config)
    return config


def resolve_data(config: ConfigDict, num_classes: int | None, num_examples: int | None) -> None:
    """Sets the number of classes, and every length in steps.

    Args:
      config: a config that `resolve` returned.
      num_classes: number of classes in the data; may be None if the config sets it.
      num_examples: number of training examples; may be None unless `needs_epochs`.
    """
    if config.model.num_classes is None:
        config.model.num_classes = num_classes
    resolve_lengths(config, num_examples)


def resolve_model(
    config: ConfigDict,
    initial: loading.StoredWeights | None,
    saved_values: dict[str, Any] | None,
) -> None:
    """Sets the fields of the model that the initial weights determine.

    These are the GELU form, the options of the architecture, all dimensions if the config sets
    neither a variant nor a dimension, and the grown D_S for a larger image size.

    Args:
      config: the config from the command line; it is modified.
      initial: the initial weights.
      saved_values: config of the run that is resumed; its initial weights may no longer exist.
    """
    architecture = ARCHITECTURES[config.model.name]
    if saved_values:
        gelu, size = saved_values["model"]["gelu"], saved_values.get("init_image_size")
        options = run_files.complete(saved_values)["model"]
    elif initial:
        gelu, size = initial.card.gelu, sizes.shorten(initial.card.image_size)
        options = architecture.default_options | initial.card.dimensions
    else:
        gelu, size = "tanh", None
        options = architecture.default_options
    for key in architecture.options:
        if config.model[key] is None:
            config.model[key] = options[key]
    if config.model.gelu is None:
        config.model.gelu = gelu
    if config.init_image_size is None:
        config.init_image_size = size
    model = config.model
    keys = architecture.dimensions
    if config.init_from and all(model[key] is None for key in ("variant", *keys)):
        if saved_values:
            model.update({key: saved_values["model"][key] for key in keys})
            return  # the saved dimensions are already grown
        model.update({key: initial.card.dimensions[key] for key in keys})
    if config.init_image_size is None or config.init_resize != "grow":
        return
    old_size, new_size = map(sizes.pair, (config.init_image_size, config.image_size))
    if old_size == new_size:
        return
    # For an image K times larger, the token-mixing MLP becomes K^2 times as wide.
    set_dims = {key: model[key] for key in keys if model[key]}
    dims = {**architecture.variants.get(model.variant, {}), **set_dims}
    if len(dims) == len(keys):
        new_dims = grown_dimensions(architecture, dims, old_size, new_size)
        model.update({key: new_dims[key] for key in keys if new_dims[key] != dims[key]})


def resolve_channels(config: ConfigDict) -> None:
    """Makes both preprocessings decode images to `model.in_channels` channels."""
    for key in ("train_preprocess", "eval_preprocess"):
        config.dataset[key] = with_channels(config.dataset[key], config.model.in_channels)


def resolve_permutation(config: ConfigDict) -> None:
    """Adds the op of `dataset.permutation` to the training and evaluation preprocessing.

    The saved config then lists every op that the images went through. The op's seed is always 0, so
    that runs of every seed, and models fine-tuned from them, see the same images.
    """
    dataset, size = config.dataset, sizes.shorten(config.image_size)
    if not dataset.permutation:
        return
    op = f"permute_pixels({size}, seed=0)"
    if dataset.permutation == "patches":
        # The patch size may come from a variant. The number of classes may not be known yet.
        patch_size = make_model(**config.model.to_dict() | dict(num_classes=1)).patch_size
        check_image_size(sizes.pair(size), patch_size)
        op = f"permute_patches({size}, {patch_size}, seed=0)"
    for key in ("train_preprocess", "eval_preprocess"):
        dataset[key] = str(parse(dataset[key]).with_image_op(op))


def keep_preprocessing(config: ConfigDict, saved_config: dict[str, Any]) -> None:
    """Keeps the preprocessing of a run that began before its recipe took the published form.

    Args:
      config: the config from the command line; it is modified.
      saved_config: config of the run that is resumed.
    """
    for key in ("train_preprocess", "eval_preprocess"):
        saved = saved_config["dataset"][key]
        if re.sub(r", (published=True|mode='published')", "", config.dataset[key]) == saved:
            config.dataset[key] = saved


def check_same_config(
    workdir: epath.Path, saved_config: dict[str, Any], config: ConfigDict
) -> None:
    """Raises UserError with every key that may not change in a resumed run, but would."""
    if changed_keys := changes(saved_config, config.to_dict()):
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(changed_keys)}. Pass another "
            "--workdir, or --allow_config_change to resume the run with the new values"
        )


def check_same_everywhere(tree: dict[str, Any], noun: str) -> None:
    """Raises UserError if values on this process differ from process 0; lists the differences.

    Hosts may have the same data at different paths.
    """
    main_values, local_values = (dict(_flatten(t)) for t in (distributed.broadcast(tree), tree))
    differences = [
        f"{key}: {main_values.get(key)!r} -> {local_values.get(key)!r}"
        for key in sorted(main_values.keys() | local_values.keys())
        if main_values.get(key) != local_values.get(key)
        and key not in ("dataset.data_dir", "dataset.label_file")
    ]
    if differences:
        raise UserError(
            f"{distributed.process_name()} has different {noun} from process 0: "
            f"{'; '.join(differences)}"
        )


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file atomically, on process 0 only."""
    if distributed.is_main():
        run_files.write_json(path, value)


def read_run(workdir: epath.PathLike) -> tuple[ConfigDict, tuple[str, ...]]:
    """Returns a run's config, completed with every key of the current code, and its class names.

    Raises:
      UserError: the directory is not a run, or one of its files is damaged.
    """
    config, data = read_saved(workdir)
    files = {"config.json": config, "data.json": data}
    if missing_names := [name for name, value in files.items() if value is None]:
        raise UserError(f"{workdir} is not a run: it has no {' and no '.join(missing_names)}")
    class_names = tuple(data["class_names"])
    config = ConfigDict(run_files.complete(config))
    if config.model.num_classes is None:
        config.model.num_classes = len(class_names)
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"{workdir}: config.json has model.num_classes={config.model.num_classes}, but "
            f"data.json has {len(class_names)} class_names"
        )
    return config, class_names


def read_saved(
    workdir: epath.PathLike,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns the contents of a run's config.json and data.json; None for a missing file.

    Raises:
      UserError: a file is damaged, or the directory holds converted weights instead of a run.
    """
    config = run_files.read_config(workdir)
    if config is not None:
        check_trained(workdir, config)
    return config, run_files.read_data(workdir)


def check_trained(workdir: epath.PathLike, config: dict[str, Any]) -> None:
    """Raises UserError if `workdir` holds weights that mixer.tools.convert wrote."""
    if "total_steps" not in config:
        raise UserError(
            f"{workdir} holds converted weights, not a training run; start a run from them with "
            f"--config.init_from={workdir} with another --workdir"
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns lines such as "schedule.decay: 'cosine' -> 'linear'" for changed keys.

    Keys in FREE_KEYS may change when a run is resumed, and are left out.
    """
    old_values, new_values = dict(_flatten(old)), dict(_flatten(new))
    for values in (old_values, new_values):  # older code saved URLs with their query
        if values.get("init_from"):
            values["init_from"] = published.redact(values["init_from"])
    for key in [f"{stem}{unit}" for stem in LENGTHS for unit in UNITS[1:]]:
        old_values.pop(key, None)  # the resolved steps are compared instead
    return [
        f"{key}: {old_values[key]!r} -> {new_values.get(key)!r}"
        for key in sorted(old_values)  # without keys that newer code added
        if old_values[key] != new_values.get(key)
        and not any(key == free or (free[-1] == "." and key.startswith(free)) for free in FREE_KEYS)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.loads(json.dumps(value))  # turns tuples into lists, as in JSON

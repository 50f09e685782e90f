"""A run directory: the config and the data a run was started with, and what is built from them.

`config.json` is the resolved config, `data.json` the class names and fingerprints of the data.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mixer import run_files
from mixer.data import placement
from mixer.data import splits as pipeline
from mixer.data.preprocessing import permutation
from mixer.data.preprocessing.spec import parse
from mixer.data.sources import folder
from mixer.errors import UserError, check_choice, check_number
from mixer.models.modules import check_image_size
from mixer.models.registry import ARCHITECTURES, DEFAULT, grown_dimensions, make_model
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.weights import load as loading
from mixer.weights import published

# What may change when a run is continued: it alters neither the parameters nor the data order.
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
    "dataset.label_file",  # the data's fingerprint is of what it says
    "dataset.prefetch_batches",
    # Order and keys are the same, and so are the pixels on a CPU; another device may round a few
    # of an affine map otherwise (docs/preprocessing.md).
    "dataset.on_device",
    "dataset.augment_on",
)

UNITS = ("steps", "epochs", "examples")
MOST = 2**31 - 1  # of anything that is counted: steps are int32, as are indices on devices
# Whole numbers of at least 1; the optional ones may be None.
OPTIONAL_COUNTS = ("eval_batch_size", "checkpoint.keep_every_steps", "init_image_size")
COUNTS = (
    *("global_batch_size", "image_size", "log_every_steps"),
    *("checkpoint.every_steps", "checkpoint.keep_last"),
    *("dataset.prefetch_batches", "dataset.shuffle_group_size"),
    *("optimizer.accumulate_steps", "schedule.rsqrt_timescale"),
    *OPTIONAL_COUNTS,
)
# What is given in one of the units.
LENGTHS = ("total_", "schedule.warmup_", "schedule.cooldown_", "eval_every_")
# What a run directory holds; nothing else may have these names.
DIRECTORIES = ("checkpoints", "best", "damaged", "tensorboard", "profile", "evaluation")
FILES = ("config.json", "data.json", "metrics.jsonl", "results.json", "results.md", "curves.png")


@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits a config names; `val` and `test` are None where it names none.

    Attributes:
      train, val, test: the splits.
      remarks: lines for the user on the data.
      subfolders: whether images in folders of a class folder are read (`folder.scan`).
    """

    train: pipeline.Split
    val: pipeline.Split | None
    test: pipeline.Split | None
    remarks: Sequence[str] = ()
    subfolders: bool = True


def check_config(config: ConfigDict) -> None:
    """Raises UserError for values that no later check would name as clearly."""
    values = dict(_flatten(config.to_dict()))
    for key in COUNTS:
        if values[key] is not None or key not in OPTIONAL_COUNTS:
            check_number(key, values[key], least=1, below=MOST + 1, whole=True)
    for name in ("peak_lr", "weight_decay", "grad_clip_norm", "sam_rho"):
        check_number(f"optimizer.{name}", config.optimizer[name])
    check_number("seed", config.seed, below=1 << 32)  # JAX's keys take no more bits of it
    check_number("label_smoothing", config.label_smoothing, below=1)
    check_number("optimizer.ema_decay", config.optimizer.ema_decay, below=1)
    if config.global_batch_size % config.optimizer.accumulate_steps:
        raise UserError(
            f"optimizer.accumulate_steps={config.optimizer.accumulate_steps} does not divide "
            f"global_batch_size={config.global_batch_size}"
        )
    check_choice("init_head", config.init_head, loading.HEADS)
    check_choice("init_resize", config.init_resize, loading.RESIZES)
    for stem in LENGTHS:
        given = lengths_given(config, stem)
        if len(given) > 1:
            both = " and ".join(f"{key}={value}" for key, value in given.items())
            raise UserError(f"{both} are set; give one of them")
        for key, value in given.items():
            may_be_0 = stem.startswith("schedule.")
            if not 0 <= value < math.inf or (value == 0 and not may_be_0):
                raise UserError(f"{key} is {value}; it must be {'0 or ' * may_be_0}more than 0")
    if not lengths_given(config, "total_"):
        raise UserError("no length of the run: give total_steps, total_epochs or total_examples")
    if config.dataset.permutation:
        check_choice("dataset.permutation", config.dataset.permutation, permutation.KINDS)
    if config.dataset.permutation and config.dataset.name == "synthetic":
        raise UserError(
            f"dataset.permutation={config.dataset.permutation!r} is a step of the preprocessing, "
            "and synthetic data takes none"
        )
    check_choice("dataset.on_device", config.dataset.on_device, placement.ON_DEVICE)
    check_choice("dataset.augment_on", config.dataset.augment_on, placement.AUGMENT_ON)
    check_choice("nan_policy", config.nan_policy, ("stop", "skip"))
    check_number("max_skipped_steps", config.max_skipped_steps)
    check_number("stall_secs", config.stall_secs)
    steps = config.profile_steps
    whole = all(isinstance(step, int) for step in steps)
    if steps and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(f"profile_steps={tuple(steps)}; give (first, last), such as (100, 104)")
    if not config.dataset.name:
        raise UserError("dataset.name is empty; give a TFDS name, 'folder' or 'synthetic'")
    variant, patch_size = config.model.variant, config.model.patch_size
    if variant is not None:
        variants = ARCHITECTURES[DEFAULT].variants
        check_choice("model.variant", variant, variants)
        patch_size = patch_size or variants[variant]["patch_size"]
    if patch_size:
        check_image_size((config.image_size, config.image_size), patch_size)


def lengths_given(config: ConfigDict, stem: str) -> dict[str, float]:
    """The keys `stem` + steps, epochs or examples that are set, with their values."""
    keys = [f"{stem}{unit}" for unit in UNITS]
    flat = dict(_flatten(config.to_dict()))
    return {key: flat[key] for key in keys if flat[key] is not None}


def needs_epochs(config: ConfigDict) -> bool:
    """Whether a length of the config is in epochs, which only the data can turn into steps."""
    return any(key.endswith("epochs") for stem in LENGTHS for key in lengths_given(config, stem))


def resolve_lengths(config: ConfigDict, num_examples: int | None) -> None:
    """Sets every `..._steps` that the config gives in epochs or examples.

    Rounded to the nearest step, at least 1. `num_examples` is the size of the training split, and
    may be None where `needs_epochs` is false.
    """
    for stem in LENGTHS:
        given = lengths_given(config, stem)
        steps = None if stem == "eval_every_" else 0
        for key, value in given.items():
            batch_size = 1 if key.endswith("steps") else config.global_batch_size
            examples = value * num_examples if key.endswith("epochs") else value
            if examples > MOST * batch_size:
                raise UserError(f"{key} is {value}; it must give at most {MOST} updates")
            steps = max(round(examples / batch_size), 1) if value else 0
        config.update_from_flattened_dict({f"{stem}steps": steps})


def check_batch_size(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where the mesh does not divide the batch, or a part of it."""
    size, parts = config.global_batch_size, config.optimizer.accumulate_steps
    sharding.check_batch_size("global_batch_size", size, mesh)
    if parts > 1:
        name = "global_batch_size / optimizer.accumulate_steps"
        sharding.check_batch_size(name, size // parts, mesh)


def check_eval_batch_size(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the mesh does not divide the batch of evaluations."""
    size = config.eval_batch_size or config.global_batch_size
    sharding.check_batch_size("eval_batch_size", size, mesh)


def find_initial(config: ConfigDict) -> loading.StoredWeights | None:
    """The weights that a new run starts from, not read yet; None where it starts from none.

    Raises:
      UserError: none there, or not for square images, which are all that training takes.
    """
    if not config.init_from:
        return None
    found = loading.find(config.init_from, image_size=config.init_image_size, log=print)
    height, width = found.card.image_size
    if height != width:
        raise UserError(
            f"init_from={found.path} is for images of {height} x {width}; training takes "
            "square ones"
        )
    if config.init_image_size not in (None, height):
        raise UserError(
            f"init_image_size={config.init_image_size}, and init_from={found.path} is for "
            f"images of {height} x {width}"
        )
    return found


def resolve(
    config: ConfigDict,
    *,
    initial: loading.StoredWeights | None,
    begun: dict[str, Any] | None = None,
) -> ConfigDict:
    """A copy of `config` in which everything is set that does not depend on the data.

    These are what the first weights decide of the model, and the op that `dataset.permutation`
    means. `resolve_data` sets the rest.

    Args:
      config: as its own command line says.
      initial: the run's first weights (`find_initial`).
      begun: saved config of the run that is continued, whose first weights may be gone.
    """
    config = config.copy_and_resolve_references()
    config.init_from = published.shown(config.init_from)  # it is saved: without secrets
    resolve_model(config, initial, begun)
    resolve_permutation(config)
    return config


def resolve_data(config: ConfigDict, num_classes: int | None, num_examples: int | None) -> None:
    """Sets the number of classes and every length in steps.

    Args:
      config: of `resolve`.
      num_classes: of the data; it may be None if the config says it.
      num_examples: of the training split; it may be None unless `needs_epochs`.
    """
    if config.model.num_classes is None:
        config.model.num_classes = num_classes
    resolve_lengths(config, num_examples if needs_epochs(config) else None)


def resolve_model(
    config: ConfigDict, found: loading.StoredWeights | None, old: dict[str, Any] | None
) -> None:
    """Sets what of the model the first weights decide.

    That is their GELU and, where the config has no variant and no dimensions, all of these; and the
    grown D_S at a larger image.

    Args:
      config: of the run; as its own command line has it.
      found: its first weights.
      old: config of the run that is continued, whose first weights need not be there any more.
    """
    if old:
        gelu, size = old["model"]["gelu"], old.get("init_image_size")
    else:
        gelu, size = (found.card.gelu, found.card.image_size[0]) if found else ("tanh", None)
    if config.model.gelu is None:
        config.model.gelu = gelu
    if config.init_image_size is None:
        config.init_image_size = size
    model = config.model
    architecture = ARCHITECTURES[DEFAULT]
    keys = architecture.dimensions
    if config.init_from and all(model[key] is None for key in ("variant", *keys)):
        if old:
            model.update({key: old["model"][key] for key in keys})
            return  # grown already, where it was
        model.update(found.card.dimensions)
    if config.init_image_size in (None, config.image_size) or config.init_resize != "grow":
        return
    # The grown MLP is K^2 times as wide, whatever width the weights have.
    given = {key: model[key] for key in keys if model[key]}
    dims = {**architecture.variants.get(model.variant, {}), **given}
    if len(dims) == len(keys):
        old, new = ((side, side) for side in (config.init_image_size, config.image_size))
        grown = grown_dimensions(architecture, dims, old, new)
        model.update({key: grown[key] for key in keys if grown[key] != dims[key]})


def resolve_permutation(config: ConfigDict) -> None:
    """Writes the step that `dataset.permutation` means into both preprocessings.

    Whoever reads the run's config then sees what the images went through. The seed is 0 and not
    the run's, so that runs of any seed, and what is fine-tuned from them, see the same images.
    """
    dataset, size = config.dataset, config.image_size
    if not dataset.permutation:
        return
    step = f"permute_pixels({size}, seed=0)"
    if dataset.permutation == "patches":
        # As the model has it, which may be a variant's; its classes may not be known yet.
        patch_size = make_model(**config.model.to_dict() | dict(num_classes=1)).patch_size
        check_image_size((size, size), patch_size)
        step = f"permute_patches({size}, {patch_size}, seed=0)"
    for key in ("train_preprocess", "eval_preprocess"):
        dataset[key] = str(parse(dataset[key]).with_image_op(step))


def check_classes(config: ConfigDict, class_names: tuple[str, ...]) -> None:
    """Raises UserError where the model's classes are not as many as the data's."""
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but the data has {len(class_names)} "
            "classes; leave it out to take the data's"
        )


def open_split(
    config: ConfigDict,
    which: str,
    class_names: tuple[str, ...] | None,
    *,
    augment: bool = False,
    subfolders: bool = True,
) -> pipeline.Split | None:
    """Opens the split "train", "val" or "test" of the config, None where the config has none.

    `augment` takes the preprocessing of training instead of that of evaluation; `subfolders` is as
    of `folder.scan`.
    """
    spec = config.dataset[f"{which}_split"]
    if not spec:
        if which == "train":
            raise UserError("dataset.train_split is empty; give a split such as train[:90%]")
        return None
    steps = config.dataset.train_preprocess if augment else config.dataset.eval_preprocess
    split = pipeline.open_split(
        config.dataset,
        spec,
        steps,
        image_size=(config.image_size, config.image_size),
        num_classes=config.model.num_classes,
        class_names=class_names,
        subfolders=subfolders,
    )
    if split.multi_label and config.loss == "softmax":
        raise UserError(
            f"{split.name} has several labels an image, or none; softmax needs one: set "
            "loss=sigmoid"
        )
    return split


def open_own_split(
    config: ConfigDict,
    which: str,
    class_names: tuple[str, ...] | None,
    record: dict[str, Any] | None,
) -> pipeline.Split | None:
    """As `open_split`, of a run's config, with the images that the run has read.

    A run of older code has read none in folders of a class folder. `record` is what the run's
    data.json says of its splits; None: the data is not a run's own.
    """
    split = open_split(config, which, class_names)
    before = (record or {}).get(which)
    if split is None or not before or not data_change(before, split):
        return split
    if not pipeline.has_subfolders(config.dataset):
        return split
    older = open_split(config, which, class_names, subfolders=False)
    return split if data_change(before, older) else older


def open_splits(
    config: ConfigDict,
    class_names: tuple[str, ...] | None,
    record: dict[str, Any] | None = None,
) -> Splits:
    """Opens all splits of the config, with the run's class names where it has some already.

    `record` is what the run has saved of its data. Runs begun by older code read no images in
    folders of a class folder, and go on without.
    """
    if config.dataset.name != "synthetic":  # which takes no steps
        for key in ("train_preprocess", "eval_preprocess"):
            if config.dataset[key]:  # both, before any data is read
                parse(config.dataset[key], (config.image_size, config.image_size))
    pipeline.forget_listings()
    subfolders = True if record is None else record.get("subfolders")
    if subfolders is None and pipeline.has_subfolders(config.dataset):
        splits = _open_splits(config, class_names, subfolders=False)
        if record["splits"]["train"]["fingerprint"] == splits.train.fingerprint:
            return splits
    return _open_splits(config, class_names, subfolders=subfolders is not False)


def _open_splits(
    config: ConfigDict, class_names: tuple[str, ...] | None, *, subfolders: bool
) -> Splits:
    train = open_split(config, "train", class_names, augment=True, subfolders=subfolders)
    val, test = (
        open_split(config, which, train.class_names, subfolders=subfolders)
        for which in ("val", "test")
    )
    remarks = pipeline.remarks(config.dataset, train, subfolders=subfolders)
    return Splits(train, val, test, remarks, subfolders)


def check_same_config(workdir: epath.Path, old: dict[str, Any], new: ConfigDict) -> None:
    """Raises UserError that names every key by which `new` would change a run begun with `old`."""
    changed = changes(old, new.to_dict())
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}. Give another "
            "--workdir, or --allow_config_change to continue it with the new values"
        )


def check_same_everywhere(mine: dict[str, Any], what: str) -> None:
    """Raises UserError where a process has other values than process 0, which it names.

    Where the data lies may differ from host to host; the data may not.
    """
    theirs = distributed.broadcast(mine)
    theirs, mine = (dict(_flatten(each)) for each in (theirs, mine))
    other = [
        f"{key}: {theirs.get(key)!r} -> {mine.get(key)!r}"
        for key in sorted(theirs.keys() | mine.keys())
        if theirs.get(key) != mine.get(key)
        and key not in ("dataset.data_dir", "dataset.label_file")
    ]
    if other:
        raise UserError(
            f"{distributed.process_name()} has other {what} than process 0: {'; '.join(other)}"
        )


def check_same_data(workdir: epath.Path, record: dict[str, Any], split: pipeline.Split) -> None:
    """Raises UserError where `split`, of training, is not the one of the run's record."""
    change = data_change(record["splits"]["train"], split)
    if change:
        raise UserError(
            f"the training data has changed since {workdir} was started: {change}. "
            "Bring it back, give another --workdir, or --allow_config_change"
        )


def data_change(old: dict[str, Any], split: pipeline.Split) -> str:
    """How a split differs from what a run has saved of it; "" where it does not.

    Sizes of files are compared where both are known: older code saved none.
    """
    before, stored = old.get("files"), split.stored()
    now = stored.record() if before and stored else None
    resized = now is not None and before["sizes"] != now["sizes"]
    if old["fingerprint"] == split.fingerprint and not resized:
        return ""
    change = (
        f"{old['name']} with {old['num_examples']:,} examples, now {split.name} with "
        f"{split.num_examples:,}"
    )
    if not resized:
        return change
    change += f" ({before['num_bytes']:,} bytes, now {now['num_bytes']:,})"
    rows = [
        list(zip(each.get("class_files") or (), each.get("class_bytes") or (), strict=False))
        for each in (before, now)
    ]
    pairs = zip(*rows, strict=False)
    label = next((label for label, (one, two) in enumerate(pairs) if one != two), None)
    if label is None and before["num_bytes"] == now["num_bytes"]:
        return f"{change}: single files have other names, or other sizes"
    if label is not None:
        (files, num_bytes), (files_now, num_bytes_now) = (row[label] for row in rows)
        change += (
            f"; class {split.class_names[label]!r} had {files:,} images of {num_bytes:,} bytes and "
            f"has {files_now:,} of {num_bytes_now:,}"
        )
    newest = stored.newest(label) if now["num_files"] >= before["num_files"] else ""
    return change + (newest and f", changed last is {folder.displayed(newest)}")


def data_name(config: ConfigDict) -> str:
    """What a config's data is called: its data set, or of a folder the folder's name."""
    dataset = config.dataset
    return (dataset.name == "folder" and epath.Path(dataset.data_dir).name) or dataset.name


def data_record(splits: Splits, num_readers: int) -> dict[str, Any]:
    """What `data.json` holds; `num_readers` is how many processes began to read the data."""
    opened = {which: getattr(splits, which) for which in ("train", "val", "test")}
    return {
        "class_names": list(splits.train.class_names),
        "num_readers": num_readers,
        "subfolders": splits.subfolders,
        "splits": {
            which: {
                "name": split.name,
                "num_examples": split.num_examples,
                "fingerprint": split.fingerprint,
                **_files_record(split),
            }
            for which, split in opened.items()
            if split is not None
        },
    }


def _files_record(split: pipeline.Split) -> dict[str, Any]:
    stored = split.stored()
    record = stored and stored.record()
    return {"files": record} if record else {}


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, on process 0 alone."""
    if distributed.is_main():
        run_files.write_json(path, value)


def record_result(
    directory: epath.PathLike,
    name: str,
    weights: Mapping[str, Any],
    which: str,
    result: dict[str, Any],
    *,
    section: str = "splits",
) -> epath.Path:
    """Enters a result in `results.json`, or `results_<name>.json` if not "last".

    Other results stay, where they are of the same weights. Process 0 alone writes.

    Args:
      directory: a run, or where results go.
      name: "last", "best" or a step's number.
      weights: what they are, such as {"step": 2000}; it stands in the file.
      which: what is entered, such as "val".
      result: what JSON can hold.
      section: of the file: "splits", or what else an evaluation finds.
    """
    path = run_files.results_path(directory, name)
    if not distributed.is_main():
        return path
    weights = json.loads(json.dumps(weights))
    old = run_files.read_results(directory, name) or {}
    if not is_of(old, weights):
        old = weights
        path.with_suffix(".md").unlink(missing_ok=True)  # a card of those
    run_files.write_json(path, {**old, section: {**old.get(section, {}), which: result}})
    return path


def is_of(results: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    """Whether the content of a results.json is of `weights`, as of `record_result`."""
    weights = {"weights": None, **json.loads(json.dumps(weights))}
    return {key: results.get(key) for key in weights} == weights


def read_run(workdir: epath.PathLike) -> tuple[ConfigDict, tuple[str, ...]]:
    """The config, with every key of today's code, and the class names of a run.

    Raises:
      UserError: the directory is no run, or a file of it is damaged.
    """
    config = run_files.read_config(workdir)
    if config is not None:
        check_trained(workdir, config)
    data = run_files.read_data(workdir)
    files = {"config.json": config, "data.json": data}
    if missing := [name for name, value in files.items() if value is None]:
        raise UserError(f"{workdir} is no run: it holds no {' and no '.join(missing)}")
    class_names = tuple(data["class_names"])
    config = ConfigDict(run_files.completed(config))
    if config.model.num_classes is None:
        config.model.num_classes = len(class_names)
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"{workdir}: config.json has model.num_classes={config.model.num_classes}, and "
            f"data.json {len(class_names)} class_names"
        )
    return config, class_names


def read_begun(
    workdir: epath.PathLike, *, allow_config_change: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Config and data that bind a run with checkpoints; None where one is missing and may be.

    Raises:
      UserError: a file is damaged, or missing without `allow_config_change`; or the weights are
        converted ones.
    """
    config = run_files.read_config(workdir)
    if config is not None:
        check_trained(workdir, config)
    data = run_files.read_data(workdir)
    for name, value in (("config.json", config), ("data.json", data)):
        if value is None and not allow_config_change:
            raise UserError(
                f"{epath.Path(workdir) / name} is missing, and {workdir} has checkpoints: what the "
                "run was begun with is not known. Bring the file back, give another --workdir, or "
                "--allow_config_change to continue with what the command says"
            )
    return config, data


def check_place(workdir: epath.Path) -> None:
    """Raises UserError where a name of a run's is that of something else."""
    if "://" in os.fspath(workdir):
        return
    for names, is_right, what in (
        (DIRECTORIES, os.path.isdir, "directory"),
        (FILES, os.path.isfile, "regular file"),
    ):
        for path in (workdir / name for name in names):
            if os.path.lexists(path) and not is_right(path):
                raise UserError(f"{path} is no {what}, which a run has there; move it away")


def check_trained(workdir: epath.PathLike, config: dict[str, Any]) -> None:
    """Raises UserError where `workdir` holds weights that mixer.tools.convert has put there."""
    if "total_steps" not in config:
        raise UserError(
            f"{workdir} holds converted weights and no training run; they can be the first weights "
            f"of one: --config.init_from={workdir} with another --workdir"
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines such as "schedule.decay: 'cosine' -> 'linear'" for each key that binds a run."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    for values in (before, after):  # older code saved addresses with their query
        if values.get("init_from"):
            values["init_from"] = published.shown(values["init_from"])
    for key in [f"{stem}{unit}" for stem in LENGTHS for unit in UNITS[1:]]:
        before.pop(key, None)  # the steps that came of them bind the run
    return [
        f"{key}: {before[key]!r} -> {after.get(key)!r}"
        for key in sorted(before)  # a key that later code has added says nothing of the run
        if before[key] != after.get(key)
        and not any(key == free or (free[-1] == "." and key.startswith(free)) for free in FREE_KEYS)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.loads(json.dumps(value))  # JSON knows no tuples

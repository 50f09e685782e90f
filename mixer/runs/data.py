"""Opens the data of a config, and compares it with the data that a run has recorded.

In a run directory, `data.json` holds the class names and the fingerprints of the data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mixer import sizes
from mixer.data import splits as pipeline
from mixer.data.preprocessing.spec import parse
from mixer.data.sources import folder
from mixer.errors import UserError, printable
from mixer.training import losses

SPLIT_KEYS = ("train_split", "val_split", "test_split")  # of the config's `dataset`
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits that a config names; `val` and `test` are None if it names none.

    Attributes:
      train, val, test: the splits.
      remarks: lines about the data for the user.
      subfolders: whether images in folders of a class folder are read (`folder.scan`).
      specs: the split keys of `dataset`, without "auto".
      choice: a line on the splits that "auto" has chosen; "" if it has chosen none.
    """

    train: pipeline.Split
    val: pipeline.Split | None
    test: pipeline.Split | None
    remarks: Sequence[str] = ()
    subfolders: bool = True
    specs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choice: str = ""


def check_classes(config: ConfigDict, class_names: tuple[str, ...]) -> None:
    """Raises UserError if the model and the data have different numbers of classes."""
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but the data has {len(class_names)} "
            "classes; omit it to use the number in the data"
        )


def choose_splits(config: ConfigDict, names: Sequence[str] | None = None) -> str:
    """Replaces every split "auto" of the config by a split that the data has.

    A split that the data has is used as a whole. If the data has neither a validation nor a test
    split, 10 % of the training split are held out for each; if it has only a test split, 10 % for
    validation. Nothing is held out of a training split that the user has set. A split that the data
    lacks becomes empty.

    Args:
      config: the config; it is modified.
      names: names of the splits of the data; None: they are read from the data.

    Returns:
      A line for the user on the splits; "" if no split is "auto".

    Raises:
      UserError: the data has several splits for validation.
    """
    dataset = config.dataset
    keys = [key for key in SPLIT_KEYS if dataset[key] == AUTO]
    if not keys:
        return ""
    if names is None:
        names = pipeline.split_names(dataset)
    listed = folder.listed(names)
    val_names = [name for name in folder.VAL_SPLITS if name in names]
    if "val_split" in keys and len(val_names) > 1:
        raise UserError(
            f"dataset.val_split=auto, but {data_name(config)} has several splits for validation: "
            f"{' and '.join(val_names)}; expected one of them as dataset.val_split"
        )
    has_train, has_test = (name in names for name in (folder.TRAIN_SPLIT, folder.TEST_SPLIT))
    specs = {
        "train_split": folder.TRAIN_SPLIT if has_train else "",
        "val_split": val_names[0] if val_names else "",
        "test_split": folder.TEST_SPLIT if has_test else "",
    }
    if "train_split" in keys and has_train and not val_names:
        held_out = ["val_split"] if has_test else ["val_split", "test_split"]
        held_out = [key for key in held_out if key in keys]
        start = 100 - 10 * len(held_out)
        specs["train_split"] = f"train[:{start}%]" if held_out else folder.TRAIN_SPLIT
        for key, low in zip(held_out, (start, start + 10), strict=False):
            specs[key] = f"train[{low}%:]" if low == 90 else f"train[{low}%:{low + 10}%]"
    dataset.update({key: specs[key] for key in keys})
    uses = zip(("training", "validation", "test"), SPLIT_KEYS, strict=True)
    listed_splits = ", ".join(f"{use} {dataset[key] or 'none'}" for use, key in uses)
    return f"splits: {listed_splits} (chosen among {listed})"


def class_weights(config: ConfigDict, split: pipeline.Split) -> np.ndarray | None:
    """Returns the weights of the classes in the loss, (K,) float32; None if all are 1.

    They are a function of `class_balance` and of the labels of the training split.

    Raises:
      UserError: the split is too large to count its labels at the start of a run.
    """
    if not config.class_balance:
        return None
    counts = split.class_counts()
    if counts is None:
        if split.order_depends_on_readers:
            raise UserError(
                f"class_balance={config.class_balance} needs the labels of {split.name}, which are "
                "stored with its images; expected 0 for a TFDS set above 2 GiB"
            )
        labels = split.labels()
        counts = np.bincount(labels[labels >= 0], minlength=len(split.class_names))
    return losses.class_weights(counts, config.class_balance)


def open_split(
    config: ConfigDict,
    split_name: str,
    class_names: tuple[str, ...] | None,
    *,
    augment: bool = False,
    subfolders: bool = True,
) -> pipeline.Split | None:
    """Opens the split "train", "val" or "test" of the config; returns None if it is not set.

    `augment` selects the training preprocessing instead of the evaluation preprocessing;
    `subfolders` is the argument of `folder.scan`. A split "auto" is replaced in the config.
    """
    choose_splits(config)
    spec = config.dataset[f"{split_name}_split"]
    if not spec:
        if split_name == "train":
            names = pipeline.split_names(config.dataset)
            raise UserError(
                "dataset.train_split is empty; expected a split such as train[:90%]; the splits of "
                f"{data_name(config)} are {folder.listed(names)}"
                f"{pipeline.layout_hint(config.dataset)}"
            )
        return None
    preprocess = config.dataset.train_preprocess if augment else config.dataset.eval_preprocess
    split = pipeline.open_split(
        config.dataset,
        spec,
        preprocess,
        image_size=sizes.pair(config.image_size),
        channels=config.model.in_channels,
        num_classes=config.model.num_classes,
        class_names=class_names,
        subfolders=subfolders,
    )
    if split.multi_label and config.loss == "softmax":
        raise UserError(
            f"{split.name} has images with several labels or none; loss=softmax needs one label "
            "per image (set loss=sigmoid)"
        )
    return split


def open_own_split(
    config: ConfigDict,
    split_name: str,
    class_names: tuple[str, ...] | None,
    record: dict[str, Any] | None,
) -> pipeline.Split | None:
    """Opens a split of a run's config with the same images that the run has read.

    Runs of older code did not read images in subfolders of a class folder. `record` is the entry
    "splits" of the run's data.json; None if the data is not the run's own.
    """
    split = open_split(config, split_name, class_names)
    saved_split = (record or {}).get(split_name)
    if split is None or not saved_split or not describe_change(saved_split, split):
        return split
    if not pipeline.has_subfolders(config.dataset):
        return split
    flat_split = open_split(config, split_name, class_names, subfolders=False)
    return split if describe_change(saved_split, flat_split) else flat_split


def open_splits(
    config: ConfigDict,
    class_names: tuple[str, ...] | None,
    record: dict[str, Any] | None = None,
) -> Splits:
    """Opens all splits of the config, with the run's class names if it has saved some.

    `record` is the content of the run's data.json. Runs that older code started do not read images
    in subfolders of a class folder, and continue without them. Splits "auto" are replaced in the
    config.
    """
    if config.dataset.name != "synthetic":  # synthetic data is not preprocessed
        for key in ("train_preprocess", "eval_preprocess"):
            if config.dataset[key]:  # check both specs before any data is read
                parse(
                    config.dataset[key],
                    sizes.pair(config.image_size),
                    channels=config.model.in_channels,
                )
    pipeline.forget_listings()
    choice = choose_splits(config)
    subfolders = True if record is None else record.get("subfolders")
    if subfolders is None and pipeline.has_subfolders(config.dataset):
        splits = _open_splits(config, class_names, subfolders=False)
        if record["splits"]["train"]["fingerprint"] == splits.train.fingerprint:
            return splits
    splits = _open_splits(config, class_names, subfolders=subfolders is not False)
    return dataclasses.replace(splits, choice=choice)


def _open_splits(
    config: ConfigDict, class_names: tuple[str, ...] | None, *, subfolders: bool
) -> Splits:
    train = open_split(config, "train", class_names, augment=True, subfolders=subfolders)
    val, test = (
        open_split(config, split_name, train.class_names, subfolders=subfolders)
        for split_name in ("val", "test")
    )
    remarks = pipeline.remarks(config.dataset, train, subfolders=subfolders)
    specs = {key: config.dataset[key] for key in SPLIT_KEYS}
    return Splits(train, val, test, remarks, subfolders, specs)


def check_same_data(workdir: epath.Path, record: dict[str, Any], split: pipeline.Split) -> None:
    """Raises UserError if the training split differs from the split in the run's data.json."""
    if change := describe_change(record["splits"]["train"], split):
        raise UserError(
            f"the training data has changed since {workdir} was started: {change}. "
            "Restore the data, or pass another --workdir or --allow_config_change"
        )


def describe_change(old: dict[str, Any], split: pipeline.Split) -> str:
    """Describes how a split differs from the saved record of it; "" if it does not.

    File sizes are compared if both records have them; older code saved none.
    """
    old_files, stored = old.get("files"), split.stored
    new_files = stored.record() if old_files and stored else None
    has_new_sizes = new_files is not None and old_files["sizes"] != new_files["sizes"]
    if old["fingerprint"] == split.fingerprint and not has_new_sizes:
        return ""
    change = (
        f"{old['name']} with {old['num_examples']:,} examples, now {split.name} with "
        f"{split.num_examples:,}"
    )
    if not has_new_sizes:
        return change
    change += f" ({old_files['num_bytes']:,} bytes, now {new_files['num_bytes']:,})"
    rows = [
        list(zip(files.get("class_files") or (), files.get("class_bytes") or (), strict=False))
        for files in (old_files, new_files)
    ]
    pairs = zip(*rows, strict=False)
    label = next(
        (label for label, (old_row, new_row) in enumerate(pairs) if old_row != new_row), None
    )
    if label is None and old_files["num_bytes"] == new_files["num_bytes"]:
        return f"{change}: some files have other names or other sizes"
    if label is not None:
        (old_count, old_bytes), (new_count, new_bytes) = (row[label] for row in rows)
        change += (
            f"; class {split.class_names[label]!r} had {old_count:,} images of {old_bytes:,} bytes "
            f"and now has {new_count:,} of {new_bytes:,}"
        )
    newest = stored.newest(label) if new_files["num_files"] >= old_files["num_files"] else ""
    return change + (newest and f"; the last changed file is {printable(newest)}")


def data_name(config: ConfigDict) -> str:
    """Returns the name of a config's data: its data set, or the name of its folder."""
    dataset = config.dataset
    return (dataset.name == "folder" and epath.Path(dataset.data_dir).name) or dataset.name


def data_record(splits: Splits, num_readers: int) -> dict[str, Any]:
    """Returns the content of `data.json`; `num_readers` processes started to read the data."""
    split_records = {}
    for key in ("train", "val", "test"):
        if split := getattr(splits, key):
            fields = ("name", "num_examples", "fingerprint")
            split_records[key] = {field: getattr(split, field) for field in fields}
            stored = split.stored
            if stored and (files_record := stored.record()):
                split_records[key]["files"] = files_record
    return {
        "class_names": list(splits.train.class_names),
        "num_readers": num_readers,
        "subfolders": splits.subfolders,
        "splits": split_records,
    }

"""The data sets of `evaluate.py --suite` and `config.eval_suite`."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mixer import files, sizes
from mixer.data import splits as pipeline
from mixer.data.imagenet import names as imagenet_names
from mixer.data.imagenet import real as imagenet_real
from mixer.data.preprocessing.spec import with_channels
from mixer.data.sources import folder
from mixer.errors import UserError, check_choice
from mixer.runs import data as run_data


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set to evaluate on.

    Attributes:
      dataset: TFDS name.
      split: TFDS split, such as "validation".
      label_key: as `dataset.label_key` in a config.
      classes: the list of classes in mixer/data/imagenet/names.py that the labels index; "" if the
        data set has its own.
      mean_per_class: whether papers report mean per-class accuracy instead of top-1.
      num_images: number of images behind published accuracies; 0 if there are none.
    """

    dataset: str
    split: str
    label_key: str = ""
    classes: str = ""
    mean_per_class: bool = False
    num_images: int = 0


IMAGENET = "imagenet1k"
# In this order: ImageNet's validation set; the last 1 % of its training set, which the recipes hold
# out; its validation set with ReaL labels; the matched-frequency images of Recht et al., 2019.
TASKS = {
    "imagenet_val": Task("imagenet2012", "validation", classes=IMAGENET, num_images=50_000),
    "imagenet_minival": Task("imagenet2012", "train[99%:]", classes=IMAGENET),
    "imagenet_real": Task(
        "imagenet2012", "validation", "real_label", classes=IMAGENET, num_images=50_000
    ),
    "imagenet_v2": Task(
        "imagenet_v2/matched-frequency", "test", classes=IMAGENET, num_images=10_000
    ),
    "cifar10": Task("cifar10", "test"),
    "cifar100": Task("cifar100", "test"),
    "oxford_iiit_pet": Task("oxford_iiit_pet", "test", mean_per_class=True),
    "oxford_flowers102": Task("oxford_flowers102", "test", mean_per_class=True),
    "digits": Task("digits", "test"),
}
# Data sets of the few-shot probe, as in big_vision's `common_fewshot`: TFDS name, split that the
# shots are drawn from, test split. ImageNet's first 65,000 images have at least 30 of every class.
FEWSHOT = {
    "caltech101": ("caltech101", "train", "test"),
    "cars196": ("cars196", "train", "test"),
    "cifar100": ("cifar100", "train", "test"),
    "dtd": ("dtd", "train", "test"),
    "imagenet": ("imagenet2012", "train[:65000]", "validation"),
    "pets": ("oxford_iiit_pet", "train", "test"),
    "uc_merced": ("uc_merced", "train[:1000]", "train[1000:]"),
}
GROUPS = {"imagenet": tuple(name for name in TASKS if name.startswith("imagenet_"))}


def expand(names: Sequence[str], probes: Sequence[str] = ()) -> list[str]:
    """Expands groups to their tasks; returns the names without duplicates, in order.

    Args:
      names: names of tasks, groups and probes, from the user.
      probes: valid names that are neither tasks nor groups; they are not expanded.

    Raises:
      UserError: a name is unknown.
    """
    tasks: dict[str, None] = {}
    for name in names:
        hint = "vtab and transfer are suites of evaluate.py only"
        check_choice("suite", name, (*GROUPS, *probes, *TASKS), hint=hint)
        tasks |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(tasks)


def dataset_config(name: str, data_dir: str, label_key: str = "") -> ConfigDict:
    """Returns the keys of `config.dataset` that the evaluation of a data set reads."""
    return ConfigDict(
        dict(name=name, data_dir=data_dir, label_key=label_key)
        | dict(label_file="", class_order="sorted", exclude="", shuffle_group_size=1)
    )


def open_task(
    name: str,
    *,
    preprocess: str,
    image_size: tuple[int, int],
    channels: int = sizes.RGB_CHANNELS,
    data_dir: str = "",
) -> pipeline.Split:
    """Opens the images of a task.

    Args:
      name: a key of TASKS.
      preprocess: preprocessing of each image.
      image_size: (H, W) after the preprocessing.
      channels: number of channels after the preprocessing.
      data_dir: data directory of TFDS; or, for imagenet_val and imagenet_real, a folder of the
        validation images.

    Raises:
      UserError: the data is missing or invalid.
    """
    task = TASKS[name]
    root = files.parse_path("--data_dir", data_dir)
    if task.dataset == "digits" and not (root / "digits").is_dir():
        data_dir = ""  # do not write the digits, which are generated, to the user's image folder
    dataset = dataset_config(task.dataset, data_dir, label_key=task.label_key)
    options = dict(image_size=image_size, channels=channels, num_classes=None)
    if task.classes == IMAGENET and data_dir and not _has_tfds(data_dir, task.dataset):
        lines = _folder_lines(name, root)
        with tempfile.TemporaryDirectory() as directory:
            # The file is temporary, because only `open_split` reads it.
            file = Path(directory) / "labels.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            dataset.update(name="folder", label_key="", label_file=str(file))
            options["num_classes"] = len(imagenet_names.synsets(IMAGENET))
            split = pipeline.open_split(dataset, task.split, preprocess, **options)
        return dataclasses.replace(
            split, name=f"{data_dir} {name}", class_names=imagenet_names.synsets(IMAGENET)
        )
    return pipeline.open_split(dataset, task.split, preprocess, **options)


def open_fewshot(
    image_size: tuple[int, int], data_dir: str = "", *, channels: int = sizes.RGB_CHANNELS
) -> dict[str, tuple[pipeline.Split, pipeline.Split]]:
    """Opens the training and test split of each prepared data set of FEWSHOT.

    Images are resized to a square of 8/7 of `image_size` and cropped centrally, as in big_vision.
    If `image_size` is not square, they are resized to it without a crop.

    Raises:
      UserError: no data set is prepared.
    """
    from mixer.data.sources import stored as sources

    height, width = image_size
    preprocess = f"decode|resize({height * 8 // 7})|central_crop({height})"
    if height != width:
        preprocess = f"decode|resize(({height}, {width}))"
    preprocess = with_channels(preprocess, channels)
    options = dict(image_size=image_size, channels=channels, num_classes=None)
    splits_by_name = {}
    for name, (dataset, *splits) in FEWSHOT.items():
        if not sources.tfds_builder(dataset, data_dir, prepared=False).is_prepared():
            continue
        config = dataset_config(dataset, data_dir)
        splits_by_name[name] = tuple(
            pipeline.open_split(config, split, preprocess, **options) for split in splits
        )
    if not splits_by_name:
        sets = ", ".join(dataset for dataset, *_ in FEWSHOT.values())
        raise UserError(
            f"--suite=fewshot: none of {sets} is prepared; prepare one with `python -m "
            "mixer.tools.prepare tfds NAME`, or pass --config=FILE for other data"
        )
    return splits_by_name


def check_preprocess(weights: str, preprocess: str | None, image_size: tuple[int, int]) -> None:
    """Raises UserError if the preprocessing of the weights is unknown."""
    if not preprocess:
        height, width = image_size
        raise UserError(
            f"{weights}: the preprocessing to {height} x {width} is unknown; pass it, as in "
            f"--preprocess='decode|resize(({height}, {width}))' (in a run: dataset.eval_preprocess)"
        )


def open_suite(
    config: ConfigDict, splits: run_data.Splits, probes: Sequence[str]
) -> tuple[dict[str, pipeline.Split], list[str]]:
    """Opens the data sets of `config.eval_suite` with the run's image size and preprocessing.

    Args:
      config: config of the run.
      splits: splits of the run.
      probes: valid names of probes, which are not data sets.

    Returns:
      The splits by name, and the names of the probes.

    Raises:
      UserError: a name is unknown, or data is missing or has other classes than the run.
    """
    names = expand([name for name in config.eval_suite.split(",") if name], probes=probes)
    if names and splits.val is None:
        raise UserError(
            f"eval_suite={config.eval_suite!r} needs a validation split; dataset.val_split is empty"
        )
    size = sizes.pair(config.image_size)
    if names:
        check_preprocess("eval_suite", config.dataset.eval_preprocess, size)
    tasks = {
        name: open_task(
            name,
            preprocess=config.dataset.eval_preprocess,
            image_size=size,
            channels=config.model.in_channels,
            data_dir=config.dataset.data_dir if config.dataset.name != "folder" else "",
        )
        for name in names
        if name in TASKS
    }
    for split in tasks.values():
        check_classes(split, splits.train.class_names, config.model.num_classes)
    return tasks, [name for name in names if name in probes]


def is_prepared(name: str, data_dir: str = "") -> bool:
    """Whether the images of a task are available."""
    task = TASKS[name]
    if task.classes == IMAGENET and data_dir and not _has_tfds(data_dir, task.dataset):
        try:
            return bool(_folder_lines(name, files.parse_path("--data_dir", data_dir)))
        except UserError:
            return False
    from mixer.data.sources import stored as sources

    if task.dataset == "digits":
        return True
    return sources.tfds_builder(task.dataset, data_dir, prepared=False).is_prepared()


def _has_tfds(data_dir: str, dataset: str) -> bool:
    directory = files.parse_path("--data_dir", data_dir)
    return any((directory / name).is_dir() for name in (dataset.split("/")[0], "imagenet2012"))


def _folder_lines(name: str, root: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a label file for a folder of ImageNet's validation images.

    The images are in the folder, in a subfolder `val` or `validation`, or in folders named by
    synset. ReaL needs the number of each image. It is read from the file name; if the files were
    renamed, all 50,000 images must be present and their names must sort in the original order.
    """
    if not root.is_dir():
        raise UserError(f"--data_dir={root} is not a folder")
    if name not in ("imagenet_val", "imagenet_real"):
        raise UserError(
            f"{name} can only be read from TFDS; expected a TFDS folder imagenet2012 or "
            f"imagenet_v2 in {root}"
        )
    prefix = next((f"{name}/" for name in ("val", "validation") if (root / name).is_dir()), "")
    root = root / prefix
    top = folder.list_folder(root, b"")
    images = [name for name, _ in top.files]
    for synset, _ in top.folders:
        if re.fullmatch(rb"n\d{8}", synset):
            images += [file for file, _ in folder.walk(root, synset, skipped_folders=(b"",))]
    images = [file for file in images if folder.ending(file) in folder.LISTED]
    paths = [file.decode("utf-8", "surrogateescape") for file in images]
    paths.sort(key=lambda path: path.rpartition("/")[2])
    if not paths:
        raise UserError(
            f"--data_dir={root} contains no images of ImageNet's validation set; expected images "
            "in this folder or in subfolders such as n01440764"
        )
    split = TASKS[name].split
    if name == "imagenet_val":
        synsets = {synset: label for label, synset in enumerate(imagenet_names.synsets(IMAGENET))}
        if stray_paths := [path for path in paths if path.partition("/")[0] not in synsets]:
            raise UserError(
                f"{root}/{stray_paths[0]} is not in the folder of a synset; imagenet_val expects "
                "images in folders such as n01440764 (imagenet_real does not)"
            )
        return [
            {"path": prefix + path, "labels": synsets[path.partition("/")[0]], "split": split}
            for path in paths
        ]
    numbers = [imagenet_real.image_number(path) for path in paths]
    if None in numbers:
        is_flat = not any("/" in path for path in paths)
        # With names of several lengths, 2.jpg would come after 10.jpg.
        have_one_length = len({len(path) for path in paths}) == 1
        if len(paths) != imagenet_real.NUM_IMAGES or not is_flat or not have_one_length:
            raise UserError(
                f"{root}/{paths[numbers.index(None)]}, one of {len(paths):,} images, has no number "
                "in its name; expected a name such as ILSVRC2012_val_00000001.JPEG, or all "
                f"{imagenet_real.NUM_IMAGES:,} images in one folder, with names of equal length "
                "in the original order"
            )
        numbers = range(len(paths))
    if len(set(numbers)) < len(numbers):
        duplicate = next(number for number in numbers if list(numbers).count(number) > 1)
        raise UserError(f"{root} contains image {duplicate + 1} of ImageNet's validation set twice")
    return [
        {"path": prefix + path, "labels": imagenet_real.image_labels(number), "split": split}
        for path, number in zip(paths, numbers, strict=True)
    ]


def names_for(dataset: Any, class_names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns the class names of the weights that a folder's labels are looked up in.

    The folder may have any part of these classes, in any order.

    Args:
      dataset: the config's `dataset`.
      class_names: as in `check_classes`.

    Returns:
      The names; None if the weights do not list any, or the labels are not names of a folder's
      classes: then the classes of weights and data must be the same.
    """
    if class_names is None or not pipeline.has_named_classes(dataset):
        return None
    data_names = set(pipeline.classes_in_data(dataset))
    lists = _name_lists(class_names)
    return next((names for names in lists if data_names <= set(names)), lists[0])


def _name_lists(class_names: str | Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the forms of the class names of weights: for ImageNet, words and synsets."""
    if isinstance(class_names, str):
        return [imagenet_names.class_names(class_names), imagenet_names.synsets(class_names)]
    return [tuple(class_names)]


def check_classes(
    split: pipeline.Split, class_names: str | Sequence[str] | None, num_classes: int
) -> str:
    """Checks that weights and a split have the same classes in the same order.

    Args:
      split: the split to evaluate on.
      class_names: class names of the weights, or the name of a list of classes; None: unknown.
      num_classes: number of outputs of the head.

    Returns:
      "", or a note on the assumption that is made if the class names of the weights are unknown.

    Raises:
      UserError: the classes differ.
    """
    split_names = split.class_names
    if not num_classes:
        raise UserError(
            f"the weights have no head; {split.name} needs a head (--suite=fewshot does not)"
        )
    if len(split_names) != num_classes:
        hint = ""
        if num_classes in imagenet_names.LISTS.values() and len(split_names) == 1000:
            hint = " (fine-tune them, or use the few-shot probe: --suite=fewshot)"
        raise UserError(
            f"{split.name} has {len(split_names):,} classes, and the weights' head has "
            f"{num_classes:,}; expected the same number{hint}"
        )
    if class_names is None:
        return (
            f"the class names of the weights are unknown; assuming those of {split.name}, in the "
            "same order"
        )
    weight_names = _name_lists(class_names)
    if tuple(split_names) in weight_names:
        return ""
    index = next(i for i in range(num_classes) if split_names[i] != weight_names[0][i])
    order = "in another order" if set(split_names) == set(weight_names[0]) else "different"
    raise UserError(
        f"the classes of {split.name} are {order}: class {index} is {split_names[index]!r}; "
        f"expected {weight_names[0][index]!r}, as in the weights"
    )

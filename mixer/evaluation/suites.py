"""What `evaluate.py --suite` and `config.eval_suite` name: sets of images with known classes."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mixer import files
from mixer.data import splits as pipeline
from mixer.data.imagenet import names as imagenet_names
from mixer.data.imagenet import real as imagenet_real
from mixer.data.sources import folder
from mixer.errors import UserError, check_choice
from mixer.runs import config as run


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of images to evaluate on.

    Attributes:
      dataset: TFDS name.
      split: such as "validation".
      label_key: as `dataset.label_key`.
      classes: the list of mixer/data/imagenet/names.py that the labels follow; "": the set's own.
      mean_per_class: whether papers report the mean over the classes in place of top-1.
      num_images: of the whole set, that published figures are of; 0: there are none.
    """

    dataset: str
    split: str
    label_key: str = ""
    classes: str = ""
    mean_per_class: bool = False
    num_images: int = 0


IMAGENET = "imagenet1k"
# ImageNet's validation set; the last 1 % of its training set, held out by the recipes; its
# validation set with ReaL's labels; the matched-frequency images of Recht et al., 2019.
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
# Sets of the few-shot probe and their splits [read: BV, common_fewshot]: the shots are drawn from
# the first, the second is the test. The first 65,000 of ImageNet hold 30 and more of every class.
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


TUNED = ("vtab", "transfer")  # suites that fine-tune: mixer/transfer.py


def expand(names: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """The tasks that `names` of tasks and groups stand for, each once, in order.

    Args:
      names: as the user gave them.
      others: names that stand for something else and are kept.

    Raises:
      UserError: an unknown name.
    """
    tasks: dict[str, None] = {}
    for name in names:
        hint = f"{' or '.join(TUNED)} as the only --suite"
        check_choice("suite", name, (*GROUPS, *others, *TASKS), hint=hint)
        tasks |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(tasks)


def open_task(
    name: str,
    *,
    preprocess: str,
    image_size: tuple[int, int],
    data_dir: str = "",
) -> pipeline.Split:
    """Opens the images of a task.

    Args:
      name: a key of TASKS.
      preprocess: the steps that each image takes.
      image_size: (H, W) that they give.
      data_dir: of TFDS; or, for imagenet_val and imagenet_real, a folder of the validation images.

    Raises:
      UserError: the data is not there, or not as it should be.
    """
    task = TASKS[name]
    root = files.parse_path("--data_dir", data_dir)
    if task.dataset == "digits" and not (root / "digits").is_dir():
        data_dir = ""  # they are made where they lack, and that is no folder of the user's images
    dataset = dict(name=task.dataset, data_dir=data_dir, label_key=task.label_key)
    dataset = ConfigDict(dataset | dict(label_file="", exclude="", shuffle_group_size=1))
    how = dict(image_size=image_size, num_classes=None)
    if task.classes == IMAGENET and data_dir and not _has_tfds(data_dir, task.dataset):
        lines = _folder_lines(name, root)
        with tempfile.TemporaryDirectory() as directory:
            # Read when it is opened, and never again.
            file = Path(directory) / "labels.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            dataset.update(name="folder", label_key="", label_file=str(file))
            classes = len(imagenet_names.synsets(IMAGENET))
            split = pipeline.open_split(
                dataset, task.split, preprocess, **how | dict(num_classes=classes)
            )
        return dataclasses.replace(
            split, name=f"{data_dir} {name}", class_names=imagenet_names.synsets(IMAGENET)
        )
    return pipeline.open_split(dataset, task.split, preprocess, **how)


def open_fewshot(
    image_size: tuple[int, int], data_dir: str = ""
) -> dict[str, tuple[pipeline.Split, pipeline.Split]]:
    """Training and test split of each set of FEWSHOT that is prepared.

    Images are resized to a square of 8/7 of `image_size`, and its middle is taken [read: BV];
    rectangles are resized to.

    Raises:
      UserError: none is.
    """
    from mixer.data.sources import stored as sources

    height, width = image_size
    preprocess = f"decode|resize({height * 8 // 7})|central_crop({height})"
    if height != width:
        preprocess = f"decode|resize(({height}, {width}))"
    opened = {}
    for name, (dataset, *splits) in FEWSHOT.items():
        if not sources.tfds_builder(dataset, data_dir, prepared=False).is_prepared():
            continue
        config = dict(name=dataset, data_dir=data_dir, label_key="", label_file="", exclude="")
        config = ConfigDict(config | dict(shuffle_group_size=1))
        how = dict(image_size=image_size, num_classes=None)
        opened[name] = tuple(
            pipeline.open_split(config, split, preprocess, **how) for split in splits
        )
    if not opened:
        sets = ", ".join(dataset for dataset, *_ in FEWSHOT.values())
        raise UserError(
            f"--suite=fewshot: none of {sets} is prepared; prepare one with `python -m "
            "mixer.tools.prepare tfds NAME`, or give --config=FILE for other data"
        )
    return opened


def check_preprocess(weights: str, preprocess: str | None, image_size: tuple[int, int]) -> None:
    """Raises UserError where it is not known how images are made for the weights."""
    if not preprocess:
        height, width = image_size
        raise UserError(
            f"{weights}: how images are to be made {height} x {width} is not known; say it, as in "
            f"--preprocess='decode|resize(({height}, {width}))' (of a run: dataset.eval_preprocess)"
        )


def open_suite(
    config: ConfigDict, splits: run.Splits, probes: Sequence[str]
) -> tuple[dict[str, pipeline.Split], list[str]]:
    """Opens what `config.eval_suite` names, at the run's image size and with its preprocessing.

    Args:
      config: of the run.
      splits: its data.
      probes: names that are not data sets.

    Returns:
      The splits by name, and the names of the probes.

    Raises:
      UserError: an unknown name, data that is missing or has other classes than the run.
    """
    names = expand([name for name in config.eval_suite.split(",") if name], others=probes)
    if names and splits.val is None:
        raise UserError(
            f"eval_suite={config.eval_suite!r} is evaluated with the validation split, and "
            "dataset.val_split is empty"
        )
    size = (config.image_size, config.image_size)
    if names:
        check_preprocess("eval_suite", config.dataset.eval_preprocess, size)
    tasks = {
        name: open_task(
            name,
            preprocess=config.dataset.eval_preprocess,
            image_size=size,
            data_dir=config.dataset.data_dir if config.dataset.name != "folder" else "",
        )
        for name in names
        if name in TASKS
    }
    for split in tasks.values():
        check_classes(split, splits.train.class_names, config.model.num_classes)
    return tasks, [name for name in names if name in probes]


def is_prepared(name: str, data_dir: str = "") -> bool:
    """Whether the images of a task are here."""
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
    return any((directory / each).is_dir() for each in (dataset.split("/")[0], "imagenet2012"))


def _folder_lines(name: str, root: epath.Path) -> list[dict[str, Any]]:
    """A label file's lines for a folder of ImageNet's validation images.

    The images lie in the folder, in a folder `val` or `validation` in it, or in folders named by
    their synsets. ReaL needs their numbers in file order: their names have it, or, where they
    were renamed, all 50,000 are there and sort so.
    """
    if not root.is_dir():
        raise UserError(f"--data_dir={root} is no folder")
    if name not in ("imagenet_val", "imagenet_real"):
        raise UserError(
            f"{name} is read from TFDS alone, and {root} has no folder imagenet2012 or imagenet_v2 "
            "as TFDS makes them"
        )
    for inner in ("val", "validation"):
        if (root / inner).is_dir():
            root, prefix = root / inner, f"{inner}/"
            break
    else:
        prefix = ""
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
            f"--data_dir={root} holds no images of ImageNet's validation set; they lie in it or in "
            "folders such as n01440764"
        )
    split = TASKS[name].split
    if name == "imagenet_val":
        synsets = {synset: label for label, synset in enumerate(imagenet_names.synsets(IMAGENET))}
        if unknown := [path for path in paths if path.partition("/")[0] not in synsets]:
            raise UserError(
                f"{root}/{unknown[0]}: for imagenet_val the images lie in folders named by their "
                "synsets, such as n01440764; imagenet_real takes them without"
            )
        return [
            {"path": prefix + path, "labels": synsets[path.partition("/")[0]], "split": split}
            for path in paths
        ]
    numbers = [imagenet_real.image_number(path) for path in paths]
    if None in numbers:
        flat = not any("/" in path for path in paths)
        sorts = len({len(path) for path in paths}) == 1  # 2.jpg would stand behind 10.jpg
        if len(paths) != imagenet_real.NUM_IMAGES or not flat or not sorts:
            raise UserError(
                f"{root}/{paths[numbers.index(None)]}: its name has no number such as "
                f"ILSVRC2012_val_00000001.JPEG, and the {len(paths):,} images are not all of the "
                f"{imagenet_real.NUM_IMAGES:,} in one folder with names of one length, whose order "
                "would tell it"
            )
        numbers = range(len(paths))
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if list(numbers).count(number) > 1)
        raise UserError(f"{root} holds image {twice + 1} of ImageNet's validation set twice")
    return [
        {"path": prefix + path, "labels": imagenet_real.image_labels(number), "split": split}
        for path, number in zip(paths, numbers, strict=True)
    ]


def check_classes(
    split: pipeline.Split, class_names: str | Sequence[str] | None, num_classes: int
) -> str:
    """Checks that weights and a split are of the same classes, in the same order.

    Args:
      split: whose labels are to be guessed.
      class_names: of the weights, or the name of a list of them; None: not known.
      num_classes: width of their head.

    Returns:
      "" or, where the names of the weights are not known, what is assumed.

    Raises:
      UserError: other classes.
    """
    ours = split.class_names
    if not num_classes:
        raise UserError(
            f"the weights have no head, and {split.name} asks for one; --suite=fewshot needs none"
        )
    if len(ours) != num_classes:
        more = ""
        if num_classes in imagenet_names.LISTS.values() and len(ours) == 1000:
            more = "; fine-tune them, or take the few-shot probe (--suite=fewshot)"
        raise UserError(
            f"{split.name} has {len(ours):,} classes, and the weights' head has {num_classes:,}"
            f"{more}"
        )
    if class_names is None:
        return f"the weights do not say their classes: taken for {split.name}'s, in its order"
    if isinstance(class_names, str):
        known = [imagenet_names.class_names(class_names), imagenet_names.synsets(class_names)]
    else:
        known = [tuple(class_names)]
    if tuple(ours) in known:
        return ""
    place = next(i for i in range(num_classes) if ours[i] != known[0][i])
    order = " in another order" if set(ours) == set(known[0]) else ""
    raise UserError(
        f"{split.name} has other classes than the weights{order}: class {place} is "
        f"{ours[place]!r} there and {known[0][place]!r} here"
    )

"""OmniBenchmark: linear probes on many realms, each a data set of its own, and their mean.

The protocol follows the code of Zhang et al., 2022 (arXiv 2207.07106, `linear_probe`): a bicubic
resize of the short side, a central crop, frozen features, and a probe with the penalty lam * |W|.
The probe chooses lam on the realm's val.txt, as the benchmark's README asks; the benchmark's code
reports the best lam on the test split instead.

A realm is a folder with images and train.txt, val.txt and test.txt, whose lines are
`relative/path.jpg CLASS_NUMBER`.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from mixer import files, formatting
from mixer.data import splits as pipeline
from mixer.data.preprocessing.spec import with_channels
from mixer.data.sources import annotations, folder
from mixer.errors import UserError, check_choice
from mixer.evaluation import linear_probe, logistic, scores
from mixer.evaluation.evaluator import Batching
from mixer.evaluation.linear_probe import Splits
from mixer.evaluation.tables import Table, percent, span
from mixer.sizes import RGB_CHANNELS

REALMS = (
    *("activity", "aircraft", "amphibian", "aquatic_vertebrate", "bird", "car", "consumer_goods"),
    *("creation", "decoration", "device", "food", "geological_formation", "instrumentality"),
    *("locomotive", "mammal", "material", "military_vehicle", "process", "region", "structure"),
    "vascular_plant",
)
FILES = ("train.txt", "val.txt", "test.txt")
PENALTY = "norm"
# Ops of the model's own preprocessing that are applied to the realms too.
MODEL_OPS = ("permute_patches", "permute_pixels", "value_range")


def preprocessing(image_size: tuple[int, int], model_preprocess: str | None) -> str:
    """Returns the preprocessing of the images.

    Args:
      image_size: (H, W) of the model's input; if it is not square, images are resized without crop.
      model_preprocess: preprocessing of the data that the model was trained on, whose MODEL_OPS
        are appended; None if it is unknown.
    """
    height, width = image_size
    ops = f"decode|resize_small({height}, method='bicubic', antialias=True)|central_crop({height})"
    if height != width:
        ops = f"decode|resize(({height}, {width}), method='bicubic', antialias=True)"
    model_ops = [op.strip() for op in (model_preprocess or "").split("|")]
    return "|".join([ops, *(op for op in model_ops if op.startswith(MODEL_OPS))])


def open_realms(
    data_dir: str,
    names: Sequence[str] = (),
    *,
    image_size: tuple[int, int],
    channels: int = RGB_CHANNELS,
    preprocess: str | None,
    say: Callable[[str], None],
) -> dict[str, Splits]:
    """Opens the training, validation and test split of each realm, keyed by the realm's name.

    Args:
      data_dir: the folder that contains the folders of the realms.
      names: names of the realms to open; none: all.
      image_size: (H, W) of the model's input.
      channels: number of channels of the model's input.
      preprocess: preprocessing of the data that the model was trained on; None if it is unknown.
      say: prints a line about the realms of the benchmark that are missing.

    Raises:
      UserError: a folder, realm, annotation file or image does not exist, or an annotation file has
        an invalid line.
    """
    if not data_dir:
        raise UserError(
            "--suite=omnibenchmark: --data_dir is missing; expected the folder that contains the "
            "realms' folders, as in --data_dir=/data/omnibenchmark"
        )
    root = files.parse_path("--data_dir", data_dir)
    if not root.is_dir():
        raise UserError(
            f"--data_dir={root} is not a folder; expected the folder that contains the realms"
        )
    available = _list_realms(root)
    for name in names:
        check_choice("--tasks", name, available, hint=f"the realms in {root}")
    names = [name for name in available if name in (names or available)]
    missing_files = [
        f"{root}/{name}/{file}"
        for name in names
        for file in FILES
        if not (root / name / file).exists()
    ]
    if missing_files:
        raise UserError(
            f"annotation files are missing: {folder.listed(missing_files)}; expected "
            f"{', '.join(FILES)} in the folder of each realm"
        )
    if missing_realms := [name for name in REALMS if name not in names]:
        count = f"{len(missing_realms)} of the benchmark's {len(REALMS)} realms"
        say(f"{count} are not evaluated: {', '.join(missing_realms)}")
    realm_preprocess = with_channels(preprocessing(image_size, preprocess), channels)
    return {name: _open_realm(root / name, realm_preprocess, image_size) for name in names}


def _list_realms(root: epath.Path) -> list[str]:
    """Lists the folders that contain an annotation file or have the name of a realm."""
    folders = sorted(folder.decode(name) for name, _ in folder.list_folder(root, b"").folders)
    realms = [
        name
        for name in folders
        if name in REALMS or any((root / name / file).exists() for file in FILES)
    ]
    if not realms:
        raise UserError(
            f"--data_dir={root} contains no realms; expected folders such as {root}/bird with "
            f"{', '.join(FILES)}"
        )
    return realms


def _open_realm(directory: epath.Path, preprocess: str, image_size: tuple[int, int]) -> Splits:
    """Opens the three splits of the realm in a folder."""
    listings = [annotations.read_annotations(directory / file, directory) for file in FILES]
    count = 1 + max(int(listing.labels.max()) for listing in listings)
    class_names = tuple(str(number) for number in range(count))
    return linear_probe.assign(
        *(
            pipeline.open_listing(
                listing, preprocess, image_size=image_size, class_names=class_names
            )
            for listing in listings
        )
    )


def settings(splits: Splits) -> str:
    """Returns a digest of a realm's images, labels and preprocessing, and the probe's settings."""
    parts = [[split.fingerprint, str(split.preprocess)] for split in splits]
    parts.append([PENALTY, *linear_probe.LAMBDAS, logistic.TOLERANCE])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def evaluate(
    model: nn.Module,
    params: Mapping[str, Any],
    realms: Mapping[str, Splits],
    old_summaries: Mapping[str, Mapping[str, Any]],
    *,
    batching: Batching,
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluates the realms; yields the name in results.json and the result of each realm.

    Args:
      model: the model whose pre_logits are the features.
      params: sets of parameters of the model, by the suffix of the results' names, "" or "_ema".
      realms: the realms that `open_realms` returns.
      old_summaries: the results for the same weights in results.json, by name. A realm whose
        result has the same `settings` is not computed again.
      batching: the batches of images.
      say: prints a line when a realm starts and when it ends.
    """
    tasks = [(name, suffix) for name in realms for suffix in params]
    images = {name: sum(split.num_examples for split in realms[name]) for name in realms}
    digests = {name: settings(splits) for name, splits in realms.items()}
    is_done = {
        (name, suffix): old_summaries.get(name + suffix, {}).get("settings") == digests[name]
        for name, suffix in tasks
    }
    images_left = sum(images[name] for name, suffix in tasks if not is_done[name, suffix])
    images_done, seconds = 0, 0.0
    for number, (name, suffix) in enumerate(tasks, 1):
        progress = f"realm {number} of {len(tasks)}: {name}{suffix}"
        if is_done[name, suffix]:
            summary = dict(old_summaries[name + suffix])
            say(f"{progress}: {linear_probe.sentence(summary)}, already recorded")
            yield name + suffix, summary
            continue
        hint = ""
        if images_done:
            hint = f", about {formatting.duration(seconds / images_done * images_left)} left"
        say(f"{progress}: {images[name]:,} images{hint}")
        start = time.monotonic()
        result = linear_probe.evaluate(
            model,
            params[suffix],
            realms[name],
            batching=batching,
            penalty=PENALTY,
        )
        duration = time.monotonic() - start
        weights = "ema" if suffix else "params"
        summary = {"realm": name, "weights": weights, "settings": digests[name], **result.summary()}
        say(f"{progress}: {linear_probe.sentence(summary)}, took {formatting.duration(duration)}")
        yield name + suffix, summary
        seconds += duration
        images_done, images_left = images_done + images[name], images_left - images[name]


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over realms, which have equal weights. Accuracies are in 0..1.

    Attributes:
      name: "mean", or "mean (average)" for the moving average of the parameters.
      realms: names of the realms.
      top1, mean_per_class: means over the realms.
      top1_interval: 95 % interval (low, high), which covers only the sampling of test images.
    """

    name: str
    realms: tuple[str, ...]
    top1: float
    top1_interval: tuple[float, float]
    mean_per_class: float

    @property
    def extent(self) -> str:
        """The number of realms."""
        return f"{len(self.realms)} realm" + "s" * (len(self.realms) > 1)


def means(summaries: Mapping[str, Mapping[str, Any]]) -> list[Mean]:
    """Computes the mean over the realms for each set of parameters, from results.json."""
    results = []
    for weights, name in (("params", "mean"), ("ema", "mean (average)")):
        rows = [summary for summary in summaries.values() if summary["weights"] == weights]
        if not rows:
            continue
        top1, counts = (np.array([row[key] for row in rows]) for key in ("top1", "count"))
        results.append(
            Mean(
                name=name,
                realms=tuple(row["realm"] for row in rows),
                top1=float(top1.mean()),
                top1_interval=scores.mean_interval(top1, counts),
                mean_per_class=float(np.mean([row["mean_per_class"] for row in rows])),
            )
        )
    return results


def make_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Makes a table with a row per realm, then a row per mean."""
    realms = linear_probe.make_table(summaries, "realm")
    rows = list(realms.rows)
    for mean in means(summaries):
        figures = percent(mean.top1), span(mean.top1_interval), percent(mean.mean_per_class)
        rows.append((mean.name, mean.extent, *figures, "", ""))
    return Table(realms.header, rows)


def notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line per realm with its training data and remarks, then a line per mean."""
    texts = linear_probe.notes(summaries)
    for mean in means(summaries):
        text = f"{mean.name}: over {mean.extent}"
        if missing_realms := [realm for realm in REALMS if realm not in mean.realms]:
            text += f"; {len(missing_realms)} of the benchmark's {len(REALMS)} are missing: "
            text += ", ".join(missing_realms)
        texts.append(text)
    return texts

"""OmniBenchmark: the linear probe on many realms, each its own data set, and their mean.

The protocol is that of Zhang et al., 2022 (arXiv 2207.07106, `linear_probe` of its code) [read]:
frozen features of images whose short side is resized bicubically and whose middle is cropped; the
probe with the penalty lam * |W|. lam is chosen on the realm's val.txt, as the benchmark's README
asks; its code reports the best lam on the test split.

A realm is a folder with images and train.txt, val.txt and test.txt, whose lines are
`relative/path.jpg CLASS_NUMBER`.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mixer import files, formatting
from mixer.data import splits as pipeline
from mixer.data.preprocessing import spec
from mixer.data.sources import annotations, folder
from mixer.errors import UserError, nearest
from mixer.evaluation import linear_probe, scores
from mixer.models.mlp_mixer import MlpMixer

REALMS = (
    *("activity", "aircraft", "amphibian", "aquatic_vertebrate", "bird", "car", "consumer_goods"),
    *("creation", "decoration", "device", "food", "geological_formation", "instrumentality"),
    *("locomotive", "mammal", "material", "military_vehicle", "process", "region", "structure"),
    "vascular_plant",
)
FILES = ("train.txt", "val.txt", "test.txt")
PENALTY = "norm"

Splits = tuple[pipeline.Split, pipeline.Split, pipeline.Split]  # train, validation, test


def preprocessing(image_size: tuple[int, int], own: str | None) -> str:
    """The steps that an image takes.

    Args:
      image_size: (H, W) that the model takes; a rectangle is resized to.
      own: the steps of the model's own data, if they are known; what they do after all cropping
        and resizing (the range of the values, an order of the pixels) is done here too.
    """
    height, width = image_size
    steps = f"decode|resize_small({height}, method='bicubic', antialias=True)"
    steps += f"|central_crop({height})"
    if height != width:
        steps = f"decode|resize(({height}, {width}), method='bicubic', antialias=True)"
    kept = [
        step.text
        for step in (spec.parse(own) if own else ())
        if step.name in ("permute_patches", "permute_pixels", "value_range")
    ]
    return "|".join([steps, *kept])


def open_realms(
    data_dir: str,
    names: Sequence[str] = (),
    *,
    image_size: tuple[int, int],
    preprocess: str | None,
    say: Callable[[str], None],
) -> dict[str, Splits]:
    """The training, validation and test split of each realm, by its name.

    Args:
      data_dir: the folder of the realms' folders.
      names: realms to open; none: all that are there.
      image_size: (H, W) that the model takes.
      preprocess: of the model's own data; None: not known.
      say: gets a line on which of the benchmark's realms are missing.

    Raises:
      UserError: no such folder or realm, a file that is missing or not as it should be.
    """
    if not data_dir:
        raise UserError(
            "--suite=omnibenchmark: --data_dir is missing; expected the folder of the realms' "
            "folders, as in --data_dir=/data/omnibenchmark"
        )
    root = files.parse_path("--data_dir", data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir={root} is no folder; expected the folder of the realms")
    folders = sorted(folder.decode(name) for name, _ in folder.list_folder(root, b"").folders)
    present = [
        name
        for name in folders
        if name in REALMS or any((root / name / file).exists() for file in FILES)
    ]
    if not present:
        raise UserError(
            f"--data_dir={root} holds no realm; expected folders such as {root}/bird with "
            f"{', '.join(FILES)}"
        )
    for name in names:
        if name not in present:
            raise UserError(
                f"--tasks={name}: {root} has no such realm; expected one of {', '.join(present)}."
                f"{nearest(name, present)}"
            )
    chosen = [name for name in present if name in (names or present)]
    missing = [
        f"{root}/{name}/{file}"
        for name in chosen
        for file in FILES
        if not (root / name / file).exists()
    ]
    if missing:
        are = "annotation file is" if len(missing) == 1 else "annotation files are"
        raise UserError(f"{len(missing)} {are} missing: {folder.listed(missing)}")
    if absent := [name for name in REALMS if name not in chosen]:
        which = f"{len(absent)} of the benchmark's {len(REALMS)} realms"
        say(f"{which} are not evaluated: {', '.join(absent)}")
    steps = preprocessing(image_size, preprocess)
    return {name: _open_realm(root / name, steps, image_size) for name in chosen}


def _open_realm(directory: Any, steps: str, image_size: tuple[int, int]) -> Splits:
    """The three splits of the realm in a folder."""
    listings = [annotations.read_annotations(directory / file, directory) for file in FILES]
    count = 1 + max(int(listing.labels.max()) for listing in listings)
    class_names = tuple(str(number) for number in range(count))
    return linear_probe.assign(
        *(
            pipeline.open_listing(listing, steps, image_size=image_size, class_names=class_names)
            for listing in listings
        )
    )


def settings(splits: Splits) -> str:
    """Changes when the images of a realm, their labels or what is done with them do."""
    parts = [[split.fingerprint, split.preprocess] for split in splits]
    parts.append([PENALTY, *linear_probe.LAMBDAS, linear_probe.TOLERANCE])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def evaluate(
    model: MlpMixer,
    params: Mapping[str, Any],
    realms: Mapping[str, Splits],
    recorded: Mapping[str, Mapping[str, Any]],
    *,
    mesh: Mesh,
    global_batch_size: int,
    prefetch_batches: int,
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each realm's name in results.json and its result, as soon as it is computed.

    Args:
      model: whose pre_logits are the features.
      params: of the model, by the suffix of the results' names, "" or "_ema".
      realms: as of `open_realms`.
      recorded: what results.json has of the same weights. A realm that is in it with the same data
        and settings is not computed again.
      mesh: of the devices.
      global_batch_size: images a step of the model, over all devices.
      prefetch_batches: batches on their way to the devices.
      say: gets a line as each realm begins and ends.
    """
    tasks = [(name, suffix) for name in realms for suffix in params]
    images = {name: sum(split.num_examples for split in realms[name]) for name in realms}
    due = [
        (name, suffix)
        for name, suffix in tasks
        if recorded.get(name + suffix, {}).get("settings") != settings(realms[name])
    ]
    seconds, images_done = 0.0, 0
    for number, (name, suffix) in enumerate(tasks, 1):
        place = f"realm {number} of {len(tasks)}: {name}{suffix}"
        if (name, suffix) not in due:
            summary = dict(recorded[name + suffix])
            say(f"{place}: {linear_probe.sentence(summary)}, done before")
            yield name + suffix, summary
            continue
        left = sum(images[other] for other, _ in due) - images_done
        hint = ""
        if images_done:
            hint = f", about {formatting.duration(seconds / images_done * left)} left"
        say(f"{place}: {images[name]:,} images{hint}")
        start = time.monotonic()
        probed = linear_probe.evaluate(
            model,
            params[suffix],
            realms[name],
            penalty=PENALTY,
            mesh=mesh,
            global_batch_size=global_batch_size,
            prefetch_batches=prefetch_batches,
        )
        took = time.monotonic() - start
        seconds, images_done = seconds + took, images_done + images[name]
        summary = {
            "realm": name,
            "weights": "ema" if suffix else "params",
            "settings": settings(realms[name]),
            **probed.summary(),
        }
        say(f"{place}: {linear_probe.sentence(summary)}, took {formatting.duration(took)}")
        yield name + suffix, summary


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over realms, each of the same weight. Shares are in 0..1.

    Attributes:
      weights: "params" or "ema".
      realms: their names.
      top1, mean_per_class: means over the realms.
      top1_interval: (low, high) of 95 %, of the number of test images alone.
    """

    weights: str
    realms: tuple[str, ...]
    top1: float
    top1_interval: tuple[float, float]
    mean_per_class: float


def means(summaries: Mapping[str, Mapping[str, Any]]) -> list[Mean]:
    """The mean over the realms of each set of parameters, from results.json's section."""
    found = []
    for weights in ("params", "ema"):
        chosen = [each for each in summaries.values() if each["weights"] == weights]
        if not chosen:
            continue
        shares, counts = (np.array([each[key] for each in chosen]) for key in ("top1", "count"))
        found.append(
            Mean(
                weights=weights,
                realms=tuple(each["realm"] for each in chosen),
                top1=float(shares.mean()),
                top1_interval=scores.mean_interval(shares, counts),
                mean_per_class=float(np.mean([each["mean_per_class"] for each in chosen])),
            )
        )
    return found


def markdown(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table: a row a realm, then their mean."""
    table, notes = linear_probe.table(summaries, "realm"), linear_probe.notes(summaries)
    for mean in means(summaries):
        name = "mean" + " (average)" * (mean.weights == "ema")
        low, high = mean.top1_interval
        figures = f"{mean.top1:.2%}", f"{low:.2%} to {high:.2%}", f"{mean.mean_per_class:.2%}"
        table.append((name, f"{len(mean.realms)} realms", *figures, "", ""))
        if absent := [realm for realm in REALMS if realm not in mean.realms]:
            notes.append(
                f"{name}: over {len(mean.realms)} realms; {len(absent)} of the benchmark's "
                f"{len(REALMS)} are absent: {', '.join(absent)}"
            )
    return linear_probe.lines(table, notes)

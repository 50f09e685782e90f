"""ImageNet-21k as a TFDS data set, prepared from the official tar files.

14 million images (1.3 TB) do not fit into memory, and a preparation takes hours. It therefore has
two stages, and each can resume after an interruption. *Reading* reads the source once, decodes
every image in a thread pool to check it, and appends its record to one of up to 256 bucket files,
selected by a hash of its name. *Writing* sorts the buckets by that hash one by one, cuts the
sequence into shards and deletes the finished buckets. Records are in the order of their hashes,
which depends neither on the number of threads nor on interruptions, so every part of a split is a
random sample.

`state.json`, which is replaced atomically, records the finished work. The other files hold at least
that work; the next start truncates anything that a killed process wrote after it.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from mixer.data.imagenet import imagenet21k_source
from mixer.data.imagenet.imagenet21k_source import End, Fault, Member, Source, synsets
from mixer.data.preprocessing.decoding import decode
from mixer.errors import UserError, first_line

SHARD_BYTES = 200 * 10**6
BUCKET_BYTES = 4 << 30  # sorted through an index; should fit into the page cache
MAX_BUCKETS = 256
BUFFER_BYTES = 256 << 20  # buffered records, so that buckets are written in large pieces
SKIPPED = "skipped.jsonl"
COMMIT_SECS = 10.0  # a killed process loses at most this much reading and the current synset
_HEADER = struct.Struct(">16sQ")  # in a bucket, before each record: hash, length


class Imagenet21k(tfds.core.GeneratorBasedBuilder):
    """Builder of the data sets "imagenet21k/fall11", "/winter21" and "/winter21_p".

    All have the same 21,843 classes, so that heads trained on different releases are compatible.
    The builder reads what `prepare` wrote; `download_and_prepare` cannot access the images.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS reads it so)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads it so)
        tfds.core.BuilderConfig(name="fall11", description="All of fall 2011: 21,841 synsets."),
        tfds.core.BuilderConfig(name="winter21", description="All of winter 2021: 19,167 synsets."),
        tfds.core.BuilderConfig(
            name="winter21_p", description="Winter 2021 processed: 10,450 synsets, resized images."
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="ImageNet-21k, its images as they are in the official tar files.",
            homepage="https://image-net.org/download-images.php",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=synsets()),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        raise UserError(
            f"{self.name} cannot be downloaded; prepare it from its tar files with "
            f"`python -m mixer.tools.prepare {self.name} --source=TAR_OR_FOLDER`"
        )

    def _generate_examples(self):
        raise NotImplementedError  # TFDS requires it; _split_generators raises an error first


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a preparation; bytes and images count the current stage."""

    stage: str
    done_bytes: int
    total_bytes: int
    images: int
    skipped: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a preparation.

    Attributes:
      synsets: number of training synsets in the source.
      skipped: number of lines of `skipped_path`: skipped images and damaged synsets.
      damaged: number of those lines that describe a synset or the source instead of an image.
      skipped_path: path of the jsonl file that lists them.
    """

    synsets: int
    skipped: int
    damaged: int
    skipped_path: Path


def _encode(
    features: tfds.features.FeaturesDict, event: Member | Fault | End
) -> tuple[Member | Fault | End, bytes | None]:
    """Returns a member with its record if its image can be decoded, else a fault; or the event.

    The bytes are stored unmodified, including PNG files named as JPEG, grey and CMYK images. They
    are decoded to RGB here, as in training.
    """
    if not isinstance(event, Member):
        return event, None
    fault = functools.partial(Fault, event.unit.split, event.unit.synset, event.name)
    if event.data is None:
        return fault(f"{event.size:,} bytes are too many for an image"), None
    try:
        decode(tf.constant(event.data))
    except tf.errors.OpError as error:
        return fault(first_line(error)), None
    example = features.encode_example(
        {"image": io.BytesIO(event.data), "label": event.unit.synset, "file_name": event.name}
    )
    record = tfds.core.ExampleSerializer(features.get_serialized_info()).get_tf_example(example)
    # Without this, the order of the features in a record would differ between processes.
    return dataclasses.replace(event, data=None), record.SerializeToString(deterministic=True)


def _ordered_map(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, in_flight: int
) -> Iterator:
    """Maps `function` over items in the pool, in order, with `in_flight` items at a time."""
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _Appended:
    """Append-only files, which are truncated to their committed sizes when opened.

    Attributes:
      sizes: for each name, [bytes, records] appended so far.
    """

    def __init__(self, folder: Path, committed: dict[str, list[int]]):
        self._folder = folder
        self._buffers: dict[str, list[bytes]] = collections.defaultdict(list)
        self._buffered = 0
        self._unsynced: set[str] = set()
        self.sizes = {name: list(size) for name, size in committed.items()}
        folder.mkdir(exist_ok=True)
        present = {path.name: path.stat().st_size for path in folder.iterdir()}
        for name, (size, _) in self.sizes.items():
            if present.get(name, 0) < size:
                raise UserError(
                    f"{folder / name} has lost data: {present.get(name, 0):,} bytes; expected at "
                    f"least {size:,} (delete {folder.parent} and start again)"
                )
        for name in present:
            os.truncate(folder / name, self.sizes.get(name, [0])[0])

    def append(self, name: str, data: bytes) -> None:
        """Appends one record."""
        size = self.sizes.setdefault(name, [0, 0])
        size[0] += len(data)
        size[1] += 1
        self._buffers[name].append(data)
        self._buffered += len(data)
        if self._buffered > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        for name, pieces in self._buffers.items():
            with open(self._folder / name, "ab") as file:
                file.writelines(pieces)
        self._unsynced.update(self._buffers)
        self._buffers.clear()
        self._buffered = 0

    def sync(self) -> None:
        """Flushes all files to the disk."""
        self._flush()
        for name in self._unsynced:
            _sync(self._folder / name)
        self._unsynced.clear()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save(path: Path, state: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state))
    _sync(new)
    new.replace(path)


def builder(release: str, data_dir: str) -> Imagenet21k:
    """Returns the builder of a release in `data_dir`; "" is TFDS's default."""
    return Imagenet21k(config=release, data_dir=os.path.expanduser(data_dir) or None)


def prepare(
    source: Source,
    data_dir: str,
    *,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Summary | None:
    """Prepares the data set; continues an earlier call that was stopped or killed.

    Args:
      source: from `find_source`.
      data_dir: TFDS's data directory; "" is TFDS's default.
      workers: number of threads that decode and write; None: the number of cores.
      shard_bytes: maximum size of a shard.
      report: called after every image and every shard.

    Returns:
      The result; None if the data set is already prepared.

    Raises:
      UserError: the disk is too small, another process is preparing the data set, an unfinished
        preparation has another source, or no image can be used.
    """
    location = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    if "://" in location:
        raise UserError(
            f"--data_dir={location} is not on a local disk; expected a local folder, because the "
            "preparation appends to files (copy the finished folder afterwards)"
        )
    target = builder(source.release, data_dir)
    final = Path(target.data_path)
    work = final.with_name(f"preparing-{final.name}")
    if target.is_prepared():
        shutil.rmtree(work, ignore_errors=True)  # left if the process was killed before rmtree
        return None
    work.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    with open(work / "lock", "w") as lock, ThreadPoolExecutor(workers) as pool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work} is in use: another preparation is running") from None
        state = _begin(source, work, shard_bytes)
        if not state["read"]:
            _read(source, work, state, target.info.features, pool, workers, report)
        names = sorted({name.partition("-")[0] for name in state["files"]} - {SKIPPED})
        if not names:
            skipped_path = work / "files" / SKIPPED
            raise UserError(f"{source.path}: no image is usable; {skipped_path} lists the reasons")
        splits = [_write(name, target, work, state, pool, workers, report) for name in names]
        summary = _finish(splits, target, work, state)
        (work / "ready").replace(final)
    shutil.rmtree(work)
    return dataclasses.replace(summary, skipped_path=final / SKIPPED)


def _begin(source: Source, work: Path, shard_bytes: int) -> dict[str, Any]:
    """Returns the saved state of a preparation, or a new state."""
    path = work / "state.json"
    if path.exists():
        state = json.loads(path.read_text())
        if state["source"] != str(source.path.resolve()):
            raise UserError(
                f"{work} contains an unfinished preparation from --source={state['source']}; "
                "finish it, or delete the folder to start again"
            )
        buckets = state["buckets"]
    else:
        buckets = min(MAX_BUCKETS, -(-source.num_bytes // BUCKET_BYTES) or 1)
        state = dict(
            source=str(source.path.resolve()),
            buckets=buckets,
            shard_bytes=shard_bytes,
            read=False,  # whether the source has been read completely
            units=[],  # names of the units that have been read; [] once all have been
            source_bytes=0,  # bytes of the source that have been read
            synsets=0,  # number of training synsets in the source
            files={},  # [bytes, records] of each bucket and of the list of skipped images
            damaged=0,  # number of lines in that list that do not describe a single image
            written={},  # for each split, [examples, bytes, faults] of each finished shard
        )
    # Space for the records, and for a second copy of a bucket while its shards are written.
    needed_bytes = int(source.num_bytes * (1.05 + 1 / buckets))
    present_bytes = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free_bytes = shutil.disk_usage(work).free
    if free_bytes < needed_bytes - present_bytes:
        raise UserError(
            f"{work}: {_gigabytes(free_bytes)} free; expected at least "
            f"{_gigabytes(needed_bytes - present_bytes)} for {source.path} with "
            f"{_gigabytes(source.num_bytes)}"
        )
    return state


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _read(
    source: Source,
    work: Path,
    state: dict[str, Any],
    features: tfds.features.FeaturesDict,
    pool: ThreadPoolExecutor,
    workers: int,
    report: Callable[[Progress], None],
) -> None:
    """Runs the first stage: from the source to the buckets, with commits at ends of units."""
    files = _Appended(work / "files", state["files"])
    state["files"] = files.sizes
    (work / "files" / SKIPPED).touch()
    skipped = files.sizes.setdefault(SKIPPED, [0, 0])
    images = sum(records for _, records in files.sizes.values()) - skipped[1]
    committed = time.monotonic()
    encode = functools.partial(_encode, features)
    events = imagenet21k_source.events(source, frozenset(state["units"]))
    for event, record in _ordered_map(pool, encode, events, 4 * workers):
        if isinstance(event, Member):
            name = f"{event.unit.split}/{event.unit.synset}/{event.name}"
            key = hashlib.blake2b(name.encode(), digest_size=16).digest()
            bucket = int.from_bytes(key[:8], "big") * state["buckets"] >> 64
            data = _HEADER.pack(key, len(record)) + record
            files.append(f"{event.unit.split}-{bucket:03}", data)
            state["source_bytes"] += event.size
            images += 1
        elif isinstance(event, Fault):
            files.append(SKIPPED, _line(event))
            state["damaged"] += not event.member
        else:
            state["units"].append(event.unit)
            if time.monotonic() - committed > COMMIT_SECS:
                files.sync()
                _save(work / "state.json", state)
                committed = time.monotonic()
        report(Progress("reading", state["source_bytes"], source.num_bytes, images, skipped[1]))
    files.sync()
    train = {unit.split("/")[1] for unit in state["units"] if unit.startswith("train/")}
    state.update(read=True, units=[], synsets=len(train))
    _save(work / "state.json", state)


def _line(fault: Fault) -> bytes:
    return json.dumps(dataclasses.asdict(fault)).encode() + b"\n"


@dataclasses.dataclass(frozen=True)
class _Place:
    """The location of a record; `repeated` if the record before has the same hash and name."""

    path: Path
    offset: int
    length: int
    repeated: bool


def _places(buckets: list[tuple[Path, list[int]]], start: int) -> Iterator[_Place]:
    """Yields the records of a split in the order of their hashes, from number `start` on."""
    for path, (size, records) in buckets:
        if start >= records:  # already written and deleted
            start -= records
            continue
        records = []
        with open(path, "rb") as file:
            while (offset := file.tell()) < size:
                key, length = _HEADER.unpack(file.read(_HEADER.size))
                records.append((key, offset + _HEADER.size, length))
                file.seek(length, os.SEEK_CUR)
        records.sort()  # records with the same hash stay in reading order
        last_key = records[start - 1][0] if start else b""
        for key, offset, length in records[start:]:
            yield _Place(path, offset, length, key == last_key)
            last_key = key
        start = 0


def _write_shard(path: Path, split: str, places: list[_Place]) -> list:
    """Writes a shard under a temporary name and renames it; returns [examples, bytes, faults]."""
    written = [0, 0, []]
    new = path.with_name(f"{path.name}.new")
    with contextlib.ExitStack() as stack:
        files = {
            path: stack.enter_context(open(path, "rb"))
            for path in dict.fromkeys(place.path for place in places)
        }

        def records():
            for place in places:
                record = os.pread(files[place.path].fileno(), place.length, place.offset)
                if place.repeated:
                    written[2].append(dataclasses.asdict(_repeated(split, record)))
                    continue
                written[0] += 1
                written[1] += place.length
                yield None, record  # a TFRecord file has no keys

        try:
            tfds.core.ExampleWriter(tfds.core.FileFormat.TFRECORD).write(new, records())
        except tf.errors.OpError as error:  # a full disk
            raise UserError(f"{new} cannot be written: {error.message}") from error
    _sync(new)
    new.replace(path)
    return written


def _repeated(split: str, record: bytes) -> Fault:
    features = tf.train.Example.FromString(record).features.feature
    synset = synsets()[features["label"].int64_list.value[0]]
    name = features["file_name"].bytes_list.value[0].decode()
    return Fault(split, synset, name, "a second image of this name")


def _write(
    split: str,
    target: Imagenet21k,
    work: Path,
    state: dict[str, Any],
    pool: ThreadPoolExecutor,
    workers: int,
    report: Callable[[Progress], None],
) -> tfds.core.SplitInfo:
    """Runs the second stage: from a split's buckets to its shards, with a commit per shard."""
    buckets = sorted(
        (work / "files" / name, size)
        for name, size in state["files"].items()
        if name.partition("-")[0] == split
    )
    num_bytes = sum(size for _, (size, _) in buckets)
    num_examples = sum(records for _, (_, records) in buckets)
    num_shards = min(-(-num_bytes // state["shard_bytes"]), num_examples)
    ends = [num_examples * shard // num_shards for shard in range(num_shards + 1)]
    ready = work / "ready"
    ready.mkdir(exist_ok=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=ready, dataset_name=target.name, split=split, filetype_suffix="tfrecord"
    )
    written = state["written"].setdefault(split, [])
    first = len(written)
    places = _places(buckets, ends[first])
    shards = (
        (
            Path(template.sharded_filepath(shard_index=shard, num_shards=num_shards)),
            split,
            list(itertools.islice(places, ends[shard + 1] - ends[shard])),
        )
        for shard in range(first, num_shards)
    )
    for result in _ordered_map(pool, lambda shard: _write_shard(*shard), shards, workers):
        written.append(result)
        _save(work / "state.json", state)
        done = ends[len(written)]
        records = 0
        for path, (_, count) in buckets:
            records += count
            if records <= done:
                path.unlink(missing_ok=True)
        skipped = state["files"][SKIPPED][1]
        done_bytes = num_bytes * done // num_examples
        report(Progress(f"writing {split}", done_bytes, num_bytes, done, skipped))
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[examples for examples, _, _ in written],
        num_bytes=sum(size for _, size, _ in written),
        filename_template=template,
    )


def _finish(
    splits: list[tfds.core.SplitInfo], target: Imagenet21k, work: Path, state: dict[str, Any]
) -> Summary:
    """Writes TFDS's description and the list of skipped images into the folder of the shards."""
    ready = work / "ready"
    shutil.copyfile(work / "files" / SKIPPED, ready / SKIPPED)
    repeated = [
        Fault(**fault)
        for shards in state["written"].values()
        for _, _, faults in shards
        for fault in faults
    ]
    with open(ready / SKIPPED, "ab") as file:
        file.writelines(map(_line, repeated))
    target.info.set_file_format(tfds.core.FileFormat.TFRECORD, override=True)
    target.info.set_splits(tfds.core.SplitDict(splits))
    target.info.write_to_directory(ready)
    return Summary(
        synsets=state["synsets"],
        skipped=state["files"][SKIPPED][1] + len(repeated),
        damaged=state["damaged"],
        skipped_path=ready / SKIPPED,
    )

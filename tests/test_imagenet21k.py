"""ImageNet-21k from small tars made here: labels, faults, and a kill at any moment."""

import collections
import fcntl
import hashlib
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from helpers import run_python
from mixer.data.imagenet import imagenet21k, imagenet21k_source
from mixer.data.sources import stored as sources
from mixer.errors import UserError
from mixer.tools import prepare as tool

SYNSETS = ("n00004475", "n00005787", "n01440764", "n02084071", "n15102894")
IMAGES = 12  # a synset
SHARD_BYTES = 8000  # several shards


def _image(number, mode="RGB", kind="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


FILES = {
    synset: {f"{synset}_{i}.JPEG": _image(100 * k + i) for i in range(IMAGES)}
    for k, synset in enumerate(SYNSETS)
}


def _tar(files, compression=""):
    """The bytes of a tar of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _tars(root, files=FILES):
    """A folder of the synsets' tars."""
    return _write(root, {f"{s}.tar": _tar(files[s].items()) for s in files})


def _prepare(source, data_dir, release="fall11", **options):
    options = {"workers": 2, "shard_bytes": SHARD_BYTES, **options}
    found = imagenet21k_source.find_source(str(source), release)
    return imagenet21k.prepare(found, str(data_dir), **options)


def _shards(data_dir, release="fall11"):
    return {path.name: path.read_bytes() for path in _shards_of(data_dir, release)}


def _shards_of(data_dir, release="fall11"):
    return sorted((data_dir / "imagenet21k" / release / "1.0.0").glob("*tfrecord*"))


def _examples(data_dir, split="train", release="fall11"):
    """(label, name, image) of every example."""
    builder = tfds.builder(f"imagenet21k/{release}", data_dir=str(data_dir))
    decoders = {"image": tfds.decode.SkipDecoding()}
    return [
        (int(each["label"]), each["file_name"].decode(), each["image"])
        for each in tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
    ]


def _skipped(data_dir, release="fall11"):
    path = data_dir / "imagenet21k" / release / "1.0.0" / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data directory prepared at one go by one worker, and its source."""
    root = tmp_path_factory.mktemp("i21k")
    source = _tars(root / "fall11")
    summary = _prepare(source, root / "data", workers=1)
    assert (summary.synsets, summary.skipped, summary.damaged) == (len(SYNSETS), 0, 0)
    return source, root / "data"


def test_classes_are_those_of_the_published_checkpoints():
    names = imagenet21k.synsets()
    assert len(names) == 21_843 and list(names) == sorted(set(names))
    assert {"n03931044", "n09859684"} <= set(names)  # no release has images of them
    # Of the list that timm ships for the checkpoints, ids joined by newlines.
    digest = "c03345e3490e010defaeac86b00012db28ecb79af13daba0b72525fa37c66e94"
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == digest


def test_records_hold_the_files_with_their_labels(whole):
    _, data = whole
    expected = {
        (imagenet21k.synsets().index(synset), name, image)
        for synset, files in FILES.items()
        for name, image in files.items()
    }
    found = _examples(data)
    assert len(found) == len(expected) and set(found) == expected
    info = tfds.builder("imagenet21k/fall11", data_dir=str(data)).info
    assert info.splits["train"].num_shards > 3
    assert max(info.splits["train"].shard_lengths) - min(info.splits["train"].shard_lengths) <= 1
    # A part of the split mixes the classes.
    assert len({label for label, _, _ in _examples(data, "train[:25%]")}) >= 4
    for shard in _shards_of(data):  # the same bytes in every process
        for record in tf.data.TFRecordDataset(str(shard)).as_numpy_iterator():
            example = tf.train.Example.FromString(record)
            assert example.SerializeToString(deterministic=True) == record
    again = tfds.builder_from_directory(data / "imagenet21k" / "fall11" / "1.0.0")
    assert again.info.splits["train"].num_examples == len(expected)
    assert again.info.features["label"].names == list(imagenet21k.synsets())


def test_the_source_of_batches_reads_it(whole):
    _, data = whole
    builder = sources.tfds_builder("imagenet21k", str(data))
    source = sources.tfds_source(builder, "train[:50%]", ())
    assert len(source.kept_numbers) == len(SYNSETS) * IMAGES // 2
    assert source.class_names == imagenet21k.synsets()
    example = source.load(0)
    label, _, image = _examples(data)[0]
    assert int(example["label"]) == label and example["image"].numpy() == image


@pytest.mark.parametrize(
    "layout",
    [
        "folders",
        "tar of tars",
        pytest.param("packed tars", marks=pytest.mark.slow),
        pytest.param("tar of folders", marks=pytest.mark.slow),
    ],
)
def test_every_layout_gives_the_same_records(whole, tmp_path, layout):
    tars = [(f"top/{s}.tar", _tar(FILES[s].items())) for s in reversed(SYNSETS)]
    flat = [(f"top/{s}/{n}", data) for s in SYNSETS for n, data in FILES[s].items()]
    source = tmp_path / "source"
    match layout:
        case "folders":
            _write(source / "fall11", {"README": b"", **dict(flat)})
        case "tar of tars":
            _write(source, {"fall11_whole.tar": _tar([("top/README", b"hello"), *tars])})
        case "packed tars":
            _write(source, {"fall11_whole.tar.gz": _tar(tars, "gz"), "sums.md5": b"0"})
        case "tar of folders":
            # One synset's images lie in two places.
            _write(source, {"fall11_whole.tar": _tar([*flat[3:], *flat[:3]])})
    summary = _prepare(source, tmp_path / "data", workers=3, release="")
    assert summary.synsets == len(SYNSETS) and summary.skipped == 0
    assert _shards(tmp_path / "data") == _shards(whole[1])


def test_winter21_processed_has_its_splits(tmp_path):
    one, two, three = SYNSETS[:3]
    files = {f"imagenet21k_train/{one}/{n}": data for n, data in FILES[one].items()}
    files |= {f"imagenet21k_val/{one}/v{n}": data for n, data in list(FILES[one].items())[:5]}
    files |= {f"imagenet21k_small_classes/{three}/{n}": d for n, d in FILES[three].items()}
    files[f"imagenet21k_train/{two}.tar"] = _tar(FILES[two].items())
    source = _write(tmp_path / "imagenet21k_resized", files)
    found = imagenet21k_source.find_source(str(source))
    assert found.release == "winter21_p"
    summary = imagenet21k.prepare(found, str(tmp_path / "data"), shard_bytes=SHARD_BYTES)
    assert summary.synsets == 2
    infos = tfds.builder("imagenet21k/winter21_p", data_dir=str(tmp_path / "data")).info.splits
    sizes = {split: infos[split].num_examples for split in infos}
    assert sizes == {"train": 2 * IMAGES, "validation": 5, "small_classes": IMAGES}
    validation = _examples(tmp_path / "data", "validation", "winter21_p")
    assert {label for label, _, _ in validation} == {imagenet21k.synsets().index(one)}
    # The same in one packed tar.
    packed = _write(tmp_path / "p", {"resized.tar.gz": _tar([(f"x/{n}", files[n]) for n in files])})
    found = imagenet21k_source.find_source(str(packed))
    assert found.release == "winter21_p"
    imagenet21k.prepare(found, str(tmp_path / "again"), shard_bytes=SHARD_BYTES)
    shards = _shards(tmp_path / "data", "winter21_p")
    assert len(shards) > 3 and _shards(tmp_path / "again", "winter21_p") == shards


def test_what_cannot_be_decoded_is_skipped_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet21k_source, "MAX_IMAGE_BYTES", 1 << 14)
    usable = {
        "jpeg": _image(1),
        "png.JPEG": _image(2, kind="PNG"),
        "grey": _image(3, "L"),
        "cmyk": _image(4, "CMYK"),
    }
    unusable = {
        "empty": b"",
        "text": b"no image" * 9,
        "cut": _image(5)[:-40],
        "vast": bytes(1 << 15),
    }
    one, two = SYNSETS[:2]
    members = [*usable.items(), *unusable.items(), ("jpeg", _image(6)), ("._jpeg", b"hidden")]
    source = _write(tmp_path / "s", {f"{one}.tar": _tar(members)})
    _tars(source, {two: FILES[two]})
    summary = _prepare(source, tmp_path / "data")
    found = {n: image for label, n, image in _examples(tmp_path / "data") if n in usable}
    assert found == usable  # as they are; of two of the same name the first
    reasons = {line["member"]: line["reason"] for line in _skipped(tmp_path / "data")}
    assert reasons.keys() == {*unusable, "jpeg"}
    assert "32,768 bytes" not in reasons["empty"] and "empty" in reasons["empty"]
    assert "JPEG" in reasons["cut"] and "too many" in reasons["vast"]
    assert "second" in reasons["jpeg"]
    assert (summary.skipped, summary.damaged) == (5, 0)


def test_of_equal_names_the_first_is_kept_wherever_a_shard_begins(tmp_path):
    names, copies = [f"{name}.JPEG" for name in "abc"], 6
    members = [
        (name, _image(10 * i + place)) for i in range(copies) for place, name in enumerate(names)
    ]
    source = _write(tmp_path / "s", {f"{SYNSETS[0]}.tar": _tar(members)})
    summary = _prepare(source, tmp_path / "data", shard_bytes=1200)  # less than a name's copies
    assert {name: image for _, name, image in _examples(tmp_path / "data")} == dict(members[:3])
    assert len(_shards(tmp_path / "data")) > 2
    repeated = collections.Counter(line["member"] for line in _skipped(tmp_path / "data"))
    assert repeated == {name: copies - 1 for name in names}
    assert (summary.skipped, summary.damaged) == (len(members) - len(names), 0)


def _cut_inside(tar):
    return tar[: 512 * 5 + 100]


def _cut_between(tar):  # without the closing zeros, at a member's end
    return tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512]


def _bad_header(tar):
    first = 512 + -(-len(FILES[SYNSETS[1]][f"{SYNSETS[1]}_0.JPEG"]) // 512) * 512
    return tar[:first] + b"x" * 100 + tar[first + 100 :]


@pytest.mark.parametrize(
    ("damage", "most", "nested"),
    [
        (_cut_inside, 4, True),
        (_bad_header, 1, False),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (_cut_inside, 4, False),
                (_cut_between, IMAGES, False),
                (_bad_header, 1, True),
                (lambda tar: b"", 0, False),
                (lambda tar: bytes(10240), 0, False),
            )
        ],
    ],
)
def test_of_a_damaged_tar_the_images_before_are_used(tmp_path, damage, most, nested):
    tars = {f"{s}.tar": _tar(FILES[s].items()) for s in SYNSETS[:3]}
    tars[f"{SYNSETS[1]}.tar"] = damage(tars[f"{SYNSETS[1]}.tar"])
    if nested:
        tars = {"whole.tar": _tar(tars.items())}
    summary = _prepare(_write(tmp_path / "s", tars), tmp_path / "data")
    counts = collections.Counter(label for label, _, _ in _examples(tmp_path / "data"))
    number = imagenet21k.synsets().index
    assert counts[number(SYNSETS[0])] == counts[number(SYNSETS[2])] == IMAGES
    assert (counts[number(SYNSETS[1])] > 0) == (most > 0) and counts[number(SYNSETS[1])] <= most
    (line,) = _skipped(tmp_path / "data")
    assert (line["synset"], line["member"]) == (SYNSETS[1], "") and line["reason"]
    assert (summary.skipped, summary.damaged, summary.synsets) == (1, 1, 3)


@pytest.mark.parametrize("compression", ["", pytest.param("gz", marks=pytest.mark.slow)])
def test_of_a_truncated_whole_tar_the_synsets_before_are_used(tmp_path, compression):
    tars = [(f"{s}.tar", _tar(FILES[s].items())) for s in SYNSETS]
    whole = _tar(tars, compression)
    source = _write(tmp_path / "s", {"whole.tar": whole[: len(whole) * 2 // 3]})
    summary = _prepare(source, tmp_path / "data")
    assert 2 <= summary.synsets < 5 and summary.damaged
    lines = _skipped(tmp_path / "data")
    assert any("whole.tar is damaged" in line["reason"] for line in lines)
    labels = {label for label, _, _ in _examples(tmp_path / "data")}
    assert len(labels) == summary.synsets or len(labels) == summary.synsets - 1


class _Stop(Exception):
    pass


def _stop_at(stage, number):
    """A report that raises at the `number`th call of a stage."""
    calls = collections.Counter()

    def report(progress):
        calls[progress.stage] += 1
        if calls[progress.stage] == number and progress.stage.startswith(stage):
            raise _Stop

    return report


@pytest.mark.parametrize(
    "layout",
    [
        "tars",
        pytest.param("tar of tars", marks=pytest.mark.slow),
        pytest.param("tar of folders", marks=pytest.mark.slow),
    ],
)
def test_stopped_anywhere_it_goes_on_to_the_same_records(whole, tmp_path, monkeypatch, layout):
    """Three stops of reading and two of writing; what is finished is not done again."""
    monkeypatch.setattr(imagenet21k, "COMMIT_SECS", 0)
    monkeypatch.setattr(imagenet21k, "BUFFER_BYTES", 700)  # written well before it is committed
    monkeypatch.setattr(imagenet21k, "BUCKET_BYTES", 12_000)  # several
    files = {s: {**FILES[s], f"{s}_bad.JPEG": b"bad"} for s in SYNSETS}
    source, data = tmp_path / "s", tmp_path / "data"
    if layout == "tars":
        _tars(source, files)
    elif layout == "tar of tars":
        tars = [(f"{s}.tar", _tar(files[s].items())) for s in SYNSETS]
        _write(source, {"fall11_whole.tar": _tar(tars)})
    else:  # one synset's images lie in two places
        flat = [(f"{s}/{name}", image) for s in SYNSETS for name, image in files[s].items()]
        _write(source, {"fall11_whole.tar": _tar([*flat[3:], *flat[:3]])})
    work = data / "imagenet21k" / "fall11" / "preparing-1.0.0"

    def state():
        return json.loads((work / "state.json").read_text())

    for number in (15, 31, 19):  # in the first synset or the second, each time it goes on
        with pytest.raises(_Stop):
            _prepare(source, data, report=_stop_at("reading", number))
        if layout == "tars":  # not needed again
            for unit in state()["units"]:
                (source / f"{unit.split('/')[1]}.tar").unlink(missing_ok=True)
    assert len(state()["units"]) == 4
    with pytest.raises(_Stop):
        _prepare(source, data, report=_stop_at("writing", 2))
    (first,) = (work / "ready").glob("*00000-of*")
    written = first.stat().st_mtime_ns
    with pytest.raises(_Stop):
        _prepare(source, data, report=_stop_at("writing", 1))
    assert first.stat().st_mtime_ns == written
    assert len(state()["written"]["train"]) == 3
    assert len(list((work / "files").glob("train-*"))) < state()["buckets"]  # room is given back
    summary = _prepare(source, data)
    assert not work.exists()
    assert _shards(data) == _shards(whole[1])
    assert sorted(line["member"] for line in _skipped(data)) == [f"{s}_bad.JPEG" for s in SYNSETS]
    assert (summary.skipped, summary.synsets) == (len(SYNSETS), len(SYNSETS))
    assert _prepare(source, data) is None  # prepared already


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_records(whole, tmp_path):
    source, data = whole[0], tmp_path / "data"
    code = f"""
import os, signal
from mixer.data.imagenet import imagenet21k, imagenet21k_source
imagenet21k.COMMIT_SECS, imagenet21k.BUFFER_BYTES = 0, 700
calls = 0
def report(progress):
    global calls
    calls += 1
    if calls == 40:
        os.kill(os.getpid(), signal.SIGKILL)
found = imagenet21k_source.find_source({str(source)!r})
imagenet21k.prepare(found, {str(data)!r}, shard_bytes={SHARD_BYTES}, report=report)
"""
    assert run_python("-c", code, check=False).returncode == -9
    work = data / "imagenet21k" / "fall11" / "preparing-1.0.0"
    state = json.loads((work / "state.json").read_text())
    assert state["units"] and not state["read"]
    [bucket] = (work / "files").glob("train-*")
    assert bucket.stat().st_size > state["files"][bucket.name][0]  # more than was committed
    _prepare(source, data)
    assert _shards(data) == _shards(whole[1])


def test_bad_sources_are_refused_in_one_line(tmp_path):
    one, two = SYNSETS[:2]
    cases = {
        "missing": (None, "nXXXXXXXX.tar"),
        "empty": ({"README": b""}, "empty"),
        "unknown": ({f"{one}.tar": b"", "n99999999.tar": b""}, "n99999999"),
        "twice": ({f"{one}.tar": b"", f"{one}/x.JPEG": b""}, one),
        "text.tar": ({"x.tar": b"no tar at all" * 100}, "x.tar"),
        "nameless": ({f"{one}.tar": b"", f"{two}.tar": b""}, "--release"),
    }
    for name, (files, expected) in cases.items():
        if files is not None:
            _write(tmp_path / name, files)
        with pytest.raises(UserError) as error:
            imagenet21k_source.find_source(str(tmp_path / name))
        assert expected in str(error.value) and "\n" not in str(error.value), name


def test_a_preparation_that_cannot_work_is_refused(tmp_path, monkeypatch):
    source = _tars(tmp_path / "fall11", {SYNSETS[0]: FILES[SYNSETS[0]]})
    unknown = _write(tmp_path / "u", {"fall11.tar": _tar([("n99999999.tar", b"")])})
    with pytest.raises(UserError, match="n99999999"):
        _prepare(unknown, tmp_path / "1")
    nothing = _write(tmp_path / "n", {"fall11.tar": _tar([("README", b"hello")])})
    with pytest.raises(UserError, match=r"fall11\.tar"):
        _prepare(nothing, tmp_path / "2")
    with pytest.raises(UserError, match=r"skipped\.jsonl"):
        _prepare(_tars(tmp_path / "b", {SYNSETS[0]: {"x": b"bad"}}), tmp_path / "3")
    with pytest.raises(UserError, match="gs://bucket/data"):
        _prepare(source, "gs://bucket/data")
    with pytest.raises(_Stop):
        _prepare(source, tmp_path / "4", report=_stop_at("writing", 1))
    work = tmp_path / "4" / "imagenet21k" / "fall11" / "preparing-1.0.0"
    with pytest.raises(UserError, match=r"--source=.*fall11"):
        _prepare(_tars(tmp_path / "other", FILES), tmp_path / "4")
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "4"))):
            _prepare(source, tmp_path / "4")
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB"):
        _prepare(source, tmp_path / "5")


def test_the_command_tells_how_far_it_is_and_what_was_there(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "LINE_SECS", 0.0)
    source, data = whole
    tool.prepare_imagenet21k(str(source), str(data), "")  # prepared already
    assert capsys.readouterr().out.endswith("1.0.0: train 60\n")
    tool.prepare_imagenet21k(str(source), str(tmp_path), "winter21")
    printed = capsys.readouterr().out
    assert re.search(r"^reading [\d.]+% +\d+ images .* 0 faults +left \d:\d\d", printed, re.M)
    assert "5 of 19,167" in printed and "imagenet21k/winter21/1.0.0" in printed

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenet21k, "prepare", interrupted)
    with pytest.raises(SystemExit) as ended:
        tool.prepare_imagenet21k(str(source), str(tmp_path / "x"), "")
    assert ended.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tfds_alone_points_to_the_command(tmp_path):
    with pytest.raises(UserError, match="prepare imagenet21k"):
        tool.prepare_tfds("imagenet21k", str(tmp_path))
    with pytest.raises(UserError, match="prepare imagenet21k"):
        imagenet21k.builder("fall11", str(tmp_path)).download_and_prepare()

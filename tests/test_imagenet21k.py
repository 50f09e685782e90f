"""Preparation of ImageNet-21k from small tars: labels, damaged files, interruptions."""

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
IMAGES = 12  # per synset
SHARD_BYTES = 8000  # small enough for several shards


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
    """Returns the bytes of a tar with (name, bytes) pairs as its members."""
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
    """Writes one tar per synset to the directory `root` and returns it."""
    return _write(root, {f"{s}.tar": _tar(files[s].items()) for s in files})


def _prepare(source, data_dir, release="fall11", **options):
    options = {"workers": 2, "shard_bytes": SHARD_BYTES, **options}
    source = imagenet21k_source.find_source(str(source), release)
    return imagenet21k.prepare(source, str(data_dir), **options)


def _shards(data_dir, release="fall11"):
    return {path.name: path.read_bytes() for path in _shard_paths(data_dir, release)}


def _shard_paths(data_dir, release="fall11"):
    return sorted((data_dir / "imagenet21k" / release / "1.0.0").glob("*tfrecord*"))


def _examples(data_dir, split="train", release="fall11"):
    """Returns (label, name, image) of every example."""
    builder = tfds.builder(f"imagenet21k/{release}", data_dir=str(data_dir))
    decoders = {"image": tfds.decode.SkipDecoding()}
    return [
        (int(example["label"]), example["file_name"].decode(), example["image"])
        for example in tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
    ]


def _read_skipped(data_dir, release="fall11"):
    path = data_dir / "imagenet21k" / release / "1.0.0" / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared_source(tmp_path_factory):
    """The source, and a data directory that one worker prepared without interruption."""
    root = tmp_path_factory.mktemp("i21k")
    source = _tars(root / "fall11")
    summary = _prepare(source, root / "data", workers=1)
    assert (summary.synsets, summary.skipped, summary.damaged) == (len(SYNSETS), 0, 0)
    return source, root / "data"


def test_classes_match_the_published_checkpoints():
    names = imagenet21k.synsets()
    assert len(names) == 21_843 and list(names) == sorted(set(names))
    assert {"n03931044", "n09859684"} <= set(names)  # no release has images of these
    # SHA-256 of the ids in timm's list for the checkpoints, joined by newlines.
    digest = "c03345e3490e010defaeac86b00012db28ecb79af13daba0b72525fa37c66e94"
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == digest


def test_records_contain_every_file_and_its_label(prepared_source):
    _, data_dir = prepared_source
    expected = {
        (imagenet21k.synsets().index(synset), name, image)
        for synset, files in FILES.items()
        for name, image in files.items()
    }
    examples = _examples(data_dir)
    assert len(examples) == len(expected) and set(examples) == expected
    info = tfds.builder("imagenet21k/fall11", data_dir=str(data_dir)).info
    assert info.splits["train"].num_shards > 3
    assert max(info.splits["train"].shard_lengths) - min(info.splits["train"].shard_lengths) <= 1
    # The examples are shuffled, so a part of the split contains most classes.
    assert len({label for label, _, _ in _examples(data_dir, "train[:25%]")}) >= 4
    for shard in _shard_paths(data_dir):  # serialized the same way by every process
        for record in tf.data.TFRecordDataset(str(shard)).as_numpy_iterator():
            example = tf.train.Example.FromString(record)
            assert example.SerializeToString(deterministic=True) == record
    builder = tfds.builder_from_directory(data_dir / "imagenet21k" / "fall11" / "1.0.0")
    assert builder.info.splits["train"].num_examples == len(expected)
    assert builder.info.features["label"].names == list(imagenet21k.synsets())


def test_prepared_data_set_can_be_read(prepared_source):
    _, data_dir = prepared_source
    builder = sources.tfds_builder("imagenet21k", str(data_dir))
    source = sources.tfds_source(builder, "train[:50%]", ())
    assert len(source.kept_numbers) == len(SYNSETS) * IMAGES // 2
    assert source.class_names == imagenet21k.synsets()
    example = source.load(0)
    label, _, image = _examples(data_dir)[0]
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
def test_every_source_layout_gives_the_same_records(prepared_source, tmp_path, layout):
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
            # The images of the first synset are in two places.
            _write(source, {"fall11_whole.tar": _tar([*flat[3:], *flat[:3]])})
    summary = _prepare(source, tmp_path / "data", workers=3, release="")
    assert summary.synsets == len(SYNSETS) and summary.skipped == 0
    assert _shards(tmp_path / "data") == _shards(prepared_source[1])


def test_processed_winter21_keeps_its_splits(tmp_path):
    synset_a, synset_b, synset_c = SYNSETS[:3]
    files = {f"imagenet21k_train/{synset_a}/{n}": data for n, data in FILES[synset_a].items()}
    files |= {
        f"imagenet21k_val/{synset_a}/v{n}": data for n, data in list(FILES[synset_a].items())[:5]
    }
    files |= {f"imagenet21k_small_classes/{synset_c}/{n}": d for n, d in FILES[synset_c].items()}
    files[f"imagenet21k_train/{synset_b}.tar"] = _tar(FILES[synset_b].items())
    source = _write(tmp_path / "imagenet21k_resized", files)
    winter21_source = imagenet21k_source.find_source(str(source))
    assert winter21_source.release == "winter21_p"
    summary = imagenet21k.prepare(winter21_source, str(tmp_path / "data"), shard_bytes=SHARD_BYTES)
    assert summary.synsets == 2
    infos = tfds.builder("imagenet21k/winter21_p", data_dir=str(tmp_path / "data")).info.splits
    sizes = {split: infos[split].num_examples for split in infos}
    assert sizes == {"train": 2 * IMAGES, "validation": 5, "small_classes": IMAGES}
    validation = _examples(tmp_path / "data", "validation", "winter21_p")
    assert {label for label, _, _ in validation} == {imagenet21k.synsets().index(synset_a)}
    # A single compressed tar gives the same records.
    packed_source = _write(
        tmp_path / "p", {"resized.tar.gz": _tar([(f"x/{n}", files[n]) for n in files])}
    )
    winter21_source = imagenet21k_source.find_source(str(packed_source))
    assert winter21_source.release == "winter21_p"
    imagenet21k.prepare(winter21_source, str(tmp_path / "data_2"), shard_bytes=SHARD_BYTES)
    shards = _shards(tmp_path / "data", "winter21_p")
    assert len(shards) > 3 and _shards(tmp_path / "data_2", "winter21_p") == shards


def test_undecodable_images_are_skipped_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet21k_source, "MAX_IMAGE_BYTES", 1 << 14)
    usable_images = {
        "jpeg": _image(1),
        "png.JPEG": _image(2, kind="PNG"),
        "grey": _image(3, "L"),
        "cmyk": _image(4, "CMYK"),
    }
    unusable_images = {
        "empty": b"",
        "text": b"no image" * 9,
        "truncated": _image(5)[:-40],
        "vast": bytes(1 << 15),
    }
    synset_a, synset_b = SYNSETS[:2]
    members = [
        *usable_images.items(),
        *unusable_images.items(),
        ("jpeg", _image(6)),
        ("._jpeg", b"hidden"),
    ]
    source = _write(tmp_path / "s", {f"{synset_a}.tar": _tar(members)})
    _tars(source, {synset_b: FILES[synset_b]})
    summary = _prepare(source, tmp_path / "data")
    images = {n: image for label, n, image in _examples(tmp_path / "data") if n in usable_images}
    assert images == usable_images  # unmodified; the first of two with the same name
    reasons = {line["member"]: line["reason"] for line in _read_skipped(tmp_path / "data")}
    assert reasons.keys() == {*unusable_images, "jpeg"}
    assert "32,768 bytes" not in reasons["empty"] and "empty" in reasons["empty"]
    assert "JPEG" in reasons["truncated"] and "too many" in reasons["vast"]
    assert "second" in reasons["jpeg"]
    assert (summary.skipped, summary.damaged) == (5, 0)


def test_first_of_several_images_with_one_name_is_kept(tmp_path):
    names, copies = [f"{name}.JPEG" for name in "abc"], 6
    members = [
        (name, _image(10 * i + offset)) for i in range(copies) for offset, name in enumerate(names)
    ]
    source = _write(tmp_path / "s", {f"{SYNSETS[0]}.tar": _tar(members)})
    # A shard is smaller than the copies of one name.
    summary = _prepare(source, tmp_path / "data", shard_bytes=1200)
    assert {name: image for _, name, image in _examples(tmp_path / "data")} == dict(members[:3])
    assert len(_shards(tmp_path / "data")) > 2
    num_skipped = collections.Counter(line["member"] for line in _read_skipped(tmp_path / "data"))
    assert num_skipped == {name: copies - 1 for name in names}
    assert (summary.skipped, summary.damaged) == (len(members) - len(names), 0)


def _truncate_inside_a_member(tar):
    return tar[: 512 * 5 + 100]


def _truncate_between_members(tar):  # removes the zeros that end the archive
    return tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512]


def _damage_a_header(tar):
    offset = 512 + -(-len(FILES[SYNSETS[1]][f"{SYNSETS[1]}_0.JPEG"]) // 512) * 512
    return tar[:offset] + b"x" * 100 + tar[offset + 100 :]


@pytest.mark.parametrize(
    ("damage", "max_images", "nested"),
    [
        (_truncate_inside_a_member, 4, True),
        (_damage_a_header, 1, False),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (_truncate_inside_a_member, 4, False),
                (_truncate_between_members, IMAGES, False),
                (_damage_a_header, 1, True),
                (lambda tar: b"", 0, False),
                (lambda tar: bytes(10240), 0, False),
            )
        ],
    ],
)
def test_images_before_the_damage_in_a_tar_are_used(tmp_path, damage, max_images, nested):
    tars = {f"{s}.tar": _tar(FILES[s].items()) for s in SYNSETS[:3]}
    tars[f"{SYNSETS[1]}.tar"] = damage(tars[f"{SYNSETS[1]}.tar"])
    if nested:
        tars = {"whole.tar": _tar(tars.items())}
    summary = _prepare(_write(tmp_path / "s", tars), tmp_path / "data")
    counts = collections.Counter(label for label, _, _ in _examples(tmp_path / "data"))
    count_0, count_1, count_2 = (counts[imagenet21k.synsets().index(s)] for s in SYNSETS[:3])
    assert count_0 == count_2 == IMAGES
    assert (count_1 > 0) == (max_images > 0) and count_1 <= max_images
    (line,) = _read_skipped(tmp_path / "data")
    assert (line["synset"], line["member"]) == (SYNSETS[1], "") and line["reason"]
    assert (summary.skipped, summary.damaged, summary.synsets) == (1, 1, 3)


@pytest.mark.parametrize("compression", ["", pytest.param("gz", marks=pytest.mark.slow)])
def test_synsets_before_the_end_of_a_truncated_tar_are_used(tmp_path, compression):
    tars = [(f"{s}.tar", _tar(FILES[s].items())) for s in SYNSETS]
    tar = _tar(tars, compression)
    source = _write(tmp_path / "s", {"whole.tar": tar[: len(tar) * 2 // 3]})
    summary = _prepare(source, tmp_path / "data")
    assert 2 <= summary.synsets < 5 and summary.damaged
    lines = _read_skipped(tmp_path / "data")
    assert any("whole.tar is damaged" in line["reason"] for line in lines)
    labels = {label for label, _, _ in _examples(tmp_path / "data")}
    assert len(labels) == summary.synsets or len(labels) == summary.synsets - 1


class _Stop(Exception):
    pass


def _stop_at(stage, number):
    """Returns a `report` that raises `_Stop` at the `number`th call of a stage."""
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
def test_interrupted_preparation_resumes_to_the_same_records(
    prepared_source, tmp_path, monkeypatch, layout
):
    """Stops three times while reading and twice while writing; finished work is not repeated."""
    monkeypatch.setattr(imagenet21k, "COMMIT_SECS", 0)
    monkeypatch.setattr(imagenet21k, "BUFFER_BYTES", 700)  # written before the commit
    monkeypatch.setattr(imagenet21k, "BUCKET_BYTES", 12_000)  # several buckets
    files = {s: {**FILES[s], f"{s}_bad.JPEG": b"bad"} for s in SYNSETS}
    source, data_dir = tmp_path / "s", tmp_path / "data"
    if layout == "tars":
        _tars(source, files)
    elif layout == "tar of tars":
        tars = [(f"{s}.tar", _tar(files[s].items())) for s in SYNSETS]
        _write(source, {"fall11_whole.tar": _tar(tars)})
    else:  # the images of the first synset are in two places
        flat = [(f"{s}/{name}", image) for s in SYNSETS for name, image in files[s].items()]
        _write(source, {"fall11_whole.tar": _tar([*flat[3:], *flat[:3]])})
    work = data_dir / "imagenet21k" / "fall11" / "preparing-1.0.0"

    def state():
        return json.loads((work / "state.json").read_text())

    for number in (15, 31, 19):  # each run stops in its first or second synset
        with pytest.raises(_Stop):
            _prepare(source, data_dir, report=_stop_at("reading", number))
        if layout == "tars":  # finished tars are not needed again
            for unit in state()["units"]:
                (source / f"{unit.split('/')[1]}.tar").unlink(missing_ok=True)
    assert len(state()["units"]) == 4
    with pytest.raises(_Stop):
        _prepare(source, data_dir, report=_stop_at("writing", 2))
    (shard,) = (work / "ready").glob("*00000-of*")
    mtime = shard.stat().st_mtime_ns
    with pytest.raises(_Stop):
        _prepare(source, data_dir, report=_stop_at("writing", 1))
    assert shard.stat().st_mtime_ns == mtime
    assert len(state()["written"]["train"]) == 3
    # A bucket is deleted once its shards are written.
    assert len(list((work / "files").glob("train-*"))) < state()["buckets"]
    summary = _prepare(source, data_dir)
    assert not work.exists()
    assert _shards(data_dir) == _shards(prepared_source[1])
    assert sorted(line["member"] for line in _read_skipped(data_dir)) == [
        f"{s}_bad.JPEG" for s in SYNSETS
    ]
    assert (summary.skipped, summary.synsets) == (len(SYNSETS), len(SYNSETS))
    assert _prepare(source, data_dir) is None  # already prepared


@pytest.mark.slow
def test_killed_preparation_resumes_to_the_same_records(prepared_source, tmp_path):
    source, data = prepared_source[0], tmp_path / "data"
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
source = imagenet21k_source.find_source({str(source)!r})
imagenet21k.prepare(source, {str(data)!r}, shard_bytes={SHARD_BYTES}, report=report)
"""
    assert run_python("-c", code, check=False).returncode == -9
    work = data / "imagenet21k" / "fall11" / "preparing-1.0.0"
    state = json.loads((work / "state.json").read_text())
    assert state["units"] and not state["read"]
    [bucket] = (work / "files").glob("train-*")
    assert bucket.stat().st_size > state["files"][bucket.name][0]  # has data after the last commit
    _prepare(source, data)
    assert _shards(data) == _shards(prepared_source[1])


def test_unusable_sources_are_one_line_errors(tmp_path):
    synset_a, synset_b = SYNSETS[:2]
    cases = {
        "missing": (None, "nXXXXXXXX.tar"),
        "empty": ({"README": b""}, "empty"),
        "unknown": ({f"{synset_a}.tar": b"", "n99999999.tar": b""}, "n99999999"),
        "duplicate": ({f"{synset_a}.tar": b"", f"{synset_a}/x.JPEG": b""}, synset_a),
        "text.tar": ({"x.tar": b"no tar at all" * 100}, "x.tar"),
        "unnamed release": ({f"{synset_a}.tar": b"", f"{synset_b}.tar": b""}, "--release"),
    }
    for name, (files, expected) in cases.items():
        if files is not None:
            _write(tmp_path / name, files)
        with pytest.raises(UserError) as error:
            imagenet21k_source.find_source(str(tmp_path / name))
        assert expected in str(error.value) and "\n" not in str(error.value), name


def test_impossible_preparation_is_an_error(tmp_path, monkeypatch):
    source = _tars(tmp_path / "fall11", {SYNSETS[0]: FILES[SYNSETS[0]]})
    unknown_source = _write(tmp_path / "u", {"fall11.tar": _tar([("n99999999.tar", b"")])})
    with pytest.raises(UserError, match="n99999999"):
        _prepare(unknown_source, tmp_path / "1")
    empty_source = _write(tmp_path / "n", {"fall11.tar": _tar([("README", b"hello")])})
    with pytest.raises(UserError, match=r"fall11\.tar"):
        _prepare(empty_source, tmp_path / "2")
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


def test_command_reports_progress_and_the_number_of_synsets(
    prepared_source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tool, "LINE_SECS", 0.0)
    source, data_dir = prepared_source
    tool.prepare_imagenet21k(str(source), str(data_dir), "")  # already prepared
    assert capsys.readouterr().out.endswith("1.0.0: train 60\n")
    tool.prepare_imagenet21k(str(source), str(tmp_path), "winter21")
    output = capsys.readouterr().out
    assert re.search(r"^reading [\d.]+% +\d+ images .* 0 faults +left \d:\d\d", output, re.M)
    assert "5 of 19,167" in output and "imagenet21k/winter21/1.0.0" in output

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenet21k, "prepare", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        tool.prepare_imagenet21k(str(source), str(tmp_path / "x"), "")
    assert exit_info.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_plain_tfds_preparation_points_to_the_command(tmp_path):
    with pytest.raises(UserError, match="prepare imagenet21k"):
        tool.prepare_tfds("imagenet21k", str(tmp_path))
    with pytest.raises(UserError, match="prepare imagenet21k"):
        imagenet21k.builder("fall11", str(tmp_path)).download_and_prepare()

"""Fine-tuning several tasks in turn, the table of their results, and VTAB with mock data.

A mock has TFDS's builder, features and version. Where VTAB's splits count from the start of a
split, the mock's split has its real size; examples that no task reads are declared, not written.
"""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import finetune
from helpers import GOLDENS, assert_close, final_state, run_program, run_python, tiny_config
from mixer import trainer, transfer
from mixer.errors import UserError
from mixer.parallel import signals
from mixer.runs import config as run
from mixer.runs.log import TrainLog

WEIGHTS = str(GOLDENS / "mixer_tiny_official.npz")  # for images of 32 pixels, 7 classes, 3 blocks
GROUPS = {"one": ("a", "b/x", "c"), "other": ("d", "e")}


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixer.runs.curves.draw_curves", lambda *_: None)
        yield


def _tasks(names=("a", "b/x"), **values):
    """Small tasks that differ in their seeds, on synthetic data."""
    values = {"total_steps": 4, "checkpoint__every_steps": 4, "dataset__val_split": "", **values}
    values |= {"model__num_blocks": 1, "model__stoch_depth": 0.0, "model__dropout": 0.0}
    return {name: tiny_config(seed=seed, **values) for seed, name in enumerate(names)}


@pytest.fixture(scope="module")
def finished_tasks(tmp_path_factory):
    """Two tasks, finished without a stop: (directory, result, lines, records, arrays).

    The records are those of `transfer.json` after each task; the arrays are the numbers of device
    arrays after each task that did not exist before.
    """
    directory, lines, records, arrays = tmp_path_factory.mktemp("done"), [], [], []
    num_before = len(jax.live_arrays())

    def say(line):
        lines.append(line)
        if ", took " in line:
            records.append(json.loads((directory / "transfer.json").read_text()))
            arrays.append(len(jax.live_arrays()) - num_before)

    result = transfer.fine_tune(_tasks(), directory, groups=GROUPS, say=say)
    return directory, result, lines, records, arrays


def _result(name, count, top1):
    interval = transfer.scores.interval(top1 * count, count)
    return transfer.TaskResult(name, count, top1, interval, top1, interval, 1000, 2500)


# Results.


@pytest.mark.slow
def test_task_results_equal_the_results_of_their_runs(finished_tasks):
    directory, result, *_ = finished_tasks
    assert [task.name for task in result.tasks] == ["a", "b/x"]
    for task, folder in zip(result.tasks, ("a", "b_x"), strict=True):
        results = json.loads((directory / folder / "results.json").read_text())
        saved_result = results["splits"]["test"]
        assert (task.count, task.top1) == (saved_result["count"], saved_result["top1"])
        assert task.steps == 4
        assert list(task.top1_interval) == saved_result["top1_interval"]
        assert task.mean_per_class == saved_result["mean_per_class"]
        data = json.loads((directory / folder / "data.json").read_text())
        assert task.train_examples == data["splits"]["train"]["num_examples"]
        assert int(final_state(directory / folder)["step"]) == 4


@pytest.mark.slow
def test_record_is_written_after_each_task(finished_tasks):
    directory, result, _, records, _ = finished_tasks
    assert [list(record["tasks"]) for record in records] == [["a"], ["a", "b/x"]]
    assert [record["unfinished"] for record in records] == [["b/x"], []]
    assert records[0]["means"]["one"]["num_tasks"] == 1
    final_record = json.loads((directory / "transfer.json").read_text())
    assert final_record == records[1] == json.loads(json.dumps(result.summary()))


@pytest.mark.slow
def test_finished_task_frees_its_device_arrays(finished_tasks):
    *_, arrays = finished_tasks
    assert len(arrays) == 2 and max(arrays) <= 0


@pytest.mark.slow
def test_log_reports_start_end_and_remaining_time_of_each_task(finished_tasks):
    _, result, lines, *_ = finished_tasks
    assert "2 tasks" in lines[0]
    assert lines[1].startswith("task 1 of 2: a: ")
    assert lines[2].startswith(f"task 1 of 2: a: {result.tasks[0].top1:.2%} (")
    assert lines[3].startswith("task 2 of 2: b/x: ") and lines[3].endswith(" left")
    assert len(lines) == 5


def test_means_cover_the_finished_tasks():
    shares = dict(p=0.5, q=0.7, r=0.9)
    tasks = tuple(_result(name, 1000, share) for name, share in shares.items())
    groups = {"first": ("p", "q"), "second": ("r", "s", "t"), "third": ("u",)}
    result = transfer.Transfer(tasks, ("p", "q", "r", "s"), groups)
    means = result.means()
    assert list(means) == ["first", "second", "mean"]
    assert [(mean["num_tasks"], mean["of"]) for mean in means.values()] == [(2, 2), (1, 3), (3, 6)]
    assert [mean["top1"] for mean in means.values()] == pytest.approx([0.6, 0.9, 0.7])
    # The variance of a mean of independent shares is the sum of theirs over the squared count.
    variance = sum(share * (1 - share) / 1000 for share in shares.values()) / 9
    low, high = means["mean"]["top1_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.01)
    assert result.summary()["unfinished"] == ["s"]
    # The mean of a group of all tasks is the overall mean.
    five = transfer.Transfer(tasks, ("p", "q", "r"), {"avg 5": ("p", "q", "r", "s", "t")})
    assert [(key, mean["of"]) for key, mean in five.means().items()] == [("avg 5", 5)]


def test_table_has_every_task_and_mean():
    tasks = (_result("p", 1000, 0.5), _result("q/x", 30_000, 0.75))
    result = transfer.Transfer(tasks, ("p", "q/x"), {"both": ("p", "q/x"), "other": ("s",)})
    assert result.markdown() == [
        "| task | test images | top-1 | interval | mean per class |",
        "|---|--:|--:|--:|--:|",
        "| p | 1,000 | 50.00% | 46.91% to 53.09% | 50.00% |",
        "| q/x | 30,000 | 75.00% | 74.51% to 75.49% | 75.00% |",
        "| both | 2 tasks | 62.50% | 60.93% to 64.07% |  |",
        "| mean | 2 of 3 tasks | 62.50% | 60.93% to 64.07% |  |",
    ]


# Resumption.


@pytest.mark.slow
def test_finished_tasks_are_not_run_again(finished_tasks, tmp_path, monkeypatch):
    directory, result, *_ = finished_tasks
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(trainer, "train", None)
    (tmp_path / "transfer.json").unlink()
    lines = []
    second_result = transfer.fine_tune(_tasks(), tmp_path, groups=GROUPS, say=lines.append)
    assert second_result == result
    assert len(lines) == 2
    assert (tmp_path / "transfer.json").read_bytes() == (directory / "transfer.json").read_bytes()
    # With fewer tasks, the means cover only those.
    subset = transfer.fine_tune(_tasks(("a",)), tmp_path, groups=GROUPS, say=lines.append)
    assert {key: (mean["num_tasks"], mean["of"]) for key, mean in subset.means().items()} == {
        "one": (1, 3),
        "mean": (1, 5),
    }


@pytest.mark.slow
def test_interrupted_transfer_resumes_with_the_same_result(finished_tasks, tmp_path, monkeypatch):
    """SIGTERM arrives at the third step of the second task."""
    directory, result, *_ = finished_tasks
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "b_x")
    steps, finish_step = [], TrainLog.finish_step

    def finish(self, first, last, metrics):
        steps.append(last)
        if last == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        finish_step(self, first, last, metrics)

    monkeypatch.setattr(TrainLog, "finish_step", finish)
    with pytest.raises(signals.Stopped):
        transfer.fine_tune(_tasks(), tmp_path, groups=GROUPS, say=print)
    assert (tmp_path / "b_x" / "checkpoints" / "3").is_dir()
    second_result = transfer.fine_tune(_tasks(), tmp_path, groups=GROUPS, say=print)
    assert steps == [1, 2, 3, 4]  # all of the second task
    assert second_result == result
    assert_close(final_state(tmp_path / "b_x"), final_state(directory / "b_x"))


# Mistakes that stop before the first training.


def _refused(tasks, directory, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        transfer.fine_tune(tasks, directory, groups={}, say=lambda line: None, **options)
    assert "\n" not in str(caught.value)
    assert not list(directory.glob("*/checkpoints/*"))
    return str(caught.value)


@pytest.mark.slow
def test_finished_task_with_another_config_is_refused_by_name(finished_tasks):
    directory, *_ = finished_tasks
    for change in (dict(optimizer__peak_lr=1.0), dict(total_steps=8), dict(global_batch_size=8)):
        tasks = _tasks() | {"b/x": _tasks(**change)["b/x"]}
        key = next(iter(change)).replace("__", r"\.")
        with pytest.raises(UserError, match=rf"^b/x: .*/b_x .*{key}: ."):
            transfer.fine_tune(tasks, directory, groups={}, say=print)


def test_unprepared_data_sets_are_listed_together(tmp_path):
    tasks = _tasks(("a",))
    for name in ("dmlab", "clevr_count", "clevr_distance", "sun397"):
        tasks[name] = finetune.get_config(f"dataset=vtab/{name},res=32,init={WEIGHTS}")
        tasks[name].dataset.data_dir = str(tmp_path / "tfds")
    text = _refused(tasks, tmp_path, "^3 data sets ")
    for name in ("dmlab", "clevr", "sun397/tfds"):
        command = f"`python -m mixer.tools.prepare tfds {name} --data_dir={tmp_path}/tfds`"
        assert text.count(command) == 1


def test_suite_trains_the_architecture_of_the_weights(tmp_path, monkeypatch):
    configs = []

    def fine_tune(tasks, *arguments, **options):
        configs.extend(tasks.values())
        raise UserError("nothing is trained")

    monkeypatch.setattr(transfer, "fine_tune", fine_tune)
    path = GOLDENS / "vit_tiny_official_token.npz"
    arguments = f"--weights={path}", "--suite=transfer", f"--output={tmp_path}", "--tasks=cifar10"
    assert run_program("evaluate.py", *arguments).stderr.endswith("nothing is trained\n")
    (config,) = configs
    assert (config.model.name, config.init_resize) == ("vit", "interpolate")
    assert run.find_initial(config).card.architecture == "vit"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(init_from="/nowhere.npz"), "^b: /nowhere.npz"),
        (dict(dataset__test_split=""), "^b: dataset.test_split"),
        (dict(dataset__train_split="trian"), "^b: split.*'trian'"),
        (dict(total_steps=None), "^b: .*total_steps"),
        (dict(init_from=WEIGHTS), "^b: .*image"),
    ],
)
def test_fault_in_a_later_task_stops_before_the_first(tmp_path, change, message):
    tasks = {**_tasks(("a",)), "b": tiny_config(**change)}
    _refused(tasks, tmp_path, message)


def test_wrong_number_of_images_is_refused(tmp_path):
    _refused(_tasks(("a",)), tmp_path, "^a: .* 7$", train_examples=7)


# VTAB's data.

# Examples of each split as TFDS has them, where VTAB counts from a split's start; else a few.
MOCKS = {
    "caltech101": dict(train=3059, test=24),
    "cifar100": dict(train=50_000, test=24),
    "clevr": dict(train=70_000, validation=24, test=24),
    "diabetic_retinopathy_detection/btgraham-300": dict(train=820, validation=210, test=24),
    "dmlab": dict(train=820, validation=210, test=24),
    "dsprites": dict(train=737_280),
    "dtd": dict(train=820, validation=210, test=24),
    "eurosat/rgb": dict(train=27_000),
    "kitti": dict(train=820, validation=210, test=24),
    "oxford_flowers102": dict(train=1020, validation=210, test=24),
    "oxford_iiit_pet": dict(train=3680, test=24),
    "patch_camelyon": dict(train=820, validation=210, test=24),
    "resisc45": dict(train=31_500),
    "smallnorb": dict(train=820, test=800),
    "sun397/tfds": dict(train=820, validation=210, test=24),
    "svhn_cropped": dict(train=73_257, test=24),
}


def _example(feature, rng):
    """A value that fits a feature of TFDS; an image of its shape, 24 x 20 where that is open."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: _example(value_feature, rng) for key, value_feature in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        return [_example(feature.feature, rng) for _ in range(rng.integers(3, 11))]
    if isinstance(feature, tfds.features.Image):
        # Smooth, so that a large one is small on disk.
        shape = [side or default for side, default in zip(feature.shape, (24, 20, 3), strict=True)]
        return np.full(shape, rng.integers(0, 256), np.uint8)
    if isinstance(feature, tfds.features.ClassLabel):
        return int(rng.integers(feature.num_classes))
    if isinstance(feature, tfds.features.BBoxFeature):
        return tfds.features.BBox(0.0, 0.0, 0.5, 1.0)
    if isinstance(feature, tfds.features.Text):
        return "text"
    return rng.uniform(0, 20, feature.shape).astype(feature.np_dtype)


def _mock(name, data_dir, splits):
    """Prepares the TFDS set `name` with random examples, those of `splits` (name, first, last).

    Files of other examples are declared and not written, so that reading one fails.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    features, rng = builder.info.features, np.random.default_rng(0)
    records = [
        features.serialize_example(features.encode_example(_example(features, rng)))
        for _ in range(100)
    ]
    infos = []
    for split, size in MOCKS[name].items():
        parts = sorted({(a, b) for which, a, b in splits if which == split})
        edges = sorted({0, size, *(edge for part in parts for edge in part)})
        lengths = list(np.diff(edges))
        template = tfds.core.ShardedFileTemplate(
            data_dir=builder.data_path,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="tfrecord",
        )
        infos.append(tfds.core.SplitInfo(split, list(map(int, lengths)), 1 << 20, template))
        builder.data_path.mkdir(parents=True, exist_ok=True)
        for shard, (start, length) in enumerate(zip(edges, lengths, strict=False)):
            if any(a <= start < b for a, b in parts):
                path = template.sharded_filepath(shard_index=shard, num_shards=len(lengths))
                with tf.io.TFRecordWriter(str(path)) as writer:
                    for number in range(length):
                        writer.write(records[number % len(records)])
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)


def _vtab(names, data_dir):
    """Makes the sets in `data_dir`; returns the tasks and the sizes of their test splits.

    The tasks are those of evaluate.py, with 2 steps and at most the first 400 test images.
    """
    from mixer.data.sources.stored import absolute

    weights = data_dir.with_name("one_block.npz")
    arrays = np.load(WEIGHTS)
    keys = [key for key in arrays.files if not key.startswith(("MixerBlock_1/", "MixerBlock_2/"))]
    np.savez(weights, **{key: arrays[key] for key in keys})
    tasks, parts_by_name, test_sizes = {}, {}, {}
    for name in names:
        config = finetune.get_config(f"dataset=vtab/{name},split=1000,res=32,init={weights}")
        config.dataset.data_dir = str(data_dir)
        config.update(total_steps=2, global_batch_size=64, eval_batch_size=512)
        config.update(tensorboard=False, eval_every_steps=None)
        config.schedule.warmup_steps = 0
        tasks[name] = config
        sizes = MOCKS[config.dataset.name]
        (part,) = absolute(config.dataset.test_split, sizes)
        start, end = part.from_ or 0, part.to or sizes[part.splitname]
        test_sizes[name] = end - start
        config.dataset.test_split = f"{part.splitname}[{start}:{min(end, start + 400)}]"
        for spec in (config.dataset.train_split, config.dataset.test_split):
            for part in absolute(spec, sizes):
                part = (part.splitname, part.from_ or 0, part.to or sizes[part.splitname])
                parts_by_name.setdefault(config.dataset.name, []).append(part)
    for name, splits in parts_by_name.items():
        _mock(name, str(data_dir), splits)
    return tasks, test_sizes


def _check_vtab(names, directory):
    tasks, test_sizes = _vtab(names, directory / "tfds")
    result = transfer.fine_tune(
        tasks,
        directory,
        groups=finetune.VTAB_GROUPS,
        say=lambda line: None,
        train_examples=finetune.VTAB_TRAIN_EXAMPLES,
    )
    assert [task.name for task in result.tasks] == list(names)
    for task in result.tasks:
        assert (task.train_examples, task.steps) == (1000, 2)
        assert task.count == min(test_sizes[task.name], 400)
        low, high = task.top1_interval
        assert low - 1e-9 <= task.top1 <= high + 1e-9
        classes = json.loads((directory / task.name / "data.json").read_text())["class_names"]
        assert len(classes) == VTAB_CLASSES[task.name]
    assert len(result.markdown()) == 2 + len(names) + len(result.means())
    return test_sizes, result.means()


# Classes of each task [recalled: the benchmark's table]; TFDS's caltech101 counts the background.
VTAB_CLASSES = {
    "caltech101": 102,
    "cifar100": 100,
    "dtd": 47,
    "flowers102": 102,
    "pets": 37,
    "sun397": 397,
    "svhn": 10,
    "camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "retinopathy": 5,
    "clevr_count": 8,
    "clevr_distance": 6,
    "dmlab": 6,
    "dsprites_location": 16,
    "dsprites_orientation": 16,
    "kitti_distance": 4,
    "smallnorb_azimuth": 18,
    "smallnorb_elevation": 9,
}


def test_vtab_groups_partition_its_tasks():
    assert {group: len(names) for group, names in finetune.VTAB_GROUPS.items()} == {
        "natural": 7,
        "specialised": 4,
        "structured": 8,
    }
    names = [name for names in finetune.VTAB_GROUPS.values() for name in names]
    assert names == list(finetune.VTAB) == list(VTAB_CLASSES)
    assert len(finetune.TRANSFER) == 5 and set(finetune.TRANSFER) < set(finetune.SETS)


@pytest.mark.slow
def test_vtab_tasks_run(tmp_path):
    names = [name for names in finetune.VTAB_GROUPS.values() for name in names]
    test_sizes, means = _check_vtab(names, tmp_path)
    expected = dict.fromkeys(names, 24)
    expected |= dict(eurosat=5400, resisc45=6300, smallnorb_azimuth=400, smallnorb_elevation=400)
    expected |= dict(dsprites_location=73_728, dsprites_orientation=73_728)
    assert test_sizes == expected
    assert {key: (mean["num_tasks"], mean["of"]) for key, mean in means.items()} == {
        "natural": (7, 7),
        "specialised": (4, 4),
        "structured": (8, 8),
        "mean": (19, 19),
    }


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tasks(tmp_path):
    """Four tasks of a model whose state has 50 MB, which would show in the memory if it stayed.

    malloc holds on to an unpredictable part of freed memory; one arena, trimmed first, avoids that.
    """
    code = f"""
import ctypes, psutil
from helpers import tiny_config
from mixer import transfer
held = []
def say(line):
    if "took" in line:
        ctypes.CDLL(None).malloc_trim(0)
        held.append(psutil.Process().memory_info().rss / 2**20)
tasks = {{}}
for seed in range(4):
    config = tiny_config(seed=seed, total_steps=2, image_size=64, schedule__warmup_steps=0)
    config.dataset.val_split = ""
    config.model.update(hidden_dim=512, channels_mlp_dim=2048, patch_size=16)
    tasks[str(seed)] = config
transfer.fine_tune(tasks, {str(tmp_path)!r}, groups={{}}, say=say)
print("held", *held)
"""
    words = run_python("-c", code, MALLOC_ARENA_MAX="1").stdout.splitlines()[-1].split()
    memory_mb = [float(word) for word in words[1:]]
    assert len(memory_mb) == 4
    assert memory_mb[3] - memory_mb[1] < 40, memory_mb  # 2 states would be 100

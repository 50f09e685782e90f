"""Training images that stay on the device: the same run as from a stream, however it is cut."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import multihost
import numpy as np
import pytest
from PIL import Image

from helpers import assert_same_bits, final_state, run_python, tiny_config
from mixer import run, stepping, trainer
from mixer.data import pipeline, resident
from mixer.errors import UserError
from mixer.metrics import read_metrics
from mixer.signals import Stopped

STEPS = "decode|resize(8)|random_crop(8, pad=1)|flip_lr"


def _config(tfds_dir, tmp_path, *, everything=False, **values):
    """198 digits, of which 24 steps take each once or twice."""
    exclude = tmp_path / "exclude.jsonl"
    names = [f"digits-train.tfrecord-00000-of-00001:{number}" for number in (3, 90)]
    exclude.write_text("".join(json.dumps({"example": name}) + "\n" for name in names))
    values = {"total_steps": 24, "eval_every_steps": 12, "checkpoint__every_steps": 12, **values}
    config = tiny_config(tfds_dir, **values)
    config.dataset.update(train_split="train[:200]", train_preprocess=STEPS, exclude=str(exclude))
    if not everything:
        config.dataset.test_split, config.mixup.alpha, config.model.num_blocks = "", 0.0, 1
        config.optimizer.update(accumulate_steps=1, lr_multipliers=())
    return config


def _record(workdir):
    """By step, without what depends on the clock."""
    rows = read_metrics(workdir)
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, tfds_dir):
    path = tmp_path_factory.mktemp("streamed")
    trainer.train(_config(tfds_dir, path, dataset__on_device="off"), path / "run")
    return path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("on_device", "augment_on"), [("on", "auto"), ("off", "device")])
def test_nothing_of_the_update_is_compiled_with_the_augmentation(
    tfds_dir, tmp_path, on_device, augment_on
):
    """Mixing is what a compiler would join with it, and round otherwise."""
    config = _config(tfds_dir, tmp_path, everything=True, dataset__on_device="off")
    config.mixup.update(cutmix_alpha=1.0, cutmix_prob=0.5)
    config.optimizer.sam_rho = 0.05
    trainer.train(config, tmp_path / "stream")
    config.dataset.update(on_device=on_device, augment_on=augment_on)
    trainer.train(config, tmp_path / "run")
    assert_same_bits(final_state(tmp_path / "run"), final_state(tmp_path / "stream"))
    assert _record(tmp_path / "run") == _record(tmp_path / "stream")


def test_run_is_that_of_the_stream_bit_for_bit(streamed, tfds_dir, tmp_path, monkeypatch, capsys):
    """Stopped and continued, its calls ending elsewhere: to log, to evaluate, around a profile."""
    calls, stopped = [], []
    taken = stepping.Resident.take

    def take(self, step, most):
        count, update = taken(self, step, most)
        calls.append((step, count))
        if step >= 7 and not stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            stopped.append(step + count)
        return count, update

    monkeypatch.setattr(stepping.Resident, "take", take)
    monkeypatch.setattr(stepping, "CALL_SECS", 600.0)  # grows, however slow this machine is
    with pytest.raises(Stopped):
        trainer.train(_config(tfds_dir, tmp_path, log_every_steps=10), tmp_path / "run")
    assert max(count for _, count in calls) > 1
    assert (tmp_path / "run" / "checkpoints" / str(stopped[0])).is_dir()
    trainer.train(_config(tfds_dir, tmp_path, profile_steps=(14, 17)), tmp_path / "run")
    out = capsys.readouterr().out
    assert "training images stay on the device: 198 of 8 x 8 px, 38.8 kB; there they take" in out
    assert_same_bits(final_state(tmp_path / "run"), final_state(streamed))
    rows = [row for row in _record(tmp_path / "run") if row["step"] > 10]
    assert rows == [row for row in _record(streamed) if row["step"] > 10]
    assert {12, 13, 17, 24} <= {step + count for step, count in calls}
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_steps_of_a_stream_on_the_device_change_no_bit(streamed, tfds_dir, tmp_path, capsys):
    config = _config(tfds_dir, tmp_path, dataset__on_device="off", dataset__augment_on="device")
    trainer.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "on_device=off; on the device they take random_crop(8, pad=1)|flip_lr\n" in out
    assert_same_bits(final_state(tmp_path / "run"), final_state(streamed))


def test_a_run_that_was_begun_as_a_stream_stays_one(tfds_dir, tmp_path, capsys):
    config = _config(tfds_dir, tmp_path, total_steps=4, dataset__on_device="off")
    trainer.train(config, tmp_path / "run")
    config.update(total_steps=8)
    config.dataset.on_device = "auto"
    trainer.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "streamed: dataset.on_device=off\n" in out and "streamed: the run was begun so\n" in out


def test_images_of_any_size_are_no_batch_for_the_device(tfds_dir, tmp_path):
    config = _config(tfds_dir, tmp_path, dataset__on_device="off", dataset__augment_on="device")
    config.dataset.train_preprocess = STEPS.replace("|resize(8)", "")
    with pytest.raises(UserError, match=r"augment_on=device: .*'decode' give images of any size"):
        trainer.train(config, tmp_path / "run")


def _read(config, mode="on", num_drawn=10**6):
    split = run.open_split(config, "train", None, augment=True)
    return resident.read(split, mode=mode, num_drawn=num_drawn), split


def test_arrays_are_the_examples_in_order(tfds_dir, tmp_path):
    """Labels as their steps leave them, wherever these stand; numbers count excluded ones."""
    config = _config(tfds_dir, tmp_path)
    config.dataset.train_preprocess = f"{STEPS}|one_hot(10)|value_range(0, 1)"
    examples, _ = _read(config)
    config.dataset.train_preprocess = "decode|one_hot(10)"
    split = run.open_split(config, "train", None, augment=True)
    (whole,) = split.sequential_batches(start=0, stop=198, batch_size=198)
    assert examples.arrays.keys() == {"image", "label", "number"}
    for name in ("image", "label"):
        assert examples.arrays[name].dtype == whole[name].dtype
        np.testing.assert_array_equal(examples.arrays[name], whole[name])
    numbers = np.delete(np.arange(200), [3, 90])
    np.testing.assert_array_equal(examples.arrays["number"], numbers)


def test_images_of_several_labels_train_as_streamed(tmp_path):
    """Their labels are padded lists with weights, which are drawn with the images."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(20):
        path = tmp_path / "images" / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        count = 1 + number % 2
        labels, weights = [number % 4, (number + 1) % 4][:count], [0.5 + number / 40, 1.0][:count]
        lines.append({"path": f"images/{number}.png", "labels": labels, "weights": weights})
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_config(loss="sigmoid", dataset__name="folder", dataset__data_dir=str(tmp_path))
    config.update(total_steps=4, eval_every_steps=None)
    config.dataset.update(label_file=str(tmp_path / "labels.jsonl"), val_split="", test_split="")
    config.dataset.update(train_preprocess="decode|flip_lr", eval_preprocess="decode")
    config.dataset.on_device = "on"
    examples, split = _read(config)
    assert split.multi_label and len(examples.arrays) == 4
    trainer.train(config, tmp_path / "kept")
    config.dataset.on_device = "off"
    trainer.train(config, tmp_path / "streamed")
    assert_same_bits(final_state(tmp_path / "kept"), final_state(tmp_path / "streamed"))


def test_changed_data_is_refused_before_it_is_read(tfds_dir, tmp_path, monkeypatch):
    config = _config(tfds_dir, tmp_path, total_steps=4)
    trainer.train(config, tmp_path / "run")
    config.total_steps = 8
    (tmp_path / "exclude.jsonl").write_text("")
    monkeypatch.setattr(resident, "read", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"the training data has changed .* 198 examples, now"):
        trainer.train(config, tmp_path / "run")


def test_places_and_epochs_are_the_streams_order():
    config = tiny_config()
    split = run.open_split(config, "train", None)
    mesh = trainer.sharding.make_mesh({})
    spec = resident.order_spec(5, 700, mesh)
    order = resident.put_order(2, 3, seed=4, num_examples=2048, spec=spec)
    stream = split.train_batches(
        start_step=2, seed=4, global_batch_size=700, process_index=0, process_count=1
    )
    labels = split.labels()
    for row, batch in enumerate(itertools.islice(stream, 3)):
        np.testing.assert_array_equal(labels[np.asarray(order["place"][row])], batch["label"])
    epochs = (np.arange(1400, 3500) >= 2048).reshape(3, 700)
    np.testing.assert_array_equal(order["epoch"][:3], epochs)
    assert not np.any(order["place"][3:])


def _folder(tmp_path, sizes):
    rng = np.random.default_rng(0)
    for number, side in enumerate(sizes):
        path = tmp_path / "train" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(tmp_path))
    config.dataset.update(train_split="train", train_preprocess="decode|random_crop(8)|flip_lr")
    return config


def test_a_policy_on_large_images_is_slow_but_for_gpus():
    steps = "decode|resize(224)|randaugment(2, 15)"
    assert not resident.are_slow(steps, (224, 224), "gpu")
    assert resident.are_slow(steps, (224, 224), "tpu")
    assert not resident.are_slow(steps, (32, 32), "tpu")


def test_what_cannot_stay_is_named(tmp_path, monkeypatch):
    config = _folder(tmp_path, [8, 8, 8, 9])
    with pytest.raises(
        UserError,
        match=r"^dataset.on_device=on: images differ in size \(8 x 8, and train/1/3.png 9 x 9\);",
    ):
        _read(config)
    reason, split = _read(config, "auto")
    assert reason.startswith("images differ in size (8 x 8, and train/1/3.png 9 x 9)")
    config.dataset.train_preprocess = "inception_crop(8)|flip_lr"
    with pytest.raises(UserError, match=r"on_device=on: inception_crop makes other images"):
        _read(config)
    with pytest.raises(UserError, match=r"on_device='yes'; one of auto, on, off"):
        config.dataset.on_device = "yes"
        run.check_config(config)
    assert resident.read(split, mode="off", num_drawn=9) == "dataset.on_device=off"
    assert resident.read(split, mode="auto", num_drawn=3) == "the run draws 3 of 4 images"
    config.dataset.train_preprocess = "decode|resize(8)|flip_lr"
    assert not isinstance(_read(config, "auto")[0], str)
    monkeypatch.setattr(resident, "AUTO_BYTES", 1000)
    assert _read(config, "auto")[0].startswith("about 1.")  # kB of PNG; as arrays 784 B
    monkeypatch.setattr(resident, "AUTO_BYTES", 100)
    assert _read(config, "auto")[0].endswith("and dataset.on_device=auto keeps 100 B")


def test_split_that_is_remembered_is_read_once(tfds_dir, monkeypatch):
    read = []

    def batches(**part):
        read.append(part)
        return split.sequential_batches(**part)

    split = run.open_split(tiny_config(tfds_dir), "val", None)
    remembered = resident.remember(dataclasses.replace(split, sequential_batches=batches))
    how = dict(global_batch_size=64, process_count=1, process_index=0)
    wanted = list(pipeline.eval_batches(split, **how))
    next(pipeline.eval_batches(remembered, **how))  # given up in the middle: not kept
    for _ in range(3):
        found = list(pipeline.eval_batches(remembered, **how))
        assert [batch.keys() for batch in found] == [batch.keys() for batch in wanted]
        for one, other in zip(found, wanted, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    assert len(read) == 2
    monkeypatch.setattr(resident, "AUTO_BYTES", 100)
    assert resident.remember(split) is split and resident.remember(None) is None


def test_calls_grow_until_they_take_long_enough():
    class Lowered:
        def compile(self):
            return lambda state, examples, order, count: (state + int(count), order)

    orders = []
    source = stepping.Resident(Lowered(), {}, lambda *at: orders.append(at) or at, 40)
    lengths, step = [], 0
    while step < 200:
        count, update = source.take(step, 100 - step % 100)
        assert update(step) == (step + count, (step, count))
        source.took(count, 0.01 * count)  # 0.64 s would be too long, and 40 is the most
        lengths.append(count)
        step += count
    assert lengths[:7] == [1, 2, 4, 8, 16, 32, 37] and max(lengths) == 40
    source = stepping.Resident(Lowered(), {}, lambda *at: at, 40)
    for seconds in (0.1, 0.3, 0.7, 0.1):
        source.took(source.take(0, 100)[0], seconds)
    assert source.take(0, 100)[0] == 4


def test_calls_end_where_the_host_has_something_to_do():
    config = tiny_config(total_steps=40, log_every_steps=7, eval_every_steps=None)
    config.update(profile_steps=(17, 19), checkpoint=dict(every_steps=12))
    ends = [0]
    while ends[-1] < 40:
        ends.append(trainer._next_stop(config, ends[-1]))
    assert ends[1:] == [7, 12, 14, 16, 19, 21, 24, 28, 35, 36, 40]


ON_DEVICES = """
import sys
sys.path.insert(0, "tests")
import pathlib, numpy as np
from helpers import final_state, leaves, tiny_config
from mixer import trainer
ends = []
for mode in ("off", "on"):
    config = tiny_config(sys.argv[2], dataset__on_device=mode)
    config.mesh.update(data=2, fsdp=2)
    path = pathlib.Path(sys.argv[1]) / mode
    trainer.train(config, path)
    ends.append(leaves(final_state(path)))
print(max(np.abs(ends[0][k].astype(np.float64) - ends[1][k]).max() for k in ends[0]))
"""


@pytest.mark.slow
def test_several_devices_give_the_streams_numbers(tfds_dir, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    done = run_python("-c", ON_DEVICES, tmp_path, tfds_dir, XLA_FLAGS=flags)
    assert "training images stay on the device: 1,257" in done.stdout
    assert float(done.stdout.split()[-1]) <= 1e-6


@pytest.mark.slow
def test_several_processes_give_the_streams_numbers(tmp_path):
    command = ("train.py", "--config=tests/tiny_synthetic.py", "--config.total_steps=20")
    for mode in ("off", "on"):
        out = multihost.run(
            2, 2, *command, f"--config.dataset.on_device={mode}", f"--workdir={tmp_path / mode}"
        )
    assert "training images stay on the device: 2,048" in out
    one, other = (final_state(tmp_path / mode)["params"] for mode in ("on", "off"))
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    assert max(jax.tree.leaves(differences)) <= 1e-6

"""Training images that stay on the device: which, in what order, and with the same results."""

import itertools
import json
import re
import shutil

import jax
import multihost
import numpy as np
import pytest
from PIL import Image

from helpers import (
    assert_same_bits,
    final_state,
    read_reproducible_metrics,
    run_python,
    tiny_config,
)
from mixer import trainer
from mixer.data import host_or_device, resident
from mixer.data.order import Reading
from mixer.data.preprocessing.spec import parse
from mixer.errors import UserError
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import data as run_data
from mixer.training import updates as stepping

STEPS = "decode|resize(8)|random_crop(8, pad=1)|flip_lr"


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixer.runs.curves.draw_curves", lambda *_: None)
        yield


def _config(tfds_dir, tmp_path, **values):
    """198 digits for 24 steps, almost two epochs, and every random part of an update."""
    exclude = tmp_path / "exclude.jsonl"
    names = [f"digits-train.tfrecord-00000-of-00001:{number}" for number in (3, 90)]
    exclude.write_text("".join(json.dumps({"example": name}) + "\n" for name in names))
    values = {"total_steps": 24, "eval_every_steps": 12, "checkpoint__every_steps": 12, **values}
    config = tiny_config(tfds_dir, **values)
    config.dataset.update(train_split="train[:200]", train_preprocess=STEPS, exclude=str(exclude))
    config.dataset.test_split = ""
    assert config.mixup.alpha and config.model.stoch_depth and config.optimizer.ema_decay
    assert config.optimizer.accumulate_steps > 1
    return config


@pytest.mark.slow
def test_run_that_started_streamed_stays_streamed(finished_run, tfds_dir, tmp_path, capsys):
    """The first 12 steps draw less than an epoch; "auto" would place the images of 80 steps."""
    path = shutil.copytree(finished_run, tmp_path / "run")
    config = tiny_config(tfds_dir, total_steps=80, log_every_steps=20, eval_every_steps=None)
    config.update(checkpoint=dict(every_steps=80))
    trainer.train(config, path)
    assert "stay on the device" not in capsys.readouterr().out
    assert json.loads((path / "data.json").read_text())["on_device"] is False


def test_changed_data_is_refused_before_reading_images(
    finished_run, tfds_dir, tmp_path, monkeypatch
):
    path = shutil.copytree(finished_run, tmp_path / "run")
    data = json.loads((path / "data.json").read_text())
    data["splits"]["train"]["fingerprint"] = "other"
    (path / "data.json").write_text(json.dumps(data))
    monkeypatch.setattr(resident, "read", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match="training data"):
        trainer.train(tiny_config(tfds_dir, total_steps=80), path)


def test_device_augmentation_refuses_images_of_varying_size(tfds_dir, tmp_path):
    config = _config(tfds_dir, tmp_path, dataset__on_device="off", dataset__augment_on="device")
    config.dataset.train_preprocess = STEPS.replace("|resize(8)", "")
    with pytest.raises(UserError, match=r"augment_on=device.*'decode'"):
        trainer.train(config, tmp_path / "run")


def _read(config, mode="on", num_drawn=10**6):
    split = run_data.open_split(config, "train", None, augment=True)
    return resident.read(split, mode=mode, num_drawn=num_drawn), split


def test_arrays_are_the_examples_in_order(tfds_dir, tmp_path):
    """Labels pass through their ops; the numbers count excluded examples."""
    config = _config(tfds_dir, tmp_path)
    config.dataset.train_preprocess = f"{STEPS}|one_hot(10)|value_range(0, 1)"
    examples, _ = _read(config)
    config.dataset.train_preprocess = "decode|one_hot(10)"
    split = run_data.open_split(config, "train", None, augment=True)
    (batch,) = split.sequential_batches(start=0, stop=198, batch_size=198)
    assert examples.arrays.keys() == {"image", "label", "number"}
    for name in ("image", "label"):
        assert examples.arrays[name].dtype == batch[name].dtype
        np.testing.assert_array_equal(examples.arrays[name], batch[name])
    numbers = np.delete(np.arange(200), [3, 90])
    np.testing.assert_array_equal(examples.arrays["number"], numbers)


def _several_labels(tmp_path):
    """A config for images whose labels are padded lists with weights."""
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
    config.model.update(num_blocks=1, dropout=0.0, stoch_depth=0.0)
    config.dataset.update(label_file=str(tmp_path / "labels.jsonl"), val_split="", test_split="")
    config.dataset.update(train_preprocess="decode|flip_lr", eval_preprocess="decode")
    config.dataset.on_device = "on"
    return config


def test_resident_examples_include_label_weights(tmp_path):
    examples, split = _read(_several_labels(tmp_path))
    assert split.multi_label
    assert examples.arrays.keys() == {"image", "label", "label_weight", "number"}


def test_resident_order_equals_the_streamed_order():
    config = tiny_config()
    split = run_data.open_split(config, "train", None)
    mesh = sharding.make_mesh({})
    spec = resident.order_spec(5, 700, mesh)
    order = resident.put_order(2, 3, seed=4, num_examples=2048, spec=spec)
    stream = split.train_batches(2, Reading(seed=4, global_batch_size=700))
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


def _place(spec, *, side=32, stored_bytes=0, **facts):
    """The placement of 100 images of which a run draws 1000; `facts` override these values."""
    sizes = host_or_device.Sizes((side, side), 100 * 3 * side**2, stored_bytes, 1 << 25)
    defaults = dict(mode="auto", augment_on="auto", backend="gpu", num_processes=1)
    defaults |= dict(num_examples=100, num_drawn=1000, measure=lambda: sizes)
    return host_or_device.place(parse(spec), **(defaults | facts))


FLIP = "decode|resize(32)|flip_lr"
POLICY = "decode|resize(224)|randaugment(2, 15)"


@pytest.mark.parametrize(
    ("spec", "facts", "reason"),
    [
        (FLIP, {}, ""),
        (FLIP, dict(mode="off"), "on_device=off"),
        (FLIP, dict(num_processes=2), "processes"),
        (FLIP, dict(mode="on", num_processes=2), ""),
        (FLIP, dict(num_examples=None), "not known"),
        (FLIP, dict(mode="on", num_examples=None, measure=lambda: None), ""),
        (FLIP, dict(measure=lambda: None), "not known"),
        (FLIP, dict(num_drawn=99), "99 of 100"),
        (FLIP, dict(mode="on", num_drawn=99), ""),
        (FLIP, dict(mode="on", read_by_file=True), "file by file"),
        ("inception_crop(32)|flip_lr", dict(mode="on"), "inception_crop"),
        (FLIP, dict(augment_on="host"), "augment_on=host"),
        (FLIP, dict(mode="on", augment_on="host"), ""),
        ("decode|resize(32)", dict(augment_on="host"), ""),
        (POLICY, dict(side=224), ""),
        (POLICY, dict(side=224, backend="tpu"), "randaugment"),
        (POLICY, dict(side=224, backend="tpu", mode="on"), ""),
        (POLICY, dict(side=32, backend="tpu"), ""),
        (FLIP, dict(side=500), "75.* MB.* 33"),
        (FLIP, dict(side=500, mode="on"), "75.* MB.* 33"),
        (FLIP, dict(stored_bytes=1 << 30), "1.07 GB.* 53"),
        (FLIP, dict(stored_bytes=1 << 30, mode="on"), ""),
    ],
)
def test_placement_of_training_images(spec, facts, reason):
    decision = _place(spec, **facts)
    assert decision.on_device == (not reason) and re.search(reason, decision.reason)
    if decision.on_device:  # the device computes every op that it can
        parts = parse(spec).parts
        assert (decision.host, decision.device) == (parts.host, parts.device)


def test_sizes_are_measured_only_if_no_other_rule_decides():
    assert "on_device=off" in _place(FLIP, mode="off", measure=lambda: pytest.fail("read")).reason


@pytest.mark.parametrize(
    ("spec", "augment_on", "backend", "device"),
    [
        (FLIP, "auto", "gpu", "flip_lr"),
        (FLIP, "auto", "tpu", ""),
        (FLIP, "device", "cpu", "flip_lr"),
        (FLIP, "host", "gpu", ""),
        ("decode|flip_lr", "auto", "gpu", ""),  # images of any size
        ("decode|resize(8)", "device", "gpu", ""),
    ],
)
def test_ops_of_a_stream_that_run_on_the_device(spec, augment_on, backend, device):
    decision = host_or_device.stream(
        parse(spec), "a reason", augment_on=augment_on, backend=backend
    )
    assert (decision.reason, str(decision.device)) == ("a reason", device)
    assert str(decision.host) == spec.removesuffix(f"|{device}" if device else "")


@pytest.mark.slow
def test_reason_against_residence_is_named(tmp_path, monkeypatch):
    config = _folder(tmp_path, [8, 8, 8, 9])
    with pytest.raises(
        UserError,
        match=r"^dataset.on_device=on: .*8 x 8.*train/1/3.png 9 x 9",
    ):
        _read(config)
    reason, split = _read(config, "auto")
    assert "8 x 8" in reason and "train/1/3.png 9 x 9" in reason
    config.dataset.train_preprocess = "inception_crop(8)|flip_lr"
    with pytest.raises(UserError, match=r"on_device=on: .*inception_crop"):
        _read(config)
    with pytest.raises(UserError, match=r"on_device='yes'.*auto, on, off"):
        config.dataset.on_device = "yes"
        run.check_config(config)
    assert "on_device=off" in resident.read(split, mode="off", num_drawn=9)
    assert "3 of 4" in resident.read(split, mode="auto", num_drawn=3)
    config.dataset.train_preprocess = "decode|resize(8)|flip_lr"
    assert not isinstance(_read(config, "auto")[0], str)
    monkeypatch.setattr(host_or_device, "AUTO_BYTES", 1000)
    assert " 1." in _read(config, "auto")[0]  # kB as PNG, 784 B as arrays
    monkeypatch.setattr(host_or_device, "AUTO_BYTES", 100)
    assert "on_device=auto" in _read(config, "auto")[0] and "100 B" in _read(config, "auto")[0]


def test_remembered_split_is_read_once(tfds_dir, monkeypatch):
    parts = []

    split = run_data.open_split(tiny_config(tfds_dir), "val", None)
    remembered = resident.remember(split)
    from_storage = type(split).read

    def read_and_count(self, **part):
        if self is remembered:
            parts.append(part)
        return from_storage(self, **part)

    monkeypatch.setattr(type(split), "read", read_and_count)
    shard = dict(global_batch_size=64, process_count=1, process_index=0)
    expected = list(split.eval_batches(**shard))
    next(remembered.eval_batches(**shard))  # a pass that ends early is not remembered
    for _ in range(3):
        actual = list(remembered.eval_batches(**shard))
        assert [batch.keys() for batch in actual] == [batch.keys() for batch in expected]
        for batch, expected_batch in zip(actual, expected, strict=True):
            for name in batch:
                np.testing.assert_array_equal(batch[name], expected_batch[name])
    assert len(parts) == 2
    monkeypatch.setattr(host_or_device, "AUTO_BYTES", 100)
    assert resident.remember(split) is split and resident.remember(None) is None


def test_steps_per_call_grow_to_the_target_time():
    class Lowered:
        def compile(self):
            return lambda state, examples, order, count: (state + int(count), order)

    orders = []
    source = stepping.Resident(Lowered(), {}, lambda *at: orders.append(at) or at, 40)
    lengths, step = [], 0
    while step < 200:
        count, update = source.next(step, 100 - step % 100)
        assert update(step) == (step + count, (step, count))
        source.took(count, 0.01 * count)  # 0.64 s would be too long, and 40 is the most
        lengths.append(count)
        step += count
    assert lengths[:7] == [1, 2, 4, 8, 16, 32, 37] and max(lengths) == 40
    source = stepping.Resident(Lowered(), {}, lambda *at: at, 40)
    for seconds in (0.1, 0.3, 0.7, 0.1):
        source.took(source.next(0, 100)[0], seconds)
    assert source.next(0, 100)[0] == 4


def test_calls_end_at_log_checkpoint_and_profile_steps():
    config = tiny_config(total_steps=40, log_every_steps=7, eval_every_steps=None)
    config.update(profile_steps=(17, 19), checkpoint=dict(every_steps=12))
    ends = [0]
    while ends[-1] < 40:
        ends.append(trainer.next_stop(config, ends[-1]))
    assert ends[1:] == [7, 12, 14, 16, 19, 21, 24, 28, 35, 36, 40]


ON_DEVICES = """
import sys
sys.path.insert(0, "tests")
import pathlib, numpy as np
from helpers import final_state, leaves, tiny_config
from mixer import trainer
from mixer.runs import curves
curves.draw_curves = lambda *_: None
ends = []
for mode in ("off", "on"):
    config = tiny_config(sys.argv[2], dataset__on_device=mode, eval_every_steps=None)
    config.mesh.update(data=2, fsdp=2)
    config.model.update(num_blocks=1, stoch_depth=0.0)
    config.dataset.update(val_split="", test_split="")
    path = pathlib.Path(sys.argv[1]) / mode
    trainer.train(config, path)
    ends.append(leaves(final_state(path)))
print(max(np.abs(ends[0][k].astype(np.float64) - ends[1][k]).max() for k in ends[0]))
"""


@pytest.mark.slow
def test_resident_run_on_several_devices_equals_streamed(tfds_dir, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    process = run_python("-c", ON_DEVICES, tmp_path, tfds_dir, XLA_FLAGS=flags)
    assert "stay on the device: 1,257" in process.stdout
    assert float(process.stdout.split()[-1]) <= 1e-6


@pytest.mark.slow
def test_resident_run_on_several_processes_equals_streamed(tmp_path):
    command = ("train.py", "--config=tests/tiny_synthetic.py", "--config.total_steps=20")
    for mode in ("off", "on"):
        out = multihost.run(
            2, 2, *command, f"--config.dataset.on_device={mode}", f"--workdir={tmp_path / mode}"
        )
    assert "stay on the device: 2,048" in out
    resident_params, streamed_params = (
        final_state(tmp_path / mode)["params"] for mode in ("on", "off")
    )
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), resident_params, streamed_params)
    assert max(jax.tree.leaves(differences)) <= 1e-6


# Bits.


@pytest.mark.slow
@pytest.mark.bitwise
def test_resident_multi_label_run_equals_streamed_bitwise(tmp_path):
    """The images' labels and weights are drawn with them."""
    config = _several_labels(tmp_path)
    trainer.train(config, tmp_path / "resident")
    config.dataset.on_device = "off"
    trainer.train(config, tmp_path / "streamed")
    assert_same_bits(final_state(tmp_path / "resident"), final_state(tmp_path / "streamed"))


@pytest.mark.slow
@pytest.mark.bitwise
def test_augmentation_on_the_device_does_not_change_the_update(tfds_dir, tmp_path, capsys):
    """XLA could fuse mixing with the augmentation and round differently."""
    config = _config(tfds_dir, tmp_path, dataset__on_device="off", eval_every_steps=None)
    config.dataset.val_split = ""
    config.model.num_blocks = 1  # mixing is next to the first layer
    config.mixup.update(cutmix_alpha=1.0, cutmix_prob=0.5)
    config.optimizer.sam_rho = 0.05
    trainer.train(config, tmp_path / "stream")
    stream_metrics = read_reproducible_metrics(tmp_path / "stream")
    for on_device, augment_on in (("on", "auto"), ("off", "device")):
        config.dataset.update(on_device=on_device, augment_on=augment_on)
        trainer.train(config, tmp_path / on_device)
        assert_same_bits(final_state(tmp_path / on_device), final_state(tmp_path / "stream"))
        assert read_reproducible_metrics(tmp_path / on_device) == stream_metrics
    out = capsys.readouterr().out
    assert "on_device=off" in out and "random_crop(8, pad=1)|flip_lr\n" in out

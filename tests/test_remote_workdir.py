"""Tests a run directory on `gs://`, with tests/fake_gcs.py as a stand-in for the bucket."""

import fake_gcs
import pytest
from etils import epath

import mixer
from helpers import assert_same_bits, final_state, tiny_config
from mixer import trainer
from mixer.runs import record as metrics
from mixer.weights import checkpoint

WORKDIR = "gs://bucket/runs/tiny"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    (tmp_path / "bucket").mkdir()
    with fake_gcs.buckets(tmp_path, monkeypatch):
        yield tmp_path / "bucket"


@pytest.mark.slow
def test_run_in_a_bucket_resumes_from_its_last_complete_checkpoint(bucket):
    """A bucket has no rename, so a checkpoint is complete once Orbax has written its last file."""
    config = tiny_config(total_steps=8, model__num_blocks=1, model__dropout=0.0)
    trainer.train(config, WORKDIR)
    run = bucket / "runs" / "tiny"
    record = [row for row in metrics.read_metrics(WORKDIR) if "train/loss" in row]
    assert [row["step"] for row in record] == [2, 4, 6, 8]
    expected = final_state(epath.Path(WORKDIR), 8)
    results = (run / "results.json").read_text()

    (run / "checkpoints" / "8" / "commit_success.txt").unlink()  # as if the host was killed
    assert checkpoint.find_step(WORKDIR).name == "4"
    trainer.train(config, WORKDIR)
    assert checkpoint.find_step(WORKDIR).name == "8"
    assert_same_bits(final_state(epath.Path(WORKDIR), 8), expected)
    record_after = [row for row in metrics.read_metrics(WORKDIR) if "train/loss" in row]
    assert [row["train/loss"] for row in record_after] == [row["train/loss"] for row in record]
    assert (run / "results.json").read_text() == results
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    # A damaged checkpoint is moved aside, and the resumed run ends with the same parameters.
    manifest = run / "checkpoints" / "8" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:20])
    trainer.train(config, WORKDIR)
    assert (run / "damaged" / "8-1" / "state").is_dir()
    assert_same_bits(final_state(epath.Path(WORKDIR), 8), expected)
    _, params = mixer.load(WORKDIR)
    assert_same_bits(params, expected["params"])

"""Tests throughput measurements and the device-hours of a run computed from its metrics."""

import json
import types

import jax
import pytest

from helpers import run_program, tiny_config
from mixer.errors import UserError
from mixer.evaluation import throughput
from mixer.models.mlp_mixer import VARIANTS
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.runs import record as metrics
from mixer.training import program
from mixer.training import state as train_state


@pytest.fixture(scope="module")
def tiny_model():
    config = tiny_config(model__num_classes=10, model__num_blocks=1)
    model, mesh = program.build_model(config), sharding.make_mesh({"data": -1})
    abstract = train_state.abstract_params(model, (8, 8), mesh)
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract)
    return model, params, mesh


def _measure(tiny_model, **options):
    model, params, mesh = tiny_model
    return throughput.measure(
        model, params, (8, 8), **dict(batch_sizes=(1, 4), mesh=mesh, seconds=0.05) | options
    )


def test_rates_are_images_per_second_of_the_clock(tiny_model, monkeypatch):
    """Replaces the clock: each call of the model takes one second."""
    clock = types.SimpleNamespace(now=0.0, calls=0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    block_until_ready = jax.block_until_ready

    def advance_clock(results):
        clock.now += len(results) if isinstance(results, list) else 1
        return block_until_ready(results)

    monkeypatch.setattr(throughput.jax, "block_until_ready", advance_clock)
    result = _measure(tiny_model, seconds=50.0)
    assert result["rates"] == [
        dict(batch_size=size, images_per_second=size, low=size, high=size) for size in (1, 4)
    ]
    assert (result["devices"], result["variant"], result["published"]) == (1, None, None)
    assert (result["image_size"], result["dtype"]) == ((8, 8), "float32")


def test_wall_clock_rates_are_positive_and_ordered(tiny_model):
    for rate in _measure(tiny_model)["rates"]:
        assert 0 < rate["low"] <= rate["images_per_second"] <= rate["high"]


def test_out_of_memory_is_reported_and_other_errors_are_raised(tiny_model, monkeypatch):
    make_predict = throughput.make_predict

    def fail_at_batch_4(message):
        def make_failing_predict(*arguments):
            predict = make_predict(*arguments)

            def failing_predict(params, images):
                if len(images) == 4:
                    raise jax.errors.JaxRuntimeError(message)
                return predict(params, images)

            return failing_predict

        return make_failing_predict

    monkeypatch.setattr(
        throughput, "make_predict", fail_at_batch_4("RESOURCE_EXHAUSTED: Out of memory")
    )
    rate, out_of_memory = _measure(tiny_model)["rates"]
    assert rate["images_per_second"] > 0
    assert out_of_memory == dict(batch_size=4, images_per_second=None, low=None, high=None)
    table = throughput.make_table({"tiny": json.loads(json.dumps(_measure(tiny_model)))})
    assert table.rows[1][1] == "4" and "memory" in table.rows[1][2] and not table.rows[1][-1]
    monkeypatch.setattr(throughput, "make_predict", fail_at_batch_4("INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        _measure(tiny_model)
    monkeypatch.setattr(throughput, "make_predict", make_predict)
    # Exceeding the host's memory would kill the process, so the size is checked in advance.
    (rate,) = _measure(tiny_model, batch_sizes=(1 << 32,))["rates"]
    assert rate["images_per_second"] is None
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=100))
    assert [rate["images_per_second"] for rate in _measure(tiny_model)["rates"]] == [None, None]


def test_invalid_batch_and_image_sizes_are_errors(tiny_model):
    model, params, mesh = tiny_model
    with pytest.raises(UserError, match="batch_size=0"):
        _measure(tiny_model, batch_sizes=(4, 0))
    with pytest.raises(UserError, match=r"patch size 2 .* 9"):
        throughput.measure(model, params, (9, 8), batch_sizes=(1,), mesh=mesh)


def test_published_throughput_is_shown_for_known_variants(tiny_model, monkeypatch):
    _, _, mesh = tiny_model
    dimensions = dict(
        num_blocks=1, hidden_dim=8, tokens_mlp_dim=4, channels_mlp_dim=8, patch_size=16
    )
    monkeypatch.setitem(VARIANTS, "S/16", dimensions)
    monkeypatch.setattr(throughput, "PUBLISHED_SIZE", (16, 16))

    def measure(**fields):
        model = make_model(variant="S/16", num_classes=3, dtype="bfloat16", **fields)
        abstract = train_state.abstract_params(model, (16, 16), mesh)
        params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract)
        options = dict(batch_sizes=(1,), mesh=mesh, seconds=0.01)
        return throughput.measure(model, params, (16, 16), **options)

    assert measure(token_mixing_groups=8)["published"] is None  # not the paper's model
    result = measure()
    assert (result["variant"], result["published"]) == ("S/16", 3994)
    (row,) = throughput.make_table({"S/16": result}).rows
    assert row[:2] == ("S/16, 16 x 16, bfloat16", "1") and row[-1] == "3,994 (S/16)"


def test_published_throughput_refers_to_known_variants():
    assert set(throughput.PUBLISHED_RATES) == set(VARIANTS) - {"S/8"}


# Device-hours.


def _row(step, rate, devices, **extra_metrics):
    return {
        "step": step,
        "perf/images_per_second": rate,
        "perf/images_per_second_per_device": rate / devices,
        **extra_metrics,
    }


def test_cost_of_a_run_resumed_on_more_devices():
    rows = [
        _row(10, 100.0, 1),  # 1,000 images in 10 s
        {"step": 10, "val/top1": 0.5},
        _row(20, 50.0, 1, **{"train/loss": 1.0}),  # 1,000 images in 20 s
        _row(40, 800.0, 8),  # 2,000 images in 2.5 s on 8 devices
    ]
    cost = throughput.core_hours(rows, global_batch_size=100)
    assert cost["images"] == 4000 and cost["seconds"] == pytest.approx(32.5)
    assert cost["devices"] == (1, 8)
    assert cost["device_hours"] == pytest.approx(50 / 3600)
    assert cost["device_days"] == pytest.approx(50 / 86400)
    sentence = throughput.cost_sentence(json.loads(json.dumps(cost)))
    assert "4,000 images in 0:32 on 1 to 8 devices" in sentence and "0.0139 device" in sentence
    one_row_sentence = throughput.cost_sentence(throughput.core_hours(rows[:1], 100))
    assert "in 0:10 on 1 device," in one_row_sentence
    assert throughput.core_hours([{"step": 3, "val/top1": 0.5}], 100) is None
    assert throughput.core_hours([], 100) is None


def test_cost_is_computed_from_the_rows_of_the_meter():
    """The rates are those that the meter of a run measures."""
    meter = metrics.Meter(global_batch_size=32, start_step=0)
    rows = [{"step": step, **meter.read(step)} for step in (5, 10)]
    cost = throughput.core_hours(rows, global_batch_size=32)
    assert cost["images"] == 320 and cost["devices"] == (jax.device_count(),) * 2
    assert cost["seconds"] > 0


def test_variants_flag_refers_to_the_benchmark_tool():
    result = run_program("evaluate.py", "--suite=throughput", "--variants=S/32,B/16")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "mixer.tools.benchmark infer --models=S/32,B/16" in result.stderr

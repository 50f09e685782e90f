"""Images a second, and what a run has taken by its own log."""

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
def tiny():
    config = tiny_config(model__num_classes=10, model__num_blocks=1)
    model, mesh = program.build_model(config), sharding.make_mesh({"data": -1})
    abstract = train_state.abstract_params(model, (8, 8), mesh)
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract)
    return model, params, mesh


def _measure(tiny, **values):
    model, params, mesh = tiny
    return throughput.measure(
        model, params, (8, 8), **dict(batch_sizes=(1, 4), mesh=mesh, seconds=0.05) | values
    )


def test_rates_are_of_images_that_were_computed(tiny, monkeypatch):
    """By a clock that the program moves: a call of it takes a second."""
    clock = types.SimpleNamespace(now=0.0, calls=0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    waited = jax.block_until_ready

    def wait(results):
        clock.now += len(results) if isinstance(results, list) else 1
        return waited(results)

    monkeypatch.setattr(throughput.jax, "block_until_ready", wait)
    result = _measure(tiny, seconds=50.0)
    assert result["rates"] == [
        dict(batch_size=size, images_per_second=size, low=size, high=size) for size in (1, 4)
    ]
    assert (result["devices"], result["variant"], result["published"]) == (1, None, None)
    assert (result["image_size"], result["dtype"]) == ((8, 8), "float32")


def test_rates_of_the_clock_on_the_wall(tiny):
    for rate in _measure(tiny)["rates"]:
        assert 0 < rate["low"] <= rate["images_per_second"] <= rate["high"]


def test_what_does_not_fit_is_told_and_other_faults_are_raised(tiny, monkeypatch):
    make_predict = throughput.make_predict

    def fails(message):
        def make(*arguments):
            predict = make_predict(*arguments)

            def run(params, images):
                if len(images) == 4:
                    raise jax.errors.JaxRuntimeError(message)
                return predict(params, images)

            return run

        return make

    monkeypatch.setattr(throughput, "make_predict", fails("RESOURCE_EXHAUSTED: Out of memory"))
    fits, full = _measure(tiny)["rates"]
    assert fits["images_per_second"] > 0
    assert full == dict(batch_size=4, images_per_second=None, low=None, high=None)
    table = throughput.make_table({"tiny": json.loads(json.dumps(_measure(tiny)))})
    assert table.rows[1][1] == "4" and "memory" in table.rows[1][2] and not table.rows[1][-1]
    monkeypatch.setattr(throughput, "make_predict", fails("INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        _measure(tiny)
    monkeypatch.setattr(throughput, "make_predict", make_predict)
    # A host would be killed: what does not fit is refused before it is tried.
    (rate,) = _measure(tiny, batch_sizes=(1 << 32,))["rates"]
    assert rate["images_per_second"] is None
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=100))
    assert [rate["images_per_second"] for rate in _measure(tiny)["rates"]] == [None, None]


def test_mistakes_get_one_line(tiny):
    model, params, mesh = tiny
    with pytest.raises(UserError, match="batch_size=0"):
        _measure(tiny, batch_sizes=(4, 0))
    with pytest.raises(UserError, match=r"patch size 2 .* 9"):
        throughput.measure(model, params, (9, 8), batch_sizes=(1,), mesh=mesh)


def test_published_figures_stand_beside_the_papers_models(tiny, monkeypatch):
    _, _, mesh = tiny
    small = dict(num_blocks=1, hidden_dim=8, tokens_mlp_dim=4, channels_mlp_dim=8, patch_size=16)
    monkeypatch.setitem(VARIANTS, "S/16", small)
    monkeypatch.setattr(throughput, "PUBLISHED_SIZE", (16, 16))
    model = make_model(variant="S/16", num_classes=3, dtype="bfloat16")
    abstract = train_state.abstract_params(model, (16, 16), mesh)
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract)
    options = dict(batch_sizes=(1,), mesh=mesh, seconds=0.01)
    measured = throughput.measure(model, params, (16, 16), **options)
    assert (measured["variant"], measured["published"]) == ("S/16", 3994)
    (row,) = throughput.make_table({"S/16": measured}).rows
    assert row[:2] == ("S/16, 16 x 16, bfloat16", "1") and row[-1] == "3,994 (S/16)"


def test_published_figures_are_of_known_variants():
    assert set(throughput.PUBLISHED_RATES) == set(VARIANTS) - {"S/8"}


# Core-hours.


def _row(step, rate, devices, **more):
    return {
        "step": step,
        "perf/images_per_second": rate,
        "perf/images_per_second_per_device": rate / devices,
        **more,
    }


def test_cost_of_a_run_that_went_on_with_more_devices():
    rows = [
        _row(10, 100.0, 1),  # 1,000 images in 10 s
        {"step": 10, "val/top1": 0.5},
        _row(20, 50.0, 1, **{"train/loss": 1.0}),  # in 20 s
        _row(40, 800.0, 8),  # 2,000 in 2.5 s on 8
    ]
    cost = throughput.core_hours(rows, global_batch_size=100)
    assert cost["images"] == 4000 and cost["seconds"] == pytest.approx(32.5)
    assert cost["devices"] == (1, 8)
    assert cost["device_hours"] == pytest.approx(50 / 3600)
    assert cost["device_days"] == pytest.approx(50 / 86400)
    sentence = throughput.cost_sentence(json.loads(json.dumps(cost)))
    assert "4,000 images in 0:32 on 1 to 8 devices" in sentence and "0.0139 device" in sentence
    alone = throughput.cost_sentence(throughput.core_hours(rows[:1], 100))
    assert "in 0:10 on 1 device," in alone
    assert throughput.core_hours([{"step": 3, "val/top1": 0.5}], 100) is None
    assert throughput.core_hours([], 100) is None


def test_cost_of_the_meters_own_rows():
    """Rates as a run writes them, read back from its record."""
    meter = metrics.Meter(global_batch_size=32, start_step=0)
    rows = [{"step": step, **meter.read(step)} for step in (5, 10)]
    cost = throughput.core_hours(rows, global_batch_size=32)
    assert cost["images"] == 320 and cost["devices"] == (jax.device_count(),) * 2
    assert cost["seconds"] > 0


def test_the_command_names_what_measures_the_papers_models():
    done = run_program("evaluate.py", "--suite=throughput", "--variants=S/32,B/16")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "mixer.tools.benchmark infer --models=S/32,B/16" in done.stderr

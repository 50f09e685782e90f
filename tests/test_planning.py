import dataclasses
import json
import math

import jax
import pytest

from configs import common, mixer_b16_i1k
from helpers import TINY, run_program, run_python, tiny_config
from mixer.errors import UserError
from mixer.models.flops import forward_flops
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.plan import chips, hlo, report, search, update
from mixer.tools.plan.subject import DATA_SETS, open_subject, split_size, train_flops
from mixer.training import program


def make_subject(config, topology="gpu:8xH100", **options):
    return open_subject(config, topology, **dict(utilization=0.5) | options)


def small(**values):
    return tiny_config(model__dropout=0.0, model__stoch_depth=0.0, **values)


def large(**values):
    """Returns the config of B/16 with two blocks."""
    config = mixer_b16_i1k.get_config()
    config.model.num_blocks = 2
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def lower_update(config):
    """Lowers the training update of a config for one CPU."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = config.copy_and_resolve_references()
    run.resolve_model(config, None, None)
    config.model.num_classes = config.model.num_classes or 10
    run.resolve_lengths(config, 1_281_167)
    train_program = program.make_program(config, mesh)
    example = {"image": ((*train_program.image_size, 3), "uint8"), "label": ((), "int32")}
    batch = sharding.abstract_batch(example, config.global_batch_size, mesh)
    return train_program.jit_step().lower(train_program.state, batch)


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(model__token_mixing_groups=8),
        dict(model__scan_blocks=True, optimizer__accumulate_steps=4),
        pytest.param(dict(optimizer__sam_rho=0.1), marks=pytest.mark.slow),
        pytest.param(
            dict(optimizer__lr_multipliers=((r"stem/.*|MixerBlock_0/.*", 0.0),)),
            marks=pytest.mark.slow,
        ),
        dict(optimizer__lr_multipliers=((r"(?!head).*", 0.0),)),
    ],
    ids=["plain", "groups", "scan and accumulation", "sam", "lower half frozen", "head only"],
)
def test_closed_form_flops_match_the_lowered_update(values):
    config = small(**values)
    flops = hlo.count(lower_update(config).as_text("hlo")).flops
    assert flops == train_flops(make_subject(config)) * config.global_batch_size


@pytest.mark.parametrize("scan_blocks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rematerialisation_flops_are_estimated(scan_blocks):
    config = small(model__scan_blocks=scan_blocks, model__remat="full")
    subject = make_subject(config, "gpu:1xH100")
    estimate = update.estimate_step(subject, update.own_settings(subject))
    assert hlo.count(lower_update(config).as_text("hlo")).flops == estimate.flops
    assert estimate.flops > 1.1 * train_flops(subject) * config.global_batch_size


def test_closed_form_flops_match_xla_at_full_width():
    # A larger batch is computed in a loop, and XLA counts the body of a loop once.
    config = large(global_batch_size=4)
    xla_flops = lower_update(config).cost_analysis()["flops"]
    assert train_flops(make_subject(config)) * 4 == pytest.approx(xla_flops, rel=0.01)


def test_closed_form_flops_of_b16():
    model = make_model(variant="B/16", num_classes=1000)
    assert 3 * forward_flops(model, (224, 224)) == pytest.approx(75.6e9, rel=1e-3)


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %w = f32[16,16]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op="a(b"}
  %z = f32[8,16]{1,0:T(8,128)} all-reduce(%y), channel_id=7, replica_groups=[8,4]<=[32]
  ROOT %next = (s32[], f32[8,16]) tuple(%i, /*index=1*/%z)
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

%start (p: bf16[4,64]) -> bf16[8,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  ROOT %gather = bf16[8,64]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1},{2,3}}
}

%end (p: bf16[4,64]) -> bf16[8,64] {
  %p.1 = bf16[4,64]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,64]{1,0} all-gather(%p.1), channel_id=9, replica_groups={{0,1},{2,3}}
}

%all-reduce-scatter.3 (p: f32[8,64]) -> f32[2,64] {
  %p.2 = f32[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %summed = f32[8,64]{1,0} all-reduce(%p.2), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}
  ROOT %share = f32[2,64]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={2,64}
}

%one_of (p: f32[100,64], q: s32[]) -> f32[1,64] {
  %p.3 = f32[100,64]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%p.3, %q, %zero.1), dynamic_slice_sizes={1,64}
}

%nested (p: f32[100,64], q: s32[]) -> f32[1,64] {
  %p.4 = f32[100,64]{1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %inner = f32[1,64]{1,0} fusion(%p.4, %q.1), kind=kLoop, calls=%one_of
  ROOT %sum.1 = f32[1,64]{1,0} add(%inner, %inner)
}

ENTRY %main (x0: f32[8,16], table: f32[100,64], w0: bf16[4,64], g0: f32[8,64]) -> f32[8,16] {
  %x0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %table = f32[100,64]{1,0} parameter(1)
  %w0 = bf16[4,64]{1,0:T(8,128)S(1)} parameter(2)
  %g0 = f32[8,64]{1,0:T(8,128)S(1)} parameter(3)
  %i0 = s32[] constant(0)
  %state0 = (s32[], f32[8,16]) tuple(%i0, %x0)
  %loop = (s32[], f32[8,16]) while(%state0), condition=%condition, body=%body
  %gather.2 = bf16[8,64]{1,0:T(8,128)S(1)} fusion(%w0), kind=kCustom, calls=%start
  %gather.3 = bf16[8,64]{1,0:T(8,128)S(1)} fusion(%w0), kind=kCustom, calls=%end
  %local_sum = f32[2,64]{1,0:T(8,128)S(1)} fusion(%g0), kind=kCustom, calls=%all-reduce-scatter.3
  %row.1 = f32[1,64]{1,0} fusion(%table, %i0), calls=%nested, backend={"estimated_cycles":"300"}
  ROOT %out = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_hlo_flops_bytes_and_collectives_are_counted():
    counts = hlo.count(PROGRAM)
    assert counts.flops == 5 * 2 * 8 * 16 * 16
    assert dict(counts.collectives) == {
        "all-reduce": hlo.Traffic(5, 5 * 512, 5 * 512 * 2 * 3 / 4),
        "all-gather": hlo.Traffic(1, 1024, 1024 / 2),  # start and end are one operation
        "reduce-scatter": hlo.Traffic(1, 2048, 2048 * 3 / 4),
    }
    # Five matmuls that each read x and write y (w is in fast memory), and one row that is read and
    # written; the table that contains the row does not count.
    assert counts.bytes == 5 * (512 + 512) + 2 * 256 + 4
    assert counts.cycles == 300
    assert counts.unknown_loops == 0


def _damaged_programs():
    """The program with one line missing, cut, or with another name in it; and without any line."""
    lines = PROGRAM.splitlines(keepends=True)
    for i, line in enumerate(lines):
        for new in ("", line[: len(line) // 2] + "\n", line.replace("(%", "(%no"), "%" + line):
            yield "".join([*lines[:i], new, *lines[i + 1 :]])
        yield "".join(lines[:i])
    yield PROGRAM.replace("[", "").replace("->", "")


def test_damaged_program_is_unreadable_and_raises_nothing_else():
    messages = []
    for text in _damaged_programs():
        try:
            hlo.count(text)
        except hlo.UnreadableProgramError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert all(len(message.splitlines()) == 1 for message in messages)


def test_plan_without_a_readable_program_says_so(monkeypatch):
    """The compiler's memory stays; the other figures are those of the arithmetic."""
    one_chip = dataclasses.replace(chips.find("v5e:2x2"), num_devices=1)
    monkeypatch.setattr(chips, "find", lambda name: one_chip)
    monkeypatch.setattr(chips, "tpu_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: PROGRAM.replace("ENTRY", ""))
    small = dict(model__num_blocks=1, model__stoch_depth=0.0, model__dropout=0.0)
    subject = make_subject(tiny_config(model__num_classes=4, **small), "v5e:2x2")
    settings = update.own_settings(subject)
    step = update.compile_step(subject, settings)
    estimate = update.estimate_step(subject, settings)
    assert step.compiled and step.fits and step.memory_parts["program"] >= 0
    assert (step.flops, step.seconds) == (estimate.flops, estimate.seconds)
    rows = dict(report.report(subject, step))
    assert "ENTRY" in rows["no estimate"] and "memory" in rows["figures"]
    json.dumps(report.summary(subject, step))


@pytest.mark.parametrize(
    ("name", "size", "num_hosts"),
    [
        ("tpu7x:2x2x1", "8 cores", 1),
        ("tpu7x:4x4x4", "128 cores", 16),
        ("gpu:16xB200", "16 GPUs", 2),
    ],
)
def test_current_chips(name, size, num_hosts):
    topology = chips.find(name)
    assert (topology.size, topology.num_hosts) == (size, num_hosts)


def test_padding_of_a_convolution_counts_no_flops():
    text = """HloModule m

ENTRY %main (x: f32[2,5,3], w: f32[3,3,4]) -> f32[2,5,4] {
  %x = f32[2,5,3]{2,1,0} parameter(0)
  %w = f32[3,3,4]{2,1,0} parameter(1)
  ROOT %y = f32[2,5,4]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert hlo.count(text).flops == 2 * 2 * 3 * 4 * (3 * 5 - 2)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("train[:99%]", 1_268_355),
        ("train[99%:]", 12_812),
        ("train[51200:]", 1_229_967),
        ("train[-100:]+validation[:50%]", 25_100),
        ("train[:10]+other", None),
    ],
)
def test_split_size_follows_the_split_specification(spec, size):
    assert split_size(spec, DATA_SETS["imagenet2012"].splits) == size


def test_steps_hours_and_checkpoint_of_the_published_recipe():
    config = mixer_b16_i1k.get_config()
    subject = make_subject(config)
    assert subject.config.total_steps == 92_897
    assert subject.num_params == 59_880_472
    plan = report.summary(subject, update.make_step(subject, update.own_settings(subject)))
    assert plan["run"]["images"] == 92_897 * 4096
    assert not plan["step"]["compiled"]
    seconds = plan["step"]["seconds"] * 92_897 + plan["evaluation_seconds"]
    assert plan["hours"] == pytest.approx(seconds / 3600)
    # Parameters and two moments in float32, the step and the counters of the optimizer.
    assert plan["checkpoint"]["bytes"] == pytest.approx(12 * subject.num_params, rel=1e-6)


def test_fsdp_divides_the_state_and_tensor_keeps_the_flops():
    subject = make_subject(large(global_batch_size=64))
    settings = update.own_settings(subject)
    state_bytes = update.estimate_step(subject, settings).memory_parts["state"]
    fsdp_settings = dataclasses.replace(settings, data=4, fsdp=2)
    fsdp_step = update.estimate_step(subject, fsdp_settings)
    assert 0.5 * state_bytes < fsdp_step.memory_parts["state"] < 0.51 * state_bytes
    assert set(fsdp_step.collectives) == {"all-gather", "reduce-scatter", "all-reduce"}
    tensor_settings = dataclasses.replace(settings, data=4, tensor=2)
    assert update.estimate_step(subject, tensor_settings).flops == pytest.approx(
        update.estimate_step(subject, settings).flops
    )


def test_step_time_is_its_largest_lower_bound():
    subject = make_subject(large())
    step = update.estimate_step(subject, update.own_settings(subject))
    assert step.seconds == max(step.floors["matmuls"] / 0.5, *step.floors.values())
    slow_subject = dataclasses.replace(subject, utilization=1e-3)
    slow_step = update.estimate_step(slow_subject, update.own_settings(slow_subject))
    assert slow_step.limit == "matmuls"
    assert slow_step.seconds == pytest.approx(1000 * step.floors["matmuls"])


@pytest.mark.parametrize(
    ("batch_size", "fits", "remats"),
    [(256, [True] * 4, {"none", "dots", "full"}), (3072, [False] + [True] * 3, {"none", "full"})],
)
def test_search_compiles_few_settings_and_learns_from_them(monkeypatch, batch_size, fits, remats):
    """Compiled steps take twice the estimated memory; the search skips what cannot fit."""
    monkeypatch.setattr(chips, "tpu_devices", lambda topology: [])
    subject = make_subject(large(global_batch_size=batch_size), "v5e:2x2")
    compiled = []

    def compile_step(subject, settings):
        step = update.estimate_step(subject, settings)
        memory = 2 * step.memory
        compiled.append(
            dataclasses.replace(
                step,
                compiled=True,
                memory=memory,
                fits=memory <= subject.topology.chip.memory,
            )
        )
        return compiled[-1]

    monkeypatch.setattr(update, "compile_step", compile_step)
    lines = []
    steps = search.search(subject, lines.append)
    assert [step.fits for step in compiled] == fits
    assert {step.settings.remat for step in compiled} == remats
    assert len(compiled) == search.COMPILES == sum(step.compiled for step in steps)
    assert "0 s" in lines[-1]
    rows = search.ranking(subject, steps)
    assert rows[1][1:4:2] == ("compiled", "yes")


SMALL = dict(dataset__name="oxford_flowers102", dataset__train_split="train")
SMALL |= dict(dataset__train_preprocess="decode|resize(224)|flip_lr")
SMALL |= dict(schedule__warmup_examples=10_000)


CIFAR = dict(dataset__name="cifar10", dataset__train_preprocess="decode|random_crop(32, pad=4)")
CIFAR |= dict(image_size=32, schedule__warmup_examples=10_000)


@pytest.mark.parametrize(
    ("change", "topology", "stays_on_device"),
    [
        (SMALL, "gpu:1xH200", True),
        (SMALL, "gpu:64xH200", False),  # several hosts
        (SMALL | dict(dataset__on_device="on"), "gpu:64xH200", True),
        (SMALL | dict(dataset__augment_on="host"), "gpu:1xH200", False),
        (SMALL | dict(dataset__train_preprocess="decode|flip_lr"), "gpu:1xH200", False),
        (SMALL | dict(dataset__train_preprocess="decode|inception_crop(224)"), "gpu:1xH200", False),
        (CIFAR, "gpu:1xH200", True),  # all stored images have one size
        (CIFAR | SMALL | dict(dataset__name="cifar10", image_size=224), "gpu:1xH200", False),
        (CIFAR | dict(total_epochs=0.5), "gpu:1xH200", False),
    ],
)
def test_plan_predicts_which_data_sets_stay_on_the_device(change, topology, stays_on_device):
    """The plan decides like `data.resident.read`."""
    config = large(model__num_blocks=1, model__num_classes=10, global_batch_size=64, **change)
    subject = make_subject(config, topology)
    plan = report.summary(subject, update.make_step(subject, update.own_settings(subject)))
    assert plan["host"]["input"]["stays_on_device"] == stays_on_device


@pytest.mark.parametrize(
    ("change", "core_rate", "verdict", "advice"),
    [
        ({}, 840, "yes", None),  # on GPUs the device computes RandAugment
        (dict(dataset__augment_on="host"), 530, "NO", "augment_on=device (flip_lr|randaugment"),
        (dict(dataset__train_preprocess="inception_crop(224)"), 840, "yes", None),
        (SMALL, 840, "yes", None),
        (SMALL | dict(dataset__on_device="off"), 840, "yes", None),
    ],
    ids=["device", "host", "nothing to move", "stays on the device", "small and streamed"],
)
def test_plan_predicts_whether_the_input_is_fast_enough(change, core_rate, verdict, advice):
    config = large(model__num_blocks=2, model__num_classes=10, **change)
    subject = make_subject(config, "gpu:8xH200", utilization=0.4)
    step = update.make_step(subject, update.own_settings(subject))
    plan = report.summary(subject, step)
    host, host_input = plan["host"], plan["host"]["input"]
    assert host_input["core_rate"] == core_rate
    assert host_input["cores_needed"] == pytest.approx(host["images_per_second"] / core_rate)
    per_device = plan["images_per_second_per_device"]
    assert host_input["feeds_devices"] == pytest.approx(224 * core_rate / per_device)
    assert host_input["suffices"] == (host_input["feeds_devices"] >= 8)
    expected_share = 0 if host_input["suffices"] else 1 - host_input["feeds_devices"] / 8
    assert host_input["wait_share"] == pytest.approx(expected_share)
    rows = dict(report.report(subject, step))
    assert rows["input suffices"].startswith(verdict)
    assert advice is None or advice in rows["to change"]


def test_plan_advises_how_to_fit_into_memory(monkeypatch):
    subject = make_subject(mixer_b16_i1k.get_config(), "gpu:1xA100")
    step = update.make_step(subject, update.own_settings(subject))
    assert not step.fits
    rows = dict(report.report(subject, step))
    assert rows["fits"].startswith("NO")
    assert "--config.model.remat=" in rows["to change"]
    huge_subject = make_subject(
        large(model__hidden_dim=32768, model__channels_mlp_dim=131072), "gpu:1xA100"
    )
    step = update.make_step(huge_subject, update.own_settings(huge_subject))
    assert "devices" in search.advice(huge_subject, step)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by", 17.5),
        ("memory required for HLO temporaries (35.77G) exceeds available HBM (15.75G).", 35.77),
        ("another fault", None),
    ],
)
def test_memory_is_read_from_compiler_errors(message, gib):
    memory = update.memory_of_error(message)
    assert memory == (None if gib is None else pytest.approx(gib * 2**30))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, dict(topology="v7:2x2"), "v3, v4, v5e"),
        ({}, dict(topology="v5e:256"), "v5e:256"),
        ({}, dict(topology="gpu:8xH1000"), "A100, H100, H200"),
        ({}, dict(topology="gpu:12xH100"), "gpu:12xH100"),
        ({}, dict(topology="tpu7x:2x2"), "tpu7x:4x4x4"),
        ({}, dict(utilization=1.5), "--utilization=1.5"),
        (dict(mesh__data=3), {}, "'data': 3.* 8"),
        (dict(mesh__fsdp=-1), {}, "'fsdp': -1.*one"),
        (dict(dataset__name="imagenet21k/winter21"), {}, "--num_classes"),
        (dict(global_batch_size=12), {}, "global_batch_size=12"),
        (dict(dataset__name="mine"), {}, "--num_classes"),
        (dict(dataset__name="mine"), dict(num_classes=5), "--num_examples"),
    ],
)
def test_invalid_options_are_one_line_of_error(change, options, message):
    config = large(model__num_classes=None, **change)
    options = dict(topology="gpu:8xH100") | options
    with pytest.raises(UserError, match=message):
        subject = make_subject(config, options.pop("topology"), **options)
        update.make_step(subject, update.own_settings(subject))


def test_missing_libtpu_names_the_package_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install .*\[plan\]"):
        make_subject(tiny_config(), "v5e:2x2")


ARGUMENTS = ("--config=configs/mixer_s16_jft.py:mode=gpu8", "--topology=gpu:16xH100", "--search")
ARGUMENTS += ("--num_examples=300000000", "--num_classes=18291")


def test_command_ranks_the_settings_that_fit(tmp_path):
    path = tmp_path / "plan.json"
    result = run_program("mixer.tools.plan", *ARGUMENTS, f"--json={path}")
    assert result.returncode == 0, result.stderr
    assert "ESTIMATED" in result.stdout and "device-hours" in result.stdout
    plan = json.loads(path.read_text())
    assert plan["step"]["fits"] and plan["run"]["epochs"] == pytest.approx(5, rel=1e-3)
    seconds = [step["step"]["seconds"] for step in plan["search"] if step["step"]["fits"]]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_command_needs_no_tensorflow_or_accelerator():
    code = """
import sys
for name in ("tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
sys.argv = ["plan", *sys.argv[1:]]
import runpy
runpy.run_module("mixer.tools.plan", run_name="__main__", alter_sys=True)
"""
    assert "ESTIMATED" in run_python("-c", code, *ARGUMENTS).stdout


def for_a_tpu(**values):
    """Returns a config with widths for a TPU's matrix units, which compiles fast."""
    config = common.base()
    config.update(global_batch_size=512, image_size=64, total_steps=10)
    config.model.update(TINY | dict(hidden_dim=256, tokens_mlp_dim=128, channels_mlp_dim=1024))
    config.model.num_classes = 16
    config.dataset.name = "synthetic"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


@pytest.mark.tpu_backend
@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(model__scan_blocks=True, model__remat="full", mesh__fsdp=2, mesh__tensor=2),
        dict(optimizer__accumulate_steps=2),
        dict(model__token_mixing_groups=8, mesh__fsdp=2, mesh__tensor=2),
    ],
    ids=["data", "fsdp and tensor", "accumulation", "groups"],
)
def test_compiled_tpu_update_matches_the_estimate(tpu, values):
    """The compiled update executes the estimated FLOPs and sends the estimated bytes."""
    subject = make_subject(for_a_tpu(**values), "v5e:2x2")
    settings = update.own_settings(subject)
    step = update.compile_step(subject, settings)
    estimate = update.estimate_step(subject, settings)
    assert step.fits and step.compiled
    # Both devices of "tensor" compute the whole stem and head, which are small.
    assert step.flops == pytest.approx(estimate.flops, rel=0.01)
    # Compares the total, since the compiler turns some reduce-scatters into collective-permutes.
    assert step.sent == pytest.approx(estimate.sent, rel=0.05)
    assert math.isclose(step.memory_parts["state"], estimate.memory_parts["state"], rel_tol=1e-3)
    assert 0 < step.schedule < 1


@pytest.mark.tpu_backend
def test_compiled_tpu_flops_of_b16_match_the_closed_form(tpu):
    subject = make_subject(large(global_batch_size=64, model__num_blocks=1), "v5e:2x2")
    step = update.compile_step(subject, update.own_settings(subject))
    assert step.flops == pytest.approx(train_flops(subject) * 16, rel=0.01)


@pytest.mark.tpu_backend
def test_tpu7x_is_compiled_for_both_cores_of_a_chip(tpu):
    subject = make_subject(for_a_tpu(), "tpu7x:2x2x1")
    step = update.compile_step(subject, update.own_settings(subject))
    assert step.compiled and step.fits and not step.unreadable
    assert step.flops == pytest.approx(train_flops(subject) * 512 / 8, rel=0.01)


@pytest.mark.tpu_backend
def test_update_that_exceeds_tpu_memory_is_reported(tpu):
    subject = make_subject(large(global_batch_size=16384, model__scan_blocks=True), "v5e:2x2")
    step = update.compile_step(subject, update.own_settings(subject))
    assert step.compiled and not step.fits
    assert step.memory > subject.topology.chip.memory
    assert "--config." in dict(report.report(subject, step))["to change"]


def test_batch_size_that_no_mesh_divides_is_an_error():
    with pytest.raises(UserError, match=r"global_batch_size=4096.* 24 devices"):
        search.candidates(make_subject(large(), "gpu:24xH100"))

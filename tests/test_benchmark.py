"""The benchmark: implementations do the same work, and the figures match the measurement."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mixer
from helpers import TINY, TINY_VIT, environment, run_program, run_python, tiny_config
from mixer import memory
from mixer.console import Console
from mixer.errors import UserError
from mixer.evaluation.tables import print_table
from mixer.models import flops
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.benchmark import (
    cases,
    jax_side,
    limit,
    photographs,
    plain,
    report,
    torch_side,
    turns,
)
from mixer.tools.benchmark import input as pipeline
from mixer.tools.benchmark import loop as loop_benchmark

DIMENSIONS = TINY | dict(num_blocks=1)
# The heads have 64 channels, as `mixer.load` assumes for a timm file without a config.json.
VIT_DIMENSIONS = TINY_VIT | dict(name="vit", num_blocks=1, hidden_dim=128, num_heads=2)

# A Python with torch and timm, if they are not installed in this one.
TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)
needs_timm = pytest.mark.skipif(
    sys.executable == TORCH_PYTHON and importlib.util.find_spec("timm") is None,
    reason="timm is not installed",
)


@pytest.fixture(autouse=True)
def keep_compilation_cache(monkeypatch):
    """Keeps the benchmark from disabling the compilation cache, which all tests share."""
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.fixture(autouse=True)
def no_other_load(monkeypatch):
    """Saves the 1.5 s for which the benchmark measures what other processes use."""
    monkeypatch.setattr(report, "cores_of_others", lambda: 0.0)


def tiny_case(measurement="train", **values):
    fields = dict(model="tiny", image_size=16, num_classes=7, batch_size=4, dtype="float32")
    fields |= dict(measurement=measurement, dimensions=DIMENSIONS, gelu="tanh")
    return cases.Case(**fields | values)


def run_tool(*arguments, code=0):
    result = run_program("mixer.tools.benchmark", *arguments)
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("dimensions", [DIMENSIONS, VIT_DIMENSIONS], ids=["mixer", "vit"])
def test_ours_and_plain_have_the_same_parameters(dimensions):
    case = tiny_case(dimensions=dimensions)
    images = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(jax_side.make_plain(case).init, jax.random.key(0), images)["params"]
    assert jax.tree.map(jnp.shape, jax_side.draw_params(case)) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize("name", ["ours", pytest.param("plain", marks=pytest.mark.slow)])
def test_measured_training_steps_reduce_the_loss(name):
    """The loss on a single batch decreases, and `run` reports the steps that it has taken."""
    program = jax_side.prepare_train(name, tiny_case(), sharding.make_mesh({"data": -1}))
    first_loss = float(program.call())
    for _ in range(10 if name == "plain" else 30):  # the mixer is still in its warm-up
        last_loss = float(program.call())
    assert last_loss < first_loss
    assert program.compile_seconds > 0 and program.memory > 10_000
    steps, seconds = program.run(0.0)
    assert steps == 1 and seconds > 0


@pytest.mark.parametrize(
    "dimensions",
    [DIMENSIONS, pytest.param(VIT_DIMENSIONS, marks=pytest.mark.slow)],
    ids=["mixer", "vit"],
)
def test_ours_and_plain_give_the_same_logits(dimensions):
    logits = {}
    for name in ("ours", "plain"):
        case = tiny_case("infer", gelu="erf", dimensions=dimensions)
        program = jax_side.prepare_infer(name, case, sharding.make_mesh({"data": -1}))
        logits[name] = program.call()
        assert logits[name].shape == (4 * jax.device_count(), 7)
    np.testing.assert_allclose(logits["ours"], logits["plain"], atol=1e-4)


class FakeProgram:
    devices, compile_seconds, memory = 2, 1.5, 64

    def __init__(self, log, name, seconds, fails_in=None):
        self.log, self.name, self.seconds, self.fails_in = log, name, seconds, fails_in
        self.turns = 0

    def run(self, seconds):
        self.turns += 1
        if self.turns == self.fails_in:
            raise turns.ProgramError("does not fit into memory")
        self.log.append(self.name)
        return 10, 10 * self.seconds * self.turns

    def close(self):
        self.log.append(f"{self.name} closed")


def test_programs_take_turns_in_rotating_order():
    log = []

    def fail():
        raise turns.ProgramError("why")

    results = turns.take_turns(
        {
            "a": lambda: FakeProgram(log, "a", 0.5),
            "b": fail,
            "c": lambda: FakeProgram(log, "c", 1.0),
            "d": lambda: FakeProgram(log, "d", 2.0, fails_in=2),
        },
        seconds=1.0,
        rounds=3,
    )
    assert log == [*"acd", *"ca", *"ac", "a closed", "c closed", "d closed"]
    assert results["b"].failure == "why" and "memory" in results["d"].failure
    assert results["a"].rounds == [0.5, 1.0, 1.5]
    assert turns.ratio(results["a"], results["c"]) == dict(median=2, lowest=2, highest=2)
    assert turns.ratio(results["a"], results["d"]) is None
    figures = turns.as_json(results["a"], images=8, flops=1e9, limit=16e9)
    assert figures["images_per_second_per_device"] == dict(median=8, lowest=8 / 1.5, highest=16)
    assert figures["images_per_second"]["median"] == 16  # two devices
    assert figures["flops_per_second_per_device"]["median"] == 8e9
    assert figures["share_of_matmul"] == 0.5
    assert turns.as_json(results["b"], 8, 1e9, 16e9) == {"failure": "why"}


def test_flops_of_b16_match_known_figures():
    model = make_model(variant="B/16", num_classes=1000)
    assert flops.forward_flops(model, (224, 224)) == pytest.approx(25.2e9, rel=1e-2)
    assert flops.train_flops(model, (224, 224)) == pytest.approx(75.4e9, rel=1e-3)


def test_matmul_runs_on_every_device():
    program = jax_side.prepare_matmul((8, 4, 6), "bfloat16")
    assert program.devices == jax.local_device_count()
    (product, *_) = program.call()
    assert product.shape == (8, 6) and product.dtype == jnp.bfloat16


def test_out_of_memory_error_contains_the_reason(monkeypatch):
    def raise_no_room(num_bytes, what):
        raise memory.NoRoomError("too much")

    monkeypatch.setattr(memory, "check_room", raise_no_room)
    with pytest.raises(turns.ProgramError, match="too much"):
        jax_side.prepare_infer("ours", tiny_case("infer"), sharding.make_mesh({"data": -1}))


ECHO = """
import json, sys
print("noise", file=sys.stderr)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("run") == "exit":
        sys.exit("exit message")
    if request.get("program") == "broken":
        print(json.dumps({"failure": "broken program"}), flush=True)
    elif "prepare" in request:
        print(json.dumps({"compile_seconds": 3.0}), flush=True)
    else:
        print(json.dumps({"steps": 2, "seconds": 0.5, "memory": 9}), flush=True)
"""


def test_failures_of_a_child_process_are_reported():
    child = torch_side.Child([sys.executable, "-c", ECHO])
    program = torch_side.TorchProgram(child, "x", {"program": "timm"}, owns_child=True)
    assert program.run(1.0) == (2, 0.5)
    assert (program.compile_seconds, program.memory, program.devices) == (3.0, 9, 1)
    with pytest.raises(turns.ProgramError, match="broken program"):
        torch_side.TorchProgram(child, "y", {"program": "broken"}, owns_child=True)
    with pytest.raises(turns.ProgramError, match=r"\b1\b.*exit message"):
        child.ask({"run": "exit"})
    program.close()


def test_matmul_child_process_is_reused():
    child = torch_side.Child([sys.executable, "-c", ECHO])
    for _ in range(2):
        matmul = torch_side.prepare_matmul(child, (8, 4, 6), "float32", "cpu")
        assert matmul.run(1.0) == (2, 0.5)
        matmul.close()
    child.close()


@needs_timm
def test_timm_trains_and_infers():
    versions = torch_side.versions(TORCH_PYTHON)
    assert set(versions) == {"torch", "timm", "torch's python"}
    for kind in ("train", "infer"):
        program = torch_side.prepare("timm", tiny_case(kind), TORCH_PYTHON, "cpu")
        steps, seconds = program.run(0.0)
        assert steps == 1 and seconds > 0 and program.memory >= 0
        program.close()
    child = torch_side.start(TORCH_PYTHON)
    matmul = torch_side.prepare_matmul(child, (8, 4, 6), "bfloat16", "cpu")
    assert matmul.run(0.0)[0] == 1
    with pytest.raises(turns.ProgramError, match=r"\w+Error"):
        child.ask({"run": "nothing"})
    child.close()


SAVE_TIMM = """
import sys
import torch
from safetensors.torch import save_file
from mixer.tools.benchmark.torch_child import make_timm

torch.manual_seed(0)
model = make_timm(REQUEST, torch.device("cpu")).eval()
torch.nn.init.normal_(model.head.weight)
images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
with torch.no_grad():
    logits = model(images)
state = {name: value.contiguous() for name, value in model.state_dict().items()}
save_file(state, sys.argv[1])
save_file(dict(images=images, logits=logits), sys.argv[2])
"""


@needs_timm
@pytest.mark.parametrize("dimensions", [DIMENSIONS, VIT_DIMENSIONS], ids=["mixer", "vit"])
def test_timm_computes_the_same_function(tmp_path, dimensions):
    """A model that loads timm's parameters computes timm's logits."""
    case = tiny_case(dimensions=dimensions)
    weights, values = tmp_path / "timm.safetensors", tmp_path / "values.safetensors"
    code = SAVE_TIMM.replace("REQUEST", repr(torch_side.timm_model(case)))
    command = [TORCH_PYTHON, "-c", code, weights, values]
    subprocess.run(command, env=environment(), check=True)
    model, params = mixer.load(weights, image_size=16, gelu="tanh", log=lambda line: None)
    assert model == case.make_model()
    tensors = safetensors.numpy.load_file(values)
    logits, _ = model.apply({"params": params}, tensors["images"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(logits, tensors["logits"], atol=1e-4)


RUN_WITHOUT_TENSORFLOW = """
import runpy, sys
for name in ("tensorflow", "tensorflow_datasets", "clu", "ml_collections"):
    sys.modules[name] = None
from mixer.tools.benchmark import cases, limit
cases.MODELS["cifar"].update(num_blocks=1, channels_mlp_dim=32)
limit.SIDES["cpu"] = 64
sys.argv = ["benchmark", *sys.argv[1:]]
runpy.run_module("mixer.tools.benchmark", run_name="__main__", alter_sys=True)
"""


def test_inference_is_measured_and_written_to_json(tmp_path, monkeypatch):
    monkeypatch.setitem(cases.MODELS, "cifar", DIMENSIONS | dict(patch_size=4))
    monkeypatch.setitem(limit.SIDES, "cpu", 64)
    path = tmp_path / "figures.json"
    arguments = ("infer", "--models=cifar", "--batch_size=2", "--dtype=bfloat16", "--seconds=0")
    result = run_tool(*arguments, "--rounds=2", f"--output={path}")
    _check_inference(result.stdout, path)


def _check_inference(text, path):
    assert re.search(r"cifar, 32 px, bfloat16, batch 2\b.*GELU tanh", text)
    assert re.search(r"\| ours +\| +[\d.,]+ \| +[\d.,]+ to ", text)
    figures = json.loads(path.read_text())
    assert figures["backend"] == "cpu" and "jax" in figures["versions"]
    assert figures["command"].endswith(f"--output={path}")
    (case,) = figures["contests"]
    assert set(case["contestants"]) == {"ours", "plain"} == {"ours", *case["ours_is_times"]}
    mixer_figures = case["contestants"]["ours"]
    assert len(mixer_figures["rounds_seconds_per_step"]) == 2
    rate = mixer_figures["images_per_second_per_device"]["median"]
    achieved = mixer_figures["flops_per_second_per_device"]["median"]
    assert achieved == pytest.approx(rate * case["flops_per_image"])
    assert mixer_figures["share_of_matmul"] == pytest.approx(achieved / case["matmul"]["limit"])


def test_inference_prints_the_papers_rate(tmp_path, monkeypatch):
    monkeypatch.setitem(cases.MODELS, "S/32", DIMENSIONS | dict(patch_size=32))
    monkeypatch.setitem(limit.SIDES, "cpu", 64)
    path = tmp_path / "figures.json"
    arguments = ("infer", "--models=S/32", "--batch_size=1", "--seconds=0", "--rounds=1")
    for image_size, expected in ((224, 11489), (32, None)):  # the paper's rates are for 224 px
        result = run_tool(
            *arguments, "--against=", f"--image_size={image_size}", f"--output={path}"
        )
        (case,) = json.loads(path.read_text())["contests"]
        assert case["paper_images_per_second_per_tpuv3_core"] == expected
        assert ("11,489 images/s per TPUv3 core" in result.stdout) == (expected is not None)


@pytest.mark.slow
def test_benchmark_needs_no_tensorflow_or_ml_collections(tmp_path):
    path = tmp_path / "figures.json"
    arguments = ("infer", "--models=cifar", "--batch_size=2", "--dtype=bfloat16", "--seconds=0")
    result = run_python("-c", RUN_WITHOUT_TENSORFLOW, *arguments, "--rounds=2", f"--output={path}")
    _check_inference(result.stdout, path)


MISTAKES = [
    ([], "train, infer"),
    (["data"], "--config"),
    (["train", "--models=B/61"], "'B/16'"),
    (["train", "--batch_size=8,x"], "--batch_size=x"),
    (["loop", "--config=configs/digits.py", "--against=plain"], "--against"),
    (["matmul", "--models=B/16"], "train and infer"),
    (["check", "--dtype=bfloat16"], "-m gpu tests/test_agreement.py"),
    (["train", "--seconds=nan"], "--seconds=nan"),
    (["train", "--batch_size="], "--batch_size"),
    (["infer", "--models="], "--models"),
    (["infer", "--models=B/16", "--image_size=100"], "100"),
    (["infer", "--against=tim"], "'timm'"),
    (["infer", "--against=timm", "--torch_python=/nowhere"], "--torch_python=/nowhere"),
    (["train", "--output=/nowhere/x.json"], "/nowhere"),
    (["train", "--output=/"], "--output=/ "),
    (["train", "--dtype=float16"], "float16"),
    (["data", "train"], "data train"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_invalid_flags_are_one_line_errors(arguments, message):
    result = run_tool(*arguments, code=2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_model_without_a_counterpart_is_an_error(monkeypatch):
    monkeypatch.delitem(plain.MODULES, "vit")
    result = run_tool("infer", "--models=ViT-B/16", "--against=plain", code=2)
    assert "--against=plain" in result.stderr and "ViT-B/16" in result.stderr


def test_python_without_torch_is_an_error(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=re.escape(str(python))):
        torch_side.versions(str(python))


def test_torch_on_a_tpu_is_an_error(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "tpu" in run_tool("infer", "--against=timm", code=2).stderr


def test_input_rate_gives_the_number_of_devices_it_feeds():
    assert pipeline.sufficiency(1200, 500, 2) == dict(devices=2.4, wait_share=0)
    sufficiency = pipeline.sufficiency(500, 1000, 4)
    assert sufficiency["devices"] == 0.5 and sufficiency["wait_share"] == 0.875
    model = make_model(variant="B/16", num_classes=1000)
    assert pipeline.evaluation_rate(model, 224, 100) == pytest.approx(299, rel=0.01)


def test_evaluation_without_preprocessing_is_not_measured():
    preprocessings = pipeline.preprocessings("decode|flip_lr", "decode")
    assert preprocessings == {"training": "decode|flip_lr", pipeline.HOST_PART: "decode"} | dict(
        evaluation="decode"
    )
    assert "evaluation" not in pipeline.preprocessings("decode|flip_lr", "")


def test_stream_counts_its_batches_and_their_time(monkeypatch):
    clock = types.SimpleNamespace(secs=0.0)
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: clock.secs)

    def batches():
        while True:
            clock.secs += 0.25
            yield None

    stream = pipeline.Stream(batches(), [])
    assert stream.run(1.0) == (4, 1.0)
    assert stream.run(0.0) == (1, 0.25)


@pytest.mark.slow
def test_data_reports_rates_and_the_number_of_devices_fed(tmp_path):
    path = tmp_path / "figures.json"
    stdout = run_python(
        *("-m", "mixer.tools.benchmark", "data", "--config=configs/cifar10.py"),
        *("--seconds=0.2", "--rounds=2", "--batch_size=4", f"--output={path}"),
    ).stdout
    assert re.search(r"1024 photographs of 32 x 32, [\d.]+ kB on average", stdout)
    pattern = r"training: feeds [\d.,]+ devices at [\d.,]+ images/s each \(measured\)"
    assert re.search(pattern, stdout)
    figures = json.loads(path.read_text())["input"]
    rates = figures["images_per_second"]
    assert set(rates) == {"training", pipeline.HOST_PART, "evaluation", pipeline.DECODING}
    assert figures["feeds"]["training"]["devices"] == pytest.approx(
        rates["training"]["median"] / figures["step_per_device"]["median"]
    )
    step, device_part = (
        figures[f"{name}_per_device"]["median"] for name in ("step", "device_part")
    )
    assert figures["feeds"][pipeline.HOST_PART]["devices"] == pytest.approx(
        rates[pipeline.HOST_PART]["median"] * (1 / step + 1 / device_part)
    )
    assert re.search(r"training, device's steps: [\d.,]+ images/s per device", stdout)


@pytest.mark.slow
def test_loop_estimates_the_time_of_the_run(tmp_path):
    path = tmp_path / "figures.json"
    stdout = run_python(
        *("-m", "mixer.tools.benchmark", "loop", "--config=configs/digits.py", "--examples=640"),
        *("--config.total_epochs=300", "--seconds=0.2", "--rounds=2", f"--output={path}"),
    ).stdout
    assert "640 images of 8 px on the device, batches of 64, decode|random_affine(" in stdout
    assert re.search(r"the run's 3,000 updates take 0:\d\d:\d\d at this rate", stdout)
    figures = json.loads(path.read_text())["loop"]["contestants"]["loop"]
    rate, seconds = figures["images_per_second"], figures["seconds_per_step"]
    assert rate["lowest"] == pytest.approx(64 / seconds["highest"])


def test_loop_with_host_augmentation_is_an_error():
    config = tiny_config()
    config.dataset.train_preprocess = "decode|inception_crop(8)"
    with pytest.raises(UserError, match="inception_crop"):
        loop_benchmark.prepare(config, 4)


@pytest.mark.slow
def test_loop_accepts_a_config_without_preprocessing():
    config = tiny_config(image_size=8, global_batch_size=4, model__num_classes=10)
    config.model.update(num_blocks=1, stoch_depth=0.0, dropout=0.0)
    run.resolve_lengths(config, 6)
    assert not config.dataset.train_preprocess
    loop = loop_benchmark.prepare(config, 6)
    assert loop.run(0.0)[0] >= 1


def test_invalid_config_is_not_reported_as_a_lack_of_memory():
    config = tiny_config(image_size=8, model__num_classes=10, optimizer__b1=2.0)
    run.resolve_lengths(config, 6)
    with pytest.raises(UserError, match="b1"):
        loop_benchmark.prepare(config, 6)


def test_failure_text_in_the_table_is_not_parsed_as_markup(capsys):
    matmul = {"limit": None}
    case = {"matmul": matmul, "contestants": {"timm": {"failure": "[red] is no markup"}}}
    print_table(Console(), report.case_table(case))
    assert "| timm | [red] is no markup " in capsys.readouterr().out


def test_missing_scikit_learn_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"scikit-learn.*\[bench\]"):
        photographs.write(tmp_path / "photographs", (32, 32))

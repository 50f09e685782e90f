"""How programs start and end: devices, signals, lost processes and invalid values."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import multihost
import numpy as np
import psutil
import pytest
from etils import epath
from ml_collections import ConfigDict

import mixer
from configs import common
from helpers import ROOT, environment, run_program, run_python, tiny_config
from mixer import errors, files, memory
from mixer.cli import config as cli
from mixer.cli import interrupts
from mixer.errors import UserError
from mixer.evaluation import classification, scores
from mixer.models.modules import check_image_size
from mixer.models.registry import make_model
from mixer.parallel import backend, join
from mixer.runs import config as run
from mixer.tools.benchmark import report
from mixer.training import optimizer
from mixer.training import program as programs
from mixer.training.state import TrainState
from mixer.weights import checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run of no steps, made by hand."""
    path = tmp_path_factory.mktemp("weights") / "run"
    config = tiny_config(model__num_classes=10)
    model, images = programs.build_model(config), np.zeros((1, 8, 8, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(np.ones(leaf.shape, leaf.dtype)), shapes)
    with checkpoint.Checkpoints(path / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.save(TrainState(jax.numpy.zeros((), "int32"), params["params"], ()))
        checkpoints.wait()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    split = {"name": "train", "num_examples": 1, "fingerprint": ""}
    data = {"class_names": list("0123456789"), "splits": {"train": split}}
    (path / "data.json").write_text(json.dumps(data))
    return path


# Devices and settings of JAX.


@pytest.mark.parametrize(
    "command",
    [
        ("mixer.tools.predict", ".", "--weights={run}"),
        ("mixer.tools.inspect", "--workdir={run}"),
        ("mixer.tools.convert", "{run}", "--report"),
        ("mixer.tools.benchmark", "infer"),
        ("evaluate.py", "--workdir={run}"),
        ("train.py", "--config=configs/digits.py", "--workdir={run}"),
    ],
    ids=lambda command: command[0],
)
def test_missing_device_is_named_before_a_checkpoint_is_read(command, weights, monkeypatch):
    def fail():
        raise AssertionError  # as JAX 0.10 does for CUDA

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(checkpoint, "saved_params", None)
    monkeypatch.setattr(checkpoint, "restore_params", None)
    jax.config.update("jax_platforms", "cuda")
    try:
        process = run_program(*(part.format(run=weights) for part in command))
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert "cuda device (JAX_PLATFORMS=cuda)" in process.stderr and "damaged" not in process.stderr


def test_programs_unset_jax_settings_that_change_numbers():
    names = [name.upper() for name in backend.SETTINGS]
    code = f"import mixer.cli.program, os; print([n for n in {names} if n in os.environ])"
    process = run_python("-c", code, **dict.fromkeys(names, "1"))
    assert process.stdout == "[]\n" and "JAX_ENABLE_X64" in names


def test_weights_stay_float32_under_x64(weights, tmp_path):
    with jax.enable_x64(True):
        assert jax.numpy.zeros(()).dtype == "float64"
        model, params = mixer.load(str(weights), log=lambda line: None)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
        images = jax.ShapeDtypeStruct((2, 8, 8, 3), "float64")
        logits, _ = jax.eval_shape(model.apply, {"params": params}, images)
        assert logits.dtype == "float32"
        fresh = jax.eval_shape(model.init, jax.random.key(0), images)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(fresh)} == {"float32"}
        sums, _ = checkpoint.checksums(params)
        _, finite = checkpoint.checksums({"wide": jax.numpy.array([1.0, math.nan])})
        assert not finite
    assert sums == checkpoint.checksums(params)[0]


def test_training_in_a_notebook_refuses_x64(tmp_path):
    from mixer import trainer

    with jax.enable_x64(True), pytest.raises(UserError, match="jax_enable_x64=True"):
        trainer.train(tiny_config(), str(tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("Unable to allocate 74.5 GiB"), "74.5 GiB"),
        (OSError(28, "No space left on device", "x.json"), "No space left on device: x.json"),
        (OSError(36, "File name too long", "xx"), "File name too long: xx"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "allocating 9"),
        (RuntimeError("INTERNAL: a fault"), None),
        (KeyError("a fault"), None),
    ],
)
def test_machine_failures_are_one_line(error, line):
    text = errors.line_of(error)
    assert text is None if line is None else line in text and "\n" not in text


# Signals.


def test_interrupt_in_a_callback_is_raised_afterwards():
    """Python drops an exception raised in a destructor or in JAX's garbage collection callback."""

    def _xla_gc_callback():
        os.kill(os.getpid(), signal.SIGINT)

    class Thing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)

    def forget():
        Thing()

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGALRM)]
    hook = sys.unraisablehook
    try:
        for function in (_xla_gc_callback, forget):
            interrupts.raise_interrupt()
            with pytest.raises(KeyboardInterrupt):
                function()
                time.sleep(5)
            assert interrupts.was_raised()
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers:
            signal.signal(number, handler)


def test_interrupt_that_a_library_converts_is_still_an_interrupt(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("while initializing the extension") from None

    monkeypatch.setattr(files, "check_output", interrupt)
    flags = ("--config=configs/digits.py", "--topology=gpu:8xH100", f"--json={tmp_path / 'x'}")
    process = run_program("mixer.tools.plan", *flags)
    assert (process.returncode, process.stderr) == (130, "mixer.tools.plan: interrupted\n")


IMPORTING = """
import sys
from mixer.cli import interrupts
interrupts.{}()
sys.path.insert(0, {!r})
try:
    import slow
finally:
    print("cleaned up")
"""


@pytest.mark.parametrize("state", ["leave_at_once", "raise_interrupt"])
def test_interrupt_during_an_import_ends_the_process_at_once(state, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    )
    process = run_python("-c", IMPORTING.format(state, str(tmp_path)), check=False)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "-c: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("program", [("train.py",), ("-m", "mixer.tools.predict")])
def test_interrupt_at_any_moment_of_the_start_is_one_line(program, tmp_path):
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    if program[0] == "-m":
        arguments = ["x.png", "--weights=B/16-i1k"]
    for delay_secs in np.arange(0.15, 2.5, 0.4):
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay_secs)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
        if "site.py" in stderr or "init_import_site" in stderr:
            continue  # Python itself had not started yet
        if process.returncode == -signal.SIGINT:  # Python had already removed its handlers
            assert stderr.endswith("x.png: no such file or folder\n"), (delay_secs, stderr)
            continue
        assert process.returncode in (130, 2) and "Traceback" not in stderr, (delay_secs, stderr)


# Several processes.


def _in_thread(results, function, *args):
    def call():
        try:
            function(*args)
        except UserError as error:
            results[args[-2 if len(args) == 4 else -1]] = str(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize("failed_id", [0, 1])
def test_bad_flag_of_one_process_reaches_the_others(failed_id, monkeypatch):
    monkeypatch.setattr(join, "JOIN_SECS", 30.0)
    address, results, start = multihost.free_address(), {}, time.monotonic()
    reason = "config has no key 'x'"
    teller = _in_thread(results, join.tell_failure, address, 3, failed_id, reason)
    teller.join(0.3)  # it may start first
    joining_threads = [
        _in_thread(results, join.meet, address, 3, index)
        for index in range(3)
        if index != failed_id
    ]
    for thread in (teller, *joining_threads):
        thread.join()
    assert sorted(results) == sorted({0, 1, 2} - {failed_id}) and time.monotonic() - start < 10
    name = f"process {failed_id} ({socket.gethostname()}) failed: {reason}"
    assert set(results.values()) == {name}


def test_process_killed_while_joining_is_noticed(monkeypatch):
    monkeypatch.setattr(join, "JOIN_SECS", 30.0)
    monkeypatch.setattr(join, "LEAVE_SECS", 0.2)
    monkeypatch.setattr(join, "POLL_SECS", 0.1)
    address, results = multihost.free_address(), {}
    main = _in_thread(results, join.meet, address, 3, 0)
    peer = None
    while peer is None:
        try:
            peer = socket.create_connection(("localhost", int(address.rpartition(":")[2])))
        except OSError:
            time.sleep(0.02)
    peer.sendall(json.dumps(dict(process=2, processes=3, host="h")).encode() + b"\n")
    time.sleep(0.2)
    peer.close()
    main.join()
    assert results == {0: "process 2 (h) left before all processes had arrived"}


def test_bad_flag_is_reported_with_the_process_index(monkeypatch):
    from mixer.cli import launch

    calls = []
    monkeypatch.setattr(join, "tell_failure", lambda *args: calls.append(args))
    monkeypatch.setattr(cli, "run", lambda main, tell: tell("a mistake"))
    for place in (
        ["--coordinator_address=h:1", "--num_processes=2", "--process_id=1"],
        ["--coordinator_address", "h:1", "-num_processes=2", "--process_id", "1"],
        ["--process_id=1"],
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", "--typo=1", *place])
        launch.run(None)
    assert calls == [("h:1", 2, 1, "a mistake")] * 2


@pytest.mark.slow
def test_bad_flag_of_one_process_stops_both(tmp_path):
    start, address = time.monotonic(), multihost.free_address()
    flags = ("train.py", "--config=tests/tiny_synthetic.py", f"--workdir={tmp_path / 'run'}")
    children = [
        multihost.start_one(address, 2, 0, *flags),
        multihost.start_one(address, 2, 1, *flags, "--config.typo=1"),
    ]
    for code, output in multihost.finish(children, 120):
        assert code == 2 and "typo" in output, output
    assert time.monotonic() - start < 60


# Flags and config files.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.model={}"], ["--config.model={}", "model.variant"]),
        (["--config.profile_steps[0]=3"], ["--config.profile_steps[0]=3", "index"]),
        (["--config.dataset=cifar10"], ["--config.dataset=cifar10", "dataset.name"]),
        (["--config.input.batch_size=1"], ["'input.batch_size'", "'global_batch_size'"]),
        (["--config.model_init=x"], ["'model_init'", "'init_from'"]),
        (["--config.base_lr=1"], ["'base_lr'", "'optimizer.peak_lr'"]),
        (["--config.wd=1"], ["'wd'", "'optimizer.weight_decay'"]),
        (["--config.drop_path=1"], ["'drop_path'", "'model.stoch_depth'"]),
        (["--workdir", "--seed=1"], ["--workdir", "--seed=1"]),
        (["--workdir=--seed=1"], ["--workdir", "--seed=1"]),
    ],
)
def test_mistaken_flag_is_named(arguments, expected):
    process = run_program("train.py", "--config=configs/digits.py", *arguments)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert all(text in process.stderr for text in expected), process.stderr


def test_unrelated_keys_are_not_suggested():
    process = run_program("train.py", "--config=configs/digits.py", "--config.typo=1")
    assert "'typo'" in process.stderr and "Did you mean" not in process.stderr


def test_usual_names_map_to_existing_keys():
    keys = set(common.base().to_dict()) | {
        f"{group}.{key}"
        for group, value in common.base().items()
        if isinstance(value, ConfigDict)
        for key in value
    }
    assert set(cli.FOREIGN_NAMES) <= keys
    named = [name for names in cli.FOREIGN_NAMES.values() for name in names.split()]
    assert len(named) == len(set(named)) and not keys & set(named)


@pytest.mark.parametrize(
    ("name", "text", "argument", "expected"),
    [
        ("config.json", '{"seed": true}', "", "a run"),
        ("config.yaml", "seed: 1", "", "Python"),
        ("broken.py", "x = (\n", "", "line 1"),
        ("empty.py", "", "", "get_config()"),
        ("plain.py", "def get_config(): return {}\n", "", "dict"),
        ("plain.py", "def get_config(): return {}\n", ":x", "no argument"),
        ("greedy.py", "def get_config(arg): return {}\n", "", "an argument"),
    ],
)
def test_invalid_config_file_is_named(name, text, argument, expected, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    process = run_program("train.py", f"--config={path}{argument}")
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert str(path) in process.stderr and expected in process.stderr, process.stderr


def test_package_of_the_same_name_does_not_replace_the_configs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    config = f"--config={ROOT / 'configs' / 'digits.py'}"
    for cwd, program in ((ROOT, "train.py"), (tmp_path, ROOT / "evaluate.py")):
        process = run_python(program, config, "surplus", cwd=cwd, check=False, PYTHONPATH=path)
        assert (process.returncode, "surplus" in process.stderr) == (2, True), process.stderr
    code = "from mixer.cli import config as cli; cli.run(lambda argv: cli.config() and None)"
    process = run_python("-c", code, config, cwd=tmp_path, check=False, PYTHONPATH=path)
    assert (process.returncode, process.stderr) == (0, "")


# Values.


def _integer_keys(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, ConfigDict):
            yield from _integer_keys(value, f"{prefix}{key}.")
        elif tree.get_type(key) is int:
            yield prefix + key


@pytest.mark.parametrize("value", [10**20, 10**400, 0, -1])
def test_every_integer_of_a_config_is_checked(value):
    """Each value is refused by the name of its key, or is harmless."""
    harmless = {
        0: ("schedule.warmup_steps", "schedule.cooldown_steps", "schedule.cooldown_examples"),
        -1: ("mesh.data",),
    }
    harmless[0] += ("schedule.warmup_examples", "seed", "max_skipped_steps", "stall_secs")
    for key in _integer_keys(common.base()):
        config = tiny_config(**{key.replace(".", "__"): value, "model__num_classes": 10})
        if key == "model.num_classes":
            config.model.num_classes = value
        stem, _, unit = key.rpartition("_")
        if unit in ("epochs", "examples"):
            config.update_from_flattened_dict({f"{stem}_steps": None})
        try:
            run.check_config(config)
            run.resolve_lengths(config, 100)
            programs.build_model(config)
            programs.build_optimizer(config)
        except UserError as error:
            assert key.rpartition(".")[2].partition("_")[0] in str(error), (key, error)
        else:
            free = ("stall_secs", "max_skipped_steps") if value > 0 else harmless.get(value, ())
            assert key in free or key.startswith("mesh."), key


def test_batches_that_do_not_fit_are_refused_before_anything_runs(tmp_path):
    process = run_program(
        "train.py",
        "--config=tests/tiny_synthetic.py",
        f"--workdir={tmp_path}",
        "--config.global_batch_size=1000000000",
    )
    assert process.returncode == 2 and "global_batch_size=1000000000" in process.stderr
    with pytest.raises(memory.NoRoomError, match="eval_batch_size=10000"):
        memory.check_batch(
            "eval_batch_size", 10**14, image_shape=(8, 8, 3), num_classes=10, prefetch_batches=2
        )


def test_image_size_and_num_blocks_have_bounds():
    for size in ((0, 8), (-8, 8), (10**6, 10**6)):
        with pytest.raises(UserError, match=f"image {size[0]} x"):
            check_image_size(size, 8)
    with pytest.raises(UserError, match=r"model\.num_blocks=1000000000"):
        make_model(variant="S/16", num_classes=1, num_blocks=10**9)


def test_many_classes_need_no_confusion_matrix(monkeypatch):
    count = 100_000
    labels, guesses = np.array([5, 99_999, 5, -1]), np.array([5, 7, 6, 3])
    columns = dict(label=labels, labelled=labels >= 0, guesses=guesses[:, None])
    columns |= dict(hit=labels == guesses, hit5=labels == guesses, loss=np.ones(4, "float32"))
    predictions = classification.Predictions(**columns, probability=np.ones(4, "float32"))
    result = classification.summarize(predictions, count)
    assert result.top1 == 1 / 3 and "confusion" not in result.summary()
    assert scores.confusions(labels, guesses).tolist() == [[5, 5, 1], [5, 6, 1], [99_999, 7, 1]]
    free = psutil.virtual_memory()._replace(available=2**34)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(memory.NoRoomError, match="100,000 classes"):
        _ = result.confusion
    small = classification.summarize(
        classification.Predictions(
            **(columns | dict(label=np.array([0, 1, 0, -1]))), probability=np.ones(4, "float32")
        ),
        10,
    )
    assert small.confusion[0, 5] == 1 and small.confusion.sum() == 3


def test_ema_that_keeps_the_initial_weights_is_reported():
    line = optimizer.describe_average(0.9999, 3)
    assert "optimizer.ema_decay=0.9999" in line and "step 3" in line and "100%" in line
    assert optimizer.describe_average(0.9999, 6932) is None  # 0.49998
    assert optimizer.describe_average(0.0, 3) is None


# Outputs.


@pytest.mark.parametrize(
    "path", ["/dev/null", "/proc/x", "{tmp}/file/x", "{tmp}", "{tmp}/" + "n" * 300, "{tmp}/no/x"]
)
def test_unwritable_output_is_refused_first(path, weights, tmp_path):
    (tmp_path / "file").touch()
    path = path.format(tmp=tmp_path)
    with pytest.raises(UserError, match=f"--json={path}"):
        files.check_output("--json", path)
    process = run_program("mixer.tools.convert", weights, path)
    assert process.returncode == 2 and path in process.stderr, process.stderr
    assert len(process.stderr.splitlines()) == 1
    if path != str(tmp_path) and "/no/" not in path:
        with pytest.raises(UserError, match=f"--output={path}"):
            files.make_directory(path, "--output")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_pictures_need_a_directory_that_can_be_written(weights):
    process = run_program("mixer.tools.inspect", f"--workdir={weights}", "--output=/dev/null")
    assert process.returncode == 2 and "/dev/null" in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["file:///tmp/x", "http://127.0.0.1:9/x", "ftp://x/y", "gs://"])
def test_unsupported_urls_are_refused(path, weights):
    """Every command that writes refuses them alike, where etils would raise a KeyError."""
    train = ["train.py", f"--config={ROOT}/tests/tiny_synthetic.py", f"--workdir={path}"]
    commands = [
        ["evaluate.py", f"--workdir={path}"],
        ["evaluate.py", f"--workdir={weights}", f"--output={path}"],
        ["evaluate.py", f"--weights={weights}", f"--output={path}"],
        ["mixer.tools.inspect", f"--workdir={path}"],
        ["mixer.tools.inspect", f"--workdir={weights}", f"--output={path}"],
        ["mixer.tools.predict", __file__, f"--weights={weights}", f"--features={path}"],
        ["mixer.tools.convert", weights, path],
        train,
    ]
    for command in commands:
        process = run_program(*command)
        assert process.returncode == 2, (command, process.stdout)
        assert path in process.stderr and process.stderr.count("\n") == 1, (command, process.stderr)
    for flag in ("--output", "--json"):
        with pytest.raises(UserError, match=f"{flag}={path}"):
            files.check_output(flag, path)


def test_unreachable_store_is_one_line(monkeypatch):
    def fail(path):
        raise RuntimeError("no such host\nat frame 1")  # TensorFlow's errors are no OSErrors

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", fail)
    with pytest.raises(UserError, match=r"gs://bucket/run/config.json.*no such host$"):
        run.read_run("gs://bucket/run")


def test_empty_list_is_refused():
    process = run_program("evaluate.py", "--weights=x", "--suite=throughput", "--batch_sizes=")
    assert process.returncode == 2 and "--batch_sizes" in process.stderr
    process = run_program("mixer.tools.inspect", "--workdir=,")
    assert process.returncode == 2 and "--workdir" in process.stderr


@pytest.mark.parametrize("flag", ["--shares=", "--shares=x", "--shares=2"])
def test_invalid_shares_are_refused(flag, weights):
    process = run_program("mixer.tools.sweep", "permutation", f"--weights={weights}", f"{flag}")
    assert process.returncode == 2 and "--shares" in process.stderr


# Numbers and programs.


def test_no_images_give_no_logits():
    model = make_model(
        patch_size=4,
        hidden_dim=8,
        num_blocks=1,
        tokens_mlp_dim=8,
        channels_mlp_dim=8,
        num_classes=3,
    )
    one_image, no_images = (jax.ShapeDtypeStruct((n, 48, 48, 3), "float32") for n in (1, 0))
    params = jax.eval_shape(model.init, jax.random.key(0), one_image)
    logits, out = jax.eval_shape(model.apply, params, no_images)
    assert logits.shape == (0, 3) and out["stem"].shape == (0, 12, 12, 8)


def test_small_modules_import_nothing_heavy():
    for module, heavy in (
        ("formatting", {"jax", "rich", "psutil"}),
        ("training.step", {"psutil", "scipy.special"}),
    ):
        code = f"import sys, mixer.{module}; print(sorted({heavy} & set(sys.modules)))"
        assert run_python("-c", code).stdout == "[]\n"


def test_plan_includes_the_permutation():
    from mixer.tools.plan.subject import open_subject

    config = tiny_config(model__num_classes=10)
    config.dataset.update(name="digits", train_preprocess="decode", eval_preprocess="decode")
    config.dataset.permutation = "pixels"
    subject = open_subject(config, "gpu:8xH100", utilization=0.5)
    assert "permute_pixels(8, seed=0)" in subject.config.dataset.train_preprocess


def test_cores_of_others_counts_only_the_measured_interval(monkeypatch):
    """Earlier processor time of this process or of the system does not count."""
    clock = dict(everyone=100.0, own=90.0)

    class Process:
        def cpu_times(self):
            return ConfigDict(dict(user=clock["own"], system=0.0))

    times = type(psutil.cpu_times())

    def cpu_times():
        fields = dict.fromkeys(times._fields, 0.0)
        return times(**(fields | dict(user=clock["everyone"], idle=50.0)))

    def sleep(seconds):
        clock.update(everyone=clock["everyone"] + 4.0, own=clock["own"] + 1.0)

    monkeypatch.setattr(report.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(report.psutil, "Process", Process)
    monkeypatch.setattr(report.time, "sleep", sleep)
    ticks = iter((10.0, 12.0))
    monkeypatch.setattr(report.time, "monotonic", lambda: next(ticks))
    assert report.cores_of_others() == 1.5


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        (("mixer.tools.predict", "x.png", "--weights=x"), "--top"),
        (("mixer.tools.predict", "x.png", "--weights=x"), "--batch_size"),
        (("mixer.tools.predict", "x.png", "--weights={run}"), "--image_size"),
        (("mixer.tools.export", "x", "x.stablehlo"), "--batch_size"),
        (("mixer.tools.benchmark", "train"), "--rounds"),
        (("mixer.tools.benchmark", "train"), "--image_size"),
        (("mixer.tools.benchmark", "train"), "--batch_size"),
        (("mixer.tools.benchmark", "loop"), "--examples"),
        (("mixer.tools.plan",), "--num_examples"),
        (("mixer.tools.plan",), "--num_classes"),
        (("evaluate.py", "--weights=x", "--suite=throughput"), "--batch_sizes"),
    ],
)
def test_every_integer_flag_has_a_bound(program, flag, weights, tmp_path):
    picture = tmp_path / "x.png"
    picture.touch()
    arguments = [part.format(run=weights) for part in program]
    process = run_program(*arguments, f"{flag}={10**20}", cwd=tmp_path)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert flag.lstrip("-") in process.stderr

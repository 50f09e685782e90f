"""What several tests share."""

import contextlib
import gc
import importlib.util
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from absl.testing import flagsaver
from flax import traverse_util

from configs import common

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
TINY = dict(patch_size=8, hidden_dim=24, num_blocks=3, tokens_mlp_dim=20, channels_mlp_dim=40)
TINY_VIT = dict(patch_size=8, hidden_dim=24, num_blocks=3, mlp_dim=40, num_heads=4)


def golden(name):
    return np.load(GOLDENS / f"mixer_tiny_{name}.npz", allow_pickle=False)


def golden_params(name="official", prefix=""):
    file = golden(name)
    flat = {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}
    return traverse_util.unflatten_dict(flat, sep="/")


# The published optimizer, and what `TrainStep` takes when nothing is added to it.
PUBLISHED = dict(
    **dict(
        name="adamw",
        peak_lr=1e-3,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        momentum_dtype="float32",
        variance_dtype="float32",
    ),
    **dict(weight_decay=0.1, weight_decay_form="lr", grad_clip_norm=1.0, lr_multipliers=()),
)
PLAIN_STEP = dict(
    **dict(mix=lambda key, images, labels: (images, labels), label_smoothing=0.0),
    **dict(lr_multipliers=(), sam_rho=0.0, ema_decay=0.0, accumulate_steps=1),
)


def tiny_config(tfds_dir=None, **values):
    """A config that trains in a second: synthetic data, or the digits of `tfds_dir`."""
    config = common.base()
    config.update(total_steps=12, global_batch_size=16, image_size=8, log_every_steps=2)
    config.update(eval_every_steps=6, eval_batch_size=64, tensorboard=False)
    config.model.update(
        patch_size=2, hidden_dim=16, num_blocks=2, tokens_mlp_dim=8, channels_mlp_dim=24
    )
    config.model.update(stoch_depth=0.2, dropout=0.1)
    config.optimizer.update(peak_lr=3e-3, weight_decay=0.1)
    config.schedule.update(decay="cosine", warmup_steps=2)
    config.checkpoint.update(every_steps=4)
    if tfds_dir is None:
        config.dataset.name = "synthetic"
    else:
        config.model.dropout = 0.0  # stochastic depth draws masks; those of dropout compile slowly
        config.mixup.alpha = 0.2
        config.optimizer.update(ema_decay=0.9, accumulate_steps=2, momentum_dtype="bfloat16")
        config.optimizer.lr_multipliers = (("stem/bias", 0.0), ("head/.*", 2.0))
        config.dataset.update(name="digits", data_dir=str(tfds_dir))
        config.dataset.update(
            train_preprocess="decode|random_crop(8, pad=1)", eval_preprocess="decode"
        )
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config.lock()


def leaves(tree):
    """Arrays of a tree by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bits(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].dtype == other[path].dtype, path
        assert one[path].tobytes() == other[path].tobytes(), path


def assert_close(state, expected):
    """Equal but for rounding: where the two programs may have been compiled differently."""
    state, expected = leaves(state), leaves(expected)
    assert state.keys() == expected.keys()
    for path, value in state.items():
        other = expected[path].astype(np.float64)
        np.testing.assert_allclose(
            value.astype(np.float64), other, rtol=1e-5, atol=1e-6, err_msg=path
        )


def final_state(workdir, step=None):
    """The arrays of a run's checkpoint, read without the model."""
    import orbax.checkpoint as ocp

    from mixer.weights import checkpoint

    directory = workdir / "checkpoints" / str(step) if step else checkpoint.find_step(workdir)
    # As NumPy's arrays: the devices that saved them may not be here.
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(
            directory / "state", ocp.args.PyTreeRestore(restore_args=as_numpy)
        )


def read_reproducible_metrics(workdir):
    """The rows of metrics.jsonl without the values that depend on the clock."""
    from mixer.runs.record import read_metrics

    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_metrics(workdir)
    ]


def raise_signal_at_step(monkeypatch, step, signum):
    """Makes the training loop send this process a signal when it logs step `step`."""
    from mixer.runs.log import TrainLog

    finish_step = TrainLog.finish_step

    def finish(self, first, last, metrics):
        if last == step:
            os.kill(os.getpid(), signum)
        finish_step(self, first, last, metrics)

    monkeypatch.setattr(TrainLog, "finish_step", finish)


def environment(**extra):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    if "XLA_FLAGS" in extra:  # several devices: as mixer.cli.config does for the programs
        extra.setdefault("NPROC", "32")
    return {**os.environ, "PYTHONPATH": paths, **extra}


def run_python(*arguments, timeout=300, check=True, cwd=ROOT, **extra):
    """Runs Python, in the project's root by default; returns the process with its output."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def run_program(program, *arguments, cwd=ROOT):
    """Runs a program as the command line does, in this process; returns it with its output.

    Saves the seconds in which a new process imports JAX and TensorFlow. What ends a process here
    (signals, several devices, environment variables read by an import) needs `run_python`.

    Args:
      program: a file of the project's root such as "train.py", or the name of a module such as
        "mixer.tools.predict".
      *arguments: its command line.
      cwd: the working directory.

    Returns:
      A CompletedProcess with returncode, stdout and stderr. An exception that would end the
      process in a traceback is raised.
    """
    from mixer.cli import config as cli
    from mixer.cli import launch  # noqa: F401 (its flags stay; those of the program go)

    app.define_help_flags()  # absl does so once in a process
    is_file = program.endswith(".py")
    if not is_file and importlib.util.find_spec(program).submodule_search_locations:
        program += ".__main__"
    path = ROOT / program if is_file else importlib.util.find_spec(program).origin
    spec = importlib.util.spec_from_file_location(program.removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        stack.enter_context(contextlib.chdir(cwd))
        _restore_afterwards(stack)
        flags.FLAGS.unparse_flags()
        for name in flags.FLAGS:
            flags.FLAGS[name].allow_override = True  # another tool's, which a test has imported
        spec.loader.exec_module(module)  # defines the program's flags
        if is_file:
            module.__spec__ = None  # as Python has it where a file is run
        sys.modules["__main__"] = module
        sys.argv = [str(path), *map(str, arguments)]
        try:
            cli.run(module.main)
        except SystemExit as error:
            code = error.code or 0
    return subprocess.CompletedProcess(sys.argv, code, stdout.getvalue(), stderr.getvalue())


def _restore_afterwards(stack):
    """Restores, when `stack` closes, whatever of this process a program changes."""
    # Flags of tools that tests have imported, whose names the program may define too.
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        for flag in list(defined) if module.startswith("mixer.tools.") else ():
            delattr(flags.FLAGS, flag.name)
            stack.callback(flags.FLAGS.register_flag_by_module, module, flag)
            stack.callback(flags.FLAGS.__setitem__, flag.name, flag)
    flag_values = flagsaver.save_flag_values()
    stack.callback(flagsaver.restore_flag_values, flag_values)
    stack.callback(sys.modules.__setitem__, "__main__", sys.modules["__main__"])
    stack.callback(setattr, sys, "argv", sys.argv)
    stack.callback(logging.set_verbosity, logging.get_verbosity())
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.getsignal(number))
    if gc.isenabled():  # train.py disables it
        stack.callback(gc.enable)

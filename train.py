"""Trains MLP-Mixer, or resumes the run in --workdir.

  python train.py --config=configs/digits.py
  python train.py --config=configs/digits.py --workdir=runs/my_digits --config.seed=1

The config file has all settings, which configs/common.py explains; --config.KEY=VALUE overrides
one. The same command resumes an interrupted run; the result is bit-identical to an uninterrupted
run. Without --workdir the run is in runs/<name of the config file>. On several hosts, run the same
command on each host (docs/pods.md).
"""

from mixer.cli import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()  # before the slow imports

import gc

from absl import flags

from mixer.cli import config as cli
from mixer.cli import launch

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run. Default: runs/<name of the config file>."
)
ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Resume a run even if its model, data or schedule has changed."
)


def main(argv: list[str]) -> None:
    """Trains with the config and the flags of the command line."""
    if len(argv) > 1:
        raise cli.UserError(f"unexpected argument {argv[1]!r}; see python train.py --help")
    config = cli.config()
    launch.join()
    # Imports and tracing create millions of long-lived objects; scanning them for garbage would
    # take a fifth of the start-up time.
    gc.disable()
    from mixer import trainer

    workdir = WORKDIR.value or f"runs/{cli.config_name()}"
    trainer.train(config, workdir, allow_config_change=ALLOW.value)


if __name__ == "__main__":
    launch.run(main)

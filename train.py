"""Trains MLP-Mixer, or goes on training it where the run in --workdir ended.

  python train.py --config=configs/digits.py
  python train.py --config=configs/digits.py --workdir=runs/my_digits --config.seed=1

The config file has every setting, with its meaning in configs/common.py; --config.KEY=VALUE
replaces one. The same command, given again, continues the run: bit for bit as if it had not
stopped. Without --workdir the run is in runs/<name of the config file>. On several hosts the same
command is given on each (docs/pods.md).
"""

from mixer.cli import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()  # before the imports that take a while

import gc

from absl import flags

from mixer.cli import config as cli
from mixer.cli import launch

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; runs/<name of the config file> if not given."
)
ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Continue a run although its model, data or schedule changed."
)


def main(argv: list[str]) -> None:
    """Runs the trainer on what the flags say."""
    if len(argv) > 1:
        raise cli.UserError(f"unexpected argument {argv[1]!r}; see python train.py --help")
    config = cli.config()
    launch.join()
    # Imports and traces make millions of objects that stay; looking through them for some to free
    # takes a fifth of the start.
    gc.disable()
    from mixer import trainer

    workdir = WORKDIR.value or f"runs/{cli.config_name()}"
    trainer.train(config, workdir, allow_config_change=ALLOW.value)


if __name__ == "__main__":
    launch.run(main)

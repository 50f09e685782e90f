"""The config of the tests that run train.py as a process: a small Mixer on the digits."""

import os

from helpers import tiny_config


def get_config():
    config = tiny_config(os.environ["TFDS_DIR"])
    config.total_steps = 40
    config.eval_every_steps = 10
    config.checkpoint.every_steps = 5
    return config

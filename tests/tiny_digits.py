"""The config of the tests that run train.py: a small Mixer on the digits.

It has augmentation, mixup, masks, an average and accumulation, and compiles quickly.
"""

import os

from helpers import tiny_config


def get_config():
    config = tiny_config(os.environ["TFDS_DIR"])
    config.total_steps = 40
    config.eval_every_steps = 20
    config.checkpoint.every_steps = 10
    config.model.dropout = 0.0  # what stochastic depth draws is masks enough
    return config

"""The config of the tests that run train.py: a small Mixer on 200 streamed digits.

It has augmentation, mixup, masks, an average and accumulation, and compiles quickly. Its 40 steps
are 3.2 epochs.
"""

import os

from helpers import tiny_config


def get_config():
    config = tiny_config(os.environ["TFDS_DIR"])
    config.total_steps = 40
    config.eval_every_steps = 20
    config.checkpoint.every_steps = 10
    config.dataset.update(train_split="train[:200]", on_device="off")
    config.dataset.train_preprocess = "decode|random_crop(8, pad=1)|flip_lr"
    return config

"""The config of the tests that run train.py as several processes: no TensorFlow, SGD.

Stochastic depth draws masks; those of dropout compile slowly, and test_sharding has them.
"""

from helpers import tiny_config


def get_config():
    config = tiny_config(eval_every_steps=500, total_steps=8, model__dropout=0.0)
    config.optimizer.update(name="sgd", peak_lr=0.1)
    config.schedule.update(decay="constant", warmup_steps=0)
    config.checkpoint.update(every_steps=500, keep_last=4)
    return config

"""Mixer-B/16 on ImageNet-1k, from scratch: the authors' own config, big_vision `mlp_mixer_i1k`.

python train.py --config=configs/mixer_b16_i1k.py
python train.py --config=configs/mixer_b16_i1k.py:mode=gpu8,epochs=60
python train.py --config=configs/mixer_b16_i1k.py:mode=smoke      # on a laptop, no data

Expected at 224 px: 76.3 % after 300 epochs (2 h 11 min on a TPU v3-128), 70.5 % after 60 epochs
(27 min) [read: BV's docstring]; 76.44 %, ReaL 82.36 % [paper]. Not measured here.

Values [read: BV]: `train[:99%]` in batches of 4096, 300 epochs = 92,897 steps; inception crop,
flip, RandAugment(2, 15); mixup 0.5; sigmoid loss, initial bias of the head -6.9; Adam at 1e-3 with
weight decay 0.1 times the learning rate (their 1e-4); warm-up over 10,000 steps, linear decay;
stochastic depth 0.1. `train[99%:]` is the validation split; `validation` is evaluated at the end.
Data: python -m mixer.tools.prepare tfds imagenet2012

Arguments (`pretraining` in configs/common.py explains them): model= res= mode= epochs= data=
"""

from configs import common


def get_config(arg=""):
    return common.imagenet1k(arg, model="B/16")

"""Mixer-L/16 on ImageNet-21k, from scratch: the run behind the published weights.

python train.py --config=configs/mixer_l16_i21k.py
python train.py --config=configs/mixer_l16_i21k.py:mode=gpu8
python train.py --config=configs/mixer_l16_i21k.py:mode=smoke     # on a laptop, no data

Expected on ImageNet-1k after fine-tuning: 82.89 % at 224 px, 83.91 to 84.15 % at 448 px [paper].
Not measured here.
Hardware: 410 TPUv3 core-days [paper], which is 3.2 days on a v3-128.

Values: 300 epochs of batches of 4096, Adam at 1e-3, weight decay 0.1, RandAugment(2, 20), mixup
0.5, stochastic depth 0.1, warm-up over 10,000 steps, linear decay [paper]. As on ImageNet-1k, there
are two operations of RandAugment, the decay ends at 1e-5 and the loss is sigmoid [read: BV
`mlp_mixer_i1k`]. The initial bias of the head is -10; 51,200 images are held out, 25,600 for
validation and 25,600 for the end [read: BV's other ImageNet-21k config].
Data: python -m mixer.tools.prepare imagenet21k --source=TARS. It has 21,843 classes, as the
published weights. data=imagenet21k/winter21 selects the later release.

Arguments (`pretraining` in configs/common.py explains them): model= res= mode= epochs= data=
"""

from configs import common


def get_config(arg=""):
    return common.imagenet21k(arg, model="L/16", magnitude=20, mixup=0.5)

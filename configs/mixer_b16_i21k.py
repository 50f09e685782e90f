"""Mixer-B/16 on ImageNet-21k, from scratch: the run behind the published weights.

python train.py --config=configs/mixer_b16_i21k.py
python train.py --config=configs/mixer_b16_i21k.py:mode=gpu8
python train.py --config=configs/mixer_b16_i21k.py:mode=smoke     # on a laptop, no data

Expected: 80.64 % on ImageNet-1k after fine-tuning at 224 px [paper]. Not measured here.
Hardware: TPUs with batch 4096; time not given.

Values: 300 epochs of batches of 4096, Adam at 1e-3, weight decay 0.1, RandAugment(2, 10), mixup
0.2, stochastic depth 0.1, warm-up 10,000 steps, linear decay [paper]. That RandAugment takes two
operations, the end of the decay at 1e-5 and the sigmoid loss are as on ImageNet-1k [read: BV
`mlp_mixer_i1k`]; first bias of the head -10, 51,200 images held out, 25,600 to validate on and
25,600 for the end [read: BV's other ImageNet-21k config].
Data: python -m mixer.tools.prepare imagenet21k --source=TARS; 21,843 classes, as in the published
weights; data=imagenet21k/winter21 is the later release.

Arguments (`pretraining` in configs/common.py explains them): model= res= mode= epochs= data=
"""

from configs import common


def get_config(arg=""):
    return common.imagenet21k(arg, model="B/16", magnitude=10, mixup=0.2)

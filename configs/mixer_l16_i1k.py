"""Mixer-L/16 on ImageNet-1k, from scratch.

python train.py --config=configs/mixer_l16_i1k.py
python train.py --config=configs/mixer_l16_i1k.py:mode=gpu8
python train.py --config=configs/mixer_l16_i1k.py:mode=smoke      # on a laptop, no data

Expected at 224 px: 71.76 % after 300 epochs [paper]. This is below B/16, because a Mixer of this
size overfits ImageNet-1k. Hardware: TPUs with batch 4096; the time is not published. Not measured
here.

Values: the paper's table has the same values for B and L on ImageNet-1k [paper]. Values that it
leaves open (bias of the head, splits, end of the decay) are those of B/16 [read: BV
`mlp_mixer_i1k`].
Data: python -m mixer.tools.prepare tfds imagenet2012

Arguments (`pretraining` in configs/common.py explains them): model= res= mode= epochs= data=
"""

from configs import common


def get_config(arg=""):
    return common.imagenet1k(arg, model="L/16")

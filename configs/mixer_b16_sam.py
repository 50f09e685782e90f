"""Mixer-B/16 on ImageNet-1k with sharpness-aware minimization: the run behind `sam/Mixer-B_16.npz`.

python train.py --config=configs/mixer_b16_sam.py
python train.py --config=configs/mixer_b16_sam.py:model=S/16,rho=0.5
python train.py --config=configs/mixer_b16_sam.py:mode=smoke      # on a laptop, no data

Expected at 224 px after 300 epochs: 77.4 %, and 66.4 % without SAM [recalled: Chen et al., 2021,
arXiv 2106.01548, "When vision transformers outperform ResNets without pre-training or strong data
augmentations", whose abstract says +11.0]. Not measured here. Hardware: 64 TPU chips [read: an
author in vision_transformer's issue 153]. Each step computes two gradients and takes twice
the time.

Values [recalled from the paper, not re-checked]: inception crop and flip, no mixup and no other
augmentation; batch 4096, 300 epochs, warm-up over 10,000 steps, cosine decay; AdamW at 3e-3 with
weight decay 0.3 times the learning rate; radius 0.6 for B/16, 0.5 for S. The sigmoid loss, clipping
at 1, stochastic depth 0.1, the splits and the evaluation are those of `mixer_b16_i1k.py`.

The ascent step follows the gradient of the global batch. In the authors' code, each chip used the
gradient of its own 64 images, which has a stronger effect; for fewer chips they advise a larger
radius [read: the same issue]. Expect to need a larger rho.
Data: python -m mixer.tools.prepare tfds imagenet2012

Arguments: rho= is SAM's radius; `pretraining` in configs/common.py explains model= res= mode=
epochs= data=
"""

from configs import common


def get_config(arg=""):
    arg = common.parse_arg(
        arg, model="B/16", res=224, mode="tpu", epochs=300.0, data="imagenet2012", rho=0.6
    )
    common.check_positive("rho", arg.rho)
    config = common.pretraining(
        arg,
        dataset="imagenet2012",
        num_classes=1000,
        train_split="train[:99%]",
        val_split="train[99%:]",
        test_split="validation",
        augment="flip_lr",
        peak_lr=3e-3,
        weight_decay=0.3,
        head_bias_init=-6.9,
        stoch_depth=0.1,
    )
    config.optimizer.sam_rho = arg.rho
    config.schedule.update(decay="cosine", final_multiplier=0.0)
    return config

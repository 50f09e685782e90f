"""ViT-S/16 on ImageNet-1k, from scratch: the authors' baseline, big_vision `vit_s16_i1k`.

python train.py --config=configs/vit_s16_i1k.py
python train.py --config=configs/vit_s16_i1k.py:mode=gpu8,epochs=300
python train.py --config=configs/vit_s16_i1k.py:mode=smoke        # on a laptop, no data

Expected at 224 px: 76.5 % after 90 epochs, in 6 to 7 hours on a TPU v3-8 [read: BV's docstring;
Beyer et al., 2022, arXiv 2205.01580, "Better plain ViT baselines for ImageNet-1k"]. Not measured
here.

Values [read: BV]: `train[:99%]` in batches of 1024, 90 epochs; inception crop, flip, RandAugment(2,
10), mixup 0.2; softmax loss; mean of the tokens, fixed sine-cosine positions and a tanh layer
before the head; Adam at 1e-3 with the first moment in bfloat16 and weight decay 0.1 times the
learning rate (their 1e-4), clipping at global norm 1; warm-up over 10,000 steps, cosine decay to 0.
No stochastic depth and no dropout. `train[99%:]` is the validation split; `validation` is evaluated
at the end.
Data: python -m mixer.tools.prepare tfds imagenet2012

Arguments (`pretraining` in configs/common.py explains them): model= res= mode= epochs= data=
The batch is 1024 on all hardware, so mode=gpu8 changes only the dtype. Without stronger
regularization, larger variants overfit on ImageNet-1k.
"""

from configs import common


def get_config(arg=""):
    arg = common.parse_arg(
        arg, model="ViT-S/16", res=224, mode="tpu", epochs=90.0, data="imagenet2012"
    )
    config = common.pretraining(
        arg,
        dataset="imagenet2012",
        num_classes=1000,
        train_split="train[:99%]",
        val_split="train[99%:]",
        test_split="validation",
        augment=f"flip_lr|{common.randaugment(arg.res, 10)}",
        peak_lr=1e-3,
        weight_decay=0.1,
        head_bias_init=0.0,
        mixup=0.2,
    )
    config.loss = "softmax"
    if config.model.name == "vit":
        config.model.update(pooling="gap", positions="sincos2d", pre_logits_layer=True)
    config.optimizer.update(peak_lr=1e-3, weight_decay=0.1, momentum_dtype="bfloat16")
    config.schedule.update(decay="cosine", final_multiplier=0.0)
    if arg.mode != "smoke":
        config.global_batch_size = 1024
        config.schedule.update(warmup_steps=10_000, warmup_examples=None)
    return config

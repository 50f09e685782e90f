"""A small Mixer (1.13 M parameters) on CIFAR-10, from scratch.

python train.py --config=configs/cifar10.py                       # cifar10 of TFDS
python train.py --config=configs/cifar10.py:folder=/data/cifar10  # train/<class>/*.jpg, test/...
python train.py --config=configs/cifar10.py:epochs=300
python train.py --config=configs/cifar10.py:recipe=record,epochs=300
python train.py --config=configs/cifar10.py:model=small_vit

The model has patch size 4, C 128, D_S 64, D_C 512 and 8 blocks, as the reference implementation
github.com/omihub777/MLP-Mixer-CIFAR. The README there reports 90.83 % after 300 epochs, in 3 h 34 m
on one P100. It also reports 0.67 M parameters, which is the number with D_S and D_C swapped.

Arguments:
  folder=   a folder of images, instead of TFDS's lossless cifar10.
  epochs=   the length of the run; warm-up and decay scale with it. 5 epochs take 15 minutes on two
            CPU cores; README.md has the accuracy.
  recipe=   ours, or record: the reference recipe [from its README, and partly from its code].
  model=    mixer, or one of three models of 30.3 MFLOP per image, which docs/paper.md compares:
            small_mixer, small_untied (each channel has its own token-mixing MLP) and small_vit.

The small models have patch size 4, C 64 and MLPs of width 256. The attention of a ViT block costs
more than the token-mixing MLP of a Mixer block (D_S 48), so that 4 blocks of the ViT cost as much
as 6 of the Mixer.

`ours`: AdamW with weight decay 0.1 times the learning rate, warm-up over a tenth of the run, cosine
decay to 0, label smoothing 0.1, random crop with padding 4, flip. Below 100 epochs the peak
learning rate is 3e-3 and nothing else is added. From 100 epochs on, each image is seen so often
that the recipe adds AutoAugment's CIFAR policy after the flip, CutMix as in `record`, and an EMA of
the parameters (decay 0.999), which is evaluated too; the peak is 1e-3. The long form has not been
run in full. It is evaluated and saved every ten epochs, the short form after every epoch.

Both recipes hold out 2 % of the training images for validation, and evaluate the test split once,
at the end. The reference implementation trains on all 50,000 images and monitors the test split. To
do the same, add --config.dataset.train_split=train --config.dataset.val_split=test

`record`: Adam (0.9, 0.99) with an L2 penalty of 5e-5 in the gradient, batch 128, warm-up over the
first 1/60 of the run (5 epochs of 300), cosine decay from 1e-3 to 2.34e-6, label smoothing 0.1,
CutMix with probability 0.5 and Beta(1, 1), two random crops with padding 4, then AutoAugment's
CIFAR policy, no flip, no clipping, GELU by erf. It differs from the reference implementation:
- The learning rate changes in every step, not in every epoch (the first epoch there trains at 0).
- The cosine there takes 300 epochs, of which the run's end cuts off 6, so that it ends at 2.34e-6.
  Here it is compressed into the epochs after the warm-up and ends at the same rate. In between, the
  rate is lower by at most 2.5 % of the peak.
- An epoch there ends with a batch of 80, which makes 117,300 steps of 300 epochs of 50,000 images.
  Here batches run across epochs: 114,844 steps of 300 epochs of 49,000 images.
- The sides of CutMix's windows are even numbers there, and the mean pasted area is 0.2995 of the
  image, here 0.3208. The partner there is drawn by a permutation of the batch, here it is the
  previous image.
- ShearY there interpolates bicubically about the corner of the pixel, here it takes the nearest
  pixel. Solarize at levels 2 and 8 inverts values from 200 and 29 up there, here from 199 and 28.
  Color, Contrast, Sharpness and AutoContrast differ by 1 in up to 35 % of the values.
- The L2 penalty applies to kernels only, not to biases and LayerNorm.
- Pixels are scaled to [-1, 1], not by the mean and standard deviation of the set.
- Weights are initialized as in Flax (the head at 0), not as in PyTorch.
- The epsilon of LayerNorm is 1e-6, not 1e-5.
- It computes in float32.
"""

from configs import common

RECIPES = ("ours", "record")
TRAIN_EXAMPLES = 49_000  # 98 % of 50,000
_SMALL_MIXER = dict(hidden_dim=64, num_blocks=6, tokens_mlp_dim=48, channels_mlp_dim=256)
MODELS = {
    "mixer": dict(hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512),
    "small_mixer": _SMALL_MIXER,
    "small_untied": dict(_SMALL_MIXER, token_mixing_groups=64),
    "small_vit": dict(name="vit", hidden_dim=64, num_blocks=4, mlp_dim=256, num_heads=2),
}


def get_config(arg=""):
    arg = common.parse_arg(arg, folder="", epochs=5, recipe="ours", model="mixer")
    common.check_choice("recipe", arg.recipe, RECIPES)
    common.check_choice("model", arg.model, MODELS)
    common.check_positive("epochs", arg.epochs)
    config = common.base()
    config.global_batch_size = 128
    config.total_epochs = arg.epochs
    config.image_size = 32
    config.model.update(patch_size=4, **MODELS[arg.model])
    config.dataset.update(
        name="folder" if arg.folder else "cifar10",
        data_dir=arg.folder,
        train_split="train[:98%]",
        val_split="train[98%:]",
        eval_preprocess="decode",
    )
    config.label_smoothing = 0.1
    config.schedule.decay = "cosine"
    if arg.recipe == "ours":
        config.dataset.train_preprocess = "decode|random_crop(32, pad=4)|flip_lr"
        config.optimizer.update(peak_lr=3e-3, weight_decay=0.1)
        config.schedule.warmup_epochs = 0.1 * arg.epochs
        if arg.epochs >= 100:
            config.dataset.train_preprocess += "|autoaugment_cifar"
            config.mixup.update(cutmix_alpha=1.0, cutmix_prob=0.5)
            config.optimizer.update(peak_lr=1e-3, ema_decay=0.999)
    else:
        config.dataset.train_preprocess = (
            "decode|random_crop(32, pad=4)|random_crop(32, pad=4)|autoaugment_cifar"
        )
        config.model.gelu = "erf"
        config.mixup.update(cutmix_alpha=1.0, cutmix_prob=0.5)
        config.optimizer.update(
            peak_lr=1e-3, b2=0.99, weight_decay=5e-5, weight_decay_form="l2", grad_clip_norm=0.0
        )
        config.schedule.update(warmup_epochs=arg.epochs * 5 / 300, final_multiplier=2.34e-3)
    config.eval_batch_size = 500
    # An accelerator trains an epoch in half a second, which is no longer than one save and one
    # evaluation take. Long runs therefore do both only every ten epochs.
    every = 10 if arg.epochs >= 100 else 1
    config.eval_every_epochs = every
    config.checkpoint.every_steps = every * TRAIN_EXAMPLES // config.global_batch_size
    return config

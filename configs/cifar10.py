"""A Mixer of the CIFAR-10 record's shape (1.13 M parameters), from scratch.

python train.py --config=configs/cifar10.py                       # TFDS's cifar10
python train.py --config=configs/cifar10.py:folder=/data/cifar10  # train/<class>/*.jpg, test/...
python train.py --config=configs/cifar10.py:epochs=300
python train.py --config=configs/cifar10.py:recipe=record,epochs=300

Shape: patch 4, C 128, D_S 64, D_C 512, 8 blocks: github.com/omihub777/MLP-Mixer-CIFAR ("the
record"), whose README gives 90.83 % after 300 epochs, 3 h 34 m on one P100, and 0.67 M parameters
(so many has the model with D_S and D_C swapped).

Arguments:
  folder=   a folder of images instead of TFDS's lossless cifar10.
  epochs=   the length; warm-up and decay follow it. 5 take half an hour on two CPU cores; README.md
            has what they give.
  recipe=   ours, or record: the recipe to be beaten [its README; parts read in its code].

`ours`: AdamW with weight decay 0.1 times the learning rate, warm-up over a tenth of the run,
cosine to 0, label smoothing 0.1, random crop with padding 4, flip; below 100 epochs that is all,
with a peak of 3e-3. From 100 epochs on, when each image is seen that often: AutoAugment's CIFAR
policy after the flip, CutMix as in `record`, a peak of 1e-3, and an average of the parameters
(decay 0.999) evaluated beside them. The long form has not been run in full; it is evaluated and
saved every ten epochs, the short one after each.

Both hold 2 % of the training images out for validation and evaluate the test split once, at the
end. The record trains on all 50,000 and watches the test split: for that, add
--config.dataset.train_split=train --config.dataset.val_split=test

`record`: Adam (0.9, 0.99) with L2 of 5e-5 in the gradient, batch 128, warm-up over the first
1/60 of the run (5 epochs of 300), cosine from 1e-3 to 1e-6, label smoothing 0.1, CutMix with
probability 0.5 and Beta(1, 1), two random crops of padding 4 and then AutoAugment's CIFAR policy,
no flip, no clipping, GELU by erf. Not as there: the learning rate moves each step and not each
epoch (there the first epoch trains at 0), L2 is of kernels only and not of biases and LayerNorm,
pixels are scaled to [-1, 1] and not by the set's mean and deviation, weights start as Flax's
(the head at 0) and not as PyTorch's, LayerNorm's epsilon is 1e-6 and not 1e-5, and it is float32.
"""

from configs import common

RECIPES = ("ours", "record")
TRAIN_EXAMPLES = 49_000  # 98 % of 50,000


def get_config(arg=""):
    arg = common.parse_arg(arg, folder="", epochs=5, recipe="ours")
    common.check_choice("recipe", arg.recipe, RECIPES)
    common.check_positive("epochs", arg.epochs)
    config = common.base()
    config.global_batch_size = 128
    config.total_epochs = arg.epochs
    config.image_size = 32
    config.model.update(
        patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512
    )
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
        config.schedule.update(warmup_epochs=arg.epochs * 5 / 300, final_multiplier=1e-3)
    config.eval_batch_size = 500
    # An accelerator trains an epoch in half a second: no longer than saving and evaluating take.
    every = 10 if arg.epochs >= 100 else 1
    config.eval_every_epochs = every
    config.checkpoint.every_steps = every * TRAIN_EXAMPLES // config.global_batch_size
    return config

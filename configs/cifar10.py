"""A Mixer of the CIFAR-10 record's shape (1.13 M parameters), from scratch.

python train.py --config=configs/cifar10.py                      # TFDS's cifar10
python train.py --config=configs/cifar10.py:folder=/data/cifar10 # train/<class>/*.jpg, test/...

Shape: patch 4, C 128, D_S 64, D_C 512, 8 blocks (github.com/omihub777/MLP-Mixer-CIFAR, the
architecture behind its 90.83 %). Training: AdamW, crop with 4 pixels of padding, flip; batch 128.
`epochs=` sets the length; the schedule follows it. The test split is evaluated once, at the end;
2 % of the training images are held out for validation. README.md has the measured accuracy and
seconds per epoch on two CPU cores.
"""

from configs import common

TRAIN_EXAMPLES = 49_000  # 98 % of 50,000


def get_config(arg=""):
    arg = common.parse_arg(arg, folder="", epochs=5)
    config = common.base()
    config.global_batch_size = 128
    steps_per_epoch = TRAIN_EXAMPLES // config.global_batch_size
    config.total_steps = arg.epochs * steps_per_epoch
    config.image_size = 32
    config.model.update(
        patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512
    )
    config.dataset.update(
        name="folder" if arg.folder else "cifar10",
        data_dir=arg.folder,
        train_split="train[:98%]",
        val_split="train[98%:]",
        train_preprocess="decode|random_crop(32, pad=4)|flip_lr",
        eval_preprocess="decode",
    )
    config.optimizer.update(peak_lr=2e-3, weight_decay=0.1)
    config.schedule.update(decay="cosine", warmup_steps=steps_per_epoch // 2)
    config.eval_batch_size = 500
    config.eval_every_steps = steps_per_epoch
    config.checkpoint.every_steps = steps_per_epoch
    return config

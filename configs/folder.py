"""A Mixer on your own images, from scratch, in folders `<class>/<image>`.

python train.py --config=configs/folder.py:res=64,patch=8 --config.dataset.data_dir=/data/pets

Arguments: res= is the side of the images in pixels, patch= the patch size.

The class names are the names of the folders. The folders may also be `<split>/<class>/<image>`
with the splits train, val (or valid, validation) and test. Without val, 10 % of the training
images, chosen by a hash of their names, are held out for validation; with neither val nor test,
another 10 % are held out for the test at the end. The run prints which splits it uses
(docs/data.md). The recipe is for photographs of 64 pixels or more. Expect the accuracy of a small
network that is trained from scratch on your data.
"""

from configs import common


def get_config(arg=""):
    arg = common.parse_arg(arg, res=64, patch=8)
    common.check_positive("patch", arg.patch)
    common.check_positive("res", arg.res)
    config = common.base()
    config.total_steps = 5000
    config.global_batch_size = 128
    config.image_size = arg.res
    config.model.update(
        patch_size=arg.patch,
        hidden_dim=192,
        num_blocks=8,
        tokens_mlp_dim=96,
        channels_mlp_dim=768,
        stoch_depth=0.1,
    )
    config.dataset.update(
        name="folder",
        train_split="auto",
        val_split="auto",
        test_split="auto",
        train_preprocess=f"inception_crop({arg.res})|flip_lr",
        eval_preprocess=f"decode|resize_small({arg.res * 8 // 7})|central_crop({arg.res})",
    )
    config.optimizer.update(peak_lr=1e-3, weight_decay=0.1)
    config.schedule.update(decay="cosine", warmup_steps=500)
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500
    return config

"""A small Mixer on scikit-learn's handwritten digits: the first run on a new machine."""

from configs import common


def get_config(arg=""):
    common.parse_arg(arg)
    config = common.base()
    config.total_steps = 1500
    config.global_batch_size = 64
    config.image_size = 8
    config.model.update(
        patch_size=1, hidden_dim=64, num_blocks=4, tokens_mlp_dim=64, channels_mlp_dim=128
    )
    config.dataset.update(
        name="digits",
        train_preprocess="decode|random_crop(8, pad=1)",
        eval_preprocess="decode",
    )
    config.optimizer.update(peak_lr=3e-3, weight_decay=0.1)
    config.schedule.update(decay="cosine", warmup_steps=100)
    config.log_every_steps = 100
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500
    return config

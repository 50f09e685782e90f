"""Every key of a config, with its meaning. A config starts from `base()` and sets its own values.

Configs import ml_collections and this file only, so that one can be read without JAX.
"""

from ml_collections import ConfigDict, config_dict


def base() -> ConfigDict:
    """Returns a config with every key; those that have no sensible common value are empty."""
    config = ConfigDict()
    config.seed = 0  # of parameters, data order, augmentation and masks
    # The length of the run: set one of the three. Epochs are of the training split.
    config.total_steps = config_dict.placeholder(int)  # updates
    config.total_epochs = config_dict.placeholder(float)
    config.total_examples = config_dict.placeholder(int)
    config.global_batch_size = config_dict.placeholder(int)  # images per update, all devices
    config.image_size = config_dict.placeholder(int)  # side in pixels; the patch divides it
    config.loss = "softmax"  # softmax or sigmoid (summed over classes)
    config.label_smoothing = 0.0  # s: labels become (1 - s) * labels + s / classes
    # Devices along each axis; -1 is what the others leave.
    config.mesh = dict(data=-1)
    # Whose weights a new run starts from: a run, a step of it (RUN/checkpoints/STEP,
    # RUN/best/STEP), or an npz file of the published layout; empty starts from random ones.
    config.init_from = ""
    config.init_head = "auto"  # keep (it must fit), reset (zeros), auto (reset if it does not fit)

    config.model = dict(
        variant=config_dict.placeholder(str),  # S/32 S/16 S/8 B/32 B/16 L/32 L/16 H/14, or None
        # What is set here replaces the variant's.
        patch_size=config_dict.placeholder(int),  # P, pixels
        hidden_dim=config_dict.placeholder(int),  # C
        num_blocks=config_dict.placeholder(int),  # L
        tokens_mlp_dim=config_dict.placeholder(int),  # D_S
        channels_mlp_dim=config_dict.placeholder(int),  # D_C
        num_classes=config_dict.placeholder(int),  # None: as many as the data has
        gelu="tanh",  # tanh (the authors' code) or erf (timm)
        stoch_depth=0.0,  # drop rate of the last block; falls linearly to 0 at the first
        stoch_depth_rescale=False,  # False: the authors' code; True: timm's
        dropout=0.0,
        head_bias_init=0.0,  # the authors' sigmoid loss: -6.9 with 1,000 classes, -10 with 21,843
        dtype="float32",  # of the computation: float32 or bfloat16; parameters are float32
    )

    config.dataset = dict(
        name="",  # a TFDS name, "folder" or "synthetic"
        data_dir="",  # the folder; for TFDS, empty is TFDS's own default
        # Which label of a TFDS set: empty is the set's own; else a feature's name, or a derived
        # label of mixer/data/labels.py such as "clevr_count".
        label_key="",
        # Folder only: a jsonl file of paths and labels, several an image if wanted; empty: the
        # names of the images' folders are the labels.
        label_file="",
        train_split="train",
        val_split="validation",  # evaluated during training; empty: none
        test_split="test",  # evaluated once, at the end; empty: none
        train_preprocess="",  # steps of mixer/data/preprocess.py, joined by |
        eval_preprocess="",
        exclude="",  # list of images to leave out, made by mixer.tools.prepare check
        # A TFDS set above 2 GiB is shuffled in groups of about this many examples, which stand in
        # memory (two groups at a time); smaller sets and folders are shuffled whole.
        shuffle_group_size=16384,
        prefetch_batches=2,  # batches on their way to the device
    )

    # On the device, on the global batch, anew in every step.
    config.mixup = dict(
        alpha=0.0,  # mixup with lambda from Beta(alpha, alpha); 0: none
        per_example=False,  # False: one lambda a step, the authors' form; True: one an image
        cutmix_alpha=0.0,  # CutMix with the area from Beta(cutmix_alpha, cutmix_alpha); 0: none
        cutmix_prob=0.0,  # share of the steps that take CutMix; the others take mixup, if any
    )

    config.optimizer = dict(
        name="adamw",  # adamw or sgd (momentum b1)
        peak_lr=1e-3,  # at the end of the warm-up
        b1=0.9,  # of Adam; the momentum of sgd
        b2=0.999,  # adamw only
        eps=1e-8,  # adamw only
        momentum_dtype="float32",  # of the first moment: float32 or bfloat16
        weight_decay=0.0,  # of kernels only; see weight_decay_form
        # What a kernel loses in an update: "lr": learning rate * weight_decay * kernel (AdamW);
        # "schedule": learning rate / peak_lr * weight_decay * kernel (the authors' code, whose
        # 1e-4 at a peak of 1e-3 is 0.1 of "lr"); "l2": weight_decay * kernel joins the gradient.
        weight_decay_form="lr",
        grad_clip_norm=1.0,  # global norm of the gradient; 0: no clipping
        # ((regex, multiplier), ...): the learning rate of the parameters whose whole name matches,
        # the first match wins, 1 for the others; 0 freezes. As in ((".*token_mixing.*", 0.0),).
        lr_multipliers=(),
        sam_rho=0.0,  # sharpness-aware minimization: radius of the ascent step; 0: none
        ema_decay=0.0,  # of a moving average of the parameters, evaluated beside them; 0: none
        accumulate_steps=1,  # parts that a batch is cut into to fit memory; the update is the same
    )
    config.schedule = dict(
        decay="linear",  # after the warm-up: linear, cosine, constant or rsqrt
        # Linear warm-up from 0: at most one of the three.
        warmup_steps=config_dict.placeholder(int),
        warmup_epochs=config_dict.placeholder(float),
        warmup_examples=config_dict.placeholder(int),
        final_multiplier=0.0,  # of peak_lr, at the last step; linear and cosine
        rsqrt_timescale=10_000,  # rsqrt only: steps in which its falling begins to show
        # Linear to 0 over the last part of the run, times the decay: at most one of the three.
        cooldown_steps=config_dict.placeholder(int),
        cooldown_epochs=config_dict.placeholder(float),
        cooldown_examples=config_dict.placeholder(int),
    )

    config.log_every_steps = 50  # a line of metrics.jsonl
    # Validation: at most one of the three; none: at the end only.
    config.eval_every_steps = config_dict.placeholder(int)
    config.eval_every_epochs = config_dict.placeholder(float)
    config.eval_every_examples = config_dict.placeholder(int)
    config.eval_batch_size = config_dict.placeholder(int)  # None: global_batch_size
    config.checkpoint = dict(
        every_steps=1000,  # and at the last step
        keep_last=2,
        keep_every_steps=config_dict.placeholder(int),  # keeps multiples of it for good
        keep_best=True,  # the best by validation accuracy (of the average, if any), in RUN/best
    )
    config.tensorboard = True
    return config.lock()  # a config that sets an unknown key is told so


def parse_arg(arg: str, **defaults):
    """Reads `key=value,key=value` of `--config=FILE:ARG`, typed as the defaults are.

    Returns:
      A ConfigDict of the defaults with what `arg` sets.

    Raises:
      ValueError: an unknown key, or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in defaults:
            known = ", ".join(f"{name}=" for name in defaults) or "none"
            raise ValueError(f"config argument {part!r} is not understood; accepted: {known}")
        kind = type(defaults[key])
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False}[value.lower()]
            else:
                values[key] = kind(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"config argument {key}={value!r}: it must be of type {kind.__name__}"
            ) from None
    return ConfigDict(values)

"""Every key of a config, with its meaning. A config starts from `base()` and sets its own values.

Configs import only ml_collections and this file, so that they can be read without JAX.

The configs mark the source of a number:
- [paper]: arXiv 2105.01601, quoted from memory.
- [recalled]: another publication, quoted from memory.
- [read: BV], [read: VT]: the authors' code, google-research/big_vision or vision_transformer;
  other sources after "read:" are named in full.
"""

from ml_collections import ConfigDict, config_dict


def base() -> ConfigDict:
    """Returns a config with every key; keys without a sensible common value are empty."""
    config = ConfigDict()
    config.seed = 0  # for parameters, data order, augmentation and masks
    # Length of the run: set exactly one of the three. An epoch is one pass over the training split.
    config.total_steps = config_dict.placeholder(int)  # updates of the parameters
    config.total_epochs = config_dict.placeholder(float)
    config.total_examples = config_dict.placeholder(int)
    config.global_batch_size = config_dict.placeholder(int)  # images per step, on all devices
    # Side in pixels, or (height, width), multiples of those of the patch. On a command line:
    # --config.image_size=224 or --config.image_size="(64, 32)".
    config.image_size = config_dict.placeholder(object)
    config.loss = "softmax"  # softmax, or sigmoid (summed over the classes)
    config.label_smoothing = 0.0  # s: labels become (1 - s) * labels + s / classes
    # b: a class with n training images has the weight n^-b in the loss, up to a common factor. 0:
    # images count the same; 1: classes count the same (docs/training.md).
    config.class_balance = 0.0
    # Number of devices along each axis; -1 on one axis takes the remaining devices
    # (docs/scaling.md). data and fsdp both split the batch. Along data, every device holds all
    # parameters; along fsdp, it holds a part of the parameters and of the optimizer state. tensor
    # splits the hidden widths of both MLPs.
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    # Initial weights of a new run: a run, one of its checkpoints (RUN/checkpoints/STEP,
    # RUN/best/STEP), a file (.npz or .safetensors), a URL, or the short name of a published
    # checkpoint such as B/16-i21k (docs/weights.md). Empty: random initialization.
    config.init_from = ""
    # Head of init_from: keep (an error if it does not fit), reset (zeros), or auto (keep if it has
    # the same classes as the data, otherwise reset).
    config.init_head = "auto"
    # How to resize weights for another image size: grow (integer factors, as in the paper) or
    # interpolate (any size, not in the paper; the only way for vit). Growing by K multiplies
    # tokens_mlp_dim by K^2.
    config.init_resize = "grow"
    config.init_image_size = config_dict.placeholder(object)  # of init_from; None: read from it

    config.model = dict(
        name="mixer",  # the architecture: mixer or vit. A key of the other one must be None.
        # S/32 S/16 S/8 (mixer only) B/32 B/16 L/32 L/16 H/14, or None. A dimension below that is
        # set replaces the variant's. If neither is set, the model is that of init_from.
        variant=config_dict.placeholder(str),
        patch_size=config_dict.placeholder(object),  # P: side in pixels, or (height, width)
        # Channels of the images: 3 (RGB), 1 (grey), or any other number (docs/data.md, "Other
        # inputs"). Image files are decoded to 3 or 1.
        in_channels=3,
        hidden_dim=config_dict.placeholder(int),  # C
        num_blocks=config_dict.placeholder(int),  # L
        tokens_mlp_dim=config_dict.placeholder(int),  # mixer: D_S
        channels_mlp_dim=config_dict.placeholder(int),  # mixer: D_C
        # mixer: number of token-mixing MLPs in a block, a divisor of hidden_dim. 1: all channels
        # share one (the paper); hidden_dim: one for each channel (docs/paper.md, A.1). None: that
        # of init_from, or 1 without it.
        token_mixing_groups=config_dict.placeholder(int),
        mlp_dim=config_dict.placeholder(int),  # vit: width of the MLP
        num_heads=config_dict.placeholder(int),  # vit: attention heads, a divisor of hidden_dim
        # vit: token (class token), gap (mean of the tokens) or map (attention from a learnt probe).
        # None, for these three keys: that of init_from, or token, learnt and False without it.
        pooling=config_dict.placeholder(str),
        # vit: learnt (one for each token, as vision_transformer), learnt_patches (none for the
        # class token, as big_vision) or sincos2d (fixed sines and cosines).
        positions=config_dict.placeholder(str),
        pre_logits_layer=config_dict.placeholder(bool),  # vit: a tanh layer before the head
        num_classes=config_dict.placeholder(int),  # None: that of the data
        # tanh (the authors' code) or erf (timm). None: that of init_from, or tanh without it.
        gelu=config_dict.placeholder(str),
        stoch_depth=0.0,  # drop rate of the last block; linear from 0 at the first block
        # Whether to divide a kept branch by its keep probability. The authors' code does not; timm
        # does, but with the same rate in all blocks, which cannot be set here.
        stoch_depth_rescale=False,
        dropout=0.0,
        head_bias_init=0.0,  # with the authors' sigmoid loss: -6.9 (1,000 classes), -10 (21,843)
        dtype="float32",  # of the computation: float32 or bfloat16. Parameters are float32.
        # What the backward pass recomputes to save memory: none, dots (everything except the
        # outputs of matmuls) or full (everything except the inputs of the blocks).
        remat="none",
        scan_blocks=False,  # run the blocks as a loop, compiled once; same parameters
    )

    config.dataset = dict(
        name="",  # a TFDS name, "folder" or "synthetic"
        data_dir="",  # the folder of images; for TFDS, empty: the default of TFDS
        # Which label of a TFDS set to use: the name of a feature, or a computed label of
        # mixer/data/labels.py such as "clevr_count". Empty: the label of the set.
        label_key="",
        # Folder only: a jsonl or CSV file of paths and labels (docs/data.md). Empty: the label is
        # the name of the class folder.
        label_file="",
        # Folder only, the order of the classes: sorted (by name), natural (class2 before class10),
        # or a file with one class name per line, which may also name classes without images.
        class_order="sorted",
        # The splits, such as train[:90%]; auto chooses by the splits that the data has
        # (docs/data.md).
        train_split="train",
        val_split="validation",  # evaluated during training; empty: none
        test_split="test",  # evaluated once, at the end; empty: none
        train_preprocess="",  # ops joined by |, see docs/preprocessing.md
        eval_preprocess="",
        # Shuffle the patches or the pixels of every image with one fixed permutation, as the last
        # op of both preprocessings (docs/probes.md). Empty: no shuffling.
        permutation="",
        exclude="",  # list of images to leave out, from mixer.tools.prepare check
        # A TFDS set above 2 GiB is shuffled in groups of about this many examples, with two groups
        # in memory at a time. Smaller sets and folders are shuffled as a whole.
        shuffle_group_size=16384,
        prefetch_batches=2,  # batches prefetched to the device
        # Whether all training images are decoded once and stay on the device, with the same order
        # and augmentation (docs/training.md). auto: if they take at most 512 MiB and an eighth of
        # the device's memory, and the run draws at least as many images as there are. on: always,
        # or an error. off: read the images again in every epoch.
        on_device="auto",
        # Where the random ops of streamed images run: host, device (as far as it can compute
        # them), or auto (device on GPUs, host elsewhere).
        augment_on="auto",
    )

    # Computed on the device, on the global batch, with new random numbers in every step.
    config.mixup = dict(
        alpha=0.0,  # mixup with lambda from Beta(alpha, alpha); 0: no mixup
        per_example=False,  # False: one lambda per step, as the authors; True: one per image
        cutmix_alpha=0.0,  # CutMix with the area from Beta(cutmix_alpha, cutmix_alpha); 0: off
        cutmix_prob=0.0,  # fraction of the steps that use CutMix; the others use mixup
    )

    config.optimizer = dict(
        name="adamw",  # adamw or sgd (momentum b1)
        peak_lr=1e-3,  # at the end of the warm-up
        b1=0.9,  # for adamw; the momentum of sgd
        b2=0.999,  # adamw only
        eps=1e-8,  # adamw only
        momentum_dtype="float32",  # dtype of the first moment: float32 or bfloat16
        # adamw only, dtype of the second moment: float32, or bfloat16 with stochastic rounding.
        variance_dtype="float32",
        weight_decay=0.0,  # decays kernels only; see weight_decay_form
        # What a step subtracts from a kernel.
        # "lr": learning rate * weight_decay * kernel (AdamW).
        # "schedule": learning rate / peak_lr * weight_decay * kernel (the authors' code; their
        # 1e-4 at a peak of 1e-3 equals 0.1 in the form "lr").
        # "l2": nothing; weight_decay * kernel is added to the gradient.
        weight_decay_form="lr",
        grad_clip_norm=1.0,  # maximum global norm of the gradient; 0: no clipping
        # ((regex, multiplier), ...) for the learning rate. The first regex that matches the full
        # name of a parameter decides; without a match it is 1. A multiplier of 0 freezes, as in
        # ((".*token_mixing.*", 0.0),).
        lr_multipliers=(),
        sam_rho=0.0,  # radius of sharpness-aware minimization; 0: off
        ema_decay=0.0,  # decay of an EMA of the parameters, which is evaluated too; 0: no EMA
        accumulate_steps=1,  # gradient accumulation: parts of a batch; the update is the same
    )
    config.schedule = dict(
        decay="linear",  # after the warm-up: linear, cosine, constant or rsqrt
        # Length of the linear warm-up from 0: set at most one of the three.
        warmup_steps=config_dict.placeholder(int),
        warmup_epochs=config_dict.placeholder(float),
        warmup_examples=config_dict.placeholder(int),
        final_multiplier=0.0,  # final learning rate / peak_lr; linear and cosine only
        rsqrt_timescale=10_000,  # rsqrt only: steps after which the decrease shows
        # Length of the final linear cool-down to 0, which multiplies the decay: set at most one.
        cooldown_steps=config_dict.placeholder(int),
        cooldown_epochs=config_dict.placeholder(float),
        cooldown_examples=config_dict.placeholder(int),
    )

    config.log_every_steps = 50  # interval between lines of metrics.jsonl
    # Interval between validations: set at most one of the three. None set: only at the end.
    config.eval_every_steps = config_dict.placeholder(int)
    config.eval_every_epochs = config_dict.placeholder(float)
    config.eval_every_examples = config_dict.placeholder(int)
    # Further evaluations at each validation: data sets and groups of mixer/evaluation/suites.py,
    # such as "imagenet_real,imagenet_v2"; "fewshot" and "linear_probe", probes on the run's data.
    config.eval_suite = ""
    config.eval_batch_size = config_dict.placeholder(int)  # None: global_batch_size
    config.checkpoint = dict(
        every_steps=1000,  # interval; the last step is saved too
        keep_last=2,
        keep_every_steps=config_dict.placeholder(int),  # never deletes multiples of it
        keep_best=True,  # in RUN/best, by validation accuracy (of the EMA, if there is one)
    )
    config.tensorboard = True  # whether to copy the metrics for TensorBoard
    # If the loss or gradient is not finite: stop, or skip (no update, but the step counts).
    config.nan_policy = "stop"
    config.max_skipped_steps = 10  # with skip: the run stops above this number
    # (first, last) step to profile into RUN/profile, for xprof and TensorBoard; (): no profile.
    config.profile_steps = ()
    config.stall_secs = 120  # without a step for this long, print which process waits for what
    # Directory of compiled programs for the next start. auto: RUN/compiled on accelerators, and the
    # user's cache directory on CPUs, shared by all runs. Empty: no cache. JAX's own variable
    # JAX_COMPILATION_CACHE_DIR takes precedence.
    config.compile_cache_dir = "auto"
    return config.lock()  # setting an unknown key is an error


def parse_arg(arg: str, **defaults):
    """Parses `key=value,key=value` of `--config=FILE:ARG`; each value gets its default's type.

    Returns:
      A ConfigDict of the defaults, with the values of `arg` in their place.

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
                f"config argument {key}={value!r}; expected a value of type {kind.__name__}"
            ) from None
    return ConfigDict(values)


MODES = ("tpu", "gpu8", "smoke")
PUBLISHED_BATCH = 4096  # batch size of every pre-training run of the paper


def check_choice(key: str, value, known) -> None:
    """Raises ValueError if the value of the config argument `key` is not in `known`."""
    if value not in known:
        raise ValueError(
            f"config argument {key}={value!r}; expected one of {', '.join(map(str, known))}"
        )


def check_positive(key: str, value: float) -> None:
    """Raises ValueError unless the config argument `key` is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"config argument {key}={value}; expected a finite number above 0")


def set_model(config: ConfigDict, model: str) -> None:
    """Sets the architecture and the variant: "B/16" is a Mixer, "ViT-B/16" a Vision Transformer."""
    variant = model.removeprefix("ViT-")
    config.model.update(name="mixer" if variant == model else "vit", variant=variant)


def eval_preprocess(res: int) -> str:
    """Returns the evaluation ops for images of `res` pixels [read: BV].

    The short side is resized to 8/7 of `res` (256 for 224) by area averaging, then cropped.
    `published` truncates values as BV does.
    """
    return f"decode|resize_small({res * 8 // 7}, method='area', published=True)|central_crop({res})"


def randaugment(res: int, magnitude: int) -> str:
    """Returns RandAugment with two operations per image [read: BV].

    At 224 px it gives the pixels of BV's code. At other sizes BV's lengths stay those for 224 px,
    which moves all of a small image out of sight. There is no published figure for such sizes, and
    the lengths scale with the image.
    """
    mode = ", mode='published'" if res == 224 else ""
    return f"randaugment(2, {magnitude}{mode})"


def make_smoke(config: ConfigDict, *, num_classes: int | None) -> None:
    """Reduces a recipe to 8 steps of 16 synthetic images and a model of 2 blocks.

    The widths, the loss, the mixing, the optimizer and the shape of the schedule do not change.
    """
    config.dataset.update(
        name="synthetic",
        train_split="train",
        val_split="validation",
        test_split="test",
        label_key="",
    )
    config.model.update(num_blocks=2, num_classes=num_classes)
    config.update(
        total_steps=8,
        total_epochs=None,
        global_batch_size=16,
        eval_batch_size=64,
        tensorboard=False,
    )
    config.update(log_every_steps=2, eval_every_steps=None, eval_every_examples=None)
    config.schedule.update(warmup_steps=2, warmup_examples=None)


def pretraining(
    arg: ConfigDict,
    *,
    dataset: str,
    num_classes: int | None,
    train_split: str,
    val_split: str,
    test_split: str,
    augment: str,
    peak_lr: float,
    weight_decay: float,
    head_bias_init: float,
    mixup: float = 0.0,
    stoch_depth: float = 0.0,
) -> ConfigDict:
    """Returns a pre-training config of the paper; its recipes share these values and arguments.

    Sigmoid loss, Adam (0.9, 0.999) with decoupled weight decay, clipping at global norm 1, warm-up
    over 10,000 steps, linear decay to 1e-5 of the peak, inception crop [read: BV, mlp_mixer_i1k].
    The preprocessing gives the pixels of BV's code (docs/preprocessing.md, "The published form").
    `weight_decay` is in the form "lr" and is multiplied by the learning rate. BV's 1e-4 at a peak
    of 1e-3, in the form "schedule", is 0.1 here.

    The arguments of the recipes:
      model: any variant, such as L/16 or ViT-B/16 (a Vision Transformer); all other values of the
        recipe stay the same.
      res: the side of the images in pixels, any multiple of the patch size.
      mode: the hardware: tpu, gpu8 or smoke.
        tpu: the published batch of 4096, float32 (a TPU computes its products in bfloat16).
        gpu8: one host with 8 GPUs, batch 1024, bfloat16. For a batch b instead of 4096, peak_lr is
          multiplied by sqrt(b / 4096) (the rule for Adam: Malladi et al., 2022, recalled). The
          warm-up sees the same number of images, so it takes 4096 / b times as many steps.
          weight_decay is multiplied by sqrt(b / 4096), so that kernels decay by the same amount
          per epoch. A peak of 1e-3, 10,000 steps and 0.1 become 5e-4, 40,000 steps and 0.05. This
          rule has not been measured. It is not that of big_vision's gpu8 (batch 512, 60 epochs,
          the same learning rate and warm-up). If memory is short, add
          --config.optimizer.accumulate_steps=2 (or more): the update stays the same.
        smoke: 8 steps of synthetic images with 2 blocks, whatever `data` and `epochs` are. It runs
          the same code on a laptop (B/16: 75 s of CPU time, 2.5 GB).
      epochs: the length of the run; the warm-up does not change.
      data: the data set: a TFDS name, folder (give --config.dataset.data_dir) or synthetic.

    Args:
      arg: the arguments above, parsed.
      dataset: the recipe's own data set.
      num_classes: number of classes of `dataset`; None: that of the data, as for any other `data`.
      train_split: split of `dataset` to train on.
      val_split: split to evaluate during training.
      test_split: split to evaluate at the end.
      augment: ops after the crop.
      peak_lr: peak learning rate for batch 4096.
      weight_decay: weight decay for batch 4096.
      head_bias_init: initial bias of the head, about -log(number of classes).
      mixup: parameter of the Beta distribution; 0: no mixup.
      stoch_depth: drop rate of the last block.

    Raises:
      ValueError: an argument out of range.
    """
    check_positive("res", arg.res)
    check_choice("mode", arg.mode, MODES)
    check_positive("epochs", arg.epochs)
    config = base()
    config.total_epochs = arg.epochs
    config.global_batch_size = 1024 if arg.mode == "gpu8" else PUBLISHED_BATCH
    config.image_size = arg.res
    config.loss = "sigmoid"
    config.model.update(stoch_depth=stoch_depth, head_bias_init=head_bias_init)
    set_model(config, arg.model)
    config.model.dtype = "bfloat16" if arg.mode == "gpu8" else "float32"
    if arg.data == dataset:
        config.model.num_classes = num_classes
    config.dataset.update(
        name=arg.data,
        train_split=train_split,
        val_split=val_split,
        test_split=test_split,
        train_preprocess=f"inception_crop({arg.res}, published=True)|{augment}",
        eval_preprocess=eval_preprocess(arg.res),
    )
    if arg.data == "synthetic":
        config.dataset.update(train_split="train", val_split="validation", test_split="test")
    config.mixup.alpha = mixup
    scale = (config.global_batch_size / PUBLISHED_BATCH) ** 0.5
    config.optimizer.update(peak_lr=peak_lr * scale, weight_decay=weight_decay * scale)
    config.schedule.update(
        decay="linear", warmup_examples=10_000 * PUBLISHED_BATCH, final_multiplier=1e-5
    )
    config.eval_every_examples = 2500 * PUBLISHED_BATCH  # [read: BV]
    if arg.mode == "smoke":
        make_smoke(config, num_classes=num_classes)
    return config


def imagenet1k(arg: str, *, model: str) -> ConfigDict:
    """Returns a config of `pretraining` on ImageNet-1k, with the values of BV's mlp_mixer_i1k.

    Args:
      arg: the arguments of `pretraining`, as text.
      model: the variant, unless `arg` sets another one.
    """
    arg = parse_arg(arg, model=model, res=224, mode="tpu", epochs=300.0, data="imagenet2012")
    return pretraining(
        arg,
        dataset="imagenet2012",
        num_classes=1000,
        train_split="train[:99%]",
        val_split="train[99%:]",
        test_split="validation",
        augment=f"flip_lr|{randaugment(arg.res, 15)}",
        peak_lr=1e-3,
        weight_decay=0.1,
        head_bias_init=-6.9,
        mixup=0.5,
        stoch_depth=0.1,
    )


def imagenet21k(arg: str, *, model: str, magnitude: int, mixup: float) -> ConfigDict:
    """Returns a config of `pretraining` on ImageNet-21k.

    Args:
      arg: the arguments of `pretraining`, as text.
      model: the variant, unless `arg` sets another one.
      magnitude: magnitude of RandAugment.
      mixup: parameter of the Beta distribution.
    """
    arg = parse_arg(arg, model=model, res=224, mode="tpu", epochs=300.0, data="imagenet21k")
    return pretraining(
        arg,
        dataset="imagenet21k",
        num_classes=21843,
        train_split="train[51200:]",
        val_split="train[25600:51200]",
        test_split="train[:25600]",
        augment=f"flip_lr|{randaugment(arg.res, magnitude)}",
        peak_lr=1e-3,
        weight_decay=0.1,
        head_bias_init=-10.0,
        mixup=mixup,
        stoch_depth=0.1,
    )


def jft(arg: str, *, model: str, epochs: float, peak_lr: float) -> ConfigDict:
    """Returns a config of `pretraining` on a folder with a label file, as the paper's on JFT-300M.

    Args:
      arg: the arguments of `pretraining`, as text.
      model: the variant, unless `arg` sets another one.
      epochs: the length of the run, unless `arg` sets another one.
      peak_lr: peak learning rate for batch 4096.
    """
    return pretraining(
        parse_arg(arg, model=model, res=224, mode="tpu", epochs=epochs, data="folder"),
        dataset="folder",
        num_classes=None,
        train_split="train[:99%]",
        val_split="train[99%:]",
        test_split="",
        augment="flip_lr",
        peak_lr=peak_lr,
        weight_decay=0.03,
        head_bias_init=-10.0,
    )

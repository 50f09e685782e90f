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
    # Devices along each axis; -1 is what the others leave (docs/scaling.md). data: each has all
    # parameters; fsdp: each has a share of parameters and optimizer state; both split the batch.
    # tensor: splits the hidden widths of both MLPs.
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    # Whose weights a new run starts from: a run, a step of it (RUN/checkpoints/STEP,
    # RUN/best/STEP), a file (.npz or .safetensors), an address, or a published checkpoint's short
    # name such as B/16-i21k (docs/weights.md); empty starts from random ones.
    config.init_from = ""
    config.init_head = "auto"  # keep (it must fit), reset (zeros), auto (reset if it does not fit)
    # Weights for images of another size: grow (whole factors; the paper's) or interpolate (any
    # size; not the paper's). Growing by K takes K^2 times the model's tokens_mlp_dim.
    config.init_resize = "grow"
    config.init_image_size = config_dict.placeholder(int)  # of those weights; None: as they say

    config.model = dict(
        # S/32 S/16 S/8 B/32 B/16 L/32 L/16 H/14, or None. What is set of the five dimensions below
        # replaces the variant's; with neither, the model is that of init_from.
        variant=config_dict.placeholder(str),
        patch_size=config_dict.placeholder(int),  # P, pixels
        hidden_dim=config_dict.placeholder(int),  # C
        num_blocks=config_dict.placeholder(int),  # L
        tokens_mlp_dim=config_dict.placeholder(int),  # D_S
        channels_mlp_dim=config_dict.placeholder(int),  # D_C
        num_classes=config_dict.placeholder(int),  # None: as many as the data has
        # tanh (the authors' code) or erf (timm); None: that of init_from, tanh without one.
        gelu=config_dict.placeholder(str),
        stoch_depth=0.0,  # drop rate of the last block; falls linearly to 0 at the first
        # Whether a kept branch is divided by its probability: False, the authors' code; True, as
        # timm does, though timm's Mixers have one rate in all blocks, which cannot be set here.
        stoch_depth_rescale=False,
        dropout=0.0,
        head_bias_init=0.0,  # the authors' sigmoid loss: -6.9 with 1,000 classes, -10 with 21,843
        dtype="float32",  # of the computation: float32 or bfloat16; parameters are float32
        # What the backward pass computes again to save memory: none, dots (all but the matmuls'
        # outputs) or full (all but the blocks' inputs).
        remat="none",
        scan_blocks=False,  # the blocks as one loop, compiled once; the parameters are the same
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
        train_preprocess="",  # steps of mixer/data/preprocessing/host.py, joined by |
        eval_preprocess="",
        # patches or pixels: every image's are shuffled by one fixed permutation, the last step of
        # both preprocessings (docs/probes.md); empty: none.
        permutation="",
        exclude="",  # list of images to leave out, made by mixer.tools.prepare check
        # A TFDS set above 2 GiB is shuffled in groups of about this many examples, which stand in
        # memory (two groups at a time); smaller sets and folders are shuffled whole.
        shuffle_group_size=16384,
        prefetch_batches=2,  # batches on their way to the device
        # Small sets: all training images are decoded once, go to the device and stay; order and
        # augmentation are the same (docs/training.md). auto: up to 512 MiB, an eighth of the
        # device's memory, and the images that the run draws; on: must be; off: read each epoch.
        on_device="auto",
        # Where the images of a stream take their random steps: host, device (what it can), or auto:
        # device on GPUs, host elsewhere.
        augment_on="auto",
    )

    # On the device, on the global batch, anew in every step.
    config.mixup = dict(
        alpha=0.0,  # mixup with lambda from Beta(alpha, alpha); 0: none
        per_example=False,  # False: one lambda a step, as the authors have it; True: one an image
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
        # adamw only, of the second moment: float32 or bfloat16 (rounded by chance, not to nearest).
        variance_dtype="float32",
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
    # Evaluated at each validation too: sets and groups of mixer/evaluation/suites.py, such as
    # "imagenet_real,imagenet_v2"; "fewshot" and "linear_probe", the probes on the run's own data.
    config.eval_suite = ""
    config.eval_batch_size = config_dict.placeholder(int)  # None: global_batch_size
    config.checkpoint = dict(
        every_steps=1000,  # and at the last step
        keep_last=2,
        keep_every_steps=config_dict.placeholder(int),  # keeps multiples of it for good
        keep_best=True,  # the best by validation accuracy (of the average, if any), in RUN/best
    )
    config.tensorboard = True
    # A loss or gradient that is not finite: stop, or skip (no update, the step counts).
    config.nan_policy = "stop"
    config.max_skipped_steps = 10  # with skip: more of them stop the run
    # (first, last) step to be profiled, into RUN/profile for xprof and TensorBoard; (): none.
    config.profile_steps = ()
    config.stall_secs = 120  # no step for so long: a line says which process waits for what
    # Where compiled programs are kept for the next start: a directory; auto: RUN/compiled on
    # accelerators, on a CPU the user's cache directory, shared by all runs; empty: nowhere. JAX's
    # own variable JAX_COMPILATION_CACHE_DIR goes before it.
    config.compile_cache_dir = "auto"
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
                f"config argument {key}={value!r}; expected a value of type {kind.__name__}"
            ) from None
    return ConfigDict(values)


MODES = ("tpu", "gpu8", "smoke")
PUBLISHED_BATCH = 4096  # of every pre-training run of the paper


def check_choice(key: str, value, known) -> None:
    """Raises ValueError where the config argument `key` has a value that is not in `known`."""
    if value not in known:
        raise ValueError(
            f"config argument {key}={value!r}; expected one of {', '.join(map(str, known))}"
        )


def check_positive(key: str, value: float) -> None:
    """Raises ValueError where the config argument `key` is not a number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"config argument {key}={value}; expected a finite number above 0")


def eval_preprocess(res: int) -> str:
    """Short side to 8/7 of `res` (256 for 224) by area averaging, then the middle [read: BV]."""
    return f"decode|resize_small({res * 8 // 7}, method='area')|central_crop({res})"


def make_smoke(config: ConfigDict, *, num_classes: int | None) -> None:
    """Cuts a recipe to 8 steps of 16 synthetic images and a model of 2 blocks.

    Widths, loss, mixing, optimizer and the shape of the schedule stay the recipe's.
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
    """The paper's pre-training: what its recipes share, and their arguments.

    Sigmoid loss, Adam (0.9, 0.999) with decoupled weight decay, clipping at global norm 1, warm-up
    over 10,000 steps, linear decay to 1e-5 of the peak, inception crop [read: BV, mlp_mixer_i1k].
    `weight_decay` is multiplied by the learning rate: BV's 1e-4 at a peak of 1e-3, in the form
    "schedule", is 0.1 here in the form "lr".

    The recipes' arguments:
      model: any variant, with the recipe's own values for all the rest.
      res: the images' side in pixels, any that the patch divides.
      mode: how it is run, tpu, gpu8 or smoke.
        tpu: the published batch of 4096, float32 (whose products a TPU computes in bfloat16).
        gpu8: one host with 8 GPUs, batch 1024, bfloat16. Batch b instead of 4096 means peak_lr
          times sqrt(b / 4096) (Adam's rule: Malladi et al., 2022, recalled); warm-up over as many
          images, hence 4096 / b times the steps; weight_decay times sqrt(b / 4096), so that an
          epoch takes as much from a kernel as before. So: 5e-4, 40,000 steps and 0.05 for 1e-3,
          10,000 and 0.1. The rule is not measured, and is not that of big_vision's gpu8
          (batch 512, 60 epochs, learning rate and warm-up as they are). Where memory is short, add
          --config.optimizer.accumulate_steps=2 (or more): the update stays the same.
        smoke: 8 steps of synthetic images with 2 blocks, whatever `data` and `epochs` say: the
          same path through the code on a laptop (B/16: 75 s of CPU time, 2.5 GB).
      epochs: the length; the warm-up stays as long as it is.
      data: the data set: a TFDS name, folder (give --config.dataset.data_dir) or synthetic.

    Args:
      arg: the arguments above, as parsed.
      dataset: the recipe's own data.
      num_classes: of that data; None, and for other `data`: as many as the data has.
      train_split: likewise of that data, as are val_split and test_split.
      val_split: evaluated during training.
      test_split: evaluated at the end.
      augment: steps after the crop.
      peak_lr: of batch 4096.
      weight_decay: of batch 4096.
      head_bias_init: first bias of the head: about -log(classes).
      mixup: Beta's parameter; 0: none.
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
    config.model.update(variant=arg.model, stoch_depth=stoch_depth, head_bias_init=head_bias_init)
    config.model.dtype = "bfloat16" if arg.mode == "gpu8" else "float32"
    if arg.data == dataset:
        config.model.num_classes = num_classes
    config.dataset.update(
        name=arg.data,
        train_split=train_split,
        val_split=val_split,
        test_split=test_split,
        train_preprocess=f"inception_crop({arg.res})|{augment}",
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
    """`pretraining` on ImageNet-1k with the values of BV's mlp_mixer_i1k.

    Args:
      arg: the arguments of `pretraining`, not parsed.
      model: the variant, unless `arg` has another.
    """
    return pretraining(
        parse_arg(arg, model=model, res=224, mode="tpu", epochs=300.0, data="imagenet2012"),
        dataset="imagenet2012",
        num_classes=1000,
        train_split="train[:99%]",
        val_split="train[99%:]",
        test_split="validation",
        augment="flip_lr|randaugment(2, 15)",
        peak_lr=1e-3,
        weight_decay=0.1,
        head_bias_init=-6.9,
        mixup=0.5,
        stoch_depth=0.1,
    )


def imagenet21k(arg: str, *, model: str, magnitude: int, mixup: float) -> ConfigDict:
    """`pretraining` on ImageNet-21k.

    Args:
      arg: the arguments of `pretraining`, not parsed.
      model: the variant, unless `arg` has another.
      magnitude: of RandAugment.
      mixup: Beta's parameter.
    """
    return pretraining(
        parse_arg(arg, model=model, res=224, mode="tpu", epochs=300.0, data="imagenet21k"),
        dataset="imagenet21k",
        num_classes=21843,
        train_split="train[51200:]",
        val_split="train[25600:51200]",
        test_split="train[:25600]",
        augment=f"flip_lr|randaugment(2, {magnitude})",
        peak_lr=1e-3,
        weight_decay=0.1,
        head_bias_init=-10.0,
        mixup=mixup,
        stoch_depth=0.1,
    )


def jft(arg: str, *, model: str, epochs: float, peak_lr: float) -> ConfigDict:
    """`pretraining` on images of a folder with a label file, as the paper's on JFT-300M.

    Args:
      arg: the arguments of `pretraining`, not parsed.
      model: the variant, unless `arg` has another.
      epochs: the length, unless `arg` has another.
      peak_lr: of batch 4096.
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

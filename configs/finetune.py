"""Fine-tuning a Mixer as the authors did: ImageNet, CIFAR, Pets, Flowers, VTAB-1k, own images.

python train.py --config=configs/finetune.py:dataset=cifar10,init=Mixer-B_16.npz
python train.py --config=configs/finetune.py:dataset=vtab/dmlab,split=1000,lr=0.01,init=runs/mine
python train.py --config=configs/finetune.py:dataset=folder,init=FILE \
    --config.dataset.data_dir=/data/pets
python train.py --config=configs/finetune.py:dataset=imagenet2012,res=448,init=L/16-i21k
python train.py --config=configs/finetune.py:dataset=cifar10,mode=smoke    # no data, no weights

Expected on CIFAR-10 at 224 px, lr 0.03: from ImageNet-1k weights B/16 96.72 %, L/16 96.59 %; from
ImageNet-21k weights B/16 96.82 %, L/16 98.34 % [VT's published results, on 9,728 of the 10,000 test
images]. On ImageNet from ImageNet-21k weights: B/16 80.64 %, L/16 82.89 % [paper]. Hardware and
time are not published. None of these has been measured here.

Arguments:
  model=    the variant, such as L/16 or ViT-B/16 (required with weights of a Vision Transformer).
            Default: the Mixer of the weights, or B/16 without weights.
  dataset=  imagenet2012, cifar10, cifar100, oxford_iiit_pet, oxford_flowers102, folder, or
            vtab/TASK with TASK one of caltech101, cifar100, dtd, flowers102, pets, sun397, svhn,
            camelyon, eurosat, resisc45, retinopathy, clevr_count, clevr_distance, dmlab,
            dsprites_location, dsprites_orientation, kitti_distance, smallnorb_azimuth,
            smallnorb_elevation.
  res=      side of the images in pixels, 224 by default. Weights for smaller images are grown to
            this size by an integer factor, as in the paper: for example from 224 to 448
            (docs/weights.md). With --config.init_resize=interpolate any multiple of the patch size
            works; this is not in the paper. The positions of a ViT are always interpolated.
  init=     initial weights: a file (npz, safetensors), a URL, the short name of a published
            checkpoint, a run, or one of its checkpoints. Empty trains from scratch, for which
            these values are not meant. A head with another number of classes starts at zero
            (`init_head`).
  lr=       peak learning rate. The authors chose from 0.003, 0.01, 0.03 and 0.06 on the validation
            split; 0.03 is VT's value for Mixers.
  split=    VTAB only. 800: trains on 800 images and validates on 200 others, to choose lr. 1000:
            trains on all of them, without validation. Both evaluate the whole test split at the
            end.
  mode=     tpu: float32 (a TPU computes its products in bfloat16). gpu8: one host with 8 GPUs,
            bfloat16; batch, learning rate and warm-up are the published ones. smoke: 8 steps of
            synthetic images with 2 blocks.

Values: SGD with momentum 0.9 in bfloat16, batch 512, clipping at global norm 1, no weight decay,
warm-up, cosine decay to 0, softmax loss [read: VT]; splits, steps and warm-up of ImageNet, CIFAR,
Pets and Flowers [read: BV `transfer`]; VTAB's splits and labels [read:
google-research/task_adaptation], its 2,500 steps and warm-up of 200 [paper]. folder: the
splits are chosen by what the folder has (docs/data.md); they and 2,500 steps are our own choice.
Preprocessing: inception crop and flip [read: VT]. For evaluation, CIFAR is resized to res x res
[read: VT]; the others are resized to a short side of 8/7 of res and cropped centrally [read: BV].
VTAB is resized to res x res without augmentation, as its protocol demands [recalled]. TFDS has
newer versions of caltech101, oxford_iiit_pet, dmlab and kitti than the benchmark's code requests,
so their first 1,000 images may differ from the benchmark's.
Data: python -m mixer.tools.prepare tfds NAME
configs/common.py explains the marks in brackets.
"""

from configs import common

# (training split, validation split, test split, steps, warm-up)
SETS = {
    "imagenet2012": ("train[:99%]", "train[99%:]", "validation", 20_000, 500),
    "cifar10": ("train[:98%]", "train[98%:]", "test", 10_000, 500),
    "cifar100": ("train[:98%]", "train[98%:]", "test", 10_000, 500),
    "oxford_iiit_pet": ("train[:90%]", "train[90%:]", "test", 500, 100),
    "oxford_flowers102": ("train[:90%]", "train[90%:]", "test", 500, 100),
    "folder": ("auto", "auto", "auto", 2500, 200),
}
# VTAB-1k's tasks: (TFDS name, label_key, 200 images of the validation split, test split). All of
# them train on train[:800]. If TFDS has no validation split, VTAB's starts after the first 90 % of
# the training split (80 % for Pets and dSprites, 60 % for EuroSAT and Resisc45). SmallNORB's is the
# first half of the test split.
VTAB = {
    "caltech101": ("caltech101", "", "train[2753:2953]", "test"),
    "cifar100": ("cifar100", "", "train[45000:45200]", "test"),
    "dtd": ("dtd", "", "validation[:200]", "test"),
    "flowers102": ("oxford_flowers102", "", "validation[:200]", "test"),
    "pets": ("oxford_iiit_pet", "", "train[2944:3144]", "test"),
    "sun397": ("sun397/tfds", "", "validation[:200]", "test"),
    "svhn": ("svhn_cropped", "", "train[65931:66131]", "test"),
    "camelyon": ("patch_camelyon", "", "validation[:200]", "test"),
    "eurosat": ("eurosat/rgb", "", "train[16200:16400]", "train[80%:]"),
    "resisc45": ("resisc45", "", "train[18900:19100]", "train[80%:]"),
    "retinopathy": (
        "diabetic_retinopathy_detection/btgraham-300",
        "",
        "validation[:200]",
        "test",
    ),
    "clevr_count": ("clevr", "clevr_count", "train[63000:63200]", "validation"),
    "clevr_distance": ("clevr", "clevr_distance", "train[63000:63200]", "validation"),
    "dmlab": ("dmlab", "", "validation[:200]", "test"),
    "dsprites_location": ("dsprites", "dsprites_position", "train[589824:590024]", "train[90%:]"),
    "dsprites_orientation": (
        "dsprites",
        "dsprites_orientation",
        "train[589824:590024]",
        "train[90%:]",
    ),
    "kitti_distance": ("kitti", "kitti_distance", "validation[:200]", "test"),
    "smallnorb_azimuth": ("smallnorb", "smallnorb_azimuth", "test[:200]", "test[50%:]"),
    "smallnorb_elevation": ("smallnorb", "smallnorb_elevation", "test[:200]", "test[50%:]"),
}

# VTAB's groups, in the order of its table. Papers report the mean of each group and of all tasks.
VTAB_GROUPS = {
    "natural": ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn"),
    "specialised": ("camelyon", "eurosat", "resisc45", "retinopathy"),
    "structured": (
        "clevr_count",
        "clevr_distance",
        "dmlab",
        "dsprites_location",
        "dsprites_orientation",
        "kitti_distance",
        "smallnorb_azimuth",
        "smallnorb_elevation",
    ),
}
VTAB_TRAIN_EXAMPLES = 1000  # with split=1000, which VTAB's table uses
# The data sets of "avg. 5" in the paper.
TRANSFER = ("imagenet2012", "cifar10", "cifar100", "oxford_iiit_pet", "oxford_flowers102")


def get_config(arg=""):
    arg = common.parse_arg(
        arg, model="", dataset="cifar10", res=224, init="", lr=0.03, split=800, mode="tpu"
    )
    model = arg.model or ("" if arg.init else "B/16")
    common.check_positive("res", arg.res)
    common.check_choice("dataset", arg.dataset, (*SETS, *(f"vtab/{task}" for task in VTAB)))
    common.check_positive("lr", arg.lr)
    common.check_choice("split", arg.split, (800, 1000))
    common.check_choice("mode", arg.mode, common.MODES)
    vtab = arg.dataset.startswith("vtab/")
    if arg.split == 1000 and not vtab:
        raise ValueError(
            f"config argument split=1000 with dataset={arg.dataset}; expected vtab/TASK"
        )
    if arg.init and arg.mode == "smoke":
        raise ValueError("config argument init=: mode=smoke has 2 blocks and starts from scratch")
    config = common.base()
    if vtab:
        name, label_key, val, test = VTAB[arg.dataset.removeprefix("vtab/")]
        train, steps, warmup = "train[:800]", 2500, 200
        if arg.split == 1000:
            train, val = f"{train}+{val}", ""
        train_steps = eval_steps = f"decode|resize({arg.res})"
    else:
        name, label_key = arg.dataset, ""
        train, val, test, steps, warmup = SETS[name]
        train_steps = f"inception_crop({arg.res})|flip_lr"
        small = name in ("cifar10", "cifar100")
        eval_steps = f"decode|resize({arg.res})" if small else common.eval_preprocess(arg.res)
    config.total_steps = steps
    config.global_batch_size = 512
    config.image_size = arg.res
    config.init_from = arg.init
    if model:
        common.set_model(config, model)
    if config.model.name == "vit":
        config.init_resize = "interpolate"
    config.model.dtype = "bfloat16" if arg.mode == "gpu8" else "float32"
    config.dataset.update(
        name=name,
        label_key=label_key,
        train_split=train,
        val_split=val,
        test_split=test,
        train_preprocess=train_steps,
        eval_preprocess=eval_steps,
    )
    config.optimizer.update(name="sgd", peak_lr=arg.lr, b1=0.9, momentum_dtype="bfloat16")
    config.schedule.update(decay="cosine", warmup_steps=warmup)
    config.eval_every_steps = steps // 10
    if arg.mode == "smoke":
        common.make_smoke(config, num_classes=None)
    return config

"""Compares the recipes with the published hyperparameters and checks their arguments."""

import importlib

import pytest

from configs import finetune
from mixer.runs import data as run_data

# Split sizes in TFDS, and the sizes of VTAB's test splits as the VTAB paper gives them.
SIZES = {
    "caltech101": dict(train=3059, test=6084),
    "cifar10": dict(train=50_000, test=10_000),
    "cifar100": dict(train=50_000, test=10_000),
    "clevr": dict(train=70_000, validation=15_000, test=15_000),
    "diabetic_retinopathy_detection/btgraham-300": dict(
        train=35_126, validation=10_906, test=42_670
    ),
    "dmlab": dict(train=65_550, validation=22_628, test=22_735),
    "dsprites": dict(train=737_280),
    "dtd": dict(train=1880, validation=1880, test=1880),
    "eurosat/rgb": dict(train=27_000),
    "imagenet2012": dict(train=1_281_167, validation=50_000),
    "kitti": dict(train=6347, validation=423, test=711),
    "oxford_flowers102": dict(train=1020, validation=1020, test=6149),
    "oxford_iiit_pet": dict(train=3680, test=3669),
    "patch_camelyon": dict(train=262_144, validation=32_768, test=32_768),
    "resisc45": dict(train=31_500),
    "smallnorb": dict(train=24_300, test=24_300),
    "sun397/tfds": dict(train=76_128, validation=10_875, test=21_750),
    "svhn_cropped": dict(train=73_257, test=26_032),
}
VTAB_TEST_SIZES = {
    "caltech101": 6084,
    "cifar100": 10_000,
    "dtd": 1880,
    "flowers102": 6149,
    "pets": 3669,
    "sun397": 21_750,
    "svhn": 26_032,
    "camelyon": 32_768,
    "eurosat": 5400,
    "resisc45": 6300,
    "retinopathy": 42_670,
    "clevr_count": 15_000,
    "clevr_distance": 15_000,
    "dmlab": 22_735,
    "dsprites_location": 73_728,
    "dsprites_orientation": 73_728,
    "kitti_distance": 711,
    "smallnorb_azimuth": 12_150,
    "smallnorb_elevation": 12_150,
}


def build(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def resolve(config, num_examples):
    """Returns the config with its lengths in steps, and the learning-rate schedule."""
    from mixer.runs import config as run
    from mixer.training import program

    run.resolve_lengths(config, num_examples)
    return config, program.build_optimizer(config)[0]


# From the paper: model, epochs, peak learning rate, weight decay, RandAugment magnitude, mixup
# alpha, stochastic depth and initial bias of the head.
PRETRAINING = {
    "mixer_b16_i1k": ("B/16", 300, 1e-3, 0.1, 15, 0.5, 0.1, -6.9),
    "mixer_l16_i1k": ("L/16", 300, 1e-3, 0.1, 15, 0.5, 0.1, -6.9),
    "mixer_b16_i21k": ("B/16", 300, 1e-3, 0.1, 10, 0.2, 0.1, -10.0),
    "mixer_l16_i21k": ("L/16", 300, 1e-3, 0.1, 20, 0.5, 0.1, -10.0),
    "mixer_s16_jft": ("S/16", 5, 3e-3, 0.03, None, 0.0, 0.0, -10.0),
    "mixer_b16_jft": ("B/16", 7, 3e-3, 0.03, None, 0.0, 0.0, -10.0),
    "mixer_l16_jft": ("L/16", 14, 1e-3, 0.03, None, 0.0, 0.0, -10.0),
    "mixer_h14_jft": ("H/14", 14, 1e-3, 0.03, None, 0.0, 0.0, -10.0),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_recipe_matches_the_paper(name):
    model, epochs, lr, decay, magnitude, mixup, depth, bias = PRETRAINING[name]
    config = build(name)
    augment = f"|randaugment(2, {magnitude}, mode='published')" if magnitude else ""
    crop = "inception_crop(224, published=True)"
    assert config.dataset.train_preprocess == f"{crop}|flip_lr{augment}"
    assert config.dataset.eval_preprocess == (
        "decode|resize_small(256, method='area', published=True)|central_crop(224)"
    )
    actual = config.model
    assert (actual.variant, actual.stoch_depth, actual.head_bias_init) == (model, depth, bias)
    adamw = config.optimizer
    assert (adamw.name, adamw.b1, adamw.b2, adamw.grad_clip_norm) == ("adamw", 0.9, 0.999, 1.0)
    assert (adamw.peak_lr, adamw.weight_decay, adamw.weight_decay_form) == (lr, decay, "lr")
    assert (config.mixup.alpha, config.mixup.per_example) == (mixup, False)
    assert config.mixup.cutmix_prob == 0.0
    assert (config.loss, config.global_batch_size) == ("sigmoid", 4096)
    assert (config.total_epochs, config.label_smoothing, config.model.dropout) == (epochs, 0, 0)


def test_b16_i1k_has_the_published_steps_and_learning_rates():
    config, schedule = resolve(build("mixer_b16_i1k"), round(0.99 * 1_281_167))
    assert (config.total_steps, config.schedule.warmup_steps) == (92_897, 10_000)
    assert config.eval_every_steps == 2500
    for step, lr in ((0, 0.0), (5000, 0.5e-3), (10_000, 1e-3), (92_897, 1e-8)):
        assert float(schedule(step)) == pytest.approx(lr, rel=1e-3, abs=1e-12), step
    assert float(schedule((10_000 + 92_897) // 2)) == pytest.approx(0.5e-3, rel=1e-3)
    # The authors apply a decay of 1e-4 per step at the peak learning rate.
    assert config.optimizer.peak_lr * config.optimizer.weight_decay == pytest.approx(1e-4)


def test_vit_s16_recipe_matches_big_vision():
    config, schedule = resolve(build("vit_s16_i1k"), round(0.99 * 1_281_167))
    assert (config.total_steps, config.schedule.warmup_steps) == (111_477, 10_000)
    assert (config.global_batch_size, config.loss, config.mixup.alpha) == (1024, "softmax", 0.2)
    assert config.dataset.train_preprocess == (
        "inception_crop(224, published=True)|flip_lr|randaugment(2, 10, mode='published')"
    )
    model = config.model
    assert (model.name, model.variant, model.stoch_depth) == ("vit", "S/16", 0.0)
    assert (model.pooling, model.positions, model.pre_logits_layer) == ("gap", "sincos2d", True)
    assert config.optimizer.momentum_dtype == "bfloat16"
    for mode in ("tpu", "gpu8"):
        optimizer = build("vit_s16_i1k", f"mode={mode}").optimizer
        assert (optimizer.peak_lr, optimizer.weight_decay) == (1e-3, 0.1)
    for step, lr in ((10_000, 1e-3), (60_738, 0.5e-3), (111_477, 0.0)):
        assert float(schedule(step)) == pytest.approx(lr, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", [*PRETRAINING, "mixer_b16_sam", "finetune"])
def test_each_recipe_takes_a_vision_transformer(name):
    mixer, vit = build(name, "model=B/16").to_dict(), build(name, "model=ViT-B/16").to_dict()
    assert (vit["model"]["name"], vit["model"]["variant"]) == ("vit", "B/16")
    vit["model"]["name"], vit["init_resize"] = "mixer", mixer["init_resize"]
    assert vit == mixer


@pytest.mark.parametrize("name", PRETRAINING)
def test_gpu8_mode_keeps_warmup_images_and_decay_per_image(name):
    (tpu_config, _), (gpu_config, _) = (
        resolve(build(name, f"mode={mode}"), 10_000_000) for mode in ("tpu", "gpu8")
    )
    assert (gpu_config.global_batch_size, gpu_config.model.dtype) == (1024, "bfloat16")
    assert gpu_config.schedule.warmup_steps == 40_000 == 4 * tpu_config.schedule.warmup_steps
    assert gpu_config.total_steps == pytest.approx(4 * tpu_config.total_steps, abs=4)
    assert gpu_config.optimizer.peak_lr == pytest.approx(tpu_config.optimizer.peak_lr / 2)

    def decay_per_image(config):
        return config.optimizer.peak_lr * config.optimizer.weight_decay / config.global_batch_size

    assert decay_per_image(gpu_config) == pytest.approx(decay_per_image(tpu_config))


def test_record_recipe_scales_its_schedule_with_the_epochs():
    for epochs in (300, 5):
        config, schedule = resolve(build("cifar10", f"recipe=record,epochs={epochs}"), 49_000)
        steps = round(epochs * 49_000 / 128)
        warmup = config.schedule.warmup_steps
        assert config.total_steps == steps and warmup == pytest.approx(steps / 60, abs=1)
        assert float(schedule(warmup)) == pytest.approx(1e-3)
        assert float(schedule(steps)) == pytest.approx(2.34e-6)
    adam = config.optimizer
    assert (adam.b1, adam.b2, adam.weight_decay_form) == (0.9, 0.99, "l2")
    assert (adam.weight_decay, adam.grad_clip_norm, config.label_smoothing) == (5e-5, 0, 0.1)
    assert (config.mixup.cutmix_alpha, config.mixup.cutmix_prob, config.mixup.alpha) == (1, 0.5, 0)
    crop = "random_crop(32, pad=4)"
    assert config.dataset.train_preprocess == f"decode|{crop}|{crop}|autoaugment_cifar"
    assert config.model.gelu == "erf"


@pytest.mark.parametrize("arg", ["", "recipe=record"])
def test_cifar_model_has_the_parameter_count_of_the_record(arg):
    import jax

    from mixer.training import program

    config = build("cifar10", arg)
    config.model.num_classes = 10
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    shapes = jax.eval_shape(program.build_model(config).init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_132_170


def test_small_cifar_models_cost_the_same():
    from mixer.models import flops
    from mixer.training import program

    costs = []
    for name in ("small_mixer", "small_untied", "small_vit"):
        config = build("cifar10", f"model={name}")
        config.model.num_classes = 10
        costs.append(flops.forward_flops(program.build_model(config), (32, 32)) / 1e6)
    assert costs == pytest.approx([30.3] * 3, abs=0.05)


# Fine-tuning.


@pytest.mark.parametrize("dataset", finetune.SETS)
def test_fine_tuning_recipe_matches_the_authors(dataset):
    steps, warmup = {
        "imagenet2012": (20_000, 500),
        "cifar10": (10_000, 500),
        "cifar100": (10_000, 500),
        "oxford_iiit_pet": (500, 100),
        "oxford_flowers102": (500, 100),
        "folder": (2500, 200),
    }[dataset]
    config = build("finetune", f"dataset={dataset},lr=0.01,init=weights.npz")
    assert (config.total_steps, config.schedule.warmup_steps) == (steps, warmup)
    assert (config.schedule.decay, config.schedule.final_multiplier) == ("cosine", 0.0)
    sgd = config.optimizer
    assert (sgd.name, sgd.b1, sgd.momentum_dtype) == ("sgd", 0.9, "bfloat16")
    assert (sgd.peak_lr, sgd.weight_decay, sgd.grad_clip_norm) == (0.01, 0.0, 1.0)
    assert (config.loss, config.global_batch_size) == ("softmax", 512)
    assert (config.init_from, config.init_head) == ("weights.npz", "auto")
    assert build("finetune").optimizer.peak_lr == 0.03


def examples(spec, sizes):
    """Returns the examples of a split specification as (split, number), parsed by TFDS."""
    from mixer.data.sources.stored import absolute

    return {
        (part.splitname, number)
        for part in absolute(spec, sizes)
        for number in range(part.from_ or 0, part.to or sizes[part.splitname])
    }


@pytest.mark.parametrize("dataset", [*finetune.SETS, *(f"vtab/{task}" for task in finetune.VTAB)])
def test_fine_tuning_splits_are_complete_and_disjoint(dataset):
    config = build("finetune", f"dataset={dataset}")
    sizes = SIZES.get(
        config.dataset.name, dict(train=1000, test=100)
    )  # a folder may have splits of any size
    run_data.choose_splits(config, tuple(sizes))
    config = config.dataset
    train, val, test = (
        examples(config[f"{name}_split"], sizes) for name in ("train", "val", "test")
    )
    assert train and val and test
    assert not train & val and not train & test and not val & test
    if dataset.startswith("vtab/"):
        assert (len(train), len(val)) == (800, 200)
        assert len(test) == VTAB_TEST_SIZES[dataset.removeprefix("vtab/")]
        final = build("finetune", f"dataset={dataset},split=1000").dataset
        assert examples(final.train_split, sizes) == train | val
        assert (final.val_split, final.test_split) == ("", config.test_split)


@pytest.mark.parametrize("dataset", [*finetune.SETS, *(f"vtab/{task}" for task in finetune.VTAB)])
def test_fine_tuning_sets_and_labels_exist_in_tfds(dataset, tmp_path):
    import tensorflow_datasets as tfds

    from mixer.data import labels

    config = build("finetune", f"dataset={dataset}").dataset
    if config.name == "folder":
        return
    features = tfds.builder(config.name, data_dir=tmp_path).info.features
    if config.label_key:
        derived_label = labels.DERIVED[config.label_key]
        assert derived_label.dataset == config.name
        assert set(derived_label.features) <= set(features)
    else:
        assert isinstance(features["label"], tfds.features.ClassLabel)
    assert isinstance(features["image"], tfds.features.Image)


def test_vtab_has_19_tasks():
    assert finetune.VTAB.keys() == VTAB_TEST_SIZES.keys() and len(finetune.VTAB) == 19


# Invalid arguments.


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("mixer_b16_i1k", "mode=gpu9", "mode='gpu9'.* tpu, gpu8, smoke"),
        ("mixer_b16_i1k", "res=0", "res=0"),
        ("mixer_b16_i1k", "epochs=0", "epochs=0.0"),
        ("mixer_b16_i1k", "epochs=nan", "epochs=nan"),
        ("mixer_b16_i1k", "epochs=ten", "epochs='ten'.* float"),
        ("mixer_b16_i1k", "size=224", "'size=224'.* model="),
        ("finetune", "dataset=vtab/typo", "dataset='vtab/typo'.*vtab/dtd"),
        ("finetune", "lr=-1", "lr=-1.0"),
        ("finetune", "dataset=vtab/dtd,split=900", "split=900.* 800, 1000"),
        ("finetune", "split=1000", "split=1000.*cifar10.*vtab/"),
        ("finetune", "mode=smoke,init=w.npz", "init=.*mode=smoke"),
        ("cifar10", "recipe=theirs", "recipe='theirs'.* ours, record"),
        ("cifar10", "epochs=0", "epochs=0"),
        ("folder", "patch=0", "patch=0"),
    ],
)
def test_invalid_argument_error_lists_accepted_values(name, arg, message):
    with pytest.raises(ValueError, match=message) as error:
        build(name, arg)
    assert "\n" not in str(error.value)

"""Evaluates weights: prints their report card, and writes it to results.json and results.md.

  python evaluate.py --workdir=runs/digits
  python evaluate.py --workdir=runs/digits --checkpoint=best --split=test --save_predictions
  python evaluate.py --workdir=runs/digits,runs/seed1 --suite=fewshot
  python evaluate.py --weights=Mixer-B_16.npz --suite=imagenet,throughput
  python evaluate.py --weights=B/16-i1k --suite=imagenet_real --data_dir=/data/imagenet/val
  python evaluate.py --weights=pets.npz --config=configs/folder.py --config.dataset.data_dir=pets/
  python evaluate.py --weights=B/16-i21k --suite=vtab --output=runs/b16_vtab
  python evaluate.py --weights=B/16-i21k --suite=omnibenchmark --data_dir=/data/omnibenchmark

A run is evaluated with its own model, data, preprocessing and class names; a file with its own
preprocessing and class names if they are known. docs/evaluation.md describes the suites.
"""

from mixer.cli import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()  # before the imports that take a while

import functools

from absl import flags

from mixer.cli import config as cli
from mixer.cli import launch
from mixer.errors import UserError, check_choice

WORKDIR = flags.DEFINE_list("workdir", [], "Directory of a run, or of several to compare.")
WEIGHTS = flags.DEFINE_list(
    "weights", [], "A file of weights, an address or a short name such as B/16-i1k; or several."
)
SUITE = flags.DEFINE_list(
    "suite",
    [],
    "What to evaluate: imagenet, fewshot, linear_probe, omnibenchmark, throughput, vtab, transfer "
    "or a set such as cifar10; or several. Default: the splits of the run's config, or of "
    "--config.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Which weights of a run: last, best (by validation) or a step's number."
)
SPLIT = flags.DEFINE_enum(
    "split", "all", ["all", "val", "test", "train"], "Which split of the config; all: val and test."
)
PREPROCESS = flags.DEFINE_string(
    "preprocess", None, "Steps such as 'decode|resize(224)', for --weights without known ones."
)
TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "Tasks of vtab or transfer, or realms of omnibenchmark, as in dmlab,svhn. Default: all.",
)
SAVE_PREDICTIONS = flags.DEFINE_bool(
    "save_predictions", False, "Write evaluation/SET.npz too, the prediction for every image."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Directory of the results. Default: the run, or runs/evaluate_WEIGHTS. If there are several "
    "weights: directory of the table that compares them.",
)
VARIANTS = flags.DEFINE_list(
    "variants", [], "Replaced by python -m mixer.tools.benchmark infer --models=S/32,B/16."
)
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", ["1", "8", "64", "512"], "For --suite=throughput: images per device in a batch."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Where the data is, if not where the config says: a folder, TFDS's directory, or a folder of "
    "ImageNet's validation images.",
)
LABEL_FILE = flags.DEFINE_string(
    "label_file", None, "Where the file of labels is now, if it has moved."
)

TUNED = ("vtab", "transfer")  # suites that fine-tune


def main(argv: list[str]) -> None:
    """Evaluates what the flags say."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see python evaluate.py --help")
    workdirs, paths, suite = (list(filter(None, each.value)) for each in (WORKDIR, WEIGHTS, SUITE))
    tuned = [name for name in suite if name in TUNED]
    suite = [name for name in suite if name not in tuned]
    _check_flags(workdirs, paths, suite, tuned)
    batch_sizes = _batch_sizes()
    config = None if cli.CONFIG.value is None or tuned else cli.config()
    launch.join()
    from mixer.evaluation import report
    from mixer.evaluation.subject import open_subject
    from mixer.parallel import processes, watchdog

    if tuned and processes.state().num_processes > 1:
        raise UserError(f"--suite={tuned[0]} fine-tunes on the devices of one host: one process")
    several = len(workdirs) + len(paths) > 1
    options = dict(config=config, output=None if several else OUTPUT.value)
    of_run = dict(checkpoint_name=CHECKPOINT.value, **options)
    of_weights = dict(preprocess=PREPROCESS.value, **options)
    subjects = [functools.partial(open_subject, path, **of_run) for path in workdirs]
    subjects += [functools.partial(open_subject, path, **of_weights) for path in paths]
    if suite or not tuned:
        evaluated = report.Options(
            splits=["val", "test"] if SPLIT.value == "all" else [SPLIT.value],
            suite=suite,
            data_dir=DATA_DIR.value or "",
            label_file=LABEL_FILE.value,
            save_predictions=SAVE_PREDICTIONS.value,
            batch_sizes=batch_sizes,
            realms=TASKS.value,
        )
        with watchdog.watch():
            report.evaluate(subjects, evaluated, output=OUTPUT.value if several else None)
    for name in tuned:
        for opened in subjects:
            _fine_tune(name, opened())


def _check_flags(workdirs: list[str], paths: list[str], suite: list[str], tuned: list[str]) -> None:
    """Raises UserError for flags that are missing, or that would be ignored."""
    if flags.FLAGS["variants"].present:
        raise UserError(
            f"--variants={','.join(VARIANTS.value)}: evaluate.py measures given weights only; "
            f"python -m mixer.tools.benchmark infer --models={','.join(VARIANTS.value)} measures "
            "the paper's models"
        )
    if not workdirs and not paths:
        raise UserError("--workdir or --weights is missing; for example --workdir=runs/digits")
    if twice := [each for each in workdirs + paths if (workdirs + paths).count(each) > 1]:
        raise UserError(f"{twice[0]} is given twice")
    given = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    for name, fits, what in (
        ("checkpoint", bool(workdirs), "--workdir; of --weights give RUN/best or a step's path"),
        ("preprocess", bool(paths) and not tuned, "--weights: a run has its own preprocessing"),
        (
            "tasks",
            len(tuned) + ("omnibenchmark" in suite) == 1,
            "one of --suite=vtab, transfer, omnibenchmark",
        ),
        ("split", not suite and not tuned, "the splits of a config, without --suite"),
        ("batch_sizes", "throughput" in suite, "--suite=throughput"),
        ("save_predictions", not tuned or bool(suite), "what is classified here"),
    ):
        if name in given and not fits:
            raise UserError(f"--{name} is for {what}")
    if cli.CONFIG.value is not None and tuned and suite:
        raise UserError(f"--suite={','.join(suite)} with --config: in another command")


def _batch_sizes() -> list[int]:
    """The numbers of --batch_sizes."""
    text = ",".join(BATCH_SIZES.value)
    try:
        sizes = [int(each) for each in BATCH_SIZES.value]
    except ValueError:
        raise UserError(f"--batch_sizes={text}; expected whole numbers") from None
    if not sizes or not all(1 <= size < 2**31 for size in sizes):
        raise UserError(f"--batch_sizes={text}; expected 1 to {2**31 - 1} images")
    return sizes


def _fine_tune(name: str, subject) -> None:
    """Fine-tunes a subject on every task of `vtab` or `transfer`, and tabulates the accuracies."""
    from configs import finetune
    from mixer import transfer
    from mixer.console import Console
    from mixer.evaluation.results import ReportCard
    from mixer.evaluation.subject import read_weights

    console = Console()
    height, width = subject.card.image_size
    if height != width:
        raise UserError(
            f"{subject.path} is for images of {height} x {width}; training takes squares"
        )
    groups = finetune.VTAB_GROUPS if name == "vtab" else {"avg 5": finetune.TRANSFER}
    known = [task for group in groups.values() for task in group]
    for task in TASKS.value:
        check_choice(f"--suite={name} --tasks", task, known)
    card = ReportCard(subject, read_weights(subject, console.say).identity)
    make_config = cli.config_maker(finetune.__file__)
    tasks = {}
    for task in TASKS.value or known:
        always, unless_given = dict(dataset=task, init="weights"), dict(res=height)
        if name == "vtab":
            always["dataset"], unless_given["split"] = f"vtab/{task}", 1000
        config = make_config(always=always, unless_given=unless_given)
        config.init_from = subject.path
        if DATA_DIR.value:
            config.dataset.data_dir = DATA_DIR.value
        tasks[task] = config
    whole = all(not config.dataset.val_split for config in tasks.values())
    result = transfer.fine_tune(
        tasks,
        subject.output / name,
        groups=groups,
        say=functools.partial(print, flush=True),
        train_examples=finetune.VTAB_TRAIN_EXAMPLES if whole else None,
    )
    card.add("transfer", name, result.summary() | {"markdown": result.markdown()})
    card.print(console)


if __name__ == "__main__":
    launch.run(main)

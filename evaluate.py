"""Evaluates weights, prints a report card and writes it to results.json and results.md.

  python evaluate.py --workdir=runs/digits
  python evaluate.py --workdir=runs/digits --checkpoint=best --split=test --save_predictions
  python evaluate.py --workdir=runs/digits,runs/seed1 --suite=fewshot
  python evaluate.py --weights=Mixer-B_16.npz --suite=imagenet,throughput
  python evaluate.py --weights=B/16-i1k --suite=imagenet_real --data_dir=/data/imagenet/val
  python evaluate.py --weights=pets.npz --config=configs/folder.py --config.dataset.data_dir=pets/
  python evaluate.py --weights=B/16-i21k --suite=vtab --output=runs/b16_vtab
  python evaluate.py --weights=B/16-i21k --suite=omnibenchmark --data_dir=/data/omnibenchmark

A run is evaluated with its own model, data, preprocessing and class names. A file is evaluated with
its own preprocessing and class names if it specifies them. docs/evaluation.md describes the suites.
"""

from mixer.cli import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()  # before the slow imports

import functools

from absl import flags

from mixer.cli import config as cli
from mixer.cli import launch, program
from mixer.errors import UserError, check_choice

WORKDIR = flags.DEFINE_list("workdir", [], "Directory of a run, or of several runs to compare.")
WEIGHTS = flags.DEFINE_list(
    "weights", [], "A file of weights, a URL or a short name such as B/16-i1k; or several."
)
SUITE = flags.DEFINE_list(
    "suite",
    [],
    "What to evaluate: imagenet, fewshot, linear_probe, omnibenchmark, throughput, vtab, transfer "
    "or a data set such as cifar10; or several. Default: the splits of the run's config, or of "
    "--config.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Checkpoint of a run: last, best (by validation) or a step number."
)
SPLIT = flags.DEFINE_enum(
    "split", "all", ["all", "val", "test", "train"], "Split of the config; all: val and test."
)
PREPROCESS = flags.DEFINE_string(
    "preprocess",
    None,
    "Preprocessing such as 'decode|resize(224)', for --weights that do not specify it.",
)
TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "Tasks of vtab or transfer, or realms of omnibenchmark, as in dmlab,svhn. Default: all.",
)
SAVE_PREDICTIONS = flags.DEFINE_bool(
    "save_predictions", False, "Also write evaluation/SET.npz, the prediction for every image."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Directory of the results. Default: the run, or runs/evaluate_WEIGHTS. With several weights: "
    "directory of the table that compares them.",
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
    "Data directory that replaces the config's: a folder, the directory of TFDS, or a folder of "
    "ImageNet's validation images.",
)
LABEL_FILE = flags.DEFINE_string(
    "label_file", None, "File of labels that replaces the config's, for example if it has moved."
)

TRANSFERS = ("vtab", "transfer")  # suites of tasks to fine-tune the weights on


def main(argv: list[str]) -> None:
    """Evaluates the weights in the flags."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see python evaluate.py --help")
    workdirs, paths, suite = (list(filter(None, flag.value)) for flag in (WORKDIR, WEIGHTS, SUITE))
    transfers = [name for name in suite if name in TRANSFERS]
    suite = [name for name in suite if name not in transfers]
    _check_flags(workdirs, paths, suite, transfers)
    batch_sizes = program.numbers("batch_sizes", BATCH_SIZES.value, least=1)
    config = None if cli.CONFIG.value is None or transfers else cli.config()
    launch.join()
    from mixer.evaluation import report
    from mixer.evaluation.subject import open_subject
    from mixer.parallel import processes, watchdog

    if transfers and processes.state().num_processes > 1:
        raise UserError(
            f"--suite={transfers[0]} runs on one host; expected one process, not "
            f"{processes.state().num_processes}"
        )
    is_comparison = len(workdirs) + len(paths) > 1
    options = dict(config=config, output=None if is_comparison else OUTPUT.value)
    run_options = dict(checkpoint_name=CHECKPOINT.value, **options)
    weights_options = dict(preprocess=PREPROCESS.value, **options)
    subjects = [functools.partial(open_subject, path, **run_options) for path in workdirs]
    subjects += [functools.partial(open_subject, path, **weights_options) for path in paths]
    if suite or not transfers:
        report_options = report.Options(
            splits=["val", "test"] if SPLIT.value == "all" else [SPLIT.value],
            suite=suite,
            data_dir=DATA_DIR.value or "",
            label_file=LABEL_FILE.value,
            save_predictions=SAVE_PREDICTIONS.value,
            batch_sizes=batch_sizes,
            realms=TASKS.value,
        )
        with watchdog.watch():
            output = OUTPUT.value if is_comparison else None
            report.evaluate(subjects, report_options, output=output)
    for name in transfers:
        for make_subject in subjects:
            _fine_tune(name, make_subject())


def _check_flags(
    workdirs: list[str], paths: list[str], suite: list[str], transfers: list[str]
) -> None:
    """Raises UserError for flags that are missing or would be ignored."""
    if flags.FLAGS["variants"].present:
        raise UserError(
            f"--variants={','.join(VARIANTS.value)}: evaluate.py does not measure models without "
            "weights; run python -m mixer.tools.benchmark infer "
            f"--models={','.join(VARIANTS.value)}"
        )
    if not workdirs and not paths:
        raise UserError("--workdir and --weights are missing; expected one, as in --workdir=RUN")
    names = workdirs + paths
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{duplicates[0]} is given twice; expected different weights")
    given_flags = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    for name, is_valid, purpose in (
        (
            "checkpoint",
            bool(workdirs),
            "--workdir; with --weights, pass RUN/best or the path of a step",
        ),
        ("preprocess", bool(paths) and not transfers, "--weights; a run has its own preprocessing"),
        (
            "tasks",
            len(transfers) + ("omnibenchmark" in suite) == 1,
            "one of --suite=vtab, transfer, omnibenchmark",
        ),
        ("split", not suite and not transfers, "the splits of a config, without --suite"),
        ("batch_sizes", "throughput" in suite, "--suite=throughput"),
        ("save_predictions", not transfers or bool(suite), "suites that do not fine-tune"),
    ):
        if name in given_flags and not is_valid:
            raise UserError(f"--{name} is only valid for {purpose}")
    if cli.CONFIG.value is not None and transfers and suite:
        raise UserError(
            f"--suite={transfers[0]} cannot be combined with --config and "
            f"--suite={','.join(suite)}; run two commands"
        )


def _fine_tune(name: str, subject) -> None:
    """Fine-tunes a subject on every task of `vtab` or `transfer`; prints a table of accuracies."""
    from configs import finetune
    from mixer import transfer
    from mixer.console import Console
    from mixer.evaluation.results import ReportCard
    from mixer.evaluation.subject import read_weights
    from mixer.models.registry import ARCHITECTURES

    console = Console()
    height, width = subject.card.image_size
    if height != width:
        raise UserError(f"{subject.path} takes {height} x {width} images; expected square images")
    groups = finetune.VTAB_GROUPS if name == "vtab" else {"avg 5": finetune.TRANSFER}
    all_tasks = [task for group in groups.values() for task in group]
    for task in TASKS.value:
        check_choice(f"--suite={name} --tasks", task, all_tasks)
    card = ReportCard(subject, read_weights(subject, console.say).identity)
    make_config = cli.config_maker(finetune.__file__)
    tasks = {}
    for task in TASKS.value or all_tasks:
        always, unless_given = dict(dataset=task, init="weights"), dict(res=height)
        if name == "vtab":
            always["dataset"], unless_given["split"] = f"vtab/{task}", 1000
        config = make_config(always=always, unless_given=unless_given)
        config.init_from = subject.path
        config.model.name = subject.card.architecture
        architecture = ARCHITECTURES[subject.card.architecture]
        if config.init_resize not in architecture.resize:
            config.init_resize = architecture.default_resize
        if DATA_DIR.value:
            config.dataset.data_dir = DATA_DIR.value
        tasks[task] = config
    trains_on_all = all(not config.dataset.val_split for config in tasks.values())
    result = transfer.fine_tune(
        tasks,
        subject.output / name,
        groups=groups,
        say=functools.partial(print, flush=True),
        train_examples=finetune.VTAB_TRAIN_EXAMPLES if trains_on_all else None,
    )
    card.add("transfer", name, result.summary() | {"markdown": result.markdown()})
    card.print(console)


if __name__ == "__main__":
    launch.run(main)

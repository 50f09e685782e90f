"""The report card of weights: tables here, results.json and results.md where they are kept.

  python evaluate.py --workdir=runs/digits
  python evaluate.py --workdir=runs/digits --checkpoint=best --split=test --save_predictions
  python evaluate.py --workdir=runs/digits,runs/seed1 --suite=fewshot
  python evaluate.py --weights=Mixer-B_16.npz --suite=imagenet,throughput
  python evaluate.py --weights=B/16-i1k --suite=imagenet_real --data_dir=/data/imagenet/val
  python evaluate.py --weights=pets.npz --config=configs/folder.py --config.dataset.data_dir=pets/
  python evaluate.py --weights=B/16-i21k --suite=vtab --output=runs/b16_vtab
  python evaluate.py --weights=B/16-i21k --suite=omnibenchmark --data_dir=/data/omnibenchmark

Of a run, the model, the data, the preprocessing and the class names are its own; a file has
preprocessing and names where they are known. docs/evaluation.md has the suites.
"""

from mixer.cli import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()  # before the imports that take a while

import dataclasses
import functools

from absl import flags

from mixer.cli import config as cli
from mixer.cli import launch
from mixer.errors import nearest

WORKDIR = flags.DEFINE_list("workdir", [], "Directory of a run; several are set side by side.")
WEIGHTS = flags.DEFINE_list(
    "weights", [], "A file of weights, an address or a short name such as B/16-i1k; or several."
)
SUITE = flags.DEFINE_list(
    "suite",
    [],
    "What to evaluate: imagenet, fewshot, linear_probe, omnibenchmark, throughput, vtab, transfer "
    "or a set such as cifar10; or several. Not given: the splits of the run's config, or of "
    "--config.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Which weights of a run: last, best (by validation) or a step's number."
)
SPLIT = flags.DEFINE_enum(
    "split", "all", ["all", "val", "test", "train"], "Which split of the config; all: val and test."
)
PREPROCESS = flags.DEFINE_string(
    "preprocess", None, "Steps such as 'decode|resize(224)', for --weights that do not say theirs."
)
TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "Of vtab, transfer or omnibenchmark, those tasks or realms only, as in dmlab,svhn.",
)
SAVE_PREDICTIONS = flags.DEFINE_bool(
    "save_predictions", False, "Write evaluation/SET.npz too: what was said of every image."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Directory of the results; not given: the run, or runs/evaluate_WEIGHTS. Of several weights it "
    "takes the table that sets them side by side.",
)
VARIANTS = flags.DEFINE_list(
    "variants", [], "With --suite=throughput, models of random weights, as in S/32,B/16."
)
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", ["1", "8", "64", "512"], "Of --suite=throughput: images at once on a device."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Where the data is, if not where the config says: a folder, TFDS's directory, a folder of "
    "ImageNet's validation images, or the folder of OmniBenchmark's realms.",
)
LABEL_FILE = flags.DEFINE_string(
    "label_file", None, "Where its file of labels is now, if that has moved."
)


def main(argv: list[str]) -> None:
    """Evaluates what the flags say."""
    if len(argv) > 1:
        raise cli.UserError(f"unexpected argument {argv[1]!r}; see python evaluate.py --help")
    workdirs, paths, suite = (list(filter(None, each.value)) for each in (WORKDIR, WEIGHTS, SUITE))
    tuned = [name for name in suite if name in ("vtab", "transfer")]
    suite = [name for name in suite if name not in tuned]
    _check_flags(workdirs, paths, suite, tuned)
    try:
        batch_sizes = [int(each) for each in BATCH_SIZES.value]
    except ValueError:
        raise cli.UserError(f"--batch_sizes={','.join(BATCH_SIZES.value)}: whole numbers") from None
    if not batch_sizes or not all(1 <= size < 2**31 for size in batch_sizes):
        raise cli.UserError(f"--batch_sizes={','.join(BATCH_SIZES.value)}: 1 to {2**31 - 1} images")
    config = None
    if cli.CONFIG.value is not None and tuned and suite:
        raise cli.UserError(f"--suite={','.join(suite)} with --config: in another command")
    if cli.CONFIG.value is not None and not tuned:
        config = cli.config()
    launch.join()
    from mixer.evaluation import report
    from mixer.parallel import processes as distributed

    if tuned and distributed.state().num_processes > 1:
        raise cli.UserError(
            f"--suite={tuned[0]} fine-tunes on the devices of one host: one process"
        )
    if VARIANTS.value:
        with distributed.watch():
            report.measure_variants(
                VARIANTS.value,
                batch_sizes=batch_sizes,
                image_size=224,
                output=OUTPUT.value or "runs/throughput",
            )
        return
    several = len(workdirs) + len(paths) > 1
    output = None if several else OUTPUT.value

    def of_run(workdir: str):
        return lambda: report.open_run(
            workdir,
            checkpoint_name=CHECKPOINT.value,
            config=config,
            output=output,
        )

    def of_file(path: str):
        return lambda: report.open_weights(
            path, config=config, preprocess=PREPROCESS.value, output=output
        )

    subjects = [of_run(path) for path in workdirs] + [of_file(path) for path in paths]
    if suite or not tuned:
        with distributed.watch():
            report.evaluate(
                subjects,
                splits=["val", "test"] if SPLIT.value == "all" else [SPLIT.value],
                suite=suite,
                data_dir=DATA_DIR.value or "",
                label_file=LABEL_FILE.value,
                save_predictions=SAVE_PREDICTIONS.value,
                batch_sizes=batch_sizes,
                realms=TASKS.value,
                output=OUTPUT.value if several else None,
            )
    for name in tuned:
        for open_subject in subjects:
            _fine_tune(name, open_subject)


def _check_flags(workdirs: list[str], paths: list[str], suite: list[str], tuned: list[str]) -> None:
    """Raises UserError for flags that are missing, or that would be passed over."""
    if VARIANTS.value:
        if suite != ["throughput"] or tuned or workdirs or paths:
            raise cli.UserError("--variants is for --suite=throughput without weights")
        return
    if not workdirs and not paths:
        raise cli.UserError("--workdir or --weights is missing; for example --workdir=runs/digits")
    if twice := [each for each in workdirs + paths if (workdirs + paths).count(each) > 1]:
        raise cli.UserError(f"{twice[0]} is given twice")
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
            raise cli.UserError(f"--{name} is for {what}")


def _fine_tune(name: str, open_subject) -> None:
    """Fine-tunes on every task of `vtab` or `transfer`, and tabulates."""
    from configs import finetune
    from mixer import transfer
    from mixer.evaluation import report
    from mixer.weights import checkpoint

    subject, _ = open_subject()
    subject = dataclasses.replace(subject, params={})  # the runs read the weights themselves
    init = subject.path
    if subject.step is not None:
        init = str(checkpoint.find_named(subject.name, CHECKPOINT.value))
    height, width = subject.image_size
    if height != width:
        raise cli.UserError(f"{init} is for images of {height} x {width}; training takes squares")
    groups = finetune.VTAB_GROUPS if name == "vtab" else {"avg 5": finetune.TRANSFER}
    known = [task for group in groups.values() for task in group]
    if unknown := [task for task in TASKS.value if task not in known]:
        raise cli.UserError(
            f"--tasks={unknown[0]}: {name} has {', '.join(known)}.{nearest(unknown[0], known)}"
        )
    make = cli.config_maker(finetune.__file__)
    tasks = {}
    for task in TASKS.value or known:
        always, unless_given = dict(dataset=task, init="weights"), dict(res=height)
        if name == "vtab":
            always["dataset"], unless_given["split"] = f"vtab/{task}", 1000
        config = make(always=always, unless_given=unless_given)
        config.init_from = init
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
    report.add_transfer(subject, name, result)


if __name__ == "__main__":
    launch.run(main)

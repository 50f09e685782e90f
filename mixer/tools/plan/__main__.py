"""Plans a run on accelerators that need not be available: estimates memory, speed and cost.

  python -m mixer.tools.plan --config=configs/mixer_b16_i1k.py --topology=v5e:16x16
  python -m mixer.tools.plan --config=configs/mixer_h14_jft.py --topology=v3:8x8 --search \
      --num_examples=300000000 --num_classes=18291 --json=plan.json
  python -m mixer.tools.plan --config=configs/mixer_b16_i1k.py:mode=gpu8 --topology=gpu:8xH100

Topologies: v3, v4, v5e, v5p, v6e and tpu7x with their shape in chips, for which the tool compiles
the run's own update (pip install -e '.[plan]'); gpu:COUNTxTYPE (A100, H100, H200, B200), which it
estimates by arithmetic. The tool needs neither data nor an accelerator. docs/plan.md explains every
line.
"""

import os

# This process only compiles; the TPU compiler must not search for a TPU or query a server.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

from absl import flags

from mixer.cli import config as cli
from mixer.errors import UserError

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Topology, such as v5e:16x16, v3:8x8 or gpu:8xH100."
)
UTILIZATION = flags.DEFINE_float(
    "utilization", 0.5, "Expected utilization of the peak matmul rate, 0 to 1."
)
SEARCH = flags.DEFINE_bool(
    "search", False, "Search meshes, rematerialisation and accumulation, and rank the settings."
)
NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples", None, "Size of the training split, for an unknown data set.", 1, 10**15
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", None, "Number of classes, for an unknown data set.", 1, 2**31 - 1
)
JSON = flags.DEFINE_string("json", None, "JSON file for all figures.")


def main(argv: list[str]) -> None:
    """Prints the plan for the config and the topology in the flags."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see python -m mixer.tools.plan --help")
    config = cli.config()
    if TOPOLOGY.value is None:
        raise UserError(
            "--topology is missing; expected a topology such as v5e:16x16 or gpu:8xH100"
        )

    from mixer import files
    from mixer.console import Console
    from mixer.runs import config as run
    from mixer.tools.plan import report, search, update
    from mixer.tools.plan.subject import open_subject

    if JSON.value:
        files.check_output("--json", JSON.value)
    say = Console().say
    subject = open_subject(
        config,
        TOPOLOGY.value,
        utilization=UTILIZATION.value,
        num_examples=NUM_EXAMPLES.value,
        num_classes=NUM_CLASSES.value,
    )
    if SEARCH.value:
        steps = search.search(subject, say)
        rows = search.ranking(subject, steps)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            say("  ".join(map(str.ljust, row, widths)).rstrip())
        say("")
    else:
        steps = [update.make_step(subject, update.own_settings(subject))]
    for label, text in report.report(subject, steps[0]):
        say(f"{label:19}  {text}")
    if SEARCH.value:
        say(f"{'command line':19}  {steps[0].settings.overrides}")
    if JSON.value:
        plan = report.summary(subject, steps[0])
        if SEARCH.value:
            plan["search"] = [report.summary(subject, step) for step in steps]
        run.write_json(JSON.value, plan)
        say(f"written to {JSON.value}")


if __name__ == "__main__":
    cli.run(main)

"""Searches for settings of a run that fit into memory, and ranks them by speed."""

import dataclasses
import itertools
import time
from collections.abc import Callable

from mixer.errors import UserError
from mixer.models.modules import REMAT
from mixer.tools.plan import chips, update
from mixer.tools.plan.subject import Subject
from mixer.tools.plan.update import Step

COMPILES = 4  # maximum number of compilations per search
TABLE_ROWS = 12


def candidates(subject: Subject) -> list[Step]:
    """Estimates all settings worth considering.

    Steps that are expected to fit come first, the fastest at the top.

    The candidates are meshes of powers of two that divide batch and widths, with "tensor" at most
    8; every rematerialisation policy; and, if nothing else fits, up to 16 parts of a batch.

    Raises:
      UserError: no mesh of the topology divides the batch.
    """
    config_settings, count = update.own_settings(subject), subject.topology.num_devices
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    batch_size, steps = subject.config.global_batch_size, []
    for parts in (2**n for n in range(5) if batch_size % 2**n == 0):
        for tensor, fsdp in itertools.product([p for p in powers if p <= 8], powers):
            if count % (tensor * fsdp):
                continue
            for remat in REMAT:
                settings = dataclasses.replace(
                    config_settings,
                    data=count // (tensor * fsdp),
                    fsdp=fsdp,
                    tensor=tensor,
                    remat=remat,
                    accumulate_steps=parts,
                )
                try:
                    steps.append(update.estimate_step(subject, settings))
                except UserError:  # an axis does not divide the batch or a width
                    break
        if any(step.fits for step in steps):
            break
    if not steps:
        raise UserError(
            f"global_batch_size={batch_size}: no mesh of {count} devices divides it; choose "
            "another number of devices or another batch size"
        )
    return sorted(steps, key=_rank)


def _rank(step: Step) -> tuple:
    """Returns the sort key: steps that fit first, then by time, then by simplicity of the mesh."""
    settings = step.settings
    return (
        not step.fits,
        round(step.seconds, 5) if step.fits else step.memory,
        settings.tensor,
        settings.fsdp,
        list(REMAT).index(settings.remat),
    )


def search(subject: Subject, say: Callable[[str], None]) -> list[Step]:
    """Ranks settings: those that fit first, and the fastest at the top.

    For TPUs, at most `COMPILES` of the most promising settings are compiled: the best estimate of
    each rematerialisation policy, then the next best. Each compiled program corrects the estimate
    of the memory.

    Args:
      subject: the subject of the plan.
      say: prints a line about each compilation, with the time left.
    """
    estimates = candidates(subject)
    if subject.topology.is_gpu:
        return estimates
    say(f"{len(estimates)} settings estimated; at most {COMPILES} are compiled")
    compiled: list[Step] = []
    ratio = 1.0  # compiled memory divided by estimated memory
    limit = subject.topology.chip.memory
    start_time = time.perf_counter()
    pending = list(estimates)
    while pending and len(compiled) < COMPILES:
        steps_that_fit = [s for s in pending if s.memory * ratio <= limit] or pending[:1]
        compiled_policies = {step.settings.remat for step in compiled}
        best = next(
            (s for s in steps_that_fit if s.settings.remat not in compiled_policies),
            steps_that_fit[0],
        )
        pending.remove(best)
        step = update.compile_step(subject, best.settings)
        ratio = step.memory / best.memory
        compiled.append(step)
        mean_secs = (time.perf_counter() - start_time) / len(compiled)
        verdict = f"{step.seconds * 1e3:.1f} ms" if step.fits else "does not fit"
        say(
            f"compiled {len(compiled)} of {COMPILES}: {step.settings}: "
            f"{step.memory / chips.GIB:.1f} GiB, {verdict}; {mean_secs:.0f} s each, "
            f"{mean_secs * (COMPILES - len(compiled)):.0f} s left"
        )
    return [*sorted(compiled, key=_rank), *pending]


def advice(subject: Subject, step: Step) -> str:
    """Returns advice for a step that does not fit: the fastest settings estimated to fit."""
    ratio = step.memory / update.estimate_step(subject, step.settings).memory
    mesh = (step.settings.data, step.settings.fsdp, step.settings.tensor)
    dtype_advice = ""
    if subject.topology.is_gpu and subject.model.dtype == "float32":
        dtype_advice = "--config.model.dtype=bfloat16 halves activations and time; or "
    # Prefer settings with the requested mesh over settings with another mesh.
    for candidate in sorted(
        candidates(subject),
        key=lambda s: (s.settings.data, s.settings.fsdp, s.settings.tensor) != mesh,
    ):
        memory = candidate.memory * ratio
        if memory <= subject.topology.chip.memory and candidate.settings != step.settings:
            return (
                f"{dtype_advice}use {candidate.settings.overrides} "
                f"(estimated: {memory / chips.GIB:.1f} GiB, should fit)"
            )
    return (
        "by the estimates, no mesh, rematerialisation policy or accumulation makes it fit; "
        "use more devices"
    )


def ranking(subject: Subject, steps: list[Step]) -> list[tuple[str, ...]]:
    """Returns the rows of the search's table: the header, then at most `TABLE_ROWS` rows."""
    return [
        ("settings", "figures", "GiB", "fits", "ms per step", "images/s", "limit"),
        *(
            (
                str(step.settings),
                "compiled" if step.compiled else "estimated",
                f"{step.memory / chips.GIB:.2f}",
                "yes" if step.fits else "no",
                f"{step.seconds * 1e3:,.1f}" if step.fits else "",
                f"{subject.config.global_batch_size / step.seconds:,.0f}" if step.fits else "",
                step.limit if step.fits else "",
            )
            for step in steps[:TABLE_ROWS]
        ),
    ]

"""Other settings of the same run: which fit, and how fast they are."""

import dataclasses
import itertools
import time
from collections.abc import Callable

from mixer.errors import UserError
from mixer.models.modules import REMAT
from mixer.tools.plan import chips, update
from mixer.tools.plan.subject import Subject
from mixer.tools.plan.update import Step

COMPILES = 4  # of a search
TABLE_ROWS = 12


def candidates(subject: Subject) -> list[Step]:
    """Estimates of all settings worth considering, the fastest that should fit first.

    Meshes of powers of two that divide batch and widths, with "tensor" at most 8; every policy of
    rematerialisation; up to 16 parts of a batch where nothing else fits.

    Raises:
      UserError: no mesh of the topology divides the batch.
    """
    own, count = update.own_settings(subject), subject.topology.num_devices
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    steps = []
    for parts in (2**n for n in range(5)):
        for tensor, fsdp in itertools.product([p for p in powers if p <= 8], powers):
            if count % (tensor * fsdp):
                continue
            for remat in REMAT:
                settings = dataclasses.replace(
                    own,
                    data=count // (tensor * fsdp),
                    fsdp=fsdp,
                    tensor=tensor,
                    remat=remat,
                    accumulate_steps=parts,
                )
                try:
                    steps.append(update.estimate_step(subject, settings))
                except UserError:  # an axis does not divide
                    break
        if any(step.fits for step in steps):
            break
    if not steps:
        raise UserError(
            f"global_batch_size={subject.config.global_batch_size}: no mesh of {count} devices "
            "divides it; take another number of devices, or another batch"
        )
    return sorted(steps, key=_rank)


def _rank(step: Step) -> tuple:
    """Fitting first, then by time; of equals the simplest mesh."""
    settings = step.settings
    return (
        not step.fits,
        round(step.seconds, 5) if step.fits else step.memory,
        settings.tensor,
        settings.fsdp,
        list(REMAT).index(settings.remat),
    )


def search(subject: Subject, say: Callable[[str], None]) -> list[Step]:
    """Ranks settings: those that fit first, the fastest at the top.

    For TPUs the most promising are compiled, at most `COMPILES`: the best estimate of each policy
    of rematerialisation, then the next best. Each compiled program corrects the estimated memory.

    Args:
      subject: what is planned.
      say: shows a line on each compilation, with the time left.
    """
    estimated = candidates(subject)
    if subject.topology.is_gpu:
        return estimated
    say(f"{len(estimated)} settings estimated; at most {COMPILES} are compiled")
    done: list[Step] = []
    ratio = 1.0  # compiled memory by estimated
    limit = subject.topology.chip.memory
    started = time.perf_counter()
    waiting = list(estimated)
    while waiting and len(done) < COMPILES:
        fitting = [s for s in waiting if s.memory * ratio <= limit] or waiting[:1]
        tried = {step.settings.remat for step in done}
        best = next((s for s in fitting if s.settings.remat not in tried), fitting[0])
        waiting.remove(best)
        step = update.compile_step(subject, best.settings)
        ratio = step.memory / best.memory
        done.append(step)
        mean_secs = (time.perf_counter() - started) / len(done)
        verdict = f"{step.seconds * 1e3:.1f} ms" if step.fits else "does not fit"
        say(
            f"compiled {len(done)} of {COMPILES}: {step.settings}: {step.memory / chips.GIB:.1f} "
            f"GiB, {verdict}; {mean_secs:.0f} s each, "
            f"{mean_secs * (COMPILES - len(done)):.0f} s left"
        )
    return [*sorted(done, key=_rank), *waiting]


def advice(subject: Subject, step: Step) -> str:
    """What to change where a step does not fit: by estimate, the fastest settings that fit."""
    ratio = step.memory / update.estimate_step(subject, step.settings).memory
    own = (step.settings.data, step.settings.fsdp, step.settings.tensor)
    narrower = ""
    if subject.topology.is_gpu and subject.model.dtype == "float32":
        narrower = "--config.model.dtype=bfloat16 halves activations and time; or "
    # The mesh that was asked for, with less in memory, before another one.
    for other in sorted(
        candidates(subject),
        key=lambda s: (s.settings.data, s.settings.fsdp, s.settings.tensor) != own,
    ):
        if other.memory * ratio <= subject.topology.chip.memory and other.settings != step.settings:
            return (
                f"{narrower}should fit, at {other.memory * ratio / chips.GIB:.1f} GiB (estimated): "
                f"{other.settings.overrides}"
            )
    return "no mesh, rematerialisation or accumulation should make it fit: take more devices"


def ranking(subject: Subject, steps: list[Step]) -> list[tuple[str, ...]]:
    """Rows of a search's table, its head first, at most `TABLE_ROWS` of them."""
    return [
        ("settings", "figures", "GiB", "fits", "ms a step", "images/s", "limit"),
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

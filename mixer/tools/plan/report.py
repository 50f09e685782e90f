"""A plan's figures: for JSON, and as lines for people."""

import dataclasses
from typing import Any

from mixer.data.preprocessing import device as augment
from mixer.formatting import duration, short
from mixer.models.flops import forward_flops
from mixer.parallel import sharding
from mixer.tools.plan import chips
from mixer.tools.plan.host import PROCESS_BYTES, can_augment_on_device, input_figures
from mixer.tools.plan.search import advice
from mixer.tools.plan.subject import Subject, peak, train_flops
from mixer.tools.plan.update import Step

WRITE_RATE = 200e6  # bytes/s, assumed, of one host to a bucket


def summary(subject: Subject, step: Step) -> dict[str, Any]:
    """Every figure of a plan, as JSON has it: seconds, bytes, FLOPs and images."""
    config, topology, chip = subject.config, subject.topology, subject.topology.chip
    batch, devices = config.global_batch_size, topology.num_devices
    per_image = train_flops(subject)
    rate = batch / step.seconds
    forward = forward_flops(subject.model, subject.image_size)
    evaluation = subject.eval_examples * forward / (devices * peak(subject) * subject.utilization)
    seconds = config.total_steps * step.seconds + evaluation
    checkpoint = sharding.bytes_per_device(subject.state)
    hosts, dataset = topology.num_hosts, config.dataset
    pixels = 3 * config.image_size**2
    per_host = rate / hosts
    shuffled = 2 * dataset.shuffle_group_size * subject.image_bytes
    if subject.num_examples is not None:
        shuffled = min(shuffled, subject.num_examples * subject.image_bytes)
    on_host = {
        "process": PROCESS_BYTES,
        "shuffling": shuffled,
        "batches": (dataset.prefetch_batches + 2) * batch / hosts * pixels,
        "checkpoint": float(checkpoint),
    }
    return {
        "topology": dataclasses.asdict(topology) | {"num_hosts": hosts},
        "compiled": step.compiled,
        "utilization": subject.utilization,
        "parameters": subject.num_params,
        "run": {
            "steps": config.total_steps,
            "global_batch_size": batch,
            "images": config.total_steps * batch,
            "examples": subject.num_examples,
            "epochs": config.total_steps * batch / subject.num_examples
            if subject.num_examples
            else None,
        },
        "settings": dataclasses.asdict(step.settings),
        "overrides": step.settings.overrides,
        "fits": step.fits,
        "memory": {
            "needed": step.memory,
            "of_chip": chip.memory,
            "parts": step.memory_parts,
        },
        "compile_seconds": step.compile_seconds,
        "per_image": {"forward_flops": forward, "train_flops": per_image},
        "step": {
            "model_flops": per_image * batch / devices,
            "executed_flops": step.flops,
            "bytes": step.bytes,
            "collectives": {
                kind: dataclasses.asdict(traffic) for kind, traffic in step.collectives.items()
            },
            "sent": step.sent,
            "floors": step.floors,
            "compilers_schedule": step.schedule,
            "seconds": step.seconds,
            "limit": step.limit,
            "model_flops_utilization": per_image * batch / devices / peak(subject) / step.seconds,
        },
        "images_per_second": rate,
        "images_per_second_per_device": rate / devices,
        "evaluation_seconds": evaluation,
        "hours": seconds / 3600,
        "device_hours": seconds / 3600 * devices,
        "checkpoint": {
            "bytes": checkpoint,
            "write_seconds": checkpoint / WRITE_RATE,
            "kept_bytes": checkpoint
            * (config.checkpoint.keep_last + bool(config.checkpoint.keep_best)),
            "every_seconds": config.checkpoint.every_steps * step.seconds,
        },
        "host": {
            "memory": on_host,
            "memory_needed": sum(on_host.values()),
            "memory_there": chip.host_memory,
            "images_per_second": per_host,
            "read_bytes_per_second": per_host * subject.image_bytes,
            "send_bytes_per_second": per_host * pixels,
            "input": input_figures(subject, per_host),
        },
    }


def _input_rows(subject: Subject, plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines that say whether the input suffices, and what could be done where it does not."""
    prepared = plan["host"]["input"]
    if prepared["stays_on_device"]:
        return [("input suffices", "yes: the images are read once and stay on the devices")]
    rate = f"{prepared['core_rate']:,} images/s a core"
    figures = (
        f"about {prepared['cores_needed']:,.1f} of a host's {prepared['cores_there']} cores "
        f"prepare them at {rate}; it could feed {prepared['feeds_devices']:,.3g} devices and has "
        f"{prepared['devices']}"
    )
    if prepared["suffices"]:
        rows = [("input suffices", f"yes: {figures}")]
    else:
        total = prepared["images_per_second"] * subject.topology.num_hosts
        rows = [
            (
                "input suffices",
                f"NO: {figures}. It gives {total:,.0f} images/s in all, and the devices wait "
                f"{prepared['wait_share']:.0%} of the time",
            )
        ]
        if prepared["steps"] and can_augment_on_device(prepared["steps"]):
            device_steps = augment.split(prepared["steps"]).device
            change = f"--config.dataset.augment_on=device ({device_steps} on the devices)"
            rows.append(("to change", change))
    if prepared["steps"] != subject.config.dataset.train_preprocess:
        rows.append(("", f"the host's steps are {prepared['steps']}, the others the devices'"))
    return rows


def report(subject: Subject, step: Step) -> list[tuple[str, str]]:
    """A plan's figures, for people: (what, how much)."""
    plan, chip, topology = summary(subject, step), subject.topology.chip, subject.topology
    of_run, of_step, host = plan["run"], plan["step"], plan["host"]
    gib = chips.GIB
    length = f"{of_run['steps']:,} steps of {of_run['global_batch_size']:,} images"
    if of_run["epochs"]:
        length += f", {of_run['epochs']:,.1f} epochs of {of_run['examples']:,}"
    rows = [
        ("topology", f"{topology.name}: {topology.what} in {topology.num_hosts:,} host(s)"),
        (
            "model",
            f"{subject.num_params:,} parameters, {subject.config.image_size} px, "
            f"{subject.model.num_classes:,} classes, {subject.model.dtype}",
        ),
        ("run", length),
        ("settings", str(step.settings)),
        (
            "figures",
            f"of the compiled update ({step.compile_seconds:.0f} s to compile)"
            if step.compiled
            else "ESTIMATED by arithmetic: nothing was compiled",
        ),
    ]
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in step.memory_parts.items())
    verdict = f"{step.memory / gib:.2f} of {chip.memory / gib:.2f} GiB a device"
    if step.fits:
        rows.append(("fits", f"yes: {verdict} ({parts})"))
    else:
        over = (step.memory - chip.memory) / gib
        rows.append(("fits", f"NO: {verdict}, {over:.2f} too many ({parts})"))
        rows.append(("to change", advice(subject, step)))
        rows.append(("", "what follows is an estimate, and would hold if it fitted"))
    if step.unknown_loops:
        rows.append(("", f"{step.unknown_loops} loop(s) of unknown length are counted once"))
    extra = step.flops / of_step["model_flops"] - 1
    rows.append(
        (
            "FLOPs",
            f"{short(plan['per_image']['train_flops'], 'FLOP')} an image by the closed form "
            f"(forward {short(plan['per_image']['forward_flops'], 'FLOP')}); a device executes "
            f"{short(step.flops, 'FLOP')} a step ({extra:+.1%})",
        )
    )
    rows.append(("memory traffic", f"{short(step.bytes, 'B')} a device and step"))
    for kind, traffic in step.collectives.items():
        count = f"{traffic.count:,} x, " if traffic.count else ""
        rows.append(
            (
                kind,
                f"{count}{short(traffic.payload, 'B')} of arrays, a device sends "
                f"{short(traffic.sent, 'B')}",
            )
        )
    floors = ", ".join(f"{name} {short(time, 's')}" for name, time in step.floors.items())
    rows.append(("floors of a step", f"{floors}, each at its peak"))
    if step.schedule:
        schedule = f"{short(step.schedule, 's')} a step, communication left out"
        rows.append(("compiler's schedule", schedule))
    rows.append(
        (
            "expected",
            f"{short(step.seconds, 's')} a step with matmuls at {subject.utilization:.0%} of "
            f"their peak, limited by {step.limit}: "
            f"{plan['images_per_second']:,.0f} images/s, "
            f"{plan['images_per_second_per_device']:,.0f} a device",
        )
    )
    rows.append(
        (
            "whole run",
            f"{plan['hours']:,.3g} hours, {plan['device_hours']:,.4g} device-hours (evaluation "
            f"{duration(plan['evaluation_seconds'])} of it, as min:s)",
        )
    )
    saved = plan["checkpoint"]
    rows.append(
        (
            "checkpoint",
            f"{short(saved['bytes'], 'B')}, every {duration(saved['every_seconds'])}; "
            f"{saved['write_seconds']:,.0f} s to write beside the training at "
            f"{short(WRITE_RATE, 'B/s')} (assumed); {short(saved['kept_bytes'], 'B')} are kept",
        )
    )
    if not host["input"]["stays_on_device"]:
        rows.append(
            (
                "each host reads",
                f"{host['images_per_second']:,.0f} images/s, "
                f"{short(host['read_bytes_per_second'], 'B/s')} of files, sends "
                f"{short(host['send_bytes_per_second'], 'B/s')} to its devices",
            )
        )
    rows += _input_rows(subject, plan)
    needs = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in host["memory"].items())
    rows.append(
        (
            "each host's memory",
            f"{host['memory_needed'] / 1e9:,.1f} of {host['memory_there'] / 1e9:,.0f} GB ({needs})",
        )
    )
    return rows

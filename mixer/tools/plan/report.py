"""Formats the figures of a plan as JSON and as lines of text."""

import dataclasses
from typing import Any

from mixer import sizes
from mixer.data.host_or_device import can_augment
from mixer.data.preprocessing.spec import Specification, parse
from mixer.formatting import duration, short
from mixer.models.flops import forward_flops
from mixer.parallel import sharding
from mixer.tools.plan import chips
from mixer.tools.plan.host import host_figures
from mixer.tools.plan.search import advice
from mixer.tools.plan.subject import Subject, peak, train_flops
from mixer.tools.plan.update import Step

WRITE_RATE = 200e6  # assumed bytes/s from one host to a bucket

Row = tuple[str, str]  # label, text


def summary(subject: Subject, step: Step) -> dict[str, Any]:
    """Returns all figures of a plan as JSON: seconds, bytes, FLOPs and images.

    "step" has the fields of `Step`, and "topology" has the fields of `chips.Topology`.
    """
    config, topology = subject.config, subject.topology
    batch, devices = config.global_batch_size, topology.num_devices
    per_image = train_flops(subject)
    forward = forward_flops(subject.model, subject.image_size)
    model_flops = per_image * batch / devices  # per device and step
    rate = batch / step.seconds
    evaluation = subject.eval_examples * forward / (devices * peak(subject) * subject.utilization)
    hours = (config.total_steps * step.seconds + evaluation) / 3600
    checkpoint = sharding.bytes_per_device(subject.state)
    images = config.total_steps * batch
    return {
        "topology": dataclasses.asdict(topology) | {"num_hosts": topology.num_hosts},
        "utilization": subject.utilization,
        "parameters": subject.num_params,
        "run": {
            "steps": config.total_steps,
            "global_batch_size": batch,
            "images": images,
            "examples": subject.num_examples,
            "epochs": images / subject.num_examples if subject.num_examples else None,
        },
        "per_image": {"forward_flops": forward, "train_flops": per_image},
        "step": dataclasses.asdict(step)
        | {
            "overrides": step.settings.overrides,
            "model_flops": model_flops,
            "model_flops_utilization": model_flops / peak(subject) / step.seconds,
        },
        "images_per_second": rate,
        "images_per_second_per_device": rate / devices,
        "evaluation_seconds": evaluation,
        "hours": hours,
        "device_hours": hours * devices,
        "checkpoint": {
            "bytes": checkpoint,
            "write_seconds": checkpoint / WRITE_RATE,
            "kept_bytes": checkpoint
            * (config.checkpoint.keep_last + bool(config.checkpoint.keep_best)),
            "every_seconds": config.checkpoint.every_steps * step.seconds,
        },
        "host": host_figures(subject, rate / topology.num_hosts, checkpoint),
    }


def report(subject: Subject, step: Step) -> list[Row]:
    """Returns the figures of a plan as rows of text."""
    plan = summary(subject, step)
    return [
        *_subject_rows(subject, step, plan["run"]),
        *_memory_rows(subject, step),
        *_step_rows(subject, step, plan),
        *_run_rows(plan),
        *_host_rows(subject, plan["host"]),
    ]


def _subject_rows(subject: Subject, step: Step, run: dict[str, Any]) -> list[Row]:
    topology, model = subject.topology, subject.model
    length = f"{run['steps']:,} steps of {run['global_batch_size']:,} images"
    if run["epochs"]:
        length += f", {run['epochs']:,.1f} epochs of {run['examples']:,}"
    figures = "ESTIMATED by arithmetic: nothing was compiled"
    if step.unreadable:
        figures = (
            f"memory measured on the compiled update ({step.compile_seconds:.0f} s to compile)"
        )
    elif step.compiled:
        figures = f"measured on the compiled update ({step.compile_seconds:.0f} s to compile)"
    image_size = sizes.text(subject.config.image_size)
    inputs = f"{image_size} px, {model.num_classes:,} classes, {model.dtype}"
    return [
        ("topology", f"{topology.name}: {topology.size} in {topology.num_hosts:,} host(s)"),
        ("model", f"{subject.num_params:,} parameters, {inputs}"),
        ("run", length),
        ("settings", str(step.settings)),
        ("figures", figures),
    ]


def _memory_rows(subject: Subject, step: Step) -> list[Row]:
    """Returns rows on whether the step fits into memory, and on what to change if it does not."""
    gib, memory = chips.GIB, subject.topology.chip.memory
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in step.memory_parts.items())
    verdict = f"{step.memory / gib:.2f} of {memory / gib:.2f} GiB per device"
    if step.fits:
        return [("fits", f"yes: {verdict} ({parts})")]
    excess = (step.memory - memory) / gib
    return [
        ("fits", f"NO: {verdict}, {excess:.2f} GiB over the limit ({parts})"),
        ("to change", advice(subject, step)),
        ("", "the figures below are estimates that ignore the memory limit"),
    ]


def _step_rows(subject: Subject, step: Step, plan: dict[str, Any]) -> list[Row]:
    """Returns rows on the FLOPs, the traffic and the duration of a step."""
    rows = []
    if step.unreadable:
        reason = f"the text of the compiled program cannot be read ({step.unreadable})"
        rows.append(("no estimate", f"of FLOPs, traffic and time from the compiler: {reason}"))
        rows.append(("", "the figures below are estimated by arithmetic"))
    if step.unknown_loops:
        rows.append(("", f"{step.unknown_loops} loop(s) of unknown length are counted once"))
    train, forward = (
        short(plan["per_image"][f"{name}_flops"], "FLOP") for name in ("train", "forward")
    )
    extra = step.flops / plan["step"]["model_flops"] - 1
    executed = f"{short(step.flops, 'FLOP')} per step ({extra:+.1%})"
    closed_form = f"{train} per image by the closed form (forward {forward})"
    rows.append(("FLOPs", f"{closed_form}; a device executes {executed}"))
    rows.append(("memory traffic", f"{short(step.bytes, 'B')} per device and step"))
    for kind, traffic in step.collectives.items():
        count = f"{traffic.count:,} x, " if traffic.count else ""
        payload, sent = short(traffic.payload, "B"), short(traffic.sent, "B")
        rows.append((kind, f"{count}{payload} of arrays; each device sends {sent}"))
    floors = ", ".join(f"{name} {short(time, 's')}" for name, time in step.floors.items())
    rows.append(("minimum times per step", f"{floors}, each at its peak"))
    if step.schedule:
        schedule = f"{short(step.schedule, 's')} per step, without communication"
        rows.append(("compiler's schedule", schedule))
    seconds = f"{short(step.seconds, 's')} per step with matmuls at {subject.utilization:.0%} of"
    rate, rate_per_device = plan["images_per_second"], plan["images_per_second_per_device"]
    rates = f"{rate:,.0f} images/s, {rate_per_device:,.0f} per device"
    rows.append(("expected", f"{seconds} their peak, limited by {step.limit}: {rates}"))
    return rows


def _run_rows(plan: dict[str, Any]) -> list[Row]:
    """Returns rows on the duration of the run and on its checkpoints."""
    checkpoint = plan["checkpoint"]
    hours = f"{plan['hours']:,.3g} hours, {plan['device_hours']:,.4g} device-hours"
    evaluation = duration(plan["evaluation_seconds"])
    return [
        ("whole run", f"{hours} (including {evaluation} min:s of evaluation)"),
        (
            "checkpoint",
            f"{short(checkpoint['bytes'], 'B')}, every {duration(checkpoint['every_seconds'])}; "
            f"{checkpoint['write_seconds']:,.0f} s to write during training at "
            f"{short(WRITE_RATE, 'B/s')} (assumed); "
            f"{short(checkpoint['kept_bytes'], 'B')} are kept",
        ),
    ]


def _host_rows(subject: Subject, host: dict[str, Any]) -> list[Row]:
    rows = []
    if not host["input"]["stays_on_device"]:
        images = f"{host['images_per_second']:,.0f} images/s"
        read_rate = short(host["read_bytes_per_second"], "B/s")
        send_rate = short(host["send_bytes_per_second"], "B/s")
        text = f"{images}, {read_rate} of files, sends {send_rate} to its devices"
        rows.append(("each host reads", text))
    needs = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in host["memory"].items())
    total = f"{host['memory_needed'] / 1e9:,.1f} of {host['memory_there'] / 1e9:,.0f} GB"
    return [
        *rows,
        *_input_rows(subject, host["input"]),
        ("each host's memory", f"{total} ({needs})"),
    ]


def _input_rows(subject: Subject, prepared: dict[str, Any]) -> list[Row]:
    """Returns rows on whether the input suffices, and on what to change if it does not."""
    if prepared["stays_on_device"]:
        return [("input suffices", "yes: the images are read once and stay on the devices")]
    figures = (
        f"about {prepared['cores_needed']:,.1f} of a host's {prepared['cores_there']} cores "
        f"prepare them at {prepared['core_rate']:,} images/s per core; it could feed "
        f"{prepared['feeds_devices']:,.3g} devices and has {prepared['devices']}"
    )
    if prepared["suffices"]:
        rows = [("input suffices", f"yes: {figures}")]
    else:
        total = prepared["images_per_second"] * subject.topology.num_hosts
        wait = f"the devices wait {prepared['wait_share']:.0%} of the time"
        rows = [
            (
                "input suffices",
                f"NO: {figures}. All hosts prepare {total:,.0f} images/s, and {wait}",
            )
        ]
        spec = parse(prepared["steps"]) if prepared["steps"] else Specification()
        if can_augment(spec):
            change = f"--config.dataset.augment_on=device ({spec.parts.device} on the devices)"
            rows.append(("to change", change))
    if prepared["steps"] != subject.config.dataset.train_preprocess:
        rows.append(("", f"the host runs {prepared['steps']}; the devices run the other ops"))
    return rows

"""Gradient steps of a distillation a second, by the way in which they run.

Each model is distilled to itself with something to win back: the work of a step is the same. Ways:
``torch``, the chunked scan in plain torch and a step kernel by kernel; ``kernels``, with this
package's or mamba-ssm's kernels; ``captured``, the same in one CUDA graph.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, Literal
from unittest import mock

import torch
from harness import (
    Configuration,
    Experiment,
    Job,
    assets,
    joined,
    markdown,
    needs_gpu,
    not_measured,
    package_versions,
)
from pydantic import Field
from timing import seconds_of, synchronize
from transformers import AutoModelForCausalLM

from sparsessm_plugin.backends import choice
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.recurrence import differentiable, kernels, ssd
from sparsessm_plugin.recurrence.quantities import HeadQuantities, MixerQuantities
from sparsessm_plugin.training import distillation as distillation_module
from sparsessm_plugin.training import tuner as tuner_module
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.distillation import Distillation, fitted_parameters
from sparsessm_plugin.training.tuner import Tuner

MODELS = ("mamba-25m", "mamba2-25m", "granite-hybrid-16m", "qwen3_5-15m")
WAYS = ("torch", "kernels", "captured")
SCANS = ("Triton", "torch", "mamba-ssm")
WARMUP = 6  # steps before the clock starts
SECTIONS = ("scans", "steps", "reconstruction")


class Fields(Configuration):
    """What steps, and how long."""

    sections: list[str] = Field(list(SECTIONS), description="in this order")
    models: list[str] = Field(list(MODELS), description="checkpoints of the assets")
    ways: list[str] = Field(list(WAYS), description="beside each other")
    batch: int = Field(32, description="windows a step")
    length: int = Field(512, description="tokens a window")
    seconds: float = Field(3.0, description="of steps a row")
    device: Literal["cuda", "cpu"] = Field("cuda", description="where")


def run(job: Job) -> Iterator[Any]:
    """Scans alone, steps of every model and way, and steps of single layers."""
    chosen: Fields = job.configuration
    if chosen.device == "cuda":
        needs_gpu()
    job.numbers["packages"] = package_versions("triton", "mamba-ssm")
    if "scans" in chosen.sections:
        scans = job.numbers.setdefault("scans", [])
        if not scans:
            for name, work in (("Mamba-1", scans_of_channels), ("Mamba-2", scans_of_heads)):
                with job.case(f"scan of {name}"):
                    scans += work(chosen)
                yield f"scan of {name}"
    rows = job.numbers.setdefault("rows", [])
    wanted = [{"model": name, "way": way} for name in chosen.models for way in chosen.ways]
    for key in wanted if "steps" in chosen.sections else []:
        if any(row | key == row for row in rows) or not job.in_time(str(key)):
            continue
        with job.case(str(key)):
            rows.append({**key, **steps(key["model"], key["way"], chosen)})
        yield key
    for way in WAYS[:0:-1] if "reconstruction" in chosen.sections else ():
        found = job.numbers.setdefault("reconstruction", {})
        if way not in found and job.in_time("reconstruction"):
            with job.case(f"reconstruction, {way}"):
                found[way] = reconstruction(way, chosen)
            yield f"reconstruction, {way}"


# -- the scan alone --------------------------------------------------------------------------


def scans_of_channels(chosen: Fields) -> list[dict[str, Any]]:
    """Milliseconds by implementation, and how far gradients are apart."""
    large, exact, small = inputs(MixerQuantities, (1024,), (16, 8, 4), (2, 100, (70,), 16), chosen)
    ways: dict[str, Any] = {"torch": differentiable.in_chunks}
    if chosen.device == "cuda":
        from sparsessm_plugin.recurrence import gpu_gradient

        ways["Triton"] = gpu_gradient.scan
        if kernels.available(large[16]):
            ways["mamba-ssm"] = kernels.scan
    return timed_scans("Mamba-1", ways, differentiable.in_chunks, exact, small, large)


def scans_of_heads(chosen: Fields) -> list[dict[str, Any]]:
    """The same for the layout of Mamba-2, 16 heads of 64 channels, by precision of products."""
    large, exact, small = inputs(HeadQuantities, (16, 64), (128, 32), (2, 150, (4, 64), 96), chosen)
    ways: dict[str, Any] = {"torch": ssd.scan}
    if chosen.device == "cuda":
        from sparsessm_plugin.recurrence import ssd_gpu

        ways["Triton"] = ssd_gpu.scan
    found = []
    for products in ("float32", "TF32"):
        with tf32() if products == "TF32" else nullcontext():
            name = f"Mamba-2, {products}"
            found += timed_scans(name, ways, ssd.scan, exact, small, large)
    return found


def inputs(
    kind: Any, sizes: tuple[int, ...], states: tuple[int, ...], small: Any, chosen: Fields
) -> tuple[dict[int, Any], Any, Any]:
    """By N what is timed; what errors are measured of, in float64 and in float32."""
    large = {
        N: quantities(kind, chosen.batch, chosen.length, sizes, N, chosen.device, torch.float32)
        for N in states
    }
    exact, single = (
        quantities(kind, *small, chosen.device, dtype) for dtype in (torch.float64, torch.float32)
    )
    return large, exact, single


def timed_scans(
    name: str, ways: dict[str, Any], reference: Any, exact: Any, small: Any, large: dict[int, Any]
) -> list[dict[str, Any]]:
    """A row an implementation and N.

    :param exact: in float64, what the reference is given
    :param small: the same in float32, of which errors are measured; ``large`` are timed
    """
    expected, rows = gradients(reference, exact), []
    for way, scan in ways.items():
        found = gradients(scan, small)
        errors = [
            float((found[key].double() - value).norm() / value.norm())
            for key, value in expected.items()
        ]
        for N, own in large.items():
            seconds = {}
            for kind, work in (("forward", scan), ("both", lambda q, s=scan: gradients(s, q))):
                work(own)
                seconds[kind] = seconds_of(lambda work=work, own=own: work(own), 5)
            row = {"scan": name, "N": N, "way": way, "milliseconds": 1e3 * seconds["both"]}
            rows.append(row | {"forward_milliseconds": 1e3 * seconds["forward"]})
            if max(large) == N:
                rows[-1]["error"] = max(errors)
    return rows


def quantities(
    kind: Any, batch: int, length: int, sizes: tuple[int, ...], N: int, device: Any, dtype: Any
) -> Any:
    """Random inputs of a recurrence whose gradients are asked for.

    :param kind: MixerQuantities, of D channels, or HeadQuantities, of H heads of P in one group
    :param sizes: (D,) or (H, P)
    """
    generator = torch.Generator().manual_seed(0)
    H, P, group = sizes[0], sizes[-1] if len(sizes) > 1 else 1, (1,) * (len(sizes) - 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(True)

    with torch.no_grad():
        dt = torch.nn.functional.softplus(normal(batch, length, H) - 3)
        A = -torch.exp(0.5 * normal(*((H,) if group else (H, N))) + 1)
    return kind(
        u=normal(batch, length, H * P),
        dt=dt.requires_grad_(True),
        A=A.requires_grad_(True),
        B=normal(batch, length, *group, N),
        C=normal(batch, length, *group, N),
        D=normal(H),
        z=torch.zeros(1, device=device),
    )


def gradients(scan: Any, q: MixerQuantities) -> dict[str, torch.Tensor]:
    leaves = {name: getattr(q, name) for name in ("u", "dt", "A", "B", "C", "D")}
    y = scan(q)
    weight = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), (y.detach() * weight))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


# -- steps -----------------------------------------------------------------------------------


def steps(name: str, way: str, chosen: Fields) -> dict[str, Any]:
    """Steps of a distillation of a model to itself, after noise on its mixers."""
    path = assets() / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = model.to(chosen.device).eval()
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(4):
        ids = torch.randint(vocabulary, (chosen.batch, chosen.length), generator=generator)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    distillation = Distillation(model, data, "training_speed", Plan(minutes=1.0))
    with torch.no_grad():  # something to win back
        for index, parameter in enumerate(fitted_parameters(model, "mixers").values()):
            noise = torch.Generator().manual_seed(index)
            added = torch.randn(parameter.shape, generator=noise).to(parameter)
            parameter += 0.02 * parameter.std() * added if parameter.numel() > 1 else 0
    with ExitStack() as stack:
        if way == "torch":
            for function in ("_triton", "_triton_of_heads"):
                stack.enter_context(mock.patch.object(differentiable, function, return_value=None))
            stack.enter_context(mock.patch.object(kernels, "available", return_value=False))
            stack.enter_context(mock.patch.object(choice, "_WITH_GRADIENTS", {}))
        if way != "captured":
            none = mock.patch.object(tuner_module, "capture", return_value=None)
            stack.enter_context(none)
        tuner = Tuner(
            model,
            fitted_parameters(model, "all_but_vocabulary"),
            distillation.batches,
            Plan(steps=1000000, learning_rate=1e-5),
            "training_speed",
            loss_fn=distillation.loss,
            capturable=distillation_module._is_capturable,
        )
        return rate(tuner, chosen)


def rate(tuner: Any, chosen: Fields) -> dict[str, Any]:
    """Steps a second, after the warm-up so many seconds of them."""
    cuda = chosen.device == "cuda"
    first: list[float] = []
    ended: list[float] = []
    begun = time.perf_counter()

    def reached(seconds: float, part: int = 1, parts: int = 1) -> bool:
        done = tuner.budget.done
        if done == 1:
            synchronize()
            first.append(time.perf_counter() - begun)
        if done == WARMUP:
            synchronize()
            ended.append(time.perf_counter())
        over = bool(ended) and time.perf_counter() - ended[0] > chosen.seconds
        if over and not (done - WARMUP) % 4:  # a queue of kernels may be long
            synchronize()
            ended.append(time.perf_counter())
            return True
        return False

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with (
        mock.patch.object(tuner.budget, "reached", reached),
        tuner._weights.attached(),
        torch.enable_grad(),
    ):
        loss = tuner.take({})
        found = (tuner.budget.done - WARMUP) / (ended[-1] - ended[0])
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {
        "steps_per_second": found,
        "milliseconds": 1e3 / found,
        "gib": peak,
        "mean_loss": loss,
        "first_step_seconds": first[0],
    }


# -- reconstruction of layers ----------------------------------------------------------------


def reconstruction(way: str, chosen: Fields) -> dict[str, Any]:
    """Removal of states of Mamba-2 with steps a layer, which run one by one or in a graph."""
    from sparsessm_plugin.methods import remove_states, state_fits
    from sparsessm_plugin.refit import reconstruction as module

    generator = torch.Generator().manual_seed(0)
    path = assets() / "models" / "mamba2-25m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = model.to(chosen.device).eval()
    ids = torch.randint(model.config.vocab_size, (32, 512), generator=generator)
    data = [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in ids.split(8)]
    spent: list[float] = []
    own = module.reconstruct

    def timed(*args: Any) -> None:
        spent.append(seconds_of(lambda: own(*args)))

    with ExitStack() as stack:
        if way == "kernels":
            stack.enter_context(mock.patch.object(module, "capture", return_value=None))
        stack.enter_context(mock.patch.object(state_fits, "reconstruct", timed))
        whole = seconds_of(lambda: remove_states(model, data, keep=32))
    return {"seconds": whole, "layers": spent}


# -- tables ----------------------------------------------------------------------------------


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """Steps, scans and reconstruction."""
    packages = ", ".join(f"{k} {v}" for k, v in numbers.get("packages", {}).items())
    parts = [
        "# Gradient steps of a distillation",
        f"Steps of {chosen.batch} x {chosen.length} tokens towards the dense model. `torch` is the "
        "chunked scan in plain torch, `kernels` are Triton kernels of this package, `captured` the "
        f"same in one CUDA graph. {packages}".strip(),
    ]
    if rows := numbers.get("rows"):
        lines = [
            [
                row["model"],
                row["way"],
                f"{row['steps_per_second']:.2f}",
                f"{row['milliseconds']:.1f}",
                "" if row["gib"] is None else f"{row['gib']:.1f}",
                row.get("remark", ""),
            ]
            for row in rows
        ]
        parts.append(markdown(["model", "way", "steps/s", "ms", "GiB", "remark"], lines))
    scans: dict[tuple[str, int], dict[str, Any]] = {}
    for row in numbers.get("scans", []):
        scans.setdefault((row["scan"], row["N"]), {})[row["way"]] = row
    if scans:
        lines = []
        for (scan, N), own in scans.items():
            times = [own[way]["milliseconds"] if way in own else None for way in SCANS]
            cells = ["" if t is None else f"{t:.1f}" if t > 50 else f"{t:.2f}" for t in times]
            errors = [own.get(way, {}).get("error") for way in SCANS if way != "torch"]
            lines.append([scan, str(N), *cells, *("" if e is None else f"{e:.1e}" for e in errors)])
        head = ["scan", "N", *(f"{way}, ms" for way in SCANS), "Triton's error"]
        parts += [
            f"The scan alone, with its gradients, {chosen.batch} x {chosen.length} tokens, 1,024 "
            "channels: relative errors, against torch in float64 on 2 x 100 or 2 x 150 tokens, are "
            "the largest of y and all gradients.",
            markdown([*head, "mamba-ssm's error"], lines),
        ]
    if found := numbers.get("reconstruction"):
        lines = [
            [way, f"{own['seconds']:.1f}", f"{statistics.median(own['layers']):.2f}"]
            for way, own in found.items()
        ]
        parts += [
            "Removal of three quarters of mamba2-25m's states, with steps a layer:",
            markdown(["way", "seconds", "of a layer's steps"], lines),
        ]
    return joined(*parts, not_measured(numbers))


EXPERIMENT = Experiment(
    measures="gradient steps a second, and the scan with its gradients",
    device="GPU",
    seconds=95,
    subjects=", ".join(MODELS),
    configuration=Fields,
    run=run,
    render=render,
    results={"training_speed": {}},
    quick={
        "": {
            "sections": ["steps"],
            "models": ["mamba-6m"],
            "ways": ["kernels"],
            "batch": 2,
            "length": 64,
            "seconds": 1.0,
            "device": "cpu",
        }
    },
    extends=("sections", "models", "ways"),
)

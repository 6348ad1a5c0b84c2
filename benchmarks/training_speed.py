"""Gradient steps of a distillation a second, by the way in which they run.

python benchmarks/training_speed.py            # one CUDA GPU
python benchmarks/training_speed.py --profile  # and what a step's time goes to

Each model is distilled to itself with its smallest states taken away or, where that is not its
kind, as it is: the work of a step is the same. Ways: ``torch``, the chunked scan in plain torch
and a step kernel by kernel; ``kernels``, with this package's or mamba-ssm's kernels; ``captured``,
the same in one CUDA graph. What fails is printed, and the rest goes on.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import assets
from loguru import logger
from transformers import AutoModelForCausalLM

from sparsessm_plugin.backends import choice
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.families.kernels import bound_kernels
from sparsessm_plugin.methods import state_fits
from sparsessm_plugin.recurrence import differentiable, kernels, ssd
from sparsessm_plugin.recurrence.quantities import HeadQuantities, MixerQuantities
from sparsessm_plugin.training import tuner as tuner_module
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.distillation import Distillation, fitted_parameters
from sparsessm_plugin.training.tuner import Tuner

MODELS = ("mamba-25m", "mamba2-25m", "granite-hybrid-16m", "qwen3_5-15m")
WAYS = ("torch", "kernels", "captured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps a row")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--time-limit", type=float, default=95.0, help="start nothing after it")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    started = time.monotonic()

    def part(name: str, work: Callable[[], None]) -> None:
        if time.monotonic() - started > options.time_limit:
            print(f"-- {name}: no time left", flush=True)
            return
        begun = time.monotonic()
        try:
            work()
        except Exception:
            print(f"-- {name} FAILED\n{traceback.format_exc()}", flush=True)
        print(f"-- {name}: {time.monotonic() - begun:.1f} s", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())
    part("scan of Mamba-1", lambda: scans(options))
    part("scan of Mamba-2", lambda: scans_of_heads(options))
    for name in options.models:
        for way in options.ways:
            part(f"{name} {way}", lambda name=name, way=way: steps(name, way, options))
    part("reconstruction", lambda: reconstruction(options))


# -- the scan of Mamba-1 alone ---------------------------------------------------------------


def scans(options: Any) -> None:
    """Time of forward and backward pass by implementation, and how far gradients are apart."""
    device = torch.device(options.device)
    ways: dict[str, Callable[[MixerQuantities], torch.Tensor]] = {}
    if device.type == "cuda":
        from sparsessm_plugin.recurrence import gpu_gradient

        ways["triton"] = gpu_gradient.scan
    ways["torch"] = differentiable.in_chunks
    quantities = _quantities(options.batch, options.length, 1024, 16, device)
    if kernels.available(quantities):
        ways["mamba-ssm"] = kernels.scan
    exact = _quantities(2, 100, 70, 16, device, torch.float64)
    expected = _gradients(differentiable.in_chunks, exact)
    for name, scan in ways.items():
        try:
            found = _gradients(scan, _quantities(2, 100, 70, 16, device))
            apart = {
                key: float((found[key].double() - value).norm() / value.norm())
                for key, value in expected.items()
            }
            print(name, "relative errors", {k: f"{v:.1e}" for k, v in apart.items()}, flush=True)
            for N in (16, 8, 4):
                own = _quantities(options.batch, options.length, 1024, N, device)
                forward = _milliseconds(lambda own=own, scan=scan: scan(own), device)
                both = _milliseconds(lambda own=own, scan=scan: _gradients(scan, own), device)
                print(f"{name} N {N}: forward {forward:.3f} ms, with gradients {both:.3f} ms")
        except Exception:
            print(f"-- {name} FAILED\n{traceback.format_exc()}", flush=True)


def scans_of_heads(options: Any) -> None:
    """The same for the Mamba-2 layout, 16 heads of 64 channels."""
    device = torch.device(options.device)
    ways: dict[str, Callable[[HeadQuantities], torch.Tensor]] = {}
    if device.type == "cuda":
        from sparsessm_plugin.recurrence import ssd_gpu

        ways["triton"] = ssd_gpu.scan
    ways["torch"] = ssd.scan
    exact = _heads(2, 150, 4, 64, 96, device, torch.float64)
    expected = _gradients(ssd.scan, exact)
    for products in ("ieee", "tf32"):
        for name, scan in ways.items():
            try:
                with tf32() if products == "tf32" else nullcontext():
                    found = _gradients(scan, _heads(2, 150, 4, 64, 96, device))
                    apart = {
                        key: float((found[key].double() - value).norm() / value.norm())
                        for key, value in expected.items()
                    }
                    errors = {k: f"{v:.1e}" for k, v in apart.items()}
                    print(name, products, "relative errors", errors, flush=True)
                    for N in (128, 32):
                        own = _heads(options.batch, options.length, 16, 64, N, device)
                        both = _milliseconds(
                            lambda own=own, scan=scan: _gradients(scan, own), device
                        )
                        with torch.no_grad():
                            forward = _milliseconds(lambda own=own, scan=scan: scan(own), device)
                        print(f"{name} {products} N {N}: forward {forward:.3f} ms, ", end="")
                        print(f"with gradients {both:.3f} ms", flush=True)
            except Exception:
                print(f"-- {name} FAILED\n{traceback.format_exc()}", flush=True)


def _heads(
    batch: int, length: int, H: int, P: int, N: int, device: torch.device, dtype: Any = None
) -> HeadQuantities:
    dtype = dtype or torch.float32
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(True)

    with torch.no_grad():
        dt = torch.nn.functional.softplus(normal(batch, length, H) - 3)
        A = -torch.exp(0.5 * normal(H) + 1)
    return HeadQuantities(
        u=normal(batch, length, H * P),
        dt=dt.requires_grad_(True),
        A=A.requires_grad_(True),
        B=normal(batch, length, 1, N),
        C=normal(batch, length, 1, N),
        D=normal(H),
        z=torch.zeros(1, device=device),
    )


def _quantities(
    batch: int, length: int, D: int, N: int, device: torch.device, dtype: Any = torch.float32
) -> MixerQuantities:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(True)

    with torch.no_grad():
        dt = torch.nn.functional.softplus(normal(batch, length, D) - 3)
        A = -torch.exp(0.5 * normal(D, N) + 1)
    return MixerQuantities(
        u=normal(batch, length, D),
        dt=dt.requires_grad_(True),
        A=A.requires_grad_(True),
        B=normal(batch, length, N),
        C=normal(batch, length, N),
        D=normal(D),
        z=torch.zeros(1, device=device),
    )


def _gradients(scan: Any, q: MixerQuantities) -> dict[str, torch.Tensor]:
    leaves = {name: getattr(q, name) for name in ("u", "dt", "A", "B", "C", "D")}
    y = scan(q)
    weight = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), (y.detach() * weight))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def _milliseconds(work: Callable[[], Any], device: torch.device, repeat: int = 5) -> float:
    work()
    _wait(device)
    begun = time.perf_counter()
    for _ in range(repeat):
        work()
    _wait(device)
    return 1e3 * (time.perf_counter() - begun) / repeat


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- steps -----------------------------------------------------------------------------------


def steps(name: str, way: str, options: Any) -> None:
    device = torch.device(options.device)
    path = assets() / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    if way == WAYS[0]:
        print(name, "kernels of transformers:", bound_kernels(model))
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(4):
        ids = torch.randint(vocabulary, (options.batch, options.length), generator=generator)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    distillation = Distillation(model, data, "training_speed", Plan(minutes=1.0))
    with torch.no_grad():  # something to win back
        for index, parameter in enumerate(fitted_parameters(model, "mixers").values()):
            noise = torch.Generator().manual_seed(index)
            added = torch.randn(parameter.shape, generator=noise).to(parameter)
            parameter += 0.02 * parameter.std() * added if parameter.numel() > 1 else 0
    with ExitStack() as stack:
        if way == "torch":
            for name_of in ("_triton", "_triton_of_heads"):
                stack.enter_context(mock.patch.object(differentiable, name_of, return_value=None))
            stack.enter_context(mock.patch.object(kernels, "available", return_value=False))
            stack.enter_context(mock.patch.object(choice, "_WITH_GRADIENTS", {}))
        if way != "captured":
            none = mock.patch.object(tuner_module, "capture", return_value=None)
            stack.enter_context(none)
        _rate(distillation, model, name, way, options, device)


def _rate(
    distillation: Any, model: Any, name: str, way: str, options: Any, device: torch.device
) -> None:
    fitted = fitted_parameters(model, "all_but_vocabulary")
    tuner = Tuner(
        model,
        fitted,
        distillation.batches,
        Plan(steps=1000000, learning_rate=1e-5),
        "training_speed",
        loss_fn=distillation.loss,
        capturable=_capturable(),
    )
    ended: list[float] = []

    begun = time.perf_counter()
    first: list[float] = []

    def reached(seconds: float, part: int = 1, parts: int = 1) -> bool:
        """After the warm-up so many seconds of steps."""
        done = tuner.budget.done
        if done == 1:
            _wait(device)
            first.append(time.perf_counter() - begun)
        if done == 6:
            _wait(device)
            ended.append(time.perf_counter())
        over = bool(ended) and time.perf_counter() - ended[0] > options.seconds
        if over and not (done - 6) % 4:  # a queue of kernels may be long
            _wait(device)
            ended.append(time.perf_counter())
            return True
        return False

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        mock.patch.object(tuner.budget, "reached", reached),
        tuner._weights.attached(),
        torch.enable_grad(),
    ):
        loss = tuner.take({})
        rate = (tuner.budget.done - 6) / (ended[-1] - ended[0])
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        print(
            f"| {name} | {way} | {rate:.2f} steps/s | {1e3 / rate:.1f} ms | mean loss {loss:.5g} "
            f"| {peak:.1f} GiB | first step {first[0]:.1f} s |",
            flush=True,
        )
        if options.profile and way != "torch":
            _profile(tuner, name, way, device)


def _capturable() -> Any:
    from sparsessm_plugin.training import distillation

    return distillation._is_capturable


def _profile(tuner: Any, name: str, way: str, device: torch.device) -> None:
    from torch.profiler import ProfilerActivity, profile

    until = tuner.budget.done + 5

    def reached(*_: Any) -> bool:
        return tuner.budget.done >= until

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        mock.patch.object(tuner.budget, "reached", reached),
        mock.patch.object(tuner_module, "_WORTHWHILE", 0),
        profile(activities=activities) as found,
    ):
        tuner.take({})
        _wait(device)
    key = "cuda" if device.type == "cuda" else "cpu"
    table = found.key_averages().table(
        sort_by=f"self_{key}_time_total", row_limit=15, max_name_column_width=70
    )
    print(f"profile of 5 steps, {name} {way}")
    for line in table.splitlines():
        cells = line.split("  ")
        print(" | ".join(cell.strip() for cell in cells if cell.strip())[:230])
    kernels_run = sum(e.count for e in found.key_averages() if e.self_device_time_total)
    print(f"kernels and copies in 5 steps: {kernels_run}", flush=True)


# -- reconstruction of layers ----------------------------------------------------------------


def reconstruction(options: Any) -> None:
    """Removal of states of Mamba-2 with steps a layer, which run one by one and in a graph."""
    from sparsessm_plugin.methods import remove_states
    from sparsessm_plugin.refit import reconstruction as module

    logger.remove()
    logger.add(sys.stdout, level="INFO")
    device = torch.device(options.device)
    path = assets() / "models" / "mamba2-25m"
    generator = torch.Generator().manual_seed(0)
    for way in ("captured", "kernels"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        ids = torch.randint(model.config.vocab_size, (32, 512), generator=generator)
        data = [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in ids.split(8)]
        spent: list[float] = []
        own = module.reconstruct

        def timed(*args: Any, spent: list[float] = spent, own: Any = own) -> None:
            _wait(device)
            begun = time.perf_counter()
            own(*args)
            _wait(device)
            spent.append(time.perf_counter() - begun)

        with ExitStack() as stack:
            if way == "kernels":
                stack.enter_context(mock.patch.object(module, "capture", return_value=None))
            stack.enter_context(mock.patch.object(state_fits, "reconstruct", timed))
            begun = time.perf_counter()
            remove_states(model, data, keep=32)
            _wait(device)
        print(
            f"| mamba2-25m | remove_states keep 32 | {way} | {time.perf_counter() - begun:.1f} s, "
            f"steps of layers {' '.join(f'{s:.2f}' for s in spent)} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()

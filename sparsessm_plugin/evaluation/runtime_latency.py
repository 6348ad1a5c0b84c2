"""How long prefill and decode take in vLLM or llama.cpp, where these are installed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.latency import DECODE, PREFILL, Latency, Timing

RUNTIMES = ("transformers", "vllm", "llama.cpp")
_SCRIPT = Path(__file__).with_name("vllm_script.py")


def check_runtime(runtime: str, models: Sequence[str], batch_sizes: Sequence[int]) -> None:
    """Find out before the work what cannot be measured.

    :raises SparseSSMError: no llama-bench, no GGUF file of a model, or a batch for llama-bench
    """
    if runtime != "llama.cpp":
        return
    if shutil.which("llama-bench") is None:
        raise SparseSSMError("--runtime llama.cpp: there is no llama-bench on the PATH")
    if tuple(batch_sizes) != (1,):
        raise SparseSSMError("--runtime llama.cpp: llama-bench reads one sequence, --batch-sizes 1")
    for model in models:
        _gguf_of(model)


def measure_runtime(
    runtime: str,
    models: Sequence[str],
    vocab_size: int,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_length: int = 64,
    decode_steps: int = 8,
    repeats: int = 5,
    dtype: str = "auto",
    python: str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Latency:
    """Time prefill and decode of models in a runtime, one model after the other.

    :param runtime: ``vllm`` or ``llama.cpp``
    :param models: folders; for llama.cpp .gguf files, or folders with one
    :param vocab_size: of the random prompts
    :param batch_sizes: sequences at once; llama-bench reads one
    :param prompt_length: tokens a sequence
    :param decode_steps: tokens to produce a sequence
    :param repeats: of each measurement
    :param dtype: of vLLM
    :param python: the Python that has vLLM; default: the one that runs this
    :param progress: called with 1 after each model
    :raises SparseSSMError: the runtime is not installed, or fails
    """
    check_runtime(runtime, models, batch_sizes)
    timings: list[Timing] = []
    for model in models:
        if runtime == "vllm":
            asked = {
                "model": model,
                "batch_sizes": list(batch_sizes),
                "prompt_length": prompt_length,
                "decode_steps": decode_steps,
                "repeats": repeats,
                "dtype": dtype,
                "vocab_size": vocab_size,
            }
            found = _json_of(
                [python or sys.executable, str(_SCRIPT), json.dumps(asked)], "vLLM", last=True
            )
        else:
            found = _llama(model, prompt_length, decode_steps, repeats)
        for size in batch_sizes:
            for phase, steps, tokens in (
                (PREFILL, 1, prompt_length),
                (DECODE, decode_steps, decode_steps),
            ):
                seconds = tuple(found[str(size)][phase])
                timings.append(
                    Timing(model, phase, size, steps, size * tokens, seconds, prompt_length)
                )
        if progress is not None:
            progress(1)
    return Latency(tuple(models), prompt_length, decode_steps, tuple(timings), {}, {})


def _llama(model: str, prompt_length: int, decode_steps: int, repeats: int) -> dict[str, Any]:
    command = ["llama-bench", "-m", str(_gguf_of(model)), "-p", str(prompt_length)]
    command += ["-n", str(decode_steps), "-r", str(repeats), "-o", "json"]
    times = {}
    for test in _json_of(command, "llama-bench"):
        phase = PREFILL if test["n_gen"] == 0 else DECODE
        times[phase] = [nanoseconds / 1e9 for nanoseconds in test["samples_ns"]]
    return {"1": times}


def _gguf_of(model: str) -> Path:
    path = Path(model)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(files) != 1 or not files[0].is_file():
        raise SparseSSMError(
            f"--runtime llama.cpp: {model} is no .gguf file, nor a folder with one; "
            "convert_hf_to_gguf.py makes it"
        )
    return files[0]


def _json_of(command: list[str], name: str, last: bool = False) -> Any:
    """What a program prints, all of it or its last line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SparseSSMError(f"{name}: cannot run {command[0]}: {error.strerror}") from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        told = done.stderr.strip().splitlines() or ["it said nothing"]
        raise SparseSSMError(f"{name} ended with code {done.returncode}: {told[-1][:300]}")
    try:
        found = json.loads(lines[-1] if last else done.stdout)
    except ValueError as error:
        raise SparseSSMError(f"{name} printed no JSON: {lines[-1][:300]}") from error
    if isinstance(found, dict) and "error" in found:
        raise SparseSSMError(f"--runtime vllm: {found['error']}")
    return found

"""What a result depends on beside its settings."""

import platform
from importlib.metadata import version

import torch


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the machine."""
    packages = ("sparsessm-plugin", "torch", "transformers", "llmcompressor", "compressed-tensors")
    found = {name: _version(name) for name in packages}
    found["python"] = platform.python_version()
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return "not installed"

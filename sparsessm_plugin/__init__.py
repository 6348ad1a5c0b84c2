"""Prune state-space language models from LLM Compressor recipes.

Importing this package makes its modifiers known to LLM Compressor. It costs milliseconds
and imports neither torch nor LLM Compressor: the public names below are loaded on first
use, and the modifiers when LLM Compressor first asks for one.
"""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsessm_plugin.checkpoints.acceleration import accelerate
    from sparsessm_plugin.checkpoints.export import load_mamba_ssm
    from sparsessm_plugin.checkpoints.loading import enable_compressed_loading, load
    from sparsessm_plugin.checkpoints.runtimes import runtime_support
    from sparsessm_plugin.errors import SparseSSMError
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
    from sparsessm_plugin.families import find_mixers
    from sparsessm_plugin.families.fast_forward import fast_forward
    from sparsessm_plugin.fitting import fit
    from sparsessm_plugin.modifiers import (
        AttentionRemovalModifier,
        ChannelRemovalModifier,
        GradientMagnitudeModifier,
        LayerRemovalModifier,
        MLPRemovalModifier,
        SensitivitySparseGPTModifier,
        SparseGPTQModifier,
        SparseSSMModifier,
        StateRemovalModifier,
        WidthRemovalModifier,
    )
    from sparsessm_plugin.recipes import recipe_path

__version__ = "0.1.0"

_PUBLIC = {
    "AttentionRemovalModifier": "sparsessm_plugin.modifiers",
    "ChannelRemovalModifier": "sparsessm_plugin.modifiers",
    "GradientMagnitudeModifier": "sparsessm_plugin.modifiers",
    "LayerRemovalModifier": "sparsessm_plugin.modifiers",
    "MLPRemovalModifier": "sparsessm_plugin.modifiers",
    "SensitivitySparseGPTModifier": "sparsessm_plugin.modifiers",
    "SparseGPTQModifier": "sparsessm_plugin.modifiers",
    "SparseSSMError": "sparsessm_plugin.errors",
    "SparseSSMModifier": "sparsessm_plugin.modifiers",
    "StateRemovalModifier": "sparsessm_plugin.modifiers",
    "WidthRemovalModifier": "sparsessm_plugin.modifiers",
    "accelerate": "sparsessm_plugin.checkpoints.acceleration",
    "enable_compressed_loading": "sparsessm_plugin.checkpoints.loading",
    "evaluate_perplexity": "sparsessm_plugin.evaluation.perplexity",
    "fast_forward": "sparsessm_plugin.families.fast_forward",
    "find_mixers": "sparsessm_plugin.families",
    "fit": "sparsessm_plugin.fitting",
    "load": "sparsessm_plugin.checkpoints.loading",
    "load_mamba_ssm": "sparsessm_plugin.checkpoints.export",
    "recipe_path": "sparsessm_plugin.recipes",
    "runtime_support": "sparsessm_plugin.checkpoints.runtimes",
}

__all__ = [
    "AttentionRemovalModifier",
    "ChannelRemovalModifier",
    "GradientMagnitudeModifier",
    "LayerRemovalModifier",
    "MLPRemovalModifier",
    "SensitivitySparseGPTModifier",
    "SparseGPTQModifier",
    "SparseSSMError",
    "SparseSSMModifier",
    "StateRemovalModifier",
    "WidthRemovalModifier",
    "__version__",
    "accelerate",
    "enable_compressed_loading",
    "evaluate_perplexity",
    "fast_forward",
    "find_mixers",
    "fit",
    "load",
    "load_mamba_ssm",
    "recipe_path",
    "runtime_support",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


def _autoload() -> None:
    """What torch calls at the end of its import (entry-point group ``torch.backends``).

    Importing this package has already done the work. It must never raise: torch could not
    be imported any more.
    """


try:
    import_module("sparsessm_plugin.registration").install()
except Exception as _error:
    _message = f"sparsessm_plugin could not make its modifiers known to llmcompressor: {_error!r}"
    try:
        warnings.warn(_message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, but torch must still be importable
        print(f"RuntimeWarning: {_message}", file=sys.stderr)

"""Prune state-space language models from LLM Compressor recipes.

Importing this package makes its modifiers known to LLM Compressor. It costs milliseconds
and imports neither torch nor LLM Compressor: the public names below are loaded on first
use, and the modifiers when LLM Compressor first asks for one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsessm_plugin import registration

if TYPE_CHECKING:
    from sparsessm_plugin.errors import SparseSSMError
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
    from sparsessm_plugin.mixers import find_mixers
    from sparsessm_plugin.modifiers import SparseSSMModifier
    from sparsessm_plugin.recipes import recipe_path
    from sparsessm_plugin.scan.fast_forward import fast_forward

__version__ = "0.1.0"

_PUBLIC = {
    "SparseSSMError": "sparsessm_plugin.errors",
    "SparseSSMModifier": "sparsessm_plugin.modifiers",
    "evaluate_perplexity": "sparsessm_plugin.evaluation.perplexity",
    "fast_forward": "sparsessm_plugin.scan.fast_forward",
    "find_mixers": "sparsessm_plugin.mixers",
    "recipe_path": "sparsessm_plugin.recipes",
}

__all__ = [
    "SparseSSMError",
    "SparseSSMModifier",
    "__version__",
    "evaluate_perplexity",
    "fast_forward",
    "find_mixers",
    "recipe_path",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


registration.install()

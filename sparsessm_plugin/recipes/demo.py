"""What ``sparsessm demo`` computes: what pays, on the packaged checkpoint, without a download.

One table of what each method leaves of parameters, state, speed and perplexity. The text is
documentation that comes with the running interpreter; see :mod:`.demo_texts`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from loguru import logger

from sparsessm_plugin.evaluation.components import take_inventory
from sparsessm_plugin.evaluation.data import calibration_loader, tokenize, windows
from sparsessm_plugin.evaluation.latency import DECODE, measure_latency
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.recipes import load_recipe, parse_recipe
from sparsessm_plugin.recipes.demo_texts import CALIBRATED, EVALUATED, docstrings
from sparsessm_plugin.recipes.pruning import DEMO_MODEL, ModelSource, prune

W8A8 = """\
quantization_stage:
  quantization_modifiers:
    QuantizationModifier:
      targets: [Linear]
      scheme: W8A8
      ignore: [lm_head, "re:.*dt_proj$"]
"""
A_LOG = """\
prune_stage:
  prune_modifiers:
    SparseSSMModifier:
      sparsity: 0.5
      saliency: {saliency}
"""
DENSE = "dense"
_OF_SCALES = ("_scale", "_zero_point")
# built-in recipes, which are also quantized, and criteria for A_log by the names they go by
RECIPES = ("state-50", "layers-25", "whole-50")
# a field that shortens the fit of what remains, where seconds count
SHORT_FITS = {"state-50": "compensate: [D, out_proj]", "layers-25": "reconstruct_steps: 8"}
CRITERIA = {
    "magnitude": "magnitude",
    "SparseSSM, Algorithm 1": "hessian",
    "output_error": "output_error",
}


@dataclass(frozen=True)
class Sizes:
    """How much is calibrated on and measured.

    :param samples: calibration windows
    :param windows: windows of the evaluation text
    :param length: tokens a window
    :param sequences: that decode at once
    :param steps: tokens that each of them decodes
    :param repeats: of the timing, whose median counts
    :param short_fits: leave out what takes removals longest, see :data:`SHORT_FITS`
    """

    samples: int = 16
    windows: int = 20
    length: int = 512
    sequences: int = 8
    steps: int = 16
    repeats: int = 5
    short_fits: bool = False


QUICK = Sizes(samples=8, windows=12, length=128, steps=4, repeats=3, short_fits=True)


@dataclass(frozen=True)
class Row:
    """One model of the table.

    :param name: recipe, criterion or ``dense``
    :param quantized: 8-bit weights and activations on top; transformers computes these in floating
        point, so that only a runtime with kernels for them gets faster
    :param parameters: entries of all tensors
    :param zeros: share of them that are zero
    :param weight_bytes: with a byte for an entry of 8 bits and four for any other
    :param state_bytes: cache of a sequence between two decode steps
    :param tokens_per_second: decoded here by stock transformers, all sequences together
    :param perplexity: on text that nothing was fitted to
    :param seconds: of pruning, quantizing included
    """

    name: str
    quantized: bool
    parameters: int
    zeros: float
    weight_bytes: int
    state_bytes: int
    tokens_per_second: float
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Result of :func:`run_demo`.

    :param model: name of the checkpoint
    :param rows: the dense model first
    :param sizes: how much was calibrated on and measured
    :param calibration_tokens: that pruning saw
    :param evaluation_tokens: that perplexity is measured on
    """

    model: str
    rows: tuple[Row, ...]
    sizes: Sizes
    calibration_tokens: int
    evaluation_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return asdict(self)


def count_models() -> int:
    """Rows of the table; :func:`run_demo` reports its progress by them."""
    return 2 + 2 * len(RECIPES) + len(CRITERIA)


def run_demo(
    sizes: Sizes | None = None,
    at: Callable[[str], Any] = lambda name: None,
    done: Callable[[], Any] = lambda: None,
) -> DemoResult:
    """Prune the packaged checkpoint by several recipes and measure what each one changes.

    :param sizes: how much to calibrate on and measure; by default what takes some minutes
    :param at: called with the name of what is worked on
    :param done: called once for each model, and once more after the timing
    """
    sizes = sizes or Sizes()
    source = ModelSource(DEMO_MODEL, device="cpu")
    tokenizer = source.load_tokenizer()
    samples = _windows(CALIBRATED, tokenizer, sizes.length)
    text = _windows(EVALUATED, tokenizer, sizes.length)[: sizes.windows]
    models: dict[tuple[str, bool], Any] = {}
    measured: dict[tuple[str, bool], dict[str, Any]] = {}

    def keep(key: tuple[str, bool], model: Any, seconds: float) -> None:
        models[key] = model
        measured[key] = {
            **_measure(model),
            "perplexity": evaluate_perplexity(model, text, batch_size=4).perplexity,
            "seconds": round(seconds, 3),
        }
        done()

    def run(model: Any, recipe: Any, reads_data: bool) -> tuple[Any, float]:
        loader = calibration_loader(samples, sizes.samples, batch_size=4) if reads_data else None
        started = time.perf_counter()
        with _few_tokens_are_meant() if sizes.short_fits else nullcontext():
            pruned = prune(model, recipe, loader, tokenizer).model
        return pruned, time.perf_counter() - started

    at(DENSE)
    keep((DENSE, False), source.load(), 0.0)
    for name in (DENSE, *RECIPES):
        at(name)
        model, seconds = source.load(), 0.0
        if name != DENSE:
            model, seconds = run(model, _recipe(name, sizes), True)
            # quantizing changes a model in place
            keep((name, False), deepcopy(model), seconds)
            at(f"{name}, 8 bits")
        quantized, more = run(model, parse_recipe(W8A8, "8 bits"), False)
        keep((name, True), quantized, seconds + more)
    for name, saliency in CRITERIA.items():
        at(f"A_log by {name}")
        recipe = parse_recipe(A_LOG.format(saliency=saliency), "A_log")
        model, seconds = run(source.load(), recipe, True)
        keep((f"A_log by {name}", False), model, seconds)
    at("decode speed")
    speeds = _decode_speeds(models, sizes)
    done()
    rows = [Row(*key, **measured[key], tokens_per_second=speeds[key]) for key in models]
    return DemoResult(
        model=DEMO_MODEL,
        rows=tuple(rows),
        sizes=sizes,
        calibration_tokens=min(sizes.samples, len(samples)) * sizes.length,
        evaluation_tokens=text.numel(),
    )


@contextmanager
def _few_tokens_are_meant() -> Iterator[None]:
    """Keep back the warning of few calibration tokens, which were chosen here and not by a user."""
    logger.disable("sparsessm_plugin.methods.removal")
    try:
        yield
    finally:
        logger.enable("sparsessm_plugin.methods.removal")


def _recipe(name: str, sizes: Sizes) -> Any:
    recipe = load_recipe(name)
    if not sizes.short_fits or name not in SHORT_FITS:
        return recipe
    lines = recipe.text.rstrip().splitlines()
    indent = " " * (len(lines[-1]) - len(lines[-1].lstrip()))  # of the modifier's last field
    return parse_recipe("\n".join([*lines, indent + SHORT_FITS[name]]), name)


def _windows(modules: tuple[str, ...], tokenizer: Any, length: int) -> Any:
    return windows(tokenize(docstrings(modules), tokenizer), length, "docstrings")


def _measure(model: Any) -> dict[str, Any]:
    inventory = take_inventory(model)
    eight_bits = sum(
        module.weight.numel()
        for module in model.modules()
        if getattr(module, "quantization_scheme", None) is not None
    )
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith(_OF_SCALES))
    parameters = inventory.parameters - scales
    return {
        "parameters": parameters,
        "zeros": inventory.zeros / parameters,
        "weight_bytes": 4 * (parameters - eight_bits) + eight_bits,
        "state_bytes": _state_bytes(model),
    }


def _state_bytes(model: Any) -> int:
    import torch

    from sparsessm_plugin.families.state_cache import cache_bytes

    with torch.inference_mode():
        cache = model(torch.zeros(1, 2, dtype=torch.long), use_cache=True).cache_params
    return cache_bytes(cache, 1).total


def _decode_speeds(models: Mapping[Any, Any], sizes: Sizes) -> dict[Any, float]:
    """Tokens a second of each model, which take turns."""
    latency = measure_latency(
        models, (sizes.sequences,), prompt_length=4, decode_steps=sizes.steps, repeats=sizes.repeats
    )
    return {key: latency.timing(key, DECODE, sizes.sequences).tokens_per_second for key in models}

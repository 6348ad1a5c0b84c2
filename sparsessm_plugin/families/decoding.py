"""Greedy decode steps from a cache: as a model makes it, and with tensors that stay in place."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.backends.lanes import warming_up
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.state_cache import expand, lengthen, make_static

# transformers passes the cache of pure state-space models under the first name
_CACHE_NAMES = ("cache_params", "past_key_values")
WARM_UP = 3  # steps in which kernels compile and tune, before a capture
_ROUND = 64  # lengths of static buffers: masks of such rows are read in whole vectors


def prefill(model: Any, prompt: Tensor) -> tuple[Tensor, Any]:
    """Read a prompt.

    :param model: a transformers causal language model
    :param prompt: (b, L) token ids
    :return: (b, 1) greedy tokens and the model's cache
    :raises SparseSSMError: the model returns no cache
    """
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    for name in _CACHE_NAMES:
        if getattr(output, name, None) is not None:
            return output.logits[:, -1:].argmax(-1), getattr(output, name)
    raise SparseSSMError(f"{type(model).__name__} returns no cache to decode from")


def step(model: Any, token: Tensor, cache: Any) -> Tensor:
    """One cached greedy step: (b, 1) token in, (b, 1) token out."""
    return step_logits(model, token, cache).argmax(-1)


def step_logits(model: Any, token: Tensor, cache: Any) -> Tensor:
    """(b, 1, vocabulary) logits after one more token of each sequence, (b, 1)."""
    parameters = _parameters(model)
    arguments = {next(name for name in _CACHE_NAMES if name in parameters): cache}
    if any(isinstance(getattr(layer, "keys", None), Tensor) for layer in cache.layers):
        # not every family counts on from its cache
        seen = cache.get_seq_length()
        arguments["position_ids"] = (torch.arange(1, device=token.device) + seen)[None]
    logits: Tensor = model(input_ids=token, use_cache=True, logits_to_keep=1, **arguments).logits
    return logits[:, -1:]


def _parameters(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


class NotCapturable(Exception):
    """A step holds what no CUDA graph does."""


def capture_step(
    step: Callable[[], None],
    rewind: Callable[[], None],
    device: torch.device,
    warm_up: int = WARM_UP,
    generator: torch.Generator | None = None,
) -> torch.cuda.CUDAGraph:
    """A decode step as a CUDA graph, whose replay costs one launch.

    :param step: changes tensors that stay in place
    :param rewind: undoes the steps of the warm-up, in which kernels compile and tune
    :param device: of the model
    :param warm_up: steps
    :param generator: that the step draws from, if not from torch's own
    :raises NotCapturable: the step holds what no graph does
    """
    with warming_up(device):
        for _ in range(warm_up):
            step()
    rewind()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotCapturable(str(error).partition("\n")[0]) from error
    return graph


class StaticDecode:
    """Decode steps over a cache whose tensors stay where they are, so that a step can be replayed.

    States of a recurrence do so by nature; keys and values get buffers of a fixed length, and
    attention masks what is not written yet.

    :param model: a transformers causal language model
    :param prompt: (b, L) token ids
    :param steps: greedy tokens a sequence that :meth:`decode` produces
    :param context: tokens that attention looks back at when decoding begins, where the prompt is
        shorter: its keys and values are repeated
    :param batch_size: sequences, copies of the first one of the prompt; by default the prompt's
    :param graph: capture a step in a CUDA graph, whose replay costs one launch
    :raises SparseSSMError: the cache cannot hold still, or the step cannot be captured
    """

    def __init__(
        self,
        model: Any,
        prompt: Tensor,
        steps: int,
        context: int = 0,
        batch_size: int | None = None,
        graph: bool = True,
    ):
        self.model = model
        self.steps = steps
        token, self.cache = prefill(model, prompt)
        lengthen(self.cache, context)
        length = max(context, prompt.shape[1]) + max(steps, WARM_UP)
        make_static(self.cache, -(-length // _ROUND) * _ROUND)
        if batch_size is not None:
            expand(self.cache, batch_size)
            token = token[:1].expand(batch_size, 1)
        self.token = token.clone()
        # all that a rewind puts back: the states of the recurrence go on
        self._first = self.token.clone()
        self._lengths = [
            (layer.cumulative_length, layer.cumulative_length.clone())
            for layer in self.cache.layers
            if isinstance(getattr(layer, "cumulative_length", None), Tensor)
        ]
        self._graph = self._capture() if graph else None

    def rewind(self) -> None:
        """Let attention forget the tokens that were produced."""
        self.token.copy_(self._first)
        for length, first in self._lengths:
            length.copy_(first)

    def decode(self) -> Tensor:
        """All steps; the (b, 1) last token."""
        for _ in range(self.steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        return self.token

    def _step(self) -> None:
        self.token.copy_(step(self.model, self.token, self.cache))

    def _capture(self) -> Any:
        try:
            return capture_step(self._step, self.rewind, self.token.device)
        except NotCapturable as error:
            raise SparseSSMError(
                f"CUDA graphs: a decode step of {type(self.model).__name__} cannot be captured: "
                f"{error}"
            ) from error

"""Text that the dense model writes itself, to be distilled on beside the text that there is.

The dense model predicts for any text, and what it writes is the text that it knows best. A smaller
model that reads little text often learns it by heart; with as much again, written by the dense
model, equally many steps lose less (numbers: docs/method.md).
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from compressed_tensors.utils import patch_attrs
from loguru import logger
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.rows import unpadded_rows
from sparsessm_plugin.cost import memory_available
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.decoding import (
    WARM_UP,
    NotCapturable,
    StaticDecode,
    capture_step,
    step_logits,
)
from sparsessm_plugin.families.state_cache import cache_bytes
from sparsessm_plugin.progress import Stage

_LONGEST_PROMPT = 0.5  # of a window; the shortest is a token
_MOST_ROWS = 1024  # that are written at once
_SHARE = 4  # of memory that is free, by what states and predictions may take of it
# Of a token's predictions: as the model gives them, as float32, with noise, and the noise.
_LOGITS_HELD = 4


class Writer:
    """Samples what a causal language model continues prompts by, many at once.

    Every token is drawn from all that the model predicts, at temperature 1. A prompt is read
    token by token as what follows it is: so the rows of a batch may have prompts of different
    lengths, nothing is held but states and keys, and on a GPU one captured step serves all.

    Attributes: ``tokens``, (rows, length) read and written.

    :param model: a transformers causal language model, undisturbed, all weights on one device
    :param rows: sequences at once
    :param length: tokens of each, prompt included; at least 2
    :param seed: of what is drawn
    :raises SparseSSMError: the family's cache cannot stay in place
    """

    def __init__(self, model: Any, rows: int, length: int, seed: int = 0) -> None:
        self.model = model
        device = model.get_input_embeddings().weight.device
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        self._given = torch.ones(rows, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._seed = seed
        self._generator = self._new_generator()
        self.cache = _empty_cache(model, self.tokens[:1, :1], rows, length)
        self._graph = self._capture() if device.type == "cuda" else None

    def write(self, prompts: Tensor, given: Tensor) -> Tensor:
        """(rows, length) tokens: what is given of the prompts, and what the model draws.

        :param prompts: (rows, length)
        :param given: (rows,) of each row, how many tokens stay; at least 1
        """
        self._restart()
        self.tokens.copy_(prompts)
        self._given.copy_(given[:, None])
        for _ in range(self.tokens.shape[1] - 1):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        return self.tokens.clone()

    def _step(self) -> None:
        """Read a token of each row, and draw the next where none is given."""
        token = self.tokens.index_select(1, self._position)
        logits = step_logits(self.model, token, self.cache)[:, 0].float()
        # the largest of logits with Gumbel noise is a draw from their softmax
        noise = torch.empty_like(logits).exponential_(generator=self._generator)
        drawn = (logits - noise.log_()).argmax(-1, keepdim=True)
        self._position += 1
        there = self.tokens.index_select(1, self._position)
        chosen = torch.where(self._position < self._given, there, drawn)
        self.tokens.index_copy_(1, self._position, chosen)

    def _restart(self) -> None:
        """Let nothing be read yet."""
        self._position.zero_()
        for layer in self.cache.layers:
            for held in vars(layer).values():
                for each in held.values() if isinstance(held, Mapping) else (held,):
                    if isinstance(each, Tensor):
                        each.zero_()

    def _new_generator(self) -> torch.Generator:
        return torch.Generator(self.tokens.device).manual_seed(self._seed)

    def _capture(self) -> Any:
        """A step as a CUDA graph; None where the model waits for the GPU inside of one."""
        self._restart()
        steps = min(WARM_UP, self.tokens.shape[1] - 1)
        device = self.tokens.device
        try:
            return capture_step(self._step, self._restart, device, steps, self._generator)
        except NotCapturable as error:
            logger.debug(f"a decode step is not captured: {error}")
            self._generator = self._new_generator()  # the old one may still wait for the capture
            return None


@torch.no_grad()
def with_written(
    model: Any, data: Sequence[Mapping[str, Any]], tokens: int, who: str, seed: int = 0
) -> list[Any]:
    """Batches of the data, and between them, evenly, batches that the model has written.

    Written are windows as long and as many at once as those of the first batch. Each begins as
    some piece of the data does, of 1 token to half a window.

    :param model: see :class:`Writer`
    :param data: batches of ``input_ids`` (b, L), padded anywhere
    :param tokens: that are written at least, prompts included, of all ranks
    :param who: asks for it, for messages
    :param seed: of the prompts and of what is drawn; each rank adds its number
    :raises SparseSSMError: batches without ``input_ids`` or of single tokens, or see
        :class:`Writer`
    """
    if not data:
        return []
    first = data[0]
    if first.get("input_ids") is None or first["input_ids"].shape[-1] < 2:
        raise SparseSSMError(f"{who}: it continues input_ids of at least 2 tokens")
    batch, length = first["input_ids"].shape
    count = -(-tokens // (distributed.world_size() * batch * length))
    pieces = [row for each in data for row in unpadded_rows(each)]
    windows = _windows(model, pieces, count * batch, length, who, seed + distributed.rank())
    written = [_batch_like(first, rows) for rows in windows.split(batch)]
    return _between(list(data), written)


def _windows(
    model: Any, pieces: Sequence[Tensor], count: int, length: int, who: str, seed: int
) -> Tensor:
    """(count, length) tokens that the model has written."""
    rows = min(count, _MOST_ROWS, _rows_with_room(model, length))
    rounds = -(-count // rows)
    generator = torch.Generator().manual_seed(seed)
    try:
        writer = Writer(model, rows, length, seed)
    except SparseSSMError as error:
        raise SparseSSMError(f"{who}: {error}") from error
    found = []
    with Stage(f"{who}: text of the dense model", rounds) as stage:
        for _ in range(rounds):
            prompts, given = _prompts(pieces, rows, length, generator)
            device = writer.tokens.device
            found.append(writer.write(prompts.to(device), given.to(device)).cpu())
            stage.advance()
    return torch.cat(found)[:count]


def _prompts(
    pieces: Sequence[Tensor], rows: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(rows, length) tokens of which the first ones are text, and (rows,) how many are."""
    prompts = torch.zeros(rows, length, dtype=torch.long)
    given = torch.zeros(rows, dtype=torch.long)
    longest = max(1, int(_LONGEST_PROMPT * length))
    for row, piece in enumerate(torch.randint(len(pieces), (rows,), generator=generator).tolist()):
        text = pieces[piece]
        many = int(torch.randint(1, min(longest, len(text)) + 1, (), generator=generator))
        start = int(torch.randint(len(text) - many + 1, (), generator=generator))
        prompts[row, :many] = text[start : start + many]
        given[row] = many
    return prompts, given


def _batch_like(first: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """A batch with the fields of another, as far as these follow from tokens."""
    found: dict[str, Any] = {"input_ids": rows}
    if first.get("attention_mask") is not None:
        found["attention_mask"] = torch.ones_like(rows)
    if first.get("labels") is not None:
        found["labels"] = rows
    return found


def _between(data: list[Any], written: list[Any]) -> list[Any]:
    """Both, evenly: of any first part of the list each makes up its share."""
    places = [((i + 0.5) / len(data), 0, batch) for i, batch in enumerate(data)]
    places += [((i + 0.5) / len(written), 1, batch) for i, batch in enumerate(written)]
    return [batch for *_, batch in sorted(places, key=lambda place: place[:2])]


def _empty_cache(model: Any, token: Tensor, rows: int, length: int) -> Any:
    """A cache whose tensors stay in place, for so many rows."""
    # stock scans in chunks pad this one token to a whole chunk, and hold much for each
    scans = [module for module in model.modules() if hasattr(module, "chunk_size")]
    with patch_attrs(scans, "chunk_size", repeat(1)):
        return StaticDecode(model, token, length, batch_size=rows, graph=False).cache


def _rows_with_room(model: Any, length: int) -> int:
    """How many sequences' states, keys and predictions memory has room for, as far as counted."""
    embeddings = model.get_input_embeddings().weight
    device = embeddings.device
    cache = _empty_cache(model, torch.zeros(1, 1, dtype=torch.long, device=device), 1, length)
    held = cache_bytes(cache, 1).total + 4 * _LOGITS_HELD * len(embeddings)
    free = memory_available()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return max(1, free // _SHARE // held)

"""Remove whole layers, and let those that stay take over what they did."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from loguru import logger
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin import distributed
from sparsessm_plugin.cost import kept
from sparsessm_plugin.criteria.layers import BlockInfluence
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.methods.layer_fits import LayerTask, add_change
from sparsessm_plugin.methods.layer_passes import (
    LayerPasses,
    Writer,
    dense_streams,
    own_parameters,
)
from sparsessm_plugin.methods.model_removal import ModelRemoval, ModelRemovalSettings
from sparsessm_plugin.methods.removal import RemovalResult, Removed
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.progress import Stage
from sparsessm_plugin.refit.layers import token_weights
from sparsessm_plugin.selection.sets import Set, allowed_sets, search_sets
from sparsessm_plugin.training.divergence import divergences

_LOGITS_KEPT = 2**30  # bytes of the dense model's, while sets of layers are compared
# Tokens for each entry of the stream that a first comparison of sets needs, and how many of the
# best, how near to the best, are then compared on more.
_TOKENS_EACH, _COMPARED_AGAIN, _NEAR = 16, 4, 1.2

Saliency = Literal["loss_after_fit", "perplexity", "block_influence", "last", "random"]


class LayerSettings(ModelRemovalSettings):
    """The fields of :class:`sparsessm_plugin.LayerRemovalModifier`, which describes them."""

    saliency: Saliency = "loss_after_fit"
    compensate: list[Literal["out_proj", "reconstruct"]] = Field(
        default=["out_proj", "reconstruct"]
    )
    reconstruct_steps: int = Field(default=150, ge=1)
    search_width: int = Field(default=8, ge=1)
    search_tokens: int = Field(default=32768, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def reads_data(self) -> bool:
        """Whether layers are chosen or fitted by data, or the model is distilled."""
        by_data = self.saliency not in ("last", "random")
        return by_data or bool(self.compensate) or self.distills


@dataclass(frozen=True)
class LayerRemovalResult(RemovalResult):
    """What a removal of layers did.

    :param divergence: of the predictions for rows that no fit of the search saw, from the dense
        model's, nats a token: ``removed`` with nothing fitted, ``left`` after the fit
    :param sets_tried: how many sets of layers were compared
    :param fitted: names of the linear layers that were fitted in closed form
    :param reconstructed: names of the layers whose gradient steps lowered their error
    """

    divergence: dict[str, float] = field(default_factory=dict)
    sets_tried: int = 0
    fitted: tuple[str, ...] = ()
    reconstructed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a report; what was not measured is left out."""
        own = {
            "sets_tried": self.sets_tried,
            "fitted": list(self.fitted),
            "reconstructed": list(self.reconstructed),
        }
        measured = {"divergence": self.divergence} if self.divergence else {}
        return {**super().to_dict(), **measured, **own}


class LayerRemoval(ModelRemoval[LayerSettings]):
    """Removes the layers without which the model, once it is fitted again, predicts best."""

    def __init__(self, settings: LayerSettings, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._divergence: dict[str, float] = {}
        self._tried = 0
        self._fitted: list[str] = []
        self._reconstructed: list[str] = []

    def kept_sizes(self, adapter: ModelAdapter) -> dict[str, int]:
        return {"layers": self.settings.kept(adapter.axis_length("layers"))}

    def written(self, adapter: ModelAdapter) -> frozenset[str]:
        if not self.settings.compensate:
            return frozenset()
        if "reconstruct" in self.settings.compensate:
            layers = range(adapter.axis_length("layers"))
            return frozenset(name for i in layers for name in own_parameters(adapter, i))
        names = (a.tensor for layer in adapter.layers for p in layer.parts for a in p.writes())
        return frozenset(names)

    def check_sizes(self, adapter: ModelAdapter) -> None:
        length = adapter.axis_length("layers")
        keep = self.check_keep(adapter.name, "layers", length)
        fits = _Allowed(adapter)
        if next(allowed_sets(length, length - keep, fits), None) is None:
            raise SparseSSMError(
                f"{self.who}: no config of {adapter.family} can say {keep} of the {length} layers "
                f"of {adapter.name}, whichever are removed: {fits.reason}"
            )

    # -- the work --------------------------------------------------------------------

    def remove(self, model: Any, batches: Sequence[Any]) -> list[Removed]:
        started = time.perf_counter()
        adapter = self.graph.adapter
        length = adapter.axis_length("layers")
        size = length - self.settings.kept(length)
        allowed = _Allowed(adapter)
        with fast_forward(model):
            removed = self._choose(adapter, batches, length, size, allowed)
            error_left = None
            if self.settings.compensate:
                passes = LayerPasses(adapter, batches, self.device)
                error_left = self._fit(passes, removed)
        self.prune("layers", removed)
        return [
            Removed(
                name=adapter.name,
                axis="layers",
                before=length,
                after=length - size,
                removed=list(removed),
                tokens=self.tokens,
                error_removed=None,
                error_left=error_left,
                diverged=None,
                seconds=round(time.perf_counter() - started, 3),
            )
        ]

    def _choose(
        self,
        adapter: ModelAdapter,
        batches: Sequence[Any],
        length: int,
        size: int,
        allowed: "_Allowed",
    ) -> Set:
        saliency, settings = self.settings.saliency, self.settings
        if saliency == "last":
            return self._first_allowed(reversed(range(length)), length, size, allowed)
        if saliency == "random":
            generator = torch.Generator().manual_seed(settings.seed)
            order = torch.randperm(length, generator=generator).tolist()
            return self._first_allowed(order, length, size, allowed)
        if saliency == "block_influence":
            order = self._by_influence(LayerPasses(adapter, batches, self.device))
            return self._first_allowed(order, length, size, allowed)
        fits = saliency == "loss_after_fit" and "out_proj" in settings.compensate

        def study(tokens: int) -> _Study:
            some = _first_tokens(batches, -(-tokens // distributed.world_size()))
            passes = LayerPasses(adapter, some, self.device)
            return _Study(passes, fits, by_label=saliency == "perplexity")

        found: dict[Set, float] = {}
        with Stage(f"{self.who}, sets of layers", None) as stage:

            def loss(removed: Set) -> float:
                stage.at(f"without {', '.join(map(str, removed))}")
                found[removed] = by.loss(removed)
                stage.advance()
                self._tried += 1
                logger.debug(f"{self.who}: without layers {removed}: {found[removed]:.4f}")
                return found[removed]

            greedy = saliency == "perplexity"
            tokens = settings.search_tokens if greedy else self._first_look(adapter)
            by = study(tokens)
            chosen = search_sets(
                length, size, loss, allowed, settings.search_width, swaps=not greedy
            )
            if tokens < min(settings.search_tokens, self.tokens):
                near = [s for s, v in found.items() if len(s) == size and allowed(s)]
                near = sorted(near, key=lambda s: (found[s], s))[:_COMPARED_AGAIN]
                near = [s for s in near if found[s] <= _NEAR * found[chosen]]
                by = study(settings.search_tokens)
                if len(near) > 1:
                    found = {}
                    chosen = min(sorted(near), key=loss)
        self._divergence = by.divergence(chosen)
        return tuple(distributed.first("layers to remove", list(chosen)))

    def _first_look(self, adapter: ModelAdapter) -> int:
        """Tokens on which sets are compared before the best are compared on more."""
        whole = self.settings.search_tokens
        return min(whole, max(whole // 4, _TOKENS_EACH * adapter.hidden_size))

    def _first_allowed(
        self, order: Iterable[int], length: int, size: int, allowed: "_Allowed"
    ) -> Set:
        """The first indices of an order, if the config can say the rest; else the set nearest."""
        rank = {index: place for place, index in enumerate(order)}
        best = tuple(sorted(sorted(rank, key=rank.__getitem__)[:size]))
        if allowed(best):
            return best
        sets = allowed_sets(length, size, allowed)
        return min(sets, key=lambda s: (sum(rank[i] for i in s), s))

    def _by_influence(self, passes: LayerPasses) -> list[int]:
        """Layers by how little they turn the stream."""
        streams = [passes.embedded(i) for i in range(len(passes.batches))]
        scores = []
        for index, name in enumerate(passes.names):
            influence = BlockInfluence(self.device)
            for i, stream in enumerate(streams):
                streams[i] = passes.behind(index, i, stream)
                influence.add(stream.to(self.device), streams[i], passes.mask(i))
            distributed.reduce_fields(f"influence of {name}", influence)
            scores.append(influence.mean)
        return sorted(range(len(scores)), key=lambda i: (scores[i], i))

    def _fit(self, passes: LayerPasses, removed: Set) -> float:
        """Fit what stays, over all batches, in one pass through the layers.

        :return: error of the stream behind the last layer, relative to its square
        """
        length, count = len(passes.layers), range(len(passes.batches))
        first = _first_fitted(removed)
        dense = [passes.embedded(i) for i in count]
        for index in range(first):
            dense = [kept(passes.behind(index, i, dense[i])) for i in count]
        small = list(dense)
        index = first
        with Stage(f"{self.who}, fit", length - first) as stage:
            while index < length:
                stage.at(passes.names[index])
                behind = _next_kept(index, removed, length)
                for later in range(index, behind):
                    dense = [kept(passes.behind(later, i, dense[i])) for i in count]
                if index not in removed:
                    task = LayerTask(passes, index, small, dense)
                    small = self._fit_layer(task)
                stage.advance(behind - index)
                index = behind
        return _stream_error(passes, dense, small)

    def _fit_layer(self, task: LayerTask) -> list[Tensor]:
        """Fit a layer in the model.

        :return: [batch] (b, L, M) the streams behind it
        """
        settings, writer = self.settings, None
        if "out_proj" in settings.compensate:
            writer = task.passes.writer(task.index, task.small[0])
        fit = task.stand_in(writer)
        self.changes_weights()
        streams = None
        if "reconstruct" in settings.compensate:
            streams = task.reconstruct(fit, settings.reconstruct_steps, settings.seed)
        if writer is not None:
            self._fitted.append(writer.name)
        if streams is not None:
            self._reconstructed.append(task.name)
            return streams
        if writer is not None:
            add_change(writer, fit.change)
        return fit.streams(fit.change)

    def result(self) -> LayerRemovalResult:
        found = super().result()
        fields = {name: getattr(found, name) for name in RemovalResult.__dataclass_fields__}
        return LayerRemovalResult(
            **fields,
            divergence=self._divergence,
            sets_tried=self._tried,
            fitted=tuple(self._fitted),
            reconstructed=tuple(self._reconstructed),
        )


class _Allowed:
    """Whether the config can say what remains without a set of layers.

    Attributes: ``reason``, why the last refused set was refused.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._length = adapter.axis_length("layers")
        self.reason = ""

    def __call__(self, removed: Set) -> bool:
        try:
            self._adapter.layer_fields([i for i in range(self._length) if i not in removed])
        except SparseSSMError as error:
            self.reason = str(error)
            return False
        return True


@dataclass
class _Path:
    """What a smaller model makes of the batches, layer by layer.

    :param steps: (layer, next kept layer) of every layer that runs, from the first that differs
    :param streams: [step][batch] (b, L, M) before each of these layers, and behind the last
    """

    steps: list[tuple[int, int]]
    streams: list[list[Tensor]]


class _Study:
    """Losses of the model without some layers, over a few batches.

    :param passes: over these batches
    :param fits: whether what stays is fitted first
    :param by_label: the loss is that of the next token, not the divergence from the dense model
    """

    def __init__(self, passes: LayerPasses, fits: bool, by_label: bool) -> None:
        self.passes, self.fits, self.by_label = passes, fits, by_label
        self.dense = dense_streams(passes)
        self._path: _Path | None = None  # of the set that was tried last
        self._writers: dict[int, Writer | None] = {}
        self._logits: dict[int, Tensor] = {}  # of the dense model, by batch

    def loss(self, removed: Set) -> float:
        """Of the predictions without these layers; lower is better."""
        return self._loss(self._last_streams(removed, self.fits), self.by_label)

    def divergence(self, removed: Set) -> dict[str, float]:
        """From the dense predictions, with nothing fitted and, where that is asked for, after."""
        found = {"removed": self._loss(self._last_streams(removed, False), False)}
        if self.fits:
            found["left"] = self._loss(self._last_streams(removed, True), False)
        return found

    def _last_streams(self, removed: Set, fits: bool) -> list[Tensor]:
        passes, length = self.passes, len(self.passes.layers)
        first = _first_fitted(removed) if fits else removed[0]
        kept_layers = [i for i in range(first, length) if i not in removed]
        steps = [(i, _next_kept(i, removed, length)) for i in kept_layers]
        # what is as in the set before need not run again
        known = self._path if fits else None
        same = 0
        if known is not None and known.steps[:1] == steps[:1]:
            while same < min(len(steps), len(known.steps)) and known.steps[same] == steps[same]:
                same += 1
        streams = known.streams[: same + 1] if known is not None and same else [self.dense[first]]
        for index, behind in steps[same:]:
            small = streams[-1]
            if fits:
                if index not in self._writers:
                    self._writers[index] = passes.writer(index, self.dense[index][0])
                writer = self._writers[index]
                fit = LayerTask(passes, index, small, self.dense[behind]).stand_in(writer)
                small = fit.streams(fit.tried)
            else:
                small = [kept(passes.behind(index, i, s)) for i, s in enumerate(small)]
            streams.append(small)
        if fits:
            self._path = _Path(steps, streams)
        return streams[-1]

    def _loss(self, streams: Sequence[Tensor], by_label: bool) -> float:
        total, count = 0.0, 0.0
        for i, stream in enumerate(streams):
            rows, mask = self._judges(i), self.passes.mask(i)
            mask = None if mask is None else mask[rows]
            logits = self.passes.logits(i, stream[rows.to(stream.device)], rows)
            if by_label:
                ids = self.passes.batches[i]["input_ids"].to(logits.device)[rows]
                each = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
                mask = None if mask is None else mask[:, 1:] & mask[:, :-1]
            else:
                each = divergences(self._predicted(i, rows).to(logits.device), logits)
            each = each if mask is None else each[mask]
            total, count = total + float(each.double().sum()), count + each.numel()
        total, count = distributed.total("loss without some layers", total, count)
        loss = total / max(count, 1.0)
        return loss if math.isfinite(loss) else math.inf

    def _judges(self, batch: int) -> Tensor:
        """Numbers of the rows that a set is judged by: those that no fit has seen, if any."""
        every = torch.ones_like(self.passes.aside(batch)[:, 0])
        held = self.fits and self.passes.holds_back
        return (self.passes.aside(batch)[:, 0] if held else every).nonzero()[:, 0]

    def _predicted(self, batch: int, rows: Tensor) -> Tensor:
        """Logits of the dense model for rows of a batch; kept, unless they take much memory."""
        if batch in self._logits:
            return self._logits[batch]
        dense = self.dense[-1][batch]
        logits = self.passes.logits(batch, dense[rows.to(dense.device)], rows)
        if logits.nbytes * len(self.dense[-1]) <= _LOGITS_KEPT:
            self._logits[batch] = kept(logits)
        return logits


def _first_fitted(removed: Set) -> int:
    """The layer before the first gap, which takes over first; 0 where the gap begins the model."""
    return max(removed[0] - 1, 0)


def _next_kept(index: int, removed: Set, length: int) -> int:
    """The first kept layer behind a layer, the model's length where there is none."""
    return next((i for i in range(index + 1, length) if i not in removed), length)


def _first_tokens(batches: Sequence[Any], tokens: int) -> list[Any]:
    """The first batches that hold so many positions together; the last of them may be cut."""
    found: list[Any] = []
    left = tokens
    for batch in batches:
        ids = batch["input_ids"]
        rows = min(len(ids), max(1, -(-left // ids.shape[1])))
        found.append({k: _rows(v, len(ids), rows) for k, v in batch.items()})
        left -= rows * ids.shape[1]
        if left <= 0:
            break
    return found


def _rows(value: Any, all_rows: int, rows: int) -> Any:
    of_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == all_rows
    return value[:rows] if of_rows else value


def _stream_error(passes: LayerPasses, dense: Sequence[Tensor], small: Sequence[Tensor]) -> float:
    """Squared error over the square of the dense stream, each token weighted by the latter."""
    wrong = count = 0.0
    for i, target in enumerate(dense):
        mask = passes.mask(i)
        target, found = target.to(passes.device), small[i].to(passes.device)
        error = (target.float() - found.float()).square().mean(-1) * token_weights(target)
        error = error if mask is None else error[mask]
        wrong, count = wrong + float(error.double().sum()), count + error.numel()
    wrong, count = distributed.total("error of the stream", wrong, count)
    return wrong / max(count, 1.0)


def remove_layers(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> LayerRemovalResult:
    """Remove layers from a model, in place; its config follows.

    :param model: transformers model
    :param batches: what the model's forward takes; None for settings that need no data
    :param settings: fields of :class:`sparsessm_plugin.LayerRemovalModifier`, such as ``keep``
    :return: the layers that went, and the config fields of what remains
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    method = LayerRemoval(LayerSettings.of("remove_layers", settings), "remove_layers")
    run(method, model, batches)
    return method.result()

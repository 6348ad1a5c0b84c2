"""Remove intermediate units of MLPs, or kv groups of attention, from every layer alike."""

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.passes import layer_by_layer
from sparsessm_plugin.criteria.units import UNIT_CRITERIA
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter, UnitBlock, get_model_adapter
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.methods.model_removal import ModelRemoval, ModelRemovalSettings
from sparsessm_plugin.methods.removal import RemovalResult, Removed, usual_multiple
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.refit.channels import LinearTerm, eliminate_blocks, refit
from sparsessm_plugin.training.distillation import Weights

_RIDGE = 1e-2


class UnitSettings(ModelRemovalSettings):
    """What the removals of units share."""

    fitted_by_default: ClassVar[Weights] = "all"  # every part of the model has changed

    saliency: str = "output_energy"
    compensate: list[Any] | None = None

    @field_validator("saliency")
    @classmethod
    def _check_saliency(cls, value: str) -> str:
        return UNIT_CRITERIA.check(value)

    @property
    def axis_name(self) -> str:
        """The axis of the model that becomes shorter."""
        raise NotImplementedError

    @property
    def multiple(self) -> int:
        """What the kept number must be a multiple of, where it was asked for."""
        return 1

    @property
    def fits(self) -> bool:
        """Whether what reads the units is fitted again."""
        return self.compensate != []

    @property
    def looks_at_inputs(self) -> bool:
        """Whether units are chosen, or what reads them fitted, by data."""
        return UNIT_CRITERIA[self.saliency].score is None or self.fits

    @property
    def reads_data(self) -> bool:
        return self.looks_at_inputs or self.distills


class MLPSettings(UnitSettings):
    """The fields of :class:`sparsessm_plugin.MLPRemovalModifier`, which describes them."""

    axis: Literal["mlp", "experts", "shared_experts"] = "mlp"
    multiple_of: int | None = Field(default=None, ge=1)
    compensate: list[Literal["down_proj"]] | None = None

    @property
    def axis_name(self) -> str:
        return self.axis

    @property
    def multiple(self) -> int:
        return self.multiple_of or 1

    def kept(self, length: int) -> int:
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        multiple = self.multiple_of or usual_multiple(length)
        return round(length * (1 - self.sparsity) / multiple) * multiple


class AttentionSettings(UnitSettings):
    """The fields of :class:`sparsessm_plugin.AttentionRemovalModifier`, which describes them."""

    compensate: list[Literal["o_proj"]] | None = None

    @property
    def axis_name(self) -> str:
        return "kv_groups"


class UnitRemoval(ModelRemoval[UnitSettings]):
    """Removes the units that the weights which read them can do without best.

    Layer by layer, each with the inputs that the smaller layers before it give. Every layer
    keeps as many, since a config says one number.
    """

    changes_inputs: ClassVar[bool] = True

    # -- which models ----------------------------------------------------------------

    def check_sizes(self, adapter: ModelAdapter) -> None:
        settings, who = self.settings, self.who
        axis = settings.axis_name
        try:
            length = adapter.axis_length(axis)
        except SparseSSMError as error:
            raise SparseSSMError(f"{who}: {error}") from error
        keep = self.check_keep(adapter.name, axis, length)
        if settings.keep is not None and keep % settings.multiple:
            raise SparseSSMError(f"{who}: keep = {keep} is no multiple of {settings.multiple}")
        try:
            adapter.unit_field_values(axis, keep)
        except SparseSSMError as error:
            raise SparseSSMError(f"{who}: {error}") from error
        if settings.looks_at_inputs:
            for block in adapter.blocks(axis):
                if _reader(adapter.model, block) is None:
                    raise SparseSSMError(
                        f"{who}: {block.name} holds its experts in one tensor, whose inputs "
                        "cannot be seen one by one; give saliency magnitude, last or random, and "
                        "compensate none"
                    )

    def kept_sizes(self, adapter: ModelAdapter) -> dict[str, int]:
        axis = self.settings.axis_name
        return {axis: self.settings.kept(adapter.axis_length(axis))}

    def written(self, adapter: ModelAdapter) -> frozenset[str]:
        if not self.settings.fits:
            return frozenset()
        blocks = adapter.blocks(self.settings.axis_name)
        return frozenset(where.tensor for block in blocks for where in block.columns)

    # -- the work --------------------------------------------------------------------

    def remove(self, model: Any, batches: Sequence[Any]) -> list[Removed]:
        adapter = get_model_adapter(model)
        axis = self.settings.axis_name
        blocks = {block.name: block for block in adapter.blocks(axis)}
        keep = self.settings.kept(adapter.axis_length(axis))
        removed: dict[str, Removed] = {}
        if not self.settings.looks_at_inputs:
            for name, block in blocks.items():
                removed[name] = self._remove_from(block, keep, None)
        else:
            self._look(model, batches, blocks, keep, removed)
        self.prune(axis, {name: entry.removed for name, entry in removed.items()})
        return [removed[name] for name in blocks]

    def _look(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Any]],
        blocks: Mapping[str, UnitBlock],
        keep: int,
        removed: dict[str, Removed],
    ) -> None:
        """Choose and fit in one layer after the other."""
        readers = {name: _reader(model, block) for name, block in blocks.items()}
        grams = {
            name: torch.zeros(
                reader.in_features, reader.in_features, dtype=torch.float64, device=self.device
            )
            for name, reader in readers.items()
        }
        mask: list[Tensor | None] = [None]

        def at_batch(index: int) -> None:
            given = batches[index].get("attention_mask")
            if given is not None:
                given = None if bool(given.all()) else given.bool().to(self.device)
            mask[0] = given

        def see(name: str, module: nn.Module, args: Any) -> None:
            if name not in grams:  # a layer runs once more when it is through
                return
            x = args[0].float()
            # experts get their tokens without the padding's places
            x = x.flatten(0, -2) if mask[0] is None or x.ndim < 3 else x[mask[0]]
            grams[name] += (x.T @ x).double()

        def done(modules: Sequence[nn.Module]) -> None:
            through = {id(module) for module in modules}
            for name in [n for n in grams if id(readers[n]) in through]:
                gram = distributed.reduce_sum(f"sums of {name}", {"gram": grams.pop(name)})["gram"]
                if not bool(torch.isfinite(gram).all()):
                    raise SparseSSMError(
                        f"{name}: NaN or infinite values during calibration; nothing was removed "
                        "from this layer"
                    )
                removed[name] = self._remove_from(blocks[name], keep, gram)

        handles = [
            reader.register_forward_pre_hook(partial(see, name)) for name, reader in readers.items()
        ]
        try:
            with fast_forward(model):
                layer_by_layer(model, batches, at_batch, done)
        finally:
            for handle in handles:
                handle.remove()

    def _remove_from(self, block: UnitBlock, keep: int, gram: Tensor | None) -> Removed:
        """Choose in one module, and fit what reads its units; those that go read zero."""
        started, count = time.perf_counter(), block.length - keep
        score = UNIT_CRITERIA[self.settings.saliency].score
        entries = torch.tensor(
            [block.columns[0].positions([i]) for i in range(block.length)], device=self.device
        )
        reader = _reader(self._model, block)
        weight = None if reader is None else reader.weight.detach().double()

        def choose() -> list[Tensor]:
            if score is not None:
                order = score(self._model, block).argsort(stable=True)
                return [order[:count].sort().values]
            assert gram is not None
            assert weight is not None
            return [torch.tensor(eliminate_blocks([LinearTerm(gram, weight)], entries, count))]

        gone = distributed.share(f"units of {block.name}", choose)[0].tolist()
        error_removed = error_left = None
        if gram is not None and weight is not None:
            kept = torch.ones(entries.numel(), dtype=torch.bool, device=self.device)
            kept[entries[gone].flatten()] = False
            new = weight * kept
            energy = _energy(weight, gram)
            error_removed = error_left = _energy(weight - new, gram) / energy
            if self.settings.fits:
                index = kept.nonzero().flatten()
                new[:, index] = refit(gram, weight, index, _RIDGE)
                error_left = _energy(weight - new, gram) / energy
            self.changes_weights()
            reader.weight.copy_(new.to(reader.weight.dtype))
        return Removed(
            name=block.name,
            axis=block.kind,
            before=block.length,
            after=keep,
            removed=gone,
            tokens=self.tokens,
            error_removed=error_removed,
            error_left=error_left,
            diverged=None,
            seconds=round(time.perf_counter() - started, 3),
        )


def _reader(model: Any, block: UnitBlock) -> Any:
    """The linear layer that reads the units of a block; None where it is none."""
    name, _, leaf = block.columns[0].tensor.rpartition(".")
    module = model.get_submodule(name)
    return module if leaf == "weight" and isinstance(module, nn.Linear) else None


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Sum of squares of what a weight (out, in) makes of inputs of this Gram matrix (in, in)."""
    return float(((weight @ gram) * weight).sum().clamp(min=1e-300))


def remove_units(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> RemovalResult:
    """Remove intermediate units from all MLPs of a model, in place.

    :param model: transformers model with lm_head; its config follows
    :param batches: what the model's forward takes; None for settings that need no data
    :param settings: fields of :class:`sparsessm_plugin.MLPRemovalModifier`, such as ``keep``
    :return: one entry an MLP, and the config fields of the new size
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    method = UnitRemoval(MLPSettings.of("remove_units", settings), "remove_units")
    run(method, model, batches)
    return method.result()


def remove_kv_groups(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> RemovalResult:
    """Remove key and value heads with their queries from all attention of a model, in place.

    :param model: transformers model with lm_head; its config follows
    :param batches: what the model's forward takes; None for settings that need no data
    :param settings: fields of :class:`sparsessm_plugin.AttentionRemovalModifier`, such as ``keep``
    :return: one entry an attention module, and the config fields of the new size
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    method = UnitRemoval(AttentionSettings.of("remove_kv_groups", settings), "remove_kv_groups")
    run(method, model, batches)
    return method.result()

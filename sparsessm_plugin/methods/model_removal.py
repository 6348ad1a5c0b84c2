"""What the methods that remove along an axis of the whole model share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal, TypeVar

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger
from pydantic import Field
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.contexts import of_quantization, undisturbed
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.checkpoints.runtimes import ModelFacts
from sparsessm_plugin.dependency_graph import ModelAxisGroup, ModelDependencyGraph
from sparsessm_plugin.dependency_graph.model_graph import Indices
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import (
    MixerAdapter,
    ModelAdapter,
    check_not_quantized,
    find_mixers,
    get_model_adapter,
)
from sparsessm_plugin.methods.base import MixerMethod, Watch
from sparsessm_plugin.methods.removal import (
    RemovalResult,
    RemovalSettings,
    RemovalTotal,
    Removed,
    quantized_modules,
)
from sparsessm_plugin.methods.runtime_sizes import (
    check_dense,
    nearest_fit,
    new_limits,
    planned_model,
    refusal,
    smaller_model,
)
from sparsessm_plugin.training.distillation import Distillation, Distilled, Weights
from sparsessm_plugin.training.gradients import on_compute_device, single_device

_SIZES_TRIED = 16  # each is a model on the meta device


class ModelRemovalSettings(RemovalSettings):
    """How much of an axis is removed, over which batches, and how long the rest is distilled."""

    # measured: what embeds and predicts tokens is learnt by heart where it has not changed
    fitted_by_default: ClassVar[Weights] = "all_but_vocabulary"

    keep: int | None = Field(default=None, ge=1)
    distill_learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    distill_optimizer: Literal["auto", "adam", "muon"] = "auto"

    @property
    def watches_data(self) -> bool:
        """All passes are its own."""
        return False

    @property
    def reads_data(self) -> bool:
        """Whether anything is chosen or fitted by data."""
        return True

    def kept(self, length: int) -> int:
        """How many of so many indices stay, by ``keep`` or by ``sparsity``."""
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        return round(length * (1 - self.sparsity))


S = TypeVar("S", bound=ModelRemovalSettings)


class ModelRemoval(MixerMethod[S]):
    """Removes indices of an axis of :class:`ModelDependencyGraph` from a whole model.

    All is done when calibration begins, in passes of its own over the model, which is held on
    the device where it computes. Subclasses implement :meth:`remove`, which chooses, fits and
    calls :meth:`prune`. With ``distill_steps`` or
    ``distill_minutes`` what remains is then fitted to what the dense
    model predicted for the calibration data.

    Attributes: ``resizing``, a context around the model's change, set by whoever drives it;
    ``config_fields``, what the config says of the new sizes.
    """

    needs_whole_model: ClassVar[bool] = True

    changes_inputs: ClassVar[bool] = False  # whether weights that stay lose columns

    def __init__(self, settings: S, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._asked = settings  # beside what the runtimes make of them
        self.resizing: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
        self.config_fields: dict[str, Any] = {}
        self.tokens = 0  # of the calibration, of all ranks
        self.device = torch.device("cpu")  # where the model computes, while it is worked on
        self._graph: ModelDependencyGraph | None = None
        self._removed: list[Removed] = []
        self._distillation: Distillation | None = None
        self._distilled: Distilled | None = None
        self._weights_changed = False
        self._pruned = False  # and so of other sizes

    # -- for subclasses --------------------------------------------------------------

    def check_sizes(self, adapter: ModelAdapter) -> None:
        """Refuse a model that the settings do not fit, by names and shapes alone.

        :raises SparseSSMError: naming the field, its value and what is allowed
        """

    def kept_sizes(self, adapter: ModelAdapter) -> dict[str, int]:
        """How many indices of each axis of the model stay that the settings shrink."""
        raise NotImplementedError

    def written(self, adapter: ModelAdapter) -> frozenset[str]:
        """Names of the weights of the dense model that are fitted; distillation apart."""
        return frozenset(name for name, _ in adapter.model.named_parameters())

    def remove(self, model: Any, batches: Sequence[Any]) -> list[Removed]:
        """Choose what goes, fit what stays, and :meth:`prune`.

        No gradients, hooks, caches or quantization, and all weights on ``self.device``.
        Several ranks come here together, each with batches of its own: sums are to be reduced and
        choices shared. Afterwards all ranks get the weights of rank 0.

        :param model: to be changed in place; call :meth:`changes_weights` before the first change
        :param batches: the first ``calibration_batches``; none where no data is read
        :return: what went, one entry a module, or one for the whole model
        """
        raise NotImplementedError

    @property
    def graph(self) -> ModelDependencyGraph:
        """Of the model as it is now; traced when a group is first asked for."""
        if self._graph is None:
            self._graph = ModelDependencyGraph(self._model)
        return self._graph

    def changes_weights(self) -> None:
        """From now on an error leaves the model changed."""
        self._weights_changed = True

    def prune(
        self, axis: str, removed: Indices, channels: Any = None, along: str | None = None
    ) -> ModelAxisGroup:
        """Remove indices of an axis from the model; see :class:`ModelDependencyGraph`.

        :raises SparseSSMError: what the family's loader could not make; nothing is changed
        """
        group = self.graph.get_axis_group(axis, removed, channels, along)
        logger.debug(str(group))
        self._pruned = True  # in part, if it fails half way
        group.prune()
        self.config_fields |= group.config_fields
        _hold_on(self._model, self.device)  # an offloaded module keeps new tensors elsewhere
        return group

    def dense_predictions(self) -> Distillation | None:
        """What the distillation needs of the dense model; None where no steps are asked for."""
        return self.settings.distillation(self._model, self.batches)

    def distill(self, distillation: Distillation) -> Distilled:
        """Fit what remains to the dense predictions."""
        return self.settings.distill(distillation, self._model)

    # -- which models ----------------------------------------------------------------

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """All mixers of a model that the settings fit.

        :raises SparseSSMError: see :meth:`check_sizes`; a model whose layers nobody knows, or
            that is stored quantized
        """
        check_not_quantized(model)
        find_mixers(model)  # raises, and says which are known, where there are none
        adapter = get_model_adapter(model)
        self.settings = self._asked
        if self.settings.runtime:
            self._fit_runtimes(adapter)
        self.check_sizes(adapter)
        return find_mixers(model)

    def planned(self, model: nn.Module) -> nn.Module:
        """What becomes of a model, on the meta device.

        :raises SparseSSMError: see :meth:`matching_mixers`
        """
        self.matching_mixers(model)
        kept = self.kept_sizes(get_model_adapter(model))
        # which layers go is not known yet, and no runtime asks for a number of them
        return model if "layers" in kept else smaller_model(model, kept)

    def _fit_runtimes(self, adapter: ModelAdapter) -> None:
        """Let the settings keep a number that all runtimes take: the next one to a sparsity.

        :raises SparseSSMError: there is none near, or ``keep`` is none
        """
        asked, names = self._asked, self._asked.runtime
        self.check_sizes(adapter)
        dense = ModelFacts.from_model(adapter.model)
        check_dense(self.who, names, dense)
        kept = self.kept_sizes(adapter)
        axis, wanted = next(iter(kept.items()))  # the axis itself comes first
        if axis == "layers":
            return  # which go is not known yet, and no runtime asks for a number of them
        found = new_limits(names, dense, planned_model(adapter.model, kept))
        if not found:
            return

        def keeping(size: int) -> S:
            return asked.model_copy(update={"keep": size, "sparsity": None})

        def fits(size: int) -> bool:
            self.settings = keeping(size)
            try:
                self.check_sizes(adapter)
                smaller = planned_model(adapter.model, self.kept_sizes(adapter))
                return not new_limits(names, dense, smaller)
            except SparseSSMError:
                return False
            finally:
                self.settings = asked

        length = adapter.axis_length(axis)
        near = [s for s in range(1, length) if abs(s - wanted) <= max(length // 8, 1)]
        step = max(len(near) // _SIZES_TRIED, 1)
        tried = [size for size in near if (size - wanted) % step == 0]
        below, above = nearest_fit(wanted, tried, fits)
        fitting = [size for size in (above, below) if size is not None]
        if asked.keep is not None or not fitting:
            field = f"keep = {asked.keep}" if asked.keep is not None else f"{wanted} kept"
            raise SparseSSMError(refusal(self.who, field, found[0], (below, above)))
        chosen = min(fitting, key=lambda size: abs(size - wanted))
        logger.warning(
            f"{self.who}: {chosen} instead of {wanted} of {length} {axis} stay, for "
            f"{', '.join(names)}: {found[0][1].reason}"
        )
        self.settings = keeping(chosen)

    def check_keep(self, name: str, unit: str, length: int) -> int:
        """How many of the indices of an axis stay.

        :param name: of the model or module
        :param unit: what an index is, in the plural
        :param length: of the axis
        :raises SparseSSMError: all would stay, or none
        """
        keep = self.settings.kept(length)
        if 1 <= keep < length:
            return keep
        field = "keep" if self.settings.keep is not None else "sparsity"
        value = getattr(self.settings, field)
        what = "none" if keep >= length else "all"
        raise SparseSSMError(
            f"{self.who}: {field} = {value:g} removes {what} of the {length} {unit} of {name}; "
            + (f"keep 1 to {length - 1}" if length > 1 else "the only one has to stay")
        )

    def prepare(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if quantized_modules(module) == [module]:
                raise SparseSSMError(
                    f"{self.who}: {name} is quantized, or a modifier that comes earlier in the "
                    "recipe quantizes it; remove first, then quantize"
                )
        self.prepare_again(model)

    def prepare_again(self, model: nn.Module) -> None:
        # scales of a later quantization are there, unset, by now
        self.matching_mixers(model)
        with disable_onloading():
            for name, parameter in model.named_parameters():
                if not of_quantization(name) and not is_finite(parameter):
                    raise SparseSSMError(
                        f"{name} holds NaN or infinite values; nothing was removed"
                    )
        self._model = model

    # -- the work --------------------------------------------------------------------

    def foresee(self, batches: CalibrationBatches) -> None:
        self._batches = batches
        self._distillation = self.dense_predictions()

    def begin(self, batches: CalibrationBatches | None) -> list[Watch]:
        """Do all of it."""
        self._batches = batches
        self.cost.begin()
        try:
            with self._in_place():
                self._work()
        except Exception as error:
            if not (self._weights_changed or self._pruned):
                raise
            raise SparseSSMError(
                f"{error} - the model in memory is now {self.state_in_memory()}. Nothing was saved"
            ) from error
        finally:
            self.cost.end()
            self._distillation = self._graph = None
        return []

    def _work(self) -> None:
        model, settings = self._model, self.settings
        self.check_sizes(get_model_adapter(model))  # again: an earlier modifier may have shrunk it
        used: Sequence[Any] = []
        if settings.reads_data:
            used = self.batches[: settings.calibration_batches]
            self._count(used)
        if settings.distills and self._distillation is None:
            with self.cost.stage("dense predictions"):
                self._distillation = self.dense_predictions()
        with self.resizing(model), self.cost.stage("remove"):
            removed = self.remove(model, used)
            self._share_weights()
        self._removed = removed
        for entry in removed:
            logger.info(
                f"{entry.name}: removed {len(entry.removed)} of {entry.before} {entry.axis}"
            )
        if self._distillation is not None:
            with self.cost.stage("distill"):
                self._distilled = self.distill(self._distillation)

    def _count(self, batches: Sequence[Any]) -> None:
        """Count the tokens, and refuse data that has none."""
        for batch in batches:
            ids = batch["input_ids"]
            self.cost.count(self.who, ids[..., None], batch.get("attention_mask"))
        self.tokens = sum(distributed.gather(f"tokens of {self.who}", self.cost.tokens))
        if not self.tokens:
            raise SparseSSMError(f"{self.who} saw no calibration tokens; nothing was removed")

    def _share_weights(self) -> None:
        """Let all ranks have the weights of rank 0, and refuse any that are no numbers."""
        named = {n: p for n, p in self._model.named_parameters() if not of_quantization(n)}
        if distributed.is_distributed():
            shared = distributed.share(
                "weights of the smaller model", lambda: list(named.values()), device=self.device
            )
            for parameter, value in zip(named.values(), shared, strict=True):
                parameter.copy_(value)
        for name, parameter in named.items():
            if not is_finite(parameter):
                raise SparseSSMError(f"{name} became NaN or infinite while it was fitted")

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The whole model on one device, undisturbed; then what has become of it back home.

        An error leaves the weights as they were, if they were moved for the work and none of
        their sizes has changed.
        """
        model = self._model
        with disable_onloading(), undisturbed(model):
            home = single_device(self.who, model)
            try:
                with on_compute_device(self.who, model) as self.device:
                    if distributed.is_distributed() and self.device.type == home.type == "cpu":
                        _hold_apart(model)
                    try:
                        yield
                    except BaseException:
                        self._weights_changed &= self.device.type == home.type
                        raise
            finally:
                _hold_on(model, home)

    def state_in_memory(self) -> str:
        if self._removed:
            return "pruned and not distilled"
        if self._weights_changed or self._pruned:
            return "partly pruned and of no use; load it again"
        return "what it was"

    def result(self) -> RemovalResult:
        return RemovalResult(
            tuple(self._removed),
            RemovalTotal.of(self._removed),
            self.cost.to_dict(),
            self.config_fields,
            self._distilled,
        )

    def release(self) -> None:
        super().release()
        self._distillation = self._graph = None


def _hold_apart(model: nn.Module) -> None:
    """Give this rank memory of its own: LLM Compressor lets ranks share that of offloaded weights.

    What every rank changes in place would be changed as often as there are ranks. Tensors that
    share memory among themselves still do.
    """
    copies: dict[Any, Tensor] = {}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.data.clone()
        tensor.grad, tensor.data = None, copies[key]


def _hold_on(model: nn.Module, device: torch.device) -> None:
    """Let all weights and buffers lie on a device; those that do stay what they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device:
            tensor.grad, tensor.data = None, tensor.data.to(device)

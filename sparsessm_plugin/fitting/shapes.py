"""Models without weights, as their loaders make them from configs of smaller sizes."""

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsessm_plugin.checkpoints.loading import auto_class
from sparsessm_plugin.dependency_graph.config import set_language_fields
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter, get_model_adapter
from sparsessm_plugin.fitting.axes import Axis, in_order
from sparsessm_plugin.fitting.axes.layers import signatures

Sizes = Mapping[str, int]  # by axis; of an axis that is left out all stays
_LAYERS = "layers"


class Shapes:
    """What a model becomes at smaller sizes, on the meta device; each is made once.

    :param skeleton: the model as it is; its config says how it is loaded
    :param dtype: of its weights; default as the skeleton has them
    :param trust_remote_code: let the model's own code run
    :param runtime: that is to load the sizes, where they can be made in several ways
    """

    def __init__(
        self,
        skeleton: nn.Module,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        runtime: str = "transformers",
    ) -> None:
        self._config: Any = copy.deepcopy(skeleton.config)
        self._dtype = dtype or next(skeleton.parameters()).dtype
        self._trust_remote_code = trust_remote_code
        self._runtime = runtime
        self._made: dict[tuple[Any, ...], nn.Module] = {}
        self._ways: dict[tuple[str, int], dict[str, Any]] = {}

    def on(self, runtime: str) -> "Shapes":
        """The same for a runtime."""
        made = Shapes(self.dense, self._dtype, self._trust_remote_code, runtime)
        made._config = self._config
        return made

    def way(self, axis: Axis, size: int) -> dict[str, Any]:
        """More fields of the axis's modifier, by which the runtime takes a size.

        :raises SparseSSMError: the loader cannot make it
        """
        key = axis.name, size
        if key not in self._ways:
            self._ways[key] = axis.way(self.dense, size, self._runtime)
        return self._ways[key]

    @property
    def dense(self) -> nn.Module:
        """The model as it is."""
        return self.model({})

    def model(self, sizes: Sizes, kept: tuple[int, ...] | None = None) -> nn.Module:
        """The model of these sizes.

        :param sizes: by axis
        :param kept: indices of the layers that stay, where they are known
        :raises SparseSSMError: the loader cannot make it
        """
        model: nn.Module | None = None
        path: tuple[Any, ...] = ()
        for axis in in_order(sizes):
            size = sizes[axis.name]
            whole = model or self._make((), self._config)
            if axis.length(whole) in (size, None):  # it may have gone with the layers
                continue
            path = (*path, (axis.name, size, kept if axis.name == _LAYERS else None))
            if path in self._made:
                model = self._made[path]
                continue
            if axis.name == _LAYERS and kept is not None:
                fields = get_model_adapter(whole).layer_fields(kept)
            else:
                fields = axis.config_fields(whole, size, **self.way(axis, size))
            config = copy.deepcopy(whole.config)
            set_language_fields(config, fields)
            model = self._make(path, config)
        return model or self._make((), self._config)

    def random(
        self, sizes: Sizes, device: torch.device | str, kept: tuple[int, ...] | None = None
    ) -> nn.Module:
        """A model of these sizes with random weights on a device, to be timed."""
        config = copy.deepcopy(self.model(sizes, kept).config)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            return self._from_config(config).eval()

    def shallow(self, layers: int, rare: int = 1) -> "Shapes":
        """The same of a model that has only so many layers, all kinds among them.

        :param layers: how many
        :param rare: how many of each kind but the commonest
        :raises SparseSSMError: no config says so few
        """
        return self.only(_shallow(get_model_adapter(self.dense), layers, rare))

    def only(self, kept: tuple[int, ...]) -> "Shapes":
        """The same of a model that has only these layers.

        :raises SparseSSMError: no config says so
        """
        dense = self.dense
        adapter = get_model_adapter(dense)
        config = copy.deepcopy(self._config)
        set_language_fields(config, adapter.layer_fields(kept))
        made = self.on(self._runtime)
        made._config, made._ways = config, self._ways
        return made

    def like(self, model: Any) -> "Shapes":
        """Of what has become of the model, by its config."""
        made = self.on(self._runtime)
        made._config = copy.deepcopy(model.config)
        return made

    def _make(self, path: tuple[Any, ...], config: Any) -> nn.Module:
        if path not in self._made:
            with torch.device("meta"):
                self._made[path] = self._from_config(config)
        return self._made[path]

    def _from_config(self, config: Any) -> nn.Module:
        try:
            made: nn.Module = auto_class(config).from_config(
                config, dtype=self._dtype, trust_remote_code=self._trust_remote_code
            )
        except SparseSSMError:
            raise
        except Exception as error:  # transformers' own checks have many classes
            said = " ".join(str(error).split())[:200]
            raise SparseSSMError(f"transformers makes no model of these sizes: {said}") from error
        return made


def shallow_shapes(shapes: Shapes, depths: tuple[int, int]) -> list[Shapes]:
    """Models of a few layers that tell apart what layers of each kind take.

    Two depths with equally many layers of the rarer kinds, and the greater depth with one more of
    these: were their share the same in all, a model of another share could not be predicted.

    :param shapes: of the whole model
    :param depths: layers of the shallower and of the deeper ones
    :return: the first a deeper one with as few of the rarer kinds as there can be
    :raises SparseSSMError: no config says so few
    """
    low, high = depths
    adapter = get_model_adapter(shapes.dense)
    wanted = ((high, 1), (low, 1), (high, 2))
    kept = dict.fromkeys(_shallow(adapter, layers, rare) for layers, rare in wanted)
    return [shapes.only(layers) for layers in kept]


def _shallow(adapter: ModelAdapter, count: int, rare: int) -> tuple[int, ...]:
    """Indices of so many layers: a few of each rare kind, the rest of the commonest."""
    kinds = signatures(adapter)
    common = Counter(kinds).most_common(1)[0][0]
    chosen = [
        index
        for kind in dict.fromkeys(kinds)
        if kind != common
        for index in [i for i, own in enumerate(kinds) if own == kind][:rare]
    ]
    chosen += [i for i, kind in enumerate(kinds) if kind == common][: max(0, count - len(chosen))]
    refusal = SparseSSMError(f"{adapter.name}: no {count} layers can stay alone")
    for kept in (tuple(sorted(chosen)), tuple(range(count))):
        try:
            adapter.layer_fields(kept)
        except SparseSSMError as error:
            refusal = error
        else:
            return kept
    raise refusal

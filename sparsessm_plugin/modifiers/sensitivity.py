"""Prune projections from a recipe."""

from typing import Any, ClassVar

from llmcompressor.core import Event, State

from sparsessm_plugin.checkpoints.mtp import without_mtp
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.methods.base import MixerMethod
from sparsessm_plugin.methods.projections import ProjectionPruning, ProjectionSettings
from sparsessm_plugin.modifiers.base import MethodModifier


class SensitivitySparseGPTModifier(ProjectionSettings, MethodModifier):
    """Prunes the projections of every mixer, dt_proj and the convolution included.

    transformers never calls dt_proj and conv1d as modules, so LLM Compressor's own modifiers
    leave them dense without a word; here each gets the Hessian of what its weight multiplies. How
    many zeros a projection gets follows from its sensitivity. One-shot, without training.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            SensitivitySparseGPTModifier:
              sparsity: 0.5

    Lifecycle: see :class:`MethodModifier`. Unless nothing needs it, on_calibration_start runs the
    dense model over the data first; see :class:`ProjectionPruning`.

    :param sparsity: share of zeros in (0, 1), over all projections together; zeros of an earlier
        pruning stay and count. May be left out if ``mask_structure`` says it
    :param mask_structure: ``"0:0"`` unstructured, or ``"n:m"``: n zeros in every m inputs
    :param solver: ``alps`` (default) | ``sparsegpt`` | ``wanda`` | ``magnitude``; the last two
        leave the kept weights as they are
    :param allocation: ``uniform``: the same sparsity everywhere | ``paper``: SparseSSM, Eq. 7:
        in_proj and out_proj by rank of their Hessians' traces, all others alike | ``optimal``:
        least summed loss. Default optimal; uniform for n:m and for magnitude
    :param alpha: of ``paper``: how far a projection's sparsity may be from the mean
    :param target_output: what a projection of a mixer is to reproduce from the inputs that
        everything pruned before it leaves: ``own``: what the dense weight makes of these |
        ``mixer``: what it gives in the dense mixer behind the pruned layers | ``dense``: what it
        gives in the dense model | ``half_way``: the mean of own and dense. Default mixer for alps
        and sparsegpt. dense and half_way keep every mixer's dense input in main memory: layers x
        tokens x hidden_size numbers. Linear layers elsewhere have ``own``
    :param targets: mixers, their projections, or Linear layers elsewhere, by name, class name,
        ``re:`` pattern, or the projection's bare name such as ``in_proj``; a mixer stands for all
        its projections. Default all projections of all mixers; with n:m all but conv1d, whose
        zeros no kernel skips: ``re:.*mixer$`` or the mixers' class name names that, too. A weight
        that several layers share, as the attention blocks of Zamba do, is pruned once, after its
        last use, by the sum of their Hessians
    :param ignore: what to leave alone, likewise; of layers that share a weight, all with one
    :param block_size: columns whose mask SparseGPT chooses together
    :param dampening_frac: added to each Hessian's diagonal, of its mean
    :param permute_channels: with n:m, first put channels, entries of the residual stream and
        units of MLPs into an order whose groups of m lose little. All tensors with these follow,
        and the dense model computes the same; what was made for the order before, such as a LoRA
        adapter in a file of its own, no longer fits. Weights that hold n:m zeros already keep
        their order. Default true with n:m
    :param offload_hessians: keep all Hessians in main memory between batches: slower. By default
        those wait there that would leave less than half of the accelerator's free
    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[MixerMethod]] = ProjectionPruning

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        moved = any(axis.moves_stream for axis in self._method.permuted)
        if moved and hasattr(state.model, "save_pretrained"):
            what = "order of the residual stream"
            change_config(state.model, without_mtp(state.model, what))

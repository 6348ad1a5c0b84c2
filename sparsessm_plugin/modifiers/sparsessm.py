"""Prune A_log from a recipe."""

from typing import ClassVar

from sparsessm_plugin.methods.base import MixerMethod
from sparsessm_plugin.methods.transitions import TransitionPruning, TransitionSettings
from sparsessm_plugin.modifiers.base import MethodModifier


class SparseSSMModifier(TransitionSettings, MethodModifier):
    """Prunes the entries of A_log that matter least for the mixer's output.

    For mixers with an entry of A_log for every channel and state: Mamba, FalconMamba, Jamba,
    Zamba.
    A = -exp(A_log) is shared by all time steps, so an entry is judged by what it does over
    a whole sequence. One-shot, without training; layers are pruned one after the other, each
    with what the pruned layers before it produce (sequential pipeline), or all at once
    (basic pipeline).

    Sample yaml::

        prune_stage:
          prune_modifiers:
            SparseSSMModifier:
              sparsity: 0.5
              saliency: output_error
              pruned_value: zero

    Lifecycle: see :class:`MethodModifier`.

    :param sparsity: share of each layer's entries to prune, in (0, 1); exactly
        ``round(sparsity * D * N)`` entries
    :param mask_structure: ``"N:M"`` instead of ``sparsity``: N pruned entries in every M
        consecutive states of a channel
    :param saliency: ``output_error`` (default): squared change of the gated scan output when
        the entry alone is pruned; ``hessian``: SparseSSM's paper; ``transition``: its authors'
        published code; ``magnitude``: abs(A_log), needs no data
    :param aggregation: over time: ``frequency`` | ``time_weighted`` | ``mean`` | ``l2``; by
        default frequency for hessian, time_weighted for transition, mean for output_error
    :param decay: weights of ``time_weighted``: ``power`` (t+1)^-p | ``discount`` gamma^t |
        ``linear`` L-t | ``window`` the first share of the steps
    :param decay_power: p of ``power``
    :param decay_gamma: gamma of ``discount``, in (0, 1]
    :param decay_window: share of the steps of ``window``, in (0, 1]
    :param pruned_value: ``zero`` stores A_log = 0, so that every runtime computes A = -1;
        ``memoryless`` stores 38, so that the entry's state keeps nothing from step to step
    :param targets: mixers to prune, by name, class name or ``re:`` pattern; default all
    :param ignore: mixers to leave alone, likewise
    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[MixerMethod]] = TransitionPruning

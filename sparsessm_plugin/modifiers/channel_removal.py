"""Remove channels, heads or channels of every head from a recipe."""

from typing import Any, ClassVar

from sparsessm_plugin.methods.channels import ChannelRemoval, ChannelSettings
from sparsessm_plugin.methods.removal import MixerRemoval
from sparsessm_plugin.modifiers.removal import RemovalModifier


class ChannelRemovalModifier(ChannelSettings, RemovalModifier):
    """Removes the channels that out_proj and x_proj can do without best, from every mixer alike.

    in_proj, conv1d, x_proj, dt_proj, A_log, D, norms and out_proj all become smaller, so this
    is what makes a whole model faster. Channels are judged together: greedy elimination of the
    cost that remains once out_proj (and x_proj) are fitted again, which then happens. Of
    ``head_dim`` every head loses as many channels, each its own (by one score of ``saliency``, all
    the same).

    Sample yaml::

        prune_stage:
          prune_modifiers:
            ChannelRemovalModifier:
              sparsity: 0.25

    Lifecycle: see :class:`MethodModifier`; inputs of a mixer are kept until it is pruned.

    :param sparsity: share of the channels to remove, in (0, 1), rounded so that what stays is
        a multiple of ``multiple_of``
    :param keep: channels, heads or channels a head that stay, instead of ``sparsity``
    :param axis: ``channels`` (Mamba-1), ``heads`` or ``head_dim`` (Mamba-2), ``value_heads`` or
        ``value_dims`` (gated delta nets); default: channels, head_dim and value_dims
    :param multiple_of: what the kept size is a multiple of; default 64 channels, 8 for
        head_dim and value_dims, the number of groups for heads
    :param saliency: ``output_energy`` (default); for comparison ``magnitude`` (norm of all
        weights of a channel) and ``out_proj_norm`` (norm of its column of out_proj)
    :param compensate: any of ``x_proj``, ``out_proj``; ``none``; default all that there are
    :param runtime: one or several of :data:`checkpoints.runtimes.RUNTIMES`: a ``keep`` that they
        do not take is refused, a ``sparsity`` leaves the nearest size that they take
    :param calibration_batches: layers are looked at and fitted over so many batches, the first
        (of each rank's); default all
    :param distill_steps: gradient steps on the weights towards the dense model's predictions of the
        calibration data, after the last layer; 0 is none
    :param distill_minutes: instead, or at most, so many minutes of them; 0 is no limit
    :param distill_learning_rate: the highest
    :param distill_optimizer: ``adam``, ``muon`` for the matrices of linear layers, or ``auto``:
        Muon where a step reads at least 8,192 tokens
    :param distill_weights: ``mixers`` (default); ``all``; ``all_but_vocabulary``
    :param distill_checkpointing: compute layers twice instead of keeping what they made; default
        ``auto``, by the memory that is free
    :param distill_precision: of a float32 model's matrix products: ``float32``, ``bfloat16``;
        default ``auto``, bfloat16 on GPUs
    :param distill_generated: tokens of text that the dense model writes itself, to be distilled on
        beside the calibration text; 0, the default, is none
    :param distill_resume: file by which a run goes on that was interrupted in these steps
    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[MixerRemoval[Any]]] = ChannelRemoval

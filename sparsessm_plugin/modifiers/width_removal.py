"""Make the residual stream narrower from a recipe."""

from typing import Any, ClassVar

from sparsessm_plugin.methods.model_removal import ModelRemoval
from sparsessm_plugin.methods.width_removal import WidthRemoval, WidthSettings
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier


class WidthRemovalModifier(WidthSettings, ModelRemovalModifier):
    """Makes the hidden size smaller: the stream keeps the subspace that predictions need most.

    The whole model is rotated once, embeddings, norms and everything that reads or writes the
    stream, so that what stays are its first entries; weights that read it are fitted to what
    they read before, and norms are rescaled. A tied head stays tied. Where a loader ties
    channels and hidden size (Mamba2, Bamba, Zamba, Zamba2, GraniteMoeHybrid, Jamba), all
    channels stay if their number is a multiple of the new size. Otherwise every head loses
    channels of its own and all heads stay; or, where their channels do not divide or a runtime
    wants it, whole heads go. In the Mamba-1 layout channels go. All are chosen and fitted as by
    ChannelRemovalModifier.

    All is done when calibration starts, in passes with and without gradients that this modifier
    makes itself. Beside the model: for each norm two float64 matrices of hidden_size squared.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            WidthRemovalModifier:
              sparsity: 0.25

    Lifecycle: see :class:`ModelRemovalModifier`.

    :param sparsity: share of the hidden size to remove, in (0, 1), rounded so that what stays is
        a multiple of ``multiple_of``
    :param keep: hidden size that stays, instead of ``sparsity``
    :param multiple_of: what the kept size is a multiple of; default 64, or the largest power
        of 2 below it that divides a quarter of the hidden size
    :param saliency: ``output_energy`` (default): what the predictions lose at all norms together,
        to second order; for comparison ``magnitude`` (norm of all weights of an entry), ``last``
        and ``random``
    :param rotate: whether any subspace may stay, or entries of the stream as they are; default
        true for ``output_energy``
    :param channels: ``kept``, ``head_dim``, ``heads`` or ``along``, where the loader ties them to
        the hidden size: all stay; as many channels of every head go; whole heads go; one of these
        two, or channels in the Mamba-1 layout. Default: ``kept`` if it can be, else ``along``. Of
        what is open, the first that causal-conv1d and ``runtime`` take, in this order
    :param compensate: any of ``readers`` (weights that read the stream) and ``out_proj`` (of
        mixers whose channels go along); ``none``; default both
    :param runtime: one or several of :data:`checkpoints.runtimes.RUNTIMES`: a ``keep`` that they
        do not take is refused, a ``sparsity`` leaves the nearest size that they take
    :param calibration_batches: batches that are looked at, the first (of each rank's); default
        all
    :param distill_steps: gradient steps towards the dense model's predictions of the calibration
        data, after the removal; 0 is none
    :param distill_minutes: instead, or at most, so many minutes of them
    :param distill_learning_rate: the highest
    :param distill_optimizer: ``adam``, ``muon`` for the matrices of linear layers, or ``auto``:
        Muon where a step reads at least 8,192 tokens
    :param distill_weights: which are fitted: ``all`` (default); ``mixers``; ``all_but_vocabulary``
    :param distill_checkpointing: compute layers twice instead of keeping what they made; default
        ``auto``, by the memory that is free
    :param distill_precision: of a float32 model's matrix products: ``float32``, ``bfloat16``;
        default ``auto``, bfloat16 on GPUs
    :param distill_generated: tokens of text that the dense model writes itself, to be distilled on
        beside the calibration text; 0, the default, is none
    :param distill_resume: file by which a run goes on that was interrupted in these steps
    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[ModelRemoval[Any]]] = WidthRemoval

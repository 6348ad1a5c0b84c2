"""Remove state dimensions from a recipe."""

from typing import Any, ClassVar

from sparsessm_plugin.methods.removal import MixerRemoval
from sparsessm_plugin.methods.state_settings import StateSettings
from sparsessm_plugin.methods.states import StateRemoval
from sparsessm_plugin.modifiers.removal import RemovalModifier


class StateRemovalModifier(StateSettings, RemovalModifier):
    """Removes the states that matter least for the mixer's output, from every mixer alike.

    A_log (Mamba-1), B and C lose the same states, so that a smaller dense model remains, which
    stock runtimes load. Of gated delta nets queries and keys lose the same key dims. What the
    removed states did is then fitted, layer by layer on the calibration text and without labels,
    into weights that stay.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            StateRemovalModifier:
              sparsity: 0.5

    Lifecycle: see :class:`MethodModifier`. Inputs of a mixer are kept in memory until it is
    pruned: one mixer's at a time in the sequential pipeline, all in the basic one.

    :param keep: states that stay, in each group; one number for the whole model, because the
        loaders read one from the config
    :param sparsity: share of the states to remove, instead of ``keep``, in (0, 1)
    :param saliency: ``output_energy`` (default): the squared change of the output that a set
        of states makes together; for comparison ``magnitude`` (row norms of B and C), ``last``,
        ``paper`` (the vote of SparseSSM's code), ``ghost`` (after arXiv 2602.11408); for key dims
        ``magnitude``, ``last``, ``random``, ``qk`` (E |q k|), ``pairs`` (products over pairs of
        steps), ``rrqr`` (after arXiv 2602.04852)
    :param compensate: any of ``D``; ``C`` and with it ``B`` (rows as mixtures of the old ones,
        by least squares; Mamba-1 layout without a norm on them, B for up to 16 states);
        ``reconstruct`` (gradient steps on the rows of B and C and on out_proj, against the
        layer's own dense output); ``out_proj`` (linear regression); ``none``; default: D, C, B
        and out_proj where C can be mixed, D and out_proj where B and C are normalised, D,
        reconstruct and out_proj for the Mamba-2 layout, reconstruct (of q, k, beta, decay and
        out_proj) and out_proj for gated delta nets
    :param reconstruct_steps: gradient steps of ``reconstruct`` for each layer
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

    method_class: ClassVar[type[MixerRemoval[Any]]] = StateRemoval

"""Remove intermediate units of MLPs and kv groups of attention from a recipe."""

from typing import Any, ClassVar

from sparsessm_plugin.methods.model_removal import ModelRemoval
from sparsessm_plugin.methods.unit_removal import AttentionSettings, MLPSettings, UnitRemoval
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier


class MLPRemovalModifier(MLPSettings, ModelRemovalModifier):
    """Removes the intermediate units that down_proj can do without best, from every MLP alike.

    Units are judged together: greedy elimination of the cost that remains once down_proj is
    fitted again, which then happens, layer by layer.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            MLPRemovalModifier:
              sparsity: 0.25

    Lifecycle: see :class:`ModelRemovalModifier`.

    :param sparsity: share of the units to remove, in (0, 1), rounded so that what stays is a
        multiple of ``multiple_of``
    :param keep: units that stay in every MLP, instead of ``sparsity``
    :param axis: ``mlp`` (default), or ``experts`` or ``shared_experts`` of a mixture of experts,
        where the config counts them apart
    :param multiple_of: what the kept number is a multiple of; default 64, or the largest power
        of 2 below it that divides a quarter of the units
    :param saliency: ``output_energy`` (default); for comparison ``magnitude`` (norm of all
        weights of a unit), ``last`` and ``random``
    :param compensate: ``down_proj`` (default) or ``none``
    :param runtime: one or several of :data:`checkpoints.runtimes.RUNTIMES`: a ``keep`` that they
        do not take is refused, a ``sparsity`` leaves the nearest size that they take
    :param calibration_batches: layers are looked at and fitted over so many batches, the first
        (of each rank's); default all
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

    method_class: ClassVar[type[ModelRemoval[Any]]] = UnitRemoval


class AttentionRemovalModifier(AttentionSettings, ModelRemovalModifier):
    """Removes the kv groups that o_proj can do without best, from every attention alike.

    A kv group is a key and a value head with the query heads that read them. Groups are judged
    together: greedy elimination of the cost that remains once o_proj is fitted again, which then
    happens, layer by layer.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            AttentionRemovalModifier:
              sparsity: 0.5

    Lifecycle: see :class:`ModelRemovalModifier`.

    :param sparsity: share of the kv groups to remove, in (0, 1), rounded to whole groups
    :param keep: kv groups that stay in every attention, instead of ``sparsity``
    :param saliency: ``output_energy`` (default); for comparison ``magnitude`` (norm of all
        weights of a group), ``last`` and ``random``
    :param compensate: ``o_proj`` (default) or ``none``
    :param runtime: one or several of :data:`checkpoints.runtimes.RUNTIMES`: a ``keep`` that they
        do not take is refused, a ``sparsity`` leaves the nearest size that they take
    :param calibration_batches: layers are looked at and fitted over so many batches, the first
        (of each rank's); default all
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

    method_class: ClassVar[type[ModelRemoval[Any]]] = UnitRemoval

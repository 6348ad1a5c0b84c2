"""Remove layers from a recipe."""

from typing import Any, ClassVar

from sparsessm_plugin.methods.layer_removal import LayerRemoval, LayerSettings
from sparsessm_plugin.methods.model_removal import ModelRemoval
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier


class LayerRemovalModifier(LayerSettings, ModelRemovalModifier):
    """Removes the layers without which the model, once it is fitted again, predicts best.

    The linear layer by which each remaining layer writes to the stream is fitted again, from the
    layer before the first gap on, so that the next layer reads what it read before; then all that
    is the layer's own, by gradient steps that stay inside of it. Sets of layers are compared by
    what the model predicts after the first of these.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            LayerRemovalModifier:
              sparsity: 0.25

    Lifecycle: see :class:`ModelRemovalModifier`.

    :param sparsity: share of the layers to remove, in (0, 1), rounded to whole layers
    :param keep: layers that stay, instead of ``sparsity``
    :param saliency: ``loss_after_fit`` (default): divergence from the dense predictions once what
        stays is fitted, on rows that the fit has not seen; for comparison ``perplexity`` (the loss
        of the next token with nothing fitted, one layer after the other, as Mamba-Shedder does),
        ``block_influence`` (mean of 1 - cosine of the stream before and behind a layer), ``last``
        and ``random``
    :param compensate: any of ``out_proj`` (the last linear layer of each layer, in closed form) and
        ``reconstruct`` (gradient steps on all of a layer's own weights, towards the dense stream);
        default both; ``none``
    :param reconstruct_steps: gradient steps of ``reconstruct`` for each layer
    :param search_width: where there are more than 64 sets, ways to go on that are tried at each
        step of the search
    :param search_tokens: sets are fitted and compared on so many tokens, the first, once a quarter
        of them has left a few; too few speak against sets behind which many layers are fitted
    :param seed: of ``random``, and of the order in which ``reconstruct`` sees the text
    :param runtime: one or several of :data:`checkpoints.runtimes.RUNTIMES`: a ``keep`` that they
        do not take is refused, a ``sparsity`` leaves the nearest size that they take
    :param calibration_batches: layers are fitted over so many batches, the first (of each rank's);
        default all
    :param distill_steps: gradient steps on the weights towards the dense model's predictions of
        the calibration data, once the layers are gone; 0 is none
    :param distill_minutes: instead, or at most, so many minutes of them
    :param distill_learning_rate: the highest
    :param distill_optimizer: ``adam``, ``muon`` for the matrices of linear layers, or ``auto``:
        Muon where a step reads at least 8,192 tokens
    :param distill_weights: which are fitted: ``all_but_vocabulary`` (default); ``mixers``; ``all``
    :param distill_checkpointing: compute layers twice instead of keeping what they made; default
        ``auto``, by the memory that is free
    :param distill_precision: of a float32 model's matrix products: ``float32``, ``bfloat16``;
        default ``auto``, bfloat16 on GPUs
    :param distill_generated: tokens of text that the dense model writes itself, to be distilled on
        beside the calibration text; 0, the default, is none
    :param distill_resume: file by which a run goes on that was interrupted in these steps
    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[ModelRemoval[Any]]] = LayerRemoval

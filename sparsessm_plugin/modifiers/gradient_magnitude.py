"""Prune all weights by gradient from a recipe."""

from typing import Any, ClassVar

from torch import nn

from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.methods.base import MixerMethod
from sparsessm_plugin.methods.gradient import GradientPruning, GradientSettings
from sparsessm_plugin.modifiers.base import MethodModifier


class GradientMagnitudeModifier(GradientSettings, MethodModifier):
    """Prunes the weights whose size times gradient is smallest, over the whole model at once.

    After arXiv 2505.08299. Every Linear layer, the convolution, A_log and D compete for what
    stays, so that each component and each layer gets the sparsity that it can bear. Sparsity is
    raised in rounds; each looks at the gradients of what the rounds before have left. Without
    tuning the kept weights are not changed. Every pruned entry is stored as 0; of A_log, too,
    where 0 means A = -1.

    All is done when calibration starts, in passes with gradients that this modifier makes
    itself, so LLM Compressor need not run the data (``datafree`` pipeline). The batches of the
    dataset stay in main memory. On the device, beside the model: for each
    targeted weight 4 bytes for the gradient and 4 for its importance, the gradient of one batch
    in the model's dtype, and the inputs of all layers for one batch. Tuning needs 20 bytes more
    for each tuned weight: a float32 copy, its gradient, two moments, and the weight as it was
    before the steps, to which it goes back where they do not lower the loss.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            GradientMagnitudeModifier:
              sparsity: 0.7
              rounds: 8

    Lifecycle: see :class:`MethodModifier`; all is done on calibration start. Without ``oneshot()``:
    :func:`sparsessm_plugin.methods.prune_by_gradient`, for modules that have no config on disk or
    no tokenizer, too.

    :param sparsity: share of zeros in (0, 1), over all targeted weights together; zeros that are
        there already stay and count
    :param rounds: how often gradients are gathered and weights pruned
    :param schedule: how sparsity rises over the rounds: ``cubic``: fast first, then slower |
        ``linear``
    :param saliency: ``weight_x_gradient_norm`` (default): |w| times the root of the mean squared
        gradient of single samples, which takes a backward pass for each | ``weight_x_gradient``:
        |w| |mean gradient|, as in the paper; where a model is well trained the gradients of samples
        cancel, and much less is left to tell weights apart | ``magnitude``: |w|, needs no data
    :param gradient_power: power of the gradient; default 1
    :param scope: what competes with what: ``global``: all weights | ``per_layer``: those of one
        tensor, so that all get the same sparsity | ``per_kind``: those of one kind (all in_proj,
        all A_log, all Linear layers outside of mixers, ...)
    :param min_keep: share of each tensor that stays in any case: its most important entries
    :param targets: what is pruned: weights by name, ``re:`` pattern or kind (``A_log``,
        ``in_proj``), or modules by name, class name or pattern. Default everything that can be:
        Linear, conv1d, A_log and D. Embeddings, what predicts tokens, routers
        of experts, norms, biases and dt_bias are never pruned
    :param ignore: what to leave alone, likewise
    :param distill_steps: gradient steps after each round; 0 trains nothing. All floating-point
        weights but the embeddings are tuned, ignored ones too; what is pruned stays 0
    :param distill_loss: what these steps lower: ``labels``: the loss whose gradients choose the
        weights | ``dense``: the divergence from what the model predicted before it was pruned,
        which says more about each token and is harder to learn by heart; what predicts tokens
        is not tuned then, and tokens x hidden_size numbers wait in main memory. Default labels
    :param distill_learning_rate: of these steps (Adam), the highest: it rises over the first tenth
        of all steps and then falls to 0 along a cosine
    :param distill_minutes: minutes of such steps, in all rounds together, an equal share each; with
        ``distill_steps`` what is reached first ends them. Default 0, no limit
    :param distill_checkpointing: compute layers twice instead of keeping what they made; default
        ``auto``, by the memory that is free
    :param distill_precision: of a float32 model's matrix products: ``float32``, ``bfloat16``;
        default ``auto``, bfloat16 on GPUs
    :param calibration_batches: gradients are gathered over so many batches, the first; default all
    :param loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch, a scalar tensor. From
        Python only. Default the model's own loss for ``labels``, or for the token ids
    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[MixerMethod[Any]]] = GradientPruning

    def matching_weights(self, model: nn.Module) -> list[PrunableWeight]:
        """See :meth:`GradientPruning.matching_weights`."""
        return GradientPruning(self, type(self).__name__).matching_weights(model)

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a weight, one a round, totals."""
        report = super().report()
        if self.loss_fn is not None:
            report["settings"]["loss_fn"] = getattr(
                self.loss_fn, "__qualname__", repr(self.loss_fn)
            )
        return report

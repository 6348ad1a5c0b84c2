"""The check that token ids have an embedding."""

from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError


def check_token_ids(ids: Tensor, vocab_size: int, source: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Left alone they are an IndexError deep inside the model, or on a GPU an assertion after
    which nothing on the device works any more.

    :param ids: any shape, not empty
    :param source: where they come from, for the message
    :raises SparseSSMError: naming an id outside the vocabulary
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise SparseSSMError(
            f"{source} holds token id {low if low < 0 else high}; the model's vocabulary has "
            f"ids 0 to {vocab_size - 1} (is it another model's tokenizer?)"
        )

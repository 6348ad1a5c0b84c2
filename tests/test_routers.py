"""What chooses experts is never pruned and never quantized, whatever its module is."""

import pytest
import torch
from conftest import EXPERTS, VOCAB, Loader, batches, state, tiny_model
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedTokenizerFast

from sparsessm_plugin import (
    GradientMagnitudeModifier,
    SensitivitySparseGPTModifier,
    SparseGPTQModifier,
    SparseSSMModifier,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import router_names

# the matrix that scores the experts
ROUTER = {
    "granitemoehybrid": "model.layers.0.block_sparse_moe.router",
    "jamba": "model.layers.0.feed_forward.router",
    "nemotron_h": "model.layers.1.mixer.gate",
}


def model_of(family):
    return tiny_model(family, **EXPERTS[family])


@pytest.mark.parametrize(
    "modifier",
    [
        GradientMagnitudeModifier(sparsity=0.6, rounds=1),
        SensitivitySparseGPTModifier(sparsity=0.6, targets=["Linear"], ignore=["lm_head"]),
    ],
    ids=["gradient", "sensitivity"],
)
@pytest.mark.parametrize("family", EXPERTS)
def test_no_weight_of_a_router_changes(family, modifier):
    model = model_of(family)
    before = state(model)
    routers = router_names(model)
    assert ROUTER[family] in routers
    fresh = type(modifier)(**modifier.model_dump(exclude_unset=True))
    oneshot(model=model, recipe=fresh, dataset=Loader(batches(1, 2, 12)), processor=_tokenizer())
    after = state(model)
    kept = [name for name in before if name.rpartition(".")[0] in routers]
    assert f"{ROUTER[family]}.weight" in kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    # and experts, which oneshot() has taken apart, were pruned
    experts = [w for n, w in after.items() if ".experts.0." in n and n.endswith(".weight")]
    assert experts
    assert any((w == 0).float().mean() > 0.3 for w in experts)


@pytest.mark.parametrize("kind", [GradientMagnitudeModifier, SensitivitySparseGPTModifier])
@pytest.mark.parametrize("family", EXPERTS)
def test_a_router_that_is_named_is_refused_in_one_line(family, kind):
    model = model_of(family)
    before = state(model)
    modifier = kind(sparsity=0.5, targets=[ROUTER[family]])
    with pytest.raises(SparseSSMError) as error:
        modifier.matching_mixers(model)
    assert f"targets: '{ROUTER[family]}' matches" in str(error.value)
    assert "router" in str(error.value) or "chooses experts" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(
    ("family", "target"),
    [("jamba", "Linear"), ("granitemoehybrid", "re:.*router$"), ("nemotron_h", "re:.*gate$")],
)
def test_a_router_is_not_quantized(family, target, upstream):
    model = model_of(family)
    ignore = ["lm_head", "re:.*dt_proj$", "re:.*experts"]
    fields = {"targets": [target], "scheme": "W8A8"}

    def run(ignore):
        kind = QuantizationModifier if upstream else SparseGPTQModifier
        recipe = [kind(ignore=ignore, **fields)]
        if upstream:
            pruning = GradientMagnitudeModifier if family != "jamba" else SparseSSMModifier
            own = {"saliency": "magnitude", "targets": ["in_proj"]}
            own = own if family != "jamba" else {"saliency": "magnitude"}
            recipe.insert(0, pruning(sparsity=0.5, **own))
        ready = Loader(batches(1, 2, 12))
        oneshot(model=model, recipe=recipe, dataset=ready, processor=_tokenizer())

    with pytest.raises(SparseSSMError, match=r"would be quantized, but it chooses exp") as error:
        run(ignore)
    message = str(error.value)
    assert ROUTER[family] in message
    assert "\n" not in message
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())
    advised = message.partition('add "')[2].partition('"')[0]
    if family == "jamba":  # elsewhere nothing else was targeted
        run([*ignore, advised])
        assert not hasattr(model.get_submodule(ROUTER[family]), "quantization_scheme")


def _tokenizer():
    from tokenizers import Tokenizer, models

    words = models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))

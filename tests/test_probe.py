"""What a changed weight does to predictions: side by side as one by one."""

import pytest
import torch
from conftest import VOCAB, tiny_model

from sparsessm_plugin.mixers import find_mixers
from sparsessm_plugin.mixers.fast_forward import fast_forward
from sparsessm_plugin.modifiers.probe import Probe


def little(rows=5, length=300):
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 200:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_divergences_are_those_of_the_changed_model(family):
    model, batch = tiny_model(family), little()
    seen = {k: v[:4, :256] for k, v in batch.items()}

    def predictions():
        return model(**seen, use_cache=False).logits.double().log_softmax(-1)

    with fast_forward(model):
        probe = Probe(model, batch)
        names = [
            f"{adapter.name}.{kind}"
            for adapter in find_mixers(model)
            for kind in adapter.projections
        ]
        weights = {name: model.get_submodule(name).weight.clone() for name in names}
        tried = []
        found = probe.divergences(names, lambda name: 0.5 * weights[name], tried.append)
        assert tried == names
        reference = predictions()
        for name in names:
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, weights[name])  # put back
            weight.mul_(0.5)
            each = (reference.exp() * (reference - predictions())).sum(-1)
            expected = float(each[seen["attention_mask"].bool()].mean())
            weight.copy_(weights[name])
            assert found[name] == pytest.approx(expected, rel=1e-3, abs=1e-7), name


@torch.no_grad()
def test_a_weight_comes_back_after_an_error():
    model = tiny_model("mamba")
    name = f"{find_mixers(model)[0].name}.in_proj"
    weight = model.get_submodule(name).weight
    before = weight.clone()
    with fast_forward(model):
        probe = Probe(model, little())

        def interrupt(*_):
            assert not torch.equal(weight, before)
            raise KeyboardInterrupt

        model.get_submodule(name).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            probe.divergences([name], lambda _: torch.zeros_like(before))
    assert torch.equal(weight, before)

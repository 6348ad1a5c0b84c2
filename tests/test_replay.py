"""A model that runs again from a changed layer gives the bits that it gives as a whole."""

import pytest
import torch
from conftest import VOCAB, tiny_model

from sparsessm_plugin.calibration.replay import Replay
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.fast_forward import fast_forward


@torch.no_grad()
def test_logits_are_those_of_the_whole_model(family):
    model = tiny_model(family)
    ids = torch.randint(1, VOCAB, (2, 12))
    own_forwards = [vars(module).get("forward") for module in model.modules()]
    replay = Replay(model)
    ran = []
    for adapter in find_mixers(model):
        adapter.mixer.register_forward_pre_hook(lambda *_, name=adapter.name: ran.append(name))

    def logits():
        ran.clear()
        with fast_forward(model):
            return model(ids, use_cache=False).logits

    with replay.recorded():
        dense = logits()
    names = [adapter.name for adapter in find_mixers(model)]
    weights = {name for name, _ in model.named_parameters()}  # a shared one by its first name
    linears = [
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and f"{name}.weight" in weights | {"lm_head.weight"}
    ]
    changed = 0
    for name in linears:
        module = model.get_submodule(name)
        weight = module.weight.detach().clone()
        module.weight.mul_(0.5)
        whole = logits()
        with replay.since(name):
            again = logits()
        module.weight.copy_(weight)
        assert torch.equal(again, whole), name
        changed += not torch.equal(whole, dense)
        inside = [i for i, mixer in enumerate(names) if name.startswith(f"{mixer}.")]
        if inside:
            assert ran == names[inside[0] :], name
    assert changed > len(linears) // 2
    assert torch.equal(logits(), dense)
    assert [vars(module).get("forward") for module in model.modules()] == own_forwards


@torch.no_grad()
def test_layers_come_back_after_an_error():
    model = tiny_model("mamba")
    replay = Replay(model)
    with replay.recorded():
        model(torch.ones(1, 4, dtype=torch.long), use_cache=False)

    def work():
        with replay.since("backbone.layers.1.mixer.in_proj"):
            assert "forward" in vars(model.backbone.layers[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "forward" not in vars(model.backbone.layers[0])
    assert not model.backbone.layers[0]._forward_hooks

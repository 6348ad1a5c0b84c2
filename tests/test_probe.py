"""What a changed weight does to predictions: side by side as one by one."""

import pytest
import torch
from conftest import VOCAB, tiny_model

from sparsessm_plugin.allocation import probe as probing
from sparsessm_plugin.allocation.probe import LayerProbe, Probe
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.fast_forward import fast_forward


def little(rows=5, length=300, left=False):
    """Rows of 300, 200, 290, 5 and 280 tokens, padded on one side."""
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, tokens in enumerate((length, 200, 290, 5, 280)):
        mask[row, tokens:] = 0
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def with_biases(family):
    """A tiny model with biases wherever its config allows some."""
    names = {
        "mamba": ("use_bias",),
        "falcon_mamba": ("use_bias",),
        "jamba": ("mamba_proj_bias",),
        "mamba2": ("use_bias",),
        "bamba": ("mamba_proj_bias",),
        "zamba": ("mamba_proj_bias",),
        "zamba2": ("add_bias_linear",),
        "granitemoehybrid": ("mamba_proj_bias",),
        "falcon_h1": ("mamba_proj_bias", "projectors_bias"),
        "nemotron_h": ("use_bias", "mamba_proj_bias"),
    }
    return tiny_model(family, **dict.fromkeys(names[family], True))


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_divergences_are_those_of_the_changed_model(family, left):
    model, batch = with_biases(family), little(left=left)
    # the four rows with most tokens, from their first tokens on
    first = [ids[mask.bool()][:128] for ids, mask in zip(*batch.values(), strict=True)]
    first = [first[row] for row in (0, 2, 4, 1)]
    seen = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(first, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in first], batch_first=True
        ),
    }

    def predictions():
        return model(**seen, use_cache=False).logits.double().log_softmax(-1)

    with fast_forward(model):
        probe = Probe(model, [batch])
        stored = dict(model.named_parameters())  # a shared one once, by its first name
        mixers = [adapter.name for adapter in find_mixers(model)]
        projections = ("_proj.weight", "conv1d.weight", "_proj_weight")
        names = [n for n in stored if n.endswith(projections) and n.startswith(tuple(mixers))]
        shared = [n for n in stored if ".shared_transf.self_attn.q_proj" in n]
        names += shared
        assert bool(shared) == (family == "zamba")
        weights = {name: stored[name].clone() for name in names}
        tried = []
        found = probe.divergences(names, lambda name: 0.5 * weights[name], tried.append, shared)
        assert tried == names
        reference = predictions()
        for name in names:
            weight = stored[name]
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
        probe = Probe(model, [little()])

        def interrupt(*_):
            assert not torch.equal(weight, before)
            raise KeyboardInterrupt

        model.get_submodule(name).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            probe.divergences([f"{name}.weight"], lambda _: torch.zeros_like(before))
    assert torch.equal(weight, before)


@torch.no_grad()
@pytest.mark.parametrize(("copies", "runs"), [(100, 1), (3, 4)])  # two changes a layer
def test_changes_of_all_layers_go_through_a_layer_together(monkeypatch, copies, runs):
    """As on a GPU, whose memory limits how many tokens are computed at once."""
    monkeypatch.setattr(probing, "has_room", lambda device, needed: True)
    monkeypatch.setattr(probing, "_TOKENS_ON_GPU", copies * 4 * 128)
    model = tiny_model("mamba", num_hidden_layers=5)
    layers = {}  # a layer's weights
    for name, weight in model.named_parameters():
        if name.endswith(("in_proj.weight", "out_proj.weight")):
            layers.setdefault(name.split(".mixer.")[0], {})[name] = weight.clone()
    weights = {name: weight for own in layers.values() for name, weight in own.items()}

    def changed(name):
        return 0.5 * weights[name]

    calls = []
    with fast_forward(model):
        expected = Probe(model, [little()]).divergences(list(weights), changed)
        last = find_mixers(model)[-1].mixer
        last.register_forward_hook(lambda *_: calls.append(None))
        probe = LayerProbe(model, [little()], record=True)
        assert probe.fits
        for own in layers.values():
            probe.try_out(list(own), changed)
        found = probe.moved()
    assert len(calls) == 1 + 2 + runs
    assert list(found) == list(expected)
    for name, divergence in expected.items():
        assert found[name] == pytest.approx(divergence, rel=1e-4, abs=1e-9), name
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in weights.items())


@torch.no_grad()
def test_a_model_that_calls_a_layer_again_does_not_go_layer_by_layer():
    model = tiny_model("mamba")
    first, second = model.backbone.layers
    with fast_forward(model):
        assert LayerProbe(model, [little()], record=True).fits
        second.register_forward_pre_hook(lambda module, args: (first(args[0]), None)[1])
        assert not LayerProbe(model, [little()], record=True).fits


@torch.no_grad()
@pytest.mark.parametrize("kind", [Probe, LayerProbe, "recorded"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_change_what_passes_do_so_once(kind, before):
    """As those that steer a model: of what enters its layers, or of what they give."""
    model = tiny_model("mamba", num_hidden_layers=3)

    def steer(x):
        return x + 0.5

    for layer in model.backbone.layers:
        if before:
            layer.register_forward_pre_hook(lambda module, args: (steer(args[0]), *args[1:]))
        else:
            layer.register_forward_hook(lambda module, args, output: steer(output))
    names = [f"{adapter.name}.out_proj.weight" for adapter in find_mixers(model)]
    weights = {name: model.get_parameter(name).clone() for name in names}
    batch = {"input_ids": little()["input_ids"][:1, :40]}

    def changed(name):
        return 0.5 * weights[name]

    with fast_forward(model):
        if kind == "recorded":
            probe = LayerProbe(model, [batch], record=True)
        else:
            probe = kind(model, [batch])
        for name in names:
            probe.try_out([name], changed)
        found = probe.moved()
        reference = model(**batch).logits.double().log_softmax(-1)
        for name in names:
            model.get_parameter(name).mul_(0.5)
            other = model(**batch).logits.double().log_softmax(-1)
            expected = float((reference.exp() * (reference - other)).sum(-1).mean())
            model.get_parameter(name).copy_(weights[name])
            assert found[name] == pytest.approx(expected, rel=1e-3, abs=1e-8), name

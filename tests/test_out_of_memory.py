"""A GPU that is full: half batches, once; then one clear line with the numbers."""

import sys

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from conftest import DEMO, Loader, batches, state, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparsessm_plugin import cli, cost
from sparsessm_plugin.cost import halved, has_room, shortage
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.fast_forward import _Forward
from sparsessm_plugin.recipes import parse_recipe, pruning
from sparsessm_plugin.recipes.pruning import prune

ALOG = "SparseSSMModifier: {sparsity: 0.5}"
PROJECTIONS = (
    "SensitivitySparseGPTModifier: {sparsity: 0.5, solver: wanda, allocation: uniform, "
    "targets: [in_proj]}"
)
# as torch words it
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.25 GiB is free. Process 1 has 77.85 GiB memory in use."
)
A_LOG = "backbone.layers.0.mixer.A_log"
NUMBERS = "2.00 GiB more were needed, 1.25 GiB of 79.10 GiB were free"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def recipe(*modifiers):
    lines = "".join(f"    {modifier}\n" for modifier in modifiers)
    return parse_recipe(f"prune_stage:\n  prune_modifiers:\n{lines}", "test")


class Device:
    """A GPU on which only so many rows of a batch fit through the mixers, from some call on."""

    def __init__(self, rows, after=0):
        self.rows, self.after, self.calls = rows, after, 0

    def model(self):
        model = tiny_model("mamba")
        for adapter in find_mixers(model):
            adapter.mixer.register_forward_pre_hook(self._enter, with_kwargs=True)
        return model

    def _enter(self, module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.calls += 1
        if self.calls > self.after and len(hidden_states) > self.rows:
            raise torch.OutOfMemoryError(FULL)


def assert_untouched(model):
    for adapter in find_mixers(model):
        assert not isinstance(getattr(vars(adapter.mixer).get("forward"), "__func__", 0), _Forward)
        assert len(adapter.mixer._forward_pre_hooks) == 1  # the device's own


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_half_batches_give_what_such_a_loader_gives(tokenizer, pipeline):
    loader = Loader(batches(count=2, batch=4, padded=True))
    expected = prune(tiny_model("mamba"), recipe(ALOG), halved(loader), tokenizer, pipeline)
    device = Device(rows=2)
    with pytest.warns(UserWarning, match=f"batches of 4 x 24 tokens: {NUMBERS}; trying once more"):
        result = prune(device.model(), recipe(ALOG), loader, tokenizer, pipeline, device.model)
    found, wanted = state(result.model), state(expected.model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert result.reports[0]["layers"][0]["tokens"] == expected.reports[0]["layers"][0]["tokens"]
    assert_untouched(result.model)


def test_what_an_earlier_modifier_changed_is_not_pruned_twice(tokenizer):
    """Memory runs out in the second modifier: the first has pruned, and begins anew."""
    loader = Loader(batches(count=2, batch=4))
    both = recipe(ALOG, PROJECTIONS)
    expected = prune(tiny_model("mamba"), both, halved(loader), tokenizer)
    device = Device(rows=2, after=12)  # the first one calls each of 2 mixers 2 x 2 times
    first = device.model()
    A_log, before = first.backbone.layers[0].mixer.A_log, state(first)[A_LOG]
    with pytest.warns(UserWarning, match="trying once more"):
        result = prune(first, both, loader, tokenizer, reload=device.model)
    assert not torch.equal(A_log, before)  # the first modifier had been here
    assert not list(first.parameters())  # its memory is free
    found, wanted = state(result.model), state(expected.model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_second_time_it_is_an_error_with_the_numbers(tokenizer):
    device = Device(rows=1)
    reloaded = []

    def reload():
        reloaded.append(device.model())
        return reloaded[-1]

    loader = Loader(batches(count=2, batch=4))
    with (
        pytest.warns(UserWarning, match="batches of 4 x 24"),
        pytest.raises(
            SparseSSMError, match=f"^out of memory with batches of 2 x 24 tokens: {NUMBERS}"
        ),
    ):
        prune(device.model(), recipe(ALOG), loader, tokenizer, reload=reload)
    assert len(reloaded) == 1
    assert_untouched(reloaded[0])


@pytest.mark.filterwarnings("error:.*trying once more")
@pytest.mark.parametrize(("rows", "can_reload"), [(4, False), (1, True)])
def test_without_a_second_try_the_model_is_left_as_it_was(tokenizer, rows, can_reload):
    device = Device(rows=0)
    model = device.model()
    before = state(model)
    loader = Loader(batches(count=2, batch=rows))
    reload = device.model if can_reload else None
    with pytest.raises(SparseSSMError, match="give smaller batches"):
        prune(model, recipe(ALOG), loader, tokenizer, reload=reload)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with disable_onloading():  # what weights on a GPU are copied from is still tied
        assert model.lm_head.weight is model.backbone.embeddings.weight
    assert_untouched(model)


def test_other_errors_are_not_taken_for_it(tokenizer):
    model = tiny_model("mamba")
    model.backbone.layers[1].mixer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises((RuntimeError, ZeroDivisionError), match="division") as caught:
        prune(model, recipe(ALOG), Loader(batches()), tokenizer, reload=pytest.fail)
    assert shortage(caught.value, None) is None


def test_the_command_says_it_in_one_line(monkeypatch, capsys, tmp_path):
    def load(source):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(pruning.ModelSource, "load", load)
    monkeypatch.setattr(sys, "argv", ["sparsessm", "inspect", str(DEMO)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert NUMBERS in error


def test_numbers_are_found_behind_the_errors_of_others():
    ours = torch.OutOfMemoryError(FULL)
    theirs = torch.OutOfMemoryError("Sequential pipeline ran out of memory.")
    theirs.__cause__ = RuntimeError("while running its code")
    theirs.__cause__.__cause__ = ours
    assert shortage(theirs, None) == f"out of memory: {NUMBERS}"
    other = torch.OutOfMemoryError("HIP\nout of memory")  # in words that are not known
    assert shortage(other, None) == "out of memory: HIP out of memory"


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.booleans())
def test_halved_keeps_rows_in_order(sizes, extras):
    ready = []
    for number, rows in enumerate(sizes):
        ids = torch.arange(rows * 3).view(rows, 3) + 100 * number
        batch = {"input_ids": ids, "attention_mask": ids % 2}
        ready.append({**batch, "scale": torch.tensor(2.0), "note": "x"} if extras else batch)
    smaller = halved(Loader(ready))
    if max(sizes) == 1:
        assert smaller is None
        return
    parts = list(smaller)
    assert len(smaller) == len(parts)
    assert max(len(p["input_ids"]) for p in parts) == (max(sizes) + 1) // 2
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([p[key] for p in parts]), torch.cat([b[key] for b in ready]))
    if extras:
        assert all(p["scale"] == 2.0 and p["note"] == "x" for p in parts)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "share", "needed", "room"),
    [
        (60, 0, 0, 1.0, 9, True),
        (60, 0, 0, 1.0, 10, False),
        (60, 0, 0, 1.0, 40, False),
        (20, 70, 30, 1.0, 9, True),  # torch holds 40 that no tensor needs
        (20, 70, 70, 1.0, 1, False),
        (90, 10, 10, 0.4, 9, True),  # 30 of the 40 that this process may have
        (90, 10, 10, 0.4, 10, False),
        (25, 10, 10, 0.4, 6, False),  # others have the rest
    ],
)
def test_half_of_a_gpu_stays_free(monkeypatch, free, reserved, allocated, share, needed, room):
    def fraction(device):
        """Of a device with its number, as torch's own."""
        return {3: share}[device.index]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    held = {"reserved_bytes": reserved, "allocated_bytes": allocated}
    stats = {name: {"all": {"current": size}} for name, size in held.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    monkeypatch.setattr(cost, "_others", {})
    for name in ("cuda", "cuda:3"):
        assert has_room(torch.device(name), needed) is room
    assert not has_room(torch.device("cpu"), needed)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_has_its_number_from_the_start(monkeypatch, asked):
    """Weights are onloaded to it, and asked for, by other packages, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert pruning.ModelSource("m", device=asked).compute_device == torch.device("cuda", 3)
    assert pruning.ModelSource("m", device="cpu").compute_device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_where_inputs_wait_changes_no_bit(tokenizer, monkeypatch):
    """What enters mixers is kept on the GPU or in main memory."""
    text = "StateRemovalModifier: {keep: 4, compensate: [D, out_proj]}"
    found = []
    for room in (True, False):
        monkeypatch.setattr(cost, "has_room", lambda device, needed, room=room: room)
        monkeypatch.setattr(pruning, "has_room", lambda device, needed, room=room: room)
        loader = Loader(batches(count=4, batch=4))
        result = prune(tiny_model("mamba").cuda(), recipe(text, PROJECTIONS), loader, tokenizer)
        found.append(state(result.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_what_leaves_a_layer_waits_for_the_next_one_only(family, tokenizer, monkeypatch):
    from llmcompressor.pipelines.cache import IntermediatesCache

    held, delete = [], IntermediatesCache.delete

    def counted(self, index, *args):
        delete(self, index, *args)
        sizes = [v.value for v in self.batch_intermediates[index].values()]
        held.append(sum(x.is_floating_point() and x.ndim == 3 for x in sizes if hasattr(x, "ndim")))

    monkeypatch.setattr(IntermediatesCache, "delete", counted)
    model = tiny_model(family, num_hidden_layers=6)
    prune(model, recipe(PROJECTIONS), Loader(batches(count=2)), tokenizer)
    assert len(held) > 10
    assert max(held) == 1

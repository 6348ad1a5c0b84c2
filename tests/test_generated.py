"""Text that the dense model writes, to be distilled on."""

import pytest
import torch
from conftest import DELTA, DEVICE, FAMILIES, batches, run, state, tiny_model

from sparsessm_plugin import StateRemovalModifier
from sparsessm_plugin.calibration.rows import unpadded_rows
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.decoding import step_logits
from sparsessm_plugin.training import generated
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.distillation import _MEASURED, Distillation
from sparsessm_plugin.training.generated import Writer, with_written


def drawn(*shape, seed=0):
    return torch.randint(1, 90, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*FAMILIES, *DELTA])
@torch.no_grad()
def test_a_writer_reads_as_the_model_does(name):
    """Logits of every position are those of a pass over the text, after an earlier text, too."""
    # with the gated norm, transformers' own step of Falcon-H1 differs from its pass by 0.6
    changes = {"mamba_rms_norm": False} if name == "falcon_h1" else {}
    model = tiny_model(name, **changes).to(DEVICE)
    writer, text = Writer(model, 3, 12), drawn(3, 12, seed=1)
    everything = torch.full((3,), 12)
    assert torch.equal(writer.write(text, everything).cpu(), text)  # all was given
    writer._restart()
    found = [step_logits(model, t[:, None], writer.cache) for t in text.to(DEVICE).unbind(1)]
    expected = model(text.to(DEVICE), use_cache=False).logits
    most = 2e-5 if DEVICE == "cpu" else 2 * 2.0**-11
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=most, rtol=most)


@torch.no_grad()
def test_tokens_are_drawn_from_what_the_model_predicts():
    model = tiny_model("mamba2").to(DEVICE)
    rows, given = 4096, 3
    prompt = drawn(1, given)
    writer = Writer(model, rows, given + 1, seed=7)
    prompts = torch.nn.functional.pad(prompt, (0, 1)).expand(rows, -1)
    found = writer.write(prompts, torch.full((rows,), given)).cpu()
    assert torch.equal(found[:, :given], prompt.expand(rows, -1))
    expected = rows * model(prompt.to(DEVICE)).logits[0, -1].softmax(-1).cpu()
    counts = torch.bincount(found[:, -1], minlength=len(expected))
    # a sum of squares of standard normal variables, one fewer than tokens
    square = float(((counts - expected).square() / expected).sum())
    freedom = len(expected) - 1
    assert abs(square - freedom) < 5 * (2 * freedom) ** 0.5


@torch.no_grad()
def test_batches_stand_evenly_between_those_of_the_data(monkeypatch):
    model, data = tiny_model("granitemoehybrid").to(DEVICE), batches(4, 2, 12, padded=True)
    monkeypatch.setattr(generated, "_MOST_ROWS", 3)  # several times, the last one cut
    found = with_written(model, data, 8 * 24 - 5, "this")
    own = [any(batch is one for one in data) for batch in found]
    assert own == [True, False, False] * 4 or own == [False, True, False] * 4
    assert [batch for batch, mine in zip(found, own, strict=True) if mine] == data
    pieces = [row.tolist() for batch in data for row in unpadded_rows(batch)]
    for batch in (b for b, mine in zip(found, own, strict=True) if not mine):
        assert batch["input_ids"].shape == (2, 12)
        assert bool(batch["attention_mask"].all())
        for row in batch["input_ids"].tolist():  # it begins with a token of the text
            assert any(row[0] in piece for piece in pieces)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "bamba"])  # a GPU sums experts in any order
def test_the_same_seed_writes_the_same_text(family):
    model, data = tiny_model(family).to(DEVICE), batches(2, 2, 12)
    one, again, other = (
        [batch["input_ids"] for batch in with_written(model, data, 48, "this", seed)]
        for seed in (3, 3, 4)
    )
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))


def test_prompts_are_pieces_of_the_text():
    pieces = [torch.arange(100, 140), torch.arange(200, 203)]
    prompts, given = generated._prompts(pieces, 64, 20, torch.Generator().manual_seed(0))
    for row, many in zip(prompts, given.tolist(), strict=True):
        assert 1 <= many <= 10
        assert torch.equal(row[:many], torch.arange(row[0], row[0] + many))
        assert not row[many:].any()
        assert many <= 3 or int(row[0]) < 200
    assert given.max() > 5


def test_a_fit_reads_both_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model, data = tiny_model("mamba").to(DEVICE), batches(3, 2, 12)
    before = state(model)
    torch.manual_seed(3)
    distillation = Distillation(model, data, "this", Plan(40), generated=3 * 24)
    assert torch.equal(torch.rand(2), expected)
    assert len(distillation.batches) == 6
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    few = Distillation(model, data, "this", Plan(4), generated=10**4)
    assert len(few.batches) == max(4, _MEASURED)


def test_a_recipe_asks_for_it():
    fields = {"keep": 4, "saliency": "last", "compensate": "none", "distill_steps": 16}
    fields["distill_learning_rate"] = 1e-6
    models = [tiny_model("mamba") for _ in range(3)]
    modifiers = [StateRemovalModifier(**fields, distill_generated=n) for n in (0, 48, 48)]
    for model, modifier in zip(models, modifiers, strict=True):
        run(model, modifier, batches(2, 2, 12))
    plain, one, other = map(state, models)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not torch.equal(value, plain[name]) for name, value in one.items())
    assert [m.report()["distillation"]["passes"] for m in modifiers] == [8.0, 4.0, 4.0]


def test_what_it_cannot_continue():
    model = tiny_model("mamba")
    with pytest.raises(SparseSSMError, match="this: it continues input_ids of at least 2 tokens"):
        with_written(model, batches(1, 2, 1), 10, "this")
    with pytest.raises(SparseSSMError, match="this: it continues input_ids"):
        with_written(model, [{"inputs_embeds": torch.zeros(1, 4, 8)}], 10, "this")
    with pytest.raises(ValueError, match="distill_generated has no meaning without distill_steps"):
        StateRemovalModifier(keep=4, distill_generated=100)
    with pytest.raises(ValueError, match="distill_generated"):
        StateRemovalModifier(keep=4, distill_steps=1, distill_generated=-1)

"""Every pass of every modifier reads the same batches in the same order, and no empty sample."""

import pytest
import torch
from conftest import DEMO, DEVICE, Loader, batches, state, tiny_model
from datasets import Dataset, IterableDatasetDict
from llmcompressor import oneshot
from loguru import logger
from transformers import AutoTokenizer

from sparsessm_plugin import modifiers as m
from sparsessm_plugin.calibration.rows import unpadded_rows
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods import prune_by_gradient

PIPELINES = ["independent", "sequential", "basic"]
_QUANTIZED = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*dt_proj$"]}
# family, modifier: the passes over the data are as many as settings can ask for
MODIFIERS = {
    "transitions": ("mamba", lambda: m.SparseSSMModifier(sparsity=0.5)),
    "states": ("mamba", lambda: m.StateRemovalModifier(keep=4, distill_steps=2)),
    "channels": ("mamba", lambda: m.ChannelRemovalModifier(keep=32, distill_steps=2)),
    "projections": (
        "bamba",
        lambda: m.SensitivitySparseGPTModifier(
            sparsity=0.5, target_output="dense", targets=["Linear", "conv1d"], ignore=["lm_head"]
        ),
    ),
    "gradient": (
        "mamba",
        lambda: m.GradientMagnitudeModifier(
            sparsity=0.5, rounds=2, distill_steps=3, distill_loss="dense", calibration_batches=2
        ),
    ),
    "quantized": ("mamba", lambda: m.SparseGPTQModifier(scheme="W8A8", **_QUANTIZED)),
}
# apart after three steps of learning rates up to 3e-4, as the settings above have them, that went
# the other way
_STEPPED = 2 * 3 * 3e-4
LENGTHS = (9, 30, 14, 23, 17, 26)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token_id = 0
    return tokenizer


def samples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(1, 96, (length,), generator=generator).tolist() for length in lengths]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


@pytest.fixture
def warned():
    """What loguru says, as llmcompressor and its modifiers use it."""
    messages = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


def embedded(model):
    """The ids that the model embeds from now on, batch by batch."""
    seen = []

    def record(module, args):
        if isinstance(args[0], torch.Tensor) and not args[0].is_meta:
            seen.append(args[0].cpu())

    model.get_input_embeddings().register_forward_pre_hook(record)
    return seen


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", MODIFIERS)
def test_a_shuffled_run_is_one_of_its_order(tokenizer, name, pipeline):
    """Ragged texts, padded, in an order of LLM Compressor's: as ready batches of that order."""
    family, modifier = MODIFIERS[name]
    model = tiny_model(family)
    seen = embedded(model)
    torch.manual_seed(3)
    oneshot(
        model=model,
        recipe=modifier(),
        dataset=Dataset.from_dict(samples()),
        processor=tokenizer,
        pipeline=pipeline,
        batch_size=2,
        data_collator="padding",
    )
    found = state(model)
    # what losses are measured on, before anything is pruned, are four rows
    order = [ids for ids in seen if len(ids) == 2][:3]
    assert sorted(len(row[row != 0]) for ids in order for row in ids) == sorted(LENGTHS)
    ready = [{"input_ids": ids, "attention_mask": (ids != 0).long()} for ids in order]
    model = tiny_model(family)
    oneshot(
        model=model,
        recipe=modifier(),
        dataset=Loader(ready),
        processor=tokenizer,
        pipeline=pipeline,
    )
    expected = state(model)
    if DEVICE == "cpu":
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        return
    # On a GPU the last bits may differ between two runs. Where a gradient is no more than these,
    # a step of Adam goes one way or the other: far along a few weights, and no further than that.
    away = [(found[key] - value).abs() for key, value in expected.items()]
    apart = [
        gap > 1e-4 + 1e-3 * value.abs() for gap, value in zip(away, expected.values(), strict=True)
    ]
    entries = sum(value.numel() for value in expected.values())
    steps = name in ("states", "channels", "gradient")
    assert sum(int(a.sum()) for a in apart) <= (0.01 * entries if steps else 0)
    assert max(float(gap.max()) for gap in away) <= (_STEPPED if steps else torch.inf)


def test_texts_of_their_own_length_need_no_setting(tokenizer):
    """As ``oneshot()`` reads them by default: one at a time, shuffled, none padded."""
    model = tiny_model("mamba")
    chosen = m.SensitivitySparseGPTModifier(sparsity=0.5, target_output="dense")
    oneshot(model=model, recipe=chosen, dataset=Dataset.from_dict(samples()), processor=tokenizer)
    assert all(layer["tokens"] == sum(LENGTHS) for layer in chosen.report()["layers"])


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", [name for name in MODIFIERS if name != "gradient"])
def test_a_pass_over_other_tokens_is_refused(monkeypatch, tokenizer, name, pipeline):
    """Were the pipeline to shuffle on its own, the run would end."""
    monkeypatch.setattr("sparsessm_plugin.calibration.batches._serve", lambda *_: None)
    family, modifier = MODIFIERS[name]
    torch.manual_seed(0)
    ids = torch.randint(1, 96, (6, 12))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    loader = torch.utils.data.DataLoader(rows, batch_size=1, shuffle=True)
    with pytest.raises(SparseSSMError, match=r"Modifier: batch \d of .* holds other tokens") as e:
        oneshot(
            model=tiny_model(family),
            recipe=modifier(),
            dataset=loader,
            processor=tokenizer,
            pipeline=pipeline,
        )
    assert "\n" not in str(e.value)


def test_other_padding_is_refused():
    model, ready = tiny_model("mamba"), batches(padded=True)
    mixer = model.backbone.layers[0].mixer

    def all_real(module, args, kwargs):
        kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return args, kwargs

    mixer.register_forward_pre_hook(all_real, with_kwargs=True)
    with pytest.raises(SparseSSMError, match="another padding mask in batch 1"):
        oneshot(
            model=model,
            recipe=m.StateRemovalModifier(keep=4),
            dataset=Loader(ready),
            processor=tokenizer,
        )


def test_a_batch_that_is_changed_in_place_is_refused():
    def loss_fn(model, batch):
        loss = model(**batch, labels=batch["input_ids"]).loss
        batch["input_ids"][0, 0] += 1
        return loss

    model = tiny_model("mamba")
    with pytest.raises(SparseSSMError, match="prune_by_gradient: calibration batch 1"):
        prune_by_gradient(model, batches(), sparsity=0.5, rounds=2, loss_fn=loss_fn)


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (
            {key: torch.tensor(row[:9]) for key, row in zip(samples(), sample, strict=True)}
            for sample in zip(*samples().values(), strict=True)
        )


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_streams_are_read_once(tokenizer, pipeline):
    model = tiny_model("mamba")
    chosen = m.SensitivitySparseGPTModifier(sparsity=0.5, target_output="half_way")
    loader = torch.utils.data.DataLoader(_Stream(), batch_size=2)
    oneshot(model=model, recipe=chosen, dataset=loader, processor=tokenizer, pipeline=pipeline)
    assert all(layer["tokens"] == 54 for layer in chosen.report()["layers"])


def test_data_that_llm_compressor_does_not_take(tokenizer):
    """docs/recipes.md quotes what it says, and what to do instead."""

    def run(data):
        chosen = m.SparseSSMModifier(sparsity=0.5)
        model = tiny_model("mamba", vocab_size=len(tokenizer))
        settings = {"processor": tokenizer, "splits": "train", "max_seq_length": 64}
        oneshot(model=model, recipe=chosen, dataset=data, **settings)
        return chosen.report()["layers"][0]["pruned"]

    messages = [[{"role": "user", "content": text}] for text in SOME * 2]
    chats = Dataset.from_dict({"messages": messages})
    with pytest.raises(ValueError, match="num_samples should be a positive integer value"):
        run(chats)
    assert run(chats.map(lambda row: {"text": row["messages"][0]["content"]})) == 256
    rows = Dataset.from_dict({"text": SOME * 2})
    with pytest.raises(ValueError, match="No split specified and 'train' split not found"):
        run(rows.to_iterable_dataset())
    with pytest.raises(TypeError):
        run(IterableDatasetDict({"train": rows.to_iterable_dataset()}))
    assert run(Dataset.from_list(list(rows.to_iterable_dataset().take(3)))) == 256


@pytest.mark.parametrize("fails", [False, True])
def test_the_loader_is_given_back(fails):
    ids = torch.randint(1, 96, (8, 12))
    ids[0, 0] = 96 if fails else 1
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    loader = torch.utils.data.DataLoader(data, batch_size=1, shuffle=True)
    collate = loader.collate_fn
    try:
        oneshot(model=tiny_model("mamba"), recipe=m.SparseSSMModifier(sparsity=0.5), dataset=loader)
    except SparseSSMError:
        assert fails
    assert type(loader) is torch.utils.data.DataLoader
    assert loader.collate_fn is collate
    orders = {tuple(int(batch["input_ids"][0, 1]) for batch in loader) for _ in range(8)}
    assert len(orders) > 1


# -- empty samples -------------------------------------------------------------------------

SOME = ["Some words here.", "And a few more words, so that there is something to fit to."]


def run_texts(name, texts, tokenizer, pipeline="independent", **settings):
    family, modifier = MODIFIERS[name]
    model = tiny_model(family, vocab_size=len(tokenizer))
    before = state(model)
    try:
        oneshot(
            model=model,
            recipe=modifier(),
            dataset=Dataset.from_dict({"text": texts}),
            processor=tokenizer,
            pipeline=pipeline,
            **{"shuffle_calibration_samples": False, "max_seq_length": 64, **settings},
        )
    except SparseSSMError:
        assert all(torch.equal(value, before[key]) for key, value in state(model).items())
        raise
    return state(model)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", MODIFIERS)
def test_empty_samples_are_left_out(tokenizer, warned, name, pipeline):
    found = run_texts(name, ["", *SOME, ""] * 3, tokenizer, pipeline)
    assert [w for w in warned if "empty" in w] == [
        "6 of 12 calibration samples are empty and were left out"
    ]
    expected = run_texts(name, SOME * 3, tokenizer, pipeline)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", MODIFIERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle_calibration_samples": True},
        {"batch_size": 2},
        {"batch_size": 2, "data_collator": "padding"},
        {"pad_to_max_length": True},
    ],
    ids=str,
)
def test_nothing_but_empty_samples(tokenizer, name, settings):
    message = "Modifier needs calibration data, and all 4 samples are empty"
    with pytest.raises(SparseSSMError, match=message) as error:
        run_texts(name, [""] * 4, tokenizer, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_an_empty_sample_does_not_cut_its_batch(tokenizer, warned, batch_size):
    texts = ["", SOME[0], SOME[0], ""] * 3
    settings = {"batch_size": batch_size, "shuffle_calibration_samples": True}
    run_texts("states", texts, tokenizer, **settings)
    assert not [w for w in warned if "cut" in w]


def test_texts_that_are_cut_are_counted(tokenizer, warned):
    lengths = [len(tokenizer(text).input_ids) for text in SOME]
    run_texts("states", SOME, tokenizer, batch_size=2)
    (said,) = [w for w in warned if "cut" in w]
    assert said.startswith(f"{max(lengths) - min(lengths)} calibration tokens were cut off")
    warned.clear()
    run_texts("states", SOME, tokenizer, batch_size=2, data_collator="padding")
    assert not [w for w in warned if "cut" in w]


def test_samples_from_workers(tokenizer, warned):
    found = run_texts("transitions", ["", *SOME], tokenizer, dataloader_num_workers=1)
    assert "1 of 3 calibration samples are empty and were left out" in warned
    expected = run_texts("transitions", SOME, tokenizer)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_prunes_once(tokenizer, name):
    family, modifier = MODIFIERS[name]
    chosen = modifier()
    oneshot(
        model=tiny_model(family), recipe=chosen, dataset=Loader(batches(2)), processor=tokenizer
    )
    with pytest.raises(SparseSSMError, match=f"this {type(chosen).__name__} has been used before"):
        oneshot(
            model=tiny_model(family), recipe=chosen, dataset=Loader(batches(2)), processor=tokenizer
        )


def test_rows_are_read_without_their_padding_wherever_it_stands():
    ids = torch.arange(1, 13).view(4, 3)
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]])
    found = [row.tolist() for row in unpadded_rows({"input_ids": ids, "attention_mask": mask})]
    assert found == [[2, 3], [4], [10, 12]]
    # masks of which positions see which tell of no padding
    for other in (None, mask[:, None, :, None].expand(4, 1, 3, 3), torch.ones_like(ids)):
        rows = unpadded_rows({"input_ids": ids, "attention_mask": other})
        assert [row.tolist() for row in rows] == ids.tolist()

"""Texts, windows, perplexity and the inventory of a model."""

import json
import math
import os

import pytest
import torch
from conftest import DEMO, MAMBA1, tiny_model
from transformers import AutoTokenizer

from sparsessm_plugin import evaluate_perplexity
from sparsessm_plugin.calibration.vocabulary import check_token_ids
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.components import take_inventory
from sparsessm_plugin.evaluation.data import (
    calibration_loader,
    read_texts,
    tokenize,
    windows,
)


def test_texts_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo\n"]
    rows = [{"text": "é"}, {"text": "  "}, {"text": "b", "other": 1}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(r) for r in rows))
    assert read_texts(tmp_path / "b.jsonl") == ["é", "b"]
    (tmp_path / "c.jsonl").write_text('{"content": "c"}')
    assert read_texts(tmp_path / "c.jsonl", text_field="content") == ["c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.Json"])
def test_json_lines_by_any_of_their_names(tmp_path, name):
    """Read as one plain text, keys and quotes would count as language."""
    (tmp_path / name).write_text('{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_texts(tmp_path / name) == ["a", "b"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one"), ("a.jsonl", '{"text": "one"}')])
def test_the_mark_of_windows_editors_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_texts(tmp_path / name) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"   \n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', "line 1 has no text in field 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has no text"),
        ("a.jsonl", b'["a"]\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": "abc \\ud800"}\n', "text 1 is not valid Unicode"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SparseSSMError, match=message) as error:
        read_texts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_only_regular_files_are_read(tmp_path):
    """Others may never end."""
    os.mkfifo(tmp_path / "fifo.txt")
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path in ("/dev/zero", tmp_path / "fifo.txt", tmp_path / "fifo.jsonl"):
        with pytest.raises(SparseSSMError, match="is no regular file"):
            read_texts(path)
    with pytest.raises(SparseSSMError, match="does not exist") as error:
        read_texts("n" * 5000 + ".txt")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "line",
    [
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "[" * 100_000,
        '{"text": "a", "number": ' + "9" * 5000 + "}",
    ],
    ids=["deep", "open", "long"],
)
def test_json_that_python_does_not_take(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(SparseSSMError, match=r"a\.jsonl, line 2 is not JSON") as error:
        read_texts(tmp_path / "a.jsonl")
    assert len(str(error.value)) < 500


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(SparseSSMError, match="does not exist"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(SparseSSMError, match="is a folder"):
        read_texts(tmp_path)
    with pytest.raises(SparseSSMError, match="'::' is no file and names no data set"):
        read_texts("::")
    with pytest.raises(SparseSSMError, match="is no file, and no data set of that name") as error:
        read_texts("no-such-data-set-anywhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("wikitext:raw", ("wikitext", "raw", "train")),
        ("org/name:en.noblocklist:train[:10%]", ("org/name", "en.noblocklist", "train[:10%]")),
        ("wikitext::test", ("wikitext", None, "test")),
    ],
)
def test_data_sets_by_name(monkeypatch, name, called):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", None, "b"]})
    calls = []

    def load_dataset(dataset, config, split):
        calls.append((dataset, config, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_texts(name) == ["a", "b"]
    assert calls == [called]


def test_documents_are_joined_by_the_end_of_text_token():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    first, second = (tokenizer(t).input_ids for t in ("alpha", "beta gamma"))
    tokens = tokenize(["alpha", "beta gamma"], tokenizer)
    assert tokens.tolist() == [*first, tokenizer.eos_token_id, *second]


def test_windows_do_not_overlap():
    samples = windows(torch.arange(11), 3, "text")
    assert samples.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(SparseSSMError, match="holds 11 tokens, too few for one window of 12"):
        windows(torch.arange(11), 12, "text")
    with pytest.raises(SparseSSMError, match="at least 2"):
        windows(torch.arange(11), 1, "text")


def test_vocabulary():
    check_token_ids(torch.tensor([[0, 95]]), 96, "text")
    with pytest.raises(SparseSSMError, match="token id -1;"):
        check_token_ids(torch.tensor([[-1, 3]]), 96, "text")
    with pytest.raises(SparseSSMError, match="token id 96; the model's vocabulary has ids 0 to 95"):
        check_token_ids(torch.tensor([[0, 96]]), 96, "text")


def test_calibration_draw_is_reproducible():
    samples = torch.arange(40).reshape(20, 2)
    draws = [
        torch.cat([batch["input_ids"] for batch in calibration_loader(samples, 5, 2, seed)])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == 10  # without replacement
    assert len(list(calibration_loader(samples, 99, 4))) == 5


def test_perplexity_is_exp_of_the_mean_loss():
    model = tiny_model("mamba")
    samples = torch.randint(1, 96, (5, 12))
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in samples]
    for batch_size in (1, 2, 5):
        result = evaluate_perplexity(model, samples, batch_size)
        assert result.perplexity == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
        assert (result.tokens, result.windows, result.window) == (55, 5, 12)


def test_perplexity_of_a_broken_model():
    model = tiny_model("mamba")
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(SparseSSMError, match="NaN or infinite"):
        evaluate_perplexity(model, torch.ones(1, 5, dtype=torch.int64))


def test_perplexity_of_a_checkpoint_agrees_with_transformers(assets):
    """On a trained model: the fast path against the model's own forward."""
    from transformers import AutoModelForCausalLM

    folder = assets / "models" / "mamba-6m"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = read_texts(assets / "data" / "wikitext2" / "test.detok.txt")[0][:4000]
    samples = windows(tokenize([text], tokenizer), 128, "text")[:4]
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in samples]
    expected = math.exp(sum(losses) / len(losses))
    assert evaluate_perplexity(model, samples, 2).perplexity == pytest.approx(expected, rel=1e-4)


def test_inventory_counts_every_parameter_once(family):
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter[..., 0] = 0
                parameter[..., 1] = 38
    inventory = take_inventory(model)
    assert inventory.parameters == sum(p.numel() for p in model.parameters())
    A_log = inventory.components["A_log"]
    assert A_log.zeros == A_log.parameters // 8
    # an A_log a head is no state's memory
    assert A_log.memoryless == (A_log.zeros if family in MAMBA1 else None)
    reported = inventory.to_dict()["components"]
    assert {kind for kind, c in reported.items() if "memoryless" in c} == (
        {"A_log"} if family in MAMBA1 else set()
    )
    projections = inventory.mixers[0].projections
    assert set(projections) <= set(inventory.components)
    for kind in projections:
        expected = sum(
            p.numel()
            for n, p in model.named_parameters()
            if n.endswith((f".{kind}.weight", f".{kind}_weight")) and ".mlp." not in n
        )
        assert inventory.components[kind].parameters == expected
        assert sum(layer[kind].parameters for layer in inventory.layers.values()) == expected
    assert sum(c["share"] for c in reported.values()) == pytest.approx(1)


def test_a_bias_is_no_part_of_a_pruned_weight():
    model = tiny_model("mamba2", use_bias=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("in_proj.weight"):
                weight.view(weight.shape[0], -1, 4)[..., :2] = 0
    inventory = take_inventory(model)
    for found in (inventory.components, *inventory.layers.values()):
        assert found["in_proj"].zeros == found["in_proj"].parameters / 2

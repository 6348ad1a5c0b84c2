"""The packaged checkpoint and the demo, whatever numbers the checkpoint gives."""

import json
from pathlib import Path

import pytest
from conftest import DEMO
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsessm_plugin
from sparsessm_plugin import evaluate_perplexity
from sparsessm_plugin.cli import tables
from sparsessm_plugin.evaluation.data import tokenize, windows
from sparsessm_plugin.recipes import demo, demo_picture, demo_texts
from sparsessm_plugin.recipes.pruning import DEMO_MODEL, ModelSource

FOLDER = Path(sparsessm_plugin.__file__).parent / "assets" / DEMO_MODEL
TINY = demo.Sizes(short_fits=True, samples=2, windows=1, length=64, sequences=1, steps=1, repeats=1)


@pytest.fixture(scope="module")
def checkpoint():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_weights_fit_into_four_megabytes():
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000


def test_checkpoint_loads_in_stock_transformers(checkpoint, tokenizer):
    """Matrices of float8 become the config's dtype, whole."""
    assert {p.dtype for p in checkpoint.parameters()} == {checkpoint.config.dtype}
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert file.metadata()["unscaled_float8"] == "true"
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            stored = file.get_tensor(name).float()
            assert stored.isfinite().all()
            assert checkpoint.state_dict()[name].equal(stored), name
    ours = ModelSource(DEMO_MODEL, device="cpu").load()
    for name, parameter in ours.named_parameters():
        assert parameter.equal(checkpoint.get_parameter(name)), name
    assert checkpoint.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    "text", ["plain words", "def f(x):\n\treturn x ** 2  # \u00fc\u4f60\U0001f600", "\x00\x7f ~"]
)
def test_tokenizer_writes_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert max(ids) < len(tokenizer)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_checkpoint_has_learnt_its_vocabulary(checkpoint, tokenizer):
    """Text is likelier than the same tokens in another order, by far more than chance."""
    tokens = tokenize(demo_texts.docstrings(["argparse"]), tokenizer)
    text = windows(tokens, 128, "argparse")[:2]
    mixed = text[:, sorted(range(128), key=lambda i: (i * 37) % 128)]
    assert evaluate_perplexity(checkpoint, text).perplexity < len(tokenizer) / 4
    assert (
        2 * evaluate_perplexity(checkpoint, text).perplexity
        < evaluate_perplexity(checkpoint, mixed).perplexity
    )


def test_texts_are_disjoint_and_there():
    sets = [set(demo_texts.EVALUATED), set(demo_texts.CALIBRATED), set(demo_texts.tuned_on())]
    tops = [{name.partition(".")[0] for name in names} for names in sets]
    assert not tops[0] & tops[1]
    assert not tops[0] & tops[2]
    assert not tops[1] & tops[2]
    (text,) = demo_texts.docstrings(["textwrap", "no_such_module"])
    assert "wrap" in text
    assert text.count("Collapse and truncate the given text to fit in the given width.") == 1


def test_demo(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "DEMO_MODEL", str(DEMO))  # smaller
    monkeypatch.setattr(demo, "RECIPES", ("state-50",))
    monkeypatch.setattr(demo, "CRITERIA", {"magnitude": "magnitude"})
    names, done = [], []
    result = demo.run_demo(TINY, names.append, lambda: done.append(1))
    assert len(done) == demo.count_models() + 1
    labels = [demo_picture.label(row) for row in result.rows]
    assert labels == [
        *("dense", "dense + W8A8", "state-50", "state-50 + W8A8", "A_log by magnitude")
    ]
    dense, eight, fewer, both, zeros = result.rows
    assert fewer.parameters < dense.parameters
    assert fewer.state_bytes < dense.state_bytes == zeros.state_bytes
    assert eight.parameters == dense.parameters
    assert both.weight_bytes < eight.weight_bytes < dense.weight_bytes
    assert zeros.zeros > dense.zeros
    assert both.seconds > fewer.seconds > dense.seconds == 0
    assert len({row.perplexity for row in result.rows}) == 5
    assert all(row.tokens_per_second > 0 for row in result.rows)

    tables.print_demo(result)
    shown = capsys.readouterr().out
    assert all(f"{row.perplexity:.2f}" in shown for row in result.rows)
    assert json.loads(json.dumps(result.to_dict()))["rows"][2]["name"] == "state-50"
    pytest.importorskip("matplotlib")
    demo_picture.plot_demo(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_reads_only_what_it_may(monkeypatch):
    """Whatever it prunes with, it never sees the text that it is measured on."""
    asked = []
    real = demo_texts.docstrings
    monkeypatch.setattr(demo, "docstrings", lambda names: asked.append(names) or real(names[:3]))
    monkeypatch.setattr(demo, "prune", lambda *arguments: pytest.fail("only the texts"))
    with pytest.raises(pytest.fail.Exception):
        demo.run_demo(TINY)
    assert asked == [demo_texts.CALIBRATED, demo_texts.EVALUATED]

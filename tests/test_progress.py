"""What a run says while it goes on, and what its report says it took."""

import io
import json
import re
import sys
import time

import pytest
import torch
from conftest import DEMO, Loader, batches, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from rich.console import Console
from transformers import AutoTokenizer

from sparsessm_plugin import cli, progress
from sparsessm_plugin import cost as cost_module
from sparsessm_plugin.cost import Cost
from sparsessm_plugin.methods import remove_width
from sparsessm_plugin.progress import Stage, clock, shown
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import prune

RECIPE = """\
prune_stage:
  prune_modifiers:
    SparseSSMModifier: {sparsity: 0.5}
    SensitivitySparseGPTModifier: {sparsity: 0.5, solver: sparsegpt, targets: [out_proj]}
"""


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def ticks(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def log():
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


# -- stages --------------------------------------------------------------------------------


def test_time_left_is_what_the_steps_so_far_took(ticks):
    stage = Stage("pruning", 4)
    assert stage.left() is None
    ticks.now += 50  # announced, but not begun: this is no part of it
    stage.at("first")
    ticks.now += 10
    assert stage.left() is None
    stage.advance()
    assert stage.left() == 30
    ticks.now += 4
    assert stage.left() == 26
    ticks.now += 2  # the second step takes 6 seconds: 16 for two
    stage.advance()
    assert stage.left() == 16
    ticks.now += 100
    assert stage.left() == 0


def test_time_left_is_unknown_without_a_total(ticks):
    with Stage("pruning", None) as stage:
        ticks.now += 10
        stage.advance()
        assert stage.left() is None


@given(st.integers(0, 100_000))
def test_clock_can_be_read_back(seconds):
    parts = [int(part) for part in clock(seconds).split(":")]
    assert sum(part * 60**i for i, part in enumerate(reversed(parts))) == seconds
    assert all(part < 60 for part in parts[1:])


def test_the_log_gets_a_line_now_and_then(ticks, log):
    with Stage("pruning", 100) as stage:
        for _ in range(30):
            ticks.now += 1
            stage.advance()
    assert log == [
        "pruning: 10 of 100, 1:30 left",
        "pruning: 20 of 100, 1:20 left",
        "pruning: 30 of 100, 1:10 left",
    ]


def test_a_bar_names_stage_and_layer(log):
    console = terminal()
    with shown(console), Stage("pruning", 3) as stage:
        stage.at("layers.7")
        stage.advance()
        progress._shown[-1].refresh()
    assert re.search(r"pruning: layers\.7 .*1/3 0:00 left", console.file.getvalue())
    assert not log


def test_the_screen_is_given_back_on_error():
    console = terminal()

    def work():
        with shown(console):
            Stage("pruning", 3).at("layers.7")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not progress._shown
    shows_cursor, hides_cursor = "\x1b[?25h", "\x1b[?25l"
    text = console.file.getvalue()
    assert text.rindex(shows_cursor) > text.rindex(hides_cursor)
    assert Stage("later", 1)._bars is None


def test_what_is_no_terminal_gets_plain_lines_now_and_then(ticks, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 20.0)
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with shown(console):
        with Stage("short", 3) as stage:  # work of a few seconds says nothing
            for _ in range(3):
                stage.advance()
        with Stage("pruning", 100) as stage:
            for layer in range(30):
                stage.at(f"layers.{layer}")
                ticks.now += 1.5
                stage.advance()
    assert console.file.getvalue().splitlines() == [
        "progress: pruning: layers.13: 14 of 100, 2:09 left",
        "progress: pruning: layers.27: 28 of 100, 1:48 left",
    ]
    assert not progress._shown


def test_a_run_shows_every_stage_with_its_layers(tokenizer, monkeypatch):
    said = []
    at = Stage.at
    monkeypatch.setattr(
        Stage, "at", lambda self, what: (said.append((self.name, what)), at(self, what))
    )
    console = terminal()
    with shown(console):
        prune(tiny_model("mamba"), parse_recipe(RECIPE, "test"), Loader(batches(2)), tokenizer)
        assert not progress._shown[-1].tasks  # each stage was closed
    alog = [what for name, what in said if name == "SparseSSMModifier"]
    layers = [f"backbone.layers.{i}.mixer" for i in range(2)]
    assert alog == [f"{n}{end}" for n in layers for end in (", batch 1", ", batch 2", "")]
    names = list(dict.fromkeys(name for name, _ in said))
    assert names[0] == "SparseSSMModifier"
    assert names[-1] == "SensitivitySparseGPTModifier"
    assert len(names) > 2  # what comes before its layers are pruned has stages of its own


def test_the_removal_of_width_says_what_it_is_at(monkeypatch):
    """It has no layers one after the other, and its three passes are what takes long."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    console = Console(file=io.StringIO(), force_terminal=False)
    with shown(console):
        remove_width(tiny_model("mamba2"), batches(3, 2, 8), keep=16)
    lines = console.file.getvalue().splitlines()
    assert any("covariances of the stream: 3 of 3" in line for line in lines)
    assert any("gradients of the stream: 6 of 6" in line for line in lines)  # a row each
    assert sum("subspace of the stream: " in line for line in lines) > 3


# -- what it took --------------------------------------------------------------------------


def test_each_second_counts_for_the_innermost_stage(ticks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # it has a clock of its own
    cost = Cost()
    cost.begin()
    ticks.now += 1
    with cost.stage("outer"):
        ticks.now += 10
        for _ in range(2):
            with cost.stage("inner"):
                ticks.now += 100
        ticks.now += 1000

    def fail():
        with cost.stage("inner"):
            ticks.now += 10_000
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    cost.end()
    ticks.now += 5
    cost.end()
    assert cost.to_dict()["seconds"] == {
        "outer": 1010.0,
        "inner": 10_200.0,
        "forward": 1.0,
        "total": 11_211.0,
    }


@pytest.mark.parametrize("most", [2, 1000])
def test_no_stage_waits_for_a_gpu(monkeypatch, ticks, most):
    """A GPU that is always 50 seconds behind: each stage counts what the GPU takes for it."""
    waits = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = ticks.now + 50

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, other):
            return 1e3 * (other.time - self.time)

    monkeypatch.setattr(cost_module, "_MARKS", most)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cost_module, "peak_memory_bytes", lambda: 0)
    cost = Cost()
    cost.begin()
    waits.clear()
    for _ in range(4):
        with cost.stage("outer"):
            ticks.now += 1
            with cost.stage("inner"):
                ticks.now += 10
    assert len(waits) <= (6 if most == 2 else 0)  # for those that are long past
    cost.end()
    seconds = cost.to_dict()["seconds"]
    assert seconds == {"outer": 4.0, "inner": 40.0, "forward": 0.0, "total": 44.0}


def test_report_says_what_each_modifier_took(tokenizer):
    ready = batches(count=3, padded=True)
    result = prune(tiny_model("mamba"), parse_recipe(RECIPE, "test"), Loader(ready), tokenizer)
    real = int(sum(batch["attention_mask"].sum() for batch in ready))
    stages = (
        {"observe", "compress"},
        {"first_pass", "allocate", "observe", "gather", "compress"},
    )
    for report, expected in zip(result.reports, stages, strict=True):
        seconds = dict(report["cost"]["seconds"])
        total = seconds.pop("total")
        assert set(seconds) == expected | {"forward"}
        assert sum(seconds.values()) == pytest.approx(total, abs=0.005)
        assert report["cost"]["tokens"] == real
        # the report rounds seconds to milliseconds
        close = 0.01 + 5e-4 / total
        assert report["cost"]["tokens_per_second"] == pytest.approx(real / total, rel=close)
    model_bytes = sum(p.nbytes for p in result.model.parameters())
    assert result.peak_memory_bytes >= result.reports[0]["cost"]["peak_memory_bytes"] > model_bytes
    assert result.tokens == sum(batch["input_ids"].numel() for batch in ready)
    assert sum(r["cost"]["seconds"]["total"] for r in result.reports) <= result.seconds


def test_a_modifier_without_data_reports_too(tokenizer):
    text = RECIPE.split("    Sensitivity")[0].replace("0.5", "0.5, saliency: magnitude")
    result = prune(tiny_model("mamba"), parse_recipe(text, "test"), None, tokenizer)
    cost = result.reports[0]["cost"]
    assert set(cost["seconds"]) == {"compress", "forward", "total"}
    assert cost["tokens"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu_is_that_of_its_tensors(tokenizer):
    model = tiny_model("mamba").cuda()
    ballast = torch.empty(2**28, device="cuda")
    del ballast  # 1 GiB that was held before the run
    result = prune(model, parse_recipe(RECIPE, "test"), Loader(batches(2)), tokenizer)
    assert sum(p.nbytes for p in model.parameters()) < result.peak_memory_bytes < 2**30


def test_the_command_reports_seconds_tokens_and_memory(tmp_path, topics, monkeypatch, capsys):
    text = tmp_path / "topics.txt"
    text.write_text("\n\n".join(topics[key] for key in sorted(topics)[:12]), encoding="utf-8")
    out = tmp_path / "out"
    size = ("--num-samples", "4", "--max-seq-length", "32")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("sparsessm", "prune", str(DEMO), "--recipe", "alog-50"),
            *("--calibration", str(text), "--output", str(out), *size),
        ],
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    report = json.loads((out / "sparsessm_report.json").read_text())
    assert set(report["seconds"]) == {"load", "oneshot", "save"}
    assert report["tokens_per_second"] == pytest.approx(
        4 * 32 / report["seconds"]["oneshot"], rel=0.01
    )
    assert report["peak_memory_bytes"] >= report["modifiers"][0]["cost"]["peak_memory_bytes"] > 0
    assert "left" not in capsys.readouterr().err  # no bars where nobody looks


def test_no_bar_of_a_library_shows_where_bars_are_off(capfd, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    text = "prune_stage:\n  prune_modifiers:\n    SparseSSMModifier: {sparsity: 0.5}\n"
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prune(tiny_model("mamba"), parse_recipe(text), Loader(batches(1)), tokenizer)
    assert "it/s" not in capfd.readouterr().err

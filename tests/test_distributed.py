"""Two ranks against one process, and what ranks say that do not fit together, fail or die.

Run as a script this file is one of the ranks: ``python test_distributed.py FOLDER JOB...``.
"""

import os
import subprocess
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE, Loader, batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin import distributed
from sparsessm_plugin.errors import SparseSSMError

_MAMBA = partial(tiny_model, "mamba", hidden_size=16, state_size=4, time_step_rank=2)
_FALCON = partial(tiny_model, "falcon_mamba", hidden_size=16, state_size=4, time_step_rank=2)
_MAMBA2 = partial(
    tiny_model, "mamba2", hidden_size=16, state_size=4, num_heads=4, head_dim=8, n_groups=2
)
# in the same order as one process reads them; shares of 3 and 2
_BATCHES = batches(count=5, padded=True)
_SHARES = (_BATCHES[:3], _BATCHES[3:])
_EQUAL = batches(count=4, seed=2)


def _recipes():
    from sparsessm_plugin import modifiers as m

    quantized = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*dt_proj$"]}
    half = {"sparsity": 0.5, "solver": "magnitude", "targets": ["in_proj", "out_proj"]}
    everywhere = {"targets": ["Linear", "conv1d"], "ignore": ["lm_head"]}
    return {
        "alog": (_MAMBA, "basic", [partial(m.SparseSSMModifier, sparsity=0.5)]),
        "alog-vote": (
            _MAMBA,
            "independent",
            [partial(m.SparseSSMModifier, mask_structure="2:4", saliency="hessian")],
        ),
        "states": (_MAMBA, "independent", [partial(m.StateRemovalModifier, keep=2)]),
        "states-vote": (
            _MAMBA,
            "basic",
            [partial(m.StateRemovalModifier, keep=2, saliency="paper", compensate=["D", "C"])],
        ),
        "states-normed": (_FALCON, "independent", [partial(m.StateRemovalModifier, keep=2)]),
        "states-heads": (
            partial(_MAMBA2, num_hidden_layers=1),
            "independent",
            [partial(m.StateRemovalModifier, keep=2, reconstruct_steps=40)],
        ),
        "channels": (
            _MAMBA,
            "independent",
            [partial(m.ChannelRemovalModifier, keep=16, multiple_of=8)],
        ),
        # every rank's own batches; alone the same one has them side by side
        "distilled": (_MAMBA, "independent", [partial(_distilled, distill_steps=4)]),
        "distilled-muon": (
            _MAMBA,
            "independent",
            [partial(_distilled, distill_steps=4, distill_optimizer="muon")],
        ),
        "distilled-minutes": (_MAMBA, "independent", [partial(_distilled, distill_minutes=0.01)]),
        "heads": (_MAMBA2, "basic", [partial(m.ChannelRemovalModifier, keep=2, axis="heads")]),
        "layers": (
            partial(_MAMBA, num_hidden_layers=4),
            "independent",
            [partial(m.LayerRemovalModifier, keep=2)],
        ),
        "projections": (
            _MAMBA,
            "independent",
            [partial(m.SensitivitySparseGPTModifier, sparsity=0.5)],
        ),
        "projections-groups": (
            _MAMBA,
            "independent",
            [
                partial(
                    m.SensitivitySparseGPTModifier,
                    mask_structure="2:4",
                    solver="sparsegpt",
                    targets=["in_proj", "x_proj", "out_proj"],
                )
            ],
        ),
        "projections-dense": (
            partial(tiny_model, "bamba"),
            "independent",
            [
                partial(
                    m.SensitivitySparseGPTModifier,
                    sparsity=0.5,
                    solver="sparsegpt",
                    target_output="half_way",
                    **everywhere,
                )
            ],
        ),
        "width": (
            _MAMBA2,
            "independent",
            [partial(m.WidthRemovalModifier, keep=8, channels="along", rotate=False)],
        ),
        "quantized": (
            _MAMBA,
            "independent",
            [
                partial(m.SensitivitySparseGPTModifier, **half),
                partial(m.SparseGPTQModifier, scheme="W8A8", **quantized),
            ],
        ),
    }


def _distilled(**fields):
    from sparsessm_plugin.modifiers import ChannelRemovalModifier

    fields |= {"saliency": "magnitude", "compensate": "none", "distill_learning_rate": 1e-3}
    return ChannelRemovalModifier(keep=16, multiple_of=8, **fields)


RECIPES = (
    "alog",
    "alog-vote",
    "states",
    "states-vote",
    "states-normed",
    "states-heads",
    "channels",
    "heads",
    "layers",
    "projections",
    "projections-groups",
    "projections-dense",
    "width",
    "quantized",
)
DISTILLED = ("distilled", "distilled-muon", "distilled-minutes")


def run(job, share):
    """A recipe on one share of the data: weights, and reports without what differs by nature."""
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(conftest.DEMO)
    make, pipeline, recipe = _recipes()[job]
    model = make().to(DEVICE)
    reports = []
    for new in recipe:
        modifier = new()
        oneshot(
            model=model,
            recipe=modifier,
            dataset=Loader(share),
            pipeline=pipeline,
            processor=tokenizer,
        )
        reports.append([{**e, "seconds": None} for e in modifier.report()["layers"]])
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    distillation = modifier.report().get("distillation")
    return {"weights": weights, "reports": reports, "distillation": distillation}


def run_dataset(first, last, blank=0):
    """The same through LLM Compressor's own loader, which takes one sequence at a time.

    :param blank: how many empty samples to put between
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    keys = ("input_ids", "attention_mask")
    rows = {key: torch.cat([batch[key] for batch in _BATCHES])[first:last].tolist() for key in keys}
    for values in rows.values():
        for i in range(blank):
            values.insert(2 * i, [])
    model = _MAMBA().to(DEVICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        oneshot(
            model=model,
            recipe=_recipes()["alog"][2][0](),
            dataset=Dataset.from_dict(rows),
            processor=AutoTokenizer.from_pretrained(conftest.DEMO),
            num_calibration_samples=len(rows["input_ids"]),
            shuffle_calibration_samples=False,
        )
    return {
        "weights": {k: v.cpu() for k, v in model.state_dict().items()},
        "warnings": [str(w.message) for w in caught],
    }


def refuse(share, number):
    """What ranks say that do not fit together; nothing may have changed."""
    from llmcompressor import oneshot

    from sparsessm_plugin import SparseSSMModifier

    cases = {
        "model": {"seed": number},
        "shape": {"state_size": 4 + 4 * number},
        "batches": {"data": _BATCHES[: 4 - 2 * number]},
        "none": {"data": _BATCHES[: 1 - number]},
        "blank": {
            "data": [{**b, "attention_mask": b["attention_mask"] * (1 - number)} for b in share]
        },
        "length": {"data": batches(length=24 - 4 * number)},
        "order": {"swap": number},
        "settings": {"sparsity": 0.5 + 0.1 * number},
        "target": {"targets": [] if number == 0 else ["layers.9"]},
        "both": {"targets": ["layers.9"]},
    }
    said = {}
    for case, unlike in cases.items():
        model = _MAMBA(**{k: v for k, v in unlike.items() if k in ("seed", "state_size")}).to(
            DEVICE
        )
        if unlike.get("swap"):
            with torch.no_grad():
                weight = model.backbone.layers[0].mixer.in_proj.weight
                weight[:2] = weight[:2].flip(0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        modifier = SparseSSMModifier(
            sparsity=unlike.get("sparsity", 0.5), targets=unlike.get("targets", [])
        )
        with pytest.raises(SparseSSMError) as error:
            oneshot(model=model, recipe=modifier, dataset=Loader(unlike.get("data", share)))
        said[case] = str(error.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return said


def fail(share, number):
    """Rank 1 computes what is no number, after all have agreed to begin."""
    from llmcompressor import oneshot

    from sparsessm_plugin import StateRemovalModifier

    model = _MAMBA().to(DEVICE)
    if number == 1:
        norm = model.backbone.layers[0].norm
        norm.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(SparseSSMError) as error:
        oneshot(model=model, recipe=StateRemovalModifier(keep=2), dataset=Loader(share))
    return str(error.value)


def main(folder, *jobs):
    """One rank."""
    number = int(os.environ["RANK"])
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    for job in jobs:
        if job in ("dataset", "same", "blank"):
            rows = (0, 10) if job == "same" else ((0, 5), (5, 9))[number]
            result = run_dataset(*rows, blank=2 * number if job == "blank" else 0)
        elif job in ("refuse", "fail"):
            result = {"refuse": refuse, "fail": fail}[job](_SHARES[number], number)
        elif job in DISTILLED:
            result = run(job, _EQUAL[number::2])
        else:
            result = run(job, _SHARES[number])
        torch.save(result, Path(folder) / f"{job}-{number}.pt")
    dist.destroy_process_group()


# One of two ranks, which ends without a word; the other one says who, and when it knew.
_DIE = """
import os, sys, time
import torch
import torch.distributed as dist
from sparsessm_plugin import distributed

distributed._SILENT = 3.0
dist.init_process_group("gloo")
number = distributed.gather("begin", distributed.rank())[distributed.rank()]
started = time.monotonic()
if number == 1 and sys.argv[1] == "before":
    time.sleep(2.5 * distributed._SIGN)
    os._exit(3)
if number == 1:  # after all have agreed to send tensors
    distributed._buckets = lambda tensors: os._exit(3)
try:
    distributed.reduce_sum("sums of a layer", {"x": torch.ones(2**20)})
except distributed.RanksError as error:
    print(time.monotonic() - started, error)
"""


# -- the tests ---------------------------------------------------------------------------


def start(*command):
    """The processes of two ranks."""
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(processes, expected=(0, 0)):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    codes = tuple(process.returncode for process in processes)
    assert codes == expected, "\n".join(outputs)[-4000:]
    return outputs


def results(folder, job):
    return [torch.load(folder / f"{job}-{r}.pt") for r in range(2)]


needs_two = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs, or none"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks leave that go through all jobs; the failing one comes last."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = (*RECIPES, *DISTILLED)
    finish(start(__file__, folder, *jobs, "dataset", "same", "blank", "refuse", "fail"))
    return folder


def check(ranks, alone, tolerance=1e-4 if DEVICE == "cpu" else 1e-2, rare=0.0):
    """Bit-identical over ranks, and what one process gives up to the order of summation.

    :param rare: share of a weight's entries that may be further off
    """
    first, second = ranks
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        found = first["weights"][name]
        assert found.shape == weight.shape
        assert found.dtype == weight.dtype
        scale = weight.float().abs().max().clamp(min=1e-6)
        far = ~((found.float() - weight.float()).abs() / scale < tolerance)
        assert float(far.float().mean()) <= rare, name


@pytest.fixture
def one_thread():
    """As a rank has it: matrix products round otherwise with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_two
@pytest.mark.parametrize("job", RECIPES)
def test_two_ranks_make_what_one_makes(folder, one_thread, job):
    ranks, alone = results(folder, job), run(job, _BATCHES)
    check(ranks, alone)
    assert ranks[0]["reports"] == ranks[1]["reports"]
    for made, report in zip(ranks[0]["reports"], alone["reports"], strict=True):
        for entry, other in zip(made, report, strict=True):
            assert entry.keys() == other.keys()
            for key in ("name", "tokens", "pruned", "removed", "zeros"):
                assert entry.get(key) == other.get(key)
            for key in ("hessian_trace", "relative_error", "error_left", "error_removed"):
                if other.get(key) is not None:
                    assert entry[key] == pytest.approx(other[key], rel=1e-3, abs=1e-9)


@needs_two
@pytest.mark.parametrize("job", ["distilled", "distilled-muon"])
def test_two_ranks_distill_as_one_does_with_batches_twice_as_large(folder, one_thread, job):
    ranks = results(folder, job)
    both = [
        {key: torch.cat([first[key], second[key]]) for key in first}
        for first, second in zip(_EQUAL[::2], _EQUAL[1::2], strict=True)
    ]
    # Adam moves an entry whose gradient is rounding alone by a whole step; GPUs round otherwise
    check(ranks, run(job, both), 1e-3, rare=0.0 if DEVICE == "cpu" else 0.01)
    dense = _MAMBA().state_dict()
    name = "backbone.layers.0.mixer.out_proj.weight"
    assert not torch.equal(ranks[0]["weights"][name], dense[name])


@needs_two
def test_ranks_stop_together_when_the_time_is_up(folder):
    first, second = results(folder, "distilled-minutes")
    assert first["distillation"] == second["distillation"]
    assert first["distillation"]["steps"] > 0
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


@needs_two
def test_datasets(folder, one_thread):
    ranks = results(folder, "dataset")
    check(ranks, run_dataset(0, 9))
    assert not any("another rank" in said for said in ranks[0]["warnings"])


@needs_two
def test_empty_samples_on_one_rank(folder, one_thread):
    check(results(folder, "blank"), run_dataset(0, 9))


@needs_two
def test_ranks_that_read_the_same(folder):
    """LLM Compressor 0.14 means to deal out a dataset that all ranks load, and does not."""
    said = [w for w in results(folder, "same")[0]["warnings"] if "another rank" in w]
    assert len(said) == 1
    assert said[0].startswith("SparseSSMModifier: 5 of the 5 sequences that rank 1 reads are read")


@needs_two
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("model", r"rank 1 has other weights than rank 0; .* those of backbone\.embeddings"),
        (
            "shape",
            r"rank 1 has another model .*A_log \(32, 8\) float32 in place .*A_log \(32, 4\) f",
        ),
        ("batches", "rank 0 has 4 calibration batches and rank 1 has 2"),
        ("none", "rank 1: SparseSSMModifier needs calibration data, and the dataset is empty"),
        ("blank", "rank 1: SparseSSMModifier needs calibration data, and all 4 samples are empty"),
        ("order", r"rank 1 has other weights than rank 0; .*layers\.0\.mixer\.in_proj"),
        ("length", "sequences of rank 1 have 20 tokens, those of rank 0 have 24"),
        ("settings", "rank 1 and rank 0 have different settings"),
        ("target", r"^rank 1: SparseSSMModifier.targets: 'layers.9' matches no"),
        ("both", r"^SparseSSMModifier.targets: 'layers.9' matches no"),
    ],
)
def test_ranks_that_do_not_fit_together(folder, case, message):
    import re

    said = [result[case] for result in results(folder, "refuse")]
    assert said[0] == said[1]
    assert "\n" not in said[0]
    assert re.search(message, said[0]), said[0]


@needs_two
def test_a_rank_that_fails_stops_the_other(folder):
    said = results(folder, "fail")
    assert said[1].startswith("backbone.layers.0.mixer: its input holds NaN")
    assert said[0] == f"rank 1 stopped: {said[1]}"


@pytest.mark.skipif(DEVICE == "cuda", reason="of gloo")
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_rank_that_dies_stops_the_other(when):
    outputs = finish(start("-c", _DIE, when), (0, 3))
    seconds, said = outputs[0].strip().splitlines()[-1].split(" ", 1)
    assert "rank 1 (" in said
    assert said.endswith(
        "has died: no sign of life for 3 s; the others have come to sums of a layer"
    )
    assert float(seconds) < 30


def test_a_dead_rank_is_known_within_a_minute():
    assert distributed._SILENT + 2 * distributed._SIGN < 60


# -- the command -------------------------------------------------------------------------


@pytest.fixture
def text_file(topics, tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics)[:4]), encoding="utf-8")
    return path


def prune_arguments(tmp_path, text_file, model, output):
    """Half of A_log and of the projections, calibrated on shares of 2 and 3 batches."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage:\n  a_modifiers:\n    SparseSSMModifier: {sparsity: 0.5}\n"
        "    SensitivitySparseGPTModifier: {sparsity: 0.5, solver: sparsegpt}\n"
    )
    size = ("--num-samples", 5, "--max-seq-length", 32, "--batch-size", 1)
    files = ("--output", output, "--calibration", text_file, "--text", text_file)
    return [str(a) for a in ("prune", model, "--recipe", recipe, *files, *size)]


def command(*files, **popen):
    """``sparsessm prune`` on two ranks."""
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, "-m", "sparsessm_plugin.cli", *prune_arguments(*files)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def said(process, code):
    """What the ranks, not torchrun, say of an error."""
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@needs_two
def test_command_on_two_ranks(text_file, tmp_path, one_thread, capsys):
    import json

    from safetensors.torch import load_file

    from sparsessm_plugin import cli

    process = command(tmp_path, text_file, conftest.DEMO, tmp_path / "two")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    arguments = prune_arguments(tmp_path, text_file, conftest.DEMO, tmp_path / "one")
    cli.app(arguments, standalone_mode=False)
    # so one rank has printed
    assert len(stdout.splitlines()) == len(capsys.readouterr().out.splitlines())
    folders = [tmp_path / "one", tmp_path / "two"]
    reports = [json.loads((out / "sparsessm_report.json").read_text()) for out in folders]
    weights = [load_file(out / "model.safetensors") for out in folders]
    alone, together = reports
    assert sorted(os.listdir(folders[1])) == sorted(["sparsessm_report.json", *together["files"]])
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    assert alone["files"] == together["files"]
    assert alone["after"] == together["after"]
    for report in reports:
        assert report["calibration"]["samples"] == 5
        # both modifiers have seen all windows, whoever read them
        assert {e["tokens"] for m in report["modifiers"] for e in m["layers"]} == {5 * 32}
    tolerance = 1e-5 if DEVICE == "cpu" else 1e-2
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=tolerance)
    assert together["perplexity"]["ratio"] == pytest.approx(alone["perplexity"]["ratio"], 1e-3)


@needs_two
def test_command_that_is_refused_says_it_once(text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    (line,) = said(command(tmp_path, text_file, conftest.DEMO, out), 1)
    assert "holds no sparsessm_report.json" in line
    assert os.listdir(out) == ["thesis.tex"]


@needs_two
def test_command_that_fails_half_way_leaves_nothing(text_file, tmp_path):
    """Rank 0 fails, alone: it measures perplexity, while the other one waits for it."""
    import shutil

    from transformers import AutoModelForCausalLM

    shutil.copytree(conftest.DEMO, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[0] = 3e38  # finite, and too much
        model.save_pretrained(tmp_path / "model")
    before = sorted([*os.listdir(tmp_path), "recipe.yaml"])
    (line,) = said(command(tmp_path, text_file, tmp_path / "model", tmp_path / "out"), 1)
    assert "loss on the text is NaN" in line
    assert sorted(os.listdir(tmp_path)) == before


@needs_two
def test_interrupted_command_leaves_nothing(text_file, tmp_path):
    import signal
    import time

    process = command(
        *(tmp_path, text_file, conftest.DEMO, tmp_path / "out"),
        # a test run in the background hands an ignored SIGINT on to its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    before = sorted(os.listdir(tmp_path))
    while not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count("interrupted; nothing was written") == 1, stderr
    assert sorted(os.listdir(tmp_path)) == before


# -- without ranks -----------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 4), st.integers(1, 5))
def test_shares_are_what_one_process_reads(windows, num_samples, batch_size, ranks):
    from sparsessm_plugin.evaluation.data import calibration_loader

    samples = torch.arange(2 * windows).view(windows, 2)
    alone = [b["input_ids"].tolist() for b in calibration_loader(samples, num_samples, batch_size)]
    if len(alone) < ranks:
        with pytest.raises(SparseSSMError, match=f"too few for {ranks} ranks"):
            calibration_loader(samples, num_samples, batch_size, share=(0, ranks))
        return
    shares = [
        [
            batch["input_ids"].tolist()
            for batch in calibration_loader(samples, num_samples, batch_size, share=(r, ranks))
        ]
        for r in range(ranks)
    ]
    assert [batch for share in shares for batch in share] == alone
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_gets_back_what_it_gives():
    tensors = {"a": torch.ones(3), "b": None}
    assert distributed.reduce_sum("x", tensors)["a"] is tensors["a"]
    assert distributed.gather("x", 5) == [5]
    assert distributed.total("x", 2, 0.5) == [2, 0.5]
    assert distributed.share("x", lambda: [tensors["a"]])[0] is tensors["a"]
    with pytest.raises(SparseSSMError, match=r"^wrong$"), distributed.together("x"):
        raise SparseSSMError("wrong")


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5), st.integers(1, 20))
def test_buckets_hold_everything_once(shapes, limit):
    tensors = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
    distributed._BUCKET, usual = limit, distributed._BUCKET
    try:
        for bucket in distributed._buckets(tensors):
            # a piece is no smaller than a row
            rows = [t[0].numel() if t.ndim else 1 for t in bucket if t.numel()]
            assert sum(t.numel() for t in bucket) <= max(limit, *rows, 0)
            for piece in bucket:
                piece += 1
    finally:
        distributed._BUCKET = usual
    assert all(bool((t == 1).all()) for t in tensors)


if __name__ == "__main__":
    main(*sys.argv[1:])

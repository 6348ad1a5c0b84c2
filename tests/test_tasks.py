"""lm-eval's tasks: the scores of batches, tasks that read a folder, what is refused."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, DEVICE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.tasks import evaluate_tasks, load_tasks, local_task_names
from sparsessm_plugin.families.fast_forward import fast_forward

VOCABULARY = 2048  # of the demo's tokenizer

PAIRS = [
    ("The cat sleeps.", "The cat sleep."),
    ("Those lists are sorted.", "Those lists is sorted."),
    ("A value was returned by the function.", "A value was return by the function."),
]
CHOICES = [
    {"query": "How is a list made?", "choices": ["with brackets", "by hand"], "gold": 0},
    {"query": "What is a tuple?", "choices": ["a sequence", "an animal that lives in"], "gold": 1},
    {"query": "Why?", "choices": ["because", "so", "no"], "gold": 2},
]
ENDINGS = [("The function returns", " None"), ("A list is a mutable", " sequence")]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    pairs = [{"sentence_good": g, "sentence_bad": b, "UID": "x"} for g, b in PAIRS]
    write_lines(folder / "blimp" / "first.jsonl", pairs)
    write_lines(folder / "blimp" / "second.jsonl", pairs[:2])
    write_lines(folder / "zeroshot" / "piqa" / "valid.jsonl", CHOICES)
    write_lines(folder / "zeroshot" / "arc_easy" / "test.jsonl", CHOICES[1:])
    endings = [{"context": c, "target": t, "text": c + t} for c, t in ENDINGS]
    write_lines(folder / "zeroshot" / "lambada" / "test.jsonl", endings)
    return folder


def unbatched(model, context, continuation):
    """Log-likelihood of a continuation by the model's own forward, one sequence at a time."""
    ids = torch.tensor([context + continuation], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1]
    logs = logits.double().log_softmax(-1)
    target = torch.tensor(continuation, device=model.device)
    greedy = bool((logs.argmax(-1) == target).all())
    return float(logs[torch.arange(len(target)), target].sum()), greedy


def requests(model, count=14, seed=0):
    """Contexts and continuations of many lengths; some share all but the last token, and
    some are what the model itself would write."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    drawn = [(draw(1 + 3 * n % 17), draw(1 + n % 4)) for n in range(count)]
    drawn += [(drawn[3][0], drawn[3][1][:-1] + draw(1)), drawn[5]]
    context, written = drawn[7][0], []
    with torch.no_grad():
        for _ in range(3):
            ids = torch.tensor([context + written], device=model.device)
            logits = model(ids, use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
    return [(("", ""), *request) for request in [*drawn, (context, written)]]


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba"])
def test_batches_score_what_single_sequences_do(family, demo, monkeypatch):
    from sparsessm_plugin.evaluation import harness

    model = tiny_model(family, vocab_size=VOCABULARY).to(DEVICE)
    asked = requests(model)
    expected = [unbatched(model, context, continuation) for _, context, continuation in asked]
    assert expected[-1][1]  # what the model would write
    assert not expected[0][1]
    done = []
    for batch_size, memory in ((1, None), (3, None), (64, None), (64, 30 * VOCABULARY)):
        if memory:  # neither the logits of all rows nor those of all tokens fit
            monkeypatch.setattr(harness, "_MAX_LOGITS", memory)
            monkeypatch.setattr(harness, "_LOGITS_A_STEP", 2 * VOCABULARY)
        lm = harness.BatchedLM(model, demo[1], batch_size, {}, done.append)
        with fast_forward(model):
            scored = lm._loglikelihood_tokens(asked)
        assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
        assert [s for s, _ in scored] == pytest.approx([s for s, _ in expected], rel=1e-4)
    assert sum(done) == 4 * len(asked)
    assert max(done[-8:]) < len(asked)  # the last had to take several passes


def test_scores_are_those_of_lm_eval(demo):
    """Strings in, against HFLM itself: tokens, prefixes and truncation are the same."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sparsessm_plugin.evaluation.harness import BatchedLM

    model, tokenizer = demo
    texts = [("", PAIRS[0][0]), ("Question: Why?\nAnswer:", " because"), ("ends in ", "space")]
    texts += [("a list of names " * 12, " and more"), *ENDINGS, ENDINGS[0]]
    asked = [Instance("loglikelihood", {}, text, 0) for text in texts]
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=30)
    expected = own.loglikelihood(asked, disable_tqdm=True)
    ours = BatchedLM(model, tokenizer, 4, {})
    ours._max_length = 30
    scored = ours.loglikelihood(asked, disable_tqdm=True)
    assert [s for s, _ in scored] == pytest.approx([s for s, _ in expected], rel=1e-4)
    assert [g for _, g in scored] == [g for _, g in expected]


def choices_by_hand(model, tokenizer, rows):
    """acc and acc_norm, document by document."""
    right, right_by_length = [], []
    for row in rows:
        context = tokenizer(f"Question: {row['query']}\nAnswer:").input_ids
        scores = []
        for choice in row["choices"]:
            both = tokenizer(f"Question: {row['query']}\nAnswer: {choice}").input_ids
            scores.append(unbatched(model, context, both[len(context) :])[0])
        by_length = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        right.append(float(scores.index(max(scores)) == row["gold"]))
        right_by_length.append(float(by_length.index(max(by_length)) == row["gold"]))
    return right, right_by_length


def test_local_tasks_score_what_their_definition_says(demo, data):
    model, tokenizer = demo
    assert local_task_names() == ["arc_easy_local", "blimp_local", "lambada_local", "piqa_local"]
    suite = load_tasks(local_task_names(), data)
    assert suite.requests_of(model, tokenizer) == 2 * 5 + 7 + 5 + 2
    done = []
    results = evaluate_tasks(model, tokenizer, suite, batch_size=5, progress=done.append)
    assert sum(done) == suite.requests_of(model, tokenizer)

    for name, rows in (("piqa_local", CHOICES), ("arc_easy_local", CHOICES[1:])):
        right, by_length = choices_by_hand(model, tokenizer, rows)
        metrics = results[name].metrics
        assert set(metrics) == {"acc", "acc_norm"}
        assert metrics["acc"].value == pytest.approx(statistics.mean(right))
        assert metrics["acc"].stderr == pytest.approx(statistics.stdev(right) / len(rows) ** 0.5)
        assert metrics["acc_norm"].value == pytest.approx(statistics.mean(by_length))
        assert results[name].samples == len(rows)

    start = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    better = []
    for pair in PAIRS:
        good, bad = (unbatched(model, start, tokenizer(text).input_ids)[0] for text in pair)
        better.append(float(good > bad))
    first, second = (results[f"blimp_local_{which}"] for which in ("first", "second"))
    assert first.metrics["acc"].value == pytest.approx(statistics.mean(better))
    assert second.metrics["acc"].value == pytest.approx(statistics.mean(better[:2]))
    group = results["blimp_local"]
    assert group.subtasks == ("blimp_local_first", "blimp_local_second")
    assert group.samples == 5
    both = (first.metrics["acc"].value + second.metrics["acc"].value) / 2  # not by size
    assert group.metrics["acc"].value == pytest.approx(both)
    assert group.metrics["acc"].stderr is not None

    scores = []
    for context, target in ENDINGS:
        ids = tokenizer(context).input_ids
        scores.append(unbatched(model, ids, tokenizer(context + target).input_ids[len(ids) :]))
    lambada = results["lambada_local"].metrics
    expected = math.exp(-statistics.mean(score for score, _ in scores))
    assert lambada["perplexity"].value == pytest.approx(expected, rel=1e-3)
    assert not lambada["perplexity"].higher_is_better
    assert lambada["acc"].value == statistics.mean(float(greedy) for _, greedy in scores)


def test_tasks_serve_one_model_after_another(demo, data):
    model, tokenizer = demo
    suite = load_tasks(["piqa_local", "blimp_local"], data)
    first = evaluate_tasks(model, tokenizer, suite)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(model.config).to(DEVICE).eval()
    alone = evaluate_tasks(other, tokenizer, load_tasks(["piqa_local", "blimp_local"], data))
    assert evaluate_tasks(other, tokenizer, suite) == alone != first
    assert evaluate_tasks(model, tokenizer, suite) == first
    assert len(suite.encodings) == 1
    assert "forward" not in vars(model.backbone.layers[0].mixer)


def test_limit_takes_the_first_documents(demo, data):
    model, tokenizer = demo
    limited = evaluate_tasks(model, tokenizer, load_tasks(["piqa_local"], data, limit=2))
    write_lines(data / "zeroshot" / "piqa" / "valid.jsonl", CHOICES[:2])
    assert evaluate_tasks(model, tokenizer, load_tasks(["piqa_local"], data)) == limited
    assert limited["piqa_local"].samples == 2


def test_all_paradigms_of_the_folder_are_found(assets):
    suite = load_tasks(["blimp_local"], assets / "data", limit=1)
    files = list((assets / "data" / "blimp").glob("*.jsonl"))
    assert len(suite.loaded["tasks"]) == len(files) > 1
    assert sum(len(task.instances) for task in suite.loaded["tasks"].values()) == 2 * len(files)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 is not JSON"),
        ("[]", "line 2 is no mapping"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: 'gold' is missing or wrong"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2: 'choices' is missing or wrong"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "line 2: 'choices'"),
        ('{"choices": ["b", "c"], "gold": 0}', "line 2: 'query' is missing or wrong, got None"),
    ],
)
def test_documents_that_cannot_be_used(data, line, message):
    file = data / "zeroshot" / "piqa" / "valid.jsonl"
    file.write_text(json.dumps(CHOICES[0]) + "\n" + line + "\n")
    with pytest.raises(SparseSSMError, match=message) as error:
        load_tasks(["piqa_local"], data)
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_used(data, tmp_path):
    with pytest.raises(SparseSSMError, match="piqa_local reads a folder; give --tasks-data"):
        load_tasks(["piqa_local"])
    with pytest.raises(SparseSSMError, match=r"there is no .*blimp/\*\.jsonl"):
        load_tasks(["blimp_local"], tmp_path / "none")
    (data / "zeroshot" / "piqa" / "valid.jsonl").write_text("\n")
    with pytest.raises(SparseSSMError, match="holds no documents"):
        load_tasks(["piqa_local"], data)
    (data / "zeroshot" / "piqa" / "valid.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(SparseSSMError, match="cannot read"):
        load_tasks(["piqa_local"], data)


def test_a_name_like_one_of_a_folder(data):
    with pytest.raises(SparseSSMError, match="no task 'pica_local'; did you mean piqa_local"):
        load_tasks(["pica_local"], data)


def test_a_task_of_lm_eval_whose_data_cannot_be_fetched(data):
    import lm_eval.tasks

    if not (Path(lm_eval.tasks.__file__).parent / "piqa").is_dir():
        pytest.skip("this lm-eval was installed without its tasks")
    # the tests run offline, as a machine without network does after some tries
    with pytest.raises(SparseSSMError, match="task piqa: its data cannot be fetched") as error:
        load_tasks(["piqa_local", "piqa"], data)
    assert "\n" not in str(error.value)


def test_files_are_tasks_of_plain_lm_eval_too(demo, data, monkeypatch):
    """As `lm_eval --include_path FOLDER --metadata {...}` reads them; scores are ours."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sparsessm_plugin.evaluation import tasks

    folder = str(tasks.TASK_CONFIGS)
    names = local_task_names()
    model, tokenizer = demo
    given = {"tasks_data": str(data)}
    monkeypatch.setenv("SPARSESSM_TASKS_DATA", str(data / "none"))  # what is given goes first
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=given)
    assert sorted(manager.all_tasks) == names
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    theirs = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, metadata=given, bootstrap_iters=0
    )
    ours = evaluate_tasks(model, tokenizer, load_tasks(names, data))
    for name in ("piqa_local", "arc_easy_local", "lambada_local"):
        for metric, found in ours[name].metrics.items():
            value = theirs["results"][name][f"{metric},none"]
            assert value == pytest.approx(found.value, rel=1e-4), (name, metric)
    # one task of all pairs there, a task a paradigm here
    paradigms = [result for name, result in ours.items() if name.startswith("blimp_local_")]
    right = sum(result.metrics["acc"].value * result.samples for result in paradigms)
    all_pairs = sum(result.samples for result in paradigms)
    assert theirs["results"]["blimp_local"]["acc,none"] == pytest.approx(right / all_pairs)


def test_plain_lm_eval_without_a_folder(data, monkeypatch):
    from sparsessm_plugin.evaluation.task_configs import local_data

    monkeypatch.delenv("SPARSESSM_TASKS_DATA", raising=False)
    asked = {"files": "blimp/*.jsonl", "fields": ["sentence_good", "sentence_bad"]}
    with pytest.raises(SparseSSMError, match="SPARSESSM_TASKS_DATA"):
        local_data.read(**asked)
    with pytest.raises(SparseSSMError, match="there is no"):
        local_data.read(**asked, tasks_data=str(data / "zeroshot"))
    monkeypatch.setenv("SPARSESSM_TASKS_DATA", str(data))
    assert len(local_data.read(**asked, version=1.0)["test"]) == 5


def test_without_lm_eval(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SparseSSMError, match=r"pip install 'sparsessm-plugin\[tasks\]'"):
        load_tasks(["piqa_local"], data)


def test_a_broken_model_is_no_score(data):
    model = tiny_model("mamba", vocab_size=VOCABULARY).to(DEVICE)
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with pytest.raises(SparseSSMError, match="log-likelihoods are NaN"):
        evaluate_tasks(model, tokenizer, load_tasks(["piqa_local"], data))


# -- the command ---------------------------------------------------------------------------


def test_evaluate_texts_and_tasks(sparsessm, data, tmp_path, topics):
    for name, key in (("one", "lists"), ("two", "numbers")):
        (tmp_path / f"{name}.txt").write_text(topics[key] * 3, encoding="utf-8")
    report = tmp_path / "report.json"
    texts = (f"first={tmp_path / 'one.txt'}", tmp_path / "two.txt")
    code, stdout, _ = sparsessm(
        *("evaluate", DEMO, "--text", texts[0], "--text", texts[1], "--max-seq-length", 32),
        *("--tasks", "blimp_local,piqa_local", "--tasks", "piqa_local", "--tasks-data", data),
        *("--limit", 2, "--output", report),
    )
    assert code == 0
    assert "first: perplexity" in stdout
    assert "acc_norm" in stdout
    assert "blimp_local_first" not in stdout  # of its group only the average
    written = json.loads(report.read_text())
    assert list(written["perplexity"]) == ["first", str(texts[1])]
    assert written["perplexity"]["first"]["text"] == str(tmp_path / "one.txt")
    assert written["tasks_asked_for"] == ["blimp_local", "piqa_local"]
    assert written["tasks"]["piqa_local"]["samples"] == 2
    assert written["tasks"]["blimp_local"]["metrics"]["acc"]["stderr"] is not None
    assert written["inventory"]["parameters"] == 728704


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate"),
        (("--tasks", "a,,b"), "--tasks holds an empty name"),
        (("--text", "=a.txt"), "--text must be SOURCE or NAME=SOURCE"),
        (("--text", "a=b.txt", "--text", "a=c.txt"), "--text: two are called 'a'"),
        (("--tasks", "piqa_local"), "give --tasks-data"),
        (("--tasks", "piqa_local", "--tasks-data", "none"), "there is no none/zeroshot/piqa"),
        (("--tasks", "piqa_local", "--output", "x.txt"), "--output must end in .json"),
    ],
)
def test_evaluate_refuses(refused, arguments, message):
    assert message in refused("evaluate", DEMO, *arguments)

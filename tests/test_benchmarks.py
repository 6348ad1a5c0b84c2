"""The experiments of benchmarks/: result files render to the tables that stand there."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness
import run
import stated
import typer
from harness import Configuration, Experiment, Job
from pydantic import Field

RESULTS = sorted(p.stem for p in harness.RESULTS.glob("*.json") if "versions" in p.read_text())


def tables(text):
    """Its lines that are rows or headings, without the blanks in them."""
    lines = [line for line in text.splitlines() if line.startswith(("|", "#"))]
    return [re.sub(r" +", "", line) for line in lines]


@pytest.mark.parametrize("name", RESULTS)
def test_numbers_render_to_their_tables(name):
    content = harness.load(name)
    one = harness.experiment(harness.owner(name))
    text = harness.rendered(one, content, harness.configured(one, name))
    written = (harness.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert tables(text) == tables(written)


@pytest.mark.parametrize("name", harness.names())
def test_an_experiment_is_whole(name):
    """Its files are there, its configurations are right, and its fields are options."""
    one = harness.experiment(name)
    for fields in (*one.results.values(), *one.quick.values()):
        one.configuration(**fields)
    assert set(one.results) <= set(RESULTS)
    assert set(one.extends) <= set(one.configuration.model_fields)
    for about in one.configuration.model_fields.values():
        assert about.description
    options = inspect.signature(run.command_of(name)).parameters
    assert set(options) == {*one.configuration.model_fields, *run.Common.model_fields}
    for result in set(one.quick) & set(one.results):
        assert one.ratios(harness.load(result))


def test_every_table_has_its_numbers():
    assert {path.stem for path in harness.RESULTS.glob("*.md")} == set(RESULTS)


class Fields(Configuration):
    """Rows to be made."""

    rows: list[int] = Field([1, 2, 3], description="numbers")
    power: int = Field(2, description="exponent")


def powers(job):
    rows = job.numbers.setdefault("rows", [])
    for number in job.configuration.rows:
        key = {"number": number}
        if job.mine() and not any(row | key == row for row in rows) and job.in_time(str(key)):
            with job.case(str(key)):
                value = 1 / number**job.configuration.power
                rows.append({**key, "values": [value], "seeds": [0]})
            yield key


TOY = Experiment(
    measures="powers",
    device="CPU",
    seconds=0,
    subjects="numbers",
    configuration=Fields,
    run=powers,
    render=lambda numbers, chosen: f"# Powers of {chosen.power}: {len(numbers['rows'])}",
    results={"powers": {}},
    quick={"": {"rows": [5]}},
    extends=("rows",),
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "experiment", lambda name: TOY)

    def start(given=None, **common):
        with pytest.raises(SystemExit) as ended:
            run.run_experiment("powers", TOY, given or {}, run.Common(**common))
        return ended.value.code

    return start


def numbers(name="powers"):
    return [row["number"] for row in harness.load(name)["rows"]]


def test_rows_are_saved_and_gone_on_from(toy):
    assert toy({"rows": [1, 0]}) == 1  # one fails, and the other is there
    assert numbers() == [1]
    assert harness.load("powers")["failures"].keys() == {"{'number': 0}"}
    assert toy({"rows": [1, 2]}, resume=True) == 0
    assert numbers() == [1, 2]
    assert "failures" not in harness.load("powers")
    assert "Powers of 2: 2\n" in (harness.RESULTS / "powers.md").read_text()
    assert "power 2" in toy({"power": 3}, resume=True)  # another configuration
    assert numbers() == [1, 2]
    assert toy({"power": 3, "rows": [1]}) == 0  # anew
    assert toy(resume=True) == 0  # as it was made
    assert harness.load("powers")["configuration"]["power"] == 3


def test_a_gpu_that_is_gone_is_no_failure_of_a_case(toy, monkeypatch):
    """The error that came first ends the run, and what was done before stays."""
    monkeypatch.setattr(harness, "gpu_answers", lambda: False)
    with pytest.raises(ZeroDivisionError):
        run.run_experiment("powers", TOY, {"rows": [1, 0, 2]}, run.Common())
    assert numbers() == [1]
    assert "failures" not in harness.load("powers")


def test_a_gpu_that_is_gone_makes_no_row_impossible(monkeypatch):
    from experiments import structure_quality

    row = object.__new__(structure_quality.Run)
    row.name, row.overhead, row.job = "m", 0.0, Job("rows", None, {"rows": [], "failed": {}})

    def fail(key, seed):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(row, "measure", fail)
    wanted = (0.75, "hidden", "output energy", 3.0, 0)
    monkeypatch.setattr(harness, "gpu_answers", lambda: False)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        row.try_row(*wanted)
    assert not row.job.numbers["failed"]
    monkeypatch.setattr(harness, "gpu_answers", lambda: True)
    assert row.try_row(*wanted).startswith("FAILED")
    assert len(row.job.numbers["failed"]) == 1


def test_a_gpu_is_gone_where_it_no_longer_answers(monkeypatch):
    import torch

    assert harness.gpu_answers()  # nobody uses one here

    def fail(device):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert harness.gpu_answers()
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not harness.gpu_answers()


def test_an_interrupt_keeps_what_is_done(toy, monkeypatch):
    def interrupted(job):
        if len(job.numbers["rows"]) == 2:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(Job, "mine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_experiment("powers", TOY, {}, run.Common())
    assert numbers() == [1, 2]


def test_parts_are_put_together(toy):
    for part in ("0/2", "1/2"):
        assert toy(part=part) == 0
    assert [numbers(f"powers_part{i}") for i in (0, 1)] == [[1, 3], [2]]
    paths = [harness.RESULTS / f"powers_part{i}.json" for i in (0, 1)]
    run.run_experiment("powers", TOY, {"remark": "in parts"}, run.Common(merge=paths))
    assert numbers() == [1, 3, 2]
    assert (harness.RESULTS / "powers.md").read_text().startswith("in parts\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--render", "--name", "none"], "there is no "),
        (["--part", "1"], "--part: "),
        (["--batch-size", "many"], ""),
        (["--device", "tpu"], "--device: "),
    ],
)
def test_bad_options_get_a_line(monkeypatch, capsys, line, said):
    name = "alog_quality" if "--batch-size" in line else "serving"
    monkeypatch.setattr(sys, "argv", ["run.py", name, *line])
    monkeypatch.setattr(run, "app", typer.Typer(pretty_exceptions_enable=False))
    run.app.callback()(lambda: None)
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert said in str(ended.value)
    assert ended.value.code not in (0, None)


def test_quick_writes_nothing(toy):
    assert toy(quick=True) == 0
    assert not list(harness.RESULTS.iterdir())


def test_what_is_stated_stands_beside_what_is_measured(toy, monkeypatch):
    def of_numbers(numbers):
        return {f"power of {row['number']}": row["values"][0] for row in numbers["rows"]}

    assert toy() == 0
    quick = {"powers": {"rows": [2], "power": 1}}
    one = dataclasses.replace(TOY, quick=quick, ratios=of_numbers)
    monkeypatch.setattr(harness, "experiment", lambda name: one)
    shown = stated.compare(60, ["powers"])
    assert "| powers | power of 2 | 0.250 | 0.500 |" in shown
    assert "| powers | power of 3 | 0.111 | not measured |" in shown
    assert "| 0.500 |" not in stated.compare(-1, ["powers"])
    assert harness.load("powers")["configuration"]["power"] == 2


def test_a_seed_is_merged_once():
    rows = [{"model": "a", "corpus": [1.0], "seeds": [0]}]
    harness._merge_row(rows, {"model": "a", "corpus": [9.0, 2.0], "seeds": [0, 1]})
    harness._merge_row(rows, {"model": "a", "corpus": [3.0], "recall": [4.0], "seeds": [2]})
    assert rows == [
        {"model": "a", "corpus": [1.0, 2.0, 3.0], "seeds": [0, 1, 2], "recall": [None, None, 4.0]}
    ]


def test_rows_of_structures_come_by_their_worth():
    """The mix after the longest distillation first, then axes; only those that are asked for."""
    from experiments.structure_quality import DISTILLED, METHODS, Fields, wanted_rows

    every = list(wanted_rows(Fields(shares=[0.5], seeds=2)))
    names = [method for methods in METHODS.values() for method in methods]
    distilled = sum(name.endswith(tuple(DISTILLED)) for name in names)  # with minutes only
    assert len(set(every)) == len(every) == 2 * (3 * len(names) - distilled)
    assert every[:2] == [(0.5, "mix", "fit", 3, 0), (0.5, "layers", "loss after the fit", 3, 0)]
    asked = Fields(minutes=[0], seeds=1, rows=["mix", "hidden: magnitude"])
    assert list(wanted_rows(asked)) == [
        (share, axis, method, 0, 0)
        for axis, method in (("mix", "fit"), ("hidden", "magnitude"))
        for share in (0.75, 0.5)
    ]


def test_options_that_take_several():
    line = ["alog", "--models", "a", "b", "--seeds", "3", "--models", "c"]
    spread = run.spread(line, {"--models"})
    assert spread == ["alog", "--models", "a", "--models", "b", "--seeds", "3", "--models", "c"]

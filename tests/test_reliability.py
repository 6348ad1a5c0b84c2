"""The benchmark of reliability: what it calls right, and that cases come again."""

import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import DEMO

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from reliability_cases.processes import (
    Ran,
    case_folder,
    draw,
    judge,
    make_case,
    problem_of,
    snapshot,
)

from sparsessm_plugin.files import REPORT_NAME, list_files, write_json


def result(folder):
    """What ``prune`` leaves: a checkpoint and a report that names its files."""
    shutil.copytree(DEMO, folder)
    write_json(folder / REPORT_NAME, {"files": list_files(folder)})
    return folder


@pytest.mark.parametrize(("section", "count"), [("recipes", 60), ("checkpoints", 30)])
def test_a_case_comes_again_by_its_number(tmp_path, section, count):
    found = []
    for number in random.Random(0).sample(range(count), 12):
        again = []
        for root in ("one", "two"):
            with case_folder(tmp_path / root, "case") as place:
                case = make_case(section, 0, number, place)
                again.append((case, snapshot(place / "work")))
        assert again[0] == again[1], number
        found.append(again[0])
    assert len({case.what for case, _ in found}) == len(found)
    assert draw(0, section, 1).random() != draw(1, section, 1).random()


@pytest.mark.parametrize(
    ("ran", "expected", "verdict"),
    [
        ({"code": 1, "stderr": "error: x must be 1, got 2\n"}, "refused", "one line"),
        ({"code": 1, "stderr": "warning: few tokens\nerror: no\n"}, "either", "one line"),
        ({"code": 1, "stderr": "error: no\n"}, "works", "refused, though right"),
        ({"code": 1, "stderr": "error: a\nerror: b\n"}, "refused", "several lines"),
        ({"code": 1, "stderr": ""}, "refused", "no message"),
        ({"code": 1, "stderr": "error: cannot load x:\n"}, "refused", "unclear"),
        ({"code": 1, "stderr": f"error: {'x' * 5000}\n"}, "refused", "too long"),
        ({"code": 1, "stderr": "Traceback (most recent call last)\n"}, "refused", "traceback"),
        ({"code": -11, "stderr": ""}, "refused", "died of signal 11"),
        ({"code": -9, "ended": "time", "stderr": ""}, "refused", "hang"),
        ({"code": 1, "stderr": "error: no\n", "children": ["x"]}, "either", "child processes left"),
        ({"code": 0, "stderr": ""}, "works", "exit 0, result not whole"),
    ],
)
def test_only_one_clear_line_is_a_refusal(tmp_path, ran, expected, verdict):
    with case_folder(tmp_path, "case") as place:
        before = snapshot(place / "work")
        ran = Ran(**{"ended": "exit", "seconds": 1.0, "peak": 0, **ran})
        assert judge(ran, expected, place, before)[0] == verdict


def test_what_is_left_counts(tmp_path):
    with case_folder(tmp_path, "case") as place:
        before = snapshot(place / "work")
        good, bad = Ran(0, "exit", 1.0, 0), Ran(1, "exit", 1.0, 0, stderr="error: no\n")
        result(place / "work" / "out")
        assert judge(good, "works", place, before)[0] == "worked"
        assert judge(good, "refused", place, before)[0] == "accepted"
        assert judge(bad, "refused", place, before)[0] == "left something behind"
        (place / "tmp" / "x").touch()
        assert judge(good, "works", place, before)[0] == "temporary files left"
        (place / "payload").touch()
        assert judge(bad, "refused", place, before)[0] == "A PAYLOAD RAN"


def test_a_result_is_whole_or_not(tmp_path):
    folder = result(tmp_path / "out")
    assert problem_of(folder) is None
    (folder / "more.txt").touch()
    assert "more.txt" in problem_of(folder)
    (folder / "more.txt").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert problem_of(folder) is not None

"""Nothing half-written is ever seen, and nothing of others is overwritten."""

import json
import os

import pytest

from sparsessm_plugin import files
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.files import REPORT_NAME, output_directory, write_config, write_json


def write_result(folder, content):
    (folder / "content").write_text(content)
    (folder / REPORT_NAME).write_text(json.dumps({"files": ["content"]}))


def test_directory_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with output_directory(target) as folder:
        assert folder.parent == target.parent
        write_result(folder, "new")
        assert not target.exists()
    assert (target / "content").read_text() == "new"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_earlier_result_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "out"
    for content in ("old", "new"):
        with output_directory(target) as folder:
            write_result(folder, content)
    assert (target / "content").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("earlier", [True, False])
def test_failure_leaves_what_was_there(tmp_path, error, earlier):
    target = tmp_path / "out"
    if earlier:
        with output_directory(target) as folder:
            write_result(folder, "old")

    def fail():
        with output_directory(target) as folder:
            write_result(folder, "half")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == (["out"] if earlier else [])
    if earlier:
        assert (target / "content").read_text() == "old"


def test_failure_of_the_last_rename_brings_the_old_result_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    with output_directory(target) as folder:
        write_result(folder, "old")
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    rename = os.rename
    calls = []

    def failing(source, destination):
        calls.append(destination)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", failing)

    def replace():
        with output_directory(target) as folder:
            write_result(folder, "new")

    with pytest.raises(SparseSSMError, match="No space left on device"):
        replace()
    assert (target / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_not_ours_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, message in (
        ("file", "is not a directory"),
        ("link", "is not a directory"),
        ("folder", f"holds no {REPORT_NAME}"),
    ):
        with pytest.raises(SparseSSMError, match=message), output_directory(tmp_path / name):
            pass
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with output_directory(tmp_path / "out") as folder:
        write_result(folder, "new")
    assert (tmp_path / "out" / "content").read_text() == "new"


def test_unwritable_parent(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(SparseSSMError, match="cannot write"),
        output_directory(tmp_path / "file" / "out"),
    ):
        pass


def test_left_overs_of_killed_processes_are_removed(tmp_path):
    host = files._host()
    dead = tmp_path / f".out.{host}.999999999.abc.partial"
    kept = [
        tmp_path / f".out.{host}.{os.getpid()}.abc.partial",  # alive
        tmp_path / ".out.elsewhere.999999999.abc.partial",  # another machine's
        tmp_path / f".out.{host}.9.{host}.999999999.abc.partial",  # of the target `out.<host>.9`
    ]
    for folder in (dead, *kept):
        folder.mkdir()
    with output_directory(tmp_path / "out") as folder:
        write_result(folder, "new")
    assert not dead.exists()
    assert all(folder.exists() for folder in kept)


def test_names_that_begin_alike_do_not_disturb_each_other(tmp_path):
    with output_directory(tmp_path / "m-0.9999999") as outer:
        write_result(outer, "outer")
        with output_directory(tmp_path / "m-0") as inner:
            write_result(inner, "inner")
    assert sorted(os.listdir(tmp_path)) == ["m-0", "m-0.9999999"]


def test_a_result_with_files_of_others_in_it_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with output_directory(target) as folder:
        write_result(folder, "old")
    (target / "deep").mkdir()
    (target / "deep" / "notes.txt").write_text("mine")
    with (
        pytest.raises(SparseSSMError, match=r"holds deep/notes\.txt, which this command did not"),
        output_directory(target),
    ):
        pass
    assert (target / "deep" / "notes.txt").read_text() == "mine"
    assert (target / "content").read_text() == "old"


def test_errors_of_the_caller_stay_what_they_are(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="elsewhere"),
        output_directory(tmp_path / "out"),
    ):
        (tmp_path / "elsewhere" / "file").read_text()


def test_permissions_follow_the_umask(tmp_path):
    with output_directory(tmp_path / "out") as folder:
        write_result(folder, "new")
        os.chmod(folder / "content", 0o600)  # as safetensors leaves its files
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out" / "content").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_numbers_that_json_does_not_know(tmp_path):
    nan, infinity, path = float("nan"), float("inf"), tmp_path / "report.json"
    write_json(path, {"a": [1.5, nan, (infinity, {"b": -infinity})], "c": True})
    assert json.loads(path.read_text()) == {"a": [1.5, None, [None, {"b": None}]], "c": True}
    write_config(path, {"time_step_limit": [0.0, infinity], "a": {"__float__": "Infinity"}})
    assert "0.0,\n    Infinity\n" in path.read_text()
    assert json.loads(path.read_text())["a"] == {"__float__": "Infinity"}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["report.json"]
    with pytest.raises(SparseSSMError, match="cannot write"):
        write_json(tmp_path / "none" / "report.json", {})

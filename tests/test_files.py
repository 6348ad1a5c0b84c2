"""Nothing half-written is ever seen, and nothing of others is overwritten."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

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
        ("link", "is a symbolic link"),
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


KILLED = """
import os, signal, sys
from pathlib import Path
from sparsessm_plugin import files
target = Path(sys.argv[1])
if sys.argv[2] == "file":
    files.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    files.write_bytes(target, b"new")
with files.output_directory(target) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(target, how):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", ["folder", "file"])
def test_what_a_killed_process_left_is_removed(tmp_path, how):
    target = tmp_path / "out"
    assert start(target, how).wait(60) == -signal.SIGKILL
    (left_over,) = os.listdir(tmp_path)
    assert left_over.startswith(".out.")
    if how == "file":
        write_json(target, {})
    else:
        with output_directory(target) as folder:
            write_result(folder, "new")
    assert os.listdir(tmp_path) == ["out"]


def test_whether_a_process_lives_is_not_seen_by_its_number(tmp_path):
    """After a restart another process has it; in another container nobody."""
    host, boot = files._host(), files._boot()
    dead = [
        tmp_path / f".out.{host}.0123456789ab.abc.partial",  # an earlier start of this machine
        tmp_path / f".out.container.{boot}.abc.partial",  # a container that is no more
    ]
    kept = [
        tmp_path / ".out.elsewhere.0123456789ab.abc.partial",  # another machine's
        tmp_path / f".out.{host}.9.{host}.{boot}.abc.partial",  # of the target `out.<host>.9`
    ]
    for folder in (*dead, *kept):
        folder.mkdir()
    with output_directory(tmp_path / "out") as folder:
        write_result(folder, "new")
    assert not any(folder.exists() for folder in dead)
    assert all(folder.exists() for folder in kept)


def test_two_processes_do_not_write_to_one_output(tmp_path):
    target = tmp_path / "out"
    first = start(target, "wait")
    partial = first.stdout.readline().strip()
    assert os.listdir(partial) == ["half"]
    with (
        pytest.raises(SparseSSMError, match="another process is writing to"),
        output_directory(target),
    ):
        pass
    assert os.listdir(partial) == ["half"]
    first.communicate("")
    with output_directory(target) as folder:
        write_result(folder, "new")
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "out"
    with output_directory(target) as folder:
        write_result(folder, "old")
    target.rename(tmp_path / f".out.{files._host()}.{files._boot()}.abc.old")
    with pytest.raises(RuntimeError), output_directory(target):
        raise RuntimeError
    assert (target / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_all_is_on_the_disk_before_it_is_seen(tmp_path, monkeypatch):
    events = []
    fsync, exchange, replace = os.fsync, files._exchange, os.replace

    def record(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", record)
    monkeypatch.setattr(files, "_exchange", lambda *a: events.append("swap") or exchange(*a))
    monkeypatch.setattr(files.os, "replace", lambda *a: events.append("replace") or replace(*a))
    for _ in range(2):
        events.clear()
        with output_directory(tmp_path / "out") as folder:
            write_result(folder, "new")
    assert sorted(events[:2]) == ["content", REPORT_NAME]
    assert events[2].endswith(".partial")  # its names
    assert events[3:] == ["swap", tmp_path.name]
    events.clear()
    write_json(tmp_path / "r.json", {})
    assert events[0].startswith(".r.json.")
    assert events[1:] == ["replace", tmp_path.name]


def test_the_umask_of_the_process_is_left_alone(tmp_path, monkeypatch):
    """Another thread would make files for everybody while it is 0."""

    def umask(mask):
        raise AssertionError("changed")

    monkeypatch.setattr(os, "umask", umask)
    write_json(tmp_path / "r.json", {})
    with output_directory(tmp_path / "out") as folder:
        write_result(folder, "new")


@pytest.mark.parametrize(
    "report",
    [
        "",
        "null",
        "[]",
        '{"files": 5}',
        '{"files": {"content": 1}}',
        '{"files": "content"}',
        '{"files": [["content"]]}',
        '{"files": [null, 1]}',
        '{"files": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"files": [' + "9" * 5000 + "]}",
        b"\xff\xfe",
    ],
    ids=lambda report: str(report[:30]),
)
def test_a_damaged_report_is_no_report(tmp_path, report):
    target = tmp_path / "out"
    with output_directory(target) as folder:
        write_result(folder, "old")
    report = report if isinstance(report, bytes) else report.encode()
    (target / REPORT_NAME).write_bytes(report)
    with pytest.raises(SparseSSMError, match=f"holds no {REPORT_NAME} of ours"):
        files.check_output_directory(target)


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

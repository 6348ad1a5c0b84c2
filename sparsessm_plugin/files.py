"""Writing files and directories so that nothing half-written is ever seen."""

import ctypes
import errno
import fcntl
import io
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sparsessm_plugin.errors import SparseSSMError

REPORT_NAME = "sparsessm_report.json"

# Files of this process that a later run goes on from, as they are asked for by name.
resumable: set[Path] = set()

_PARTIAL, _OLD = ".partial", ".old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write :func:`to_json` beside the target and rename it into place.

    :raises SparseSSMError: the file cannot be written
    """
    write_bytes(path, to_json(content).encode())


def to_json(content: Any) -> str:
    """JSON knows no NaN and no infinity: where a number is not finite, null is written."""
    return json.dumps(_finite_or_null(content), indent=2, allow_nan=False) + "\n"


def write_config(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a config.json likewise, with numbers as transformers' loaders read them.

    A bare ``Infinity``, as transformers 4 wrote it, stays one.

    :raises SparseSSMError: the file cannot be written
    """
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def _finite_or_null(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite_or_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite_or_null(value) for value in content]
    return content


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside the target, onto the disk, and rename it into place.

    :raises SparseSSMError: the file cannot be written
    """
    write_through(path, lambda file: file.write(content))


def write_figure(path: str | os.PathLike[str], figure: Any, dpi: int) -> None:
    """Draw a figure of matplotlib: as SVG where the name ends so, else as PNG.

    :raises SparseSSMError: the file cannot be written
    """
    picture = io.BytesIO()
    drawn_as = "svg" if os.fspath(path).lower().endswith(".svg") else "png"
    figure.savefig(picture, format=drawn_as, dpi=dpi)
    write_bytes(path, picture.getvalue())


def write_through(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """:func:`write_bytes` for what is not in memory as a whole.

    :param write: writes the content into the open file that it is given
    :raises SparseSSMError: the file cannot be written
    """
    target = Path(path)
    partial = None
    try:
        _remove_left_over(target)
        with _claimed(target, _create_file) as (partial, handle):
            with os.fdopen(handle, "wb", closefd=False) as file:
                write(file)
            os.fsync(handle)
            os.replace(partial, target)
            _sync_directory(target.parent)
    except OSError as error:
        raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if partial is not None and os.path.lexists(partial):
            os.unlink(partial)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON that may be damaged.

    :raises OSError: the file cannot be read
    :raises ValueError: it is no JSON, or JSON that Python does not take, such as nested too deep
    """
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """JSON from text.

    :raises ValueError: it is no JSON, or JSON that Python does not take, such as nested too deep
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


_held: list[list[tuple[Path, Any]]] = []  # one for each :func:`reports_held` that is open


def write_report(path: str | os.PathLike[str], content: Any) -> None:
    """:func:`write_json`, or, inside of :func:`reports_held`, at its end."""
    if _held:
        _held[-1].append((Path(path), content))
    else:
        write_json(path, content)


@contextmanager
def reports_held() -> Iterator[None]:
    """Hold reports back until all that they report has worked; none is written on an error."""
    reports: list[tuple[Path, Any]] = []
    _held.append(reports)
    try:
        yield
    finally:
        _held.pop()
    for path, content in reports:
        write_report(path, content)


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse a path that some writer of files cannot be given.

    Those of safetensors and tokenizers take UTF-8 only.

    :raises SparseSSMError: showing the path
    """
    text = os.fspath(path)
    if "\0" in text:
        raise SparseSSMError(f"{text[:200]!r} is no path: it holds a null byte")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SparseSSMError(
            f"{text[:200]!r} holds bytes that are no UTF-8; choose another path"
        ) from error


def check_output_directory(path: str | os.PathLike[str]) -> None:
    """Refuse an output directory that holds anything this package did not write.

    :raises SparseSSMError: the path is a file, or a directory that is neither empty nor holds
        exactly the files that our report in it names
    """
    check_path(path)
    target = Path(path)
    if target.is_symlink():
        raise SparseSSMError(f"output {target} is a symbolic link; give what it points to")
    if target.exists() and not target.is_dir():
        raise SparseSSMError(f"output {target} exists and is not a directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        files = read_json(target / REPORT_NAME)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        files = None
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise SparseSSMError(
            f"output directory {target} exists and holds no {REPORT_NAME} of ours; "
            "only results of this command are replaced, choose another directory"
        )
    written = {REPORT_NAME, *files}
    foreign = sorted(set(list_files(target)) - written)
    if foreign:
        raise SparseSSMError(
            f"output directory {target} holds {foreign[0]}, which this command did not write; "
            "choose another directory"
        )


def list_files(folder: Path) -> list[str]:
    """Everything in a folder but directories, relative to it."""
    return sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_symlink() or not file.is_dir()
    )


@contextmanager
def output_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an error.

    On an error or an interrupt it is removed and ``path`` stays as it was. An earlier result
    at ``path`` is swapped against the new one in a single step where the system can. What is in
    it has reached the disk before it is seen at ``path``.

    :raises SparseSSMError: ``path`` is taken by something else, another process is writing to it,
        or it cannot be written
    """
    target = Path(path).absolute()
    check_output_directory(target)
    _remove_left_over(target)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial, _ = stack.enter_context(_claimed(target, _create_directory))
        except OSError as error:
            raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        for other in partials(target):
            if other != partial and _lock_state(other) == "held":
                raise SparseSSMError(
                    f"another process is writing to {target}, in {other.name} beside it; wait for "
                    "it or choose another output"
                )
        yield partial
        try:
            _finish(partial)
            check_output_directory(target)  # somebody else may have come first
            _move_into_place(partial, target)
            _sync_directory(target.parent)
        except OSError as error:
            raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def scratch_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that is removed at the end, whatever happens.

    What a killed process has left of one is removed by the next that writes to ``path``.

    :raises SparseSSMError: it cannot be made
    """
    target = Path(path).absolute()
    with ExitStack() as stack:
        try:
            _remove_left_over(target)
            folder, _ = stack.enter_context(_claimed(target, _create_directory))
        except OSError as error:
            raise SparseSSMError(
                f"cannot write beside {target}: {error.strerror or error}"
            ) from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _finish(folder: Path) -> None:
    """Give everything in a folder the permissions of new files, and bring it onto the disk."""
    mode = folder.stat().st_mode & 0o777  # made with the umask
    for file in folder.rglob("*"):  # safetensors writes for the owner's eyes only
        if file.is_symlink():
            continue
        is_directory = file.is_dir()
        os.chmod(file, mode if is_directory else mode & 0o666)
        if not is_directory:
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    for directory in (d for d in folder.rglob("*") if d.is_dir() and not d.is_symlink()):
        _sync_directory(directory)
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    """Bring the names in a folder onto the disk, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
    elif not any(target.iterdir()):
        os.replace(partial, target)  # rename(2) replaces an empty directory
    elif not _exchange(partial, target):
        old = partial.with_suffix(_OLD)
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    code = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    return code == 0


# What is being written is a sibling of its target, named after it, this machine and its latest
# start, and locked as long as the process lives: a number of a process would belong to another
# one after a restart, and to nobody in another container.


def _remove_left_over(target: Path) -> None:
    """Remove what processes of this machine were writing to a target when they were killed."""
    for left_over in partials(target):
        if _lock_state(left_over) != "free":
            continue
        if left_over.suffix == _OLD and not os.path.lexists(target):
            os.rename(left_over, target)  # killed between the two renames that replace it
        elif left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def partials(target: Path) -> list[Path]:
    """What processes of this machine write, or wrote, to a target."""
    name = re.compile(
        rf"\.{re.escape(target.name)}"
        rf"\.(?:{re.escape(_host())}\.[0-9a-f]+|[A-Za-z0-9-]+\.{_boot()})"
        rf"\.[^.]+(?:{_PARTIAL}|{_OLD})"
    )
    try:
        found = os.listdir(target.parent)
    except OSError:
        return []
    return [target.parent / entry for entry in found if name.fullmatch(entry)]


def _lock_state(partial: Path) -> Literal["free", "held", "unknown"]:
    """Whether a living process has a partial file or folder locked."""
    try:
        handle = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return "unknown"
    try:
        for _ in range(5):  # another process may just be asking the same
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return "free"
            except BlockingIOError:
                time.sleep(0.02)
        return "held"
    except OSError:  # a file system without locks
        return "unknown"
    finally:
        os.close(handle)


@contextmanager
def _claimed(target: Path, create: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A new locked sibling of a target, and its open handle.

    :param create: makes it and opens it
    """
    for _ in range(100):
        name = f".{target.name}.{_host()}.{_boot()}.{secrets.token_hex(4)}{_PARTIAL}"
        partial = target.parent / name
        try:
            handle = create(partial)
        except FileExistsError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.path.lexists(partial)
        except BlockingIOError:
            taken = True  # somebody has found it before it was locked
        except OSError:
            taken = False  # a file system without locks
        if not taken:
            break
        os.close(handle)
    else:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    try:
        yield partial, handle
    finally:
        os.close(handle)


def _create_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _create_directory(path: Path) -> int:
    os.mkdir(path, 0o777)
    return os.open(path, os.O_RDONLY)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


@cache
def _boot() -> str:
    """What tells this start of the machine from others, also inside of containers."""
    try:
        found = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return "0"
    return re.sub(r"[^0-9a-f]", "", found)[:12] or "0"

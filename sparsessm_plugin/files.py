"""Writing files and directories so that nothing half-written is ever seen."""

import ctypes
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsessm_plugin.errors import SparseSSMError

REPORT_NAME = "sparsessm_report.json"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON beside the target and rename it into place.

    JSON knows no NaN and no infinity: where a number is not finite, null is written.

    :raises SparseSSMError: the file cannot be written
    """
    text = json.dumps(_finite_or_null(content), indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


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
    """Write a file beside the target and rename it into place.

    :raises SparseSSMError: the file cannot be written
    """
    target = Path(path)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", suffix=".partial", delete=False
        ) as file:
            partial = file.name
            file.write(content)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, target)
    except OSError as error:
        raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)


def check_output_directory(path: str | os.PathLike[str]) -> None:
    """Refuse an output directory that holds anything this package did not write.

    :raises SparseSSMError: the path is a file, or a directory that is neither empty nor holds
        exactly the files that our report in it names
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SparseSSMError(f"output {target} exists and is not a directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        report = json.loads((target / REPORT_NAME).read_text(encoding="utf-8"))
        written = {REPORT_NAME, *report["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise SparseSSMError(
            f"output directory {target} exists and holds no {REPORT_NAME} of ours; "
            "only results of this command are replaced, choose another directory"
        ) from None
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
    at ``path`` is swapped against the new one in a single step where the system can.

    :raises SparseSSMError: ``path`` is taken by something else, or cannot be written
    """
    target = Path(path).absolute()
    check_output_directory(target)
    _remove_left_over(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(
                dir=target.parent,
                prefix=f".{target.name}.{_host()}.{os.getpid()}.",
                suffix=".partial",
            )
        )
    except OSError as error:
        raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield partial
        try:
            os.chmod(partial, 0o777 & ~_umask())
            for file in partial.rglob("*"):  # safetensors writes for the owner's eyes only
                os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
            check_output_directory(target)  # somebody else may have come first
            _move_into_place(partial, target)
        except OSError as error:
            raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
    elif not any(target.iterdir()):
        os.replace(partial, target)  # rename(2) replaces an empty directory
    elif not _exchange(partial, target):
        old = partial.with_suffix(".old")
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


def _remove_left_over(target: Path) -> None:
    """Remove partial directories of processes on this machine that were killed."""
    if not target.parent.is_dir() or not Path("/proc/self").exists():
        return
    mine = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(_host())}\.(\d+)\.[^.]+\.partial")
    for left_over in target.parent.iterdir():
        match = mine.fullmatch(left_over.name)
        if match and left_over.is_dir() and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(left_over, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Writing files and directories so that nothing half-written is ever seen."""

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsessm_plugin.errors import SparseSSMError

REPORT_NAME = "sparsessm_report.json"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON beside the target and rename it into place.

    :raises SparseSSMError: the file cannot be written
    """
    target = Path(path)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=f".{target.name}.", suffix=".partial", delete=False
        ) as file:
            partial = file.name
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, target)
    except OSError as error:
        raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)


def check_output_directory(path: str | os.PathLike[str]) -> None:
    """Refuse an output directory that holds anything this package did not write.

    :raises SparseSSMError: the path is a file, or a directory without our report
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SparseSSMError(f"output {target} exists and is not a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / REPORT_NAME).is_file():
        raise SparseSSMError(
            f"output directory {target} exists and holds no {REPORT_NAME}; "
            "only results of this command are replaced, choose another directory"
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
                dir=target.parent, prefix=f".{target.name}.{os.getpid()}.", suffix=".partial"
            )
        )
    except OSError as error:
        raise SparseSSMError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        os.chmod(partial, 0o777 & ~_umask())
        yield partial
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
    """Remove partial directories of processes that were killed before they could."""
    for left_over in target.parent.glob(f".{target.name}.*.partial"):
        pid = left_over.name.removeprefix(f".{target.name}.").split(".")[0]
        if pid.isdigit() and left_over.is_dir() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left_over, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

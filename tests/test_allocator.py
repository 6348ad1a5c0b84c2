"""Memory that is freed and kept."""

import ctypes
import platform

import pytest
from conftest import fresh_process

from sparsessm_plugin.backends import allocator

PROGRAM = """
import ctypes, json, sys
from sparsessm_plugin.backends.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = ctypes.c_void_p(libc.malloc(2**27))
ctypes.memset(block, 1, 2**27)
libc.free(block)
with open("/proc/self/statm") as pages:
    kept = int(pages.read().split()[1]) * 4096 >= 2**27
assert "torch" not in sys.modules
print(json.dumps(kept))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the C library of GNU")
@pytest.mark.parametrize(("what", "kept"), [("keep", True), ("leave", False)])
def test_freed_memory_stays_with_the_process(what, kept):
    assert fresh_process(PROGRAM, what) is kept


@pytest.mark.parametrize("found", [object(), None])
def test_other_c_libraries_are_left_alone(monkeypatch, found):
    def load(name):
        if found is None:
            raise OSError("there is none")
        return found

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not allocator.keep_freed_memory()

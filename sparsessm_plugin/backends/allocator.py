"""How the C library treats memory that was freed. Imports nothing heavy."""

import ctypes

# M_MMAP_MAX: no block of its own; M_TRIM_THRESHOLD: nothing given back, up to 2 GiB at the end of
# the heap; M_TOP_PAD: grow by so much at once (mallopt(3), whose parameters are C ints)
_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free, instead of asking for zeroed pages again.

    glibc maps every large block by itself and gives it back at once, so that each tensor of a
    forward pass faults on all its pages: up to a third of the time on a CPU. The process then
    holds a tenth to a third more memory. For processes of our own: it holds for all that they do.

    :return: whether it does; other C libraries have no such setting
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(parameter, value) for parameter, value in _MALLOPT.items())

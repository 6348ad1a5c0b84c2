"""A process that ends with the one that started it."""

import ctypes
import os
import signal

PARENT = "SPARSESSM_PARENT"  # the number of the process whose end a run must not outlive

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this process be terminated when the one that started it for a comparison ends.

    However it ends: a parent that is killed tells nobody.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    except (OSError, AttributeError):
        return  # no Linux
    if str(os.getppid()) != parent:  # it has ended before it was asked for
        os.kill(os.getpid(), signal.SIGTERM)

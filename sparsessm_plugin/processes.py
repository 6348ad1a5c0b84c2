"""What a process of the command asks of the system, before torch is imported."""

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


def wait_passively() -> None:
    """Let threads that have nothing to do sleep, unless ``OMP_WAIT_POLICY`` says otherwise.

    GNU's OpenMP, which torch computes with on the CPU, lets them turn in a loop until the others
    are there. Where another program has one of the cores, each small operation then waits for a
    turn of the scheduler. The variable is read once, when torch is imported; what this process
    starts inherits it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

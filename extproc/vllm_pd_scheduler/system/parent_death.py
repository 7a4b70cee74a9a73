"""Ends a process when its parent dies, even by SIGKILL, so that none is left behind.

``python -m vllm_pd_scheduler.system.parent_death PARENT COMMAND…`` runs a command in this way; ``PARENT`` is
the parent's process id.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Option of ``prctl(2)``, from ``linux/prctl.h``."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent, process ``parent``, ends. Linux only.

    To the kernel the parent is the *thread* that started this process: that thread must live as long as this
    process should. Does nothing on other systems. Raise :exc:`OSError` if the kernel refuses, and
    :exc:`SystemExit` if the parent has ended already.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # For a parent that ended before the call, the kernel sends nothing.
    if os.getppid() != parent:
        raise SystemExit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])

"""Ties a process's life to its parent's.

``python -m vllm_pd_scheduler.system.parent_death PARENT COMMAND…`` runs a command so.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent, process `parent`, is gone (Linux only).

    The kernel means the *thread* that started this process: that thread must live as long as the process.
    Raise OSError when the kernel refuses.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # A parent that died before the call sends no signal any more.
    if os.getppid() != parent:
        raise SystemExit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])

"""A child process must not outlive its parent, whatever ends the parent."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when process `parent` dies. Linux only, as the service is.

    Call it in the child before anything else; the parent must start children from its main thread, whose end is what
    the kernel watches.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)

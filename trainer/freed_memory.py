"""Memory that this process has freed, and the C library has kept."""

import ctypes
import sys


def give_back() -> None:
    """Return it to the system, by glibc's malloc_trim(3); nothing elsewhere.

    For after a start: what was read and parsed then, as tokenizers are, leaves tens of MB in each process that nothing
    else of the process is as large as to use.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)

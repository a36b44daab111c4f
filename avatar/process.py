"""Settings of this process: CPU threads of torch, and how glibc keeps freed memory."""

import ctypes
import sys

import torch

from avatar.errors import require_int


def set_up_torch(threads: object) -> None:
    """Torch on so many CPU threads (None: as it is), and memory that is kept."""
    if threads is not None:
        require_int(1, threads=threads)
        torch.set_num_threads(threads)  # pyright: ignore[reportArgumentType]
    keep_memory()


def keep_memory() -> None:
    """Let glibc keep freed memory: by default it returns large blocks at once, and half the time goes to page
    faults."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
        mallopt(trim_threshold, most)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes

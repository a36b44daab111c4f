"""Settings of this process: the device, CPU threads of torch, and how glibc keeps freed memory."""

import ctypes
import sys

import torch

from avatar.errors import UserError, require_int


def choose_device(name: object) -> torch.device:
    """The torch device of a `device=` setting.

    Args:
        name: "auto" (CUDA if there is one, else the CPU), or torch's name of a device: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        UserError: torch has no such device, or not on this machine.
    """
    if name == "auto":  # never MPS, which lacks float64
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={name}; expected auto, cpu, cuda, cuda:N or mps")
    found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }[device.type]
    if (device.index or 0) >= found:
        raise UserError(
            f"device={name}; this machine has {found} {device.type} devices; choose device=auto or device=cpu"
        )
    return device


def set_up_torch(threads: object) -> None:
    """Set torch's CPU threads (None: unchanged), and keep freed memory."""
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
        mallopt(mmap_threshold, 2**25)  # glibc's maximum

"""Process settings: torch device, process group, CPU threads and glibc's malloc thresholds."""

import ctypes
import sys
from time import perf_counter

import torch
import torch.distributed as dist

from avatar.errors import UserError, require_int


def choose_device(name: object) -> torch.device:
    """The torch device of a `device=` setting.

    Args:
        name: "auto" (CUDA if there is one, else the CPU), or torch's name of a device: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        UserError: an unknown device, or one that this machine lacks.
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
            f"got device={name}; this machine has {found} {device.type} devices: choose device=auto or device=cpu"
        )
    return device


def set_up_torch(threads: object) -> None:
    """Set the number of torch's CPU threads (None: leave it unchanged), and call `keep_memory`."""
    if threads is not None:
        require_int(1, threads=threads)
        torch.set_num_threads(threads)  # pyright: ignore[reportArgumentType]
    keep_memory()


def bf16_cost(size: int = 256, repeats: int = 9) -> float:
    """Time of a matrix product in bf16 ÷ that in fp32 on this CPU; tens without instructions for bf16.

    Args:
        size: of the square matrices.
        repeats: the fastest of these counts.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(1 + repeats):  # the first call also chooses kernels
            start = perf_counter()
            torch.mm(x, x)
            times.append(perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return seconds[torch.bfloat16] / seconds[torch.float32]


def end_process_group() -> None:
    """Destroy torch's default process group, if there is one, when all ranks have reached this call.

    Gloo's threads abort a process that exits before they have ended ("terminate called without an active exception",
    pytorch#190489), 4 of 30 on a busy machine.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def keep_memory() -> None:
    """Set glibc's malloc thresholds so that freed memory is kept and used again.

    By default glibc returns large blocks to the system at once, and half of the training time goes to page faults.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_threshold, maximum = -1, -3, 2**31 - 1
        mallopt(trim_threshold, maximum)
        mallopt(mmap_threshold, 2**25)  # glibc's maximum

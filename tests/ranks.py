"""Functions called by several processes on this machine, as torchrun starts them."""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def launched(ranks: int, *jobs: tuple[str, list[Any]]) -> list[subprocess.Popen]:
    """Processes that make these calls, of "module:function" with arguments, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    place |= {"TORCHELASTIC_RUN_ID": "test", "PYTHONWARNINGS": "ignore", "AVATAR_TRACEBACK": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", json.dumps(jobs)],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def run(ranks: int, *jobs: tuple[str, list[Any]], ends: int = 0, within: float = 300) -> None:
    """Wait until these calls are made and all processes end with this code, in so many seconds; what went wrong is
    shown."""
    processes = launched(ranks, *jobs)
    watch = threading.Timer(within, lambda: [process.kill() for process in processes])
    watch.start()
    errors = [process.communicate()[1] for process in processes]
    watch.cancel()
    assert [process.returncode for process in processes] == [ends] * ranks, "\n".join(errors)


def fit(script: str, folder: str, *overrides: str) -> None:
    """A tiny run of a stage."""
    from tests.stages import fitted

    fitted(script, Path(folder), *overrides)


def main() -> None:
    warnings.simplefilter("ignore")
    for name, arguments in json.loads(sys.argv[1]):
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(*arguments)


if __name__ == "__main__":
    main()

"""Run functions in several processes on this machine, with the environment of torchrun."""

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

from avatar.process import end_process_group

ROOT = Path(__file__).parents[1]


def launch(ranks: int, *jobs: tuple[str, list[Any]]) -> list[subprocess.Popen]:
    """Start one process per rank; each calls the functions ("module:function", arguments) in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"TORCHELASTIC_RUN_ID": "test", "PYTHONWARNINGS": "ignore", "AVATAR_TRACEBACK": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", json.dumps(jobs)],
            cwd=ROOT,
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def run(ranks: int, *jobs: tuple[str, list[Any]], exit_code: int = 0, timeout: float = 300) -> None:
    """Call functions in `ranks` processes; assert that each ends with this exit code within `timeout` seconds."""
    processes = launch(ranks, *jobs)
    timer = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    timer.start()
    errors = [process.communicate()[1] for process in processes]
    timer.cancel()
    assert [process.returncode for process in processes] == [exit_code] * ranks, "\n".join(errors)


def fit(script: str, folder: str, *overrides: str) -> None:
    """Train a tiny run of a stage."""
    from tests.stages import fitted

    fitted(script, Path(folder), *overrides)


def main() -> None:
    warnings.simplefilter("ignore")
    for name, arguments in json.loads(sys.argv[1]):
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(*arguments)
    end_process_group()


if __name__ == "__main__":
    main()

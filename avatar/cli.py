"""Command line: run a task under Hydra, print a user's error as one line, and set the exit code.

Exit codes: 0 success, 2 a user error (one line on stderr: what was got, what is wanted, how to fix it; with
AVATAR_TRACEBACK=1 in the environment the traceback precedes it), 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1.
"""

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

CONFIGS = str(Path(__file__).parent.parent / "configs")
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)


def main(config: str, task: Callable[[DictConfig], None]) -> None:
    """Run a task under Hydra with the config of this name; user errors become one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed and swallowed

    @functools.wraps(task)
    def reporting(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except USER_ERRORS as error:  # caught inside, before Hydra adds lines of its own
            _exit_with(error)

    try:
        hydra.main(config_path=CONFIGS, config_name=config, version_base="1.3")(reporting)()
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except USER_ERRORS as error:
        _exit_with(error)


def _exit_with(error: BaseException) -> NoReturn:
    """One line on stderr, and out."""
    if os.environ.get("AVATAR_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {_message(error)}", file=sys.stderr)
    sys.exit(2)


def _message(error: BaseException) -> str:
    """The cause's own, for Hydra wraps errors of constructors in its own; with its place, if it speaks of none."""
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        quoted = f"\"{name}='{value}'\""
        return f"can't read {error.override}; quote what has special characters, and again for the shell: {quoted}"
    where = None
    while isinstance(error, HydraException) and (cause := error.__cause__) is not None:
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return f"{str(error).splitlines()[0].rstrip('.')}: there is no such setting; --cfg job shows all there are"
        where = where or re.search(r"full_key: (\S+)", str(error))
        error = cause
    text = str(error)
    if "Original Traceback" in text:  # of a data loader's worker, which ends in "Type: message"
        text = text.strip().rsplit("\n", 1)[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return text if where is None or isinstance(error, USER_ERRORS) else f"{where[1]} can't be made ({text}); check it"

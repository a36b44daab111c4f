"""Command line: run a task under Hydra, print a user's error as one line, and set the exit code.

Exit codes: 0 success; 2 a user error, printed as one line on stderr (AVATAR_TRACEBACK=1 in the environment also shows
its traceback); 1 any other exception, with its traceback; 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1.
"""

import functools
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from avatar.errors import UserError
from avatar.renamed import check_overrides

CONFIGS = str(Path(__file__).parent.parent / "configs")
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)

# Resolvers: ${sum:${a},${b}}, ${product:4,${a}}, and ${count:${a},13}, the length of a list, or 13 if it is null.
OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)
OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)
OmegaConf.register_new_resolver("count", lambda items, none: none if items is None else len(items), replace=True)


def main(config: str, task: Callable[[DictConfig], None]) -> None:
    """Run a task under Hydra; print a user error as one line and exit with code 2.

    Args:
        config: the name of a config in configs/.
        task: called with the composed config.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints exceptions and exits
    started = False

    @functools.wraps(task)
    def reporting(cfg: DictConfig) -> None:
        nonlocal started
        started = True
        try:
            task(cfg)
        except Exception as error:  # caught inside of Hydra, which would print more lines
            if (message := user_message(error)) is None:
                raise
            _exit_with(error, message)

    try:
        check_overrides(sys.argv[1:])
        hydra.main(config_path=CONFIGS, config_name=config, version_base="1.3")(reporting)()
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except Exception as error:
        message = user_message(error)
        if message is None and isinstance(error, OSError) and not started:  # Hydra creates the run's folder
            message = f"{error}; choose another folder: hydra.run.dir=FOLDER"
        if message is None:
            raise
        _exit_with(error, message)


def user_message(error: BaseException) -> str | None:
    """The one line for an error in the user's input or config; None for any other exception, a bug.

    Hydra wraps what a constructor raises in its own exceptions, and a data loader's worker sends its traceback as text.
    """
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        quoted = f"\"{name}='{value}'\""
        return f"can't parse {error.override}; quote a value with special characters, and again for the shell: {quoted}"
    chain = list(_hydra_chain(error))
    cause = chain[-1]
    if isinstance(cause, UserError):
        return _text(cause)
    if not isinstance(error, CONFIG_ERRORS):
        return None
    places = (re.search(r"full_key: (\S+)", str(wrapper)) for wrapper in chain[:-1])
    place = next((found[1] for found in places if found), None)
    if isinstance(cause, CONFIG_ERRORS) or cause is error:
        if len(chain) > 1 and isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return (
                f"{str(chain[-2]).splitlines()[0].rstrip('.')}: there is no such setting; --cfg job shows all settings"
            )
        return _text(cause)
    if isinstance(chain[-2], InstantiationException) and not _is_misconfigured(chain[-2], cause):
        return None
    return _text(cause) if place is None else f"{place} can't be built ({_text(cause)}); check its settings"


def _hydra_chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, down to the first that Hydra did not raise."""
    yield error
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
        yield error


def _is_misconfigured(wrapper: InstantiationException, cause: BaseException) -> bool:
    """Whether a target does not exist or was called with wrong arguments, as opposed to an error inside of it."""
    target = re.search(r"Error (?:in call to|locating) target '([^']+)'", str(wrapper))
    if target is None:
        return False
    if str(wrapper).startswith("Error locating"):
        missing = cause.__cause__
        if isinstance(missing, ModuleNotFoundError):  # of the target itself, not of an import inside of it
            return missing.name is not None and f"{target[1]}.".startswith(f"{missing.name}.")
        return not isinstance(missing, Exception)
    name = re.escape(target[1].rpartition(".")[2])
    call = rf"(?:\w+\.)*{name}(?:\.__init__)?\(\) (?:got an unexpected keyword argument|missing \d+ required)"
    return isinstance(cause, TypeError) and re.match(call, str(cause)) is not None


def _text(error: BaseException) -> str:
    """The message of an exception on one line; for an error in a data loader's worker, that of its traceback."""
    text = str(error).partition("\nConfig search path:")[0]
    if "Original Traceback" in text:
        text = text.strip().rsplit("\n", 1)[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def _exit_with(error: BaseException, message: str) -> NoReturn:
    if os.environ.get("AVATAR_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

"""Errors in a user's input: what was got, what is wanted, how to fix it."""


class UserError(ValueError):
    """Invalid input of the user, as found by validation: printed as one line, with exit code 2 (`avatar.cli`).

    Every other exception is a bug of the program and shows its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder that would be overwritten."""


class FileAccessError(UserError, OSError):
    """A file that cannot be read or written."""


def require_int(least: int, **values: object) -> None:
    """Raise UserError for a setting that is not an integer of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name}={value}; expected an integer >= {least}, such as {name}={least + 1}")


def require_str(**values: object) -> None:
    """Raise UserError for a setting that is not a string."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{name}={value}; expected a string, such as \"{name}='...'\"")

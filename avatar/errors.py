"""Errors for invalid user input; a message says what was got, what was expected, and how to fix it."""


class UserError(ValueError):
    """Invalid user input, found by validation: printed as one line, with exit code 2 (`avatar.cli`).

    Every other exception is a bug and shows its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder that would be overwritten."""


class FileAccessError(UserError, OSError):
    """A file that cannot be read or written."""


def require_int(minimum: int, **values: object) -> None:
    """Raise UserError for a setting that is not an integer of at least `minimum`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise UserError(f"{name}={value}; expected an integer >= {minimum}, such as {name}={minimum + 1}")


def require_str(**values: object) -> None:
    """Raise UserError for a setting that is not a string."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{name}={value}; expected a string, such as \"{name}='...'\"")

"""Errors for the user, with their exit codes.

Every message states the problem, its place (file:line or key), and what to do. The class of an error follows from what
has to change: the recipe, the command, the data, the model, or the disk. Any other exception is a bug in qlora and
shows a traceback.
"""


def listed(names: list[str], most: int = 3) -> str:
    """Join names for a message: the first `most`, and the number of the others.

    A name that is empty, or begins or ends with white space, is quoted, because nothing would show it otherwise.

    Examples:
        >>> listed(["a", " b", "c", "d", "e"])
        "a, ' b', c and 2 more"
    """
    rest = len(names) - most
    shown = [name if name and name == name.strip() else repr(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for use in a message, or its type if it has no text.

    Examples:
        >>> first_line(MemoryError())
        'MemoryError'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class QloraError(ValueError):
    """Base class of all errors for the user.

    Examples:
        >>> try:
        ...     outcome = qlora.train(recipe)
        ... except qlora.QloraError as error:
        ...     print(error, error.exit_code)
    """

    exit_code = 1


class RecipeError(QloraError):
    """A recipe is wrong, or needs something that this model or machine cannot do."""

    exit_code = 2


class UsageError(QloraError):
    """A command or call cannot be carried out: a wrong argument, an existing or unreadable path, a folder in use."""

    exit_code = 2


class FunctionError(UsageError):
    """A function that was passed to `train` failed or returned something else; the run is saved."""


class DataError(QloraError):
    """A data set or one of its rows cannot be used, or does not fit the recipe's `data` section."""

    exit_code = 3


class ModelError(QloraError):
    """A model, adapter or checkpoint cannot be used."""

    exit_code = 4


class DivergedError(QloraError):
    """The loss or a gradient is not finite; raised before the update, so the weights are intact."""

    exit_code = 5


class OutOfMemoryError(QloraError):
    """The device ran out of memory."""

    exit_code = 6


class SaveError(QloraError):
    """A checkpoint or result cannot be written (EX_IOERR of sysexits.h)."""

    exit_code = 74

"""What a user can be told went wrong, and the exit code that goes with it.

Every message says what is wrong, where (file:line or key), and what to do about it. Anything else that
escapes is a bug of ours and may show a traceback.
"""


class QloraError(ValueError):
    """Base of every error meant for the user.

    >>> try:
    ...     outcome = qlora.train(recipe)
    ... except qlora.QloraError as error:
    ...     print(error, error.exit_code)
    """

    exit_code = 1


class RecipeError(QloraError):
    """A recipe or an argument on the command line is wrong."""

    exit_code = 2


class DataError(QloraError):
    """A data set, or a row of one, cannot be used."""

    exit_code = 3


class ModelError(QloraError):
    """A model, adapter or checkpoint cannot be used."""

    exit_code = 4


class DivergedError(QloraError):
    """The loss or a gradient is not finite; raised before the update, so nothing is spoiled."""

    exit_code = 5


class OutOfMemoryError(QloraError):
    """The device ran out of memory."""

    exit_code = 6


class SaveError(QloraError):
    """A checkpoint or result cannot be written (sysexits' EX_IOERR)."""

    exit_code = 74

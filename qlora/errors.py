"""What a user can be told went wrong, and the exit code that goes with it.

Every message says what is wrong, where (file:line or key), and what to do about it. Its class follows what has to
change: the recipe, the command, the data, the model, or the disk. Anything else that escapes is a bug of ours and may
show a traceback.
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
    """A recipe is wrong, or asks for what this model or machine cannot do."""

    exit_code = 2


class UsageError(QloraError):
    """What was asked for cannot be done: a wrong argument, a place that is taken, a folder in use."""

    exit_code = 2


class DataError(QloraError):
    """A data set, or a row of one, cannot be used, or not in the way that the recipe's `data` says."""

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

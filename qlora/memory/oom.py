"""Out-of-memory errors with advice."""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora.errors import OutOfMemoryError, first_line
from qlora.recipe import Recipe, Training
from qlora.runtime.out_of_memory import is_out_of_memory


@contextmanager
def out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turn an out-of-memory error of any library into an OutOfMemoryError with settings that use less memory."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        training, advice = (
            recipe.training,
            [f"start again with data.max_length={recipe.data.max_length // 2}"],
        )
        if resumable := list(_less_memory(training)):
            advice.insert(0, f"continue with --resume and {' or '.join(resumable)}")
        if training.memory is not None:  # the plan of a budget is kept at a resume
            advice.insert(0, f"start again with a training.memory below {training.memory}")
        raise OutOfMemoryError(
            f"out of memory ({first_line(error)}). You can {', or '.join(advice)}"
        ) from error


def _less_memory(training: Training) -> Iterator[str]:
    """Yield settings that need less memory and that a resumed run accepts, because they change rounding alone."""
    if training.memory is not None:
        return  # the plan of a budget is kept
    if training.micro_batch_size > 1:
        yield f"training.micro_batch_size={training.micro_batch_size // 2}"
    if training.activation_checkpointing != "full":
        yield "training.activation_checkpointing=full"
    elif not training.activation_offloading and training.device != "cpu":
        yield "training.activation_offloading=true"

"""Tasks of lm-evaluation-harness (the extra `eval`) with a model that qlora has loaded.

The harness gets the model as it is: base in NF4, adapter around it, trained tokens. So its numbers are those of the
merged model only as far as the merge is exact; `qlora merge` says how far that is.
"""

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import DataError, ModelError, QloraError, UsageError, first_line, listed

if TYPE_CHECKING:
    from qlora.inference.load import Trained


SEED = 1234
"""the harness's seed of examples, numpy and torch"""


RESAMPLES = 1000
"""resamples behind the standard error of a metric that is not a mean, such as perplexity; the harness's are 100,000"""


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    """the harness's processing of answers before they are judged; none: as they are"""
    value: float
    stderr: float | None
    """standard error; None where the harness has none"""
    samples: int
    """number of the task's rows"""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation; the defaults are the harness's."""

    tasks: tuple[str, ...]
    task_path: Path | None = None
    """folder of own tasks: YAML files, which can name Python code of the folder, and data"""
    shots: int | None = None
    """examples before each question; None: as the task says"""
    limit: int | None = None
    """number of rows of each task; None: all"""
    chat_template: bool = False
    """write questions with the template of the training rows, after the system message that they share"""
    batch_size: int | None = None
    """rows at once; None: the recipe's micro-batch"""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the version of the harness."""
        path = None if self.task_path is None else str(self.task_path)
        return {**asdict(self), "task_path": path, "lm_eval": version("lm_eval")}


def require_harness() -> None:
    """Raise UsageError if lm-evaluation-harness is not installed. Imports nothing heavy."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--tasks needs lm-evaluation-harness ({first_line(error)}); install it with "
            "`pip install 'qlora-train[eval]'`"
        ) from error


def load_tasks(settings: Settings) -> Any:
    """Return the tasks with their rows, as the harness loads them. Its own list of tasks is read only if needed.

    Raises:
        UsageError: a task is not known or cannot be read.
        DataError: the rows of a task cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    if not settings.tasks:
        raise UsageError("--tasks: no name given; `lm-eval ls tasks` lists the harness's tasks")
    path = settings.task_path
    if path is not None and not path.is_dir():
        raise UsageError(f"--task-path: {path} is not a folder; give the folder of the tasks' YAML files")
    with _quiet(), _named("the tasks cannot be read"):
        manager = None
        if path is not None:
            manager = TaskManager(include_path=str(path), include_defaults=False)
        if manager is None or not set(settings.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=None if path is None else str(path))
    unknown = [name for name in settings.tasks if name not in manager.all_tasks]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, n=1)
        hint = f"; did you mean {near[0]!r}? " if near else ". "
        raise UsageError(
            f"--tasks: no task {listed([repr(name) for name in unknown])}{hint}`lm-eval ls tasks` lists the "
            "harness's own, and --task-path adds those of a folder"
        )
    with _quiet(), _named("a task cannot be read"):
        loaded = manager.load(list(settings.tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 takes no examples
            task.set_config(
                key="num_fewshot", value=settings.shots if settings.shots is not None else own or 0
            )
    return loaded


def run_tasks(trained: "Trained", settings: Settings, loaded: Any) -> list[Score]:
    """Evaluate a model on tasks of the harness.

    Args:
        trained: the model.
        settings: the tasks and how they are asked.
        loaded: from `load_tasks`; several models can be evaluated on them in turn.

    Raises:
        UsageError: a task needs something that a causal language model of one process cannot do.
        ModelError: the questions cannot be written with the template of the training rows.
    """
    # `evaluate`, because `simple_evaluate` also asks git, pip and the hub about the model
    from lm_eval.evaluator import evaluate

    with _quiet(), _named("the harness ended with an error"):
        model = _model(trained, settings)
        _seed(loaded)
        found = evaluate(
            lm=model,
            task_dict=loaded,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            system_instruction=_system(trained) if settings.chat_template else None,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
        )
    return list(_scores(found))


def _seed(loaded: Any) -> None:
    """Seed all random numbers, and the choice of examples, as the harness's command does."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)


def _scores(found: Any) -> Iterator[Score]:
    """Yield the scores in the harness's results: `{task: {"acc,none": 0.5, "acc_stderr,none": 0.1, ...}}`."""
    for task, values in found["results"].items():
        samples = found["n-samples"].get(task, {}).get("effective")
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            known = float(stderr) if isinstance(stderr, int | float) else None
            yield Score(task, metric, kind, float(value), known, samples)


def _model(trained: "Trained", settings: Settings) -> Any:
    """Wrap a model as the harness's own class for models of transformers."""
    from lm_eval.models.huggingface import HFLM

    hidden = not sys.stderr.isatty()

    class Loaded(HFLM):
        """The harness's scoring, with progress bars on a terminal only, and a template that loses no message."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=hidden)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=hidden)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=hidden)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            import jinja2

            try:
                # The harness would leave the system message out if the template refuses it
                return str(
                    self.tokenizer.apply_chat_template(
                        chat_history,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                    )
                )
            except jinja2.exceptions.TemplateError as error:
                raise ModelError(
                    f"--chat-template: the template refuses a question: {first_line(error)}"
                ) from error

    size = settings.batch_size or trained.recipe.training.micro_batch_size
    return Loaded(
        pretrained=trained.model, tokenizer=_tokenizer(trained, settings), batch_size=size, backend="causal"
    )


def _tokenizer(trained: "Trained", settings: Settings) -> Any:
    """Return a copy of the tokenizer, which the harness changes, with the template of the training rows."""
    tokenizer = copy(trained.tokenizer)
    if settings.chat_template:
        prompts = trained.prompts
        if not prompts.has_template:
            raise UsageError(
                "--chat-template: the training rows were written without a chat template; leave it out"
            )
        if prompts.template is not None:
            tokenizer.chat_template = prompts.template
    return tokenizer


def _system(trained: "Trained") -> str | None:
    """Return the system message of a question without one, as in training. Raises UsageError if it has no place."""
    section = trained.recipe.data.parts[0]
    system = trained.prompts.system or section.system
    if system and section.system_as == "user":
        raise UsageError(
            "--chat-template: in the training rows the system message is a part of the question "
            "(data.system_as: user), which the harness cannot write; leave it out"
        )
    return system


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the harness log errors only, print on standard error, and start no processes.

    Its warnings are about arguments that a loaded model does not need. Its processes for resampling are forked from
    this one, whose threads can hold locks, and then never end.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), _environment(DISABLE_MULTIPROC="1"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables of the environment in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn the harness's errors into errors for the user: it raises whatever a task's file or code raises."""
    from qlora.runtime.out_of_memory import is_out_of_memory

    try:
        yield
    except QloraError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        if _is_about_data(error):
            raise DataError(
                f"--tasks: the rows of a task cannot be loaded ({reason}). Check the network, or use a task with local "
                "rows (--task-path)"
            ) from error
        raise UsageError(f"--tasks: {what} ({reason})") from error


def _is_about_data(error: Exception) -> bool:
    """Return True if loading of rows failed: a file, the network, or a library that loads from the hub."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in ("datasets", "huggingface_hub", "requests", "httpx")

"""Limits of names at Weights & Biases, checked before a run: its library or its server refuses longer ones.

Sources: `wandb.Settings` of wandb 0.28 to 0.31 (project, tags), and its maintainers in the threads wandb/wandb#1519
(group) and #6402 (job type). An offline run accepts every name, and `wandb sync` fails later.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from qlora.errors import RecipeError
from qlora.tracking.wandb import NAME_LIMIT, Section

TAG_LIMIT = 64
"""most characters of a tag"""

NOT_IN_PROJECTS = "/\\#?%:"
"""characters that the name of a project cannot have"""

VARIABLES = {"WANDB_RUN_GROUP": 128, "WANDB_JOB_TYPE": 64}
"""environment variables that wandb reads, and the most characters of each"""


def check_names(section: Section, run: Path, *, resume: bool = False) -> list[str]:
    """Check the names in `tracking.wandb`, and those that wandb takes from the environment.

    Args:
        section: the section of the recipe.
        run: the run's folder, which gives the run its name if the section has none.
        resume: the run exists already, so that wrong names are no error.

    Returns:
        Notes for the user: a folder's name that is cut, and on `resume` the wrong names.

    Raises:
        RecipeError: W&B would refuse the names; the message has a line for each.
    """
    if section.mode == "disabled":
        return []
    problems = list(_problems(section))
    if problems and not resume:
        raise RecipeError("\n".join(problems))
    name = run.resolve().name
    if not section.name and len(name) > NAME_LIMIT:
        problems.append(
            f"tracking.wandb.name: the folder's name has {len(name)} characters, and Weights & Biases takes "
            f"{NAME_LIMIT}, so it gets the first {NAME_LIMIT}; set tracking.wandb.name to choose another"
        )
    return problems


def _problems(section: Section) -> Iterator[str]:
    for key, text in (("project", section.project), ("name", section.name or "")):
        if len(text) > NAME_LIMIT:
            yield _too_long(f"tracking.wandb.{key}", text, NAME_LIMIT)
    if wrong := [character for character in NOT_IN_PROJECTS if character in section.project]:
        yield (
            f"tracking.wandb.project: {section.project!r} has {' '.join(wrong)}, and a project of Weights & Biases "
            f"cannot have any of {' '.join(NOT_IN_PROJECTS)}; leave it out"
        )
    for number, tag in enumerate(section.tags):
        if len(tag) > TAG_LIMIT:
            yield _too_long(f"tracking.wandb.tags[{number}]", tag, TAG_LIMIT)
    for variable, limit in VARIABLES.items():
        if len(text := os.environ.get(variable, "")) > limit:
            yield _too_long(variable, text, limit)


def _too_long(key: str, text: str, limit: int) -> str:
    return (
        f"{key}: {text[:40]!r} … has {len(text)} characters, and Weights & Biases takes {limit}; shorten it"
    )

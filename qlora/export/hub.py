"""A folder for the hub, and its upload: what a run learned, its tokenizer and template, and a model card.

Nothing private goes along: of a run's files only those of the result are taken, and texts are searched for paths of
this machine and for secrets before anything is sent.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import SaveError, UsageError, first_line
from qlora.export.source import ModelSource
from qlora.inference.load import find_trained
from qlora.merging.write import write_merged
from qlora.recipe import Recipe
from qlora.storage.draft import check_absent, drafting, publish
from qlora.storage.folders import save_errors
from qlora.storage.json_files import read_object, write_object
from qlora.storage.manifest import MANIFEST

SECRETS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[po]_[A-Za-z0-9]{20,})")
"""tokens of the hub and of other services, which people paste into settings"""

TEXTS = (".json", ".yaml", ".md", ".txt", ".jinja")


Clean = Callable[[str], str]
"""removes the paths of this machine from a text"""

PATHS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file", "name")
"""fields of settings that can hold a path; other texts, such as tokens, are left alone"""


@dataclass(frozen=True)
class Upload:
    """A folder and its place on the hub."""

    folder: Path
    repo: str
    private: bool

    @property
    def files(self) -> list[Path]:
        """The files that are uploaded, in order."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def copy_result(result: Path, folder: Path) -> None:
    """Copy the files of a trained adapter or model into a new folder.

    The recipe, which is written anew, and checksums, which would not fit then, stay behind.

    Raises:
        SaveError: a file cannot be written.
    """
    with save_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(result.iterdir()):
            if (
                file.is_file()
                and file.name not in (MANIFEST, "recipe.yaml", "README.md")
                and file.name[0] != "."
            ):
                shutil.copyfile(file, folder / file.name)


def clean_settings(folder: Path, clean: Clean) -> None:
    """Remove the paths of this machine from the settings of a model or adapter."""
    for name in ("adapter_config.json", "qlora.json", "config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            before = read_object(folder / name)
            if (after := _without_paths(before, clean)) != before:
                write_object(folder / name, after)


def _without_paths(values: Any, clean: Clean) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: clean(value) if key in PATHS and isinstance(value, str) else _without_paths(value, clean)
        for key, value in values.items()
    }


def check_private(folder: Path) -> None:
    """Check that the texts in `folder` name no path of this machine and hold no secret.

    Raises:
        UsageError: one does; the message names file and line.
    """
    places = {str(Path.home()), str(Path.cwd()), str(folder.absolute().parent.parent)} - {"/"}
    for file in sorted(folder.rglob("*")):
        if file.suffix not in TEXTS or file.name == "tokenizer.json" or not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found = next(
                (place for place in places if re.search(rf"(?<![\w.:/]){re.escape(place)}(?!\w)", line)), None
            )
            secret = SECRETS.search(line)
            if found or secret:
                what = f"the path {found}" if found else "something like a secret key"
                raise UsageError(
                    f"{file.name}:{number}: holds {what}, and would be uploaded. Remove it from the run's recipe or "
                    "template, and export again"
                )


def upload(wanted: Upload) -> str:
    """Upload a folder, and return the address of its page.

    Raises:
        UsageError: the repository exists and is public, and the upload is to be private.
        SaveError: the hub cannot be reached or refuses. The folder stays.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        place = api.create_repo(wanted.repo, private=wanted.private, exist_ok=True)
        if wanted.private and not api.model_info(place.repo_id).private:
            raise UsageError(
                f"{place.repo_id} exists and is public, and this upload is private: add --public, or choose another "
                "name with --repo"
            )
        api.upload_folder(
            repo_id=place.repo_id, folder_path=wanted.folder, commit_message="Upload with qlora export"
        )
    except errors.HFValidationError as error:
        raise UsageError(f"--repo {wanted.repo}: {first_line(error)}") from error
    except UsageError:
        raise
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # type: ignore[attr-defined]
        raise SaveError(
            f"cannot upload to {wanted.repo}: {first_line(error)}. {wanted.folder} holds all files; once the hub "
            f"answers and you are logged in, upload them with: hf upload {wanted.repo} {wanted.folder}"
        ) from error
    return str(place)


def write_folder(
    run: str | Path,
    to: Path,
    card: Callable[[Path | None, Recipe, Path], None],
    cleaner: Callable[[Recipe], Clean],
    *,
    source: ModelSource | None = None,
) -> Path:
    """Write the folder for the hub: an adapter, or with `source` the merged model, and its card.

    Args:
        run: folder of a run or of an adapter.
        to: the folder; it must not exist, and appears only when it is complete.
        card: writes README.md and pictures: called with the run's folder (None if only the result is left), its recipe
            and the folder to write to.
        cleaner: returns what removes the paths of this machine, which a recipe can name, from a text.
        source: base and adapter to merge, as a Hugging Face model.

    Raises:
        UsageError: the folder exists, or holds something private.
        ModelError: there is no trained result.
        SaveError: a file cannot be written. Nothing remains of the folder.
    """
    check_absent(to)
    result = find_trained(Path(run))
    recipe = Recipe.recorded(result / "recipe.yaml")
    clean = cleaner(recipe)
    folder = next((at for at in (Path(run), result.parent) if (at / "run.json").is_file()), None)
    with drafting(to) as drafts:
        draft = drafts / "hub"
        if source is None or source.merge is None:
            copy_result(result, draft)
        else:
            assert source.prompts is not None
            write_merged(source.merge, source.onto, draft, source.prompts)
        with save_errors(to):
            clean_settings(draft, clean)
            card(folder, recipe, draft)
        check_private(draft)
        publish(draft, to)
    return to

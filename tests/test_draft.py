"""New folders for the user: written whole or not at all, without touching the user's files."""

from pathlib import Path

import pytest

from qlora.errors import SaveError, UsageError
from qlora.storage.draft import drafting, publish


def test_a_draft_is_moved_into_place_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "models" / "mine"
    synced: list[Path] = []
    monkeypatch.setattr("qlora.storage.draft.sync", synced.append)
    with drafting(final) as drafts:
        for name in ("first", "second"):
            (drafts / name).mkdir()
            (drafts / name / "file").write_text(name)
        assert not final.exists()
        publish(drafts / "second", final)
    assert synced == [final.parent], "the parent folder must be synced to keep the name"
    assert (final / "file").read_text() == "second"
    assert [path.name for path in final.parent.iterdir()] == ["mine"]


def test_only_an_empty_folder_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with drafting(tmp_path / "empty") as drafts:
        (drafts / "a").mkdir()
        (drafts / "a" / "file").touch()
        publish(drafts / "a", tmp_path / "empty")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "text", "link"):
        with pytest.raises(UsageError, match=f"{name}: already exists"):
            with drafting(tmp_path / name):
                pass
    assert (tmp_path / "text").read_text() == "mine"


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "mine"
    with drafting(final) as drafts:
        (drafts / "a").mkdir()
        final.mkdir()
        (final / "theirs").touch()
        with pytest.raises(UsageError, match="already exists"):
            publish(drafts / "a", final)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (final / "theirs").exists()


def test_leftovers_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / ".tmp-mine" / "old").mkdir(parents=True)
    (tmp_path / ".tmp-other" / "old").mkdir(parents=True)
    with drafting(tmp_path / "mine") as drafts:
        assert not (drafts / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-other"]


def test_two_drafts_of_one_folder_exclude_each_other(tmp_path: Path) -> None:
    with drafting(tmp_path / "mine") as drafts:
        (drafts / "a").mkdir()
        with pytest.raises(UsageError, match="in use by process"):
            with drafting(tmp_path / "mine"):
                pass
        assert (drafts / "a").is_dir()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="cannot write"), drafting(tmp_path / "file" / "mine"):
        pass

"""The tests see deprecations that a library logs, even while its logs are silenced."""

import logging
import warnings

import pytest
from accelerate import PartialState
from accelerate.logging import get_logger

from qlora.model.quiet import quiet


@pytest.mark.parametrize("again", [False, True])  # logged once a process, seen in every test
def test_a_warning_once_of_transformers_is_seen_in_every_test(again: bool, deprecations: list[str]) -> None:
    logger = logging.getLogger("transformers.models.llama")
    with quiet():
        assert logging.getLogger("transformers").level == logging.ERROR
        logger.warning_once("`past` is deprecated")  # type: ignore[attr-defined]
    assert deprecations == ["transformers.models.llama: `past` is deprecated"]
    deprecations.clear()


@pytest.mark.parametrize("again", [False, True])
def test_a_warning_once_of_accelerate_is_seen_in_every_test(again: bool, deprecations: list[str]) -> None:
    PartialState(cpu=True)  # accelerate's loggers need to know their process
    get_logger("accelerate.utils").warning_once("%s will be removed in 2.0", "this")
    assert deprecations == ["accelerate.utils: [RANK 0] this will be removed in 2.0"]
    deprecations.clear()


def test_other_records_and_other_loggers_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("accelerate").warning("all is well")
    logging.getLogger("qlora").warning("this key is deprecated")
    assert [record.getMessage() for record in caplog.records] == ["all is well", "this key is deprecated"]


def test_silenced_loggers_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        logging.getLogger("transformers").warning("not for the terminal")
    assert capsys.readouterr().err == ""


def testquiet_hides_no_warning() -> None:
    with pytest.raises(FutureWarning), quiet():
        warnings.warn("gone soon", FutureWarning, stacklevel=1)

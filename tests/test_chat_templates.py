"""The rule of training, over the chat templates that people use: every file that TRL ships, and our own.

A trained answer follows the prompt of generation exactly and ends with what closes it. Whatever of a conversation is
not trained or not written is counted.
"""

import random
from collections import Counter

import pytest
from chat_templates_for_tests import SOURCES, plain, reference, rich

from qlora.formats import BadRow


def check_all(name: str, conversations: int) -> None:
    subject = reference(name)
    chance = random.Random(name)
    for _ in range(conversations):
        subject.check(plain(chance))  # no template refuses questions and answers
    refusals: Counter[str] = Counter()
    for _ in range(conversations):
        try:
            subject.check(rich(chance))
        except BadRow as reason:
            refusals[reason.kind] += 1
    assert set(refusals) <= {"refused by the chat template", "not written by the chat template"}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_trained_is_what_generation_must_write(name: str) -> None:
    check_all(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_what_is_trained_is_what_generation_must_write_in_200_conversations(name: str) -> None:
    check_all(name, 100)


@pytest.mark.slow
def test_templates_that_refuse_a_system_message_are_few() -> None:
    refusing = []
    for name in SOURCES:
        try:
            reference(name).check(plain(random.Random(0), system=True))
        except BadRow:
            refusing.append(name)
    assert refusing == ["trl/gemma", "trl/gemma_training"]

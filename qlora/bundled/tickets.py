"""Generates the fine-tuning task of quickstart: turn a customer's message into a ticket of three fields.

    Where is my lamp? You promised it for Monday. I am very angry about this.
    team: delivery; item: lamp; mood: angry

    python -m qlora.bundled.tickets --seed 0 --out qlora/bundled/tickets

The command writes `train.jsonl` and `held_out.jsonl`, with one `{"messages": [user, assistant]}` per line. The
held-out tickets have pairs of team and item that no training row has, so a model cannot answer them from memory.
"""

# ruff: noqa: SIM905 - split() is easier to read than a list of strings

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Row = dict[str, list[dict[str, str]]]

TRAIN_ROWS, HELD_OUT_ROWS, HELD_OUT_PAIRS = 1500, 150, 12

# short words, nearly all of them in the training text of the base
ITEMS = "bag ball bike book cake camera chair clock coat hat lamp phone shirt shoes table watch".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PROBLEMS = {
    "delivery": (
        "where is my {item}? You promised it for {day}.",
        "my {item} has not arrived yet.",
        "I am still waiting for the {item} that I ordered on {day}.",
        "when will the {item} arrive?",
        "the driver left my {item} at the wrong house.",
        "the {item} was sent to my old street.",
        "can you send the {item} on {day} instead?",
        "how long does it take to ship a {item}?",
    ),
    "billing": (
        "you took the money for the {item} twice.",
        "I paid too much for the {item}.",
        "the price of the {item} on my bill is wrong.",
        "I need a bill for the {item} that I bought on {day}.",
        "can I pay for the {item} by card?",
        "my card was charged for a {item} on {day}.",
        "please send me the receipt for the {item}.",
        "you forgot the discount on the {item}.",
    ),
    "returns": (
        "I want to return the {item}.",
        "the {item} is too small, so I am sending it back.",
        "I do not like the {item}. Can I have my money back?",
        "please exchange the {item} for a bigger one.",
        "the {item} is not what I ordered. Take it back.",
        "how do I send back a {item}?",
        "I changed my mind about the {item} from {day}.",
        "can I swap this {item} for another colour?",
    ),
    "repair": (
        "the {item} broke on {day}.",
        "my {item} does not work any more.",
        "can you fix my {item}?",
        "a part of the {item} fell off.",
        "the {item} has a big crack.",
        "there is a hole in the {item}.",
        "the {item} came with a missing screw.",
        "my {item} makes a strange noise since {day}.",
    ),
}
MOODS = {
    "angry": (
        "I am very angry about this.",
        "This is terrible.",
        "I will never buy from you again.",
        "What a bad shop you are!",
        "I am tired of this.",
        "This makes me so mad!",
    ),
    "calm": (
        "Please let me know.",
        "There is no hurry.",
        "Thank you for your time.",
        "What should I do?",
        "I hope you can help.",
        "Just tell me when you can.",
    ),
    "happy": (
        "I love your shop!",
        "You are always so nice.",
        "Your people were great last time.",
        "I am very happy with all the rest.",
        "You have the best shop in town!",
        "It is a joy to buy from you.",
    ),
}
OPENERS = ("", "", "", "Hi! ", "Hello. ", "Good morning. ")
SEPARATOR = "; "


def ticket(rng: random.Random, team: str, item: str) -> Row:
    """Return a row about this team and item, with the rest drawn at random."""
    mood = _pick(rng, tuple(MOODS))
    problem = _pick(rng, PROBLEMS[team]).format(item=item, day=_pick(rng, DAYS))
    sentences = [problem[0].upper() + problem[1:], _pick(rng, MOODS[mood])]
    if rng.random() < 0.3:
        sentences.reverse()
    record = {"team": team, "item": item, "mood": mood}
    return {
        "messages": [
            {"role": "user", "content": _pick(rng, OPENERS) + " ".join(sentences)},
            {"role": "assistant", "content": SEPARATOR.join(f"{key}: {record[key]}" for key in record)},
        ]
    }


def generate(seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, held-out) rows, which depend only on the seed; all rows differ.

    Only `random.Random.random` is used, because Python guarantees its sequence across versions.
    """
    rng = random.Random(seed)
    pairs = [(team, item) for team in PROBLEMS for item in ITEMS]
    pairs.sort(key=lambda _: rng.random())
    held_out, train = pairs[:HELD_OUT_PAIRS], pairs[HELD_OUT_PAIRS:]
    return _rows(rng, train, TRAIN_ROWS), _rows(rng, held_out, HELD_OUT_ROWS)


def score(reference: str, answer: str) -> float:
    """Return the fraction of the reference's fields that the answer has in the right place, letter for letter.

    Missing, added and misplaced fields count as wrong, so only the reference itself scores 1.0.
    """
    expected, given = reference.strip().split(SEPARATOR), answer.strip().split(SEPARATOR)
    right = sum(left == right for left, right in zip(expected, given, strict=False))
    return right / max(len(expected), len(given))


def write(rows: Iterable[Row], file: Path) -> None:
    """Write rows to a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


def _rows(rng: random.Random, pairs: Sequence[tuple[str, str]], count: int) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = ticket(rng, *_pick(rng, pairs))
        rows.setdefault(row["messages"][0]["content"], row)
    return list(rows.values())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m qlora.bundled.tickets", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and held_out.jsonl")
    arguments = parser.parse_args()
    for name, rows in zip(("train", "held_out"), generate(arguments.seed), strict=True):
        write(rows, arguments.out / f"{name}.jsonl")
        print(f"{arguments.out / name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()

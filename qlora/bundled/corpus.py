"""Builds the pretraining corpus of the bundled base from plain-text and JSON sources.

    python -m qlora.bundled.corpus --out corpus gsm8k/train.jsonl tinyshakespeare.txt ...
    python -m qlora.bundled.corpus --out corpus --entropy

The first command writes `corpus/train.jsonl` and `corpus/held_out.jsonl`, one `{"text": ...}` a line; the
second measures the unigram entropy of what the first wrote. NOTICE.md names the sources of the bundled base.
"""

import argparse
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora.bundled import path
from qlora.errors import DataError

LIMIT = 640  # characters; about 230 tokens of the bundled tokenizer, so that nearly all documents fit in 256
HELD_OUT_PER_MILLE = 10
TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "\u200b": ""})


def clean(text: str) -> str:
    """Plain quotes and dashes, NFKC, no blanks at line ends: fewer rare tokens to learn."""
    text = unicodedata.normalize("NFKC", text.translate(TYPOGRAPHY)).replace("\r\n", "\n")
    return re.sub(r"[ \t]+(?=\n|$)", "", text).strip()


def render(row: dict[str, Any]) -> str:
    """One JSON row as text: its `text`, or question and answer in the words of the bundled chat template.

    GSM8K's calculator annotations (`<<48/2=24>>`) are dropped. Raises KeyError for a row of another shape.
    """
    if "text" in row:
        return clean(row["text"])
    if "question" in row:
        question, answer = row["question"], re.sub(r"<<[^<>]*>>", "", row["answer"])
    else:
        question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        answer = row["response"]
    return f"Question: {clean(question)}\nAnswer: {clean(answer)}"


def documents(source: Path) -> Iterator[str]:
    """The documents of one file: the rows of .json and .jsonl, the runs of paragraphs of anything else."""
    text = source.read_text("utf-8-sig")
    if source.suffix not in (".json", ".jsonl"):
        yield from cut(clean(text))
        return
    rows = json.loads(text) if source.suffix == ".json" else filter(str.strip, text.split("\n"))
    for number, row in enumerate(rows, 1):
        try:
            yield render(json.loads(row) if isinstance(row, str) else row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{source}: row {number}: needs the fields text, question + answer or instruction + response "
                f"as strings ({type(error).__name__}: {error})"
            ) from error


def cut(text: str, limit: int = LIMIT) -> list[str]:
    """Pieces of similar length <= limit, cut between paragraphs or else sentences or else words."""
    target = len(text) / math.ceil(len(text) / limit) if text else 0
    pieces = [""]
    for unit in _units(text, limit):
        if len(pieces[-1]) >= target or len((pieces[-1] + unit).rstrip()) > limit:
            pieces.append("")
        pieces[-1] += unit
    return [piece.strip() for piece in pieces if piece.strip()]


def _units(text: str, limit: int) -> Iterator[str]:
    """The smallest parts that a cut may fall between; each keeps the white space that follows it."""
    for boundary in (r"\n\n+", r"\n+|(?<=[.!?])\s+", r"\s+"):
        units = re.findall(rf".+?(?:{boundary}|$)", text, re.DOTALL)
        if len(units) > 1:
            for unit in units:
                yield from [unit] if len(unit.rstrip()) <= limit else _units(unit, limit)
            return
    for start in range(0, len(text), limit):  # a single word longer than the limit
        yield text[start : start + limit]


def build(sources: Iterable[Path]) -> tuple[list[str], list[str]]:
    """(train, held-out) documents of all sources, in order, each document once.

    A document's hash decides its side, so that adding a source moves no document; all pieces of a long one
    go to the same side.
    """
    seen: set[bytes] = set()
    sides: tuple[list[str], list[str]] = ([], [])
    for source in sources:
        for document in documents(source):
            key = hashlib.sha256(" ".join(document.casefold().split()).encode()).digest()
            if document and key not in seen:
                seen.add(key)
                sides[int.from_bytes(key[:8]) % 1000 < HELD_OUT_PER_MILLE].extend(cut(document))
    return sides


def write(texts: Iterable[str], file: Path) -> None:
    """Writes one `{"text": ...}` a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")


def read(file: Path) -> list[str]:
    """The texts that `write` wrote."""
    return [json.loads(line)["text"] for line in file.read_text("utf-8").split("\n") if line]


def unigram_entropy(
    train: list[list[int]], held_out: list[list[int]], vocab_size: int
) -> tuple[float, float]:
    """Nats a token of the best model that ignores context: (entropy of train, cross-entropy on held-out).

    The model is the train frequencies with one added count a token, so that no held-out token is impossible.
    """
    counts = Counter(token for ids in train for token in ids)
    total = counts.total() + vocab_size
    nats = [-math.log((counts[token] + 1) / total) for token in range(vocab_size)]
    held_out_tokens = [token for ids in held_out for token in ids]
    entropy = sum(count * nats[token] for token, count in counts.items()) / counts.total()
    return entropy, sum(nats[token] for token in held_out_tokens) / len(held_out_tokens)


def measure(folder: Path) -> str:
    """A corpus' size in characters and bundled tokens (with one eos a document), and its unigram entropy."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path("base/tokenizer.json")))
    eos = tokenizer.encode("</s>").ids
    lines, sides = [], []
    for name in ("train", "held_out"):
        texts = read(folder / f"{name}.jsonl")
        ids = [[*encoding.ids, *eos] for encoding in tokenizer.encode_batch(texts)]
        characters, tokens = sum(map(len, texts)), sum(map(len, ids))
        long = sum(len(document) > 256 for document in ids)
        lines.append(
            f"{name}: {len(texts):,} documents, {characters:,} characters, {tokens:,} tokens "
            f"({tokens / characters:.3f} a character), {long} longer than 256 tokens"
        )
        sides.append(ids)
    entropy, cross_entropy = unigram_entropy(sides[0], sides[1], tokenizer.get_vocab_size())
    lines.append(f"unigram entropy: {entropy:.3f} nats a token on train, {cross_entropy:.3f} on held_out")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m qlora.bundled.corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help=".txt, .json or .jsonl files")
    parser.add_argument("--out", type=Path, default=Path("corpus"), help="folder of train and held_out.jsonl")
    parser.add_argument("--entropy", action="store_true", help="measure the corpus in --out")
    arguments = parser.parse_args()
    if not arguments.sources and not arguments.entropy:
        parser.error("name at least one source, or --entropy to measure a corpus built before")
    if arguments.sources:
        for name, texts in zip(("train", "held_out"), build(arguments.sources), strict=True):
            write(texts, arguments.out / f"{name}.jsonl")
            print(f"{arguments.out / name}.jsonl: {len(texts):,} documents")
    if arguments.entropy:
        print(measure(arguments.out))


if __name__ == "__main__":
    main()

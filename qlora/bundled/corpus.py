"""Builds the pretraining corpus of the bundled base from plain-text and JSON sources.

    python -m qlora.bundled.corpus --out corpus gsm8k/train.jsonl tinyshakespeare.txt ...
    python -m qlora.bundled.corpus --out corpus --entropy

The first command writes `corpus/train.jsonl` and `corpus/held_out.jsonl`, with one `{"text": ...}` per line. The
second measures the unigram entropy of these files. NOTICE.md lists the sources of the bundled base.
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

LIMIT = 640  # characters, about 230 tokens of the bundled tokenizer, so that nearly all documents fit in 256 tokens
HELD_OUT_PER_MILLE = 10
TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "\u200b": ""})


def clean(text: str) -> str:
    """Normalize text: NFKC, plain quotes and dashes, no blanks at line ends, to have fewer rare tokens."""
    text = unicodedata.normalize("NFKC", text.translate(TYPOGRAPHY)).replace("\r\n", "\n")
    return re.sub(r"[ \t]+(?=\n|$)", "", text).strip()


def render(row: dict[str, Any]) -> str:
    """Return a JSON row as text: its `text`, or its question and answer in the layout of the bundled chat template.

    GSM8K's calculator annotations (`<<48/2=24>>`) are removed.

    Raises:
        KeyError: the row has other fields.
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
    """Yield the documents of a file: the rows of .json and .jsonl, or pieces of the text of other files."""
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
                f"{source}: row {number}: needs text, question + answer, or instruction + response "
                f"as strings ({type(error).__name__}: {error})"
            ) from error


def cut(text: str, limit: int = LIMIT) -> list[str]:
    """Cut text into pieces of similar length, at most `limit`, between paragraphs, or else sentences, or else words."""
    target = len(text) / math.ceil(len(text) / limit) if text else 0
    pieces = [""]
    for unit in _units(text, limit):
        if len(pieces[-1]) >= target or len((pieces[-1] + unit).rstrip()) > limit:
            pieces.append("")
        pieces[-1] += unit
    return [piece.strip() for piece in pieces if piece.strip()]


def _units(text: str, limit: int) -> Iterator[str]:
    """Yield the parts of a text between which it can be cut; each keeps the white space after it."""
    for boundary in (r"\n\n+", r"\n+|(?<=[.!?])\s+", r"\s+"):
        units = re.findall(rf".+?(?:{boundary}|$)", text, re.DOTALL)
        if len(units) > 1:
            for unit in units:
                yield from [unit] if len(unit.rstrip()) <= limit else _units(unit, limit)
            return
    for start in range(0, len(text), limit):  # a single word longer than the limit
        yield text[start : start + limit]


def build(sources: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Return (train, held-out) documents of all sources, in order and without duplicates.

    The hash of a document decides its split, so that a new source moves no document; all pieces of a long document
    are in the same split.
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
    """Write texts to a file, one `{"text": ...}` per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")


def read(file: Path) -> list[str]:
    """Read the texts that `write` wrote."""
    return [json.loads(line)["text"] for line in file.read_text("utf-8").split("\n") if line]


def unigram_entropy(
    train: list[list[int]], held_out: list[list[int]], vocab_size: int
) -> tuple[float, float]:
    """Return (entropy of train, cross-entropy on held-out) of the best context-free model, in nats per token.

    The model is the frequencies in train, with one added to each token's count, so that every held-out token has a
    probability above zero.
    """
    counts = Counter(token for ids in train for token in ids)
    total = counts.total() + vocab_size
    nats = [-math.log((counts[token] + 1) / total) for token in range(vocab_size)]
    held_out_tokens = [token for ids in held_out for token in ids]
    entropy = sum(count * nats[token] for token, count in counts.items()) / counts.total()
    return entropy, sum(nats[token] for token in held_out_tokens) / len(held_out_tokens)


def measure(folder: Path) -> str:
    """Report the size of a corpus in characters and tokens (with one eos per document), and its unigram entropy."""
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
            f"({tokens / characters:.3f} per character), {long} longer than 256 tokens"
        )
        sides.append(ids)
    entropy, cross_entropy = unigram_entropy(sides[0], sides[1], tokenizer.get_vocab_size())
    lines.append(f"unigram entropy: {entropy:.3f} nats per token on train, {cross_entropy:.3f} on held_out")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m qlora.bundled.corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help=".txt, .json or .jsonl files")
    parser.add_argument(
        "--out", type=Path, default=Path("corpus"), help="folder for train.jsonl and held_out.jsonl"
    )
    parser.add_argument("--entropy", action="store_true", help="measure the corpus in --out")
    arguments = parser.parse_args()
    if not arguments.sources and not arguments.entropy:
        parser.error("give at least one source, or --entropy to measure an existing corpus")
    if arguments.sources:
        for name, texts in zip(("train", "held_out"), build(arguments.sources), strict=True):
            write(texts, arguments.out / f"{name}.jsonl")
            print(f"{arguments.out / name}.jsonl: {len(texts):,} documents")
    if arguments.entropy:
        print(measure(arguments.out))


if __name__ == "__main__":
    main()

"""Scores of generated sentences against several references: BLEU, chrF, NIST and ROUGE-L.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) come from sacrebleu with its defaults, NIST (Doddington 2002) over
5-grams from nltk, ROUGE-L (Lin 2004) from rouge-score without stemming, the best reference of each answer. The E2E
challenge also uses METEOR and CIDEr, which are not measured. Its own script tokenizes otherwise, so these numbers
compare rows of this report, not papers.
"""

from collections.abc import Sequence

PACKAGES = ("sacrebleu", "nltk", "rouge-score")


def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return bleu and chrf (0-100), nist (from 0) and rouge_l (0-100) of one answer for each list of references.

    Raises:
        SystemExit: the packages are not installed.
    """
    try:
        from nltk.translate.nist_score import corpus_nist
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu, corpus_chrf
    except ImportError as error:
        raise SystemExit(f"{error}. Install the packages of the scores: pip install -e '.[bench]'") from None
    most = max(map(len, references))
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    rouge = RougeScorer(["rougeL"])
    best = [
        max(rouge.score(text, answer)["rougeL"].fmeasure for text in texts)
        for answer, texts in zip(answers, references, strict=True)
    ]
    return {
        "bleu": corpus_bleu(answers, streams).score,
        "chrf": corpus_chrf(answers, streams).score,
        "nist": _nist(corpus_nist, answers, references),
        "rouge_l": 100 * sum(best) / len(best),
    }


def _nist(corpus_nist: object, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return NIST over lower-case words of sacrebleu's tokenizer; 0 if no word is right."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = Tokenizer13a()
    split = [[words(text).lower().split() for text in texts] for texts in references]
    try:
        return float(corpus_nist(split, [words(answer).lower().split() for answer in answers], n=5))  # type: ignore[operator]
    except ZeroDivisionError:
        return 0.0

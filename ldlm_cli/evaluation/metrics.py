"""Numbers about texts and token sequences: pure functions, no torch, no tokenizer, no file."""

import math
from collections import Counter
from collections.abc import Sequence

ENTROPY_DEFINITION = (
    "mean over non-empty texts of the entropy, in nats, of the text's own unigram distribution over native tokens "
    "up to and without the first end-of-text token"
)
PERPLEXITY_DEFINITION = (
    "exp(sum of nats / sum of tokens) over all texts, re-tokenised by the judge, each scored after a start token and "
    "with its end token counted, empty texts included"
)
TRIMMED_PERPLEXITY_DEFINITION = "mean of per-text perplexities after dropping the lowest 5 % and the highest 5 %"


def cut_at(ids: Sequence[int], end_id: int) -> list[int]:
    """The ids before the first `end_id`; all of them when it does not occur."""
    ids = [int(token) for token in ids]
    return ids[: ids.index(end_id)] if end_id in ids else ids


def normalise_white_space(text: str) -> str:
    """The words of the text joined by single spaces, without white space at the ends."""
    return " ".join(text.split())


def unigram_entropy(ids: Sequence[int]) -> float:
    """Entropy in nats of the unigram distribution of one sequence, in [0, ln(len)].

    Raises:
        ValueError: the sequence is empty and has no distribution.
    """
    if not len(ids):
        raise ValueError("an empty sequence has no unigram entropy")
    total = len(ids)
    # Each count is one of the sequence's own tokens, so no logarithm of 0 arises; max() keeps -0.0 out of reports.
    return max(0.0, -sum(n / total * math.log(n / total) for n in Counter(ids).values()))


def mean_unigram_entropy(sequences: Sequence[Sequence[int]]) -> float | None:
    """Mean of `unigram_entropy` over the non-empty sequences, nats; None when all are empty."""
    values = [unigram_entropy(ids) for ids in sequences if len(ids)]
    return sum(values) / len(values) if values else None


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n neighbouring tokens, in order; empty when the sequence is shorter than n."""
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams as a share of all n-grams, pooled over the sequences, in (0, 1]; None without n-grams."""
    pooled = [gram for ids in sequences for gram in ngrams(ids, n)]
    return len(set(pooled)) / len(pooled) if pooled else None


def repetition_n(sequences: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Mean over sequences of the share of n-grams that occurred before in the same sequence, in [0, 1).

    Sequences shorter than n have no n-gram and do not count; None when none counts.
    """
    shares = []
    for ids in sequences:
        grams = ngrams(ids, n)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None


def duplicate_share(texts: Sequence[str]) -> float | None:
    """Share of texts equal to an earlier one after white-space normalisation, in [0, 1); None without texts."""
    if not texts:
        return None
    return 1 - len({normalise_white_space(text) for text in texts}) / len(texts)


def trimmed_mean(values: Sequence[float], share: float = 0.05) -> float | None:
    """Mean after dropping floor(share * count) values at each end; None without values.

    Raises:
        ValueError: share is outside [0, 0.5).
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share is {share}, expected a value in [0, 0.5)")
    if not values:
        return None
    # The tiny addend keeps 0.05 * 20 from becoming 0 by rounding.
    drop = int(share * len(values) + 1e-9)
    kept = sorted(values)[drop : len(values) - drop]
    return math.fsum(kept) / len(kept)


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Token-level perplexity exp(sum nats / sum tokens), at least 1 for a proper model; None without tokens.

    A perplexity beyond the range of a float is reported as infinity.
    """
    total = sum(tokens)
    return _exp(math.fsum(nats) / total) if total else None


def text_perplexities(nats: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Perplexity of each text by itself; texts without a scored token are left out."""
    return [_exp(value / count) for value, count in zip(nats, tokens, strict=True) if count]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

"""Naive texts that every table of results must hold its own against; deterministic by seed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ldlm_cli.data.shards import TokenSplit
from ldlm_cli.data.vocabulary import Vocabulary
from ldlm_cli.evaluation.generation import TextSet

# Enough to pin counts of unigrams and bigrams, and few enough to sort in half a second.
FIT_TOKENS = 2_000_000
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def control_texts(
    reference: TextSet, train: TokenSplit, vocabulary: Vocabulary, *, window_tokens: int, seed: int
) -> dict[str, TextSet]:
    """The naive controls, each with as many texts as the reference.

    Args:
        reference: held-out texts; give the words to shuffle, the sentences to repeat, and the unigram texts' lengths.
        train: training tokens; unigram and bigram samplers are fitted to the first two million.
        vocabulary: encodes and decodes.
        window_tokens: bigram texts end at their end token, or here.
        seed: everything random is a function of it.
    """
    stream = np.asarray(train.stream[:FIT_TOKENS]).astype(np.int64)
    shuffled = shuffle_words(reference.texts, np.random.default_rng([seed, 2]))
    lengths = [len(ids) for ids in reference.token_ids]
    unigram = sample_unigrams(stream, lengths, vocabulary.special_ids, np.random.default_rng([seed, 3]))
    bigram = sample_bigrams(stream, len(lengths), window_tokens, vocabulary.eos_id, np.random.default_rng([seed, 4]))
    repeated = [repeat_sentence(text) for text in reference.texts]
    return {
        "shuffled_words": TextSet(shuffled, vocabulary.encode(shuffled)),
        "unigram_sampler": TextSet([vocabulary.decode(ids) for ids in unigram], unigram),
        "bigram_sampler": TextSet([vocabulary.decode(ids) for ids in bigram], bigram),
        "repeated_sentence": TextSet(repeated, vocabulary.encode(repeated)),
    }


def shuffle_words(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Each text with its white-space separated words in random order, joined by single spaces."""
    shuffled = []
    for text in texts:
        words = text.split()
        shuffled.append(" ".join(words[i] for i in rng.permutation(len(words))))
    return shuffled


def repeat_sentence(text: str) -> str:
    """The first sentence of the text over and over, cut at the text's number of words."""
    words = SENTENCE_END.split(text.strip())[0].split()
    count = len(text.split())
    return " ".join((words * (count // max(1, len(words)) + 1))[:count])


def sample_unigrams(
    stream: np.ndarray, lengths: Sequence[int], special_ids: frozenset[int], rng: np.random.Generator
) -> list[list[int]]:
    """Token sequences of the given lengths, each token drawn from the stream by itself, special tokens left out."""
    plain = stream[~np.isin(stream, list(special_ids))]
    if not len(plain):
        return [[] for _ in lengths]
    return [plain[rng.integers(len(plain), size=length)].tolist() for length in lengths]


def sample_bigrams(
    stream: np.ndarray, count: int, max_tokens: int, eos_id: int, rng: np.random.Generator
) -> list[list[int]]:
    """Token sequences from the bigram model of the stream, each from a document start to its end token or `max_tokens`.

    A token's follower is what follows one of its occurrences, chosen at random: exactly the bigram model, without a
    table of V x V.

    Args:
        stream: documents, each closed by `eos_id`, [T] int.
    Returns:
        `count` sequences, end token left out.
    """
    order = np.argsort(stream[:-1], kind="stable")  # places of the occurrences, grouped by token
    keys = stream[:-1][order]
    current = np.full(count, eos_id, dtype=np.int64)
    alive = np.ones(count, dtype=bool)
    texts: list[list[int]] = [[] for _ in range(count)]
    for _ in range(max_tokens - 1):
        low = np.searchsorted(keys, current, side="left")
        high = np.searchsorted(keys, current, side="right")
        draws = rng.random(count)
        alive &= high > low  # a token seen only at the very end has no follower
        if not alive.any():
            break
        place = order[np.minimum(low + (draws * (high - low)).astype(np.int64), len(order) - 1)]
        current = np.where(alive, stream[place + 1], eos_id)
        alive &= current != eos_id
        for index in np.flatnonzero(alive):
            texts[index].append(int(current[index]))
    return texts

"""Every metric against its closed form."""

import math

import pytest

from ldlm_cli.evaluation import metrics


def test_entropy_of_a_uniform_and_of_a_constant_sequence() -> None:
    assert metrics.unigram_entropy([5, 6, 7, 8]) == pytest.approx(math.log(4))
    assert metrics.unigram_entropy([3] * 9) == 0.0
    assert math.copysign(1, metrics.unigram_entropy([3] * 9)) == 1  # no -0.0 in a report


def test_entropy_of_unequal_counts() -> None:
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.unigram_entropy([1, 1, 1, 2]) == pytest.approx(expected)


def test_mean_entropy_is_per_text_not_pooled_and_skips_empty_texts() -> None:
    assert metrics.mean_unigram_entropy([[1, 1], [2, 2], []]) == 0.0
    assert metrics.mean_unigram_entropy([[1, 2], [3, 3], []]) == pytest.approx(math.log(2) / 2)
    assert metrics.mean_unigram_entropy([[], []]) is None
    with pytest.raises(ValueError, match="empty"):
        metrics.unigram_entropy([])


def test_ids_are_cut_before_the_first_end_token() -> None:
    assert metrics.cut_at([4, 5, 0, 6, 0], 0) == [4, 5]
    assert metrics.cut_at([0], 0) == []
    assert metrics.cut_at([4, 5], 0) == [4, 5]


def test_distinct_n_pools_texts() -> None:
    assert metrics.distinct_n([[1, 2, 1, 2]], 1) == 0.5
    assert metrics.distinct_n([[1, 2], [1, 2]], 2) == 0.5
    assert metrics.distinct_n([[1, 2, 3, 4]], 2) == 1.0
    assert metrics.distinct_n([[1], []], 2) is None


def test_repetition_counts_within_a_text_only() -> None:
    assert metrics.repetition_n([[1, 2, 3, 4], [1, 2, 3, 4]], 4) == 0.0
    assert metrics.repetition_n([[7] * 8], 4) == pytest.approx(4 / 5)  # five 4-grams, one of them new
    assert metrics.repetition_n([[7] * 8, [1, 2, 3, 4], [1]], 4) == pytest.approx(2 / 5)
    assert metrics.repetition_n([[1, 2]], 4) is None


def test_duplicates_ignore_white_space() -> None:
    assert metrics.duplicate_share(["a b", " a\n b ", "c", "a b"]) == 0.5
    assert metrics.duplicate_share(["a", "b"]) == 0.0
    assert metrics.duplicate_share([]) is None


def test_trimmed_mean_drops_both_ends() -> None:
    values = [float(n) for n in range(1, 19)] + [1e9, -1e9]  # one value at each of the 20's ends goes
    assert metrics.trimmed_mean(values) == pytest.approx(9.5)
    assert metrics.trimmed_mean([1.0, 3.0]) == 2.0
    assert metrics.trimmed_mean([]) is None
    with pytest.raises(ValueError, match="share"):
        metrics.trimmed_mean([1.0], 0.5)


def test_perplexity_of_a_uniform_model_is_its_number_of_choices() -> None:
    assert metrics.perplexity([3 * math.log(7), math.log(7)], [3, 1]) == pytest.approx(7)
    assert metrics.perplexity([], []) is None
    assert metrics.perplexity([1e4], [1]) == math.inf


def test_token_level_perplexity_weighs_texts_by_length_and_the_mean_of_texts_does_not() -> None:
    nats, tokens = [9 * math.log(2), math.log(8)], [9, 1]
    assert metrics.perplexity(nats, tokens) == pytest.approx(2 ** (12 / 10))
    assert metrics.text_perplexities(nats, tokens) == pytest.approx([2, 8])

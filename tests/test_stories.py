"""The built-in corpus and its checker: they agree on every story, and the checker sees every single change."""

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

import pytest

from ldlm_cli.data import stories, story_words
from ldlm_cli.data.story_checker import check_long_story, check_story
from ldlm_cli.errors import DataError

SAMPLES = 10_000
NAMES = story_words.GIRLS + story_words.BOYS
PLACES = tuple(place.name for place in story_words.PLACES)
PASTIMES = tuple(place.pastime for place in story_words.PLACES)
EVENTS = tuple(cause.event for cause in story_words.CAUSES)
REMEDIES = tuple(cause.remedy for cause in story_words.CAUSES)
SINGLE_WORDS = {
    name: value for name, value in vars(story_words).items() if name.isupper() and isinstance(value[0], str)
} | {"PLACES": PLACES}
PHRASES = {"PASTIMES": PASTIMES, "EVENTS": EVENTS, "REMEDIES": REMEDIES}
WORD_LISTS = SINGLE_WORDS | PHRASES
TEMPLATES = (*stories.SHORT_ARC, stories.LATER_OPENING)
PRONOUNS = {"He": "She", "She": "He", "his": "her", "her": "his"}
EXAMPLE = (
    "One sunny day, Tom visited the lake.",
    "He skipped flat stones and held his red kite.",
    "Suddenly the red kite got stuck in a tree.",
    "Tom was sad until Anna came.",
    "Luckily Anna shook the branches.",
    "Tom thanked Anna and left the lake, happy about the red kite.",
)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """20,000 short stories; the n-gram samplers are fitted on all of them."""
    return list(stories.stories(seed=7, num_documents=2 * SAMPLES, long_share=0.0))


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\w+|[.,]", text)


def text_of(tokens: Iterable[str]) -> str:
    return re.sub(r" ([.,])", r"\1", " ".join(tokens))


def sentences_of(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


def share_valid(texts: Iterable[str]) -> float:
    verdicts = [check_story(text).valid for text in texts]
    return sum(verdicts) / len(verdicts)


# --- the generator


def test_the_corpus_never_changes_silently() -> None:
    first = "\n".join(stories.short_story(0, index) for index in range(100))
    assert (
        hashlib.sha256(first.encode()).hexdigest() == "a33781c6e180e5444732223bbd71fcc1a9887de60bafabea47cddc150e531609"
    )
    assert (
        hashlib.sha256(stories.long_story(0, 0).encode()).hexdigest()
        == "d60dbf305198173c6d58006ee05af4466f642fd7e620dc64e1a589cc04789442"
    )


def test_a_story_depends_on_its_address_only() -> None:
    mixed = list(stories.stories(3, 300, 0.1))
    assert mixed == list(stories.stories(3, 300, 0.1))
    assert mixed[:50] == list(stories.stories(3, 50, 0.1))
    for index, text in enumerate(mixed):
        assert text in (stories.short_story(3, index), stories.long_story(3, index))
    assert stories.short_story(3, 5) != stories.short_story(5, 3)
    assert not stories.long_story(3, 5).startswith(stories.short_story(3, 5))


def test_the_share_of_long_stories() -> None:
    def count_long(share: float) -> int:
        return sum(stories.count_words(text) > 100 for text in stories.stories(1, 1000, share))

    assert count_long(0.0) == 0
    assert 60 <= count_long(0.1) <= 140
    assert sum(stories.count_words(text) > 100 for text in stories.stories(1, 20, 1.0)) == 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: stories.short_story(-1, 0),
        lambda: stories.short_story(0, 2**64),
        lambda: stories.long_story(0, 0, min_words=0),
        lambda: next(stories.stories(0, -1, 0.0)),
        lambda: next(stories.stories(0, 1, 1.5)),
    ],
)
def test_wrong_values_are_refused(call: Callable[[], str]) -> None:
    with pytest.raises(DataError):
        call()


def test_short_stories_are_one_plain_line_of_bounded_length(corpus: list[str]) -> None:
    for text in corpus:
        assert re.fullmatch(r"(?:[A-Z][A-Za-z]*(?:,? [A-Za-z]+)+\. ){5}[A-Z][A-Za-z]*(?:,? [A-Za-z]+)+\.", text)
        assert 52 <= len(tokens_of(text)) <= 60
        assert stories.count_words(text) == len(tokens_of(text))


def test_the_longest_and_shortest_choices_stay_in_bounds() -> None:
    for place in story_words.PLACES:
        for cause in story_words.CAUSES:
            values = defaultdict(lambda: "word", pastime=place.pastime, event=cause.event, remedy=cause.remedy)
            sizes = [[len(tokens_of(form.format_map(values))) for form in position] for position in stories.SHORT_ARC]
            assert sum(map(min, sizes)) >= 52
            assert sum(map(max, sizes)) <= 60


def test_rich_words_at_low_entropy(corpus: list[str]) -> None:
    """A small model must be able to learn all of it, and still has many words to tell apart."""
    fixed_words = {word for position in stories.SHORT_ARC for form in position for word in fixed_part(form)}
    listed = {word for entries in WORD_LISTS.values() for entry in entries for word in entry.split()}
    possible = {word.lower() for word in fixed_words | listed | set(PRONOUNS)}
    reached = {token.lower() for text in corpus for token in tokens_of(text) if token.isalpha()}
    assert reached == possible
    assert len(possible) >= 410
    assert len(set(corpus)) == len(corpus)
    assert len({stories.count_words(text) for text in corpus}) >= 9
    assert 2e10 <= stories.count_stories() <= 2e11
    assert 23.5 <= math.log(stories.count_stories()) <= 26.5


def fixed_part(form: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"{\w+}", "", form))


def test_different_choices_give_different_stories() -> None:
    """`count_stories` multiplies choices; this is what makes it the number of texts."""
    flat = [entry for options in WORD_LISTS.values() for entry in options]
    assert [entry for entry, times in Counter(flat).items() if times > 1] == []
    single_words = {word for options in SINGLE_WORDS.values() for word in options}
    fixed_words = {word for position in TEMPLATES for form in position for word in fixed_part(form)}
    assert fixed_words.isdisjoint(single_words)
    in_phrases = {word for options in PHRASES.values() for entry in options for word in entry.split()}
    assert in_phrases.isdisjoint(single_words)
    for position in TEMPLATES:
        skeletons = [re.sub(r"{\w+}", "_", form) for form in position]
        assert len(set(skeletons)) == len(skeletons)
    for slot in ("hero", "friend", "place", "event", "remedy", *stories.WORD_SLOTS):
        always = [all(f"{{{slot}}}" in form for form in position) for position in stories.SHORT_ARC]
        assert any(always), f"{slot} can be missing from a story"


def test_the_count_is_the_number_of_stories_of_a_small_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "_NAMES", ("Anna", "Tom"))
    monkeypatch.setattr(story_words, "PLACES", story_words.PLACES[:2])
    monkeypatch.setattr(story_words, "CAUSES", story_words.CAUSES[:2])
    few = {"object": 1, "color": 2, "weather": 1, "sad": 1, "glad": 2}
    monkeypatch.setattr(stories, "WORD_SLOTS", {slot: stories.WORD_SLOTS[slot][:size] for slot, size in few.items()})
    made = set(stories.stories(seed=4, num_documents=SAMPLES, long_share=0.0))
    assert len(made) == stories.count_stories() == 2 * 2 * 2 * math.prod(few.values()) * 2**4
    assert share_valid(made) == 1.0


def test_no_article_needs_an(corpus: list[str]) -> None:
    assert not [text for text in corpus if re.search(r"\b[Aa] [aeiou]", text)]


def test_long_stories_have_enough_episodes() -> None:
    for index in range(30):
        text = stories.long_story(11, index)
        assert 1150 <= len(tokens_of(text)) == stories.count_words(text) <= 1150 + 60
        verdicts = check_long_story(text)
        assert len(verdicts) * 6 == len(sentences_of(text))
        assert all(verdict.valid for verdict in verdicts), text
        assert check_story(" ".join(sentences_of(text)[:6])).valid
    assert stories.long_story(11, 0, min_words=200) == stories.long_story(11, 0)[: len(stories.long_story(11, 0, 200))]


# --- the checker accepts what is right and names what is wrong


def test_every_generated_story_is_valid(corpus: list[str]) -> None:
    assert share_valid(corpus[:SAMPLES]) == 1.0
    assert share_valid(f" {text}\n" for text in corpus[:10]) == 1.0


def swap_one_mention(text: str, binding: str, rng: random.Random) -> str:
    """Change exactly one mention of one binding into something else from the same list."""
    names = re.findall("|".join(NAMES), text)
    options: tuple[str, ...] = {
        "hero": (names[0],),
        "friend": tuple(name for name in names if name != names[0])[:1],
        "pronoun": tuple(PRONOUNS),
        "object": story_words.OBJECTS,
        "color": story_words.COLORS,
        "place": PLACES,
        "pastime": PASTIMES,
        "cause": EVENTS + REMEDIES,
        "feeling": story_words.SAD + story_words.GLAD,
    }[binding]
    mention = rng.choice(list(re.finditer(rf"\b(?:{'|'.join(options)})\b", text)))
    old = mention.group()
    if binding == "pronoun":
        new = PRONOUNS[old]
    elif binding == "feeling":
        new = rng.choice(story_words.GLAD if old in story_words.SAD else story_words.SAD)
    else:
        same_list = next(entries for entries in (NAMES, *WORD_LISTS.values()) if old in entries)
        new = rng.choice([entry for entry in same_list if entry != old])
    return text[: mention.start()] + new + text[mention.end() :]


BINDINGS = ("hero", "friend", "pronoun", "object", "color", "place", "pastime", "cause", "feeling")


def test_one_changed_binding_is_rejected_and_named(corpus: list[str]) -> None:
    rng = random.Random(1)
    rejected: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for index, text in enumerate(corpus[:SAMPLES]):
        binding = BINDINGS[index % len(BINDINGS)]
        changed = swap_one_mention(text, binding, rng)
        assert changed != text
        verdict = check_story(changed)
        rejected[binding] += not verdict.valid
        named[binding] += verdict.broken == binding
        assert verdict.valid == (verdict.detail is None)
    assert rejected.total() == SAMPLES
    assert named == rejected


@pytest.mark.parametrize(
    ("number", "sentence", "broken"),
    [
        (1, "One sunny day, Ben visited the lake.", "hero"),
        (6, "Ben and Anna left the lake with the red kite and were happy.", "hero"),
        (5, "Luckily Lucy shook the branches.", "friend"),
        (5, "Luckily Tom shook the branches.", "friend"),
        (4, "Lucy saw that Tom was sad.", "friend"),
        (2, "She skipped flat stones and held his red kite.", "pronoun"),
        (2, "He skipped flat stones and held her red kite.", "pronoun"),
        (3, "Suddenly the red drum got stuck in a tree.", "object"),
        (6, "Tom thanked Anna and left the lake, happy about the red drum.", "object"),
        (2, "He skipped flat stones and held his blue kite.", "color"),
        (3, "Suddenly the blue kite got stuck in a tree.", "color"),
        (6, "Tom and Anna left the lake with the blue kite and were happy.", "color"),
        (1, "One sunny day, Tom visited the park.", "place"),
        (6, "Tom thanked Anna and left the park, happy about the red kite.", "place"),
        (2, "He fed hungry ducks and held his red kite.", "pastime"),
        (5, "Luckily Anna washed it with soap.", "cause"),
        (3, "Then the kite fell into mud.", "cause"),
        (3, "Then the kite got stuck in a mud.", "grammar"),
        (4, "Tom was happy until Anna came.", "feeling"),
        (6, "Tom thanked Anna and left the lake, sad about the red kite.", "feeling"),
        (1, "Some days later, Tom went to the lake.", "grammar"),
        (1, "A week later, Tom went to the lake.", "order"),
        (2, "Then the kite got stuck in a tree.", "order"),
        (2, "he skipped flat stones and held his red kite.", "grammar"),
        (2, "He skipped flat stones and held his red red kite.", "grammar"),
        (2, "He skipped flat stones and held his red kite", "grammar"),
        (2, "", "grammar"),
    ],
)
def test_the_verdict_names_what_is_broken(number: int, sentence: str, broken: str) -> None:
    changed = list(EXAMPLE)
    assert check_story(" ".join(changed)).valid
    changed[number - 1] = sentence
    verdict = check_story(" ".join(changed))
    assert (verdict.valid, verdict.broken) == (False, broken)
    assert verdict.detail
    assert verdict.detail.count("\n") == 0


def test_missing_extra_and_empty_sentences() -> None:
    assert check_story("").broken == "grammar"
    assert check_story(" ".join(EXAMPLE[:5])).broken == "order"
    assert check_story(" ".join((*EXAMPLE, EXAMPLE[5]))).broken == "order"
    assert check_story("  ".join(EXAMPLE)).broken == "grammar"
    assert check_story(" ".join(EXAMPLE[:5]) + " Tom thanked").broken == "grammar"


# --- the checker on long stories


def long_sentences() -> list[str]:
    return sentences_of(stories.long_story(2, 1, min_words=400))


def test_another_hero_or_friend_between_episodes_is_found() -> None:
    sentences = long_sentences()
    names = list(dict.fromkeys(re.findall("|".join(NAMES), " ".join(sentences))))
    assert len(names) == 2
    for role, old in zip(("hero", "friend"), names, strict=True):
        gender = story_words.GIRLS if old in story_words.GIRLS else story_words.BOYS
        new = next(name for name in gender if name not in names)
        third = [sentence.replace(old, new) for sentence in sentences[12:18]]
        verdicts = check_long_story(" ".join(sentences[:12] + third + sentences[18:]))
        assert [verdict.broken for verdict in verdicts] == [None, None, role] + [None] * (len(verdicts) - 3)
        assert old in (verdicts[2].detail or "")
        assert new in (verdicts[2].detail or "")


def test_a_spoilt_episode_does_not_spoil_its_neighbours() -> None:
    sentences = long_sentences()
    count = len(sentences) // 6
    for spoilt, broken in (("Bad opening.", 6), ("Bad middle.", 9)):
        changed = [*sentences[:broken], spoilt, *sentences[broken + 1 :]]
        keys = [verdict.broken for verdict in check_long_story(" ".join(changed))]
        assert keys == [None, "grammar"] + [None] * (count - 2)
    shortened = [verdict.broken for verdict in check_long_story(" ".join(sentences[:9] + sentences[10:]))]
    assert shortened == [None, "order"] + [None] * (count - 2)
    assert check_long_story(" ".join(sentences[:-2]))[-1].broken == "order"
    assert [verdict.broken for verdict in check_long_story("")] == ["grammar"]


def test_two_short_stories_are_not_a_long_one() -> None:
    text = " ".join(EXAMPLE)
    assert [verdict.broken for verdict in check_long_story(f"{text} {text}")] == [None, "order"]


# --- what does not know the whole story cannot write a valid one


def ngram_samples(corpus: list[str], order: int, count: int) -> Iterator[str]:
    """Sample texts from a word n-gram model that has seen start and end of story."""
    start, end = "<start>", "<end>"
    followers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for text in corpus:
        padded = [start] * (order - 1) + tokens_of(text) + [end]
        for position in range(order - 1, len(padded)):
            followers[tuple(padded[position - order + 1 : position])].append(padded[position])
    rng = random.Random(order)
    for _ in range(count):
        words = [start] * (order - 1)
        while words[-1:] != [end] and len(words) < 120:
            words.append(rng.choice(followers[tuple(words[len(words) - order + 1 :])]))
        yield text_of(word for word in words if word not in (start, end))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_word_samplers_reach_no_validity(corpus: list[str], order: int) -> None:
    assert share_valid(ngram_samples(corpus, order, SAMPLES)) <= 0.02


def test_shuffled_stories_are_rejected(corpus: list[str]) -> None:
    rng = random.Random(2)
    keys: Counter[str | None] = Counter()
    for text in corpus[:SAMPLES]:
        sentences = sentences_of(text)
        rng.shuffle(sentences)
        keys[check_story(" ".join(sentences)).broken] += 1
    assert keys[None] <= 0.02 * SAMPLES
    assert set(keys) <= {None, "order"}

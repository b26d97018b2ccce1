"""The built-in corpus `builtin:stories`: short English tales whose parts must agree from the first word to the last.

A short story has six sentences with a fixed arc: opening (hero, place), object (and the pastime that fits the place),
trouble (cause), friend, rescue (the deed that fits the cause), ending. Hero, friend, object, its color and the place
are named again in later sentences, so a text is a valid story only when it is right as a whole; `story_checker` decides
that from the text alone. A long story is a row of such episodes with the same two characters.

The choices are few (a story carries about 25 nats), so that a small model can learn the whole language; what makes a
story hard is that each choice must be remembered from one end of it to the other.

Story i depends on (seed, i) only, so any part of the corpus can be made without the part before it.
"""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from ldlm_cli.data import story_words as words
from ldlm_cli.errors import DataError

_T = TypeVar("_T")

_MASK = (1 << 64) - 1
_SHORT, _LONG, _LENGTH_DRAW = 1, 2, 3  # what a random stream is for

# {He} and {his} follow the hero; every slot is filled once per story. Two templates of one position differ in a fixed
# word, and the number of tokens stays between 52 and 60 per story.
OPENING = (
    "One {weather} day, {hero} visited the {place}.",
    "{hero} went to the {place} on a {weather} day.",
)
LATER_OPENING = (
    "A week later, {hero} went to the {place}.",
    "Some days later, {hero} visited the {place}.",
    "Soon after that, {hero} went to the {place}.",
)
OBJECT = ("{He} {pastime} and held {his} {color} {object}.",)
TROUBLE = (
    "Then the {object} {event}.",
    "Suddenly the {color} {object} {event}.",
)
FRIEND = (
    "{hero} was {sad} until {friend} came.",
    "{friend} saw that {hero} was {sad}.",
)
RESCUE = ("Luckily {friend} {remedy}.",)
ENDING = (
    "{hero} and {friend} left the {place} with the {color} {object} and were {glad}.",
    "{hero} thanked {friend} and left the {place}, {glad} about the {color} {object}.",
)
SHORT_ARC = (OPENING, OBJECT, TROUBLE, FRIEND, RESCUE, ENDING)
LATER_ARC = (LATER_OPENING, *SHORT_ARC[1:])

# Slots that need no agreement with a character, a place or a cause: one word of the list, the same wherever it stands.
WORD_SLOTS: dict[str, tuple[str, ...]] = {
    "object": words.OBJECTS,
    "color": words.COLORS,
    "weather": words.WEATHER,
    "sad": words.SAD,
    "glad": words.GLAD,
}
_NAMES = words.GIRLS + words.BOYS
_GIRLS = frozenset(words.GIRLS)


class _Characters(NamedTuple):
    hero: str
    friend: str


def short_story(seed: int, index: int) -> str:
    """Return short story `index` of corpus `seed`: one line of six sentences, 52 to 60 words and marks.

    Any integers >= 0 (below 2**64) are allowed; anything else raises DataError.
    """
    rng = _stream(seed, index, _SHORT)
    return _episode(rng, _draw_characters(rng), SHORT_ARC)


def long_story(seed: int, index: int, min_words: int = 1150) -> str:
    """Return long story `index` of corpus `seed`: one line of episodes about the same hero and friend.

    The first episode has the form of a short story; the later ones open with a connective such as "A week later".
    Episodes are added until the text has at least `min_words` (>= 1) words and marks, so it ends within one episode
    of that. Seed and index as in `short_story`; a wrong value raises DataError.
    """
    if min_words < 1:
        raise DataError(f"min_words of a long story must be at least 1, not {min_words}.")
    rng = _stream(seed, index, _LONG)
    characters = _draw_characters(rng)
    episodes = [_episode(rng, characters, SHORT_ARC)]
    total = count_words(episodes[0])
    while total < min_words:
        episodes.append(_episode(rng, characters, LATER_ARC))
        total += count_words(episodes[-1])
    return " ".join(episodes)


def stories(seed: int, num_documents: int, long_share: float) -> Iterator[str]:
    """Yield documents 0 .. num_documents - 1 of corpus `seed`, each a short or a long story.

    Document i is long when a number drawn from its address (seed, i) is below `long_share` (0 to 1), so a larger share
    only turns short documents into long ones. A negative number of documents or a share outside 0..1 raises DataError.
    """
    if num_documents < 0:
        raise DataError(f"The number of stories must be at least 0, not {num_documents}.")
    if not 0.0 <= long_share <= 1.0:
        raise DataError(f"The share of long stories must lie between 0 and 1, not {long_share}.")
    for index in range(num_documents):
        is_long = long_share > 0.0 and _stream(seed, index, _LENGTH_DRAW).random() < long_share
        yield long_story(seed, index) if is_long else short_story(seed, index)


def count_stories() -> int:
    """Return the exact number of different short stories.

    It is the product of the choices made: characters, place, cause, the words of the other slots, and a template per
    sentence. Different choices give different texts: the word lists are disjoint from each other and from the fixed
    words, so a sentence shows which template made it and what filled each slot, and every choice appears in some
    sentence whichever templates are drawn. The tests check both conditions, and count a smaller grammar by making it.
    """
    agreeing = len(_NAMES) * (len(_NAMES) - 1) * len(words.PLACES) * len(words.CAUSES)
    return agreeing * math.prod(map(len, WORD_SLOTS.values())) * math.prod(map(len, SHORT_ARC))


def count_words(text: str) -> int:
    """Return the number of words, full stops and commas in a story."""
    return text.count(" ") + 1 + text.count(".") + text.count(",")


def _stream(seed: int, index: int, kind: int) -> random.Random:
    """Return the random stream of one address; neighbouring addresses get unrelated streams."""
    if not (0 <= seed <= _MASK and 0 <= index <= _MASK):
        raise DataError(f"A story needs a seed and an index from 0 to 2**64 - 1, not {seed} and {index}.")
    state = 0
    for part in (kind, seed, index):
        state = _scramble(state ^ part)
    return random.Random(state)


def _scramble(value: int) -> int:
    """Spread a 64-bit integer over all 64 bits; one-to-one, so no two indices of one seed share a stream."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _pick(rng: random.Random, options: tuple[_T, ...]) -> _T:
    # Python promises the sequence of random(), but not that of choice(), to stay the same between versions.
    return options[int(rng.random() * len(options))]


def _draw_characters(rng: random.Random) -> _Characters:
    hero = _pick(rng, _NAMES)
    friend = _pick(rng, _NAMES)
    while friend == hero:
        friend = _pick(rng, _NAMES)
    return _Characters(hero, friend)


def _episode(rng: random.Random, characters: _Characters, arc: tuple[tuple[str, ...], ...]) -> str:
    place = _pick(rng, words.PLACES)
    cause = _pick(rng, words.CAUSES)
    is_girl = characters.hero in _GIRLS
    values = {
        "hero": characters.hero,
        "friend": characters.friend,
        "He": "She" if is_girl else "He",
        "his": "her" if is_girl else "his",
        "place": place.name,
        "pastime": place.pastime,
        "event": cause.event,
        "remedy": cause.remedy,
    }
    for slot, options in WORD_SLOTS.items():
        values[slot] = _pick(rng, options)
    return " ".join([_pick(rng, templates).format_map(values) for templates in arc])

"""The exact oracle of the built-in corpus: is a text a valid story, and if not, what is wrong with it?

The checker reads text only. It shares the word lists with the generator and nothing else: the sentence forms below are
its own description of the language, so a slip in either one shows up as a disagreement between the two.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ldlm_cli.data.story_words import (
    BOYS,
    CAUSES,
    COLORS,
    GIRLS,
    GLAD,
    OBJECTS,
    PLACES,
    SAD,
    WEATHER,
)


@dataclass(frozen=True)
class StoryVerdict:
    """What the checker found.

    `broken` is None for a valid story, else the first of these that fails: "grammar" (a sentence of no known form),
    "order" (known sentences, but missing, extra or misplaced), "hero", "friend", "pronoun", "object", "color" (of the
    object), "place", "pastime" (not what heroes do at this place), "cause" (the deed does not fit the trouble),
    "feeling" (a glad word where the hero must be sad, or the other way round).
    `detail` is one sentence for a person to read.
    """

    valid: bool
    broken: str | None
    detail: str | None


@dataclass(frozen=True)
class _Mention:
    sentence: int  # counted from 1
    word: str


def _any_of(options: Iterable[str]) -> str:
    return "|".join(re.escape(option) for option in options)


# What may stand where a sentence form names it in angle brackets. Feelings are matched loosely (sad or glad) and
# pronouns of both genders are let through, so that a wrong one is reported by its own name and not as bad grammar.
_PARTS = {
    "hero": _any_of(GIRLS + BOYS),
    "friend": _any_of(GIRLS + BOYS),
    "subject": "He|She",
    "owner": "his|her",
    "object": _any_of(OBJECTS),
    "color": _any_of(COLORS),
    "place": _any_of(place.name for place in PLACES),
    "pastime": _any_of(place.pastime for place in PLACES),
    "event": _any_of(cause.event for cause in CAUSES),
    "remedy": _any_of(cause.remedy for cause in CAUSES),
    "feeling": _any_of(SAD + GLAD),
    "weather": _any_of(WEATHER),
}
_PASTIME_AT = {place.name: place.pastime for place in PLACES}
_REMEDY_OF = {cause.event: cause.remedy for cause in CAUSES}


def _forms(*forms: str) -> tuple[re.Pattern[str], ...]:
    """Compile sentence forms; `<part>` stands for one of the words of that part, the rest is a regular expression."""
    return tuple(re.compile(re.sub(r"<(\w+)>", lambda m: f"(?P<{m[1]}>{_PARTS[m[1]]})", form)) for form in forms)


_FIRST_OPENING = _forms(
    r"One <weather> day, <hero> visited the <place>\.",
    r"<hero> went to the <place> on a <weather> day\.",
)
_NEXT_OPENING = _forms(
    r"(?:A week later|Soon after that), <hero> went to the <place>\.",
    r"Some days later, <hero> visited the <place>\.",
)
_BODY = (
    _forms(r"<subject> <pastime> and held <owner> <color> <object>\."),
    _forms(
        r"Then the <object> <event>\.",
        r"Suddenly the <color> <object> <event>\.",
    ),
    _forms(
        r"<hero> was <feeling> until <friend> came\.",
        r"<friend> saw that <hero> was <feeling>\.",
    ),
    _forms(r"Luckily <friend> <remedy>\."),
    _forms(
        r"<hero> and <friend> left the <place> with the <color> <object> and were <feeling>\.",
        r"<hero> thanked <friend> and left the <place>, <feeling> about the <color> <object>\.",
    ),
)
_FIRST_EPISODE = (_FIRST_OPENING, *_BODY)
_NEXT_EPISODE = (_NEXT_OPENING, *_BODY)
_LENGTH = len(_FIRST_EPISODE)
_EVERY_FORM = _FIRST_OPENING + _NEXT_OPENING + tuple(form for forms in _BODY for form in forms)
_ROLES = ("opening", "object sentence", "trouble", "friend sentence", "rescue", "ending")

_SUBJECT_OF = dict.fromkeys(GIRLS, "She") | dict.fromkeys(BOYS, "He")
_OWNER_OF = dict.fromkeys(GIRLS, "her") | dict.fromkeys(BOYS, "his")
_FEELINGS_AT = {4: frozenset(SAD), 6: frozenset(GLAD)}
_VALID = StoryVerdict(valid=True, broken=None, detail=None)


def check_story(text: str) -> StoryVerdict:
    """Check one complete short story; white space at both ends is ignored. Never raises: bad text is a verdict."""
    return _check_episode(_sentences(text), _FIRST_EPISODE)[0]


def check_long_story(text: str) -> list[StoryVerdict]:
    """Check a long story: one verdict per episode, in order, and at least one verdict even for an empty text.

    An episode starts at every sentence that opens a later episode; where an opening is missing or spoilt, after six
    sentences. The hero and friend of the first valid episode must be those of all that follow.
    A text that stops within an episode gets "order" for that episode.
    """
    verdicts: list[StoryVerdict] = []
    characters: dict[str, str] = {}
    for number, sentences in enumerate(_split_episodes(_sentences(text)), start=1):
        verdict, mentions = _check_episode(sentences, _FIRST_EPISODE if number == 1 else _NEXT_EPISODE)
        for role in ("hero", "friend"):
            if not verdict.valid:
                break
            found = mentions[role][0].word
            expected = characters.setdefault(role, found)
            if found != expected:
                detail = f"Episode {number} has the {role} {found}, but the story began with {expected}."
                verdict = _broken(role, detail)
        verdicts.append(verdict)
    return verdicts


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text.strip())


def _split_episodes(sentences: list[str]) -> list[list[str]]:
    episodes: list[list[str]] = [[]]
    for sentence in sentences:
        opens = _matches(sentence, _NEXT_OPENING) is not None
        if episodes[-1] and (opens or len(episodes[-1]) == _LENGTH):
            episodes.append([])
        episodes[-1].append(sentence)
    return episodes


def _matches(sentence: str, forms: tuple[re.Pattern[str], ...]) -> dict[str, str] | None:
    for form in forms:
        match = form.fullmatch(sentence)
        if match:
            return match.groupdict()
    return None


def _check_episode(
    sentences: list[str], arc: tuple[tuple[re.Pattern[str], ...], ...]
) -> tuple[StoryVerdict, dict[str, list[_Mention]]]:
    """Return the verdict, and what every part of the story was called where (empty when the form is wrong)."""
    found = [_matches(sentence, forms) for sentence, forms in zip(sentences, arc, strict=False)]
    if len(sentences) != _LENGTH or None in found:
        return _form_verdict(sentences, arc), {}
    mentions: dict[str, list[_Mention]] = {}
    for number, parts in enumerate(found, start=1):
        for part, word in (parts or {}).items():
            mentions.setdefault(part, []).append(_Mention(number, word))
    return _check_bindings(mentions), mentions


def _form_verdict(sentences: list[str], arc: tuple[tuple[re.Pattern[str], ...], ...]) -> StoryVerdict:
    """Say what is wrong with an episode that is not six sentences of the right forms."""
    for number, sentence in enumerate(sentences, start=1):
        if _matches(sentence, _EVERY_FORM) is None:
            return _broken("grammar", f"Sentence {number} has no known form: {sentence!r}.")
    for number, (sentence, forms, role) in enumerate(zip(sentences, arc, _ROLES, strict=False), start=1):
        if _matches(sentence, forms) is None:
            return _broken("order", f"Sentence {number} should be the {role}, but it is {sentence!r}.")
    return _broken("order", f"The story should have {_LENGTH} sentences, but it has {len(sentences)}.")


def _check_bindings(mentions: dict[str, list[_Mention]]) -> StoryVerdict:
    hero, friend = mentions["hero"][0].word, mentions["friend"][0].word
    return (
        _check_same("hero", mentions)
        or _check_same("friend", mentions)
        or (_broken("friend", f"The friend should not be the hero, but both are {hero}.") if hero == friend else None)
        or _check_pronouns(hero, mentions)
        or _check_same("object", mentions)
        or _check_same("color", mentions)
        or _check_same("place", mentions)
        or _check_pastime(mentions)
        or _check_cause(mentions)
        or _check_feelings(mentions)
        or _VALID
    )


def _check_same(part: str, mentions: dict[str, list[_Mention]]) -> StoryVerdict | None:
    first, *others = mentions[part]
    for other in others:
        if other.word != first.word:
            where = f"sentence {first.sentence} has {first.word!r}, sentence {other.sentence} has {other.word!r}"
            return _broken(part, f"The {part} should stay the same, but {where}.")
    return None


def _check_pronouns(hero: str, mentions: dict[str, list[_Mention]]) -> StoryVerdict | None:
    for part, pronoun_of in (("subject", _SUBJECT_OF), ("owner", _OWNER_OF)):
        for mention in mentions.get(part, []):
            if mention.word != pronoun_of[hero]:
                expected = f"{pronoun_of[hero]!r} for {hero}, but found {mention.word!r}"
                return _broken("pronoun", f"Sentence {mention.sentence} should have {expected}.")
    return None


def _check_pastime(mentions: dict[str, list[_Mention]]) -> StoryVerdict | None:
    place, pastime = mentions["place"][0].word, mentions["pastime"][0]
    if pastime.word == _PASTIME_AT[place]:
        return None
    expected = f"{_PASTIME_AT[place]!r} at the {place}, but found {pastime.word!r}"
    return _broken("pastime", f"Sentence {pastime.sentence} should have {expected}.")


def _check_cause(mentions: dict[str, list[_Mention]]) -> StoryVerdict | None:
    event, remedy = mentions["event"][0].word, mentions["remedy"][0]
    if remedy.word == _REMEDY_OF[event]:
        return None
    expected = f"{_REMEDY_OF[event]!r} because the object {event}, but found {remedy.word!r}"
    return _broken("cause", f"Sentence {remedy.sentence} should have {expected}.")


def _check_feelings(mentions: dict[str, list[_Mention]]) -> StoryVerdict | None:
    for mention in mentions.get("feeling", []):
        if mention.word not in _FEELINGS_AT[mention.sentence]:
            wanted = "sad" if mention.sentence == 4 else "glad"
            return _broken("feeling", f"Sentence {mention.sentence} needs a {wanted} word, but found {mention.word!r}.")
    return None


def _broken(key: str, detail: str) -> StoryVerdict:
    return StoryVerdict(valid=False, broken=key, detail=detail)

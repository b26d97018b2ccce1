"""Word lists of the built-in story corpus: the only thing the generator and the checker share.

Every single-word entry is a common lower-case word (names are capitalised) that starts with a consonant sound wherever
"a" may come before it. The lists are pairwise disjoint and their words appear in no phrase, so a word in a story tells
which list it came from. Most of the vocabulary sits in phrases that are bound to a place or a trouble: rich text that
costs a model little, because a phrase is one choice. Adding, removing or moving an entry changes the corpus; the golden
digest in tests/test_stories.py notices.
"""

from typing import NamedTuple


class Place(NamedTuple):
    """Where a story happens, and the only thing that heroes do there."""

    name: str  # follows "went to the", "visited the" and "left the"
    pastime: str  # follows "He" or "She", comes before "and held his <object>"


class Cause(NamedTuple):
    """One kind of trouble: what happens to the object, and the only deed that mends it."""

    event: str  # follows "the <object>"
    remedy: str  # follows "<friend>"; "it" is the object


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# No name here is also a common word ("Rose", "Will", "Mark") or used for both girls and boys ("Sam", "Alex").
GIRLS = _words("Anna Mia Lucy Emma Sara Nora Clara Alice Molly Jane Zoe Ruth")
BOYS = _words("Tom Ben Tim Leo Peter Paul David Oscar Felix Henry Simon Hugo")

# Small rigid things: every event can happen to each of them.
OBJECTS = _words(
    "kite doll drum basket lantern trumpet flute bell cup bowl puppet robot mask clock mirror "
    "spoon bucket vase crown box truck rocket sword shield whistle compass camera guitar helmet kettle"
)
COLORS = _words("red blue green yellow purple silver")

PLACES = (
    Place("park", "fed hungry ducks"),
    Place("beach", "collected pretty shells"),
    Place("garden", "watered the roses"),
    Place("farm", "milked brown cows"),
    Place("lake", "skipped flat stones"),
    Place("market", "bought fresh bread"),
    Place("harbor", "watched big ships"),
    Place("bridge", "counted passing boats"),
    Place("castle", "dreamed of brave knights"),
    Place("mill", "ground some wheat"),
    Place("river", "caught a fish"),
    Place("orchard", "picked ripe apples"),
    Place("barn", "brushed gentle ponies"),
    Place("fountain", "tossed lucky coins"),
    Place("stable", "stroked a horse"),
    Place("field", "chased white rabbits"),
    Place("fair", "rode the noisy carousel"),
    Place("camp", "sang songs"),
    Place("playground", "played hopscotch"),
    Place("meadow", "gathered wild flowers"),
    Place("square", "met friendly neighbors"),
    Place("vineyard", "tasted sweet grapes"),
    Place("pier", "greeted busy sailors"),
    Place("palace", "bowed to the king"),
    Place("station", "waved at fast trains"),
    Place("zoo", "laughed at silly monkeys"),
    Place("museum", "studied ancient bones"),
    Place("library", "read funny books"),
    Place("theater", "clapped for graceful dancers"),
    Place("bakery", "smelled cakes"),
)
WEATHER = _words("sunny warm breezy cloudy misty chilly")

SAD = _words("sad worried upset")
GLAD = _words("happy glad delighted")

CAUSES = (
    Cause("got stuck in a tree", "shook the branches"),
    Cause("fell into mud", "washed it with soap"),
    Cause("floated across a pond", "rowed after it"),
    Cause("dropped down a well", "pulled it up by rope"),
    Cause("got soaking wet", "dried it with a towel"),
    Cause("sank into the sand", "dug with a shovel"),
    Cause("rolled under the fence", "opened the gate"),
    Cause("was stolen by a crow", "traded crumbs for it"),
    Cause("broke into two pieces", "joined the parts with glue"),
    Cause("landed on the roof", "fetched a ladder"),
    Cause("vanished inside a dark cave", "found it by torch light"),
    Cause("disappeared in tall grass", "let a puppy sniff for it"),
    Cause("slid beneath a giant rock", "moved the heavy boulder"),
    Cause("was buried under leaves", "raked the pile away"),
    Cause("got scratched by a cat", "covered the marks with paint"),
    Cause("was grabbed by a goat", "swapped some hay for it"),
    Cause("got tangled in string", "undid every knot"),
    Cause("slipped into a deep crack", "hooked it with bent wire"),
    Cause("became dusty", "wiped it with a cloth"),
    Cause("flew over a wall", "jumped across to get it"),
    Cause("was snatched by a fox", "scared the thief away"),
    Cause("got trapped in a net", "cut the threads with scissors"),
    Cause("was smeared with jam", "cleaned it using a sponge"),
    Cause("grew dull", "polished it with wax"),
    Cause("tumbled down a hill", "ran to catch it"),
    Cause("hung from a thorny bush", "wore gloves to free it"),
    Cause("was pinned under a log", "sawed the wood apart"),
    Cause("was hidden by a squirrel", "brought nuts for it"),
    Cause("was dragged off by mice", "gave cheese for it"),
    Cause("got mixed with old junk", "sorted through the trash"),
    Cause("was locked in a chest", "turned the rusty key"),
    Cause("was forgotten on a bus", "phoned the driver"),
    Cause("split along the edge", "wrapped it in tape"),
    Cause("drifted below a dock", "swam out to save it"),
    Cause("was claimed by a pirate", "won it in a race"),
    Cause("was draped in cobwebs", "swept it with a feather"),
    Cause("caught fire", "poured water over it"),
    Cause("was chewed by a dog", "threw a biscuit"),
    Cause("was splashed with ink", "scrubbed out the stain"),
    Cause("was clutched by a baby", "hummed a lullaby"),
)

"""Word lists of the built-in story corpus: the only thing the generator and the checker share.

Every entry is a common lower-case word (names are capitalised) that starts with a consonant sound wherever "a" may
come before it. The lists are pairwise disjoint, so a word in a story tells which list it came from. Adding, removing or
moving an entry changes the corpus; the golden digest in tests/test_stories.py notices.
"""

from typing import NamedTuple


class Cause(NamedTuple):
    """One kind of trouble: what happens to the object, and the only deed that mends it."""

    event: str  # follows "the <object>"
    remedy: str  # follows "<friend>"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# No name here is also a common word ("Rose", "Will", "Mark") or used for both girls and boys ("Sam", "Alex").
GIRLS = _words(
    "Anna Mia Lucy Emma Sara Ella Julia Nora Clara Alice Eva Maria Laura Emily Sophie "
    "Molly Katie Jane Helen Zoe Amy Maya Leah Nina Olivia Hannah Lisa Ruth Susan Diana"
)
BOYS = _words(
    "Tom Ben Tim Leo Peter Paul David Adam Oscar Felix Henry Simon Daniel Lucas Oliver "
    "Noah Hugo Ryan Kevin Martin Jacob Ethan Nathan Omar Victor Eric Liam Toby Alan George"
)

# Small rigid things: each of them can roll, sink, break, get wet and get stuck.
OBJECTS = _words(
    "kite ball doll drum basket lantern trumpet flute bell cup bowl puppet robot mask clock mirror "
    "spoon bucket pot vase jar crown box train truck plane rocket sword shield whistle compass camera "
    "guitar violin lamp helmet bottle plate statue badge toy cart necklace kettle"
)
OBJECT_ADJECTIVES = _words(
    "red blue green yellow brown white black purple pink golden silver big little small tiny new pretty "
    "shiny round fine strong wooden plain special favorite smooth striped spotted painted metal glass plastic "
    "heavy light simple curious magic royal useful precious rare bright colorful handsome polished perfect "
    "lucky fancy huge neat"
)

# Open places that go with "at the" and "to the".
PLACES = _words(
    "park beach garden farm lake market harbor bridge castle mill river orchard barn fountain cottage "
    "stable field fair camp playground meadow square vineyard lighthouse pier temple palace station"
)
PLACE_ADJECTIVES = _words(
    "quiet old large lovely nearby famous busy peaceful hidden distant pleasant beautiful secret ancient "
    "crowded public local sleepy grand charming wild narrow wide noisy forgotten familiar friendly strange "
    "modern popular sandy shady empty northern southern western"
)
WEATHER = _words("sunny warm cool breezy cloudy mild windy chilly dry misty calm gray clear cold")
DAY_PARTS = _words("morning afternoon evening day")

SAD = _words("sad worried upset gloomy cross unhappy lonely tearful troubled grumpy miserable helpless")
GLAD = _words("happy glad cheerful merry joyful proud thankful delighted content pleased grateful excited")
ADVERBS = _words(
    "quickly gently carefully bravely calmly kindly gladly slowly cleverly quietly neatly eagerly patiently "
    "politely boldly wisely"
)

CAUSES = (
    Cause("got stuck in a tree", "climbed the branches to reach it"),
    Cause("fell into the mud", "washed it clean with soap"),
    Cause("floated away across the pond", "rowed after it with oars"),
    Cause("dropped down the well", "pulled it up with rope"),
    Cause("got wet in the rain", "dried it by the fire"),
    Cause("sank into the sand", "dug it out with a shovel"),
    Cause("rolled under the fence", "opened the gate to fetch it"),
    Cause("was stolen by a crow", "traded some bread crumbs for it"),
    Cause("broke into two pieces", "joined the parts with glue"),
    Cause("landed on the roof", "knocked it down with a broom"),
    Cause("vanished inside a dark cave", "lit a candle and found it"),
    Cause("disappeared in the tall grass", "let a puppy sniff it out"),
    Cause("slid beneath a giant rock", "moved the boulder off it"),
    Cause("was buried under leaves", "raked the whole pile away"),
    Cause("got scratched by a cat", "covered the marks with paint"),
    Cause("was grabbed by a goat", "swapped it for fresh hay"),
    Cause("got tangled in thick string", "undid the knots one by one"),
    Cause("slipped into a deep crack", "hooked it with bent wire"),
)

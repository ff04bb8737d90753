"""The demo's made-up film reviews, composed from banks of phrases."""

import math
import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ["negative", "positive"]
REVIEWS = {"train": 2000, "test": 600}

_SEEDS = {"train": 1, "test": 2}
_MEDIAN_WORDS = 168
_LOG_SPREAD = 0.75
_MAX_WORDS = 1200
_SHORT_REVIEWS = 0.02
_FILLERS = 0.35
_MAX_CONCESSIONS = 0.35

_ADJECTIVES = {
    "positive": """gripping/moving/delightful/clever/superb/charming/thoughtful/graceful/inspired/funny/
        tender/vivid/confident/elegant/fresh/riveting/heartfelt/polished/stunning/witty/warm/absorbing/
        sincere/bold/radiant/believable/touching/masterful/playful/compelling""",
    "negative": """dull/clumsy/lifeless/predictable/tedious/shallow/messy/wooden/stale/awful/bland/confusing/
        lazy/hollow/grating/flat/forced/dreary/cheap/pointless/muddled/annoying/limp/ugly/ridiculous/cold/
        sloppy/tiresome/weak/unbearable""",
}
_QUALITIES = {
    "positive": "skill/care/imagination/wit/real feeling/great charm/confidence/a light touch/style",
    "negative": "no care/no imagination/clichés/a heavy hand/little thought/no feeling/bad jokes/no style",
}
_REACTIONS = {
    "positive": """smiled/laughed out loud/sat spellbound/cheered/leaned forward/forgot the time/
        was moved to tears/held my breath""",
    "negative": """yawned/checked my watch/rolled my eyes/nearly walked out/lost interest/groaned/dozed off/
        squirmed in my seat""",
}
_VERDICTS = {
    "positive": """I loved it/I would gladly see it again/it is worth every penny/go and see it/
        highly recommended/it deserves a wide audience/a real treat/
        one of the best things I have seen this year/I left the cinema with a grin/it won me over/
        I cannot praise it enough/a small triumph""",
    "negative": """I hated it/I would not sit through it again/it is a waste of money/stay at home instead/
        best avoided/it deserves to be forgotten/a real chore/one of the worst things I have seen this year/
        I left the cinema in a sulk/it lost me early/I want my evening back/a complete failure""",
}
_GRAMMAR = {
    "one": """the plot/the acting/the score/the pacing/the dialogue/the camera work/the ending/the opening/
        the editing/the lighting/the lead actor/the supporting cast/the script/the humour/the romance/
        the sound design/the story/the direction/the middle act/the final scene/the villain/the atmosphere""",
    "many": """the performances/the songs/the costumes/the jokes/the characters/the action scenes/the sets/
        the quiet moments/the effects/the flashbacks/the conversations/the twists""",
    "thing": "{one}/{one}/{many}",
    "thing_was": "{one} was/{one} was/{many} were/{one} felt/{many} seemed",
    "very": "very/truly/quite/so/really/simply/rather/consistently/remarkably",
    "maker": "the director/the writer/the studio/everyone involved/the team behind it/the producer",
    "opinion": """{thing_was} {pro}/{thing_was} {very} {pro}/{thing_was} {pro} and {pro}/
        I found {thing} {pro} and {very} {pro}/{thing_was} {pro}, {pro} and altogether {pro}/
        to me {thing_was} {pro} from start to finish/I {reaction} because {thing_was} so {pro}/
        {thing_was} never {con}, it was {pro}/nobody could call {thing} {con}, as {thing_was} {pro}/
        {maker} made it with {quality}, and {thing_was} {pro}/I {reaction} more than once/
        there is a {pro} quality to {thing}, and {thing_was} just as {pro}/
        {thing_was} {con}, but {thing_was} {pro} and {thing_was} {pro}/
        {thing_was} a little {con}, yet on the whole it is a {pro}, {pro} film/
        my {friend} said {thing_was} {pro}, and I thought {thing_was} {pro} too/
        it is a {pro} film with {pro} ideas/{maker} made something {very} {pro}/
        even {thing_was} {pro}, and that is not often so/it was {pro} in places and {pro} in others""",
    "concession": """granted, {thing_was} {con}/I admit that {thing_was} {con}/
        some will say {thing_was} {con}/{thing_was} {con} for a minute or two/
        to be fair, {thing_was} {con} now and then/only {thing_was} {con}, and that hardly matters""",
    "verdict": "{closing}/in short, {closing}/all in all, {closing}/{thing_was} {pro}: {closing}",
    "friend": "sister/brother/neighbour/flatmate/cousin/uncle/colleague/daughter/son/grandmother",
    "day": "Monday/Tuesday/Wednesday/Thursday/Friday/Saturday/Sunday",
    "place": """a fishing village/a mining town/Lisbon/a mountain hotel/the suburbs/a research station/
        Glasgow/an old theatre/a border town/a boarding school/a desert outpost/the docks""",
    "hero": """a retired detective/a young nurse/a travelling musician/a young priest/a widowed teacher/
        a bank clerk/a boxer/a lighthouse keeper/a circus owner/a failed painter/a bus driver/an orphan""",
    "quest": """looking for a lost letter/hiding from the police/trying to save a family shop/
        chasing an old rival/planning a robbery/waiting for a train that is late/returning after twenty years/
        guarding a secret/writing a book about the war/searching for a missing child""",
    "number": "ninety/one hundred/one hundred and ten/one hundred and twenty/eighty/one hundred and forty",
    "filler": """I went with my {friend} on a {day} evening/
        my {friend} picked the film and I bought the tickets/the story follows {hero} {quest} in {place}/
        we meet {hero} {quest}/it runs for about {number} minutes/
        most of it takes place in {place}, where {hero} arrives on a {day}/
        there were perhaps {number} people there/before the film there were adverts for a car and a telephone/
        it was raining, so we took the bus/halfway through, {hero} turns up in {place}/
        I had read the book on a train some years ago/
        my {friend} had to explain to me what happened to {hero}/the version I saw had subtitles/
        we sat in the third row/later the action moves to {place} and then to {place}/
        it is set in the year before the war/I have seen other films by the same director/
        afterwards my {friend} and I had noodles near the station/
        by then {hero} is {quest}, and {hero} is watching/I watched it at home on a {day} with my {friend}/
        as you may know, it was filmed in {place}/the cinema near {place} shows it until {day}/
        on the way home we talked about {hero}/the first scene shows {hero} {quest}/
        a {friend} of mine has a small part/between them stands {hero}, who once lived in {place}/
        the second half is told by {hero}""",
}


def _alternatives(bank: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in bank.split("/")]


def _phrases(label: str) -> dict[str, list[str]]:
    """The grammar for reviews of one label: `pro` words agree with it, `con` words do not."""
    opposite = LABELS[1 - LABELS.index(label)]
    own = {
        "pro": _ADJECTIVES[label],
        "con": _ADJECTIVES[opposite],
        "quality": _QUALITIES[label],
        "reaction": _REACTIONS[label],
        "closing": _VERDICTS[label],
    }
    return {symbol: _alternatives(bank) for symbol, bank in (_GRAMMAR | own).items()}


def _sentence(rng: random.Random, phrases: dict[str, list[str]], symbol: str) -> str:
    """Expands a symbol of the grammar until only words are left."""
    text = rng.choice(phrases[symbol])
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(phrases[slot[1]]), text)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:] + rng.choice("......!")


def _review(rng: random.Random, phrases: dict[str, list[str]]) -> str:
    """Composes one review, of a length drawn from a log-normal distribution."""
    sentences = [_sentence(rng, phrases, "opinion")]
    if rng.random() < _SHORT_REVIEWS:
        return sentences[0]
    words = min(rng.lognormvariate(math.log(_MEDIAN_WORDS), _LOG_SPREAD), _MAX_WORDS)
    concessions = rng.uniform(0, _MAX_CONCESSIONS)
    written = len(sentences[0].split())
    while written < words:
        kinds = ["filler", "concession", "opinion"]
        [kind] = rng.choices(kinds, [_FILLERS, (1 - _FILLERS) * concessions, (1 - _FILLERS) * (1 - concessions)])
        sentences.append(_sentence(rng, phrases, kind))
        written += len(sentences[-1].split())
    return " ".join([*sentences, _sentence(rng, phrases, "verdict")])


def make_reviews(split: str) -> "Dataset":
    """The reviews of a split: `text` and `label`, a `ClassLabel`."""
    rng = random.Random(_SEEDS[split])
    phrases = [_phrases(label) for label in LABELS]
    labels = [row % 2 for row in range(REVIEWS[split])]
    rng.shuffle(labels)
    texts = [_review(rng, phrases[label]) for label in labels]
    from datasets import ClassLabel, Dataset, Features, Value  # not needed to train on other data

    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)

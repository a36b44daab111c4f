"""Sentences that puppets say: everyday English from a small grammar, in disjoint splits.

The hash of its text assigns a sentence to a split, so the splits are disjoint for every seed: about 80 % of the
sentences are train, 10 % dev and 10 % test.
"""

import hashlib
import re

import numpy as np

from avatar.errors import UserError

SPLITS = ("train", "dev", "test")

PATTERNS = (
    "{who} {did} {the} {thing} {where}",
    "{who} {did} {the} {thing}, {join} {who} {went} {where}",
    "{when}, {who} {did} {the} {thing} {where}",
    "{opening}, {the} {thing} {where} is {quality}",
    "do you {want} {the} {thing} {where}?",
    "{opening}, could you {bring} {the} {thing} {when2}?",
    "i {think} {the} {person} {went} {where} {when2}",
    "{when}, {the} {person} {went} {where}, {join} {who} {did} {the} {thing}",
    "{opening}, {who} {will} {bring} {the} {thing} {when2}",
    "{opening}, {who} never {did} {the} {thing} {where}",
    "{number} {people} {went} {where}, {join} {the} {thing} was {quality}",
    "why is {the} {thing} so {quality} {when2}?",
    "{who} {will} {bring} {number} {people} {where}",
)
WORDS = {
    "who": "I|we|they|my brother|our mother|Peter|Mary|Bob|Anna|Alice|Jack|Susan|Oscar|Lucy|an old friend|the baker|"
    "the doctor|her father|somebody|everybody|Mr. Brown|Aunt Laura|your boss|the whole family|Ruby|Oliver|"
    "nurse Helen|her sister|a young woman|that poor man",
    "did": "opened|found|washed|painted|carried|dropped|bought|moved|fixed|loved|made|borrowed|brought|broke|sold|"
    "hid|built|watched|remembered|pushed|packed|used|chose|took|cooked|pulled|drew|cleaned|showed us|left|stole|"
    "forgot|touched|lost",
    "went": "walked|ran|moved|drove|waited|sat|worked|played|slept|stopped|sang|travelled|jumped|fell asleep|met|"
    "lived|hopped",
    "will": "will|would|may|might|must|should|can|could|won't|wouldn't",
    "bring": "bring|find|open|move|buy|fix|hold|paint|carry|make|empty|borrow|wrap|keep|pick up|put away|check|"
    "show us|remember",
    "want": "want|remember|like|see|need|have|know|believe in|prefer|miss|hear about|worry about",
    "think": "think|hope|believe|guess|know|heard|suppose|remember|imagine|am sure",
    "the": "the|a|my|your|his|her|our|this|that|the other|every|the same|the best|one more|the last|the new|the old|"
    "the big|the small|the blue|the empty|the broken|a purple|a warm|a beautiful|the famous|some other",
    "thing": "boat|map|book|apple|house|bottle|window|picture|piano|bag|car|soup|lamp|coat|puppy|phone|garden|box|"
    "umbrella|mirror|shoe|movie|paper|bread|table|clock|camera|ball|violin|hammer|bicycle|chair|newspaper|"
    "cup of tea|ring|guitar|computer|carpet|flower|letter|cake|kettle|bell|river boat|golden key|ladder|wheel|"
    "orange|suitcase|fish|egg",
    "person": "teacher|farmer|singer|neighbour|captain|painter|boy|girl|postman|waiter|lawyer|poet|king|queen|"
    "plumber|uncle|student|pilot|guest|nurse|mayor",
    "people": "people|boys|girls|birds|monkeys|farmers|bears|students|rabbits|apples|puppies|children|sisters|women|"
    "men|horses|soldiers|sailors|dancers",
    "where": "at home|in the park|by the river|near the bridge|at the bank|in the kitchen|on the boat|"
    "under the table|at school|behind the house|in the mountains|on the beach|across the street|in Paris|"
    "by the old mill|at the market|outside|upstairs|in my room|on the way home|over the hill|before the storm|"
    "above the shop|in the city|at the lake|on a ship|to the south|down the street|into the house|on the grass|"
    "for an hour",
    "when": "today|yesterday|last summer|this morning|on Monday|a week ago|before lunch|in May|every evening|"
    "at half past five|after the movie|at midnight|once in a while|in the end|long ago|all day long|for years|"
    "during the night|on Sunday|later|at last|each year",
    "when2": "today|tomorrow|tonight|this evening|before supper|at noon|on Friday|next week|again|on Thursday|"
    "right away|every morning|after work|at about four|at the weekend|from now on",
    "join": "and|but|because|so|while|and then|until|before|although|maybe because",
    "opening": "well|oh|you know|please|of course|maybe|honestly|my goodness|look|wow|by the way|as far as I know|"
    "no|yes|for example|between you and me|to be fair|above all|hey|I am afraid|believe me",
    "number": "two|three|four|five|seven|eight|ten|eleven|twelve|fifty|a hundred|many|a couple of|about forty|all|"
    "some|nine",
    "quality": "warm|cold|heavy|beautiful|empty|broken|expensive|cheap|quiet|loud|new|old|wonderful|awful|too small|"
    "very big|brown|yellow|perfect|simple|important|funny|impossible|lovely|bumpy|soft|boring|amazing|famous|"
    "rather odd|dirty|shiny|green|fine|clear|short|strange|heavy enough",
}
_CHOICES = {name: words.split("|") for name, words in WORDS.items()}


def split_of(sentence: str) -> str:
    """The split that a sentence belongs to."""
    tenth = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:4]) % 10
    return {0: "dev", 1: "test"}.get(tenth, "train")


def draw(rng: np.random.Generator, split: str) -> str:
    """Draw sentences from the grammar until one belongs to the split. Raises UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"got the split {split!r}; expected one of {', '.join(SPLITS)}: choose another")
    while True:
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        sentence = re.sub(r"\{(\w+?)\}", lambda found: _pick(rng, found[1]), pattern)
        sentence = sentence[0].upper() + sentence[1:] + ("" if sentence[-1] == "?" else ".")
        if split_of(sentence) == split:
            return sentence


def _pick(rng: np.random.Generator, name: str) -> str:
    words = _CHOICES[name]
    return words[rng.integers(len(words))]

"""Which answers count as right, by three metrics, and what a model that never looks at the picture would score."""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBERS = {"none": 0} | {word: number for number, word in enumerate(UNITS)}
NUMBERS |= {word: 10 * number for number, word in enumerate(TENS, start=2)}
NUMBERS |= {f"{ten} {unit}": NUMBERS[ten] + NUMBERS[unit] for ten in TENS for unit in UNITS[1:10]}

# What a typeset sign is on a keyboard, where NFKC does not tell.
TYPESET = {"'": "\u2018\u2019\u02bc", "-": "\u2010\u2012\u2013\u2212", "#": "\u266f", "b": "\u266d"}
TYPESET |= {"/": "\u2044\u2215", ".": "\u066b", ",": "\u066c", "%": "\u066a"}  # slashes; Arabic 3٫5, 1٬000, 50٪
KEYBOARD = str.maketrans({sign: key for key, signs in TYPESET.items() for sign in signs})

POWER = re.compile(r"(?<=\d)(?=[⁺⁻]?[⁰¹²³⁴-⁹]+(?![⁺⁻⁰¹²³⁴-⁹]))")  # within 10³, but not within SO4²⁻
MIXED = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")  # within 1½
THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])[1-9]\d{0,2}(?:(?:[,']\d{3})+|(?:,\d\d)+,\d{3})(?![,']?\d)")
NUMBER = re.compile(r"(?<![\w.])(?:(?<![\w+])\+)?(-?)(0|[1-9]\d*|(?=\.))(?:\.(\d+))?(?![\w.])")  # but not 007 or 1.2.3
SIGN = re.compile(
    r"""(?=[^\w\s]|_)(?:(?P<kept>  # any character that is no letter, digit or space; kept are these:
        [%‰]
      | (?<![^\W\d_]) \. (?=\d)              # 3.5, .5, but not No.5
      | (?<![\w-]) - (?=[$€£¥]?\.?\d)        # -5, -$5
      | (?<=[^\W_]) - (?![\w-])              # B-, Cl-
      | (?<=[^\W\d_]) \#                     # C#, F#m
      | (?<=\d) [/:*] (?=\d)                 # 3/4, 12:30
      | (?<=(?<![\w*])\w) \* (?![\w*])       # A*, but not **yes**
    )|.)""",
    re.VERBOSE,
)
WORD = re.compile(rf"(?<!\S)(?:{'|'.join(sorted(NUMBERS, key=len, reverse=True))})(?!\S)")
ARTICLE = re.compile(r"(?<!\S)(?:the|an|a(?!(?: (?:[^\W\d_]|[\d.]+))+$)) (?=\S)")  # but not the A of "A, C" or "A-4"


@functools.lru_cache(maxsize=1 << 16)
def normalize(answer: str) -> str:
    """The form in which two answers are compared; normalizing it again changes nothing.

    The steps are those of the VQA evaluation (Antol et al. 2015, https://visualqa.org/evaluation.html), for any script:
    letters in one case and one Unicode form (NFKC), digits as 0 to 9, apostrophes, full stops and articles dropped,
    other punctuation turned into spaces, number words turned into digits, spaces made single. Beyond it, a sign stays
    where it says something (B-, Cl-, C#, -5, 3/4), and a number has one form (1,000.0 is 1000). docs/scoring.md shows
    each rule by examples.

    An answer of nothing but punctuation stays as it is, stripped and case-folded.
    """
    folded = text = fold(MIXED.sub(" ", POWER.sub("^", answer)))
    while (simpler := simplify(text)) != text:  # almost always once; what a step drops may join what stood around it
        text = simpler
    return text or folded


def simplify(text):
    """One pass of what `normalize` does after folding."""
    text = THOUSANDS.sub(lambda number: re.sub("[,']", "", number[0]), text)
    text = re.sub(r"(?<=\d)'(?=\d)", " ", text)  # 5'10 is not 510
    text = re.sub(r"['`]|\.(?!\d)", "", text)
    text = NUMBER.sub(plain_number, SIGN.sub(kept_or_space, text))
    text = re.sub(r"(?<=\d) (?=[%‰])", "", " ".join(text.split()))
    text = WORD.sub(lambda word: str(NUMBERS[word[0]]), text)
    return fold(ARTICLE.sub("", text))


def fold(text):
    """Case-folded NFKC with the signs of a keyboard and the digits 0 to 9, stripped."""
    if text.isascii():
        return text.lower().strip()  # the same, sooner
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", text).translate(KEYBOARD).strip()
    return re.sub(r"\d", lambda digit: str(int(digit[0])), text)


def kept_or_space(sign):
    """What takes the place of a character that is no letter, digit or space: itself, or a space for punctuation."""
    return sign[0] if sign["kept"] or unicodedata.category(sign[0])[0] != "P" else " "


def plain_number(number):
    """A number without plus, without zeros behind its decimals, and with one before its point; zero has no minus."""
    minus, whole, decimals = number[1], number[2] or "0", (number[3] or "").rstrip("0")
    plain = f"{whole}.{decimals}" if decimals else whole
    return plain if plain == "0" else minus + plain


def is_correct(prediction: str, answers: str | tuple[str, ...]) -> bool:
    """Whether a prediction is one of the right answers once both are normalized.

    Args:
        answers: the right answer, or a tuple of all that are right.
    """
    return normalize(prediction) in map(normalize, several(answers))


def is_exact(prediction: str, answers: str | tuple[str, ...]) -> bool:
    """Whether a prediction is one of the right answers character for character, stripped."""
    return prediction.strip() in [answer.strip() for answer in several(answers)]


def anls(prediction: str, answers: str | tuple[str, ...]) -> float:
    """How much of the nearest right answer was hit, 0.0 to 1.0: DocVQA's score, whose mean is called ANLS.

    It is 1 less the Levenshtein distance divided by the longer text's length, and 0.0 where less than half is hit
    (Biten et al. 2019, https://arxiv.org/abs/1907.00490). Case and the number of spaces don't count.
    """
    texts = [" ".join(fold(text).split()) for text in (prediction, *several(answers))]
    return max(Levenshtein.normalized_similarity(texts[0], text, score_cutoff=0.5) for text in texts[1:])


def several(answers):
    """A tuple of answers, also where one is given as a text, which would come apart into letters."""
    return (answers,) if isinstance(answers, str) else answers


class Metric(NamedTuple):
    """What an answer is given for: `score(prediction, answers)`, whose mean over many has a name and a meaning."""

    name: str
    meaning: str
    score: Callable


METRICS = {  # by the word that predictions.jsonl has for each; the first is the one that verdicts rest on
    "correct": Metric(
        "accuracy",
        "the same answer once case, articles, punctuation and number words are set aside",
        is_correct,
    ),
    "exact": Metric(
        "exact match",
        "the same answer, character for character",
        is_exact,
    ),
    "anls": Metric(
        "ANLS",
        "for longer answers, the share of the text that is right, by edit distance; less than half is 0",
        anls,
    ),
}


def mean(marks) -> float | None:
    """The mean of what answers were given: of True and False, the fraction that is right.

    Args:
        marks: True or False, or 0.0 to 1.0, for each answer; None for what was not asked, which does not count.
    Returns:
        None where nothing counts.
    """
    marks = [mark for mark in marks if mark is not None]
    return sum(marks) / len(marks) if marks else None


def most_frequent(answers):
    """The answer that is given most often, in its most frequent spelling; of several, the first in the alphabet."""
    spellings = defaultdict(Counter)
    for answer in answers:
        spellings[normalize(answer)][answer] += 1
    counts = {key: spelling.total() for key, spelling in spellings.items()}
    winner = min(counts, key=lambda key: (-counts[key], key))
    return min(spellings[winner], key=lambda spelling: (-spellings[winner][spelling], spelling))


def most_frequent_answers(examples) -> dict[str, str]:
    """The most frequent answer to each question text, by normalized question."""
    answers = defaultdict(list)
    for example in examples:
        answers[normalize(example.question)].append(example.answer)
    return {question: most_frequent(given) for question, given in answers.items()}


def baseline_accuracy(train_examples, valid_examples) -> float:
    """What always giving the training set's most frequent answer to a question scores on the validation set.

    A question that training never asks gets the most frequent answer of all. A model has learned to look at pictures
    only as far as it scores more than this.
    """
    answers = most_frequent_answers(train_examples)
    fallback = most_frequent(example.answer for example in train_examples)
    return mean(
        is_correct(answers.get(normalize(example.question), fallback), example.answers) for example in valid_examples
    )

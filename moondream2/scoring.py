"""Which answers count as right, and what a model that never looks at the picture would score."""

import functools
import re
import unicodedata
from collections import Counter, defaultdict

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


@functools.lru_cache(maxsize=1 << 16)
def normalize(answer: str) -> str:
    """The form in which two answers are compared; normalizing it again changes nothing.

    The steps are those of the VQA evaluation (Antol et al. 2015, https://visualqa.org/evaluation.html), for any script:
    letters in one case and one Unicode form (NFKC), apostrophes dropped ("don't" is "dont"), commas between thousands
    dropped, full stops dropped except before a digit, other punctuation turned into spaces except "%" and the minus of
    a number, the words zero to ten and "none" turned into digits, articles dropped, spaces made single.

    An answer that consists of articles keeps them: "A." may be a choice. One of nothing but punctuation stays as it is,
    stripped and case-folded.
    """
    folded = text = fold(answer)
    while (simpler := simplify(text)) != text:  # almost always once; what a step drops may join what stood around it
        text = simpler
    return text or folded


def simplify(text):
    """One pass of what `normalize` does after folding."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", re.sub("['`]", "", text))
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s]|_", punctuation, text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return fold(" ".join([word for word in words if word not in ARTICLES] or words))


def fold(text):
    """Case-folded NFKC with plain apostrophes and minus signs, stripped."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", text).translate({0x2018: "'", 0x2019: "'", 0x2212: "-"}).strip()


def punctuation(match):
    """What takes the place of a character that is no letter, digit or space: itself where it says something."""
    text, at = match.string, match.start()
    character, before, after = text[at], text[max(at - 1, 0) : at], text[at + 1 : at + 2]
    is_minus = character == "-" and after.isdigit() and not before.isalnum()
    says_something = character == "%" or is_minus or (character == "." and after.isdigit())
    return character if says_something or unicodedata.category(character)[0] != "P" else " "


def is_correct(prediction: str, answers: tuple[str, ...]) -> bool:
    """Whether it is one of these answers once all are normalized."""
    return normalize(prediction) in map(normalize, answers)


def accuracy(marks) -> float | None:
    """The fraction of answers that are right, 0.0 to 1.0.

    Args:
        marks: True or False for each answer; None for what was not asked, which does not count.
    Returns:
        None where nothing counts.
    """
    marks = [is_right for is_right in marks if is_right is not None]
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
    return accuracy(
        is_correct(answers.get(normalize(example.question), fallback), example.answers) for example in valid_examples
    )

"""Changes when agreement with ten people's answers does: TextVQA, VizWiz and VQAv2."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from evals.metrics.base import Definition

ENOUGH = 3
"""Of the other nine people's answers that have to agree for a full point."""
LEAST = ENOUGH + 1
"""References with which a full point is possible, as one is left out in turn."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOPS = 32
"""Of them only so many are removed: the reference passes a flag where its library reads a count."""
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOP_OF_WORDS = re.compile(r"(?<!\d)\.(?!\d)")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905  # ninety words in quotes are no easier to compare
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTED for place, char in enumerate(word) if char == "'"
} | {"somebody'd": "somebodyd"}
"""A word that has lost one apostrophe -> the word; the last entry is reversed in the published table, and so here."""


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Share of people who agree with the prediction, 3 others being enough, as the mean over leaving one out.

    The evaluation of TextVQA as LLaVA and lmms-eval run it (and VizWiz): prediction and references are normalised
    alike. Metric: Antol et al. 2015, "VQA".

    Returns:
        0, .3, .6, .9 or 1 for 0, 1, 2, 3 or more of ten references that agree. Of fewer than LEAST references none can
        be worth 1, even if all of them agree: tasks refuse such questions.
    """
    return _leave_one_out(normalise(prediction), [normalise(reference) for reference in references])


def vqa_accuracy_vqav2(prediction: str, references: Sequence[str]) -> float:
    """The same, but words are not taken apart first: "'s" stays with its word (lmms-eval, VQAv2)."""
    texts = [_flat(text) for text in (prediction, *references)]
    predicted, *expected = (_without_articles(without_punctuation(text)) for text in texts)
    return _leave_one_out(predicted, expected)


def vqa_accuracy_official(prediction: str, references: Sequence[str]) -> float:
    """The VQA v2 tool's: references lose their punctuation only, and only where not all of them are equal."""
    expected = list(references)
    if len(set(expected)) > 1:
        expected = [without_punctuation(text) for text in expected]
    return _leave_one_out(_without_articles(without_punctuation(_flat(prediction))), expected)


def vqa_accuracy_vlmevalkit(prediction: str, references: Sequence[str]) -> float:
    """As for VQAv2, but a full stop behind a digit stays, at the end of the text too (VLMEvalKit)."""
    texts = [_flat(text) for text in (prediction, *references)]
    predicted, *expected = (_without_articles(without_punctuation(text, FULL_STOP_OF_WORDS)) for text in texts)
    return _leave_one_out(predicted, expected)


def normalise(text: str) -> str:
    """Lower case, no punctuation, articles gone, small numbers as digits, apostrophes put back."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _without_articles(without_punctuation(_flat(text)))


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str, full_stop: re.Pattern[str] = FULL_STOP) -> str:
    """Punctuation deleted where it stands apart, else a space in its place; apostrophes, colons and signs stay."""
    out = text
    for mark in PUNCTUATION:
        # Asked of the text as it came, not of what the marks before have left.
        is_apart = f"{mark} " in text or f" {mark}" in text or DIGIT_COMMA_DIGIT.search(text) is not None
        out = out.replace(mark, "" if is_apart else " ")
    return full_stop.sub("", out, count=FULL_STOPS)


def _without_articles(text: str) -> str:
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _leave_one_out(predicted: str, expected: Sequence[str]) -> float:
    agreeing = [reference == predicted for reference in expected]
    total = sum(agreeing)
    return sum(min(1.0, (total - agrees) / ENOUGH) for agrees in agreeing) / len(agreeing)


def _scored(score: Callable[[str, Sequence[str]], float], who: str, how: str) -> Definition:
    text = f"VQA accuracy ({who}): {how}; leave-one-out over the references, {ENOUGH} agreeing are enough"
    return Definition(score, text, least=LEAST)


DEFINITIONS = {
    "llava": _scored(vqa_accuracy, "LLaVA, lmms-eval for TextVQA and VizWiz", "both sides normalised, 's apart"),
    "lmms_eval_vqav2": _scored(vqa_accuracy_vqav2, "lmms-eval for VQAv2", "both sides normalised, 's kept"),
    "vlmevalkit": _scored(vqa_accuracy_vlmevalkit, "VLMEvalKit", "both sides normalised, 's and '5.' kept"),
    "official": _scored(vqa_accuracy_official, "VQA v2 tool", "references without punctuation, if they differ"),
}

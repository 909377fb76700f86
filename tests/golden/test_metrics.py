"""Every metric, under every definition that it has, against the values of the public implementations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.choices import LETTERS
from evals.metrics import METRICS, MetricName, mme, pope
from evals.metrics.vqa_accuracy import normalise

BY_GOLDEN_NAME = {
    "docvqa_anls": MetricName.anls,
    "chartqa_relaxed_accuracy": MetricName.relaxed_accuracy,
    "gqa_exact_match": MetricName.exact_match,
    "textvqa_accuracy": MetricName.vqa_accuracy,
    "scienceqa_exact_match": MetricName.choice,
    "pope": MetricName.pope,
    "mme": MetricName.mme,
}
VARIANTS = {
    ("docvqa_anls", "llava_stvqa"): "llava",
    ("docvqa_anls", "vlmevalkit"): "lmms_eval",
    ("chartqa_relaxed_accuracy", "pix2struct"): "lmms_eval",
    ("gqa_exact_match", "llava_convert_then_equality"): "llava",
    ("textvqa_accuracy", "lmms_eval"): "llava",
    ("textvqa_accuracy", "lmms_eval_vizwiz"): "llava",
    ("textvqa_accuracy", "vqa_official_lavis"): "official",
}
"""Implementations whose definition has another name here: because it serves several, or theirs says less."""

File = dict[str, Any]


@pytest.fixture(scope="module")
def metric_files(golden_root: Path) -> dict[str, File]:
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(golden_root.glob("metrics/*.json"))}
    assert files
    return files


def test_scores_of_single_answers(metric_files: dict[str, File], subtests: pytest.Subtests) -> None:
    for stem, content in metric_files.items():
        cases = [case for case in content["cases"] if "items" not in case]
        if not cases:
            continue
        name, tolerance = BY_GOLDEN_NAME[content["metric"]], content.get("tolerance", 1e-9)
        with subtests.test(f"{stem}: the default"):
            _, definition = METRICS[name].named(None)
            wanted = [case["expected"] for case in cases]
            assert not _wrong(definition.score, cases, wanted, tolerance)
        for implementation in sorted({name for case in cases for name in case.get("by_impl", {})}):
            with subtests.test(f"{stem}: {implementation}"):
                _, definition = METRICS[name].named(VARIANTS.get((content["metric"], implementation), implementation))
                wanted = [case["by_impl"].get(implementation) for case in cases]
                assert not _wrong(definition.score, cases, wanted, tolerance)


def test_every_file_is_of_a_metric_and_every_default_is_what_it_expects(metric_files: dict[str, File]) -> None:
    for content in metric_files.values():
        metric = METRICS[BY_GOLDEN_NAME[content["metric"]]]
        assert metric.default == content["expected_impl"]
        text = metric.definitions[metric.default].text
        assert {"lmms_eval": "lmms-eval", "llava": "LLaVA"}[content["expected_impl"]] in text


def test_means_over_whole_files(metric_files: dict[str, File], subtests: pytest.Subtests) -> None:
    for stem, content in metric_files.items():
        name = BY_GOLDEN_NAME[content["metric"]]
        if name not in (MetricName.anls, MetricName.vqa_accuracy, MetricName.relaxed_accuracy):
            continue
        with subtests.test(stem):
            score = METRICS[name].named(None)[1].score
            single = [case for case in content["cases"] if "type" not in case or len(case["references"]) == 1]
            values = [score(case["prediction"], case["references"]) for case in single]
            wanted = content["aggregate"].get("mean", content["aggregate"].get("relaxed_overall_micro"))
            assert sum(values) / len(values) == pytest.approx(wanted, abs=1e-9)


def test_normalised_answers(metric_files: dict[str, File]) -> None:
    (content,) = (content for content in metric_files.values() if "processor_pairs" in content)
    assert {pair["raw"]: normalise(pair["raw"]) for pair in content["processor_pairs"]} == {
        pair["raw"]: pair["processed"] for pair in content["processor_pairs"]
    }
    assert [normalise(case["prediction"]) for case in content["cases"]] == [
        case["processed_prediction"] for case in content["cases"]
    ]


def test_pope_reads_labels_as_each_implementation(metric_files: dict[str, File]) -> None:
    cases = metric_files["pope"]["parse_cases"]
    assert set(pope.READERS) == set(cases[0]["by_impl"])
    for name, read in pope.READERS.items():
        wanted = {case["prediction"]: _label(case["by_impl"][name]) for case in cases}
        assert {text: read(text) for text in wanted} == wanted


def test_pope_sets(metric_files: dict[str, File]) -> None:
    for case in metric_files["pope"]["cases"]:
        scores = pope.pope_scores((item["label"], pope.yes_or_no(item["prediction"])) for item in case["items"])
        for key, value in case["expected"].items():
            # Where the script divides by zero, what it has printed before still holds, and the rate of nothing is 0.
            assert key == "error" or math.isclose(scores[key], value, abs_tol=1e-12), (case["id"], key)


def test_mme_reads_labels_as_each_implementation(metric_files: dict[str, File]) -> None:
    for name, read in {"lmms_eval": mme.yes_or_no, "mme_official": mme.yes_or_no_official}.items():
        for case in metric_files["mme"]["parse_cases"]:
            if case["by_impl"][name] is not None:
                assert (read(case["prediction"]) or "other") == case["by_impl"][name], (name, case)


def test_mme_sets(metric_files: dict[str, File]) -> None:
    for case in metric_files["mme"]["cases"]:
        scores = mme.mme_scores(_judged(case["items"], mme.yes_or_no))
        for key, value in case["expected"].items():
            found = {"mme_perception_score": "perception", "mme_cognition_score": "cognition"}.get(key)
            if found:
                assert scores[found] == pytest.approx(value, abs=1e-6), case["id"]
            else:
                assert {name: scores[name] for name in value} == pytest.approx(value, abs=1e-6), case["id"]
        official = case["by_impl"]["mme_official_per_category"]
        if "error" not in official:
            scores = mme.mme_scores(_judged(case["items"], mme.yes_or_no_official))
            # The calculation pairs lines as they stand; sorted by image, that is by image.
            assert {name: scores[name] for name in official} == pytest.approx(official, abs=1e-6), case["id"]


def _judged(items: Iterable[Mapping[str, str]], read: Callable[[str], str | None]) -> list[mme.Judged]:
    return [
        mme.Judged(item["category"], item["question_id"], read(item["prediction"]) == item["gt"].lower())
        for item in items
    ]


def _wrong(
    score: Callable[[str, Sequence[str]], float], cases: Sequence[File], wanted: Sequence[Any], tolerance: float
) -> dict[str, Any]:
    wrong = {}
    for case, value in zip(cases, wanted, strict=True):
        if isinstance(value, dict):
            continue  # the implementation has raised: ours has a value there, and that is pinned elsewhere
        references = case["references"] if "references" in case else [LETTERS[case["answer_index"]]]
        found = score(case["prediction"], references)
        if value is not None and not math.isclose(found, value, abs_tol=tolerance):
            wrong[case["id"]] = (found, value, case.get("note"))
    return wrong


def _label(text: str) -> str | None:
    # VLMEvalKit writes its labels in capitals, and Unknown for none.
    return {"Yes": "yes", "No": "no", "Unknown": None}.get(text, text)

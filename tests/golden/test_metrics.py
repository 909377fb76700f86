"""Every metric against the values of the public implementations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evals.metrics import METRICS, MetricName

BY_GOLDEN_NAME = {
    "docvqa_anls": MetricName.anls,
    "chartqa_relaxed_accuracy": MetricName.relaxed_accuracy,
    "gqa_exact_match": MetricName.exact_match,
}
"""Metrics that exist here; a file with another one is reported as skipped."""


@pytest.fixture(scope="module")
def metric_files(golden_root: Path) -> dict[str, dict[str, Any]]:
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(golden_root.glob("metrics/*.json"))}
    assert files
    return files


def test_scores(metric_files: dict[str, dict[str, Any]], subtests: pytest.Subtests) -> None:
    for stem, content in metric_files.items():
        with subtests.test(stem):
            if content["metric"] not in BY_GOLDEN_NAME:
                pytest.skip(f"{content['metric']} comes with the other evaluation tasks")
            metric, tolerance = METRICS[BY_GOLDEN_NAME[content["metric"]]], content.get("tolerance", 1e-9)
            wrong = {
                case["id"]: (score, case["expected"], case.get("note"))
                for case in content["cases"]
                if not math.isclose(
                    score := metric.score(case["prediction"], case["references"]), case["expected"], abs_tol=tolerance
                )
            }
            assert content["cases"]
            assert not wrong


def test_the_whole_docvqa_file_has_the_published_mean(metric_files: dict[str, dict[str, Any]]) -> None:
    seen = 0
    for content in metric_files.values():
        if content["metric"] == "docvqa_anls":
            score = METRICS[MetricName.anls].score
            scores = [score(case["prediction"], case["references"]) for case in content["cases"]]
            assert sum(scores) / len(scores) == pytest.approx(content["aggregate"]["mean"], abs=1e-9)
            seen += 1
    assert seen

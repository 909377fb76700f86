"""One share of an evaluation, as `evals.workers` starts it: `python -m evals.worker SHARE overrides`."""

from __future__ import annotations

import logging
import sys

from anchorformer.errors import run_guarded
from data.folders import model_folder
from evals.__main__ import compose_config, out_folder
from evals.prepare import prepare
from evals.respondent import load
from evals.runner import answer_share


def main() -> None:
    share, overrides = int(sys.argv[1]), sys.argv[2:]
    logging.basicConfig(level=logging.INFO if share == 0 else logging.WARNING, format="%(message)s")
    config = compose_config(overrides)
    prepared = prepare(config)
    questions = [question for _, asked in prepared.values() for question in asked]
    respondent = load(model_folder(config.model, "model", "config.json"), config, questions)
    answer_share(config, prepared, respondent, respondent.facts, out_folder(config), share)


if __name__ == "__main__":
    run_guarded(main)

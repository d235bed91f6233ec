"""`npt predict`: calibrate, and say what converting each block costs, without evaluating or training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from npt.common.files import write_json
from npt.common.processes import first_does
from npt.common.stopwatch import Stopwatch
from npt.config import RunConfig
from npt.errors import ConfigError
from npt.runs.arguments import as_launched
from npt.runs.calibrate import calibrate_run
from npt.runs.corpora import calibration_batches, load_corpus
from npt.runs.texts import RunTexts
from npt.runs.train import convert_base, given_corpus
from npt.training.signals import StopSignals
from npt.tuner.converted import adapter_config, device_of


def run_prediction(config: RunConfig, output: Path | None = None) -> dict[str, Any]:
    """The prediction for a configuration, see `calibrate_run`, with the base_model and the blocks (indices) that it holds for.

    Args:
        output: a JSON file to write it to.

    Raises:
        NPTError: bad input, before any long work.
    """
    if not config.training.calibrate:
        raise ConfigError("training.calibrate=false: a prediction is made from a calibration; leave it true")
    config = as_launched(config)
    texts, spent = RunTexts.of(config), Stopwatch()
    texts.check_enough(config.model)
    texts.check()
    set_seed(config.training.seed)
    with StopSignals():
        corpus = given_corpus(config, texts)
        model, tokenizer = convert_base(config)
        corpus = corpus or load_corpus(texts, model, tokenizer)
        text = calibration_batches(texts, corpus, config.training.batch_size, device_of(model))
        _, found = calibrate_run(model, text, spent)
    found = {"base_model": config.model.base_model_name, "blocks": adapter_config(model).npt_layers, **found}
    if output is not None:
        first_does(lambda: write_json(output, found))
    return found

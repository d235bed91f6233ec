"""Measures a model's conversion and the law that predicts it: python -m benchmarks.law --model NAME --work FOLDER

Calibrates all blocks once, on the text of the --calibration files (without any: text that the model writes), measures what
each block costs alone, and compares the predicted mean KL of several sets of blocks with the measured one, on the --text
files (without any: further text of the model's own). Then it trains the upper half and all blocks for --steps steps and
measures those. Ranks below 64 are cuts of the fit of rank 64, which is what a fit of that rank gives.

FOLDER keeps the calibrated adapter, so that parts (--part) can be run apart. Figures go to
benchmarks/results/law-<model>.json and from there into docs/law.md and README.md; --tables writes those and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments

import npt
from benchmarks.law_tables import README_MODEL, kept_laws, law_readme, law_table
from benchmarks.tables import RESULTS
from npt import EquivalenceTrainer, NPTConfig, Objective
from npt.block.modes import Mode, running_as
from npt.equivalence.calibration import fit_components
from npt.equivalence.prediction import measure_interactions, probe_texts
from npt.runs.arguments import automatic_rate
from npt.tuner.converted import active_layers
from scripts.marked import write_section

LENGTH = 256
PARTS = ("calibrated", "untrained", "exact", "tokens", "trained")
RANK, RANKS = 64, (0, 4, 16, 64)
#: Share of the calibration tokens that the first file gives; the others share the rest.
FIRST_SHARE = 0.75


def blocks_of_files(tokenizer: Any, files: Sequence[Path], tokens: int) -> torch.Tensor:
    """(blocks, LENGTH) ids from the front of each file, shuffled where there are several files."""
    shares = [1.0] if len(files) == 1 else [FIRST_SHARE, *[(1 - FIRST_SHARE) / (len(files) - 1)] * (len(files) - 1)]
    parts = []
    for path, share in zip(files, shares, strict=True):
        count = int(tokens * share) // LENGTH
        text = path.read_text(encoding="utf-8")[: 8 * count * LENGTH]
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        parts.append(ids[: min(count, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH))
    found = torch.cat(parts)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return found if len(files) == 1 else found[order]


def own_text(base: Any, tokenizer: Any, blocks: int) -> torch.Tensor:
    """(blocks, LENGTH) ids that the model samples itself."""
    torch.manual_seed(1)
    start = torch.full((blocks, 1), tokenizer.bos_token_id or 0)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
    with torch.no_grad():
        return base.generate(start, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1, **options)


def batches_of(ids: torch.Tensor, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    """Batches for calibration."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(rows)]


def cut(model: Any, rank: int) -> None:
    """Makes the adapter one of a lower rank: what the further columns of A feed is zero."""
    for layer in active_layers(model):
        for name, parameter in layer.own.named_parameters():
            if name.startswith("B_"):
                parameter.data[rank:] = 0


@torch.no_grad()
def compare(model: Any, ids: torch.Tensor, sets: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """{name: figures} of the model with each set of blocks converted: means over tokens, errors over blocks of text."""
    layers, sums = active_layers(model), {name: [] for name in sets}  # type: ignore[var-annotated]
    for part in ids.split(2):
        targets = part[:, 1:, None]
        with running_as(layers, Mode.ORIGINAL):
            original = model(input_ids=part).logits[:, :-1].float().log_softmax(-1)
        top, p = original.argmax(-1), original.exp()
        for name, blocks in sets.items():
            with running_as([layer for layer in layers if layer.index not in blocks], Mode.ORIGINAL):
                found = model(input_ids=part).logits[:, :-1].float().log_softmax(-1)
            kl = (p * (original - found)).sum(-1)
            loss = (original - found).gather(-1, targets)[..., 0]  # of NPT above that of the original
            sums[name].append(torch.stack([kl.mean(1), (found.argmax(-1) == top).float().mean(1), loss.mean(1)], 1))
    figures = {}
    for name, rows in sums.items():
        table = torch.cat(rows).double()
        (kl, same, loss), (kl_error, same_error, loss_error) = table.mean(0), table.std(0) / len(table) ** 0.5
        ratio = loss.exp()
        figures[name] = {
            "mean_kl": float(kl), "mean_kl_standard_error": float(kl_error),
            "top1_agreement": float(same), "top1_agreement_standard_error": float(same_error),
            "perplexity_ratio": float(ratio), "perplexity_ratio_standard_error": float(ratio * loss_error),
            "tokens": len(table) * (ids.shape[1] - 1),
        }  # fmt: skip
    return figures


class Bench:
    """A model, its texts and the results so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.work = arguments, Path(arguments.work)
        self.base, self.tokenizer = npt.load_base(arguments.model, dtype="float32")
        self.name = Path(arguments.model.replace(":", "-")).name
        self.path = RESULTS / f"law-{self.name}.json"
        scored = arguments.scored // LENGTH
        if arguments.calibration:
            self.calibration = blocks_of_files(self.tokenizer, arguments.calibration, arguments.tokens)
            self.texts = {
                path.stem: blocks_of_files(self.tokenizer, [path], arguments.scored) for path in arguments.text
            }
        else:
            count = arguments.tokens // LENGTH
            written = own_text(self.base, self.tokenizer, count + scored)
            self.calibration, self.texts = written[:count], {"self": written[count:]}
        self.blocks: int = self.base.config.num_hidden_layers
        self.half = self.blocks - self.blocks // 2
        self.held = probe_texts(self.blocks, len(self.calibration))

    def keep(self, **found: Any) -> None:
        """Adds results to the file."""
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        kept.update(found)
        self.path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found)[:2000], flush=True)

    def calibrated(self, rank: int = 16) -> Any:
        """The model with all blocks converted and calibrated, cut to a rank."""
        folder = self.work / f"{self.name}-{len(self.calibration)}"  # of other text: another --work
        if not folder.is_dir():
            model: Any = get_peft_model(self.base, NPTConfig(npt_layers="all", rank=RANK))
            fit_components(model, batches_of(self.calibration[self.held :]), progress=True)
            model.save_pretrained(str(folder))
            self.base = model.unload()
        model = PeftModel.from_pretrained(self.base, str(folder), is_trainable=True).eval()
        cut(model, rank)
        return model

    def prepare(self) -> None:
        """Calibrates, where that was not done yet."""
        self.base = self.calibrated().unload()

    def sets(self, found: Any) -> dict[str, list[int]]:
        """The sets of blocks whose KL is predicted and measured."""
        every, draw = list(range(self.blocks)), random.Random(0)
        sets = {"upper half": every[self.blocks // 2 :], "all": every, "auto": found.choose(self.half)}
        for i in range(self.arguments.random):
            sets[f"random {i + 1}"] = sorted(draw.sample(every, self.half))
        return sets

    def untrained(self) -> None:
        """Predicted and measured KL after calibration alone, of several ranks and sets of blocks."""
        parameters, rows = 0, []
        for rank in self.arguments.ranks:
            model = self.calibrated(rank)
            parameters = sum(p.numel() for p in active_layers(model)[0].own.parameters())
            found = measure_interactions(model, batches_of(self.calibration[: self.held], 1), progress=True)
            sets = self.sets(found)
            if rank != 16:
                sets = {name: blocks for name, blocks in sets.items() if not name.startswith("random")}
            for text, ids in self.texts.items():
                for name, figures in compare(model, ids, sets).items():
                    mean, error = found.predict(sets[name])
                    rows.append({"rank": rank, "set": name, "blocks": sets[name], "text": text, "predicted": mean,
                                 "predicted_standard_error": error, **figures})  # fmt: skip
            if rank == 16:
                self.keep(alone=found.alone())
            self.keep(rows=rows, calibration_tokens=(len(self.calibration) - self.held) * LENGTH, blocks=self.blocks,
                      hidden_size=self.base.config.hidden_size, parameters_per_block_rank_64=parameters)  # fmt: skip
            self.base = model.unload()

    def tokens(self) -> None:
        """Measured KL of all blocks, rank 16, after calibrations on less text."""
        text, ids = next(iter(self.texts.items()))
        rows = []
        for share in (8, 4, 2, 1):
            model: Any = get_peft_model(self.base, NPTConfig(npt_layers="all", rank=16)).eval()
            part = self.calibration[self.held :][: len(self.calibration) // share]
            fit_components(model, batches_of(part))
            figures = compare(model, ids, {"all": list(range(self.blocks))})["all"]
            rows.append({"calibration_tokens": part.numel(), "text": text, **figures})
            self.keep(tokens=rows)
            self.base = model.unload()

    def exact(self) -> None:
        """All blocks with gain `denominator`, nothing calibrated."""
        model: Any = get_peft_model(self.base, NPTConfig(npt_layers="all", rank=16, gain="denominator")).eval()
        text, ids = next(iter(self.texts.items()))
        self.keep(denominator=compare(model, ids, {"all": list(range(self.blocks))})["all"] | {"text": text})
        self.base = model.unload()

    def trained(self) -> None:
        """The upper half and all blocks after --steps steps of objective `logits` on the calibration text."""
        for name, first in (("upper half", self.blocks // 2), ("all", 0)):
            model = self.calibrated()
            npt.tuner.converted.keep_blocks(model, range(first, self.blocks))
            self.train(model)
            figures = {
                text: compare(model, ids, {name: list(range(self.blocks))})[name] for text, ids in self.texts.items()
            }
            self.keep(**{f"trained {name}": figures, "steps": self.arguments.steps})
            self.base = model.unload()

    def train(self, model: Any) -> None:
        """Trains in place."""
        ids = self.calibration[self.held :].tolist()
        rows = datasets.Dataset.from_dict(
            {"input_ids": ids, "attention_mask": [[1] * LENGTH] * len(ids), "labels": ids}
        )
        options = TrainingArguments(
            output_dir=str(self.work / "trainer"), max_steps=self.arguments.steps, per_device_train_batch_size=4,
            learning_rate=automatic_rate(self.base.config.hidden_size), lr_scheduler_type="cosine", warmup_steps=5,
            save_strategy="no",
            report_to=[], logging_steps=10, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        EquivalenceTrainer(model, options, Objective("logits"), train_dataset=rows).train()
        model.eval()


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="builtin:tiny", help="builtin:tiny, builtin:smollm2-135m, a folder or a hub id"
    )
    parser.add_argument("--work", default="law", help="folder for the calibrated adapter")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="text file; the first gives most")
    parser.add_argument("--text", type=Path, action="append", default=[], help="text file to evaluate on")
    parser.add_argument("--tokens", type=int, default=98_304, help="of calibration")
    parser.add_argument("--scored", type=int, default=51_456, help="tokens of each text")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--random", type=int, default=5, help="random sets of blocks")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--tables", action="store_true")
    return parser.parse_args()


def parts_of(bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, method) of each part, in their order."""
    for name in PARTS:
        if bench.arguments.part is None or name in bench.arguments.part:
            yield name, getattr(bench, "prepare" if name == "calibrated" else name)


def write_tables() -> None:
    """Writes the sections of docs/law.md and README.md from the figures that are kept."""
    kept = kept_laws()
    write_section("docs/law.md", "law", law_table(kept))
    if README_MODEL in kept:
        write_section("README.md", "results", law_readme(kept[README_MODEL]))


def main() -> None:
    """Measures the parts that are asked for, then writes the tables."""
    arguments = parse()
    if not arguments.tables:
        for name, part in parts_of(Bench(arguments)):
            print(f"-- {name}", flush=True)
            part()
    write_tables()


if __name__ == "__main__":
    main()

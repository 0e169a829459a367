"""TopK dictionaries of one block's input and output, trained with SAELens, to read the block in.

    python recipes/dictionaries.py TWIN --block 12 -o DICTIONARIES
    surgery explain TWIN --block 12 --features DICTIONARIES/input --output-features DICTIONARIES/output

Needs SAELens (`make tools`). By default 2,048 features on 131,072 tokens of Python's manual, some five minutes on two
cores: small and narrow, as dictionaries go, and for trying things out. Attention sinks and the first token of a window
are left out, as `explain` leaves them out. The folders are SAELens's own.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch import Tensor

import surgery
from surgery.calibration.inputs import calibration_inputs
from surgery.models import loading
from surgery.reading.activity import Activity
from surgery.reading.block_in_model import find_block, recorded_activity, surroundings
from surgery.reading.dictionary import explained_share, read_dictionary
from surgery.runtime.settings import whole_number


def recorded(options: argparse.Namespace) -> dict[str, Tensor]:
    """What the block reads and writes on ordinary tokens, (tokens, d) each."""
    loaded = loading.loaded(options.twin)
    block = find_block(loaded.model, options.block)
    much = {"tokens": options.tokens, "length": options.window, "batch": 8, "seed": options.seed}
    inputs = calibration_inputs(options.text, loaded.model, loaded.text_tokenizer, **much)
    block = surroundings(loaded.model, block, {name: value[:1, :8] for name, value in inputs.batches[0].items()})
    found = recorded_activity(loaded.model, block, inputs.batches, quiet=options.quiet)
    seen = Activity.of(torch.cat([batch["input_ids"] for batch in inputs.batches]), found.x, found.size)
    return {"input": found.x[seen.ordinary], "output": found.y[seen.ordinary]}


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Rows in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].split(size)


def train(rows: Tensor, options: argparse.Namespace, folder: Path, hook: str) -> None:
    """One dictionary, as SAELens trains and saves it."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    config = TopKTrainingSAEConfig(
        d_in=rows.shape[1], d_sae=options.features, k=options.k, normalize_activations="expected_average_only_in"
    )
    config.metadata.model_name, config.metadata.hook_name = Path(options.twin).name, hook
    samples = len(rows) * options.epochs
    steps = math.ceil(samples / options.batch)
    how = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=options.batch,
        lr=options.rate,
        lr_end=options.rate / 10,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=steps // 20,
        dead_feature_window=max(steps // 10, 10),
        n_batches_for_norm_estimate=10,
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(options.seed)
    trainer = SAETrainer(how, TopKTrainingSAE(config), batches(rows, options.batch, options.seed))
    trainer.fit().save_inference_model(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument("--text", default="python", help="a text source, as of `surgery explain`")
    parser.add_argument("--tokens", type=whole_number, default=131_072)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--features", type=whole_number, default=2048, help="how many")
    parser.add_argument("--k", type=int, default=32, help="features that fire on a token")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    try:
        import sae_lens as _  # noqa: F401
    except ImportError as error:
        raise surgery.SurgeryError(
            "training needs SAELens", fix="`make tools`, or pip install -e '.[sae]' in a clone"
        ) from error
    for site, rows in recorded(options).items():
        held = len(rows) // 16  # the last windows are for judging
        folder = Path(options.output) / site
        train(rows[:-held], options, folder, f"blocks.{options.block}.mlp.hook_{'in' if site == 'input' else 'out'}")
        found, unseen = read_dictionary(folder), rows[-held:].float()
        encoded = found.encode(unseen)
        share = explained_share(unseen, found.reconstructed(unseen))
        silent = int((encoded.activations.counts() == 0).sum())
        print(f"{folder}: {found.size:,} features, R² {share:.3f} on {held:,} held-out tokens, {silent:,} silent there")
    print(
        f"surgery explain {options.twin} --block {options.block} --features {options.output}/input "
        f"--output-features {options.output}/output"
    )


if __name__ == "__main__":
    try:
        main()
    except surgery.SurgeryError as error:
        sys.exit(f"error: {error}")

"""Converts, refines and measures a model within minutes on one GPU, and writes one table.

    python recipes/gpu.py MODEL -o OUT --text novels.txt=3 --text verse.txt --kind drama=hamlet.txt --minutes 12
    accelerate launch --num_processes 2 recipes/gpu.py MODEL -o OUT …        # the same on two

MODEL is a folder or .gguf file; nothing is fetched. Speeds first: a plain forward pass, and a plain fine-tuning step
of the original on the same tokens. Then degree 2 and 3 by `surgery run`, the quadratic one refined on as many tokens
as the minutes leave room for (at most --refine-tokens), and every twin measured by kind of text. Every stage is kept:
run again after a kill, or a time limit, it goes on where it stopped, with the tokens it had set itself. OUT/results
holds table.md, table.json and pictures, a few small files; the twins stay in OUT. Rehearsed on CPUs only.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import yaml

import surgery
from evals.settings import parse_kinds
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.mixtures import Mixture
from surgery.calibration.samples import SAMPLED_TOGETHER, sample
from surgery.calibration.texts import SAMPLES
from surgery.models import loading
from surgery.runtime import processes
from surgery.runtime.files import write_json, write_text
from surgery.runtime.settings import whole_number
from surgery.saving.report import read_report

SHARE = 0.55  # of a fine-tuning step's speed that refinement is taken to reach when its tokens are set
FEW = 128  # tokens of the samples whose drawing is timed
MEASURING = 90  # seconds kept for measuring
PASSES = 8  # that are timed, after two that are not
PICTURES = ("run.png", "refined/refinement.png", "refined/evaluation/texts.png")


def timed(step, device: torch.device) -> float:
    """Seconds of one step, after two that warm up."""
    for number in range(PASSES + 2):
        if number == 2:
            settled(device)
            begun = time.monotonic()
        step()
    settled(device)
    return (time.monotonic() - begun) / PASSES


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds(model_name: str, text: str, window: int, batch: int, drawn: bool) -> dict[str, float | str]:
    """Tokens a second of the original, in bfloat16 where there is a GPU: a forward pass, a step of AdamW, and, where
    samples are to be drawn, drawing them."""
    loaded = loading.loaded(model_name)
    device = torch.device(loading.placed("auto"))
    model = loaded.model.to(device)
    much = {"tokens": window * batch, "length": window, "batch": batch, "short": 0.0, "random_tokens": 0.0}
    ids = calibration_inputs(text, model, loaded.text_tokenizer, **much).batches[0]["input_ids"].to(device)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type == "cuda")

    def forward() -> None:
        with torch.no_grad(), mixed:
            model(input_ids=ids, use_cache=False)

    def train() -> None:
        with mixed:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    found = {"forward": ids.numel() / timed(forward, device), "fine_tuning": ids.numel() / timed(train, device)}
    if drawn:
        begun, few = time.monotonic(), min(window, FEW)
        sample(model, loaded.tokenizer, SAMPLED_TOGETHER, few, seed=0)
        found["drawing"] = SAMPLED_TOGETHER * few / (time.monotonic() - begun)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return found | {"device": name, "batch": batch, "window": window}


def recipe_of(options: argparse.Namespace, tokens: int) -> dict:
    texts = {name: float(share or 1) for name, _, share in (text.partition("=") for text in options.text)}
    refined = {"text": options.text, "tokens": tokens, "window": options.window, "batch": options.batch}
    kinds = dict(parse_kinds(options.kind)) | ({} if options.kind else {"manual": "python", "code": "code"})
    return {
        "model": options.model,
        "output": str(options.output),
        "convert": {"degree": [2, 3], "tokens": options.convert_tokens, "text": texts, "measure": 0},
        "refine": refined | {"validate_every": max(1, tokens // (options.window * options.batch) // 20)},
        "eval": {"kind": kinds, "tokens": 2048, "block_tokens": 2048, "speed": options.speed},
    }


def table(out: Path, found: dict, record: dict) -> str:
    """What it took and what it lost, Markdown."""
    fast = found["speeds"]
    lines = [f"{fast['device']}, windows of {fast['window']} tokens, {fast['batch']} at a time", ""]
    lines += ["| stage | seconds | tokens | tokens a second | of a plain step |", "| -- | -: | -: | -: | -: |"]
    for name in ("forward", "fine_tuning"):
        lines.append(f"| {name.replace('_', '-')}, original | | | {fast[name]:,.0f} | |")
    for name, stage in record["stages"].items():
        tokens = found["tokens"].get(name)
        rate = tokens / stage["seconds"] if tokens else None
        plain = fast["fine_tuning" if name.startswith("refine") else "forward"]
        shown = ["", "", ""] if rate is None else [f"{tokens:,}", f"{rate:,.0f}", f"{rate / plain:.2f}"]
        lines.append(f"| {name} | {stage['seconds']:,.0f} | {' | '.join(shown)} |")
        if name.startswith("refine") and "drawing" in fast:
            lines.append(f"| … of it drawing samples | {found['drawing_seconds']:,.0f} | | | |")
    lines += ["", "| twin | kind | seen | nats lost | KL |", "| -- | -- | -- | -: | -: |"]
    for twin, kinds in found["kinds"].items():
        for row in kinds["kinds"]:
            lost, divergence = row["nats_lost"]["value"], row["divergence"]["value"]
            lines.append(f"| {twin} | {row['kind']} | {row['seen']} | {lost:+.4f} | {divergence:.4f} |")
        if unseen := kinds["unseen"]:
            both = ", ".join(f"{unseen[name]['value']:+.4f}" for name in ("mean", "worst"))
            lines.append(f"| {twin} | mean and worst of the unseen | no | **{both}** | |")
    lines += ["", "| refined on, tokens | nats lost, held out | KL |", "| -: | -: | -: |"]
    lines += [f"| {row['tokens']:,} | {row['lost']:+.4f} | {row['divergence']:.4f} |" for row in found["curve"]]
    return "\n".join(lines) + "\n"


def results(options: argparse.Namespace, plan: dict, record: dict) -> None:
    """OUT/results, from what the run left."""
    out, place = options.output, options.output / "results"
    report = read_report(out / "refined")["refinement"]
    tokens = {name: options.convert_tokens for name in record["stages"] if name.startswith("convert")}
    tokens |= {name: report["tokens_seen"] for name in record["stages"] if name.startswith("refine")}
    kinds = {}
    for twin in ("degree-2", "refined", "degree-3"):
        measured = json.loads((out / twin / "evaluation" / "evaluation.json").read_text())
        kinds[twin] = measured["kinds"]
    found = {"speeds": plan["speeds"], "plan": plan, "tokens": tokens, "kinds": kinds, "curve": report["curve"]}
    found |= {"drawing_seconds": report.get("drawing_seconds", 0.0)}
    write_json(place / "table.json", found | {"stages": record["stages"]})
    write_text(place / "table.md", table(out, found, record))
    for picture in PICTURES:
        if (out / picture).is_file():
            shutil.copyfile(out / picture, place / picture.replace("/", "-"))


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, help="to calibrate and train on, FILE=SHARE each")
    parser.add_argument("--kind", action="append", default=[], help="to measure on, KIND=SOURCE each")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--convert-tokens", type=whole_number, default=1_000_000)
    parser.add_argument("--refine-tokens", type=whole_number, default=50_000_000, help="at most")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="do not time twin against original")
    options = parser.parse_args()
    processes.join()
    place = options.output / "plan.json"
    if not place.is_file() and processes.first():
        text, drawn = options.text[0].partition("=")[0], Mixture.of(options.text).share(SAMPLES) > 0
        fast = speeds(options.model, text, options.window, options.batch, drawn)
        write_json(place, {"speeds": fast, "tokens": None})
    plan = processes.looked_up(lambda: json.loads(place.read_text()))
    file = options.output / "gpu.yaml"
    if plan["tokens"] is None:  # the conversions by themselves first: what they take says what is left to refine in
        if processes.first():
            whole = recipe_of(options, options.refine_tokens)
            write_text(file, yaml.safe_dump({key: whole[key] for key in ("model", "output", "convert")}))
        surgery.run(file, quiet=False)
        left = 60 * options.minutes - (time.monotonic() - began) - MEASURING
        fast, drawn = plan["speeds"], Mixture.of(options.text).share(SAMPLES)
        a_token = 1 / (SHARE * fast["fine_tuning"]) + (drawn / fast["drawing"] if drawn else 0)
        room = round(max(left, 0) / a_token)
        least = 8 * options.window * options.batch
        plan["tokens"] = max(least, min(options.refine_tokens, room))
        if processes.first():
            write_json(place, plan)
        plan = processes.looked_up(lambda: json.loads(place.read_text()))
    if processes.first():
        write_text(file, yaml.safe_dump(recipe_of(options, plan["tokens"])))
    done = surgery.run(file, quiet=False)
    if processes.first():
        results(options, plan, done.record)
        print((options.output / "results" / "table.md").read_text())


if __name__ == "__main__":
    try:
        main()
    except surgery.SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""What each degree costs a model: nats on text or sequences that were not fitted, and the R² of its blocks.

    python benchmarks/degrees.py MODEL --text FILE.txt [--tokens 16384] [--degrees 1 2 3] [--json FILE]
    python benchmarks/degrees.py MODEL --sequences EVQLVQSG… DVVMTQT… [--vocabulary vocab.txt]

The first is for models that predict next tokens: nats on 8,192 tokens that were not fitted, as `surgery convert` says.
The second is for masked models, on sequences of the model's own: of those given, half of the tokens are masked and
drawn anew, twice over; 320 of them calibrate, with one token in seven masked, 320 others are measured on.
"""

import argparse
import copy
import json
import time

import torch
import transformers

import surgery
from surgery.models import loading
from surgery.runtime.precision import autocast
from surgery.runtime.settings import whole_number

TOGETHER = 32  # sequences a forward pass
ROUNDS, STEPS = 2, 6  # of drawing half of a sequence anew, in as many steps
REDRAWN, MASKED = 0.5, 0.15


def drawn(model, tokenizer, sequences, rows, seed):
    """Batches of the model's own sequences, (TOGETHER, length) ids each."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(rows // TOGETHER):
        text = sequences[number % len(sequences)]
        ids = torch.tensor(tokenizer(" ".join(text))["input_ids"]).expand(TOGETHER, -1).clone()
        for _ in range(ROUNDS):
            order = torch.rand(ids[:, 1:-1].shape, generator=draw).argsort(-1) + 1
            places = order[:, : round(REDRAWN * order.shape[1])]
            ids.scatter_(1, places, tokenizer.mask_token_id)
            for some in places.chunk(STEPS, dim=1):
                with torch.no_grad(), autocast("auto", ids.device):
                    likely = model(input_ids=ids).logits[..., len(tokenizer.all_special_ids) :].float().softmax(-1)
                chosen = torch.multinomial(likely.flatten(0, 1), 1, generator=draw).view_as(ids)
                ids.scatter_(1, some, chosen.gather(1, some) + len(tokenizer.all_special_ids))
        found.append(ids)
    return found


def masked(batches, tokenizer, seed):
    """Inputs with some tokens masked, and the labels, -100 where nothing is."""
    draw = torch.Generator().manual_seed(seed)
    for ids in batches:
        hidden = torch.rand(ids.shape, generator=draw) < MASKED
        hidden[:, 0] = hidden[:, -1] = False
        yield {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}, ids.masked_fill(~hidden, -100)


def masked_loss(model, pairs):
    """Nats per masked token."""
    total = count = 0.0
    with torch.no_grad():
        for inputs, labels in pairs:
            logits = model(**inputs).logits.float()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels >= 0).sum())
    return total / count


def of_sequences(loaded, options):
    """A function of `convert`'s settings that converts a masked model: what it costs, and the report."""
    tokenizer = loaded.tokenizer
    if options.vocabulary:
        tokenizer = transformers.BertTokenizer(options.vocabulary, do_lower_case=False)
    fit, fresh = (drawn(loaded.model, tokenizer, options.sequences, options.rows, seed) for seed in (0, 7))
    inputs = [inputs for inputs, _ in masked(fit, tokenizer, 1)]
    pairs = list(masked(fresh, tokenizer, 2))
    base = masked_loss(loaded.model, pairs)
    print(f"original {base:.4f} nats per masked token")

    def cost(**settings):
        twin, report = surgery.convert(copy.deepcopy(loaded.model), text=inputs, **settings)
        return masked_loss(twin, pairs) - base, report

    return cost


def of_text(loaded, options):
    """The same of a model that predicts next tokens."""

    def cost(**settings):
        model = copy.deepcopy(loaded.model)
        given = {"text": options.text, "tokens": options.tokens} | settings
        _, report = surgery.convert(model, tokenizer=loaded.tokenizer, **given)
        return report.perplexity["nats"], report

    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", help="a text source, as for `surgery convert --text`")
    parser.add_argument("--tokens", type=whole_number, default=16384)
    parser.add_argument("--sequences", nargs="*")
    parser.add_argument("--rows", type=int, default=320, help="sequences to draw, twice")
    parser.add_argument("--vocabulary", help="vocab.txt, where the model's folder holds no tokenizer")
    parser.add_argument("--degrees", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--targets", nargs="*", default=["stream"], help="stream, block")
    parser.add_argument("--epochs", type=int, help="as for `surgery convert`; 0: the closed form alone")
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args()
    if bool(options.text) == bool(options.sequences):
        parser.error("give a --text, or --sequences of a masked model")
    loaded = loading.loaded(options.model)
    if loaded.source.note:
        print(loaded.source.note)
    cost = (of_sequences if options.sequences else of_text)(loaded, options)
    print(f"{'degree':>6} {'target':<8}{'nats':>9}{'R² median':>11}{'least':>7}{'seconds':>9}  least in")
    rows = []
    for target in options.targets:
        for degree in options.degrees:
            begun = time.monotonic()
            nats, report = cost(
                degree=degree, target=target, epochs=options.epochs if degree > 1 else None, quiet=False
            )
            blocks = sorted(report.blocks, key=lambda row: row["r2_held"])
            middle, least = blocks[len(blocks) // 2]["r2_held"], blocks[0]
            row = {"degree": degree, "target": target, "nats": nats, "seconds": time.monotonic() - begun}
            rows.append(row | {"blocks": report.blocks})
            measures = f"{nats:>+9.4f}{middle:>11.3f}{least['r2_held']:>7.3f}{row['seconds']:>9.0f}"
            print(f"{degree:>6} {target:<8}{measures}  {least['path']}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()

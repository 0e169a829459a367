"""One yardstick: what a twin loses on kinds of text, those it has not seen above all.

    python benchmarks/texts.py TWIN --against MODEL --text novel=alice.txt --text drama=hamlet.txt …

Python's manual and its library's code are measured always, and as short sentences and as a dialogue what is given as
KIND=lines:FILE and KIND=chat:FILE. A table is printed; texts.json and texts.png go to TWIN/evaluation (-o elsewhere),
where the model card finds them. `--json` prints the figures.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import surgery
from evals.kinds import BUILT_IN, compare_kinds, parse
from evals.kinds_report import write_kinds
from surgery.saving.evaluation import kind_rows, unseen_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("--against", required=True, help="the original")
    parser.add_argument("--text", action="append", default=[], metavar="KIND=SOURCE")
    parser.add_argument(
        "--seen", action="append", default=[], metavar="KIND", help="seen, though the record can't tell"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of every kind")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("-o", "--output")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = BUILT_IN | parse(options.text)
    how = {"tokens": options.tokens, "window": options.window, "seen": options.seen}
    found = compare_kinds(options.twin, options.against, texts, **how)
    written = write_kinds(found, Path(options.output or Path(options.twin) / "evaluation"))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(title=f"{options.twin} against {options.against}", title_justify="left")
    for name in ("kind", "tokens", "original, nats", "nats lost (95 %)", "KL", ""):
        table.add_column(name, justify="left" if name in ("kind", "") else "right")
    for row in kind_rows(found):
        table.add_row(*row)
    Console().print(table)
    print(unseen_line(found))
    print(*written, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except surgery.SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

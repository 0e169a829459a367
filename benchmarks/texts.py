"""One yardstick: what a twin loses on kinds of text, those it has not seen above all.

    python benchmarks/texts.py TWIN --original MODEL --kind novel=alice.txt --kind drama=hamlet.txt …

The same as `surgery eval TWIN --kind …`, by itself. Python's manual and its library's code are always measured.
KIND=lines:FILE measures short sentences, KIND=chat:FILE a dialogue. A table is printed; texts.json and texts.png go to
TWIN/evaluation (-o elsewhere), where the model card finds them. `--json` prints the figures.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import surgery
from evals.kinds import BUILT_IN, compare_kinds
from evals.kinds_report import write_kinds
from evals.pair import load_pair
from evals.settings import parse_kinds
from surgery.runtime.settings import whole_number
from surgery.saving.evaluation import KIND_COLUMNS, kind_rows, unseen_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("--original", "--against", required=True, metavar="MODEL")
    parser.add_argument("--kind", "--text", action="append", default=[], metavar="KIND=SOURCE")
    parser.add_argument(
        "--seen", action="append", default=[], metavar="KIND", help="seen, though the record can't tell"
    )
    parser.add_argument("--tokens", type=whole_number, default=4096, help="of every kind")
    parser.add_argument("--window", type=whole_number, default=512)
    parser.add_argument("-o", "--output", metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sources = BUILT_IN | dict(parse_kinds(options.kind))
    how = {"tokens": options.tokens, "window": options.window, "seen": options.seen, "quiet": options.json}
    found = compare_kinds(load_pair(options.twin, options.original), options.twin, sources, **how)
    written = write_kinds(found, Path(options.output or Path(options.twin) / "evaluation"))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(title=f"{options.twin} against {options.original}", title_justify="left")
    for number, name in enumerate(KIND_COLUMNS):
        table.add_column(name, justify="left" if number in (0, len(KIND_COLUMNS) - 1) else "right")
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

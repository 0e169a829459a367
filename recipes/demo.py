"""`make demo`: converts a real model at degree 2 and at degree 3, and prints what it cost.

Usage: python recipes/demo.py MODEL [TOKENS]. Twins are written to build/quadratic and build/cubic; an interrupted
run goes on where it stopped.
"""

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console
from rich.table import Table

import surgery
from surgery.saving.report import read_report

PLACES = {2: "build/quadratic", 3: "build/cubic"}


def main(model: str, tokens: int) -> None:
    for degree, place in PLACES.items():
        print(f"degree {degree} → {place}", file=sys.stderr)
        surgery.convert(
            model, degree=degree, calibration="python", tokens=tokens, output=place, overwrite=True, quiet=False
        )
    table = Table(title=f"{model}: {tokens:,} calibration tokens of English that ships with Python")
    for column in ("feed-forward blocks", "perplexity", "nats lost", "form", "seconds in blocks"):
        table.add_column(column, justify="left" if column == "feed-forward blocks" else "right")
    reports = {degree: read_report(place) for degree, place in PLACES.items()}
    table.add_row("original", f"{reports[2]['perplexity']['original']:.2f}", "", "", "")
    for degree, report in reports.items():
        seen = report["perplexity"]
        table.add_row(
            f"degree {degree}",
            f"{seen['twin']:.2f}",
            f"{seen['nats']:+.4f}",
            report["form"],
            f"{sum(block['seconds'] for block in report['blocks']):.0f}",
        )
    Console().print(table)
    print(f"measured on {reports[2]['perplexity']['text']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 32768)
    except surgery.SurgeryError as error:
        sys.exit(f"error: {error}")

"""A progress bar that says what a person wants to know: which block, how good, how long still."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

SHAPE = "{desc}: {n_fmt}/{total_fmt} {bar:20} {elapsed} (left {remaining}){postfix}"


def progress(total: int, doing: str, quiet: bool = False) -> Any:
    """tqdm's bar on standard error, with the time left."""
    from tqdm import tqdm

    return tqdm(total=total, disable=quiet, desc=doing, file=sys.stderr, smoothing=0.1, bar_format=SHAPE)


class Progress:
    """Counts blocks on standard error; silent when asked to be."""

    def __init__(self, total: int, quiet: bool, doing: str = "converting") -> None:
        self.bar = progress(total, doing, quiet)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()

    def step(self, row: dict[str, Any]) -> None:
        self.tell(f"{row['path']} R²={row['r2_held']:.4f}")

    def tell(self, text: str) -> None:
        """One more block is done; `text` is shown after the bar."""
        self.bar.set_postfix_str(text)
        self.bar.update(1)

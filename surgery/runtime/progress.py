"""A progress bar that says what a person wants to know: which block, how good, how long still."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Counts blocks on standard error; silent when asked to be."""

    def __init__(self, total: int, quiet: bool, doing: str = "converting") -> None:
        from tqdm import tqdm

        shape = "{desc}: {n_fmt}/{total_fmt} {bar:20} {elapsed} (left {remaining}){postfix}"
        self.bar = tqdm(total=total, disable=quiet, desc=doing, file=sys.stderr, smoothing=0.1, bar_format=shape)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()

    def step(self, row: dict[str, Any]) -> None:
        self.tell(f"{row['path']} R²={row['r2_held']:.4f}")

    def tell(self, text: str) -> None:
        """One more block is done; `text` stands behind the bar."""
        self.bar.set_postfix_str(text)
        self.bar.update(1)

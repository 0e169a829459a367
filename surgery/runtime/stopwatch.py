"""How long each stage of a long job took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds by stage, rounded to hundredths."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """What happens inside is that stage."""
        begun = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - begun, 2)

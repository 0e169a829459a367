"""What a block should write.

The original block's output on the twin's stream; or, where the original's stream runs too, what brings the twin's
stream back to it. With r the stream before the block, r₀ and x₀ the original's:

    R' = r + c·f       f(x₀) + (r₀ − r) / c
    R' = r + N(f)      f(x₀) + δ, with δ what moves N by r₀ − r, to first order
    R' = N(r + f)      f(x₀) + r₀ − r

A mixture's experts share what their block should add (:mod:`surgery.fitting.experts`): it is given as corrections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.blocks.residual import OUTPUT
from surgery.calibration.arrivals import Arrival, Station
from surgery.closed_form.normalisation import Normalisation


@dataclass(frozen=True)
class Target:
    """What a block should write, for each row of its arrivals.

    Attributes:
        norm: N, where the block's output passes through one.
        corrections: by batch, what is to be added to the block's own output; empty for none.
    """

    station: Station
    norm: Normalisation | None
    corrections: Sequence[Tensor]

    @staticmethod
    def of(station: Station, corrections: Sequence[Tensor] = ()) -> Target:
        residual, norm = station.block.residual, None
        if residual is not None and residual.normed == OUTPUT:
            norm = Normalisation.of(
                station.modules[residual.norm], station.twin[0].x[:1, :1].expand(1, station.block.out)
            )
        return Target(station, norm, corrections)

    @property
    def in_stream(self) -> bool:
        """Whether it is known where the block's output is added."""
        return self.station.block.residual is not None

    @property
    def counts(self) -> Tensor | None:
        """How much an error of each of the block's outputs counts, (out,); None where alike."""
        return None if self.norm is None else self.norm.scale

    def arrivals(self, number: int) -> tuple[Arrival, Arrival]:
        """A batch in the twin and in the original, twice the same where the original's stream does not run."""
        arrival = self.station.twin[number]
        return arrival, self.station.original[number] if self.station.original else arrival

    def wanted(self, number: int, rows: slice | Tensor, output: Tensor) -> Tensor:
        """What the block should write at some rows of a batch, (rows, out).

        Args:
            output: what the original writes there, in its own stream where that runs.
        """
        arrival, other = self.arrivals(number)
        if self.corrections:
            return output + self.corrections[number][rows]
        residual = self.station.block.residual
        if other is arrival or residual is None or arrival.residual is None or other.residual is None:
            return output
        missing = other.residual[rows] - arrival.residual[rows]
        if residual.normed == OUTPUT:  # by a norm of a form that is not known, nothing can be aimed through
            return output if self.norm is None else output + self.norm.moving(output, missing)
        return output + missing / residual.scale

    def joining(self, output: Tensor) -> Tensor:
        """What the output adds to the stream, (tokens, out)."""
        if self.norm is not None:
            return self.norm(output)
        residual = self.station.block.residual
        return output if residual is None else output * residual.scale

    def reaching(self, output: Tensor) -> Tensor:
        """Its norm, (tokens,)."""
        norms: Tensor = self.joining(output.float()).norm(dim=-1)
        return norms

    def lengths(self, output: Tensor) -> Tensor:
        """What the output is divided by before it joins the stream, (tokens,); 1 where there is no norm on its way."""
        return torch.ones_like(output[:, 0]) if self.norm is None else self.norm.length(output.float())

"""All maps of a block's polynomial fitted together: descent on the least squares that the readout alone is solved for.

    min over G, U, D, d and the coefficients of  Σ_t w_t ‖t_t − D p(G x_t, U x_t) − d‖²

The closed form keeps the original's directions G and U, and solves for each unit's polynomial and for the readout. It
is where this descent begins. It is block reconstruction (Li et al., BRECQ, arXiv 2102.05426, there for quantisation):
no backward pass through the network, one block in memory, on the tokens that wait at the block in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from surgery.calibration.arrivals import Station
from surgery.closed_form.forms import Affine, balanced, bilinear
from surgery.closed_form.least_squares import UnitPolynomials
from surgery.fitting.features import HiddenPolynomial
from surgery.fitting.objective import Aim, mistaken
from surgery.runtime import processes
from surgery.runtime.precision import autocast

ROWS, FEWEST_ROWS = 1024, 512  # tokens a step
STEPS = 14  # of an epoch, where that leaves a step its fewest rows
QUADRATIC_RATE, RATE = 0.03, 0.01  # of Adam, as a share of a map's root mean square; the latter for other degrees
BETAS = (0.9, 0.98)
WARM, LAST = 10, 0.02  # steps until the rate is full, and what is left of it at the end


@dataclass(frozen=True)
class _Batch:
    """The tokens of one batch, and what the units other than those of sinks should write there.

    Attributes:
        x, wanted: (tokens, d) and (tokens, out).
        root: √w, (tokens, 1); 0 where a token does not count.
        fitted, held: numbers of the rows to fit on, and of those to measure on.
    """

    number: int
    x: Tensor
    wanted: Tensor
    root: Tensor
    fitted: Tensor
    held: Tensor

    def parts(self, epoch: int, steps: int) -> tuple[Tensor, ...]:
        """The rows to fit on, by the step of an epoch that they come in."""
        generator = torch.Generator().manual_seed(self.number * 10_007 + epoch)
        order = torch.randperm(len(self.fitted), generator=generator)
        return self.fitted[order.to(self.fitted.device)].tensor_split(steps)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[rows], self.wanted[rows], self.root[rows]


class _Network(nn.Module):
    """The polynomial as parameters, in float32."""

    def __init__(self, hidden: HiddenPolynomial, readout: Affine) -> None:
        super().__init__()

        def parameter(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.float().clone())

        self.units = hidden.units
        self.product = _is_product(hidden.units)
        maps = {"gate": hidden.gate, "down": readout} | ({} if hidden.up is None else {"up": hidden.up})
        self.weight = nn.ParameterDict({name: parameter(one.weight) for name, one in maps.items()})
        self.bias = nn.ParameterDict({name: parameter(one.bias) for name, one in maps.items()})
        self.coefficients = nn.ParameterDict()
        if not self.product:
            self.coefficients["a"] = parameter(self.units.a)
            if self.units.b is not None:
                self.coefficients["b"] = parameter(self.units.b)

    def _through(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[name], self.bias[name])

    def hidden(self, x: Tensor) -> Tensor:
        """(tokens, h)."""
        u, v = self._through("gate", x), self._through("up", x) if "up" in self.weight else None
        if v is not None and self.product:
            return u * v
        return replace(self.units, **dict(self.coefficients))(u, v)

    def forward(self, x: Tensor) -> Tensor:
        return self._through("down", self.hidden(x))

    def result(self) -> tuple[HiddenPolynomial, Affine]:
        """As it stands now."""
        maps = {name: Affine(self.weight[name].detach(), self.bias[name].detach()) for name in self.weight}
        found = {name: value.detach() for name, value in self.coefficients.items()}
        return HiddenPolynomial(maps["gate"], maps.get("up"), replace(self.units, **found)), maps["down"]

    def rates(self, x: Tensor) -> list[tuple[nn.Parameter, float]]:
        """Every parameter's rate, by its size: a bias moves like the weight of a typical input.

        Args:
            x: some of the block's inputs.
        """
        with torch.no_grad():
            inputs = dict.fromkeys(self.weight, _size(x)) | {"down": _size(self.hidden(x))}
        rate = QUADRATIC_RATE if self.units.degree == 2 else RATE
        found: list[tuple[nn.Parameter, float]] = []
        for name, weight in self.weight.items():
            found += [(weight, _size(weight)), (self.bias[name], _size(weight) * inputs[name])]
        found += [(value, _size(value)) for value in self.coefficients.values()]
        return [(parameter, rate * size) for parameter, size in found]


class Reconstruction(NamedTuple):
    """Units, those of sinks last, float32; and the readout they were fitted with, (p, out) float64."""

    hidden: HiddenPolynomial
    readout: Tensor


def _size(value: Tensor) -> float:
    """Root mean square."""
    return float(value.square().mean().sqrt())


def reconstructed(
    hidden: HiddenPolynomial,
    readout: Tensor,
    station: Station,
    aim_of: Callable[[int], Aim],
    sink_units: int,
    epochs: int,
    matmul: str = "float32",
) -> Reconstruction | None:
    """A block's units and readout after descent from a first solution; None where held-out tokens gain nothing.

    Massive sinks take no part: the units that point at them, and what those write elsewhere, stay. Tokens that become
    sinks later do, with their weight: errors there decide what the sink will be.

    Args:
        hidden: the units, those of sinks last, float64.
        readout: the solution for them, (p, out).
        aim_of: what each batch is fitted to, by its number.
        epochs: how often every token is seen.
        matmul: what maps are multiplied in.
    """
    own = len(hidden.units.a) - sink_units
    pointing = hidden.gate.rows(torch.arange(own, own + sink_units)).to(readout.dtype)
    plain = hidden.keep_units(torch.arange(own))
    begin, down = _as_product(plain, Affine(readout[:own].T.contiguous(), readout[-1]))
    batches = list(_batches(station, aim_of, pointing, readout[own : own + sink_units]))
    network = _Network(begin, down).to(readout.device)
    if not _descend(network, batches, epochs, matmul):
        return None
    found, last = network.result()
    solution = torch.cat([last.weight.T.double(), readout[own : own + sink_units], last.bias[None].double()])
    return Reconstruction(found.with_sink_units(pointing.to(torch.float32)), solution)


def _is_product(units: UnitPolynomials) -> bool:
    """u v, with no numbers of its own."""
    return units.b is not None and units.degree == 2 and not bool(units.a.any()) and not bool(units.b[:, 0].any())


def _as_product(hidden: HiddenPolynomial, down: Affine) -> tuple[HiddenPolynomial, Affine]:
    """Quadratic gated units as products of two affine maps, each unit's maps of one norm; others as they are."""
    units = hidden.units
    if units.b is None or units.degree != 2 or hidden.up is None:
        return hidden, down
    form = bilinear(units.a, units.b, hidden.gate, hidden.up)
    down = Affine(down.weight, down.bias + down.weight @ form.remainder)
    gate, up, down = balanced(form.gate, form.up, down)
    b = torch.zeros_like(units.b)
    b[:, 1] = 1
    return HiddenPolynomial(gate, up, replace(units, a=torch.zeros_like(units.a), b=b)), down


def _batches(station: Station, aim_of: Callable[[int], Aim], pointing: Affine, sinks_down: Tensor) -> Iterator[_Batch]:
    for number, arrival in enumerate(station.twin):
        aim, at_sinks = aim_of(number), pointing.to(arrival.x.dtype)(arrival.x).square()
        counted = arrival.keep & ~aim.massive & ~(mistaken(at_sinks) & ~aim.sink)
        fitted, held = ((counted & (arrival.held == is_held)).nonzero()[:, 0] for is_held in (False, True))
        wanted = aim.wanted - at_sinks @ sinks_down.to(at_sinks) if len(sinks_down) else aim.wanted
        yield _Batch(station.number + number, arrival.x, wanted, aim.weight.sqrt()[:, None], fitted, held)


def _error(network: _Network, batches: list[_Batch]) -> float:
    """Σ w ‖t − f‖² over the held-out tokens."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            for rows in batch.held.split(ROWS):
                x, wanted, root = batch.at(rows)
                total += float(((network(x.float()) - wanted) * root).double().square().sum())
    return processes.sum_number(total)


def _descend(network: _Network, batches: list[_Batch], epochs: int, matmul: str) -> bool:
    """Adam, its rate falling to nearly nothing; leaves the epoch of the later half that was best on held-out tokens, if
    one gained."""
    rows = processes.sum_number(sum(len(batch.fitted) for batch in batches))
    steps = max(1, round(rows / min(ROWS, max(FEWEST_ROWS, rows / STEPS))))
    some = torch.cat([batch.x[batch.fitted[:64]] for batch in batches]).float()
    size = sum(float((batch.wanted * batch.root)[batch.fitted].double().square().sum()) for batch in batches)
    scale = max(processes.sum_number(size) / steps, 1e-30)
    parameters, rates = zip(*network.rates(processes.together(some)), strict=True)
    groups = [{"params": [parameter]} for parameter in parameters]
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=some.device.type in ("cpu", "cuda"))
    least, best = _error(network, batches), None
    for epoch in range(epochs):
        parts = [batch.parts(epoch, steps) for batch in batches]
        for step in range(steps):
            done = epoch * steps + step
            share = min(1.0, (done + 1) / WARM) * (LAST + (1 - LAST) * (1 - done / (epochs * steps)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            drawn = [batch.at(part[step]) for batch, part in zip(batches, parts, strict=True)]
            _gradients(network, drawn, scale, matmul)
            optimizer.step()
        if 2 * (epoch + 1) >= epochs and (error := _error(network, batches)) < least:
            least, best = error, {name: value.clone() for name, value in network.state_dict().items()}
    if best is not None:
        network.load_state_dict(best)
    return best is not None


def _gradients(network: _Network, parts: list[tuple[Tensor, Tensor, Tensor]], scale: float, matmul: str) -> None:
    """Of Σ w ‖t − f‖² over the tokens of all processes, as a share of `scale`."""
    x, wanted, root = (torch.cat(column) for column in zip(*parts, strict=True))
    network.zero_grad()
    with torch.enable_grad():
        with autocast(matmul, x.device):
            found = network(x.float())
        loss = ((found.float() - wanted) * root).square().sum() / scale
        loss.backward()
    for parameter in network.parameters():
        if parameter.grad is not None:
            processes.total(parameter.grad)

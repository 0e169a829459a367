"""One block's arrivals in, its polynomial or its experts' out."""

from __future__ import annotations

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from surgery.calibration.arrivals import Station
from surgery.closed_form.moments import GaussianMixture
from surgery.errors import CalibrationError
from surgery.fitting.block import FitSettings, FittedBlock, fit_block
from surgery.fitting.experts import FittedExperts, fit_experts
from surgery.runtime import weights_on_disk

CACHE_BYTES = 1 << 30  # hidden vectors kept per block, so that they are computed once


def fit(station: Station, settings: FitSettings, given: GaussianMixture | None = None) -> FittedBlock | FittedExperts:
    """One block's polynomial, or its experts'. Raises CalibrationError where there is none."""
    with weights_on_disk.weights_present(station.modules.values()):
        try:
            return _fit(station, settings, given)
        except LinAlgError as error:
            raise CalibrationError(
                f"the normal equations have no solution ({error})",
                where=station.block.path,
                cause="values too large for the precision the model computes in, or tokens all alike",
                fix="load it with --dtype float32, give other calibration text, or a lower degree",
            ) from error


def _fit(station: Station, settings: FitSettings, given: GaussianMixture | None) -> FittedBlock | FittedExperts:
    if station.block.routed:
        return fit_experts(station, settings)
    return fit_block(station, settings, given, CACHE_BYTES if station.block.calls == 1 else 0)

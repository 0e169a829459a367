"""What is calibrated on where nobody says: text of many kinds if it can be had, else the model's own samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from surgery.calibration.common_pile import PARTS
from surgery.calibration.hub_files import problem
from surgery.calibration.mixtures import Mixture
from surgery.calibration.samples import knows_english, start_tokens
from surgery.calibration.texts import BROAD, SAMPLES, label
from surgery.errors import CalibrationError

OFFLINE = (f"{SAMPLES}=4", "python", "code")  # what there is without a network
FEW_WINDOWS = 16
MOST_MISSING = 1 / 3  # of the shares of `broad`


def available(mixture: Mixture) -> tuple[Mixture, str]:
    """The mixture without the files of `broad` that cannot be had, and a plain word on them.

    Raises:
        CalibrationError: more than a third of `broad`, by share, is missing.
    """
    wanted = [part for part in mixture.parts if part.source in PARTS]
    if not wanted:
        return mixture, ""
    with ThreadPoolExecutor(len(wanted)) as threads:
        problems = dict(zip(wanted, threads.map(lambda part: problem(part.source), wanted), strict=True))
    missing = {part: why for part, why in problems.items() if why}
    if sum(part.share for part in missing) > MOST_MISSING * sum(part.share for part in wanted):
        raise CalibrationError(
            f"{len(missing)} of the {len(wanted)} files of {BROAD} cannot be had: {next(iter(missing.values()))}",
            where=BROAD,
            cause="no network",
            fix="--calibration samples needs none; text files of many kinds do better",
        )
    if not missing:
        return mixture, ""
    left, names = mixture.without(missing), ", ".join(label(part.source) for part in missing)
    return left, f"left out of {BROAD}, since they cannot be had: {names}"


def automatic(tokenizer: Any, generates: bool, windows: int) -> tuple[str | list[str], str]:
    """The sources for a model with this tokenizer, and a plain word on why they are not `broad`, where they are not.

    Args:
        generates: whether the model can draw samples.
        windows: how many will be read in all; few are not shared out.
    """
    samples = generates and tokenizer is not None and bool(start_tokens(tokenizer))
    if tokenizer is None or not knows_english(tokenizer):
        return SAMPLES if samples else "python", ""
    try:
        available(Mixture.of(BROAD))
    except CalibrationError as error:
        cost = "a quadratic twin of this loses a fifth more on texts of other kinds than one of broad text"
        sources = list(OFFLINE) if windows >= FEW_WINDOWS else SAMPLES
        return sources if samples else "python", f"{error.what}; {cost}; --calibration FILE.txt … mends it"
    return BROAD, ""

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

MOST_MISSING = 1 / 3  # of the shares of `broad`


def available(mixture: Mixture) -> tuple[Mixture, str]:
    """The mixture without the files of `broad` that cannot be fetched, and a plain word on them.

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
            f"{len(missing)} of the {len(wanted)} files of {BROAD} cannot be fetched: {next(iter(missing.values()))}",
            where=BROAD,
            cause="no network",
            fix="--text samples needs none; text files of many kinds do better",
        )
    if not missing:
        return mixture, ""
    left, names = mixture.without(missing), ", ".join(label(part.source) for part in missing)
    return left, f"left out of {BROAD}, since they cannot be fetched: {names}"


def automatic(tokenizer: Any, generates: bool) -> tuple[str, str]:
    """The source for a model with this tokenizer, and a plain word on why it is not `broad`, where it is not.

    Args:
        generates: whether the model can draw samples.
    """
    drawn = generates and tokenizer is not None and bool(start_tokens(tokenizer))
    otherwise = SAMPLES if drawn else "python"
    if tokenizer is None or not knows_english(tokenizer):
        return otherwise, ""
    try:
        available(Mixture.of(BROAD))
    except CalibrationError as error:
        cost = f"with {otherwise} instead a quadratic twin loses a fifth more, or worse, on texts of other kinds"
        return otherwise, f"{error.what}; {cost}; name your own texts with --text"
    return BROAD, ""

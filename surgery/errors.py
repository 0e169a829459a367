"""One small family of errors: what happened, where, the likely cause, the next step.

Every error a user can cause is a :class:`SurgeryError`; the command line prints it without a traceback and
exits with code 2. Anything else is a defect of this package and exits with code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER = 2


class SurgeryError(Exception):
    """A mistake the user can mend.

    Args:
        what: what happened, in one sentence.
        where: the file, block or option it happened at.
        cause: the likely cause.
        fix: the next step.
    """

    def __init__(self, what: str, *, where: str = "", cause: str = "", fix: str = "") -> None:
        self.what, self.where, self.cause, self.fix = what, where, cause, fix
        lines = [f"{where}: {what}" if where else what]
        if cause:
            lines.append(f"  likely cause: {cause}")
        if fix:
            lines.append(f"  next step: {fix}")
        super().__init__("\n".join(lines))


class RecipeError(SurgeryError):
    """A recipe or an option that cannot be followed."""


class ModelError(SurgeryError):
    """A model that cannot be loaded, or whose blocks cannot be converted."""


class CalibrationError(SurgeryError):
    """Calibration data that is missing, too short or not finite."""


class CheckpointError(SurgeryError):
    """A checkpoint that cannot be written, or does not load back as it was."""


class EvaluationError(SurgeryError):
    """Something that cannot be measured."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first, short enough for a line; its kind where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0][:300] if said else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""

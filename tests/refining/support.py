"""What the tests of refining share."""

from contextlib import contextmanager
from unittest import mock

import pytest

from surgery.refining.settings import RefineSettings
from surgery.refining.training import Training

BASES = {"native": "llama", "custom": "llama", "plain": "gpt2", "kin": "mistral"}


def settings_of(place, out, twin="native", **more):
    given = {"twin": str(place / twin), "original": str(place / BASES[twin]), "output": str(out), "tokens": 4096}
    given |= {"text": (str(place / "text.txt"),), "window": 32, "batch": 8, "accumulate": 1, "validate_tokens": 512}
    given |= {"dtype": "float32", "average": 0.5, "rate": 3e-3, "validate_every": 4}
    return RefineSettings(**(given | more))


@contextmanager
def interrupted(after):
    """Inside, a refinement is stopped as by Ctrl-C after so many looks at held-out text, the last of them kept."""
    real, looks = Training.keep, []

    def stop(self, folder):
        real(self, folder)
        looks.append(self.step)
        if len(looks) == after:
            raise KeyboardInterrupt

    with mock.patch.object(Training, "keep", stop), pytest.raises(KeyboardInterrupt):
        yield

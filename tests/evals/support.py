"""What the tests of evals share."""

from evals.settings import EvalSettings
from tests.commands import surgery


def run(*arguments):
    return surgery("eval", *arguments)


def settings_of(pair, **more):
    given = {"twin": str(pair / "twin"), "original": str(pair / "base"), "text": str(pair / "text.txt")}
    given |= {"tokens": 1024, "window": 32, "block_tokens": 512, "speed": False}
    return EvalSettings(**(given | more))

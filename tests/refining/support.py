"""What the tests of refining share."""

from surgery.refining.settings import RefineSettings

BASES = {"native": "llama", "custom": "llama", "plain": "gpt2", "kin": "mistral"}


def settings_of(place, out, twin="native", **more):
    given = {"twin": str(place / twin), "teacher": str(place / BASES[twin]), "output": str(out), "tokens": 4096}
    given |= {"text": (str(place / "text.txt"),), "length": 32, "batch": 8, "accumulate": 1, "validate_tokens": 512}
    given |= {"precision": "float32", "average": 0.5, "rate": 3e-3, "validate_every": 4}
    return RefineSettings(**(given | more))

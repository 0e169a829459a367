"""Every command in README and docs is run here, or named with the reason why not."""

import re
import shlex
from pathlib import Path

import pytest

import surgery
from tests import tiny
from tests.commands import surgery as typed
from tests.reading import dictionaries

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT = ("log.md", "architectures.md", "python.md")  # history, generated, and run by test_python_page.py

SMALL = {
    "convert": "--tokens 2048 --window 32 --measure 256",
    "eval": "--original MODEL --tokens 512 --window 32 --block-tokens 256 --kind-tokens 256 --no-speed --no-cache",
    "refine": "--original MODEL --tokens 2048 --window 32 --validate-tokens 256",
    "explain": "--tokens 512 --window 32",
    "trace": "--tokens 512 --window 32",
}
"""Added to a command, since what is documented would take minutes; and the original, which is not on the Hub here."""

WORDS = {
    "20": "1",
    "26": "1",
    "token: Paris": "token:fox",
    "token: London": "token:dog",
    "CKPT1": "MODEL",
    "CKPT2": "MODEL",
    "feature:FEATURE": "feature:3",
    "17=EARLIER/output": "0=EARLIER/output",
}
WORDS |= {"build/SmolLM2-135M-Instruct.Q4_1.gguf": "MODEL", "twin": "TWIN", "build/demo/degree-2": "TWIN"}
"""What stands for another word with a tiny model."""

NOT_RUN = {
    r"pip install .*": "it installs",
    r"make \w+": "`.ci/run` runs `make test`; `make demo` fetches a model",
    r"python recipes/blimp\.py .*": "the data are not there",
    r"python recipes/dictionaries\.py .*": "tests/whole/test_real.py runs it",
    r"python recipes/encrypted\.py .*": "tests/whole/test_real.py runs it",
    r"surgery export .*--form gguf.*": "tests/publishing/test_gguf.py exports models whose tokenizer GGUF knows",
    r"python benchmarks/.*": "they take minutes",
    r"surgery eval .*--tasks .*": "lm-eval's tasks need a network; tests/evals/test_harness.py runs local ones",
    r"surgery (refine|eval) .*--nproc .*": "tests/refining/test_sharding.py and tests/evals run several processes",
    r"surgery run .*": "tests/runs runs recipes, and checks all of recipes/",
    r"surgery explain .*--expert .*": "tests/reading/test_experts.py explains a mixture",
}
"""Patterns of commands, and why they are not run here."""


def commands():
    """(page, command) each, comments and continued lines put right."""
    found = []
    for page in PAGES:
        if page.name in WITHOUT:
            continue
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ")
                if re.match(r"(surgery|python|make|pip|accelerate) ", words):
                    found.append((page.name, words))
    return found


def test_there_are_commands_and_every_reason_is_needed():
    words = [command for _, command in commands()]
    assert len(words) > 30
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in words), f"nobody documents {pattern}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama, its twin, and the texts that the pages speak of."""
    folder = tmp_path_factory.mktemp("documented")
    tiny.save_with_tokenizer("llama", folder / "MODEL")
    surgery.convert(folder / "MODEL", output=folder / "TWIN", text="python", tokens=2048, window=32, measure=0)
    paragraph = "the quick brown fox jumps over the lazy dog, and a line follows another. "
    for name in ("alice", "hamlet", "novels", "sentences", "mine"):
        (folder / f"{name}.txt").write_text("\n\n".join([paragraph * 3] * 200))
    for number, name in enumerate(("DICT", "DICTIONARIES/input", "DICTIONARIES/output", "EARLIER/output")):
        dictionaries.write(folder / name, dictionaries.exact(dictionaries.orthogonal(tiny.WIDTH, number)))
    return folder


RUN = [(page, command) for page, command in commands() if not any(re.fullmatch(key, command) for key in NOT_RUN)]


@pytest.mark.parametrize(("page", "command"), RUN, ids=[f"{page}: {command}" for page, command in RUN])
def test_a_documented_command_runs(page, command, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for item in place.iterdir():
        (tmp_path / item.name).symlink_to(item)
    if "export kept" in command:
        (tmp_path / "kept").symlink_to(place / "kept")
        surgery.convert(
            "MODEL", output=place / "kept", degree=3, readout="keep", text="python", tokens=2048, window=32, measure=0
        )  # fmt: skip
    first, *words = shlex.split(command)
    assert first == "surgery", f"{page}: {command}"
    words = [WORDS.get(word, word) for word in words if word != "…"]
    if {"-o", "TWIN"} <= set(words):
        words[words.index("-o") + 1] = "OUT"
    done = typed(*words, *shlex.split(SMALL.get(words[0], "")))
    assert done.returncode == 0, done.stderr

"""The recipe for a GPU, rehearsed on a CPU with a tiny model: killed in the middle, it goes on, and tells all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import tiny

RECIPE = Path(__file__).parents[2] / "recipes" / "gpu.py"
MINUTES = 5


def start(place, *more):
    options = "-o out --text text.txt=2 --text samples --kind own=text.txt --kind code=code --minutes 0.01"
    options += " --convert-tokens 4k --window 32 --batch 8 --no-speed"
    here = {"XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(RECIPE), "model", *options.split(), *more]
    return subprocess.Popen(
        words, cwd=place, env=os.environ | here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_in_the_middle_it_goes_on_and_tells_all(tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and so on to the end. " * 1500)
    out = tmp_path / "out"
    first, begun = start(tmp_path), time.monotonic()
    while not (out / "refined.refining").is_dir():  # both conversions are done, and the refinement has begun
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() - begun < 60 * MINUTES
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    plan, record = (json.loads((out / name).read_text()) for name in ("plan.json", "run.json"))
    assert plan["tokens"] == 8 * 32 * 8, "no minutes are left: the least there is"
    second = start(tmp_path)
    said, errors = second.communicate(timeout=60 * MINUTES)
    assert second.returncode == 0, errors
    assert json.loads((out / "plan.json").read_text()) == plan
    after = json.loads((out / "run.json").read_text())["stages"]
    done = [name for name in record["stages"] if name.startswith("convert")]
    assert len(done) == 2
    assert all(after[name] == record["stages"][name] for name in done), "what was done is not done again"
    results = sorted(path.name for path in (out / "results").iterdir())
    assert {"table.json", "table.md", "run.png"} <= set(results)
    assert len(results) <= 8
    assert all((out / "results" / name).stat().st_size < 2**24 for name in results)
    table = (out / "results" / "table.md").read_text()
    assert table in said
    assert "drawing samples" in table
    for words in ("CPU", "forward, original", "fine-tuning, original", "| refined | own | ", "| degree-3 | code | "):
        assert words in table
    told = json.loads((out / "results" / "table.json").read_text())
    assert told["curve"][-1]["tokens"] == plan["tokens"]
    assert min(told["speeds"]["forward"], told["speeds"]["fine_tuning"]) > 0
    assert all(stage["seconds"] > 0 for stage in told["stages"].values())

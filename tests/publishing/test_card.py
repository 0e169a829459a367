"""The card says what the reports say."""

import json
import os
import re
import shutil
import subprocess
import sys

import torch
import transformers
import yaml

import surgery
from surgery.publishing.card import card, render_card
from tests import tiny


def test_the_card_tells_what_the_reports_say(twins, tmp_path):
    folder = tmp_path / "twin"
    shutil.copytree(twins / "native", folder)
    bare = render_card(folder)
    assert "No evaluation was run" in bare.text
    assert len(bare.missing) == 3
    from evals.evaluation import measure
    from evals.memo import Memo
    from evals.report import write_evaluation
    from evals.settings import EvalSettings

    given = {"twin": str(folder), "original": str(twins / "base"), "tokens": 1024, "window": 32, "speed": False}
    found = measure(EvalSettings(**given), Memo(None))
    write_evaluation(found, folder / "evaluation")
    made = card(folder, base_model="them/base", license="apache-2.0")
    assert made.missing == ()
    assert f"{found['text']['perplexity']['twin']:.3f}" in made.text
    assert "evaluation/blocks.png" in made.text
    assert (folder / "evaluation" / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert "silently wrong" in made.text
    from evals.kinds import compare_kinds
    from evals.kinds_report import write_kinds
    from evals.pair import load_pair
    from surgery.saving.evaluation import interval

    pair, sources = load_pair(str(folder), str(twins / "base")), {"code": "code", "manual": "python"}
    kinds = compare_kinds(pair, str(folder), sources, tokens=256, window=32)
    write_kinds(kinds, folder / "evaluation")
    made = card(folder, base_model="them/base", license="apache-2.0")
    (seen, unseen) = sorted(kinds["kinds"], key=lambda row: row["kind"], reverse=True)
    assert f"| {interval(seen['nats_lost'])} | {seen['divergence']['value']:.3f} | another part of it" in made.text
    assert f"Over 1 unseen kind: {interval(unseen['nats_lost'])}" in made.text
    assert "evaluation/texts.png" in made.text
    assert (folder / "README.md").read_text() == made.text
    from huggingface_hub import ModelCard

    assert ModelCard(made.text).data.to_dict()["base_model"] == "them/base"
    recipe = made.text.split("```yaml\n")[1].split("```")[0]
    from surgery.conversion.recipe import load_recipe

    assert load_recipe(None, yaml.safe_load(recipe)).degree == 2
    surgery.export(folder, tmp_path / "silu")
    of_export = render_card(tmp_path / "silu", base_model="them/base", license="apache-2.0")
    assert of_export.missing == () and "Measured on twin, of which this is another form." in of_export.text
    assert "of which this is another form" not in made.text


NASTY = "<script>alert(1)</script> | `x` \x1b[31m\n# heading\n```\n---\n[link](javascript:x)\u202e"


def test_nothing_from_a_checkpoint_is_more_than_text_in_the_card(twins, tmp_path):
    folder = tmp_path / "twin"
    shutil.copytree(twins / "custom", folder)
    report = json.loads((folder / "surgery.json").read_text())
    plain = render_card(folder).text
    report["source"] |= {"name": NASTY, "architecture": NASTY}
    report["calibration"]["source"] = NASTY
    report["perplexity"]["text"] = NASTY
    report["left_alone"] = [{"path": NASTY, "reason": NASTY}]
    report["blocks"][0]["path"] = NASTY
    report["recipe"] |= {"model": NASTY, "text": NASTY}
    report["versions"]["python"] = NASTY
    (folder / "surgery.json").write_text(json.dumps(report))
    text = render_card(folder).text
    assert "<script" not in text.split("```yaml")[0] and "\x1b" not in text and "\u202e" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    known = [line for line in plain.splitlines() if line.startswith("#")]
    assert len(headings) == len(known) and headings[1:] == known[1:]
    assert text.count("\n```") == plain.count("\n```") and text.count("\n---") == plain.count("\n---")
    for line in text.splitlines():
        if line.startswith("| ") and "alert" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4), line
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])
    assert recipe["model"] == recipe["text"] == NASTY, "a recipe keeps what it says"


def test_the_card_begins_with_what_it_cost_and_how_to_use_it(twins):
    headings = [line for line in render_card(twins / "native").text.splitlines() if line.startswith("## ")]
    assert headings[:3] == ["## What it cost", "## Usage", "## What it is"]


def test_the_usage_is_of_the_class_the_twin_has(tmp_path):
    ids = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
    heads = {"bert": "ForMaskedLM", "vit": "ForImageClassification", "llama": "ForCausalLM"}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code")}
    for name, head in heads.items():
        folder = tmp_path / name
        surgery.convert(tiny.make(name), text=tiny.inputs_for(name, ids), degree=3, output=folder)
        usage = render_card(folder).text.split("```python\n")[1].split("```")[0].replace("REPOSITORY", str(folder))
        assert f"model = AutoModel{head}.from_pretrained(" in usage and "Tokenizer" not in usage
        command = [sys.executable, "-c", usage]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    surgery.convert(tmp_path / "base", text="python", tokens=2048, window=32, measure=0, output=tmp_path / "speaks")
    usage = render_card(tmp_path / "speaks").text.split("```python\n")[1].split("```")[0]
    pasted = usage.replace("REPOSITORY", str(tmp_path / "speaks"))
    done = subprocess.run([sys.executable, "-c", pasted], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "it writes"
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "vit")
    usage = render_card(tmp_path / "vit").text
    assert 'processor = AutoImageProcessor.from_pretrained("REPOSITORY")' in usage

"""The card says what the reports say."""

import yaml

from surgery.publishing.card import card, render_card


def test_the_card_tells_what_the_reports_say(twins, tmp_path):
    import shutil

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
    made = card(folder, base_model="them/base", licence="apache-2.0")
    assert made.missing == ()
    assert f"{found['text']['perplexity']['twin']:.3f}" in made.text
    assert "evaluation/blocks.png" in made.text
    assert (folder / "evaluation" / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert "silently wrong" in made.text
    from evals.kinds import compare_kinds
    from evals.kinds_report import write_kinds
    from surgery.saving.evaluation import interval

    kinds = compare_kinds(str(folder), str(twins / "base"), {"code": "code", "manual": "python"}, tokens=256, window=32)
    write_kinds(kinds, folder / "evaluation")
    made = card(folder, base_model="them/base", licence="apache-2.0")
    (seen, unseen) = sorted(kinds["kinds"], key=lambda row: row["kind"], reverse=True)
    assert f"| {interval(seen['nats_lost'])} | {seen['divergence']['value']:.3f} | another part of it" in made.text
    assert f"Over 1 unseen kinds: {interval(unseen['nats_lost'])}" in made.text
    assert "evaluation/texts.png" in made.text
    assert (folder / "README.md").read_text() == made.text
    from huggingface_hub import ModelCard

    assert ModelCard(made.text).data.to_dict()["base_model"] == "them/base"
    recipe = made.text.split("```yaml\n")[1].split("```")[0]
    from surgery.conversion.recipe import load_recipe

    assert load_recipe(None, yaml.safe_load(recipe)).degree == 2

"""What stands beside the recipes of whole runs (tests/runs/test_recipe.py)."""

from pathlib import Path

import yaml

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_accelerate_configurations_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for name, processes in (("one_gpu", 1), ("eight_gpus", 8)):
        file = RECIPES / "accelerate" / f"{name}.yaml"
        assert load_config_from_file(str(file)).num_processes == processes
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"

"""The classes a custom twin is loaded as: by every Auto class that takes its original, and by pickle."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import surgery
from surgery.models import modeling_polynomial
from tests import tiny

EVERY = [name for name in vars(modeling_auto) if name.startswith("AutoModelFor") or name == "AutoModel"]
OTHER_INPUTS = ("AutoModelForMultipleChoice", "AutoModelForMaskedImageModeling")
OTHER_NAMES = ("LlamaForQuestionAnswering",)  # for the body: into it no Llama of another kind is loaded, stock or not
NAMES = ("llama", "gpt2", "bert", "vit")

LOADED_ELSEWHERE = """
import json, pickle, sys, tempfile, torch, transformers
found = {}
for folder, inputs, names in json.loads(sys.argv[1]):
    for name in names:
        auto = getattr(transformers, name)
        torch.manual_seed(0)
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        model.eval()
        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            second, later = auto.from_pretrained(again, trust_remote_code=True, output_loading_info=True)
        x = {key: torch.tensor(value) for key, value in inputs.items()}
        with torch.no_grad():
            one, two, three = (m(**x)[0] for m in (model, second.eval(), pickle.loads(pickle.dumps(model))))
        found[f"{folder} {name}"] = {
            "class": type(model).__name__,
            "missing": sorted(info["missing_keys"]),
            "later": sorted(later["missing_keys"]),
            "same": torch.allclose(one, two, atol=1e-6) and torch.allclose(one, three, atol=1e-6),
            "blocks": [type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Polynomial")],
        }
print(json.dumps(found))
"""


def taking(twin):
    """Auto classes that take a twin's original, and the classes each has for it."""
    config = transformers.CONFIG_MAPPING[twin.config.base_model_type]
    found = {name: getattr(modeling_auto, name)._model_mapping.get(config, None) for name in EVERY}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in found.items() if value}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp(name)
        ids = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
        given = tiny.inputs_for(name, ids)
        inputs = given if isinstance(given, dict) else {"input_ids": given}
        model, _ = surgery.convert(tiny.make(name), text=inputs, degree=3, output=place / "twin")
        made[name] = model, place / "twin", {key: value[:1] for key, value in inputs.items()}
    return made


def test_every_auto_class_that_takes_the_original_takes_the_twin_without_this_package(twins, tmp_path):
    asked, expected = [], {}
    for model, folder, inputs in twins.values():
        served = taking(model)
        assert set(model.config.auto_map) == {"AutoConfig", *served}
        names = [name for name in served if name not in OTHER_INPUTS and served[name][0].__name__ not in OTHER_NAMES]
        asked.append((str(folder), {key: value.tolist() for key, value in inputs.items()}, names))
        own = getattr(transformers, model.config.base_architecture)
        for name in names:
            cls = own if own in served[name] else served[name][0]
            expected[f"{folder} {name}"] = cls, cls is own
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", LOADED_ELSEWHERE, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == expected.keys() and len(found) > 15
    for key, (cls, own) in expected.items():
        seen = found[key]
        assert seen["class"] == f"Polynomial{cls.__name__}", key
        assert seen["same"] and seen["later"] == [], (key, seen)
        assert "PolynomialGLU" in seen["blocks"] or seen["blocks"].count("PolynomialActivation") == 2, (key, seen)
        assert not any("layer" in name or own for name in seen["missing"]), (key, seen)


def test_twins_and_their_configurations_are_pickled(twins):
    for model, folder, inputs in twins.values():
        again = pickle.loads(pickle.dumps(model))
        assert type(again) is type(model) and type(again.config) is type(model.config)
        assert again.config.to_dict() == model.config.to_dict()
        with torch.no_grad():
            assert torch.equal(again.eval()(**inputs)[0], model(**inputs)[0])
        torch.save(model, folder / "whole.pt")
        assert type(torch.load(folder / "whole.pt", weights_only=False)) is type(model)
    with pytest.raises(AttributeError, match="PolynomialNothing"):
        modeling_polynomial.PolynomialNothing  # noqa: B018


def test_a_class_the_blocks_have_no_place_in_is_refused():
    model, _ = surgery.convert(tiny.make("llama"), text=torch.arange(3, 67).repeat(64, 1), degree=3)
    config = model.config
    with pytest.raises(ValueError, match=r"nothing at model\.layers\.0\.mlp in PolynomialLlamaForQuestionAnswering"):
        modeling_polynomial.dispatcher("AutoModelForQuestionAnswering")._from_config(config)
    config.polynomial_blocks = [block | {"path": "elsewhere.0.mlp"} for block in config.polynomial_blocks]
    with pytest.raises(ValueError, match=r"nothing at elsewhere\.0\.mlp in PolynomialLlamaModel"):
        modeling_polynomial.dispatcher("AutoModel")._from_config(config)

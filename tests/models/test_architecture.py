"""A checkpoint whose configuration names a class that transformers does not have."""

import json

import pytest
import torch
import transformers as T

import surgery
from surgery.errors import ModelError
from surgery.models.loading import loaded
from tests import commands, tiny

IDS = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(1))


def saved(model, folder, **changes):
    """A checkpoint under a name of the author's own."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]} | changes))
    return folder


@pytest.mark.parametrize(("decoder", "expected"), [(False, "BertForMaskedLM"), (True, "BertLMHeadModel")])
def test_the_weights_and_the_configuration_say_which_class_it_is(decoder, expected, tmp_path):
    folder = saved(tiny.make("bert"), tmp_path / "model", is_decoder=decoder)
    found = loaded(str(folder))
    assert type(found.model).__name__ == found.source.architecture == expected
    assert f"names Mine, by its weights it is a {expected}".replace(",", ";") in found.source.note
    assert surgery.inspect(folder).architecture == expected


def test_a_twin_of_it_is_what_it_is(tmp_path):
    """Inspected and converted without a word it was once a causal model, since that comes first."""
    folder = saved(tiny.make("bert"), tmp_path / "model")
    twin, report = surgery.convert(folder, text=IDS, window=32, degree=3, output=tmp_path / "twin", measure=0)
    assert "BertForMaskedLM" in report.source["note"]
    again = surgery.load(tmp_path / "twin")
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=IDS[:2]).logits, twin(input_ids=IDS[:2]).logits, rtol=1e-4, atol=1e-4
        )
        original = T.BertForMaskedLM.from_pretrained(folder)(input_ids=IDS[:2]).logits
    assert (again(input_ids=IDS[:2]).logits - original).norm() < 0.5 * original.norm()
    shown = commands.surgery("inspect", folder)
    assert shown.returncode == 0 and "by its weights it is a BertForMaskedLM" in shown.stdout


def test_weights_that_are_left_over_are_named(tmp_path):
    model = tiny.make("bert")
    model.extra = torch.nn.Linear(3, 3)
    found = loaded(str(saved(model, tmp_path / "model")))
    assert "all but 2, which are left out: extra.bias, extra.weight" in found.source.note


def test_what_may_be_several_classes_is_asked_about(tmp_path):
    one = T.BertForSequenceClassification(T.BertConfig(**tiny.COMMON, num_labels=1))  # or multiple choice
    folder = saved(one, tmp_path / "model", num_labels=1, id2label={"0": "a"}, label2id={"a": 0})
    with pytest.raises(ModelError, match="BertForMultipleChoice, BertForSequenceClassification") as caught:
        loaded(str(folder))
    assert '"architectures": ["BertForMultipleChoice"]' in str(caught.value)
    shown = commands.surgery("convert", folder, "-o", tmp_path / "twin")
    assert shown.returncode == 2 and "Traceback" not in shown.stderr and not (tmp_path / "twin").exists()


def test_weights_of_none_of_the_classes_are_refused(tmp_path):
    model = tiny.make("bert")
    folder = saved(model, tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(ModelError, match="finds all of its weights"):
        loaded(str(folder))

"""Which parameters are trained."""

import pytest

import surgery
from surgery.errors import RecipeError
from surgery.refining.parameters import named_trainable


@pytest.mark.parametrize("which", ["coefficients", "readout", "block", "all"])
def test_what_is_trained_is_what_was_asked_for(place, which):
    twin = surgery.load(str(place / "custom"))
    chosen = named_trainable(twin, which)
    assert {name for name, p in twin.named_parameters() if p.requires_grad} == set(chosen)
    expected = {
        "coefficients": lambda name: name.endswith("coefficients"),
        "readout": lambda name: "down_proj" in name,
        "block": lambda name: ".mlp." in name,
        "all": lambda name: True,
    }[which]
    assert set(chosen) == {name for name, _ in twin.named_parameters() if expected(name)}


def test_a_native_twin_has_no_coefficients_to_train(place):
    with pytest.raises(RecipeError, match="no coefficients"):
        named_trainable(surgery.load(str(place / "native")), "coefficients")
    with pytest.raises(RecipeError, match="did you mean 'readout'"):
        named_trainable(surgery.load(str(place / "native")), "readouts")

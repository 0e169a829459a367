"""Explanations of tiny twins: the block read is the block that runs, norms and directions mean what they say."""

import pytest
import torch

import surgery
from surgery.calibration.inputs import calibration_inputs
from surgery.errors import RecipeError, SurgeryError
from surgery.models import loading
from surgery.reading.activity import Activity, examples
from surgery.reading.block_in_model import NotATwinError, find_block, recorded_activity
from surgery.reading.explanation import ExplainSettings, explained
from tests.reading.support import TEXT


def test_coordinates_agree_with_dense_linear_algebra(folders, report):
    """λ in data coordinates: the generalised eigenvalues of Γ against Σ⁻¹, computed another way."""
    model = surgery.load(folders["twin"])
    place = find_block(model, 1)
    raw = explained(ExplainSettings(folders["twin"], 1, "coordinate:3", pairs=32, **TEXT))
    w = torch.eye(32, dtype=torch.float64)[3]
    gamma = place.polynomial.expand().quadratic(w).dense()
    expected = torch.linalg.eigvalsh(gamma)
    found = torch.tensor([pair["value"] for pair in raw["eigenpairs"]], dtype=torch.float64).sort().values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    data = explained(ExplainSettings(folders["twin"], 1, "coordinate:3", pairs=32, coordinates="data", **TEXT))
    assert data["spectrum"]["square"] != pytest.approx(raw["spectrum"]["square"])
    calibration = calibration_inputs(
        "python", model, loading.loaded(folders["twin"]).tokenizer, tokens=1024, length=32, batch=8
    )
    recorded = recorded_activity(model, place, calibration.batches)
    seen = Activity.of(torch.cat([batch["input_ids"] for batch in calibration.batches]), recorded.x, recorded.size)
    found = torch.tensor([pair["value"] for pair in data["eigenpairs"]], dtype=torch.float64)
    expected = torch.linalg.eigvals(gamma @ seen.covariance).real
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-6, atol=1e-9)


def test_shares_are_of_the_whole(report):
    parts = report["parts"]
    assert parts["linear"] + parts["quadratic"] + parts["higher"] == pytest.approx(1)
    assert abs(parts["higher"]) < 1e-6, "a quadratic block has no higher part"
    assert 0 < report["spectrum"]["explained"] <= 1 + 1e-9
    assert all(a["share"] >= b["share"] for a, b in zip(report["eigenpairs"], report["eigenpairs"][1:], strict=False))


def test_a_cubic_twin_has_a_higher_part_and_unconverted_blocks_are_named(folders):
    found = explained(ExplainSettings(folders["partial"], 1, "coordinate:0", **TEXT))
    assert abs(found["parts"]["higher"]) > 1e-6
    with pytest.raises(RecipeError, match=r"block 0 .* was not converted[\s\S]*choose one of 1"):
        explained(ExplainSettings(folders["partial"], 0, "coordinate:0", **TEXT))


def test_contexts_show_the_token_that_drives_them(folders):
    tokenizer = loading.loaded(folders["twin"]).tokenizer
    ids = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))
    values = torch.zeros(128)
    values[40], values[44], values[100], values[7] = 5.0, 4.0, 3.0, 9.0
    ordinary = torch.ones(128, dtype=torch.bool)
    ordinary[7] = False  # an attention sink
    seen = Activity(ids, torch.zeros(128, 2), ordinary, torch.zeros(2), torch.eye(2))
    found = examples(seen, values, tokenizer, 2)
    assert [item["value"] for item in found] == [5.0, 3.0], "44 is too near to 40; 7 is a sink"
    for item, (row, column) in zip(found, ((1, 8), (3, 4)), strict=True):
        assert item["tokens"][item["peak"]] == tokenizer.decode([int(ids[row, column])])
        assert item["values"][item["peak"]] == item["value"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"twin": "original", "block": 0}, "--fit"),
        ({"twin": "affine", "block": 0}, "affine"),
        ({"block": 2}, "blocks 0 to 1"),
        ({"direction": "token:quick brown"}, "one token"),
        ({"direction": "tokn:x"}, "did you mean 'token'"),
        ({"direction": "Paris"}, "token:TEXT"),
        ({"direction": "coordinate:32"}, "0 to 31"),
        ({"direction": "neuron:1.3"}, "does not come after"),
        ({"direction": "neuron:x"}, "BLOCK.UNIT"),
        ({"direction": "class:0"}, "no linear classifier"),
        ({"direction": "file:/nowhere.pt"}, "no such file"),
        ({"minus": "coordinate:1"}, "--minus"),
    ],
)
def test_bad_questions_get_clear_answers(folders, settings, words):
    chosen = {"twin": "twin", "block": 1, **settings, **TEXT}
    chosen["twin"] = folders[chosen["twin"]]
    with pytest.raises(SurgeryError, match=words):
        explained(ExplainSettings(**chosen))


def test_a_block_can_be_fitted_on_the_fly(folders):
    with pytest.raises(NotATwinError):
        find_block(surgery.load(folders["original"]), 0)
    found = explained(ExplainSettings(folders["original"], 1, "coordinate:0", fit=2, **TEXT))
    assert found["block"]["degree"] == 2
    assert found["block"]["path"] == "model.layers.1.mlp"
    assert explained(ExplainSettings(folders["partial"], 0, "coordinate:0", fit=2, **TEXT))["block"]["degree"] == 2


def test_the_blocks_own_directions(folders):
    found = explained(ExplainSettings(folders["twin"], 1, pairs=3, **TEXT))["own"]
    assert [row["name"] for row in found["quadratic"]] == ["quadratic:0", "quadratic:1", "quadratic:2"]
    assert found["linear"][0]["share"] >= found["linear"][1]["share"]
    assert explained(ExplainSettings(folders["twin"], 1, "quadratic:0", **TEXT))["direction"]["norm"] == pytest.approx(
        1
    )

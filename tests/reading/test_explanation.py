"""Explanations of tiny twins: the block read is the block that runs, norms and directions mean what they say."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn

import surgery
from surgery.calibration.inputs import calibration_inputs
from surgery.cli.main import cli
from surgery.errors import RecipeError, SurgeryError
from surgery.models import loading
from surgery.reading.activity import Activity, examples
from surgery.reading.directions import NormScale, Vocabulary, named_direction
from surgery.reading.explanation import ExplainSettings, explained
from surgery.reading.page import JSON, PAGE, PLOT, write_explanation
from surgery.reading.place import NotATwinError, activity, find_block, surroundings
from tests import tiny

TEXT = {"tokens": 1024, "window": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An original with its tokenizer, and twins of it."""
    place = tmp_path_factory.mktemp("explain")
    tiny.save_with_tokenizer("llama", place / "original")
    made = {"original": str(place / "original")}
    settings = {"tokens": 2048, "length": 32, "measure": 0}
    for name, more in {"twin": {}, "partial": {"blocks": "1", "degree": 3}, "affine": {"degree": 1}}.items():
        made[name] = str(place / name)
        surgery.convert(made["original"], output=made[name], calibration="python", **settings, **more)
    return made


@pytest.fixture(scope="module")
def report(folders):
    return explained(ExplainSettings(folders["twin"], 1, "token:fox", pairs=4, **TEXT))


def twin_of(name, ids, degree=2):
    return surgery.convert(tiny.make(name), calibration=tiny.inputs_for(name, ids), degree=degree, batch=16)[0]


@pytest.mark.parametrize(
    ("name", "degree"),
    [("llama", 2), ("qwen3", 3), ("gpt2", 3), ("opt", 2), ("phi3", 2), ("bert", 2), ("gpt2", 1), ("phi", 2)],
)
def test_the_polynomial_read_is_the_block_that_runs(name, degree, ids):
    model = twin_of(name, ids, degree)
    place = find_block(model, 1)
    x, y, _ = activity(model, place, [{"input_ids": ids[:4]}])
    assert place.polynomial.degree == degree
    torch.testing.assert_close(place.polynomial(x.double()).float(), y, rtol=1e-4, atol=1e-5)


def test_stopping_at_the_block_changes_nothing_it_sees(ids):
    model = twin_of("llama", ids)
    place, seen = find_block(model, 0), []
    handle = place.entry.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids[:4])
    handle.remove()
    x, _, _ = activity(model, place, [{"input_ids": ids[:2]}, {"input_ids": ids[2:4]}])
    torch.testing.assert_close(x, seen[0])


@pytest.mark.parametrize(
    ("name", "norm", "final", "after"),
    [
        ("llama", "model.layers.1.post_attention_layernorm", "model.norm", False),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm", "model.norm", True),
        ("gpt2", "transformer.h.1.ln_2", "transformer.ln_f", False),
        ("opt", "model.decoder.layers.1.final_layer_norm", "model.decoder.final_layer_norm", False),
        ("bert", "bert.encoder.layer.1.attention.output.LayerNorm", "cls.predictions.transform.LayerNorm", False),
    ],
)
def test_norms_are_found_by_what_they_write(name, norm, final, after, ids):
    model = twin_of(name, ids)
    place = surroundings(model, find_block(model, 1), {"input_ids": ids[:1]})
    assert place.norm is model.get_submodule(norm)
    assert place.final_norm is model.get_submodule(final)
    assert place.normed_after is after


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
def test_a_direction_behind_a_norm_is_read_off_the_stream_before_it(kind, width):
    torch.manual_seed(0)
    norm = {
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(width),
        "gemma": lambda: transformers.models.gemma.modeling_gemma.GemmaRMSNorm(width),
    }[kind]()
    for parameter in norm.parameters():
        parameter.data.normal_()
    r, e = torch.randn(5, width), torch.randn(width)
    behind = (norm(r) - norm(torch.zeros(1, width))) @ e
    scale = r.std(-1, unbiased=False) if kind == "layer" else r.square().mean(-1).sqrt()
    before = r.double() @ NormScale.of(norm, width).before(e.double())
    torch.testing.assert_close(before, (behind * scale).double(), rtol=2e-4, atol=2e-4)


def test_a_tokens_direction_is_the_derivative_of_its_logit(folders):
    """d(logit − mean logit)/d(what the last block writes), up to the final norm's own scale (and its share along r)."""
    loaded = loading.loaded(folders["twin"])
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.arange(3, 11)[None]
    place = surroundings(model, find_block(model, 1), {"input_ids": ids})
    w = named_direction("token:fox", model, tokenizer, place, place.polynomial.expand()).vector
    stream = {}
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: stream.update(r=args[0][0, -1]))
    with torch.no_grad():
        model(ids)
    handle.remove()

    def logit(r):
        logits = model.lm_head(model.model.norm(r[None]))[0]
        return logits[tokenizer.convert_tokens_to_ids("fox")] - logits.mean()

    r = stream["r"]
    gradient = torch.autograd.functional.jacobian(logit, r).double()
    across = w - r.double() * (w @ r.double()) / r.double().square().sum()  # a norm does not see growth along r
    torch.testing.assert_close(gradient * r.square().mean().sqrt(), across, rtol=1e-3, atol=1e-4)


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
    x, _, size = activity(model, place, calibration.batches)
    seen = Activity.of(torch.cat([batch["input_ids"] for batch in calibration.batches]), x, size)
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


def test_vocabulary_ends_are_ordered(folders):
    loaded = loading.loaded(folders["twin"])
    model = loaded.model
    place = surroundings(model, find_block(model, 1), {"input_ids": torch.arange(3, 11)[None]})
    words = Vocabulary.of(model, loaded.tokenizer, place)
    covector = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = words.inputs(covector, 3)
    score = model.model.layers[1].post_attention_layernorm(model.model.embed_tokens.weight).detach().double() @ covector
    assert [row["token"] for row in ends["positive"]] == [loaded.tokenizer.decode([i]) for i in score.topk(3).indices]
    assert ends["negative"][0]["score"] < 0 < ends["positive"][0]["score"]
    assert all(abs(row["score"]) <= 1 for end in words.predictions(covector, 5).values() for row in end)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"twin": "original", "block": 0}, "--fit"),
        ({"twin": "affine", "block": 0}, "affine"),
        ({"block": 2}, "blocks 0 to 1"),
        ({"output": "token:quick brown"}, "one token"),
        ({"output": "tokn:x"}, "did you mean 'token'"),
        ({"output": "Paris"}, "token:TEXT"),
        ({"output": "coordinate:32"}, "0 to 31"),
        ({"output": "neuron:1.3"}, "does not come after"),
        ({"output": "neuron:x"}, "BLOCK.UNIT"),
        ({"output": "class:0"}, "no linear classifier"),
        ({"output": "file:/nowhere.pt"}, "no such file"),
        ({"minus": "coordinate:1"}, "--minus"),
    ],
)
def test_bad_questions_get_clear_answers(folders, settings, words):
    chosen = {"twin": "twin", "block": 1, **settings, **TEXT}
    chosen["twin"] = folders[chosen["twin"]]
    with pytest.raises(SurgeryError, match=words):
        explained(ExplainSettings(**chosen))


def test_directions_from_files_and_of_neurons(folders, tmp_path):
    torch.save(torch.arange(32.0), tmp_path / "w.pt")
    found = explained(ExplainSettings(folders["twin"], 1, f"file:{tmp_path / 'w.pt'}", **TEXT))
    assert found["direction"]["norm"] == pytest.approx(float(torch.arange(32.0).norm()))
    torch.save(torch.arange(31.0), tmp_path / "v.pt")
    with pytest.raises(RecipeError, match="writes 32 coordinates"):
        explained(ExplainSettings(folders["twin"], 1, f"file:{tmp_path / 'v.pt'}", **TEXT))
    found = explained(ExplainSettings(folders["twin"], 0, "neuron:1.3", **TEXT))
    model = surgery.load(folders["twin"])
    layer = model.model.layers[1]
    expected = layer.post_attention_layernorm.weight * layer.mlp.gate_proj.weight[3]
    assert found["direction"]["norm"] == pytest.approx(expected.norm().item(), rel=1e-3)


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


def test_the_page_is_self_contained_and_escapes_tokens(report, tmp_path):
    report = json.loads(json.dumps(report))
    report["contexts"][0]["tokens"][0] = "<script>alert(1)</script>"
    write_explanation(report, tmp_path / "out")
    text = (tmp_path / "out" / PAGE).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert (tmp_path / "out" / PLOT).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / JSON).read_text())["eigenpairs"]


def test_the_command(folders, tmp_path):
    arguments = ["explain", folders["twin"], "--block", "1", "--tokens", "512", "--window", "32"]
    done = CliRunner().invoke(cli, [*arguments, "--output", "token:fox", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "λ =" in done.output
    assert (tmp_path / "out" / PAGE).is_file()
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert told["own"]["linear"]

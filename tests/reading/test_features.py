"""A block read in features: where a dictionary belongs is seen, an exact one tells all, and writers are found."""

import json

import pytest
import torch
import transformers as T
from click.testing import CliRunner

import surgery
from surgery.calibration.inputs import calibration_inputs
from surgery.cli.main import cli
from surgery.errors import RecipeError
from surgery.models import loading
from surgery.reading import explanation
from surgery.reading.activity import Activity
from surgery.reading.block_in_model import find_block, recorded_activity, surroundings
from surgery.reading.dictionary import read_dictionary
from surgery.reading.feature_basis import input_basis, output_basis
from surgery.reading.features import Dictionaries, FeatureReader
from surgery.reading.page import FEATURES, PAGE, UPSTREAM, lines, write_explanation
from surgery.reading.upstream import carried_to
from surgery.runtime.hooks import hooked
from tests import tiny
from tests.reading.dictionaries import draw, exact, orthogonal, random_dictionary, write
from tests.reading.support import TEXT

WIDTH = tiny.WIDTH


@pytest.fixture(scope="module")
def exact_ones(tmp_path_factory):
    place = tmp_path_factory.mktemp("dictionaries")
    return {
        "input": write(place / "input", exact(orthogonal(WIDTH, 1), draw(WIDTH))),
        "output": write(place / "output", exact(orthogonal(WIDTH, 2))),
        "random": write(place / "random", random_dictionary(WIDTH, 70)),
        "narrow": write(place / "narrow", random_dictionary(WIDTH // 2, 20)),
        "transcoder": write(
            place / "transcoder", random_dictionary(WIDTH, 70), architecture="transcoder", apply_b_dec_to_input=False
        ),
    }


def at_block(model, number=1, ids=None):
    ids = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(3)) if ids is None else ids
    block = surroundings(model, find_block(model, number), {"input_ids": ids[:1]})
    recorded = recorded_activity(model, block, [{"input_ids": ids}])
    return block, recorded, Activity.of(ids, recorded.x, recorded.size)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_dictionary_of_the_stream_is_read_through_the_norm(name, ids, tmp_path):
    """RMSNorm, LayerNorm with a bias, RMSNorm with 1 + weight: with the scale held the input comes back exactly."""
    twin = surgery.convert(tiny.make(name), text=tiny.inputs_for(name, ids), batch=16)[0]
    block, recorded, seen = at_block(twin)
    found = read_dictionary(write(tmp_path / "exact", exact(orthogonal(WIDTH), draw(WIDTH))))
    basis = input_basis(found, block, recorded, seen.ordinary, "stream")
    assert basis.site == "stream"
    torch.testing.assert_close(basis.found[seen.ordinary], recorded.x[seen.ordinary].double(), rtol=1e-4, atol=1e-4)


def test_where_a_dictionary_belongs_is_seen(ids, tmp_path):
    twin = surgery.convert(tiny.make("llama"), text=ids, batch=16)[0]
    block, recorded, seen = at_block(twin)
    for site, every in (("input", recorded.x), ("stream", recorded.stream)):
        rows = every[seen.ordinary]
        leading = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:12]  # of 32: what varies most there
        found = read_dictionary(write(tmp_path / site, exact(leading, rows.mean(0))))
        basis = input_basis(found, block, recorded, seen.ordinary)
        assert basis.site == site, basis.explained
        assert 0 < basis.explained[site] < 1
    after = recorded.stream + recorded.y
    for site, every in (("output", recorded.y), ("stream", after)):
        rows = every[seen.ordinary]
        leading = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:12]
        found = read_dictionary(write(tmp_path / f"{site}-after", exact(leading, rows.mean(0))))
        assert output_basis(found, block, recorded, seen.ordinary).site == site


@pytest.fixture(scope="module")
def report(folders, exact_ones):
    given = {"features": exact_ones["input"], "output_features": exact_ones["output"], "terms": 5, "pairs": 4}
    return surgery.explain(folders["twin"], 1, direction="feature:3", **given, **TEXT)


def test_an_exact_dictionary_tells_everything(report):
    found = report["features"]
    assert found["input"]["r2"]["input"] == pytest.approx(1, abs=1e-5)
    assert found["whole"]["r2"] == pytest.approx(1, abs=1e-5)
    assert 0.95 < found["curve"][-1]["r2"] <= 1, "all terms but those that do not act on the text they were ranked on"
    assert found["curve"][0]["r2"] < 0.9
    assert found["judged_on"] > 200 and not found["same_text"]
    assert len(found["alone"]) == len(found["together"]) == 5
    assert {str(number) for term in found["together"] for number in term["features"]} <= set(found["described"])
    assert all(term["tokens"] > 0 for term in found["together"])


def test_feature_directions_are_what_the_encoder_counts(report, exact_ones):
    assert report["direction"]["norm"] == pytest.approx(1)
    assert report["features"]["output"]["feature"] == 3
    column = read_dictionary(exact_ones["output"]).encoder[:, 3].double()
    torch.testing.assert_close(column, orthogonal(WIDTH, 2)[3], rtol=1e-6, atol=1e-6)


def test_the_page_and_the_terminal_show_features(report, tmp_path):
    write_explanation(json.loads(json.dumps(report)), tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert "Two features together" in page and "<script" not in page
    assert (tmp_path / FEATURES).read_bytes().startswith(b"\x89PNG")
    said = "\n".join(lines(report))
    assert "strongest pairs of features" in said and "told on" in said


def test_output_features_are_listed_by_how_well_they_are_told(folders, exact_ones, tmp_path):
    given = {"features": exact_ones["input"], "output_features": exact_ones["output"], "terms": 4}
    found = surgery.explain(folders["twin"], 1, output=tmp_path, **given, **TEXT)["features"]
    assert len(found["list"]) == 4
    assert all(row["r2"] == pytest.approx(1, abs=1e-4) for row in found["list"])
    assert "output feature" in (tmp_path / PAGE).read_text()
    by_firing = surgery.explain(folders["twin"], 1, output_features=exact_ones["output"], **TEXT)["features"]["list"]
    assert by_firing[0]["r2"] is None and by_firing[0]["fires"] >= by_firing[-1]["fires"] > 0


def test_who_writes_into_an_eigenvector_is_found(folders, tmp_path, monkeypatch):
    """A feature of block 0 whose direction, behind the norm, is the eigenvector itself moves it most."""
    model = surgery.load(folders["twin"])
    loaded = loading.loaded(folders["twin"])
    text = calibration_inputs("python", loaded.model, loaded.text_tokenizer, tokens=1024, length=32, batch=8)
    block = surroundings(model, find_block(model, 1), {"input_ids": text.batches[0]["input_ids"][:1]})
    w = torch.eye(WIDTH).double()[3]
    values, vectors = torch.linalg.eigh(block.polynomial.expand().quadratic(w).dense())
    leading = vectors[:, values.abs().argmax()]
    aimed = leading / block.norm.weight.double()
    folder = write(tmp_path / "writers", exact(orthogonal(WIDTH, 5, first=aimed / aimed.norm())))
    found = surgery.explain(folders["twin"], 1, direction="coordinate:3", upstream=f"0={folder}", pairs=1, **TEXT)
    first, second = found["eigenpairs"][0]["upstream"][:2]
    assert {first["feature"], second["feature"]} == {0, WIDTH}, "the direction and its opposite"
    assert first["moves"] * second["moves"] < 0
    real = explanation.carried_to
    monkeypatch.setattr(explanation, "carried_to", lambda *given: 2 * real(*given))
    twice = surgery.explain(folders["twin"], 1, direction="coordinate:3", upstream=f"0={folder}", pairs=1, **TEXT)
    assert twice["eigenpairs"][0]["upstream"][0]["moves"] == pytest.approx(2 * first["moves"]), "by what arrives"
    monkeypatch.undo()
    given = {"features": folder, "features_at": "stream", "output_features": None}
    given |= {"direction": "coordinate:3", "output": tmp_path / "page"}
    both = surgery.explain(folders["twin"], 1, upstream=f"0={folder}", **given, **TEXT)
    assert (tmp_path / "page" / UPSTREAM).read_bytes().startswith(b"\x89PNG")
    assert "Who writes into what it reads" in (tmp_path / "page" / PAGE).read_text()
    described = both["features"]["described"]
    number, one = next(iter(described.items()))
    assert one["upstream"][0]["feature"] % WIDTH == int(number) % WIDTH, "the same dictionary: each writes into itself"
    assert any("is written into by" in line for line in lines(both))


@pytest.mark.parametrize(("name", "low", "high"), [("llama", 0.7, 1.3), ("gpt2", 0.7, 1.3), ("granite", 0.2, 0.4)])
def test_what_arrives_downstream_is_seen_in_a_run(name, low, high, ids):
    """Granite scales what blocks add to the stream by 0.3."""
    model = tiny.make("llama" if name == "granite" else name)
    if name == "granite":
        torch.manual_seed(0)
        model = T.GraniteForCausalLM(
            T.GraniteConfig(**tiny.COMMON, num_key_value_heads=2, residual_multiplier=0.3)
        ).eval()
    twin = surgery.convert(model, text=ids, batch=16)[0]
    earlier, later = (surroundings(twin, find_block(twin, number), {"input_ids": ids[:1]}) for number in (0, 1))
    assert low < carried_to(twin, earlier, later, ids[:8, :16]) < high


def test_a_stream_with_norms_inside_is_refused(ids, monkeypatch):
    """The control: where what arrives is turned, nothing is said about who writes."""
    twin = surgery.convert(tiny.make("llama"), text=ids, batch=16)[0]
    earlier, later = (surroundings(twin, find_block(twin, number), {"input_ids": ids[:1]}) for number in (0, 1))
    turn = orthogonal(WIDTH).float()
    with (
        hooked([twin.model.layers[0].register_forward_hook(lambda _, __, output: output @ turn)]),
        pytest.raises(RecipeError, match="does not reach block 1"),
    ):
        carried_to(twin, earlier, later, ids[:8, :16])


def test_a_transcoder_says_the_output(ids, tmp_path):
    twin = surgery.convert(tiny.make("llama"), text=ids, batch=16)[0]
    block, recorded, seen = at_block(twin)
    x, y = recorded.x[seen.ordinary], recorded.y[seen.ordinary]
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    tensors = {"W_enc": both.T, "b_enc": torch.zeros(2 * WIDTH), "W_dec": both @ solved[:-1], "b_dec": solved[-1]}
    folder = write(tmp_path / "linear", tensors, architecture="transcoder", apply_b_dec_to_input=False, d_out=WIDTH)
    basis = output_basis(read_dictionary(folder), block, recorded, seen.ordinary)
    assert 0.3 < basis.explained["output"] < 1
    torch.testing.assert_close(basis.rows[0], solved[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "feature:0"}, "--output-features"),
        ({"features": "random"}, r"does not describe what the block reads[\s\S]*--features-at input"),
        ({"output_features": "random"}, "does not describe what the block writes"),
        ({"features": "narrow"}, "vectors of 16 entries; the block reads 32"),
        ({"output_features": "narrow"}, "the block writes 32"),
        ({"features": "transcoder"}, "--output-features"),
        ({"features": "input", "features_at": "middle"}, "one of auto, input, stream"),
        ({"rank": "size"}, "one of text, weights"),
        ({"rank": "weights"}, "name one by --features"),
        ({"features_at": "stream", "output_features": "output"}, "name one by --features"),
        ({"direction": "feature:64", "output_features": "output"}, "0 to 63"),
        ({"upstream": "0", "direction": "coordinate:1"}, "BLOCK=PATH"),
        ({"upstream": "1=input", "direction": "coordinate:1"}, "does not come before"),
        ({"upstream": "0=input"}, "--direction"),
    ],
)
def test_bad_questions_get_clear_answers(folders, exact_ones, settings, words):
    given = {key: exact_ones.get(value, value) for key, value in settings.items()}
    if "upstream" in given and "=" in given["upstream"]:
        number, _, name = given["upstream"].partition("=")
        given["upstream"] = f"{number}={exact_ones[name]}"
    with pytest.raises(RecipeError, match=words):
        surgery.explain(folders["twin"], 1, **given, **TEXT)


def test_a_random_dictionary_is_read_where_that_is_asked_for(folders, exact_ones):
    given = {"features": exact_ones["random"], "features_at": "input", "direction": "coordinate:3"}
    found = surgery.explain(folders["twin"], 1, **given, **TEXT)["features"]
    assert found["input"]["r2"]["input"] <= 0
    assert found["whole"]["r2"] < 0.5, "a random dictionary tells nothing"


def test_one_window_is_ranked_and_judged_alike(folders, exact_ones):
    twin = surgery.load(folders["twin"])
    block, recorded, seen = at_block(
        twin, ids=torch.randint(3, 90, (1, 32), generator=torch.Generator().manual_seed(1))
    )
    asked = Dictionaries.read(exact_ones["input"], None, "auto", "text", 3)
    reader = FeatureReader.of(asked, block, recorded, seen, None, None)
    assert torch.equal(reader.fitted, reader.judged) and int(reader.judged.sum()) == int(seen.ordinary.sum())


def test_the_command(folders, exact_ones):
    arguments = ["explain", folders["twin"], "--block", "1", "--tokens", "512", "--window", "32", "--terms", "3"]
    arguments += ["--features", exact_ones["input"], "--output-features", exact_ones["output"]]
    done = CliRunner().invoke(cli, [*arguments, "--direction", "feature:1"])
    assert done.exit_code == 0, done.output
    assert "features of the input: input, 64, relu" in done.output
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert len(told["features"]["list"]) == 3
    assert exact_ones["input"] not in json.dumps(told), "local paths by their last part"
    wrong = CliRunner().invoke(cli, ["explain", folders["twin"], "--block", "1", "--features", "/nowhere"])
    assert isinstance(wrong.exception, RecipeError) and "no dictionary here" in str(wrong.exception)

"""Blocks for inference on encrypted numbers."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine
from surgery.errors import ModelError, SurgeryError
from surgery.models.saved_blocks import twin_blocks
from surgery.publishing import ckks, encrypted
from surgery.publishing.card import render_card
from surgery.publishing.ckks import MOST_BITS, Client, Parameters, Server
from surgery.publishing.scaled_block import DEPTH, Product, Ranges, ScaledBlock, excess, largest_values
from tests import commands, tiny


def drawn(width, hidden, out, gated=True, degree=2, seed=0):
    """A block polynomial with random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate, up = (Affine(numbers(hidden, width), numbers(hidden)) for _ in range(2))
    down = Affine(numbers(out, hidden), numbers(out))
    b = numbers(hidden, degree) if gated else None
    return BlockPolynomial(gate, up if gated else None, numbers(hidden, degree + 1), b, down)


def calibrated(product, x):
    return Ranges(*(part.abs().amax(0) for _, part in product.stages(x).parts()))


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
    st.integers(0, 99),
    st.integers(1, 9),
)
def test_a_scaled_block_is_the_block_and_stays_in_its_range(shape, gated, seed, tokens):
    polynomial = drawn(*shape, gated, seed=seed)
    x = torch.randn(tokens, shape[0], generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    product = Product.of(polynomial, "block")
    scaled = ScaledBlock.of(product, calibrated(product, x))
    size = polynomial(x).abs().max() + product.down.weight.abs().sum() * product.stages(x).gate.abs().max()
    assert (scaled(x) - polynomial(x)).abs().max() <= 1e-8 * size
    inside = x / scaled.x_size
    factors = scaled.gate(inside), scaled.up(inside)
    for part in (inside, *factors, scaled.down(factors[0] * factors[1])):
        assert part.abs().max() <= 1 + 1e-6


def test_other_degrees_are_refused():
    with pytest.raises(ModelError, match="degree 3 has no form"):
        Product.of(drawn(3, 4, 3, degree=3), "block")


@pytest.mark.parametrize(("width", "degree"), [(64, 8192), (4096, 8192), (4097, 16384), (11008, 32768)])
def test_parameters_have_128_bits_of_security_and_room_for_three_multiplications(width, degree):
    found = Parameters.of(width, DEPTH)
    assert found.degree == degree
    assert sum(found.primes) <= MOST_BITS[degree]
    assert len(found.primes) == DEPTH + 2
    assert found.largest >= 256


def test_what_fits_into_no_ciphertext_is_refused():
    with pytest.raises(ModelError, match="16,385 numbers do not fit"):
        Parameters.of(16385, DEPTH)


def test_encrypted_it_computes_the_block_and_the_server_reads_nothing():
    seal = pytest.importorskip("tenseal")
    product = Product.of(drawn(12, 20, 12), "block")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    block, parameters = ScaledBlock.of(product, calibrated(product, x)), Parameters.of(21, DEPTH)
    client = Client(parameters)
    server = Server(block, client.public_keys())
    assert not server._context.is_private()
    sent = client.encrypt(x[0] / block.x_size)
    assert client.encrypt(x[0] / block.x_size) != sent, "encryption is randomised"
    y = client.decrypt(server(sent)) * block.y_size
    assert (y - product.stages(x[:1]).y[0]).norm() < 1e-5 * y.norm()
    with pytest.raises(ValueError, match="secret"):
        seal.ckks_vector_from(server._context, server(sent)).decrypt()
    answer = seal.ckks_vector_from(client._context, server(sent))
    with pytest.raises(ValueError, match="scale"):
        answer * answer  # no fourth multiplication


def test_beyond_the_largest_value_numbers_wrap_around():
    pytest.importorskip("tenseal")
    one = Affine(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    block = ScaledBlock(one, one, one, torch.ones(2), torch.ones(2))
    parameters = Parameters.of(3, DEPTH)
    client = Client(parameters)
    server = Server(block, client.public_keys())
    below, above = (float(share * parameters.largest) ** 0.5 for share in (0.9, 1.1))
    assert client.decrypt(server(client.encrypt(torch.full((2,), below))))[0] == pytest.approx(below**2, rel=1e-3)
    assert client.decrypt(server(client.encrypt(torch.full((2,), above))))[0] < 0


@pytest.fixture(scope="module")
def written(exported, tmp_path_factory):
    """The encrypted form of a tiny twin, by the command."""
    out = tmp_path_factory.mktemp("encrypted") / "out"
    done = commands.surgery(
        "export", exported / "native", "-o", out, "--form", "encrypted", "--tokens", "512", "--json"
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_a_whole_tiny_model_runs_with_encrypted_blocks(exported, written):
    pytest.importorskip("tenseal")
    out, seen = written
    assert seen["engine"] == "TenSEAL"
    assert seen["difference"] < 1e-4
    twin = surgery.load(str(exported / "native"))
    ids = torch.arange(5, 9)[None]
    with torch.no_grad():
        plain = twin(input_ids=ids).logits
    calls = []

    def encrypted_block(path):
        block, parameters = encrypted.read_block(out, path)
        client = Client(parameters)
        server = Server(block, client.public_keys())

        def hook(_, inputs, output):
            rows = inputs[0].flatten(0, -2).double()
            answers = [client.decrypt(server(client.encrypt(row / block.x_size))) * block.y_size for row in rows]
            calls.append(path)
            return torch.stack(answers).view_as(output).to(output)

        return hook

    for saved in twin_blocks(twin):
        twin.get_submodule(saved.path).register_forward_hook(encrypted_block(saved.path))
    with torch.no_grad():
        found = twin(input_ids=ids).logits
    assert len(calls) == len(twin_blocks(twin)) > 1
    assert 0 < (found - plain).norm() < 1e-3 * plain.norm()


def test_what_is_written_says_what_an_evaluation_needs(exported, written):
    out, _ = written
    about = json.loads((out / "encrypted.json").read_text())
    assert about["depth"] == 3
    assert about["parameters"]["security"] == 128
    assert about["tokens"]["calibrated"] == about["tokens"]["tested"] == 512
    assert [row["path"] for row in about["blocks"]] == [
        block.path for block in twin_blocks(surgery.load(str(exported / "native")))
    ]
    for row in about["blocks"]:
        assert row["margin"] == pytest.approx(about["largest_value"] / row["largest"])
        assert 0 <= row["values_out"] < 0.1
    card = render_card(out).text
    assert "CKKS" in card
    assert about["blocks"][0]["path"] in card
    for command in (["eval", out, "--original", exported / "base"], ["convert", out, "-o", out.with_name("x")]):
        done = commands.surgery(*command)
        assert done.returncode == 2
        assert "encrypted form is not for transformers" in done.stderr


def test_values_beyond_their_range_are_counted(exported):
    twin = surgery.load(str(exported / "native"))
    blocks = twin_blocks(twin)[:1]
    path = blocks[0].path
    products = {path: Product.of(blocks[0].read(twin), path)}
    ids = torch.arange(3, 43).view(2, 20)
    whole = largest_values(twin, blocks, products, [ids])
    inside = excess(twin, blocks, products, whole, [ids])[path]
    assert inside.largest == pytest.approx(1, abs=1e-5)
    assert inside.values_out == inside.tokens_out == 0
    half = {path: Ranges(*(part / 2 for _, part in whole[path].parts()))}
    out = excess(twin, blocks, products, half, [ids[:1], ids[1:]])[path]
    assert out.largest == pytest.approx(2, rel=1e-5)
    stages = []
    from surgery.publishing.scaled_block import entering

    with entering(twin, blocks, lambda _, x: stages.append(products[path].stages(x.double()))):
        twin(input_ids=ids)
    wrong = torch.cat([stages[0].gate.abs() > half[path].gate, stages[0].up.abs() > half[path].up], dim=-1)
    assert out.values_out == pytest.approx(float(wrong.double().mean()), abs=1e-3)
    assert out.tokens_out == pytest.approx(float(wrong.any(-1).double().mean()), abs=1e-3)


def test_plain_blocks_have_the_form_too(tmp_path, monkeypatch):
    """A GPT-2's activation is in one map; and without TenSEAL the scaled blocks are compared unencrypted."""
    tiny.save_with_tokenizer("gpt2", tmp_path / "base")
    settings = {"text": "python", "tokens": 2048, "window": 32, "measure": 0, "epochs": 0}
    surgery.convert(tmp_path / "base", output=tmp_path / "twin", degree=2, **settings)
    monkeypatch.setattr(encrypted.importlib.util, "find_spec", lambda name: None)
    seen = surgery.export(tmp_path / "twin", tmp_path / "out", form="encrypted", tokens=256)
    assert seen["engine"] is None
    assert 0 < seen["difference"] < 1e-5
    assert "scaled blocks differ" in render_card(tmp_path / "out").text


def test_a_block_that_computes_something_else_is_not_kept(exported, tmp_path, monkeypatch):
    real = ScaledBlock.of
    monkeypatch.setattr(ScaledBlock, "of", staticmethod(lambda product, largest: real(product, _halved_up(largest))))
    monkeypatch.setattr(encrypted, "PLAIN_TOLERANCE", 1e-12)
    with pytest.raises(ModelError, match="scaled block computes something else"):
        surgery.export(exported / "native", tmp_path / "out", form="encrypted", tokens=256)
    assert not any(tmp_path.iterdir())


def _halved_up(largest):
    return Ranges(largest.x, largest.gate, largest.up / 2, largest.y)


def test_encryption_that_goes_wrong_is_not_kept(exported, tmp_path, monkeypatch):
    pytest.importorskip("tenseal")
    monkeypatch.setattr(Client, "decrypt", lambda self, answer: torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ModelError, match="encrypted, the block computes something else"):
        surgery.export(exported / "native", tmp_path / "out", form="encrypted", tokens=256)
    assert not any(tmp_path.iterdir())


def test_what_has_no_encrypted_form_is_refused_before_anything_is_written(exported, tmp_path, monkeypatch):
    refusals = [
        (exported / "custom", {}, "degree 3 has no form"),
        (exported / "native", {"text": "nowhere.txt"}, "nowhere.txt"),
        (exported / "native", {"text": "samples"}, "not one text"),
        (exported / "native", {"tokens": 100}, "fewer than"),
        (exported / "native", {"weights": "f16"}, "takes no weights"),
    ]
    for folder, settings, said in refusals:
        with pytest.raises(SurgeryError, match=said):
            surgery.export(folder, tmp_path / "out", **{"form": "encrypted", "tokens": 256, **settings})
    assert not any(tmp_path.iterdir())
    with pytest.raises(ModelError, match="no encrypted export"):
        encrypted.read_block(exported / "native", "model.layers.0.mlp")
    monkeypatch.setitem(__import__("sys").modules, "tenseal", None)
    with pytest.raises(SurgeryError, match="tenseal is not installed"):
        ckks.Client(Parameters.of(4, DEPTH))


def test_no_such_block_is_said(written):
    with pytest.raises(ModelError, match="no block 'mlp'") as error:
        encrypted.read_block(written[0], "mlp")
    assert "model.layers.0.mlp" in str(error.value)

"""A twin as a GGUF file, run in llama.cpp."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as T

import surgery
from surgery.errors import ModelError, RecipeError, SurgeryError
from surgery.models import loading
from surgery.publishing import gguf, gguf_network, gguf_tokenizer, llama_cpp
from surgery.publishing.card import render_card
from surgery.publishing.silu import as_silu
from tests import commands

VOCABULARY = 416
TEXT = "The quick brown fox jumps over the lazy dog; isn't it?\n\tdef f(x): return x**2 + 1789\n" * 8


def byte_level(*steps):
    """A trained byte-level BPE of 400 tokens, behind the given steps."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    pieces.train_from_iterator([TEXT], trainer)
    fast = T.PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def sentence_pieces():
    """As SentencePiece's BPE is in a tokenizer.json: spaces written ▁, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    told = {"special_tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]}
    pieces = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, **told))
    described = json.loads(pieces.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # bytes are pieces, not added
    again = Tokenizer.from_str(json.dumps(described))
    again.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return T.PreTrainedTokenizerFast(tokenizer_object=again, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def made(folder, tokenizer=None, kind=(T.LlamaConfig, T.LlamaForCausalLM), **more):
    """A quadratic twin of a tiny Llama (or of another `kind`), all of whose weights matter."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config, network = kind
    model = network(config(**shape, **heads, **more))
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(4 * value if value.dim() == 2 else value + 0.1 * torch.randn_like(value))
    model.save_pretrained(folder / "base")
    (tokenizer or byte_level()).save_pretrained(folder / "base")
    settings = {"text": "python", "tokens": 2048, "window": 32, "measure": 256, "epochs": 0}
    surgery.convert(folder / "base", output=folder / "twin", **settings)
    return folder / "twin"


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return made(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)


def fields(file):
    import gguf as package

    return {name: field.contents() for name, field in package.GGUFReader(file).fields.items()}


def test_llama_cpp_writes_the_same_text(twin, tmp_path):
    pytest.importorskip("xllamacpp")
    done = commands.surgery("export", twin, "-o", tmp_path / "out", "--form", "gguf", "--json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["difference"] < 0.01
    assert seen["same_text"]
    assert seen["same_tokens"]
    file = tmp_path / "out" / seen["file"]
    assert file.name == "twin-F32.gguf"
    assert file.stat().st_size == seen["bytes"]
    card = render_card(tmp_path / "out").text
    assert "llama-cli" in card
    assert "xllamacpp" in card


ANGLES = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
SHAPES = {
    "biases, tied, wide heads": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 32},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ANGLES}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", **ANGLES}},
    "linear": {"rope_parameters": {"rope_type": "linear", **ANGLES}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_llama(shape, tmp_path):
    pytest.importorskip("xllamacpp")
    seen = surgery.export(made(tmp_path, **SHAPES[shape]), tmp_path / "out", form="gguf")
    assert seen["difference"] < 0.01
    assert seen["same_text"]


OTHER_NAMES = {
    "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM, {}),
    "mistral": (T.MistralConfig, T.MistralForCausalLM, {"sliding_window": None}),
    "gemma": (T.GemmaConfig, T.GemmaForCausalLM, {"head_dim": 16}),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_llama_under_another_name(name, tmp_path):
    """Its native twin is written as the Llama it is: with biases of attention, or norms that scale by 1 + w."""
    pytest.importorskip("xllamacpp")
    config, model, more = OTHER_NAMES[name]
    seen = surgery.export(made(tmp_path, kind=(config, model), **more), tmp_path / "out", form="gguf")
    assert seen["difference"] < 0.01
    assert seen["same_text"]


@pytest.mark.parametrize(
    ("broken", "value"),
    [
        ("_neighbours", lambda rows, heads: rows),
        ("_divisors", lambda config, angles: torch.full((config.head_dim // 2,), 2.0)),
    ],
)
def test_a_file_that_computes_something_else_is_not_kept(broken, value, twin, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(gguf_network, broken, value)
    with pytest.raises(ModelError, match="computes something else"):
        surgery.export(twin, tmp_path / "out", form="gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("weights", gguf.STORED)
def test_every_type_of_weights_is_read_back(weights, twin, tmp_path, no_engine):
    done = surgery.export(twin, tmp_path / "out", form="gguf", weights=weights)
    assert done["engine"] is None
    assert (0 if weights == "f32" else 1e-5) <= done["difference"] <= gguf.STORED[weights]
    card = render_card(tmp_path / "out").text
    assert "read back" in card


@pytest.mark.parametrize("weights", ["bf16", "f16", "q8_0", "q5_1", "q4_0"])
def test_llama_cpp_runs_every_type(weights, twin, tmp_path):
    pytest.importorskip("xllamacpp")
    limit = 1.0 if weights == "q4_0" else 0.3  # four bits of 32 numbers that share a scale are 8 % off
    assert 0 < surgery.export(twin, tmp_path / "out", form="gguf", weights=weights)["difference"] < limit


def test_a_tensor_written_wrongly_is_noticed_without_an_engine(twin, tmp_path, no_engine, monkeypatch):
    import gguf as package

    real = package.quants.quantize
    monkeypatch.setattr(package.quants, "quantize", lambda data, kind: real(data * 1.1, kind))
    with pytest.raises(ModelError, match="holds something else"):
        surgery.export(twin, tmp_path / "out", form="gguf")
    assert not any(tmp_path.iterdir())


def test_the_file_says_what_it_is(twin, tmp_path, no_engine):
    seen = surgery.export(twin, tmp_path / "out", form="gguf")
    found = fields(tmp_path / "out" / seen["file"])
    report = json.loads((twin / "surgery.json").read_text())
    lost = report["perplexity"]["nats"]
    assert "degree 2" in found["general.description"]
    assert f"{lost:+.4f} nats" in found["general.description"]
    assert found["polysurgery.degree"] == 2
    assert found["polysurgery.nats_lost"] == pytest.approx(lost, rel=1e-5)
    assert found["llama.feed_forward_length"] == 2 * 96
    assert str(tmp_path) not in str(found)


def test_a_refined_twin_says_what_it_loses_now():
    before = {"perplexity": {"nats": 0.3, "text": "python"}}
    after = before | {"refinement": {"lost_after": 0.1, "held_out_tokens": 8192}}
    assert gguf._loss(before) == (0.3, "python")
    lost, text = gguf._loss(after)
    assert lost == 0.1
    assert "8,192 held-out tokens" in text
    assert gguf._loss({"perplexity": None}) == (None, "")


def test_a_pretrained_tokenizer_is_taken_field_by_field(twin, tmp_path, no_engine):
    first = surgery.export(twin, tmp_path / "first", form="gguf")
    source = tmp_path / "first" / first["file"]
    own = gguf_tokenizer.fields_of(loading.loaded(str(twin)).tokenizer, VOCABULARY)
    assert gguf_tokenizer.fields_of_file(source, VOCABULARY) == own
    second = surgery.export(twin, tmp_path / "second", form="gguf", original=str(source))
    theirs = fields(tmp_path / "second" / second["file"])
    assert {name: value for name, value in theirs.items() if name.startswith("tokenizer.")} == {
        field.name: field.value for field in own
    }
    with pytest.raises(ModelError, match="416 tokens"):
        gguf_tokenizer.fields_of_file(source, 417)


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2", "pieces"])
def test_tokenizers_that_llama_cpp_knows(kind, tmp_path):
    pytest.importorskip("xllamacpp")
    from tokenizers import Regex, pre_tokenizers

    if kind == "smollm":
        tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    elif kind == "pieces":
        tokenizer = sentence_pieces()
    else:
        steps = next(steps for steps, name in gguf_tokenizer.WORDS.items() if name == kind)
        tokenizer = byte_level(pre_tokenizers.Split(Regex(steps[0][1]), "isolated"))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(steps[0][1]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    seen = surgery.export(made(tmp_path, tokenizer), tmp_path / "out", form="gguf")
    assert seen["same_tokens"]
    found = fields(tmp_path / "out" / seen["file"])
    assert found["tokenizer.ggml.model"] == ("llama" if kind == "pieces" else "gpt2")
    assert found.get("tokenizer.ggml.pre", kind) == kind


def test_a_wrong_name_for_the_way_to_cut_words_is_noticed(tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    twin = made(tmp_path)  # which has 1789 in one token or two; "smollm" cuts at every digit
    monkeypatch.setitem(gguf_tokenizer.WORDS, (("ByteLevel", True),), "smollm")
    with pytest.raises(ModelError, match="other tokens"):
        surgery.export(twin, tmp_path / "out", form="gguf")
    assert not (tmp_path / "out").exists()


def test_what_has_no_such_form_is_refused_before_anything_is_written(twin, exported, tmp_path):
    refusals = [
        (exported / "custom", {}, "SiLU form"),
        (exported / "native", {}, "way to cut text into words"),
        (twin, {"weights": "q4_k"}, "no type 'q4_k'"),
        (twin, {"original": str(exported / "base")}, "not a GGUF file"),
        (twin, {"original": "nowhere.gguf"}, "not a GGUF file"),
        (twin, {"form": "silu", "weights": "f16"}, "takes no weights"),
    ]
    for folder, settings, said in refusals:
        with pytest.raises(SurgeryError, match=said):
            surgery.export(folder, tmp_path / "out", **{"form": "gguf", **settings})
    assert not any(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="gguf form"):
        surgery.refine(_exported(twin, tmp_path), twin, tmp_path / "refined")
    done = commands.surgery("eval", tmp_path / "file", "--original", twin, "--tokens", "512")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "GGUF file is not for transformers" in done.stderr
    assert "exported from (twin)" in done.stderr
    (file,) = (tmp_path / "file").glob("*.gguf")
    with pytest.raises(ModelError, match="GGUF file is not for transformers"):
        surgery.load(str(file))


def _exported(twin, place):
    surgery.export(twin, place / "file", form="gguf")
    return place / "file"


def test_weights_too_large_for_a_type_are_refused(twin, no_engine, tmp_path):
    network = as_silu(surgery.load(str(twin)))
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight holds 100,000"):
        gguf._write(tmp_path / "a.gguf", [], network, "f16")
    gguf._write(tmp_path / "b.gguf", [], network, "bf16")


def test_angles_that_change_with_the_text_are_refused(twin):
    network = as_silu(surgery.load(str(twin)))
    network.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ModelError, match="depend on the length"):
        gguf_network.settings(network)


def test_an_engine_that_dies_is_said(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "no.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"llama.cpp does not run"):
        llama_cpp._asked(tmp_path / "no.gguf", {"ids": [1, 2], "prompt": 1, "top": 1, "texts": []})


def test_no_package_is_said(twin, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SurgeryError, match="gguf is not installed"):
        surgery.export(twin, tmp_path / "out", form="gguf")
    assert subprocess.run([sys.executable, "-c", "import surgery"], check=False).returncode == 0

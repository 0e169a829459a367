"""What transformers would read beside a model's weights travels with the twin, or the report says why not."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from evals import evaluate
from surgery.cli import main
from surgery.errors import ModelError, first_line
from surgery.models import loading
from surgery.models.companions import companions, has_tokenizer
from tests import tiny
from tests.hub_server import Hub, environment

IDS = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
TRAVEL = (
    "processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json", "chat_template.jinja",
    "additional_chat_templates/tools.jinja", "custom_generate/generate.py", "modules.json", "1_Pooling/config.json",
    "sentence_bert_config.json", "LICENSE.txt", "NOTICE", "spiece.model", "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip
STAY = (
    ".gitattributes", "README.md", "optimizer.pt", "checkpoint-5/trainer/state.json", ".cache/vocab.txt", "x.gguf",
)  # fmt: skip
UNKNOWN = ("notes.xyz", "trainer_state.json")


@pytest.fixture
def llama(tmp_path):
    """A checkpoint with a tokenizer and all kinds of files beside it."""
    folder = tmp_path / "llama"
    tiny.save_with_tokenizer("llama", folder)
    for name in (*TRAVEL, *STAY, *UNKNOWN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# this is {name}")
    return folder


def convert(folder, out, **settings):
    given = {"text": IDS, "degree": 2, **settings}
    return surgery.convert(folder, output=out, **given)[1].as_dict()


@pytest.mark.parametrize("settings", [{"degree": 2}, {"degree": 3}, {"degree": 2, "offload": True}])
def test_everything_that_transformers_reads_travels_and_goes_on_travelling(llama, tmp_path, settings):
    report = convert(llama, tmp_path / "twin", **settings)
    for name in TRAVEL:
        assert (tmp_path / "twin" / name).read_text() == f"# this is {name}", name
    assert not any((tmp_path / "twin" / name).exists() for name in (*STAY[2:], *UNKNOWN))
    assert set(TRAVEL) <= set(report["companions"]["copied"])
    assert report["companions"]["left"] == sorted(UNKNOWN) and report["companions"]["missing"] == {}
    assert json.loads((tmp_path / "twin" / "surgery.json").read_text())["companions"] == report["companions"]
    again = companions(str(tmp_path / "twin"), "folder", None)
    assert set(TRAVEL) <= again.files.keys()


def test_a_vision_twin_has_its_processor(tmp_path):
    tiny.make("vit").save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    convert(tmp_path / "vit", tmp_path / "twin", text=tiny.inputs_for("vit", IDS))
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "twin").size["height"] == 16


def test_the_code_of_a_tokenizer_travels_with_what_it_imports_and_the_models_own_does_not(llama, tmp_path):
    for name, text in {
        "tokenization_x.py": "from .helper_x import something\n",
        "helper_x.py": "from .deeper_x import something\nimport os\n",
        "deeper_x.py": "something = 3\n",
        "modeling_x.py": "",
        "configuration_x.py": "",
    }.items():
        (llama / name).write_text(text)
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoProcessor": "processing_x.XProcessor",
        "AutoImageProcessor": "someone/else--image_x.XImageProcessor",
    }
    (llama / "config.json").write_text(json.dumps(config))
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    for degree, form in ((2, "native"), (3, "custom")):
        report = convert(llama, tmp_path / form, degree=degree)
        there = {file.name for file in (tmp_path / form).glob("*_x.py")}
        assert there == {"tokenization_x.py", "helper_x.py", "deeper_x.py"}
        assert list(report["companions"]["missing"]) == ["processing_x.py"]
        assert {"modeling_x.py", "configuration_x.py"} <= set(report["companions"]["left"])
        named = json.loads((tmp_path / form / "config.json").read_text())["auto_map"]
        own = {key: value for key, value in named.items() if "polynomial" not in value}
        assert own == {key: config["auto_map"][key] for key in ("AutoProcessor", "AutoImageProcessor")}
        assert (form == "custom") == ("AutoModelForCausalLM" in named)
    (tmp_path / "native" / "custom_generate" / "generate.py").unlink()  # it would have to be some
    trusting = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native", trust_remote_code=True)
    assert type(trusting) is transformers.LlamaForCausalLM


def test_a_tokenizer_that_does_not_load_is_said_and_its_files_travel(llama, tmp_path, capfd):
    (llama / "tokenizer.json").write_text('{"broken": ')
    report = convert(llama, tmp_path / "twin", quiet=False)
    assert report["companions"]["tokenizer"] and "the tokenizer does not load" in report["source"]["note"]
    assert "the tokenizer does not load" in capfd.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "twin" / name).read_bytes() == (llama / name).read_bytes()
    with pytest.raises(ModelError, match="tokenizer does not load"):
        convert(llama, tmp_path / "other", text="python", tokens=2048, window=32)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ModelError, match="tokenizer does not load"):
        evaluate(tmp_path / "twin", original=llama, tokens=256, window=32)
    with pytest.raises(ModelError, match="tokenizer does not load"):
        surgery.trace([str(llama)], tokens=256, window=32)


def test_a_checkpoint_without_a_tokenizer_has_none_to_complain_of(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "bare")
    report = convert(tmp_path / "bare", tmp_path / "twin")
    assert "tokenizer" not in report["companions"] and "note" not in report["source"]


def test_tensors_without_a_place_in_the_model_are_named(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "more")
    file = tmp_path / "more" / "model.safetensors"
    save_file({**load_file(file), "value_head.weight": torch.ones(1, 32)}, file, metadata={"format": "pt"})
    report = convert(tmp_path / "more", tmp_path / "twin")
    assert (
        "1 tensors of the checkpoint have no place in LlamaForCausalLM (value_head.weight)" in report["source"]["note"]
    )


@pytest.fixture
def server():
    found = Hub()
    yield found
    found.shutdown()


READ = """
import json, sys
from surgery.models import loading
from surgery.models.companions import companions, has_tokenizer
found = companions("them/base", "hub", None)
print(json.dumps([{name: open(file).read() for name, file in found.files.items()}, found.missing, found.left]))
"""


def test_of_a_repository_the_files_are_fetched_and_found_again_without_a_network(llama, server, tmp_path):
    tree = {file.relative_to(llama).as_posix(): file.read_bytes() for file in llama.rglob("*") if file.is_file()}
    server.repositories["them/base"] = {"main": tree}

    def read(**more):
        home = environment(server, tmp_path / "home") | more
        done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True, env=home)
        return json.loads(done.stdout.splitlines()[-1])

    files, missing, left = read()
    assert missing == {} and left == sorted(UNKNOWN)
    assert files.keys() >= set(TRAVEL) and files["LICENSE.txt"] == "# this is LICENSE.txt"
    assert read(HF_HUB_OFFLINE="1")[0] == files
    server.fail("processor_config.json", 500, times=99)
    files, missing, _ = read(HF_HOME=str(tmp_path / "other"))
    assert "processor_config.json" in missing
    assert "LICENSE.txt" in files


def test_code_of_an_unknown_architecture_is_refused_without_a_question(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "configuration_x.XConfig"}})
    )
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "inspect", str(tmp_path)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "such code is not run" in done.stderr and "[y/N]" not in done.stdout + done.stderr


CODE = """
from transformers import PreTrainedTokenizerFast

print("CODE IS RUN")


class XTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizers_own_code_is_run_where_it_is_trusted_and_never_asked_for(llama, tmp_path):
    (llama / "tokenization_x.py").write_text(CODE)
    shutil.rmtree(llama / "custom_generate")
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}, "tokenizer_class": "XTokenizer"}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))

    def run(*more):
        command = [sys.executable, "-m", "surgery", "convert", str(llama), "-o", str(tmp_path / "twin"), *more]
        command += ["--text", "python", "--tokens", "2048", "--window", "32", "--measure", "0", "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.PIPE)

    done = run()
    assert "CODE IS RUN" not in done.stdout + done.stderr and "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0 or "--trust-remote-code" in done.stderr
    done = run("--trust-remote-code", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "CODE IS RUN" in done.stdout
    assert (tmp_path / "twin" / "tokenization_x.py").read_text() == CODE
    with surgery.trusting_remote_code():
        assert type(loading.loaded(str(llama)).tokenizer).__name__ == "XTokenizer"
    assert type(loading.loaded(str(llama)).tokenizer).__name__ != "XTokenizer"


def test_every_command_that_reads_a_model_may_be_told_to_trust_its_tokenizer():
    commands = main.cli.commands.items()
    told = {name for name, command in commands if "trust_remote_code" in [option.name for option in command.params]}
    assert told == set(main.cli.commands) - {"card", "push", "completion"}


def test_a_gguf_file_has_its_tokenizer_inside_and_nothing_is_looked_up(tmp_path):
    assert has_tokenizer(str(tmp_path), "gguf", None)
    assert companions(str(tmp_path), "gguf", None).files == {}


def test_what_an_error_says_is_one_line_and_never_nothing():
    assert first_line(ValueError("a\nb")) == "a" and first_line(OSError()) == "OSError"
    assert first_line(ValueError(" \n ")) == "ValueError" and len(first_line(ValueError("x" * 9999))) == 300

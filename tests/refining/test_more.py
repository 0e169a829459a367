"""Refinement: packing, local and matching objectives, LoRA, the control, averaging, trackers, memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import RecipeError, SurgeryError
from surgery.refining.packing import PackedWindows
from surgery.refining.run import refined
from surgery.refining.schedule import Schedule
from surgery.refining.settings import RefineSettings, check_refinement
from surgery.refining.student import checkpoint_activations
from surgery.refining.training import Training
from tests import tiny


@pytest.fixture
def unverified(monkeypatch):
    """Saves without the fresh process, where what is saved is not the question."""
    from surgery.saving import checkpoint

    seen = {"verified": True, "form": "test", "difference": 0.0}
    monkeypatch.setattr(checkpoint, "verify_saved", lambda *_, **__: seen)


BASES = {"native": "llama", "custom": "llama", "plain": "gpt2", "kin": "mistral"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny originals with rough twins: native, custom, and of plain blocks."""
    folder = tmp_path_factory.mktemp("refine")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "(1,", "2)", "[3:", "4];", "=", "fox."]
    order = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(words[index] for index in order))
    settings = {"tokens": 1024, "length": 32, "measure": 0, "readout": "keep", "calibration": "python"}
    settings |= {"random_tokens": 0.0}  # rough: on words calibration did not meet there is something left to win
    for name, base in BASES.items():
        if not (folder / base).exists():
            tiny.save_with_tokenizer(base, folder / base)
        form = "custom" if name == "custom" else "auto"
        surgery.convert(folder / base, output=folder / name, degree=2, form=form, **settings)
    return folder


def settings_of(place, out, twin="native", **more):
    given = {"twin": str(place / twin), "teacher": str(place / BASES[twin]), "output": str(out), "tokens": 4096}
    given |= {"text": (str(place / "text.txt"),), "length": 32, "batch": 8, "accumulate": 1, "validate_tokens": 512}
    given |= {"precision": "float32", "average": 0.5, "rate": 3e-3, "validate_every": 4}
    return RefineSettings(**(given | more))


@pytest.mark.parametrize(
    ("twin", "more"),
    [
        ("native", {"objective": "local"}), ("plain", {"objective": "local", "rate": 1e-3}), ("custom", {"match": 0.5}),
        ("plain", {"match": 0.5, "rate": 5e-4}), ("native", {"checkpointing": True}),
        ("native", {"text": ("samples",)}), ("native", {"blend": 0.5}), ("plain", {"blend": 0.5, "rate": 5e-4}),
        ("native", {"precision": "bf16"}), ("native", {"blend": 0.5, "checkpointing": True}),
        ("native", {"train": "lora", "match": 0.5, "blend": 0.3, "rate": 1e-2}),
        ("custom", {"train": "lora", "match": 0.5, "rate": 1e-2}),
        ("kin", {}), ("custom", {"train": "coefficients", "rate": 1e-2}),
    ],
)  # fmt: skip
def test_every_way_of_refining_comes_nearer(place, unverified, tmp_path, twin, more):
    record = refined(settings_of(place, tmp_path / "out", twin, **more))
    assert record["divergence_after"] < 0.9 * record["divergence_before"]
    assert (tmp_path / "out" / "refinement.png").read_bytes()[:4] == b"\x89PNG"


def test_local_gradients_are_those_of_each_block_alone(place):
    """Against the blocks' errors written out, on inputs taken from the twin and goals from the original."""
    from accelerate import Accelerator

    from surgery.refining.objectives import Local, block_error
    from surgery.refining.parameters import named_trainable, twin_block_paths

    twin, teacher = surgery.load(place / "native"), surgery.load(place / "llama")
    trainable = named_trainable(twin, "block")
    blocks = [paths for paths, _ in twin_block_paths(twin)]
    part = PackedWindows(torch.arange(3, 67).view(2, 32), torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1))
    loss = Local(Accelerator(cpu=True), teacher, lambda: torch.autocast("cpu", enabled=False), twin, blocks)(part)
    found = {name: value.grad.clone() for name, value in trainable.items()}
    twin.zero_grad()
    seen, goals, handles = {}, {}, []
    for index in range(tiny.LAYERS):
        handles += [
            twin.model.layers[index].mlp.register_forward_pre_hook(
                lambda _, x, i=index: seen.update({i: x[0].detach()})
            ),
            teacher.model.layers[index].mlp.register_forward_hook(lambda _, __, y, i=index: goals.update({i: y})),
        ]
    with torch.no_grad():
        for model in (twin, teacher):
            model(**part.inputs("cpu"), use_cache=False)  # documents apart
    for handle in handles:
        handle.remove()
    errors = [block_error(twin.model.layers[i].mlp(seen[i]), goals[i]) for i in range(tiny.LAYERS)]
    expected = torch.stack(errors).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in trainable.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["native", "custom", "plain"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(place, name):
    """Dropout stays off, though transformers checkpoints training layers alone."""

    def run(checkpointing):
        twin = surgery.load(place / name)
        if checkpointing:
            checkpoint_activations(twin)
        kept = []
        ids = torch.arange(3, 67).view(2, 32)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = twin(ids, labels=ids).loss
        loss.backward()
        return sum(kept), {key: value.grad for key, value in twin.named_parameters()}

    (whole, ours), (less, theirs) = run(False), run(True)
    assert less < 0.6 * whole
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["native", "plain"])
def test_blending_goes_from_the_original_to_the_twin(place, name):
    from surgery.refining.objectives import _mixed
    from surgery.refining.parameters import twin_block_paths
    from surgery.runtime.hooks import hooked

    twin, original = surgery.load(place / name), surgery.load(place / BASES[name])
    ids = torch.arange(3, 35)[None]
    blocks = [paths for paths, _ in twin_block_paths(twin)]

    def logits(share):
        with torch.no_grad(), hooked(_mixed(twin, original, blocks, share)):
            return twin(ids).logits

    with torch.no_grad():
        theirs, ours = original(ids).logits, twin(ids).logits
    torch.testing.assert_close(logits(0.0), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(1.0), ours, rtol=1e-4, atol=1e-4)
    assert 0 < (logits(0.5) - theirs).norm() < (ours - theirs).norm()


def test_lora_is_merged_and_a_native_twin_stays_native(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", train="lora", lora_rank=4, rate=1e-2))
    assert record["divergence_after"] < 0.9 * record["divergence_before"]
    assert record["trained_parameters"] < 20_000

    before, after = (load_file(folder / "model.safetensors") for folder in (place / "native", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("self_attn" in name for name in changed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_control_is_the_original_trained_on_the_text(place, unverified, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", control=True))
    control = record["control"]
    assert control["nats_after"] < control["nats_before"] - 0.5, "a random original learns these few words"
    assert control["nats_before"] == pytest.approx(record["curve"][0]["nats"] - record["curve"][0]["lost"], abs=1e-5)


def test_an_anchor_keeps_the_weights_near_their_start(place, unverified, tmp_path):
    start = load_file(place / "native" / "model.safetensors")
    moved = []
    for anchor in (0.0, 100.0, 1e6):
        out = tmp_path / f"anchor{anchor}"
        refined(settings_of(place, out, anchor=anchor, average=0.0))
        after = load_file(out / "model.safetensors")
        moved.append(sum(float((after[name] - value).norm() ** 2) for name, value in start.items()))
    assert moved[0] > 2 * moved[1] > 0
    assert moved[2] < 1e-6 * moved[0]


def test_the_mean_of_the_weights_is_what_is_kept(place, unverified, tmp_path):
    """With one step from a fresh mean, the mean is the step's weights; with decay it lags behind."""
    schedule = Schedule(RefineSettings("", "", "", rate=1.0, warmup=0.0, average=0.9), 10)
    assert [round(schedule.decay_at(step), 3) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]
    sharp = refined(settings_of(place, tmp_path / "sharp", average=0.0))
    mean = refined(settings_of(place, tmp_path / "mean", average=0.9))
    assert sharp["losses"] == mean["losses"], "the mean is looked at, never trained from"
    assert sharp["curve"][-1]["divergence"] != mean["curve"][-1]["divergence"]


def test_a_short_text_is_gone_through_again_in_another_order(place, unverified, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", tokens=40_000))
    assert record["tokens_seen"] == 40_000 // 256 * 256
    assert record["passes_over_the_text"] > 3


def test_a_refined_twin_is_measured_on_what_was_held_out(place, unverified, tmp_path):
    from evals.settings import unseen

    out = tmp_path / "out"
    refined(settings_of(place, out))
    kept = json.loads((out / "surgery.json").read_text())["refinement"]["held_out"]["text.txt"]
    assert (kept["begin"], kept["end"]) == (0, 512)
    assert unseen(str(out), str(place / "text.txt")) == (0, 512)
    assert unseen(str(out), "another.txt") == (0, None)
    command = [sys.executable, "-m", "surgery", "eval", out, "--against", place / "llama", "--text", place / "text.txt",
               "--window", "32", "--block-tokens", "64", "--no-speed", "--no-cache", "--json"]  # fmt: skip
    alone = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["settings"]["tokens"] == 512
    command.pop()
    more = subprocess.run(list(map(str, [*command, "--skip", "100"])), capture_output=True, text=True, check=False)
    assert "SEEN IN TRAINING" in more.stdout


def test_trackers_get_what_is_measured(place, unverified, tmp_path, monkeypatch):
    from accelerate.tracking import GeneralTracker

    class Noting(GeneralTracker):
        name, requires_logging_directory, seen = "noting", False, []
        tracker = None

        def __init__(self):
            super().__init__()

        def store_init_configuration(self, values):
            self.seen.append(values)

        def log(self, values, step=None, **_):
            self.seen.append((step, values))

    record = refined(settings_of(place, tmp_path / "out", report_to=(Noting(),)))
    logged = [entry for entry in Noting.seen if isinstance(entry, tuple)]
    assert [values["loss"] for _, values in logged if "loss" in values] == record["losses"]
    assert [v["held_out_lost"] for _, v in logged if "held_out_lost" in v] == [row["lost"] for row in record["curve"]]


def test_too_little_memory_says_what_to_lower(place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "_one_step", full)
    with pytest.raises(SurgeryError, match="out of memory") as raised:
        refined(settings_of(place, tmp_path / "out"))
    assert "--checkpointing" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(place, tmp_path):
    command = [sys.executable, "-m", "surgery", "refine", place / "native", "--teacher", place / "llama", "-o",
               tmp_path / "out", "--tokens", "20k", "--length", "32", "--train", "lora", "--dry-run"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "78 steps of 256 tokens" in done.stdout
    assert "trained: lora" in done.stdout
    assert not any(tmp_path.iterdir())


def test_what_is_refused(place, tmp_path):
    for more, words in (
        ({"train": "lora", "objective": "local"}, "what is in blocks"),
        ({"text": ("nowhere.txt",)}, "no calibration source"),
        ({"precision": "float8"}, "no precision"),
        ({"train": "all", "objective": "local"}, "what is in blocks"),
        ({"length": 4}, "not from 8 to 128"),
        ({"length": 256}, "not from 8 to 128"),
        ({"text": (str(place / "text.txt"), "elsewhere/text.txt")}, "two texts of one name"),
    ):
        with pytest.raises(RecipeError, match=words):
            check_refinement(settings_of(place, tmp_path / "out", **more))


def test_the_card_tells_of_the_refinement_and_how_to_repeat_it(place, unverified, tmp_path):
    from surgery.publishing.card import render_card

    record = refined(settings_of(place, tmp_path / "out"))
    text = render_card(tmp_path / "out", base_model="them/base", licence="mit").text
    assert f"{record['divergence_before']:.4f} before, {record['divergence_after']:.4f} after" in text
    assert str(tmp_path) not in text
    command = next(line for line in text.splitlines() if line.startswith("surgery refine")).split()
    command[2:] = [{"twin": place / "native", "them/base": place / "llama", "refined": tmp_path / "x",
                    "text.txt": place / "text.txt"}.get(word, word) for word in command[2:]]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "16 steps of 256 tokens" in done.stdout


def test_what_was_held_out_once_stays_so(place, unverified, tmp_path):
    """Refined again on the same text, with other settings for what is held out."""
    refined(settings_of(place, tmp_path / "one"))
    again = settings_of(place, tmp_path / "two", validate_tokens=1024)
    again = RefineSettings(**{**vars(again), "twin": str(tmp_path / "one")})
    record = refined(again)
    assert record["held_out"]["text.txt"]["end"] == 512
    report = json.loads((tmp_path / "two" / "surgery.json").read_text())
    assert len(report["earlier_refinements"]) == 1


def test_text_the_conversion_saw_is_not_held_out(place, unverified, tmp_path):
    from surgery.errors import CalibrationError

    short = tmp_path / "short.txt"
    short.write_text((place / "text.txt").read_text()[:9000])
    surgery.convert(
        place / "llama", output=tmp_path / "twin", calibration=str(short), tokens=1024, length=32, measure=0
    )
    settings = {**vars(settings_of(place, tmp_path / "out")), "twin": str(tmp_path / "twin"), "text": (str(short),)}
    record = refined(RefineSettings(**settings))
    assert record["held_out"]["short.txt"]["begin"] == 1024
    with pytest.raises(CalibrationError, match="unseen"):
        refined(RefineSettings(**{**settings, "validate_tokens": 8192}), overwrite=True)


def test_another_twin_under_the_same_name_does_not_resume(place, unverified, tmp_path, monkeypatch):
    import shutil

    from surgery.errors import CheckpointError
    from surgery.refining.training import Training

    shutil.copytree(place / "native", tmp_path / "twin")
    settings = RefineSettings(**{**vars(settings_of(place, tmp_path / "out")), "twin": str(tmp_path / "twin")})
    real, looks = Training.keep, []

    def stop(self, folder):
        real(self, folder)
        looks.append(self.step)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        refined(settings)
    monkeypatch.undo()
    surgery.convert(
        place / "llama",
        output=tmp_path / "twin",
        overwrite=True,
        calibration="python",
        tokens=2048,
        length=32,
        measure=0,
    )
    with pytest.raises(CheckpointError, match="other settings, models or text"):
        refined(settings)
    assert refined(settings, restart=True)["tokens_seen"] == 4096


def test_only_whole_twins_of_causal_models_are_refined(place, tmp_path):
    from surgery.publishing.silu import export_silu

    export_silu(place / "native", tmp_path / "silu")
    settings = vars(settings_of(place, tmp_path / "out"))
    with pytest.raises(RecipeError, match="silu form"):
        check_refinement(RefineSettings(**{**settings, "twin": str(tmp_path / "silu")}))
    tiny.save_with_tokenizer("bert", tmp_path / "bert")
    surgery.convert(
        tmp_path / "bert", output=tmp_path / "masked", calibration="python", tokens=1024, length=32, measure=0
    )
    with pytest.raises(SurgeryError, match="only causal"):
        check_refinement(
            RefineSettings(**{**settings, "twin": str(tmp_path / "masked"), "teacher": str(tmp_path / "bert")})
        )


def test_a_refined_delta_is_a_whole_twin(place, tmp_path):
    from surgery.publishing.delta import export_delta

    export_delta(place / "custom", tmp_path / "delta", str(place / "llama"))
    settings = vars(settings_of(place, tmp_path / "out", "custom"))
    with pytest.raises(SurgeryError, match="not on the Hub"):
        refined(RefineSettings(**{**settings, "twin": str(tmp_path / "delta")}))

"""The loop: anchor, running mean, trackers, resuming."""

import pytest
from safetensors.torch import load_file

import surgery
from surgery.refining.run import refined
from surgery.refining.schedule import Schedule
from surgery.refining.settings import RefineSettings
from tests.refining.support import interrupted, settings_of


def test_an_anchor_keeps_the_weights_near_their_start(place, tmp_path):
    start = load_file(place / "native" / "model.safetensors")
    moved = []
    for anchor in (0.0, 100.0, 1e6):
        out = tmp_path / f"anchor{anchor}"
        refined(settings_of(place, out, anchor=anchor, average=0.0))
        after = load_file(out / "model.safetensors")
        moved.append(sum(float((after[name] - value).norm() ** 2) for name, value in start.items()))
    assert moved[0] > 2 * moved[1] > 0
    assert moved[2] < 1e-6 * moved[0]


def test_the_mean_of_the_weights_is_what_is_kept(place, tmp_path):
    """With one step from a fresh mean, the mean is the step's weights; with decay it lags behind."""
    schedule = Schedule(RefineSettings("", "", "", rate=1.0, warmup=0.0, average=0.9), 10)
    assert [round(schedule.decay_at(step), 3) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]
    sharp = refined(settings_of(place, tmp_path / "sharp", average=0.0))
    mean = refined(settings_of(place, tmp_path / "mean", average=0.9))
    assert sharp["losses"] == mean["losses"], "the mean is looked at, never trained from"
    assert sharp["curve"][-1]["divergence"] != mean["curve"][-1]["divergence"]


def test_trackers_get_what_is_measured(place, tmp_path, monkeypatch):
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


def test_another_twin_under_the_same_name_does_not_resume(place, tmp_path):
    import shutil

    from surgery.errors import CheckpointError

    shutil.copytree(place / "native", tmp_path / "twin")
    settings = RefineSettings(**{**vars(settings_of(place, tmp_path / "out")), "twin": str(tmp_path / "twin")})
    with interrupted(after=2):
        refined(settings)
    surgery.convert(
        place / "llama",
        output=tmp_path / "twin",
        overwrite=True,
        text="python",
        tokens=2048,
        window=32,
        measure=0,
    )
    with pytest.raises(CheckpointError, match="other settings, models or text"):
        refined(settings)
    assert refined(settings, restart=True)["tokens_seen"] == 4096

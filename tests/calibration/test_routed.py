"""Passes that wait at a mixture of experts."""

import torch

import surgery
from tests.blocks.of_experts import IDS, model_of


def test_repeated_inputs_do_not_wait_in_memory(monkeypatch):
    from surgery.calibration.passes import _Fork
    from surgery.fitting import either

    waiting, kept = [], []
    real, wait = either.fit_experts, _Fork._wait_routed

    def looking(station, settings):
        assert len(station.twin) == 8
        assert all(arrival.x.shape == (192, 32) for arrival in station.twin)
        waiting.append([value.untyped_storage().nbytes() for value in kept])
        return real(station, settings)

    def noting(self, me, x, *rest):
        kept.append(x)
        wait(self, me, x, *rest)
        assert torch.count_nonzero(x.view(4, -1, 32).any(-1).sum(0) - 1) == 0  # back, each token at one expert

    monkeypatch.setattr(_Fork, "_wait_routed", noting)
    monkeypatch.setattr(either, "fit_experts", looking)
    surgery.convert(model_of("llama4"), text=IDS, window=24, batch=8)
    assert waiting and set(waiting[0]) == {0}

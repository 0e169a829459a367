"""Speed as a ratio."""

import pytest

import surgery


def test_speed_is_a_ratio_that_a_machine_that_slows_down_does_not_change(pair, monkeypatch):
    from evals import speed

    one, two = (surgery.load(str(pair / name)) for name in ("base", "twin"))
    rounds = []

    def one_round(model, prompt):
        """Each round takes twice as long as the one before; the twin takes 4/5 of the original's time, at last 2/5."""
        rounds.append(model)
        slow = 2.0 ** ((len(rounds) - 1) // 2)
        share = 1.0 if model is one else 0.4 if len(rounds) >= 8 else 0.8
        return slow * share, 10 * slow * share

    monkeypatch.setattr(speed, "_one_round", one_round)
    found = speed.compare_speed(one, two, rounds=3)
    assert rounds == [one, two] * 4, "in turn, after one round that does not count"
    for kind in ("prefill", "decode"):
        rate = found[f"{kind}_tokens_per_second"]
        assert (rate["ratio"], rate["ratio_low"], rate["ratio_high"]) == pytest.approx((1.25, 1.25, 2.5))
        assert rate["twin"] / rate["original"] == pytest.approx(rate["ratio"])
    assert found["parameters"]["twin"] > found["parameters"]["original"]
    assert 0.9 < found["flops_per_token"]["ratio"] < 1.1

"""A budget in nats picks degree 2, degree 3 or the original per block."""

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.conversion.budget import ENOUGH, BlockCost, degrees_within, next_allowance
from surgery.errors import ModelError, RecipeError
from tests import tiny

prices = st.floats(1e-6, 0.2)
tables = st.lists(st.tuples(prices, prices), min_size=1, max_size=5)


@given(tables, st.floats(0, 0.5))
def test_no_other_choice_has_more_quadratic_blocks(table, allowed):
    costs = [BlockCost(str(index), {2: two, 3: three}) for index, (two, three) in enumerate(table)]
    found = degrees_within(costs, allowed)

    def price(degrees):
        return sum(cost.divergence[degree] for cost, degree in zip(costs, degrees, strict=True) if degree)

    def rank(degrees):
        return degrees.count(2), degrees.count(3)

    mine = tuple(found[cost.path] for cost in costs)
    assert price(mine) <= allowed + 1e-12
    possible = [degrees for degrees in product((0, 2, 3), repeat=len(costs)) if price(degrees) <= allowed]
    assert rank(mine)[0] == max(rank(degrees)[0] for degrees in possible)


@settings(deadline=None)
@given(st.floats(0.6, 3.0), st.floats(0.5, 20.0), st.floats(0.01, 1.0))
def test_the_sum_a_budget_stands_for_is_found(power, factor, budget):
    """Whatever power law what is lost follows, four tries come within it and use most of it."""
    tried, allowance = [], budget
    for _ in range(4):
        tried.append((allowance, factor * allowance**power))
        allowance = next_allowance(tried, budget)
    assert any(ENOUGH * budget <= lost <= budget for _, lost in [*tried, (allowance, factor * allowance**power)])


def test_the_next_sum_stays_between_what_fitted_and_what_did_not():
    steps = [(0.1, 0.05), (0.2, 0.3), (0.15, 0.29)]  # lost rises in a step that no line knows
    assert 0.1 < next_allowance(steps, 0.1) < 0.15
    assert next_allowance([(0.1, -0.02)], 0.1) > 0.1
    assert next_allowance([(0.0, 0.02)], 0.1) > 0.0  # blocks that change nothing


def test_what_the_whole_loses_beyond_the_sum_is_learnt(monkeypatch):
    """Sixteen blocks that lose eleven times as much together as their divergences add up to."""
    from types import SimpleNamespace

    from surgery.conversion import budget
    from surgery.conversion.budget import convert_within
    from surgery.conversion.partial_run import PartialRun
    from surgery.conversion.task import Replacements

    costs = tuple(BlockCost(str(index), {2: 0.001, 3: 0.0002}) for index in range(16))
    state = {}

    def converted(task, form, degrees):
        state["lost"] = sum({0: 0.0, 2: 0.011, 3: 0.0022}[degree] for degree in degrees.values())
        return Replacements([], [])

    monkeypatch.setattr(budget, "measured_costs", lambda *_: costs)
    monkeypatch.setattr(budget, "_held_out", lambda _: [])
    monkeypatch.setattr(budget, "_converted", converted)
    monkeypatch.setattr(budget, "put_back", lambda *_: state.update(lost=0.0))
    task = SimpleNamespace(model=None, originals=dict, data=SimpleNamespace(unseen=()))
    monkeypatch.setattr(budget, "nats", lambda *_: state.get("lost", 0.0))
    _, account, _ = convert_within(task, "native", 0.05, PartialRun(None))
    assert 0.8 * 0.05 <= account.measured <= 0.05
    assert list(account.degrees.values()).count(2) >= 3
    assert account.tried[0][3] > 0.05


def model_that_knows_something(ids):
    """Random weights know nothing, so that nothing could be lost: a head that predicts the model's own taste."""
    model = tiny.make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        text = model.generate(ids[:, :2], do_sample=True, max_new_tokens=30, min_new_tokens=30, pad_token_id=0)
    return model, text


@pytest.fixture(scope="module")
def knowing():
    torch.manual_seed(0)
    return model_that_knows_something(torch.randint(3, 96, (96, 32), generator=torch.Generator().manual_seed(3)))


def convert(knowing, **settings):
    import copy

    model, text = knowing
    return surgery.convert(copy.deepcopy(model), text=text, window=32, **settings)


def test_the_whole_stays_within_the_budget_and_the_account_is_kept(knowing, tmp_path):
    _, everything = convert(knowing, budget=1e6)
    assert everything.form == "native"
    assert set(everything.budget["degrees"].values()) == {2}
    whole = everything.budget["measured"]
    assert whole > 0
    allowed = whole / 30
    twin, report = convert(knowing, budget=allowed, output=tmp_path / "twin")
    account = report.budget
    assert account["measured"] <= allowed
    assert 0 in account["degrees"].values()
    assert report.form == "custom"
    assert {row["path"]: row["degree"] for row in report.blocks} == {
        path: degree for path, degree in account["degrees"].items() if degree
    }
    for cost in account["costs"]:
        assert 0 < cost["divergence"][3] < cost["divergence"][2]  # a cubic unit is nearer to SiLU
    assert (tmp_path / "twin" / "budget.png").stat().st_size > 1000
    assert json.loads((tmp_path / "twin" / "surgery.json").read_text())["budget"]["nats"] == allowed
    from surgery.publishing.card import render_card

    text = render_card(tmp_path / "twin").text
    assert "every feed-forward block" not in text
    assert all(path in text for path, degree in account["degrees"].items() if degree == 0)
    again = surgery.load(str(tmp_path / "twin"))
    with torch.no_grad():
        assert torch.allclose(again(knowing[1][:4]).logits, twin(knowing[1][:4]).logits, atol=1e-4)


def test_costs_leave_the_model_as_it_was_when_nothing_fits(knowing):
    model, text = knowing
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match="no choice of blocks stays within"):
        surgery.convert(model, text=text, window=32, budget=1e-9)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_long_and_short_windows_together(tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    settings = {"text": "python", "tokens": 4096, "window": 96, "short": 0.5, "measure": 192}
    _, report = surgery.convert(tmp_path / "base", budget=10.0, **settings)
    assert report.budget["tokens"] % 95 == 0
    assert report.budget["measured"] == pytest.approx(report.perplexity["nats"])


def test_a_budget_is_for_causal_models_and_chooses_degrees_itself(ids):
    with pytest.raises(RecipeError, match="causal"):
        surgery.convert(tiny.make("bert"), text=ids, window=32, budget=0.1)
    with pytest.raises(RecipeError, match="chooses degrees"):
        surgery.convert(tiny.make("llama"), text=ids, window=32, budget=0.1, degree=3)


def test_a_killed_search_goes_on_from_its_costs_and_tries(knowing, tmp_path, monkeypatch):
    from surgery.conversion import budget
    from surgery.conversion.budget import _converted

    converted, tries = _converted, []

    def second_time_interrupted(*given):
        tries.append(given[-1])
        if len(tries) == 2:
            raise KeyboardInterrupt
        return converted(*given)

    def no_costs(*_):
        raise AssertionError("costs are measured again")

    settings = {"budget": 0.02, "output": tmp_path / "twin"}
    straight, report = convert(knowing, budget=0.02)
    assert len(report.budget["tried"]) > 1, "or there is nothing to interrupt"
    with monkeypatch.context() as patch:
        patch.setattr(budget, "_converted", second_time_interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(knowing, **settings)
        patch.setattr(budget, "measured_costs", no_costs)
        twin, resumed = convert(knowing, **settings)
    assert tries[2] == tries[1] != tries[0], "the first try is not made again"
    assert resumed.budget == report.budget
    assert not (tmp_path / "twin.partial").exists()
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


def test_a_twin_that_broke_down_is_followed_by_a_smaller_choice():
    from surgery.conversion.budget import next_allowance

    allowance = next_allowance([(0.1, float("inf"))], 0.05)
    assert 0 < allowance < 0.05
    assert 0 < next_allowance([(0.1, float("inf")), (0.01, 0.004)], 0.05) < 0.1

"""What an evaluation is told by name."""

import pytest

from evals.settings import plan_evaluation
from surgery.errors import RecipeError, SurgeryError


def plan(pair, **more):
    return plan_evaluation(pair / "twin", original=pair / "base", **more)


def test_everything_has_a_default_and_the_fit_is_passed_over(pair):
    planned = plan(pair)
    assert planned.twin == str(pair / "twin") and planned.original == str(pair / "base")
    assert planned.tasks == () and planned.task_settings.include_path == ()
    assert plan(pair, skip=7).skip == 7


def test_one_folder_of_tasks_may_be_a_string(pair):
    assert plan(pair, include_path="evals/tasks").task_settings.include_path == ("evals/tasks",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task_settings": None}, "no setting 'task_settings'"),
        ({"window": 1}, "window is 1, but must be at least 2"),
        ({"skip": -1}, "skip is -1"),
        ({"block_token": 5}, "did you mean 'block_tokens'"),
    ],
)
def test_what_is_wrong_is_said(pair, given, said):
    with pytest.raises(RecipeError, match="(?s)" + said):
        plan(pair, **given)


def test_an_output_that_holds_a_model_is_refused(pair):
    with pytest.raises(SurgeryError, match="holds a model"):
        plan(pair, output=pair / "base")


def test_what_is_said_of_a_text_needs_no_conversion_to_be_known():
    """A twin from elsewhere, without its report."""
    from surgery.saving.evaluation import trust_notes

    text = {"source": "python", "tokens": 100, "window": 32, "stride": 32, "windows": 4}
    report = {"text": text, "models": {"twin": {"conversion": None}}, "settings": {"skip": 0}, "reused": []}
    (line,) = trust_notes(report)
    assert "100 tokens predicted" in line
    seen = {"calibration": {"source": "python", "tokens": 50}, "refined_on": None}
    assert "SEEN BY THE FIT" in trust_notes(report | {"models": {"twin": {"conversion": seen}}})[1]

"""The SiLU form of a bilinear twin."""

import pytest
import torch

import surgery
from surgery.errors import ModelError
from surgery.publishing.silu import as_silu, export_silu


@pytest.mark.fresh_process
def test_the_silu_form_is_the_same_function(exported, tmp_path, ids):
    twin = surgery.load(str(exported / "native"))
    wide = as_silu(twin)
    assert wide.config.hidden_act == "silu"
    with torch.no_grad():
        torch.testing.assert_close(wide(input_ids=ids).logits, twin(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    seen = export_silu(exported / "native", tmp_path / "silu")
    assert seen["difference"] < 1e-5
    from surgery.publishing.card import render_card

    assert "trust_remote_code" not in render_card(tmp_path / "silu").text
    with pytest.raises(ModelError, match="SiLU form"):
        export_silu(exported / "custom", tmp_path / "other")
    assert not (tmp_path / "other").exists()

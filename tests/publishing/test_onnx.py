"""A twin as an ONNX graph."""

import pytest
import torch

import surgery
from surgery.errors import ModelError
from tests import commands


@pytest.mark.parametrize("name", ["native", "custom"])
def test_onnxruntime_computes_the_twin_without_a_nonlinearity_in_its_blocks(exported, tmp_path, name):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    done = commands.surgery("export", exported / name, "-o", tmp_path / "out", "--form", "onnx")
    assert done.returncode == 0, done.stderr
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert not operators & {"Sigmoid", "Tanh", "Erf", "Relu", "Gelu", "HardSigmoid", "Swish"}
    assert "MatMul" in done.stdout
    from surgery.publishing.card import render_card
    from surgery.saving.report import read_verified_report

    assert "onnxruntime.InferenceSession" in render_card(tmp_path / "out").text
    assert "model.onnx" in read_verified_report(tmp_path / "out")["verification"]["weights"]
    original = surgery.load(exported / "base")
    assert "Sigmoid" in _operators(original), "the control: the original's activation is in its graph"


def _operators(model):
    from surgery.publishing.onnx import _Outputs

    ids = torch.arange(3, 19)[None]
    program = torch.onnx.export(_Outputs(model).eval(), (ids,), dynamo=True, verbose=False)
    return {node.op_type for node in program.model.graph}


def test_a_graph_that_computes_something_else_is_not_kept(exported, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from surgery.publishing import onnx
    from surgery.publishing.onnx import export_onnx

    monkeypatch.setattr(onnx, "TOLERANCE", 0.0)
    with pytest.raises(ModelError, match="computes something else"):
        export_onnx(exported / "native", tmp_path / "out")
    assert not any(tmp_path.iterdir())

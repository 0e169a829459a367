"""A twin as an ONNX graph, compared with the twin in onnxruntime before it is believed.

The graph takes `input_ids` (batch, length), both free, and gives `logits` (or the last hidden state): the prefill,
without a cache.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import ModelError, SurgeryError
from surgery.models import loading
from surgery.saving.folder import check_target, whole_folder
from surgery.saving.reload import main_output
from surgery.saving.report import read_verified_report, write_report

GRAPH = "model.onnx"
TOLERANCE = 1e-4  # relative norm: another engine sums in another order, in float32


class _Outputs(nn.Module):
    """input_ids ↦ the twin's main output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if model.can_generate() else {}

    def forward(self, input_ids: Tensor) -> Tensor:
        return main_output(self.model(input_ids=input_ids, **self.options))


def export_onnx(folder: Path, out: Path, original: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Saves the graph; the difference seen in onnxruntime and the operators in it.

    Raises:
        SurgeryError: onnx, onnxscript or onnxruntime is not installed.
        ModelError: more than one text goes in, the graph cannot be traced, or onnxruntime computes something else.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise SurgeryError(f"{error.name} is not installed", fix="pip install 'polysurgery[onnx]'") from error
    report = read_verified_report(folder)
    out = check_target(out, overwrite)
    loaded = loading.loaded(str(folder), base=original)
    model: Any = loaded.model
    if getattr(model.config, "is_encoder_decoder", False) or model.main_input_name != "input_ids":
        raise ModelError("only models that read one text have an ONNX form here", where=str(folder))
    network = _Outputs(model).eval()
    vocabulary = model.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    probes = [torch.randint(vocabulary, shape, generator=draw) for shape in ((2, 16), (3, 25))]
    free = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    with whole_folder(out) as place:
        with _quiet():
            names: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["logits"], "verbose": False}
            program = torch.onnx.export(network, (probes[0],), dynamo=True, dynamic_shapes=free, **names)
            assert program is not None
            program.save(place / GRAPH)
        session = onnxruntime.InferenceSession(place / GRAPH, providers=["CPUExecutionProvider"])
        difference = max(_difference(session, network, probe) for probe in probes)
        if not difference < TOLERANCE:
            raise ModelError(
                f"onnxruntime computes something else: relative difference {difference:.1e}", where=str(out)
            )
        graph = onnx.load(str(place / GRAPH), load_external_data=False).graph
        operators = sorted({node.op_type for node in graph.node})
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(place)
        loaded.companions.write(place)
        model.config.save_pretrained(place)
        seen = {"verified": True, "form": "onnx", "difference": difference, "operators": operators}
        write_report(place, {**report, "form": "onnx", "exported_from": folder.name}, seen)
    return seen


def _difference(session: Any, network: nn.Module, probe: Tensor) -> float:
    """Of the graph's output from the network's, relative norm."""
    found = torch.from_numpy(session.run(None, {"input_ids": probe.numpy()})[0])
    with torch.no_grad():
        expected = network(probe)
    return float((found - expected).norm() / expected.norm())


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the exporter's progress and its notes on packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)

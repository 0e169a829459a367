"""What the tests of conversion share."""

import torch

from tests import tiny


def outputs(model, name, ids):
    with torch.no_grad():
        if name == "vit":
            return model(pixel_values=tiny.inputs_for("vit", ids)["pixel_values"][:4]).logits
        extra = {"decoder_input_ids": ids[:4]} if name.startswith("t5") else {}
        return model(input_ids=ids[:4], **extra).logits

"""What the tests of blocks share."""

from tests import tiny


def run(model, name, ids):
    inputs = tiny.inputs_for(name, ids)
    if name == "vit":
        return lambda: model(pixel_values=inputs["pixel_values"][:2])
    extra = {"decoder_input_ids": ids[:2]} if name.startswith("t5") else {}
    return lambda: model(input_ids=ids[:2], **extra)

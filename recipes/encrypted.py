"""One block of a twin on encrypted numbers: client and server, times, sizes and the error.

    surgery export TWIN -o EXPORT --form encrypted
    python recipes/encrypted.py EXPORT TWIN [--block 12] [--prompt "The capital of France is"]

The block's input at the prompt's last token is encrypted, sent to a server that has the block and public keys, and what
it answers is decrypted and compared with what the twin's block writes.
"""

import argparse

import torch

import surgery
from surgery.models import loading
from surgery.models.saved_blocks import twin_blocks
from surgery.publishing.encrypted import encrypted_once, read_block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("twin")
    parser.add_argument("--block", type=int, default=0, help="its number")
    parser.add_argument("--prompt", default="The capital of France is")
    options = parser.parse_args()
    loaded = loading.loaded(options.twin)
    blocks = twin_blocks(loaded.model)
    if not 0 <= options.block < len(blocks):
        parser.error(f"the twin has blocks 0 to {len(blocks) - 1}")
    chosen = blocks[options.block]
    seen: dict[str, torch.Tensor] = {}
    module = loaded.model.get_submodule(chosen.path)
    module.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0][0, -1], y=output[0, -1]))
    with torch.no_grad():
        loaded.model(**loaded.tokenizer(options.prompt, return_tensors="pt"))
    try:
        block, parameters = read_block(options.export, chosen.path)
        found = encrypted_once(block, parameters, seen["x"].double())
    except surgery.SurgeryError as error:
        parser.error(str(error))
    error = float((found["y"] - seen["y"].double()).norm() / seen["y"].double().norm())
    print(f"{chosen.path}: ring of degree {parameters.degree:,}, primes of {parameters.primes} bits")
    for name, seconds in found["seconds"].items():
        print(f"  {name:8} {seconds:8.3f} s")
    for name, size in found["bytes"].items():
        print(f"  {name:8} {size:12,} bytes")
    print(f"  relative error {error:.1e}")


if __name__ == "__main__":
    main()

"""What the tests of calibration share."""

from types import SimpleNamespace

from tests import tiny


class Characters:
    """A tokenizer that maps characters to ids 3 … 95."""

    eos_token_id, bos_token_id = 2, 1
    all_special_ids = (1, 2)

    def get_vocab(self):
        return {str(number): number for number in range(120)}  # more than the model has embeddings for

    def decode(self, ids, **_):
        """Of a text without line ends and "}", the text."""
        return "".join(chr(n - 3 if n - 3 > 31 else n + 90) for n in ids if n > 2)

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(c) % 93 for c in text]}


MODEL = SimpleNamespace(config=tiny.make("llama").config)


class WithStart(Characters):
    """A tokenizer that begins every text with a start token, as Llama's and Gemma's do, and ends it."""

    def __call__(self, text, add_special_tokens=True, **_):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

"""A scaled block under CKKS (Cheon, Kim, Kim & Song, 2017), by TenSEAL: the client keeps the key, the server computes.

    client = Client(parameters)                    server = Server(block, client.public_keys(), parameters)
    sent = client.encrypt(x / block.x_size)   →    answer = server(sent)   →    client.decrypt(answer) * block.y_size

Each of the block's three multiplications takes one prime of the modulus. How large the modulus may be for 128 bits of
security is in the Homomorphic Encryption Standard (Albrecht et al., 2018, table 1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ModelError, SurgeryError
from surgery.publishing.scaled_block import ScaledBlock

SECURITY = 128  # bits, against classical attacks, ternary keys
MOST_BITS = {8192: 218, 16384: 438, 32768: 881}  # of the modulus, by the ring's degree
SCALE = 40  # bits after the point
OUTER = {8192: 49}  # bits of the first and the last prime; as many as there is room for
WIDE_OUTER = 60


@dataclass(frozen=True)
class Parameters:
    """What client and server agree on.

    Attributes:
        degree: of the ring; half of it numbers fit into a ciphertext.
        primes: bits of the modulus' primes: one for the whole part, one for each multiplication, one for keys.
        scale: bits after the point.
    """

    degree: int
    primes: tuple[int, ...]
    scale: int = SCALE

    @staticmethod
    def of(width: int, depth: int) -> Parameters:
        """The cheapest for vectors of `width` numbers and `depth` multiplications. Raises ModelError for none."""
        for degree, most in MOST_BITS.items():
            outer = OUTER.get(degree, WIDE_OUTER)
            primes = (outer, *[SCALE] * depth, outer)
            if width <= degree // 2 and sum(primes) <= most:
                return Parameters(degree, primes)
        raise ModelError(
            f"vectors of {width:,} numbers do not fit into one ciphertext",
            cause=f"with {SECURITY} bits of security the largest holds {max(MOST_BITS) // 2:,}",
            fix="convert with fewer --units",
        )

    @property
    def largest(self) -> float:
        """What a number must stay below at the end: beyond, it wraps around."""
        return float(2 ** (self.primes[0] - self.scale - 1))

    def as_dict(self) -> dict[str, Any]:
        """For people who use another library."""
        return {**asdict(self), "primes": list(self.primes), "security": SECURITY, "scheme": "CKKS"}

    def new_keys(self) -> Any:
        seal = _tenseal()
        context = seal.context(
            seal.SCHEME_TYPE.CKKS, poly_modulus_degree=self.degree, coeff_mod_bit_sizes=list(self.primes)
        )
        context.global_scale = 2**self.scale
        context.generate_galois_keys()
        return context


class Client:
    """Has the secret key: encrypts a block's input and decrypts its output."""

    def __init__(self, parameters: Parameters) -> None:
        self._context = parameters.new_keys()

    def public_keys(self) -> bytes:
        """For the server: it computes with them and reads nothing."""
        keys: bytes = self._context.serialize(save_secret_key=False)
        return keys

    def encrypt(self, scaled: Tensor) -> bytes:
        """Args: scaled: one token's input, each coordinate in [−1, 1]; (d,)."""
        sent: bytes = _tenseal().ckks_vector(self._context, [*scaled.tolist(), 1.0]).serialize()
        return sent

    def decrypt(self, answer: bytes) -> Tensor:
        """One token's scaled output, (out,) float64."""
        return torch.tensor(_tenseal().ckks_vector_from(self._context, answer).decrypt(), dtype=torch.float64)


class Server:
    """Has the block and public keys: computes on what it cannot read."""

    def __init__(self, block: ScaledBlock, keys: bytes) -> None:
        self._context = _tenseal().context_from(keys)
        # Biases are columns: a product with a matrix repeats its result over all places of the ciphertext, as the next
        # product needs it, and a bias that is added would not be repeated.
        self._gate, self._up, self._down = (one.T.tolist() for one in block.homogeneous())

    def __call__(self, sent: bytes) -> bytes:
        x = _tenseal().ckks_vector_from(self._context, sent)
        answer: bytes = (x.mm(self._gate) * x.mm(self._up)).mm(self._down).serialize()
        return answer


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tenseal":
            raise SurgeryError("tenseal is not installed", fix="pip install 'polysurgery[encrypted]'") from error
        raise SurgeryError(
            "tenseal cannot be imported",
            cause=f"{error}; nnsight, where it was imported before, hides compiled modules",
            fix="import tenseal first",
        ) from error
    return tenseal

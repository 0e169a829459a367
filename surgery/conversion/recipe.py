"""What to do, as data: a strict YAML file, with flags on top.

Every problem of a file is reported at once, with its line and the nearest known name; an unknown key is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from surgery.calibration.mixtures import Mixture, Part
from surgery.calibration.texts import AUTO, BUILT_IN, SAMPLES
from surgery.errors import RecipeError, did_you_mean
from surgery.runtime.settings import whole_number
from surgery.runtime.vocabulary import FORMER, current
from surgery.runtime.yaml_file import read_mapping

COUNTS = ("tokens", "window", "batch", "measure", "epochs")
EPOCHS, SEEN = 6, 393_216  # how often a token is seen at most, and how many all epochs together should see
MOST_BLOCKS = 1_000_000  # no model has more; a larger number is a slip of the hand


class Recipe(BaseModel):
    """One conversion.

    The defaults are the recommended ones; `docs/log.md` holds the measurements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field("", description="Hub id, folder or .gguf file")
    revision: str | None = Field(None, description="Hub revision of the model")
    output: str | None = Field(None, description="folder to write the twin to")
    degree: int = Field(2, ge=1, le=9, description="total degree of each block's polynomial in its input")
    assume: Literal["data", "gaussian", "standard"] = Field(
        "data",
        description="distribution of the block's input: its own moments, N(mean, covariance), or N(0, I)",
    )
    moments: str | None = Field(
        None, description="safetensors file with PATH.mean and PATH.covariance per block (assume: gaussian)"
    )
    readout: Literal["refit", "keep"] | None = Field(
        None, description="re-solve the last map on the data, or keep it (default: refit with assume data, else keep)"
    )
    target: Literal["stream", "block"] = Field(
        "stream",
        description="what a refitted block aims at: the original's residual stream, or its own block's output",
    )
    units: float = Field(
        1.0, gt=0, le=1, description="share of each block's units to keep, the most useful ones, readout re-solved"
    )
    epochs: int | None = Field(
        None,
        ge=0,
        description="how often every calibration token is seen while all maps of a block are fitted together, from the "
        "closed form on; 0: the closed form alone (default: at degree 2, where the readout is re-solved, 6 up to 64k "
        "tokens and fewer of more; else 0)",
    )
    budget: float | None = Field(
        None, gt=0, description="nats that may be lost: per block degree 2, degree 3 or the original, to stay within"
    )
    blocks: str | None = Field(None, description="which blocks, as in 0-5,8 (default: all)")
    text: str | list[str] | dict[str, float] = Field(
        "auto",
        description="calibration text: broad, samples, python, code, hub:NAME, or a .txt/.jsonl/.safetensors file; "
        "several, with shares (SOURCE=2); auto: broad, fetched once; samples where it cannot be",
    )
    tokens: int = Field(65536, ge=1, description="calibration tokens")
    window: int = Field(512, ge=2, description="tokens a sequence")
    short: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of tokens in short sequences that begin as texts do (default: 0.5 of samples, 0.1 of texts)",
    )
    random_tokens: float = Field(
        0.02, ge=0, lt=1, description="share of the tokens replaced by random ones, so that rare tokens are met"
    )
    batch: int = Field(8, ge=1, description="sequences a forward pass")
    measure: int = Field(8192, ge=0, description="further tokens to measure perplexity on, 0 for none")
    seed: int = Field(0, ge=0, description="seed for the model's own samples")
    offload: bool = Field(False, description="leave the weights on disk: for models larger than memory")
    form: Literal["auto", "native", "custom"] = Field(
        "auto", description="checkpoint form: stock architecture where possible, or custom code"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("float32", description="precision to compute in")
    matmul: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what float32 matrices are multiplied in: in the forward passes, in what blocks write, in the "
        "closed form's hidden vectors, and while maps are fitted together; sums and solutions keep float32 and float64 "
        "(auto: bfloat16 where that is faster and the model runs so)",
    )
    device: str = Field("auto", description="where to compute: cpu, cuda, …; auto: the accelerator, if there is one")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the saved weights (auto: as in the source)"
    )
    tail_weight: float | None = Field(
        None,
        ge=0,
        description="weight of a wide Gaussian added to the moments: tames high powers outside the calibrated range "
        "(default: 0.01 from degree 4 on, else 0)",
    )
    tail_width: float = Field(3.0, gt=1, description="its width, in standard deviations of the data")

    @field_validator(*COUNTS, mode="before")
    @classmethod
    def _counts(cls, given: Any) -> Any:
        """200k and 4M are numbers, here as on the command line."""
        number = whole_number(given) if isinstance(given, str) else None
        return given if number is None else number

    @field_validator("text", mode="before")
    @classmethod
    def _sources(cls, given: Any) -> Any:
        """One message for all three forms."""
        several = list(given.values()) if isinstance(given, dict) else given
        kind = (int, float) if isinstance(given, dict) else str
        if not isinstance(given, str) and not (
            isinstance(several, list) and all(isinstance(item, kind) for item in several)
        ):
            raise ValueError("neither a source, nor a list of sources, nor shares by source")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        if self.moments and self.assume != "gaussian":
            problems.append("moments needs assume: gaussian")
        if self.form == "native" and self.degree != 2:
            problems.append("form: native needs degree 2 (a bilinear block is quadratic)")
        if self.units < 1 and (not self.refit or self.degree == 1):
            problems.append("units needs readout: refit and a degree of 2 or more")
        if self.epochs and (not self.refit or self.degree == 1):
            problems.append("epochs needs readout: refit and a degree of 2 or more")
        if self.budget is not None and (self.degree != 2 or self.assume != "data" or self.form == "native"):
            problems.append("budget chooses degrees and form itself, and needs assume: data")
        if self.offload and (not self.output or self.budget is not None):
            problems.append("offload needs an output folder, and no budget")
        if self.tail_weight and self.assume != "data":
            problems.append("tail_weight needs assume: data")
        part = Part(SAMPLES if self.text == AUTO else str(self.text), 1.0)
        least = math.ceil(2 * self.window / (1 - part.short(self.short)))
        if self.tokens < least and self.text in (AUTO, *BUILT_IN):
            problems.append(
                f"tokens ({self.tokens}) must be at least {least}, so that two windows of {self.window} are "
                f"left beside the short ones (short: {part.short(self.short):g})"
            )
        try:
            Mixture.of(self.text)
        except RecipeError as error:
            problems.append(f"text: {error.where}: {error.what}")
        if self.blocks is not None:
            try:
                parse_blocks(self.blocks)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def refit(self) -> bool:
        return (self.readout or ("refit" if self.assume == "data" else "keep")) == "refit"

    def epochs_at(self, degree: int) -> int:
        """Of a block of this degree. A cubic gains next to nothing on running text, and loses on short sentences.

        More tokens are seen less often, for the same time: they win more than a token seen again.
        """
        if self.epochs is not None:
            return self.epochs
        return max(1, min(EPOCHS, round(SEEN / self.tokens))) if self.refit and degree == 2 else 0

    @property
    def tail(self) -> float:
        """High powers explode where the data was thin; up to degree 3 the tail costs more than it saves."""
        own = 0.01 if self.degree >= 4 and self.assume == "data" else 0.0
        return own if self.tail_weight is None else self.tail_weight

    @property
    def short_share(self) -> float | None:
        """None where it differs between sources, or is not known yet; the calibration's parts say it."""
        if self.short is not None or self.text == AUTO:
            return self.short
        shares = {part.short(None) for part in Mixture.of(self.text).parts}
        return shares.pop() if len(shares) == 1 else None

    def resolved(self) -> dict[str, Any]:
        """As recorded beside the twin: every value spelled out."""
        readout = "refit" if self.refit else "keep"
        chosen = {"readout": readout, "epochs": self.epochs_at(self.degree), "tail_weight": self.tail}
        return {**self.model_dump(), **chosen, "short": self.short_share}


def parse_blocks(text: str) -> list[int]:
    """`0-5,8` → [0, 1, 2, 3, 4, 5, 8]. Raises ValueError."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"blocks: {part.strip()!r} is neither a number nor a range such as 0-5")
        low, high = int(match[1]), int(match[2] or match[1])
        if high > MOST_BLOCKS:
            raise ValueError(f"blocks: no model has as many as {high}")
        if high < low:
            raise ValueError(f"blocks: the range {part.strip()} runs backwards")
        chosen += range(low, high + 1)
    return sorted(set(chosen))


def load_recipe(path: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """Defaults < file < flags. Raises RecipeError with every problem, each with its line."""
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if path is not None:
        values, lines = read_mapping(Path(path).expanduser())
        if isinstance(values.get("convert"), dict):
            raise RecipeError("the recipe describes a whole run", where=path, fix=f"`surgery run {path}`")
        lines = {FORMER.get(key, key): line for key, line in lines.items()}
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Recipe.model_validate({**current(values), **current(given)})
    except ValidationError as error:
        messages = [
            (f"{path}:{lines[key]}: " if key in lines and key not in given else "") + message
            for key, message in problems_of(error)
        ]
        raise problems_error(messages, "settings" if path is None else "recipe", "convert") from error


def problems_of(error: ValidationError) -> list[tuple[str, str]]:
    """(key, what is wrong with it) each; the key is empty where several do not go together."""
    found = []
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else ""
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = f"unknown key{did_you_mean(key, Recipe.model_fields)}"
        elif key:
            known = re.findall(r"'(\w+)'", text) if item["type"] == "literal_error" else ()
            near = did_you_mean(str(item["input"]), known)
            text = f"{item['input']!r} will not do{near}: {text[:1].lower() + text[1:]}"
            if key in COUNTS and isinstance(item["input"], str):
                text = f"{item['input']!r} is not a whole number: write 51200, 200k or 4M"
        found.append((key, f"{key + ': ' if key else ''}{text}"))
    return found


def problems_error(messages: Sequence[str], where: str, command: str) -> RecipeError:
    """All of them in one error."""
    count = f"{len(messages)} problems" if len(messages) > 1 else "a problem"
    return RecipeError(
        f"{count} in the {where}\n  " + "\n  ".join(messages),
        fix="`surgery convert --help`, refine, eval, card and push say what the options of each stage take"
        if command == "run"
        else f"`surgery {command} --help` says what each option takes",
    )

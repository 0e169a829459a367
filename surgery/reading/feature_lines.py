"""Terms of features for a terminal."""

from __future__ import annotations

from typing import Any

from surgery.reading.picture import label, name_of, peaks

TOLD = (1, 10, 100, 1000)
READ = 4  # features of the input whose writers are shown


def feature_lines(found: dict[str, Any]) -> list[str]:
    """`explanation.json`'s `features`: of one direction, or the survey of output features."""
    out = [""] + [line for key in ("input", "output") for line in _dictionary(key, found.get(key))]
    for row in found.get("list", []):
        told = "" if row["r2"] is None else f", told by the input's features with R² {row['r2']:.2f}"
        out.append(f"  {row['name']:14} fires on {row['fires']:.2%} of tokens{told}: {peaks(row['contexts'])}")
    if "curve" not in found:
        return out
    for key, what in (("together", "pairs of features"), ("alone", "single features")):
        out.append(f"strongest {what} by {found['rank']}, with their share of all terms' squared strength")
        for term in found[key]:
            names = " × ".join(label(found["described"], number) for number in term["features"])
            out.append(
                f"  {term['strength']:+9.3g} {term['share']:6.1%}  {names}  ({term['tokens']} tokens, "
                f"{term['mean']:+.3g} on average there)"
            )
    for number, one in list(found["described"].items())[:READ]:
        if one.get("upstream"):
            out.append(f"{label(found['described'], int(number))} is written into by {writer_line(one['upstream'])}")
    curve = {row["terms"]: row for row in found["curve"]}
    steps = [curve[step] for step in TOLD if step in curve]
    told = "; ".join(f"{row['terms']} terms r {row['correlation']:.2f}, R² {row['r2']:.2f}" for row in steps)
    whole = found["whole"]
    where = "the same tokens" if found["same_text"] else f"{found['judged_on']:,} other tokens"
    out.append(f"told on {where}: {told}; all r {whole['correlation']:.2f}, R² {whole['r2']:.2f}")
    return out


def writer_line(writers: list[dict[str, Any]]) -> str:
    """Features of an earlier block, each with what it moves, in standard deviations of what is read."""
    return (
        "; ".join(f"{row['moves']:+.2f}σ {name_of(row['feature'], row['contexts'])}" for row in writers)
        or "none of them"
    )


def _dictionary(key: str, found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    shares = ", ".join(f"R² {value:.2f} of the {site}" for site, value in found["r2"].items())
    line = f"features of the {key}: {found['name']}, {found['size']:,}, {found['kind']}; {shares}"
    if "firing" in found:
        line += f"; {found['firing']:.1f} fire on a token, {found['silent']:,} on none of this text"
    if "feature" in found:
        where = peaks(found["contexts"]) or "(nowhere)"
        line += f"; feature {found['feature']} fires on {found['fires']:.2%} of tokens: {where}"
    return [line]

"""The mixture `broad`: openly licensed English of many kinds, from the Common Pile v0.1 (arXiv 2506.05209) on the Hub.

Each part is one file of one dataset at one commit, of which only as much is fetched as is read, so that the same
tokens come everywhere. Public domain, CC0, CC BY or CC BY-SA, as the datasets say; stack-edu is permissively licensed
code. Nothing of it is in a twin but sums over it.
"""

from __future__ import annotations

FILES: dict[str, tuple[str, str, str, float]] = {
    "encyclopaedia": ("wikimedia_filtered", "0641bb84bd9b7162bcddf8be7836822161a9a342", "wikimedia-0027.json.gz", 2.0),
    "books": (
        "project_gutenberg_filtered",
        "3cdf6879c807f4e4e063f2ceb23bc268d8c29ab7",
        "project_gutenberg-dolma-0000.json.gz",
        3.0,
    ),
    "code": ("stackv2_edu_filtered", "c354dbe88469a1153e97c6a63ac50591849654de", "stack-edu-0073.json.gz", 2.0),
    "questions": (
        "stackexchange_filtered",
        "c0ac7373830c688a43fc12d1988c4b19ccd884ab",
        "stackexchange-dolma-0000.json.gz",
        1.5,
    ),
    "dialogue": (
        "ubuntu_irc_filtered",
        "84f88c986584f11d672befab542fa4d5123f3e8f",
        "ubuntu-chat-dolma-0000.json.gz",
        1.0,
    ),
    "debate": ("uk_hansard_filtered", "c88adc44309aa255a41b51cef93ba783f775fe23", "uk_hansard-0000.json.gz", 1.0),
    "science": ("peS2o_filtered", "297747513bfb0ff1fbf61ddad3b03319d0f04597", "peS2o-0000.json.gz", 1.5),
    "textbooks": ("libretexts_filtered", "70388bca52b4a93515e14b1d56618fd7944988fd", "libretexts-0000.json.gz", 1.0),
    "government": ("usgpo_filtered", "b150cc22211de4d57f1b7f570097a00e65042424", "usgpo-0000.json.gz", 0.5),
    "manuals": (
        "python_enhancement_proposals_filtered",
        "cfd1b2c53646bcf2148f77315db704214dcb7743",
        "peps-dolma-0000.json.gz",
        0.5,
    ),
    "recipes": ("foodista_filtered", "28ac18deab7ed2ec3580f4f13f0ed141e47957ef", "foodista-dolma-0000.json.gz", 0.5),
    "essays": (
        "public_domain_review_filtered",
        "ec81450d060d25c2bb01b9fb2d24399aeb37a3cc",
        "public-domain-review-0000.json.gz",
        0.5,
    ),
}
"""By kind: dataset, commit, file and share."""

SOURCES = {kind: f"hub:common-pile/{name}@{commit}/{file}" for kind, (name, commit, file, _) in FILES.items()}
KIND_OF = {source: kind for kind, source in SOURCES.items()}
PARTS = {SOURCES[kind]: row[-1] for kind, row in FILES.items()}
"""Shares by source."""

"""Every architecture of the installed transformers as a tiny model, converted and loaded elsewhere; a table out."""

"""A finished twin in; its card, its upload, or another form of it out."""

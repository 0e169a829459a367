"""Texts in, what reaches each block out: documents → windows of token ids → model inputs → arrivals."""

"""Measures of what a twin costs."""

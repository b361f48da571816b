"""Measures of a model: bits per byte, and text to look at."""

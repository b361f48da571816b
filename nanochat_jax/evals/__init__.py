"""Measures of a model: bits per byte, CORE, chat tasks, and text to look at."""

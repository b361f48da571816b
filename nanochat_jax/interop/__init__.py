"""Other projects' names for our parameters: names.py, `params_to_torch` and `params_from_torch`."""

"""Runs untrusted Python programs, those that a model wrote, where they can do no harm.

Everyone calls run.run. run.py starts child.py, which isolates the program with kernel.py and
seccomp.py and then becomes an interpreter that reads program.py.
"""

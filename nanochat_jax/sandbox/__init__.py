"""Runs untrusted Python programs, those that a model wrote, where they can do no harm.

The door is run.run (scripts and tasks call it). run.py starts child.py, which isolates the program
with kernel.py and seccomp.py and then becomes an interpreter that reads program.py.
"""

"""What a run costs before it starts: memory, hours, dollars; compiled for GPUs that are not there.

scripts/plan.py is its door: estimate.py is arithmetic, program.py compiles, hlo.py and roofline.py
read the compiled program, gpus.py describes the GPUs.
"""

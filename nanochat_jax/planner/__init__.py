"""What a run costs before it starts: memory, hours, dollars; compiled for GPUs that are not there.

estimate.py is arithmetic; program.py compiles, for the meshes of gpus.py; hlo.py and roofline.py
read the compiled program. scripts/plan.py is its command line.
"""

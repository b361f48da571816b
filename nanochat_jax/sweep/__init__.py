"""Grids of ordinary runs, and what they show: scaling laws and paired seeds.

grid.py makes and trains the runs, results.py reads them, fits.py fits, plots.py draws.
scripts/sweep.py is its door.
"""

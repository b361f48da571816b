"""Grids of ordinary runs, and what they show: scaling laws and paired seeds.

grid.py makes and trains the runs, results.py summarises them, fits.py has the mathematics, plots.py
the plots. scripts/sweep.py is its command line.
"""

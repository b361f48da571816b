"""The report card of a run, in Markdown and HTML.

chain.py finds the stages that a model went through, content.py decides what the report says,
plots.py makes its plots and page.py writes it. scripts/report.py is its command line.
"""

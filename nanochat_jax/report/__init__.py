"""The report card of a run, in Markdown and HTML.

chain.py finds the stages that a model went through, content.py decides what is said, page.py and
plots.py draw it. scripts/report.py is its door.
"""

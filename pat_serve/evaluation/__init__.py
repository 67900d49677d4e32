"""Evaluation: perplexity and tasks of several models on the same items, and how sure a difference is.

text.py       a file -> one text -> windows of tokens     lm_eval_tasks.py, backends.py  tasks through lm-eval
outcomes.py   what one model did on every item            paper14/                       the paper's 14 tasks
paired.py     the mathematics of paired comparisons       cache.py                       finished work is not repeated
report.py     estimates and comparisons, as JSON          gate.py                        bounds that a model must keep
table.py, page.py  the report for a terminal, a browser    answers/                   what models write

This folder belongs to the core: it imports no stage.
"""

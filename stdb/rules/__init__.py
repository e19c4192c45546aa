"""Rules: what becomes of an operation of a traced ANN; a file a family, one small function a rule.

A rule gives a node, or the number of the one that it passes on, or raises with a remedy. Which
rule is for what is in the tables of :mod:`stdb.rewriting`.
"""

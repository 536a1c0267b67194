"""Vectors of a slide: the bag and its file, cohorts of bags, labels and splits.

Import from the modules: `wsimil.bags.bag`, `wsimil.bags.dataset`, `wsimil.bags.labels`, `wsimil.bags.splits`.
"""

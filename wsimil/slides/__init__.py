"""Pixels: which slides there are, any region of one at any µm/px, where tissue is and where tiles go.

Import from the modules: `wsimil.slides.cohort`, `wsimil.slides.slide`, `wsimil.slides.tissue`, `wsimil.slides.polygons`,
`wsimil.slides.tiling`.
"""

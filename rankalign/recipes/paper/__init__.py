"""The comparison of the RRHF paper (Yuan et al. 2023, tables 2, 6, 7 and 10), run again: every row, seed by seed.

``table`` runs the units, ``costs`` counts what they took, ``claims`` holds the paper's claims against the figures,
``page`` writes it all down. ``metered`` is the process in which a row trains.
"""

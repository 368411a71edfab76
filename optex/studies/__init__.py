"""Problems, baselines, comparisons, the paper's figures, pictures, the command line.

Needs more than the library itself: ``pip install "optex[studies]"``.
"""

"""Problems, baselines, comparisons, the paper's figures, pictures, the command line."""

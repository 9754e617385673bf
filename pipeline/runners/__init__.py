"""Where the folds of a cross-validation run: side by side in processes of this machine, or on a Ray cluster.

`pipeline.crossval` runs them one after another in its own process unless it is handed one of these.
"""

"""The workflow: search, threshold, retrain, and what is told about them."""

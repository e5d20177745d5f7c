"""The loop that dense training, search and retraining share."""

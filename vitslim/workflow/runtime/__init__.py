"""What every stage stands on: its processes and signals, its random seeds, what it tells."""

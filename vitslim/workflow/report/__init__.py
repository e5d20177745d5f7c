"""What is told of a run: as it goes, and afterwards."""

"""Which parts of the method matter, and what a user would try instead, on digits."""

"""What a run was asked for: settings, recipes, and what the command line adds."""

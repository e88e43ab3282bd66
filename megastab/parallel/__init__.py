"""Where the ranks are and what each holds: the grid, the collectives, the parallel layers, and who counts a parameter."""

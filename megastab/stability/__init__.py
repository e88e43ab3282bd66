"""What happened in a step and what was decided about it."""

"""What a run tells while it is alive: names and meanings of every number, rates, and where the numbers go."""

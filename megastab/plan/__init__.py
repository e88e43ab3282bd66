"""What a config will cost, before it is run."""

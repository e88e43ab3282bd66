"""The seams of a step in their order, and the loop around them."""

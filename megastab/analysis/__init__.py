"""Trained models, ours and other people's, examined on one process.

Letters: N windows, B windows of one forward pass, S positions, D channels of the residual stream, V vocabulary, Q heads, T tokens.
"""

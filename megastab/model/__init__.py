"""GPT and LLaMA as one list of layers, the same for the plain and the pipeline engine.

Letters used in names throughout the room: B samples, S positions, T tokens on this rank's residual stream (B*S, or a 1/tp share of
it under sequence parallel), G = B*S tokens, D residual width, N query heads and K key/value heads on this rank, H head width, F MLP
channels on this rank, V vocabulary rows on this rank.
"""

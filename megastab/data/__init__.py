"""The tokens: SentencePiece or Hugging Face tokenizer, Megatron ``.bin/.idx`` files, packed samples, blends, the exact position in them.

Text files go through ``prepare`` (several processes, on several MPI ranks; output independent of their numbers) into the format of
megatron-core's ``IndexedDataset``; ``indexed`` opens such files after checking them, ``samples`` cuts them into sequences in an
order that is a pure function of (seed, epoch, source), ``blend`` mixes sources by a fixed pattern, and ``batches`` hands each
data-parallel rank its part of a step. The only state of the whole room is one integer, the count of consumed samples. Nothing here
needs an accelerator or a process group, and only ``batches`` imports torch.
"""

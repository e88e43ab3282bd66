"""A transformers LLaMA under ZeRO with ZClip and TVR, on the bytes of a Python source; start it with python, deepspeed or torchrun."""

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import megastab

SEQ, STEPS = 64, 30
CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "zero_optimization": {"stage": 2},
    "megastab": {"stability": {"zclip": {"warmup_steps": 10}, "tvr": {"target_std": 0.02, "interval_steps": 10}}},
}

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=SEQ, **shape))
engine, optimizer, _, _ = megastab.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)

text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
draw = torch.Generator().manual_seed(engine.global_rank)
for _ in range(STEPS):
    first = torch.randint(len(text) - SEQ, (engine.train_micro_batch_size_per_gpu(),), generator=draw)
    tokens = torch.stack([text[i : i + SEQ] for i in first]).to(engine.device)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    step = engine.stability.last
    if engine.global_rank == 0:
        print(f"step {step.step}  loss {loss.item():.3f}  norm {step.grad_norm:.3f}  {step.action}  rescaled {step.rescaled}")

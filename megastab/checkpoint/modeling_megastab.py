"""A megastab model for transformers, whatever its variant: plain torch, no kernels, no cache; load with ``trust_remote_code=True``.

This file stands beside exported weights and needs nothing of megastab. ``config.json`` holds the run's model section (``megastab``) and
the shape of every matrix (``shapes``), under the names megastab gives them; a point in a name is a double underscore in the weights.

Letters: B batch, S positions, D width, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MegastabConfig(PretrainedConfig):
    """The run's model section, and the few names tools look for."""

    model_type = "megastab"

    def __init__(self, megastab: dict[str, Any] | None = None, shapes: dict[str, list[int]] | None = None, **kwargs: Any):
        self.megastab, self.shapes = megastab or {}, shapes or {}
        names = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers"}
        names |= {"num_attention_heads": "num_heads", "max_position_embeddings": "max_seq_len"}
        for theirs, ours in names.items():
            setattr(self, theirs, self.megastab.get(ours))
            kwargs.pop(theirs, None)
        super().__init__(**{**kwargs, "tie_word_embeddings": False})  # a tied head is no weight here


class Weights(nn.Module):
    """All matrices by their megastab names."""

    def __init__(self, shapes: dict[str, list[int]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "__"), nn.Parameter(torch.empty(shape)))

    def forward(self, name: str) -> Tensor | None:
        """The matrix called ``name``; None where the model has none."""
        return self._parameters.get(name.replace(".", "__"))


class MegastabForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT or LLaMA with megastab's norms, norm positions, sinks, gates, caps and activations."""

    config_class = MegastabConfig
    main_input_name = "input_ids"

    def __init__(self, config: MegastabConfig):
        super().__init__(config)
        self.weights = Weights(config.shapes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is drawn: every weight comes from the file."""

    def get_input_embeddings(self) -> None:
        """No module of its own."""
        return None

    def get_output_embeddings(self) -> None:
        """As above."""
        return None

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> dict[str, Any]:
        """The whole text each time: there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused: Any
    ) -> CausalLMOutput:
        """[B, S] ids (and a mask of keys, 0 for padding) -> logits [B, S, V], and the mean loss where there are labels."""
        m, seq = self.config.megastab, input_ids.shape[1]
        seen = torch.ones(seq, seq, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        positions = torch.arange(seq, device=input_ids.device)[None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # padding in front takes none
        x = self._enter(input_ids, positions)
        for layer in range(m["num_layers"]):
            x = self._branch(x, layer, "attention", lambda y, i=layer: self._attention(y, i, seen, positions))
            x = self._branch(x, layer, "mlp", lambda y, i=layer: self._mlp(y, i))
        x = x if m["norm_position"] == "post" else self._norm(x, "final_norm")
        logits = _capped(F.linear(x, self._w("embedding" if m["tie_embeddings"] else "head")), m["logit_softcap"])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def _w(self, name: str) -> Tensor:
        found = self.weights(name)
        assert found is not None, f"config.json has no shape of {name}"
        return found

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """Our [out, D] matrices; o and down are kept [in, D]."""
        weight = self._w(name)
        return F.linear(x, weight.t() if name.endswith((".o", ".down")) else weight, self.weights(f"{name}.bias"))

    def _enter(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        m = self.config.megastab
        x = F.embedding(input_ids, self._w("embedding"))
        scale = self.weights("embedding_scale")
        factor = m["embedding_multiplier"] * (1.0 if scale is None else scale.float())
        x = (x * factor).to(x.dtype)
        if m["arch"] == "gpt":
            x = x + self._w("positions")[positions]
        return self._norm(x, "embedding_norm") if m["embedding_norm"] else x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        m, gain = self.config.megastab, self._w(name)
        if m["norm"] == "layernorm":
            return F.layer_norm(x, gain.shape, gain, self._w(f"{name}.bias"), m["norm_eps"])
        if m["norm"] == "dyt":
            return (torch.tanh(x.float() * self._w(f"{name}.alpha")) * gain + self._w(f"{name}.bias")).to(x.dtype)
        return _rms_norm(x, gain, m["norm_eps"])

    def _branch(self, x: Tensor, layer: int, name: str, branch: Any) -> Tensor:
        """The residual stream with attention or the MLP on it."""
        m = self.config.megastab
        position, site = m["norm_position"], f"layers.{layer}.{name}"
        y = x
        if position in ("pre", "peri"):
            y = self._norm(x, f"{site}_norm") * (1 / math.sqrt(layer + 1) if m["layer_norm_scaling"] else 1.0)
        y = branch(y)
        if position in ("peri", "reordered"):
            y = self._norm(y, f"{site}_output_norm")
        return self._norm(x + y, f"{site}_output_norm") if position == "post" else x + y

    def _attention(self, x: Tensor, layer: int, seen: Tensor, positions: Tensor) -> Tensor:
        m, name = self.config.megastab, f"layers.{layer}.attention"
        width = m["hidden_size"] // m["num_heads"]
        q, k, v = (self._linear(x, f"{name}.{part}").unflatten(-1, (-1, width)) for part in "qkv")
        if m["qk_norm"] != "none":
            q, k = self._head_norm(q, f"{name}.q_norm"), self._head_norm(k, f"{name}.k_norm")
        if m["arch"] == "llama":
            q, k = _rotated(q, positions, m), _rotated(k, positions, m)
        out = self._attend(q, k, v, seen, name).flatten(2)
        if m["output_gate"] != "none":
            gate = torch.sigmoid(self._linear(x, f"{name}.output_gate"))
            out = (out.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(2)
        return self._linear(out, f"{name}.o")

    def _head_norm(self, x: Tensor, name: str) -> Tensor:
        m = self.config.megastab
        flat = x if m["qk_norm"] == "head" else x.flatten(-2)
        return _rms_norm(flat, self._w(name), m["norm_eps"]).view(x.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, name: str) -> Tensor:
        """Softmax in fp32 over the keys a query sees, and its sink."""
        m, groups = self.config.megastab, q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        scale, cap = q.shape[-1] ** -0.5, m["attention_softcap"]
        scores = _capped((q @ k.mT).float() * scale, cap).masked_fill(~seen, torch.finfo(torch.float32).min)
        value = None
        if m["sink"] == "none":
            return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
        if m["sink"] == "kv_bias":
            key, value = (self._w(f"{name}.sink_{x}").view(-1, q.shape[-1]) for x in ("key", "value"))
            key = key if m["qk_norm"] == "none" else self._head_norm(key[None, None], f"{name}.k_norm")[0, 0]
            key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
            extra = _capped((q @ key[..., None]).float() * scale, cap)
        elif m["sink"] == "learned":
            extra = self._w(f"{name}.sink").float()[None, :, None, None].expand(*scores.shape[:3], 1)
        else:
            extra = scores.new_zeros(*scores.shape[:3], 1)
        p = torch.cat([extra, scores], dim=-1).softmax(-1).to(v.dtype)
        out = p[..., 1:] @ v
        return (out if value is None else out + p[..., :1] * value[:, None]).transpose(1, 2)

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        m, name = self.config.megastab, f"layers.{layer}.mlp"
        if m["arch"] == "gpt":
            return self._linear(self._activated(self._linear(x, f"{name}.up")), f"{name}.down")
        return self._linear(self._activated(self._linear(x, f"{name}.gate")) * self._linear(x, f"{name}.up"), f"{name}.down")

    def _activated(self, x: Tensor) -> Tensor:
        m = self.config.megastab
        if m["activation"] == "topk":
            keep = max(1, round(m["activation_topk"] * m["ffn_hidden_size"]))
            return F.relu(x.where(x >= x.topk(keep, dim=-1).values[..., -1:], 0.0))
        if m["activation"] == "gelu":
            return F.gelu(x, approximate="tanh")
        return F.relu(x).square() if m["activation"] == "relu2" else getattr(F, m["activation"])(x)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else (logits.float() / cap).tanh() * cap


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """One gain a channel, or one for all."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def _rotated(x: Tensor, positions: Tensor, m: dict[str, Any]) -> Tensor:
    """[B, S, N, H] at positions [B or 1, S]: channel i turns with channel i + H/2; Llama 3's scaling where the model has it."""
    width = x.shape[3]
    frequencies = m["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    if (scaling := m["rope_scaling"]) is not None:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((scaling["original_max_seq_len"] * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = positions[..., None].double() * frequencies
    cos, sin = (turn.to(x.dtype)[:, :, None] for turn in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

"""Where a query's attention may go besides the keys, so that no key need become a sink: the ``sink`` of the config.

=========  ==========================  =====================================================================================
softmax1   logit 0, value 0            ``exp(x_j) / (1 + sum exp(x))`` (arXiv 2410.17174, sec. 3.1)
learned    logit s of the head, 0      ``exp(x_j) / (exp(s) + sum exp(x))`` (gpt-oss); s is 0 at the start
kv_bias    logit q.k' / sqrt(H), v'    a key and a value of the key/value head (arXiv 2402.17762); N(0, 0.02^2) at the start
=========  ==========================  =====================================================================================

None is rotated, decayed or rescaled. Every query sees its sink, whatever the documents or the mask.
"""

from __future__ import annotations

from torch import Tensor, nn

from megastab.config.schema import ModelConfig
from megastab.parallel.grid import TensorParallel, kv_copies
from megastab.parallel.layers import sharded
from megastab.parallel.param_info import Part


class LearnedSink(nn.Module):
    """A logit for each query head of this rank."""

    def __init__(self, name: str, config: ModelConfig, tp: TensorParallel, layer: int):
        super().__init__()
        self.logit = sharded((Part.cut(f"{name}.sink", "sink", config.num_heads, tp),), None, tp, layer)

    def forward(self, like: Tensor) -> Tensor:
        """[N]."""
        return self.logit.clone()  # under ZeRO-3 a parameter handed out would be gathered once more, for whoever uses it


class KVBias(nn.Module):
    """A key and a value for each key/value head of this rank; ranks that share a head hold copies."""

    def __init__(self, name: str, config: ModelConfig, tp: TensorParallel, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        copies, rows = kv_copies(config.num_kv_heads, tp.size), config.num_kv_heads * config.head_dim
        parts = tuple(Part.cut(f"{name}.sink_{x}", "kv_bias", rows, tp, copies) for x in ("key", "value"))
        self.weight = sharded(parts, None, tp, layer, copies)

    def forward(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(k', v'), [K, H] each."""
        key_KH, value_KH = self.weight.view(2, -1, self.head_dim)
        return key_KH, value_KH


def build_sink(name: str, config: ModelConfig, tp: TensorParallel, layer: int) -> nn.Module | None:
    """The module of ``config.sink`` where it has parameters."""
    kinds: dict[str, type[LearnedSink] | type[KVBias]] = {"learned": LearnedSink, "kv_bias": KVBias}
    return kinds[config.sink](name, config, tp, layer) if config.sink in kinds else None

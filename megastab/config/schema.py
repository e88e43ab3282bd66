"""What the ``"megastab"`` block of the JSON may say: one pydantic model per section, a docstring per field.

DeepSpeed's own facts (precision, batch sizes, optimizer, ZeRO stage, clipping, TensorBoard) live at the top level of the same
JSON and are never repeated here. ``docs/config.md`` is generated from this file. Cross-field rules live in ``rules.py``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megastab.config.schema_offload import ActivationOffloadConfig
from megastab.config.schema_stability import StabilityConfig
from megastab.config.schema_telemetry import TelemetryConfig
from megastab.config.section import Section

Arch = Literal["gpt", "llama"]
Activation = Literal["gelu", "silu", "relu", "relu2", "topk"]
Norm = Literal["layernorm", "rmsnorm", "rmsnorm_scalar", "dyt"]
NormPosition = Literal["pre", "post", "peri", "reordered"]
QKNorm = Literal["none", "head", "full"]
Sink = Literal["none", "softmax1", "learned", "kv_bias"]
OutputGate = Literal["none", "head", "element"]
InitScheme = Literal["normal", "residual_scaled", "lir"]
Recompute = Literal["none", "selective", "full"]
ScheduleKind = Literal["cosine", "linear", "wsd", "constant"]


# What a field of ModelConfig left at null becomes, by architecture.
ARCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"activation": "gelu", "tie_embeddings": True, "norm": "layernorm"},
    "llama": {"activation": "silu", "tie_embeddings": False, "norm": "rmsnorm"},
}


# Default of a field whose own type has no null: ModelConfig fills it before the field is validated.
_FROM_ARCH: Any = None


class InitConfig(Section):
    """How weights are drawn. Biases start at 0 and norm gains at 1 under every scheme."""

    scheme: InitScheme = "normal"
    """``normal``: one std everywhere; ``residual_scaled``: o_proj and down_proj divided by sqrt(2 num_layers) (GPT-2);
    ``lir``: every matrix of layer l (from 1) divided by sqrt(l), embeddings and head at ``std``."""
    std: PositiveFloat = 0.02
    """Standard deviation of every matrix before the scheme's factor."""


class DyTConfig(Section):
    """Dynamic tanh (arXiv 2503.10622), read with ``norm: dyt``: ``gain * tanh(alpha x) + bias`` in place of a norm."""

    alpha_attention: PositiveFloat | None = None
    """Initial alpha of attention's input; ``null``: the paper's for this width (1.0 at 2048; between two of its widths log alpha is linear
    in log width, outside them it is the nearest one's)."""
    alpha_other: PositiveFloat | None = None
    """Initial alpha everywhere else, the final norm included; ``null``: as above (0.5 at 2048)."""
    embedding_scale: bool = True
    """A learned factor on the embedding's output, sqrt(hidden_size) at the start."""


class RopeScalingConfig(Section):
    """Llama 3's stretching of the rotary frequencies to contexts longer than the first (arXiv 2407.21783; formula of Meta's released code):
    with n = original_max_seq_len / wavelength turns in the first context, a frequency is kept from n = high_freq_factor up, divided by
    ``factor`` up to n = low_freq_factor, and linear in n in between."""

    factor: PositiveFloat
    """What slow frequencies are divided by (Llama 3.1: 8; 3.2: 32)."""
    low_freq_factor: PositiveFloat = 1.0
    """Turns in the first context up to which a frequency is slow."""
    high_freq_factor: PositiveFloat = 4.0
    """Turns from which on it is left alone; above ``low_freq_factor``."""
    original_max_seq_len: PositiveInt
    """The first context, in tokens (Llama 3: 8192)."""

    @model_validator(mode="after")
    def _has_a_slope(self) -> RopeScalingConfig:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor:g} must be below high_freq_factor = {self.high_freq_factor:g} (Llama 3: 1 and 4)"
            )
        return self


class ModelConfig(Section):
    """The network. A field left at ``null`` takes its architecture's value, so that none is null once the model is built."""

    arch: Arch
    """``llama``: RMSNorm, RoPE, gated MLP, no biases. ``gpt``: GPT-2, with LayerNorm, learned positions, biases."""
    num_layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_heads: PositiveInt
    """Query heads; ``hidden_size / num_heads`` is the head width."""
    num_kv_heads: PositiveInt = Field(default=_FROM_ARCH)
    """Key and value heads (grouped-query attention); ``null`` means ``num_heads``."""
    ffn_hidden_size: PositiveInt = Field(default=_FROM_ARCH)
    """Width of the MLP; ``null`` means 4 x hidden (gpt) or 8/3 x hidden rounded up to 64 (llama)."""
    max_seq_len: PositiveInt
    """Tokens per training sample, and the longest sequence the model accepts."""
    vocab_size: PositiveInt | None = None
    """Vocabulary before padding to a multiple of 128; ``null`` takes it from ``data.tokenizer``."""
    activation: Activation = Field(default=_FROM_ARCH)
    """``null``: gelu (tanh form) for gpt, silu for llama. ``topk`` keeps the ``activation_topk`` largest entries of each token."""
    activation_topk: PositiveFloat = Field(default=0.1, le=1.0)
    """Share of MLP channels kept by ``activation: topk``."""
    tie_embeddings: bool = Field(default=_FROM_ARCH)
    """One matrix for embedding and head; ``null``: true for gpt, false for llama."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """On the embedding and on both branches of a block (gpt only). Attention probabilities are not dropped: flash kernels own their
    random numbers, and a mask must be a function of the sample and position alone to be equal at every layout."""
    norm: Norm = Field(default=_FROM_ARCH)
    """``rmsnorm_scalar``: one gain for all channels, so that the norm prefers none. ``null``: layernorm for gpt, rmsnorm for llama."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance or mean square before the root."""
    dyt: DyTConfig = DyTConfig()
    """Dynamic tanh, with ``norm: dyt``."""
    norm_position: NormPosition = "pre"
    """``pre``: x + f(norm(x)); ``post``: norm(x + f(x)), and no norm before the head, which the last block's norm precedes; ``peri``:
    x + norm(f(norm(x))), and a norm after the embedding with ``embedding_norm`` (Peri-LN, arXiv 2502.02732); ``reordered``: x + norm(f(x))
    (OLMo 2, arXiv 2501.00656)."""
    layer_norm_scaling: bool = False
    """Multiply what a block's input norms give by 1/sqrt(l) in block l from 1 (arXiv 2502.05795); not with ``norm: dyt``, nor where a
    block has no input norm."""
    embedding_norm: bool = False
    """A norm right after the embedding, after gpt's positions have been added to it."""
    embedding_multiplier: PositiveFloat = 1.0
    """Fixed factor on the embedding's output (Gemma: sqrt(hidden_size)), before gpt's positions are added."""
    qk_norm: QKNorm = "none"
    """RMSNorm of queries and keys before the rotation: ``head``, over each head (Qwen3); ``full``, over the whole projection (OLMo 2)."""
    sink: Sink = "none"
    """Where a query's attention may go besides the keys: ``softmax1``, a logit of 0; ``learned``, a logit a head (gpt-oss);
    ``kv_bias``, a learned key and value a KV head, without position (the key normed and its logits capped as the others)."""
    output_gate: OutputGate = "none"
    """Attention's output times sigmoid(x W), before the output projection (arXiv 2505.06708): one gate a head, or one a channel.
    TVR leaves W alone."""
    attention_softcap: PositiveFloat | None = None
    """c in c tanh(logit / c) on attention's logits (Gemma 2: 50); computed a chunk of queries at a time, outside the flash kernel."""
    logit_softcap: PositiveFloat | None = None
    """The same on the final logits (Gemma 2: 30)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies (llama)."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama 3's scaling of the rotary frequencies (llama)."""
    init: InitConfig = InitConfig()
    """Initial weights."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_architecture(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("arch") not in ARCH_DEFAULTS:
            return given  # pydantic says what is wrong
        filled = {**given}
        hidden = given.get("hidden_size")
        defaults = {**ARCH_DEFAULTS[given["arch"]], "num_kv_heads": given.get("num_heads")}
        if isinstance(hidden, int):
            defaults["ffn_hidden_size"] = 4 * hidden if given["arch"] == "gpt" else -(-8 * hidden // (3 * 64)) * 64
        for key, value in defaults.items():
            if filled.get(key) is None:
                filled[key] = value
        return filled

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class ParallelConfig(Section):
    """How the model is cut. Data parallelism is what remains: world / (tensor x pipeline x context)."""

    tensor: PositiveInt = 1
    """Ranks that share each matrix; keep it inside a node."""
    pipeline: PositiveInt = 1
    """Stages of consecutive layers (DeepSpeed's 1F1B); needs ZeRO 0 or 1."""
    sequence: bool = False
    """Split norms, dropout and the residual stream over the tensor-parallel ranks by token."""
    context: PositiveInt = 1
    """Ranks that share each sequence: each works on its own positions, and attention on all positions of its own heads (Ulysses, arXiv
    2309.14509: an all-to-all on either side). For sequences whose activations one rank cannot hold; at most num_heads / tensor."""
    recompute: Recompute = "none"
    """``selective``: recompute attention and the MLP activation in backward; ``full``: recompute whole blocks."""
    activation_offload: ActivationOffloadConfig = ActivationOffloadConfig()
    """Where activations wait for backward; with ``recompute`` it moves out what that keeps."""


class DataConfig(Section):
    """Where the tokens come from. Order is a function of (seed, epoch, blend) only; position is a count of samples."""

    train: list[tuple[PositiveFloat, str]] = Field(default=[])
    """Weighted blend: ``[[weight, path prefix of .bin/.idx], ...]``; weights are normalised."""
    valid: list[tuple[PositiveFloat, str]] = Field(default=[])
    """The same for evaluation; empty switches evaluation off."""
    tokenizer: str | None = None
    """SentencePiece ``.model`` or Hugging Face ``tokenizer.json`` file; checked against the vocabulary the data was written with."""
    document_mask: bool = False
    """Attention stays inside a document, and the first token of a document is no target."""
    skip: list[tuple[NonNegativeInt, NonNegativeInt]] = Field(default=[])
    """Training samples to leave out: ``[[first, last], ...]``, both ends included, as ``events.jsonl`` names them; in any order. What
    rewinds have left out is added to it (``skips.json`` of the run folder)."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> DataConfig:
        for first, last in self.skip:
            if last < first:
                raise ValueError(f"skip holds [{first}, {last}], which ends before it begins: write [{last}, {first}]")
        return self


class ScheduleConfig(Section):
    """Learning rate over applied steps; the peak is ``optimizer.params.lr``."""

    kind: ScheduleKind = "cosine"
    """Shape after warm-up. ``wsd`` is warm-up, stable, then a linear decay."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up from 0; ``null`` with ``warmup_tokens`` null means none."""
    warmup_tokens: NonNegativeInt | None = None
    """The same in tokens, rounded up to steps."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the run spent in the decay of ``wsd``."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Last learning rate over peak."""


class LossConfig(Section):
    """Next-token cross-entropy: a sum over targets divided by the step's global target count."""

    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the logits (PaLM, sec. 5: 1e-4)."""


class RunConfig(Section):
    """The run itself: where, how long, how often."""

    dir: str = "runs/default"
    """Run folder: config.json, metrics.jsonl, events.jsonl, telemetry.jsonl, rank_times.jsonl, tensorboard/, checkpoints/."""
    total_steps: PositiveInt | None = None
    """Optimizer steps to attempt; give this or ``total_tokens``."""
    total_tokens: PositiveInt | None = None
    """The same in tokens, rounded up to steps."""
    log_interval: PositiveInt = 10
    """Steps between console lines; ``metrics.jsonl`` gets every step."""
    eval_interval: PositiveInt | None = None
    """Steps between evaluations; ``null``: only at the end."""
    eval_samples: PositiveInt = 256
    """Validation samples per evaluation, the same ones each time."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints; ``null``: only at the end."""
    keep_last: PositiveInt | None = None
    """Checkpoints to keep; ``null`` keeps all."""
    keep_every: PositiveInt | None = None
    """Steps; checkpoints at multiples of this are kept for ever, whatever ``keep_last`` says."""
    async_save: bool = False
    """Write checkpoints in the background: training waits for one copy of the bytes in host memory, which must have room for it."""
    resume: str = "auto"
    """``auto``: the newest checkpoint of ``dir`` if there is one; ``none``: start anew (an earlier run in ``dir`` is moved aside); else
    the path of a checkpoints folder."""
    init_from: str | None = None
    """Weights to start from, at any layout: a checkpoint of ours (``runs/NAME/checkpoints/step00000100``), what ``tools/convert.py import``
    wrote, or a Hugging Face directory. Optimizer, schedule and data start anew. Not read where ``resume`` finds a checkpoint."""
    seed: NonNegativeInt = 1234
    """Of the initial weights, dropout and the data order."""
    compile: bool = False
    """``torch.compile`` of the blocks, in pieces between collectives where tensor > 1."""
    deterministic: bool = False
    """Ask torch for deterministic kernels (slower on accelerators; CPU runs are deterministic anyway)."""
    hang_seconds: PositiveFloat | None = 1500.0
    """Seconds without progress after which every rank ends the job and names the ranks that lag (exit code 87). Longer than the longest
    step, save or compilation, and shorter than the backend's own limit (30 minutes), which names nobody; ``null``: never."""
    stop_seconds: PositiveFloat | None = 300.0
    """Seconds from SIGTERM, SIGUSR1 or Ctrl-C in which a run must have saved and left before it is ended as it is; ``null``: no limit."""


class Megastab(Section):
    """The ``"megastab"`` block."""

    model: ModelConfig
    """The network."""
    parallel: ParallelConfig = ParallelConfig()
    """The cut."""
    data: DataConfig = DataConfig()
    """The tokens."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate."""
    loss: LossConfig = LossConfig()
    """The objective."""
    stability: StabilityConfig = StabilityConfig()
    """The methods that keep it stable."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """The look inside."""
    run: RunConfig = RunConfig()
    """The run."""

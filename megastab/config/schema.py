"""What the ``"megastab"`` block of the JSON may say: one pydantic model per section, a docstring per field.

DeepSpeed's own facts (precision, batch sizes, optimizer, ZeRO stage, clipping, TensorBoard) live at the top level of the same
JSON and are never repeated here. ``docs/config.md`` is generated from this file. Cross-field rules live in ``rules.py``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

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


CLIPPING = ("zclip", "autoclip", "adagc", "skip_step")  # sections of StabilityConfig, at most one of which is given

# What a field of ModelConfig left at null becomes, by architecture.
ARCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"activation": "gelu", "tie_embeddings": True, "norm": "layernorm"},
    "llama": {"activation": "silu", "tie_embeddings": False, "norm": "rmsnorm"},
}


# Default of a field whose own type has no null: ModelConfig fills it before the field is validated.
_FROM_ARCH: Any = None


class Section(BaseModel):
    """A section refuses keys it does not know and is immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
    """How the model is cut. Data parallelism is what remains: world / (tensor x pipeline)."""

    tensor: PositiveInt = 1
    """Ranks that share each matrix; keep it inside a node."""
    pipeline: PositiveInt = 1
    """Stages of consecutive layers (DeepSpeed's 1F1B); needs ZeRO 0 or 1."""
    sequence: bool = False
    """Split norms, dropout and the residual stream over the tensor-parallel ranks by token."""
    recompute: Recompute = "none"
    """``selective``: recompute attention and the MLP activation in backward; ``full``: recompute whole blocks."""


class DataConfig(Section):
    """Where the tokens come from. Order is a function of (seed, epoch, blend) only; position is a count of samples."""

    train: list[tuple[PositiveFloat, str]] = Field(default=[])
    """Weighted blend: ``[[weight, path prefix of .bin/.idx], ...]``; weights are normalised."""
    valid: list[tuple[PositiveFloat, str]] = Field(default=[])
    """The same for evaluation; empty switches evaluation off."""
    tokenizer: str | None = None
    """SentencePiece ``.model`` file; checked against the vocabulary the data was written with."""
    document_mask: bool = False
    """Attention stays inside a document, and the first token of a document is no target."""


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


class ZClipConfig(Section):
    """Adaptive clipping on the global gradient norm (arXiv 2504.02507); ``gradient_clipping`` is its fixed cap on top, 0 for none."""

    alpha: float = Field(default=0.97, gt=0.0, lt=1.0)
    """Memory of the running mean and variance of the norm."""
    z_thresh: PositiveFloat = 2.5
    """Standard score above which a norm is a spike."""
    mode: Literal["reciprocal", "mean", "max"] = "reciprocal"
    """What a spike is clipped to: mean + z_thresh^2 / z std, the mean, or mean + z_thresh std."""
    warmup_steps: PositiveInt = 25
    """Steps that only collect norms."""
    clip_factor: PositiveFloat = 1.0
    """Multiplies the std term; below 1 clips harder."""
    skip_update_on_spike: bool = False
    """Keep a spike's clipped norm out of the statistics."""
    compat: bool = False
    """Decide exactly as the released package zclip 1.0.0 does."""
    rewarm_clipped: NonNegativeInt = 20
    """Spikes within ``rewarm_window`` steps after which the statistics start again from them; 0 never does."""
    rewarm_window: PositiveInt = 25
    """Steps ``rewarm_clipped`` looks back."""
    on_change: Literal["auto", "keep", "rewarm"] = "auto"
    """On resume with other settings: keep the statistics or warm up again; ``auto`` re-warms when the batch size changed."""
    scope: Literal["global", "layer", "parameter"] = "global"
    """What has statistics of its own: the whole gradient, or each block's, or each logical matrix's, which costs one small all-reduce
    a step and changes the gradient's direction. The cap stays on the global norm."""


class AutoClipConfig(Section):
    """A baseline beside ZClip: clip to a percentile of all norms so far (arXiv 2007.14469)."""

    percentile: float = Field(default=10.0, ge=0.0, le=100.0)
    """Of the norms so far, the current one included; at 10 about nine steps in ten are clipped."""
    window: PositiveInt | None = None
    """Norms remembered; ``null``, the published method, never forgets."""


class AdaGCConfig(Section):
    """A baseline beside ZClip: clip each matrix's gradient to its own average of clipped norms (arXiv 2502.11034)."""

    lambda_abs: PositiveFloat = 1.0
    """Cap on the global norm while warming up."""
    lambda_rel: float = Field(default=1.05, ge=1.0)
    """A norm may exceed its average by this factor."""
    beta: float = Field(default=0.98, gt=0.0, lt=1.0)
    """Memory of the averages."""
    warmup_steps: PositiveInt = 100
    """Steps under ``lambda_abs``."""


class SkipStepConfig(Section):
    """A baseline beside ZClip: skip a step whose norm or loss is an outlier of its window (OLMo-core)."""

    rolling_interval_length: int = Field(default=128, ge=2)
    """Steps of the window; it judges from half of them on."""
    sigma_factor: PositiveFloat = 6.0
    """Deviations above the window's mean that skip a step."""
    compat: bool = False
    """Let a loss that is not finite into the window, as OLMo-core does: that step and the next 128 are skipped."""


class PolicyConfig(Section):
    """What is done about a bad step."""

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A gradient norm that is not finite: skip the step, or end the run. (An fp16 overflow the loss scale can answer is neither.)"""
    max_nonfinite_in_a_row: PositiveInt | None = 8
    """Skipped non-finite steps in a row, one more of which ends the run; ``null``: none does."""
    replay_nonfinite: bool = True
    """Run the first non-finite step again without an update to find the tensor, module, rank and micro-batch it began in."""
    on_spike: Literal["clip", "skip"] = "clip"
    """A norm whose z is above ``zclip.z_thresh``: clip it, or leave out the step (weights, moments, schedule and statistics)."""
    norm_spike: PositiveFloat | None = 6.0
    """Under a rule that keeps no score of the global norm (the fixed cap, ``autoclip``, ``adagc``, a ``scope``): standard score by
    ZClip's statistics above which a norm is written down with who carried it. Nothing else is done; ``null``: none is."""
    loss_spike: PositiveFloat | None = 6.0
    """Robust standard score (median and interquartile range of the last 128 good losses) above which a loss is an outlier; ``null``:
    none is."""
    rewind_after: PositiveInt | None = 8
    """Bad steps in a row (not finite, or a loss outlier; a clipped step is never bad) after which to go back to the last good
    checkpoint; ``null``: never."""


class TVRConfig(Section):
    """Target variance rescaling (arXiv 2503.17500): matrices of the blocks are shrunk to a standard deviation."""

    target_std: PositiveFloat = 0.01
    """Standard deviation a matrix may have."""
    ratio_threshold: float = Field(default=1.0, ge=1.0)
    """Rescale where std / target exceeds it."""
    interval_steps: PositiveInt = 50
    """Applied steps between looks."""
    interval_tokens: PositiveInt | None = None
    """Instead of ``interval_steps``, in tokens, rounded up to steps (trainer only: it knows the tokens of a step)."""
    depth_scaled: bool = False
    """Target divided by sqrt(l) in block l from 1."""
    zero_bias: bool = False
    """Set the bias of a rescaled matrix to 0, as the released code does."""
    two_sided: bool = False
    """Also inflate matrices below target / ratio_threshold."""
    targets: dict[Literal["q", "k", "v", "o", "gate", "up", "down"], PositiveFloat] = Field(default={})
    """Other targets by role."""
    exclude: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = Field(default=[])
    """Roles left alone."""

    @model_validator(mode="after")
    def _one_interval(self) -> TVRConfig:
        default = type(self).model_fields["interval_steps"].default
        if self.interval_tokens is not None and self.interval_steps != default:
            raise ValueError(
                f"interval_steps = {self.interval_steps} and interval_tokens = {self.interval_tokens} are both given: leave "
                f"interval_steps at {default}, or set interval_tokens to null"
            )
        return self


class QKClipConfig(Section):
    """QK-clip (MuonClip, arXiv 2507.20534): queries' and keys' weights of a head whose largest logit is above a threshold are shrunk."""

    threshold: PositiveFloat = 100.0
    """Largest logit q.k / sqrt(head width) a head may reach in a step."""
    balance: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the factor's logarithm the queries take; the keys take the rest."""


class StabilityConfig(Section):
    """What keeps the run stable; each method is off at ``null``, and at most one clips."""

    zclip: ZClipConfig | None = None
    """Adaptive clipping; ``{}`` for the defaults."""
    autoclip: AutoClipConfig | None = None
    """Instead of ZClip."""
    adagc: AdaGCConfig | None = None
    """Instead of ZClip."""
    skip_step: SkipStepConfig | None = None
    """Instead of ZClip."""
    tvr: TVRConfig | None = None
    """Variance rescaling; ``{}`` for the defaults."""
    qk_clip: QKClipConfig | None = None
    """Clipping of attention's logits through the weights; ``{}`` for the defaults."""
    policy: PolicyConfig = PolicyConfig()
    """Bad steps."""

    @property
    def clipping(self) -> str | None:
        """Key of the adaptive method that clips; None for the fixed cap alone."""
        return next((key for key in CLIPPING if getattr(self, key) is not None), None)

    @model_validator(mode="after")
    def _one_clips(self) -> StabilityConfig:
        given = [key for key in CLIPPING if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: one decides about a norm, set the others to null")
        if self.policy.on_spike == "skip" and (self.zclip is None or self.zclip.scope != "global"):
            raise ValueError("policy.on_spike = skip needs zclip with scope global: its z says what a spike is")
        return self


class RunConfig(Section):
    """The run itself: where, how long, how often."""

    dir: str = "runs/default"
    """Run folder: config.json, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/."""
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
    resume: str = "auto"
    """``auto``: the newest checkpoint of ``dir`` if there is one; ``none``: start anew (an earlier run in ``dir`` is moved aside); else
    the path of a checkpoints folder."""
    seed: NonNegativeInt = 1234
    """Of the initial weights, dropout and the data order."""
    compile: bool = False
    """``torch.compile`` of the blocks, in pieces between collectives where tensor > 1."""
    deterministic: bool = False
    """Ask torch for deterministic kernels (slower on accelerators; CPU runs are deterministic anyway)."""


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
    run: RunConfig = RunConfig()
    """The run."""

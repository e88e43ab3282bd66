"""Every scalar's name, unit and meaning, in one place; ``python -m megastab.telemetry.tags > docs/telemetry.md`` makes the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tag:
    """One scalar in TensorBoard."""

    name: str
    unit: str
    meaning: str
    bad: str
    """What a bad value looks like and what to do."""


TAGS: dict[str, Tag] = {
    "loss": Tag(
        "train/loss",
        "nats/token",
        "mean loss over the step's targets on all ranks",
        "a jump: look at events.jsonl and the norm of that step",
    ),
    "grad_norm": Tag(
        "train/grad_norm",
        "-",
        "global L2 norm of the gradient before clipping, the same at every layout",
        "a slow rise over hours: lower the learning rate; inf: the step was skipped",
    ),
    "clipped_norm": Tag(
        "train/clipped_norm", "-", "the norm after clipping; none for a skipped step", "flat at the cap: every step is clipped"
    ),
    "clip_scale": Tag(
        "train/clip_scale", "-", "factor applied to the gradient by clipping", "below 1 on most steps: the cap is too low to be a cap"
    ),
    "clip_threshold": Tag(
        "train/clip_threshold",
        "-",
        "norm above which the step's gradient is clipped: the fixed cap, or ZClip's mean plus z_thresh deviations",
        "far above the norm for hundreds of steps: ZClip's warm-up saw a few huge norms",
    ),
    "z": Tag(
        "train/z",
        "-",
        "standard score of the norm against its recent history (ZClip)",
        "above z_thresh: a spike, clipped; the samples of the step are in events.jsonl",
    ),
    "clip_mean": Tag(
        "train/clip_mean",
        "-",
        "ZClip's running mean of the norm (clipped norms on spikes)",
        "far from the norm: it follows a level of the past",
    ),
    "clip_std": Tag(
        "train/clip_std", "-", "ZClip's running standard deviation of the norm", "a large share of the mean for long: few spikes are seen"
    ),
    "clip_rate": Tag(
        "train/clip_rate",
        "share",
        "share of recent steps that were clipped or skipped (mean with memory 0.97)",
        "near 1: the threshold is below the usual norm, and what looks like clipping is a lower learning rate",
    ),
    "loss_z": Tag(
        "train/loss_z",
        "-",
        "robust standard score of the loss against the last 128 good ones",
        "above policy.loss_spike: an outlier, counted as a bad step",
    ),
    "rescaled": Tag(
        "train/rescaled",
        "matrices",
        "matrices TVR shrank to their target after the step",
        "all of them at every look: the target is below what the learning rate sustains",
    ),
    "largest_logit": Tag(
        "train/largest_logit",
        "-",
        "largest attention logit of the step, as QK-clip sees it: exact above its threshold, an upper bound (log-sum-exp) below",
        "a rise without end: attention is collapsing to single keys",
    ),
    "qk_clipped": Tag(
        "train/qk_clipped",
        "heads",
        "heads whose queries and keys QK-clip shrank after the step",
        "many for thousands of steps: the learning rate pushes logits up faster than they should go",
    ),
    "lr": Tag("train/lr", "-", "learning rate of the step", "not what the schedule should say: skipped steps do not advance it"),
    "tokens_per_second": Tag(
        "speed/tokens_per_second",
        "tokens/s",
        "tokens of the step over its wall-clock time, all ranks",
        "a fall: a slow rank, or data loading",
    ),
    "model_tflops": Tag(
        "speed/model_tflops_per_rank",
        "TFLOP/s",
        "FLOPs the model needs (no recompute counted) per second and rank",
        "far below the hardware's: micro-batch too small",
    ),
    "mfu": Tag(
        "speed/mfu", "share", "model FLOP/s over the device's dense peak, where it is known", "below 0.3 on a GPU: look at the layout"
    ),
    "data_seconds": Tag("speed/data_seconds", "s", "time spent fetching the step's samples", "above 1 % of the step: storage is slow"),
    "slowest_over_median": Tag(
        "speed/slowest_rank_over_median",
        "-",
        "own seconds a step of the rank furthest above the median of its pipeline stage, over that median; every telemetry.straggler.steps",
        "1.2 or more: events.jsonl names the rank and its host; the whole job runs at its pace",
    ),
    "own_seconds": Tag(
        "speed/own_seconds_median",
        "s",
        "what the middle rank needs of a step for itself: its seconds less those it stands in collectives; every telemetry.straggler.steps",
        "far below the step's seconds: most of a step is communication, or waiting for a slow rank or another stage",
    ),
    "memory_gb": Tag(
        "memory/peak_gb",
        "GB",
        "peak memory of this process (device memory on an accelerator, resident set on CPU)",
        "near the device's size",
    ),
    "valid_loss": Tag("valid/loss", "nats/token", "mean loss over the validation samples", "rises while train/loss falls: too many epochs"),
    "valid_bits_per_byte": Tag("valid/bits_per_byte", "bits", "validation loss per byte of raw text: comparable over tokenizers", "-"),
}

# Scalars of which there is one for every matrix; the matrix's canonical name follows the tag.
WEIGHT_STD = Tag(
    "weight_std",
    "-",
    "standard deviation of a matrix at TVR's look, before rescaling",
    "a rise that does not level off: too little weight decay for the learning rate, or no TVR",
)
BY_MATRIX: tuple[Tag, ...] = (WEIGHT_STD,)

PLACES = """\
`<place>` is `residual` (the stream after the block), `attention` or `mlp` (what they give before an output norm and dropout); layers count
from 0. These, and the `weights/` of every matrix, come on the first step and every `megastab.telemetry.interval_steps`. `telemetry.jsonl`
holds them too, with the three largest entries of each place: value, sample, position, channel and token id. A picture of the layers and
their largest activations lies beside the scalars. Only the first micro-batch of a step is looked at, on every data-parallel rank.

Attention is looked at in the first sample of the step only (one and the same at every layout), at 64 queries spread evenly over it, in
every head. TensorBoard gets the numbers of a layer and a picture of layers and heads; `telemetry.jsonl` has a list over the heads for each
number, and `first_key_uniform`, the mass equal logits would put on the first key for the same queries."""

# Scalars of which there is one for every place in the network, on the steps `telemetry.interval_steps` names; place and layer follow the
# tag: `residual` (after the block), `attention` and `mlp` (what they add).
BY_PLACE: dict[str, Tag] = {
    "activation_max": Tag(
        "activation_max",
        "-",
        "largest magnitude of an activation of the first micro-batch; where it stands is in telemetry.jsonl",
        "residual above 100 and still rising: a massive activation forms; a lower target_std (TVR), LIR or a smaller init.std keep it down",
    ),
    "activation_median": Tag(
        "activation_median", "-", "median magnitude, within 0.4 %", "0: most channels are dead; a steady rise: the stream only ever grows"
    ),
    "activation_max_over_median": Tag(
        "activation_max_over_median",
        "-",
        "largest over median magnitude",
        "residual above 1000 with a max above 100: a massive activation, told once in events.jsonl; int8 activations will lose the rest",
    ),
    "activation_rms": Tag(
        "activation_rms", "-", "root mean square over all entries", "attention or mlp far above residual: one branch overwrites the stream"
    ),
    "activation_kurtosis_first": Tag(
        "activation_kurtosis_first",
        "-",
        "kurtosis across the channels of samples' first tokens, averaged; a Gaussian has 3, one channel alone hidden_size - 2",
        "hundreds: one channel carries the first token, which attention then uses as a sink; sink = softmax1 or learned removes the need",
    ),
    "activation_kurtosis_rest": Tag(
        "activation_kurtosis_rest",
        "-",
        "the same for all other tokens",
        "far above 3 and rising: outlier channels in every token; OrthoAdam with norm = rmsnorm_scalar spreads them",
    ),
}

# Scalars of which there is one for every matrix on a sampled step.
OF_MATRIX: dict[str, Tag] = {
    "matrix_mean": Tag("weights/mean", "-", "mean of a matrix after the step", "a tenth of its std or more: the matrix adds a constant"),
    "matrix_std": Tag(
        "weights/std",
        "-",
        "standard deviation of a matrix after the step, a rescale included",
        "a rise that does not level off: too little weight decay for the learning rate, or no TVR",
    ),
    "matrix_std_over_target": Tag(
        "weights/std_over_target",
        "-",
        "the std over what TVR lets it be",
        "well above 1 between TVR's looks: look more often (tvr.interval_steps), or lower the learning rate",
    ),
    "matrix_update_ratio": Tag(
        "weights/update_ratio",
        "-",
        "size of the step's change over the weight's, decay and rescaling included (from at least 65,536 elements)",
        "above 1e-2 after warm-up: the learning rate is too high for this matrix; below 1e-5: it hardly learns; 0: a skipped step",
    ),
    "matrix_gradient_norm": Tag(
        "weights/gradient_norm",
        "-",
        "L2 norm of a matrix's gradient before clipping",
        "one matrix alone rises: zclip.scope = parameter clips it alone",
    ),
    "matrix_gradient_share": Tag(
        "weights/gradient_share",
        "share",
        "share of a matrix in the squared global norm",
        "above 0.5 for long: one matrix decides every clip; zclip.scope = parameter clips it alone",
    ),
}

# Scalars of which there is one for every attention layer on a sampled step; the heads one by one are in telemetry.jsonl.
OF_LAYER: dict[str, Tag] = {
    "attention_largest_logit": Tag(
        "attention/largest_logit",
        "-",
        "largest q.k / sqrt(head_dim) of any head, after attention_softcap, over the sampled queries (all of them may hold a larger one)",
        "above 100 and rising, or at the soft-cap: attention collapses to single keys; stability.qk_clip or qk_norm stop it",
    ),
    "attention_entropy": Tag(
        "attention/entropy",
        "nats",
        "entropy of a query's attention, the sink counted as one more key; mean over queries and heads",
        "a fall towards 0 in most layers: attention collapses (as above); no change from step 1: queries and keys do not learn",
    ),
    "attention_entropy_min": Tag(
        "attention/entropy_min",
        "nats",
        "the same of the head with the lowest",
        "near 0 from one look to the next: that head attends to one key whatever the query; its number is in telemetry.jsonl",
    ),
    "attention_first_key_mass": Tag(
        "attention/first_key_mass",
        "share",
        "attention on the first visible key (of the sample, or of the document with data.document_mask), mean over queries and heads",
        "far above first_key_uniform in telemetry.jsonl, what equal logits would put there: the first token is a sink, and massive "
        "activations follow; sink = softmax1 or learned, or output_gate, remove the need",
    ),
    "attention_first_key_mass_max": Tag(
        "attention/first_key_mass_max",
        "share",
        "the same of the head with the highest",
        "near 1: a head that does nothing but rest on the first token; one or two a layer are usual without a sink",
    ),
    "attention_first_key_share": Tag(
        "attention/first_key_share",
        "share",
        "share of queries whose largest weight on a key is on the first one (arXiv 2410.17174; queries that see one key only left out)",
        "above 0.5: most attention is at rest (trained models without a sink reach 0.65 to 0.98); as for first_key_mass",
    ),
    "attention_sink_mass": Tag(
        "attention/sink_mass",
        "share",
        "attention on the sink (softmax1, learned, or kv_bias's key), mean over queries and heads",
        "above 0.9: the layer hardly looks at the tokens; near 0 with a high first_key_mass: the sink is not taken up",
    ),
}
SAMPLED = BY_PLACE | OF_MATRIX | OF_LAYER


def to_markdown() -> str:
    """The table as a page."""
    lines = [
        "# What a run tells",
        "",
        "Generated from `megastab/telemetry/tags.py`; the x axis is the step.",
        "",
        "| tag | unit | meaning | a bad value |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{tag.name}` | {tag.unit} | {tag.meaning} | {tag.bad} |" for tag in TAGS.values()]
    lines += [f"| `{tag.name}/<matrix>` | {tag.unit} | {tag.meaning} | {tag.bad} |" for tag in BY_MATRIX]
    lines += [f"| `{tag.name}/<place>/layers.<l>` | {tag.unit} | {tag.meaning} | {tag.bad} |" for tag in BY_PLACE.values()]
    lines += [f"| `{tag.name}/layers.<l>` | {tag.unit} | {tag.meaning} | {tag.bad} |" for tag in OF_LAYER.values()]
    lines += [f"| `{tag.name}/<matrix>` | {tag.unit} | {tag.meaning} | {tag.bad} |" for tag in OF_MATRIX.values()]
    return "\n".join([*lines, "", PLACES]) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")

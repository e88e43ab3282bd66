"""What one rank hands to its process groups in one step: bytes and calls, by collective and group, from the config alone.

Bytes are payload: the tensor of an all-reduce, a broadcast or a send, the gathered whole of an all-gather, the whole that a
reduce-scatter takes in. A test compares them with a log of real engines. Letters as in ``plan.activations``.

Not in here: what the loop adds between steps (telemetry's looks, evaluation, checkpoints, rules that judge the loss), and groups of one
rank, over which nothing travels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from megastab.config.complete import sends_slices
from megastab.config.config import Config
from megastab.config.settings import offload_device, read
from megastab.plan.activations import FP32, INDEX, Shape
from megastab.plan.parameters import Stage, exchanged_kv_width
from megastab.plan.state_traffic import gradient_terms, state_traffic
from megastab.plan.states import decay_groups_of
from megastab.plan.transfer import Group, Transfer, kv_copies
from megastab.plan.zero import wrapper_kind

DOUBLE = 8
META_INTS = 256
"""DeepSpeed's pipeline describes what will come in a buffer of this many int32 (``TENSOR_META_SIZE``), once a step: an evaluation may
have sent another shape, so the engine is made to forget it."""


def traffic(config: Config, stage: Stage) -> list[Transfer]:
    """Everything one rank of ``stage`` takes part in during an ordinary step."""
    found = [*_layers(config, stage), *_exchanges(config, stage), *_pipeline(config, stage), *gradient_terms(config, stage)]
    found += [*state_traffic(config, stage), *_scalars(config, stage)]
    return [transfer for transfer in found if transfer.bytes]


Key = tuple[str, str]


def by_collective(transfers: Iterable[Transfer]) -> dict[Key, tuple[int, int]]:
    """(bytes, calls) by (collective, group)."""
    sums: dict[Key, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for t in transfers:
        held = sums[t.kind, t.group]
        sums[t.kind, t.group] = (held[0] + t.bytes, held[1] + t.calls)
    return dict(sums)


def _layers(config: Config, stage: Stage) -> Iterator[Transfer]:
    """What the parallel layers send inside forward and backward (``parallel.layers``, ``model.loss``)."""
    shape, model = Shape.of(config), config.megastab.model
    if shape.tensor == 1:
        return
    times, stream = config.accumulation, shape.tokens * model.hidden_size * shape.element
    inputs = 2 if kv_copies(config) == 1 else 3  # products that take the residual stream: q+k+v, or q and k+v; up
    columns = stage.num_blocks * inputs + stage.has_head
    rows = stage.num_blocks * 2 + stage.has_embedding
    recompute = config.megastab.parallel.recompute
    again_columns, again_rows = (stage.num_blocks * inputs, stage.num_blocks * 2) if recompute == "full" else (0, 0)
    if config.megastab.parallel.sequence:
        # A column product gathers its input forward, and again backward (it keeps its share); a row product gathers its gradient.
        gathers, scatters = 2 * columns + again_columns + rows, columns + rows + again_rows
        yield Transfer.many("residual stream", "all_gather", "tensor", stream, gathers * times)
        yield Transfer.many("residual stream", "reduce_scatter", "tensor", stream, scatters * times)
    else:
        yield Transfer.many("residual stream", "all_reduce", "tensor", stream, (columns + rows + again_rows) * times)
    if model.qk_norm == "full":
        passes = 2 if recompute == "none" else 3
        rows = 2 * shape.tokens + (model.sink == "kv_bias")  # queries, keys, and the sink's key
        calls = passes * stage.num_blocks * times * (3 if model.sink == "kv_bias" else 2)
        yield Transfer("query and key norms", "all_reduce", "tensor", rows * FP32 * passes * stage.num_blocks * times, calls)
    if model.activation == "topk":
        channels = model.ffn_hidden_size
        kept = min(max(1, round(model.activation_topk * channels)), channels // shape.tensor)  # of each rank's, as model.mlp compares them
        passes = 1 if recompute == "none" else 2
        found = shape.tensor * shape.tokens * kept * shape.element
        yield Transfer.many("largest MLP channels", "all_gather", "tensor", found, passes * stage.num_blocks * times)
    if stage.has_head:
        yield Transfer.many("loss statistics", "all_gather", "tensor", shape.tensor * 2 * shape.tokens * FP32, times)


def _exchanges(config: Config, stage: Stage) -> Iterator[Transfer]:
    """Positions for heads before attention and back behind it (``parallel.ulysses``): gradients return the way they came. Recomputation
    ends with the last thing that is kept: attention's output as it left, or, behind the exchange, the input of what comes next."""
    shape, model, recompute = Shape.of(config), config.megastab.model, config.megastab.parallel.recompute
    if shape.context == 1:
        return
    out = model.hidden_size // shape.tensor
    given = out + 2 * exchanged_kv_width(model, shape.tensor, shape.context)
    is_back_again = recompute == "full" or (recompute == "selective" and model.output_gate != "none")
    times = stage.num_blocks * config.accumulation
    yield Transfer.many("queries, keys, values", "all_to_all", "context", shape.channels(given), (2 + (recompute != "none")) * times)
    yield Transfer.many("attention's output", "all_to_all", "context", shape.channels(out), (2 + is_back_again) * times)


def _pipeline(config: Config, stage: Stage) -> Iterator[Transfer]:
    """Activations, their gradients and the loss between stages."""
    if config.layout.pipeline == 1:
        return
    times, tensor = config.accumulation, config.layout.tensor
    whole = Shape.of(config).stream(config.megastab.model)
    is_cut = tensor > 1 and not sends_slices(config.megastab)
    is_first, is_last = stage.has_embedding, stage.has_head
    pieces = (whole // tensor, (3 + 2 + tensor + 1) * INDEX) if is_cut else (whole,)  # how a cut [T, D] is cut travels before it
    if not is_last:
        sent = (*pieces, *_sides(config))
        yield Transfer("activations to the next stage", "send", "pipeline", sum(sent) * times + META_INTS * 4, len(sent) * times + 1)
    if not is_first:
        yield Transfer("gradients to the stage before", "send", "pipeline", sum(pieces) * times, len(pieces) * times)
    if is_cut:
        # Received pieces are gathered: inputs, and gradients of outputs; beside these the engine gathers its own output again before
        # backward, although the values are needed by nobody.
        gathers = (not is_first) + 2 * (not is_last)
        yield Transfer.many("cut activations, made whole", "all_gather", "tensor", whole, gathers * times)
    yield Transfer("loss", "broadcast", "pipeline", 2 * FP32, 1)
    if config.layout.copies > 1 and is_last:
        yield Transfer("loss", "all_reduce", "data", FP32, 1)


def _sides(config: Config) -> tuple[int, ...]:
    """Bytes of what travels beside the residual stream (``model.stages.Sides``)."""
    shape = Shape.of(config)
    samples = (shape.samples * INDEX,) if config.megastab.model.dropout else ()
    return samples + ((shape.samples * shape.seq * 4,) if config.megastab.data.document_mask else ())


def _scalars(config: Config, stage: Stage) -> Iterator[Transfer]:
    """Norm, overflow, loss and target counts."""
    layout = config.layout
    model_ranks, is_plain = layout.tensor * layout.pipeline, config.zero_stage == 0
    if layout.copies > 1:
        if layout.pipeline == 1:
            yield Transfer("loss", "all_reduce", "data", DOUBLE, 1)
        if config.megastab.data.document_mask:
            yield Transfer("targets of the step", "all_reduce", "data", DOUBLE, 1)
    wrapper = wrapper_kind(config)
    if wrapper in ("plain", "bf16"):
        if model_ranks > 1:
            yield Transfer("gradient norm", "all_reduce", "model", DOUBLE if is_plain else FP32, 1)
        return
    yield from _zero_scalars(config, stage, wrapper, model_ranks)


def _zero_scalars(config: Config, stage: Stage, wrapper: str, model_ranks: int) -> Iterator[Transfer]:
    """ZeRO forms a norm for each decay group, in fp64 at stage 3 (but under offload), and looks for overflow in 16 bits (not bf16 at
    stage 3)."""
    offloads = offload_device(config.deepspeed, "optimizer") != "none"
    groups, norm = len(decay_groups_of(config, stage)), DOUBLE if wrapper == "zero3" and not offloads else FP32
    looks = config.precision == "fp16" or (
        config.precision == "bf16" and wrapper != "zero3" and bool(read(config.deepspeed, "bf16.check_grad_overflow"))
    )
    over: tuple[tuple[Group, int], ...] = (("data", config.layout.copies), ("model", model_ranks))
    for group, ranks in over:
        if ranks > 1:
            yield Transfer("gradient norm", "all_reduce", group, norm * groups, groups)
            if looks:
                yield Transfer("overflow", "all_reduce", group, 1, 1)

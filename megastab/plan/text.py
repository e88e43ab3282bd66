"""A plan as a page of text."""

from __future__ import annotations

from collections.abc import Callable

from megastab.plan.plan import Plan, StagePlan
from megastab.plan.recompute import policy_table
from megastab.plan.units import amount, flops, size, table

LABEL_WIDTH = 13

# Row of the memory table -> its bytes on one rank of a stage.
ROWS: tuple[tuple[str, Callable[[StagePlan], int]], ...] = (
    ("weights", lambda stage: stage.states.weights),
    ("gradients", lambda stage: stage.states.gradients),
    ("fp32 masters", lambda stage: stage.states.masters),
    ("optimizer moments", lambda stage: stage.states.moments),
    ("buckets", lambda stage: stage.states.buckets),
    ("gathered weights", lambda stage: stage.states.gathered),
    ("activations (estimate)", lambda stage: stage.activations.peak),
    ("step workspace", lambda stage: stage.states.step_workspace),
    ("peak", lambda stage: stage.peak),
    ("on the host", lambda stage: stage.states.host),
    ("activations outside", lambda stage: stage.activations.outside),
)


def render(plan: Plan) -> str:
    """The whole page."""
    lines = [*_head(plan), "", "Memory of one rank, by pipeline stage", *_memory(plan), ""]
    lines += ["Policies of megastab.parallel.recompute, everything else as it is", *policy_table(plan.policies, plan.recompute), ""]
    lines += [_labelled("decay groups", "; ".join(_groups(plan)))]
    if plan.completions:
        lines += ["", "Written into the DeepSpeed config, because its default is a trap"]
        lines += [f"  {item.key} = {item.value}: {item.reason}" for item in plan.completions]
    return "\n".join(lines)


def _labelled(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}} {text}"


def _head(plan: Plan) -> list[str]:
    layout, batch = plan.layout, plan.batch
    sequence = ", sequence parallel" if layout["sequence"] else ""
    ranks = "rank" if layout["world"] == 1 else "ranks"
    shared = f"context {layout['context']} x " if layout["context"] > 1 else ""
    facts = {
        "model": f"{plan.model}; {amount(plan.parameters)} parameters",
        "layout": f"{layout['world']} {ranks} = tensor {layout['tensor']} x {shared}pipeline {layout['pipeline']} x data {layout['data']}"
        f"{sequence}",
        "engine": f"{plan.precision}, ZeRO {plan.zero_stage}, DeepSpeed wrapper: {plan.wrapper}; {plan.optimizer}",
        "batch": f"{batch['global']} samples = micro-batch {batch['micro']} x accumulation {batch['accumulation']} x data {batch['data']}",
        "length": f"{plan.steps} steps x {amount(plan.tokens_per_step)} tokens = {amount(plan.tokens)} tokens",
        "compute": f"{flops(plan.flops_per_token)} a token, {flops(plan.flops_per_step)} a step, "
        f"{flops(plan.flops_per_step * plan.steps)} in all (recompute not counted: {plan.recompute})",
    }
    if plan.offload:
        facts["offload"] = plan.offload
    if layout["pipeline"] != 1:
        facts["bubble"] = f"{100 * plan.bubble:.1f} % of a step (1F1B: stages wait to fill and drain)"
    return [_labelled(label, text) for label, text in facts.items()]


def _memory(plan: Plan) -> list[str]:
    """One column a stage; equal neighbours share one."""
    groups: list[list[int]] = []
    for i, stage in enumerate(plan.stages):
        if groups and _bytes(plan.stages[groups[-1][0]]) == _bytes(stage):
            groups[-1].append(i)
        else:
            groups.append([i])
    shown = [plan.stages[group[0]] for group in groups]
    rows = [["", *(f"stage {group[0]}" if len(group) == 1 else f"stages {group[0]}-{group[-1]}" for group in groups)]]
    rows += [["parameters", *(amount(stage.parameters) for stage in shown)]]
    rows += [["micro-batches in flight", *(str(stage.activations.in_flight) for stage in shown)]]
    rows += [[name, *map(size, values)] for name, of in ROWS if any(values := [of(stage) for stage in shown]) or name == "peak"]
    layers = [f"  stage {i}: {stage.layers}" for i, stage in enumerate(plan.stages)] if len(plan.stages) > 1 else []
    return table(rows) + layers


def _bytes(stage: StagePlan) -> tuple[int, ...]:
    return (stage.parameters, stage.activations.in_flight, *(of(stage) for _, of in ROWS))


def _groups(plan: Plan) -> list[str]:
    return [f"decay {g.decay:g}: {g.what} ({g.tensors} tensors, {amount(g.parameters)} parameters)" for g in plan.groups]

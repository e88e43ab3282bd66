"""What an engine carries beside its masters: the client optimizer's state at a fragment's place, and numbers equal on every rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from megastab.wrappers.adapter import Adapter, Fragment, UnsupportedEngine

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what a dynamic loss scaler moves; the rest is the JSON's


class OptimizerState:
    """The client optimizer's state, fragment by fragment: whatever has its tensors' shape, and each tensor's numbers (step counts).

    Made anew for each walk over the fragments: it remembers where DeepSpeed's flat tensors lie.
    """

    def __init__(self, adapter: Adapter):
        self.client: Any = getattr(adapter.optimizer, "optimizer", adapter.optimizer)
        self._flats = adapter.stepped()
        order = sorted((flat.data_ptr(), place) for place, flat in enumerate(self._flats) if flat.numel())
        self._starts, self._places = [start for start, _ in order], [place for _, place in order]

    def _home(self, fragment: Fragment) -> tuple[Tensor, int]:
        """The tensor the optimizer is stepped on, and the fragment's first element in it."""
        at = bisect_right(self._starts, fragment.master.data_ptr()) - 1
        flat, start = self._flats[self._places[at]], self._starts[at]
        offset = (fragment.master.data_ptr() - start) // fragment.master.element_size()
        if not 0 <= offset <= flat.numel() - fragment.master.numel():
            raise RuntimeError(f"the master of {fragment.part.name} lies in no tensor the optimizer is stepped on")
        return flat, offset

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """1-D views of the moments there are; none before the first update."""
        flat, offset = self._home(fragment)
        held = self.client.state.get(flat, {})
        return {name: _cut(value, offset, fragment) for name, value in held.items() if _is_moment(name, value, flat)}

    def prepared(self, fragment: Fragment, names: Iterable[str]) -> dict[str, Tensor]:
        """Views to load into: moments ``names`` are made where they are missing, and all are zero."""
        flat, _ = self._home(fragment)
        held = self.client.state[flat] if names else self.client.state.get(flat, {})
        for name in names:
            if name not in held:
                held[name] = torch.zeros_like(flat, memory_format=torch.contiguous_format)
        views = self.tensors(fragment)
        for view in views.values():
            view.zero_()
        return views

    def scalars(self, fragment: Fragment) -> dict[str, int | float]:
        """The numbers kept for the fragment's tensor. A float is one the optimizer keeps as a tensor (torch's step), an int its own."""
        flat, _ = self._home(fragment)
        held = self.client.state.get(flat, {})
        plain = {name: value for name, value in held.items() if not _is_moment(name, value, flat) and value is not None}
        return {name: float(value) if torch.is_tensor(value) else int(value) for name, value in plain.items()}

    def load_scalars(self, fragment: Fragment, values: Mapping[str, int | float]) -> None:
        """Set the numbers of the fragment's tensor; with none, those there are begin anew."""
        flat, _ = self._home(fragment)
        if not values and flat not in self.client.state:
            return
        held = self.client.state[flat]
        for name, value in (values or dict.fromkeys(self.scalars(fragment), 0)).items():
            if torch.is_tensor(held.get(name)):
                held[name].fill_(value)
            else:
                is_tensor = isinstance(value, float)
                held[name] = torch.tensor(value, dtype=torch.float32, device=flat.device) if is_tensor else value


def _is_moment(name: str, value: Any, flat: Tensor) -> bool:
    return name != "step" and torch.is_tensor(value) and value.shape == flat.shape


def _cut(value: Tensor, offset: int, fragment: Fragment) -> Tensor:
    return value.view(-1).narrow(0, offset, fragment.master.numel())


def scalar_state(adapter: Adapter) -> dict[str, Any]:
    """Counters, applied steps of the schedule and the fp16 loss scale: plain values, equal on every rank."""
    engine = adapter.engine
    state: dict[str, Any] = {name: int(getattr(engine, name)) for name in COUNTERS}
    if engine.lr_scheduler is not None:
        state["schedule"] = int(_schedule(adapter).last_epoch)
    scaler = _dynamic_scaler(adapter)
    if scaler is not None:
        state["loss_scaler"] = {name: getattr(scaler, name) for name in SCALER}
    return state


def load_scalar_state(adapter: Adapter, state: Mapping[str, Any]) -> None:
    """Go on from :func:`scalar_state`. Rates and settings are the config's; a loss scale of another precision is left out."""
    for name in COUNTERS:
        setattr(adapter.engine, name, state[name])
    if adapter.engine.lr_scheduler is not None and "schedule" in state:
        _go_to(_schedule(adapter), state["schedule"])
    scaler = _dynamic_scaler(adapter)
    if scaler is not None:
        for name, value in state.get("loss_scaler", {}).items():
            setattr(scaler, name, value)


def _dynamic_scaler(adapter: Adapter) -> Any:
    scaler = getattr(adapter.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _schedule(adapter: Adapter) -> LambdaLR:
    schedule = adapter.engine.lr_scheduler
    if not isinstance(schedule, LambdaLR):
        raise UnsupportedEngine(f"the schedule is a {type(schedule).__name__}: megastab's checkpoints keep the position of a LambdaLR only")
    return schedule


def _go_to(schedule: LambdaLR, step: int) -> None:
    """The rates of ``step`` from the schedule's own peak: a resumed run whose config names another rate trains with that one."""
    schedule.last_epoch, schedule._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = list(rates)

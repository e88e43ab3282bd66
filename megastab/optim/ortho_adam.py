"""OrthoAdam (arXiv 2410.17174, algorithm 1): Adam whose moments live in a fixed random rotation of each matrix's coordinates.

    r = Q g;  m = b1 m + (1 - b1) r;  v = b2 v + (1 - b2) r^2;  p = (1 - lr wd) p - lr Q^T (m^ / (sqrt(v^) + eps))

Adam treats the axes of the residual stream one by one, which is where outlier channels come from; a rotated Adam does not know them.
Weights stay in the ordinary basis, so that decay, checkpoints and whatever edits weights are those of AdamW.

Differs: the paper's Q acts on the flattened tensor (n x n); here it acts on rows (``axes="last"``), or on rows and columns
(``"both"``), as the public reproduction does, and vectors are plain Adam unless asked.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from megastab.config.errors import UserError
from megastab.optim import row_op
from megastab.optim.ortho_plan import FlatPlan, plan_flat
from megastab.optim.ortho_segment import Segment
from megastab.optim.rotation import COLUMNS, Rotation, RotationKind, rotation_of, true_fp32
from megastab.optim.row_step import Pace, Views
from megastab.parallel import collectives
from megastab.parallel.foreign import foreign_info, role_of
from megastab.parallel.param_info import ParamInfo, Part, info_of

Axes = Literal["last", "both"]
FORMAT = 1  # of the moments' coordinates
SETTINGS = ("rotation", "axes", "seed", "haar_per", "max_axis", "rotate_vectors", "ortho_format")
"""What the moments mean depends on these: they travel in every parameter group, and a checkpoint with others is refused."""
TORCHS_OWN = ("fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad")


def ortho_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The ``SETTINGS`` of an OrthoAdam built with ``params``."""
    defaults = inspect.signature(OrthoAdam).parameters
    given = {name: params[name] if name in params else defaults[name].default for name in SETTINGS[:-1]}
    return {**given, SETTINGS[-1]: FORMAT}


class OrthoAdam(Optimizer):
    """AdamW with rotated moments; an ordinary torch optimizer on one process.

    Under DeepSpeed ``megastab.initialize``, ``megastab.attach`` or the trainer bind it to the partitions; unbound it refuses to step
    them. ``rotation="none"`` is torch's fused AdamW to the bit and needs no binding.

    Args:
        params: parameters, (name, parameter) pairs or groups of either. A matrix's Q comes from its name: megastab's own parameters have
            one, an engine's get their module's; of others without one it comes from their place, with a warning.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to sqrt(v), in the rotated coordinates.
        weight_decay: decoupled, on the weights in their ordinary basis.
        rotation: ``hadamard`` (fast, any width m * 2^k with m odd and at most 64), ``haar`` (dense) or ``none``.
        axes: ``last`` rotates rows; ``both`` columns too, for which every matrix that several ranks hold is gathered each step.
        seed: of the rotations.
        haar_per: ``width``: one dense Q for all rows of a length; ``parameter``: one each, of width^2 elements.
        max_axis: axes longer than this are not rotated.
        rotate_vectors: rotate 1-D parameters too, each as one row: gains and biases that meet the residual stream, not those of q, k,
            v, gate and up. Under ZeRO-3 these rows lie on every rank, so that each step exchanges them.
        decay_by_role: leave 1-D parameters (gains, biases) out of the decay.

    Raises:
        UserError: a setting out of range; in the first step, a width that cannot be rotated.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rotation: RotationKind = "hadamard",
        axes: Axes = "last",
        seed: int = 0,
        *,
        haar_per: Literal["width", "parameter"] = "width",
        max_axis: int = 8192,
        rotate_vectors: bool = False,
        decay_by_role: bool = False,
    ):
        _check(lr, betas, eps, weight_decay, seed, max_axis)
        for name, value, allowed in (("rotation", rotation, RotationKind), ("axes", axes, Axes)):
            if value not in get_args(allowed):
                raise UserError(f"OrthoAdam: {name} = {value!r} is not one of {', '.join(get_args(allowed))}")
        if haar_per not in ("width", "parameter"):
            raise UserError(f"OrthoAdam: haar_per = {haar_per!r} is not one of width, parameter")
        self.settings: dict[str, Any] = dict(zip(SETTINGS, (rotation, axes, seed, haar_per, max_axis, rotate_vectors, FORMAT), strict=True))
        self.decay_by_role = decay_by_role
        self.plans: dict[int, FlatPlan] | None = None
        """By id of the tensor the optimizer is stepped on; set by binding."""
        self._own: dict[int, nn.Parameter] = {}
        self._alone: dict[int, FlatPlan] = {}
        self._rotations: dict[tuple[str, int], Rotation] = {}
        self.rotation_seconds = 0.0
        """Spent on making rotations so far."""
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, **self.settings})

    @property
    def given(self) -> list[nn.Parameter]:
        """The parameters it was built over, whatever DeepSpeed has put in their place."""
        return list(self._own.values())

    @property
    def is_rotating(self) -> bool:
        """Whether there is anything AdamW would not do."""
        return self.settings["rotation"] != "none"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group cannot have a rotation of its own."""
        other = [key for key in SETTINGS if key in param_group and param_group[key] != self.settings[key]]
        if other:
            raise UserError(f"OrthoAdam: a parameter group cannot set {', '.join(other)}: they hold for the whole optimizer")
        if asked := [key for key in TORCHS_OWN if param_group.get(key)]:
            raise UserError(
                f"OrthoAdam: a parameter group asks for {', '.join(asked)}, which is of torch's optimizers: leave it out; a built op is "
                "used wherever there is one (docs/orthoadam.md)"
            )
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._own[id(parameter)] = parameter
        self._alone = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; moments of other rotations are refused.

        Raises:
            UserError: the states were made with another seed or rotation, or by another optimizer.
        """
        for group in state_dict["param_groups"]:
            self._check_settings(group, "the checkpoint's moments were made with")
        super().load_state_dict(state_dict)

    def _check_settings(self, group: Mapping[str, Any], said: str) -> None:
        wrong = [f"{key} {group.get(key)} and not {mine}" for key, mine in self.settings.items() if group.get(key) != mine]
        if wrong:  # every rank loads the same settings, so every rank gets here
            collectives.fail_alike(
                f"OrthoAdam: {said} {', '.join(wrong)}: in other coordinates they mean nothing. Resume with the settings the run was "
                "saved with, or begin anew from its weights"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_settings(group, "a parameter group now says")
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    if self.is_rotating:
                        self._rotated_step(parameter, group)
                    else:
                        self._plain_step(parameter, group)
        return loss

    def _plain_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        adamw(
            params=[parameter],
            grads=[parameter.grad],
            exp_avgs=[state["exp_avg"]],
            exp_avg_sqs=[state["exp_avg_sq"]],
            max_exp_avg_sqs=[],
            state_steps=[state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0 if self.decay_by_role and parameter.ndim < 2 and id(parameter) in self._own else group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _rotated_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        plan = self._plan(parameter)
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse or parameter.dtype != torch.float32:
            raise UserError(
                f"OrthoAdam steps dense fp32 weights; {self.name_of(parameter)} is {parameter.dtype}"
                f"{' with a sparse gradient' if gradient.is_sparse else ''}: keep fp32 masters (bf16 or fp16 in DeepSpeed's JSON does)"
            )
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = 0  # a number of this tensor, not of the optimizer: ZeRO steps its flat tensors one by one
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] = int(state["step"]) + 1
        first, second = group["betas"]
        pace = Pace(float(group["lr"]), first, second, group["eps"], state["step"], group["weight_decay"])
        weights = parameter.data.reshape(-1)
        flat = Views(weights, gradient.reshape(-1).float(), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        with true_fp32(parameter.device):
            plan.update(flat, pace)
        if weights.data_ptr() != parameter.data_ptr():  # reshape had to copy
            parameter.data.copy_(weights.view_as(parameter))

    def _plan(self, parameter: Tensor) -> FlatPlan:
        """The plan binding made, or that of an ordinary parameter on one process."""
        if self.plans is not None:
            if id(parameter) not in self.plans:
                raise UserError(f"OrthoAdam: {self.name_of(parameter)} is not part of the engine's module, so nothing tells its rows")
            return self.plans[id(parameter)]
        if id(parameter) not in self._own:
            raise RuntimeError(
                "OrthoAdam is asked to step a tensor it was not built over: DeepSpeed has replaced the parameters by flat partitions, "
                "whose rows it cannot tell. Build the engine with megastab.initialize, or call megastab.attach(engine) before the first "
                "step"
            )
        if not self._alone:
            if collectives.world()[1] == 1 and self.settings["rotation"] == "hadamard" and self.settings["axes"] == "last":
                row_op.agree()  # of several ranks the binding asks
            self._warn_of_places()
            self._alone = {key: self._plan_alone(held) for key, held in self._own.items()}
            if not any(plan.whole for plan in self._alone.values()):
                raise UserError(
                    f"OrthoAdam: none of {len(self._own)} parameters has an axis to rotate (vectors are left alone, and axes longer than "
                    f"max_axis = {self.settings['max_axis']}): use AdamW, or rotate_vectors, or another max_axis"
                )
        return self._alone[id(parameter)]

    def _plan_alone(self, parameter: nn.Parameter) -> FlatPlan:
        info, offset, segments = info_of(parameter) or foreign_info(parameter, self.name_of(parameter)), 0, []
        for part in info.parts:
            width = info.width or 1
            segments.append(self.segment(parameter, info, part, offset, part.start * width, part.rows * width))
            offset += part.rows * width
        return plan_flat(segments, self.rotation_for)

    def _warn_of_places(self) -> None:
        nameless = [p for p in self._own.values() if info_of(p) is None and p.dim() > 1]
        if nameless and self.is_rotating and not any(group.get("param_names") for group in self.param_groups):
            warnings.warn(
                f"OrthoAdam: {len(nameless)} matrices have no names, so their rotations come from their places among the parameters, and a "
                "checkpoint means nothing to another order: give model.named_parameters() to tie them to names",
                stacklevel=4,
            )

    def segment(self, parameter: nn.Parameter, info: ParamInfo, part: Part, offset: int, first: int, length: int) -> Segment:
        """How elements [first, first + length) of a matrix, which lie at ``offset`` of what is stepped, are to be treated."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = not self.decay_by_role or (info.decays if info_of(parameter) is not None else len(shape) > 1)
        plain = Segment(part.name, offset, first, length, self.row_width(parameter, info, part), decays)
        height = self.width_of(part.global_rows) if self.settings["axes"] == "both" and len(shape) == 2 else 0
        if not height:
            return plain
        left = self.rotation_for(f"{part.name}{COLUMNS}", height)
        return replace(plain, width=shape[-1], left=left, turns_rows=plain.width > 0)

    def row_width(self, parameter: nn.Parameter, info: ParamInfo, part: Part) -> int:
        """The width a matrix's rows are rotated with; 0 for one whose rows are left alone."""
        if info.width is None:
            return self.width_of(part.global_rows) if self.settings["rotate_vectors"] and _meets_the_residual(part.name) else 0
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return self.width_of(shape[-1] if info_of(parameter) is None else info.width)

    def width_of(self, length: int) -> int:
        """The width an axis is rotated with; 0 for one that is left alone (of one element, or longer than ``max_axis``)."""
        return length if 1 < length <= self.settings["max_axis"] else 0

    def rotation_for(self, name: str, width: int, device: torch.device | str | None = None) -> Rotation:
        """The Q of rows of one matrix; made once."""
        kind, seed = self.settings["rotation"], self.settings["seed"]
        if kind == "haar" and self.settings["haar_per"] == "width":
            name = "rows of this width"
        if (name, width) not in self._rotations:
            if device is None:
                device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
            began = time.perf_counter()
            self._rotations[name, width] = rotation_of(kind, seed, name, width, device)
            self.rotation_seconds += time.perf_counter() - began
        return self._rotations[name, width]

    @property
    def rotation_bytes(self) -> int:
        """What the rotations made so far occupy on this rank."""
        held = {id(t): t for rotation in self._rotations.values() for t in rotation.tensors}
        return sum(t.numel() * t.element_size() for t in held.values())

    def name_of(self, parameter: Tensor) -> str:
        """The name it was given, or its place."""
        place = 0
        for group in self.param_groups:
            for index, held in enumerate(group["params"]):
                if held is parameter:
                    names = group.get("param_names")
                    return str(names[index]) if names else f"parameter {place + index}"
            place += len(group["params"])
        return "a tensor"


def _meets_the_residual(name: str) -> bool:
    """Whether a vector is as long as the residual stream: tensor parallelism cuts the others, and Q must not depend on that."""
    if not name.endswith(".bias"):
        return True
    module = name.removesuffix(".bias")
    return not {module.split(".")[-1], role_of(module)} & {"q", "k", "v", "gate", "up"}


def _check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int, max_axis: int) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise UserError(f"OrthoAdam: {name} = {value} must be a number from 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise UserError(f"OrthoAdam: betas = {betas} must be two numbers in [0, 1)")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"OrthoAdam: seed = {seed!r} must be a whole number")
    if max_axis < 2:
        raise UserError(f"OrthoAdam: max_axis = {max_axis} leaves nothing to rotate: it must be at least 2")

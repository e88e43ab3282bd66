"""Which rule decides about the norm, by what the config says."""

from __future__ import annotations

from collections.abc import Mapping

from megastab.config.schema_stability import StabilityConfig
from megastab.stability.clip_rule import ClipRule
from megastab.stability.fixed_clip import FixedClip
from megastab.stability.rivals import AdaGC, AutoClip, SkipStep
from megastab.stability.scoped import Scoped
from megastab.stability.zclip import ZClip


def clipping_rule(config: StabilityConfig, cap: float, batch_size: int, layers: Mapping[str, int | None]) -> ClipRule | Scoped:
    """The rule a config asks for. How many bad norms end a run is the policy's business, not the rule's.

    Args:
        cap: the JSON's ``gradient_clipping``, 0 for none.
        batch_size: global; ZClip remembers it, because norms depend on it.
        layers: block of every matrix of the model, None outside the blocks.
    """
    if config.zclip is not None:
        settings = config.zclip.model_dump(exclude={"scope"})
        if config.policy.on_spike == "skip":
            settings["skip_update_on_spike"] = True  # what a skipped step would have been clipped to is no norm of the run's

        def zclip(own_cap: float | None = None) -> ZClip:
            return ZClip(**settings, max_grad_norm=own_cap, batch_size=batch_size, max_nonfinite_in_a_row=None)

        scope = config.zclip.scope
        return zclip(cap or None) if scope == "global" else Scoped(zclip, scope, layers)
    if config.autoclip is not None:
        return AutoClip(**config.autoclip.model_dump(), max_nonfinite_in_a_row=None)
    if config.adagc is not None:
        adagc = config.adagc.model_dump()
        return Scoped(lambda: AdaGC(**adagc, max_nonfinite_in_a_row=None), "parameter", layers)
    if config.skip_step is not None:
        return SkipStep(**config.skip_step.model_dump(), max_nonfinite_in_a_row=None)
    return FixedClip(cap)

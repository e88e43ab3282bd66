"""What a trained model's residual stream looks like: kurtosis and size by layer, the first token apart (arXiv 2410.17174).

Letters: B samples, S positions, T = B * S tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def kurtosis(x_TD: Tensor) -> Tensor:
    """[T, D] -> [T] fp64: fourth central moment over the squared second, across the channels of each token.

    Gaussian channels give 3 (D - 1) / (D + 1), one channel alone D - 2 + 1 / (D - 1); equal channels have none (NaN).
    """
    centred_TD = x_TD.double() - x_TD.double().mean(-1, keepdim=True)
    return centred_TD.pow(4).mean(-1) / centred_TD.square().mean(-1).square()


def random_basis(width: int) -> Tensor:
    """A random orthogonal [D, D], fp64, Haar distributed and always the same one."""
    gaussian = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def statistics(x_TD: Tensor, seq: int, basis_DD: Tensor | None = None) -> dict[str, float]:
    """Of one layer's output, ``seq`` tokens a sample.

    Args:
        x_TD: what a layer gives.
        seq: positions of a sample.
        basis_DD: what ``kurtosis_turned`` multiplies by, fp64; ``None`` is :func:`random_basis`, which spreads out an outlier that lies
            along one channel.

    Returns:
        ``kurtosis_first`` and ``kurtosis_rest``: means over the first tokens and over all others; ``kurtosis_turned``: of the others after
        multiplication by ``basis_DD``; ``size_first`` and ``size_rest``: the same means of a token's
        largest absolute value; ``largest`` of all values and their ``median``, absolute.
    """
    is_first_T = torch.arange(x_TD.shape[0]) % seq == 0
    size_T, kurtosis_T = x_TD.abs().amax(-1), kurtosis(x_TD)
    turned_T = kurtosis(x_TD[~is_first_T].double() @ (random_basis(x_TD.shape[1]) if basis_DD is None else basis_DD))
    return {
        "kurtosis_first": float(kurtosis_T[is_first_T].nanmean()),
        "kurtosis_rest": float(kurtosis_T[~is_first_T].nanmean()),
        "kurtosis_turned": float(turned_T.nanmean()),
        "size_first": float(size_T[is_first_T].mean()),
        "size_rest": float(size_T[~is_first_T].mean()),
        "largest": float(x_TD.abs().max()),
        "median": float(x_TD.abs().median()),
    }


@torch.no_grad()
def statistics_by_layer(model: nn.Module, tokens_BS: Tensor, basis_DD: Tensor | None = None) -> list[dict[str, float]]:
    """Of the embedding's output and of the residual stream behind every block, in fp32."""
    found: list[dict[str, float]] = []

    def keep(_module: nn.Module, _inputs: Any, out_TD: Tensor) -> None:
        found.append(statistics(out_TD.float(), tokens_BS.shape[1], basis_DD))

    handles = [layer.register_forward_hook(keep) for layer in (model.embedding, *model.blocks)]
    try:
        model.logits(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    return found

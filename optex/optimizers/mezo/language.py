"""The blocks of Hugging Face's causal language models, as a chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["language_model_blocks"]


def language_model_blocks(model: nn.Module) -> list[nn.Module]:
    """Entry, layers and exit of a causal language model, for ``BlockStreamer``: token codes in, scores out.

    Two shapes are known: ``model.model.layers`` between ``embed_tokens`` and ``norm``, with ``rotary_emb``
    where there is one (Llama, Mistral, Qwen), and ``model.transformer.h`` between ``wte``, ``wpe``,
    ``drop`` and ``ln_f`` (GPT-2); both end in ``lm_head``. Sequences must be whole and of one length: no
    padding mask is made, and layers have to be causal without one, as those with
    ``attn_implementation="sdpa"`` are. The blocks share the model's parameters.

    Args:
        model: a causal language model; token codes [n, t] become scores [n, t, alphabet].

    Raises:
        TypeError: the model is no module.
        ValueError: the model has another shape, or its attention needs a mask.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> model = torch.nn.Module()
    >>> model.transformer = torch.nn.ModuleDict({
    ...     "wte": torch.nn.Embedding(5, 4), "wpe": torch.nn.Embedding(8, 4),
    ...     "h": torch.nn.ModuleList([torch.nn.Linear(4, 4)]), "ln_f": torch.nn.LayerNorm(4)})
    >>> model.lm_head = torch.nn.Linear(4, 5)
    >>> chain = torch.nn.Sequential(*language_model_blocks(model))
    >>> len(chain), chain(torch.tensor([[0, 3, 1]])).shape
    (3, torch.Size([1, 3, 5]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"language_model_blocks: model must be a torch.nn.Module, got {type(model).__name__}")
    kind = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if kind not in ("sdpa", "flash_attention_2"):
        raise ValueError(
            f"language_model_blocks: attention {kind!r} needs a mask to be causal, and none is made; load the "
            "model with attn_implementation='sdpa'"
        )
    head, trunk = _part(model, "lm_head"), _part(model, "model")
    if trunk is not None and head is not None:
        layers, embedding, norm = _part(trunk, "layers"), _part(trunk, "embed_tokens"), _part(trunk, "norm")
        if isinstance(layers, nn.ModuleList) and embedding is not None and norm is not None:
            rotary = _part(trunk, "rotary_emb")
            inner = [_Layer(layer, rotary) for layer in layers]
            return [_Entry(embedding, None, None), *inner, _Exit(norm, head)]
    trunk = _part(model, "transformer")
    if trunk is not None and head is not None:
        layers, embedding, norm = _part(trunk, "h"), _part(trunk, "wte"), _part(trunk, "ln_f")
        if isinstance(layers, nn.ModuleList) and embedding is not None and norm is not None:
            entry = _Entry(embedding, _part(trunk, "wpe"), _part(trunk, "drop"))
            return [entry, *(_Layer(layer, None) for layer in layers), _Exit(norm, head)]
    raise ValueError(
        f"language_model_blocks: {type(model).__name__} has neither model.layers with embed_tokens and norm "
        "nor transformer.h with wte and ln_f, and an lm_head; hand BlockStreamer a list of its blocks"
    )


def _part(owner: nn.Module, name: str) -> nn.Module | None:
    return owner._modules.get(name)


class _Entry(nn.Module):
    """Token embeddings, with positions where they are learned."""

    def __init__(self, tokens: nn.Module, positions: nn.Module | None, dropout: nn.Module | None) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, dropout

    def forward(
        self,
        codes: Tensor,  # [n, t]
    ) -> Tensor:  # [n, t, width]
        hidden = self.tokens(codes)
        if self.positions is not None:
            hidden = hidden + self.positions(torch.arange(codes.shape[1], device=codes.device))
        return hidden if self.dropout is None else self.dropout(hidden)


class _Layer(nn.Module):
    """One layer, with the angles of its rotary embedding where the model has one for all layers."""

    def __init__(self, layer: nn.Module, rotary: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(
        self,
        hidden: Tensor,  # [n, t, width]
    ) -> Tensor:  # [n, t, width]
        options: dict[str, Any] = {}
        if self.rotary is not None:
            places = torch.arange(hidden.shape[1], device=hidden.device)[None]
            options = {"position_ids": places, "position_embeddings": self.rotary(hidden, places)}
        answer = self.layer(hidden, **options)
        return answer[0] if isinstance(answer, tuple) else answer


class _Exit(nn.Module):
    """The last norm, and the head that gives the scores."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(
        self,
        hidden: Tensor,  # [n, t, width]
    ) -> Tensor:  # [n, t, alphabet]
        return self.head(self.norm(hidden))

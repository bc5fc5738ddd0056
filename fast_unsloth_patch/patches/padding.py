"""Padded batches in training: padding leaves before the first layer, and comes back as zeros after the last.

`causal_lm` says which rows of the hidden states the loss looks at; the tokens of the batch then are the documents of
one row. Positions stay as stock counts them, padding included.

Stock's shifted loss asks the last padded token before a sequence for that sequence's first token. Stock's attention
gives such a token, which sees nothing, zeros (PyTorch's does, since 2.5): it stays in the row, behind the documents,
and gets zeros as well. A padded token after a sequence does see something; if the loss looks at one, stock runs.

Any padding is worth it: already the mask costs stock the flash kernel, and what this adds is one pass over the last
hidden states. A cache would be made of other tokens, so there stock runs, also where nobody asked for the cache but the
configuration, whose default is ``use_cache=True`` (Trainer sets it to False, checkpointing turns it off). What is made
of all tokens keeps them too: recorded outputs, Mixtral's router logits with the loss that balances its experts, and the
noise on its routers' input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..status import Tally
from .documents import WHOLE, Call, Packing, Whole, blocked, hooks_of, needs_no_mask, why_stock

PADDING = "fast_padding"

# Scaling that looks at the largest position of a batch, which padding may hold.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class Padding(NamedTuple):
    """What the loss tells the base model, in the keyword ``fast_padding``.

    A tuple, because FSDP2 moves the tensors in what it passes on.
    """

    targets: torch.Tensor  # labels as the rows of the hidden states meet them, B x S of them
    ignore_index: int


def padding_of(
    model: Any, attention_mask: object, labels: torch.Tensor, shift_labels: torch.Tensor | None, ignore_index: int
) -> Padding | None:
    """What the loss has to tell the base model ``model``; None: nothing, or it would not listen."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    if not getattr(type(model).forward, "takes_padding", False) or "forward" in model.__dict__:
        return None
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return Padding(shift_labels, ignore_index) if shift_labels.numel() == attention_mask.numel() else None


class Unpadded(Packing):
    """The tokens of a padded batch as the documents of one row.

    Attributes:
        rows: [T] int64, where they were among the B x S of the batch.
        shape: B, S.
    """

    __slots__ = ("rows", "shape")

    rows: torch.Tensor
    shape: tuple[int, int]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] -> [1, T, ...]."""
        return x.flatten(0, 1).index_select(0, self.rows).unsqueeze(0)

    def put_back(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] -> [B, S, ...], zeros where padding was."""
        x = x.squeeze(0)
        full = x.new_zeros((self.shape[0] * self.shape[1], *x.shape[1:]))
        return full.index_copy(0, self.rows, x).unflatten(0, self.shape)

    def positions(self, position_ids: torch.Tensor | None) -> torch.Tensor:
        """[1, T]: the positions that stock gives the tokens."""
        if position_ids is None:
            return (self.rows % self.shape[1]).unsqueeze(0)
        return self.take(position_ids.to(self.rows.device).expand(self.shape))

    def run_stock(self, stock, attention, hidden, position_embeddings, kwargs):
        padded = tuple(self.put_back(t) for t in position_embeddings)
        out, weights = super().run_stock(stock, attention, self.put_back(hidden), padded, kwargs)
        return self.take(out), weights


def find_padding(call: Call, padding: Padding, tally: Tally) -> Unpadded | Whole | str | None:
    """The documents that are left without padding, `WHOLE` if there is none; None where stock has to look for itself;
    or why stock must run although there is some.
    """
    inputs, mask, position_ids = call.inputs(), call.attention_mask, call.position_ids
    if inputs is None or mask.shape != inputs.shape[:2]:
        return None
    if position_ids is not None and tuple(position_ids.shape) not in ((1, mask.shape[1]), tuple(mask.shape)):
        return None
    reason = blocked(call.model, inputs)
    if reason is not None:
        return reason
    # Mask and targets in one byte a token, so that the host waits once.
    looked_at = padding.targets.reshape(mask.shape) != padding.ignore_index
    code = (mask.bool().to(torch.uint8) + 2 * looked_at.to(mask.device, torch.uint8)).cpu()
    real, asked = (code & 1).bool(), code == 2
    if bool(real.all()):
        return WHOLE if needs_no_mask(call, mask.shape[1]) else None
    reason = why_stock(call, inputs) or _why_padded(call, real, asked)
    if reason is not None:
        return reason
    lengths = real.sum(1)
    lengths = lengths[lengths > 0]
    rows = torch.cat((real.flatten().nonzero().flatten(), asked.flatten().nonzero().flatten()))
    unpadded = Unpadded(
        nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(inputs.device, non_blocking=True),
        int(lengths.max()),
        int(lengths.sum()),
        call.window(),
        call.mask_builder(tuple(mask.shape), inputs.device),
        tally,
    )
    unpadded.rows = rows.to(inputs.device, non_blocking=True)
    unpadded.shape = tuple(mask.shape)
    return unpadded


def _why_padded(call: Call, real: torch.Tensor, asked: torch.Tensor) -> str | None:
    """Why padding must stay, or None.

    Args:
        call: of the base model.
        real: [B, S], tokens that are none.
        asked: [B, S], padding that the loss looks at.
    """
    if call.option("output_hidden_states"):
        return "hidden states asked for"
    if call.option("output_router_logits"):
        return "router logits asked for"
    if any(call.option(f"output_{name}") for name in getattr(call.model, "_can_record_outputs", None) or ()):
        return "outputs asked for"
    if any(getattr(getattr(layer, "mlp", None), "jitter_noise", None) for layer in call.model.layers):
        return "router jitter"
    if not call.option("return_dict"):
        return "return_dict"
    if getattr(call.model.rotary_emb, "rope_type", "default") in _ROPE_BY_LENGTH:
        return "rotary scaling by length"
    if hooks_of(call.model).on_rows:
        return "hooks inside a layer"
    if not bool(real.any()):
        return "nothing but padding"
    if bool(asked.any()) and bool((asked & real.cumsum(1).bool()).any()):
        return "labels on padding"
    window = call.window()
    if window is not None and window < real.shape[1]:
        pieces = real[:, 0] + (real[:, 1:] & ~real[:, :-1]).sum(1)
        if bool((pieces > 1).any()):
            return "sliding window over gaps"
    return None

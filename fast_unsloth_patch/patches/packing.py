"""Packed rows and padding as variable-length attention: where documents begin is found once a step.

:func:`model_forward` stands for the base model's forward. For a step with packed rows, or with padding in training
(`padding`), it gives stock's forward a `documents.Packing` for the layers, and in place of the mask a 4-D placeholder,
which transformers takes for a finished one and hands on, so that none is built.

What counts as packed is what stock's sdpa would treat so: no ``attention_mask``, no cache, and in some row a position
that is not its left neighbour's plus one. With a cache (``use_cache=True``, a configuration's default where
checkpointing does not turn it off) stock attends across documents; then this does too, and counts the reason "cache".

The host waits for the device once, where stock's own forward waits too. With the boundary keywords of Hugging Face's
collators (``cu_seq_lens_q`` and the like, from ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` or TRL) it
does not: in a model's first packed step they are compared with ``position_ids``, which is all that stock's sdpa looks
at, and believed from then on if they were equal. On a CPU they are not looked at.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..status import Tally
from . import guards
from .documents import PACKING, WHOLE, Call, Packing, Whole, blocked, needs_no_mask, why_stock
from .padding import PADDING, Unpadded, find_padding

_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Models whose boundary keywords have agreed with their position_ids.
_BELIEVED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def model_forward(stock: Callable, tally: Tally) -> Callable:
    """Build the forward that stands for ``LlamaModel.forward`` or a like family's.

    Args:
        stock: the saved forward, with its decorators.
        tally: counters of the patch. A step counts once; one with neither packed rows nor padding does not count.
    Returns:
        A function of the same parameters, which returns what ``stock`` returns. It understands one more keyword,
        ``fast_padding``, a `padding.Padding`; the last hidden states are then zero where padding was.
    """
    modeling = sys.modules[stock.__module__]
    cache_argument = guards.cache_argument(stock)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        by_old_name = kwargs.pop("past_key_values", None)
        if cache is None:
            cache = by_old_name
        padding = kwargs.pop(PADDING, None)
        packing: Packing | Whole | str | None = None
        if padding is not None or attention_mask is None:
            call = Call(
                modeling, self, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, kwargs
            )
            packing = find_documents(call, tally) if padding is None else find_padding(call, padding, tally)
        if isinstance(packing, str):
            tally.fall_back(packing)
            packing = None
        if packing is not None:
            kwargs[PACKING] = packing
            if isinstance(packing, Packing):
                tally.hit()
            if isinstance(packing, Unpadded):
                if inputs_embeds is None:
                    # All of them, so that hooks on the embedding see what they would (NEFTune's noise depends on S).
                    inputs_embeds, input_ids = self.embed_tokens(input_ids), None
                inputs_embeds = packing.take(inputs_embeds)
                position_ids = packing.positions(position_ids)
            # Nothing in it: an attention that took it for a mask would fail rather than be wrong.
            device = (input_ids if inputs_embeds is None else inputs_embeds).device
            attention_mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)
        output = stock(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{cache_argument: cache},
            **kwargs,
        )
        if isinstance(packing, Unpadded):
            output.last_hidden_state = packing.put_back(output.last_hidden_state)
        return output

    forward.takes_padding = True  # type: ignore[attr-defined]
    return forward


def find_documents(call: Call, tally: Tally) -> Packing | Whole | str | None:
    """The documents that ``position_ids`` tell, `WHOLE` if every row is one; None where stock has to look for itself;
    or why stock must run although there are several.
    """
    inputs, position_ids = call.inputs(), call.position_ids
    if inputs is None:
        return None
    batch, length = inputs.shape[:2]
    if position_ids is None:  # stock then counts from 0 on
        return WHOLE if blocked(call.model, inputs) is None and needs_no_mask(call, length) else None
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        return None
    reason = blocked(call.model, inputs) or ("tensor subclass" if type(position_ids) is not torch.Tensor else None)
    if reason is not None:
        return reason
    claim = _claimed(call, batch) if position_ids.is_cuda else None
    if claim is not None and call.model in _BELIEVED:
        cu_seqlens, max_length = claim
        if cu_seqlens.numel() == 2:
            return WHOLE if needs_no_mask(call, length) else None
        reason = why_stock(call, inputs)
    else:
        found = boundaries(position_ids, batch)
        if found is None:
            return WHOLE if needs_no_mask(call, length) else None
        reason = why_stock(call, inputs)
        max_length = int(found.diff().max())
        if claim is not None and claim[1] == max_length and torch.equal(claim[0].cpu(), found):
            _BELIEVED.add(call.model)
        cu_seqlens = found.to(inputs.device, non_blocking=True)
    if reason is not None:
        return reason
    mask_builder = call.mask_builder((batch, length), inputs.device)
    return Packing(cu_seqlens, max_length, batch * length, call.window(), mask_builder, tally)


def boundaries(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Where documents begin among all tokens, and the end: [documents + 1] int32 on the host; None: one a row.

    A document ends where a position is not followed by itself plus one: stock's rule
    (``masking_utils.find_packed_sequence_indices``). A row ends one too.

    Args:
        position_ids: [1 or B, S].
        batch: B.
    """
    # All of it to the host at once: 8 bytes a token take less time than the kernels that would make them fewer.
    position_ids = position_ids.cpu()
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    torch.ne(position_ids[:, 1:] - position_ids[:, :-1], 1, out=begins[:, 1:])
    if int(begins.sum()) == begins.shape[0]:
        return None
    starts = begins.expand(batch, -1).flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([begins.shape[1] * batch]))).int()


def _claimed(call: Call, batch: int) -> tuple[torch.Tensor, int] | None:
    """Boundaries and the longest document as the collator tells them; None if it does not, or not in that form."""
    q, k, max_q, max_k = (call.kwargs.get(name) for name in _KEYWORDS)
    if batch != 1 or type(q) is not torch.Tensor or type(k) is not torch.Tensor:
        return None
    if q.dim() != 1 or q.numel() < 2 or q.shape != k.shape or q.dtype is not torch.int32 or not q.is_contiguous():
        return None
    if type(max_q) is not int or max_q != max_k or q.device != call.position_ids.device:
        return None
    return q, max_q

"""``*ForCausalLM`` in training: the loss straight from the hidden states, logits only for whoever looks at them.

The base model runs as always. Instead of ``lm_head`` and ``ForCausalLMLoss`` comes `ops.linear_cross_entropy`, and the
output, which is Hugging Face's own class, carries `lazy_logits` as its logits. Everything but training with labels is
stock's: evaluation, generation, losses that are not the standard one, heads that are not a plain ``nn.Linear``.

TRL's trainers put their own loss head on the *instance*, so they never come here; ``status()`` shows no calls then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers.loss import loss_utils
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from ..ops.linear_cross_entropy import compute_dtype, linear_cross_entropy, prepare_labels
from ..status import Tally
from . import guards
from .lazy_logits import lazy_logits, reads_logits
from .padding import PADDING, padding_of
from .recompute import loss_follows

# As they were when this module was imported: a library that replaces either has its own loss in mind.
_STOCK_LOSS = loss_utils.ForCausalLMLoss
_STOCK_CROSS_ENTROPY = loss_utils.fixed_cross_entropy
_FUNCTIONAL_CROSS_ENTROPY = nn.functional.cross_entropy
# What guards look at where the head is not one whose weight they could judge; `_head_reason` says so after them.
_NO_WEIGHT = torch.zeros(1)
# Arguments that mean something to a cross-entropy and nothing to ours, or that stock itself refuses.
_LOSS_ARGUMENTS = frozenset(
    ("label_smoothing", "logits", "output_logits", "reduction", "source", "target", "vocab_size", "weight")
)

# Where stock finds the size of the vocabulary that it tells the loss.
_VocabSize = Callable[[Any], int]
_CONFIGURED: _VocabSize = attrgetter("config.vocab_size")
_OWN: _VocabSize = attrgetter("vocab_size")


def _head_reason(head: Any) -> str | None:
    """Why ``head`` must be called as a module, or None."""
    if type(head) is not nn.Linear:
        return "lm_head is not nn.Linear"
    if head.bias is not None:
        return "lm_head has a bias"
    if guards.hooked(head) or guards.hooked_globally():
        return "hooks on lm_head"
    # A parameter, or what FSDP1 and flattening libraries put in its place. DTensor and quantised weights are neither.
    if type(head.weight) not in (nn.Parameter, torch.Tensor) or head.weight.dim() != 2:
        return "lm_head.weight is not a plain tensor"
    return None


def _loss_reason(
    model: Any, labels: torch.Tensor, logits_to_keep: Any, vocab_size: _VocabSize, kwargs: dict[str, Any]
) -> str | None:
    """Why the loss of this call is not the standard one, or None."""
    if (
        model.loss_function is not _STOCK_LOSS
        or loss_utils.fixed_cross_entropy is not _STOCK_CROSS_ENTROPY
        or nn.functional.cross_entropy is not _FUNCTIONAL_CROSS_ENTROPY
    ):
        return "loss function"
    if type(logits_to_keep) is not int or logits_to_keep != 0:
        return "logits_to_keep"
    if not _LOSS_ARGUMENTS.isdisjoint(kwargs):
        return "loss arguments"
    if type(kwargs.get("ignore_index", -100)) is not int:
        return "loss arguments"
    if not isinstance(kwargs.get("num_items_in_batch"), (type(None), int, float, torch.Tensor)):
        return "loss arguments"
    shifted = kwargs.get("shift_labels")
    for tensor in (labels, shifted):
        if tensor is not None and (type(tensor) is not torch.Tensor or tensor.dtype is not torch.int64):
            return "labels are not int64"
    if shifted is None and labels.dim() == 0:
        return "labels are not int64"
    if vocab_size(model) != model.lm_head.weight.shape[0]:
        return "vocab_size"
    return None


def _why_stock(
    model: Any, labels: Any, logits_to_keep: Any, vocab_size: _VocabSize, kwargs: dict[str, Any]
) -> str | None:
    """Why this call must run stock from the start, or None."""
    if torch.compiler.is_compiling():
        return guards.blocked(model, None)
    head = model.lm_head
    weight = head.weight if type(head) is nn.Linear else _NO_WEIGHT
    # guards knows activations: a parameter is the tensor it holds.
    reason = guards.blocked(model, weight.data if type(weight) is nn.Parameter else weight)
    if reason is not None:
        return reason
    if labels is None:
        return "no labels"
    if not model.training or not torch.is_grad_enabled():
        return "evaluation"
    if getattr(model, "_is_replica", False):
        return "DataParallel"
    reason = _head_reason(head) or _loss_reason(model, labels, logits_to_keep, vocab_size, kwargs)
    if reason is not None:
        return reason
    if reads_logits(model):
        return "script reads logits"
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return "CUDA graph capture"
    return None


def _why_stock_head(hidden: torch.Tensor, weight: torch.Tensor, n_labels: int) -> str | None:
    """Why the base model's output must take the stock head, which for some of these raises its own error, or None."""
    if type(hidden) is not torch.Tensor or hidden.dim() != 3:
        return "hidden states"
    if compute_dtype(hidden) is not compute_dtype(weight):
        return "dtype mismatch"
    if hidden.device != weight.device:
        return "device mismatch"
    if hidden.shape[0] * hidden.shape[1] != n_labels:
        return "number of labels"
    return None


def causal_lm_forward(stock: Callable, tally: Tally) -> Callable:
    """Build the forward that stands for ``LlamaForCausalLM.forward`` or a like family's.

    Args:
        stock: the saved forward, with its decorators.
        tally: counters of the patch.
    Returns:
        A function of the same parameters. In training with labels it returns the loss of `linear_cross_entropy` and
        logits that are computed on access, with ``return_dict=False`` as a tuple; in all other cases it returns what
        ``stock`` returns.
    """
    cache_argument = guards.cache_argument(stock)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        by_old_name = kwargs.pop("past_key_values", None)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            cache_argument: by_old_name if cache is None else cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        reason = _why_stock(self, labels, logits_to_keep, _CONFIGURED, kwargs)
        if reason is not None:
            tally.fall_back(reason)
            return stock(self, **given, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        return_dict = _return_dict(self, kwargs)
        outputs, loss, logits = _loss_and_logits(self, given, labels, _CONFIGURED, kwargs, tally)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{cache_argument: getattr(outputs, cache_argument)},
        )
        return output if return_dict else output.to_tuple()

    return forward


def moe_causal_lm_forward(stock: Callable, tally: Tally) -> Callable:
    """Build the forward that stands for ``MixtralForCausalLM.forward``.

    As `causal_lm_forward`; where router logits are asked for, by argument or configuration, the loss that balances the
    experts is computed from them and added as stock does it.
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
        labels=None,
        use_cache=None,
        output_router_logits=None,
        logits_to_keep=0,
        **kwargs,
    ):
        by_old_name = kwargs.pop("past_key_values", None)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            cache_argument: by_old_name if cache is None else cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "output_router_logits": output_router_logits,
        }
        reason = _why_stock(self, labels, logits_to_keep, _OWN, kwargs)
        if reason is not None:
            tally.fall_back(reason)
            return stock(self, **given, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        return_dict = _return_dict(self, kwargs)
        if output_router_logits is None:
            given["output_router_logits"] = output_router_logits = self.config.output_router_logits
        outputs, loss, logits = _loss_and_logits(self, given, labels, _OWN, kwargs, tally)
        aux_loss = None
        if output_router_logits:
            # Looked up at each call, as the stock forward does: scripts put their own in its place.
            aux_loss = modeling.load_balancing_loss_func(
                outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask
            )
            # In place, so that its dtype and shape stay.
            loss += self.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{cache_argument: getattr(outputs, cache_argument)},
        )
        return output if return_dict else output.to_tuple()

    return forward


def _return_dict(model: Any, kwargs: dict[str, Any]) -> bool:
    """As stock's decorator `can_return_tuple`: an argument outranks the configuration, and the layers never see it."""
    return_dict = kwargs.pop("return_dict", None)
    return model.config.return_dict if return_dict is None else return_dict


def _loss_and_logits(
    model: Any,
    given: dict[str, Any],
    labels: torch.Tensor,
    vocab_size: _VocabSize,
    kwargs: dict[str, Any],
    tally: Tally,
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Run the base model, and the head and the loss after it.

    Args:
        model: the ``*ForCausalLM``; `_why_stock` has found nothing.
        given: inputs of the base model.
        labels, kwargs: what the loss is given; ``kwargs`` go to the base model too.
        vocab_size: where stock finds what it tells the loss.
        tally: counters of the patch.
    Returns:
        The base model's output, the loss, the logits.
    """
    head = model.lm_head
    ignore_index, shift_labels = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
    # Before the layers: see `Kept.count`.
    kept = prepare_labels(
        labels, shift_labels, vocab_size=head.weight.shape[0], ignore_index=ignore_index, device=head.weight.device
    )
    padding = padding_of(model.model, given["attention_mask"], labels, shift_labels, ignore_index)
    with loss_follows(model.model, head.weight) as last:
        outputs = model.model(**given, **kwargs, **({} if padding is None else {PADDING: padding}))
    hidden = outputs.last_hidden_state
    reason = _why_stock_head(hidden, head.weight, kept.total)
    if reason is not None:
        tally.fall_back(reason)
        logits = head(hidden)
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocab_size(model), **kwargs)
        return outputs, loss, logits
    tally.hit()
    items = kwargs.get("num_items_in_batch")
    loss = linear_cross_entropy(
        hidden.flatten(0, 1), head.weight, None, num_items=items, kept=kept, lean=last.kept, tally=tally
    )
    return outputs, loss, lazy_logits(model, hidden, head.weight, compute_dtype(hidden))

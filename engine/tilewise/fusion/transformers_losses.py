"""Fused losses of Hugging Face's language models.

Some models call a loss_function, which is set on the instance. The others have their loss written
out inside forward: those run without labels, which leaves the loss to us. Logits are returned
either way, so they are made whole.

Shapes: logits [B, S, V]; labels [B, S], -100 where there is no loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise_kernels import cross_entropy
from tilewise_kernels.op import autocast_dtype

from .report import FusionReport, Replaced, Skipped
from .swapping import Fused, own_class, transformers_name

# -- a loss_function -----------------------------------------------------------------------------

# Models that call their loss_function; that of the others is written out inside their forward.
_CAUSAL = {
    "bert.modeling_bert.BertLMHeadModel",
    "roberta.modeling_roberta.RobertaForCausalLM",
    "gpt2.modeling_gpt2.GPT2LMHeadModel",
    "llama.modeling_llama.LlamaForCausalLM",
    "gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM",
}


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of each position's logits [B, S, V] with the label [B, S] after it: the mean
    over those not ignored, or the sum over num_items_in_batch. transformers makes a float32 copy
    of the logits for it."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits, target = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return cross_entropy(logits, target, ignore_index=ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    total = cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / num_items_in_batch


def replace_losses(model: nn.Module, report: FusionReport) -> None:
    """Set the loss_function of the known language models inside `model` that call it."""
    for path, module in model.named_modules():
        kind = own_class(module)
        if transformers_name(module) not in _CAUSAL:
            continue
        own = module.__dict__.get("_loss_function")
        if own is not None:
            fused = own is causal_lm_loss
            reason = "it is fused already" if fused else "it has a loss_function of its own"
            report.skipped.append(Skipped(path, kind.__name__, reason))
            continue
        new = f"{kind.__name__} with fused cross-entropy"
        report.replaced.append(Replaced(path, kind.__name__, new))
        report.undo.append(partial(_restore_loss, module))
        module.__dict__["_loss_function"] = causal_lm_loss


def _restore_loss(module: nn.Module) -> None:
    if module.__dict__.get("_loss_function") is causal_lm_loss:  # else the user has set another
        del module.__dict__["_loss_function"]


# -- a loss inside forward -----------------------------------------------------------------------


class LossInside(Fused):
    """The class keeps its name, which transformers writes into a config that it saves."""

    gains = " with fused cross-entropy"


def _is_served(labels: Any) -> TypeGuard[Tensor]:
    return isinstance(labels, Tensor) and labels.dtype == torch.int64


def _with_loss(model: Any, output: Any, labels: Tensor, return_dict: bool | None) -> Any:
    """The output with the mean cross-entropy that the model would have put there."""
    logits = output.logits
    loss = cross_entropy(logits.flatten(0, -2), labels.reshape(-1).to(logits.device))
    if autocast_dtype(logits.device) is None:  # under it torch computes the loss in float32
        loss = loss.to(logits.dtype)
    output = type(output)(loss=loss, **output)
    return_dict = model.config.return_dict if return_dict is None else return_dict
    return output if return_dict else output.to_tuple()


class MaskedLM(LossInside):
    """In front of BERT and RoBERTa that guess masked tokens."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = (
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
        )
        if not _is_served(labels):
            return super().forward(*given, labels, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        output = super().forward(*given, return_dict=True, **kwargs)
        return _with_loss(self, output, labels, return_dict)


class Seq2SeqLM(LossInside):
    """In front of T5. labels shifted to the right are the decoder's input where it has no other."""

    caches_with_labels: ClassVar[bool] = True

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        source = (input_ids, attention_mask)
        rest = (
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
        )
        if not _is_served(labels) or (use_cache and not self.caches_with_labels):
            return super().forward(*source, decoder_input_ids, *rest, labels, use_cache, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if not self.caches_with_labels:
            use_cache = False
        output = super().forward(
            *source, decoder_input_ids, *rest, use_cache=use_cache, return_dict=True, **kwargs
        )
        return _with_loss(self, output, labels, return_dict)


class Seq2SeqLMWithoutCache(Seq2SeqLM):
    """In front of BART, which makes no cache when it has labels, and warns who asks for one."""

    caches_with_labels = False

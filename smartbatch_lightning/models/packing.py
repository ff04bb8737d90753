"""Packed batches for unchanged `transformers` classifiers.

`transformers` lets attention be supplied by name (`AttentionInterface`) and hands on to it what a model is called with.
Three things more make a classifier take the flat row of tokens that `PackCollator` makes: no mask; position ids from
the model's own first position on; and the first token of each sample where the heads, which classify by token 0, look
for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartbatch_lightning.contract import TAKES_PACKED_BATCHES
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models.attention import ATTENTION, attention_forward
from smartbatch_lightning.models.pooling import POOLINGS, first_token

# Families by `model_type`, and the part of the base model whose output the head, or a pooler before it, reads.
_ENCODERS = {
    "albert": "encoder",
    "bert": "encoder",
    "camembert": "encoder",
    "distilbert": "transformer",
    "electra": "encoder",
    "modernbert": "",
    "roberta": "encoder",
    "xlm-roberta": "encoder",
}


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model is of a family whose batches can be packed."""
    return model.config.model_type in _ENCODERS


def check_packing(model: PreTrainedModel) -> None:
    """Refuses a model of a family whose batches cannot be packed.

    Raises:
        ValueError: It is of another family.
    """
    if not can_pack(model):
        family = model.config.model_type
        raise UsageError(
            f"batches of {family} models cannot be packed; those of {', '.join(_ENCODERS)} models can. Set "
            "--data.padding=longest."
        )


def enable_packing(model: PreTrainedModel) -> None:
    """Lets a model for sequence classification take the batches of `PackCollator`; padded ones it takes as before.

    Attention is `torch.nn.attention.varlen` on a GPU in half precision, which knows no dropout of attention weights;
    elsewhere it is `scaled_dot_product_attention`, sample by sample, with dropout as the model's configuration says.
    Doing it twice does no harm.

    Args:
        model: Of the ALBERT, BERT, CamemBERT, DistilBERT, ELECTRA, ModernBERT, RoBERTa or XLM-RoBERTa family.

    Raises:
        ValueError: It is of another family.
    """
    check_packing(model)
    if TAKES_PACKED_BATCHES in model.__dict__:
        return
    model.__dict__[TAKES_PACKED_BATCHES] = True
    model.set_attn_implementation(ATTENTION)
    model.register_forward_pre_hook(_shift_positions, with_kwargs=True)
    encoder = model.base_model.get_submodule(_ENCODERS[model.config.model_type])
    pooling = POOLINGS[getattr(model.config, "classifier_pooling", "cls")]  # ModernBERT's choice
    layer = first_token_layer(model)
    if layer is not None:
        layer.attention.forward = partial(_attention_of_first_tokens, layer.attention.forward)
        pooling = _as_it_is
    encoder.register_forward_hook(partial(_pool, pooling), with_kwargs=True)


def first_token_layer(model: PreTrainedModel) -> Any | None:
    """The last layer where it is BERT's, and everything after its attention is read at the first tokens alone."""
    if not can_pack(model):
        return None
    layers: Any = getattr(model.base_model.get_submodule(_ENCODERS[model.config.model_type]), "layer", None)
    attention = None if layers is None else getattr(layers[-1], "attention", None)
    return layers[-1] if hasattr(attention, "self") and hasattr(attention, "output") else None


def _attention_of_first_tokens(
    forward: Callable[..., Any], hidden: Tensor, *args: Any, cu_seq_lens_q: Tensor | None = None, **options: Any
) -> Any:
    """BERT's attention block in the last layer, where the head reads one token of each sample.

    Keys and values are those of all tokens; queries, and with them everything that follows, only of the first ones:
    7 % fewer operations for BERT-base at 254 tokens. As in MLPerf's BERT, *Boosting distributed training performance
    of the unpadded BERT model* (Zeng et al., 2022).

    Args:
        forward: What padded batches go through.
        hidden: (1, tokens, hidden).
        args: What else `forward` takes.
        cu_seq_lens_q: Where each sample starts, and the end. Shape (batch + 1,), int32.
        options: What else attention takes.

    Returns:
        (1, batch, hidden), and no attention weights.
    """
    if cu_seq_lens_q is None:
        return forward(hidden, *args, **options)
    block = forward.__self__  # type: ignore[attr-defined]
    first = first_token(hidden[0], cu_seq_lens_q)[None]
    heads = (block.self.num_attention_heads, block.self.attention_head_size)
    query, key, value = (
        project(of).unflatten(-1, heads).transpose(1, 2)
        for project, of in ((block.self.query, first), (block.self.key, hidden), (block.self.value, hidden))
    )
    one_each = torch.arange(len(cu_seq_lens_q), dtype=torch.int32, device=hidden.device)
    attended, _ = attention_forward(
        block.self,
        query,
        key,
        value,
        None,
        dropout=block.self.dropout.p if block.training else 0.0,
        scaling=block.self.scaling,
        **{**options, "cu_seq_lens_q": one_each, "max_length_q": 1},
    )
    return block.output(attended.flatten(-2), first), None


def _as_it_is(hidden: Tensor, cu_seq_lens: Tensor) -> Tensor:
    return hidden


def avoid_mask_sync(model: PreTrainedModel) -> None:
    """Spares padded batches a wait for the GPU in every forward, where attention is transformers' default, SDPA."""
    if can_pack(model) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


def attention_dropout(model: PreTrainedModel) -> float:
    """Dropout of attention weights in training that a model's configuration asks for."""
    config = model.config.to_dict()
    names = ("attention_probs_dropout_prob", "attention_dropout")
    return float(next((config[name] for name in names if name in config), 0.0))


def _shift_positions(model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """RoBERTa and models like it count positions from the padding index on."""
    padding_idx = None
    if "cu_seq_lens_q" in inputs:
        embeddings = dict(model.base_model.embeddings.named_modules())
        table = embeddings.get("position_embeddings")
        padding_idx = None if table is None else table.padding_idx
    if padding_idx is not None:
        inputs = {**inputs, "position_ids": inputs["position_ids"] + padding_idx + 1}
    return args, inputs


def _pool(
    pooling: Callable[[Tensor, Tensor], Tensor], encoder: Any, args: Any, inputs: dict[str, Any], output: Any
) -> Any:
    """Turns hidden states of a packed batch, (1, tokens, hidden), into what the heads read, (batch, 1, hidden)."""
    cu_seq_lens = inputs.get("cu_seq_lens_q")
    if cu_seq_lens is not None:
        output.last_hidden_state = pooling(output.last_hidden_state[0], cu_seq_lens)[:, None]
    return output

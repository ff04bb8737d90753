"""Packed batches, and a last layer computed only for the tokens that are read, for unmodified `transformers` models.

`transformers` lets attention be supplied by name (`AttentionInterface`) and passes it the arguments of a model's call.
So a classifier can process the row of tokens that `PackCollator` makes if it takes attention from this interface and
positions from `position_ids`; this is tested on two samples. To the head, each sample then looks like a text of a
single token, the one that the head reads.
"""

import inspect
import sys
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from smartbatch_lightning.contract import TAKES_PACKED_BATCHES
from smartbatch_lightning.errors import UsageError, root_cause_message
from smartbatch_lightning.families import pad_token_of
from smartbatch_lightning.models.attention import ATTENTION, FLASH_CAPABILITY
from smartbatch_lightning.models.deberta import hook_deberta, is_deberta
from smartbatch_lightning.models.esm import drops_masked_tokens, embed
from smartbatch_lightning.models.last_layer import read_one_token
from smartbatch_lightning.models.layers import find_layers
from smartbatch_lightning.models.pooling import head_pooling, mean, pad, padding_mask, pick, tokens_read

_HOOKS = "smartbatch_hooks"  # attribute of a model with our hooks
_READS_ONE_TOKEN = "reads_one_token"  # attribute of a model whose last layer computes only the tokens that are read
_LENGTHS = (5, 9)  # of the samples on which a model is tested
BUILTIN_ATTENTION = ("eager", "sdpa", "flex_attention")  # do not support packed batches


def check_packing(model: PreTrainedModel) -> None:
    """Rejects a model whose batches cannot be packed.

    Raises:
        ValueError: Its attention cannot be replaced, and it is not a DeBERTa.
    """
    if not (is_deberta(model) or takes_attention(model)):
        raise _packing_error(model, "have no single stack of layers whose attention can be supplied")


def enable_packing(model: PreTrainedModel) -> None:
    """Makes a sequence classification model accept `PackCollator` batches, in addition to padded ones.

    Batches have the keys of transformers' `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`. If the model was
    loaded with an attention implementation that supports these, such as `flash_attention_2` or a Hub kernel, it is
    kept. Otherwise attention is `torch.nn.attention.varlen` on a GPU in half precision, which has no attention dropout,
    and `scaled_dot_product_attention`, sample by sample, with the configured dropout, elsewhere. Calling this twice is
    harmless.

    Args:
        model: A model that uses transformers' `AttentionInterface`, or DeBERTa. It is tested on two short samples,
            unless its weights are not loaded yet or sharded, or its attention needs a GPU.

    Raises:
        ValueError: The model is not supported, or gives different results for packed and separate samples.
    """
    if TAKES_PACKED_BATCHES in model.__dict__:
        return
    check_packing(model)
    if not can_be_tested(model):
        supply_attention(model, one_token=False)
    else:
        expected = torch.cat([logits_of(model, _padded([sample], 0)) for sample in _samples(model)])
        for one_token in (True, False):
            supply_attention(model, one_token=one_token)
            if not (problem := _difference(model, _packed(_samples(model)), expected)):
                break
        if problem:
            _remove(model)
            raise _packing_error(model, problem)
    model.__dict__[TAKES_PACKED_BATCHES] = True


def skip_unread_tokens(model: PreTrainedModel) -> None:
    """Makes the last layer compute only the tokens that the head reads, also avoiding a wait for the GPU.

    All tokens are computed if hidden states or attention weights are requested. Only models with transformers' default
    attention, SDPA, are changed, and only if they give the same results for two short samples.
    """
    if not takes_attention(model) or model.config._attn_implementation != "sdpa" or not can_be_tested(model):
        return
    with suppress(Exception):  # there are many kinds of models
        batch = _padded(_samples(model), pad_token_of(model.config) or 0)
        expected = logits_of(model, batch)
        supply_attention(model, one_token=True)
        if not _difference(model, batch, expected):
            return
    _remove(model)
    model.set_attn_implementation("sdpa")


def reads_one_token(model: nn.Module) -> bool:
    """Whether the last layer of a model, or of a wrapped one, computes only the tokens that the head reads."""
    return any(_READS_ONE_TOKEN in vars(part) for part in model.modules())


def takes_attention(model: PreTrainedModel) -> bool:
    """Whether a model takes its attention from transformers' `AttentionInterface`."""
    layers = find_layers(model)
    modules = [] if not layers else [sys.modules[type(module).__module__] for module in layers[-1].modules()]
    return any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules)


def supply_attention(model: PreTrainedModel, *, one_token: bool) -> None:
    """Makes a model accept packed batches, without a test, and optionally its last layer compute one token per sample.

    Args:
        model: A model accepted by `check_packing`. An attention implementation chosen for it is kept.
        one_token: Let the last layer compute only the token that the head reads, if it reads one, whenever hidden
            states or attention weights are not requested.
    """
    _remove(model)
    if is_deberta(model):
        model.__dict__[_HOOKS] = hook_deberta(model)
        return
    if _has_other_attention(model):
        one_token = False
    else:
        model.set_attn_implementation(ATTENTION)
    layers, pooling = find_layers(model), head_pooling(model)
    layer = _one_token_layer(model) if one_token else None
    parents = [module for module in model.base_model.modules() if any(child is layers for child in module.children())]
    before_model = partial(_before_model, _names(model), pooling, _padding_idx(model), layer is not None)
    model.__dict__[_HOOKS] = [
        model.register_forward_pre_hook(before_model, with_kwargs=True),
        model.base_model.register_forward_pre_hook(
            partial(_before_base_model, _names(model.base_model)), with_kwargs=True
        ),
        parents[0].register_forward_hook(partial(_after_layers, pooling), with_kwargs=True),
    ]
    if layer is not None:
        model.__dict__[_HOOKS].append(read_one_token(layer))
        model.__dict__[_READS_ONE_TOKEN] = True


def attention_dropout(model: PreTrainedModel) -> float:
    """Dropout of attention weights in a model's configuration."""
    config = model.config.to_dict()
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    return float(next((config[name] for name in names if name in config), 0.0))


def packed_attention(model: PreTrainedModel, capability: tuple[int, int], precision: str) -> str:
    """A message about which attention packed batches use on a GPU, and why.

    Args:
        model: A model whose batches can be packed.
        capability: CUDA capability of the GPU.
        precision: One of Lightning's precisions.
    """
    reason = ""
    if capability < FLASH_CAPABILITY:
        reason = "the GPU does not support FlashAttention. Padded batches, --data.padding=longest, may be faster."
    elif "16" not in precision:
        reason = f"FlashAttention does not support {precision}. Set --trainer.precision=bf16-mixed to use it."
    if reason:
        return f"Packed batches compute attention sample by sample: {reason}"
    dropout = attention_dropout(model)
    without = f", without the model's attention dropout of {dropout:g}; other dropout stays on" if dropout else ""
    return f"Packed batches use FlashAttention{without}."


# --- changing a model ---


def _has_other_attention(model: PreTrainedModel) -> bool:
    """Whether an attention kernel was chosen that supports packed batches itself, such as FlashAttention's."""
    return model.config._attn_implementation not in (*BUILTIN_ATTENTION, ATTENTION)


def _one_token_layer(model: PreTrainedModel) -> nn.Module | None:
    """The last layer, if it is called once per forward pass and the head reads one token; not ALBERT's shared layer."""
    layers = find_layers(model)
    if layers is None or len(layers) != getattr(model.config.get_text_config(), "num_hidden_layers", None):
        return None
    return layers[-1] if head_pooling(model) in ("first", "last") else None


def _padding_idx(model: PreTrainedModel) -> int | None:
    """The position of padding in RoBERTa and models like it, which is the padding token's id; None in others."""
    embeddings = dict(model.base_model.named_modules()).get("embeddings.position_embeddings")
    padding_idx: int | None = getattr(embeddings, "padding_idx", None)
    return padding_idx


def _positions(input_ids: Tensor, position_ids: Tensor, padding_idx: int | None) -> Tensor:
    """Positions in a packed row as RoBERTa counts them: from the position after that of padding, skipping padding.

    Args:
        input_ids: (1, tokens).
        position_ids: Positions that restart at 0 in each sample, (1, tokens).
        padding_idx: The padding token's id, and its position; None for models that count all tokens from 0.
    """
    if padding_idx is None:
        return position_ids
    counted = (input_ids != padding_idx).long()
    count = counted.cumsum(1)
    starts = torch.arange(count.shape[1], device=count.device) - position_ids
    return (count - (count - counted).gather(1, starts)) * counted + padding_idx


def _names(model: nn.Module) -> list[str]:
    """Names of the arguments that a model takes, in order."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _remove(model: PreTrainedModel) -> None:
    model.__dict__.pop(_READS_ONE_TOKEN, None)
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()


def _before_model(
    names: list[str],
    pooling: str,
    padding_idx: int | None,
    one_token: bool,
    model: Any,
    args: Any,
    inputs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Tells the layers which tokens are read, and gives a head that looks for the last token only that one."""
    inputs = {**dict(zip(names, args, strict=False)), **inputs}
    cu_seq_lens, input_ids = inputs.get("cu_seq_lens_q"), inputs.get("input_ids")
    wanted = ("output_hidden_states", "output_attentions")
    one_token &= not any(inputs.get(name, getattr(model.config, name, False)) for name in wanted)
    one_token &= not torch.compiler.is_exporting()  # which cannot trace a layer that is called within its own hook
    if cu_seq_lens is None:
        mask = inputs.get("attention_mask")
        one_token &= input_ids is not None and not inputs.get("use_cache") and (mask is None or mask.ndim == 2)
        if not one_token:
            return (), inputs
    else:
        assert input_ids is not None, "packed batches hold input_ids"
        inputs["position_ids"] = _positions(input_ids, inputs["position_ids"], padding_idx)
    if pooling in ("first", "last"):
        assert input_ids is not None
        tokens = tokens_read(pooling, input_ids, pad_token_of(model.config), cu_seq_lens)
        inputs["tokens_read" if one_token else "tokens_pooled"] = tokens
        if pooling == "last":
            inputs = {**inputs, "input_ids": pick(input_ids, tokens), "all_input_ids": input_ids, "use_cache": False}
    elif pooling == "all":
        inputs["attention_mask"] = padding_mask(inputs["cu_seq_lens_q"], inputs["max_length_q"])
    return (), inputs


def _before_base_model(names: list[str], base_model: Any, args: Any, inputs: dict[str, Any]) -> Any:
    """Passes the tokens of all samples to the layers again."""
    inputs = {**dict(zip(names, args, strict=False)), **inputs}
    if "all_input_ids" in inputs:
        inputs["input_ids"] = inputs.pop("all_input_ids")
    if "cu_seq_lens_q" in inputs:
        inputs["attention_mask"] = None
        if drops_masked_tokens(base_model.config):
            of_tokens = inputs.pop("input_ids"), inputs["position_ids"], inputs["cu_seq_lens_q"]
            inputs["inputs_embeds"] = embed(base_model.embeddings, *of_tokens)
    return (), inputs


def _after_layers(pooling: str, stack: Any, args: Any, inputs: dict[str, Any], output: Any) -> Any:
    """Reduces hidden states of a packed batch, (1, tokens, hidden), to what the head reads, (batch, 1, hidden)."""
    cu_seq_lens, read = inputs.get("cu_seq_lens_q"), inputs.get("tokens_read")
    if read is not None and output.last_hidden_state.shape[1] > 1:  # LayerDrop has left the last layer out
        output.last_hidden_state = pick(output.last_hidden_state, read)
    if cu_seq_lens is None or read is not None:
        return output
    hidden = output.last_hidden_state
    if pooling == "mean":
        hidden = mean(hidden[0], cu_seq_lens)[:, None]
    elif pooling == "all":
        hidden = pad(hidden[0], cu_seq_lens, inputs["max_length_q"])
    else:
        hidden = pick(hidden, inputs["tokens_pooled"])
    output.last_hidden_state = hidden
    return output


# --- testing a model ---


def _packing_error(model: PreTrainedModel, reason: str) -> UsageError:
    return UsageError(
        f"batches of {model.config.model_type} models cannot be packed: they {reason.rstrip('.')}. Set "
        "--data.padding=longest."
    )


def can_be_tested(model: PreTrainedModel) -> bool:
    """Whether a model can be called: its weights are loaded and not sharded, and its attention needs no GPU."""
    if _has_other_attention(model) and model.device.type == "cpu":
        return False
    return not any(weight.is_meta or isinstance(weight, DTensor) for weight in model.parameters())


def _samples(model: PreTrainedModel) -> list[Tensor]:
    """Short samples of random tokens other than padding."""
    embeddings: Any = model.get_input_embeddings()
    size, unused = len(embeddings.weight), pad_token_of(model.config)
    drawn = torch.randint(size - 1, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0), device="cpu")
    drawn = drawn if unused is None else drawn + (drawn >= unused)
    return list(torch.split(drawn.to(model.device), list(_LENGTHS)))


def _padded(samples: list[Tensor], pad_token_id: int) -> dict[str, Any]:
    mask = [torch.ones_like(sample) for sample in samples]
    return {
        "input_ids": pad_sequence(samples, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(mask, batch_first=True),
    }


def _packed(samples: list[Tensor]) -> dict[str, Any]:
    device = samples[0].device
    cu_seq_lens = torch.tensor([0, *_LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(length, device=device) for length in _LENGTHS])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max(_LENGTHS),
        "max_length_k": max(_LENGTHS),
    }


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits in evaluation mode, uncompiled; the modules' modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    compiled = any(module._compiled_call_impl is not None for module, _ in modes)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            model.train(False)
            logits: Tensor = model(**inputs).logits
    finally:
        for module, training in modes:
            module.training = training
    return logits.float()


def _difference(model: PreTrainedModel, batch: dict[str, Any], expected: Tensor) -> str:
    """How a model's logits for a batch differ from the expected ones, beyond its precision; empty if they do not."""
    try:
        given = logits_of(model, batch)
    except Exception as error:
        return f"fail on them: {root_cause_message(error)}"
    half = model.dtype in (torch.float16, torch.bfloat16)
    tolerance = 0.1 if half else 1e-4 if model.device.type == "cpu" else 1e-2  # a GPU may round float32 to 10 bits
    if given.shape != expected.shape:
        return f"give {len(given)} rows of logits for {len(expected)} samples"
    off = float((given - expected).abs().max())
    within = off <= tolerance * max(1.0, float(expected.abs().max()))
    return "" if within else f"give logits that differ by {off:.2g} from those of single samples"

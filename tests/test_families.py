"""Every family of transformers' sequence classifiers, tiny: trained, predicted, exported, and fed one text at a time.

`pytest -m slow tests/test_families.py -n 0` tries them all; `python tests/test_families.py` writes docs/families.md.
"""

import copy
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from helpers import slow, trainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CanineTokenizer,
    MambaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from smartbatch_lightning import PackCollator, PadCollator, SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.export import export_model
from smartbatch_lightning.families import drop_caches, pad_token_of
from smartbatch_lightning.models.packing import enable_packing

QUICK = ("bert", "xlnet", "llama")

SENTENCES = [
    "The plot is thin, but the actors carry it.",
    "I would not see this again for any money.",
    "A warm and funny film about three brothers and their boat.",
    "Nothing happens for two hours, and then it ends.",
    "Go!",
    "The best thing about it was the music, which I have heard every day since.",
    "Whoever wrote this has never met a child, a dog or a policeman.",
    "It is what it is",
]
TEXTS = [*SENTENCES, "", " ".join(SENTENCES * 2), "Fine. <|endoftext|>", "boat boat boat boat boat boat boat", "x"]
PAIRS = [*zip(TEXTS, [*TEXTS[3:], *TEXTS[:3]], strict=True)]
MAX_LENGTH = 40

# Sizes by every name under which configurations have them; a family takes those that it knows.
SIZES = {
    name: size
    for size, names in {
        32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim d_embed",
        2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_key_value_heads num_experts_per_tok",
        4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_experts num_local_experts n_routed_experts qk_rope_head_dim qk_nope_head_dim",
        8: "head_dim d_kv d_head v_head_dim kv_lora_rank q_lora_rank",
        64: "intermediate_size d_ff dff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner d_inner "
        "max_position_embeddings n_positions n_ctx",
        16: "moe_intermediate_size shared_expert_intermediate_size",
        0.2: "initializer_range init_std",  # so that texts make a difference
    }.items()
    for name in names.split()
}

TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# What a family needs besides, by the size of its parts.
BESIDES: dict[str, dict[str, Any]] = {
    **{family: {"decoder_start_token_id": 0} for family in ("t5", "mt5", "umt5")},
    **{
        family: {"num_key_value_heads": 4, "head_dim": 4}
        for family in ("deepseek_v2", "deepseek_v3", "minicpm3", "mistral4", "axk2")
    },
    "esmc": {"num_key_value_heads": 4},
    "gemma3": {"vision_config": TINY_VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "perceiver": {
        "num_labels": 3,
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen3_5": {
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
        "feed_forward_size": 64,
    },
    "mobilebert": {"classifier_activation": False, "normalization_type": "layer_norm"},  # else its logits are thousands
    "ultravbert": {"vision_config": TINY_VISION},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "modernbert-decoder": {f"{role}_token_id": 0 for role in ("pad", "bos", "eos", "cls", "sep")},
    "axk1": {"num_key_value_heads": 4, "head_dim": 4, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "modernvbert": {"vision_config": TINY_VISION},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
}

# They read the last end token, and want as many in all samples.
EOS_HEADS = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")

# What they compute depends on the width, which is therefore held the same; or they train at one width alone.
FIXED_WIDTH = (
    "canine", "convbert", "fnet", "funnel", "nystromformer", "reformer", "t5gemma", "t5gemma2", "yoso"
)  # fmt: skip

# Their batches cannot be packed: attention of their own, layers that do not hand on what tells samples apart, attention
# with sinks or a cap, or something else that goes over neighbouring tokens.
NOT_PACKED = (
    *EOS_HEADS, *(family for family in FIXED_WIDTH if family != "modernbert"),
    "axk2", "big_bird", "biogpt", "bloom", "doge", "falcon", "flaubert", "gemma2", "gpt_neo", "gpt_oss", "ibert", "jamba",
    "layoutlm", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "megatron-bert", "minimax", "mobilebert", "mpnet",
    "mpt", "nemotron", "openai-gpt", "perceiver", "qwen3_5", "qwen3_5_text", "qwen3_next", "rembert", "roformer",
    "squeezebert", "stablelm", "xlm", "xlnet", "zamba", "zamba2",
)  # fmt: skip

# What cannot be made of sizes alone, and why.
LEFT_OUT: dict[str, str] = {
    "mra": "without its CUDA kernel transformers gives zeros for attention",
    "layoutlmv2": "its image backbone needs detectron2",
    "tapas": "reads tables, whose tokens have seven types",
}

FAMILIES = [
    family for family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if family not in LEFT_OUT
]  # fmt: skip

pytestmark = [pytest.mark.usefixtures("in_a_folder_of_its_own"), pytest.mark.filterwarnings("default")]


REMOTE_CODE = """
from transformers import BertConfig, BertForSequenceClassification

class Config(BertConfig):
    model_type = "mine"

class Model(BertForSequenceClassification):
    config_class = Config
"""

# Logits that no model of transformers' own gives.
DOUBLED = """
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
"""


def special(kind: str) -> list[str]:
    return {
        "cls": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "s": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "end": ["<pad>", "</s>", "<unk>"],
        "none": ["<|endoftext|>"],
        "xlnet": ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"],
    }[kind]


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Trained on the sentences: WordPiece for BERT's kind, else a byte-level BPE; CANINE's own, which is slow."""
    if kind == "canine":
        return CanineTokenizer(model_max_length=MAX_LENGTH)
    tokens = special(kind)
    named = {token: number for number, token in enumerate(tokens)}
    if kind == "cls":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer_ = trainers.WordPieceTrainer(vocab_size=300, special_tokens=tokens, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer_ = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator(SENTENCES, trainer_)
    templates = {
        "cls": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "s": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "end": ("$A </s>", "$A </s> $B </s>"),
        "xlnet": ("$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2"),
    }
    if kind in templates:
        single, pair = templates[kind]
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=list(named.items())
        )
    roles = {
        "cls": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "s": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
        "end": {"pad_token": "<pad>", "eos_token": "</s>"},
        "none": {"eos_token": "<|endoftext|>", "padding_side": "left"},
        "xlnet": {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "padding_side": "left"},
    }[kind]
    with_types = kind in ("cls", "xlnet")
    names = ["input_ids", *(["token_type_ids"] if with_types else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=MAX_LENGTH, model_input_names=names, **roles
    )


def kind_of(config: PretrainedConfig) -> str:
    """The tokenizer that a family's default for padding goes with."""
    family = config.model_type
    if family in ("xlnet", "canine"):
        return family
    if family in ("t5", "mt5", "umt5"):
        return "end"
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if family in EOS_HEADS or pad == 1:
        return "s"
    return "cls" if pad == 0 and not family.startswith("gemma") else "none"


def tiny_config(family: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    kind = kind_of(default)
    tokenizer = make_tokenizer(kind)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": next(
            (role for role in (tokenizer.bos_token_id, tokenizer.eos_token_id) if role is not None),
            tokenizer.cls_token_id,
        ),
        "eos_token_id": tokenizer.eos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "forced_eos_token_id": None,
    }
    wanted = {**SIZES, **ids, "vocab_size": len(tokenizer) + 3, **BESIDES.get(family, {})}
    for limit in ("max_position_embeddings", "n_positions"):
        wanted[limit] = wanted[limit] + 2 if kind == "s" else wanted[limit]

    def known(of: PretrainedConfig) -> dict[str, Any]:
        names = {name for name in wanted if name in of.to_dict() and name not in of.attribute_map}
        parts = {name: known(part) for name, part in vars(of).items() if isinstance(part, PretrainedConfig)}
        return {**parts, **{name: wanted[name] for name in names}}

    return config_class(**{**known(default), **BESIDES.get(family, {})}), tokenizer


def make_tiny(family: str, folder: Path) -> None:
    """A base model and a tokenizer, as they are on the Hub."""
    torch.manual_seed(0)
    config, tokenizer = tiny_config(family)
    with torch.device("meta"):
        size = AutoModelForSequenceClassification.from_config(config).num_parameters()
    assert size < 2e7, f"{size:,} parameters are not tiny"
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class GivenTexts(SmartBatchDataModule):
    """Trains on texts, or pairs of them, and predicts them."""

    def __init__(self, texts: list[Any], **options: Any) -> None:
        self.given = texts
        columns = ["text", "other"] if isinstance(texts[0], tuple) else "text"
        super().__init__(text_columns=columns, validation_split=0, seed=1, **options)

    def load_dataset(self) -> DatasetDict:
        rows = [text if isinstance(text, tuple) else (text, "") for text in self.given]
        columns = {"text": [row[0] for row in rows], "other": [row[1] for row in rows]}
        labels = [number % 3 for number in range(len(rows))]
        return DatasetDict(
            train=Dataset.from_dict({**columns, "label": labels}), test=Dataset.from_dict({**columns, "label": labels})
        )


def probabilities(run: Any, model: SequenceClassifier, data: SmartBatchDataModule) -> torch.Tensor:
    """What `predict` says, in the order of the texts. Shape (texts, 3)."""
    batches = run.predict(model, data)
    index = torch.cat([batch["index"] for batch in batches])
    return torch.cat([batch["probabilities"] for batch in batches])[index.argsort()]


def one_at_a_time(folder: Path, texts: list[Any], **options: Any) -> torch.Tensor:
    """What the exported model says of each text by itself, unpadded unless options say otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    said = []
    for text in texts:
        columns = text if isinstance(text, tuple) else (text,)
        inputs = dict(tokenizer(*columns, truncation=True, **options))
        if not inputs["input_ids"]:
            inputs = {"input_ids": [tokenizer.pad_token_id], "attention_mask": [1]}
        with torch.no_grad():
            logits = model(**{name: torch.tensor([row]) for name, row in inputs.items()}).logits
        said.append(logits.softmax(-1))
    return torch.cat(said)


def by_pipeline(
    folder: Path, texts: list[Any], batch_size: int, *, adapter: bool = False, **options: Any
) -> torch.Tensor:
    model: Any = str(folder)
    if adapter:
        config = AutoConfig.from_pretrained(folder, subfolder="config")
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    options = {"tokenizer": str(folder), "truncation": True, "top_k": None, "device": "cpu", **options}
    classify = pipeline("text-classification", model, **options)
    inputs = [{"text": text[0], "text_pair": text[1]} if isinstance(text, tuple) else text for text in texts]
    answers = classify(inputs, batch_size=batch_size)
    scores = [{answer["label"]: answer["score"] for answer in row} for row in answers]
    return torch.tensor([[row[str(label)] for label in range(3)] for row in scores])


def differences(family: str, folder: Path, fixed: bool) -> dict[str, float]:
    """By what is compared with the texts one at a time, the largest difference of a probability.

    With `fixed` every batch is `max_length` wide, and so are the texts one at a time.
    """
    make_tiny(family, folder / "base")
    options = {
        "max_length": MAX_LENGTH,
        "batch_size": 4,
        "padding": "max_length" if fixed else "longest",
        "cache_dir": str(folder / "cache"),
    }
    pairs = [pair for pair in PAIRS if all(pair) or family not in EOS_HEADS]
    model = SequenceClassifier(str(folder / "base"), learning_rate=1e-3)
    run = trainer(folder, max_steps=3)
    run.fit(model, GivenTexts(TEXTS, **options))
    found = {}
    for name, given in (("texts", TEXTS), ("pairs", pairs)):
        data = GivenTexts(given, **options)
        predicted = probabilities(run, model, data)
        assert predicted.std(0).max() > 1e-3, "the model says the same of every text"
        export_model(model, data, folder / name)
        width = {"padding": "max_length"} if fixed else {}
        alone = one_at_a_time(folder / name, given, **width)
        found[f"predict, {name}"] = float((predicted - alone).abs().max())
        empty = AutoTokenizer.from_pretrained(folder / name)("")["input_ids"] == []
        kept = [row for row, text in enumerate(given) if text or not empty]  # without tokens transformers fails
        for size in (1, 8):
            said = by_pipeline(folder / name, [given[row] for row in kept], size, **width)
            found[f"pipeline of {size}, {name}"] = float((said - alone[kept]).abs().max())
    return found


@pytest.mark.parametrize(
    "family", [family if family in QUICK else slow(family) for family in FAMILIES if family not in FIXED_WIDTH]
)
def test_predict_the_exported_pipeline_and_one_text_at_a_time_agree(family: str, tmp_path: Path) -> None:
    found = differences(family, tmp_path, fixed=False)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("family", FIXED_WIDTH)
def test_families_that_read_padding_agree_where_all_batches_are_of_one_width(family: str, tmp_path: Path) -> None:
    found = differences(family, tmp_path, fixed=True)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    "family",
    ["fnet", *(slow(family) for family in FIXED_WIDTH if family not in ("fnet", "reformer", "canine", "funnel"))],
)
def test_a_family_that_reads_padding_is_named_with_the_remedy(family: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{family} models have .*--data.padding=max_length.*padding='max_length'"):
        found = differences(family, tmp_path, fixed=False)
    assert max(found.values()) > 1e-4  # else the warning would be a false one


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 1.0],
}


def test_rotary_frequencies_that_depend_on_the_longest_text_are_named_with_the_remedy(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "base")
    texts = [text for text in TEXTS if text]
    model_kwargs = {"rope_parameters": LONGROPE}
    run = trainer(tmp_path, max_steps=1)
    model = SequenceClassifier(str(tmp_path / "base"), model_kwargs=model_kwargs)
    with pytest.warns(UserWarning, match="a whole batch if one of its texts has more than 16 tokens.*=max_length"):
        run.fit(model, GivenTexts(texts, max_length=MAX_LENGTH, batch_size=4))
    data = GivenTexts(texts, max_length=MAX_LENGTH, padding="max_length", batch_size=4)
    predicted = probabilities(run, model, data)
    export_model(model, data, tmp_path / "wide")
    alone = one_at_a_time(tmp_path / "wide", texts, padding="max_length")
    torch.testing.assert_close(predicted, alone, atol=1e-5, rtol=0)
    said = by_pipeline(tmp_path / "wide", texts, 1)
    assert (said - alone).abs().max() > 1e-2  # else the warning would be a false one


# --- packed ---

Errors = tuple[float, float]  # of logits and of gradients, each over the largest


def packed_errors(family: str, dtype: torch.dtype) -> tuple[Errors, Errors]:
    """How far each sample by itself, and packed samples, are from each by itself in float32."""
    config, _ = tiny_config(family)
    drop_caches(config)
    for part in (config, config.get_text_config()):
        part.pad_token_id = pad_token_of(config) or 0
        for window in ("sliding_window", "local_attention"):
            if isinstance(getattr(part, window, None), int):
                setattr(part, window, 8)  # narrower than samples are
    torch.manual_seed(0)
    alone = AutoModelForSequenceClassification.from_config(config).eval()
    random = np.random.default_rng(0)
    highest = min(200, getattr(config.get_text_config(), "vocab_size", 200))
    rows = [{"input_ids": random.integers(5, highest, length)} for length in (3, 40, 17, 30, 16)]

    def measured(model: Any, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = torch.cat([model(**batch).logits for batch in batches]).float()
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        parameters = {name: value for name, value in model.named_parameters() if value.grad is not None}
        return logits.detach(), {name: value.grad.float() for name, value in parameters.items()}

    padding = PadCollator(alone.config.pad_token_id)
    each, packed = (copy.deepcopy(alone).to(dtype) for _ in range(2))
    enable_packing(packed)
    logits, gradients = measured(alone, [padding([row]) for row in rows])
    largest = max(gradient.norm() for gradient in gradients.values())
    errors = []
    for model, batches in ((each, [padding([row]) for row in rows]), (packed, [PackCollator()(rows)])):
        given, found = measured(model, batches)
        assert found.keys() == gradients.keys()
        off = max((found[name] - gradients[name]).norm() for name in gradients)
        errors.append((float((given - logits).abs().max() / logits.abs().max()), float(off / largest)))
    return errors[0], errors[1]


@pytest.mark.parametrize(
    "family",
    [family if family in ("llama", "deberta-v2") else slow(family) for family in FAMILIES if family not in NOT_PACKED],
)
def test_packed_samples_have_the_logits_and_gradients_of_each_by_itself(family: str) -> None:
    _, (logits, gradients) = packed_errors(family, torch.float32)
    assert logits < 1e-5
    assert gradients < 1e-4
    alone, packed = packed_errors(family, torch.bfloat16)
    assert all(mine < 1.5 * theirs + 0.05 for mine, theirs in zip(packed, alone, strict=True)), (packed, alone)


@pytest.mark.parametrize("family", ["roberta", slow("esm"), slow("xmod")])
def test_a_packed_text_that_spells_the_padding_token_has_the_positions_of_the_text_by_itself(family: str) -> None:
    config, _ = tiny_config(family)
    pad = config.pad_token_id = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [[5, 6, pad, 7, 8], [pad, 9, 10], [11, 12, pad, pad], [13, 14, 15]]
    with torch.no_grad():
        ones = [torch.ones(1, len(row)) for row in rows]
        expected = [model(torch.tensor([row]), attention_mask=one).logits for row, one in zip(rows, ones, strict=True)]
        enable_packing(model)
        packed = model(**PackCollator(pad)([{"input_ids": row} for row in rows])).logits
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_packed_samples_of_an_esm_are_scaled_by_their_own_share_of_masked_tokens() -> None:
    config, _ = tiny_config("esm")
    config.token_dropout, config.mask_token_id, config.pad_token_id = True, 4, 1
    torch.manual_seed(0)
    alone = AutoModelForSequenceClassification.from_config(config).eval()
    packed = copy.deepcopy(alone)
    enable_packing(packed)
    rows = [[5, 4, 4, 4, 4], [6, 7, 8], [4, 9, 10, 4]]
    weights = torch.tensor([1.0, -2.0, 3.0])[:, None]
    expected = torch.cat([alone(torch.tensor([row]), torch.ones(1, len(row))).logits for row in rows])
    given = packed(**PackCollator()([{"input_ids": row} for row in rows])).logits
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    (expected * weights).sum().backward()
    (given * weights).sum().backward()
    for name, parameter in packed.named_parameters():
        wanted = alone.get_parameter(name).grad
        assert (parameter.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_PACKED)
def test_families_that_cannot_be_packed_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match="models cannot be packed: .* Set --data.padding=longest"):
        packed_errors(family, torch.float32)


# --- adapters ---

SHARED_LAYERS = ("zamba",)  # into which adapters cannot be merged
NO_LINEAR_LAYERS = ("ibert",)  # but quantized ones of its own, which peft does not know


def adapter_differences(family: str, folder: Path, padding: str) -> dict[str, float]:
    """By what is compared with `predict`, the largest difference of a probability, where LoRA was trained."""
    make_tiny(family, folder / "base")
    options = {"max_length": MAX_LENGTH, "batch_size": 4, "cache_dir": str(folder / "cache")}
    texts = [text for text in TEXTS if text]
    data = GivenTexts(texts, padding=padding, **options)
    model = SequenceClassifier(str(folder / "base"), learning_rate=0.1, peft_config={"peft_type": "LORA", "r": 4})
    run = trainer(folder, max_steps=4)
    run.fit(model, data)
    assert any(weight.any() for name, weight in model.state_dict().items() if "lora_B" in name)
    predicted = probabilities(run, model, data)
    run.save_checkpoint(folder / "a.ckpt")
    found = {}
    again = SequenceClassifier.load_from_checkpoint(folder / "a.ckpt")
    found["loaded"] = float((probabilities(run, again, data) - predicted).abs().max())
    width = {"padding": "max_length"} if padding == "max_length" else {}
    for name, adapter in (("merged", False), ("adapter", True)):
        if not adapter and family in SHARED_LAYERS:
            with pytest.raises(UsageError, match="merged into the weights of Zamba.* differ .*with adapter=true"):
                export_model(model, data, folder / name)
            continue
        export_model(model, data, folder / name, adapter=adapter)
        said = by_pipeline(folder / name, texts, 8, adapter=adapter, **width)
        found[name] = float((said - predicted).abs().max())
    return found


ADAPTED = [family for family in FAMILIES if family not in NO_LINEAR_LAYERS]


@pytest.mark.parametrize("family", [family if family in ("bert", "llama") else slow(family) for family in ADAPTED])
def test_adapters_are_found_layers_for_and_say_the_same_merged_alone_and_loaded(family: str, tmp_path: Path) -> None:
    found = adapter_differences(family, tmp_path, "max_length" if family in FIXED_WIDTH else "longest")
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        ("bert", "longest"),
        *(slow(*one) for one in (("albert", "longest"), ("xlnet", "longest"), ("bert", "packed"), ("esm", "packed"))),
    ],
)
def test_chunks_that_do_not_divide_the_width_of_a_batch_are_left_out(
    family: str, padding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny(family, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunk_size_feed_forward": 7}))
    data = GivenTexts(SENTENCES, max_length=MAX_LENGTH, batch_size=4, padding=padding)
    model = SequenceClassifier(str(tmp_path / "base"))
    run = trainer(tmp_path, max_steps=1)
    with caplog.at_level("INFO"):
        run.fit(model, data)
    assert "chunk_size_feed_forward is 7 and is set to 0" in caplog.text
    export_model(model, data, tmp_path / "told")
    path = tmp_path / "told" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunk_size_feed_forward": 1}))
    alone = one_at_a_time(tmp_path / "told", SENTENCES)
    torch.testing.assert_close(probabilities(run, model, data), alone, atol=1e-5, rtol=0)


def trained_and_exported(folder: Path, texts: list[Any], **options: Any) -> torch.Tensor:
    """Trains the model in `base` a step, exports it to `told`, and returns what `predict` says of the texts."""
    data = GivenTexts(texts, max_length=MAX_LENGTH, batch_size=4, **options)
    model = SequenceClassifier(str(folder / "base"))
    run = trainer(folder, max_steps=1)
    run.fit(model, data)
    export_model(model, data, folder / "told")
    return probabilities(run, model, data)


@pytest.mark.parametrize("padding", ["longest", slow("packed")])
def test_a_model_with_a_single_token_type_reads_pairs_without_types(padding: str, tmp_path: Path) -> None:
    config, tokenizer = tiny_config("bert")
    config.type_vocab_size = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert max(tokenizer(*PAIRS[0])["token_type_ids"]) == 1
    predicted = trained_and_exported(tmp_path, PAIRS, padding=padding)
    alone = one_at_a_time(tmp_path / "told", PAIRS)
    torch.testing.assert_close(predicted, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_pipeline(tmp_path / "told", PAIRS, 8), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", slow("xlnet")])
def test_a_configuration_that_asks_for_more_or_for_tuples_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    asks = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asks}))
    predicted = trained_and_exported(tmp_path, SENTENCES)
    alone = one_at_a_time(tmp_path / "told", SENTENCES)
    torch.testing.assert_close(predicted, alone, atol=1e-5, rtol=0)


# --- the token to pad with ---


def llama(folder: Path, of_config: int | None, tokens: dict[str, str]) -> None:
    """A tiny Llama whose configuration, and whose tokenizer, pad with something of their own."""
    config, _ = tiny_config("llama")
    config.pad_token_id = of_config
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(folder)
    tokenizer = make_tokenizer("none")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"], **tokens})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("of_config", "tokens", "expected"),
    [
        (None, {}, "<|endoftext|>"),
        (None, {"pad_token": "<a>"}, "<a>"),
        (0, {"pad_token": "<a>"}, "<|endoftext|>"),
        (7, {"pad_token": "<b>"}, "<b>"),  # 7 is a letter
        (-1, {}, "<|endoftext|>"),
    ],
)
def test_tokenizer_batches_model_and_export_pad_with_the_same_token(
    of_config: int | None, tokens: dict[str, str], expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llama(tmp_path / "base", of_config, tokens)
    texts = [*TEXTS, "Go!<|endoftext|>", "<a>", "boat <b><b>", "<|endoftext|>" * 3]
    data = GivenTexts(texts, max_length=MAX_LENGTH, batch_size=4)
    model = SequenceClassifier(str(tmp_path / "base"))
    run = trainer(tmp_path, max_steps=2)
    with caplog.at_level("INFO"):
        run.fit(model, data)
    predicted = probabilities(run, model, data)
    export_model(model, data, tmp_path / "told")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "told")
    assert tokenizer.pad_token == data.tokenizer.pad_token == expected
    assert model.model.config.pad_token_id == tokenizer.pad_token_id
    assert caplog.text.count(f"Padding is {expected!r}") == (of_config != tokenizer.pad_token_id)
    alone = one_at_a_time(tmp_path / "told", texts)
    torch.testing.assert_close(predicted, alone, atol=1e-5, rtol=0)
    kept = [row for row, text in enumerate(texts) if text]
    said = by_pipeline(tmp_path / "told", [texts[row] for row in kept], 8)
    torch.testing.assert_close(said, alone[kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", slow("fnet"), slow("llama")])
def test_the_exported_pipeline_masks_padding_also_if_the_tokenizer_gave_no_mask(family: str, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "base")
    names = ["input_ids"]
    AutoTokenizer.from_pretrained(tmp_path / "base", model_input_names=names).save_pretrained(tmp_path / "base")
    width = {"padding": "max_length"} if family in FIXED_WIDTH else {}
    predicted = trained_and_exported(tmp_path, SENTENCES, **width)
    torch.testing.assert_close(by_pipeline(tmp_path / "told", SENTENCES, 8, **width), predicted, atol=1e-5, rtol=0)


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    llama(tmp_path / "base", None, {})
    tokenizer = make_tokenizer("none")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding token nor an end token.*pad_token that is in its voc"):
        trainer(tmp_path).fit(SequenceClassifier(str(tmp_path / "base")), GivenTexts(TEXTS, tokenizer=tokenizer))


# --- what is refused before training, in one line ---


def refused(folder: Path, message: str, texts: list[Any] = TEXTS, **options: Any) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(folder).fit(SequenceClassifier(str(folder / "base"), **options), GivenTexts(texts, max_length=24))


@pytest.mark.parametrize("family", ["bart", slow("t5")])
def test_a_text_that_spells_the_end_token_is_told_by_its_row_where_the_head_counts_these(
    family: str, tmp_path: Path
) -> None:
    make_tiny(family, tmp_path / "base")
    refused(tmp_path, "'</s>' tokens in row 2 .counted from 0. is 2, but 1", ["a", "b", "fine</s>", "c"])


@pytest.mark.parametrize(
    ("model_kwargs", "message"),
    [
        ({"eos_token_id": 4}, "reads the last '<mask>' of a text, token 4, but the tokenizer adds none.*eos_token_id"),
        (
            {"eos_token_id": None},
            "bart models read the end token .* but the configuration has none. Set --model.model_kw",
        ),
        (
            {"decoder_start_token_id": None},
            "BartForSequenceClassification fails on a short text: TypeError.*model_kwargs",
        ),
    ],
)
def test_tokens_that_an_encoder_and_decoder_need_are_asked_for(model_kwargs, message: str, tmp_path: Path) -> None:
    make_tiny("bart", tmp_path / "base")
    refused(tmp_path, message, model_kwargs=model_kwargs)


def test_the_end_token_that_a_head_reads_is_not_used_as_padding(tmp_path: Path) -> None:
    make_tiny("bart", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base", pad_token="</s>")
    options = {"max_length": MAX_LENGTH, "batch_size": 4}
    model = SequenceClassifier(str(tmp_path / "base"), model_kwargs={"pad_token_id": tokenizer.eos_token_id})
    run = trainer(tmp_path, max_steps=1)
    with pytest.raises(UsageError, match="no token to pad with except its end token, which the model reads. Give"):
        run.fit(model, GivenTexts(SENTENCES, tokenizer=tokenizer, **options))
    tokenizer.unk_token = "<unk>"
    data = GivenTexts(SENTENCES, tokenizer=tokenizer, **options)
    run.fit(model, data)
    export_model(model, data, tmp_path / "told")
    alone = one_at_a_time(tmp_path / "told", SENTENCES)
    torch.testing.assert_close(probabilities(run, model, data), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta", slow("esm"), slow("rembert"), slow("megatron-bert")])
def test_an_encoder_that_reads_from_the_left_and_classifies_the_first_token_is_refused(
    family: str, tmp_path: Path
) -> None:
    make_tiny(family, tmp_path / "base")
    message = "reads only the first token of a text, with is_decoder=true in its configuration. Set .*is_decoder=false"
    refused(tmp_path, message, model_kwargs={"is_decoder": True})


def test_a_model_that_was_trained_to_say_nearly_the_same_of_all_texts_predicts_them(tmp_path: Path) -> None:
    make_tiny("bert", tmp_path / "base")
    data, model = GivenTexts(SENTENCES, max_length=24), SequenceClassifier(str(tmp_path / "base"))
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data)
    bert = model.model.bert
    first, second, *rest = [token for token in range(8) if token != model.model.config.pad_token_id]
    with torch.no_grad():
        hidden = bert.eval()(torch.tensor([[first, *rest], [second, *rest]]))[0][:, 0]
        way = 1e6 * (hidden[1] - hidden[0])
        bert.pooler.dense.weight[:] = way  # and then a tanh, which is 1 or -1
        bert.pooler.dense.bias[:] = -way @ hidden.mean(0)
    found = probabilities(run, model, data)
    assert len(found.unique(dim=0)) <= 2


def test_a_padding_token_for_which_the_model_has_no_embedding_is_refused(tmp_path: Path) -> None:
    config, tokenizer = tiny_config("llama")
    config.vocab_size = len(tokenizer)
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    size = config.vocab_size
    refused(tmp_path, f"has {size + 1} tokens, but the model has {size}. .*without the tokens that were added to it")


def test_a_token_type_for_which_the_model_has_no_embedding_is_refused(tmp_path: Path) -> None:
    make_tiny("bert", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B:2 [SEP]:2"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, special)
    tokenizer.save_pretrained(tmp_path / "base")
    refused(tmp_path, "token types from 0 to 2, but the model's type_vocab_size is 2. Give .* tokenizer", PAIRS)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "nope"}, "quant_method 'nope', which transformers .* does not know. Upgrade transformers"),
        ({"quant_method": "hqq"}, "cannot be loaded: ImportError: .*HQQ.* Install it; or choose a model"),
    ],
)
def test_weights_quantized_in_a_way_that_is_not_available_are_refused(
    found: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(found["quant_method"]):
        pytest.skip("it is available")
    make_tiny("bert", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": found}))
    refused(tmp_path, message)


@pytest.mark.slow
def test_attention_without_dropout_is_refused_for_a_model_that_trains_with_it(tmp_path: Path) -> None:
    make_tiny("bert", tmp_path / "base")
    options = {"attn_implementation": "flex_attention"}
    refused(tmp_path, "flex_attention, which has no dropout, .*Leave it out, or set", model_kwargs=options)


@pytest.mark.parametrize(
    ("family", "longest"),
    [("gpt2", 64), ("ibert", 64), ("yoso", 66), ("mra", 66), ("roberta", 64), slow("gemma3", 64)],
)
def test_the_longest_text_is_what_the_positions_allow(family: str, longest: int, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base", model_max_length=100)
    data = GivenTexts(TEXTS, max_length=longest + 1, tokenizer=tokenizer)
    with pytest.raises(
        UsageError, match=f"the model takes {longest} tokens at most. Set --data.max_length to {longest}"
    ):
        trainer(tmp_path).fit(SequenceClassifier(str(tmp_path / "base")), data)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert model(input_ids=torch.full((1, longest), 9)).logits.isfinite().all()


def test_reformer_says_at_which_widths_it_trains(tmp_path: Path) -> None:
    make_tiny("reformer", tmp_path / "base")
    refused(tmp_path, "a multiple of 8 tokens wide. Set --data.padding=max_length and --data.max_length to 8")


@pytest.mark.slow
def test_layers_of_a_reformer_train_behind_frozen_embeddings(tmp_path: Path) -> None:
    make_tiny("reformer", tmp_path / "base")
    data = GivenTexts(["some text"] * 4, padding="max_length", max_length=8, batch_size=4)
    model = SequenceClassifier(str(tmp_path / "base"), freeze_embeddings=True, learning_rate=0.1)
    before = dict(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").base_model.named_parameters())
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, data)
    after = dict(model.model.base_model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("encoder")}


def test_xmod_without_a_language_is_told_which_ones_it_has(tmp_path: Path) -> None:
    make_tiny("xmod", tmp_path / "base")
    refused(tmp_path, "'en_XX', 'de_DE'.*model_kwargs.default_language", model_kwargs={"default_language": None})


def test_adapters_of_a_family_without_linear_layers_are_refused(tmp_path: Path) -> None:
    make_tiny("ibert", tmp_path / "base")
    message = "IBertForSequenceClassification has no linear layers to which adapters.*Leave peft_config out, or set its"
    refused(tmp_path, message, peft_config={"peft_type": "LORA"})


def test_a_family_without_a_head_is_named(tmp_path: Path) -> None:
    MambaConfig(vocab_size=500, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    make_tokenizer("none").save_pretrained(tmp_path / "base")
    refused(tmp_path, "no classification head for mamba models. Choose a model of a family that has one")


def test_code_that_a_model_brings_is_not_run_unless_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer("cls").save_pretrained(tmp_path / "base")
    kinds = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": kinds}))
    ran = tmp_path / "ran"
    (tmp_path / "base" / "mine.py").write_text(f"__import__('pathlib').Path({str(ran)!r}).touch()\n{REMOTE_CODE}")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    refused(tmp_path, "comes with its own Python code.*set --model.model_kwargs.trust_remote_code=true")
    assert not ran.exists()
    model = SequenceClassifier(str(tmp_path / "base"), model_kwargs={"trust_remote_code": True})
    with pytest.raises(UsageError, match="the weights of .* were not found"):
        trainer(tmp_path).fit(model, GivenTexts(TEXTS, max_length=24))
    assert ran.exists()


@pytest.mark.parametrize("peft_config", [None, slow({"peft_type": "LORA", "r": 4})])
@pytest.mark.parametrize("model_type", ["mine", slow("bert")])
def test_a_model_with_trusted_code_is_loaded_from_its_checkpoint_and_its_export(
    model_type: str, peft_config: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny("bert", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    kinds = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type, "auto_map": kinds}))
    code = REMOTE_CODE.replace("mine", model_type) + DOUBLED
    (tmp_path / "base" / "mine.py").write_text(code)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    data = GivenTexts(SENTENCES, max_length=MAX_LENGTH, batch_size=4)
    trusted = {"trust_remote_code": True}
    model = SequenceClassifier(
        str(tmp_path / "base"), model_kwargs=trusted, peft_config=peft_config, learning_rate=0.01
    )
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, data)
    predicted = probabilities(run, model, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="a model with its own Python code, which is not run unless you trust it"):
        SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt", model_kwargs=trusted)
    assert torch.equal(probabilities(run, again, data), predicted)
    resumed = SequenceClassifier(
        str(tmp_path / "base"), model_kwargs=trusted, peft_config=peft_config, learning_rate=0.01
    )
    trainer(tmp_path, max_steps=3).fit(resumed, data, ckpt_path=tmp_path / "a.ckpt")
    export_model(model, data, tmp_path / "told")
    said = by_pipeline(tmp_path / "told", SENTENCES, 8, trust_remote_code=True)
    torch.testing.assert_close(said, predicted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "files", "package"),
    [
        ("xlm", {"vocab.json": '{"<unk>": 0, "a</w>": 1}', "merges.txt": "#version: 0.2\n"}, "sacremoses"),
        ("roformer", {"vocab.txt": "[UNK]\n[PAD]\n"}, "rjieba"),
        ("deberta-v2", {"spm.model": "no model"}, "sentencepiece"),
    ],
)
def test_a_package_that_a_tokenizer_needs_is_named(
    family: str, files: dict[str, str], package: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    CONFIG_MAPPING[family]().save_pretrained(tmp_path / "base")
    for name, content in files.items():
        (tmp_path / "base" / name).write_text(content)
    refused(tmp_path, f"needs {package}.*which is not installed. Install it, then start again")


def write_table(path: Path) -> None:
    """Tries every family and writes what came out."""
    lines, right, number = [], 0, 0
    for family in FAMILIES:
        fixed = family in FIXED_WIDTH
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = differences(family, Path(folder), fixed)
                outcome = f"{max(found.values()):.0e}"
                right += max(found.values()) < 1e-5
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            packed = "{:.0e}, {:.0e}".format(*packed_errors(family, torch.float32)[1])
            number += 1
        except UsageError:
            packed = "-"
        lines.append(f"| {family} | {'`max_length`' if fixed else '`longest`'} | {outcome} | {packed} |")
        print(lines[-1], flush=True)
    left_out = [f"| {family} | {reason} |" for family, reason in LEFT_OUT.items()]
    path.write_text(
        "\n".join(
            [
                "# Tested model families",
                "",
                f"`python tests/test_families.py` wrote this table with transformers {transformers.__version__}, "
                "training a tiny model of each family of sequence classifiers for three steps. The exported model, "
                "given one text at a time, is compared with `predict` and with the exported pipeline at batch sizes 1 and 8. "
                "The third column is the largest difference in probability, for texts and pairs, including empty and "
                f"truncated ones. {right} of {len(FAMILIES)} agree to within 1e-5.",
                "",
                f"{number} families support packed batches. The last column is the largest difference between a packed "
                "batch and one sample at a time in float32: of the logits and of the worst gradient, each relative to "
                "its largest value.",
                "",
                "| family | `padding` | largest difference | packed: logits, gradients |",
                "| --- | --- | --- | --- |",
                *lines,
                "",
                "For families marked `max_length`, the result in transformers itself depends on the width of the batch; "
                "training warns about it, and Reformer trains only at such widths. Not tested:",
                "",
                "| family | reason |",
                "| --- | --- |",
                *left_out,
                "",
            ]
        )
    )


if __name__ == "__main__":
    write_table(Path(__file__).parents[1] / "docs" / "families.md")

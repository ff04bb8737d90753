"""Tests of packed batches: they give what padded ones give, in every family that can be packed."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from helpers import slow
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DataCollatorWithFlattening,
    DistilBertConfig,
    ElectraConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    RobertaConfig,
    StableLmConfig,
    XLMRobertaConfig,
)

from smartbatch_lightning import BatchSpec, PackCollator, PadCollator, SequenceClassifier
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.models import attention
from smartbatch_lightning.models.dropout import (
    DropoutAttention,
    FastDropout,
    bit_generator_from_torch,
    use_fast_dropout,
)
from smartbatch_lightning.models.layers import checkpoint_gradients
from smartbatch_lightning.models.packing import attention_dropout, enable_packing, reads_one_token, skip_unread_tokens
from smartbatch_lightning.models.pooling import mean

VOCABULARY = 200
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = [
    AlbertConfig(**SIZES, embedding_size=16),
    BertConfig(**SIZES),
    CamembertConfig(**SIZES),
    DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=128),
    ElectraConfig(**SIZES, embedding_size=16),
    ModernBertConfig(**SIZES, **MODERN, local_attention=16, classifier_pooling="cls"),
    ModernBertConfig(**SIZES, **MODERN, local_attention=16, classifier_pooling="mean"),
    RobertaConfig(**SIZES),
    XLMRobertaConfig(**SIZES),
]
FAMILIES = [f"{config.model_type}-{getattr(config, 'classifier_pooling', 'first')}" for config in CONFIGS]


def rows(lengths=(3, 40, 17, 90, 16)) -> list[dict]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(5, VOCABULARY, length), "labels": length % 2} for length in lengths]


def model(config, **options):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(type(config)(**{**config.to_dict(), **options}))


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("config", CONFIGS, ids=FAMILIES)
def test_packed_batches_give_the_logits_and_gradients_of_padded_ones(config) -> None:
    padded, packed = model(config).eval(), model(config).eval()
    enable_packing(packed)
    expected = padded(**PadCollator(config.pad_token_id)(rows()))
    actual = packed(**PackCollator()(rows()))
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-6, rtol=0)
    wanted, got = gradients(expected.loss, padded), gradients(actual.loss, packed)
    assert got.keys() == wanted.keys()
    scale = max(gradient.norm() for gradient in wanted.values())
    assert all((got[name] - wanted[name]).norm() < 1e-5 * scale for name in wanted)


@pytest.mark.parametrize("config", CONFIGS, ids=FAMILIES)
def test_a_row_that_is_filled_up_gives_the_losses_and_gradients_of_its_samples(config) -> None:
    plain, filled = model(config).eval(), model(config).eval()
    expected = SequenceClassifier.forward(_holder(plain), **_inputs(PackCollator()(rows())))
    spec = BatchSpec(padding="packed", pad_to_multiple_of=256, max_length=100)
    actual = SequenceClassifier.forward(_holder(filled), **_inputs(PackCollator(0, spec)(rows())))
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-6, rtol=0)
    wanted = gradients(expected.logits.logsumexp(1).sum(), plain)
    got = gradients(actual.logits.logsumexp(1).sum(), filled)
    scale = max(gradient.norm() for gradient in wanted.values())
    assert all((got[name] - wanted[name]).norm() < 1e-6 * scale for name in wanted)


def _holder(built) -> SequenceClassifier:
    module = SequenceClassifier()
    module.model = built
    return module


def _inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("config", CONFIGS, ids=FAMILIES)
def test_a_model_that_takes_packed_batches_still_takes_padded_ones(config) -> None:
    plain, enabled = model(config).eval(), model(config).eval()
    enable_packing(enabled)
    padded = PadCollator(config.pad_token_id)(rows())
    torch.testing.assert_close(enabled(**padded).logits, plain(**padded).logits)
    no_mask = {"input_ids": padded["input_ids"][3:4]}
    torch.testing.assert_close(enabled(**no_mask).logits, plain(**no_mask).logits)


def test_real_weights_give_the_same_logits_and_gradients_packed_and_padded(minilm: str) -> None:
    texts = rows((12, 400, 250, 3, 77, 128))
    results = []
    for collator in (PadCollator(0), PackCollator()):
        torch.manual_seed(0)
        bert = AutoModelForSequenceClassification.from_pretrained(minilm, dtype=torch.float32).eval()
        enable_packing(bert)
        output = bert(**collator(texts))
        results.append((output.logits, gradients(output.loss, bert)))
    (padded, wanted), (packed, got) = results
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    for name, gradient in wanted.items():
        if gradient.norm() > 1e-6:  # a bias of keys has none
            assert (got[name] - gradient).norm() / gradient.norm() < 1e-4, name


def test_the_last_layer_computes_what_follows_attention_for_the_first_tokens_alone() -> None:
    packed = model(BertConfig(**SIZES)).eval()
    enable_packing(packed)
    seen = {}
    for number, layer in enumerate(packed.bert.encoder.layer):
        layer.intermediate.register_forward_hook(
            lambda module, inputs, output, number=number: seen.update({number: output[..., 0].numel()})
        )
    packed(**PackCollator()(rows()))
    assert seen == {0: 166, 1: 166, 2: 5}


def test_means_of_half_precision_are_summed_in_float32() -> None:
    hidden = (torch.rand(3000, 4, dtype=torch.float64) + 1).bfloat16()
    cu_seq_lens = torch.tensor([0, 10, 3000])
    exact = mean(hidden.double(), cu_seq_lens)
    torch.testing.assert_close(mean(hidden, cu_seq_lens).double(), exact, rtol=2**-8, atol=0)


def test_pairs_of_sentences_are_packed_with_their_types() -> None:
    config = CONFIGS[1]
    pairs = [{**row, "token_type_ids": np.arange(len(row["input_ids"])) % 2} for row in rows()]
    bert = model(config).eval()
    enable_packing(bert)
    expected = bert(**PadCollator(0)(pairs)).logits
    torch.testing.assert_close(bert(**PackCollator()(pairs)).logits, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(bert(**PackCollator()(rows())).logits, expected, atol=1e-6)


def test_attention_dropout_drops_in_training_as_configured() -> None:
    for probability, differ in ((0.0, False), (0.5, True)):
        bert = model(CONFIGS[1], hidden_dropout_prob=0.0, attention_probs_dropout_prob=probability).train()
        enable_packing(bert)
        batch = PackCollator()(rows())
        assert (not torch.equal(bert(**batch).logits, bert(**batch).logits)) == differ
        assert attention_dropout(bert) == probability


def test_fast_dropout_has_the_gradients_of_its_output() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        return DropoutAttention.apply(*inputs, 0.3, 0.7, np.random.SFC64(4))

    assert torch.autograd.gradcheck(attention, inputs)


def test_fast_dropout_is_attention_on_average_and_drops_as_often_as_asked() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 50, 8).unbind()
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, torch.eye(50).expand(4, 50, 50))
    bits = bit_generator_from_torch()
    total, dropped = torch.zeros_like(plain), 0
    for _ in range(400):
        weights = DropoutAttention.apply(query, key, torch.eye(50).expand(4, 50, 50), 0.1, 8**-0.5, bits)
        total += weights
        dropped += int((weights == 0).sum())
    assert dropped / (400 * plain.numel()) == pytest.approx(0.1, abs=0.001)
    torch.testing.assert_close(total / 400, plain, atol=0.02, rtol=0)


def test_fast_dropout_of_activations_is_torchs_but_for_the_numbers_drawn() -> None:
    layer = torch.nn.Sequential(torch.nn.Dropout(0.1))
    use_fast_dropout(layer)
    assert type(layer[0]) is FastDropout
    values = torch.ones(300, 500, requires_grad=True)
    output = layer(values)
    output.sum().backward()
    assert torch.equal(values.grad, output)
    assert output.unique().tolist() == [0, pytest.approx(1 / 0.9)]
    assert (output == 0).double().mean() == pytest.approx(0.1, abs=0.003)
    assert layer(values.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.eval()(values), values)


def test_the_random_state_of_torch_rules_fast_dropout() -> None:
    bert = model(CONFIGS[1], hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    use_fast_dropout(bert)
    enable_packing(bert)
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(bert(**PackCollator()(rows())).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_enabling_twice_is_enabling_once() -> None:
    bert = model(CONFIGS[7]).eval()
    enable_packing(bert)
    once = bert(**PackCollator()(rows())).logits
    enable_packing(bert)
    torch.testing.assert_close(bert(**PackCollator()(rows())).logits, once)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MPNetConfig(**SIZES), "have no single stack of layers whose attention can be"),
        (StableLmConfig(**SIZES, num_key_value_heads=4, pad_token_id=0), "give logits that differ by"),
        (
            GptOssConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0),
            "fail on them: .*'s_aux'",
        ),
    ],
    ids=["mpnet", "stablelm", "gpt_oss"],
)
def test_a_family_that_cannot_be_packed_is_refused_before_training(config, reason: str) -> None:
    built = model(config, initializer_range=0.3)
    with pytest.raises(
        UsageError, match=f"batches of {config.model_type} models cannot be packed: they {reason}.*longest"
    ):
        enable_packing(built)


def test_trying_a_model_leaves_random_state_modes_and_weights_as_they_were() -> None:
    bert = model(CONFIGS[1]).train()
    bert.bert.encoder.layer[0].eval()
    modes, state = [module.training for module in bert.modules()], torch.get_rng_state()
    weights = {name: weight.clone() for name, weight in bert.state_dict().items()}
    skip_unread_tokens(bert)
    enable_packing(bert)
    assert [module.training for module in bert.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, weights[name]) for name, weight in bert.state_dict().items())


LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)


def test_a_decoder_reads_the_last_token_that_is_not_padding_also_where_a_text_ends_in_that() -> None:
    texts = rows((3, 40, 17, 9))
    for text, ending in zip(texts, (0, 5, 1, 9), strict=True):
        text["input_ids"][len(text["input_ids"]) - ending :] = 0
    plain, packed = (
        model(MistralConfig(**LLAMA.to_dict() | {"model_type": "mistral"}, sliding_window=8)).eval() for _ in "ab"
    )
    enable_packing(packed)
    expected = torch.cat([plain(input_ids=torch.from_numpy(text["input_ids"])[None]).logits for text in texts])
    torch.testing.assert_close(packed(**PackCollator()(texts)).logits, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed(**PadCollator(0)(texts)).logits, expected, atol=1e-6, rtol=0)


def _flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, dropout=0.0, scaling=None, **options):
    """What a kernel computes that knows transformers' keywords, by a mask."""
    assert attention_mask is None
    sample = torch.bucketize(torch.arange(query.shape[2]), cu_seq_lens_q[1:], right=True)
    mask = sample[:, None] == sample
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(
        1, 2
    ), None


def test_a_kernel_that_was_chosen_takes_packed_batches_and_those_of_transformers_own_collator() -> None:
    AttentionInterface.register("a_kernel", _flash)
    AttentionMaskInterface.register("a_kernel", lambda **options: None)
    plain, packed = model(CONFIGS[7]).eval(), model(CONFIGS[7]).eval()
    packed.set_attn_implementation("a_kernel")
    enable_packing(packed)
    assert packed.config._attn_implementation == "a_kernel"
    texts = [{"input_ids": row["input_ids"].tolist()} for row in rows()]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(texts)
    expected = plain(**PadCollator(plain.config.pad_token_id)(rows())).logits
    given = packed(**{name: value for name, value in batch.items() if name != "labels"}).logits
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)


# --- the last layer for the tokens that are read ---


ONE_TOKEN = [CONFIGS[1], CONFIGS[5], CONFIGS[7], LLAMA]


@pytest.mark.parametrize("checkpointing", [False, slow(True)])
@pytest.mark.parametrize("config", ONE_TOKEN, ids=lambda config: config.model_type)
def test_a_last_layer_for_the_tokens_that_are_read_gives_the_logits_and_gradients_of_a_whole_one(
    config, checkpointing: bool
) -> None:
    whole, spared = model(config).eval(), model(config).eval()
    skip_unread_tokens(spared)
    assert reads_one_token(spared)
    if checkpointing:
        checkpoint_gradients(spared.train())  # which evaluation does without
        for module in spared.modules():
            module.p = 0.0  # of a dropout
    for options in ({}, {"output_hidden_states": True}):
        expected, actual = (one(**PadCollator(config.pad_token_id)(rows()), **options) for one in (whole, spared))
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-6, rtol=0)
        wanted, got = gradients(expected.loss, whole), gradients(actual.loss, spared)
        assert got.keys() == wanted.keys()
        scale = max(gradient.norm() for gradient in wanted.values())
        assert all((got[name] - wanted[name]).norm() < 1e-6 * scale for name in wanted)
    assert actual.hidden_states[-1].shape == expected.hidden_states[-1].shape


@pytest.mark.parametrize("layerdrop", [0.5, 1.0])
def test_a_last_layer_that_layerdrop_leaves_out_is_followed_by_a_head_that_reads_the_right_token(
    layerdrop: float,
) -> None:
    sizes = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": layerdrop}
    whole, padded, packed = (model(OPTConfig(**sizes, pad_token_id=1)).train() for _ in range(3))
    skip_unread_tokens(padded)
    enable_packing(packed)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = whole(**PadCollator(1)(rows())).logits
        for one, collator in ((padded, PadCollator(1)), (packed, PackCollator())):
            torch.manual_seed(seed)
            torch.testing.assert_close(one(**collator(rows())).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [CONFIGS[1], LLAMA], ids=lambda config: config.model_type)
def test_padded_batches_are_computed_in_the_last_layer_for_one_token_a_sample(config) -> None:
    spared = model(config).eval()
    skip_unread_tokens(spared)
    copied = copy.deepcopy(pickle.loads(pickle.dumps(spared)))  # as for other processes, and by weight averaging
    seen = []
    linear = [module for module in copied.base_model.modules() if isinstance(module, torch.nn.Linear)]
    largest = max(linear, key=lambda module: module.out_features)  # of the feed-forward part
    for module in linear:
        if module.out_features == largest.out_features and module.in_features == largest.in_features:
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    copied(**PadCollator(0)(rows()))
    assert seen[-1] == 1
    assert seen[0] == 90


def test_nothing_of_it_is_saved(tmp_path) -> None:
    spared = model(CONFIGS[1]).eval()
    skip_unread_tokens(spared)
    enable_packing(spared)
    spared.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert "smartbatch" not in (tmp_path / "config.json").read_text()
    batch = PadCollator(0)(rows())
    torch.testing.assert_close(loaded(**batch).logits, spared(**batch).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [CONFIGS[6], CONFIGS[0]], ids=["mean", "albert"])
def test_heads_that_read_all_tokens_and_layers_that_are_called_again_are_computed_whole(config) -> None:
    built = model(config).eval()
    skip_unread_tokens(built)
    assert not reads_one_token(built)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIGS[1], LLAMA], ids=lambda config: config.model_type)
def test_a_compiler_takes_the_last_layer_into_one_graph_with_the_others(config) -> None:
    built = model(config).eval()
    skip_unread_tokens(built)
    batch = PadCollator(0)(rows())
    expected = built(**batch).logits
    built.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(built(**batch).logits, expected)


_SINCE_2_13 = ("enable_gqa", "seqused_k", "block_table", "num_splits")
SIGNATURES = {
    "2.11": ("return_aux", "scale", "window_size"),
    "2.13": ("return_aux", "scale", "window_size", *_SINCE_2_13),
    "2.14.1": ("return_aux", "scale", "window_size", *_SINCE_2_13),
    "2.15.0": ("return_aux", "scale", "window_size", *_SINCE_2_13),
}  # by release, what `varlen_attn` takes by name alone


@pytest.mark.parametrize("release", [*SIGNATURES, "installed"])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_attention_is_called_as_each_release_of_torch_wants_it(release: str, grouped: bool, monkeypatch) -> None:
    positional = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    kinds = inspect.Parameter
    taken = inspect.signature(attention.varlen_attn)
    if release != "installed":
        by_place = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in positional]
        taken = inspect.Signature(
            [*by_place, *(kinds(name, kinds.KEYWORD_ONLY, default=None) for name in SIGNATURES[release])]
        )
    calls = []

    def called(*args, **options):
        calls.append(taken.bind(*args, **options).arguments)
        return args[0]

    monkeypatch.setattr(attention, "varlen_attn", called)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: True)
    monkeypatch.setattr(attention, "_TAKES_GROUPED_HEADS", "enable_gqa" in taken.parameters)
    heads = 2 if grouped else 8
    query, key, value = (torch.zeros(1, number, 30, 4) for number in (8, heads, heads))
    starts, longest = (torch.tensor([0, 10, 30], dtype=torch.int32),) * 2, (20, 20)
    attention._packed(query, key, value, starts, longest, 0.0, 0.5, -1, causal=False)
    [call] = calls
    assert (call["scale"], call["window_size"]) == (0.5, (20, 20))  # a window that hides nothing
    assert call["key"].shape[1] == 8 or call["enable_gqa"]

"""The demo's tokenizer and its small untrained BERT."""

import string

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from smartbatch_lightning.demo.reviews import LABELS

_SEED = 3
_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_VOCABULARY_SIZE = 2000
_MAX_TOKENS = 512
# A step of Adam changes a weight by about the learning rate. With embeddings this small, such steps soon outweigh the
# initial values, so the model learns from scratch at a learning rate meant for fine-tuning.
_EMBEDDING_LIMIT = 0.002
_WEIGHT_LIMIT = 0.17


def make_tokenizer(texts: list[str]) -> BertTokenizer:
    """Trains a lower-case WordPiece tokenizer.

    The trainer is given the characters in a fixed order. It would otherwise number them differently in each
    process, and those numbers break the ties between merges.
    """
    characters = string.ascii_lowercase + string.digits + string.punctuation
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        texts,
        vocab_size=_VOCABULARY_SIZE,
        show_progress=False,
        special_tokens=[*_SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)],
    )
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=_MAX_TOKENS)


def make_model(vocabulary_size: int) -> BertForSequenceClassification:
    """Builds an untrained BERT. Its weights are drawn uniformly, with the same bits on every machine."""
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=_MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        model = BertForSequenceClassification(config)
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            limit = _EMBEDDING_LIMIT if "embeddings" in name else _WEIGHT_LIMIT
            torch.nn.init.uniform_(parameter, -limit, limit, generator=generator)
    return model

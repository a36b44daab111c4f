"""Tiny speech, text and image networks of transformers with random weights, in the published file layout."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    HubertConfig,
    HubertModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

WORDS = ("<pad>", "</s>", "<unk>", "a", "happy", "orange", "cat", "&", "is", "speaking")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def wav2vec2(folder: Path) -> str:
    """Write a network like the base models: normalised over time after the first convolution."""
    return _save(Wav2Vec2Model(Wav2Vec2Config(**SIZES)), Wav2Vec2FeatureExtractor(do_normalize=True), folder)


def hubert(folder: Path) -> str:
    """Write a network like the large models: layer norm after each convolution and before attention."""
    config = HubertConfig(**SIZES, feat_extract_norm="layer", do_stable_layer_norm=True)
    return _save(HubertModel(config), Wav2Vec2FeatureExtractor(do_normalize=False), folder)


def whisper(folder: Path) -> str:
    """Write a network with its decoder, as published; at most 40 positions, 0.8 s."""
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=40,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return _save(WhisperForConditionalGeneration(config), WhisperFeatureExtractor(feature_size=8), folder)


def umt5(folder: Path) -> str:
    """Write an encoder and its tokenizer to two folders, as in a diffusers pipeline."""
    config = UMT5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    _randomised(UMT5EncoderModel(config)).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return str(folder)


def clip(folder: Path, size: int = 28) -> str:
    """Write an encoder and its processor, as in a diffusers pipeline; 5 tokens: 2 × 2 patches and the class token."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    _randomised(CLIPVisionModel(config)).save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder / "image_processor")
    return str(folder)


def _save(net, extractor, folder: Path) -> str:
    _randomised(net).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


def _randomised(net):
    """Add noise to the weights: fresh ones are so small that errors would hardly show."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net

"""Tiny speech, text and image networks of transformers with random weights, stored as public ones are."""

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
FORM = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def wav2vec2(folder: Path) -> str:
    """Of the base models' form: normalised over time after the first convolution."""
    return _stored(Wav2Vec2Model(Wav2Vec2Config(**FORM)), Wav2Vec2FeatureExtractor(do_normalize=True), folder)


def hubert(folder: Path) -> str:
    """Of the large models' form: normalised over channels, and before attention."""
    config = HubertConfig(**FORM, feat_extract_norm="layer", do_stable_layer_norm=True)
    return _stored(HubertModel(config), Wav2Vec2FeatureExtractor(do_normalize=False), folder)


def whisper(folder: Path) -> str:
    """With its decoder, as it is published; room for 40 positions, 0.8 s."""
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
    return _stored(WhisperForConditionalGeneration(config), WhisperFeatureExtractor(feature_size=8), folder)


def umt5(folder: Path) -> str:
    """In the layout of a pipeline of diffusers: an encoder and its tokenizer in two folders."""
    config = UMT5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    _random(UMT5EncoderModel(config)).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return str(folder)


def clip(folder: Path, size: int = 28) -> str:
    """In the layout of a pipeline of diffusers: pictures of 28 pixels, 2 × 2 patches and the class make 5 tokens."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    _random(CLIPVisionModel(config)).save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder / "image_processor")
    return str(folder)


def _stored(net, extractor, folder: Path) -> str:
    _random(net).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


def _random(net):
    """Weights of unit gain, for fresh ones are so small that a mistake would hardly show."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net

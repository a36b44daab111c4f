"""Encoders without weights: log-mel features depend on local samples alone, byte ids decode to their prompts."""

import pytest
import torch

from avatar.models.audio_encoders.log_mel import OVERLAP, LogMel
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.types import SAMPLES_PER_FRAME


def test_features_of_a_frame_depend_on_its_samples_and_a_margin():
    encoder, samples = LogMel(), torch.randn(10 * SAMPLES_PER_FRAME) * 0.1
    changed = samples.clone()
    changed[5 * SAMPLES_PER_FRAME + OVERLAP : 6 * SAMPLES_PER_FRAME - OVERLAP] += 0.5
    moved = (encoder.encode(changed) - encoder.encode(samples)).abs().sum(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [5]


def test_silence_has_the_features_of_zero_samples():
    encoder = LogMel()
    features = encoder.encode(torch.zeros(3 * SAMPLES_PER_FRAME))
    torch.testing.assert_close(features, encoder.silence.expand(3, -1))
    assert encoder.encode(torch.randn(SAMPLES_PER_FRAME))[0].mean() > features.mean() + 0.5


def test_fingerprints_contain_the_settings_but_no_class_name():
    assert LogMel().fingerprint == "log_mel(mels=40,left_context=3,right_context=2)"
    assert ByteTokenizer(96).fingerprint == "byte_text(max_bytes=96)"


def test_windows_overlap_by_their_contexts():
    encoder = LogMel(left_context=3, right_context=2)
    features = torch.arange(3 + 8 + 2).float()[:, None].expand(-1, encoder.dim)
    windows = encoder.window(features, stride=4)
    assert windows[:, :, 0].tolist() == [list(range(9)), list(range(4, 13))]


@pytest.mark.parametrize("invalid", [{"right_context": 0}, {"left_context": 0}])
def test_contexts_of_zero_frames_are_rejected(invalid):
    with pytest.raises(ValueError, match="expected at least 1 each"):
        LogMel(**invalid)


def test_ids_decode_to_the_prompts_bytes():
    ids, mask = ByteTokenizer(32).encode(["Grüße, kleine Katze", "hi"])
    assert bytes(i - 3 for i in ids[0][mask[0]][:-1].tolist()).decode() == "Grüße, kleine Katze"
    assert mask.sum(dim=1).tolist() == [len("Grüße, kleine Katze".encode()) + 1, 3]


def test_the_mask_of_an_empty_prompt_is_all_false():
    _, mask = ByteTokenizer().encode([""])
    assert not mask.any()


def test_a_prompt_that_is_too_long_is_rejected():
    with pytest.raises(ValueError, match="expected at most 7"):
        ByteTokenizer(8).encode(["12345678"])

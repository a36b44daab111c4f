"""Speech synthesis server: eSpeak NG in a separate process.

    python -m avatar.puppet.espeak_worker

Each line of standard input is a request in JSON: `text`, `voice`, `rate` (words per minute), `pitch` and `range` (0 to
99). Each line of standard output is a response: `rate` (samples per second), `pcm` (16-bit, base64) and `phonemes`, a
list of [mnemonic, first sample], or `error`.

eSpeak is not deterministic within one process: the waveform of the same sentence changes from call to call. So the
server only initialises it, and forks a child for each utterance. No other module loads the library, also because eSpeak
NG is GPL-3. This module has few imports, since they cost time at start and at every fork.
"""

import base64
import ctypes
import json
import os
import sys

import espeakng_loader

SYNCHRONOUS = 2
PHONEME_EVENTS = 1
UTF8 = 1
END_OF_LIST, PHONEME = 0, 7
RATE, PITCH, RANGE = 1, 3, 4


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("uid", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def synthesize(library: ctypes.CDLL, sample_rate: int, request: dict) -> dict:
    """Synthesize the response to one request. Call it once per process: the result of a second call would differ."""
    pcm, phonemes = bytearray(), []

    def collect(samples, count, events):
        if samples and count:
            pcm.extend(ctypes.string_at(samples, count * 2))
        index = 0
        while events[index].type != END_OF_LIST:
            if events[index].type == PHONEME:
                phonemes.append([events[index].id.string.decode("utf-8", "replace"), events[index].sample])
            index += 1
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(request["voice"].encode()):
        return {"error": f"got the voice {request['voice']!r}; expected one of `espeak-ng --voices`: choose another"}
    for parameter, value in ((RATE, request["rate"]), (PITCH, request["pitch"]), (RANGE, request["range"])):
        library.espeak_SetParameter(parameter, value, 0)
    text = request["text"].encode()
    library.espeak_Synth(text, len(text) + 1, 0, 0, 0, UTF8, None, None)
    library.espeak_Synchronize()
    return {"rate": sample_rate, "pcm": base64.b64encode(bytes(pcm)).decode(), "phonemes": phonemes}


def serve() -> None:
    """Respond to requests until the end of standard input."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    sample_rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), PHONEME_EVENTS)
    if sample_rate < 0:
        raise OSError("eSpeak NG did not find its data; reinstall espeakng-loader")
    for line in iter(sys.stdin.buffer.readline, b""):
        child = os.fork()
        if child == 0:
            response = json.dumps(synthesize(library, sample_rate, json.loads(line)))
            sys.stdout.write(response + "\n")
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.stdout.write(json.dumps({"error": f"eSpeak NG ended with status {status}"}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()

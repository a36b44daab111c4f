"""Transcripts: the opening words of the sentence that an avatar speaks, at the end of its prompt.

A speech synthesiser knows them before their sound, and a gesture that they cause can begin in time.
"""

LENGTH = 30  # of a transcript, in characters: longer than the openings that cause gestures in the puppet world


def transcript(sentence: str) -> str:
    """The end of the prompt of an avatar that begins to speak a sentence, such as ": Hello, my brother opened"."""
    words = sentence.rstrip(".").split()
    while len(" ".join(words)) > LENGTH:
        words.pop()
    return f": {' '.join(words)}"

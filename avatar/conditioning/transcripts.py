"""Transcripts: the opening words of the sentence that an avatar speaks, at the end of its prompt.

Where speech is synthesised, the words exist before their sound, and a gesture that they cause can begin in time.
"""

LENGTH = 30  # of a transcript, in characters: longer than the openings that cause gestures in the puppet world


def transcript(sentence: str) -> str:
    """The end of the prompt of an avatar that begins to speak a sentence, such as ": Hello, my brother opened".

    Whole words; empty for a sentence without words or with a first word of more than LENGTH characters.
    """
    words = sentence.rstrip(".").split()
    while len(" ".join(words)) > LENGTH:
        words.pop()
    return f": {' '.join(words)}" if words else ""

"""Stream a portrait and a voice through a student: `python infer.py image=me.png audio=hello.wav out=me.mp4`."""

from avatar.commands import infer
from avatar.training import fit

if __name__ == "__main__":
    fit.main("infer", infer.film)

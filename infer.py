"""Stream a portrait and a voice through a student: `python infer.py image=me.png audio=hello.wav out=me.mp4`."""

from avatar import cli
from avatar.commands.infer import infer

if __name__ == "__main__":
    cli.main("infer", infer)

"""Stream a portrait and a voice through a student: `python infer.py image=me.png audio=hello.wav out=me.mp4`."""

from avatar import threads

if __name__ == "__main__":
    threads.shorten_spinning()  # before torch is imported

    from avatar import cli
    from avatar.commands.infer import infer

    cli.main("infer", infer)

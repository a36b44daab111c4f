"""Stream a portrait and a voice through a student: `python infer.py image=me.png audio=hello.wav out=me.mp4`."""

from avatar import film, run

if __name__ == "__main__":
    run.main("infer", film.film)

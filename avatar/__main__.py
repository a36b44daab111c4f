"""Commands of the package: `python -m avatar COMMAND [key=value ...]`; `python -m avatar --help` lists them."""

import importlib
import sys

from avatar import threads

COMMANDS = {
    "infer": "stream a portrait and a voice through a student into an MP4",
    "evaluate": "score a student and its teacher on held-out puppets",
    "preprocess": "turn videos of talking people into WebDataset shards",
    "convert": "convert published weights to a bundle, or a bundle to diffusers' layout",
    "summarize": "print parameters, FLOPs and memory of a model, without allocating it",
    "demo": "train, distil, stream and score a small avatar on the CPU",
    "gallery": "draw an overview image of the puppet world",
}
USAGE = "usage: python -m avatar COMMAND [key=value ...]"


def main() -> None:
    """Run the command named by the first argument; Hydra parses the others."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE, "", *(f"  {command:<12}{text}" for command, text in COMMANDS.items()), sep="\n")
        print("\n`python -m avatar COMMAND --help` prints the settings of a command.")
    elif name not in COMMANDS:
        print(f"error: no command {name}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        del sys.argv[1]
        threads.shorten_spinning()  # before torch is imported
        from avatar import cli

        cli.main(name, getattr(importlib.import_module(f"avatar.commands.{name}"), name))


if __name__ == "__main__":
    main()

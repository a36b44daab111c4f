"""Registry of the components that a bundle can name; only this module builds objects from a file's config.

A bundle is untrusted, so its config is data: {"name": "video_dit", "channels": 48, "text": {"name": …}, …}. Names come
from TABLE. Arguments are plain values, checked against the annotations of the constructor, and the complete config is
checked before anything is built. Nothing is imported, resolved or called because of what a config says.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avatar.errors import UserError
from avatar.files import short_error

MAX_NUMBER = 65_536  # the largest integer argument
MAX_LAYERS = 128  # for the arguments in DEPTHS, and for the length of a list of integers
MAX_LENGTH = 65_536  # of other lists and of strings
MAX_NESTING = 16
DEPTHS = {"layers", "num_res_blocks", "layers_per_block", "decoder_layers_per_block"}


@dataclass(frozen=True)
class Component:
    """A class that a bundle can name.

    Args:
        path: its module and name; bundles don't contain it.
        nested: argument that is itself a component → the names that are allowed for it.
        options: argument that is a mapping of keyword arguments of another class → the path of that class.
    """

    path: str
    nested: Mapping[str, Collection[str]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


WAN = {"config": "diffusers.models.autoencoders.autoencoder_kl_wan.AutoencoderKLWan"}
LTX = {"config": "diffusers.models.autoencoders.autoencoder_kl_ltx.AutoencoderKLLTXVideo"}
AUTOENCODERS = (
    "causal_conv_autoencoder",
    "state_autoencoder",
    "distilled_autoencoder",
    "wan_autoencoder",
    "ltx_autoencoder",
)
PARTS = {  # of a bundle's config → the names that are allowed there
    "network": ("video_dit", *AUTOENCODERS),
    "audio": ("log_mel", "windowed"),
    "text": ("byte_tokenizer", "umt5"),
    "image": ("clip",),
}
TABLE = {
    "video_dit": Component(
        "avatar.models.video_dit.VideoDiT",
        {"text": ("byte_text", "text_projection"), "image": ("image_projection",)},
    ),
    "byte_text": Component("avatar.nn.embeddings.ByteTextEncoder"),
    "text_projection": Component("avatar.nn.embeddings.TextProjection"),
    "image_projection": Component("avatar.nn.embeddings.ImageProjection"),
    "causal_conv_autoencoder": Component("avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"),
    "state_autoencoder": Component("avatar.models.autoencoders.state.StateAutoencoder"),
    "distilled_autoencoder": Component(
        "avatar.models.autoencoders.distilled.DistilledAutoencoder", {"encoder": AUTOENCODERS}
    ),
    "wan_autoencoder": Component("avatar.models.autoencoders.wan.WanAutoencoder", options=WAN),
    "ltx_autoencoder": Component("avatar.models.autoencoders.ltx.LTXAutoencoder", options=LTX),
    "log_mel": Component("avatar.models.audio_encoders.log_mel.LogMel"),
    "windowed": Component(
        "avatar.models.audio_encoders.windowed.WindowedEncoder", {"network": ("wav2vec2", "whisper")}
    ),
    "wav2vec2": Component("avatar.models.audio_encoders.wav2vec2.Wav2Vec2"),
    "whisper": Component("avatar.models.audio_encoders.whisper.Whisper"),
    "byte_tokenizer": Component("avatar.models.text_encoders.bytes.ByteTokenizer"),
    "umt5": Component("avatar.models.text_encoders.umt5.UMT5"),
    "clip": Component("avatar.models.image_encoders.clip.CLIP"),
}
NAMES = {component.path: name for name, component in TABLE.items()}

# Raised by constructors for values that have the right types but do not fit together.
INVALID = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AttributeError, AssertionError, NameError)


def registered(config: Any) -> Any:
    """A trusted config in its registered form: `_target_: avatar.models.video_dit.VideoDiT` → `name: video_dit`.

    Registered configs and plain values are returned unchanged.

    Raises:
        UserError: a class that is not in the table.
    """
    if isinstance(config, list | tuple):
        return [registered(value) for value in config]
    if not isinstance(config, Mapping):
        return config
    target = config.get("_target_")
    if target is not None and target not in NAMES:
        raise UserError(
            f"got _target_={target}; a bundle can't name this class: choose one of {', '.join(sorted(NAMES))}, or add "
            "it to avatar/models/registry.py"
        )
    named = {} if target is None else {"name": NAMES[target]}
    return named | {key: registered(value) for key, value in config.items() if key != "_target_"}


def build(config: Any, allowed: Collection[str]) -> Any:
    """Build the component of a registered config, which may come from an untrusted file.

    Args:
        config: {"name": …} and the arguments of the constructor.
        allowed: names that are allowed for this component.

    Raises:
        UserError: a name that is not allowed, an unknown argument, or a value of another type or size.
        Exception: whatever the constructor raises.
    """
    check_plain(config)
    return _checked(config, allowed)()


def build_from_file(config: Any, allowed: Collection[str]) -> Any:
    """`build` for the config of a file: values that do not fit together are the file's fault, and a UserError."""
    try:
        return build(config, allowed)
    except (UserError, OSError):
        raise
    except INVALID as error:
        raise UserError(f"got {_short_repr(config)}, which can't be built: {short_error(error)}") from error


class Allocations(TorchDispatchMode):
    """Counts the numbers in all tensors that are allocated, including tensors that a constructor drops again."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.numbers += result.numel()
        return result


def check_plain(value: Any, nesting: int = 0) -> None:
    """Raise UserError for anything but short plain data without private keys, interpolation, NaN or infinity."""
    if nesting > MAX_NESTING:
        raise UserError(f"got a config nested more than {MAX_NESTING} levels deep; expected a bundle's config")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or key.startswith("_") or not _is_plain(key):
                raise UserError(
                    f"got the key {_short_repr(key)} in a config; expected names of arguments: only registered "
                    "components are built"
                )
            check_plain(item, nesting + 1)
    elif isinstance(value, list | tuple):
        if len(value) > MAX_LENGTH:
            raise UserError(f"got a list of {len(value)} values in a config; expected at most {MAX_LENGTH}")
        for item in value:
            check_plain(item, nesting + 1)
    elif isinstance(value, str):
        if not _is_plain(value):
            raise UserError(f"got {_short_repr(value)} in a config; expected plain strings, without interpolation")
    elif value is not None and not (isinstance(value, int | float) and abs(value) < 2**63):
        raise UserError(
            f"got {_short_repr(value)} in a config; expected finite numbers, strings, booleans, lists or null"
        )


def _is_plain(text: str) -> bool:
    return "${" not in text and text.isprintable() and len(text) <= MAX_LENGTH


def _checked(config: Any, allowed: Collection[str]) -> Callable[[], Any]:
    """A function that builds a component; its complete config is checked first."""
    if not isinstance(config, Mapping) or not isinstance(name := config.get("name"), str) or name not in allowed:
        got = config.get("name") if isinstance(config, Mapping) else config
        raise UserError(f"got the component {_short_repr(got)}; expected one of {', '.join(allowed)}")
    component = TABLE[name]
    kind = _class(component.path)
    given = {key: value for key, value in config.items() if key != "name"}
    parts = {key: given.pop(key) for key in component.nested if given.get(key) is not None}
    options = {key: given.pop(key) for key in component.options if key in given}
    _check_arguments(name, kind, given, {*parts, *options})
    nested = {key: _checked(value, component.nested[key]) for key, value in parts.items()}
    for key, value in options.items():
        if not isinstance(value, Mapping):
            raise UserError(f"got {key}={_short_repr(value)} for {name}; expected named values")
        _check_arguments(f"{name}.{key}", _class(component.options[key]), value, ())

    return lambda: kind(**given, **options, **{key: build_part() for key, build_part in nested.items()})


def _check_arguments(name: str, kind: type, given: Mapping[str, Any], others: Collection[str]) -> None:
    """Raise UserError unless these are the arguments of the constructor, complete and each of its type."""
    parameters = inspect.signature(kind).parameters
    if unknown := sorted(given.keys() - parameters.keys()):
        raise UserError(f"got the argument {_short_repr(unknown[0])} for {name}; expected {', '.join(parameters)}")
    required = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in given and key not in others]:
        raise UserError(f"got {name} without its argument {missing[0]}; add it")
    hints = typing.get_type_hints(kind.__init__)
    for key, value in given.items():
        if not (value is None and parameters[key].default is None) and not _fits(value, hints.get(key)):
            hint = inspect.formatannotation(parameters[key].annotation)
            raise UserError(
                f"got {key}={_short_repr(value)} for {name}; expected {hint}, numbers up to {MAX_NUMBER} and depths up "
                f"to {MAX_LAYERS}"
            )
        if key in DEPTHS and any(isinstance(n, int) and n > MAX_LAYERS for n in _items(value)):
            raise UserError(f"got {key}={_short_repr(value)} for {name}; expected at most {MAX_LAYERS}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has an annotated type; lists are accepted as tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str)  # the constructor checks the choices
    if isinstance(origin, type) and issubclass(origin, Sequence):
        items = [argument for argument in arguments if argument is not Ellipsis]
        if not isinstance(value, list | tuple) or not items or ({int, bool} & {*items} and len(value) > MAX_LAYERS):
            return False
        return all(_fits(item, items[0]) for item in value)
    if hint in (None, type(None)):
        return value is None
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    return hint is float and isinstance(value, int | float) and not isinstance(value, bool)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _short_repr(value: Any) -> str:
    """The repr of a value, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

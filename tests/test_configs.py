"""Every experiment, objective, autoencoder and model composes, and its components can be built."""

import inspect
import re
import shlex
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from avatar.__main__ import COMMANDS
from avatar.cli import CONFIGS
from avatar.commands.summarize import summarize
from avatar.models import bundle
from avatar.puppet.worlds import StateWorld
from avatar.types import Bundle

EXPERIMENTS = sorted(path.stem for path in Path(CONFIGS, "experiment").glob("*.yaml"))
AUTOENCODERS = {"nano": "nano", "states": "states"}
WITHOUT_FOLDER = ("convert", "summarize", "gallery")
STAGES = ("teacher_forcing", "consistency", "dmd")


def composed(config: str, *overrides: str):
    named = ["name=test"] if config in ("train", "distill") else []
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose(config, overrides=["folder=/tmp/run", *named, *overrides])


def write_bundle(cfg, kind: str, path: Path) -> str:
    network = OmegaConf.to_container(cfg.model.network, resolve=True)
    weights = bundle.new(network).state_dict()
    config = {"network": network, "audio": OmegaConf.to_container(cfg.audio), "text": OmegaConf.to_container(cfg.text)}
    bundle.write(Bundle(kind, weights, config), path)
    return str(path)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("objective", ["flow_matching", *STAGES])
def test_every_experiment_instantiates_at_every_stage(experiment, objective, tmp_path):
    kinds = {
        "teacher_forcing": ("teacher", "teacher"),
        "consistency": ("causal_teacher",) * 2,
        "dmd": ("student", "teacher"),
    }
    extra = []
    if objective in kinds:
        base = composed("train", f"experiment={experiment}")
        init, teacher = kinds[objective]
        extra = [
            f"init={write_bundle(base, init, tmp_path / 'init.safetensors')}",
            f"teacher={write_bundle(base, teacher, tmp_path / 'teacher.safetensors')}",
        ]
    place = f"folder={tmp_path}"
    cfg = composed("distill" if extra else "train", f"experiment={experiment}", f"objective={objective}", *extra, place)
    module = hydra.utils.instantiate(cfg.objective)
    optimizers = module.configure_optimizers()
    assert len(optimizers) == 2  # an optimiser and its schedule, or those of student and critic
    hydra.utils.instantiate(cfg.sampler)
    data = hydra.utils.instantiate(cfg.data)
    assert data.autoencoder.channels == module.net.channels and data.sets["train"].count == cfg.data.train.count
    check_run(cfg)


LARGE = {  # experiment -> (script, objective, model) of the commands in its header
    "large/teacher": [("train", "flow_matching", "wan_1_3b"), ("distill", "teacher_forcing", "wan_14b")],
    "large/consistency": [("distill", "consistency", "wan_1_3b")],
    "large/dmd": [("distill", "dmd", "dit_20b")],
}
LARGE_STAGES = [(experiment, *stage) for experiment, stages in LARGE.items() for stage in stages]


def test_every_large_experiment_has_a_test():
    folder = Path(CONFIGS, "experiment")
    found = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml")}
    assert found - {"large/shared"} == set(LARGE)  # shared is the base of the others


@pytest.mark.parametrize("experiment, script, objective, model", LARGE_STAGES)
def test_every_large_experiment_instantiates_on_meta(experiment, script, objective, model, monkeypatch):
    given = ["init=a.safetensors", "teacher=b.safetensors"] if script == "distill" else []
    cfg = composed(
        script, f"experiment={experiment}", f"objective={objective}", f"model={model}", "data.urls=data/myset", *given
    )
    monkeypatch.setattr(bundle, "load", lambda path, kinds: hydra.utils.instantiate(cfg.model))
    with torch.device("meta"):
        module = hydra.utils.instantiate(cfg.objective)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert module.net.channels == cfg.latent.channels == 16
    assert len(module.configure_optimizers()) == 2
    transforms = hydra.utils.instantiate(cfg.transforms, _convert_="all")
    assert transforms["net"]["checkpointing"] is not None and transforms["net"]["compiled"] is not None
    check_run(cfg)


def check_run(cfg) -> None:
    """Build the callbacks, loggers and trainer of a run."""
    callbacks = list(hydra.utils.instantiate(cfg.callbacks).values())
    loggers = list(hydra.utils.instantiate(cfg.logger).values())
    trainer = hydra.utils.instantiate(cfg.trainer, accelerator="cpu", callbacks=callbacks, logger=loggers)
    assert trainer.callbacks[0] is callbacks[0] and set(callbacks) <= set(trainer.callbacks)
    assert trainer.loggers == loggers and trainer.default_root_dir == cfg.folder


@pytest.mark.parametrize("autoencoder, model", AUTOENCODERS.items())
def test_every_model_fits_its_latents_and_its_encoders(autoencoder, model):
    cfg = composed("train", f"autoencoder={autoencoder}", f"model={model}")
    with torch.device("meta"):
        net = hydra.utils.instantiate(cfg.model)
    net_of_latents = hydra.utils.instantiate(cfg.autoencoder)
    audio = hydra.utils.instantiate(cfg.audio)
    assert net.channels == net_of_latents.channels == cfg.latent.channels
    strides = (net_of_latents.temporal_stride, net_of_latents.spatial_stride)
    assert strides == (cfg.latent.temporal_stride, cfg.latent.spatial_stride)
    assert net.audio.place.shape[1] == audio.tokens(net_of_latents.temporal_stride)
    assert net.audio.mlp[0].in_features == audio.dim
    assert len(net.text.place) == cfg.text.max_bytes


@pytest.mark.parametrize("objective", ["autoencoder", "decoder_distillation"])
def test_the_training_of_autoencoders_instantiates(objective):
    cfg = composed("train", f"objective={objective}")
    module = hydra.utils.instantiate(cfg.objective)
    assert module.net.channels == cfg.latent.channels
    data = hydra.utils.instantiate(cfg.data)
    assert data.frames % module.net.temporal_stride == 1
    check_run(cfg)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes(name):
    required = {"convert": ["out=a.safetensors"], "preprocess": ["source=a", "out=b"]}.get(name, [])
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose(name, overrides=required if name in WITHOUT_FOLDER else ["folder=/tmp/run", *required])
    assert OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("name", ["dit_20b", "wan_5b"])
def test_a_model_is_summarized_from_its_config(name, capsys):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        summarize(compose("summarize", [f"model={name}"]))
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("autoencoder, size", {"nano": 64, "wan21": 128, "wan22": 256, "ltx": 256}.items())
def test_an_autoencoder_implies_a_puppet_size_that_can_be_overridden(autoencoder, size):
    cfg = composed("train", f"autoencoder={autoencoder}")
    assert cfg.puppet.size == size and size % cfg.latent.spatial_stride == 0
    assert composed("train", "puppet=256px", f"autoencoder={autoencoder}").puppet.size == 256
    assert composed("infer", f"autoencoder={autoencoder}").size == size


def test_the_autoencoder_of_states_implies_their_puppets():
    for overrides in (["autoencoder=states"], ["autoencoder=states", "puppet=states"]):
        cfg = composed("train", "model=states", *overrides)
        assert isinstance(hydra.utils.instantiate(cfg.puppet), StateWorld)
        assert cfg.model.network.channels == cfg.latent.channels == 84


@pytest.mark.parametrize(
    "encoder, dim, layers, tokens",
    [("log_mel", 160, 1, 9), ("wav2vec2", 9984, 13, 7), ("hubert", 9984, 13, 7), ("whisper", 1920, 5, 7)],
)
@pytest.mark.parametrize("model", ["nano", "states", "wan_1_3b"])
def test_an_audio_encoder_sets_the_sizes_of_the_model(encoder, dim, layers, tokens, model):
    network = composed("train", f"audio_encoder={encoder}", f"model={model}").model.network
    assert (network.audio_features, network.audio_layers, network.audio_tokens) == (dim, layers, tokens)
    wider = composed("train", f"audio_encoder={encoder}", f"model={model}", "audio.left_context=5").model.network
    assert wider.audio_tokens == tokens + 2


def test_a_text_encoder_sets_the_text_layers_of_the_model():
    features = composed("train", "text_encoder=umt5").model.network.text
    assert (features._target_.rpartition(".")[2], features.features, features.dim) == ("TextProjection", 4096, 192)
    with torch.device("meta"):
        hydra.utils.instantiate(composed("train", "text_encoder=umt5", "audio_encoder=hubert").model)
    longer = composed("train", "text.max_bytes=128").model.network.text
    assert longer.max_bytes == 128 and longer.width == 64


@pytest.mark.parametrize("debug, steps", {"fast": 1, "overfit": 300, "profiler": 20}.items())
@pytest.mark.parametrize("data", ["", "objective=autoencoder", "data=shards data.urls=U"])
def test_debug_configs_compose_with_all_data(debug, steps, data):
    cfg = composed("train", *data.split(), f"debug={debug}")
    assert cfg.steps == steps and OmegaConf.to_container(cfg, resolve=True)
    inspect.signature(hydra.utils.get_class(cfg.data._target_)).bind(**{k: None for k in cfg.data if k[0] != "_"})


def test_every_experiment_documents_its_command():
    for name in EXPERIMENTS:
        assert f"experiment={name}" in Path(CONFIGS, "experiment", f"{name}.yaml").read_text().split("\n\n")[0]


def test_sizes_of_the_audio_encoder_follow_its_settings():
    assert composed("train", "audio.mels=80").model.network.audio_features == 320
    speech = composed("train", "audio_encoder=wav2vec2", "audio.layers=[0,6,12]").model.network
    assert (speech.audio_features, speech.audio_layers) == (3 * 768, 3)
    whisper = composed("train", "audio_encoder=whisper").model.network
    assert (whisper.audio_features, whisper.audio_layers) == (5 * 384, 5)


@pytest.mark.parametrize(
    "script, line",
    [
        ("train", "experiment=large/teacher model=wan_1_3b"),
        ("distill", "experiment=large/teacher objective=teacher_forcing teacher=T"),
        ("distill", "experiment=large/consistency teacher=T"),
        ("distill", "experiment=large/dmd objective=dmd init=S teacher=T"),
    ],
)
def test_settings_of_large_experiments_are_arguments_of_their_stages(script, line):
    cfg = composed(script, *line.split(), "data.urls=U")
    inspect.signature(hydra.utils.get_class(cfg.objective._target_)).bind(
        **{key: None for key in cfg.objective if not key.startswith("_")}
    )
    for key in ("optimizer", "critic_optimizer"):
        if key in cfg.objective:
            hydra.utils.instantiate(cfg.objective[key])([torch.nn.Parameter(torch.zeros(1))])
    if "timesteps" in cfg.objective:
        assert hydra.utils.instantiate(cfg.objective.timesteps)(1000).median() > 0.75
    assert hydra.utils.instantiate(cfg.plan).chunks(20)[:2] == (1, 3)
    assert hydra.utils.instantiate(cfg.data.buckets).count(20, 60 * 104) == 64
    assert cfg.transforms.net.compiled and cfg.trainer.precision == "bf16-mixed"


def documented_commands() -> list[tuple[str, list[str]]]:
    """The config and the overrides of each command in the READMEs, of a sweep the first of its runs."""
    root, found = Path(CONFIGS).parent, []
    for text in ((root / name).read_text() for name in ("README.md", "data/README.md")):
        for line in re.findall(r"^    ((?:python|srun|torchrun) .+)$", text.replace("\\\n", " "), re.MULTILINE):
            command = re.search(r"(?:(train|distill|infer)\.py|-m avatar (\w+))\b(.*)", line)
            if command is None:
                continue
            words = [word for word in shlex.split(command[3], comments=True) if word != "…" and "hydra/" not in word]
            if "-m" in words:
                words = [re.sub(r",[^=]*$", "", word) for word in words if word != "-m"]
            found.append((command[1] or command[2], [word.replace("…", "X") for word in words]))
    return found


@pytest.mark.parametrize(
    "config, overrides",
    documented_commands(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:90],
)
def test_documented_commands_compose(config, overrides):
    folder = [] if config in WITHOUT_FOLDER or any(o.startswith("folder=") for o in overrides) else ["folder=/tmp/run"]
    named = ["name=test"] if config in ("train", "distill") else []
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose(config, overrides=[*folder, *named, *overrides])
    if not OmegaConf.missing_keys(cfg):
        assert OmegaConf.to_container(cfg, resolve=True)


def test_commands_are_found_in_the_documents():
    commands = documented_commands()
    assert len(commands) > 25 and {"train", "distill", "infer", "evaluate", "preprocess"} <= {
        name for name, _ in commands
    }
    assert ("train", ["seed=1", "objective.region_weights.lips=0"]) in commands


def test_a_sweeps_folder_is_named_before_its_runs_start():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["objective=flow_matching"], return_hydra_config=True)
    assert cfg.hydra.sweep.dir.endswith("-flow_matching")

"""Train an autoencoder or a teacher: `python train.py objective=flow_matching seed=1`; sweep with `-m seed=1,2`."""

import hydra

from avatar import cli

if __name__ == "__main__":
    cli.main("train", lambda cfg: hydra.utils.get_method(cfg.task)(cfg))

"""Train an autoencoder or a teacher: `python train.py objective=flow_matching seed=1`; sweep with `-m seed=1,2`."""

from avatar import cli
from avatar.training.fit import fit

if __name__ == "__main__":
    cli.main("train", fit)

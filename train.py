"""Train an autoencoder or a teacher: `python train.py objective=flow_matching seed=1`; sweep with `-m seed=1,2`."""

from avatar import threads

if __name__ == "__main__":
    threads.shorten_spinning()  # before torch is imported

    from avatar import cli, process
    from avatar.training.fit import fit

    cli.main("train", fit)
    process.end_process_group()

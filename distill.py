"""Distil a teacher into a causal few-step student, stage by stage.

python distill.py objective=teacher_forcing teacher=TEACHER     the causal teacher
python distill.py objective=consistency teacher=CAUSAL          jumps along its trajectories
python distill.py objective=dmd init=STUDENT teacher=TEACHER    distribution matching on the student's own rollouts
"""

from avatar import threads

if __name__ == "__main__":
    threads.shorten_spinning()  # before torch is imported

    from avatar import cli, process
    from avatar.training.fit import fit

    cli.main("distill", fit)
    process.end_process_group()

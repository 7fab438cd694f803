# shellcheck shell=bash
# Site settings that are no options of sbatch. Every job sources this first, in the project's directory.
#
# What has to be loaded before .venv works, and its like:
# module load gcc openmpi
# A disk of the node's own for spilled checkpoints, where Slurm names none in SLURM_TMPDIR (else TMPDIR, else /tmp):
# export SLURM_TMPDIR=/local/$SLURM_JOB_ID
# The image of train_container.sbatch, and the PMI that the MPI in it speaks:
# export PNODE_DIST_IMAGE=pnode-dist.sif
export PNODE_DIST_CONTAINER_PMI=${PNODE_DIST_CONTAINER_PMI:-pmi2}

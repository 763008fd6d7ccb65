#!/bin/bash{{ " -l" if modules }}
# cryoiso under Slurm, written by 'cryoiso launch'. Submit it with sbatch; submitted again it goes on where it stopped.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node={{ ranks_per_node }}
#SBATCH --cpus-per-task={{ cpus_per_rank }}
{% if gpus %}
#SBATCH --gres=gpu:{{ gpu_type ~ ":" if gpu_type }}{{ gpus }}
{% endif %}
{% if ram_gb %}
#SBATCH --mem={{ ram_mb }}M
{% endif %}
#SBATCH --time={{ time }}
{% if account %}
#SBATCH --account={{ account }}
{% endif %}
{% if queue %}
#SBATCH --partition={{ queue }}
{% endif %}
# Before its end the job gets USR1, writes a checkpoint and stops with exit status 75. With "B:" the signal goes to this
# script, which hands it on; without it, to the ranks that srun started.
#SBATCH --signal={{ "" if srun and not image else "B:" }}USR1@{{ grace_s }}
#SBATCH --{{ "requeue=expedite" if expedite else "requeue" if requeue else "no-requeue" }}
#SBATCH --open-mode=append
#SBATCH --output={{ (log|replace("%", "%%") ~ "-%j.log")|word }}
{% for line in extra %}
#SBATCH {{ line }}
{% endfor %}

{% include "prepare.sh" %}
{% if not srun %}
export SLURM_MPI_TYPE=none    # mpirun starts its own helpers by srun, and they are no ranks
{% endif %}

{% if image %}
export CRYOISO_END_TIME=${SLURM_JOB_END_TIME:-$(($(date +%s) + {{ seconds }}))}    # in the image nobody can ask squeue
{% endif %}
echo "cryoiso: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"
{% include "work.sh" %}
{% if requeue %}

if again; then
  if scontrol requeue "$SLURM_JOB_ID"; then
    echo "cryoiso: queued again as job $SLURM_JOB_ID; it goes on from its last checkpoint"
    set +m; trap - TERM    # Slurm ends this script now. If it ended by itself, the job could count as failed
    sleep 300
  else
    echo "cryoiso: this job may not requeue itself; submit the same script again, it goes on from its last checkpoint" \
      {{ ("and after it " ~ then if then else "")|sh }} >&2
  fi
fi
{% endif %}
exit "$status"

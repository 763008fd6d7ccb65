#!/bin/bash{{ " -l" if modules }}
# cryoiso under PBS Pro, written by 'cryoiso launch'. Submit it with qsub; submitted again it goes on where it stopped.
#PBS -N {{ name }}
#PBS -l select={{ nodes }}:ncpus={{ cpus_per_node }}:mpiprocs={{ ranks_per_node }}:ompthreads={{ cpus_per_rank }}
{%- if gpus %}:ngpus={{ gpus }}{% endif %}
{%- if gpu_type %}:gpu_type={{ gpu_type }}{% endif %}
{%- if ram_gb %}:mem={{ ram_mb }}mb{% endif %}

#PBS -l place=scatter
#PBS -l walltime={{ time }}
{% if account %}
#PBS -A {{ account }}
{% endif %}
{% if queue %}
#PBS -q {{ queue }}
{% endif %}
#PBS -r {{ "y" if requeue else "n" }}
#PBS -j oe
#PBS -o {{ folder|word }}
{% for line in extra %}
#PBS {{ line }}
{% endfor %}

exec >> {{ log|sh }}-"${PBS_JOBID%%.*}".log 2>&1    # appends, where PBS would begin anew after a requeue
cd {{ folder|sh }} || exit 69
{% include "prepare.sh" %}

# PBS ends a job with TERM and, seconds later, KILL: too late for a checkpoint. So this script is its own alarm clock.
set -m
(sleep {{ [seconds - grace_s, 1]|max }} && kill -USR1 $$) &
clock=$!
export CRYOISO_JOB_START=$(date +%s)    # a requeued job keeps its number
export CRYOISO_END_TIME=$((CRYOISO_JOB_START + {{ seconds }}))
echo "cryoiso: job $PBS_JOBID on $(sort -u "$PBS_NODEFILE" | xargs), $(date)"
{% include "work.sh" %}
kill -- "-$clock" 2>/dev/null
{% if requeue %}

if again; then
  if qrerun "$PBS_JOBID" 2>/dev/null; then
    echo "cryoiso: queued again as job $PBS_JOBID; it goes on from its last checkpoint"
    set +m; trap - TERM    # PBS ends this script now
    sleep 300
  elif [ -f {{ script|sh }} ] && next=$(qsub {{ script|sh }}); then
    echo "cryoiso: goes on from its last checkpoint in job $next"
{% if then %}
    # the job that waited for this one is dropped when this one ends with 75
    last=$(qsub -W "depend=afterok:$next" {{ then|sh }}) && echo "cryoiso: the rest of the run follows in job $last"
{% endif %}
  else
    echo "cryoiso: this job may not requeue itself; submit the same script again, it goes on from its last checkpoint" \
      {{ ("and after it " ~ then if then else "")|sh }} >&2
  fi
fi
{% endif %}
exit "$status"

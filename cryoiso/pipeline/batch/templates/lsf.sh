#!/bin/bash{{ " -l" if modules }}
# cryoiso under LSF, written by 'cryoiso launch'. Submit it with: bsub < SCRIPT; submitted again it goes on where it stopped.
#BSUB -J {{ name }}
#BSUB -n {{ cpus_total }}
#BSUB -R "span[ptile={{ cpus_per_node }}]"
{% if gpus %}
#BSUB -gpu "num={{ gpus }}:mode=shared:j_exclusive=yes{{ ":gmodel=" ~ gpu_type if gpu_type }}"
{% endif %}
{% if ram_gb %}
#BSUB -R "rusage[mem={{ ram_mb }}MB]"
{% endif %}
#BSUB -W {{ time_hm }}
{% if account %}
#BSUB -P {{ account }}
{% endif %}
{% if queue %}
#BSUB -q {{ queue }}
{% endif %}
# Before its end the job gets USR1, writes a checkpoint and stops with exit status 75.
#BSUB -wa USR1
#BSUB -wt {{ grace_min }}
{% if requeue %}
#BSUB -r
#BSUB -Q "75"
{% endif %}
#BSUB -o {{ (log ~ "-%J.log")|word }}
{% for line in extra %}
#BSUB {{ line }}
{% endfor %}

{% include "prepare.sh" %}

export CRYOISO_JOB_START=$(date +%s)    # a requeued job keeps its number
export CRYOISO_END_TIME=$((CRYOISO_JOB_START + {{ seconds }}))
echo "cryoiso: job $LSB_JOBID on $LSB_HOSTS, $(date)"
{% include "work.sh" %}
{% if requeue %}

# LSF queues a job again that ends with 75 (-Q above). What must not come again ends with another status.
if [ "$status" -eq 75 ] && ! again; then
  exit 1
fi
{% endif %}
exit "$status"

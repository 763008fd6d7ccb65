{% for module in modules %}
module load {{ module|words }} || exit 69
{% endfor %}
{% for line in setup %}
{{ line }}
{% endfor %}
{% if bin %}
export PATH={{ bin|sh }}:"$PATH"
{% endif %}
{% for key, value in environment.items() %}
export {{ key }}={{ value|sh }}
{% endfor %}
{% if image_digest %}
# The run notes which image it was done with, if that still is the file that this script was written for.
[ "$(stat -Lc '%s %Y' {{ image_file|sh }})" != "{{ image_stat }}" ] || export CRYOISO_IMAGE_DIGEST={{ image_digest }}
{% endif %}
export OMP_NUM_THREADS={{ cpus_per_rank }}    # the last bits of a result depend on it: the same in every job of a run
{% if not srun %}
# Open MPI: a rank may use all cores of the job, not one alone
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
{% endif %}
{% if gpus %}
export CRYOISO_GPUS={{ gpus }}    # of each node: a rank that sees none stops, instead of computing for hours on CPUs
{% endif %}
{% if image and (node_folders or slurm_folders) %}
{% include "image.sh" %}
{% endif %}

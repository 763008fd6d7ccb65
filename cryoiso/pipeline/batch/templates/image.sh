# What the image has to see beside the folders named in its command, where this node has it: the node's own disk for
# run.scratch (its topmost folder, for those below may have other names on other nodes), and Slurm's folders, in which
# its PMIx and the MPI of the ranks meet.
while read -r folder; do
  [ ! -d "$folder" ] || {{ bind }}="{{ '${' ~ bind ~ ':+$' ~ bind ~ ',}$folder' }}"
done < <(
{% for folder in node_folders %}
  echo {{ folder }} | sed -nE 's,^(/(var|run|opt|mnt|media|srv)/[^/]+|/[^/]+).*,\1,p'
{% endfor %}
{% if slurm_folders %}
  scontrol show config | sed -nE 's,/[^/]*%.*,,; s/^(SlurmdSpoolDir|TmpFS) *= *//p'
{% endif %}
)
export {{ bind }}

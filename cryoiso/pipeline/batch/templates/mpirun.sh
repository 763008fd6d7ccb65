#!/bin/bash{{ " -l" if modules }}
# cryoiso without a batch system, written by 'cryoiso launch'. Start it with: bash SCRIPT; started again it goes on where
# it stopped. USR1 makes it write a checkpoint and go on in new processes, TERM or Ctrl-C write a checkpoint and leave.

exec >> {{ log|sh }}.log 2>&1
cd {{ folder|sh }} || exit 69
{% include "prepare.sh" %}

while :; do
  echo "cryoiso: on $(hostname), $(date)"
  {% include "work.sh" %}
{% if requeue %}
  again || break
{% else %}
  break
{% endif %}
done
exit "$status"

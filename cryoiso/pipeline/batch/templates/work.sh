# The ranks have a process group of their own, so that only the traps pass signals on. wait is called again after a trap.
set -m
told='' stopped='' status=''
{% if srun and image %}
# Only the first rank is told, which tells the others. Its host, number and numbering are in the lock of the run. Slurm may
# send a signal to all processes of a step (proctrack/linuxproc), and those that show an image to its ranks would end.
tell() {
  local host='' pid='' numbering=''
  read -r host pid numbering < <(
    sed -nE 's/.*"host": "([^"]*)", "pid": ([1-9][0-9]*), "numbering": "([^"]*)".*/\1 \2 \3/p' {{ lock|sh }} 2>/dev/null)
  [ "$host $numbering" = "$(hostname) $(readlink /proc/self/ns/pid)" ] && kill -USR1 "$pid" 2>/dev/null ||
    kill -USR1 "$ranks" 2>/dev/null
}
{% else %}
tell() { kill -USR1 "$ranks" 2>/dev/null; }
{% endif %}
trap 'told=1; tell' USR1
trap 'told=1; stopped=1; tell' TERM INT
# The first start and all later ones: --continue goes on with what the run folder holds.
{{ command }} < /dev/null &
ranks=$!
until [ -n "$status" ]; do
  told=''
  wait "$ranks"
  code=$?
  [ -n "$told" ] || status=$code
done

# Whether to go on in another job: after a checkpoint (75), unless somebody cancelled this one, or the last three got no
# further than each other. The journal of the run has a line for every event.
again() {
  [ "$status" -eq 75 ] && [ -z "$stopped" ] || return 1
  local idle
  idle=$(cat {{ journal|sh }} 2>/dev/null |
    awk '/"event": "(checkpoint|end)"/ {n = 0} /"event": "stop"/ {n++} END {print n + 0}')
  [ "$idle" -lt 3 ] && return 0
  echo "cryoiso: three times in a row the run got no further before it was stopped; it is not started again." \
    "Give it more time (launch.time), or more nodes." >&2
  return 1
}

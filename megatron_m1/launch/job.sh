# ======== From here on the same in every script of slurm/ and in what `m1 launch slurm` writes. ========
# One step trains. When it ends, either the run is finished, or it stopped in good order and the job is queued again, or
# it broke and is queued again for as long as its starts make progress. Nothing here traps a signal: bash loses them, so
# Slurm sends them straight to the ranks, which agree, save and leave.
set -euo pipefail
cd -- "$WORK_DIR"
logs=$RUN_DIR/logs notes=$RUN_DIR/slurm outcome=$RUN_DIR/outcome.txt
mkdir -p -- "$logs" "$notes"
this=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
say() { printf '%(%FT%T)T job %s: %s\n' -1 "$this" "$*"; }

# Every rank meets the others at the first node, on a port that only this job uses (and the next one, in preflight).
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 6000 * 2))
# The ranks save before this; older Slurms do not export it.
export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s)}
# Since Slurm 22.05 srun does not take this over from sbatch by itself.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export PYTHONUNBUFFERED=1

give_up() {
  printf 'gave up: %s\n' "$1" > "$outcome"
  say "giving up: $1. Delete $outcome to try again."
  exit 1
}
queue_again() {
  say "queued again: $1"
  if [[ $CONTINUE == requeue ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    # The requeue ends this script as well: nothing after it may matter.
    sleep 600
  fi
  # With a chain the next job of it goes on, whatever became of this one.
  exit 0
}
newest_checkpoint() {
  local all=("$RUN_DIR"/checkpoints/step_????????)
  [[ -e ${all[-1]} ]] && echo "${all[-1]##*_}" || echo none
}
starts_without_progress() { # the last starts in a row that found the checkpoint that is still the newest
  local count=0 found now
  now=$(newest_checkpoint)
  while read -r _ found; do
    if [[ $found == "$now" ]]; then count=$((count + 1)); else count=0; fi
  done < "$notes/starts.txt"
  echo "$count"
}

# Left behind by an earlier job of a chain.
if [[ -e $outcome && $(< "$outcome") == @(finished|gave up)* ]]; then
  say "nothing to do: $(< "$outcome"). Delete $outcome to go on."
  [[ $(< "$outcome") == finished* ]]
  exit
fi

# NAME is "preflight" or "train"; %j is not used, because a requeued job keeps its number.
step() { # step NAME SRUN-OPTIONS... -- ARGUMENTS OF m1
  local name=$1 options=("${CONTAINER[@]}")
  shift
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  local pattern=${logs//%/%%}/$this.%s.$name.%t.log
  if [[ $name == train && $LAUNCHER == torchrun ]]; then
    # $SLURM_NODEID must be the task's own, so the inner shell reads it.
    srun "${options[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --output="$pattern" --open-mode=append \
      bash -c 'exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"' \
      "$PYTHON" --nproc-per-node="$((SLURM_NTASKS / SLURM_NNODES))" -m megatron_m1 "$@"
  else
    srun "${options[@]}" --output="$pattern" --open-mode=append "$PYTHON" -m megatron_m1 "$@"
  fi
}

if ((${#PREFLIGHT[@]})); then
  bad=$notes/bad-nodes.$this
  if ! step preflight --kill-on-bad-exit=0 --wait=0 -- launch preflight "${PREFLIGHT[@]}" --run-dir "$RUN_DIR" \
    --bad-nodes "$bad" --nodes "$(IFS=,; echo "${nodes[*]}")"; then
    [[ -s $bad ]] || give_up "the nodes could not be checked, or all of them are bad; see $logs/$this.*.preflight.0.log"
    say "bad nodes: $(< "$bad"); see $logs/$this.*.preflight.0.log"
    # Nodes can be excluded only from a waiting job, so it is queued first; TERM comes with that, KILL a while later.
    trap '' TERM
    scontrol requeuehold "$SLURM_JOB_ID"
    excluded=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$([[ $excluded == "(null)" ]] || echo "$excluded,")$(< "$bad")"
    scontrol release "$SLURM_JOB_ID"
    exit 0
  fi
fi

echo "$this $(newest_checkpoint)" >> "$notes/starts.txt"
rm -f -- "$outcome"
code=0
step train --kill-on-bad-exit=1 --wait=300 -- "${COMMAND[@]}" || code=$?
# The ranks wrote it after the last save, so it counts whatever became of them afterwards.
if [[ -e $outcome ]]; then
  [[ $(< "$outcome") != finished* ]] || { say "$(< "$outcome")"; exit 0; }
  queue_again "$(< "$outcome")"
fi
why="training ended with exit code $code at checkpoint $(newest_checkpoint); see $logs/$this.*.train.*.log"
# 2 is a user's mistake: another start would only repeat it.
((code != 2)) || give_up "m1 refused the run; see $logs/$this.*.train.0.log"
count=$(starts_without_progress)
((count < MAX_STARTS)) || give_up "$count starts in a row brought no new checkpoint; the last: $why"
queue_again "$why"

#!/usr/bin/env bash
# A SLURM of one node for the tests, with Debian's packages, as root: slurm.sh start|stop FOLDER
set -euo pipefail
action=$1 folder=$2
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf

if [ "$action" = stop ]; then
    for name in slurmd slurmctld; do
        kill "$(cat "$folder/$name.pid")" || true
    done
    exit
fi

command -v slurmctld munged >/dev/null || {
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurm-wlm munge
}
if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge
    chown munge: /run/munge
    runuser -u munge -- munged
fi
mkdir -p "$folder"/{state,spool,log}
cat >"$SLURM_CONF" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
AuthType=auth/munge
CryptoType=crypto/munge
CommunicationParameters=NoAddrCache
# neither cgroups nor accounting: this runs in containers
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=tests Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
slurmctld
slurmd -N "$host"
for _ in $(seq 60); do
    if sinfo --noheader --format=%T 2>/dev/null | grep --quiet idle; then exit; fi
    sleep 0.5
done
tail -n 20 "$folder"/log/*.log >&2
exit 1

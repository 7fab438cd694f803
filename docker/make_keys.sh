#!/usr/bin/env bash
# Makes the keys by which the head of compose.yaml logs in to its workers, unless they are there already.
set -euo pipefail
umask 077
cd "${1:-/keys}"
if [ -f known_hosts ]; then exit 0; fi
rm -f id_ed25519* host_ed25519*
ssh-keygen -q -t ed25519 -N '' -C head -f id_ed25519
ssh-keygen -q -t ed25519 -N '' -C worker -f host_ed25519
cp id_ed25519.pub authorized_keys
printf 'worker %s\n' "$(cat host_ed25519.pub)" >known_hosts.new
mv known_hosts.new known_hosts

#!/bin/sh
# Starts a command of the image. The token of a service comes as a secret, which group or others may read; workers
# take only a file of their own.
set -eu

secret=/run/secrets/eagle_rpc/token
if [ -r "$secret" ]; then
  (umask 077 && mkdir -p "$HOME/.eagle_rpc")
  install -m 600 "$secret" "$HOME/.eagle_rpc/token"
fi
exec "$@"

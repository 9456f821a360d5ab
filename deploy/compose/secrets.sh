#!/usr/bin/env bash
# Makes the secrets that compose.yaml names, once; files that exist stay as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# The folder is yours alone; the files in it are read inside containers by users of their own.
install -d -m 700 secrets
for name in postgres_password admin_key metrics_key grafana_password; do
  [ -s "secrets/$name" ] || python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "secrets/$name"
done
[ -s secrets/registry_url ] \
  || printf 'postgresql://safegene:%s@postgres/safegene' "$(cat secrets/postgres_password)" > secrets/registry_url
chmod 644 secrets/*

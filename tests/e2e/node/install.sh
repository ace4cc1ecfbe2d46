#!/usr/bin/env bash
# Installs the openai npm package that the tests with Node use, into .tools/node of this tree.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
target="$(cd "$here/../../.." && pwd)/.tools/node"

mkdir -p "$target"
cp "$here/package.json" "$here/package-lock.json" "$target/"
cd "$target"
npm ci --no-audit --no-fund

#!/usr/bin/env bash
# The demonstration: a code is planted more than 16,384 tokens back in a text and asked for, and a
# story is told; memory is planned first and compared with what was used.  Ends with 0 when the
# answer was right.
#   bash examples/demo.sh build/bin/fathom examples/models/trained.Q8_0.gguf
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fathom="${1:-$here/../build/bin/fathom}"
model="${2:-$here/models/trained.Q8_0.gguf}"
shift $(($# < 2 ? $# : 2))

if [ ! -x "$fathom" ]; then
  printf 'demo: %s is not there; build first: cmake/dev build\n' "$fathom" >&2
  exit 2
fi
exec "$fathom" demo -m "$model" "$@"

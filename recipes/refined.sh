#!/bin/sh
# The best twin that two cores make of a small model in an hour and a quarter: converted, refined on the same broad
# text, and measured on kinds of text, those it has not seen above all.
#
#   recipes/refined.sh MODEL OUT [SOURCE[=SHARE] …]
#
# Without sources the defaults are read: broad text from the Hub, or what there is without a network.
# KINDS="novel=alice.txt drama=hamlet.txt"    further kinds to measure on
# SEEN="novel"                                those that were seen, though the names of the texts do not tell
# TOKENS=1200k, CONVERT_TOKENS=65536          what is trained and calibrated on; LENGTH=256 tokens a training window
# An interrupted run goes on where it stopped; what stands is not done again.
set -eu
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model="$1" out="$2"
shift 2
calibration="" text="" kinds=""
for source in "$@"; do
  calibration="$calibration --calibration $source"
  text="$text --text $source"
done
for kind in ${KINDS:-}; do
  kinds="$kinds --text $kind"
done
for kind in ${SEEN:-}; do
  kinds="$kinds --seen $kind"
done
# Sources are words without spaces, so that the lists may be split.
# shellcheck disable=SC2086
[ -f "$out/closed-form/surgery.json" ] ||
  surgery convert "$model" -o "$out/closed-form" $calibration --tokens "${CONVERT_TOKENS:-65536}"
# shellcheck disable=SC2086
[ -f "$out/refined/surgery.json" ] ||
  surgery refine "$out/closed-form" --teacher "$model" -o "$out/refined" $text --tokens "${TOKENS:-1200k}" --length "${LENGTH:-256}"
for twin in closed-form refined; do
  # shellcheck disable=SC2086
  python benchmarks/texts.py "$out/$twin" --against "$model" $kinds
done

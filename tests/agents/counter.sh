#!/bin/sh
# Writes a numbered line every 100 ms. Ends with status 0 on SIGTERM.
trap 'exit 0' TERM INT
number=0
while :; do
    number=$((number + 1))
    echo "$number"
    sleep 0.1
done

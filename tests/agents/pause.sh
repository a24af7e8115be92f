#!/bin/sh
# Holds a sandbox until it is told to end.
trap 'exit 0' TERM INT
while :; do
    sleep 86400 &
    wait $!
done

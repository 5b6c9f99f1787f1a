#!/bin/sh
# The conventional way to a sandbox's copy-on-write disk: one process per change.
#
#     conventional-disk.sh create NAME BASE STORE BYTES
#     conventional-disk.sh remove NAME STORE
#
# The same disk as rewake's: a shared read-only loop device over the base image (found if
# it is there, bound if not), a sparse store on a loop device of its own, a persistent
# snapshot that reports overflow. Unlike rewake's, nothing is written through to the disk.
set -eu
action=$1 name=$2

case $action in
create)
    base=$3 store=$4 bytes=$5
    truncate -s "$bytes" "$store"
    origin=$(losetup -n -O NAME -j "$base" | head -n 1)
    [ -n "$origin" ] || origin=$(losetup -f --show -r "$base")
    cow=$(losetup -f --show "$store")
    sectors=$(blockdev --getsz "$origin")
    dmsetup create "$name" --table "0 $sectors snapshot $origin $cow PO 8"
    ;;
remove)
    store=$3
    cow=$(losetup -n -O NAME -j "$store")
    dmsetup remove --retry "$name"
    losetup -d "$cow"
    rm "$store"
    ;;
*)
    echo "usage: $0 create|remove NAME .." >&2
    exit 2
    ;;
esac

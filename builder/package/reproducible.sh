#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# reproducible.sh VARIABLE=VALUE...: make the packages twice and compare them. The
# two builds have the same sources, and the given variables of make; they differ in
# their directory, its length, the time, the time zone, the umask, the language
# and the order of directory entries, and the second one starts from an empty
# cache. The tool for bills of materials is made once: it is in no package.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
a=$work/a b=$work/another/directory/for/the/second/build

for dir in "$a" "$b"; do
	mkdir -p "$dir"
	git ls-files -z --cached --others --exclude-standard |
		while IFS= read -r -d '' f; do [ ! -e "$f" ] || printf '%s\0' "$f"; done |
		tar --create --null --files-from - | tar --extract --touch --directory "$dir"
	# An archive has what git knows.
	git -C "$dir" init --quiet && git -C "$dir" add --all
done

(cd "$a" && umask 022 && TZ=UTC make package "$@")
(cd "$b" && umask 077 && TZ=Asia/Kolkata LC_ALL=C.UTF-8 GOCACHE=$work/cache make package "$@")

if ! diff --recursive --brief "$a/.build/dist" "$b/.build/dist"; then
	echo "the packages of two builds differ" >&2
	exit 1
fi
echo "the same bytes twice:"
cat "$a/.build/dist/SHA256SUMS"

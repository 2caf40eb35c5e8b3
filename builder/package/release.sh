#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# release.sh VERSION KEY DIST: make a release, or say why it cannot be made. `make
# release` calls it, from the top of the repository.
set -euo pipefail

version=$1 key=$2 dist=$3

fail() {
	echo "no release: $*" >&2
	exit 1
}
[ -n "$key" ] || fail "KEY names no key of gpg: make release KEY=..."
gpg --batch --list-secret-keys "$key" >/dev/null || fail "gpg has no secret key $key"
[ -z "$(git status --porcelain)" ] || fail "the tree is not as it was committed; git status shows what differs"
[ "$(git describe --exact-match --tags --match "v$version" 2>/dev/null)" = "v$version" ] ||
	fail "the commit has no tag v$version; VERSION in the Makefile and the tag have to agree"
grep -q "^## $version (.*[0-9])\$" CHANGELOG.md || fail "CHANGELOG.md has no section '## $version (date)'"

make clean
# Of one line with the packages of both, built twice, then what the other line has of its own.
make test-all LINE=2.4
make lint unit unit-patched integration upstream e2e-kubernetes test-node LINE=2.3
make package
make repository KEY="$key"
[ -z "$(git status --porcelain)" ] || fail "the tests have changed files that belong to the release: git status, commit, and begin again"
(cd "$dist" && rm -f SHA256SUMS.asc && gpg --batch --local-user "$key" --detach-sign --armor SHA256SUMS)
echo "release $version is in $dist and ${dist%/*}/repository:"
cat "$dist/SHA256SUMS"

#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# dist.sh WORK DIST: make the source archive of one line of containerd, in DIST, by
# way of the directory WORK. `make dist` calls it, from the top of the repository,
# with these variables:
#
#   LINE               minor version of containerd
#   VERSION            of this project
#   REVISION           that this is
#   CONTAINERD_VERSION of containerd, with the v
#   PATCH_LIST         of the patches, separated by commas
#   PATCHED            directory with the patched containerd, and the go.mod for it
#   NAME               of the packages
#   PACKAGE_VERSION    of the packages
#   SOURCE_DATE_EPOCH  what all files are dated
#   TAGS               that all programs are built with
#
# The archive has what a build needs besides Go: this project without its
# integration tests (a module of its own) and without what makes the archive, all
# modules below vendor/, the patched containerd among them, and the packaging of this
# line. The same input gives the same bytes.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC

work=$1 dist=$2
root=$work/$NAME-$PACKAGE_VERSION
rm -rf "$work"
mkdir -p "$root" "$dist"

# What is of another line, or of no use without git, the module cache or a network.
left_out=(integration builder/patch builder/containerd/stock_test.go patches/containerd/v*
	builder/package/{dist,package,repository,reproducible,release}.sh builder/package/{package,repository}_test.go go.mod go.sum)
git ls-files -z -- . ':!.*' "${left_out[@]/#/:!}" | tar --create --null --files-from - | tar --extract --directory "$root"
# A line whose patches are all common to the lines has none of its own.
mkdir -p "$root/patches/containerd/v$LINE"
git ls-files -z -- "patches/containerd/v$LINE/*.patch" | tar --create --null --files-from - | tar --extract --directory "$root"

# go mod vendor leaves out what is no Go: the sources of containerd's man pages.
cp -r "$PATCHED/containerd" "$root/containerd"
sed "s,=> ./.build/v$LINE/patched/containerd,=> ./containerd," "$PATCHED/go.mod" >"$root/go.mod"
cp "$PATCHED/go.sum" "$root/go.sum"
(cd "$root" && GOFLAGS=-mod=mod go mod vendor)
(cd "$root/containerd" && find . -mindepth 1 -maxdepth 1 ! -name docs ! -name contrib ! -name NOTICE -exec rm -rf {} + &&
	find docs -mindepth 1 -maxdepth 1 ! -name man -exec rm -rf {} + &&
	find contrib -mindepth 1 -maxdepth 1 ! -name autocomplete -exec rm -rf {} +)

cat >"$root/release.mk" <<-MAKE
	# Written by "make dist": what this archive is.
	VERSION := $VERSION
	REVISION := $REVISION
	SOURCE_DATE_EPOCH := $SOURCE_DATE_EPOCH
	LINE := $LINE
	PATCH_LIST := $PATCH_LIST
MAKE

# modules prints path and version of the modules that are in the programs.
modules() {
	(cd "$root" && for arch in amd64 arm64 ppc64le s390x; do
		GOOS=linux GOARCH=$arch CGO_ENABLED=0 go list -deps -tags "$TAGS" -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}' \
			./builder/containerd ./overlayhelper github.com/containerd/containerd/v2/cmd/{ctr,containerd-shim-runc-v2}
	done) | sort -u
}

modules >"$work/modules"
while read -r path version; do
	for f in "$root/vendor/$path"/{LICENSE,LICENCE,COPYING,NOTICE}*; do
		[ -f "$f" ] || continue
		printf '\n===== %s %s: %s\n\n' "$path" "$version" "${f##*/}"
		cat "$f"
	done
done <"$work/modules" >"$root/third-party-licenses.txt"
# The standard library and the runtime are in all of them.
printf '\n===== Go: LICENSE\n\n' >>"$root/third-party-licenses.txt"
cat "$(go env GOROOT)/LICENSE" >>"$root/third-party-licenses.txt"

# license names the license of a file in SPDX's words.
license() {
	local text
	text=$(tr -s '[:space:]' ' ' <"$1")
	case $text in
	*"Mozilla Public License"*"2.0"*) echo MPL-2.0 ;;
	*"Apache License"*"Version 2.0"*) echo Apache-2.0 ;;
	*"Redistribution and use in source and binary forms"*[Nn]either*"name"*) echo BSD-3-Clause ;;
	*"Redistribution and use in source and binary forms"*) echo BSD-2-Clause ;;
	*"Permission is hereby granted, free of charge"*) echo MIT ;;
	*"Permission to use, copy, modify, and"*"distribute this software for any purpose"*) echo ISC ;;
	*"This is free and unencumbered software released into the public domain"*) echo Unlicense ;;
	*) echo "dist.sh: what license is $1?" >&2 && return 1 ;;
	esac
}
licenses=$(while read -r path _; do
	for f in "$root/vendor/$path"/{LICENSE,LICENCE,COPYING}*; do
		[[ ! -f $f || $f = *.docs ]] || license "$f" || exit
	done
done <"$work/modules" | cat - <(echo BSD-3-Clause) | sort -u | sed '/^Apache-2.0$/d; s/^/ AND /' | tr -d '\n')

# The packaging, with what it is of this line.
sed -e "s,@LINE@,$LINE," builder/package/description >"$work/description"
sed -e 's,^$,.,' -e 's,^, ,' "$work/description" >"$work/description.deb"
awk '{sub(/^v/, "", $2); gsub(/-/, "~", $2); printf "Provides:       bundled(golang(%s)) = %s\n", $1, $2}' "$work/modules" >"$work/bundled"
packaging=$root/builder/package
find "$packaging/debian" "$packaging/containerd-guest-pull.spec" -type f -exec sed -i \
	-e "/^@DESCRIPTION@\$/{r $work/description" -e 'd}' \
	-e "/^@DESCRIPTION_DEB@\$/{r $work/description.deb" -e 'd}' \
	-e "/^@BUNDLED@\$/{r $work/bundled" -e 'd}' \
	-e "s,@NAME@,$NAME,g" -e "s,@LINE@,$LINE,g" -e "s,@VERSION@,$PACKAGE_VERSION,g" -e "s,@RELEASE@,$VERSION,g" \
	-e "s,@CONTAINERD@,${CONTAINERD_VERSION#v},g" -e "s,@GO@,$(sed -n 's/^go //p' "$root/go.mod"),g" \
	-e "s,@LICENSE@,Apache-2.0$licenses,g" \
	-e "s/@DATE@/$(date -u -R -d "@$SOURCE_DATE_EPOCH")/" -e "s/@DATE_RPM@/$(date -u -d "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y')/" {} +
mv "$packaging/containerd-guest-pull.spec" "$packaging/$NAME.spec"
rm "$packaging/description"

chmod -R u=rwX,go=rX "$root"
tar --create --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=gnu \
	--directory "$work" "${root##*/}" | xz --threads=1 >"$dist/${root##*/}.tar.xz"

# The bill of materials of what is in the programs. cyclonedx-gomod knows versions of
# programs and of checkouts only.
{
	cat <<-JSON
		{
		  "\$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
		  "bomFormat": "CycloneDX",
		  "specVersion": "1.6",
		  "version": 1,
		  "metadata": {
		    "timestamp": "$(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)",
		    "component": {
		      "type": "application",
		      "name": "$NAME",
		      "version": "$PACKAGE_VERSION",
		      "hashes": [{"alg": "SHA-256", "content": "$(sha256sum "$dist/${root##*/}.tar.xz" | cut -d ' ' -f 1)"}]
		    }
		  },
		  "components": [
	JSON
	awk -v patches="$PATCH_LIST" '{
		printf "%s    {\"type\": \"library\", \"name\": \"%s\", \"version\": \"%s\", \"purl\": \"pkg:golang/%s@%s\"", (NR > 1 ? ",\n" : ""), $1, $2, $1, $2
		if ($1 == "github.com/containerd/containerd/v2") printf ", \"pedigree\": {\"notes\": \"patched: %s\"}", patches
		printf "}"
	} END {print ""}' "$work/modules"
	printf '  ]\n}\n'
} >"$dist/${root##*/}.tar.xz.cdx.json"

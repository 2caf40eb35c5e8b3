#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# package.sh WORK DIST: make the packages of one line of containerd out of its source
# archive in DIST, in DIST, by way of the directory WORK: the source packages, from
# them the packages for each architecture, as a distribution does, archives of the
# programs, and bills of materials. `make package` calls it, with these variables:
#
#   NAME, PACKAGE_VERSION, CONTAINERD_VERSION, VERSION, PATCH_LIST, SOURCE_DATE_EPOCH
#              as for dist.sh
#   ARCHES     in Go's words
#   CYCLONEDX  cyclonedx-gomod
#
# The same input gives the same bytes, whenever and wherever it runs.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH
# What is cached for one build is used for the next; the packages' tests are for those
# who have not run ours.
GOCACHE=$(go env GOCACHE)
export GOCACHE DEB_BUILD_OPTIONS=nocheck GOFLAGS=

work=$(realpath -m "$1") dist=$(realpath "$2")
cyclonedx=$(realpath "$CYCLONEDX")
source=$NAME-$PACKAGE_VERSION
programs=(containerd ctr containerd-shim-runc-v2 guest-pull-overlayfs)

rm -rf "$work"
mkdir -p "$work"/{deb,rpm}
unset MAKEFLAGS MAKELEVEL MFLAGS

# The Debian source package.
tree=$work/deb/$source
tar --extract --file "$dist/$source.tar.xz" --directory "$work/deb"
cp "$dist/$source.tar.xz" "$work/deb/${NAME}_$PACKAGE_VERSION.orig.tar.xz"
cp -r "$tree/builder/package/debian" "$tree/debian"
(cd "$work/deb" && dpkg-source --build "$tree" >/dev/null)
cp "$work/deb/${NAME}_$PACKAGE_VERSION".orig.tar.xz "$work/deb/${NAME}_$PACKAGE_VERSION-1".{dsc,debian.tar.xz} "$dist"

# rpm's, which has a time and a host of its own too.
rpm() {
	rpmbuild --quiet --nodeps --nocheck --define "_topdir $work/rpm" --define '_buildhost localhost' --define 'packager The guest-pull Authors <authors@guest-pull.invalid>' \
		--define 'use_source_date_epoch_as_buildtime 1' --define 'clamp_mtime_to_source_date_epoch 1' \
		--define '_binary_payload w19.zstdio' --define '_source_payload w19.zstdio' "$@" >"$work/rpm/log" 2>&1 ||
		{ cat "$work/rpm/log" >&2 && return 1; }
}
mkdir -p "$work/rpm/SOURCES"
cp -p "$tree/builder/package/$NAME.spec" "$work/rpm/"
cp "$dist/$source.tar.xz" "$work/rpm/SOURCES/"
touch --date "@$SOURCE_DATE_EPOCH" "$work/rpm/SOURCES/$source.tar.xz"
# Since rpm 4.18 the expanded spec is in it, with the directories.
(cd "$work/rpm" && rpm --define '_topdir /proc/self/cwd' -bs "$NAME.spec")
cp "$work/rpm/SRPMS/$source-1.src.rpm" "$dist"

# Software bills of materials, one for each program, read from the program. The
# tool writes the time and cannot be told which, and takes the patched copy of
# containerd for a module of its own, which no scanner would know.
sboms() {
	local arch=$1 p file version
	for p in "${programs[@]}"; do
		file=$dist/$source-linux-$arch.$p.cdx.json
		case $p in
		ctr | containerd-shim-*) version=$CONTAINERD_VERSION ;; # of containerd's own module
		*) version=v$VERSION ;;
		esac
		GOARCH=$arch "$cyclonedx" bin -json -std -version "$version" \
			-serial "$(sha256sum "$tree/bin/$p" | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-5\3-8\4-\5/')" \
			-output "$file" "$tree/bin/$p"
		sed -i -E \
			-e "0,/\"timestamp\":/s/(\"timestamp\": )\"[^\"]*\"/\1\"$(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)\"/" \
			-e "s|\./containerd@\(devel\)|github.com/containerd/containerd/v2@$CONTAINERD_VERSION|g" \
			-e "s|\"name\": \"\./containerd\"|\"name\": \"github.com/containerd/containerd/v2\"|" "$file"
		sed -i -E "/\"name\": \"github\.com\/containerd\/containerd\/v2\"/{
			n
			s|^( *)\"version\": \"[^\"]*\",|\1\"version\": \"$CONTAINERD_VERSION\",\n\1\"pedigree\": {\"notes\": \"patched: $PATCH_LIST\"},|
		}" "$file"
	done
}

for arch in $ARCHES; do
	case $arch in
	amd64) deb=amd64 rpm=x86_64 ;;
	arm64) deb=arm64 rpm=aarch64 ;;
	ppc64le) deb=ppc64el rpm=ppc64le ;;
	*) deb=$arch rpm=$arch ;;
	esac
	echo "packaging $source for $arch"
	(cd "$tree" && dpkg-buildpackage --build=any --host-arch=$deb -d --no-sign >"$work/deb/log" 2>&1) ||
		{ cat "$work/deb/log" >&2 && exit 1; }
	cp "$work/deb/${NAME}_$PACKAGE_VERSION-1_$deb.deb" "$dist"

	# The archive is made to be unpacked in /usr/local, as containerd's own.
	rm -rf "$work/tar"
	make -C "$tree" --no-print-directory install-package DESTDIR="$work/tar" PREFIX=/usr/local CONFDIR="/usr/local/share/doc/$NAME" \
		CONFIG="/usr/local/share/doc/$NAME/config.toml" UNITDIR=/usr/local/lib/systemd/system ZSHDIR=/usr/local/share/zsh/site-functions
	tar --create --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=gnu \
		--directory "$work/tar/usr/local" . | gzip -9n >"$dist/$source-linux-$arch.tar.gz"
	sboms "$arch"

	rpm --target $rpm -bb "$work/rpm/$NAME.spec"
	cp "$work/rpm/RPMS/$rpm/$source-1.$rpm.rpm" "$dist"
done

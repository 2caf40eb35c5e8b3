#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# repository.sh DIST REPOSITORY: lay out signed repositories of the packages in DIST:
# REPOSITORY/deb for apt, REPOSITORY/rpm for dnf, and the key, REPOSITORY/guest-pull.asc.
# `make repository` calls it. KEY is that of the signature, as gpg --local-user takes it.
#
# They are dated now, and not as the packages: apt takes no lists that are older than
# those that it has, as those of packages that are taken back would be. It verifies the
# signature of InRelease, which has the digests of the lists, which have those of the
# packages. dnf verifies that of repomd.xml likewise, and that of each package, which is
# signed for it here.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC

dist=$(realpath "$1") repository=$(realpath -m "$2")
: "${KEY:?names no key: make repository KEY=...}"
gpg --batch --list-secret-keys "$KEY" >/dev/null
rm -rf "$repository.tmp"
mkdir -p "$repository.tmp"/{deb/pool,rpm}
cd "$repository.tmp"
gpg --batch --armor --export "$KEY" >guest-pull.asc

cp "$dist"/*.deb "$dist"/*.dsc "$dist"/*.debian.tar.xz "$dist"/*.orig.tar.xz deb/pool/
(
	cd deb
	arches=$(for deb in pool/*.deb; do dpkg-deb --field "$deb" Architecture; done | sort -u | tr '\n' ' ')
	for arch in $arches; do
		mkdir -p "dists/stable/main/binary-$arch"
		apt-ftparchive --arch "$arch" packages pool >"dists/stable/main/binary-$arch/Packages"
	done
	mkdir -p dists/stable/main/source
	apt-ftparchive sources pool >dists/stable/main/source/Sources
	find dists -name Packages -o -name Sources | xargs gzip -9nk
	apt-ftparchive -o APT::FTPArchive::Release::Origin=guest-pull -o APT::FTPArchive::Release::Label=guest-pull \
		-o APT::FTPArchive::Release::Suite=stable -o APT::FTPArchive::Release::Codename=stable \
		-o APT::FTPArchive::Release::Components=main -o APT::FTPArchive::Release::Architectures="${arches% }" \
		release dists/stable >Release
	mv Release dists/stable/
	gpg --batch --local-user "$KEY" --clearsign --output dists/stable/InRelease dists/stable/Release
	gpg --batch --local-user "$KEY" --detach-sign --armor --output dists/stable/Release.gpg dists/stable/Release
)

cp "$dist"/*.rpm rpm/
rpmsign --define "__gpg $(command -v gpg)" --define "_gpg_name $KEY" --addsign rpm/*.rpm >/dev/null
createrepo_c --quiet rpm
gpg --batch --local-user "$KEY" --detach-sign --armor rpm/repodata/repomd.xml

rm -rf "$repository"
mv "$repository.tmp" "$repository"

#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# package.sh BIN WORK DIST: make the packages of one architecture from the
# programs in BIN, in DIST, by way of the directory WORK. `make package` calls it,
# from the top of the repository, with these variables:
#
#   LINE               minor version of containerd
#   LINE_MODFILE       -modfile=... of that line, or empty
#   ARCH               of the programs, in Go's words
#   VERSION            of this project
#   CONTAINERD_VERSION of containerd, with the v
#   PATCH_LIST         of the patches that are built in, separated by commas
#   SOURCE_DATE_EPOCH  what all files are dated
#   TOOLS              directory of nfpm, cyclonedx-gomod, gen-manpages, go-md2man
#                      and ctr, for this machine
#
# The same input gives the same bytes, whenever and wherever it runs.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC

bin=$1 work=$2 dist=$3
here=builder/package
name=containerd-guest-pull-$LINE
# containerd's version comes first, so that an upgrade of either sorts as one. A
# pre-release of this project sorts before the release.
version=${CONTAINERD_VERSION#v}+guestpull.${VERSION/-/\~}
programs=(containerd ctr containerd-shim-runc-v2 guest-pull-overlayfs)
containerd=$(go list -m $LINE_MODFILE -f '{{.Dir}}' github.com/containerd/containerd/v2)
archive=containerd-guest-pull-${version/\~/-}-linux-$ARCH
export SOURCE_DATE_EPOCH

rm -rf "$work"
mkdir -p "$work" "$dist"

# tree PREFIX makes the tree of files, without the configuration, below $work/root.
# UNITS is where the unit goes.
tree() {
	local root=$work/$1 prefix=$2 units=$3 share=$work/$1$2/share doc
	doc=$share/doc/$name
	install -d "$root$prefix/bin" "$root$units" "$share"/man/man{5,8} "$doc" \
		"$share/bash-completion/completions" "$share/zsh/vendor-completions"

	for p in "${programs[@]}"; do
		install -m 0755 "$bin/$p" "$root$prefix/bin/$p"
	done
	ln -s guest-pull-overlayfs "$root$prefix/bin/nydus-overlayfs-guest-pull"
	sed "s,=/usr/bin/,=$prefix/bin/," $here/containerd.service >"$root$units/containerd.service"

	"$TOOLS/gen-manpages" containerd.8 "$share/man/man8"
	"$TOOLS/gen-manpages" ctr.8 "$share/man/man8"
	# They lack what whatis(1) reads.
	sed -i '/^\.SH NAME/{n;s/$/ \\- container runtime daemon/}' "$share/man/man8/containerd.8"
	sed -i '/^\.SH NAME/{n;s/$/ \\- client of the containerd daemon, for debugging/}' "$share/man/man8/ctr.8"
	"$TOOLS/go-md2man" -in "$containerd/docs/man/containerd-config.8.md" -out "$share/man/man8/containerd-config.8"
	"$TOOLS/go-md2man" -in "$containerd/docs/man/containerd-config.toml.5.md" -out "$share/man/man5/containerd-config.toml.5"
	"$TOOLS/go-md2man" -in $here/man/guest-pull-overlayfs.8.md -out "$share/man/man8/guest-pull-overlayfs.8"
	gzip -9n "$share"/man/man?/*
	ln -s guest-pull-overlayfs.8.gz "$share/man/man8/nydus-overlayfs-guest-pull.8.gz"

	# ctr writes its own from 2.4 on. It no longer has the option that the scripts of
	# contrib/autocomplete ask for, which are for those before.
	if [ "$LINE" = 2.3 ]; then
		install -m 0644 "$containerd/contrib/autocomplete/ctr" "$share/bash-completion/completions/ctr"
		install -m 0644 "$containerd/contrib/autocomplete/zsh_autocomplete" "$share/zsh/vendor-completions/_ctr"
	else
		"$TOOLS/ctr" completion bash >"$share/bash-completion/completions/ctr"
		"$TOOLS/ctr" completion zsh >"$share/zsh/vendor-completions/_ctr"
	fi

	install -m 0644 "$containerd/NOTICE" "$doc/NOTICE"
	licenses | gzip -9n >"$doc/third-party-licenses.txt.gz"
	install -d "$doc/examples"
	cp -r $here/kubernetes "$doc/examples/"
	chmod -R u=rwX,go=rX "$root"
}

# licenses prints the licenses and notices of all modules in the programs.
licenses() {
	local module version dir f
	for p in "${programs[@]}"; do
		go version -m "$bin/$p"
	done | awk '$1 == "dep" && $3 != "(devel)" {print $2 "@" $3}' | sort -u | while read -r module; do
		version=${module##*@}
		dir=$(go mod download -json "$module" | sed -n 's/^\t"Dir": "\(.*\)",\?$/\1/p')
		for f in "$dir"/{LICENSE,LICENCE,COPYING,NOTICE}*; do
			[ -f "$f" ] || continue
			printf '\n===== %s %s: %s\n\n' "${module%@*}" "$version" "$(basename "$f")"
			cat "$f"
		done
	done
	# The standard library and the runtime are in all of them.
	printf '\n===== Go %s: LICENSE\n\n' "$(go version -m "$bin/containerd" | sed -n '1s/.*: go//p')"
	cat "$(go env GOROOT)/LICENSE"
}

# stamp dates all files of a tree.
stamp() {
	find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

# Software bills of materials, one for each program, read from the program. The
# tool writes the time and cannot be told which, and takes the patched copy of
# containerd for a module of its own, which no scanner would know.
sboms() {
	local p file version
	for p in "${programs[@]}"; do
		file=$dist/$archive.$p.cdx.json
		case $p in
		ctr | containerd-shim-*) version=$CONTAINERD_VERSION ;; # of containerd's own module
		*) version=v$VERSION ;;
		esac
		GOARCH=$ARCH "$TOOLS/cyclonedx-gomod" bin -json -std -version "$version" \
			-serial "$(sha256sum "$bin/$p" | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-5\3-8\4-\5/')" \
			-output "$file" "$bin/$p"
		sed -i -E \
			-e "0,/\"timestamp\":/s/(\"timestamp\": )\"[^\"]*\"/\1\"$(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)\"/" \
			-e "s|\./\.build/v[0-9.]+/patched/containerd@\(devel\)|github.com/containerd/containerd/v2@$CONTAINERD_VERSION|g" \
			-e "s|\"name\": \"\./\.build/v[0-9.]+/patched/containerd\"|\"name\": \"github.com/containerd/containerd/v2\"|" "$file"
		sed -i -E "/\"name\": \"github\.com\/containerd\/containerd\/v2\"/{
			n
			s|^( *)\"version\": \"[^\"]*\",|\1\"version\": \"$CONTAINERD_VERSION\",\n\1\"pedigree\": {\"notes\": \"patched: $PATCH_LIST\"},|
		}" "$file"
	done
}

# debian makes what a .deb has to have besides.
debian() {
	local doc=$work/deb/usr/share/doc/$name
	sed "s,@NAME@,$name," $here/deb/copyright >"$doc/copyright"
	install -d "$work/deb/usr/share/lintian/overrides"
	sed "s,@NAME@,$name," $here/deb/lintian-overrides >"$work/deb/usr/share/lintian/overrides/$name"
	gzip -9n >"$doc/changelog.Debian.gz" <<-END
		$name ($version-$RELEASE) stable; urgency=medium

		  * Release $VERSION, with containerd $CONTAINERD_VERSION.

		 -- The guest-pull Authors <authors@guest-pull.invalid>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
	END
	chmod 0644 "$doc/changelog.Debian.gz"
}

export LINE ARCH RELEASE=1 CONTAINERD=${CONTAINERD_VERSION#v} PACKAGE_VERSION=$version

tree deb /usr /lib/systemd/system
debian
tree rpm /usr /usr/lib/systemd/system
mv "$work/rpm/usr/share/zsh/vendor-completions" "$work/rpm/usr/share/zsh/site-functions"
install -m 0644 LICENSE "$work/rpm/usr/share/doc/$name/LICENSE"
for packager in deb rpm; do
	stamp "$work/$packager"
	ROOT=$work/$packager "$TOOLS/nfpm" package --config $here/nfpm.yaml --packager $packager --target "$dist/" >/dev/null
done

# The archive is made to be unpacked in /usr/local, as containerd's own.
tree tar /usr/local /usr/local/lib/systemd/system
doc=$work/tar/usr/local/share/doc/$name
install -m 0644 LICENSE $here/config.toml $here/50-guest-pull.toml "$doc"
stamp "$work/tar"
tar --create --sort=name --owner=0 --group=0 --numeric-owner --format=gnu \
	--directory "$work/tar/usr/local" . | gzip -9n >"$dist/$archive.tar.gz"

sboms

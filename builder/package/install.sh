#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# install.sh: lay out all files of a package. `make install-package` calls it, in a
# source archive, with these variables:
#
#   BIN      directory of the programs
#   TOOLS    directory of gen-manpages, go-md2man and ctr, for this machine
#   NAME     of the package
#   LINE     minor version of containerd
#   DESTDIR  directory to lay them out in
#   PREFIX   of the programs
#   UNITDIR  of the unit
#   ZSHDIR   of the completion for zsh
#   CONFDIR  of the drop-in configuration
#   CONFIG   the file that is config.toml of a node that has none
#
# The Debian and the RPM package, and the archive of programs, are made of it.
set -euo pipefail
umask 022
export LC_ALL=C

here=builder/package
share=$DESTDIR$PREFIX/share doc=$DESTDIR$PREFIX/share/doc/$NAME

install -d "$DESTDIR$PREFIX/bin" "$DESTDIR$UNITDIR" "$DESTDIR$ZSHDIR" "$DESTDIR$CONFDIR" "$DESTDIR${CONFIG%/*}" \
	"$share"/man/man{5,8} "$share/bash-completion/completions" "$doc/examples"

for p in containerd ctr containerd-shim-runc-v2 guest-pull-overlayfs; do
	install -m 0755 "$BIN/$p" "$DESTDIR$PREFIX/bin/$p"
done
ln -s guest-pull-overlayfs "$DESTDIR$PREFIX/bin/nydus-overlayfs-guest-pull"
sed "s,=/usr/bin/,=$PREFIX/bin/," $here/containerd.service >"$DESTDIR$UNITDIR/containerd.service"

"$TOOLS/gen-manpages" containerd.8 "$share/man/man8"
"$TOOLS/gen-manpages" ctr.8 "$share/man/man8"
# They lack what whatis(1) reads.
sed -i '/^\.SH NAME/{n;s/$/ \\- container runtime daemon/}' "$share/man/man8/containerd.8"
sed -i '/^\.SH NAME/{n;s/$/ \\- client of the containerd daemon, for debugging/}' "$share/man/man8/ctr.8"
"$TOOLS/go-md2man" -in containerd/docs/man/containerd-config.8.md -out "$share/man/man8/containerd-config.8"
"$TOOLS/go-md2man" -in containerd/docs/man/containerd-config.toml.5.md -out "$share/man/man5/containerd-config.toml.5"
"$TOOLS/go-md2man" -in $here/man/guest-pull-overlayfs.8.md -out "$share/man/man8/guest-pull-overlayfs.8"
gzip -9n "$share"/man/man?/*
ln -s guest-pull-overlayfs.8.gz "$share/man/man8/nydus-overlayfs-guest-pull.8.gz"

# ctr writes its own from 2.4 on. It no longer has the option that the scripts of
# contrib/autocomplete ask for, which are for those before.
if [ "$LINE" = 2.3 ]; then
	install -m 0644 containerd/contrib/autocomplete/ctr "$share/bash-completion/completions/ctr"
	install -m 0644 containerd/contrib/autocomplete/zsh_autocomplete "$DESTDIR$ZSHDIR/_ctr"
else
	"$TOOLS/ctr" completion bash >"$share/bash-completion/completions/ctr"
	"$TOOLS/ctr" completion zsh >"$DESTDIR$ZSHDIR/_ctr"
fi

install -m 0644 LICENSE containerd/NOTICE "$doc"
gzip -9nc third-party-licenses.txt >"$doc/third-party-licenses.txt.gz"
cp -r $here/kubernetes "$doc/examples/"
chmod -R u=rwX,go=rX "$doc/examples"

install -m 0644 $here/50-guest-pull.toml "$DESTDIR$CONFDIR/50-guest-pull.toml"
install -m 0644 $here/config.toml "$DESTDIR$CONFIG"

#!/bin/sh
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# kubelet.sh VERSION DIRECTORY: build kubelet as released, from modules, into
# DIRECTORY, by what that release itself requires.
#
# k8s.io/kubernetes replaces its staging modules with directories that are not in its
# module; they are modules of their own, with the same version but for the major one.
set -eu
version=$1
out=$2
mkdir -p "$out"
module=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
staging=v0.${version#v1.}
sed "s|=> ./staging/src/\(.*\)|=> \1 $staging|" "$module/go.mod" >"$out/go.mod"
cp "$module/go.sum" "$out/go.sum"
chmod u+w "$out/go.sum"
cd "$module"
# -mod=mod: adds the sums of the staging modules, and does not look for a vendor
# directory, which is not in the module.
CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off go build -modfile="$out/go.mod" -trimpath -buildvcs=false -ldflags "-s -w \
	-X k8s.io/component-base/version.gitVersion=$version" -o "$out/kubelet" ./cmd/kubelet

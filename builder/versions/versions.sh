#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# versions.sh VERSION...: build and test with each of these versions of containerd,
# and print a table. `make versions` calls it, from the top of the repository, as
# root, with the variables
#
#   CONTAINERD_VERSION  that go.mod has, which is built with the patches
#   GUEST_PULL_VERSION  of this project
#   TESTS               a regular expression: the integration tests to run, by
#                       default those of the files named below
#
# The code is the same for all; a go.mod is made for each version, in which that
# containerd decides on the versions of all that it is made of. Logs and binaries
# go to .build/versions. The exit status is 1 when something failed.
set -uo pipefail

module=github.com/containerd/containerd/v2
main=$(go list -m)
: "${TESTS:=^($(sed -n 's/^func \(Test[A-Za-z0-9]*\)(.*/\1/p' integration/{pull,lifecycle,ctr,auth,registry,check,exhaustion}_test.go | paste -sd '|'))$}"

# modfile VERSION DIR makes DIR/go.mod. Modules that this containerd does not have
# come from the main go.mod.
modfile() {
	local version=$1 dir=$2 its path v
	its=$(go mod download -json "$module@$version" | sed -n 's/^\t"GoMod": "\(.*\)",\?$/\1/p') && [ -n "$its" ] || return
	{
		printf 'module %s\n\n' "$main"
		grep '^go ' go.mod
		printf '\nrequire (\n\t%s %s\n' $module "$version"
		go list -m -f '{{if not (or .Indirect .Main)}}{{.Path}} {{.Version}}{{end}}' all | grep . | while read -r path v; do
			[ "$path" = $module ] || grep -q "[[:space:]]$path v" "$its" || printf '\t%s %s\n' "$path" "$v"
		done
		echo ')'
	} >"$dir/go.mod"
	: >"$dir/go.sum"
	go mod tidy -modfile="$dir/go.mod"
}

# step NAME COMMAND...: run with a log, and say in the variable NAME how it went.
step() {
	local name=$1 log=$dir/$1.log
	shift
	echo "  $name" >&2
	if "$@" >"$log" 2>&1; then
		printf -v "$name" 'pass'
		[ "$name" != integration ] || printf -v "$name" 'pass (%d)' "$(grep -c '^--- PASS' "$log")"
	else
		printf -v "$name" '**fail**'
		failed=1
		tail -n 30 "$log" >&2
	fi
}

build() {
	local ldflags="-s -w -X $module/version.Version=$version+guest-pull.$GUEST_PULL_VERSION -X $module/version.Revision= \
		-X main.guestPullVersion=$GUEST_PULL_VERSION -X main.version=$GUEST_PULL_VERSION -X main.patches=$patches"
	local tags="netgo osusergo static_build urfave_cli_no_docs $tag"
	mkdir -p "$dir/bin"
	CGO_ENABLED=0 go build -modfile="$dir/go.mod" -trimpath -buildvcs=false -tags "$tags" -ldflags "$ldflags" -o "$dir/bin/" ./builder/containerd $module/cmd/ctr &&
		CGO_ENABLED=0 go build -modfile="$dir/go.mod" -trimpath -buildvcs=false -tags "$tags no_grpc" -ldflags "$ldflags" -o "$dir/bin/" $module/cmd/containerd-shim-runc-v2 &&
		CGO_ENABLED=0 go build -modfile="$dir/go.mod" -trimpath -buildvcs=false -tags "$tags" -ldflags "$ldflags" -o "$dir/bin/guest-pull-overlayfs" ./overlayhelper &&
		ln -sfn guest-pull-overlayfs "$dir/bin/nydus-overlayfs-guest-pull" &&
		guest
}

# guest builds the stand-in guest with that containerd as well: a shim is not
# started by a containerd before 2.3 when it was built with a later one.
guest() {
	local api
	api=$(go list -m -modfile="$dir/go.mod" -f '{{.Version}}' github.com/containerd/containerd/api) &&
		cp integration/go.sum "$dir/guest.sum" &&
		go mod edit -print -replace="$module=$module@$version" \
			-replace=github.com/containerd/containerd/api=github.com/containerd/containerd/api@"$api" integration/go.mod >"$dir/guest.mod" &&
		(cd integration && CGO_ENABLED=0 go build -mod=mod -modfile="$dir/guest.mod" -tags "$tag" -trimpath -buildvcs=false \
			-o "$dir/bin/containerd-shim-guest-v2" ./shim-guest)
}

unit() {
	go vet -modfile="$dir/go.mod" -tags "$tag" ./plugin/... ./overlayhelper/... ./builder/containerd/ &&
		go test -count=1 -modfile="$dir/go.mod" -tags "$tag" ./plugin/ ./plugin/volume/... ./plugin/metrics/... ./overlayhelper/... ./builder/check/ ./builder/containerd/ &&
		go test -count=1 -modfile="$dir/go.mod" -tags "$tag" ./plugin/users/ ./plugin/snapshotter/... -args -test.root
}

# integration runs on a small scale, and does not count among what `make test` sees.
integration() {
	(cd integration && env -u GUEST_PULL_CONTAINERS -u GUEST_PULL_FIGURES GUEST_PULL_CONTAINERD="$dir/bin" go test -count=1 -timeout 30m -v -run "$TESTS" .)
}

failed=0
table=''
for version in "$@"; do
	echo "containerd $version" >&2
	dir=$PWD/.build/versions/$version
	rm -rf "$dir"
	mkdir -p "$dir"
	patches='' how=none
	tag=containerd_$(sed -E 's/^v([0-9]+)\.([0-9]+)\..*/\1_\2/' <<<"$version")
	if [ "$version" = "$CONTAINERD_VERSION" ]; then
		# The copy of containerd is named relative to the main module.
		step modules cp .build/v2.4/patched/go.mod .build/v2.4/patched/go.sum "$dir/"
		patches=$(go run ./builder/patch -list)
		how=$(tr ',' '\n' <<<"$patches" | wc -l)
	else
		step modules modfile "$version" "$dir"
	fi
	step build build
	step unit unit
	step integration integration
	table+="| ${version#v} | $how | $build | $unit | $integration |"$'\n'
done

cat <<END
| containerd | patches | build | unit and conformance tests | integration tests |
|---|---|---|---|---|
${table%$'\n'}
END
exit $failed

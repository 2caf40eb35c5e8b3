#!/usr/bin/env bash
# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# versions.sh KUBELET...: run the most important Kubernetes cases with each of these
# kubelets, and print a table. A KUBELET is a version, and after a colon the feature
# gates that are not as by default, separated by commas: "v1.37.2:A=true,B=true".
# `make kubelets` calls it, from the top of the repository, as root, with the variables
#
#   GUEST_PULL_KUBERNETES  the directory of etcd, kube-apiserver and kubelet of one
#                          version, whose kube-apiserver all kubelets talk to
#   GUEST_PULL_CONTAINERD  that of containerd
#
# Logs and kubelets go to .build/kubelets. The exit status is 1 when something failed.
set -uo pipefail

failed=0
echo "| kubelet | feature gates | core cases |"
echo "|---|---|---|"
for kubelet; do
	version=${kubelet%%:*}
	gates=
	[ "$version" = "$kubelet" ] || gates=${kubelet#*:}
	dir=$PWD/.build/kubelets/$version
	mkdir -p "$dir"
	log=$dir/${gates:-default}.log
	echo "kubelet $kubelet" >&2
	result="**fail**"
	[ "$("$GUEST_PULL_KUBERNETES/kubelet" --version)" != "Kubernetes $version" ] || ln -sfn "$GUEST_PULL_KUBERNETES/kubelet" "$dir/"
	if { [ -x "$dir/kubelet" ] || integration/kubernetes/kubelet.sh "$version" "$dir" >"$dir/build.log" 2>&1; } &&
		ln -sfn "$GUEST_PULL_KUBERNETES/etcd" "$GUEST_PULL_KUBERNETES/kube-apiserver" "$dir/" &&
		(cd integration && GUEST_PULL_KUBERNETES=$dir GUEST_PULL_FEATURE_GATES=$gates GUEST_PULL_RESULTS=$log.md \
			go test -trimpath -count=1 -v -timeout 30m -run '^TestCore' ./cluster) >"$log" 2>&1; then
		result="pass ($(grep -c '| pass |' "$log.md"))"
		[ -z "${GUEST_PULL_FIGURES:-}" ] || printf '1\tkubelet versions and gates\n' >>"$GUEST_PULL_FIGURES"
	else
		failed=1
		tail -n 30 "$log" "$dir/build.log" >&2
	fi
	echo "| ${version#v} | ${gates:-default} | $result |" | sed 's/,/, /g; s/=true//g'
done
exit $failed

/*
Copyright The guest-pull Authors.

Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at

	http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions and
limitations under the License.
*/
package cluster_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// What stock containerd, with the snapshotter and without the patches, gets wrong.
// These tests hold that it still does: one that fails says that a patch may not be
// needed any more.

// handlerAnnotation is how a pod's author names the runtime handler for pulls to
// stock containerd, where it is deprecated.
const handlerAnnotation = "io.containerd.cri.runtime-handler"

// The patch "pull an image for the runtime handler of its pod's sandbox".
func TestStockPullsOnTheHost(t *testing.T) {
	n := newNode(t, options{stock: true})
	record(t, stock, "wrong: a guest pod's image is fetched and unpacked on the host, and nothing says so")
	img := n.push(t, images.Spec{Name: "app", Layers: 20, LayerSize: 1 << 10})
	n.run(t, n.Pod("app", harness.Guest, main(img)))
	n.requireRuns(t, "app", "main", img)
	require.ElementsMatch(t, img.Layers, n.reg.Log().By(registry.Host).Of(registry.Layer).OK().In(img.Name).References())
	require.ElementsMatch(t, img.Layers, n.Node.Blobs(img.Layers...))
	for _, chain := range img.Chain {
		require.Contains(t, n.snapshots(t, "overlayfs"), chain)
	}
	n.requireNoWarnings(t, "app")
}

// The patch "make the pause image usable for the sandbox's own snapshotter".
func TestStockPauseImage(t *testing.T) {
	n := newNode(t, options{stock: true})
	record(t, stock, "wrong: after a guest pod was the first of a node, no runc pod starts")
	img := n.push(t, images.Spec{Name: "app", Layers: 2})
	n.run(t, n.Pod("first", harness.Guest, main(img)))
	n.create(t, n.Pod("second", harness.Runc, main(img)))
	n.waitEvent(t, "second", "Warning FailedCreatePodSandBox", "content digest", "not found")
	time.Sleep(20 * time.Second) // kubelet tries again
	p, err := control.API.Pod(t.Context(), "second")
	require.NoError(t, err)
	require.Equal(t, corev1.PodPending, p.Status.Phase)
}

// The patch "answer ImageStatus for the snapshotter that asks".
func TestStockImageOfGuest(t *testing.T) {
	n := newNode(t, options{stock: true})
	record(t, stock, "wrong: an image that was pulled for a guest pod (by annotation) does not start in a runc pod")
	// The pause image first by runc, or nothing starts.
	other := n.push(t, images.Spec{Name: "other"})
	n.run(t, n.Pod("other", harness.Runc, main(other)))
	img := n.push(t, images.Spec{Name: "app", Layers: 5})
	p := n.Pod("guest", harness.Guest, main(img))
	p.Annotations = map[string]string{handlerAnnotation: harness.Guest}
	n.run(t, p)
	n.requireOnlyInGuest(t, img)
	n.create(t, n.Pod("runc", harness.Runc, main(img)))
	n.waitEvent(t, "runc", "Warning Failed", "content digest", "not found")
	require.Equal(t, 1, n.pulls(img), "kubelet has asked for the image again")
}

// The patch "say how to replace a user name that cannot be resolved".
func TestStockUserName(t *testing.T) {
	n := newNode(t, options{stock: true})
	record(t, stock, "wrong: USER by name fails in a guest pod, with an error that does not say of which image, nor what to do")
	img := n.push(t, images.Spec{Name: "by-name", Layers: 2, User: "app"})
	n.create(t, n.Pod("by-name", harness.Guest, main(img)))
	event := n.waitEvent(t, "by-name", "Warning Failed")
	require.Regexp(t, "no users found|no such file", event)
	require.NotContains(t, event, img.Ref)
	require.NotContains(t, event, "securityContext")
}

// The patch "collect stats for the snapshotters of all runtime handlers".
func TestStockStats(t *testing.T) {
	n := newNode(t, options{stock: true})
	record(t, stock, "wrong: one guest pod is enough, and kubelet has no stats summary of the whole node")
	img := n.push(t, images.Spec{Name: "stats", Layers: 3})
	n.run(t, n.Pod("stats-runc", harness.Runc, main(img)))
	var s summary
	require.Eventually(t, func() bool { return n.Get(t.Context(), "/stats/summary", &s) == nil }, podTimeout, time.Second,
		"no summary without a guest pod neither")
	require.Len(t, s.Pods, 1)
	n.run(t, n.Pod("stats-guest", harness.Guest, main(img)))
	time.Sleep(25 * time.Second) // statistics are collected each ten seconds
	err := n.Get(t.Context(), "/stats/summary", &s)
	require.ErrorContains(t, err, "500")
	require.ErrorContains(t, err, "failed to list pod stats")
}

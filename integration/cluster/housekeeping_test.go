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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

// diskPressure is a threshold that every disk is below.
var diskPressure = map[string]any{
	"evictionHard": map[string]string{"imagefs.available": "1000Ti"},
	// Kubelet leaves young images alone.
	"imageMinimumGCAge": "1ns",
}

// Kubelet collects images by what containerd says of them: those that no
// container uses go, whichever snapshotter has them, and nothing of them stays;
// those that one uses do not.
func TestImageGarbageCollection(t *testing.T) {
	record(t, housekeeping, "image garbage collection, by disk pressure: unused images of guest pods go, with their snapshots; used ones and the pause image stay")
	n := newNode(t, options{})
	used := n.push(t, images.Spec{Name: "used", Layers: 3})
	unused := n.push(t, images.Spec{Name: "unused", Layers: 4})
	// It shares no layer with the others, whose lowest is the same.
	both := n.push(t, images.Spec{Name: "unused-of-both", Layers: 5, Group: "root:x:0:\n"})
	p := n.Pod("used", harness.Guest, main(used))
	p.Spec.PriorityClassName = "system-node-critical" // or it would be evicted
	n.run(t, p)
	n.run(t, n.Pod("unused", harness.Guest, main(unused)))
	n.run(t, n.Pod("both-guest", harness.Guest, main(both)))
	n.run(t, n.Pod("both-runc", harness.Runc, main(both)))
	for _, pod := range []string{"unused", "both-guest", "both-runc"} {
		n.delete(t, pod)
	}
	present := func(ref string) bool {
		status, err := n.Node.ImageStatus(t.Context(), ref)
		require.NoError(t, err)
		return status != nil
	}
	for _, img := range []image{used, unused, both} {
		require.True(t, present(img.Ref))
	}

	require.NoError(t, n.Down())
	old := n.Configure(diskPressure)
	require.NoError(t, n.Up(t.Context()))
	require.Eventually(t, func() bool { return !present(unused.Ref) && !present(both.Ref) },
		podTimeout, 500*time.Millisecond, "kubelet does not remove the images")
	require.NoError(t, n.Node.GC(t.Context()))
	for _, snapshotter := range []string{harness.Snapshotter, "overlayfs"} {
		for _, img := range []image{unused, both} {
			for _, chain := range img.Chain[1:] {
				require.NotContains(t, n.snapshots(t, snapshotter), chain, "%s of %s", snapshotter, img.Name)
			}
		}
	}
	require.Empty(t, n.Node.Blobs(both.Layers...))

	require.True(t, present(used.Ref), "an image that a container uses")
	require.True(t, present(n.reg.Ref("pause:1")), "the pause image")
	n.requireRuns(t, "used", "main", used)
	n.requireOnlyInGuest(t, used)

	require.NoError(t, n.Down())
	n.Configure(old)
	require.NoError(t, n.Up(t.Context()))
	n.run(t, n.Pod("unused-again", harness.Guest, main(unused)))
	n.requireRuns(t, "unused-again", "main", unused)
	require.Equal(t, 2, n.pulls(unused))
	n.requireOnlyInGuest(t, unused)
}

// The scheduler and users see an image of guest pods like any other, and kubelet,
// which collects images by size, does not count what is not on the host.
func TestImageListOfNode(t *testing.T) {
	record(t, housekeeping, "the node's status lists the images of guest pods, each once, by tag and digest, with the size of what the host has")
	n := newNode(t, options{})
	img := n.push(t, images.Spec{Name: "listed", Layers: 3, LayerSize: 1 << 20})
	n.run(t, n.Pod("listed-guest", harness.Guest, main(img)))
	list := func() []corev1.ContainerImage {
		node, err := control.API.Node(t.Context(), n.Name)
		require.NoError(t, err)
		return slices.DeleteFunc(node.Status.Images, func(i corev1.ContainerImage) bool {
			return !slices.ContainsFunc(i.Names, func(s string) bool { return strings.Contains(s, "/listed") })
		})
	}
	require.Eventually(t, func() bool { return len(list()) > 0 }, podTimeout, 500*time.Millisecond, "the image is not listed")
	digest, err := n.reg.Digest("listed:1")
	require.NoError(t, err)
	size, err := images.LayersSize(img.Image)
	require.NoError(t, err)
	check := func() int64 {
		l := list()
		require.Len(t, l, 1)
		require.ElementsMatch(t, []string{img.Ref, n.reg.Ref("listed@" + digest.String())}, l[0].Names)
		return l[0].SizeBytes
	}
	manifest, err := img.RawManifest()
	require.NoError(t, err)
	config, err := img.RawConfigFile()
	require.NoError(t, err)
	require.EqualValues(t, len(manifest)+len(config), check())
	n.run(t, n.Pod("listed-runc", harness.Runc, main(img)))
	require.Eventually(t, func() bool { return check() >= size }, podTimeout, 500*time.Millisecond, "the layers are on the host now")
}

// summary is the part of kubelet's /stats/summary (stats/v1alpha1) that is about
// file systems.
type summary struct {
	Node struct {
		Fs      *fsStats `json:"fs"`
		Runtime struct {
			ImageFs     *fsStats `json:"imageFs"`
			ContainerFs *fsStats `json:"containerFs"`
		} `json:"runtime"`
	} `json:"node"`
	Pods []struct {
		PodRef struct {
			Name string `json:"name"`
		} `json:"podRef"`
		Containers []struct {
			Name string `json:"name"`
			CPU  struct {
				UsageCoreNanoSeconds *uint64 `json:"usageCoreNanoSeconds"`
			} `json:"cpu"`
			Memory struct {
				WorkingSetBytes *uint64 `json:"workingSetBytes"`
			} `json:"memory"`
			Rootfs *fsStats `json:"rootfs"`
			Logs   *fsStats `json:"logs"`
		} `json:"containers"`
	} `json:"pods"`
}

type fsStats struct {
	AvailableBytes, CapacityBytes, UsedBytes *uint64
}

// Kubelet accounts for a guest pod's containers as for others.
func TestStatsSummary(t *testing.T) {
	record(t, housekeeping, "stats summary: CPU, memory, root file system and logs of guest and runc containers; the image file system is the right one")
	n := newNode(t, options{})
	img := n.push(t, images.Spec{Name: "stats", Layers: 3})
	for _, handler := range []string{harness.Guest, harness.Runc} {
		n.run(t, n.Pod("stats-"+handler, handler, main(img)))
	}
	n.exec(t, "stats-runc", "main", "dd", "if=/dev/zero", "of=/big", "bs=1024", "count=2048")

	var s summary
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		s = summary{}
		require.NoError(c, n.Get(t.Context(), "/stats/summary", &s))
		found := map[string]bool{}
		for _, p := range s.Pods {
			for _, ct := range p.Containers {
				what := p.PodRef.Name + "/" + ct.Name
				require.NotNil(c, ct.CPU.UsageCoreNanoSeconds, what)
				require.NotZero(c, *ct.CPU.UsageCoreNanoSeconds, what)
				require.NotNil(c, ct.Memory.WorkingSetBytes, what)
				require.NotZero(c, *ct.Memory.WorkingSetBytes, what)
				require.NotNil(c, ct.Rootfs, what)
				require.NotNil(c, ct.Rootfs.UsedBytes, "%s: used bytes of the root file system", what)
				require.NotNil(c, ct.Rootfs.CapacityBytes, "%s: capacity of the root file system", what)
				require.NotNil(c, ct.Logs, what)
				if p.PodRef.Name == "stats-runc" {
					require.GreaterOrEqual(c, *ct.Rootfs.UsedBytes, uint64(2<<20), what)
				} else {
					// What it writes is in the guest.
					require.Less(c, *ct.Rootfs.UsedBytes, uint64(1<<20), what)
				}
				found[what] = true
			}
		}
		require.True(c, found["stats-guest/main"] && found["stats-runc/main"], "found %v", found)
		require.NotNil(c, s.Node.Runtime.ImageFs)
		require.NotNil(c, s.Node.Runtime.ImageFs.UsedBytes)
		require.NotZero(c, *s.Node.Runtime.ImageFs.UsedBytes)
	}, podTimeout, time.Second)

	var fs unix.Statfs_t
	require.NoError(t, unix.Statfs(n.Node.SnapshotterRoot("overlayfs"), &fs))
	require.Equal(t, fs.Blocks*uint64(fs.Bsize), *s.Node.Runtime.ImageFs.CapacityBytes, "capacity of the image file system")
}

// The guest-pull snapshotter's directory may be on a small file system of its own,
// as hardly anything is in it. That must not be the one that kubelet watches for
// images: it would evict the node's pods.
func TestEvictionSignals(t *testing.T) {
	record(t, housekeeping, "eviction signals: a small file system under the guest-pull snapshotter, below the threshold for images, is no disk pressure")
	small := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=8m"))
	t.Cleanup(func() { assert.NoError(t, unix.Unmount(small, unix.MNT_DETACH)) })

	threshold := map[string]any{"evictionHard": map[string]string{"imagefs.available": "64Mi", "nodefs.available": "64Mi"}}
	n := newNode(t, options{
		Options: harness.Options{PluginConfig: "root_path = '" + small + "'"},
		kubelet: cluster.KubeletOptions{Config: threshold},
	})
	img := n.push(t, images.Spec{Name: "evict", Layers: 3})
	n.run(t, n.Pod("stays-guest", harness.Guest, main(img)))
	n.run(t, n.Pod("stays-runc", harness.Runc, main(img)))
	time.Sleep(25 * time.Second) // the signals are read each ten seconds
	require.Equal(t, corev1.ConditionFalse, n.condition(t, corev1.NodeDiskPressure))
	for _, pod := range []string{"stays-guest", "stays-runc"} {
		p, err := control.API.Pod(t.Context(), pod)
		require.NoError(t, err)
		require.Equal(t, corev1.PodRunning, p.Status.Phase, describe(p))
	}

	var stats summary
	require.NoError(t, n.Get(t.Context(), "/stats/summary", &stats))
	var fs unix.Statfs_t
	require.NoError(t, unix.Statfs(n.Node.SnapshotterRoot("overlayfs"), &fs))
	require.Equal(t, fs.Blocks*uint64(fs.Bsize), *stats.Node.Runtime.ImageFs.CapacityBytes, "capacity of the image file system")
}

func (n *node) condition(t *testing.T, which corev1.NodeConditionType) corev1.ConditionStatus {
	t.Helper()
	node, err := control.API.Node(t.Context(), n.Name)
	require.NoError(t, err)
	for _, c := range node.Status.Conditions {
		if c.Type == which {
			return c.Status
		}
	}
	return corev1.ConditionUnknown
}

// What kubelet keeps of a deleted pod for a minute, for whoever wants to look, it
// removes then: sandboxes and logs.
func TestContainerGarbageCollection(t *testing.T) {
	record(t, housekeeping, "container garbage collection: sandboxes, containers, snapshots and logs of deleted pods go")
	n := newNode(t, options{})
	img := n.push(t, images.Spec{Name: "dead", Layers: 3})
	for _, handler := range []string{harness.Guest, harness.Runc} {
		n.run(t, n.Pod("dead-"+handler, handler, main(img)))
		n.delete(t, "dead-"+handler)
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		containers, err := n.Node.Client.ContainerService().List(harness.CRI(t.Context()))
		require.NoError(c, err)
		require.Empty(c, containers)
		logs, err := n.Logs()
		require.NoError(c, err)
		require.Empty(c, logs)
	}, 3*time.Minute, time.Second)
	for _, snapshotter := range []string{harness.Snapshotter, "overlayfs"} {
		for _, s := range n.snapshots(t, snapshotter) {
			require.True(t, strings.HasPrefix(s, "sha256:"), "%s snapshot %s is of no layer", snapshotter, s)
		}
	}
}

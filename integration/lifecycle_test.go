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

package integration_test

import (
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// Containers and images go away in every order without a trace: snapshots in
// containerd's database, content, and the plugin's own directories. A layer
// lives as long as one image or container needs it.
func TestRemoveAndCollect(t *testing.T) {
	ctx := t.Context()
	n, reg := newNode(t, harness.Options{})
	one := push(t, reg, images.Spec{Name: "one", Layers: 5})
	two := push(t, reg, images.Spec{Name: "two", Layers: 5})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c1 := run(t, pod, harness.ContainerSpec{Image: one.Ref})
	c2 := run(t, pod, harness.ContainerSpec{Image: two.Ref})

	// The image of a running container: kubelet would not, others do.
	require.NoError(t, n.RemoveImage(ctx, one.Ref))
	require.NoError(t, n.GC(ctx))
	requireRuns(t, c1, one)
	requireRuns(t, c2, two)
	requireNotOnHost(t, n, two)

	require.NoError(t, c1.Stop(ctx, 10*time.Second))
	require.NoError(t, c1.Remove(ctx))
	require.NoError(t, n.GC(ctx))
	snapshots, err := n.Snapshots(harness.CRI(ctx), harness.Snapshotter)
	require.NoError(t, err)
	for _, s := range snapshots {
		require.NotEqual(t, one.ChainID, s.Name, "a layer that nothing needs any more")
		require.NotEqual(t, c1.ID, s.Name)
	}
	requireRuns(t, c2, two)

	require.NoError(t, pod.Remove(ctx))
	require.NoError(t, n.Empty(ctx))
	require.NoError(t, n.CheckEmpty(ctx))

	// What is gone can come back.
	pod = runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	requireRuns(t, run(t, pod, harness.ContainerSpec{Image: one.Ref}), one)
}

// Containers outlive containerd. When it is back, by whatever signal it went,
// they are as they were, and those that ended meanwhile have ended.
func TestRestart(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			ctx := t.Context()
			n, reg := newNode(t, harness.Options{})
			img := push(t, reg, images.Spec{Name: "app", Layers: 5})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			stays := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			ends := run(t, pod, harness.ContainerSpec{Image: img.Ref, Command: []string{"/bin/sh", "-c", "while ! [ -e /end ]; do sleep 0.1; done"}})
			created, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)
			requireRuns(t, stays, img)
			before, err := stays.Status(ctx)
			require.NoError(t, err)
			mounts, err := n.Mounts(ctx, stays.ID)
			require.NoError(t, err)
			_, err = ends.Exec(ctx, "/bin/sh", "-c", "(sleep 1; touch /end) >/dev/null 2>&1 &")
			require.NoError(t, err)

			require.NoError(t, n.Signal(signal))
			time.Sleep(2 * time.Second) // for the container that ends
			require.NoError(t, n.Up(ctx))

			after, err := stays.Status(ctx)
			require.NoError(t, err)
			require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, after.State)
			require.Equal(t, before.StartedAt, after.StartedAt)
			requireRuns(t, stays, img)
			requireInGuest(t, n, reg, stays, img)
			again, err := n.Mounts(ctx, stays.ID)
			require.NoError(t, err)
			require.Equal(t, mounts, again, "mounts before and after the restart")
			// Containerd does not learn the exit code of what ended without it,
			// under runc neither.
			_, err = ends.Wait(ctx)
			require.NoError(t, err)

			reg.Reset()
			require.NoError(t, created.Start(ctx))
			requireRuns(t, created, img)
			fresh := run(t, pod, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
			requireRuns(t, fresh, img)
			require.Empty(t, reg.Log().By(registry.Host), "the image was there before the restart")

			require.NoError(t, stays.Stop(ctx, 10*time.Second))
			require.NoError(t, stays.Remove(ctx))
		})
	}
}

// While CRI finds its images again, containerd loads the rest of its plugins. Where the
// one reads what the other writes, a start ends in "concurrent map read and map write",
// once in a thousand; the race detector (make race) sees it in nearly each.
func TestRestartWithImages(t *testing.T) {
	ctx := t.Context()
	n, reg := newMixedNode(t, harness.Options{})
	var all []image
	for i := range 10 {
		img := push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", i), Layers: 2, LayerSize: 1 << 10})
		_, err := n.Pull(ctx, harness.PullSpec{Image: img.Ref, Handler: harness.Runc})
		require.NoError(t, err)
		all = append(all, img)
	}
	for range 5 {
		require.NoError(t, n.Down())
		require.NoError(t, n.Up(ctx))
	}
	for _, img := range all {
		requireListedOnce(t, n, img)
	}
}

// A layer is a name in containerd's own database, so the plugin's directory is
// nothing that an image depends on: with all of it gone the images are still
// there, running containers keep running and can be removed, and new ones start.
func TestWipedPluginRoot(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			ctx := t.Context()
			n, reg := newNode(t, harness.Options{})
			img := push(t, reg, images.Spec{Name: "app", Layers: 5})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			old := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, old, img)

			require.NoError(t, n.Signal(signal))
			entries, err := os.ReadDir(n.SnapshotterRoot(harness.Snapshotter))
			require.NoError(t, err)
			require.NotEmpty(t, entries, "nothing to wipe, so this test shows nothing")
			require.NoError(t, os.RemoveAll(n.SnapshotterRoot(harness.Snapshotter)))
			require.NoError(t, n.Up(ctx))
			reg.Reset()

			found, err := n.ImageStatus(ctx, img.Ref)
			require.NoError(t, err)
			require.NotNil(t, found)
			requireRuns(t, old, img)

			fresh := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			c := run(t, fresh, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			requireInGuest(t, n, reg, c, img)
			require.Empty(t, reg.Log().By(registry.Host), "the host had to pull again")

			require.NoError(t, old.Stop(ctx, 10*time.Second))
			require.NoError(t, old.Remove(ctx))
			require.NoError(t, pod.Remove(ctx))
		})
	}
}

// A client that unpacks without saying which layer it is unpacking would have
// the snapshotter extract it on the host. It is told so, and nothing is written.
func TestPlainUnpackIsRefused(t *testing.T) {
	// This client has fetched the layers itself, so the registry is no judge.
	reg := newRegistry(t)
	n := harness.New(t, harness.Options{Registry: reg})
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	ctx := harness.CRI(t.Context())
	_, err := n.Client.Fetch(ctx, img.Ref, plainHTTP)
	require.NoError(t, err)
	require.Len(t, n.Blobs(img.Layers...), 2)

	i, err := n.Client.GetImage(ctx, img.Ref)
	require.NoError(t, err)
	err = i.Unpack(ctx, harness.Snapshotter)
	require.ErrorContains(t, err, "containerd.io/snapshot.ref")
	require.Truef(t, errdefs.IsFailedPrecondition(err), "%v", err)
	requireNoSnapshots(t, n, ctx)
}

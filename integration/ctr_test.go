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
	"context"
	"path/filepath"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// ctrRun returns the arguments of "ctr run" for a container in the guest.
func ctrRun(n *harness.Node, img, id string, more ...string) []string {
	return append([]string{
		"run",
		"--snapshotter", harness.Snapshotter,
		"--runtime", n.RuntimeType(),
		"--fifo-dir", n.Dir() + "/fifo",
		"--cgroup", n.CgroupParent() + "/" + id,
	}, append(more, img, id)...)
}

// ctr pulls through the transfer service, and has no CRI that sets the annotation
// which tells the guest what to pull.
func TestCtr(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 5})
	ctx := t.Context()
	_, err := n.Ctr(ctx, "images", "pull", "--plain-http", "--snapshotter", harness.Snapshotter, img.Ref)
	require.NoError(t, err)
	require.Empty(t, n.Blobs(img.Layers...))
	out, err := n.Ctr(ctx, "images", "check", "--snapshotter", harness.Snapshotter, "name=="+img.Ref)
	require.NoError(t, err)
	require.Contains(t, out, "incomplete", "the layers are not in the content store")
	requireCtrRuns(t, n, reg, img)
	_, err = n.Ctr(ctx, "images", "delete", "--sync", img.Ref)
	require.NoError(t, err)
}

// Clients that unpack by themselves while they pull, as nerdctl does, name the
// layer they unpack. They need nothing special.
func TestClientPull(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 5})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	pulled, err := n.Client.Pull(ctx, img.Ref,
		containerd.WithPullUnpack, containerd.WithPullSnapshotter(harness.Snapshotter), plainHTTP)
	require.NoError(t, err)
	unpacked, err := pulled.IsUnpacked(ctx, harness.Snapshotter)
	require.NoError(t, err)
	require.True(t, unpacked)
	require.Empty(t, n.Blobs(img.Layers...))
	requireCtrRuns(t, n, reg, img)
}

func requireCtrRuns(t *testing.T, n *harness.Node, reg *registry.Registry, img image) {
	t.Helper()
	ctx := t.Context()
	named := "io.kubernetes.cri.image-name=" + img.Ref
	out, err := n.Ctr(ctx, append(ctrRun(n, img.Ref, "once", "--rm", "--annotation", named), "/bin/cat", "/etc/image-name")...)
	require.NoError(t, err)
	require.Equal(t, img.Name+"\n", out)
	require.ElementsMatch(t, img.Layers, reg.Log().By(registry.Guest).Of(registry.Layer).OK().References())

	_, err = n.Ctr(ctx, ctrRun(n, img.Ref, "c1", "--detach", "--annotation", named)...)
	require.NoError(t, err)
	out, err = n.Ctr(ctx, "tasks", "exec", "--fifo-dir", n.Dir()+"/fifo", "--exec-id", "e1", "c1", "/bin/cat", "/etc/image-name")
	require.NoError(t, err)
	require.Equal(t, img.Name+"\n", out)
	_, err = n.Ctr(ctx, "tasks", "delete", "--force", "c1")
	require.NoError(t, err)
	_, err = n.Ctr(ctx, "containers", "delete", "c1")
	require.NoError(t, err)
}

// "ctr pull --local" fetches all there is before it asks the snapshotter for
// anything, and then unpacks without saying which layer it unpacks. Guest pull is
// not possible that way: it is told so, and no layer is extracted.
func TestCtrLocalPullIsRefused(t *testing.T) {
	// The client has fetched layers, so the registry's log is no judge here.
	reg := newRegistry(t)
	n := harness.New(t, harness.Options{Registry: reg})
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	_, err := n.Ctr(t.Context(), "images", "pull", "--local", "--plain-http", "--snapshotter", harness.Snapshotter, img.Ref)
	require.ErrorContains(t, err, "containerd.io/snapshot.ref")
	require.Len(t, n.Blobs(img.Layers...), 2, "nothing was fetched, so the refusal was for another reason")
	requireNoSnapshots(t, n, namespaces.WithNamespace(t.Context(), "default"))
}

// requireNoSnapshots holds that the snapshotter has nothing in its namespace of
// containerd's database nor in its directory.
func requireNoSnapshots(t *testing.T, n *harness.Node, ctx context.Context) {
	t.Helper()
	snapshots, err := n.Snapshots(ctx, harness.Snapshotter)
	require.NoError(t, err)
	require.Empty(t, snapshots)
	dirs, err := filepath.Glob(filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "snapshots", "*"))
	require.NoError(t, err)
	require.Empty(t, dirs)
}

// Without the annotation no guest knows what to pull. That is an error, and not
// a container on an empty root file system.
func TestCtrRunWithoutImageName(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app"})
	_, err := n.Ctr(t.Context(), "images", "pull", "--plain-http", "--snapshotter", harness.Snapshotter, img.Ref)
	require.NoError(t, err)
	_, err = n.Ctr(t.Context(), append(ctrRun(n, img.Ref, "c1", "--rm"), "/bin/true")...)
	require.Error(t, err)
	if n.StandIn() {
		require.ErrorContains(t, err, "io.kubernetes.cri.image-name")
	}
}

// ctr looks users up by itself, in what the host has of the image.
func TestCtrUser(t *testing.T) {
	for name, list := range map[string]string{
		"nothing known": "",
		"listed":        "[plugins.'io.containerd.snapshotter.v1.guest-pull'.users]\napp = \"1000:1000\"",
	} {
		t.Run(name, func(t *testing.T) {
			n, reg := newNode(t, harness.Options{PluginConfig: list})
			img := push(t, reg, images.Spec{Name: "app", User: "app"})
			_, err := n.Ctr(t.Context(), "images", "pull", "--plain-http", "--snapshotter", harness.Snapshotter, img.Ref)
			require.NoError(t, err)
			out, err := n.Ctr(t.Context(), append(ctrRun(n, img.Ref, "c1", "--rm", "--annotation", "io.kubernetes.cri.image-name="+img.Ref), "/bin/id", "-u")...)
			if list == "" {
				require.ErrorContains(t, err, "no users found")
				return
			}
			require.NoError(t, err)
			require.Equal(t, "1000\n", out)
		})
	}
}

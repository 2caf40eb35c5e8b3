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
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// A pod's annotation that has the name of the unpacker's label is an annotation:
// the sandbox runs, nothing is recorded under the name that the pod's author wrote
// there, and the image that has the name is what it was.
func TestPodIsNoLayer(t *testing.T) {
	const ref = "containerd.io/snapshot.ref"
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	unknown := digest.FromString("nobody has this").String()

	// The digest of an image that comes only afterwards.
	for _, name := range []string{unknown, img.ChainID} {
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest, Annotations: map[string]string{ref: name}})
		snapshots, err := n.Snapshots(harness.CRI(t.Context()), harness.Snapshotter)
		require.NoError(t, err)
		for _, s := range snapshots {
			require.NotEqual(t, name, s.Name)
		}
		require.NoError(t, pod.Remove(t.Context()))
	}

	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)
	requireInGuest(t, n, reg, c, img)
	info, err := n.Client.SnapshotService(harness.Snapshotter).Stat(harness.CRI(t.Context()), img.ChainID)
	require.NoError(t, err)
	require.Equal(t, img.chain(t)[0], info.Parent)
}

// The annotation does not keep a sandbox from being made either, when the image
// that has the name is there.
func TestPatchPodNamesLayer(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		n, reg := newNode(t, harness.Options{Binaries: binaries})
		img := push(t, reg, images.Spec{Name: "app", Layers: 2})
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
		run(t, pod, harness.ContainerSpec{Image: img.Ref})
		_, err := n.RunPod(t.Context(), harness.PodSpec{Handler: harness.Guest, Annotations: map[string]string{
			"containerd.io/snapshot.ref":        img.ChainID,
			"containerd.io/snapshot/uidmapping": "0:1000:1",
			"containerd.io/snapshot/gidmapping": "0:1000:1",
		}})
		requireFixed(t, n, "0021", err, "already exists")
		if err != nil {
			return
		}
		// Not even a directory of the host is the author's to give away.
		dirs, err := filepath.Glob(filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "snapshots", "*", "fs"))
		require.NoError(t, err)
		require.NotEmpty(t, dirs)
		for _, dir := range dirs {
			info, err := os.Stat(dir)
			require.NoError(t, err)
			require.Zero(t, info.Sys().(*syscall.Stat_t).Uid, dir)
		}
	})
}

// Nobody asks for the users of the pause image. With resolve_users, it is as little
// read as without; but a container can be made of it, as of any image.
func TestPauseImageIsNotRead(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newUsersNode(t, path.options)
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			require.NoError(t, n.Kill())
			require.NoError(t, n.Up(t.Context()))
			runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			requireNoLayersOnHost(t, reg)

			_, err := pod.Create(t.Context(), harness.ContainerSpec{Image: reg.Ref("pause:1")})
			require.NoError(t, err)
			require.Len(t, reg.Log().By(registry.Host).Of(registry.Layer).OK(), 1)
		})
	}
}

// rewritten pushes an image whose layers are described in another way.
func rewritten(t *testing.T, reg *registry.Registry, img image, as string, edit func(i int, layer map[string]any)) image {
	t.Helper()
	return rewrittenManifest(t, reg, img, as, func(m map[string]any) {
		for i, l := range m["layers"].([]any) {
			edit(i, l.(map[string]any))
		}
	})
}

// rewrittenManifest is rewritten for all of the manifest.
func rewrittenManifest(t *testing.T, reg *registry.Registry, img image, as string, edit func(manifest map[string]any)) image {
	t.Helper()
	raw, err := img.RawManifest()
	require.NoError(t, err)
	var m map[string]any
	require.NoError(t, json.Unmarshal(raw, &m))
	edit(m)
	raw, err = json.Marshal(m)
	require.NoError(t, err)
	mediaType, err := img.MediaType()
	require.NoError(t, err)
	for _, ref := range []string{digest.FromBytes(raw).String(), "1"} {
		require.NoError(t, reg.PutManifest(as, ref, string(mediaType), raw))
	}
	img.Name, img.Ref = as, reg.Ref(as+":1")
	return img
}

// Annotations of an image's layers become labels of their records. None of them says
// which layer it is, on top of what, or which image the guest is told of.
func TestHostileAnnotations(t *testing.T) {
	other := digest.FromString("another image").String()
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			app := push(t, reg, images.Spec{Name: "app", Layers: 3})
			img := rewritten(t, reg, app, "annotated", func(_ int, layer map[string]any) {
				layer["annotations"] = map[string]string{
					"containerd.io/snapshot.ref":                     other,
					"containerd.io/snapshot/diff-id":                 other,
					"containerd.io/snapshot/parent-chain-id":         other,
					"containerd.io/snapshot/uidmapping":              "0:1000:1",
					"containerd.io/snapshot/guest-pull.chain-id":     other,
					"containerd.io/snapshot/cri.manifest-digest":     other,
					"containerd.io/snapshot/cri.layer-digest":        other,
					"containerd.io/gc.ref.snapshot.guest-pull/other": other,
				}
			})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, app)
			requireInGuest(t, n, reg, c, img)
			chain := img.chain(t)
			for i, id := range chain {
				info, err := n.Client.SnapshotService(harness.Snapshotter).Stat(harness.CRI(t.Context()), id)
				require.NoError(t, err)
				require.Equal(t, id, info.Labels["containerd.io/snapshot.ref"])
				if i > 0 {
					require.Equal(t, chain[i-1], info.Parent)
				}
			}
			mounts, err := n.Mounts(t.Context(), c.ID)
			require.NoError(t, err)
			for key, value := range decodeVolume(t, mounts[0].Options).ImagePull.Metadata {
				require.NotEqual(t, other, value, key)
			}
		})
	}
}

// The sizes of layers are what an image's author writes. What is made of them stays
// a number that something can be done with.
func TestClaimedSizes(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 3})
	sizes := []int64{-5, math.MaxInt64, math.MaxInt64}
	img = rewritten(t, reg, img, "claims", func(i int, layer map[string]any) { layer["size"] = sizes[i] })

	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	_, err := pod.Pull(t.Context(), img.Ref)
	require.NoError(t, err)
	found := false
	for _, i := range status(t, n).Images {
		require.GreaterOrEqual(t, i.BytesOffHost, int64(0))
		require.LessOrEqual(t, i.BytesOffHost, int64(2<<40))
		found = found || i.Name == img.Ref
	}
	require.True(t, found)
	require.GreaterOrEqual(t, status(t, n).BytesOffHost, int64(0))
}

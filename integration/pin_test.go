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
	"strconv"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// pushAs puts something under a name and returns its digest.
func pushAs(t *testing.T, reg *registry.Registry, as string, what remote.Taggable) string {
	t.Helper()
	_, err := reg.Push(as, what)
	require.NoError(t, err)
	digest, err := reg.Digest(as)
	require.NoError(t, err)
	return digest.String()
}

// requirePulled holds that the guest was told this name, and got this image.
func requirePulled(t *testing.T, n *harness.Node, c *harness.Container, name string, img image) {
	t.Helper()
	requireRuns(t, c, img)
	r, err := n.Record(harness.CRINamespace, c.ID)
	require.NoError(t, err)
	require.Equal(t, name, r.Image.Name)
}

// With pin_image_digest a guest is told the digest that the host resolved for the
// pod: the tag may have moved on, or be another's by now.
func TestPatchPinImageDigest(t *testing.T) {
	n, reg := newNode(t, harness.Options{ExtraConfig: `[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
  pin_image_digest = true
`})
	if !hasPatch(n, "0019") || !n.StandIn() {
		t.Skip("this containerd has no pin_image_digest, or RUNTIME names a guest that keeps no record")
	}
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	first, err := reg.Digest("app:1")
	require.NoError(t, err)
	pinned := reg.Ref("app@" + first.String())
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c, err := pod.Create(t.Context(), harness.ContainerSpec{Image: img.Ref})
	require.NoError(t, err)

	// Between the host's pull and the guest's, and for the next container, for which
	// the image is present.
	newer := image{Name: "newer"}
	newer.Image, err = images.Build(images.Spec{Name: "newer", Layers: 3})
	require.NoError(t, err)
	second := pushAs(t, reg, "app:1", newer.Image)
	require.NoError(t, c.Start(t.Context()))
	requirePulled(t, n, c, pinned, img)
	late, err := pod.Create(t.Context(), harness.ContainerSpec{Image: img.Ref})
	require.NoError(t, err)
	require.NoError(t, late.Start(t.Context()))
	requirePulled(t, n, late, pinned, img)

	// Another pod has the tag pulled anew. One whose image was resolved before gets
	// what was resolved, after a restart too.
	other := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c = run(t, other, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Always})
	requirePulled(t, n, c, reg.Ref("app@"+second), newer)
	require.NoError(t, n.Down())
	require.NoError(t, n.Up(t.Context()))
	again, err := pod.CreateFrom(t.Context(), late.Config)
	require.ErrorContains(t, err, "reserved", "the name of a container that is there")
	require.Nil(t, again)
	require.NoError(t, late.Remove(t.Context()))
	again, err = pod.CreateFrom(t.Context(), late.Config)
	require.NoError(t, err)
	require.NoError(t, again.Start(t.Context()))
	requirePulled(t, n, again, pinned, img)

	// A name by digest, an index, and a second repository for the same image.
	c = run(t, pod, harness.ContainerSpec{Image: pinned})
	requirePulled(t, n, c, pinned, img)
	indexed := image{Name: "indexed"}
	indexed.Image, err = images.Build(images.Spec{Name: "indexed", Layers: 2})
	require.NoError(t, err)
	index, err := images.Index(indexed.Image)
	require.NoError(t, err)
	digest := pushAs(t, reg, "index:1", index)
	c = run(t, pod, harness.ContainerSpec{Image: reg.Ref("index:1")})
	requirePulled(t, n, c, reg.Ref("index@"+digest), indexed)
	manifest, err := indexed.Digest()
	require.NoError(t, err)
	requireDescribed(t, n, c, indexed, manifest.String())
	pushAs(t, reg, "second:1", img.Image)
	c = run(t, pod, harness.ContainerSpec{Image: reg.Ref("second:1"), PullPolicy: harness.Always})
	requirePulled(t, n, c, reg.Ref("second@"+first.String()), img)

	// A manifest that containerd writes anew, under another digest than the registry's.
	typeless := rewrittenManifest(t, reg, img, "typeless", func(m map[string]any) {
		m["config"].(map[string]any)["mediaType"] = "application/octet-stream"
	})
	_, err = pod.Create(t.Context(), harness.ContainerSpec{Image: typeless.Ref})
	require.ErrorContains(t, err, "no registry has "+reg.Ref("typeless@sha256:"))
	require.ErrorContains(t, err, "application/octet-stream of its config")
	require.ErrorContains(t, err, "pin_image_digest")

	// A name that no registry was asked for.
	_, err = n.Ctr(t.Context(), "-n", harness.CRINamespace, "images", "tag", pinned, "imported.example/app:1")
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		found, err := n.ImageStatus(t.Context(), "imported.example/app:1")
		return err == nil && found != nil
	}, 10*time.Second, 50*time.Millisecond)
	_, err = pod.Create(t.Context(), harness.ContainerSpec{Image: "imported.example/app:1"})
	require.ErrorContains(t, err, "no digest of it in imported.example/app is known")
	require.ErrorContains(t, err, "pin_image_digest")
}

// requireDescribed holds that the guest was told the manifest and the size of its
// layers, beside the chain ID.
func requireDescribed(t *testing.T, n *harness.Node, c *harness.Container, img image, manifest string) {
	t.Helper()
	mounts, err := n.Mounts(t.Context(), c.ID)
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	metadata := decodeVolume(t, mounts[0].Options).ImagePull.Metadata
	require.Equal(t, manifest, metadata[volume.MetadataManifestDigest])
	require.Equal(t, strconv.FormatInt(img.bytes(t), 10), metadata[volume.MetadataLayersSize])
	r, err := n.Record(harness.CRINamespace, c.ID)
	require.NoError(t, err)
	require.Equal(t, manifest, r.HostManifest)
	require.Equal(t, r.Image.Digest, r.HostManifest, "what the guest has got")
}

// What the guest can check it is given, and a pod's author cannot change it.
func TestPatchImageDescribed(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	if !hasPatch(n, "0020") || !n.StandIn() {
		t.Skip("this containerd does not say what image it is, or RUNTIME names a guest that keeps no record")
	}
	img := push(t, reg, images.Spec{Name: "app", Layers: 4})
	digest, err := img.Digest()
	require.NoError(t, err)
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest, Annotations: map[string]string{
		volume.MetadataManifestDigest: "sha256:spoofed",
		volume.MetadataLayersSize:     "1",
	}})
	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)
	requireDescribed(t, n, c, img, digest.String())
	require.NoError(t, n.Down())
	require.NoError(t, n.Up(t.Context()))
	requireDescribed(t, n, c, img, digest.String())
}

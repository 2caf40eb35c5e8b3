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

// Package integration_test drives the built containerd against a real registry,
// over CRI, containerd's client API and ctr. README.md says how to point it at
// other binaries and runtimes.
package integration_test

import (
	"os"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// newNode starts a registry and a node, for tests in which nothing but guests may
// run. At the end of the test the registry's
// log has the last word: whatever else the test looked at, the host must not
// have asked for any layer.
func newNode(t *testing.T, o harness.Options) (*harness.Node, *registry.Registry) {
	t.Helper()
	reg := newRegistry(t)
	o.Registry = reg
	n := harness.New(t, o)
	t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
	return n, reg
}

// requireNoLayersOnHost holds that the host asked for no layer.
func requireNoLayersOnHost(t *testing.T, reg *registry.Registry) {
	t.Helper()
	layers := reg.Log().By(registry.Host).Of(registry.Layer)
	assert.Empty(t, layers.References(), "layers that the host asked for")
	assert.NoError(t, figures.Add(figures.LayerBytes, layers.Bytes()))
	assert.NoError(t, figures.Add(figures.GuestPulls, int64(len(reg.Log().By(registry.Guest).Of(registry.Config).OK()))))
}

func newRegistry(t *testing.T, o ...registry.Option) *registry.Registry {
	t.Helper()
	// For guests that are not on this machine's loopback, or not the stand-in.
	if ip := os.Getenv("REGISTRY_ADDRESS"); ip != "" {
		o = append(o, registry.WithAddress(ip))
	}
	if agent := os.Getenv("GUEST_USER_AGENT"); agent != "" {
		o = append(o, registry.WithGuestUserAgent(agent))
	}
	reg, err := registry.Start(o...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, reg.Close()) })
	return reg
}

// image is an image in a test's registry.
type image struct {
	v1.Image
	Ref     string
	Name    string   // the repository
	Layers  []string // digests, lowest first
	ChainID string
}

// push builds an image and puts it into the registry, by its name and the tag 1.
func push(t *testing.T, reg *registry.Registry, s images.Spec) image {
	t.Helper()
	img, err := images.Build(s)
	require.NoError(t, err)
	ref, err := reg.Push(s.Name+":1", img)
	require.NoError(t, err)
	layers, err := images.LayerDigests(img)
	require.NoError(t, err)
	i := image{Image: img, Ref: ref, Name: s.Name, Layers: layers}
	chain := i.chain(t)
	i.ChainID = chain[len(chain)-1]
	return i
}

// chain returns the chain IDs of the image's layers, lowest first.
func (i image) chain(t *testing.T) []string {
	t.Helper()
	cfg, err := i.ConfigFile()
	require.NoError(t, err)
	var ids []digest.Digest
	for _, d := range cfg.RootFS.DiffIDs {
		ids = append(ids, digest.Digest(d.String()))
	}
	var chain []string
	for _, id := range identity.ChainIDs(ids) {
		chain = append(chain, id.String())
	}
	return chain
}

// plainHTTP is the option that a client needs for the test's registry.
var plainHTTP = containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{PlainHTTP: true}))

func runPod(t *testing.T, n *harness.Node, s harness.PodSpec) *harness.Pod {
	t.Helper()
	p, err := n.RunPod(t.Context(), s)
	require.NoError(t, err)
	return p
}

func run(t *testing.T, p *harness.Pod, s harness.ContainerSpec) *harness.Container {
	t.Helper()
	c, err := p.Run(t.Context(), s)
	require.NoError(t, err)
	return c
}

// requireRuns holds that a container does what its image is for.
func requireRuns(t *testing.T, c *harness.Container, img image) {
	t.Helper()
	_, err := c.WaitLogs(t.Context(), "hello from "+img.Name+"\n")
	require.NoError(t, err)
	out, err := c.Exec(t.Context(), "cat", "/etc/image-name")
	require.NoError(t, err)
	require.Equal(t, img.Name+"\n", out)
}

// requireInGuest holds that the image was pulled by the guest and not by the
// host, and that the container's root file system is the one volume that tells
// the guest so.
func requireInGuest(t *testing.T, n *harness.Node, reg *registry.Registry, c *harness.Container, img image) {
	t.Helper()
	require.ElementsMatch(t, img.Layers, reg.Log().By(registry.Guest).Of(registry.Layer).OK().In(img.Name).References(),
		"layers that the guest fetched")
	requireNotOnHost(t, n, img)

	mounts, err := n.Mounts(t.Context(), c.ID)
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	require.Equal(t, "fuse.nydus-overlayfs-guest-pull", mounts[0].Type)
	vol := decodeVolume(t, mounts[0].Options)
	require.Equal(t, img.ChainID, vol.ImagePull.Metadata[volume.MetadataChainID])
}

// requireNotOnHost holds that the host has the image's name, its snapshots and
// nothing of its contents.
func requireNotOnHost(t *testing.T, n *harness.Node, img image) {
	t.Helper()
	require.Empty(t, n.Blobs(img.Layers...), "layers in the content store")
	snapshots, err := n.Snapshots(harness.CRI(t.Context()), harness.Snapshotter)
	require.NoError(t, err)
	names := map[string]bool{}
	for _, s := range snapshots {
		names[s.Name] = true
		usage, err := n.Client.SnapshotService(harness.Snapshotter).Usage(harness.CRI(t.Context()), s.Name)
		require.NoError(t, err)
		if s.Labels["containerd.io/snapshot.ref"] != "" {
			require.Zero(t, usage.Size, "size of layer %s on the host", s.Name)
		}
	}
	require.True(t, names[img.ChainID], "the top layer's snapshot %s is not there", img.ChainID)
}

func decodeVolume(t *testing.T, options []string) volume.Volume {
	t.Helper()
	var found []volume.Volume
	for _, o := range options {
		if v, err := volume.ParseOption(o); err == nil {
			found = append(found, v)
		}
	}
	require.Len(t, found, 1, "volumes in the mount's options %q", options)
	return found[0]
}

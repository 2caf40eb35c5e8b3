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
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// pullPaths are the two ways in which containerd's CRI pulls. They share no code
// that a snapshotter sees: the transfer service has a list of snapshotters to
// unpack to, which the plugin has to be in; the local path has not.
var pullPaths = []struct {
	name    string
	options harness.Options
}{
	{"transfer", harness.Options{}},
	{"local", harness.Options{LocalPull: true}},
	{"transfer, discard_unpacked_layers", harness.Options{DiscardUnpackedLayers: true}},
	{"local, discard_unpacked_layers", harness.Options{LocalPull: true, DiscardUnpackedLayers: true}},
	{"transfer, handler in ImageSpec", harness.Options{PullHint: harness.HintImageSpec}},
	{"local, handler in annotation", harness.Options{LocalPull: true, PullHint: harness.HintAnnotation}},
}

// A layer that the snapshotter says it has is not fetched, whatever it is made
// of and however many there are: the host gets by with manifest and config, for
// every way to pull and every encoding.
func TestPullAndRun(t *testing.T) {
	specs := []images.Spec{
		{Name: "one-layer"},
		{Name: "five-layers", Layers: 5},
		{Name: "sixty-layers", Layers: 60, LayerSize: 1 << 10},
		{Name: "zstd", Layers: 3, Encoding: images.Zstd},
		{Name: "uncompressed", Layers: 3, Encoding: images.Uncompressed},
	}
	for _, path := range pullPaths {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			for _, spec := range specs {
				t.Run(spec.Name, func(t *testing.T) {
					img := push(t, reg, spec)
					pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
					c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
					requireRuns(t, c, img)
					requireInGuest(t, n, reg, c, img)

					host := reg.Log().By(registry.Host).In(img.Name)
					require.Empty(t, host.Of(registry.Layer))
					require.Len(t, host.Of(registry.Config).OK(), 1)
					manifest, err := img.RawManifest()
					require.NoError(t, err)
					config, err := img.RawConfigFile()
					require.NoError(t, err)
					require.EqualValues(t, len(manifest)+len(config), host.Bytes(), "bytes that the host fetched")

					stats, err := c.Stats(t.Context())
					require.NoError(t, err)
					require.NotZero(t, stats.GetMemory().GetUsageBytes().GetValue())
					require.NoError(t, pod.Remove(t.Context()))
				})
			}
		})
	}
}

// The control for all the others: the same calls for the handler runc make the
// host fetch and keep each layer, and the same witnesses notice.
func TestRuncPullsOnTheHost(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			reg := newRegistry(t)
			path.options.Registry = reg
			n := harness.New(t, path.options)
			img := push(t, reg, images.Spec{Name: "app", Layers: 5})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			require.ElementsMatch(t, img.Layers, reg.Log().By(registry.Host).Of(registry.Layer).OK().In(img.Name).References())
			require.ElementsMatch(t, img.Layers, n.Blobs(img.Layers...))
			require.Empty(t, reg.Log().By(registry.Guest))
		})
	}
}

// Of an index the host takes its own platform's manifest, and of that manifest
// no layer; the attestations next to it are nothing to unpack.
func TestIndex(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			img := push(t, reg, images.Spec{Name: "single", Layers: 3})
			index, err := images.Index(img.Image)
			require.NoError(t, err)
			img.Name = "multi"
			img.Ref, err = reg.Push("multi:1", index)
			require.NoError(t, err)

			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			_, err = c.WaitLogs(t.Context(), "hello from single\n")
			require.NoError(t, err)
			requireInGuest(t, n, reg, c, img)
		})
	}
}

// An image by digest keeps its digest on the way to the guest: both sides
// resolve the very same manifest, wherever the tag has moved meanwhile.
func TestImageByDigest(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	d, err := reg.Digest("app:1")
	require.NoError(t, err)
	other, err := images.Build(images.Spec{Name: "impostor"})
	require.NoError(t, err)
	_, err = reg.Push("app:1", other)
	require.NoError(t, err)

	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: reg.Ref("app@" + d.String())})
	requireRuns(t, c, img)
	requireInGuest(t, n, reg, c, img)
}

// The host cannot decrypt a layer and has no need to: an encrypted image pulls
// like any other. The key is the guest's affair, and the stand-in guest, which
// has none, says no; nothing of the attempt stays.
func TestEncryptedLayers(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			img := push(t, reg, images.Spec{Name: "secret", Layers: 3, Encoding: images.Encrypted})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			_, err := pod.Pull(t.Context(), img.Ref)
			require.NoError(t, err)
			requireNotOnHost(t, n, img)

			c, err := pod.Create(t.Context(), harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)
			err = c.Start(t.Context())
			require.Error(t, err)
			if n.StandIn() {
				require.ErrorContains(t, err, "encrypted")
			}
			require.NoError(t, c.Remove(t.Context()))
		})
	}
}

// The pause image comes before everything else on a node and is pulled for the
// sandbox's own handler, so it must work the same way: no layer on the host,
// and the guest has its own.
func TestPauseImage(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			for range 2 {
				runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			}
			log := reg.Log().In("pause")
			require.NotEmpty(t, log.By(registry.Host).Of(registry.Manifest))
			require.Empty(t, log.By(registry.Host).Of(registry.Layer))
			require.Empty(t, log.By(registry.Guest))
			require.Len(t, log.Of(registry.Config).OK(), 1, "the second pod has the image already")
		})
	}
}

// Containers of one image share its layers by name. Each has a root file system
// of its own, and the guest needs to fetch the image once for a pod.
func TestSeveralContainersOfOneImage(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 5})
	for range 2 {
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
		var containers []*harness.Container
		for range 3 {
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			requireInGuest(t, n, reg, c, img)
			containers = append(containers, c)
		}
		_, err := containers[0].Exec(t.Context(), "touch", "/mine")
		require.NoError(t, err)
		out, err := containers[1].Exec(t.Context(), "ls", "/")
		require.NoError(t, err)
		require.NotContains(t, out, "mine")
	}
	require.Len(t, reg.Log().By(registry.Host).In("app").Of(registry.Config).OK(), 1, "pulls by the host")

	upper := map[string]bool{}
	snapshots, err := n.Snapshots(harness.CRI(t.Context()), harness.Snapshotter)
	require.NoError(t, err)
	for _, s := range snapshots {
		upper[s.Parent] = true
	}
	require.True(t, upper[img.ChainID])
}

// Two images with the same lower layers, and one image under two tags, meet in
// the same snapshots. Neither the pull nor the run of one may depend on the
// other, and removing one leaves the other whole.
func TestSharedLayers(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	one := push(t, reg, images.Spec{Name: "one", Layers: 3})
	two := push(t, reg, images.Spec{Name: "two", Layers: 4})
	require.Equal(t, one.Layers[0], two.Layers[0], "the images share no layer, so this test shows nothing")
	alias := one
	var err error
	alias.Ref, err = reg.Push("one:alias", one.Image)
	require.NoError(t, err)

	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for _, img := range []image{one, two, alias} {
		requireRuns(t, run(t, pod, harness.ContainerSpec{Image: img.Ref}), img)
		requireNotOnHost(t, n, img)
	}
	require.NoError(t, pod.Remove(t.Context()))
	require.NoError(t, n.RemoveImage(t.Context(), one.Ref))
	require.NoError(t, n.GC(t.Context()))

	pod = runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: two.Ref, PullPolicy: harness.Never})
	requireRuns(t, c, two)
}

// The user, environment and command of an image come from its config,
// which the host does have.
func TestImageConfig(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{
		Name:       "configured",
		Layers:     2,
		User:       "1000:1000",
		Env:        []string{"GREETING=hello from configured"},
		Cmd:        []string{"/bin/sh", "-c", `trap "exit 0" TERM; echo "$GREETING"; id; pwd; tail -f /dev/null & wait`},
		WorkingDir: "/tmp",
	})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)
	logs, err := c.WaitLogs(t.Context(), "/tmp\n")
	require.NoError(t, err)
	require.Contains(t, logs, "uid=1000")
}

// Preparing a layer and looking it up are two calls of containerd's metadata
// store, between which any number of others may be; images here share layers, in
// four namespaces, so that they meet. Each pull must end with a whole chain of
// snapshots, and none may fall back to fetching.
func TestConcurrentPulls(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	var imgs []image
	for i := range 4 {
		imgs = append(imgs, push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", i), Layers: 10 + i, LayerSize: 1 << 10}))
	}
	type pull struct {
		namespace string
		img       image
	}
	done := make(chan error)
	var pulls []pull
	for i := range 16 {
		p := pull{fmt.Sprintf("ns-%d", i/4), imgs[i%4]}
		pulls = append(pulls, p)
		go func() {
			if i%2 == 0 { // through the transfer service
				_, err := n.Ctr(t.Context(), "-n", p.namespace, "images", "pull", "--plain-http", "--snapshotter", harness.Snapshotter, p.img.Ref)
				done <- err
				return
			}
			_, err := n.Client.Pull(namespaces.WithNamespace(t.Context(), p.namespace), p.img.Ref,
				containerd.WithPullUnpack, containerd.WithPullSnapshotter(harness.Snapshotter), plainHTTP)
			done <- err
		}()
	}
	for range pulls {
		assert.NoError(t, <-done)
	}
	for _, p := range pulls {
		ctx := namespaces.WithNamespace(t.Context(), p.namespace)
		img, err := n.Client.GetImage(ctx, p.img.Ref)
		require.NoError(t, err)
		unpacked, err := img.IsUnpacked(ctx, harness.Snapshotter)
		require.NoError(t, err)
		require.Truef(t, unpacked, "%s in namespace %s", p.img.Name, p.namespace)
		require.Empty(t, n.Blobs(p.img.Layers...))
	}
	for i := range 4 {
		infos, err := n.Snapshots(namespaces.WithNamespace(t.Context(), fmt.Sprintf("ns-%d", i)), harness.Snapshotter)
		require.NoError(t, err)
		distinct := map[string]bool{}
		for _, img := range imgs {
			for _, chain := range img.chain(t) {
				distinct[chain] = true
			}
		}
		require.Len(t, infos, len(distinct), "snapshots of namespace ns-%d", i)
	}
}

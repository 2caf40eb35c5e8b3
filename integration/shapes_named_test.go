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
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// Images that people have, each of which once put layers on the host, or did not
// run, or ran on an empty directory. The rules that they are judged by are those of
// TestShapes.
var knownShapes = []struct {
	name  string
	shape images.Shape
	// refused is one that cannot run.
	refused bool
}{
	// What buildah and podman --add-compression write.
	{"gzip and zstd with one config", images.Shape{More: 2, Indexes: 1, Twin: images.Zstd}, false},
	{"zstd and gzip with one config", images.Shape{More: 2, Indexes: 1, Twin: images.Zstd, TwinFirst: true}, false},
	{"os.features", images.Shape{More: 1, OSFeatures: []string{"win32k"}}, false},
	{"another os", images.Shape{More: 1, OS: "windows"}, false},
	{"another architecture", images.Shape{More: 1, Architecture: "arm64"}, false},
	{"another architecture, of layers that the host has for another image", images.Shape{SameTwice: true, Architecture: "wasm"}, false},
	{"another architecture in an index of this one", images.Shape{More: 1, Architecture: "arm64", Indexes: 1}, false},
	{"another variant", images.Shape{More: 1, Variant: "v9"}, false},
	{"a layer of an unknown media type", images.Shape{More: 2, LayerType: "application/octet-stream"}, false},
	{"only a layer of an unknown media type", images.Shape{LayerType: "application/octet-stream"}, false},
	{"a blob that is no layer", images.Shape{More: 1, Blobs: []string{"application/octet-stream"}}, true},
	{"an artifact", images.Shape{NoLayers: true, Blobs: []string{"application/vnd.example.weights.v1"}, ArtifactType: "application/vnd.example.model.v1"}, true},
	{"an artifact with layers", images.Shape{More: 1, ArtifactType: "application/vnd.example.model.v1"}, true},
	{"a config of an unknown media type", images.Shape{More: 1, ConfigType: "application/vnd.example.config.v1+json"}, true},
	{"a config whose media type a registry lost", images.Shape{More: 1, ConfigType: "application/octet-stream"}, false},
	{"no layers", images.Shape{NoLayers: true}, true},
	{"500 layers", images.Shape{More: 499, Encoding: images.Uncompressed}, false},
	{"501 layers", images.Shape{More: 500, Encoding: images.Uncompressed}, true},
	{"20,000 layers", images.Shape{More: 19999, Encoding: images.Uncompressed}, true},
	{"the same layer twice", images.Shape{More: 1, SameTwice: true}, false},
	{"foreign layers", images.Shape{More: 1, LayerType: foreignTypes[0]}, false},
	{"an attestation, and an artifact without a platform", images.Shape{More: 1, Indexes: 1, Attestations: true, Companion: true}, false},
	{"an index in an index", images.Shape{More: 1, Indexes: 3, OtherPlatforms: true}, false},
	{"an index that names no platform", images.Shape{More: 1, Indexes: 1, NoPlatform: true}, false},
	{"an index that names no platform for it, but for others", images.Shape{More: 1, Indexes: 1, NoPlatform: true, OtherPlatforms: true}, false},
	{"a config of another architecture, in an index that names no platform", images.Shape{More: 1, Indexes: 1, NoPlatform: true, Architecture: "arm64"}, true},
	{"a layer that claims to be a manifest", images.Shape{More: 1, LayerType: "application/vnd.oci.image.manifest.v1+json"}, true},
	{"only a layer that claims to be an index", images.Shape{LayerType: "application/vnd.docker.distribution.manifest.list.v2+json"}, true},
	{"an index of other platforms", images.Shape{Indexes: 1, OnlyOthers: true}, true},
	{"an artifact in an index of other platforms", images.Shape{Indexes: 1, OnlyOthers: true, Companion: true}, true},
	{"a large config", images.Shape{ConfigSize: 1 << 20}, false},
	{"a config too large to be one", images.Shape{ConfigSize: 9 << 20}, true},
	{"annotations that are labels elsewhere", images.Shape{More: 1, Annotations: annotations[0]}, false},
	{"annotations of other snapshotters", images.Shape{More: 1, Annotations: annotations[1]}, false},
	{"annotations that are longer than labels", images.Shape{More: 1, Annotations: map[string]string{"containerd.io/snapshot/x": fmt.Sprintf("%05000d", 0)}}, false},
}

// For a pod in a guest the host fetches the manifest and the config, and the pod
// runs, or its first error says which image cannot be run and why: for a new image,
// for one that pods on the host used before or that was imported, and also if the
// pod may not pull.
func TestPatchKnownShapes(t *testing.T) {
	skipShapes(t)
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			t.Parallel()
			n := startShapesNode(t, shapeNode{LocalPull: path.options.LocalPull})
			for _, k := range knownShapes {
				require.Equal(t, k.refused, refusal(k.shape) != nil, k.name)
				orders := map[string]shapeCase{
					"guest first": {Pods: []shapePod{{}, {Runc: true}, {Policy: harness.Never}}},
					"runc first":  {Pods: []shapePod{{Runc: true}, {Policy: harness.Never}}},
				}
				if k.shape.More > 100 { // which take pods on the host a while
					orders = map[string]shapeCase{"guest only": {Pods: []shapePod{{}}}}
				}
				for order, c := range orders {
					t.Run(k.name+"/"+order, func(t *testing.T) {
						c.Image = k.shape
						require.NoError(t, n.try(t.Context(), c))
					})
				}
			}
		})
	}
}

// The same images, by other ways than a pull for a pod, and as volumes, which are
// for the host to mount: a pod in a guest is refused, one on the host has them.
func TestPatchKnownShapesOtherwise(t *testing.T) {
	skipShapes(t)
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			t.Parallel()
			n := startShapesNode(t, shapeNode{LocalPull: path.options.LocalPull})
			for name, shape := range map[string]images.Shape{
				"plain":                        {More: 2},
				"gzip and zstd":                {More: 1, Indexes: 1, Twin: images.Zstd},
				"another architecture":         {More: 1, Architecture: "arm64"},
				"a layer of an unknown type":   {More: 1, LayerType: "application/octet-stream"},
				"an artifact":                  {NoLayers: true, Blobs: []string{"application/vnd.example.weights.v1"}, ArtifactType: "application/vnd.example.model.v1"},
				"an artifact of layers' types": {More: 1, ArtifactType: "application/vnd.example.model.v1"},
				"no layers":                    {NoLayers: true},
			} {
				for way, c := range map[string]shapeCase{
					"pulled for no pod":          {Before: "pull", Pods: []shapePod{{Policy: harness.Never}}},
					"imported":                   {Before: "import", Pods: []shapePod{{Policy: harness.Never}, {Runc: true}}},
					"pulled by ctr":              {Before: "ctr", Pods: []shapePod{{}}},
					"image volume":               {Pods: []shapePod{{Volume: true}, {Runc: true, Volume: true}}},
					"image volume, after runc's": {Pods: []shapePod{{Runc: true, Volume: true}, {Volume: true}}},
				} {
					t.Run(name+"/"+way, func(t *testing.T) {
						c.Image = shape
						require.NoError(t, n.try(t.Context(), c))
					})
				}
			}
		})
	}
}

func startShapesNode(t *testing.T, conf shapeNode) *shapesNode {
	t.Helper()
	n, err := newShapesNode(t.Context(), conf)
	require.NoError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last lines of containerd's log:\n%s", n.node.LogTail(60))
			require.NoError(t, n.shutDown())
			return
		}
		require.NoError(t, n.close(context.Background()))
	})
	return n
}

// The pause image is an image like others: whatever its config claims, and for
// whichever kind of pod it came to the node, sandboxes in guests start.
func TestPatchKnownPauseImages(t *testing.T) {
	skipShapes(t)
	for _, path := range pullPaths[:2] {
		for name, shape := range map[string]images.Shape{
			"another architecture":             {Architecture: "arm64"},
			"another architecture in an index": {Architecture: "arm64", Indexes: 1},
			"another os":                       {OS: "windows"},
			"os.features":                      {OSFeatures: []string{"win32k"}},
			"gzip and zstd":                    {Indexes: 1, Twin: images.Zstd},
			"a layer of an unknown media type": {LayerType: "application/octet-stream"},
		} {
			for _, runcFirst := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/runc first=%t", path.name, name, runcFirst), func(t *testing.T) {
					t.Parallel()
					n := startShapesNode(t, shapeNode{LocalPull: path.options.LocalPull, RuncFirst: runcFirst, Pause: shape})
					require.NoError(t, n.try(t.Context(), shapeCase{Pods: []shapePod{{}}}))
				})
			}
		}
	}
}

// What a pod's snapshotter is says its handler, whatever the image service's own
// table of platforms has for it.
func TestPatchRuntimePlatformWithoutSnapshotter(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			o := path.options
			o.PullHint = harness.HintNone
			o.ExtraConfig = "[plugins.'io.containerd.cri.v1.images'.runtime_platforms.guest]\nplatform = 'linux/" + runtime.GOARCH + "'\n"
			n, reg := newNode(t, o)
			img := push(t, reg, images.Spec{Name: "app", Layers: 3})
			c := run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			requireInGuest(t, n, reg, c, img)
		})
	}
}

// The size of an image is what its removal frees: what the host has of it, of one
// manifest, however many tags and encodings it has, in whatever order they come.
func TestPatchSizeOfTagsAndEncodings(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			encodings := []images.Encoding{images.Uncompressed, images.Zstd, images.Gzip}
			n, reg := newMixedNode(t, path.options)
			for round, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {2, 0}, {1, 2}} {
				name := fmt.Sprintf("app-%d", round)
				var sizes []int64 // of manifest, config and layers
				for _, i := range order {
					content, err := images.Shape{More: 2, Encoding: encodings[i]}.Build(name)
					require.NoError(t, err)
					tag := fmt.Sprint(i)
					require.NoError(t, content.Put(reg, name, tag))
					reg.Reset()
					pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
					_, err = pod.Pull(t.Context(), reg.Ref(name+":"+tag))
					require.NoError(t, err)
					require.Empty(t, reg.Log().By(registry.Host).Of(registry.Layer))
					require.NoError(t, pod.Remove(t.Context()))
					sizes = append(sizes, content.Size())

					size := listedSize(t, n, content.Config.Digest.String())
					require.Less(t, size, int64(8<<10), "guests only, after %v of the order %v", i, order)
					require.Positive(t, size)
				}
				// A pod on the host brings the layers of one manifest.
				pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
				_, err := pod.Pull(t.Context(), reg.Ref(fmt.Sprintf("%s:%d", name, order[0])))
				require.NoError(t, err)
				content, err := images.Shape{More: 2, Encoding: encodings[order[0]]}.Build(name)
				require.NoError(t, err)
				size := listedSize(t, n, content.Config.Digest.String())
				require.Contains(t, sizes, size, "pulled for the host, order %v", order)
				require.NoError(t, pod.Remove(t.Context()))
				require.NoError(t, n.RemoveImage(t.Context(), content.Config.Digest.String()))
				require.NoError(t, n.GC(t.Context()))
			}
		})
	}
}

// listedSize returns the size of an image in ListImages.
func listedSize(t *testing.T, n *harness.Node, id string) int64 {
	t.Helper()
	r, err := n.Images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	require.NoError(t, err)
	for _, i := range r.GetImages() {
		if i.Id == id {
			require.Less(t, i.Size, uint64(1<<40), "%d would be negative", i.Size)
			return int64(i.Size)
		}
	}
	require.Failf(t, "not listed", "image %s", id)
	return 0
}

// What one pod is missing is no other pod's affair: the presence check of another
// tenant's pod, older than kubelet's last start or not, is answered for what that
// pod's own snapshotter has, whatever annotation the first one has.
func TestPatchMissingForOnePodOnly(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := newMixedNode(t, path.options)
			img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
			victim := runPod(t, n, harness.PodSpec{Handler: harness.Guest, Namespace: "victim"})
			require.NoError(t, runAs(ctx, victim, img))
			restarted := func(p *harness.Pod) { p.Config.Annotations[firstSeen] = time.Now().Format(time.RFC3339Nano) }
			restarted(victim) // kubelet
			absent := func() error {
				c, err := victim.Run(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
				if err != nil {
					return err
				}
				return c.Remove(ctx)
			}

			// One that says that it is for the guest, and is not.
			liar := runPod(t, n, harness.PodSpec{
				Handler: harness.Runc, Namespace: "liar",
				Annotations: map[string]string{"io.containerd.cri.runtime-handler": harness.Guest},
			})
			// The sandbox outranks the annotation: it gets what it needs.
			c, errs := start(ctx, liar, harness.ContainerSpec{Image: img.Ref}, 3)
			require.NoError(t, errs[len(errs)-1])
			require.NoError(t, checkUser(ctx, c, "1000"))
			require.NoError(t, absent())

			// One that may not pull, of an image that only the guest has.
			other := push(t, reg, images.Spec{Name: "other", Layers: 3, User: "1000"})
			img = other
			victim = runPod(t, n, harness.PodSpec{Handler: harness.Guest, Namespace: "victim"})
			require.NoError(t, runAs(ctx, victim, img))
			restarted(victim)
			never := runPod(t, n, harness.PodSpec{Handler: harness.Runc, Namespace: "never"})
			restarted(never)
			for range 3 {
				_, errs := start(ctx, never, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never}, 1)
				require.Error(t, errs[0])
				require.NoError(t, absent())
			}
		})
	}
}

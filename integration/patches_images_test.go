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
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// firstSeen is an annotation that kubelet adds to a pod, anew when it restarts.
const firstSeen = "kubernetes.io/config.seen"

// mixedPaths are the ways to pull that differ in what stays of an image.
var mixedPaths = []struct {
	name    string
	options harness.Options
}{
	{"transfer", harness.Options{}},
	{"local", harness.Options{LocalPull: true}},
	{"local, discard_unpacked_layers", harness.Options{LocalPull: true, DiscardUnpackedLayers: true}},
}

// onlyManifests fails if the host has fetched a layer of the image.
func onlyManifests(reg *registry.Registry, name string) error {
	if layers := reg.Log().By(registry.Host).In(name).Of(registry.Layer).References(); len(layers) > 0 {
		return fmt.Errorf("the host has fetched %d layers of %s", len(layers), name)
	}
	return nil
}

// kubelet does not say for which runtime handler a pull is. The sandbox of the pod
// that it is for knows.
func TestPatchPullForTheSandbox(t *testing.T) {
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				o := path.options
				o.Binaries, o.PullHint = binaries, harness.HintNone
				n, reg := newMixedNode(t, o)
				img := push(t, reg, images.Spec{Name: "app", Layers: 5})

				pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
				_, err := pod.Pull(t.Context(), img.Ref)
				require.NoError(t, err)
				requireFixed(t, n, "0001", onlyManifests(reg, "app"), "the host has fetched 5 layers of app")

				// Others still get what they ask for.
				other := push(t, reg, images.Spec{Name: "other", Layers: 3})
				pod = runPod(t, n, harness.PodSpec{Handler: harness.Runc})
				_, err = pod.Pull(t.Context(), other.Ref)
				require.NoError(t, err)
				require.ErrorContains(t, onlyManifests(reg, "other"), "the host has fetched")
			})
		})
	}
}

// A pod that names no handler has the default one, which may have a snapshotter
// that is not the default one. This is so for its pause image too.
func TestPatchPullForTheDefaultHandler(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		reg := newRegistry(t)
		n := harness.New(t, harness.Options{
			Registry: reg, Binaries: binaries, PullHint: harness.HintNone,
			ExtraConfig: "[plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'guest'",
		})
		img := push(t, reg, images.Spec{Name: "app", Layers: 5})
		pod := runPod(t, n, harness.PodSpec{})
		_, err := pod.Pull(t.Context(), img.Ref)
		require.NoError(t, err)
		requireFixed(t, n, "0003", onlyManifests(reg, "pause"), "the host has fetched 1 layers of pause")
		requireFixed(t, n, "0001", onlyManifests(reg, "app"), "the host has fetched 5 layers of app")
	})
}

// One image serves pods of both kinds, in whatever order they come, and as the
// user that it names. The first that needs layers gets them pulled, at kubelet's
// first attempt.
func TestPatchSameImageInEveryOrder(t *testing.T) {
	const guest, runc = harness.Guest, harness.Runc
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				o := path.options
				o.Binaries = binaries
				n, reg := newMixedNode(t, o)
				for i, test := range []struct {
					order  []string
					policy harness.PullPolicy
					stock  string // what goes wrong without the patch
				}{
					{order: []string{runc, guest, runc, guest}, policy: harness.IfNotPresent},
					{order: []string{guest, runc, guest, runc}, policy: harness.IfNotPresent, stock: "not found"},
					{order: []string{guest, guest, runc}, policy: harness.IfNotPresent, stock: "not found"},
					{order: []string{guest, runc, guest}, policy: harness.Always},
					{order: []string{runc, guest, runc}, policy: harness.Always},
				} {
					t.Run(fmt.Sprintf("%s %v", test.policy, test.order), func(t *testing.T) {
						img := push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", i), Layers: 4, User: "1000"})
						err := func() error {
							for _, handler := range test.order {
								pod := runPod(t, n, harness.PodSpec{Handler: handler})
								c, errs := start(t.Context(), pod, harness.ContainerSpec{Image: img.Ref, PullPolicy: test.policy}, 1)
								if c == nil {
									return fmt.Errorf("pod of handler %q: %w", handler, errors.Join(errs...))
								}
								if err := checkUser(t.Context(), c, "1000"); err != nil {
									return err
								}
								requireRuns(t, c, img)
							}
							return nil
						}()
						requireFixed(t, n, "0002", err, test.stock)
						requireListedOnce(t, n, img)
					})
				}
			})
		})
	}
}

// requireListedOnce holds that the image is one image, with a size, to kubelet's
// garbage collector, which removes images by their ID.
func requireListedOnce(t *testing.T, n *harness.Node, img image) {
	t.Helper()
	r, err := n.Images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	require.NoError(t, err)
	var found []*runtimeapi.Image
	for _, i := range r.GetImages() {
		for _, tag := range i.RepoTags {
			if tag == img.Ref {
				found = append(found, i)
			}
		}
	}
	require.Len(t, found, 1)
	require.NotZero(t, found[0].Size)
	id, err := img.ConfigName()
	require.NoError(t, err)
	require.Equal(t, id.String(), found[0].Id)
}

// Two images with the same base: what one left behind of it, snapshots without
// content, must not make the other look complete, nor incomplete.
func TestPatchSharedBase(t *testing.T) {
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				o := path.options
				o.Binaries = binaries
				n, reg := newMixedNode(t, o)
				one := push(t, reg, images.Spec{Name: "one", Layers: 3, User: "1000"})
				two := push(t, reg, images.Spec{Name: "two", Layers: 3, User: "1000"})
				require.Equal(t, one.Layers[0], two.Layers[0], "the images share no layer, so this test shows nothing")

				require.NoError(t, runAs(t.Context(), runPod(t, n, harness.PodSpec{Handler: harness.Runc}), one))
				require.NoError(t, n.GC(t.Context()))
				require.NoError(t, runAs(t.Context(), runPod(t, n, harness.PodSpec{Handler: harness.Guest}), two))
				require.NoError(t, n.GC(t.Context()))
				reg.Reset()
				err := runAs(t.Context(), runPod(t, n, harness.PodSpec{Handler: harness.Runc}), two)
				requireFixed(t, n, "0002", err, "not found")
				if hasPatch(n, "0002") {
					require.ElementsMatch(t, two.Layers[1:], reg.Log().By(registry.Host).Of(registry.Layer).OK().References(),
						"layers that the host fetched, of which it had the lowest")
				}
			})
		})
	}
}

// runAs runs a container of an image with the user 1000, as kubelet does at its
// first attempt.
func runAs(ctx context.Context, pod *harness.Pod, img image) error {
	c, err := pod.Run(ctx, harness.ContainerSpec{Image: img.Ref})
	if err != nil {
		return err
	}
	return checkUser(ctx, c, "1000")
}

// After its restart kubelet sends other annotations than the sandbox has, so
// nothing tells which pod a presence check is for. Then CreateContainer says what
// is missing, the next check does not find the image, and the attempt after a
// failed one succeeds. Pods that need nothing are not disturbed, and what
// containerd remembered of it may get lost.
func TestPatchRefusedThenPulled(t *testing.T) {
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				ctx := t.Context()
				o := path.options
				o.Binaries = binaries
				n, reg := newMixedNode(t, o)
				img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
				guest := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
				require.NoError(t, runAs(ctx, guest, img))

				pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
				pod.Config.Annotations[firstSeen] = time.Now().Format(time.RFC3339Nano)
				spec := harness.ContainerSpec{Image: img.Ref}

				for range 2 {
					_, err := pod.Run(ctx, spec)
					require.Error(t, err)
					if hasPatch(n, "0002") {
						for _, s := range []string{img.Ref, `snapshotter "overlayfs"`, img.Layers[2], "has to be pulled for this snapshotter"} {
							require.ErrorContains(t, err, s)
						}
					}
					require.Empty(t, containersOf(t, n, pod))

					// A pod that has what it needs is not told otherwise, and
					// nobody who asks for the user is.
					status, err := n.ImageStatus(ctx, img.Ref)
					require.NoError(t, err)
					require.NotNil(t, status)
					require.EqualValues(t, 1000, status.GetUid().GetValue())
					c, err := guest.Run(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
					require.NoError(t, err)
					require.NoError(t, checkUser(ctx, c, "1000"))

					require.NoError(t, n.Kill())
					require.NoError(t, n.Up(ctx))
				}

				c, errs := start(ctx, pod, spec, 3)
				requireFixed(t, n, "0002", errs[len(errs)-1], "not found")
				if c == nil {
					return
				}
				require.Len(t, errs, 2, "one refusal")
				require.NoError(t, checkUser(ctx, c, "1000"))

				// It is present from now on, for the pod that cannot be told too.
				_, err := pod.Run(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
				require.NoError(t, err)
			})
		})
	}
}

// A pod that must not pull never runs an image of which only a guest has the
// layers, however often it is tried, and neither as root. It spoils nothing for
// others.
func TestPatchNeverPolicy(t *testing.T) {
	ctx := t.Context()
	n, reg := newMixedNode(t, harness.Options{})
	if !hasPatch(n, "0002") {
		t.Skip("this containerd has no patch 0002")
	}
	img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
	guest := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	require.NoError(t, runAs(ctx, guest, img))

	never := harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never}
	for name, seen := range map[string]string{"known": "", "unknown": "2000-01-01T00:00:00Z"} {
		t.Run(name, func(t *testing.T) {
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
			if seen != "" {
				pod.Config.Annotations[firstSeen] = seen
			}
			for range 4 {
				_, errs := start(ctx, pod, never, 1)
				require.Error(t, errs[0])
				if !strings.Contains(errs[0].Error(), "not present with pull policy Never") {
					require.ErrorContains(t, errs[0], "has to be pulled for this snapshotter")
				}
				require.Empty(t, containersOf(t, n, pod))
				c, err := guest.Run(ctx, never)
				require.NoError(t, err)
				require.NoError(t, checkUser(ctx, c, "1000"))
			}
			require.NoError(t, pod.Remove(ctx))
		})
	}
	require.NoError(t, runAs(ctx, runPod(t, n, harness.PodSpec{Handler: harness.Runc}), img))
	_, err := runPod(t, n, harness.PodSpec{Handler: harness.Runc}).Run(ctx, never)
	require.NoError(t, err, "pulled now")
}

// Pods of both kinds that start the same images at the same time each get what
// they need, as the user that they should have.
func TestPatchPodsAtTheSameTime(t *testing.T) {
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := newMixedNode(t, path.options)
			if !hasPatch(n, "0002") {
				t.Skip("this containerd has no patch 0002")
			}
			for round := range 3 {
				img := push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", round), Layers: 6, User: "1000"})
				var wg sync.WaitGroup
				for i := range 8 {
					handler := []string{harness.Guest, harness.Runc}[(i+round)%2]
					pod := runPod(t, n, harness.PodSpec{Handler: handler})
					if i >= 4 { // kubelet was restarted
						pod.Config.Annotations[firstSeen] = time.Now().Format(time.RFC3339Nano)
					}
					wg.Go(func() {
						c, errs := start(ctx, pod, harness.ContainerSpec{Image: img.Ref}, 3)
						if assert.NoErrorf(t, errs[len(errs)-1], "pod of handler %q", handler) {
							assert.NoError(t, checkUser(ctx, c, "1000"))
						}
					})
				}
				wg.Wait()
			}
		})
	}
}

// An image volume is an image that the host mounts, so it needs layers there too.
func TestPatchImageVolume(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		ctx := t.Context()
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		app := push(t, reg, images.Spec{Name: "app", User: "1000"})
		data := push(t, reg, images.Spec{Name: "data", Layers: 3, User: "1000"})
		require.NoError(t, runAs(ctx, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), data))

		for name, restarted := range map[string]bool{"kubelet running": false, "kubelet restarted": true} {
			t.Run(name, func(t *testing.T) {
				pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
				if restarted {
					pod.Config.Annotations[firstSeen] = time.Now().Format(time.RFC3339Nano)
				}
				var err error
				for range 2 {
					// kubelet makes sure of the volumes' images before it comes
					// to the container.
					var ref string
					ref, err = pod.EnsureImage(ctx, data.Ref, harness.IfNotPresent, nil)
					require.NoError(t, err)
					var c *harness.Container
					c, err = pod.Run(ctx, harness.ContainerSpec{Image: app.Ref, Mounts: []*runtimeapi.Mount{{
						ContainerPath: "/data-image", Readonly: true,
						Image: &runtimeapi.ImageSpec{Image: ref, UserSpecifiedImage: data.Ref},
					}}})
					if err != nil {
						continue
					}
					out, err := c.Exec(ctx, "cat", "/data-image/etc/image-name")
					require.NoError(t, err)
					require.Equal(t, "data\n", out)
					break
				}
				requireFixed(t, n, "0002", err, "not found")
			})
		}
	})
}

// Whoever is not kubelet, and has no pull to follow, is told what to do.
func TestPatchErrorToOthers(t *testing.T) {
	ctx := t.Context()
	n, reg := newMixedNode(t, harness.Options{})
	if !hasPatch(n, "0002") {
		t.Skip("this containerd has no patch 0002")
	}
	img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
	require.NoError(t, runAs(ctx, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), img))

	pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
	create := func() error {
		_, err := pod.CreateFrom(ctx, &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
			Image:    &runtimeapi.ImageSpec{Image: img.Ref},
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}},
		})
		return err
	}
	for range 3 {
		err := create()
		require.ErrorContains(t, err, img.Ref)
		require.ErrorContains(t, err, `snapshotter "overlayfs"`)
		require.ErrorContains(t, err, "has to be pulled for this snapshotter")
	}
	_, err := n.Pull(ctx, harness.PullSpec{Image: img.Ref, Pod: pod.Config})
	require.NoError(t, err)
	require.NoError(t, create())
}

// What is on the node is there after a restart of containerd: guest-pulled images
// are neither lost nor complained about.
func TestPatchImagesAfterRestart(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		ctx := t.Context()
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
		require.NoError(t, runAs(ctx, pod, img))

		require.NoError(t, n.Kill())
		require.NoError(t, n.Up(ctx))
		requireListedOnce(t, n, img)
		c, err := pod.Run(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
		require.NoError(t, err)
		require.NoError(t, checkUser(ctx, c, "1000"))

		log, err := os.ReadFile(n.LogFile())
		require.NoError(t, err)
		err = nil
		for line := range strings.Lines(string(log)) {
			if strings.Contains(line, img.Ref) && strings.Contains(line, "is not unpacked") {
				err = errors.New(line)
			}
		}
		requireFixed(t, n, "0002", err, "is not unpacked")
	})
}

// The pause image serves sandboxes of both kinds, whichever is the first on a
// node.
func TestPatchPauseImage(t *testing.T) {
	for _, path := range mixedPaths {
		for _, test := range []struct {
			order []string
			stock string
		}{
			{[]string{harness.Guest, harness.Runc, harness.Guest}, "not found"},
			{[]string{harness.Runc, harness.Guest, harness.Runc}, ""},
		} {
			t.Run(fmt.Sprintf("%s %v", path.name, test.order), func(t *testing.T) {
				eachContainerd(t, func(t *testing.T, binaries string) {
					o := path.options
					o.Binaries, o.Registry = binaries, newRegistry(t)
					n := harness.New(t, o)
					var err error
					for _, handler := range test.order {
						if _, err = n.RunPod(t.Context(), harness.PodSpec{Handler: handler}); err != nil {
							break
						}
						require.NoError(t, n.Kill())
						require.NoError(t, n.Up(t.Context()))
					}
					requireFixed(t, n, "0003", err, test.stock)
				})
			})
		}
	}
}

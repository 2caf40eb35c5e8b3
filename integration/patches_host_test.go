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
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// To make a container's spec, containerd looks into its root file system. That
// must not mount it: of a guest's, nothing is on the host.
func TestPatchNoMountOnTheHost(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		// What containerd starts to mount anything of a type fuse.*
		helper, err := exec.LookPath("mount.fuse")
		if err != nil {
			helper, err = exec.LookPath("/sbin/mount.fuse")
		}
		require.NoError(t, err)
		dir := t.TempDir()
		script := fmt.Sprintf("#!/bin/sh\necho \"$@\" >>%s/log\nexec %s \"$@\"\n", dir, helper)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "mount.fuse"), []byte(script), 0o755))
		binaries, err = filepath.Abs(binaries)
		require.NoError(t, err)

		reg := newRegistry(t)
		n := harness.New(t, harness.Options{
			Registry: reg, Binaries: binaries,
			Env: []string{"PATH=" + strings.Join([]string{dir, binaries, os.Getenv("PATH"), "/usr/sbin:/sbin"}, ":")},
		})
		img := push(t, reg, images.Spec{Name: "app", Layers: 2, User: "1000", Volumes: []string{"/volume"}})
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
		require.NoError(t, runAs(t.Context(), pod, img))

		log, err := os.ReadFile(filepath.Join(dir, "log"))
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		require.NoError(t, err)
		if mounts := strings.Count(string(log), "\n"); mounts > 0 {
			err = fmt.Errorf("containerd ran the mount helper %d times", mounts)
		}
		requireFixed(t, n, "0004", err, "containerd ran the mount helper")
	})
}

// A user that has a name cannot be resolved on the host. The pod's author learns
// which one of which image, and following the advice helps.
func TestPatchUserName(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		// Kubelet gives "app" in both cases.
		for i, user := range []string{"app", "app:extra"} {
			img := push(t, reg, images.Spec{Name: fmt.Sprintf("named-%d", i), Layers: 2, User: user})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			_, failed := pod.Run(t.Context(), harness.ContainerSpec{Image: img.Ref})
			require.Error(t, failed)
			var err error
			for _, s := range []string{`user "app`, img.Ref, "securityContext:", "runAsUser: ", "runAsGroup: "} {
				if !strings.Contains(failed.Error(), s) {
					err = fmt.Errorf("the error does not say %q: %w", s, failed)
				}
			}
			requireFixed(t, n, "0005", err, "the error does not say")

			id := int64(1000)
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref, RunAsUser: &id, RunAsGroup: &id})
			require.NoError(t, checkUser(t.Context(), c, "1000"))
			// On the host the names are there.
			require.NoError(t, runAs(t.Context(), runPod(t, n, harness.PodSpec{Handler: harness.Runc}), push(t, reg, images.Spec{Name: fmt.Sprintf("runc-%d", i), User: user})))
		}
	})
}

// Of an image's USER kubelet gives the uid, and containerd looks up the group in
// /etc/passwd of the image, which the host does not have.
func TestPatchUserGroup(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		img := push(t, reg, images.Spec{Name: "app", Layers: 2, User: "1000:2000"})
		id := int64(1000)
		c := run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref, RunAsUser: &id})
		out, err := c.Exec(t.Context(), "id", "-g")
		require.NoError(t, err)
		if out != "2000\n" {
			err = fmt.Errorf("the group is %q", out)
		}
		requireFixed(t, n, "0005", err, `the group is "0\n"`)
	})
}

// Each transaction of the metadata store waits for the disk twice. A pull takes as
// many for an image of many layers as for one of few.
func TestPatchTransactions(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		pull := func(layers int) int {
			img := push(t, reg, images.Spec{Name: fmt.Sprintf("layers-%d", layers), Layers: layers})
			before := transactions(t, n)
			_, err := n.Pull(t.Context(), harness.PullSpec{Image: img.Ref, Handler: harness.Guest, Hint: harness.HintImageSpec})
			require.NoError(t, err)
			return transactions(t, n) - before
		}
		few, many := pull(2), pull(42)
		var err error
		// Garbage collection may come at any time.
		if many > few+10 {
			err = fmt.Errorf("%d transactions for 2 layers, many more for 42: %d", few, many)
		}
		requireFixed(t, n, "0012", err, "many more")
	})
}

// transactions returns how many transactions the metadata store of a node has
// committed so far. It can only be opened while containerd is down.
func transactions(t *testing.T, n *harness.Node) int {
	t.Helper()
	require.NoError(t, n.Down())
	defer func() { require.NoError(t, n.Up(t.Context())) }()
	id, err := harness.Transactions(filepath.Join(n.Root(), "io.containerd.metadata.v1.bolt", "meta.db"))
	require.NoError(t, err)
	return id
}

// kubelet looks up the mountpoint that the statistics name, and fails if it is
// empty. Its first image file system stays the default one.
func TestPatchStatistics(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		ctx := t.Context()
		n, reg := newMixedNode(t, harness.Options{
			Binaries:    binaries,
			ExtraConfig: "[plugins.'io.containerd.cri.v1.images']\nstats_collect_period = 1",
		})
		img := push(t, reg, images.Spec{Name: "app", Layers: 2, User: "1000"})
		roots := map[string]string{
			harness.Guest: n.SnapshotterRoot(harness.Snapshotter),
			harness.Runc:  n.SnapshotterRoot("overlayfs"),
		}
		// What stock containerd never has comes last, after what it has in the end.
		handlers := []string{harness.Runc, harness.Guest}
		containers := map[string]*harness.Container{}
		for _, handler := range handlers {
			pod := runPod(t, n, harness.PodSpec{Handler: handler})
			_, err := pod.Pull(ctx, img.Ref)
			require.NoError(t, err)
			containers[handler] = run(t, pod, harness.ContainerSpec{Image: img.Ref})
		}

		check := func() error {
			for _, handler := range handlers {
				stats, err := containers[handler].Stats(ctx)
				if err != nil {
					return err
				}
				list, err := n.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{
					Filter: &runtimeapi.ContainerStatsFilter{Id: containers[handler].ID},
				})
				if err != nil {
					return err
				}
				for _, s := range append(list.GetStats(), stats) {
					layer := s.GetWritableLayer()
					if got := layer.GetFsId().GetMountpoint(); got != roots[handler] {
						return fmt.Errorf("the mountpoint of %q is %q", handler, got)
					}
					if layer.GetInodesUsed().GetValue() == 0 {
						return fmt.Errorf("no usage of %q", handler)
					}
				}
			}
			metrics, err := n.Runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
			if err != nil {
				return err
			}
			usage := map[string]bool{}
			for _, pod := range metrics.GetPodMetrics() {
				for _, c := range pod.GetContainerMetrics() {
					for _, m := range c.GetMetrics() {
						if m.GetName() == "container_fs_usage_bytes" && m.GetValue().GetValue() > 0 {
							usage[c.GetContainerId()] = true
						}
					}
				}
			}
			for _, handler := range handlers {
				if !usage[containers[handler].ID] {
					return fmt.Errorf("no metric of the file system of %q", handler)
				}
			}
			info, err := n.Images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
			if err != nil {
				return err
			}
			var mountpoints []string
			for _, fs := range info.GetImageFilesystems() {
				mountpoints = append(mountpoints, fs.GetFsId().GetMountpoint())
			}
			if !slices.Equal(mountpoints, []string{roots[harness.Runc], roots[harness.Guest]}) {
				return fmt.Errorf("the image file systems are %q", mountpoints)
			}
			return nil
		}
		// Statistics are collected once in a second.
		const stock = `the mountpoint of "guest" is ""`
		var err error
		for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
			if err = check(); err == nil || !hasPatch(n, "0006") && err.Error() == stock {
				break
			}
		}
		requireFixed(t, n, "0006", err, stock)
	})
}

// kubelet's garbage collector takes an image's size for what removing it frees,
// and finds out by the image's ID whether a container uses it.
func TestPatchImageSize(t *testing.T) {
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				ctx := t.Context()
				o := path.options
				o.Binaries = binaries
				n, reg := newMixedNode(t, o)
				img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
				manifest, err := img.RawManifest()
				require.NoError(t, err)
				config, err := img.RawConfigFile()
				require.NoError(t, err)
				layers, err := images.LayersSize(img.Image)
				require.NoError(t, err)
				small := int64(len(manifest) + len(config))
				listed := func() *runtimeapi.Image {
					r, err := n.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
					require.NoError(t, err)
					for _, i := range r.GetImages() {
						if slices.Contains(i.RepoTags, img.Ref) {
							return i
						}
					}
					require.Fail(t, "the image is not listed")
					return nil
				}
				size := func(want int64) error {
					if got := int64(listed().Size); got != want {
						return fmt.Errorf("the image has %d bytes on the host and is listed with %d", want, got)
					}
					return nil
				}
				used := func(c *harness.Container) {
					status, err := c.Status(ctx)
					require.NoError(t, err)
					require.Equal(t, listed().Id, status.ImageId)
				}

				c := run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref})
				requireFixed(t, n, "0009", size(small), "is listed with")
				used(c)
				if !hasPatch(n, "0009") {
					return
				}
				pod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
				used(run(t, pod, harness.ContainerSpec{Image: img.Ref}))
				require.NoError(t, n.GC(ctx))
				require.NoError(t, size(small+layers), "unpacked, whether the layers' content stayed or not")
			})
		})
	}
}

// What containerd records of a layer that is left to a guest is no more than what it
// records of one that overlayfs has: an image of many layers is as many records.
func TestPatchLayerRecords(t *testing.T) {
	for _, path := range mixedPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			ctx := harness.CRI(t.Context())
			n, reg := newMixedNode(t, path.options)
			if !hasPatch(n, "0011") {
				t.Skip("this containerd has no patch 0011")
			}
			img := push(t, reg, images.Spec{Name: "app", Layers: 20, User: "1000"})
			for _, handler := range []string{harness.Guest, harness.Runc} {
				require.NoError(t, runAs(ctx, runPod(t, n, harness.PodSpec{Handler: handler}), img))
			}
			bytes := map[string]int{}
			for _, snapshotter := range []string{"guest-pull", "overlayfs"} {
				for _, id := range img.chain(t) {
					info, err := n.Client.SnapshotService(snapshotter).Stat(ctx, id)
					require.NoError(t, err)
					for k, v := range info.Labels {
						bytes[snapshotter] += len(k) + len(v)
					}
				}
			}
			t.Logf("bytes of labels: %v", bytes)
			require.LessOrEqual(t, bytes["guest-pull"], bytes["overlayfs"])
		})
	}
}

// With disable_layer_fetch, a mistake in the configuration of a runtime handler
// costs the pull and not the secrecy of the image; the metrics tell of it.
func TestPatchDisableLayerFetch(t *testing.T) {
	const option = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]\ndisable_layer_fetch = true\n"
	for _, path := range mixedPaths {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				ctx := t.Context()
				metrics := freeAddress(t)
				o := path.options
				o.Binaries, o.Registry = binaries, newRegistry(t)
				o.ExtraConfig = option + fmt.Sprintf("[plugins.'io.containerd.server.v1.metrics']\naddress = %q\n", metrics)
				n := harness.New(t, o)
				reg := o.Registry

				// What works without stays.
				img := push(t, reg, images.Spec{Name: "app", Layers: 5, User: "1000"})
				pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
				require.NoError(t, runAs(ctx, pod, img))
				require.NoError(t, onlyManifests(reg, "app"))
				if hasPatch(n, "0007") {
					// The pause image has one layer.
					require.Contains(t, scrape(t, metrics), `containerd_cri_sandboxed_image_layers_total{status="skipped"} 6`)
					require.NotContains(t, scrape(t, metrics), `status="refused"`)
				}

				// A request that names another handler than the pod has.
				wrong := push(t, reg, images.Spec{Name: "wrong", Layers: 5, User: "1000"})
				_, err := n.Pull(ctx, harness.PullSpec{Image: wrong.Ref, Pod: pod.Config, Hint: harness.HintImageSpec, Handler: harness.Runc})
				if err != nil {
					require.ErrorContains(t, err, wrong.Ref)
					require.ErrorContains(t, err, "disable_layer_fetch")
					require.ErrorContains(t, err, `snapshotter "overlayfs"`)
					err = onlyManifests(reg, "wrong")
				} else {
					err = errors.New("pulled")
				}
				requireFixed(t, n, "0007", err, "pulled")
				if !hasPatch(n, "0007") {
					return
				}
				require.Regexp(t, `containerd_cri_sandboxed_image_layers_total\{status="refused"\} [1-9]`, scrape(t, metrics))

				// Others are none the wiser, and what they left is no reason to fail.
				require.NoError(t, runAs(ctx, runPod(t, n, harness.PodSpec{Handler: harness.Runc}), wrong))
				require.NoError(t, runAs(ctx, pod, wrong))
			})
		})
	}
}

// A runtime handler that lost its snapshotter.
func TestPatchDisableLayerFetchWithoutSnapshotter(t *testing.T) {
	for _, path := range mixedPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			o := path.options
			o.Registry, o.GuestSnapshotter = newRegistry(t), "overlayfs"
			o.ExtraConfig = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]\ndisable_layer_fetch = true\n"
			n := harness.New(t, o)
			if !hasPatch(n, "0007") {
				t.Skip("this containerd has no patch 0007")
			}
			_, err := n.RunPod(t.Context(), harness.PodSpec{Handler: harness.Guest})
			require.ErrorContains(t, err, "disable_layer_fetch")
			require.Empty(t, o.Registry.Log().By(registry.Host).Of(registry.Layer))
		})
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return l.Addr().String()
}

// scrape returns containerd's metrics.
func scrape(t *testing.T, address string) string {
	t.Helper()
	r, err := http.Get("http://" + address + "/v1/metrics")
	require.NoError(t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	return string(body)
}

// What was removed just before containerd ended, and was not collected, is collected when
// it is back, also if nothing else is removed then.
func TestPatchEndBeforeCollection(t *testing.T) {
	n, reg := newMixedNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app"})
	leftovers := func() []string {
		t.Helper()
		require.NoError(t, n.GC(t.Context()))
		all, err := n.Leftovers(t.Context())
		require.NoError(t, err)
		return slices.DeleteFunc(all, func(what string) bool { return !strings.HasPrefix(what, "file ") })
	}
	for _, handler := range []string{harness.Guest, harness.Runc} {
		pod := runPod(t, n, harness.PodSpec{Handler: handler})
		stays := run(t, pod, harness.ContainerSpec{Image: img.Ref})
		before := leftovers()
		goes := run(t, pod, harness.ContainerSpec{Image: img.Ref})
		require.NoError(t, goes.Stop(t.Context(), 0))
		require.NoError(t, goes.Remove(t.Context()))
		require.NoError(t, n.Kill())
		require.NoError(t, n.Up(t.Context()))
		var err error
		if after := leftovers(); !slices.Equal(before, after) {
			err = fmt.Errorf("on the node is %q, before was %q", after, before)
		}
		requireFixed(t, n, "0023", err, "on the node is")
		requireRuns(t, stays, img)
	}
}

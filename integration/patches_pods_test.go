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
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// config_path may be a list of directories, and is one by default. Each of them
// counts, whoever pulls.
func TestPatchConfigPath(t *testing.T) {
	for _, path := range mixedPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				hosts := t.TempDir()
				o := path.options
				o.Binaries, o.Registry = binaries, newRegistry(t)
				o.ExtraConfig = fmt.Sprintf("[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = %q\n", filepath.Join(hosts, "none")+":"+hosts)
				n := harness.New(t, o)
				img := push(t, o.Registry, images.Spec{Name: "app", Layers: 2})
				// A registry that only hosts.toml knows the address of.
				require.NoError(t, os.Mkdir(filepath.Join(hosts, "registry.invalid"), 0o755))
				require.NoError(t, os.WriteFile(filepath.Join(hosts, "registry.invalid", "hosts.toml"),
					fmt.Appendf(nil, "[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", o.Registry.URL()), 0o600))
				id, err := n.Pull(t.Context(), harness.PullSpec{Image: "registry.invalid/app:1", Handler: harness.Guest, Hint: harness.HintImageSpec})
				stock := "" // right
				if path.name == "transfer" {
					stock = "registry.invalid"
				}
				requireFixed(t, n, "0013", err, stock)
				if err == nil {
					config, err := img.ConfigName()
					require.NoError(t, err)
					require.Equal(t, config.String(), id)
				}
			})
		})
	}
}

// A progress timeout of zero is none.
func TestPatchNoProgressTimeout(t *testing.T) {
	for _, path := range mixedPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			eachContainerd(t, func(t *testing.T, binaries string) {
				o := path.options
				o.Binaries, o.Registry = binaries, newRegistry(t)
				o.ExtraConfig = "[plugins.'io.containerd.cri.v1.images']\nimage_pull_progress_timeout = \"0s\"\n"
				n := harness.New(t, o)
				img := push(t, o.Registry, images.Spec{Name: "app", Layers: 2})
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				if !hasPatch(n, "0014") {
					ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
				}
				defer cancel()
				_, err := n.Pull(ctx, harness.PullSpec{Image: img.Ref, Handler: harness.Guest, Hint: harness.HintImageSpec})
				stock := "" // right
				if path.name == "transfer" {
					stock = "DeadlineExceeded"
				}
				requireFixed(t, n, "0014", err, stock)
				if hasPatch(n, "0014") {
					require.NoError(t, runAs(t.Context(), runPod(t, n, harness.PodSpec{Handler: harness.Guest}), push(t, o.Registry, images.Spec{Name: "user", User: "1000"})))
				}
			})
		})
	}
}

// A client like crictl, which sends no UserSpecifiedImage, says by the reference in
// CreateContainer which image it means, and before that by what it pulled for the
// pod. The guest asks the registry of that name, and no other that has the image.
func TestPatchImageName(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		n, first := newMixedNode(t, harness.Options{Binaries: binaries})
		regs := []*registry.Registry{first, newRegistry(t)}
		var pods []*harness.Pod
		var refs, ids []string
		img := push(t, first, images.Spec{Name: "app", Layers: 2})
		for _, reg := range regs {
			ref, err := reg.Push("app:1", img.Image)
			require.NoError(t, err)
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			id, err := pod.Pull(t.Context(), ref)
			require.NoError(t, err)
			pods, refs, ids = append(pods, pod), append(refs, ref), append(ids, id)
		}
		require.Equal(t, ids[0], ids[1])

		told := func(i int, image string) error {
			c, err := pods[i].CreateFrom(t.Context(), &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: fmt.Sprintf("c-%d-%d", i, len(image))},
				Image:    &runtimeapi.ImageSpec{Image: image},
				Linux:    &runtimeapi.LinuxContainerConfig{},
				LogPath:  fmt.Sprintf("c-%d/0.log", i),
			})
			require.NoError(t, err)
			require.NoError(t, c.Start(t.Context()))
			ctr, err := n.Client.LoadContainer(harness.CRI(t.Context()), c.ID)
			require.NoError(t, err)
			spec, err := ctr.Spec(harness.CRI(t.Context()))
			require.NoError(t, err)
			require.NoError(t, c.Remove(t.Context()))
			if name := spec.Annotations["io.kubernetes.cri.image-name"]; name != refs[i] {
				return fmt.Errorf("the guest is told %s and not %s, for a container of %s", name, refs[i], image)
			}
			return nil
		}
		for what, err := range map[string]error{
			"reference":    errors.Join(told(0, refs[0]), told(1, refs[1])),
			"ID":           errors.Join(told(0, ids[0]), told(1, ids[1])),
			"truncated ID": errors.Join(told(0, ids[0][7:20]), told(1, ids[1][7:20])),
		} {
			t.Log(what)
			requireFixed(t, n, "0015", err, "the guest is told")
		}
		if hasPatch(n, "0015") && n.StandIn() {
			for _, reg := range regs {
				require.NotEmpty(t, reg.Log().By(registry.Guest).In("app").Of(registry.Manifest).OK())
			}
		}
	})
}

// A guest that needs longer for its pull than kubelet waits: each try fails with an
// error that says what took so long, how large it is and what to set, none leaves
// anything, and once there is enough time the container runs. The host pulls once.
func TestPatchImpatientKubelet(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		ctx := t.Context()
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		if !n.StandIn() {
			t.Skip("the time that a real guest takes for a pull is its own; RUNTIME names one")
		}
		img := push(t, reg, images.Spec{Name: "app", Layers: 3, User: "1000"})
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
		well := reg.Inject(registry.Fault{
			Match: func(q registry.Request) bool { return len(registry.Log{q}.By(registry.Guest).Of(registry.Layer)) == 1 },
			Do:    registry.Delay(4 * time.Second),
		})
		defer well()
		for range 3 {
			c, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)
			patience, cancel := context.WithTimeout(ctx, 2*time.Second)
			failed := c.Start(patience)
			cancel()
			require.Error(t, failed)
			require.Equal(t, codes.DeadlineExceeded, grpcstatus.Code(failed))
			err = nil
			for _, s := range []string{`"` + img.Ref + `"`, "2 MB compressed", "was not done after 2s", "runtimeRequestTimeout: 10m0s", "create_container_timeout = 600"} {
				if !strings.Contains(failed.Error(), s) {
					err = fmt.Errorf("the error does not say %q: %w", s, failed)
				}
			}
			requireFixed(t, n, "0016", err, "the error does not say")
			// It is the guest's turn to end what it has begun.
			require.Eventually(t, func() bool {
				s, err := c.Status(ctx)
				return err == nil && s.State == runtimeapi.ContainerState_CONTAINER_EXITED
			}, time.Minute, 100*time.Millisecond)
			require.NoError(t, c.Remove(ctx))
		}
		c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
		require.NoError(t, checkUser(ctx, c, "1000"))
		require.Len(t, reg.Log().By(registry.Host).In("app").Of(registry.Config).OK(), 1, "pulls by the host")
		require.NoError(t, onlyManifests(reg, "app"))
	})
}

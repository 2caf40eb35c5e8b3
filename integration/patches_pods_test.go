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
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
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

// What an image has at the volumes that it defines is in the guest, with its owner,
// and so is what is written there. A volume of the pod comes before it.
func TestPatchImageVolumes(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		ctx := t.Context()
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		guest, host := runPod(t, n, harness.PodSpec{Handler: harness.Guest}), runPod(t, n, harness.PodSpec{Handler: harness.Runc})
		dir := func(name string, owner int, mode fs.FileMode) images.File {
			return images.File{Name: name, Mode: fs.ModeDir | mode, Owner: owner}
		}
		file := func(name string, owner int) images.File {
			return images.File{Name: name, Mode: 0o640, Data: "of the image\n", Owner: owner}
		}
		for _, spec := range []images.Spec{
			{Name: "database", User: "1000:1000", Volumes: []string{"/var/lib/db"},
				Top: [][]images.File{{dir("var/lib/db", 1000, 0o700), file("var/lib/db/base", 1000)}}},
			{Name: "open", User: "1000:1000", Volumes: []string{"/data"},
				Top: [][]images.File{{dir("data", 0, 0o777), file("data/file", 1000)}}},
			{Name: "nested", Volumes: []string{"/srv", "/srv/in"},
				Top: [][]images.File{{dir("srv", 0, 0o755), file("srv/file", 0), dir("srv/in", 1000, 0o755), file("srv/in/file", 1000)}}},
			{Name: "empty", User: "1000:1000", Volumes: []string{"/empty"}, Top: [][]images.File{{dir("empty", 1000, 0o750)}}},
		} {
			img := push(t, reg, spec)
			seen := func(p *harness.Pod) (string, *harness.Container) {
				group := int64(1000)
				s := harness.ContainerSpec{Image: img.Ref}
				if spec.User != "" {
					s.RunAsGroup = &group // On stock containerd it is 0 in the guest.
				}
				c, errs := start(ctx, p, s, 3)
				require.NotNil(t, c, "%v", errs)
				// All but the times, the blocks and the sizes of directories.
				const look = `for d; do ls -ln $d; cat $d/file $d/base; echo more >$d/new && ls -ln $d/new; done 2>&1 | sed '/^total/d; s/ [A-Z][a-z][a-z] .* / /; s/  */ /g; /^d/s/[0-9]* \([^ ]*\)$/\1/'`
				out, err := c.Exec(ctx, append([]string{"sh", "-c", look, "sh"}, spec.Volumes...)...)
				require.NoError(t, err)
				return out, c
			}
			want, _ := seen(host)
			got, c := seen(guest)
			var err error
			if got != want {
				err = fmt.Errorf("%s: in the guest the volumes are different:\n%s\nand under runc\n%s", spec.Name, got, want)
			}
			require.NotContains(t, want, "denied")
			if spec.Name != "empty" {
				require.Contains(t, want, "of the image")
			}
			stock := "in the guest the volumes are different"
			requireFixed(t, n, "0017", err, stock)
			dirs, err := filepath.Glob(filepath.Join(n.Root(), "io.containerd.grpc.v1.cri", "containers", c.ID, "volumes", "*"))
			require.NoError(t, err)
			if hasPatch(n, "0017") {
				require.Empty(t, dirs, "directories of the image's volumes on the host")
			} else {
				require.NotEmpty(t, dirs)
			}
		}

		// A volume of the pod.
		img := push(t, reg, images.Spec{Name: "pods", Volumes: []string{"/data"}, Top: [][]images.File{{dir("data", 0, 0o755), file("data/file", 0)}}})
		volume := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(volume, "of-the-pod"), nil, 0o644))
		c := run(t, guest, harness.ContainerSpec{Image: img.Ref, Mounts: []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/data"}}})
		out, err := c.Exec(ctx, "ls", "/data")
		require.NoError(t, err)
		require.Equal(t, "of-the-pod\n", out)
	})
}

// A handler can have the volumes of images on the host, as before.
func TestPatchKeepImageVolumes(t *testing.T) {
	n, reg := newNode(t, harness.Options{
		ExtraConfig: "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]\nkeep_image_defined_volumes = true\n",
	})
	img := push(t, reg, images.Spec{Name: "app", Volumes: []string{"/data"}, Top: [][]images.File{{{Name: "data/file", Data: "x"}}}})
	c := run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref})
	out, err := c.Exec(t.Context(), "ls", "/data")
	require.NoError(t, err)
	require.Empty(t, out)
}

// What the host does not know of a user it does not take in silence: it is logged
// with what settles it, counted, kept on the container, or refused. Nothing is
// guessed of an image that the host has for runc pods.
func TestPatchUnresolvedUsers(t *testing.T) {
	ctx := t.Context()
	metrics := freeAddress(t)
	reg := newRegistry(t)
	n := harness.New(t, harness.Options{Registry: reg, ExtraConfig: fmt.Sprintf("[plugins.'io.containerd.server.v1.metrics']\naddress = %q\n", metrics)})
	if !hasPatch(n, "0018") {
		t.Skip("this containerd has no patch 0018")
	}
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	id := func(v int64) *int64 { return &v }
	logged := func() string {
		log, err := os.ReadFile(n.LogFile())
		require.NoError(t, err)
		return string(log)
	}
	for i, c := range []struct {
		user   string
		spec   harness.ContainerSpec
		policy runtimeapi.SupplementalGroupsPolicy
		groups []int64 // fsGroup is among them
		says   string
	}{
		{user: "", says: ""},
		{user: "0:0", says: ""},
		{user: "1000", says: "user 1000, group 0, and no supplementary groups of the image"},
		{user: "1000:2000", says: "user 1000, no supplementary groups of the image"},
		{user: "", spec: harness.ContainerSpec{RunAsUser: id(1000)}, says: "user 1000, group 0, and no supplementary groups of the image"},
		{user: "1000:2000", spec: harness.ContainerSpec{RunAsUser: id(1001)}, says: "user 1001, group 0, and no supplementary groups of the image"},
		{user: "", spec: harness.ContainerSpec{RunAsUser: id(1000)}, groups: []int64{3000}, says: "user 1000, group 0, and no supplementary groups of the image"},
		{user: "app", spec: harness.ContainerSpec{RunAsUser: id(1000), RunAsGroup: id(1000)}, says: "user 1000, no supplementary groups of the image"},
		{user: "app", spec: harness.ContainerSpec{RunAsUser: id(1000), RunAsGroup: id(1000)}, policy: runtimeapi.SupplementalGroupsPolicy_Strict, groups: []int64{2000}, says: ""},
	} {
		img := push(t, reg, images.Spec{Name: fmt.Sprintf("user-%d", i), User: c.user})
		before := logged()
		c.spec.Image = img.Ref
		created, err := createWithGroups(ctx, pod, c.spec, c.policy, c.groups)
		require.NoError(t, err)
		record, err := n.Client.ContainerService().Get(harness.CRI(ctx), created.ID)
		require.NoError(t, err)
		require.Equal(t, c.says, record.Labels["io.cri-containerd.unresolved-user"])
		said := strings.TrimPrefix(logged(), before)
		if c.says == "" {
			require.NotContains(t, said, `the user of container \"`+created.Config.Metadata.Name+`\"`)
		} else {
			for _, s := range []string{"level=warning", "The user of a container is guessed", c.says, img.Ref, created.Config.Metadata.Name,
				pod.Config.Metadata.Namespace + "/" + pod.Config.Metadata.Name, `securityContext:\n  runAsUser: 1`, "supplementalGroupsPolicy: Strict"} {
				require.Contains(t, said, s)
			}
		}
		require.NoError(t, created.Remove(ctx))
	}
	require.Contains(t, scrape(t, metrics), `containerd_cri_unresolved_users_total{result="guessed"} 8`)

	// The status names them.
	img := push(t, reg, images.Spec{Name: "shown", User: "1000"})
	c, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
	require.NoError(t, err)
	shown, err := n.Containerd(ctx, "guest-pull", "status")
	require.NoError(t, err)
	require.Contains(t, shown, "user 1000, group 0, and no supplementary groups of the image for container "+c.Config.Metadata.Name)

	// The same image for runc first. Its user app is in the group extra.
	named := push(t, reg, images.Spec{Name: "both", User: "app"})
	require.NoError(t, runAs(ctx, runPod(t, n, harness.PodSpec{Handler: harness.Runc}), named))
	want, err := createdUser(t, n, runPod(t, n, harness.PodSpec{Handler: harness.Runc}), harness.ContainerSpec{Image: named.Ref})
	require.NoError(t, err)
	got, err := createdUser(t, n, pod, harness.ContainerSpec{Image: named.Ref})
	require.NoError(t, err)
	require.Equal(t, want, got)
	require.JSONEq(t, `{"uid":1000,"gid":1000,"additionalGids":[1000,2000]}`, got)
	views, err := n.Snapshots(harness.CRI(ctx), "overlayfs")
	require.NoError(t, err)
	for _, s := range views {
		require.NotContains(t, s.Name, "-image", "the view is left")
	}
}

// createWithGroups makes kubelet's calls for a container with these supplementary groups.
func createWithGroups(ctx context.Context, pod *harness.Pod, s harness.ContainerSpec, policy runtimeapi.SupplementalGroupsPolicy, groups []int64) (*harness.Container, error) {
	c, err := pod.Create(ctx, s)
	if err != nil || policy == 0 && groups == nil {
		return c, err
	}
	if err := c.Remove(ctx); err != nil {
		return nil, err
	}
	c.Config.Metadata.Name += "-groups"
	c.Config.Linux.SecurityContext.SupplementalGroups = groups
	c.Config.Linux.SecurityContext.SupplementalGroupsPolicy = policy
	return pod.CreateFrom(ctx, c.Config)
}

// With "refuse" a container of which something would be guessed is not created, and
// what the error says to write makes it run.
func TestPatchRefuseUnresolvedUsers(t *testing.T) {
	ctx := t.Context()
	n, reg := newNode(t, harness.Options{ExtraConfig: "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]\nunresolved_users = \"refuse\"\n"})
	if !hasPatch(n, "0018") {
		t.Skip("this containerd has no patch 0018")
	}
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	img := push(t, reg, images.Spec{Name: "app", User: "1000"})
	_, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
	for _, s := range []string{img.Ref, "group 0", "securityContext:\n  runAsUser: 1000\n  runAsGroup: <GID of user 1000 in the image>"} {
		require.ErrorContains(t, err, s)
	}
	root := push(t, reg, images.Spec{Name: "root"})
	c := run(t, pod, harness.ContainerSpec{Image: root.Ref})
	require.NoError(t, checkUser(ctx, c, "0"))

	// As the error says.
	c, err = pod.Create(ctx, harness.ContainerSpec{Image: root.Ref, RunAsUser: new(int64), RunAsGroup: new(int64)})
	require.NoError(t, err)
	require.NoError(t, c.Remove(ctx))
	c.Config.Metadata.Name += "-strict"
	sc := c.Config.Linux.SecurityContext
	sc.RunAsUser.Value, sc.RunAsGroup.Value = 1000, 1000
	sc.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
	c, err = pod.CreateFrom(ctx, c.Config)
	require.NoError(t, err)
	require.NoError(t, c.Start(ctx))
	require.NoError(t, checkUser(ctx, c, "1000"))
}

// The lease of a sandbox holds its containers' snapshots, but only those of containers
// that there are: a pod lives long, and its containers may be made again and again.
func TestPatchSandboxLease(t *testing.T) {
	eachContainerd(t, func(t *testing.T, binaries string) {
		n, reg := newMixedNode(t, harness.Options{Binaries: binaries})
		ctx := harness.CRI(t.Context())
		good := push(t, reg, images.Spec{Name: "good", Layers: 2})
		named := push(t, reg, images.Spec{Name: "named", User: "app"})
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
		other := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
		held := func(pod *harness.Pod) (ids []string) {
			t.Helper()
			require.NoError(t, n.GC(t.Context()))
			all, err := n.Client.LeasesService().List(ctx)
			require.NoError(t, err)
			require.Len(t, all, 2, "no leases but those of the sandboxes")
			resources, err := n.Client.LeasesService().ListResources(ctx, leases.Lease{ID: pod.ID})
			require.NoError(t, err)
			for _, r := range resources {
				ids = append(ids, r.ID)
			}
			return ids
		}
		expect := func(ids ...string) (err error) {
			t.Helper()
			if got := held(pod); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(ids))) {
				err = fmt.Errorf("the sandbox's lease has %q, not %q", got, ids)
			}
			return err
		}
		c := run(t, pod, harness.ContainerSpec{Image: good.Ref})
		requireFixed(t, n, "0022", expect(pod.ID, c.ID), "the sandbox's lease has")
		onHost := run(t, other, harness.ContainerSpec{Image: push(t, reg, images.Spec{Name: "other"}).Ref})
		require.Empty(t, held(other), "for runc, all is as it was")
		require.NoError(t, onHost.Remove(t.Context()))
		if !hasPatch(n, "0022") {
			return
		}
		_, err := pod.Run(t.Context(), harness.ContainerSpec{Image: named.Ref})
		require.ErrorContains(t, err, "app", "a user that the host does not know")
		require.NoError(t, expect(pod.ID, c.ID))
		all, err := n.Snapshots(ctx, harness.Snapshotter)
		require.NoError(t, err)
		active := 0
		for _, s := range all {
			if s.Kind == snapshots.KindActive {
				active++
			}
		}
		require.Equal(t, 2, active, "those of the sandbox and of its one container")
		require.NoError(t, c.Remove(t.Context()))
		require.NoError(t, expect(pod.ID))
		require.NoError(t, pod.Remove(t.Context()))
		require.NoError(t, other.Remove(t.Context()))
	})
}

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
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

// checkReport is what `containerd guest-pull check --json` prints.
type checkReport struct {
	OK       bool `json:"ok"`
	Handlers []struct {
		Name    string `json:"name"`
		Shim    string `json:"shim"`
		Flavour string `json:"flavour"`
	} `json:"handlers"`
	Findings []struct {
		Severity, Check, Problem, Why, Remedy string
	} `json:"findings"`
}

// errors lists what the report says that breaks a pod.
func (r checkReport) errors() (checks []string) {
	for _, f := range r.Findings {
		if f.Severity == "error" {
			checks = append(checks, f.Check+": "+f.Problem)
		}
	}
	return checks
}

func (r checkReport) has(check string) bool {
	for _, f := range r.Findings {
		if f.Check == check {
			return true
		}
	}
	return false
}

// check runs the check on a node and holds that its exit code says what its
// report says.
func check(t *testing.T, n *harness.Node) checkReport {
	t.Helper()
	out, err := n.Containerd(t.Context(), "guest-pull", "check", "--json")
	var r checkReport
	require.NoError(t, json.Unmarshal([]byte(out), &r), "%s: %v", out, err)
	if r.OK {
		require.NoError(t, err)
	} else {
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit)
		require.Equal(t, 1, exit.ExitCode())
	}
	return r
}

// A node on which pods run has nothing that would break one: a check which cries
// wolf is not looked at. What is broken on it is found.
func TestCheck(t *testing.T) {
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	requireRuns(t, run(t, pod, harness.ContainerSpec{Image: img.Ref}), img)

	r := check(t, n)
	require.Empty(t, r.errors())
	require.False(t, r.has("daemon"), "the running containerd was not asked")
	require.Len(t, r.Handlers, 1)
	require.Equal(t, harness.Guest, r.Handlers[0].Name)
	if n.StandIn() {
		require.Equal(t, "containerd-shim-guest-v2", filepath.Base(r.Handlers[0].Shim))
	}

	// Spoilt in the way that a person would.
	require.NoError(t, n.Down())
	require.NoError(t, n.Reconfigure(t.Context(), func(o *harness.Options) {
		o.PluginConfig = `root_path = "relative"`
		o.ExtraConfig = `
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gone]
  runtime_type = "io.containerd.kata-gone.v2"
  snapshotter = "guest-pull"
`
	}))
	r = check(t, n)
	require.False(t, r.OK)
	for _, c := range []string{"root", "unpack-config", "shim", "daemon"} {
		require.True(t, r.has(c), "%s in %+v", c, r.Findings)
	}
	table, err := n.Containerd(t.Context(), "guest-pull", "check")
	require.Error(t, err)
	require.Contains(t, table, "containerd-shim-kata-gone-v2")

	require.NoError(t, n.Reconfigure(t.Context(), func(o *harness.Options) { o.PluginConfig, o.ExtraConfig = "", "" }))
	require.NoError(t, n.Up(t.Context()))
}

// statusReport is what `containerd guest-pull status --json` prints.
type statusReport struct {
	Root        string
	Directories int
	Images      []struct {
		Namespace, Name, Digest string
		GuestOnly               bool     `json:"guest_only"`
		Layers                  int      `json:"layers"`
		LayersOffHost           int      `json:"layers_off_host"`
		BytesOffHost            int64    `json:"bytes_off_host"`
		OtherSnapshotters       []string `json:"other_snapshotters"`
	}
	OtherImages   int   `json:"other_images"`
	LayersOffHost int   `json:"layers_off_host"`
	BytesOffHost  int64 `json:"bytes_off_host"`
	Snapshots     []struct {
		Namespace, Key, Kind, Container string
		Orphan                          bool
	} `json:"container_snapshots"`
}

func status(t *testing.T, n *harness.Node) statusReport {
	t.Helper()
	out, err := n.Containerd(t.Context(), "guest-pull", "status", "--json")
	require.NoError(t, err)
	var s statusReport
	require.NoError(t, json.Unmarshal([]byte(out), &s), out)
	return s
}

// bytes is the size of the image's layers as its manifest has it.
func (i image) bytes(t *testing.T) (sum int64) {
	t.Helper()
	m, err := i.Manifest()
	require.NoError(t, err)
	for _, l := range m.Layers {
		sum += l.Size
	}
	return sum
}

// What the status says of images and snapshots is what the registry and the disk
// say.
func TestStatus(t *testing.T) {
	reg := newRegistry(t)
	n := harness.New(t, harness.Options{Registry: reg})
	s := status(t, n)
	require.Empty(t, s.Images)
	require.Empty(t, s.Snapshots)
	require.Equal(t, n.SnapshotterRoot(harness.Snapshotter), s.Root)

	guestOnly := push(t, reg, images.Spec{Name: "guest-only", Layers: 4})
	both := push(t, reg, images.Spec{Name: "both", Layers: 2})
	runcOnly := push(t, reg, images.Spec{Name: "runc-only", Layers: 2})
	ctx := harness.CRI(t.Context())
	for _, handler := range []string{harness.Runc, harness.Guest} {
		for _, img := range []image{guestOnly, both, runcOnly} {
			if (img.Name == "guest-only" && handler == harness.Runc) || (img.Name == "runc-only" && handler == harness.Guest) {
				continue
			}
			_, err := n.Pull(ctx, harness.PullSpec{Image: img.Ref, Handler: handler, Hint: harness.HintImageSpec, Pod: n.PodConfig(harness.PodSpec{Handler: handler})})
			require.NoError(t, err)
		}
	}
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: guestOnly.Ref})

	// The images have their lowest layer in common, so the host has that one.
	require.Equal(t, both.Layers[0], guestOnly.Layers[0])
	offHost := guestOnly.bytes(t)
	m, err := guestOnly.Manifest()
	require.NoError(t, err)
	offHost -= m.Layers[0].Size

	s = status(t, n)
	found := map[string]bool{}
	for _, i := range s.Images {
		if i.Namespace != harness.CRINamespace {
			continue
		}
		switch i.Name {
		case guestOnly.Ref:
			require.True(t, i.GuestOnly)
			require.Equal(t, len(guestOnly.Layers), i.Layers)
			require.Equal(t, len(guestOnly.Layers)-1, i.LayersOffHost)
			require.Equal(t, offHost, i.BytesOffHost)
			require.Empty(t, i.OtherSnapshotters)
		case both.Ref:
			require.False(t, i.GuestOnly)
			require.Zero(t, i.LayersOffHost)
			require.Zero(t, i.BytesOffHost)
			require.Equal(t, []string{"overlayfs"}, i.OtherSnapshotters)
		}
		require.NotEqual(t, runcOnly.Ref, i.Name)
		found[i.Name] = true
	}
	require.True(t, found[guestOnly.Ref], "%+v", s)
	require.True(t, found[both.Ref], "%+v", s)
	require.Positive(t, s.OtherImages)
	// The pause image is the only other one that guests have.
	require.GreaterOrEqual(t, s.LayersOffHost, len(guestOnly.Layers)-1)
	require.LessOrEqual(t, s.LayersOffHost, len(guestOnly.Layers))
	require.GreaterOrEqual(t, s.BytesOffHost, offHost)

	owners := map[string]bool{}
	for _, sn := range s.Snapshots {
		require.Equal(t, harness.CRINamespace, sn.Namespace)
		require.Equal(t, "active", sn.Kind)
		require.Falsef(t, sn.Orphan, "%+v", sn)
		owners[sn.Container] = true
	}
	require.Equal(t, map[string]bool{pod.ID: true, c.ID: true}, owners)
	require.Equal(t, 2, s.Directories)

	// The garbage collector never takes this one: it is nobody's.
	sn := n.Client.SnapshotService(harness.Snapshotter)
	_, err = sn.Prepare(ctx, "forgotten", guestOnly.ChainID, snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "x"}))
	require.NoError(t, err)
	orphans := 0
	for _, sn := range status(t, n).Snapshots {
		if sn.Orphan {
			require.Equal(t, "forgotten", sn.Key)
			orphans++
		}
	}
	require.Equal(t, 1, orphans)
	table, err := n.Containerd(context.WithoutCancel(ctx), "guest-pull", "status")
	require.NoError(t, err)
	require.Contains(t, table, guestOnly.Ref)
	require.Contains(t, table, "ctr -n k8s.io snapshots --snapshotter guest-pull rm forgotten")
	_, err = n.Ctr(ctx, "-n", "k8s.io", "snapshots", "--snapshotter", "guest-pull", "rm", "forgotten")
	require.NoError(t, err, "the command that the status gives")
	require.Len(t, status(t, n).Snapshots, 2)
}

// One command turns guest pull on for a handler that the node has, and one takes it
// back; until containerd is restarted neither has an effect. What is in the way of
// taking it back is named, by the names that its owner knows.
func TestEnable(t *testing.T) {
	reg := newRegistry(t)
	n := harness.New(t, harness.Options{Registry: reg, GuestSnapshotter: "overlayfs",
		ExtraConfig: fmt.Sprintf("[plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = %q\n", harness.Guest)})
	if !n.StandIn() {
		t.Skip("RUNTIME names a guest that may run on what the host unpacks")
	}
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	before, err := os.ReadFile(filepath.Join(n.Dir(), "config.toml"))
	require.NoError(t, err)

	out, err := n.Containerd(t.Context(), "guest-pull", "enable", harness.Guest)
	require.ErrorContains(t, err, "--import", out)
	out, err = n.Containerd(t.Context(), "guest-pull", "enable", "--import", harness.Guest)
	require.NoError(t, err, out)
	require.Contains(t, out, "handler guest: snapshotter overlayfs -> guest-pull")
	require.NoError(t, n.Down())
	require.NoError(t, n.Up(t.Context()))
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)
	requireInGuest(t, n, reg, c, img)
	require.Empty(t, check(t, n).errors())
	// A pod without a RuntimeClass is one of the handler, too, that is the default.
	unnamed := runPod(t, n, harness.PodSpec{})

	out, err = n.Containerd(t.Context(), "guest-pull", "disable", harness.Guest)
	require.Error(t, err)
	for _, inTheWay := range []string{unnamed.ID, pod.ID, pod.Config.GetMetadata().GetName(), "crictl rmi " + img.Ref} {
		require.Contains(t, out, inTheWay)
	}
	require.FileExists(t, filepath.Join(n.Dir(), "conf.d/60-guest-pull-handlers.toml"))

	require.NoError(t, pod.Remove(t.Context()))
	require.NoError(t, unnamed.Remove(t.Context()))
	out, err = n.Containerd(t.Context(), "guest-pull", "disable", harness.Guest)
	require.NoError(t, err, out)
	after, err := os.ReadFile(filepath.Join(n.Dir(), "config.toml"))
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))
	require.NoFileExists(t, filepath.Join(n.Dir(), "conf.d/60-guest-pull-handlers.toml"))
	require.NoError(t, n.Down())
	require.NoError(t, n.Up(t.Context()))
	_, err = n.RunPod(t.Context(), harness.PodSpec{Handler: harness.Guest})
	require.ErrorContains(t, err, `would mount type "overlay" on the host`, "the stand-in guest on the other snapshotter")
}

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
// Package cluster_test deploys pods to a real kubelet on the built containerd.
// What the promises are judged by: the pod's phase and its events, as the pod's
// author sees them; the registry's log; and the state of the node.
package cluster_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

const (
	// binariesEnv names the directory of etcd, kube-apiserver and kubelet.
	binariesEnv = "GUEST_PULL_KUBERNETES"
	// gatesEnv are feature gates of kubelet's that are not as by default, as its
	// flag takes them: "A=true,B=false".
	gatesEnv = "GUEST_PULL_FEATURE_GATES"
)

// control is the control plane of all tests. Each test has a node of its own.
var control *cluster.Control

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	bin := cluster.Binaries(os.Getenv(binariesEnv))
	if bin == "" {
		fmt.Println("the Kubernetes tests are not run: " + binariesEnv + " does not name a directory with etcd, kube-apiserver and kubelet; " +
			"run `make e2e-kubernetes` or `make e2e-kubernetes-core`")
		return 0
	}
	ctx := context.Background()
	var err error
	if control, err = cluster.Start(ctx, bin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if err := control.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := results.report(ctx, bin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// node is a Kubernetes node and the registry that its images come from.
type node struct {
	*cluster.Kubelet
	reg *registry.Registry
	// blobs says which of these digests are in the content store.
	blobs func(digests ...string) []string
	// interrupted: containerd was, and leaves what it also leaves without this
	// project; see [harness.Interruptions].
	interrupted bool
}

type options struct {
	harness.Options
	kubelet cluster.KubeletOptions
	// stock: the test is about containerd without patches. The others are
	// about containerd with them.
	stock bool
}

// newNode starts a registry and a node. When the test ends, its pods are deleted
// the way users do it, and nothing of them may be left.
func newNode(t *testing.T, o options) *node {
	t.Helper()
	reg := o.Registry
	if reg == nil {
		reg = newRegistry(t)
	}
	o.Registry = reg
	hn := harness.New(t, o.Options)
	results.see(hn)
	switch {
	case o.stock && len(hn.Patches()) > 0:
		t.Skip("containerd has the patches; this is about one without: make e2e-kubernetes runs it too")
	case !o.stock && len(hn.Patches()) == 0:
		t.Skip("containerd has no patches, without which it cannot do this; what it does instead is in the tests of stock containerd")
	}
	if gates := featureGates(t); len(gates) > 0 {
		o.kubelet.Config = maps.Clone(o.kubelet.Config)
		if o.kubelet.Config == nil {
			o.kubelet.Config = map[string]any{}
		}
		o.kubelet.Config["featureGates"] = gates
	}
	k, err := control.StartKubelet(t.Context(), hn, o.kubelet)
	require.NoError(t, err)
	n := &node{Kubelet: k, reg: reg, blobs: hn.Blobs}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if t.Failed() {
			n.explain(ctx, t)
		}
		if hn.Pid() != 0 { // else the harness complains
			if err := k.DeletePods(ctx); assert.NoError(t, err) && !t.Failed() {
				assert.EventuallyWithT(t, func(c *assert.CollectT) {
					left, err := k.Leftovers()
					assert.NoError(c, err)
					assert.Empty(c, left, "left by kubelet")
				}, time.Minute, 100*time.Millisecond)
			}
		}
		assert.NoError(t, k.Close(ctx))
		if n.interrupted && !t.Failed() {
			assert.NoError(t, hn.Empty(ctx))
			left, err := hn.ForgetInterruptions(ctx)
			assert.NoError(t, err)
			t.Logf("left by containerd: %+v", left)
		}
	})
	return n
}

func featureGates(t *testing.T) map[string]bool {
	t.Helper()
	gates := map[string]bool{}
	for pair := range strings.SplitSeq(os.Getenv(gatesEnv), ",") {
		if name, value, ok := strings.Cut(pair, "="); ok {
			v, err := strconv.ParseBool(value)
			require.NoError(t, err, gatesEnv)
			gates[name] = v
		}
	}
	return gates
}

func newRegistry(t *testing.T, o ...registry.Option) *registry.Registry {
	t.Helper()
	reg, err := registry.Start(o...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, reg.Close()) })
	return reg
}

// explain prints what a reader of a failure wants to know.
func (n *node) explain(ctx context.Context, t *testing.T) {
	pods, err := control.API.Pods(ctx, n.Name)
	if err != nil {
		t.Log(err)
	}
	for _, p := range pods {
		t.Logf("pod %s: %s", p.Name, describe(&p))
		events, err := n.events(ctx, p.Name)
		t.Logf("its events (%v):\n  %s", err, strings.Join(events, "\n  "))
	}
	t.Logf("the last lines of kubelet's log:\n%s", n.LogTail(40))
}

func describe(p *corev1.Pod) string {
	var b strings.Builder
	fmt.Fprintf(&b, "phase %s %s %s", p.Status.Phase, p.Status.Reason, p.Status.Message)
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		fmt.Fprintf(&b, "; %s: ready %t, restarts %d", s.Name, s.Ready, s.RestartCount)
		if w := s.State.Waiting; w != nil {
			fmt.Fprintf(&b, ", waiting: %s %s", w.Reason, w.Message)
		}
		if x := s.State.Terminated; x != nil {
			fmt.Fprintf(&b, ", terminated: %d %s %s", x.ExitCode, x.Reason, x.Message)
		}
	}
	return b.String()
}

// image is an image in a test's registry.
type image struct {
	v1.Image
	Ref    string
	Name   string
	Layers []string // digests, lowest first
	Chain  []string // chain IDs, lowest first
}

// push builds an image and puts it into the registry, by its name and the tag 1.
func (n *node) push(t *testing.T, s images.Spec) image {
	t.Helper()
	return push(t, n.reg, s)
}

func push(t *testing.T, reg *registry.Registry, s images.Spec) image {
	t.Helper()
	img, err := images.Build(s)
	require.NoError(t, err)
	ref, err := reg.Push(s.Name+":1", img)
	require.NoError(t, err)
	layers, err := images.LayerDigests(img)
	require.NoError(t, err)
	cfg, err := img.ConfigFile()
	require.NoError(t, err)
	i := image{Image: img, Ref: ref, Name: s.Name, Layers: layers}
	var ids []digest.Digest
	for _, d := range cfg.RootFS.DiffIDs {
		ids = append(ids, digest.Digest(d.String()))
	}
	for _, id := range identity.ChainIDs(ids) {
		i.Chain = append(i.Chain, id.String())
	}
	return i
}

// main is a container that does what its image is for.
func main(img image) corev1.Container { return corev1.Container{Name: "main", Image: img.Ref} }

func (n *node) create(t *testing.T, p *corev1.Pod) {
	t.Helper()
	require.NoError(t, control.API.Create(t.Context(), p))
}

// run creates a pod and waits until it is ready.
func (n *node) run(t *testing.T, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	n.create(t, p)
	return n.waitReady(t, p.Name)
}

// podTimeout is how long a pod may take for what it does at once on an idle
// machine. It is longer for a machine that is emulated.
var podTimeout = 2 * time.Minute

func (n *node) wait(t *testing.T, name, what string, done func(*corev1.Pod) bool) *corev1.Pod {
	t.Helper()
	deadline := time.Now().Add(podTimeout)
	for {
		p, err := control.API.Pod(t.Context(), name)
		if err == nil && done(p) {
			return p
		}
		if time.Now().After(deadline) {
			require.NoError(t, err)
			require.FailNow(t, "pod "+name+" is not "+what, describe(p))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (n *node) waitReady(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	return n.wait(t, name, "ready", isReady)
}

func isReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// waitGone waits until a pod does not exist any more, for which kubelet must have
// ended it.
func (n *node) waitGone(t *testing.T, name string) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, err := control.API.Pod(t.Context(), name)
		return cluster.IsNotFound(err)
	}, podTimeout, 100*time.Millisecond, "pod %s is still there", name)
}

func (n *node) delete(t *testing.T, name string) {
	t.Helper()
	require.NoError(t, control.API.DeletePod(t.Context(), name, 2*time.Second))
	n.waitGone(t, name)
}

// events returns the events of a pod, oldest first: "<type> <reason>: <message>".
func (n *node) events(ctx context.Context, pod string) ([]string, error) {
	events, err := control.API.Events(ctx, pod)
	var lines []string
	for _, e := range events {
		lines = append(lines, fmt.Sprintf("%s %s: %s", e.Type, e.Reason, e.Message))
	}
	return lines, err
}

// waitEvent waits for an event that has all the texts, and returns it.
func (n *node) waitEvent(t *testing.T, pod string, texts ...string) string {
	t.Helper()
	var found string
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		events, err := n.events(t.Context(), pod)
		require.NoError(c, err)
		i := slices.IndexFunc(events, func(e string) bool {
			return !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(e, s) })
		})
		require.GreaterOrEqual(c, i, 0, "no event with %q, but:\n%s", texts, strings.Join(events, "\n"))
		found = events[i]
	}, podTimeout, 200*time.Millisecond)
	return found
}

// requireNoWarnings holds that everything went well in the eyes of the pod's
// author.
func (n *node) requireNoWarnings(t *testing.T, pod string) {
	t.Helper()
	events, err := n.events(t.Context(), pod)
	require.NoError(t, err)
	require.NotEmpty(t, events)
	for _, e := range events {
		require.False(t, strings.HasPrefix(e, corev1.EventTypeWarning), e)
	}
}

// exec runs a command in a container, through kube-apiserver and kubelet.
func (n *node) exec(t *testing.T, pod, container string, cmd ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), podTimeout)
	defer cancel()
	out, err := control.API.Exec(ctx, pod, container, cmd...)
	require.NoError(t, err)
	return out
}

// waitLogs waits until a container has printed a text.
func (n *node) waitLogs(t *testing.T, pod, container, text string) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		out, err := control.API.Logs(t.Context(), pod, container)
		require.NoError(c, err)
		require.Contains(c, out, text)
	}, podTimeout, 100*time.Millisecond)
}

// requireRuns holds that a container does what its image is for.
func (n *node) requireRuns(t *testing.T, pod, container string, img image) {
	t.Helper()
	n.waitLogs(t, pod, container, "hello from "+img.Name+"\n")
	require.Equal(t, img.Name+"\n", n.exec(t, pod, container, "cat", "/etc/image-name"))
}

// requireOnlyInGuest holds that an image was fetched by guests and that the host
// has nothing of it but the name: no layer in the content store, no snapshot of
// another snapshotter, and no size.
func (n *node) requireOnlyInGuest(t *testing.T, img image) {
	t.Helper()
	require.ElementsMatch(t, img.Layers, n.reg.Log().By(registry.Guest).Of(registry.Layer).OK().In(img.Name).References(),
		"layers that the guest fetched")
	require.Empty(t, n.reg.Log().By(registry.Host).Of(registry.Layer).In(img.Name), "layers that the host asked for")
	require.Empty(t, n.blobs(img.Layers...), "layers in the content store")
	require.Contains(t, n.snapshots(t, harness.Snapshotter), img.Chain[len(img.Chain)-1])
	require.NotContains(t, n.snapshots(t, "overlayfs"), img.Chain[len(img.Chain)-1])
}

// requireNothingOnHost holds that the host asked for no layer of whatever image.
func (n *node) requireNothingOnHost(t *testing.T) {
	t.Helper()
	require.Empty(t, n.reg.Log().By(registry.Host).Of(registry.Layer).References(), "layers that the host asked for")
	require.Empty(t, n.snapshots(t, "overlayfs"))
}

// snapshots returns the names of a snapshotter's snapshots.
func (n *node) snapshots(t *testing.T, snapshotter string) []string {
	t.Helper()
	infos, err := n.Node.Snapshots(harness.CRI(t.Context()), snapshotter)
	require.NoError(t, err)
	var names []string
	for _, i := range infos {
		names = append(names, i.Name)
	}
	return names
}

// pulls is how often the host has fetched an image.
func (n *node) pulls(img image) int {
	return len(n.reg.Log().By(registry.Host).In(img.Name).Of(registry.Config).OK())
}

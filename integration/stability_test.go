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
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

// envNumber reads a number that a run is configured with from the environment.
func envNumber(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(v, 10, 64)
	require.NoError(t, err, name)
	return n
}

func count(t *testing.T, f figures.Figure, n int64) {
	t.Helper()
	require.NoError(t, figures.Add(f, n))
}

// Containerd may end at any moment, in any way, during any call. Whatever was
// under way is either done or not done when it is back: running containers run
// on, each image is usable or absent, and once kubelet has removed what it does
// not know, nothing is on the node that was not there before.
//
// GUEST_PULL_KILLS is the number of rounds, GUEST_PULL_SEED repeats the signals,
// workloads and moments of a run (what the scheduler makes of them differs).
func TestKills(t *testing.T) {
	rounds := envNumber(t, "GUEST_PULL_KILLS", 20)
	seed := envNumber(t, "GUEST_PULL_SEED", rand.Uint64())
	// The control: what happens to runc on overlayfs is none of the snapshotter's.
	handler := os.Getenv("GUEST_PULL_KILLS_HANDLER")
	if handler == "" {
		handler = harness.Guest
	}
	kills(t, harness.Options{}, handler, rounds, seed)
}

func kills(t *testing.T, o harness.Options, handler string, rounds, seed uint64) {
	t.Helper()
	t.Logf("%d rounds; repeat them with GUEST_PULL_SEED=%d", rounds, seed)
	reg := newRegistry(t)
	o.Registry = reg
	k := &killer{
		node:    harness.New(t, o),
		handler: handler,
		random:  rand.New(rand.NewPCG(seed, 0)),
	}
	if handler == harness.Guest {
		t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
	}
	for i := range 4 {
		k.images = append(k.images, push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", i), Layers: 3 + 4*i, LayerSize: 1 << 10}))
	}
	k.setUp(t)
	for i := range int(rounds) {
		if !t.Run(fmt.Sprintf("round %d", i+1), k.round) {
			t.Fatalf("stopped after round %d; repeat with GUEST_PULL_SEED=%d", i+1, seed)
		}
		count(t, figures.Kills, 1)
	}
	t.Logf("killed during: %v; left by containerd: %+v", k.during, k.left)
}

type killer struct {
	node    *harness.Node
	handler string
	random  *rand.Rand
	images  []image

	// What runs through all rounds, and the node's inventory with only that.
	survivors []survivor
	baseline  []string

	during map[string]int
	left   harness.Interruptions
}

type survivor struct {
	*harness.Container
	img   image
	since int64
}

func (k *killer) setUp(t *testing.T) {
	k.during = map[string]int{}
	for i := range 2 {
		pod := runPod(t, k.node, harness.PodSpec{Handler: k.handler})
		c := run(t, pod, harness.ContainerSpec{Image: k.images[i].Ref})
		requireRuns(t, c, k.images[i])
		s, err := c.Status(t.Context())
		require.NoError(t, err)
		k.survivors = append(k.survivors, survivor{c, k.images[i], s.StartedAt})
	}
	require.NoError(t, k.node.GC(t.Context()))
	var err error
	k.baseline, err = k.inventory(t.Context())
	require.NoError(t, err)
}

// workloads are what containerd is killed in the middle of. Their errors do not
// matter: kubelet gets the same ones. They end soon after containerd did.
var workloads = []struct {
	name string
	do   func(k *killer, ctx context.Context, pod *harness.Pod, img image)
}{
	{"pull", func(k *killer, ctx context.Context, pod *harness.Pod, img image) {
		for ctx.Err() == nil {
			if _, err := pod.Pull(ctx, img.Ref); err != nil {
				return
			}
			k.node.RemoveImage(ctx, img.Ref) // pulled again
		}
	}},
	{"create", func(k *killer, ctx context.Context, pod *harness.Pod, img image) {
		for ctx.Err() == nil {
			if _, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref}); err != nil {
				return
			}
		}
	}},
	{"start", func(k *killer, ctx context.Context, pod *harness.Pod, img image) {
		for ctx.Err() == nil {
			if _, err := pod.Run(ctx, harness.ContainerSpec{Image: img.Ref}); err != nil {
				return
			}
		}
	}},
	{"delete", func(k *killer, ctx context.Context, pod *harness.Pod, img image) {
		for ctx.Err() == nil {
			c, err := pod.Run(ctx, harness.ContainerSpec{Image: img.Ref})
			if err != nil {
				return
			}
			c.Remove(ctx) // by force; the next call sees whether containerd is there
		}
	}},
	{"sandbox", func(k *killer, ctx context.Context, _ *harness.Pod, _ image) {
		for ctx.Err() == nil {
			p, err := k.node.RunPod(ctx, harness.PodSpec{Handler: k.handler})
			if err != nil {
				return
			}
			p.Remove(ctx) // likewise
		}
	}},
	{"collect", func(k *killer, ctx context.Context, pod *harness.Pod, img image) {
		for ctx.Err() == nil {
			if c, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref}); err == nil {
				c.Remove(ctx) // garbage to collect
			}
			k.node.RemoveImage(ctx, img.Ref) // likewise
			if k.node.GC(ctx) != nil {
				return
			}
		}
	}},
}

func (k *killer) round(t *testing.T) {
	ctx := t.Context()
	signal := []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT}[k.random.IntN(4)]
	delay := time.Duration(k.random.Int64N(int64(400 * time.Millisecond)))
	// Two workloads at once, on images of which one may be a survivor's.
	var names []string
	working, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	for range 2 {
		w := workloads[k.random.IntN(len(workloads))]
		img := k.images[k.random.IntN(len(k.images))]
		names = append(names, w.name)
		pod := runPod(t, k.node, harness.PodSpec{Handler: k.handler})
		all.Go(func() { w.do(k, working, pod, img) })
	}
	t.Logf("%v %s after %s", names, signal, delay)
	time.Sleep(delay)
	require.NoError(t, k.node.Signal(signal))
	stop()
	all.Wait()
	for _, name := range names {
		k.during[name]++
	}

	// Sometimes it dies again while it is starting.
	if k.random.IntN(4) == 0 {
		again := time.Duration(k.random.Int64N(int64(500 * time.Millisecond)))
		t.Logf("SIGKILL again %s into the start", again)
		starting, cancel := context.WithTimeout(ctx, again)
		k.node.Up(starting) // in time or not
		cancel()
		require.NoError(t, k.node.Kill())
		k.during["start-up"]++
	}
	require.NoError(t, k.node.Up(ctx))
	k.check(t)
}

// check is what holds after every round.
func (k *killer) check(t *testing.T) {
	ctx := t.Context()
	k.requireSurvivors(t)

	// A container starts from each image that is there, without a pull. One
	// that is not there can be pulled. Either way it is whole.
	pod := runPod(t, k.node, harness.PodSpec{Handler: k.handler})
	for _, img := range k.images {
		policy := harness.Never
		found, err := k.node.ImageStatus(ctx, img.Ref)
		require.NoError(t, err)
		if found == nil {
			policy = harness.IfNotPresent
		}
		c, err := pod.Run(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: policy})
		require.NoErrorf(t, err, "image %s, which is present: %t", img.Name, found != nil)
		requireRuns(t, c, img)
		if k.handler == harness.Guest {
			requireNotOnHost(t, k.node, img)
		}
		// CRI knows an image by three names. A removal that was cut short may
		// have taken some of them; a pull puts them back.
		_, err = pod.Pull(ctx, img.Ref)
		require.NoError(t, err)
	}

	// Kubelet removes the pods that it does not know.
	pods, err := k.node.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	require.NoError(t, err)
	for _, p := range pods.GetItems() {
		if slices.ContainsFunc(k.survivors, func(s survivor) bool { return s.Pod.ID == p.Id }) {
			continue
		}
		_, err := k.node.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.Id})
		require.NoErrorf(t, err, "stop pod %s (%s)", p.Metadata.Name, p.State)
		_, err = k.node.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
		require.NoErrorf(t, err, "remove pod %s", p.Metadata.Name)
	}
	for _, img := range k.images {
		if !slices.ContainsFunc(k.survivors, func(s survivor) bool { return s.img.Ref == img.Ref }) {
			require.NoError(t, k.node.RemoveImage(ctx, img.Ref))
		}
	}
	left, err := k.node.ForgetInterruptions(ctx)
	require.NoError(t, err)
	k.left.Add(left)
	k.requireBaseline(t)
	k.requireSurvivors(t)
}

func (k *killer) requireSurvivors(t *testing.T) {
	t.Helper()
	for _, s := range k.survivors {
		status, err := s.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, status.State)
		require.Equal(t, s.since, status.StartedAt, "the container was restarted")
		requireRuns(t, s.Container, s.img)
	}
}

// inventory lists all that is on the node: without survivors, its leftovers.
func (k *killer) inventory(ctx context.Context) ([]string, error) {
	all, err := k.node.Leftovers(ctx)
	slices.Sort(all)
	return all, err
}

func (k *killer) requireBaseline(t *testing.T) {
	t.Helper()
	var diff []string
	// What is removed in the background is given time.
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		now, err := k.inventory(t.Context())
		require.NoError(t, err)
		diff = nil
		for _, x := range now {
			if !slices.Contains(k.baseline, x) {
				diff = append(diff, "orphan: "+x)
			}
		}
		for _, x := range k.baseline {
			// Of an image that was pulled again, overlayfs has no need of the
			// layers that it had unpacked.
			if k.handler == harness.Guest && !slices.Contains(now, x) {
				diff = append(diff, "lost: "+x)
			}
		}
		if len(diff) == 0 || time.Since(began) > 20*time.Second {
			break
		}
	}
	require.Empty(t, diff, "the node is not what it was before the round:\n%s", strings.Join(diff, "\n"))
}

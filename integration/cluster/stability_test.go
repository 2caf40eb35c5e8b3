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
package cluster_test

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// chaos interrupts a node at random moments. Pods that run have to keep running,
// in the same containers; pods that were starting have to become ready; pods that
// were going away have to be gone; new pods of both kinds have to start.
type chaos struct {
	*node
	random *rand.Rand
	serial int
	img    image
	steady map[string]string // pods that run all the time, and their container's ID
}

func newChaos(t *testing.T, n *node) *chaos {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("the moments are random, with seed %d", seed)
	c := &chaos{node: n, random: rand.New(rand.NewPCG(seed, 0)), steady: map[string]string{}}
	c.img = n.push(t, images.Spec{Name: "steady", Layers: 3})
	for _, handler := range []string{harness.Guest, harness.Runc} {
		p := n.run(t, n.Pod("steady-"+handler, handler, main(c.img)))
		c.steady[p.Name] = p.Status.ContainerStatuses[0].ContainerID
	}
	// Slow enough to be interrupted.
	n.reg.Inject(registry.Fault{Match: registry.Kinds(registry.Manifest, registry.Layer), Do: registry.Delay(50 * time.Millisecond)})
	return c
}

// pods creates pods of both kinds, of one image that is there and one that is new.
func (c *chaos) pods(t *testing.T, each int) []string {
	t.Helper()
	c.serial++
	fresh := c.push(t, images.Spec{Name: fmt.Sprintf("fresh-%d", c.serial), Layers: 6})
	var names []string
	for i := range each {
		for _, handler := range []string{harness.Guest, harness.Runc} {
			img := fresh
			if i%2 == 1 {
				img = c.img
			}
			p := c.Pod(fmt.Sprintf("pod-%d-%d-%s", c.serial, i, handler), handler, main(img))
			c.create(t, p)
			names = append(names, p.Name)
		}
	}
	return names
}

// pause waits for a random time.
func (c *chaos) pause(most time.Duration) { time.Sleep(time.Duration(c.random.Int64N(int64(most)))) }

// interrupt ends containerd, and starts it again.
func (c *chaos) interrupt(t *testing.T, signal syscall.Signal) {
	t.Helper()
	c.interrupted = true
	require.NoError(t, c.Node.Signal(signal))
	c.pause(time.Second)
	require.NoError(t, c.Node.Up(t.Context()))
}

// round interrupts containerd while pods start, and again while they go away.
func (c *chaos) round(t *testing.T, signal syscall.Signal) {
	t.Helper()
	c.check(t, func() { c.interrupt(t, signal) })
}

func (c *chaos) check(t *testing.T, interrupt func()) {
	t.Helper()
	starting := c.pods(t, 2)
	c.pause(3 * time.Second)
	interrupt()
	for _, name := range starting {
		c.waitReady(t, name)
	}
	c.requireSteady(t)

	for _, name := range starting {
		require.NoError(t, control.API.DeletePod(t.Context(), name, 2*time.Second))
	}
	c.pause(3 * time.Second)
	interrupt()
	for _, name := range starting {
		c.waitGone(t, name)
	}
	c.requireSteady(t)

	after := c.pods(t, 1)
	for _, name := range after {
		c.waitReady(t, name)
	}
	for _, name := range after {
		c.delete(t, name)
	}
}

func (c *chaos) requireSteady(t *testing.T) {
	t.Helper()
	for name, id := range c.steady {
		p := c.waitReady(t, name)
		require.Equal(t, id, p.Status.ContainerStatuses[0].ContainerID, "container of %s", name)
		require.Zero(t, p.Status.ContainerStatuses[0].RestartCount, "restarts of %s", name)
		require.Equal(t, corev1.PodRunning, p.Status.Phase)
		c.requireRuns(t, name, "main", c.img)
	}
}

// Whatever containerd is interrupted by and at, nothing that a user deployed is
// lost.
func TestStability(t *testing.T) {
	const rounds = 4
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			record(t, stability, fmt.Sprintf("signal %q to containerd while pods start, run and go away, %d rounds at random moments", signal, rounds))
			n := newNode(t, options{})
			c := newChaos(t, n)
			for range rounds {
				c.round(t, signal)
			}
		})
	}
}

// Kubelet knows nothing but what containerd tells it when it starts again, and it
// sees every pod for the first time.
func TestKubeletRestart(t *testing.T) {
	for _, both := range []bool{false, true} {
		name := "kubelet"
		if both {
			name = "kubelet and containerd"
		}
		t.Run(name, func(t *testing.T) {
			record(t, stability, "restart of "+name+" while pods start, run and go away")
			n := newNode(t, options{})
			c := newChaos(t, n)
			for range 2 {
				c.check(t, func() {
					require.NoError(t, n.Down())
					if both {
						c.interrupt(t, syscall.SIGKILL)
					}
					require.NoError(t, n.Up(t.Context()))
				})
			}
			// An image that the one kind has and the other has not, over a restart.
			img := n.push(t, images.Spec{Name: "over-restart", Layers: 4, User: "1000:1000"})
			n.run(t, n.Pod("before", harness.Guest, main(img)))
			require.NoError(t, n.Down())
			if both {
				c.interrupt(t, syscall.SIGTERM)
			}
			require.NoError(t, n.Up(t.Context()))
			n.run(t, n.Pod("after", harness.Runc, main(img)))
			require.Equal(t, "1000\n", n.exec(t, "after", "main", "id", "-u"))
			n.run(t, n.Pod("after-too", harness.Guest, main(img)))
			require.Equal(t, "1000\n", n.exec(t, "after-too", "main", "id", "-u"))
		})
	}
}

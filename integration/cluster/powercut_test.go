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
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

// How many rounds TestPowerCuts has, and what repeats the moments and the losses of
// a run.
const (
	cutsEnv = "GUEST_PULL_CUTS"
	seedEnv = "GUEST_PULL_SEED"
)

func envNumber(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	v, err := strconv.ParseUint(s, 10, 64)
	require.NoError(t, err, name)
	return v
}

// A node loses its power while it pulls, creates, removes and collects, and its disk
// what was not flushed. What kubelet had running runs again, in new containers. Each
// image is usable or absent, the databases are sound, and of what was being made or
// removed nothing is left when kubelet and the garbage collector have been there.
func TestPowerCuts(t *testing.T) {
	n := newMachine(t, "[plugins.'io.containerd.snapshotter.v1.guest-pull']\n  resolve_users = \"registry\"\n", nil)
	n.enable(t)
	rounds := envNumber(t, cutsEnv, 3)
	seed := envNumber(t, seedEnv, rand.Uint64())
	t.Logf("%d rounds; repeat them with %s=%d %s=%d", rounds, cutsEnv, rounds, seedEnv, seed)
	record(t, wholeNode, fmt.Sprintf("%d power cuts while images are pulled and removed, pods made and deleted; a full disk; a root that is read-only at boot", rounds))
	p := &powerCuts{machineNode: n, random: rand.New(rand.NewPCG(seed, 0)), steady: map[string]string{}}
	p.img = n.push(t, images.Spec{Name: "steady", Layers: 3, User: "app"})
	for _, handler := range []string{harness.Guest, harness.Runc} {
		p.steady[n.run(t, n.Pod("steady-"+handler, handler, main(p.img))).Name] = ""
	}
	p.restarted(t)
	p.requireSteady(t)
	p.old = n.push(t, images.Spec{Name: "old-0", Layers: 4, User: "app"})
	p.oldPods = p.create(t, p.old, 0)
	for name := range p.oldPods {
		n.waitReady(t, name)
	}
	n.sh(t, "sync") // the image of pods on the host, see syncedPulls
	for i := range int(rounds) {
		if !t.Run(fmt.Sprintf("round %d", i+1), func(t *testing.T) { p.round(t, i+1) }) {
			t.Fatalf("stopped after round %d of seed %d", i+1, seed)
		}
		require.NoError(t, figures.Add(figures.Cuts, 1))
	}
	if rounds > 2 {
		require.NotZero(t, p.lost, "no cut has lost anything that was written: the disk is not tested")
	}
	require.True(t, t.Run("full disk", p.fullDisk))
	require.True(t, t.Run("read-only", p.readOnly))
}

type powerCuts struct {
	*machineNode
	random *rand.Rand
	img    image
	steady map[string]string // pods that always run, and their container's ID
	synced bool              // see [syncedPulls]
	lost   int               // blocks, by all cuts
	// What the next round removes.
	old     image
	oldPods map[string]image
}

// Containerd's default way to pull does not sync what it unpacks for overlayfs: after a
// loss of power the files of an image may be empty, and the image is there. That is
// containerd's, and nothing of a guest's image is on the host. With this it syncs, on its
// other way to pull. Rounds have one or the other; in those without, pods on the host have
// an image that was there before.
const (
	syncedPulls     = "/etc/containerd/conf.d/91-synced-pulls.toml"
	syncedPullsText = "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  image_pull_with_sync_fs = true\n"
)

// create creates a pod of each kind, and returns what image they have.
func (p *powerCuts) create(t *testing.T, img image, serial int) map[string]image {
	t.Helper()
	pods := map[string]image{}
	for _, handler := range []string{harness.Guest, harness.Runc} {
		name := fmt.Sprintf("pod-%d-%s", serial, handler)
		pods[name] = img
		if handler == harness.Runc && !p.synced {
			pods[name] = p.img
		}
		p.machineNode.create(t, p.Pod(name, handler, main(pods[name])))
	}
	return pods
}

func (p *powerCuts) round(t *testing.T, serial int) {
	fresh := p.push(t, images.Spec{Name: fmt.Sprintf("fresh-%d", serial), Layers: 6, User: "app"})
	pods := p.create(t, fresh, serial)
	for name := range p.oldPods {
		require.NoError(t, control.API.DeletePod(t.Context(), name, time.Second))
	}
	span := 4 * time.Second
	if podTimeout > 2*time.Minute {
		span = 45 * time.Second // emulated
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	removed := make(chan struct{})
	// Before the cut, or not any more.
	removal := time.Now().Add(time.Duration(p.random.Int64N(int64(span + span/4))))
	go func() {
		defer close(removed)
		for ctx.Err() == nil {
			// Until the power goes; kubelet makes the image come back. Each collection
			// flushes the disk, so there is some time in between.
			if time.Now().After(removal) {
				_ = p.Node.RemoveImage(ctx, p.old.Ref)
			}
			_ = p.Node.GC(ctx)
			time.Sleep(rand.N(3 * time.Second))
		}
	}()
	moment := time.Duration(p.random.Int64N(int64(span)))
	time.Sleep(moment)
	// Whoever is told that a container was made finds it after the cut. To make it
	// flushes the disk, and so the cut is a little later.
	p.sh(t, fmt.Sprintf("ctr containers create --snapshotter %s --runtime %s %s made-%d", harness.Snapshotter, harness.StandIn, p.img.Ref, serial))
	time.Sleep(time.Duration(p.random.Int64N(int64(span / 8))))
	written, lost, err := p.m.Cut(p.random)
	require.NoError(t, err)
	p.lost += lost
	cancel()
	<-removed
	t.Logf("cut after %s; %d blocks were not flushed, %d of them are lost (image_pull_with_sync_fs: %t)",
		moment.Round(time.Millisecond), written, lost, p.synced)
	before := map[string]string{}
	for name := range pods {
		pod, err := control.API.Pod(t.Context(), name)
		require.NoError(t, err)
		before[name] = containerID(pod)
	}

	p.synced = p.random.IntN(2) == 0
	require.NoError(t, p.m.Inspect(func(root string) error {
		err := soundDatabases(root)
		if p.synced {
			return errors.Join(err, os.WriteFile(filepath.Join(root, syncedPulls), []byte(syncedPullsText), 0o644))
		}
		return errors.Join(err, os.RemoveAll(filepath.Join(root, syncedPulls)))
	}))
	p.boot(t)
	p.sh(t, fmt.Sprintf("ctr snapshots --snapshotter %s mounts /mnt made-%d; ctr containers delete made-%[2]d", harness.Snapshotter, serial))
	for name, img := range pods {
		p.waitAnew(t, name, before[name])
		p.requireUsable(t, name, img)
	}
	for name := range p.oldPods {
		p.waitGone(t, name)
	}
	p.requireUsableOrAbsent(t, p.old, serial)
	p.requireNothingLost(t)
	p.sh(t, "sync") // kubelet may have pulled it anew for the host, see syncedPulls
	p.old, p.oldPods = fresh, pods
}

// restarted makes a container that containerd itself starts again whenever it does not
// run, after a loss of power too: of the same snapshot.
func (p *powerCuts) restarted(t *testing.T) {
	t.Helper()
	p.sh(t, fmt.Sprintf(`ctr images pull --plain-http --snapshotter %[1]s %[2]s >/dev/null
		ctr run --detach --null-io --cgroup system.slice:ctr:restarted --snapshotter %[1]s --runtime %[3]s --annotation io.kubernetes.cri.image-name=%[2]s \
			--label containerd.io/restart.status=running --label containerd.io/restart.policy=always %[2]s restarted`,
		harness.Snapshotter, p.img.Ref, harness.StandIn))
	p.requireRestarted(t)
}

func (p *powerCuts) requireRestarted(t *testing.T) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		require.Regexp(c, `(?m)^restarted +[0-9]+ +RUNNING`, p.sh(t, "ctr tasks list"))
	}, podTimeout, time.Second)
	require.Equal(t, p.img.Name+"\n", p.sh(t, "ctr tasks exec --exec-id look restarted cat /etc/image-name"))
}

// boot switches the machine on. Kubelet brings back what ran.
func (p *powerCuts) boot(t *testing.T) {
	t.Helper()
	require.NoError(t, p.m.Boot(t.Context()))
	require.NoError(t, p.m.Ready(t.Context()))
	p.requireSteady(t)
}

// waitAnew waits until a pod is ready, in another container than this one.
func (p *powerCuts) waitAnew(t *testing.T, name, container string) *corev1.Pod {
	t.Helper()
	return p.wait(t, name, "ready in a new container", func(pod *corev1.Pod) bool {
		return isReady(pod) && containerID(pod) != container
	})
}

// containerID is that of a pod's only container, or nothing.
func containerID(pod *corev1.Pod) string {
	if len(pod.Status.ContainerStatuses) == 0 {
		return ""
	}
	return pod.Status.ContainerStatuses[0].ContainerID
}

// requireSteady holds that what always runs does so, in containers that were started
// since it was asked last.
func (p *powerCuts) requireSteady(t *testing.T) {
	t.Helper()
	for name, id := range p.steady {
		p.steady[name] = containerID(p.waitAnew(t, name, id))
		p.requireUsable(t, name, p.img)
	}
	p.requireRestarted(t)
}

// requireUsable holds that a pod runs its image, as the user and with the groups that
// the image names.
func (p *powerCuts) requireUsable(t *testing.T, pod string, img image) {
	t.Helper()
	p.requireRuns(t, pod, "main", img)
	require.Equal(t, "1000:1000 1000 2000", ids(t, p.node, pod))
}

// requireUsableOrAbsent: a pod that may not pull says which.
func (p *powerCuts) requireUsableOrAbsent(t *testing.T, img image, serial int) {
	t.Helper()
	for _, handler := range []string{harness.Guest, harness.Runc} {
		pod := p.Pod(fmt.Sprintf("never-%d-%s", serial, handler), handler, withPolicy(img, corev1.PullNever))
		p.machineNode.create(t, pod)
		got := p.wait(t, pod.Name, "running, or without its image", func(pod *corev1.Pod) bool {
			s := pod.Status.ContainerStatuses
			return isReady(pod) || (len(s) == 1 && s[0].State.Waiting != nil && s[0].State.Waiting.Reason == "ErrImageNeverPull")
		})
		t.Logf("%s, which was being removed, is there for %s pods: %t", img.Name, handler, isReady(got))
		if isReady(got) {
			p.requireUsable(t, pod.Name, img)
		}
		p.delete(t, pod.Name)
	}
}

// requireNothingLost waits until kubelet has removed what is dead, and holds that every
// container's snapshot and directory has a container, and every layer's an image.
func (p *powerCuts) requireNothingLost(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(harness.CRI(t.Context()), podTimeout)
	defer cancel()
	// What a pull holds that the cut has ended stays under a lease, for a day.
	leases, err := p.Node.Client.LeasesService().List(ctx)
	require.NoError(t, err)
	for _, l := range leases {
		require.NoError(t, p.Node.Client.LeasesService().Delete(ctx, l))
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		require.NoError(c, p.Node.GC(ctx))
		require.Empty(c, p.orphans(t))
		owners := map[string]bool{}
		all, err := p.Node.Client.ContainerService().List(ctx)
		require.NoError(c, err)
		for _, k := range all {
			owners[k.ID] = true
		}
		images, err := p.Node.Client.ListImages(ctx)
		require.NoError(c, err)
		for _, i := range images {
			layers, err := i.RootFS(ctx)
			require.NoError(c, err, i.Name())
			for _, chain := range identity.ChainIDs(layers) {
				owners[chain.String()] = true
			}
		}
		for _, snapshotter := range []string{harness.Snapshotter, "overlayfs"} {
			for _, s := range p.snapshots(t, snapshotter) {
				require.True(c, owners[s], "the %s snapshot %s is of no container and no image", snapshotter, s)
			}
		}
	}, podTimeout, 2*time.Second)
}

// soundDatabases checks containerd's databases, and those of its plugins.
func soundDatabases(root string) error {
	files, err := filepath.Glob(filepath.Join(root, cluster.ContainerdRoot, "*", "*.db"))
	if err != nil {
		return err
	}
	if len(files) < 3 {
		return fmt.Errorf("containerd has the databases %q only", files)
	}
	var errs []error
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			return err
		}
		if info.Size() == 0 {
			continue // bbolt starts it anew: nothing was committed to it
		}
		db, err := bolt.Open(f, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f, err))
			continue
		}
		err = db.View(func(tx *bolt.Tx) error {
			var errs []error
			for err := range tx.Check() {
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		})
		if err = errors.Join(err, db.Close()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f, err))
		}
	}
	return errors.Join(errs...)
}

// The node boots with not a byte left on its disk. Containerd serves, and when there
// is room again pods start.
func (p *powerCuts) fullDisk(t *testing.T) {
	// fallocate is fast, and needs space of its own.
	p.sh(t, "systemctl stop kubelet; fallocate -l $(($(df --output=avail -B1 / | tail -1) - (64 << 20))) /fill; dd if=/dev/zero of=/fill2 bs=4k status=none 2>/dev/null || true; sync")
	require.Regexp(t, `^ *[0-9]{1,3}\n$`, p.sh(t, "df --output=avail -k / | tail -1"), "KiB that are left")
	_, _, err := p.m.Cut(p.random)
	require.NoError(t, err)
	require.NoError(t, p.m.Inspect(soundDatabases))
	require.NoError(t, p.m.Boot(t.Context()))
	require.Eventually(t, func() bool {
		_, err := p.Node.ImageStatus(t.Context(), p.img.Ref)
		return err == nil
	}, podTimeout, time.Second, "containerd does not serve on a full disk")
	p.sh(t, "rm /fill /fill2; systemctl restart kubelet")
	require.NoError(t, p.m.Ready(t.Context()))
	img := p.push(t, images.Spec{Name: "after-full", Layers: 3})
	for _, handler := range []string{harness.Guest, harness.Runc} {
		pod := p.run(t, p.Pod("after-full-"+handler, handler, main(img)))
		p.requireRuns(t, pod.Name, "main", img)
	}
	// Kubelet may have evicted what ran.
	for name := range p.steady {
		p.delete(t, name)
		delete(p.steady, name)
	}
	for _, handler := range []string{harness.Guest, harness.Runc} {
		p.steady[p.run(t, p.Pod("steady-again-"+handler, handler, main(p.img))).Name] = ""
	}
	p.requireSteady(t)
	p.requireNothingLost(t)
}

// A root file system that is mounted read-only, as after an error of the disk: the
// log says so, and once it can be written to everything comes back by itself.
func (p *powerCuts) readOnly(t *testing.T) {
	p.sh(t, "sed -i 's/defaults/ro/' /etc/fstab; sync")
	_, _, err := p.m.Cut(p.random)
	require.NoError(t, err)
	require.NoError(t, p.m.Boot(t.Context()))
	require.Contains(t, p.sh(t, "findmnt --noheadings --output OPTIONS /"), "ro,")
	require.Eventually(t, func() bool {
		return strings.Contains(p.sh(t, "journalctl --no-pager -b -u containerd"), "read-only file system")
	}, podTimeout, time.Second, "containerd does not say why it does not start")
	p.sh(t, "mount -o remount,rw /; sed -i 's/ro/defaults/' /etc/fstab")
	require.NoError(t, p.m.Ready(t.Context()))
	p.requireSteady(t)
	p.requireNothingLost(t)
}

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

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// podImages is how many images the pods share that are run at once.
const podImages = 10

// pods measures many pods at once, as after a reboot: all make their sandbox, pull,
// create and start at the same time. The guest does nothing, so that what is measured
// is containerd; with overlayfs it is the same guest.
func (b *bench) pods(ctx context.Context) (err error) {
	many := b.scale.pods
	b.begin(fmt.Sprintf("%d pods at once", many))
	var refs []string
	for i := range podImages {
		name := fmt.Sprintf("pods-%d", i)
		img, err := images.Build(images.Spec{Name: name, Layers: 5, LayerSize: b.scale.layerSize / 4})
		if err != nil {
			return err
		}
		ref, err := b.reg.Push(name+":1", img)
		if err != nil {
			return err
		}
		refs = append(refs, ref)
	}
	var contenders []contender
	longest := map[string]series{}
	for _, c := range []struct{ name, binaries, snapshotter string }{
		{guestPull, b.binaries.ours, guestPull}, {overlayfs, b.binaries.stock, overlayfs},
	} {
		n, err := harness.Start(ctx, harness.Options{
			Registry: b.reg, Binaries: c.binaries, ExtraConfig: quiet,
			GuestSnapshotter: c.snapshotter, Guest: guest.Config{Idle: true},
		})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.Close()) }()
		contenders = append(contenders, contender{c.name, func() (float64, error) {
			took, call, err := runAtOnce(ctx, n, many, refs)
			longest[c.name] = append(longest[c.name], call.Seconds())
			if err != nil {
				return 0, fmt.Errorf("%w\n%s", err, n.LogTail(10))
			}
			return took, errors.Join(n.Empty(ctx), n.GC(ctx))
		}})
	}
	contenders = append(contenders, contender{"runc", func() (float64, error) { return b.runcAtOnce(ctx, many) }})
	r, err := interleave(ctx, b.scale.podRounds, contenders...)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("run %d pods at once", many)
	b.compare(what, "overlayfs, stock containerd, the same guest", "s", r[guestPull], r[overlayfs], atMost(1))
	b.compare(what, "runc run, two for each pod, without containerd", "s", r[guestPull], r["runc"], nil)
	b.compare("the longest call of these", "overlayfs, stock containerd, the same guest", "s",
		longest[guestPull][1:], longest[overlayfs][1:], noLonger(5)) // the first one warms up
	return nil
}

// noLonger promises that nothing takes longer, in any round.
func noLonger(seconds float64) *target {
	return &target{text: fmt.Sprintf("at most %.4g s", seconds), met: func(r row) bool {
		for _, v := range r.Values {
			if v > seconds {
				return false
			}
		}
		return true
	}}
}

// runAtOnce runs pods of one container each, all at once, and returns the seconds until
// the last one runs, and what the longest call took.
func runAtOnce(ctx context.Context, n *harness.Node, many int, refs []string) (took float64, longest time.Duration, err error) {
	var mu sync.Mutex
	call := func(f func() error) error {
		start := time.Now()
		err := f()
		mu.Lock()
		defer mu.Unlock()
		longest = max(longest, time.Since(start))
		return err
	}
	took, err = timed(func() error {
		var g errgroup.Group
		for i := range many {
			ref := refs[i%len(refs)]
			g.Go(func() (err error) {
				var pod *harness.Pod
				if err := call(func() error {
					pod, err = n.RunPod(ctx, harness.PodSpec{Handler: harness.Guest})
					return err
				}); err != nil {
					return err
				}
				if err := call(func() error {
					_, err = pod.Pull(ctx, ref)
					return err
				}); err != nil {
					return err
				}
				var c *harness.Container
				if err := call(func() error {
					c, err = pod.Create(ctx, harness.ContainerSpec{Image: ref})
					return err
				}); err != nil {
					return err
				}
				return call(func() error { return c.Start(ctx) })
			})
		}
		return g.Wait()
	})
	return took, longest, err
}

// runcAtOnce measures the runtime alone: it runs as many containers, all at once, and
// removes them.
func (b *bench) runcAtOnce(ctx context.Context, pods int) (_ float64, err error) {
	dir, err := os.MkdirTemp(b.dir, "runc-")
	if err != nil {
		return 0, err
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil {
		return 0, err
	}
	if err := run("cp", "/bin/busybox", filepath.Join(rootfs, "busybox"))(); err != nil {
		return 0, err
	}
	if err := run("runc", "spec", "--bundle", dir)(); err != nil {
		return 0, err
	}
	if err := run("sed", "-i", "-e", `s/"terminal": true/"terminal": false/`, "-e", `s#"sh"#"/busybox", "sleep", "600"#`,
		filepath.Join(dir, "config.json"))(); err != nil {
		return 0, err
	}
	root := filepath.Join(dir, "state")
	each := func(f func(id string) *exec.Cmd) error {
		var g errgroup.Group
		for i := range 2 * pods {
			g.Go(func() error {
				id := fmt.Sprintf("%s-%d", filepath.Base(dir), i)
				if err := f(id).Run(); err != nil { // its output would be the container's
					return fmt.Errorf("runc, container %s: %w", id, err)
				}
				return nil
			})
		}
		return g.Wait()
	}
	took, err := timed(func() error {
		return each(func(id string) *exec.Cmd {
			return exec.CommandContext(ctx, "runc", "--root", root, "run", "--detach", "--bundle", dir, id)
		})
	})
	return took, errors.Join(err, each(func(id string) *exec.Cmd {
		return exec.Command("runc", "--root", root, "delete", "--force", id)
	}), os.RemoveAll(dir))
}

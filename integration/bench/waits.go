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
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// waits counts how often containerd waits for the disk for what kubelet asks of it:
// the calls of fsync and fdatasync, by strace. Counts are the same on any machine; but a
// garbage collection, which a removal starts soon after, may or may not fall into the
// time that is looked at, so each is the median of some.
func (b *bench) waits(ctx context.Context) error {
	b.begin("Waits for the disk")
	pods := map[string]*harness.Pod{}
	for _, handler := range []string{harness.Guest, harness.Runc} {
		pod, err := b.node.RunPod(ctx, harness.PodSpec{Handler: handler})
		if err != nil {
			return err
		}
		pods[handler] = pod
	}
	counted := func(name string, before, call, after func(*harness.Pod) error) (map[string]series, error) {
		var contenders []contender
		for _, c := range []struct{ name, handler string }{{guestPull, harness.Guest}, {overlayfs, harness.Runc}} {
			pod := pods[c.handler]
			contenders = append(contenders, contender{c.name, func() (float64, error) {
				if err := before(pod); err != nil {
					return 0, err
				}
				n, err := countWaits(b.node.Pid(), func() error { return call(pod) })
				return float64(n), errors.Join(err, after(pod))
			}})
		}
		b.log("  %s", name)
		return interleave(ctx, b.scale.waitRounds, contenders...)
	}
	nothing := func(*harness.Pod) error { return nil }

	for _, layers := range b.scale.waitPulls {
		img, err := b.push(layers)
		if err != nil {
			return err
		}
		what := "pull an image of " + plural(layers)
		r, err := counted(what,
			nothing,
			func(pod *harness.Pod) error {
				_, err := pod.Pull(ctx, img.ref)
				return err
			},
			func(*harness.Pod) error { return b.forget(ctx, img) })
		if err != nil {
			return err
		}
		b.compare("fsync and fdatasync calls: "+what, "overlayfs on the same containerd", "calls", r[guestPull], r[overlayfs], counts(20))
	}

	img, err := b.push(containerImage)
	if err != nil {
		return err
	}
	host, err := b.pushHost(containerImage)
	if err != nil {
		return err
	}
	creators := map[*harness.Pod]*creator{}
	for handler, pod := range pods {
		of := map[string]remoteImage{harness.Guest: img, harness.Runc: host}[handler]
		creators[pod] = &creator{name: handler, pod: pod}
		if err := creators[pod].prepare(ctx, of.ref); err != nil {
			return err
		}
	}
	r, err := counted("create a container",
		func(*harness.Pod) error { return b.node.GC(ctx) }, // what was removed before
		func(pod *harness.Pod) error {
			_, err := creators[pod].create(ctx)
			return err
		}, nothing)
	if err != nil {
		return err
	}
	b.compare("fsync and fdatasync calls: create a container", "overlayfs on the same containerd", "calls", r[guestPull], r[overlayfs], counts(10))
	for _, pod := range pods {
		if err := pod.Remove(ctx); err != nil {
			return err
		}
	}
	return errors.Join(b.forget(ctx, img), b.forget(ctx, host))
}

// counts promises that something happens so often at most.
func counts(n float64) *target {
	return &target{text: fmt.Sprintf("at most %.4g calls", n), met: func(r row) bool { return summarize(r.Values).Median <= n }}
}

// countWaits returns how often a process waits for the disk while f runs, and shortly
// after: what f started may end after it.
func countWaits(pid int, f func() error) (waits int, err error) {
	var trace, problems bytes.Buffer
	cmd := exec.Command("strace", "-f", "-qq", "-e", "signal=none", "-e", "trace=fsync,fdatasync,syncfs,sync,msync,sync_file_range", "-o", "/dev/stdout", "-p", strconv.Itoa(pid))
	cmd.Stdout, cmd.Stderr = &trace, &problems
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("count system calls: %w; the package strace has to be installed", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop := func() error {
		err := cmd.Process.Signal(unix.SIGINT) // it detaches
		return errors.Join(err, <-ended)
	}
	for until := time.Now().Add(10 * time.Second); !traced(pid); time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-ended:
			return 0, fmt.Errorf("strace ended: %w: %s", err, problems.String())
		default:
		}
		if time.Now().After(until) {
			return 0, errors.Join(fmt.Errorf("strace does not follow process %d: %s", pid, problems.String()), stop())
		}
	}
	err = f()
	time.Sleep(100 * time.Millisecond)
	var exit *exec.ExitError
	if stopErr := stop(); !errors.As(stopErr, &exit) { // it ends by the signal
		err = errors.Join(err, stopErr)
	}
	for line := range strings.Lines(trace.String()) {
		// A call that another thread interrupts has a second line, "resumed".
		if strings.Contains(line, "sync(") || strings.Contains(line, "syncfs(") || strings.Contains(line, "sync_file_range(") {
			waits++
		}
	}
	return waits, err
}

// traced says whether all threads of a process are followed.
func traced(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, t := range threads {
		status, err := os.ReadFile(t)
		if err == nil && strings.Contains(string(status), "TracerPid:\t0\n") {
			return false
		}
	}
	return true
}

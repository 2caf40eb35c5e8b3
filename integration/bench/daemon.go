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
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// The nodes whose memory and start are compared.
const (
	stockNode = "stock containerd"
	proxyNode = "stock containerd and a proxy snapshotter's daemon"
)

// noSync lets containers be made quickly. What is measured here writes nothing.
const noSync = "[plugins.'io.containerd.metadata.v1.bolt']\nno_sync = true\n"

// node is a containerd that is started and stopped many times.
type node struct {
	name        string
	harness     *harness.Node
	binary      string
	handler     string // of its pods
	snapshotter string
	daemon      func() (*daemon, error) // nil when it needs none
}

// daemons measures what the plugin adds to containerd itself: memory, the time to
// start, and the size of the binary.
func (b *bench) daemons(ctx context.Context) (err error) {
	b.begin("containerd itself")
	ours, err := fileSize(filepath.Join(b.binaries.ours, "containerd"))
	if err != nil {
		return err
	}
	stock, err := fileSize(filepath.Join(b.binaries.stock, "containerd"))
	if err != nil {
		return err
	}
	for _, dir := range []string{b.binaries.ours, b.binaries.stock} {
		if err := reread(filepath.Join(dir, "containerd")); err != nil {
			return err
		}
	}
	b.compare("size of the binary", "stock containerd, same build flags", "B", series{ours}, series{stock}, addsAtMost("1 MB", 1e6))
	if err := b.patchLines(); err != nil {
		return err
	}

	proxyDir := filepath.Join(b.dir, "daemon")
	startProxy := func() (*daemon, error) { return startDaemon(proxyDir) }
	proxyConfig, err := toml.Marshal(map[string]any{"proxy_plugins": map[string]any{
		guestPull: map[string]any{"type": "snapshot", "address": filepath.Join(proxyDir, "proxy.sock")},
	}})
	if err != nil {
		return err
	}
	var nodes []*node
	for _, n := range []*node{
		{name: guestPull, binary: b.binaries.ours, handler: harness.Guest, snapshotter: guestPull},
		{name: stockNode, binary: b.binaries.stock, handler: harness.Runc, snapshotter: overlayfs},
		{name: proxyNode, binary: b.binaries.stock, handler: harness.Guest, snapshotter: guestPull, daemon: startProxy},
	} {
		o := harness.Options{Registry: b.reg, Binaries: n.binary, ExtraConfig: quiet + noSync}
		if n.name == stockNode {
			o.GuestSnapshotter = overlayfs // it has no other
		}
		var d *daemon
		if n.daemon != nil {
			o.ExtraConfig += string(proxyConfig)
			o.LocalPull = true // stock containerd's transfer service refuses other snapshotters
			if d, err = n.daemon(); err != nil {
				return err
			}
		}
		n.harness, err = harness.Start(ctx, o)
		if err != nil {
			return errors.Join(err, d.stop())
		}
		defer func() { err = errors.Join(err, n.harness.Close()) }()
		if err := errors.Join(n.harness.Down(), d.stop()); err != nil {
			return err
		}
		nodes = append(nodes, n)
	}

	start, memory, err := b.startAndStop(ctx, nodes)
	if err != nil {
		return err
	}
	b.compare("start of containerd, until it answers CRI", stockNode, "s", start[guestPull], start[stockNode], nil)
	b.compare("start of containerd, until it answers CRI", proxyNode, "s", start[guestPull], start[proxyNode], nil)
	b.compare("resident memory, idle", stockNode, "B", memory[guestPull], memory[stockNode], addsAtMost("1 MB", 1e6))
	b.compare("resident memory, idle", proxyNode, "B", memory[guestPull], memory[proxyNode], nil)

	for _, n := range nodes {
		b.log("  filling: %s", n.name)
		if err := n.fill(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
	}
	_, memory, err = b.startAndStop(ctx, nodes)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("resident memory, with %d layers and %d containers", b.scale.memoryLayers, b.scale.memoryContainers)
	b.compare(what, stockNode+" with overlayfs", "B", memory[guestPull], memory[stockNode], atMost(0.6))
	b.compare(what, proxyNode, "B", memory[guestPull], memory[proxyNode], nil)
	return nil
}

// The lines that the patches of each line of containerd added on 2026-11-26, before
// they were made to wait less for the disk.
var linesBefore = map[string]float64{"v2.3": 1945, "v2.4": 1631}

// patchLines counts the lines that the patches add to containerd, tests left out: what
// is carried from one version of containerd to the next.
func (b *bench) patchLines() error {
	lineDir := filepath.Dir(filepath.Dir(b.binaries.stock)) // see harness.Peer
	lines := 0.0
	for _, patch := range b.Patches {
		files, err := filepath.Glob(filepath.Join(lineDir, "..", "..", "patches", "containerd", "*", patch+".patch"))
		if err == nil && len(files) != 1 {
			err = fmt.Errorf("%d files", len(files))
		}
		if err != nil {
			return fmt.Errorf("look for patch %s: %w", patch, err)
		}
		data, err := os.ReadFile(files[0])
		if err != nil {
			return err
		}
		test := false
		for l := range strings.Lines(string(data)) {
			switch {
			case strings.HasPrefix(l, "diff --git "):
				test = strings.Contains(l, "_test.go")
			case strings.HasPrefix(l, "+") && !strings.HasPrefix(l, "+++ ") && !test:
				lines++
			}
		}
	}
	b.compare("lines that the patches add, tests left out", "the patches of 2026-11-26", "lines", series{lines}, series{linesBefore[filepath.Base(lineDir)]}, atMost(1))
	return nil
}

// startAndStop starts and stops the nodes in turn, and returns the seconds until
// containerd answers, and the bytes that are resident once it has come to rest.
func (b *bench) startAndStop(ctx context.Context, nodes []*node) (start, memory map[string]series, err error) {
	memory = map[string]series{}
	var contenders []contender
	for _, n := range nodes {
		contenders = append(contenders, contender{n.name, func() (float64, error) {
			r, err := n.start(ctx)
			if err != nil {
				return 0, err
			}
			time.Sleep(b.scale.settle)
			resident, err := r.resident()
			memory[n.name] = append(memory[n.name], resident)
			return r.took, errors.Join(err, r.stop())
		}})
	}
	start, err = interleave(ctx, b.scale.startRounds, contenders...)
	for name, s := range memory {
		memory[name] = s[1:] // the first one warms up
	}
	return start, memory, err
}

// running is a node's containerd, and the daemon that it may need.
type running struct {
	took   float64 // seconds from exec to the first answer
	node   *harness.Node
	daemon *daemon
}

// start starts containerd as harness.Node.Up does, but looks more often whether it
// answers.
func (n *node) start(ctx context.Context) (*running, error) {
	r := &running{node: n.harness}
	if n.daemon != nil {
		d, err := n.daemon()
		if err != nil {
			return nil, err
		}
		r.daemon = d
	}
	begin := time.Now()
	if err := n.harness.Launch(); err != nil {
		return nil, errors.Join(err, r.daemon.stop())
	}
	err := n.answers(ctx)
	r.took = time.Since(begin).Seconds()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w\n%s", err, n.harness.LogTail(30)), r.stop())
	}
	return r, nil
}

// answers returns when containerd answers CRI.
func (n *node) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	const often = time.Millisecond
	for {
		if conn, err := net.Dial("unix", n.harness.Socket()); err == nil {
			conn.Close()
			break
		}
		if err := errors.Join(n.harness.Ended(), ctx.Err()); err != nil {
			return fmt.Errorf("%s: containerd does not listen: %w", n.name, err)
		}
		time.Sleep(often)
	}
	conn, err := grpc.NewClient("unix://"+n.harness.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	for {
		if _, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{}); err == nil {
			return nil
		}
		if ended := errors.Join(n.harness.Ended(), ctx.Err()); ended != nil {
			return fmt.Errorf("%s: containerd does not answer: %w", n.name, errors.Join(err, ended))
		}
		time.Sleep(often)
	}
}

func (r *running) resident() (float64, error) {
	bytes, err := resident(r.node.Pid())
	if err != nil || r.daemon == nil {
		return bytes, err
	}
	more, err := resident(r.daemon.cmd.Process.Pid)
	return bytes + more, err
}

func (r *running) stop() error { return errors.Join(r.node.Down(), r.daemon.stop()) }

// reread reads a file into the page cache anew. How much of a program is resident
// depends on how large the pieces are in which the cache has it: the same binary was
// seen with 30 and with 37 MB, depending on whether it had been written or read.
func reread(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		return fmt.Errorf("drop %s from the page cache: %w", file, err)
	}
	_, err = io.Copy(io.Discard, f)
	return err
}

// resident returns a process's resident memory in bytes.
func resident(pid int) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kb), "kB")))
			return float64(n) * 1024, err
		}
	}
	return 0, fmt.Errorf("process %d has no resident memory", pid)
}

// fill gives the node layers, while it is down, and then containers.
func (n *node) fill(ctx context.Context, b *bench) (err error) {
	root := n.harness.SnapshotterRoot(n.snapshotter)
	if n.daemon != nil {
		root = filepath.Join(b.dir, "daemon", "root")
	}
	backend, err := openBackend(ctx, n.snapshotter, root, true)
	if err != nil {
		return err
	}
	s, err := openMetadata(ctx, metadataFiles{
		db:      filepath.Join(n.harness.Root(), "io.containerd.metadata.v1.bolt", "meta.db"),
		content: filepath.Join(n.harness.Root(), "io.containerd.content.v1.content"),
	}, n.snapshotter, backend, true)
	if err != nil {
		return errors.Join(err, backend.Close())
	}
	if err := errors.Join(s.fill(namespace(ctx), "node", b.scale.memoryLayers), s.Close()); err != nil {
		return err
	}

	if n.daemon != nil {
		d, err := n.daemon()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.stop()) }()
	}
	if err := n.harness.Up(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.harness.Down()) }()
	img, err := b.push(layersPerImage)
	if err != nil {
		return err
	}
	if _, err := n.harness.Pull(ctx, harness.PullSpec{Image: img.ref, Handler: n.handler, Hint: harness.HintImageSpec}); err != nil {
		return err
	}
	// With each event containerd looks at all containers of the pod, so that a pod
	// of a thousand takes its time.
	const perPod = 50
	for done := 0; done < b.scale.memoryContainers; done += perPod {
		c, err := newCreator(ctx, n.name, n.harness, n.handler)
		if err != nil {
			return err
		}
		if err := c.prepare(ctx, img.ref); err != nil {
			return err
		}
		for range min(perPod, b.scale.memoryContainers-done) - 1 {
			if _, err := c.create(ctx); err != nil {
				return err
			}
		}
	}
	infos, err := n.harness.Snapshots(namespace(ctx), n.snapshotter)
	if want := b.scale.memoryLayers + b.scale.memoryContainers; err == nil && len(infos) < want {
		err = fmt.Errorf("the node has %d snapshots and should have %d", len(infos), want)
	}
	return err
}

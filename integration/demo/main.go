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

// demo shows guest pull at work, on one machine and on temporary paths: a
// containerd with the guest-pull snapshotter pulls an image over CRI, and a
// container starts whose guest pulled the image by itself. "make demo" runs it.
//
// The image comes from a registry inside of the program, whose log says who
// fetched what. With IMAGE in the environment it is any image that this machine
// can reach, and what the host fetched is read from containerd's content store.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := demo(ctx, os.Getenv("IMAGE"))
	if err != nil {
		fmt.Fprintf(os.Stderr, "\nFAIL  %v\n", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// subject is the image that is shown.
type subject struct {
	ref    string
	layers []v1.Descriptor
	reg    *registry.Registry // nil when the image is from elsewhere
}

func (s subject) size() (n int64) {
	for _, l := range s.layers {
		n += l.Size
	}
	return n
}

func demo(ctx context.Context, ref string) (ok bool, err error) {
	reg, err := registry.Start()
	if err != nil {
		return false, err
	}
	defer reg.Close()
	img, err := find(ctx, reg, ref)
	if err != nil {
		return false, err
	}
	node, err := harness.Start(ctx, harness.Options{Registry: reg})
	if err != nil {
		return false, err
	}
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, node.Close())
		}
	}()

	version, err := node.Client.Version(ctx)
	if err != nil {
		return false, err
	}
	title("guest-pull, inside containerd")
	row("containerd", "%s, snapshotter %q compiled in", version.Version, harness.Snapshotter)
	if n := len(node.Patches()); n > 0 {
		row("", "%d patches to its CRI: the pull below says nothing of a runtime handler", n)
	} else {
		row("", "no patches to its CRI: the pull below has to name the runtime handler")
	}
	row("on", "%s (temporary; the system's containerd is not touched)", node.Dir())
	if node.StandIn() {
		row("guest", "the stand-in guest: runc and a private file system, no virtual machine")
	} else {
		row("guest", "%s", node.RuntimeType())
	}

	title("1. An image in a registry")
	row("image", "%s", img.ref)
	row("layers", "%d, %s together", len(img.layers), bytesize(img.size()))

	title("2. The pod's sandbox, and the pull: kubelet's calls over CRI")
	start := time.Now()
	pod, err := node.RunPod(ctx, harness.PodSpec{Name: "demo", Handler: harness.Guest})
	if err != nil {
		return false, err
	}
	row("sandbox", "runs after %s", since(start))
	start = time.Now()
	if _, err := pod.Pull(ctx, img.ref); err != nil {
		return false, err
	}
	row("pull", "done after %s", since(start))
	onHost, err := hostFetched(ctx, node, img)
	if err != nil {
		return false, err
	}
	row("host fetched", "%s", onHost.other)
	row("", "%d of %d layers, %s of %s", len(onHost.layers), len(img.layers), bytesize(onHost.bytes), bytesize(img.size()))

	title("3. A container of it")
	start = time.Now()
	spec := harness.ContainerSpec{Name: "app", Image: img.ref}
	c, err := pod.Run(ctx, spec)
	if err != nil {
		return false, err
	}
	row("started", "after %s", since(start))
	if err := showMount(ctx, node, c); err != nil {
		return false, err
	}
	inGuest, err := guestFetched(node, img, c)
	if err != nil {
		return false, err
	}
	row("guest fetched", "%d of %d layers, %s of %s", len(inGuest.layers), len(img.layers), bytesize(inGuest.bytes), bytesize(img.size()))

	title("4. What the container says")
	output, state, err := watch(ctx, c, img.reg != nil)
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(output) {
		fmt.Printf("    | %s", line)
	}
	row("state", "%s", state)

	title("5. Clean up")
	// The host may have fetched something only now.
	if onHost, err = hostFetched(ctx, node, img); err != nil {
		return false, err
	}
	if err := errors.Join(node.Empty(ctx), node.CheckEmpty(ctx)); err != nil {
		return false, err
	}
	closed = true
	if err := node.Close(); err != nil {
		return false, err
	}
	row("left behind", "no container, snapshot, content, mount or process")

	if len(onHost.layers) > 0 || len(inGuest.layers) != len(img.layers) {
		fmt.Printf("\nFAIL  the host fetched %d of %d layers, the guest %d\n", len(onHost.layers), len(img.layers), len(inGuest.layers))
		return false, nil
	}
	fmt.Printf("\nOK  the host fetched 0 of %d layers (0 of %s), the guest fetched all of them\n", len(img.layers), bytesize(img.size()))
	return true, nil
}

// find makes the demo's own image, or looks up the one that ref names.
func find(ctx context.Context, reg *registry.Registry, ref string) (subject, error) {
	if ref == "" {
		img, err := images.Build(images.Spec{
			Name: "demo", Layers: 12, LayerSize: 4 << 20,
			Cmd: []string{"/bin/sh", "-c", `echo "hello from the guest"
echo "my root file system has $(find /data -type f | wc -l) data files, $(du -sm /data | cut -f1) MB"
trap 'exit 0' TERM; tail -f /dev/null & wait`},
		})
		if err != nil {
			return subject{}, err
		}
		if ref, err = reg.Push("demo:1", img); err != nil {
			return subject{}, err
		}
		m, err := img.Manifest()
		if err != nil {
			return subject{}, err
		}
		return subject{ref, m.Layers, reg}, nil
	}

	// Both containerd and the guest take a full reference; people write
	// "alpine".
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return subject{}, fmt.Errorf("IMAGE=%s: %w", ref, err)
	}
	var opts []name.Option
	if host, _, err := net.SplitHostPort(reference.Domain(named)); err == nil && net.ParseIP(host).IsLoopback() {
		opts = append(opts, name.Insecure)
	}
	r, err := name.ParseReference(named.String(), opts...)
	if err != nil {
		return subject{}, fmt.Errorf("IMAGE=%s: %w", ref, err)
	}
	img, err := remote.Image(r, remote.WithContext(ctx))
	if err != nil {
		return subject{}, fmt.Errorf("IMAGE=%s: %w", ref, err)
	}
	m, err := img.Manifest()
	if err != nil {
		return subject{}, fmt.Errorf("IMAGE=%s: %w", ref, err)
	}
	return subject{ref: named.String(), layers: m.Layers}, nil
}

// fetched is what one side got of an image.
type fetched struct {
	layers []string // digests
	bytes  int64    // of the layers
	other  string   // what else, for a person to read
}

// hostFetched asks the registry's log and containerd's content store.
func hostFetched(ctx context.Context, n *harness.Node, s subject) (f fetched, err error) {
	var digests []string
	for _, l := range s.layers {
		digests = append(digests, l.Digest.String())
	}
	f.layers = n.Blobs(digests...)
	if s.reg != nil {
		log := s.reg.Log().By(registry.Host).In("demo")
		f.bytes = log.Of(registry.Layer).Bytes()
		for _, d := range log.Of(registry.Layer).References() {
			if !slices.Contains(f.layers, d) {
				f.layers = append(f.layers, d)
			}
		}
		f.other = fmt.Sprintf("the manifest, %s, and the config, %s",
			bytesize(log.Of(registry.Manifest).Bytes()), bytesize(log.Of(registry.Config).Bytes()))
		return f, nil
	}
	var size int64
	var count int
	err = n.Client.ContentStore().Walk(harness.CRI(ctx), func(i content.Info) error {
		if slices.Contains(digests, i.Digest.String()) {
			f.bytes += i.Size
			return nil
		}
		size += i.Size
		count++
		return nil
	})
	f.other = fmt.Sprintf("%d manifests and configs, %s (the pause image's included)", count, bytesize(size))
	return f, err
}

// guestFetched asks the registry's log, or the stand-in guest itself.
func guestFetched(n *harness.Node, s subject, c *harness.Container) (f fetched, err error) {
	if s.reg != nil {
		log := s.reg.Log().By(registry.Guest).Of(registry.Layer).OK()
		return fetched{layers: log.References(), bytes: log.Bytes()}, nil
	}
	if !n.StandIn() {
		return f, errors.New("what a real guest fetched from a foreign registry cannot be seen from here; run without IMAGE or without RUNTIME")
	}
	record, err := n.Record(harness.CRINamespace, c.ID)
	if err != nil {
		return f, err
	}
	for _, l := range record.Image.Layers {
		f.layers = append(f.layers, l.Digest)
		f.bytes += l.Size
	}
	return f, nil
}

// showMount prints the mount that containerd hands to the runtime.
func showMount(ctx context.Context, n *harness.Node, c *harness.Container) error {
	mounts, err := n.Mounts(ctx, c.ID)
	if err != nil {
		return err
	}
	if len(mounts) != 1 {
		return fmt.Errorf("the container has %d root file system mounts, want 1: %v", len(mounts), mounts)
	}
	row("mount", "type %s", mounts[0].Type)
	for _, o := range mounts[0].Options {
		if !strings.HasPrefix(o, volume.OptionPrefix) {
			row("", "%s", strings.Replace(o, n.Dir(), "...", 1))
			continue
		}
		vol, err := volume.ParseOption(o)
		if err != nil {
			return err
		}
		var text bytes.Buffer
		enc := json.NewEncoder(&text)
		enc.SetIndent("", "  ")
		if err := enc.Encode(vol); err != nil {
			return err
		}
		row("", "%s, decoded:", strings.TrimSuffix(volume.OptionPrefix, "="))
		for line := range strings.Lines(text.String()) {
			row("", "  %s", strings.TrimSuffix(line, "\n"))
		}
	}
	return nil
}

// watch returns what the container has printed, and its state. An image of the
// demo's own is waited for; nobody knows how talkative another one is.
func watch(ctx context.Context, c *harness.Container, own bool) (output, state string, err error) {
	if own {
		if _, err := c.WaitLogs(ctx, "MB\n"); err != nil {
			return "", "", err
		}
	}
	deadline := time.Now().Add(3 * time.Second)
	for {
		s, err := c.Status(ctx)
		if err != nil {
			return "", "", err
		}
		if output, err = c.Logs(); err != nil {
			return "", "", err
		}
		state = strings.ToLower(strings.TrimPrefix(s.State.String(), "CONTAINER_"))
		if s.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return output, fmt.Sprintf("%s, exit code %d", state, s.ExitCode), nil
		}
		if own || time.Now().After(deadline) {
			return output, state, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func title(s string) { fmt.Printf("\n%s\n", s) }

func row(key, format string, args ...any) {
	fmt.Printf("    %-14s %s\n", key, fmt.Sprintf(format, args...))
}

func since(t time.Time) string {
	return time.Since(t).Round(time.Millisecond).String()
}

func bytesize(n int64) string {
	switch {
	case n == 0:
		return "0 bytes"
	case n < 10_000:
		return fmt.Sprintf("%d bytes", n)
	case n < 1_000_000:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

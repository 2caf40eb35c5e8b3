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
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// special has every character that URLs, headers, shells, JSON and mount options
// give a meaning to.
const special = `p@ss w/o:rd,=%41&+"'\$<>|#?!é`

// Credentials for a private registry come from the pod, by CRI, and from the
// guest's own configuration. The host uses its own for the manifest, the guest its
// own for the layers, and nowhere else do they appear: not in a log, a label, an
// annotation, a mount option, nor in any file that containerd writes.
func TestCredentials(t *testing.T) {
	schemes := map[string]func(user, password string) registry.Option{
		"basic": registry.WithBasicAuth,
		"token": registry.WithTokenAuth,
	}
	for _, scheme := range slices.Sorted(maps.Keys(schemes)) {
		for _, path := range pullPaths[:2] {
			for name, password := range map[string]string{"plain": "guest-pull-planted-secret", "special": special} {
				t.Run(strings.Join([]string{scheme, path.name, name}, "/"), func(t *testing.T) {
					const user = "guest-pull-planted-user"
					reg := newRegistry(t, schemes[scheme](user, password))
					o := path.options
					o.Registry = reg
					o.Guest.Registries = map[string]guest.Registry{reg.Host(): {Username: user, Password: password}}
					n := harness.New(t, withPublicPause(t, o))
					t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
					img := push(t, reg, images.Spec{Name: "app", Layers: 3})
					pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})

					for what, auth := range map[string]*runtimeapi.AuthConfig{
						"none":           nil,
						"wrong password": {Username: user, Password: password + "x"},
						"wrong user":     {Username: user + "x", Password: password},
						"empty password": {Username: user},
					} {
						_, err := pod.Run(t.Context(), harness.ContainerSpec{Image: img.Ref, Auth: auth})
						count(t, figures.Faults, 1)
						require.Error(t, err, what)
						require.ErrorContains(t, err, img.Ref, what)
						requireHasOneOf(t, err, "401", "authorization failed", "no basic auth credentials", "insufficient_scope")
						require.NotContains(t, err.Error(), password)
						requireAbsent(t, n, img)
					}

					c := run(t, pod, harness.ContainerSpec{Image: img.Ref, Auth: &runtimeapi.AuthConfig{Username: user, Password: password}})
					requireRuns(t, c, img)
					requireInGuest(t, n, reg, c, img)
					requireNoSecret(t, n, user, password)
				})
			}
		}
	}
}

// The guest has credentials of its own. When it has none, it is the start of the
// container that fails, and it says where; the host is none the wiser.
func TestGuestWithoutCredentials(t *testing.T) {
	const user, password = "guest-pull-planted-user", "guest-pull-planted-secret"
	reg := newRegistry(t, registry.WithBasicAuth(user, password))
	n := harness.New(t, withPublicPause(t, harness.Options{Registry: reg}))
	t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
	img := push(t, reg, images.Spec{Name: "app", Layers: 3})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c, err := pod.Create(t.Context(), harness.ContainerSpec{Image: img.Ref, Auth: &runtimeapi.AuthConfig{Username: user, Password: password}})
	require.NoError(t, err)
	err = c.Start(t.Context())
	count(t, figures.Faults, 1)
	require.Error(t, err)
	if n.StandIn() {
		requireHasOneOf(t, err, "UNAUTHORIZED", "401")
		require.ErrorContains(t, err, img.Name)
	}
	require.NoError(t, c.Remove(t.Context()))
	requireNoSecret(t, n, user, password)
}

// withPublicPause takes the pause image from a registry that asks for nothing:
// RunPodSandbox carries no credentials.
func withPublicPause(t *testing.T, o harness.Options) harness.Options {
	t.Helper()
	public := newRegistry(t)
	pause, err := images.Pause()
	require.NoError(t, err)
	o.PauseImage, err = public.Push("pause:1", pause)
	require.NoError(t, err)
	return o
}

func requireHasOneOf(t *testing.T, err error, texts ...string) {
	t.Helper()
	require.Truef(t, slices.ContainsFunc(texts, func(s string) bool { return strings.Contains(err.Error(), s) }),
		"error %q has none of %q", err, texts)
}

// requireAbsent holds that a failed pull left no image that looks usable.
func requireAbsent(t *testing.T, n *harness.Node, img image) {
	t.Helper()
	found, err := n.ImageStatus(t.Context(), img.Ref)
	require.NoError(t, err)
	require.Nil(t, found, "an image after a pull that failed")
}

// requireNoSecret looks for secrets wherever they would be seen or kept: the log,
// all that containerd says of its objects, mount options, and all files of the
// node but for the guest's configuration, which stands for what is inside the
// guest.
func requireNoSecret(t *testing.T, n *harness.Node, secrets ...string) {
	t.Helper()
	ctx := harness.CRI(t.Context())
	var needles [][]byte
	for _, s := range secrets {
		needles = append(needles, []byte(s))
		// As they stand in a Go string, in JSON and in a header.
		quoted := strings.Trim(fmt.Sprintf("%q", s), `"`)
		needles = append(needles, []byte(quoted), []byte(basic(secrets[0], s)))
	}
	found := 0
	look := func(where string, text []byte) {
		for _, needle := range needles {
			if bytes.Contains(text, needle) {
				found++
				t.Errorf("%q is in %s", needle, where)
			}
		}
	}
	say := func(where string, v any) { look(where, fmt.Appendf(nil, "%+v", v)) }

	snapshots, err := n.Snapshots(ctx, harness.Snapshotter)
	require.NoError(t, err)
	for _, s := range snapshots {
		say("snapshot "+s.Name, s)
		if mounts, err := n.Client.SnapshotService(harness.Snapshotter).Mounts(ctx, s.Name); err == nil {
			say("mounts of "+s.Name, mounts)
			for _, m := range mounts {
				for _, o := range m.Options {
					if strings.HasPrefix(o, "io.katacontainers.volume=") {
						say("volume of "+s.Name, decodeVolume(t, m.Options))
					}
				}
			}
		}
	}
	imgs, err := n.Client.ImageService().List(ctx)
	require.NoError(t, err)
	say("images", imgs)
	containers, err := n.Client.ContainerService().List(ctx)
	require.NoError(t, err)
	for _, c := range containers {
		say("container "+c.ID, c)
		look("the OCI spec of "+c.ID, c.Spec.GetValue())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	look("the mount table", mounts)

	require.NoError(t, filepath.WalkDir(n.Dir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Base(path) == "guest.json" {
			return nil // gone, or no file
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil // gone
		}
		look("file "+path, text)
		return nil
	}))
	require.NoError(t, figures.Add(figures.SecretsSeen, int64(found)))
}

func basic(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

// A registry with a certificate of a private authority needs that authority in
// hosts.toml. Without it the pull fails and says why.
func TestPrivateAuthority(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			reg := newRegistry(t, registry.WithTLS())
			o := path.options
			o.Registry = reg
			n := harness.New(t, withPublicPause(t, o))
			t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
			img := push(t, reg, images.Spec{Name: "app", Layers: 3})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})

			hosts := hostsFile(n, reg.Host())
			trusted, err := os.ReadFile(hosts)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(hosts, fmt.Appendf(nil, "server = %q\n[host.%q]\n", reg.URL(), reg.URL()), 0o600))
			_, err = pod.Pull(t.Context(), img.Ref)
			count(t, figures.Faults, 1)
			require.ErrorContains(t, err, "certificate signed by unknown authority")
			require.ErrorContains(t, err, img.Ref)
			requireAbsent(t, n, img)

			require.NoError(t, os.WriteFile(hosts, trusted, 0o600))
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			requireInGuest(t, n, reg, c, img)
		})
	}
}

func hostsFile(n *harness.Node, host string) string {
	return filepath.Join(n.Dir(), "certs.d", host, "hosts.toml")
}

// A mirror answers for a registry, and when it is down the registry itself does.
// The image keeps the registry's name either way, which is what the guest is told.
func TestMirror(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			origin, mirror := newRegistry(t), newRegistry(t)
			o := path.options
			o.Registry = origin
			n := harness.New(t, o)
			t.Cleanup(func() { requireNoLayersOnHost(t, origin) })
			configure := func(mirrors ...string) {
				text := fmt.Appendf(nil, "server = %q\n", origin.URL())
				for _, m := range mirrors {
					text = fmt.Appendf(text, "[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", m)
				}
				require.NoError(t, os.MkdirAll(filepath.Dir(hostsFile(n, origin.Host())), 0o755))
				require.NoError(t, os.WriteFile(hostsFile(n, origin.Host()), text, 0o600))
			}
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})

			served := push(t, origin, images.Spec{Name: "served", Layers: 3})
			_, err := mirror.Push("served:1", served.Image)
			require.NoError(t, err)
			configure(mirror.URL())
			c := run(t, pod, harness.ContainerSpec{Image: served.Ref})
			requireRuns(t, c, served)
			requireInGuest(t, n, origin, c, served)
			require.NotEmpty(t, mirror.Log().By(registry.Host).Of(registry.Manifest).OK(), "the mirror was not asked")
			require.Empty(t, mirror.Log().By(registry.Host).Of(registry.Layer), "layers that the host asked the mirror for")
			require.Empty(t, origin.Log().By(registry.Host).In("served"), "the registry was asked, and the mirror has the image")

			// The mirror does not have this one, and another is not there at all.
			down := unusedAddress(t)
			configure("http://"+down, mirror.URL())
			other := push(t, origin, images.Spec{Name: "other", Layers: 3})
			c = run(t, pod, harness.ContainerSpec{Image: other.Ref})
			count(t, figures.Faults, 2)
			requireRuns(t, c, other)
			requireInGuest(t, n, origin, c, other)
			require.NotEmpty(t, origin.Log().By(registry.Host).In("other").Of(registry.Config).OK())

			// One that has too much to do, or is out of order, is passed over, from
			// the first request on or from the middle of the pull.
			configure(mirror.URL())
			for _, code := range []int{429, 500, 503} {
				for _, kinds := range [][]registry.Kind{{registry.Manifest, registry.Config}, {registry.Config}} {
					img := push(t, origin, images.Spec{Name: fmt.Sprintf("status-%d-%d", code, len(kinds)), Layers: 3})
					_, err := mirror.Push(fmt.Sprintf("status-%d-%d:1", code, len(kinds)), img.Image)
					require.NoError(t, err)
					well := mirror.Inject(registry.Fault{Match: registry.Kinds(kinds...), Do: registry.Status(code)})
					c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
					well()
					count(t, figures.Faults, 1)
					requireRuns(t, c, img)
					requireInGuest(t, n, origin, c, img)
				}
			}
		})
	}
}

// unusedAddress is an address on which nothing listens.
func unusedAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// A registry can go wrong in many ways. The pull fails with an error that names
// the image and what happened, nothing of it is left that looks like an image, and
// the next pull, from a registry that is well again, works.
func TestBadRegistry(t *testing.T) {
	const patience = 4 * time.Second
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			serial := 0
			for _, bad := range []struct {
				name string
				do   registry.Action
				of   []registry.Kind
				says []string // none: it succeeds nevertheless
			}{
				{"hangs at the manifest", registry.Hang(), []registry.Kind{registry.Manifest}, []string{"deadline exceeded", "DeadlineExceeded", "canceled"}},
				{"hangs at the config", registry.Hang(), []registry.Kind{registry.Config}, []string{"deadline exceeded", "DeadlineExceeded", "canceled"}},
				{"resets at the manifest", registry.Reset(), []registry.Kind{registry.Manifest}, []string{"connection reset", "EOF"}},
				{"resets at the config", registry.Reset(), []registry.Kind{registry.Config}, []string{"connection reset", "EOF"}},
				{"truncates the manifest", registry.Truncate(100), []registry.Kind{registry.Manifest}, []string{"unexpected EOF", "EOF", "size"}},
				// Containerd goes on where it was cut off.
				{"truncates the config", registry.Truncate(100), []registry.Kind{registry.Config}, nil},
				{"corrupts the manifest", registry.Corrupt(), []registry.Kind{registry.Manifest}, []string{"digest", "failed precondition"}},
				{"corrupts the config", registry.Corrupt(), []registry.Kind{registry.Config}, []string{"digest", "failed precondition"}},
				{"lies about the manifest's digest", registry.WrongDigest(), []registry.Kind{registry.Manifest}, []string{"digest", "not found", "sha256:0000"}},
				{"is out of order", registry.Status(503), []registry.Kind{registry.Manifest}, []string{"503"}},
				{"limits the rate", registry.Status(429), []registry.Kind{registry.Manifest}, []string{"429"}},
				{"has no such image", registry.Status(404), []registry.Kind{registry.Manifest}, []string{"not found"}},
				{"forbids", registry.Status(403), []registry.Kind{registry.Manifest}, []string{"403", "authorization failed"}},
			} {
				t.Run(bad.name, func(t *testing.T) {
					serial++
					img := push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", serial), Layers: 3})
					well := reg.Inject(registry.Fault{Match: registry.Kinds(bad.of...), Do: bad.do})
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					if !strings.HasPrefix(bad.name, "hangs") {
						cancel()
						ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
					}
					_, err := pod.Pull(ctx, img.Ref)
					cancel()
					well()
					count(t, figures.Faults, 1)
					if bad.says == nil {
						require.NoError(t, err)
					} else {
						require.Error(t, err)
						t.Logf("the error: %v", err)
						require.ErrorContains(t, err, img.Ref)
						requireHasOneOf(t, err, bad.says...)
						requireAbsent(t, n, img)
					}
					if strings.HasPrefix(bad.name, "corrupts") {
						// Containerd keeps the wrong bytes, for any snapshotter, and
						// has no need to ask for them again, until its garbage
						// collector has run.
						require.NoError(t, n.GC(t.Context()))
					}

					c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
					requireRuns(t, c, img)
					requireInGuest(t, n, reg, c, img)
				})
			}
		})
	}
}

// What goes wrong with a layer is the guest's to say: the host never asks for one.
// The start of the container fails, its removal leaves nothing, and a second try
// with a registry that is well again works.
func TestBadLayers(t *testing.T) {
	n, reg := newNode(t, harness.Options{Guest: guest.Config{PullTimeout: guest.Duration(5 * time.Second)}})
	if !n.StandIn() {
		t.Skip("a real guest has its own errors and time-outs; RUNTIME names one")
	}
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for i, bad := range []struct {
		name string
		do   registry.Action
	}{
		{"hangs", registry.Hang()},
		{"resets", registry.Reset()},
		{"truncates", registry.Truncate(100)},
		{"corrupts", registry.Corrupt()},
		{"has no such layer", registry.Status(404)},
	} {
		t.Run(bad.name, func(t *testing.T) {
			img := push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", i), Layers: 3})
			well := reg.Inject(registry.Fault{Match: registry.Kinds(registry.Layer), Do: bad.do})
			c, err := pod.Create(t.Context(), harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)
			err = c.Start(t.Context())
			well()
			count(t, figures.Faults, 1)
			require.Error(t, err)
			require.ErrorContains(t, err, img.Ref)
			assert.NoError(t, c.Remove(t.Context()))

			c = run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			requireNotOnHost(t, n, img)
		})
	}
}

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
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// connectProxy is an HTTP proxy that knows the way to registries which have no
// address: it leads every name to one of them, and counts by name.
type connectProxy struct {
	*httptest.Server
	to    string
	mu    sync.Mutex
	asked map[string]int
}

func newConnectProxy(t *testing.T, to string) *connectProxy {
	t.Helper()
	p := &connectProxy{to: to, asked: map[string]int{}}
	p.Server = httptest.NewServer(p)
	t.Cleanup(p.Close)
	return p
}

func (p *connectProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		http.Error(w, "only CONNECT", http.StatusMethodNotAllowed)
		return
	}
	p.mu.Lock()
	p.asked[r.Host]++
	p.mu.Unlock()
	there, err := net.Dial("tcp", p.to)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	here, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		there.Close()
		return
	}
	fmt.Fprint(here, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		defer there.Close()
		io.Copy(there, here) // until either end closes
	}()
	go func() {
		defer here.Close()
		io.Copy(here, there) // likewise
	}()
}

// A guest that knows nothing but what `containerd guest-pull guest-config` prints
// pulls where the host does: from a mirror in the place of a registry that is not
// there, from a registry with a private authority, over plain HTTP, and through a
// proxy; the configuration being a file of the guest's, or init data of the pod.
func TestGuestConfig(t *testing.T) {
	mirror, private, plain, proxied := newRegistry(t), newRegistry(t, registry.WithTLS()), newRegistry(t), newRegistry(t, registry.WithTLS())
	proxy := newConnectProxy(t, proxied.Host())
	o := withPublicPause(t, harness.Options{
		Guest: guest.Config{CDHConfig: filepath.Join(t.TempDir(), "cdh.toml")},
		Env:   []string{"HTTPS_PROXY=" + proxy.URL, "NO_PROXY=unused.example"},
		ExtraConfig: `[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
  pod_annotations = ["io.katacontainers.*"]
`,
	})
	n := harness.New(t, o)
	if !n.StandIn() {
		t.Skip("a real guest has its configuration in its image; RUNTIME names one")
	}
	write := func(host, text string) {
		file := hostsFile(n, host)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	}
	ca := func(name string, reg *registry.Registry) string {
		file := filepath.Join(n.Dir(), name+".pem")
		require.NoError(t, os.WriteFile(file, reg.CA(), 0o600))
		return file
	}
	write("absent.example", fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", mirror.URL()))
	write(private.Host(), fmt.Sprintf("server = %q\nca = %q\n", private.URL(), ca("private", private)))
	write(plain.Host(), fmt.Sprintf("server = %q\n", plain.URL()))
	write(registry.ProxiedName, fmt.Sprintf("ca = [%q]\n", ca("proxied", proxied)))

	cases := map[string]struct {
		reg  *registry.Registry
		host string
	}{
		"mirror":            {mirror, "absent.example"},
		"private authority": {private, private.Host()},
		"plain HTTP":        {plain, plain.Host()},
		"proxy":             {proxied, registry.ProxiedName},
	}
	config := func(args ...string) string {
		out, err := n.Containerd(t.Context(), append([]string{"guest-pull", "guest-config"}, args...)...)
		require.NoError(t, err, out)
		return out
	}
	tell := func(text string) { require.NoError(t, os.WriteFile(o.Guest.CDHConfig, []byte(text), 0o600)) }

	// A guest that is told nothing finds none of them.
	tell("")
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for name, c := range cases {
		img := push(t, c.reg, images.Spec{Name: "untold", Layers: 2})
		untold, err := pod.Create(t.Context(), harness.ContainerSpec{Image: c.host + "/untold:1"})
		require.NoError(t, err, name)
		err = untold.Start(t.Context())
		count(t, figures.Faults, 1)
		require.ErrorContains(t, err, "failed to pull image", name)
		require.Empty(t, c.reg.Log().By(registry.Guest).Of(registry.Layer).In(img.Name).OK(), name)
	}

	for how, annotations := range map[string]map[string]string{
		"a file":    nil,
		"init data": {guest.AnnotationInitData: config("--format", "annotation")},
	} {
		tell("")
		if annotations == nil {
			tell(config("--format", "cdh"))
		}
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest, Annotations: annotations})
		for name, c := range cases {
			t.Run(how+"/"+name, func(t *testing.T) {
				img := push(t, c.reg, images.Spec{Name: strings.ToLower(strings.ReplaceAll(name+"-"+how, " ", "-")), Layers: 3})
				img.Ref = c.host + "/" + img.Name + ":1"
				ran := run(t, pod, harness.ContainerSpec{Image: img.Ref})
				requireRuns(t, ran, img)
				requireInGuest(t, n, c.reg, ran, img)
				requireNoLayersOnHost(t, c.reg)
				require.NotEmpty(t, c.reg.Log().By(registry.Host).Of(registry.Manifest).In(img.Name).OK(), "the host pulled from elsewhere")
			})
		}
	}
	proxy.mu.Lock()
	assert.NotZero(t, proxy.asked[registry.ProxiedName+":443"])
	assert.Len(t, proxy.asked, 1, "what was asked for through the proxy")
	proxy.mu.Unlock()

	// What is printed is what the node does; what was printed before a change is not.
	old := filepath.Join(t.TempDir(), "old")
	for _, format := range []string{"cdh", "initdata", "annotation"} {
		require.NoError(t, os.WriteFile(old, []byte(config("--format", format)), 0o600))
		require.Empty(t, config("--compare", old), format)
	}
	write("absent.example", fmt.Sprintf("[host.%q]\n", plain.URL()))
	out, err := n.Containerd(t.Context(), "guest-pull", "guest-config", "--compare", old)
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 1, exit.ExitCode())
	require.Contains(t, out, "absent.example: the node pulls from "+plain.Host())
	out, err = n.Containerd(t.Context(), "guest-pull", "guest-config", "--compare", old, "--registry", plain.Host())
	require.NoError(t, err, out)
}

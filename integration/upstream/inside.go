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
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// inside runs a suite in its sandbox.
func inside() error {
	if len(os.Args) != 6 {
		return errors.New("not to be called by hand")
	}
	bin, out, build, expr := os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	var s suite
	for _, x := range suites {
		if x.name == os.Args[1] {
			s = x
		}
	}
	reg, trusted, err := serveImages(filepath.Join(out, "tools", "nonewprivs"))
	if err != nil {
		return err
	}
	defer reg.Close()
	// The address of busybox's index is its own, not the real one's.
	busybox, err := reg.Digest("containerd/busybox:1.36")
	if err != nil {
		return err
	}
	files := map[string]string{
		"/tmp/ca.pem":      string(trusted),
		"/tmp/images.toml": fmt.Sprintf("BusyBoxByDigest = %q\n", "ghcr.io/containerd/busybox@"+busybox.String()),
		"/tmp/config.toml": config(filepath.Join(build, "containerd-shim-guest-v2"), hasGuestPull(bin)),
		"/etc/cni/net.d/10-containerd-net.conflist":           network("containerd-net", "bridge", "cni0"),
		"/tmp/failpoint-cni-net.d/10-containerd-net.conflist": network("containerd-net-failpoint", "cni-bridge-fp", "cni-fp"),
	}
	guestConfig, err := json.Marshal(guest.Config{CAFile: "/tmp/ca.pem"})
	if err != nil {
		return err
	}
	files["/tmp/guest.json"] = string(guestConfig)
	if err := os.RemoveAll("/etc/cni"); err != nil {
		return err
	}
	for path, text := range files {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			return err
		}
	}
	// Where CNI plugins are looked for.
	if err := os.MkdirAll("/opt/cni/bin", 0o755); err != nil {
		return err
	}
	for _, dir := range []string{"/usr/lib/cni", filepath.Join(out, "tools")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("%w; install the package containernetworking-plugins", err)
		}
		for _, e := range entries {
			if err := os.Symlink(filepath.Join(dir, e.Name()), filepath.Join("/opt/cni/bin", e.Name())); err != nil {
				return err
			}
		}
	}

	env := append(os.Environ(),
		"PATH="+strings.Join([]string{bin, filepath.Join(out, "tools"), build, os.Getenv("PATH"), "/usr/sbin:/usr/bin:/sbin:/bin"}, ":"),
		"SSL_CERT_FILE=/tmp/ca.pem",
		"GODEBUG=", // as a service has it
		guest.ConfigEnv+"=/tmp/guest.json",
		"TEST_SNAPSHOTTER="+s.snapshotter,
		stageEnv+"=",
	)
	log, err := os.OpenFile(filepath.Join(out, "results", s.name+".containerd.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"-test.v", "-test.timeout=30m", "-test.run=" + expr}
	if s.critest {
		args = critestArgs(expr)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	const socket = "/run/containerd-test/containerd.sock"
	if s.binary == "cri-integration.test" || s.critest {
		go keepalive(ctx, filepath.Join(bin, "containerd"), []string{
			"--log-level=debug", "--config=/tmp/config.toml", "--address=" + socket,
			"--state=/run/containerd-test", "--root=/var/lib/containerd-test",
		}, env, log)
		if err := await(filepath.Join(bin, "ctr"), socket); err != nil {
			return err
		}
		args = append(args, "-runtime-handler="+s.runtimeHandler)
		if s.critest {
			args = append(args, "-runtime-endpoint=unix://"+socket, "-image-endpoint=unix://"+socket, "-nri-socket="+nriSocket)
		} else {
			args = append(args, "-cri-endpoint=unix://"+socket, "-image-list=/tmp/images.toml", "-containerd-bin=containerd", "-build-dir="+bin)
		}
	} else {
		// This suite starts its containerd itself.
		args = append(args, "-no-criu", "-test.root")
	}
	test := exec.Command(filepath.Join(out, s.binary), args...)
	test.Dir = "/tmp"
	test.Env = env
	test.Stdout, test.Stderr = os.Stdout, os.Stdout
	err = test.Run()
	if s.critest {
		if err := printReport(critestReport, os.Stdout); err != nil {
			return err
		}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return errors.New("cases failed")
	}
	return err
}

// await waits until containerd serves.
func await(ctr, socket string) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		out, err := exec.Command(ctr, "--address", socket, "plugins", "list").CombinedOutput()
		if err == nil && strings.Contains(string(out), "io.containerd.grpc.v1") {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("containerd does not serve: %w: %s", err, out)
		}
	}
}

func hasGuestPull(bin string) bool {
	return exec.Command(filepath.Join(bin, "containerd"), "guest-pull", "version").Run() == nil
}

const nriSocket = "/run/nri-test.sock"

// config is what containerd's own CI configures its CRI suite with
// (script/test/utils.sh), and a handler for the stand-in guest.
func config(shim string, guestPull bool) string {
	text := `version = 4
[plugins.'io.containerd.cri.v1.runtime']
  # Where the tests run in a container themselves, no process may be made less
  # likely to be killed than they are.
  restrict_oom_score_adj = true
  drain_exec_sync_io_timeout = "10s"
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc-fp]
    cni_conf_dir = "/tmp/failpoint-cni-net.d"
    cni_max_conf_num = 1
    pod_annotations = ["io.containerd.runtime.v2.shim.failpoint.*"]
    runtime_type = "runc-fp.v1"
[plugins.'io.containerd.snapshotter.v1.overlayfs']
  slow_chown = true
[plugins.'io.containerd.nri.v1.nri']
  disable = false
  socket_path = "` + nriSocket + `"
  plugin_path = "/no/pre-launched/nri/plugins"
`
	if guestPull {
		text += fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
  runtime_type = "io.containerd.guest.v2"
  runtime_path = %q
  snapshotter = "guest-pull"
`, shim)
	}
	return text
}

// network is the CNI configuration of containerd's own CI.
func network(name, plugin, bridge string) string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": %q,
  "plugins": [
    {
      "type": %q,
      "bridge": %q,
      "isGateway": true,
      "ipMasq": false,
      "promiscMode": true,
      "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "2001:4860:4860::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      },
      "capabilities": {"io.kubernetes.cri.pod-annotations": true}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, name, plugin, bridge)
}
